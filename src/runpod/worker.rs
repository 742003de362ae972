//! The worker: what it is made of.

use std::sync::Arc;

use tokio::sync::watch;

use super::client::Client;
use super::in_flight::InFlight;
use super::jobs::Jobs;
use super::outbox::Rules;
use super::poll::Ended;
use super::retry::RetryPolicy;
use super::{Handler, heartbeat, poll, stop};
use crate::config::RunpodSettings;
use crate::engine::Health;

/// A queue worker, ready to [`run`](Worker::run).
pub struct Worker {
    settings: RunpodSettings,
    concurrency: usize,
    handler: Handler,
    health: Health,
    policy: RetryPolicy,
}

impl Worker {
    /// A worker that runs up to `concurrency` jobs at once.
    pub fn new(settings: &RunpodSettings, concurrency: usize, handler: Handler) -> Self {
        Self {
            settings: settings.clone(),
            concurrency: concurrency.max(1),
            handler,
            health: Health::default(),
            policy: RetryPolicy::default(),
        }
    }

    /// Where the worker hears that its engine is beyond repair. It then takes no more jobs, answers those it holds with the reason, asks the
    /// platform to be replaced (`stopPod`, an unhealthy ping), and ends: better than failing one job after the other at full speed.
    pub fn health(mut self, health: Health) -> Self {
        self.health = health;
        self
    }

    /// Other waits and limits than the platform's.
    pub fn retry_policy(mut self, policy: RetryPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Takes and answers jobs until `shutdown` completes, then drains:
    ///
    /// * no new poll for jobs begins; the one that is pending may still end, for as long as the server was seen to hold polls and as long as
    ///   jobs run, and a job that it brings is run. Cutting it off could lose a job which the server hands out at that moment;
    /// * running jobs go on for `drain_timeout`, with heartbeats; those still unfinished are then answered with an error.
    ///
    /// A broken engine ends it too, within `RetryPolicy::broken_drain`: then no job is run any more, also not one that the last poll brings.
    ///
    /// Fails at once, naming the variable, when the settings cannot work.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> Result<Ended, String> {
        let mut settings = self.settings;
        let worker_id = settings.worker_id.get_or_insert_with(|| uuid::Uuid::new_v4().to_string()).clone();
        let in_flight = InFlight::new();
        let client = Arc::new(Client::new(&settings, &worker_id, self.policy.clone())?);
        let heartbeat = heartbeat::start(&settings, Arc::clone(&in_flight), self.policy.ping_retry)?;
        let jobs = Arc::new(Jobs {
            client: Arc::clone(&client),
            in_flight: Arc::clone(&in_flight),
            handler: self.handler,
            health: self.health.clone(),
            rules: Rules { interval: settings.stream_interval, batch: settings.batch },
            expired: watch::Sender::new(false),
        });
        let health = self.health;
        let report = tokio::spawn({
            let settings = settings.clone();
            async move { heartbeat::report_unhealthy(&settings, "engine", &health.failed().await.message).await }
        });
        let stops = tokio::spawn(stop::listen(client, in_flight));
        let drain_timeout = settings.drain_timeout;
        let ended = poll::run(&jobs, self.concurrency, drain_timeout, shutdown).await;
        stops.abort();
        drop(heartbeat);
        match ended {
            // It has its own deadline; an error would be a panic of its task.
            Ended::Unhealthy => drop(report.await),
            Ended::Drained => report.abort(),
        }
        Ok(ended)
    }
}
