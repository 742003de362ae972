//! The job loop: one take under way at a time, for as many jobs as there are free slots; and the drain at the end.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;
use tokio::time::Instant;

use super::client::Taken;
use super::jobs::Jobs;
use super::retry::{jittered, sleep_awake};

/// A take under way, which outlives the loop that began it.
type Take<'a> = Pin<Box<dyn Future<Output = Taken> + Send + 'a>>;

/// Why a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was told to, and every job it held was answered: exit 0.
    Drained,
    /// Its engine is beyond repair; the platform was asked to replace it: exit 1.
    Unhealthy,
}

/// Takes and runs jobs until `shutdown` completes or the engine is found beyond repair, then drains.
pub(crate) async fn run(jobs: &Arc<Jobs>, concurrency: usize, drain_timeout: Duration, shutdown: impl Future<Output = ()>) -> Ended {
    let mut poll = Poll { jobs, concurrency, single_until: None, failures: 0, state: State::Working, hold: None, pending: None };
    let ended = tokio::select! {
        biased;
        () = shutdown => Ended::Drained,
        _ = jobs.health.failed() => Ended::Unhealthy,
        () = poll.forever() => Ended::Drained,
    };
    let limit = match ended {
        Ended::Drained => {
            tracing::info!("shutting down: no more jobs are taken, {} in progress", jobs.in_flight.len());
            drain_timeout
        }
        Ended::Unhealthy => {
            tracing::error!("the engine is beyond repair: no more jobs are taken, {} in progress", jobs.in_flight.len());
            drain_timeout.min(jobs.client.policy.broken_drain)
        }
    };
    let hold = poll.longest_hold();
    drain(jobs, poll.pending, hold, limit).await;
    // The engine may have broken meanwhile.
    if jobs.health.failure().is_some() { Ended::Unhealthy } else { ended }
}

/// The last thing said about takes, so that each change is said once.
#[derive(Debug, PartialEq)]
enum State {
    Working,
    Parked,
    RateLimited,
    Odd(String),
    Refused(StatusCode),
    Unreachable,
}

struct Poll<'a> {
    jobs: &'a Arc<Jobs>,
    concurrency: usize,
    /// The batch route was refused: one job at a time until then.
    single_until: Option<Instant>,
    failures: u32,
    state: State,
    /// The longest that the server has held a poll; `None` until one came back empty.
    hold: Option<Duration>,
    /// The take under way. It is kept here and not on the stack of `forever`, because a drain goes on with it.
    pending: Option<Take<'a>>,
}

impl<'a> Poll<'a> {
    async fn forever(&mut self) {
        loop {
            self.jobs.in_flight.below(self.concurrency).await;
            let free = self.concurrency.saturating_sub(self.jobs.in_flight.len()).max(1);
            let began = Instant::now();
            let (url, batch) = self.next_url(free);
            let jobs = self.jobs;
            let take = self.pending.insert(Box::pin(async move { jobs.client.take(&url).await }));
            let taken = take.await;
            self.pending = None;
            let lasted = began.elapsed();
            self.learn(&taken, lasted);
            let pause = self.settle(taken, lasted, batch);
            tokio::time::sleep(pause).await;
        }
    }

    /// Learns how long the server holds polls: an empty answer shows it, and an answer with jobs shows that it is at least that long.
    fn learn(&mut self, taken: &Taken, lasted: Duration) {
        let empty = match taken {
            Taken::Nothing => true,
            Taken::Entries(entries) => entries.is_empty(),
            _ => return,
        };
        if empty || self.hold.is_some() {
            self.hold = self.hold.max(Some(lasted));
        }
    }

    /// The longest that the last poll may be held, which is taken to be a quarter more than any before it.
    fn longest_hold(&self) -> Duration {
        let policy = &self.jobs.client.policy;
        self.hold.map_or(policy.unknown_hold, |hold| hold.mul_f64(1.25).max(policy.least_hold)).min(policy.poll_timeout)
    }

    /// The address of the next take, and whether it is the batch route.
    fn next_url(&mut self, free: usize) -> (String, bool) {
        let urls = &self.jobs.client.urls;
        let busy = self.jobs.in_flight.len() > 0;
        if self.single_until.is_some_and(|until| until <= Instant::now()) {
            self.single_until = None;
        }
        let batch = (free > 1 && self.single_until.is_none()).then(|| urls.take_batch(free, busy)).flatten();
        match batch {
            Some(url) => (url, true),
            None => (urls.take(busy), false),
        }
    }

    /// Acts on what a take gave; returns the pause before the next one.
    fn settle(&mut self, taken: Taken, lasted: Duration, batch: bool) -> Duration {
        let policy = &self.jobs.client.policy;
        let (state, pause) = match taken {
            Taken::Entries(entries) if entries.is_empty() => (State::Working, policy.shortest_poll.saturating_sub(lasted)),
            Taken::Entries(entries) => match self.jobs.accept(entries) {
                None => (State::Working, Duration::ZERO),
                Some(fault) => return self.fail(State::Odd(fault.into())),
            },
            Taken::Nothing => (State::Working, policy.shortest_poll.saturating_sub(lasted)),
            Taken::Parked => (State::Parked, policy.parked.saturating_sub(lasted)),
            Taken::Odd(what) => (State::Odd(what), jittered(policy.shortest_poll)),
            Taken::RateLimited => (State::RateLimited, jittered(policy.rate_limited)),
            // Some servers have no batch route, or a broken one; the plain one may work.
            Taken::Refused(status) if batch && (status == StatusCode::NOT_FOUND || status.is_server_error()) => {
                tracing::info!("the platform refused to hand out several jobs at once (HTTP {status}); taking them one by one");
                self.single_until = Some(Instant::now() + policy.batch_retry);
                return if status == StatusCode::NOT_FOUND { Duration::ZERO } else { self.fail(State::Refused(status)) };
            }
            Taken::Refused(status) => return self.fail(State::Refused(status)),
            Taken::Unreachable(error) => {
                if self.state != State::Unreachable {
                    tracing::warn!("the platform cannot be reached: {error}");
                }
                return self.fail(State::Unreachable);
            }
        };
        self.failures = 0;
        self.enter(state);
        pause
    }

    fn fail(&mut self, state: State) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.enter(state);
        jittered(self.jobs.client.policy.take_backoff.pause(self.failures))
    }

    fn enter(&mut self, state: State) {
        if self.state == state {
            return;
        }
        match &state {
            State::Working if self.state == State::Parked => tracing::debug!("the platform hands out jobs again"),
            State::Working => tracing::info!("polling for jobs works again"),
            State::Parked => tracing::debug!("the platform has no jobs for now: HTTP 400"),
            State::RateLimited => tracing::warn!("the platform asks to poll less often: HTTP 429"),
            State::Odd(what) => tracing::warn!("the platform answered a poll for jobs with {what}"),
            State::Refused(status) if *status == StatusCode::UNAUTHORIZED || *status == StatusCode::FORBIDDEN => {
                tracing::error!("the platform refuses this worker: HTTP {status}; is RUNPOD_AI_API_KEY right? Trying again");
            }
            State::Refused(status) => tracing::error!("polling for jobs fails: HTTP {status}; trying again"),
            State::Unreachable => {}
        }
        self.state = state;
    }
}

/// Waits until every job is answered, for at most `limit`. The pending take ends by itself, or is dropped once nothing runs and `hold` is over,
/// the longest that the server may hold it. A job that it brings is answered like any other. When the engine is broken, the answer is that
/// failure: a job that nobody answers would be lost without a word.
async fn drain(jobs: &Arc<Jobs>, mut pending: Option<Take<'_>>, hold: Duration, limit: Duration) {
    let policy = &jobs.client.policy;
    let mut expired = pin!(sleep_awake(limit));
    let mut last_poll = pin!(sleep_awake(hold));
    let mut waiting_for_poll = true;
    loop {
        let polling = pending.is_some();
        let poll = async {
            match &mut pending {
                Some(take) => take.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = &mut expired => break,
            taken = poll => {
                pending = None;
                if let Taken::Entries(entries) = taken {
                    tracing::info!("{} more jobs came with the last poll", entries.len());
                    jobs.accept(entries);
                }
            }
            () = &mut last_poll, if waiting_for_poll => waiting_for_poll = false,
            () = jobs.in_flight.below(1), if !polling || !waiting_for_poll => return,
        }
    }
    drop(pending);
    if jobs.in_flight.len() == 0 {
        return;
    }
    tracing::warn!("{} jobs are unfinished after {} s of draining: they fail now", jobs.in_flight.len(), limit.as_secs());
    jobs.expired.send_replace(true);
    let longest_post = policy.result_window + policy.result_timeout * 2;
    if tokio::time::timeout(longest_post, jobs.in_flight.below(1)).await.is_err() {
        tracing::error!("these jobs could not be answered: {}", jobs.in_flight.ids().join(", "));
    }
}
