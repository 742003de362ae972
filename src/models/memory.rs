//! What the machine has, and what the model will take of it: planned before anything is allocated.

use crate::config::EngineSettings;
use crate::error::Failure;
use crate::kernels::cpu;
use crate::models::Shape;
use crate::models::architecture::Architecture;

/// Defaults where a setting says nothing.
const CPU_SEQS: usize = 16;
const GPU_SEQS: usize = 256;
const CPU_BATCHED_TOKENS: usize = 256;
const GPU_BATCHED_TOKENS: usize = 2_048;
const BLOCK_SIZE: usize = 32;
/// Share of the memory left after the weights that the KV cache takes on a CPU, where others live too.
const CPU_KV_SHARE: f64 = 0.25;
const GPU_UTILIZATION: f64 = 0.9;
/// Rows of logits made at a time: bounds their memory when many tokens are drawn or scored in one step.
pub const LOGITS_ROWS: usize = 16;

/// The kind of memory a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    pub gpu: bool,
    /// Bytes in all, and bytes free now.
    pub total: usize,
    pub free: usize,
}

/// Bytes by purpose, and the shape they allow.
#[derive(Debug, Clone)]
pub struct MemoryPlan {
    pub shape: Shape,
    pub weights_bytes: usize,
    pub kv_bytes: usize,
    /// Buffers of a step, made at start; 0 where they are not ours.
    pub step_bytes: usize,
    pub kv_bytes_per_token: usize,
    pub memory: Memory,
}

impl MemoryPlan {
    /// Decides blocks, context and batch limits. `weight_bytes` is what the loaded weights take, `kv_element` bytes per cached number.
    pub fn new(
        model: &Architecture,
        vocab_size: usize,
        weights_bytes: usize,
        kv_element: usize,
        memory: Memory,
        settings: &EngineSettings,
    ) -> Result<Self, Failure> {
        let block_size = settings.block_size.unwrap_or(BLOCK_SIZE);
        let (seqs, batched) = if memory.gpu { (GPU_SEQS, GPU_BATCHED_TOKENS) } else { (CPU_SEQS, CPU_BATCHED_TOKENS) };
        let max_num_seqs = settings.max_num_seqs.unwrap_or(seqs);
        let max_num_batched_tokens = settings.max_num_batched_tokens.unwrap_or(batched).max(max_num_seqs);
        let limit = model.max_position_embeddings;
        if let Some(asked) = settings.max_model_len.filter(|asked| *asked > limit) {
            return Err(Failure::internal(format!(
                "MAX_MODEL_LEN={asked} is more than the {limit} positions this model has; lower it, or leave it unset for auto"
            )));
        }
        let block_bytes = if memory.gpu {
            model.kv_bytes_per_token(kv_element) * block_size
        } else {
            cpu::attention::Shape { kv: model.kv_heads, d: model.head_dim, block_size }.block_bytes() * model.layers
        };
        let kv_bytes_per_token = block_bytes / block_size;
        // On a GPU candle takes them as it goes.
        let step_bytes =
            if memory.gpu { 0 } else { cpu::Activations::bytes(&model.sizes(max_num_batched_tokens, LOGITS_ROWS, block_size)) };
        let wanted = settings.max_model_len.unwrap_or(limit);
        // More than this no set of sequences can ever use.
        let useful = max_num_seqs.saturating_mul(wanted.div_ceil(block_size));
        let blocks = match settings.num_blocks {
            Some(blocks) => blocks,
            None => (kv_budget(weights_bytes + step_bytes, memory, settings) / block_bytes).min(useful),
        };
        let room = blocks * block_size;
        if settings.max_model_len.is_some_and(|asked| asked > room) || room < block_size {
            return Err(Failure::internal(format!(
                "the KV cache holds {room} tokens ({blocks} blocks of {block_size}, {} MiB), less than one sequence of {wanted} tokens needs; lower MAX_MODEL_LEN or raise {}",
                (blocks * block_bytes) >> 20,
                match settings.num_blocks {
                    Some(_) => "NUM_GPU_BLOCKS_OVERRIDE",
                    None if memory.gpu => "GPU_MEMORY_UTILIZATION",
                    None => "KV_CACHE_GB",
                }
            )));
        }
        let max_model_len = wanted.min(room);
        let memory_bound = room < wanted;
        let shape = Shape { max_model_len, vocab_size, block_size, blocks, max_num_seqs, max_num_batched_tokens, memory_bound };
        Ok(Self { shape, weights_bytes, kv_bytes: blocks * block_bytes, step_bytes, kv_bytes_per_token, memory })
    }

    /// One line per purpose, for the log and `check`.
    pub fn lines(&self) -> Vec<String> {
        let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
        let s = &self.shape;
        vec![
            format!("memory: {} of {} free", mib(self.memory.free), mib(self.memory.total)),
            format!("weights: {}", mib(self.weights_bytes)),
            format!("step buffers: {}", mib(self.step_bytes)),
            format!(
                "KV cache: {} = {} blocks of {} tokens ({} bytes per token)",
                mib(self.kv_bytes),
                s.blocks,
                s.block_size,
                self.kv_bytes_per_token
            ),
            format!(
                "limits: context {} tokens, {} sequences at once, {} tokens per step",
                s.max_model_len, s.max_num_seqs, s.max_num_batched_tokens
            ),
        ]
    }
}

fn kv_budget(weights: usize, memory: Memory, settings: &EngineSettings) -> usize {
    if let Some(gb) = settings.kv_cache_gb {
        return (gb * (1u64 << 30) as f64) as usize;
    }
    if memory.gpu {
        let share = settings.gpu_memory_utilization.unwrap_or(GPU_UTILIZATION);
        let used = memory.total - memory.free.min(memory.total);
        return ((memory.total as f64 * share) as usize).saturating_sub(used + weights);
    }
    (memory.free.saturating_sub(weights) as f64 * CPU_KV_SHARE) as usize
}

/// Main memory, as far as this process may use it: the control group's limit where there is one.
pub fn host_memory() -> Memory {
    let fallback = Memory { gpu: false, total: 8 << 30, free: 4 << 30 };
    let Ok(info) = std::fs::read_to_string("/proc/meminfo") else { return fallback };
    let field = |name: &str| {
        info.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_whitespace().nth(1)?.parse::<usize>().ok())
            .map(|kib| kib << 10)
    };
    let (Some(mut total), Some(mut free)) = (field("MemTotal:"), field("MemAvailable:")) else { return fallback };
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<usize>().ok();
    for (limit, usage) in [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ] {
        if let Some(limit) = number(limit).filter(|limit| *limit < total) {
            total = limit;
            free = free.min(limit.saturating_sub(number(usage).unwrap_or(0)));
        }
    }
    Memory { gpu: false, total, free }
}

/// Threads for computing: the setting, else the processors this process may use (the control group's quota counted in).
pub fn threads(settings: &EngineSettings) -> usize {
    settings.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// The most memory this process ever had resident, in MiB, where the system tells.
pub fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib: f64 = status.lines().find(|line| line.starts_with("VmHWM:"))?.split_whitespace().nth(1)?.parse().ok()?;
    Some((kib / 1024.0 * 10.0).round() / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plan(settings: EngineSettings, free: usize) -> Result<MemoryPlan, Failure> {
        let config = json!({"model_type": "ernie4_5", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18, "num_attention_heads": 16,
            "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 103424});
        let model = Architecture::from_config(&config).unwrap();
        MemoryPlan::new(&model, 100_295, 721_496_064, 4, Memory { gpu: false, total: free, free }, &settings)
    }

    #[test]
    fn memory_bounds_the_context_unless_it_was_asked_for() {
        let plan_auto = plan(EngineSettings::default(), 4 << 30).unwrap();
        assert!(plan_auto.shape.max_model_len < 131_072 && plan_auto.kv_bytes <= 1 << 30 && plan_auto.shape.memory_bound, "{plan_auto:?}");
        let error = plan(EngineSettings { max_model_len: Some(131_072), ..Default::default() }, 4 << 30).unwrap_err();
        assert!(error.message.contains("KV_CACHE_GB") && error.message.contains("131072"), "{error}");
        let error = plan(EngineSettings { max_model_len: Some(200_000), ..Default::default() }, 64 << 30).unwrap_err();
        assert!(error.message.contains("MAX_MODEL_LEN=200000"), "{error}");
    }

    #[test]
    fn no_more_blocks_than_sequences_can_use() {
        let plan = plan(EngineSettings { max_model_len: Some(100), max_num_seqs: Some(2), ..Default::default() }, 64 << 30).unwrap();
        assert_eq!((plan.shape.blocks, plan.shape.max_model_len, plan.shape.memory_bound), (8, 100, false));
    }

    #[test]
    fn this_machine_has_memory() {
        let memory = host_memory();
        assert!(memory.free <= memory.total && memory.total > 1 << 28, "{memory:?}");
    }
}
