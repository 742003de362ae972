//! The worker against a scripted queue, over real sockets. Order and counts are asserted, never times.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{FutureExt, StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::retry::Backoff;
use super::{Ended, Handler, Job, RetryPolicy, Worker};
use crate::api::{Pieces, Reply};
use crate::config::{RunpodSettings, SecretString};
use crate::error::Failure;
use queue::{Queue, Route, ScriptedReply};

mod answers;
mod life;
pub(crate) mod queue;
mod streams;
mod takes;

/// Everything the platform sets, for a queue at `base`.
fn settings(base: &str) -> RunpodSettings {
    RunpodSettings {
        get_job: Some(format!("{base}/job-take/$ID?gpu=RTX+A5000")),
        post_output: Some(format!("{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=RTX+A5000")),
        post_stream: Some(format!("{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=RTX+A5000")),
        api_key: Some(SecretString::from("key-1")),
        worker_id: Some("pod1".into()),
        stream_interval: Duration::from_millis(1),
        ..Default::default()
    }
}

/// Waits so short that a test is over at once.
fn policy() -> RetryPolicy {
    let backoff = Backoff { first: Duration::from_millis(2), cap: Duration::from_millis(10) };
    RetryPolicy {
        shortest_poll: Duration::from_millis(5),
        parked: Duration::from_millis(5),
        rate_limited: Duration::from_millis(5),
        take_backoff: backoff,
        stop_pause: Duration::from_millis(5),
        least_hold: Duration::from_millis(50),
        unknown_hold: Duration::from_millis(50),
        result_backoff: backoff,
        result_window: Duration::from_millis(60),
        stream_backoff: backoff,
        ping_retry: Duration::from_millis(2),
        ..Default::default()
    }
}

/// A worker that runs against a queue.
struct Running {
    queue: Queue,
    shutdown: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<Ended, String>>,
}

impl Running {
    async fn start(handler: Handler) -> Self {
        let queue = Queue::start().await;
        Self::worker(&queue, Worker::new(&settings(&queue.base), 4, handler).retry_policy(policy()))
    }

    async fn single(handler: Handler) -> Self {
        let queue = Queue::start().await;
        Self::worker(&queue, Worker::new(&settings(&queue.base), 1, handler).retry_policy(policy()))
    }

    fn worker(queue: &Queue, worker: Worker) -> Self {
        let (shutdown, signal) = oneshot::channel::<()>();
        let task = tokio::spawn(worker.run(async move {
            // A test that forgets the sender does not mean a shutdown.
            if signal.await.is_err() {
                std::future::pending::<()>().await;
            }
        }));
        Self { queue: queue.clone(), shutdown: Some(shutdown), task }
    }

    /// Hands out one job.
    fn give(&self, id: &str, input: Value) {
        self.queue.script(Route::Take, [ScriptedReply::Json(json!({"id": id, "input": input}))]);
    }

    fn shut_down(&mut self) {
        let _ = self.shutdown.take().unwrap().send(());
    }

    async fn ended(&mut self) -> Ended {
        tokio::time::timeout(Duration::from_secs(20), &mut self.task).await.expect("the worker does not end").unwrap().unwrap()
    }

    async fn end(mut self) -> Queue {
        self.shut_down();
        assert_eq!(self.ended().await, Ended::Drained);
        self.queue
    }
}

/// A handler from an async function.
fn handler<F, T>(run: F) -> Handler
where
    F: Fn(Job) -> T + Send + Sync + 'static,
    T: Future<Output = Result<Reply, Failure>> + Send + 'static,
{
    Arc::new(move |job| run(job).boxed())
}

/// Gives back what came in.
fn echo() -> Handler {
    handler(|job| async move { Ok(Reply::Whole(json!({"echo": job.input}))) })
}

/// Answers with a stream of these.
fn streamer(pieces: impl Fn() -> Pieces + Send + Sync + 'static) -> Handler {
    let pieces = Arc::new(pieces);
    handler(move |_| {
        let pieces = pieces();
        async move { Ok(Reply::Stream(pieces)) }
    })
}

/// The `output` of every stream post.
async fn outputs(queue: &Queue) -> Vec<Value> {
    queue.seen(Route::Stream).iter().map(|seen| seen.json()["output"].clone()).collect()
}

/// The error envelope inside a result.
fn envelope(body: &Value) -> Value {
    assert!(body.get("output").is_none(), "{body}");
    serde_json::from_str::<Value>(body["error"].as_str().expect("`error` must be a string")).unwrap()["error"].clone()
}

/// Counts its own drop.
struct Dropped(Arc<AtomicUsize>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}
