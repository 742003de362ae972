//! The runner of real models: a plan becomes a forward pass and sampled tokens.

use std::marker::PhantomData;
use std::sync::Mutex;
use std::time::Instant;

use candle_core::{Device, Result as TensorResult};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::files::ModelFiles;
use crate::config::{EngineSettings, Quantization};
use crate::error::Failure;
use crate::kernels::candle::Candle;
use crate::kernels::cpu::{self, Cpu};
use crate::kernels::sizing::Operation;
use crate::kernels::sizing::Sizing;
use crate::kernels::{Backend, Batch, BatchRow, ComputeDtype, Footprint, StepLimits};
use crate::models::decoder::{self, Decoder};
use crate::models::device::{describe, device_failure, device_memory, device_of, step_error, without_backtrace};
use crate::models::families::Model;
use crate::models::memory::{self, LOGITS_ROWS, MemoryPlan};
use crate::models::sample;
use crate::models::tensors::Tensors;
use crate::models::{Draw, Logprobs, LogprobsSpec, Output, Plan, Runner, Shape, StepError, Vocabulary};

/// One model on the device that was asked for.
pub struct ModelRunner {
    model: Box<dyn LogitsRunner>,
    /// What was loaded, for logs and reports.
    pub about: About,
}

/// A runner whose logits can be looked at.
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

impl ModelRunner {
    /// Loads the model on the calling thread, which from then on is the only one to use it (and one of the computing threads).
    /// `vocabulary`: ids without a token are never drawn; asked when the weights are in, so that a tokenizer can be loaded beside them.
    pub fn load<V: Into<Vocabulary>>(
        files: &ModelFiles,
        vocabulary: impl FnOnce() -> Result<V, Failure>,
        settings: &EngineSettings,
    ) -> Result<Self, Failure> {
        let device = device_of(settings)?;
        let ours = device.is_cpu();
        Self::load_on(&device, ours, files, vocabulary, settings)
    }

    /// Loads the model on a CPU with candle's operations instead of our kernels: the reference that they are compared with.
    #[cfg(test)]
    pub fn load_reference(files: &ModelFiles, settings: &EngineSettings) -> Result<Self, Failure> {
        Self::load_on(&Device::Cpu, false, files, || Ok(usize::MAX), settings)
    }

    /// `ours`: with the kernels for CPUs.
    fn load_on<V: Into<Vocabulary>>(
        device: &Device,
        ours: bool,
        files: &ModelFiles,
        vocabulary: impl FnOnce() -> Result<V, Failure>,
        settings: &EngineSettings,
    ) -> Result<Self, Failure> {
        let threads = memory::threads(settings);
        let model = Model::from_files(files)?;
        let checkpoint = Checkpoint::open(files, model.spec.quantized.as_deref())?;
        let tensors = Tensors::find(&checkpoint, &model)?;
        tracing::debug!("checkpoint: {}", tensors.describe());
        if let Some(line) = decoder::finer_formats(settings.quantization, &model.spec) {
            tracing::warn!("{line}");
        }
        let planned = Planned::on(device, &model, &tensors, model.spec.vocab_size, settings)?;
        planned.memory.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let limits = model.spec.step_limits(planned.memory.shape.max_num_batched_tokens, LOGITS_ROWS, planned.memory.shape.block_size);
        let about = About {
            device: planned.device.clone(),
            threads: if device.is_cpu() { threads } else { 0 },
            weights: planned.weights.clone(),
            parameters: planned.parameters,
            bytes_per_step: planned.bytes_per_step,
            memory: planned.memory.lines(),
        };
        let loading = Loading { model, tensors, vocabulary: || vocabulary().map(Into::into), plan: planned.memory, settings };
        let model: Box<dyn LogitsRunner> = if ours {
            let cpu = Cpu::new(&limits, threads, compute_dtype(settings));
            let cpu = cpu.map_err(|error| Failure::internal(format!("cannot start {threads} computing threads: {error}")))?;
            Box::new(DeviceRunner::load(loading, cpu, &limits, threads)?)
        } else {
            Box::new(DeviceRunner::load(loading, Candle::new(device), &limits, threads)?)
        };
        Ok(Self { model, about })
    }

    /// Logits `[draws, vocab]` of a plan, as the sampler would see them.
    pub fn logits(&mut self, plan: &Plan) -> Result<Vec<Vec<f32>>, Failure> {
        self.model.logits(plan)
    }
}

impl Runner for ModelRunner {
    fn shape(&self) -> &Shape {
        self.model.shape()
    }

    fn step(&mut self, plan: &Plan) -> Result<Output, StepError> {
        self.model.step(plan)
    }

    fn recycle(&mut self, output: Output) {
        self.model.recycle(output);
    }

    fn take_memory(&mut self, most: usize) -> bool {
        self.model.take_memory(most)
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
    pub fn new(model: &Model, tensors: &Tensors<'_>, vocab_size: usize, settings: &EngineSettings) -> Result<Self, Failure> {
        Self::on(&device_of(settings)?, model, tensors, vocab_size, settings)
    }

    /// Planned before anything is loaded: what cannot fit is said at once, and not by the system ending the process.
    fn on(device: &Device, model: &Model, tensors: &Tensors<'_>, vocab_size: usize, settings: &EngineSettings) -> Result<Self, Failure> {
        let device_name = describe(device, settings);
        let memory = device_memory(device);
        let planned = if device.is_cpu() { Self::sized::<Cpu> } else { Self::sized::<Candle> };
        planned(device_name, memory, model, tensors, vocab_size, settings)
    }

    fn sized<F: Footprint>(
        device: String,
        memory: memory::Memory,
        model: &Model,
        tensors: &Tensors<'_>,
        vocab_size: usize,
        settings: &EngineSettings,
    ) -> Result<Self, Failure> {
        let Sized { parameters, weight_bytes, bytes_per_step, formats } = sized::<F>(model, tensors, settings.quantization)?;
        let memory = MemoryPlan::new::<F>(&model.spec, vocab_size, weight_bytes, memory, settings)?;
        Ok(Self { device, weights: formats, parameters, bytes_per_step, memory })
    }
}

/// What a model's weights will take.
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
    let batch = Batch { tokens: &[0], positions: &[0], slots: &[0], rows: &[row], ropes: &model.spec.ropes };
    let mut run = || {
        let mut caches = decoder.kv_caches(&backend, 1, 1)?;
        backend.begin(&batch)?;
        decoder.forward(&mut backend, &mut caches)?;
        decoder.head(&mut backend, &[0])
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

/// Threads that pack weights; they end with the loading.
fn loading_threads(threads: usize) -> Result<rayon::ThreadPool, Failure> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("load-{i}"))
        .build()
        .map_err(|error| Failure::internal(format!("cannot start {threads} loading threads: {error}")))
}

/// A model on its way to a device.
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
    caches: Vec<B::KvCache>,
    /// The rows of the step at hand.
    rows: Vec<BatchRow>,
    /// Tokens whose logits are made next.
    positions: Vec<usize>,
    /// What rows of logits gave, until all threads are done.
    answers: [Mutex<Option<Answer>>; LOGITS_ROWS],
    /// An output that was used up.
    spare: Output,
    /// Ids below the vocabulary's size that have no token.
    holes: Vec<u32>,
    taken: Taken,
    plan: MemoryPlan,
    /// Tensors are its thread's alone.
    not_send: PhantomData<*const ()>,
}

/// How much of the plan's memory has been made resident: all areas before the one at hand, and so many bytes of that.
struct Taken {
    area: usize,
    bytes: usize,
    since: Instant,
}

impl<B: Backend> DeviceRunner<B> {
    fn load<V: FnOnce() -> Result<Vocabulary, Failure>>(
        loading: Loading<'_, V>,
        backend: B,
        limits: &StepLimits,
        threads: usize,
    ) -> Result<Self, Failure>
    where
        B: Sync,
        Decoder<B>: Send,
    {
        let Loading { model, tensors, vocabulary, mut plan, settings } = loading;
        let load = || Decoder::load(model.spec, &tensors, &backend, settings.quantization, limits);
        let decoder = loading_threads(threads)?.install(load)?;
        tensors.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        for name in tensors.unused() {
            tracing::warn!("tensor {name} of {} is not used by this architecture", tensors.model_name());
        }
        let Vocabulary { size, mut holes } = vocabulary()?;
        plan.shape.vocab_size = size.min(plan.shape.vocab_size);
        holes.retain(|id| (*id as usize) < plan.shape.vocab_size);
        let caches = decoder.kv_caches(&backend, plan.shape.blocks, plan.shape.block_size);
        let caches = caches.map_err(|error| {
            Failure::internal(format!("no memory for the KV cache: {}; lower {}", without_backtrace(&error), plan.kv_setting))
        })?;
        Ok(Self {
            backend,
            decoder,
            caches,
            rows: Vec::new(),
            positions: Vec::new(),
            answers: Default::default(),
            spare: Output::default(),
            holes,
            taken: Taken { area: 0, bytes: 0, since: Instant::now() },
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
        let (tokens, positions, slots) = (&plan.tokens, &plan.positions, &plan.slots);
        self.backend.begin(&Batch { tokens, positions, slots, rows: &self.rows, ropes: &self.decoder.spec.ropes })?;
        let done = self.decoder.forward(&mut self.backend, &mut self.caches);
        // NOTE: the plan's block tables are its own again: a sequence that grows would have to copy what is shared.
        self.rows.clear();
        self.backend.end();
        done
    }

    /// Draws and scores from the logits at hand: those of `count` wanted tokens from the `first` on.
    fn answer(&mut self, plan: &Plan, first: usize, count: usize, output: &mut Output) -> TensorResult<()> {
        let vocab = self.plan.shape.vocab_size;
        let these = || wanted(plan).skip(first).take(count);
        let holes = self.holes.as_slice();
        let plain = |wanted: &Wanted<'_>| matches!(wanted, Wanted::Draw(draw, _) if draw.is_plain_greedy() && draw.logprobs.is_none());
        if these().all(|(_, wanted)| plain(&wanted))
            && let Some(tokens) = self.backend.argmax(self.decoder.logits(), vocab, holes)?
        {
            tokens.into_iter().for_each(|token| Answer::Drawn(token.map(|token| (token, None))).put(output));
            return Ok(());
        }
        let answers = &self.answers;
        self.backend.each_row(self.decoder.logits(), &|row, logits| {
            if let (Some((_, wanted)), Some(Ok(mut answer))) = (these().nth(row), answers.get(row).map(Mutex::lock)) {
                *answer = Some(wanted.answer(&mut logits[..vocab], holes));
            }
        })?;
        for answer in &self.answers[..count] {
            match answer.lock().ok().and_then(|mut answer| answer.take()) {
                Some(answer) => answer.put(output),
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
        all.iter_mut().for_each(|row| sample::cover(row, &self.holes));
        Ok(all)
    }
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

impl<B: Backend> Runner for DeviceRunner<B> {
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
            self.decoder.head(&mut self.backend, &self.positions).map_err(step_error)?;
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
        let caches = self.caches.iter_mut().flat_map(B::cache_memory);
        let buffers = self.decoder.memory().into_iter().chain(self.backend.own_memory());
        let Taken { area, bytes, since } = &mut self.taken;
        let mut left = most;
        for memory in buffers.chain(caches).skip(*area) {
            let end = memory.len().min(bytes.saturating_add(left));
            cpu::prefault::touch(&mut memory[*bytes..end]);
            left -= end - *bytes;
            *bytes = end;
            if end < memory.len() {
                return true;
            }
            (*area, *bytes) = (*area + 1, 0);
        }
        if self.plan.step_bytes == 0 {
            return false; // On a GPU memory is there when it is allocated.
        }
        let mib = (self.plan.kv_bytes + self.plan.step_bytes) >> 20;
        tracing::info!("memory: {mib} MiB of KV cache and step buffers resident, {} ms after the start", since.elapsed().as_millis());
        false
    }
}
