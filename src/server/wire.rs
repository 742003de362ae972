//! What every route shares: reading a JSON body, rendering a refusal, and the gate in front (request ids, CORS, keys).

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use serde_json::{Value, json};

use super::auth::{Caller, Keys};
use super::docs;
use super::limits::{self, Client};
use crate::api::body::{self, BodyLimits};
use crate::api::failure::{self, ErrorForm};
use crate::api::routes::{self, Route};
use crate::error::{Failure, Kind};

/// How long a client may take to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Most bytes of a refused request's body that are read and thrown away.
const THROWN_AWAY: usize = 64 * 1024 * 1024;

/// A refusal, ready for the wire.
#[derive(Debug)]
pub struct Refusal {
    pub status: StatusCode,
    pub headers: Vec<(&'static str, String)>,
    /// In OpenAI's form, until [`Refusal::in_form`].
    pub body: Value,
    form: ErrorForm,
}

impl Refusal {
    /// As the clients of the request's route read it.
    pub fn in_form(self, form: ErrorForm, request_id: &str) -> Self {
        let body = form.body(self.status.as_u16(), self.body, request_id);
        Self { body, form, ..self }
    }

    /// The short form of the RunPod routes: `{"error": "…"}`.
    pub fn plain(failure: &Failure) -> Self {
        Self { body: json!({ "error": failure.message }), ..Self::from(failure) }
    }

    /// The same inside a stream whose status line is gone already, after so many events.
    pub fn sse(&self, events: usize) -> String {
        self.form.sse(self.status.as_u16(), &self.body, events)
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
        Self { status, headers: failure::headers(failure), body, form: ErrorForm::OpenAi }
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
    let failure =
        Failure::new(Kind::MethodNotAllowed, format!("{method} is not allowed on {path}; use {allow}.")).code("method_not_allowed");
    let mut refusal = Refusal::from(failure);
    refusal.headers.push(("allow", allow.to_owned()));
    refusal
}

/// Throws away the body of a request that is refused whatever it says. A client still busy sending would see a reset connection instead of
/// the answer; one that waits to be asked for its body is not asked, and one with an enormous body is cut off.
pub async fn throw_away(headers: &HeaderMap, body: Body) {
    if headers.contains_key(header::EXPECT) || announced(headers).is_some_and(|length| length > THROWN_AWAY) {
        return;
    }
    let read = async {
        let mut seen = 0usize;
        let mut stream = body.into_data_stream();
        while let Some(Ok(chunk)) = stream.next().await {
            seen = seen.saturating_add(chunk.len());
            if seen > THROWN_AWAY {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(BODY_TIMEOUT, read).await;
}

/// How long the body will be, if its sender says so.
fn announced(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// How a body is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Identity,
    Gzip,
}

/// What the headers say the body is; refused when it is nothing that is read here.
fn encoding(headers: &HeaderMap) -> Result<Encoding, Failure> {
    let text = |name| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).trim().to_ascii_lowercase());
    if let Some(kind) = text(header::CONTENT_TYPE).filter(|kind| kind.starts_with("multipart/")) {
        let kind = kind.split(';').next().unwrap_or_default();
        let message = format!("A body of type {kind} is not read here; send a JSON object as `application/json`.");
        return Err(Failure::new(Kind::UnsupportedMedia, message));
    }
    match text(header::CONTENT_ENCODING).as_deref() {
        None | Some("" | "identity") => Ok(Encoding::Identity),
        Some("gzip" | "x-gzip") => Ok(Encoding::Gzip),
        Some(other) => {
            let message = format!("A body compressed as `content-encoding: {other}` is not read here; send it plain or as gzip.");
            Err(Failure::new(Kind::UnsupportedMedia, message))
        }
    }
}

/// Uncompressed, at most `limit` bytes of it.
fn gunzip(body: &[u8], limit: usize) -> Result<Vec<u8>, Failure> {
    let mut plain = Vec::new();
    let read = flate2::read::MultiGzDecoder::new(body).take(limit as u64 + 1).read_to_end(&mut plain);
    match read {
        Ok(_) if plain.len() > limit => Err(too_large(limit)),
        Ok(_) => Ok(plain),
        Err(error) => Err(Failure::new(Kind::BadRequest, format!("The request body is not valid gzip: {error}."))),
    }
}

fn too_large(limit: usize) -> Failure {
    Failure::new(Kind::TooLarge, format!("The request body is larger than the limit of {limit} bytes."))
}

/// Reads a body of at most `limit` bytes, and uncompresses it.
///
/// A larger one is read to its end and thrown away before it is refused: a client still busy sending would see a reset connection instead
/// of the answer.
pub async fn read_body(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, Failure> {
    let encoding = match encoding(headers) {
        Ok(encoding) => encoding,
        Err(failure) => {
            throw_away(headers, body).await;
            return Err(failure);
        }
    };
    let announced = announced(headers);
    let waits_for_us = headers.get(header::EXPECT).is_some();
    let most = limit.saturating_mul(16).max(THROWN_AWAY);
    if announced.is_some_and(|length| length > limit && (waits_for_us || length > most)) {
        return Err(too_large(limit));
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
        if seen > limit { Err(too_large(limit)) } else { Ok(gathered) }
    };
    let body = match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(result) => result?,
        Err(_) => return Err(Failure::new(Kind::BadRequest, "The request body did not arrive within 60 seconds.")),
    };
    match encoding {
        Encoding::Identity => Ok(Bytes::from(body)),
        Encoding::Gzip => gunzip(&body, limit).map(Bytes::from),
    }
}

/// Parses a JSON object.
pub fn parse_object(headers: &HeaderMap, body: &[u8], limits: &BodyLimits) -> Result<Value, Failure> {
    check_object(headers, body)?;
    let value = body::read(body, limits)?;
    if value.is_object() { Ok(value) } else { Err(Failure::new(Kind::BadRequest, "The request body must be a JSON object.")) }
}

/// The body of a POST to this path; an empty object where it needs none and has none.
pub fn or_empty(body: Bytes, path: &str) -> Bytes {
    if body.is_empty() && routes::needs_no_body(path) { Bytes::from_static(b"{}") } else { body }
}

/// Looks whether there is a body at all. Any content type will do, except from a web page: browsers send other types without a preflight,
/// and any page could then post to an open server.
pub fn check_object(headers: &HeaderMap, body: &[u8]) -> Result<(), Failure> {
    if headers.contains_key(header::ORIGIN) && !is_json(headers) {
        return Err(Failure::new(Kind::BadRequest, "Requests from web pages need the header `content-type: application/json`."));
    }
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(Failure::new(Kind::BadRequest, "The request has no body; send a JSON object."));
    }
    Ok(())
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || essence.ends_with("+json")
}

/// The id of a request: the client's, or one of ours. In the extensions of every request that came through the [`gate`].
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

/// The id of a request that came through the [`gate`].
pub fn request_id(request: &axum::http::Extensions) -> String {
    request.get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default()
}

/// A path as the service reads it: with the query, where the route has pages.
pub fn with_page(path: String, uri: &Uri) -> String {
    match (routes::find(&path), uri.query()) {
        (Some(Route::InputItems { .. }), Some(query)) => format!("{path}?{query}"),
        _ => path,
    }
}

/// How the client of a request reads failures: by its path, under whatever door, and Anthropic's clients by their own header on the paths
/// that they share.
pub fn error_form(uri: &Uri, headers: &HeaderMap) -> ErrorForm {
    let path = uri.path();
    // `/v2/{id}/openai/v1/…`: the path is the part after the endpoint's id.
    let route = path.strip_prefix("/v2/").and_then(|rest| rest.split_once('/')).map_or(path, |(_, route)| route);
    let by_header = headers.contains_key("anthropic-version") && route.trim_end_matches('/').rsplit("v1/").next().is_some_and(is_models);
    if by_header { ErrorForm::Anthropic } else { routes::error_form(route) }
}

/// `models`, or one of them.
fn is_models(route: &str) -> bool {
    route == "models" || route.starts_with("models/")
}

/// What stands in front of every route.
pub struct Gate {
    pub keys: Keys,
    /// Origins that may call from a browser; empty = every one.
    pub allowed_origins: Vec<String>,
    /// Open besides `/health`, `/ping`, `/metrics`, `/load`, `/docs` and `/openapi.json`.
    pub health_path: String,
}

/// Gives each request an id, answers preflights, checks keys, and marks the response with id and CORS headers.
pub async fn gate(State(gate): State<Arc<Gate>>, mut request: Request, next: Next) -> Response {
    let id = id_of(request.headers());
    request.extensions_mut().insert(RequestId(id.clone()));
    let form = error_form(request.uri(), request.headers());
    let origin = request.headers().get(header::ORIGIN).cloned();
    let preflight = request.method() == Method::OPTIONS && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if preflight {
        answer_preflight(request.headers())
    } else if gate.guards(&request) {
        gate.keys.refresh().await;
        match gate.keys.admit(request.headers()) {
            Some(Caller::Unlimited) => next.run(request).await,
            Some(Caller::Client(client)) => of_client(client, request, next, form, &id).await,
            None => {
                let failure = unauthorized(request.headers());
                refuse(request, failure, form, &id).await
            }
        }
    } else {
        next.run(request).await
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        if form == ErrorForm::Anthropic {
            response.headers_mut().insert("request-id", value.clone());
        }
        response.headers_mut().insert("x-request-id", value);
    }
    if let Some(origin) = origin {
        gate.allow_origin(&origin, response.headers_mut());
    }
    response
}

/// Answers a request without reading it.
async fn refuse(request: Request, failure: Failure, form: ErrorForm, id: &str) -> Response {
    let (parts, body) = request.into_parts();
    throw_away(&parts.headers, body).await;
    Refusal::from(failure).in_form(form, id).into_response()
}

/// A request with a key that has a name, and limits.
async fn of_client(client: Client, mut request: Request, next: Next, form: ErrorForm, id: &str) -> Response {
    let mut response = if request.uri().path().starts_with("/v2/") {
        // What is used there is counted by workers, elsewhere.
        let message = format!("The key {:?} is for the direct routes (/v1/…); jobs and workers need a key of API_KEY.", client.key.name);
        refuse(request, Failure::new(Kind::Forbidden, message), form, id).await
    } else if request.method() == Method::POST {
        match client.admit().map(Arc::new) {
            Err(reached) => {
                let mut response = refuse(request, reached.failure, form, id).await;
                response.headers_mut().insert("retry-after-ms", reached.retry_after_ms.into());
                response
            }
            Ok(admission) => {
                request.extensions_mut().insert(client.clone());
                request.extensions_mut().insert(admission.clone());
                next.run(request).await.map(|body| Body::new(limits::Counted::new(body, admission)))
            }
        }
    } else {
        request.extensions_mut().insert(client.clone());
        next.run(request).await
    };
    client.write_headers(response.headers_mut());
    response
}

impl Gate {
    fn guards(&self, request: &Request) -> bool {
        let path = request.uri().path();
        let route = path.strip_suffix('/').unwrap_or(path);
        let open = matches!(route, "/health" | "/ping" | "/metrics" | "/load")
            || docs::PATHS.contains(&route)
            || path == self.health_path
            || route == self.health_path
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
        headers.insert(
            header::ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("x-request-id, request-id, retry-after, x-should-retry"),
        );
        if self.keys.has_file() {
            headers.append(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(limits::EXPOSED));
        }
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
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE, OPTIONS"));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
    let allowed = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned().unwrap_or(HeaderValue::from_static("*"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, allowed);
    headers.append(header::VARY, HeaderValue::from_static("access-control-request-headers"));
    response
}

/// The client's `x-request-id` when it is 1 to 128 printable ASCII characters, else a new one.
fn id_of(headers: &HeaderMap) -> String {
    headers
        .get("x-request-id")
        .and_then(|value| value.to_str().ok())
        .filter(|text| (1..=128).contains(&text.len()) && text.bytes().all(|byte| (b' '..=b'~').contains(&byte)))
        .map_or_else(|| format!("req-{}", uuid::Uuid::new_v4().simple()), str::to_owned)
}
