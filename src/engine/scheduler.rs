//! The scheduler: which sequences run in the next step. Pure: no tensors, no channels, no clock.
//!
//! Each step first gives every sequence that decodes its one token, then spends what is left of the token budget on prompts, in chunks.
//!
//! - **Stall.** While streams run, a step computes at most half the budget ([`MIXED_SHARE`]) of prompt tokens, so that no stream waits
//!   longer for its next token than one modest chunk takes.
//! - **Fairness.** Of several prompts the oldest gets half of what there is, and the others share the other half, the one with the fewest
//!   tokens left first; what one side does not use goes to the other. So a short chat gets past a long prompt within a few steps, the
//!   long one goes on in every step, and since every prompt becomes the oldest one day, none starves.
//! - **Admission**, first come first served: a sequence is admitted when the blocks of its tokens can be had and a part of what the running
//!   ones may still need stays free too. When blocks run out all the same, the newest sequence is put back and computed anew later.
//! - **Prefix cache.** What is cached of a sequence's tokens is not computed again; at least its last token is. A sequence whose next block is
//!   just being computed for another one (the same prompt `n` times, chats under one system prompt) waits until it can share it, and
//!   does not hold up those behind it.
//! - **Speculation** ([`Lookup`]): while few sequences decode, their rows carry guesses, as far as budget and blocks are free. A guess is
//!   accepted when it is the very token drawn, so the output is that of plain decoding. Guesses never take from the share of prompts that wait.

use std::collections::VecDeque;
use std::sync::Arc;

use super::blocks::BlockPool;
use super::lookup::Lookup;
use super::sequence::{Sequence, SequenceId};
use super::{Finish, Token};
use crate::models::{Logprobs, Output, Plan, Row, Shape};

/// Output tokens per running sequence that admission keeps room for; more would waste memory on requests that ask for 4,096 and use 100.
const RESERVED_OUTPUT: usize = 256;
/// Part of the token budget that prompts get while streams run.
const MIXED_SHARE: usize = 2;

/// What happened to one sequence in a step.
#[derive(Debug)]
pub struct Outcome {
    pub id: SequenceId,
    /// Before the first token, when asked for.
    pub prompt: Option<Vec<Logprobs>>,
    pub token: Token,
    pub finish: Option<Finish>,
}

/// What a plan in flight runs of one sequence.
#[derive(Debug, Clone, Copy)]
struct InFlight {
    id: SequenceId,
    /// Tokens that the sequence has; guesses not counted.
    len: usize,
    /// Guesses after them.
    guesses: usize,
}

/// Running totals since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub preempted: u64,
    /// Prompt tokens that were looked up in the prefix cache, and those found there.
    pub prefix_queried: u64,
    pub prefix_hits: u64,
    /// Tokens guessed, and those that came true.
    pub guessed: u64,
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
    /// Sequences that the last step gave nothing to draw for; whether some of their ids were suppressed.
    broken: Vec<(SequenceId, bool)>,
    totals: Totals,
    lookup: Option<Lookup>,
    /// The guesses of the plan in flight, one row after another.
    guesses: Vec<u32>,
    /// Kept between steps for their memory.
    path: Vec<u32>,
    shares: Vec<(usize, usize)>,
}

impl Scheduler {
    /// `lookup`: whether and how to speculate.
    pub fn new(shape: Shape, prefix_caching: bool, lookup: Option<Lookup>) -> Self {
        Self {
            lookup,
            guesses: Vec::new(),
            pool: BlockPool::new(shape.blocks, shape.block_size, prefix_caching),
            waiting: VecDeque::new(),
            running: Vec::with_capacity(shape.max_num_seqs),
            in_flight: Vec::with_capacity(shape.max_num_seqs),
            started: Vec::new(),
            broken: Vec::new(),
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

    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Sequences that the last plan admitted for the first time, with the prompt tokens that were cached.
    pub fn started(&self) -> &[(SequenceId, usize)] {
        &self.started
    }

    /// Sequences that the last step gave nothing to draw for, and that have left; whether some of their ids were suppressed.
    pub fn broken(&self) -> &[(SequenceId, bool)] {
        &self.broken
    }

    /// Takes a sequence out, wherever it stands; its blocks are free at once. Not between a plan and its settling.
    pub fn remove(&mut self, id: SequenceId) {
        debug_assert!(self.in_flight.is_empty(), "removing while a step is in flight");
        self.waiting.retain(|sequence| sequence.id != id);
        if let Some(index) = self.running.iter().position(|sequence| sequence.id == id) {
            self.release(index);
        }
    }

    fn release(&mut self, index: usize) -> Sequence {
        let mut sequence = self.running.remove(index);
        self.pool.release(&std::mem::take(&mut sequence.blocks));
        sequence
    }

    /// Fills `plan` with the next step; false when there is nothing to do. `plan` must be empty of rows by the time of [`Self::settle`].
    pub fn plan(&mut self, plan: &mut Plan) -> bool {
        plan.clear();
        self.started.clear();
        self.guesses.clear();
        let mut budget = self.shape.max_num_batched_tokens;
        self.plan_decodes(plan, &mut budget);
        if !plan.rows.is_empty() {
            budget = budget.min(self.mixed_budget());
        }
        if budget > 0 {
            let before = self.running.len();
            self.admit();
            self.plan_prompts(plan, budget, before);
        }
        !plan.rows.is_empty()
    }

    /// Tokens that prompts get in a step while streams run.
    fn mixed_budget(&self) -> usize {
        (self.shape.max_num_batched_tokens / MIXED_SHARE).max(1)
    }

    /// One token for every sequence that decodes, making room by preemption.
    fn plan_decodes(&mut self, plan: &mut Plan, budget: &mut usize) {
        let mut index = 0;
        while index < self.running.len() {
            let fits = self.running[index].pending() > 1 || self.grow(index);
            if fits {
                index += 1;
            } else {
                // The newest goes, which may be this one; it is last, so nothing before it moves.
                let newest = self.running.len() - 1;
                self.preempt(newest);
            }
        }
        let decoding = self.running.iter().filter(|sequence| sequence.pending() == 1).count();
        let lookup = self.lookup.filter(|lookup| decoding <= lookup.max_rows);
        let mut spare = budget.saturating_sub(decoding);
        // Guesses are a bet, prompts are work.
        if !self.waiting.is_empty() || decoding < self.running.len() {
            spare = spare.saturating_sub(self.mixed_budget());
        }
        for index in 0..self.running.len() {
            if *budget > 0 && self.running[index].pending() == 1 {
                let guesses = lookup.map_or(0, |lookup| self.guess(index, lookup, spare));
                spare -= guesses;
                self.plan_row(index, 1, guesses, plan);
                *budget -= 1 + guesses;
            }
        }
    }

    /// Appends to the guesses what may follow sequence `index`, at most `spare` tokens; makes room for them as far as that is free.
    fn guess(&mut self, index: usize, lookup: Lookup, spare: usize) -> usize {
        let sequence = &mut self.running[index];
        // The last token that may be drawn needs no guess after it.
        let most = spare.min(sequence.remaining() - 1);
        if most == 0 || !sequence.may_speculate() {
            return 0;
        }
        let depth = sequence.acceptance.depth(lookup.depth).min(most);
        let first = self.guesses.len();
        lookup.guess(&sequence.tokens, depth, &mut self.guesses);
        let wanted = sequence.tokens.len() + self.guesses.len() - first;
        let missing = wanted.div_ceil(self.shape.block_size).saturating_sub(sequence.blocks.len());
        // Never the block that another one needs next.
        let free = self.pool.available() >= missing + self.shape.max_num_seqs;
        if missing > 0 && !(free && self.pool.take(missing, Arc::make_mut(&mut sequence.blocks))) {
            let room = sequence.blocks.len() * self.shape.block_size - sequence.tokens.len();
            self.guesses.truncate(first + room);
        }
        self.guesses.len() - first
    }

    /// Chunks of the prompts, `budget` tokens in all, by the rule of the module. Sequences from `new` on were admitted in this step.
    fn plan_prompts(&mut self, plan: &mut Plan, budget: usize, new: usize) {
        let mut shares = std::mem::take(&mut self.shares);
        shares.clear();
        // Of the others, whoever has one token to go has its row already.
        let prompts = self.running.iter().enumerate().filter(|(index, sequence)| *index >= new || sequence.pending() > 1);
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

    /// Room for one more token of sequence `index`; false when the pool is empty.
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

    /// Moves waiting sequences to the running ones, in order, while everything the next one needs is there.
    fn admit(&mut self) {
        let mut path = std::mem::take(&mut self.path);
        let mut at = 0;
        while at < self.waiting.len() && self.running.len() < self.shape.max_num_seqs {
            let sequence = &self.waiting[at];
            // The last token is computed whatever is cached: its logits are wanted.
            let known = if sequence.may_use_cache() { sequence.tokens.len() - 1 } else { 0 };
            self.pool.lookup(&sequence.tokens[..known], &mut path);
            if self.soon_cached(sequence, path.len()) {
                at += 1;
                continue;
            }
            let missing = sequence.tokens.len().div_ceil(self.shape.block_size) - path.len();
            // Alone, a sequence needs no reserve: nobody can take its blocks.
            let reserved = match self.running.as_slice() {
                [] => 0,
                running => running.iter().chain([sequence]).map(|sequence| self.reserve(sequence)).sum(),
            };
            if self.pool.available() < self.pool.idle_among(&path) + missing + reserved {
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

    /// Whether the block after the first `hits` ones of a waiting sequence is being computed for a running one.
    fn soon_cached(&self, sequence: &Sequence, hits: usize) -> bool {
        let (from, to) = (hits * self.shape.block_size, (hits + 1) * self.shape.block_size);
        // As in the lookup, the last token does not count.
        if !self.pool.caching() || !sequence.may_use_cache() || to >= sequence.tokens.len() {
            return false;
        }
        self.running.iter().any(|other| {
            let ahead = other.computed < to && to <= other.tokens.len();
            // The block itself first, where they are most likely to differ.
            ahead && other.tokens[from..to] == sequence.tokens[from..to] && other.tokens[..from] == sequence.tokens[..from]
        })
    }

    /// Blocks this sequence may soon want beyond those of its tokens.
    fn reserve(&self, sequence: &Sequence) -> usize {
        let soon = sequence.tokens.len() + sequence.remaining().min(RESERVED_OUTPUT);
        let held = sequence.blocks.len().max(sequence.tokens.len().div_ceil(self.shape.block_size));
        soon.div_ceil(self.shape.block_size).saturating_sub(held)
    }

    /// Adds a row for the next `len` tokens of sequence `index`, and for as many of the latest guesses as `guesses` says.
    fn plan_row(&mut self, index: usize, len: usize, guesses: usize, plan: &mut Plan) {
        let sequence = &self.running[index];
        let (from, known) = (sequence.computed, sequence.computed + len);
        let to = known + guesses;
        let size = self.shape.block_size;
        plan.rows.push(Row {
            start: plan.tokens.len(),
            len: len + guesses,
            context: to,
            blocks: sequence.blocks.clone(),
            draw: (known == sequence.tokens.len()).then(|| sequence.draw()),
            proposed: guesses,
            score: sequence.score(from, known),
        });
        plan.tokens.extend_from_slice(&sequence.tokens[from..known]);
        plan.tokens.extend_from_slice(&self.guesses[self.guesses.len() - guesses..]);
        plan.positions.extend(from as u32..to as u32);
        plan.slots.extend((from..to).map(|position| sequence.blocks[position / size] * size as u32 + (position % size) as u32));
        self.in_flight.push(InFlight { id: sequence.id, len, guesses });
    }

    /// Takes in the results of the last plan, into `outcomes`. Finished sequences have left; their full blocks stay cached.
    ///
    /// NOTE: the plan's rows must be gone by now: they share the block tables that change here.
    pub fn settle(&mut self, mut output: Output, outcomes: &mut Vec<Outcome>) -> Output {
        outcomes.clear();
        self.broken.clear();
        let (draws, targets) = (output.tokens.len(), output.scores.len());
        let failed = &output.failed;
        let mut drawn = output.tokens.drain(..);
        let mut logprobs = output.logprobs.drain(..);
        let mut scores = output.scores.drain(..);
        let mut guesses = self.guesses.as_slice();
        let mut in_flight = std::mem::take(&mut self.in_flight);
        // Most rows are in the order of the running sequences.
        let mut next = 0;
        for row in in_flight.drain(..) {
            let index = match self.running.get(next) {
                Some(sequence) if sequence.id == row.id => Some(next),
                _ => self.running.iter().position(|sequence| sequence.id == row.id),
            };
            let Some(index) = index else { continue };
            next = index + 1;
            let sequence = &mut self.running[index];
            let first = draws + targets - scores.len();
            sequence.scored(sequence.computed, sequence.computed + row.len, &mut scores);
            let mut broken = failed.iter().any(|at| (first..draws + targets - scores.len()).contains(at));
            sequence.computed += row.len;
            let mut finish = None;
            if sequence.computed == sequence.tokens.len() {
                let (own, others) = guesses.split_at(row.guesses);
                guesses = others;
                let prompt = sequence.take_prompt_logprobs();
                let first = draws - drawn.len();
                let results = drawn.by_ref().zip(logprobs.by_ref().map(Some).chain(std::iter::repeat(None))).take(row.guesses + 1);
                let results = (first..).zip(results).map(|(at, result)| (!broken && !failed.contains(&at)).then_some(result));
                let accepted;
                (accepted, broken) = take_draws(sequence, own, results, prompt, outcomes);
                finish = outcomes.last().filter(|outcome| outcome.id == row.id).and_then(|outcome| outcome.finish);
                sequence.acceptance.learn(row.guesses, accepted);
                self.totals.guessed += row.guesses as u64;
                self.totals.accepted += accepted as u64;
            }
            if broken {
                self.broken.push((row.id, !sequence.draw().suppressed.is_empty()));
            } else {
                Self::cache(&mut self.pool, sequence, self.shape.block_size);
            }
            if broken || finish.is_some() {
                let sequence = self.running.remove(index);
                self.pool.release(&sequence.blocks);
                next = index;
            }
        }
        self.in_flight = in_flight;
        drop((drawn, logprobs, scores));
        output.failed.clear();
        output
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

    /// The last plan failed: its sequences leave. Their ids.
    pub fn abandon(&mut self) -> Vec<SequenceId> {
        let ids: Vec<_> = self.in_flight.drain(..).map(|row| row.id).collect();
        ids.iter().for_each(|id| self.remove(*id));
        ids
    }

    /// Panics unless free, cached and used blocks add up, every block has the right number of holders, only full computed blocks are shared,
    /// and every running sequence has room for its tokens.
    pub fn check_invariants(&self) {
        self.pool.check_invariants(self.running.iter().map(|sequence| sequence.blocks.as_slice()));
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

/// Appends what was drawn for one sequence: the first token, and one more after each guess that came true. Returns how many did, and whether
/// there was nothing to draw then.
///
/// A guess that came true has its keys and values in the cache already. What was computed after the first wrong one is written over later.
fn take_draws(
    sequence: &mut Sequence,
    guesses: &[u32],
    results: impl Iterator<Item = Option<(u32, Option<Option<Logprobs>>)>>,
    mut prompt: Option<Vec<Logprobs>>,
    outcomes: &mut Vec<Outcome>,
) -> (usize, bool) {
    let (mut accepted, mut open, mut broken) = (0, true, false);
    // To the end in any case: what follows belongs to the next row.
    for (nth, result) in results.enumerate() {
        if !open {
            continue;
        }
        let Some((token, logprobs)) = result else {
            (open, broken) = (false, true);
            continue;
        };
        let finish = sequence.push(token);
        let ends = matches!(finish, Some(Finish::Stop | Finish::StopToken(_)));
        let logprobs = logprobs.flatten().map(Box::new);
        outcomes.push(Outcome { id: sequence.id, prompt: prompt.take(), token: Token { id: token, ends, logprobs }, finish });
        open = finish.is_none() && guesses.get(nth) == Some(&token);
        if open {
            sequence.computed += 1;
            accepted += 1;
        }
    }
    (accepted, broken)
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
