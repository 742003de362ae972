use std::sync::Arc;

use super::*;
use crate::engine::{Request, SamplingParams};
use crate::models::{LogprobsMode, LogprobsSpec};
use crate::models::{Output, Plan, Row};
use proptest::prelude::*;
use std::collections::HashMap;

/// What a scripted model says after these tokens: a function of the whole sequence, so that a wrong context shows.
fn next(tokens: &[u32]) -> u32 {
    tokens.iter().fold(17u32, |hash, token| hash.wrapping_mul(31).wrapping_add(*token)) % 97 + 3
}

/// What a forgetful one says: it sees the last two tokens and soon runs in circles, so that drafts come true.
fn next_of_two(tokens: &[u32]) -> u32 {
    next(&tokens[tokens.len().saturating_sub(2)..]) % 4
}

/// What it says of `token` after these.
fn logprobs(tokens: &[u32], token: u32) -> Logprobs {
    Logprobs { own: next(tokens) as f32, rank: token, ..Default::default() }
}

const SPEC: LogprobsSpec = LogprobsSpec { top: 0, mode: LogprobsMode::RawLogprobs };

fn shape(blocks: usize, block_size: usize, seqs: usize, batched: usize) -> Shape {
    Shape {
        max_model_len: blocks * block_size,
        vocab_size: 100,
        block_size,
        blocks,
        kv_cache_dtype: "float32",
        state_slots: 0,
        max_num_seqs: seqs,
        max_num_batched_tokens: batched,
        memory_bound: true,
        pooling: None,
        whole_prompts: false,
    }
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    let params = SamplingParams { temperature: 0.0, max_tokens, ..Default::default() };
    Request { id: "t".into(), prompt: Arc::new(prompt), params, prompt_logprobs: None, deadline: None, pooling: None, constraint: None }
}

/// A model whose KV cache is a table of tokens by slot: a row's context is read back through its block table. Where there are slots for states, a
/// state is the list of all tokens it has seen.
struct Scripted {
    cache: Vec<u32>,
    block_size: usize,
    states: Vec<Vec<u32>>,
    next: fn(&[u32]) -> u32,
}

impl Scripted {
    /// Goes on from the states of the rows, each of which must be that of the tokens before the row, and keeps what the plan says.
    fn keep_states(&mut self, plan: &Plan) {
        for (from, to) in &plan.states.copies {
            self.states[*to as usize] = self.states[*from as usize].clone();
        }
        let mut written = Vec::new();
        for (index, row) in plan.rows.iter().enumerate() {
            let known = row.context - row.len;
            let before = if known == 0 { Vec::new() } else { self.states[plan.states.slots[index] as usize].clone() };
            let in_cache = |p: usize| self.cache[row.blocks[p / self.block_size] as usize * self.block_size + p % self.block_size];
            assert!(before.iter().copied().eq((0..known).map(in_cache)), "row {index} goes on from another state");
            for save in plan.states.saves.iter().filter(|save| (row.start..row.start + row.len).contains(&(save.token as usize))) {
                let state = [&before[..], &plan.tokens[row.start..=save.token as usize]].concat();
                written.push((save.slot, state));
            }
        }
        let mut slots: Vec<u32> = written.iter().map(|(slot, _)| *slot).collect();
        slots.sort_unstable();
        assert!(slots.windows(2).all(|pair| pair[0] != pair[1]), "a slot is written twice");
        assert!(plan.states.saves.is_sorted_by_key(|save| save.token));
        written.into_iter().for_each(|(slot, state)| self.states[slot as usize] = state);
    }

    fn step(&mut self, plan: &Plan) -> Output {
        if !self.states.is_empty() {
            self.keep_states(plan);
        }
        for (token, slot) in plan.tokens.iter().zip(&plan.slots) {
            self.cache[*slot as usize] = *token;
        }
        let mut output = Output::default();
        for row in &plan.rows {
            assert_eq!(plan.positions[row.start + row.len - 1] as usize + 1, row.context);
            let context: Vec<u32> = (0..row.context)
                .map(|p| self.cache[row.blocks[p / self.block_size] as usize * self.block_size + p % self.block_size])
                .collect();
            if let Some(sampling) = &row.sampling {
                for nth in 0..=row.draft_len {
                    let context = &context[..row.context - row.draft_len + nth];
                    let token = (self.next)(context);
                    output.tokens.push(token);
                    output.logprobs.push(sampling.params.logprobs.map(|_| logprobs(context, token)));
                }
            }
            if let Some(score) = &row.score {
                let known = row.context - row.len;
                output.scores.extend(score.targets.iter().enumerate().map(|(i, target)| logprobs(&context[..=known + i], *target)));
            }
        }
        output
    }
}

fn expected(prompt: &[u32], max_tokens: usize, max_len: usize, next: fn(&[u32]) -> u32) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    while tokens.len() < max_len.min(prompt.len() + max_tokens) {
        tokens.push(next(&tokens));
    }
    tokens.split_off(prompt.len())
}

/// Plans, runs and settles one step; `None` when there was nothing to do. The tokens that were run, and what came of it.
fn step(scheduler: &mut Scheduler, model: &mut Scripted) -> Option<(usize, Vec<Outcome>)> {
    let mut plan = Plan::default();
    if !scheduler.plan(&mut plan) {
        return None;
    }
    let output = model.step(&plan);
    let tokens = plan.tokens.len();
    plan.clear();
    let mut outcomes = Vec::new();
    scheduler.settle(output, &mut outcomes);
    scheduler.check_invariants();
    Some((tokens, outcomes))
}

fn scripted(shape: &Shape) -> Scripted {
    let states = vec![Vec::new(); shape.state_slots];
    Scripted { cache: vec![0; shape.blocks * shape.block_size], block_size: shape.block_size, states, next }
}

/// When it comes, its prompt, its `max_tokens`, when it is cancelled (if it is).
type Arrival = (usize, Vec<u32>, usize, Option<usize>);

/// Prompts with common beginnings: a piece of one of three texts, then something of its own.
fn arrival() -> impl Strategy<Value = Arrival> {
    let prompt = (0u32..3, 0u32..12, prop::collection::vec(0u32..3, 1..8));
    let prompt = prompt.prop_map(|(text, shared, own)| (0..shared).map(|at| text * 20 + at).chain(own).collect::<Vec<_>>());
    (0usize..30, prompt, 1usize..16, prop::option::weighted(0.15, 0usize..60))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    /// Arrivals, cancellations, ends and preemptions in any order, with and without prefix cache and speculation: the right tokens, no leak.
    #[test]
    fn any_schedule_ends_with_the_right_tokens_and_no_leak(
        blocks in 2usize..14, block_size in 1usize..6, seqs in 1usize..6, batched in 1usize..12, caching in prop::bool::weighted(0.8),
        forgetful in any::<bool>(), draft_len in 0usize..6, spare_slots in prop::option::of(0usize..12),
        arrivals in prop::collection::vec(arrival(), 1..7),
    ) {
        // Half of the models keep states.
        let state_slots = spare_slots.map_or(0, |spare| seqs + spare);
        let shape = Shape { state_slots, ..shape(blocks, block_size, seqs, batched.max(seqs)) };
        let proposer = (draft_len > 0).then(|| NgramProposer { draft_len, max_rows: 3, ..Default::default() });
        let mut scheduler = Scheduler::new(shape.clone(), caching, proposer);
        let mut model = scripted(&shape);
        if forgetful {
            model.next = next_of_two;
        }
        let mut produced: HashMap<SequenceId, Vec<u32>> = HashMap::new();
        let mut prompts: HashMap<SequenceId, Vec<Logprobs>> = HashMap::new();
        for now in 0..5_000 {
            for (id, (at, prompt, max_tokens, _)) in arrivals.iter().enumerate() {
                if *at == now && prompt.len() < shape.max_model_len {
                    let mut request = request(prompt.clone(), *max_tokens);
                    request.prompt_logprobs = (id % 4 == 0).then_some(SPEC);
                    request.params.logprobs = (id % 3 == 0).then_some(SPEC);
                    scheduler.add(Sequence::new(id as u64, &request, shape.max_model_len));
                }
            }
            for (id, (_, _, _, cancelled)) in arrivals.iter().enumerate() {
                if *cancelled == Some(now) {
                    scheduler.remove(id as u64);
                }
            }
            match step(&mut scheduler, &mut model) {
                Some((tokens, outcomes)) => {
                    prop_assert!(tokens <= shape.max_num_batched_tokens);
                    for outcome in outcomes {
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
                }
                None if now >= 60 => break,
                None => prop_assert_eq!(scheduler.running() + scheduler.waiting(), 0, "something waits and nothing runs"),
            }
        }
        prop_assert_eq!((scheduler.running(), scheduler.waiting(), scheduler.pool().available()), (0, 0, blocks));
        prop_assert_eq!(scheduler.pool().states.available(), state_slots);
        for (id, (_, prompt, max_tokens, cancelled)) in arrivals.iter().enumerate() {
            let fits = prompt.len() < shape.max_model_len;
            let want = if fits { expected(prompt, *max_tokens, shape.max_model_len, model.next) } else { Vec::new() };
            let got = produced.remove(&(id as u64)).unwrap_or_default();
            let want_prompt = (id % 4 == 0 && !got.is_empty()).then(|| (1..prompt.len()).map(|i| logprobs(&prompt[..i], prompt[i])).collect());
            prop_assert_eq!(prompts.remove(&(id as u64)), want_prompt);
            if cancelled.is_some() {
                prop_assert!(want.starts_with(&got));
            } else {
                prop_assert_eq!(got, want);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// A short prompt behind a long one is read within a bounded number of steps, and the long one goes on in each of them.
    #[test]
    fn a_short_prompt_gets_past_a_long_one(
        budget in 4usize..40, long in 200u32..400, head_start in 0usize..5, short in 1u32..30, decoding in 0u64..3, draft_len in 0usize..60,
    ) {
        let shape = shape(800, 4, 8, budget);
        let proposer = (draft_len > 0).then(|| NgramProposer { draft_len, min: 1, ..Default::default() });
        let mut scheduler = Scheduler::new(shape.clone(), true, proposer);
        let mut model = scripted(&shape);
        if draft_len > 0 {
            // Guesses come true, so that as many are made as may be.
            model.next = |_| 7;
        }
        for id in 0..decoding {
            scheduler.add(Sequence::new(10 + id, &request(vec![90 + id as u32], 500), 3_000));
        }
        for _ in 0..=draft_len.min(10) {
            step(&mut scheduler, &mut model);
        }
        scheduler.add(Sequence::new(1, &request((1000..1000 + long).collect(), 5), 3_000));
        for _ in 0..head_start {
            step(&mut scheduler, &mut model);
        }
        scheduler.add(Sequence::new(2, &request((5000..5000 + short).collect(), 5), 3_000));
        // What prompts get in a step while streams run, and the half of it that is not the oldest's.
        let prompts = if decoding > 0 { (budget / MIXED_SHARE).max(1).min(budget - decoding as usize) } else { budget };
        let bound = (short as usize).div_ceil((prompts / 2).max(1)) + 1;
        let computed = |scheduler: &Scheduler| scheduler.running.iter().find(|s| s.id == 1).map(|s| s.computed);
        for waited in 1.. {
            let before = computed(&scheduler);
            let (_, outcomes) = step(&mut scheduler, &mut model).unwrap();
            if outcomes.iter().any(|outcome| outcome.id == 2) {
                prop_assert!(waited <= bound, "{waited} steps for {short} tokens, bound {bound}");
                break;
            }
            prop_assert!(computed(&scheduler) > before || before.is_none_or(|before| before >= long as usize), "the long one stands still");
            prop_assert!(waited <= bound || computed(&scheduler).is_none_or(|computed| computed >= long as usize), "still waiting after {waited} steps");
        }
    }
}

#[test]
fn drafts_leave_waiting_prompts_their_share() {
    for budget in [2, 3, 4, 9, 40] {
        let shape = shape(400, 4, 4, budget);
        let mut scheduler = Scheduler::new(shape.clone(), true, Some(NgramProposer { draft_len: 64, min: 1, ..Default::default() }));
        let mut model = Scripted { next: |_| 7, ..scripted(&shape) };
        scheduler.add(Sequence::new(1, &request(vec![7; 6], 1_000), 1_600));
        for _ in 0..20 {
            step(&mut scheduler, &mut model);
        }
        let alone = scheduler.totals().drafted;
        assert!(alone > 0, "alone, a stream has the whole budget");
        scheduler.add(Sequence::new(2, &request((100..100 + 2 * budget as u32).collect(), 1), 1_600));
        let share = (budget / MIXED_SHARE).max(1).min(budget - 1);
        let steps = (1..).find(|_| step(&mut scheduler, &mut model).unwrap().1.iter().any(|outcome| outcome.id == 2)).unwrap();
        assert_eq!(steps, (2 * budget).div_ceil(share), "of {budget}");
    }
}

#[test]
fn a_draw_that_failed_ends_its_sequence_alone_and_leaves_no_block() {
    let shape = shape(100, 4, 8, 64);
    let mut scheduler = Scheduler::new(shape.clone(), true, Some(NgramProposer { min: 1, ..Default::default() }));
    let mut model = Scripted { next: next_of_two, ..scripted(&shape) };
    for id in 0..3 {
        let mut request = request(vec![1, 2, 3, id as u32], 60);
        request.prompt_logprobs = (id == 2).then_some(SPEC);
        scheduler.add(Sequence::new(id, &request, 400));
    }
    let (mut plan, mut outcomes, mut tokens) = (Plan::default(), Vec::new(), HashMap::<SequenceId, Vec<u32>>::new());
    let mut broken = Vec::new();
    let mut drafting = false;
    while scheduler.plan(&mut plan) {
        let mut output = model.step(&plan);
        if !output.scores.is_empty() {
            // A score of the third one.
            output.failed.push(output.tokens.len() + 1);
        }
        // The first sequence's first draft token is accepted, and after it there is nothing.
        if let Some(row) = plan.rows.first().filter(|row| row.draft_len > 1 && !drafting && output.tokens[0] == plan.tokens[row.start + 1])
        {
            assert_eq!(row.start, 0);
            output.failed.extend([1, 2]);
            drafting = true;
        }
        plan.clear();
        scheduler.settle(output, &mut outcomes);
        scheduler.check_invariants();
        outcomes.drain(..).for_each(|outcome| tokens.entry(outcome.id).or_default().push(outcome.token.id));
        broken.extend(scheduler.broken().map(|(id, _)| id));
    }
    assert_eq!(broken, [2, 0]);
    assert_eq!(scheduler.pool().available(), 100);
    assert!(!tokens.contains_key(&2), "its prompt could not be scored");
    let (whole, part) = (expected(&[1, 2, 3, 0], 60, 400, next_of_two), &tokens[&0]);
    assert!(whole.starts_with(part) && part.len() < 60, "what came before stands");
    assert_eq!(tokens[&1], expected(&[1, 2, 3, 1], 60, 400, next_of_two));
}

#[test]
fn choices_of_one_prompt_share_its_blocks_and_compute_it_once() {
    let shape = shape(100, 4, 8, 8);
    let mut scheduler = Scheduler::new(shape.clone(), true, None);
    let mut model = scripted(&shape);
    for id in 0..4 {
        scheduler.add(Sequence::new(id, &request((0..22).collect(), 3), 100));
    }
    // Another prompt behind them does not wait for them.
    scheduler.add(Sequence::new(9, &request(vec![50, 51], 1), 100));
    let mut prompt_tokens = 0;
    let mut first = Vec::new();
    let mut used = usize::MAX;
    while let Some((tokens, outcomes)) = step(&mut scheduler, &mut model) {
        prompt_tokens += tokens;
        first.extend(outcomes.iter().map(|outcome| outcome.id));
        if scheduler.running() == 4 {
            used = 100 - scheduler.pool().available();
        }
    }
    assert_eq!(first[0], 9);
    // 22 tokens once and 2 of them (the block that is not full) three times more, 2 of the other, 2 decodes of each choice.
    assert_eq!(prompt_tokens, 22 + 3 * 2 + 2 + 4 * 2);
    // Five shared blocks, and one or two of their own each.
    assert!(used <= 5 + 4 * 2, "{used} blocks");
    assert_eq!(scheduler.totals().prefix_hits, 3 * 20);
}

#[test]
fn states_are_shared_where_snapshots_are() {
    let shape = Shape { state_slots: 24, ..shape(100, 4, 8, 8) };
    let (mut scheduler, mut model) = (Scheduler::new(shape.clone(), true, None), scripted(&shape));
    let mut all = |scheduler: &mut Scheduler| {
        let mut tokens = Vec::new();
        while let Some((_, outcomes)) = step(scheduler, &mut model) {
            tokens.extend(outcomes.iter().map(|outcome| outcome.token.id));
        }
        tokens
    };
    // Choices of one prompt: it is computed once, but for its last block.
    (0..4).for_each(|id| scheduler.add(Sequence::new(id, &request((0..22).collect(), 3), 100)));
    all(&mut scheduler);
    assert_eq!(scheduler.totals().prefix_hits, 3 * 20);
    // The next turn goes on from the end of the answer's last full block.
    let mut tokens: Vec<u32> = (200..210).collect();
    scheduler.add(Sequence::new(5, &request(tokens.clone(), 7), 100));
    tokens.extend(all(&mut scheduler));
    tokens.extend([1, 2, 3]);
    scheduler.add(Sequence::new(6, &request(tokens, 1), 100));
    all(&mut scheduler);
    assert_eq!(scheduler.totals().prefix_hits, 3 * 20 + 16);
    // A beginning that three prompts share, one after the other: the second finds keys and no state, and leaves one for the third.
    let hits = scheduler.totals().prefix_hits;
    for (id, own) in (7..).zip([60, 70, 80]) {
        let prompt = (300..308).chain(own..own + 6).collect();
        scheduler.add(Sequence::new(id, &request(prompt, 1), 100));
        all(&mut scheduler);
    }
    assert_eq!(scheduler.totals().prefix_hits, hits + 8);
    // At the same time: the others wait for the state where they part from the first.
    for (id, own) in (10..).zip([60, 70, 80]) {
        let prompt = (400..416).chain(own..own + 6).collect();
        scheduler.add(Sequence::new(id, &request(prompt, 1), 100));
    }
    all(&mut scheduler);
    assert_eq!(scheduler.totals().prefix_hits, hits + 8 + 2 * 16);
}

#[test]
fn the_next_turn_of_a_chat_finds_prompt_and_answer() {
    let shape = shape(100, 4, 8, 64);
    let mut scheduler = Scheduler::new(shape.clone(), true, None);
    let mut model = scripted(&shape);
    let mut tokens: Vec<u32> = (0..10).collect();
    scheduler.add(Sequence::new(1, &request(tokens.clone(), 7), 100));
    while let Some((_, outcomes)) = step(&mut scheduler, &mut model) {
        tokens.extend(outcomes.iter().map(|outcome| outcome.token.id));
    }
    assert_eq!(tokens.len(), 17);
    tokens.extend([1, 2, 3]);
    scheduler.add(Sequence::new(2, &request(tokens, 1), 100));
    let mut plan = Plan::default();
    assert!(scheduler.plan(&mut plan));
    // The last drawn token was never run, so 16 of the 17 are there: four blocks.
    assert_eq!((scheduler.started(), plan.tokens.len()), (&[(2, 16)][..], 4));
}

#[test]
fn the_last_token_is_computed_even_if_all_are_cached() {
    let shape = shape(100, 4, 8, 64);
    let mut scheduler = Scheduler::new(shape.clone(), true, None);
    let mut model = scripted(&shape);
    for id in 0..2 {
        scheduler.add(Sequence::new(id, &request((0..8).collect(), 1), 100));
        let (tokens, outcomes) = step(&mut scheduler, &mut model).unwrap();
        assert_eq!((tokens, outcomes.len()), (if id == 0 { 8 } else { 4 }, 1));
    }
}

#[test]
fn drafts_that_come_true_save_steps() {
    let shape = shape(100, 4, 8, 64);
    let mut steps = [0, 0];
    for (proposer, steps) in [None, Some(NgramProposer::default())].into_iter().zip(&mut steps) {
        let mut scheduler = Scheduler::new(shape.clone(), true, proposer);
        let mut model = Scripted { next: next_of_two, ..scripted(&shape) };
        let mut greedy = request(vec![1, 2, 3], 100);
        greedy.params.presence_penalty = 0.0;
        scheduler.add(Sequence::new(1, &greedy, 400));
        let mut tokens = Vec::new();
        while let Some((_, outcomes)) = step(&mut scheduler, &mut model) {
            tokens.extend(outcomes.iter().map(|outcome| outcome.token.id));
            *steps += 1;
        }
        assert_eq!(tokens, expected(&[1, 2, 3], 100, 400, next_of_two));
        let totals = scheduler.totals();
        assert!(totals.accepted <= totals.drafted && totals.accepted as usize + *steps == 100, "{totals:?}, {steps} steps");
    }
    assert!(steps[0] == 100 && steps[1] < 40, "{steps:?} steps");
}

#[test]
fn nothing_is_drafted_where_a_sample_depends_on_the_ones_before_or_many_rows_run() {
    let shape = shape(100, 4, 8, 64);
    let proposer = Some(NgramProposer { max_rows: 2, ..Default::default() });
    let drafted = |sequences: u64, penalty: f32| {
        let mut scheduler = Scheduler::new(shape.clone(), true, proposer);
        let mut model = Scripted { next: next_of_two, ..scripted(&shape) };
        for id in 0..sequences {
            let mut request = request(vec![1, 2, 3], 30);
            request.params.presence_penalty = penalty;
            scheduler.add(Sequence::new(id, &request, 400));
        }
        while step(&mut scheduler, &mut model).is_some() {}
        scheduler.totals().drafted
    };
    assert!(drafted(2, 0.0) > 0);
    assert_eq!((drafted(2, 0.5), drafted(3, 0.0)), (0, 0));
}

#[test]
fn decodes_go_on_while_a_long_prompt_is_read_in_chunks() {
    let mut scheduler = Scheduler::new(shape(100, 4, 4, 9), true, None);
    let mut plan = Plan::default();
    let mut outcomes = Vec::new();
    let drawn = Output { tokens: vec![9], ..Default::default() };
    scheduler.add(Sequence::new(1, &request(vec![1, 2], 50), 400));
    assert!(scheduler.plan(&mut plan));
    assert_eq!(plan.tokens, [1, 2]);
    plan.clear();
    scheduler.settle(drawn.clone(), &mut outcomes);
    scheduler.add(Sequence::new(2, &request((0..18).collect(), 5), 400));
    for step in 0..4 {
        assert!(scheduler.plan(&mut plan));
        // Half the budget beside the stream.
        assert_eq!((plan.rows[0].len, plan.tokens.len()), (1, 1 + 4), "step {step}");
        assert!(plan.rows[1].sampling.is_none());
        plan.clear();
        scheduler.settle(drawn.clone(), &mut outcomes);
        assert_eq!(outcomes.len(), 1);
    }
    assert!(scheduler.plan(&mut plan));
    assert_eq!((plan.rows[1].len, plan.rows[1].context), (2, 18));
    assert!(plan.rows[1].sampling.is_some());
}

#[test]
fn ends_are_told_apart() {
    let mut request = request(vec![1], 10);
    request.params.eos_token_ids = Arc::new(vec![2]);
    request.params.stop_token_ids = Arc::new(vec![7]);
    request.params.min_tokens = 2;
    let mut sequence = Sequence::new(1, &request, 100);
    assert_eq!(*sequence.sampling().suppressed, [2, 7]);
    assert_eq!(sequence.push(5), Ok(None));
    assert_eq!(sequence.push(6), Ok(None));
    assert!(sequence.sampling().suppressed.is_empty());
    assert_eq!(sequence.push(7), Ok(Some(Finish::StopToken(7))));
    assert_eq!(Sequence::new(1, &request, 100).push(2), Ok(Some(Finish::Stop)));
    request.params.ignore_eos = true;
    assert_eq!(Sequence::new(1, &request, 100).push(2), Ok(None));
    request.params.max_tokens = 1;
    assert_eq!(Sequence::new(1, &request, 100).push(2), Ok(Some(Finish::Length)));
}

#[test]
fn bad_words_are_kept_from_completion() {
    let mut request = request(vec![4, 5], 10);
    request.params.bad_words = Arc::new(vec![vec![9], vec![4, 5, 6], vec![6, 7], vec![6, 6, 8]]);
    request.params.eos_token_ids = Arc::new(vec![2]);
    request.params.min_tokens = 1;
    let mut sequence = Sequence::new(1, &request, 100);
    assert!(!sequence.may_speculate());
    assert_eq!(*sequence.sampling().suppressed, [9, 2], "only the output counts, not the prompt");
    let mut then = |token| {
        sequence.push(token).unwrap();
        sequence.sampling().suppressed.to_vec()
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
        sequence.push(token).unwrap();
    }
    let counts = sequence.sampling().counts;
    assert_eq!((&counts.prompt[..], &counts.output[..]), (&[3, 5][..], &[(8, 2), (9, 1)][..]));
}

/// What a whole prompt becomes: its tokens.
fn pooled(plan: &Plan) -> Output {
    let of = |row: &Row| plan.tokens[row.start..row.start + row.len].iter().map(|token| *token as f32).collect();
    Output { pooled: plan.rows.iter().filter(|row| row.pools).map(of).collect(), ..Output::default() }
}

fn pooling_request(prompt: Vec<u32>, second_text: Option<usize>) -> Request {
    Request { pooling: Some(crate::engine::PoolingRequest { second_text }), ..request(prompt, 0) }
}

proptest! {
    /// Prompts that must not be cut run whole, each once, within the budget, the oldest of them in the very next step; and nothing stays behind.
    #[test]
    fn whole_prompts_are_not_cut(
        lens in prop::collection::vec(1usize..17, 1..40), blocks in 5usize..40, seqs in 1usize..9, has_states in any::<bool>(),
    ) {
        let state_slots = if has_states { seqs + 2 } else { 0 };
        let shape = Shape { max_model_len: 16, whole_prompts: true, state_slots, ..shape(blocks, 4, seqs, 16) };
        let mut scheduler = Scheduler::new(shape, true, None);
        let prompt = |id: usize, len: usize| (0..len).map(|at| (id * 100 + at) as u32).collect::<Vec<_>>();
        for (id, len) in lens.iter().enumerate() {
            let second = id.is_multiple_of(3).then_some(len / 2);
            scheduler.add(Sequence::new(id as u64, &pooling_request(prompt(id, *len), second), 16));
        }
        let (mut plan, mut outcomes, mut done) = (Plan::default(), Vec::new(), Vec::new());
        while scheduler.plan(&mut plan) {
            prop_assert!(plan.tokens.len() <= 16 && plan.rows.len() <= seqs);
            prop_assert!(plan.types.is_empty() || plan.types.len() == plan.tokens.len());
            let oldest = (0..lens.len() as u64).find(|id| !done.contains(id)).unwrap();
            prop_assert_eq!(&plan.tokens[..lens[oldest as usize]], &prompt(oldest as usize, lens[oldest as usize])[..]);
            for row in &plan.rows {
                let id = plan.tokens[row.start] as usize / 100;
                prop_assert!(row.pools && row.sampling.is_none() && (row.len, row.context) == (lens[id], lens[id]));
                for at in 0..row.len {
                    let second = u32::from(id.is_multiple_of(3) && at >= lens[id] / 2);
                    prop_assert_eq!(plan.types.get(row.start + at).copied().unwrap_or(0), second);
                }
            }
            let output = pooled(&plan);
            plan.clear();
            scheduler.settle(output, &mut outcomes);
            prop_assert!(outcomes.is_empty());
            for (id, result) in scheduler.pooled() {
                prop_assert_eq!(result, prompt(id as usize, lens[id as usize]).into_iter().map(|token| token as f32).collect::<Vec<_>>());
                done.push(id);
            }
            scheduler.check_invariants();
        }
        done.sort_unstable();
        prop_assert_eq!(done, (0..lens.len() as u64).collect::<Vec<_>>());
        prop_assert_eq!((scheduler.pool().available(), scheduler.pool().states.available()), (blocks, state_slots));
    }
}

#[test]
fn what_is_not_finite_fails_alone() {
    let mut scheduler = Scheduler::new(Shape { whole_prompts: true, ..shape(8, 4, 4, 16) }, true, None);
    (0..2).for_each(|id| scheduler.add(Sequence::new(id, &pooling_request(vec![1; 3], None), 16)));
    let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
    assert!(scheduler.plan(&mut plan));
    let mut output = pooled(&plan);
    output.pooled[0][1] = f32::NAN;
    plan.clear();
    scheduler.settle(output, &mut outcomes);
    assert_eq!(scheduler.pooled().map(|(id, _)| id).collect::<Vec<_>>(), [1]);
    assert!(matches!(scheduler.broken().collect::<Vec<_>>()[..], [(0, Broken::NotFinite)]));
    assert_eq!((scheduler.running(), scheduler.waiting()), (0, 0));
}

/// Decoders whose last token is pooled run prompts in chunks, and share what begins alike.
#[test]
fn prompts_that_may_be_cut_are() {
    for state_slots in [0, 16] {
        let mut scheduler = Scheduler::new(Shape { state_slots, ..shape(16, 4, 4, 6) }, true, None);
        let prompt: Vec<u32> = (0..13).collect();
        let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
        for (round, lens) in [&[6, 6, 1][..], &[1]].into_iter().enumerate() {
            scheduler.add(Sequence::new(round as u64, &pooling_request(prompt.clone(), None), 64));
            for (step, len) in lens.iter().enumerate() {
                assert!(scheduler.plan(&mut plan));
                assert_eq!((plan.rows.len(), plan.rows[0].len, plan.rows[0].pools), (1, *len, step + 1 == lens.len()));
                let output = pooled(&plan);
                plan.clear();
                scheduler.settle(output, &mut outcomes);
            }
            assert_eq!(scheduler.pooled().map(|(id, result)| (id, result.len())).collect::<Vec<_>>(), [(round as u64, 1)]);
            assert!(!scheduler.plan(&mut plan));
        }
        scheduler.check_invariants();
        assert_eq!(scheduler.pool().states.available(), state_slots);
    }
}
