//! The kernels as compositions of candle's own operations: what CUDA runs in this version, and the oracle of the CPU kernels.

use candle_core::{D, DType, Result, Tensor};

use super::{Batch, BatchRow, KvCache, Rope};

pub fn embed(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    table.index_select(ids, 0)
}

pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let out = x.matmul(&w.t()?)?;
    match bias {
        Some(bias) => out.broadcast_add(bias),
        None => Ok(out),
    }
}

pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    candle_nn::ops::rms_norm(&x.contiguous()?, w, eps)
}

pub fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    let n = gate_up.dim(D::Minus1)? / 2;
    candle_nn::ops::silu(&gate_up.narrow(D::Minus1, 0, n)?.contiguous()?)?.mul(&gate_up.narrow(D::Minus1, n, n)?.contiguous()?)
}

pub fn rope_and_store(qkv: &Tensor, heads: usize, rope: Rope, batch: &Batch, cache: &KvCache) -> Result<Tensor> {
    let (t, _) = qkv.dims2()?;
    let (blocks, block_size, kv, d) = cache.k.dims4()?;
    let rotate = |from: usize, heads: usize| -> Result<Tensor> {
        // [t, heads·d] → [1, heads, t, d], the layout of candle's rope.
        let x = qkv.narrow(1, from, heads * d)?.reshape((1, t, heads, d))?.transpose(1, 2)?.contiguous()?;
        let wide = x.to_dtype(DType::F32)?; // angles at deep positions need every bit: rotate in f32
        let rotated = match rope {
            Rope::Interleaved => candle_nn::rotary_emb::rope_i(&wide, &batch.cos, &batch.sin)?,
            Rope::Half => candle_nn::rotary_emb::rope(&wide, &batch.cos, &batch.sin)?,
        };
        rotated.to_dtype(x.dtype())?.transpose(1, 2)?.reshape((t, heads * d))?.contiguous()
    };
    let q = rotate(0, heads)?;
    let k = rotate(heads * d, kv)?;
    let v = qkv.narrow(1, (heads + kv) * d, kv * d)?.contiguous()?;
    let index = batch.slots.unsqueeze(1)?.broadcast_as((t, kv * d))?.contiguous()?;
    for (cache, new) in [(&cache.k, k), (&cache.v, v)] {
        cache.reshape((blocks * block_size, kv * d))?.scatter_set(&index, &new.to_dtype(cache.dtype())?, 0)?;
    }
    Ok(q)
}

pub fn paged_attention(q: &Tensor, batch: &Batch, cache: &KvCache) -> Result<Tensor> {
    let rows = batch.rows.iter().map(|row| row_attention(q, row, cache)).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&rows, 0)
}

/// One row: gather its blocks, then plain attention. `[len, h·d]`.
fn row_attention(q: &Tensor, row: &BatchRow, cache: &KvCache) -> Result<Tensor> {
    let (_, block_size, kv, d) = cache.k.dims4()?;
    let heads = q.dim(1)? / d;
    let group = heads / kv;
    let blocks = Tensor::from_slice(&row.blocks[..row.context.div_ceil(block_size)], (row.context.div_ceil(block_size),), q.device())?;
    let gather = |cache: &Tensor| -> Result<Tensor> {
        let rows = cache.index_select(&blocks, 0)?.reshape(((), kv, d))?.narrow(0, 0, row.context)?;
        rows.transpose(0, 1)?.contiguous() // [kv, context, d]
    };
    let (k, v) = (gather(&cache.k)?, gather(&cache.v)?);
    // [len, kv, group, d] → [kv, group·len, d]: the heads that share keys go through one matmul.
    let q = q
        .narrow(0, row.start, row.len)?
        .reshape((row.len, kv, group, d))?
        .permute((1, 2, 0, 3))?
        .reshape((kv, group * row.len, d))?
        .contiguous()?;
    let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)?.to_dtype(DType::F32)? / (d as f64).sqrt())?;
    let scores = scores.reshape((kv * group, row.len, row.context))?;
    let scores = if row.len > 1 { scores.broadcast_add(&causal_mask(row, q.device())?)? } else { scores };
    let weights =
        candle_nn::ops::softmax_last_dim(&scores.contiguous()?)?.to_dtype(v.dtype())?.reshape((kv, group * row.len, row.context))?;
    let out = weights.matmul(&v)?.reshape((kv, group, row.len, d))?.permute((2, 0, 1, 3))?;
    out.reshape((row.len, heads * d))?.contiguous()
}

/// `[len, context]`: 0 where token i may look, −∞ elsewhere.
fn causal_mask(row: &BatchRow, device: &candle_core::Device) -> Result<Tensor> {
    let before = row.context - row.len;
    let mask = (0..row.len).flat_map(|i| (0..row.context).map(move |j| if j <= before + i { 0f32 } else { f32::NEG_INFINITY }));
    Tensor::from_vec(mask.collect::<Vec<_>>(), (row.len, row.context), device)
}
