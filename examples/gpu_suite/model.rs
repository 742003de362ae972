//! Real models on the device: logits against recorded ones, answers against recorded ones, time per step.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use worker_candle::api::model::ModelInfo;
use worker_candle::api::{Call, Reply, Service};
use worker_candle::checkpoint::files::{ModelFiles, Source};
use worker_candle::config::{ApiSettings, DeviceChoice, EngineSettings, Quantization};
use worker_candle::models::quality::{Comparison, logits_of};
use worker_candle::models::runner::ModelRunner;
use worker_candle::models::{Plan, Row, Runner, SamplingMetadata, SamplingParams};
use worker_candle::text::tokenizer::Tokenizer;

use crate::report::Part;
use crate::{Fail, Options};

/// What bf16 may move a logit of the small models by.
const LOGIT_TOLERANCE: f32 = 0.1;
const BLOCK_SIZE: usize = 32;

/// The files of a folder.
pub fn folder(path: &Path) -> Result<ModelFiles, Fail> {
    let entries = std::fs::read_dir(path).map_err(|error| format!("model folder {}: {error}", path.display()))?;
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        files.push((entry.file_name().to_string_lossy().into_owned(), Source::Path(entry.path())));
    }
    Ok(ModelFiles::new(path.display().to_string(), path.display().to_string(), files))
}

fn settings(device: DeviceChoice, options: &Options) -> EngineSettings {
    // The CPU is what is compared with: its own kernels.
    let candle_kernels = options.kernels == "candle" && device != DeviceChoice::Cpu;
    EngineSettings {
        device,
        candle_kernels,
        block_size: BLOCK_SIZE,
        kv_cache_gb: Some(1.0),
        max_model_len: Some(1024),
        ..Default::default()
    }
}

/// Loads the folder's model on a thread of its own, which alone touches its tensors, and works with it there.
fn with_runner<T: Send>(
    path: &Path,
    settings: &EngineSettings,
    work: impl FnOnce(&mut ModelRunner, Duration) -> Result<T, String> + Send,
) -> Result<T, Fail> {
    let files = folder(path)?;
    let body = || {
        let started = Instant::now();
        let mut runner = ModelRunner::load(&files, || Ok(usize::MAX), settings).map_err(|failure| failure.to_string())?;
        work(&mut runner, started.elapsed())
    };
    let result = std::thread::scope(|scope| scope.spawn(body).join());
    Ok(result.map_err(|_| "panic, see the log")??)
}

fn greedy() -> SamplingMetadata {
    SamplingParams { temperature: 0.0, ..Default::default() }.into()
}

/// Adds `ids[from..to]` of the sequence in place `place` to a plan; places are so many tokens apart that they share no block.
fn add_row(plan: &mut Plan, ids: &[u32], from: usize, to: usize, place: usize) {
    let per_place = 1024usize.div_ceil(BLOCK_SIZE);
    // The same blocks whatever `to` is, and never in order: neighbours swapped.
    let blocks: Vec<u32> = (0..to.div_ceil(BLOCK_SIZE)).map(|i| (place * per_place + (i ^ 1)) as u32).collect();
    let start = plan.tokens.len();
    plan.tokens.extend(&ids[from..to]);
    plan.positions.extend(from as u32..to as u32);
    plan.slots.extend((from..to).map(|p| blocks[p / BLOCK_SIZE] * BLOCK_SIZE as u32 + (p % BLOCK_SIZE) as u32));
    plan.rows.push(Row {
        start,
        len: to - from,
        context: to,
        blocks: Arc::new(blocks),
        sampling: Some(greedy()),
        draft_len: 0,
        pools: false,
        score: None,
    });
}

fn chunk(ids: &[u32], from: usize, to: usize) -> Plan {
    let mut plan = Plan::default();
    add_row(&mut plan, ids, from, to, 0);
    plan
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    let distance = |(a, b): (&f32, &f32)| if (a - b).is_nan() { f32::INFINITY } else { (a - b).abs() };
    a.iter().zip(b).map(distance).fold(if a.len() == b.len() { 0.0 } else { f32::INFINITY }, f32::max)
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().into_iter().flatten().filter_map(|id| Some(id.as_u64()? as u32)).collect()
}

/// `ernie-tiny` against what the reference implementation computed in f32.
pub fn logits(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let path = options.fixtures.join("ernie-tiny");
    let golden: Value = serde_json::from_slice(&read(&path.join("golden.json"))?)?;
    let (prompt, reference) = (ids(&golden["prompt_ids"]), ids(&golden["greedy_ids"]));
    let want: Vec<f32> = golden["logits"].as_array().into_iter().flatten().filter_map(|x| Some(x.as_f64()? as f32)).collect();
    if prompt.is_empty() || reference.is_empty() || want.is_empty() {
        return Err("golden.json has no prompt_ids, greedy_ids or logits".into());
    }
    let all: Vec<u32> = prompt.iter().chain(&reference).copied().collect();
    let (worst, behind, split, together, drawn) = with_runner(&path, &settings(options.device, options), |runner, _| {
        let mut run = |plan: &Plan| runner.logits(plan).map_err(|failure| failure.to_string());
        let whole = run(&chunk(&all, 0, prompt.len()))?.remove(0);
        // Teacher-forced: how far the reference's choice is behind ours, at worst.
        let mut behind = 0f32;
        let mut steps = vec![whole.clone()];
        for at in prompt.len()..all.len() - 1 {
            steps.push(run(&chunk(&all, at, at + 1))?.remove(0));
        }
        for (logits, id) in steps.iter().zip(&reference) {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            behind = behind.max(max - logits[*id as usize]);
        }
        run(&chunk(&all, 0, prompt.len() - 3))?;
        let split = run(&chunk(&all, prompt.len() - 3, prompt.len()))?.remove(0);
        let mut plan = Plan::default();
        add_row(&mut plan, &all[1..], 0, 5, 1);
        add_row(&mut plan, &all, 0, prompt.len(), 0);
        add_row(&mut plan, &all[2..], 0, 4, 2);
        let together = run(&plan)?.remove(1);
        let drawn = runner.step(&chunk(&all, 0, prompt.len())).map_err(|failure| failure.to_string())?.tokens;
        Ok((distance(&whole, &want), behind, distance(&split, &whole), distance(&together, &whole), drawn))
    })?;
    let near = |part: &mut Part, name: &str, value: f32| {
        part.check(name, value <= LOGIT_TOLERANCE, format!("{value:.5}, allowed {LOGIT_TOLERANCE}"));
    };
    near(part, "logits against the reference, greatest difference", worst);
    near(part, "reference's greedy ids, teacher-forced: how far behind our best", behind);
    near(part, "prompt in two chunks against one", split);
    near(part, "the same row beside two others", together);
    part.check("drawn on the device", drawn == reference[..1], format!("{drawn:?}, expected [{}]", reference[0]));
    quantized(part, options)?;
    if let Some(checkpoint) = &options.checkpoint {
        against_the_cpu(part, options, checkpoint, &prompt)?;
    }
    Ok(())
}

/// A larger checkpoint has no recorded logits: the CPU, checked by the test suite, is the reference.
fn against_the_cpu(part: &mut Part, options: &Options, checkpoint: &Path, prompt: &[u32]) -> Result<(), Fail> {
    let run = |device| {
        with_runner(checkpoint, &settings(device, options), |runner, _| {
            Ok(runner.logits(&chunk(prompt, 0, prompt.len())).map_err(|failure| failure.to_string())?.remove(0))
        })
    };
    let (want, got) = (run(DeviceChoice::Cpu)?, run(options.device)?);
    let scale = want.iter().fold(0f32, |max, x| max.max(x.abs()));
    let worst = distance(&got, &want) / scale;
    part.check("checkpoint: logits against the CPU", worst <= 0.05, format!("{worst:.5} of the greatest logit ({scale:.3}), allowed 0.05"));
    Ok(())
}

/// Quantized weights on the device against the same model as stored on the CPU, by the divergence of next-token distributions; the bounds are
/// some times what the CPU's own quantized kernels are off by.
fn quantized(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let path = options.fixtures.join("demo-model");
    let golden: Value = serde_json::from_slice(&read(&path.join("golden.json"))?)?;
    let texts: Vec<Vec<u32>> = golden["cases"].as_array().into_iter().flatten().map(|case| ids(&case["prompt_ids"])).collect();
    let run = |device, quantization| {
        with_runner(&path, &EngineSettings { quantization, ..settings(device, options) }, |runner, _| {
            let logits = texts.iter().map(|ids| logits_of(runner, ids).map_err(|failure| failure.to_string()));
            Ok(logits.collect::<Result<Vec<_>, _>>()?.concat())
        })
    };
    let original = run(DeviceChoice::Cpu, Quantization::AsStored)?;
    for (quantization, bound) in [(Quantization::Wint8, 0.02), (Quantization::Wint4, 0.1)] {
        let mut comparison = Comparison::default();
        run(options.device, quantization)?.iter().zip(&original).for_each(|(other, original)| comparison.add(original, other));
        let (mean, count) = (comparison.mean(), comparison.divergences.len());
        let what = format!("{quantization:?}: divergence from the model as stored, mean of {count} positions");
        part.check(&what, count == original.len() && count > 0 && mean <= bound, format!("{mean:.5}, allowed {bound}"));
    }
    Ok(())
}

pub fn read(path: &Path) -> Result<Vec<u8>, Fail> {
    Ok(std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?)
}

/// The demo model's questions through the whole service: template, tokenizer, scheduler, device, text.
pub fn questions(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let path = options.fixtures.join("demo-model");
    let asked: Value = serde_json::from_slice(&read(&path.join("questions.json"))?)?;
    let asked = asked.get("questions").unwrap_or(&asked).as_array().cloned().unwrap_or_default();
    let asked: Vec<Value> = asked.into_iter().filter(|question| question.get("tools").is_none()).collect();
    if asked.is_empty() {
        return Err("questions.json holds no questions".into());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let answers = runtime.block_on(async {
        let service = service(&path, options).await?;
        // All at once, so that they share steps.
        let answers = asked.iter().enumerate().map(|(i, question)| answer(&service, question, i));
        Ok::<_, Fail>(futures::future::join_all(answers).await)
    })?;
    let mut wrong = 0;
    for (question, answer) in asked.iter().zip(answers) {
        let (name, want) = (question["name"].as_str().unwrap_or("?"), question["answer"].as_str().unwrap_or_default());
        match answer {
            Ok(got) if got == want => continue,
            Ok(got) => part.check(name, false, format!("{got:?}, expected {want:?}")),
            Err(error) => part.check(name, false, error.to_string()),
        }
        wrong += 1;
    }
    part.check("answers word for word", wrong == 0, format!("{} of {}", asked.len() - wrong, asked.len()));
    Ok(())
}

async fn service(path: &Path, options: &Options) -> Result<Arc<Service>, Fail> {
    let files = folder(path)?;
    let tokenizer = Arc::new(Tokenizer::load(&files)?);
    let model = ModelInfo::from_files(&files)?;
    let (vocab_size, settings) = (tokenizer.vocab_size(), EngineSettings { max_model_len: None, ..settings(options.device, options) });
    let engine_options = worker_candle::engine::EngineOptions { max_waiting: 1024, ..Default::default() };
    let engine = worker_candle::engine::start(move || ModelRunner::load(&files, || Ok(vocab_size), &settings), engine_options).await?;
    Ok(Arc::new(Service::new(ApiSettings::default(), engine, tokenizer, model)?))
}

async fn answer(service: &Arc<Service>, question: &Value, index: usize) -> Result<String, Fail> {
    let mut body = json!({"temperature": 0});
    for field in ["messages", "prompt", "chat_template_kwargs"] {
        if let Some(value) = question.get(field) {
            body[field] = value.clone();
        }
    }
    let path = if body.get("messages").is_some() {
        "/v1/chat/completions"
    } else {
        body["max_tokens"] = json!(300);
        "/v1/completions"
    };
    let call = Call { method: "POST".into(), path: path.into(), body, request_id: format!("question-{index}"), client: None };
    let Reply::Whole(whole) = service.call(call).await? else { return Err("a stream where an object was asked for".into()) };
    let choice = &whole["choices"][0];
    let text = choice["text"].as_str().or_else(|| choice["message"]["content"].as_str());
    Ok(text.ok_or_else(|| format!("no text in {whole}"))?.to_owned())
}

/// Load time, and what a step takes: prefill of 512 tokens, decode of 1 to 64 rows at a context of 512.
pub fn steps(part: &mut Part, options: &Options) -> Result<(), Fail> {
    let demo = options.fixtures.join("demo-model");
    for (name, path) in [("demo", Some(&demo)), ("checkpoint", options.checkpoint.as_ref())] {
        let Some(path) = path else { continue };
        let rows: &[usize] = if options.device == DeviceChoice::Cpu { &[1, 4] } else { &[1, 8, 64] };
        let settings = EngineSettings {
            max_num_seqs: Some(64),
            max_num_batched_tokens: Some(512),
            kv_cache_gb: Some(4.0),
            ..settings(options.device, options)
        };
        let figures = with_runner(path, &settings, |runner, load| {
            let mut figures = vec![("load".to_owned(), load.as_secs_f64() * 1e3, "ms")];
            time_steps(runner, rows, &mut figures).map_err(|failure| failure.to_string())?;
            Ok((figures, runner.about.device.clone(), runner.about.bytes_per_step))
        })?;
        part.note(format!("{name}: {} on {}, {:.1} MB of weights per step", path.display(), figures.1, figures.2 as f64 / 1e6));
        for (what, value, unit) in figures.0 {
            part.measure(format!("{name}: {what}"), value, unit);
        }
    }
    part.check("every step ran", true, "see the figures");
    Ok(())
}

fn time_steps(
    runner: &mut ModelRunner,
    rows: &[usize],
    figures: &mut Vec<(String, f64, &'static str)>,
) -> Result<(), worker_candle::error::Failure> {
    let vocab = runner.shape().vocab_size as u32;
    let ids: Vec<u32> = (0..1024u32).map(|i| (i * 37 + 11) % vocab).collect();
    let seconds = |runner: &mut ModelRunner, plan: &Plan, times: u32| -> Result<f64, worker_candle::error::Failure> {
        runner.step(plan)?; // warm-up: kernels are compiled and caches filled
        let started = Instant::now();
        for _ in 0..times {
            runner.step(plan)?;
        }
        Ok(started.elapsed().as_secs_f64() / f64::from(times))
    };
    let prefill = seconds(runner, &chunk(&ids, 0, 512), 3)?;
    figures.push(("prefill of 512 tokens".into(), 512.0 / prefill, "tok/s"));
    let room = runner.shape().blocks * BLOCK_SIZE / 1024;
    for n in rows.iter().copied().filter(|n| *n <= room) {
        let mut plan = Plan::default();
        (0..n).for_each(|place| add_row(&mut plan, &ids, 511, 512, place));
        let step = seconds(runner, &plan, 20)?;
        figures.push((format!("decode step of {n} rows"), step * 1e3, "ms"));
        figures.push((format!("decode of {n} rows"), n as f64 / step, "tok/s"));
    }
    Ok(())
}
