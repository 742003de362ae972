//! Against a hub on loopback that answers as the real one does, and folders laid out as its caches.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, Response, StatusCode, header};
use axum::routing::get;
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::config::SecretString;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const ID: &str = "org/Tiny-Model";

/// A hub with one repository.
#[derive(Default)]
struct Hub {
    files: BTreeMap<String, Bytes>,
    token: Option<&'static str>,
    gated: bool,
    /// How many more transfers are cut in the middle, and how many more questions get a 503.
    cuts: AtomicUsize,
    busy: AtomicUsize,
    /// Files asked for.
    asked: Mutex<Vec<String>>,
    authorizations: Mutex<Vec<String>>,
}

impl Hub {
    fn with(files: &[(&str, &[u8])]) -> Self {
        let files = files.iter().map(|(name, bytes)| (name.to_string(), Bytes::copy_from_slice(bytes))).collect();
        Self { files, ..Self::default() }
    }

    async fn serve(self) -> (Arc<Self>, String) {
        let hub = Arc::new(self);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .route("/api/models/{owner}/{name}/revision/{revision}", get(info))
            .route("/{owner}/{name}/resolve/{revision}/{*file}", get(resolve))
            .with_state(hub.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (hub, address)
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    /// 401, 403 or 404, as the hub says them.
    fn refuse(&self, id: &str, revision: &str, headers: &HeaderMap) -> Option<Response<Body>> {
        let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        self.authorizations.lock().unwrap().push(authorization.to_owned());
        let (status, code) = if self.token.is_some_and(|token| authorization != format!("Bearer {token}")) {
            (401, "RepoNotFound")
        } else if self.gated {
            (403, "GatedRepo")
        } else if id != ID {
            (404, "RepoNotFound")
        } else if revision != "main" && revision != COMMIT {
            (404, "RevisionNotFound")
        } else {
            return None;
        };
        Some(Response::builder().status(status).header("x-error-code", code).body(Body::empty()).unwrap())
    }
}

fn count_down(counter: &AtomicUsize) -> bool {
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

async fn info(
    State(hub): State<Arc<Hub>>,
    UrlPath((owner, name, revision)): UrlPath<(String, String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    if count_down(&hub.busy) {
        return Response::builder().status(503).body(Body::empty()).unwrap();
    }
    if let Some(refusal) = hub.refuse(&format!("{owner}/{name}"), &revision, &headers) {
        return refusal;
    }
    let siblings: Vec<_> = hub.files.keys().map(|file| json!({"rfilename": file})).collect();
    Response::builder()
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(json!({"sha": COMMIT, "siblings": siblings, "id": ID}).to_string()))
        .unwrap()
}

async fn resolve(
    State(hub): State<Arc<Hub>>,
    UrlPath((owner, name, revision, file)): UrlPath<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    if let Some(refusal) = hub.refuse(&format!("{owner}/{name}"), &revision, &headers) {
        return refusal;
    }
    let Some(bytes) = hub.files.get(&file) else {
        return Response::builder().status(404).header("x-error-code", "EntryNotFound").body(Body::empty()).unwrap();
    };
    let range = headers.get(header::RANGE).and_then(|range| range.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')).unwrap();
    let start: usize = range.0.parse().unwrap();
    let end = (range.1.parse::<usize>().unwrap() + 1).min(bytes.len());
    let part = bytes.slice(start..end);
    let response = Response::builder()
        .status(StatusCode::PARTIAL_CONTENT)
        .header(header::ETAG, format!("\"etag-{}\"", file.replace('/', "-")))
        .header("x-repo-commit", COMMIT)
        .header(header::CONTENT_RANGE, format!("bytes {start}-{}/{}", end - 1, bytes.len()))
        .header(header::CONTENT_LENGTH, part.len());
    if part.len() > 1 {
        hub.asked.lock().unwrap().push(file.clone());
        if file.ends_with(".safetensors") && count_down(&hub.cuts) {
            let pieces = vec![Ok(part.slice(..part.len() / 2)), Err(std::io::Error::other("cut"))];
            return response.body(Body::from_stream(futures::stream::iter(pieces))).unwrap();
        }
    }
    response.body(Body::from(part)).unwrap()
}

fn settings(cache: &TempDir, endpoint: &str) -> HubSettings {
    HubSettings { endpoint: endpoint.to_owned(), caches: vec![cache.path().to_owned()], ..HubSettings::default() }
}

fn offline(cache: &TempDir) -> HubSettings {
    HubSettings { offline: true, ..settings(cache, "http://127.0.0.1:9") }
}

fn names(files: &ModelFiles) -> Vec<&str> {
    files.iter().map(|(name, _)| name).collect()
}

const TINY: &[(&str, &[u8])] = &[
    (".gitattributes", b"x "),
    ("README.md", b"read me"),
    ("added_tokens.json", b"{}"),
    ("chat_template.jinja", b"{{ messages }}"),
    ("config.json", b"{\"a\": 1}"),
    ("generation_config.json", b"{}"),
    ("model.safetensors", b"weights"),
    ("model_state.pdparams", b"pickle"),
    ("pytorch_model.bin", b"pickle"),
    ("tokenizer.model", b"pieces"),
    ("tokenizer_config.json", b"{}"),
];
const KEPT: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
];

#[tokio::test]
async fn downloads_what_is_needed_and_finds_it_again_without_the_network() {
    let cache = TempDir::new().unwrap();
    let (hub, endpoint) = Hub::with(TINY).serve().await;
    let files = fetch(ID, &settings(&cache, &endpoint)).await.unwrap();
    assert_eq!(names(&files), KEPT);
    assert_eq!(files.read("model.safetensors").unwrap().unwrap().as_ref(), b"weights");
    assert_eq!(files.name, ID);
    assert_eq!(hub.asked().len(), KEPT.len(), "{:?}", hub.asked());
    let reference = std::fs::read_to_string(cache.path().join("models--org--Tiny-Model/refs/main")).unwrap();
    assert_eq!(reference, COMMIT);

    let again = fetch(ID, &offline(&cache)).await.unwrap();
    assert_eq!(names(&again), KEPT);
    assert!(again.origin.contains(COMMIT), "{}", again.origin);
    assert!(find_local(ID, &offline(&cache)).unwrap().is_some());
    // Online too: nothing is asked.
    fetch(ID, &settings(&cache, &endpoint)).await.unwrap();
    assert_eq!(hub.asked().len(), KEPT.len());
}

#[tokio::test]
async fn only_the_shards_of_the_index_and_a_lost_one_is_fetched_again() {
    let cache = TempDir::new().unwrap();
    let index = json!({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}).to_string();
    let (hub, endpoint) = Hub::with(&[
        ("config.json", b"{}"),
        ("tokenizer.json", b"{}"),
        ("model-00001-of-00002.safetensors", b"first"),
        ("model-00002-of-00002.safetensors", b"second"),
        ("consolidated.safetensors", b"the same once more"),
        ("model.safetensors.index.json", index.as_bytes()),
    ])
    .serve()
    .await;
    let files = fetch(ID, &settings(&cache, &endpoint)).await.unwrap();
    assert!(!hub.asked().iter().any(|file| file == "consolidated.safetensors"));
    let Some(Source::Path(blob)) = files.get("model-00002-of-00002.safetensors") else { panic!("no path") };
    std::fs::remove_file(blob).unwrap();

    let failure = fetch(ID, &offline(&cache)).await.unwrap_err();
    assert!(failure.message.contains("model-00002-of-00002.safetensors, a shard of"), "{failure}");
    assert!(find_local(ID, &settings(&cache, &endpoint)).unwrap().is_none());
    // The link that now leads nowhere must not stop the second download.
    let files = fetch(ID, &settings(&cache, &endpoint)).await.unwrap();
    assert_eq!(files.read("model-00002-of-00002.safetensors").unwrap().unwrap().as_ref(), b"second");
}

/// The first of so many GGUF files of a model.
fn tiny_gguf(parts: u32) -> Vec<u8> {
    use crate::checkpoint::gguf::writer::{Value, write};
    let number = |key: &str, number: u32| (key.to_owned(), Value::U32(number));
    let metadata = [
        ("general.architecture".to_owned(), Value::Text("llama".into())),
        number("llama.block_count", 1),
        number("llama.embedding_length", 4),
        number("llama.feed_forward_length", 4),
        number("llama.attention.head_count", 2),
        number("split.count", parts),
    ];
    write(&metadata, &[("token_embd.weight".to_owned(), vec![2, 4], 0, vec![0; 32])])
}

#[tokio::test]
async fn of_gguf_files_the_one_that_is_meant_with_all_its_parts() {
    let (one, two) = (tiny_gguf(1), tiny_gguf(2));
    let big = ["big/m-BF16-00001-of-00002.gguf", "big/m-BF16-00002-of-00002.gguf"];
    let files: [(&str, &[u8]); 6] = [
        ("README.md", b"read me"),
        ("config.json", b"not looked at"),
        ("m-Q8_0.gguf", &one),
        ("mmproj-m.gguf", b"projector"),
        (big[0], &two),
        (big[1], b"GGUF"),
    ];
    let (hub, endpoint) = Hub::with(&files).serve().await;
    let cache = TempDir::new().unwrap();
    let failure = fetch(ID, &settings(&cache, &endpoint)).await.unwrap_err();
    assert!(failure.message.contains("big/m-BF16.gguf, m-Q8_0.gguf"), "{failure}");
    assert!(hub.asked().is_empty());
    let asked = |pick: &str| format!("{ID}:{pick}");
    let files = fetch(&asked("Q8_0"), &settings(&cache, &endpoint)).await.unwrap();
    assert_eq!(hub.asked(), ["m-Q8_0.gguf"]);
    assert_eq!(names(&files), ["config.json", "generation_config.json", "m-Q8_0.gguf", "tokenizer.gguf", "tokenizer_config.json"]);
    assert_eq!((files.name.as_str(), files.weight_files().unwrap()), ("org/Tiny-Model:Q8_0", vec!["m-Q8_0.gguf".to_owned()]));
    let files = fetch(&asked("bf16"), &settings(&cache, &endpoint)).await.unwrap();
    assert_eq!(files.weight_files().unwrap(), big);
    assert_eq!(hub.asked()[1..], big);
    // Found again, by the file's name too; what is not there is told without the network.
    for pick in ["Q8_0", "m-Q8_0.gguf", "bf16"] {
        assert!(find_local(&asked(pick), &offline(&cache)).unwrap().is_some(), "{pick}");
    }
    let failure = fetch(&asked("Q4_0"), &offline(&cache)).await.unwrap_err();
    assert!(failure.message.contains("a GGUF file \"Q4_0\" (there are big/m-BF16.gguf, m-Q8_0.gguf)"), "{failure}");
    let folder = TempDir::new().unwrap();
    let files = pull(&asked("BF16"), &settings(&cache, &endpoint), Some(folder.path())).await.unwrap();
    assert_eq!(files.weight_files().unwrap(), big);
    assert!(folder.path().join(big[1]).is_file() && !folder.path().join("tokenizer.gguf").exists());
    // A file of the set, wherever in it, stands for all of it.
    let file = folder.path().join(big[1]).to_string_lossy().into_owned();
    assert_eq!(find_local(&file, &offline(&cache)).unwrap().unwrap().weight_files().unwrap().len(), 2);
    let failure = find_local(&folder.path().join(".download").to_string_lossy(), &offline(&cache)).unwrap_err();
    assert!(failure.message.contains("neither a folder or GGUF file"), "{failure}");
}

#[test]
fn addresses_and_drives_are_no_gguf_files() {
    for name in ["http://host/model", "C:\\models\\m", "org/model:", "/no/such/folder:Q8_0"] {
        assert_eq!(Target::of(name).gguf, None, "{name}");
    }
    assert_eq!(Target::of("org/model:Q8_0").gguf, Some("Q8_0"));
}

#[tokio::test]
async fn a_cut_connection_and_a_busy_hub_are_tried_again() {
    let cache = TempDir::new().unwrap();
    let weights: Vec<u8> = (0..12_000_000u32).map(|index| (index * 7 + index / 251) as u8).collect();
    let hub = Hub::with(&[("config.json", b"{}"), ("tokenizer.json", b"{}"), ("model.safetensors", &weights)]);
    hub.cuts.store(2, Ordering::SeqCst);
    hub.busy.store(2, Ordering::SeqCst);
    let (hub, endpoint) = hub.serve().await;
    let files = fetch(ID, &settings(&cache, &endpoint)).await.unwrap();
    assert!(files.read("model.safetensors").unwrap().unwrap().as_ref() == weights, "the file differs");
    assert_eq!(hub.cuts.load(Ordering::SeqCst) + hub.busy.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_connection_that_is_always_cut_fails_and_leaves_no_half_model() {
    let cache = TempDir::new().unwrap();
    let hub = Hub::with(TINY);
    hub.cuts.store(1000, Ordering::SeqCst);
    let (_hub, endpoint) = hub.serve().await;
    let failure = fetch(ID, &settings(&cache, &endpoint)).await.unwrap_err();
    assert!(failure.message.contains("model.safetensors"), "{failure}");
    assert!(failure.message.contains("--model demo"), "{failure}");
    assert!(!cache.path().join("models--org--Tiny-Model/refs/main").exists());
    assert!(find_local(ID, &offline(&cache)).unwrap().is_none());
}

#[tokio::test]
async fn a_vocabulary_under_its_older_names_is_a_tokenizer() {
    for name in ["spm.model", "ernie_token_100k.model"] {
        let cache = TempDir::new().unwrap();
        let (_hub, endpoint) = Hub::with(&[("config.json", b"{}"), ("model.safetensors", b"weights"), (name, b"pieces")]).serve().await;
        let files = fetch(ID, &settings(&cache, &endpoint)).await.unwrap();
        assert!(names(&files).contains(&name), "{name}");
        assert!(find_local(ID, &offline(&cache)).unwrap().is_some(), "{name}");
    }
}

#[tokio::test]
async fn several_at_once_share_a_cache() {
    let cache = TempDir::new().unwrap();
    let (_hub, endpoint) = Hub::with(TINY).serve().await;
    let settings = settings(&cache, &endpoint);
    let all = futures::future::join_all((0..6).map(|_| fetch(ID, &settings))).await;
    for files in all {
        let files = files.unwrap();
        for (name, bytes) in TINY.iter().filter(|(name, _)| KEPT.contains(name)) {
            assert_eq!(files.read(name).unwrap().unwrap().as_ref(), *bytes, "{name}");
        }
    }
}

#[tokio::test]
async fn tokens_are_sent_and_never_told() {
    let cache = TempDir::new().unwrap();
    let (hub, endpoint) = Hub { token: Some("hf_right"), ..Hub::with(TINY) }.serve().await;
    let with = |token: Option<&str>| HubSettings { token: token.map(SecretString::from), ..settings(&cache, &endpoint) };
    let none = fetch(ID, &with(None)).await.unwrap_err();
    assert!(none.message.contains("401") && none.message.contains("set HF_TOKEN"), "{none}");
    let wrong = fetch(ID, &with(Some("hf_wr0ng"))).await.unwrap_err();
    assert!(wrong.message.contains("401") && !format!("{wrong:?}").contains("hf_wr0ng"), "{wrong}");
    assert!(fetch(ID, &with(Some("hf_right"))).await.is_ok());
    assert!(hub.authorizations.lock().unwrap().iter().any(|value| value == "Bearer hf_right"));
    assert!(fetch(ID, &with(Some("line\nbreak"))).await.is_ok(), "what is on disk needs no token");
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let cache = TempDir::new().unwrap();
    let (_hub, endpoint) = Hub { gated: true, ..Hub::with(TINY) }.serve().await;
    let gated = fetch(ID, &settings(&cache, &endpoint)).await.unwrap_err();
    assert!(gated.message.contains("gated") && gated.message.contains(&format!("{endpoint}/{ID}")), "{gated}");

    let (_hub, endpoint) = Hub::with(TINY).serve().await;
    let unknown = fetch("org/other", &settings(&cache, &endpoint)).await.unwrap_err();
    assert!(unknown.message.contains("404") && unknown.message.contains("check the model's name"), "{unknown}");
    let revision = HubSettings { revision: Some("v9".into()), ..settings(&cache, &endpoint) };
    let revision = fetch(ID, &revision).await.unwrap_err();
    assert!(revision.message.contains("no revision v9"), "{revision}");
    assert_eq!((revision.status(), revision.code), (404, Some("model_unavailable")));

    let (_hub, endpoint) = Hub::with(&[("README.md", b"text"), ("config.json", b"{}"), ("tokenizer.json", b"{}")]).serve().await;
    let empty = fetch(ID, &settings(&cache, &endpoint)).await.unwrap_err();
    assert!(empty.message.contains("lacks weights"), "{empty}");
}

#[tokio::test]
async fn an_unreachable_hub_is_named_without_its_password() {
    let cache = TempDir::new().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let failure = fetch(ID, &settings(&cache, &format!("http://me:s3cret@{address}"))).await.unwrap_err();
    assert!(failure.message.contains(&address.to_string()) && failure.message.contains("looked at"), "{failure}");
    assert!(!failure.message.contains("s3cret"), "{failure}");
}

#[tokio::test]
async fn a_commit_and_a_tokenizer_from_elsewhere() {
    let cache = TempDir::new().unwrap();
    let (_hub, endpoint) = Hub::with(&[("config.json", b"{}"), ("model.safetensors", b"weights")]).serve().await;
    let other = TempDir::new().unwrap();
    for name in ["tokenizer.json", "config.json", "chat_template.jinja"] {
        std::fs::write(other.path().join(name), "other").unwrap();
    }
    let tokenizer = Some(other.path().to_str().unwrap().to_owned());
    let settings = HubSettings { revision: Some(COMMIT.into()), tokenizer, ..settings(&cache, &endpoint) };
    let files = fetch(ID, &settings).await.unwrap();
    assert_eq!(names(&files), ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(files.read("config.json").unwrap().unwrap().as_ref(), b"{}");
    let again = find_local(ID, &HubSettings { offline: true, ..settings }).unwrap().unwrap();
    assert_eq!(names(&again), names(&files));
}

#[tokio::test]
async fn downloads_go_to_the_first_cache_that_can_be_written() {
    let (cache, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (_hub, endpoint) = Hub::with(TINY).serve().await;
    let blocked = other.path().join("file");
    std::fs::write(&blocked, "not a folder").unwrap();
    let settings = settings(&cache, &endpoint);
    let settings = HubSettings { caches: vec![blocked.join("hub"), cache.path().into()], ..settings };
    fetch(ID, &settings).await.unwrap();
    assert!(cache.path().join("models--org--Tiny-Model").is_dir());
    let failure = fetch("org/other", &HubSettings { caches: vec![blocked.join("hub")], ..settings }).await.unwrap_err();
    assert!(failure.message.contains("no cache folder can be written"), "{failure}");
}

#[tokio::test]
async fn pull_into_the_cache_and_into_a_folder() {
    let cache = TempDir::new().unwrap();
    let (hub, endpoint) = Hub::with(TINY).serve().await;
    assert_eq!(names(&pull(ID, &settings(&cache, &endpoint), None).await.unwrap()), KEPT);
    pull(ID, &settings(&cache, &endpoint), None).await.unwrap();
    assert_eq!(hub.asked().len(), KEPT.len(), "a second pull fetches nothing");

    let folder = cache.path().join("models/tiny");
    let files = pull(ID, &settings(&cache, &endpoint), Some(&folder)).await.unwrap();
    assert_eq!(names(&files), KEPT);
    let mut there: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    there.sort();
    assert_eq!(there, KEPT, "nothing else is left in the folder");
    assert_eq!(names(&fetch(folder.to_str().unwrap(), &offline(&cache)).await.unwrap()), KEPT);
    assert!(pull("../up", &settings(&cache, &endpoint), None).await.is_err());
    assert!(pull(ID, &offline(&cache), None).await.unwrap_err().message.contains("HF_HUB_OFFLINE"));
}

/// A cache with one snapshot per commit, files as links into `blobs`.
fn cached(root: &Path, repository: &str, commits: &[&str], main: Option<&str>) -> PathBuf {
    let repository = root.join(repository);
    std::fs::create_dir_all(repository.join("blobs")).unwrap();
    for commit in commits {
        let snapshot = repository.join("snapshots").join(commit);
        std::fs::create_dir_all(&snapshot).unwrap();
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            let blob = repository.join("blobs").join(format!("{commit}-{name}"));
            std::fs::write(&blob, commit).unwrap();
            std::os::unix::fs::symlink(format!("../../blobs/{commit}-{name}"), snapshot.join(name)).unwrap();
        }
    }
    if let Some(main) = main {
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::write(repository.join("refs/main"), format!("{main}\n")).unwrap();
    }
    repository
}

fn commit_found(model: &str, settings: &HubSettings) -> Option<String> {
    let files = find_local(model, settings).unwrap()?;
    let bytes = files.read("config.json").unwrap().unwrap();
    Some(String::from_utf8(bytes.to_vec()).unwrap())
}

#[test]
fn caches_by_reference_by_commit_and_by_order() {
    let cache = TempDir::new().unwrap();
    cached(cache.path(), "models--a--refs", &["aaa", "bbb"], Some("bbb"));
    cached(cache.path(), "models--a--bare", &["ccc", "aaa"], None);
    let settings = offline(&cache);
    assert_eq!(commit_found("a/refs", &settings).as_deref(), Some("bbb"));
    assert_eq!(commit_found("a/bare", &settings).as_deref(), Some("aaa"));
    let at = |revision: &str| HubSettings { revision: Some(revision.into()), ..settings.clone() };
    assert_eq!(commit_found("a/refs", &at("aaa")).as_deref(), Some("aaa"));
    assert_eq!(commit_found("a/refs", &at("zzz")), None);
    assert_eq!(commit_found("a/bare", &at("main")), None);
    assert!(find_local("a/refs", &at("../../etc")).is_err());
}

#[test]
fn names_in_lower_case_and_the_exact_one_first() {
    let cache = TempDir::new().unwrap();
    cached(cache.path(), "models--qwen--qwen3-0.6b", &["low"], Some("low"));
    let settings = offline(&cache);
    assert_eq!(commit_found("Qwen/Qwen3-0.6B", &settings).as_deref(), Some("low"));
    assert_eq!(find_local("Qwen/Qwen3-0.6B", &settings).unwrap().unwrap().name, "Qwen/Qwen3-0.6B");
    cached(cache.path(), "models--Qwen--Qwen3-0.6B", &["exact"], Some("exact"));
    assert_eq!(commit_found("Qwen/Qwen3-0.6B", &settings).as_deref(), Some("exact"));
    assert_eq!(commit_found("Qwen/Qwen3-0.6", &settings), None);
}

#[test]
fn places_in_order_and_paths_without_links() {
    let (cache, volume, root) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    cached(volume.path(), "models--a--m", &["volume"], Some("volume"));
    let settings = HubSettings {
        caches: vec![cache.path().into(), volume.path().into()],
        local_model_root: Some(root.path().into()),
        ..offline(&cache)
    };
    assert_eq!(commit_found("a/m", &settings).as_deref(), Some("volume"));
    let files = find_local("a/m", &settings).unwrap().unwrap();
    let Some(Source::Path(path)) = files.get("config.json") else { panic!("no path") };
    assert!(path.components().any(|part| part.as_os_str() == "blobs"), "{}", path.display());

    let repository = cached(cache.path(), "models--a--m", &["cache"], Some("cache"));
    assert_eq!(commit_found("a/m", &settings).as_deref(), Some("cache"));
    // A link that leads nowhere makes a snapshot incomplete: on to the next place.
    std::fs::remove_file(repository.join("blobs/cache-model.safetensors")).unwrap();
    assert_eq!(commit_found("a/m", &settings).as_deref(), Some("volume"));

    let local = root.path().join("m");
    std::fs::create_dir(&local).unwrap();
    for name in ["config.json", "tokenizer.model", "model.safetensors"] {
        std::fs::write(local.join(name), "local").unwrap();
    }
    assert_eq!(commit_found("a/m", &settings).as_deref(), Some("local"));
}

#[tokio::test]
async fn what_was_looked_at_is_told() {
    let cache = TempDir::new().unwrap();
    let settings = HubSettings { local_model_root: Some("/no/such/root".into()), ..offline(&cache) };
    let failure = fetch("a/none", &settings).await.unwrap_err();
    for part in ["/no/such/root/none (not there)", cache.path().to_str().unwrap(), "HF_HUB_OFFLINE", "--model demo", "pull a/none"] {
        assert!(failure.message.contains(part), "{part} in {failure}");
    }
    let folder = cache.path().to_str().unwrap();
    let failure = fetch(folder, &settings).await.unwrap_err();
    assert!(failure.message.contains("lacks a tokenizer"), "{failure}");
    let failure = fetch("/no/such/folder", &settings).await.unwrap_err();
    assert!(failure.message.contains("neither a folder"), "{failure}");
}

proptest! {
    /// No id and no revision leads out of the cache.
    #[test]
    fn ids_and_revisions_stay_inside(text in "[a-zA-Z0-9./\\\\_-]{0,24}") {
        let climbs = Path::new(&text).components().any(|part| !matches!(part, std::path::Component::Normal(_)));
        prop_assert!(!(climbs && folder::is_hub_id(&text)));
        prop_assert!(!(climbs && folder::is_revision(&text)));
    }
}
