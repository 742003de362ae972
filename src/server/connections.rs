//! Connections: closed when they are silent for too long, and never so many that a health check finds no place.
//!
//! A connection is *busy* from the head of a request to the end of its response; only then may it take its time. When all places are taken,
//! a new connection gets that of the one which has been silent longest. When all are busy, some more are let in, for health checks alone.
//! A TLS handshake counts as the beginning of a request's head.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

use super::tls::{Listener, Tls};
use super::wire::Refusal;
use crate::config::defaults;
use crate::error::{Failure, Kind};

/// Places beyond [`ConnectionLimits::most`], where only health checks are answered.
pub const RESERVE: usize = 16;
/// How often a connection without a place is tried again.
const RETRY: Duration = Duration::from_millis(100);
/// Between two lines in the log about all places being taken.
const SAID_AGAIN: Duration = Duration::from_secs(60);

/// How many connections there may be, and how long they may be silent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// From the first byte of a request, or from the beginning of the connection, to the end of the request's head. `None` = for ever.
    pub header_timeout: Option<Duration>,
    /// From a response to the next request. `None` = for ever.
    pub idle_timeout: Option<Duration>,
    /// Connections at once.
    pub most: usize,
    /// Answered whatever happens, besides `/health` and `/ping`.
    pub health_path: String,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            header_timeout: Some(defaults::HEADER_TIMEOUT),
            idle_timeout: Some(defaults::KEEP_ALIVE_TIMEOUT),
            most: 1024,
            health_path: defaults::HEALTH_PATH.to_owned(),
        }
    }
}

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The head of a request is awaited or arriving.
    Head,
    /// The last response is out, and nothing has come since.
    Idle,
    Busy,
}

struct Connection {
    phase: Mutex<(Phase, Instant)>,
    /// Told when another connection gets its place.
    evicted: Notify,
    /// It has a place of the reserve.
    reserve: bool,
}

impl Connection {
    fn phase(&self) -> (Phase, Instant) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = (phase, Instant::now());
    }

    fn deadline(&self, limits: &ConnectionLimits) -> Option<Instant> {
        let (phase, since) = self.phase();
        let limit = match phase {
            Phase::Head => limits.header_timeout,
            Phase::Idle => limits.idle_timeout,
            Phase::Busy => None,
        };
        since.checked_add(limit?)
    }
}

/// All connections of a listener.
struct Places {
    limits: ConnectionLimits,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    next: u64,
    open: HashMap<u64, Arc<Connection>>,
    said: Option<Instant>,
}

impl Places {
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for one more connection, made by closing the longest silent one where all places are taken. `None`: all are busy, and the
    /// reserve is used up too. The place is free again when what is returned is dropped.
    fn take(self: &Arc<Self>) -> Option<Place> {
        let mut taken = self.lock();
        let full = taken.open.len() >= self.limits.most;
        let evicted = full && taken.evict();
        if full && taken.said.is_none_or(|said| said.elapsed() >= SAID_AGAIN) {
            taken.said = Some(Instant::now());
            tracing::warn!(
                "all {} connections are in use: new ones take the place of silent ones, and while all are busy only health checks are \
                 answered; MAX_CONNECTIONS and the system's limit of open files say how many there may be",
                self.limits.most
            );
        }
        if taken.open.len() >= self.limits.most + RESERVE {
            return None;
        }
        let connection =
            Arc::new(Connection { phase: Mutex::new((Phase::Head, Instant::now())), evicted: Notify::new(), reserve: full && !evicted });
        taken.next += 1;
        let id = taken.next;
        taken.open.insert(id, connection.clone());
        Some(Place { places: self.clone(), id, connection })
    }
}

impl Taken {
    fn evict(&mut self) -> bool {
        let silent = self.open.iter().map(|(id, connection)| (connection.phase(), *id)).filter(|((phase, _), _)| *phase != Phase::Busy);
        let Some((_, id)) = silent.min_by_key(|((_, since), _)| *since) else { return false };
        if let Some(connection) = self.open.remove(&id) {
            connection.evicted.notify_one();
        }
        true
    }
}

struct Place {
    places: Arc<Places>,
    id: u64,
    connection: Arc<Connection>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.lock().open.remove(&self.id);
    }
}

/// Serves until `shutdown` completes, then stops accepting and lets running responses end, for at most `limit`.
pub async fn serve(
    listener: impl Into<Listener>,
    router: Router,
    limits: ConnectionLimits,
    shutdown: impl Future<Output = ()> + Send + 'static,
    limit: Duration,
) -> io::Result<()> {
    let Listener { socket, tls } = listener.into();
    let places = Arc::new(Places { limits, taken: Mutex::default() });
    let (closing, closed) = watch::channel(false);
    let mut tasks = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    // A connection that was accepted when there was no place for it.
    let mut waiting: Option<TcpStream> = None;
    // Evicted connections keep their files until their tasks have ended, which they do soon.
    let most_tasks = places.limits.most.saturating_add(2 * RESERVE);
    loop {
        if let Some(stream) = waiting.take() {
            match places.take() {
                Some(place) => drop(tasks.spawn(connected(stream, tls.clone(), router.clone(), place, closed.clone()))),
                None => waiting = Some(stream),
            }
        }
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = tasks.join_next() => {}
            // A connection that falls silent does not say so.
            () = tokio::time::sleep(RETRY), if waiting.is_some() => {}
            accepted = socket.accept(), if waiting.is_none() && tasks.len() < most_tasks => match accepted {
                Ok((stream, _)) => waiting = Some(stream),
                Err(error) => accept_failed(&error).await,
            },
        }
    }
    drop((socket, waiting));
    let _ = closing.send(true);
    let rest = async { while tasks.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(limit, rest).await;
    Ok(())
}

/// A client that went away before it was accepted is no matter; anything else (no more open files) will not be better at once.
async fn accept_failed(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        tracing::error!("a connection could not be accepted: {error}");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// One connection from its beginning to its end.
async fn connected(stream: TcpStream, tls: Option<Arc<Tls>>, router: Router, place: Place, closed: watch::Receiver<bool>) {
    // Tokens are small packets: none of them waits for the next.
    let _ = stream.set_nodelay(true);
    let Some(tls) = tls else { return requests(stream, router, &place, closed).await };
    if let Some(stream) = handshake(stream, &tls, &place, closed.clone()).await {
        requests(stream, router, &place, closed).await;
    }
}

/// The encrypted stream, unless the client does not come to terms in time, or the connection ends before.
async fn handshake(stream: TcpStream, tls: &Arc<Tls>, place: &Place, mut closed: watch::Receiver<bool>) -> Option<TlsStream<TcpStream>> {
    let limit = place.places.limits.header_timeout.unwrap_or(defaults::HEADER_TIMEOUT);
    tokio::select! {
        accepted = tls.accept(stream, limit) => accepted.inspect_err(|error| tracing::debug!("no TLS with a client: {error}")).ok(),
        () = place.connection.evicted.notified() => None,
        _ = closed.wait_for(|closed| *closed) => None,
    }
}

/// The requests of one connection.
async fn requests(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router, place: &Place, mut closed: watch::Receiver<bool>) {
    let limits = &place.places.limits;
    let connection = &place.connection;
    let router = TowerToHyperService::new(router);
    let service = hyper::service::service_fn(|request: hyper::Request<Incoming>| {
        connection.enter(Phase::Busy);
        let busy = Busy(connection.clone());
        let health = limits.is_health(request.uri().path());
        let (router, reserve) = (router.clone(), connection.reserve);
        async move {
            let mut response = if reserve && !health {
                let message = "The server has as many connections as it can hold; try again in a moment.";
                Refusal::from(Failure::new(Kind::Overloaded, message).code("too_many_connections")).into_response()
            } else {
                let Ok(response) = hyper::service::Service::call(&router, request).await;
                response
            };
            if reserve {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<Response, std::convert::Infallible>(response.map(|body| Body::new(Watched { inner: body, _busy: busy })))
        }
    });
    let io = TokioIo::new(Heard { stream, connection: connection.clone() });
    // Its own time-out does not tell a slow request from a connection without one.
    let mut builder = hyper::server::conn::http1::Builder::new();
    let mut served = pin!(builder.timer(TokioTimer::new()).header_read_timeout(None).serve_connection(io, service));
    let mut evicted = pin!(connection.evicted.notified());
    let mut closing = pin!(closed.wait_for(|closed| *closed));
    let mut told = false;
    let mut alarm = pin!(tokio::time::sleep(Duration::ZERO));
    poll_fn(|context| {
        if !told && closing.as_mut().poll(context).is_ready() {
            told = true;
            served.as_mut().graceful_shutdown();
        }
        // Phases change only in here: the deadline is read after it.
        if served.as_mut().poll(context).is_ready() || evicted.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        match connection.deadline(limits) {
            None => Poll::Pending,
            Some(deadline) => {
                if alarm.deadline() != deadline {
                    alarm.as_mut().reset(deadline);
                }
                alarm.as_mut().poll(context)
            }
        }
    })
    .await;
}

impl ConnectionLimits {
    fn is_health(&self, path: &str) -> bool {
        let route = path.strip_suffix('/').unwrap_or(path);
        matches!(route, "/health" | "/ping") || path == self.health_path || route == self.health_path
    }
}

/// Ends the busy time of its connection when it is dropped.
struct Busy(Arc<Connection>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.enter(Phase::Idle);
    }
}

/// A response's body: the connection is busy until it is gone.
struct Watched {
    inner: Body,
    _busy: Busy,
}

impl hyper::body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A stream that notes when something arrives on an idle connection.
struct Heard<S> {
    stream: S,
    connection: Arc<Connection>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Heard<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before && self.connection.phase().0 == Phase::Idle {
            self.connection.enter(Phase::Head);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Heard<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffers: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::sync::oneshot;

    use super::*;

    struct Server {
        address: std::net::SocketAddr,
        _end: oneshot::Sender<()>,
    }

    /// `/slow` answers when the test says so; everything else at once.
    async fn start(limits: ConnectionLimits, slow: Arc<Notify>) -> Server {
        let router = Router::new()
            .route(
                "/slow",
                get(move || async move {
                    slow.notified().await;
                    "slow"
                }),
            )
            .fallback(|| async { "quick" });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (end, ended) = oneshot::channel::<()>();
        let shutdown = async {
            let _ = ended.await;
        };
        tokio::spawn(serve(listener, router, limits, shutdown, Duration::from_secs(5)));
        Server { address, _end: end }
    }

    impl Server {
        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }
    }

    async fn ask(stream: &mut TcpStream, path: &str) {
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
    }

    /// What has come when the other end says no more for a moment; `None` once it has hung up.
    async fn hear(stream: &mut TcpStream) -> Option<String> {
        let mut text = Vec::new();
        loop {
            let mut buffer = [0; 4096];
            match tokio::time::timeout(Duration::from_millis(300), stream.read(&mut buffer)).await {
                Ok(Ok(0) | Err(_)) if text.is_empty() => return None,
                Ok(Ok(count)) if count > 0 => text.extend_from_slice(&buffer[..count]),
                _ => return Some(String::from_utf8(text).unwrap()),
            }
        }
    }

    async fn hung_up(stream: &mut TcpStream, within: Duration) -> bool {
        tokio::time::timeout(within, async { while hear(stream).await.is_some() {} }).await.is_ok()
    }

    #[tokio::test]
    async fn silent_and_slow_connections_are_closed_and_busy_ones_are_not() {
        let second = Duration::from_secs(1);
        let limits = ConnectionLimits { header_timeout: Some(second), idle_timeout: Some(3 * second), ..ConnectionLimits::default() };
        let slow = Arc::new(Notify::new());
        let server = start(limits, slow.clone()).await;
        let (mut silent, mut half, mut idle, mut busy) =
            (server.connect().await, server.connect().await, server.connect().await, server.connect().await);
        half.write_all(b"GET / HTTP/1.1\r\nho").await.unwrap();
        ask(&mut idle, "/").await;
        ask(&mut busy, "/slow").await;
        assert!(hear(&mut idle).await.unwrap().ends_with("quick"));
        let begin = Instant::now();
        assert!(hung_up(&mut silent, 3 * second).await && hung_up(&mut half, 3 * second).await);
        assert!(begin.elapsed() < 5 * second / 2);
        // Between two requests there is more time, but not for half of one.
        ask(&mut idle, "/").await;
        assert!(hear(&mut idle).await.unwrap().ends_with("quick"));
        idle.write_all(b"GET / HTTP/1.1\r\nho").await.unwrap();
        let begin = Instant::now();
        assert!(hung_up(&mut idle, 5 * second).await && begin.elapsed() < 5 * second / 2);
        tokio::time::sleep(3 * second).await;
        slow.notify_one();
        assert!(hear(&mut busy).await.unwrap().ends_with("slow"));
    }

    #[tokio::test]
    async fn a_new_connection_gets_the_place_of_the_longest_silent_one() {
        let server = start(ConnectionLimits { most: 3, ..ConnectionLimits::default() }, Arc::new(Notify::new())).await;
        let mut first = server.connect().await;
        ask(&mut first, "/").await;
        assert!(hear(&mut first).await.is_some());
        let mut others = Vec::new();
        for _ in 0..20 {
            let mut stream = server.connect().await;
            ask(&mut stream, "/").await;
            assert!(hear(&mut stream).await.unwrap().ends_with("quick"));
            others.push(stream);
        }
        assert!(hung_up(&mut first, Duration::from_secs(5)).await);
        assert_eq!(hear(&mut others[19]).await.as_deref(), Some(""), "the newest is still there");
    }

    #[tokio::test]
    async fn when_all_are_busy_health_checks_are_answered() {
        let slow = Arc::new(Notify::new());
        let limits = ConnectionLimits { most: 3, health_path: "/healthz".to_owned(), ..ConnectionLimits::default() };
        let server = start(limits, slow.clone()).await;
        let mut busy = Vec::new();
        for _ in 0..3 {
            let mut stream = server.connect().await;
            ask(&mut stream, "/slow").await;
            assert_eq!(hear(&mut stream).await.as_deref(), Some(""));
            busy.push(stream);
        }
        for path in ["/ping", "/health/", "/healthz"] {
            let mut stream = server.connect().await;
            ask(&mut stream, path).await;
            let answer = hear(&mut stream).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");
        }
        let mut stream = server.connect().await;
        ask(&mut stream, "/").await;
        let answer = hear(&mut stream).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 429") && answer.contains("too_many_connections"), "{answer}");
        // Beyond the reserve connections wait, and are served once others end.
        let mut silent = Vec::new();
        for _ in 0..2 * RESERVE {
            silent.push(server.connect().await);
        }
        let mut late = server.connect().await;
        ask(&mut late, "/").await;
        for _ in 0..3 {
            slow.notify_one();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop((busy, silent));
        assert!(hear(&mut late).await.is_some());
    }
}
