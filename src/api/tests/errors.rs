//! Bad input: each kind gets its error, the same at every door.

use serde_json::{Value, json};

use super::*;

fn hi() -> Value {
    json!([{"role": "user", "content": "Hi"}])
}

/// Status, parameter, code.
fn facts(failure: &Failure) -> (u16, Option<&str>, Option<&str>) {
    (failure.status(), failure.param.as_deref(), failure.code)
}

#[tokio::test]
async fn chat_mistakes_at_the_direct_door_and_through_the_queue() {
    let world = saying("A").await;
    let cases = [
        (json!({}), 400, "messages", Some("missing_required_parameter")),
        (json!({"messages": null}), 400, "messages", Some("missing_required_parameter")),
        (json!({"messages": []}), 400, "messages", Some("missing_required_parameter")),
        (json!({"messages": 5}), 400, "messages", None),
        (json!({"messages": [{"role": "wizard", "content": "Hi"}]}), 400, "messages[0].role", Some("invalid_value")),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            400,
            "messages[0].content[0]",
            Some("unsupported_value"),
        ),
        (json!({"messages": hi(), "model": "other"}), 404, "model", Some("model_not_found")),
        (json!({"messages": hi(), "model": 5}), 400, "model", None),
        (json!({"messages": hi(), "temperature": "hot"}), 400, "temperature", None),
        (json!({"messages": hi(), "temperature": 3}), 400, "temperature", Some("invalid_value")),
        (json!({"messages": hi(), "max_tokens": 0}), 400, "max_tokens", Some("invalid_value")),
        (json!({"messages": hi(), "max_completion_tokens": -5}), 400, "max_completion_tokens", Some("invalid_value")),
        (json!({"messages": hi(), "n": 129}), 400, "n", Some("invalid_value")),
        (json!({"messages": hi(), "n": 100}), 400, "n", Some("invalid_value")),
        (json!({"messages": hi(), "stop": [""]}), 400, "stop", Some("invalid_value")),
        (json!({"messages": hi(), "logit_bias": {"999999": 1}}), 400, "logit_bias.999999", Some("invalid_value")),
        (json!({"messages": hi(), "stream": "yes"}), 400, "stream", None),
        (json!({"messages": hi(), "tools": [{"type": "function"}]}), 400, "tools[0].function", Some("missing_required_parameter")),
        (json!({"messages": hi(), "response_format": {"type": "xml"}}), 400, "response_format.type", Some("invalid_value")),
        (
            json!({"messages": hi(), "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array", "uniqueItems": true}}}}),
            400,
            "response_format.json_schema.schema",
            Some("invalid_value"),
        ),
        (
            json!({"messages": hi(), "structured_outputs": {"json_object": true, "regex": "a"}}),
            400,
            "structured_outputs.regex",
            Some("invalid_value"),
        ),
        (json!({"messages": hi(), "logprobs": "yes"}), 400, "logprobs", None),
        (json!({"messages": hi(), "top_logprobs": 2}), 400, "top_logprobs", Some("invalid_value")),
        (json!({"messages": hi(), "logprobs": true, "top_logprobs": 21}), 400, "top_logprobs", Some("invalid_value")),
        (json!({"messages": hi(), "logprobs": true, "top_logprobs": -1}), 400, "top_logprobs", Some("invalid_value")),
        (json!({"messages": hi(), "logprobs": true, "top_logprobs": 1.5}), 400, "top_logprobs", None),
        (json!({"messages": hi(), "prompt_logprobs": 21}), 400, "prompt_logprobs", Some("invalid_value")),
        (json!({"messages": hi(), "logprob_token_ids": [1]}), 400, "logprob_token_ids", Some("unsupported_parameter")),
        (json!({"messages": hi(), "bad_words": "x"}), 400, "bad_words", None),
        (json!({"messages": hi(), "bad_words": ["x", 5]}), 400, "bad_words[1]", None),
        (json!({"messages": hi(), "bad_words": [" "]}), 400, "bad_words[0]", Some("invalid_value")),
        (json!({"messages": hi(), "bad_words": vec!["x"; 129]}), 400, "bad_words", Some("invalid_value")),
        (json!({"messages": hi(), "bad_words_token_ids": [99999]}), 400, "bad_words_token_ids[0]", Some("invalid_value")),
        (json!({"messages": hi(), "n": 2, "best_of": 1}), 400, "best_of", Some("invalid_value")),
        (json!({"messages": hi(), "best_of": 129}), 400, "best_of", Some("invalid_value")),
        (json!({"messages": hi(), "guided_regex": "a("}), 400, "guided_regex", Some("invalid_value")),
        (json!({"messages": hi(), "chat_template_kwargs": 5}), 400, "chat_template_kwargs", None),
        (json!({"messages": hi(), "reasoning_effort": "huge"}), 400, "reasoning_effort", Some("invalid_value")),
        (json!({"messages": hi(), "metadata": "x"}), 400, "metadata", None),
        (json!({"messages": "x".repeat(200)}), 400, "messages", Some("context_length_exceeded")),
    ];
    for (body, status, param, code) in cases {
        let direct = world.call("/v1/chat/completions", body.clone()).await.err().unwrap_or_else(|| panic!("{body}"));
        assert_eq!(facts(&direct), (status, Some(param), code), "{body}: {direct}");
        let streamed = world
            .call("/v1/chat/completions", with(body.clone(), json!({"stream": body.get("stream").cloned().unwrap_or(json!(true))})))
            .await
            .err()
            .unwrap();
        assert_eq!(streamed, direct, "before a stream begins");
        let routed = world.service.job(json!({"openai_route": "/v1/chat/completions", "openai_input": body}), "j").await.err().unwrap();
        assert_eq!(routed, direct);
        if body.get("messages").is_some_and(|messages| !messages.is_null()) {
            assert_eq!(world.service.job(body, "j").await.err().unwrap(), direct, "native");
        }
    }
}

#[tokio::test]
async fn completion_mistakes() {
    let world = saying("A").await;
    for (body, param, code) in [
        (json!({}), "prompt", Some("missing_required_parameter")),
        (json!({"prompt": ""}), "prompt", Some("missing_required_parameter")),
        (json!({"prompt": []}), "prompt", Some("invalid_value")),
        (json!({"prompt": [1, 99999]}), "prompt[1]", Some("invalid_value")),
        (json!({"prompt": {"a": 1}}), "prompt", None),
        (json!({"prompt": "Hi", "echo": "yes"}), "echo", None),
        (json!({"prompt": "Hi", "logprobs": 21}), "logprobs", Some("invalid_value")),
        (json!({"prompt": "Hi", "logprobs": true}), "logprobs", None),
        (json!({"prompt": "Hi", "max_tokens": 0}), "max_tokens", Some("invalid_value")),
        (json!({"prompt": "Hi", "prompt_logprobs": 1, "stream": true}), "prompt_logprobs", Some("invalid_value")),
        (json!({"prompt": "Hi", "best_of": 2, "stream": true}), "best_of", Some("invalid_value")),
        (json!({"prompt": "Hi", "best_of": 100}), "best_of", Some("invalid_value")),
        (json!({"prompt": "Hi", "n": 100}), "n", Some("invalid_value")),
        (json!({"prompt": "Hi", "suffix": "x"}), "suffix", Some("unsupported_parameter")),
        (json!({"prompt": vec!["a"; 41]}), "prompt", Some("invalid_value")),
        (json!({"prompt": "Hi", "min_tokens": 95, "max_tokens": 95}), "min_tokens", Some("invalid_value")),
        (json!({"prompt": "Hi", "min_tokens": 17}), "min_tokens", Some("invalid_value")),
        (json!({"prompt": "Hi", "priority": 3}), "priority", Some("unsupported_parameter")),
    ] {
        let failure = world.call("/v1/completions", body.clone()).await.err().unwrap();
        assert_eq!(facts(&failure), (400, Some(param), code), "{body}: {failure}");
    }
}

#[tokio::test]
async fn jobs_that_ask_for_nothing_we_know() {
    let world = saying("A").await;
    for (input, param, code) in [
        (Value::Null, "input", Some("missing_required_parameter")),
        (json!({}), "input", Some("missing_required_parameter")),
        (json!("Hi"), "input", None),
        (json!([1]), "input", None),
        (json!({"input": {}}), "input", Some("missing_required_parameter")),
        (json!({"temperature": 1}), "input", Some("missing_required_parameter")),
        (json!({"openai_route": 5}), "openai_route", None),
        (json!({"openai_route": "/v1/chat/completions", "openai_input": "x"}), "openai_input", None),
        (json!({"openai_route": "/v1/chat/completions", "openai_input": {}}), "messages", Some("missing_required_parameter")),
        (json!({"openai_route": "/v1/completions"}), "prompt", Some("missing_required_parameter")),
        (json!({"route": "/v1/completions", "body": [1]}), "body", None),
        (json!({"prompt": "Hi", "sampling_params": 5}), "sampling_params", None),
        (json!({"prompt": "Hi", "sampling_params": {"top_p": 2}}), "sampling_params.top_p", Some("invalid_value")),
        (
            json!({"prompt": "Hi", "sampling_params": {"use_beam_search": true}}),
            "sampling_params.use_beam_search",
            Some("unsupported_parameter"),
        ),
        (json!({"prompt": 5}), "prompt", None),
    ] {
        let failure = world.service.job(input.clone(), "j").await.err().unwrap_or_else(|| panic!("{input}"));
        assert_eq!(facts(&failure), (400, Some(param), code), "{input}: {failure}");
    }
}

#[tokio::test]
async fn unknown_routes_and_wrong_methods() {
    let world = saying("A").await;
    assert_eq!(world.call("/v1/nothing", json!({})).await.err().unwrap().status(), 404);
    assert_eq!(world.call("/v1/chat/completions", Value::Null).await.err().unwrap().status(), 405);
    assert_eq!(world.call("/v1/models", json!({"a": 1})).await.err().unwrap().status(), 405);
    assert_eq!(world.service.job(json!({"openai_route": "/v1/nothing"}), "j").await.err().unwrap().status(), 404);
    assert_eq!(world.service.job(json!({"route": "/v1/models", "method": "DELETE"}), "j").await.err().unwrap().status(), 405);
    let embeddings = world.call("/v1/embeddings", json!({"input": "x"})).await.err().unwrap();
    assert_eq!(facts(&embeddings), (400, Some("model"), Some("unsupported_value")));
    assert!(world.call("/v1/chat/completions", json!([1])).await.is_err());
}

#[tokio::test]
async fn any_model_name_when_set() {
    let settings = ApiSettings { any_model_name: true, ..ApiSettings::default() };
    let world = world_with(&[vec![Say::Text("A")]], settings, files(&[]), Duration::ZERO).await.unwrap();
    assert_eq!(world.chat(json!({"model": "gpt-4o"})).await.unwrap()["model"], "baidu/ERNIE-test");
}

#[tokio::test]
async fn neutral_values_and_unknown_fields_pass() {
    let more = json!({
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": false, "top_logprobs": null, "n": 1, "user": "me",
        "something_new": [1], "parallel_tool_calls": true, "store": false, "service_tier": "auto", "metadata": {"label": "x", "n": "not a number"},
        "stream_options": {"include_usage": true}, "logit_bias": {}, "stop": [], "seed": 0, "temperature": 0, "verbosity": "low",
    });
    assert_eq!(saying("A").await.chat(more).await.unwrap()["choices"][0]["message"]["content"], "A");
}

#[tokio::test]
async fn a_request_past_its_deadline_times_out() {
    let settings = ApiSettings { request_timeout: Some(Duration::from_millis(50)), ..ApiSettings::default() };
    let world =
        world_with(&[vec![Say::Text("abcdefghijklmnopqrstuvwxyz")]], settings, files(&[]), Duration::from_millis(20)).await.unwrap();
    assert_eq!(world.chat(json!({})).await.unwrap_err().kind, crate::error::Kind::Timeout);
}
