//! CPU kernels, all ours, in f32; weights may be bf16, or of 8 or 4 bits.
//!
//! [`Activations`] holds every buffer of a step: made once, so that a step allocates nothing.

use candle_core::{CpuStorage, Error, Result, Storage, Tensor};

use super::{BatchRow, Inputs, Products, Rope, Sizes};

pub mod attention;
mod elementwise;
pub mod matmul;
pub mod packed;
pub mod pool;
pub mod resident;
pub(crate) mod simd;
pub mod softmax;
pub(crate) mod vectorize;

pub use attention::Cache;
use matmul::Then;
use packed::{Columns, Packed};
use pool::Pool;

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

/// Runs `f` on the values of a contiguous f32 tensor on the CPU.
fn with_values<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(values)) = &*storage else { return Err(Error::Msg("expected a tensor of f32 on the CPU".into())) };
    match layout.contiguous_offsets() {
        Some((from, to)) => f(&values[from..to]),
        None => Err(Error::Msg(format!("expected a contiguous tensor, got {layout:?}"))),
    }
}

/// Reads `values` as fast as one thread can, and returns their sum: for measuring memory.
pub fn read(values: &[f32]) -> f32 {
    elementwise::sum(values)
}

/// The buffers of a step, and the threads that fill them.
pub struct Activations {
    pool: Pool,
    sizes: Sizes,
    /// Tokens of this step.
    t: usize,
    tokens: Vec<u32>,
    slots: Vec<u32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    rows: Vec<BatchRow>,
    /// `[t, hidden]`: the residual stream.
    x: Vec<f32>,
    /// `[t, hidden]`
    normed: Vec<f32>,
    /// `[t, (h + 2 kv)·d]`
    qkv: Vec<f32>,
    /// `[t, h·d]`
    attended: Vec<f32>,
    /// `[t, intermediate]`
    gated: Vec<f32>,
    /// `[picked, vocab]`
    logits: Vec<f32>,
    picked: usize,
    scratch: matmul::Scratch,
    attention: attention::Scratch,
}

impl Activations {
    pub fn new(sizes: Sizes, threads: usize, products: Products) -> std::io::Result<Self> {
        let pool = Pool::new(threads)?;
        let t = sizes.max_tokens;
        let qkv = (sizes.heads + 2 * sizes.kv) * sizes.d;
        let widest = sizes.hidden.max(sizes.heads * sizes.d).max(sizes.intermediate);
        let shape = attention::Shape { kv: sizes.kv, d: sizes.d, block_size: sizes.block_size };
        Ok(Self {
            t: 0,
            tokens: Vec::with_capacity(t),
            slots: Vec::with_capacity(t),
            cos: Vec::with_capacity(t * sizes.d / 2),
            sin: Vec::with_capacity(t * sizes.d / 2),
            rows: Vec::with_capacity(t),
            x: vec![0.0; t * sizes.hidden],
            normed: vec![0.0; t * sizes.hidden],
            qkv: vec![0.0; t * qkv],
            attended: vec![0.0; t * sizes.heads * sizes.d],
            gated: vec![0.0; t * sizes.intermediate],
            logits: vec![0.0; sizes.max_logits * sizes.vocab],
            picked: 0,
            scratch: matmul::Scratch::with_capacity(matmul::scratch_values(t, widest).ok_or(std::io::ErrorKind::OutOfMemory)?, products),
            attention: attention::Scratch::new(t, pool.threads(), sizes.heads, shape),
            pool,
            sizes,
        })
    }

    /// Bytes of all buffers; `None`: more than can be counted.
    pub fn bytes(sizes: &Sizes, threads: usize) -> Option<usize> {
        let widest = sizes.hidden.max(sizes.heads * sizes.d).max(sizes.intermediate);
        // Of a token: id and slot, angles, row of the plan, values.
        let values = 2 * sizes.hidden + (2 * sizes.heads + 2 * sizes.kv) * sizes.d + sizes.intermediate;
        let per_token = 4 + 4 + 4 * sizes.d + size_of::<BatchRow>() + 4 * values;
        let shape = attention::Shape { kv: sizes.kv, d: sizes.d, block_size: sizes.block_size };
        let parts = [
            sizes.max_tokens.checked_mul(per_token)?,
            4 * sizes.max_logits * sizes.vocab,
            matmul::Scratch::bytes(matmul::scratch_values(sizes.max_tokens, widest)?)?,
            attention::Scratch::bytes(sizes.max_tokens, threads, sizes.heads, shape)?,
        ];
        parts.into_iter().try_fold(0usize, usize::checked_add)
    }

    /// The memory of all buffers worth taking, between two steps.
    pub fn areas(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let values = [&mut self.x, &mut self.normed, &mut self.qkv, &mut self.attended, &mut self.gated, &mut self.logits];
        let values = values.into_iter().map(|values| resident::bytes_of(values));
        values.chain(self.scratch.areas()).chain(self.attention.areas())
    }

    pub fn begin(&mut self, inputs: &Inputs<'_>) -> Result<()> {
        if inputs.tokens.len() > self.sizes.max_tokens {
            return Err(Error::Msg(format!("a step of {} tokens, and room for {}", inputs.tokens.len(), self.sizes.max_tokens)));
        }
        self.t = inputs.tokens.len();
        self.tokens.clear();
        self.tokens.extend_from_slice(inputs.tokens);
        self.slots.clear();
        self.slots.extend_from_slice(inputs.slots);
        self.cos.clear();
        self.sin.clear();
        for position in inputs.positions {
            for f in inputs.frequencies {
                let angle = *position as f32 * f;
                self.cos.push(angle.cos());
                self.sin.push(angle.sin());
            }
        }
        self.rows.clear();
        self.rows.extend_from_slice(inputs.rows);
        self.attention.plan(&self.rows, self.sizes.heads, self.sizes.kv);
        Ok(())
    }

    /// See [`super::Activations::end`].
    pub fn end(&mut self) {
        self.rows.clear();
    }

    pub fn embed(&mut self, table: &Packed) -> Result<()> {
        let hidden = self.sizes.hidden;
        for (id, x) in self.tokens.iter().zip(self.x.chunks_exact_mut(hidden)) {
            if *id as usize >= table.n {
                return Err(Error::Msg(format!("token id {id} is outside the vocabulary of {}", table.n)));
            }
            table.row(*id as usize, x);
        }
        Ok(())
    }

    pub fn norm(&mut self, w: &Tensor, eps: f32) -> Result<()> {
        let (t, hidden) = (self.t, self.sizes.hidden);
        with_values(w, |w| {
            let (x, out) = (Ptr(self.x.as_ptr()), PtrMut(self.normed.as_mut_ptr()));
            by_rows(&mut self.pool, t, hidden, &|row| {
                // SAFETY: rows below t lie inside both, and each is one task's.
                let (x, out) = unsafe {
                    (
                        std::slice::from_raw_parts(x.ptr().add(row * hidden), hidden),
                        std::slice::from_raw_parts_mut(out.ptr().add(row * hidden), hidden),
                    )
                };
                elementwise::rms_norm(x, w, eps, out);
            });
            Ok(())
        })
    }

    /// `qkv = normed · wᵀ + b`
    pub fn project(&mut self, w: &Packed, bias: Option<&Tensor>) -> Result<()> {
        let x = &self.normed[..self.t * w.k];
        linear(&mut self.pool, x, w, bias, Then::Store, &mut self.scratch, &mut self.qkv[..self.t * w.n])
    }

    /// Rotates queries and keys in place; keys and values go to their slots.
    pub fn rope_and_store(&mut self, rope: Rope, cache: &mut Cache) -> Result<()> {
        let Sizes { heads, kv, d, .. } = self.sizes;
        let width = (heads + 2 * kv) * d;
        let slots = &self.slots;
        if let Some(slot) = slots.iter().find(|slot| **slot as usize >= cache.blocks * cache.shape.block_size) {
            return Err(Error::Msg(format!("slot {slot} is outside the KV cache")));
        }
        let (cos, sin) = (&self.cos, &self.sin);
        let (qkv, writer) = (PtrMut(self.qkv.as_mut_ptr()), cache.writer());
        by_rows(&mut self.pool, self.t, width, &|row| {
            let angles = row * d / 2..(row + 1) * d / 2;
            // SAFETY: the row is this task's alone, and so is its slot.
            unsafe {
                let qkv = std::slice::from_raw_parts_mut(qkv.ptr().add(row * width), width);
                elementwise::rope_row(&mut qkv[..(heads + kv) * d], d, rope, &cos[angles.clone()], &sin[angles]);
                attention::store(&writer, slots[row] as usize, qkv[heads * d..].as_ptr(), qkv[(heads + kv) * d..].as_ptr());
            }
        });
        Ok(())
    }

    pub fn attend(&mut self, cache: &Cache) -> Result<()> {
        let Sizes { heads, kv, d, .. } = self.sizes;
        let width = (heads + 2 * kv) * d;
        let (q, out) = (&self.qkv[..self.t * width], &mut self.attended[..self.t * heads * d]);
        attention::paged(&mut self.pool, q, width, cache, &self.rows, heads, &mut self.attention, out);
        Ok(())
    }

    /// `x += attended · wᵀ + b`
    pub fn add_attended(&mut self, w: &Packed, bias: Option<&Tensor>) -> Result<()> {
        let x = &self.attended[..self.t * w.k];
        linear(&mut self.pool, x, w, bias, Then::Add, &mut self.scratch, &mut self.x[..self.t * w.n])
    }

    /// `gated = silu(normed · gateᵀ) · (normed · upᵀ)`
    pub fn gate(&mut self, w: &Packed, bias: Option<&Tensor>) -> Result<()> {
        let x = &self.normed[..self.t * w.k];
        linear(&mut self.pool, x, w, bias, Then::Store, &mut self.scratch, &mut self.gated[..self.t * w.n / 2])
    }

    /// `x += gated · wᵀ + b`
    pub fn add_gated(&mut self, w: &Packed, bias: Option<&Tensor>) -> Result<()> {
        let x = &self.gated[..self.t * w.k];
        linear(&mut self.pool, x, w, bias, Then::Add, &mut self.scratch, &mut self.x[..self.t * w.n])
    }

    /// Logits of the tokens `positions`, at most `max_logits`; the residual stream stays.
    pub fn head(&mut self, positions: &[usize], norm: &Tensor, eps: f32, w: &Packed) -> Result<()> {
        let hidden = self.sizes.hidden;
        if positions.len() > self.sizes.max_logits || positions.iter().any(|position| *position >= self.t) {
            return Err(Error::Msg(format!("logits of {} tokens, and room for {}", positions.len(), self.sizes.max_logits)));
        }
        self.picked = positions.len();
        with_values(norm, |norm| {
            for (position, out) in positions.iter().zip(self.normed.chunks_exact_mut(hidden)) {
                elementwise::rms_norm(&self.x[position * hidden..(position + 1) * hidden], norm, eps, out);
            }
            Ok(())
        })?;
        let x = &self.normed[..self.picked * hidden];
        linear(&mut self.pool, x, w, None, Then::Store, &mut self.scratch, &mut self.logits[..self.picked * w.n])
    }

    /// What [`Activations::head`] made, `[picked, vocab]`.
    pub fn logits(&mut self) -> &mut [f32] {
        &mut self.logits[..self.picked * self.sizes.vocab]
    }

    /// Runs `f(row, logits)` for each row of logits, on all threads.
    pub fn each_logits(&mut self, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let vocab = self.sizes.vocab;
        let logits = PtrMut(self.logits.as_mut_ptr());
        self.pool.run(self.picked, &|row, _| {
            // SAFETY: one row, one task.
            f(row, unsafe { std::slice::from_raw_parts_mut(logits.ptr().add(row * vocab), vocab) });
        });
    }

    /// A buffer's values of this step, for tests: `x`, `normed`, `qkv`, `attended` or `gated`.
    pub fn values(&self, name: &str) -> &[f32] {
        let Sizes { heads, kv, d, hidden, intermediate, .. } = self.sizes;
        let (buffer, width) = match name {
            "x" => (&self.x, hidden),
            "normed" => (&self.normed, hidden),
            "qkv" => (&self.qkv, (heads + 2 * kv) * d),
            "attended" => (&self.attended, heads * d),
            _ => (&self.gated, intermediate),
        };
        &buffer[..self.t * width]
    }

    /// Sets the residual stream of this step, for tests.
    pub fn set_x(&mut self, x: &[f32]) {
        self.x[..x.len()].copy_from_slice(x);
    }
}

fn linear(
    pool: &mut Pool,
    x: &[f32],
    w: &Packed,
    bias: Option<&Tensor>,
    then: Then,
    scratch: &mut matmul::Scratch,
    out: &mut [f32],
) -> Result<()> {
    if w.columns == Columns::Gated && then == Then::Add {
        return Err(Error::Msg("gated columns are not added".into()));
    }
    match bias {
        None => matmul::matmul(pool, x, w, None, then, scratch, out),
        Some(bias) => with_values(bias, |bias| {
            matmul::matmul(pool, x, w, Some(bias), then, scratch, out);
            Ok(())
        })?,
    }
    Ok(())
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

    #[test]
    fn bytes_are_what_is_allocated() {
        let sizes = |max_tokens, block_size| Sizes {
            max_tokens,
            max_logits: 16,
            hidden: 256,
            heads: 8,
            kv: 2,
            d: 64,
            intermediate: 768,
            vocab: 1000,
            block_size,
        };
        for (max_tokens, block_size, threads) in [(1, 16, 1), (37, 48, 2), (256, 32, 4), (2048, 64, 3)] {
            let sizes = sizes(max_tokens, block_size);
            let mut values = Activations::new(sizes, threads, Products::F32).unwrap();
            let ids = 4 * (values.tokens.capacity() + values.slots.capacity() + values.cos.capacity() + values.sin.capacity());
            let rows = values.rows.capacity() * size_of::<BatchRow>();
            let tiles = attention::Scratch::bytes(max_tokens, 0, 8, attention::Shape { kv: 2, d: 64, block_size }).unwrap();
            let areas: usize = values.areas().map(|area| area.len()).sum();
            assert_eq!(Activations::bytes(&sizes, threads), Some(areas + ids + rows + tiles), "{max_tokens} tokens, {threads} threads");
        }
        assert_eq!(Activations::bytes(&sizes(usize::MAX / 1000, 16), 1), None);
        assert_eq!(Activations::bytes(&sizes(1, 16), usize::MAX / 8), None);
    }
}
