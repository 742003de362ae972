//! Decisions: which sequences run, where their keys and values lie, when they end. No HTTP, no JSON, no tensors.
//!
//! All calls go through [`Handle`]. Everything behind it runs on one OS thread.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::config::defaults;
use crate::error::Failure;
use crate::models::{Logprobs, LogprobsSpec};

mod blocks;
mod constraint;
mod health;
mod metrics;
mod ngram;
mod prefault;
mod run;
mod scheduler;
mod sequence;
mod states;

pub use crate::models::{Dimensions, PoolingSpec, PoolingTask, SamplingParams, TokenMask};
pub use constraint::{Constraint, Next};
pub use health::Health;
pub use metrics::Metrics;
pub use ngram::NgramProposer;
pub use run::start;

/// One sequence to generate. A request with `n` choices submits `n` of these.
#[derive(Debug, Clone)]
pub struct Request {
    /// Names the request in the log.
    pub id: Arc<str>,
    /// At least one token id, all below the vocabulary size.
    pub prompt: Arc<Vec<u32>>,
    pub params: SamplingParams,
    /// Report how probable the prompt's tokens were, in an [`Event::Prompt`] before the first token.
    pub prompt_logprobs: Option<LogprobsSpec>,
    /// After this moment the request fails with `Kind::Timeout`, wherever it stands.
    pub deadline: Option<Instant>,
    /// The prompt is pooled instead of continued: [`Event::Pooled`].
    pub pooling: Option<PoolingRequest>,
    /// What the output may be, where more than the model decides that. In the state before the first token.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// A prompt that is to be pooled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolingRequest {
    /// The first token of the second text of a pair, where the model tells the two apart by the types of tokens.
    pub second_text: Option<usize>,
}

/// What the engine reports of one sequence, in this order. Nothing comes after `Finished` or `Failed`.
#[derive(Debug, Clone)]
pub enum Event {
    /// It has left the waiting queue.
    Started {
        /// How many tokens of its prompt were in the prefix cache.
        cached_tokens: usize,
    },
    /// How probable each prompt token but the first was, after those before it. Only when the request asks for it.
    Prompt(Vec<Logprobs>),
    Token(Token),
    /// What the prompt becomes. Comes alone before `Finished`.
    Pooled(Vec<f32>),
    Finished(Finish),
    Failed(Failure),
}

/// One generated token. A token that ends the sequence (end of sequence, stop id) is sent too, with `ends` set: it counts in the usage, but is
/// not part of the text.
#[derive(Debug, Clone)]
pub struct Token {
    pub id: u32,
    pub ends: bool,
    /// `None` unless the request asks for it.
    pub logprobs: Option<Box<Logprobs>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, by one of `eos_token_ids`.
    Stop,
    /// One of `stop_token_ids`.
    StopToken(u32),
    /// `max_tokens` or the context's end.
    Length,
}

/// How the engine runs, whatever the model.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Requests that may wait; beyond it `submit` fails with `Kind::Overloaded`.
    pub max_waiting: usize,
    /// Reuse the keys and values of prompts that begin alike (`ENABLE_PREFIX_CACHING`).
    pub prefix_caching: bool,
    /// Proposes draft tokens, when speculation is on (`SPECULATIVE_CONFIG`).
    pub proposer: Option<NgramProposer>,
    /// Log a line of figures for every ten seconds of work.
    pub log_stats: bool,
    /// Whose the lines in the log are, where there are several engines.
    pub name: Option<String>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_waiting: defaults::MAX_WAITING, prefix_caching: true, proposer: None, log_stats: true, name: None }
    }
}

/// The engine's limits. `api` checks them before it submits, so that its errors can name the caller's fields.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Prompt and output together.
    pub max_model_len: usize,
    pub vocab_size: usize,
    pub max_num_seqs: usize,
    /// Requests that may wait; beyond it `submit` fails with `Kind::Overloaded`.
    pub max_waiting: usize,
    /// The number of KV blocks and the tokens in one, when the KV cache is what bounds `max_model_len`.
    pub memory_bound: Option<(usize, usize)>,
    /// What sequences become; `None`: the model generates text.
    pub pooling: Option<Arc<PoolingSpec>>,
}

impl Limits {
    /// For refusals: how much the KV cache holds and which setting makes it larger. Begins with a space. Empty unless the KV cache bounds the context.
    pub fn memory_hint(&self) -> String {
        self.memory_bound.map_or(String::new(), |(blocks, size)| {
            format!(
                " The KV cache holds {} tokens ({blocks} blocks of {size}); KV_CACHE_GB, or GPU_MEMORY_UTILIZATION on a GPU, makes it larger.",
                blocks * size
            )
        })
    }
}

/// The engine's figures. The engine's thread keeps them, and [`Handle::stats`] copies them when somebody asks.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    pub running: usize,
    pub waiting: usize,
    pub blocks_total: usize,
    pub block_size: usize,
    /// What the KV cache holds, as settings spell it.
    pub kv_cache_dtype: &'static str,
    /// Blocks that can be taken now: empty ones, and cached ones that no sequence holds.
    pub blocks_free: usize,
    /// Those of the free blocks that the prefix cache keeps.
    pub blocks_cached: usize,
    pub preempted: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queried: u64,
    /// Prompt tokens found in the prefix cache.
    pub prefix_hits: u64,
    /// Draft tokens proposed.
    pub drafted: u64,
    /// Draft tokens that were also the sampled ones.
    pub accepted: u64,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    pub steps: u64,
    /// `false` after a fault that only a restart mends. Set from [`Health`] when the figures are copied.
    pub healthy: bool,
    /// The KV cache and the step buffers are resident as a whole: they let the process grow no further.
    pub memory_resident: bool,
    pub metrics: Metrics,
}

/// A handle to a running engine. Cheap to clone; the engine ends when the last one is dropped.
#[derive(Clone)]
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) limits: Limits,
    pub(crate) commands: std::sync::mpsc::Sender<Command>,
    pub(crate) figures: Arc<Figures>,
    /// Sequences that were submitted and have not ended.
    pub(crate) load: AtomicUsize,
    pub(crate) health: health::Reporter,
}

/// The figures where they are kept. The engine's thread alone writes them; it waits for nobody but a reader that is copying them.
#[derive(Debug, Default)]
pub(crate) struct Figures(Mutex<Stats>);

impl Figures {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Stats> {
        // Numbers that a panic has left half updated are still numbers.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) enum Command {
    Submit(Submitted),
}

pub(crate) struct Submitted {
    pub(crate) request: Request,
    pub(crate) events: mpsc::UnboundedSender<Event>,
    pub(crate) at: Instant,
    /// See [`Generation::complete`].
    pub(crate) complete: Arc<AtomicBool>,
}

/// The events of one sequence. **Dropping it cancels**: the row and its blocks are free within one step.
#[derive(Debug)]
pub struct Generation {
    events: mpsc::UnboundedReceiver<Event>,
    complete: Arc<AtomicBool>,
}

impl Generation {
    /// Ends the sequence as dropping does, but because its text has reached a stop string: the figures count it as stopped, not as aborted.
    pub fn complete(self) {
        self.complete.store(true, Ordering::Release);
    }

    /// The next event. A channel that closes without `Finished` or `Failed` means that the engine died: a failure.
    pub async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            None => Event::Failed(Failure::internal("the engine stopped while this request was running")),
        }
    }

    /// The next event, if there is one already.
    pub fn try_next(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }
}

impl Handle {
    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// Queues one sequence. Fails at once when the waiting queue is full, when the engine has died, or when the prompt does
    /// not fit the context.
    pub fn submit(&self, request: Request) -> Result<Generation, Failure> {
        self.check(&request)?;
        let (events, receiver) = mpsc::unbounded_channel();
        let complete = Arc::new(AtomicBool::new(false));
        self.shared.load.fetch_add(1, Ordering::Relaxed);
        let submitted = Submitted { request, events, at: Instant::now(), complete: complete.clone() };
        if self.shared.commands.send(Command::Submit(submitted)).is_err() {
            self.shared.load.fetch_sub(1, Ordering::Relaxed);
            return Err(Failure::internal("the engine has stopped"));
        }
        Ok(Generation { events: receiver, complete })
    }

    fn check(&self, request: &Request) -> Result<(), Failure> {
        let limits = self.limits();
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        if request.prompt.is_empty() {
            return Err(Failure::bad_request("prompt", "the prompt has no tokens"));
        }
        if limits.pooling.is_some() != request.pooling.is_some() {
            return Err(Failure::internal("the model cannot do what this sequence is for"));
        }
        let room = limits.max_model_len - usize::from(limits.pooling.is_none());
        if request.prompt.len() > room {
            let (given, most, hint) = (request.prompt.len(), limits.max_model_len, limits.memory_hint());
            let answer = if limits.pooling.is_none() { " with the answer" } else { "" };
            let message = format!("The prompt has {given} tokens, and the context holds {most}{answer}.{hint}");
            return Err(Failure::bad_request("prompt", message).code("context_length_exceeded"));
        }
        // A request that finds a free row does not wait.
        let load = self.load();
        if load >= limits.max_waiting.saturating_add(limits.max_num_seqs) {
            let waiting = load - self.shared.figures.lock().running.min(load);
            let message = format!("{waiting} requests are waiting already (MAX_WAITING={}); try again later", limits.max_waiting);
            return Err(Failure::new(crate::error::Kind::Overloaded, message).code("engine_overloaded").retry_after(1));
        }
        Ok(())
    }

    /// A copy of the figures as they are now.
    pub fn stats(&self) -> Stats {
        Stats { healthy: self.failure().is_none(), ..self.shared.figures.lock().clone() }
    }

    /// Sequences that run or wait.
    pub fn load(&self) -> usize {
        self.shared.load.load(Ordering::Acquire)
    }

    /// Tells whether the engine can still compute, for as long as anybody wants to know.
    pub fn health(&self) -> Health {
        self.shared.health.health()
    }

    /// See [`Health::failure`].
    pub fn failure(&self) -> Option<Failure> {
        self.shared.health.failure()
    }

    /// See [`Health::failed`].
    pub async fn failed(&self) -> Failure {
        self.health().failed().await
    }

    /// Waits until nothing runs or waits, or until `limit` has passed; true when idle.
    pub async fn idle(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if self.load() == 0 {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        false
    }
}
