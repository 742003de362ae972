//! The direct door: `/v1/…` and its aliases, straight into the service.
//!
//! Which paths and methods there are is the service's business, and it is asked before a body is read: a request for a path that is not
//! there costs no memory, however large it is.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::StreamExt;
use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::ModelLimits;
use super::health::Readiness;
use super::sse::{self, Pace};
use super::wire::{self, Refusal, RequestId};
use crate::api::{self, Answer, Call, Pieces};
use crate::error::{Failure, Kind};

/// Whatever answers calls: the service in production, a script in tests.
pub type Door = Arc<dyn Fn(Call) -> BoxFuture<'static, Result<Answer, Failure>> + Send + Sync>;

struct Front {
    door: Door,
    readiness: Arc<Readiness>,
    limits: ModelLimits,
    pace: Pace,
}

/// Everything but the health routes. It has the fallback: merge it into a router that has none.
pub fn router(door: Door, readiness: Arc<Readiness>, limits: ModelLimits, pace: Pace) -> Router {
    let front = Arc::new(Front { door, readiness, limits, pace });
    Router::new().route("/version", get(version)).fallback(call).with_state(front)
}

async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

async fn call(State(front): State<Arc<Front>>, request: Request) -> Response {
    front.answer(request).await.unwrap_or_else(Refusal::into_response)
}

impl Front {
    async fn answer(&self, request: Request) -> Result<Response, Refusal> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        // A HEAD is a GET whose body the HTTP layer leaves out.
        let post = match self.admit(&parts, &path) {
            Ok(Admitted::About) => return Ok(Json(about()).into_response()),
            Ok(Admitted::Get) => false,
            Ok(Admitted::Post) => true,
            Err(refusal) => {
                wire::throw_away(&parts.headers, body).await;
                return Err(refusal);
            }
        };
        let body = if post {
            let limits = (self.limits)();
            let bytes = wire::read_body(&parts.headers, body, limits.bytes).await?;
            wire::parse_object(&parts.headers, &bytes, &limits)?
        } else {
            Value::Null
        };
        let request_id = parts.extensions.get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default();
        let method = if post { "POST" } else { "GET" };
        let call = Call { method: method.to_owned(), path: path.clone(), body, request_id };
        match (self.door)(call).await {
            Ok(Answer::Whole(value)) => Ok((StatusCode::OK, Json(value)).into_response()),
            Ok(Answer::Stream(pieces)) => Ok(sse::respond(frames(pieces), self.pace).await),
            Err(failure) => Err(failure.into()),
        }
    }

    /// By path, method and readiness alone.
    fn admit(&self, parts: &Parts, path: &str) -> Result<Admitted, Refusal> {
        let Some(allowed) = api::routes::allow(path) else {
            let message = format!("There is no route {} {path}.", parts.method);
            return Err(Failure::new(Kind::NotFound, message).code("unknown_route").into());
        };
        let is_get = matches!(parts.method, Method::GET | Method::HEAD);
        let admitted = match (allowed, is_get) {
            _ if path == "/" && is_get => return Ok(Admitted::About),
            ("GET", true) => Admitted::Get,
            ("POST", false) if parts.method == Method::POST => Admitted::Post,
            ("GET", _) => return Err(wire::method_not_allowed(&parts.method, path, "GET, HEAD")),
            _ if path == "/" => return Err(wire::method_not_allowed(&parts.method, path, "GET, HEAD, POST")),
            _ => return Err(wire::method_not_allowed(&parts.method, path, allowed)),
        };
        self.readiness.check()?;
        Ok(admitted)
    }
}

/// What a request is, when its path is there for its method.
enum Admitted {
    About,
    Get,
    Post,
}

/// What a browser sees at the root.
fn about() -> Value {
    json!({
        "name": "worker-candle",
        "version": env!("CARGO_PKG_VERSION"),
        "routes": ["/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/ping"],
    })
}

fn frames(pieces: Pieces) -> sse::Frames {
    Box::pin(pieces.map(|piece| match piece {
        Ok(Value::String(text)) => Ok(text),
        Ok(object) => Ok(format!("data: {object}\n\n")),
        Err(failure) => Err(failure.into()),
    }))
}
