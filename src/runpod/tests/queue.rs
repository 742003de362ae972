//! A platform's queue on a loopback socket that answers by script and writes down what it was asked.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::{Notify, watch};

/// One answer of the script.
#[derive(Debug, Clone)]
pub enum ScriptedReply {
    Status(u16),
    Json(Value),
    /// Body and content type.
    Text(&'static str, &'static str),
    /// The connection is closed without an answer.
    Cut,
    /// No answer before the test says so; then 200.
    Gate(Arc<Notify>),
}

/// One request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Method, path and query.
    pub line: String,
    pub headers: HeaderMap,
    pub body: String,
}

impl Seen {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// The routes, told apart by the path segment after the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    Take,
    Stop,
    Done,
    Stream,
    Ping,
}

impl Route {
    fn of(path: &str) -> Self {
        match path.split('/').nth(3) {
            Some("job-take" | "job-take-batch") => Self::Take,
            Some("job-stop") => Self::Stop,
            Some("job-done") => Self::Done,
            Some("job-stream") => Self::Stream,
            Some("ping") => Self::Ping,
            other => panic!("no such route: {other:?}"),
        }
    }

    /// Polls are held while the script has nothing for them.
    fn is_poll(self) -> bool {
        matches!(self, Self::Take | Self::Stop)
    }
}

#[derive(Default)]
struct Inner {
    script: Mutex<Vec<(Route, VecDeque<ScriptedReply>)>>,
    seen: Mutex<Vec<(Route, Seen)>>,
    /// Counts requests and script entries: whoever waits looks again.
    changed: watch::Sender<u64>,
}

#[derive(Clone)]
pub struct Queue {
    inner: Arc<Inner>,
    pub base: String,
}

impl Queue {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}/v2/ep", listener.local_addr().unwrap());
        let inner = Arc::new(Inner::default());
        let app = axum::Router::new().fallback(answer).with_state(Arc::clone(&inner));
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { inner, base }
    }

    /// A queue that answers even when the test's own threads are all blocked.
    pub fn start_on_own_runtime() -> Self {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                sender.send(Self::start().await).unwrap();
                std::future::pending::<()>().await;
            });
        });
        receiver.recv().unwrap()
    }

    /// Adds answers to a route's script.
    pub fn script(&self, route: Route, replies: impl IntoIterator<Item = ScriptedReply>) {
        let mut script = self.inner.script.lock().unwrap();
        match script.iter_mut().find(|(key, _)| *key == route) {
            Some((_, queue)) => queue.extend(replies),
            None => script.push((route, replies.into_iter().collect())),
        }
        drop(script);
        self.inner.changed.send_modify(|count| *count += 1);
    }

    pub fn seen(&self, route: Route) -> Vec<Seen> {
        self.inner.seen.lock().unwrap().iter().filter(|(key, _)| *key == route).map(|(_, seen)| seen.clone()).collect()
    }

    pub fn lines(&self, route: Route) -> Vec<String> {
        self.seen(route).into_iter().map(|seen| seen.line).collect()
    }

    /// Routes in the order in which their requests came.
    pub fn order(&self) -> Vec<Route> {
        self.inner.seen.lock().unwrap().iter().map(|(route, _)| *route).collect()
    }

    /// The first `count` requests of a route, once they came.
    pub async fn wait(&self, route: Route, count: usize) -> Vec<Seen> {
        let mut changed = self.inner.changed.subscribe();
        let came = changed.wait_for(|_| self.seen(route).len() >= count);
        if tokio::time::timeout(Duration::from_secs(20), came).await.is_err() {
            panic!("{route:?}: waited for {count} requests, got {:#?}", self.seen(route));
        }
        self.seen(route)
    }
}

impl Inner {
    fn next(&self, route: Route) -> Option<ScriptedReply> {
        self.script.lock().unwrap().iter_mut().find(|(key, _)| *key == route)?.1.pop_front()
    }
}

async fn answer(State(inner): State<Arc<Inner>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await.unwrap();
    let route = Route::of(parts.uri.path());
    let line = format!("{} {}", parts.method, parts.uri);
    let seen = Seen { line, headers: parts.headers, body: String::from_utf8(body.to_vec()).unwrap() };
    inner.seen.lock().unwrap().push((route, seen));
    let mut changed = inner.changed.subscribe();
    inner.changed.send_modify(|count| *count += 1);
    let reply = loop {
        match inner.next(route) {
            Some(reply) => break reply,
            None if route.is_poll() => changed.changed().await.unwrap(),
            None => break ScriptedReply::Status(200),
        }
    };
    match reply {
        ScriptedReply::Status(status) => StatusCode::from_u16(status).unwrap().into_response(),
        ScriptedReply::Json(value) => ([(header::CONTENT_TYPE, "application/json; charset=utf-8")], value.to_string()).into_response(),
        ScriptedReply::Text(text, content_type) => ([(header::CONTENT_TYPE, content_type)], Body::from(text)).into_response(),
        // Ends the connection's task, without the noise of a panic.
        ScriptedReply::Cut => std::panic::resume_unwind(Box::new("cut")),
        ScriptedReply::Gate(gate) => {
            gate.notified().await;
            StatusCode::OK.into_response()
        }
    }
}
