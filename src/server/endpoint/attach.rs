//! What workers call: take, stop, done, stream, ping. And the variables with which one attaches.

use std::collections::HashMap;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::Endpoints;
use super::state::Verdict;
use super::workers::Contact;
use crate::config::{ExposeSecret, SecretString};
use crate::error::{Failure, Kind};
use crate::server::wire::{self, Refusal};

type Params = Query<HashMap<String, String>>;

/// Jobs given at once, whatever a worker asks for.
const BATCH_MOST: usize = 1000;

pub fn router(endpoints: Endpoints) -> Router {
    Router::new()
        .route("/v2/{id}/job-take/{worker}", get(take))
        .route("/v2/{id}/job-take-batch/{worker}", get(take_batch))
        .route("/v2/{id}/job-stop/{worker}", get(stop))
        .route("/v2/{id}/job-done/{worker}/{job}", post(done))
        .route("/v2/{id}/job-stream/{worker}/{job}", post(stream))
        .route("/v2/{id}/ping/{worker}", get(ping))
        .with_state(endpoints)
}

/// The environment with which a worker attaches to endpoint `id` of the server at `base` (`http://127.0.0.1:8000`): ours, or any worker on
/// RunPod's SDK. The SDK pings only when it has both an API key and a pod id.
pub fn worker_variables(base: &str, id: &str, worker: &str, key: Option<&SecretString>) -> Vec<(&'static str, String)> {
    let base = format!("{}/v2/{id}", base.trim_end_matches('/'));
    vec![
        ("RUNPOD_WEBHOOK_GET_JOB", format!("{base}/job-take/$ID?gpu=local")),
        ("RUNPOD_WEBHOOK_POST_OUTPUT", format!("{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=local")),
        ("RUNPOD_WEBHOOK_POST_STREAM", format!("{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=local")),
        ("RUNPOD_WEBHOOK_PING", format!("{base}/ping/$RUNPOD_POD_ID?gpu=local")),
        ("RUNPOD_PING_INTERVAL", "10000".to_owned()),
        ("RUNPOD_AI_API_KEY", key.map_or("local", ExposeSecret::expose_secret).to_owned()),
        ("RUNPOD_ENDPOINT_ID", id.to_owned()),
        ("RUNPOD_POD_ID", worker.to_owned()),
    ]
}

/// The SDK appends `&…` even to a URL without `?`, where it becomes part of the last path segment.
fn segment(text: &str) -> &str {
    text.split('&').next().unwrap_or_default()
}

/// Whether a poll says that its worker has no job. Where the SDK appends `&…` to a URL without `?`, it says so in the path.
fn holds_nothing(worker: &str, params: &Params) -> bool {
    let in_path = worker.split('&').skip(1).find_map(|pair| pair.strip_prefix("job_in_progress="));
    params.get("job_in_progress").map(String::as_str).or(in_path) == Some("0")
}

fn plain(failure: Failure) -> Refusal {
    Refusal::plain(&failure)
}

async fn take(State(endpoints): State<Endpoints>, Path((id, worker)): Path<(String, String)>, params: Params) -> Result<Response, Refusal> {
    let queue = endpoints.queue(&id).map_err(plain)?;
    let jobs = queue.take(segment(&worker), 1, holds_nothing(&worker, &params)).await.map_err(plain)?;
    Ok(if jobs.is_empty() { nothing() } else { json_of(jobs.into_iter().flat_map(|job| job.parts).collect()) })
}

async fn take_batch(
    State(endpoints): State<Endpoints>,
    Path((id, worker)): Path<(String, String)>,
    params: Params,
) -> Result<Response, Refusal> {
    let queue = endpoints.queue(&id).map_err(plain)?;
    let want = match params.get("batch_size").map(|text| text.parse::<usize>()) {
        None => 1,
        Some(Ok(want)) if want > 0 => want.min(BATCH_MOST),
        Some(_) => return Err(plain(Failure::bad_request("batch_size", "`batch_size` must be a whole number above 0."))),
    };
    let jobs = queue.take(segment(&worker), want, holds_nothing(&worker, &params)).await.map_err(plain)?;
    if jobs.is_empty() {
        return Ok(nothing());
    }
    let mut parts = Vec::with_capacity(4 * jobs.len() + 1);
    for job in jobs {
        parts.push(Bytes::from_static(if parts.is_empty() { b"[" } else { b"," }));
        parts.extend(job.parts);
    }
    parts.push(Bytes::from_static(b"]"));
    Ok(json_of(parts))
}

/// JSON in parts, sent one after another as they are: inputs are not copied.
fn json_of(parts: Vec<Bytes>) -> Response {
    let length: usize = parts.iter().map(Bytes::len).sum();
    let body = Body::from_stream(futures::stream::iter(parts.into_iter().map(Ok::<_, std::convert::Infallible>)));
    ([(header::CONTENT_TYPE, "application/json".to_owned()), (header::CONTENT_LENGTH, length.to_string())], body).into_response()
}

async fn stop(State(endpoints): State<Endpoints>, Path((id, worker)): Path<(String, String)>) -> Result<Response, Refusal> {
    let stops = endpoints.queue(&id).map_err(plain)?.stops(segment(&worker)).await.map_err(plain)?;
    Ok(if stops.is_empty() { nothing() } else { Json(json!({ "jobsToStop": stops })).into_response() })
}

fn nothing() -> Response {
    StatusCode::NO_CONTENT.into_response()
}

async fn done(State(endpoints): State<Endpoints>, Path((id, worker, job)): Path<(String, String, String)>, request: Request) -> JsonResult {
    let queue = endpoints.queue(&id).map_err(plain)?;
    let (worker, job) = (segment(&worker), segment(&job));
    let (body, bytes) = read(queue.options.run_limit.max(queue.options.sync_limit), request).await?;
    let verdict = queue.change(|state, now| {
        let _ = state.workers.seen(worker, Contact::Post, now);
        state.done(worker, job, body, bytes, now)
    });
    answer(verdict, bytes)
}

async fn stream(
    State(endpoints): State<Endpoints>,
    Path((id, worker, job)): Path<(String, String, String)>,
    request: Request,
) -> JsonResult {
    let queue = endpoints.queue(&id).map_err(plain)?;
    let (worker, job) = (segment(&worker), segment(&job));
    let (body, bytes) = read(queue.options.chunk_limit, request).await?;
    let verdict = queue.change(|state, now| {
        let _ = state.workers.seen(worker, Contact::Post, now);
        state.chunk(worker, job, body, bytes)
    });
    answer(verdict, bytes)
}

type JsonResult = Result<Json<Value>, Refusal>;

/// The body as JSON, whatever its content type says: the SDK calls it a form.
async fn read(limit: usize, request: Request) -> Result<(Value, usize), Refusal> {
    let (parts, body) = request.into_parts();
    let bytes = match wire::read_body(&parts.headers, body, limit).await {
        Err(failure) if failure.kind == Kind::TooLarge => return Err(plain(Failure { kind: Kind::BadRequest, ..failure })),
        other => other.map_err(plain)?,
    };
    match serde_json::from_slice::<Value>(&bytes) {
        Ok(value) if value.is_object() => Ok((value, bytes.len())),
        Ok(_) => Err(plain(Failure::new(Kind::BadRequest, "The body must be a JSON object."))),
        Err(error) => Err(plain(Failure::new(Kind::BadRequest, format!("The body is not valid JSON: {error}.")))),
    }
}

/// A result that nobody waits for any more is taken politely: its worker could do nothing about a refusal.
fn answer(verdict: Verdict, bytes: usize) -> JsonResult {
    match verdict {
        Verdict::Accepted => Ok(Json(json!({}))),
        Verdict::Ignored => Ok(Json(json!({ "ignored": true }))),
        Verdict::TooLarge => {
            Err(plain(Failure::new(Kind::BadRequest, format!("A body of {bytes} bytes is larger than this endpoint allows."))))
        }
    }
}

async fn ping(State(endpoints): State<Endpoints>, Path((id, worker)): Path<(String, String)>, params: Params) -> JsonResult {
    let queue = endpoints.queue(&id).map_err(plain)?;
    let worker = segment(&worker);
    let ids: Vec<&str> = params.get("job_id").map(|ids| ids.split(',').filter(|id| !id.is_empty()).collect()).unwrap_or_default();
    queue
        .change(|state, now: Instant| {
            state.workers.seen(worker, Contact::Ping, now)?;
            if params.get("status").is_some_and(|status| status == "unhealthy") {
                let reason = params.get("reason").cloned().unwrap_or_default();
                tracing::warn!("worker {worker} is unhealthy: {reason}");
                state.workers.unhealthy(worker, reason);
            }
            state.ping(worker, &ids, now);
            Ok(())
        })
        .map_err(plain)?;
    Ok(Json(json!({})))
}
