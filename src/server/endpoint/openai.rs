//! `/v2/{id}/openai/v1/…`: an OpenAI call becomes a job, and the job's output becomes the answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::Endpoints;
use super::job::{Order, Origin, Status};
use super::queue::{CancelOnDrop, Queue};
use super::state::Progress;
use crate::api::failure::ErrorForm;
use crate::api::{self, body, frames};
use crate::error::{Failure, Kind};
use crate::server::sse::{self, Pace};
use crate::server::wire::{self, Refusal};

/// Longer than any job lives: its own time-outs end the wait.
const FOREVER: Duration = Duration::from_secs(30 * 86_400);

pub fn router(endpoints: Endpoints, pace: Pace) -> Router {
    Router::new().route("/v2/{id}/openai/{*route}", any(handle)).with_state((endpoints, pace))
}

async fn handle(
    State((endpoints, pace)): State<(Endpoints, Pace)>,
    Path((id, _)): Path<(String, String)>,
    request: Request,
) -> Result<Response, Refusal> {
    let caller = Caller::of(&request);
    let answer = async {
        let queue = endpoints.queue(&id)?;
        // From the path as written: a model's name may hold an encoded slash.
        let route = format!("/{}", request.uri().path().splitn(5, '/').nth(4).unwrap_or_default());
        let route = wire::with_page(route, request.uri());
        let call = Incoming::read(request, &route, queue.options.sync_limit).await?;
        relay(queue, &route, call, pace, &caller).await
    };
    answer.await.map_err(|refusal: Refusal| caller.refuse(refusal))
}

/// How whoever calls reads failures.
#[derive(Clone)]
pub struct Caller {
    form: ErrorForm,
    request_id: String,
}

impl Caller {
    pub fn of(request: &Request) -> Self {
        Self { form: wire::error_form(request.uri(), request.headers()), request_id: wire::request_id(request.extensions()) }
    }

    /// A refusal in the caller's form.
    pub fn refuse(&self, refusal: impl Into<Refusal>) -> Refusal {
        refusal.into().in_form(self.form, &self.request_id)
    }
}

/// An OpenAI call as it came in.
pub struct Incoming {
    /// `None` for a GET.
    pub body: Option<Posted>,
}

/// The body of a call: its text, and what is to be known of it here.
pub struct Posted {
    /// A JSON object.
    text: Bytes,
    streams: bool,
    /// Empty when it names none.
    pub model: String,
}

impl Incoming {
    /// `route`: what the call is for, as its worker will read it.
    pub async fn read(request: Request, route: &str, limit: usize) -> Result<Self, Refusal> {
        let (parts, body) = request.into_parts();
        // Workers of other makes have routes of their own.
        let allowed = match api::routes::allow(route) {
            // The queue carries no method: what has no body is a GET.
            Some("GET" | "GET, DELETE") => "GET, HEAD",
            Some(other) => other,
            None => "GET, HEAD, POST",
        };
        let method = if parts.method == Method::HEAD { Method::GET } else { parts.method.clone() };
        if !allowed.split(", ").any(|allowed| allowed == method.as_str()) {
            wire::throw_away(&parts.headers, body).await;
            return Err(wire::method_not_allowed(&parts.method, parts.uri.path(), allowed));
        }
        if method == Method::GET {
            return Ok(Self { body: None });
        }
        let text = wire::or_empty(wire::read_body(&parts.headers, body, limit).await?, route);
        wire::check_object(&parts.headers, &text)?;
        let [stream, model] = body::members(&text, ["stream", "model"])?;
        let streams = stream.is_some_and(|stream| stream.get() == "true");
        let model = model.and_then(|model| serde_json::from_str::<String>(model.get()).ok()).unwrap_or_default();
        Ok(Self { body: Some(Posted { text, streams, model }) })
    }
}

/// Queues the call as a job and answers with what comes of it. When the client goes away, this future or the response's body is dropped,
/// and the job is cancelled.
pub async fn relay(queue: Arc<Queue>, route: &str, call: Incoming, pace: Pace, caller: &Caller) -> Result<Response, Refusal> {
    let streams = call.body.as_ref().is_some_and(|body| body.streams);
    let id = queue.submit(order(route, call.body))?;
    let mut ticket = CancelOnDrop::new(queue.clone(), id);
    if !streams {
        queue.wait_end(ticket.id(), Instant::now() + FOREVER).await?;
        ticket.disarm();
        let progress = queue.change(|state, _| state.drain(ticket.id()))?;
        return whole(progress, queue.options.cloud_errors);
    }
    let first = queue.wait_chunks(ticket.id(), Instant::now() + pace.patience, None).await?;
    if first.status.is_final() && first.chunks.is_empty() && first.output.as_ref().is_none_or(|output| !is_frames(output)) {
        ticket.disarm();
        return whole(first, queue.options.cloud_errors);
    }
    // The patience is spent: what is there now goes out, or a comment.
    Ok(sse::respond(stream(ticket, first, caller.clone()), Pace { patience: Duration::ZERO, ..pace }).await)
}

/// The call as a job.
fn order(route: &str, body: Option<Posted>) -> Order {
    let mut input = format!("{{\"openai_route\":{}", json!(route)).into_bytes();
    let bytes = body.as_ref().map_or(0, |body| body.text.len());
    if let Some(body) = body {
        input.reserve_exact(bytes + 20);
        input.extend_from_slice(b",\"openai_input\":");
        input.extend_from_slice(&body.text);
    }
    input.push(b'}');
    Order::new(Origin::OpenAi, input.into(), bytes)
}

/// The answer of a job that has ended without a stream.
fn whole(progress: Progress, cloud_errors: bool) -> Result<Response, Refusal> {
    if progress.status != Status::Completed {
        return Err(refusal(&progress, cloud_errors));
    }
    // Generator workers aggregate: one result comes as a list of one.
    let output = match progress.output {
        Some(Value::Array(mut items)) if items.len() == 1 => items.remove(0),
        Some(output) => output,
        None => Value::Null,
    };
    Ok(match output {
        Value::String(text) => {
            let kind = if is_frame(&text) {
                "text/event-stream; charset=utf-8"
            } else if serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok() {
                "application/json"
            } else {
                "text/plain; charset=utf-8"
            };
            let mut response = Body::from(text).into_response();
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
            response
        }
        value => Json(value).into_response(),
    })
}

/// The job's stream as frames. The ticket goes with it.
fn stream(mut ticket: CancelOnDrop, first: Progress, caller: Caller) -> sse::Frames {
    Box::pin(async_stream::stream! {
        let cloud_errors = ticket.queue().options.cloud_errors;
        let mut attempt = first.retries;
        let mut progress = first;
        let mut begun = false;
        let mut closed = false;
        let mut events = 0;
        loop {
            if progress.retries != attempt && begun {
                // Half an answer is out: another worker's whole one cannot follow it.
                let failure = Failure::internal("The worker was lost in the middle of its answer; please try again.").code("worker_lost");
                yield Ok(caller.refuse(failure).sse(events));
                return;
            }
            attempt = progress.retries;
            let text: String = progress.chunks.iter().map(frame_text).collect();
            if !text.is_empty() {
                begun = true;
                closed = frames::end_stream(&text);
                events += frames::count_events(&text);
                yield Ok(text);
            }
            if progress.status.is_final() {
                ticket.disarm();
                if progress.status != Status::Completed {
                    let refusal = caller.refuse(refusal(&progress, cloud_errors));
                    match (begun, closed) {
                        (false, _) => yield Err(refusal),
                        (true, false) => yield Ok(refusal.sse(events)),
                        // The worker has told of it in the stream already.
                        (true, true) => {}
                    }
                } else if !begun && let Some(output) = &progress.output {
                    // A worker without a stream URL: everything is in the aggregate.
                    yield Ok(frame_text(output));
                }
                return;
            }
            match ticket.queue().wait_chunks(ticket.id(), Instant::now() + FOREVER, Some(attempt)).await {
                Ok(next) => progress = next,
                Err(failure) => {
                    let refusal = caller.refuse(failure);
                    yield if begun { Ok(refusal.sse(events)) } else { Err(refusal) };
                    return;
                }
            }
        }
    })
}

/// Strings are frames already; whatever else a worker yields becomes one.
fn frame_text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(frame_text).collect(),
        object => format!("data: {object}\n\n"),
    }
}

/// The text of frames.
fn is_frame(text: &str) -> bool {
    let text = text.trim_start();
    text.starts_with("data:") || text.starts_with("event:")
}

/// An aggregate of frames, and not one plain answer.
fn is_frames(output: &Value) -> bool {
    match output {
        Value::String(text) => is_frame(text),
        Value::Array(items) => !items.is_empty() && items.iter().all(is_frames),
        _ => false,
    }
}

/// What a job that did not complete means over HTTP.
fn refusal(progress: &Progress, cloud_errors: bool) -> Refusal {
    let mut refusal = match progress.status {
        Status::Cancelled => Refusal::from(Failure::new(Kind::Cancelled, "The job was cancelled.").code("cancelled")),
        Status::TimedOut => {
            Refusal::from(Failure::new(Kind::Timeout, "The job ran longer than its execution timeout.").code("execution_timeout"))
        }
        _ => failed(progress.error.as_ref()),
    };
    if cloud_errors {
        refusal.status = StatusCode::INTERNAL_SERVER_ERROR;
    }
    refusal
}

/// A FAILED job: its `error` is the JSON text of OpenAI's envelope with the HTTP status inside, or anything a worker on another SDK says.
fn failed(error: Option<&Value>) -> Refusal {
    let parsed = match error {
        Some(Value::String(text)) => serde_json::from_str::<Value>(text).ok().filter(Value::is_object),
        Some(Value::Object(map)) => Some(Value::Object(map.clone())),
        _ => None,
    };
    if let Some(envelope) = parsed.as_ref().and_then(|value| value["error"].as_object())
        && let Some(message) = envelope.get("message").and_then(Value::as_str)
    {
        let code = envelope.get("code").and_then(Value::as_str);
        let status = [envelope.get("status"), envelope.get("code")].into_iter().flatten().filter_map(Value::as_u64);
        let status = status.into_iter().find(|status| (400..600).contains(status)).unwrap_or(500) as u16;
        let failure = recover(status, message, code, envelope.get("type").and_then(Value::as_str));
        let mut refusal = Refusal::from(&failure);
        refusal.status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut envelope = envelope.clone();
        // HTTP has its own place for it.
        envelope.remove("status");
        refusal.body["error"] = Value::Object(envelope);
        return refusal;
    }
    let message = match (parsed.as_ref().and_then(|value| value["error_message"].as_str()), error) {
        (Some(message), _) => message.to_owned(),
        (None, Some(Value::String(text))) => text.clone(),
        (None, Some(other)) => other.to_string(),
        (None, None) => "The job failed.".to_owned(),
    };
    Failure::internal(message).code("job_failed").into()
}

/// The failure that a worker put on the wire, as far as its class decides headers and FastChat's number.
fn recover(status: u16, message: &str, code: Option<&str>, type_name: Option<&str>) -> Failure {
    const CODES: [&str; 9] = [
        "context_length_exceeded",
        "invalid_value",
        "unsupported_parameter",
        "unsupported_value",
        "model_not_found",
        "rate_limit_exceeded",
        "cuda_out_of_memory",
        "model_loading",
        "request_timeout",
    ];
    let kind = match status {
        401 => Kind::Unauthorized,
        403 => Kind::Forbidden,
        404 => Kind::NotFound,
        405 => Kind::MethodNotAllowed,
        413 => Kind::TooLarge,
        429 => Kind::Overloaded,
        503 | 504 if type_name == Some(Kind::Timeout.type_name()) => Kind::Timeout,
        503 => Kind::Loading,
        400..=499 => Kind::BadRequest,
        _ => Kind::Internal,
    };
    let code = code.and_then(|code| CODES.into_iter().find(|known| *known == code));
    Failure { code, ..Failure::new(kind, message) }
}
