//! From a matrix as it is stored to panels: row by row, so that no second copy of it is made on the way.

use std::sync::Mutex;

use candle_core::{Error, Result};

use super::packed::{Packed, PackedShape, PackedStore, Row};
use crate::quantize::{self, Unquantizable};
use crate::{Columns, MatrixSource, WeightFormat};

/// The format a matrix is held in: the one that is asked for, or as it is stored.
pub fn format(is_bf16: bool, asked: Option<WeightFormat>) -> WeightFormat {
    asked.unwrap_or(if is_bf16 { WeightFormat::Bf16 } else { WeightFormat::F32 })
}

/// A matrix as `store` has kept it, or packed now.
pub fn load<S: MatrixSource>(source: &S, asked: Option<WeightFormat>, columns: Columns, store: Option<&dyn PackedStore>) -> Result<Packed> {
    let Some(store) = store else { return pack(source, asked, columns) };
    let shape = PackedShape::new(source.rows(), source.width(), format(source.is_bf16(), asked), columns);
    let name = source.describe(0);
    if let Some(bytes) = store.find(&name, &shape) {
        return Ok(Packed::kept(&shape, bytes));
    }
    let packed = pack(source, asked, columns)?;
    store.keep(&name, &shape, packed.packed_bytes());
    Ok(packed)
}

/// Every thread packs panels of its own, reading and quantizing their rows.
pub fn pack<S: MatrixSource>(source: &S, asked: Option<WeightFormat>, columns: Columns) -> Result<Packed> {
    let format = format(source.is_bf16(), asked);
    let failed = Mutex::new(None);
    let fill = |row: usize, reader: &mut S::Reader, out: &mut Row| {
        let result = match format {
            WeightFormat::F32 => {
                out.f32.clear();
                out.f32.extend_from_slice(source.row_f32(row, reader));
                Ok(())
            }
            WeightFormat::Bf16 => {
                out.bf16.clear();
                out.bf16.extend_from_slice(source.row_bf16(row, reader));
                Ok(())
            }
            WeightFormat::Int8 if source.row_int8(row, &mut out.int8, &mut out.scales8) => Ok(()),
            WeightFormat::Int8 => quantize::row8_into(source.row_f32(row, reader), &mut out.int8, &mut out.scales8),
            WeightFormat::Int4 => {
                let row = source.row_f32(row, reader);
                quantize::row4_into(row, &mut out.int4, &mut out.scales4, &mut out.mins4, &mut out.d, &mut out.dmin)
            }
        };
        note(&failed, source, row, result);
    };
    let packed = Packed::new(source.rows(), source.width(), format, columns, &fill);
    check(failed)?;
    packed.map_err(|error| {
        Error::Msg(format!("{}: no memory for a matrix [{}, {}]: {error}", source.describe(0), source.rows(), source.width()))
    })
}

/// Keeps what was wrong with a row.
pub(crate) fn note<S: MatrixSource>(
    failed: &Mutex<Option<String>>,
    source: &S,
    row: usize,
    result: std::result::Result<(), Unquantizable>,
) {
    if let (Err(error), Ok(mut failed)) = (result, failed.lock()) {
        *failed = Some(format!("{}, row {row}: {error}", source.describe(row)));
    }
}

pub(crate) fn check(failed: Mutex<Option<String>>) -> Result<()> {
    match failed.into_inner() {
        Ok(None) => Ok(()),
        Ok(Some(problem)) => Err(Error::Msg(format!("{problem}; fetch the model again, or set QUANTIZATION=BF16"))),
        Err(_) => Err(Error::Msg("a thread that packed weights ended early".into())),
    }
}
