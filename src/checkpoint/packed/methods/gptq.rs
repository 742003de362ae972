//! GPTQ: whole numbers packed along the input, with a scale and a zero for each group of inputs. The first form of the files (`gptq`) holds
//! zeros less one, the second (`gptq_v2`) holds them as they are.

use super::Gatherer;
use crate::checkpoint::packed::codes::{self, Codes, Layout};
use crate::checkpoint::packed::gather::{Raw, matrix, rows_of};
use crate::checkpoint::packed::{Grid, Zeros};
use crate::error::Failure;

const BITS: [usize; 4] = [2, 3, 4, 8];

pub(super) fn find(gatherer: &mut Gatherer<'_>) -> Result<(), Failure> {
    let bits = gatherer.bits("bits", &BITS)?;
    gatherer.one_of("checkpoint_format", &["gptq", "gptq_v2"])?;
    gatherer.one_of("format", &["gptq", "gptq_v2"])?;
    gatherer.one_of("pack_dtype", &["int32"])?;
    if gatherer.quantization["is_marlin_format"].as_bool() == Some(true) {
        return Err(gatherer.wrong_field("is_marlin_format", "is not supported: gptq and gptq_v2 can be read"));
    }
    let is_second = ["checkpoint_format", "format"].iter().any(|field| gatherer.quantization[*field].as_str() == Some("gptq_v2"));
    for base in gatherer.ending(".qweight") {
        module(gatherer, &base, bits, is_second)?;
    }
    Ok(())
}

fn module(gatherer: &mut Gatherer<'_>, base: &str, bits: usize, is_second: bool) -> Result<(), Failure> {
    let Some(weight) = gatherer.take_if(&format!("{base}.qweight"), &["I32"])? else { return Ok(()) };
    let scales = gatherer.take(&weight, &[format!("{base}.scales")], &["F16", "BF16", "F32"])?;
    let zeros = gatherer.take(&weight, &[format!("{base}.qzeros")], &["I32"])?;
    let order = gatherer.take_if(&format!("{base}.g_idx"), &["I32", "I64"])?;
    let [words, out] = weight.shape[..] else {
        return Err(gatherer.broken(&weight, format!("its shape is {:?}, expected [in · bits / 32, out]", weight.shape)));
    };
    let bits = bits_of(gatherer, &weight, order.as_ref(), words, bits)?;
    let width = words * 32 / bits;
    let size = match gatherer.integer("group_size")? {
        None | Some(-1) => width,
        Some(size) => {
            usize::try_from(size).ok().filter(|size| *size > 0).ok_or_else(|| gatherer.wrong_field("group_size", "is no size"))?
        }
    };
    let groups = width.div_ceil(size);
    gatherer.expect_shape(&scales, &[&[groups, out]])?;
    let zero_words = (out * bits).div_ceil(32);
    gatherer.expect_shape(&zeros, &[&[groups, zero_words]])?;
    let plain = Grid::Blocks { rows: 1, columns: size, row_stride: 1, column_stride: out };
    let grid = match order {
        None => plain,
        Some(order) => {
            gatherer.expect_shape(&order, &[&[width]])?;
            let list = gatherer.integers(&order);
            if let Some(wrong) = list.iter().find(|group| !(0..groups as i64).contains(*group)) {
                return Err(gatherer.broken(&order, format!("it names group {wrong} of {groups}")));
            }
            match list.iter().enumerate().all(|(i, group)| *group == (i / size) as i64) {
                true => plain,
                false if order.dtype == "I64" => return Err(gatherer.broken(&order, "its type is I64, expected I32".to_owned())),
                false => Grid::Listed { groups: order.place, row_stride: 1, column_stride: out },
            }
        }
    };
    let mask = usize::from(codes::mask(bits));
    let added = usize::from(!is_second);
    // One less than zero is the largest code.
    let levels = (0..=mask).map(|code| ((code + added) & mask) as f32).collect();
    let zeros = Zeros { codes: rows_of(zeros.place, bits, zero_words * 4, levels), turned: true };
    let codes = Codes { place: weight.place.clone(), layout: Layout::Columns { bits, rows: out }, levels: codes::integers(bits, 0) };
    let (numbers, round) = gatherer.scale_numbers(&scales);
    let packed = matrix(out, width, codes, (numbers, grid), Some(zeros), round);
    gatherer.put(format!("{base}.weight"), &weight, vec![out, width], format!("{bits} bits"), packed)
}

/// Modules may differ in their bits where the configuration has rules for some (`dynamic`); the list of groups is as long as the input.
fn bits_of(gatherer: &Gatherer<'_>, weight: &Raw, order: Option<&Raw>, words: usize, bits: usize) -> Result<usize, Failure> {
    let width = order.map(super::super::gather::Raw::count).filter(|width| *width > 0);
    let found = width.map_or(bits, |width| words * 32 / width);
    let is_ruled = found == bits || gatherer.quantization["dynamic"].is_object();
    if BITS.contains(&found) && is_ruled && (words * 32).is_multiple_of(found) {
        return Ok(found);
    }
    let problem = format!("its shape is {:?}, which is not that of codes of {bits} bits (\"bits\" of quantization_config)", weight.shape);
    Err(gatherer.broken(weight, problem))
}
