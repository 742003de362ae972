//! The CPU backend: kernels of our own, in f32; weights may be bf16, or of 8 or 4 bits.
//!
//! Every buffer is made once, so that a step allocates nothing, and a row's result depends on that row alone: not on what else is in the
//! step, nor on the number of threads.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Error, Result};

use super::ops::{
    AttentionSpec, AttentionWeights, Batch, BatchRow, Columns, ComputeDtype, Epilogue, Experts, KvShape, Linear, Norm, NormExtent,
    NormKind, QkNorm, QueryGrowth, TableRow, WeightFormat,
};
use super::ranks::Member;
use super::{
    Backend, CausalConv, DeltaSpec, Footprint, GatedDelta, HeadColumns, LatentSpec, MatrixSource, RowVisitor, StepLimits, StepStates,
};

pub mod attention;
mod conv;
mod delta;
mod elementwise;
mod experts;
mod kv;
mod latent;
pub(crate) mod load;
pub mod matmul;
pub mod packed;
pub mod pool;
pub mod prefault;
pub(crate) mod simd;
pub mod softmax;
pub(crate) mod vectorize;

pub use kv::KvCache;
use packed::{Packed, PackedStore};
use pool::Pool;
pub use simd::{Level, lanes, level};

/// A pointer that tasks of one kernel share; each reads or writes a part of its own.
#[derive(Clone, Copy)]
pub(crate) struct Ptr<T>(pub *const T);
#[derive(Clone, Copy)]
pub(crate) struct PtrMut<T>(pub *mut T);
// SAFETY: kernels hand each task disjoint parts, and outlive their tasks.
unsafe impl<T> Send for Ptr<T> {}
unsafe impl<T> Sync for Ptr<T> {}
unsafe impl<T> Send for PtrMut<T> {}
unsafe impl<T> Sync for PtrMut<T> {}

impl<T> Ptr<T> {
    /// Through a method, so that closures take the pointer as a whole.
    pub(crate) fn ptr(self) -> *const T {
        self.0
    }
}

impl<T> PtrMut<T> {
    pub(crate) fn ptr(self) -> *mut T {
        self.0
    }
}

/// Values above which elementwise kernels use all threads.
const PARALLEL_VALUES: usize = 16 * 1024;
/// Rows one task takes of an elementwise kernel.
const TASK_ROWS: usize = 4;

/// Reads `values` as fast as one thread can, and returns their sum: for measuring memory.
pub fn read(values: &[f32]) -> f32 {
    elementwise::sum(values)
}

/// Rows of f32.
#[derive(Debug, Clone, PartialEq)]
pub struct Buffer {
    /// `[capacity, width]`
    values: Vec<f32>,
    width: usize,
    /// Rows that hold something.
    rows: usize,
}

impl Buffer {
    pub fn new(capacity: usize, width: usize) -> Self {
        Self { values: vec![0.0; capacity * width], width, rows: 0 }
    }

    /// A buffer of exactly these rows.
    pub fn of(values: Vec<f32>, width: usize) -> Self {
        let rows = values.len() / width;
        Self { values, width, rows }
    }

    /// `[rows, width]`
    pub fn values(&self) -> &[f32] {
        &self.values[..self.rows * self.width]
    }

    fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.rows * self.width]
    }

    /// Makes it hold `rows` rows of `width`; layers may differ in their widths.
    fn resize(&mut self, rows: usize, width: usize) -> Result<()> {
        if rows * width > self.values.len() {
            return Err(Error::Msg(format!("{rows} rows of {width} numbers, and room for {} numbers", self.values.len())));
        }
        (self.rows, self.width) = (rows, width);
        Ok(())
    }
}

/// The processor's threads, and what they need for a step beside its buffers.
pub struct Cpu {
    pool: Pool,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    types: Vec<u32>,
    rows: Vec<BatchRow>,
    states: StepStates,
    angles: Angles,
    limits: StepLimits,
    /// Where packed weights are kept from one start to the next.
    store: Option<Arc<dyn PackedStore>>,
    /// Its place among others that compute the same model.
    member: Option<Member>,
    scratch: matmul::Scratch,
    attention: attention::Scratch,
    experts: experts::Scratch,
}

impl Cpu {
    /// `threads` in all, the calling one included.
    pub fn new(limits: &StepLimits, threads: usize, dtype: ComputeDtype) -> io::Result<Self> {
        let pool = Pool::new(threads)?;
        let t = limits.max_tokens;
        let activations = matmul::scratch_values(t, limits.widest).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            tokens: Vec::with_capacity(t),
            positions: Vec::with_capacity(t),
            slots: Vec::with_capacity(t),
            types: Vec::with_capacity(t),
            rows: Vec::with_capacity(t),
            states: StepStates::default(),
            angles: Angles::with_capacity(t, limits.frequencies),
            scratch: matmul::Scratch::with_capacity(activations, dtype),
            attention: attention::Scratch::new(t, pool.threads(), &limits.attention, limits.block_size),
            experts: experts::Scratch::new(t, limits.experts),
            limits: limits.clone(),
            store: None,
            member: None,
            pool,
        })
    }

    /// Weights are taken from `store` where it has them, and are given to it where it does not.
    pub fn with_store(self, store: Option<Arc<dyn PackedStore>>) -> Self {
        Self { store, ..self }
    }
}

impl Footprint for Cpu {
    fn weight_bytes(rows: usize, width: usize, is_bf16: bool, format: Option<WeightFormat>, columns: Columns) -> (WeightFormat, usize) {
        let format = load::format(is_bf16, format);
        (format, Packed::bytes_of(rows, width, format, columns))
    }

    fn kv_block_bytes(shape: KvShape) -> usize {
        kv::block_bytes(shape)
    }

    fn buffer_bytes(rows: usize, width: usize) -> Option<usize> {
        rows.checked_mul(width)?.checked_mul(4)
    }

    fn own_bytes(limits: &StepLimits, threads: usize) -> Option<usize> {
        // Of a token: id, position, slot and type, row of the batch, angles.
        let per_token = 4 * 4 + size_of::<BatchRow>() + 2 * 4 * limits.frequencies;
        let parts = [
            limits.max_tokens.checked_mul(per_token)?,
            matmul::Scratch::bytes(matmul::scratch_values(limits.max_tokens, limits.widest)?)?,
            attention::Scratch::bytes(limits.max_tokens, threads, &limits.attention, limits.block_size)?,
            experts::Scratch::bytes(limits.max_tokens, limits.experts)?,
        ];
        parts.into_iter().try_fold(0usize, usize::checked_add)
    }
}

impl Backend for Cpu {
    type Buffer = Buffer;
    type Weight = Packed;
    type Vector = Vec<f32>;
    type KvCache = KvCache;
    type State = Buffer;

    fn buffer(&self, rows: usize, width: usize) -> Result<Buffer> {
        Ok(Buffer::new(rows, width))
    }

    fn weight<S: MatrixSource>(&self, source: &S, format: Option<WeightFormat>, columns: Columns) -> Result<Packed> {
        load::load(source, format, columns, self.store.as_deref())
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvCache> {
        KvCache::new(shape).map_err(Error::wrap)
    }

    fn state(&self, slots: usize, width: usize) -> Result<Buffer> {
        Ok(Buffer { rows: slots, ..Buffer::new(slots, width) })
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<()> {
        let t = batch.tokens.len();
        if t > self.limits.max_tokens {
            return Err(Error::Msg(format!("a step of {t} tokens, and room for {}", self.limits.max_tokens)));
        }
        fn refill<T: Clone>(target: &mut Vec<T>, source: &[T]) {
            target.clear();
            target.extend_from_slice(source);
        }
        refill(&mut self.tokens, batch.tokens);
        refill(&mut self.positions, batch.positions);
        refill(&mut self.slots, batch.slots);
        refill(&mut self.types, batch.types);
        refill(&mut self.rows, batch.rows);
        self.states.assign(batch.states);
        self.angles.fill(batch);
        self.attention.begin();
        Ok(())
    }

    fn end(&mut self) {
        self.rows.clear();
    }

    fn embed(&mut self, table: &Packed, scale: f32, out: &mut Buffer) -> Result<()> {
        out.resize(self.tokens.len(), table.k)?;
        for (id, x) in self.tokens.iter().zip(out.values.chunks_exact_mut(table.k)) {
            if *id as usize >= table.n {
                return Err(Error::Msg(format!("token id {id} is outside the vocabulary of {}", table.n)));
            }
            table.row(*id as usize, x);
            if scale != 1.0 {
                x.iter_mut().for_each(|x| *x *= scale);
            }
        }
        Ok(())
    }

    fn embed_add(&mut self, table: &Packed, row: TableRow, out: &mut Buffer) -> Result<()> {
        if (out.rows, out.width) != (self.tokens.len(), table.k) {
            return Err(Error::Msg(format!("rows of {table:?} cannot be added to [{}, {}]", out.rows, out.width)));
        }
        let Self { pool, positions, types, scratch, .. } = self;
        let index = |at: usize| match row {
            TableRow::Position(first) => first + positions[at] as usize,
            TableRow::Type => types.get(at).map_or(0, |of| *of as usize),
        };
        if let Some(index) = (0..out.rows).map(index).find(|index| *index >= table.n) {
            return Err(Error::Msg(format!("{row:?} of a token is row {index} of a table of {}", table.n)));
        }
        let (width, added, target) = (table.k, scratch.rows(out.rows * table.k), PtrMut(out.values.as_mut_ptr()));
        by_rows(pool, out.rows, width, &|at| {
            // SAFETY: a row of both, of this task alone.
            let (added, x) = unsafe {
                let row = at * width;
                (std::slice::from_raw_parts_mut(added.ptr().add(row), width), std::slice::from_raw_parts_mut(target.ptr().add(row), width))
            };
            table.row(index(at), added);
            x.iter_mut().zip(added).for_each(|(x, added)| *x += *added);
        });
        Ok(())
    }

    fn norm(&mut self, x: &Buffer, norm: &Norm<Vec<f32>>, out: &mut Buffer) -> Result<()> {
        out.resize(x.rows, x.width)?;
        let (width, target) = (x.width, PtrMut(out.values.as_mut_ptr()));
        by_rows(&mut self.pool, x.rows, width, &|row| {
            // SAFETY: a row of the buffer, of this task alone.
            let out = unsafe { std::slice::from_raw_parts_mut(target.ptr().add(row * width), width) };
            norm_row(&x.values[row * width..(row + 1) * width], norm, out);
        });
        Ok(())
    }

    fn norm_add(&mut self, x: &Buffer, norm: &Norm<Vec<f32>>, factor: f32, out: &mut Buffer) -> Result<()> {
        if (x.rows, x.width) != (out.rows, out.width) {
            return Err(Error::Msg(format!("[{}, {}] cannot be added to [{}, {}]", x.rows, x.width, out.rows, out.width)));
        }
        let (width, target) = (x.width, PtrMut(out.values.as_mut_ptr()));
        let normed = self.scratch.rows(x.rows * width);
        by_rows(&mut self.pool, x.rows, width, &|row| {
            // SAFETY: a row of both, of this task alone.
            let (out, normed) = unsafe {
                let at = row * width;
                (std::slice::from_raw_parts_mut(target.ptr().add(at), width), std::slice::from_raw_parts_mut(normed.ptr().add(at), width))
            };
            norm_row(&x.values[row * width..(row + 1) * width], norm, normed);
            out.iter_mut().zip(normed).for_each(|(out, normed)| *out += *normed * factor);
        });
        Ok(())
    }

    fn linear(&mut self, x: &Buffer, linear: &Linear<Packed, Vec<f32>>, epilogue: Epilogue, out: &mut Buffer) -> Result<()> {
        let w = &linear.weight;
        let width = check_linear(w, x.width, epilogue)?;
        if !matches!(epilogue, Epilogue::Add(_)) {
            out.resize(x.rows, width)?;
        }
        if (out.rows, out.width) != (x.rows, width) {
            return Err(Error::Msg(format!("[{}, {width}] cannot be added to [{}, {}]", x.rows, out.rows, out.width)));
        }
        matmul::matmul(&mut self.pool, x.values(), w, linear.bias.as_deref(), epilogue, &mut self.scratch, out.values_mut());
        Ok(())
    }

    fn rope_and_store(
        &mut self,
        qkv: &mut Buffer,
        attention: &AttentionSpec,
        weights: &AttentionWeights<Vec<f32>>,
        cache: &mut KvCache,
    ) -> Result<()> {
        let (t, width, d) = (self.tokens.len(), attention.qkv_width(), attention.head_dim);
        if (qkv.rows, qkv.width) != (t, width) || (cache.shape.kv_heads, cache.shape.head_dim) != (attention.kv_heads, d) {
            return Err(Error::Msg(format!("queries, keys and values of {} numbers for {attention:?}", qkv.width)));
        }
        if let Some(slot) = self.slots.iter().find(|slot| **slot as usize >= cache.shape.blocks * cache.shape.block_size) {
            return Err(Error::Msg(format!("slot {slot} is outside the KV cache")));
        }
        let Self { pool, slots, positions, angles, .. } = self;
        let row = QkvRow { attention, weights, angles: angles.of(attention)? };
        let (values, writer) = (PtrMut(qkv.values.as_mut_ptr()), cache.writer());
        by_rows(pool, t, width, &|index| {
            // SAFETY: the row is this task's alone, and so is its slot.
            unsafe {
                let qkv = std::slice::from_raw_parts_mut(values.ptr().add(index * width), width);
                row.prepare(index, positions[index], qkv);
                let (k, v) = qkv[attention.q_width()..].split_at(attention.kv_width());
                writer.store(slots[index] as usize, k, v);
            }
        });
        Ok(())
    }

    fn attend(
        &mut self,
        qkv: &Buffer,
        attention: &AttentionSpec,
        weights: &AttentionWeights<Vec<f32>>,
        cache: &KvCache,
        out: &mut Buffer,
    ) -> Result<()> {
        out.resize(qkv.rows, attention.q_width())?;
        let (q, sinks, target) = (qkv.values(), weights.sinks.as_deref(), &mut out.values[..qkv.rows * attention.q_width()]);
        attention::paged(&mut self.pool, q, qkv.width, attention, sinks, cache, &self.rows, &mut self.attention, target);
        Ok(())
    }

    fn copy_states(&mut self, state: &mut Buffer) -> Result<()> {
        self.states.check(self.rows.len(), state.rows)?;
        for (from, to) in &self.states.copies {
            let from = *from as usize * state.width;
            state.values.copy_within(from..from + state.width, *to as usize * state.width);
        }
        Ok(())
    }

    fn causal_conv(&mut self, x: &Buffer, conv: &CausalConv<Vec<f32>>, state: &mut Buffer, out: &mut Buffer) -> Result<()> {
        let spec = conv.spec;
        let is_whole = (x.rows, state.width) == (self.tokens.len(), spec.state_width()) && x.width == spec.input_width();
        if !is_whole || conv.weight.len() != spec.channels * spec.kernel {
            return Err(Error::Msg(format!("rows of {} numbers and states of {} for {spec:?}", x.width, state.width)));
        }
        self.states.check(self.rows.len(), state.rows)?;
        out.resize(x.rows, spec.channels)?;
        conv::Job { conv, rows: &self.rows, states: &self.states }.run(&mut self.pool, x, state, out);
        Ok(())
    }

    fn gated_delta(
        &mut self,
        qkv: &mut Buffer,
        gates: &mut Buffer,
        z: &Buffer,
        delta: &GatedDelta<Vec<f32>>,
        state: &mut Buffer,
        out: &mut Buffer,
    ) -> Result<()> {
        let (t, spec) = (self.tokens.len(), delta.spec);
        let widths = (qkv.width, gates.width, z.width, state.width);
        let expected = (spec.qkv_width(), 2 * spec.value_heads, spec.value_width(), spec.state_width());
        if widths != expected || [qkv.rows, gates.rows, z.rows] != [t; 3] || spec.key_dim > DeltaSpec::MOST_KEY_DIM {
            return Err(Error::Msg(format!("rows and states of {widths:?} numbers for {spec:?}")));
        }
        self.states.check(self.rows.len(), state.rows)?;
        out.resize(t, spec.value_width())?;
        delta::Job { delta, rows: &self.rows, states: &self.states }.run(&mut self.pool, qkv, gates, z, state, out);
        Ok(())
    }

    fn linear_heads(
        &mut self,
        x: &Buffer,
        columns: HeadColumns,
        weights: &[Linear<Packed, Vec<f32>>],
        scratch: &mut [Buffer; 2],
        out: &mut Buffer,
    ) -> Result<()> {
        let Some((n, k)) = weights.first().map(|linear| (linear.weight.n, linear.weight.k)) else {
            return Err(Error::Msg("no heads".into()));
        };
        let end = columns.first + (weights.len() - 1) * columns.stride + k;
        if end > x.width || weights.iter().any(|linear| (linear.weight.n, linear.weight.k) != (n, k)) {
            return Err(Error::Msg(format!("rows of {} numbers for {} heads of {k} at {columns:?}", x.width, weights.len())));
        }
        scratch[0].resize(x.rows, k)?;
        scratch[1].resize(x.rows, n)?;
        out.resize(x.rows, weights.len() * n)?;
        latent::linear_heads(&mut self.pool, x, columns, weights, &mut self.scratch, scratch, out);
        Ok(())
    }

    fn latent_rows(
        &mut self,
        q: &Buffer,
        absorbed: &Buffer,
        latent: &Buffer,
        spec: &LatentSpec,
        norm: &Vec<f32>,
        out: &mut Buffer,
    ) -> Result<()> {
        let widths = (q.width, absorbed.width, latent.width, norm.len());
        let expected = (spec.heads * (spec.nope_dim + spec.rope_dim), spec.heads * spec.rank, spec.head_dim(), spec.rank);
        if widths != expected || [absorbed.rows, latent.rows] != [q.rows; 2] {
            return Err(Error::Msg(format!("rows of {widths:?} numbers for {spec:?}")));
        }
        out.resize(q.rows, (spec.heads + 2) * spec.head_dim())?;
        latent::latent_rows(&mut self.pool, [q, absorbed, latent], spec, norm, out);
        Ok(())
    }

    fn experts(
        &mut self,
        x: &Buffer,
        router: &Buffer,
        experts: &Experts<Packed, Vec<f32>>,
        epilogue: Epilogue,
        out: &mut Buffer,
    ) -> Result<()> {
        if epilogue == Epilogue::Store {
            out.resize(x.rows, x.width)?;
            out.values_mut().fill(0.0);
        }
        let factor = match epilogue {
            Epilogue::Add(factor) => factor,
            Epilogue::Store => 1.0,
            other => return Err(Error::Msg(format!("experts have no epilogue {other:?}"))),
        };
        self.experts.run(&mut self.pool, &mut self.scratch, x, router, experts, factor, out)
    }

    fn copy(&mut self, x: &Buffer, out: &mut Buffer) -> Result<()> {
        out.resize(x.rows, x.width)?;
        out.values_mut().copy_from_slice(x.values());
        Ok(())
    }

    fn pick(&mut self, x: &Buffer, rows: &[usize], out: &mut Buffer) -> Result<()> {
        out.resize(rows.len(), x.width)?;
        for (row, out) in rows.iter().zip(out.values.chunks_exact_mut(x.width)) {
            if *row >= x.rows {
                return Err(Error::Msg(format!("row {row} of {}", x.rows)));
            }
            out.copy_from_slice(&x.values[row * x.width..(row + 1) * x.width]);
        }
        Ok(())
    }

    fn mean(&mut self, x: &Buffer, spans: &[Range<usize>], out: &mut Buffer) -> Result<()> {
        out.resize(spans.len(), x.width)?;
        for (span, out) in spans.iter().zip(out.values.chunks_exact_mut(x.width)) {
            if span.is_empty() || span.end > x.rows {
                return Err(Error::Msg(format!("the mean of rows {span:?} of {}", x.rows)));
            }
            out.fill(0.0);
            for row in x.values[span.start * x.width..span.end * x.width].chunks_exact(x.width) {
                out.iter_mut().zip(row).for_each(|(out, x)| *out += x);
            }
            let share = 1.0 / span.len() as f32;
            out.iter_mut().for_each(|out| *out *= share);
        }
        Ok(())
    }

    fn scale_and_cap(&mut self, x: &mut Buffer, scale: f32, cap: Option<f32>) -> Result<()> {
        let (rows, width, values) = (x.rows, x.width, PtrMut(x.values.as_mut_ptr()));
        self.pool.run(rows, &|row, _| {
            // SAFETY: one row, one task.
            let row = unsafe { std::slice::from_raw_parts_mut(values.ptr().add(row * width), width) };
            match cap {
                Some(cap) => row.iter_mut().for_each(|x| *x = cap * elementwise::tanh(*x * scale / cap)),
                None => row.iter_mut().for_each(|x| *x *= scale),
            }
        });
        Ok(())
    }

    fn connect(&mut self, member: Member) -> Result<()> {
        member.meet().map_err(Error::Msg)?;
        self.member = Some(member);
        Ok(())
    }

    fn all_reduce(&mut self, x: &mut Buffer) -> Result<()> {
        let Some(member) = &mut self.member else { return Err(Error::Msg("no other ranks".into())) };
        member.all_reduce(x.values_mut()).map_err(Error::Msg)
    }

    fn gate_rows(&mut self, gates: &Buffer, x: &mut Buffer) -> Result<()> {
        if gates.rows != x.rows || gates.width == 0 || !x.width.is_multiple_of(gates.width) {
            return Err(Error::Msg(format!("[{}, {}] are no gates of [{}, {}]", gates.rows, gates.width, x.rows, x.width)));
        }
        let part = x.width / gates.width;
        for (gate, part) in gates.values().iter().zip(x.values_mut().chunks_exact_mut(part)) {
            let factor = 1.0 / (1.0 + elementwise::exp(-gate));
            part.iter_mut().for_each(|x| *x *= factor);
        }
        Ok(())
    }

    fn each_row(&mut self, x: &mut Buffer, visit: RowVisitor<'_>) -> Result<()> {
        let (rows, width, values) = (x.rows, x.width, PtrMut(x.values.as_mut_ptr()));
        self.pool.run(rows, &|row, _| {
            // SAFETY: one row, one task.
            visit(row, unsafe { std::slice::from_raw_parts_mut(values.ptr().add(row * width), width) });
        });
        Ok(())
    }

    fn buffer_memory(buffer: &mut Buffer) -> &mut [u8] {
        prefault::bytes_of(&mut buffer.values)
    }

    fn cache_memory(cache: &mut KvCache) -> [&mut [u8]; 2] {
        cache.memory()
    }

    fn state_memory(state: &mut Buffer) -> &mut [u8] {
        prefault::bytes_of(&mut state.values)
    }

    fn own_memory(&mut self) -> Vec<&mut [u8]> {
        self.scratch.memory().chain([self.attention.memory()]).chain(self.experts.memory()).collect()
    }
}

/// The width of the output, if these belong together.
fn check_linear(w: &Packed, width: usize, epilogue: Epilogue) -> Result<usize> {
    let gated = matches!(epilogue, Epilogue::Gated(_));
    if w.k != width || gated != (w.columns == Columns::Gated) {
        return Err(Error::Msg(format!("rows of {width} numbers cannot be multiplied with {w:?} and end in {epilogue:?}")));
    }
    Ok(if gated { w.n / 2 } else { w.n })
}

fn norm_row(x: &[f32], norm: &Norm<Vec<f32>>, out: &mut [f32]) {
    match norm.kind {
        NormKind::Rms => elementwise::rms_norm(x, &norm.weight, norm.eps, out),
        NormKind::Layer => elementwise::layer_norm(x, &norm.weight, norm.bias.as_deref(), norm.eps, out),
    }
}

/// Cosines and sines of the tokens of a step.
#[derive(Debug, Default)]
struct Angles {
    /// Of each rope table `[t, pairs]`, one table after another.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Of each rope table.
    pairs: Vec<usize>,
    tokens: usize,
}

/// Those of one rope table, `[t, pairs]` each.
#[derive(Clone, Copy)]
struct TableAngles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    pairs: usize,
}

impl Angles {
    fn with_capacity(tokens: usize, frequencies: usize) -> Self {
        let numbers = || Vec::with_capacity(tokens * frequencies);
        Self { cos: numbers(), sin: numbers(), pairs: Vec::with_capacity(8), tokens: 0 }
    }

    fn fill(&mut self, batch: &Batch<'_>) {
        self.tokens = batch.tokens.len();
        self.cos.clear();
        self.sin.clear();
        self.pairs.clear();
        for table in batch.ropes {
            self.pairs.push(table.frequencies.len());
            for position in batch.positions {
                for frequency in &table.frequencies {
                    let angle = *position as f32 * frequency;
                    self.cos.push(angle.cos() * table.factor);
                    self.sin.push(angle.sin() * table.factor);
                }
            }
        }
    }

    /// The angles of a kind of attention; none where nothing is rotated.
    fn of(&self, attention: &AttentionSpec) -> Result<Option<TableAngles<'_>>> {
        let Some(rope) = attention.rope else { return Ok(None) };
        let Some(pairs) = self.pairs.get(rope.table).copied().filter(|pairs| 2 * pairs <= attention.head_dim) else {
            return Err(Error::Msg(format!("no rope table {} for heads of {}", rope.table, attention.head_dim)));
        };
        let start = self.tokens * self.pairs[..rope.table].iter().sum::<usize>();
        let range = start..start + self.tokens * pairs;
        Ok(Some(TableAngles { cos: &self.cos[range.clone()], sin: &self.sin[range], pairs }))
    }
}

/// What happens to one token's queries, keys and values before attention.
struct QkvRow<'a> {
    attention: &'a AttentionSpec,
    weights: &'a AttentionWeights<Vec<f32>>,
    angles: Option<TableAngles<'a>>,
}

impl QkvRow<'_> {
    /// `qkv`: of the step's token `index`, in place.
    fn prepare(&self, index: usize, position: u32, qkv: &mut [f32]) {
        let AttentionSpec { head_dim: d, rope, qk_norm, value_norm, query_growth, .. } = *self.attention;
        let (q, kv) = qkv.split_at_mut(self.attention.q_width());
        let (k, v) = kv.split_at_mut(self.attention.kv_width());
        if let Some(norm) = qk_norm.filter(|norm| !norm.after_rope) {
            self.norm(norm, q, k);
        }
        if let (Some(rope), Some(TableAngles { cos, sin, pairs })) = (rope, self.angles) {
            let of_token = index * pairs..(index + 1) * pairs;
            let (cos, sin) = (&cos[of_token.clone()], &sin[of_token]);
            elementwise::rope_row(q, d, rope.pairing, cos, sin);
            elementwise::rope_row(k, d, rope.pairing, cos, sin);
        }
        if let Some(norm) = qk_norm.filter(|norm| norm.after_rope) {
            self.norm(norm, q, k);
        }
        if let Some(eps) = value_norm {
            v.chunks_exact_mut(d).for_each(|head| elementwise::rms_norm_in_place(head, None, eps));
        }
        if let Some(growth) = query_growth {
            let factor = QueryGrowth::factor(&growth, position);
            q.iter_mut().for_each(|q| *q *= factor);
        }
    }

    fn norm(&self, norm: QkNorm, q: &mut [f32], k: &mut [f32]) {
        let d = self.attention.head_dim;
        for (x, weight) in [(q, &self.weights.q_norm), (k, &self.weights.k_norm)] {
            let extent = if norm.extent == NormExtent::Head { d } else { x.len() };
            x.chunks_exact_mut(extent).for_each(|x| elementwise::rms_norm_in_place(x, weight.as_deref(), norm.eps));
        }
    }
}

/// Runs `f` for each of `rows` rows, on all threads when it is worth it.
fn by_rows(pool: &mut Pool, rows: usize, width: usize, f: &(dyn Fn(usize) + Sync)) {
    if rows * width < PARALLEL_VALUES {
        (0..rows).for_each(f);
    } else {
        pool.run(rows.div_ceil(TASK_ROWS), &|task, _| (task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS)).for_each(f));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ExpertLimits;
    use crate::testing::plain_attention;

    #[test]
    fn bytes_are_what_is_allocated() {
        let limits = |max_tokens, block_size, experts| StepLimits {
            max_tokens,
            max_logits: 16,
            widest: 768,
            block_size,
            attention: vec![plain_attention(8, 2, 64), plain_attention(4, 1, 128)],
            frequencies: 96,
            experts,
        };
        let routed = Some(ExpertLimits { hidden: 64, intermediate: 96, experts: 8, top_k: 3 });
        for (max_tokens, block_size, threads, experts) in [(1, 16, 1, None), (37, 48, 2, None), (256, 32, 4, routed), (2048, 64, 3, routed)]
        {
            let limits = limits(max_tokens, block_size, experts);
            let mut cpu = Cpu::new(&limits, threads, ComputeDtype::F32).unwrap();
            let ids = 4 * (cpu.tokens.capacity() + cpu.positions.capacity() + cpu.slots.capacity() + cpu.types.capacity());
            let angles = 4 * (cpu.angles.cos.capacity() + cpu.angles.sin.capacity());
            let rows = cpu.rows.capacity() * size_of::<BatchRow>();
            let tiles = attention::Scratch::bytes(max_tokens, 0, &limits.attention, block_size).unwrap();
            let lists = cpu.experts.list_bytes();
            let buffers: usize = cpu.own_memory().iter().map(|memory| memory.len()).sum();
            let all = buffers + ids + angles + rows + tiles + lists;
            assert_eq!(Cpu::own_bytes(&limits, threads), Some(all), "{max_tokens} tokens, {threads} threads");
        }
        assert_eq!(Cpu::own_bytes(&limits(usize::MAX / 1000, 16, None), 1), None);
        assert_eq!(Cpu::own_bytes(&limits(1, 16, None), usize::MAX / 8), None);
        assert_eq!(Cpu::buffer_bytes(3, 5), Some(60));
        assert_eq!(Cpu::buffer_bytes(usize::MAX / 8, 8), None);
    }
}
