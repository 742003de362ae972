//! Golden numbers of whole models in `handler-tests/fixtures`: what Hugging Face transformers computes on the same files.

use serde::Deserialize;

use super::Runner;
use super::golden::chunk;
use super::runner::ModelRunner;
use crate::checkpoint::demo;
use crate::checkpoint::files::{ModelFiles, Source};
use crate::config::{DeviceChoice, EngineSettings};
use crate::text::tokenizer::{Special, Tokenizer};

const BLOCK: usize = 16;

fn fixture(file: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("handler-tests/fixtures").join(file)
}

fn read<T: serde::de::DeserializeOwned>(file: &str) -> T {
    serde_json::from_slice(&std::fs::read(fixture(file)).unwrap()).unwrap()
}

/// Runs `f` with a runner on a thread of its own, since a runner makes its thread a computing one for good.
fn with_runner(files: &ModelFiles, f: impl FnOnce(&mut ModelRunner) + Send) {
    let settings = EngineSettings {
        device: DeviceChoice::Cpu,
        threads: Some(2),
        block_size: BLOCK,
        kv_cache_gb: Some(0.02),
        max_num_batched_tokens: Some(1024),
        ..Default::default()
    };
    std::thread::scope(|scope| scope.spawn(|| f(&mut ModelRunner::load(files, || Ok(usize::MAX), &settings).unwrap())).join().unwrap());
}

/// Greedy ids after `prompt`, until `stop` or `count`.
fn greedy_ids(runner: &mut ModelRunner, prompt: &[u32], count: usize, stop: Option<u32>) -> Vec<u32> {
    let (mut ids, mut from) = (prompt.to_vec(), 0);
    while ids.len() < prompt.len() + count {
        let token = runner.step(&chunk(&ids, from, ids.len(), BLOCK)).unwrap().tokens[0];
        if Some(token) == stop {
            break;
        }
        from = ids.len();
        ids.push(token);
    }
    ids.split_off(prompt.len())
}

#[derive(Deserialize)]
struct Case {
    #[serde(default)]
    name: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    logits: Vec<f32>,
}

fn check(runner: &mut ModelRunner, case: &Case, tolerance: f32) {
    let got = runner.logits(&chunk(&case.prompt_ids, 0, case.prompt_ids.len(), BLOCK)).unwrap().remove(0);
    assert_eq!(got.len(), case.logits.len());
    for (id, (got, want)) in got.iter().zip(&case.logits).enumerate() {
        assert!((got - want).abs() < tolerance, "{}, id {id}: {got}, expected {want}", case.name);
    }
    assert_eq!(greedy_ids(runner, &case.prompt_ids, case.greedy_ids.len(), None), case.greedy_ids, "{}", case.name);
}

#[test]
fn a_seeded_checkpoint_gives_the_references_numbers() {
    let files = ["config.json", "model.safetensors"].map(|file| (file.to_owned(), Source::Path(fixture("ernie-tiny").join(file))));
    let files = ModelFiles::new("ernie-tiny", "test", files.to_vec());
    with_runner(&files, |runner| check(runner, &read("ernie-tiny/golden.json"), 1e-3));
}

#[test]
fn the_demo_model_gives_the_references_numbers() {
    #[derive(Deserialize)]
    struct Golden {
        cases: Vec<Case>,
    }
    let golden: Golden = read("demo-model/golden.json");
    assert!(golden.cases.len() >= 5);
    with_runner(&demo::files(), |runner| golden.cases.iter().for_each(|case| check(runner, case, 0.01)));
}

#[test]
fn the_demo_model_continues_texts_word_for_word() {
    #[derive(Deserialize)]
    struct Question {
        prompt: Option<String>,
        answer: String,
        tokens: usize,
    }
    let questions: Vec<Question> = read("demo-model/questions.json");
    let tokenizer = Tokenizer::load(&demo::files()).unwrap();
    let eos = tokenizer.token_id("</s>");
    let prompts: Vec<_> = questions.iter().filter_map(|question| Some((question.prompt.as_ref()?, question))).collect();
    assert!(prompts.len() >= 5);
    with_runner(&demo::files(), |runner| {
        for (prompt, question) in prompts {
            let ids = greedy_ids(runner, &tokenizer.encode(prompt, Special::Text).unwrap(), 400, eos);
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id).unwrap()).copied().collect();
            assert_eq!(String::from_utf8(bytes).unwrap(), question.answer);
            assert_eq!(ids.len(), question.tokens);
        }
    });
}
