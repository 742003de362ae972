//! What clients of the endpoint call: submit, ask, stream, cancel.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Path, Query, Request, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::Endpoints;
use super::job::{Order, Origin, Status};
use super::queue::Queue;
use crate::error::{Failure, Kind};
use crate::server::wire::{self, Refusal};

type JsonResult = Result<Json<Value>, Refusal>;
type Params = Query<HashMap<String, String>>;

/// The wait of `/runsync` and `/status-sync` in milliseconds, when the client names none, and its limits.
const WAIT_DEFAULT: u64 = 90_000;
const WAIT_RANGE: (u64, u64) = (1_000, 300_000);
/// Jobs that `/requests` lists.
const LISTED: usize = 1000;

pub fn router(endpoints: Endpoints) -> Router {
    Router::new()
        .route("/v2/{id}/run", post(run))
        .route("/v2/{id}/runsync", post(runsync))
        .route("/v2/{id}/status/{job}", get(status).post(status))
        .route("/v2/{id}/status-sync/{job}", get(status_sync).post(status_sync))
        .route("/v2/{id}/stream/{job}", get(stream).post(stream))
        .route("/v2/{id}/cancel/{job}", post(cancel))
        .route("/v2/{id}/retry/{job}", post(retry))
        .route("/v2/{id}/purge-queue", post(purge))
        .route("/v2/{id}/health", get(health))
        .route("/v2/{id}/requests", get(requests))
        .with_state(endpoints)
}

fn queue(endpoints: &Endpoints, id: &str) -> Result<Arc<Queue>, Refusal> {
    endpoints.queue(id).map_err(|failure| Refusal::plain(&failure))
}

fn plain(failure: Failure) -> Refusal {
    Refusal::plain(&failure)
}

async fn run(State(endpoints): State<Endpoints>, Path(id): Path<String>, request: Request) -> JsonResult {
    let queue = queue(&endpoints, &id)?;
    let job = submit(&queue, Origin::Run, request).await.map_err(plain)?;
    Ok(Json(json!({ "id": job, "status": Status::InQueue.name() })))
}

/// A client that hangs up does not cancel: the job goes on, as in the cloud.
async fn runsync(State(endpoints): State<Endpoints>, Path(id): Path<String>, params: Params, request: Request) -> JsonResult {
    let queue = queue(&endpoints, &id)?;
    let wait = wait(&params).map_err(plain)?;
    let job = submit(&queue, Origin::Sync, request).await.map_err(plain)?;
    let (_, report) = queue.wait_end(&job, Instant::now() + wait).await.map_err(plain)?;
    Ok(Json(report))
}

async fn submit(queue: &Queue, origin: Origin, request: Request) -> Result<String, Failure> {
    let (parts, body) = request.into_parts();
    let limit = queue.options.limit(origin);
    let bytes = match wire::read_body(&parts.headers, body, limit).await {
        // The cloud calls an oversized request a bad one.
        Err(failure) if failure.kind == Kind::TooLarge => return Err(Failure { kind: Kind::BadRequest, ..failure }),
        other => other?,
    };
    wire::check_object(&parts.headers, &bytes)?;
    queue.submit(Order::parse(origin, &bytes)?)
}

async fn status(State(endpoints): State<Endpoints>, Path((id, job)): Path<(String, String)>, params: Params) -> JsonResult {
    let queue = queue(&endpoints, &id)?;
    if let Some(ttl) = number(&params, "ttl").map_err(plain)? {
        queue.change(|state, _| state.set_ttl(&job, Duration::from_millis(ttl)));
    }
    queue.look(|state| state.job(&job).map(|job| Json(Value::Object(job.report())))).map_err(plain)
}

async fn status_sync(State(endpoints): State<Endpoints>, Path((id, job)): Path<(String, String)>, params: Params) -> JsonResult {
    let queue = queue(&endpoints, &id)?;
    let wait = wait(&params).map_err(plain)?;
    let (_, report) = queue.wait_end(&job, Instant::now() + wait).await.map_err(plain)?;
    Ok(Json(report))
}

/// The chunks since the last read. `stream` is always there: the SDK looks for it even at the end.
async fn stream(State(endpoints): State<Endpoints>, Path((id, job)): Path<(String, String)>) -> JsonResult {
    let queue = queue(&endpoints, &id)?;
    let progress = queue.wait_chunks(&job, Instant::now() + queue.options.stream_hold, None).await.map_err(plain)?;
    let chunks: Vec<Value> = progress.chunks.into_iter().map(|output| json!({ "output": output })).collect();
    let mut answer = json!({ "status": progress.status.name(), "stream": chunks });
    if let Some(error) = progress.error {
        answer["error"] = error;
    }
    Ok(Json(answer))
}

async fn cancel(State(endpoints): State<Endpoints>, Path((id, job)): Path<(String, String)>) -> JsonResult {
    let queue = queue(&endpoints, &id)?;
    queue.change(|state, now| state.cancel(&job, now)).map(Json).map_err(plain)
}

async fn retry(State(endpoints): State<Endpoints>, Path((id, job)): Path<(String, String)>) -> JsonResult {
    let queue = queue(&endpoints, &id)?;
    queue.change(|state, now| state.retry(&job, now)).map(Json).map_err(plain)
}

async fn purge(State(endpoints): State<Endpoints>, Path(id): Path<String>) -> JsonResult {
    let removed = queue(&endpoints, &id)?.change(|state, now| state.purge(now));
    Ok(Json(json!({ "removed": removed, "status": "completed" })))
}

async fn health(State(endpoints): State<Endpoints>, Path(id): Path<String>) -> JsonResult {
    Ok(Json(queue(&endpoints, &id)?.look(|state| state.health(Instant::now()))))
}

async fn requests(State(endpoints): State<Endpoints>, Path(id): Path<String>) -> JsonResult {
    Ok(Json(queue(&endpoints, &id)?.look(|state| state.requests(LISTED))))
}

fn wait(params: &Params) -> Result<Duration, Failure> {
    let wait = number(params, "wait")?.unwrap_or(WAIT_DEFAULT);
    Ok(Duration::from_millis(wait.clamp(WAIT_RANGE.0, WAIT_RANGE.1)))
}

fn number(params: &Params, key: &str) -> Result<Option<u64>, Failure> {
    match params.get(key).map(|text| text.parse::<u64>()) {
        None => Ok(None),
        Some(Ok(number)) => Ok(Some(number)),
        Some(Err(_)) => Err(Failure::bad_request(key, format!("`{key}` must be a whole number of milliseconds."))),
    }
}
