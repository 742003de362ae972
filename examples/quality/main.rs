//! How much a quantized model differs from the same model as stored: next-token distributions on fixed texts.
//!
//!     cargo run --release --example quality -- --model demo
//!     cargo run --release --example quality -- --model out/ernie-0.3b-paddle --quantization wint4
//!
//! On the CPU bf16 and f32 weights are computed with in f32, so "as stored" is the f32 reference. Prints the Kullback-Leibler divergence from the
//! reference's distribution to the quantized one's in nats a token, and how often both find the same token most probable.

#![allow(clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use worker_candle::checkpoint::files::ModelFiles;
use worker_candle::checkpoint::hub;
use worker_candle::config::{DeviceChoice, EngineSettings, HubSettings, kv_cache_dtype, quantization};
use worker_candle::models::quality::{Comparison, logits_of};
use worker_candle::models::runner::{About, ModelRunner};
use worker_candle::text::tokenizer::{Special, Tokenizer};

type Fail = Box<dyn std::error::Error>;
/// Logits `[texts][tokens][vocab]`.
type Logits = Vec<Vec<Vec<f32>>>;

/// Compares a quantized model with the same model as stored.
#[derive(Debug, Parser)]
struct Options {
    /// A folder, a hub id that is on this machine, or `demo`.
    #[arg(long, default_value = "demo")]
    model: String,
    /// Strategies to measure.
    #[arg(long, value_delimiter = ',', default_value = "wint8,wint4")]
    quantization: Vec<String>,
    /// Measures `DTYPE=bfloat16`, too: weights as stored, activations rounded where this processor multiplies bf16.
    #[arg(long)]
    bf16_activations: bool,
    /// Types of the KV cache to measure, beside weights as stored.
    #[arg(long, value_delimiter = ',')]
    kv_cache_dtype: Vec<String>,
    /// Texts: paragraphs of a text file, or the questions and answers of a JSON file like `handler-tests/fixtures/demo-model/questions.json`.
    #[arg(long, default_value = "examples/quality/texts.txt")]
    texts: PathBuf,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Fail> {
    let hub = HubSettings { offline: true, ..Default::default() };
    let files = hub::find_local(&options.model, &hub)?.ok_or_else(|| format!("--model {}: not on this machine", options.model))?;
    let tokenizer = Tokenizer::load(&files)?;
    let texts = read_texts(&options.texts)?;
    let ids = texts.iter().map(|text| tokenizer.encode(text, Special::Control)).collect::<Result<Vec<_>, _>>()?;
    let usual = EngineSettings::default;
    let (original, about) = logits(&files, &tokenizer, &ids, usual())?;
    let positions = ids.iter().map(Vec::len).sum::<usize>();
    println!("{}: {} parameters, {}, {positions} positions of {}", files.name, about.parameters, about.device, options.texts.display());
    println!("| {:<58} | MiB read per token | KL mean | KL p95 | KL max | same top token | logits at most |", "weights");
    println!("|---|---|---|---|---|---|---|");
    row(&about.weights, &about, &compare(&original, &original));
    if options.bf16_activations {
        let (other, about) = logits(&files, &tokenizer, &ids, EngineSettings { bf16_activations: true, ..usual() })?;
        row(&format!("{} on {}", about.weights, about.device), &about, &compare(&original, &other));
    }
    for name in &options.kv_cache_dtype {
        let (other, about) = logits(&files, &tokenizer, &ids, EngineSettings { kv_cache_dtype: kv_cache_dtype(name)?, ..usual() })?;
        row(&format!("{}, KV cache {}", about.weights, about.kv_cache_dtype), &about, &compare(&original, &other));
    }
    for name in &options.quantization {
        let (other, about) = logits(&files, &tokenizer, &ids, EngineSettings { quantization: quantization(name)?, ..usual() })?;
        row(&about.weights, &about, &compare(&original, &other));
    }
    Ok(())
}

/// Every text's logits, from a runner on a thread of its own.
fn logits(files: &ModelFiles, tokenizer: &Tokenizer, ids: &[Vec<u32>], settings: EngineSettings) -> Result<(Logits, About), Fail> {
    let longest = ids.iter().map(Vec::len).max().unwrap_or(1);
    let settings = EngineSettings { device: DeviceChoice::Cpu, max_model_len: Some(longest), max_num_seqs: Some(1), ..settings };
    let work = || -> Result<_, worker_candle::error::Failure> {
        let mut runner = ModelRunner::load(files, || Ok(tokenizer.vocab_size()), &settings)?;
        let logits = ids.iter().map(|ids| logits_of(&mut runner, ids)).collect::<Result<Vec<_>, _>>()?;
        Ok((logits, runner.about.clone()))
    };
    let result = std::thread::scope(|scope| scope.spawn(work).join());
    Ok(result.map_err(|_| "panic, see above")??)
}

fn compare(original: &Logits, other: &Logits) -> Comparison {
    let mut comparison = Comparison::default();
    for (a, b) in original.iter().flatten().zip(other.iter().flatten()) {
        comparison.add(a, b);
    }
    comparison
}

fn row(label: &str, about: &About, comparison: &Comparison) {
    println!(
        "| {:<58} | {:.1} | {:.2e} | {:.2e} | {:.2e} | {:.2}% | {:.2e} |",
        label,
        about.bytes_per_step as f64 / (1 << 20) as f64,
        comparison.mean(),
        comparison.quantile(0.95),
        comparison.quantile(1.0),
        100.0 * comparison.agreement(),
        comparison.farthest
    );
}

fn read_texts(path: &Path) -> Result<Vec<String>, Fail> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("--texts {}: {error}", path.display()))?;
    if path.extension().is_some_and(|extension| extension == "json") {
        return conversations(&text);
    }
    Ok(text.split("\n\n").map(|paragraph| paragraph.trim().to_owned()).filter(|paragraph| !paragraph.is_empty()).collect())
}

/// Conversations without tools in ERNIE's form, and texts with their continuations.
fn conversations(json: &str) -> Result<Vec<String>, Fail> {
    let questions: Vec<serde_json::Value> = serde_json::from_str(json)?;
    let text = |question: &serde_json::Value| -> Option<String> {
        let answer = question["answer"].as_str()?;
        if let Some(prompt) = question["prompt"].as_str() {
            return Some(format!("{prompt}{answer}"));
        }
        let mut text = "<|begin_of_sentence|>".to_owned();
        for message in question["messages"].as_array()? {
            let content = message["content"].as_str()?;
            text += &match message["role"].as_str()? {
                "user" => format!("User: {content}\n"),
                "assistant" => format!("Assistant: {content}<|end_of_sentence|>"),
                "system" => format!("{content}\n"),
                _ => return None,
            };
        }
        (question["tools"].is_null()).then(|| format!("{text}Assistant: {answer}"))
    };
    Ok(questions.iter().filter_map(text).collect())
}
