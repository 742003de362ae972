//! What a token costs in allocations once everything is warm: in a step of the model nothing, on no thread; in the engine around it little.
//!
//! All threads of a process are counted, so each measurement runs in a process of its own: this program once more, for that one test.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::alone;
use worker_candle::checkpoint::demo;
use worker_candle::config::{DeviceChoice, EngineSettings, Quantization};
use worker_candle::engine::{self, Event, Generation, NgramProposer, Request, SamplingParams};
use worker_candle::models::runner::ModelRunner;
use worker_candle::models::{LogprobsMode, LogprobsSpec, Plan, Row, Runner, SamplingMetadata, TokenCounts};

/// Counts what all threads allocate.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Buffers that two threads make when they first sample a token.
const FIRST_SAMPLES: usize = 2 * 4;
const BLOCK: usize = 16;
const SEQUENCES: usize = 3;
/// Blocks of each sequence.
const BLOCKS: usize = 16;

/// Draft tokens in each row that has some.
const DRAFTS: usize = 3;

/// Each sequence's next `len` tokens from position `from` on, the last `draft_len` of them draft tokens.
fn plan(from: usize, len: usize, draft_len: usize, sampling: &SamplingMetadata) -> Plan {
    let mut plan = Plan::default();
    for sequence in 0..SEQUENCES {
        let params = Arc::new(SamplingParams { seed: sequence as u64, ..(*sampling.params).clone() });
        let blocks: Vec<u32> = (0..BLOCKS).map(|block| (sequence * BLOCKS + block) as u32).collect();
        let positions = from..from + len;
        plan.rows.push(Row {
            start: plan.tokens.len(),
            len,
            context: from + len,
            sampling: Some(SamplingMetadata { params: params.clone(), index: from as u64, ..sampling.clone() }),
            blocks: Arc::new(blocks),
            draft_len,
            pools: false,
            score: None,
        });
        plan.tokens.extend(positions.clone().map(|position| (position * 7 % 300 + sequence) as u32));
        plan.slots.extend(positions.clone().map(|position| (sequence * BLOCKS * BLOCK + position) as u32));
        plan.positions.extend(positions.map(|position| position as u32));
    }
    plan
}

fn settings(quantization: Quantization) -> EngineSettings {
    EngineSettings {
        device: DeviceChoice::Cpu,
        threads: Some(2),
        block_size: BLOCK,
        num_blocks: Some(SEQUENCES * BLOCKS),
        max_model_len: Some(BLOCK * BLOCKS),
        quantization,
        ..Default::default()
    }
}

#[test]
fn a_warm_step_allocates_nothing_but_what_it_reports() {
    alone("allocations::measured_steps");
}

#[test]
fn the_engine_allocates_less_than_once_in_ten_tokens() {
    alone("allocations::measured_engine");
}

#[test]
#[ignore = "run by a_warm_step_allocates_nothing_but_what_it_reports"]
fn measured_steps() {
    let penalties = SamplingParams {
        temperature: 0.8,
        presence_penalty: 0.5,
        frequency_penalty: 0.1,
        repetition_penalty: 1.1,
        logit_bias: Arc::new(vec![(5, 1.0)]),
        ..Default::default()
    };
    // With suppressed ids and counts.
    let full = |params: SamplingParams| SamplingMetadata {
        suppressed: Arc::new(vec![2]),
        counts: Arc::new(TokenCounts { prompt: (0..100).collect(), output: (50..150).map(|id| (id, 2)).collect() }),
        ..params.into()
    };
    let plain = |temperature, top_p| SamplingParams { temperature, top_p, ..Default::default() };
    let told = |mode, top| Some(LogprobsSpec { top, mode });
    // The last number: what one reported token may allocate, the list of its alternatives.
    let ways = [
        ("greedy", plain(0.0, 1.0).into(), 0),
        ("temperature", plain(0.8, 1.0).into(), 0),
        ("top_p", plain(0.8, 0.8).into(), 0),
        ("a wide top_p", plain(2.0, 0.999).into(), 0),
        ("top_p, top_k, min_p", SamplingParams { top_k: 40, min_p: 0.01, ..plain(0.9, 0.9) }.into(), 0),
        ("penalties", full(penalties.clone()), 0),
        ("logprobs of the token alone", full(SamplingParams { logprobs: told(LogprobsMode::RawLogprobs, 0), ..penalties.clone() }), 0),
        ("logprobs", full(SamplingParams { logprobs: told(LogprobsMode::ProcessedLogprobs, 20), ..penalties }), 1),
    ];
    for quantization in [Quantization::AsStored, Quantization::Wint8, Quantization::Wint4] {
        let mut runner = ModelRunner::load(&demo::files(), || Ok(usize::MAX), &settings(quantization)).unwrap();
        for ((name, sampling, reported), draft_len) in ways.iter().flat_map(|way| [(way, 0), (way, DRAFTS)]) {
            let step = |at| plan(at, 1 + draft_len, draft_len, sampling);
            // Warm: a prompt, and as many tokens as make every buffer as long as it will be.
            for plan in std::iter::once(plan(0, 40, 0, sampling)).chain((40..80).map(step)) {
                let output = runner.step(&plan).unwrap();
                runner.recycle(output);
            }
            let plans: Vec<Plan> = (80..200).map(step).collect();
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            let mut sampled = 0;
            for plan in &plans {
                let output = runner.step(plan).unwrap();
                sampled += output.tokens.len();
                assert!(
                    plan.rows.iter().all(|row| Arc::strong_count(&row.blocks) == 1),
                    "a block table is still held: to grow it would be copied"
                );
                runner.recycle(output);
            }
            let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
            assert_eq!(sampled, plans.len() * SEQUENCES * (1 + draft_len));
            // A computing thread that samples for the first time makes its own few buffers, whenever that is.
            let most = FIRST_SAMPLES + reported * sampled;
            assert!(made <= most, "{made} allocations in {} steps: {quantization:?}, {name}, {draft_len} drafts", plans.len());
        }
    }
}

/// Its tokens up to the `until`th.
async fn follow(generation: &mut Generation, seen: &mut usize, until: usize) {
    while *seen < until {
        match generation.next().await {
            Event::Token(_) => *seen += 1,
            Event::Started { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Planning, sampling, settling, and the channels to whoever reads along: blocks of the channels, block tables that grow, entries of the prefix
/// cache.
#[test]
#[ignore = "run by the_engine_allocates_less_than_once_in_ten_tokens"]
fn measured_engine() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let load = || ModelRunner::load(&demo::files(), || Ok(usize::MAX), &settings(Quantization::AsStored));
        let proposer = Some(NgramProposer::default());
        let engine = engine::start(load, engine::EngineOptions { proposer, log_stats: false, ..Default::default() }).await.unwrap();
        for (name, temperature, penalty) in [("greedy", 0.0, 0.0), ("sampled", 0.8, 0.0), ("with penalties", 0.8, 0.5)] {
            // The first round warms everything, at every length.
            let mut made = [0, 0];
            for (round, made) in made.iter_mut().enumerate() {
                let submit = |id: usize| {
                    let params = SamplingParams {
                        temperature,
                        presence_penalty: penalty,
                        max_tokens: 220,
                        ignore_eos: true,
                        seed: id as u64,
                        ..Default::default()
                    };
                    let prompt = (0..20).map(|at| (300 + at * 7 + id * 31 + round * 100) as u32).collect::<Vec<_>>();
                    engine
                        .submit(Request {
                            id: "t".into(),
                            prompt: Arc::new(prompt),
                            params,
                            prompt_logprobs: None,
                            deadline: None,
                            pooling: None,
                            constraint: None,
                        })
                        .unwrap()
                };
                let mut all: Vec<(Generation, usize)> = (0..SEQUENCES).map(|id| (submit(id), 0)).collect();
                let mut before = 0;
                for until in [60, 200] {
                    for (generation, seen) in &mut all {
                        follow(generation, seen, until).await;
                    }
                    *made = ALLOCATIONS.load(Ordering::Relaxed) - before;
                    before = ALLOCATIONS.load(Ordering::Relaxed);
                }
                drop(all);
                assert!(engine.idle(std::time::Duration::from_secs(10)).await);
            }
            // The threads are not in step with this one: a few tokens more or less.
            let tokens = SEQUENCES * 140;
            eprintln!("{name}: {} allocations for {tokens} tokens", made[1]);
            assert!(made[1] * 10 < tokens, "{} allocations for {tokens} tokens: {name}", made[1]);
        }
    });
}
