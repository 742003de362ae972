//! A rank's part of a model on one device, with its KV cache. Where a model is computed by one device alone, that part is all of it.

use std::marker::PhantomData;

use candle_core::Result as TensorResult;

use crate::config::EngineSettings;
use crate::error::Failure;
use crate::kernels::ranks::Member;
use crate::kernels::{Backend, Batch, BatchRow, StepLimits, cpu};
use crate::models::Plan;
use crate::models::decoder::{Decoder, LayerCache};
use crate::models::device::{device_failure, without_backtrace};
use crate::models::families::Model;
use crate::models::memory::{MemoryPlan, kv_dtype};
use crate::models::shard::Shard;
use crate::models::tensors::Tensors;

/// Everything that is needed to load a part of a model onto a device.
pub struct Loading<'a> {
    pub model: &'a Model,
    pub tensors: &'a Tensors<'a>,
    pub shard: Shard,
    pub plan: &'a MemoryPlan,
    /// Of this part.
    pub settings: &'a EngineSettings,
}

impl Loading<'_> {
    /// How large its steps are. Results are made by the first rank alone.
    pub fn limits(&self) -> Result<StepLimits, Failure> {
        let (spec, shape) = (&self.model.spec, &self.plan.shape);
        let results = if self.shard.leads() { self.plan.result_rows } else { 0 };
        Ok(spec.for_shard(self.shard)?.step_limits(shape.max_num_batched_tokens, results, shape.block_size))
    }
}

pub struct Rank<B: Backend> {
    pub backend: B,
    pub decoder: Decoder<B>,
    caches: Vec<LayerCache<B>>,
    /// The rows of the current step.
    rows: Vec<BatchRow>,
    prefaulted: Prefaulted,
    /// Tensors must stay on their thread, so this type is not `Send`.
    not_send: PhantomData<*const ()>,
}

/// How much of the planned memory is resident by now.
#[derive(Default)]
struct Prefaulted {
    /// This many buffers are resident as a whole.
    buffers: usize,
    /// Of the next buffer this many bytes are.
    bytes: usize,
}

impl<B: Backend> Rank<B> {
    pub fn load(loading: &Loading<'_>, backend: B, limits: &StepLimits, pool: &rayon::ThreadPool) -> Result<Self, Failure>
    where
        B: Sync,
        Decoder<B>: Send,
    {
        let Loading { model, tensors, shard, plan, settings } = loading;
        let shape = &plan.shape;
        let spec = model.spec.clone().for_context(shape.max_model_len);
        let decoder = pool.install(|| Decoder::load(spec, *shard, tensors, &backend, settings.quantization, limits))?;
        let caches =
            decoder.caches(&backend, [shape.blocks, shape.block_size, shape.state_slots], kv_dtype(settings)).map_err(|error| {
                Failure::internal(format!("no memory for the KV cache: {}; lower {}", without_backtrace(&error), plan.kv_setting))
            })?;
        let (rows, prefaulted) = Default::default();
        Ok(Self { backend, decoder, caches, rows, prefaulted, not_send: PhantomData })
    }

    /// Takes its place among the ranks, when all of them have loaded their parts.
    pub fn connect(&mut self, member: Member) -> Result<(), Failure> {
        self.backend.connect(member).map_err(device_failure)
    }

    /// Runs the plan's tokens.
    pub fn forward(&mut self, plan: &Plan) -> TensorResult<()> {
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

    /// Touches about `most` bytes more: step buffers first, then KV cache and states layer by layer. False: all of it is resident.
    pub fn prefault(&mut self, most: usize) -> bool {
        let caches = self.caches.iter_mut().flat_map(|cache| match cache {
            LayerCache::Keys(cache) => B::cache_memory(cache),
            LayerCache::States { conv, recurrence } => [B::state_memory(conv), recurrence.as_mut().map_or(&mut [], B::state_memory)],
        });
        let buffers = self.decoder.memory().into_iter().chain(self.backend.own_memory());
        let Prefaulted { buffers: done, bytes } = &mut self.prefaulted;
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
        false
    }
}
