//! Attention over paged keys and values.
//!
//! A task is some tokens of one sequence with the query heads that share one key/value head. It walks the context in segments that begin at
//! fixed positions, keeping the greatest score, the sum of exponentials and of weighted values as it goes, and every sum runs in one lane
//! in order of positions. So a token's result depends on its own context alone: not on the chunk it came in, nor on other rows.
//!
//! Keys lie transposed in their block, so that a vector holds one component of neighbouring positions and no sum crosses lanes.

use super::elementwise::{exp, tanh};
use super::matmul::tile_rows;
use super::packed::pages;
use super::pool::Pool;
use super::prefault;
use super::simd::{Simd, dispatch};
use super::{Ptr, PtrMut};
use crate::{AttentionSpec, BatchRow, KvShape};

/// Positions of a segment, as far as blocks fill it evenly.
const SEGMENT: usize = 256;
/// Query heads times tokens of a task, about: they share every key that is read.
const TASK_ROWS: usize = 32;
/// Positions of a block are padded to whole vectors of the widest kind.
const PAD: usize = 16;

/// Keys and values of one layer, in f32: keys `[blocks, kv, d, block_size padded to 16]`, values `[blocks, kv, block_size, d]`.
pub struct KvCache {
    k: memmap2::MmapMut,
    v: memmap2::MmapMut,
    pub shape: KvShape,
}

/// Numbers from one component of a block's keys to the next.
fn padded(shape: KvShape) -> usize {
    shape.block_size.next_multiple_of(PAD)
}

/// Bytes of a block of one layer.
pub fn block_bytes(shape: KvShape) -> usize {
    4 * shape.kv_heads * shape.head_dim * (padded(shape) + shape.block_size)
}

impl KvCache {
    /// Zeroed; pages are taken when they are first written, or by [`super::prefault::touch`].
    pub fn new(shape: KvShape) -> std::io::Result<Self> {
        let width = 4 * shape.blocks * shape.kv_heads * shape.head_dim;
        Ok(Self { k: pages(width * padded(shape))?, v: pages(width * shape.block_size)?, shape })
    }

    /// The memory of keys and of values.
    pub fn memory(&mut self) -> [&mut [u8]; 2] {
        [&mut self.k, &mut self.v]
    }

    /// A key, and a value, of one slot and head, for tests.
    pub fn read(&self, slot: usize, head: usize) -> (Vec<f32>, Vec<f32>) {
        let KvShape { kv_heads: kv, head_dim: d, block_size, .. } = self.shape;
        let (block, offset) = (slot / block_size, slot % block_size);
        let number = |map: &[u8], at: usize| f32::from_le_bytes([map[4 * at], map[4 * at + 1], map[4 * at + 2], map[4 * at + 3]]);
        let key = (0..d).map(|i| number(&self.k, ((block * kv + head) * d + i) * padded(self.shape) + offset)).collect();
        let value = (0..d).map(|i| number(&self.v, ((block * kv + head) * block_size + offset) * d + i)).collect();
        (key, value)
    }
}

/// Some tokens of one row.
#[derive(Debug, Clone, Copy)]
struct Tile {
    row: usize,
    /// Counted from the row's first token in the step.
    first: usize,
    tokens: usize,
}

/// What attention needs beside its operands, made once.
#[derive(Debug, Default)]
pub struct Scratch {
    tiles: Vec<Tile>,
    /// Tokens of a tile that the tiles were cut for; 0: for no kind of attention yet.
    tile_tokens: usize,
    numbers: Vec<f32>,
}

/// Where a thread keeps its intermediate numbers.
#[derive(Clone, Copy)]
struct Layout {
    /// Query rows at most.
    rows: usize,
    segment: usize,
    d: usize,
}

impl Layout {
    fn new(spec: &AttentionSpec, block_size: usize) -> Self {
        let group = spec.heads / spec.kv_heads;
        let segment = block_size * (SEGMENT / block_size).max(1);
        Self { rows: (TASK_ROWS / group).max(1) * group, segment, d: spec.head_dim }
    }

    fn stride(self) -> usize {
        self.segment.next_multiple_of(PAD) + PAD
    }

    fn numbers(self) -> usize {
        (self.rows * (2 * self.d + self.stride() + 2)).next_multiple_of(PAD) + PAD
    }

    /// Numbers a thread needs for the largest of these kinds.
    fn most_numbers(specs: &[AttentionSpec], block_size: usize) -> usize {
        specs.iter().map(|spec| Self::new(spec, block_size).numbers()).max().unwrap_or(0)
    }
}

impl Scratch {
    /// For steps of every kind of attention in `specs`.
    pub fn new(max_tokens: usize, threads: usize, specs: &[AttentionSpec], block_size: usize) -> Self {
        let numbers = vec![0.0; threads * Layout::most_numbers(specs, block_size)];
        Self { tiles: Vec::with_capacity(max_tokens), tile_tokens: 0, numbers }
    }

    /// Bytes of one that is made for this; `None`: more than can be counted.
    pub fn bytes(max_tokens: usize, threads: usize, specs: &[AttentionSpec], block_size: usize) -> Option<usize> {
        let tiles = max_tokens.checked_mul(size_of::<Tile>())?;
        threads.checked_mul(4 * Layout::most_numbers(specs, block_size))?.checked_add(tiles)
    }

    pub fn memory(&mut self) -> &mut [u8] {
        prefault::bytes_of(&mut self.numbers)
    }

    /// Another step: its rows are not cut yet.
    pub fn begin(&mut self) {
        self.tile_tokens = 0;
    }

    /// Cuts the rows of a step; layers of one kind look at the same tiles.
    fn cut(&mut self, rows: &[BatchRow], spec: &AttentionSpec) {
        let most = (TASK_ROWS / (spec.heads / spec.kv_heads)).max(1);
        if self.tile_tokens == most {
            return;
        }
        self.tile_tokens = most;
        self.tiles.clear();
        for (row, r) in rows.iter().enumerate() {
            for first in (0..r.len).step_by(most) {
                self.tiles.push(Tile { row, first, tokens: most.min(r.len - first) });
            }
        }
    }
}

#[derive(Clone, Copy)]
struct AttentionJob<'a> {
    q: Ptr<f32>,
    /// Numbers from one token's queries to the next's.
    q_stride: usize,
    k: Ptr<f32>,
    v: Ptr<f32>,
    out: PtrMut<f32>,
    spec: &'a AttentionSpec,
    /// `[heads]`
    sinks: Option<&'a [f32]>,
    shape: KvShape,
    layout: Layout,
    rows: &'a [BatchRow],
}

/// `q`: rows of `q_stride` numbers that begin with `heads · d` queries → `out [t, heads·d]`; `sinks [heads]`.
#[allow(clippy::too_many_arguments)]
pub fn paged(
    pool: &mut Pool,
    q: &[f32],
    q_stride: usize,
    spec: &AttentionSpec,
    sinks: Option<&[f32]>,
    cache: &KvCache,
    rows: &[BatchRow],
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let (shape, width) = (cache.shape, spec.q_width());
    let layout = Layout::new(spec, shape.block_size);
    assert!(
        (shape.kv_heads, shape.head_dim) == (spec.kv_heads, spec.head_dim) && sinks.is_none_or(|sinks| sinks.len() == spec.heads),
        "attention of {spec:?} over {shape:?}"
    );
    for row in rows {
        assert!(row.blocks.len() * shape.block_size >= row.context && row.context >= row.len, "block table shorter than the context");
        assert!(row.blocks.iter().all(|block| (*block as usize) < shape.blocks), "block outside the KV cache");
        assert!((row.start + row.len) * q_stride <= q.len() && (row.start + row.len) * width <= out.len(), "rows outside the step");
    }
    assert!(scratch.numbers.len() >= pool.threads() * layout.numbers() && width <= q_stride, "attention scratch");
    scratch.cut(rows, spec);
    let numbers = PtrMut(scratch.numbers.as_mut_ptr());
    let tiles = &scratch.tiles;
    let job = AttentionJob {
        q: Ptr(q.as_ptr()),
        q_stride,
        k: Ptr(cache.k.as_ptr().cast()),
        v: Ptr(cache.v.as_ptr().cast()),
        out: PtrMut(out.as_mut_ptr()),
        spec,
        sinks,
        shape,
        layout,
        rows,
    };
    let tasks = tiles.len() * shape.kv_heads;
    pool.run(tasks, &|task, thread| {
        // The last tokens of a prompt see most: they go first, so that threads end together.
        let task = tasks - 1 - task;
        let (tile, head) = (tiles[task / shape.kv_heads], task % shape.kv_heads);
        let numbers = PtrMut(numbers.ptr().wrapping_add(thread * layout.numbers()));
        dispatch!(attend::<>(job: AttentionJob<'_>, tile: Tile, head: usize, numbers: PtrMut<f32>));
    });
}

/// # Safety
/// The job's pointers are valid for its shapes, blocks lie in the cache, nobody else writes this tile's heads or these numbers.
#[inline(always)]
unsafe fn attend<S: Simd>(job: AttentionJob<'_>, tile: Tile, head: usize, numbers: PtrMut<f32>) {
    let KvShape { kv_heads: kv, head_dim: d, block_size, .. } = job.shape;
    let padded = padded(job.shape);
    let group = job.spec.heads / kv;
    let row = &job.rows[tile.row];
    let count = tile.tokens * group;
    let before = row.context - row.len + tile.first;
    // The positions that query row `r` sees.
    let seen = |r: usize| job.spec.visible(before + r / group, row.context);
    let stride = job.layout.stride();
    // SAFETY: `paged` has checked that every block lies in the cache and every row in q and out. `numbers` holds what `Layout::numbers` counts:
    // queries, sums, scores, maxima and totals, one after another, for at most `layout.rows` rows, and `count` is no more than that.
    unsafe {
        let (q, rows) = (numbers.0, job.layout.rows);
        let (acc, scores) = (q.add(rows * d), q.add(2 * rows * d));
        let max = scores.add(rows * stride);
        let sum = max.add(rows);
        let offset = |r: usize| (row.start + tile.first + r / group, (head * group + r % group) * d);
        gather_queries::<S>(&job, count, &offset, q);
        for r in 0..count {
            // A sink is a key seen before all others, whose value is zero.
            let sink = job.sinks.map(|sinks| sinks[head * group + r % group]);
            (*max.add(r), *sum.add(r)) = sink.map_or((f32::NEG_INFINITY, 0.0), |sink| (sink, 1.0));
        }
        std::slice::from_raw_parts_mut(acc, count * d).fill(0.0);
        let longest = seen(count - 1).end;
        // NOTE: segments begin at multiples of their length whatever the window, so that sums are cut at the same places in every step.
        let mut start = seen(0).start / job.layout.segment * job.layout.segment;
        while start < longest {
            let len = job.layout.segment.min(longest - start);
            let blocks = &row.blocks[start / block_size..(start + len).div_ceil(block_size)];
            let keys = |block: u32| job.k.0.add((block as usize * kv + head) * d * padded);
            for (i, block) in blocks.iter().enumerate() {
                // The next block may lie anywhere, so it is prefetched while this one is computed; after the last block, the first values.
                let next =
                    blocks.get(i + 1).map_or_else(|| job.v.0.add((blocks[0] as usize * kv + head) * block_size * d), |next| keys(*next));
                let count_here = block_size.min(len - i * block_size);
                block_scores::<S>(q, keys(*block), next, scores.add(i * block_size), count, count_here, d, padded, stride);
            }
            for r in 0..count {
                let visible = seen(r).end.saturating_sub(start).min(len);
                let hidden = seen(r).start.saturating_sub(start).min(visible);
                let scores = std::slice::from_raw_parts_mut(scores.add(r * stride), len);
                scores[..hidden].fill(0.0);
                scores[visible..].fill(0.0);
                let scores = &mut scores[hidden..visible];
                let acc = std::slice::from_raw_parts_mut(acc.add(r * d), d);
                exponentiate::<S>(scores, job.spec.soft_cap, &mut *max.add(r), &mut *sum.add(r), acc);
            }
            Segment { job: &job, row, head, start, len }.weighted_values::<S>(scores, count, acc);
            start += len;
        }
        for r in 0..count {
            let (token, column) = offset(r);
            let out = std::slice::from_raw_parts_mut(job.out.0.add(token * job.spec.heads * d + column), d);
            let inverse = 1.0 / *sum.add(r);
            out.iter_mut().zip(std::slice::from_raw_parts(acc.add(r * d), d)).for_each(|(out, acc)| *out = *acc * inverse);
        }
    }
}

/// One segment of the online softmax of a query row: makes the scores exponentials relative to the greatest score so far, `max`, and adds
/// them to `sum`. Where this segment has a greater one, what was summed before it becomes relative to that.
#[inline(always)]
unsafe fn exponentiate<S: Simd>(scores: &mut [f32], soft_cap: Option<f32>, max: &mut f32, sum: &mut f32, acc: &mut [f32]) {
    if let Some(cap) = soft_cap {
        scores.iter_mut().for_each(|score| *score = cap * tanh(*score / cap));
    }
    // SAFETY: the caller runs on a processor that has `S`.
    unsafe {
        let most = greatest::<S>(scores);
        if most > *max {
            let factor = exp(*max - most);
            *sum *= factor;
            acc.iter_mut().for_each(|acc| *acc *= factor);
            *max = most;
        }
        *sum += exponentials::<S>(scores, *max);
    }
}

/// Queries times the scale of scores, the rows of a register tile side by side.
///
/// # Safety
/// The rows that `offset` names lie in the job's queries, and `q` has room for `count` rows.
#[inline(always)]
unsafe fn gather_queries<S: Simd>(job: &AttentionJob<'_>, count: usize, offset: &impl Fn(usize) -> (usize, usize), q: *mut f32) {
    let (d, scale) = (job.spec.head_dim, job.spec.scale);
    unsafe {
        let mut from = 0;
        while from < count {
            let rows = tile_rows(count - from, S::MR);
            for r in 0..rows {
                let (token, column) = offset(from + r);
                let source = job.q.0.add(token * job.q_stride + column);
                for i in 0..d {
                    *q.add(from * d + i * rows + r) = *source.add(i) * scale;
                }
            }
            from += rows;
        }
    }
}

/// `scores[r, i] = q[r] · key[i]` for one block.
///
/// # Safety
/// `q` holds `rows` gathered queries, `keys` is one head of a whole block, `scores` has room for `rows` rows of `stride` scores, of which whole
/// vectors are written. `next` is only prefetched.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn block_scores<S: Simd>(
    q: *const f32,
    keys: *const f32,
    next: *const f32,
    scores: *mut f32,
    rows: usize,
    count: usize,
    d: usize,
    padded: usize,
    stride: usize,
) {
    unsafe {
        let mut r = 0;
        while r < rows {
            let tile = tile_rows(rows - r, S::MR);
            let (q, scores) = (q.add(r * d), scores.add(r * stride));
            // Only the first rows need to prefetch it.
            let next = if r == 0 { next } else { keys };
            let mut i = 0;
            while i < count {
                let wide = i + S::LANES < count;
                let (keys, next, scores) = (keys.add(i), next.wrapping_add(i), scores.add(i));
                match (tile, wide) {
                    (12, true) => dots::<S, 12, 2>(q, keys, next, scores, d, padded, stride),
                    (12, false) => dots::<S, 12, 1>(q, keys, next, scores, d, padded, stride),
                    (8, true) => dots::<S, 8, 2>(q, keys, next, scores, d, padded, stride),
                    (8, false) => dots::<S, 8, 1>(q, keys, next, scores, d, padded, stride),
                    (6, true) => dots::<S, 6, 2>(q, keys, next, scores, d, padded, stride),
                    (6, false) => dots::<S, 6, 1>(q, keys, next, scores, d, padded, stride),
                    (4, true) => dots::<S, 4, 2>(q, keys, next, scores, d, padded, stride),
                    (4, false) => dots::<S, 4, 1>(q, keys, next, scores, d, padded, stride),
                    (3, true) => dots::<S, 3, 2>(q, keys, next, scores, d, padded, stride),
                    (3, false) => dots::<S, 3, 1>(q, keys, next, scores, d, padded, stride),
                    (2, true) => dots::<S, 2, 2>(q, keys, next, scores, d, padded, stride),
                    (2, false) => dots::<S, 2, 1>(q, keys, next, scores, d, padded, stride),
                    (_, true) => dots::<S, 1, 2>(q, keys, next, scores, d, padded, stride),
                    (_, false) => dots::<S, 1, 1>(q, keys, next, scores, d, padded, stride),
                }
                i += if wide { 2 * S::LANES } else { S::LANES };
            }
            r += tile;
        }
    }
}

/// # Safety
/// As for [`block_scores`], for `R` rows and `V` vectors of positions.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn dots<S: Simd, const R: usize, const V: usize>(
    q: *const f32,
    keys: *const f32,
    next: *const f32,
    scores: *mut f32,
    d: usize,
    padded: usize,
    stride: usize,
) {
    unsafe {
        let mut acc = [[S::zero(); V]; R];
        for i in 0..d {
            let keys = keys.add(i * padded);
            S::prefetch(next.wrapping_add(i * padded));
            if V > 1 {
                S::prefetch(next.wrapping_add(i * padded + S::LANES));
            }
            let mut key = [S::zero(); V];
            for v in 0..V {
                key[v] = S::load(keys.add(v * S::LANES));
            }
            for r in 0..R {
                let query = S::splat(*q.add(i * R + r));
                for v in 0..V {
                    acc[r][v] = S::mul_add(query, key[v], acc[r][v]);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (v, acc) in acc.iter().enumerate() {
                S::store(scores.add(r * stride + v * S::LANES), *acc);
            }
        }
    }
}

/// The greatest score.
#[inline(always)]
unsafe fn greatest<S: Simd>(scores: &[f32]) -> f32 {
    // SAFETY: reads whole vectors inside the slice.
    unsafe {
        let whole = scores.len() - scores.len() % S::LANES;
        let mut most = S::splat(f32::NEG_INFINITY);
        let mut i = 0;
        while i < whole {
            most = S::max(S::load(scores.as_ptr().add(i)), most);
            i += S::LANES;
        }
        scores[whole..].iter().fold(S::greatest(most), |most, score| if *score > most { *score } else { most })
    }
}

/// Replaces scores by `exp(score - max)`; their sum.
#[inline(always)]
unsafe fn exponentials<S: Simd>(scores: &mut [f32], max: f32) -> f32 {
    scores.iter_mut().for_each(|score| *score = exp(*score - max));
    // SAFETY: reads whole vectors inside the slice.
    unsafe {
        let whole = scores.len() - scores.len() % S::LANES;
        let mut acc = S::zero();
        let mut i = 0;
        while i < whole {
            acc = S::add(S::load(scores.as_ptr().add(i)), acc);
            i += S::LANES;
        }
        S::sum(acc) + scores[whole..].iter().sum::<f32>()
    }
}

/// Values of some positions of one head.
#[derive(Clone, Copy)]
struct Segment<'a> {
    job: &'a AttentionJob<'a>,
    row: &'a BatchRow,
    head: usize,
    start: usize,
    len: usize,
}

impl Segment<'_> {
    /// `acc[r] += Σ weight[r, i] · value[i]` for `count` query rows, in order of positions. Block by block: a block stays in the nearest cache
    /// while all rows use it.
    ///
    /// # Safety
    /// As for [`attend`]; `weights` holds `count` rows of `stride` weights, and `acc` as many rows of one head.
    #[inline(always)]
    unsafe fn weighted_values<S: Simd>(&self, weights: *const f32, count: usize, acc: *mut f32) {
        let KvShape { kv_heads: kv, head_dim: d, block_size, .. } = self.job.shape;
        let stride = self.job.layout.stride();
        unsafe {
            let mut from = 0;
            while from < self.len {
                let block = self.row.blocks[(self.start + from) / block_size] as usize;
                let values = self.job.v.0.add((block * kv + self.head) * block_size * d);
                let positions = block_size.min(self.len - from);
                let next = match self.row.blocks.get((self.start + from) / block_size + 1) {
                    Some(next) => self.job.v.0.add((*next as usize * kv + self.head) * block_size * d),
                    None => values,
                };
                let mut r = 0;
                while r < count {
                    let rows = match count - r {
                        4.. => 4,
                        2.. => 2,
                        _ => 1,
                    };
                    let (weights, acc) = (weights.add(r * stride + from), acc.add(r * d));
                    let next = if r == 0 { next } else { values };
                    let mut column = 0;
                    while column + S::LANES <= d {
                        let many = column + 4 * S::LANES <= d;
                        let (values, next, acc) = (values.add(column), next.wrapping_add(column), acc.add(column));
                        match (rows, many) {
                            (4, true) => accumulate::<S, 4, 4>(weights, stride, values, next, positions, d, acc),
                            (4, false) => accumulate::<S, 4, 1>(weights, stride, values, next, positions, d, acc),
                            (2, true) => accumulate::<S, 2, 4>(weights, stride, values, next, positions, d, acc),
                            (2, false) => accumulate::<S, 2, 1>(weights, stride, values, next, positions, d, acc),
                            (_, true) => accumulate::<S, 1, 4>(weights, stride, values, next, positions, d, acc),
                            (_, false) => accumulate::<S, 1, 1>(weights, stride, values, next, positions, d, acc),
                        }
                        column += if many { 4 * S::LANES } else { S::LANES };
                    }
                    for column in column..d {
                        for r in 0..rows {
                            let acc = acc.add(r * d + column);
                            for i in 0..positions {
                                *acc += *weights.add(r * stride + i) * *values.add(i * d + column);
                            }
                        }
                    }
                    r += rows;
                }
                from += positions;
            }
        }
    }
}

/// Adds `positions` weighted values to `R` rows of sums, `D` vectors of each.
///
/// # Safety
/// `weights` and `acc` hold `R` rows, `values` holds `positions` rows of `d` numbers, and `D` vectors lie inside a row. `next` is only prefetched.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn accumulate<S: Simd, const R: usize, const D: usize>(
    weights: *const f32,
    stride: usize,
    values: *const f32,
    next: *const f32,
    positions: usize,
    d: usize,
    acc: *mut f32,
) {
    unsafe {
        let mut sums = [[S::zero(); D]; R];
        for r in 0..R {
            for c in 0..D {
                sums[r][c] = S::load(acc.add(r * d + c * S::LANES));
            }
        }
        for i in 0..positions {
            let values = values.add(i * d);
            for c in 0..D {
                S::prefetch(next.wrapping_add(i * d + c * S::LANES));
            }
            let mut value = [S::zero(); D];
            for c in 0..D {
                value[c] = S::load(values.add(c * S::LANES));
            }
            for r in 0..R {
                let weight = S::splat(*weights.add(r * stride + i));
                for c in 0..D {
                    sums[r][c] = S::mul_add(weight, value[c], sums[r][c]);
                }
            }
        }
        for r in 0..R {
            for c in 0..D {
                S::store(acc.add(r * d + c * S::LANES), sums[r][c]);
            }
        }
    }
}

/// Copies rotated keys, and values, of one token to their slot.
///
/// # Safety
/// `k` and `v` hold `kv · d` numbers, the slot is inside the cache, and nobody else writes it.
pub(super) unsafe fn store(cache: &CachePtr, slot: usize, k: *const f32, v: *const f32) {
    let KvShape { kv_heads: kv, head_dim: d, block_size, .. } = cache.shape;
    let (block, offset, padded) = (slot / block_size, slot % block_size, padded(cache.shape));
    unsafe {
        for head in 0..kv {
            let keys = cache.k.0.add((block * kv + head) * d * padded + offset);
            for i in 0..d {
                *keys.add(i * padded) = *k.add(head * d + i);
            }
            let values = cache.v.0.add(((block * kv + head) * block_size + offset) * d);
            std::ptr::copy_nonoverlapping(v.add(head * d), values, d);
        }
    }
}

/// A cache that the tasks of one kernel write, each to slots of its own.
#[derive(Clone, Copy)]
pub(super) struct CachePtr {
    k: PtrMut<f32>,
    v: PtrMut<f32>,
    shape: KvShape,
}

impl KvCache {
    pub(super) fn writer(&mut self) -> CachePtr {
        CachePtr { k: PtrMut(self.k.as_mut_ptr().cast()), v: PtrMut(self.v.as_mut_ptr().cast()), shape: self.shape }
    }
}
