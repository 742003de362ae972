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
use super::limits::{Admission, Client};
use super::sse::{self, Pace};
use super::wire::{self, Refusal};
use crate::api::failure::ErrorForm;
use crate::api::{self, Call, Pieces, Reply};
use crate::error::{Failure, Kind};

/// Whatever answers calls: the service in production, a script in tests.
pub type Door = Arc<dyn Fn(Call) -> BoxFuture<'static, Result<Reply, Failure>> + Send + Sync>;

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
    let form = wire::error_form(request.uri(), request.headers());
    let request_id = wire::request_id(request.extensions());
    let answer = front.answer(request, form, &request_id).await;
    answer.unwrap_or_else(|refusal| refusal.in_form(form, &request_id).into_response())
}

impl Front {
    async fn answer(&self, request: Request, form: ErrorForm, request_id: &str) -> Result<Response, Refusal> {
        let (parts, body) = request.into_parts();
        let path = wire::with_page(parts.uri.path().to_owned(), &parts.uri);
        // A HEAD is a GET whose body the HTTP layer leaves out.
        let method = match self.admit(&parts, parts.uri.path()) {
            Ok(Admitted::About) => return Ok(Json(about()).into_response()),
            Ok(Admitted::Call(method)) => method,
            Err(refusal) => {
                wire::throw_away(&parts.headers, body).await;
                return Err(refusal);
            }
        };
        let body = if method == "POST" {
            let limits = (self.limits)();
            let bytes = wire::read_body(&parts.headers, body, limits.bytes).await?;
            wire::parse_object(&parts.headers, &wire::or_empty(bytes, &path), &limits)?
        } else {
            Value::Null
        };
        let client = parts.extensions.get::<Client>().map(|client| client.key.clone());
        let call = Call { method: method.to_owned(), path, body, request_id: request_id.to_owned(), client };
        let admission = parts.extensions.get::<Arc<Admission>>();
        let answer = match admission {
            Some(admission) => admission.tally.around((self.door)(call)).await,
            None => (self.door)(call).await,
        };
        match answer {
            Ok(Reply::Whole(value)) => {
                // Now, for the headers to tell what is left.
                admission.inspect(|admission| admission.charge());
                Ok((StatusCode::OK, Json(value)).into_response())
            }
            Ok(Reply::Stream(pieces)) => Ok(sse::respond(frames(pieces, form, request_id.to_owned()), self.pace).await),
            Err(failure) => Err(failure.into()),
        }
    }

    /// By path, method and readiness alone.
    fn admit(&self, parts: &Parts, path: &str) -> Result<Admitted, Refusal> {
        let Some(allowed) = api::routes::allow(path) else {
            let message = format!("There is no route {} {path}.", parts.method);
            return Err(Failure::new(Kind::NotFound, message).code("unknown_route").into());
        };
        let takes = |method: &str| allowed.split(", ").any(|taken| taken == method);
        let method = match parts.method {
            Method::GET | Method::HEAD if path == "/" => return Ok(Admitted::About),
            Method::GET | Method::HEAD if takes("GET") => "GET",
            Method::POST if takes("POST") => "POST",
            Method::DELETE if takes("DELETE") => "DELETE",
            _ => {
                return Err(wire::method_not_allowed(
                    &parts.method,
                    path,
                    if path == "/" { "GET, HEAD, POST" } else { with_head(allowed) },
                ));
            }
        };
        self.readiness.check()?;
        Ok(Admitted::Call(method))
    }
}

/// Where there is a GET, there is a HEAD.
fn with_head(allowed: &'static str) -> &'static str {
    match allowed {
        "GET" => "GET, HEAD",
        "GET, DELETE" => "GET, HEAD, DELETE",
        other => other,
    }
}

/// What a request is, when its path is there for its method.
enum Admitted {
    About,
    /// A call by this method.
    Call(&'static str),
}

/// What a browser sees at the root.
fn about() -> Value {
    json!({
        "name": "worker-candle",
        "version": env!("CARGO_PKG_VERSION"),
        "routes": ["/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/health", "/ping"],
    })
}

fn frames(pieces: Pieces, form: ErrorForm, request_id: String) -> sse::Frames {
    Box::pin(pieces.map(move |piece| match piece {
        Ok(Value::String(text)) => Ok(text),
        Ok(object) => Ok(format!("data: {object}\n\n")),
        Err(failure) => Err(Refusal::from(failure).in_form(form, &request_id)),
    }))
}
