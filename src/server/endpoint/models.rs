//! `/v1/…` at a gateway: the model's name picks the endpoint.
//!
//! With one endpoint that has workers there is nothing to pick. With several, each is asked what it serves by a `/v1/models` job, like any
//! client would, and the answer is kept for a while.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::Method;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use futures::future::join_all;
use serde_json::{Value, json};

use super::Endpoints;
use super::job::{Order, Origin, Status};
use super::openai::{self, Caller, Incoming};
use super::queue::{CancelOnDrop, Queue};
use crate::api;
use crate::error::{Failure, Kind};
use crate::server::sse::Pace;
use crate::server::wire::{self, Refusal};

/// How long an answer is believed.
const FRESH: Duration = Duration::from_secs(60);
/// An answer older than this is asked for again before a name counts as unknown.
const RECENT: Duration = Duration::from_secs(2);
/// How long to wait for one.
const PATIENCE: Duration = Duration::from_secs(20);

/// The model objects an endpoint serves, and when it said so.
#[derive(Default)]
pub struct Known(tokio::sync::Mutex<Option<(Instant, Vec<Value>)>>);

/// The model names that mean "whatever is served".
fn is_any(model: &str) -> bool {
    matches!(model, "" | "null" | "default")
}

pub fn router(endpoints: Endpoints, pace: Pace) -> Router {
    Router::new().fallback(handle).with_state((endpoints, pace))
}

async fn handle(State((endpoints, pace)): State<(Endpoints, Pace)>, request: Request) -> Result<Response, Refusal> {
    let caller = Caller::of(&request);
    answer(&endpoints, pace, request, &caller).await.map_err(|refusal| caller.refuse(refusal))
}

async fn answer(endpoints: &Endpoints, pace: Pace, request: Request, caller: &Caller) -> Result<Response, Refusal> {
    let uri = request.uri().clone();
    let path = uri.path().to_owned();
    if path == "/" && matches!(*request.method(), Method::GET | Method::HEAD) {
        let about = json!({ "name": "worker-candle gateway", "version": env!("CARGO_PKG_VERSION") });
        return Ok(Json(about).into_response());
    }
    let route = path.strip_prefix("/openai").unwrap_or(&path).trim_end_matches('/').to_owned();
    // Workers of other makes have `/v1/` routes of their own; ours have some besides.
    if !route.starts_with("/v1/") && (route.is_empty() || api::routes::allow(&route).is_none()) {
        let (parts, body) = request.into_parts();
        wire::throw_away(&parts.headers, body).await;
        return Err(Failure::new(Kind::NotFound, format!("There is nothing at {path}.")).into());
    }
    let call = Incoming::read(request, &route, endpoints.shared.options.sync_limit).await?;
    let served = endpoints.served();
    if route == "/v1/models" && call.body.is_none() && served.len() > 1 {
        return Ok(Json(json!({ "object": "list", "data": all(&served).await })).into_response());
    }
    let model = match (&call.body, route.strip_prefix("/v1/models/")) {
        (Some(body), _) if body.model.is_empty() => api::routes::model(&route).unwrap_or_default(),
        (Some(body), _) => body.model.clone(),
        (None, Some(name)) => name.replace("%2F", "/").replace("%2f", "/"),
        (None, None) => String::new(),
    };
    let queue = pick(served, &model).await?;
    let route = wire::with_page(route, &uri);
    openai::relay(queue, &route, call, pace, caller).await
}

/// The endpoint that serves `model`; the least loaded one of several.
async fn pick(mut served: Vec<(String, Arc<Queue>)>, model: &str) -> Result<Arc<Queue>, Failure> {
    match served.len() {
        0 => return Err(Failure::new(Kind::Loading, "No worker is attached to this gateway yet.").code("no_worker")),
        1 => return Ok(served.remove(0).1),
        _ => {}
    }
    if is_any(model) {
        let names = names(&all(&served).await);
        return Err(Failure::bad_request("model", format!("Several models are served here; name one of them: {names}.")));
    }
    for age in [FRESH, RECENT] {
        let lists = join_all(served.iter().map(|(_, queue)| list(queue, age))).await;
        let serving = served.iter().zip(&lists).filter(|(_, models)| models.iter().any(|object| object["id"] == model));
        if let Some(((_, queue), _)) = serving.min_by_key(|((_, queue), _)| queue.look(|state| state.load())) {
            return Ok(queue.clone());
        }
    }
    let names = names(&all(&served).await);
    let text = format!("The model `{model}` does not exist. Served here: {names}.");
    Err(Failure::new(Kind::NotFound, text).param("model").code("model_not_found"))
}

/// Every model object of every endpoint, each id once.
async fn all(served: &[(String, Arc<Queue>)]) -> Vec<Value> {
    let mut models: Vec<Value> = Vec::new();
    for object in join_all(served.iter().map(|(_, queue)| list(queue, FRESH))).await.into_iter().flatten() {
        if !models.iter().any(|known| known["id"] == object["id"]) {
            models.push(object);
        }
    }
    models
}

fn names(models: &[Value]) -> String {
    models.iter().filter_map(|object| object["id"].as_str()).collect::<Vec<_>>().join(", ")
}

/// What an endpoint serves, at most `age` old; the last known answer when it does not say in time.
async fn list(queue: &Arc<Queue>, age: Duration) -> Vec<Value> {
    // Whoever comes while the question is out waits for the same answer.
    let mut known = queue.models.0.lock().await;
    if let Some((since, models)) = known.as_ref()
        && since.elapsed() < age
    {
        return models.clone();
    }
    // Silence is remembered too: one endpoint whose workers do not answer must not hold up every call for the others.
    let models = match ask(queue).await {
        Some(models) => models,
        None => known.take().map(|(_, models)| models).unwrap_or_default(),
    };
    known.insert((Instant::now(), models)).1.clone()
}

async fn ask(queue: &Arc<Queue>) -> Option<Vec<Value>> {
    let id = queue.submit(Order::new(Origin::OpenAi, r#"{"openai_route":"/v1/models"}"#.into(), 0)).ok()?;
    let mut ticket = CancelOnDrop::new(queue.clone(), id);
    let (status, mut report) = queue.wait_end(ticket.id(), Instant::now() + PATIENCE).await.ok()?;
    if status != Status::Completed {
        return None;
    }
    ticket.disarm();
    let output = match report["output"].take() {
        Value::Array(mut items) if items.len() == 1 => items.remove(0),
        Value::String(text) => serde_json::from_str(&text).ok()?,
        output => output,
    };
    output["data"].as_array().cloned()
}
