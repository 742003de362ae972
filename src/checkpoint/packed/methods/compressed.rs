//! compressed-tensors (llm-compressor): packed whole numbers, plain ones of 8 bits, FP8. How many bits a matrix has, and how its scales lie,
//! its tensors tell; they must be among what the groups of the configuration say.

use serde_json::Value as Json;

use super::Gatherer;
use crate::checkpoint::packed::codes::{self, Codes, Layout};
use crate::checkpoint::packed::gather::{Raw, matrix, rows_of};
use crate::checkpoint::packed::{Grid, Zeros};
use crate::error::Failure;

const FORMATS: [&str; 7] =
    ["pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized", "mixed-precision", "dense"];
const SCALES: [&str; 3] = ["F16", "BF16", "F32"];

/// What the configuration says of weights.
struct Groups<'a> {
    weights: Vec<&'a Json>,
}

pub(super) fn find(gatherer: &mut Gatherer<'_>) -> Result<(), Failure> {
    gatherer.one_of("format", &FORMATS)?;
    for (field, what) in [("sparsity_config", "format"), ("transform_config", "config_groups")] {
        let part = &gatherer.quantization[field][what];
        let is_nothing = part.is_null() || part.as_str() == Some("dense") || part.as_object().is_some_and(serde_json::Map::is_empty);
        if !is_nothing {
            return Err(gatherer.wrong_field(field, "is not supported"));
        }
    }
    let quantization = gatherer.quantization;
    let Some(groups) = quantization["config_groups"].as_object() else {
        return Err(gatherer.wrong_field("config_groups", "is no object"));
    };
    if let Some(other) = groups.values().filter_map(|group| group["format"].as_str()).find(|format| !FORMATS.contains(format)) {
        let problem = format!("names the format {other}, which is not supported: {} can be read", FORMATS.join(", "));
        return Err(gatherer.wrong_field("config_groups", &problem));
    }
    let groups = Groups { weights: groups.values().map(|group| &group["weights"]).collect() };
    for base in gatherer.ending(".weight_packed") {
        packed(gatherer, &base, &groups)?;
    }
    for name in gatherer.typed(&["I8", "F8_E4M3"]) {
        if let Some(base) = name.strip_suffix(".weight") {
            naive(gatherer, base, &groups)?;
        }
    }
    // Plain weights with scales beside them are meant to be rounded while the model runs.
    if let Some(base) = gatherer.ending(".weight_scale").into_iter().next()
        && let Some(scale) = gatherer.take_if(&format!("{base}.weight_scale"), &["F16", "BF16", "F32", "U8"])?
    {
        let problem =
            format!("it is there, and {base}.weight holds no codes: only compressed checkpoints can be read (\"quantization_status\")");
        return Err(gatherer.broken(&scale, problem));
    }
    Ok(())
}

impl Groups<'_> {
    fn bits(&self, kind: &str) -> impl Iterator<Item = usize> {
        let of = move |weights: &&Json| weights["type"].as_str().unwrap_or("int") == kind;
        self.weights.iter().filter(move |weights| of(weights)).filter_map(|weights| weights["num_bits"].as_u64()).map(|bits| bits as usize)
    }

    fn block(&self, gatherer: &Gatherer<'_>) -> Option<[usize; 2]> {
        self.weights.iter().find_map(|weights| gatherer.block(&weights["block_structure"]))
    }
}

/// `weight_packed`: words of 32 bits along the input, or pairs of FP4.
fn packed(gatherer: &mut Gatherer<'_>, base: &str, groups: &Groups<'_>) -> Result<(), Failure> {
    let name = |part: &str| format!("{base}.weight_{part}");
    let Some(weight) = gatherer.take_if(&name("packed"), &["I32", "U8"])? else { return Ok(()) };
    let [out, words] = weight.shape[..] else {
        return Err(gatherer.broken(&weight, format!("its shape is {:?}, expected [out, words]", weight.shape)));
    };
    if weight.dtype == "U8" {
        return pairs(gatherer, base, &weight, [out, 2 * words]);
    }
    let scales = gatherer.take(&weight, &[name("scale")], &SCALES)?;
    let shape = gatherer.take(&weight, &[name("shape")], &["I64", "I32"])?;
    let sizes: Vec<usize> = gatherer.integers(&shape).into_iter().filter_map(|size| usize::try_from(size).ok()).collect();
    let &[rows, width] = sizes.as_slice() else {
        return Err(gatherer.broken(&shape, format!("it holds {sizes:?}, expected [out, in]")));
    };
    if rows != out || width == 0 || width > words.saturating_mul(32) {
        return Err(gatherer.broken(&shape, format!("it says [{rows}, {width}], and {} is {:?}", weight.name, weight.shape)));
    }
    let bits = groups.bits("int").find(|bits| (1..=8).contains(bits) && (width * bits).div_ceil(32) == words).ok_or_else(|| {
        let named: Vec<usize> = groups.bits("int").collect();
        let problem =
            format!("its shape is {:?}, which no \"num_bits\" of config_groups ({named:?}) makes of [{out}, {width}]", weight.shape);
        gatherer.broken(&weight, problem)
    })?;
    let order = gatherer.take_if(&name("g_idx"), &["I32"])?;
    let (grid, across) = group_grid(gatherer, &scales, order, [out, width])?;
    let offset = 1 << (bits - 1);
    let zeros = match gatherer.take_if(&name("zero_point"), &["I32", "I8"])? {
        None => None,
        Some(zeros) if zeros.dtype == "I8" => {
            gatherer.expect_shape(&zeros, &[&scales.shape])?;
            Some(Zeros { codes: rows_of(zeros.place, 8, across, codes::signed()), turned: false })
        }
        // Packed along the output.
        Some(zeros) => {
            gatherer.expect_shape(&zeros, &[&[(out * bits).div_ceil(32), across]])?;
            let layout = Layout::Columns { bits, rows: across };
            Some(Zeros { codes: Codes { place: zeros.place, layout, levels: codes::integers(bits, offset) }, turned: true })
        }
    };
    let codes = rows_of(weight.place.clone(), bits, 4 * words, codes::integers(bits, offset));
    let (numbers, round) = gatherer.scale_numbers(&scales);
    let made = matrix(out, width, codes, (numbers, grid), zeros, round);
    gatherer.put(format!("{base}.weight"), &weight, vec![out, width], format!("{bits} bits"), made)
}

/// Scales by groups of columns, in order or by a list; and how many groups there are.
fn group_grid(gatherer: &Gatherer<'_>, scales: &Raw, order: Option<Raw>, [out, width]: [usize; 2]) -> Result<(Grid, usize), Failure> {
    let grid = gatherer.block_grid(scales, [1, out, width], None)?;
    let Grid::Blocks { rows: 1, columns, .. } = grid else { return Ok((grid, 1)) };
    let across = width.div_ceil(columns);
    let Some(order) = order else { return Ok((grid, across)) };
    gatherer.expect_shape(&order, &[&[width]])?;
    match gatherer.integers(&order).into_iter().find(|group| !(0..across as i64).contains(group)) {
        Some(wrong) => Err(gatherer.broken(&order, format!("it names group {wrong} of {across}"))),
        None => Ok((Grid::Listed { groups: order.place, row_stride: across, column_stride: 1 }, across)),
    }
}

/// MXFP4.
fn pairs(gatherer: &mut Gatherer<'_>, base: &str, weight: &Raw, [out, width]: [usize; 2]) -> Result<(), Failure> {
    let scales = gatherer.take(weight, &[format!("{base}.weight_scale")], &["U8", "F8_E8M0"])?;
    gatherer.expect_shape(&scales, &[&[out, width / 32]])?;
    let grid = gatherer.block_grid(&scales, [1, out, width], Some([1, 32]))?;
    let codes = rows_of(weight.place.clone(), 4, width / 2, codes::e2m1());
    let (numbers, round) = gatherer.scale_numbers(&scales);
    let made = matrix(out, width, codes, (numbers, grid), None, round);
    gatherer.put(format!("{base}.weight"), weight, vec![out, width], "FP4 in blocks of 32".to_owned(), made)
}

/// Whole numbers of 8 bits, or FP8, as the tensors' own type.
fn naive(gatherer: &mut Gatherer<'_>, base: &str, groups: &Groups<'_>) -> Result<(), Failure> {
    let name = |part: &str| format!("{base}.{part}");
    let Some(weight) = gatherer.take_if(&name("weight"), &["I8", "F8_E4M3"])? else { return Ok(()) };
    let scales = gatherer.take(&weight, &[name("weight_scale")], &SCALES)?;
    let [out, width] = weight.shape[..] else {
        return Err(gatherer.broken(&weight, format!("its shape is {:?}, expected [out, in]", weight.shape)));
    };
    let (kind, levels, form) = match weight.dtype.as_str() {
        "I8" => ("int", codes::signed(), "8 bits"),
        _ => ("float", codes::e4m3(), "e4m3"),
    };
    if groups.bits(kind).all(|bits| bits > 8) {
        let problem = format!("its type is {}, and no group of config_groups has weights of type {kind} of 8 bits or less", weight.dtype);
        return Err(gatherer.broken(&weight, problem));
    }
    let block = groups.block(gatherer).filter(|_| scales.shape.first() != Some(&out));
    let grid = gatherer.block_grid(&scales, [1, out, width], block)?;
    let zeros = gatherer.take_if(&name("weight_zero_point"), &["I8", "F8_E4M3"])?;
    let zeros = zeros.map(|zeros| -> Result<Zeros, Failure> {
        gatherer.expect_shape(&zeros, &[&scales.shape])?;
        let levels = if zeros.dtype == "I8" { codes::signed() } else { codes::e4m3() };
        let across = if scales.shape.len() > 1 { scales.shape[scales.shape.len() - 1] } else { 1 };
        Ok(Zeros { codes: rows_of(zeros.place, 8, across, levels), turned: false })
    });
    let codes = rows_of(weight.place.clone(), 8, width, levels);
    let (numbers, round) = gatherer.scale_numbers(&scales);
    let made = matrix(out, width, codes, (numbers, grid), zeros.transpose()?, round);
    gatherer.put(name("weight"), &weight, vec![out, width], form.to_owned(), made)
}
