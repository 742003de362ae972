//! Causal attention over paged keys and values, exact softmax in two passes.
//!
//! One task is one token and one key/value head with all the query heads that share it. Every sum runs in the order of positions (and
//! of components inside a dot product), so a token's result depends on its own context alone: not on the chunk it came in, nor
//! on other rows.

use rayon::prelude::*;

use super::super::BatchRow;
use super::elementwise::exp;
use super::simd::{Simd, dispatch};
use super::{Ptr, PtrMut};

/// Multiply-adds below which one thread does all.
const SERIAL_WORK: usize = 128 * 1024;
/// Query heads and key rows that share registers.
const TILE: usize = 4;

#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub heads: usize,
    pub kv: usize,
    pub d: usize,
    pub block_size: usize,
}

/// One token of one row against one key/value head.
#[derive(Clone, Copy)]
struct Task<'a> {
    token: usize,
    kv_head: usize,
    context: usize,
    blocks: &'a [u32],
}

/// `q [t, heads·d]`, `k` and `v [blocks, block_size, kv, d]` → `[t, heads·d]`.
pub fn paged(q: &[f32], k: &[f32], v: &[f32], rows: &[BatchRow], shape: Shape) -> Vec<f32> {
    let mut tasks = Vec::with_capacity(q.len() / (shape.heads * shape.d) * shape.kv);
    let mut work = 0;
    for row in rows {
        assert!(row.blocks.len() * shape.block_size >= row.context, "block table shorter than the context");
        for i in 0..row.len {
            let context = row.context - row.len + i + 1;
            work += context * shape.heads * shape.d;
            tasks.extend((0..shape.kv).map(|kv_head| Task { token: row.start + i, kv_head, context, blocks: &row.blocks }));
        }
    }
    let last_block = tasks.iter().flat_map(|task| task.blocks).max().map_or(0, |block| *block as usize + 1);
    assert!(k.len() >= last_block * shape.block_size * shape.kv * shape.d && v.len() == k.len(), "block outside the KV cache");
    let mut out = vec![0f32; q.len()];
    let (q, k, v, target) = (Ptr(q.as_ptr()), Ptr(k.as_ptr()), Ptr(v.as_ptr()), PtrMut(out.as_mut_ptr()));
    let run = |task: Task<'_>| {
        let mut scores: Vec<f32> = Vec::new();
        attend_best(task, shape, q, k, v, target, &mut scores);
    };
    if work <= SERIAL_WORK {
        tasks.into_iter().for_each(run);
    } else {
        tasks.into_par_iter().with_max_len(8).for_each(run);
    }
    out
}

fn attend_best(task: Task<'_>, shape: Shape, q: Ptr<f32>, k: Ptr<f32>, v: Ptr<f32>, out: PtrMut<f32>, scores: &mut Vec<f32>) {
    dispatch!(attend::<>(task: Task<'_>, shape: Shape, q: Ptr<f32>, k: Ptr<f32>, v: Ptr<f32>, out: PtrMut<f32>, scores: &mut Vec<f32>));
}

/// # Safety
/// Pointers are valid for their shapes, blocks lie in the cache, and no other thread writes this task's heads.
#[inline(always)]
unsafe fn attend<S: Simd>(task: Task<'_>, shape: Shape, q: Ptr<f32>, k: Ptr<f32>, v: Ptr<f32>, out: PtrMut<f32>, scores: &mut Vec<f32>) {
    let Shape { heads, kv, d, block_size } = shape;
    let group = heads / kv;
    let stride = kv * d;
    let scale = 1.0 / (d as f32).sqrt();
    unsafe {
        let offset = task.token * heads * d + task.kv_head * group * d;
        let (q, out) = (q.0.add(offset), out.0.add(offset));
        scores.clear();
        scores.resize(group * task.context, 0.0);
        for (block, from) in blocks(task, block_size) {
            let keys = k.0.add((block * block_size * kv + task.kv_head) * d);
            let count = block_size.min(task.context - from);
            block_scores::<S>(q, keys, scores.as_mut_ptr().add(from), group, count, d, stride, task.context);
        }
        for (head, scores) in scores.chunks_exact_mut(task.context).enumerate() {
            let sum = softmax_numerators::<S>(scores, scale);
            let inverse = 1.0 / sum;
            scores.iter_mut().for_each(|score| *score *= inverse);
            let _ = head;
        }
        weighted_values::<S>(task, shape, scores, v.0.add(task.kv_head * d), out, group);
    }
}

/// The block ids of a task with the position each starts at.
#[inline(always)]
fn blocks<'a>(task: Task<'a>, block_size: usize) -> impl Iterator<Item = (usize, usize)> + use<'a> {
    (0..task.context).step_by(block_size).zip(task.blocks).map(|(from, block)| (*block as usize, from))
}

/// `scores[head, i] = q[head] · key[i]` for one block.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn block_scores<S: Simd>(
    q: *const f32,
    keys: *const f32,
    scores: *mut f32,
    group: usize,
    count: usize,
    d: usize,
    stride: usize,
    context: usize,
) {
    unsafe {
        let mut head = 0;
        while head < group {
            let wide = group - head >= TILE;
            let mut i = 0;
            while i < count {
                let (q, keys, scores) = (q.add(head * d), keys.add(i * stride), scores.add(head * context + i));
                match (wide, count - i >= TILE) {
                    (true, true) => dots::<S, TILE, TILE>(q, keys, scores, d, stride, context),
                    (true, false) => dots::<S, TILE, 1>(q, keys, scores, d, stride, context),
                    (false, true) => dots::<S, 1, TILE>(q, keys, scores, d, stride, context),
                    (false, false) => dots::<S, 1, 1>(q, keys, scores, d, stride, context),
                }
                i += if count - i >= TILE { TILE } else { 1 };
            }
            head += if wide { TILE } else { 1 };
        }
    }
}

#[inline(always)]
unsafe fn dots<S: Simd, const Q: usize, const K: usize>(
    q: *const f32,
    keys: *const f32,
    scores: *mut f32,
    d: usize,
    stride: usize,
    context: usize,
) {
    unsafe {
        let mut acc = [[S::zero(); K]; Q];
        let whole = d - d % S::LANES;
        let mut i = 0;
        while i < whole {
            let mut key = [S::zero(); K];
            for c in 0..K {
                key[c] = S::load(keys.add(c * stride + i));
            }
            for r in 0..Q {
                let query = S::load(q.add(r * d + i));
                for c in 0..K {
                    acc[r][c] = S::mul_add(query, key[c], acc[r][c]);
                }
            }
            i += S::LANES;
        }
        for (r, acc) in acc.iter().enumerate() {
            for (c, acc) in acc.iter().enumerate() {
                let mut sum = S::sum(*acc);
                for i in whole..d {
                    sum += *q.add(r * d + i) * *keys.add(c * stride + i);
                }
                *scores.add(r * context + c) = sum;
            }
        }
    }
}

/// Replaces scores by `exp((score - max) · scale)` and returns their sum.
#[inline(always)]
unsafe fn softmax_numerators<S: Simd>(scores: &mut [f32], scale: f32) -> f32 {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, score| if *score > max { *score } else { max });
    scores.iter_mut().for_each(|score| *score = exp((*score - max) * scale));
    unsafe {
        let whole = scores.len() - scores.len() % S::LANES;
        let (one, mut acc) = (S::splat(1.0), S::zero());
        let mut i = 0;
        while i < whole {
            acc = S::mul_add(S::load(scores.as_ptr().add(i)), one, acc);
            i += S::LANES;
        }
        S::sum(acc) + scores[whole..].iter().sum::<f32>()
    }
}

/// `out[head] = Σ probability[head, i] · value[i]`, in order of positions.
#[inline(always)]
unsafe fn weighted_values<S: Simd>(task: Task<'_>, shape: Shape, scores: &[f32], values: *const f32, out: *mut f32, group: usize) {
    let d = shape.d;
    unsafe {
        let mut head = 0;
        while head < group {
            let wide = group - head >= TILE;
            let (p, out) = (scores.as_ptr().add(head * task.context), out.add(head * d));
            let mut column = 0;
            while column + S::LANES <= d {
                let many = column + 4 * S::LANES <= d;
                match (wide, many) {
                    (true, true) => accumulate::<S, TILE, 4>(task, shape, p, values.add(column), out.add(column)),
                    (true, false) => accumulate::<S, TILE, 1>(task, shape, p, values.add(column), out.add(column)),
                    (false, true) => accumulate::<S, 1, 4>(task, shape, p, values.add(column), out.add(column)),
                    (false, false) => accumulate::<S, 1, 1>(task, shape, p, values.add(column), out.add(column)),
                }
                column += if many { 4 * S::LANES } else { S::LANES };
            }
            for r in 0..if wide { TILE } else { 1 } {
                for column in column..d {
                    let mut sum = 0f32;
                    for (block, from) in blocks(task, shape.block_size) {
                        for i in 0..shape.block_size.min(task.context - from) {
                            sum +=
                                *p.add(r * task.context + from + i) * *values.add((block * shape.block_size + i) * shape.kv * d + column);
                        }
                    }
                    *out.add(r * d + column) = sum;
                }
            }
            head += if wide { TILE } else { 1 };
        }
    }
}

#[inline(always)]
unsafe fn accumulate<S: Simd, const Q: usize, const D: usize>(
    task: Task<'_>,
    shape: Shape,
    p: *const f32,
    values: *const f32,
    out: *mut f32,
) {
    unsafe {
        let mut acc = [[S::zero(); D]; Q];
        let stride = shape.kv * shape.d;
        for (block, from) in blocks(task, shape.block_size) {
            let values = values.add(block * shape.block_size * stride);
            for i in 0..shape.block_size.min(task.context - from) {
                let mut value = [S::zero(); D];
                for c in 0..D {
                    value[c] = S::load(values.add(i * stride + c * S::LANES));
                }
                for r in 0..Q {
                    let weight = S::splat(*p.add(r * task.context + from + i));
                    for c in 0..D {
                        acc[r][c] = S::mul_add(weight, value[c], acc[r][c]);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (c, acc) in acc.iter().enumerate() {
                S::store(out.add(r * shape.d + c * S::LANES), *acc);
            }
        }
    }
}
