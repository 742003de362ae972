//! What tests of several backends share, here and in the crate that uses these kernels.

#![allow(clippy::unwrap_used)]

use half::bf16;

use super::{AttentionSpec, Backend, Columns, Linear, MatrixSource, WeightFormat};

/// A matrix in memory.
pub struct TestMatrix {
    pub rows: usize,
    pub width: usize,
    pub values: Vec<f32>,
}

impl TestMatrix {
    pub fn new(values: Vec<f32>, width: usize) -> Self {
        Self { rows: values.len() / width, width, values }
    }

    /// The matrix on a backend, as stored or in a format.
    pub fn load<B: Backend>(&self, backend: &B, format: Option<WeightFormat>, columns: Columns) -> B::Weight {
        backend.weight(self, format, columns).unwrap()
    }

    /// A product with it, in f32.
    pub fn linear<B: Backend>(&self, backend: &B, columns: Columns, bias: Option<&[f32]>) -> Linear<B::Weight, B::Vector> {
        let bias = bias.map(|bias| backend.vector(bias.to_vec()).unwrap());
        Linear { weight: self.load(backend, None, columns), bias }
    }
}

impl MatrixSource for TestMatrix {
    type Reader = Vec<bf16>;

    fn rows(&self) -> usize {
        self.rows
    }

    fn width(&self) -> usize {
        self.width
    }

    fn is_bf16(&self) -> bool {
        false
    }

    fn describe(&self, _row: usize) -> String {
        "test".into()
    }

    fn row_f32<'r>(&'r self, row: usize, _reader: &'r mut Vec<bf16>) -> &'r [f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }

    fn row_bf16<'r>(&'r self, row: usize, reader: &'r mut Vec<bf16>) -> &'r [bf16] {
        reader.clear();
        reader.extend(self.values[row * self.width..(row + 1) * self.width].iter().map(|value| bf16::from_f32(*value)));
        reader
    }
}

/// The rows of a buffer, one after another.
pub fn read<B: Backend>(backend: &mut B, buffer: &mut B::Buffer) -> Vec<f32> {
    let rows = std::sync::Mutex::new(Vec::new());
    backend.each_row(buffer, &|row, values| rows.lock().unwrap().push((row, values.to_vec()))).unwrap();
    let mut rows = rows.into_inner().unwrap();
    rows.sort_by_key(|(row, _)| *row);
    rows.into_iter().flat_map(|(_, values)| values).collect()
}

/// A buffer that holds these rows: written by an embedding whose table they are.
pub fn write<B: Backend>(backend: &mut B, rows: &[f32], width: usize) -> B::Buffer {
    let mut out = backend.buffer(rows.len() / width, width).unwrap();
    write_over(backend, rows, width, &mut out);
    out
}

/// The same into a buffer with room for them. It begins a step of its own.
pub fn write_over<B: Backend>(backend: &mut B, rows: &[f32], width: usize, out: &mut B::Buffer) {
    let t = (rows.len() / width) as u32;
    let tokens: Vec<u32> = (0..t).collect();
    let row = super::BatchRow { start: 0, len: t as usize, context: t as usize, blocks: std::sync::Arc::new(vec![0]) };
    backend
        .begin(&super::Batch {
            tokens: &tokens,
            positions: &tokens,
            slots: &tokens,
            types: &[],
            rows: &[row],
            ropes: &[],
            states: &Default::default(),
        })
        .unwrap();
    let table = TestMatrix::new(rows.to_vec(), width).load(backend, None, Columns::Plain);
    backend.embed(&table, 1.0, out).unwrap();
}

/// Full attention with the usual scale and nothing else.
pub fn plain_attention(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionSpec {
    AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        causal: true,
        window: None,
        soft_cap: None,
        rope: None,
        qk_norm: None,
        value_norm: None,
        query_growth: None,
    }
}
