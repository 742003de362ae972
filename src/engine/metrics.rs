//! What the engine measures, and how it is told: names as vLLM has them, after a prefix.

use std::time::{Duration, Instant};

use super::Stats;
use crate::telemetry::metrics::{Exposition, Histogram, SECONDS, TOKENS};

/// How a sequence ended, for the count of ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Stop,
    Length,
    /// Its receiver was dropped.
    Cancelled,
    Failed,
}

/// Distributions and ends since the start.
#[derive(Debug, Clone, PartialEq)]
pub struct Metrics {
    /// From submission to the first token.
    pub time_to_first_token: Histogram,
    /// Between two tokens of a sequence; several of one step share its time.
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
            step_time: seconds,
            step_tokens: tokens.clone(),
            request_prompt_tokens: tokens.clone(),
            request_output_tokens: tokens,
            stopped: 0,
            length: 0,
            cancelled: 0,
            failed: 0,
        }
    }
}

/// The moments of one sequence.
#[derive(Debug, Clone)]
pub struct Moments {
    pub submitted: Instant,
    pub prompt_tokens: usize,
    last_token: Option<Instant>,
    output_tokens: usize,
}

impl Moments {
    pub fn new(submitted: Instant, prompt_tokens: usize) -> Self {
        Self { submitted, prompt_tokens, last_token: None, output_tokens: 0 }
    }
}

impl Metrics {
    /// `count` tokens of one sequence came at once.
    pub fn tokens(&mut self, moments: &mut Moments, count: usize, now: Instant) {
        match moments.last_token.replace(now) {
            None => {
                self.time_to_first_token.record_time(now.saturating_duration_since(moments.submitted));
                // The others came with the first: no time between them.
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
        }
    }
}

impl Stats {
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
        text.gauge("kv_cache_cached_blocks", "Blocks that nobody uses and the prefix cache keeps.", self.blocks_cached as f64);
        text.gauge("healthy", "1, or 0 after a fault that needs a restart.", f64::from(u8::from(self.healthy)));
        let resident = f64::from(u8::from(self.memory_resident));
        text.gauge("memory_resident", "1 once the KV cache and the step buffers have all their memory.", resident);
        text.counter("num_preemptions_total", "Sequences put back for want of KV cache.", self.preempted);
        text.counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", self.prefix_queried);
        text.counter("prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", self.prefix_hits);
        text.counter("spec_decode_num_draft_tokens_total", "Tokens guessed by prompt lookup.", self.guessed);
        text.counter("spec_decode_num_accepted_tokens_total", "Guessed tokens that came true.", self.accepted);
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
        text.finish()
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// One line in the log every ten seconds while there is work.
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
}

impl Log {
    pub fn new(enabled: bool) -> Self {
        Self { window: None, enabled }
    }

    /// The work is done: the next line counts from when there is some again.
    pub fn idle(&mut self) {
        self.window = None;
    }

    /// After a step. `computed_prompt`: prompt tokens computed so far.
    pub fn step(&mut self, stats: &Stats, computed_prompt: u64, now: Instant) {
        if let Some(line) = self.line(stats, computed_prompt, now)
            && self.enabled
        {
            tracing::info!("{line}");
        }
    }

    fn line(&mut self, stats: &Stats, computed_prompt: u64, now: Instant) -> Option<String> {
        let counts = Counts { computed_prompt, output: stats.output_tokens, queried: stats.prefix_queried, hits: stats.prefix_hits };
        let (since, before) = *self.window.get_or_insert((now, counts));
        let seconds = now.saturating_duration_since(since).as_secs_f64();
        if seconds < EVERY.as_secs_f64() {
            return None;
        }
        self.window = Some((now, counts));
        Some(format!(
            "{:.1} tokens/s generated, {:.1} tokens/s of prompts, {} running, {} waiting, KV cache {:.1} % used, prefix hits {:.1} %",
            (counts.output - before.output) as f64 / seconds,
            (counts.computed_prompt - before.computed_prompt) as f64 / seconds,
            stats.running,
            stats.waiting,
            stats.kv_usage() * 100.0,
            share(counts.hits - before.hits, counts.queried - before.queried) * 100.0
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_one_step_share_its_time() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let (mut metrics, mut moments) = (Metrics::default(), Moments::new(start, 7));
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
    }

    #[test]
    fn every_metric_once_and_under_vllms_names() {
        let stats = Stats { running: 2, blocks_total: 8, blocks_free: 2, healthy: true, ..Default::default() };
        let text = stats.exposition("vllm:", "demo");
        for line in ["vllm:num_requests_running{model_name=\"demo\"} 2", "vllm:kv_cache_usage_perc{model_name=\"demo\"} 0.75"] {
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
        let stats = |output: u64| Stats {
            output_tokens: output,
            prefix_queried: output,
            prefix_hits: output / 2,
            running: 3,
            ..Default::default()
        };
        assert_eq!(log.line(&stats(0), 0, at(0)), None);
        assert_eq!(log.line(&stats(90), 40, at(9)), None);
        let line = log.line(&stats(100), 50, at(10)).unwrap();
        assert!(line.starts_with("10.0 tokens/s generated, 5.0 tokens/s of prompts, 3 running, 0 waiting"), "{line}");
        assert!(line.ends_with("prefix hits 50.0 %"), "{line}");
        log.idle();
        assert_eq!(log.line(&stats(500), 50, at(100)), None, "idle time does not count");
        assert!(log.line(&stats(520), 50, at(110)).unwrap().starts_with("2.0 tokens/s"));
    }
}
