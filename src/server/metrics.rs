//! `/metrics`, as Prometheus reads it, and `/load`. Open like the health routes: scrapers bring no key, and no figure tells what anybody wrote.

use std::sync::Arc;

use axum::http::header;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;

use crate::telemetry::metrics::Exposition;

/// Whatever knows the figures: the engine in production, a script in tests.
#[derive(Clone)]
pub struct Metrics {
    /// All of them, in Prometheus' text form.
    pub text: Arc<dyn Fn() -> String + Send + Sync>,
    /// Sequences that run or wait.
    pub load: Arc<dyn Fn() -> usize + Send + Sync>,
}

/// The two routes.
pub fn router(metrics: Metrics) -> Router {
    let Metrics { text, load } = metrics;
    Router::new()
        .route("/metrics", get(move || async move { ([(header::CONTENT_TYPE, Exposition::CONTENT_TYPE)], text()) }))
        .route("/load", get(move || async move { Json(json!({ "server_load": load() })) }))
}
