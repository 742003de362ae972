//! The sizing backend computes nothing and counts: bytes of weights as they would be held, and of a step its operations with the bytes they
//! read and the products they form.
//!
//! Loading a decoder on it reads no matrix, so the memory plan can be made first; running a step on it describes the program.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

use candle_core::{Error, Result};

use super::ops::{
    AttentionSpec, AttentionWeights, Batch, BatchRow, Columns, Epilogue, Experts, KvShape, Linear, Norm, TableRow, WeightFormat,
};
use super::{Backend, CausalConv, Footprint, GatedDelta, HeadColumns, LatentSpec, MatrixSource, RowVisitor};

/// A matrix that is not there.
#[derive(Debug, Clone, Copy)]
pub struct Weight {
    pub rows: usize,
    pub width: usize,
    pub bytes: usize,
    pub format: WeightFormat,
    columns: Columns,
}

/// Rows that are not there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Buffer {
    pub rows: usize,
    pub width: usize,
}

/// One operation of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    pub name: &'static str,
    /// Of weights and of the KV cache.
    pub bytes_read: usize,
    /// Multiplications that are added up.
    pub products: usize,
}

/// Counts for the device whose backend is `F`.
pub struct Sizing<F> {
    weight_bytes: Cell<usize>,
    rows: Vec<BatchRow>,
    tokens: usize,
    /// Of the step at hand, in order.
    pub operations: Vec<Operation>,
    device: PhantomData<F>,
}

impl<F> Default for Sizing<F> {
    fn default() -> Self {
        Self { weight_bytes: Cell::new(0), rows: Vec::new(), tokens: 0, operations: Vec::new(), device: PhantomData }
    }
}

impl<F: Footprint> Sizing<F> {
    /// Bytes of all matrices made so far.
    pub fn weight_bytes(&self) -> usize {
        self.weight_bytes.get()
    }

    fn count(&mut self, name: &'static str, bytes_read: usize, products: usize) {
        self.operations.push(Operation { name, bytes_read, products });
    }
}

impl<F: Footprint> Backend for Sizing<F> {
    type Buffer = Buffer;
    type Weight = Weight;
    type Vector = usize;
    type KvCache = KvShape;
    type State = Buffer;

    fn buffer(&self, _rows: usize, width: usize) -> Result<Buffer> {
        Ok(Buffer { rows: 0, width })
    }

    fn weight<S: MatrixSource>(&self, source: &S, format: Option<WeightFormat>, columns: Columns) -> Result<Weight> {
        let (rows, width) = (source.rows(), source.width());
        let (format, bytes) = F::weight_bytes(rows, width, source.is_bf16(), format, columns);
        self.weight_bytes.set(self.weight_bytes.get() + bytes);
        Ok(Weight { rows, width, bytes, format, columns })
    }

    fn vector(&self, values: Vec<f32>) -> Result<usize> {
        Ok(values.len())
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvShape> {
        Ok(shape)
    }

    fn state(&self, slots: usize, width: usize) -> Result<Buffer> {
        Ok(Buffer { rows: slots, width })
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<()> {
        self.tokens = batch.tokens.len();
        self.rows = batch.rows.to_vec();
        self.operations.clear();
        Ok(())
    }

    fn end(&mut self) {
        self.rows.clear();
    }

    fn embed(&mut self, table: &Weight, _scale: f32, out: &mut Buffer) -> Result<()> {
        *out = Buffer { rows: self.tokens, width: table.width };
        self.count("embed", self.tokens * table.bytes / table.rows.max(1), 0);
        Ok(())
    }

    fn embed_add(&mut self, table: &Weight, _row: TableRow, _out: &mut Buffer) -> Result<()> {
        self.count("embed_add", self.tokens * table.bytes / table.rows.max(1), 0);
        Ok(())
    }

    fn norm(&mut self, x: &Buffer, _norm: &Norm<usize>, out: &mut Buffer) -> Result<()> {
        *out = *x;
        self.count("norm", 0, 0);
        Ok(())
    }

    fn norm_add(&mut self, _x: &Buffer, _norm: &Norm<usize>, _factor: f32, _out: &mut Buffer) -> Result<()> {
        self.count("norm_add", 0, 0);
        Ok(())
    }

    fn linear(&mut self, x: &Buffer, linear: &Linear<Weight, usize>, epilogue: Epilogue, out: &mut Buffer) -> Result<()> {
        let Weight { rows, width, bytes, columns, .. } = linear.weight;
        let is_gated = matches!(epilogue, Epilogue::Gated(_));
        if x.width != width || is_gated != (columns == Columns::Gated) {
            return Err(Error::Msg(format!("rows of {} numbers for a matrix [{rows}, {width}] that ends in {epilogue:?}", x.width)));
        }
        *out = Buffer { rows: x.rows, width: if is_gated { rows / 2 } else { rows } };
        self.count("linear", bytes, x.rows * rows * width);
        Ok(())
    }

    fn rope_and_store(
        &mut self,
        _qkv: &mut Buffer,
        _attention: &AttentionSpec,
        _weights: &AttentionWeights<usize>,
        _cache: &mut KvShape,
    ) -> Result<()> {
        self.count("rope_and_store", 0, 0);
        Ok(())
    }

    fn attend(
        &mut self,
        qkv: &Buffer,
        attention: &AttentionSpec,
        _weights: &AttentionWeights<usize>,
        cache: &KvShape,
        out: &mut Buffer,
    ) -> Result<()> {
        *out = Buffer { rows: qkv.rows, width: attention.q_width() };
        let per_token = F::kv_block_bytes(*cache) / cache.block_size;
        let seen = |position: usize, context: usize| attention.visible(position, context).len();
        let bytes = self.rows.iter().map(|row| seen(row.context - 1, row.context) * per_token).sum();
        let of_row = |row: &BatchRow| (row.context - row.len..row.context).map(|position| seen(position, row.context)).sum::<usize>();
        let pairs: usize = self.rows.iter().map(of_row).sum();
        self.count("attend", bytes, 2 * pairs * attention.q_width());
        Ok(())
    }

    fn copy_states(&mut self, _state: &mut Buffer) -> Result<()> {
        self.count("copy_states", 0, 0);
        Ok(())
    }

    fn causal_conv(&mut self, x: &Buffer, conv: &CausalConv<usize>, state: &mut Buffer, out: &mut Buffer) -> Result<()> {
        *out = Buffer { rows: x.rows, width: conv.spec.channels };
        self.count("causal_conv", 4 * self.rows.len() * state.width, x.rows * conv.spec.channels * conv.spec.kernel);
        Ok(())
    }

    fn gated_delta(
        &mut self,
        qkv: &mut Buffer,
        _gates: &mut Buffer,
        _z: &Buffer,
        delta: &GatedDelta<usize>,
        state: &mut Buffer,
        out: &mut Buffer,
    ) -> Result<()> {
        *out = Buffer { rows: qkv.rows, width: delta.spec.value_width() };
        // Every number of the state is shrunk, read, corrected and read again.
        self.count("gated_delta", 4 * self.rows.len() * state.width, 4 * qkv.rows * state.width);
        Ok(())
    }

    fn linear_heads(
        &mut self,
        x: &Buffer,
        _columns: HeadColumns,
        weights: &[Linear<Weight, usize>],
        _scratch: &mut [Buffer; 2],
        out: &mut Buffer,
    ) -> Result<()> {
        let sum = |of: fn(&Weight) -> usize| weights.iter().map(|linear| of(&linear.weight)).sum::<usize>();
        *out = Buffer { rows: x.rows, width: sum(|weight| weight.rows) };
        self.count("linear", sum(|weight| weight.bytes), x.rows * sum(|weight| weight.rows * weight.width));
        Ok(())
    }

    fn latent_rows(
        &mut self,
        q: &Buffer,
        _absorbed: &Buffer,
        _latent: &Buffer,
        spec: &LatentSpec,
        _norm: &usize,
        out: &mut Buffer,
    ) -> Result<()> {
        *out = Buffer { rows: q.rows, width: (spec.heads + 2) * spec.head_dim() };
        self.count("latent_rows", 0, 0);
        Ok(())
    }

    fn experts(
        &mut self,
        x: &Buffer,
        _router: &Buffer,
        experts: &Experts<Weight, usize>,
        _epilogue: Epilogue,
        out: &mut Buffer,
    ) -> Result<()> {
        *out = *x;
        // As many experts are read as tokens can pick, all different.
        let visits = x.rows * experts.routing.top_k;
        let sizes = experts.experts.iter().map(|expert| (&expert.gate_up.weight, &expert.down.weight));
        let (mut bytes, mut products) = (0, 0);
        for (gate_up, down) in sizes.take(visits.min(experts.routing.experts)) {
            bytes += gate_up.bytes + down.bytes;
            products = visits * (gate_up.rows * gate_up.width + down.rows * down.width);
        }
        self.count("experts", bytes, products);
        Ok(())
    }

    fn copy(&mut self, x: &Buffer, out: &mut Buffer) -> Result<()> {
        *out = *x;
        self.count("copy", 0, 0);
        Ok(())
    }

    fn pick(&mut self, x: &Buffer, rows: &[usize], out: &mut Buffer) -> Result<()> {
        *out = Buffer { rows: rows.len(), width: x.width };
        self.count("pick", 0, 0);
        Ok(())
    }

    fn mean(&mut self, x: &Buffer, spans: &[Range<usize>], out: &mut Buffer) -> Result<()> {
        *out = Buffer { rows: spans.len(), width: x.width };
        self.count("mean", 0, 0);
        Ok(())
    }

    fn scale_and_cap(&mut self, _x: &mut Buffer, _scale: f32, _cap: Option<f32>) -> Result<()> {
        self.count("scale_and_cap", 0, 0);
        Ok(())
    }

    fn gate_rows(&mut self, _gates: &Buffer, _x: &mut Buffer) -> Result<()> {
        self.count("gate_rows", 0, 0);
        Ok(())
    }

    fn all_reduce(&mut self, _x: &mut Buffer) -> Result<()> {
        self.count("all_reduce", 0, 0);
        Ok(())
    }

    fn each_row(&mut self, _x: &mut Buffer, _visit: RowVisitor<'_>) -> Result<()> {
        Err(Error::Msg("nothing is computed here".into()))
    }
}
