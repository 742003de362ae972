//! Attention over paged keys and values.
//!
//! A task is some tokens of one sequence with the query heads that share one key/value head. It walks the context in segments that begin at
//! fixed positions, keeping the greatest score, the sum of exponentials and of weighted values as it goes, and every sum runs in one lane
//! in order of positions. So a token's result depends on its own context alone: not on the chunk it came in, nor on other rows.
//!
//! Keys lie transposed in their block, so that a vector holds one component of neighbouring positions and no sum crosses lanes. Where the cache
//! holds narrower numbers they become f32 as they are loaded.

use half::{bf16, f16};

use super::elementwise::{exp, tanh};
use super::kv::{Element, GROUP, KvCache, Numbers, PAD, Plane, groups, padded};
use super::matmul::tile_rows;
use super::pool::Pool;
use super::prefault;
use super::simd::{Simd, dispatch};
use super::{Ptr, PtrMut};
use crate::{AttentionSpec, BatchRow, KvDtype, KvShape};

/// Positions of a segment, as far as blocks fill it evenly.
const SEGMENT: usize = 256;
/// Query heads times tokens of a task, about: they share every key that is read.
const TASK_ROWS: usize = 32;
/// Bytes of a cache line, as prefetching takes them.
const LINE: usize = 64;

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
    k: Plane<Ptr<u8>>,
    v: Plane<Ptr<u8>>,
    out: PtrMut<f32>,
    spec: &'a AttentionSpec,
    /// `[heads]`
    sinks: Option<&'a [f32]>,
    shape: KvShape,
    layout: Layout,
    rows: &'a [BatchRow],
    /// Tasks that share the query rows of a tile and a head.
    parts: usize,
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
    let ([k, v], heads) = (cache.pointers(), tiles.len() * shape.kv_heads);
    // Fewer heads than threads, as of one sequence of a model with one head of keys: they share its query rows, and read the keys together.
    let parts = pool.threads().div_ceil(heads.max(1)).min(spec.heads / spec.kv_heads);
    let job = AttentionJob { q: Ptr(q.as_ptr()), q_stride, k, v, out: PtrMut(out.as_mut_ptr()), spec, sinks, shape, layout, rows, parts };
    let (tasks, dtype) = (heads * parts, cache.dtype);
    pool.run(tasks, &|task, thread| {
        // The last tokens of a prompt see most: they go first, so that threads end together.
        let task = tasks - 1 - task;
        let (part, head) = (task % parts, task / parts);
        let tile = tiles[head / shape.kv_heads];
        let at = Part { tile, head: head % shape.kv_heads, part };
        let numbers = PtrMut(numbers.ptr().wrapping_add(thread * layout.numbers()));
        match dtype {
            KvDtype::F32 => dispatch!(attend::<f32>(job: AttentionJob<'_>, at: Part, numbers: PtrMut<f32>)),
            KvDtype::F16 => dispatch!(attend::<f16>(job: AttentionJob<'_>, at: Part, numbers: PtrMut<f32>)),
            KvDtype::Bf16 => dispatch!(attend::<bf16>(job: AttentionJob<'_>, at: Part, numbers: PtrMut<f32>)),
            KvDtype::Int8 => dispatch!(attend::<i8>(job: AttentionJob<'_>, at: Part, numbers: PtrMut<f32>)),
        }
    });
}

/// What one task computes.
#[derive(Clone, Copy)]
struct Part {
    tile: Tile,
    /// Of keys and values.
    head: usize,
    part: usize,
}

/// # Safety
/// The job's pointers are valid for its shapes, blocks lie in the cache, which holds `E`; nobody else writes this part's rows or these numbers.
#[inline(always)]
unsafe fn attend<S: Simd, E: Element>(job: AttentionJob<'_>, at: Part, numbers: PtrMut<f32>) {
    let Part { tile, head, part } = at;
    let KvShape { kv_heads: kv, head_dim: d, block_size, .. } = job.shape;
    let padded = padded(job.shape);
    let group = job.spec.heads / kv;
    let row = &job.rows[tile.row];
    let (all, per_part) = (tile.tokens * group, (tile.tokens * group).div_ceil(job.parts));
    let first = (part * per_part).min(all);
    let count = per_part.min(all - first);
    if count == 0 {
        return;
    }
    let before = row.context - row.len + tile.first;
    // The positions that query row `r` sees.
    let seen = |r: usize| job.spec.visible(before + (first + r) / group, row.context);
    let stride = job.layout.stride();
    // SAFETY: `paged` has checked that every block lies in the cache and every row in q and out. `numbers` holds what `Layout::numbers` counts:
    // queries, sums, scores, maxima and totals, one after another, for at most `layout.rows` rows, and `count` is no more than that.
    unsafe {
        let (q, rows) = (numbers.0, job.layout.rows);
        let (acc, scores) = (q.add(rows * d), q.add(2 * rows * d));
        let max = scores.add(rows * stride);
        let sum = max.add(rows);
        let query_head = |r: usize| head * group + (first + r) % group;
        let offset = |r: usize| (row.start + tile.first + (first + r) / group, query_head(r) * d);
        gather_queries::<S>(&job, count, &offset, q);
        for r in 0..count {
            // A sink is a key seen before all others, whose value is zero.
            let sink = job.sinks.map(|sinks| sinks[query_head(r)]);
            (*max.add(r), *sum.add(r)) = sink.map_or((f32::NEG_INFINITY, 0.0), |sink| (sink, 1.0));
        }
        std::slice::from_raw_parts_mut(acc, count * d).fill(0.0);
        // NOTE: segments begin at multiples of their length whatever the window, so that sums are cut at the same places in every step.
        let mut start = seen(0).start / job.layout.segment * job.layout.segment;
        while start < seen(count - 1).end {
            let len = job.layout.segment.min(seen(count - 1).end - start);
            let blocks = &row.blocks[start / block_size..(start + len).div_ceil(block_size)];
            for (i, block) in blocks.iter().enumerate() {
                // The next block may lie anywhere, so it is prefetched while this one is computed; after the last block, the first values.
                let next = blocks.get(i + 1).map_or_else(|| job.v.head(blocks[0], head), |next| job.k.head(*next, head));
                let count_here = block_size.min(len - i * block_size);
                let keys = job.k.numbers::<E>(*block, head);
                block_scores::<S, E>(q, keys, next, scores.add(i * block_size), count, count_here, d, padded, stride);
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
            Segment { job: &job, row, head, start, len }.weighted_values::<S, E>(scores, count, acc);
            start += len;
        }
        store(&job, count, &offset, acc, sum);
    }
}

/// Divides the sums of each query row, `acc [count, d]`, by its total, and writes them where `offset` says.
#[inline(always)]
unsafe fn store(job: &AttentionJob<'_>, count: usize, offset: &impl Fn(usize) -> (usize, usize), acc: *const f32, sum: *const f32) {
    let d = job.shape.head_dim;
    for r in 0..count {
        let (token, column) = offset(r);
        // SAFETY: as in `attend`: `count` rows of sums, and as many of the output.
        unsafe {
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
unsafe fn block_scores<S: Simd, E: Element>(
    q: *const f32,
    keys: Numbers<E>,
    next: *const u8,
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
            let next = if r == 0 { next } else { keys.numbers.cast() };
            let mut i = 0;
            while i < count {
                let wide = i + S::LANES < count;
                let keys = Numbers { scales: keys.scales.wrapping_add(i), numbers: keys.numbers.add(i) };
                let (next, scores) = (next.wrapping_add(i * size_of::<E>()), scores.add(i));
                match (tile, wide) {
                    (12, true) => dots::<S, E, 12, 2>(q, keys, next, scores, d, padded, stride),
                    (12, false) => dots::<S, E, 12, 1>(q, keys, next, scores, d, padded, stride),
                    (8, true) => dots::<S, E, 8, 2>(q, keys, next, scores, d, padded, stride),
                    (8, false) => dots::<S, E, 8, 1>(q, keys, next, scores, d, padded, stride),
                    (6, true) => dots::<S, E, 6, 2>(q, keys, next, scores, d, padded, stride),
                    (6, false) => dots::<S, E, 6, 1>(q, keys, next, scores, d, padded, stride),
                    (4, true) => dots::<S, E, 4, 2>(q, keys, next, scores, d, padded, stride),
                    (4, false) => dots::<S, E, 4, 1>(q, keys, next, scores, d, padded, stride),
                    (3, true) => dots::<S, E, 3, 2>(q, keys, next, scores, d, padded, stride),
                    (3, false) => dots::<S, E, 3, 1>(q, keys, next, scores, d, padded, stride),
                    (2, true) => dots::<S, E, 2, 2>(q, keys, next, scores, d, padded, stride),
                    (2, false) => dots::<S, E, 2, 1>(q, keys, next, scores, d, padded, stride),
                    (_, true) => dots::<S, E, 1, 2>(q, keys, next, scores, d, padded, stride),
                    (_, false) => dots::<S, E, 1, 1>(q, keys, next, scores, d, padded, stride),
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
unsafe fn dots<S: Simd, E: Element, const R: usize, const V: usize>(
    q: *const f32,
    keys: Numbers<E>,
    next: *const u8,
    scores: *mut f32,
    d: usize,
    padded: usize,
    stride: usize,
) {
    unsafe {
        let mut acc = [[S::zero(); V]; R];
        let mut from = 0;
        while from < d {
            let to = if E::SCALED { d.min(from + GROUP) } else { d };
            let mut scale = [S::zero(); V];
            if E::SCALED {
                for v in 0..V {
                    scale[v] = S::load_bf16(keys.scales.add(from / GROUP * padded + v * S::LANES));
                }
            }
            for i in from..to {
                let next = next.wrapping_add(i * padded * size_of::<E>());
                S::prefetch(next);
                if V > 1 && S::LANES * size_of::<E>() >= LINE {
                    S::prefetch(next.wrapping_add(LINE));
                }
                let mut key = [S::zero(); V];
                for v in 0..V {
                    let number = E::load::<S>(keys.numbers.add(i * padded + v * S::LANES));
                    key[v] = if E::SCALED { S::mul(number, scale[v]) } else { number };
                }
                for r in 0..R {
                    let query = S::splat(*q.add(i * R + r));
                    for v in 0..V {
                        acc[r][v] = S::mul_add(query, key[v], acc[r][v]);
                    }
                }
            }
            from = to;
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
    unsafe fn weighted_values<S: Simd, E: Element>(&self, weights: *const f32, count: usize, acc: *mut f32) {
        let KvShape { head_dim: d, block_size, .. } = self.job.shape;
        let (stride, groups) = (self.job.layout.stride(), groups(self.job.shape));
        unsafe {
            let mut from = 0;
            while from < self.len {
                let at = (self.start + from) / block_size;
                let values = self.job.v.numbers::<E>(self.row.blocks[at], self.head);
                let positions = block_size.min(self.len - from);
                let next = self.row.blocks.get(at + 1).map_or(values.numbers.cast(), |next| self.job.v.head(*next, self.head));
                let mut r = 0;
                while r < count {
                    let rows = match count - r {
                        4.. => 4,
                        2.. => 2,
                        _ => 1,
                    };
                    let (weights, acc) = (weights.add(r * stride + from), acc.add(r * d));
                    let next = if r == 0 { next } else { values.numbers.cast() };
                    let mut column = 0;
                    while column + S::LANES <= d {
                        let many = column + 4 * S::LANES <= d;
                        let values = Values { of: values, column, groups };
                        let (next, acc) = (next.wrapping_add(column * size_of::<E>()), acc.add(column));
                        match (rows, many) {
                            (4, true) => accumulate::<S, E, 4, 4>(weights, stride, values, next, positions, d, acc),
                            (4, false) => accumulate::<S, E, 4, 1>(weights, stride, values, next, positions, d, acc),
                            (2, true) => accumulate::<S, E, 2, 4>(weights, stride, values, next, positions, d, acc),
                            (2, false) => accumulate::<S, E, 2, 1>(weights, stride, values, next, positions, d, acc),
                            (_, true) => accumulate::<S, E, 1, 4>(weights, stride, values, next, positions, d, acc),
                            (_, false) => accumulate::<S, E, 1, 1>(weights, stride, values, next, positions, d, acc),
                        }
                        column += if many { 4 * S::LANES } else { S::LANES };
                    }
                    for column in column..d {
                        for r in 0..rows {
                            let acc = acc.add(r * d + column);
                            for i in 0..positions {
                                let value = (*values.numbers.add(i * d + column)).read();
                                let scale = if E::SCALED { (*values.scales.add(i * groups + column / GROUP)).to_f32() } else { 1.0 };
                                *acc += *weights.add(r * stride + i) * (value * scale);
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

/// Some columns of the values of a block.
#[derive(Clone, Copy)]
struct Values<E> {
    of: Numbers<E>,
    /// The first of them. Of several vectors it begins a group.
    column: usize,
    groups: usize,
}

/// Adds `positions` weighted values to `R` rows of sums, `D` vectors of each.
///
/// # Safety
/// `weights` and `acc` hold `R` rows, `values` holds `positions` rows of `d` numbers, and `D` vectors lie inside a row. `next` is only prefetched.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn accumulate<S: Simd, E: Element, const R: usize, const D: usize>(
    weights: *const f32,
    stride: usize,
    values: Values<E>,
    next: *const u8,
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
            let Values { of, column, groups } = values;
            let mut value = [S::zero(); D];
            let mut scale = S::zero();
            for c in 0..D {
                if (c * S::LANES * size_of::<E>()).is_multiple_of(LINE) {
                    S::prefetch(next.wrapping_add((i * d + c * S::LANES) * size_of::<E>()));
                }
                value[c] = E::load::<S>(of.numbers.add(i * d + column + c * S::LANES));
                if E::SCALED {
                    if (c * S::LANES).is_multiple_of(GROUP) {
                        let bits = (*of.scales.add(i * groups + (column + c * S::LANES) / GROUP)).to_bits();
                        scale = S::splat(f32::from_bits(u32::from(bits) << 16));
                    }
                    value[c] = S::mul(value[c], scale);
                }
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
