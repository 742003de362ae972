//! The candle backend: candle's own operations composed. It runs on any device, so it is the oracle of the other kernels, and what runs
//! on a GPU where those lack something.
//!
//! Activations are f32 on a CPU and bf16 on a GPU. Every operation allocates its result.

use std::ops::Range;

use candle_core::quantized::QTensor;
use candle_core::{D, DType, Device, Error, Result, Tensor};

use super::ops::{
    Activation, AttentionSpec, AttentionWeights, Batch, BatchRow, Columns, Epilogue, Experts, KvDtype, KvShape, Linear, Norm, NormExtent,
    NormKind, Pairing, QkNorm, TableRow, WeightFormat,
};
use super::ranks::Member;
use super::{Backend, CausalConv, Footprint, GatedDelta, HeadColumns, LatentSpec, MatrixSource, RowVisitor, StepLimits, StepStates};

mod attention;
mod conv;
mod delta;
mod load;
#[cfg(feature = "cuda")]
mod nccl;
mod ranks;

pub use attention::{Bounds, Group};
use ranks::Communicator;
pub use ranks::has_nccl;

/// Keys and values of one layer.
#[derive(Debug, Clone)]
pub struct KvCache {
    /// `[blocks, block_size, kv, d]`, in the type that it is held in.
    pub k: Tensor,
    /// The same of values.
    pub v: Tensor,
}

/// A matrix `[n, k]`.
#[derive(Debug)]
pub enum Matrix {
    Tensor(Tensor),
    /// Q8_0 or Q4_K.
    Blocks(QTensor),
}

impl Matrix {
    /// k
    fn width(&self) -> Result<usize> {
        match self {
            Self::Tensor(tensor) => tensor.dim(1),
            Self::Blocks(blocks) => blocks.shape().dims2().map(|(_, width)| width),
        }
    }
}

/// The rows of the operation that wrote it last.
#[derive(Debug, Default, Clone)]
pub struct Buffer {
    tensor: Option<Tensor>,
}

impl Buffer {
    pub fn of(tensor: Tensor) -> Self {
        Self { tensor: Some(tensor) }
    }

    /// `[rows, width]`
    pub fn tensor(&self) -> Result<&Tensor> {
        self.tensor.as_ref().ok_or_else(|| Error::Msg("a buffer is read before it is written".into()))
    }
}

/// What a token sees: [`AttentionSpec::causal`] and [`AttentionSpec::window`].
type Mask = (bool, Option<usize>);

/// Where the tokens of a step belong, on the device.
#[derive(Debug, Clone)]
pub struct Step {
    /// `[t]`, u32: rows of the embedding.
    tokens: Tensor,
    positions: Vec<u32>,
    types: Vec<u32>,
    /// `[t]`, u32: KV slots.
    slots: Tensor,
    /// Of each rope table `[t, pairs]` in f32.
    angles: Vec<(Tensor, Tensor)>,
    rows: Vec<BatchRow>,
    states: StepStates,
    /// How attention, causal or not and with a window or without one, takes the rows, made at its first call in a step.
    groups: Vec<(Mask, Vec<Group>)>,
}

/// A device driven by candle.
pub struct Candle {
    pub device: Device,
    /// Of activations, the KV cache and weights that are not quantized.
    pub dtype: DType,
    pub bounds: Bounds,
    step: Option<Step>,
    /// Where its sums meet those of others that compute the same model.
    communicator: Option<Communicator>,
}

impl Candle {
    pub fn new(device: &Device) -> Self {
        let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
        Self { device: device.clone(), dtype, bounds: Bounds::default(), step: None, communicator: None }
    }

    /// The token ids of the step at hand, `[t]` in u32, on the device: a captured graph reads them there, so others can be written in place.
    pub fn tokens(&self) -> Result<&Tensor> {
        Ok(&self.step()?.tokens)
    }

    fn step(&self) -> Result<&Step> {
        self.step.as_ref().ok_or_else(|| Error::Msg("no step has begun".into()))
    }
}

/// What a cache is held in; `own`: where its shape leaves that to the device.
fn kv_dtype(shape: KvShape, own: DType) -> Result<DType> {
    match shape.dtype {
        None => Ok(own),
        Some(KvDtype::F32) => Ok(DType::F32),
        Some(KvDtype::F16) => Ok(DType::F16),
        Some(KvDtype::Bf16) => Ok(DType::BF16),
        Some(KvDtype::Int8) => Err(shape.not_held("candle")),
    }
}

impl Footprint for Candle {
    const ALLOCATES_IN_STEPS: bool = true;

    fn weight_bytes(rows: usize, width: usize, _is_bf16: bool, format: Option<WeightFormat>, _columns: Columns) -> (WeightFormat, usize) {
        // As on a GPU: what is not quantized is bf16.
        let format = format.unwrap_or(WeightFormat::Bf16);
        (format, load::bytes(rows, width, format))
    }

    fn kv_block_bytes(shape: KvShape) -> usize {
        // On a GPU, as far as can be known without one.
        let dtype = kv_dtype(shape, DType::BF16).unwrap_or(DType::BF16);
        2 * shape.block_size * shape.kv_heads * shape.head_dim * dtype.size_in_bytes()
    }

    /// Made anew by every operation, so nothing is planned.
    fn buffer_bytes(_rows: usize, _width: usize) -> Option<usize> {
        Some(0)
    }

    /// About what the values of a step take at once.
    fn own_bytes(limits: &StepLimits, _threads: usize) -> Option<usize> {
        limits.max_tokens.checked_mul(limits.widest.checked_mul(16)?)
    }
}

impl Backend for Candle {
    type Buffer = Buffer;
    type Weight = Matrix;
    type Vector = Tensor;
    type KvCache = KvCache;
    /// `[slots, width]`, f32
    type State = Tensor;

    fn buffer(&self, _rows: usize, _width: usize) -> Result<Buffer> {
        Ok(Buffer::default())
    }

    fn weight<S: MatrixSource>(&self, source: &S, format: Option<WeightFormat>, _columns: Columns) -> Result<Matrix> {
        match format {
            Some(format @ (WeightFormat::Int8 | WeightFormat::Int4)) => load::blocks(source, format, &self.device).map(Matrix::Blocks),
            _ => load::tensor(source, self.dtype, &self.device).map(Matrix::Tensor),
        }
    }

    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        let len = values.len();
        Tensor::from_vec(values, len, &self.device)?.to_dtype(self.dtype)
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvCache> {
        let dims = (shape.blocks, shape.block_size, shape.kv_heads, shape.head_dim);
        if !self.device.is_cpu() && dims.0 * dims.1 * dims.2 * dims.3 > u32::MAX as usize {
            return Err(Error::Msg(format!(
                "the KV cache of one layer would hold more numbers ({dims:?}) than candle's CUDA kernels can address (2^32)"
            )));
        }
        let dtype = kv_dtype(shape, self.dtype)?;
        let zeros = || Tensor::zeros(dims, dtype, &self.device);
        Ok(KvCache { k: zeros()?, v: zeros()? })
    }

    fn state(&self, slots: usize, width: usize) -> Result<Tensor> {
        Tensor::zeros((slots, width), DType::F32, &self.device)
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<()> {
        let (t, device) = (batch.tokens.len(), &self.device);
        let angles = batch.ropes.iter().map(|table| {
            let angles = batch.positions.iter().flat_map(|position| table.frequencies.iter().map(move |f| *position as f32 * f));
            let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos() * table.factor, angle.sin() * table.factor)).unzip();
            let shape = (t, table.frequencies.len());
            Ok((Tensor::from_vec(cos, shape, device)?, Tensor::from_vec(sin, shape, device)?))
        });
        self.step = Some(Step {
            tokens: Tensor::from_slice(batch.tokens, t, device)?,
            positions: batch.positions.to_vec(),
            types: batch.types.to_vec(),
            slots: Tensor::from_slice(batch.slots, t, device)?,
            angles: angles.collect::<Result<_>>()?,
            rows: batch.rows.to_vec(),
            states: batch.states.clone(),
            groups: Vec::new(),
        });
        Ok(())
    }

    fn end(&mut self) {
        self.step = None;
    }

    fn embed(&mut self, table: &Matrix, scale: f32, out: &mut Buffer) -> Result<()> {
        let tokens = &self.step()?.tokens;
        let x = match table {
            Matrix::Tensor(table) => table.index_select(tokens, 0)?,
            // candle gives f32; the residual stream is bf16 on a GPU.
            Matrix::Blocks(table) => table.embedding(tokens)?.to_dtype(self.dtype)?,
        };
        out.tensor = Some(scaled(x, scale)?);
        Ok(())
    }

    fn embed_add(&mut self, table: &Matrix, row: TableRow, out: &mut Buffer) -> Result<()> {
        let step = self.step()?;
        let rows: Vec<u32> = match row {
            TableRow::Position(first) => step.positions.iter().map(|position| position + first as u32).collect(),
            TableRow::Type if step.types.is_empty() => vec![0; step.positions.len()],
            TableRow::Type => step.types.clone(),
        };
        let height = match table {
            Matrix::Tensor(table) => table.dim(0)?,
            Matrix::Blocks(table) => table.shape().dims2()?.0,
        };
        if let Some(index) = rows.iter().find(|index| **index as usize >= height) {
            return Err(Error::Msg(format!("{row:?} of a token is row {index} of a table of {height}")));
        }
        let rows = Tensor::from_slice(&rows, rows.len(), &self.device)?;
        let added = match table {
            Matrix::Tensor(table) => table.index_select(&rows, 0)?,
            Matrix::Blocks(table) => table.embedding(&rows)?.to_dtype(self.dtype)?,
        };
        out.tensor = Some(out.tensor()?.add(&added)?);
        Ok(())
    }

    fn norm(&mut self, x: &Buffer, norm: &Norm<Tensor>, out: &mut Buffer) -> Result<()> {
        out.tensor = Some(normalized(x.tensor()?, norm)?);
        Ok(())
    }

    fn norm_add(&mut self, x: &Buffer, norm: &Norm<Tensor>, factor: f32, out: &mut Buffer) -> Result<()> {
        out.tensor = Some(out.tensor()?.add(&scaled(normalized(x.tensor()?, norm)?, factor)?)?);
        Ok(())
    }

    fn linear(&mut self, x: &Buffer, linear: &Linear<Matrix, Tensor>, epilogue: Epilogue, out: &mut Buffer) -> Result<()> {
        let y = multiply(x.tensor()?, &linear.weight, linear.bias.as_ref())?;
        out.tensor = Some(match epilogue {
            Epilogue::Store => y,
            Epilogue::Add(factor) => out.tensor()?.add(&scaled(y, factor)?)?,
            Epilogue::Activate(activation) => activated(&y, activation)?,
            Epilogue::Gated(activation) => gated(&y, activation)?,
        });
        Ok(())
    }

    /// Leaves the queries alone in the buffer.
    fn rope_and_store(
        &mut self,
        qkv: &mut Buffer,
        attention: &AttentionSpec,
        weights: &AttentionWeights<Tensor>,
        cache: &mut KvCache,
    ) -> Result<()> {
        let step = self.step()?;
        let prepared = Prepared::new(qkv.tensor()?, attention, weights, step)?;
        let (blocks, block_size, kv, d) = cache.k.dims4()?;
        let t = step.positions.len();
        let index = step.slots.unsqueeze(1)?.broadcast_as((t, kv * d))?.contiguous()?;
        for (cache, new) in [(&cache.k, prepared.k), (&cache.v, prepared.v)] {
            cache.reshape((blocks * block_size, kv * d))?.scatter_set(&index, &new.to_dtype(cache.dtype())?.contiguous()?, 0)?;
        }
        qkv.tensor = Some(prepared.q);
        Ok(())
    }

    fn attend(
        &mut self,
        qkv: &Buffer,
        attention: &AttentionSpec,
        weights: &AttentionWeights<Tensor>,
        cache: &KvCache,
        out: &mut Buffer,
    ) -> Result<()> {
        let q = qkv.tensor()?;
        let Some(step) = &mut self.step else { return Err(Error::Msg("no step has begun".into())) };
        let (_, block_size, ..) = cache.k.dims4()?;
        // Once per step: all layers with this mask look at the same places.
        let mask = (attention.causal, attention.window);
        if !step.groups.iter().any(|(of, _)| *of == mask) {
            let groups = attention::groups(&step.rows, block_size, attention, self.bounds, &self.device)?;
            step.groups.push((mask, groups));
        }
        let groups = step.groups.iter().find(|(of, _)| *of == mask).map_or(&[][..], |(_, groups)| groups);
        let parts = groups.iter().map(|group| group.attention(q, attention, weights.sinks.as_ref(), cache)).collect::<Result<Vec<_>>>()?;
        out.tensor = Some(Tensor::cat(&parts, 0)?);
        Ok(())
    }

    fn copy_states(&mut self, state: &mut Tensor) -> Result<()> {
        let step = self.step()?;
        step.states.check(step.rows.len(), state.dim(0)?)?;
        for (from, to) in &step.states.copies {
            state.slice_set(&state.narrow(0, *from as usize, 1)?.force_contiguous()?, 0, *to as usize)?;
        }
        Ok(())
    }

    fn causal_conv(&mut self, x: &Buffer, conv: &CausalConv<Tensor>, state: &mut Tensor, out: &mut Buffer) -> Result<()> {
        let step = self.step()?;
        out.tensor = Some(conv::causal_conv(x.tensor()?, conv, &step.rows, &step.states, state)?);
        Ok(())
    }

    fn gated_delta(
        &mut self,
        qkv: &mut Buffer,
        gates: &mut Buffer,
        z: &Buffer,
        delta: &GatedDelta<Tensor>,
        state: &mut Tensor,
        out: &mut Buffer,
    ) -> Result<()> {
        let (step, inputs) = (self.step()?, [qkv.tensor()?, gates.tensor()?, z.tensor()?]);
        out.tensor = Some(delta::gated_delta(inputs, delta, &step.rows, &step.states, state)?);
        Ok(())
    }

    fn linear_heads(
        &mut self,
        x: &Buffer,
        columns: HeadColumns,
        weights: &[Linear<Matrix, Tensor>],
        _scratch: &mut [Buffer; 2],
        out: &mut Buffer,
    ) -> Result<()> {
        let x = x.tensor()?;
        let head = |(head, linear): (usize, &Linear<Matrix, Tensor>)| {
            let input = x.narrow(1, columns.first + head * columns.stride, linear.weight.width()?)?.contiguous()?;
            multiply(&input, &linear.weight, linear.bias.as_ref())
        };
        out.tensor = Some(Tensor::cat(&weights.iter().enumerate().map(head).collect::<Result<Vec<_>>>()?, 1)?);
        Ok(())
    }

    fn latent_rows(
        &mut self,
        q: &Buffer,
        absorbed: &Buffer,
        latent: &Buffer,
        spec: &LatentSpec,
        norm: &Tensor,
        out: &mut Buffer,
    ) -> Result<()> {
        let LatentSpec { heads, nope_dim, rope_dim, rank, eps } = *spec;
        let (q, latent) = (q.tensor()?, latent.tensor()?);
        let t = q.dim(0)?;
        let rotated = q.reshape((t, heads, nope_dim + rope_dim))?.narrow(2, nope_dim, rope_dim)?;
        let queries =
            Tensor::cat(&[&rotated, &absorbed.tensor()?.reshape((t, heads, rank))?], 2)?.reshape((t, heads * (rope_dim + rank)))?;
        let vector = candle_nn::ops::rms_norm(&latent.narrow(1, 0, rank)?.contiguous()?, norm, eps)?;
        let key = Tensor::cat(&[&latent.narrow(1, rank, rope_dim)?, &vector], 1)?;
        out.tensor = Some(Tensor::cat(&[&queries, &key, &key], 1)?);
        Ok(())
    }

    fn experts(
        &mut self,
        x: &Buffer,
        router: &Buffer,
        experts: &Experts<Matrix, Tensor>,
        epilogue: Epilogue,
        out: &mut Buffer,
    ) -> Result<()> {
        let sum = routed(x.tensor()?, router.tensor()?, experts)?;
        out.tensor = Some(match epilogue {
            Epilogue::Store => sum,
            Epilogue::Add(factor) => out.tensor()?.add(&scaled(sum, factor)?)?,
            other => return Err(Error::Msg(format!("experts have no epilogue {other:?}"))),
        });
        Ok(())
    }

    fn copy(&mut self, x: &Buffer, out: &mut Buffer) -> Result<()> {
        out.tensor = Some(x.tensor()?.clone());
        Ok(())
    }

    fn pick(&mut self, x: &Buffer, rows: &[usize], out: &mut Buffer) -> Result<()> {
        let x = x.tensor()?;
        // NOTE: as many rows as there are need not be all of them in order.
        out.tensor = Some(if rows.iter().copied().eq(0..x.dim(0)?) {
            x.clone()
        } else {
            let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
            x.index_select(&Tensor::from_slice(&rows, rows.len(), &self.device)?, 0)?
        });
        Ok(())
    }

    fn mean(&mut self, x: &Buffer, spans: &[Range<usize>], out: &mut Buffer) -> Result<()> {
        let x = x.tensor()?;
        let mean = |span: &Range<usize>| x.narrow(0, span.start, span.len())?.to_dtype(DType::F32)?.mean_keepdim(0)?.to_dtype(x.dtype());
        out.tensor = Some(Tensor::cat(&spans.iter().map(mean).collect::<Result<Vec<_>>>()?, 0)?);
        Ok(())
    }

    fn scale_and_cap(&mut self, x: &mut Buffer, scale: f32, cap: Option<f32>) -> Result<()> {
        let wide = x.tensor()?.to_dtype(DType::F32)?;
        x.tensor = Some(match cap {
            Some(cap) => ((wide * f64::from(scale / cap))?.tanh()? * f64::from(cap))?,
            None => scaled(wide, scale)?,
        });
        Ok(())
    }

    fn scale(&mut self, x: &mut Buffer, factor: f32) -> Result<()> {
        x.tensor = Some(scaled(x.tensor()?.clone(), factor)?);
        Ok(())
    }

    fn gate_rows(&mut self, gates: &Buffer, x: &mut Buffer) -> Result<()> {
        let (gates, values) = (gates.tensor()?, x.tensor()?);
        let ((rows, width), parts) = (values.dims2()?, gates.dim(1)?);
        let factors = candle_nn::ops::sigmoid(gates)?.reshape((rows, parts, 1))?;
        x.tensor = Some(values.reshape((rows, parts, width / parts))?.broadcast_mul(&factors)?.reshape((rows, width))?);
        Ok(())
    }

    fn connect(&mut self, member: Member) -> Result<()> {
        self.communicator = Some(Communicator::connect(&self.device, member)?);
        Ok(())
    }

    fn all_reduce(&mut self, x: &mut Buffer) -> Result<()> {
        let Some(communicator) = &mut self.communicator else { return Err(Error::Msg("no other ranks".into())) };
        x.tensor = Some(communicator.sum(x.tensor()?)?);
        Ok(())
    }

    fn argmax(&mut self, logits: &Buffer, width: usize, masked: &[u32]) -> Result<Option<Vec<Option<u32>>>> {
        if self.device.is_cpu() {
            return Ok(None);
        }
        let logits = logits.tensor()?.narrow(1, 0, width)?.to_dtype(DType::F32)?;
        // A sum is finite where every logit is.
        let finite = logits.sum(1)?.to_vec1::<f32>()?;
        let logits = if masked.is_empty() {
            logits.contiguous()?
        } else {
            let mut mask = vec![0f32; width];
            masked.iter().for_each(|id| mask[*id as usize] = f32::NEG_INFINITY);
            logits.broadcast_add(&Tensor::from_vec(mask, (1, width), &self.device)?)?
        };
        let best = argmax(&logits)?.into_iter().zip(finite);
        Ok(Some(best.map(|(token, sum)| sum.is_finite().then_some(token)).collect()))
    }

    fn each_row(&mut self, x: &mut Buffer, visit: RowVisitor<'_>) -> Result<()> {
        let rows = x.tensor()?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        rows.into_iter().enumerate().for_each(|(row, mut numbers)| visit(row, &mut numbers));
        Ok(())
    }
}

/// Rows of activations that candle multiplies with quantized weights in their own type; more it takes in f32 alone.
const NARROW_ROWS: usize = 8;

/// `x · wᵀ + b`
fn multiply(x: &Tensor, w: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
    let out = match w {
        Matrix::Tensor(w) => x.matmul(&w.t()?)?,
        Matrix::Blocks(blocks) => {
            let x = x.contiguous()?;
            let wide = if x.dim(0)? > NARROW_ROWS { x.to_dtype(DType::F32)? } else { x.clone() };
            wide.apply_op1_no_bwd(blocks)?.to_dtype(x.dtype())?
        }
    };
    match bias {
        Some(bias) => out.broadcast_add(bias),
        None => Ok(out),
    }
}

fn scaled(x: Tensor, factor: f32) -> Result<Tensor> {
    if factor == 1.0 { Ok(x) } else { x * f64::from(factor) }
}

fn normalized(x: &Tensor, norm: &Norm<Tensor>) -> Result<Tensor> {
    let x = x.contiguous()?;
    match (norm.kind, &norm.bias) {
        (NormKind::Rms, _) => candle_nn::ops::rms_norm(&x, &norm.weight, norm.eps),
        (NormKind::Layer, Some(bias)) => candle_nn::ops::layer_norm(&x, &norm.weight, bias, norm.eps),
        (NormKind::Layer, None) => candle_nn::ops::layer_norm(&x, &norm.weight, &norm.weight.zeros_like()?, norm.eps),
    }
}

fn activated(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Silu => candle_nn::ops::silu(x),
        // candle's `gelu` is the approximation by tanh. In bf16 it rounds every step of it, and `1 + tanh` loses most of its bits.
        Activation::GeluTanh => x.to_dtype(DType::F32)?.gelu()?.to_dtype(x.dtype()),
        Activation::Relu2 => x.relu()?.sqr(),
        Activation::ClampedSwiglu => {
            let gate = x.minimum(Activation::SWIGLU_LIMIT)?;
            gate.mul(&candle_nn::ops::sigmoid(&(&gate * f64::from(Activation::SWIGLU_ALPHA))?)?)
        }
        Activation::Gelu => x.to_dtype(DType::F32)?.gelu_erf()?.to_dtype(x.dtype()),
        Activation::Tanh => x.tanh(),
    }
}

/// `activation(gate) · up` of rows that hold all gates first.
fn gated(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let n = gate_up.dim(D::Minus1)? / 2;
    let half = |from: usize| gate_up.narrow(D::Minus1, from, n)?.contiguous();
    let up = match activation {
        Activation::ClampedSwiglu => (half(n)?.clamp(-Activation::SWIGLU_LIMIT, Activation::SWIGLU_LIMIT)? + 1.0)?,
        _ => half(n)?,
    };
    activated(&half(0)?, activation)?.mul(&up)
}

/// The weighted sum of each token's experts.
fn routed(x: &Tensor, router: &Tensor, experts: &Experts<Matrix, Tensor>) -> Result<Tensor> {
    let bias = experts.choice_bias.as_ref().map(|bias| bias.to_dtype(DType::F32)?.to_vec1::<f32>()).transpose()?;
    let logits = router.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let mut visits: Vec<(Vec<u32>, Vec<f32>)> = vec![Default::default(); experts.experts.len()];
    let mut picked = Vec::new();
    for (token, logits) in logits.iter().enumerate() {
        experts.routing.route(logits, bias.as_deref(), &mut picked);
        for (expert, weight) in &picked {
            visits[*expert].0.push(token as u32);
            visits[*expert].1.push(*weight);
        }
    }
    let mut sum = x.zeros_like()?;
    for (expert, (tokens, weights)) in experts.experts.iter().zip(visits).filter(|(_, (tokens, _))| !tokens.is_empty()) {
        let n = tokens.len();
        let tokens = Tensor::from_vec(tokens, n, x.device())?;
        let hidden =
            gated(&multiply(&x.index_select(&tokens, 0)?, &expert.gate_up.weight, expert.gate_up.bias.as_ref())?, experts.activation)?;
        let out = multiply(&hidden, &expert.down.weight, expert.down.bias.as_ref())?;
        let weights = Tensor::from_vec(weights, (n, 1), x.device())?.to_dtype(out.dtype())?;
        sum = sum.index_add(&tokens, &out.broadcast_mul(&weights)?, 0)?;
    }
    Ok(sum)
}

/// The greatest number's column in each row of `logits [n, vocab]`, the lowest one on ties, which logits that were bf16 have often; candle's own argmax
/// takes any of them on CUDA.
pub fn argmax(logits: &Tensor) -> Result<Vec<u32>> {
    let device = logits.device();
    // f32 holds columns exactly up to 2^24.
    let columns = Tensor::arange(0f32, logits.dim(1)? as f32, device)?.unsqueeze(0)?;
    let lower = logits.broadcast_lt(&logits.max_keepdim(1)?)?;
    let beyond = Tensor::full(f32::INFINITY, (1, 1), device)?;
    let first = lower.where_cond(&beyond.broadcast_as(lower.shape())?, &columns.broadcast_as(lower.shape())?)?.min(1)?;
    first.to_dtype(DType::U32)?.to_vec1()
}

/// Queries, keys and values `[t, …]` as attention wants them.
struct Prepared {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Prepared {
    fn new(qkv: &Tensor, attention: &AttentionSpec, weights: &AttentionWeights<Tensor>, step: &Step) -> Result<Self> {
        let AttentionSpec { heads, kv_heads, head_dim: d, .. } = *attention;
        let t = qkv.dim(0)?;
        let part = |from: usize, heads: usize| qkv.narrow(1, from * d, heads * d)?.contiguous();
        let prepare = |x: Tensor, heads: usize, weight: &Option<Tensor>| -> Result<Tensor> {
            let x = match attention.qk_norm.filter(|norm| !norm.after_rope) {
                Some(norm) => head_norm(&x, norm, weight.as_ref(), d)?,
                None => x,
            };
            let x = match attention.rope {
                Some(rope) => rotated(&x.reshape((t, heads, d))?, rope.pairing, &step.angles[rope.table])?.reshape((t, heads * d))?,
                None => x,
            };
            match attention.qk_norm.filter(|norm| norm.after_rope) {
                Some(norm) => head_norm(&x, norm, weight.as_ref(), d),
                None => Ok(x),
            }
        };
        let mut q = prepare(part(0, heads)?, heads, &weights.q_norm)?;
        let k = prepare(part(heads, kv_heads)?, kv_heads, &weights.k_norm)?;
        let mut v = part(heads + kv_heads, kv_heads)?;
        if let Some(eps) = attention.value_norm {
            v = head_norm(&v, QkNorm { extent: NormExtent::Head, after_rope: false, eps }, None, d)?;
        }
        if let Some(growth) = attention.query_growth {
            let factors: Vec<f32> = step.positions.iter().map(|position| growth.factor(*position)).collect();
            q = q.broadcast_mul(&Tensor::from_vec(factors, (t, 1), q.device())?.to_dtype(q.dtype())?)?;
        }
        Ok(Self { q, k, v })
    }
}

/// RMS norm of rows of heads of `d`, each head or the whole row on its own.
fn head_norm(x: &Tensor, norm: QkNorm, weight: Option<&Tensor>, d: usize) -> Result<Tensor> {
    let (t, width) = x.dims2()?;
    let extent = if norm.extent == NormExtent::Head { d } else { width };
    let ones;
    let weight = match weight {
        Some(weight) => weight,
        None => {
            ones = Tensor::ones(extent, x.dtype(), x.device())?;
            &ones
        }
    };
    candle_nn::ops::rms_norm(&x.reshape((t * width / extent, extent))?.contiguous()?, weight, norm.eps)?.reshape((t, width))
}

/// Rotates heads `[t, heads, d]` by the angles `[t, pairs]`; what is left of a head stays.
fn rotated(x: &Tensor, pairing: Pairing, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let (t, heads, d) = x.dims3()?;
    let width = 2 * cos.dim(1)?;
    // [1, heads, t, width], the layout of candle's rope; angles at deep positions need every bit, so it rotates in f32.
    let first = x.narrow(2, 0, width)?.reshape((1, t, heads, width))?.transpose(1, 2)?.to_dtype(DType::F32)?.contiguous()?;
    let rotated = match pairing {
        Pairing::Interleaved => candle_nn::rotary_emb::rope_i(&first, cos, sin)?,
        Pairing::Half => candle_nn::rotary_emb::rope(&first, cos, sin)?,
    };
    let rotated = rotated.to_dtype(x.dtype())?.transpose(1, 2)?.reshape((t, heads, width))?;
    if width == d { rotated.contiguous() } else { Tensor::cat(&[&rotated, &x.narrow(2, width, d - width)?], 2)?.contiguous() }
}
