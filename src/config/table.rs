//! The table of settings: one row a setting. Flags, the reading of every source, the report of `check`, `docs/settings.md` and the Hub's
//! form are made from it. To add a setting, add a row here and read it in `resolve`.

use super::defaults;
use super::setting::DefaultValue::{Computed, Count, Milliseconds, Nothing, Number, Prose, Seconds, Text};
use super::setting::{Form, Input, Kind, Range, Section, Setting};

const AUTO: &[&str] = &["auto"];
const AUTO_OR_ZERO: &[&str] = &["auto", "0"];
const AUTO_OR_MINUS_ONE: &[&str] = &["auto", "-1"];
const COUNT: Kind = Kind::Count { least: 1, auto: AUTO };
const SECONDS: Kind = Kind::Number { range: Range::NotNegative, auto: AUTO };

/// The row of a name, in any case.
pub fn find(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().copied().find(|setting| setting.name.eq_ignore_ascii_case(name))
}

/// Rows by section. Each becomes a constant of its name, with its doc comment as `doc`.
macro_rules! settings {
    ($($section:ident { $($(#[doc = $doc:literal])+ $name:ident = $row:expr;)+ })+) => {
        $($($(#[doc = $doc])+ pub const $name: Setting =
            Setting { name: stringify!($name), section: Section::$section, doc: concat!($($doc),+), ..$row };)+)+

        /// All of them, in order.
        pub const SETTINGS: &[&Setting] = &[$($(&$name),+),+];
    };
}

settings! {
    Model {
        /// The model: a hub id (`owner/repository:Q4_K_M` for a GGUF file in it), a folder, a GGUF file, or `demo` (the demo model inside this binary).
        /// Several are served together: by commas, as a JSON list, or by repeating the flag. Requests name one; without a name the first answers.
        MODEL = Setting::new(Kind::Models, Text(defaults::MODEL))
            .also(&["MODEL_NAME", "MODEL_REPO"])
            .form(Form::new("Model",
                "Hub id of a text model of a family that is served (ERNIE 4.5, Llama, Qwen, Gemma, Mistral and more: docs/models.md), a folder or GGUF file on the network volume, or demo",
                Input::Model).required());
        /// Branch, tag or commit of the model.
        REVISION = Setting::new(Kind::Text, Text(defaults::REVISION))
            .also(&["MODEL_REVISION"])
            .form(Form::new("Revision", "Branch, tag or commit of the model", Input::Text).filled("").advanced());
        /// A tokenizer from elsewhere: a hub id or a folder.
        TOKENIZER = Setting::new(Kind::Text, Prose("the model's own"))
            .also(&["TOKENIZER_NAME", "TOKENIZER_PATH"])
            .form(Form::new("Tokenizer", "Hub id or folder of another tokenizer", Input::Text).advanced());
        /// Token for gated and private models. Never shown.
        HF_TOKEN = Setting::new(Kind::Text, Prose("the token stored in the hub's home folder"))
            .also(&["HUGGING_FACE_HUB_TOKEN"])
            .secret()
            .form(Form::new("Hugging Face token", "For gated and private models; better set as a secret", Input::Text));
        /// The model hub's address.
        HF_ENDPOINT = Setting::new(Kind::Url, Text(defaults::HF_ENDPOINT));
        /// Use no network: only what is on disk.
        HF_HUB_OFFLINE = Setting::switch(false).also(&["TRANSFORMERS_OFFLINE"]);
        /// Where downloads go, before every other cache.
        DOWNLOAD_DIR = Setting::text();
        /// The hub's cache folder.
        HF_HUB_CACHE = Setting::new(Kind::Text, Text("$HF_HOME/hub")).also(&["HUGGINGFACE_HUB_CACHE"]);
        /// The hub's home folder; its cache is `hub` inside it.
        HF_HOME = Setting::new(Kind::Text, Text("~/.cache/huggingface"));
        /// Folder looked at first: `{LOCAL_MODEL_ROOT}/{last part of the model's id}`.
        LOCAL_MODEL_ROOT = Setting::new(Kind::Text, Text(defaults::LOCAL_MODEL_ROOT));
        /// The network volume; models that the platform caches lie in `huggingface-cache/hub` on it.
        BASE_PATH = Setting::new(Kind::Text, Text(defaults::BASE_PATH));
    }
    Engine {
        /// `auto`, `cpu`, `cuda` or `cuda:N`.
        DEVICE = Setting::new(Kind::Device,
            Prose("auto: the first GPU in a CUDA build, else the CPU; a queue worker of a CUDA build does not start without a GPU"));
        /// What computes: `auto`, kernels of our own (on a GPU where they have every operation of the model, and pass a check at the start), or
        /// `candle`, candle's operations one by one, which are slower.
        KERNELS = Setting::new(Kind::OneOf(&["auto", "candle"]), Text("auto"));
        /// Devices that compute the model together, each with a part of every layer: a number, or `auto` for all GPUs from `DEVICE` on (1 on the
        /// CPU). It must divide the heads and the inner columns of the model; what does not fit is refused with the numbers that do. On the CPU
        /// each such rank takes its part of `THREADS`, which is for tests and for processors with memories of their own, and slower elsewhere.
        /// More than 1: one model, and no prepared copy.
        TENSOR_PARALLEL_SIZE = Setting::new(Kind::Ranks, Count(1))
            .form(Form::new("GPUs per model", "GPUs that compute the model together; auto = all of the worker", Input::Text).filled("1").advanced());
        /// CPU threads that compute.
        THREADS = Setting::new(Kind::Count { least: 1, auto: AUTO_OR_ZERO }, Prose("auto: all cores")).also(&["RAYON_NUM_THREADS"]);
        /// Bits a weight: `BF16` keeps the weights as stored (those of a quantized checkpoint at 8 bits), `unquantized` widens a quantized
        /// checkpoint to 16 or 32 bits, `wint8` holds every matrix at 8 bits, `wint4` the layers at 4 bits, embedding and output at
        /// 8. Where candle's operations compute on a GPU (`KERNELS`), 8 and 4 bits only on the architecture that the build was made for.
        QUANTIZATION = Setting::new(Kind::Quantization, Prose("BF16: as stored"))
            .form(Form::new("Quantization",
                "Bits a weight is held at; quantized while it is read",
                Input::Options(&[("As stored", "BF16"), ("8 bits (wint8)", "wint8"), ("4 bits (wint4), embedding and output at 8", "wint4")]))
                .filled("BF16"));
        /// Where a CPU worker keeps the weights in the form in which it computes with them, so that the next start maps them instead of
        /// converting the model again: `auto` beside the model's files, a folder, or `off`. Written once in the background after the first
        /// start (models below 32 MB are not); about as large as the weights in memory.
        PREPARED_CACHE = Setting::new(Kind::Text, Text("auto"));
        /// What activations are: `auto`, or `bfloat16`, which rounds them to bf16 where they meet unquantized bf16 weights, on a CPU that
        /// multiplies bf16 faster (AMD's AVX512-BF16, AMX). Prompts are computed faster then, a little less exactly.
        DTYPE = Setting::new(Kind::OneOf(&["auto", "bfloat16", "bf16"]), Prose("auto: f32 on the CPU, bf16 on a GPU"));
        /// What the model is for: `generate` text, `embed` texts, `score` pairs of texts, or `auto`, what its files say. `RUNNER` and
        /// `CONVERT` are vLLM's newer names for parts of it.
        TASK = Setting::new(Kind::OneOf(&["auto", "generate", "embed", "embedding", "score", "classify"]), Text("auto"))
            .form(Form::new("Task",
                "What the model is for; auto = what its files say",
                Input::Options(&[("auto", "auto"), ("generate text", "generate"), ("embed texts", "embed"), ("score pairs of texts", "score")]))
                .advanced());
        /// `generate`, `pooling` (embeds or scores), or `auto`. `TASK` comes first.
        RUNNER = Setting::new(Kind::OneOf(&["auto", "generate", "pooling"]), Text("auto"));
        /// `embed`, `classify` (scores pairs of texts), `none` or `auto`. `TASK` comes first.
        CONVERT = Setting::new(Kind::OneOf(&["auto", "none", "embed", "classify"]), Text("auto"));
        /// How a model that embeds or scores makes one result of a text, as JSON over what its files say: `pooling_type` (`CLS`, `MEAN`,
        /// `LAST`), `normalize` (vectors to length 1) or `use_activation` (scores to their sigmoid), `is_matryoshka`,
        /// `matryoshka_dimensions`.
        POOLER_CONFIG = Setting::new(Kind::Object, Prose("what the model's files say"))
            .also(&["OVERRIDE_POOLER_CONFIG"])
            .form(Form::new("Pooling", "How an embedding model pools, as JSON: {\"pooling_type\":\"MEAN\",\"normalize\":true}; empty = as its files say", Input::Text).advanced());
        /// Longest sequence, prompt and output together (`4096`, `4k` = 4000, `4K` = 4096).
        MAX_MODEL_LEN = Setting::new(Kind::Count { least: 2, auto: AUTO_OR_MINUS_ONE }, Prose("auto: the model's, bounded by memory"))
            .also(&["CONTEXT_LENGTH"])
            .form(Form::new("Context length",
                "Longest sequence, prompt and output together; auto = the model's, bounded by memory",
                Input::Text));
        /// Most sequences in one step.
        MAX_NUM_SEQS = Setting::new(COUNT,
            Computed(|| format!("auto: {} on the CPU, up to {} on a GPU", defaults::CPU_SEQS, defaults::GPU_SEQS)))
            .also(&["MAX_RUNNING_REQUESTS"])
            .form(Form::new("Sequences per step", "Most sequences computed together; auto = as memory allows", Input::Text));
        /// Most tokens in one step; longer prompts are computed in pieces. 0 = unset.
        MAX_NUM_BATCHED_TOKENS = Setting::new(Kind::Count { least: 1, auto: AUTO_OR_ZERO },
            Computed(|| format!("auto: {} on the CPU, {} on a GPU", defaults::CPU_BATCHED_TOKENS, defaults::GPU_BATCHED_TOKENS)))
            .also(&["CHUNKED_PREFILL_SIZE"])
            .form(Form::new("Tokens per step",
                "Most tokens in one step; 0 = auto",
                Input::Number { least: 0.0, most: None }).filled("0").advanced());
        /// Tokens in one block of the KV cache: 16, 32, 48 or 64.
        BLOCK_SIZE = Setting::new(Kind::CountOf { of: &[16, 32, 48, 64], auto: AUTO }, Count(defaults::BLOCK_SIZE))
            .form(Form::new("Block size",
                "Tokens per block of the KV cache",
                Input::Options(&[("16", "16"), ("32", "32"), ("48", "48"), ("64", "64")])).advanced());
        /// Blocks in the KV cache, instead of what memory allows. Of several models each has so many.
        NUM_GPU_BLOCKS_OVERRIDE = Setting::new(COUNT, Prose("what memory allows"));
        /// Memory for the KV cache, in GiB; of several models for all of them together, of several GPUs on each. `auto` takes no more than `MAX_NUM_SEQS` sequences
        /// can use.
        KV_CACHE_GB = Setting::new(Kind::Number { range: Range::Positive, auto: AUTO },
            Computed(|| {
                let percent = defaults::CPU_KV_SHARE * 100.0;
                format!("auto: {percent} % of what is free beside the weights on a CPU, what GPU_MEMORY_UTILIZATION leaves on a GPU")
            }));
        /// What the keys and values of earlier tokens are held in: `auto`, `float32`, `float16`, `bfloat16`, or `int8` (on a CPU: a scale for
        /// each 32 numbers). Narrower types hold two to almost four times as many tokens of context in the same memory, and long contexts are
        /// read faster; what that does to answers is measured in `docs/quantization.md`.
        KV_CACHE_DTYPE = Setting::new(Kind::KvCacheDtype, Prose("auto: float32 on a CPU, bfloat16 on a GPU"))
            .form(Form::new("KV cache type",
                "What earlier tokens' keys and values are held in; narrower types hold more context in the same memory",
                Input::Options(&[("auto", "auto"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("int8 (CPU)", "int8")]))
                .filled("auto").advanced());
        /// Memory for the KV cache, in bytes (`KV_CACHE_GB` comes first).
        KV_CACHE_MEMORY_BYTES = Setting::new(COUNT, Text("auto"));
        /// Share of the GPU's memory that may be used, above 0 and at most 1. Without effect on a CPU: see `KV_CACHE_GB`.
        GPU_MEMORY_UTILIZATION = Setting::new(Kind::Number { range: Range::Share, auto: AUTO }, Number(defaults::GPU_UTILIZATION))
            .also(&["MEM_FRACTION_STATIC"])
            .form(Form::new("GPU memory share",
                "Share of the GPU's memory that may be used",
                Input::Number { least: 0.1, most: Some(1.0) }).advanced());
        /// Keep the keys and values of earlier tokens, so that what begins the same is not computed again. `false`: not even for the
        /// choices of one prompt.
        ENABLE_PREFIX_CACHING = Setting::switch(true)
            .form(Form::new("Prefix cache", "Keep what earlier requests computed of the same beginnings", Input::Switch).advanced());
        /// The opposite of `ENABLE_PREFIX_CACHING`, which comes first.
        DISABLE_RADIX_CACHE = Setting::switch(false);
        /// Speculation by prompt lookup, as JSON: `{"method":"ngram","num_speculative_tokens":5}`; further keys `prompt_lookup_max`,
        /// `prompt_lookup_min`, `disable_by_batch_size`.
        SPECULATIVE_CONFIG = Setting::new(Kind::Speculative, Prose("none: off"))
            .form(Form::new("Speculation",
                "Guess tokens from the prompt, as JSON: {\"method\":\"ngram\",\"num_speculative_tokens\":5}; empty = off",
                Input::Text).advanced());
        /// Sequences that may wait for a place; beyond it requests are refused with 429. One that asks for more than MAX_NUM_SEQS and
        /// this together (prompts times `n`) is refused with 400.
        MAX_WAITING = Setting::new(COUNT, Count(defaults::MAX_WAITING)).also(&["SCHEDULER_MAX_SIZE"]);
        /// Seconds a request may take in all. 0 = no limit.
        REQUEST_TIMEOUT = Setting::new(SECONDS, Seconds(defaults::REQUEST_TIMEOUT))
            .form(Form::new("Request time limit",
                "Seconds a request may take in all; 0 = no limit",
                Input::Number { least: 0.0, most: None }).advanced());
        /// Base of the random seeds of requests that bring none.
        SEED = Setting::new(Kind::Seed, Prose("random"))
            .also(&["RANDOM_SEED"])
            .form(Form::new("Seed", "Base of the seeds of requests that bring none; empty = random", Input::Text).advanced());
    }
    Api {
        /// Names under which clients may ask for the model; several by spaces, commas, as a JSON list, or by repeating the flag. Answers
        /// carry the first. Of several models each has one, in the order of `MODEL`.
        SERVED_MODEL_NAME = Setting::new(Kind::List, Prose("the model's id"))
            .also(&["OPENAI_SERVED_MODEL_NAME_OVERRIDE"])
            .form(Form::new("Served model name", "Name under which clients ask for the model; several by commas", Input::Text));
        /// Accept any model name in requests.
        ANY_MODEL_NAME = Setting::switch(false);
        /// Read the names of special tokens in user text as control tokens. Lets users write turns of others.
        ALLOW_SPECIAL_TOKENS = Setting::switch(false);
        /// Chat template instead of the model's own: Jinja text or a file.
        CHAT_TEMPLATE = Setting::new(Kind::Template, Prose("the model's own"))
            .also(&["CUSTOM_CHAT_TEMPLATE"])
            .form(Form::new("Chat template", "Jinja text or a file, instead of the model's own", Input::Text).advanced());
        /// Allow requests to bring a chat template.
        TRUST_REQUEST_CHAT_TEMPLATE = Setting::switch(false)
            .form(Form::new("Allow templates in requests", "Let requests bring their own chat template", Input::Switch).advanced());
        /// How contents of messages reach the chat template: `string` (text parts joined by a newline), `openai` (lists of parts), or
        /// `auto`, what the template takes.
        CHAT_TEMPLATE_CONTENT_FORMAT = Setting::new(Kind::OneOf(&["auto", "string", "openai"]), Text("auto"));
        /// Leave the tools of a request with `tool_choice: "none"` out of the prompt.
        EXCLUDE_TOOLS_WHEN_TOOL_CHOICE_NONE = Setting::switch(false);
        /// How the model writes tool calls: a parser's name as in vLLM (`hermes`, `llama3_json`, `mistral`: docs/tools-and-reasoning.md),
        /// `none` to leave them in the text, or `auto`, what the chat template shows.
        TOOL_CALL_PARSER = Setting::new(Kind::Text, Text("auto"))
            .form(Form::new("Tool call parser", "How the model writes tool calls; empty = what its chat template shows", Input::Text).filled("").advanced());
        /// Take requests with tools that the model may call or not. `--no-enable-auto-tool-choice`, also in a file or in VLLM_EXTRA_ARGS:
        /// refuse them, as vLLM does without this. `false` as a variable refuses nothing: the vLLM worker's form sends it unasked.
        ENABLE_AUTO_TOOL_CHOICE = Setting::switch(true);
        /// How the model marks its thoughts: a parser's name as in vLLM (`qwen3`, `deepseek_r1`, `granite`: docs/tools-and-reasoning.md),
        /// `none` to leave them in the text, or `auto`, what the chat template shows.
        REASONING_PARSER = Setting::new(Kind::Text, Text("auto"))
            .form(Form::new("Reasoning parser", "How the model marks its thoughts; empty = what its chat template shows", Input::Text).filled("").advanced());
        /// The field of thoughts in answers: `reasoning_content`, `reasoning` or `both`.
        REASONING_FIELD = Setting::new(Kind::OneOf(&["both", "reasoning_content", "reasoning"]), Text("both"));
        /// Role of the answers.
        RESPONSE_ROLE = Setting::new(Kind::Text, Text(defaults::RESPONSE_ROLE)).also(&["OPENAI_RESPONSE_ROLE"]);
        /// `auto`: sampling defaults from the model's generation_config.json; `vllm`: none.
        GENERATION_CONFIG = Setting::new(Kind::OneOf(&["auto", "vllm"]), Text("auto"));
        /// JSON object laid over the model's generation_config.json.
        OVERRIDE_GENERATION_CONFIG = Setting::new(Kind::Object, Nothing)
            .form(Form::new("Sampling defaults", "JSON object laid over the model's generation_config.json", Input::Text).advanced());
        /// Output tokens of a request that gives no limit.
        DEFAULT_MAX_TOKENS = Setting::new(COUNT,
            Computed(|| format!("rest of the context; {} on /v1/completions", defaults::COMPLETION_MAX_TOKENS)))
            .form(Form::new("Default output tokens",
                "Output tokens of a request that gives no limit; empty = rest of the context",
                Input::Text).advanced());
        /// Most choices (`n`) in one request.
        MAX_N = Setting::new(COUNT, Count(defaults::MAX_N));
        /// Most messages in one chat.
        MAX_MESSAGES = Setting::new(COUNT, Prose("none: as many as fit the context"));
        /// Most tools in one request.
        MAX_TOOLS = Setting::new(COUNT, Count(defaults::MAX_TOOLS));
        /// Most stop strings in one request.
        MAX_STOP_STRINGS = Setting::new(COUNT, Count(defaults::MAX_STOP_STRINGS));
        /// Most lists and objects within each other in a request's JSON, from 4 to 127.
        MAX_JSON_DEPTH = Setting::new(Kind::Count { least: 4, auto: AUTO }, Count(defaults::MAX_JSON_DEPTH));
        /// Answer requests for log probabilities; `false`: refuse them.
        ENABLE_LOGPROB = Setting::switch(true);
        /// Most alternatives at each token that a request for log probabilities may ask for; -1 = the whole vocabulary.
        MAX_LOGPROBS = Setting::new(Kind::CountOrAll, Count(defaults::MAX_LOGPROBS as usize)).with_hyphen();
        /// What is reported: `raw_logprobs`, `raw_logits`, `processed_logprobs` or `processed_logits` (after bias, penalties and
        /// temperature).
        LOGPROBS_MODE = Setting::new(Kind::OneOf(&["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]),
            Text("raw_logprobs"));
        /// Write tokens in log probabilities as `token_id:N`.
        RETURN_TOKENS_AS_TOKEN_IDS = Setting::switch(false);
        /// Answers to native jobs: `openai` objects, or the older `tokens` form.
        NATIVE_OUTPUT_FORMAT = Setting::new(Kind::OneOf(&["openai", "tokens"]), Text("openai"))
            .form(Form::new("Native output format",
                "Answers to jobs that do not come through the OpenAI path",
                Input::Options(&[("OpenAI objects", "openai"), ("Lists of tokens (older workers)", "tokens")])).advanced());
        /// Answer as FastDeploy's own server does where the two differ: `arrival_time` in chunks, its names of token ids and texts beside
        /// vLLM's, temperatures above 2.
        FASTDEPLOY_COMPATIBLE = Setting::switch(false)
            .form(Form::new("FastDeploy's form",
                "arrival_time in chunks, FastDeploy's names of token ids, temperatures above 2",
                Input::Switch).advanced());
        /// Send usage in every stream, asked for or not.
        ENABLE_FORCE_INCLUDE_USAGE = Setting::switch(false);
        /// Tell in `usage.prompt_tokens_details` how many prompt tokens came from the prefix cache.
        ENABLE_PROMPT_TOKENS_DETAILS = Setting::switch(true);
        /// Keep what `/v1/responses` answers, in memory, so that `previous_response_id` and `GET /v1/responses/{id}` find it. Of several
        /// workers behind one address each has its own.
        RESPONSES_STORE = Setting::new(Kind::Switch, Prose("true; false in a queue worker, as the next job may reach another one"))
            .also(&["VLLM_ENABLE_RESPONSES_API_STORE"]);
        /// Responses that are kept at most; the oldest go first.
        RESPONSES_STORE_ENTRIES = Setting::new(COUNT, Count(defaults::RESPONSES_STORE_ENTRIES));
        /// Memory for responses that are kept, in MiB.
        RESPONSES_STORE_MB = Setting::new(COUNT, Count(defaults::RESPONSES_STORE_MB));
        /// Seconds for which a response is kept.
        RESPONSES_STORE_TTL = Setting::new(SECONDS, Seconds(defaults::RESPONSES_STORE_TTL));
    }
    Queue {
        /// Jobs taken at once from the queue; never more than MAX_NUM_SEQS and MAX_WAITING together.
        MAX_CONCURRENCY = Setting::new(COUNT,
            Computed(|| format!("auto: MAX_NUM_SEQS and 1/{} more", defaults::SEQS_PER_WAITING_JOB)))
            .form(Form::new("Jobs at once",
                "Jobs that one worker takes at once; auto = the sequences per step and an eighth more",
                Input::Text));
        /// Seconds that SIGTERM waits for running requests.
        DRAIN_TIMEOUT = Setting::new(SECONDS, Seconds(defaults::DRAIN_TIMEOUT))
            .also(&["TIMEOUT_GRACEFUL_SHUTDOWN"]);
        /// Least milliseconds between two stream posts of one job. The first goes at once.
        STREAM_INTERVAL_MS = Setting::new(Kind::Count { least: 0, auto: AUTO }, Milliseconds(defaults::STREAM_INTERVAL));
        /// Most tokens gathered for one stream post, instead of by time.
        DEFAULT_BATCH_SIZE = Setting::new(Kind::Count { least: 1, auto: &[] },
            Computed(|| format!("by time; {} when another of these is set", defaults::BATCH_GROWTH.max)))
            .also(&["MAX_BATCH_SIZE"])
            .form(Form::new("Tokens per stream post, most",
                "Gather stream posts by tokens instead of by time; empty = by time",
                Input::Text).advanced());
        /// Tokens in the first stream post when gathering by tokens.
        DEFAULT_MIN_BATCH_SIZE = Setting::new(Kind::Count { least: 1, auto: &[] }, Count(defaults::BATCH_GROWTH.min))
            .also(&["MIN_BATCH_SIZE"])
            .form(Form::new("Tokens per stream post, first",
                "Tokens in the first stream post when gathering by tokens",
                Input::Text).filled("").advanced());
        /// Factor by which stream posts grow when gathering by tokens.
        DEFAULT_BATCH_SIZE_GROWTH_FACTOR = Setting::new(Kind::Number { range: Range::Positive, auto: &[] },
            Number(defaults::BATCH_GROWTH.growth))
            .also(&["BATCH_SIZE_GROWTH_FACTOR", "BATCH_GROWTH_FACTOR"])
            .form(Form::new("Growth of stream posts",
                "Factor by which stream posts grow when gathering by tokens",
                Input::Text).filled("").advanced());
    }
    Platform {
        /// URL template to take jobs from. Its presence makes this process a queue worker.
        RUNPOD_WEBHOOK_GET_JOB = Setting::text();
        /// URL template for results.
        RUNPOD_WEBHOOK_POST_OUTPUT = Setting::text();
        /// URL template for stream chunks.
        RUNPOD_WEBHOOK_POST_STREAM = Setting::text();
        /// URL template of the heartbeat.
        RUNPOD_WEBHOOK_PING = Setting::text();
        /// Milliseconds between heartbeats.
        RUNPOD_PING_INTERVAL = Setting::new(Kind::Count { least: 1, auto: &[] }, Milliseconds(defaults::PING_INTERVAL));
        /// The worker's key to the platform. Never shown.
        RUNPOD_AI_API_KEY = Setting::text().secret();
        /// The worker's id.
        RUNPOD_POD_ID = Setting::new(Kind::Text, Prose("HOSTNAME, else random"));
        /// Put into the platform's URLs.
        RUNPOD_GPU_TYPE_ID = Setting::text();
        /// The endpoint's id. Its presence switches logs to JSON.
        RUNPOD_ENDPOINT_ID = Setting::text();
        /// Version told to the platform.
        RUNPOD_REPORTED_VERSION = Setting::new(Kind::Text, Prose("this program's version"));
        /// User agent towards the platform.
        RUNPOD_USER_AGENT = Setting::new(Kind::Text, Prose("this program's name and version"));
        /// Added to the user agent.
        RUNPOD_UA_INTEGRATION = Setting::text();
    }
    Server {
        /// Address to listen on.
        HOST = Setting::new(Kind::Text,
            Computed(|| format!("{} for `serve` and `gateway`, else {}", defaults::LAPTOP_HOST, defaults::PLATFORM_HOST)))
            .also(&["RP_API_HOST"]);
        /// Port to listen on. Set and with neither a queue nor a test input, it starts `http`.
        PORT = Setting::new(Kind::Port,
            Computed(|| format!("{} for `serve` and `gateway`, else {}", defaults::LAPTOP_PORT, defaults::PLATFORM_PORT)))
            .also(&["RP_API_PORT"]);
        /// A second port for the health checks.
        PORT_HEALTH = Setting::new(Kind::Port, Prose("PORT"));
        /// Path of the health check.
        HEALTH_CHECK_PATH = Setting::new(Kind::UrlPath, Text(defaults::HEALTH_PATH));
        /// Keys that clients must show; several by commas, or by repeating the flag. Never shown.
        API_KEY = Setting::new(Kind::Keys, Prose("none: open")).also(&["API_KEYS", "FD_API_KEY", "VLLM_API_KEY"]).secret();
        /// A file with such keys, one a line.
        API_KEY_FILE = Setting::text();
        /// A YAML or JSON file of clients' keys, each with a name and limits; read again when it changes (docs/api.md). For `http` and
        /// `serve`.
        API_KEYS_FILE = Setting::text();
        /// A PEM file with the server's certificate and those between it and its root: with it `http`, `serve` and `gateway` speak TLS on
        /// PORT, and nothing else. PORT_HEALTH stays plain HTTP.
        SSL_CERTFILE = Setting::text();
        /// A PEM file with the private key of that certificate, without a password.
        SSL_KEYFILE = Setting::new(Kind::Text, Prose("SSL_CERTFILE, which then holds the key too"));
        /// Read both files again when they change, for the connections that come then.
        ENABLE_SSL_REFRESH = Setting::switch(false);
        /// Origins that browsers may call from; several by commas or as a JSON list.
        ALLOWED_ORIGINS = Setting::new(Kind::List, Text("*"));
        /// Seconds that the head of a request may take; then its connection is closed. 0 = no limit.
        HEADER_TIMEOUT = Setting::new(SECONDS, Seconds(defaults::HEADER_TIMEOUT));
        /// Seconds that a connection is kept open between two requests. 0 = no limit.
        KEEP_ALIVE_TIMEOUT = Setting::new(SECONDS, Seconds(defaults::KEEP_ALIVE_TIMEOUT))
            .also(&["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]);
        /// Connections at once. A new one takes the place of the one that is silent longest; while all are busy, only health checks are
        /// answered.
        MAX_CONNECTIONS = Setting::new(Kind::Count { least: 1, auto: AUTO_OR_MINUS_ONE },
            Prose("auto: half of the open files that the system allows"))
            .also(&["FD_SUPPORT_MAX_CONNECTIONS"]);
        /// Answer failed OpenAI calls through the local endpoint with 500, as the cloud is reported to do.
        CLOUD_ERRORS = Setting::switch(false);
        /// Begins every name at `/metrics`. `vllm:` makes them vLLM's, for dashboards and autoscalers that know those.
        METRICS_PREFIX = Setting::new(Kind::MetricsPrefix, Text(defaults::METRICS_PREFIX));
    }
    General {
        /// No line of the engine's figures in the log (otherwise one every 10 s of work).
        DISABLE_LOG_STATS = Setting::switch(false);
        /// `trace`, `debug`, `info`, `warn`, `error` or `notset` (silent).
        LOG_LEVEL = Setting::new(Kind::OneOf(&["trace", "debug", "info", "warn", "warning", "error", "critical", "fatal", "notset", "off"]),
            Text("info"))
            .also(&["RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL", "RP_LOG_LEVEL", "UVICORN_LOG_LEVEL"])
            .form(Form::new("Log level",
                "How much is logged",
                Input::Options(&[("debug", "debug"), ("info", "info"), ("warn", "warn"), ("error", "error")])).advanced());
        /// YAML file with settings: keys are flag names.
        VLLM_CONFIG_FILE = Setting::new(Kind::Text, Computed(|| format!("{}, if it is there", defaults::CONFIG_FILE))).also(&["CONFIG"]);
        /// Flags, split as a shell would; stronger than the environment.
        VLLM_EXTRA_ARGS = Setting::text().with_hyphen().hidden();
    }
    System {
        /// The worker's id where the platform gives none.
        HOSTNAME = Setting::text();
        /// Base of the default cache folder.
        XDG_CACHE_HOME = Setting::new(Kind::Text, Text("~/.cache"));
        /// Base of the default cache folder's base.
        HOME = Setting::text();
    }
}
