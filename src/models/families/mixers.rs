//! Families with layers that mix tokens by something else than attention proper, and the makers of those mixers.

use super::{Defaults, Family, LLAMA, Model, Routed, TensorNames, routed};
use crate::kernels::{
    AttentionSpec, ConvKind, ConvSpec, DeltaSpec, ExpertGroups, LatentSpec, Normalize, Pairing, Rope, RouterScore, RoutingSpec,
};
use crate::models::config::Config;
use crate::models::spec::{DeltaLayer, FeedForward, LatentLayer, Mixer, ShortConv};

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_type: "lfm2",
        defaults: LFM2,
        adapt: |config, model| {
            model.like_lfm2(config)?;
            if config.flag("block_auto_adjust_ff_dim")?.unwrap_or(true) {
                let share = config.number("block_ffn_dim_multiplier")?.unwrap_or(1.0);
                let multiple = config.size("block_multiple_of", Some(256))?;
                for layer in &mut model.spec.layers {
                    if let FeedForward::Dense(dense) = &mut layer.feed_forward {
                        let two_thirds = 2 * dense.intermediate / 3;
                        dense.intermediate = ((two_thirds as f64 * share) as usize).next_multiple_of(multiple);
                    }
                }
            }
            Ok(())
        },
    },
    Family {
        model_type: "lfm2_moe",
        defaults: LFM2,
        adapt: |config, model| {
            model.like_lfm2(config)?;
            let routing = RoutingSpec {
                experts: config.size("num_experts", Some(32))?,
                top_k: config.size("num_experts_per_tok", Some(4))?,
                score: RouterScore::Sigmoid,
                normalize: config.flag("norm_topk_prob")?.unwrap_or(true).then_some(Normalize { epsilon: 1e-6, least: 0.0 }),
                scale: config.number("routed_scaling_factor")?.unwrap_or(1.0) as f32,
                groups: None,
            };
            let intermediate = config.size("moe_intermediate_size", Some(1_792))?;
            let choice_bias = config.flag("use_expert_bias")?.unwrap_or(true);
            let dense = config.count("num_dense_layers")?.unwrap_or(2);
            model.experts(Routed { routing, intermediate, choice_bias, shared: None, shared_gate: false }, |layer| layer >= dense)
        },
    },
    Family {
        model_type: "qwen3_next",
        defaults: QWEN,
        adapt: |config, model| {
            model.names = TensorNames::QWEN2_MOE;
            model.like_qwen_next(config, true)?;
            let normalize = config.flag("norm_topk_prob")?.unwrap_or(true);
            let (step, dense) = (config.size("decoder_sparse_step", Some(1))?, config.integers("mlp_only_layers")?);
            let routed = qwen_experts(config, normalize)?;
            model.experts(routed, |layer| !dense.contains(&(layer as u64)) && (layer + 1) % step == 0)
        },
    },
    Family { model_type: "qwen3_5_text", defaults: QWEN, adapt: |config, model| model.like_qwen_next(config, false) },
    Family {
        model_type: "qwen3_5_moe_text",
        defaults: QWEN,
        adapt: |config, model| {
            model.names = TensorNames::QWEN2_MOE;
            model.like_qwen_next(config, false)?;
            let routed = qwen_experts(config, true)?;
            model.experts(routed, |_| true)
        },
    },
    Family {
        model_type: "deepseek_v2",
        defaults: Defaults { pairing: Pairing::Interleaved, ..LLAMA },
        adapt: |config, model| {
            model.latent_attention(config, 1e-6)?;
            for (key, refused) in [("mlp_bias", true), ("norm_topk_prob", true)] {
                if config.flag(key)? == Some(refused) {
                    return Err(format!("\"{key}\": {refused} is not supported for deepseek_v2"));
                }
            }
            let groups = match config.text("topk_method")?.unwrap_or("greedy") {
                "greedy" => None,
                "group_limited_greedy" => groups(config, 1)?,
                other => return Err(format!("\"topk_method\": \"{other}\" is not supported (greedy and group_limited_greedy are)")),
            };
            let plain = routed::sigmoid_experts(config)?;
            let routing = RoutingSpec { score: RouterScore::Softmax, normalize: None, groups, ..plain.routing };
            let dense = config.count("first_k_dense_replace")?.unwrap_or(0);
            model.experts(Routed { routing, choice_bias: false, ..plain }, |layer| layer >= dense)
        },
    },
    Family {
        model_type: "deepseek_v3",
        defaults: Defaults { pairing: Pairing::Interleaved, max_positions: 4_096, ..LLAMA },
        adapt: |config, model| {
            model.latent_attention(config, 1e-6)?;
            let dense = config.count("first_k_dense_replace")?.unwrap_or(3);
            let routed = grouped_experts(config)?;
            model.experts(routed, |layer| layer >= dense)
        },
    },
    Family {
        model_type: "glm4_moe_lite",
        defaults: Defaults { pairing: Pairing::Interleaved, eps: 1e-5, max_positions: 202_752, ..LLAMA },
        adapt: |config, model| {
            model.latent_attention(config, 1e-6)?;
            let kinds = config.texts("mlp_layer_types")?;
            let routed = grouped_experts(config)?;
            model.experts(routed, |layer| match &kinds {
                Some(kinds) => kinds.get(layer).is_some_and(|kind| *kind == "sparse"),
                None => layer > 0,
            })
        },
    },
];

const LFM2: Defaults = Defaults { eps: 1e-5, eps_key: "norm_eps", rope_theta: 1_000_000.0, tied: true, max_positions: 128_000, ..LLAMA };

const QWEN: Defaults = Defaults { rotary_share: 0.25, max_positions: 32_768, ..LLAMA };

/// Qwen's experts beside a shared network with a gate.
fn qwen_experts(config: Config<'_>, normalize: bool) -> Result<Routed, String> {
    let plain = routed::softmax_experts(config)?;
    let normalize = normalize.then_some(Normalize { epsilon: 0.0, least: 0.0 });
    let shared = Some(config.size("shared_expert_intermediate_size", Some(512))?);
    Ok(Routed { routing: RoutingSpec { normalize, ..plain.routing }, shared, shared_gate: true, ..plain })
}

/// Sigmoid experts of which the best groups alone are looked at.
fn grouped_experts(config: Config<'_>) -> Result<Routed, String> {
    let plain = routed::sigmoid_experts(config)?;
    Ok(Routed { routing: RoutingSpec { groups: groups(config, 2)?, ..plain.routing }, ..plain })
}

/// Groups that are as good as their `best` best experts together; `None` where there is one group.
fn groups(config: Config<'_>, best: usize) -> Result<Option<ExpertGroups>, String> {
    let (count, experts) = (config.count("n_group")?.unwrap_or(1), config.size("n_routed_experts", None)?);
    if count <= 1 {
        return Ok(None);
    }
    let keep = config.size("topk_group", None)?;
    if !experts.is_multiple_of(count)
        || keep > count
        || experts / count < best
        || keep * (experts / count) < config.size("num_experts_per_tok", Some(8))?
    {
        return Err(format!("\"n_group\": {count} groups of {experts} experts, of which \"topk_group\": {keep} are kept, cannot be"));
    }
    Ok(Some(ExpertGroups { count, keep, best }))
}

/// What kind of mixer each layer has.
enum Kinds<'a> {
    Named(Vec<&'a str>),
    /// Layers of attention by number.
    Attention(Vec<u64>),
    /// Every n-th is attention.
    Every(usize),
}

impl Kinds<'_> {
    /// Whether a layer has the family's other mixer, which configurations call `other`.
    fn is_other(&self, index: usize, other: &str) -> Result<bool, String> {
        match self {
            Self::Named(names) => match names.get(index).copied() {
                Some("full_attention") => Ok(false),
                Some(name) if name == other => Ok(true),
                name => {
                    let found = name.map_or("nothing".to_owned(), |name| format!("\"{name}\""));
                    Err(format!("\"layer_types\": {found} for layer {index} is not supported (full_attention and {other} are)"))
                }
            },
            Self::Attention(layers) => Ok(!layers.contains(&(index as u64))),
            Self::Every(nth) => Ok(!(index + 1).is_multiple_of(*nth)),
        }
    }
}

impl Model {
    /// LFM2: short convolutions beside layers of attention, and names of its own.
    fn like_lfm2(&mut self, config: Config<'_>) -> Result<(), String> {
        self.head_norms();
        self.names = TensorNames::LFM2;
        self.spec.tied = config.flag("tie_embedding")?.unwrap_or(self.spec.tied);
        let conv = ConvSpec { channels: self.spec.hidden_size, kernel: kernel(config, "conv_L_cache", 3)?, kind: ConvKind::Gated };
        let short = ShortConv { conv, bias: config.flag("conv_bias")?.unwrap_or(false) };
        // Older configurations number the layers of attention.
        let kinds = match config.texts("layer_types")? {
            Some(names) => Kinds::Named(names),
            None if config.has("full_attn_idxs") => Kinds::Attention(config.integers("full_attn_idxs")?),
            None => Kinds::Every(1),
        };
        self.mixers(&kinds, "conv", &Mixer::ShortConv(short))
    }

    /// Qwen 3 Next and 3.5: gated delta nets, and attention whose result is gated.
    fn like_qwen_next(&mut self, config: Config<'_>, by_head: bool) -> Result<(), String> {
        if config.flag("attention_bias")?.unwrap_or(false) {
            return Err("\"attention_bias\": true is not supported for this family".into());
        }
        self.spec.norm.plus_one = true;
        self.head_norms();
        self.attention_layers().for_each(|layer| layer.output_gate = true);
        let size = |key: &str, default: u64| config.size(&format!("linear_{key}"), Some(default));
        let delta = DeltaSpec {
            key_heads: size("num_key_heads", 16)?,
            value_heads: size("num_value_heads", 32)?,
            key_dim: size("key_head_dim", 128)?,
            value_dim: size("value_head_dim", 128)?,
            eps: self.spec.norm.eps,
        };
        let most = DeltaSpec::MOST_KEY_DIM;
        if !delta.value_heads.is_multiple_of(delta.key_heads) || delta.key_dim > most {
            return Err(format!("{delta:?}: value heads must be a multiple of key heads, and \"linear_key_head_dim\" at most {most}"));
        }
        let conv = ConvSpec { channels: delta.qkv_width(), kernel: kernel(config, "linear_conv_kernel_dim", 4)?, kind: ConvKind::Silu };
        let kinds = match config.texts("layer_types")? {
            Some(names) => Kinds::Named(names),
            None => Kinds::Every(config.size("full_attention_interval", Some(4))?),
        };
        self.mixers(&kinds, "linear_attention", &Mixer::GatedDelta(DeltaLayer { delta, conv, by_head }))
    }

    /// DeepSeek's latent attention in every layer. `eps`: of the norms of its vectors.
    fn latent_attention(&mut self, config: Config<'_>, eps: f32) -> Result<(), String> {
        let latent = LatentSpec {
            heads: config.size("num_attention_heads", None)?,
            nope_dim: config.size("qk_nope_head_dim", Some(128))?,
            rope_dim: config.size("qk_rope_head_dim", None)?,
            rank: config.size("kv_lora_rank", Some(512))?,
            eps,
        };
        let (value_dim, bias) = (config.size("v_head_dim", Some(128))?, config.flag("attention_bias")?.unwrap_or(false));
        let query_rank = config.count("q_lora_rank")?.filter(|rank| *rank > 0);
        let parameters = config.rope_parameters("full_attention")?;
        // A stretched rotation makes scores sharper, twice: once in queries and once in keys.
        let sharper = match (parameters.number("mscale_all_dim")?, parameters.number("factor")?) {
            (Some(scale), Some(factor)) if factor > 1.0 => 0.1 * scale * factor.ln() + 1.0,
            _ => 1.0,
        };
        let scale = (((latent.nope_dim + latent.rope_dim) as f64).powf(-0.5) * sharper * sharper) as f32;
        let is_interleaved = config.flag("rope_interleave")?.unwrap_or(true);
        let pairing = if is_interleaved { Pairing::Interleaved } else { Pairing::Half };
        for layer in &mut self.spec.layers {
            let Mixer::Attention(attention) = &layer.mixer else { continue };
            let rope = attention.spec.rope.map(|rope| Rope { pairing, ..rope });
            let (heads, head_dim) = (latent.heads, latent.head_dim());
            let spec = AttentionSpec { heads, kv_heads: 1, head_dim, scale, rope, ..attention.spec };
            layer.mixer = Mixer::Latent(LatentLayer { spec, latent, value_dim, query_rank, bias });
        }
        Ok(())
    }

    /// Gives some layers another mixer than attention. The memory of sequences is counted in blocks of keys, so one layer at least must have some.
    fn mixers(&mut self, kinds: &Kinds<'_>, name: &str, other: &Mixer) -> Result<(), String> {
        for (index, layer) in self.spec.layers.iter_mut().enumerate() {
            if kinds.is_other(index, name)? {
                layer.mixer = other.clone();
            }
        }
        if self.spec.attentions().next().is_none() { Err("models without any layer of attention are not supported".into()) } else { Ok(()) }
    }
}

/// Tokens a convolution looks at.
fn kernel(config: Config<'_>, key: &str, default: u64) -> Result<usize, String> {
    match config.size(key, Some(default))? {
        1 => Err(format!("\"{key}\": 1 is not supported (2 and more are)")),
        kernel => Ok(kernel),
    }
}
