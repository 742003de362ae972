//! One job: what the client ordered, and how far it has come.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use tokio::sync::Notify;

use crate::api::body;
use crate::error::{Failure, Kind};

/// The states of the public API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    InQueue,
    InProgress,
    Completed,
    Failed,
    Cancelled,
    TimedOut,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Status::InQueue => "IN_QUEUE",
            Status::InProgress => "IN_PROGRESS",
            Status::Completed => "COMPLETED",
            Status::Failed => "FAILED",
            Status::Cancelled => "CANCELLED",
            Status::TimedOut => "TIMED_OUT",
        }
    }

    pub fn is_final(self) -> bool {
        !matches!(self, Status::InQueue | Status::InProgress)
    }
}

/// Which route a job came by: it fixes the id's form, the size limits and how long the result is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Run,
    Sync,
    OpenAi,
}

const EXECUTION_RANGE: (u64, u64) = (5_000, 7 * 86_400_000);
const TTL_DEFAULT: u64 = 86_400_000;
const TTL_RANGE: (u64, u64) = (10_000, 7 * 86_400_000);

/// What a client ordered.
#[derive(Debug, Clone)]
pub struct Order {
    pub origin: Origin,
    /// JSON as its client wrote it: only a worker reads it, and as text it takes least memory.
    pub input: Bytes,
    pub webhook: Option<String>,
    pub s3_config: Option<Bytes>,
    /// From the moment a worker takes the job; `None` = the endpoint's.
    pub execution_timeout: Option<Duration>,
    /// From submission, whatever the job's state.
    pub ttl: Duration,
    /// Size of the request body.
    pub bytes: usize,
}

impl Order {
    pub fn new(origin: Origin, input: Bytes, bytes: usize) -> Self {
        Self { origin, input, webhook: None, s3_config: None, execution_timeout: None, ttl: Duration::from_millis(TTL_DEFAULT), bytes }
    }

    /// Reads the body of `/run` or `/runsync`. Policy times outside RunPod's limits are moved to the nearest limit;
    /// `policy.lowPriority` concerns scaling, and nothing scales here.
    pub fn parse(origin: Origin, body: &Bytes) -> Result<Self, Failure> {
        let [input, webhook, s3_config, policy] = body::members(body, ["input", "webhook", "s3Config", "policy"])?;
        let text = |member: &RawValue| Some(body.slice_ref(member.get().as_bytes())).filter(|text| text.as_ref() != b"null");
        let Some(input) = input.and_then(text) else {
            return Err(Failure::bad_request("input", "The request needs an `input`."));
        };
        let mut order = Self::new(origin, input, body.len());
        order.webhook = self::webhook(&small("webhook", webhook)?)?;
        order.s3_config = s3_config.and_then(text);
        let policy = small("policy", policy)?;
        if !policy.is_null() && !policy.is_object() {
            return Err(Failure::bad_request("policy", "`policy` must be an object."));
        }
        order.execution_timeout = milliseconds(&policy, "executionTimeout", EXECUTION_RANGE)?;
        if let Some(time) = milliseconds(&policy, "ttl", TTL_RANGE)? {
            order.ttl = time;
        }
        Ok(order)
    }
}

/// Most bytes of a member that this endpoint reads itself.
const SMALL: usize = 64 * 1024;

/// A member that this endpoint reads itself; null when it is not there.
fn small(name: &str, member: Option<&RawValue>) -> Result<Value, Failure> {
    let Some(member) = member else { return Ok(Value::Null) };
    if member.get().len() > SMALL {
        return Err(Failure::bad_request(name, format!("`{name}` is longer than {SMALL} bytes.")));
    }
    serde_json::from_str(member.get()).map_err(|error| Failure::bad_request(name, format!("`{name}` is not valid JSON: {error}.")))
}

/// What a worker is given of a job: JSON in parts, of which the input is shared with the job.
#[derive(Debug)]
pub struct Offer {
    #[cfg(test)]
    pub id: String,
    pub parts: [Bytes; 3],
}

/// The longest input that is kept of a job that has ended, for `/retry`.
const KEPT: usize = 10 * 1024 * 1024;

fn webhook(value: &Value) -> Result<Option<String>, Failure> {
    match value {
        Value::Null => Ok(None),
        Value::String(url) if url.is_empty() => Ok(None),
        Value::String(url) if url.starts_with("http://") || url.starts_with("https://") => Ok(Some(url.clone())),
        _ => Err(Failure::bad_request("webhook", "`webhook` must be an http:// or https:// URL.")),
    }
}

fn milliseconds(policy: &Value, key: &str, (least, most): (u64, u64)) -> Result<Option<Duration>, Failure> {
    match &policy[key] {
        Value::Null => Ok(None),
        value => match value.as_u64() {
            Some(time) => Ok(Some(Duration::from_millis(time.clamp(least, most)))),
            None => Err(Failure::bad_request(format!("policy.{key}"), format!("`policy.{key}` must be a whole number of milliseconds."))),
        },
    }
}

/// Bytes held on account of one job; given back when it goes.
#[derive(Debug)]
pub struct Charge {
    order: usize,
    result: usize,
    total: Arc<AtomicUsize>,
}

impl Charge {
    fn new(order: usize, total: &Arc<AtomicUsize>) -> Self {
        total.fetch_add(order, Ordering::Relaxed);
        Self { order, result: 0, total: total.clone() }
    }

    /// More came from the worker.
    pub fn add(&mut self, bytes: usize) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
        self.result += bytes;
    }

    /// What the client ordered is gone, but for `left` bytes.
    pub fn forget_order(&mut self, left: usize) {
        self.total.fetch_sub(self.order.saturating_sub(left), Ordering::Relaxed);
        self.order = self.order.min(left);
    }

    /// What came from the worker is gone.
    pub fn clear(&mut self) {
        self.total.fetch_sub(self.result, Ordering::Relaxed);
        self.result = 0;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.total.fetch_sub(self.order + self.result, Ordering::Relaxed);
    }
}

/// A job in the endpoint's memory.
#[derive(Debug)]
pub struct QueuedJob {
    pub id: String,
    pub order: Order,
    pub status: Status,
    pub created: Instant,
    /// When it last entered the queue.
    pub queued: Instant,
    pub started: Option<Instant>,
    pub finished: Option<Instant>,
    /// Who holds it, or held it last.
    pub worker: Option<String>,
    /// Workers that held it and lost it: what they still say about it does not count.
    pub past: Vec<String>,
    /// Times it went back into the queue, by a client's wish or because a worker was lost.
    pub retries: u32,
    /// Times a worker was lost with it.
    pub losses: u32,
    /// Since when its worker's pings leave it out.
    pub unlisted: Option<Instant>,
    /// The result, or the progress while it runs.
    pub output: Option<Value>,
    pub error: Option<Value>,
    /// Chunks not read yet.
    pub stream: VecDeque<Value>,
    /// Told on every change.
    pub changed: Arc<Notify>,
    pub charge: Charge,
}

impl QueuedJob {
    pub fn new(id: String, order: Order, now: Instant, held: &Arc<AtomicUsize>) -> Self {
        let charge = Charge::new(order.bytes + Self::OVERHEAD, held);
        Self {
            id,
            order,
            status: Status::InQueue,
            created: now,
            queued: now,
            started: None,
            finished: None,
            worker: None,
            past: Vec::new(),
            retries: 0,
            losses: 0,
            unlisted: None,
            output: None,
            error: None,
            stream: VecDeque::new(),
            changed: Arc::new(Notify::new()),
            charge,
        }
    }

    /// What a job weighs beside its body.
    pub const OVERHEAD: usize = 1024;

    /// Whether `worker` may still speak for this job. Worker ids may differ between the take and the result (some templates leave one of
    /// them unexpanded), so anyone but those who lost it may.
    pub fn held_by(&self, worker: &str) -> bool {
        self.status == Status::InProgress && (self.worker.as_deref() == Some(worker) || !self.past.iter().any(|past| past == worker))
    }

    /// Back to the state of a fresh submission, but for the counters.
    pub fn requeue(&mut self, now: Instant) {
        self.past.extend(self.worker.take());
        self.status = Status::InQueue;
        self.queued = now;
        self.started = None;
        self.finished = None;
        self.unlisted = None;
        self.output = None;
        self.error = None;
        self.stream.clear();
        self.retries += 1;
        self.charge.clear();
        self.changed.notify_waiters();
    }

    /// What a worker is given.
    pub fn offer(&self) -> Offer {
        let head = format!("{{\"id\":{},\"input\":", json!(self.id));
        let mut tail = Vec::new();
        if let Some(webhook) = &self.order.webhook {
            tail.extend_from_slice(format!(",\"webhook\":{}", json!(webhook)).as_bytes());
        }
        if let Some(s3_config) = &self.order.s3_config {
            tail.extend_from_slice(b",\"s3Config\":");
            tail.extend_from_slice(s3_config);
        }
        tail.push(b'}');
        Offer {
            #[cfg(test)]
            id: self.id.clone(),
            parts: [head.into(), self.order.input.clone(), tail.into()],
        }
    }

    /// The body of a webhook: the whole status object, with what was ordered.
    pub fn notice(&self, url: &str) -> Vec<u8> {
        let mut notice = Value::Object(self.report()).to_string().into_bytes();
        notice.pop();
        notice.extend_from_slice(b",\"input\":");
        notice.extend_from_slice(&self.order.input);
        notice.extend_from_slice(format!(",\"webhook\":{}}}", json!(url)).as_bytes());
        notice
    }

    /// Lets go of the input of a job that has ended, unless a client may send it into the queue again.
    pub fn forget_input(&mut self) {
        let retried = matches!(self.status, Status::Failed | Status::TimedOut) && self.order.origin != Origin::OpenAi;
        if !retried || self.order.input.len() > KEPT {
            self.order.input = Bytes::new();
            self.charge.forget_order(Self::OVERHEAD);
        }
    }

    /// The status object, without output and error: `id`, `status`, times, worker.
    pub fn summary(&self) -> Map<String, Value> {
        let mut map = Map::new();
        if let Some(started) = self.started {
            map.insert("delayTime".into(), json!(started.saturating_duration_since(self.queued).as_millis() as u64));
            if let Some(finished) = self.finished {
                map.insert("executionTime".into(), json!(finished.saturating_duration_since(started).as_millis() as u64));
            }
        }
        map.insert("id".into(), json!(self.id));
        map.insert("status".into(), json!(self.status.name()));
        if let Some(worker) = &self.worker {
            map.insert("workerId".into(), json!(worker));
        }
        if self.retries > 0 {
            map.insert("retries".into(), json!(self.retries));
        }
        map
    }

    /// The whole status object.
    pub fn report(&self) -> Map<String, Value> {
        let mut map = self.summary();
        if let Some(output) = &self.output {
            map.insert("output".into(), output.clone());
        }
        if let Some(error) = &self.error {
            map.insert("error".into(), error.clone());
        }
        map
    }
}

/// The job is not there: never was, or its time is over.
pub fn unknown(id: &str) -> Failure {
    Failure::new(Kind::NotFound, format!("Job `{id}` does not exist, or its result is no longer kept."))
}
