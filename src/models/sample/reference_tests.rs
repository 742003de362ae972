//! Against what Hugging Face transformers' own processors made of the same logits: `scripts/reference_sampling.py` records it.
//!
//! Theirs and ours are the same step by step. Their order is repetition penalty → bad words → temperature → top_k → top_p → min_p, ours
//! (FastDeploy's) has min_p before top_k and top_p, so that top_p is a share of what min_p has left: combinations of min_p with top_p are
//! not compared, all others are.

use std::sync::Arc;

use serde::Deserialize;

use super::tests::{fast, score};
use super::*;

#[derive(Deserialize)]
struct Recorded {
    rows: Vec<Vec<f32>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(default)]
struct Case {
    row: usize,
    temperature: f32,
    top_p: f32,
    top_k: u32,
    min_p: f32,
    repetition_penalty: f32,
    /// The tokens the penalty is for.
    context: Vec<u32>,
    bad_ids: Vec<u32>,
    /// Processed logits by id; null = −∞, not kept.
    processed: Vec<Option<f32>>,
    /// log softmax of the row, before any processor.
    log_softmax: Vec<f32>,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            row: 0,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            context: Vec::new(),
            bad_ids: Vec::new(),
            processed: Vec::new(),
            log_softmax: Vec::new(),
        }
    }
}

impl Case {
    fn sampling(&self) -> SamplingMetadata {
        let mut prompt = self.context.clone();
        prompt.sort_unstable();
        prompt.dedup();
        let params = SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            ..Default::default()
        };
        SamplingMetadata {
            counts: Arc::new(TokenCounts { prompt, output: Vec::new() }),
            suppressed: Arc::new(self.bad_ids.clone()),
            ..params.into()
        }
    }
}

/// Relative to the size of the value: both sides compute in f32.
fn near(got: f32, want: f32) -> bool {
    (got - want).abs() <= 2e-6 * (1.0 + want.abs())
}

#[test]
fn every_recorded_case_is_the_same() {
    let recorded: Recorded = serde_json::from_str(include_str!("reference.json")).unwrap();
    assert!(recorded.cases.len() >= 40, "{} cases", recorded.cases.len());
    for (number, case) in recorded.cases.iter().enumerate() {
        let (row, sampling) = (&recorded.rows[case.row], case.sampling());
        let mut kept = fast(row, &sampling);
        kept.sort_unstable();
        let want: Vec<u32> = (0u32..).zip(&case.processed).filter(|(_, z)| z.is_some()).map(|(id, _)| id).collect();
        assert_eq!(kept, want, "case {number}");
        let mut z = row.clone();
        adjust(&mut z, &sampling);
        for (id, want) in case.processed.iter().enumerate() {
            if let Some(want) = want {
                assert!(near(z[id] / case.temperature, *want), "case {number}, token {id}: {} {want}", z[id] / case.temperature);
            }
        }
        for (id, want) in case.log_softmax.iter().enumerate() {
            let got = score(row, id as u32, LogprobsSpec { top: 0, mode: LogprobsMode::RawLogprobs }).own;
            assert!(near(got, *want), "case {number}, token {id}: {got} {want}");
        }
    }
}
