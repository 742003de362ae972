//! The gated delta rule as matrix products, token after token.

use candle_core::{D, DType, Result, Tensor};

use crate::{BatchRow, DeltaSpec, GatedDelta, StepStates};

/// `[t, value width]` in f32, before the norm; keeps states in `state [slots, width]`.
fn recurrent(
    qkv: &Tensor,
    gates: &Tensor,
    delta: &GatedDelta<Tensor>,
    rows: &[BatchRow],
    states: &StepStates,
    state: &Tensor,
) -> Result<Tensor> {
    let DeltaSpec { key_heads, value_heads, key_dim, value_dim, .. } = delta.spec;
    let (t, key_width) = (qkv.dim(0)?, delta.spec.key_width());
    // Each key head serves several value heads.
    let unit = |from: usize| -> Result<Tensor> {
        let x = qkv.narrow(1, from, key_width)?.reshape((t, key_heads, 1, key_dim))?;
        let x = x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)? + 1e-6)?.sqrt()?)?;
        x.broadcast_as((t, key_heads, value_heads / key_heads, key_dim))?.reshape((t, value_heads, key_dim))
    };
    let (q, k) = ((unit(0)? / (key_dim as f64).sqrt())?, unit(key_width)?);
    let v = qkv.narrow(1, 2 * key_width, value_heads * value_dim)?.reshape((t, value_heads, value_dim))?;
    let correction = candle_nn::ops::sigmoid(&gates.narrow(1, 0, value_heads)?.contiguous()?)?;
    let shrink = gates.narrow(1, value_heads, value_heads)?.broadcast_add(&delta.decay_bias.to_dtype(DType::F32)?)?;
    // softplus(x) = max(x, 0) + ln(1 + e^-|x|)
    let soft = (shrink.relu()? + (shrink.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    let decay = soft.broadcast_mul(&delta.decay.to_dtype(DType::F32)?)?.neg()?.exp()?;
    let mut out = Vec::with_capacity(t);
    for (index, row) in rows.iter().enumerate() {
        let shape = (value_heads, key_dim, value_dim);
        let mut s = match states.start(index, row) {
            Some(slot) => state.get(slot)?.reshape(shape)?.force_contiguous()?,
            None => Tensor::zeros(shape, DType::F32, qkv.device())?,
        };
        for token in row.start..row.start + row.len {
            let of = |x: &Tensor| x.get(token)?.reshape((value_heads, 1, 1));
            s = s.broadcast_mul(&of(&decay)?)?;
            let (q, k) = (q.get(token)?.unsqueeze(1)?, k.get(token)?.unsqueeze(1)?);
            let change = (v.get(token)?.unsqueeze(1)? - k.contiguous()?.matmul(&s)?)?.broadcast_mul(&of(&correction)?)?;
            s = (s + k.transpose(1, 2)?.contiguous()?.matmul(&change)?)?;
            out.push(q.contiguous()?.matmul(&s)?.reshape((1, value_heads * value_dim))?);
            for save in states.kept(row).iter().filter(|save| save.token as usize == token) {
                state.slice_set(&s.reshape((1, delta.spec.state_width()))?.force_contiguous()?, 0, save.slot as usize)?;
            }
        }
    }
    Tensor::cat(&out, 0)
}

/// See [`Backend::gated_delta`](crate::Backend::gated_delta).
pub fn gated_delta(
    [qkv, gates, z]: [&Tensor; 3],
    delta: &GatedDelta<Tensor>,
    rows: &[BatchRow],
    states: &StepStates,
    state: &Tensor,
) -> Result<Tensor> {
    let (t, dim, heads) = (qkv.dim(0)?, delta.spec.value_dim, delta.spec.value_heads);
    let out = recurrent(&qkv.to_dtype(DType::F32)?, &gates.to_dtype(DType::F32)?, delta, rows, states, state)?;
    let out = out.reshape((t * heads, dim))?.to_dtype(z.dtype())?;
    candle_nn::ops::rms_norm(&out, &delta.norm, delta.spec.eps)?.reshape((t, heads * dim))?.mul(z)
}
