//! Sequences under a constraint whose rules are a function of the tokens so far, on a model that is one too.

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::engine::ngram::NgramProposer;
use crate::engine::scheduler::{Broken, Scheduler};
use crate::engine::sequence::Sequence;
use crate::engine::{EngineOptions, Event, Finish, Request};
use crate::models::{Logprobs, LogprobsMode, LogprobsSpec, Output, Plan, Runner, Shape, StepError};

/// Forces some stretches of tokens, lets everything pass in others, allows two tokens elsewhere, and ends after `len`.
#[derive(Clone)]
struct Automaton {
    seed: u32,
    len: usize,
    output: Vec<u32>,
    /// Fails where the mask of this position is wanted.
    fails_at: Option<usize>,
}

impl Automaton {
    fn new(seed: u32, len: usize) -> Self {
        Self { seed, len, output: Vec::new(), fails_at: None }
    }

    fn forced(&self, at: usize) -> Option<u32> {
        let stretch = at as u32 / 3;
        stretch.wrapping_mul(7).wrapping_add(self.seed).is_multiple_of(3).then(|| (at as u32 + self.seed) % 4)
    }
}

impl Constraint for Automaton {
    fn next(&mut self) -> Result<Next, Failure> {
        let at = self.output.len();
        if at >= self.len {
            return Ok(Next::End);
        }
        let forced: Vec<u32> = (at..self.len).map_while(|at| self.forced(at)).collect();
        Ok(match forced.is_empty() {
            false => Next::Forced(forced),
            true if (at as u32 + self.seed).is_multiple_of(5) => Next::Anything,
            true => Next::Masked,
        })
    }

    fn mask(&mut self) -> Result<TokenMask, Failure> {
        if self.fails_at == Some(self.output.len()) {
            return Err(Failure::internal("told to fail"));
        }
        let first = self.output.last().copied().unwrap_or(self.seed) % 4;
        Ok(TokenMask::only(&[first, (first + 1) % 4]))
    }

    fn accept(&mut self, token: u32) -> Result<(), Failure> {
        let allowed = match self.next()? {
            Next::Anything => true,
            Next::Masked => self.mask()?.allows(token),
            Next::Forced(tokens) => tokens[0] == token,
            Next::End | Next::Full => false,
        };
        self.output.push(token);
        if allowed { Ok(()) } else { Err(Failure::internal(format!("{token} is not allowed"))) }
    }

    fn rollback(&mut self, count: usize) -> Result<(), Failure> {
        self.output.truncate(self.output.len() - count);
        Ok(())
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// What the model says after these tokens, among those that are allowed.
fn choose(context: &[u32], allowed: &Allowed) -> u32 {
    let last = &context[context.len().saturating_sub(2)..];
    let wish = last.iter().fold(17u32, |hash, token| hash.wrapping_mul(31).wrapping_add(*token)) % 4;
    match allowed {
        Allowed::Anything => wish,
        Allowed::Only(mask) => (wish..100).chain(0..wish).find(|id| mask.allows(*id)).unwrap(),
    }
}

/// The output by itself, one token after another.
fn expected(prompt: &[u32], mut constraint: Automaton, max_tokens: usize) -> (Vec<u32>, Finish) {
    let mut tokens = prompt.to_vec();
    loop {
        let allowed = match constraint.next().unwrap() {
            Next::End => return (constraint.output, Finish::Stop),
            Next::Full => return (constraint.output, Finish::Length),
            _ if constraint.output.len() >= max_tokens => return (constraint.output, Finish::Length),
            Next::Anything => Allowed::Anything,
            Next::Masked => Allowed::Only(constraint.mask().unwrap()),
            Next::Forced(tokens) => Allowed::Only(TokenMask::only(&tokens[..1])),
        };
        let token = choose(&tokens, &allowed);
        constraint.accept(token).unwrap();
        tokens.push(token);
    }
}

fn shape(blocks: usize, block_size: usize, seqs: usize, batched: usize) -> Shape {
    let max_model_len = blocks * block_size;
    Shape {
        max_model_len,
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

fn request(prompt: &[u32], max_tokens: usize, constraint: Automaton) -> Request {
    let params = SamplingParams { temperature: 0.0, max_tokens, ..Default::default() };
    let constraint: Box<dyn Constraint> = Box::new(constraint);
    Request {
        id: "t".into(),
        prompt: Arc::new(prompt.to_vec()),
        params,
        prompt_logprobs: None,
        deadline: None,
        pooling: None,
        constraint: Some(constraint),
    }
}

/// A model that reads its contexts back through the block tables, and waits for masks as the real one does.
struct Obedient {
    shape: Shape,
    cache: Vec<u32>,
}

impl Obedient {
    fn new(shape: &Shape) -> Self {
        Self { shape: shape.clone(), cache: vec![0; shape.blocks * shape.block_size] }
    }
}

impl Runner for Obedient {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn step(&mut self, plan: &Plan) -> Result<Output, StepError> {
        for (token, slot) in plan.tokens.iter().zip(&plan.slots) {
            self.cache[*slot as usize] = *token;
        }
        let (size, mut output) = (self.shape.block_size, Output::default());
        for row in &plan.rows {
            let Some(sampling) = &row.sampling else { continue };
            let context: Vec<u32> = (0..row.context).map(|p| self.cache[row.blocks[p / size] as usize * size + p % size]).collect();
            for nth in 0..=row.draft_len {
                let allowed = sampling.masks.as_ref().map_or(Some(&Allowed::Anything), |masks| masks.wait(nth));
                match allowed {
                    Some(allowed) => output.tokens.push(choose(&context[..row.context - row.draft_len + nth], allowed)),
                    None => {
                        output.failed.push(output.tokens.len());
                        output.tokens.push(0);
                    }
                }
                output.logprobs.push(sampling.params.logprobs.map(|_| Logprobs::default()));
            }
        }
        Ok(output)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Forced tokens, masks, drafts, preemption and chunks in any mixture give what plain decoding under the constraint gives, and leak nothing.
    #[test]
    fn any_schedule_gives_what_the_constraint_allows(
        blocks in 3usize..14, block_size in 1usize..6, seqs in 1usize..5, batched in 1usize..12, draft_len in 0usize..5,
        arrivals in prop::collection::vec((prop::collection::vec(0u32..4, 1..8), 1usize..24, 0u32..40, 0usize..20, any::<bool>()), 1..6),
    ) {
        let shape = shape(blocks, block_size, seqs, batched.max(seqs));
        let proposer = (draft_len > 0).then(|| NgramProposer { draft_len, min: 1, ..Default::default() });
        let mut scheduler = Scheduler::new(shape.clone(), true, proposer);
        let mut model = Obedient::new(&shape);
        let mut wanted = HashMap::new();
        for (id, (prompt, max_tokens, seed, len, logprobs)) in (0u64..).zip(&arrivals) {
            if prompt.len() >= shape.max_model_len {
                continue;
            }
            let constraint = Automaton::new(*seed, len + 1);
            let most = (*max_tokens).min(shape.max_model_len - prompt.len());
            wanted.insert(id, expected(prompt, constraint.clone(), most));
            let mut request = request(prompt, *max_tokens, constraint);
            request.params.logprobs = logprobs.then_some(LogprobsSpec { top: 0, mode: LogprobsMode::RawLogprobs });
            scheduler.add(Sequence::new(id, &request, shape.max_model_len));
        }
        let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
        let mut got: HashMap<u64, (Vec<u32>, Option<Finish>)> = HashMap::new();
        while scheduler.plan(&mut plan) {
            prop_assert!(plan.tokens.len() <= shape.max_num_batched_tokens);
            scheduler.mask_jobs().for_each(MaskJob::run);
            let output = model.step(&plan).unwrap();
            plan.clear();
            scheduler.settle(output, &mut outcomes);
            scheduler.check_invariants();
            prop_assert_eq!(scheduler.broken().map(|(id, cause)| format!("{id}: {cause:?}")).collect::<Vec<_>>(), Vec::<String>::new());
            for outcome in outcomes.drain(..) {
                prop_assert_eq!(outcome.token.logprobs.is_some(), arrivals[outcome.id as usize].4);
                let (tokens, finish) = got.entry(outcome.id).or_default();
                prop_assert!(finish.is_none() && !outcome.token.ends);
                tokens.push(outcome.token.id);
                *finish = outcome.finish;
            }
        }
        prop_assert_eq!((scheduler.running(), scheduler.waiting(), scheduler.pool().available()), (0, 0, blocks));
        for (id, (tokens, finish)) in wanted {
            prop_assert_eq!(got.remove(&id), Some((tokens, Some(finish))));
        }
    }
}

#[test]
fn forced_tokens_take_one_step_together() {
    // Position 0 to 2 forced, then three sampled, then three forced …
    let constraint = Automaton::new(0, 12);
    assert_eq!((0..12).filter(|at| constraint.forced(*at).is_some()).collect::<Vec<_>>(), [0, 1, 2, 9, 10, 11]);
    let shape = shape(100, 4, 4, 64);
    let mut scheduler = Scheduler::new(shape.clone(), true, None);
    scheduler.add(Sequence::new(1, &request(&[3, 2], 50, constraint), 100));
    let mut model = Obedient::new(&shape);
    let (mut plan, mut outcomes, mut steps) = (Plan::default(), Vec::new(), Vec::new());
    while scheduler.plan(&mut plan) {
        let ran = plan.tokens.len();
        scheduler.mask_jobs().for_each(MaskJob::run);
        let output = model.step(&plan).unwrap();
        plan.clear();
        scheduler.settle(output, &mut outcomes);
        steps.push((ran, outcomes.len()));
    }
    // The prompt gives three tokens, which run together; the last sampled one brings three more, and the end with them.
    assert_eq!(steps, [(2, 3), (3, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 4)]);
    assert_eq!(outcomes.last().unwrap().finish, Some(Finish::Stop));
}

#[test]
fn without_end_of_sequence_where_anything_else_may_follow() {
    let params = |ignore_eos| Arc::new(SamplingParams { eos_token_ids: Arc::new(vec![2]), ignore_eos, ..Default::default() });
    let job = |ignore_eos| Constrained::new(Box::new(Automaton::new(1, 9)), params(ignore_eos)).job(&[]).unwrap();
    let both = TokenMask::only(&[2, 5]);
    assert_eq!(job(false).without_end(both.clone()), both);
    assert!(!job(true).without_end(both.clone()).allows(2) && job(true).without_end(both).allows(5));
    assert!(job(true).without_end(TokenMask::only(&[2])).allows(2), "the only way");
}

#[test]
fn a_dropped_job_keeps_nobody_waiting() {
    let job = Constrained::new(Box::new(Automaton::new(1, 9)), Arc::default()).job(&[]).unwrap();
    let masks = job.masks();
    drop(job);
    assert_eq!(masks.wait(0), None);
}

async fn outcome(engine: &crate::engine::Handle, request: Request) -> (Vec<u32>, Result<Finish, Failure>) {
    let mut generation = engine.submit(request).unwrap();
    let mut tokens = Vec::new();
    loop {
        match generation.next().await {
            Event::Token(token) => tokens.push(token.id),
            Event::Finished(finish) => return (tokens, Ok(finish)),
            Event::Failed(failure) => return (tokens, Err(failure)),
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_constraint_that_fails_ends_its_own_request_alone() {
    let shape = shape(32, 4, 4, 32);
    let proposer = Some(NgramProposer { min: 1, ..Default::default() });
    let engine = crate::engine::start(move || Ok(Obedient::new(&shape)), EngineOptions { proposer, ..Default::default() }).await.unwrap();
    let good = || request(&[1, 2], 20, Automaton::new(1, 15));
    let want = expected(&[1, 2], Automaton::new(1, 15), 20);
    let failing = Automaton { fails_at: Some(10), ..Automaton::new(1, 15) };
    let (failed, other) = tokio::join!(outcome(&engine, request(&[1, 2], 20, failing)), outcome(&engine, good()));
    assert_eq!(failed.1.unwrap_err().message, "told to fail");
    assert!(want.0.starts_with(&failed.0), "what came before stands");
    assert_eq!(other, (want.0.clone(), Ok(want.1)));
    let mut panicking = good();
    panicking.constraint = Some(Box::new(Panics));
    let failure = outcome(&engine, panicking).await.1.unwrap_err();
    assert!(failure.message.contains("constraint"), "{failure}");
    assert_eq!(outcome(&engine, good()).await, (want.0, Ok(want.1)), "the engine lives");
    assert!(engine.idle(std::time::Duration::from_secs(5)).await);
    assert_eq!(engine.stats().blocks_free, 32);
}

struct Panics;

impl Constraint for Panics {
    fn next(&mut self) -> Result<Next, Failure> {
        Ok(Next::Masked)
    }

    fn mask(&mut self) -> Result<TokenMask, Failure> {
        panic!("told to")
    }

    fn accept(&mut self, _: u32) -> Result<(), Failure> {
        Ok(())
    }

    fn rollback(&mut self, _: usize) -> Result<(), Failure> {
        Ok(())
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Self)
    }
}

#[test]
fn why_a_sequence_got_no_token_is_known() {
    let shape = shape(32, 4, 4, 32);
    let mut scheduler = Scheduler::new(shape.clone(), true, None);
    scheduler.add(Sequence::new(7, &request(&[1], 20, Automaton { fails_at: Some(0), ..Automaton::new(1, 15) }), 100));
    let mut plan = Plan::default();
    assert!(scheduler.plan(&mut plan));
    scheduler.mask_jobs().for_each(MaskJob::run);
    let output = Obedient::new(&shape).step(&plan).unwrap();
    plan.clear();
    scheduler.settle(output, &mut Vec::new());
    let broken: Vec<_> = scheduler.broken().collect();
    assert!(matches!(&broken[..], [(7, Broken::Constraint(failure))] if failure.message == "told to fail"), "{broken:?}");
}
