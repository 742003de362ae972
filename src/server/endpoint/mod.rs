//! A local RunPod endpoint, in memory: the client routes of the cloud, the worker routes of the cloud, and the queue between them.
//!
//! It mimics the cloud, not the SDK's development server. Any id is an endpoint, from its first use on. What differs from the cloud:
//! no rate limits, no scaling, and a client of `/openai/` that hangs up cancels its job.

use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use axum::Router;
use tokio::sync::watch;

use super::sse::Pace;
use crate::error::{Failure, Kind};

mod attach;
mod clients;
mod job;
mod models;
mod openai;
mod queue;
mod state;
mod webhook;
mod workers;

#[cfg(test)]
mod tests;

pub use attach::worker_variables;
use job::Origin;
use queue::Queue;
use webhook::Webhooks;

/// How the endpoint behaves. The defaults are the cloud's, as far as they are known.
#[derive(Debug, Clone)]
pub struct EndpointOptions {
    /// How long a worker's poll is held before it is answered with 204.
    pub hold: Duration,
    /// How long `/stream` waits for a chunk.
    pub stream_hold: Duration,
    /// Silence after which a worker that pings counts as lost, and its jobs go back into the queue.
    pub lost_after: Duration,
    /// The same for a worker that neither pings nor polls its stop channel, and so cannot be heard while it works.
    pub silent_after: Duration,
    /// A worker that says it holds no job has lost the jobs that it was given longer ago than this.
    pub arrival: Duration,
    /// Workers that may be lost over one job before it fails.
    pub max_losses: u32,
    /// How long a job may run when its client names no `policy.executionTimeout`.
    pub execution_timeout: Duration,
    /// Jobs that may wait at one endpoint.
    pub max_queued: usize,
    /// Bytes of all jobs held, inputs and results, at all endpoints.
    pub max_bytes: usize,
    /// Largest request and result of `/run`.
    pub run_limit: usize,
    /// Largest request and result of `/runsync` and `/openai/`.
    pub sync_limit: usize,
    /// Largest post of a stream chunk.
    pub chunk_limit: usize,
    /// How long results of `/run` are kept.
    pub run_retention: Duration,
    /// How long results of `/runsync` and `/openai/` are kept.
    pub sync_retention: Duration,
    /// Between two tries of a webhook.
    pub webhook_pause: Duration,
    /// Between two looks at the clocks: time-outs, retention, lost workers.
    pub tick: Duration,
    /// A failed job answers `/openai/` clients with 500, as the cloud is reported to, instead of the status in its error.
    pub cloud_errors: bool,
}

impl Default for EndpointOptions {
    fn default() -> Self {
        const MB: usize = 1024 * 1024;
        Self {
            hold: Duration::from_secs(10),
            stream_hold: Duration::from_secs(1),
            lost_after: Duration::from_secs(60),
            arrival: Duration::from_secs(3),
            silent_after: Duration::from_secs(600),
            max_losses: 3,
            execution_timeout: Duration::from_secs(600),
            max_queued: 10_000,
            max_bytes: 1024 * MB,
            run_limit: 10 * MB,
            sync_limit: 20 * MB,
            chunk_limit: MB,
            run_retention: Duration::from_secs(30 * 60),
            sync_retention: Duration::from_secs(60),
            webhook_pause: Duration::from_secs(10),
            tick: Duration::from_millis(500),
            cloud_errors: false,
        }
    }
}

impl EndpointOptions {
    fn limit(&self, origin: Origin) -> usize {
        if origin == Origin::Run { self.run_limit } else { self.sync_limit }
    }

    fn retention(&self, origin: Origin) -> Duration {
        if origin == Origin::Run { self.run_retention } else { self.sync_retention }
    }
}

/// Endpoints that may exist at once; ids cost nothing to make up.
const MOST_ENDPOINTS: usize = 1000;

/// All endpoints of this process. Cheap to clone. Make it inside a tokio runtime: it has a task that watches the clocks.
#[derive(Clone)]
pub struct Endpoints {
    shared: Arc<Shared>,
}

struct Shared {
    options: Arc<EndpointOptions>,
    queues: Mutex<HashMap<String, Arc<Queue>>>,
    held: Arc<AtomicUsize>,
    webhooks: Arc<Webhooks>,
    closed: watch::Sender<bool>,
}

impl Endpoints {
    pub fn new(options: EndpointOptions) -> Self {
        let shared = Arc::new(Shared {
            webhooks: Webhooks::new(options.webhook_pause),
            options: Arc::new(options),
            queues: Mutex::default(),
            held: Arc::default(),
            closed: watch::Sender::new(false),
        });
        tokio::spawn(watch_clocks(Arc::downgrade(&shared), shared.options.tick));
        Self { shared }
    }

    /// The routes under `/v2/{id}/`, for clients and for workers.
    pub fn router(&self, pace: Pace) -> Router {
        Router::new().merge(clients::router(self.clone())).merge(self.workers_router()).merge(openai::router(self.clone(), pace))
    }

    /// What workers call alone.
    pub fn workers_router(&self) -> Router {
        attach::router(self.clone())
    }

    /// `/v1/…` and `/openai/v1/…`, routed by model name. It has the fallback: merge it into a router that has none.
    pub fn models_router(&self, pace: Pace) -> Router {
        models::router(self.clone(), pace)
    }

    /// No new jobs; polls that are being held end at once, so that a server can stop.
    pub fn close(&self) {
        self.shared.closed.send_replace(true);
    }

    /// The endpoint of this id; made when it is not there yet.
    fn queue(&self, id: &str) -> Result<Arc<Queue>, Failure> {
        let mut queues = self.lock();
        if let Some(queue) = queues.get(id) {
            return Ok(queue.clone());
        }
        if queues.len() >= MOST_ENDPOINTS {
            queues.retain(|_, queue| Arc::strong_count(queue) > 1 || !queue.look(|state| state.is_idle()));
        }
        if queues.len() >= MOST_ENDPOINTS {
            return Err(Failure::new(Kind::Overloaded, format!("There are {MOST_ENDPOINTS} endpoints already.")).retry_after(60));
        }
        let shared = &self.shared;
        let queue = Arc::new(Queue::new(shared.options.clone(), shared.held.clone(), shared.webhooks.clone(), shared.closed.subscribe()));
        queues.insert(id.to_owned(), queue.clone());
        Ok(queue)
    }

    /// The endpoints that workers ask for jobs, by id.
    fn served(&self) -> Vec<(String, Arc<Queue>)> {
        let queues: Vec<_> = self.lock().iter().map(|(id, queue)| (id.clone(), queue.clone())).collect();
        let mut served: Vec<_> = queues.into_iter().filter(|(_, queue)| queue.look(|state| state.workers.any_polling())).collect();
        served.sort_by(|left, right| left.0.cmp(&right.0));
        served
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Queue>>> {
        self.shared.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets time pass at every endpoint, until the last handle is gone.
async fn watch_clocks(shared: Weak<Shared>, tick: Duration) {
    loop {
        tokio::time::sleep(tick).await;
        let Some(shared) = shared.upgrade() else { return };
        let queues: Vec<_> = shared.queues.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        for queue in queues {
            queue.change(|state, now: Instant| state.sweep(now));
        }
    }
}
