//! The scheduler: which sequences run in the next step. Pure: no tensors, no channels, no clock.
//!
//! Each step first plans one token for every sequence that decodes, then spends the rest of the token budget on prompts, in chunks.
//!
//! - **Stall.** While streams run, a step computes at most half the budget ([`MIXED_SHARE`]) of prompt tokens, so that no stream waits
//!   longer for its next token than one modest chunk takes.
//! - **Fairness.** Of several prompts the oldest gets half of the budget. The others share the other half, the one with the fewest tokens left
//!   first. What one side does not use goes to the other. So a short chat gets past a long prompt within a few steps, the long prompt
//!   goes on in every step, and no prompt starves, because each becomes the oldest at some time.
//! - **Admission** is first come, first served. A sequence is admitted when there are blocks for its tokens, and beside them some for what the
//!   running sequences may still need. When blocks run out all the same, the newest sequence is put back and computed anew later.
//! - **Prefix cache.** Cached tokens of a sequence are not computed again, except for its last one. When the next block of a sequence is just
//!   being computed for another one (the same prompt `n` times, chats under one system prompt), it waits until it can share that block.
//!   It does not hold up the sequences behind it.
//! - **Speculation** ([`NgramProposer`]): while few sequences decode, their rows carry draft tokens, as far as budget and blocks are free. A
//!   draft token is accepted when it is the very token that is sampled, so the output is that of plain decoding. Draft tokens never take
//!   from the share of prompts that wait.
//! - **States** ([`StatePool`](super::states::StatePool)), where layers keep a state instead of keys: a row goes on from its sequence's slot. Draft
//!   tokens each get a slot for the state after them, and the one after the last accepted token becomes the sequence's. The prefix cache takes a
//!   hit only where a snapshot is ([`snapshots`]).
//! - **Pooling.** Where every token of a prompt must be in one step, prompts are not cut: the oldest goes first, and others beside it as far as
//!   they fit.
//! - **Constraints** ([`Constraint`](super::Constraint)): rows whose samples may not be anything bring a [`MaskJob`], and the plan goes on
//!   without waiting for it. Tokens that a constraint forces run with the token sampled before them, in one row.

use std::collections::VecDeque;
use std::vec::Drain;

use super::blocks::BlockPool;
use super::constraint::MaskJob;
use super::ngram::NgramProposer;
use super::sequence::{Sequence, SequenceId};
use super::{Finish, Token};
use crate::error::Failure;
use crate::models::{Logprobs, Shape};
use snapshots::Saved;

mod planning;
mod settling;
mod snapshots;

/// Admission keeps room for so many output tokens per running sequence. More would waste memory on requests that ask for 4,096 tokens and use 100.
const RESERVED_OUTPUT: usize = 256;
/// While streams run, prompts get the token budget divided by this.
const MIXED_SHARE: usize = 2;

/// What happened to one sequence in a step.
#[derive(Debug)]
pub struct Outcome {
    pub id: SequenceId,
    /// The prompt's log probabilities, with the first token of a request that asks for them.
    pub prompt: Option<Vec<Logprobs>>,
    pub token: Token,
    pub finish: Option<Finish>,
}

/// What a plan in flight runs of one sequence.
#[derive(Debug, Clone, Copy)]
struct InFlight {
    id: SequenceId,
    /// Tokens of the sequence itself.
    len: usize,
    /// Draft tokens after them.
    draft_len: usize,
}

/// Why a sequence got no token.
#[derive(Debug)]
pub enum Broken {
    /// Its logits were not finite, or every token was suppressed.
    NoToken {
        /// Some ids were suppressed.
        suppressed: bool,
    },
    /// Its constraint failed.
    Constraint(Failure),
    /// What it was pooled to holds numbers that are not finite.
    NotFinite,
}

/// Why a sequence cannot go on, where no token can follow.
fn broken_by(sequence: &Sequence, failure: Option<Failure>) -> Broken {
    let suppressed = sequence.is_constrained() || !sequence.sampling().suppressed.is_empty();
    let exhausted = || sequence.exhausted_by().map(nothing_left);
    let failure = failure.or_else(|| sequence.constraint_failure()).or_else(exhausted);
    failure.map_or(Broken::NoToken { suppressed }, Broken::Constraint)
}

/// `field` of the request forbids every token that its grammar allows.
fn nothing_left(field: &'static str) -> Failure {
    let fields = if field == "bad_words" { "'bad_words' (or 'bad_words_token_ids', 'suppress_tokens')" } else { "'min_tokens'" };
    let message = format!("the answer cannot go on under its grammar: {fields} of this request forbids every token that may follow");
    Failure::bad_request(field, message).code("grammar_failed")
}

/// Running totals since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub preempted: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queried: u64,
    /// Prompt tokens found in the prefix cache.
    pub prefix_hits: u64,
    /// Draft tokens proposed.
    pub drafted: u64,
    /// Draft tokens accepted.
    pub accepted: u64,
}

/// See the module.
pub struct Scheduler {
    shape: Shape,
    pool: BlockPool,
    waiting: VecDeque<Sequence>,
    /// In order of admission.
    running: Vec<Sequence>,
    /// The plan in flight, in row order.
    in_flight: Vec<InFlight>,
    /// Sequences that the last plan admitted for the first time, with the prompt tokens that were cached.
    started: Vec<(SequenceId, usize)>,
    /// Sequences that the last step gave no token, each with the reason.
    broken: Vec<(SequenceId, Broken)>,
    /// What the last step has pooled. They have left.
    pooled: Vec<(SequenceId, Vec<f32>)>,
    /// What makes the masks of the plan in flight.
    mask_jobs: Vec<MaskJob>,
    totals: Totals,
    proposer: Option<NgramProposer>,
    /// The draft tokens of the plan in flight, one row after another.
    drafts: Vec<u32>,
    /// Where the model keeps states: the slot of the state after each of these.
    draft_slots: Vec<u32>,
    /// The snapshots that the plan in flight makes, one row after another.
    saved: Vec<Saved>,
    /// Slots to be copied in this plan, `(from, to)`.
    copies: Vec<(u32, u32)>,
    /// The cached blocks of the sequence being admitted; kept between steps for its memory.
    path: Vec<u32>,
    /// Prompts by index with the tokens each gets in this step; kept for its memory too.
    shares: Vec<(usize, usize)>,
}

impl Scheduler {
    /// `proposer`: whether and how to speculate.
    pub fn new(shape: Shape, prefix_caching: bool, proposer: Option<NgramProposer>) -> Self {
        // What a whole prompt computes is of use to that prompt alone, and nothing follows what is pooled.
        let prefix_caching = prefix_caching && !shape.whole_prompts;
        let proposer = proposer.filter(|_| shape.pooling.is_none());
        Self {
            proposer,
            drafts: Vec::new(),
            draft_slots: Vec::new(),
            saved: Vec::new(),
            copies: Vec::new(),
            pool: BlockPool::new(shape.blocks, shape.block_size, prefix_caching).with_states(shape.state_slots),
            waiting: VecDeque::new(),
            running: Vec::with_capacity(shape.max_num_seqs),
            in_flight: Vec::with_capacity(shape.max_num_seqs),
            started: Vec::new(),
            broken: Vec::new(),
            pooled: Vec::new(),
            mask_jobs: Vec::new(),
            totals: Totals::default(),
            path: Vec::new(),
            shares: Vec::with_capacity(shape.max_num_seqs),
            shape,
        }
    }

    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Tokens in a block of the KV cache, and what it holds.
    pub fn cache_config(&self) -> (usize, &'static str) {
        (self.shape.block_size, self.shape.kv_cache_dtype)
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Sequences that the last plan admitted for the first time, with the prompt tokens that were cached.
    pub fn started(&self) -> &[(SequenceId, usize)] {
        &self.started
    }

    /// Sequences that the last step gave no token, each with the reason. They have left.
    pub fn broken(&mut self) -> Drain<'_, (SequenceId, Broken)> {
        self.broken.drain(..)
    }

    /// Sequences that the last step has pooled, each with what it became.
    pub fn pooled(&mut self) -> Drain<'_, (SequenceId, Vec<f32>)> {
        self.pooled.drain(..)
    }

    pub fn pooled_ids(&self) -> impl Iterator<Item = SequenceId> {
        self.pooled.iter().map(|(id, _)| *id)
    }

    /// What makes the masks of the last plan, to be run on other threads while the device runs the plan.
    pub fn mask_jobs(&mut self) -> Drain<'_, MaskJob> {
        self.mask_jobs.drain(..)
    }

    /// Takes a sequence out, whether it waits or runs, and frees its blocks at once. Not to be called between [`Self::plan`] and
    /// [`Self::settle`].
    pub fn remove(&mut self, id: SequenceId) {
        debug_assert!(self.in_flight.is_empty(), "removing while a step is in flight");
        self.waiting.retain(|sequence| sequence.id != id);
        if let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            self.release(index);
        }
    }

    fn release(&mut self, index: usize) -> Sequence {
        let mut sequence = self.running.remove(index);
        Self::free(&mut self.pool, &mut sequence);
        sequence
    }

    /// Gives back all that a sequence holds.
    fn free(pool: &mut BlockPool, sequence: &mut Sequence) {
        pool.release(&std::mem::take(&mut sequence.blocks));
        sequence.state.take().into_iter().for_each(|slot| pool.states.give_back(slot));
    }

    /// Removes the sequences of the last plan, which has failed. Returns their ids.
    pub fn abandon(&mut self) -> Vec<SequenceId> {
        let ids: Vec<_> = self.in_flight.drain(..).map(|row| row.id).collect();
        let slots = self.draft_slots.drain(..).chain(self.saved.drain(..).map(|saved| saved.slot));
        slots.for_each(|slot| self.pool.states.give_back(slot));
        ids.iter().for_each(|id| self.remove(*id));
        ids
    }

    /// Panics unless free, cached and used blocks add up, every block has the right number of holders, only full computed blocks are shared,
    /// and every running sequence has room for its tokens.
    pub fn check_invariants(&self) {
        self.pool.check_invariants(self.running.iter().map(|sequence| sequence.blocks.as_slice()));
        self.pool.states.check_invariants(self.running.iter().filter_map(|sequence| sequence.state));
        assert!(self.running.len() <= self.shape.max_num_seqs, "too many sequences");
        assert!(
            self.waiting.iter().all(|sequence| sequence.blocks.is_empty() && sequence.computed == 0),
            "a waiting sequence holds blocks"
        );
        for sequence in &self.running {
            assert!(sequence.computed <= sequence.blocks.len() * self.shape.block_size, "keys without a block");
            assert!(sequence.cached * self.shape.block_size <= sequence.computed, "a block is cached before it is computed");
        }
    }
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
