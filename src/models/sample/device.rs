//! What a device that samples needs of a row.

use crate::kernels::RowSampling;
use crate::models::SamplingMetadata;

impl SamplingMetadata {
    /// How a device samples the nth token of the row; `None` where something else is wanted: how probable it is, or what only the host knows.
    pub fn on_device(&self, nth: u64) -> Option<RowSampling> {
        let Self { params, suppressed, counts, index, masks } = self;
        if masks.is_some() || params.logprobs.is_some() {
            return None;
        }
        let of = |factor: f32| if params.repetition_penalty == 1.0 { None } else { Some(factor) };
        let repeated = || {
            let output = counts.output.iter().map(|(id, _)| *id).filter(|id| counts.prompt.binary_search(id).is_err());
            counts.prompt.iter().copied().chain(output)
        };
        let is_penalized = params.frequency_penalty != 0.0 || params.presence_penalty != 0.0;
        let penalty = |count: u32| params.frequency_penalty * count as f32 + params.presence_penalty;
        Some(RowSampling {
            seed: params.seed,
            index: index.wrapping_add(nth),
            inverse_temperature: if params.is_greedy() { 0.0 } else { 1.0 / params.temperature },
            min_p: params.min_p,
            top_p: params.top_p,
            top_k: params.top_k,
            changes: [
                suppressed.iter().map(|id| (*id, 0.0)).collect(),
                params.logit_bias.to_vec(),
                of(params.repetition_penalty).map(|factor| repeated().map(|id| (id, factor)).collect()).unwrap_or_default(),
                if is_penalized { counts.output.iter().map(|(id, count)| (*id, penalty(*count))).collect() } else { Vec::new() },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::models::{LogprobsMode, LogprobsSpec, SamplingParams, TokenCounts};

    #[test]
    fn everything_that_changes_logits_goes_along() {
        let params = SamplingParams {
            temperature: 0.5,
            top_k: 7,
            seed: 11,
            logit_bias: Arc::new(vec![(4, -1.5)]),
            repetition_penalty: 1.25,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            ..Default::default()
        };
        let counts = TokenCounts { prompt: vec![0, 2], output: vec![(2, 2), (7, 1)] };
        let sampling = SamplingMetadata { index: 5, suppressed: Arc::new(vec![3]), counts: Arc::new(counts), ..params.into() };
        let row = sampling.on_device(2).unwrap();
        assert_eq!((row.seed, row.index, row.inverse_temperature, row.top_k, row.top_p), (11, 7, 2.0, 7, 1.0));
        let repeated = vec![(0, 1.25), (2, 1.25), (7, 1.25)];
        assert_eq!(row.changes, [vec![(3, 0.0)], vec![(4, -1.5)], repeated, vec![(2, 1.25), (7, 0.75)]]);
    }

    #[test]
    fn the_host_samples_what_a_device_cannot_answer() {
        let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
        assert!(SamplingMetadata::from(greedy.clone()).on_device(0).unwrap().is_plain_greedy());
        let logprobs = Some(LogprobsSpec { top: 0, mode: LogprobsMode::RawLogprobs });
        assert_eq!(SamplingMetadata::from(SamplingParams { logprobs, ..greedy }).on_device(0), None);
    }
}
