//! Causal convolutions as sums of shifted rows.

use candle_core::{DType, Result, Tensor};

use crate::{BatchRow, CausalConv, ConvKind, StepStates};

/// `[t, channels]`: the convolution of `x [t, input width]`, row after row; keeps states in `state [slots, width]`.
pub fn causal_conv(x: &Tensor, conv: &CausalConv<Tensor>, rows: &[BatchRow], states: &StepStates, state: &Tensor) -> Result<Tensor> {
    let (channels, kernel) = (conv.spec.channels, conv.spec.kernel);
    let part = |index: usize| x.narrow(1, index * channels, channels);
    let (input, gate) = match conv.spec.kind {
        ConvKind::Gated => ((part(0)? * part(2)?)?, Some(part(1)?)),
        ConvKind::Silu => (x.clone(), None),
    };
    let weight = conv.weight.reshape((kernel, channels))?;
    let mut parts = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let own = input.narrow(0, row.start, row.len)?;
        let before = match states.start(index, row) {
            Some(slot) => state.get(slot)?.reshape((kernel - 1, channels))?.to_dtype(x.dtype())?,
            None => Tensor::zeros((kernel - 1, channels), x.dtype(), x.device())?,
        };
        let all = Tensor::cat(&[&before, &own], 0)?;
        let tap = |tap: usize| all.narrow(0, tap, row.len)?.broadcast_mul(&weight.get(tap)?);
        let mut sum = tap(0)?;
        for index in 1..kernel {
            sum = (sum + tap(index)?)?;
        }
        parts.push(sum);
        for (slot, seen) in states.saves(index, row) {
            let kept = all.narrow(0, seen, kernel - 1)?.to_dtype(DType::F32)?.reshape((1, conv.spec.state_width()))?;
            state.slice_set(&kept.contiguous()?, 0, slot)?;
        }
    }
    let out = Tensor::cat(&parts, 0)?;
    let out = match &conv.bias {
        Some(bias) => out.broadcast_add(bias)?,
        None => out,
    };
    match gate {
        Some(gate) => gate * out,
        None => candle_nn::ops::silu(&out),
    }
}
