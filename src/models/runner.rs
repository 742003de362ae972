//! The runner of real models: a plan becomes device inputs, a forward pass, drawn tokens.

use std::sync::Mutex;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use crate::config::{DeviceChoice, EngineSettings};
use crate::error::Failure;
use crate::kernels::{self, Activations, BatchRow, Inputs, KvCache, Products, cpu};
use crate::models::architecture::Architecture;
use crate::models::files::ModelFiles;
use crate::models::memory::{self, LOGITS_ROWS, Memory, MemoryPlan};
use crate::models::sample;
use crate::models::transformer::{Transformer, WeightPlan};
use crate::models::weights::{Checkpoint, device_failure};
use crate::models::{Draw, Fault, Logprobs, LogprobsSpec, Output, Plan, Runner, Shape, StepError, Vocabulary};

/// One model on one device, with its KV cache.
pub struct ModelRunner {
    model: Transformer,
    caches: Vec<KvCache>,
    /// The buffers of a step.
    values: Activations,
    /// The rows of the step at hand.
    rows: Vec<BatchRow>,
    /// Tokens whose logits are made next.
    positions: Vec<usize>,
    /// What rows of logits gave, until all threads are done.
    answers: [Mutex<Option<Answer>>; LOGITS_ROWS],
    /// An output that was used up.
    spare: Output,
    /// `[1, vocab_size]`: 0, 1, 2 …, for greedy draws on the device.
    columns: Tensor,
    /// Ids below the vocabulary's size that have no token, and for logits on a device what is added to those, `[1, vocab_size]`: 0 or −∞.
    holes: Vec<u32>,
    mask: Option<Tensor>,
    taken: Taken,
    plan: MemoryPlan,
    /// What was loaded, for logs and reports.
    pub about: About,
}

/// How much of the plan's memory has been made resident: all areas before the one at hand, and so many bytes of that.
struct Taken {
    area: usize,
    bytes: usize,
    since: Instant,
}

/// Facts about a loaded model.
#[derive(Debug, Clone)]
pub struct About {
    pub device: String,
    pub threads: usize,
    pub weights: String,
    pub parameters: usize,
    /// Bytes of weights a decode step reads.
    pub bytes_per_step: usize,
    pub memory: Vec<String>,
}

impl ModelRunner {
    /// Loads the model on the calling thread, which from then on is the only one to use it (and one of the computing threads).
    /// `vocabulary`: ids without a token are never drawn; asked when the weights are in, so that a tokenizer can be loaded beside them.
    pub fn load<V: Into<Vocabulary>>(
        files: &ModelFiles,
        vocabulary: impl FnOnce() -> Result<V, Failure>,
        settings: &EngineSettings,
    ) -> Result<Self, Failure> {
        let device = device_of(settings)?;
        let threads = memory::threads(settings);
        let config = Architecture::from_files(files)?;
        let checkpoint = Checkpoint::open(files, &config)?;
        tracing::debug!("checkpoint: {}", checkpoint.describe());
        let shape = Architecture { tie_word_embeddings: checkpoint.tied, ..config.clone() };
        // Planned before anything is loaded: what cannot fit is said at once, and not by the system ending the process.
        let weights = WeightPlan::new(&shape, &checkpoint, !device.is_cpu(), settings.quantization)?;
        let kv_dtype = kv_dtype(&device);
        let element = kv_dtype.size_in_bytes();
        let mut plan = MemoryPlan::new(&shape, shape.vocab_size, weights.bytes, element, device_memory(&device), settings)?;
        plan.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let model = loading_threads(threads)?.install(|| Transformer::load(shape, &checkpoint, &device, settings.quantization))?;
        checkpoint.warnings(&config).iter().for_each(|warning| tracing::warn!("{warning}"));
        for name in checkpoint.unused() {
            tracing::warn!("tensor {name} of {} is not used by this architecture", files.name);
        }
        drop(checkpoint);
        let Vocabulary { size, mut holes } = vocabulary()?.into();
        plan.shape.vocab_size = size.min(plan.shape.vocab_size);
        holes.retain(|id| (*id as usize) < plan.shape.vocab_size);
        let caches = allocate(&model, &plan, kv_dtype, &device)?;
        let values = if device.is_cpu() {
            let sizes = model.shape.sizes(plan.shape.max_num_batched_tokens, LOGITS_ROWS, plan.shape.block_size);
            let values = cpu::Activations::new(sizes, threads, products(settings, &device));
            let values = values.map_err(|error| Failure::internal(format!("cannot start {threads} computing threads: {error}")))?;
            Activations::Cpu(Box::new(values))
        } else {
            Activations::Tensors(Box::new(kernels::composed::Activations::new(&device, plan.shape.block_size)))
        };
        let about = About {
            device: describe(&device, settings),
            threads: if device.is_cpu() { threads } else { 0 },
            weights: model.weight_form(),
            parameters: model.shape.parameters(),
            bytes_per_step: model.bytes_per_step(),
            memory: plan.lines(),
        };
        let columns =
            Tensor::arange(0f32, plan.shape.vocab_size as f32, &device).and_then(|ids| ids.unsqueeze(0)).map_err(device_failure)?;
        let mask = (!device.is_cpu() && !holes.is_empty())
            .then(|| mask(&holes, plan.shape.vocab_size, &device))
            .transpose()
            .map_err(device_failure)?;
        Ok(Self {
            model,
            caches,
            values,
            rows: Vec::new(),
            positions: Vec::new(),
            answers: Default::default(),
            spare: Output::default(),
            columns,
            holes,
            mask,
            taken: Taken { area: 0, bytes: 0, since: Instant::now() },
            plan,
            about,
        })
    }

    /// Logits `[draws, vocab]` of a plan, as the sampler would see them.
    pub fn logits(&mut self, plan: &Plan) -> Result<Vec<Vec<f32>>, Failure> {
        self.check_ids(plan)?;
        self.forward(plan).map_err(device_failure)?;
        let mut all = Vec::new();
        let positions: Vec<usize> = wanted(plan).map(|(token, _)| token).collect();
        for part in positions.chunks(LOGITS_ROWS) {
            self.model.logits(&mut self.values, part).map_err(device_failure)?;
            all.extend(self.logits_on_host().map_err(device_failure)?);
        }
        Ok(all)
    }

    /// On a GPU an id outside of the embedding would trip an assertion in a kernel, after which the device is lost to this process.
    fn check_ids(&self, plan: &Plan) -> Result<(), Failure> {
        let rows = self.model.shape.vocab_size;
        match plan.tokens.iter().find(|id| **id as usize >= rows) {
            Some(id) => Err(Failure::internal(format!("token id {id} is outside the vocabulary of {rows}"))),
            None => Ok(()),
        }
    }

    /// Runs the plan's tokens.
    fn forward(&mut self, plan: &Plan) -> candle_core::Result<()> {
        self.rows.clear();
        let row = |row: &crate::models::Row| BatchRow { start: row.start, len: row.len, context: row.context, blocks: row.blocks.clone() };
        self.rows.extend(plan.rows.iter().map(row));
        let inputs = Inputs {
            tokens: &plan.tokens,
            positions: &plan.positions,
            slots: &plan.slots,
            rows: &self.rows,
            frequencies: self.model.frequencies(),
        };
        self.values.begin(&inputs)?;
        let done = self.model.forward(&mut self.values, &mut self.caches);
        // NOTE: the plan's block tables are its own again: a sequence that grows would have to copy what is shared.
        self.rows.clear();
        self.values.end();
        done
    }

    fn logits_on_host(&mut self) -> candle_core::Result<Vec<Vec<f32>>> {
        let vocab = self.plan.shape.vocab_size;
        let mut rows: Vec<Vec<f32>> = match &mut self.values {
            Activations::Cpu(values) => {
                values.logits().chunks_exact(self.model.shape.vocab_size).map(|row| row[..vocab].to_vec()).collect()
            }
            Activations::Tensors(values) => values.logits()?.narrow(1, 0, vocab)?.to_vec2()?,
        };
        rows.iter_mut().for_each(|row| sample::cover(row, &self.holes));
        Ok(rows)
    }

    /// Draws and scores from the logits at hand: those of `count` wanted tokens from the `first` on.
    fn answer(&mut self, plan: &Plan, first: usize, count: usize, output: &mut Output) -> candle_core::Result<()> {
        let vocab = self.plan.shape.vocab_size;
        let these = || wanted(plan).skip(first).take(count);
        let holes = self.holes.as_slice();
        match &mut self.values {
            Activations::Tensors(values) => {
                let logits = values.logits()?.narrow(1, 0, vocab)?;
                let plain =
                    |wanted: &Wanted<'_>| matches!(wanted, Wanted::Draw(draw, _) if draw.is_plain_greedy() && draw.logprobs.is_none());
                if these().all(|(_, wanted)| plain(&wanted)) {
                    // A sum is finite where every logit is.
                    let finite = logits.sum(1)?.to_vec1::<f32>()?;
                    let logits = match &self.mask {
                        Some(mask) => logits.broadcast_add(mask)?,
                        None => logits.contiguous()?,
                    };
                    let tokens = kernels::composed::argmax(&logits, &self.columns)?.into_iter().zip(finite);
                    tokens.for_each(|(token, sum)| Answer::Drawn(sum.is_finite().then_some((token, None))).put(output));
                    return Ok(());
                }
                for (mut row, (_, wanted)) in logits.to_vec2()?.into_iter().zip(these()) {
                    wanted.answer(&mut row, holes).put(output);
                }
            }
            Activations::Cpu(values) => {
                let answers = &self.answers;
                values.each_logits(&|row, logits| {
                    if let (Some((_, wanted)), Some(Ok(mut answer))) = (these().nth(row), answers.get(row).map(Mutex::lock)) {
                        *answer = Some(wanted.answer(&mut logits[..vocab], holes));
                    }
                });
                for answer in &self.answers[..count] {
                    match answer.lock().ok().and_then(|mut answer| answer.take()) {
                        Some(answer) => answer.put(output),
                        None => candle_core::bail!("a row of logits was not sampled"),
                    }
                }
            }
        }
        Ok(())
    }
}

/// What is added to logits on a device: −∞ for ids without a token.
fn mask(holes: &[u32], vocab_size: usize, device: &Device) -> candle_core::Result<Tensor> {
    let mut mask = vec![0f32; vocab_size];
    holes.iter().for_each(|id| mask[*id as usize] = f32::NEG_INFINITY);
    Tensor::from_vec(mask, (1, vocab_size), device)
}

/// What one row of logits gave; nothing where they are not finite.
enum Answer {
    Drawn(Option<(u32, Option<Logprobs>)>),
    Scored(Option<Logprobs>),
}

impl Answer {
    fn put(self, output: &mut Output) {
        match self {
            Self::Drawn(drawn) => {
                if drawn.is_none() {
                    output.failed.push(output.tokens.len());
                }
                let (token, logprobs) = drawn.unwrap_or_default();
                output.tokens.push(token);
                output.logprobs.push(logprobs);
            }
            Self::Scored(score) => {
                if score.is_none() {
                    output.failed.push(output.tokens.len() + output.scores.len());
                }
                output.scores.push(score.unwrap_or_default());
            }
        }
    }
}

impl Wanted<'_> {
    fn answer(&self, logits: &mut [f32], holes: &[u32]) -> Answer {
        match self {
            Self::Draw(draw, nth) => Answer::Drawn(sample::sample(logits, holes, draw, *nth)),
            Self::Score(target, spec) => Answer::Scored(sample::score(logits, holes, *target, *spec)),
        }
    }
}

/// What is wanted of one token's logits.
enum Wanted<'a> {
    /// A draw, the nth of its row.
    Draw(&'a Draw, u64),
    Score(u32, LogprobsSpec),
}

/// The tokens of a plan whose logits are wanted, by index, in the order of [`Output`]: first every draw, then every score.
fn wanted(plan: &Plan) -> impl Iterator<Item = (usize, Wanted<'_>)> {
    let draws = plan.rows.iter().filter_map(|row| row.draw.as_ref().map(|draw| (row, draw)));
    let draws = draws.flat_map(|(row, draw)| {
        let first = row.start + row.len - 1 - row.proposed;
        (0..=row.proposed).map(move |nth| (first + nth, Wanted::Draw(draw, nth as u64)))
    });
    let scores = plan.rows.iter().filter_map(|row| row.score.as_ref().map(|score| (row, score)));
    let scores = scores.flat_map(|(row, score)| {
        score.targets.iter().enumerate().map(move |(i, target)| (row.start + i, Wanted::Score(*target, score.logprobs)))
    });
    draws.chain(scores)
}

impl Runner for ModelRunner {
    fn shape(&self) -> &Shape {
        &self.plan.shape
    }

    fn step(&mut self, plan: &Plan) -> Result<Output, StepError> {
        self.check_ids(plan)?;
        self.forward(plan).map_err(step_error)?;
        let mut output = std::mem::take(&mut self.spare);
        output.clear();
        let all = wanted(plan).count();
        for first in (0..all).step_by(LOGITS_ROWS) {
            let count = LOGITS_ROWS.min(all - first);
            self.positions.clear();
            self.positions.extend(wanted(plan).skip(first).take(count).map(|(token, _)| token));
            self.model.logits(&mut self.values, &self.positions).map_err(step_error)?;
            self.answer(plan, first, count, &mut output).map_err(step_error)?;
        }
        if output.logprobs.iter().all(Option::is_none) {
            output.logprobs.clear();
        }
        Ok(output)
    }

    fn recycle(&mut self, output: Output) {
        self.spare = output;
    }

    /// Step buffers first, then layer by layer.
    fn take_memory(&mut self, most: usize) -> bool {
        // On a GPU it is taken when it is allocated.
        let Activations::Cpu(values) = &mut self.values else { return false };
        let caches = self.caches.iter_mut().flat_map(|cache| match cache {
            KvCache::Cpu(cache) => Some(cache.areas()).into_iter().flatten(),
            KvCache::Tensors(_) => None.into_iter().flatten(),
        });
        let Taken { area, bytes, since } = &mut self.taken;
        let mut left = most;
        for memory in values.areas().chain(caches).skip(*area) {
            let end = memory.len().min(bytes.saturating_add(left));
            cpu::resident::take(&mut memory[*bytes..end]);
            left -= end - *bytes;
            *bytes = end;
            if end < memory.len() {
                return true;
            }
            (*area, *bytes) = (*area + 1, 0);
        }
        let mib = (self.plan.kv_bytes + self.plan.step_bytes) >> 20;
        tracing::info!("memory: {mib} MiB of KV cache and step buffers resident, {} ms after the start", since.elapsed().as_millis());
        false
    }
}

/// A step's error with its class.
fn step_error(error: candle_core::Error) -> StepError {
    StepError::new(fault(&error), device_failure(error))
}

/// What an error of candle says about the device.
fn fault(error: &candle_core::Error) -> Fault {
    use candle_core::Error;
    match error {
        Error::WithBacktrace { inner, .. } | Error::WithPath { inner, .. } | Error::Context { inner, .. } => fault(inner),
        Error::Cuda(_) | Error::Wrapped(_) | Error::WrappedContext { .. } => cuda_fault(&error.to_string()),
        _ => Fault::Unknown,
    }
}

/// The class of an error by the codes that CUDA's driver and libraries write into it. Memory that ran out leaves the device sound; after
/// the others (an illegal address, a failed assertion, a lost device) every further call fails, too.
fn cuda_fault(words: &str) -> Fault {
    let has = |codes: &[&str]| codes.iter().any(|code| words.contains(code));
    if has(&["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "CURAND_STATUS_ALLOCATION_FAILED"]) {
        Fault::Memory
    } else if has(&["CUDA_ERROR_", "CUBLAS_STATUS_", "CURAND_STATUS_"]) {
        Fault::Device
    } else {
        Fault::Unknown
    }
}

/// What [`ModelRunner::load`] would plan, without reading the weights.
pub struct Planned {
    /// The device's name.
    pub device: String,
    pub weights: WeightPlan,
    pub memory: MemoryPlan,
}

impl Planned {
    pub fn new(shape: &Architecture, checkpoint: &Checkpoint, vocab_size: usize, settings: &EngineSettings) -> Result<Self, Failure> {
        let device = device_of(settings)?;
        let weights = WeightPlan::new(shape, checkpoint, !device.is_cpu(), settings.quantization)?;
        let element = kv_dtype(&device).size_in_bytes();
        let memory = MemoryPlan::new(shape, vocab_size, weights.bytes, element, device_memory(&device), settings)?;
        Ok(Self { device: describe(&device, settings), weights, memory })
    }
}

/// What `DTYPE` asks for on this processor.
fn products(settings: &EngineSettings, device: &Device) -> Products {
    if !settings.bf16_activations || !device.is_cpu() {
        return Products::F32;
    }
    if !cpu::matmul::has_bf16() {
        tracing::info!("DTYPE=bfloat16 has no effect on this processor: bf16 is no faster on it, activations stay f32");
        return Products::F32;
    }
    Products::Bf16
}

fn kv_dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

/// `[blocks, block_size, kv, d]` twice per layer, zeroed: allocated once, here.
fn allocate(model: &Transformer, plan: &MemoryPlan, dtype: DType, device: &Device) -> Result<Vec<KvCache>, Failure> {
    let shape = &plan.shape;
    let dims = (shape.blocks, shape.block_size, model.shape.kv_heads, model.shape.head_dim);
    if !device.is_cpu() && dims.0 * dims.1 * dims.2 * dims.3 > u32::MAX as usize {
        return Err(Failure::internal(format!(
            "the KV cache of one layer would hold more numbers ({dims:?}) than candle's CUDA kernels can address (2^32); lower {}",
            plan.kv_setting
        )));
    }
    if device.is_cpu() {
        let shape = cpu::attention::Shape { kv: model.shape.kv_heads, d: model.shape.head_dim, block_size: shape.block_size };
        let failed = |error| Failure::internal(format!("no memory for the KV cache: {error}; lower {}", plan.kv_setting));
        return (0..model.shape.layers).map(|_| cpu::Cache::new(dims.0, shape).map(KvCache::Cpu).map_err(failed)).collect();
    }
    let zeros = || Tensor::zeros(dims, dtype, device).map_err(device_failure);
    (0..model.shape.layers).map(|_| Ok(KvCache::Tensors(kernels::composed::KvCache { k: zeros()?, v: zeros()? }))).collect()
}

/// Threads that pack weights; they end with the loading.
fn loading_threads(threads: usize) -> Result<rayon::ThreadPool, Failure> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("load-{i}"))
        .build()
        .map_err(|error| Failure::internal(format!("cannot start {threads} loading threads: {error}")))
}

/// Opens the device of these settings, if it can do what they ask for.
fn device_of(settings: &EngineSettings) -> Result<Device, Failure> {
    let device = match settings.device {
        DeviceChoice::Auto => automatic(cuda::open(0), settings.gpu_required),
        choice => open_device(choice),
    }?;
    if let (Some(name), Some(card)) = (settings.quantization.name(), cuda::capability(&device)) {
        quantized_kernels(option_env!("CUDA_COMPUTE_CAP"), card)
            .map_err(|problem| Failure::internal(format!("QUANTIZATION={name}: {problem}")))?;
    }
    Ok(device)
}

/// What `DEVICE=auto` comes to, given what opening the first GPU came to.
fn automatic(opened: Result<Device, String>, gpu_required: bool) -> Result<Device, Failure> {
    match opened {
        Ok(device) => Ok(device),
        Err(error) if gpu_required => Err(Failure::internal(format!(
            "DEVICE=auto: no GPU can be used: {error}. A queue worker of a CUDA build does not fall back to the CPU; set DEVICE=cpu if that is meant"
        ))),
        Err(error) => {
            if cfg!(feature = "cuda") {
                tracing::warn!("no CUDA device can be used, the model runs on the CPU: {error}");
            }
            Ok(Device::Cpu)
        }
    }
}

/// Whether candle's kernels for quantized weights run on a card of compute capability `card`. Unlike its other kernels they are machine code
/// for one architecture, `built` (as `CUDA_COMPUTE_CAP` gives it to the build; without it, the build asked the card of its machine). Such code
/// runs on the same major version from its minor version on; from 9.0 on it is built with that architecture's own instructions, and runs
/// there alone.
fn quantized_kernels(built: Option<&str>, card: (u32, u32)) -> Result<(), String> {
    let number = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<String>().parse::<u32>().ok();
    let Some(built) = built.and_then(number).map(|number| (number / 10, number % 10)) else { return Ok(()) };
    let runs = if built.0 >= 9 { card == built } else { card.0 == built.0 && card.1 >= built.1 };
    if runs {
        return Ok(());
    }
    Err(format!(
        "the kernels for quantized weights in this build are for compute capability {}.{}, and this GPU has {}.{}; leave QUANTIZATION unset, or \
         build the image with CUDA_COMPUTE_CAP={}{}",
        built.0, built.1, card.0, card.1, card.0, card.1
    ))
}

/// Opens the device that was asked for.
pub fn open_device(choice: DeviceChoice) -> Result<Device, Failure> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => automatic(cuda::open(0), false),
        DeviceChoice::Cuda(index) => cuda::open(index).map_err(|error| Failure::internal(format!("DEVICE=cuda:{index}: {error}"))),
    }
}

fn describe(device: &Device, settings: &EngineSettings) -> String {
    if !device.is_cpu() {
        return cuda::describe(device);
    }
    let rounded = if settings.bf16_activations && cpu::matmul::has_bf16() { ", bf16 activations" } else { "" };
    format!("cpu ({:?}{rounded})", cpu::simd::level())
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

    /// Major and minor version of a GPU's architecture.
    pub fn capability(_device: &Device) -> Option<(u32, u32)> {
        None
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

    /// Major and minor version of a GPU's architecture.
    pub fn capability(device: &Device) -> Option<(u32, u32)> {
        let Device::Cuda(cuda) = device else { return None };
        let (major, minor) = cuda.cuda_stream().context().compute_capability().ok()?;
        Some((u32::try_from(major).ok()?, u32::try_from(minor).ok()?))
    }

    pub fn memory() -> Memory {
        let (free, total) = result::mem_get_info().unwrap_or((0, 0));
        Memory { gpu: true, total, free }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn automatic_falls_back_to_the_cpu_unless_a_gpu_is_required() {
        let none = || Err("DriverError(CUDA_ERROR_NO_DEVICE)".to_owned());
        assert!(automatic(none(), false).unwrap().is_cpu());
        let refused = automatic(none(), true).unwrap_err().message;
        assert!(refused.contains("CUDA_ERROR_NO_DEVICE") && refused.contains("DEVICE=cpu"), "{refused}");
        assert!(automatic(Ok(Device::Cpu), true).is_ok(), "what could be opened is taken");
    }

    #[test]
    fn quantized_kernels_run_where_they_were_built_for() {
        let fine = [("80", (8, 0)), ("80", (8, 6)), ("80", (8, 9)), ("8.9", (8, 9)), ("90", (9, 0)), ("90a", (9, 0)), ("120", (12, 0))];
        for (built, card) in fine {
            assert_eq!(quantized_kernels(Some(built), card), Ok(()), "{built} on {card:?}");
        }
        for (built, card) in [("80", (9, 0)), ("80", (7, 5)), ("89", (8, 6)), ("90", (10, 0)), ("100", (10, 3)), ("120", (12, 1))] {
            let problem = quantized_kernels(Some(built), card).unwrap_err();
            assert!(problem.contains(&format!("CUDA_COMPUTE_CAP={}{}", card.0, card.1)), "{problem}");
        }
        assert_eq!(quantized_kernels(None, (9, 0)), Ok(()), "the build asked its own card");
    }

    #[test]
    fn faults_are_told_apart_by_their_codes() {
        let cuda = |words: &'static str| candle_core::Error::Cuda(words.into());
        let illegal = r#"DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")"#;
        for (error, class) in [
            (cuda(illegal), Fault::Device),
            (cuda("CublasError(CUBLAS_STATUS_EXECUTION_FAILED)"), Fault::Device),
            (cuda(illegal).context("in layer 3"), Fault::Device),
            (cuda(r#"DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")"#), Fault::Memory),
            (cuda("CublasError(CUBLAS_STATUS_ALLOC_FAILED)"), Fault::Memory),
            (cuda("unsupported dtype F64 for matmul"), Fault::Unknown),
            (candle_core::Error::Msg("shapes do not match".into()), Fault::Unknown),
        ] {
            assert_eq!(step_error(error).fault, class, "{class:?}");
        }
    }
}
