//! Streams: the rules that clients break without, and that they say the same as whole answers.

use std::collections::HashMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn hi() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "seed": 0})
}

/// Checks every rule of a chat stream, and gives each choice's text and finish reason.
fn check_chat(events: &[Value], n: usize, usage: bool) -> Vec<(String, String)> {
    let head = |event: &Value| (event["id"].clone(), event["created"].clone(), event["model"].clone(), event["object"].clone());
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert!(events.iter().all(|event| head(event) == head(&events[0])), "id, created, model and object are constant");
    for (i, event) in events.iter().take(n).enumerate() {
        assert_eq!(
            event["choices"],
            json!([{"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}])
        );
    }
    let mut choices: HashMap<u64, (String, Option<String>)> = HashMap::new();
    for event in &events[n..events.len() - usize::from(usage)] {
        let [choice] = event["choices"].as_array().unwrap().as_slice() else { panic!("one choice: {event}") };
        let (text, ended) = choices.entry(choice["index"].as_u64().unwrap()).or_default();
        assert!(ended.is_none(), "nothing after the end");
        assert!(choice["delta"].get("role").is_none(), "the role comes once");
        assert!(choice.as_object().unwrap().contains_key("finish_reason"));
        match choice["finish_reason"].as_str() {
            Some(reason) => {
                assert_eq!(choice["delta"], json!({}));
                assert!(choice.as_object().unwrap().contains_key("stop_reason"));
                *ended = Some(reason.to_owned());
            }
            None => {
                let delta = choice["delta"]["content"].as_str().unwrap();
                assert!(!delta.is_empty());
                text.push_str(delta);
            }
        }
        assert_eq!(event.as_object().unwrap().get("usage"), usage.then_some(&Value::Null), "usage is in the last chunk only");
    }
    if usage {
        let last = events.last().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert!(last["usage"]["total_tokens"].is_u64());
    }
    (0..n as u64).map(|i| choices.remove(&i).unwrap()).map(|(text, ended)| (text, ended.expect("every choice ends"))).collect()
}

#[tokio::test]
async fn a_stream_says_the_same_as_the_whole_answer() {
    let world = world(&[
        vec![Say::Text("Hello world")],
        vec![Say::Text("né "), Say::Bytes("🤗".as_bytes()), Say::Bytes(b"\xE4\xBD")],
        vec![Say::Text("x STOP y")],
    ])
    .await;
    // The first one finds nothing in the prefix cache.
    world.chat(json!({})).await.unwrap();
    for more in
        [json!({}), json!({"stop": "STOP"}), json!({"max_tokens": 4}), json!({"stop": ["o w", "é"], "include_stop_str_in_output": true})]
    {
        let more = with(more, json!({"n": 3}));
        let whole = world.chat(more.clone()).await.unwrap();
        let expected: Vec<(String, String)> = whole["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|choice| (choice["message"]["content"].as_str().unwrap().to_owned(), choice["finish_reason"].as_str().unwrap().to_owned()))
            .collect();
        let body = with(with(hi(), more), json!({"stream_options": {"include_usage": true}}));
        let events = world.events("/v1/chat/completions", body).await;
        assert_eq!(check_chat(&events, 3, true), expected);
        assert_eq!(events.last().unwrap()["usage"], whole["usage"]);
    }
}

#[tokio::test]
async fn usage_comes_only_when_asked_for() {
    let plain = saying("Hello").await;
    check_chat(&plain.events("/v1/chat/completions", hi()).await, 1, false);
    let forced = ApiSettings { force_include_usage: true, ..ApiSettings::default() };
    let world = world_with(&[vec![Say::Text("Hello")]], forced, files(&[]), Duration::ZERO).await.unwrap();
    check_chat(&world.events("/v1/chat/completions", hi()).await, 1, true);
    let options = json!({"stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let events = plain.events("/v1/chat/completions", with(hi(), options)).await;
    let counts: Vec<u64> = events.iter().map(|event| event["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts.last() == Some(&2), "{counts:?}");
}

#[tokio::test]
async fn completions_stream_as_text_completions() {
    let world = world(&[vec![Say::Text("Hello")], vec![Say::Text(" world")]]).await;
    let events =
        world.events("/v1/completions", json!({"prompt": ["a", "b"], "n": 2, "seed": 0, "stream_options": {"include_usage": true}})).await;
    let mut texts = vec![String::new(); 4];
    let mut ends = 0;
    for event in &events[..events.len() - 1] {
        assert_eq!(event["object"], "text_completion");
        let choice = &event["choices"][0];
        texts[choice["index"].as_u64().unwrap() as usize].push_str(choice["text"].as_str().unwrap());
        ends += usize::from(choice["finish_reason"] == "stop");
    }
    assert_eq!((texts, ends), (["Hello", " world", "Hello", " world"].map(str::to_owned).to_vec(), 4));
    assert_eq!((&events.last().unwrap()["choices"], &events.last().unwrap()["usage"]["prompt_tokens"]), (&json!([]), &json!(2)));
}

#[tokio::test]
async fn token_ids_in_streams() {
    let world = saying("Hello world").await;
    let events = world.events("/v1/chat/completions", with(hi(), json!({"return_token_ids": true}))).await;
    assert!(events[0]["prompt_token_ids"].is_array() && events[1].get("prompt_token_ids").is_none());
    let ids: Vec<u64> =
        events.iter().filter_map(|event| event["choices"][0]["token_ids"].as_array()).flatten().filter_map(Value::as_u64).collect();
    assert_eq!(ids.len(), world.ids("Hello world", Special::Text).len() + 1);
}

#[tokio::test]
async fn a_slow_reader_gets_fewer_and_larger_pieces() {
    let world = saying("one two three four five six seven").await;
    let Reply::Stream(mut pieces) = world.call("/v1/chat/completions", with(hi(), json!({"stream": true}))).await.unwrap() else {
        panic!()
    };
    // Nothing is pulled until the engine is done with it.
    while world.service.engine().stats().output_tokens < world.ids("one two three four five six seven", Special::Text).len() as u64 + 1 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    tokio::time::sleep(Duration::from_millis(20)).await;
    let first = pieces.next().await.unwrap().unwrap();
    let events = events(&[first]);
    assert_eq!(check_chat(&events, 1, false), [("one two three four five six seven".to_owned(), "stop".to_owned())]);
    assert_eq!(events.len(), 3, "role, text, end");
    assert!(pieces.next().await.is_none());
}

#[tokio::test]
async fn dropping_a_stream_or_a_call_frees_the_rows() {
    let world = world_with(
        &[vec![Say::Text("abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz"); 4]],
        ApiSettings::default(),
        files(&[]),
        Duration::from_millis(20),
    )
    .await
    .unwrap();
    let Reply::Stream(mut pieces) = world.call("/v1/chat/completions", with(hi(), json!({"stream": true, "n": 2}))).await.unwrap() else {
        panic!()
    };
    assert!(pieces.next().await.unwrap().is_ok());
    drop(pieces);
    let free = async || {
        while world.service.engine().stats().blocks_free < world.service.engine().stats().blocks_total
            || world.service.engine().stats().running > 0
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), free()).await.unwrap();
    let tokens = world.service.engine().stats().output_tokens;
    let call = world.chat(json!({}));
    assert!(tokio::time::timeout(Duration::from_millis(200), call).await.is_err(), "it takes longer");
    tokio::time::timeout(Duration::from_secs(20), free()).await.unwrap();
    let more = world.service.engine().stats().output_tokens - tokens;
    assert!(more < 60, "it did not run to its end: {more}");
}

#[tokio::test]
async fn a_failure_before_the_first_piece_keeps_its_status() {
    let world = world(&[vec![Say::Fail]]).await;
    let items = items(world.call("/v1/chat/completions", with(hi(), json!({"stream": true}))).await.unwrap()).await;
    let [Err(failure)] = items.as_slice() else { panic!("{items:?}") };
    assert_eq!(failure.status(), 500);
    assert_eq!(world.chat(json!({})).await.unwrap_err().status(), 500);
}

#[tokio::test]
async fn a_failure_in_mid_stream_is_a_frame_then_the_end() {
    let world = world_with(&[vec![Say::Text("Hello world"), Say::Fail]], ApiSettings::default(), files(&[]), Duration::from_millis(30))
        .await
        .unwrap();
    let items = items(world.call("/v1/chat/completions", with(hi(), json!({"stream": true}))).await.unwrap()).await;
    let (last, frames) = items.split_last().unwrap();
    assert!(last.is_err(), "the door learns of it");
    let frames: Vec<Value> = frames.iter().map(|item| item.clone().unwrap()).collect();
    let events = events(&frames);
    assert_eq!(events.last().unwrap()["error"]["type"], "server_error");
    assert!(events[..events.len() - 1].iter().all(|event| event.get("error").is_none()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn whatever_is_pulled_when_the_text_is_the_same(stop in "[a-e]{1,2}", slow in prop::collection::vec(0_u64..4, 0..12)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let world = world_with(&[vec![Say::Text("xaybzc"), Say::Bytes("🤗é".as_bytes()), Say::Text("abcde")]], ApiSettings::default(), files(&[]), Duration::from_millis(1)).await.unwrap();
            let expected = world.chat(json!({"stop": stop})).await.unwrap()["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
            let Reply::Stream(mut pieces) = world.call("/v1/chat/completions", with(hi(), json!({"stop": stop, "stream": true}))).await.unwrap() else { panic!() };
            let mut frames = Vec::new();
            let mut waits = slow.into_iter();
            while let Some(piece) = pieces.next().await {
                frames.push(piece.unwrap());
                tokio::time::sleep(Duration::from_millis(waits.next().unwrap_or(0))).await;
            }
            assert_eq!(check_chat(&events(&frames), 1, false)[0].0, expected);
            assert!(!expected.contains(&stop) && !expected.contains('\u{FFFD}'));
        });
    }
}
