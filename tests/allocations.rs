//! A decode step allocates nothing once it is warm: no kernel, no sampling, on any thread.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use worker_candle::config::{DeviceChoice, EngineSettings, Quantization};
use worker_candle::models::runner::ModelRunner;
use worker_candle::models::{Draw, Plan, Row, Runner, demo};

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

/// Buffers that two threads make when they first draw a token.
const FIRST_DRAWS: usize = 2 * 4;
const BLOCK: usize = 16;
const SEQUENCES: usize = 3;
/// Blocks of each sequence.
const BLOCKS: usize = 16;

/// Each sequence's next `len` tokens from position `from` on.
fn plan(from: usize, len: usize, draw: &Draw) -> Plan {
    let mut plan = Plan::default();
    for sequence in 0..SEQUENCES {
        let blocks: Vec<u32> = (0..BLOCKS).map(|block| (sequence * BLOCKS + block) as u32).collect();
        let positions = from..from + len;
        plan.rows.push(Row {
            start: plan.tokens.len(),
            len,
            context: from + len,
            draw: Some(Draw { seed: sequence as u64, index: from as u64, ..draw.clone() }),
            blocks: Arc::new(blocks),
            proposed: 0,
            score: None,
        });
        plan.tokens.extend(positions.clone().map(|position| (position * 7 % 300 + sequence) as u32));
        plan.slots.extend(positions.clone().map(|position| (sequence * BLOCKS * BLOCK + position) as u32));
        plan.positions.extend(positions.map(|position| position as u32));
    }
    plan
}

#[test]
fn a_warm_step_allocates_nothing() {
    let draws = [
        ("greedy", Draw { temperature: 0.0, ..Draw::default() }),
        ("temperature", Draw { temperature: 0.8, ..Draw::default() }),
        ("top_p", Draw { temperature: 0.8, top_p: 0.8, ..Draw::default() }),
        ("a wide top_p", Draw { temperature: 2.0, top_p: 0.999, ..Draw::default() }),
        ("top_p, top_k, min_p", Draw { temperature: 0.9, top_p: 0.9, top_k: 40, min_p: 0.01, ..Draw::default() }),
    ];
    for quantization in [Quantization::AsStored, Quantization::Wint8] {
        let settings = EngineSettings {
            device: DeviceChoice::Cpu,
            threads: Some(2),
            block_size: Some(BLOCK),
            num_blocks: Some(SEQUENCES * BLOCKS),
            max_model_len: Some(BLOCK * BLOCKS),
            quantization,
            ..Default::default()
        };
        let mut runner = ModelRunner::load(&demo::files(), || Ok(usize::MAX), &settings).unwrap();
        for (name, draw) in &draws {
            // Warm: a prompt, and as many tokens as make every buffer as long as it will be.
            for plan in std::iter::once(plan(0, 40, draw)).chain((40..80).map(|at| plan(at, 1, draw))) {
                let output = runner.step(&plan).unwrap();
                runner.recycle(output);
            }
            let plans: Vec<Plan> = (80..200).map(|at| plan(at, 1, draw)).collect();
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for plan in &plans {
                let output = runner.step(plan).unwrap();
                assert_eq!(output.tokens.len(), SEQUENCES);
                runner.recycle(output);
            }
            let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
            // A computing thread that draws for the first time makes its own few buffers, whenever that is.
            assert!(made <= FIRST_DRAWS, "{made} allocations in {} steps: {quantization:?}, {name}", plans.len());
        }
    }
}
