//! The policy table: what becomes of every setting that the reference workers and engines know.
//!
//! A name *works*, is another spelling of one that works, is *refused* unless its value asks for what happens anyway, or has
//! *no effect here*, which is said once at start. This is the only place where something may be accepted without effect: for that,
//! it must change speed, memory or logs only, or belong to a feature whose use is refused elsewhere.

use std::fmt::Write;

use super::Env;
use super::parse;

/// What becomes of a name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// A field of [`Env`]; the text says what holds when it is not set.
    Works { default: &'static str },
    /// Another spelling of a name that works.
    Alias(&'static str),
    /// Stops the start, except with one of the values `unless` (booleans in any spelling; case does not matter).
    Refused { unless: &'static [&'static str], why: &'static str },
    /// Accepted and without effect. A switch takes no value as a flag.
    NoEffect { why: &'static str, switch: bool },
}

/// What becomes of `name`, an environment variable's spelling; `None` when it is not a setting at all.
pub fn find(name: &str) -> Option<Verdict> {
    entries().find(|(known, _)| *known == name).map(|(_, verdict)| verdict)
}

/// The whole table.
pub fn entries() -> impl Iterator<Item = (&'static str, Verdict)> {
    let works = WORKS.iter().map(|&(name, default)| (name, Verdict::Works { default }));
    let aliases = ALIASES.iter().map(|&(name, of)| (name, Verdict::Alias(of)));
    let refused =
        REFUSED.iter().flat_map(|&(why, names)| names.iter().map(move |&(name, unless)| (name, Verdict::Refused { unless, why })));
    let no_effect = NO_EFFECT.iter().flat_map(|&(why, names)| {
        names.iter().map(move |&name| (name.trim_end_matches('!'), Verdict::NoEffect { why, switch: name.ends_with('!') }))
    });
    works.chain(aliases).chain(refused).chain(no_effect)
}

/// Other spellings of `name`, strongest first.
pub fn aliases(name: &str) -> impl Iterator<Item = &'static str> {
    ALIASES.iter().filter(move |(_, of)| *of == name).map(|(alias, _)| *alias)
}

/// True when a value asks for nothing else than what happens anyway.
pub fn harmless(value: &str, unless: &[&str]) -> bool {
    let boolean = parse::boolean(value);
    unless.iter().any(|known| known.eq_ignore_ascii_case(value.trim()) || (boolean.is_some() && parse::boolean(known) == boolean))
}

/// The flag of a setting: `MAX_MODEL_LEN` → `--max-model-len`.
pub fn flag(name: &str) -> String {
    format!("--{}", name.to_ascii_lowercase().replace('_', "-"))
}

/// The variable of a flag: `--max_model_len`, `max-model-len` → `MAX_MODEL_LEN`.
pub fn variable(flag: &str) -> String {
    flag.trim_start_matches('-').to_ascii_uppercase().replace('-', "_")
}

/// The README's tables of settings.
pub fn markdown() -> String {
    let command = <Env as clap::Args>::augment_args(clap::Command::new("settings"));
    let mut text = String::from("| Variable (flag) | Default | Meaning | Also read as |\n|---|---|---|---|\n");
    for (name, default) in WORKS {
        let Some(argument) = command.get_arguments().find(|argument| argument.get_id().as_str() == name.to_ascii_lowercase()) else {
            continue;
        };
        let help = argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
        let others = aliases(name).map(|alias| format!("`{alias}`")).collect::<Vec<_>>().join(" ");
        let _ =
            writeln!(text, "| `{name}` (`{}`) | {default} | {} | {others} |", flag(name), help.trim_end_matches('.').replace('|', "\\|"));
    }
    text.push_str("\n**Refused**: these stop the start, unless unset or at the value in brackets.\n\n| Variables | Why, and what to do |\n|---|---|\n");
    for (why, names) in REFUSED {
        let names = names.iter().map(|(name, unless)| match unless.first() {
            Some(value) => format!("`{name}` ({})", value.replace('*', "\\*")),
            None => format!("`{name}`"),
        });
        let _ = writeln!(text, "| {} | {why} |", names.collect::<Vec<_>>().join(", "));
    }
    text.push_str("\n**No effect here**: accepted, and said once in the log.\n\n| Variables | Why |\n|---|---|\n");
    for (why, names) in NO_EFFECT {
        let names = names.iter().map(|name| format!("`{}`", name.trim_end_matches('!')));
        let _ = writeln!(text, "| {} | {why} |", names.collect::<Vec<_>>().join(", "));
    }
    text
}

/// Names that work, with what holds when they are not set; in the order of [`super::Env`].
#[rustfmt::skip]
const WORKS: &[(&str, &str)] = &[
    ("MODEL", "baidu/ERNIE-4.5-0.3B-Paddle"),
    ("REVISION", "main"),
    ("TOKENIZER", "the model's own"),
    ("HF_TOKEN", "the token stored in the hub's home folder"),
    ("HF_ENDPOINT", "https://huggingface.co"),
    ("HF_HUB_OFFLINE", "false"),
    ("DOWNLOAD_DIR", "none"),
    ("HF_HUB_CACHE", "$HF_HOME/hub"),
    ("HF_HOME", "~/.cache/huggingface"),
    ("LOCAL_MODEL_ROOT", "/root/PaddlePaddle"),
    ("BASE_PATH", "/runpod-volume"),
    ("DEVICE", "auto: the first GPU in a CUDA build, else the CPU; a queue worker of a CUDA build does not start without a GPU"),
    ("THREADS", "auto: all cores"),
    ("QUANTIZATION", "BF16: as stored"),
    ("DTYPE", "auto: f32 on the CPU, bf16 on a GPU"),
    ("MAX_MODEL_LEN", "auto: the model's, bounded by memory"),
    ("MAX_NUM_SEQS", "auto: 16 on the CPU, up to 256 on a GPU"),
    ("MAX_NUM_BATCHED_TOKENS", "auto: 256 to 512 on the CPU, 2048 on a GPU"),
    ("BLOCK_SIZE", "32"),
    ("NUM_GPU_BLOCKS_OVERRIDE", "what memory allows"),
    ("KV_CACHE_GB", "auto"),
    ("KV_CACHE_MEMORY_BYTES", "auto"),
    ("GPU_MEMORY_UTILIZATION", "0.9"),
    ("ENABLE_PREFIX_CACHING", "true"),
    ("DISABLE_RADIX_CACHE", "false"),
    ("SPECULATIVE_CONFIG", "none: off"),
    ("MAX_WAITING", "512"),
    ("REQUEST_TIMEOUT", "3600"),
    ("SEED", "random"),
    ("SERVED_MODEL_NAME", "the model's id"),
    ("ANY_MODEL_NAME", "false"),
    ("ALLOW_SPECIAL_TOKENS", "false"),
    ("CHAT_TEMPLATE", "the model's own"),
    ("TRUST_REQUEST_CHAT_TEMPLATE", "false"),
    ("CHAT_TEMPLATE_CONTENT_FORMAT", "auto"),
    ("EXCLUDE_TOOLS_WHEN_TOOL_CHOICE_NONE", "false"),
    ("RESPONSE_ROLE", "assistant"),
    ("GENERATION_CONFIG", "auto"),
    ("OVERRIDE_GENERATION_CONFIG", "none"),
    ("DEFAULT_MAX_TOKENS", "rest of the context; 16 on /v1/completions"),
    ("MAX_N", "128"),
    ("ENABLE_LOGPROB", "true"),
    ("MAX_LOGPROBS", "20"),
    ("LOGPROBS_MODE", "raw_logprobs"),
    ("RETURN_TOKENS_AS_TOKEN_IDS", "false"),
    ("NATIVE_OUTPUT_FORMAT", "openai"),
    ("ENABLE_FORCE_INCLUDE_USAGE", "false"),
    ("ENABLE_PROMPT_TOKENS_DETAILS", "true"),
    ("MAX_CONCURRENCY", "auto: MAX_NUM_SEQS and an eighth more"),
    ("DRAIN_TIMEOUT", "600"),
    ("STREAM_INTERVAL_MS", "50"),
    ("DEFAULT_BATCH_SIZE", "by time; 50 when another of these is set"),
    ("DEFAULT_MIN_BATCH_SIZE", "1"),
    ("DEFAULT_BATCH_SIZE_GROWTH_FACTOR", "3"),
    ("RUNPOD_WEBHOOK_GET_JOB", "none"),
    ("RUNPOD_WEBHOOK_POST_OUTPUT", "none"),
    ("RUNPOD_WEBHOOK_POST_STREAM", "none"),
    ("RUNPOD_WEBHOOK_PING", "none"),
    ("RUNPOD_PING_INTERVAL", "10000"),
    ("RUNPOD_AI_API_KEY", "none"),
    ("RUNPOD_POD_ID", "HOSTNAME, else random"),
    ("HOSTNAME", "none"),
    ("RUNPOD_GPU_TYPE_ID", "none"),
    ("RUNPOD_ENDPOINT_ID", "none"),
    ("RUNPOD_REPORTED_VERSION", "this program's version"),
    ("RUNPOD_USER_AGENT", "this program's name and version"),
    ("RUNPOD_UA_INTEGRATION", "none"),
    ("HOST", "127.0.0.1 for `serve` and `gateway`, else 0.0.0.0"),
    ("PORT", "8000 for `serve` and `gateway`, else 80"),
    ("PORT_HEALTH", "PORT"),
    ("HEALTH_CHECK_PATH", "/ping"),
    ("API_KEY", "none: open"),
    ("API_KEY_FILE", "none"),
    ("ALLOWED_ORIGINS", "*"),
    ("HEADER_TIMEOUT", "10"),
    ("KEEP_ALIVE_TIMEOUT", "75"),
    ("MAX_CONNECTIONS", "auto: half of the open files that the system allows"),
    ("CLOUD_ERRORS", "false"),
    ("METRICS_PREFIX", "`worker_candle_`"),
    ("DISABLE_LOG_STATS", "false"),
    ("LOG_LEVEL", "info"),
    ("VLLM_CONFIG_FILE", "/vllm_config.yaml, if it is there"),
    ("VLLM_EXTRA_ARGS", "none"),
    ("XDG_CACHE_HOME", "~/.cache"),
    ("HOME", "none"),
];

/// Other spellings of names that work.
#[rustfmt::skip]
const ALIASES: &[(&str, &str)] = &[
    ("MODEL_NAME", "MODEL"),
    ("MODEL_REPO", "MODEL"),
    ("MODEL_REVISION", "REVISION"),
    ("TOKENIZER_NAME", "TOKENIZER"),
    ("TOKENIZER_PATH", "TOKENIZER"),
    ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"),
    ("TRANSFORMERS_OFFLINE", "HF_HUB_OFFLINE"),
    ("HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"),
    ("RAYON_NUM_THREADS", "THREADS"),
    ("CONTEXT_LENGTH", "MAX_MODEL_LEN"),
    ("MAX_RUNNING_REQUESTS", "MAX_NUM_SEQS"),
    ("CHUNKED_PREFILL_SIZE", "MAX_NUM_BATCHED_TOKENS"),
    ("MEM_FRACTION_STATIC", "GPU_MEMORY_UTILIZATION"),
    ("SCHEDULER_MAX_SIZE", "MAX_WAITING"),
    ("RANDOM_SEED", "SEED"),
    ("OPENAI_SERVED_MODEL_NAME_OVERRIDE", "SERVED_MODEL_NAME"),
    ("CUSTOM_CHAT_TEMPLATE", "CHAT_TEMPLATE"),
    ("OPENAI_RESPONSE_ROLE", "RESPONSE_ROLE"),
    ("TIMEOUT_GRACEFUL_SHUTDOWN", "DRAIN_TIMEOUT"),
    ("MAX_BATCH_SIZE", "DEFAULT_BATCH_SIZE"),
    ("MIN_BATCH_SIZE", "DEFAULT_MIN_BATCH_SIZE"),
    ("BATCH_SIZE_GROWTH_FACTOR", "DEFAULT_BATCH_SIZE_GROWTH_FACTOR"),
    ("BATCH_GROWTH_FACTOR", "DEFAULT_BATCH_SIZE_GROWTH_FACTOR"),
    ("API_KEYS", "API_KEY"),
    ("FD_API_KEY", "API_KEY"),
    ("VLLM_API_KEY", "API_KEY"),
    ("RUNPOD_LOG_LEVEL", "LOG_LEVEL"),
    ("RUNPOD_DEBUG_LEVEL", "LOG_LEVEL"),
    ("RP_LOG_LEVEL", "LOG_LEVEL"),
    ("UVICORN_LOG_LEVEL", "LOG_LEVEL"),
    ("RP_API_PORT", "PORT"),
    ("RP_API_HOST", "HOST"),
    ("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "KEEP_ALIVE_TIMEOUT"),
    ("FD_SUPPORT_MAX_CONNECTIONS", "MAX_CONNECTIONS"),
    ("CONFIG", "VLLM_CONFIG_FILE"),
];

/// A refused name and the values that are no reason to stop.
type Refusal = (&'static str, &'static [&'static str]);

/// Refused names: why, and for each the values that are no reason to stop.
#[rustfmt::skip]
const REFUSED: &[(&str, &[Refusal])] = &[
    ("one device: set it to 1, and run one worker per GPU", &[
        ("TENSOR_PARALLEL_SIZE", &["1"]),
        ("DATA_PARALLEL_SIZE", &["1"]),
        ("PIPELINE_PARALLEL_SIZE", &["1"]),
        ("DECODE_CONTEXT_PARALLEL_SIZE", &["1"]),
        ("DATA_PARALLEL_SIZE_LOCAL", &["1"]),
        ("DATA_PARALLEL_RANK", &["0"]),
        ("LOCAL_DATA_PARALLEL_ID", &["0"]),
        ("DATA_PARALLEL_START_RANK", &["0"]),
        ("ENABLE_EXPERT_PARALLEL", &["false"]),
        ("ENABLE_EPLB", &["false"]),
        ("ENABLE_DBO", &["false"]),
        ("DATA_PARALLEL_HYBRID_LB", &["false"]),
    ]),
    ("prefill and decode run in one process: unset it", &[
        ("SPLITWISE_ROLE", &["mixed"]),
        ("INNODE_PREFILL_PORTS", &[]),
        ("KV_TRANSFER_CONFIG", &[]),
        ("SCHEDULER_NAME", &["local"]),
        ("ROUTER", &[]),
    ]),
    ("weights are held as stored or as QUANTIZATION says, and activations are f32 or bf16: unset it", &[
        ("QUANTIZATION_PARAM_PATH", &[]),
        ("LM_HEAD_FP32", &["false"]),
        ("OVERRIDE_ATTENTION_DTYPE", &[]),
    ]),
    ("this version keeps the types it was built for: set auto or bfloat16, or unset it", &[
        ("KV_CACHE_DTYPE", &["auto", "bfloat16", "bf16"]),
    ]),
    ("this version reads Safetensors only: set auto, or convert the model", &[
        ("LOAD_FORMAT", &["auto", "safetensors", "hf"]),
    ]),
    ("this version takes configuration from the model's own files: unset it and edit those", &[
        ("HF_OVERRIDES", &["{}"]),
        ("HF_CONFIG_PATH", &[]),
        ("CONFIG_FORMAT", &["auto", "hf"]),
        ("ROPE_SCALING", &[]),
        ("ROPE_THETA", &[]),
        ("MODEL_CONFIG_NAME", &["config.json"]),
        ("DISABLE_SLIDING_WINDOW", &["false"]),
        ("PLAS_ATTENTION_CONFIG", &[]),
    ]),
    ("this version reads tokenizer.json or tokenizer.model in this process: unset it, or point TOKENIZER at another folder", &[
        ("TOKENIZER_MODE", &["auto", "hf", "slow", "fast"]),
        ("TOKENIZER_REVISION", &["main", "master"]),
        ("TOKENIZER_BASE_URL", &[]),
        ("SKIP_TOKENIZER_INIT", &["false"]),
    ]),
    ("models come from the Hugging Face hub or a folder: set HUGGINGFACE, or point MODEL at a folder", &[
        ("FD_MODEL_SOURCE", &["HUGGINGFACE"]),
    ]),
    ("this version generates text only: unset it", &[
        ("RUNNER", &["auto", "generate"]),
        ("TASK", &["auto", "generate"]),
        ("CONVERT", &["auto", "none"]),
        ("ENABLE_PROMPT_EMBEDS", &["false"]),
        ("ENABLE_MM", &["false"]),
        ("ENABLE_MM_OUTPUT", &["false"]),
    ]),
    ("no LoRA adapters in this version: unset it, or merge the adapter into the model", &[
        ("ENABLE_LORA", &["false"]),
        ("LORA_MODULES", &["[]", "{}"]),
    ]),
    ("the one way to speculate is SPECULATIVE_CONFIG={\"method\":\"ngram\"}: unset it", &[
        ("SPECULATIVE_METHOD", &[]),
        ("SPECULATIVE_MODEL", &[]),
    ]),
    ("no structured output in this version: set off, or unset it", &[
        // `outlines` is what the vLLM worker's form sends unasked.
        ("GUIDED_DECODING_BACKEND", &["off", "auto", "none", "outlines"]),
        ("STRUCTURED_OUTPUTS_CONFIG", &["{}"]),
        ("GUIDED_DECODING_DISABLE_ANY_WHITESPACE", &["false"]),
    ]),
    ("no tool calls in this version: unset it", &[
        ("TOOL_CALL_PARSER", &["none"]),
        ("ENABLE_AUTO_TOOL_CHOICE", &["false"]),
        ("TOOL_SERVER", &[]),
    ]),
    ("no reasoning parser in this version: unset it", &[
        ("REASONING_PARSER", &["none"]),
    ]),
    ("no Python code runs in this worker: unset it", &[
        ("TOOL_PARSER_PLUGIN", &[]),
        ("LOGITS_PROCESSORS", &["[]"]),
        ("MIDDLEWARE", &["[]"]),
        ("WORKER_CLS", &["auto"]),
        ("WORKER_EXTENSION_CLS", &[]),
        ("SCHEDULER_CLS", &[]),
        ("IO_PROCESSOR_PLUGIN", &[]),
    ]),
    ("weights are fixed for the life of the worker: unset it", &[
        ("DYNAMIC_LOAD_WEIGHT", &["false"]),
        ("LOAD_STRATEGY", &["normal"]),
        ("ENABLE_SLEEP_MODE", &["false"]),
        ("FD_ENABLE_V1_UPDATE_WEIGHTS", &["false"]),
    ]),
    ("requests are served first come, first served: set fcfs, or unset it", &[
        ("SCHEDULING_POLICY", &["fcfs"]),
    ]),
    ("a repeating answer is not cut short here: unset it", &[
        ("ENABLE_EARLY_STOP", &["false"]),
        ("EARLY_STOP_CONFIG", &["{}"]),
    ]),
    ("a waiting request is bounded by REQUEST_TIMEOUT: set -1, or unset it", &[
        ("MAX_WAITING_TIME", &["-1"]),
    ]),
    ("streams of OpenAI calls are always server-sent events: set 1, or unset it", &[
        ("RAW_OPENAI_OUTPUT", &["true"]),
    ]),
    ("no TLS here: put a proxy in front that speaks it, and unset this", &[
        ("SSL_KEYFILE", &[]),
        ("SSL_CERTFILE", &[]),
        ("SSL_CA_CERTS", &[]),
        ("SSL_CERT_REQS", &["0"]),
        ("ENABLE_SSL_REFRESH", &["false"]),
    ]),
    ("this worker listens on TCP: set HOST and PORT", &[
        ("UDS", &[]),
    ]),
    ("cross-origin calls are allowed by ALLOWED_ORIGINS alone: unset it", &[
        ("ALLOWED_METHODS", &["*", r#"["*"]"#]),
        ("ALLOWED_HEADERS", &["*", r#"["*"]"#]),
        ("ALLOW_CREDENTIALS", &["false"]),
    ]),
    ("no realtime mode here: set 0, or use `worker-candle http`", &[
        ("RUNPOD_REALTIME_PORT", &["0"]),
    ]),
];

/// Names without effect: why, and which. `!` marks switches, which take no value as flags.
#[rustfmt::skip]
const NO_EFFECT: &[(&str, &[&str])] = &[
    ("the prefix cache compares tokens, so no hash can mix up two prompts", &[
        "PREFIX_CACHING_HASH_ALGO",
    ]),
    ("long prompts are always computed in pieces; answers are the same", &[
        "ENABLE_CHUNKED_PREFILL!", "FD_DISABLE_CHUNKED_PREFILL!", "MAX_NUM_PARTIAL_PREFILLS", "MAX_LONG_PARTIAL_PREFILLS",
        "LONG_PREFILL_TOKEN_THRESHOLD", "MAX_PREFILL_TOKENS",
    ]),
    ("scheduling follows MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS and the KV cache alone", &[
        "ASYNC_SCHEDULING!", "SCHEDULE_POLICY", "SCHEDULE_CONSERVATIVENESS", "SCHEDULER_DELAY_FACTOR", "NUM_LOOKAHEAD_SLOTS",
        "ENABLE_V1_KVCACHE_SCHEDULER!", "STREAM_INTERVAL", "LOAD_BALANCE_METHOD",
    ]),
    ("the KV cache is one pool, sized by GPU_MEMORY_UTILIZATION, KV_CACHE_GB or NUM_GPU_BLOCKS_OVERRIDE", &[
        "KV_CACHE_RATIO", "STATIC_DECODE_BLOCKS", "PREALLOC_DEC_BLOCK_SLOT_NUM_THRESHOLD", "MAX_TOTAL_TOKENS",
        "DISABLE_HYBRID_KV_CACHE_MANAGER!", "KV_SHARING_FAST_PREFILL!", "CALCULATE_KV_SCALES!", "MAMBA_CACHE_DTYPE",
        "MAMBA_SSM_CACHE_DTYPE",
    ]),
    ("nothing is moved to host memory: a model that does not fit stops the start", &[
        "SWAP_SPACE", "CPU_OFFLOAD_GB", "KV_OFFLOADING_BACKEND", "KV_OFFLOADING_SIZE", "KV_EVENTS_CONFIG",
    ]),
    ("kernels are chosen for the device", &[
        "ATTENTION_BACKEND", "SAMPLING_BACKEND", "FD_ATTENTION_BACKEND", "FD_MOE_BACKEND", "FD_USE_MACHETE!", "FD_USE_DEEP_GEMM!",
        "FD_SAMPLING_CLASS", "FD_FILL_BITMASK_BATCH", "ENFORCE_EAGER!", "CUDA_GRAPH_SIZES", "MAX_SEQ_LEN_TO_CAPTURE",
        "COMPILATION_CONFIG", "GRAPH_OPTIMIZATION_CONFIG", "DISABLE_CUDA_GRAPH!", "ENABLE_TORCH_COMPILE!", "DISABLE_CASCADE_ATTN!",
        "ENABLE_P2P_CHECK!", "ENABLE_FLASHINFER_MLA!", "TRITON_ATTENTION_REDUCE_IN_FP32!", "ADDITIONAL_CONFIG", "USE_WARMUP!",
        "MODEL_IMPL",
    ]),
    ("the layout of the weights is recognised, and they are mapped into memory", &[
        "LOAD_CHOICES", "MODEL_LOADER_EXTRA_CONFIG", "MAX_PARALLEL_LOADING_WORKERS", "SAFETENSORS_LOAD_STRATEGY", "PT_LOAD_MAP_LOCATION",
        "USE_TQDM_ON_LOAD!", "IGNORE_PATTERNS", "FD_MODEL_CACHE", "FD_USE_HF_TOKENIZER!",
    ]),
    ("no code of a model is ever run", &[
        "TRUST_REMOTE_CODE!", "CODE_REVISION",
    ]),
    ("there is one device, so nothing is spread over several", &[
        "DATA_PARALLEL_ADDRESS", "DATA_PARALLEL_BACKEND", "DATA_PARALLEL_RPC_PORT", "DBO_DECODE_TOKEN_THRESHOLD",
        "DBO_PREFILL_TOKEN_THRESHOLD", "DISTRIBUTED_EXECUTOR_BACKEND", "EPLB_CONFIG", "EPLB_LOG_BALANCEDNESS!", "EPLB_STEP_INTERVAL",
        "EPLB_WINDOW_SIZE", "EXPERT_PLACEMENT_STRATEGY", "NUM_REDUNDANT_EXPERTS", "DISABLE_CUSTOM_ALL_REDUCE!",
        "USE_INTERNODE_LL_TWO_STAGE!", "DISABLE_SEQUENCE_PARALLEL_MOE!", "RAY_WORKERS_USE_NSIGHT!", "CACHE_TRANSFER_PROTOCOL",
        "PD_COMM_PORT", "RDMA_COMM_PORTS", "IPS", "ENGINE_WORKER_QUEUE_PORT", "CACHE_QUEUE_PORT", "FD_ASYNC_LLM_PID",
        "FD_DISABLED_RECOVER!",
    ]),
    ("text models only: a request with images is refused", &[
        "ALLOWED_LOCAL_MEDIA_PATH", "ALLOWED_MEDIA_DOMAINS", "DEFAULT_MM_LORAS", "DISABLE_CHUNKED_MM_INPUT!",
        "DISABLE_MM_PREPROCESSOR_CACHE!", "ENABLE_MULTIMODAL_ENCODER_DATA_PARALLEL!", "INTERLEAVE_MM_STRINGS!", "LIMIT_MM_PER_PROMPT",
        "MEDIA_IO_KWARGS", "MM_ENCODER_TP_MODE", "MM_PROCESSOR_CACHE_GB", "MM_PROCESSOR_CACHE_TYPE", "MM_PROCESSOR_KWARGS",
        "MM_SHM_CACHE_MAX_OBJECT_SIZE_MB", "SKIP_MM_PROFILING!", "VIDEO_PRUNING_RATE", "MAX_ENCODER_CACHE", "MAX_PROCESSOR_CACHE",
    ]),
    ("no pooling models: a request for embeddings is refused", &[
        "POOLER_CONFIG", "OVERRIDE_POOLER_CONFIG",
    ]),
    ("detail of LoRA adapters, which ENABLE_LORA governs", &[
        "MAX_LORAS", "MAX_LORA_RANK", "MAX_CPU_LORAS", "LORA_DTYPE", "FULLY_SHARDED_LORAS!", "LORA_EXTRA_VOCAB_SIZE", "ENABLE_LORA_BIAS!",
    ]),
    ("detail of speculative decoding, which SPECULATIVE_CONFIG governs", &[
        "NUM_SPECULATIVE_TOKENS", "NGRAM_PROMPT_LOOKUP_MAX", "NGRAM_PROMPT_LOOKUP_MIN", "SPECULATIVE_DRAFT_TENSOR_PARALLEL_SIZE",
        "SPECULATIVE_MAX_MODEL_LEN", "SPECULATIVE_DISABLE_BY_BATCH_SIZE", "SPECULATIVE_QUANTIZATION", "SPECULATIVE_MODEL_REVISION",
        "SPECULATIVE_ENFORCE_EAGER!",
    ]),
    ("detail of structured output, which GUIDED_DECODING_BACKEND governs", &[
        "GUIDED_DECODING_DISABLE_ADDITIONAL_PROPERTIES!", "GUIDED_DECODING_DISABLE_FALLBACK!", "DISABLE_OUTLINES_DISK_CACHE!",
    ]),
    ("MAX_LOGPROBS alone bounds log probabilities", &[
        "FD_USE_GET_SAVE_OUTPUT_V1!",
    ]),
    ("requests cannot bring logits processors", &[
        "LOGITS_PROCESSOR_PATTERN",
    ]),
    ("stop sequences are not limited in number or length by a setting", &[
        "FD_MAX_STOP_SEQS_NUM", "FD_STOP_SEQS_MAX_LEN",
    ]),
    ("no thinking budget: a request for one is refused", &[
        "FD_LIMIT_THINKING_CONTENT_TRUNCATE_STR",
    ]),
    ("logs are governed by LOG_LEVEL, and never hold prompts or answers", &[
        "COLLECT_DETAILED_TRACES", "OTLP_TRACES_ENDPOINT", "DISABLE_LOG_REQUESTS!", "DISABLE_UVICORN_ACCESS_LOG!",
        "ENABLE_LOG_OUTPUTS!", "ENABLE_LOG_REQUESTS!", "LOG_CONFIG_FILE", "LOG_ERROR_STACK!", "LOG_LEVEL_HTTP", "LOG_REQUESTS!",
        "MAX_LOG_LEN", "SHOW_TIME_COST!", "SHOW_HIDDEN_METRICS_FOR_VERSION", "FD_LOG_DIR", "FD_DEBUG",
    ]),
    ("one process serves everything on one port; its HTTP server has no such knob", &[
        "API_SERVER_COUNT", "WORKERS", "TIMEOUT", "CONTROLLER_PORT", "METRICS_PORT", "BENCHMARK_METRICS_CONFIG",
        "DISABLE_FRONTEND_MULTIPROCESSING!", "DISABLE_FASTAPI_DOCS!", "ENABLE_REQUEST_ID_HEADERS!", "ENABLE_SERVER_LOAD_TRACKING!",
        "ENABLE_TOKENIZER_INFO_ENDPOINT!", "H11_MAX_HEADER_COUNT", "H11_MAX_INCOMPLETE_EVENT_SIZE", "ROOT_PATH", "VLLM_PORT",
        "VLLM_BASE_URL", "VLLM_STARTUP_TIMEOUT", "FILE_STORAGE_PATH", "RP_API_CONCURRENCY", "RP_DEBUGGER!",
        "RUNPOD_REALTIME_CONCURRENCY",
    ]),
    ("there is no store of requests beside the waiting queue", &[
        "SCHEDULER_TTL", "SCHEDULER_HOST", "SCHEDULER_PORT", "SCHEDULER_DB", "SCHEDULER_PASSWORD", "SCHEDULER_TOPIC",
        "SCHEDULER_MIN_LOAD_SCORE", "SCHEDULER_LOAD_SHARDS_NUM", "SCHEDULER_SYNC_PERIOD", "SCHEDULER_EXPIRE_PERIOD",
        "SCHEDULER_RELEASE_LOAD_EXPIRE_PERIOD", "SCHEDULER_READER_PARALLEL", "SCHEDULER_WRITER_PARALLEL", "SCHEDULER_READER_BATCH_SIZE",
        "SCHEDULER_WRITER_BATCH_SIZE",
    ]),
    ("belongs to the reference workers' images", &[
        "TRANSFORMERS_VERSION", "WORKER_CUDA_VERSION",
    ]),
];
