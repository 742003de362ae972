//! Against a hub on loopback that answers as ModelScope does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::{HeaderMap, Response, header};
use axum::routing::get;
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::*;
use crate::config::{ModelSource, SecretString};

const ID: &str = "org/Tiny-Model";

#[derive(Default)]
struct Hub {
    files: BTreeMap<String, Bytes>,
    /// Hashes that the list has wrong.
    wrong: Vec<&'static str>,
    /// Paths that are listed and lead elsewhere.
    listed: Vec<&'static str>,
    token: Option<&'static str>,
    /// How many more transfers are cut in the middle, and how many more questions get a 503.
    cuts: AtomicUsize,
    busy: AtomicUsize,
    /// Files asked for, with the first byte that was.
    asked: Mutex<Vec<(String, usize)>>,
}

impl Hub {
    fn with(files: &[(&str, &[u8])]) -> Self {
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), Bytes::copy_from_slice(bytes))).collect();
        Self { files, ..Self::default() }
    }

    async fn serve(self) -> (Arc<Self>, String) {
        let hub = Arc::new(self);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .route("/api/v1/models/{owner}/{name}/repo/files", get(list))
            .route("/models/{owner}/{name}/resolve/{revision}/{*file}", get(resolve))
            .with_state(hub.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (hub, address)
    }

    fn asked(&self) -> Vec<(String, usize)> {
        self.asked.lock().unwrap().clone()
    }

    fn refuse(&self, id: &str, headers: &HeaderMap) -> Option<Response<Body>> {
        let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let status = match self.token {
            Some(token) if authorization != format!("Bearer {token}") => 401,
            _ if id != ID => 404,
            _ => return None,
        };
        Some(Response::builder().status(status).body(Body::empty()).unwrap())
    }
}

fn count_down(counter: &AtomicUsize) -> bool {
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

async fn list(
    State(hub): State<Arc<Hub>>,
    UrlPath((owner, name)): UrlPath<(String, String)>,
    Query(query): Query<BTreeMap<String, String>>,
    headers: HeaderMap,
) -> Response<Body> {
    if count_down(&hub.busy) {
        return Response::builder().status(503).body(Body::empty()).unwrap();
    }
    if let Some(refusal) = hub.refuse(&format!("{owner}/{name}"), &headers) {
        return refusal;
    }
    assert_eq!((query["Revision"].as_str(), query["Recursive"].as_str()), ("master", "true"));
    let hash = |name: &str, bytes: &[u8]| match hub.wrong.contains(&name) {
        true => "0".repeat(64),
        false => Sha256::digest(bytes).iter().map(|byte| format!("{byte:02X}")).collect(),
    };
    let mut files: Vec<_> = hub
        .files
        .iter()
        .map(|(name, bytes)| json!({"Path": name, "Name": name, "Size": bytes.len(), "Type": "blob", "Sha256": hash(name, bytes), "IsLFS": true}))
        .collect();
    files.push(json!({"Path": "assets", "Name": "assets", "Type": "tree", "Size": 0}));
    files.extend(hub.listed.iter().map(|path| json!({"Path": path, "Size": 1, "Type": "blob"})));
    let body = json!({"Code": 200, "Success": true, "Data": {"Files": files}});
    Response::builder().header(header::CONTENT_TYPE, "application/json").body(Body::from(body.to_string())).unwrap()
}

async fn resolve(
    State(hub): State<Arc<Hub>>,
    UrlPath((owner, name, revision, file)): UrlPath<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    if let Some(refusal) = hub.refuse(&format!("{owner}/{name}"), &headers) {
        return refusal;
    }
    assert_eq!(revision, "master");
    let bytes = &hub.files[&file];
    let start: usize = headers[header::RANGE].to_str().unwrap().trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
    hub.asked.lock().unwrap().push((file.clone(), start));
    let part = bytes.slice(start..);
    let response = Response::builder().status(206).header(header::CONTENT_LENGTH, part.len());
    if file.ends_with(".safetensors") && count_down(&hub.cuts) {
        let pieces = vec![Ok(part.slice(..part.len() / 2)), Err(std::io::Error::other("cut"))];
        return response.body(Body::from_stream(futures::stream::iter(pieces))).unwrap();
    }
    response.body(Body::from(part)).unwrap()
}

const TINY: &[(&str, &[u8])] = &[
    ("README.md", b"read me"),
    ("config.json", b"{\"a\": 1}"),
    ("configuration.json", b"{}"),
    ("model.safetensors", b"weights weights weights weights"),
    ("tekken.json", b"{}"),
];

fn settings(cache: &TempDir, endpoint: &str) -> HubSettings {
    let caches = vec![cache.path().to_owned()];
    HubSettings { source: ModelSource::ModelScope, endpoint: Some(endpoint.to_owned()), caches, ..HubSettings::default() }
}

fn names(files: &ModelFiles) -> Vec<&str> {
    files.iter().map(|(name, _)| name).collect()
}

#[tokio::test]
async fn a_model_is_fetched_once_and_found_offline() {
    let (hub, endpoint) = Hub::with(TINY).serve().await;
    let cache = tempfile::tempdir().unwrap();
    let files = fetch(ID, &settings(&cache, &endpoint)).await.unwrap();
    assert_eq!(names(&files), ["config.json", "model.safetensors", "tekken.json"]);
    assert_eq!(files.read("model.safetensors").unwrap().unwrap().as_ref(), TINY[3].1);
    let asked = hub.asked();
    assert_eq!(asked.len(), 3, "{asked:?}");
    let offline = HubSettings { offline: true, ..settings(&cache, "http://127.0.0.1:9") };
    assert_eq!(names(&fetch(ID, &offline).await.unwrap()), names(&files));
    // The other hub's model of that name is another.
    let other = HubSettings { source: ModelSource::HuggingFace, ..offline };
    assert!(fetch(ID, &other).await.unwrap_err().message.contains("not on this machine"));
    // Into a folder, where nothing else is left.
    let folder = tempfile::tempdir().unwrap();
    pull(ID, &settings(&cache, &endpoint), Some(folder.path())).await.unwrap();
    let mut there: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    there.sort();
    assert_eq!(there, ["config.json", "model.safetensors", "tekken.json"]);
}

#[tokio::test]
async fn what_breaks_goes_on_where_it_ended() {
    // More than a sender keeps back.
    let weights = b"weights ".repeat(1 << 17);
    let hub = Hub::with(&[TINY[1], ("model.safetensors", &weights), TINY[4]]);
    hub.cuts.store(2, Ordering::SeqCst);
    hub.busy.store(1, Ordering::SeqCst);
    let (hub, endpoint) = hub.serve().await;
    let cache = tempfile::tempdir().unwrap();
    let files = fetch(ID, &settings(&cache, &endpoint)).await.unwrap();
    assert!(*files.read("model.safetensors").unwrap().unwrap() == *weights);
    let starts: Vec<usize> = hub.asked().into_iter().filter(|(name, _)| name == "model.safetensors").map(|(_, start)| start).collect();
    assert!(starts.len() == 3 && starts.is_sorted() && starts[0] == 0 && starts[2] > 0, "{starts:?}");
}

#[tokio::test]
async fn what_is_not_what_was_listed_is_refused() {
    let cache = tempfile::tempdir().unwrap();
    let (_hub, endpoint) = Hub { wrong: vec!["config.json"], ..Hub::with(TINY) }.serve().await;
    let refused = fetch(ID, &settings(&cache, &endpoint)).await.unwrap_err();
    assert!(refused.message.contains("config.json: its SHA-256 is") && refused.message.contains("the hub says 000"), "{refused}");
    assert!(find_local(ID, &settings(&cache, &endpoint)).unwrap().is_none());
    for path in ["../out.json", "/etc/config.json", "a//config.json", ""] {
        let (_hub, endpoint) = Hub { listed: vec![path], ..Hub::with(TINY) }.serve().await;
        let refused = fetch(ID, &settings(&cache, &endpoint)).await.unwrap_err();
        assert!(refused.message.contains("no path in a repository"), "{refused}");
    }
}

#[tokio::test]
async fn keys_names_and_gguf_files() {
    let cache = tempfile::tempdir().unwrap();
    let (_hub, endpoint) = Hub { token: Some("secret"), ..Hub::with(TINY) }.serve().await;
    let refused = fetch(ID, &settings(&cache, &endpoint)).await.unwrap_err();
    assert!(refused.message.contains("set MODELSCOPE_API_TOKEN"), "{refused}");
    let with = HubSettings { token: Some(SecretString::from("secret")), ..settings(&cache, &endpoint) };
    let refused = fetch("org/Other", &with).await.unwrap_err();
    assert!(refused.message.contains("404") && refused.message.contains("REVISION (master)"), "{refused}");
    assert!(fetch(ID, &with).await.is_ok());
    let (hub, endpoint) = Hub::with(&[("config.json", b"{}"), ("m-Q8_0.gguf", b"GGUF"), ("m-Q4_K_M.gguf", b"GGUF")]).serve().await;
    let cache = tempfile::tempdir().unwrap();
    // Fetched, and then found to be no GGUF file.
    let refused = fetch(&format!("{ID}:q8_0"), &settings(&cache, &endpoint)).await.unwrap_err();
    assert!(refused.message.contains("m-Q8_0.gguf"), "{refused}");
    assert_eq!(hub.asked(), [("m-Q8_0.gguf".to_owned(), 0)]);
}
