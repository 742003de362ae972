//! Tensors live from here rightward. To the left of this module there are only token ids and plain numbers.
//!
//! [`Runner`] is the seam: the engine hands it a [`Plan`] and gets an [`Output`]; tests replace it by a scripted one.

use std::fmt;
use std::sync::Arc;

pub use crate::config::LogprobsMode;
use crate::error::Failure;
pub use crate::kernels::{StateSave, StepStates};

pub use mask::{Allowed, PendingMasks, TokenMask};
pub use pooling::{Dimensions, PoolingSpec, PoolingTask};
pub use sample::{SamplingMetadata, SamplingParams, TokenCounts};
pub use turns::Turns;

mod choice;
mod config;
pub mod decoder;
pub mod device;
pub mod families;
mod mask;
pub mod memory;
pub mod pooling;
pub mod prepared;
pub mod quality;
mod rope;
pub mod runner;
pub mod sample;
pub mod shard;
pub mod spec;
mod task;
pub mod tensors;
mod turns;

/// One step for the device: which tokens to run, where their keys and values go, and which rows to sample.
///
/// The tokens of all rows lie one after another. Rows that decode have one token, rows in prefill have a chunk.
#[derive(Debug, Default, Clone)]
pub struct Plan {
    /// Token ids of all rows, `[tokens]`.
    pub tokens: Vec<u32>,
    /// Position of each token in its own sequence, `[tokens]`.
    pub positions: Vec<u32>,
    /// KV slot each token is written to, `block * block_size + offset`, `[tokens]`.
    pub slots: Vec<u32>,
    /// Type of each token: 1 in the second text of a pair. Empty where all are 0; else `[tokens]`.
    pub types: Vec<u32>,
    pub rows: Vec<Row>,
    /// Where layers that keep a state instead of keys go on from, and where they keep it; empty where a model has none.
    pub states: StepStates,
}

impl Plan {
    /// Empty again; the memory stays for the next step.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.types.clear();
        self.rows.clear();
        self.states.clear();
    }
}

/// The part of a [`Plan`] that belongs to one sequence.
#[derive(Debug, Clone)]
pub struct Row {
    /// Index of this row's first token in `Plan::tokens`.
    pub start: usize,
    /// How many tokens of this row run in this step, at least 1.
    pub len: usize,
    /// Tokens of the sequence in the cache after this step: `position of the last token + 1`.
    pub context: usize,
    /// The blocks that hold those tokens, in order.
    pub blocks: Arc<Vec<u32>>,
    /// How to sample the next token from the last token's logits; `None` while a prefill is unfinished.
    pub sampling: Option<SamplingMetadata>,
    /// How many of this row's tokens, counted from its end, are draft tokens (speculation). One token is sampled after the token before
    /// the drafts and one after each draft: `draft_len + 1` samples, with indices from `sampling.index` on. 0 when nothing is sampled.
    pub draft_len: usize,
    /// The row ends a sequence that is pooled: [`Output::pooled`] gets what it becomes.
    pub pools: bool,
    /// Asks how probable the prompt's tokens were: for each token of this row, the log probability of the one that follows it.
    pub score: Option<Score>,
}

/// What [`Row::score`] asks for.
#[derive(Debug, Clone)]
pub struct Score {
    /// The token that follows each token of the row, `[len]`. One fewer when the row ends with the prompt's last token, which none follows.
    pub targets: Vec<u32>,
    pub logprobs: LogprobsSpec,
}

/// How log probabilities are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogprobsSpec {
    /// How many of the most probable tokens to report beside the token itself.
    pub top: u32,
    pub mode: LogprobsMode,
}

/// How probable one token was.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Logprobs {
    /// The token's own value, in the mode's unit.
    pub own: f32,
    /// How many tokens of the vocabulary were at least as probable, itself included.
    pub rank: u32,
    /// The most probable tokens with their values, most probable first, ties by id. Ids without a token are left out.
    pub top: Vec<(u32, f32)>,
    /// The token's log probability by the model's unchanged logits, in every mode: `best_of` ranks answers by it.
    pub raw: f32,
}

/// What a step gave.
#[derive(Debug, Default, Clone)]
pub struct Output {
    /// The sampled tokens of all rows with [`SamplingMetadata`], in row order: `draft_len + 1` tokens for each row.
    pub tokens: Vec<u32>,
    /// The log probabilities of `tokens`, when any row asked for them; otherwise empty.
    pub logprobs: Vec<Option<Logprobs>>,
    /// The log probabilities of all targets of the rows with a [`Score`], in row order.
    pub scores: Vec<Logprobs>,
    /// What the rows that pool become, in row order.
    pub pooled: Vec<Vec<f32>>,
    /// Results without meaning, because their logits were not finite or every token was suppressed. An index below `tokens.len()` is one of
    /// `tokens`; from there on it is `tokens.len()` plus an index of `scores`.
    pub failed: Vec<usize>,
}

impl Output {
    /// Makes it empty; the memory stays for the next step.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.logprobs.clear();
        self.scores.clear();
        self.pooled.clear();
        self.failed.clear();
    }
}

/// The token ids that a model may sample. Its logits may have more rows than that.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vocabulary {
    /// All ids with a token are below this.
    pub size: usize,
    /// The ids below `size` that have no token all the same, ascending.
    pub unassigned: Vec<u32>,
}

/// Every id below the size has a token.
impl From<usize> for Vocabulary {
    fn from(size: usize) -> Self {
        Self { size, unassigned: Vec::new() }
    }
}

/// What the engine must know of the model it drives.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Longest sequence (prompt and output) the model and the memory allow.
    pub max_model_len: usize,
    /// Ids from here on have no token and are never sampled.
    pub vocab_size: usize,
    pub block_size: usize,
    /// Blocks in the KV pool.
    pub blocks: usize,
    /// What it holds, as settings spell it.
    pub kv_cache_dtype: &'static str,
    /// Slots for the states of layers that keep no keys: at least one for each sequence of a step, the others for the prefix cache and for draft
    /// tokens. 0 where a model has no such layers.
    pub state_slots: usize,
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Most tokens in one step.
    pub max_num_batched_tokens: usize,
    /// `max_model_len` is bounded by the size of the KV cache, and not by the model or a setting.
    pub memory_bound: bool,
    /// What sequences become; `None`: the model generates text.
    pub pooling: Option<Arc<PoolingSpec>>,
    /// A sequence runs in one step, as a whole.
    pub whole_prompts: bool,
}

/// What a failed step says about the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Something that a request of the plan holds. Its requests fail; it says nothing about the worker.
    Request,
    /// The device had too little memory for this step. A smaller one may pass.
    Memory,
    /// The device, or its driver, is broken: nothing more can be computed in this process.
    Device,
    /// None of these is known to be the cause.
    Unknown,
}

/// A step that gave nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct StepError {
    pub fault: Fault,
    /// What the step's requests are told.
    pub failure: Failure,
}

impl StepError {
    pub fn new(fault: Fault, failure: Failure) -> Self {
        Self { fault, failure }
    }
}

/// A failure without a known fault is taken to be the request's.
impl From<Failure> for StepError {
    fn from(failure: Failure) -> Self {
        Self::new(Fault::Request, failure)
    }
}

/// For callers to whom a failed step says nothing about the worker.
impl From<StepError> for Failure {
    fn from(error: StepError) -> Self {
        error.failure
    }
}

impl fmt::Display for StepError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.failure.fmt(f)
    }
}

impl std::error::Error for StepError {}

/// Runs plans. Owned by the engine's thread, which is also the only one that ever touches its tensors, drops included:
/// therefore made there, and not `Send`.
pub trait Runner {
    fn shape(&self) -> &Shape;
    /// Runs one step. An error fails the requests of the plan; its [`Fault`] decides whether the worker goes on.
    fn step(&mut self, plan: &Plan) -> Result<Output, StepError>;
    /// Takes an output back that was read, so that the next step need not allocate one.
    fn recycle(&mut self, _output: Output) {}
    /// Touches about `most` bytes more of the KV cache and the step buffers, so that they become resident; false once all of them are.
    /// The engine calls it between steps. To do all of it at the start would cost the cold start; never to do it would let the process
    /// grow with every request.
    fn prefault(&mut self, _most: usize) -> bool {
        false
    }
}

#[cfg(test)]
mod golden;
#[cfg(test)]
pub(crate) mod golden_families;
#[cfg(test)]
mod golden_files;
#[cfg(test)]
mod golden_gguf;
#[cfg(test)]
mod golden_kv;
#[cfg(test)]
mod golden_packed;
#[cfg(test)]
mod golden_pooling;
#[cfg(test)]
mod golden_quantized;
