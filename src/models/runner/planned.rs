//! What loading a model will take, known without reading its weights.

use std::ops::Range;

use candle_core::Device;

use super::{About, ranks};
use crate::config::{EngineSettings, Quantization};
use crate::error::Failure;
use crate::kernels::candle::{Candle, has_nccl};
use crate::kernels::cpu::Cpu;
use crate::kernels::sizing::{Operation, Sizing};
use crate::kernels::{Backend, Batch, BatchRow, Footprint, StepStates};
use crate::models::choice::Kernels;
use crate::models::decoder::{self, Decoder};
use crate::models::device::{describe, device_failure, device_memory, device_of, least_memory};
use crate::models::families::Model;
use crate::models::memory::{self, Memory, MemoryPlan, Share};
use crate::models::shard::Shard;
use crate::models::spec::ModelSpec;
use crate::models::tensors::Tensors;

/// What [`ModelRunner::load`] would plan, without reading the weights.
pub struct Planned {
    /// The device's name.
    pub device: String,
    /// The formats that weights are held in.
    pub weights: String,
    pub parameters: usize,
    /// Bytes of weights a decode step reads, of all ranks.
    pub bytes_per_step: usize,
    /// Of the first rank, or the only one.
    pub memory: MemoryPlan,
    pub ranks: usize,
    /// Of each other rank, where there are some.
    pub(super) follower: Option<MemoryPlan>,
    remarks: Vec<String>,
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
        let device = device_of(settings)?;
        let kernels = Kernels::of(&device, &model.spec, settings).0;
        kernels.check(&device, settings, None)?;
        Self::on(&device, kernels, model, tensors, vocab_size, settings, share)
    }

    /// Plans before anything is loaded, so that a model which cannot fit is refused at once, instead of the system ending the process later.
    pub(super) fn on(
        device: &Device,
        kernels: Kernels,
        model: &Model,
        tensors: &Tensors<'_>,
        vocab_size: usize,
        settings: &EngineSettings,
        share: Option<Share>,
    ) -> Result<Self, Failure> {
        let planned = match kernels {
            Kernels::Cpu => Self::sized::<Cpu>,
            #[cfg(feature = "cuda")]
            Kernels::Cuda => Self::sized::<super::Cuda>,
            Kernels::Candle => Self::sized::<Candle>,
            #[cfg(test)]
            Kernels::Emulated(_) => Self::sized::<Cpu>,
        };
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
        let ranks = ranks::count(device, settings)?;
        let leader = Shard { rank: 0, ranks };
        let part = model.spec.for_shard(leader)?;
        let Sized { weight_bytes, bytes_per_step, formats } = sized::<F>(model, tensors, settings.quantization, leader)?;
        let memory = match share {
            Some(share) => share.memory,
            None => rank_memory(device, ranks, settings)?,
        };
        let own = ranks::settings_of(settings, device, leader);
        let memory = MemoryPlan::new::<F>(&part, vocab_size, weight_bytes, memory, &own, share);
        let memory = memory.map_err(|failure| if ranks > 1 { failure.of(&format!("each of {ranks} ranks")) } else { failure })?;
        let other = (ranks > 1).then(|| sized::<F>(model, tensors, settings.quantization, Shard { rank: 1, ranks })).transpose()?;
        let others_bytes = other.as_ref().map_or(0, |other| other.bytes_per_step * (ranks - 1));
        let follower = other.map(|other| memory.with_weights(other.weight_bytes));
        Ok(Self {
            device: describe(device, settings),
            weights: formats,
            parameters: ModelSpec { tied: tensors.tied, ..model.spec.clone() }.parameters(),
            bytes_per_step: bytes_per_step + others_bytes,
            memory,
            ranks,
            follower,
            remarks: remarks(model, &part, settings.quantization, ranks).chain(no_nccl(device, ranks)).collect(),
        })
    }

    /// The plan for the log and `check`.
    pub fn lines(&self) -> Vec<String> {
        let Some(follower) = &self.follower else { return self.memory.lines() };
        let others = if self.ranks == 2 { "rank 1".to_owned() } else { format!("each of ranks 1 to {}", self.ranks - 1) };
        let of = |who: &str, plan: &MemoryPlan| plan.lines().into_iter().map(|line| format!("{who}: {line}")).collect::<Vec<_>>();
        let ranks = format!("tensor parallel: {} ranks, each with a part of every layer", self.ranks);
        [vec![ranks], of("rank 0", &self.memory), of(&others, follower)].concat()
    }

    /// To be said once, at the start.
    pub fn warnings(&self) -> impl Iterator<Item = &String> {
        self.memory.warnings.iter().chain(&self.remarks)
    }

    pub(super) fn about(&self, device: &Device, settings: &EngineSettings) -> About {
        About {
            device: self.device.clone(),
            threads: if device.is_cpu() { memory::threads(settings) } else { 0 },
            weights: self.weights.clone(),
            kv_cache_dtype: self.memory.shape.kv_cache_dtype,
            parameters: self.parameters,
            bytes_per_step: self.bytes_per_step,
            memory: self.lines(),
        }
    }
}

/// What one of several ranks can take: its own GPU's memory, or its part of the host's.
fn rank_memory(device: &Device, ranks: usize, settings: &EngineSettings) -> Result<Memory, Failure> {
    if device.is_cpu() || ranks == 1 {
        let memory = device_memory(device);
        return Ok(Memory { total: memory.total / ranks, free: memory.free / ranks, ..memory });
    }
    least_memory(device, (0..ranks).map(|rank| ranks::settings_of(settings, device, Shard { rank, ranks }).device))
}

/// What is unusual about weights and ranks; `part`: what of the model a rank has.
fn remarks(model: &Model, part: &ModelSpec, quantization: Quantization, ranks: usize) -> impl Iterator<Item = String> {
    let finer = decoder::finer_formats(quantization, part);
    let whole = model.spec.undivided_mixers(ranks);
    let undivided = (whole > 0).then(|| {
        format!(
            "TENSOR_PARALLEL_SIZE={ranks}: every rank computes the attention of {whole} layers whole, and keeps all of its keys and values: its norms of \
             queries and keys go over all heads of a token"
        )
    });
    finer.into_iter().chain(undivided)
}

/// GPUs that cannot reach each other are slow.
fn no_nccl(device: &Device, ranks: usize) -> Option<String> {
    (ranks > 1 && !device.is_cpu() && !has_nccl()).then(|| {
        format!("TENSOR_PARALLEL_SIZE={ranks}: NCCL (libnccl.so.2) is not installed, so the GPUs' sums go through the host's memory, which is slow")
    })
}

/// The size of a model's weights.
pub struct Sized {
    pub weight_bytes: usize,
    bytes_per_step: usize,
    pub formats: String,
}

/// Loads a part of the model on the sizing backend and runs one token.
pub fn sized<F: Footprint>(model: &Model, tensors: &Tensors<'_>, quantization: Quantization, shard: Shard) -> Result<Sized, Failure> {
    let mut backend = Sizing::<F>::default();
    let limits = model.spec.for_shard(shard)?.step_limits(1, 1, 1);
    let mut decoder = Decoder::load(model.spec.clone(), shard, tensors, &backend, quantization, &limits)?;
    let row = BatchRow { start: 0, len: 1, context: 1, blocks: Default::default() };
    let states = StepStates { slots: vec![0], ..Default::default() };
    let ropes = &model.spec.ropes;
    let batch = Batch { tokens: &[0], positions: &[0], slots: &[0], types: &[], rows: &[row], ropes, states: &states };
    let mut run = || {
        let mut caches = decoder.caches(&backend, [1; 3], None)?;
        backend.begin(&batch)?;
        decoder.forward(&mut backend, &mut caches)?;
        match &model.spec.pooling {
            _ if !shard.leads() => Ok(()),
            Some(pooling) => decoder.pool(&mut backend, pooling.pooling, &[Range { start: 0, end: 1 }]),
            None => decoder.head(&mut backend, &[0]),
        }
    };
    run().map_err(device_failure)?;
    let weights = |operation: &&Operation| matches!(operation.name, "linear" | "experts");
    Ok(Sized {
        weight_bytes: backend.weight_bytes(),
        bytes_per_step: backend.operations.iter().filter(weights).map(|operation| operation.bytes_read).sum(),
        formats: decoder.formats(),
    })
}
