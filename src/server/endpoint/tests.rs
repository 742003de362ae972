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
use crate::server::{ServerOptions, gateway};

mod client_routes;
mod openai_routes;
mod worker_routes;

/// A gateway on a port of its own, and what one says to it.
struct Bench {
    server: Running,
    endpoints: Endpoints,
    client: reqwest::Client,
}

/// Short times, so that nothing here waits for long; what must *not* happen yet keeps its long ones.
fn quick() -> EndpointOptions {
    EndpointOptions {
        hold: Duration::from_millis(60),
        stream_hold: Duration::from_millis(40),
        tick: Duration::from_millis(10),
        ..EndpointOptions::default()
    }
}

async fn bench(options: EndpointOptions) -> Bench {
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
