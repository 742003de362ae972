//! From settings as typed to settings as meant. Nothing is guessed: what cannot be read is a mistake.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::sources::Merged;
use super::{
    ApiSettings, Args, BatchGrowth, ContentFormat, DEFAULT_MODEL, DeviceChoice, EngineSettings, Env, HubSettings, LogLevel, LogSettings,
    LogprobsMode, Mistake, NativeFormat, Quantization, RunpodSettings, Secret, ServerSettings, Settings, Speculative, Surroundings, parse,
    policy, report,
};

/// Words for "decide yourself".
const AUTO: &[&str] = &["auto", "-1"];

impl Settings {
    /// Resolves flags, environment and files. All mistakes are reported at once.
    pub fn resolve(args: &Args, surroundings: &Surroundings) -> Result<Self, Vec<Mistake>> {
        let mut merged = Merged::read(args, surroundings);
        let env = merged.env();
        let mut reader = Reader { merged, mistakes: Vec::new() };
        let mut settings = reader.settings(&env);
        let mistakes: Vec<_> = reader.merged.mistakes.drain(..).chain(reader.mistakes.drain(..)).collect();
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        settings.given = report::given(reader.merged.origins());
        settings.warnings = reader.merged.warnings;
        Ok(settings)
    }

    /// What can be read of settings that do not hold, the rest as if it were not set: enough to tell the platform that they do not.
    pub fn salvage(args: &Args, surroundings: &Surroundings) -> Self {
        let mut merged = Merged::read(args, surroundings);
        let env = merged.env();
        Reader { merged, mistakes: Vec::new() }.settings(&env)
    }
}

/// Reads values and collects what is wrong with them.
struct Reader {
    merged: Merged,
    mistakes: Vec<Mistake>,
}

impl Reader {
    fn settings(&mut self, env: &Env) -> Settings {
        let model = text(&env.model).unwrap_or_else(|| DEFAULT_MODEL.to_owned());
        let engine = self.engine(env);
        Settings {
            hub: self.hub(env),
            api: ApiSettings { seed: engine.seed, request_timeout: engine.request_timeout, ..self.api(env) },
            runpod: self.runpod(env),
            server: self.server(env),
            log: LogSettings { level: self.log_level(env) },
            engine,
            model,
            given: Vec::new(),
            warnings: Vec::new(),
        }
    }

    fn hub(&mut self, env: &Env) -> HubSettings {
        let home = text(&env.home).map(PathBuf::from);
        let base = text(&env.xdg_cache_home).map(PathBuf::from).or_else(|| Some(home.clone()?.join(".cache")));
        let default_home = base.unwrap_or_else(|| ".cache".into()).join("huggingface");
        let hf_home = text(&env.hf_home).map(PathBuf::from).unwrap_or_else(|| default_home.clone());
        let cache = text(&env.hf_hub_cache).map(PathBuf::from).unwrap_or_else(|| hf_home.join("hub"));
        let volume = PathBuf::from(text(&env.base_path).unwrap_or_else(|| "/runpod-volume".to_owned()));
        let mut caches: Vec<PathBuf> = Vec::new();
        // The default one comes last even when another is named: the platform's store may not be writable.
        let usual = [cache, volume.join("huggingface-cache/hub"), default_home.join("hub")];
        for path in text(&env.download_dir).map(PathBuf::from).into_iter().chain(usual) {
            let path = expand_home(path, home.as_deref());
            if !caches.contains(&path) {
                caches.push(path);
            }
        }
        let stored = || std::fs::read_to_string(expand_home(hf_home.join("token"), home.as_deref())).ok();
        let token = text(&env.hf_token).or_else(stored).map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        HubSettings {
            revision: text(&env.revision),
            tokenizer: text(&env.tokenizer),
            token: token.map(Secret::new),
            endpoint: self.url("HF_ENDPOINT", &env.hf_endpoint),
            offline: self.switch("HF_HUB_OFFLINE", &env.hf_hub_offline),
            caches,
            local_model_root: Some(text(&env.local_model_root).unwrap_or_else(|| "/root/PaddlePaddle".to_owned()).into()),
        }
    }

    fn engine(&mut self, env: &Env) -> EngineSettings {
        let bytes = self.count("KV_CACHE_MEMORY_BYTES", &env.kv_cache_memory_bytes, 1, &["auto"]);
        let gigabytes = self.number("KV_CACHE_GB", &env.kv_cache_gb, &["auto"], "above 0", |value| value > 0.0);
        let settings = EngineSettings {
            device: self.device(env),
            gpu_required: false,
            threads: self.count("THREADS", &env.threads, 1, &["auto", "0"]),
            quantization: self.quantization(env),
            bf16_activations: self.choice("DTYPE", &env.dtype, &[("auto", false), ("bfloat16", true), ("bf16", true)]).unwrap_or_default(),
            // A token of a prompt, and one of an answer.
            max_model_len: self.count("MAX_MODEL_LEN", &env.max_model_len, 2, AUTO),
            max_num_seqs: self.count("MAX_NUM_SEQS", &env.max_num_seqs, 1, &["auto"]),
            max_num_batched_tokens: self.count("MAX_NUM_BATCHED_TOKENS", &env.max_num_batched_tokens, 1, &["auto", "0"]),
            block_size: self.block_size(env),
            num_blocks: self.count("NUM_GPU_BLOCKS_OVERRIDE", &env.num_gpu_blocks_override, 1, &["auto"]),
            kv_cache_gb: gigabytes.or(bytes.map(|bytes| bytes as f64 / (1u64 << 30) as f64)),
            gpu_memory_utilization: self.number(
                "GPU_MEMORY_UTILIZATION",
                &env.gpu_memory_utilization,
                &["auto"],
                "above 0 and at most 1",
                |value| value > 0.0 && value <= 1.0,
            ),
            prefix_caching: self.prefix_caching(env),
            speculative: self.speculative(env),
            disable_log_stats: self.switch("DISABLE_LOG_STATS", &env.disable_log_stats),
            max_waiting: self.count("MAX_WAITING", &env.max_waiting, 1, &["auto"]),
            request_timeout: match self.number("REQUEST_TIMEOUT", &env.request_timeout, &["auto"], "0 or more", |value| value >= 0.0) {
                Some(0.0) => None,
                given => Some(Duration::from_secs_f64(given.unwrap_or(3600.0))),
            },
            seed: self.seed(env),
        };
        if let Some(message) = settings.contradicting_batch() {
            self.mistake("MAX_NUM_BATCHED_TOKENS", message);
        }
        settings
    }

    fn api(&mut self, env: &Env) -> ApiSettings {
        ApiSettings {
            served_names: self.list("SERVED_MODEL_NAME", &env.served_model_name),
            any_model_name: self.switch("ANY_MODEL_NAME", &env.any_model_name),
            allow_special_tokens: self.switch("ALLOW_SPECIAL_TOKENS", &env.allow_special_tokens),
            native_format: self
                .choice(
                    "NATIVE_OUTPUT_FORMAT",
                    &env.native_output_format,
                    &[("openai", NativeFormat::OpenAi), ("tokens", NativeFormat::Tokens)],
                )
                .unwrap_or_default(),
            default_max_tokens: self.count("DEFAULT_MAX_TOKENS", &env.default_max_tokens, 1, &["auto"]),
            chat_template: self.chat_template(env),
            trust_request_chat_template: self.switch("TRUST_REQUEST_CHAT_TEMPLATE", &env.trust_request_chat_template),
            content_format: self
                .choice(
                    "CHAT_TEMPLATE_CONTENT_FORMAT",
                    &env.chat_template_content_format,
                    &[("auto", ContentFormat::Auto), ("string", ContentFormat::String), ("openai", ContentFormat::OpenAi)],
                )
                .unwrap_or_default(),
            exclude_unused_tools: self.switch("EXCLUDE_TOOLS_WHEN_TOOL_CHOICE_NONE", &env.exclude_tools_when_tool_choice_none),
            response_role: text(&env.response_role),
            ignore_generation_config: self
                .choice("GENERATION_CONFIG", &env.generation_config, &[("auto", false), ("vllm", true)])
                .unwrap_or_default(),
            override_generation_config: self.object("OVERRIDE_GENERATION_CONFIG", &env.override_generation_config),
            max_n: self.count("MAX_N", &env.max_n, 1, &["auto"]),
            refuse_logprobs: self.given_switch("ENABLE_LOGPROB", &env.enable_logprob) == Some(false),
            max_logprobs: match text(&env.max_logprobs).as_deref() {
                Some("-1") => Some(u32::MAX),
                _ => self.count("MAX_LOGPROBS", &env.max_logprobs, 0, &[]).map(|most| u32::try_from(most).unwrap_or(u32::MAX)),
            },
            logprobs_mode: self
                .choice(
                    "LOGPROBS_MODE",
                    &env.logprobs_mode,
                    &[
                        ("raw_logprobs", LogprobsMode::RawLogprobs),
                        ("raw_logits", LogprobsMode::RawLogits),
                        ("processed_logprobs", LogprobsMode::ProcessedLogprobs),
                        ("processed_logits", LogprobsMode::ProcessedLogits),
                    ],
                )
                .unwrap_or_default(),
            tokens_as_ids: self.switch("RETURN_TOKENS_AS_TOKEN_IDS", &env.return_tokens_as_token_ids),
            force_include_usage: self.switch("ENABLE_FORCE_INCLUDE_USAGE", &env.enable_force_include_usage),
            hide_prompt_tokens_details: self.given_switch("ENABLE_PROMPT_TOKENS_DETAILS", &env.enable_prompt_tokens_details) == Some(false),
            seed: None,
            request_timeout: None,
        }
    }

    fn runpod(&mut self, env: &Env) -> RunpodSettings {
        let milliseconds = |count: usize| Duration::from_millis(count as u64);
        let agent = text(&env.runpod_user_agent);
        let integration = text(&env.runpod_ua_integration);
        let default_agent = concat!("worker-candle/", env!("CARGO_PKG_VERSION"));
        RunpodSettings {
            get_job: text(&env.runpod_webhook_get_job),
            post_output: text(&env.runpod_webhook_post_output),
            post_stream: text(&env.runpod_webhook_post_stream),
            ping: text(&env.runpod_webhook_ping),
            ping_interval: self.count("RUNPOD_PING_INTERVAL", &env.runpod_ping_interval, 1, &[]).map(milliseconds),
            api_key: text(&env.runpod_ai_api_key).map(Secret::new),
            worker_id: text(&env.runpod_pod_id).or_else(|| text(&env.hostname)),
            gpu_type_id: text(&env.runpod_gpu_type_id),
            endpoint_id: text(&env.runpod_endpoint_id),
            max_concurrency: self.count("MAX_CONCURRENCY", &env.max_concurrency, 1, &["auto"]),
            drain_timeout: self
                .number("DRAIN_TIMEOUT", &env.drain_timeout, &["auto"], "0 or more", |value| value >= 0.0)
                .map(Duration::from_secs_f64),
            stream_interval: self.count("STREAM_INTERVAL_MS", &env.stream_interval_ms, 0, &["auto"]).map(milliseconds),
            batch: self.batch(env),
            reported_version: text(&env.runpod_reported_version),
            user_agent: match integration {
                Some(integration) => Some(format!("{} Integration/{integration}", agent.as_deref().unwrap_or(default_agent))),
                None => agent,
            },
        }
    }

    fn server(&mut self, env: &Env) -> ServerSettings {
        let port = self.port("PORT", &env.port);
        ServerSettings {
            host: text(&env.host),
            port,
            health_port: self.port("PORT_HEALTH", &env.port_health).filter(|health| Some(*health) != port),
            health_path: self.health_path(env),
            api_keys: self.api_keys(env),
            allowed_origins: self.list("ALLOWED_ORIGINS", &env.allowed_origins).into_iter().filter(|origin| origin != "*").collect(),
            header_timeout: self
                .number("HEADER_TIMEOUT", &env.header_timeout, &["auto"], "0 or more", |value| value >= 0.0)
                .map(Duration::from_secs_f64),
            keep_alive_timeout: self
                .number("KEEP_ALIVE_TIMEOUT", &env.keep_alive_timeout, &["auto"], "0 or more", |value| value >= 0.0)
                .map(Duration::from_secs_f64),
            max_connections: self.count("MAX_CONNECTIONS", &env.max_connections, 1, AUTO),
            cloud_errors: self.switch("CLOUD_ERRORS", &env.cloud_errors),
            metrics_prefix: self.metrics_prefix(env),
        }
    }

    fn device(&mut self, env: &Env) -> DeviceChoice {
        let typed = text(&env.device).map(|device| device.to_ascii_lowercase());
        match typed.as_deref() {
            None | Some("auto") => DeviceChoice::Auto,
            Some("cpu") => DeviceChoice::Cpu,
            Some("cuda" | "gpu") => DeviceChoice::Cuda(0),
            Some(other) => match other.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
                Some(index) => DeviceChoice::Cuda(index),
                None => {
                    self.mistake("DEVICE", format!("{other:?} is not a device; use auto, cpu, cuda or cuda:N"));
                    DeviceChoice::Auto
                }
            },
        }
    }

    fn quantization(&mut self, env: &Env) -> Quantization {
        let Some(typed) = text(&env.quantization) else { return Quantization::default() };
        parse::quantization(&typed).unwrap_or_else(|problem| {
            self.mistake("QUANTIZATION", format!("{problem}; use BF16 (weights as stored), wint8 or wint4"));
            Quantization::default()
        })
    }

    fn block_size(&mut self, env: &Env) -> Option<usize> {
        let size = self.count("BLOCK_SIZE", &env.block_size, 1, &["auto"])?;
        if ![16, 32, 48, 64].contains(&size) {
            self.mistake("BLOCK_SIZE", format!("{size} is not possible; use 16, 32, 48 or 64"));
        }
        Some(size)
    }

    fn speculative(&mut self, env: &Env) -> Option<Speculative> {
        parse::speculative(&text(&env.speculative_config)?).unwrap_or_else(|wrong| {
            self.mistake("SPECULATIVE_CONFIG", wrong);
            None
        })
    }

    fn metrics_prefix(&mut self, env: &Env) -> Option<String> {
        let prefix = text(&env.metrics_prefix)?;
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        if !prefix.chars().all(fits) || prefix.starts_with(|c: char| c.is_ascii_digit()) {
            self.mistake(
                "METRICS_PREFIX",
                format!("{prefix:?} cannot begin a metric's name; use letters, digits, _ and :, no digit first"),
            );
        }
        Some(prefix)
    }

    fn seed(&mut self, env: &Env) -> Option<u64> {
        let typed = text(&env.seed)?;
        let seed = typed.parse().ok();
        if seed.is_none() {
            self.mistake("SEED", format!("{typed:?} is not a seed; use a whole number from 0 to {}", u64::MAX));
        }
        seed
    }

    fn chat_template(&mut self, env: &Env) -> Option<String> {
        let template = env.chat_template.clone().filter(|template| !parse::unset(template))?;
        if !template.contains("{{") && !template.contains("{%") && !Path::new(&template).is_file() {
            self.mistake("CHAT_TEMPLATE", "is neither Jinja text nor a file that is there");
        }
        Some(template)
    }

    fn batch(&mut self, env: &Env) -> Option<BatchGrowth> {
        let max = self.count("DEFAULT_BATCH_SIZE", &env.default_batch_size, 1, &[]);
        let min = self.count("DEFAULT_MIN_BATCH_SIZE", &env.default_min_batch_size, 1, &[]);
        let growth =
            self.number("DEFAULT_BATCH_SIZE_GROWTH_FACTOR", &env.default_batch_size_growth_factor, &[], "above 0", |value| value > 0.0);
        // The defaults of the vLLM worker (the FastDeploy worker's were 64, 1 and 1.3).
        (max.is_some() || min.is_some() || growth.is_some()).then(|| BatchGrowth {
            max: max.unwrap_or(50),
            min: min.unwrap_or(1),
            growth: growth.unwrap_or(3.0),
        })
    }

    fn health_path(&mut self, env: &Env) -> Option<String> {
        let path = text(&env.health_check_path)?;
        if !path.starts_with('/') || path.contains(['?', '#', ' ', '{', '}']) {
            self.mistake("HEALTH_CHECK_PATH", format!("{path:?} is not a path; it begins with a slash, like /ping"));
        }
        Some(path)
    }

    fn api_keys(&mut self, env: &Env) -> Vec<Secret> {
        let mut keys: Vec<String> = Vec::new();
        if let Some(typed) = text(&env.api_key) {
            match parse::list(&typed) {
                Some(list) => keys.extend(list),
                None => self.mistake("API_KEY", "begins like a JSON list and is not one of strings"),
            }
        }
        if let Some(path) = text(&env.api_key_file) {
            match std::fs::read_to_string(&path) {
                Ok(file) => keys.extend(file.lines().map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned)),
                Err(error) => self.mistake("API_KEY_FILE", format!("{path}: {error}")),
            }
            if keys.is_empty() {
                // Without a key everything would be open, which is not what a key file means.
                self.mistake("API_KEY_FILE", format!("{path} holds no key; write one a line"));
            }
        }
        keys.into_iter().map(Secret::new).collect()
    }

    fn log_level(&mut self, env: &Env) -> LogLevel {
        let levels = [
            ("trace", LogLevel::Trace),
            ("debug", LogLevel::Debug),
            ("info", LogLevel::Info),
            ("warn", LogLevel::Warn),
            ("warning", LogLevel::Warn),
            ("error", LogLevel::Error),
            ("critical", LogLevel::Error),
            ("fatal", LogLevel::Error),
            ("notset", LogLevel::Off),
            ("off", LogLevel::Off),
        ];
        self.choice("LOG_LEVEL", &env.log_level, &levels).unwrap_or_default()
    }

    fn mistake(&mut self, name: &str, message: impl Into<String>) {
        self.mistakes.push(Mistake::new(self.merged.typed_name(name), message));
    }

    fn switch(&mut self, name: &str, typed: &Option<String>) -> bool {
        self.given_switch(name, typed).unwrap_or(false)
    }

    /// `None` when not given.
    fn given_switch(&mut self, name: &str, typed: &Option<String>) -> Option<bool> {
        let typed = text(typed)?;
        let given = parse::boolean(&typed);
        if given.is_none() {
            self.mistake(name, format!("{typed:?} is neither true nor false; use true, 1, yes, on, or false, 0, no, off"));
        }
        given
    }

    /// `ENABLE_PREFIX_CACHING`, or its opposite in SGLang's words.
    fn prefix_caching(&mut self, env: &Env) -> Option<bool> {
        let enabled = self.given_switch("ENABLE_PREFIX_CACHING", &env.enable_prefix_caching);
        let disabled = self.given_switch("DISABLE_RADIX_CACHE", &env.disable_radix_cache);
        enabled.or(disabled.map(|disabled| !disabled))
    }

    /// A whole number of at least `least`; `None` when not given or one of `auto`.
    fn count(&mut self, name: &str, typed: &Option<String>, least: usize, auto: &[&str]) -> Option<usize> {
        let typed = text(typed).filter(|typed| !auto.contains(&typed.to_ascii_lowercase().as_str()))?;
        let count = parse::count(&typed).filter(|count| *count >= least);
        if count.is_none() {
            let or = auto.first().map(|word| format!(", or {word}")).unwrap_or_default();
            self.mistake(name, format!("{typed:?} is not possible; use a whole number, at least {least}{or}"));
        }
        count
    }

    fn number(&mut self, name: &str, typed: &Option<String>, auto: &[&str], range: &str, fits: impl Fn(f64) -> bool) -> Option<f64> {
        let typed = text(typed).filter(|typed| !auto.contains(&typed.to_ascii_lowercase().as_str()))?;
        // The upper bound keeps durations representable.
        let number = typed.parse().ok().filter(|value: &f64| value.is_finite() && *value < 1e12 && fits(*value));
        if number.is_none() {
            self.mistake(name, format!("{typed:?} is not possible; use a number {range}"));
        }
        number
    }

    fn choice<T: Copy>(&mut self, name: &str, typed: &Option<String>, choices: &[(&str, T)]) -> Option<T> {
        let typed = text(typed)?;
        let found = choices.iter().find(|(word, _)| word.eq_ignore_ascii_case(&typed)).map(|(_, value)| *value);
        if found.is_none() {
            let words = choices.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
            self.mistake(name, format!("{typed:?} is not possible; use one of {words}"));
        }
        found
    }

    fn list(&mut self, name: &str, typed: &Option<String>) -> Vec<String> {
        let Some(typed) = text(typed) else { return Vec::new() };
        parse::list(&typed).unwrap_or_else(|| {
            self.mistake(name, "begins like a JSON list and is not one of strings; write [\"a\", \"b\"], or a,b");
            Vec::new()
        })
    }

    fn object(&mut self, name: &str, typed: &Option<String>) -> Option<serde_json::Map<String, serde_json::Value>> {
        match serde_json::from_str(&text(typed)?) {
            Ok(object) => Some(object),
            Err(error) => {
                self.mistake(name, format!("is not a JSON object: {error}"));
                None
            }
        }
    }

    fn port(&mut self, name: &str, typed: &Option<String>) -> Option<u16> {
        let typed = text(typed)?;
        // 0 lets the system pick one.
        let port = typed.parse().ok();
        if port.is_none() {
            self.mistake(name, format!("{typed:?} is not a port; use a number from 0 to 65535"));
        }
        port
    }

    fn url(&mut self, name: &str, typed: &Option<String>) -> Option<String> {
        let url = text(typed)?;
        if !url.starts_with("http://") && !url.starts_with("https://") {
            self.mistake(name, format!("{url:?} is not an address; it begins with https:// or http://"));
        }
        Some(url.trim_end_matches('/').to_owned())
    }
}

/// A value that was given, without blanks around it.
fn text(typed: &Option<String>) -> Option<String> {
    typed.as_deref().filter(|typed| !parse::unset(typed)).map(|typed| typed.trim().to_owned())
}

fn expand_home(path: PathBuf, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

/// Names whose values are never shown.
pub(super) fn is_secret(name: &str) -> bool {
    matches!(name, "HF_TOKEN" | "RUNPOD_AI_API_KEY" | "API_KEY") || policy::aliases(name).any(|alias| alias == "API_KEYS")
}
