//! `/openapi.json` and `/docs`: the API described, for programs and for people. Both are there before the model is.

use axum::Json;
use axum::Router;
use axum::http::{HeaderName, header};
use axum::response::Html;
use axum::routing::get;
use serde_json::Value;

use crate::api::openapi;

/// The page. It shows whatever the document beside it says, and asks no other host.
const PAGE: &str = include_str!("docs.html");
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'";

/// The paths, for the gate to leave open.
pub const PATHS: &[&str] = &["/openapi.json", "/openai/openapi.json", "/docs", "/openai/docs"];

pub fn router() -> Router {
    PATHS.iter().fold(Router::new(), |router, path| match path.ends_with("/docs") {
        true => router.route(path, get(page)),
        false => router.route(path, get(document)),
    })
}

async fn document() -> Json<&'static Value> {
    Json(openapi::document())
}

async fn page() -> ([(HeaderName, &'static str); 1], Html<&'static str>) {
    ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(PAGE))
}
