//! Everything that can be set, as typed: one struct that both the environment (by envy) and the command line (by clap) fill.
//!
//! The doc comment of a field is its `--help` text and its line in the README. `None` = not given. What the text means is decided in
//! `resolve`; which other names exist is decided in [`super::policy`].

use serde::{Deserialize, Serialize};

/// Settings as typed. It holds secrets in the clear, hence no `Debug`.
#[derive(Clone, Default, Serialize, Deserialize, clap::Args)]
#[serde(default)]
pub struct Env {
    /// The model: a hub id, a folder, or `demo` (the demo model inside this binary).
    #[arg(long, help_heading = "Model")]
    pub model: Option<String>,
    /// Branch, tag or commit of the model.
    #[arg(long, help_heading = "Model")]
    pub revision: Option<String>,
    /// A tokenizer from elsewhere: a hub id or a folder.
    #[arg(long, help_heading = "Model")]
    pub tokenizer: Option<String>,
    /// Token for gated and private models. Never shown.
    #[arg(long, help_heading = "Model")]
    pub hf_token: Option<String>,
    /// The model hub's address.
    #[arg(long, help_heading = "Model")]
    pub hf_endpoint: Option<String>,
    /// Use no network: only what is on disk.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Model")]
    pub hf_hub_offline: Option<String>,
    /// Where downloads go, before every other cache.
    #[arg(long, help_heading = "Model")]
    pub download_dir: Option<String>,
    /// The hub's cache folder.
    #[arg(long, help_heading = "Model")]
    pub hf_hub_cache: Option<String>,
    /// The hub's home folder; its cache is `hub` inside it.
    #[arg(long, help_heading = "Model")]
    pub hf_home: Option<String>,
    /// Folder looked at first: `{LOCAL_MODEL_ROOT}/{last part of the model's id}`.
    #[arg(long, help_heading = "Model")]
    pub local_model_root: Option<String>,
    /// The network volume; models that the platform caches lie in `huggingface-cache/hub` on it.
    #[arg(long, help_heading = "Model")]
    pub base_path: Option<String>,

    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[arg(long, help_heading = "Engine")]
    pub device: Option<String>,
    /// CPU threads that compute.
    #[arg(long, help_heading = "Engine")]
    pub threads: Option<String>,
    /// Bits a weight: `BF16` keeps the weights as stored, `wint8` holds every matrix at 8 bits, `wint4` the layers at 4 bits, embedding and
    /// output at 8. On a GPU only on the architecture that the build was made for (`CUDA_COMPUTE_CAP`).
    #[arg(long, help_heading = "Engine")]
    pub quantization: Option<String>,
    /// What activations are: `auto`, or `bfloat16`, which rounds them to bf16 where they meet unquantized bf16 weights, on a CPU that
    /// multiplies bf16 faster (AMD's AVX512-BF16, AMX). Prompts are computed faster then, a little less exactly.
    #[arg(long, help_heading = "Engine")]
    pub dtype: Option<String>,
    /// Longest sequence, prompt and output together (`4096`, `4k` = 4000, `4K` = 4096).
    #[arg(long, help_heading = "Engine")]
    pub max_model_len: Option<String>,
    /// Most sequences in one step.
    #[arg(long, help_heading = "Engine")]
    pub max_num_seqs: Option<String>,
    /// Most tokens in one step; longer prompts are computed in pieces. 0 = unset.
    #[arg(long, help_heading = "Engine")]
    pub max_num_batched_tokens: Option<String>,
    /// Tokens in one block of the KV cache: 16, 32, 48 or 64.
    #[arg(long, help_heading = "Engine")]
    pub block_size: Option<String>,
    /// Blocks in the KV cache, instead of what memory allows.
    #[arg(long, help_heading = "Engine")]
    pub num_gpu_blocks_override: Option<String>,
    /// Memory for the KV cache, in GiB. On a CPU `auto` takes a quarter of what is free beside the weights, and no more than `MAX_NUM_SEQS` sequences can use.
    #[arg(long, help_heading = "Engine")]
    pub kv_cache_gb: Option<String>,
    /// Memory for the KV cache, in bytes (`KV_CACHE_GB` comes first).
    #[arg(long, help_heading = "Engine")]
    pub kv_cache_memory_bytes: Option<String>,
    /// Share of the GPU's memory that may be used, above 0 and at most 1. Without effect on a CPU: see `KV_CACHE_GB`.
    #[arg(long, help_heading = "Engine")]
    pub gpu_memory_utilization: Option<String>,
    /// Keep the keys and values of earlier tokens, so that what begins the same is not computed again. `false`: not even for the choices of one prompt.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Engine")]
    pub enable_prefix_caching: Option<String>,
    /// The opposite of `ENABLE_PREFIX_CACHING`, which comes first.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Engine")]
    pub disable_radix_cache: Option<String>,
    /// Speculation by prompt lookup, as JSON: `{"method":"ngram","num_speculative_tokens":5}`; further keys `prompt_lookup_max`, `prompt_lookup_min`, `disable_by_batch_size`.
    #[arg(long, help_heading = "Engine")]
    pub speculative_config: Option<String>,
    /// Sequences that may wait for a place; beyond it requests are refused with 429. One that asks for more than MAX_NUM_SEQS and this together (prompts times `n`) is refused with 400.
    #[arg(long, help_heading = "Engine")]
    pub max_waiting: Option<String>,
    /// Seconds a request may take in all. 0 = no limit.
    #[arg(long, help_heading = "Engine")]
    pub request_timeout: Option<String>,
    /// Base of the random seeds of requests that bring none.
    #[arg(long, help_heading = "Engine")]
    pub seed: Option<String>,

    /// Names under which clients may ask for the model; several by spaces, commas, as a JSON list, or by repeating the flag. Answers carry the first.
    #[arg(long, help_heading = "API")]
    pub served_model_name: Option<String>,
    /// Accept any model name in requests.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "API")]
    pub any_model_name: Option<String>,
    /// Read the names of special tokens in user text as control tokens. Lets users write turns of others.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "API")]
    pub allow_special_tokens: Option<String>,
    /// Chat template instead of the model's own: Jinja text or a file.
    #[arg(long, help_heading = "API")]
    pub chat_template: Option<String>,
    /// Allow requests to bring a chat template.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "API")]
    pub trust_request_chat_template: Option<String>,
    /// How contents of messages reach the chat template: `string` (text parts joined by a newline), `openai` (lists of parts), or `auto`, what the template takes.
    #[arg(long, help_heading = "API")]
    pub chat_template_content_format: Option<String>,
    /// Leave the tools of a request with `tool_choice: "none"` out of the prompt.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "API")]
    pub exclude_tools_when_tool_choice_none: Option<String>,
    /// Role of the answers.
    #[arg(long, help_heading = "API")]
    pub response_role: Option<String>,
    /// `auto`: sampling defaults from the model's generation_config.json; `vllm`: none.
    #[arg(long, help_heading = "API")]
    pub generation_config: Option<String>,
    /// JSON object laid over the model's generation_config.json.
    #[arg(long, help_heading = "API")]
    pub override_generation_config: Option<String>,
    /// Output tokens of a request that gives no limit.
    #[arg(long, help_heading = "API")]
    pub default_max_tokens: Option<String>,
    /// Most choices (`n`) in one request.
    #[arg(long, help_heading = "API")]
    pub max_n: Option<String>,
    /// Answer requests for log probabilities; `false`: refuse them.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "API")]
    pub enable_logprob: Option<String>,
    /// Most alternatives at each token that a request for log probabilities may ask for; -1 = the whole vocabulary.
    #[arg(long, allow_hyphen_values = true, help_heading = "API")]
    pub max_logprobs: Option<String>,
    /// What is reported: `raw_logprobs`, `raw_logits`, `processed_logprobs` or `processed_logits` (after bias, penalties and temperature).
    #[arg(long, help_heading = "API")]
    pub logprobs_mode: Option<String>,
    /// Write tokens in log probabilities as `token_id:N`.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "API")]
    pub return_tokens_as_token_ids: Option<String>,
    /// Answers to native jobs: `openai` objects, or the older `tokens` form.
    #[arg(long, help_heading = "API")]
    pub native_output_format: Option<String>,
    /// Send usage in every stream, asked for or not.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "API")]
    pub enable_force_include_usage: Option<String>,
    /// Tell in `usage.prompt_tokens_details` how many prompt tokens came from the prefix cache.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "API")]
    pub enable_prompt_tokens_details: Option<String>,

    /// Jobs taken at once from the queue; never more than MAX_NUM_SEQS and MAX_WAITING together.
    #[arg(long, help_heading = "Queue worker")]
    pub max_concurrency: Option<String>,
    /// Seconds that SIGTERM waits for running requests.
    #[arg(long, help_heading = "Queue worker")]
    pub drain_timeout: Option<String>,
    /// Least milliseconds between two stream posts of one job. The first goes at once.
    #[arg(long, help_heading = "Queue worker")]
    pub stream_interval_ms: Option<String>,
    /// Most tokens gathered for one stream post, instead of by time.
    #[arg(long, help_heading = "Queue worker")]
    pub default_batch_size: Option<String>,
    /// Tokens in the first stream post when gathering by tokens.
    #[arg(long, help_heading = "Queue worker")]
    pub default_min_batch_size: Option<String>,
    /// Factor by which stream posts grow when gathering by tokens.
    #[arg(long, help_heading = "Queue worker")]
    pub default_batch_size_growth_factor: Option<String>,
    /// URL template to take jobs from. Its presence makes this process a queue worker.
    #[arg(long, hide = true)]
    pub runpod_webhook_get_job: Option<String>,
    /// URL template for results.
    #[arg(long, hide = true)]
    pub runpod_webhook_post_output: Option<String>,
    /// URL template for stream chunks.
    #[arg(long, hide = true)]
    pub runpod_webhook_post_stream: Option<String>,
    /// URL template of the heartbeat.
    #[arg(long, hide = true)]
    pub runpod_webhook_ping: Option<String>,
    /// Milliseconds between heartbeats.
    #[arg(long, hide = true)]
    pub runpod_ping_interval: Option<String>,
    /// The worker's key to the platform. Never shown.
    #[arg(long, hide = true)]
    pub runpod_ai_api_key: Option<String>,
    /// The worker's id.
    #[arg(long, hide = true)]
    pub runpod_pod_id: Option<String>,
    /// The worker's id where the platform gives none.
    #[arg(skip)]
    pub hostname: Option<String>,
    /// Put into the platform's URLs.
    #[arg(long, hide = true)]
    pub runpod_gpu_type_id: Option<String>,
    /// The endpoint's id. Its presence switches logs to JSON.
    #[arg(long, hide = true)]
    pub runpod_endpoint_id: Option<String>,
    /// Version told to the platform.
    #[arg(long, hide = true)]
    pub runpod_reported_version: Option<String>,
    /// User agent towards the platform.
    #[arg(long, hide = true)]
    pub runpod_user_agent: Option<String>,
    /// Added to the user agent.
    #[arg(long, hide = true)]
    pub runpod_ua_integration: Option<String>,

    /// Address to listen on.
    #[arg(long, help_heading = "Server")]
    pub host: Option<String>,
    /// Port to listen on. Set and with neither a queue nor a test input, it starts `http`.
    #[arg(long, help_heading = "Server")]
    pub port: Option<String>,
    /// A second port for the health checks.
    #[arg(long, help_heading = "Server")]
    pub port_health: Option<String>,
    /// Path of the health check.
    #[arg(long, help_heading = "Server")]
    pub health_check_path: Option<String>,
    /// Keys that clients must show; several by commas, or by repeating the flag. Never shown.
    #[arg(long, help_heading = "Server")]
    pub api_key: Option<String>,
    /// A file with such keys, one a line.
    #[arg(long, help_heading = "Server")]
    pub api_key_file: Option<String>,
    /// Origins that browsers may call from; several by commas or as a JSON list.
    #[arg(long, help_heading = "Server")]
    pub allowed_origins: Option<String>,
    /// Seconds that the head of a request may take; then its connection is closed. 0 = no limit.
    #[arg(long, help_heading = "Server")]
    pub header_timeout: Option<String>,
    /// Seconds that a connection is kept open between two requests. 0 = no limit.
    #[arg(long, help_heading = "Server")]
    pub keep_alive_timeout: Option<String>,
    /// Connections at once. A new one takes the place of the one that is silent longest; while all are busy, only health checks are answered.
    #[arg(long, help_heading = "Server")]
    pub max_connections: Option<String>,
    /// Answer failed OpenAI calls through the local endpoint with 500, as the cloud is reported to do.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Server")]
    pub cloud_errors: Option<String>,

    /// Begins every name at `/metrics`. `vllm:` makes them vLLM's, for dashboards and autoscalers that know those.
    #[arg(long, help_heading = "Server")]
    pub metrics_prefix: Option<String>,

    /// No line of the engine's figures in the log (otherwise one every 10 s of work).
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "General")]
    pub disable_log_stats: Option<String>,
    /// `trace`, `debug`, `info`, `warn`, `error` or `notset` (silent).
    #[arg(long, help_heading = "General")]
    pub log_level: Option<String>,
    /// YAML file with settings: keys are flag names.
    #[arg(long, help_heading = "General")]
    pub vllm_config_file: Option<String>,
    /// Flags, split as a shell would; stronger than the environment.
    #[arg(long, hide = true, allow_hyphen_values = true)]
    pub vllm_extra_args: Option<String>,
    /// Base of the default cache folder.
    #[arg(skip)]
    pub xdg_cache_home: Option<String>,
    /// Base of the default cache folder's base.
    #[arg(skip)]
    pub home: Option<String>,
}
