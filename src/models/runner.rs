//! The runner of real models: a plan becomes device inputs, a forward pass, drawn tokens.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::config::{DeviceChoice, EngineSettings};
use crate::error::Failure;
use crate::kernels::{self, Batch, BatchRow, KvCache};
use crate::models::architecture::Architecture;
use crate::models::files::ModelFiles;
use crate::models::memory::{self, Memory, MemoryPlan};
use crate::models::sample;
use crate::models::transformer::Transformer;
use crate::models::weights::{Checkpoint, device_failure};
use crate::models::{Draw, LogprobsSpec, Output, Plan, Runner, Shape};

/// Rows of logits made at a time: bounds their memory when many tokens are drawn or scored in one step.
const LOGITS_ROWS: usize = 64;

/// One model on one device, with its KV cache.
pub struct ModelRunner {
    model: Transformer,
    caches: Vec<KvCache>,
    /// `[1, vocab_size]`: 0, 1, 2 …, for greedy draws on the device.
    columns: Tensor,
    plan: MemoryPlan,
    /// What was loaded, for logs and reports.
    pub about: About,
    _threads: Option<rayon::ThreadPool>,
}

/// Facts about a loaded model.
#[derive(Debug, Clone)]
pub struct About {
    pub device: String,
    pub threads: usize,
    pub weights: &'static str,
    pub parameters: usize,
    /// Bytes of weights a decode step reads.
    pub bytes_per_step: usize,
    pub memory: Vec<String>,
}

impl ModelRunner {
    /// Loads the model on the calling thread, which from then on is the only one to use it (and one of the computing threads).
    /// `vocab_size`: ids from there on have no token and are never drawn; asked when the weights are in, so that a tokenizer can be loaded
    /// beside them.
    pub fn load(
        files: &ModelFiles,
        vocab_size: impl FnOnce() -> Result<usize, Failure>,
        settings: &EngineSettings,
    ) -> Result<Self, Failure> {
        let device = open_device(settings.device)?;
        let threads = memory::threads(settings);
        let pool = if device.is_cpu() { Some(computing_threads(threads)?) } else { None };
        let shape = Architecture::from_files(files)?;
        let checkpoint = Checkpoint::open(files, &shape)?;
        tracing::debug!("checkpoint: {}", checkpoint.describe());
        let before = device_memory(&device);
        let model = Transformer::load(shape, &checkpoint, &device)?;
        for name in checkpoint.unused() {
            tracing::warn!("tensor {name} of {} is not used by this architecture", files.name);
        }
        let kv_dtype = kv_dtype(&device);
        let vocab_size = vocab_size()?.min(model.shape.vocab_size);
        let plan = MemoryPlan::new(&model.shape, vocab_size, model.bytes_in_memory(), kv_dtype.size_in_bytes(), before, settings)?;
        let caches = allocate(&model, &plan.shape, kv_dtype, &device)?;
        let about = About {
            device: describe(&device),
            threads: if device.is_cpu() { threads } else { 0 },
            weights: model.weight_dtype(),
            parameters: model.shape.parameters(),
            bytes_per_step: model.bytes_per_step(),
            memory: plan.lines(),
        };
        let columns =
            Tensor::arange(0f32, plan.shape.vocab_size as f32, &device).and_then(|ids| ids.unsqueeze(0)).map_err(device_failure)?;
        Ok(Self { model, caches, columns, plan, about, _threads: pool })
    }

    /// Logits `[draws, vocab]` of a plan, as the sampler would see them.
    pub fn logits(&mut self, plan: &Plan) -> Result<Vec<Vec<f32>>, Failure> {
        let x = self.forward(plan).map_err(device_failure)?;
        let positions: Vec<usize> = wanted(plan).into_iter().map(|(token, _)| token).collect();
        let logits = self.logits_of(&x, &positions).map_err(device_failure)?;
        logits.to_vec2().map_err(device_failure)
    }

    /// Runs the plan's tokens: `[t, hidden]`, before the final norm.
    fn forward(&mut self, plan: &Plan) -> candle_core::Result<Tensor> {
        let device = &self.model.device;
        let t = plan.tokens.len();
        // On a GPU such an id would trip an assertion in a kernel, after which the device is lost to this process.
        if let Some(id) = plan.tokens.iter().find(|id| **id as usize >= self.model.shape.vocab_size) {
            candle_core::bail!("token id {id} is outside the vocabulary of {}", self.model.shape.vocab_size);
        }
        let (cos, sin) = self.model.rotary(&plan.positions)?;
        let row = |row: &crate::models::Row| BatchRow { start: row.start, len: row.len, context: row.context, blocks: row.blocks.clone() };
        let batch = Batch {
            tokens: Tensor::from_slice(&plan.tokens, t, device)?,
            slots: Tensor::from_slice(&plan.slots, t, device)?,
            cos,
            sin,
            rows: plan.rows.iter().map(row).collect(),
            block_size: self.plan.shape.block_size,
            groups: std::sync::OnceLock::new(),
        };
        self.model.forward(&batch, &self.caches)
    }

    /// `[positions, vocab_size]`, f32 on the device; `x [t, hidden]`.
    fn logits_of(&self, x: &Tensor, positions: &[usize]) -> candle_core::Result<Tensor> {
        let device = &self.model.device;
        if positions.is_empty() {
            return Tensor::zeros((0, self.plan.shape.vocab_size), DType::F32, device);
        }
        let rows: Vec<u32> = positions.iter().map(|token| *token as u32).collect();
        let x = if rows.len() == x.dim(0)? { x.clone() } else { x.index_select(&Tensor::from_vec(rows, positions.len(), device)?, 0)? };
        self.model.logits(&x)?.narrow(1, 0, self.plan.shape.vocab_size)
    }

    /// Draws and scores from `logits [wanted, vocab_size]`.
    fn answer(&self, logits: &Tensor, wanted: &[(usize, Wanted<'_>)], output: &mut Output) -> candle_core::Result<()> {
        let plain = |wanted: &Wanted<'_>| matches!(wanted, Wanted::Draw(draw, _) if draw.is_plain_greedy() && draw.logprobs.is_none());
        if !logits.device().is_cpu() && wanted.iter().all(|(_, wanted)| plain(wanted)) {
            output.tokens.extend(kernels::composed::argmax(&logits.contiguous()?, &self.columns)?);
            output.logprobs.resize(output.tokens.len(), None);
            return Ok(());
        }
        let mut rows: Vec<Vec<f32>> = logits.to_vec2()?;
        let drawn: Vec<_> = rows
            .par_iter_mut()
            .zip(wanted)
            .map(|(row, (_, wanted))| match wanted {
                Wanted::Draw(draw, nth) => {
                    let (token, logprobs) = sample::sample(row, draw, *nth);
                    (Some(token), logprobs)
                }
                Wanted::Score(target, spec) => (None, Some(sample::score(row, *target, *spec))),
            })
            .collect();
        for (token, logprobs) in drawn {
            match token {
                Some(token) => {
                    output.tokens.push(token);
                    output.logprobs.push(logprobs);
                }
                None => output.scores.extend(logprobs),
            }
        }
        Ok(())
    }
}

/// What is wanted of one token's logits.
enum Wanted<'a> {
    /// A draw, the nth of its row.
    Draw(&'a Draw, u64),
    Score(u32, LogprobsSpec),
}

/// The tokens of a plan whose logits are wanted, by index, in the order of [`Output`]: first every draw, then every score.
fn wanted(plan: &Plan) -> Vec<(usize, Wanted<'_>)> {
    let draws = plan.rows.iter().filter_map(|row| row.draw.as_ref().map(|draw| (row, draw)));
    let draws = draws.flat_map(|(row, draw)| {
        let first = row.start + row.len - 1 - row.proposed;
        (0..=row.proposed).map(move |nth| (first + nth, Wanted::Draw(draw, nth as u64)))
    });
    let scores = plan.rows.iter().filter_map(|row| row.score.as_ref().map(|score| (row, score)));
    let scores = scores.flat_map(|(row, score)| {
        score.targets.iter().enumerate().map(move |(i, target)| (row.start + i, Wanted::Score(*target, score.logprobs)))
    });
    draws.chain(scores).collect()
}

impl Runner for ModelRunner {
    fn shape(&self) -> &Shape {
        &self.plan.shape
    }

    fn step(&mut self, plan: &Plan) -> Result<Output, Failure> {
        let x = self.forward(plan).map_err(device_failure)?;
        let mut output = Output::default();
        for part in wanted(plan).chunks(LOGITS_ROWS) {
            let positions: Vec<usize> = part.iter().map(|(token, _)| *token).collect();
            let logits = self.logits_of(&x, &positions).map_err(device_failure)?;
            self.answer(&logits, part, &mut output).map_err(device_failure)?;
        }
        if output.logprobs.iter().all(Option::is_none) {
            output.logprobs.clear();
        }
        Ok(output)
    }
}

/// What [`ModelRunner::load`] would plan, without reading the weights: the device's name and the memory plan.
pub fn plan(
    shape: &Architecture,
    checkpoint: &Checkpoint,
    vocab_size: usize,
    settings: &EngineSettings,
) -> Result<(String, MemoryPlan), Failure> {
    let device = open_device(settings.device)?;
    let weights = if device.is_cpu() { checkpoint.bytes() } else { shape.parameters() * 2 };
    let plan = MemoryPlan::new(shape, vocab_size, weights, kv_dtype(&device).size_in_bytes(), device_memory(&device), settings)?;
    Ok((describe(&device), plan))
}

fn kv_dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

/// `[blocks, block_size, kv, d]` twice per layer, zeroed: allocated once, here.
fn allocate(model: &Transformer, shape: &Shape, dtype: DType, device: &Device) -> Result<Vec<KvCache>, Failure> {
    let dims = (shape.blocks, shape.block_size, model.shape.kv_heads, model.shape.head_dim);
    if !device.is_cpu() && dims.0 * dims.1 * dims.2 * dims.3 > u32::MAX as usize {
        return Err(Failure::internal(format!(
            "the KV cache of one layer would hold more numbers ({dims:?}) than candle's CUDA kernels can address (2^32); lower MAX_NUM_SEQS, \
             MAX_MODEL_LEN or GPU_MEMORY_UTILIZATION"
        )));
    }
    let zeros = || Tensor::zeros(dims, dtype, device).map_err(device_failure);
    (0..model.shape.layers).map(|_| Ok(KvCache { k: zeros()?, v: zeros()? })).collect()
}

/// A pool in which the calling thread computes too, so that a small step need not wake anybody.
fn computing_threads(threads: usize) -> Result<rayon::ThreadPool, Failure> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("compute-{i}"))
        .use_current_thread()
        .build()
        .map_err(|error| Failure::internal(format!("cannot start {threads} computing threads: {error}")))
}

/// Opens the device that was asked for.
pub fn open_device(choice: DeviceChoice) -> Result<Device, Failure> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => Ok(cuda::open(0).unwrap_or_else(|error| {
            if cfg!(feature = "cuda") {
                tracing::warn!("no CUDA device can be used, the model runs on the CPU: {error}");
            }
            Device::Cpu
        })),
        DeviceChoice::Cuda(index) => cuda::open(index).map_err(|error| Failure::internal(format!("DEVICE=cuda:{index}: {error}"))),
    }
}

fn describe(device: &Device) -> String {
    if device.is_cpu() { format!("cpu ({:?})", crate::kernels::cpu::simd::level()) } else { cuda::describe(device) }
}

fn device_memory(device: &Device) -> Memory {
    if device.is_cpu() { memory::host_memory() } else { cuda::memory() }
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    use candle_core::Device;

    use crate::models::memory::{Memory, host_memory};

    pub fn open(_index: usize) -> Result<Device, String> {
        Err("this binary was built without CUDA; use the CUDA image, or build with --features cuda".into())
    }

    pub fn describe(device: &Device) -> String {
        format!("{device:?}")
    }

    pub fn memory() -> Memory {
        host_memory()
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::Device;
    use candle_core::cuda_backend::CudaDevice;
    use candle_core::cuda_backend::cudarc::driver::{DriverError, result, sys};

    use crate::models::memory::Memory;

    /// A stream of our own, with cudarc's cross-stream bookkeeping off before anything is allocated: one thread does all device work.
    pub fn open(index: usize) -> Result<Device, String> {
        let device = Device::new_cuda_with_stream(index).map_err(|error| error.to_string())?;
        if let Device::Cuda(cuda) = &device {
            // SAFETY: every tensor is made, used and dropped on the engine's thread, on this one stream.
            #[allow(unsafe_code)]
            unsafe {
                cuda.disable_event_tracking()
            };
            keep_freed_memory(cuda).map_err(|error| format!("the memory pool cannot be set up: {error}"))?;
        }
        Ok(device)
    }

    /// Every operation allocates its result: freed memory stays in the pool instead of going back to the system at each synchronisation.
    fn keep_freed_memory(device: &CudaDevice) -> Result<(), DriverError> {
        let stream = device.cuda_stream();
        if !stream.context().has_async_alloc() {
            return Ok(());
        }
        let mut threshold = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the pool is the device's own, and the attribute's value is a u64, read before the call returns.
        #[allow(unsafe_code)]
        unsafe {
            let pool = result::device::get_mem_pool(stream.context().cu_device())?;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())
        }
    }

    pub fn describe(device: &Device) -> String {
        let name = match device {
            Device::Cuda(cuda) => cuda.cuda_stream().context().name().unwrap_or_else(|_| "unknown".into()),
            _ => String::new(),
        };
        format!("cuda ({name})")
    }

    pub fn memory() -> Memory {
        let (free, total) = result::mem_get_info().unwrap_or((0, 0));
        Memory { gpu: true, total, free }
    }
}
