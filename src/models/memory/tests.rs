use serde_json::json;

use super::*;

use crate::kernels::candle::Candle;
use crate::kernels::cpu::Cpu;
use crate::models::families::Model;

const GIB: usize = 1 << 30;
const WEIGHTS: usize = 721_496_064;

fn settings() -> EngineSettings {
    EngineSettings { threads: Some(2), ..Default::default() }
}

fn plan_in(memory: Memory, settings: &EngineSettings) -> Result<MemoryPlan, Failure> {
    plan_beside(memory, settings, None)
}

/// Of ERNIE-4.5-0.3B.
fn plan_beside(memory: Memory, settings: &EngineSettings, share: Option<Share>) -> Result<MemoryPlan, Failure> {
    let config = json!({"model_type": "ernie4_5", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 103424});
    let model = Model::from_config(&config).unwrap().spec;
    let plan = if memory.gpu { MemoryPlan::new::<Candle> } else { MemoryPlan::new::<Cpu> };
    plan(&model, 100_295, WEIGHTS, memory, settings, share)
}

fn plan(settings: &EngineSettings, free: usize) -> Result<MemoryPlan, Failure> {
    plan_in(Memory { gpu: false, total: free, free }, settings)
}

/// The error's text, which holds all of `words`.
fn refused(plan: Result<MemoryPlan, Failure>, words: &[&str]) -> String {
    let message = plan.unwrap_err().message;
    for word in words {
        assert!(message.contains(word), "{word:?} is missing: {message}");
    }
    message
}

#[test]
fn memory_bounds_the_context_unless_it_was_asked_for() {
    let auto = plan(&settings(), 4 * GIB).unwrap();
    assert!(auto.shape.max_model_len < 131_072 && auto.kv_bytes <= GIB && auto.shape.memory_bound, "{auto:?}");
    let asked = |length| EngineSettings { max_model_len: Some(length), ..settings() };
    refused(plan(&asked(131_072), 4 * GIB), &["set KV_CACHE_GB", "lower MAX_MODEL_LEN", "131072", "weights of 688.1 MiB"]);
    refused(plan(&asked(200_000), 64 * GIB), &["MAX_MODEL_LEN=200000"]);
}

#[test]
fn no_more_blocks_than_sequences_can_use() {
    let asked = EngineSettings { max_model_len: Some(100), max_num_seqs: Some(2), ..settings() };
    let auto = plan(&asked, 64 * GIB).unwrap();
    assert_eq!((auto.shape.blocks, auto.shape.max_model_len, auto.shape.memory_bound), (8, 100, false));
    // A size that was given is kept to: the rest holds prefixes.
    let given = plan(&EngineSettings { kv_cache_gb: Some(1.0), ..asked }, 64 * GIB).unwrap();
    assert!(given.kv_bytes <= GIB && given.kv_bytes > GIB - 2 * 32 * given.kv_bytes_per_token, "{given:?}");
}

#[test]
fn narrower_types_hold_more_tokens() {
    let blocks = |kv_cache_dtype| {
        let plan = plan(&EngineSettings { kv_cache_gb: Some(1.0), kv_cache_dtype, ..settings() }, 16 * GIB).unwrap();
        (plan.shape.blocks, plan.shape.kv_cache_dtype, plan.lines().into_iter().find(|line| line.starts_with("KV cache")).unwrap())
    };
    let (all, name, _) = blocks(KvCacheDtype::Auto);
    assert_eq!(name, "float32");
    for (dtype, name, times) in
        [(KvCacheDtype::Float16, "float16", 2.0), (KvCacheDtype::Bfloat16, "bfloat16", 2.0), (KvCacheDtype::Int8, "int8", 3.76)]
    {
        let (more, found, line) = blocks(dtype);
        assert!(found == name && line.ends_with(&format!("bytes per token, {name})")), "{line}");
        assert!((more as f64 / all as f64 - times).abs() < 0.01, "{name}: {more} blocks, {all} of float32");
    }
}

#[test]
fn a_given_number_of_blocks_is_the_pool() {
    let blocks = |blocks| EngineSettings { num_blocks: Some(blocks), ..settings() };
    let two = plan(&blocks(2), 16 * GIB).unwrap();
    assert_eq!((two.shape.blocks, two.shape.max_model_len, two.shape.memory_bound), (2, 64, true));
    assert_eq!(two.kv_bytes, 2 * 32 * 2 * 18 * 2 * 128 * 4);
    assert!(two.warnings.is_empty(), "{:?}", two.warnings);
    // For when it cannot be mapped.
    assert_eq!(two.kv_setting, "NUM_GPU_BLOCKS_OVERRIDE=2");
    assert!(plan(&settings(), 16 * GIB).unwrap().kv_setting.starts_with("KV_CACHE_GB"));
    let message =
        refused(plan(&EngineSettings { max_model_len: Some(65), ..blocks(2) }, 16 * GIB), &["raise NUM_GPU_BLOCKS_OVERRIDE=2", "65"]);
    assert!(!message.contains("KV_CACHE_GB"), "{message}");
    let message =
        refused(plan(&blocks(1_000_000), 16 * GIB), &["NUM_GPU_BLOCKS_OVERRIDE=1000000: a KV cache of ", "at most", "blocks are possible"]);
    assert!(!message.contains("KV_CACHE_GB"), "{message}");
    // The number that is said to be possible is.
    let most = message.split("at most ").nth(1).and_then(|rest| rest.split(' ').next()).and_then(|most| most.parse().ok()).unwrap();
    assert!(plan(&blocks(most), 16 * GIB).is_ok() && plan(&blocks(most + 1), 16 * GIB).is_err(), "{message}");
    for absurd in [u32::MAX as usize, usize::MAX / 1000, usize::MAX] {
        refused(plan(&blocks(absurd), 16 * GIB), &["NUM_GPU_BLOCKS_OVERRIDE", "lower it"]);
    }
}

#[test]
fn a_cache_larger_than_the_machine_is_refused_and_a_tight_one_warned_of() {
    let gb = |gb| EngineSettings { kv_cache_gb: Some(gb), ..settings() };
    refused(
        plan(&gb(64.0), 16 * GIB),
        &["KV_CACHE_GB=64", "65535.8 MiB", "weights of 688.1 MiB", "step buffers of", "16384.0 MiB", "at most 15.3 GiB"],
    );
    refused(plan(&gb(1e11), 16 * GIB), &["KV_CACHE_GB=100000000000", "lower it"]);
    // The cache alone would fit.
    refused(plan(&gb(15.5), 16 * GIB), &["KV_CACHE_GB=15.5", "at most 15.3 GiB"]);
    assert!(plan(&gb(15.3), 16 * GIB).unwrap().warnings.is_empty());
    let busy = Memory { gpu: false, total: 16 * GIB, free: 4 * GIB };
    let tight = plan_in(busy, &gb(8.0)).unwrap().warnings;
    assert!(tight.len() == 1 && tight[0].contains("KV_CACHE_GB=8") && tight[0].contains("4096.0 MiB are free now"), "{tight:?}");
    let blocks = EngineSettings { num_blocks: Some(8 * GIB / (32 * 36_864)), ..settings() };
    let tight = plan_in(busy, &blocks).unwrap().warnings;
    assert!(tight.len() == 1 && tight[0].contains("NUM_GPU_BLOCKS_OVERRIDE="), "{tight:?}");
    assert!(plan_in(busy, &gb(2.0)).unwrap().warnings.is_empty());
    refused(plan(&gb(0.0001), 16 * GIB), &["raise KV_CACHE_GB=0.0001"]);
}

#[test]
fn the_setting_that_takes_the_memory_is_named() {
    let tokens = |tokens| EngineSettings { max_num_batched_tokens: Some(tokens), ..settings() };
    let length = |length, settings| EngineSettings { max_model_len: Some(length), ..settings };
    // 4 GiB would hold this context, were it not for the step buffers.
    assert!(plan(&length(8_192, settings()), 4 * GIB).is_ok());
    let message = refused(plan(&length(8_192, tokens(50_000)), 4 * GIB), &["lower MAX_NUM_BATCHED_TOKENS=50000", "step buffers of"]);
    assert!(!message.contains("KV_CACHE_GB"), "{message}");
    // With this context they are not to blame.
    let message = refused(plan(&length(131_072, tokens(512)), 4 * GIB), &["set KV_CACHE_GB"]);
    assert!(!message.contains("MAX_NUM_BATCHED_TOKENS"), "{message}");
    for absurd in [1_000_000, usize::MAX / 10_000, usize::MAX] {
        refused(
            plan(&tokens(absurd), 16 * GIB),
            &["step buffers", "more than the 16384.0 MiB", &format!("lower MAX_NUM_BATCHED_TOKENS={absurd}")],
        );
        let seqs = EngineSettings { max_num_seqs: Some(absurd), ..settings() };
        refused(plan(&seqs, 16 * GIB), &[&format!("lower MAX_NUM_SEQS={absurd}")]);
        let gpu = Memory { gpu: true, total: 16 * GIB, free: 16 * GIB };
        refused(plan_in(gpu, &tokens(absurd)), &[&format!("lower MAX_NUM_BATCHED_TOKENS={absurd}")]);
    }
    refused(plan(&EngineSettings { threads: Some(usize::MAX), ..settings() }, 16 * GIB), &["lower THREADS="]);
    // A model that is too large by itself.
    refused(plan(&settings(), GIB / 2), &["weights of 688.1 MiB", "QUANTIZATION"]);
    refused(
        plan_in(Memory { gpu: false, total: 16 * GIB, free: GIB / 4 }, &settings()),
        &["256.0 MiB of 16384.0 MiB were free", "set KV_CACHE_GB"],
    );
    let full = Memory { gpu: true, total: 16 * GIB, free: GIB };
    refused(plan_in(full, &EngineSettings { gpu_memory_utilization: Some(0.5), ..settings() }), &["raise GPU_MEMORY_UTILIZATION"]);
}

#[test]
fn the_batch_limit_that_was_not_given_follows() {
    let limits = |seqs, tokens| plan(&EngineSettings { max_num_seqs: seqs, max_num_batched_tokens: tokens, ..settings() }, 16 * GIB);
    for (seqs, tokens, expected, said) in [
        (None, None, (16, 256), ""),
        (Some(8), Some(8), (8, 8), ""),
        (None, Some(64), (16, 64), ""),
        (None, Some(8), (8, 8), "MAX_NUM_SEQS follows MAX_NUM_BATCHED_TOKENS"),
        (Some(300), None, (300, 300), "MAX_NUM_BATCHED_TOKENS follows MAX_NUM_SEQS"),
        (Some(32), None, (32, 256), ""),
    ] {
        let plan = limits(seqs, tokens).unwrap();
        assert_eq!((plan.shape.max_num_seqs, plan.shape.max_num_batched_tokens), expected, "{seqs:?}, {tokens:?}");
        let line = plan.lines().into_iter().find(|line| line.starts_with("limits:")).unwrap();
        assert_eq!(line.contains("follows"), !said.is_empty(), "{line}");
        assert!(line.contains(said), "{line}");
    }
    refused(limits(Some(16), Some(8)), &["MAX_NUM_BATCHED_TOKENS: 8 is less than MAX_NUM_SEQS=16"]);
}

#[test]
fn a_share_of_the_gpu_is_none_of_main_memory() {
    let half = EngineSettings { gpu_memory_utilization: Some(0.5), ..settings() };
    let cpu = plan(&half, 16 * GIB).unwrap();
    assert!(cpu.warnings.len() == 1 && cpu.warnings[0].contains("GPU_MEMORY_UTILIZATION has no effect on a CPU"), "{:?}", cpu.warnings);
    assert_eq!(cpu.shape.blocks, plan(&settings(), 16 * GIB).unwrap().shape.blocks);
    let gpu = plan_in(Memory { gpu: true, total: 16 * GIB, free: 16 * GIB }, &half).unwrap();
    assert!(gpu.warnings.is_empty() && gpu.kv_bytes + WEIGHTS <= 8 * GIB, "{gpu:?}");
}

#[test]
fn every_thread_has_room_to_draw_and_to_attend() {
    let step = |threads| plan(&EngineSettings { threads: Some(threads), ..settings() }, 16 * GIB).unwrap().step_bytes;
    let more = step(3) - step(2);
    // Twelve bytes of a token of the vocabulary, and 32 rows of queries, sums and scores of a segment.
    let (sampling, attend) = (103_424 * 12, 32 * (2 * 128 + 256) * 4);
    assert!(more > sampling + attend && more < (sampling + attend) * 11 / 10, "{more}");
}

#[test]
fn other_models_are_in_the_memory_too() {
    let memory = Memory { gpu: false, total: 16 * GIB, free: 16 * GIB };
    let share = |kv, others_fixed, others_kv| Some(Share { memory, kv, others_fixed, others_kv });
    let auto = plan_beside(memory, &settings(), share(GIB, 4 * GIB, GIB)).unwrap();
    assert!(auto.kv_bytes <= GIB && auto.kv_bytes > GIB - 32 * auto.kv_bytes_per_token && auto.warnings.is_empty(), "{auto:?}");
    let gb = EngineSettings { kv_cache_gb: Some(12.0), ..settings() };
    // Half of 12 GiB would fit beside the others' weights, were it not for the other half.
    let others = share(6 * GIB, 5 * GIB, 6 * GIB);
    let message = refused(plan_beside(memory, &gb, others), &["KV_CACHE_GB=12", "other models of 11264.0 MiB", "at most 10.3 GiB"]);
    assert!(message.contains("weights of 688.1 MiB"), "{message}");
    let tight = plan_beside(Memory { free: 12 * GIB, ..memory }, &gb, share(6 * GIB, GIB, 6 * GIB)).unwrap().warnings;
    assert!(tight.len() == 1 && tight[0].contains("KV_CACHE_GB=12"), "{tight:?}");
    refused(plan_beside(memory, &settings(), share(GIB, 16 * GIB, 0)), &["other models of 16384.0 MiB", "QUANTIZATION"]);
}

#[test]
fn states_have_slots_beside_the_kv_cache() {
    let config = json!({"model_type": "lfm2", "hidden_size": 1024, "intermediate_size": 4608, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 65536, "layer_types": ["conv", "conv", "full_attention", "conv"]});
    let model = Model::from_config(&config).unwrap().spec;
    let slot = 3 * 2 * 1024 * 4;
    let plan =
        |free: usize| MemoryPlan::new::<Cpu>(&model, 65_536, WEIGHTS, Memory { gpu: false, total: 4 * GIB, free }, &settings(), None);
    let plenty = plan(4 * GIB).unwrap();
    assert_eq!((plenty.shape.state_slots, plenty.state_bytes), (16 + 2 * 16 + 16, 64 * slot));
    assert_eq!(plenty.kv_bytes_per_token, 2 * 8 * 64 * 4, "of the one layer of attention");
    let line = plenty.lines().into_iter().find(|line| line.starts_with("states:")).unwrap();
    assert!(line.contains("64 slots of 24576 bytes"), "{line}");
    // What is not needed to run takes a 16th of what is free at most.
    let step = plenty.step_bytes;
    let tight = plan(WEIGHTS + step + 16 * 5 * slot).map(|plan| plan.shape.state_slots);
    assert!(tight.as_ref().is_ok_and(|slots| *slots == 16 + 5), "{tight:?}");
    assert_eq!(plan_in(Memory { gpu: false, total: 4 * GIB, free: 4 * GIB }, &settings()).unwrap().shape.state_slots, 0);
}
