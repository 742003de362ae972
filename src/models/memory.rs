//! The memory plan: how much the machine has, and how much of it the model will take. It is made before anything is allocated.

use std::sync::Arc;

use crate::config::{EngineSettings, KvCacheDtype, defaults};
use crate::error::Failure;
use crate::kernels::{AttentionSpec, Footprint, KvDtype, KvShape};
use crate::models::decoder::buffer_bytes;
use crate::models::spec::ModelSpec;
use crate::models::{Shape, sample};

mod host;
mod shares;
#[cfg(test)]
mod tests;

pub use host::{host_memory, peak_rss_mb, threads};
pub use shares::{Demand, Share, shares};

/// Rows of logits computed at a time, at least: one sequence may have several.
const LEAST_LOGITS: usize = 16;

/// Slots for states beyond two for each sequence.
const SPARE_SLOTS: usize = 16;
/// Slots that no sequence needs to run take at most this part of the free memory.
const SPARE_SLOTS_SHARE: usize = 16;
/// Rows of results computed at a time: of logits, or of everything that is pooled in one step.
fn result_rows<F: Footprint>(model: &ModelSpec, max_num_seqs: usize) -> usize {
    if model.pooling.is_some() { max_num_seqs } else { max_num_seqs.clamp(LEAST_LOGITS, F::MOST_LOGITS) }
}

/// The kind of memory a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    pub gpu: bool,
    /// All of it, in bytes.
    pub total: usize,
    /// What is free now, in bytes.
    pub free: usize,
}

/// What the KV cache is to hold; `None`: what the device computes attention with.
pub fn kv_dtype(settings: &EngineSettings) -> Option<KvDtype> {
    match settings.kv_cache_dtype {
        KvCacheDtype::Auto => None,
        KvCacheDtype::Float32 => Some(KvDtype::F32),
        KvCacheDtype::Float16 => Some(KvDtype::F16),
        KvCacheDtype::Bfloat16 => Some(KvDtype::Bf16),
        KvCacheDtype::Int8 => Some(KvDtype::Int8),
    }
}

/// How many bytes each purpose takes, and the shape of the engine that they allow.
#[derive(Debug, Clone)]
pub struct MemoryPlan {
    pub shape: Shape,
    pub weights_bytes: usize,
    pub kv_bytes: usize,
    /// Of the slots for states, beside the KV cache.
    pub state_bytes: usize,
    /// The buffers of a step, allocated at the start, and the threads' buffers for sampling; 0 where candle allocates them on a GPU.
    pub step_bytes: usize,
    /// Rows of logits, or of what is pooled, computed at a time.
    pub result_rows: usize,
    pub kv_bytes_per_token: usize,
    pub memory: Memory,
    /// The setting to lower when the KV cache cannot be allocated.
    pub kv_setting: String,
    /// To be logged once, at the start.
    pub warnings: Vec<String>,
    /// A remark for the log, when one batch limit was set and the other follows it.
    follows: Option<&'static str>,
}

impl MemoryPlan {
    /// Decides blocks, context and batch limits for a device whose backend is `F`. `weights_bytes` is what the loaded weights take;
    /// `share` is the model's part of the memory, where it is one of several.
    pub fn new<F: Footprint>(
        model: &ModelSpec,
        vocab_size: usize,
        weights_bytes: usize,
        memory: Memory,
        settings: &EngineSettings,
        share: Option<Share>,
    ) -> Result<Self, Failure> {
        let need = Need::new::<F>(model, weights_bytes, memory, settings, share)?;
        let Need { batch, block_size, block_bytes, .. } = need;
        let wanted = wanted_context(model, settings, batch)?;
        let useful = need.useful_blocks(wanted);
        // Slots are numbered in 32 bits.
        let most = u32::MAX as usize / block_size;
        let blocks = match settings.num_blocks {
            Some(blocks) if blocks > most => {
                let message =
                    format!("NUM_GPU_BLOCKS_OVERRIDE={blocks}: at most {most} blocks of {block_size} tokens are possible; lower it");
                return Err(Failure::internal(message));
            }
            Some(blocks) => blocks,
            None => (need.kv_budget(need.step_bytes) / block_bytes).min(useful).min(most),
        };
        let room = blocks * block_size;
        if settings.max_model_len.is_some_and(|asked| asked > room) || room < block_size {
            return Err(need.too_few(blocks));
        }
        let (kv_bytes, mut warnings) = need.fits(blocks)?;
        if !memory.gpu && settings.gpu_memory_utilization.is_some() {
            warnings.push("GPU_MEMORY_UTILIZATION has no effect on a CPU: there KV_CACHE_GB sizes the KV cache".into());
        }
        let shape = Shape {
            max_model_len: wanted.min(room),
            vocab_size,
            block_size,
            blocks,
            state_slots: need.state_slots,
            max_num_seqs: batch.seqs,
            max_num_batched_tokens: batch.tokens,
            memory_bound: room < wanted,
            kv_cache_dtype: kv_dtype(settings).unwrap_or(if memory.gpu { KvDtype::Bf16 } else { KvDtype::F32 }).name(),
            pooling: model.pooling.clone().map(Arc::new),
            whole_prompts: model.runs_whole(),
        };
        let auto = if memory.gpu { "GPU_MEMORY_UTILIZATION, MAX_NUM_SEQS or MAX_MODEL_LEN" } else { "KV_CACHE_GB (now auto)" };
        Ok(Self {
            shape,
            weights_bytes,
            kv_bytes,
            state_bytes: need.state_bytes(),
            step_bytes: need.planned_step_bytes(need.step_bytes),
            result_rows: need.result_rows,
            kv_bytes_per_token: block_bytes / block_size,
            memory,
            kv_setting: need.kv_setting().unwrap_or_else(|| auto.into()),
            warnings,
            follows: batch.follows,
        })
    }

    /// What a model asks for that shares the memory with others.
    ///
    /// # Errors
    /// When it is too large even alone.
    pub fn demand<F: Footprint>(
        model: &ModelSpec,
        weights_bytes: usize,
        memory: Memory,
        settings: &EngineSettings,
    ) -> Result<Demand, Failure> {
        let need = Need::new::<F>(model, weights_bytes, memory, settings, None)?;
        let wanted = settings.max_model_len.unwrap_or(model.max_positions);
        let useful = need.useful_blocks(wanted).saturating_mul(need.block_bytes);
        Ok(Demand { fixed: need.fixed(), block: need.block_bytes, useful })
    }

    /// The same plan for another rank, whose weights take so many bytes.
    pub fn with_weights(&self, weights_bytes: usize) -> Self {
        Self { weights_bytes, ..self.clone() }
    }

    /// One line per purpose, for the log and `check`.
    pub fn lines(&self) -> Vec<String> {
        let s = &self.shape;
        let mut lines = vec![
            format!("memory: {} of {} free", mib(self.memory.free), mib(self.memory.total)),
            format!("weights: {}", mib(self.weights_bytes)),
            format!("step buffers: {}", mib(self.step_bytes)),
            format!(
                "KV cache: {} = {} blocks of {} tokens ({} bytes per token, {})",
                mib(self.kv_bytes),
                s.blocks,
                s.block_size,
                self.kv_bytes_per_token,
                s.kv_cache_dtype
            ),
            format!(
                "limits: context {} tokens, {} sequences at once, {} tokens per step{}",
                s.max_model_len,
                s.max_num_seqs,
                s.max_num_batched_tokens,
                self.follows.map(|who| format!(" ({who})")).unwrap_or_default()
            ),
        ];
        if let Some(each) = self.state_bytes.checked_div(s.state_slots) {
            let (bytes, slots) = (mib(self.state_bytes), s.state_slots);
            lines.insert(
                4,
                format!(
                    "states: {bytes} = {slots} slots of {each} bytes, one for each sequence, the others for the prefix cache and drafts"
                ),
            );
        }
        lines
    }
}

/// The context that is asked for, or the model's own; where a text runs in one step, no more than fit one.
fn wanted_context(model: &ModelSpec, settings: &EngineSettings, batch: Batch) -> Result<usize, Failure> {
    let longest = model.longest_context();
    if let Some(asked) = settings.max_model_len.filter(|asked| *asked > longest) {
        return Err(Failure::internal(format!(
            "MAX_MODEL_LEN={asked} is more than the {longest} positions this model has; lower it, or leave it unset for auto"
        )));
    }
    let wanted = settings.max_model_len.unwrap_or(model.max_positions);
    if !model.runs_whole() {
        return Ok(wanted);
    }
    match (settings.max_model_len, settings.max_num_batched_tokens.filter(|tokens| *tokens < wanted)) {
        (Some(asked), Some(tokens)) => Err(Failure::internal(format!(
            "MAX_NUM_BATCHED_TOKENS={tokens} is less than MAX_MODEL_LEN={asked}, and this model runs a text in one step; raise it or leave it \
             to auto"
        ))),
        _ => Ok(wanted.min(batch.tokens)),
    }
}

/// How many bytes the KV caches may take, all models' together, beside weights and buffers of `fixed` bytes.
fn kv_pool(memory: Memory, settings: &EngineSettings, fixed: usize) -> usize {
    let Memory { gpu, total, free } = memory;
    if let Some(gb) = settings.kv_cache_gb {
        return (gb * (1u64 << 30) as f64) as usize;
    }
    if gpu {
        let share = settings.gpu_memory_utilization.unwrap_or(defaults::GPU_UTILIZATION);
        let used = total - free.min(total);
        return ((total as f64 * share) as usize).saturating_sub(used.saturating_add(fixed));
    }
    (free.saturating_sub(fixed) as f64 * defaults::CPU_KV_SHARE) as usize
}

fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

/// How much is computed in one step.
#[derive(Debug, Clone, Copy)]
struct Batch {
    seqs: usize,
    tokens: usize,
    /// A remark for the log, when one limit is not its default because the other one was set.
    follows: Option<&'static str>,
}

impl Batch {
    /// Every sequence takes at least one token of a step, so a limit that is not set follows the one that is.
    fn new(gpu: bool, settings: &EngineSettings) -> Result<Self, Failure> {
        let (seqs, tokens) = match gpu {
            true => (defaults::GPU_SEQS, defaults::GPU_BATCHED_TOKENS),
            false => (defaults::CPU_SEQS, defaults::CPU_BATCHED_TOKENS),
        };
        if let Some(message) = settings.contradicting_batch() {
            return Err(Failure::internal(format!("MAX_NUM_BATCHED_TOKENS: {message}")));
        }
        Ok(match (settings.max_num_seqs, settings.max_num_batched_tokens) {
            (Some(seqs), None) if seqs > tokens => {
                Self { seqs, tokens: seqs, follows: Some("MAX_NUM_BATCHED_TOKENS follows MAX_NUM_SEQS") }
            }
            (None, Some(tokens)) if tokens < seqs => {
                Self { seqs: tokens, tokens, follows: Some("MAX_NUM_SEQS follows MAX_NUM_BATCHED_TOKENS") }
            }
            (given_seqs, given_tokens) => Self { seqs: given_seqs.unwrap_or(seqs), tokens: given_tokens.unwrap_or(tokens), follows: None },
        })
    }
}

/// How much memory the model needs before its KV cache is sized.
struct Need<'a> {
    settings: &'a EngineSettings,
    memory: Memory,
    weights: usize,
    batch: Batch,
    /// Bytes of the buffers of a step.
    step_bytes: usize,
    /// They are not part of the plan: candle allocates about as many while a step runs.
    allocates_in_steps: bool,
    result_rows: usize,
    /// What `step_bytes` would be if no setting made a step larger than it is by default.
    usual_step_bytes: usize,
    block_size: usize,
    /// Bytes of one block of the KV cache, over all layers.
    block_bytes: usize,
    /// Prompts are not cut.
    whole: bool,
    /// Where there are other models in the process.
    share: Option<Share>,
    /// Bytes of one sequence's states, over all layers.
    slot_bytes: usize,
    state_slots: usize,
}

impl<'a> Need<'a> {
    fn new<F: Footprint>(
        model: &ModelSpec,
        weights: usize,
        memory: Memory,
        settings: &'a EngineSettings,
        share: Option<Share>,
    ) -> Result<Self, Failure> {
        let block_size = settings.block_size;
        let mut batch = Batch::new(memory.gpu, settings)?;
        if model.runs_whole() && settings.max_num_batched_tokens.is_none() {
            batch.tokens = batch.tokens.max(settings.max_model_len.unwrap_or(model.max_positions));
        }
        if model.pooling.is_some() && settings.max_num_seqs.is_none() {
            batch.seqs = batch.seqs.max(defaults::POOLING_SEQS).min(batch.tokens);
        }
        let usual = Batch::new(memory.gpu, &EngineSettings::default())?;
        let kv_shape = |attention: &AttentionSpec| KvShape { dtype: kv_dtype(settings), ..attention.kv_shape(1, block_size) };
        let block_bytes = model.attentions().map(|attention| F::kv_block_bytes(kv_shape(attention))).sum();
        let slot_bytes = size_of::<f32>() * model.state_width();
        let (threads, result_rows) = (threads(settings), result_rows::<F>(model, batch.seqs));
        let step_bytes = |tokens: usize| {
            let sampling = threads.checked_mul(if model.pooling.is_some() { 0 } else { sample::scratch_bytes(model.vocab_size) })?;
            let limits = model.step_limits(tokens, result_rows, block_size);
            F::own_bytes(&limits, threads)?.checked_add(buffer_bytes::<F>(model, &limits)?)?.checked_add(sampling)
        };
        let bytes_or_all = |tokens| step_bytes(tokens).unwrap_or(usize::MAX);
        let (step_bytes, usual_step_bytes) = (bytes_or_all(batch.tokens), bytes_or_all(usual.tokens.min(batch.tokens)));
        let mut need = Self {
            settings,
            memory,
            weights,
            batch,
            step_bytes,
            allocates_in_steps: memory.gpu && F::ALLOCATES_IN_STEPS,
            result_rows,
            usual_step_bytes,
            block_size,
            block_bytes,
            whole: model.runs_whole(),
            slot_bytes,
            state_slots: 0,
            share,
        };
        need.state_slots = need.slots();
        // On a GPU the weights are not counted here: whether the rest is enough for a KV cache is checked when that is sized.
        let fixed =
            if memory.gpu { step_bytes.saturating_add(need.state_bytes()) } else { need.fixed().saturating_add(need.others_fixed()) };
        if fixed > memory.total {
            return Err(need.too_large());
        }
        Ok(need)
    }

    /// Weights, states, and the step buffers where they are allocated at the start.
    fn fixed(&self) -> usize {
        self.weights.saturating_add(self.state_bytes()).saturating_add(self.planned_step_bytes(self.step_bytes))
    }

    /// Of step buffers so large, what the plan counts.
    fn planned_step_bytes(&self, step_bytes: usize) -> usize {
        if self.allocates_in_steps { 0 } else { step_bytes }
    }

    /// What other models take besides their KV caches.
    fn others_fixed(&self) -> usize {
        self.share.map_or(0, |share| share.others_fixed)
    }

    fn others_kv(&self) -> usize {
        self.share.map_or(0, |share| share.others_kv)
    }

    /// More blocks than this cannot all be in use at once. A size that was set is kept all the same: the prefix cache uses the rest.
    fn useful_blocks(&self, wanted: usize) -> usize {
        match self.settings.kv_cache_gb {
            Some(_) => usize::MAX,
            // What runs and as much again that waits for the next step.
            None if self.whole => (2 * self.batch.tokens.div_ceil(self.block_size)).saturating_add(self.batch.seqs),
            None => self.batch.seqs.saturating_mul(wanted.div_ceil(self.block_size)),
        }
    }

    /// A slot for each sequence, and for the prefix cache and drafts as many again and some more, if they take no more than a share of what is free.
    fn slots(&self) -> usize {
        let spare = (self.batch.seqs.saturating_mul(2)).saturating_add(SPARE_SLOTS);
        let taken = self.weights.saturating_add(self.step_bytes).saturating_add(self.others_fixed());
        let free = self.memory.free.saturating_sub(taken);
        match (free / SPARE_SLOTS_SHARE).checked_div(self.slot_bytes) {
            Some(room) => self.batch.seqs.saturating_add(spare.min(room)),
            None => 0,
        }
    }

    fn state_bytes(&self) -> usize {
        self.state_slots.saturating_mul(self.slot_bytes)
    }

    /// How many bytes the KV cache may take when the step buffers take `step_bytes`.
    fn kv_budget(&self, step_bytes: usize) -> usize {
        let step_bytes = self.planned_step_bytes(step_bytes);
        let alone = || kv_pool(self.memory, self.settings, self.weights.saturating_add(self.state_bytes()).saturating_add(step_bytes));
        self.share.map_or_else(alone, |share| share.kv)
    }

    /// The setting that makes the step buffers larger than usual, with its value.
    fn batch_setting(&self) -> Option<String> {
        let settings = self.settings;
        let given = settings.max_num_batched_tokens.map(|tokens| format!("MAX_NUM_BATCHED_TOKENS={tokens}"));
        given
            .or_else(|| settings.max_num_seqs.map(|seqs| format!("MAX_NUM_SEQS={seqs}")))
            .filter(|_| self.step_bytes > self.usual_step_bytes)
    }

    /// The setting that gives the size of the KV cache, with its value.
    fn kv_setting(&self) -> Option<String> {
        let blocks = self.settings.num_blocks.map(|blocks| format!("NUM_GPU_BLOCKS_OVERRIDE={blocks}"));
        blocks.or_else(|| Some(format!("KV_CACHE_GB={} (or KV_CACHE_MEMORY_BYTES)", self.settings.kv_cache_gb?)))
    }

    /// What else is in the memory, for error messages.
    fn others(&self) -> String {
        let step = match self.step_bytes {
            usize::MAX => "step buffers beyond counting".into(),
            bytes => format!("step buffers of {}", mib(bytes)),
        };
        let states = match self.state_bytes() {
            0 => String::new(),
            bytes => format!(", states of {} (lower MAX_NUM_SEQS for fewer)", mib(bytes)),
        };
        let models = self.share.map(|_| format!(", and other models of {}", mib(self.others_fixed().saturating_add(self.others_kv()))));
        format!("weights of {}{states} and {step}{}", mib(self.weights), models.unwrap_or_default())
    }

    /// The error when the weights and the step buffers alone are more than all memory.
    fn too_large(&self) -> Failure {
        let fits = self.weights.saturating_add(self.usual_step_bytes).saturating_add(self.others_fixed()) <= self.memory.total;
        let advice = match (self.batch_setting().filter(|_| fits), self.settings.threads) {
            (Some(setting), _) => format!("lower {setting}"),
            (None, Some(threads)) if self.weights.saturating_add(self.others_fixed()) < self.memory.total => {
                format!("lower THREADS={threads}")
            }
            (None, _) => "set QUANTIZATION=wint8 or wint4, or give it more memory".into(),
        };
        Failure::internal(format!("{} are more than the {} there is in all; {advice}", self.others(), mib(self.memory.total)))
    }

    /// The error when the KV cache holds less than one sequence.
    fn too_few(&self, blocks: usize) -> Failure {
        let asked = self.settings.max_model_len;
        let needed = asked.unwrap_or(self.block_size);
        let usual = self.kv_budget(self.usual_step_bytes) / self.block_bytes * self.block_size;
        let step = self.batch_setting().filter(|_| usual >= needed && !self.memory.gpu);
        let or_length = if asked.is_some() { " or lower MAX_MODEL_LEN" } else { "" };
        let advice = match (self.kv_setting(), step) {
            (Some(setting), _) => format!("raise {setting}{or_length}"),
            (None, Some(setting)) => format!("lower {setting}"),
            (None, None) if self.memory.gpu => format!("raise GPU_MEMORY_UTILIZATION{or_length}"),
            (None, None) => format!("set KV_CACHE_GB (auto is a quarter of what is left){or_length}"),
        };
        Failure::internal(format!(
            "the KV cache holds {} tokens ({blocks} blocks of {}, {}), less than the {needed} of one sequence; beside it are {}, and {} of {} \
             were free; {advice}",
            blocks * self.block_size,
            self.block_size,
            mib(blocks.saturating_mul(self.block_bytes)),
            self.others(),
            mib(self.memory.free),
            mib(self.memory.total),
        ))
    }

    /// The bytes of the KV cache, and a warning if everything together is more than what is free now. If it is more than there is in all, that
    /// is an error: the system would end the process once the cache is filled.
    fn fits(&self, blocks: usize) -> Result<(usize, Vec<String>), Failure> {
        let Memory { total, free, .. } = self.memory;
        let fixed = self.fixed().saturating_add(self.others_fixed());
        let kv = blocks.saturating_mul(self.block_bytes);
        let needed = kv.saturating_add(self.others_kv()).saturating_add(fixed);
        let setting = self.kv_setting();
        if needed > total {
            let left = total.saturating_sub(fixed);
            let most = match self.settings.num_blocks {
                // Every model has as many, of its own size.
                Some(_) => format!("{} blocks", left / self.block_bytes.saturating_add(self.others_kv() / blocks.max(1))),
                None => format!("{:.1} GiB", (left as f64 / (1 << 30) as f64 * 10.0).floor() / 10.0),
            };
            return Err(Failure::internal(format!(
                "{}: a KV cache of {}, {} are more than the {} there is in all; lower it, at most {most} are possible",
                setting.as_deref().unwrap_or("auto"),
                mib(kv),
                self.others(),
                mib(total),
            )));
        }
        let tight = setting.filter(|_| needed > free).map(|setting| {
            format!(
                "the plan takes {}, and {} are free now: the system may end this process when the KV cache is taken, right after the start; lower {setting}",
                mib(needed),
                mib(free)
            )
        });
        Ok((kv, tight.into_iter().collect()))
    }
}
