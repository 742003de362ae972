//! How pieces are posted: order, coalescing, splitting, and what the final result then holds.

use super::*;
use crate::config::BatchGrowth;

/// The engine's way: everything that was generated since the last pull is one piece.
fn pulled(receiver: mpsc::UnboundedReceiver<String>) -> Pieces {
    stream::unfold(receiver, |mut receiver| async {
        let mut piece = receiver.recv().await?;
        while let Ok(more) = receiver.try_recv() {
            piece.push_str(&more);
        }
        Some((Ok(json!(piece)), receiver))
    })
    .boxed()
}

fn frame(n: usize) -> String {
    format!("data: {{\"n\":{n}}}\n\n")
}

fn values(values: Vec<Result<Value, Failure>>) -> Handler {
    streamer(move || stream::iter(values.clone()).boxed())
}

async fn stream_job(handler: Handler) -> (Queue, Value) {
    let running = Running::start(handler).await;
    running.give("a", json!({}));
    let done = running.queue.wait(Route::Done, 1).await;
    (running.end().await, done[0].json())
}

#[tokio::test]
async fn pieces_wait_behind_a_slow_post_and_then_go_together() {
    let (sender, receiver) = mpsc::unbounded_channel();
    let receiver = std::sync::Mutex::new(Some(receiver));
    let running = Running::start(streamer(move || pulled(receiver.lock().unwrap().take().unwrap()))).await;
    let gate = Arc::new(tokio::sync::Notify::new());
    running.queue.script(Route::Stream, [ScriptedReply::Gate(Arc::clone(&gate))]);
    running.give("a/1", json!({}));

    sender.send(frame(0)).unwrap();
    running.queue.wait(Route::Stream, 1).await;
    for n in 1..50 {
        sender.send(frame(n)).unwrap();
    }
    sender.send("data: [DONE]\n\n".into()).unwrap();
    drop(sender);
    gate.notify_one();
    let done = running.queue.wait(Route::Done, 1).await;
    let queue = running.end().await;

    let posts = queue.seen(Route::Stream);
    assert_eq!(posts[0].line, "POST /v2/ep/job-stream/pod1/a%2F1?gpu=RTX+A5000&isStream=false");
    assert_eq!(posts[0].header("x-request-id"), "a/1");
    assert_eq!(posts[0].header("content-type"), "application/x-www-form-urlencoded");
    let outputs = outputs(&queue).await;
    let rest: String = (1..50).map(frame).collect();
    assert_eq!(outputs, [json!(frame(0)), json!(rest + "data: [DONE]\n\n")]);
    assert_eq!(done[0].line, "POST /v2/ep/job-done/pod1/a%2F1?gpu=RTX+A5000&isStream=true");
    assert_eq!(done[0].json(), json!({"output": outputs}));
    assert_eq!(
        queue.order().iter().rposition(|&route| route == Route::Stream),
        queue.order().iter().position(|&route| route == Route::Done).map(|at| at - 1)
    );
}

#[tokio::test]
async fn strings_that_are_ready_are_joined_and_objects_go_alone() {
    let pieces = vec![Ok(json!("a")), Ok(json!("b")), Ok(json!({"n": 1})), Ok(json!({"n": 2})), Ok(json!("c"))];
    let (queue, done) = stream_job(values(pieces)).await;
    let expected = json!(["ab", {"n": 1}, {"n": 2}, "c"]);
    assert_eq!(json!(outputs(&queue).await), expected);
    assert_eq!(done, json!({"output": expected}));
}

#[tokio::test]
async fn batches_grow_when_asked_to() {
    let queue = Queue::start().await;
    let mut settings = settings(&queue.base);
    settings.batch = Some(BatchGrowth { min: 1, growth: 2.0, max: 4 });
    // One at a time, and never two ready: the worker must wait for the rest of a batch.
    let slow = streamer(|| {
        let frames = stream::iter((0..10).map(frame));
        frames
            .then(|frame| async move {
                tokio::task::yield_now().await;
                Ok(json!(frame))
            })
            .boxed()
    });
    let running = Running::worker(&queue, Worker::new(&settings, 1, slow).retry_policy(policy()));
    running.give("a", json!({}));
    queue.wait(Route::Done, 1).await;
    running.end().await;
    let sizes: Vec<usize> = outputs(&queue).await.iter().map(|output| output.as_str().unwrap().matches("\n\n").count()).collect();
    assert_eq!(sizes, [1, 2, 4, 3]);
}

#[tokio::test]
async fn an_empty_stream_is_a_result() {
    let (queue, done) = stream_job(values(vec![])).await;
    assert_eq!(done, json!({"output": []}));
    assert!(queue.lines(Route::Stream).is_empty());
    assert!(queue.lines(Route::Done)[0].ends_with("&isStream=true"));
}

#[tokio::test]
async fn without_a_stream_address_there_is_only_the_aggregate() {
    let queue = Queue::start().await;
    let mut settings = settings(&queue.base);
    settings.post_stream = None;
    let running =
        Running::worker(&queue, Worker::new(&settings, 1, values(vec![Ok(json!({"n": 1})), Ok(json!("x"))])).retry_policy(policy()));
    running.give("a", json!({}));
    let done = queue.wait(Route::Done, 1).await;
    running.end().await;
    assert_eq!(done[0].json(), json!({"output": [{"n": 1}, "x"]}));
    assert!(queue.lines(Route::Stream).is_empty());
}

#[tokio::test]
async fn a_piece_that_does_not_arrive_is_skipped() {
    let running = Running::start(values((0..4).map(|n| Ok(json!({"n": n}))).collect())).await;
    // The first is refused; the second fails in its single attempt; the third arrives; the fourth has three attempts again.
    let replies = [
        ScriptedReply::Status(400),
        ScriptedReply::Status(500),
        ScriptedReply::Status(200),
        ScriptedReply::Status(500),
        ScriptedReply::Cut,
        ScriptedReply::Status(200),
    ];
    running.queue.script(Route::Stream, replies);
    running.give("a", json!({}));
    let done = running.queue.wait(Route::Done, 1).await;
    let queue = running.end().await;
    let numbers: Vec<Value> = outputs(&queue).await.into_iter().map(|output| output["n"].clone()).collect();
    assert_eq!(numbers, [0, 1, 2, 3, 3, 3]);
    assert_eq!(done[0].json(), json!({"output": [{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}]}));
}

#[tokio::test]
async fn a_piece_too_large_for_one_post_is_split_between_frames() {
    let queue = Queue::start().await;
    let text: String = (0..500).map(frame).collect();
    let policy = RetryPolicy { chunk_limit: 1000, ..policy() };
    let running = Running::worker(&queue, Worker::new(&settings(&queue.base), 1, values(vec![Ok(json!(text))])).retry_policy(policy));
    running.give("a", json!({}));
    let done = queue.wait(Route::Done, 1).await;
    running.end().await;
    for seen in queue.seen(Route::Stream) {
        assert!(seen.body.len() <= 1000 && seen.json()["output"].as_str().unwrap().ends_with("\n\n"));
    }
    let outputs = outputs(&queue).await;
    assert!(outputs.len() > 5);
    assert_eq!(outputs.iter().map(|output| output.as_str().unwrap()).collect::<String>(), text);
    assert_eq!(done[0].json(), json!({"output": outputs}));
}

#[tokio::test]
async fn an_aggregate_over_the_limit_becomes_an_error_with_sizes() {
    let queue = Queue::start().await;
    let policy = RetryPolicy { result_limit: 1000, ..policy() };
    let pieces = (0..30).map(|_| Ok(json!({"text": "x".repeat(88)}))).collect();
    let running = Running::worker(&queue, Worker::new(&settings(&queue.base), 1, values(pieces)).retry_policy(policy));
    running.give("a", json!({}));
    let done = queue.wait(Route::Done, 1).await;
    running.end().await;
    assert_eq!(queue.lines(Route::Stream).len(), 30, "the stream itself goes on");
    let error = envelope(&done[0].json());
    assert_eq!(error["code"], "result_too_large");
    let message = error["message"].as_str().unwrap();
    // 30 pieces of 99 bytes and a comma each.
    assert!(message.contains("3000 bytes") && message.contains("at most 1000"), "{message}");
}

#[tokio::test]
async fn a_failure_in_the_stream_fails_the_job_after_what_came_before() {
    let pieces = vec![Ok(json!("data: 1\n\n")), Ok(json!("data: {\"error\":{}}\n\ndata: [DONE]\n\n")), Err(Failure::internal("broke"))];
    let (queue, done) = stream_job(values(pieces)).await;
    assert_eq!(outputs(&queue).await, [json!("data: 1\n\ndata: {\"error\":{}}\n\ndata: [DONE]\n\n")]);
    assert_eq!(envelope(&done)["message"], "broke");
    assert!(queue.lines(Route::Done)[0].ends_with("&isStream=true"));
}
