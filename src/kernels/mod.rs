//! Home of `unsafe`: one function per kernel, CPU and CUDA behind the same signature.
//!
//! On the CPU every kernel is ours ([`cpu`]): a row's result depends on that row alone, never on what else is in the step, and weights
//! in bf16 are read as bf16. On CUDA this version composes candle's own operations ([`composed`]), which run on any device and
//! are therefore also the oracle the CPU kernels are tested against.
//!
//! Shapes: `t` tokens of a step, `h` query heads, `kv` key/value heads, `d` head width.

#![allow(unsafe_code)]

use candle_core::{Result, Tensor};

pub mod composed;
pub mod cpu;
#[cfg(test)]
mod twin_tests;

/// How rotary embedding pairs the components of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rope {
    /// Neighbours `(2i, 2i+1)`: ERNIE, GLM, GPT-J.
    Interleaved,
    /// Halves `(i, i + d/2)`: Llama, Qwen, GPT-NeoX.
    Half,
}

/// Keys and values of one layer, in blocks.
#[derive(Debug, Clone)]
pub struct KvCache {
    /// `[blocks, block_size, kv, d]`
    pub k: Tensor,
    /// `[blocks, block_size, kv, d]`
    pub v: Tensor,
}

/// Where the tokens of a step belong: the device's half of a plan.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `[t]`, u32 on the device: rows of the embedding.
    pub tokens: Tensor,
    /// `[t]`, u32 on the device: KV slots.
    pub slots: Tensor,
    /// `[t, d/2]`, f32 on the device.
    pub cos: Tensor,
    pub sin: Tensor,
    /// Not to be changed after the first layer has run: see `groups`.
    pub rows: Vec<BatchRow>,
    pub block_size: usize,
    /// How [`composed::paged_attention`] takes the rows, made at its first call in a step; empty at the start.
    pub groups: std::sync::OnceLock<Vec<composed::Group>>,
}

/// One sequence's part of a [`Batch`].
#[derive(Debug, Clone)]
pub struct BatchRow {
    pub start: usize,
    pub len: usize,
    /// Tokens in the cache, those of this step included.
    pub context: usize,
    pub blocks: std::sync::Arc<Vec<u32>>,
}

/// Rows of `table [vocab, hidden]` for `ids [t]` → `[t, hidden]` in the activation type.
pub fn embed(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    if on_cpu(table) { cpu::embed(table, ids) } else { composed::embed(table, ids) }
}

/// `x [t, in] · w [out, in]ᵀ (+ bias [out])` → `[t, out]`.
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if on_cpu(x) { cpu::linear(x, w, bias) } else { composed::linear(x, w, bias) }
}

/// `x · (mean(x²) + eps)^-½ · w`, in f32 inside, over the last dimension of `x [.., n]`.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    if on_cpu(x) { cpu::rms_norm(x, w, eps) } else { composed::rms_norm(x, w, eps) }
}

/// Splits `qkv [t, (h + 2 kv)·d]`, rotates q and k, writes k and v to their slots of the cache, returns q `[t, h·d]`.
pub fn rope_and_store(qkv: &Tensor, heads: usize, rope: Rope, batch: &Batch, cache: &KvCache) -> Result<Tensor> {
    if on_cpu(qkv) { cpu::rope_and_store(qkv, heads, rope, batch, cache) } else { composed::rope_and_store(qkv, heads, rope, batch, cache) }
}

/// Causal attention of `q [t, h·d]` over the cached tokens of each row → `[t, h·d]`.
pub fn paged_attention(q: &Tensor, batch: &Batch, cache: &KvCache) -> Result<Tensor> {
    if on_cpu(q) { cpu::paged_attention(q, batch, cache) } else { composed::paged_attention(q, batch, cache) }
}

/// `silu(gate) · up` of `gate_up [t, 2 n]`, gate first → `[t, n]`.
pub fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    if on_cpu(gate_up) { cpu::silu_mul(gate_up) } else { composed::silu_mul(gate_up) }
}

fn on_cpu(x: &Tensor) -> bool {
    x.device().is_cpu()
}
