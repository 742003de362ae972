//! AWQ in the form of its gemm kernels: 4 bits packed along the output in an order of its own, zeros as they are.

use super::Gatherer;
use crate::checkpoint::packed::codes::{self, Codes, Layout};
use crate::checkpoint::packed::gather::matrix;
use crate::checkpoint::packed::{Grid, Zeros};
use crate::error::Failure;

pub(super) fn find(gatherer: &mut Gatherer<'_>) -> Result<(), Failure> {
    let field = if gatherer.quantization["bits"].is_null() { "w_bit" } else { "bits" };
    gatherer.bits(field, &[4])?;
    gatherer.one_of("version", &["gemm"])?;
    gatherer.one_of("format", &["gemm"])?;
    for base in gatherer.ending(".qweight") {
        module(gatherer, &base)?;
    }
    Ok(())
}

fn module(gatherer: &mut Gatherer<'_>, base: &str) -> Result<(), Failure> {
    let Some(weight) = gatherer.take_if(&format!("{base}.qweight"), &["I32"])? else { return Ok(()) };
    let scales = gatherer.take(&weight, &[format!("{base}.scales")], &["F16", "BF16", "F32"])?;
    let zeros = gatherer.take(&weight, &[format!("{base}.qzeros")], &["I32"])?;
    let [width, row_words] = weight.shape[..] else {
        return Err(gatherer.broken(&weight, format!("its shape is {:?}, expected [in, out / 8]", weight.shape)));
    };
    let field = if gatherer.quantization["group_size"].is_null() { "q_group_size" } else { "group_size" };
    let size = match gatherer.integer(field)? {
        None | Some(-1) => width,
        Some(size) => usize::try_from(size).ok().filter(|size| *size > 0).ok_or_else(|| gatherer.wrong_field(field, "is no size"))?,
    };
    let (out, groups) = (row_words * 8, width.div_ceil(size));
    gatherer.expect_shape(&scales, &[&[groups, out]])?;
    gatherer.expect_shape(&zeros, &[&[groups, row_words]])?;
    let layout = Layout::Awq { row_words };
    let zeros = Zeros { codes: Codes { place: zeros.place, layout, levels: codes::integers(4, 0) }, turned: false };
    let codes = Codes { place: weight.place.clone(), layout, levels: codes::integers(4, 0) };
    let grid = Grid::Blocks { rows: 1, columns: size, row_stride: 1, column_stride: out };
    let (numbers, round) = gatherer.scale_numbers(&scales);
    let packed = matrix(out, width, codes, (numbers, grid), Some(zeros), round);
    gatherer.put(format!("{base}.weight"), &weight, vec![out, width], "4 bits".to_owned(), packed)
}
