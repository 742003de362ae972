//! The engine's loop, on one OS thread: drain commands → plan → launch → settle.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use super::metrics::{Ended, Log, Moments};
use super::residency::{Residency, While};
use super::scheduler::{Outcome, Scheduler};
use super::sequence::{Sequence, SequenceId};
use super::{Command, Event, Finish, Handle, Limits, Options, Shared, Stats};
use crate::error::{Failure, Kind};
use crate::models::{Output, Plan, Runner};

/// Starts the engine's thread, loads the model on it by `load`, and returns the door once it is ready to run.
///
/// The model is made, used and dropped on that thread alone.
pub async fn start<R, F>(load: F, options: Options) -> Result<Handle, Failure>
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
        };
        let stats = Stats { blocks_total: shape.blocks, blocks_free: shape.blocks, healthy: true, ..Default::default() };
        let failed = tokio::sync::watch::Sender::new(false);
        let shared = Arc::new(Shared { limits, commands, stats: Mutex::new(stats), submitted: 0.into(), failed });
        let worker = Worker::new(runner, Arc::downgrade(&shared), &options);
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

/// A sequence's other end.
struct Client {
    events: mpsc::UnboundedSender<Event>,
    deadline: Option<Instant>,
    request: Arc<str>,
    moments: Moments,
}

struct Worker<R> {
    runner: R,
    scheduler: Scheduler,
    clients: HashMap<SequenceId, Client>,
    /// Weak, so that dropping the last handle ends the thread.
    shared: std::sync::Weak<Shared>,
    next_id: SequenceId,
    stats: Stats,
    /// Commands taken since the last `publish`.
    taken: usize,
    /// Kept between steps for their memory.
    plan: Plan,
    outcomes: Vec<Outcome>,
    log: Log,
    /// Prompt tokens computed so far.
    computed_prompt: u64,
    residency: Residency,
}

impl Shared {
    /// From here on only a restart helps.
    fn fail(&self) {
        if let Ok(mut stats) = self.stats.lock() {
            stats.healthy = false;
        }
        self.failed.send_replace(true);
    }
}

/// A panic outside of a step. Whoever sees its channel close (the clients are dropped after this) must see the state too.
impl<R> Drop for Worker<R> {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(shared) = self.shared.upgrade()
        {
            shared.fail();
        }
    }
}

impl<R: Runner> Worker<R> {
    fn new(runner: R, shared: std::sync::Weak<Shared>, options: &Options) -> Self {
        let shape = runner.shape().clone();
        let stats = Stats { blocks_total: shape.blocks, healthy: true, ..Default::default() };
        Self {
            scheduler: Scheduler::new(shape, options.prefix_caching, options.lookup),
            runner,
            clients: HashMap::new(),
            shared,
            next_id: 0,
            stats,
            taken: 0,
            plan: Plan::default(),
            outcomes: Vec::new(),
            log: Log::new(options.log_stats),
            computed_prompt: 0,
            residency: Residency::default(),
        }
    }

    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let idle = self.clients.is_empty();
            if idle {
                self.scheduler.check_invariants();
                self.log.idle();
            }
            // Idle: sleep until somebody comes. Busy: take what is there.
            let first = if idle { self.wait(commands) } else { commands.try_recv() };
            let mut next = first;
            loop {
                match next {
                    Ok(Command::Submit(request, events, at)) => self.submit(&request, events, at),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
                next = commands.try_recv();
            }
            self.drop_gone();
            self.step();
            self.take_memory(While::Running);
            self.publish();
        }
    }

    /// Sleeps until somebody comes. As long as the runner has not all its memory, naps are short.
    fn wait(&mut self, commands: &Receiver<Command>) -> Result<Command, TryRecvError> {
        loop {
            self.take_memory(While::Idle);
            let next = match self.residency.due() {
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

    /// Lets the runner take some of its memory, if it is time for that.
    fn take_memory(&mut self, while_: While) {
        self.residency.take(&mut self.runner, while_);
        if self.residency.due().is_none() && !std::mem::replace(&mut self.stats.memory_resident, true) {
            self.publish();
        }
    }

    fn submit(&mut self, request: &super::Request, events: mpsc::UnboundedSender<Event>, at: Instant) {
        let id = self.next_id;
        self.next_id += 1;
        self.taken += 1;
        self.stats.prompt_tokens += request.prompt.len() as u64;
        let moments = Moments::new(at, request.prompt.len());
        self.clients.insert(id, Client { events, deadline: request.deadline, request: request.id.clone(), moments });
        self.scheduler.add(Sequence::new(id, request, self.runner.shape().max_model_len));
    }

    /// Cancelled sequences leave (their receiver is gone), and those whose time is up fail.
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
            let cancelled = client.events.is_closed();
            self.stats.metrics.ended(&client.moments, if cancelled { Ended::Cancelled } else { Ended::Failed }, now);
            if !cancelled {
                let failure =
                    Failure::new(Kind::Timeout, "the request's time limit passed (REQUEST_TIMEOUT)").code("request_timeout").retry_after(1);
                let _ = client.events.send(Event::Failed(failure));
            }
        }
    }

    fn step(&mut self) {
        if !self.scheduler.plan(&mut self.plan) {
            return;
        }
        let begin = Instant::now();
        for (id, cached_tokens) in self.scheduler.started() {
            if let Some(client) = self.clients.get(id) {
                self.stats.metrics.queue_time.record_time(begin.saturating_duration_since(client.moments.submitted));
                let _ = client.events.send(Event::Started { cached_tokens: *cached_tokens });
            }
        }
        self.stats.steps += 1;
        self.stats.metrics.step_tokens.record(self.plan.tokens.len() as f64);
        let prompts = self.plan.rows.iter().map(|row| row.len - row.proposed).filter(|len| *len > 1);
        self.computed_prompt += prompts.sum::<usize>() as u64;
        let (runner, plan) = (&mut self.runner, &self.plan);
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| runner.step(plan)));
        self.plan.clear();
        let now = Instant::now();
        self.stats.metrics.step_time.record_time(now - begin);
        match result {
            Ok(Ok(output)) => self.settle(output, now),
            Ok(Err(failure)) => self.fail(failure),
            Err(panic) => {
                // The device's state is unknown from here on: what runs fails, and readiness says so. Before anybody hears of it:
                // whoever sees the failure must see the state too.
                self.stats.healthy = false;
                if let Some(shared) = self.shared.upgrade() {
                    shared.fail();
                }
                let text = panic_text(&*panic);
                tracing::error!("a step panicked: {text}");
                self.fail(Failure::internal("the engine failed while computing this request"));
            }
        }
    }

    fn settle(&mut self, output: Output, now: Instant) {
        let output = self.scheduler.settle(output, &mut self.outcomes);
        self.runner.recycle(output);
        for outcomes in self.outcomes.chunk_by(|one, next| one.id == next.id) {
            if let Some(client) = self.clients.get_mut(&outcomes[0].id) {
                self.stats.metrics.tokens(&mut client.moments, outcomes.len(), now);
            }
        }
        for outcome in self.outcomes.drain(..) {
            self.stats.output_tokens += 1;
            let Some(client) = self.clients.get(&outcome.id) else { continue };
            // A closed channel is a cancelled sequence: the next round removes it.
            if let Some(prompt) = outcome.prompt {
                let _ = client.events.send(Event::Prompt(prompt));
            }
            let _ = client.events.send(Event::Token(outcome.token));
            if let Some(finish) = outcome.finish {
                let _ = client.events.send(Event::Finished(finish));
                let ended = if finish == Finish::Length { Ended::Length } else { Ended::Stop };
                self.stats.metrics.ended(&client.moments, ended, now);
                self.clients.remove(&outcome.id);
            }
        }
    }

    fn fail(&mut self, failure: Failure) {
        let now = Instant::now();
        for id in self.scheduler.abandon() {
            if let Some(client) = self.clients.remove(&id) {
                tracing::error!(request_id = &*client.request, "request failed: {failure}");
                let _ = client.events.send(Event::Failed(failure.clone()));
                self.stats.metrics.ended(&client.moments, Ended::Failed, now);
            }
        }
    }

    fn publish(&mut self) {
        self.stats.running = self.scheduler.running();
        self.stats.waiting = self.scheduler.waiting();
        self.stats.blocks_free = self.scheduler.pool().available();
        self.stats.blocks_cached = self.scheduler.pool().idle();
        let totals = self.scheduler.totals();
        self.stats.preempted = totals.preempted;
        self.stats.prefix_queried = totals.prefix_queried;
        self.stats.prefix_hits = totals.prefix_hits;
        self.stats.guessed = totals.guessed;
        self.stats.accepted = totals.accepted;
        if !self.clients.is_empty() {
            self.log.step(&self.stats, self.computed_prompt, Instant::now());
        }
        if let Some(shared) = self.shared.upgrade() {
            if let Ok(mut stats) = shared.stats.lock() {
                *stats = self.stats.clone();
            }
            // Only now, so that no request is missing from both counts.
            shared.submitted.fetch_sub(std::mem::take(&mut self.taken), Ordering::Relaxed);
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_string())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "unknown panic".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Generation, Request, SamplingParams};
    use crate::models::{Plan, Shape};
    use std::time::Duration;

    /// Says the length of the context, modulo 50; panics or fails on request.
    struct Scripted {
        shape: Shape,
        gate: Option<std::sync::mpsc::Receiver<()>>,
    }

    const PANIC: u32 = 90;
    const FAIL: u32 = 91;

    impl Runner for Scripted {
        fn shape(&self) -> &Shape {
            &self.shape
        }

        fn step(&mut self, plan: &Plan) -> Result<Output, Failure> {
            if let Some(gate) = &self.gate {
                let _ = gate.recv();
            }
            assert!(!plan.tokens.contains(&PANIC), "told to");
            if plan.tokens.contains(&FAIL) {
                return Err(Failure::internal("told to fail"));
            }
            Ok(Output {
                tokens: plan.rows.iter().filter(|row| row.draw.is_some()).map(|row| row.context as u32 % 50).collect(),
                ..Default::default()
            })
        }
    }

    fn shape() -> Shape {
        Shape {
            max_model_len: 64,
            vocab_size: 100,
            block_size: 4,
            blocks: 32,
            max_num_seqs: 2,
            max_num_batched_tokens: 16,
            memory_bound: true,
        }
    }

    async fn engine(gate: Option<std::sync::mpsc::Receiver<()>>, max_waiting: usize) -> Handle {
        start(move || Ok(Scripted { shape: shape(), gate }), Options { max_waiting, ..Default::default() }).await.unwrap()
    }

    fn request(prompt: &[u32], max_tokens: usize) -> Request {
        let params = SamplingParams { max_tokens, ..Default::default() };
        Request { id: "test".into(), prompt: Arc::new(prompt.to_vec()), params, prompt_logprobs: None, deadline: None }
    }

    async fn collect(mut generation: Generation) -> (Vec<u32>, Result<Finish, Failure>) {
        let mut tokens = Vec::new();
        loop {
            match generation.next().await {
                Event::Started { .. } => {}
                Event::Token(token) => tokens.push(token.id),
                Event::Prompt(_) => {}
                Event::Finished(finish) => return (tokens, Ok(finish)),
                Event::Failed(failure) => return (tokens, Err(failure)),
            }
        }
    }

    #[tokio::test]
    async fn sequences_run_and_leave_nothing_behind() {
        let engine = engine(None, 100).await;
        let all: Vec<_> = (1..20).map(|n| engine.submit(request(&vec![1; n], 5)).unwrap()).collect();
        for (n, generation) in (1u32..20).zip(all) {
            assert_eq!(collect(generation).await, ((n..n + 5).collect(), Ok(Finish::Length)));
        }
        assert!(engine.idle(Duration::from_secs(5)).await);
        assert_eq!((engine.stats().blocks_free, engine.stats().output_tokens), (32, 95));
    }

    #[tokio::test]
    async fn dropping_the_receiver_frees_the_row_within_one_step() {
        let (steps, gate) = std::sync::mpsc::channel();
        let engine = engine(Some(gate), 100).await;
        let mut generation = engine.submit(request(&[1; 10], 50)).unwrap();
        steps.send(()).unwrap();
        assert!(matches!(generation.next().await, Event::Started { cached_tokens: 0 }));
        assert!(matches!(generation.next().await, Event::Token(_)));
        assert_eq!(engine.submit(request(&[2], 1)).map(|_| ()), Ok(()));
        drop(generation);
        // The step that may be in flight, and no more.
        steps.send(()).unwrap();
        steps.send(()).unwrap();
        assert!(engine.idle(Duration::from_secs(5)).await);
        assert_eq!(engine.stats().blocks_free, 32);
    }

    #[tokio::test]
    async fn a_full_queue_refuses_with_a_retry_hint() {
        let (steps, gate) = std::sync::mpsc::channel();
        let engine = engine(Some(gate), 3).await;
        let mut held = Vec::new();
        let refused = loop {
            match engine.submit(request(&[1], 1)) {
                Ok(generation) => held.push(generation),
                Err(failure) => break failure,
            }
            assert!(held.len() < 10);
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        assert_eq!((refused.kind, refused.code, refused.retry_after), (Kind::Overloaded, Some("engine_overloaded"), Some(1)));
        drop(steps);
        for generation in held {
            assert_eq!(collect(generation).await.1, Ok(Finish::Length));
        }
    }

    #[tokio::test]
    async fn what_cannot_run_is_refused() {
        let engine = engine(None, 3).await;
        assert_eq!(engine.submit(request(&[], 1)).unwrap_err().kind, Kind::BadRequest);
        let refused = engine.submit(request(&[1; 64], 1)).unwrap_err();
        assert_eq!(refused.code, Some("context_length_exceeded"));
        assert!(refused.message.contains("64 tokens") && refused.message.contains("128 tokens (32 blocks of 4)"), "{refused}");
        assert_eq!(collect(engine.submit(request(&[1; 63], 9)).unwrap()).await, (vec![13], Ok(Finish::Length)));
    }

    #[tokio::test]
    async fn a_failed_step_fails_its_requests_only() {
        let engine = engine(None, 10).await;
        let (_, result) = collect(engine.submit(request(&[FAIL], 3)).unwrap()).await;
        assert_eq!(result.unwrap_err().message, "told to fail");
        assert_eq!(collect(engine.submit(request(&[1], 2)).unwrap()).await, (vec![1, 2], Ok(Finish::Length)));
    }

    #[tokio::test]
    async fn a_panic_fails_requests_and_health() {
        let engine = engine(None, 10).await;
        let (_, result) = collect(engine.submit(request(&[PANIC], 3)).unwrap()).await;
        assert_eq!(result.unwrap_err().kind, Kind::Internal);
        assert!(engine.idle(Duration::from_secs(5)).await);
        assert!(!engine.stats().healthy);
        engine.failed().await;
        assert_eq!(engine.submit(request(&[1], 2)).unwrap_err().kind, Kind::Internal);
    }

    /// Its shape is asked for at each submission; the last time it panics, outside of any step.
    struct Cursed {
        scripted: Scripted,
        asked: std::cell::Cell<usize>,
    }

    impl Runner for Cursed {
        fn shape(&self) -> &Shape {
            self.asked.set(self.asked.get() + 1);
            assert!(self.scripted.shape.max_model_len > 0 && self.asked.get() <= 3, "told to");
            &self.scripted.shape
        }

        fn step(&mut self, plan: &Plan) -> Result<Output, Failure> {
            self.scripted.step(plan)
        }
    }

    #[tokio::test]
    async fn a_panic_outside_of_a_step_fails_requests_and_health() {
        let load = || Ok(Cursed { scripted: Scripted { shape: shape(), gate: None }, asked: 0.into() });
        let engine = start(load, Options::default()).await.unwrap();
        assert_eq!(collect(engine.submit(request(&[1], 2)).unwrap()).await.1, Ok(Finish::Length));
        assert_eq!(collect(engine.submit(request(&[1], 2)).unwrap()).await.1.unwrap_err().kind, Kind::Internal);
        engine.failed().await;
        assert!(!engine.stats().healthy);
        assert_eq!(engine.submit(request(&[1], 2)).unwrap_err().kind, Kind::Internal);
    }

    #[tokio::test]
    async fn a_deadline_fails_the_request() {
        let (steps, gate) = std::sync::mpsc::channel();
        let engine = engine(Some(gate), 10).await;
        let mut late = request(&[1], 9);
        late.deadline = Some(Instant::now());
        let generation = engine.submit(late).unwrap();
        drop(steps);
        assert_eq!(collect(generation).await.1.unwrap_err().kind, Kind::Timeout);
    }

    #[tokio::test]
    async fn a_model_that_cannot_load_is_an_error() {
        let failed = start(|| Err::<Scripted, _>(Failure::internal("no weights")), Options::default()).await.err().unwrap();
        assert_eq!(failed.message, "no weights");
        let failed = start(|| -> Result<Scripted, Failure> { panic!("boom") }, Options::default()).await.err().unwrap();
        assert!(failed.message.contains("boom"));
    }
}
