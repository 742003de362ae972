//! OpenAI calls through the queue, and the gateway by model name.

use super::*;

#[tokio::test]
async fn an_openai_call_becomes_a_job() {
    let bench = bench(quick()).await;
    let body = json!({"model": "m", "messages": [], "stream": false});
    let call = bench.openai("/v1/chat/completions", body.clone());
    let job = bench.await_job("w").await;
    assert_eq!(job["input"], json!({"openai_route": "/v1/chat/completions", "openai_input": body}));
    bench.done("w", id(&job), json!({"output": {"object": "chat.completion"}})).await;
    assert_eq!(value(call.await.unwrap()).await, json!({"object": "chat.completion"}));

    // A generator's aggregate of one; a GET; a name with an encoded slash.
    let get = bench.client.get(bench.url("openai/v1/models/org%2Fname"));
    let call = tokio::spawn(async move { get.send().await.unwrap() });
    let job = bench.await_job("w").await;
    assert_eq!(job["input"], json!({"openai_route": "/v1/models/org%2Fname"}));
    bench.done("w", id(&job), json!({"output": [{"id": "m"}]})).await;
    assert_eq!(value(call.await.unwrap()).await, json!({"id": "m"}));

    // A worker that returns text.
    let call = bench.openai("/v1/completions", json!({}));
    let job = bench.await_job("w").await;
    bench.done("w", id(&job), json!({"output": "{\"a\":1}"})).await;
    let response = call.await.unwrap();
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(value(response).await, json!({"a": 1}));

    let empty = bench.client.post(bench.url("openai/v1/completions")).send().await.unwrap();
    assert_eq!(empty.status(), 400);
    assert!(empty.json::<Value>().await.unwrap()["error"]["message"].is_string());
    assert_eq!(bench.client.delete(bench.url("openai/v1/x")).send().await.unwrap().status(), 405);
}

#[tokio::test]
async fn openai_streams_are_relayed_as_they_come() {
    let bench = bench(quick()).await;
    let call = bench.openai("/v1/chat/completions", json!({"stream": true}));
    let job = bench.await_job("w").await;
    bench.chunk("w", id(&job), json!("data: 1\n\ndata: 2\n\n")).await;
    let response = call.await.unwrap();
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    let mut bytes = response.bytes_stream();
    assert_eq!(bytes.next().await.unwrap().unwrap(), "data: 1\n\ndata: 2\n\n", "before the job has ended");
    bench.chunk("w", id(&job), json!([{"n": 3}, "data: 4\n\n"])).await;
    bench.chunk("w", id(&job), json!("data: [DONE]\n\n")).await;
    bench.done("w", id(&job), json!({"output": []})).await;
    let mut rest = String::new();
    while let Some(chunk) = bytes.next().await {
        rest.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
    }
    assert_eq!(rest, "data: {\"n\":3}\n\ndata: 4\n\ndata: [DONE]\n\n");

    // A worker without a stream URL has only the aggregate.
    let call = bench.openai("/v1/chat/completions", json!({"stream": true}));
    let job = bench.await_job("w").await;
    bench.done("w", id(&job), json!({"output": ["data: 1\n\n", "data: [DONE]\n\n"]})).await;
    assert_eq!(call.await.unwrap().text().await.unwrap(), "data: 1\n\ndata: [DONE]\n\n");
}

#[tokio::test]
async fn failed_jobs_answer_openai_clients_with_their_status() {
    let envelope = json!({"error": {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "model_not_found", "status": 404}});
    for stream in [false, true] {
        let bench = bench(quick()).await;
        let call = bench.openai("/v1/completions", json!({"stream": stream}));
        let job = bench.await_job("w").await;
        bench.done("w", id(&job), json!({"error": envelope.to_string()})).await;
        let response = call.await.unwrap();
        assert_eq!(response.status(), 404);
        let expected = json!({
            "error": {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "model_not_found"},
            "object": "error", "message": "no such model", "code": 40301,
        });
        assert_eq!(response.json::<Value>().await.unwrap(), expected);

        let busy =
            json!({"error": {"message": "full", "type": "rate_limit_error", "param": null, "code": "engine_overloaded", "status": 429}});
        let call = bench.openai("/v1/completions", json!({"stream": stream}));
        let job = bench.await_job("w").await;
        bench.done("w", id(&job), json!({"error": busy.to_string()})).await;
        let response = call.await.unwrap();
        assert_eq!(response.status(), 429);
        assert!(response.headers().contains_key("retry-after"));

        // What a Python worker says when its handler raises.
        let call = bench.openai("/v1/completions", json!({"stream": stream}));
        let job = bench.await_job("w").await;
        let raised = json!({"error_type": "<class 'ValueError'>", "error_message": "bad value", "error_traceback": "…"});
        bench.done("w", id(&job), json!({"error": raised.to_string()})).await;
        let response = call.await.unwrap();
        assert_eq!(response.status(), 500);
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["message"], "bad value");

        let cloud = self::bench(EndpointOptions { cloud_errors: true, ..quick() }).await;
        let call = cloud.openai("/v1/completions", json!({"stream": stream}));
        let job = cloud.await_job("w").await;
        cloud.done("w", id(&job), json!({"error": envelope.to_string()})).await;
        assert_eq!(call.await.unwrap().status(), 500);
    }
}

#[tokio::test]
async fn a_stream_that_fails_midway_says_so_once() {
    let bench = bench(quick()).await;
    for told in [false, true] {
        let call = bench.openai("/v1/completions", json!({"stream": true}));
        let job = bench.await_job("w").await;
        bench.chunk("w", id(&job), json!("data: {\"n\":1}\n\n")).await;
        if told {
            bench.chunk("w", id(&job), json!("data: {\"error\":{\"message\":\"oops\"}}\n\ndata: [DONE]\n\n")).await;
        }
        bench.done("w", id(&job), json!({"error": "oops"})).await;
        let text = call.await.unwrap().text().await.unwrap();
        assert_eq!(text.matches("\"error\"").count(), if told { 1 } else { 2 }, "{text}");
        assert_eq!(text.matches("data: [DONE]\n\n").count(), 1);
        assert!(text.ends_with("data: [DONE]\n\n") && text.contains("oops"));
    }
}

#[tokio::test]
async fn a_stream_of_named_events_fails_in_its_own_form() {
    let bench = bench(quick()).await;
    let ends = [
        (
            "/v1/responses",
            "event: response.created\ndata: {}\n\n",
            "event: error\ndata: {\"type\":\"error\",\"code\":\"job_failed\",\"message\":\"oops\",\"param\":null,\"sequence_number\":1}\n\n",
        ),
        (
            "/v1/messages",
            "event: message_start\ndata: {}\n\n",
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"oops\"}}\n\n",
        ),
    ];
    for (route, begun, end) in ends {
        for told in [false, true] {
            let call = bench.openai(route, json!({"stream": true}));
            let job = bench.await_job("w").await;
            bench.chunk("w", id(&job), json!(begun)).await;
            if told {
                bench.chunk("w", id(&job), json!(end)).await;
            }
            bench.done("w", id(&job), json!({"error": "oops"})).await;
            assert_eq!(call.await.unwrap().text().await.unwrap(), format!("{begun}{end}"), "told {told}");
        }
        let call = bench.openai(route, json!({}));
        let job = bench.await_job("w").await;
        let envelope =
            json!({"error": {"message": "no", "type": "invalid_request_error", "param": "max_tokens", "code": null, "status": 400}});
        bench.done("w", id(&job), json!({"error": envelope.to_string()})).await;
        let answer = call.await.unwrap();
        assert_eq!(answer.status(), 400);
        let body: serde_json::Value = answer.json().await.unwrap();
        assert_eq!(body["error"]["message"], "no");
        assert_eq!(body["type"] == "error", route == "/v1/messages", "{body}");
    }
}

#[tokio::test]
async fn an_openai_stream_whose_worker_is_lost_does_not_begin_again() {
    let bench = bench(EndpointOptions { lost_after: Duration::from_millis(100), ..quick() }).await;
    let call = bench.openai("/v1/completions", json!({"stream": true}));
    bench.get("ping/w1").await;
    let job = bench.await_job("w1").await;
    bench.chunk("w1", id(&job), json!("data: 1\n\n")).await;
    let text = call.await.unwrap().text().await.unwrap();
    assert!(text.starts_with("data: 1\n\n") && text.contains("worker_lost") && text.ends_with("data: [DONE]\n\n"), "{text}");
    bench.await_status(id(&job), "CANCELLED").await;
}

#[tokio::test]
async fn an_openai_client_that_hangs_up_cancels_its_job() {
    let bench = bench(quick()).await;
    for stream in [false, true] {
        let call = bench.openai("/v1/completions", json!({"stream": stream}));
        let job = bench.await_job("w").await;
        if stream {
            bench.chunk("w", id(&job), json!("data: 1\n\n")).await;
            drop(call.await.unwrap());
        } else {
            call.abort();
        }
        bench.await_status(id(&job), "CANCELLED").await;
        assert_eq!(value(bench.get("job-stop/w").await).await, json!({"jobsToStop": [id(&job)]}));
    }
}

#[tokio::test]
async fn cancelled_and_late_jobs_are_not_worth_another_try() {
    let bench = bench(quick()).await;
    let call = bench.openai("/v1/completions", json!({}));
    let job = bench.await_job("w").await;
    bench.post(&format!("cancel/{}", id(&job)), json!({})).await;
    let response = call.await.unwrap();
    assert_eq!(response.status(), 499);
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "cancelled");
}

#[tokio::test]
async fn a_job_that_runs_too_long_times_out() {
    let bench = bench(EndpointOptions { execution_timeout: Duration::from_millis(150), ..quick() }).await;
    let slow = bench.run(json!(1)).await;
    let patient = value(bench.post("run", json!({"input": 2, "policy": {"executionTimeout": 60_000}})).await).await;
    bench.take("w").await.unwrap();
    bench.take("w").await.unwrap();
    bench.await_status(&slow, "TIMED_OUT").await;
    assert_eq!(bench.status(id(&patient)).await["status"], "IN_PROGRESS");
    assert_eq!(value(bench.get("job-stop/w").await).await, json!({"jobsToStop": [slow]}));
    bench.post(&format!("retry/{slow}"), json!({})).await;
    assert_eq!(id(&bench.take("w").await.unwrap()), slow);

    for stream in [false, true] {
        let call = bench.openai("/v1/completions", json!({"stream": stream}));
        bench.await_job("w").await;
        let response = call.await.unwrap();
        assert_eq!(response.status(), 504);
        assert_eq!(response.headers()["x-should-retry"], "false");
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "execution_timeout");
    }
}

/// A worker that serves `models`, and answers every other call with its own name.
fn model_worker(bench: &Arc<Bench>, endpoint: &'static str, models: &'static [&'static str]) -> tokio::task::JoinHandle<()> {
    let bench = bench.clone();
    tokio::spawn(async move {
        let base = format!("{}/v2/{endpoint}", bench.server.base);
        loop {
            let response = bench.client.get(format!("{base}/job-take/w")).send().await.unwrap();
            if response.status() == 204 {
                continue;
            }
            let job: Value = response.json().await.unwrap();
            let output = match job["input"]["openai_route"].as_str().unwrap() {
                "/v1/models" => json!({"object": "list", "data": models.iter().map(|id| json!({"id": id})).collect::<Vec<_>>()}),
                route => json!({"from": endpoint, "route": route}),
            };
            bench.client.post(format!("{base}/job-done/w/{}", id(&job))).json(&json!({ "output": [output] })).send().await.unwrap();
        }
    })
}

#[tokio::test]
async fn the_gateway_routes_by_model_name() {
    let bench = Arc::new(bench(quick()).await);
    let call = |path: &str, model: Value| {
        let post = bench.client.post(format!("{}{path}", bench.server.base)).json(&json!({ "model": model }));
        async move { post.send().await.unwrap() }
    };
    let response = call("/v1/completions", json!("a")).await;
    assert_eq!(response.status(), 503);
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "no_worker");

    let first = model_worker(&bench, "one", &["a", "org/b"]);
    while bench.endpoints.served().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // A single endpoint gets everything; its worker knows the names.
    assert_eq!(value(call("/openai/v1/completions/", json!("x")).await).await, json!({"from": "one", "route": "/v1/completions"}));

    let second = model_worker(&bench, "two", &["c"]);
    while bench.endpoints.served().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for (model, endpoint) in [("a", "one"), ("c", "two"), ("org/b", "one")] {
        assert_eq!(value(call("/v1/chat/completions", json!(model)).await).await["from"], endpoint);
    }
    let unknown = call("/v1/completions", json!("x")).await;
    assert_eq!(unknown.status(), 404);
    assert!(unknown.json::<Value>().await.unwrap()["message"].as_str().unwrap().contains("a, org/b, c"));
    assert_eq!(call("/v1/completions", json!("default")).await.status(), 400);
    let list = value(bench.client.get(format!("{}/v1/models", bench.server.base)).send().await.unwrap()).await;
    assert_eq!(list["data"], json!([{"id": "a"}, {"id": "org/b"}, {"id": "c"}]));
    let one = bench.client.get(format!("{}/v1/models/org%2Fb", bench.server.base)).send().await.unwrap();
    assert_eq!(value(one).await, json!({"from": "one", "route": "/v1/models/org%2Fb"}));
    assert_eq!(bench.client.get(format!("{}/favicon.ico", bench.server.base)).send().await.unwrap().status(), 404);
    first.abort();
    second.abort();
}
