//! Values that hold where nothing is set. The table of settings shows them, and the rooms that use them read them here.

use std::time::Duration;

use super::BatchGrowth;

/// The model when none is named.
pub const MODEL: &str = "baidu/ERNIE-4.5-0.3B-Paddle";
/// The hub's branch.
pub const REVISION: &str = "main";
pub const HF_ENDPOINT: &str = "https://huggingface.co";
pub const MODELSCOPE_ENDPOINT: &str = "https://www.modelscope.cn";
pub const MODELSCOPE_REVISION: &str = "master";
pub const LOCAL_MODEL_ROOT: &str = "/root/PaddlePaddle";
/// Where the platform mounts the network volume.
pub const BASE_PATH: &str = "/runpod-volume";

/// Sequences in one step of a model that embeds or scores them, at least: each is there for one step.
pub const POOLING_SEQS: usize = 64;
/// Sequences in one step.
pub const CPU_SEQS: usize = 16;
pub const GPU_SEQS: usize = 256;
/// Tokens in one step.
pub const CPU_BATCHED_TOKENS: usize = 256;
pub const GPU_BATCHED_TOKENS: usize = 2_048;
/// Tokens in one block of the KV cache.
pub const BLOCK_SIZE: usize = 32;
/// Share of the memory left after the weights that the KV cache takes on a CPU, where others live too.
pub const CPU_KV_SHARE: f64 = 0.25;
/// Share of a GPU's memory that may be used.
pub const GPU_UTILIZATION: f64 = 0.9;
/// Requests that may wait.
pub const MAX_WAITING: usize = 512;
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(3600);

pub const RESPONSE_ROLE: &str = "assistant";
/// `max_tokens` of a completion: OpenAI's default.
pub const COMPLETION_MAX_TOKENS: usize = 16;
/// Choices in one request.
pub const MAX_N: usize = 128;
/// Tools of one request: OpenAI's bound.
pub const MAX_TOOLS: usize = 128;
/// Stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;
/// Lists and objects within each other in one request: what the parser reads at most.
pub const MAX_JSON_DEPTH: usize = 127;
/// Alternatives at each token.
pub const MAX_LOGPROBS: u32 = 20;

/// Responses that are kept for `/v1/responses`, their size in MiB, and for how long.
pub const RESPONSES_STORE_ENTRIES: usize = 1024;
pub const RESPONSES_STORE_MB: usize = 64;
pub const RESPONSES_STORE_TTL: Duration = Duration::from_secs(24 * 3600);

/// For each so many sequences of a step, one more job is taken than can run: it is at hand when a sequence ends. More would wait here
/// while a worker elsewhere is idle, and their time limit runs.
pub const SEQS_PER_WAITING_JOB: usize = 8;
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(600);
/// Least time between two stream posts of one job.
pub const STREAM_INTERVAL: Duration = Duration::from_millis(50);
/// Stream posts by tokens, when one of their settings is given: the vLLM worker's values (the FastDeploy worker's were 1, 1.3 and 64).
pub const BATCH_GROWTH: BatchGrowth = BatchGrowth { min: 1, growth: 3.0, max: 50 };
pub const PING_INTERVAL: Duration = Duration::from_secs(10);

pub const LAPTOP_HOST: &str = "127.0.0.1";
pub const LAPTOP_PORT: u16 = 8000;
pub const PLATFORM_HOST: &str = "0.0.0.0";
/// Where a load-balancing endpoint looks when PORT says nothing.
pub const PLATFORM_PORT: u16 = 80;
pub const HEALTH_PATH: &str = "/ping";
/// From the beginning of a request to the end of its head.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// From a response to the next request.
pub const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(75);
pub const METRICS_PREFIX: &str = "worker_candle_";

/// Read when VLLM_CONFIG_FILE names no other.
pub const CONFIG_FILE: &str = "/vllm_config.yaml";
