//! Settings: one table ([`table`]) says what there is. Flags, the environment and files are laid over each other ([`sources`]), read by
//! their rows ([`Given`](given::Given)), and become [`Settings`], as meant.
//!
//! A bad value stops the start and names the variable; all errors are reported at once. Flags beat the environment, which beats
//! the configuration file; [`policy`] decides each name.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use smart_default::SmartDefault;

mod cli;
pub mod defaults;
mod given;
pub mod keys_file;
mod parse;
pub mod policy;
mod report;
mod resolve;
pub mod setting;
mod sources;
pub mod table;
pub mod tls;

pub use cli::{Args, BenchArgs, Command, Flags, ModelArgument, PullArgs, RunBatchArgs};
pub use keys_file::{ClientKey, KeysFile};
pub use parse::{kv_cache_dtype, quantization};
pub use report::report;
/// Keys and tokens: never shown, and wiped when dropped.
pub use secrecy::{ExposeSecret, SecretString};
pub use sources::{ConfigSources, Origin, flags};
pub use tls::TlsFiles;

/// One thing wrong with the settings.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigError {
    /// The setting as the user wrote it: a variable, a flag, a key in a file.
    pub name: String,
    /// What is wrong, and what to do.
    pub message: String,
}

impl ConfigError {
    fn new(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self { name: name.into(), message: message.into() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.message)
    }
}

/// Everything the program was told, resolved and checked.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// A hub id, a folder, or `demo`: the model that answers requests which name none.
    pub model: String,
    /// Models that are served besides.
    pub more_models: Vec<String>,
    pub hub: HubSettings,
    pub engine: EngineSettings,
    pub api: ApiSettings,
    pub runpod: RunpodSettings,
    pub server: ServerSettings,
    pub log: LogSettings,
    /// What was given, and where: canonical name, value (`***` for secrets), origin.
    pub given: Vec<(String, String, Origin)>,
    /// Said once in the log at start: names that have no effect here, deprecated spellings.
    pub warnings: Vec<String>,
}

impl Settings {
    /// All models, in order; at least one.
    pub fn models(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.model.as_str()).chain(self.more_models.iter().map(String::as_str))
    }

    /// For what takes one model alone.
    ///
    /// # Errors
    /// When there are several.
    pub fn only_model(&self, what: &str) -> Result<&str, ConfigError> {
        if self.more_models.is_empty() {
            return Ok(&self.model);
        }
        let models = self.models().collect::<Vec<_>>().join(", ");
        Err(ConfigError::new(table::MODEL.name, format!("{what} takes one model; name one of {models}")))
    }
}

/// Where models come from.
#[derive(Debug, Clone, SmartDefault)]
pub struct HubSettings {
    pub revision: Option<String>,
    /// A tokenizer from elsewhere: hub id or folder.
    pub tokenizer: Option<String>,
    pub token: Option<SecretString>,
    /// `HF_ENDPOINT`.
    #[default(defaults::HF_ENDPOINT.to_owned())]
    pub endpoint: String,
    pub offline: bool,
    /// Hugging Face caches to look in, in order; downloads go to the first that can be written.
    pub caches: Vec<PathBuf>,
    /// `LOCAL_MODEL_ROOT`: `{root}/{last segment of the id}` is looked at before the caches.
    pub local_model_root: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// CUDA when built with it and a device is there, else the CPU.
    #[default]
    Auto,
    Cpu,
    Cuda(usize),
}

/// How many bits a weight is held at (`QUANTIZATION`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quantization {
    /// As the checkpoint has it; what it has at few bits is held at 8.
    #[default]
    AsStored,
    /// As numbers of 16 or 32 bits, whatever the checkpoint has.
    Unquantized,
    /// Every matrix at 8 bits.
    Wint8,
    /// The layers' matrices at 4 bits, embedding and LM head at 8.
    Wint4,
}

impl Quantization {
    /// The strategy's name; `None`: not quantized here.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::AsStored | Self::Unquantized => None,
            Self::Wint8 => Some("wint8"),
            Self::Wint4 => Some("wint4"),
        }
    }
}

/// How many devices compute a model together (`TENSOR_PARALLEL_SIZE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorParallel {
    /// All GPUs that there are; one on the CPU.
    Auto,
    Ranks(usize),
}

impl Default for TensorParallel {
    fn default() -> Self {
        Self::Ranks(1)
    }
}

/// What keys and values of earlier tokens are held in (`KV_CACHE_DTYPE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCacheDtype {
    /// The device's own: float32 on a CPU, bfloat16 on a GPU.
    #[default]
    Auto,
    Float32,
    Float16,
    Bfloat16,
    Int8,
}

/// Where the weights are kept in the form that our kernels read (`PREPARED_CACHE`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PreparedCache {
    /// Beside the model's files.
    #[default]
    Beside,
    Off,
    Folder(PathBuf),
}

/// When a prepared copy that is missing is written; each command decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PreparedWriting {
    /// Slowly, beside the requests.
    #[default]
    Background,
    /// Before the model is said to be loaded.
    Now,
    Never,
}

/// What the model is for (`TASK`, `RUNNER`, `CONVERT`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TaskChoice {
    /// What its files say.
    #[default]
    Auto,
    Generate,
    Embed,
    Score,
    /// One of the last two, whichever its files say.
    Pooling,
}

/// `None` = auto.
#[derive(Debug, Clone, SmartDefault)]
pub struct EngineSettings {
    pub task: TaskChoice,
    /// Laid over what the model's files say of its pooling (`POOLER_CONFIG`).
    pub pooler: Option<serde_json::Map<String, serde_json::Value>>,
    pub device: DeviceChoice,
    /// `DEVICE=auto` means a GPU, and never falls back to the CPU: so in a queue worker of a CUDA build.
    pub gpu_required: bool,
    /// Candle's operations compute, whatever kernels there are (`KERNELS=candle`).
    pub candle_kernels: bool,
    pub tensor_parallel: TensorParallel,
    pub threads: Option<usize>,
    pub quantization: Quantization,
    pub prepared_cache: PreparedCache,
    pub prepared_writing: PreparedWriting,
    /// Activations may be rounded to bf16 (`DTYPE`).
    pub bf16_activations: bool,
    pub max_model_len: Option<usize>,
    pub max_num_seqs: Option<usize>,
    pub max_num_batched_tokens: Option<usize>,
    #[default(defaults::BLOCK_SIZE)]
    pub block_size: usize,
    pub num_blocks: Option<usize>,
    /// In GiB.
    pub kv_cache_gb: Option<f64>,
    pub kv_cache_dtype: KvCacheDtype,
    /// Default [`defaults::GPU_UTILIZATION`]; who gives it for a CPU is told that it does nothing there.
    pub gpu_memory_utilization: Option<f64>,
    pub prefix_caching: Option<bool>,
    pub speculative: Option<Speculative>,
    pub disable_log_stats: bool,
    #[default(defaults::MAX_WAITING)]
    pub max_waiting: usize,
    /// Seconds a request may take in all.
    pub request_timeout: Option<Duration>,
    pub seed: Option<u64>,
}

impl EngineSettings {
    /// What is wrong with `MAX_NUM_BATCHED_TOKENS` beside `MAX_NUM_SEQS`, when both are given.
    pub fn contradicting_batch(&self) -> Option<String> {
        let (seqs, tokens) = (self.max_num_seqs?, self.max_num_batched_tokens?);
        (tokens < seqs).then(|| {
            format!("{tokens} is less than MAX_NUM_SEQS={seqs}, and each sequence takes a token of a step; raise it, lower the other, or leave one to auto")
        })
    }
}

/// Speculation by prompt lookup (`SPECULATIVE_CONFIG`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speculative {
    /// Most tokens guessed at once.
    pub tokens: usize,
    /// Longest and shortest run of last tokens that is looked up.
    pub lookup_max: usize,
    pub lookup_min: usize,
    /// None is guessed while more sequences than this decode.
    pub max_rows: usize,
}

impl Default for Speculative {
    fn default() -> Self {
        Self { tokens: 5, lookup_max: 5, lookup_min: 2, max_rows: 8 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NativeFormat {
    /// OpenAI objects.
    #[default]
    OpenAi,
    /// `{"choices":[{"tokens":[…]}],"usage":{"input","output"}}`.
    Tokens,
}

/// What is reported as a log probability (`LOGPROBS_MODE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogprobsMode {
    /// log softmax of the model's logits.
    #[default]
    RawLogprobs,
    /// The model's logits.
    RawLogits,
    /// log softmax after suppression, bias, penalties and temperature, before min_p, top_k and top_p.
    ProcessedLogprobs,
    /// The logits of the same moment.
    ProcessedLogits,
}

/// The form in which contents of messages reach the chat template (`CHAT_TEMPLATE_CONTENT_FORMAT`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ContentFormat {
    /// As the template takes them.
    #[default]
    Auto,
    /// Strings; several parts of text are joined by a newline.
    String,
    /// Lists of parts.
    OpenAi,
}

#[derive(Debug, Clone, SmartDefault)]
pub struct ApiSettings {
    /// The names clients may use; the first is the one answers carry. Empty = the model's own name.
    pub served_names: Vec<String>,
    pub any_model_name: bool,
    pub fastdeploy_compatible: bool,
    pub allow_special_tokens: bool,
    pub native_format: NativeFormat,
    /// `max_tokens` when a request has none; `None` = rest of the context (16 on `/v1/completions`).
    pub default_max_tokens: Option<usize>,
    /// Jinja text or a file's path, instead of the model's own.
    pub chat_template: Option<String>,
    pub trust_request_chat_template: bool,
    pub content_format: ContentFormat,
    /// `EXCLUDE_TOOLS_WHEN_TOOL_CHOICE_NONE`: the template does not see tools that a request forbids to call.
    pub exclude_unused_tools: bool,
    /// `TOOL_CALL_PARSER`: a format's name, `none`, or unset for what the template shows.
    pub tool_call_parser: Option<String>,
    /// `--no-enable-auto-tool-choice`: tools are refused unless a call is demanded or forbidden.
    pub refuse_auto_tools: bool,
    /// `REASONING_PARSER`, as `TOOL_CALL_PARSER`.
    pub reasoning_parser: Option<String>,
    pub reasoning_field: ReasoningField,
    /// Who answers, as messages say it.
    #[default(defaults::RESPONSE_ROLE.to_owned())]
    pub response_role: String,
    /// Sampling defaults from the model's generation_config.json (true unless `GENERATION_CONFIG=vllm`).
    pub ignore_generation_config: bool,
    /// `OVERRIDE_GENERATION_CONFIG`: a JSON object laid over it.
    pub override_generation_config: Option<serde_json::Map<String, serde_json::Value>>,
    /// Most choices a request may ask for.
    #[default(defaults::MAX_N)]
    pub max_n: usize,
    /// Most messages of a chat; default none.
    pub max_messages: Option<usize>,
    /// Most tools of a request.
    #[default(defaults::MAX_TOOLS)]
    pub max_tools: usize,
    /// Most stop strings of a request.
    #[default(defaults::MAX_STOP_STRINGS)]
    pub max_stop_strings: usize,
    /// Deepest nesting of a request's JSON.
    #[default(defaults::MAX_JSON_DEPTH)]
    pub max_json_depth: usize,
    /// `ENABLE_LOGPROB=false`: requests for log probabilities are refused.
    pub refuse_logprobs: bool,
    /// Most alternatives a request may ask for at each token; `u32::MAX` = the whole vocabulary.
    #[default(defaults::MAX_LOGPROBS)]
    pub max_logprobs: u32,
    pub logprobs_mode: LogprobsMode,
    /// `RETURN_TOKENS_AS_TOKEN_IDS`.
    pub tokens_as_ids: bool,
    /// `ENABLE_FORCE_INCLUDE_USAGE`.
    pub force_include_usage: bool,
    /// `ENABLE_PROMPT_TOKENS_DETAILS=false`: usage without `prompt_tokens_details`.
    pub hide_prompt_tokens_details: bool,
    /// `RESPONSES_STORE`: responses of `/v1/responses` are kept. `None`: unless this is a queue worker.
    pub responses_store: Option<bool>,
    #[default(defaults::RESPONSES_STORE_ENTRIES)]
    pub responses_store_entries: usize,
    #[default(defaults::RESPONSES_STORE_MB)]
    pub responses_store_mb: usize,
    #[default(defaults::RESPONSES_STORE_TTL)]
    pub responses_store_ttl: Duration,
    /// Engine's `SEED`: base of the seeds picked for requests without one.
    pub seed: Option<u64>,
    pub request_timeout: Option<Duration>,
}

/// The names that thoughts have in answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReasoningField {
    #[default]
    Both,
    ReasoningContent,
    Reasoning,
}

#[derive(Debug, Clone, SmartDefault)]
pub struct RunpodSettings {
    /// URL templates, unsubstituted (`RUNPOD_WEBHOOK_*`).
    pub get_job: Option<String>,
    pub post_output: Option<String>,
    pub post_stream: Option<String>,
    pub ping: Option<String>,
    /// The variable is in milliseconds; zero is none.
    #[default(defaults::PING_INTERVAL)]
    pub ping_interval: Duration,
    pub api_key: Option<SecretString>,
    /// `RUNPOD_POD_ID`, else `HOSTNAME`, else a UUID.
    pub worker_id: Option<String>,
    pub gpu_type_id: Option<String>,
    pub endpoint_id: Option<String>,
    /// Jobs at once; `None` = max_num_seqs and one more for every [`defaults::SEQS_PER_WAITING_JOB`].
    pub max_concurrency: Option<usize>,
    /// How long SIGTERM waits for running jobs.
    #[default(defaults::DRAIN_TIMEOUT)]
    pub drain_timeout: Duration,
    /// Least time between two stream posts of one job. The first goes at once.
    #[default(defaults::STREAM_INTERVAL)]
    pub stream_interval: Duration,
    /// Tokens to gather before a stream post (the reference workers' batching), when set.
    pub batch: Option<BatchGrowth>,
    /// `runpod_version` in pings; default this crate's version.
    pub reported_version: Option<String>,
    pub user_agent: Option<String>,
}

/// Stream batching as the reference workers had it: start at `min`, multiply by `growth` after each flush, cap at `max`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchGrowth {
    pub min: usize,
    pub growth: f64,
    pub max: usize,
}

#[derive(Debug, Clone, SmartDefault)]
pub struct ServerSettings {
    pub host: Option<String>,
    pub port: Option<u16>,
    /// `PORT_HEALTH`, when it differs from the port.
    pub health_port: Option<u16>,
    /// `HEALTH_CHECK_PATH`.
    #[default(defaults::HEALTH_PATH.to_owned())]
    pub health_path: String,
    /// Empty = open.
    pub api_keys: Vec<SecretString>,
    /// Keys of clients with their limits; none of them opens what `api_keys` do not.
    pub keys_file: Option<KeysFile>,
    /// The server's certificate; `None` = plain HTTP.
    pub tls: Option<TlsFiles>,
    /// CORS; empty = `*`.
    pub allowed_origins: Vec<String>,
    /// How long the head of a request may take; zero = for ever.
    #[default(defaults::HEADER_TIMEOUT)]
    pub header_timeout: Duration,
    /// How long a connection is kept between two requests; zero = for ever.
    #[default(defaults::KEEP_ALIVE_TIMEOUT)]
    pub keep_alive_timeout: Duration,
    /// Connections at once; default as many as the limit of open files allows.
    pub max_connections: Option<usize>,
    /// The local endpoint answers failed OpenAI calls with 500, as the cloud is reported to do.
    pub cloud_errors: bool,
    /// Begins every name at `/metrics`.
    #[default(defaults::METRICS_PREFIX.to_owned())]
    pub metrics_prefix: String,
}

#[derive(Debug, Clone, Default)]
pub struct LogSettings {
    pub level: LogLevel,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum LogLevel {
    Trace,
    Debug,
    #[default]
    Info,
    Warn,
    Error,
    /// Nothing at all.
    Off,
}

#[cfg(test)]
mod docs;
#[cfg(test)]
mod hub_form;
#[cfg(test)]
mod tests;
