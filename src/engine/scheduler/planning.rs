//! Plans the next step: which tokens of which sequences it runs, and in which blocks.

use std::sync::Arc;

use super::{InFlight, MIXED_SHARE, RESERVED_OUTPUT, Scheduler};
use crate::engine::ngram::NgramProposer;
use crate::engine::sequence::Sequence;
use crate::models::{Plan, Row};

impl Scheduler {
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
}
