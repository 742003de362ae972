//! The worker: what it is made of, and the life of one job.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::task::JoinError;
use tracing::Instrument;

use super::client::{Client, Delivery};
use super::in_flight::{InFlight, InFlightJob};
use super::job::{Entry, Job, Outcome};
use super::outbox::{Outbox, Rules};
use super::retry::RetryPolicy;
use super::{Handler, heartbeat, poll, stop};
use crate::api::Answer;
use crate::api::tally::{End, Tally};
use crate::config::{RunpodSettings, defaults};
use crate::engine::Health;
use crate::error::{Failure, Kind};

/// A queue worker, ready to [`run`](Worker::run).
pub struct Worker {
    settings: RunpodSettings,
    concurrency: usize,
    handler: Handler,
    health: Health,
    policy: RetryPolicy,
}

/// Why a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was told to, and every job it held was answered: exit 0.
    Drained,
    /// Its engine is beyond repair; the platform was asked to replace it: exit 1.
    Unhealthy,
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
            rules: Rules { interval: settings.stream_interval.unwrap_or(defaults::STREAM_INTERVAL), batch: settings.batch },
            expired: watch::Sender::new(false),
        });
        let health = self.health;
        let report = tokio::spawn({
            let settings = settings.clone();
            async move { heartbeat::report_unhealthy(&settings, "engine", &health.failed().await.message).await }
        });
        let stops = tokio::spawn(stop::listen(client, in_flight));
        let drain_timeout = settings.drain_timeout.unwrap_or(defaults::DRAIN_TIMEOUT);
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

/// What all jobs of a worker share.
pub(crate) struct Jobs {
    pub client: Arc<Client>,
    pub in_flight: Arc<InFlight>,
    handler: Handler,
    pub health: Health,
    rules: Rules,
    /// Becomes true when the drain's deadline has passed.
    pub expired: watch::Sender<bool>,
}

impl Jobs {
    /// Starts everything that a take brought. What cannot be run is answered with an error; what runs already is left alone.
    /// Returns what was wrong with the take, if anything was.
    pub fn accept(self: &Arc<Self>, entries: Vec<Entry>) -> Option<&'static str> {
        let mut fault = None;
        let mut repeated = 0;
        let count = entries.len();
        for entry in entries {
            let started = match entry {
                Entry::Job(job) => self.start(&job.id.clone(), job.batch_id.clone(), Ok(job)),
                Entry::Faulty { id, failure } => {
                    tracing::error!(request_id = %id, "a job was taken that cannot be run: {failure}");
                    // One that is too large is its client's mistake: no reason to ask the platform less often.
                    if failure.kind != Kind::TooLarge {
                        fault = Some("a job that cannot be run");
                    }
                    self.start(&id, None, Err(failure))
                }
                Entry::NoId => {
                    tracing::error!("a job without an id was taken: it can neither be run nor answered");
                    fault = Some("a job without an id");
                    continue;
                }
            };
            repeated += usize::from(!started);
        }
        tracing::debug!("Jobs in progress: {}", self.in_flight.len());
        // Else a queue that hands out the same jobs again and again would be asked at full speed.
        if count > 0 && repeated == count { Some("only jobs that run already") } else { fault }
    }

    /// False: the job runs already.
    fn start(self: &Arc<Self>, id: &str, batch_id: Option<String>, job: Result<Job, Failure>) -> bool {
        // A job that has ended may come again: a retry. One that still runs was delivered twice, and runs once.
        let Some((guard, stopped)) = self.in_flight.begin(id) else {
            tracing::warn!(request_id = %id, "the job was delivered again while it runs; once is enough");
            return false;
        };
        // Of the highest level, so that also a log of errors alone names the job.
        let span = tracing::error_span!("job", request_id = %id, batch_id = batch_id.as_deref());
        tokio::spawn(Arc::clone(self).answer(id.to_owned(), job, guard, stopped).instrument(span));
        true
    }

    /// Runs one job and posts its result: once, or never if the platform stops it.
    async fn answer(self: Arc<Self>, id: String, job: Result<Job, Failure>, guard: InFlightJob, mut stopped: oneshot::Receiver<()>) {
        let tally = Tally::begin();
        let outcome = match (job, self.health.failure()) {
            (Ok(job), None) => self.outcome(job, &tally, &mut stopped).await,
            // A broken engine runs nothing.
            (Err(failure), _) | (Ok(_), Some(failure)) => Some(Outcome::Failed { failure, streamed: false }),
        };
        let delivery = match &outcome {
            None => None,
            Some(Outcome::Failed { failure, .. }) if failure.kind == Kind::Cancelled => None,
            Some(outcome) => tokio::select! {
                biased;
                Ok(()) = &mut stopped => None,
                delivery = self.client.done(&id, outcome, self.beyond_repair(outcome)) => Some(delivery),
            },
        };
        tally.log(&match (&delivery, &outcome) {
            (None, _) => End::Stopped,
            (Some(Delivery::Lost), _) => End::Lost,
            (Some(Delivery::Replaced(failure)), _) | (Some(Delivery::Arrived), Some(Outcome::Failed { failure, .. })) => {
                End::Failed(failure)
            }
            (Some(Delivery::Arrived), _) => End::Completed,
        });
        drop(guard);
    }

    /// `None`: the platform stopped the job.
    async fn outcome(&self, job: Job, tally: &Arc<Tally>, stopped: &mut oneshot::Receiver<()>) -> Option<Outcome> {
        tracing::info!("Started.");
        let outbox = Outbox { client: Arc::clone(&self.client), job_id: job.id.clone(), rules: self.rules };
        let handler = Arc::clone(&self.handler);
        // Whether the answer turned out to be a stream, also when its task does not live to tell.
        let streamed = Arc::new(AtomicBool::new(false));
        let is_stream = Arc::clone(&streamed);
        let tally = Arc::clone(tally);
        let work = async move {
            match tally.around(handler(job)).await {
                Ok(answer) => {
                    is_stream.store(matches!(answer, Answer::Stream(_)), Ordering::Relaxed);
                    outbox.deliver(answer).await
                }
                Err(failure) => Outcome::Failed { failure, streamed: false },
            }
        };
        // A task of its own: its panic ends here, and a handler that blocks its thread cannot hold up the deadline.
        let mut work = tokio::spawn(work.in_current_span());
        let mut expired = self.expired.subscribe();
        let failure = tokio::select! {
            biased;
            Ok(()) = &mut *stopped => None,
            result = &mut work => return Some(result.unwrap_or_else(|error| panicked(&error, streamed.load(Ordering::Relaxed)))),
            _ = expired.wait_for(|&expired| expired) => {
                Some(self.health.failure().unwrap_or_else(|| {
                    Failure::new(Kind::Draining, "The worker was shut down before this job ended. Try again.").code("worker_shutdown")
                }))
            }
        };
        // Aborting drops the stream, which cancels the generation. A stream post of it that is under way must not overtake the final post.
        work.abort();
        let _ = tokio::time::timeout(Duration::from_secs(1), work).await;
        failure.map(|failure| Outcome::Failed { failure, streamed: streamed.load(Ordering::Relaxed) })
    }

    fn beyond_repair(&self, outcome: &Outcome) -> bool {
        let internal = matches!(outcome, Outcome::Failed { failure, .. } if failure.kind == Kind::Internal);
        internal && self.health.failure().is_some()
    }
}

fn panicked(error: &JoinError, streamed: bool) -> Outcome {
    tracing::error!("the job's handler panicked: {error}");
    Outcome::Failed { failure: Failure::internal("The worker failed while it ran this job."), streamed }
}
