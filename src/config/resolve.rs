//! From settings as given to settings as meant.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::given::Given;
use super::sources::Merged;
use super::{
    ApiSettings, Args, BatchGrowth, ConfigError, ConfigSources, ContentFormat, EngineSettings, HubSettings, KeysFile, LogLevel,
    LogSettings, LogprobsMode, NativeFormat, PreparedWriting, ReasoningField, RunpodSettings, SecretString, ServerSettings, Settings,
    TaskChoice, TensorParallel, TlsFiles, defaults, parse, policy, report, table,
};

impl Settings {
    /// Resolves flags, environment and files. All errors are reported at once.
    pub fn resolve(args: &Args, sources: &ConfigSources) -> Result<Self, Vec<ConfigError>> {
        let mut merged = Merged::read(args, sources);
        let given = merged.given();
        let mut settings = Self::of(&given, &mut merged);
        if !merged.errors.is_empty() {
            return Err(merged.errors);
        }
        settings.given = report::given(merged.origins());
        settings.warnings = merged.warnings;
        Ok(settings)
    }

    /// What can be read of settings that do not hold, the rest as if it were not set: enough to tell the platform that they do not.
    pub fn salvage(args: &Args, sources: &ConfigSources) -> Self {
        let mut merged = Merged::read(args, sources);
        let given = merged.given();
        Self::of(&given, &mut merged)
    }

    /// What is wrong between settings, or in files that they name, is added to the errors of `merged`.
    fn of(given: &Given, merged: &mut Merged) -> Self {
        let engine = engine(given);
        if let Some(message) = engine.contradicting_batch() {
            merged.refuse(table::MAX_NUM_BATCHED_TOKENS.name, message);
        }
        if let Some(depth) = given.count(&table::MAX_JSON_DEPTH).filter(|depth| *depth > defaults::MAX_JSON_DEPTH) {
            merged.refuse(
                table::MAX_JSON_DEPTH.name,
                format!("{depth} is deeper than is read here; use at most {}", defaults::MAX_JSON_DEPTH),
            );
        }
        let models = given.list(&table::MODEL);
        if models.len() > 1 {
            of_several_models(given, models.len(), merged);
        }
        let mut models = models.into_iter();
        Self {
            hub: hub(given),
            api: ApiSettings { seed: engine.seed, request_timeout: engine.request_timeout, ..api(given, merged) },
            runpod: runpod(given),
            server: ServerSettings {
                api_keys: api_keys(given, merged),
                keys_file: keys_file(given, merged),
                tls: tls(given, merged),
                ..server(given)
            },
            log: LogSettings { level: log_level(given) },
            engine,
            model: models.next().unwrap_or_else(|| defaults::MODEL.to_owned()),
            more_models: models.collect(),
            given: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

/// `ENABLE_AUTO_TOOL_CHOICE=false`, unless it comes from the environment: there the vLLM worker's form puts it unasked, and who moves over from
/// that worker would lose the tools.
fn refuses_auto_tools(given: &Given, merged: &mut Merged) -> bool {
    let setting = &table::ENABLE_AUTO_TOOL_CHOICE;
    if given.switch(setting) != Some(false) {
        return false;
    }
    let in_environment = merged.is_variable(setting.name);
    if in_environment {
        merged.warnings.push(format!(
            "{}=false in the environment refuses no tools: forms send it unasked; --no-{} does (also in VLLM_EXTRA_ARGS)",
            setting.name,
            policy::flag(setting.name).trim_start_matches("--")
        ));
    }
    !in_environment
}

/// Refuses what can only be meant for one model.
fn of_several_models(given: &Given, models: usize, merged: &mut Merged) {
    let names = given.list(&table::SERVED_MODEL_NAME).len();
    if names != 0 && names != models {
        let message = format!("{names} for {models} models; give each model of MODEL one name, in the same order, or leave it unset");
        merged.refuse(table::SERVED_MODEL_NAME.name, message);
    }
    if given.text(&table::TOKENIZER).is_some() {
        merged.refuse(table::TOKENIZER.name, "MODEL names several models, which have tokenizers of their own; unset it");
    }
    if given.count(&table::TENSOR_PARALLEL_SIZE).is_some_and(|ranks| ranks != 1) {
        merged.refuse(
            table::TENSOR_PARALLEL_SIZE.name,
            "MODEL names several models, which share one device; set it to 1, or serve one model",
        );
    }
    if given.text(&table::REVISION).is_some_and(|revision| revision != defaults::REVISION) {
        let message = format!("MODEL names several models, and a revision is one model's; unset it, or set {}", defaults::REVISION);
        merged.refuse(table::REVISION.name, message);
    }
}

fn hub(given: &Given) -> HubSettings {
    let path = |setting| given.text(setting).map(PathBuf::from);
    let home = path(&table::HOME);
    let base = path(&table::XDG_CACHE_HOME).or_else(|| Some(home.clone()?.join(".cache")));
    let default_home = base.unwrap_or_else(|| ".cache".into()).join("huggingface");
    let hf_home = path(&table::HF_HOME).unwrap_or_else(|| default_home.clone());
    let cache = path(&table::HF_HUB_CACHE).unwrap_or_else(|| hf_home.join("hub"));
    let volume = path(&table::BASE_PATH).unwrap_or_else(|| defaults::BASE_PATH.into());
    let mut caches: Vec<PathBuf> = Vec::new();
    // The default one comes last even when another is named: the platform's store may not be writable.
    let usual = [cache, volume.join("huggingface-cache/hub"), default_home.join("hub")];
    for path in path(&table::DOWNLOAD_DIR).into_iter().chain(usual) {
        let path = expand_home(path, home.as_deref());
        if !caches.contains(&path) {
            caches.push(path);
        }
    }
    let stored = || std::fs::read_to_string(expand_home(hf_home.join("token"), home.as_deref())).ok();
    let token = given.text(&table::HF_TOKEN).or_else(stored).map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
    let default = HubSettings::default();
    HubSettings {
        revision: given.text(&table::REVISION),
        tokenizer: given.text(&table::TOKENIZER),
        token: token.map(SecretString::from),
        endpoint: given.text(&table::HF_ENDPOINT).unwrap_or(default.endpoint),
        offline: given.switch(&table::HF_HUB_OFFLINE).unwrap_or(false),
        caches,
        local_model_root: Some(path(&table::LOCAL_MODEL_ROOT).unwrap_or_else(|| defaults::LOCAL_MODEL_ROOT.into())),
    }
}

fn engine(given: &Given) -> EngineSettings {
    let bytes = given.count(&table::KV_CACHE_MEMORY_BYTES).map(|bytes| bytes as f64 / (1u64 << 30) as f64);
    // The opposite in SGLang's words comes second.
    let uncached = given.switch(&table::DISABLE_RADIX_CACHE);
    let text = |setting| given.text(setting);
    let default = EngineSettings::default();
    EngineSettings {
        device: text(&table::DEVICE).and_then(|device| parse::device(&device).ok()).unwrap_or_default(),
        gpu_required: false,
        candle_kernels: text(&table::KERNELS).is_some_and(|kernels| kernels == "candle"),
        tensor_parallel: match given.count(&table::TENSOR_PARALLEL_SIZE) {
            Some(0) => TensorParallel::Auto,
            ranks => TensorParallel::Ranks(ranks.unwrap_or(1)),
        },
        threads: given.count(&table::THREADS),
        quantization: text(&table::QUANTIZATION).and_then(|name| parse::quantization(&name).ok()).unwrap_or_default(),
        prepared_cache: text(&table::PREPARED_CACHE).map(|value| parse::prepared_cache(&value)).unwrap_or_default(),
        prepared_writing: PreparedWriting::default(),
        bf16_activations: text(&table::DTYPE).is_some_and(|dtype| dtype != "auto"),
        task: task(given),
        pooler: text(&table::POOLER_CONFIG).and_then(|object| parse::object(&object).ok()),
        max_model_len: given.count(&table::MAX_MODEL_LEN),
        max_num_seqs: given.count(&table::MAX_NUM_SEQS),
        max_num_batched_tokens: given.count(&table::MAX_NUM_BATCHED_TOKENS),
        block_size: given.count(&table::BLOCK_SIZE).unwrap_or(default.block_size),
        num_blocks: given.count(&table::NUM_GPU_BLOCKS_OVERRIDE),
        kv_cache_gb: given.number(&table::KV_CACHE_GB).or(bytes),
        kv_cache_dtype: text(&table::KV_CACHE_DTYPE).and_then(|name| parse::kv_cache_dtype(&name).ok()).unwrap_or_default(),
        gpu_memory_utilization: given.number(&table::GPU_MEMORY_UTILIZATION),
        prefix_caching: given.switch(&table::ENABLE_PREFIX_CACHING).or(uncached.map(|uncached| !uncached)),
        speculative: text(&table::SPECULATIVE_CONFIG).and_then(|config| parse::speculative(&config).ok()).flatten(),
        disable_log_stats: given.switch(&table::DISABLE_LOG_STATS).unwrap_or(false),
        max_waiting: given.count(&table::MAX_WAITING).unwrap_or(default.max_waiting),
        request_timeout: match given.number(&table::REQUEST_TIMEOUT) {
            Some(0.0) => None,
            seconds => Some(seconds.map_or(defaults::REQUEST_TIMEOUT, Duration::from_secs_f64)),
        },
        seed: text(&table::SEED).and_then(|seed| parse::seed(&seed).ok()),
    }
}

fn task(given: &Given) -> TaskChoice {
    let word = |setting| given.text(setting).filter(|word| word != "auto");
    match (word(&table::TASK).as_deref(), word(&table::CONVERT).as_deref(), word(&table::RUNNER).as_deref()) {
        (Some("generate"), ..) => TaskChoice::Generate,
        (Some("embed" | "embedding"), ..) | (None, Some("embed"), _) => TaskChoice::Embed,
        (Some("score" | "classify"), ..) | (None, Some("classify"), _) => TaskChoice::Score,
        (_, _, Some("pooling")) => TaskChoice::Pooling,
        (_, _, Some("generate")) => TaskChoice::Generate,
        _ => TaskChoice::Auto,
    }
}

fn api(given: &Given, merged: &mut Merged) -> ApiSettings {
    let switch = |setting| given.switch(setting).unwrap_or(false);
    let text = |setting| given.text(setting);
    let default = ApiSettings::default();
    ApiSettings {
        served_names: given.list(&table::SERVED_MODEL_NAME),
        any_model_name: switch(&table::ANY_MODEL_NAME),
        fastdeploy_compatible: switch(&table::FASTDEPLOY_COMPATIBLE),
        allow_special_tokens: switch(&table::ALLOW_SPECIAL_TOKENS),
        native_format: match text(&table::NATIVE_OUTPUT_FORMAT).as_deref() {
            Some("tokens") => NativeFormat::Tokens,
            _ => NativeFormat::OpenAi,
        },
        default_max_tokens: given.count(&table::DEFAULT_MAX_TOKENS),
        chat_template: text(&table::CHAT_TEMPLATE),
        trust_request_chat_template: switch(&table::TRUST_REQUEST_CHAT_TEMPLATE),
        content_format: match text(&table::CHAT_TEMPLATE_CONTENT_FORMAT).as_deref() {
            Some("string") => ContentFormat::String,
            Some("openai") => ContentFormat::OpenAi,
            _ => ContentFormat::Auto,
        },
        exclude_unused_tools: switch(&table::EXCLUDE_TOOLS_WHEN_TOOL_CHOICE_NONE),
        tool_call_parser: text(&table::TOOL_CALL_PARSER),
        refuse_auto_tools: refuses_auto_tools(given, merged),
        reasoning_parser: text(&table::REASONING_PARSER),
        reasoning_field: match text(&table::REASONING_FIELD).as_deref() {
            Some("reasoning_content") => ReasoningField::ReasoningContent,
            Some("reasoning") => ReasoningField::Reasoning,
            _ => ReasoningField::Both,
        },
        response_role: text(&table::RESPONSE_ROLE).unwrap_or(default.response_role),
        ignore_generation_config: text(&table::GENERATION_CONFIG).is_some_and(|source| source == "vllm"),
        override_generation_config: text(&table::OVERRIDE_GENERATION_CONFIG).and_then(|object| parse::object(&object).ok()),
        max_n: given.count(&table::MAX_N).unwrap_or(default.max_n),
        max_messages: given.count(&table::MAX_MESSAGES),
        max_tools: given.count(&table::MAX_TOOLS).unwrap_or(default.max_tools),
        max_stop_strings: given.count(&table::MAX_STOP_STRINGS).unwrap_or(default.max_stop_strings),
        max_json_depth: given.count(&table::MAX_JSON_DEPTH).unwrap_or(default.max_json_depth),
        refuse_logprobs: given.switch(&table::ENABLE_LOGPROB) == Some(false),
        max_logprobs: given.count(&table::MAX_LOGPROBS).map(|most| u32::try_from(most).unwrap_or(u32::MAX)).unwrap_or(default.max_logprobs),
        logprobs_mode: match text(&table::LOGPROBS_MODE).as_deref() {
            Some("raw_logits") => LogprobsMode::RawLogits,
            Some("processed_logprobs") => LogprobsMode::ProcessedLogprobs,
            Some("processed_logits") => LogprobsMode::ProcessedLogits,
            _ => LogprobsMode::RawLogprobs,
        },
        tokens_as_ids: switch(&table::RETURN_TOKENS_AS_TOKEN_IDS),
        force_include_usage: switch(&table::ENABLE_FORCE_INCLUDE_USAGE),
        hide_prompt_tokens_details: given.switch(&table::ENABLE_PROMPT_TOKENS_DETAILS) == Some(false),
        responses_store: given.switch(&table::RESPONSES_STORE),
        responses_store_entries: given.count(&table::RESPONSES_STORE_ENTRIES).unwrap_or(default.responses_store_entries),
        responses_store_mb: given.count(&table::RESPONSES_STORE_MB).unwrap_or(default.responses_store_mb),
        responses_store_ttl: given.number(&table::RESPONSES_STORE_TTL).map(Duration::from_secs_f64).unwrap_or(default.responses_store_ttl),
        seed: None,
        request_timeout: None,
    }
}

fn runpod(given: &Given) -> RunpodSettings {
    let milliseconds = |setting| given.count(setting).map(|count| Duration::from_millis(count as u64));
    let text = |setting| given.text(setting);
    let agent = text(&table::RUNPOD_USER_AGENT);
    let default_agent = concat!("worker-candle/", env!("CARGO_PKG_VERSION"));
    let default = RunpodSettings::default();
    RunpodSettings {
        get_job: text(&table::RUNPOD_WEBHOOK_GET_JOB),
        post_output: text(&table::RUNPOD_WEBHOOK_POST_OUTPUT),
        post_stream: text(&table::RUNPOD_WEBHOOK_POST_STREAM),
        ping: text(&table::RUNPOD_WEBHOOK_PING),
        ping_interval: milliseconds(&table::RUNPOD_PING_INTERVAL).filter(|interval| !interval.is_zero()).unwrap_or(default.ping_interval),
        api_key: text(&table::RUNPOD_AI_API_KEY).map(SecretString::from),
        worker_id: text(&table::RUNPOD_POD_ID).or_else(|| text(&table::HOSTNAME)),
        gpu_type_id: text(&table::RUNPOD_GPU_TYPE_ID),
        endpoint_id: text(&table::RUNPOD_ENDPOINT_ID),
        max_concurrency: given.count(&table::MAX_CONCURRENCY),
        drain_timeout: given.number(&table::DRAIN_TIMEOUT).map(Duration::from_secs_f64).unwrap_or(default.drain_timeout),
        stream_interval: milliseconds(&table::STREAM_INTERVAL_MS).unwrap_or(default.stream_interval),
        batch: batch(given),
        reported_version: text(&table::RUNPOD_REPORTED_VERSION),
        user_agent: match text(&table::RUNPOD_UA_INTEGRATION) {
            Some(integration) => Some(format!("{} Integration/{integration}", agent.as_deref().unwrap_or(default_agent))),
            None => agent,
        },
    }
}

/// Stream posts are gathered by tokens when one of these is given.
fn batch(given: &Given) -> Option<BatchGrowth> {
    let (max, min) = (given.count(&table::DEFAULT_BATCH_SIZE), given.count(&table::DEFAULT_MIN_BATCH_SIZE));
    let growth = given.number(&table::DEFAULT_BATCH_SIZE_GROWTH_FACTOR);
    let default = defaults::BATCH_GROWTH;
    (max.is_some() || min.is_some() || growth.is_some()).then(|| BatchGrowth {
        max: max.unwrap_or(default.max),
        min: min.unwrap_or(default.min),
        growth: growth.unwrap_or(default.growth),
    })
}

fn server(given: &Given) -> ServerSettings {
    let port = |setting| given.count(setting).and_then(|port| u16::try_from(port).ok());
    let seconds = |setting| given.number(setting).map(Duration::from_secs_f64);
    let own = port(&table::PORT);
    let default = ServerSettings::default();
    ServerSettings {
        host: given.text(&table::HOST),
        port: own,
        health_port: port(&table::PORT_HEALTH).filter(|health| Some(*health) != own),
        health_path: given.text(&table::HEALTH_CHECK_PATH).unwrap_or(default.health_path),
        api_keys: Vec::new(),
        keys_file: None,
        tls: None,
        allowed_origins: given.list(&table::ALLOWED_ORIGINS).into_iter().filter(|origin| origin != "*").collect(),
        header_timeout: seconds(&table::HEADER_TIMEOUT).unwrap_or(default.header_timeout),
        keep_alive_timeout: seconds(&table::KEEP_ALIVE_TIMEOUT).unwrap_or(default.keep_alive_timeout),
        max_connections: given.count(&table::MAX_CONNECTIONS),
        cloud_errors: given.switch(&table::CLOUD_ERRORS).unwrap_or(false),
        metrics_prefix: given.text(&table::METRICS_PREFIX).unwrap_or(default.metrics_prefix),
    }
}

/// The keys that are given, and those of the file.
fn api_keys(given: &Given, merged: &mut Merged) -> Vec<SecretString> {
    let mut keys = given.list(&table::API_KEY);
    if let Some(path) = given.text(&table::API_KEY_FILE) {
        let name = table::API_KEY_FILE.name;
        match std::fs::read_to_string(&path) {
            Ok(file) => keys.extend(file.lines().map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned)),
            Err(error) => merged.refuse(name, format!("{path}: {error}")),
        }
        if keys.is_empty() {
            // Without a key everything would be open, which is not what a key file means.
            merged.refuse(name, format!("{path} holds no key; write one a line"));
        }
    }
    keys.into_iter().map(SecretString::from).collect()
}

/// The keys of clients with their limits.
fn keys_file(given: &Given, merged: &mut Merged) -> Option<KeysFile> {
    let path = given.text(&table::API_KEYS_FILE)?;
    KeysFile::read(Path::new(&path)).map_err(|error| merged.refuse(table::API_KEYS_FILE.name, format!("{path}: {error}"))).ok()
}

/// The server's certificate and its key.
fn tls(given: &Given, merged: &mut Merged) -> Option<TlsFiles> {
    let key = given.text(&table::SSL_KEYFILE).map(PathBuf::from);
    let Some(certificate) = given.text(&table::SSL_CERTFILE).map(PathBuf::from) else {
        if key.is_some() {
            merged.refuse(table::SSL_KEYFILE.name, "a key without its certificate; set SSL_CERTFILE too");
        }
        return None;
    };
    let refresh = given.switch(&table::ENABLE_SSL_REFRESH).unwrap_or(false);
    TlsFiles::read(certificate, key, refresh).map_err(|error| merged.refuse(error.setting, error.message)).ok()
}

fn log_level(given: &Given) -> LogLevel {
    match given.text(&table::LOG_LEVEL).as_deref() {
        Some("trace") => LogLevel::Trace,
        Some("debug") => LogLevel::Debug,
        Some("warn" | "warning") => LogLevel::Warn,
        Some("error" | "critical" | "fatal") => LogLevel::Error,
        Some("notset" | "off") => LogLevel::Off,
        _ => LogLevel::Info,
    }
}

fn expand_home(path: PathBuf, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}
