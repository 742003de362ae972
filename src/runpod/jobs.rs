//! The jobs that a worker runs: the life of each, from the take to the posted result.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::task::JoinError;
use tracing::Instrument;

use super::Handler;
use super::client::{Client, Delivery};
use super::in_flight::{InFlight, InFlightJob};
use super::job::{Entry, Job, Outcome};
use super::outbox::{Outbox, Rules};
use crate::api::Reply;
use crate::api::tally::{End, Tally};
use crate::engine::Health;
use crate::error::{Failure, Kind};

/// What all jobs of a worker share.
pub(crate) struct Jobs {
    pub client: Arc<Client>,
    pub in_flight: Arc<InFlight>,
    pub handler: Handler,
    pub health: Health,
    pub rules: Rules,
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
                    is_stream.store(matches!(answer, Reply::Stream(_)), Ordering::Relaxed);
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
