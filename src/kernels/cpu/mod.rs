//! CPU kernels over candle's CPU storage, in f32; weights may be bf16.

use candle_core::{CpuStorage, DType, Device, Error, InplaceOp1, Layout, Result, Storage, Tensor};
use rayon::prelude::*;

use super::{Batch, KvCache, Rope};

mod attention;
mod elementwise;
mod matmul;
pub(crate) mod simd;
pub mod softmax;
pub(crate) mod vectorize;

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

/// Values above which elementwise kernels use all threads.
const PARALLEL_VALUES: usize = 64 * 1024;

/// A slice type of candle's CPU storage.
trait Element: Sized {
    fn slice(storage: &CpuStorage) -> Result<&[Self]>;
}

macro_rules! element {
    ($type:ty, $variant:ident) => {
        impl Element for $type {
            fn slice(storage: &CpuStorage) -> Result<&[Self]> {
                match storage {
                    CpuStorage::$variant(values) => Ok(values),
                    other => Err(Error::Msg(format!(
                        "expected {} on the CPU, got {:?}",
                        stringify!($variant),
                        candle_core::backend::BackendStorage::dtype(other)
                    ))),
                }
            }
        }
    };
}
element!(f32, F32);
element!(half::bf16, BF16);
element!(u32, U32);

/// Runs `f` on the values of a contiguous CPU tensor.
fn with_values<T: Element, R>(tensor: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Err(Error::Msg("expected a tensor on the CPU".into())) };
    f(contiguous(T::slice(storage)?, layout)?)
}

fn contiguous<'a, T>(values: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&values[from..to]),
        None => Err(Error::Msg(format!("expected a contiguous tensor, got {layout:?}"))),
    }
}

/// Reads `values` as fast as one thread can, and returns their sum: for measuring memory.
pub fn read(values: &[f32]) -> f32 {
    elementwise::sum(values)
}

pub fn embed(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (vocab, hidden) = table.dims2()?;
    let ids = ids.to_vec1::<u32>()?;
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
        return Err(Error::Msg(format!("token id {id} is outside the vocabulary of {vocab}")));
    }
    let mut out = Vec::with_capacity(ids.len() * hidden);
    let row = |id: &u32| *id as usize * hidden..(*id as usize + 1) * hidden;
    match table.dtype() {
        DType::BF16 => with_values::<half::bf16, _>(table, |table| {
            ids.iter().for_each(|id| out.extend(table[row(id)].iter().map(|value| value.to_f32())));
            Ok(())
        })?,
        _ => with_values::<f32, _>(table, |table| {
            ids.iter().for_each(|id| out.extend_from_slice(&table[row(id)]));
            Ok(())
        })?,
    }
    Tensor::from_vec(out, (ids.len(), hidden), &Device::Cpu)
}

pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let ((t, k), (n, k_w)) = (x.dims2()?, w.dims2()?);
    if k != k_w {
        return Err(Error::Msg(format!("linear: input width {k} against weight [{n}, {k_w}]")));
    }
    let mut out = vec![0f32; t * n];
    with_values::<f32, _>(x, |x| match w.dtype() {
        DType::BF16 => with_values(w, |w| {
            matmul::matmul_bf16(x, w, &mut out, k);
            Ok(())
        }),
        _ => with_values(w, |w| {
            matmul::matmul_f32(x, w, &mut out, k);
            Ok(())
        }),
    })?;
    if let Some(bias) = bias {
        with_values::<f32, _>(bias, |bias| {
            out.chunks_exact_mut(n).for_each(|row| row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias));
            Ok(())
        })?;
    }
    Tensor::from_vec(out, (t, n), &Device::Cpu)
}

/// Applies `f` to rows of `width_in` values of `x`, giving rows of `width_out`, on all threads when it is worth it.
fn by_rows(x: &[f32], width_in: usize, width_out: usize, f: impl Fn(&[f32], &mut [f32]) + Sync) -> Vec<f32> {
    let mut out = vec![0f32; x.len() / width_in * width_out];
    if x.len() < PARALLEL_VALUES {
        x.chunks_exact(width_in).zip(out.chunks_exact_mut(width_out)).for_each(|(x, out)| f(x, out));
    } else {
        x.par_chunks_exact(width_in).zip(out.par_chunks_exact_mut(width_out)).with_min_len(4).for_each(|(x, out)| f(x, out));
    }
    out
}

pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    let width = w.elem_count();
    let out = with_values::<f32, _>(x, |x| {
        with_values::<f32, _>(w, |w| Ok(by_rows(x, width, width, |x, out| elementwise::rms_norm(x, w, eps, out))))
    })?;
    Tensor::from_vec(out, x.shape(), &Device::Cpu)
}

pub fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    let (t, width) = gate_up.dims2()?;
    let n = width / 2;
    let out = with_values::<f32, _>(gate_up, |x| Ok(by_rows(x, width, n, |x, out| elementwise::silu_mul(&x[..n], &x[n..], out))))?;
    Tensor::from_vec(out, (t, n), &Device::Cpu)
}

/// Copies the rotated keys, or the values, of a step into their slots.
struct Store<'a> {
    /// `[t, qkv width]`
    qkv: &'a [f32],
    /// Column of the first value to store, and the width of a whole row of qkv.
    column: usize,
    width: usize,
    slots: &'a [u32],
    /// Values per slot: kv · d.
    slot_width: usize,
}

impl InplaceOp1 for Store<'_> {
    fn name(&self) -> &'static str {
        "kv-store"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let CpuStorage::F32(cache) = storage else { return Err(Error::Msg("the KV cache on the CPU is f32".into())) };
        let Some((from, to)) = layout.contiguous_offsets() else { return Err(Error::Msg("the KV cache is contiguous".into())) };
        let cache = &mut cache[from..to];
        for (token, slot) in self.slots.iter().enumerate() {
            let source = token * self.width + self.column;
            let target = *slot as usize * self.slot_width;
            cache[target..target + self.slot_width].copy_from_slice(&self.qkv[source..source + self.slot_width]);
        }
        Ok(())
    }
}

pub fn rope_and_store(qkv: &Tensor, heads: usize, rope: Rope, batch: &Batch, cache: &KvCache) -> Result<Tensor> {
    let (t, width) = qkv.dims2()?;
    let (_, _, kv, d) = cache.k.dims4()?;
    let slots = batch.slots.to_vec1::<u32>()?;
    let rotated = with_values::<f32, _>(qkv, |qkv| {
        with_values::<f32, _>(&batch.cos, |cos| {
            with_values::<f32, _>(&batch.sin, |sin| Ok(elementwise::rope_rows(qkv, width, heads + kv, d, rope, cos, sin)))
        })
    })?;
    let slot_width = kv * d;
    cache.k.inplace_op1(&Store { qkv: &rotated, column: heads * d, width, slots: &slots, slot_width })?;
    cache.v.inplace_op1(&Store { qkv: &rotated, column: heads * d + slot_width, width, slots: &slots, slot_width })?;
    let mut q = Vec::with_capacity(t * heads * d);
    rotated.chunks_exact(width).for_each(|row| q.extend_from_slice(&row[..heads * d]));
    Tensor::from_vec(q, (t, heads * d), &Device::Cpu)
}

pub fn paged_attention(q: &Tensor, batch: &Batch, cache: &KvCache) -> Result<Tensor> {
    let (t, width) = q.dims2()?;
    let (_, block_size, kv, d) = cache.k.dims4()?;
    let shape = attention::Shape { heads: width / d, kv, d, block_size };
    let out = with_values::<f32, _>(q, |q| {
        with_values::<f32, _>(&cache.k, |k| with_values::<f32, _>(&cache.v, |v| Ok(attention::paged(q, k, v, &batch.rows, shape))))
    })?;
    Tensor::from_vec(out, (t, width), &Device::Cpu)
}
