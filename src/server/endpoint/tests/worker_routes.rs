//! What workers ask and post: takes, stops, results, pings.

use super::*;

#[tokio::test]
async fn takes_are_held_then_answered_with_nothing() {
    let bench = Arc::new(bench(EndpointOptions { hold: Duration::from_secs(30), ..quick() }).await);
    let held = bench.clone();
    let waiting = tokio::spawn(async move { held.take("w").await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    let job = bench.run(json!(1)).await;
    assert_eq!(id(&waiting.await.unwrap().unwrap()), job);

    let held = bench.clone();
    let waiting = tokio::spawn(async move { held.take("w").await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    bench.endpoints.close();
    assert_eq!(waiting.await.unwrap(), None, "a server that stops holds nobody");
    assert_eq!(bench.post("run", json!({"input": 1})).await.status(), 503);

    let bench = self::bench(quick()).await;
    assert_eq!(bench.take("w").await, None);
    assert_eq!(bench.get("job-take-batch/w?batch_size=3").await.status(), 204);
    assert_eq!(bench.get("job-stop/w").await.status(), 204);
}

#[tokio::test]
async fn a_batch_takes_what_is_there_in_order() {
    let bench = bench(quick()).await;
    let mut jobs = Vec::new();
    for n in 0..3 {
        jobs.push(bench.run(json!(n)).await);
    }
    let batch = value(bench.get("job-take-batch/w?gpu=x&batch_size=2&job_in_progress=0").await).await;
    assert_eq!(batch, json!([{"id": jobs[0], "input": 0}, {"id": jobs[1], "input": 1}]));
    let batch = value(bench.get("job-take-batch/w?batch_size=5").await).await;
    assert_eq!(batch, json!([{"id": jobs[2], "input": 2}]));
    assert_eq!(bench.get("job-take-batch/w?batch_size=0").await.status(), 400);
    // The SDK on a template without a query: the parameter is part of the segment.
    let job = bench.run(json!(9)).await;
    assert_eq!(value(bench.get("job-take/$RUNPOD_POD_ID&job_in_progress=0").await).await["id"], job.as_str());
    assert_eq!(bench.status(&job).await["workerId"], "$RUNPOD_POD_ID");
    bench.done("pod", &format!("{job}&isStream=false"), json!({"output": 9})).await;
    assert_eq!(bench.status(&job).await["status"], "COMPLETED");
}

#[tokio::test]
async fn a_worker_that_hangs_up_while_it_waits_loses_no_job() {
    let bench = bench(EndpointOptions { hold: Duration::from_secs(30), ..quick() }).await;
    for _ in 0..5 {
        let mut socket = TcpStream::connect(bench.server.address).await.unwrap();
        socket.write_all(b"GET /v2/ep/job-take/gone HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(socket);
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    let job = bench.run(json!(1)).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(bench.status(&job).await["status"], "IN_QUEUE");
    assert_eq!(id(&bench.take("w").await.unwrap()), job);
}

#[tokio::test]
async fn a_worker_that_stops_pinging_loses_its_job_to_another() {
    let bench = bench(EndpointOptions { lost_after: Duration::from_millis(150), ..quick() }).await;
    let first = bench.run(json!(1)).await;
    let second = bench.run(json!(2)).await;
    bench.get("ping/w1").await;
    bench.take("w1").await.unwrap();
    bench.take("w1").await.unwrap();
    bench.chunk("w1", &first, json!("half")).await;
    bench.run(json!(3)).await;
    bench.await_status(&second, "IN_QUEUE").await;
    let status = bench.await_status(&first, "IN_QUEUE").await;
    assert_eq!(status["retries"], 1);
    // At the head of the queue, in their order, without what the lost worker had streamed.
    assert_eq!(id(&bench.take("w2").await.unwrap()), first);
    assert_eq!(id(&bench.take("w2").await.unwrap()), second);
    assert_eq!(value(bench.get(&format!("stream/{first}")).await).await["stream"], json!([]));
    // The lost worker comes back: nothing it says counts, and it is told to stop.
    assert_eq!(bench.done("w1", &first, json!({"output": "old"})).await.status(), 200);
    bench.chunk("w1", &first, json!("old")).await;
    assert_eq!(bench.status(&first).await["status"], "IN_PROGRESS");
    bench.get(&format!("ping/w1?job_id={first}")).await;
    assert_eq!(value(bench.get("job-stop/w1").await).await, json!({"jobsToStop": [first]}));
    bench.done("w2", &first, json!({"output": "new"})).await;
    bench.done("w2", &first, json!({"output": "again"})).await;
    assert_eq!(bench.status(&first).await["output"], "new");
    assert_eq!(bench.health().await["jobs"]["completed"], 1);
}

#[tokio::test]
async fn a_worker_that_pings_keeps_its_long_job() {
    let bench = bench(EndpointOptions { lost_after: Duration::from_millis(400), silent_after: Duration::from_secs(600), ..quick() }).await;
    let job = bench.run(json!(1)).await;
    bench.take("w").await.unwrap();
    for _ in 0..20 {
        bench.get(&format!("ping/w?job_id={job}&runpod_version=1")).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(bench.status(&job).await["status"], "IN_PROGRESS");
    // So does one that never pinged: it cannot be heard while it works.
    let quiet = bench.run(json!(2)).await;
    bench.take("quiet").await.unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(bench.status(&quiet).await["status"], "IN_PROGRESS");
}

#[tokio::test]
async fn a_job_that_never_reached_its_worker_is_given_out_again() {
    let bench = bench(EndpointOptions { lost_after: Duration::from_millis(150), ..quick() }).await;
    let kept = bench.run(json!(1)).await;
    bench.take("w").await.unwrap();
    bench.get(&format!("ping/w?job_id={kept}")).await;
    // This answer gets lost on the way: the worker pings on, and does not name the job.
    let lost = bench.run(json!(2)).await;
    bench.take("w").await.unwrap();
    loop {
        bench.get(&format!("ping/w?job_id={kept}")).await;
        if bench.status(&lost).await["status"] == "IN_QUEUE" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(bench.status(&kept).await["status"], "IN_PROGRESS");
}

#[tokio::test]
async fn a_worker_that_was_killed_and_comes_back_under_its_name_gets_its_job_again() {
    let bench = bench(EndpointOptions { arrival: Duration::from_millis(100), ..quick() }).await;
    let job = bench.run(json!(1)).await;
    bench.take("w").await.unwrap();
    bench.get("ping/w").await;
    // It may ask again before it knows what it was given, and a worker that runs several jobs asks while it holds some.
    assert_eq!(bench.take("w").await, None);
    tokio::time::sleep(Duration::from_millis(150)).await;
    for path in [
        "job-take/w?job_in_progress=1",
        "job-take-batch/w?batch_size=2&job_in_progress=1",
        "job-take/w",
        "job-take/other?job_in_progress=0",
    ] {
        assert_eq!(bench.get(path).await.status(), 204, "{path}");
    }
    assert_eq!(bench.status(&job).await["status"], "IN_PROGRESS");
    // The new process holds nothing.
    assert_eq!(id(&bench.take("w").await.unwrap()), job);
    assert_eq!(bench.status(&job).await["retries"], 1);
    assert_eq!(bench.done("w", &job, json!({"output": "second"})).await.status(), 200);
    assert_eq!(bench.status(&job).await["output"], "second");
}

#[tokio::test]
async fn inputs_reach_workers_as_they_were_written_and_large_ones_are_not_kept() {
    let bench = bench(quick()).await;
    let body =
        r#"{"policy": {"ttl": 100000}, "input": {"n": 1.50, "text": "\u00e9", "deep": [[1e2]]}, "s3Config": {"a": [1]}, "webhook": ""}"#;
    let answer = value(bench.client.post(bench.url("run")).body(body).send().await.unwrap()).await;
    let text = bench.get("job-take/w?job_in_progress=0").await.text().await.unwrap();
    let expected = r#""input":{"n": 1.50, "text": "\u00e9", "deep": [[1e2]]},"s3Config":{"a": [1]}}"#;
    assert_eq!(text, format!(r#"{{"id":"{}",{expected}"#, answer["id"].as_str().unwrap()));

    let job = value(bench.post("runsync?wait=1000", json!({"input": "x".repeat(11 << 20)})).await).await;
    let job = id(&job).to_owned();
    assert_eq!(id(&bench.take("w").await.unwrap()), job);
    bench.done("w", &job, json!({"error": "no"})).await;
    let refused = bench.post(&format!("retry/{job}"), json!({})).await;
    assert_eq!(refused.status(), 400);
    assert!(refused.text().await.unwrap().contains("too large to be kept"));
}

#[tokio::test]
async fn a_job_that_costs_worker_after_worker_is_given_up() {
    let bench = bench(EndpointOptions { lost_after: Duration::from_millis(80), max_losses: 1, ..quick() }).await;
    let job = bench.run(json!(1)).await;
    for worker in ["w1", "w2"] {
        bench.get(&format!("ping/{worker}")).await;
        assert_eq!(id(&bench.await_job(worker).await), job);
    }
    let status = bench.await_status(&job, "FAILED").await;
    assert!(status["error"].as_str().unwrap().contains("w2"));
}
