//! The front doors over HTTP: the direct OpenAI server, and a local RunPod endpoint.
//!
//! The caller brings the socket and the end signal: [`run`]`(listener, router, shutdown, limit)`. The routers are assembled by
//! [`direct`] (OpenAI straight into the service, with or without the endpoint beside it), [`gateway`] (the endpoint alone) and [`health_only`] (the second
//! port of a load-balancing endpoint).

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::middleware;
use tokio::net::TcpListener;

use crate::api::body::BodyLimits;
use crate::config::{KeysFile, SecretString, ServerSettings, defaults};
use crate::error::{Failure, Kind};

pub mod auth;
pub mod connections;
mod docs;
pub mod endpoint;
pub mod health;
mod limits;
pub mod metrics;
pub mod openai;
pub mod sse;
pub mod tls;
mod watch;
mod wire;

#[cfg(test)]
mod tests;

pub use connections::ConnectionLimits;
pub use endpoint::Endpoints;
pub use health::{Phase, Readiness};
pub use metrics::Metrics;
pub use openai::Door;
pub use tls::{Listener, Tls};

/// The limits of the model's requests. Asked for each one, since the model comes later than the server.
pub type ModelLimits = Arc<dyn Fn() -> BodyLimits + Send + Sync>;

/// How the server behaves, whichever routes it has.
#[derive(Clone)]
pub struct ServerOptions {
    /// Empty = open.
    pub api_keys: Vec<SecretString>,
    /// Keys of clients with their limits, besides.
    pub keys_file: Option<KeysFile>,
    /// CORS; empty = every origin.
    pub allowed_origins: Vec<String>,
    /// Where a load balancer asks for readiness.
    pub health_path: String,
    /// The largest body of a direct request, in bytes.
    pub body_limit: usize,
    /// What the model can use of it, once there is a model.
    pub model_limits: Option<ModelLimits>,
    pub pace: sse::Pace,
    /// What `/metrics` and `/load` tell; without it there are no such routes.
    pub metrics: Option<Metrics>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            api_keys: Vec::new(),
            keys_file: None,
            allowed_origins: Vec::new(),
            health_path: defaults::HEALTH_PATH.to_owned(),
            body_limit: BodyLimits::default().bytes,
            model_limits: None,
            pace: sse::Pace::default(),
            metrics: None,
        }
    }
}

impl ServerOptions {
    fn limits(&self) -> ModelLimits {
        let (most, of_model) = (self.body_limit, self.model_limits.clone());
        Arc::new(move || {
            let limits = of_model.as_ref().map_or_else(BodyLimits::default, |limits| limits());
            BodyLimits { bytes: limits.bytes.min(most), ..limits }
        })
    }
}

impl From<&ServerSettings> for ServerOptions {
    fn from(settings: &ServerSettings) -> Self {
        let default = Self::default();
        Self {
            api_keys: settings.api_keys.clone(),
            keys_file: settings.keys_file.clone(),
            allowed_origins: settings.allowed_origins.clone(),
            health_path: settings.health_path.clone(),
            ..default
        }
    }
}

/// The direct OpenAI server; with `endpoints` a local RunPod endpoint beside it (`serve`).
pub fn direct(door: Door, readiness: Arc<Readiness>, endpoints: Option<&Endpoints>, options: &ServerOptions) -> Router {
    let router = openai::router(door, readiness.clone(), options.limits(), options.pace).merge(docs::router());
    let router = match endpoints {
        Some(endpoints) => router.merge(endpoints.router(options.pace)),
        None => router,
    };
    let router = match &options.metrics {
        Some(metrics) => router.merge(metrics::router(metrics.clone())),
        None => router,
    };
    finish(router.merge(health::router(readiness, &options.health_path)), options)
}

/// The local endpoint alone, with `/v1/…` routed by model name to the endpoint whose workers serve it.
pub fn gateway(endpoints: &Endpoints, readiness: Arc<Readiness>, options: &ServerOptions) -> Router {
    let router = endpoints.router(options.pace).merge(endpoints.models_router(options.pace));
    finish(router.merge(health::router(readiness, &options.health_path)), options)
}

/// What workers of the local endpoint call, and nothing else.
pub fn workers(endpoints: &Endpoints, options: &ServerOptions) -> Router {
    finish(endpoints.workers_router().fallback(not_found), options)
}

/// The health routes alone, for a health port of its own.
pub fn health_only(readiness: Arc<Readiness>, options: &ServerOptions) -> Router {
    finish(health::router(readiness, &options.health_path).fallback(not_found), options)
}

fn finish(router: Router, options: &ServerOptions) -> Router {
    let gate = wire::Gate {
        keys: auth::Keys::new(&options.api_keys).with_file(options.keys_file.as_ref()),
        allowed_origins: options.allowed_origins.clone(),
        health_path: options.health_path.clone(),
    };
    router.method_not_allowed_fallback(wrong_method).layer(middleware::from_fn_with_state(Arc::new(gate), wire::gate))
}

async fn not_found(request: Request) -> wire::Refusal {
    let (parts, body) = request.into_parts();
    wire::throw_away(&parts.headers, body).await;
    Failure::new(Kind::NotFound, format!("There is nothing at {}.", parts.uri.path())).into()
}

/// The `allow` header is added by the router, which knows the methods.
async fn wrong_method(request: Request) -> wire::Refusal {
    let (parts, body) = request.into_parts();
    wire::throw_away(&parts.headers, body).await;
    let message = format!("{} is not allowed on {}.", parts.method, parts.uri.path());
    Failure::new(Kind::MethodNotAllowed, message).code("method_not_allowed").into()
}

/// Serves until `shutdown` completes, then stops accepting and lets running responses end, for at most `limit`. Connections are limited as
/// by default; [`connections::serve`] takes other limits.
pub async fn run(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
    limit: Duration,
) -> io::Result<()> {
    connections::serve(listener, router, ConnectionLimits::default(), shutdown, limit).await
}
