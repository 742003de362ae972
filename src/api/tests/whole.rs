//! Answers that are not streamed: their shapes, usage, endings, choices.

use serde_json::{Value, json};

use super::*;

#[tokio::test]
async fn a_chat_completion_has_the_shape_of_openais() {
    let world = saying("Hello world").await;
    let mut answer = world.chat(json!({})).await.unwrap();
    let created = answer.as_object_mut().unwrap().remove("created").unwrap();
    assert!(created.is_u64());
    let prompt = world.ids("<|begin_of_sentence|>User: Hi\nAssistant: ", Special::Control).len();
    let tokens = world.ids("Hello world", Special::Text).len() + 1;
    assert_eq!(
        answer,
        json!({
            "id": "chatcmpl-r1",
            "object": "chat.completion",
            "model": "baidu/ERNIE-test",
            "system_fingerprint": null,
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world", "refusal": null},
                "logprobs": null,
                "finish_reason": "stop",
                "stop_reason": null,
            }],
            "usage": {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens,
                "prompt_tokens_details": {"cached_tokens": 0}},
        })
    );
}

#[tokio::test]
async fn a_text_completion_has_the_shape_of_openais() {
    let mut answer = saying("Hello").await.complete(json!({})).await.unwrap();
    answer.as_object_mut().unwrap().remove("created").unwrap();
    assert_eq!(
        answer,
        json!({
            "id": "cmpl-r1",
            "object": "text_completion",
            "model": "baidu/ERNIE-test",
            "system_fingerprint": null,
            "choices": [{"index": 0, "text": "Hello", "logprobs": null, "finish_reason": "stop", "stop_reason": null}],
            "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, "prompt_tokens_details": {"cached_tokens": 0}},
        })
    );
}

#[tokio::test]
async fn choices_have_their_own_seeds_and_the_prompt_counts_once() {
    let world = world(&[vec![Say::Text("A")], vec![Say::Text("BB")], vec![Say::Text("CCC")]]).await;
    let answer = world.chat(json!({"n": 3, "seed": 1})).await.unwrap();
    let texts: Vec<&Value> = answer["choices"].as_array().unwrap().iter().map(|choice| &choice["message"]["content"]).collect();
    assert_eq!(texts, ["BB", "CCC", "A"]);
    let one = world.chat(json!({})).await.unwrap();
    assert_eq!(answer["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"]);
    assert_eq!(answer["usage"]["completion_tokens"], 3 + 4 + 2);
}

#[tokio::test]
async fn several_prompts_are_numbered_prompt_by_prompt() {
    let world = world(&[vec![Say::Text("A")], vec![Say::Text("B")]]).await;
    let answer = world.complete(json!({"prompt": ["Hi", "Hello", "72"], "n": 2})).await.unwrap();
    let choices: Vec<(u64, &str)> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| (choice["index"].as_u64().unwrap(), choice["text"].as_str().unwrap()))
        .collect();
    assert_eq!(choices, [(0, "A"), (1, "B"), (2, "A"), (3, "B"), (4, "A"), (5, "B")]);
    assert_eq!(answer["usage"]["prompt_tokens"], 2 + 1 + 2, "each prompt once");
}

#[tokio::test]
async fn token_prompts() {
    let world = saying("A").await;
    for (prompt, tokens) in [(json!([5, 6, 7]), 3), (json!([[5], [6, 7]]), 3)] {
        assert_eq!(world.complete(json!({"prompt": prompt})).await.unwrap()["usage"]["prompt_tokens"], tokens);
    }
}

#[tokio::test]
async fn lengths() {
    let world = saying("abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz").await;
    let answer = world.chat(json!({"max_tokens": 1})).await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], "a");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(world.complete(json!({})).await.unwrap()["usage"]["completion_tokens"], 16, "OpenAI's default");
    let chat = world.chat(json!({})).await.unwrap();
    assert_eq!(chat["usage"]["total_tokens"], CONTEXT, "the rest of the context");
    assert_eq!(world.chat(json!({"max_tokens": 100_000})).await.unwrap()["usage"]["total_tokens"], CONTEXT, "clipped");
    let last = world.complete(json!({"prompt": vec![5; CONTEXT - 1]})).await.unwrap();
    assert_eq!((&last["usage"]["completion_tokens"], &last["choices"][0]["finish_reason"]), (&json!(1), &json!("length")));
    for length in [CONTEXT, CONTEXT + 5] {
        let failure = world.complete(json!({"prompt": vec![5; length]})).await.unwrap_err();
        assert_eq!((failure.status(), failure.code, failure.param.as_deref()), (400, Some("context_length_exceeded"), Some("prompt")));
        assert!(failure.message.starts_with(&format!(
            "This model's maximum context length is {CONTEXT} tokens. However, your prompt resulted in {length} tokens."
        )));
    }
    let failure = world.chat(json!({"messages": "x".repeat(CONTEXT)})).await.unwrap_err();
    let total = CONTEXT + world.ids("<|begin_of_sentence|>User: \nAssistant: ", Special::Control).len();
    assert_eq!(
        failure.message,
        format!(
            "This model's maximum context length is {CONTEXT} tokens. However, your messages resulted in {total} tokens. Please reduce the length of \
             the messages (context_length_exceeded: prompt is too long)."
        )
    );
}

#[tokio::test]
async fn prompts_are_cut_from_the_left_when_asked() {
    let world = saying("A").await;
    let prompt: Vec<usize> = (0..200).map(|i| 5 + i % 50).collect();
    let answer = world.complete(json!({"prompt": prompt, "truncate_prompt_tokens": 3, "return_token_ids": true})).await.unwrap();
    assert_eq!(answer["choices"][0]["prompt_token_ids"], json!(prompt[197..]));
    let answer = world.complete(json!({"prompt": prompt, "truncate_prompt_tokens": -1, "max_tokens": 10})).await.unwrap();
    assert_eq!(answer["usage"]["prompt_tokens"], CONTEXT - 10);
}

#[tokio::test]
async fn default_max_tokens_is_a_setting() {
    let settings = ApiSettings { default_max_tokens: Some(3), ..ApiSettings::default() };
    let world = world_with(&[vec![Say::Text("abcdefgh")]], settings, files(&[]), Duration::ZERO).await.unwrap();
    assert_eq!(world.chat(json!({})).await.unwrap()["choices"][0]["message"]["content"], "abc");
    assert_eq!(world.complete(json!({})).await.unwrap()["choices"][0]["text"], "abc");
    assert_eq!(world.job(json!({"prompt": "Hi", "seed": 0})).await.unwrap()["text"], "abc");
    assert_eq!(world.chat(json!({"max_tokens": 4})).await.unwrap()["choices"][0]["message"]["content"], "abcd");
}

#[tokio::test]
async fn sampling_params_lie_below_the_top_level_at_every_door() {
    let world = saying("abcdefgh").await;
    let params = json!({"max_tokens": 3, "stop_sequences": ["b"], "sampling_params": null});
    assert_eq!(world.chat(json!({"sampling_params": params})).await.unwrap()["choices"][0]["message"]["content"], "a");
    let text = world.complete(json!({"sampling_params": {"max_tokens": 3}, "max_new_tokens": null})).await.unwrap();
    assert_eq!(text["choices"][0]["text"], "abc");
    let top = world.complete(json!({"sampling_params": {"max_tokens": 3}, "max_tokens": 2})).await.unwrap();
    assert_eq!(top["choices"][0]["text"], "ab");
    let unlimited = world.complete(json!({"n_predict": -1, "prompt": vec![5; 60], "truncate_prompt_tokens": -1})).await.unwrap();
    assert_eq!((&unlimited["choices"][0]["text"], &unlimited["usage"]["prompt_tokens"]), (&json!("abcdefgh"), &json!(60)));
}

#[tokio::test]
async fn stops() {
    let world = saying("one two three").await;
    let ending = |answer: &Value| {
        let choice = &answer["choices"][0];
        (choice["message"]["content"].clone(), choice["finish_reason"].clone(), choice["stop_reason"].clone())
    };
    let stopped = world.chat(json!({"stop": ["three", "o t"]})).await.unwrap();
    assert_eq!(ending(&stopped), (json!("one tw"), json!("stop"), json!("o t")));
    assert_eq!(stopped["usage"]["completion_tokens"], world.ids("one two t", Special::Text).len());
    let kept = world.chat(json!({"stop": "two", "include_stop_str_in_output": true})).await.unwrap();
    assert_eq!(ending(&kept), (json!("one two"), json!("stop"), json!("two")));
    let late = world.chat(json!({"stop": "e", "min_tokens": 5})).await.unwrap();
    assert_eq!(ending(&late), (json!("one two thr"), json!("stop"), json!("e")));
    let whole = world.chat(json!({"stop": "one two three"})).await.unwrap();
    assert_eq!(ending(&whole), (json!(""), json!("stop"), json!("one two three")));
    let id = world.ids("w", Special::Text)[0];
    let by_id = world.chat(json!({"stop_token_ids": [id]})).await.unwrap();
    assert_eq!(ending(&by_id), (json!("one t"), json!("stop"), json!(id)));
    let by_id = world.chat(json!({"stop_token_ids": [id], "include_stop_str_in_output": true})).await.unwrap();
    assert_eq!(ending(&by_id), (json!("one tw"), json!("stop"), json!(id)));
}

#[tokio::test]
async fn two_choices_stop_at_different_times() {
    let world = world(&[vec![Say::Text("aSTOPb")], vec![Say::Text("long text STOP and more")]]).await;
    let answer = world.chat(json!({"n": 2, "stop": "STOP"})).await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], "a");
    assert_eq!(answer["choices"][1]["message"]["content"], "long text ");
    assert!(world.service.engine().idle(Duration::from_secs(10)).await, "stopped rows are free");
}

#[tokio::test]
async fn greedy_choices_are_computed_once_and_given_n_times() {
    let world = world(&[vec![Say::Text("one, two")], vec![Say::Text("other")]]).await;
    let generated = || world.service.engine().stats().output_tokens;
    let texts = |answer: &Value| answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()).collect::<Vec<_>>();
    let single = world.complete(json!({"temperature": 0})).await.unwrap();
    let (tokens, before) = (single["usage"]["completion_tokens"].as_u64().unwrap(), generated());
    assert_eq!(before, tokens);
    let body = json!({"temperature": 0, "n": 3, "prompt": ["x", "y"], "logprobs": 1, "return_token_ids": true});
    let answer = world.complete(body.clone()).await.unwrap();
    assert_eq!(texts(&answer), vec![single["choices"][0]["text"].clone(); 6]);
    assert_eq!(answer["usage"]["completion_tokens"], 6 * tokens, "as if each had been computed");
    assert_eq!(generated() - before, 2 * tokens);
    for choice in 1..3 {
        for field in ["logprobs", "finish_reason", "token_ids"] {
            assert_eq!(answer["choices"][choice][field], answer["choices"][0][field]);
        }
    }
    let before = generated();
    let events =
        world.events("/v1/completions", with(body, json!({"seed": 0, "prompt": "x", "stream_options": {"include_usage": true}}))).await;
    let mut streamed = vec![String::new(); 3];
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        streamed[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
    }
    assert_eq!(streamed, vec!["one, two"; 3]);
    assert_eq!((&events.last().unwrap()["usage"]["completion_tokens"], generated() - before), (&json!(3 * tokens), tokens));
    // With randomness each is its own.
    assert_ne!(texts(&world.complete(json!({"n": 2, "temperature": 1})).await.unwrap())[0], "other");
    assert_eq!(texts(&world.complete(json!({"n": 2, "temperature": 1})).await.unwrap())[1], "other");
}

#[tokio::test]
async fn stop_strings_count_as_ends_and_not_as_cancellations() {
    // Slow enough to be stopped long before its end.
    let says = [vec![Say::Text("one, two, three, four, five, six, seven, eight, nine, ten, eleven")]];
    let world = world_with(&says, ApiSettings::default(), files(&[]), Duration::from_millis(3)).await.unwrap();
    for _ in 0..3 {
        let answer = world.complete(json!({"stop": ",", "max_tokens": 90})).await.unwrap();
        assert_eq!((&answer["choices"][0]["text"], &answer["choices"][0]["finish_reason"]), (&json!("one"), &json!("stop")));
    }
    assert!(world.service.engine().idle(Duration::from_secs(5)).await);
    let metrics = world.service.engine().stats().exposition("", "m");
    for line in [
        "request_success_total{model_name=\"m\",finished_reason=\"stop\"} 3",
        "request_success_total{model_name=\"m\",finished_reason=\"abort\"} 0",
        "e2e_request_latency_seconds_count{model_name=\"m\"} 3",
        "request_params_n_count{model_name=\"m\"} 3",
    ] {
        assert!(metrics.lines().any(|present| present == line), "{line} in {metrics}");
    }
}

#[tokio::test]
async fn special_tokens_are_hidden_unless_asked_for() {
    let world = saying("a<|begin_of_sentence|>b<think>c").await;
    assert_eq!(world.chat(json!({})).await.unwrap()["choices"][0]["message"]["content"], "ab<think>c");
    let shown = world.chat(json!({"skip_special_tokens": false})).await.unwrap();
    assert_eq!(shown["choices"][0]["message"]["content"], "a<|begin_of_sentence|>b<think>c");
}

#[tokio::test]
async fn ernies_end_of_turn_ends_the_answer() {
    let answer = saying("a<|end_of_sentence|>b").await.chat(json!({})).await.unwrap();
    assert_eq!((&answer["choices"][0]["message"]["content"], &answer["choices"][0]["finish_reason"]), (&json!("a"), &json!("stop")));
}

#[tokio::test]
async fn invalid_bytes_become_replacement_characters() {
    let world =
        world(&[vec![Say::Text("a"), Say::Bytes(b"\xF0\x9F"), Say::Text("b"), Say::Bytes("🤗".as_bytes()), Say::Bytes(b"\xE4")]]).await;
    assert_eq!(world.chat(json!({})).await.unwrap()["choices"][0]["message"]["content"], "a\u{FFFD}b🤗\u{FFFD}");
}

#[tokio::test]
async fn token_ids_are_returned_when_asked() {
    let world = saying("Hello").await;
    let answer = world.chat(json!({"return_token_ids": true})).await.unwrap();
    assert_eq!(answer["prompt_token_ids"], json!(world.ids("<|begin_of_sentence|>User: Hi\nAssistant: ", Special::Control)));
    let mut ids = world.ids("Hello", Special::Text);
    ids.push(2);
    assert_eq!(answer["choices"][0]["token_ids"], json!(ids));
}

#[tokio::test]
async fn the_seed_setting_fixes_requests_without_a_seed() {
    let settings = || ApiSettings { seed: Some(5), ..ApiSettings::default() };
    let says: Vec<Vec<Say>> = ["a", "b", "c", "d", "e", "f", "g"].into_iter().map(|text| vec![Say::Text(text)]).collect();
    let mut runs = Vec::new();
    for _ in 0..2 {
        let world = world_with(&says, settings(), files(&[]), Duration::ZERO).await.unwrap();
        let mut texts = Vec::new();
        for _ in 0..12 {
            texts.push(world.complete(json!({"seed": null})).await.unwrap()["choices"][0]["text"].clone());
        }
        runs.push(texts);
    }
    assert_eq!(runs[0], runs[1], "the same from one start to the next");
    assert!(runs[0].iter().any(|text| *text != runs[0][0]), "and different from request to request");
}

#[tokio::test]
async fn without_a_seed_every_choice_of_every_prompt_has_its_own() {
    let settings = || ApiSettings { seed: Some(5), ..ApiSettings::default() };
    let says: Vec<Vec<Say>> = ["a", "b", "c", "d", "e", "f", "g"].into_iter().map(|text| vec![Say::Text(text)]).collect();
    let world_of = async || world_with(&says, settings(), files(&[]), Duration::ZERO).await.unwrap();
    let texts = |answer: Value| -> Vec<String> {
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    // A sequence draws the same whether it is asked for alone, in a list or as one of `n`: the seeds come one after another.
    let alone = world_of().await;
    let mut singles = Vec::new();
    for _ in 0..6 {
        singles.extend(texts(alone.complete(json!({"seed": null})).await.unwrap()));
    }
    assert!(singles.iter().any(|text| *text != singles[0]), "{singles:?}");
    assert_eq!(texts(world_of().await.complete(json!({"seed": null, "prompt": vec!["Hi"; 6]})).await.unwrap()), singles);
    assert_eq!(texts(world_of().await.complete(json!({"seed": null, "prompt": vec!["Hi"; 3], "n": 2})).await.unwrap()), singles);
    assert_eq!(texts(world_of().await.job(json!({"prompt": vec!["Hi"; 6]})).await.unwrap()), singles);
}

#[tokio::test]
async fn with_a_seed_a_prompt_in_a_list_gives_what_it_gives_alone() {
    let world = world(&[vec![Say::Text("a")], vec![Say::Text("b")], vec![Say::Text("c")]]).await;
    let alone = world.complete(json!({"seed": 1, "n": 2})).await.unwrap();
    let list = world.complete(json!({"seed": 1, "n": 2, "prompt": ["Hi", "Hi"]})).await.unwrap();
    for choice in 0..4 {
        assert_eq!(list["choices"][choice]["text"], alone["choices"][choice % 2]["text"]);
    }
    assert_ne!(alone["choices"][0]["text"], alone["choices"][1]["text"], "choices of one prompt differ");
}

#[tokio::test]
async fn models_are_listed_and_found_by_every_name() {
    let settings = ApiSettings { served_names: vec!["main".to_owned(), "org/alias".to_owned()], ..ApiSettings::default() };
    let world = world_with(&[vec![Say::Text("A")]], settings, files(&[]), Duration::ZERO).await.unwrap();
    let list = whole(world.call("/v1/models", Value::Null).await.unwrap());
    assert_eq!(list["object"], "list");
    assert_eq!((&list["first_id"], &list["last_id"], &list["has_more"]), (&json!("main"), &json!("org/alias"), &json!(false)));
    let card = &list["data"][0];
    assert_eq!(
        (&card["id"], &card["object"], &card["root"], &card["parent"]),
        (&json!("main"), &json!("model"), &json!("baidu/ERNIE-test"), &Value::Null)
    );
    assert_eq!((&card["max_model_len"], &card["type"], &card["display_name"]), (&json!(CONTEXT), &json!("model"), &json!("main")));
    assert!(card["created"].is_u64() && card["created_at"].as_str().unwrap().ends_with('Z') && card["permission"][0]["id"].is_string());
    for (path, id) in
        [("org/alias", "org/alias"), ("org%2Falias", "org/alias"), ("main", "main"), ("baidu%2FERNIE-test", "main"), ("ERNIE-test", "main")]
    {
        assert_eq!(whole(world.call(&format!("/v1/models/{path}"), Value::Null).await.unwrap())["id"], id);
    }
    let failure = world.call("/openai/v1/models/org%2Fother", Value::Null).await.err().unwrap();
    assert_eq!((failure.status(), failure.code), (404, Some("model_not_found")));
    for model in
        [json!("main"), json!("org/alias"), json!("baidu/ERNIE-test"), json!("ERNIE-test"), json!("null"), json!("default"), Value::Null]
    {
        assert_eq!(world.chat(json!({"model": model})).await.unwrap()["model"], "main");
    }
}

/// Three full blocks of 16 tokens, and one token that is always computed.
fn long_prompt() -> String {
    "a".repeat(48)
}

#[tokio::test]
async fn usage_tells_what_came_from_the_prefix_cache() {
    let world = saying("Hello").await;
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let complete = |more: Value| world.complete(with(json!({"prompt": long_prompt()}), more));
    let first = complete(json!({"n": 3})).await.unwrap();
    assert_eq!(cached(&first), 0, "what the first choice leaves for the others was not cached before");
    let prompt = first["usage"]["prompt_tokens"].as_u64().unwrap();
    let all = (prompt - 1) / 16 * 16;
    assert_eq!(cached(&complete(json!({})).await.unwrap()), all);
    assert_eq!(cached(&complete(json!({"prompt": [long_prompt(), "another one"]})).await.unwrap()), all, "all prompts together");
    let events = world
        .events(
            "/v1/completions",
            json!({"prompt": long_prompt(), "seed": 0, "stream_options": {"include_usage": true, "continuous_usage_stats": true}}),
        )
        .await;
    assert!(events.iter().all(|event| cached(event) == all), "in every running usage: {events:?}");
    let chunks = world.job_stream(json!({"prompt": long_prompt(), "seed": 0, "stream": true})).await;
    assert_eq!(cached(chunks.last().unwrap()), all);
}

#[tokio::test]
async fn details_of_usage_can_be_left_out() {
    let settings = ApiSettings { hide_prompt_tokens_details: true, ..ApiSettings::default() };
    let world = world_with(&[vec![Say::Text("Hello")]], settings, files(&[]), Duration::ZERO).await.unwrap();
    assert_eq!(world.complete(json!({})).await.unwrap()["usage"].get("prompt_tokens_details"), None);
}
