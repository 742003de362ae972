//! `bench`: prompts of distinct random tokens, all sequences of a wave at once; the engine alone, or a running server through HTTP.
//!
//! `prefill_tok_s` = prompt tokens / time to the last first token of the wave. `decode_tok_s` = output tokens that came after that moment / time
//! from it to the last token, all sequences together; `null` where none came after. `limit_share` = bytes of weights read per second while decoding / memory
//! bandwidth measured in the same run; `null` where it cannot be known (through HTTP, on a GPU).
//!
//! A model that embeds or scores texts gives one result a sequence, which stands for its first token.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::StreamExt;
use futures::future::try_join_all;
use serde_json::{Value, json};

use super::{model, say};
use crate::api::ModelInfo;
use crate::api::grammar::{CompiledGrammar, Grammar, Grammars};
use crate::checkpoint::files::ModelFiles;
use crate::checkpoint::hub;
use crate::config::{BenchArgs, ExposeSecret, PreparedWriting, Settings};
use crate::engine::{Event, Handle, PoolingRequest, Request, SamplingParams};
use crate::error::Failure;
use crate::kernels;
use crate::models::memory;
use crate::models::runner::About;
use crate::text::tokenizer::Tokenizer;

/// The moments at which one sequence's tokens came, counted from the start of its wave; a moment may stand for several tokens.
type Moments = Vec<(Duration, usize)>;

/// What is measured.
enum Target {
    Engine {
        engine: Handle,
        about: About,
        bandwidth: Option<f64>,
        /// `--structured`.
        grammar: Option<Arc<CompiledGrammar>>,
    },
    /// `salt` makes the prompts of every run others: a running server keeps those of the last one in its prefix cache.
    Server { client: reqwest::Client, url: String, key: Option<String>, salt: u64, structured: bool },
}

/// Measures every concurrency that was asked for, one line each.
pub async fn run(settings: Settings, bench: BenchArgs) -> Result<ExitCode, Failure> {
    let target = Target::open(&settings, &bench).await?;
    if !bench.json {
        target.headline(&settings, &bench);
    }
    // One short wave first: pages touched, threads awake.
    target.wave(&settings, 1, 16, 4, 0).await?;
    for (index, concurrency) in bench.concurrency.iter().enumerate() {
        let wave = target.wave(&settings, *concurrency, bench.prompt_tokens, bench.output_tokens, index as u64 + 1).await?;
        let row = target.row(&wave, *concurrency, &bench);
        say(&if bench.json { row.to_string() } else { table_row(&row) });
    }
    Ok(ExitCode::SUCCESS)
}

impl Target {
    async fn open(settings: &Settings, bench: &BenchArgs) -> Result<Self, Failure> {
        if let Some(url) = &bench.url {
            let client =
                reqwest::Client::builder().no_proxy().build().map_err(|error| Failure::internal(format!("HTTP client: {error}")))?;
            let key = settings.server.api_keys.first().map(|key| key.expose_secret().to_string());
            let url = url.trim_end_matches('/').trim_end_matches("/v1").to_string();
            let salt = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64 >> 10);
            return Ok(Self::Server { client, url, key, salt, structured: bench.structured });
        }
        let only = settings.only_model("bench").map_err(|error| Failure::internal(error.to_string()))?;
        let files = hub::fetch(only, &settings.hub).await?;
        // A copy that is written beside the measurement would be measured, too.
        let mut settings = settings.clone();
        settings.engine.prepared_writing = PreparedWriting::Never;
        let (engine, about) = model::start_engine(&settings, &files, None, || Ok(usize::MAX.into())).await?;
        let pools = engine.limits().pooling.is_some();
        let needed = bench.prompt_tokens + if pools { 0 } else { bench.output_tokens };
        if needed > engine.limits().max_model_len {
            let limit = engine.limits().max_model_len;
            return Err(Failure::internal(format!(
                "--prompt-tokens + --output-tokens = {needed} is more than the context of {limit} tokens (--max-model-len)"
            )));
        }
        let (rows, waiting) = (engine.limits().max_num_seqs, engine.limits().max_waiting);
        if let Some(most) = bench.concurrency.iter().find(|concurrency| **concurrency > rows + waiting) {
            return Err(Failure::internal(format!(
                "--concurrency {most} is more than the engine takes at a time: MAX_NUM_SEQS={rows} that run and MAX_WAITING={waiting} that wait; \
                 raise one of them (--max-num-seqs, --max-waiting)"
            )));
        }
        // Measured is what a worker does that has been up for a while.
        while !engine.stats().memory_resident && engine.failure().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let on_cpu = about.threads > 0;
        let bandwidth = on_cpu.then(|| memory_bandwidth(about.threads));
        let grammar = bench.structured.then(|| endless_json(&files, &engine)).transpose()?;
        Ok(Self::Engine { engine, about, bandwidth, grammar })
    }

    fn headline(&self, settings: &Settings, bench: &BenchArgs) {
        match self {
            Self::Engine { about, bandwidth, .. } => {
                let bandwidth = bandwidth.map_or(String::new(), |b| format!(", memory bandwidth {:.1} GB/s", b / 1e9));
                say(&format!("{}: {}, {} threads, weights {}{bandwidth}", settings.model, about.device, about.threads, about.weights));
            }
            Self::Server { url, .. } => say(&format!("server at {url}")),
        }
        say(&format!("{} prompt tokens, {} output tokens", bench.prompt_tokens, bench.output_tokens));
        say("concurrency  prefill tok/s  decode tok/s  TTFT p50/p95 ms  ITL p50/p95 ms  of the limit  peak MiB");
    }

    /// Runs `concurrency` sequences together.
    async fn wave(
        &self,
        settings: &Settings,
        concurrency: usize,
        prompt: usize,
        output: usize,
        seed: u64,
    ) -> Result<Vec<Moments>, Failure> {
        let begin = Instant::now();
        match self {
            Self::Engine { engine, grammar, .. } => {
                let (vocab, pools) = (engine.limits().vocab_size, engine.limits().pooling.is_some());
                let submitted: Result<Vec<_>, _> = (0..concurrency)
                    .map(|i| engine.submit(engine_request(random_prompt(prompt, vocab, seed, i), output, pools, grammar.as_deref())))
                    .collect();
                try_join_all(submitted?.into_iter().map(|mut generation| async move {
                    let mut moments = Vec::with_capacity(output);
                    loop {
                        match generation.next().await {
                            Event::Started { .. } | Event::Prompt(_) => {}
                            Event::Token(_) | Event::Pooled(_) => moments.push((begin.elapsed(), 1)),
                            Event::Finished(_) => return Ok(moments),
                            Event::Failed(failure) => return Err(failure),
                        }
                    }
                }))
                .await
            }
            Self::Server { client, url, key, salt, structured } => {
                let one = |i: usize| {
                    // Ids that every vocabulary has and that are not control tokens.
                    let mut body = json!({"model": null, "prompt": random_prompt(prompt, 1_000, salt.wrapping_add(seed), i), "max_tokens": output, "ignore_eos": true, "temperature": 0, "stream": true,
                        "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
                    if *structured {
                        body["guided_json"] = endless_schema();
                    }
                    let request = client.post(format!("{url}/v1/completions")).json(&body);
                    let request = if let Some(key) = key { request.bearer_auth(key) } else { request };
                    read_stream(request, begin)
                };
                let _ = settings;
                try_join_all((0..concurrency).map(one)).await
            }
        }
    }

    fn row(&self, wave: &[Moments], concurrency: usize, bench: &BenchArgs) -> Value {
        let figures = Figures::of(wave, bench.prompt_tokens);
        let limit_share = match self {
            // One pass over the weights serves all sequences that run.
            Self::Engine { about, bandwidth: Some(bandwidth), .. } => Some(figures.steps_s * about.bytes_per_step as f64 / bandwidth),
            _ => None,
        };
        let [weights, kv_cache_dtype, threads, device] = match self {
            Self::Engine { about, .. } => [json!(about.weights), json!(about.kv_cache_dtype), json!(about.threads), json!(about.device)],
            Self::Server { .. } => [const { Value::Null }; 4],
        };
        let peak = matches!(self, Self::Engine { .. }).then(memory::peak_rss_mb).flatten();
        json!({"prompt_tokens": bench.prompt_tokens, "output_tokens": bench.output_tokens, "concurrency": concurrency,
            "prefill_tok_s": round(figures.prefill_tok_s), "decode_tok_s": Some(figures.decode_tok_s).filter(|rate| *rate > 0.0).map(round), "ttft_ms": percentiles(figures.ttft), "itl_ms": percentiles(figures.itl),
            "peak_rss_mb": peak, "limit_share": limit_share.map(|share| (share * 1000.0).round() / 1000.0), "weights": weights, "threads": threads, "device": device, "kv_cache_dtype": kv_cache_dtype})
    }
}

/// A list of a million entries: nothing in it is forced, and it does not end before its length does.
fn endless_schema() -> Value {
    json!({"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 1_000_000})
}

fn endless_json(files: &ModelFiles, engine: &Handle) -> Result<Arc<CompiledGrammar>, Failure> {
    let tokenizer = Arc::new(Tokenizer::load(files)?);
    let eos = Arc::new(ModelInfo::from_files(files)?.eos_token_ids()?);
    Grammars::new(tokenizer, engine.limits().vocab_size, eos).compile(&Grammar::json_schema(endless_schema()))
}

fn engine_request(prompt: Vec<u32>, output: usize, pools: bool, grammar: Option<&CompiledGrammar>) -> Request {
    let params = SamplingParams { temperature: 0.0, max_tokens: if pools { 0 } else { output }, ignore_eos: true, ..Default::default() };
    Request {
        id: "bench".into(),
        prompt: Arc::new(prompt),
        params,
        prompt_logprobs: None,
        deadline: None,
        pooling: pools.then(PoolingRequest::default),
        constraint: grammar.map(CompiledGrammar::constraint),
    }
}

/// Distinct in every wave and sequence, so that nothing is cached.
fn random_prompt(len: usize, vocab: usize, seed: u64, sequence: usize) -> Vec<u32> {
    let low = 300.min(vocab / 2);
    let mut state = (seed << 32 | sequence as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (low + (state >> 33) as usize % (vocab - low)) as u32
        })
        .collect()
}

/// Reads a completion stream; the running usage tells how many tokens a chunk stands for.
async fn read_stream(request: reqwest::RequestBuilder, begin: Instant) -> Result<Moments, Failure> {
    let failed = |error: reqwest::Error| Failure::internal(format!("the server: {error}"));
    let response = request.send().await.map_err(failed)?;
    if !response.status().is_success() {
        let status = response.status();
        return Err(Failure::internal(format!("the server answered {status}: {}", response.text().await.unwrap_or_default())));
    }
    let (mut moments, mut counted, mut text) = (Moments::new(), 0, String::new());
    let mut body = response.bytes_stream();
    while let Some(bytes) = body.next().await {
        text.push_str(&String::from_utf8_lossy(&bytes.map_err(failed)?));
        while let Some(end) = text.find("\n\n") {
            let frame: String = text.drain(..end + 2).collect();
            let Some(chunk) = frame.strip_prefix("data: ").and_then(|data| serde_json::from_str::<Value>(data).ok()) else { continue };
            if let Some(message) = chunk["error"]["message"].as_str() {
                return Err(Failure::internal(format!("the server: {message}")));
            }
            let total = chunk["usage"]["completion_tokens"].as_u64().unwrap_or(counted);
            if total > counted {
                moments.push((begin.elapsed(), (total - counted) as usize));
                counted = total;
            }
        }
    }
    if moments.is_empty() { Err(Failure::internal("the server's stream gave no tokens, or no usage")) } else { Ok(moments) }
}

struct Figures {
    prefill_tok_s: f64,
    decode_tok_s: f64,
    /// Steps of the engine while all sequences decode: whichever ends last has a token in each of them.
    steps_s: f64,
    ttft: Vec<f64>,
    itl: Vec<f64>,
}

impl Figures {
    fn of(wave: &[Moments], prompt_tokens: usize) -> Self {
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let firsts: Vec<Duration> = wave.iter().filter_map(|moments| moments.first()).map(|(at, _)| *at).collect();
        let last_first = firsts.iter().max().copied().unwrap_or_default();
        let last = wave.iter().filter_map(|moments| moments.last()).map(|(at, _)| *at).max().unwrap_or_default();
        let after: usize = wave.iter().flatten().filter(|(at, _)| *at > last_first).map(|(_, count)| count).sum();
        let decode = (last - last_first).as_secs_f64();
        let steps = wave.iter().map(|moments| moments.iter().filter(|(at, _)| *at > last_first).count()).max().unwrap_or_default();
        let per_second = |count: usize| if decode > 0.0 { count as f64 / decode } else { 0.0 };
        // Several tokens in one chunk share the gap before it.
        let gaps = wave
            .iter()
            .flat_map(|moments| moments.windows(2))
            .flat_map(|pair| std::iter::repeat_n(ms(pair[1].0 - pair[0].0) / pair[1].1 as f64, pair[1].1));
        Self {
            prefill_tok_s: (prompt_tokens * wave.len()) as f64 / last_first.as_secs_f64(),
            decode_tok_s: per_second(after),
            steps_s: per_second(steps),
            ttft: firsts.iter().map(|at| ms(*at)).collect(),
            itl: gaps.collect(),
        }
    }
}

fn percentiles(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    let at =
        |p: f64| values.get(((values.len() as f64 * p).ceil() as usize).saturating_sub(1)).map(|value| (value * 100.0).round() / 100.0);
    json!({"p50": at(0.50), "p95": at(0.95), "p99": at(0.99)})
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn table_row(row: &Value) -> String {
    let number = |value: &Value| value.as_f64().map_or("-".to_string(), |value| format!("{value:.1}"));
    let pair = |value: &Value| format!("{} / {}", number(&value["p50"]), number(&value["p95"]));
    let share = row["limit_share"].as_f64().map_or("-".to_string(), |share| format!("{:.0} %", share * 100.0));
    format!(
        "{:>11}  {:>13}  {:>12}  {:>15}  {:>14}  {:>12}  {:>8}",
        row["concurrency"].to_string(),
        number(&row["prefill_tok_s"]),
        number(&row["decode_tok_s"]),
        pair(&row["ttft_ms"]),
        pair(&row["itl_ms"]),
        share,
        number(&row["peak_rss_mb"])
    )
}

/// Bytes per second that `threads` threads read from main memory together: the best of five passes over a buffer no cache holds.
fn memory_bandwidth(threads: usize) -> f64 {
    const BYTES: usize = 1 << 30;
    let data = vec![1f32; BYTES / 4];
    let pass = || {
        let begin = Instant::now();
        let total: f32 = std::thread::scope(|scope| {
            let parts: Vec<_> =
                data.chunks(data.len().div_ceil(threads)).map(|part| scope.spawn(move || kernels::cpu::read(part))).collect();
            parts.into_iter().filter_map(|part| part.join().ok()).sum()
        });
        std::hint::black_box(total);
        BYTES as f64 / begin.elapsed().as_secs_f64()
    };
    let best = (0..5).map(|_| pass()).fold(0.0, f64::max);
    drop(data);
    // The buffer is not the model's: the peak of memory starts anew here, where the system allows it.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_a_known_wave() {
        let at = |ms: u64| (Duration::from_millis(ms), 1);
        // Two sequences of 10 prompt tokens; the second starts later. After 200 ms come 3 tokens in 200 ms.
        let wave = vec![vec![at(100), at(150), at(250), at(400)], vec![at(200), at(300)]];
        let figures = Figures::of(&wave, 10);
        assert_eq!((figures.prefill_tok_s, figures.decode_tok_s, figures.steps_s), (100.0, 15.0, 10.0));
        assert_eq!(figures.ttft, [100.0, 200.0]);
        assert_eq!(figures.itl, [50.0, 100.0, 150.0, 100.0]);
        assert_eq!(percentiles(figures.itl), json!({"p50": 100.0, "p95": 150.0, "p99": 150.0}));
    }

    #[test]
    fn a_wave_with_more_sequences_than_rows_counts_its_passes_over_the_weights() {
        let at = |ms: u64| (Duration::from_millis(ms), 1);
        // Of three sequences two run at a time: the third begins when the first has ended.
        let wave = vec![vec![at(10), at(20), at(30)], vec![at(10), at(20), at(30), at(40), at(50)], vec![at(40), at(50), at(60), at(70)]];
        let figures = Figures::of(&wave, 1);
        assert_eq!((figures.decode_tok_s.round(), figures.steps_s.round()), (133.0, 100.0));
    }

    #[test]
    fn prompts_are_distinct_and_in_the_vocabulary() {
        let all: std::collections::HashSet<Vec<u32>> =
            (0..4).flat_map(|seed| (0..4).map(move |i| random_prompt(64, 2_000, seed, i))).collect();
        assert_eq!(all.len(), 16);
        assert!(all.iter().flatten().all(|id| (300..2_000).contains(id)));
    }
}
