//! What the engine measures, as Prometheus metrics (under vLLM's names, after a prefix) and as a line in the log.

use std::time::{Duration, Instant};

use super::{Request, Stats};
use crate::telemetry::metrics::{COUNTS, Exposition, Histogram, SECONDS, TOKENS, Total};

/// How a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Stop,
    Length,
    /// Its receiver was dropped.
    Cancelled,
    Failed,
}

/// Histograms, and how many sequences ended in which way, since the start.
#[derive(Debug, Clone, PartialEq)]
pub struct Metrics {
    /// From submission to the first token.
    pub time_to_first_token: Histogram,
    /// Between two tokens of a sequence. Several tokens of one step share its time evenly.
    pub inter_token_latency: Histogram,
    /// From submission to the last token.
    pub request_time: Histogram,
    /// From submission to admission.
    pub queue_time: Histogram,
    pub step_time: Histogram,
    /// Tokens in one step.
    pub step_tokens: Histogram,
    pub request_prompt_tokens: Histogram,
    pub request_output_tokens: Histogram,
    /// From admission to the first token.
    pub prefill_time: Histogram,
    /// From the first token to the last.
    pub decode_time: Histogram,
    /// From admission to the last token.
    pub inference_time: Histogram,
    /// Mean time between the tokens of a sequence.
    pub time_per_output_token: Histogram,
    /// How many choices were asked for, by prompt.
    pub params_n: Histogram,
    /// The `max_tokens` of sequences.
    pub params_max_tokens: Histogram,
    stopped: u64,
    length: u64,
    cancelled: u64,
    failed: u64,
}

impl Default for Metrics {
    fn default() -> Self {
        let (seconds, tokens) = (Histogram::new(SECONDS), Histogram::new(TOKENS));
        Self {
            time_to_first_token: seconds.clone(),
            inter_token_latency: seconds.clone(),
            request_time: seconds.clone(),
            queue_time: seconds.clone(),
            step_time: seconds.clone(),
            step_tokens: tokens.clone(),
            request_prompt_tokens: tokens.clone(),
            request_output_tokens: tokens.clone(),
            prefill_time: seconds.clone(),
            decode_time: seconds.clone(),
            inference_time: seconds.clone(),
            time_per_output_token: seconds,
            params_n: Histogram::new(COUNTS),
            params_max_tokens: tokens,
            stopped: 0,
            length: 0,
            cancelled: 0,
            failed: 0,
        }
    }
}

/// When things happened to one sequence.
#[derive(Debug, Clone)]
pub struct Moments {
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    prompt_tokens: usize,
    output_tokens: usize,
    choices: usize,
    max_tokens: usize,
}

impl Moments {
    pub fn new(submitted: Instant, request: &Request) -> Self {
        Self {
            submitted,
            started: None,
            first_token: None,
            last_token: None,
            prompt_tokens: request.prompt.len(),
            output_tokens: 0,
            choices: request.params.choices,
            max_tokens: request.params.max_tokens,
        }
    }
}

impl Metrics {
    /// A sequence is admitted for the first time.
    pub fn started(&mut self, moments: &mut Moments, now: Instant) {
        self.queue_time.record_time(now.saturating_duration_since(moments.submitted));
        moments.started = Some(now);
    }

    /// `count` tokens of one sequence came at once.
    pub fn tokens(&mut self, moments: &mut Moments, count: usize, now: Instant) {
        moments.first_token.get_or_insert(now);
        match moments.last_token.replace(now) {
            None => {
                self.time_to_first_token.record_time(now.saturating_duration_since(moments.submitted));
                // No time passed between the first token and those that came with it.
                self.inter_token_latency.record_many(0.0, count.saturating_sub(1) as u64);
            }
            Some(last) => {
                let gap = now.saturating_duration_since(last).as_secs_f64() / count.max(1) as f64;
                self.inter_token_latency.record_many(gap, count as u64);
            }
        }
        moments.output_tokens += count;
    }

    pub fn ended(&mut self, moments: &Moments, ended: Ended, now: Instant) {
        match ended {
            Ended::Stop => self.stopped += 1,
            Ended::Length => self.length += 1,
            Ended::Cancelled => self.cancelled += 1,
            Ended::Failed => self.failed += 1,
        }
        if matches!(ended, Ended::Stop | Ended::Length) {
            self.request_time.record_time(now.saturating_duration_since(moments.submitted));
            self.request_prompt_tokens.record(moments.prompt_tokens as f64);
            self.request_output_tokens.record(moments.output_tokens as f64);
            self.params_max_tokens.record(moments.max_tokens as f64);
            if moments.choices > 0 {
                self.params_n.record(moments.choices as f64);
            }
            if let (Some(started), Some(first), Some(last)) = (moments.started, moments.first_token, moments.last_token) {
                let decode = last.saturating_duration_since(first);
                self.prefill_time.record_time(first.saturating_duration_since(started));
                self.decode_time.record_time(decode);
                self.inference_time.record_time(last.saturating_duration_since(started));
                if moments.output_tokens > 1 {
                    self.time_per_output_token.record(decode.as_secs_f64() / (moments.output_tokens - 1) as f64);
                }
            }
        }
    }
}

impl Stats {
    /// A step of so many tokens has taken so long.
    pub fn step(&mut self, tokens: usize, time: Duration) {
        self.steps += 1;
        self.metrics.step_tokens.record(tokens as f64);
        self.metrics.step_time.record_time(time);
    }

    /// Share of the KV cache that running sequences hold.
    pub fn kv_usage(&self) -> f64 {
        share((self.blocks_total - self.blocks_free.min(self.blocks_total)) as u64, self.blocks_total as u64)
    }

    /// These figures in Prometheus' text format. `prefix` begins every name; `vllm:` makes them vLLM's.
    pub fn exposition(&self, prefix: &str, model: &str) -> String {
        let mut text = Exposition::new(prefix, &[("model_name", model)]);
        let m = &self.metrics;
        text.gauge("num_requests_running", "Sequences being computed.", self.running as f64);
        text.gauge("num_requests_waiting", "Sequences waiting to be computed.", self.waiting as f64);
        text.gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", self.kv_usage());
        text.gauge("kv_cache_blocks", "Blocks of the KV cache.", self.blocks_total as f64);
        let block_size = self.block_size.to_string();
        let of_cache = [("cache_dtype", self.kv_cache_dtype), ("block_size", &block_size)];
        text.info("cache_config_info", "What the KV cache holds, and tokens in a block.", &of_cache);
        text.gauge("kv_cache_cached_blocks", "Blocks that nobody uses and the prefix cache keeps.", self.blocks_cached as f64);
        text.gauge("healthy", "1, or 0 after a fault that needs a restart.", f64::from(u8::from(self.healthy)));
        let resident = f64::from(u8::from(self.memory_resident));
        text.gauge("memory_resident", "1 once the KV cache and the step buffers have all their memory.", resident);
        text.counter("num_preemptions_total", "Sequences put back for want of KV cache.", self.preempted);
        text.counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", self.prefix_queried);
        text.counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", self.prefix_hits);
        text.counter("spec_decode_num_draft_tokens_total", "Draft tokens proposed by prompt lookup.", self.drafted);
        text.counter("spec_decode_num_accepted_tokens_total", "Draft tokens that were accepted.", self.accepted);
        text.counter("prompt_tokens_total", "Prompt tokens of submitted sequences.", self.prompt_tokens);
        text.counter("generation_tokens_total", "Tokens generated.", self.output_tokens);
        text.counters(
            "request_success_total",
            "Sequences that ended, by reason.",
            "finished_reason",
            &[("stop", m.stopped), ("length", m.length), ("abort", m.cancelled), ("error", m.failed)],
        );
        text.histogram("time_to_first_token_seconds", "From submission to the first token.", &m.time_to_first_token);
        text.histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", &m.inter_token_latency);
        text.histogram("e2e_request_latency_seconds", "From submission to the last token.", &m.request_time);
        text.histogram("request_queue_time_seconds", "From submission to admission.", &m.queue_time);
        text.histogram("step_time_seconds", "One step of the engine.", &m.step_time);
        text.histogram("iteration_tokens_total", "Tokens computed in one step.", &m.step_tokens);
        text.histogram("request_prompt_tokens", "Prompt tokens of ended sequences.", &m.request_prompt_tokens);
        text.histogram("request_generation_tokens", "Tokens generated of ended sequences.", &m.request_output_tokens);
        text.histogram("request_prefill_time_seconds", "From admission to the first token.", &m.prefill_time);
        text.histogram("request_decode_time_seconds", "From the first token to the last.", &m.decode_time);
        text.histogram("request_inference_time_seconds", "From admission to the last token.", &m.inference_time);
        text.histogram("request_time_per_output_token_seconds", "Mean time between the tokens of a sequence.", &m.time_per_output_token);
        text.histogram("request_params_n", "Choices asked for, by prompt.", &m.params_n);
        text.histogram("request_params_max_tokens", "Tokens that sequences might have generated at most.", &m.params_max_tokens);
        text.finish()
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Makes one line for the log for every ten seconds of work. Pauses between the work do not count.
pub struct Log {
    window: Option<(Instant, Counts)>,
    enabled: bool,
}

const EVERY: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    computed_prompt: u64,
    output: u64,
    queried: u64,
    hits: u64,
    preempted: u64,
    first_tokens: Total,
    gaps: Total,
    steps: Total,
}

impl Log {
    pub fn new(enabled: bool) -> Self {
        Self { window: None, enabled }
    }

    /// Leaves out time in which there was nothing to do.
    pub fn idled(&mut self, time: Duration) {
        if let Some((since, _)) = &mut self.window {
            *since += time;
        }
    }

    /// After a step: the line, when one is due. `computed_prompt`: prompt tokens computed so far.
    pub fn line(&mut self, stats: &Stats, computed_prompt: u64, now: Instant) -> Option<String> {
        if !self.enabled {
            return None;
        }
        let metrics = &stats.metrics;
        let counts = Counts {
            computed_prompt,
            output: stats.output_tokens,
            queried: stats.prefix_queried,
            hits: stats.prefix_hits,
            preempted: stats.preempted,
            first_tokens: metrics.time_to_first_token.total(),
            gaps: metrics.inter_token_latency.total(),
            steps: metrics.step_time.total(),
        };
        let (since, before) = *self.window.get_or_insert((now, counts));
        let seconds = now.saturating_duration_since(since).as_secs_f64();
        if seconds < EVERY.as_secs_f64() {
            return None;
        }
        self.window = Some((now, counts));
        let mean = |now: Total, before: Total| now.mean_since(before).map_or("-".to_owned(), |mean| format!("{:.1} ms", mean * 1e3));
        Some(format!(
            "{:.1} tokens/s generated, {:.1} tokens/s of prompts, {} running, {} waiting, {} preempted, KV cache {:.1} % used, \
             prefix hits {:.1} %, mean TTFT {}, ITL {}, step {}",
            (counts.output - before.output) as f64 / seconds,
            (counts.computed_prompt - before.computed_prompt) as f64 / seconds,
            stats.running,
            stats.waiting,
            counts.preempted - before.preempted,
            stats.kv_usage() * 100.0,
            share(counts.hits - before.hits, counts.queried - before.queried) * 100.0,
            mean(counts.first_tokens, before.first_tokens),
            mean(counts.gaps, before.gaps),
            mean(counts.steps, before.steps),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::SamplingParams;

    #[test]
    fn tokens_of_one_step_share_its_time() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let params = SamplingParams { max_tokens: 9, choices: 3, ..Default::default() };
        let request = Request {
            id: "t".into(),
            prompt: vec![1; 7].into(),
            params,
            prompt_logprobs: None,
            deadline: None,
            pooling: None,
            constraint: None,
        };
        let (mut metrics, mut moments) = (Metrics::default(), Moments::new(start, &request));
        metrics.started(&mut moments, at(100));
        metrics.tokens(&mut moments, 1, at(300));
        metrics.tokens(&mut moments, 4, at(500));
        metrics.ended(&moments, Ended::Stop, at(500));
        let mut ttft = Histogram::new(SECONDS);
        ttft.record(0.3);
        assert_eq!(metrics.time_to_first_token, ttft);
        let mut itl = Histogram::new(SECONDS);
        itl.record_many(0.05, 4);
        assert_eq!(metrics.inter_token_latency, itl);
        assert_eq!((metrics.request_time.count(), metrics.request_output_tokens.count(), metrics.stopped), (1, 1, 1));
        let one = |bounds, value| {
            let mut histogram = Histogram::new(bounds);
            histogram.record(value);
            histogram
        };
        assert_eq!((&metrics.queue_time, &metrics.prefill_time), (&one(SECONDS, 0.1), &one(SECONDS, 0.2)));
        assert_eq!((&metrics.decode_time, &metrics.inference_time), (&one(SECONDS, 0.2), &one(SECONDS, 0.4)));
        assert_eq!(metrics.time_per_output_token, one(SECONDS, 0.05));
        assert_eq!((&metrics.params_n, &metrics.params_max_tokens), (&one(COUNTS, 3.0), &one(TOKENS, 9.0)));
        // The other choices of a prompt do not tell again how many they are.
        moments.choices = 0;
        metrics.ended(&moments, Ended::Length, at(500));
        metrics.ended(&moments, Ended::Cancelled, at(500));
        assert_eq!((metrics.params_n.count(), metrics.params_max_tokens.count(), metrics.inference_time.count()), (1, 2, 2));
    }

    #[test]
    fn every_metric_once_and_under_vllms_names() {
        let cache = Stats { blocks_total: 8, blocks_free: 2, block_size: 32, kv_cache_dtype: "float16", ..Default::default() };
        let stats = Stats { running: 2, healthy: true, ..cache };
        let text = stats.exposition("vllm:", "demo");
        for line in [
            "vllm:num_requests_running{model_name=\"demo\"} 2",
            "vllm:kv_cache_usage_perc{model_name=\"demo\"} 0.75",
            "vllm:cache_config_info{model_name=\"demo\",cache_dtype=\"float16\",block_size=\"32\"} 1",
        ] {
            assert!(text.lines().any(|present| present == line), "{line} in {text}");
        }
        let mut names: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn a_line_every_ten_seconds_of_work() {
        let (start, mut log) = (Instant::now(), Log::new(true));
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let stats = |output: u64| {
            let mut stats = Stats {
                output_tokens: output,
                prefix_queried: output,
                prefix_hits: output / 2,
                preempted: output / 50,
                running: 3,
                ..Default::default()
            };
            stats.metrics.time_to_first_token.record_many(0.25, output);
            stats.metrics.inter_token_latency.record_many(0.0125, 2 * output);
            stats.metrics.step_time.record_many(0.012, output);
            stats
        };
        assert_eq!(log.line(&stats(0), 0, at(0)), None);
        assert_eq!(log.line(&stats(90), 40, at(9)), None);
        let line = log.line(&stats(100), 50, at(10)).unwrap();
        assert_eq!(
            line,
            "10.0 tokens/s generated, 5.0 tokens/s of prompts, 3 running, 0 waiting, 2 preempted, KV cache 0.0 % used, \
             prefix hits 50.0 %, mean TTFT 250.0 ms, ITL 12.5 ms, step 12.0 ms"
        );
        log.idled(Duration::from_secs(90));
        assert_eq!(log.line(&stats(100), 50, at(100)), None, "idle time does not count");
        assert!(log.line(&stats(120), 50, at(110)).unwrap().starts_with("2.0 tokens/s"));
        let still = log.line(&stats(120), 60, at(120)).unwrap();
        assert!(still.contains(" 0 preempted") && still.ends_with("mean TTFT -, ITL -, step -"), "{still}");
    }

    #[test]
    fn one_request_after_the_other_is_work() {
        let (mut now, mut log, mut lines) = (Instant::now(), Log::new(true), 0);
        for request in 0..500 {
            // A tenth of a second each, with pauses between them.
            now += Duration::from_millis(100);
            lines += usize::from(log.line(&Stats { output_tokens: request, ..Default::default() }, 0, now).is_some());
            let pause = Duration::from_millis(30 + 1_000 * (request % 20));
            log.idled(pause);
            now += pause;
        }
        assert_eq!(lines, 4, "50 s of work but for the first tenth of a second");
    }
}
