//! The runner of real models: a plan becomes a forward pass and sampled tokens.

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
use crate::kernels::ranks::Member;
use crate::kernels::{Backend, ComputeDtype, Footprint, RowSampling, StepLimits};
#[cfg(any(test, feature = "cuda"))]
use crate::models::choice;
use crate::models::choice::Kernels;
use crate::models::decoder::Decoder;
use crate::models::device::{device_failure, device_memory, device_of, step_error};
use crate::models::families::Model;
use crate::models::memory::{self, Demand, Memory, MemoryPlan, Share};
use crate::models::prepared::PreparedCopy;
use crate::models::sample;
use crate::models::shard::Shard;
use crate::models::spec::ModelSpec;
use crate::models::tensors::Tensors;
use crate::models::{Fault, Logprobs, LogprobsSpec, Output, Plan, Runner, SamplingMetadata, Shape, StepError, Turns, Vocabulary};

mod planned;
mod rank;
mod ranks;
#[cfg(test)]
mod tests;

pub use planned::Planned;
pub(super) use planned::sized;
use rank::{Loading, Rank};
#[cfg(test)]
pub(crate) use ranks::Break;
use ranks::{Followers, Part};

#[cfg(feature = "cuda")]
type Cuda = crate::kernels::cuda::Cuda<crate::kernels::cuda::Gpu>;

/// One model on the device that was asked for.
pub struct ModelRunner {
    model: Box<dyn LogitsRunner>,
    /// Where there are others on the same processors.
    turns: Option<Arc<Turns>>,
    /// What was loaded, for logs and reports.
    pub about: About,
}

/// A runner that can also return its logits, for comparisons.
trait LogitsRunner: Runner {
    fn logits(&mut self, plan: &Plan) -> Result<Vec<Vec<f32>>, Failure>;
    #[cfg(test)]
    fn break_rank(&self, rank: usize, what: ranks::Break);
}

/// Facts about a loaded model.
#[derive(Debug, Clone)]
pub struct About {
    pub device: String,
    pub threads: usize,
    pub weights: String,
    /// What the KV cache holds.
    pub kv_cache_dtype: &'static str,
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
            let demand = match Kernels::of(&device, &model.spec, settings).0 {
                Kernels::Cpu => demand_on::<Cpu>,
                #[cfg(feature = "cuda")]
                Kernels::Cuda => demand_on::<Cuda>,
                Kernels::Candle => demand_on::<Candle>,
                #[cfg(test)]
                Kernels::Emulated(_) => demand_on::<Cpu>,
            };
            demand(&model, &tensors, memory, settings)
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
        let kernels = |spec: &ModelSpec| Kernels::for_start(&device, spec, settings);
        Self::load_on(&device, kernels, files, vocabulary, settings, beside)
    }

    /// Loads the model on a CPU with candle's operations instead of our kernels: the reference that they are compared with.
    #[cfg(test)]
    pub fn load_reference(files: &ModelFiles, settings: &EngineSettings) -> Result<Self, Failure> {
        Self::load_on(&Device::Cpu, |_| Kernels::Candle, files, || Ok(usize::MAX), settings, None)
    }

    /// Loads the model on the CUDA kernels as this processor runs them. `None` where there is no C++ compiler, which is said.
    #[cfg(test)]
    pub fn load_emulated(files: &ModelFiles, settings: &EngineSettings, dtype: cuda::Dtype) -> Option<Result<Self, Failure>> {
        cuda::emulator::Emulator::here()?;
        Some(Self::load_on(&Device::Cpu, |_| Kernels::Emulated(dtype), files, || Ok(usize::MAX), settings, None))
    }

    fn load_on<V: Into<Vocabulary>>(
        device: &Device,
        kernels: impl FnOnce(&ModelSpec) -> Kernels,
        files: &ModelFiles,
        vocabulary: impl FnOnce() -> Result<V, Failure>,
        settings: &EngineSettings,
        beside: Option<Beside>,
    ) -> Result<Self, Failure> {
        let model = Model::from_files(files)?.for_task(files, settings)?;
        let checkpoint = Checkpoint::open(files, model.spec.quantized.as_deref())?;
        let kernels = kernels(&model.spec);
        let quantized = checkpoint.is_quantized() && settings.quantization != Quantization::Unquantized;
        kernels.check(device, settings, quantized.then_some(files.name.as_str()))?;
        let tensors = Tensors::find(&checkpoint, &model)?;
        tracing::debug!("checkpoint: {}", tensors.describe());
        let (share, turns) = beside.map_or((None, None), |beside| (Some(beside.share), beside.turns));
        let planned = Planned::on(device, kernels, &model, &tensors, model.spec.vocab_size, settings, share)?;
        planned.warnings().for_each(|warning| tracing::warn!("{warning}"));
        let about = planned.about(device, settings);
        let Planned { ranks, memory: plan, follower, .. } = planned;
        let (followers, member) = match follower {
            None => (None, None),
            Some(follower) => {
                let part = |rank| {
                    let shard = Shard { rank, ranks };
                    let (files, plan) = (files.clone(), follower.clone());
                    Part { files, settings: ranks::settings_of(settings, device, shard), shard, plan, kernels }
                };
                let (followers, member) = Followers::start((1..ranks).map(part).collect())?;
                (Some(followers), Some(member))
            }
        };
        let shard = Shard { rank: 0, ranks };
        let settings = &ranks::settings_of(settings, device, shard);
        let loading = Loading { model: &model, tensors: &tensors, shard, plan: &plan, settings };
        let others = Others { followers, member };
        let (limits, pool) = (loading.limits()?, loading_threads(memory::threads(settings))?);
        let vocabulary = || vocabulary().map(Into::into);
        let (steps, candle) = ((&limits, &pool), || Candle::new(device));
        let model: Box<dyn LogitsRunner> = match kernels {
            Kernels::Cpu => {
                let prepared = pool.install(|| PreparedCopy::open(files, settings));
                let cpu = cpu_of(&limits, settings)?.with_store(prepared.clone().map(|copy| copy as Arc<dyn PackedStore>));
                let runner = DeviceRunner::load(&loading, cpu, vocabulary, steps, others)?;
                prepared.into_iter().for_each(|copy| copy.finish(settings.prepared_writing));
                Box::new(runner)
            }
            #[cfg(feature = "cuda")]
            Kernels::Cuda => Box::new(DeviceRunner::load(&loading, choice::open_kernels(device, &limits)?, vocabulary, steps, others)?),
            Kernels::Candle => Box::new(DeviceRunner::load(&loading, candle(), vocabulary, steps, others)?),
            #[cfg(test)]
            Kernels::Emulated(dtype) => Box::new(DeviceRunner::load(&loading, choice::emulated(dtype)?, vocabulary, steps, others)?),
        };
        Ok(Self { model, turns, about })
    }

    /// The logits `[samples, vocab]` of a plan, as the sampler would get them.
    pub fn logits(&mut self, plan: &Plan) -> Result<Vec<Vec<f32>>, Failure> {
        self.model.logits(plan)
    }

    /// Lets something happen to a rank in its next step.
    #[cfg(test)]
    pub(crate) fn break_rank(&self, rank: usize, what: ranks::Break) {
        self.model.break_rank(rank, what);
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

/// What a model that is one of several asks for.
fn demand_on<F: Footprint>(model: &Model, tensors: &Tensors<'_>, memory: Memory, settings: &EngineSettings) -> Result<Demand, Failure> {
    let weights = sized::<F>(model, tensors, settings.quantization, Shard::WHOLE)?.weight_bytes;
    MemoryPlan::demand::<F>(&model.spec, weights, memory, settings)
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

/// The processor's threads for a rank, or for all of a model.
fn cpu_of(limits: &StepLimits, settings: &EngineSettings) -> Result<Cpu, Failure> {
    let threads = memory::threads(settings);
    Cpu::new(limits, threads, compute_dtype(settings))
        .map_err(|error| Failure::internal(format!("cannot start {threads} computing threads: {error}")))
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

/// The ranks that compute the model besides the first, and its place among them.
struct Others {
    followers: Option<Followers>,
    member: Option<Member>,
}

/// One model with its KV cache: on one device, or led from there.
struct DeviceRunner<B: Backend> {
    own: Rank<B>,
    followers: Option<Followers>,
    /// The tokens whose logits are computed next, as indices into the step.
    positions: Vec<usize>,
    /// The result of each row of logits. The computing threads write them, and they are read when all of them are done.
    results: Vec<Mutex<Option<RowResult>>>,
    /// An output that was read, kept for its memory.
    spare: Output,
    /// Ids below the vocabulary's size that have no token.
    unassigned: Vec<u32>,
    /// When the model was loaded.
    since: Instant,
    plan: MemoryPlan,
}

impl<B: Backend> DeviceRunner<B> {
    fn load(
        loading: &Loading<'_>,
        backend: B,
        vocabulary: impl FnOnce() -> Result<Vocabulary, Failure>,
        (limits, pool): (&StepLimits, &rayon::ThreadPool),
        Others { followers, member }: Others,
    ) -> Result<Self, Failure>
    where
        B: Sync,
        Decoder<B>: Send,
    {
        let mut own = Rank::load(loading, backend, limits, pool)?;
        loading.tensors.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        warn_of_unused(loading.tensors);
        let (Vocabulary { size, mut unassigned }, mut plan) = (vocabulary()?, loading.plan.clone());
        plan.shape.vocab_size = size.min(plan.shape.vocab_size);
        unassigned.retain(|id| (*id as usize) < plan.shape.vocab_size);
        member.map_or(Ok(()), |member| own.connect(member))?;
        let (positions, spare) = Default::default();
        let results = (0..plan.result_rows).map(|_| Mutex::default()).collect();
        Ok(Self { own, followers, positions, results, spare, unassigned, since: Instant::now(), plan })
    }

    /// The class of a step's error. Ranks that have failed stay so.
    fn step_error(&self, error: candle_core::Error) -> StepError {
        match self.followers.as_ref().and_then(Followers::failure) {
            Some(reason) => StepError::new(Fault::Device, Failure::internal(format!("tensor parallel: {reason}"))),
            None => step_error(error),
        }
    }

    /// On a GPU an id outside of the embedding would trip an assertion in a kernel, after which the device is lost to this process.
    fn check_ids(&self, plan: &Plan) -> Result<(), Failure> {
        let rows = self.own.decoder.spec.vocab_size;
        match plan.tokens.iter().find(|id| **id as usize >= rows) {
            Some(id) => Err(Failure::internal(format!("token id {id} is outside the vocabulary of {rows}"))),
            None => Ok(()),
        }
    }

    /// Runs the plan's tokens, on all ranks.
    fn forward(&mut self, plan: &Plan) -> TensorResult<()> {
        let Self { own, followers, .. } = self;
        match followers {
            Some(followers) => followers.lead(plan, || own.forward(plan)),
            None => own.forward(plan),
        }
    }

    /// Runs the plan's tokens, and puts what is wanted of them into `output`.
    fn run(&mut self, plan: &Plan, output: &mut Output) -> TensorResult<()> {
        self.forward(plan)?;
        self.pool(plan, output)?;
        let all = wanted(plan).count();
        let most = self.results.len();
        for first in (0..all).step_by(most) {
            let count = most.min(all - first);
            self.positions.clear();
            self.positions.extend(wanted(plan).skip(first).take(count).map(|(token, _)| token));
            self.own.decoder.head(&mut self.own.backend, &self.positions)?;
            self.read_logits(plan, first, count, output)?;
        }
        // What ranks on GPUs have failed to sum shows only now.
        match self.followers.as_ref().and_then(Followers::failure) {
            Some(reason) => candle_core::bail!("{reason}"),
            None => Ok(()),
        }
    }

    /// What the rows of the plan that pool become.
    fn pool(&mut self, plan: &Plan, output: &mut Output) -> TensorResult<()> {
        let spans: Vec<_> = plan.rows.iter().filter(|row| row.pools).map(|row| row.start..row.start + row.len).collect();
        let Rank { backend, decoder, .. } = &mut self.own;
        let Some(pooling) = decoder.spec.pooling.as_ref().map(|spec| spec.pooling).filter(|_| !spans.is_empty()) else {
            return Ok(());
        };
        decoder.pool(backend, pooling, &spans)?;
        let results: Vec<Mutex<Vec<f32>>> = spans.iter().map(|_| Mutex::default()).collect();
        backend.each_row(decoder.pooled(), &|row, numbers| {
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
        let Rank { backend, decoder, .. } = &mut self.own;
        let these = || wanted(plan).skip(first).take(count);
        let unassigned = self.unassigned.as_slice();
        if B::SAMPLES
            && let Some(rows) = these().map(|(_, wanted)| wanted.on_device()).collect::<Option<Vec<_>>>()
            && let Some(tokens) = backend.sample(decoder.logits(), vocab, unassigned, &rows)?
        {
            tokens.into_iter().for_each(|token| RowResult::Sampled(token.map(|token| (token, None))).put(output));
            return Ok(());
        }
        let plain = |wanted: &Wanted<'_>| matches!(wanted, Wanted::Sample(sampling, _) if sampling.is_plain_greedy() && sampling.params.logprobs.is_none());
        if these().all(|(_, wanted)| plain(&wanted))
            && let Some(tokens) = backend.argmax(decoder.logits(), vocab, unassigned)?
        {
            tokens.into_iter().for_each(|token| RowResult::Sampled(token.map(|token| (token, None))).put(output));
            return Ok(());
        }
        let results = &self.results;
        backend.each_row(decoder.logits(), &|row, logits| {
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
        let own = &mut self.own;
        for part in positions.chunks(self.results.len()) {
            own.decoder.head(&mut own.backend, part).map_err(device_failure)?;
            let rows: Vec<Mutex<Vec<f32>>> = part.iter().map(|_| Mutex::default()).collect();
            let read = own.backend.each_row(own.decoder.logits(), &|row, logits| {
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

    #[cfg(test)]
    fn break_rank(&self, rank: usize, what: ranks::Break) {
        self.followers.iter().for_each(|followers| followers.break_rank(rank, what));
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
    /// What a device that samples needs; `None`: more is wanted.
    fn on_device(&self) -> Option<RowSampling> {
        match self {
            Self::Sample(sampling, nth) => sampling.on_device(*nth),
            Self::Score(..) => None,
        }
    }

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
        let mut output = std::mem::take(&mut self.spare);
        output.clear();
        self.run(plan, &mut output).map_err(|error| self.step_error(error))?;
        if output.logprobs.iter().all(Option::is_none) {
            output.logprobs.clear();
        }
        Ok(output)
    }

    fn recycle(&mut self, output: Output) {
        self.spare = output;
    }

    fn prefault(&mut self, most: usize) -> bool {
        self.followers.iter().for_each(|followers| followers.prefault(most));
        if self.own.prefault(most) {
            return true;
        }
        if self.plan.memory.gpu {
            return false; // There memory is there when it is allocated.
        }
        let mib = (self.plan.kv_bytes + self.plan.state_bytes + self.plan.step_bytes) >> 20;
        tracing::info!("memory: {mib} MiB of KV cache and step buffers resident, {} ms after the start", self.since.elapsed().as_millis());
        false
    }
}
