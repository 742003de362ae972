//! `/metrics`, as Prometheus reads it. Open like the health routes: scrapers bring no key, and no figure tells what anybody wrote.

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::routing::get;

use crate::telemetry::metrics::Exposition;

/// Whatever writes the text: the engine in production, a script in tests.
pub type Metrics = Arc<dyn Fn() -> String + Send + Sync>;

/// The one route.
pub fn router(metrics: Metrics) -> Router {
    Router::new().route("/metrics", get(move || async move { ([(header::CONTENT_TYPE, Exposition::CONTENT_TYPE)], metrics()) }))
}
