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
    /// Names of tensors beside the layers, before those of [`OUTSIDE`].
    pub outside: &'static [(&'static str, &'static str)],
    /// What stands before a layer's number.
    pub layers: &'static str,
    /// The type of layers that have no key/value heads.
    pub without_heads: Option<&'static str>,
}

const LLAMA: Architecture = Architecture {
    name: "llama",
    with: None,
    model_type: "llama",
    interleaved: false,
    keys: &[],
    fixed: &[],
    tensors: &[],
    outside: &[],
    layers: "model.layers",
    without_heads: None,
};

/// Tensors beside the layers, without `.weight` or `.bias`.
const OUTSIDE: &[(&str, &str)] = &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

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

const LFM2_KEYS: &[(&str, &str)] = &[
    ("attention.layer_norm_rms_epsilon", "norm_eps"),
    ("shortconv.l_cache", "conv_L_cache"),
    ("expert_count", "num_experts"),
    ("leading_dense_block_count", "num_dense_layers"),
];
const LFM2_OUTSIDE: &[(&str, &str)] = &[("token_embd_norm", "model.embedding_norm"), ("output_norm", "model.embedding_norm")];
const LATENT_KEYS: &[(&str, &str)] = &[
    ("attention.q_lora_rank", "q_lora_rank"),
    ("attention.kv_lora_rank", "kv_lora_rank"),
    ("rope.dimension_count", "qk_rope_head_dim"),
    ("attention.value_length_mla", "v_head_dim"),
    ("expert_count", "n_routed_experts"),
    ("expert_shared_count", "n_shared_experts"),
    ("expert_group_used_count", "topk_group"),
    ("leading_dense_block_count", "first_k_dense_replace"),
    ("expert_weights_scale", "routed_scaling_factor"),
    ("expert_weights_norm", "norm_topk_prob"),
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
    ("attn_sinks", "self_attn.sinks"),
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
const SHARED: &[(&str, &str)] = &[
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
];
const GRANITE: &[(&str, &str)] = &[
    ("attention.scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
];
const GRANITE_MOE: &[(&str, &str)] = &[
    ("attention.scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
    ("expert_count", "num_local_experts"),
];
/// Keys and values are made of one vector; heads of the matrices that do it lie in one tensor each.
const LATENT: &[(&str, &str)] = &[
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("attn_k_b", "self_attn.k_b_proj.*"),
    ("attn_v_b", "self_attn.v_b_proj.*"),
];
const LFM2: &[(&str, &str)] = &[
    ("attn_norm", "operator_norm"),
    ("ffn_norm", "ffn_norm"),
    ("attn_output", "self_attn.out_proj"),
    ("attn_q_norm", "self_attn.q_layernorm"),
    ("attn_k_norm", "self_attn.k_layernorm"),
    ("shortconv.in_proj", "conv.in_proj"),
    ("shortconv.conv", "conv.conv"),
    ("shortconv.out_proj", "conv.out_proj"),
    ("ffn_gate", "feed_forward.w1"),
    ("ffn_up", "feed_forward.w3"),
    ("ffn_down", "feed_forward.w2"),
    ("ffn_gate_inp", "feed_forward.gate"),
    ("exp_probs_b", "feed_forward.expert_bias"),
    ("ffn_gate_exps", "feed_forward.experts.*.w1"),
    ("ffn_up_exps", "feed_forward.experts.*.w3"),
    ("ffn_down_exps", "feed_forward.experts.*.w2"),
];
const BERT: &[(&str, &str)] = &[
    ("attn_q", "attention.self.query"),
    ("attn_k", "attention.self.key"),
    ("attn_v", "attention.self.value"),
    ("attn_output", "attention.output.dense"),
    ("attn_output_norm", "attention.output.LayerNorm"),
    ("ffn_up", "intermediate.dense"),
    ("ffn_down", "output.dense"),
    ("layer_output_norm", "output.LayerNorm"),
];
const BERT_OUTSIDE: &[(&str, &str)] = &[
    ("token_embd", "model.embeddings.word_embeddings"),
    ("position_embd", "model.embeddings.position_embeddings"),
    ("token_types", "model.embeddings.token_type_embeddings"),
    ("token_embd_norm", "model.embeddings.LayerNorm"),
    ("cls", "classifier.dense"),
    ("cls.output", "classifier.out_proj"),
];
const NOMIC: &[(&str, &str)] = &[
    ("attn_qkv", "attn.Wqkv"),
    ("attn_output", "attn.out_proj"),
    ("attn_output_norm", "norm1"),
    ("ffn_up", "mlp.fc11"),
    ("ffn_gate", "mlp.fc12"),
    ("ffn_down", "mlp.fc2"),
    ("layer_output_norm", "norm2"),
];
const NOMIC_OUTSIDE: &[(&str, &str)] = &[
    ("token_embd", "model.embeddings.word_embeddings"),
    ("token_types", "model.embeddings.token_type_embeddings"),
    ("token_embd_norm", "model.emb_ln"),
];
const MODERN_BERT: &[(&str, &str)] = &[
    ("attn_norm", "attn_norm"),
    ("attn_qkv", "attn.Wqkv"),
    ("attn_output", "attn.Wo"),
    ("ffn_norm", "mlp_norm"),
    ("ffn_up", "mlp.Wi"),
    ("ffn_down", "mlp.Wo"),
];
const MODERN_BERT_OUTSIDE: &[(&str, &str)] = &[
    ("token_embd", "model.embeddings.tok_embeddings"),
    ("token_embd_norm", "model.embeddings.norm"),
    ("output_norm", "model.final_norm"),
    ("cls", "head.dense"),
    ("cls.norm", "head.norm"),
    ("cls.output", "classifier"),
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
    Architecture {
        name: "qwen2moe",
        model_type: "qwen2_moe",
        keys: &[("expert_count", "num_experts"), ("expert_shared_feed_forward_length", "shared_expert_intermediate_size")],
        fixed: &[("norm_topk_prob", false)],
        tensors: SHARED,
        ..LLAMA
    },
    Architecture {
        name: "gpt-oss",
        model_type: "gpt_oss",
        keys: &[("expert_count", "num_local_experts")],
        tensors: &[("ffn_gate_inp", "mlp.router")],
        ..LLAMA
    },
    Architecture {
        name: "lfm2",
        model_type: "lfm2",
        keys: LFM2_KEYS,
        fixed: &[("block_auto_adjust_ff_dim", false)],
        tensors: LFM2,
        outside: LFM2_OUTSIDE,
        without_heads: Some("conv"),
        ..LLAMA
    },
    Architecture {
        name: "lfm2moe",
        model_type: "lfm2_moe",
        keys: LFM2_KEYS,
        fixed: &[("norm_topk_prob", true)],
        tensors: LFM2,
        outside: LFM2_OUTSIDE,
        without_heads: Some("conv"),
        ..LLAMA
    },
    // Experts by sigmoids, in groups as good as their two best: told by the number of their function.
    Architecture { name: "deepseek2", model_type: "deepseek_v3", keys: LATENT_KEYS, tensors: LATENT, ..LLAMA },
    Architecture { name: "bert", model_type: "bert", tensors: BERT, outside: BERT_OUTSIDE, layers: "model.encoder.layer", ..LLAMA },
    Architecture {
        name: "nomic-bert",
        model_type: "nomic_bert",
        tensors: NOMIC,
        outside: NOMIC_OUTSIDE,
        layers: "model.encoder.layers",
        ..LLAMA
    },
    Architecture {
        name: "modern-bert",
        model_type: "modernbert",
        keys: &[
            ("attention.layer_norm_rms_epsilon", "norm_eps"),
            ("attention.sliding_window", "local_attention"),
            ("attention.sliding_window_pattern", "global_attn_every_n_layers"),
            ("hidden_activation", "hidden_activation"),
        ],
        tensors: MODERN_BERT,
        outside: MODERN_BERT_OUTSIDE,
        ..LLAMA
    },
    Architecture { name: "gemma", model_type: "gemma", ..LLAMA },
    Architecture { name: "gemma2", model_type: "gemma2", tensors: SANDWICH, ..LLAMA },
    Architecture { name: "gemma3", model_type: "gemma3_text", tensors: SANDWICH, ..LLAMA },
    Architecture { name: "phi3", model_type: "phi3", tensors: FUSED, ..LLAMA },
    Architecture { name: "granite", model_type: "granite", interleaved: true, keys: GRANITE, ..LLAMA },
    Architecture {
        name: "granitemoe",
        model_type: "granitemoe",
        interleaved: true,
        keys: GRANITE_MOE,
        tensors: &[("ffn_gate_inp", "block_sparse_moe.router.layer")],
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

    /// What a tensor beside the layers is called in Hugging Face's files.
    pub fn outside(&self, name: &str) -> Option<&'static str> {
        self.outside.iter().chain(OUTSIDE).find(|(theirs, _)| *theirs == name).map(|(_, ours)| *ours)
    }

    /// What a layer's tensor is called in Hugging Face's files.
    pub fn tensor(&self, name: &str) -> Option<&'static str> {
        self.tensors.iter().chain(TENSORS).find(|(theirs, _)| *theirs == name).map(|(_, ours)| *ours)
    }
}
