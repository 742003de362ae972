//! Families with routed experts.

use super::{Defaults, Family, LLAMA, Routed, Sliding, TensorNames, dense::ERNIE, refuse_groups};
use crate::kernels::{Activation, NormExtent, Normalize, RouterScore, RoutingSpec};
use crate::models::config::Config;
use crate::models::spec::FeedForward;

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_type: "ernie4_5_moe",
        defaults: ERNIE,
        adapt: |config, model| {
            let bias = config.flag("use_bias")?.unwrap_or(false);
            model.biases(bias, bias, bias);
            model.names = TensorNames::ERNIE_MOE;
            let least = config.number("moe_norm_min")?.unwrap_or(1e-12) as f32;
            let routing = RoutingSpec {
                experts: config.size("moe_num_experts", Some(64))?,
                top_k: config.size("moe_k", Some(6))?,
                score: RouterScore::Softmax,
                normalize: Some(Normalize { epsilon: 0.0, least }),
                scale: 1.0,
                groups: None,
            };
            let intermediate = config.size("moe_intermediate_size", Some(1_536))?;
            let shared = config.count("moe_num_shared_experts")?.filter(|shared| *shared > 0).map(|shared| shared * intermediate);
            let (first, step) = (config.count("moe_layer_start_index")?.unwrap_or(1), config.size("moe_layer_interval", Some(1))?);
            // A negative index stands for the last layer.
            let last = config.0["moe_layer_end_index"].as_u64().map_or(usize::MAX, |last| last as usize);
            let routed = Routed { routing, intermediate, choice_bias: true, shared, shared_gate: false };
            model.experts(routed, |layer| (layer + 1) % step == 0 && (first..=last).contains(&layer))
        },
    },
    Family {
        model_type: "qwen3_moe",
        defaults: Defaults { max_positions: 32_768, ..LLAMA },
        adapt: |config, model| {
            model.attention_biases(config)?;
            model.head_norms();
            if config.flag("use_sliding_window")?.unwrap_or(false) {
                return Err("\"use_sliding_window\": true is not supported for qwen3_moe".into());
            }
            let (step, dense) = (config.size("decoder_sparse_step", Some(1))?, config.integers("mlp_only_layers")?);
            model.experts(softmax_experts(config)?, |layer| !dense.contains(&(layer as u64)) && (layer + 1) % step == 0)
        },
    },
    Family {
        model_type: "qwen2_moe",
        defaults: Defaults { max_positions: 32_768, sliding: Some(Sliding::AfterFirst), ..LLAMA },
        adapt: |config, model| {
            model.biases(config.flag("qkv_bias")?.unwrap_or(true), false, false);
            model.names = TensorNames::QWEN2_MOE;
            let shared = Some(config.size("shared_expert_intermediate_size", Some(5_632))?);
            let routed = Routed { shared, shared_gate: true, ..softmax_experts(config)? };
            let (step, dense) = (config.size("decoder_sparse_step", Some(1))?, config.integers("mlp_only_layers")?);
            model.experts(routed, |layer| !dense.contains(&(layer as u64)) && (layer + 1) % step == 0)
        },
    },
    Family {
        model_type: "granitemoe",
        defaults: LLAMA,
        adapt: |config, model| {
            model.attention_biases(config)?;
            model.names = TensorNames::GRANITE_MOE;
            model.granite_scales(config)?;
            let routed = top_experts(config, 8, 2)?;
            model.experts(routed, |_| true)
        },
    },
    Family {
        model_type: "mellum",
        defaults: Defaults { max_positions: 131_072, sliding: Some(Sliding::AllBut { nth: 4, window: 1_024 }), ..LLAMA },
        adapt: |config, model| {
            model.head_norms();
            let dense = config.texts("mlp_layer_types")?.unwrap_or_default();
            model.experts(softmax_experts(config)?, |layer| dense.get(layer).is_none_or(|kind| *kind == "sparse"))
        },
    },
    Family {
        model_type: "olmoe",
        defaults: Defaults { eps: 1e-5, max_positions: 4_096, ..LLAMA },
        adapt: |config, model| {
            if config.has("clip_qkv") {
                return Err(format!("\"clip_qkv\": {} is not supported (null is)", config.0["clip_qkv"]));
            }
            model.attention_biases(config)?;
            model.qk_norms(NormExtent::Token, false);
            let intermediate = config.size("intermediate_size", None)?;
            model.experts(Routed { intermediate, ..softmax_experts(config)? }, |_| true)
        },
    },
    Family {
        model_type: "mixtral",
        defaults: Defaults { eps: 1e-5, rope_theta: 1_000_000.0, max_positions: 131_072, sliding: Some(Sliding::All(None)), ..LLAMA },
        adapt: |config, model| {
            model.names = TensorNames::MIXTRAL;
            let routed = top_experts(config, 8, 2)?;
            model.experts(routed, |_| true)
        },
    },
    Family {
        model_type: "gpt_oss",
        defaults: Defaults {
            eps: 1e-5,
            rope_theta: 150_000.0,
            max_positions: 131_072,
            sliding: Some(Sliding::AllBut { nth: 2, window: 128 }),
            ..LLAMA
        },
        adapt: |config, model| {
            if let Some(limit) = config.number("swiglu_limit")?.filter(|limit| *limit as f32 != Activation::SWIGLU_LIMIT) {
                return Err(format!("\"swiglu_limit\": {limit} is not supported ({} is)", Activation::SWIGLU_LIMIT));
            }
            let bias = config.flag("attention_bias")?.unwrap_or(true);
            model.biases(bias, bias, false);
            model.names = TensorNames::GPT_OSS;
            model.experts(top_experts(config, 128, 4)?, |_| true)?;
            for layer in &mut model.spec.layers {
                if let Some(attention) = layer.attention_mut() {
                    attention.sinks = true;
                }
                if let FeedForward::Experts(experts) = &mut layer.feed_forward {
                    (experts.activation, experts.bias, experts.router_bias) = (Activation::ClampedSwiglu, true, true);
                }
            }
            Ok(())
        },
    },
    Family {
        model_type: "minimax_m2",
        defaults: Defaults { max_positions: 196_608, ..LLAMA },
        adapt: |config, model| {
            model.names = TensorNames::MIXTRAL;
            model.qk_norms(NormExtent::Token, false);
            let routing = RoutingSpec {
                experts: config.size("num_local_experts", None)?,
                top_k: config.size("num_experts_per_tok", Some(8))?,
                score: RouterScore::Sigmoid,
                normalize: Some(Normalize { epsilon: 0.0, least: 0.0 }),
                scale: 1.0,
                groups: None,
            };
            let intermediate = config.size("intermediate_size", None)?;
            model.experts(Routed { routing, intermediate, choice_bias: true, shared: None, shared_gate: false }, |_| true)
        },
    },
    Family {
        model_type: "glm4_moe",
        defaults: Defaults { eps: 1e-5, rotary_share: 0.5, max_positions: 131_072, ..LLAMA },
        adapt: |config, model| {
            refuse_groups(config)?;
            let bias = config.flag("attention_bias")?.unwrap_or(false);
            model.biases(bias, false, false);
            if config.flag("use_qk_norm")?.unwrap_or(false) {
                model.head_norms();
            }
            let dense = config.count("first_k_dense_replace")?.unwrap_or(1);
            model.experts(sigmoid_experts(config)?, |layer| layer >= dense)
        },
    },
    Family {
        model_type: "solar_open",
        defaults: Defaults { eps: 1e-5, rope_theta: 1_000_000.0, max_positions: 131_072, ..LLAMA },
        adapt: |config, model| {
            refuse_groups(config)?;
            model.attention_biases(config)?;
            model.experts(sigmoid_experts(config)?, |_| true)
        },
    },
];

/// Qwen 3's experts: a softmax over all of them, whose greatest are taken as they are or made to sum to 1.
pub(super) fn softmax_experts(config: Config<'_>) -> Result<Routed, String> {
    // transformers 5 writes the newer name.
    let experts = if config.has("num_experts") { "num_experts" } else { "num_local_experts" };
    let routing = RoutingSpec {
        experts: config.size(experts, None)?,
        top_k: config.size("num_experts_per_tok", Some(8))?,
        score: RouterScore::Softmax,
        normalize: config.flag("norm_topk_prob")?.unwrap_or(false).then_some(Normalize { epsilon: 0.0, least: 0.0 }),
        scale: 1.0,
        groups: None,
    };
    let intermediate = config.size("moe_intermediate_size", Some(768))?;
    Ok(Routed { routing, intermediate, choice_bias: false, shared: None, shared_gate: false })
}

/// Mixtral's experts: a softmax over the greatest logits alone.
fn top_experts(config: Config<'_>, experts: u64, top_k: u64) -> Result<Routed, String> {
    let routing = RoutingSpec {
        experts: config.size("num_local_experts", Some(experts))?,
        top_k: config.size("num_experts_per_tok", Some(top_k))?,
        score: RouterScore::TopKSoftmax,
        normalize: None,
        scale: 1.0,
        groups: None,
    };
    let intermediate = config.size("intermediate_size", None)?;
    Ok(Routed { routing, intermediate, choice_bias: false, shared: None, shared_gate: false })
}

/// DeepSeek 3's experts: sigmoids, a bias that moves the choice, a network shared by all tokens.
pub(super) fn sigmoid_experts(config: Config<'_>) -> Result<Routed, String> {
    let routing = RoutingSpec {
        experts: config.size("n_routed_experts", None)?,
        top_k: config.size("num_experts_per_tok", Some(8))?,
        score: RouterScore::Sigmoid,
        normalize: config.flag("norm_topk_prob")?.unwrap_or(true).then_some(Normalize { epsilon: 1e-20, least: 0.0 }),
        scale: config.number("routed_scaling_factor")?.unwrap_or(1.0) as f32,
        groups: None,
    };
    let intermediate = config.size("moe_intermediate_size", None)?;
    let shared = config.count("n_shared_experts")?.unwrap_or(1);
    Ok(Routed { routing, intermediate, choice_bias: true, shared: (shared > 0).then_some(shared * intermediate), shared_gate: false })
}
