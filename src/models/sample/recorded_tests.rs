//! What this sampler draws, recorded for the kernel that must draw the same: `src/kernels/cuda/tests/sampled.txt`, a case a line. Made anew
//! with `UPDATE_SAMPLED=1`; the kernel's test makes the same logits and changes from the numbers of a line.

use std::fmt::Write;
use std::sync::Arc;

use super::*;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/kernels/cuda/tests/sampled.txt");

/// From 0 to 1, by a linear congruence.
fn next(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 40) as f32 / (1u32 << 24) as f32
}

/// Between −`range` and `range`; of coarse ones many are equal. None is −0, which some filters here take after 0 and the kernel does not.
fn logits(vocab: usize, seed: u64, range: f32, coarse: bool) -> Vec<f32> {
    let mut state = seed;
    let value = |x: f32| (x * 2.0 - 1.0) * range;
    (0..vocab).map(|_| value(next(&mut state))).map(|x| if coarse { x.round() + 0.0 } else { x }).collect()
}

fn sampling(vocab: usize, params: SamplingParams, index: u64, changes: bool) -> SamplingMetadata {
    if !changes {
        return SamplingMetadata { index, ..params.into() };
    }
    let id = |n: u32| n % vocab as u32;
    let params = SamplingParams {
        logit_bias: Arc::new(vec![(id(1), 2.0), (id(4), -1.5)]),
        repetition_penalty: 1.25,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        ..params
    };
    let counts = TokenCounts { prompt: vec![0, 2, 9], output: vec![(2, 2), (7, 1)] };
    SamplingMetadata { index, suppressed: Arc::new(vec![3, 5]), counts: Arc::new(counts), ..params.into() }
}

#[test]
fn the_recorded_draws_are_those_of_this_sampler() {
    let mut text = String::from("# vocab logits range coarse changes seed index temperature top_k top_p min_p token\n");
    let mut state = 42;
    for case in 0..120u64 {
        let mut pick = |of: &[f32]| of[(next(&mut state) * of.len() as f32) as usize];
        let vocab = if case % 40 == 39 { 9000 } else { pick(&[10.0, 33.0, 100.0, 257.0, 1025.0, 3000.0]) as usize };
        let (range, coarse, changes) = (pick(&[1.0, 5.0, 20.0]), pick(&[0.0, 1.0]) == 1.0, pick(&[0.0, 1.0]) == 1.0);
        let params = SamplingParams {
            temperature: pick(&[0.0, 0.5, 1.0, 1.0, 1.7]),
            top_k: pick(&[0.0, 0.0, 1.0, 3.0, 20.0, 200.0]) as u32,
            top_p: pick(&[1.0, 1.0, 0.1, 0.7, 0.95]),
            min_p: pick(&[0.0, 0.0, 0.05, 0.4]),
            seed: case * 977,
            ..Default::default()
        };
        let index = case % 7;
        let token = sample(&mut logits(vocab, case, range, coarse), &[], &sampling(vocab, params.clone(), index, changes), 0).unwrap().0;
        let SamplingParams { seed, temperature, top_k, top_p, min_p, .. } = params;
        let (coarse, changes) = (u8::from(coarse), u8::from(changes));
        writeln!(text, "{vocab} {case} {range} {coarse} {changes} {seed} {index} {temperature} {top_k} {top_p} {min_p} {token}").unwrap();
    }
    if std::env::var_os("UPDATE_SAMPLED").is_some() {
        std::fs::write(FILE, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(FILE).unwrap(), text);
}
