//! The requests of the job protocol: take, stop, stream, done. Posts are retried here; all other answers are acted on elsewhere.

use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::Value;

use super::job::{Entry, Outcome, elements, id_text};
use super::retry::{RetryPolicy, jittered, retry};
use super::urls::Urls;
use crate::config::{ExposeSecret, RunpodSettings};
use crate::error::{Failure, Kind};

/// When a result larger than this is refused, its size is taken to be the reason.
const LARGE_RESULT: usize = 256 * 1024;

/// One worker's connection to the platform.
pub(crate) struct Client {
    http: RwLock<Connection>,
    settings: RunpodSettings,
    pub urls: Urls,
    pub policy: RetryPolicy,
}

/// The pooled connections, and how often they have been replaced.
#[derive(Clone)]
struct Connection {
    http: reqwest::Client,
    generation: u64,
}

/// What a take gave.
#[derive(Debug)]
pub(crate) enum Taken {
    Entries(Vec<Entry>),
    /// 204, or no answer within the deadline.
    Nothing,
    /// 400: no jobs while the platform has parked this worker.
    Parked,
    /// 200 with something that is no job; the text says what it is.
    Odd(String),
    RateLimited,
    Refused(StatusCode),
    Unreachable(String),
}

/// What a stop poll gave.
#[derive(Debug)]
pub(crate) enum Stops {
    Ids(Vec<String>),
    NotFound,
    RateLimited,
    Failed(String),
}

/// What became of a result.
#[derive(Debug)]
pub(crate) enum Delivery {
    Arrived,
    /// It was too large: this error arrived in its place.
    Replaced(Failure),
    /// Logged where it failed.
    Lost,
}

/// Why one post did not arrive.
#[derive(Debug)]
enum PostError {
    /// Worth another attempt.
    Passing(String),
    /// The platform understood and refused.
    Refused(StatusCode, String),
}

impl Client {
    /// Errors name the setting at fault.
    pub fn new(settings: &RunpodSettings, worker_id: &str, policy: RetryPolicy) -> Result<Self, String> {
        let http = RwLock::new(Connection { http: http_client(settings)?, generation: 0 });
        Ok(Self { http, settings: settings.clone(), urls: Urls::new(settings, worker_id)?, policy })
    }

    /// One long poll for up to `jobs` jobs.
    pub async fn take(&self, url: &str) -> Taken {
        let response = match self.poll(url).await {
            Ok(response) => response,
            Err(error) if error.is_timeout() && !error.is_connect() => return Taken::Nothing,
            Err(error) => return Taken::Unreachable(describe(error)),
        };
        match response.status() {
            StatusCode::NO_CONTENT => Taken::Nothing,
            StatusCode::BAD_REQUEST => Taken::Parked,
            StatusCode::TOO_MANY_REQUESTS => Taken::RateLimited,
            StatusCode::OK => match read_json(response).await {
                Ok(body) => match elements(&body) {
                    Some(elements) => {
                        Taken::Entries(elements.into_iter().map(|element| Entry::read(element, &self.policy.job_limits)).collect())
                    }
                    None => Taken::Odd("something that holds no job".into()),
                },
                Err(Unread::Odd(what)) => Taken::Odd(what),
                Err(Unread::Broken(error)) => Taken::Unreachable(error),
            },
            status => Taken::Refused(status),
        }
    }

    /// One long poll for jobs to stop.
    pub async fn stops(&self, url: &str) -> Stops {
        let response = match self.poll(url).await {
            Ok(response) => response,
            Err(error) if error.is_timeout() && !error.is_connect() => return Stops::Ids(Vec::new()),
            Err(error) => return Stops::Failed(describe(error)),
        };
        match response.status() {
            StatusCode::NO_CONTENT => Stops::Ids(Vec::new()),
            StatusCode::TOO_MANY_REQUESTS => Stops::RateLimited,
            StatusCode::NOT_FOUND => Stops::NotFound,
            StatusCode::OK => match read_json(response).await {
                Ok(body) => match serde_json::from_slice::<Value>(&body) {
                    Ok(body) => Stops::Ids(body["jobsToStop"].as_array().into_iter().flatten().filter_map(id_text).collect()),
                    Err(error) => Stops::Failed(format!("no valid JSON: {error}")),
                },
                Err(Unread::Odd(what) | Unread::Broken(what)) => Stops::Failed(what),
            },
            status => Stops::Failed(format!("HTTP {status}")),
        }
    }

    /// Posts one piece of a stream, in at most `attempts` attempts; false when it was not accepted.
    pub async fn stream(&self, job_id: &str, body: String, attempts: u32) -> bool {
        let Some(url) = self.urls.stream(job_id) else { return true };
        let policy = &self.policy;
        let result = retry(
            || self.post(&url, &body, job_id, policy.stream_timeout),
            |error, failures| {
                let again = matches!(error, PostError::Passing(_)) && failures < attempts;
                again.then(|| jittered(policy.stream_backoff.pause(failures)))
            },
        );
        match result.await {
            Ok(()) => return true,
            Err(PostError::Passing(error)) => {
                tracing::warn!("a piece of the stream ({} bytes) was skipped after {attempts} attempts: {error}", body.len());
            }
            Err(PostError::Refused(status, text)) => {
                tracing::warn!("a piece of the stream ({} bytes) was refused and is skipped: HTTP {status} {text}", body.len());
            }
        }
        false
    }

    /// Posts the final result, as long as it takes. A result too large for the platform becomes an error
    /// that says so, since otherwise whoever waits for it would wait in vain.
    pub async fn done(&self, job_id: &str, outcome: &Outcome, stop_pod: bool) -> Delivery {
        let body = outcome.body(stop_pod);
        let size = body.len();
        let refused = if size > self.policy.result_limit {
            format!("the platform takes at most {}", self.policy.result_limit)
        } else {
            match self.done_body(job_id, outcome.is_stream(), body).await {
                Ok(()) => return Delivery::Arrived,
                Err(PostError::Refused(status, text)) if size > LARGE_RESULT || status == StatusCode::PAYLOAD_TOO_LARGE => {
                    format!("the platform refused them: HTTP {status} {text}")
                }
                Err(PostError::Refused(status, text)) => {
                    tracing::error!("the result ({size} bytes) was refused and is lost: HTTP {status} {text}");
                    return Delivery::Lost;
                }
                Err(PostError::Passing(error)) => {
                    tracing::error!("the result ({size} bytes) could not be returned and is lost: {error}");
                    return Delivery::Lost;
                }
            }
        };
        tracing::error!("the result has {size} bytes; {refused}; returning an error instead");
        let message =
            format!("The result has {size} bytes, which is too large to return: {refused}. Ask for less output, or read it as a stream.");
        let failure = Failure::new(Kind::Internal, message).code("result_too_large");
        let small = Outcome::Failed { failure: failure.clone(), streamed: outcome.is_stream() };
        match self.done_body(job_id, small.is_stream(), small.body(stop_pod)).await {
            Ok(()) => Delivery::Replaced(failure),
            Err(PostError::Refused(_, error) | PostError::Passing(error)) => {
                tracing::error!("the error in place of the result could not be returned either: {error}");
                Delivery::Lost
            }
        }
    }

    /// Retries what may pass until the pauses add up to the window.
    async fn done_body(&self, job_id: &str, is_stream: bool, body: String) -> Result<(), PostError> {
        let url = self.urls.done(job_id, is_stream);
        let RetryPolicy { result_backoff, result_window, result_timeout, .. } = self.policy;
        let (mut waited, mut attempts) = (Duration::ZERO, 0);
        let result = retry(
            || self.post(&url, &body, job_id, result_timeout),
            |error, failures| {
                attempts = failures;
                let PostError::Passing(error) = error else { return None };
                if waited >= result_window {
                    return None;
                }
                let pause = jittered(result_backoff.pause(failures));
                tracing::warn!("returning the result failed, trying again in {} ms: {error}", pause.as_millis());
                waited += pause;
                Some(pause)
            },
        );
        result.await.map_err(|error| match error {
            PostError::Passing(error) => PostError::Passing(format!("{error} (attempt {attempts}, the last)")),
            refused => refused,
        })
    }

    async fn post(&self, url: &str, body: &str, job_id: &str, timeout: Duration) -> Result<(), PostError> {
        let prepare = |http: &reqwest::Client| {
            // A literal header, and a form's content type on a JSON body: that is the protocol.
            let request = http.post(url).timeout(timeout).header(CONTENT_TYPE, "application/x-www-form-urlencoded");
            let request = request.header("charset", "utf-8").body(body.to_owned());
            match HeaderValue::from_str(job_id) {
                Ok(id) => request.header(HeaderName::from_static("x-request-id"), id),
                Err(_) => request,
            }
        };
        let response = self.send(prepare).await.map_err(|error| PostError::Passing(describe(error)))?;
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let text: String = response.text().await.unwrap_or_default().chars().take(200).collect();
        match status.as_u16() {
            408 | 425 | 429 | 500.. => Err(PostError::Passing(format!("HTTP {status} {text}"))),
            _ => Err(PostError::Refused(status, text)),
        }
    }

    async fn poll(&self, url: &str) -> reqwest::Result<Response> {
        self.send(|http| http.get(url).timeout(self.policy.poll_timeout).header(CONTENT_TYPE, "application/json")).await
    }

    /// Sends; after an error later requests open new connections.
    async fn send(&self, prepare: impl Fn(&reqwest::Client) -> RequestBuilder) -> reqwest::Result<Response> {
        let Connection { http, generation } = self.http.read().unwrap_or_else(PoisonError::into_inner).clone();
        let result = prepare(&http).send().await;
        if result.is_err() {
            self.reconnect(generation);
        }
        result
    }

    /// Forgets all idle connections: a worker that was parked and revived finds them dead, one after the other. Once is enough for all
    /// requests that fail together.
    fn reconnect(&self, failed: u64) {
        let mut current = self.http.write().unwrap_or_else(PoisonError::into_inner);
        if current.generation == failed
            && let Ok(http) = http_client(&self.settings)
        {
            *current = Connection { http, generation: failed + 1 };
        }
    }
}

/// An HTTP client with this worker's headers. Platform traffic uses no proxy.
pub(crate) fn http_client(settings: &RunpodSettings) -> Result<reqwest::Client, String> {
    let mut headers = HeaderMap::new();
    if let Some(key) = &settings.api_key {
        // As it is: the platform wants no "Bearer" before it.
        let mut value = HeaderValue::from_str(key.expose_secret())
            .map_err(|_| "RUNPOD_AI_API_KEY has characters that cannot be sent in a header; check for line breaks".to_owned())?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    let user_agent = settings.user_agent.clone().unwrap_or_else(default_user_agent);
    let user_agent = HeaderValue::from_str(&user_agent).map_err(|_| "the user agent has characters that cannot be sent in a header")?;
    reqwest::Client::builder()
        .no_proxy()
        .default_headers(headers)
        .user_agent(user_agent)
        .connect_timeout(Duration::from_secs(10))
        .tcp_keepalive(Duration::from_secs(30))
        .build()
        .map_err(|error| format!("cannot set up the HTTP client: {error}"))
}

/// In the form of the platform's SDKs: name/version (system release; machine) Language/name version.
fn default_user_agent() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let system = match (std::env::consts::OS, release.trim()) {
        ("linux", "") => "Linux".to_owned(),
        ("linux", release) => format!("Linux {release}"),
        (other, _) => other.to_owned(),
    };
    let machine = std::env::consts::ARCH;
    format!("worker-candle/{} ({system}; {machine}) Language/Rust {}", env!("CARGO_PKG_VERSION"), env!("CARGO_PKG_RUST_VERSION"))
}

/// Why a 200 gave no JSON.
enum Unread {
    /// It is something else: no job in it.
    Odd(String),
    /// The connection broke while it was read.
    Broken(String),
}

/// The body of an answer that says it is JSON.
async fn read_json(response: Response) -> Result<Vec<u8>, Unread> {
    let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        return Err(Unread::Odd(format!("content type {content_type:?} instead of application/json")));
    }
    let body = response.bytes().await.map_err(|error| Unread::Broken(describe(error)))?;
    if body.is_empty() { Err(Unread::Odd("an empty body".into())) } else { Ok(body.into()) }
}

/// The error with its causes, without the address: that is long, and the same every time.
pub(crate) fn describe(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
