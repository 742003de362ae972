//! The kernels behind [`Backend`], on any [`Device`]: what proves the CPU's operations proves these on the emulator, and a GPU runs the same.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{Error, Result};
use rayon::prelude::*;

use super::device::{Allocation, Device, memory_of};
use super::functions::{Ending, Functions, NULL, NormOf, Product, Rows};
use crate::{
    Activation, AttentionSpec, AttentionWeights, Backend, Batch, CausalConv, Columns, Epilogue, Experts, GatedDelta, HeadColumns, KvDtype,
    KvShape, LatentSpec, Linear, MatrixSource, Norm, NormKind, RowSampling, RowVisitor, StepLimits, TableRow, WeightFormat,
};

mod attention;
mod experts;
mod latent;
mod sampling;
mod scratch;
mod states;
mod step;
mod weights;

use scratch::{Scratch, Use};
pub use states::State;
use step::{Inputs, Step};
pub use weights::{Dtype, Weight};

/// Which kernels are taken where several would do, and how finely contexts are cut.
#[derive(Debug, Clone, Copy)]
pub struct Choices {
    /// None: so that the device is kept busy.
    pub splits: Option<usize>,
    /// More rows than this go to tensor cores.
    pub gemv_rows: usize,
    /// Of products on tensor cores; None: by their size.
    pub large_tiles: Option<bool>,
    /// Attention by tensor cores where it can be.
    pub attention_tiles: bool,
}

impl Default for Choices {
    fn default() -> Self {
        Self { splits: None, gemv_rows: 8, large_tiles: None, attention_tiles: true }
    }
}

#[derive(Debug)]
pub struct Buffer<M> {
    pub memory: M,
    pub rows: usize,
    pub width: usize,
    /// That of activations, but f32 of logits.
    pub dtype: Dtype,
}

#[derive(Debug)]
pub struct KvCache<M> {
    pub keys: M,
    pub values: M,
    pub shape: KvShape,
}

pub struct Cuda<D: Device> {
    pub device: D,
    pub dtype: Dtype,
    pub choices: Choices,
    step: Option<Step>,
    inputs: Inputs<D>,
    scratch: Scratch<D>,
    /// What was said when the device was lost.
    lost: OnceLock<String>,
}

const NO_NORM: NormOf = NormOf { weight: NULL, bias: NULL, epsilon: 0.0, is_layer: 0 };

/// The address of a memory, for reading.
fn at(memory: &impl Allocation) -> *const c_void {
    memory.address()
}

fn at_or_null(memory: Option<&impl Allocation>) -> *const c_void {
    memory.map_or(NULL, at)
}

fn norm_of(norm: &Norm<impl Allocation>) -> NormOf {
    let bias = at_or_null(norm.bias.as_ref());
    NormOf { weight: at(&norm.weight), bias, epsilon: norm.eps, is_layer: c_int::from(norm.kind == NormKind::Layer) }
}

fn ending(epilogue: Epilogue) -> Ending {
    let code = |activation: Activation| match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Relu2 => 2,
        Activation::ClampedSwiglu => 3,
        Activation::Gelu => 4,
        Activation::Tanh => 5,
    };
    match epilogue {
        Epilogue::Store => Ending { ending: 0, activation: 0, factor: 1.0 },
        Epilogue::Add(factor) => Ending { ending: 1, activation: 0, factor },
        Epilogue::Activate(activation) => Ending { ending: 2, activation: code(activation), factor: 1.0 },
        Epilogue::Gated(activation) => Ending { ending: 3, activation: code(activation), factor: 1.0 },
    }
}

impl<D: Device> Cuda<D> {
    pub fn new(device: D, dtype: Dtype) -> Self {
        let (inputs, scratch) = (Inputs::default(), Scratch::default());
        Self { device, dtype, choices: Choices::default(), step: None, inputs, scratch, lost: OnceLock::new() }
    }

    /// Room for steps of this size is made at once.
    pub fn for_steps(mut self, limits: &StepLimits) -> Self {
        self.inputs.most.0 = limits.max_tokens;
        self
    }

    /// Passes an error on, and remembers one after which the device is lost.
    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|error| {
            if D::is_fatal(error) {
                let _first = self.lost.set(error.to_string());
            }
        })
    }

    /// An error once the device is lost.
    pub(super) fn check_device(&self) -> Result<()> {
        match self.lost.get() {
            Some(said) => Err(Error::Cuda(format!("nothing is launched any more after {said}").into())),
            None => Ok(()),
        }
    }

    /// Launches, unless the device is lost.
    fn launch(&self, call: impl FnOnce(&Functions, *mut c_void) -> c_int) -> Result<()> {
        self.check_device()?;
        self.noted(self.device.check(call(self.device.functions(), self.device.stream())))
    }

    fn step(&self) -> Result<&Step> {
        self.step.as_ref().ok_or_else(|| Error::Msg("no step has begun".into()))
    }

    fn resize(&self, buffer: &mut Buffer<D::Memory>, rows: usize, width: usize) -> Result<()> {
        self.noted(self.device.resize(&mut buffer.memory, rows * width * buffer.dtype.bytes(), c"rows"))?;
        (buffer.rows, buffer.width) = (rows, width);
        Ok(())
    }

    fn buffer_of(&self, dtype: Dtype, rows: usize, width: usize) -> Result<Buffer<D::Memory>> {
        let memory = self.noted(self.device.allocate(rows * width * dtype.bytes(), c"rows"))?;
        Ok(Buffer { memory, rows, width, dtype })
    }

    /// Operations read activations in their own type, not logits.
    fn check_dtype(&self, x: &Buffer<D::Memory>) -> Result<()> {
        if x.dtype == self.dtype { Ok(()) } else { Err(Error::Msg(format!("[{}, {}] are no activations", x.rows, x.width))) }
    }

    /// One product, by the kernel for so many rows.
    pub fn product(&self, product: &Product, form: c_int, out_dtype: c_int) -> Result<()> {
        let rows = &product.rows;
        // Tensor cores read whole pieces of 16 bytes.
        let aligned = rows.x_stride % 8 == 0 && rows.x_step % 8 == 0 && (product.x as usize).is_multiple_of(16);
        let tiles = aligned && self.dtype == Dtype::Bf16 && form != 0 && (form != 1 || product.w.k % 8 == 0);
        let blocks = (product.rows.count as usize / 128) * (product.w.n as usize / 128) * (product.experts as usize).max(1);
        let large = c_int::from(self.choices.large_tiles.unwrap_or(blocks >= self.device.multiprocessors()));
        // SAFETY: pointers and sizes of memory that outlives the launch.
        self.launch(|functions, stream| unsafe {
            if tiles && product.rows.count as usize > self.choices.gemv_rows {
                (functions.matmul)(stream, out_dtype, form, large, product)
            } else {
                (functions.gemv)(stream, self.dtype.code(), out_dtype, form, product)
            }
        })
    }
}

impl<D: Device> Backend for Cuda<D> {
    type Buffer = Buffer<D::Memory>;
    type Weight = Weight<D::Memory>;
    type Vector = D::Memory;
    type KvCache = KvCache<D::Memory>;
    type State = State<D::Memory>;

    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer> {
        self.buffer_of(self.dtype, rows, width)
    }

    /// In f32: logits of bf16 are often equal.
    fn logits_buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer> {
        self.buffer_of(Dtype::F32, rows, width)
    }

    fn weight<S: MatrixSource>(&self, source: &S, format: Option<WeightFormat>, columns: Columns) -> Result<Self::Weight> {
        let plain = if self.dtype == Dtype::F32 && !source.is_bf16() { WeightFormat::F32 } else { WeightFormat::Bf16 };
        self.noted(Weight::load(&self.device, source, format.unwrap_or(plain), columns))
    }

    fn vector(&self, values: Vec<f32>) -> Result<D::Memory> {
        self.noted(memory_of(&self.device, &values, c"vector"))
    }

    fn kv_cache(&self, shape: KvShape) -> Result<Self::KvCache> {
        let own = if self.dtype == Dtype::F32 { KvDtype::F32 } else { KvDtype::Bf16 };
        if shape.dtype.is_some_and(|dtype| dtype != own) {
            return Err(shape.not_held("CUDA"));
        }
        let bytes = shape.blocks * shape.block_size * shape.kv_heads * shape.head_dim * self.dtype.bytes();
        // Of what no token has been written to nothing is read.
        let memory = |name| self.noted(self.device.allocate(bytes, name));
        Ok(KvCache { keys: memory(c"keys")?, values: memory(c"values")?, shape })
    }

    fn state(&self, slots: usize, width: usize) -> Result<Self::State> {
        self.empty_state(slots, width)
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<()> {
        self.begin_step(batch)
    }

    fn end(&mut self) {
        self.step = None;
    }

    fn embed(&mut self, table: &Self::Weight, scale: f32, out: &mut Self::Buffer) -> Result<()> {
        let Step { highest_token, tokens, ref places, .. } = *self.step()?;
        if highest_token as usize >= table.n {
            return Err(Error::Msg(format!("token id {highest_token} is outside the vocabulary of {}", table.n)));
        }
        let ids = places.ids.0;
        self.resize(out, tokens, table.k)?;
        let (dtype, out, count) = (self.dtype.code(), out.memory.address(), tokens as c_int);
        // SAFETY: ids were checked; `out` holds as many rows.
        self.launch(|functions, stream| unsafe { (functions.embed)(stream, dtype, table.form(), table.matrix(), ids, scale, out, count) })
    }

    fn embed_add(&mut self, table: &Self::Weight, row: TableRow, out: &mut Self::Buffer) -> Result<()> {
        let step = self.step()?;
        let (rows, highest, first) = match row {
            TableRow::Position(first) => (step.places.positions.0, step.highest_position, first),
            TableRow::Type => (step.places.types.map_or(NULL, |place| place.0), step.highest_type, 0),
        };
        if first + highest as usize >= table.n {
            return Err(Error::Msg(format!("{row:?} of a token is row {} of a table of {}", first + highest as usize, table.n)));
        }
        let (count, to) = (step.tokens, out.memory.address());
        if (out.rows, out.width) != (count, table.k) {
            return Err(Error::Msg(format!("rows of {} numbers cannot be added to [{}, {}]", table.k, out.rows, out.width)));
        }
        let (dtype, form, matrix, first, count) = (self.dtype.code(), table.form(), table.matrix(), first as c_int, count as c_int);
        // SAFETY: rows of the table were checked; `out` holds one for each token.
        self.launch(|functions, stream| unsafe { (functions.embed_add)(stream, dtype, form, matrix, rows, first, to, count) })
    }

    fn norm(&mut self, x: &Self::Buffer, norm: &Norm<D::Memory>, out: &mut Self::Buffer) -> Result<()> {
        self.resize(out, x.rows, x.width)?;
        self.norms(x, NO_NORM, None, 0.0, norm_of(norm), Some(out))
    }

    fn norm_add(&mut self, x: &Self::Buffer, norm: &Norm<D::Memory>, factor: f32, out: &mut Self::Buffer) -> Result<()> {
        self.norms(x, norm_of(norm), Some(out), factor, NO_NORM, None)
    }

    fn linear(
        &mut self,
        x: &Self::Buffer,
        linear: &Linear<Self::Weight, D::Memory>,
        epilogue: Epilogue,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.check_dtype(x)?;
        let w = &linear.weight;
        let is_gated = matches!(epilogue, Epilogue::Gated(_));
        if x.width != w.k || is_gated != (w.columns == Columns::Gated) {
            return Err(Error::Msg(format!("rows of {} numbers for a matrix [{}, {}] that ends in {epilogue:?}", x.width, w.n, w.k)));
        }
        let width = if is_gated { w.n / 2 } else { w.n };
        if !matches!(epilogue, Epilogue::Add(_)) {
            self.resize(out, x.rows, width)?;
        }
        if (out.rows, out.width) != (x.rows, width) {
            return Err(Error::Msg(format!("[{}, {width}] cannot be added to [{}, {}]", x.rows, out.rows, out.width)));
        }
        let product = Product {
            x: at(&x.memory),
            w: w.matrix(),
            of_experts: NULL,
            biases: NULL,
            bias: at_or_null(linear.bias.as_ref()),
            rows: Rows::dense(x.rows, w.k, width),
            epilogue: ending(epilogue),
            out: out.memory.address(),
            experts: 0,
        };
        self.product(&product, w.form(), out.dtype.code())
    }

    fn rope_and_store(
        &mut self,
        qkv: &mut Self::Buffer,
        attention: &AttentionSpec,
        weights: &AttentionWeights<D::Memory>,
        cache: &mut Self::KvCache,
    ) -> Result<()> {
        self.prepare(qkv, attention, weights, cache)
    }

    fn attend(
        &mut self,
        qkv: &Self::Buffer,
        attention: &AttentionSpec,
        weights: &AttentionWeights<D::Memory>,
        cache: &Self::KvCache,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.attend_pages(qkv, attention, weights, cache, out)
    }

    fn copy_states(&mut self, state: &mut Self::State) -> Result<()> {
        self.copy_slots(state)
    }

    fn causal_conv(
        &mut self,
        x: &Self::Buffer,
        conv: &CausalConv<D::Memory>,
        state: &mut Self::State,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.convolve(x, conv, state, out)
    }

    fn gated_delta(
        &mut self,
        qkv: &mut Self::Buffer,
        gates: &mut Self::Buffer,
        z: &Self::Buffer,
        delta: &GatedDelta<D::Memory>,
        state: &mut Self::State,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.delta_rule([qkv, gates, z], delta, state, out)
    }

    fn linear_heads(
        &mut self,
        x: &Self::Buffer,
        columns: HeadColumns,
        weights: &[Linear<Self::Weight, D::Memory>],
        _scratch: &mut [Self::Buffer; 2],
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.products_of_heads(x, columns, weights, out)
    }

    fn latent_rows(
        &mut self,
        q: &Self::Buffer,
        absorbed: &Self::Buffer,
        latent: &Self::Buffer,
        spec: &LatentSpec,
        norm: &D::Memory,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        self.rows_of_latent([q, absorbed, latent], spec, norm, out)
    }

    fn experts(
        &mut self,
        x: &Self::Buffer,
        router: &Self::Buffer,
        experts: &Experts<Self::Weight, D::Memory>,
        epilogue: Epilogue,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let (factor, adds) = match epilogue {
            Epilogue::Add(factor) => (factor, true),
            Epilogue::Store => (1.0, false),
            other => return Err(Error::Msg(format!("experts have no epilogue {other:?}"))),
        };
        if !adds {
            self.resize(out, x.rows, x.width)?;
        }
        self.routed(x, router, experts, factor, adds, out)
    }

    fn copy(&mut self, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()> {
        self.resize(out, x.rows, x.width)?;
        self.picked(x, NULL, out)
    }

    fn pick(&mut self, x: &Self::Buffer, rows: &[usize], out: &mut Self::Buffer) -> Result<()> {
        if let Some(row) = rows.iter().find(|row| **row >= x.rows) {
            return Err(Error::Msg(format!("row {row} of {}", x.rows)));
        }
        self.resize(out, rows.len(), x.width)?;
        let rows = self.list(&rows.iter().map(|row| *row as u32).collect::<Vec<_>>(), c"picked rows")?;
        self.picked(x, rows.0, out)
    }

    fn mean(&mut self, x: &Self::Buffer, spans: &[Range<usize>], out: &mut Self::Buffer) -> Result<()> {
        if let Some(span) = spans.iter().find(|span| span.is_empty() || span.end > x.rows) {
            return Err(Error::Msg(format!("the mean of rows {span:?} of {}", x.rows)));
        }
        self.resize(out, spans.len(), x.width)?;
        let ends: Vec<u32> = spans.iter().flat_map(|span| [span.start as u32, span.end as u32]).collect();
        let (ends, from, to) = (self.list(&ends, c"spans")?.0, at(&x.memory), out.memory.address());
        let (dtype, count, width) = (self.dtype.code(), spans.len() as c_int, x.width as c_int);
        // SAFETY: spans were checked; `out` holds a row for each.
        self.launch(|functions, stream| unsafe { (functions.mean)(stream, dtype, from, ends, to, count, width) })
    }

    fn scale_and_cap(&mut self, x: &mut Self::Buffer, scale: f32, cap: Option<f32>) -> Result<()> {
        let (dtype, at, count) = (x.dtype.code(), x.memory.address(), x.rows * x.width);
        // SAFETY: as many numbers as the buffer holds.
        self.launch(|functions, stream| unsafe { (functions.scale_and_cap)(stream, dtype, at, count, scale, cap.unwrap_or(0.0)) })
    }

    fn gate_rows(&mut self, gates: &Self::Buffer, x: &mut Self::Buffer) -> Result<()> {
        if gates.rows != x.rows || gates.width == 0 || !x.width.is_multiple_of(gates.width) {
            return Err(Error::Msg(format!("[{}, {}] are no gates of [{}, {}]", gates.rows, gates.width, x.rows, x.width)));
        }
        let (rows, width, part) = (x.rows as c_int, x.width as c_int, (x.width / gates.width) as c_int);
        let (dtype, gates, to) = (self.dtype.code(), at(&gates.memory), x.memory.address());
        // SAFETY: a gate for each part of each row.
        self.launch(|functions, stream| unsafe { (functions.gate_rows)(stream, dtype, gates, to, rows, width, part) })
    }

    const SAMPLES: bool = true;

    fn sample(
        &mut self,
        logits: &mut Self::Buffer,
        width: usize,
        unassigned: &[u32],
        rows: &[RowSampling],
    ) -> Result<Option<Vec<Option<u32>>>> {
        self.sampled(logits, width, unassigned, rows).map(Some)
    }

    fn each_row(&mut self, x: &mut Self::Buffer, visit: RowVisitor<'_>) -> Result<()> {
        self.check_device()?;
        let mut values = self.noted(x.dtype.read(&self.device, &x.memory, x.rows * x.width))?;
        values.par_chunks_exact_mut(x.width.max(1)).enumerate().for_each(|(row, values)| visit(row, values));
        Ok(())
    }
}

impl<D: Device> Cuda<D> {
    /// See `norm_rows`.
    pub fn norms(
        &self,
        x: &Buffer<D::Memory>,
        first: NormOf,
        residual: Option<&mut Buffer<D::Memory>>,
        factor: f32,
        second: NormOf,
        out: Option<&mut Buffer<D::Memory>>,
    ) -> Result<()> {
        self.check_dtype(x)?;
        let to = |buffer: Option<&mut Buffer<D::Memory>>| -> Result<*mut c_void> {
            match buffer {
                Some(buffer) if buffer.dtype != self.dtype => Err(Error::Msg("a norm ends in activations".into())),
                Some(buffer) if (buffer.rows, buffer.width) != (x.rows, x.width) => {
                    Err(Error::Msg(format!("[{}, {}] cannot be added to [{}, {}]", x.rows, x.width, buffer.rows, buffer.width)))
                }
                Some(buffer) => Ok(buffer.memory.address()),
                None => Ok(std::ptr::null_mut()),
            }
        };
        let (from, residual, out) = (at(&x.memory), to(residual)?, to(out)?);
        let (dtype, rows, width) = (self.dtype.code(), x.rows as c_int, x.width as c_int);
        // SAFETY: all of one shape.
        self.launch(|functions, stream| unsafe { (functions.norm)(stream, dtype, from, first, residual, factor, second, out, rows, width) })
    }

    /// Keys and values of a whole cache, slot by slot: for comparisons.
    pub fn stored(&self, cache: &KvCache<D::Memory>) -> Result<(Vec<f32>, Vec<f32>)> {
        let KvShape { blocks, block_size, kv_heads, head_dim, .. } = cache.shape;
        let read = |memory| self.noted(self.dtype.read(&self.device, memory, blocks * block_size * kv_heads * head_dim));
        Ok((read(&cache.keys)?, read(&cache.values)?))
    }

    fn picked(&self, x: &Buffer<D::Memory>, rows: *const c_void, out: &mut Buffer<D::Memory>) -> Result<()> {
        self.check_dtype(x).and(self.check_dtype(out))?;
        let (from, to) = (at(&x.memory), out.memory.address());
        let (dtype, count, width) = (self.dtype.code(), out.rows as c_int, out.width as c_int);
        // SAFETY: rows were checked.
        self.launch(|functions, stream| unsafe { (functions.pick)(stream, dtype, from, rows, to, count, width) })
    }
}
