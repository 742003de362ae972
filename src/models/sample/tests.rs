//! Sampling against a plain, slow reference: everything in f64, whole sorts, one step after the other.

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;

/// What is sampled by these parameters.
fn params(params: SamplingParams) -> SamplingMetadata {
    params.into()
}

/// The same with other parameters.
fn with(sampling: &SamplingMetadata, change: impl FnOnce(&mut SamplingParams)) -> SamplingMetadata {
    let mut sampling = sampling.clone();
    change(Arc::make_mut(&mut sampling.params));
    sampling
}

/// For rows that can be sampled from.
pub fn sample(logits: &mut [f32], sampling: &SamplingMetadata, nth: u64) -> (u32, Option<Logprobs>) {
    super::sample(logits, &[], sampling, nth).unwrap()
}

pub fn score(logits: &[f32], target: u32, spec: LogprobsSpec) -> Logprobs {
    super::score(&mut logits.to_vec(), &[], target, spec).unwrap()
}

/// What the slow way says of one row.
pub struct Slow {
    /// Logits after everything but the temperature.
    pub adjusted: Vec<f64>,
    /// Tokens that may be drawn, by id, with their probabilities.
    pub kept: Vec<(u32, f64)>,
}

/// The worked definition, with the borders of the filters moved outward by `slack` (inward if negative).
pub fn slow(logits: &[f32], sampling: &SamplingMetadata, slack: f64) -> Slow {
    let mut z: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
    sampling.suppressed.iter().for_each(|id| z[*id as usize] = f64::NEG_INFINITY);
    sampling.params.logit_bias.iter().for_each(|(id, bias)| z[*id as usize] += f64::from(*bias));
    let counts: HashMap<u32, u32> = sampling.counts.output.iter().copied().collect();
    for (id, z) in z.iter_mut().enumerate() {
        let (id, r) = (id as u32, f64::from(sampling.params.repetition_penalty));
        if counts.contains_key(&id) || sampling.counts.prompt.contains(&id) {
            *z = if *z > 0.0 { *z / r } else { *z * r };
        }
        if let Some(count) = counts.get(&id) {
            *z -= f64::from(sampling.params.frequency_penalty) * f64::from(*count) + f64::from(sampling.params.presence_penalty);
        }
    }
    let adjusted = z.clone();
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut all: Vec<(u32, f64)> =
        z.iter().enumerate().map(|(id, z)| (id as u32, ((z - max) / f64::from(sampling.params.temperature)).exp())).collect();
    all.retain(|(_, weight)| *weight > 0.0);
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    all.retain(|(_, weight)| *weight >= f64::from(sampling.params.min_p) - slack);
    if sampling.params.top_k > 0 && (sampling.params.top_k as usize) < all.len() {
        let border = all[sampling.params.top_k as usize - 1].1;
        // Logits that differ by less than f32 shows are ties, of which any may be taken.
        all.retain(|(_, weight)| if slack > 0.0 { *weight >= border - slack } else { *weight > border - slack });
    }
    let total: f64 = all.iter().map(|(_, weight)| weight).sum();
    let mut mass = 0.0;
    all.retain(|(_, weight)| {
        let inside = mass < (f64::from(sampling.params.top_p) + slack) * total || sampling.params.top_p >= 1.0;
        mass += weight;
        inside
    });
    let total: f64 = all.iter().map(|(_, weight)| weight).sum();
    all.sort_by_key(|(id, _)| *id);
    Slow { adjusted, kept: all.into_iter().map(|(id, weight)| (id, weight / total)).collect() }
}

/// What the filters leave, the fast way.
pub fn fast(logits: &[f32], sampling: &SamplingMetadata) -> Vec<u32> {
    let mut scratch = Scratch::default();
    let mut z = logits.to_vec();
    adjust(&mut z, sampling);
    nucleus::keep(&z, &sampling.params, softmax::max(&z), 1.0 / sampling.params.temperature, &mut scratch);
    scratch.kept.iter().map(|(id, _)| *id).collect()
}

/// The worked example of the reference's sampler.
fn example() -> (Vec<f32>, SamplingMetadata) {
    let counts = Arc::new(TokenCounts { prompt: vec![0], output: vec![(1, 2), (3, 1)] });
    let given =
        SamplingParams { temperature: 0.5, repetition_penalty: 1.25, frequency_penalty: 0.1, presence_penalty: 0.2, ..Default::default() };
    (vec![2.0, 1.0, 0.5, -1.0, 0.0], SamplingMetadata { counts, ..params(given) })
}

#[test]
fn penalties_in_the_reference_order() {
    let (mut z, sampling) = example();
    adjust(&mut z, &sampling);
    for (got, want) in z.iter().zip([3.2, 0.8, 1.0, -3.1, 0.0]) {
        assert!((got / sampling.params.temperature - want).abs() < 1e-5, "{got} {want}");
    }
}

#[test]
fn top_p_keeps_the_crossing_token() {
    for (top_p, want) in [(0.8, vec![0]), (0.85, vec![0, 2])] {
        let (z, sampling) = example();
        assert_eq!(fast(&z, &with(&sampling, |params| params.top_p = top_p)), want);
    }
}

#[test]
fn the_example_reports_what_each_mode_names() {
    let (z, sampling) = example();
    let raw_sum: f64 = z.iter().map(|z| f64::from(*z).exp()).sum();
    for (mode, own, first, second) in [
        (LogprobsMode::RawLogits, 2.0, (0, 2.0), (1, 1.0)),
        (LogprobsMode::RawLogprobs, 2.0 - raw_sum.ln(), (0, 2.0 - raw_sum.ln()), (1, 1.0 - raw_sum.ln())),
        (LogprobsMode::ProcessedLogits, 3.2, (0, 3.2), (2, 1.0)),
        (LogprobsMode::ProcessedLogprobs, 0.803_78f64.ln(), (0, 0.803_78f64.ln()), (2, 0.089_06f64.ln())),
    ] {
        // A nucleus of one token: 0 is drawn whatever the random number.
        let sampling = with(&sampling, |params| (params.top_p, params.logprobs) = (0.8, Some(LogprobsSpec { top: 2, mode })));
        let (token, logprobs) = sample(&mut z.clone(), &sampling, 0);
        let logprobs = logprobs.unwrap();
        assert_eq!((token, logprobs.rank), (0, 1));
        assert!((f64::from(logprobs.own) - own).abs() < 1e-4, "{mode:?} {logprobs:?}");
        for (got, want) in logprobs.top.iter().zip([first, second]) {
            assert!(got.0 == want.0 && (f64::from(got.1) - want.1).abs() < 1e-4, "{mode:?} {logprobs:?}");
        }
    }
}

#[test]
fn greedy_takes_the_lower_id_on_ties() {
    let sampling = params(SamplingParams { temperature: 0.0, ..Default::default() });
    assert_eq!(sample(&mut [0.5, 2.0, 2.0, -1.0], &sampling, 0).0, 1);
    let sampling = SamplingMetadata { suppressed: Arc::new(vec![1]), ..sampling };
    assert_eq!(sample(&mut [0.5, 2.0, 2.0, -1.0], &sampling, 0).0, 2);
}

#[test]
fn ranks_and_tops_count_ties_by_id() {
    let spec = LogprobsSpec { top: 3, mode: LogprobsMode::RawLogits };
    let got = score(&[1.0, 3.0, 2.0, 3.0, 2.0], 4, spec);
    assert_eq!(got, Logprobs { own: 2.0, rank: 4, top: vec![(1, 3.0), (3, 3.0), (2, 2.0)], raw: got.raw });
    assert_eq!(got.raw, score(&[1.0, 3.0, 2.0, 3.0, 2.0], 4, LogprobsSpec { top: 0, mode: LogprobsMode::RawLogprobs }).own);
    assert_eq!(score(&[1.0, 3.0], 0, LogprobsSpec { top: u32::MAX, ..spec }).top, [(1, 3.0), (0, 1.0)], "the whole vocabulary");
    assert!(score(&[1.0], 0, LogprobsSpec { top: 0, ..spec }).top.is_empty());
}

#[test]
fn reports_are_of_the_models_logits_when_those_are_changed() {
    let given = SamplingParams {
        temperature: 0.0,
        logit_bias: Arc::new(vec![(2, 5.0)]),
        logprobs: Some(LogprobsSpec { top: 1, mode: LogprobsMode::RawLogits }),
        ..Default::default()
    };
    let sampling = SamplingMetadata { suppressed: Arc::new(vec![1]), ..params(given) };
    let raw = score(&[0.0, 9.0, 1.0], 2, LogprobsSpec { top: 0, mode: LogprobsMode::RawLogprobs }).own;
    let (token, logprobs) = sample(&mut [0.0, 9.0, 1.0], &sampling, 0);
    assert_eq!((token, logprobs), (2, Some(Logprobs { own: 1.0, rank: 2, top: vec![(1, 9.0)], raw })));
    let sampling = with(&sampling, |params| params.logprobs = Some(LogprobsSpec { top: 1, mode: LogprobsMode::ProcessedLogits }));
    assert_eq!(sample(&mut [0.0, 9.0, 1.0], &sampling, 0).1, Some(Logprobs { own: 6.0, rank: 1, top: vec![(2, 6.0)], raw }));
}

#[test]
fn draws_follow_the_probabilities() {
    let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
    for sampling in [
        SamplingMetadata::default(),
        params(SamplingParams { top_p: 0.9999, ..Default::default() }),
        params(SamplingParams { top_k: 4, ..Default::default() }),
    ] {
        let mut counts = [0f64; 4];
        for index in 0..40_000 {
            counts[sample(&mut logits.clone(), &SamplingMetadata { index, ..with(&sampling, |params| params.seed = 7) }, 0).0 as usize] +=
                1.0 / 40_000.0;
        }
        for (got, want) in counts.iter().zip([0.5, 0.25, 0.125, 0.125]) {
            assert!((got - want).abs() < 0.01, "{counts:?}");
        }
    }
}

#[test]
fn the_nth_sample_of_a_row_is_the_one_at_that_index() {
    let logits: Vec<f32> = (0..200).map(|i| (i % 13) as f32 / 5.0).collect();
    for nth in 0..20 {
        let seeded = params(SamplingParams { seed: 3, ..Default::default() });
        let ahead = sample(&mut logits.clone(), &SamplingMetadata { index: 40, ..seeded.clone() }, nth).0;
        assert_eq!(ahead, sample(&mut logits.clone(), &SamplingMetadata { index: 40 + nth, ..seeded.clone() }, 0).0);
    }
}

#[test]
fn a_row_without_anything_to_draw_gives_nothing() {
    let all = [
        params(SamplingParams { temperature: 0.0, ..Default::default() }),
        SamplingMetadata::default(),
        params(SamplingParams { top_p: 0.5, top_k: 2, ..Default::default() }),
    ];
    let spec = LogprobsSpec { top: 1, mode: LogprobsMode::RawLogprobs };
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for row in [[nan; 3], [1.0, nan, 2.0], [1.0, inf, 2.0], [-inf; 3]] {
        for sampling in &all {
            assert_eq!(super::sample(&mut row.clone(), &[], sampling, 0), None, "{row:?} {sampling:?}");
        }
        assert_eq!(super::score(&mut row.clone(), &[], 0, spec), None, "{row:?}");
    }
    for sampling in all {
        // What the model rules out is one thing, what it gets wrong another.
        assert!(super::sample(&mut [-inf, 1.0, -inf], &[], &sampling, 0).is_some());
        let sampling = SamplingMetadata { suppressed: Arc::new(vec![0, 1]), ..sampling };
        assert_eq!(super::sample(&mut [1.0, 2.0], &[], &sampling, 0), None, "every token is suppressed");
        assert_eq!(super::sample(&mut [1.0, 2.0, 3.0], &[2], &sampling, 0), None, "or is none");
    }
}

#[test]
fn ids_without_a_token_are_neither_drawn_nor_told_of() {
    let unassigned = [1, 3, 4];
    let row = [0.5, 9.0, -0.5, 9.0, 12.0, -30.0];
    // The same row without them.
    let (ids, dense) = ([0, 2, 5], [0.5, -0.5, -30.0]);
    let all = [
        params(SamplingParams { temperature: 0.0, ..Default::default() }),
        SamplingMetadata::default(),
        params(SamplingParams { temperature: 2.0, top_p: 0.999, ..Default::default() }),
        params(SamplingParams { top_k: 5, min_p: 0.001, ..Default::default() }),
        params(SamplingParams { logit_bias: Arc::new(vec![(1, 100.0), (4, 100.0)]), repetition_penalty: 0.5, ..Default::default() }),
    ];
    let modes = [LogprobsMode::RawLogprobs, LogprobsMode::RawLogits, LogprobsMode::ProcessedLogprobs, LogprobsMode::ProcessedLogits];
    for (sampling, mode) in all.iter().flat_map(|sampling| modes.map(|mode| (sampling, mode))) {
        for index in 0..200 {
            let spec = LogprobsSpec { top: u32::MAX, mode };
            let sampling = SamplingMetadata {
                index,
                counts: Arc::new(TokenCounts { prompt: vec![1, 3], output: Vec::new() }),
                ..with(sampling, |params| params.logprobs = Some(spec))
            };
            let (token, told) = super::sample(&mut row.clone(), &unassigned, &sampling, 0).unwrap();
            let (of_dense, told_of_dense) = sample(
                &mut dense.clone(),
                &with(&sampling, |params| (params.logit_bias, params.repetition_penalty) = (Arc::default(), 1.0)),
                0,
            );
            assert_eq!(token, ids[of_dense as usize], "{sampling:?}");
            let (told, of_dense) = (told.unwrap(), told_of_dense.unwrap());
            assert_eq!((told.own, told.raw, told.rank), (of_dense.own, of_dense.raw, of_dense.rank));
            assert_eq!(told.top, of_dense.top.iter().map(|(id, value)| (ids[*id as usize], *value)).collect::<Vec<_>>());
        }
    }
    let spec = LogprobsSpec { top: 6, mode: LogprobsMode::RawLogprobs };
    let own = super::score(&mut row.clone(), &unassigned, 4, spec).unwrap();
    assert_eq!((own.own, own.rank, own.top.len()), (f32::NEG_INFINITY, 3, 3), "a prompt may hold such an id");
}

fn rows() -> impl Strategy<Value = Vec<f32>> {
    prop_oneof![
        3 => prop::collection::vec(-8f32..8.0, 1..300),
        1 => prop::collection::vec(-3f32..3.0, 300..3000),
        1 => prop::collection::vec(-30f32..0.0, 1..3000),
    ]
}

/// A row of logits, and every parameter at random, each of them often off.
fn cases() -> impl Strategy<Value = (Vec<f32>, SamplingMetadata)> {
    let filters = (
        prop_oneof![Just(1f32), 0.2f32..3.0],
        prop_oneof![Just(1f32), 0.05f32..0.999],
        prop_oneof![Just(0u32), 2u32..400],
        prop_oneof![Just(0f32), 0f32..0.4],
    );
    let penalties = (prop_oneof![Just(0f32), -2f32..2.0], prop_oneof![Just(0f32), -2f32..2.0], prop_oneof![Just(1f32), 0.5f32..2.0]);
    let some = || prop::collection::btree_map(any::<u32>(), (-10f32..10.0, 1u32..5), 0..6);
    let lists = (some(), some(), some(), some());
    (rows(), filters, penalties, lists, any::<(u64, u64)>()).prop_map(
        |(row, filters, penalties, (bias, suppressed, prompt, output), at)| {
            let vocab = row.len() as u32;
            let distinct = |map: std::collections::BTreeMap<u32, (f32, u32)>| {
                map.into_iter().map(|(id, values)| (id % vocab, values)).collect::<std::collections::BTreeMap<_, _>>()
            };
            let counts = TokenCounts {
                prompt: distinct(prompt).into_keys().collect(),
                output: distinct(output).into_iter().map(|(id, (_, count))| (id, count)).collect(),
            };
            // At least one token stays.
            let suppressed = distinct(suppressed).into_keys().filter(|id| *id != 0).collect();
            let params = SamplingParams {
                temperature: filters.0,
                top_p: filters.1,
                top_k: filters.2,
                min_p: filters.3,
                presence_penalty: penalties.0,
                frequency_penalty: penalties.1,
                repetition_penalty: penalties.2,
                logit_bias: Arc::new(distinct(bias).into_iter().map(|(id, (bias, _))| (id, bias)).collect()),
                seed: at.0,
                ..Default::default()
            };
            let (params, suppressed, counts) = (Arc::new(params), Arc::new(suppressed), Arc::new(counts));
            (row, SamplingMetadata { params, suppressed, counts, index: at.1, masks: None })
        },
    )
}

/// What f32 may get wrong of a probability.
const SLACK: f64 = 2e-5;

#[test]
fn a_thread_keeps_no_more_than_the_memory_plan_counts() {
    let all = [
        params(SamplingParams { temperature: 2.0, top_p: 0.999_9, ..Default::default() }),
        params(SamplingParams { top_k: 5_000, ..Default::default() }),
        params(SamplingParams { min_p: 1e-6, repetition_penalty: 1.1, ..Default::default() }),
        SamplingMetadata::default(),
    ];
    let vocab = 40_000;
    std::thread::spawn(move || {
        for sampling in all {
            for mode in [LogprobsMode::RawLogprobs, LogprobsMode::ProcessedLogprobs] {
                let mut row: Vec<f32> = (0..vocab).map(|id| (id as f32 * 0.37).sin()).collect();
                let sampling = with(&sampling, |params| params.logprobs = Some(LogprobsSpec { top: vocab as u32, mode }));
                sample(&mut row, &sampling, 0);
                score(&row, 7, LogprobsSpec { top: 20, mode });
            }
        }
        let held = SCRATCH.with_borrow(|scratch| {
            let Scratch { sums, kept, raw } = scratch;
            sums.capacity() * size_of::<f64>() + kept.capacity() * size_of::<(u32, f32)>() + raw.capacity() * size_of::<f32>()
        });
        assert!(held <= scratch_bytes(vocab), "{held} bytes, and {} in the plan", scratch_bytes(vocab));
        assert!(held * 10 >= scratch_bytes(vocab) * 9, "{held} bytes, and {} in the plan", scratch_bytes(vocab));
    })
    .join()
    .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn filters_equal_the_slow_way((row, sampling) in cases()) {
        prop_assume!(sampling.params.top_k > 0 || sampling.params.top_p < 1.0 || sampling.params.min_p > 0.0);
        let kept = fast(&row, &sampling);
        let (inner, outer) = (slow(&row, &sampling, -SLACK), slow(&row, &sampling, SLACK));
        for (id, _) in &inner.kept {
            prop_assert!(kept.contains(id), "{id} is missing");
        }
        for id in &kept {
            prop_assert!(outer.kept.iter().any(|(kept, _)| kept == id), "{id} is kept");
        }
    }

    /// End to end: the token drawn is the one in whose share of the distribution the random number falls.
    #[test]
    fn the_random_number_finds_the_right_token((row, sampling) in cases()) {
        let slow = slow(&row, &sampling, 0.0);
        let u = uniform(sampling.params.seed, sampling.index);
        let token = sample(&mut row.clone(), &sampling, 0).0;
        // A token at a border may be there for one and not for the other, which moves the others' shares by its own.
        let border = [-SLACK, SLACK].map(|slack| self::slow(&row, &sampling, slack).kept);
        prop_assume!(border[0].len() == border[1].len());
        let mut before = 0.0;
        let share = slow.kept.iter().find_map(|(id, p)| {
            before += p;
            (*id == token).then_some((before - p, before))
        });
        let (from, to) = share.expect("a token that may be drawn");
        prop_assert!(from - 1e-3 <= u && u <= to + 1e-3, "{token}: {from} {u} {to}");
    }

    #[test]
    fn logprobs_equal_the_slow_way((row, sampling) in cases(), top in 0u32..300, processed in any::<bool>(), as_logits in any::<bool>()) {
        let mode = match (processed, as_logits) {
            (false, false) => LogprobsMode::RawLogprobs,
            (false, true) => LogprobsMode::RawLogits,
            (true, false) => LogprobsMode::ProcessedLogprobs,
            (true, true) => LogprobsMode::ProcessedLogits,
        };
        let plain = sample(&mut row.clone(), &sampling, 0);
        let (token, logprobs) = sample(&mut row.clone(), &with(&sampling, |params| params.logprobs = Some(LogprobsSpec { top, mode })), 0);
        prop_assert_eq!((token, None), plain, "asking changes nothing");
        let logprobs = logprobs.expect("asked for");
        let model = LogprobsSpec { top: 0, mode: LogprobsMode::RawLogprobs };
        prop_assert_eq!(logprobs.raw, score(&row, token, model).own, "answers are ranked by the model's own");
        let temperature = if processed { f64::from(sampling.params.temperature) } else { 1.0 };
        let z: Vec<f64> = if processed { slow(&row, &sampling, 0.0).adjusted } else { row.iter().map(|z| f64::from(*z)).collect() };
        let z: Vec<f64> = z.into_iter().map(|z| z / temperature).collect();
        let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let shift = if as_logits { 0.0 } else { max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln() };
        let near = |got: f32, id: u32| {
            let want = z[id as usize] - shift;
            f64::from(got) == want || (f64::from(got) - want).abs() < 2e-5 * (1.0 + want.abs())
        };
        prop_assert!(near(logprobs.own, token), "{} {}", logprobs.own, z[token as usize] - shift);
        prop_assert_eq!(logprobs.top.len(), (top as usize).min(row.len()));
        prop_assert!(logprobs.top.iter().all(|(id, got)| near(*got, *id)));
        prop_assert!(logprobs.top.is_sorted_by(|a, b| a.1 >= b.1));
        let apart = 1e-4;
        let (least, most) = (z.iter().filter(|other| **other > z[token as usize] + apart).count(), z.iter().filter(|other| **other >= z[token as usize] - apart).count());
        prop_assert!((least + 1..=most).contains(&(logprobs.rank as usize)), "{} {least} {most}", logprobs.rank);
        if let Some((_, last)) = logprobs.top.last() {
            let greater = z.iter().filter(|z| **z - shift > f64::from(*last) + apart * (1.0 + shift.abs())).count();
            prop_assert!(greater <= logprobs.top.len(), "one of the most probable is missing");
        }
        if !processed {
            prop_assert_eq!(score(&row, token, LogprobsSpec { top, mode }), logprobs, "a score is a raw report");
        }
    }

    #[test]
    fn the_same_seed_and_index_sample_the_same(seed in any::<u64>(), index in any::<u64>()) {
        prop_assert_eq!(uniform(seed, index), uniform(seed, index));
        prop_assert!((0.0..1.0).contains(&uniform(seed, index)));
    }
}
