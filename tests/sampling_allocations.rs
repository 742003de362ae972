//! Drawing a token takes no memory from the heap once a thread has drawn its first ones.

// A test may stop where it stands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use worker_candle::models::sample::sample;
use worker_candle::models::{Draw, Seen};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// Counts what each thread allocates.
struct Counting;

// SAFETY: everything is handed on to the system's allocator.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_draw_allocates_nothing() {
    let row: Vec<f32> = (0..103_424u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1_000_000.0).collect();
    let base = Draw { seed: 1, ..Draw::default() };
    let seen = Seen { prompt: (0..500).collect(), output: (400..900).map(|id| (id, 2)).collect() };
    let draws = [
        Draw { temperature: 0.0, ..base.clone() },
        base.clone(),
        Draw { temperature: 0.8, top_p: 0.8, ..base.clone() },
        Draw { top_p: 0.999, temperature: 3.0, ..base.clone() },
        Draw { top_k: 50, ..base.clone() },
        Draw { top_k: 5000, top_p: 0.9, ..base.clone() },
        Draw { min_p: 0.05, ..base.clone() },
        Draw {
            presence_penalty: 0.5,
            repetition_penalty: 1.1,
            bias: Arc::new(vec![(3, 1.0)]),
            suppressed: Arc::new(vec![2]),
            seen: Arc::new(seen),
            ..base
        },
    ];
    let mut logits = row.clone();
    let mut drawn = 0u64;
    let mut draw_all = || {
        for (draw, nth) in draws.iter().flat_map(|draw| (0..3).map(move |nth| (draw, nth))) {
            logits.copy_from_slice(&row);
            drawn += u64::from(sample(&mut logits, draw, nth).0);
        }
    };
    draw_all();
    let before = ALLOCATIONS.get();
    draw_all();
    assert_eq!(ALLOCATIONS.get() - before, 0);
    assert!(before > 0 && drawn > 0, "allocations are counted, and tokens drawn");
}
