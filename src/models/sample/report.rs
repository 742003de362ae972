//! How probable a token was, and which were the most probable.

use super::nucleus;
use crate::kernels::cpu::softmax;
use crate::models::{Logprobs, LogprobsMode, LogprobsSpec};

/// The logits that a report is of.
pub struct Rows<'a> {
    /// Those to be told of, and at which temperature.
    pub told: &'a [f32],
    pub temperature: f32,
    /// The model's own.
    pub raw: &'a [f32],
}

/// What `rows` say of `token`. `sums` and `kept` are scratch.
pub fn report(rows: &Rows<'_>, token: u32, spec: LogprobsSpec, sums: &mut Vec<f64>, kept: &mut Vec<(u32, f32)>) -> Logprobs {
    let Rows { told, temperature, raw } = *rows;
    // What has no token is as improbable as what must not be drawn.
    let of = |row: &[f32]| row.get(token as usize).copied().filter(|logit| !logit.is_nan()).unwrap_or(f32::NEG_INFINITY);
    let shift = if spec.mode.is_logits() { 0.0 } else { normalizer(told, temperature, sums) };
    let value = |logit: f32| (f64::from(logit / temperature) - shift) as f32;
    let own = value(of(told));
    let raw = if spec.mode == LogprobsMode::RawLogprobs { own } else { (f64::from(of(raw)) - normalizer(raw, 1.0, sums)) as f32 };
    nucleus::greatest(told, (spec.top as usize).min(told.len()), kept);
    Logprobs { own, rank: softmax::count_at_least(told, of(told)), top: kept.iter().map(|(id, logit)| (*id, value(*logit))).collect(), raw }
}

/// A log probability is the logit less this, the logarithm of the sum of all exponentials.
fn normalizer(row: &[f32], temperature: f32, sums: &mut Vec<f64>) -> f64 {
    let max = softmax::max(row);
    softmax::exp_sums(row, max, 1.0 / temperature, sums);
    f64::from(max / temperature) + sums.iter().sum::<f64>().ln()
}
