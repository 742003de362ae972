//! Cancellation, shutdown, heartbeats, and a broken engine.

use super::*;
use crate::runpod::report_unhealthy;

/// Streams one piece and then nothing more, until it is dropped.
fn endless(dropped: &Arc<AtomicUsize>) -> Handler {
    let dropped = Arc::clone(dropped);
    streamer(move || {
        let guard = Dropped(Arc::clone(&dropped));
        let first = stream::iter([Ok(json!("data: 1\n\n"))]);
        first.chain(stream::pending()).inspect(move |_| _ = &guard).boxed()
    })
}

#[tokio::test]
async fn a_stopped_job_is_dropped_and_says_nothing() {
    let dropped = Arc::new(AtomicUsize::new(0));
    let running = Running::single(endless(&dropped)).await;
    running.give("a", json!({}));
    running.queue.wait(Route::Stream, 1).await;
    running.queue.script(Route::Stop, [ScriptedReply::Status(204), ScriptedReply::Json(json!({"jobsToStop": ["other", 5, null, "a"]}))]);
    // The only slot is free again.
    let takes = running.queue.wait(Route::Take, 2).await;
    assert!(takes[1].line.ends_with("&job_in_progress=0"), "{}", takes[1].line);
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    let queue = running.end().await;
    assert!(queue.lines(Route::Done).is_empty());
    assert_eq!(queue.lines(Route::Stop)[0], "GET /v2/ep/job-stop/pod1?gpu=RTX+A5000");
}

#[tokio::test]
async fn a_stop_reaches_a_job_whose_result_does_not_arrive() {
    let queue = Queue::start().await;
    let policy = RetryPolicy { result_window: Duration::from_secs(600), ..policy() };
    let running = Running::worker(&queue, Worker::new(&settings(&queue.base), 1, echo()).retry_policy(policy));
    queue.script(Route::Done, std::iter::repeat_n(ScriptedReply::Status(500), 10_000));
    running.give("a", json!(1));
    queue.wait(Route::Done, 3).await;
    queue.script(Route::Stop, [ScriptedReply::Json(json!({"jobsToStop": ["a"]}))]);
    queue.wait(Route::Take, 2).await;
    running.end().await;
}

#[tokio::test]
async fn the_stop_route_may_fail_or_be_missing() {
    let running = Running::single(echo()).await;
    running.queue.script(
        Route::Stop,
        [ScriptedReply::Status(500), ScriptedReply::Cut, ScriptedReply::Status(429), ScriptedReply::Text("{", "application/json")],
    );
    running.queue.script(Route::Stop, [ScriptedReply::Status(404)]);
    // The pause after 429 is set short, the one after 404 is not.
    running.queue.wait(Route::Stop, 5).await;
    running.give("a", json!(1));
    running.queue.wait(Route::Done, 1).await;
    assert_eq!(running.end().await.lines(Route::Stop).len(), 5);
}

#[tokio::test]
async fn a_shutdown_lets_running_jobs_end() {
    let (release, released) = tokio::sync::watch::channel(false);
    let mut running = Running::start(handler(move |_| {
        let mut released = released.clone();
        async move {
            let _ = released.wait_for(|&go| go).await;
            Ok(Reply::Whole(json!("late")))
        }
    }))
    .await;
    running.give("a", json!({}));
    running.queue.wait(Route::Take, 2).await;
    running.shut_down();
    // The poll that was pending brings nothing, and no new one begins.
    running.queue.script(Route::Take, [ScriptedReply::Status(204)]);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!running.task.is_finished());
    release.send(true).unwrap();
    assert_eq!(running.ended().await, Ended::Drained);
    assert_eq!(running.queue.seen(Route::Done)[0].json(), json!({"output": "late"}));
    assert_eq!(running.queue.lines(Route::Take).len(), 2);
}

#[tokio::test]
async fn a_job_that_comes_with_the_last_poll_is_run() {
    let queue = Queue::start().await;
    let policy = RetryPolicy { unknown_hold: Duration::from_secs(10), ..policy() };
    let mut running = Running::worker(&queue, Worker::new(&settings(&queue.base), 4, echo()).retry_policy(policy));
    queue.wait(Route::Take, 1).await;
    running.shut_down();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!running.task.is_finished(), "the poll is still open");
    running.give("last", json!(1));
    assert_eq!(running.ended().await, Ended::Drained);
    assert_eq!(queue.seen(Route::Done)[0].json(), json!({"output": {"echo": 1}}));
    assert_eq!(queue.lines(Route::Take).len(), 1);
}

#[tokio::test]
async fn the_last_poll_is_waited_for_as_long_as_polls_were_held() {
    let queue = Queue::start().await;
    let mut running = Running::worker(&queue, Worker::new(&settings(&queue.base), 4, echo()).retry_policy(policy()));
    queue.wait(Route::Take, 1).await;
    tokio::time::sleep(Duration::from_millis(800)).await;
    queue.script(Route::Take, [ScriptedReply::Status(204)]);
    queue.wait(Route::Take, 2).await;
    running.shut_down();
    // Far longer than the waits that the tests set, and within what this server was seen to hold.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!running.task.is_finished(), "the poll is still open");
    running.give("last", json!(1));
    assert_eq!(running.ended().await, Ended::Drained);
    assert_eq!(queue.seen(Route::Done)[0].json(), json!({"output": {"echo": 1}}));
    assert_eq!(queue.lines(Route::Take).len(), 2);
}

#[tokio::test]
async fn a_last_poll_that_never_ends_is_dropped() {
    // Nothing is known of this server, and the drain's own limit comes first; or one short poll was seen.
    for learned in [false, true] {
        let queue = Queue::start().await;
        let mut settings = settings(&queue.base);
        settings.drain_timeout = Duration::from_millis(if learned { 60_000 } else { 100 });
        let policy = RetryPolicy { unknown_hold: Duration::from_secs(60), ..policy() };
        let mut running = Running::worker(&queue, Worker::new(&settings, 4, echo()).retry_policy(policy));
        if learned {
            queue.script(Route::Take, [ScriptedReply::Status(204)]);
            queue.wait(Route::Take, 2).await;
        }
        queue.wait(Route::Take, 1).await;
        running.shut_down();
        // `ended` gives up long before a minute.
        assert_eq!(running.ended().await, Ended::Drained);
    }
}

#[tokio::test]
async fn what_is_unfinished_at_the_deadline_fails() {
    let dropped = Arc::new(AtomicUsize::new(0));
    let queue = Queue::start().await;
    let mut settings = settings(&queue.base);
    settings.drain_timeout = Duration::from_millis(30);
    let mut running = Running::worker(&queue, Worker::new(&settings, 4, endless(&dropped)).retry_policy(policy()));
    queue.script(Route::Take, [ScriptedReply::Json(json!([{"id": "a", "input": 1}, {"id": "b", "input": 2}]))]);
    queue.wait(Route::Stream, 2).await;
    running.shut_down();
    assert_eq!(running.ended().await, Ended::Drained);
    let done = queue.seen(Route::Done);
    assert_eq!(done.len(), 2);
    for seen in done {
        let error = envelope(&seen.json());
        assert_eq!((&error["status"], &error["code"]), (&json!(503), &json!("worker_shutdown")));
        assert!(seen.line.ends_with("&isStream=true"), "{}", seen.line);
    }
    assert_eq!(dropped.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hearts_beat_while_handlers_block_every_thread() {
    let queue = Queue::start_on_own_runtime();
    let mut settings = settings(&queue.base);
    settings.ping = Some(format!("{}/ping/$RUNPOD_POD_ID?gpu=RTX+A5000", queue.base));
    settings.ping_interval = Duration::from_millis(5);
    settings.reported_version = Some("1.2.3".into());
    let beats = queue.clone();
    let blocking = handler(move |_| {
        let beats = beats.clone();
        async move {
            // Blocks its thread until five pings have named both jobs.
            let named = || beats.lines(Route::Ping).iter().filter(|line| line.contains("job_id=a%2Cb&")).count();
            let start = std::time::Instant::now();
            while named() < 5 && start.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(Reply::Whole(json!(named() >= 5)))
        }
    });
    let running = Running::worker(&queue, Worker::new(&settings, 4, blocking).retry_policy(policy()));
    queue.wait(Route::Ping, 2).await;
    queue.script(Route::Ping, [ScriptedReply::Status(500), ScriptedReply::Cut, ScriptedReply::Status(404)]);
    queue.script(Route::Take, [ScriptedReply::Json(json!([{"id": "a", "input": 1}, {"id": "b", "input": 2}]))]);
    let done = queue.wait(Route::Done, 2).await;
    running.end().await;
    assert_eq!(queue.lines(Route::Ping)[0], "GET /v2/ep/ping/pod1?gpu=RTX+A5000&runpod_version=1.2.3");
    assert!(queue.lines(Route::Ping).contains(&"GET /v2/ep/ping/pod1?gpu=RTX+A5000&job_id=a%2Cb&runpod_version=1.2.3".to_owned()));
    assert_eq!(queue.seen(Route::Ping)[0].header("authorization"), "key-1");
    assert!(done.iter().all(|seen| seen.json() == json!({"output": true})), "{done:?}");
}

#[tokio::test]
async fn no_key_no_ping() {
    let queue = Queue::start().await;
    let mut settings = settings(&queue.base);
    settings.ping = Some(format!("{}/ping/$RUNPOD_POD_ID", queue.base));
    settings.api_key = None;
    let running = Running::worker(&queue, Worker::new(&settings, 1, echo()).retry_policy(policy()));
    running.give("a", json!(1));
    queue.wait(Route::Done, 1).await;
    assert!(running.end().await.lines(Route::Ping).is_empty());
}

#[tokio::test]
async fn an_unhealthy_worker_says_why() {
    let queue = Queue::start().await;
    let mut settings = settings(&queue.base);
    settings.ping = Some(format!("{}/ping/$RUNPOD_POD_ID", queue.base));
    settings.reported_version = Some("1.2.3".into());
    report_unhealthy(&settings, "model", &format!("no weights: {}", "x".repeat(300))).await;
    let expected =
        format!("GET /v2/ep/ping/pod1?status=unhealthy&check=model&reason=no%20weights%3A%20{}&runpod_version=1.2.3", "x".repeat(244));
    assert_eq!(queue.lines(Route::Ping), [expected]);
}

#[tokio::test]
async fn a_broken_engine_ends_the_worker_and_asks_for_another() {
    let queue = Queue::start().await;
    let mut settings = settings(&queue.base);
    settings.ping = Some(format!("{}/ping/$RUNPOD_POD_ID", queue.base));
    let (broken, faults) = tokio::sync::watch::channel(None);
    let failing = handler(move |job| {
        let gone = Failure::internal("the device is gone");
        if job.id == "device" {
            broken.send_replace(Some(gone.clone()));
        }
        async move {
            match job.id.as_str() {
                "client" => Err(Failure::bad_request("x", "the caller's fault")),
                _ => Err(gone),
            }
        }
    });
    let worker = Worker::new(&settings, 1, failing).retry_policy(policy()).health(faults.into());
    let mut running = Running::worker(&queue, worker);
    running.give("client", json!({}));
    running.give("device", json!({}));
    running.give("never", json!({}));
    assert_eq!(running.ended().await, Ended::Unhealthy);
    let done: Vec<Value> = queue.seen(Route::Done).iter().map(|seen| seen.json()).collect();
    assert_eq!(done.len(), 2);
    assert_eq!((done[0].get("stopPod"), done[1].get("stopPod")), (None, Some(&json!(true))));
    assert_eq!(envelope(&done[1])["status"], 500);
    let pings = queue.lines(Route::Ping);
    let unhealthy = pings.iter().filter(|line| line.contains("status=unhealthy&check=engine&reason=the%20device%20is%20gone"));
    assert_eq!(unhealthy.count(), 1, "{pings:?}");
}

#[tokio::test]
async fn a_job_that_comes_to_a_broken_engine_fails_with_the_reason() {
    let queue = Queue::start().await;
    let (broken, faults) = tokio::sync::watch::channel(None);
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let counting = handler(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
        async { Ok(Reply::Whole(json!(1))) }
    });
    let policy = RetryPolicy { unknown_hold: Duration::from_secs(10), ..policy() };
    let worker = Worker::new(&settings(&queue.base), 4, counting).retry_policy(policy).health(faults.into());
    let mut running = Running::worker(&queue, worker);
    queue.wait(Route::Take, 1).await;
    // Nobody holds a job: the worker hears of it all the same.
    broken.send_replace(Some(Failure::internal("the device is gone")));
    tokio::time::sleep(Duration::from_millis(50)).await;
    running.give("late", json!(1));
    assert_eq!(running.ended().await, Ended::Unhealthy);
    let done = queue.seen(Route::Done);
    assert_eq!((done.len(), runs.load(Ordering::SeqCst)), (1, 0), "answered, and not run");
    let body = done[0].json();
    assert_eq!((&envelope(&body)["message"], &body["stopPod"]), (&json!("the device is gone"), &json!(true)));
    assert_eq!(queue.lines(Route::Take).len(), 1, "no other poll begins");
}

#[tokio::test]
async fn a_broken_engine_whose_poll_and_job_never_end_ends_all_the_same() {
    let queue = Queue::start().await;
    let (broken, faults) = tokio::sync::watch::channel(None);
    let policy = RetryPolicy { unknown_hold: Duration::from_secs(60), broken_drain: Duration::from_millis(100), ..policy() };
    let worker = Worker::new(&settings(&queue.base), 4, handler(|_| std::future::pending())).retry_policy(policy).health(faults.into());
    let mut running = Running::worker(&queue, worker);
    running.give("stuck", json!(1));
    queue.wait(Route::Take, 2).await;
    broken.send_replace(Some(Failure::internal("the device is gone")));
    assert_eq!(running.ended().await, Ended::Unhealthy);
    assert_eq!(envelope(&queue.seen(Route::Done)[0].json())["message"], "the device is gone");
}
