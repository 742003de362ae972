//! The arithmetic of drawing one token from one row of logits. Order of operations: see [`Draw`].

use crate::models::{Draw, Logprobs, LogprobsSpec};

/// Temperatures and top_p below this are greedy (FastDeploy's and FastChat's limit).
pub const GREEDY_BELOW: f32 = 1e-5;

/// Draws a token from `logits [vocab]`, which is used up: the `nth` of its row, so with the random number of `draw.index + nth`.
pub fn sample(logits: &mut [f32], draw: &Draw, nth: u64) -> (u32, Option<Logprobs>) {
    (token(logits, draw, draw.index + nth), None)
}

/// How probable `target` was.
pub fn score(logits: &[f32], target: u32, _spec: LogprobsSpec) -> Logprobs {
    Logprobs { own: logits[target as usize], rank: 0, top: Vec::new() }
}

/// Ties go to the lower id.
fn token(logits: &mut [f32], draw: &Draw, index: u64) -> u32 {
    adjust(logits, draw);
    if draw.is_greedy() {
        return argmax(logits);
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return argmax(logits);
    }
    let scale = 1.0 / draw.temperature;
    let weight = |logit: f32| f64::from(((logit - max) * scale).exp());
    let u = uniform(draw.seed, index);
    if draw.min_p <= 0.0 && draw.top_k == 0 && draw.top_p >= 1.0 {
        let total: f64 = logits.iter().map(|logit| weight(*logit)).sum();
        return pick(logits.iter().enumerate().map(|(id, logit)| (id as u32, weight(*logit))), u * total);
    }
    let kept = nucleus(logits, draw, max, &weight);
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    pick(kept.into_iter(), u * total)
}

impl Draw {
    /// No randomness: the most probable token.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW || self.top_p < GREEDY_BELOW || self.top_k == 1
    }

    /// Greedy and without any change to the logits: an argmax on the device answers it.
    pub fn is_plain_greedy(&self) -> bool {
        let penalized = self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0;
        self.is_greedy() && !penalized && self.bias.is_empty() && self.suppressed.is_empty()
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

/// The greatest logit's id, the lower one on ties.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            best = (id, *logit);
        }
    }
    best.0 as u32
}

/// What min_p, then top_k, then top_p leave, with weights, most probable first.
fn nucleus(logits: &[f32], draw: &Draw, max: f32, weight: &dyn Fn(f32) -> f64) -> Vec<(u32, f64)> {
    let least = if draw.min_p > 0.0 { f64::from(draw.min_p) } else { f64::MIN_POSITIVE };
    // A weight is relative to the greatest probability, which is just what min_p speaks of.
    let mut kept: Vec<(u32, f32)> = logits
        .iter()
        .enumerate()
        .map(|(id, logit)| (id as u32, *logit))
        .filter(|(_, logit)| weight(*logit) >= least || *logit == max)
        .collect();
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if draw.top_k > 0 && (draw.top_k as usize) < kept.len() {
        kept.select_nth_unstable_by(draw.top_k as usize - 1, order);
        kept.truncate(draw.top_k as usize);
    }
    if draw.top_p >= 1.0 {
        kept.sort_unstable_by(order);
        return kept.into_iter().map(|(id, logit)| (id, weight(logit))).collect();
    }
    let target = f64::from(draw.top_p) * kept.iter().map(|(_, logit)| weight(*logit)).sum::<f64>();
    // The nucleus is nearly always short: sort the head only, and a longer one when its mass does not reach.
    let mut head = 128.min(kept.len());
    loop {
        if head < kept.len() {
            kept.select_nth_unstable_by(head - 1, order);
        }
        kept[..head].sort_unstable_by(order);
        let mut mass = 0.0;
        for (end, (_, logit)) in kept[..head].iter().enumerate() {
            mass += weight(*logit);
            if mass >= target || end + 1 == kept.len() {
                return kept[..=end].iter().map(|(id, logit)| (*id, weight(*logit))).collect();
            }
        }
        head = (head * 8).min(kept.len());
    }
}

/// The item at which the running sum passes `target`.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::Seen;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn plain() -> Draw {
        Draw::default()
    }

    /// The worked example of the reference's sampler.
    fn example() -> (Vec<f32>, Draw) {
        let seen = Seen { prompt: vec![0], output: vec![(1, 2), (3, 1)] };
        let draw = Draw {
            temperature: 0.5,
            repetition_penalty: 1.25,
            frequency_penalty: 0.1,
            presence_penalty: 0.2,
            seen: Arc::new(seen),
            ..plain()
        };
        (vec![2.0, 1.0, 0.5, -1.0, 0.0], draw)
    }

    #[test]
    fn penalties_in_the_reference_order() {
        let (mut z, draw) = example();
        adjust(&mut z, &draw);
        for (got, want) in z.iter().zip([3.2, 0.8, 1.0, -3.1, 0.0]) {
            assert!((got / draw.temperature - want).abs() < 1e-5, "{got} {want}");
        }
    }

    #[test]
    fn top_p_keeps_the_crossing_token() {
        for (top_p, want) in [(0.8, vec![0]), (0.85, vec![0, 2])] {
            let (mut z, mut draw) = example();
            draw.top_p = top_p;
            adjust(&mut z, &draw);
            let max = z[0];
            let kept = nucleus(&z, &draw, max, &|logit| f64::from(((logit - max) / 0.5).exp()));
            assert_eq!(kept.iter().map(|(id, _)| *id).collect::<Vec<_>>(), want);
        }
    }

    #[test]
    fn greedy_takes_the_lower_id_on_ties() {
        let draw = Draw { temperature: 0.0, ..plain() };
        assert_eq!(sample(&mut [0.5, 2.0, 2.0, -1.0], &draw, 0).0, 1);
        let draw = Draw { suppressed: Arc::new(vec![1]), ..draw };
        assert_eq!(sample(&mut [0.5, 2.0, 2.0, -1.0], &draw, 0).0, 2);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
        let mut counts = [0f64; 4];
        for index in 0..40_000 {
            counts[sample(&mut logits.clone(), &Draw { seed: 7, index, ..plain() }, 0).0 as usize] += 1.0 / 40_000.0;
        }
        for (got, want) in counts.iter().zip([0.5, 0.25, 0.125, 0.125]) {
            assert!((got - want).abs() < 0.01, "{counts:?}");
        }
    }

    /// Sort everything, then filter step by step.
    fn slow(logits: &[f32], draw: &Draw) -> Vec<u32> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut all: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(id, logit)| (id as u32, f64::from(((logit - max) / draw.temperature).exp()))).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all.retain(|(_, weight)| *weight >= f64::from(draw.min_p));
        if draw.top_k > 0 {
            all.truncate(draw.top_k as usize);
        }
        let total: f64 = all.iter().map(|(_, weight)| weight).sum();
        let mut mass = 0.0;
        let mut kept = Vec::new();
        for (id, weight) in all {
            kept.push(id);
            mass += weight;
            if mass >= f64::from(draw.top_p) * total {
                break;
            }
        }
        kept
    }

    proptest! {
        #[test]
        fn filters_equal_the_slow_way(logits in prop::collection::vec(-8f32..8.0, 1..700), temperature in 0.2f32..3.0, top_p in 0.05f32..0.999, top_k in 0u32..400, min_p in 0f32..0.4) {
            let draw = Draw { temperature, top_p, top_k, min_p, ..plain() };
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let kept: Vec<u32> = nucleus(&logits, &draw, max, &|logit| f64::from(((logit - max) * (1.0 / temperature)).exp())).iter().map(|(id, _)| *id).collect();
            let want = slow(&logits, &draw);
            // Rounding of the temperature may move the border by one token of (nearly) no weight.
            prop_assert!(kept.len().abs_diff(want.len()) <= 1, "{} {}", kept.len(), want.len());
            prop_assert!(kept.iter().zip(&want).all(|(a, b)| a == b));
            let drawn = sample(&mut logits.clone(), &Draw { seed: 1, index: 5, ..draw }, 0).0;
            prop_assert!(kept.contains(&drawn));
        }

        #[test]
        fn the_same_seed_and_index_draw_the_same(seed in any::<u64>(), index in any::<u64>()) {
            prop_assert_eq!(uniform(seed, index), uniform(seed, index));
            prop_assert!((0.0..1.0).contains(&uniform(seed, index)));
        }
    }
}
