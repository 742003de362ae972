//! The direct door: `/v1/…` and its aliases, straight into the service.
//!
//! Which paths and methods there are is the service's business: everything that is not a route of the server itself goes there, and an
//! unknown path comes back as its 404.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::StreamExt;
use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::health::Readiness;
use super::sse::{self, Pace};
use super::wire::{self, Refusal, RequestId};
use crate::api::{Answer, Call, Pieces};
use crate::error::{Failure, Kind};

/// Whatever answers calls: the service in production, a script in tests.
pub type Door = Arc<dyn Fn(Call) -> BoxFuture<'static, Result<Answer, Failure>> + Send + Sync>;

struct Front {
    door: Door,
    readiness: Arc<Readiness>,
    body_limit: usize,
    pace: Pace,
}

/// Everything but the health routes. It has the fallback: merge it into a router that has none.
pub fn router(door: Door, readiness: Arc<Readiness>, body_limit: usize, pace: Pace) -> Router {
    let front = Arc::new(Front { door, readiness, body_limit, pace });
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
        let post = match parts.method {
            Method::GET | Method::HEAD => false,
            Method::POST => true,
            ref other => return Err(wire::method_not_allowed(other, &path, "GET, POST")),
        };
        if path == "/" && !post {
            return Ok(Json(about()).into_response());
        }
        self.readiness.check()?;
        let body = if post {
            let bytes = wire::read_body(&parts.headers, body, self.body_limit).await?;
            wire::parse_object(&parts.headers, &bytes)?
        } else {
            Value::Null
        };
        let request_id = parts.extensions.get::<RequestId>().map(|id| id.0.clone()).unwrap_or_default();
        let method = if post { "POST" } else { "GET" };
        let call = Call { method: method.to_owned(), path: path.clone(), body, request_id };
        match (self.door)(call).await {
            Ok(Answer::Whole(value)) => Ok((StatusCode::OK, Json(value)).into_response()),
            Ok(Answer::Stream(pieces)) => Ok(sse::respond(frames(pieces), self.pace).await),
            Err(failure) if failure.kind == Kind::MethodNotAllowed => {
                let mut refusal = Refusal::from(failure);
                refusal.headers.push(("allow", if post { "GET" } else { "POST" }.to_owned()));
                Err(refusal)
            }
            Err(failure) => Err(failure.into()),
        }
    }
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
