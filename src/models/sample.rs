//! The arithmetic of drawing one token from one row of logits. Order of operations: see [`Draw`].
//!
//! −∞ is a token that must not be drawn, NaN is no token at all: neither counts in any sum, and the second is not even told of.
//!
//! Nothing is allocated once a thread has drawn its first token: what a draw needs beside the row lies in a buffer of the thread's own.

use std::cell::RefCell;

use crate::kernels::cpu::softmax::{self, BLOCK};
use crate::models::{Draw, Logprobs, LogprobsMode, LogprobsSpec};

mod nucleus;
#[cfg(test)]
mod reference_tests;
mod report;
#[cfg(test)]
mod tests;

/// Temperatures and top_p below this are greedy (FastDeploy's and FastChat's limit).
pub const GREEDY_BELOW: f32 = 1e-5;

/// What a draw needs beside the logits; kept by each computing thread.
#[derive(Default)]
struct Scratch {
    /// Sums of weights by block of the row.
    sums: Vec<f64>,
    /// Tokens that the filters have left, with their logits.
    kept: Vec<(u32, f32)>,
    /// The row as the model gave it, when that is to be reported and something has changed it.
    raw: Vec<f32>,
}

/// Bytes that a computing thread keeps for drawing from rows of `vocab` logits.
pub fn scratch_bytes(vocab: usize) -> usize {
    // The sums grow by doubling.
    vocab.div_ceil(BLOCK).next_power_of_two() * size_of::<f64>() + vocab * (size_of::<(u32, f32)>() + size_of::<f32>())
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Draws a token from `logits [vocab]`, which is used up: the `nth` of its row, so with the random number of `draw.index + nth`. `holes` are
/// ids without a token.
///
/// `None` when there is nothing to draw by: the model gave NaN or infinity, or every token is suppressed.
pub fn sample(logits: &mut [f32], holes: &[u32], draw: &Draw, nth: u64) -> Option<(u32, Option<Logprobs>)> {
    if !are_numbers(logits) {
        return None;
    }
    cover(logits, holes);
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.kept.capacity() < logits.len() {
            scratch.kept = Vec::with_capacity(logits.len());
        }
        let changed = draw.logprobs.is_some() && draw.changes_logits();
        if changed {
            scratch.raw.clear();
            scratch.raw.extend_from_slice(logits);
        }
        adjust(logits, draw);
        let max = softmax::max(logits);
        if !max.is_finite() {
            return None;
        }
        let token = token(logits, draw, max, draw.index.wrapping_add(nth), scratch);
        let logprobs = draw.logprobs.map(|spec| {
            let temperature = if spec.mode.is_raw() || draw.is_greedy() { 1.0 } else { draw.temperature };
            let raw = if changed { scratch.raw.as_slice() } else { &*logits };
            let told = if spec.mode.is_raw() { raw } else { &*logits };
            let rows = report::Rows { told, temperature, raw };
            report::report(&rows, token, spec, &mut scratch.sums, &mut scratch.kept)
        });
        Some((token, logprobs))
    })
}

/// How probable `target` was; `None` as for [`sample`]. Nothing was drawn here, so the processed modes are the same as the raw ones.
pub fn score(logits: &mut [f32], holes: &[u32], target: u32, spec: LogprobsSpec) -> Option<Logprobs> {
    if !are_numbers(logits) {
        return None;
    }
    cover(logits, holes);
    if !softmax::max(logits).is_finite() {
        return None;
    }
    let rows = report::Rows { told: logits, temperature: 1.0, raw: logits };
    SCRATCH.with_borrow_mut(|scratch| Some(report::report(&rows, target, spec, &mut scratch.sums, &mut scratch.kept)))
}

/// Takes the ids without a token out of the row.
pub fn cover(logits: &mut [f32], holes: &[u32]) {
    holes.iter().for_each(|id| logits[*id as usize] = f32::NAN);
}

/// No NaN among them, which alone is not at least −∞.
fn are_numbers(logits: &[f32]) -> bool {
    softmax::count_at_least(logits, f32::NEG_INFINITY) as usize == logits.len()
}

/// `max`: the greatest logit, a finite one. Ties go to the lower id.
fn token(logits: &[f32], draw: &Draw, max: f32, index: u64, scratch: &mut Scratch) -> u32 {
    if draw.is_greedy() {
        return first(logits, max);
    }
    let u = uniform(draw.seed, index);
    let scale = 1.0 / draw.temperature;
    if draw.min_p <= 0.0 && draw.top_k == 0 && draw.top_p >= 1.0 {
        return from_all(logits, max, scale, u, &mut scratch.sums);
    }
    nucleus::keep(logits, draw, max, scale, scratch);
    let weight = |logit: f32| f64::from(softmax::weight((logit - max) * scale));
    let total: f64 = scratch.kept.iter().map(|(_, logit)| weight(*logit)).sum();
    pick(scratch.kept.iter().map(|(id, logit)| (*id, weight(*logit))), u * total)
}

/// Draws from the whole distribution: finds the block in which the running sum passes the target, then the token in it.
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

impl Draw {
    /// No randomness: the most probable token.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW || self.top_p < GREEDY_BELOW || self.top_k == 1
    }

    /// Greedy and without any change to the logits: an argmax on the device answers it.
    pub fn is_plain_greedy(&self) -> bool {
        self.is_greedy() && !self.changes_logits()
    }

    /// Something comes before the temperature.
    fn changes_logits(&self) -> bool {
        let penalized = self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0;
        penalized || !self.bias.is_empty() || !self.suppressed.is_empty()
    }
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

/// Suppressed ids, bias and penalties; everything before the temperature.
pub fn adjust(logits: &mut [f32], draw: &Draw) {
    for id in draw.suppressed.iter() {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    for (id, bias) in draw.bias.iter() {
        if let Some(logit) = logits.get_mut(*id as usize) {
            *logit += bias;
        }
    }
    if draw.repetition_penalty != 1.0 {
        let output = draw.seen.output.iter().map(|(id, _)| *id).filter(|id| draw.seen.prompt.binary_search(id).is_err());
        for id in draw.seen.prompt.iter().copied().chain(output) {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / draw.repetition_penalty } else { *logit * draw.repetition_penalty };
            }
        }
    }
    if draw.frequency_penalty != 0.0 || draw.presence_penalty != 0.0 {
        for (id, count) in &draw.seen.output {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit -= draw.frequency_penalty * *count as f32 + draw.presence_penalty;
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
