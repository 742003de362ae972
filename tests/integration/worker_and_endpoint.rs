//! The queue worker on the local endpoint: the job protocol from both of its ends, with a handler in place of the model.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{FutureExt, StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use worker_candle::api::{Pieces, Reply};
use worker_candle::config::{RunpodSettings, SecretString};
use worker_candle::error::Failure;
use worker_candle::runpod::{Ended, Handler, Job, Worker};
use worker_candle::server::endpoint::{self, Endpoints};
use worker_candle::server::{self, Phase, Readiness};

struct Local {
    base: String,
    http: reqwest::Client,
    endpoints: Endpoints,
    shutdown: oneshot::Sender<()>,
    worker: JoinHandle<Result<Ended, String>>,
}

/// An endpoint `local` with one worker attached to it, as its own variables say.
async fn start(handler: Handler) -> Local {
    let endpoints = Endpoints::new(endpoint::EndpointOptions::default());
    let router = server::gateway(&endpoints, Readiness::new(Phase::Ready), &server::ServerOptions::default());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(server::run(listener, router, std::future::pending(), Duration::from_secs(1)));

    let variables = endpoint::worker_variables(&base, "local", "worker-1", None);
    let variable = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
    let settings = RunpodSettings {
        get_job: variable("RUNPOD_WEBHOOK_GET_JOB"),
        post_output: variable("RUNPOD_WEBHOOK_POST_OUTPUT"),
        post_stream: variable("RUNPOD_WEBHOOK_POST_STREAM"),
        ping: variable("RUNPOD_WEBHOOK_PING"),
        api_key: variable("RUNPOD_AI_API_KEY").map(SecretString::from),
        worker_id: variable("RUNPOD_POD_ID"),
        ..Default::default()
    };
    let (shutdown, signal) = oneshot::channel::<()>();
    let worker = tokio::spawn(Worker::new(&settings, 8, handler).run(async move {
        let _ = signal.await;
    }));
    Local { base: format!("{base}/v2/local"), http: reqwest::Client::new(), endpoints, shutdown, worker }
}

impl Local {
    async fn post(&self, route: &str, body: Value) -> Value {
        self.http.post(format!("{}{route}", self.base)).json(&body).send().await.unwrap().json().await.unwrap()
    }

    async fn get(&self, route: &str) -> Value {
        self.http.get(format!("{}{route}", self.base)).send().await.unwrap().json().await.unwrap()
    }

    /// Asks for a job's status until it is `status`.
    async fn until(&self, id: &str, status: &str) -> Value {
        for _ in 0..1000 {
            let answer = self.get(&format!("/status/{id}")).await;
            if answer["status"] == status {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{id} does not become {status}");
    }

    async fn end(self) {
        self.shutdown.send(()).unwrap();
        self.endpoints.close();
        let ended = tokio::time::timeout(Duration::from_secs(20), self.worker).await.expect("the worker does not end");
        assert_eq!(ended.unwrap(), Ok(Ended::Drained));
    }
}

fn handler<F, T>(run: F) -> Handler
where
    F: Fn(Job) -> T + Send + Sync + 'static,
    T: Future<Output = Result<Reply, Failure>> + Send + 'static,
{
    Arc::new(move |job| run(job).boxed())
}

/// Frames that come into being one after the other, whether they are pulled or not; a pull gives all that are there.
fn generate(frames: Vec<String>) -> Pieces {
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        for frame in frames {
            tokio::time::sleep(Duration::from_millis(1)).await;
            if sender.send(frame).is_err() {
                break;
            }
        }
    });
    stream::unfold(receiver, |mut receiver| async {
        let mut piece = receiver.recv().await?;
        while let Ok(more) = receiver.try_recv() {
            piece.push_str(&more);
        }
        Some((Ok(json!(piece)), receiver))
    })
    .boxed()
}

#[tokio::test]
async fn results_and_failures_reach_the_client() {
    let local = start(handler(|job| async move {
        match job.input.get("fail") {
            Some(_) => Err(Failure::bad_request("fail", "as asked")),
            None => Ok(Reply::Whole(json!({"got": job.input}))),
        }
    }))
    .await;
    let jobs = (0..40).map(|n| local.post("/runsync", json!({"input": {"n": n}})));
    for (n, answer) in futures::future::join_all(jobs).await.into_iter().enumerate() {
        assert_eq!((&answer["status"], &answer["output"]), (&json!("COMPLETED"), &json!({"got": {"n": n}})));
    }
    let failed = local.post("/runsync", json!({"input": {"fail": true}})).await;
    assert_eq!(failed["status"], "FAILED");
    let envelope: Value = serde_json::from_str(failed["error"].as_str().unwrap()).unwrap();
    assert_eq!((&envelope["error"]["status"], &envelope["error"]["param"]), (&json!(400), &json!("fail")));
    local.end().await;
}

#[tokio::test]
async fn a_stream_arrives_whole_and_in_order() {
    let frames: Vec<String> = (0..200).map(|n| format!("data: {{\"n\":{n}}}\n\n")).chain(["data: [DONE]\n\n".to_owned()]).collect();
    let expected = frames.concat();
    let local = start(handler(move |_| {
        let pieces = generate(frames.clone());
        async move { Ok(Reply::Stream(pieces)) }
    }))
    .await;
    let url = format!("{}/openai/v1/chat/completions", local.base);
    let body = json!({"model": "m", "messages": [], "stream": true});
    let text = local.http.post(url).json(&body).send().await.unwrap().text().await.unwrap();
    assert_eq!(text, expected);
    local.end().await;
}

#[tokio::test]
async fn a_cancelled_job_ends_at_the_worker() {
    struct Dropped(Arc<AtomicUsize>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let dropped = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&dropped);
    let local = start(handler(move |_| {
        let guard = Dropped(Arc::clone(&counter));
        let pieces = stream::iter([Ok(json!("data: 1\n\n"))]).chain(stream::pending()).inspect(move |_| _ = &guard);
        async move { Ok(Reply::Stream(pieces.boxed())) }
    }))
    .await;
    let id = local.post("/run", json!({"input": {}})).await["id"].as_str().unwrap().to_owned();
    local.until(&id, "IN_PROGRESS").await;
    local.post(&format!("/cancel/{id}"), json!({})).await;
    local.until(&id, "CANCELLED").await;
    for _ in 0..1000 {
        if dropped.load(Ordering::SeqCst) == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    local.end().await;
}

#[tokio::test]
async fn a_shutdown_answers_what_was_taken() {
    let local = start(handler(|job| async move {
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(Reply::Whole(job.input))
    }))
    .await;
    let id = local.post("/run", json!({"input": {"late": true}})).await["id"].as_str().unwrap().to_owned();
    local.until(&id, "IN_PROGRESS").await;
    let (base, http) = (local.base.clone(), local.http.clone());
    local.end().await;
    let answer: Value = http.get(format!("{base}/status/{id}")).send().await.unwrap().json().await.unwrap();
    assert_eq!((&answer["status"], &answer["output"]), (&json!("COMPLETED"), &json!({"late": true})));
}
