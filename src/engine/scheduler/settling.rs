//! Takes in what a step has given: tokens, ends, blocks that are full now.

use std::sync::Arc;
use std::vec::Drain;

use super::{Broken, InFlight, Outcome, Scheduler, broken_by, snapshots};
use crate::engine::Token;
use crate::engine::blocks::BlockPool;
use crate::engine::sequence::{Sequence, SequenceId};
use crate::error::Failure;
use crate::models::{Logprobs, Output};

impl Scheduler {
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
