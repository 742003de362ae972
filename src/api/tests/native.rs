//! Jobs: the shapes of their input and output.

use serde_json::{Value, json};

use super::*;

fn messages() -> Value {
    json!([{"role": "user", "content": "Hi"}])
}

fn tokens_format() -> ApiSettings {
    ApiSettings { native_format: crate::config::NativeFormat::Tokens, ..ApiSettings::default() }
}

#[tokio::test]
async fn messages_give_one_chat_completion() {
    let answer =
        saying("Hello").await.job(json!({"messages": messages(), "sampling_params": {"max_tokens": 100, "seed": 0}})).await.unwrap();
    assert_eq!((&answer["id"], &answer["object"]), (&json!("chatcmpl-j1"), &json!("chat.completion")));
    assert_eq!(answer["choices"][0]["message"]["content"], "Hello");
    assert!(answer.get("text").is_none());
}

#[tokio::test]
async fn prompts_give_one_text_completion_with_the_text_on_top() {
    let world = saying("abcdefghijklmnopqrstuvwxyz").await;
    for input in
        [json!({"prompt": "Hi"}), json!({"text": "Hi"}), json!({"input": "Hi"}), json!({"input_ids": [5, 6]}), json!({"prompt": [5, 6]})]
    {
        let answer = world.job(with(input.clone(), json!({"seed": 0}))).await.unwrap();
        assert_eq!((&answer["id"], &answer["object"]), (&json!("cmpl-j1"), &json!("text_completion")), "{input}");
        assert_eq!(answer["text"], "abcdefghijklmnopqrstuvwxyz", "no limit of 16 here");
        assert_eq!(answer["choices"][0]["text"], answer["text"]);
        assert_eq!(answer["usage"]["prompt_tokens"], 2);
    }
    let several = world.job(json!({"prompt": ["a", "b"], "seed": 0, "max_new_tokens": 1})).await.unwrap();
    assert_eq!((several["choices"].as_array().unwrap().len(), &several["text"]), (2, &json!("a")));
}

#[tokio::test]
async fn messages_win_over_prompt_and_top_level_over_sampling_params() {
    let world = saying("abcdef").await;
    let answer = world
        .job(json!({"messages": "Hi", "prompt": "x", "max_tokens": 2, "sampling_params": {"max_tokens": 4}, "seed": 0}))
        .await
        .unwrap();
    assert_eq!((&answer["object"], &answer["choices"][0]["message"]["content"]), (&json!("chat.completion"), &json!("ab")));
    let null = world
        .job(json!({"messages": null, "prompt": "x", "max_tokens": null, "sampling_params": {"max_tokens": 4}, "seed": 0}))
        .await
        .unwrap();
    assert_eq!(null["text"], "abcd");
}

#[tokio::test]
async fn the_template_is_for_messages_only_unless_asked() {
    let world = saying("A").await;
    let raw = world.job(json!({"prompt": "Hi", "return_token_ids": true, "seed": 0})).await.unwrap();
    assert_eq!(raw["choices"][0]["prompt_token_ids"], json!(world.ids("Hi", Special::Text)));
    let rendered = world.job(json!({"prompt": "Hi", "apply_chat_template": true, "return_token_ids": true, "seed": 0})).await.unwrap();
    let expected = world.ids("<|begin_of_sentence|>User: Hi\nAssistant: ", Special::Control);
    assert_eq!((&rendered["object"], &rendered["choices"][0]["prompt_token_ids"]), (&json!("text_completion"), &json!(expected)));
}

#[tokio::test]
async fn a_streamed_chat_is_chunk_objects_with_usage_in_the_last() {
    let world = world(&[vec![Say::Text("Hello world")], vec![Say::Text("Hell")]]).await;
    // Twice: the first one finds nothing in the prefix cache.
    world.job(json!({"messages": messages(), "n": 2, "seed": 0})).await.unwrap();
    let whole = world.job(json!({"messages": messages(), "n": 2, "seed": 0})).await.unwrap();
    let chunks = world.job_stream(json!({"messages": messages(), "n": 2, "seed": 0, "stream": true})).await;
    let mut texts = [String::new(), String::new()];
    let mut roles = 0;
    for (i, chunk) in chunks.iter().enumerate() {
        assert_eq!((&chunk["id"], &chunk["object"]), (&json!("chatcmpl-j1"), &json!("chat.completion.chunk")));
        assert_eq!(chunk.get("usage").is_some(), i == chunks.len() - 1);
        for choice in chunk["choices"].as_array().unwrap() {
            assert!(choice.as_object().unwrap().contains_key("finish_reason"));
            roles += usize::from(choice["delta"].get("role").is_some());
            texts[choice["index"].as_u64().unwrap() as usize].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        }
    }
    let opening: Vec<&Value> = chunks[0]["choices"].as_array().unwrap().iter().map(|choice| &choice["delta"]["role"]).collect();
    assert_eq!((opening, roles), (vec![&json!("assistant"); 2], 2), "the first chunk opens all choices, and no other does");
    assert_eq!(texts, ["Hello world", "Hell"]);
    assert_eq!(chunks.last().unwrap()["usage"], whole["usage"]);
}

#[tokio::test]
async fn a_streamed_prompt_is_text_completions() {
    let chunks = saying("Hello world").await.job_stream(json!({"prompt": "Hi", "seed": 0, "stream": true})).await;
    assert!(chunks.iter().all(|chunk| chunk["object"] == "text_completion"));
    let text: String =
        chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()).map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(text, "Hello world");
    let last = chunks.last().unwrap();
    assert_eq!((&last["choices"][0]["finish_reason"], last["usage"]["total_tokens"].is_u64()), (&json!("stop"), true));
}

#[tokio::test]
async fn the_older_form_is_a_setting() {
    let says = [vec![Say::Text("Hello world")], vec![Say::Text("Hell")]];
    let world = world_with(&says, tokens_format(), files(&[]), Duration::ZERO).await.unwrap();
    let whole = world.job(json!({"prompt": "Hi", "n": 2, "seed": 0})).await.unwrap();
    let output = world.ids("Hello world", Special::Text).len() + 1 + 2;
    assert_eq!(whole, json!({"choices": [{"tokens": ["Hello world"]}, {"tokens": ["Hell"]}], "usage": {"input": 2, "output": output}}));
    let yields = world.job_stream(json!({"prompt": "Hi", "n": 2, "seed": 0, "stream": true})).await;
    let mut texts = [String::new(), String::new()];
    for piece in &yields {
        assert_eq!(piece["usage"]["input"], 2);
        for (text, choice) in texts.iter_mut().zip(piece["choices"].as_array().unwrap()) {
            choice["tokens"].as_array().unwrap().iter().for_each(|token| text.push_str(token.as_str().unwrap()));
        }
    }
    assert_eq!(texts, ["Hello world", "Hell"]);
    assert_eq!(yields.last().unwrap()["usage"]["output"], output);
    let routed = world.job(json!({"openai_route": "/v1/completions", "openai_input": {"prompt": "Hi", "seed": 0}})).await.unwrap();
    assert_eq!(routed["object"], "text_completion", "calls by openai_route keep OpenAI's form");
}

#[tokio::test]
async fn openai_routes_answer_as_the_direct_door_does() {
    let world = saying("Hello").await;
    let body = json!({"messages": messages(), "seed": 0});
    // Twice: the first one finds nothing in the prefix cache.
    world.post("/v1/chat/completions", body.clone()).await.unwrap();
    let direct = world.post("/v1/chat/completions", body.clone()).await.unwrap();
    for route in ["/v1/chat/completions", "v1/chat/completions", "/openai/v1/chat/completions"] {
        let mut answer = world.job(json!({"openai_route": route, "openai_input": body})).await.unwrap();
        assert_eq!(answer["id"], "chatcmpl-j1");
        answer["id"] = direct["id"].clone();
        answer["created"] = direct["created"].clone();
        assert_eq!(answer, direct);
    }
    let routed = world.job(json!({"route": "/v1/chat/completions", "body": body, "method": "post"})).await.unwrap();
    assert_eq!(routed["choices"], direct["choices"]);
    for input in [
        json!({"openai_route": "/v1/models"}),
        json!({"openai_route": "/v1/models", "openai_input": {}}),
        json!({"openai_route": "/v1/models", "openai_input": null}),
        json!({"route": "/v1/models"}),
        json!({"route": "/v1/models", "method": "GET", "body": {}}),
    ] {
        assert_eq!(world.job(input).await.unwrap()["data"][0]["id"], "baidu/ERNIE-test");
    }
    assert_eq!(world.job(json!({"openai_route": "/v1/models/ERNIE-test"})).await.unwrap()["object"], "model");
}

#[tokio::test]
async fn openai_routes_stream_server_sent_events() {
    let world = saying("Hello world").await;
    let body = json!({"messages": messages(), "seed": 0});
    for input in [
        json!({"openai_route": "/v1/chat/completions", "openai_input": with(body.clone(), json!({"stream": true}))}),
        json!({"openai_route": "/v1/chat/completions", "openai_input": body, "stream": true}),
        json!({"route": "/v1/chat/completions", "body": with(body.clone(), json!({"stream": true}))}),
    ] {
        let pieces = world.job_stream(input).await;
        let events = events(&pieces);
        let text: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(text, "Hello world");
    }
}

#[tokio::test]
async fn an_input_that_is_wrapped_once_more() {
    let world = saying("Hello world").await;
    for input in [
        json!({"input": {"prompt": "Hi", "seed": 0}}),
        // As the Hub's harness posts a test of `.runpod/tests.json`.
        json!({"name": "basic", "input": {"prompt": "Hi", "seed": 0}, "timeout": 10000, "startedAt": 1.5}),
        json!({"name": "basic", "input": {"openai_route": "/v1/completions", "openai_input": {"prompt": "Hi", "seed": 0}}, "prompt": null}),
    ] {
        assert_eq!(world.job(input).await.unwrap()["choices"][0]["text"], "Hello world");
    }
    let beside = world.job(json!({"input": {"prompt": "Hi", "seed": 0}, "max_tokens": 1})).await.unwrap();
    assert_eq!(beside["text"], "Hello", "nothing beside it is ignored");
    let both = world.job(json!({"input": {"prompt": "Hi", "max_tokens": 2, "seed": 0}, "max_tokens": 1})).await.unwrap();
    assert_eq!(both["text"], "Hello world");
    let messages = world.job(json!({"input": {"prompt": "Hi"}, "messages": messages(), "seed": 0})).await.unwrap();
    assert_eq!(messages["object"], "chat.completion", "what stands beside it is the request");
}

#[tokio::test]
async fn a_stream_that_fails_midway_ends_with_a_chunk_that_says_so() {
    for settings in [ApiSettings::default(), tokens_format()] {
        let says = [vec![Say::Text("Hello world"), Say::Fail]];
        let world = world_with(&says, settings, files(&[]), Duration::from_millis(30)).await.unwrap();
        let items = items(world.service.job(json!({"prompt": "Hi", "seed": 0, "stream": true}), "j1").await.unwrap()).await;
        let [before @ .., Ok(last), Err(failure)] = items.as_slice() else { panic!("{items:?}") };
        assert!(!before.is_empty() && before.iter().all(|item| item.as_ref().unwrap().get("error").is_none()));
        assert_eq!((&last["error"]["message"], &last["error"]["status"]), (&json!(failure.message), &json!(failure.status())));
    }
    let world = world(&[vec![Say::Fail]]).await;
    let items = items(world.service.job(json!({"prompt": "Hi", "seed": 0, "stream": true}), "j1").await.unwrap()).await;
    assert!(matches!(items.as_slice(), [Err(_)]), "with nothing before it, the job's own error is enough: {items:?}");
}
