//! One config-driven decoder: RMSNorm, grouped-query attention with rotary positions, gated SiLU feed-forward.

use candle_core::{Device, Result as TensorResult, Tensor};

use crate::error::Failure;
use crate::kernels::{self, Batch, KvCache};
use crate::models::architecture::Architecture;
use crate::models::weights::Checkpoint;

/// `y = x · Wᵀ + b`. The one place where weights take other forms.
pub struct Linear {
    /// `[out, in]`
    weight: Tensor,
    /// `[out]`
    bias: Option<Tensor>,
}

impl Linear {
    /// `x [t, in]` → `[t, out]`
    pub fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        kernels::linear(x, &self.weight, self.bias.as_ref())
    }

    pub fn bytes(&self) -> usize {
        self.weight.elem_count() * self.weight.dtype().size_in_bytes()
    }
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
    embed: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Linear,
}

impl Transformer {
    pub fn load(shape: Architecture, weights: &Checkpoint, device: &Device) -> Result<Self, Failure> {
        let embed = weights.embedding(&shape, device)?;
        let head = if shape.tie_word_embeddings { embed.clone() } else { weights.head(&shape, device)? };
        let layers = (0..shape.layers).map(|i| Layer::load(i, &shape, weights, device)).collect::<Result<Vec<_>, _>>()?;
        let norm = weights.vector("norm.weight", shape.hidden_size, device)?;
        Ok(Self { head: Linear { weight: head, bias: None }, shape, device: device.clone(), embed, layers, norm })
    }

    /// Runs the tokens of one step, writing their keys and values. `[t, hidden]`, before the final norm.
    pub fn forward(&self, batch: &Batch, caches: &[KvCache]) -> TensorResult<Tensor> {
        let mut x = kernels::embed(&self.embed, &batch.tokens)?;
        for (layer, cache) in self.layers.iter().zip(caches) {
            x = layer.forward(&x, batch, cache, &self.shape)?;
        }
        Ok(x)
    }

    /// Logits in f32 of the rows `[n, hidden]` → `[n, vocab]`.
    pub fn logits(&self, x: &Tensor) -> TensorResult<Tensor> {
        let x = kernels::rms_norm(&x.contiguous()?, &self.norm, self.shape.rms_norm_eps)?;
        self.head.forward(&x)?.to_dtype(candle_core::DType::F32)
    }

    /// Bytes a decode step reads, which bound its speed: all matrices, the embedding's single row left out.
    pub fn bytes_per_step(&self) -> usize {
        let layer = |layer: &Layer| layer.qkv.bytes() + layer.output.bytes() + layer.gate_up.bytes() + layer.down.bytes();
        self.layers.iter().map(layer).sum::<usize>() + self.head.bytes()
    }

    /// Bytes of all matrices held.
    pub fn bytes_in_memory(&self) -> usize {
        let embedding = if self.shape.tie_word_embeddings { 0 } else { self.embed.elem_count() * self.embed.dtype().size_in_bytes() };
        self.bytes_per_step() + embedding
    }

    /// The type weights are kept in, for reports.
    pub fn weight_dtype(&self) -> &'static str {
        self.embed.dtype().as_str()
    }

    /// cos and sin of every token's angles, `[t, d/2]` each: `position · theta^(-2i/d)`, in f32 as the references do it.
    pub fn rotary(&self, positions: &[u32]) -> TensorResult<(Tensor, Tensor)> {
        let half = self.shape.head_dim / 2;
        let inverse: Vec<f32> =
            (0..half).map(|i| (1.0 / self.shape.rope_theta.powf(2.0 * i as f64 / self.shape.head_dim as f64)) as f32).collect();
        let angles = positions.iter().flat_map(|position| inverse.iter().map(move |f| *position as f32 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        let shape = (positions.len(), half);
        Ok((Tensor::from_vec(cos, shape, &self.device)?, Tensor::from_vec(sin, shape, &self.device)?))
    }
}

impl Layer {
    fn load(index: usize, a: &Architecture, weights: &Checkpoint, device: &Device) -> Result<Self, Failure> {
        let name = |part: &str| format!("layers.{index}.{part}");
        let linear = |fused: Option<&str>, parts: &[(&str, usize)], input: usize| -> Result<Linear, Failure> {
            let fused = fused.map(name);
            let parts: Vec<(String, usize)> = parts.iter().map(|(part, out)| (name(part), *out)).collect();
            let parts: Vec<(&str, usize)> = parts.iter().map(|(part, out)| (part.as_str(), *out)).collect();
            let weight = weights.matrix(fused.as_deref(), &parts, input, device)?;
            let bias = if a.bias { Some(weights.bias(fused.as_deref(), &parts, device)?) } else { None };
            Ok(Linear { weight, bias })
        };
        let (h, q, kv, i) = (a.hidden_size, a.q_width(), a.kv_width(), a.intermediate_size);
        Ok(Self {
            input_norm: weights.vector(&name("input_layernorm.weight"), h, device)?,
            qkv: linear(Some("self_attn.qkv_proj"), &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)], h)?,
            output: linear(None, &[("self_attn.o_proj", h)], q)?,
            post_norm: weights.vector(&name("post_attention_layernorm.weight"), h, device)?,
            // Gate first, despite the name.
            gate_up: linear(Some("mlp.up_gate_proj"), &[("mlp.gate_proj", i), ("mlp.up_proj", i)], h)?,
            down: linear(None, &[("mlp.down_proj", h)], i)?,
        })
    }

    /// `x [t, hidden]` → `[t, hidden]`
    fn forward(&self, x: &Tensor, batch: &Batch, cache: &KvCache, a: &Architecture) -> TensorResult<Tensor> {
        let hidden = kernels::rms_norm(x, &self.input_norm, a.rms_norm_eps)?;
        let q = kernels::rope_and_store(&self.qkv.forward(&hidden)?, a.heads, a.rope, batch, cache)?;
        let attended = kernels::paged_attention(&q, batch, cache)?;
        let x = x.add(&self.output.forward(&attended)?)?;
        let hidden = kernels::rms_norm(&x, &self.post_norm, a.rms_norm_eps)?;
        let hidden = kernels::silu_mul(&self.gate_up.forward(&hidden)?)?;
        x.add(&self.down.forward(&hidden)?)
    }
}
