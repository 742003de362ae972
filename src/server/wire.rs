//! What every route shares: reading a JSON body, rendering a refusal, and the gate in front (request ids, CORS, keys).

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use serde_json::{Value, json};

use super::auth::Keys;
use crate::api::failure;
use crate::error::{Failure, Kind};

/// How long a client may take to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// A refusal, ready for the wire.
#[derive(Debug)]
pub struct Refusal {
    pub status: StatusCode,
    pub headers: Vec<(&'static str, String)>,
    pub body: Value,
}

impl Refusal {
    /// The short form of the RunPod routes: `{"error": "…"}`.
    pub fn plain(failure: &Failure) -> Self {
        Self { body: json!({ "error": failure.message }), ..Self::from(failure) }
    }

    /// The same inside a stream whose status line is gone already.
    pub fn sse(&self) -> String {
        format!("data: {}\n\ndata: [DONE]\n\n", self.body)
    }
}

impl From<&Failure> for Refusal {
    fn from(failure: &Failure) -> Self {
        let mut body = failure::body(failure);
        if failure.kind == Kind::Unauthorized {
            // FastChat's clients look for the envelope under `detail`.
            body["detail"] = failure::envelope(failure);
        }
        let status = StatusCode::from_u16(failure.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, headers: failure::headers(failure), body }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::from(&failure)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body)).into_response();
        for (name, value) in self.headers {
            if let Ok(value) = HeaderValue::from_str(&value) {
                response.headers_mut().insert(HeaderName::from_static(name), value);
            }
        }
        response
    }
}

/// The 405 of a route that is there for another method.
pub fn method_not_allowed(method: &Method, path: &str, allow: &'static str) -> Refusal {
    let failure = Failure::new(Kind::MethodNotAllowed, format!("{method} is not allowed on {path}; use {allow}."));
    let mut refusal = Refusal::from(failure);
    refusal.headers.push(("allow", allow.to_owned()));
    refusal
}

/// Reads a body of at most `limit` bytes.
///
/// A larger one is read to its end and thrown away before it is refused: a client still busy sending would see a reset connection instead
/// of the answer.
pub async fn read_body(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, Failure> {
    let too_large = || Failure::new(Kind::TooLarge, format!("The request body is larger than the limit of {limit} bytes."));
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()).and_then(|text| text.parse::<usize>().ok());
    let waits_for_us = headers.get(header::EXPECT).is_some();
    let most = limit.saturating_mul(16);
    if announced.is_some_and(|length| length > limit && (waits_for_us || length > most)) {
        return Err(too_large());
    }
    let read = async {
        let mut stream = body.into_data_stream();
        let mut gathered = Vec::with_capacity(announced.unwrap_or(0).min(limit).min(1024 * 1024));
        let mut seen = 0usize;
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|_| Failure::new(Kind::BadRequest, "The connection ended in the middle of the request body."))?;
            seen = seen.saturating_add(chunk.len());
            if seen > most {
                break;
            } else if seen > limit {
                gathered = Vec::new();
            } else {
                gathered.extend_from_slice(&chunk);
            }
        }
        if seen > limit { Err(too_large()) } else { Ok(Bytes::from(gathered)) }
    };
    match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(result) => result,
        Err(_) => Err(Failure::new(Kind::BadRequest, "The request body did not arrive within 60 seconds.")),
    }
}

/// Parses a JSON object. Any content type will do, except from a web page: browsers send other types without a preflight, and any page
/// could then post to an open server.
pub fn parse_object(headers: &HeaderMap, body: &[u8]) -> Result<Value, Failure> {
    if headers.contains_key(header::ORIGIN) && !is_json(headers) {
        return Err(Failure::new(Kind::BadRequest, "Requests from web pages need the header `content-type: application/json`."));
    }
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(Failure::new(Kind::BadRequest, "The request has no body; send a JSON object."));
    }
    let value: Value = serde_json::from_slice(body)
        .map_err(|error| Failure::new(Kind::BadRequest, format!("The request body is not valid JSON: {error}.")))?;
    if value.is_object() { Ok(value) } else { Err(Failure::new(Kind::BadRequest, "The request body must be a JSON object.")) }
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || essence.ends_with("+json")
}

/// The id of a request: the client's, or one of ours. In the extensions of every request that came through the [`gate`].
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

/// What stands in front of every route.
pub struct Gate {
    pub keys: Keys,
    /// Origins that may call from a browser; empty = every one.
    pub allowed_origins: Vec<String>,
    /// Open besides `/health`, `/ping`, `/metrics` and `/load`.
    pub health_path: String,
}

/// Gives each request an id, answers preflights, checks keys, and marks the response with id and CORS headers.
pub async fn gate(State(gate): State<Arc<Gate>>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    request.extensions_mut().insert(RequestId(id.clone()));
    let origin = request.headers().get(header::ORIGIN).cloned();
    let preflight = request.method() == Method::OPTIONS && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if preflight {
        answer_preflight(request.headers())
    } else if gate.guards(&request) && !gate.keys.admit(request.headers()) {
        Refusal::from(unauthorized(request.headers())).into_response()
    } else {
        next.run(request).await
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    if let Some(origin) = origin {
        gate.allow_origin(&origin, response.headers_mut());
    }
    response
}

impl Gate {
    fn guards(&self, request: &Request) -> bool {
        let path = request.uri().path();
        let open = matches!(path, "/health" | "/ping" | "/metrics" | "/load")
            || path == self.health_path
            || (path == "/" && request.method() != Method::POST);
        !open && request.method() != Method::OPTIONS
    }

    fn allow_origin(&self, origin: &HeaderValue, headers: &mut HeaderMap) {
        let value = if self.allowed_origins.is_empty() || self.allowed_origins.iter().any(|allowed| allowed == "*") {
            HeaderValue::from_static("*")
        } else {
            headers.append(header::VARY, HeaderValue::from_static("origin"));
            if !self.allowed_origins.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes()) {
                return;
            }
            origin.clone()
        };
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, value);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("x-request-id, retry-after, x-should-retry"));
    }
}

fn unauthorized(headers: &HeaderMap) -> Failure {
    let offered = headers.contains_key(header::AUTHORIZATION) || headers.contains_key("x-api-key");
    let message = if offered {
        "Incorrect API key provided."
    } else {
        "You did not provide an API key. Send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`."
    };
    Failure::new(Kind::Unauthorized, message)
}

/// Mirrors the headers asked for: the SDKs send a dozen of their own.
fn answer_preflight(asked: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
    let allowed = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned().unwrap_or(HeaderValue::from_static("*"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    headers.append(header::VARY, HeaderValue::from_static("access-control-request-headers"));
    response
}

/// The client's `x-request-id` when it is 1 to 128 printable ASCII characters, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    headers
        .get("x-request-id")
        .and_then(|value| value.to_str().ok())
        .filter(|text| (1..=128).contains(&text.len()) && text.bytes().all(|byte| (b' '..=b'~').contains(&byte)))
        .map_or_else(|| format!("req-{}", uuid::Uuid::new_v4().simple()), str::to_owned)
}
