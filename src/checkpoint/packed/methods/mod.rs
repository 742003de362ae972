//! The quantization methods that can be read: each finds its tensors by their names.

use serde_json::Value as Json;

use super::gather::Gatherer;
use crate::error::Failure;

mod awq;
mod bitsandbytes;
mod compressed;
mod fp8;
mod gptq;
mod mxfp4;

type Find = fn(&mut Gatherer<'_>) -> Result<(), Failure>;

/// By `quant_method`.
const METHODS: &[(&str, Find)] = &[
    ("fp8", fp8::find),
    ("compressed-tensors", compressed::find),
    ("gptq", gptq::find),
    ("awq", awq::find),
    ("mxfp4", mxfp4::find),
    ("bitsandbytes", bitsandbytes::find),
];

/// For messages.
pub const READABLE: &str = "fp8, compressed-tensors, gptq, awq, mxfp4 and bitsandbytes";

/// The method of a `quantization_config`, if it is one that can be read.
pub fn of(quantization: &Json) -> Option<(&'static str, Find)> {
    let named = quantization["quant_method"].as_str().map(|name| name.to_ascii_lowercase().replace('_', "-"));
    // bitsandbytes' first configurations did not say whose they were.
    let is_old = |key: &str| quantization[key].as_bool() == Some(true);
    let name = named.or_else(|| (is_old("load_in_4bit") || is_old("load_in_8bit")).then(|| "bitsandbytes".to_owned()))?;
    METHODS.iter().find(|(method, _)| *method == name).copied()
}
