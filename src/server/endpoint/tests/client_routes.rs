//! What clients ask of a job: run, status, stream, cancel, retry, purge.

use super::*;

#[tokio::test]
async fn a_job_goes_through_the_queue_and_comes_back() {
    let bench = bench(quick()).await;
    let job = bench.run(json!({"x": [1, null]})).await;
    assert!(job.ends_with("-u1") && !job.starts_with("sync-"), "{job}");
    assert_eq!(bench.status(&job).await, json!({"id": job, "status": "IN_QUEUE"}));
    let taken = bench.take("w").await.unwrap();
    assert_eq!(taken, json!({"id": job, "input": {"x": [1, null]}}));
    let status = bench.status(&job).await;
    assert_eq!((&status["status"], &status["workerId"]), (&json!("IN_PROGRESS"), &json!("w")));
    assert!(status["delayTime"].is_u64());

    bench.done("w", &job, json!({"status": "IN_PROGRESS", "output": "half"})).await;
    let status = bench.status(&job).await;
    assert_eq!((&status["status"], &status["output"]), (&json!("IN_PROGRESS"), &json!("half")));

    assert_eq!(bench.done("w", &job, json!({"output": {"é": 1}})).await.status(), 200);
    let status = value(bench.post(&format!("status/{job}"), json!({})).await).await;
    assert_eq!((&status["status"], &status["output"]), (&json!("COMPLETED"), &json!({"é": 1})));
    assert!(status["executionTime"].is_u64());
    assert_eq!(bench.get("status/none").await.status(), 404);
    assert!(bench.get("status/none").await.json::<Value>().await.unwrap()["error"].is_string());
}

#[tokio::test]
async fn every_kind_of_output_and_error_is_kept() {
    let bench = bench(quick()).await;
    let table = [
        (json!({"output": null}), "COMPLETED", Some(json!(null)), None),
        (json!({"output": false}), "COMPLETED", Some(json!(false)), None),
        (json!({"output": [1, 2]}), "COMPLETED", Some(json!([1, 2])), None),
        (json!({}), "COMPLETED", None, None),
        (json!({"output": "x", "error": ""}), "COMPLETED", Some(json!("x")), None),
        (json!({"output": "x", "error": "bad"}), "FAILED", Some(json!("x")), Some(json!("bad"))),
        (json!({"error": {"a": 1}}), "FAILED", None, Some(json!({"a": 1}))),
        (json!({"output": 3, "stopPod": true}), "COMPLETED", Some(json!(3)), None),
    ];
    for (body, status, output, error) in table {
        let job = bench.run(json!(1)).await;
        bench.take("w").await.unwrap();
        bench.done("w", &job, body.clone()).await;
        let report = bench.status(&job).await;
        assert_eq!(report["status"], status, "{body}");
        assert_eq!(report.get("output"), output.as_ref(), "{body}");
        assert_eq!(report.get("error"), error.as_ref(), "{body}");
    }
    let job = bench.run(json!(1)).await;
    bench.take("w").await.unwrap();
    let bad = bench.client.post(bench.url(&format!("job-done/w/{job}"))).body("{").send().await.unwrap();
    assert_eq!(bad.status(), 400);
    assert_eq!(bench.status(&job).await["status"], "IN_PROGRESS");
}

#[tokio::test]
async fn runsync_waits_for_the_result_and_its_client_may_leave() {
    let bench = bench(quick()).await;
    let post = bench.client.post(bench.url("runsync")).json(&json!({"input": {"a": 1}}));
    let waiting = tokio::spawn(async move { post.send().await.unwrap() });
    let job = bench.await_job("w").await;
    assert!(id(&job).starts_with("sync-") && id(&job).ends_with("-u1"));
    bench.done("w", id(&job), json!({"output": "done"})).await;
    let report = value(waiting.await.unwrap()).await;
    assert_eq!((&report["id"], &report["status"], &report["output"]), (&job["id"], &json!("COMPLETED"), &json!("done")));

    // The wait is over before the job is: the client polls on, with or without a hold.
    let report = value(bench.post("runsync?wait=1000", json!({"input": 2})).await).await;
    assert_eq!(report["status"], "IN_QUEUE");
    let job = report["id"].as_str().unwrap().to_owned();
    let get = bench.client.get(bench.url(&format!("status-sync/{job}?wait=60000")));
    let waiting = tokio::spawn(async move { get.send().await.unwrap() });
    bench.take("w").await.unwrap();
    bench.done("w", &job, json!({"output": 2})).await;
    assert_eq!(value(waiting.await.unwrap()).await["output"], 2);
    assert_eq!(bench.post("runsync?wait=soon", json!({"input": 1})).await.status(), 400);

    // A client that hangs up does not cancel.
    let post = bench.client.post(bench.url("runsync")).json(&json!({"input": 3}));
    let leaving = tokio::spawn(async move { post.send().await });
    let job = bench.await_job("w").await;
    leaving.abort();
    let _ = leaving.await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(bench.status(id(&job)).await["status"], "IN_PROGRESS");
}

#[tokio::test]
async fn bad_submissions_are_refused() {
    let bench = bench(EndpointOptions { run_limit: 1000, sync_limit: 2000, ..quick() }).await;
    for body in [
        json!({}),
        json!({"input": null}),
        json!([]),
        json!({"input": 1, "webhook": "ftp://x"}),
        json!({"input": 1, "policy": 3}),
        json!({"input": 1, "policy": {"ttl": "1h"}}),
        json!({"input": 1, "policy": {"executionTimeout": -5}}),
    ] {
        for route in ["run", "runsync"] {
            assert_eq!(bench.post(route, body.clone()).await.status(), 400, "{body}");
        }
    }
    let big = json!({"input": "x".repeat(1500)});
    assert_eq!(bench.post("run", big.clone()).await.status(), 400);
    assert_eq!(bench.post("runsync?wait=1000", big).await.status(), 200);
    assert_eq!(bench.post("runsync?wait=1000", json!({"input": "x".repeat(2500)})).await.status(), 400);
    assert_eq!(bench.get("run").await.status(), 405);
    assert_eq!(bench.get("nowhere").await.status(), 404);
}

#[tokio::test]
async fn results_over_the_limit_are_refused_and_a_small_one_may_follow() {
    let bench = bench(EndpointOptions { run_limit: 1000, sync_limit: 2000, chunk_limit: 500, ..quick() }).await;
    let job = bench.run(json!(1)).await;
    bench.take("w").await.unwrap();
    for size in [1500, 2500, 50_000] {
        assert_eq!(bench.done("w", &job, json!({"output": "x".repeat(size)})).await.status(), 400);
    }
    let post = bench.post(&format!("job-stream/w/{job}"), json!({"output": "x".repeat(600)})).await;
    assert_eq!(post.status(), 400);
    assert_eq!(bench.status(&job).await["status"], "IN_PROGRESS");
    bench.done("w", &job, json!({"error": "too big"})).await;
    assert_eq!(bench.status(&job).await["error"], "too big");
}

#[tokio::test]
async fn a_full_queue_answers_429_until_there_is_room() {
    let bench = bench(EndpointOptions { max_queued: 2, max_bytes: 20_000, ..quick() }).await;
    bench.run(json!(1)).await;
    bench.run(json!(2)).await;
    let refused = bench.post("run", json!({"input": 3})).await;
    assert_eq!(refused.status(), 429);
    assert!(refused.headers().contains_key("retry-after"));
    let job = bench.take("w").await.unwrap();
    bench.run(json!(3)).await;
    bench.take("w").await.unwrap();
    // The bytes of all jobs together are bounded too; results nobody fetched make room.
    bench.done("w", id(&job), json!({"output": "x".repeat(9000)})).await;
    assert_eq!(bench.post("run", json!({"input": "y".repeat(9000)})).await.status(), 200);
    assert_eq!(bench.get(&format!("status/{}", id(&job))).await.status(), 404);
    bench.take("w").await.unwrap();
    assert_eq!(bench.post("run", json!({"input": "z".repeat(9000)})).await.status(), 429);
}

#[tokio::test]
async fn streams_are_drained_by_reading() {
    let bench = bench(quick()).await;
    let job = bench.run(json!(1)).await;
    let read = |method: Method| {
        let request = bench.client.request(method, bench.url(&format!("stream/{job}")));
        async move { value(request.send().await.unwrap()).await }
    };
    assert_eq!(read(Method::GET).await, json!({"status": "IN_QUEUE", "stream": []}));
    bench.take("w").await.unwrap();
    bench.chunk("w", &job, json!("a")).await;
    bench.chunk("w", &job, json!({"b": 1})).await;
    assert_eq!(read(Method::GET).await, json!({"status": "IN_PROGRESS", "stream": [{"output": "a"}, {"output": {"b": 1}}]}));
    assert_eq!(read(Method::POST).await, json!({"status": "IN_PROGRESS", "stream": []}));
    bench.chunk("w", &job, json!(["c"])).await;
    bench.done("w", &job, json!({"output": ["a", {"b": 1}, ["c"]]})).await;
    assert_eq!(read(Method::POST).await, json!({"status": "COMPLETED", "stream": [{"output": ["c"]}]}));
    assert_eq!(read(Method::GET).await, json!({"status": "COMPLETED", "stream": []}));
    assert_eq!(bench.status(&job).await["output"], json!(["a", {"b": 1}, ["c"]]));
    assert_eq!(bench.get("stream/none").await.status(), 404);

    let job = bench.run(json!(1)).await;
    bench.take("w").await.unwrap();
    bench.done("w", &job, json!({"error": "no"})).await;
    let answer = value(bench.get(&format!("stream/{job}")).await).await;
    assert_eq!(answer, json!({"status": "FAILED", "stream": [], "error": "no"}));
}

#[tokio::test]
async fn cancel_ends_a_job_at_once_and_stops_its_worker() {
    let bench = bench(quick()).await;
    let queued = bench.run(json!(1)).await;
    let running = bench.run(json!(2)).await;
    // An empty body with a JSON type, as the SDK sends it.
    let cancel = |job: &str| {
        let post = bench.client.post(bench.url(&format!("cancel/{job}"))).header("content-type", "application/json");
        async move { post.send().await.unwrap() }
    };
    let answer = value(cancel(&queued).await).await;
    assert_eq!((&answer["id"], &answer["status"]), (&json!(queued), &json!("CANCELLED")));
    assert_eq!(id(&bench.take("w").await.unwrap()), running, "a cancelled job is not given out");

    let get = bench.client.get(bench.url("job-stop/w?gpu=x"));
    let stop = tokio::spawn(async move { get.send().await.unwrap() });
    assert_eq!(value(cancel(&running).await).await["status"], "CANCELLED");
    let stop = stop.await.unwrap();
    let stop = if stop.status() == 204 { bench.get("job-stop/w").await } else { stop };
    assert_eq!(value(stop).await, json!({"jobsToStop": [running]}));
    assert_eq!(bench.get("job-stop/w").await.status(), 204, "a stop is said once");
    let late = bench.done("w", &running, json!({"output": "late"})).await;
    assert_eq!(late.status(), 200);
    assert_eq!(bench.status(&running).await["status"], "CANCELLED");
    assert_eq!(bench.status(&running).await.get("output"), None);
    assert_eq!(cancel("none").await.status(), 404);
    // Too late to cancel.
    let job = bench.run(json!(3)).await;
    bench.take("w").await.unwrap();
    bench.done("w", &job, json!({"output": 3})).await;
    assert_eq!(value(cancel(&job).await).await["status"], "COMPLETED");
}

#[tokio::test]
async fn only_failed_jobs_are_retried() {
    let bench = bench(quick()).await;
    let job = bench.run(json!(1)).await;
    assert_eq!(bench.post(&format!("retry/{job}"), json!({})).await.status(), 400);
    bench.take("w").await.unwrap();
    bench.done("w", &job, json!({"error": "no", "output": "part"})).await;
    let answer = value(bench.client.post(bench.url(&format!("retry/{job}"))).send().await.unwrap()).await;
    assert_eq!(answer, json!({"id": job, "status": "IN_QUEUE"}));
    let status = bench.status(&job).await;
    assert_eq!((status.get("output"), status.get("error"), &status["retries"]), (None, None, &json!(1)));
    assert_eq!(id(&bench.take("w").await.unwrap()), job, "the same worker may have it again");
    bench.done("w", &job, json!({"output": "yes"})).await;
    assert_eq!(bench.status(&job).await["output"], "yes");
    assert_eq!(bench.post(&format!("retry/{job}"), json!({})).await.status(), 400);
    assert_eq!(bench.health().await["jobs"], json!({"completed": 1, "failed": 1, "inProgress": 0, "inQueue": 0, "retried": 1}));
}

#[tokio::test]
async fn purge_health_and_requests_tell_the_truth() {
    let bench = bench(quick()).await;
    let idle = json!({"idle": 0, "initializing": 0, "ready": 0, "running": 0, "throttled": 0, "unhealthy": 0});
    assert_eq!(bench.health().await["workers"], idle);
    let running = bench.run(json!(1)).await;
    bench.take("w1").await.unwrap();
    let queued = [bench.run(json!(2)).await, bench.run(json!(3)).await];
    bench.get("ping/w2?runpod_version=1").await;
    bench.get("ping/w3?status=unhealthy&check=gpu&reason=broken").await;
    let health = bench.health().await;
    assert_eq!(health["jobs"], json!({"completed": 0, "failed": 0, "inProgress": 1, "inQueue": 2, "retried": 0}));
    assert_eq!(health["workers"], json!({"idle": 0, "initializing": 1, "ready": 0, "running": 1, "throttled": 0, "unhealthy": 1}));
    let list = value(bench.get("requests").await).await;
    assert_eq!(list["requests"].as_array().unwrap().len(), 3);

    let purge = bench.client.post(bench.url("purge-queue")).header("content-type", "application/json").send().await.unwrap();
    assert_eq!(value(purge).await, json!({"removed": 2, "status": "completed"}));
    for job in queued {
        assert_eq!(bench.status(&job).await["status"], "CANCELLED");
    }
    assert_eq!(bench.take("w2").await, None);
    assert_eq!(bench.status(&running).await["status"], "IN_PROGRESS");
    bench.done("w1", &running, json!({"output": 1})).await;
    assert_eq!(bench.health().await["workers"]["idle"], 2);
    // Endpoints know nothing of each other.
    let other = bench.client.get(format!("{}/v2/other/health", bench.server.base)).send().await.unwrap();
    assert_eq!(value(other).await["jobs"]["completed"], 0);
}

#[tokio::test]
async fn time_limits_end_jobs() {
    let short = Duration::from_millis(100);
    let bench = bench(EndpointOptions { run_retention: short, ..quick() }).await;
    // A result is kept for a while, then gone.
    let job = bench.run(json!(1)).await;
    bench.take("w").await.unwrap();
    bench.done("w", &job, json!({"output": 1})).await;
    while bench.get(&format!("status/{job}")).await.status() != 404 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // A ttl deletes a job in any state.
    let job = bench.run(json!(1)).await;
    bench.take("w").await.unwrap();
    bench.get(&format!("status/{job}?ttl=1")).await;
    while bench.get(&format!("status/{job}")).await.status() != 404 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(value(bench.get("job-stop/w").await).await, json!({"jobsToStop": [job]}));
}

#[tokio::test]
async fn webhooks_carry_the_whole_job_and_are_tried_three_times() {
    let bench = bench(EndpointOptions { webhook_pause: Duration::from_millis(10), ..quick() }).await;
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel::<Value>();
    let calls = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = calls.clone();
    let receiver = Router::new().route(
        "/hook",
        axum::routing::post(move |axum::Json(body): axum::Json<Value>| async move {
            tell.send(body).unwrap();
            // The first two tries of every three are refused.
            if count.fetch_add(1, std::sync::atomic::Ordering::SeqCst) % 3 < 2 { StatusCode::BAD_GATEWAY } else { StatusCode::OK }
        }),
    );
    let receiver = start(receiver).await;
    let hook = format!("{}/hook", receiver.base);
    let results = [(json!({"output": 1}), "COMPLETED"), (json!({"error": "no"}), "FAILED")];
    for (result, status) in results {
        let answer = value(bench.post("run", json!({"input": {"q": 1}, "webhook": hook})).await).await;
        let taken = bench.take("w").await.unwrap();
        assert_eq!(taken["webhook"], hook.as_str());
        bench.done("w", id(&answer), result).await;
        for _ in 0..3 {
            let body = told.recv().await.unwrap();
            assert_eq!((&body["id"], &body["status"]), (&answer["id"], &json!(status)));
            assert_eq!((&body["input"], &body["webhook"]), (&json!({"q": 1}), &json!(hook)));
            assert!(body["executionTime"].is_u64() && body["delayTime"].is_u64());
        }
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(calls.load(std::sync::atomic::Ordering::SeqCst), 6);
}
