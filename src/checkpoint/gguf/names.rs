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
        let known = match tensor.name {
            "token_embd.weight" => Some("model.embed_tokens.weight"),
            "output_norm.weight" => Some("model.norm.weight"),
            "output_norm.bias" => Some("model.norm.bias"),
            "output.weight" => Some("lm_head.weight"),
            _ => None,
        };
        if let Some(name) = known {
            return Ok(whole(name.to_owned()));
        }
        let Some((layer, rest)) = tensor.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            return Ok(whole(tensor.name.to_owned()));
        };
        let (name, suffix) = rest.rsplit_once('.').unwrap_or((rest, ""));
        if name == "ffn_gate_up_exps" && suffix == "weight" {
            let (gate, up) = (self.experts(tensor, layer, "ffn_gate_exps", (0, 2))?, self.experts(tensor, layer, "ffn_up_exps", (1, 2))?);
            return Ok(gate.into_iter().chain(up).collect());
        }
        match self.architecture.tensor(name) {
            // A vector that has no suffix there.
            Some(ours) if name == "exp_probs_b" => Ok(whole(format!("model.layers.{layer}.{ours}"))),
            Some(ours) if ours.contains('*') && suffix == "weight" => self.experts(tensor, layer, name, (0, 1)),
            Some(ours) => Ok(whole(format!("model.layers.{layer}.{ours}.{suffix}"))),
            None => Ok(whole(format!("model.layers.{layer}.{rest}"))),
        }
    }

    /// A tensor of all experts `[experts, out, in]`, one by one: of each expert's rows the part `index` of `parts` equal ones.
    fn experts(self, tensor: &Tensor<'_>, layer: &str, name: &str, (index, parts): (usize, usize)) -> Result<Vec<Part>, String> {
        let [experts, outputs, inputs] = tensor.shape[..] else {
            return Err(format!("tensor {} has shape {:?}, and three dimensions are expected of experts", tensor.name, tensor.shape));
        };
        if experts > MOST_EXPERTS || outputs % parts != 0 {
            return Err(format!("tensor {} has shape {:?}, which no model's experts have", tensor.name, tensor.shape));
        }
        let ours = self.architecture.tensor(name).unwrap_or_default();
        let bytes = tensor.range.len() / experts / parts;
        let part = |expert: usize| {
            let from = tensor.range.start + (expert * parts + index) * bytes;
            let name = format!("model.layers.{layer}.{}.weight", ours.replace('*', &expert.to_string()));
            Part { name, shape: vec![outputs / parts, inputs], range: from..from + bytes }
        };
        Ok((0..experts).map(part).collect())
    }
}
