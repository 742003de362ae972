//! FastDeploy's fields, aborting, and batches as jobs.

use serde_json::{Value, json};

use super::*;
use crate::api::service::Service;

fn text(whole: &Value) -> &str {
    whole["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("no text: {whole}"))
}

async fn compatible(says: &[Vec<Say>]) -> World {
    let settings = ApiSettings { fastdeploy_compatible: true, ..ApiSettings::default() };
    world_with(says, settings, files(&[]), Duration::ZERO).await.unwrap()
}

#[tokio::test]
async fn the_first_message_or_token_ids_may_be_the_prompt() {
    let world = saying("x").await;
    let ids = world.ids("Hello world", Special::Text);
    let asked = json!({"return_token_ids": true, "max_tokens": 1});
    for more in [
        json!({"messages": ids.clone()}),
        json!({"messages": [{"role": "user", "content": "Hello world"}], "disable_chat_template": true}),
        json!({"messages": [{"role": "user", "content": "Hello"}], "disable_chat_template": true, "completion_token_ids": ids[1..]}),
        json!({"prompt_token_ids": ids[..1], "metadata": {"completion_token_ids": ids[1..]}}),
    ] {
        let whole = world.post("/v1/chat/completions", with(asked.clone(), more.clone())).await.unwrap();
        assert_eq!(whole["prompt_token_ids"], json!(ids), "{more}");
        assert_eq!(whole["usage"]["prompt_tokens"], json!(ids.len()));
    }
    let whole = world.complete(json!({"prompt": "Hello", "completion_token_ids": ids[1..], "return_token_ids": true})).await.unwrap();
    assert_eq!(whole["choices"][0]["prompt_token_ids"], json!(ids));
    let job = world.job(json!({"messages": ids, "return_token_ids": true})).await.unwrap();
    assert_eq!(job["prompt_token_ids"], json!(ids));
    for (body, param) in [
        (json!({"messages": [1, 99_999]}), "messages[1]"),
        (json!({"messages": [1, "a"]}), "messages[1]"),
        (json!({"messages": "Hi", "completion_token_ids": "a"}), "completion_token_ids"),
        (json!({"messages": "Hi", "disable_chat_template": 1}), "disable_chat_template"),
    ] {
        let failure = world.post("/v1/chat/completions", body.clone()).await.unwrap_err();
        assert_eq!(failure.param.as_deref(), Some(param), "{body}: {failure}");
    }
    let failure = world.complete(json!({"prompt": ["a", "b"], "completion_token_ids": [5]})).await.unwrap_err();
    assert_eq!(failure.param.as_deref(), Some("completion_token_ids"));
}

#[tokio::test]
async fn fastchats_string_is_the_finished_prompt() {
    let world = saying("Hello").await;
    let asked = json!({"messages": "Hi", "return_token_ids": true});
    let whole = world.post("/api/v1/chat/completions", asked).await.unwrap();
    assert_eq!((&whole["prompt_token_ids"], text(&whole)), (&json!(world.ids("Hi", Special::Text)), "Hello"));
}

#[tokio::test]
async fn a_completion_is_limited_by_either_name() {
    let world = saying("abcdef").await;
    let tokens = |whole: Value| (whole["usage"]["completion_tokens"].as_u64().unwrap(), whole["choices"][0]["finish_reason"].clone());
    let length = json!("length");
    let asked = json!({"prompt": "Hi", "max_tokens": 50, "response_max_tokens": 2});
    assert_eq!(tokens(world.complete(asked.clone()).await.unwrap()), (2, length.clone()));
    // A shorter answer ends by itself, and max_tokens holds too.
    let whole = world.complete(with(asked.clone(), json!({"response_max_tokens": 7}))).await.unwrap();
    assert_eq!(tokens(whole), (7, json!("stop")));
    let whole = world.complete(with(asked.clone(), json!({"max_tokens": 1}))).await.unwrap();
    assert_eq!(tokens(whole), (1, length));
    assert_eq!(world.complete(json!({"response_max_tokens": 0})).await.unwrap_err().param.as_deref(), Some("response_max_tokens"));
}

#[tokio::test]
async fn a_request_may_give_itself_an_id() {
    let world = saying("Hello").await;
    for (name, id) in [("request_id", "abc"), ("req_id", "chatcmpl-abc")] {
        assert_eq!(world.chat(json!({ name: id })).await.unwrap()["id"], "chatcmpl-abc");
    }
    assert_eq!(world.chat(json!({"request_id": null})).await.unwrap()["id"], "chatcmpl-r1");
    for id in [json!(5), json!(""), json!("é"), json!("x".repeat(129))] {
        assert_eq!(world.chat(json!({"request_id": id})).await.unwrap_err().param.as_deref(), Some("request_id"), "{id}");
    }
}

#[tokio::test]
async fn chunks_hold_as_many_tokens_as_asked_for() {
    let world = world_with(&[vec![Say::Text("abcdefg")]], ApiSettings::default(), files(&[]), Duration::from_millis(5)).await.unwrap();
    let events = world.events("/v1/completions", json!({"prompt": "Hi", "seed": 0, "max_streaming_response_tokens": 3})).await;
    let texts: Vec<&str> = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).filter(|text| !text.is_empty()).collect();
    assert_eq!(texts.concat(), "abcdefg");
    assert!(texts.len() <= 3 && texts.iter().rev().skip(1).all(|text| text.len() >= 3), "{texts:?}");
    assert_eq!(world.complete(json!({"max_streaming_response_tokens": 0})).await.unwrap_err().status(), 400);
}

#[tokio::test]
async fn fastdeploys_form_is_beside_the_other() {
    let world = compatible(&[vec![Say::Text("Hello world")]]).await;
    let plain = saying("Hello world").await;
    let ids = world.ids("Hello world", Special::Text);
    let whole = world.chat(json!({"return_token_ids": true, "temperature": 50})).await.unwrap();
    let message = &whole["choices"][0]["message"];
    assert_eq!(message["completion_token_ids"], whole["choices"][0]["token_ids"]);
    assert_eq!(
        (message["completion_tokens"].as_str(), &message["prompt_token_ids"]),
        (Some("Hello world</s>"), &whole["prompt_token_ids"])
    );
    assert!(message["prompt_tokens"].as_str().unwrap().contains("User: Hi"), "{message}");
    let failure = plain.chat(json!({"temperature": 2.5})).await.unwrap_err();
    assert_eq!(failure.message, "2.5 is greater than the maximum of 2 - 'temperature'");
    assert!(world.chat(json!({"temperature": -1})).await.is_err());
    assert!(world.chat(json!({})).await.unwrap()["choices"][0]["message"].get("completion_tokens").is_none());

    let body = json!({"messages": "Hi", "seed": 0});
    let events = world.events("/v1/chat/completions", body.clone()).await;
    let with_text: Vec<&Value> = events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["arrival_time"].is_f64()).collect();
    let streamed: Vec<u64> =
        with_text.iter().flat_map(|choice| choice["delta"]["token_ids"].as_array().unwrap()).filter_map(Value::as_u64).collect();
    assert!(streamed.starts_with(&ids.iter().map(|id| u64::from(*id)).collect::<Vec<_>>()), "{events:?}");
    let events = plain.events("/v1/chat/completions", body).await;
    assert!(events.iter().all(|event| event["choices"][0].get("arrival_time").is_none()), "not unless the settings ask for it");
}

#[tokio::test]
async fn metrics_tell_the_moments_of_a_request_in_order() {
    let world = saying("Hello world").await;
    let number = |metrics: &Value, name: &str| metrics[name].as_f64().unwrap_or_else(|| panic!("{name}: {metrics}"));
    let check = |metrics: &Value| {
        let order = [
            "arrival_time",
            "preprocess_end_time",
            "inference_start_time",
            "engine_recv_first_token_time",
            "engine_recv_latest_token_time",
        ];
        let moments = order.map(|name| number(metrics, name));
        assert!(moments.is_sorted() && moments[0] > 1.7e9, "{metrics}");
        let parts = ["preprocess_cost_time", "time_in_queue", "model_forward_time"].map(|name| number(metrics, name));
        assert!((parts.iter().sum::<f64>() - number(metrics, "model_execute_time")).abs() < 1e-6, "{metrics}");
        assert!(number(metrics, "first_token_time") <= parts[2]);
    };
    check(&world.chat(json!({"collect_metrics": true})).await.unwrap()["metrics"]);
    check(&world.complete(json!({"collect_metrics": true})).await.unwrap()["metrics"]);
    for (path, prompt) in [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")] {
        let events = world.events(path, json!({prompt: "Hi", "seed": 0, "collect_metrics": true})).await;
        let with_tokens: Vec<&Value> =
            events.iter().map(|event| &event["metrics"]).filter(|metrics| metrics["first_token_time"].is_f64()).collect();
        assert!(with_tokens.len() >= 2, "{events:?}");
        with_tokens.into_iter().for_each(check);
    }
    assert!(world.chat(json!({})).await.unwrap().get("metrics").is_none());
    assert_eq!(world.chat(json!({"collect_metrics": 1})).await.unwrap_err().param.as_deref(), Some("collect_metrics"));
}

const LONG: &str = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz";

/// Sends a slow request, and gives its answer when it has ended.
fn slow(service: &Arc<Service>, id: &str, body: Value) -> tokio::task::JoinHandle<Result<Value, Failure>> {
    let (service, request_id) = (service.clone(), id.to_owned());
    tokio::spawn(async move {
        let call = Call { method: "POST".to_owned(), path: "/v1/completions".to_owned(), body, request_id, client: None };
        service.call(call).await.map(whole)
    })
}

#[tokio::test]
async fn whoever_knows_an_id_can_abort_the_request() {
    let world = world_with(&[vec![Say::Text(LONG)]], ApiSettings::default(), files(&[]), Duration::from_millis(30)).await.unwrap();
    let body = json!({"prompt": "Hi", "seed": 0, "max_tokens": 80});
    let (one, other) =
        (slow(&world.service, "one", body.clone()), slow(&world.service, "x", with(body.clone(), json!({"request_id": "cmpl-other"}))));
    let abort = |body: Value| world.post("/v1/abort_requests", body);
    let mut aborted = Value::Null;
    while aborted["result"]["aborted"][0].is_null() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        aborted = abort(json!({"req_ids": ["cmpl-one", "nobody"]})).await.unwrap();
    }
    assert_eq!(aborted["status"], "success");
    assert_eq!((&aborted["result"]["aborted"][0]["request_id"], &aborted["result"]["not_found"]), (&json!("one"), &json!(["nobody"])));
    assert!(aborted["result"]["aborted"][0]["output_token_count"].is_u64());
    let answer = one.await.unwrap().unwrap();
    assert_eq!(answer["choices"][0]["finish_reason"], "abort");
    assert!(LONG.starts_with(answer["choices"][0]["text"].as_str().unwrap()), "{answer}");
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() < 52);
    assert!(!other.is_finished(), "nobody has aborted it");
    let aborted = world.job(json!({"openai_route": "/v1/abort_requests", "openai_input": {"abort_all": true}})).await.unwrap();
    assert_eq!(aborted["result"]["aborted"][0]["request_id"], "cmpl-other");
    assert_eq!(other.await.unwrap().unwrap()["choices"][0]["finish_reason"], "abort");
    // Streams end as they always do.
    let mut pieces = match world.call("/v1/completions", with(body, json!({"stream": true}))).await.unwrap() {
        Reply::Stream(pieces) => pieces,
        Reply::Whole(whole) => panic!("not a stream: {whole}"),
    };
    let first = pieces.next().await.unwrap().unwrap();
    abort(json!({"request_ids": "r1"})).await.unwrap();
    let rest: Vec<Value> = pieces.map(Result::unwrap).collect().await;
    let events = events(&[vec![first], rest].concat());
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "abort");
    assert!(world.service.engine().idle(Duration::from_secs(5)).await);
    for (body, param) in [(json!({}), "req_ids"), (json!({"req_ids": 5}), "req_ids"), (json!({"req_ids": ["a", 5]}), "req_ids[1]")] {
        assert_eq!(abort(body.clone()).await.unwrap_err().param.as_deref(), Some(param), "{body}");
    }
}

#[tokio::test]
async fn a_job_may_bring_a_batch() {
    let world = saying("Hello").await;
    let line = |id: &str, body: Value| json!({"custom_id": id, "method": "POST", "url": "/v1/completions", "body": body});
    let lines = json!([
        line("a", json!({"prompt": "Hi"})),
        line("b", json!({"prompt": "Hi", "temperature": 9})),
        {"custom_id": "c", "url": "/v1/nothing", "body": {}},
        5,
        line("d", json!({"prompt": "Hi", "sampling_params": {"stream": true}})),
    ]);
    let whole = world.job(json!({"batch": lines})).await.unwrap();
    let answers = whole.as_array().unwrap();
    let statuses: Vec<&Value> = answers.iter().map(|answer| &answer["response"]["status_code"]).collect();
    assert_eq!(statuses, [&json!(200), &json!(400), &json!(404), &Value::Null, &json!(400)], "{whole}");
    assert_eq!(answers[0]["response"]["body"]["choices"][0]["text"], "Hello");
    assert_eq!(answers[1]["response"]["body"]["error"]["param"], "temperature");
    assert_eq!((&answers[3]["custom_id"], &answers[3]["error"]["line"]), (&Value::Null, &json!(4)));
    let text = format!("{}\n\n{{broken\n", lines[0]);
    let whole = world.job(json!({"input_file_content": text})).await.unwrap();
    assert_eq!(
        (&whole[0]["custom_id"], &whole[1]["error"]["code"], &whole[1]["error"]["line"]),
        (&json!("a"), &json!("invalid_json_line"), &json!(3))
    );
    let mut streamed = world.job_stream(json!({"batch": lines, "stream": true})).await;
    assert_eq!(streamed.len(), 5);
    streamed.retain(|answer| answer["custom_id"] == "a");
    assert_eq!(streamed[0]["response"]["body"]["choices"][0]["text"], "Hello");
    assert_eq!(world.job(json!({"batch": []})).await.unwrap(), json!([]));
    for (input, param) in [
        (json!({"batch": 5}), "batch"),
        (json!({"batch": vec![0; 1001]}), "batch"),
        (json!({"input_file_content": "1\n".repeat(1001)}), "input_file_content"),
        (json!({"input_file_content": []}), "input_file_content"),
    ] {
        assert_eq!(world.job(input).await.unwrap_err().param.as_deref(), Some(param));
    }
}

#[tokio::test]
async fn a_batch_waits_where_the_engine_has_no_room() {
    // More sequences than may run and wait together.
    let world = world_with(&[vec![Say::Text("Hello")]], ApiSettings::default(), files(&[]), Duration::from_millis(2)).await.unwrap();
    let line =
        |id: usize| json!({"custom_id": id.to_string(), "url": "/v1/completions", "body": {"prompt": "Hi", "n": 20, "temperature": 1}});
    let whole = world.job(json!({"batch": (0..9).map(line).collect::<Vec<_>>()})).await.unwrap();
    assert!(whole.as_array().unwrap().iter().all(|answer| answer["response"]["status_code"] == 200), "{whole}");
}
