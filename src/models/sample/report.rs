//! How probable a token was, and which were the most probable.

use super::nucleus;
use crate::kernels::cpu::softmax;
use crate::models::{Logprobs, LogprobsSpec};

/// What `row` says of `token` at this temperature. `sums` and `kept` are scratch.
pub fn report(row: &[f32], temperature: f32, token: u32, spec: LogprobsSpec, sums: &mut Vec<f64>, kept: &mut Vec<(u32, f32)>) -> Logprobs {
    // A log probability is the logit less the logarithm of the sum of all exponentials.
    let shift = if spec.mode.is_logits() {
        0.0
    } else {
        let max = softmax::max(row);
        softmax::exp_sums(row, max, 1.0 / temperature, sums);
        f64::from(max / temperature) + sums.iter().sum::<f64>().ln()
    };
    let value = |logit: f32| (f64::from(logit / temperature) - shift) as f32;
    let own = row.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    nucleus::greatest(row, (spec.top as usize).min(row.len()), kept);
    Logprobs {
        own: value(own),
        rank: softmax::count_at_least(row, own),
        top: kept.iter().map(|(id, logit)| (*id, value(*logit))).collect(),
    }
}
