//! Readiness, and the routes that tell it: `/ping` for RunPod's load balancer, `/health` for container platforms.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::json;

use crate::engine::Health;
use crate::error::{Failure, Kind};

/// Where the model behind this server stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Loading,
    Ready,
    /// Running requests end, new ones are refused.
    Draining,
    /// The model could not be loaded, or the engine died.
    Failed,
}

/// The phase, shared between whoever loads the model and the routes. Starts as [`Phase::Loading`].
#[derive(Debug, Default)]
pub struct Readiness {
    /// As it was set; a broken engine comes before it.
    phase: AtomicU8,
    /// The engine's own word, once there is an engine.
    engine: OnceLock<Health>,
}

impl Readiness {
    pub fn new(phase: Phase) -> Arc<Self> {
        let readiness = Arc::new(Self::default());
        readiness.set(phase);
        readiness
    }

    pub fn set(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// From here on requests are answered, for as long as the engine is sound.
    pub fn ready(&self, engine: Health) {
        let _ = self.engine.set(engine);
        self.set(Phase::Ready);
    }

    pub fn phase(&self) -> Phase {
        if self.engine.get().is_some_and(|engine| engine.failure().is_some()) {
            return Phase::Failed;
        }
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Loading,
            1 => Phase::Ready,
            2 => Phase::Draining,
            _ => Phase::Failed,
        }
    }

    /// `Ok` when requests can be answered, else what to answer instead.
    pub fn check(&self) -> Result<(), Failure> {
        match self.phase() {
            Phase::Ready => Ok(()),
            Phase::Loading => Err(Failure::new(Kind::Loading, "The model is still loading; try again in a few seconds.")),
            Phase::Draining => Err(Failure::new(Kind::Draining, "The server is shutting down and takes no new requests.")),
            Phase::Failed => Err(Failure::new(Kind::Draining, "The model failed; the server's log says why.").code("model_failed")),
        }
    }
}

/// `/health`, `/ping`, and `health_path` where it is another one; each with a slash after it or without.
pub fn router(readiness: Arc<Readiness>, health_path: &str) -> Router {
    let mut router = Router::new();
    for slash in ["", "/"] {
        router = router.route(&format!("/health{slash}"), get(health)).route(&format!("/ping{slash}"), get(ping).post(ping));
    }
    let trimmed = health_path.trim_end_matches('/');
    if trimmed != "/ping" && trimmed != "/health" {
        router = router.route(health_path, get(ping));
        if !trimmed.is_empty() {
            let other = if trimmed == health_path { format!("{trimmed}/") } else { trimmed.to_owned() };
            router = router.route(&other, get(ping));
        }
    }
    router.with_state(readiness)
}

/// The load balancer's convention: 204 while initialising, 200 healthy, anything else out of rotation.
async fn ping(State(readiness): State<Arc<Readiness>>) -> Response {
    match readiness.phase() {
        Phase::Loading => StatusCode::NO_CONTENT.into_response(),
        phase => report(phase),
    }
}

async fn health(State(readiness): State<Arc<Readiness>>) -> Response {
    report(readiness.phase())
}

fn report(phase: Phase) -> Response {
    let (status, text) = match phase {
        Phase::Loading => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
        Phase::Ready => (StatusCode::OK, "ok"),
        Phase::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        Phase::Failed => (StatusCode::SERVICE_UNAVAILABLE, "failed"),
    };
    (status, axum::Json(json!({ "status": text }))).into_response()
}
