//! How jobs are taken: request lines, every kind of answer, entries that are no jobs.

use super::*;

#[tokio::test]
async fn requests_are_the_protocols() {
    let mut running = Running::start(echo()).await;
    running.queue.wait(Route::Take, 1).await;
    running.give("a/1-u1", json!({"text": "é"}));
    let done = running.queue.wait(Route::Done, 1).await;
    running.shut_down();
    running.ended().await;

    let take = &running.queue.seen(Route::Take)[0];
    assert_eq!(take.line, "GET /v2/ep/job-take-batch/pod1?gpu=RTX+A5000&batch_size=4&job_in_progress=0");
    assert_eq!(take.header("content-type"), "application/json");
    assert_eq!(take.header("authorization"), "key-1");
    assert!(take.header("accept-encoding").contains("gzip"));
    let agent = take.header("user-agent");
    assert!(agent.starts_with("worker-candle/") && agent.contains(" (") && agent.contains(") Language/Rust "), "{agent}");

    assert_eq!(done[0].line, "POST /v2/ep/job-done/pod1/a%2F1-u1?gpu=RTX+A5000&isStream=false");
    assert_eq!(done[0].header("content-type"), "application/x-www-form-urlencoded");
    assert_eq!(done[0].header("charset"), "utf-8");
    assert_eq!(done[0].header("authorization"), "key-1");
    assert_eq!(done[0].header("x-request-id"), "a/1-u1");
    assert_eq!(done[0].body, r#"{"output":{"echo":{"text":"é"}}}"#);
}

#[tokio::test]
async fn one_slot_takes_singly_and_knows_when_it_is_busy() {
    let release = Arc::new(tokio::sync::Notify::new());
    let wait = Arc::clone(&release);
    let waiting = handler(move |_| {
        let wait = Arc::clone(&wait);
        async move {
            wait.notified().await;
            Ok(Reply::Whole(Value::Null))
        }
    });
    let queue = Queue::start().await;
    let running = Running::worker(&queue, Worker::new(&settings(&queue.base), 2, waiting).retry_policy(policy()));
    running.give("a", json!({}));
    queue.wait(Route::Take, 2).await;
    running.give("b", json!({}));
    release.notify_one();
    release.notify_one();
    queue.wait(Route::Done, 1).await;
    queue.wait(Route::Take, 3).await;
    let lines = running.end().await.lines(Route::Take);
    assert_eq!(lines[0], "GET /v2/ep/job-take-batch/pod1?gpu=RTX+A5000&batch_size=2&job_in_progress=0");
    assert_eq!(lines[1], "GET /v2/ep/job-take/pod1?gpu=RTX+A5000&job_in_progress=1");
}

#[tokio::test]
async fn a_full_worker_takes_nothing() {
    let running = Running::single(handler(|_| std::future::pending())).await;
    running.give("a", json!({}));
    running.give("b", json!({}));
    running.queue.wait(Route::Take, 1).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(running.queue.lines(Route::Take).len(), 1, "the slot is taken");
    running.queue.script(Route::Stop, [ScriptedReply::Json(json!({"jobsToStop": ["a"]}))]);
    running.queue.wait(Route::Take, 2).await;
}

#[tokio::test]
async fn survives_every_answer_without_a_job() {
    let running = Running::single(echo()).await;
    let answers = [
        ScriptedReply::Status(204),
        ScriptedReply::Status(400),
        ScriptedReply::Status(429),
        ScriptedReply::Status(401),
        ScriptedReply::Status(403),
        ScriptedReply::Status(404),
        ScriptedReply::Status(500),
        ScriptedReply::Status(502),
        ScriptedReply::Cut,
        ScriptedReply::Cut,
        ScriptedReply::Text("", "application/json"),
        ScriptedReply::Text("{", "application/json"),
        ScriptedReply::Text("null", "application/json"),
        ScriptedReply::Text("7", "application/json"),
        ScriptedReply::Text(r#"{"id":"html","input":1}"#, "text/html"),
        ScriptedReply::Json(json!([])),
        ScriptedReply::Json(json!({"input": 1})),
        ScriptedReply::Json(json!({"status": "ok"})),
    ];
    let count = answers.len();
    running.queue.script(Route::Take, answers);
    running.give("after", json!(1));
    let done = running.queue.wait(Route::Done, 1).await;
    assert_eq!(done[0].json(), json!({"output": {"echo": 1}}));
    running.queue.wait(Route::Take, count + 2).await;
    let queue = running.end().await;
    assert_eq!(queue.lines(Route::Take).len(), count + 2, "one take for each answer, none beside another");
    assert_eq!(queue.lines(Route::Done).len(), 1);
}

#[tokio::test]
async fn takes_a_held_poll_again_after_its_deadline() {
    let queue = Queue::start().await;
    let policy = RetryPolicy { poll_timeout: Duration::from_millis(30), ..policy() };
    let running = Running::worker(&queue, Worker::new(&settings(&queue.base), 1, echo()).retry_policy(policy));
    queue.wait(Route::Take, 3).await;
    running.end().await;
}

#[tokio::test]
async fn a_list_is_validated_entry_by_entry() {
    let running = Running::start(echo()).await;
    let list = json!([
        {"id": 17, "input": {"n": 1}, "error": "", "retries": 2},
        {"id": "no-input", "status": "IN_QUEUE"},
        {"input": {"n": 3}},
        "nonsense",
        {"id": "b", "input": null},
    ]);
    running.queue.script(Route::Take, [ScriptedReply::Json(list)]);
    let mut done = running.queue.wait(Route::Done, 3).await;
    done.sort_by_key(|seen| seen.line.clone());
    assert_eq!(running.end().await.lines(Route::Done).len(), 3);
    let of = |id: &str| done.iter().find(|seen| seen.line.contains(&format!("/pod1/{id}?"))).unwrap().json();
    assert_eq!(of("17"), json!({"output": {"echo": {"n": 1}}}));
    assert_eq!(of("b"), json!({"output": {"echo": null}}));
    let error = envelope(&of("no-input"));
    assert_eq!((&error["status"], &error["param"]), (&json!(400), &json!("input")));
}

#[tokio::test]
async fn a_job_that_cannot_be_read_is_answered_and_spares_its_neighbours() {
    let running = Running::start(echo()).await;
    // Half of a surrogate pair: JSON, and not text.
    let list = r#"[{"id":"a","input":{"text":"\ud83d"}},{"id":"b","input":1}]"#;
    running.queue.script(Route::Take, [ScriptedReply::Text(list, "application/json")]);
    let mut done = running.queue.wait(Route::Done, 2).await;
    done.sort_by_key(|seen| seen.line.clone());
    running.end().await;
    assert_eq!(envelope(&done[0].json())["status"], 400);
    assert_eq!(done[1].json(), json!({"output": {"echo": 1}}));
}

#[tokio::test]
async fn a_refused_worker_does_not_blame_the_batch_route() {
    let running = Running::start(echo()).await;
    running.queue.script(Route::Take, [ScriptedReply::Status(401), ScriptedReply::Status(403), ScriptedReply::Status(204)]);
    running.queue.wait(Route::Take, 4).await;
    let lines = running.end().await.lines(Route::Take);
    assert!(lines.iter().all(|line| line.contains("/job-take-batch/")), "{lines:?}");
}

#[tokio::test]
async fn without_a_batch_route_jobs_are_taken_singly() {
    for status in [404, 500] {
        let running = Running::start(echo()).await;
        running.queue.script(Route::Take, [ScriptedReply::Status(status), ScriptedReply::Json(json!({"id": "a", "input": 1}))]);
        running.queue.wait(Route::Take, 3).await;
        let queue = running.end().await;
        let paths: Vec<String> = queue.lines(Route::Take).iter().map(|line| line.split('?').next().unwrap().to_owned()).collect();
        assert_eq!(paths, ["GET /v2/ep/job-take-batch/pod1", "GET /v2/ep/job-take/pod1", "GET /v2/ep/job-take/pod1"], "{status}");
    }
}

#[tokio::test]
async fn a_running_job_is_not_run_twice_and_an_ended_one_may_come_again() {
    let runs = Arc::new(AtomicUsize::new(0));
    let (release, released) = tokio::sync::watch::channel(false);
    let counter = Arc::clone(&runs);
    let running = Running::start(handler(move |_| {
        let run = counter.fetch_add(1, Ordering::SeqCst);
        let mut released = released.clone();
        async move {
            let _ = released.wait_for(|&go| go).await;
            Ok(Reply::Whole(json!(run)))
        }
    }))
    .await;
    running.give("a", json!({}));
    let twice = json!([{"id": "a", "input": {}}, {"id": "a", "input": {}}]);
    running.queue.script(Route::Take, [ScriptedReply::Json(twice)]);
    running.queue.wait(Route::Take, 3).await;
    release.send(true).unwrap();
    running.queue.wait(Route::Done, 1).await;
    running.queue.wait(Route::Take, 3).await;
    // The slot is free some moment after the result has come.
    tokio::time::sleep(Duration::from_millis(50)).await;
    running.give("a", json!({}));
    running.queue.wait(Route::Done, 2).await;
    let done: Vec<Value> = running.end().await.seen(Route::Done).iter().map(|seen| seen.json()).collect();
    assert_eq!(done, [json!({"output": 0}), json!({"output": 1})]);
    assert_eq!(runs.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn settings_that_cannot_work_are_refused_by_name() {
    let run = |settings: RunpodSettings| async move { Worker::new(&settings, 1, echo()).run(std::future::pending()).await.unwrap_err() };
    assert!(run(RunpodSettings::default()).await.contains("RUNPOD_WEBHOOK_GET_JOB"));
    let mut no_output = settings("http://127.0.0.1:9/v2/ep");
    no_output.post_output = None;
    assert!(run(no_output).await.contains("RUNPOD_WEBHOOK_POST_OUTPUT"));
    let mut bad_key = settings("http://127.0.0.1:9/v2/ep");
    bad_key.api_key = Some(SecretString::from("line\nbreak"));
    let error = run(bad_key).await;
    assert!(error.contains("RUNPOD_AI_API_KEY") && !error.contains("line\nbreak"), "{error}");
}

/// What the platform's test harness sets: no query in the take address, no key, no stream, no ping; and few of the routes.
#[tokio::test]
async fn the_test_harness_is_enough() {
    let queue = Queue::start().await;
    let settings = RunpodSettings {
        get_job: Some(format!("{}/job-take/$RUNPOD_POD_ID", queue.base)),
        post_output: Some(format!("{}/job-done/$RUNPOD_POD_ID/$ID?gpu=$RUNPOD_GPU_TYPE_ID", queue.base)),
        gpu_type_id: Some("NVIDIA L4".into()),
        ..Default::default()
    };
    let pieces = streamer(|| stream::iter([Ok(json!({"n": 1}))]).boxed());
    let running = Running::worker(&queue, Worker::new(&settings, 8, pieces).retry_policy(policy()));
    queue.script(Route::Stop, [ScriptedReply::Status(404)]);
    queue.script(Route::Take, [ScriptedReply::Status(404), ScriptedReply::Status(500), ScriptedReply::Status(204)]);
    running.give("a", json!({}));
    let done = queue.wait(Route::Done, 1).await;
    running.end().await;
    assert_eq!(done[0].json(), json!({"output": [{"n": 1}]}));
    let worker = done[0].line.split('/').nth(4).unwrap();
    assert!(uuid::Uuid::parse_str(worker).is_ok(), "{worker}");
    assert_eq!(done[0].line, format!("POST /v2/ep/job-done/{worker}/a?gpu=NVIDIA%20L4&isStream=true"));
    assert_eq!(queue.lines(Route::Take)[1], format!("GET /v2/ep/job-take/{worker}?job_in_progress=0"));
    assert!(queue.lines(Route::Stream).is_empty() && queue.lines(Route::Ping).is_empty());
}
