//! The direct door over real sockets, with a scripted service behind it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::future::FutureExt;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};

use super::*;
use crate::api::{Call, Reply};
use crate::error::{Failure, Kind};

/// A server on a port of its own; it ends when this is dropped.
pub(super) struct Running {
    pub base: String,
    pub address: std::net::SocketAddr,
    pub end: Option<oneshot::Sender<()>>,
    pub task: tokio::task::JoinHandle<io::Result<()>>,
}

pub(super) async fn start(router: Router) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (end, ended) = oneshot::channel::<()>();
    let shutdown = async move {
        let _ = ended.await;
    };
    let task = tokio::spawn(run(listener, router, shutdown, Duration::from_secs(5)));
    Running { base: format!("http://{address}"), address, end: Some(end), task }
}

/// Answers with what it was asked, or as `model` says.
fn echo() -> Door {
    Arc::new(|call: Call| {
        async move {
            match call.body["model"].as_str() {
                Some("missing") => {
                    Err(Failure::new(Kind::NotFound, "The model `missing` does not exist.").param("model").code("model_not_found"))
                }
                Some("busy") => Err(Failure::new(Kind::Overloaded, "full").retry_after(7)),
                Some("late") => Ok(Reply::Stream(
                    futures::stream::iter([Err(Failure::bad_request("prompt", "too long").code("context_length_exceeded"))]).boxed(),
                )),
                Some("broken") => {
                    Ok(Reply::Stream(futures::stream::iter([Ok(json!("data: {\"n\":1}\n\n")), Err(Failure::internal("gone"))]).boxed()))
                }
                Some("stream") => Ok(Reply::Stream(
                    futures::stream::iter([
                        Ok(json!("data: {\"t\":\"ü\"}\n\n")),
                        Ok(json!("data: {\"n\":2}\n\ndata: {\"n\":3}\n\n")),
                        Ok(json!("data: [DONE]\n\n")),
                    ])
                    .boxed(),
                )),
                _ => Ok(Reply::Whole(json!({ "method": call.method, "path": call.path, "body": call.body, "id": call.request_id }))),
            }
        }
        .boxed()
    })
}

async fn serve(options: &ServerOptions) -> (Running, Arc<Readiness>) {
    let readiness = Readiness::new(Phase::Ready);
    (start(direct(echo(), readiness.clone(), None, options)).await, readiness)
}

/// A server with a key of its own and a file of clients' keys.
async fn with_keys(folder: &std::path::Path, text: &str) -> Running {
    let path = folder.join("keys.yaml");
    std::fs::write(&path, text).unwrap();
    let keys_file = Some(KeysFile::read(&path).unwrap());
    serve(&ServerOptions { api_keys: vec![SecretString::from("own")], keys_file, ..ServerOptions::default() }).await.0
}

#[tokio::test]
async fn keys_of_a_file_have_limits_and_headers_that_tell_them() {
    let folder = tempfile::tempdir().unwrap();
    let server = with_keys(folder.path(), "- {name: a, key: x, requests_per_minute: 3, max_concurrency: 1, models: [m]}\n").await;
    let client = reqwest::Client::new();
    let post = |key: &str, model: &str| {
        let post = client.post(format!("{}/v1/chat/completions", server.base)).bearer_auth(key);
        post.header("origin", "http://page").json(&json!({ "model": model })).send()
    };
    for (model, left) in [("m", "2"), ("missing", "1"), ("stream", "0")] {
        let response = post("x", model).await.unwrap();
        assert_eq!(response.headers()["x-ratelimit-remaining-requests"], left, "{model}");
        assert!(response.headers().get_all("access-control-expose-headers").iter().any(|names| names == limits::EXPOSED));
        if model == "m" {
            assert!(response.headers().contains_key("content-length"), "a whole answer keeps its length");
        }
        response.text().await.unwrap();
    }
    let response = post("x", "m").await.unwrap();
    let wait: u64 = response.headers()["retry-after-ms"].to_str().unwrap().parse().unwrap();
    assert!((1..=20_000).contains(&wait), "{wait}");
    assert_eq!(refused(response, 429).await["error"]["code"], "rate_limit_exceeded");
    // Other questions are not counted; the key of the settings has no limits and no such headers; the local endpoint is not for clients.
    let get = |path: &str| client.get(format!("{}{path}", server.base)).bearer_auth("x").send();
    assert_eq!(get("/v1/models").await.unwrap().status(), 200);
    assert_eq!(refused(get("/v2/local/health").await.unwrap(), 403).await["error"]["code"], "not_allowed");
    let response = post("own", "m").await.unwrap();
    assert!(response.status() == 200 && !response.headers().contains_key("x-ratelimit-limit-requests"));
    refused(post("other", "m").await.unwrap(), 401).await;
}

/// Checks the superset body that every family of clients reads.
async fn refused(response: reqwest::Response, status: u16) -> Value {
    assert_eq!(response.status(), status);
    assert!(response.headers().contains_key("x-request-id"));
    let body: Value = response.json().await.unwrap();
    for key in ["message", "type", "param", "code"] {
        assert!(body["error"].get(key).is_some(), "{key} in {body}");
    }
    assert_eq!(body["object"], "error");
    assert_eq!(body["message"], body["error"]["message"]);
    assert!(body["code"].is_u64());
    body
}

#[tokio::test]
async fn calls_reach_the_service_as_they_were_sent() {
    let (server, _) = serve(&ServerOptions::default()).await;
    let client = reqwest::Client::new();
    let post = client.post(format!("{}/openai/v1/chat/completions", server.base)).header("x-request-id", "abc").json(&json!({"a": 1}));
    let response = post.send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "abc");
    let body: Value = response.json().await.unwrap();
    assert_eq!(body, json!({"method": "POST", "path": "/openai/v1/chat/completions", "body": {"a": 1}, "id": "abc"}));

    let response = client.get(format!("{}/v1/models/org%2Fname?limit=3", server.base)).send().await.unwrap();
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let body: Value = response.json().await.unwrap();
    assert_eq!(body, json!({"method": "GET", "path": "/v1/models/org%2Fname", "body": null, "id": id}));

    let response = client.head(format!("{}/v1/models", server.base)).send().await.unwrap();
    assert_eq!(response.status(), 200);
    // `POST /` is chat; `GET /` is not.
    let body: Value = client.post(&server.base).json(&json!({})).send().await.unwrap().json().await.unwrap();
    assert_eq!(body["path"], "/");
    let body: Value = client.get(&server.base).send().await.unwrap().json().await.unwrap();
    assert_eq!(body["name"], "worker-candle");
    let body: Value = client.get(format!("{}/version", server.base)).send().await.unwrap().json().await.unwrap();
    assert_eq!(body, json!({"version": env!("CARGO_PKG_VERSION")}));
}

#[tokio::test]
async fn every_bad_body_is_a_400_in_the_envelope() {
    let (server, _) = serve(&ServerOptions::default()).await;
    let client = reqwest::Client::new();
    let url = format!("{}/v1/chat/completions", server.base);
    let deep = format!("{{\"a\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
    let bodies: [&[u8]; 8] = [b"", b"  \n", b"{", b"[1]", b"\"x\"", b"{\"a\":\"\xff\"}", b"{\"a\":NaN}", deep.as_bytes()];
    for body in bodies {
        let response = client.post(&url).body(body.to_vec()).send().await.unwrap();
        let body = refused(response, 400).await;
        assert_eq!(body["error"]["type"], "invalid_request_error");
        assert_eq!(body["code"], 40001);
    }
    // curl users forget the content type.
    let response = client.post(&url).header("content-type", "application/x-www-form-urlencoded").body("{\"a\":1}").send().await.unwrap();
    assert_eq!(response.status(), 200);
    // Web pages may not.
    let page = client.post(&url).header("origin", "http://evil.example").header("content-type", "text/plain");
    refused(page.body("{\"a\":1}").send().await.unwrap(), 400).await;
    let page = client.post(&url).header("origin", "http://good.example").header("content-type", "application/json; charset=utf-8");
    assert_eq!(page.body("{\"a\":1}").send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_body_over_the_limit_is_a_413_however_it_is_sent() {
    let (server, _) = serve(&ServerOptions { body_limit: 1000, ..ServerOptions::default() }).await;
    let client = reqwest::Client::new();
    let url = format!("{}/v1/chat/completions", server.base);
    let fits = format!("{{\"a\":\"{}\"}}", "x".repeat(1000 - 8));
    assert_eq!(fits.len(), 1000);
    assert_eq!(client.post(&url).body(fits).send().await.unwrap().status(), 200);
    for size in [1001, 1500, 100_000] {
        let body = refused(client.post(&url).body("x".repeat(size)).send().await.unwrap(), 413).await;
        assert_eq!(body["error"]["code"], "request_too_large");
    }
    let chunks = futures::stream::iter((0..15).map(|_| Ok::<_, io::Error>("y".repeat(100))));
    refused(client.post(&url).body(reqwest::Body::wrap_stream(chunks)).send().await.unwrap(), 413).await;
}

#[tokio::test]
async fn failures_of_the_service_keep_status_code_and_hints() {
    let (server, _) = serve(&ServerOptions::default()).await;
    let client = reqwest::Client::new();
    let url = format!("{}/v1/chat/completions", server.base);
    let body = refused(client.post(&url).json(&json!({"model": "missing"})).send().await.unwrap(), 404).await;
    assert_eq!((&body["error"]["code"], &body["error"]["param"]), (&json!("model_not_found"), &json!("model")));
    let response = client.post(&url).json(&json!({"model": "busy"})).send().await.unwrap();
    assert_eq!(response.headers()["retry-after"], "7");
    refused(response, 429).await;
}

#[tokio::test]
async fn anthropics_clients_are_refused_in_their_own_form() {
    let options = ServerOptions { api_keys: vec![SecretString::from("k")], ..ServerOptions::default() };
    let (server, readiness) = serve(&options).await;
    let client = reqwest::Client::new();
    let url = format!("{}/v1/messages", server.base);
    let post = |model: &str| client.post(&url).header("x-api-key", "k").json(&json!({ "model": model }));
    let get = |path: &str| client.get(format!("{}{path}", server.base)).header("x-api-key", "k").header("anthropic-version", "2023-06-01");
    let check = async |request: reqwest::RequestBuilder, status: u16, kind: &str| {
        let response = request.header("x-request-id", "abc").send().await.unwrap();
        assert_eq!((response.status().as_u16(), &response.headers()["request-id"]), (status, &"abc".parse().unwrap()));
        let body: Value = response.json().await.unwrap();
        assert_eq!((&body["type"], &body["error"]["type"], &body["request_id"]), (&json!("error"), &json!(kind), &json!("abc")));
    };
    check(client.post(&url).json(&json!({})), 401, "authentication_error").await;
    check(post("missing"), 404, "not_found_error").await;
    check(post("busy"), 429, "rate_limit_error").await;
    check(post("late"), 400, "invalid_request_error").await;
    check(get("/v1/messages"), 405, "invalid_request_error").await;
    check(get("/v1/messages/batches"), 404, "not_found_error").await;
    readiness.set(Phase::Loading);
    check(post("x"), 503, "overloaded_error").await;
    check(get("/v1/models/x"), 503, "overloaded_error").await;
    // Others read OpenAI's envelope.
    refused(client.get(format!("{}/v1/models/x", server.base)).header("x-api-key", "k").send().await.unwrap(), 503).await;
    readiness.set(Phase::Ready);
    let response = post("x").send().await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers().contains_key("request-id")), (200, true));
}

#[tokio::test]
async fn a_path_that_is_not_there_is_a_404_whatever_is_sent_to_it() {
    let (server, _) = serve(&ServerOptions { body_limit: 1000, ..ServerOptions::default() }).await;
    let client = reqwest::Client::new();
    for path in ["/nope", "/v1/nowhere", "/v2/ep/run", "/v1"] {
        let url = format!("{}{path}", server.base);
        for method in ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"] {
            let response = client.request(method.parse().unwrap(), &url).send().await.unwrap();
            assert!(!response.headers().contains_key("allow"), "{method} {path}");
            assert_eq!(refused(response, 404).await["error"]["code"], "unknown_route", "{method} {path}");
        }
        // Larger than any body may be, no JSON, or a form: nobody looks.
        refused(client.post(&url).body("x".repeat(1 << 20)).send().await.unwrap(), 404).await;
        refused(client.post(&url).header("content-type", "multipart/form-data; boundary=x").body("--x--").send().await.unwrap(), 404).await;
    }
}

#[tokio::test]
async fn a_gzip_body_is_read_and_other_forms_are_a_415() {
    use std::io::Write;
    let (server, _) = serve(&ServerOptions { body_limit: 1000, ..ServerOptions::default() }).await;
    let client = reqwest::Client::new();
    let url = format!("{}/v1/chat/completions", server.base);
    let gzip = |plain: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    };
    let post = |encoding: &str, body: Vec<u8>| client.post(&url).header("content-encoding", encoding.to_owned()).body(body).send();
    let body: Value = post("gzip", gzip(b"{\"a\":1}")).await.unwrap().json().await.unwrap();
    assert_eq!(body["body"], json!({"a": 1}));
    // A small body that unfolds to a large one.
    refused(post("gzip", gzip(format!("{{\"a\":\"{}\"}}", "x".repeat(1 << 20)).as_bytes())).await.unwrap(), 413).await;
    refused(post("gzip", b"{\"a\":1}".to_vec()).await.unwrap(), 400).await;
    let body = refused(post("br", vec![1, 2, 3]).await.unwrap(), 415).await;
    assert_eq!(body["error"]["code"], "unsupported_media_type");
    assert!(body["message"].as_str().unwrap().contains("gzip"));
    let form = client.post(&url).header("content-type", "multipart/form-data; boundary=x").body("--x--");
    let body = refused(form.send().await.unwrap(), 415).await;
    assert!(body["message"].as_str().unwrap().contains("application/json"));
}

#[tokio::test]
async fn a_body_of_too_many_values_is_a_413() {
    let limits = crate::api::body::BodyLimits { bytes: 1 << 20, tree: 1 << 20, depth: 100 };
    let (server, _) = serve(&ServerOptions { model_limits: Some(Arc::new(move || limits)), ..ServerOptions::default() }).await;
    let client = reqwest::Client::new();
    let url = format!("{}/v1/chat/completions", server.base);
    let objects = format!("{{\"a\":[{}0]}}", "{\"b\":1},".repeat(10_000));
    let body = refused(client.post(&url).body(objects).send().await.unwrap(), 413).await;
    assert!(body["message"].as_str().unwrap().contains("too many values"));
    let text = format!("{{\"a\":\"{}\"}}", "x".repeat(500_000));
    assert_eq!(client.post(&url).body(text).send().await.unwrap().status(), 200);
    refused(client.post(&url).body("x".repeat((1 << 20) + 1)).send().await.unwrap(), 413).await;
}

#[tokio::test]
async fn a_wrong_method_is_a_405_that_names_the_right_one() {
    let (server, _) = serve(&ServerOptions::default()).await;
    let client = reqwest::Client::new();
    let table = [
        ("DELETE", "/v1/models", "GET, HEAD"),
        // What is in the body of a request that is not for this path is nobody's business.
        ("POST", "/v1/models", "GET, HEAD"),
        ("GET", "/v1/completions", "POST"),
        ("PUT", "/v1/chat/completions", "POST"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        ("PUT", "/", "GET, HEAD, POST"),
    ];
    for (method, path, allow) in table {
        let response = client.request(method.parse().unwrap(), format!("{}{path}", server.base)).body("no JSON").send().await.unwrap();
        assert_eq!(response.headers()["allow"], allow, "{method} {path}");
        assert_eq!(refused(response, 405).await["error"]["code"], "method_not_allowed");
    }
    let response = client.post(format!("{}/health", server.base)).send().await.unwrap();
    assert!(response.headers()["allow"].to_str().unwrap().contains("GET"));
    refused(response, 405).await;
}

#[tokio::test]
async fn streams_pass_through_byte_for_byte() {
    let (server, _) = serve(&ServerOptions::default()).await;
    let client = reqwest::Client::new();
    let url = format!("{}/v1/chat/completions", server.base);
    let response = client.post(&url).json(&json!({"model": "stream"})).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    assert_eq!(response.headers()["cache-control"], "no-cache");
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    let text = response.text().await.unwrap();
    assert_eq!(text, "data: {\"t\":\"ü\"}\n\ndata: {\"n\":2}\n\ndata: {\"n\":3}\n\ndata: [DONE]\n\n");
    // A failure before the first piece is a status; one after it has been told by the service.
    let body = refused(client.post(&url).json(&json!({"model": "late"})).send().await.unwrap(), 400).await;
    assert_eq!(body["error"]["code"], "context_length_exceeded");
    let text = client.post(&url).json(&json!({"model": "broken"})).send().await.unwrap().text().await.unwrap();
    assert_eq!(text, "data: {\"n\":1}\n\n");
}

/// A service whose stream the test feeds; the flag tells when the stream is dropped.
fn fed() -> (Door, mpsc::UnboundedSender<Result<Value, Failure>>, Arc<AtomicBool>) {
    struct Flag(Arc<AtomicBool>);
    impl Drop for Flag {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let (feed, pieces) = mpsc::unbounded_channel::<Result<Value, Failure>>();
    let dropped = Arc::new(AtomicBool::new(false));
    let parts = std::sync::Mutex::new(Some((pieces, Flag(dropped.clone()))));
    let door: Door = Arc::new(move |call: Call| {
        let (mut pieces, flag) = parts.lock().unwrap().take().unwrap();
        let streams = call.body["stream"] == true;
        async move {
            if !streams {
                let _flag = flag;
                return pieces.recv().await.unwrap().map(Reply::Whole);
            }
            Ok(Reply::Stream(Box::pin(async_stream::stream! {
                let _flag = flag;
                while let Some(piece) = pieces.recv().await {
                    yield piece;
                }
            })))
        }
        .boxed()
    });
    (door, feed, dropped)
}

async fn until(flag: &AtomicBool) {
    while !flag.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive_by_comments() {
    let (door, feed, _) = fed();
    let pace = sse::Pace { patience: Duration::from_millis(20), keep_alive: Duration::from_millis(30) };
    let server = start(direct(door, Readiness::new(Phase::Ready), None, &ServerOptions { pace, ..ServerOptions::default() })).await;
    let post = reqwest::Client::new().post(format!("{}/v1/completions", server.base)).json(&json!({"stream": true}));
    let response = post.send().await.unwrap();
    assert_eq!(response.status(), 200, "headers go out before the first piece");
    let mut bytes = response.bytes_stream();
    let mut text = String::new();
    while text.matches(": keep-alive\n\n").count() < 3 {
        text.push_str(std::str::from_utf8(&bytes.next().await.unwrap().unwrap()).unwrap());
    }
    // Too late for a status: the failure goes into the stream.
    feed.send(Err(Failure::new(Kind::Overloaded, "full"))).unwrap();
    let mut rest = String::new();
    while let Some(chunk) = bytes.next().await {
        rest.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
    }
    let frames: Vec<&str> = rest.split_terminator("\n\n").filter(|frame| *frame != ": keep-alive").collect();
    assert_eq!(frames.len(), 2);
    let error: Value = serde_json::from_str(frames[0].strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["message"], "full");
    assert_eq!(frames[1], "data: [DONE]");
}

#[tokio::test]
async fn a_client_that_hangs_up_drops_the_stream() {
    let (door, feed, dropped) = fed();
    let server = start(direct(door, Readiness::new(Phase::Ready), None, &ServerOptions::default())).await;
    let post = reqwest::Client::new().post(format!("{}/v1/completions", server.base)).json(&json!({"stream": true}));
    feed.send(Ok(json!("data: 1\n\n"))).unwrap();
    let mut response = post.send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_some());
    assert!(!dropped.load(Ordering::SeqCst));
    drop(response);
    tokio::time::timeout(Duration::from_secs(10), until(&dropped)).await.unwrap();
}

#[tokio::test]
async fn a_client_that_hangs_up_before_the_answer_drops_the_call() {
    let (door, _feed, dropped) = fed();
    let server = start(direct(door, Readiness::new(Phase::Ready), None, &ServerOptions::default())).await;
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    socket.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!dropped.load(Ordering::SeqCst));
    drop(socket);
    tokio::time::timeout(Duration::from_secs(10), until(&dropped)).await.unwrap();
}

#[tokio::test]
async fn keys_guard_everything_but_health() {
    let options = ServerOptions { api_keys: vec![SecretString::from("k1"), SecretString::from("k2")], ..ServerOptions::default() };
    let (server, _) = serve(&options).await;
    let client = reqwest::Client::new();
    for path in ["/health", "/ping", "/health/", "/ping/", "/"] {
        assert_eq!(client.get(format!("{}{path}", server.base)).send().await.unwrap().status(), 200, "{path}");
    }
    let url = format!("{}/v1/models", server.base);
    let response = client.get(&url).send().await.unwrap();
    assert_eq!(response.headers()["www-authenticate"], "Bearer");
    let body = refused(response, 401).await;
    assert_eq!(body["error"]["code"], "invalid_api_key");
    assert_eq!(body["detail"]["error"], body["error"]);
    refused(client.post(&server.base).json(&json!({})).send().await.unwrap(), 401).await;
    refused(client.get(&url).bearer_auth("k3").send().await.unwrap(), 401).await;
    assert_eq!(client.get(&url).bearer_auth("k2").send().await.unwrap().status(), 200);
    assert_eq!(client.get(&url).header("authorization", "bearer k1").send().await.unwrap().status(), 200);
    assert_eq!(client.get(&url).header("x-api-key", "k1").send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn browsers_get_their_preflight() {
    let keys = vec![SecretString::from("k")];
    let (server, _) = serve(&ServerOptions { api_keys: keys.clone(), ..ServerOptions::default() }).await;
    let client = reqwest::Client::new();
    let preflight = |base: &str, origin: &str| {
        client
            .request(reqwest::Method::OPTIONS, format!("{base}/v1/chat/completions"))
            .header("origin", origin.to_owned())
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,x-stainless-os")
    };
    let response = preflight(&server.base, "http://app.example").send().await.unwrap();
    assert_eq!(response.status(), 204);
    assert_eq!(response.headers()["access-control-allow-origin"], "*");
    assert_eq!(response.headers()["access-control-allow-headers"], "authorization,x-stainless-os");
    assert!(response.headers()["access-control-allow-methods"].to_str().unwrap().contains("POST"));
    // Also a refusal must be readable by the page.
    let response = client.get(format!("{}/v1/models", server.base)).header("origin", "http://app.example").send().await.unwrap();
    assert_eq!((response.status().as_u16(), &response.headers()["access-control-allow-origin"]), (401, &"*".parse().unwrap()));

    let options = ServerOptions { allowed_origins: vec!["http://app.example".to_owned()], ..ServerOptions::default() };
    let (server, _) = serve(&options).await;
    let response = preflight(&server.base, "http://app.example").send().await.unwrap();
    assert_eq!(response.headers()["access-control-allow-origin"], "http://app.example");
    let response = preflight(&server.base, "http://other.example").send().await.unwrap();
    assert!(!response.headers().contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn readiness_follows_the_model() {
    let readiness = Readiness::new(Phase::Loading);
    let options = ServerOptions { health_path: "/healthz".to_owned(), ..ServerOptions::default() };
    let server = start(direct(echo(), readiness.clone(), None, &options)).await;
    let side = start(health_only(readiness.clone(), &options)).await;
    let client = reqwest::Client::new();
    let table =
        [(Phase::Loading, 204, 503, 503), (Phase::Ready, 200, 200, 200), (Phase::Draining, 503, 503, 503), (Phase::Failed, 503, 503, 503)];
    for (phase, ping, health, call) in table {
        readiness.set(phase);
        for base in [&server.base, &side.base] {
            assert_eq!(client.get(format!("{base}/ping")).send().await.unwrap().status(), ping, "{phase:?}");
            assert_eq!(client.post(format!("{base}/ping")).send().await.unwrap().status(), ping);
            assert_eq!(client.get(format!("{base}/healthz")).send().await.unwrap().status(), ping);
            assert_eq!(client.get(format!("{base}/health")).send().await.unwrap().status(), health);
            for (path, status) in [("/ping/", ping), ("/healthz/", ping), ("/health/", health)] {
                assert_eq!(client.get(format!("{base}{path}")).send().await.unwrap().status(), status, "{path}");
            }
        }
        let response = client.get(format!("{}/v1/models", server.base)).send().await.unwrap();
        assert_eq!(response.status(), call);
        if call == 503 {
            assert!(response.headers().contains_key("retry-after"));
            let code = refused(response, 503).await["error"]["code"].clone();
            let expected = match phase {
                Phase::Loading => "model_loading",
                Phase::Draining => "shutting_down",
                _ => "model_failed",
            };
            assert_eq!(code, expected);
        }
    }
    refused(client.get(format!("{}/v1/models", side.base)).send().await.unwrap(), 404).await;
}

#[tokio::test]
async fn shutdown_lets_a_running_response_end() {
    let (door, feed, _) = fed();
    let mut server = start(direct(door, Readiness::new(Phase::Ready), None, &ServerOptions::default())).await;
    let post = reqwest::Client::new().post(format!("{}/v1/completions", server.base)).json(&json!({"stream": true}));
    feed.send(Ok(json!("data: 1\n\n"))).unwrap();
    let mut response = post.send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_some());
    server.end.take().unwrap().send(()).unwrap();
    while TcpStream::connect(server.address).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    feed.send(Ok(json!("data: [DONE]\n\n"))).unwrap();
    drop(feed);
    assert_eq!(response.text().await.unwrap(), "data: [DONE]\n\n");
    tokio::time::timeout(Duration::from_secs(10), server.task).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn shutdown_does_not_wait_beyond_its_limit() {
    let (door, _feed, _) = fed();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (end, ended) = oneshot::channel::<()>();
    let router = direct(door, Readiness::new(Phase::Ready), None, &ServerOptions::default());
    let task = tokio::spawn(run(listener, router, ended.map(|_| ()), Duration::from_millis(50)));
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    end.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), task).await.unwrap().unwrap().unwrap();
    drop(socket.read_u8());
}
