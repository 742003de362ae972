//! Calls that generate nothing, and FastChat's paths.

use serde_json::{Value, json};

use super::*;

#[tokio::test]
async fn prompts_come_back_as_the_tokens_that_a_completion_reads() {
    let world = saying("x").await;
    let ids = |text: &str| world.ids(text, Special::Text);
    for path in ["/tokenize", "/v1/tokenize", "/openai/tokenize/"] {
        let whole = world.post(path, json!({"prompt": "Hello world"})).await.unwrap();
        assert_eq!(whole, json!({"count": 2, "max_model_len": CONTEXT, "tokens": ids("Hello world"), "token_strs": null}), "{path}");
    }
    let read = world.complete(json!({"prompt": "Hello </s>", "max_tokens": 1, "return_token_ids": true})).await.unwrap();
    let whole = world.post("/tokenize", json!({"prompt": "Hello </s>", "return_token_strs": true})).await.unwrap();
    assert_eq!(whole["tokens"], read["choices"][0]["prompt_token_ids"]);
    assert_eq!(whole["token_strs"], json!(["Hello", " ", "<", "/", "s", ">"]), "{whole}");
    let control = world.post("/tokenize", json!({"prompt": "Hello </s>", "parse_special": true})).await.unwrap();
    assert_eq!(control["tokens"].as_array().unwrap().last(), Some(&json!(2)));
    // Longer than the context: counted all the same.
    let long = world.post("/tokenize", json!({"prompt": "é".repeat(500)})).await.unwrap();
    assert!(long["count"].as_u64().unwrap() > CONTEXT as u64);
}

#[tokio::test]
async fn messages_come_back_as_the_tokens_that_a_chat_reads() {
    let world = saying("x").await;
    let messages = json!([{"role": "user", "content": "Hi <|end_of_sentence|>"}, {"role": "assistant", "content": "He"}]);
    for more in
        [json!({}), json!({"continue_final_message": true}), json!({"add_generation_prompt": false}), json!({"add_special_tokens": true})]
    {
        let asked = with(json!({"messages": messages, "max_tokens": 1, "return_token_ids": true}), more.clone());
        let read = world.post("/v1/chat/completions", asked).await.unwrap();
        let tools = json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"});
        let asked = with(with(json!({"messages": messages}), tools), more.clone());
        let whole = world.post("/tokenize", asked.clone()).await.unwrap();
        assert_eq!(whole["tokens"], read["prompt_token_ids"], "{more}");
        let rendered = world.post("/v1/chat/completions/render", asked.clone()).await.unwrap();
        assert_eq!((&rendered["token_ids"], &rendered["model"]), (&read["prompt_token_ids"], &json!("baidu/ERNIE-test")));
        let prompt = world.post("/apply-template", asked).await.unwrap();
        assert_eq!(prompt["prompt"], rendered["prompt"]);
        assert!(prompt["prompt"].as_str().unwrap().contains("User: Hi <|end_of_sentence|>\n"), "{prompt}");
    }
}

#[tokio::test]
async fn llama_cpps_form() {
    let world = saying("x").await;
    let whole = world.post("/tokenize", json!({"content": "Hello</s>"})).await.unwrap();
    assert_eq!(whole, json!({"tokens": world.ids("Hello</s>", Special::Control)}));
    let whole = world.post("/tokenize", json!({"content": "Hello</s>", "parse_special": false})).await.unwrap();
    assert_eq!(whole, json!({"tokens": world.ids("Hello</s>", Special::Text)}));
    let whole = world.post("/tokenize", json!({"content": "Helloé", "with_pieces": true})).await.unwrap();
    let pieces: Vec<&Value> = whole["tokens"].as_array().unwrap().iter().map(|token| &token["piece"]).collect();
    assert_eq!(pieces, [&json!("Hello"), &json!([0xC3]), &json!([0xA9])]);
    assert_eq!(world.post("/tokenize", json!({"content": ""})).await.unwrap(), json!({"tokens": []}));
}

#[tokio::test]
async fn tokens_become_the_text_they_came_from() {
    let world = saying("x").await;
    for text in ["Hello world", " two  spaces ", "é 🦀\n", "", "</s>"] {
        let tokens = world.post("/tokenize", json!({"content": text})).await.unwrap()["tokens"].clone();
        let whole = world.post("/v1/detokenize", json!({"tokens": tokens})).await.unwrap();
        assert_eq!(whole, json!({"prompt": text, "content": text}));
    }
}

#[tokio::test]
async fn what_fits_the_context() {
    let world = saying("x").await;
    let prompts = json!([
        {"model": "default", "prompt": "Hello world", "max_tokens": CONTEXT - 2},
        {"model": "baidu/ERNIE-test", "prompt": "Hello world", "max_tokens": CONTEXT - 1},
    ]);
    let whole = world.post("/api/v1/token_check", json!({"prompts": prompts})).await.unwrap();
    let checked = |fits: bool| json!({"fits": fits, "tokenCount": 2, "contextLength": CONTEXT});
    assert_eq!(whole, json!({"prompts": [checked(true), checked(false)]}));
    assert_eq!(world.post("/api/v1/token_check", json!({"prompts": []})).await.unwrap(), json!({"prompts": []}));
}

#[tokio::test]
async fn mistakes_name_their_field() {
    let world = saying("x").await;
    for (path, body, param, status) in [
        ("/tokenize", json!({}), "prompt", 400),
        ("/tokenize", json!({"prompt": 5}), "prompt", 400),
        ("/tokenize", json!({"content": ["a"]}), "content", 400),
        ("/tokenize", json!({"prompt": "a", "return_token_strs": 1}), "return_token_strs", 400),
        ("/tokenize", json!({"messages": []}), "messages", 400),
        ("/tokenize", json!({"prompt": "a", "model": "gpt"}), "model", 404),
        (
            "/tokenize",
            json!({"messages": "a", "add_generation_prompt": true, "continue_final_message": true}),
            "continue_final_message",
            400,
        ),
        ("/detokenize", json!({}), "tokens", 400),
        ("/detokenize", json!({"tokens": [1, -1]}), "tokens[1]", 400),
        ("/detokenize", json!({"tokens": [1, 99_999]}), "tokens[1]", 400),
        ("/apply-template", json!({"prompt": "x"}), "messages", 400),
        ("/apply-template", json!({"messages": 5}), "messages", 400),
        ("/api/v1/token_check", json!({}), "prompts", 400),
        ("/api/v1/token_check", json!({"prompts": [5]}), "prompts[0]", 400),
        ("/api/v1/token_check", json!({"prompts": [{"prompt": "a"}]}), "prompts[0].max_tokens", 400),
        ("/api/v1/token_check", json!({"prompts": [{"model": "gpt", "prompt": "a", "max_tokens": 1}]}), "prompts[0].model", 404),
    ] {
        let failure = world.post(path, body.clone()).await.unwrap_err();
        assert_eq!((failure.param.as_deref(), failure.status()), (Some(param), status), "{path} {body}: {failure}");
    }
}

#[tokio::test]
async fn jobs_reach_them_too() {
    let world = saying("x").await;
    let direct = world.post("/tokenize", json!({"prompt": "Hello"})).await.unwrap();
    assert_eq!(world.job(json!({"openai_route": "/tokenize", "openai_input": {"prompt": "Hello"}})).await.unwrap(), direct);
    assert_eq!(world.job(json!({"route": "/v1/tokenize", "method": "POST", "body": {"prompt": "Hello"}})).await.unwrap(), direct);
    assert_eq!(world.job(json!({"openai_route": "/version"})).await.unwrap(), json!({"version": env!("CARGO_PKG_VERSION")}));
    assert_eq!(world.job(json!({"openai_route": "/load"})).await.unwrap(), json!({"server_load": 0}));
    // Wrong methods and empty bodies.
    assert_eq!(world.call("/tokenize", Value::Null).await.err().unwrap().status(), 405);
    assert_eq!(world.post("/version", json!({"x": 1})).await.unwrap_err().status(), 405);
    assert_eq!(world.job(json!({"openai_route": "/tokenize"})).await.unwrap_err().param.as_deref(), Some("prompt"));
}

#[tokio::test]
async fn an_engine_in_the_path_is_the_model() {
    let world = saying("Hello").await;
    let whole = world.post("/v1/engines/ERNIE-test/completions", json!({"prompt": "Hi"})).await.unwrap();
    assert_eq!(whole["choices"][0]["text"], "Hello");
    let whole = world.post("/v1/engines/baidu%2FERNIE-test/chat/completions", json!({"messages": "Hi", "model": null})).await.unwrap();
    assert_eq!(whole["object"], "chat.completion");
    let failure = world.post("/v1/engines/gpt/completions", json!({"prompt": "Hi"})).await.unwrap_err();
    assert_eq!((failure.status(), failure.code), (404, Some("model_not_found")));
    // The body's comes first.
    assert!(world.post("/v1/engines/gpt/completions", json!({"prompt": "Hi", "model": "default"})).await.is_ok());
    let failure = world.post("/v1/engines/ERNIE-test/embeddings", json!({"input": "Hi"})).await.unwrap_err();
    assert_eq!(failure.code, Some("unsupported_value"));
}
