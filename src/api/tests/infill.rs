//! Filling in the middle: `suffix` of completions, and `/infill`.

use std::time::Duration;

use serde_json::{Value, json};

use super::{Say, World, files, items, saying, tokenizer_json, with, world_with};
use crate::api::frames;
use crate::config::ApiSettings;
use crate::text::tokenizer::Special;

const QWEN: &[&str] = &["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>", "<|fim_pad|>"];

/// A tokenizer with these tokens added, all of them special. `begins`: every text begins with a space.
fn tokenizer(added: &[&str], begins: bool) -> String {
    let mut json: Value = serde_json::from_str(&tokenizer_json()).unwrap();
    let tokens = json["added_tokens"].as_array_mut().unwrap();
    for name in added {
        let id = tokens.last().unwrap()["id"].as_u64().unwrap() + 1;
        tokens.push(json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}));
    }
    if begins {
        json["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, json["normalizer"]]});
    }
    json.to_string()
}

async fn filler(added: &[&str], begins: bool, text: &'static str) -> World {
    let tokenizer = tokenizer(added, begins);
    let files = files(&[("tokenizer.json", &tokenizer)]);
    world_with(&[vec![Say::Text(text)]], ApiSettings::default(), files, Duration::ZERO).await.unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

impl World {
    /// Ids of a layout that is written with its marks.
    fn laid_out(&self, text: &str) -> Vec<u32> {
        self.ids(text, Special::Control)
    }

    async fn fill(&self, more: Value) -> Value {
        let body = json!({"input_prefix": "He", "input_suffix": "ld", "seed": 0, "return_token_ids": true});
        self.post("/infill", with(body, more)).await.unwrap()
    }
}

#[tokio::test]
async fn each_family_has_its_layout() {
    for (added, expected) in [
        (QWEN, "<|fim_prefix|>He<|fim_suffix|>ld<|fim_middle|>"),
        (&["<fim_middle>", "<fim_suffix>", "<fim_prefix>"], "<fim_prefix>He<fim_suffix>ld<fim_middle>"),
        (&["<fim-prefix>", "<fim-suffix>", "<fim-middle>"], "<fim-prefix>He<fim-suffix>ld<fim-middle>"),
        (&["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], "<｜fim▁begin｜>He<｜fim▁hole｜>ld<｜fim▁end｜>"),
        (&["<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"], "<[fim-suffix]>ld<[fim-prefix]>He<[fim-middle]>"),
        (&["[PREFIX]", "[SUFFIX]"], "[SUFFIX]ld[PREFIX]He"),
    ] {
        let world = filler(added, false, "Hello").await;
        let answer = world.complete(json!({"prompt": "He", "suffix": "ld", "return_token_ids": true})).await.unwrap();
        let choice = &answer["choices"][0];
        assert_eq!((&choice["text"], ids(&choice["prompt_token_ids"])), (&json!("Hello"), world.laid_out(expected)), "{expected}");
        assert_eq!(answer["usage"]["prompt_tokens"], world.laid_out(expected).len());
        assert_eq!(ids(&world.fill(json!({})).await["prompt_token_ids"]), world.laid_out(expected), "{expected}");
    }
}

/// Code Llama's tokenizer begins a text with a space: so it does with the prefix, and not with what goes on behind the hole.
#[tokio::test]
async fn a_suffix_does_not_begin_with_a_space_of_the_tokenizers() {
    let world = filler(&["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], true, "Hello").await;
    let id = |token: &str| world.tokenizer.token_id(token).unwrap();
    let plain = |text: &str| text.chars().map(|c| id(&c.to_string())).collect::<Vec<_>>();
    let expected = [vec![id("▁<PRE>"), id("▁")], plain("ab"), vec![id("▁<SUF>")], plain("cd"), vec![id("▁<MID>")]].concat();
    let answer = world.complete(json!({"prompt": "ab", "suffix": "cd", "return_token_ids": true})).await.unwrap();
    assert_eq!(ids(&answer["choices"][0]["prompt_token_ids"]), expected);
}

#[tokio::test]
async fn files_may_name_the_tokens_themselves() {
    let tokenizer = tokenizer(&["<a>", "<b>", "<c>"], false);
    let config = json!({"prefix_token": "<a>", "suffix_token": {"content": "<b>"}, "middle_token": "<c>"}).to_string();
    let files = files(&[("tokenizer.json", &tokenizer), ("tokenizer_config.json", &config)]);
    let world = world_with(&[vec![Say::Text("x")]], ApiSettings::default(), files, Duration::ZERO).await.unwrap();
    assert_eq!(ids(&world.fill(json!({})).await["prompt_token_ids"]), world.laid_out("<a>He<b>ld<c>"));
}

#[tokio::test]
async fn marks_of_the_next_file_end_an_answer() {
    let world = filler(QWEN, false, "Hello<|file_sep|> world").await;
    let answer = world.complete(json!({"suffix": "x"})).await.unwrap();
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"], &choice["stop_reason"]), (&json!("Hello"), &json!("stop"), &Value::Null));
    // Without a suffix it is a completion like any other.
    assert_eq!(world.complete(json!({})).await.unwrap()["choices"][0]["text"], "Hello world");
    let filled = world.fill(json!({})).await;
    assert_eq!((&filled["content"], &filled["stop_type"], &filled["stop"]), (&json!("Hello"), &json!("eos"), &json!(true)));
    assert_eq!((&filled["tokens_predicted"], &filled["tokens_evaluated"]), (&json!(2), &json!(5)));
}

#[tokio::test]
async fn marks_in_a_text_are_text() {
    let world = filler(QWEN, false, "x").await;
    let filled = world.fill(json!({"input_prefix": "<|fim_suffix|>", "input_suffix": "<|fim_middle|>"})).await;
    let of = |text: &str| world.ids(text, Special::Text);
    let mark = |text: &str| world.laid_out(text);
    let expected = [mark(QWEN[0]), of("<|fim_suffix|>"), mark(QWEN[1]), of("<|fim_middle|>"), mark(QWEN[2])].concat();
    assert_eq!(ids(&filled["prompt_token_ids"]), expected);
}

#[tokio::test]
async fn what_completions_can_works_with_a_suffix() {
    let world = filler(QWEN, false, "Hello world").await;
    let complete = async |more: Value| world.complete(with(json!({"prompt": "He", "suffix": "ld"}), more)).await;
    assert_eq!(complete(json!({"echo": true})).await.unwrap()["choices"][0]["text"], "HeHello world");
    assert_eq!(complete(json!({"echo": true, "logprobs": 1})).await.unwrap_err().param.as_deref(), Some("echo"));
    let answer = complete(json!({"logprobs": 1, "n": 2, "stop": "wor"})).await.unwrap();
    let choice = &answer["choices"][1];
    assert_eq!(
        (&choice["text"], &choice["logprobs"]["tokens"][0], &choice["stop_reason"]),
        (&json!("Hello "), &json!("Hello"), &json!("wor"))
    );
    let scored = complete(json!({"prompt_logprobs": 0})).await.unwrap();
    assert_eq!(scored["choices"][0]["prompt_logprobs"].as_array().unwrap().len(), 5);
    let several = complete(json!({"prompt": ["He", "Hell"], "return_token_ids": true})).await.unwrap();
    assert_eq!(ids(&several["choices"][1]["prompt_token_ids"]), world.laid_out("<|fim_prefix|>Hell<|fim_suffix|>ld<|fim_middle|>"));
    let events = world.events("/v1/completions", json!({"prompt": "He", "suffix": "ld", "seed": 0})).await;
    let text: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "Hello world");
    let job = json!({"prompt": "He", "suffix": "ld", "seed": 0, "return_token_ids": true});
    let answer = world.job(job.clone()).await.unwrap();
    assert_eq!(ids(&answer["choices"][0]["prompt_token_ids"]), world.laid_out("<|fim_prefix|>He<|fim_suffix|>ld<|fim_middle|>"));
    let failure = world.job(with(job, json!({"apply_chat_template": true}))).await.unwrap_err();
    assert_eq!(failure.param.as_deref(), Some("suffix"));
}

#[tokio::test]
async fn infill_streams_and_runs_as_a_job() {
    let world = filler(QWEN, false, "Hello\n world").await;
    let body = json!({"input_prefix": "", "input_suffix": "", "prompt": "He", "seed": 0, "n_predict": 64});
    let whole = world.post("/infill", body.clone()).await.unwrap();
    let expected = json!({
        "index": 0, "content": "Hello\n world", "tokens": [], "tokens_predicted": 4, "tokens_evaluated": 4, "model": "baidu/ERNIE-test",
        "has_new_line": true, "truncated": false, "stop_type": "eos", "stopping_word": "", "stop": true,
    });
    assert_eq!(whole, expected);
    let job = json!({"openai_route": "/infill", "openai_input": body});
    assert_eq!(world.job(job.clone()).await.unwrap(), expected);
    let direct = world.call("/v1/infill", with(body, json!({"stream": true}))).await.unwrap();
    let streams =
        [items(direct).await.into_iter().map(Result::unwrap).collect(), world.job_stream(with(job, json!({"stream": true}))).await];
    for pieces in streams {
        let text: String = pieces.iter().map(|piece| piece.as_str().unwrap()).collect();
        assert!(frames::end_stream(&text), "{text}");
        let chunks: Vec<Value> =
            text.split_terminator("\n\n").map(|frame| serde_json::from_str(frame.strip_prefix("data: ").unwrap()).unwrap()).collect();
        let content: String = chunks.iter().map(|chunk| chunk["content"].as_str().unwrap()).collect();
        assert_eq!(content, "Hello\n world");
        let (last, parts) = chunks.split_last().unwrap();
        assert!(parts.iter().all(|part| part["stop"] == false));
        assert_eq!(*last, with(expected.clone(), json!({"content": ""})));
    }
}

#[tokio::test]
async fn infill_takes_the_fields_of_completions() {
    let world = filler(QWEN, false, "Hello world").await;
    let filled = world.fill(json!({"n_predict": 1})).await;
    assert_eq!((&filled["content"], &filled["stop_type"]), (&json!("Hello"), &json!("limit")));
    let filled = world.fill(json!({"n_predict": 0})).await;
    assert_eq!((&filled["content"], &filled["tokens_predicted"]), (&json!(""), &json!(0)), "the prompt is computed ahead");
    let filled = world.fill(json!({"stop": ["wor"], "n": 2})).await;
    assert_eq!((&filled[1]["index"], &filled[1]["stop_type"], &filled[1]["stopping_word"]), (&json!(1), &json!("word"), &json!("wor")));
    let filled = world.fill(json!({"n_probs": 1})).await;
    let first = &filled["completion_probabilities"][0];
    let id = world.laid_out("Hello")[0];
    assert_eq!((&first["token"], &first["id"], &first["top_logprobs"][0]["id"]), (&json!("Hello"), &json!(id), &json!(id)));
}

#[tokio::test]
async fn other_files_come_before_and_what_does_not_fit_is_cut() {
    let world = filler(QWEN, false, "x").await;
    let extra = json!([{"filename": "a", "text": "ab"}, {"text": "cd"}]);
    let filled = world.fill(json!({ "input_extra": extra })).await;
    let head = "<|repo_name|>myproject\n<|file_sep|>a\nab<|file_sep|>tmp\ncd<|file_sep|>filename\n";
    let expected = world.laid_out(&format!("{head}<|fim_prefix|>He<|fim_suffix|>ld<|fim_middle|>"));
    assert_eq!((ids(&filled["prompt_token_ids"]), &filled["truncated"]), (expected, &json!(false)));
    let plain = filler(&["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], false, "x").await;
    let filled = plain.fill(json!({"input_extra": [{"text": "ab"}]})).await;
    assert_eq!(ids(&filled["prompt_token_ids"]), plain.laid_out("\n\n--- snippet ---\n\nab<fim_prefix>He<fim_suffix>ld<fim_middle>"));
    // 96 tokens of context, of which 16 are for the answer and 3 mark the parts.
    let filled =
        world.fill(json!({"input_prefix": "1".repeat(200), "input_suffix": "2".repeat(200), "n_predict": 16, "input_extra": extra})).await;
    let expected = format!("<|fim_prefix|>{}<|fim_suffix|>{}<|fim_middle|>", "1".repeat(58), "2".repeat(19));
    assert_eq!((ids(&filled["prompt_token_ids"]), &filled["truncated"]), (world.laid_out(&expected), &json!(true)));
    // Completions are cut where they ask for it.
    let long = json!({"prompt": "1".repeat(200), "suffix": "ab"});
    assert_eq!(world.complete(long.clone()).await.unwrap_err().code, Some("context_length_exceeded"));
    let answer = world.complete(with(long, json!({"truncate_prompt_tokens": 11, "return_token_ids": true}))).await.unwrap();
    let expected = world.laid_out("<|fim_prefix|>111111<|fim_suffix|>ab<|fim_middle|>");
    assert_eq!(ids(&answer["choices"][0]["prompt_token_ids"]), expected);
}

#[tokio::test]
async fn mistakes_are_named() {
    let world = filler(QWEN, false, "x").await;
    for (body, param) in [
        (json!({"input_suffix": ""}), "input_prefix"),
        (json!({"input_prefix": "a"}), "input_suffix"),
        (json!({"input_prefix": 5, "input_suffix": ""}), "input_prefix"),
        (json!({"input_prefix": "", "input_suffix": "", "prompt": ["a"]}), "prompt"),
        (json!({"input_prefix": "", "input_suffix": "", "input_extra": {}}), "input_extra"),
        (json!({"input_prefix": "", "input_suffix": "", "input_extra": [{}]}), "input_extra[0].text"),
        (json!({"input_prefix": "", "input_suffix": "", "input_extra": [{"text": "a", "filename": 1}]}), "input_extra[0].filename"),
        (json!({"input_prefix": "", "input_suffix": "", "suffix": "x"}), "suffix"),
        (json!({"input_prefix": "", "input_suffix": "", "n_probs": -1}), "logprobs"),
    ] {
        let failure = world.post("/infill", body.clone()).await.unwrap_err();
        assert_eq!((failure.status(), failure.param.as_deref()), (400, Some(param)), "{body}");
    }
    let chat = world.chat(json!({"suffix": "x"})).await.unwrap_err();
    assert_eq!((chat.param.as_deref(), chat.code), (Some("suffix"), Some("unsupported_parameter")));
    let plain = saying("x").await;
    let failure = plain.post("/infill", json!({"input_prefix": "a", "input_suffix": "b"})).await.unwrap_err();
    assert_eq!((failure.status(), failure.param.as_deref(), failure.code), (400, Some("input_suffix"), Some("unsupported_parameter")));
}
