//! The platform side of the worker: takes jobs, returns results; knows nothing of tokens.
//!
//! [`Worker::run`] holds one long poll open for jobs (`poll`), runs each job in a task of its own (`jobs`), carries its pieces
//! and its result off in order (`outbox`), listens for cancellations (`stop`), and tells the platform that it lives (`heartbeat`, a
//! thread of its own). Every job taken is answered exactly once: a result, an error, or, when the platform stopped it, silence.
//!
//! The worker drives a [`Handler`], which the assembly makes from the service that also answers HTTP. Of the engine it knows only
//! whether it is sound ([`Health`](crate::engine::Health)).

use std::sync::Arc;

use futures::future::BoxFuture;

use crate::api::Reply;
use crate::config::RunpodSettings;
use crate::error::Failure;

mod client;
mod heartbeat;
mod in_flight;
mod job;
mod jobs;
mod outbox;
mod poll;
mod retry;
mod stop;
#[cfg(test)]
pub(crate) mod tests;
mod urls;
mod worker;

pub use heartbeat::report_unhealthy;
pub use job::Job;
pub use poll::Ended;
pub use retry::RetryPolicy;
pub use worker::Worker;

/// Whether a worker can run with these settings: the platform's URL templates and key. The error names the variable.
pub fn check(settings: &RunpodSettings) -> Result<(), String> {
    let worker_id = settings.worker_id.as_deref().unwrap_or("worker");
    urls::Urls::new(settings, worker_id)?;
    urls::ping(settings, worker_id)?;
    client::http_client(settings).map(drop)
}

/// What answers a job. It may block a thread or panic: that becomes a late or a failed result of this job, nothing more.
/// Dropping its future, or the stream it gave, cancels the work.
pub type Handler = Arc<dyn Fn(Job) -> BoxFuture<'static, Result<Reply, Failure>> + Send + Sync>;
