//! The runner of real models: a plan becomes a forward pass and sampled tokens.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use candle_core::{Device, Result as TensorResult};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::files::ModelFiles;
use crate::config::{EngineSettings, Quantization};
use crate::error::Failure;
use crate::kernels::candle::Candle;
use crate::kernels::cpu::packed::PackedStore;
use crate::kernels::cpu::{self, Cpu};
#[cfg(test)]
use crate::kernels::cuda;
use crate::kernels::sizing::Operation;
use crate::kernels::sizing::Sizing;
use crate::kernels::{Backend, Batch, BatchRow, ComputeDtype, Footprint, StepLimits, StepStates};
use crate::models::decoder::{self, Decoder, LayerCache};
use crate::models::device::{check_quantized, describe, device_failure, device_memory, device_of, step_error, without_backtrace};
use crate::models::families::Model;
use crate::models::memory::{self, LOGITS_ROWS, MemoryPlan, Share};
use crate::models::prepared::PreparedCopy;
use crate::models::sample;
use crate::models::tensors::Tensors;
use crate::models::{Logprobs, LogprobsSpec, Output, Plan, Runner, SamplingMetadata, Shape, StepError, Turns, Vocabulary};

/// One model on the device that was asked for.
pub struct ModelRunner {
    model: Box<dyn LogitsRunner>,
    /// Where there are others on the same processors.
    turns: Option<Arc<Turns>>,
    /// What was loaded, for logs and reports.
    pub about: About,
}

/// What a model is computed with.
#[derive(Clone, Copy)]
enum Kernels {
    /// Ours for CPUs.
    Cpu,
    /// Candle's operations.
    Candle,
    /// Ours for CUDA, on this processor.
    #[cfg(test)]
    Emulated(&'static cuda::emulator::Emulator, cuda::backend::Dtype),
}

/// A runner that can also return its logits, for comparisons.
trait LogitsRunner: Runner {
    fn logits(&mut self, plan: &Plan) -> Result<Vec<Vec<f32>>, Failure>;
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

/// What a model that is one of several in a process has with the others.
#[derive(Debug, Clone)]
pub struct Beside {
    pub share: Share,
    /// `None` on a GPU, which takes turns by itself.
    pub turns: Option<Arc<Turns>>,
}

impl Beside {
    /// Plans the memory of several models before any of them is loaded. The failure of one begins with its name.
    pub fn plan(models: &[ModelFiles], settings: &EngineSettings) -> Result<Vec<Self>, Failure> {
        let device = device_of(settings)?;
        let memory = device_memory(&device);
        let demand = |files: &ModelFiles| {
            let model = Model::from_files(files)?.for_task(files, settings)?;
            let checkpoint = Checkpoint::open(files, model.spec.quantized.as_deref())?;
            let tensors = Tensors::find(&checkpoint, &model)?;
            if device.is_cpu() {
                let weights = sized::<Cpu>(&model, &tensors, settings.quantization)?.weight_bytes;
                MemoryPlan::demand::<Cpu>(&model.spec, weights, memory, settings)
            } else {
                let weights = sized::<Candle>(&model, &tensors, settings.quantization)?.weight_bytes;
                MemoryPlan::demand::<Candle>(&model.spec, weights, memory, settings)
            }
        };
        let demands = models.iter().map(|files| demand(files).map_err(|failure| failure.of(&files.name))).collect::<Result<Vec<_>, _>>()?;
        let turns = device.is_cpu().then(Arc::<Turns>::default);
        let beside = |share| Self { share, turns: turns.clone() };
        Ok(memory::shares(&demands, memory, settings).into_iter().map(beside).collect())
    }
}

impl ModelRunner {
    /// Loads the model on the calling thread, which from then on is the only one to use it (and one of the computing threads).
    /// `vocabulary` tells which ids may be sampled. It is called when the weights are loaded, so that a tokenizer can be loaded meanwhile.
    pub fn load<V: Into<Vocabulary>>(
        files: &ModelFiles,
        vocabulary: impl FnOnce() -> Result<V, Failure>,
        settings: &EngineSettings,
    ) -> Result<Self, Failure> {
        Self::load_beside(files, vocabulary, settings, None)
    }

    /// The same for a model that is one of several.
    pub fn load_beside<V: Into<Vocabulary>>(
        files: &ModelFiles,
        vocabulary: impl FnOnce() -> Result<V, Failure>,
        settings: &EngineSettings,
        beside: Option<Beside>,
    ) -> Result<Self, Failure> {
        let device = device_of(settings)?;
        let kernels = if device.is_cpu() { Kernels::Cpu } else { Kernels::Candle };
        Self::load_on(&device, kernels, files, vocabulary, settings, beside)
    }

    /// Loads the model on a CPU with candle's operations instead of our kernels: the reference that they are compared with.
    #[cfg(test)]
    pub fn load_reference(files: &ModelFiles, settings: &EngineSettings) -> Result<Self, Failure> {
        Self::load_on(&Device::Cpu, Kernels::Candle, files, || Ok(usize::MAX), settings, None)
    }

    /// Loads the model on the CUDA kernels as this processor runs them. `None` where there is no C++ compiler, which is said.
    #[cfg(test)]
    pub fn load_emulated(files: &ModelFiles, settings: &EngineSettings, dtype: cuda::backend::Dtype) -> Option<Result<Self, Failure>> {
        let kernels = Kernels::Emulated(cuda::emulator::Emulator::here()?, dtype);
        Some(Self::load_on(&Device::Cpu, kernels, files, || Ok(usize::MAX), settings, None))
    }

    fn load_on<V: Into<Vocabulary>>(
        device: &Device,
        kernels: Kernels,
        files: &ModelFiles,
        vocabulary: impl FnOnce() -> Result<V, Failure>,
        settings: &EngineSettings,
        beside: Option<Beside>,
    ) -> Result<Self, Failure> {
        let threads = memory::threads(settings);
        let model = Model::from_files(files)?.for_task(files, settings)?;
        let checkpoint = Checkpoint::open(files, model.spec.quantized.as_deref())?;
        if checkpoint.is_quantized() && settings.quantization != Quantization::Unquantized {
            check_quantized(device, &format!("{}, a quantized checkpoint (QUANTIZATION=unquantized widens it)", files.name))?;
        }
        let tensors = Tensors::find(&checkpoint, &model)?;
        tracing::debug!("checkpoint: {}", tensors.describe());
        if let Some(line) = decoder::finer_formats(settings.quantization, &model.spec) {
            tracing::warn!("{line}");
        }
        let (share, turns) = beside.map_or((None, None), |beside| (Some(beside.share), beside.turns));
        let planned = Planned::on(device, &model, &tensors, model.spec.vocab_size, settings, share)?;
        planned.memory.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let shape = &planned.memory.shape;
        let results = memory::result_rows(&model.spec, shape.max_num_seqs);
        let limits = model.spec.step_limits(shape.max_num_batched_tokens, results, shape.block_size);
        let about = About {
            device: planned.device.clone(),
            threads: if device.is_cpu() { threads } else { 0 },
            weights: planned.weights.clone(),
            parameters: planned.parameters,
            bytes_per_step: planned.bytes_per_step,
            memory: planned.memory.lines(),
        };
        let loading = Loading { model, tensors, vocabulary: || vocabulary().map(Into::into), plan: planned.memory, settings };
        let pool = loading_threads(threads)?;
        let model: Box<dyn LogitsRunner> = match kernels {
            Kernels::Cpu => {
                let prepared = pool.install(|| PreparedCopy::open(files, settings));
                let cpu = Cpu::new(&limits, threads, compute_dtype(settings));
                let cpu = cpu.map_err(|error| Failure::internal(format!("cannot start {threads} computing threads: {error}")))?;
                let cpu = cpu.with_store(prepared.clone().map(|copy| copy as Arc<dyn PackedStore>));
                let runner = DeviceRunner::load(loading, cpu, &limits, &pool)?;
                prepared.into_iter().for_each(|copy| copy.finish(settings.prepared_writing));
                Box::new(runner)
            }
            Kernels::Candle => Box::new(DeviceRunner::load(loading, Candle::new(device), &limits, &pool)?),
            #[cfg(test)]
            Kernels::Emulated(emulator, dtype) => {
                Box::new(DeviceRunner::load(loading, cuda::backend::Cuda::new(emulator, dtype), &limits, &pool)?)
            }
        };
        Ok(Self { model, turns, about })
    }

    /// The logits `[samples, vocab]` of a plan, as the sampler would get them.
    pub fn logits(&mut self, plan: &Plan) -> Result<Vec<Vec<f32>>, Failure> {
        self.model.logits(plan)
    }
}

impl Runner for ModelRunner {
    fn shape(&self) -> &Shape {
        self.model.shape()
    }

    fn step(&mut self, plan: &Plan) -> Result<Output, StepError> {
        let _turn = self.turns.as_ref().map(|turns| turns.take());
        self.model.step(plan)
    }

    fn recycle(&mut self, output: Output) {
        self.model.recycle(output);
    }

    fn prefault(&mut self, most: usize) -> bool {
        self.model.prefault(most)
    }
}

/// What [`ModelRunner::load`] would plan, without reading the weights.
pub struct Planned {
    /// The device's name.
    pub device: String,
    /// The formats that weights are held in.
    pub weights: String,
    pub parameters: usize,
    /// Bytes of weights a decode step reads.
    pub bytes_per_step: usize,
    pub memory: MemoryPlan,
}

impl Planned {
    /// `share`: where the model is one of several.
    pub fn new(
        model: &Model,
        tensors: &Tensors<'_>,
        vocab_size: usize,
        settings: &EngineSettings,
        share: Option<Share>,
    ) -> Result<Self, Failure> {
        Self::on(&device_of(settings)?, model, tensors, vocab_size, settings, share)
    }

    /// Plans before anything is loaded, so that a model which cannot fit is refused at once, instead of the system ending the process later.
    fn on(
        device: &Device,
        model: &Model,
        tensors: &Tensors<'_>,
        vocab_size: usize,
        settings: &EngineSettings,
        share: Option<Share>,
    ) -> Result<Self, Failure> {
        let planned = if device.is_cpu() { Self::sized::<Cpu> } else { Self::sized::<Candle> };
        planned(device, model, tensors, vocab_size, settings, share)
    }

    fn sized<F: Footprint>(
        device: &Device,
        model: &Model,
        tensors: &Tensors<'_>,
        vocab_size: usize,
        settings: &EngineSettings,
        share: Option<Share>,
    ) -> Result<Self, Failure> {
        let Sized { parameters, weight_bytes, bytes_per_step, formats } = sized::<F>(model, tensors, settings.quantization)?;
        let memory = share.map_or_else(|| device_memory(device), |share| share.memory);
        let memory = MemoryPlan::new::<F>(&model.spec, vocab_size, weight_bytes, memory, settings, share)?;
        let device = describe(device, settings);
        Ok(Self { device, weights: formats, parameters, bytes_per_step, memory })
    }
}

/// The size of a model's weights.
pub(super) struct Sized {
    parameters: usize,
    pub weight_bytes: usize,
    bytes_per_step: usize,
    pub formats: String,
}

/// Loads the model on the sizing backend and runs one token.
pub(super) fn sized<F: Footprint>(model: &Model, tensors: &Tensors<'_>, quantization: Quantization) -> Result<Sized, Failure> {
    let mut backend = Sizing::<F>::default();
    let limits = model.spec.step_limits(1, 1, 1);
    let mut decoder = Decoder::load(model.spec.clone(), tensors, &backend, quantization, &limits)?;
    let row = BatchRow { start: 0, len: 1, context: 1, blocks: Default::default() };
    let states = StepStates { slots: vec![0], ..Default::default() };
    let ropes = &model.spec.ropes;
    let batch = Batch { tokens: &[0], positions: &[0], slots: &[0], types: &[], rows: &[row], ropes, states: &states };
    let mut run = || {
        let mut caches = decoder.caches(&backend, 1, 1, 1)?;
        backend.begin(&batch)?;
        decoder.forward(&mut backend, &mut caches)?;
        match &model.spec.pooling {
            Some(pooling) => decoder.pool(&mut backend, pooling.pooling, &[Range { start: 0, end: 1 }]),
            None => decoder.head(&mut backend, &[0]),
        }
    };
    run().map_err(device_failure)?;
    let weights = |operation: &&Operation| matches!(operation.name, "linear" | "experts");
    Ok(Sized {
        parameters: decoder.spec.parameters(),
        weight_bytes: backend.weight_bytes(),
        bytes_per_step: backend.operations.iter().filter(weights).map(|operation| operation.bytes_read).sum(),
        formats: decoder.formats(),
    })
}

/// What `DTYPE` asks for on this processor.
fn compute_dtype(settings: &EngineSettings) -> ComputeDtype {
    if !settings.bf16_activations {
        return ComputeDtype::F32;
    }
    if !cpu::matmul::has_bf16() {
        tracing::info!("DTYPE=bfloat16 has no effect on this processor: bf16 is no faster on it, activations stay f32");
        return ComputeDtype::F32;
    }
    ComputeDtype::Bf16
}

/// The threads that pack weights; they end when everything is loaded.
fn loading_threads(threads: usize) -> Result<rayon::ThreadPool, Failure> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("load-{i}"))
        .build()
        .map_err(|error| Failure::internal(format!("cannot start {threads} loading threads: {error}")))
}

/// A model that reads more than text has hundreds of tensors that its language part does not use.
fn warn_of_unused(tensors: &Tensors<'_>) {
    const SHOWN: usize = 8;
    let (unused, model) = (tensors.unused(), tensors.model_name());
    unused.iter().take(SHOWN).for_each(|name| tracing::warn!("tensor {name} of {model} is not used by this architecture"));
    if unused.len() > SHOWN {
        tracing::warn!("{} more tensors of {model} are not used: only its language part is served", unused.len() - SHOWN);
    }
}

/// Everything that is needed to load a model onto a device.
struct Loading<'a, V> {
    model: Model,
    tensors: Tensors<'a>,
    vocabulary: V,
    plan: MemoryPlan,
    settings: &'a EngineSettings,
}

/// One model on one device, with its KV cache.
struct DeviceRunner<B: Backend> {
    backend: B,
    decoder: Decoder<B>,
    caches: Vec<LayerCache<B>>,
    /// The rows of the current step.
    rows: Vec<BatchRow>,
    /// The tokens whose logits are computed next, as indices into the step.
    positions: Vec<usize>,
    /// The result of each row of logits. The computing threads write them, and they are read when all of them are done.
    results: [Mutex<Option<RowResult>>; LOGITS_ROWS],
    /// An output that was read, kept for its memory.
    spare: Output,
    /// Ids below the vocabulary's size that have no token.
    unassigned: Vec<u32>,
    prefaulted: Prefaulted,
    plan: MemoryPlan,
    /// Tensors must stay on their thread, so this type is not `Send`.
    not_send: PhantomData<*const ()>,
}

/// How much of the planned memory is resident by now.
struct Prefaulted {
    /// This many buffers are resident as a whole.
    buffers: usize,
    /// Of the next buffer this many bytes are.
    bytes: usize,
    /// When the model was loaded.
    since: Instant,
}

impl<B: Backend> DeviceRunner<B> {
    fn load<V: FnOnce() -> Result<Vocabulary, Failure>>(
        loading: Loading<'_, V>,
        backend: B,
        limits: &StepLimits,
        pool: &rayon::ThreadPool,
    ) -> Result<Self, Failure>
    where
        B: Sync,
        Decoder<B>: Send,
    {
        let Loading { model, tensors, vocabulary, mut plan, settings } = loading;
        let spec = model.spec.for_context(plan.shape.max_model_len);
        let load = || Decoder::load(spec, &tensors, &backend, settings.quantization, limits);
        let decoder = pool.install(load)?;
        tensors.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        warn_of_unused(&tensors);
        let Vocabulary { size, mut unassigned } = vocabulary()?;
        plan.shape.vocab_size = size.min(plan.shape.vocab_size);
        unassigned.retain(|id| (*id as usize) < plan.shape.vocab_size);
        let caches = decoder.caches(&backend, plan.shape.blocks, plan.shape.block_size, plan.shape.state_slots);
        let caches = caches.map_err(|error| {
            Failure::internal(format!("no memory for the KV cache: {}; lower {}", without_backtrace(&error), plan.kv_setting))
        })?;
        Ok(Self {
            backend,
            decoder,
            caches,
            rows: Vec::new(),
            positions: Vec::new(),
            results: Default::default(),
            spare: Output::default(),
            unassigned,
            prefaulted: Prefaulted { buffers: 0, bytes: 0, since: Instant::now() },
            plan,
            not_send: PhantomData,
        })
    }

    /// On a GPU an id outside of the embedding would trip an assertion in a kernel, after which the device is lost to this process.
    fn check_ids(&self, plan: &Plan) -> Result<(), Failure> {
        let rows = self.decoder.spec.vocab_size;
        match plan.tokens.iter().find(|id| **id as usize >= rows) {
            Some(id) => Err(Failure::internal(format!("token id {id} is outside the vocabulary of {rows}"))),
            None => Ok(()),
        }
    }

    /// Runs the plan's tokens.
    fn forward(&mut self, plan: &Plan) -> TensorResult<()> {
        self.rows.clear();
        let row = |row: &crate::models::Row| BatchRow { start: row.start, len: row.len, context: row.context, blocks: row.blocks.clone() };
        self.rows.extend(plan.rows.iter().map(row));
        let Plan { tokens, positions, slots, types, states, .. } = plan;
        // A tokenizer may tell types apart that the model does not know.
        let types = if self.decoder.spec.embeddings.types > 1 { types.as_slice() } else { &[] };
        let ropes = &self.decoder.spec.ropes;
        self.backend.begin(&Batch { tokens, positions, slots, types, rows: &self.rows, ropes, states })?;
        let done = self.decoder.forward(&mut self.backend, &mut self.caches);
        // NOTE: lets go of the plan's block tables. As long as one is shared, a sequence that grows would have to copy it.
        self.rows.clear();
        self.backend.end();
        done
    }

    /// What the rows of the plan that pool become.
    fn pool(&mut self, plan: &Plan, output: &mut Output) -> TensorResult<()> {
        let spans: Vec<_> = plan.rows.iter().filter(|row| row.pools).map(|row| row.start..row.start + row.len).collect();
        let Some(pooling) = self.decoder.spec.pooling.as_ref().map(|spec| spec.pooling).filter(|_| !spans.is_empty()) else {
            return Ok(());
        };
        self.decoder.pool(&mut self.backend, pooling, &spans)?;
        let results: Vec<Mutex<Vec<f32>>> = spans.iter().map(|_| Mutex::default()).collect();
        self.backend.each_row(self.decoder.pooled(), &|row, numbers| {
            if let Some(Ok(mut result)) = results.get(row).map(Mutex::lock) {
                result.extend_from_slice(numbers);
            }
        })?;
        output.pooled.extend(results.into_iter().map(|result| result.into_inner().unwrap_or_default()));
        Ok(())
    }

    /// Samples and scores from the current logits: those of `count` wanted tokens, beginning with the `first`.
    fn read_logits(&mut self, plan: &Plan, first: usize, count: usize, output: &mut Output) -> TensorResult<()> {
        let vocab = self.plan.shape.vocab_size;
        let these = || wanted(plan).skip(first).take(count);
        let unassigned = self.unassigned.as_slice();
        let plain = |wanted: &Wanted<'_>| matches!(wanted, Wanted::Sample(sampling, _) if sampling.is_plain_greedy() && sampling.params.logprobs.is_none());
        if these().all(|(_, wanted)| plain(&wanted))
            && let Some(tokens) = self.backend.argmax(self.decoder.logits(), vocab, unassigned)?
        {
            tokens.into_iter().for_each(|token| RowResult::Sampled(token.map(|token| (token, None))).put(output));
            return Ok(());
        }
        let results = &self.results;
        self.backend.each_row(self.decoder.logits(), &|row, logits| {
            if let (Some((_, wanted)), Some(Ok(mut result))) = (these().nth(row), results.get(row).map(Mutex::lock)) {
                *result = Some(wanted.compute(&mut logits[..vocab], unassigned));
            }
        })?;
        for result in &self.results[..count] {
            match result.lock().ok().and_then(|mut result| result.take()) {
                Some(result) => result.put(output),
                None => candle_core::bail!("a row of logits was not sampled"),
            }
        }
        Ok(())
    }
}

impl<B: Backend> LogitsRunner for DeviceRunner<B> {
    fn logits(&mut self, plan: &Plan) -> Result<Vec<Vec<f32>>, Failure> {
        self.check_ids(plan)?;
        self.forward(plan).map_err(device_failure)?;
        let (vocab, mut all) = (self.plan.shape.vocab_size, Vec::new());
        let positions: Vec<usize> = wanted(plan).map(|(token, _)| token).collect();
        for part in positions.chunks(LOGITS_ROWS) {
            self.decoder.head(&mut self.backend, part).map_err(device_failure)?;
            let rows: Vec<Mutex<Vec<f32>>> = part.iter().map(|_| Mutex::default()).collect();
            let read = self.backend.each_row(self.decoder.logits(), &|row, logits| {
                if let Some(Ok(mut target)) = rows.get(row).map(Mutex::lock) {
                    *target = logits[..vocab].to_vec();
                }
            });
            read.map_err(device_failure)?;
            all.extend(rows.into_iter().filter_map(|row| row.into_inner().ok()));
        }
        all.iter_mut().for_each(|row| sample::mask(row, &self.unassigned));
        Ok(all)
    }
}

/// The result of one row of logits; `None` inside when nothing could be sampled or scored.
enum RowResult {
    Sampled(Option<(u32, Option<Logprobs>)>),
    Scored(Option<Logprobs>),
}

impl RowResult {
    fn put(self, output: &mut Output) {
        match self {
            Self::Sampled(sampled) => {
                if sampled.is_none() {
                    output.failed.push(output.tokens.len());
                }
                let (token, logprobs) = sampled.unwrap_or_default();
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
    fn compute(&self, logits: &mut [f32], unassigned: &[u32]) -> RowResult {
        match self {
            Self::Sample(sampling, nth) => RowResult::Sampled(sample::sample(logits, unassigned, sampling, *nth)),
            Self::Score(target, spec) => RowResult::Scored(sample::score(logits, unassigned, *target, *spec)),
        }
    }
}

/// What is wanted of one token's logits.
enum Wanted<'a> {
    /// The nth sample of its row, counted from 0.
    Sample(&'a SamplingMetadata, u64),
    /// How probable this token is.
    Score(u32, LogprobsSpec),
}

/// The tokens of a plan whose logits are wanted, by index, in the order of [`Output`]: first every sample, then every score.
fn wanted(plan: &Plan) -> impl Iterator<Item = (usize, Wanted<'_>)> {
    let samples = plan.rows.iter().filter_map(|row| row.sampling.as_ref().map(|sampling| (row, sampling)));
    let samples = samples.flat_map(|(row, sampling)| {
        let first = row.start + row.len - 1 - row.draft_len;
        (0..=row.draft_len).map(move |nth| (first + nth, Wanted::Sample(sampling, nth as u64)))
    });
    let scores = plan.rows.iter().filter_map(|row| row.score.as_ref().map(|score| (row, score)));
    let scores = scores.flat_map(|(row, score)| {
        score.targets.iter().enumerate().map(move |(i, target)| (row.start + i, Wanted::Score(*target, score.logprobs)))
    });
    samples.chain(scores)
}

impl<B: Backend> Runner for DeviceRunner<B> {
    fn shape(&self) -> &Shape {
        &self.plan.shape
    }

    fn step(&mut self, plan: &Plan) -> Result<Output, StepError> {
        self.check_ids(plan)?;
        self.forward(plan).map_err(step_error)?;
        let mut output = std::mem::take(&mut self.spare);
        output.clear();
        self.pool(plan, &mut output).map_err(step_error)?;
        let all = wanted(plan).count();
        for first in (0..all).step_by(LOGITS_ROWS) {
            let count = LOGITS_ROWS.min(all - first);
            self.positions.clear();
            self.positions.extend(wanted(plan).skip(first).take(count).map(|(token, _)| token));
            self.decoder.head(&mut self.backend, &self.positions).map_err(step_error)?;
            self.read_logits(plan, first, count, &mut output).map_err(step_error)?;
        }
        if output.logprobs.iter().all(Option::is_none) {
            output.logprobs.clear();
        }
        Ok(output)
    }

    fn recycle(&mut self, output: Output) {
        self.spare = output;
    }

    /// The step buffers come first, then KV cache and states layer by layer.
    fn prefault(&mut self, most: usize) -> bool {
        let caches = self.caches.iter_mut().flat_map(|cache| match cache {
            LayerCache::Keys(cache) => B::cache_memory(cache),
            LayerCache::States { conv, recurrence } => [B::state_memory(conv), recurrence.as_mut().map_or(&mut [], B::state_memory)],
        });
        let buffers = self.decoder.memory().into_iter().chain(self.backend.own_memory());
        let Prefaulted { buffers: done, bytes, since } = &mut self.prefaulted;
        let mut left = most;
        for memory in buffers.chain(caches).skip(*done) {
            let end = memory.len().min(bytes.saturating_add(left));
            cpu::prefault::touch(&mut memory[*bytes..end]);
            left -= end - *bytes;
            *bytes = end;
            if end < memory.len() {
                return true;
            }
            (*done, *bytes) = (*done + 1, 0);
        }
        if self.plan.step_bytes == 0 {
            return false; // On a GPU memory is there when it is allocated.
        }
        let mib = (self.plan.kv_bytes + self.plan.state_bytes + self.plan.step_bytes) >> 20;
        tracing::info!("memory: {mib} MiB of KV cache and step buffers resident, {} ms after the start", since.elapsed().as_millis());
        false
    }
}
