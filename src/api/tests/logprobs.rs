//! Log probabilities, echo, best_of and bad words, in every form that carries them.

use serde_json::{Value, json};

use super::*;
use crate::api::fields::Fields;
use crate::api::logprobs::LogprobsForm;
use crate::config::LogprobsMode;

fn strings<'a>(list: &'a Value, key: &str) -> Vec<&'a str> {
    list.as_array().unwrap().iter().map(|item| item[key].as_str().unwrap()).collect()
}

/// Text, then an emoji in four tokens.
fn emoji() -> Vec<Vec<Say>> {
    vec![vec![Say::Text("Hello w"), Say::Bytes("🤗".as_bytes()), Say::Text("!")]]
}

#[tokio::test]
async fn chat_logprobs_have_the_shape_of_openais() {
    let answer = saying("Hello world").await.chat(json!({"logprobs": true, "top_logprobs": 3})).await.unwrap();
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["refusal"], Value::Null);
    assert_eq!(strings(&logprobs["content"], "token"), ["Hello", " world"], "without the end of sequence");
    assert_eq!(
        logprobs["content"][1],
        json!({
            "token": " world", "logprob": -0.5, "bytes": b" world",
            "top_logprobs": [
                {"token": " world", "logprob": -0.5, "bytes": b" world"},
                {"token": "bytes:\\xe4", "logprob": -1.5, "bytes": [0xE4]},
                {"token": "</s>", "logprob": -9999.0, "bytes": b"</s>"},
            ],
        })
    );
    let bare = saying("Hello").await.chat(json!({"logprobs": true})).await.unwrap();
    assert_eq!(bare["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
    for off in [json!({}), json!({"logprobs": false}), json!({"logprobs": null, "top_logprobs": 0})] {
        assert_eq!(saying("Hello").await.chat(off).await.unwrap()["choices"][0]["logprobs"], Value::Null);
    }
}

#[tokio::test]
async fn tokens_joined_are_the_text_and_their_bytes_too() {
    for stop in [json!(null), json!("🤗!"), json!("lo w"), json!("o")] {
        let answer = world(&emoji()).await.chat(json!({"logprobs": true, "stop": stop})).await.unwrap();
        let choice = &answer["choices"][0];
        let text = choice["message"]["content"].as_str().unwrap();
        let content = &choice["logprobs"]["content"];
        assert_eq!(strings(content, "token").concat(), text, "{stop}");
        let bytes: Vec<u8> = content
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|item| item["bytes"].as_array().unwrap())
            .map(|byte| byte.as_u64().unwrap() as u8)
            .collect();
        assert!(bytes.starts_with(text.as_bytes()), "{stop}: a token that a stop string has cut keeps its bytes");
        assert_eq!(bytes == text.as_bytes(), stop.is_null() || text.ends_with('w'), "{stop}");
    }
    let answer = world(&emoji()).await.chat(json!({"logprobs": true})).await.unwrap();
    let content = &answer["choices"][0]["logprobs"]["content"];
    assert_eq!(strings(content, "token"), ["Hello", " w", "", "", "", "🤗", "!"]);
    assert_eq!(content[2]["bytes"], json!([0xF0]));
    let cut = world(&[vec![Say::Text("a"), Say::Bytes(b"\xF0\x9F")]]).await.chat(json!({"logprobs": true})).await.unwrap();
    assert_eq!(cut["choices"][0]["message"]["content"], "a\u{FFFD}");
    assert_eq!(strings(&cut["choices"][0]["logprobs"]["content"], "token"), ["a", "", "\u{FFFD}"]);
}

#[tokio::test]
async fn control_tokens_are_named_and_not_in_the_text() {
    let answer = saying("a<|begin_of_sentence|>b").await.complete(json!({"logprobs": 0})).await.unwrap();
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!((&answer["choices"][0]["text"], &logprobs["tokens"]), (&json!("ab"), &json!(["a", "<|begin_of_sentence|>", "b"])));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 1]));
}

#[tokio::test]
async fn streams_give_the_same_logprobs_with_the_text_they_belong_to() {
    for stop in [json!(null), json!("🤗!"), json!("Hello wo")] {
        let more = json!({"logprobs": true, "top_logprobs": 2, "stop": stop, "seed": 0});
        let whole = world(&emoji()).await.chat(more.clone()).await.unwrap();
        let body = with(json!({"messages": [{"role": "user", "content": "Hi"}]}), more);
        let events = world(&emoji()).await.events("/v1/chat/completions", body.clone()).await;
        let native = world(&emoji()).await.job_stream(with(body, json!({"stream": true}))).await;
        for chunks in [events, native] {
            let mut items = Vec::new();
            for choice in chunks.iter().map(|chunk| &chunk["choices"][0]) {
                let new = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
                let text = choice["delta"]["content"].as_str().unwrap_or_default();
                assert_eq!(strings(&json!(new), "token").concat(), text, "{choice}");
                items.extend(new);
            }
            assert_eq!(json!(items), whole["choices"][0]["logprobs"]["content"], "{stop}");
        }
    }
}

/// Whole and streamed: ids of tokens and their log probabilities, one for one.
#[tokio::test]
async fn token_ids_and_logprobs_belong_together() {
    let says = [vec![Say::Text("He<|begin_of_sentence|>llo "), Say::Bytes("🤗".as_bytes()), Say::Text(" world")]];
    for more in [
        json!({}),
        json!({"stop": "wor"}),
        json!({"stop": "🤗 wo"}),
        json!({"stop": "llo"}),
        json!({"max_tokens": 6}),
        json!({"stop_token_ids": [PARTIAL + 12]}),
    ] {
        let more = with(more, json!({"seed": 0, "logprobs": 1, "return_token_ids": true}));
        let world = world(&says).await;
        let plain = world.complete(with(more.clone(), json!({"logprobs": null}))).await.unwrap()["choices"][0].clone();
        let whole = world.complete(more.clone()).await.unwrap()["choices"][0].clone();
        assert_eq!((&whole["token_ids"], &whole["text"]), (&plain["token_ids"], &plain["text"]), "{more}");
        let logprobs = &whole["logprobs"];
        let ids = whole["token_ids"].as_array().unwrap();
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(logprobs[list].as_array().unwrap().len(), ids.len(), "{more}: {logprobs}");
        }
        let length = whole["text"].as_str().unwrap().chars().count() as u64;
        let offsets: Vec<u64> = logprobs["text_offset"].as_array().unwrap().iter().map(|offset| offset.as_u64().unwrap()).collect();
        assert!(offsets.is_sorted() && offsets.iter().all(|offset| *offset <= length), "{more}: {offsets:?} of {length}");
        let body = with(json!({"prompt": "Hi"}), more);
        let events = world.events("/v1/completions", body.clone()).await;
        let native = world.job_stream(with(body, json!({"stream": true}))).await;
        for chunks in [events, native] {
            let (mut streamed, mut named) = (Vec::new(), Vec::new());
            for choice in chunks.iter().map(|chunk| &chunk["choices"][0]) {
                let new = choice["token_ids"].as_array().cloned().unwrap_or_default();
                let tokens = choice["logprobs"]["tokens"].as_array().cloned().unwrap_or_default();
                assert_eq!(new.len(), tokens.len(), "in every chunk: {choice}");
                streamed.extend(new);
                named.extend(tokens);
            }
            assert_eq!((json!(streamed), json!(named)), (whole["token_ids"].clone(), logprobs["tokens"].clone()));
        }
    }
    let chat = world(&says).await.chat(json!({"seed": 0, "logprobs": true, "return_token_ids": true})).await.unwrap();
    let content = &chat["choices"][0]["logprobs"]["content"];
    assert_eq!(content.as_array().unwrap().len(), chat["choices"][0]["token_ids"].as_array().unwrap().len());
    assert_eq!(content.as_array().unwrap().last().unwrap()["token"], "</s>");
}

#[tokio::test]
async fn text_logprobs_have_the_older_shape() {
    let answer = saying("Hello world").await.complete(json!({"logprobs": 2})).await.unwrap();
    assert_eq!(
        answer["choices"][0]["logprobs"],
        json!({
            "tokens": ["Hello", " world"],
            "token_logprobs": [-0.5, -0.5],
            "top_logprobs": [{"Hello": -0.5, "bytes:\\xe4": -1.5}, {" world": -0.5, "bytes:\\xe4": -1.5}],
            "text_offset": [0, 5],
        })
    );
    let own = saying("Hello").await.complete(json!({"logprobs": 0})).await.unwrap();
    assert_eq!(own["choices"][0]["logprobs"]["top_logprobs"], json!([{"Hello": -0.5}]));
}

#[tokio::test]
async fn tokens_as_ids_when_the_request_or_the_setting_says_so() {
    let world_of = async |tokens_as_ids| {
        let settings = ApiSettings { tokens_as_ids, ..ApiSettings::default() };
        world_with(&[vec![Say::Text("Hello")]], settings, files(&[]), Duration::ZERO).await.unwrap()
    };
    let world = world_of(false).await;
    let id = world.ids("Hello", Special::Text)[0];
    let answer = world.complete(json!({"logprobs": 2, "return_tokens_as_token_ids": true})).await.unwrap();
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"], json!([format!("token_id:{id}")]));
    assert_eq!(answer["choices"][0]["logprobs"]["top_logprobs"][0][format!("token_id:{PARTIAL}")], -1.5);
    let answer = world_of(true).await.chat(json!({"logprobs": true})).await.unwrap();
    assert_eq!(answer["choices"][0]["logprobs"]["content"][0]["token"], format!("token_id:{id}"));
}

#[tokio::test]
async fn the_prompt_is_echoed_with_what_the_model_thinks_of_it() {
    let world = saying("Hello").await;
    let plain = world.complete(json!({"echo": true, "prompt": "Hello world"})).await.unwrap();
    assert_eq!((&plain["choices"][0]["text"], &plain["choices"][0]["logprobs"]), (&json!("Hello worldHello"), &Value::Null));
    let body = json!({"echo": true, "prompt": "Hello world", "logprobs": 1});
    let answer = world.complete(body.clone()).await.unwrap();
    let want = json!({
        "tokens": ["Hello", " world", "Hello"],
        "token_logprobs": [null, -0.125, -0.5],
        "top_logprobs": [null, {" world": -0.125}, {"Hello": -0.5}],
        "text_offset": [0, 5, 11],
    });
    assert_eq!(answer["choices"][0]["logprobs"], want);
    assert!(answer["choices"][0].get("prompt_logprobs").is_none());
    let events = world.events("/v1/completions", with(body.clone(), json!({"seed": 0}))).await;
    let mut joined = json!({"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []});
    for choice in events.iter().map(|event| &event["choices"][0]) {
        for (key, list) in joined.as_object_mut().unwrap() {
            list.as_array_mut().unwrap().extend(choice["logprobs"][key].as_array().cloned().unwrap_or_default());
        }
    }
    assert_eq!(joined, want);
    assert_eq!(events[0]["choices"][0]["text"].as_str().unwrap().get(..11), Some("Hello world"));
}

#[tokio::test]
async fn a_prompt_can_be_scored_alone() {
    let world = saying("Hello").await;
    let answer =
        world.complete(json!({"echo": true, "prompt": ["Hello world", "ab"], "logprobs": 1, "max_tokens": 0, "n": 2})).await.unwrap();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(
        choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect::<Vec<_>>(),
        ["Hello world", "Hello world", "ab", "ab"]
    );
    assert!(choices.iter().all(|choice| choice["finish_reason"] == "length"));
    assert_eq!(choices[1]["logprobs"]["token_logprobs"], json!([null, -0.125]));
    assert_eq!((&answer["usage"]["prompt_tokens"], &answer["usage"]["completion_tokens"]), (&json!(4), &json!(0)));
    let native = world.job(json!({"prompt": "ab", "echo": true, "sampling_params": {"max_tokens": 0, "logprobs": 0}})).await.unwrap();
    assert_eq!((&native["text"], &native["choices"][0]["logprobs"]["tokens"]), (&json!("ab"), &json!(["a", "b"])));
    assert!(world.service.engine().idle(Duration::from_secs(10)).await);
}

#[tokio::test]
async fn echo_of_ids_of_control_tokens_and_of_cut_prompts() {
    let world = saying("x").await;
    let ids = world.ids("<|begin_of_sentence|>ab", Special::Control);
    let text = async |more: Value| {
        let answer = world.complete(with(json!({"echo": true, "logprobs": 0, "max_tokens": 1}), more)).await.unwrap();
        (answer["choices"][0]["text"].clone(), answer["choices"][0]["logprobs"]["text_offset"].clone())
    };
    assert_eq!(text(json!({"prompt": ids})).await, (json!("abx"), json!([0, 0, 1, 2])));
    assert_eq!(
        text(json!({"prompt": ids, "skip_special_tokens": false})).await,
        (json!("<|begin_of_sentence|>abx"), json!([0, 21, 22, 23]))
    );
    assert_eq!(text(json!({"prompt": "abc", "truncate_prompt_tokens": 2})).await, (json!("bcx"), json!([0, 1, 2])));
    assert_eq!(text(json!({"prompt": "<|begin_of_sentence|>"})).await.0, "<|begin_of_sentence|>x", "plain text, whatever it spells");
}

#[tokio::test]
async fn prompt_logprobs_have_the_shape_of_vllms() {
    let world = saying("Hello").await;
    let id = world.ids(" world", Special::Text)[0];
    let entry = json!({
        id.to_string(): {"logprob": -0.125, "rank": 1, "decoded_token": " world"},
        PARTIAL.to_string(): {"logprob": -1.125, "rank": 2, "decoded_token": "bytes:\\xe4"},
    });
    let answer = world.complete(json!({"prompt": "Hello world", "prompt_logprobs": 2})).await.unwrap();
    assert_eq!(answer["choices"][0]["prompt_logprobs"], json!([null, entry]));
    assert_eq!((&answer["choices"][0]["text"], &answer["choices"][0]["logprobs"]), (&json!("Hello"), &Value::Null));
    let chat = world.chat(json!({"prompt_logprobs": 0, "n": 2})).await.unwrap();
    let prompt = world.ids("<|begin_of_sentence|>User: Hi\nAssistant: ", Special::Control);
    let list = chat["prompt_logprobs"].as_array().unwrap();
    assert_eq!((list.len(), &list[0]), (prompt.len(), &Value::Null));
    assert_eq!(list[1].as_object().unwrap().keys().collect::<Vec<_>>(), [&prompt[1].to_string()]);
    // With an echo both are told, each with its own number of alternatives.
    let both = world.complete(json!({"prompt": "Hello world", "prompt_logprobs": 2, "echo": true, "logprobs": 0})).await.unwrap();
    assert_eq!(both["choices"][0]["prompt_logprobs"], json!([null, entry]));
    assert_eq!(both["choices"][0]["logprobs"]["top_logprobs"][1], json!({" world": -0.125}));
}

#[tokio::test]
async fn a_chat_can_echo_the_message_it_continues() {
    let world = saying(" world").await;
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]);
    let more = json!({"messages": messages, "echo": true, "continue_final_message": true, "add_generation_prompt": false});
    assert_eq!(world.chat(more).await.unwrap()["choices"][0]["message"]["content"], "Hello world");
    assert_eq!(world.chat(json!({"echo": true})).await.unwrap()["choices"][0]["message"]["content"], " world", "the last is the user's");
}

#[tokio::test]
async fn the_best_of_several_by_mean() {
    // The scripted model thinks less of greater seeds.
    let world = world(&[vec![Say::Text("AAAA")], vec![Say::Text("B")], vec![Say::Text("CC")], vec![Say::Text("D")]]).await;
    let texts = |answer: &Value| -> Vec<(u64, String)> {
        let choices = answer["choices"].as_array().unwrap().iter();
        choices.map(|choice| (choice["index"].as_u64().unwrap(), choice["text"].as_str().unwrap().to_owned())).collect()
    };
    let want = |list: &[&str]| -> Vec<(u64, String)> { (0..).zip(list.iter().map(|text| (*text).to_owned())).collect() };
    // Seeds 7, 0, 1, 2 of 8: the second is the best.
    let answer = world.complete(json!({"seed": 7, "n": 2, "best_of": 4})).await.unwrap();
    assert_eq!(texts(&answer), want(&["AAAA", "B"]));
    assert_eq!(answer["usage"]["completion_tokens"], 2 + 5 + 2 + 3, "all candidates are paid for");
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null, "asked for by nobody");
    let answer = world.complete(json!({"prompt": ["x", "y"], "seed": 7, "best_of": 3})).await.unwrap();
    assert_eq!(texts(&answer), want(&["AAAA", "AAAA"]));
    assert_eq!(texts(&world.complete(json!({"n": 2, "best_of": 2})).await.unwrap()), want(&["AAAA", "B"]), "in order when all are wanted");
    assert_eq!(texts(&world.complete(json!({"best_of": 0})).await.unwrap()), want(&["AAAA"]));
}

#[tokio::test]
async fn the_best_are_ranked_by_the_models_own_probabilities_in_every_mode() {
    for mode in [LogprobsMode::RawLogits, LogprobsMode::ProcessedLogits, LogprobsMode::ProcessedLogprobs, LogprobsMode::RawLogprobs] {
        let settings = ApiSettings { logprobs_mode: mode, ..ApiSettings::default() };
        let says = [vec![Say::Text("A")], vec![Say::Text("B")], vec![Say::Text("C")]];
        let world = world_with(&says, settings, files(&[]), Duration::ZERO).await.unwrap();
        for more in [json!({}), json!({"logprobs": 1})] {
            let answer = world.complete(with(json!({"seed": 0, "best_of": 3}), more)).await.unwrap();
            assert_eq!(answer["choices"][0]["text"], "A", "{mode:?}");
        }
    }
}

#[tokio::test]
async fn numbers_may_be_limited_or_refused_by_settings() {
    let world_of = async |settings: ApiSettings| world_with(&[vec![Say::Text("a")]], settings, files(&[]), Duration::ZERO).await.unwrap();
    let all = world_of(ApiSettings { max_logprobs: u32::MAX, ..ApiSettings::default() }).await;
    let answer = all.chat(json!({"logprobs": true, "top_logprobs": -1})).await.unwrap();
    assert_eq!(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"].as_array().unwrap().len(), 3, "all that the model gave");
    let few = world_of(ApiSettings { max_logprobs: 2, ..ApiSettings::default() }).await;
    let failure = few.chat(json!({"logprobs": true, "top_logprobs": 3})).await.unwrap_err();
    assert_eq!(failure.message, "Invalid value for 'top_logprobs': must be <= 2.");
    let failure = few.complete(json!({"prompt_logprobs": -2})).await.unwrap_err();
    assert_eq!(failure.message, "Invalid 'prompt_logprobs': must be >= 0, got -2.");
    let none = world_of(ApiSettings { refuse_logprobs: true, ..ApiSettings::default() }).await;
    for body in [json!({"logprobs": 0}), json!({"prompt_logprobs": 0})] {
        let failure = none.complete(body).await.unwrap_err();
        assert!(failure.message.starts_with("Logprobs is disabled, please enable it in startup config"), "{failure}");
    }
    assert!(none.complete(json!({"best_of": 2})).await.is_ok());
    assert_eq!((models(&none).await, models(&all).await), (json!(false), json!(true)));
}

async fn models(world: &World) -> Value {
    world.post("/v1/models", Value::Null).await.unwrap()["data"][0]["permission"][0]["allow_logprobs"].clone()
}

#[tokio::test]
async fn the_older_native_form_has_no_place_for_them() {
    let settings = ApiSettings { native_format: crate::config::NativeFormat::Tokens, ..ApiSettings::default() };
    let world = world_with(&[vec![Say::Text("a")]], settings, files(&[]), Duration::ZERO).await.unwrap();
    let failure = world.job(json!({"prompt": "Hi", "sampling_params": {"logprobs": 1}})).await.unwrap_err();
    assert_eq!((failure.param.as_deref(), failure.code), (Some("sampling_params.logprobs"), Some("unsupported_parameter")));
    assert!(world.job(json!({"prompt": "Hi", "echo": true})).await.unwrap()["choices"][0]["tokens"][0] == "Hia");
}

#[tokio::test]
async fn the_mode_of_the_settings_reaches_the_engine() {
    let settings = ApiSettings { logprobs_mode: LogprobsMode::ProcessedLogits, ..ApiSettings::default() };
    let world = world_with(&[vec![Say::Text("a")]], settings, files(&[]), Duration::ZERO).await.unwrap();
    let fields = json!({"logprobs": 3, "echo": true});
    let options = world.service.served().options(&Fields::new(&fields).unwrap(), LogprobsForm::Text).unwrap();
    let spec = LogprobsSpec { top: 3, mode: LogprobsMode::ProcessedLogits };
    assert_eq!((options.sampling.logprobs, options.prompt_logprobs), (Some(spec), Some(spec)));
}

#[tokio::test]
async fn bad_words_are_cut_as_at_a_beginning_and_after_a_space() {
    let world = saying("a").await;
    let fields = json!({"bad_words": ["Hello", " w"], "bad_words_token_ids": [7, 5]});
    let options = world.service.served().options(&Fields::new(&fields).unwrap(), LogprobsForm::Text).unwrap();
    let mut want = vec![
        vec![5],
        vec![7],
        world.ids("Hello", Special::Text),
        world.ids(" Hello", Special::Text),
        world.ids("w", Special::Text),
        world.ids(" w", Special::Text),
    ];
    want.sort();
    assert_eq!(*options.sampling.bad_words, want);
}
