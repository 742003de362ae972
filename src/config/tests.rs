use std::collections::BTreeSet;

use proptest::prelude::*;

use super::policy::{self, Verdict};
use super::*;

fn args(line: &[&str]) -> Args {
    Args::parse_argv(std::iter::once("worker-candle").chain(line.iter().copied())).unwrap_or_else(|error| panic!("{error}"))
}

fn resolve(line: &[&str], variables: &[(&str, &str)]) -> Result<Settings, Vec<ConfigError>> {
    Settings::resolve(&args(line), &ConfigSources::of(variables))
}

fn env(variables: &[(&str, &str)]) -> Settings {
    resolve(&[], variables).unwrap_or_else(|mistakes| panic!("{mistakes:?}"))
}

fn mistakes(variables: &[(&str, &str)]) -> Vec<String> {
    resolve(&[], variables).expect_err("mistakes").iter().map(ToString::to_string).collect()
}

#[test]
fn defaults() {
    let settings = env(&[("HOME", "/home/me"), ("PATH", "/bin")]);
    assert_eq!(settings.model, "baidu/ERNIE-4.5-0.3B-Paddle");
    assert!(settings.api.served_names.is_empty());
    assert_eq!(settings.hub.caches, ["/home/me/.cache/huggingface/hub", "/runpod-volume/huggingface-cache/hub"].map(PathBuf::from));
    assert_eq!(settings.hub.local_model_root, Some("/root/PaddlePaddle".into()));
    assert_eq!(settings.engine.device, DeviceChoice::Auto);
    assert_eq!(settings.engine.max_model_len, None);
    assert_eq!(settings.engine.request_timeout, Some(Duration::from_secs(3600)));
    assert_eq!(settings.runpod.batch, None);
    assert!(settings.warnings.is_empty(), "{:?}", settings.warnings);
}

#[test]
fn flags_beat_environment_beats_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.yaml");
    std::fs::write(&file, "max-model-len: 1024\nseed: 1\nserved_model_name: [one, two]\ngpu-memory-utilization: 0.5\n").unwrap();
    let file = file.to_str().unwrap();
    let variables = [("VLLM_CONFIG_FILE", file), ("MAX_MODEL_LEN", "2048"), ("SEED", "2")];
    let settings = resolve(&["--seed", "3"], &variables).unwrap();
    assert_eq!(settings.engine.max_model_len, Some(2048));
    assert_eq!(settings.engine.seed, Some(3));
    assert_eq!(settings.api.seed, Some(3));
    assert_eq!(settings.engine.gpu_memory_utilization, Some(0.5));
    assert_eq!(settings.api.served_names, ["one", "two"]);
    let report = report(&settings);
    assert!(report.contains("SEED = 3  [flag]"), "{report}");
    assert!(report.contains("MAX_MODEL_LEN = 2048  [env MAX_MODEL_LEN]"), "{report}");
    assert!(report.contains(&format!("GPU_MEMORY_UTILIZATION = 0.5  [file {file}]")), "{report}");
    assert!(report.contains("BLOCK_SIZE = 32  [default]"), "{report}");
}

#[test]
fn extra_arguments_beat_the_environment_and_meet_the_policy() {
    let extra = "--max-model-len 4k --served-model-name 'my model' --enforce-eager";
    let settings = env(&[("VLLM_EXTRA_ARGS", extra), ("MAX_MODEL_LEN", "2048")]);
    assert_eq!(settings.engine.max_model_len, Some(4000));
    assert!(settings.warnings.iter().any(|warning| warning.contains("ENFORCE_EAGER")), "{:?}", settings.warnings);
    let found = mistakes(&[("VLLM_EXTRA_ARGS", "--data-parallel-size 4 --no-such-thing 1")]);
    assert!(found[0].starts_with("--data-parallel-size in VLLM_EXTRA_ARGS: a worker has one engine"), "{found:?}");
    assert!(found[1].starts_with("--no-such-thing in VLLM_EXTRA_ARGS: not a setting"), "{found:?}");
    assert!(mistakes(&[("VLLM_EXTRA_ARGS", "--model 'a")])[0].contains("quote"));
}

#[test]
fn a_baked_image_wins_over_the_environment_and_stays_offline() {
    let folder = tempfile::tempdir().unwrap();
    let baked = folder.path().join("local_model_args.json");
    std::fs::write(&baked, r#"{"MODEL_NAME": "/models/mine", "MODEL_REVISION": null, "QUANTIZATION": ""}"#).unwrap();
    let sources = ConfigSources { baked, ..ConfigSources::of(&[("MODEL", "a/b")]) };
    let settings = Settings::resolve(&args(&[]), &sources).unwrap();
    assert_eq!(settings.model, "/models/mine");
    assert!(settings.hub.offline);
    assert_eq!(Settings::resolve(&args(&["--model", "demo"]), &sources).unwrap().model, "demo");
    std::fs::write(&sources.baked, "[]").unwrap();
    assert!(Settings::resolve(&args(&[]), &sources).is_err());
}

#[test]
fn names_and_their_other_spellings() {
    assert_eq!(env(&[("MODEL_NAME", "a/b")]).model, "a/b");
    assert_eq!(env(&[("MODEL_REPO", "c/d"), ("MODEL_NAME", "")]).model, "c/d");
    let both = env(&[("MODEL_NAME", "a/b"), ("MODEL", "c/d")]);
    assert_eq!(both.model, "c/d");
    assert_eq!(both.warnings, ["MODEL_NAME is not used: MODEL says otherwise"]);
    assert!(env(&[("MODEL", "a/b"), ("MODEL_NAME", "a/b")]).warnings.is_empty());
    assert_eq!(env(&[("OPENAI_SERVED_MODEL_NAME_OVERRIDE", "x")]).api.served_names[0], "x");
    assert_eq!(env(&[("RUNPOD_POD_ID", ""), ("HOSTNAME", "box")]).runpod.worker_id.as_deref(), Some("box"));
}

#[test]
fn unset_spellings() {
    let settings =
        env(&[("MAX_MODEL_LEN", "None"), ("REVISION", " "), ("MODEL", ""), ("TENSOR_PARALLEL_SIZE", ""), ("TOOL_CALL_PARSER", "None")]);
    assert_eq!(settings.engine.max_model_len, None);
    assert_eq!(settings.hub.revision, None);
    assert_eq!(settings.model, defaults::MODEL);
    assert_eq!(env(&[("MAX_NUM_BATCHED_TOKENS", "0")]).engine.max_num_batched_tokens, None);
    assert_eq!(env(&[("MAX_MODEL_LEN", "auto")]).engine.max_model_len, None);
}

#[test]
fn limits_that_no_request_could_pass_are_refused() {
    let one = mistakes(&[("MAX_MODEL_LEN", "1")]);
    assert!(one.len() == 1 && one[0].starts_with("MAX_MODEL_LEN: ") && one[0].contains("at least 2"), "{one:?}");
    assert_eq!(env(&[("MAX_MODEL_LEN", "2")]).engine.max_model_len, Some(2));
    let both = mistakes(&[("MAX_NUM_SEQS", "32"), ("CHUNKED_PREFILL_SIZE", "16")]);
    assert!(both.len() == 1 && both[0].starts_with("CHUNKED_PREFILL_SIZE: 16 is less than MAX_NUM_SEQS=32"), "{both:?}");
    for fine in [[("MAX_NUM_SEQS", "32"), ("MAX_NUM_BATCHED_TOKENS", "32")], [("MAX_NUM_SEQS", "auto"), ("MAX_NUM_BATCHED_TOKENS", "4")]] {
        env(&fine);
    }
}

#[test]
fn all_mistakes_at_once_under_the_names_typed() {
    let found = mistakes(&[
        ("CONTEXT_LENGTH", "many"),
        ("BLOCK_SIZE", "17"),
        ("GPU_MEMORY_UTILIZATION", "1.5"),
        ("ANY_MODEL_NAME", "perhaps"),
        ("OVERRIDE_GENERATION_CONFIG", "[1]"),
        ("QUANTIZATION", "wint2"),
        ("PORT", "123456"),
        ("DEVICE", "tpu"),
        ("LOG_LEVEL", "loud"),
        ("HF_ENDPOINT", "hub.local"),
        ("CHAT_TEMPLATE", "/no/such/template.jinja"),
        ("VLLM_CONFIG_FILE", "/no/such/file.yaml"),
        ("HEALTH_CHECK_PATH", "ping"),
        ("SEED", "-1"),
        ("API_KEY_FILE", "/no/such/keys"),
        ("DEFAULT_BATCH_SIZE", "0"),
    ]);
    for name in [
        "CONTEXT_LENGTH",
        "BLOCK_SIZE",
        "GPU_MEMORY_UTILIZATION",
        "ANY_MODEL_NAME",
        "OVERRIDE_GENERATION_CONFIG",
        "QUANTIZATION",
        "PORT",
        "DEVICE",
        "LOG_LEVEL",
        "HF_ENDPOINT",
        "CHAT_TEMPLATE",
        "VLLM_CONFIG_FILE",
        "HEALTH_CHECK_PATH",
        "SEED",
        "API_KEY_FILE",
        "DEFAULT_BATCH_SIZE",
    ] {
        assert!(found.iter().any(|mistake| mistake.starts_with(&format!("{name}: "))), "{name} in {found:?}");
    }
    let flag = resolve(&["--max-model-len", "many"], &[]).expect_err("a mistake");
    assert_eq!(flag[0].name, "--max-model-len");
}

#[test]
fn refused_unless_it_asks_for_what_happens_anyway() {
    let harmless = [("DATA_PARALLEL_SIZE", "1"), ("ENABLE_LORA", "No"), ("GUIDED_DECODING_BACKEND", "off")];
    assert!(env(&harmless).warnings.is_empty());
    for (name, value) in [
        ("DATA_PARALLEL_SIZE", "2"),
        ("TENSOR_PARALLEL_SIZE", "0"),
        ("TENSOR_PARALLEL_SIZE", "many"),
        ("ENABLE_LORA", "true"),
        ("SPECULATIVE_CONFIG", r#"{"method":"mtp","num_speculative_tokens":1}"#),
        ("SPECULATIVE_METHOD", "ngram"),
        ("METRICS_PREFIX", "a-b"),
        ("GUIDED_DECODING_BACKEND", "mine"),
        ("GUIDED_DECODING_DISABLE_ANY_WHITESPACE", "true"),
        ("KV_CACHE_DTYPE", "fp8"),
        ("SSL_KEYFILE", "/key.pem"),
        ("SSL_CERTFILE", "/no/such/certificate.pem"),
        ("SSL_KEYFILE_PASSWORD", "secret"),
        ("SSL_CA_CERTS", "/ca.pem"),
        ("SSL_CERT_REQS", "2"),
    ] {
        let found = mistakes(&[(name, value)]);
        assert!(found.len() == 1 && found[0].starts_with(&format!("{name}: ")), "{found:?}");
    }
}

#[test]
fn a_model_is_divided_as_told() {
    let ranks = |value| env(&[("TENSOR_PARALLEL_SIZE", value)]).engine.tensor_parallel;
    for (value, meant) in [("", TensorParallel::Ranks(1)), ("2", TensorParallel::Ranks(2)), ("Auto", TensorParallel::Auto)] {
        assert_eq!(ranks(value), meant, "{value}");
    }
    let extra = env(&[("VLLM_EXTRA_ARGS", "-tp 4"), ("TENSOR_PARALLEL_SIZE", "2")]);
    assert_eq!(extra.engine.tensor_parallel, TensorParallel::Ranks(4));
    let several = mistakes(&[("MODEL", "a/b,c/d"), ("TENSOR_PARALLEL_SIZE", "auto")]);
    assert!(several.len() == 1 && several[0].starts_with("TENSOR_PARALLEL_SIZE: MODEL names several models"), "{several:?}");
    env(&[("MODEL", "a/b,c/d"), ("TENSOR_PARALLEL_SIZE", "1")]);
}

/// What the reference workers' forms send when nobody touches them.
#[test]
fn their_forms_start_here() {
    let fast_deploy = "MODEL=baidu/ERNIE-4.5-0.3B-Paddle MODEL_REPO=baidu/ERNIE-4.5-0.3B-Paddle MAX_CONCURRENCY=512 MAX_MODEL_LEN=2048 \
        TENSOR_PARALLEL_SIZE=1 DATA_PARALLEL_SIZE=1 BLOCK_SIZE=64 MAX_NUM_SEQS=8 MAX_NUM_BATCHED_TOKENS=2048 TOKENIZER= USE_WARMUP=1 \
        QUANTIZATION=BF16 GPU_MEMORY_UTILIZATION=0.9 KV_CACHE_RATIO=0.75 ENABLE_PREFIX_CACHING=false SWAP_SPACE= \
        ENABLE_CHUNKED_PREFILL=false MAX_NUM_PARTIAL_PREFILLS=1 STATIC_DECODE_BLOCKS=2 REASONING_PARSER= SPLITWISE_ROLE=mixed \
        GUIDED_DECODING_BACKEND=off GUIDED_DECODING_DISABLE_ANY_WHITESPACE=false SPECULATIVE_CONFIG= DYNAMIC_LOAD_WEIGHT=0 \
        ENABLE_EXPERT_PARALLEL=false ENABLE_LOGPROB=false LOGPROBS_MODE= MAX_LOGPROBS=20 LOAD_CHOICES=default MAX_ENCODER_CACHE=0 \
        MAX_PROCESSOR_CACHE=0 API_KEY= ENABLE_V1_KVCACHE_SCHEDULER=1";
    let vllm = "MODEL_NAME=facebook/opt-125m MODEL_REVISION=main TOKENIZER_MODE=auto SKIP_TOKENIZER_INIT=false LOAD_FORMAT=auto \
        TRUST_REMOTE_CODE=false DTYPE=auto KV_CACHE_DTYPE=auto QUANTIZATION=None MAX_MODEL_LEN=auto SEED=0 GPU_MEMORY_UTILIZATION=0.95 \
        TENSOR_PARALLEL_SIZE=1 PIPELINE_PARALLEL_SIZE=1 MAX_NUM_SEQS=256 MAX_NUM_BATCHED_TOKENS=0 BLOCK_SIZE=16 SWAP_SPACE=4 \
        CPU_OFFLOAD_GB=0 ENFORCE_EAGER=false MAX_SEQ_LEN_TO_CAPTURE=8192 ENABLE_PREFIX_CACHING=false DISABLE_SLIDING_WINDOW=false \
        GUIDED_DECODING_BACKEND=outlines ENABLE_LORA=false MAX_LORAS=1 MAX_LORA_RANK=16 LORA_DTYPE=auto LORA_MODULES=[] \
        DEFAULT_BATCH_SIZE=50 DEFAULT_MIN_BATCH_SIZE=1 DEFAULT_BATCH_SIZE_GROWTH_FACTOR=3 RAW_OPENAI_OUTPUT=1 \
        OPENAI_RESPONSE_ROLE=assistant ENABLE_AUTO_TOOL_CHOICE=false MAX_CONCURRENCY=30 DISABLE_LOG_STATS=false DEVICE=auto";
    for form in [fast_deploy, vllm] {
        let pairs: Vec<_> = form.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
        assert!(!env(&pairs).warnings.is_empty());
    }
}

#[test]
fn a_form_does_not_switch_tools_off() {
    let formed = env(&[("ENABLE_AUTO_TOOL_CHOICE", "false")]);
    assert!(!formed.api.refuse_auto_tools && formed.warnings[0].contains("--no-enable-auto-tool-choice"), "{:?}", formed.warnings);
    let extra = env(&[("ENABLE_AUTO_TOOL_CHOICE", "false"), ("VLLM_EXTRA_ARGS", "--no-enable-auto-tool-choice")]);
    assert!(extra.api.refuse_auto_tools && extra.warnings.is_empty(), "{:?}", extra.warnings);
    assert!(!env(&[]).api.refuse_auto_tools);
}

#[test]
fn no_effect_is_said_once_by_reason() {
    let settings = env(&[("SWAP_SPACE", "4"), ("CPU_OFFLOAD_GB", "0"), ("KV_CACHE_RATIO", "0.5")]);
    assert_eq!(settings.warnings.len(), 2, "{:?}", settings.warnings);
    assert!(settings.warnings.iter().any(|warning| warning.starts_with("no effect here: CPU_OFFLOAD_GB, SWAP_SPACE (")));
}

#[test]
fn the_prefix_cache_under_each_name() {
    assert_eq!(env(&[]).engine.prefix_caching, None);
    assert_eq!(env(&[("ENABLE_PREFIX_CACHING", "false")]).engine.prefix_caching, Some(false));
    assert_eq!(env(&[("DISABLE_RADIX_CACHE", "1")]).engine.prefix_caching, Some(false));
    assert_eq!(env(&[("DISABLE_RADIX_CACHE", "1"), ("ENABLE_PREFIX_CACHING", "yes")]).engine.prefix_caching, Some(true));
    let flag = |flag: &str| resolve(&[flag], &[]).expect("settings").engine.prefix_caching;
    assert_eq!((flag("--no-enable-prefix-caching"), flag("--enable-prefix-caching")), (Some(false), Some(true)));
    assert!(mistakes(&[("ENABLE_PREFIX_CACHING", "perhaps")])[0].starts_with("ENABLE_PREFIX_CACHING: "));
    assert!(env(&[("ENABLE_PROMPT_TOKENS_DETAILS", "false")]).api.hide_prompt_tokens_details);
    assert!(!env(&[]).api.hide_prompt_tokens_details);
}

#[test]
fn secrets_are_never_shown() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    std::fs::write(&file, "s3cret-file\n\n").unwrap();
    let variables = [
        ("HF_TOKEN", "s3cret-hub"),
        ("FD_API_KEY", "s3cret-one,s3cret-two"),
        ("API_KEY_FILE", file.to_str().unwrap()),
        ("RUNPOD_AI_API_KEY", "s3cret-runpod"),
        ("HF_ENDPOINT", "https://me:s3cret-url@hub.local"),
        ("VLLM_EXTRA_ARGS", "--seed 1 --hf-token s3cret-extra"),
    ];
    let settings = env(&variables);
    assert_eq!(settings.hub.token.as_ref().map(ExposeSecret::expose_secret), Some("s3cret-extra"));
    let keys: Vec<_> = settings.server.api_keys.iter().map(ExposeSecret::expose_secret).collect();
    assert_eq!(keys, ["s3cret-one", "s3cret-two", "s3cret-file"]);
    let shown = report(&settings);
    assert!(shown.contains("API_KEY = ***  [env FD_API_KEY]"), "{shown}");
    assert!(!shown.contains("s3cret"), "{shown}");
    assert!(!format!("{:?}", settings.given).contains("s3cret"));
    assert!(!format!("{:?} {:?}", settings.hub.token, settings.server).contains("s3cret"));
}

#[test]
fn a_key_file_without_keys_does_not_open_the_door() {
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(mistakes(&[("API_KEY_FILE", file.path().to_str().unwrap())])[0].contains("no key"));
}

#[test]
fn values() {
    let settings = env(&[
        ("DEVICE", "CUDA:1"),
        ("KV_CACHE_MEMORY_BYTES", "1073741824"),
        ("REQUEST_TIMEOUT", "0"),
        ("RUNPOD_PING_INTERVAL", "4000"),
        ("QUANTIZATION", "WINT4"),
        ("DTYPE", "BFloat16"),
        ("MIN_BATCH_SIZE", "2"),
        ("BATCH_GROWTH_FACTOR", "1.3"),
        ("PORT", "8000"),
        ("PORT_HEALTH", "8000"),
        ("ALLOWED_ORIGINS", r#"["https://a.example"]"#),
        ("GENERATION_CONFIG", "vllm"),
        ("NATIVE_OUTPUT_FORMAT", "tokens"),
        ("RUNPOD_UA_INTEGRATION", "mine/1"),
        ("RUNPOD_LOG_LEVEL", "WARN"),
        ("OVERRIDE_GENERATION_CONFIG", r#"{"temperature": 0}"#),
        ("HF_HOME", "~/hf"),
        ("HOME", "/root"),
    ]);
    assert_eq!(settings.engine.device, DeviceChoice::Cuda(1));
    assert_eq!(settings.engine.kv_cache_gb, Some(1.0));
    assert_eq!(settings.engine.request_timeout, None);
    assert_eq!((settings.engine.quantization, settings.engine.bf16_activations), (Quantization::Wint4, true));
    assert!(!env(&[("DTYPE", "auto")]).engine.bf16_activations);
    assert!(mistakes(&[("DTYPE", "float16")])[0].contains("auto, bfloat16, bf16"));
    assert!(!settings.engine.candle_kernels && env(&[("KERNELS", "candle")]).engine.candle_kernels);
    assert!(mistakes(&[("KERNELS", "torch")])[0].contains("auto, candle"));
    assert_eq!(settings.runpod.ping_interval, Duration::from_secs(4));
    assert_eq!(settings.runpod.batch, Some(BatchGrowth { min: 2, growth: 1.3, max: 50 }));
    assert_eq!((settings.server.port, settings.server.health_port), (Some(8000), None));
    assert_eq!(settings.server.allowed_origins, ["https://a.example"]);
    assert!(settings.api.ignore_generation_config);
    assert_eq!(settings.api.native_format, NativeFormat::Tokens);
    assert!(settings.runpod.user_agent.as_ref().is_some_and(|agent| agent.ends_with(" Integration/mine/1")));
    assert_eq!(settings.log.level, LogLevel::Warn);
    assert_eq!(settings.api.override_generation_config.unwrap()["temperature"], 0);
    assert_eq!(settings.hub.caches[0], PathBuf::from("/root/hf/hub"));
}

#[test]
fn configuration_files_in_every_form() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vllm_config.yaml");
    let read = |text: &str| {
        std::fs::write(&file, text).unwrap();
        Settings::resolve(&args(&[]), &ConfigSources { config_file: file.clone(), ..ConfigSources::of(&[]) })
    };
    assert_eq!(read("# nothing\n").unwrap().model, defaults::MODEL);
    let settings =
        read("model: a/b # comment\nenable-lora: false\noverride-generation-config: {temperature: 0.5, stop: [x]}\nrevision: ~\n");
    let settings = settings.unwrap();
    assert_eq!(settings.model, "a/b");
    assert_eq!(settings.api.override_generation_config.unwrap()["temperature"], 0.5);
    assert!(read("enable-lora: true\n").unwrap_err()[0].name.starts_with("ENABLE_LORA in "));
    assert!(read("max-modellen: 1\n").unwrap_err()[0].name.starts_with("MAX_MODELLEN in "));
    for broken in ["a: [", "- a\n- b", "just words", "1: 2", "a: b\n---\nc: d"] {
        assert_eq!(read(broken).unwrap_err()[0].name, "VLLM_CONFIG_FILE", "{broken}");
    }
}

/// Every name stands once, and the data file can be read.
#[test]
fn the_table_is_whole() {
    let names: Vec<_> = policy::entries().map(|(name, _)| name).collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "a name stands in the table twice");
    assert_eq!(names.len(), policy::entries().filter(|(name, _)| policy::find(name).is_some()).count());
    assert!(!policy::NAMES.refused.is_empty() && !policy::NAMES.no_effect.is_empty());
    assert!(table::SETTINGS.iter().all(|setting| !setting.doc.trim().is_empty()));
}

/// Each works under its own name and as a flag: setting it is seen.
#[test]
fn every_working_name_is_read_from_the_environment_and_most_from_flags() {
    let command = Args::clap_command();
    for (name, verdict) in policy::entries() {
        let Verdict::Works(setting) = verdict else { continue };
        let merged = sources::Merged::read(&args(&[]), &ConfigSources::of(&[(name, "x y")]));
        assert!(merged.origins().any(|(given, value, _)| given == name && value == "x y"), "{name}");
        let flag =
            command.get_arguments().any(|argument| argument.get_long().is_some_and(|long| format!("--{long}") == policy::flag(name)));
        assert_eq!(flag, setting.has_flag(), "{name}");
        assert_eq!(flag, !matches!(name, "HOSTNAME" | "HOME" | "XDG_CACHE_HOME"), "{name}");
    }
}

/// A row that nothing reads would be accepted without effect.
#[test]
fn every_row_is_read() {
    let readers = concat!(include_str!("resolve.rs"), include_str!("sources.rs"));
    let words: BTreeSet<_> = readers.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':').collect();
    let unread: Vec<_> = table::SETTINGS.iter().filter(|row| !words.contains(format!("table::{}", row.name).as_str())).collect();
    assert!(unread.is_empty(), "not read: {unread:?}");
}

#[test]
fn the_references_names_are_all_decided() {
    let names = include_str!("reference_names.txt").lines().filter(|line| !line.starts_with('#')).flat_map(str::split_whitespace);
    let missing: BTreeSet<_> = names.filter(|name| policy::find(name).is_none()).collect();
    assert!(missing.is_empty(), "without a verdict: {missing:?}");
}

proptest! {
    /// Whatever the variables hold, resolving ends in settings or in mistakes with names; never in a panic.
    #[test]
    fn resolving_never_panics(values in prop::collection::vec((0usize..512, "\\PC{0,12}"), 0..8)) {
        let names: Vec<_> = policy::entries().map(|(name, _)| name).filter(|name| !name.ends_with("_FILE")).collect();
        let variables: Vec<_> = values.iter().map(|(index, value)| (names[index % names.len()], value.as_str())).collect();
        if let Err(mistakes) = resolve(&[], &variables) {
            prop_assert!(!mistakes.is_empty() && mistakes.iter().all(|mistake| !mistake.name.is_empty()));
        }
    }

    /// A flag and its variable mean the same.
    #[test]
    fn flags_and_variables_agree(length in 1usize..1 << 20, name in "[a-z]{1,8}(/[a-z0-9.-]{1,8})?") {
        let length = length.to_string();
        let flags = resolve(&["--max-model-len", &length, "--model", &name], &[]).unwrap();
        let variables = env(&[("MAX_MODEL_LEN", &length), ("MODEL", &name)]);
        prop_assert_eq!(flags.engine.max_model_len, variables.engine.max_model_len);
        prop_assert_eq!(flags.api.served_names, variables.api.served_names);
        prop_assert_eq!(flags.model, variables.model);
    }
}

#[test]
fn what_the_chat_template_is_given() {
    let api = |pairs: &[(&str, &str)]| env(pairs).api;
    assert_eq!((api(&[]).content_format, api(&[]).exclude_unused_tools), (ContentFormat::Auto, false));
    assert_eq!(api(&[("CHAT_TEMPLATE_CONTENT_FORMAT", "string")]).content_format, ContentFormat::String);
    assert_eq!(api(&[("CHAT_TEMPLATE_CONTENT_FORMAT", "openai")]).content_format, ContentFormat::OpenAi);
    assert!(mistakes(&[("CHAT_TEMPLATE_CONTENT_FORMAT", "parts")])[0].starts_with("CHAT_TEMPLATE_CONTENT_FORMAT: "));
    let flag = |flag: &str| resolve(&[flag], &[]).expect("settings").api.exclude_unused_tools;
    assert!(flag("--exclude-tools-when-tool-choice-none"));
}
