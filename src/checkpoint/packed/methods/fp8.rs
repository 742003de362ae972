//! FP8: numbers of 8 bits with a scale for the tensor, for each row, or for each block (DeepSeek, Qwen). "inv" in a scale's name is the
//! inverse of what was multiplied: here as in every reader weights are multiplied by it.

use super::Gatherer;
use crate::checkpoint::packed::codes;
use crate::checkpoint::packed::gather::{matrix, rows_of};
use crate::error::Failure;

pub(super) fn find(gatherer: &mut Gatherer<'_>) -> Result<(), Failure> {
    let block = match &gatherer.quantization["weight_block_size"] {
        serde_json::Value::Null => None,
        value => Some(gatherer.block(value).ok_or_else(|| gatherer.wrong_field("weight_block_size", "is not two sizes"))?),
    };
    for name in gatherer.typed(&["F8_E4M3", "F8_E5M2"]).into_iter().filter(|name| !name.contains("scale")) {
        let Some(weight) = gatherer.take_if(&name, &["F8_E4M3", "F8_E5M2"])? else { continue };
        let scales = [format!("{name}_scale_inv"), format!("{name}_scale")];
        let scales = gatherer.take(&weight, &scales, &["F32", "F16", "BF16", "F8_E8M0", "U8"])?;
        let [stack, out, width] = match weight.shape[..] {
            [out, width] => [1, out, width],
            [stack, out, width] => [stack, out, width],
            _ => return Err(gatherer.broken(&weight, format!("its shape is {:?}, expected [out, in]", weight.shape))),
        };
        let grid = gatherer.block_grid(&scales, [stack, out, width], block)?;
        let (levels, kind) = match weight.dtype.as_str() {
            "F8_E5M2" => (codes::e5m2(), "e5m2"),
            _ => (codes::e4m3(), "e4m3"),
        };
        let numbers = gatherer.scale_numbers(&scales).0;
        let codes = rows_of(weight.place.clone(), 8, width, levels);
        let packed = matrix(stack * out, width, codes, (numbers, grid), None, gatherer.model_dtype());
        gatherer.put(name, &weight, weight.shape.clone(), kind.to_owned(), packed)?;
    }
    Ok(())
}
