//! What the keys of `API_KEYS_FILE` have used, and whether there is room for another request.
//!
//! A token bucket for requests and one for tokens. Tokens are known when an answer ends, so a bucket of them may go below nothing, and
//! requests wait until it is above again. That, and limits that change while it runs, are what the known crates (governor) do not have.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use hyper::body::{Frame, SizeHint};

use crate::api::tally::Tally;
use crate::config::ClientKey;
use crate::error::{Failure, Kind};

/// Fills in a minute.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    level: f64,
    at: Instant,
}

impl Bucket {
    /// Full, whatever its size is.
    fn full(at: Instant) -> Self {
        Self { level: f64::INFINITY, at }
    }

    /// What it holds now.
    fn level(&mut self, size: f64, now: Instant) -> f64 {
        let filled = now.saturating_duration_since(self.at).as_secs_f64() * size / 60.0;
        *self = Self { level: (self.level + filled).min(size), at: now.max(self.at) };
        self.level
    }

    fn take(&mut self, amount: f64) {
        self.level -= amount;
    }
}

/// How long a bucket of this size takes from one level to another.
fn time_to_fill(from: f64, to: f64, size: f64) -> Duration {
    Duration::from_secs_f64(((to - from).max(0.0) * 60.0 / size).min(1e9))
}

/// What a key has used. It outlives the reading of its file.
#[derive(Debug)]
pub struct Usage {
    /// Of requests, and of tokens.
    buckets: Mutex<[Bucket; 2]>,
    running: AtomicUsize,
}

impl Usage {
    pub fn new() -> Arc<Self> {
        let full = Bucket::full(Instant::now());
        Arc::new(Self { buckets: Mutex::new([full; 2]), running: AtomicUsize::new(0) })
    }

    fn buckets(&self) -> MutexGuard<'_, [Bucket; 2]> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a request is not let in.
#[derive(Debug)]
pub struct LimitReached {
    pub failure: Failure,
    /// When another try makes sense.
    pub retry_after_ms: u64,
}

/// A key with what it has used.
#[derive(Debug, Clone)]
pub struct Client {
    pub key: Arc<ClientKey>,
    pub usage: Arc<Usage>,
}

impl Client {
    /// Lets a request in, or says which limit is reached and when it is worth another try. Nothing of what is refused counts.
    pub fn admit(&self) -> Result<Admission, LimitReached> {
        let now = Instant::now();
        if let Some(most) = self.key.max_concurrency {
            let one_more = |running| (running < most as usize).then_some(running + 1);
            if self.usage.running.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_err() {
                return Err(self.reached("requests at a time (max_concurrency)", most, Duration::from_secs(1)));
            }
        } else {
            self.usage.running.fetch_add(1, Ordering::AcqRel);
        }
        // From here on its end gives the place back.
        let admission = Admission { client: self.clone(), tally: Tally::begin_for(&self.key.name), charged: AtomicUsize::new(0) };
        self.take_request(now)?;
        Ok(admission)
    }

    /// Takes a request from its bucket, if that and the one of tokens have something.
    fn take_request(&self, now: Instant) -> Result<(), LimitReached> {
        let [requests, tokens] = &mut *self.usage.buckets();
        let of_tokens = (self.key.tokens_per_minute, tokens, "tokens a minute (tokens_per_minute)");
        let of_requests = (self.key.requests_per_minute, &mut *requests, "requests a minute (requests_per_minute)");
        for (limit, bucket, words) in [of_tokens, of_requests] {
            let Some(limit) = limit else { continue };
            let level = bucket.level(limit.into(), now);
            if level < 1.0 {
                return Err(self.reached(words, limit, time_to_fill(level, 1.0, limit.into())));
            }
        }
        requests.take(1.0);
        Ok(())
    }

    fn reached(&self, what: &str, limit: u32, wait: Duration) -> LimitReached {
        let retry_after_ms = (wait.as_micros().div_ceil(1000) as u64).max(1);
        let message = format!("The limit of the key {:?} is reached: {limit} {what}. Try again in {}.", self.key.name, span(wait));
        let failure = Failure::new(Kind::Overloaded, message).code("rate_limit_exceeded").retry_after(retry_after_ms.div_ceil(1000));
        LimitReached { failure, retry_after_ms }
    }

    /// OpenAI's headers of the limits that the key has.
    pub fn write_headers(&self, headers: &mut HeaderMap) {
        let now = Instant::now();
        let mut buckets = self.usage.buckets();
        let [requests, tokens] = &mut *buckets;
        for (limit, bucket, names) in
            [(self.key.requests_per_minute, requests, &REQUEST_HEADERS), (self.key.tokens_per_minute, tokens, &TOKEN_HEADERS)]
        {
            let Some(limit) = limit else { continue };
            let level = bucket.level(limit.into(), now);
            let reset = span(time_to_fill(level, limit.into(), limit.into()));
            for (name, value) in names.iter().zip([limit.to_string(), format!("{}", level.max(0.0).floor()), reset]) {
                if let Ok(value) = HeaderValue::from_str(&value) {
                    headers.insert(HeaderName::from_static(name), value);
                }
            }
        }
    }
}

const REQUEST_HEADERS: [&str; 3] = ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"];
const TOKEN_HEADERS: [&str; 3] = ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"];
/// For browsers, which hide from scripts what is not named.
pub const EXPOSED: &str = "retry-after-ms, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, \
                           x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens";

/// As OpenAI writes it: `6m0s`, `1.2s`, `20ms`.
fn span(time: Duration) -> String {
    let ms = time.as_micros().div_ceil(1000);
    let (minutes, rest) = (ms / 60_000, ms % 60_000);
    match (minutes, rest) {
        (0, rest) if rest < 1000 => format!("{rest}ms"),
        (0, rest) => format!("{}s", rest as f64 / 1000.0),
        (minutes, rest) => format!("{minutes}m{}s", rest.div_ceil(1000)),
    }
}

/// A request that was let in, until its answer is out or nobody wants it any more.
#[derive(Debug)]
pub struct Admission {
    client: Client,
    /// Counts its tokens.
    pub tally: Arc<Tally>,
    /// Tokens that were taken from the bucket.
    charged: AtomicUsize,
}

impl Admission {
    /// Takes the tokens counted so far, each once.
    pub fn charge(&self) {
        let tokens = self.tally.tokens();
        let charged = self.charged.swap(tokens, Ordering::AcqRel);
        if let Some(limit) = self.client.key.tokens_per_minute {
            let bucket = &mut self.client.usage.buckets()[1];
            bucket.level(limit.into(), Instant::now());
            bucket.take(tokens.saturating_sub(charged) as f64);
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.charge();
        self.client.usage.running.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The body of an answer, which holds the request's place until it is out or dropped.
pub struct Counted {
    body: Body,
    _admission: Arc<Admission>,
}

impl Counted {
    pub fn new(body: Body, admission: Arc<Admission>) -> Self {
        Self { body, _admission: admission }
    }
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn client(limits: &str) -> Client {
        let text = format!("- {{name: a, key: x, {limits}}}");
        let key = crate::config::keys_file::read(&text).unwrap().remove(0);
        Client { key: Arc::new(key), usage: Usage::new() }
    }

    fn headers(client: &Client) -> HeaderMap {
        let mut headers = HeaderMap::new();
        client.write_headers(&mut headers);
        headers
    }

    fn told(client: &Client, name: &str) -> String {
        headers(client)[name].to_str().unwrap().to_owned()
    }

    #[test]
    fn requests_of_a_minute_are_counted() {
        let client = client("requests_per_minute: 2");
        drop((client.admit().unwrap(), client.admit().unwrap()));
        let refused = client.admit().unwrap_err();
        assert_eq!(
            (refused.failure.status(), refused.failure.code, client.usage.running.load(Ordering::Relaxed)),
            (429, Some("rate_limit_exceeded"), 0)
        );
        // Half a minute for one of two.
        let wait = refused.retry_after_ms;
        assert!((20_000..=30_000).contains(&wait) && refused.failure.message.contains("2 requests a minute"), "{refused:?}");
        assert_eq!(
            (told(&client, "x-ratelimit-limit-requests"), told(&client, "x-ratelimit-remaining-requests")),
            ("2".into(), "0".into())
        );
        assert!(!headers(&client).contains_key("x-ratelimit-limit-tokens"));
    }

    #[test]
    fn tokens_are_charged_once_and_may_overdraw() {
        let client = client("tokens_per_minute: 10");
        let admission = client.admit().unwrap();
        admission.tally.add_prompt(5);
        admission.charge();
        assert_eq!(headers(&client)["x-ratelimit-remaining-tokens"], "5");
        admission.tally.add_output(25);
        admission.charge();
        drop(admission);
        let refused = client.admit().unwrap_err();
        // From -20 to 1 at one token in six seconds.
        assert!((120_000..=126_000).contains(&refused.retry_after_ms), "{refused:?}");
        assert_eq!((told(&client, "x-ratelimit-remaining-tokens"), client.usage.running.load(Ordering::Relaxed)), ("0".into(), 0));
    }

    #[test]
    fn places_are_given_back() {
        let client = client("max_concurrency: 1");
        let admission = client.admit().unwrap();
        assert!(client.admit().unwrap_err().failure.message.contains("1 requests at a time"));
        drop(admission);
        assert!(client.admit().is_ok() && headers(&client).is_empty());
    }

    #[test]
    fn spans_are_written_as_openai_writes_them() {
        for (ms, text) in [(0, "0ms"), (20, "20ms"), (1200, "1.2s"), (59_999, "59.999s"), (60_000, "1m0s"), (360_001, "6m1s")] {
            assert_eq!(span(Duration::from_millis(ms)), text);
        }
    }

    proptest! {
        #[test]
        fn a_bucket_gives_its_size_and_what_flowed_in(size in 1.0..1000.0_f64, steps in prop::collection::vec((0_u64..5000, 0.0..50.0_f64), 0..40)) {
            let begin = Instant::now();
            let (mut bucket, mut now, mut taken) = (Bucket::full(begin), begin, 0.0);
            for (wait, amount) in steps {
                now += Duration::from_millis(wait);
                let level = bucket.level(size, now);
                prop_assert!(level <= size);
                if level >= amount {
                    bucket.take(amount);
                    taken += amount;
                }
                prop_assert!(taken <= size + (now - begin).as_secs_f64() * size / 60.0 + 1e-6);
            }
        }
    }
}
