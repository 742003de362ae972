//! Samples one token from one row of logits. Order of operations: see [`SamplingMetadata`].
//!
//! A logit of −∞ stands for a token that must not be sampled; NaN stands for an id without a token. Neither has any weight, and an id
//! without a token is not reported among the most probable ones either.
//!
//! A thread allocates its buffers when it samples its first token, and nothing after that.

use std::cell::RefCell;

use crate::kernels::cpu::softmax::{self, BLOCK};
use crate::models::mask::Allowed;
use crate::models::{Logprobs, LogprobsMode, LogprobsSpec};

mod device;
mod nucleus;
mod params;
#[cfg(test)]
mod recorded_tests;
#[cfg(test)]
mod reference_tests;
mod report;
#[cfg(test)]
mod tests;

pub use params::{SamplingMetadata, SamplingParams, TokenCounts};

/// Buffers for sampling; each computing thread keeps its own.
#[derive(Default)]
struct Scratch {
    /// The sum of weights of each block of the row.
    sums: Vec<f64>,
    /// The tokens that the filters have left, with their logits.
    kept: Vec<(u32, f32)>,
    /// A copy of the model's own logits, made when they are to be reported and something is about to change them.
    raw: Vec<f32>,
}

/// Bytes that a computing thread keeps for sampling from rows of `vocab` logits.
pub fn scratch_bytes(vocab: usize) -> usize {
    // The sums grow by doubling.
    vocab.div_ceil(BLOCK).next_power_of_two() * size_of::<f64>() + vocab * (size_of::<(u32, f32)>() + size_of::<f32>())
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Samples a token from `logits [vocab]`, which are changed on the way. `nth` counts the samples of a row with draft tokens from 0: the random
/// number is that of output token `sampling.index + nth`. `unassigned` are the ids without a token.
///
/// `None` when nothing can be sampled: the model gave NaN or infinity, or every token is suppressed. Waits for the row's masks.
pub fn sample(logits: &mut [f32], unassigned: &[u32], sampling: &SamplingMetadata, nth: u64) -> Option<(u32, Option<Logprobs>)> {
    let params = &*sampling.params;
    if !are_numbers(logits) {
        return None;
    }
    mask(logits, unassigned);
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.kept.capacity() < logits.len() {
            scratch.kept = Vec::with_capacity(logits.len());
        }
        let changed = params.logprobs.is_some() && sampling.changes_logits();
        if changed {
            scratch.raw.clear();
            scratch.raw.extend_from_slice(logits);
        }
        if let Some(masks) = &sampling.masks
            && let Allowed::Only(mask) = masks.wait(nth as usize)?
        {
            mask.apply(logits);
        }
        adjust(logits, sampling);
        let max = softmax::max(logits);
        if !max.is_finite() {
            return None;
        }
        let token = token(logits, params, max, sampling.index.wrapping_add(nth), scratch);
        let logprobs = params.logprobs.map(|spec| {
            let temperature = if spec.mode.is_raw() || params.is_greedy() { 1.0 } else { params.temperature };
            let raw = if changed { scratch.raw.as_slice() } else { &*logits };
            let reported = if spec.mode.is_raw() { raw } else { &*logits };
            let rows = report::Rows { reported, temperature, raw };
            report::report(&rows, token, spec, &mut scratch.sums, &mut scratch.kept)
        });
        Some((token, logprobs))
    })
}

/// How probable `target` was; `None` as for [`sample`]. No parameters have changed these logits, so the processed modes report what the
/// raw ones do.
pub fn score(logits: &mut [f32], unassigned: &[u32], target: u32, spec: LogprobsSpec) -> Option<Logprobs> {
    if !are_numbers(logits) {
        return None;
    }
    mask(logits, unassigned);
    if !softmax::max(logits).is_finite() {
        return None;
    }
    let rows = report::Rows { reported: logits, temperature: 1.0, raw: logits };
    SCRATCH.with_borrow_mut(|scratch| Some(report::report(&rows, target, spec, &mut scratch.sums, &mut scratch.kept)))
}

/// Sets the logits of ids without a token to NaN.
pub fn mask(logits: &mut [f32], unassigned: &[u32]) {
    unassigned.iter().for_each(|id| logits[*id as usize] = f32::NAN);
}

/// None of them is NaN. (NaN alone is not at least −∞.)
fn are_numbers(logits: &[f32]) -> bool {
    softmax::count_at_least(logits, f32::NEG_INFINITY) as usize == logits.len()
}

/// `max`: the greatest logit, a finite one. Ties go to the lower id.
fn token(logits: &[f32], params: &SamplingParams, max: f32, index: u64, scratch: &mut Scratch) -> u32 {
    if params.is_greedy() {
        return first(logits, max);
    }
    let u = uniform(params.seed, index);
    let scale = 1.0 / params.temperature;
    if params.min_p <= 0.0 && params.top_k == 0 && params.top_p >= 1.0 {
        return from_all(logits, max, scale, u, &mut scratch.sums);
    }
    nucleus::keep(logits, params, max, scale, scratch);
    let weight = |logit: f32| f64::from(softmax::weight((logit - max) * scale));
    let total: f64 = scratch.kept.iter().map(|(_, logit)| weight(*logit)).sum();
    pick(scratch.kept.iter().map(|(id, logit)| (*id, weight(*logit))), u * total)
}

/// Samples from the whole distribution: finds the block in which the running sum passes the target, then the token in it.
fn from_all(logits: &[f32], max: f32, scale: f32, u: f64, sums: &mut Vec<f64>) -> u32 {
    softmax::exp_sums(logits, max, scale, sums);
    let mut target = u * sums.iter().sum::<f64>();
    // NOTE: the last block with any weight takes what rounding leaves over.
    let last = sums.iter().rposition(|sum| *sum > 0.0).unwrap_or(0);
    let mut block = 0;
    while block < last && sums[block] <= target {
        target -= sums[block];
        block += 1;
    }
    let from = block * BLOCK;
    let values = &logits[from..logits.len().min(from + BLOCK)];
    let weighed = values.iter().enumerate().map(|(i, logit)| ((from + i) as u32, f64::from(softmax::weight((logit - max) * scale))));
    pick(weighed, target)
}

/// The item at which the running sum passes `target`; the last one of any weight when rounding keeps it from doing so.
fn pick(items: impl Iterator<Item = (u32, f64)>, target: f64) -> u32 {
    let (mut sum, mut last) = (0.0, 0);
    for (id, weight) in items {
        sum += weight;
        if weight > 0.0 {
            last = id;
            if sum > target {
                return id;
            }
        }
    }
    last
}

impl LogprobsMode {
    fn is_raw(self) -> bool {
        matches!(self, LogprobsMode::RawLogprobs | LogprobsMode::RawLogits)
    }

    /// Logits as they are, not log probabilities.
    fn is_logits(self) -> bool {
        matches!(self, LogprobsMode::RawLogits | LogprobsMode::ProcessedLogits)
    }
}

/// Applies suppressed ids, logit bias and penalties: everything before the temperature.
pub fn adjust(logits: &mut [f32], sampling: &SamplingMetadata) {
    let SamplingMetadata { params, suppressed, counts, .. } = sampling;
    for id in suppressed.iter() {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    for (id, bias) in params.logit_bias.iter() {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit += bias;
        }
    }
    let repetition = params.repetition_penalty;
    if repetition != 1.0 {
        let output = counts.output.iter().map(|(id, _)| *id).filter(|id| counts.prompt.binary_search(id).is_err());
        for id in counts.prompt.iter().copied().chain(output) {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            }
        }
    }
    if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
        for (id, count) in &counts.output {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit -= params.frequency_penalty * *count as f32 + params.presence_penalty;
            }
        }
    }
}

/// The greatest logit's id, the lower one on ties. For comparisons: a row that holds no number at all has none.
pub fn argmax(logits: &[f32]) -> u32 {
    first(logits, softmax::max(logits))
}

/// The lowest id with this logit, which is there.
fn first(logits: &[f32], value: f32) -> u32 {
    logits.iter().position(|logit| *logit == value).unwrap_or(0) as u32
}

/// A number in `[0, 1)` that depends on the seed and the token's index alone (SplitMix64's finaliser, twice).
pub fn uniform(seed: u64, index: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let bits = mix(mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15)) ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}
