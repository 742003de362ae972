//! The scheduler over a real model, the demo model: whatever it decides, the numbers are the same.

use std::collections::HashMap;
use std::sync::Arc;

use super::*;
use crate::config::{DeviceChoice, EngineSettings};
use crate::engine::{Request, SamplingParams};
use crate::models::runner::ModelRunner;
use crate::models::{Runner, demo, sample};

/// Logits of every token drawn, and the tokens, by sequence.
type Drawn = HashMap<SequenceId, Vec<(u32, Vec<f32>)>>;

/// On a thread of its own, since a runner makes its thread a computing one for good.
fn with_model<T: Send>(f: impl FnOnce(&mut ModelRunner) -> T + Send) -> T {
    let body = || {
        let settings = EngineSettings {
            device: DeviceChoice::Cpu,
            threads: Some(2),
            kv_cache_gb: Some(0.02),
            block_size: Some(16),
            max_num_batched_tokens: Some(64),
            ..Default::default()
        };
        f(&mut ModelRunner::load(&demo::files(), || Ok(usize::MAX), &settings).unwrap())
    };
    std::thread::scope(|scope| scope.spawn(body).join().unwrap())
}

fn sequence(id: SequenceId, prompt: Vec<u32>, max_tokens: usize, temperature: f32) -> Sequence {
    let params = SamplingParams { temperature, max_tokens, seed: id, ..Default::default() };
    Sequence::new(id, &Request { id: "t".into(), prompt: Arc::new(prompt), params, prompt_logprobs: None, deadline: None }, 1024)
}

/// Runs everything to its end, greedily.
fn run(scheduler: &mut Scheduler, runner: &mut ModelRunner, drawn: &mut Drawn) {
    let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
    while scheduler.plan(&mut plan) {
        let logits = runner.logits(&plan).unwrap();
        let tokens: Vec<u32> = logits.iter().map(|row| sample::argmax(row)).collect();
        // Several rows of logits for one sequence, where it guesses.
        let mut rows: HashMap<SequenceId, Vec<Vec<f32>>> = HashMap::new();
        let mut logits = logits.into_iter();
        for (row, in_flight) in plan.rows.iter().zip(&scheduler.in_flight).filter(|(row, _)| row.draw.is_some()) {
            rows.insert(in_flight.id, logits.by_ref().take(row.proposed + 1).collect());
        }
        plan.clear();
        scheduler.settle(Output { tokens, ..Default::default() }, &mut outcomes);
        scheduler.check_invariants();
        for outcome in outcomes.drain(..) {
            let logits = rows.get_mut(&outcome.id).unwrap().remove(0);
            drawn.entry(outcome.id).or_default().push((outcome.token.id, logits));
        }
    }
}

/// Ids that are words of the demo model, the same for the same `text`.
fn words(text: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|at| 300 + (text * 7919 + at * at * 31 + at * 17) % 700).collect()
}

#[test]
fn logits_are_bit_identical_with_and_without_the_prefix_cache() {
    with_model(|runner| {
        // Prompts that share beginnings of several lengths, in blocks and out of step with them.
        let prompts: Vec<Vec<u32>> =
            [(0, 100, 1, 5), (0, 100, 2, 40), (0, 48, 3, 3), (0, 47, 4, 20), (5, 16, 6, 1), (0, 100, 1, 5), (0, 90, 7, 30)]
                .map(|(shared, len, own, more)| [words(shared, len), words(own, more)].concat())
                .to_vec();
        let (mut plain, mut cached, mut warm) = (Drawn::new(), Drawn::new(), Drawn::new());
        for (id, prompt) in prompts.iter().enumerate() {
            let mut alone = Scheduler::new(runner.shape().clone(), false, None);
            alone.add(sequence(id as u64, prompt.clone(), 12, 0.0));
            run(&mut alone, runner, &mut plain);
        }
        let mut scheduler = Scheduler::new(runner.shape().clone(), true, None);
        for drawn in [&mut cached, &mut warm] {
            for (id, prompt) in prompts.iter().enumerate() {
                scheduler.add(sequence(id as u64, prompt.clone(), 12, 0.0));
            }
            run(&mut scheduler, runner, drawn);
        }
        assert!(scheduler.totals().prefix_hits > 800, "{:?}", scheduler.totals());
        assert!(plain.values().all(|drawn| drawn.len() == 12));
        assert!(plain == cached, "sharing among prompts changed a bit");
        assert!(plain == warm, "blocks from earlier requests changed a bit");
    });
}

/// Prompts that repeat themselves, as copied text does.
fn repetitive() -> Vec<Vec<u32>> {
    (0..24).map(|text| words(text, 10 + text as usize).repeat(1 + text as usize % 4)).collect()
}

#[test]
fn speculation_leaves_every_bit_of_greedy_decoding_as_it_is() {
    with_model(|runner| {
        let (mut plain, mut guessed) = (Drawn::new(), Drawn::new());
        for (lookup, drawn) in [(None, &mut plain), (Some(Lookup { max_rows: 16, ..Default::default() }), &mut guessed)] {
            let mut scheduler = Scheduler::new(runner.shape().clone(), true, lookup);
            for (id, prompt) in repetitive().into_iter().enumerate() {
                scheduler.add(sequence(id as u64, prompt, 40, 0.0));
            }
            run(&mut scheduler, runner, drawn);
            let totals = scheduler.totals();
            assert!(lookup.is_none() || (totals.accepted > 100 && totals.accepted < totals.guessed), "guesses of both kinds: {totals:?}");
        }
        assert_eq!(plain.len(), 24);
        assert!(plain == guessed);
    });
}

#[test]
fn speculation_leaves_seeded_sampling_as_it_is() {
    with_model(|runner| {
        let mut texts = Vec::new();
        for lookup in [None, Some(Lookup { max_rows: 16, ..Default::default() })] {
            let mut scheduler = Scheduler::new(runner.shape().clone(), true, lookup);
            for (id, prompt) in repetitive().into_iter().enumerate() {
                scheduler.add(sequence(id as u64, prompt, 40, 0.7));
            }
            let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
            let mut drawn: HashMap<SequenceId, Vec<u32>> = HashMap::new();
            while scheduler.plan(&mut plan) {
                let output = runner.step(&plan).unwrap();
                plan.clear();
                scheduler.settle(output, &mut outcomes);
                outcomes.drain(..).for_each(|outcome| drawn.entry(outcome.id).or_default().push(outcome.token.id));
            }
            assert!(lookup.is_none() || scheduler.totals().accepted > 0, "{:?}", scheduler.totals());
            texts.push(drawn);
        }
        assert_eq!(texts[0], texts[1]);
    });
}
