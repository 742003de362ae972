//! A GGUF file's tensors by the names that Hugging Face gives them.

use std::ops::Range;

use super::architectures::Architecture;
use super::header::{Header, Tensor};

/// More experts than any model has: such a file is damaged.
const MOST_EXPERTS: usize = 4_096;

/// What the tensors of one architecture are called.
#[derive(Clone, Copy)]
pub struct Naming {
    architecture: &'static Architecture,
}

/// A tensor, or what one expert has of it.
#[derive(Debug, PartialEq)]
pub struct Part {
    pub name: String,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

impl Naming {
    pub fn of(header: &Header<'_>) -> Result<Self, String> {
        Ok(Self { architecture: Architecture::of(header)? })
    }

    /// The tensors that one of the file is. A name that is not known stays: nothing will ask for it, which is said when a model is loaded.
    pub fn parts(self, tensor: &Tensor<'_>) -> Result<Vec<Part>, String> {
        // Read already, for the configuration.
        if tensor.name == "rope_freqs.weight" {
            return Ok(Vec::new());
        }
        let whole = |name: String| vec![Part { name, shape: tensor.shape.clone(), range: tensor.range.clone() }];
        let Some((layer, rest)) = tensor.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            let (name, suffix) = tensor.name.rsplit_once('.').unwrap_or((tensor.name, ""));
            let known = self.architecture.outside(name).map(|ours| format!("{ours}.{suffix}"));
            return Ok(whole(known.unwrap_or_else(|| tensor.name.to_owned())));
        };
        let (name, suffix) = rest.rsplit_once('.').unwrap_or((rest, ""));
        let layer = format!("{}.{layer}", self.architecture.layers);
        if name == "ffn_gate_up_exps" && suffix == "weight" {
            let of = |name: &str, place| self.experts(tensor, &layer, (name, suffix), place);
            return Ok(of("ffn_gate_exps", (0, 2))?.into_iter().chain(of("ffn_up_exps", (1, 2))?).collect());
        }
        match self.architecture.tensor(name) {
            // Vectors that have no suffix there.
            Some(ours) if matches!(name, "exp_probs_b" | "attn_sinks") => Ok(whole(format!("{layer}.{ours}"))),
            Some(ours) if ours.contains('*') => self.experts(tensor, &layer, (name, suffix), (0, 1)),
            Some(ours) => Ok(whole(format!("{layer}.{ours}.{suffix}"))),
            None => Ok(whole(format!("{layer}.{rest}"))),
        }
    }

    /// A tensor of all experts (or heads) `[experts, out, in]`, or their biases `[experts, out]`, one by one: of each expert's rows the part
    /// `index` of `parts` equal ones.
    fn experts(
        self,
        tensor: &Tensor<'_>,
        layer: &str,
        (name, suffix): (&str, &str),
        (index, parts): (usize, usize),
    ) -> Result<Vec<Part>, String> {
        let (experts, outputs, inputs) = match (suffix, &tensor.shape[..]) {
            ("weight", [experts, outputs, inputs]) => (*experts, *outputs, Some(*inputs)),
            ("bias", [experts, outputs]) => (*experts, *outputs, None),
            _ => {
                let wanted = if suffix == "bias" { "two" } else { "three" };
                return Err(format!(
                    "tensor {} has shape {:?}, and {wanted} dimensions are expected of experts",
                    tensor.name, tensor.shape
                ));
            }
        };
        if experts > MOST_EXPERTS || outputs % parts != 0 {
            return Err(format!("tensor {} has shape {:?}, which no model's experts have", tensor.name, tensor.shape));
        }
        let ours = self.architecture.tensor(name).unwrap_or_default();
        let bytes = tensor.range.len() / experts / parts;
        let part = |expert: usize| {
            let from = tensor.range.start + (expert * parts + index) * bytes;
            let name = format!("{layer}.{}.{suffix}", ours.replace('*', &expert.to_string()));
            Part { name, shape: std::iter::once(outputs / parts).chain(inputs).collect(), range: from..from + bytes }
        };
        Ok((0..experts).map(part).collect())
    }
}
