//! The scheduler over a real model, the demo model: whatever it decides, the numbers are the same.

use std::collections::HashMap;
use std::sync::Arc;

use super::*;
use crate::checkpoint::demo;
use crate::checkpoint::files::ModelFiles;
use crate::config::{DeviceChoice, EngineSettings, KvCacheDtype};
use crate::engine::{Request, SamplingParams};
use crate::models::golden_families::Golden;
use crate::models::runner::ModelRunner;
use crate::models::{LogprobsMode, LogprobsSpec, Runner, Vocabulary, sample};
use crate::models::{Output, Plan};

/// Logits of every token sampled, and the tokens, by sequence.
type Sampled = HashMap<SequenceId, Vec<(u32, Vec<f32>)>>;

/// On a thread of its own, since a runner makes its thread a computing one for good.
fn with_model<T: Send>(f: impl FnOnce(&mut ModelRunner) -> T + Send) -> T {
    with_vocabulary(usize::MAX.into(), f)
}

fn with_vocabulary<T: Send>(vocabulary: Vocabulary, f: impl FnOnce(&mut ModelRunner) -> T + Send) -> T {
    with_files(&demo::files(), KvCacheDtype::Auto, vocabulary, f)
}

/// What the KV cache can hold.
const DTYPES: [KvCacheDtype; 4] = [KvCacheDtype::Float32, KvCacheDtype::Float16, KvCacheDtype::Bfloat16, KvCacheDtype::Int8];

fn with_files<T: Send>(
    files: &ModelFiles,
    kv_cache_dtype: KvCacheDtype,
    vocabulary: Vocabulary,
    f: impl FnOnce(&mut ModelRunner) -> T + Send,
) -> T {
    let body = || {
        let settings = EngineSettings {
            device: DeviceChoice::Cpu,
            threads: Some(2),
            kv_cache_gb: Some(0.02),
            kv_cache_dtype,
            block_size: 16,
            max_num_batched_tokens: Some(64),
            ..Default::default()
        };
        f(&mut ModelRunner::load(files, || Ok(vocabulary), &settings).unwrap())
    };
    std::thread::scope(|scope| scope.spawn(body).join().unwrap())
}

fn sequence(id: SequenceId, prompt: Vec<u32>, max_tokens: usize, temperature: f32) -> Sequence {
    let params = SamplingParams { temperature, max_tokens, seed: id, ..Default::default() };
    Sequence::new(
        id,
        &Request {
            id: "t".into(),
            prompt: Arc::new(prompt),
            params,
            prompt_logprobs: None,
            deadline: None,
            pooling: None,
            constraint: None,
        },
        1024,
    )
}

/// Runs everything to its end, greedily.
fn run(scheduler: &mut Scheduler, runner: &mut ModelRunner, sampled: &mut Sampled) {
    let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
    while scheduler.plan(&mut plan) {
        let logits = runner.logits(&plan).unwrap();
        let tokens: Vec<u32> = logits.iter().map(|row| sample::argmax(row)).collect();
        // Several rows of logits for one sequence, where it drafts.
        let mut rows: HashMap<SequenceId, Vec<Vec<f32>>> = HashMap::new();
        let mut logits = logits.into_iter();
        for (row, in_flight) in plan.rows.iter().zip(&scheduler.in_flight).filter(|(row, _)| row.sampling.is_some()) {
            rows.insert(in_flight.id, logits.by_ref().take(row.draft_len + 1).collect());
        }
        plan.clear();
        scheduler.settle(Output { tokens, ..Default::default() }, &mut outcomes);
        scheduler.check_invariants();
        for outcome in outcomes.drain(..) {
            let logits = rows.get_mut(&outcome.id).unwrap().remove(0);
            sampled.entry(outcome.id).or_default().push((outcome.token.id, logits));
        }
    }
}

/// Ids that are words of the demo model, the same for the same `text`.
fn words(text: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|at| 300 + (text * 7919 + at * at * 31 + at * 17) % 700).collect()
}

#[test]
fn logits_are_bit_identical_with_and_without_the_prefix_cache() {
    for dtype in DTYPES {
        with_files(&demo::files(), dtype, usize::MAX.into(), the_prefix_cache_changes_no_bit);
    }
}

fn the_prefix_cache_changes_no_bit(runner: &mut ModelRunner) {
    // Prompts that share beginnings of several lengths, in blocks and out of step with them.
    let prompts: Vec<Vec<u32>> =
        [(0, 100, 1, 5), (0, 100, 2, 40), (0, 48, 3, 3), (0, 47, 4, 20), (5, 16, 6, 1), (0, 100, 1, 5), (0, 90, 7, 30)]
            .map(|(shared, len, own, more)| [words(shared, len), words(own, more)].concat())
            .to_vec();
    let (mut plain, mut cached, mut warm) = (Sampled::new(), Sampled::new(), Sampled::new());
    for (id, prompt) in prompts.iter().enumerate() {
        let mut alone = Scheduler::new(runner.shape().clone(), false, None);
        alone.add(sequence(id as u64, prompt.clone(), 12, 0.0));
        run(&mut alone, runner, &mut plain);
    }
    let mut scheduler = Scheduler::new(runner.shape().clone(), true, None);
    for sampled in [&mut cached, &mut warm] {
        for (id, prompt) in prompts.iter().enumerate() {
            scheduler.add(sequence(id as u64, prompt.clone(), 12, 0.0));
        }
        run(&mut scheduler, runner, sampled);
    }
    assert!(scheduler.totals().prefix_hits > 800, "{:?}", scheduler.totals());
    assert!(plain.values().all(|sampled| sampled.len() == 12));
    assert!(plain == cached, "sharing among prompts changed a bit");
    assert!(plain == warm, "blocks from earlier requests changed a bit");
}

/// Prompts that repeat themselves, as copied text does.
fn repetitive() -> Vec<Vec<u32>> {
    (0..24).map(|text| words(text, 10 + text as usize).repeat(1 + text as usize % 4)).collect()
}

#[test]
fn speculation_leaves_every_bit_of_greedy_decoding_as_it_is() {
    with_model(|runner| {
        let (mut plain, mut drafted) = (Sampled::new(), Sampled::new());
        for (proposer, sampled) in [(None, &mut plain), (Some(NgramProposer { max_rows: 16, ..Default::default() }), &mut drafted)] {
            let mut scheduler = Scheduler::new(runner.shape().clone(), true, proposer);
            for (id, prompt) in repetitive().into_iter().enumerate() {
                scheduler.add(sequence(id as u64, prompt, 40, 0.0));
            }
            run(&mut scheduler, runner, sampled);
            let totals = scheduler.totals();
            assert!(proposer.is_none() || (totals.accepted > 100 && totals.accepted < totals.drafted), "drafts of both kinds: {totals:?}");
        }
        assert_eq!(plain.len(), 24);
        assert!(plain == drafted);
    });
}

#[test]
fn speculation_leaves_seeded_sampling_as_it_is() {
    with_model(|runner| {
        let mut texts = Vec::new();
        for proposer in [None, Some(NgramProposer { max_rows: 16, ..Default::default() })] {
            let mut scheduler = Scheduler::new(runner.shape().clone(), true, proposer);
            for (id, prompt) in repetitive().into_iter().enumerate() {
                scheduler.add(sequence(id as u64, prompt, 40, 0.7));
            }
            let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
            let mut sampled: HashMap<SequenceId, Vec<u32>> = HashMap::new();
            while scheduler.plan(&mut plan) {
                let output = runner.step(&plan).unwrap();
                plan.clear();
                scheduler.settle(output, &mut outcomes);
                outcomes.drain(..).for_each(|outcome| sampled.entry(outcome.id).or_default().push(outcome.token.id));
            }
            assert!(proposer.is_none() || scheduler.totals().accepted > 0, "{:?}", scheduler.totals());
            texts.push(sampled);
        }
        assert_eq!(texts[0], texts[1]);
    });
}

/// What every sequence draws, and its log probabilities, to the end of all.
fn sampled(scheduler: &mut Scheduler, runner: &mut ModelRunner) -> HashMap<SequenceId, Vec<Token>> {
    let (mut plan, mut outcomes, mut sampled) = (Plan::default(), Vec::new(), HashMap::<_, Vec<_>>::new());
    while scheduler.plan(&mut plan) {
        let output = runner.step(&plan).unwrap();
        plan.clear();
        scheduler.settle(output, &mut outcomes);
        outcomes.drain(..).for_each(|outcome| sampled.entry(outcome.id).or_default().push(outcome.token));
    }
    sampled
}

#[test]
fn what_is_put_back_draws_the_same_again() {
    with_model(|runner| {
        let request = |id: u64| {
            let params = SamplingParams {
                temperature: 0.9,
                top_p: 0.95,
                presence_penalty: 0.5,
                frequency_penalty: 0.2,
                repetition_penalty: 1.1,
                max_tokens: 330,
                seed: id,
                ignore_eos: true,
                ..Default::default()
            };
            Request {
                id: "t".into(),
                prompt: Arc::new(words(id as u32, 10 + id as usize)),
                params,
                prompt_logprobs: None,
                deadline: None,
                pooling: None,
                constraint: None,
            }
        };
        let ids = |tokens: &[Token]| tokens.iter().map(|token| token.id).collect::<Vec<_>>();
        let mut alone = HashMap::new();
        for id in 0..3 {
            let mut scheduler = Scheduler::new(runner.shape().clone(), true, None);
            scheduler.add(Sequence::new(id, &request(id), 1024));
            alone.insert(id, ids(&sampled(&mut scheduler, runner)[&id]));
            assert_eq!(alone[&id].len(), 330);
        }
        for caching in [true, false] {
            // Room for what two sequences may soon want, and not for two whole ones.
            let shape = Shape { blocks: 36, ..runner.shape().clone() };
            let mut scheduler = Scheduler::new(shape, caching, None);
            (0..3).for_each(|id| scheduler.add(Sequence::new(id, &request(id), 1024)));
            let together = sampled(&mut scheduler, runner);
            assert!(scheduler.totals().preempted > 0, "{:?}", scheduler.totals());
            for (id, alone) in &alone {
                assert_eq!(ids(&together[id]), *alone, "sequence {id}");
            }
        }
    });
}

#[test]
fn ids_without_a_token_are_never_sampled_nor_told_of() {
    // What the model likes best to say is made to be no token; then again, and again.
    let (mut unassigned, prompts): (Vec<u32>, Vec<Vec<u32>>) = (Vec::new(), (0..6).map(|text| words(text, 12).repeat(3)).collect());
    let proposer = Some(NgramProposer { max_rows: 16, min: 1, ..Default::default() });
    for round in 0..3 {
        let vocabulary = Vocabulary { size: usize::MAX, unassigned: unassigned.clone() };
        let said = with_vocabulary(vocabulary, |runner| {
            let mut scheduler = Scheduler::new(runner.shape().clone(), true, proposer);
            for (id, prompt) in (0..).zip(&prompts) {
                let params = SamplingParams {
                    temperature: if id % 2 == 0 { 0.0 } else { 0.8 },
                    top_p: if id % 3 == 0 { 1.0 } else { 0.9 },
                    logprobs: (id < 4).then_some(LogprobsSpec { top: u32::MAX, mode: LogprobsMode::ProcessedLogprobs }),
                    bad_words: Arc::new(if id == 2 { vec![vec![400]] } else { Vec::new() }),
                    logit_bias: Arc::new(if id == 3 { unassigned.iter().map(|id| (*id, 100.0)).collect() } else { Vec::new() }),
                    max_tokens: 30,
                    seed: id,
                    ..Default::default()
                };
                let request = Request {
                    id: "t".into(),
                    prompt: Arc::new(prompt.clone()),
                    params,
                    prompt_logprobs: None,
                    deadline: None,
                    pooling: None,
                    constraint: None,
                };
                scheduler.add(Sequence::new(id, &request, 1024));
            }
            let said = sampled(&mut scheduler, runner);
            for token in said.values().flatten() {
                assert!(!unassigned.contains(&token.id), "round {round}: {}", token.id);
                let told = token.logprobs.iter().flat_map(|logprobs| &logprobs.top);
                assert!(told.clone().all(|(id, _)| !unassigned.contains(id)));
                let count = told.count();
                assert!(count == 0 || count == runner.shape().vocab_size - unassigned.len(), "all the others are told of: {count}");
            }
            said
        });
        unassigned.extend(said.values().flatten().map(|token| token.id));
        unassigned.sort_unstable();
        unassigned.dedup();
    }
    assert!(unassigned.len() > 20, "{unassigned:?}");
}

/// Prompts of a tiny model, some of which begin alike or are the same.
fn tiny_prompts() -> Vec<Vec<u32>> {
    let text = |text: u32, len: usize| (0..len as u32).map(move |at| 3 + (text * 31 + at * at * 7 + at * 5) % 94);
    let prompts =
        [(0, 100, 1, 5), (0, 100, 2, 40), (0, 48, 3, 3), (0, 47, 4, 20), (5, 16, 6, 1), (0, 100, 1, 5), (0, 100, 1, 5), (0, 90, 7, 30)];
    prompts.map(|(shared, len, own, more)| text(shared, len).chain(text(own, more)).collect()).to_vec()
}

/// Prompts that have nothing in common.
fn unlike_prompts() -> Vec<Vec<u32>> {
    (0..3).map(|text| (0..40u32).map(|at| 3 + (text * 29 + at * at * 11 + at * 3) % 94).collect()).collect()
}

/// Runs prompts to so many tokens, all at once, twice; the second round counts.
fn twice(runner: &mut ModelRunner, scheduler: &mut Scheduler, prompts: &[Vec<u32>], max_tokens: usize) -> Sampled {
    let mut sampled = Sampled::new();
    for _ in 0..2 {
        sampled.clear();
        for (id, prompt) in prompts.iter().enumerate() {
            scheduler.add(sequence(id as u64, prompt.clone(), max_tokens, 0.0));
        }
        run(scheduler, runner, &mut sampled);
    }
    sampled
}

/// Each by itself, without a cache.
fn alone(runner: &mut ModelRunner, prompts: &[Vec<u32>], max_tokens: usize) -> Sampled {
    let mut alone = Sampled::new();
    for (id, prompt) in prompts.iter().enumerate() {
        let mut scheduler = Scheduler::new(runner.shape().clone(), false, None);
        scheduler.add(sequence(id as u64, prompt.clone(), max_tokens, 0.0));
        run(&mut scheduler, runner, &mut alone);
    }
    assert!(alone.values().all(|sampled| sampled.len() == max_tokens));
    alone
}

/// Alone, in company, with shared beginnings, with drafts, with too few blocks or slots: the same bits.
fn whatever_is_decided_the_bits_are_the_same(family: &str, dtype: KvCacheDtype) {
    with_files(&Golden::read(family).files(), dtype, usize::MAX.into(), |runner| {
        let whole = runner.shape().clone();
        let proposer = Some(NgramProposer { max_rows: 16, min: 1, ..Default::default() });
        let prompts = tiny_prompts();
        let expected = alone(runner, &prompts, 40);
        for (what, caching, proposer) in [
            ("company", false, None),
            ("prefix cache", true, None),
            ("drafts", false, proposer),
            ("drafts and prefix cache", true, proposer),
        ] {
            let mut scheduler = Scheduler::new(whole.clone(), caching, proposer);
            assert!(twice(runner, &mut scheduler, &prompts, 40) == expected, "{family}: {what} changed a bit");
            let totals = scheduler.totals();
            assert!(if caching { totals.prefix_hits > 900 } else { totals.prefix_hits == 0 }, "{family}, {what}: {totals:?}");
            let both_kinds = totals.accepted > 0 && totals.accepted < totals.drafted;
            assert!(proposer.is_none() || both_kinds, "{family}, {what}: {totals:?}");
        }
        let few_slots = Shape { state_slots: whole.state_slots.min(5), max_num_seqs: 4, ..whole.clone() };
        let mut scheduler = Scheduler::new(few_slots, true, proposer);
        assert!(twice(runner, &mut scheduler, &prompts, 40) == expected, "{family}: few slots changed a bit");

        // Room for what two sequences may soon want, and not for two whole ones.
        let (prompts, few_blocks) = (unlike_prompts(), Shape { blocks: 40, ..whole });
        let expected = alone(runner, &prompts, 300);
        for caching in [true, false] {
            let mut scheduler = Scheduler::new(few_blocks.clone(), caching, None);
            assert!(twice(runner, &mut scheduler, &prompts, 300) == expected, "{family}: being put back changed a bit");
            assert!(scheduler.totals().preempted > 0, "{family}: {:?}", scheduler.totals());
        }
    });
}

#[test]
fn bits_of_short_convolutions_are_the_same_however_they_are_run() {
    whatever_is_decided_the_bits_are_the_same("lfm2", KvCacheDtype::Auto);
}

#[test]
fn bits_of_gated_delta_nets_are_the_same_however_they_are_run() {
    whatever_is_decided_the_bits_are_the_same("qwen3_5_text", KvCacheDtype::Auto);
}

#[test]
fn bits_of_latent_attention_are_the_same_however_it_is_run() {
    whatever_is_decided_the_bits_are_the_same("deepseek_v3", KvCacheDtype::Auto);
}

/// Of a cache of fewer bits: attention with windows and sinks, and latent attention.
#[test]
fn bits_of_narrower_caches_are_the_same_however_they_are_run() {
    for (family, dtype) in [
        ("ernie4_5", KvCacheDtype::Bfloat16),
        ("gpt_oss", KvCacheDtype::Float16),
        ("gemma3_text", KvCacheDtype::Int8),
        ("deepseek_v3", KvCacheDtype::Int8),
    ] {
        whatever_is_decided_the_bits_are_the_same(family, dtype);
    }
}
