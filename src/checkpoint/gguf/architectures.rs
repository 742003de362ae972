//! What llama.cpp calls the models that we serve, their metadata and their tensors, against the names that Hugging Face gives them.

use super::header::Header;

/// One `general.architecture`.
pub struct Architecture {
    pub name: &'static str,
    /// Only files that have this key below the architecture's name, with a number above zero.
    pub with: Option<&'static str>,
    pub model_type: &'static str,
    /// Neighbouring components are rotated together. Where Hugging Face has it otherwise, the converter moved rows of queries and keys.
    pub interleaved: bool,
    /// Keys of the metadata below the architecture's name, and those of config.json; beyond [`KEYS`].
    pub keys: &'static [(&'static str, &'static str)],
    /// What config.json says and the metadata does not.
    pub fixed: &'static [(&'static str, bool)],
    /// Names of a layer's tensors, before those of [`TENSORS`].
    pub tensors: &'static [(&'static str, &'static str)],
}

const LLAMA: Architecture =
    Architecture { name: "llama", with: None, model_type: "llama", interleaved: false, keys: &[], fixed: &[], tensors: &[] };

/// Keys of every architecture.
pub const KEYS: &[(&str, &str)] = &[
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    // Each family reads the one it knows.
    ("attention.layer_norm_epsilon", "layer_norm_eps"),
    ("attention.layer_norm_epsilon", "norm_eps"),
    ("attention.layer_norm_epsilon", "norm_epsilon"),
    ("attention.sliding_window", "sliding_window"),
    ("attention.clamp_kqv", "clip_qkv"),
    ("rope.freq_base", "rope_theta"),
    ("rope.freq_base_swa", "rope_local_base_freq"),
    ("rope.dimension_count", "rotary_dim"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("expert_used_count", "num_experts_per_tok"),
    ("expert_feed_forward_length", "moe_intermediate_size"),
    ("expert_group_count", "n_group"),
];

/// Tensors of a layer, without `.weight` or `.bias`.
pub const TENSORS: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("exp_probs_b", "mlp.gate.e_score_correction_bias"),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
    // `*` stands for the number of an expert: the file has all experts in one tensor.
    ("ffn_gate_exps", "mlp.experts.*.gate_proj"),
    ("ffn_up_exps", "mlp.experts.*.up_proj"),
    ("ffn_down_exps", "mlp.experts.*.down_proj"),
];

const MIXTRAL_TENSORS: &[(&str, &str)] = &[
    ("ffn_gate_inp", "block_sparse_moe.gate"),
    ("exp_probs_b", "block_sparse_moe.e_score_correction_bias"),
    ("ffn_gate_exps", "block_sparse_moe.experts.*.w1"),
    ("ffn_up_exps", "block_sparse_moe.experts.*.w3"),
    ("ffn_down_exps", "block_sparse_moe.experts.*.w2"),
];
const SANDWICH: &[(&str, &str)] = &[("ffn_norm", "pre_feedforward_layernorm")];
/// Gates and what they gate in one.
const FUSED: &[(&str, &str)] = &[("ffn_up", "mlp.gate_up_proj")];
const GLM4: &[(&str, &str)] = &[
    ("post_attention_norm", "post_self_attn_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_mlp_layernorm"),
    ("ffn_up", "mlp.gate_up_proj"),
];

/// Every architecture that is served. Of several rows with one name, the first that fits.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        with: Some("expert_count"),
        model_type: "mixtral",
        interleaved: true,
        keys: &[("expert_count", "num_local_experts")],
        tensors: MIXTRAL_TENSORS,
        ..LLAMA
    },
    Architecture { interleaved: true, ..LLAMA },
    Architecture { name: "mistral3", model_type: "ministral3", interleaved: true, ..LLAMA },
    Architecture { name: "qwen2", model_type: "qwen2", ..LLAMA },
    Architecture { name: "qwen3", model_type: "qwen3", ..LLAMA },
    Architecture {
        name: "qwen3moe",
        model_type: "qwen3_moe",
        keys: &[("expert_count", "num_experts")],
        fixed: &[("norm_topk_prob", true)],
        ..LLAMA
    },
    Architecture { name: "gemma", model_type: "gemma", ..LLAMA },
    Architecture { name: "gemma2", model_type: "gemma2", tensors: SANDWICH, ..LLAMA },
    Architecture { name: "gemma3", model_type: "gemma3_text", tensors: SANDWICH, ..LLAMA },
    Architecture { name: "phi3", model_type: "phi3", tensors: FUSED, ..LLAMA },
    Architecture {
        name: "granite",
        model_type: "granite",
        interleaved: true,
        keys: &[
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ],
        ..LLAMA
    },
    Architecture { name: "ernie4_5", model_type: "ernie4_5", interleaved: true, ..LLAMA },
    Architecture {
        name: "ernie4_5-moe",
        model_type: "ernie4_5_moe",
        interleaved: true,
        keys: &[
            ("expert_count", "moe_num_experts"),
            ("expert_used_count", "moe_k"),
            ("expert_shared_count", "moe_num_shared_experts"),
            ("leading_dense_block_count", "moe_layer_start_index"),
            ("interleave_moe_layer_step", "moe_layer_interval"),
        ],
        tensors: &[("exp_probs_b", "mlp.moe_statics.e_score_correction_bias")],
        ..LLAMA
    },
    Architecture { name: "olmo2", with: Some("attention.sliding_window"), model_type: "olmo3", ..LLAMA },
    Architecture { name: "olmo2", model_type: "olmo2", ..LLAMA },
    Architecture {
        name: "olmoe",
        model_type: "olmoe",
        keys: &[("expert_count", "num_experts")],
        fixed: &[("norm_topk_prob", false)],
        ..LLAMA
    },
    Architecture { name: "smollm3", model_type: "smollm3", interleaved: true, ..LLAMA },
    Architecture { name: "seed_oss", model_type: "seed_oss", ..LLAMA },
    Architecture { name: "chatglm", model_type: "glm", interleaved: true, tensors: FUSED, ..LLAMA },
    Architecture { name: "glm4", model_type: "glm4", interleaved: true, tensors: GLM4, ..LLAMA },
    Architecture {
        name: "glm4moe",
        model_type: "glm4_moe",
        keys: &[
            ("expert_count", "n_routed_experts"),
            ("expert_shared_count", "n_shared_experts"),
            ("leading_dense_block_count", "first_k_dense_replace"),
            ("expert_weights_scale", "routed_scaling_factor"),
            ("expert_weights_norm", "norm_topk_prob"),
        ],
        ..LLAMA
    },
    Architecture { name: "exaone4", model_type: "exaone4", ..LLAMA },
    Architecture { name: "starcoder2", model_type: "starcoder2", tensors: &[("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")], ..LLAMA },
    Architecture { name: "cohere2", model_type: "cohere2", interleaved: true, keys: &[("logit_scale", "logit_scale")], ..LLAMA },
    Architecture {
        name: "hunyuan-dense",
        model_type: "hunyuan_v1_dense",
        tensors: &[("attn_q_norm", "self_attn.query_layernorm"), ("attn_k_norm", "self_attn.key_layernorm")],
        ..LLAMA
    },
    Architecture { name: "arcee", model_type: "arcee", interleaved: true, ..LLAMA },
    Architecture { name: "nemotron", model_type: "nemotron", ..LLAMA },
    Architecture {
        name: "minimax-m2",
        model_type: "minimax_m2",
        keys: &[("expert_count", "num_local_experts")],
        tensors: MIXTRAL_TENSORS,
        ..LLAMA
    },
    Architecture {
        name: "mellum",
        model_type: "mellum",
        keys: &[("expert_count", "num_experts")],
        fixed: &[("norm_topk_prob", true)],
        ..LLAMA
    },
];

impl Architecture {
    /// The row for a file.
    pub fn of(header: &Header<'_>) -> Result<&'static Self, String> {
        let name = header.text("general.architecture")?.ok_or("it has no metadata \"general.architecture\"")?;
        let fits = |row: &&Architecture| {
            let number = |key: &str| header.get(&format!("{name}.{key}")).and_then(|value| value.number());
            row.name == name && row.with.is_none_or(|key| number(key).is_some_and(|number| number > 0.0))
        };
        ARCHITECTURES.iter().find(fits).ok_or_else(|| {
            let mut known: Vec<_> = ARCHITECTURES.iter().map(|row| row.name).collect();
            known.dedup();
            format!("general.architecture \"{name}\" is not supported in GGUF files; this version serves {}", known.join(", "))
        })
    }

    /// What a layer's tensor is called in Hugging Face's files.
    pub fn tensor(&self, name: &str) -> Option<&'static str> {
        self.tensors.iter().chain(TENSORS).find(|(theirs, _)| *theirs == name).map(|(_, ours)| *ours)
    }
}
