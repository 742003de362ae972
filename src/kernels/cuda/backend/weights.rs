//! Numbers and matrices as they lie on the device; see `weights.h`.

use std::ffi::c_int;
use std::ops::Range;
use std::sync::Mutex;

use candle_core::Result;
use half::bf16;
use rayon::prelude::*;

use super::Cuda;
use super::attention::CUT_TOKENS;
use crate::cpu::load::{check, note};
use crate::cuda::device::{Allocation, Device, bytes_of, read_numbers};
use crate::cuda::functions::{BF16, F32, Matrix};
use crate::{AttentionSpec, Columns, Footprint, KvShape, MatrixSource, StepLimits, WeightFormat, quantize};

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

    /// The first numbers of memory of this type.
    pub fn read<D: Device>(self, device: &D, memory: &D::Memory, count: usize) -> Result<Vec<f32>> {
        Ok(match self {
            Self::F32 => read_numbers(device, memory, count)?,
            Self::Bf16 => {
                read_numbers::<D, u16>(device, memory, count)?.into_par_iter().map(|bits| bf16::from_bits(bits).to_f32()).collect()
            }
        })
    }
}

/// A matrix on the device; see `weights.h`.
#[derive(Debug)]
pub struct Weight<M> {
    values: M,
    scales: M,
    units: M,
    pub n: usize,
    pub k: usize,
    pub format: WeightFormat,
    pub columns: Columns,
}

impl<M: Allocation> Weight<M> {
    pub fn matrix(&self) -> Matrix {
        let at = |memory: &M| memory.address().cast_const();
        Matrix { values: at(&self.values), scales: at(&self.scales), units: at(&self.units), n: self.n as c_int, k: self.k as c_int }
    }

    pub fn bytes(&self) -> usize {
        [&self.values, &self.scales, &self.units].map(M::bytes).iter().sum()
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

/// Bytes of a row: of its values, its scales and their units.
fn row_bytes(width: usize, format: WeightFormat) -> [usize; 3] {
    match format {
        WeightFormat::F32 => [width * 4, 0, 0],
        WeightFormat::Bf16 => [width * 2, 0, 0],
        WeightFormat::Int8 => [width, width / quantize::BLOCK * 2, 0],
        WeightFormat::Int4 => [width / 2, width / quantize::BLOCK * 2, width / quantize::SUPER_BLOCK * 4],
    }
}

/// Rows that a thread reads at a time.
const TASK_ROWS: usize = 16;

impl<M: Allocation> Weight<M> {
    /// Reads a matrix and puts it into the form of `format`; rows are read by all threads of the pool at hand.
    pub fn load<D: Device<Memory = M>, S: MatrixSource>(device: &D, source: &S, format: WeightFormat, columns: Columns) -> Result<Self> {
        let (n, k) = (source.rows(), source.width());
        let sizes = row_bytes(k, format);
        let memory = |which: usize, name| device.allocate(n * sizes[which], name);
        let (values, scales, units) = (memory(0, c"weights")?, memory(1, c"scales")?, memory(2, c"units")?);
        let failed = Mutex::new(None);
        let mut write = |rows: Range<usize>, parts: [&mut [u8]; 3]| -> Result<()> {
            tasks(rows, parts, sizes).into_par_iter().for_each_init(S::Reader::default, |reader, (rows, mut parts)| {
                for i in rows {
                    // Gates and what they gate lie side by side.
                    let row = if columns == Columns::Gated { i % 2 * (n / 2) + i / 2 } else { i };
                    let mut out = take_row(&mut parts, sizes);
                    note(&failed, source, row, write_row(source, row, format, reader, &mut out));
                }
            });
            Ok(())
        };
        device.fill([(&values, sizes[0]), (&scales, sizes[1]), (&units, sizes[2])], n, &mut write)?;
        check(failed)?;
        Ok(Self { values, scales, units, n, k, format, columns })
    }
}

type Parts<'a> = [&'a mut [u8]; 3];

/// The first row of each part, which then begins with the next one.
fn take_row<'a>(parts: &mut Parts<'a>, sizes: [usize; 3]) -> Parts<'a> {
    let mut which = 0;
    parts.each_mut().map(|part| {
        let (row, rest) = std::mem::take(part).split_at_mut(sizes[which]);
        (*part, which) = (rest, which + 1);
        row
    })
}

/// Cuts rows into the work of threads.
fn tasks(rows: Range<usize>, mut parts: Parts<'_>, sizes: [usize; 3]) -> Vec<(Range<usize>, Parts<'_>)> {
    let cut = |first: usize| {
        let range = first..rows.end.min(first + TASK_ROWS);
        let part = take_row(&mut parts, sizes.map(|size| size * range.len()));
        (range, part)
    };
    rows.clone().step_by(TASK_ROWS).map(cut).collect()
}

fn write_row<S: MatrixSource>(
    source: &S,
    row: usize,
    format: WeightFormat,
    reader: &mut S::Reader,
    [values, scales, units]: &mut Parts<'_>,
) -> std::result::Result<(), quantize::Unquantizable> {
    fn put<const N: usize>(to: &mut [u8], from: impl Iterator<Item = [u8; N]>) {
        to.chunks_exact_mut(N).zip(from).for_each(|(to, from)| to.copy_from_slice(&from));
    }
    match format {
        WeightFormat::F32 => values.copy_from_slice(bytes_of(source.row_f32(row, reader))),
        WeightFormat::Bf16 => values.copy_from_slice(bytes_of(source.row_bf16(row, reader))),
        WeightFormat::Int8 => {
            let mut exact = quantize::Row8::default();
            if !source.row_int8(row, &mut exact.values, &mut exact.scales) {
                exact = quantize::row8(source.row_f32(row, reader))?;
            }
            values.copy_from_slice(bytes_of(&exact.values));
            scales.copy_from_slice(bytes_of(&exact.scales));
        }
        WeightFormat::Int4 => {
            let row = quantize::row4(source.row_f32(row, reader))?;
            let half = quantize::BLOCK / 2;
            let groups = row.values.chunks_exact(quantize::BLOCK);
            put(values, groups.flat_map(|group| (0..half).map(move |i| [group[i] | group[i + half] << 4])));
            put(scales, row.scales.iter().zip(&row.mins).map(|(scale, min)| [*scale, *min]));
            put(units, row.d.iter().zip(&row.dmin).flat_map(|(d, dmin)| [d.to_le_bytes(), dmin.to_le_bytes()]));
        }
    }
    Ok(())
}

/// In bf16, as on a GPU.
impl<D: Device> Footprint for Cuda<D> {
    const MOST_LOGITS: usize = 256;

    fn weight_bytes(rows: usize, width: usize, _is_bf16: bool, format: Option<WeightFormat>, _columns: Columns) -> (WeightFormat, usize) {
        let format = format.unwrap_or(WeightFormat::Bf16);
        let bytes = rows * row_bytes(width, format).iter().sum::<usize>();
        (format, bytes)
    }

    fn kv_block_bytes(shape: KvShape) -> usize {
        2 * shape.block_size * shape.kv_heads * shape.head_dim * Dtype::Bf16.bytes()
    }

    fn buffer_bytes(rows: usize, width: usize) -> Option<usize> {
        rows.checked_mul(width)?.checked_mul(Dtype::Bf16.bytes())
    }

    fn logits_bytes(rows: usize, width: usize) -> Option<usize> {
        rows.checked_mul(width)?.checked_mul(Dtype::F32.bytes())
    }

    fn own_bytes(limits: &StepLimits, _threads: usize) -> Option<usize> {
        own_bytes(limits)
    }
}

/// What is kept besides buffers: a step's inputs, cosines and sines, parts of attention, and what experts are given and give.
fn own_bytes(limits: &StepLimits) -> Option<usize> {
    let t = limits.max_tokens;
    let inputs = t.checked_mul(size_of::<u32>() * (6 + 2 * limits.attention.len()))?.checked_add(BLOCK_TABLES)?;
    let angles = t.checked_mul(2 * size_of::<f32>() * limits.frequencies)?;
    // Contexts are cut into no more parts than keep the largest device busy.
    let parts = |spec: &AttentionSpec| {
        let rows = 2 * MOST_MULTIPROCESSORS * spec.heads / spec.kv_heads + t.min(CUT_TOKENS) * spec.heads;
        rows * (spec.head_dim + 2) * size_of::<f32>()
    };
    let parts = limits.attention.iter().map(parts).max().unwrap_or(0);
    let experts = limits.experts.map_or(Some(0), |experts| {
        let visits = t.checked_mul(experts.top_k)?;
        let each = 4 * size_of::<f32>() + experts.intermediate * Dtype::Bf16.bytes() + experts.hidden * size_of::<f32>();
        visits.checked_mul(each)
    })?;
    inputs.checked_add(angles)?.checked_add(parts)?.checked_add(experts)
}

const MOST_MULTIPROCESSORS: usize = 192;

/// Block tables of the largest step: those of 256 sequences of 128K tokens take 4 MiB, and room for them doubles as it grows.
const BLOCK_TABLES: usize = 8 << 20;
