//! How probable a token was, and which were the most probable.

use super::nucleus;
use crate::kernels::cpu::softmax;
use crate::models::{Logprobs, LogprobsMode, LogprobsSpec};

/// The logits that a report is made from.
pub struct Rows<'a> {
    /// The logits to report.
    pub reported: &'a [f32],
    /// Divides them.
    pub temperature: f32,
    /// The logits as the model gave them.
    pub raw: &'a [f32],
}

/// How probable `token` was. `sums` and `kept` are scratch.
pub fn report(rows: &Rows<'_>, token: u32, spec: LogprobsSpec, sums: &mut Vec<f64>, kept: &mut Vec<(u32, f32)>) -> Logprobs {
    let Rows { reported, temperature, raw } = *rows;
    // An id without a token is as improbable as one that must not be sampled.
    let of = |row: &[f32]| row.get(token as usize).copied().filter(|logit| !logit.is_nan()).unwrap_or(f32::NEG_INFINITY);
    let shift = if spec.mode.is_logits() { 0.0 } else { normalizer(reported, temperature, sums) };
    let value = |logit: f32| (f64::from(logit / temperature) - shift) as f32;
    let own = value(of(reported));
    let raw = if spec.mode == LogprobsMode::RawLogprobs { own } else { (f64::from(of(raw)) - normalizer(raw, 1.0, sums)) as f32 };
    nucleus::greatest(reported, (spec.top as usize).min(reported.len()), kept);
    Logprobs {
        own,
        rank: softmax::count_at_least(reported, of(reported)),
        top: kept.iter().map(|(id, logit)| (*id, value(*logit))).collect(),
        raw,
    }
}

/// The logarithm of the sum of all exponentials. A log probability is the logit minus this.
fn normalizer(row: &[f32], temperature: f32, sums: &mut Vec<f64>) -> f64 {
    let max = softmax::max(row);
    softmax::exp_sums(row, max, 1.0 / temperature, sums);
    f64::from(max / temperature) + sums.iter().sum::<f64>().ln()
}
