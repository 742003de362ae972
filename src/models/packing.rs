//! From weights as stored to matrices as the device computes with them, row by row: no second copy of a matrix is made on the way.

use std::borrow::Cow;
use std::sync::Mutex;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::bf16;
use rayon::prelude::*;

use crate::error::Failure;
use crate::kernels::Matrix;
use crate::kernels::cpu::packed::{Columns, Form, Packed, Row};
use crate::models::quantize::{self, Bits, Unquantizable};
use crate::models::weights::{StoredMatrix, Tiles, device_failure};

/// What a thread keeps between the rows it reads.
#[derive(Default)]
struct Reader {
    f32: Tiles<f32>,
    bf16: Tiles<bf16>,
}

/// Reads a matrix into the form its device computes with. `bits` must fit its width, see [`Bits::of`].
pub fn load(stored: &StoredMatrix<'_>, columns: Columns, bits: Bits, device: &Device) -> Result<Matrix, Failure> {
    match (device.is_cpu(), bits) {
        (true, _) => pack(stored, columns, bits).map(Matrix::Packed),
        (false, Bits::AsStored) => stored.tensor(device).map(Matrix::Tensor),
        (false, Bits::Eight | Bits::Four) => blocks(stored, bits, device).map(Matrix::Blocks),
    }
}

/// The bytes that [`load`] will make of a matrix, and the name of their form.
pub fn plan(stored: &StoredMatrix<'_>, columns: Columns, bits: Bits, gpu: bool) -> (usize, &'static str) {
    let (rows, form) = (stored.rows(), form(bits, gpu || stored.is_bf16()));
    let bytes = match form {
        _ if !gpu => Packed::bytes_of(rows, stored.width, form, columns),
        Form::Int4 => rows * stored.width / GgmlDType::Q4K.block_size() * GgmlDType::Q4K.type_size(),
        Form::Int8 => rows * stored.width / GgmlDType::Q8_0.block_size() * GgmlDType::Q8_0.type_size(),
        Form::Bf16 | Form::F32 => rows * stored.width * 2,
    };
    (bytes, form.name())
}

/// The form in which the CPU holds a matrix.
fn form(bits: Bits, is_bf16: bool) -> Form {
    match bits {
        Bits::Four => Form::Int4,
        Bits::Eight => Form::Int8,
        Bits::AsStored if is_bf16 => Form::Bf16,
        Bits::AsStored => Form::F32,
    }
}

/// Every thread packs panels of its own, reading and quantizing their rows.
fn pack(stored: &StoredMatrix<'_>, columns: Columns, bits: Bits) -> Result<Packed, Failure> {
    let form = form(bits, stored.is_bf16());
    let failed = Mutex::new(None);
    let fill = |row: usize, reader: &mut Reader, out: &mut Row| {
        let result = match form {
            Form::F32 => {
                out.f32.clear();
                out.f32.extend_from_slice(stored.row(row, &mut reader.f32));
                Ok(())
            }
            Form::Bf16 => {
                out.bf16.clear();
                out.bf16.extend_from_slice(stored.row(row, &mut reader.bf16));
                Ok(())
            }
            Form::Int8 => quantize::row8_into(stored.row(row, &mut reader.f32), &mut out.int8, &mut out.scales8),
            Form::Int4 => {
                let row = stored.row(row, &mut reader.f32);
                quantize::row4_into(row, &mut out.int4, &mut out.scales4, &mut out.mins4, &mut out.d, &mut out.dmin)
            }
        };
        note(&failed, stored, row, result);
    };
    let packed = Packed::new(stored.rows(), stored.width, form, columns, &fill);
    check(failed)?;
    packed.map_err(|error| {
        Failure::internal(format!("{}: no memory for a matrix [{}, {}]: {error}", stored.describe(0), stored.rows(), stored.width))
    })
}

/// The same blocks as ggml lays them out, for candle's kernels.
fn blocks(stored: &StoredMatrix<'_>, bits: Bits, device: &Device) -> Result<QTensor, Failure> {
    let dtype = if bits == Bits::Four { GgmlDType::Q4K } else { GgmlDType::Q8_0 };
    let row_bytes = stored.width / dtype.block_size() * dtype.type_size();
    let mut bytes = vec![0; stored.rows() * row_bytes];
    let failed = Mutex::new(None);
    // So many rows a task that it reads whole tiles of a transposed tensor.
    bytes.par_chunks_mut(32 * row_bytes).enumerate().for_each_init(Tiles::<f32>::default, |tiles, (task, rows)| {
        for (i, out) in rows.chunks_exact_mut(row_bytes).enumerate() {
            let row = task * 32 + i;
            let weights = stored.row(row, tiles);
            let result = match bits {
                Bits::Four => quantize::row4(weights).map(|row| row.write_ggml(out)),
                _ => quantize::row8(weights).map(|row| row.write_ggml(out)),
            };
            note(&failed, stored, row, result);
        }
    });
    check(failed)?;
    let storage = QStorage::from_data(Cow::Owned(bytes), device, dtype).map_err(device_failure)?;
    QTensor::new(storage, (stored.rows(), stored.width)).map_err(device_failure)
}

/// Keeps what was wrong with a row.
fn note(failed: &Mutex<Option<String>>, stored: &StoredMatrix<'_>, row: usize, result: Result<(), Unquantizable>) {
    if let (Err(error), Ok(mut failed)) = (result, failed.lock()) {
        *failed = Some(format!("{}, row {row}: {error}", stored.describe(row)));
    }
}

fn check(failed: Mutex<Option<String>>) -> Result<(), Failure> {
    match failed.into_inner() {
        Ok(None) => Ok(()),
        Ok(Some(problem)) => Err(Failure::internal(format!("{problem}; fetch the model again, or set QUANTIZATION=BF16"))),
        Err(_) => Err(Failure::internal("a thread that packed weights ended early")),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::composed;

    /// Numbers of both signs, up to 1.
    fn numbers(n: usize, mut seed: u64) -> Vec<f32> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// From either layout of a file, panels and ggml's blocks hold the numbers that the encoders give; candle's arithmetic on its blocks
        /// is near to f32 on the same numbers.
        #[test]
        fn both_forms_hold_the_same_weights(
            n in 1usize..70,
            supers in 1usize..4,
            t in 1usize..20,
            four in any::<bool>(),
            transposed in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let k = supers * quantize::SUPER_BLOCK;
            let bits = if four { Bits::Four } else { Bits::Eight };
            let weights = numbers(n * k, seed);
            let read = |row: &[f32]| match bits {
                Bits::Four => quantize::row4(row).unwrap().dequantize(),
                _ => quantize::row8(row).unwrap().dequantize(),
            };
            let exact: Vec<Vec<f32>> = weights.chunks_exact(k).map(read).collect();
            let stored_as: Vec<u8> = if transposed {
                (0..n * k).flat_map(|at| weights[at % n * k + at / n].to_le_bytes()).collect()
            } else {
                weights.iter().flat_map(|weight| weight.to_le_bytes()).collect()
            };
            let stored = StoredMatrix::of_f32(&stored_as, n, k, transposed);

            let Matrix::Packed(packed) = load(&stored, Columns::Plain, bits, &Device::Cpu).unwrap() else { unreachable!() };
            prop_assert_eq!((packed.bytes(), packed.form.name()), plan(&stored, Columns::Plain, bits, false));
            let mut row = vec![0.0; k];
            for (i, exact) in exact.iter().enumerate() {
                packed.row(i, &mut row);
                prop_assert_eq!(&row, exact);
            }

            let blocks = blocks(&stored, bits, &Device::Cpu).unwrap();
            prop_assert_eq!(blocks.storage_size_in_bytes(), plan(&stored, Columns::Plain, bits, true).0);
            prop_assert_eq!(blocks.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap(), exact.clone());
            let x = Tensor::from_vec(numbers(t * k, seed ^ 1), (t, k), &Device::Cpu).unwrap();
            let want = composed::linear(&x, &Tensor::new(exact, &Device::Cpu).unwrap(), None).unwrap().to_vec2::<f32>().unwrap();
            let got = composed::multiply(&x, &Matrix::Blocks(blocks), None).unwrap().to_vec2::<f32>().unwrap();
            // Activations are rounded to 1/127 of the largest of 256, each by half a step at most and in a random direction.
            let tolerance = 4.0 * (k as f32).sqrt() / 254.0;
            for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
                prop_assert!((got - want).abs() < tolerance, "{got} {want}");
            }
        }
    }
}
