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

fn sequence(id: SequenceId, prompt: Vec<u32>, max_tokens: usize) -> Sequence {
    let params = SamplingParams { temperature: 0.0, max_tokens, ..Default::default() };
    Sequence::new(id, &Request { id: "t".into(), prompt: Arc::new(prompt), params, prompt_logprobs: None, deadline: None }, 1024)
}

/// Runs everything to its end, greedily.
fn run(scheduler: &mut Scheduler, runner: &mut ModelRunner, drawn: &mut Drawn) {
    let (mut plan, mut outcomes) = (Plan::default(), Vec::new());
    while scheduler.plan(&mut plan) {
        let logits = runner.logits(&plan).unwrap();
        let tokens: Vec<u32> = logits.iter().map(|row| sample::argmax(row)).collect();
        plan.clear();
        scheduler.settle(Output { tokens, ..Default::default() }, &mut outcomes);
        scheduler.check_invariants();
        for (outcome, logits) in outcomes.drain(..).zip(logits) {
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
            let mut alone = Scheduler::new(runner.shape().clone(), false);
            alone.add(sequence(id as u64, prompt.clone(), 12));
            run(&mut alone, runner, &mut plain);
        }
        let mut scheduler = Scheduler::new(runner.shape().clone(), true);
        for drawn in [&mut cached, &mut warm] {
            for (id, prompt) in prompts.iter().enumerate() {
                scheduler.add(sequence(id as u64, prompt.clone(), 12));
            }
            run(&mut scheduler, runner, drawn);
        }
        assert!(scheduler.totals().prefix_hits > 800, "{:?}", scheduler.totals());
        assert!(plain.values().all(|drawn| drawn.len() == 12));
        assert!(plain == cached, "sharing among prompts changed a bit");
        assert!(plain == warm, "blocks from earlier requests changed a bit");
    });
}
