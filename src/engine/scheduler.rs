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
use std::sync::Arc;
use std::vec::Drain;

use super::blocks::BlockPool;
use super::constraint::MaskJob;
use super::ngram::NgramProposer;
use super::sequence::{Sequence, SequenceId};
use super::{Finish, Token};
use crate::error::Failure;
use crate::models::{Logprobs, Output, Plan, Row, Shape};
use snapshots::Saved;

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

    /// Fills `plan` with the next step; false when there is nothing to do. `plan` must be empty of rows by the time of [`Self::settle`].
    pub fn plan(&mut self, plan: &mut Plan) -> bool {
        plan.clear();
        self.started.clear();
        self.drafts.clear();
        self.mask_jobs.clear();
        let mut budget = self.shape.max_num_batched_tokens;
        if self.shape.whole_prompts {
            self.admit();
            self.plan_whole(plan, budget);
            plan.states.copies.append(&mut self.copies);
            return !plan.rows.is_empty();
        }
        self.plan_decodes(plan, &mut budget);
        if !plan.rows.is_empty() {
            budget = budget.min(self.mixed_budget());
        }
        if budget > 0 {
            let before = self.running.len();
            self.admit();
            self.plan_prompts(plan, budget, before);
        }
        plan.states.copies.append(&mut self.copies);
        !plan.rows.is_empty()
    }

    /// Tokens that prompts get in a step while streams run.
    fn mixed_budget(&self) -> usize {
        (self.shape.max_num_batched_tokens / MIXED_SHARE).max(1)
    }

    /// Plans one token for every sequence that decodes, and preempts sequences when blocks run out.
    fn plan_decodes(&mut self, plan: &mut Plan, budget: &mut usize) {
        let mut index = 0;
        while index < self.running.len() {
            // A prompt has its blocks already.
            if self.grow(index) {
                index += 1;
            } else {
                // The newest sequence may be this one. It is the last, so no other index changes.
                let newest = self.running.len() - 1;
                self.preempt(newest);
            }
        }
        let decoding = self.running.iter().filter(|sequence| sequence.decodes()).count();
        let proposer = self.proposer.filter(|proposer| decoding <= proposer.max_rows);
        let mut spare = budget.saturating_sub(decoding);
        // Prompts that wait come first: draft tokens may turn out to be wrong, and prompts are certain to be needed.
        if !self.waiting.is_empty() || decoding < self.running.len() {
            spare = spare.saturating_sub(self.mixed_budget());
        }
        for index in 0..self.running.len() {
            if *budget > 0 && self.running[index].decodes() {
                let forced = (self.running[index].pending() - 1).min(spare);
                spare -= forced;
                let draft_len = match proposer {
                    Some(proposer) if self.running[index].pending() == 1 => self.propose(index, proposer, spare),
                    _ => 0,
                };
                spare -= draft_len;
                self.plan_row(index, 1 + forced, draft_len, plan);
                *budget -= 1 + forced + draft_len;
            }
        }
    }

    /// Appends at most `spare` draft tokens for sequence `index` to `drafts`, as many as there are free blocks for. Returns how many.
    fn propose(&mut self, index: usize, proposer: NgramProposer, spare: usize) -> usize {
        let sequence = &mut self.running[index];
        // Nothing is sampled after the last token, so it needs no draft.
        let most = spare.min(sequence.remaining() - 1);
        if most == 0 || !sequence.may_speculate() {
            return 0;
        }
        let draft_len = sequence.acceptance.draft_len(proposer.draft_len).min(most);
        let first = self.drafts.len();
        proposer.propose(&sequence.tokens, draft_len, &mut self.drafts);
        let wanted = sequence.tokens.len() + self.drafts.len() - first;
        let missing = wanted.div_ceil(self.shape.block_size).saturating_sub(sequence.blocks.len());
        // One block for each sequence stays free: they may need them next.
        let free = self.pool.available() >= missing + self.shape.max_num_seqs;
        if missing > 0 && !(free && self.pool.take(missing, Arc::make_mut(&mut sequence.blocks))) {
            let room = sequence.blocks.len() * self.shape.block_size - sequence.tokens.len();
            self.drafts.truncate(first + room);
        }
        self.take_draft_slots(first);
        self.drafts.len() - first
    }

    /// Plans chunks of the prompts, `budget` tokens in all, by the module's rule of fairness. Sequences from index `new` on were admitted in this step.
    fn plan_prompts(&mut self, plan: &mut Plan, budget: usize, new: usize) {
        let mut shares = std::mem::take(&mut self.shares);
        shares.clear();
        // Of the older sequences, those that decode have their rows already.
        let prompts = self.running.iter().enumerate().filter(|(index, sequence)| *index >= new || !sequence.decodes());
        shares.extend(prompts.map(|(index, sequence)| (index, sequence.pending())));
        if let Some((oldest, others)) = shares.split_first_mut() {
            others.sort_by_key(|(_, pending)| *pending);
            let wanted = std::mem::take(&mut oldest.1);
            let mut left = budget;
            oldest.1 = wanted.min(if others.is_empty() { left } else { left.div_ceil(2) });
            left -= oldest.1;
            for (_, len) in others {
                *len = left.min(*len);
                left -= *len;
            }
            oldest.1 += left.min(wanted - oldest.1);
        }
        for (index, len) in shares.iter().copied().filter(|(_, len)| *len > 0) {
            self.plan_row(index, len, 0, plan);
        }
        self.shares = shares;
    }

    /// Plans whole prompts: the oldest, and of the others, in order, those that find room beside it.
    fn plan_whole(&mut self, plan: &mut Plan, mut budget: usize) {
        for index in 0..self.running.len() {
            let len = self.running[index].pending();
            if len <= budget {
                self.plan_row(index, len, 0, plan);
                budget -= len;
            }
        }
    }

    /// Makes room for one more token of sequence `index`; false when there is no block.
    fn grow(&mut self, index: usize) -> bool {
        let sequence = &mut self.running[index];
        let missing = sequence.tokens.len().div_ceil(self.shape.block_size).saturating_sub(sequence.blocks.len());
        missing == 0 || self.pool.take(missing, Arc::make_mut(&mut sequence.blocks))
    }

    fn preempt(&mut self, index: usize) {
        let mut sequence = self.release(index);
        sequence.restart();
        self.totals.preempted += 1;
        self.waiting.push_front(sequence);
    }

    /// Moves waiting sequences to the running ones, in order, as long as there is everything the next one needs.
    fn admit(&mut self) {
        let mut path = std::mem::take(&mut self.path);
        let mut at = 0;
        while at < self.waiting.len() && self.running.len() < self.shape.max_num_seqs {
            let sequence = &self.waiting[at];
            // The last token is always computed, because its logits are wanted.
            let known = if sequence.may_use_cache() { sequence.tokens.len() - 1 } else { 0 };
            self.pool.lookup(&sequence.tokens[..known], &mut path);
            let matching = path.len();
            path.truncate(self.with_snapshot(&path));
            if self.soon_cached(at, path.len()) {
                at += 1;
                continue;
            }
            let sequence = &self.waiting[at];
            let missing = sequence.tokens.len().div_ceil(self.shape.block_size) - path.len();
            // A sequence that runs alone needs no reserve, because no other can take its blocks.
            let reserved = match self.running.as_slice() {
                [] => 0,
                running => running.iter().chain([sequence]).map(|sequence| self.reserve(sequence)).sum(),
            };
            let has_state = self.pool.states.is_empty() || self.pool.states.available() > 0;
            if !has_state || self.pool.available() < self.pool.idle_among(&path) + missing + reserved {
                break;
            }
            let Some(mut sequence) = self.waiting.remove(at) else { break };
            self.pool.share(&path);
            let mut blocks = Vec::with_capacity(path.len() + missing);
            blocks.extend_from_slice(&path);
            self.pool.take(missing, &mut blocks);
            sequence.blocks = Arc::new(blocks);
            sequence.cached = path.len();
            sequence.computed = path.len() * self.shape.block_size;
            self.give_state(&mut sequence, matching, path.last().copied());
            if !std::mem::replace(&mut sequence.started, true) {
                self.started.push((sequence.id, sequence.computed));
                if self.pool.caching() && sequence.may_use_cache() {
                    self.totals.prefix_queried += sequence.tokens.len() as u64;
                    self.totals.prefix_hits += sequence.computed as u64;
                }
            }
            self.running.push(sequence);
        }
        self.path = path;
    }

    /// Whether the block after the first `hits` ones of the waiting sequence `at` is being computed for a running one.
    fn soon_cached(&mut self, at: usize, hits: usize) -> bool {
        let (sequence, size) = (&self.waiting[at], self.shape.block_size);
        let (from, to) = (hits * size, (hits + 1) * size);
        // The last token is left out, as in the lookup.
        if !self.pool.caching() || !sequence.may_use_cache() || to >= sequence.tokens.len() {
            return false;
        }
        if !self.pool.states.is_empty() {
            return self.soon_snapshot(at, hits);
        }
        self.running.iter().any(|other| {
            let ahead = other.computed < to && to <= other.tokens.len();
            // The block is compared first, because most differences are there.
            ahead && other.tokens[from..to] == sequence.tokens[from..to] && other.tokens[..from] == sequence.tokens[..from]
        })
    }

    /// How many blocks this sequence may soon need beyond those of its tokens.
    fn reserve(&self, sequence: &Sequence) -> usize {
        let soon = sequence.tokens.len() + sequence.remaining().min(RESERVED_OUTPUT);
        let held = sequence.blocks.len().max(sequence.tokens.len().div_ceil(self.shape.block_size));
        soon.div_ceil(self.shape.block_size).saturating_sub(held)
    }

    /// Adds a row for the next `len` tokens of sequence `index` and the last `draft_len` tokens of `drafts`.
    fn plan_row(&mut self, index: usize, len: usize, draft_len: usize, plan: &mut Plan) {
        let sequence = &self.running[index];
        let (from, known) = (sequence.computed, sequence.computed + len);
        let to = known + draft_len;
        let size = self.shape.block_size;
        let is_last = known == sequence.tokens.len();
        let mut sampling = (is_last && !sequence.is_pooled()).then(|| sequence.sampling());
        if let Some(sampling) = &mut sampling
            && let Some(job) = sequence.mask_job(&self.drafts[self.drafts.len() - draft_len..])
        {
            sampling.masks = Some(job.masks());
            self.mask_jobs.push(job);
        }
        plan.rows.push(Row {
            start: plan.tokens.len(),
            len: len + draft_len,
            context: to,
            blocks: sequence.blocks.clone(),
            sampling,
            draft_len,
            pools: is_last && sequence.is_pooled(),
            score: sequence.score(from, known),
        });
        if let Some(second) = sequence.second_text() {
            plan.types.resize(plan.tokens.len(), 0);
            plan.types.extend((from..to).map(|position| u32::from(position >= second)));
        } else if !plan.types.is_empty() {
            plan.types.resize(plan.tokens.len() + to - from, 0);
        }
        plan.tokens.extend_from_slice(&sequence.tokens[from..known]);
        plan.tokens.extend_from_slice(&self.drafts[self.drafts.len() - draft_len..]);
        plan.positions.extend(from as u32..to as u32);
        plan.slots.extend((from..to).map(|position| sequence.blocks[position / size] * size as u32 + (position % size) as u32));
        self.in_flight.push(InFlight { id: sequence.id, len, draft_len });
        self.plan_states(index, len, draft_len, plan);
    }

    /// Takes in the results of the last plan and writes what they mean for each sequence into `outcomes`. Sequences that have finished leave;
    /// their full blocks stay cached. Returns the output, read.
    ///
    /// NOTE: the plan must be cleared by now, because its rows share the block tables that change here.
    pub fn settle(&mut self, mut output: Output, outcomes: &mut Vec<Outcome>) -> Output {
        outcomes.clear();
        self.broken.clear();
        self.pooled.clear();
        let mut pooled = output.pooled.drain(..);
        let mut results = Results {
            samples: output.tokens.len(),
            targets: output.scores.len(),
            tokens: output.tokens.drain(..),
            logprobs: output.logprobs.drain(..),
            scores: output.scores.drain(..),
            failed: &output.failed,
            drafts: &self.drafts,
        };
        let mut in_flight = std::mem::take(&mut self.in_flight);
        let mut states = snapshots::InFlightStates { slots: self.draft_slots.drain(..), saved: self.saved.drain(..).peekable() };
        // Most rows are in the order of the running sequences.
        let mut next = 0;
        for row in in_flight.drain(..) {
            let index = match self.running.get(next) {
                Some(sequence) if sequence.id == row.id => Some(next),
                _ => self.running.iter().position(|sequence| sequence.id == row.id),
            };
            let Some(index) = index else { continue };
            next = index + 1;
            let before = self.running[index].computed;
            let sequence = &mut self.running[index];
            if sequence.is_pooled() && sequence.computed + row.len == sequence.tokens.len() {
                Self::settle_pooled(&mut self.pool, sequence, pooled.next(), self.shape.block_size, &mut self.pooled, &mut self.broken);
                snapshots::settle(&mut self.pool, sequence, self.shape.block_size, &mut states, (before, row));
                Self::free(&mut self.pool, &mut self.running.remove(index));
                next = index;
                continue;
            }
            let Settled { broken, failure, accepted } = results.settle(sequence, row, outcomes);
            if let Some(accepted) = accepted {
                sequence.acceptance.learn(row.draft_len, accepted);
                self.totals.drafted += row.draft_len as u64;
                self.totals.accepted += accepted as u64;
            }
            let finished = outcomes.last().is_some_and(|outcome| outcome.id == row.id && outcome.finish.is_some());
            if broken {
                self.broken.push((row.id, broken_by(sequence, failure)));
            } else {
                Self::cache(&mut self.pool, sequence, self.shape.block_size);
            }
            snapshots::settle(&mut self.pool, sequence, self.shape.block_size, &mut states, (before, row));
            if broken || finished {
                Self::free(&mut self.pool, &mut self.running.remove(index));
                next = index;
            }
        }
        self.in_flight = in_flight;
        drop(pooled);
        drop(results);
        output.failed.clear();
        output
    }

    /// A sequence has been pooled.
    fn settle_pooled(
        pool: &mut BlockPool,
        sequence: &mut Sequence,
        result: Option<Vec<f32>>,
        size: usize,
        pooled: &mut Vec<(SequenceId, Vec<f32>)>,
        broken: &mut Vec<(SequenceId, Broken)>,
    ) {
        match result.filter(|result| result.iter().all(|number| number.is_finite())) {
            None => broken.push((sequence.id, Broken::NotFinite)),
            Some(result) => {
                sequence.computed = sequence.tokens.len();
                Self::cache(pool, sequence, size);
                pooled.push((sequence.id, result));
            }
        }
    }

    /// Caches the blocks of a sequence that have become full.
    fn cache(pool: &mut BlockPool, sequence: &mut Sequence, size: usize) {
        if !pool.caching() {
            return;
        }
        while (sequence.cached + 1) * size <= sequence.computed {
            let at = sequence.cached;
            let parent = at.checked_sub(1).map(|before| sequence.blocks[before]);
            let block = pool.cache(parent, sequence.blocks[at], &sequence.tokens[at * size..(at + 1) * size]);
            if block != sequence.blocks[at] {
                Arc::make_mut(&mut sequence.blocks)[at] = block;
            }
            sequence.cached += 1;
        }
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

/// The results of a step that no row has taken yet.
struct Results<'a> {
    /// How many tokens were sampled in all.
    samples: usize,
    /// How many prompt tokens were scored in all.
    targets: usize,
    tokens: Drain<'a, u32>,
    logprobs: Drain<'a, Option<Logprobs>>,
    scores: Drain<'a, Logprobs>,
    /// See [`Output::failed`].
    failed: &'a [usize],
    drafts: &'a [u32],
}

/// What became of one row.
struct Settled {
    /// It got no token, or no score.
    broken: bool,
    /// Why its constraint failed.
    failure: Option<Failure>,
    /// How many draft tokens were accepted; `None` when nothing was sampled.
    accepted: Option<usize>,
}

impl Results<'_> {
    /// Gives `sequence` the results of its row, the next one.
    fn settle(&mut self, sequence: &mut Sequence, row: InFlight, outcomes: &mut Vec<Outcome>) -> Settled {
        let last = self.samples + self.targets;
        let first = last - self.scores.len();
        sequence.scored(sequence.computed, sequence.computed + row.len, &mut self.scores);
        let broken = self.failed.iter().any(|at| (first..last - self.scores.len()).contains(at));
        sequence.computed += row.len;
        if sequence.computed < sequence.tokens.len() {
            return Settled { broken, failure: None, accepted: None };
        }
        let prompt = sequence.take_prompt_logprobs();
        self.take_samples(sequence, row.draft_len, broken, prompt, outcomes)
    }

    /// Appends the sampled tokens to one sequence: the first one, and one more after each draft token that is accepted. Does nothing but pass
    /// over them when the row is `broken` already.
    ///
    /// The keys and values of an accepted draft token are in the cache already. Those after the first draft token that is not accepted will
    /// be overwritten.
    fn take_samples(
        &mut self,
        sequence: &mut Sequence,
        draft_len: usize,
        mut broken: bool,
        mut prompt: Option<Vec<Logprobs>>,
        outcomes: &mut Vec<Outcome>,
    ) -> Settled {
        let (drafts, others) = self.drafts.split_at(draft_len);
        self.drafts = others;
        let (mut accepted, mut open) = (0, true);
        let mut failure = None;
        // All samples of the row are taken in any case, since those that follow belong to the next row.
        for nth in 0..=draft_len {
            let at = self.samples - self.tokens.len();
            let (Some(token), logprobs) = (self.tokens.next(), self.logprobs.next().flatten()) else { break };
            broken |= open && self.failed.contains(&at);
            if broken || !open {
                continue;
            }
            let finish = match sequence.push(token) {
                Ok(finish) => finish,
                Err(reason) => {
                    (broken, failure) = (true, Some(reason));
                    continue;
                }
            };
            let ends = sequence.is_end(token);
            let logprobs = logprobs.map(Box::new);
            outcomes.push(Outcome { id: sequence.id, prompt: prompt.take(), token: Token { id: token, ends, logprobs }, finish });
            open = finish.is_none() && drafts.get(nth) == Some(&token);
            if open {
                sequence.computed += 1;
                accepted += 1;
            }
        }
        let finished = outcomes.last().is_some_and(|outcome| outcome.id == sequence.id && outcome.finish.is_some());
        if !broken && !finished {
            failure = take_forced(sequence, outcomes).err();
            broken = failure.is_some();
        }
        Settled { broken, failure, accepted: Some(accepted) }
    }
}

/// Appends what the constraint forces to come next.
fn take_forced(sequence: &mut Sequence, outcomes: &mut Vec<Outcome>) -> Result<(), Failure> {
    let forced = sequence.take_forced()?;
    let last = forced.len();
    for (at, token) in (1..).zip(forced) {
        let mut finish = sequence.push_forced(token)?;
        if finish.is_some() || at == last {
            finish = sequence.or_complete(finish)?;
        }
        let token = Token { id: token, ends: sequence.is_end(token), logprobs: None };
        outcomes.push(Outcome { id: sequence.id, prompt: None, token, finish });
        if finish.is_some() {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
