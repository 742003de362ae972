//! Tensors live from here rightward. To the left of this module there are only token ids and plain numbers.
//!
//! [`Runner`] is the seam: the engine hands it a [`Plan`] and gets an [`Output`]; tests replace it by a scripted one.

use std::fmt;
use std::sync::Arc;

pub use crate::config::LogprobsMode;
use crate::error::Failure;

mod config;
pub mod decoder;
pub mod device;
pub mod families;
pub mod memory;
pub mod quality;
mod rope;
pub mod runner;
pub mod sample;
pub mod spec;
pub mod tensors;

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
    pub rows: Vec<Row>,
}

impl Plan {
    /// Empty again; the memory stays for the next step.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.rows.clear();
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
    /// How to draw the next token from the last token's logits; `None` while a prefill is unfinished.
    pub draw: Option<Draw>,
    /// The last so many tokens of this row are guesses at what will be drawn (speculation). A token is drawn after the one before
    /// them and after each of them: `proposed + 1` draws with indices from `draw.index` on. 0 without a draw.
    pub proposed: usize,
    /// Asks how probable the prompt's tokens were: for each token of this row, the log probability of the one that follows it.
    pub score: Option<Score>,
}

/// What [`Row::score`] asks for.
#[derive(Debug, Clone)]
pub struct Score {
    /// The token after each token of the row, `[len]`; one less when the last of them is the prompt's last.
    pub targets: Vec<u32>,
    pub logprobs: LogprobsSpec,
}

/// How log probabilities are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogprobsSpec {
    /// Alternatives, most probable first; 0 = the token itself only.
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
    /// The most probable tokens with their values, most probable first, ties by id. Ids without a token are none of them.
    pub top: Vec<(u32, f32)>,
    /// The token's log probability by the model's own logits, whatever the mode: answers are ranked by it (`best_of`).
    pub raw: f32,
}

/// How one row draws its next token. Plain data; the arithmetic is in `models::sample`.
///
/// Order of operations (FastDeploy's): suppressed ids → bias → repetition, frequency and presence penalties → temperature
/// → min_p → top_k → top_p → draw.
#[derive(Debug, Clone)]
pub struct Draw {
    /// 0 = greedy.
    pub temperature: f32,
    /// In `(0, 1]`; 1 = off.
    pub top_p: f32,
    /// 0 = off.
    pub top_k: u32,
    /// In `[0, 1]`; 0 = off.
    pub min_p: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// Over prompt and output tokens; 1 = off.
    pub repetition_penalty: f32,
    /// Added to the logits, by id.
    pub bias: Arc<Vec<(u32, f32)>>,
    /// Ids that must not be drawn in this step (end of sequence before `min_tokens`).
    pub suppressed: Arc<Vec<u32>>,
    /// What was seen so far; empty unless a penalty asks for it.
    pub seen: Arc<Seen>,
    /// The request's seed, and the index of the token to draw: together they fix the random number, whatever else is in the step.
    pub seed: u64,
    pub index: u64,
    /// Report how probable the drawn token was.
    pub logprobs: Option<LogprobsSpec>,
}

/// Temperature 1 and everything else off.
impl Default for Draw {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            bias: Arc::default(),
            suppressed: Arc::default(),
            seen: Arc::default(),
            seed: 0,
            index: 0,
            logprobs: None,
        }
    }
}

/// Token statistics for the penalties.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Distinct ids of the prompt.
    pub prompt: Vec<u32>,
    /// Output ids with their counts.
    pub output: Vec<(u32, u32)>,
}

/// What a step gave.
#[derive(Debug, Default, Clone)]
pub struct Output {
    /// Drawn tokens of the rows with a [`Draw`], in row order, `proposed + 1` of each.
    pub tokens: Vec<u32>,
    /// As long as `tokens` when any draw asked for them, else empty.
    pub logprobs: Vec<Option<Logprobs>>,
    /// One of each target of the rows with a [`Score`], in row order.
    pub scores: Vec<Logprobs>,
    /// Whose logits gave nothing to draw or score by: indices into `tokens`, and from its length on into `scores`. What stands there is no result.
    pub failed: Vec<usize>,
}

impl Output {
    /// Empty, with its room kept.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.logprobs.clear();
        self.scores.clear();
        self.failed.clear();
    }
}

/// Which ids of a model's rows have a token that it may write.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vocabulary {
    /// Ids below this have one,
    pub size: usize,
    /// but for these, ascending.
    pub holes: Vec<u32>,
}

/// Without holes.
impl From<usize> for Vocabulary {
    fn from(size: usize) -> Self {
        Self { size, holes: Vec::new() }
    }
}

/// What the engine must know of the model it drives.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Longest sequence (prompt and output) the model and the memory allow.
    pub max_model_len: usize,
    /// Ids from here on have no token and are never drawn.
    pub vocab_size: usize,
    pub block_size: usize,
    /// Blocks in the KV pool.
    pub blocks: usize,
    /// Most sequences in one step.
    pub max_num_seqs: usize,
    /// Most tokens in one step.
    pub max_num_batched_tokens: usize,
    /// The pool, not the model or a setting, bounds `max_model_len`.
    pub memory_bound: bool,
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

/// A plain failure is a request's own.
impl From<Failure> for StepError {
    fn from(failure: Failure) -> Self {
        Self::new(Fault::Request, failure)
    }
}

/// Where nobody asks what it says of the worker.
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
    /// Makes about `most` bytes more of the planned memory resident, between two steps; false when all of it is. Taking it when it is
    /// planned would cost the cold start, and never taking it would let the process grow with every request.
    fn take_memory(&mut self, _most: usize) -> bool {
        false
    }
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod golden_families;
#[cfg(test)]
mod golden_files;
#[cfg(test)]
mod golden_quantized;
