//! MXFP4: floating point numbers of 4 bits, 32 of which share a power of two; the stacked experts of gpt-oss.

use super::Gatherer;
use crate::checkpoint::packed::codes;
use crate::checkpoint::packed::gather::{matrix, rows_of};
use crate::error::Failure;

/// Bytes of 32 numbers.
const BLOCK: usize = 16;

pub(super) fn find(gatherer: &mut Gatherer<'_>) -> Result<(), Failure> {
    for base in gatherer.ending("_blocks") {
        let Some(blocks) = gatherer.take_if(&format!("{base}_blocks"), &["U8"])? else { continue };
        let scales = gatherer.take(&blocks, &[format!("{base}_scales")], &["U8", "F8_E8M0"])?;
        let [stack, out, groups, BLOCK] = blocks.shape[..] else {
            let problem = format!("its shape is {:?}, expected [experts, out, in / 32, {BLOCK}]", blocks.shape);
            return Err(gatherer.broken(&blocks, problem));
        };
        gatherer.expect_shape(&scales, &[&[stack, out, groups]])?;
        let (rows, width) = (stack * out, groups * 32);
        let grid = gatherer.block_grid(&scales, [stack, out, width], Some([1, 32]))?;
        let codes = rows_of(blocks.place.clone(), 4, groups * BLOCK, codes::e2m1());
        let packed = matrix(rows, width, codes, (gatherer.scale_numbers(&scales).0, grid), None, gatherer.model_dtype());
        gatherer.put(base, &blocks, vec![stack, out, width], "4 bits in blocks of 32".to_owned(), packed)?;
    }
    Ok(())
}
