//! One config-driven decoder: RMSNorm, grouped-query attention with rotary positions, gated SiLU feed-forward.

use std::collections::BTreeSet;

use candle_core::quantized::GgmlDType;
use candle_core::{Device, Result as TensorResult, Tensor};

use crate::config::Quantization;
use crate::error::Failure;
use crate::kernels::cpu::packed::{Columns, Form};
use crate::kernels::{Activations, KvCache, Matrix};
use crate::models::architecture::Architecture;
use crate::models::packing;
use crate::models::quantize::{BLOCK, Bits, Place, SUPER_BLOCK};
use crate::models::weights::{Checkpoint, StoredMatrix};

/// `y = x · Wᵀ + b`. The one place where weights take other forms.
pub struct Linear {
    /// `[out, in]`
    weight: Matrix,
    /// `[out]`
    bias: Option<Tensor>,
}

struct Layer {
    input_norm: Tensor,
    /// `[(h + 2 kv)·d, hidden]`
    qkv: Linear,
    /// `[hidden, h·d]`
    output: Linear,
    post_norm: Tensor,
    /// `[2·intermediate, hidden]`, gate first
    gate_up: Linear,
    /// `[hidden, intermediate]`
    down: Linear,
}

/// The decoder with its weights.
pub struct Transformer {
    pub shape: Architecture,
    pub device: Device,
    /// `[vocab, hidden]`
    embed: Matrix,
    layers: Vec<Layer>,
    norm: Tensor,
    /// `[vocab, hidden]`; `None` = the embedding.
    head: Option<Matrix>,
    /// `[d/2]`: `theta^(-2i/d)`, in f32 as the references do it.
    frequencies: Vec<f32>,
}

impl Transformer {
    pub fn load(shape: Architecture, weights: &Checkpoint, device: &Device, quantization: Quantization) -> Result<Self, Failure> {
        say_what_does_not_fit(quantization, &shape);
        let ends = |stored: &StoredMatrix<'_>| {
            packing::load(stored, Columns::Plain, Bits::of(quantization, Place::Vocabulary, stored.width), device)
        };
        let embed = ends(&weights.embedding(&shape)?)?;
        let head = if shape.tie_word_embeddings { None } else { Some(ends(&weights.head(&shape)?)?) };
        let layers = (0..shape.layers).map(|i| Layer::load(i, &shape, weights, device, quantization)).collect::<Result<Vec<_>, _>>()?;
        let norm = weights.vector("norm.weight", shape.hidden_size, device)?;
        let frequency = |i: usize| (1.0 / shape.rope_theta.powf(2.0 * i as f64 / shape.head_dim as f64)) as f32;
        let frequencies = (0..shape.head_dim / 2).map(frequency).collect();
        Ok(Self { shape, device: device.clone(), embed, layers, norm, head, frequencies })
    }

    /// Runs the tokens that `values` were begun with, writing their keys and values. Leaves the residual stream before the final norm.
    pub fn forward(&self, values: &mut Activations, caches: &mut [KvCache]) -> TensorResult<()> {
        values.embed(&self.embed)?;
        for (layer, cache) in self.layers.iter().zip(caches) {
            layer.forward(values, cache, &self.shape)?;
        }
        Ok(())
    }

    /// Logits in f32 of the step's tokens `positions`.
    pub fn logits(&self, values: &mut Activations, positions: &[usize]) -> TensorResult<()> {
        values.head(positions, &self.norm, self.shape.rms_norm_eps, self.head.as_ref().unwrap_or(&self.embed))
    }

    /// What a token's position is multiplied by for its rotary angles, `[d/2]`.
    pub fn frequencies(&self) -> &[f32] {
        &self.frequencies
    }

    /// Bytes a decode step reads, which bound its speed: all matrices, the embedding's single row left out.
    pub fn bytes_per_step(&self) -> usize {
        let layer = |layer: &Layer| {
            [&layer.qkv, &layer.output, &layer.gate_up, &layer.down].map(|linear| linear.weight.bytes()).iter().sum::<usize>()
        };
        self.layers.iter().map(layer).sum::<usize>() + self.head.as_ref().unwrap_or(&self.embed).bytes()
    }

    /// Bytes of all matrices held.
    pub fn bytes_in_memory(&self) -> usize {
        self.bytes_per_step() + if self.head.is_some() { self.embed.bytes() } else { 0 }
    }

    /// What weights are kept as, for reports.
    pub fn weight_form(&self) -> String {
        let inside = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]);
        form_names(inside.map(|linear| form_name(&linear.weight)), form_name(&self.embed))
    }
}

fn form_name(matrix: &Matrix) -> &'static str {
    match matrix {
        Matrix::Tensor(tensor) => tensor.dtype().as_str(),
        Matrix::Blocks(blocks) if blocks.dtype() == GgmlDType::Q4K => Form::Int4.name(),
        Matrix::Blocks(_) => Form::Int8.name(),
        Matrix::Packed(packed) => packed.form.name(),
    }
}

/// The forms of the layers, and of embedding and head where that differs.
fn form_names<'a>(inside: impl Iterator<Item = &'a str>, ends: &str) -> String {
    // Fewest bits first.
    let inside: Vec<&str> = inside.collect::<BTreeSet<_>>().into_iter().collect();
    let inside = inside.join(" and ");
    if inside == ends { inside } else { format!("{inside}; embedding and head {ends}") }
}

/// What the weights of a checkpoint will take, found without reading them.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightPlan {
    /// Of all matrices.
    pub bytes: usize,
    /// Like [`Transformer::weight_form`].
    pub form: String,
}

impl WeightPlan {
    pub fn new(shape: &Architecture, weights: &Checkpoint, gpu: bool, quantization: Quantization) -> Result<Self, Failure> {
        let (mut bytes, mut ends, mut inside) = (0, "", Vec::new());
        let mut count = |stored: &StoredMatrix<'_>, columns: Columns, place: Place| {
            let (size, form) = packing::plan(stored, columns, Bits::of(quantization, place, stored.width), gpu);
            bytes += size;
            form
        };
        for stored in std::iter::once(weights.embedding(shape)).chain((!shape.tie_word_embeddings).then(|| weights.head(shape))) {
            ends = count(&stored?, Columns::Plain, Place::Vocabulary);
        }
        for index in 0..shape.layers {
            let stored = StoredLayer::new(index, shape, weights)?;
            inside.push(count(&stored.qkv, Columns::Plain, Place::Layer));
            inside.push(count(&stored.output, Columns::Plain, Place::Layer));
            inside.push(count(&stored.gate_up, Columns::Gated, Place::Layer));
            inside.push(count(&stored.down, Columns::Plain, Place::Layer));
        }
        Ok(Self { bytes, form: form_names(inside.into_iter(), ends) })
    }
}

/// The matrices of one layer as the checkpoint has them.
struct StoredLayer<'a> {
    qkv: StoredMatrix<'a>,
    output: StoredMatrix<'a>,
    gate_up: StoredMatrix<'a>,
    down: StoredMatrix<'a>,
}

/// A projection under its name in fused checkpoints, and under the names and widths of its parts.
type Projection<'a> = (Option<&'a str>, &'a [(&'a str, usize)]);

impl<'a> StoredLayer<'a> {
    fn new(index: usize, a: &Architecture, weights: &'a Checkpoint) -> Result<Self, Failure> {
        let [qkv, output, gate_up, down] = projections(index, a, |name, input| {
            let (fused, parts) = name;
            weights.matrix(fused, parts, input)
        });
        Ok(Self { qkv: qkv?, output: output?, gate_up: gate_up?, down: down? })
    }
}

/// Calls `f` with the names of a layer's four projections and their input widths.
fn projections<T>(index: usize, a: &Architecture, f: impl Fn(Projection<'_>, usize) -> T) -> [T; 4] {
    let (h, q, kv, i) = (a.hidden_size, a.q_width(), a.kv_width(), a.intermediate_size);
    let with = |fused: Option<&str>, parts: &[(&str, usize)], input: usize| {
        let full = |name: &str| format!("layers.{index}.{name}");
        let fused = fused.map(full);
        let parts: Vec<(String, usize)> = parts.iter().map(|(part, out)| (full(part), *out)).collect();
        let parts: Vec<(&str, usize)> = parts.iter().map(|(part, out)| (part.as_str(), *out)).collect();
        f((fused.as_deref(), &parts), input)
    };
    [
        with(Some("self_attn.qkv_proj"), &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)], h),
        with(None, &[("self_attn.o_proj", h)], q),
        // Gate first, despite the name.
        with(Some("mlp.up_gate_proj"), &[("mlp.gate_proj", i), ("mlp.up_proj", i)], h),
        with(None, &[("mlp.down_proj", h)], i),
    ]
}

/// Says which rows take a finer form than was asked for.
fn say_what_does_not_fit(quantization: Quantization, a: &Architecture) {
    let Some(name) = quantization.name() else { return };
    let (wanted, block) = if quantization == Quantization::Wint4 { (Bits::Four, SUPER_BLOCK) } else { (Bits::Eight, BLOCK) };
    let widths = BTreeSet::from([a.hidden_size, a.q_width(), a.intermediate_size]);
    let odd: Vec<String> =
        widths.into_iter().filter(|k| Bits::of(quantization, Place::Layer, *k) != wanted).map(|k| k.to_string()).collect();
    if !odd.is_empty() {
        let widths = odd.join(", ");
        tracing::warn!("QUANTIZATION={name}: rows of {widths} weights cannot be cut into blocks of {block}, and are held in a finer form");
    }
}

impl Layer {
    fn load(index: usize, a: &Architecture, weights: &Checkpoint, device: &Device, quantization: Quantization) -> Result<Self, Failure> {
        let norm = |name: &str| weights.vector(&format!("layers.{index}.{name}.weight"), a.hidden_size, device);
        let stored = StoredLayer::new(index, a, weights)?;
        let biases = projections(index, a, |(fused, parts), _| a.bias.then(|| weights.bias(fused, parts, device)).transpose());
        let linear = |stored: &StoredMatrix<'_>, columns: Columns, bias: Result<Option<Tensor>, Failure>| {
            let bits = Bits::of(quantization, Place::Layer, stored.width);
            Ok::<_, Failure>(Linear { weight: packing::load(stored, columns, bits, device)?, bias: bias? })
        };
        let [qkv, output, gate_up, down] = biases;
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            qkv: linear(&stored.qkv, Columns::Plain, qkv)?,
            output: linear(&stored.output, Columns::Plain, output)?,
            post_norm: norm("post_attention_layernorm")?,
            gate_up: linear(&stored.gate_up, Columns::Gated, gate_up)?,
            down: linear(&stored.down, Columns::Plain, down)?,
        })
    }

    fn forward(&self, values: &mut Activations, cache: &mut KvCache, a: &Architecture) -> TensorResult<()> {
        values.norm(&self.input_norm, a.rms_norm_eps)?;
        values.project(&self.qkv.weight, self.qkv.bias.as_ref())?;
        values.rope_and_store(a.heads, a.rope, cache)?;
        values.attend(cache)?;
        values.add_attended(&self.output.weight, self.output.bias.as_ref())?;
        values.norm(&self.post_norm, a.rms_norm_eps)?;
        values.gate(&self.gate_up.weight, self.gate_up.bias.as_ref())?;
        values.add_gated(&self.down.weight, self.down.bias.as_ref())
    }
}
