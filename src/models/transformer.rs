//! One config-driven decoder: RMSNorm, grouped-query attention with rotary positions, gated SiLU feed-forward.

use std::sync::Mutex;

use candle_core::{CpuStorage, DType, Device, Result as TensorResult, Storage, Tensor};

use crate::config::Quantization;
use crate::error::Failure;
use crate::kernels::cpu::packed::{Columns, Form, Packed, Row};
use crate::kernels::{Activations, KvCache, Matrix};
use crate::models::architecture::Architecture;
use crate::models::quantize;
use crate::models::weights::{Checkpoint, device_failure};

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
        // Both ends of the model at 8 bits in either strategy: they are where 4 would show.
        let ends = if quantization == Quantization::AsStored { None } else { Some(Form::Int8) };
        let inside = if quantization == Quantization::Wint4 { Some(Form::Int4) } else { ends };
        let embed = matrix("embed_tokens", weights.embedding(&shape, device)?, Columns::Plain, ends)?;
        let head =
            if shape.tie_word_embeddings { None } else { Some(matrix("lm_head", weights.head(&shape, device)?, Columns::Plain, ends)?) };
        let layers = (0..shape.layers).map(|i| Layer::load(i, &shape, weights, device, inside)).collect::<Result<Vec<_>, _>>()?;
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

    /// What weights are kept as, for reports: of the layers, and of embedding and head where that differs.
    pub fn weight_form(&self) -> String {
        let of = |matrix: &Matrix| match matrix {
            Matrix::Tensor(tensor) => tensor.dtype().as_str(),
            Matrix::Packed(packed) => match packed.form {
                Form::F32 => "f32",
                Form::Bf16 => "bf16",
                Form::Int8 => "8-bit (Q8_0 form)",
                Form::Int4 => "4-bit (Q4_K form)",
            },
        };
        let ends = of(&self.embed);
        match self.layers.first().map(|layer| of(&layer.down.weight)) {
            Some(inside) if inside != ends => format!("{inside}; embedding and head {ends}"),
            _ => ends.to_string(),
        }
    }
}

/// A matrix `[n, k]` in the form its device computes with; `wanted`: fewer bits than stored.
fn matrix(name: &str, tensor: Tensor, columns: Columns, wanted: Option<Form>) -> Result<Matrix, Failure> {
    if tensor.device().is_cpu() {
        return pack(name, &tensor, columns, wanted);
    }
    if wanted.is_some() {
        return Err(Failure::internal("QUANTIZATION: this version quantizes on the CPU only; unset it, or set DEVICE=cpu"));
    }
    Ok(Matrix::Tensor(tensor))
}

/// A matrix on the CPU, in the order its kernels read. A form whose blocks do not divide the width gives way to the next finer one.
pub(crate) fn pack(name: &str, tensor: &Tensor, columns: Columns, wanted: Option<Form>) -> Result<Matrix, Failure> {
    let (n, k) = tensor.dims2().map_err(device_failure)?;
    let stored = if tensor.dtype() == DType::BF16 { Form::Bf16 } else { Form::F32 };
    let finer = |form: Form| if form == Form::Int4 && !form.fits(k) { Form::Int8 } else { form };
    let form = wanted.map(finer).filter(|form| form.fits(k)).unwrap_or(stored);
    if let Some(wanted) = wanted.filter(|wanted| *wanted != form) {
        tracing::warn!("{name}: rows of {k} weights cannot be cut into blocks of {wanted:?}; kept as {form:?}");
    }
    let (storage, _) = tensor.storage_and_layout();
    let failed = Mutex::new(None);
    let fill = |row: usize, out: &mut Row| {
        let range = row * k..(row + 1) * k;
        match (&*storage, form) {
            (Storage::Cpu(CpuStorage::BF16(values)), Form::Bf16) => {
                out.bf16.clear();
                out.bf16.extend_from_slice(&values[range]);
                return;
            }
            (Storage::Cpu(CpuStorage::BF16(values)), _) => {
                out.f32.clear();
                out.f32.extend(values[range].iter().map(|value| value.to_f32()));
            }
            (Storage::Cpu(CpuStorage::F32(values)), _) => {
                out.f32.clear();
                out.f32.extend_from_slice(&values[range]);
            }
            _ => {}
        }
        let result = match form {
            Form::Int8 => quantize::row8_into(&out.f32, &mut out.int8, &mut out.scales8),
            Form::Int4 => quantize::row4_into(&out.f32, &mut out.int4, &mut out.scales4, &mut out.mins4, &mut out.d, &mut out.dmin),
            Form::F32 | Form::Bf16 => Ok(()),
        };
        if let (Err(error), Ok(mut failed)) = (result, failed.lock()) {
            *failed = Some(format!("{name}, row {row}: {error}"));
        }
    };
    let packed = Packed::new(n, k, form, columns, &fill);
    if let Ok(Some(error)) = failed.into_inner() {
        return Err(Failure::internal(format!(
            "the weights cannot be quantized: {error}; the checkpoint is damaged, or set QUANTIZATION=BF16"
        )));
    }
    packed.map(Matrix::Packed).map_err(|error| Failure::internal(format!("no memory for a weight matrix [{n}, {k}]: {error}")))
}

impl Layer {
    fn load(index: usize, a: &Architecture, weights: &Checkpoint, device: &Device, wanted: Option<Form>) -> Result<Self, Failure> {
        let name = |part: &str| format!("layers.{index}.{part}");
        let linear = |fused: Option<&str>, parts: &[(&str, usize)], input: usize, columns: Columns| -> Result<Linear, Failure> {
            let fused = fused.map(name);
            let parts: Vec<(String, usize)> = parts.iter().map(|(part, out)| (name(part), *out)).collect();
            let parts: Vec<(&str, usize)> = parts.iter().map(|(part, out)| (part.as_str(), *out)).collect();
            let weight = matrix(parts[0].0, weights.matrix(fused.as_deref(), &parts, input, device)?, columns, wanted)?;
            let bias = if a.bias { Some(weights.bias(fused.as_deref(), &parts, device)?) } else { None };
            Ok(Linear { weight, bias })
        };
        let (h, q, kv, i) = (a.hidden_size, a.q_width(), a.kv_width(), a.intermediate_size);
        let qkv = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        Ok(Self {
            input_norm: weights.vector(&name("input_layernorm.weight"), h, device)?,
            qkv: linear(Some("self_attn.qkv_proj"), &qkv, h, Columns::Plain)?,
            output: linear(None, &[("self_attn.o_proj", h)], q, Columns::Plain)?,
            post_norm: weights.vector(&name("post_attention_layernorm.weight"), h, device)?,
            // Gate first, despite the name.
            gate_up: linear(Some("mlp.up_gate_proj"), &[("mlp.gate_proj", i), ("mlp.up_proj", i)], h, Columns::Gated)?,
            down: linear(None, &[("mlp.down_proj", h)], i, Columns::Plain)?,
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
