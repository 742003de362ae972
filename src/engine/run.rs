//! The engine's loop, on one OS thread: drain commands → plan → launch → settle.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use super::constraint::MaskThreads;
use super::metrics::{Ended, Log, Moments};
use super::prefault::{Activity, Prefault};
use super::scheduler::{Broken, Outcome, Scheduler};
use super::sequence::{Sequence, SequenceId};
use super::{Command, EngineOptions, Event, Figures, Finish, Handle, Limits, Shared, Submitted, health};
use crate::error::{Failure, Kind};
use crate::models::{Fault, Output, Plan, Runner, StepError};

/// The engine is taken to be broken when this many steps in a row fail, none of them through its requests' fault.
const FAILING_STEPS: u32 = 3;

/// Starts the engine's thread, calls `load` on it, and returns a handle once the model is ready to run.
///
/// The model is made, used and dropped on that thread alone.
pub async fn start<R, F>(load: F, options: EngineOptions) -> Result<Handle, Failure>
where
    R: Runner,
    F: FnOnce() -> Result<R, Failure> + Send + 'static,
{
    let (ready, loaded) = oneshot::channel();
    let body = move || {
        let runner = match std::panic::catch_unwind(AssertUnwindSafe(load)) {
            Ok(Ok(runner)) => runner,
            Ok(Err(failure)) => return drop(ready.send(Err(failure))),
            Err(panic) => return drop(ready.send(Err(Failure::internal(format!("loading the model failed: {}", panic_text(&*panic)))))),
        };
        let shape = runner.shape().clone();
        let (commands, receiver) = std::sync::mpsc::channel();
        let limits = Limits {
            max_model_len: shape.max_model_len,
            vocab_size: shape.vocab_size,
            max_num_seqs: shape.max_num_seqs,
            max_waiting: options.max_waiting,
            memory_bound: shape.memory_bound.then_some((shape.blocks, shape.block_size)),
            pooling: shape.pooling.clone(),
        };
        let figures = Arc::new(Figures::default());
        let health = health::Reporter::default();
        let shared = Arc::new(Shared { limits, commands, figures: figures.clone(), load: 0.into(), health });
        let mut worker = Worker::new(runner, Arc::downgrade(&shared), figures, &options);
        worker.publish();
        if ready.send(Ok(Handle { shared })).is_ok()
            && let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(|| worker.run(&receiver)))
        {
            tracing::error!("the engine's thread panicked: {}", panic_text(&*panic));
        }
    };
    std::thread::Builder::new()
        .name("engine".into())
        .spawn(body)
        .map_err(|error| Failure::internal(format!("cannot start the engine's thread: {error}")))?;
    loaded.await.unwrap_or_else(|_| Err(Failure::internal("the engine's thread ended while loading the model")))
}

/// Where the events of one sequence go, and what its figures need.
struct Client {
    events: mpsc::UnboundedSender<Event>,
    deadline: Option<Instant>,
    request: Arc<str>,
    moments: Moments,
    /// See [`Generation::complete`](super::Generation::complete).
    complete: Arc<AtomicBool>,
}

struct Worker<R> {
    runner: R,
    scheduler: Scheduler,
    clients: HashMap<SequenceId, Client>,
    /// Weak, so that dropping the last handle ends the thread.
    shared: std::sync::Weak<Shared>,
    next_id: SequenceId,
    figures: Arc<Figures>,
    /// Sequences that have ended since the last `publish`.
    ended: usize,
    /// Kept between steps for their memory.
    plan: Plan,
    outcomes: Vec<Outcome>,
    mask_threads: MaskThreads,
    log: Log,
    /// Begins the lines in the log, where there are several engines.
    label: String,
    /// Prompt tokens computed so far.
    computed_prompt: u64,
    prefault: Prefault,
    /// Steps that have failed since the last good one.
    failing: u32,
}

/// After a panic outside of a step the engine is broken. This runs before the clients are dropped, so whoever sees its channel close can
/// already see that.
impl<R> Drop for Worker<R> {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(shared) = self.shared.upgrade()
            && shared.health.failure().is_none()
        {
            shared.health.fail(beyond_repair("it panicked"));
        }
    }
}

impl<R: Runner> Worker<R> {
    fn new(runner: R, shared: std::sync::Weak<Shared>, figures: Arc<Figures>, options: &EngineOptions) -> Self {
        let shape = runner.shape().clone();
        Self {
            scheduler: Scheduler::new(shape, options.prefix_caching, options.proposer),
            runner,
            clients: HashMap::new(),
            shared,
            next_id: 0,
            figures,
            ended: 0,
            plan: Plan::default(),
            outcomes: Vec::new(),
            mask_threads: MaskThreads::default(),
            log: Log::new(options.log_stats),
            label: options.name.as_ref().map_or(String::new(), |name| format!("{name}: ")),
            computed_prompt: 0,
            prefault: Prefault::default(),
            failing: 0,
        }
    }

    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            // When idle, sleep until a command comes. When busy, take the commands that are there.
            let mut next = if self.clients.is_empty() { self.idle(commands) } else { commands.try_recv() };
            loop {
                match next {
                    Ok(Command::Submit(submitted)) => self.submit(submitted),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
                next = commands.try_recv();
            }
            self.drop_gone();
            self.step();
            self.prefault(Activity::Running);
            self.publish();
            let line = self.log.line(&self.figures.lock(), self.computed_prompt, Instant::now());
            if let Some(line) = line {
                tracing::info!("{}{line}", self.label);
            }
        }
    }

    /// Sleeps until a command comes, and prefaults meanwhile.
    fn wait(&mut self, commands: &Receiver<Command>) -> Result<Command, TryRecvError> {
        loop {
            self.prefault(Activity::Idle);
            let next = match self.prefault.due() {
                None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(due) => commands.recv_timeout(due.saturating_duration_since(Instant::now())),
            };
            match next {
                Ok(command) => return Ok(command),
                Err(RecvTimeoutError::Disconnected) => return Err(TryRecvError::Disconnected),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Prefaults a slice of memory, if one is due.
    fn prefault(&mut self, activity: Activity) {
        if self.prefault.advance(&mut self.runner, activity) {
            self.figures.lock().memory_resident = true;
        }
    }

    fn idle(&mut self, commands: &Receiver<Command>) -> Result<Command, TryRecvError> {
        // The check looks at every block, so a release build leaves it out.
        if cfg!(debug_assertions) {
            self.scheduler.check_invariants();
        }
        let since = Instant::now();
        let command = self.wait(commands);
        self.log.idled(since.elapsed());
        command
    }

    fn submit(&mut self, submitted: Submitted) {
        let Submitted { request, events, at, complete } = submitted;
        // The engine broke while this was on its way.
        if let Some(failure) = self.shared.upgrade().and_then(|shared| shared.health.failure()) {
            self.ended += 1;
            let _ = events.send(Event::Failed(failure));
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        self.figures.lock().prompt_tokens += request.prompt.len() as u64;
        let moments = Moments::new(at, &request);
        self.clients.insert(id, Client { events, deadline: request.deadline, request: request.id.clone(), moments, complete });
        self.scheduler.add(Sequence::new(id, &request, self.runner.shape().max_model_len));
    }

    /// Removes the sequences whose receiver is gone, and fails those whose deadline has passed.
    fn drop_gone(&mut self) {
        let now = Instant::now();
        let gone: Vec<SequenceId> = self
            .clients
            .iter()
            .filter(|(_, client)| client.events.is_closed() || client.deadline.is_some_and(|deadline| deadline <= now))
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.scheduler.remove(id);
            let Some(client) = self.clients.remove(&id) else { continue };
            let closed = client.events.is_closed();
            let ended = match closed {
                true if client.complete.load(Ordering::Acquire) => Ended::Stop,
                true => Ended::Cancelled,
                false => Ended::Failed,
            };
            self.ended += 1;
            self.figures.lock().metrics.ended(&client.moments, ended, now);
            if !closed {
                let failure = Failure::new(Kind::Timeout, "the request's time limit passed (REQUEST_TIMEOUT)").code("request_timeout");
                let _ = client.events.send(Event::Failed(failure));
            }
        }
    }

    fn step(&mut self) {
        if !self.scheduler.plan(&mut self.plan) {
            return;
        }
        let begin = Instant::now();
        self.mask_threads.start(self.scheduler.mask_jobs());
        for (id, cached_tokens) in self.scheduler.started() {
            if let Some(client) = self.clients.get_mut(id) {
                self.figures.lock().metrics.started(&mut client.moments, begin);
                let _ = client.events.send(Event::Started { cached_tokens: *cached_tokens });
            }
        }
        let prompts = self.plan.rows.iter().map(|row| row.len - row.draft_len).filter(|len| *len > 1);
        self.computed_prompt += prompts.sum::<usize>() as u64;
        let (runner, plan, tokens) = (&mut self.runner, &self.plan, self.plan.tokens.len());
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| runner.step(plan)));
        self.plan.clear();
        let now = Instant::now();
        self.figures.lock().step(tokens, now - begin);
        match result {
            Ok(Ok(output)) => {
                self.failing = 0;
                self.settle(output, now);
            }
            Ok(Err(error)) => {
                let broken = self.breaks(&error);
                if let Some(reason) = &broken {
                    self.announce(reason.clone());
                }
                let ids = self.scheduler.abandon();
                self.fail(&ids, broken.as_ref().unwrap_or(&error.failure), now);
                if let Some(reason) = broken {
                    self.fail_waiting(&reason, now);
                }
            }
            Err(panic) => {
                tracing::error!("{}a step panicked: {}", self.label, panic_text(&*panic));
                let reason = beyond_repair("a step panicked");
                self.announce(reason.clone());
                let ids = self.scheduler.abandon();
                self.fail(&ids, &Failure::internal("the engine failed while computing this request"), now);
                self.fail_waiting(&reason, now);
            }
        }
    }

    /// Whether the engine is beyond repair after this error, and what its requests are then told.
    fn breaks(&mut self, error: &StepError) -> Option<Failure> {
        match error.fault {
            Fault::Request => None,
            Fault::Device => Some(beyond_repair(&error.failure.message)),
            Fault::Memory | Fault::Unknown => {
                self.failing += 1;
                let often = self.failing >= FAILING_STEPS;
                often.then(|| beyond_repair(&format!("{} steps in a row have failed, the last by this: {}", self.failing, error.failure)))
            }
        }
    }

    /// Reports that the engine is broken: from here on nothing is computed. Called before any request is failed, so that whoever sees the failure
    /// can already see that.
    fn announce(&mut self, reason: Failure) {
        tracing::error!("{}{reason}", self.label);
        if let Some(shared) = self.shared.upgrade() {
            shared.health.fail(reason);
        }
    }

    /// Fails the sequences that were not part of the step that broke the engine.
    fn fail_waiting(&mut self, reason: &Failure, now: Instant) {
        let waiting: Vec<SequenceId> = self.clients.keys().copied().collect();
        waiting.iter().for_each(|id| self.scheduler.remove(*id));
        self.fail(&waiting, reason, now);
    }

    fn settle(&mut self, output: Output, now: Instant) {
        let output = self.scheduler.settle(output, &mut self.outcomes);
        self.runner.recycle(output);
        let before = self.ended;
        self.count_outcomes(now);
        // The figures come before the event, so that whoever sees the end of an answer sees it in them too.
        if self.ended > before {
            self.publish();
        }
        for outcome in self.outcomes.drain(..) {
            let Some(client) = self.clients.get(&outcome.id) else { continue };
            // When the channel is closed, the sequence was cancelled: the next round removes it.
            if let Some(prompt) = outcome.prompt {
                let _ = client.events.send(Event::Prompt(prompt));
            }
            let _ = client.events.send(Event::Token(outcome.token));
            if let Some(finish) = outcome.finish {
                let _ = client.events.send(Event::Finished(finish));
                self.clients.remove(&outcome.id);
            }
        }
        for (id, result) in self.scheduler.pooled() {
            let Some(client) = self.clients.remove(&id) else { continue };
            let _ = client.events.send(Event::Pooled(result));
            let _ = client.events.send(Event::Finished(Finish::Stop));
        }
        let broken: Vec<(SequenceId, Broken)> = self.scheduler.broken().collect();
        for (id, cause) in broken {
            let failure = match cause {
                Broken::Constraint(failure) => failure,
                Broken::NoToken { suppressed } => {
                    let more = if suppressed { ", or every token is suppressed (bad_words, min_tokens, structured output)" } else { "" };
                    let message = format!("the model gave no finite logits for this request{more}");
                    Failure::internal(message).code("no_finite_logits")
                }
                Broken::NotFinite => Failure::internal("the model gave numbers that are not finite for this text").code("not_finite"),
            };
            self.fail(&[id], &failure, now);
        }
    }

    /// Counts the tokens of a step, and the sequences that ended with it.
    fn count_outcomes(&mut self, now: Instant) {
        let mut stats = self.figures.lock();
        for id in self.scheduler.pooled_ids() {
            let Some(client) = self.clients.get(&id) else { continue };
            self.ended += 1;
            stats.metrics.ended(&client.moments, Ended::Stop, now);
        }
        stats.output_tokens += self.outcomes.len() as u64;
        for outcomes in self.outcomes.chunk_by(|one, next| one.id == next.id) {
            let Some(client) = self.clients.get_mut(&outcomes[0].id) else { continue };
            stats.metrics.tokens(&mut client.moments, outcomes.len(), now);
            if let Some(finish) = outcomes.last().and_then(|outcome| outcome.finish) {
                self.ended += 1;
                stats.metrics.ended(&client.moments, if finish == Finish::Length { Ended::Length } else { Ended::Stop }, now);
            }
        }
    }

    /// Reports the failure of sequences that have left the scheduler.
    fn fail(&mut self, ids: &[SequenceId], failure: &Failure, now: Instant) {
        for id in ids {
            if let Some(client) = self.clients.remove(id) {
                tracing::error!(request_id = &*client.request, "request failed: {failure}");
                let _ = client.events.send(Event::Failed(failure.clone()));
                self.ended += 1;
                self.figures.lock().metrics.ended(&client.moments, Ended::Failed, now);
            }
        }
    }

    /// Brings the figures up to what the scheduler holds.
    fn publish(&mut self) {
        let (pool, totals) = (self.scheduler.pool(), self.scheduler.totals());
        let mut stats = self.figures.lock();
        stats.running = self.scheduler.running();
        stats.waiting = self.scheduler.waiting();
        stats.blocks_total = pool.total();
        (stats.block_size, stats.kv_cache_dtype) = self.scheduler.cache_config();
        stats.blocks_free = pool.available();
        stats.blocks_cached = pool.idle();
        stats.preempted = totals.preempted;
        stats.prefix_queried = totals.prefix_queried;
        stats.prefix_hits = totals.prefix_hits;
        stats.drafted = totals.drafted;
        stats.accepted = totals.accepted;
        drop(stats);
        if let Some(shared) = self.shared.upgrade() {
            // NOTE: last, so that whoever finds the engine idle finds its figures idle too.
            shared.load.fetch_sub(std::mem::take(&mut self.ended), Ordering::Release);
        }
    }
}

/// The failure of all requests of a broken engine.
fn beyond_repair(what: &str) -> Failure {
    Failure::internal(format!("the engine has failed, and this worker must be restarted: {what}"))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_string())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "unknown panic".into())
}

#[cfg(test)]
mod tests;
