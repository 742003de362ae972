//! What the tensors of a layer are called in files.

/// Names below `layers.{index}.`, without `.weight` or `.bias`. An entry that a model's layers do not have is not looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorNames {
    pub attention_norm: &'static str,
    /// After the attention branch.
    pub attention_end_norm: &'static str,
    pub feed_forward_norm: &'static str,
    /// After the feed-forward branch.
    pub feed_forward_end_norm: &'static str,
    /// Queries, keys and values in one, in this order.
    pub qkv: &'static str,
    pub q: &'static str,
    pub k: &'static str,
    pub v: &'static str,
    pub output: &'static str,
    /// The first projection of a short convolution, its taps, and its last projection.
    pub short_conv: [&'static str; 3],
    /// All parts of a gated delta net are below it.
    pub linear_attention: &'static str,
    pub q_norm: &'static str,
    pub k_norm: &'static str,
    /// A vector without a suffix.
    pub sinks: &'static str,
    /// Gates and what they gate in one, gates first; any of these.
    pub gate_up: &'static [&'static str],
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub router: &'static str,
    /// A vector without a suffix that shifts the choice of experts.
    pub choice_bias: &'static str,
    /// Each expert has its number below it, and below that the names of its gate, of what that gates, and of its output.
    pub experts: &'static str,
    pub expert: [&'static str; 3],
    /// The experts' gates with what they gate `[experts, 2 · intermediate, hidden]`, and their outputs `[experts, hidden, intermediate]`, each in one
    /// tensor, in checkpoints that have them so.
    pub stacked: [&'static str; 2],
    /// There they lie `[experts, in, out]` instead, unless they are packed, and gates and what they gate take turns. Their biases have the names
    /// with `_bias`.
    pub stacked_in_turns: bool,
    /// A network that every token goes through beside its experts; below it the same names.
    pub shared: &'static str,
    /// A row whose product with the input gates the shared network.
    pub shared_gate: &'static str,
    /// A number without a suffix that the residual stream is multiplied by behind the layer.
    pub scalar: &'static str,
    /// Beside the layers: the norm after the last one.
    pub final_norm: &'static str,
}

impl TensorNames {
    /// Llama's names, which most families use.
    pub const LLAMA: Self = Self {
        attention_norm: "input_layernorm",
        attention_end_norm: "post_attention_layernorm",
        feed_forward_norm: "post_attention_layernorm",
        feed_forward_end_norm: "post_feedforward_layernorm",
        qkv: "self_attn.qkv_proj",
        q: "self_attn.q_proj",
        k: "self_attn.k_proj",
        v: "self_attn.v_proj",
        output: "self_attn.o_proj",
        short_conv: ["conv.in_proj", "conv.conv", "conv.out_proj"],
        linear_attention: "linear_attn",
        q_norm: "self_attn.q_norm",
        k_norm: "self_attn.k_norm",
        sinks: "self_attn.sinks",
        gate_up: &["mlp.up_gate_proj", "mlp.gate_up_proj"],
        gate: "mlp.gate_proj",
        up: "mlp.up_proj",
        down: "mlp.down_proj",
        router: "mlp.gate",
        choice_bias: "mlp.gate.e_score_correction_bias",
        experts: "mlp.experts",
        expert: ["gate_proj", "up_proj", "down_proj"],
        stacked: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        stacked_in_turns: false,
        shared: "mlp.shared_experts",
        shared_gate: "mlp.shared_expert_gate",
        scalar: "layer_scalar",
        final_norm: "norm",
    };

    /// With norms before and after each branch, as Gemma calls them.
    pub const SANDWICH: Self = Self { feed_forward_norm: "pre_feedforward_layernorm", ..Self::LLAMA };

    /// The same as GLM 4 calls them.
    pub const GLM4: Self = Self {
        attention_end_norm: "post_self_attn_layernorm",
        feed_forward_norm: "post_attention_layernorm",
        feed_forward_end_norm: "post_mlp_layernorm",
        ..Self::LLAMA
    };

    pub const HUNYUAN: Self = Self { q_norm: "self_attn.query_layernorm", k_norm: "self_attn.key_layernorm", ..Self::LLAMA };

    pub const STARCODER: Self = Self { up: "mlp.c_fc", down: "mlp.c_proj", ..Self::LLAMA };

    pub const ERNIE_MOE: Self = Self { choice_bias: "mlp.moe_statics.e_score_correction_bias", ..Self::LLAMA };

    pub const QWEN2_MOE: Self = Self { shared: "mlp.shared_expert", ..Self::LLAMA };

    pub const LFM2: Self = Self {
        attention_norm: "operator_norm",
        feed_forward_norm: "ffn_norm",
        output: "self_attn.out_proj",
        q_norm: "self_attn.q_layernorm",
        k_norm: "self_attn.k_layernorm",
        gate_up: &[],
        gate: "feed_forward.w1",
        up: "feed_forward.w3",
        down: "feed_forward.w2",
        router: "feed_forward.gate",
        choice_bias: "feed_forward.expert_bias",
        experts: "feed_forward.experts",
        expert: ["w1", "w3", "w2"],
        final_norm: "embedding_norm",
        ..Self::LLAMA
    };

    pub const GRANITE_MOE: Self = Self {
        router: "block_sparse_moe.router.layer",
        stacked: ["block_sparse_moe.input_linear", "block_sparse_moe.output_linear"],
        ..Self::LLAMA
    };

    pub const GPT_OSS: Self = Self { router: "mlp.router", stacked_in_turns: true, ..Self::LLAMA };

    pub const MIXTRAL: Self = Self {
        router: "block_sparse_moe.gate",
        choice_bias: "block_sparse_moe.e_score_correction_bias",
        experts: "block_sparse_moe.experts",
        expert: ["w1", "w3", "w2"],
        ..Self::LLAMA
    };
}
