//! How results are returned: outcomes, retries, sizes.

use super::*;

async fn one_job(handler: Handler) -> (Vec<Value>, Queue) {
    let running = Running::start(handler).await;
    running.give("a", json!({}));
    running.queue.wait(Route::Done, 1).await;
    let queue = running.end().await;
    (queue.seen(Route::Done).iter().map(|seen| seen.json()).collect(), queue)
}

#[tokio::test]
async fn a_failure_is_an_error_string_with_the_envelope() {
    let (done, queue) = one_job(handler(|_| async { Err(Failure::bad_request("messages", "must not be empty")) })).await;
    assert_eq!(done.len(), 1);
    let expected =
        json!({"message": "must not be empty", "type": "invalid_request_error", "param": "messages", "code": null, "status": 400});
    assert_eq!(envelope(&done[0]), expected);
    assert!(queue.lines(Route::Done)[0].ends_with("&isStream=false"));
}

#[tokio::test]
async fn a_panic_is_an_error_and_the_worker_goes_on() {
    let panics: [(Handler, &str); 3] = [
        (Arc::new(|_| std::panic::resume_unwind(Box::new("sync"))), "false"),
        (handler(|_| async { std::panic::resume_unwind(Box::new("async")) }), "false"),
        (streamer(|| stream::poll_fn(|_| std::panic::resume_unwind(Box::new("in the stream"))).boxed()), "true"),
    ];
    for (panicking, is_stream) in panics {
        let running = Running::single(panicking).await;
        running.give("a", json!({}));
        running.give("b", json!({}));
        running.queue.wait(Route::Done, 2).await;
        let queue = running.end().await;
        for seen in queue.seen(Route::Done) {
            assert_eq!(envelope(&seen.json())["status"], 500);
            assert!(seen.line.ends_with(&format!("&isStream={is_stream}")), "{}", seen.line);
        }
        assert_eq!(queue.lines(Route::Done).len(), 2);
    }
}

#[tokio::test]
async fn a_cancelled_job_posts_nothing() {
    let running = Running::single(handler(|job| async move {
        match job.id.as_str() {
            "a" => Err(Failure::new(crate::error::Kind::Cancelled, "gone")),
            _ => Ok(Reply::Whole(json!(1))),
        }
    }))
    .await;
    running.give("a", json!({}));
    running.give("b", json!({}));
    running.queue.wait(Route::Done, 1).await;
    let lines = running.end().await.lines(Route::Done);
    assert_eq!(lines, ["POST /v2/ep/job-done/pod1/b?gpu=RTX+A5000&isStream=false"]);
}

#[tokio::test]
async fn a_result_is_posted_until_it_arrives() {
    let running = Running::start(echo()).await;
    let troubles = [
        ScriptedReply::Status(500),
        ScriptedReply::Cut,
        ScriptedReply::Status(429),
        ScriptedReply::Status(408),
        ScriptedReply::Status(425),
        ScriptedReply::Status(503),
    ];
    running.queue.script(Route::Done, troubles);
    running.give("a", json!(1));
    let done = running.queue.wait(Route::Done, 7).await;
    assert_eq!(running.end().await.lines(Route::Done).len(), 7);
    assert!(done.iter().all(|seen| seen.line == done[0].line && seen.body == r#"{"output":{"echo":1}}"#));
}

#[tokio::test]
async fn a_result_that_never_arrives_is_given_up_and_frees_its_slot() {
    let running = Running::single(echo()).await;
    running.queue.script(Route::Done, std::iter::repeat_n(ScriptedReply::Status(500), 30));
    running.give("a", json!(1));
    running.queue.wait(Route::Take, 2).await;
    let attempts = running.queue.lines(Route::Done).len();
    // Pauses of 2, 4, 8, 10, 10 … ms and up to a quarter more add up to 60 ms after 7 or 8 of them.
    assert!((8..=9).contains(&attempts), "{attempts}");
    running.end().await;
}

#[tokio::test]
async fn a_refused_result_is_not_repeated() {
    let running = Running::single(echo()).await;
    running.queue.script(Route::Done, [ScriptedReply::Status(404)]);
    running.give("a", json!(1));
    running.give("b", json!(2));
    running.queue.wait(Route::Done, 2).await;
    let lines = running.end().await.lines(Route::Done);
    assert!(lines.len() == 2 && lines[1].contains("/b?"), "{lines:?}");
}

#[tokio::test]
async fn a_large_result_that_is_refused_becomes_a_small_error() {
    for status in [400, 413] {
        let running = Running::start(handler(|_| async { Ok(Reply::Whole(json!("x".repeat(400_000)))) })).await;
        running.queue.script(Route::Done, [ScriptedReply::Status(status)]);
        running.give("a", json!({}));
        let done = running.queue.wait(Route::Done, 2).await;
        running.end().await;
        let error = envelope(&done[1].json());
        assert_eq!(error["code"], "result_too_large");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("400013 bytes") && message.contains(&status.to_string()), "{message}");
        assert!(done[1].body.len() < 1000);
    }
}

#[tokio::test]
async fn a_result_over_the_limit_is_not_even_tried() {
    let queue = Queue::start().await;
    let policy = RetryPolicy { result_limit: 1000, ..policy() };
    let large = handler(|_| async { Ok(Reply::Whole(json!("x".repeat(1000)))) });
    let running = Running::worker(&queue, Worker::new(&settings(&queue.base), 1, large).retry_policy(policy));
    running.give("a", json!({}));
    let done = queue.wait(Route::Done, 1).await;
    running.end().await;
    let message = envelope(&done[0].json())["message"].as_str().unwrap().to_owned();
    assert!(message.contains("1013 bytes") && message.contains("at most 1000"), "{message}");
}

#[tokio::test]
async fn without_a_key_jobs_are_still_done() {
    let queue = Queue::start().await;
    let mut settings = settings(&queue.base);
    settings.api_key = None;
    let running = Running::worker(&queue, Worker::new(&settings, 1, echo()).retry_policy(policy()));
    running.give("a", json!(1));
    assert_eq!(queue.wait(Route::Done, 1).await[0].headers.get("authorization"), None);
    running.end().await;
}
