//! The scheduler: which sequences run in the next step. Pure: no tensors, no channels, no clock.
//!
//! Each step first gives every sequence that decodes its one token, then spends what is left of the token budget on prompts, in chunks,
//! first come first served. A sequence is admitted when the blocks of its tokens are free and a part of what the running ones may
//! still need stays free too; when they run out all the same, the newest sequence is put back and computed anew later.

use std::collections::VecDeque;
use std::sync::Arc;

use super::blocks::BlockPool;
use super::sequence::{Sequence, SequenceId};
use super::{Finish, Token};
use crate::models::{Logprobs, Output, Plan, Row, Shape};

/// Output tokens per running sequence that admission keeps room for; more would waste memory on requests that ask for 4,096 and use 100.
const RESERVED_OUTPUT: usize = 256;

/// What happened to one sequence in a step.
#[derive(Debug)]
pub struct Outcome {
    pub id: SequenceId,
    /// Before the first token, when asked for.
    pub prompt: Option<Vec<Logprobs>>,
    pub token: Token,
    pub finish: Option<Finish>,
}

/// See the module.
pub struct Scheduler {
    shape: Shape,
    pool: BlockPool,
    waiting: VecDeque<Sequence>,
    /// In order of admission.
    running: Vec<Sequence>,
    /// Ids and token counts of the plan in flight, in row order.
    in_flight: Vec<(SequenceId, usize)>,
    pub preempted: u64,
}

impl Scheduler {
    pub fn new(shape: Shape) -> Self {
        Self {
            pool: BlockPool::new(shape.blocks),
            shape,
            waiting: VecDeque::new(),
            running: Vec::new(),
            in_flight: Vec::new(),
            preempted: 0,
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
        self.pool.give(std::mem::take(&mut sequence.blocks).iter().copied());
        sequence
    }

    /// The next step, or `None` when there is nothing to do.
    pub fn plan(&mut self) -> Option<Plan> {
        let mut plan = Plan::default();
        let mut budget = self.shape.max_num_batched_tokens;
        self.plan_decodes(&mut plan, &mut budget);
        for index in 0..self.running.len() {
            if budget > 0 && self.running[index].pending() > 1 {
                self.plan_chunk(index, &mut plan, &mut budget);
            }
        }
        while budget > 0 && self.admit() {
            self.plan_chunk(self.running.len() - 1, &mut plan, &mut budget);
        }
        (!plan.rows.is_empty()).then_some(plan)
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
        for index in 0..self.running.len() {
            if *budget > 0 && self.running[index].pending() == 1 {
                self.plan_chunk(index, plan, budget);
            }
        }
    }

    /// Room for one more token of sequence `index`; false when the pool is empty.
    fn grow(&mut self, index: usize) -> bool {
        let needed = self.running[index].tokens.len().div_ceil(self.shape.block_size);
        let missing = needed - self.running[index].blocks.len().min(needed);
        let Some(blocks) = self.pool.take(missing) else { return false };
        if !blocks.is_empty() {
            Arc::make_mut(&mut self.running[index].blocks).extend(blocks);
        }
        true
    }

    fn preempt(&mut self, index: usize) {
        let mut sequence = self.release(index);
        sequence.restart();
        self.preempted += 1;
        self.waiting.push_front(sequence);
    }

    /// Moves the first waiting sequence to the running ones when everything it needs is there.
    fn admit(&mut self) -> bool {
        let Some(first) = self.waiting.front() else { return false };
        if self.running.len() >= self.shape.max_num_seqs {
            return false;
        }
        let needed = first.tokens.len().div_ceil(self.shape.block_size);
        let reserved: usize = self.running.iter().chain([first]).map(|sequence| self.reserve(sequence)).sum();
        // Alone, a sequence needs no reserve: nobody can take its blocks.
        if self.pool.free() < needed + if self.running.is_empty() { 0 } else { reserved } {
            return false;
        }
        let Some(blocks) = self.pool.take(needed) else { return false };
        let Some(mut sequence) = self.waiting.pop_front() else { return false };
        sequence.blocks = Arc::new(blocks);
        self.running.push(sequence);
        true
    }

    /// Blocks this sequence may soon want beyond those of its tokens.
    fn reserve(&self, sequence: &Sequence) -> usize {
        let soon = sequence.tokens.len() + sequence.remaining().min(RESERVED_OUTPUT);
        let held = sequence.blocks.len().max(sequence.tokens.len().div_ceil(self.shape.block_size));
        soon.div_ceil(self.shape.block_size).saturating_sub(held)
    }

    /// Adds a row for the next tokens of sequence `index`.
    fn plan_chunk(&mut self, index: usize, plan: &mut Plan, budget: &mut usize) {
        let sequence = &self.running[index];
        let len = sequence.pending().min(*budget);
        let (from, to) = (sequence.computed, sequence.computed + len);
        let size = self.shape.block_size;
        plan.rows.push(Row {
            start: plan.tokens.len(),
            len,
            context: to,
            blocks: sequence.blocks.clone(),
            draw: (to == sequence.tokens.len()).then(|| sequence.draw()),
            proposed: 0,
            score: sequence.score(from, to),
        });
        plan.tokens.extend_from_slice(&sequence.tokens[from..to]);
        plan.positions.extend(from as u32..to as u32);
        plan.slots.extend((from..to).map(|position| sequence.blocks[position / size] * size as u32 + (position % size) as u32));
        *budget -= len;
        self.in_flight.push((sequence.id, len));
    }

    /// Takes in the results of the last plan (which must be gone by now). Finished sequences have left and their blocks are free.
    pub fn settle(&mut self, output: Output) -> Vec<Outcome> {
        let mut drawn = output.tokens.iter();
        let mut logprobs = output.logprobs.into_iter();
        let mut scores = output.scores.into_iter();
        let mut outcomes = Vec::with_capacity(output.tokens.len());
        for (id, len) in std::mem::take(&mut self.in_flight) {
            let Some(index) = self.running.iter().position(|sequence| sequence.id == id) else { continue };
            let sequence = &mut self.running[index];
            sequence.scored(sequence.computed, sequence.computed + len, &mut scores);
            sequence.computed += len;
            if sequence.computed < sequence.tokens.len() {
                continue;
            }
            let Some(token) = drawn.next() else { break };
            let finish = sequence.push(*token);
            let ends = matches!(finish, Some(Finish::Stop | Finish::StopToken(_)));
            let logprobs = logprobs.next().flatten().map(Box::new);
            let prompt = sequence.take_prompt_logprobs();
            outcomes.push(Outcome { id, prompt, token: Token { id: *token, ends, logprobs }, finish });
            if finish.is_some() {
                self.release(index);
            }
        }
        outcomes
    }

    /// The last plan failed: its sequences leave. Their ids.
    pub fn abandon(&mut self) -> Vec<SequenceId> {
        let ids: Vec<_> = std::mem::take(&mut self.in_flight).into_iter().map(|(id, _)| id).collect();
        ids.iter().for_each(|id| self.remove(*id));
        ids
    }

    /// Free and owned blocks add up, no block has two owners, and every running sequence has room for its tokens.
    pub fn check_invariants(&self) {
        let owned: Vec<u32> = self.running.iter().flat_map(|sequence| sequence.blocks.iter().copied()).collect();
        let mut distinct = owned.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), owned.len(), "a block has two owners");
        assert_eq!(owned.len() + self.pool.free(), self.pool.total(), "blocks leaked");
        assert!(self.running.len() <= self.shape.max_num_seqs, "too many sequences");
        assert!(
            self.waiting.iter().all(|sequence| sequence.blocks.is_empty() && sequence.computed == 0),
            "a waiting sequence holds blocks"
        );
        for sequence in &self.running {
            assert!(sequence.computed <= sequence.blocks.len() * self.shape.block_size, "keys without a block");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Request, SamplingParams};
    use crate::models::{LogprobsMode, LogprobsSpec};
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// What a scripted model says after these tokens: a function of the whole sequence, so that a wrong context shows.
    fn next(tokens: &[u32]) -> u32 {
        tokens.iter().fold(17u32, |hash, token| hash.wrapping_mul(31).wrapping_add(*token)) % 97 + 3
    }

    /// What it says of `token` after these.
    fn logprobs(tokens: &[u32], token: u32) -> Logprobs {
        Logprobs { own: next(tokens) as f32, rank: token, top: Vec::new() }
    }

    const SPEC: LogprobsSpec = LogprobsSpec { top: 0, mode: LogprobsMode::RawLogprobs };

    fn shape(blocks: usize, block_size: usize, seqs: usize, batched: usize) -> Shape {
        Shape {
            max_model_len: blocks * block_size,
            vocab_size: 100,
            block_size,
            blocks,
            max_num_seqs: seqs,
            max_num_batched_tokens: batched,
        }
    }

    fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
        let params = SamplingParams { temperature: 0.0, max_tokens, ..Default::default() };
        Request { id: "t".into(), prompt: Arc::new(prompt), params, prompt_logprobs: None, deadline: None }
    }

    /// A model whose KV cache is a table of tokens by slot: a row's context is read back through its block table.
    struct Scripted {
        cache: Vec<u32>,
        block_size: usize,
    }

    impl Scripted {
        fn step(&mut self, plan: &Plan) -> Output {
            for (token, slot) in plan.tokens.iter().zip(&plan.slots) {
                self.cache[*slot as usize] = *token;
            }
            let mut output = Output::default();
            for row in &plan.rows {
                assert_eq!(plan.positions[row.start + row.len - 1] as usize + 1, row.context);
                let context: Vec<u32> = (0..row.context)
                    .map(|p| self.cache[row.blocks[p / self.block_size] as usize * self.block_size + p % self.block_size])
                    .collect();
                if let Some(draw) = &row.draw {
                    output.tokens.push(next(&context));
                    output.logprobs.push(draw.logprobs.map(|_| logprobs(&context, next(&context))));
                }
                if let Some(score) = &row.score {
                    let known = row.context - row.len;
                    output.scores.extend(score.targets.iter().enumerate().map(|(i, target)| logprobs(&context[..=known + i], *target)));
                }
            }
            output
        }
    }

    fn expected(prompt: &[u32], max_tokens: usize, max_len: usize) -> Vec<u32> {
        let mut tokens = prompt.to_vec();
        while tokens.len() < max_len.min(prompt.len() + max_tokens) {
            tokens.push(next(&tokens));
        }
        tokens.split_off(prompt.len())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn any_schedule_ends_with_the_right_tokens_and_no_leak(
            blocks in 2usize..14, block_size in 1usize..6, seqs in 1usize..6, batched in 1usize..12,
            arrivals in prop::collection::vec((0usize..30, prop::collection::vec(0u32..100, 1..20), 1usize..16, any::<prop::sample::Index>(), 0u8..8), 1..14),
        ) {
            let shape = shape(blocks, block_size, seqs, batched.max(seqs));
            let mut scheduler = Scheduler::new(shape.clone());
            let mut model = Scripted { cache: vec![0; blocks * block_size], block_size };
            let mut produced: HashMap<SequenceId, Vec<u32>> = HashMap::new();
            let mut prompts: HashMap<SequenceId, Vec<Logprobs>> = HashMap::new();
            let mut cancelled = Vec::new();
            let last_arrival = arrivals.iter().map(|arrival| arrival.0).max().unwrap_or(0);
            for step in 0..5_000 {
                for (id, (at, prompt, max_tokens, _, _)) in arrivals.iter().enumerate() {
                    if *at == step && prompt.len() < shape.max_model_len {
                        let mut request = request(prompt.clone(), *max_tokens);
                        request.prompt_logprobs = (id % 2 == 0).then_some(SPEC);
                        request.params.logprobs = (id % 3 == 0).then_some(SPEC);
                        scheduler.add(Sequence::new(id as u64, &request, shape.max_model_len));
                    }
                }
                for (id, (_, _, _, when, kind)) in arrivals.iter().enumerate() {
                    if *kind == 0 && step == when.index(60) {
                        scheduler.remove(id as u64);
                        cancelled.push(id as u64);
                    }
                }
                let Some(plan) = scheduler.plan() else {
                    if step > last_arrival.max(60) { break }
                    continue;
                };
                prop_assert!(plan.tokens.len() <= shape.max_num_batched_tokens);
                let output = model.step(&plan);
                drop(plan);
                for outcome in scheduler.settle(output) {
                    let tokens = produced.entry(outcome.id).or_default();
                    prop_assert!(outcome.prompt.is_none() || tokens.is_empty(), "before the first token");
                    let context = [&arrivals[outcome.id as usize].1, tokens.as_slice()].concat();
                    let want = (outcome.id % 3 == 0).then(|| Box::new(logprobs(&context, outcome.token.id)));
                    prop_assert_eq!(&outcome.token.logprobs, &want);
                    tokens.push(outcome.token.id);
                    if let Some(prompt) = outcome.prompt {
                        prop_assert!(prompts.insert(outcome.id, prompt).is_none(), "once");
                    }
                }
                scheduler.check_invariants();
            }
            prop_assert_eq!((scheduler.running(), scheduler.waiting(), scheduler.pool().free()), (0, 0, blocks));
            for (id, (_, prompt, max_tokens, _, _)) in arrivals.iter().enumerate() {
                let want = if prompt.len() < shape.max_model_len { expected(prompt, *max_tokens, shape.max_model_len) } else { Vec::new() };
                let got = produced.remove(&(id as u64)).unwrap_or_default();
                let want_prompt = (id % 2 == 0 && !got.is_empty()).then(|| (1..prompt.len()).map(|i| logprobs(&prompt[..i], prompt[i])).collect());
                prop_assert_eq!(prompts.remove(&(id as u64)), want_prompt);
                if cancelled.contains(&(id as u64)) {
                    prop_assert!(want.starts_with(&got));
                } else {
                    prop_assert_eq!(got, want);
                }
            }
        }
    }

    #[test]
    fn decodes_go_on_while_a_long_prompt_is_read_in_chunks() {
        let mut scheduler = Scheduler::new(shape(100, 4, 4, 8));
        scheduler.add(Sequence::new(1, &request(vec![1, 2], 50), 400));
        let first = scheduler.plan().unwrap();
        assert_eq!(first.tokens, [1, 2]);
        drop(first);
        scheduler.settle(Output { tokens: vec![9], ..Default::default() });
        scheduler.add(Sequence::new(2, &request((0..30).collect(), 5), 400));
        for step in 0..4 {
            let plan = scheduler.plan().unwrap();
            assert_eq!((plan.rows[0].len, plan.tokens.len()), (1, 8), "step {step}");
            assert!(plan.rows[1].draw.is_none());
            drop(plan);
            assert_eq!(scheduler.settle(Output { tokens: vec![9], ..Default::default() }).len(), 1);
        }
        let plan = scheduler.plan().unwrap();
        assert_eq!((plan.rows[1].len, plan.rows[1].context), (2, 30));
        assert!(plan.rows[1].draw.is_some());
    }

    #[test]
    fn ends_are_told_apart() {
        let mut request = request(vec![1], 10);
        request.params.eos_token_ids = Arc::new(vec![2]);
        request.params.stop_token_ids = Arc::new(vec![7]);
        request.params.min_tokens = 2;
        let mut sequence = Sequence::new(1, &request, 100);
        assert_eq!(*sequence.draw().suppressed, [2, 7]);
        assert_eq!(sequence.push(5), None);
        assert_eq!(sequence.push(6), None);
        assert!(sequence.draw().suppressed.is_empty());
        assert_eq!(sequence.push(7), Some(Finish::StopToken(7)));
        assert_eq!(Sequence::new(1, &request, 100).push(2), Some(Finish::Stop));
        request.params.ignore_eos = true;
        assert_eq!(Sequence::new(1, &request, 100).push(2), None);
        request.params.max_tokens = 1;
        assert_eq!(Sequence::new(1, &request, 100).push(2), Some(Finish::Length));
    }

    #[test]
    fn bad_words_are_kept_from_completion() {
        let mut request = request(vec![4, 5], 10);
        request.params.bad_words = Arc::new(vec![vec![9], vec![4, 5, 6], vec![6, 7], vec![6, 6, 8]]);
        request.params.eos_token_ids = Arc::new(vec![2]);
        request.params.min_tokens = 1;
        let mut sequence = Sequence::new(1, &request, 100);
        assert!(!sequence.may_speculate());
        assert_eq!(*sequence.draw().suppressed, [9, 2], "only the output counts, not the prompt");
        let mut then = |token| {
            sequence.push(token);
            sequence.draw().suppressed.to_vec()
        };
        assert_eq!(then(6), [9, 7]);
        assert_eq!(then(6), [9, 7, 8]);
        assert_eq!(then(4), [9]);
        assert_eq!(then(5), [9, 6]);
        assert_eq!(then(5), [9]);
    }

    #[test]
    fn penalties_see_prompt_and_output() {
        let mut request = request(vec![5, 3, 5], 10);
        request.params.repetition_penalty = 1.1;
        let mut sequence = Sequence::new(1, &request, 100);
        for token in [8, 9, 8] {
            sequence.push(token);
        }
        let seen = sequence.draw().seen;
        assert_eq!((&seen.prompt[..], &seen.output[..]), (&[3, 5][..], &[(8, 2), (9, 1)][..]));
    }
}
