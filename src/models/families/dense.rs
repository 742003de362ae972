//! Families whose feed-forward networks are dense.

use super::{Defaults, Family, LLAMA, Sliding, TensorNames, refuse_experts};
use crate::kernels::{NormExtent, Pairing, QueryGrowth};
use crate::models::spec::Residual;

pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_type: "ernie4_5",
        defaults: ERNIE,
        adapt: |config, model| {
            refuse_experts(config, "moe_num_experts")?;
            let bias = config.flag("use_bias")?.unwrap_or(false);
            model.biases(bias, bias, bias);
            Ok(())
        },
    },
    Family {
        model_type: "llama",
        defaults: LLAMA,
        adapt: |config, model| {
            let attention = config.flag("attention_bias")?.unwrap_or(false);
            model.biases(attention, attention, config.flag("mlp_bias")?.unwrap_or(false));
            Ok(())
        },
    },
    Family {
        model_type: "mistral",
        defaults: Defaults { max_positions: 131_072, sliding: Some(Sliding::All(Some(4_096))), ..LLAMA },
        adapt: |_, _| Ok(()),
    },
    Family {
        model_type: "ministral3",
        defaults: Defaults { eps: 1e-5, rope_theta: 1_000_000.0, max_positions: 262_144, sliding: Some(Sliding::All(None)), ..LLAMA },
        adapt: |config, model| {
            let parameters = config.rope_parameters("full_attention")?;
            if let Some(beta) = parameters.number("llama_4_scaling_beta")? {
                let length = parameters.size("original_max_position_embeddings", None)?;
                model.attention(|spec| spec.query_growth = Some(QueryGrowth { beta: beta as f32, length }));
            }
            Ok(())
        },
    },
    Family {
        model_type: "qwen2",
        defaults: Defaults { max_positions: 32_768, sliding: Some(Sliding::AfterFirst), ..LLAMA },
        adapt: |_, model| {
            model.biases(true, false, false);
            Ok(())
        },
    },
    Family {
        model_type: "qwen3",
        defaults: Defaults { max_positions: 32_768, sliding: Some(Sliding::AfterFirst), ..LLAMA },
        adapt: |config, model| {
            model.attention_biases(config)?;
            model.head_norms();
            Ok(())
        },
    },
    Family {
        model_type: "gemma",
        defaults: Defaults { activation: "gelu_pytorch_tanh", tied: true, max_positions: 8_192, ..LLAMA },
        adapt: |config, model| {
            model.attention_biases(config)?;
            model.like_gemma();
            Ok(())
        },
    },
    Family {
        model_type: "gemma2",
        defaults: Defaults { max_positions: 8_192, sliding: Some(Sliding::AllBut { nth: 2, window: 4_096 }), ..GEMMA },
        adapt: |config, model| {
            model.attention_biases(config)?;
            model.residual(Residual::Sandwich, TensorNames::SANDWICH);
            model.like_gemma();
            model.gemma_scores(config, Some(50.0), Some(30.0))
        },
    },
    Family {
        model_type: "gemma3_text",
        defaults: Defaults {
            rope_theta: 1_000_000.0,
            max_positions: 131_072,
            sliding: Some(Sliding::AllBut { nth: 6, window: 4_096 }),
            ..GEMMA
        },
        adapt: |config, model| {
            model.attention_biases(config)?;
            model.head_norms();
            model.residual(Residual::Sandwich, TensorNames::SANDWICH);
            model.like_gemma();
            model.gemma_scores(config, None, None)
        },
    },
    Family {
        model_type: "gemma4_text",
        defaults: Defaults { max_positions: 131_072, sliding: Some(Sliding::AllBut { nth: 6, window: 512 }), ..GEMMA },
        adapt: |config, model| {
            for (key, served) in [("hidden_size_per_layer_input", 0), ("num_kv_shared_layers", 0), ("num_experts", 0)] {
                if let Some(count) = config.count(key)?.filter(|count| *count != served) {
                    return Err(format!("\"{key}\": {count} is not supported for gemma4_text ({served} is)"));
                }
            }
            for key in ["enable_moe_block", "use_double_wide_mlp"] {
                if config.flag(key)?.unwrap_or(false) {
                    return Err(format!("\"{key}\": true is not supported for gemma4_text"));
                }
            }
            model.attention_biases(config)?;
            model.head_norms();
            model.residual(Residual::Sandwich, TensorNames::SANDWICH);
            model.spec.embedding_scale = (model.spec.hidden_size as f32).sqrt();
            model.spec.logit_cap = config.number("final_logit_softcapping")?.map(|cap| cap as f32);
            let (eps, keys) = (model.spec.norm.eps, config.flag("attention_k_eq_v")?.unwrap_or(false));
            model.spec.layers.iter_mut().for_each(|layer| layer.scalar = true);
            for layer in model.attention_layers() {
                (layer.spec.scale, layer.spec.value_norm) = (1.0, Some(eps));
                layer.values_are_keys = keys && layer.spec.window.is_none();
            }
            Ok(())
        },
    },
    Family {
        model_type: "granite",
        defaults: LLAMA,
        adapt: |config, model| {
            let bias = config.flag("attention_bias")?.unwrap_or(false);
            model.biases(bias, bias, config.flag("mlp_bias")?.unwrap_or(false));
            model.granite_scales(config)
        },
    },
    Family {
        model_type: "phi3",
        defaults: Defaults { eps: 1e-5, max_positions: 4_096, sliding: Some(Sliding::All(None)), ..LLAMA },
        adapt: |_, _| Ok(()),
    },
    Family {
        model_type: "granite_swa",
        defaults: Defaults { eps: 1e-5, tied: true, sliding: Some(Sliding::AllBut { nth: 1, window: 4_096 }), ..LLAMA },
        adapt: |config, model| {
            if !config.has("layer_types") {
                return Err("\"layer_types\" is missing".into());
            }
            let bias = config.flag("attention_bias")?.unwrap_or(false);
            model.biases(bias, bias, config.flag("mlp_bias")?.unwrap_or(false));
            model.attention_layers().for_each(|layer| layer.sinks = true);
            model.layer_ropes(&config.numbers("layer_rope_theta")?)?;
            model.granite_scales(config)
        },
    },
    Family {
        model_type: "smollm3",
        defaults: Defaults { rope_theta: 2_000_000.0, tied: true, max_positions: 32_768, sliding: Some(Sliding::AfterFirst), ..LLAMA },
        adapt: |config, model| {
            let bias = config.flag("attention_bias")?.unwrap_or(false);
            model.biases(bias, bias, config.flag("mlp_bias")?.unwrap_or(false));
            // A 1 stands for a layer that is rotated.
            let (rotated, interval) = (config.integers("no_rope_layers")?, config.size("no_rope_layer_interval", Some(4))?);
            model.without_rope(|index, _| match rotated.get(index) {
                Some(is_rotated) => *is_rotated == 0,
                None => (index + 1) % interval == 0,
            });
            Ok(())
        },
    },
    Family {
        model_type: "seed_oss",
        defaults: Defaults { max_positions: 524_288, ..LLAMA },
        adapt: |config, model| {
            let (qkv, output) = (config.flag("attention_bias")?.unwrap_or(true), config.flag("attention_out_bias")?.unwrap_or(false));
            model.biases(qkv, output, config.flag("mlp_bias")?.unwrap_or(false));
            Ok(())
        },
    },
    Family {
        model_type: "olmo2",
        defaults: Defaults { eps: 1e-5, ..LLAMA },
        adapt: |config, model| {
            model.attention_biases(config)?;
            model.qk_norms(NormExtent::Token, false);
            model.residual(Residual::Post, POST);
            Ok(())
        },
    },
    Family {
        model_type: "olmo3",
        defaults: Defaults {
            eps: 1e-5,
            rope_theta: 500_000.0,
            max_positions: 65_536,
            sliding: Some(Sliding::AllBut { nth: 4, window: 4_096 }),
            ..LLAMA
        },
        adapt: |config, model| {
            model.attention_biases(config)?;
            model.qk_norms(NormExtent::Token, false);
            model.residual(Residual::Post, POST);
            Ok(())
        },
    },
    Family {
        model_type: "exaone4",
        defaults: Defaults { eps: 1e-5, sliding: Some(Sliding::AllBut { nth: 4, window: 4_096 }), ..LLAMA },
        adapt: |_, model| {
            model.head_norms();
            model.residual(Residual::Post, POST);
            // Where layers with a window are, they alone are rotated.
            let has_windows = model.spec.attentions().any(|spec| spec.window.is_some());
            model.without_rope(|_, spec| has_windows && spec.window.is_none());
            Ok(())
        },
    },
    Family {
        model_type: "hunyuan_v1_dense",
        defaults: Defaults { eps: 1e-5, ..LLAMA },
        adapt: |config, model| {
            model.attention_biases(config)?;
            model.qk_norms(NormExtent::Head, true);
            model.names = TensorNames::HUNYUAN;
            Ok(())
        },
    },
    Family {
        model_type: "arcee",
        defaults: Defaults { activation: "relu2", eps: 1e-5, max_positions: 4_096, ..LLAMA },
        adapt: |config, model| {
            let bias = config.flag("attention_bias")?.unwrap_or(false);
            model.biases(bias, bias, config.flag("mlp_bias")?.unwrap_or(false));
            model.without_gates();
            Ok(())
        },
    },
    Family {
        model_type: "nemotron",
        defaults: Defaults { activation: "relu2", eps: 1e-5, eps_key: "norm_eps", rotary_share: 0.5, max_positions: 4_096, ..LLAMA },
        adapt: |config, model| {
            let bias = config.flag("attention_bias")?.unwrap_or(false);
            model.biases(bias, bias, config.flag("mlp_bias")?.unwrap_or(false));
            model.without_gates();
            model.layer_norms(true);
            model.spec.norm.plus_one = true;
            Ok(())
        },
    },
    Family {
        model_type: "cohere2",
        defaults: Defaults {
            pairing: Pairing::Interleaved,
            eps: 1e-5,
            eps_key: "layer_norm_eps",
            tied: true,
            max_positions: 8_192,
            sliding: Some(Sliding::AllBut { nth: 4, window: 4_096 }),
            ..LLAMA
        },
        adapt: |config, model| {
            model.attention_biases(config)?;
            model.layer_norms(false);
            model.residual(Residual::Parallel, TensorNames::LLAMA);
            model.without_rope(|_, spec| spec.window.is_none());
            model.spec.logit_scale = config.number("logit_scale")?.unwrap_or(0.0625) as f32;
            Ok(())
        },
    },
    Family {
        model_type: "starcoder2",
        defaults: Defaults {
            activation: "gelu_pytorch_tanh",
            eps: 1e-5,
            eps_key: "norm_epsilon",
            tied: true,
            max_positions: 4_096,
            sliding: Some(Sliding::All(None)),
            ..LLAMA
        },
        adapt: |config, model| {
            let bias = config.flag("use_bias")?.unwrap_or(true);
            model.biases(bias, bias, bias);
            model.without_gates();
            model.layer_norms(true);
            model.names = TensorNames::STARCODER;
            Ok(())
        },
    },
    Family {
        model_type: "glm",
        defaults: GLM,
        adapt: |config, model| {
            model.biases(config.flag("attention_bias")?.unwrap_or(true), false, false);
            Ok(())
        },
    },
    Family {
        model_type: "glm4",
        defaults: GLM,
        adapt: |config, model| {
            model.biases(config.flag("attention_bias")?.unwrap_or(false), false, false);
            model.residual(Residual::Sandwich, TensorNames::GLM4);
            Ok(())
        },
    },
];

pub(super) const ERNIE: Defaults =
    Defaults { pairing: Pairing::Interleaved, eps: 1e-5, rope_theta: 500_000.0, tied: true, max_positions: 131_072, ..LLAMA };

const GEMMA: Defaults = Defaults { activation: "gelu_pytorch_tanh", activation_key: "hidden_activation", tied: true, ..LLAMA };

const GLM: Defaults = Defaults { pairing: Pairing::Interleaved, eps: 1.5625e-7, rotary_share: 0.5, max_positions: 131_072, ..LLAMA };

/// With norms after each branch alone, Llama's names are right.
const POST: TensorNames = TensorNames::LLAMA;
