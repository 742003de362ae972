//! How a step is computed: one trait, [`Backend`], and its implementations. Home of `unsafe`.
//!
//! | backend | what it is |
//! |---|---|
//! | [`cpu`] | kernels of our own: a row's result depends on that row alone, weights are read in the format they are packed in |
//! | `cuda` | kernels of our own for GPUs, with the feature `cuda` and in tests |
//! | [`candle`] | candle's own operations composed: runs on any device, and is the oracle of all others |
//! | [`sizing`] | computes nothing and counts: bytes of weights and buffers, bytes read and products of a step |
//!
//! Shapes: `t` tokens of a step, `h` query heads, `kv` key/value heads, `d` components of a head.

#![allow(unsafe_code)]
// Kernels are generic for `dispatch!`, also where the compiler alone vectorises them.
#![allow(clippy::extra_unused_type_parameters)]

use std::ops::Range;

use candle_core::Result;

pub mod candle;
pub mod cpu;
#[cfg(any(test, feature = "cuda", feature = "emulator"))]
pub mod cuda;
pub mod ops;
pub mod quantize;
pub mod ranks;
pub mod sizing;
pub mod states;
#[doc(hidden)]
pub mod testing;
#[cfg(test)]
mod twin_tests;

pub use ops::{
    Activation, AttentionSpec, AttentionWeights, Batch, BatchRow, Columns, ComputeDtype, Epilogue, Expert, ExpertGroups, Experts, KvDtype,
    KvShape, Linear, Need, Norm, NormExtent, NormKind, Normalize, Pairing, QkNorm, QueryGrowth, Rope, RopeTable, RouterScore, RoutingSpec,
    RowSampling, TableRow, WeightFormat,
};

pub use states::{CausalConv, ConvKind, ConvSpec, DeltaSpec, GatedDelta, HeadColumns, LatentSpec, StateSave, StepStates};

/// A matrix `[rows, width]` to be loaded: read row by row, by any thread.
pub trait MatrixSource: Sync {
    /// What a thread keeps from one row to the next.
    type Reader: Default + Send;

    fn rows(&self) -> usize;
    fn width(&self) -> usize;
    /// All of it is stored as bf16, which then is its format unless another is asked for.
    fn is_bf16(&self) -> bool;
    /// The name of the tensor that a row belongs to, for messages.
    fn describe(&self, row: usize) -> String;
    fn row_f32<'r>(&'r self, row: usize, reader: &'r mut Self::Reader) -> &'r [f32];
    fn row_bf16<'r>(&'r self, row: usize, reader: &'r mut Self::Reader) -> &'r [half::bf16];
    /// The row as [`quantize::Row8`] has it, where it is stored so that this loses nothing: whole numbers with scales. `false`: it is not, and
    /// what the buffers hold means nothing.
    fn row_int8(&self, _row: usize, _values: &mut Vec<i8>, _scales: &mut Vec<half::f16>) -> bool {
        false
    }
}

/// How large a step can be: what a backend makes its own buffers for.
#[derive(Debug, Clone, PartialEq)]
pub struct StepLimits {
    pub max_tokens: usize,
    /// Rows of logits made at a time.
    pub max_logits: usize,
    /// The widest input of any matrix.
    pub widest: usize,
    /// Tokens in a block of the KV cache.
    pub block_size: usize,
    /// One of each kind of attention in the model.
    pub attention: Vec<AttentionSpec>,
    /// Frequencies of all rope tables together.
    pub frequencies: usize,
    /// The greatest `(hidden, intermediate, experts, top_k)` of layers with experts.
    pub experts: Option<ExpertLimits>,
}

/// See [`StepLimits::experts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertLimits {
    pub hidden: usize,
    pub intermediate: usize,
    pub experts: usize,
    pub top_k: usize,
}

/// Takes results of single rows of logits; called from any thread.
pub type RowVisitor<'a> = &'a (dyn Fn(usize, &mut [f32]) + Sync);

/// A device and its kernels. Every operation names what it reads and what it writes; buffers are made once, for the largest step.
///
/// An operation computes as many rows as its input holds: `embed` those of the step, `pick` those it was asked for, every other as many as
/// the operation before it.
pub trait Backend {
    /// Rows of activations of one width.
    type Buffer;
    /// A matrix in the format this device computes with.
    type Weight;
    /// Norm weights, biases, sinks.
    type Vector;
    /// Keys and values of one layer, in blocks.
    type KvCache;
    /// States of one layer `[slots, width]`, in f32.
    type State;

    /// A buffer for up to `rows` rows.
    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer>;

    /// A buffer for logits, which a device may hold finer than activations.
    fn logits_buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer> {
        self.buffer(rows, width)
    }

    /// Reads a matrix. `format` must fit its width ([`WeightFormat::block`]); `None` keeps it as stored, in f32 where it is not bf16.
    fn weight<S: MatrixSource>(&self, source: &S, format: Option<WeightFormat>, columns: Columns) -> Result<Self::Weight>;

    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector>;

    /// An empty cache. An error where the shape's type is not held here.
    fn kv_cache(&self, shape: KvShape) -> Result<Self::KvCache>;

    /// Zeros.
    fn state(&self, slots: usize, width: usize) -> Result<Self::State>;

    /// Takes the inputs of a step.
    fn begin(&mut self, batch: &Batch<'_>) -> Result<()>;

    /// Every layer has run: block tables are held no longer, so that a sequence can let its own grow without a copy.
    fn end(&mut self);

    /// `out = table[tokens] · scale`, one row for each token of the step.
    fn embed(&mut self, table: &Self::Weight, scale: f32, out: &mut Self::Buffer) -> Result<()>;

    /// `out += table[row of each token]`
    fn embed_add(&mut self, table: &Self::Weight, row: TableRow, out: &mut Self::Buffer) -> Result<()>;

    /// `out = norm(x)`
    fn norm(&mut self, x: &Self::Buffer, norm: &Norm<Self::Vector>, out: &mut Self::Buffer) -> Result<()>;

    /// `out += norm(x) · factor`: the end of a branch whose result is normalized.
    fn norm_add(&mut self, x: &Self::Buffer, norm: &Norm<Self::Vector>, factor: f32, out: &mut Self::Buffer) -> Result<()>;

    /// `out = epilogue(x · Wᵀ + b)`
    fn linear(
        &mut self,
        x: &Self::Buffer,
        linear: &Linear<Self::Weight, Self::Vector>,
        epilogue: Epilogue,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Normalizes and rotates queries and keys of `qkv [t, (h + 2 kv)·d]` as the spec says, and puts keys and values into their slots of the
    /// cache. The queries are left in the first `h·d` columns.
    fn rope_and_store(
        &mut self,
        qkv: &mut Self::Buffer,
        attention: &AttentionSpec,
        weights: &AttentionWeights<Self::Vector>,
        cache: &mut Self::KvCache,
    ) -> Result<()>;

    /// `out [t, h·d]`: attention of the queries in the first `h·d` columns of `qkv` over the cached tokens of their sequences.
    fn attend(
        &mut self,
        qkv: &Self::Buffer,
        attention: &AttentionSpec,
        weights: &AttentionWeights<Self::Vector>,
        cache: &Self::KvCache,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Copies states from slot to slot as the step says ([`StepStates::copies`]). Comes before the operation that goes on from them.
    fn copy_states(&mut self, state: &mut Self::State) -> Result<()>;

    /// `out [t, channels]`: the convolution of `x [t, input width]`, each row after its state; keeps states as the step says.
    fn causal_conv(
        &mut self,
        x: &Self::Buffer,
        conv: &CausalConv<Self::Vector>,
        state: &mut Self::State,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out [t, value width]`: the gated delta rule over `qkv [t, queries, keys and values]`, each row after its state; keeps states as the step says.
    /// `gates [t, 2 · value heads]` hold what decides of corrections, then what decides of shrinking, both before their sigmoid and softplus. Each
    /// head's result is normalized and multiplied by `z [t, value width]`. `qkv` and `gates` are used up.
    fn gated_delta(
        &mut self,
        qkv: &mut Self::Buffer,
        gates: &mut Self::Buffer,
        z: &Self::Buffer,
        delta: &GatedDelta<Self::Vector>,
        state: &mut Self::State,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out [t, heads · w]`: a product for each head with a matrix `[w, …]` of its own. `scratch`: room for one head's inputs and its results.
    fn linear_heads(
        &mut self,
        x: &Self::Buffer,
        columns: HeadColumns,
        weights: &[Linear<Self::Weight, Self::Vector>],
        scratch: &mut [Self::Buffer; 2],
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out [t, (heads + 2) · head dim]`: the queries, the key and the value of latent attention as [`Backend::rope_and_store`] wants them.
    /// `q [t, heads · (nope + rope)]`; `absorbed [t, heads · rank]` are its first parts times the matrices of keys; `latent [t, rank + rope]` is what
    /// the token's key is made of, whose first part is normalized.
    fn latent_rows(
        &mut self,
        q: &Self::Buffer,
        absorbed: &Self::Buffer,
        latent: &Self::Buffer,
        spec: &LatentSpec,
        norm: &Self::Vector,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out = Σ weight · expert(x)` over the experts that the router's logits `router [t, experts]` pick for each token; [`Epilogue::Add`] adds that.
    fn experts(
        &mut self,
        x: &Self::Buffer,
        router: &Self::Buffer,
        experts: &Experts<Self::Weight, Self::Vector>,
        epilogue: Epilogue,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out = x`
    fn copy(&mut self, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;

    /// `out[i] = x[rows[i]]`
    fn pick(&mut self, x: &Self::Buffer, rows: &[usize], out: &mut Self::Buffer) -> Result<()>;

    /// `out[i]` = the mean of the rows of `x` in `spans[i]`, none of which is empty.
    fn mean(&mut self, x: &Self::Buffer, spans: &[Range<usize>], out: &mut Self::Buffer) -> Result<()>;

    /// `x = cap · tanh(x · scale / cap)`, without the cap `x · scale`: what some models do to their logits.
    fn scale_and_cap(&mut self, x: &mut Self::Buffer, scale: f32, cap: Option<f32>) -> Result<()>;

    /// `x = x · factor`
    fn scale(&mut self, x: &mut Self::Buffer, factor: f32) -> Result<()> {
        self.scale_and_cap(x, factor, None)
    }

    /// `x = x · sigmoid(gates)`: each of a row's `n` gates is for an nth part of the row, which lie side by side.
    fn gate_rows(&mut self, gates: &Self::Buffer, x: &mut Self::Buffer) -> Result<()>;

    /// Takes its place among the ranks that compute a model together ([`ranks`]), when all of them are there.
    fn connect(&mut self, _member: ranks::Member) -> Result<()> {
        Err(candle_core::Error::Msg("this backend computes alone".into()))
    }

    /// `x = Σ x` over the ranks, the same bits on each of them. Every rank calls it in the same order.
    fn all_reduce(&mut self, _x: &mut Self::Buffer) -> Result<()> {
        Err(candle_core::Error::Msg("this backend computes alone".into()))
    }

    /// The index of the greatest number of each row, the lowest on ties; `None` for a row that holds something that is not finite. Columns from `width` on and
    /// those in `masked` do not count. `None`: this device leaves it to the host.
    fn argmax(&mut self, _logits: &Self::Buffer, _width: usize, _masked: &[u32]) -> Result<Option<Vec<Option<u32>>>> {
        Ok(None)
    }

    /// [`Backend::sample`] may sample.
    const SAMPLES: bool = false;

    /// A token of each row of logits, which are changed on the way; `None` for a row of which nothing can be sampled. Ids from `width` on and
    /// `unassigned` ones are never sampled. `None`: this device leaves it to the host.
    fn sample(
        &mut self,
        _logits: &mut Self::Buffer,
        _width: usize,
        _unassigned: &[u32],
        _rows: &[RowSampling],
    ) -> Result<Option<Vec<Option<u32>>>> {
        Ok(None)
    }

    /// Brings the rows to the host in f32 and calls `visit(row, numbers)` for each, on any thread.
    fn each_row(&mut self, x: &mut Self::Buffer, visit: RowVisitor<'_>) -> Result<()>;

    /// The memory behind a buffer, a cache and the backend itself, where it is the host's and given only when it is first written.
    fn buffer_memory(_buffer: &mut Self::Buffer) -> &mut [u8] {
        &mut []
    }

    fn cache_memory(_cache: &mut Self::KvCache) -> [&mut [u8]; 2] {
        [&mut [], &mut []]
    }

    fn state_memory(_state: &mut Self::State) -> &mut [u8] {
        &mut []
    }

    fn own_memory(&mut self) -> Vec<&mut [u8]> {
        Vec::new()
    }
}

/// What a backend's things take, known without making them.
pub trait Footprint {
    /// Buffers are made anew while a step runs, so that a GPU's plan leaves them out.
    const ALLOCATES_IN_STEPS: bool = false;
    /// Rows of logits computed at a time, at most. It bounds their memory when many tokens are sampled or scored in one step.
    const MOST_LOGITS: usize = 16;

    /// The format a matrix is held in, and its bytes.
    fn weight_bytes(rows: usize, width: usize, is_bf16: bool, format: Option<WeightFormat>, columns: Columns) -> (WeightFormat, usize);
    /// Bytes of one block of one layer, keys and values.
    fn kv_block_bytes(shape: KvShape) -> usize;
    /// Bytes of a buffer; `None`: more than can be counted.
    fn buffer_bytes(rows: usize, width: usize) -> Option<usize>;
    /// Bytes of a buffer for logits.
    fn logits_bytes(rows: usize, width: usize) -> Option<usize> {
        Self::buffer_bytes(rows, width)
    }
    /// Bytes the backend itself keeps for steps of this size.
    fn own_bytes(limits: &StepLimits, threads: usize) -> Option<usize>;
}
