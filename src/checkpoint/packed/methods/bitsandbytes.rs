//! bitsandbytes: 4 bits by a table (NF4, FP4) with a scale for each block of weights, itself quantized where the checkpoint is nested; or
//! whole numbers of 8 bits with a scale for each row.

use serde_json::Value as Json;

use super::Gatherer;
use crate::checkpoint::packed::codes::{self, Codes, Layout};
use crate::checkpoint::packed::gather::{Raw, matrix, rows_of};
use crate::checkpoint::packed::{Grid, Numbers};
use crate::checkpoint::stored::Stored;
use crate::error::Failure;

pub(super) fn find(gatherer: &mut Gatherer<'_>) -> Result<(), Failure> {
    for (state, kind) in [(".weight.quant_state.bitsandbytes__nf4", "nf4"), (".weight.quant_state.bitsandbytes__fp4", "fp4")] {
        for base in gatherer.ending(state) {
            four_bits(gatherer, &format!("{base}.weight"), &format!("{base}{state}"), kind)?;
        }
    }
    for base in gatherer.ending(".SCB") {
        eight_bits(gatherer, &base)?;
    }
    // Without its state a packed tensor would be taken for a weight of another shape.
    if let Some(name) = gatherer.ending(".absmax").into_iter().next()
        && let Some(scales) = gatherer.take_if(&format!("{name}.absmax"), &["F32", "U8"])?
    {
        return Err(gatherer.broken(&scales, format!("it is there, and {name}.quant_state.bitsandbytes__nf4 or …__fp4 is missing")));
    }
    Ok(())
}

fn four_bits(gatherer: &mut Gatherer<'_>, name: &str, state: &str, kind: &str) -> Result<(), Failure> {
    let Some(state) = gatherer.take_if(state, &["U8"])? else { return Ok(()) };
    let said: Json = serde_json::from_slice(gatherer.bytes(&state))
        .map_err(|error| gatherer.broken(&state, format!("it is not the JSON that it should be: {error}")))?;
    let field = |gatherer: &Gatherer<'_>, key: &str| gatherer.broken(&state, format!("\"{key}\": {} is not possible", said[key]));
    // Codes are packed into bytes, which may be stored under the name of another type.
    let weight = gatherer.take(&state, &[name.to_owned()], &["U8", "I8", "BF16", "F16", "F32"])?;
    let shape: Vec<usize> = serde_json::from_value(said["shape"].clone()).map_err(|_| field(gatherer, "shape"))?;
    let &[out, width] = shape.as_slice() else { return Err(field(gatherer, "shape")) };
    let block = said["blocksize"].as_u64().filter(|size| *size > 0).ok_or_else(|| field(gatherer, "blocksize"))? as usize;
    let count = out.checked_mul(width).ok_or_else(|| field(gatherer, "shape"))?;
    let blocks = count.div_ceil(block);
    if width % 2 != 0 || weight.place.range.len() != count / 2 {
        return Err(
            gatherer.broken(&weight, format!("its shape is {:?}, which does not hold the codes of a matrix {shape:?}", weight.shape))
        );
    }
    let part = |part: &str| [format!("{name}.{part}")];
    let map = gatherer.take(&weight, &part("quant_map"), &["F32"])?;
    gatherer.expect_shape(&map, &[&[16]])?;
    let levels = gatherer.floats(&map);
    let scales = gatherer.take(&weight, &part("absmax"), &["F32", "U8"])?;
    gatherer.expect_shape(&scales, &[&[blocks], &[blocks, 1]])?;
    let numbers = if scales.dtype == "U8" { nested(gatherer, name, &scales, &said, &state)? } else { gatherer.scale_numbers(&scales).0 };
    let round = match said["dtype"].as_str() {
        Some("bfloat16") => Stored::Bf16,
        Some("float16") => Stored::F16,
        Some("float32") => Stored::F32,
        _ => return Err(field(gatherer, "dtype")),
    };
    let codes = Codes { place: weight.place.clone(), layout: Layout::HighFirst { row_bytes: width / 2 }, levels };
    let packed = matrix(out, width, codes, (numbers, Grid::Flat(block)), None, round);
    gatherer.put(name.to_owned(), &weight, shape, kind.to_uppercase(), packed)
}

fn nested(gatherer: &mut Gatherer<'_>, name: &str, scales: &Raw, said: &Json, state: &Raw) -> Result<Numbers, Failure> {
    let block = said["nested_blocksize"].as_u64().filter(|size| *size > 0);
    let offset = said["nested_offset"].as_f64();
    let (Some(block), Some(offset)) = (block, offset) else {
        let problem = format!("{} is of bytes, and \"nested_blocksize\" or \"nested_offset\" is missing", scales.name);
        return Err(gatherer.broken(state, problem));
    };
    let part = |part: &str| [format!("{name}.nested_{part}")];
    let map = gatherer.take(scales, &part("quant_map"), &["F32"])?;
    gatherer.expect_shape(&map, &[&[256]])?;
    let greatest = gatherer.take(scales, &part("absmax"), &["F32"])?;
    gatherer.expect_shape(&greatest, &[&[scales.count().div_ceil(block as usize)]])?;
    let (levels, numbers) = (gatherer.floats(&map), gatherer.floats(&greatest));
    Ok(Numbers::Nested { place: scales.place.clone(), levels, scales: numbers, block: block as usize, offset: offset as f32 })
}

fn eight_bits(gatherer: &mut Gatherer<'_>, base: &str) -> Result<(), Failure> {
    let Some(scales) = gatherer.take_if(&format!("{base}.SCB"), &["F32", "F16", "BF16"])? else { return Ok(()) };
    let name = format!("{base}.weight");
    let weight = gatherer.take(&scales, std::slice::from_ref(&name), &["I8"])?;
    let [out, width] = weight.shape[..] else {
        return Err(gatherer.broken(&weight, format!("its shape is {:?}, expected [out, in]", weight.shape)));
    };
    gatherer.expect_shape(&scales, &[&[out]])?;
    // 0 stands for rows as they are; other orders were those of old GPU kernels.
    if let Some(order) = gatherer.take_if(&format!("{base}.weight_format"), &["U8"])?
        && gatherer.bytes(&order).iter().any(|order| *order != 0)
    {
        return Err(gatherer.broken(&order, "it names an order of the weights that is not supported (0, rows, is)".to_owned()));
    }
    let codes = rows_of(weight.place.clone(), 8, width, codes::signed());
    let grid = gatherer.block_grid(&scales, [1, out, width], None)?;
    let mut packed = matrix(out, width, codes, (gatherer.scale_numbers(&scales).0, grid), None, gatherer.model_dtype());
    // Scales are the greatest weights of rows, and 127 stands for them.
    packed.scales.factor = 7.874_016e-3;
    gatherer.put(name, &weight, vec![out, width], "8 bits".to_owned(), packed)
}
