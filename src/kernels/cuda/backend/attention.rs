//! Attention: which kernel takes which tokens, and in how many parts contexts are cut.

use std::ffi::{c_int, c_void};

use candle_core::{Error, Result};

use super::step::Tiles;
use super::{Buffer, Cuda, Dtype, KvCache, Use, at, at_or_null};
use crate::cuda::device::{Allocation, Device};
use crate::cuda::functions::{Attention, Preparation};
use crate::{AttentionSpec, AttentionWeights, NormExtent, Pairing};

/// Tokens of a context below which cutting it gains nothing.
const LEAST_PART: usize = 256;
const MOST_PARTS: usize = 32;
/// Contexts of steps of more tokens are not cut.
pub const CUT_TOKENS: usize = 256;

impl<D: Device> Cuda<D> {
    /// The step holds these rows, and its slots and blocks lie in the cache.
    fn check_step(&self, qkv: &Buffer<D::Memory>, attention: &AttentionSpec, cache: &KvCache<D::Memory>) -> Result<()> {
        let (step, shape) = (self.step()?, cache.shape);
        if (qkv.rows, qkv.width) != (step.tokens, attention.qkv_width()) {
            let (t, width) = (step.tokens, attention.qkv_width());
            return Err(Error::Msg(format!("[{}, {}] are not the queries, keys and values [{t}, {width}]", qkv.rows, qkv.width)));
        }
        if (shape.kv_heads, shape.head_dim) != (attention.kv_heads, attention.head_dim) {
            return Err(Error::Msg(format!("a KV cache of {shape:?} for {} heads of {}", attention.kv_heads, attention.head_dim)));
        }
        if step.highest_slot as usize >= shape.blocks * shape.block_size {
            return Err(Error::Msg(format!("slot {} is outside the KV cache", step.highest_slot)));
        }
        Ok(())
    }

    /// Contexts lie in the blocks of their rows, and those in the cache.
    fn check_blocks(&self, cache: &KvCache<D::Memory>) -> Result<()> {
        let (step, shape) = (self.step()?, cache.shape);
        if step.highest_block as usize >= shape.blocks {
            return Err(Error::Msg(format!("block {} is outside the KV cache of {}", step.highest_block, shape.blocks)));
        }
        match step.rows.iter().find(|row| row.context > row.blocks.len() * shape.block_size) {
            Some(row) => Err(Error::Msg(format!("a context of {} tokens in {} blocks", row.context, row.blocks.len()))),
            None => Ok(()),
        }
    }

    pub(super) fn prepare(
        &mut self,
        qkv: &mut Buffer<D::Memory>,
        attention: &AttentionSpec,
        weights: &AttentionWeights<D::Memory>,
        cache: &mut KvCache<D::Memory>,
    ) -> Result<()> {
        self.check_step(qkv, attention, cache)?;
        let step = self.step()?;
        let angles = match attention.rope {
            Some(rope) => Some(self.inputs.angles.get(rope.table).ok_or_else(|| Error::Msg(format!("there is no {rope:?}")))?),
            None => None,
        };
        let preparation = Preparation {
            heads: attention.heads as c_int,
            kv_heads: attention.kv_heads as c_int,
            head_dim: attention.head_dim as c_int,
            pairs: angles.map_or(0, |angles| angles.pairs() as c_int),
            interleaved: c_int::from(attention.rope.is_some_and(|rope| rope.pairing == Pairing::Interleaved)),
            extent: attention.qk_norm.map_or(0, |norm| if norm.extent == NormExtent::Head { 1 } else { 2 }),
            after_rope: c_int::from(attention.qk_norm.is_some_and(|norm| norm.after_rope)),
            norm_epsilon: attention.qk_norm.map_or(0.0, |norm| norm.eps),
            norms_values: c_int::from(attention.value_norm.is_some()),
            value_epsilon: attention.value_norm.unwrap_or(0.0),
            growth: attention.query_growth.map_or(0.0, |growth| growth.beta),
            growth_length: attention.query_growth.map_or(1, |growth| growth.length as c_int),
        };
        let (places, count) = (&step.places, step.tokens as c_int);
        // SAFETY: pointers and sizes of memory that outlives the launch; slots were checked.
        self.launch(|functions, stream| unsafe {
            (functions.rope_and_store)(
                stream,
                self.dtype.code(),
                qkv.memory.address(),
                &preparation,
                at_or_null(weights.q_norm.as_ref()),
                at_or_null(weights.k_norm.as_ref()),
                at_or_null(angles.map(|angles| &angles.cosines)),
                at_or_null(angles.map(|angles| &angles.sines)),
                places.positions.0,
                places.slots.0,
                cache.keys.address(),
                cache.values.address(),
                count,
            )
        })
    }

    /// Parts that contexts are cut into, so that so many blocks of threads for each of them keep the device busy.
    fn splits(&self, blocks: usize) -> usize {
        self.choices.splits.unwrap_or_else(|| {
            let step = self.step.iter().filter(|step| step.tokens <= CUT_TOKENS);
            let longest = step.flat_map(|step| &step.rows).map(|row| row.context).max().unwrap_or(0);
            let wanted = (2 * self.device.multiprocessors()).div_ceil(blocks.max(1));
            wanted.min(longest / LEAST_PART).clamp(1, MOST_PARTS)
        })
    }

    pub(super) fn attend_pages(
        &mut self,
        qkv: &Buffer<D::Memory>,
        spec: &AttentionSpec,
        weights: &AttentionWeights<D::Memory>,
        cache: &KvCache<D::Memory>,
        out: &mut Buffer<D::Memory>,
    ) -> Result<()> {
        self.check_step(qkv, spec, cache)?;
        self.check_blocks(cache)?;
        let (t, group) = (qkv.rows, spec.heads / spec.kv_heads);
        self.resize(out, t, spec.q_width())?;
        let on_tensor_cores =
            self.choices.attention_tiles && self.dtype == Dtype::Bf16 && group <= 64 && [64, 128, 256].contains(&spec.head_dim);
        let tiles = if on_tensor_cores { self.tiles(group)? } else { Vec::new() };
        let blocks = if on_tensor_cores { tiles.iter().map(|tiles| tiles.count).sum() } else { t };
        let splits = self.splits(blocks * spec.kv_heads);
        let bytes = if splits > 1 { t * spec.heads * splits * (spec.head_dim + 2) * size_of::<f32>() } else { 0 };
        let parts = self.scratch(Use::Parts, bytes)?;
        let a = self.attention(spec, weights.sinks.as_ref(), (splits, parts), cache)?;
        let (dtype, q, keys, values, to) = (self.dtype.code(), at(&qkv.memory), at(&cache.keys), at(&cache.values), out.memory.address());
        if !on_tensor_cores {
            // SAFETY: pointers and sizes of memory that outlives the launch; blocks were checked.
            return self.launch(|functions, stream| unsafe { (functions.attend)(stream, dtype, q, keys, values, &a, to, t as c_int) });
        }
        for Tiles { few, place, count, .. } in tiles {
            let few = c_int::from(few);
            // SAFETY: as above.
            self.launch(|functions, stream| unsafe {
                (functions.attend_tiles)(stream, q, keys, values, &a, place.0, count as c_int, few, to)
            })?;
        }
        if splits == 1 {
            return Ok(());
        }
        // SAFETY: as many parts as there are.
        self.launch(|functions, stream| unsafe { (functions.attend_merge)(stream, dtype, &a, to, t as c_int) })
    }

    fn attention(
        &self,
        spec: &AttentionSpec,
        sinks: Option<&D::Memory>,
        (splits, parts): (usize, *mut c_void),
        cache: &KvCache<D::Memory>,
    ) -> Result<Attention> {
        let step = self.step()?;
        Ok(Attention {
            heads: spec.heads as c_int,
            kv_heads: spec.kv_heads as c_int,
            head_dim: spec.head_dim as c_int,
            q_stride: spec.qkv_width() as c_int,
            scale: spec.scale,
            soft_cap: spec.soft_cap.unwrap_or(0.0),
            causal: c_int::from(spec.causal),
            // Beyond any context, and a sum with it does not overflow.
            window: spec.window.map_or(0, |window| window.min(1 << 30) as c_int),
            sinks: at_or_null(sinks),
            block_size: cache.shape.block_size as c_int,
            max_blocks: step.max_blocks as c_int,
            tables: step.places.tables.0,
            sequences: step.places.sequences.0,
            visible: step.places.visible.0,
            contexts: step.places.contexts.0,
            splits: splits as c_int,
            parts,
        })
    }
}
