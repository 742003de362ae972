//! Numbers and matrices as they lie on the device; see `weights.h`.

use std::ffi::{CStr, c_int};

use candle_core::{Error, Result};
use half::{bf16, f16};

use super::super::emulator::{Emulator, Memory};
use super::super::functions::{BF16, F32, Matrix};
use crate::{Columns, Footprint, KvShape, MatrixSource, StepLimits, WeightFormat, quantize};

use super::Cuda;

/// The type of activations, vectors of which are f32 all the same, and of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F32,
    Bf16,
}

impl Dtype {
    pub fn code(self) -> c_int {
        if self == Self::F32 { F32 } else { BF16 }
    }

    pub fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Numbers as memory of this type.
    pub fn memory(self, emulator: &Emulator, values: &[f32], name: &CStr) -> Memory {
        match self {
            Self::F32 => Memory::of(emulator, values, name),
            Self::Bf16 => Memory::of(emulator, &values.iter().map(|value| bf16::from_f32(*value)).collect::<Vec<_>>(), name),
        }
    }

    pub fn read(self, memory: &Memory, count: usize) -> Vec<f32> {
        match self {
            Self::F32 => memory.read(count),
            Self::Bf16 => memory.read::<bf16>(count).into_iter().map(bf16::to_f32).collect(),
        }
    }
}

/// A matrix on the device; see `weights.h`.
#[derive(Debug)]
pub struct Weight {
    values: Memory,
    scales: Memory,
    units: Memory,
    pub n: usize,
    pub k: usize,
    pub format: WeightFormat,
    pub columns: Columns,
}

impl Weight {
    pub fn matrix(&self) -> Matrix {
        Matrix { values: self.values.ptr(), scales: self.scales.ptr(), units: self.units.ptr(), n: self.n as c_int, k: self.k as c_int }
    }

    pub fn bytes(&self) -> usize {
        [&self.values, &self.scales, &self.units].map(Memory::bytes).iter().sum()
    }

    pub fn form(&self) -> c_int {
        form(self.format)
    }
}

fn form(format: WeightFormat) -> c_int {
    match format {
        WeightFormat::F32 => 0,
        WeightFormat::Bf16 => 1,
        WeightFormat::Int8 => 2,
        WeightFormat::Int4 => 3,
    }
}

impl Weight {
    /// Reads a matrix and puts it into the form of `format`.
    pub fn load<S: MatrixSource>(emulator: &Emulator, source: &S, format: WeightFormat, columns: Columns) -> Result<Self> {
        let (n, k) = (source.rows(), source.width());
        let (mut values, mut scales, mut units) = (Vec::new(), Vec::<u8>::new(), Vec::<u8>::new());
        let mut reader = S::Reader::default();
        let halves = |values: &[f16]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        for i in 0..n {
            // Gates and what they gate lie side by side.
            let row = if columns == Columns::Gated { i % 2 * (n / 2) + i / 2 } else { i };
            match format {
                WeightFormat::F32 => values.extend(source.row_f32(row, &mut reader).iter().flat_map(|value| value.to_le_bytes())),
                WeightFormat::Bf16 => values.extend(source.row_bf16(row, &mut reader).iter().flat_map(|value| value.to_le_bytes())),
                WeightFormat::Int8 => {
                    let row = quantize::row8(source.row_f32(row, &mut reader)).map_err(|error| Error::Msg(error.to_string()))?;
                    values.extend(row.values.iter().map(|value| *value as u8));
                    scales.extend(halves(&row.scales));
                }
                WeightFormat::Int4 => {
                    let row = quantize::row4(source.row_f32(row, &mut reader)).map_err(|error| Error::Msg(error.to_string()))?;
                    for group in row.values.chunks_exact(quantize::BLOCK) {
                        values.extend((0..16).map(|i| group[i] | group[i + 16] << 4));
                    }
                    scales.extend(row.scales.iter().zip(&row.mins).flat_map(|(scale, min)| [*scale, *min]));
                    units.extend(row.d.iter().zip(&row.dmin).flat_map(|(d, dmin)| halves(&[*d, *dmin])));
                }
            }
        }
        let memory = |bytes: &[u8], name| Memory::of(emulator, bytes, name);
        Ok(Self {
            values: memory(&values, c"weights"),
            scales: memory(&scales, c"scales"),
            units: memory(&units, c"units"),
            n,
            k,
            format,
            columns,
        })
    }
}

/// In bf16. Buffers and what a step needs besides are not planned yet.
impl Footprint for Cuda {
    fn weight_bytes(rows: usize, width: usize, _is_bf16: bool, format: Option<WeightFormat>, _columns: Columns) -> (WeightFormat, usize) {
        let format = format.unwrap_or(WeightFormat::Bf16);
        let bytes = match format {
            WeightFormat::F32 => rows * width * 4,
            WeightFormat::Bf16 => rows * width * 2,
            WeightFormat::Int8 => rows * (width + width / quantize::BLOCK * 2),
            WeightFormat::Int4 => rows * (width / 2 + width / quantize::BLOCK * 2 + width / quantize::SUPER_BLOCK * 4),
        };
        (format, bytes)
    }

    fn kv_block_bytes(shape: KvShape) -> usize {
        2 * shape.block_size * shape.kv_heads * shape.head_dim * Dtype::Bf16.bytes()
    }

    fn buffer_bytes(rows: usize, width: usize) -> Option<usize> {
        rows.checked_mul(width)?.checked_mul(Dtype::Bf16.bytes())
    }

    fn own_bytes(_limits: &StepLimits, _threads: usize) -> Option<usize> {
        None
    }
}
