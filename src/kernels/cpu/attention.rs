//! Causal attention over paged keys and values.
//!
//! A task is some tokens of one sequence with the query heads that share one key/value head. It walks the context in segments that begin at
//! fixed positions: scores, exponentials and weighted values of each segment come from itself alone and are merged in order, and every sum inside
//! runs in one lane in a fixed order. So a token's result depends on its own context alone: not on the chunk it came in, nor on other rows.
//!
//! Keys lie transposed in their block, so that a vector holds one component of neighbouring positions and no sum crosses lanes.

use super::super::BatchRow;
use super::elementwise::exp;
use super::matmul::tile_rows;
use super::packed::pages;
use super::pool::Pool;
use super::simd::{Simd, dispatch};
use super::{Ptr, PtrMut};

/// Positions of a segment, as far as blocks fill it evenly.
const SEGMENT: usize = 256;
/// Query heads times tokens of a task, about: they share every key that is read.
const TASK_ROWS: usize = 32;
/// Positions of a block are padded to whole vectors of the widest kind.
const PAD: usize = 16;

/// Keys and values of one layer, in f32: keys `[blocks, kv, d, block_size padded to 16]`, values `[blocks, kv, block_size, d]`.
pub struct Cache {
    k: memmap2::MmapMut,
    v: memmap2::MmapMut,
    pub blocks: usize,
    pub shape: Shape,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub kv: usize,
    pub d: usize,
    pub block_size: usize,
}

impl Shape {
    fn padded(self) -> usize {
        self.block_size.next_multiple_of(PAD)
    }

    /// Bytes of a block of one layer.
    pub fn block_bytes(self) -> usize {
        4 * self.kv * self.d * (self.padded() + self.block_size)
    }
}

impl Cache {
    /// Zeroed; pages are taken when they are first written.
    pub fn new(blocks: usize, shape: Shape) -> std::io::Result<Self> {
        let width = 4 * blocks * shape.kv * shape.d;
        Ok(Self { k: pages(width * shape.padded())?, v: pages(width * shape.block_size)?, blocks, shape })
    }

    /// Touches every page, so that the memory is taken now and not during a request.
    pub fn touch(&mut self) {
        for map in [&mut self.k, &mut self.v] {
            map.chunks_mut(4096).for_each(|page| page[0] = 0);
        }
    }

    /// A key, and a value, of one slot and head, for tests.
    pub fn read(&self, slot: usize, head: usize) -> (Vec<f32>, Vec<f32>) {
        let Shape { kv, d, block_size } = self.shape;
        let (block, offset) = (slot / block_size, slot % block_size);
        let number = |map: &[u8], at: usize| f32::from_le_bytes([map[4 * at], map[4 * at + 1], map[4 * at + 2], map[4 * at + 3]]);
        let key = (0..d).map(|i| number(&self.k, ((block * kv + head) * d + i) * self.shape.padded() + offset)).collect();
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
    fn new(heads: usize, shape: Shape) -> Self {
        let group = heads / shape.kv;
        let segment = shape.block_size * (SEGMENT / shape.block_size).max(1);
        Self { rows: (TASK_ROWS / group).max(1) * group, segment, d: shape.d }
    }

    fn stride(self) -> usize {
        self.segment.next_multiple_of(PAD) + PAD
    }

    fn numbers(self) -> usize {
        (self.rows * (2 * self.d + self.stride() + 4)).next_multiple_of(PAD) + PAD
    }
}

impl Scratch {
    pub fn new(max_tokens: usize, threads: usize, heads: usize, shape: Shape) -> Self {
        Self { tiles: Vec::with_capacity(max_tokens), numbers: vec![0.0; threads * Layout::new(heads, shape).numbers()] }
    }

    /// Cuts the rows of a step; every layer looks at the same.
    pub fn plan(&mut self, rows: &[BatchRow], heads: usize, kv: usize) {
        let most = (TASK_ROWS / (heads / kv)).max(1);
        self.tiles.clear();
        for (row, r) in rows.iter().enumerate() {
            for first in (0..r.len).step_by(most) {
                self.tiles.push(Tile { row, first, tokens: most.min(r.len - first) });
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Job<'a> {
    q: Ptr<f32>,
    /// Numbers from one token's queries to the next's.
    q_stride: usize,
    k: Ptr<f32>,
    v: Ptr<f32>,
    out: PtrMut<f32>,
    heads: usize,
    shape: Shape,
    layout: Layout,
    rows: &'a [BatchRow],
}

/// `q`: rows of `q_stride` numbers that begin with `heads · d` queries → `out [t, heads·d]`, for the tokens that `scratch` was planned for.
#[allow(clippy::too_many_arguments)]
pub fn paged(
    pool: &mut Pool,
    q: &[f32],
    q_stride: usize,
    cache: &Cache,
    rows: &[BatchRow],
    heads: usize,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let shape = cache.shape;
    let layout = Layout::new(heads, shape);
    for row in rows {
        assert!(row.blocks.len() * shape.block_size >= row.context && row.context >= row.len, "block table shorter than the context");
        assert!(row.blocks.iter().all(|block| (*block as usize) < cache.blocks), "block outside the KV cache");
        assert!(
            (row.start + row.len) * q_stride <= q.len() && (row.start + row.len) * heads * shape.d <= out.len(),
            "rows outside the step"
        );
    }
    assert!(scratch.numbers.len() >= pool.threads() * layout.numbers() && heads * shape.d <= q_stride, "attention scratch");
    let numbers = PtrMut(scratch.numbers.as_mut_ptr());
    let tiles = &scratch.tiles;
    let job = Job {
        q: Ptr(q.as_ptr()),
        q_stride,
        k: Ptr(cache.k.as_ptr().cast()),
        v: Ptr(cache.v.as_ptr().cast()),
        out: PtrMut(out.as_mut_ptr()),
        heads,
        shape,
        layout,
        rows,
    };
    let tasks = tiles.len() * shape.kv;
    pool.run(tasks, &|task, thread| {
        // The last tokens of a prompt see most: they go first, so that threads end together.
        let task = tasks - 1 - task;
        let (tile, head) = (tiles[task / shape.kv], task % shape.kv);
        let numbers = PtrMut(numbers.ptr().wrapping_add(thread * layout.numbers()));
        dispatch!(attend::<>(job: Job<'_>, tile: Tile, head: usize, numbers: PtrMut<f32>));
    });
}

/// # Safety
/// The job's pointers are valid for its shapes, blocks lie in the cache, nobody else writes this tile's heads or these numbers.
#[inline(always)]
unsafe fn attend<S: Simd>(job: Job<'_>, tile: Tile, head: usize, numbers: PtrMut<f32>) {
    let Shape { kv, d, block_size } = job.shape;
    let padded = job.shape.padded();
    let group = job.heads / kv;
    let row = &job.rows[tile.row];
    let count = tile.tokens * group;
    let before = row.context - row.len + tile.first;
    // Positions that query row `r` sees.
    let limit = |r: usize| before + r / group + 1;
    let stride = job.layout.stride();
    unsafe {
        let q = numbers.0;
        let rows = job.layout.rows;
        let (acc, scores) = (q.add(rows * d), q.add(2 * rows * d));
        let max = scores.add(rows * stride);
        let (sum, factors) = (max.add(rows), max.add(2 * rows));
        let offset = |r: usize| (row.start + tile.first + r / group, (head * group + r % group) * d);
        gather_queries::<S>(&job, count, &offset, q);
        let longest = limit(count - 1);
        let mut start = 0;
        while start < longest {
            let len = job.layout.segment.min(longest - start);
            for (i, block) in row.blocks[start / block_size..(start + len).div_ceil(block_size)].iter().enumerate() {
                let keys = job.k.0.add((*block as usize * kv + head) * d * padded);
                block_scores::<S>(q, keys, scores.add(i * block_size), count, block_size.min(len - i * block_size), d, padded, stride);
            }
            for r in 0..count {
                let visible = limit(r).saturating_sub(start).min(len);
                let row = std::slice::from_raw_parts_mut(scores.add(r * stride), len);
                let (greatest, total) = exponentials::<S>(&mut row[..visible]);
                row[visible..].fill(0.0);
                merge_scale(r, start == 0, greatest, total, max, sum, factors.add(2 * r));
            }
            weighted_values::<S>(&job, row, head, start, len, scores, count, factors, acc);
            start += len;
        }
        for r in 0..count {
            let (token, column) = offset(r);
            let (out, acc, inverse) = (job.out.0.add(token * job.heads * d + column), acc.add(r * d), 1.0 / *sum.add(r));
            for i in 0..d {
                *out.add(i) = *acc.add(i) * inverse;
            }
        }
    }
}

/// Queries times d^-½, the rows of a register tile side by side.
#[inline(always)]
unsafe fn gather_queries<S: Simd>(job: &Job<'_>, count: usize, offset: &impl Fn(usize) -> (usize, usize), q: *mut f32) {
    let d = job.shape.d;
    let scale = 1.0 / (d as f32).sqrt();
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
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn block_scores<S: Simd>(
    q: *const f32,
    keys: *const f32,
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
            let mut i = 0;
            while i < count {
                let wide = i + S::LANES < count;
                let (keys, scores) = (keys.add(i), scores.add(i));
                match (tile, wide) {
                    (12, true) => dots::<S, 12, 2>(q, keys, scores, d, padded, stride),
                    (12, false) => dots::<S, 12, 1>(q, keys, scores, d, padded, stride),
                    (8, true) => dots::<S, 8, 2>(q, keys, scores, d, padded, stride),
                    (8, false) => dots::<S, 8, 1>(q, keys, scores, d, padded, stride),
                    (6, true) => dots::<S, 6, 2>(q, keys, scores, d, padded, stride),
                    (6, false) => dots::<S, 6, 1>(q, keys, scores, d, padded, stride),
                    (4, true) => dots::<S, 4, 2>(q, keys, scores, d, padded, stride),
                    (4, false) => dots::<S, 4, 1>(q, keys, scores, d, padded, stride),
                    (3, true) => dots::<S, 3, 2>(q, keys, scores, d, padded, stride),
                    (3, false) => dots::<S, 3, 1>(q, keys, scores, d, padded, stride),
                    (2, true) => dots::<S, 2, 2>(q, keys, scores, d, padded, stride),
                    (2, false) => dots::<S, 2, 1>(q, keys, scores, d, padded, stride),
                    (_, true) => dots::<S, 1, 2>(q, keys, scores, d, padded, stride),
                    (_, false) => dots::<S, 1, 1>(q, keys, scores, d, padded, stride),
                }
                i += if wide { 2 * S::LANES } else { S::LANES };
            }
            r += tile;
        }
    }
}

#[inline(always)]
unsafe fn dots<S: Simd, const R: usize, const V: usize>(
    q: *const f32,
    keys: *const f32,
    scores: *mut f32,
    d: usize,
    padded: usize,
    stride: usize,
) {
    unsafe {
        let mut acc = [[S::zero(); V]; R];
        for i in 0..d {
            let keys = keys.add(i * padded);
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

/// Replaces scores by `exp(score - max)`; the maximum and their sum.
#[inline(always)]
unsafe fn exponentials<S: Simd>(scores: &mut [f32]) -> (f32, f32) {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, score| if *score > max { *score } else { max });
    scores.iter_mut().for_each(|score| *score = exp(*score - max));
    unsafe {
        let whole = scores.len() - scores.len() % S::LANES;
        let mut acc = S::zero();
        let mut i = 0;
        while i < whole {
            acc = S::add(S::load(scores.as_ptr().add(i)), acc);
            i += S::LANES;
        }
        (max, S::sum(acc) + scores[whole..].iter().sum::<f32>())
    }
}

/// Takes a segment's maximum and sum into the row's. Leaves the factors of what was summed before, and of the segment, in `factors`.
#[inline(always)]
unsafe fn merge_scale(r: usize, first: bool, greatest: f32, total: f32, max: *mut f32, sum: *mut f32, factors: *mut f32) {
    unsafe {
        let (max, sum) = (max.add(r), sum.add(r));
        let (before, now) = if first {
            (0.0, 1.0)
        } else if greatest == f32::NEG_INFINITY {
            // Nothing of this segment is visible.
            (1.0, 0.0)
        } else if greatest > *max {
            (exp(*max - greatest), 1.0)
        } else {
            (1.0, exp(greatest - *max))
        };
        if first || greatest > *max {
            *max = greatest;
        }
        *sum = if first { total } else { *sum * before + total * now };
        *factors = before;
        *factors.add(1) = now;
    }
}

/// `acc[r] = acc[r] · before + now · Σ weight[r, i] · value[i]`, in order of positions.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn weighted_values<S: Simd>(
    job: &Job<'_>,
    row: &BatchRow,
    head: usize,
    start: usize,
    len: usize,
    scores: *const f32,
    count: usize,
    factors: *const f32,
    acc: *mut f32,
) {
    let Shape { d, .. } = job.shape;
    unsafe {
        let segment = Segment { job, row, head, start, len };
        let mut r = 0;
        while r < count {
            let rows = match count - r {
                4.. => 4,
                2.. => 2,
                _ => 1,
            };
            let (p, acc, factors) = (scores.add(r * job.layout.stride()), acc.add(r * d), factors.add(2 * r));
            let mut column = 0;
            while column + S::LANES <= d {
                let many = column + 4 * S::LANES <= d;
                match (rows, many) {
                    (4, true) => segment.accumulate::<S, 4, 4>(p, factors, acc, column),
                    (4, false) => segment.accumulate::<S, 4, 1>(p, factors, acc, column),
                    (2, true) => segment.accumulate::<S, 2, 4>(p, factors, acc, column),
                    (2, false) => segment.accumulate::<S, 2, 1>(p, factors, acc, column),
                    (_, true) => segment.accumulate::<S, 1, 4>(p, factors, acc, column),
                    (_, false) => segment.accumulate::<S, 1, 1>(p, factors, acc, column),
                }
                column += if many { 4 * S::LANES } else { S::LANES };
            }
            for column in column..d {
                for r in 0..rows {
                    let mut sum = 0f32;
                    for i in 0..len {
                        sum += *p.add(r * job.layout.stride() + i) * *segment.value(i).add(column);
                    }
                    let (acc, factors) = (acc.add(r * d + column), factors.add(2 * r));
                    *acc = merged(*acc, *factors, *factors.add(1), sum);
                }
            }
            r += rows;
        }
    }
}

#[inline(always)]
fn merged(acc: f32, before: f32, now: f32, sum: f32) -> f32 {
    // The first segment finds whatever was there before.
    if before == 0.0 { sum * now } else { acc * before + sum * now }
}

/// Values of some positions of one head.
#[derive(Clone, Copy)]
struct Segment<'a> {
    job: &'a Job<'a>,
    row: &'a BatchRow,
    head: usize,
    start: usize,
    len: usize,
}

impl Segment<'_> {
    #[inline(always)]
    unsafe fn value(&self, i: usize) -> *const f32 {
        let Shape { kv, d, block_size } = self.job.shape;
        let position = self.start + i;
        let block = self.row.blocks[position / block_size] as usize;
        unsafe { self.job.v.0.add(((block * kv + self.head) * block_size + position % block_size) * d) }
    }

    #[inline(always)]
    unsafe fn accumulate<S: Simd, const R: usize, const D: usize>(&self, p: *const f32, factors: *const f32, acc: *mut f32, column: usize) {
        let (d, stride, block_size) = (self.job.shape.d, self.job.layout.stride(), self.job.shape.block_size);
        unsafe {
            let mut sums = [[S::zero(); D]; R];
            let mut from = 0;
            while from < self.len {
                let values = self.value(from).add(column);
                let count = block_size.min(self.len - from);
                for i in 0..count {
                    let values = values.add(i * d);
                    let mut value = [S::zero(); D];
                    for c in 0..D {
                        value[c] = S::load(values.add(c * S::LANES));
                    }
                    for r in 0..R {
                        let weight = S::splat(*p.add(r * stride + from + i));
                        for c in 0..D {
                            sums[r][c] = S::mul_add(weight, value[c], sums[r][c]);
                        }
                    }
                }
                from += count;
            }
            for (r, sums) in sums.iter().enumerate() {
                let (before, now) = (*factors.add(2 * r), *factors.add(2 * r + 1));
                for (c, sum) in sums.iter().enumerate() {
                    let acc = acc.add(r * d + column + c * S::LANES);
                    let sum = S::mul(*sum, S::splat(now));
                    S::store(acc, if before == 0.0 { sum } else { S::mul_add(S::load(acc), S::splat(before), sum) });
                }
            }
        }
    }
}

/// Copies rotated keys, and values, of one token to their slot.
///
/// # Safety
/// `k` and `v` hold `kv · d` numbers, the slot is inside the cache, and nobody else writes it.
pub(super) unsafe fn store(cache: &CachePtr, slot: usize, k: *const f32, v: *const f32) {
    let Shape { kv, d, block_size } = cache.shape;
    let (block, offset, padded) = (slot / block_size, slot % block_size, cache.shape.padded());
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
    shape: Shape,
}

impl Cache {
    pub(super) fn writer(&mut self) -> CachePtr {
        CachePtr { k: PtrMut(self.k.as_mut_ptr().cast()), v: PtrMut(self.v.as_mut_ptr().cast()), shape: self.shape }
    }
}
