//! The endpoint over real sockets: clients on one side, scripted workers on the other.

use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use futures::StreamExt;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::server::health::{Phase, Readiness};
use crate::server::tests::{Running, start};
use crate::server::{Options as ServerOptions, gateway};

/// A gateway on a port of its own, and what one says to it.
struct Bench {
    server: Running,
    endpoints: Endpoints,
    client: reqwest::Client,
}

/// Short times, so that nothing here waits for long; what must *not* happen yet keeps its long ones.
fn quick() -> Options {
    Options {
        hold: Duration::from_millis(60),
        stream_hold: Duration::from_millis(40),
        tick: Duration::from_millis(10),
        ..Options::default()
    }
}

async fn bench(options: Options) -> Bench {
    let endpoints = Endpoints::new(options);
    let server = start(gateway(&endpoints, Readiness::new(Phase::Ready), &ServerOptions::default())).await;
    Bench { server, endpoints, client: reqwest::Client::new() }
}

impl Bench {
    fn url(&self, path: &str) -> String {
        format!("{}/v2/ep/{path}", self.server.base)
    }

    async fn get(&self, path: &str) -> Response {
        self.client.get(self.url(path)).send().await.unwrap()
    }

    async fn post(&self, path: &str, body: Value) -> Response {
        self.client.post(self.url(path)).json(&body).send().await.unwrap()
    }

    async fn run(&self, input: Value) -> String {
        let answer = value(self.post("run", json!({ "input": input })).await).await;
        assert_eq!(answer["status"], "IN_QUEUE");
        answer["id"].as_str().unwrap().to_owned()
    }

    async fn take(&self, worker: &str) -> Option<Value> {
        let response = self.get(&format!("job-take/{worker}?gpu=x&job_in_progress=0")).await;
        if response.status() == StatusCode::NO_CONTENT { None } else { Some(value(response).await) }
    }

    /// Takes a job, and is patient.
    async fn await_job(&self, worker: &str) -> Value {
        loop {
            if let Some(job) = self.take(worker).await {
                return job;
            }
        }
    }

    async fn done(&self, worker: &str, job: &str, body: Value) -> Response {
        // As the SDK posts it: JSON that calls itself a form.
        let post = self.client.post(self.url(&format!("job-done/{worker}/{job}?gpu=x&isStream=false")));
        post.header("content-type", "application/x-www-form-urlencoded").body(body.to_string()).send().await.unwrap()
    }

    async fn chunk(&self, worker: &str, job: &str, output: Value) {
        let response = self.post(&format!("job-stream/{worker}/{job}?isStream=false"), json!({ "output": output })).await;
        assert_eq!(response.status(), 200);
    }

    async fn status(&self, job: &str) -> Value {
        value(self.get(&format!("status/{job}")).await).await
    }

    async fn await_status(&self, job: &str, wanted: &str) -> Value {
        loop {
            let status = self.status(job).await;
            if status["status"] == wanted {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn health(&self) -> Value {
        value(self.get("health").await).await
    }

    /// Posts an OpenAI call in the background.
    fn openai(&self, path: &str, body: Value) -> tokio::task::JoinHandle<Response> {
        let post = self.client.post(self.url(&format!("openai{path}"))).json(&body);
        tokio::spawn(async move { post.send().await.unwrap() })
    }
}

async fn value(response: Response) -> Value {
    assert_eq!(response.status(), 200, "{}", response.url());
    response.json().await.unwrap()
}

fn id(job: &Value) -> &str {
    job["id"].as_str().unwrap()
}

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
    let bench = bench(Options { run_limit: 1000, sync_limit: 2000, ..quick() }).await;
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
    let bench = bench(Options { run_limit: 1000, sync_limit: 2000, chunk_limit: 500, ..quick() }).await;
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
    let bench = bench(Options { max_queued: 2, max_bytes: 20_000, ..quick() }).await;
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
async fn takes_are_held_then_answered_with_nothing() {
    let bench = Arc::new(bench(Options { hold: Duration::from_secs(30), ..quick() }).await);
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
    let bench = bench(Options { hold: Duration::from_secs(30), ..quick() }).await;
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
async fn a_worker_that_stops_pinging_loses_its_job_to_another() {
    let bench = bench(Options { lost_after: Duration::from_millis(150), ..quick() }).await;
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
    let bench = bench(Options { lost_after: Duration::from_millis(400), silent_after: Duration::from_secs(600), ..quick() }).await;
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
    let bench = bench(Options { lost_after: Duration::from_millis(150), ..quick() }).await;
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
    let bench = bench(Options { arrival: Duration::from_millis(100), ..quick() }).await;
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
    let bench = bench(Options { lost_after: Duration::from_millis(80), max_losses: 1, ..quick() }).await;
    let job = bench.run(json!(1)).await;
    for worker in ["w1", "w2"] {
        bench.get(&format!("ping/{worker}")).await;
        assert_eq!(id(&bench.await_job(worker).await), job);
    }
    let status = bench.await_status(&job, "FAILED").await;
    assert!(status["error"].as_str().unwrap().contains("w2"));
}

#[tokio::test]
async fn time_limits_end_jobs() {
    let short = Duration::from_millis(100);
    let bench = bench(Options { run_retention: short, ..quick() }).await;
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
    let bench = bench(Options { webhook_pause: Duration::from_millis(10), ..quick() }).await;
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

        let cloud = self::bench(Options { cloud_errors: true, ..quick() }).await;
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
async fn an_openai_stream_whose_worker_is_lost_does_not_begin_again() {
    let bench = bench(Options { lost_after: Duration::from_millis(100), ..quick() }).await;
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
    let bench = bench(Options { execution_timeout: Duration::from_millis(150), ..quick() }).await;
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

#[tokio::test]
async fn many_clients_and_workers_each_job_exactly_once() {
    let bench = Arc::new(bench(quick()).await);
    let workers: Vec<_> = (0..4)
        .map(|n| {
            let bench = bench.clone();
            tokio::spawn(async move {
                let worker = format!("w{n}");
                loop {
                    let response = bench.get(&format!("job-take-batch/{worker}?batch_size=3")).await;
                    if response.status() == 204 {
                        continue;
                    }
                    for job in value(response).await.as_array().unwrap() {
                        bench.done(&worker, id(job), json!({ "output": job["input"] })).await;
                    }
                }
            })
        })
        .collect();
    let clients = (0..200).map(|n| {
        let bench = bench.clone();
        async move {
            let report = value(bench.post("runsync", json!({ "input": n })).await).await;
            assert_eq!((&report["status"], &report["output"]), (&json!("COMPLETED"), &json!(n)));
        }
    });
    futures::stream::iter(clients).buffer_unordered(32).collect::<Vec<()>>().await;
    assert_eq!(bench.health().await["jobs"], json!({"completed": 200, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0}));
    for worker in workers {
        worker.abort();
    }
}

#[tokio::test]
async fn half_a_request_harms_nobody() {
    let bench = bench(quick()).await;
    let mut socket = TcpStream::connect(bench.server.address).await.unwrap();
    socket.write_all(b"POST /v2/ep/run HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{\"input\":").await.unwrap();
    drop(socket);
    let mut socket = TcpStream::connect(bench.server.address).await.unwrap();
    socket.write_all(b"nonsense\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let _ = socket.read_to_string(&mut answer).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert_eq!(bench.health().await["jobs"]["inQueue"], 0);
}

#[tokio::test]
async fn the_variables_name_the_routes() {
    let variables = worker_variables("http://127.0.0.1:8000/", "my-ep", "pod", None);
    let get = |name: &str| variables.iter().find(|(key, _)| *key == name).unwrap().1.as_str();
    assert_eq!(get("RUNPOD_WEBHOOK_GET_JOB"), "http://127.0.0.1:8000/v2/my-ep/job-take/$ID?gpu=local");
    assert_eq!(get("RUNPOD_WEBHOOK_POST_OUTPUT"), "http://127.0.0.1:8000/v2/my-ep/job-done/$RUNPOD_POD_ID/$ID?gpu=local");
    assert_eq!(get("RUNPOD_WEBHOOK_POST_STREAM"), "http://127.0.0.1:8000/v2/my-ep/job-stream/$RUNPOD_POD_ID/$ID?gpu=local");
    assert_eq!(get("RUNPOD_WEBHOOK_PING"), "http://127.0.0.1:8000/v2/my-ep/ping/$RUNPOD_POD_ID?gpu=local");
    assert!(!get("RUNPOD_AI_API_KEY").is_empty() && get("RUNPOD_POD_ID") == "pod");
}
