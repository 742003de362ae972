//! From a matrix as it is stored to a tensor, or to ggml's blocks for candle's quantized kernels.

use std::borrow::Cow;
use std::sync::Mutex;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::cpu::load::{check, note};
use crate::{MatrixSource, WeightFormat, quantize};

/// Rows a task reads: whole tiles of a transposed tensor.
const TASK_ROWS: usize = 32;

/// Bytes of a matrix as it is held on a device.
pub fn bytes(rows: usize, width: usize, format: WeightFormat) -> usize {
    match format {
        WeightFormat::Int4 | WeightFormat::Int8 => rows * row_bytes(width, ggml(format)),
        WeightFormat::Bf16 => rows * width * 2,
        WeightFormat::F32 => rows * width * 4,
    }
}

fn ggml(format: WeightFormat) -> GgmlDType {
    if format == WeightFormat::Int4 { GgmlDType::Q4K } else { GgmlDType::Q8_0 }
}

fn row_bytes(width: usize, dtype: GgmlDType) -> usize {
    width / dtype.block_size() * dtype.type_size()
}

/// The whole matrix in the type that activations have, which is what candle multiplies.
pub fn tensor<S: MatrixSource>(source: &S, dtype: DType, device: &Device) -> Result<Tensor> {
    let (rows, width) = (source.rows(), source.width());
    if dtype == DType::BF16 {
        let mut values = vec![bf16::ZERO; rows * width];
        read(&mut values, width, |row, reader, out| out.copy_from_slice(source.row_bf16(row, reader)));
        return Tensor::from_vec(values, (rows, width), device);
    }
    let mut values = vec![0f32; rows * width];
    read(&mut values, width, |row, reader, out| out.copy_from_slice(source.row_f32(row, reader)));
    Tensor::from_vec(values, (rows, width), device)
}

fn read<T: Send, R: Default + Send>(values: &mut [T], width: usize, row: impl Fn(usize, &mut R, &mut [T]) + Sync) {
    values.par_chunks_mut(TASK_ROWS * width).enumerate().for_each_init(R::default, |reader, (task, rows)| {
        rows.chunks_exact_mut(width).enumerate().for_each(|(i, out)| row(task * TASK_ROWS + i, reader, out));
    });
}

/// Blocks of 8 or 4 bits as ggml lays them out, with the numbers that the CPU's panels hold.
pub fn blocks<S: MatrixSource>(source: &S, format: WeightFormat, device: &Device) -> Result<QTensor> {
    let dtype = ggml(format);
    let width = row_bytes(source.width(), dtype);
    let mut bytes = vec![0; source.rows() * width];
    let failed = Mutex::new(None);
    read(&mut bytes, width, |row, reader: &mut S::Reader, out| {
        let mut exact = quantize::Row8::default();
        let result = match format {
            WeightFormat::Int4 => quantize::row4(source.row_f32(row, reader)).map(|row| row.write_ggml(out)),
            _ if source.row_int8(row, &mut exact.values, &mut exact.scales) => {
                exact.write_ggml(out);
                Ok(())
            }
            _ => quantize::row8(source.row_f32(row, reader)).map(|row| row.write_ggml(out)),
        };
        note(&failed, source, row, result);
    });
    check(failed)?;
    QTensor::new(QStorage::from_data(Cow::Owned(bytes), device, dtype)?, (source.rows(), source.width()))
}
