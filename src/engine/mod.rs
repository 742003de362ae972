//! Decisions: which sequences run, where their keys and values lie, when they end. No HTTP, no JSON, no tensors.
//!
//! [`Handle`] is the only door. Everything behind it runs on one OS thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use crate::config::defaults;
use crate::error::Failure;
use crate::models::{Logprobs, LogprobsSpec};

pub mod blocks;
pub mod lookup;
pub mod metrics;
mod residency;
pub mod run;
pub mod sampling;
pub mod scheduler;
pub mod sequence;

pub use lookup::Lookup;
pub use metrics::Metrics;
pub use run::start;
pub use sampling::SamplingParams;

/// One sequence to generate. A request with `n` choices submits `n` of these.
#[derive(Debug, Clone)]
pub struct Request {
    /// For logs.
    pub id: Arc<str>,
    /// At least one token id, all below the vocabulary size.
    pub prompt: Arc<Vec<u32>>,
    pub params: SamplingParams,
    /// Report how probable the prompt's tokens were, in an [`Event::Prompt`] before the first token.
    pub prompt_logprobs: Option<LogprobsSpec>,
    /// After this moment the request fails with `Kind::Timeout`, wherever it stands.
    pub deadline: Option<Instant>,
}

/// What the engine tells of one sequence, in order. After `Finished` or `Failed` comes nothing.
#[derive(Debug, Clone)]
pub enum Event {
    /// It has left the waiting queue. So many tokens of its prompt were in the prefix cache.
    Started {
        cached_tokens: usize,
    },
    /// Of each prompt token but the first, how probable it was after those before it. Only when asked for.
    Prompt(Vec<Logprobs>),
    Token(Token),
    Finished(Finish),
    Failed(Failure),
}

/// One generated token. The one that ended the sequence (end of sequence, stop id) is sent too, with `ends` set:
/// it counts in usage, and is not part of the text.
#[derive(Debug, Clone)]
pub struct Token {
    pub id: u32,
    pub ends: bool,
    /// When the request asked for them.
    pub logprobs: Option<Box<Logprobs>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// End of sequence.
    Stop,
    /// One of `stop_token_ids`.
    StopToken(u32),
    /// `max_tokens` or the context's end.
    Length,
}

/// How the engine runs, whatever the model.
#[derive(Debug, Clone)]
pub struct Options {
    /// Requests that may wait; beyond it `submit` fails with `Kind::Overloaded`.
    pub max_waiting: usize,
    /// Keys and values of earlier tokens are found again (`ENABLE_PREFIX_CACHING`).
    pub prefix_caching: bool,
    /// Speculation, where it is wanted (`SPECULATIVE_CONFIG`).
    pub lookup: Option<Lookup>,
    /// A line of figures in the log every ten seconds while there is work.
    pub log_stats: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_waiting: defaults::MAX_WAITING, prefix_caching: true, lookup: None, log_stats: true }
    }
}

/// What the engine can take; checked by `api` before it submits, so that errors name the caller's fields.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Prompt and output together.
    pub max_model_len: usize,
    pub vocab_size: usize,
    pub max_num_seqs: usize,
    /// Requests that may wait; beyond it `submit` fails with `Kind::Overloaded`.
    pub max_waiting: usize,
    /// Blocks of the KV cache and tokens in one, where it bounds `max_model_len`.
    pub memory_bound: Option<(usize, usize)>,
}

impl Limits {
    /// Where the KV cache bounds the context: how much it holds and what makes it larger, for refusals. Begins with a space; empty elsewhere.
    pub fn memory_hint(&self) -> String {
        self.memory_bound.map_or(String::new(), |(blocks, size)| {
            format!(
                " The KV cache holds {} tokens ({blocks} blocks of {size}); KV_CACHE_GB, or GPU_MEMORY_UTILIZATION on a GPU, makes it larger.",
                blocks * size
            )
        })
    }
}

/// A moment's figures.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    pub running: usize,
    pub waiting: usize,
    pub blocks_total: usize,
    /// Blocks that can be had, whether they are cached or not.
    pub blocks_free: usize,
    /// Of these, blocks of the prefix cache.
    pub blocks_cached: usize,
    pub preempted: u64,
    /// Prompt tokens looked up in the prefix cache, and those found there.
    pub prefix_queried: u64,
    pub prefix_hits: u64,
    /// Tokens guessed by prompt lookup, and those that came true.
    pub guessed: u64,
    pub accepted: u64,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    pub steps: u64,
    /// `false` after a fault that only a restart mends.
    pub healthy: bool,
    /// The KV cache and the step buffers have all their memory: from here on the process does not grow by them.
    pub memory_resident: bool,
    pub metrics: Metrics,
}

/// The door to the engine. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) limits: Limits,
    pub(crate) commands: std::sync::mpsc::Sender<Command>,
    pub(crate) stats: std::sync::Mutex<Stats>,
    /// Submitted and not yet counted in `stats.waiting`.
    pub(crate) submitted: AtomicUsize,
    /// What broke the engine; set with `stats.healthy = false`.
    pub(crate) failed: watch::Sender<Option<Failure>>,
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
    /// Ends it like dropping does, but as an answer that is complete: its text has come to a stop string. Counted with those that the model ended.
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

    /// An event that is there already.
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
        self.shared.submitted.fetch_add(1, Ordering::Relaxed);
        self.shared
            .commands
            .send(Command::Submit(Submitted { request, events, at: Instant::now(), complete: complete.clone() }))
            .map_err(|_| Failure::internal("the engine has stopped"))?;
        Ok(Generation { events: receiver, complete })
    }

    fn check(&self, request: &Request) -> Result<(), Failure> {
        let (limits, stats) = (self.limits(), self.stats());
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        if request.prompt.is_empty() {
            return Err(Failure::bad_request("prompt", "the prompt has no tokens"));
        }
        if request.prompt.len() >= limits.max_model_len {
            let (given, most, hint) = (request.prompt.len(), limits.max_model_len, limits.memory_hint());
            let message = format!("The prompt has {given} tokens, and the context holds {most} with the answer.{hint}");
            return Err(Failure::bad_request("prompt", message).code("context_length_exceeded"));
        }
        // Free rows are no waiting places, but who finds one does not wait.
        let free_rows = limits.max_num_seqs.saturating_sub(stats.running);
        let waiting = stats.waiting + self.shared.submitted.load(Ordering::Relaxed);
        if waiting >= limits.max_waiting + free_rows {
            let message = format!("{waiting} requests are waiting already (MAX_WAITING={}); try again later", limits.max_waiting);
            return Err(Failure::new(crate::error::Kind::Overloaded, message).code("engine_overloaded").retry_after(1));
        }
        Ok(())
    }

    pub fn stats(&self) -> Stats {
        self.shared.stats.lock().map(|stats| stats.clone()).unwrap_or_default()
    }

    /// Sequences that run or wait.
    pub fn load(&self) -> usize {
        let submitted = self.shared.submitted.load(Ordering::Relaxed);
        let stats = self.stats();
        submitted + stats.running + stats.waiting
    }

    /// The fault that broke the engine and that only a restart mends, from the moment it is found.
    pub fn failures(&self) -> watch::Receiver<Option<Failure>> {
        self.shared.failed.subscribe()
    }

    /// The same as far as it is known now.
    pub fn failure(&self) -> Option<Failure> {
        self.shared.failed.borrow().clone()
    }

    /// Waits for such a fault.
    pub async fn failed(&self) -> Failure {
        let mut failures = self.failures();
        match failures.wait_for(Option::is_some).await.map(|failure| failure.clone()) {
            Ok(Some(failure)) => failure,
            // The sender lives as long as this handle does.
            _ => std::future::pending().await,
        }
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
