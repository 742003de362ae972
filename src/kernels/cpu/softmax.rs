//! Passes over one row of logits for the sampler: as long as the vocabulary, so each is vectorised and none allocates.

use super::elementwise::exp;
use super::simd::{Simd, dispatch};

/// Values whose weights [`exp_sums`] adds up into one number.
pub const BLOCK: usize = 1024;
/// Partial results per pass, wide enough for two of the widest vectors.
const LANES: usize = 32;

/// e^x for x ≤ 0, and exactly 0 where that is below the normal numbers (a suppressed logit is −∞).
#[inline(always)]
pub fn weight(x: f32) -> f32 {
    let e = exp(x);
    if x > -87.0 { e } else { 0.0 }
}

/// The greatest value; NaN counts as nothing, and −∞ stands for none.
pub fn max(values: &[f32]) -> f32 {
    let mut out = f32::NEG_INFINITY;
    let target = &mut out;
    dispatch!(max_of::<>(values: &[f32], target: &mut f32));
    out
}

// The kernels here are unsafe because of the processor's features alone, which `dispatch!` has checked; all memory they use is in slices.
#[inline(always)]
unsafe fn max_of<S: Simd>(values: &[f32], target: &mut f32) {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let (mut lanes, chunks) = ([f32::NEG_INFINITY; LANES], values.chunks_exact(LANES));
    let rest = chunks.remainder().iter().fold(*target, |a, b| greater(a, *b));
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*lane, *value);
        }
    }
    *target = lanes.into_iter().fold(rest, greater);
}

/// How many values are at least `least`.
pub fn count_at_least(values: &[f32], least: f32) -> u32 {
    let mut out = 0;
    let target = &mut out;
    dispatch!(count::<>(values: &[f32], least: f32, target: &mut u32));
    out
}

#[inline(always)]
unsafe fn count<S: Simd>(values: &[f32], least: f32, target: &mut u32) {
    *target = values.iter().map(|value| u32::from(*value >= least)).sum();
}

/// `sums[b] = Σ weight((value − max) · scale)` over the b-th [`BLOCK`] of `values`; what `sums` held is gone.
pub fn exp_sums(values: &[f32], max: f32, scale: f32, sums: &mut Vec<f64>) {
    sums.clear();
    dispatch!(sum_weights::<>(values: &[f32], max: f32, scale: f32, sums: &mut Vec<f64>));
}

#[inline(always)]
unsafe fn sum_weights<S: Simd>(values: &[f32], max: f32, scale: f32, sums: &mut Vec<f64>) {
    let mut weights = [0f32; BLOCK];
    for block in values.chunks(BLOCK) {
        for (weight_of, value) in weights.iter_mut().zip(block) {
            *weight_of = weight((value - max) * scale);
        }
        let (weights, rest) = weights[..block.len()].split_at(block.len() - block.len() % LANES);
        let mut lanes = [0f32; LANES];
        for chunk in weights.chunks_exact(LANES) {
            for (lane, weight) in lanes.iter_mut().zip(chunk) {
                *lane += weight;
            }
        }
        sums.push(lanes.into_iter().chain(rest.iter().copied()).map(f64::from).sum());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_equal_plain_loops_at_every_length() {
        for n in [0, 1, 31, 32, 33, 1023, 1024, 1025, 5000] {
            let values: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1009) as f32 / 50.0 - 10.0).collect();
            let greatest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&values), greatest);
            assert_eq!(count_at_least(&values, 3.0) as usize, values.iter().filter(|value| **value >= 3.0).count());
            let mut sums = vec![7.0];
            exp_sums(&values, greatest, 0.7, &mut sums);
            assert_eq!(sums.len(), values.len().div_ceil(BLOCK));
            let want: f64 = values.iter().map(|value| (f64::from(value - greatest) * 0.7).exp()).sum();
            assert!((sums.iter().sum::<f64>() - want).abs() <= 1e-6 * want, "{n}");
        }
    }

    #[test]
    fn suppressed_logits_weigh_nothing() {
        let mut sums = Vec::new();
        exp_sums(&[f32::NEG_INFINITY; 100], 0.0, 1.0, &mut sums);
        assert_eq!(sums, [0.0]);
        assert_eq!((max(&[f32::NEG_INFINITY; 40]), max(&[f32::NAN, 1.0])), (f32::NEG_INFINITY, 1.0));
        assert_eq!(weight(0.0), 1.0);
    }
}
