//! How far a quantized model is from the original: compares their next-token distributions, position by position.

use std::sync::Arc;

use crate::error::Failure;
use crate::models::runner::ModelRunner;
use crate::models::sample::argmax;
use crate::models::{Plan, Row, Runner, SamplingParams, StateSave, StepStates};

/// The logits after every token of a text, `[ids, vocab]`.
pub fn logits_of(runner: &mut ModelRunner, ids: &[u32]) -> Result<Vec<Vec<f32>>, Failure> {
    let (block_size, most) = (runner.shape().block_size, runner.shape().max_num_batched_tokens);
    let blocks = Arc::new((0..ids.len().div_ceil(block_size) as u32).collect::<Vec<_>>());
    let mut logits = Vec::new();
    for (part, tokens) in ids.chunks(most).enumerate() {
        let (from, to) = (part * most, part * most + tokens.len());
        // All tokens but the first are called draft tokens: then a token is sampled, and so logits are made, after each of them.
        let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
        let row = Row {
            start: 0,
            len: tokens.len(),
            context: to,
            blocks: blocks.clone(),
            sampling: Some(greedy.into()),
            draft_len: tokens.len() - 1,
            pools: false,
            score: None,
        };
        let positions: Vec<u32> = (from as u32..to as u32).collect();
        let states =
            StepStates { slots: vec![0], saves: vec![StateSave { token: tokens.len() as u32 - 1, slot: 0 }], ..Default::default() };
        logits.extend(runner.logits(&Plan {
            tokens: tokens.to_vec(),
            slots: positions.clone(),
            positions,
            types: Vec::new(),
            rows: vec![row],
            states,
        })?);
    }
    Ok(logits)
}

/// The differences found over many positions.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// Kullback-Leibler divergence in nats of each position, from the original's distribution to the other's.
    pub divergences: Vec<f64>,
    /// How many positions have the same most probable token in both.
    pub same_top: usize,
    /// The greatest distance of a logit from the original's.
    pub farthest: f32,
}

impl Comparison {
    /// Adds a position by its logits.
    pub fn add(&mut self, original: &[f32], other: &[f32]) {
        let (p, q) = (log_sum(original), log_sum(other));
        let term = |(a, b): (&f32, &f32)| {
            let (a, b) = (f64::from(*a) - p, f64::from(*b) - q);
            a.exp() * (a - b)
        };
        // The divergence is never negative, but rounding can make it so.
        self.divergences.push(original.iter().zip(other).map(term).sum::<f64>().max(0.0));
        self.same_top += usize::from(argmax(original) == argmax(other));
        // Ids that are never sampled have no logit.
        let distances = original.iter().zip(other).filter(|(a, _)| a.is_finite()).map(|(a, b)| (a - b).abs());
        self.farthest = distances.fold(self.farthest, f32::max);
    }

    pub fn mean(&self) -> f64 {
        self.divergences.iter().sum::<f64>() / self.divergences.len().max(1) as f64
    }

    /// The divergence that the share `share` of all positions does not exceed; 1 = the largest.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.divergences.clone();
        sorted.sort_by(f64::total_cmp);
        let at = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(at.saturating_sub(1)).copied().unwrap_or_default()
    }

    /// Share of positions with the same most probable token.
    pub fn agreement(&self) -> f64 {
        self.same_top as f64 / self.divergences.len().max(1) as f64
    }
}

/// The logarithm of Σ exp.
fn log_sum(logits: &[f32]) -> f64 {
    let largest = f64::from(logits.iter().fold(f32::MIN, |a, b| a.max(*b)));
    largest + logits.iter().map(|logit| (f64::from(*logit) - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_by_hand() {
        let mut comparison = Comparison::default();
        // p = (3/4, 1/4), q = (1/4, 3/4): 3/4 ln 3 − 1/4 ln 3.
        let three = 3f32.ln();
        comparison.add(&[three, 0.0], &[0.0, three]);
        assert!((comparison.mean() - 0.5 * 3f64.ln()).abs() < 1e-6);
        assert_eq!((comparison.agreement(), comparison.farthest), (0.0, three));
        // A shift of all logits changes nothing.
        comparison.add(&[5.0, 1.0, 0.0], &[105.0, 101.0, 100.0]);
        assert!(comparison.divergences[1] < 1e-9);
        assert_eq!(comparison.agreement(), 0.5);
        assert_eq!((comparison.quantile(0.5), comparison.quantile(1.0)), (comparison.divergences[1], comparison.divergences[0]));
    }
}
