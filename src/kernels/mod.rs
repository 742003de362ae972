//! Home of `unsafe`: one function per kernel, CPU and CUDA behind the same signature.
//!
//! [`Activations`] are the values that flow through one step; each method is a kernel that reads some of them and writes one. On the CPU every
//! kernel is ours ([`cpu`]): buffers are made once, a row's result depends on that row alone, never on what else is in the step, and
//! weights are read in the form they are packed in. On CUDA this version composes candle's own operations ([`composed`]), which run on
//! any device and are therefore also the oracle the CPU kernels are tested against.
//!
//! Shapes: `t` tokens of a step, `h` query heads, `kv` key/value heads, `d` head width.

#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{Result, Tensor};

pub mod composed;
pub mod cpu;
#[cfg(test)]
mod twin_tests;

pub use composed::Batch;

/// How rotary embedding pairs the components of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rope {
    /// Neighbours `(2i, 2i+1)`: ERNIE, GLM, GPT-J.
    Interleaved,
    /// Halves `(i, i + d/2)`: Llama, Qwen, GPT-NeoX.
    Half,
}

/// What activations are where they meet weights of bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Products {
    /// f32, or two terms of bf16 where tiles of them are faster still.
    #[default]
    F32,
    /// Rounded to bf16 on processors that multiply bf16 faster. Elsewhere f32.
    Bf16,
}

/// One sequence's part of a step.
#[derive(Debug, Clone)]
pub struct BatchRow {
    pub start: usize,
    pub len: usize,
    /// Tokens in the cache, those of this step included.
    pub context: usize,
    pub blocks: Arc<Vec<u32>>,
}

/// What a step runs, as plain numbers.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// `[t]`: rows of the embedding.
    pub tokens: &'a [u32],
    /// `[t]`: position of each token in its own sequence.
    pub positions: &'a [u32],
    /// `[t]`: KV slots.
    pub slots: &'a [u32],
    pub rows: &'a [BatchRow],
    /// `[d/2]`: a token's angles are its position times these.
    pub frequencies: &'a [f32],
}

/// How large the values of a step can be.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub max_tokens: usize,
    /// Rows of logits made at a time.
    pub max_logits: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv: usize,
    pub d: usize,
    pub intermediate: usize,
    pub vocab: usize,
    pub block_size: usize,
}

/// Keys and values of one layer, in blocks.
pub enum KvCache {
    Cpu(cpu::Cache),
    Tensors(composed::KvCache),
}

/// A weight matrix `[n, k]` in the form its device computes with.
#[derive(Debug)]
pub enum Matrix {
    Packed(cpu::packed::Packed),
    Tensor(Tensor),
    /// Q8_0 or Q4_K.
    Blocks(QTensor),
}

impl Matrix {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Packed(packed) => packed.bytes(),
            Self::Tensor(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Self::Blocks(blocks) => blocks.storage_size_in_bytes(),
        }
    }
}

/// The values of one step. Methods come in the order of a forward pass.
pub enum Activations {
    Cpu(Box<cpu::Activations>),
    Tensors(Box<composed::Activations>),
}

impl Activations {
    /// Takes the inputs of a step.
    pub fn begin(&mut self, inputs: &Inputs<'_>) -> Result<()> {
        match self {
            Self::Cpu(values) => values.begin(inputs),
            Self::Tensors(values) => values.begin(inputs),
        }
    }

    /// Every layer has run: block tables are held no longer, so that a sequence can let its own grow without a copy.
    pub fn end(&mut self) {
        match self {
            Self::Cpu(values) => values.end(),
            Self::Tensors(values) => values.batch = None,
        }
    }

    /// `x = table[tokens]`, `[t, hidden]`: the residual stream.
    pub fn embed(&mut self, table: &Matrix) -> Result<()> {
        match (self, table) {
            (Self::Cpu(values), Matrix::Packed(table)) => values.embed(table),
            (Self::Tensors(values), table) => values.embed(table),
            _ => Err(mixed()),
        }
    }

    /// `normed = x · (mean(x²) + eps)^-½ · w`, in f32 inside.
    pub fn norm(&mut self, w: &Tensor, eps: f32) -> Result<()> {
        match self {
            Self::Cpu(values) => values.norm(w, eps),
            Self::Tensors(values) => values.norm(w, eps),
        }
    }

    /// `qkv = normed · wᵀ + b`, `[t, (h + 2 kv)·d]`.
    pub fn project(&mut self, w: &Matrix, bias: Option<&Tensor>) -> Result<()> {
        match (self, w) {
            (Self::Cpu(values), Matrix::Packed(w)) => values.project(w, bias),
            (Self::Tensors(values), w) => values.project(w, bias),
            _ => Err(mixed()),
        }
    }

    /// Rotates the queries and keys of `qkv`; keys and values go to their slots of the cache.
    pub fn rope_and_store(&mut self, heads: usize, rope: Rope, cache: &mut KvCache) -> Result<()> {
        match (self, cache) {
            (Self::Cpu(values), KvCache::Cpu(cache)) => values.rope_and_store(rope, cache),
            (Self::Tensors(values), KvCache::Tensors(cache)) => values.rope_and_store(heads, rope, cache),
            _ => Err(mixed()),
        }
    }

    /// `attended`, `[t, h·d]`: causal attention of the queries over the cached tokens of their rows.
    pub fn attend(&mut self, cache: &KvCache) -> Result<()> {
        match (self, cache) {
            (Self::Cpu(values), KvCache::Cpu(cache)) => values.attend(cache),
            (Self::Tensors(values), KvCache::Tensors(cache)) => values.attend(cache),
            _ => Err(mixed()),
        }
    }

    /// `x += attended · wᵀ + b`
    pub fn add_attended(&mut self, w: &Matrix, bias: Option<&Tensor>) -> Result<()> {
        match (self, w) {
            (Self::Cpu(values), Matrix::Packed(w)) => values.add_attended(w, bias),
            (Self::Tensors(values), w) => values.add_attended(w, bias),
            _ => Err(mixed()),
        }
    }

    /// `gated = silu(normed · gateᵀ) · (normed · upᵀ)`, `[t, intermediate]`; `w` holds the gates' rows first.
    pub fn gate(&mut self, w: &Matrix, bias: Option<&Tensor>) -> Result<()> {
        match (self, w) {
            (Self::Cpu(values), Matrix::Packed(w)) => values.gate(w, bias),
            (Self::Tensors(values), w) => values.gate(w, bias),
            _ => Err(mixed()),
        }
    }

    /// `x += gated · wᵀ + b`
    pub fn add_gated(&mut self, w: &Matrix, bias: Option<&Tensor>) -> Result<()> {
        match (self, w) {
            (Self::Cpu(values), Matrix::Packed(w)) => values.add_gated(w, bias),
            (Self::Tensors(values), w) => values.add_gated(w, bias),
            _ => Err(mixed()),
        }
    }

    /// Logits in f32 of the tokens `positions` of this step, `[positions, vocab]`. `x` stays, so this may be called again.
    pub fn head(&mut self, positions: &[usize], norm: &Tensor, eps: f32, w: &Matrix) -> Result<()> {
        match (self, w) {
            (Self::Cpu(values), Matrix::Packed(w)) => values.head(positions, norm, eps, w),
            (Self::Tensors(values), w) => values.head(positions, norm, eps, w),
            _ => Err(mixed()),
        }
    }
}

pub(crate) fn mixed() -> candle_core::Error {
    candle_core::Error::Msg("weights and values lie on different devices".into())
}
