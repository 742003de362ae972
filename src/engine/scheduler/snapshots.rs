//! Which states a step keeps, and where: for models with layers that keep a state instead of keys.
//!
//! Snapshots are made where another sequence will probably go on from: at the end of a prompt's last full block (the same prompt again, the
//! choices of `n`, the next turn), where the cached blocks of a prompt end and no snapshot is (a common beginning that is met for the second
//! time), where a waiting sequence parts from a running one, and at the end of the latest full block of an answer.

use std::iter::Peekable;
use std::vec::Drain;

use super::{InFlight, Scheduler};
use crate::engine::blocks::BlockPool;
use crate::engine::sequence::{Sequence, SequenceId};
use crate::models::{Plan, StateSave};

/// A snapshot that the plan in flight makes.
#[derive(Debug, Clone, Copy)]
pub struct Saved {
    id: SequenceId,
    /// The snapshot is of the end of that many blocks.
    blocks: usize,
    pub slot: u32,
}

/// The slots that the plan in flight writes beside those of its sequences, in the order of its rows.
pub struct InFlightStates<'a> {
    /// One for each draft token.
    pub slots: Drain<'a, u32>,
    pub saved: Peekable<Drain<'a, Saved>>,
}

impl Scheduler {
    /// A slot that no sequence needs to be admitted.
    fn spare_slot(&mut self) -> Option<u32> {
        let admissible = self.shape.max_num_seqs.saturating_sub(self.running.len());
        if self.pool.states.available() > admissible { self.pool.states.take() } else { None }
    }

    /// Takes a slot for the state after each draft token from `first` on; drafts without one are dropped.
    pub(super) fn take_draft_slots(&mut self, first: usize) {
        if self.pool.states.is_empty() {
            return;
        }
        for nth in first..self.drafts.len() {
            match self.spare_slot() {
                Some(slot) => self.draft_slots.push(slot),
                None => return self.drafts.truncate(nth),
            }
        }
    }

    /// How many of the cached blocks of `path` a sequence can go on from.
    pub(super) fn with_snapshot(&self, path: &[u32]) -> usize {
        if self.pool.states.is_empty() {
            return path.len();
        }
        path.iter().rposition(|block| self.pool.states.snapshot(*block).is_some()).map_or(0, |at| at + 1)
    }

    /// Gives a sequence that is admitted a slot with the snapshot of the block `last`, the end of its hit, and decides where it is to make
    /// snapshots. Of its blocks `matching` are cached.
    pub(super) fn give_state(&mut self, sequence: &mut Sequence, matching: usize, last: Option<u32>) {
        let states = &mut self.pool.states;
        if states.is_empty() {
            return;
        }
        let from = last.and_then(|block| states.use_snapshot(block));
        // NOTE: copies come before everything else in the step, so the snapshot's slot may be taken for something else from here on.
        sequence.state = states.take();
        self.copies.extend(from.zip(sequence.state).filter(|(from, to)| from != to));
        let hits = sequence.computed / self.shape.block_size;
        let whole = (sequence.tokens.len() - 1) / self.shape.block_size;
        sequence.snapshots.clear();
        sequence.snapshots.extend([matching, whole].into_iter().filter(|end| *end > hits));
    }

    /// Whether a running sequence will make a snapshot from which the waiting sequence `at` can go on, beyond the first `hits` blocks. Where the
    /// two part later than that, the running one is told to make it.
    pub(super) fn soon_snapshot(&mut self, at: usize, hits: usize) -> bool {
        let (sequence, size) = (&self.waiting[at], self.shape.block_size);
        let whole = (sequence.tokens.len() - 1) / size;
        for other in &mut self.running {
            let same = |block: usize| {
                other.tokens.get(block * size..(block + 1) * size) == Some(&sequence.tokens[block * size..(block + 1) * size])
            };
            // The block is compared first, because most differences are there.
            if other.computed >= whole * size || !same(hits) || !(0..hits).all(same) {
                continue;
            }
            let common = (hits + 1..whole).find(|block| !same(*block)).unwrap_or(whole);
            let is_ahead = |end: usize| hits < end && end <= common && other.computed < end * size;
            if other.snapshots.iter().any(|end| is_ahead(*end)) {
                return true;
            }
            if is_ahead(common) {
                other.snapshots.push(common);
                return true;
            }
        }
        false
    }

    /// Says where the last row of the plan goes on from and what is kept of it: row `len` tokens of sequence `index`, and drafts.
    pub(super) fn plan_states(&mut self, index: usize, len: usize, draft_len: usize, plan: &mut Plan) {
        let sequence = &self.running[index];
        let (Some(own), Some(row)) = (sequence.state, plan.rows.last()) else { return };
        let (id, from, prompt, size) = (sequence.id, sequence.computed, sequence.prompt_len, self.shape.block_size);
        let save = |seen: usize, slot: u32| StateSave { token: (row.start + seen - 1) as u32, slot };
        let first = plan.states.saves.len();
        plan.states.slots.push(own);
        plan.states.saves.push(save(len, own));
        let drafts = self.draft_slots[self.draft_slots.len() - draft_len..].iter().enumerate();
        plan.states.saves.extend(drafts.map(|(nth, slot)| save(len + nth + 1, *slot)));
        if self.pool.caching() {
            let last = (from + len + draft_len) / size;
            for end in from / size + 1..=last {
                let is_answer = end == last && end * size > prompt;
                if !is_answer && !self.running[index].snapshots.contains(&end) {
                    continue;
                }
                let Some(slot) = self.spare_slot() else { break };
                plan.states.saves.push(save(end * size - from, slot));
                self.saved.push(Saved { id, blocks: end, slot });
            }
        }
        plan.states.saves[first..].sort_unstable_by_key(|save| save.token);
    }
}

/// The state after the last token that counts becomes the sequence's; snapshots of blocks that are cached by now are kept. `before`: tokens that
/// were computed before the row.
pub fn settle(
    pool: &mut BlockPool,
    sequence: &mut Sequence,
    size: usize,
    states: &mut InFlightStates<'_>,
    (before, row): (usize, InFlight),
) {
    let Some(own) = sequence.state else { return };
    let accepted = sequence.computed.saturating_sub(before + row.len);
    for (nth, slot) in (1..).zip(states.slots.by_ref().take(row.draft_len)) {
        if nth == accepted {
            sequence.state = Some(slot);
            pool.states.give_back(own);
        } else {
            pool.states.give_back(slot);
        }
    }
    while let Some(Saved { blocks, slot, .. }) = states.saved.next_if(|saved| saved.id == sequence.id) {
        if blocks * size > sequence.computed {
            pool.states.give_back(slot);
            continue;
        }
        let block = sequence.blocks[blocks - 1];
        pool.keep_state(block, slot);
        if !sequence.snapshots.contains(&blocks)
            && let Some(earlier) = sequence.answer_snapshot.replace(block)
            && earlier != block
        {
            pool.states.forget(earlier);
        }
    }
}
