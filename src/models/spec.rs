//! What a decoder-only language model is, as plain data: no tensors, no control flow.
//!
//! [`super::families`] makes a spec from a config.json, [`super::decoder`] computes with it.

use crate::kernels::{
    Activation, AttentionSpec, ConvSpec, DeltaSpec, ExpertLimits, LatentSpec, NormKind, RopeTable, RoutingSpec, StepLimits,
};

/// One model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of config.json.
    pub model_type: String,
    /// Rows of the embedding and of the LM head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// The longest context the model was made for.
    pub max_positions: usize,
    /// Embeddings are multiplied by it.
    pub embedding_scale: f32,
    pub layers: Vec<LayerSpec>,
    /// What layers rotate by; several where kinds of layers differ.
    pub ropes: Vec<RopeTable>,
    /// What they rotate by instead where sequences may grow longer than the model was first trained for (LongRoPE, dynamic NTK).
    pub long_ropes: Option<LongRopes>,
    /// Of every norm but those of queries and keys.
    pub norm: NormSpec,
    /// The LM head is the embedding.
    pub tied: bool,
    /// Logits are multiplied by it.
    pub logit_scale: f32,
    /// Logits become `cap · tanh(logit / cap)`.
    pub logit_cap: Option<f32>,
    /// The method that `quantization_config` names. Weights that are packed so cannot be read; plain ones are used as they are.
    pub quantized: Option<String>,
}

/// See [`ModelSpec::long_ropes`].
#[derive(Debug, Clone, PartialEq)]
pub struct LongRopes {
    /// Contexts above this many tokens take them.
    pub beyond: usize,
    /// The longest context that they are for.
    pub longest: usize,
    pub tables: Vec<RopeTable>,
}

/// One layer: a mixer, then a feed-forward network, each a branch beside the residual stream.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    pub mixer: Mixer,
    pub feed_forward: FeedForward,
    pub residual: Residual,
    /// What a branch adds is multiplied by it.
    pub residual_scale: f32,
    /// The residual stream behind the layer is multiplied by a number that the checkpoint holds.
    pub scalar: bool,
}

/// How a layer's tokens see those before them.
#[derive(Debug, Clone, PartialEq)]
pub enum Mixer {
    Attention(AttentionLayer),
    /// Attention over one latent vector of each token (DeepSeek).
    Latent(LatentLayer),
    /// A gated convolution over a few tokens (LFM2).
    ShortConv(ShortConv),
    /// Linear attention (Qwen 3.5).
    GatedDelta(DeltaLayer),
}

#[derive(Debug, Clone, PartialEq)]
pub struct LatentLayer {
    /// Attention with the one head that is cached.
    pub spec: AttentionSpec,
    pub latent: LatentSpec,
    /// Components of a head's value.
    pub value_dim: usize,
    /// Queries are made from so many numbers, which are normalized first.
    pub query_rank: Option<usize>,
    /// On the projections down to queries' and keys' vectors, and on the last one.
    pub bias: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct DeltaLayer {
    pub delta: DeltaSpec,
    /// Over queries, keys and values.
    pub conv: ConvSpec,
    /// Projections are stored as one tensor in which each key head's queries, keys, values and gates are side by side (Qwen 3 Next).
    pub by_head: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ShortConv {
    pub conv: ConvSpec,
    /// On the convolution and both projections.
    pub bias: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct AttentionLayer {
    pub spec: AttentionSpec,
    /// On the projections to queries, keys and values.
    pub qkv_bias: bool,
    pub output_bias: bool,
    /// Each head has a sink.
    pub sinks: bool,
    /// Values are the keys before norm and rotation: the layer has no projection to values.
    pub values_are_keys: bool,
    /// What attention gives is multiplied by the sigmoids of as many numbers, which are stored beside the queries, head by head.
    pub output_gate: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum FeedForward {
    Dense(DenseSpec),
    Experts(ExpertsSpec),
}

#[derive(Debug, Clone, PartialEq)]
pub struct DenseSpec {
    pub intermediate: usize,
    pub activation: Activation,
    /// `down(activation(gate(x)) · up(x))` instead of `down(activation(up(x)))`.
    pub gated: bool,
    pub bias: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsSpec {
    pub routing: RoutingSpec,
    /// A vector shifts the choice of experts.
    pub choice_bias: bool,
    /// Of each expert.
    pub intermediate: usize,
    pub activation: Activation,
    /// Each expert's projections have one.
    pub bias: bool,
    /// On the router's logits.
    pub router_bias: bool,
    /// A network that every token goes through besides.
    pub shared: Option<DenseSpec>,
    /// What that network gives is multiplied by the sigmoid of one more number of the token.
    pub shared_gate: bool,
}

/// Where a layer's norms are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// `x += attention(norm(x)); x += feed_forward(norm(x))`
    Sequential,
    /// `x += norm(attention(norm(x)))` and the same for the feed-forward network.
    Sandwich,
    /// `x += norm(attention(x))` and the same for the feed-forward network.
    Post,
    /// `x += attention(n) + feed_forward(n)` with `n = norm(x)`.
    Parallel,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    pub kind: NormKind,
    pub eps: f32,
    /// What is stored is one less than the weight.
    pub plus_one: bool,
    /// LayerNorm only.
    pub bias: bool,
}

impl FeedForward {
    /// Dense networks of the layer, routed ones left out.
    fn dense(&self) -> Option<&DenseSpec> {
        match self {
            Self::Dense(dense) => Some(dense),
            Self::Experts(experts) => experts.shared.as_ref(),
        }
    }
}

/// Widths of a mixer's buffers.
#[derive(Debug, Clone, Copy, Default)]
pub struct MixerWidths {
    /// What attention proper or a convolution reads, or a mixer's result.
    pub input: usize,
    /// What attention proper or a convolution writes, or a mixer's first values.
    pub output: usize,
    /// Gates as wide as the result, or values between two projections.
    pub inner: usize,
    /// A few numbers of each token.
    pub few: usize,
    /// One head's inputs and results.
    pub head: usize,
}

impl MixerWidths {
    fn max(self, other: Self) -> Self {
        Self {
            input: self.input.max(other.input),
            output: self.output.max(other.output),
            inner: self.inner.max(other.inner),
            few: self.few.max(other.few),
            head: self.head.max(other.head),
        }
    }
}

impl Mixer {
    pub fn widths(&self) -> MixerWidths {
        match self {
            Self::Attention(AttentionLayer { spec, output_gate, .. }) => MixerWidths {
                input: spec.qkv_width(),
                output: spec.q_width(),
                inner: if *output_gate { spec.q_width() } else { 0 },
                ..Default::default()
            },
            Self::Latent(LatentLayer { spec, latent, value_dim, query_rank, .. }) => {
                let (heads, rank) = (latent.heads, query_rank.unwrap_or(0));
                MixerWidths {
                    input: spec.qkv_width().max(heads * value_dim).max(rank),
                    output: spec.q_width().max(heads * (latent.nope_dim + latent.rope_dim)).max(heads * value_dim),
                    inner: rank.max(heads * latent.rank),
                    few: latent.head_dim(),
                    head: latent.nope_dim.max(latent.rank).max(*value_dim),
                }
            }
            Self::ShortConv(ShortConv { conv, .. }) => {
                MixerWidths { input: conv.input_width(), output: conv.channels, ..Default::default() }
            }
            // The buffers of input and output change places.
            Self::GatedDelta(DeltaLayer { delta, conv, .. }) => {
                let width = conv.channels.max(delta.value_width());
                MixerWidths { input: width, output: width, inner: delta.value_width(), few: 2 * delta.value_heads, head: 0 }
            }
        }
    }

    /// Width of what the last projection reads.
    pub fn output_width(&self) -> usize {
        match self {
            Self::Attention(attention) => attention.spec.q_width(),
            Self::Latent(layer) => layer.latent.heads * layer.value_dim,
            Self::ShortConv(short) => short.conv.channels,
            Self::GatedDelta(layer) => layer.delta.value_width(),
        }
    }

    /// Numbers of one sequence's states, kept beside the KV cache: of a convolution, and of a recurrence.
    pub fn state_widths(&self) -> Option<(usize, usize)> {
        match self {
            Self::Attention(_) | Self::Latent(_) => None,
            Self::ShortConv(short) => Some((short.conv.state_width(), 0)),
            Self::GatedDelta(layer) => Some((layer.conv.state_width(), layer.delta.state_width())),
        }
    }

    /// What is cached of each token's attention.
    pub fn attention(&self) -> Option<&AttentionSpec> {
        match self {
            Self::Attention(AttentionLayer { spec, .. }) | Self::Latent(LatentLayer { spec, .. }) => Some(spec),
            Self::ShortConv(_) | Self::GatedDelta(_) => None,
        }
    }

    /// Weights in matrices, in a model of this width.
    fn parameters(&self, hidden: usize) -> usize {
        let inner = match self {
            Self::Attention(layer) => hidden * (layer.spec.qkv_width() + if layer.output_gate { layer.spec.q_width() } else { 0 }),
            Self::Latent(LatentLayer { latent, value_dim, query_rank, .. }) => {
                let queries = latent.heads * (latent.nope_dim + latent.rope_dim);
                let queries = query_rank.map_or(hidden * queries, |rank| rank * (hidden + queries));
                queries + hidden * latent.head_dim() + latent.rank * latent.heads * (latent.nope_dim + value_dim)
            }
            Self::ShortConv(short) => hidden * short.conv.input_width() + short.conv.channels * short.conv.kernel,
            Self::GatedDelta(DeltaLayer { delta, conv, .. }) => {
                hidden * (conv.channels + delta.value_width() + 2 * delta.value_heads) + conv.channels * conv.kernel
            }
        };
        inner + hidden * self.output_width()
    }
}

impl LayerSpec {
    /// Attention with heads of its own for each query or group of queries.
    pub fn attention(&self) -> Option<&AttentionLayer> {
        match &self.mixer {
            Mixer::Attention(attention) => Some(attention),
            _ => None,
        }
    }

    pub fn attention_mut(&mut self) -> Option<&mut AttentionLayer> {
        match &mut self.mixer {
            Mixer::Attention(attention) => Some(attention),
            _ => None,
        }
    }
}

impl ModelSpec {
    /// The longest context that can be asked for. Without being asked the model serves [`ModelSpec::max_positions`].
    pub fn longest_context(&self) -> usize {
        self.long_ropes.as_ref().map_or(0, |long| long.longest).max(self.max_positions)
    }

    /// The model as it runs where sequences may have so many tokens.
    pub fn for_context(mut self, max_model_len: usize) -> Self {
        if let Some(long) = self.long_ropes.take_if(|long| max_model_len > long.beyond) {
            self.ropes = long.tables;
        }
        self
    }

    /// Number of weights in matrices and norms, the LM head counted only when it is not the embedding.
    pub fn parameters(&self) -> usize {
        let embedding = self.vocab_size * self.hidden_size * if self.tied { 1 } else { 2 };
        self.layers.iter().map(|layer| self.layer_parameters(layer)).sum::<usize>() + self.hidden_size + embedding
    }

    fn layer_parameters(&self, layer: &LayerSpec) -> usize {
        let hidden = self.hidden_size;
        let network = |intermediate: usize, gated: bool| hidden * intermediate * if gated { 3 } else { 2 };
        let routed = match &layer.feed_forward {
            FeedForward::Dense(_) => 0,
            FeedForward::Experts(experts) => experts.routing.experts * (network(experts.intermediate, true) + hidden),
        };
        let dense = layer.feed_forward.dense().map_or(0, |dense| network(dense.intermediate, dense.gated));
        let norms = match layer.residual {
            Residual::Parallel => 1,
            Residual::Sequential | Residual::Post => 2,
            Residual::Sandwich => 4,
        };
        layer.mixer.parameters(hidden) + hidden * norms + dense + routed
    }

    /// The greatest width of a dense network's inner values.
    pub fn widest_intermediate(&self) -> usize {
        self.layers.iter().filter_map(|layer| layer.feed_forward.dense()).map(|dense| dense.intermediate).max().unwrap_or(0)
    }

    /// The greatest widths of all layers' mixers.
    pub fn mixer_widths(&self) -> MixerWidths {
        self.layers.iter().map(|layer| layer.mixer.widths()).fold(MixerWidths::default(), MixerWidths::max)
    }

    /// What is cached of attention, of the layers that have it.
    pub fn attentions(&self) -> impl Iterator<Item = &AttentionSpec> {
        self.layers.iter().filter_map(|layer| layer.mixer.attention())
    }

    /// Widths of what queries of latent attention are made from.
    fn query_ranks(&self) -> impl Iterator<Item = usize> {
        self.layers.iter().filter_map(|layer| match &layer.mixer {
            Mixer::Latent(layer) => layer.query_rank,
            _ => None,
        })
    }

    /// Numbers of one sequence's states, over all layers.
    pub fn state_width(&self) -> usize {
        self.layers.iter().filter_map(|layer| layer.mixer.state_widths()).map(|(conv, recurrent)| conv + recurrent).sum()
    }

    /// The greatest sizes of layers with experts.
    pub fn expert_limits(&self) -> Option<ExpertLimits> {
        let limits = self.layers.iter().filter_map(|layer| match &layer.feed_forward {
            FeedForward::Experts(experts) => Some(ExpertLimits {
                hidden: self.hidden_size,
                intermediate: experts.intermediate,
                experts: experts.routing.experts,
                top_k: experts.routing.top_k,
            }),
            FeedForward::Dense(_) => None,
        });
        limits.reduce(|a, b| ExpertLimits {
            hidden: a.hidden,
            intermediate: a.intermediate.max(b.intermediate),
            experts: a.experts.max(b.experts),
            top_k: a.top_k.max(b.top_k),
        })
    }

    /// How large a step of so many tokens is.
    pub fn step_limits(&self, max_tokens: usize, max_logits: usize, block_size: usize) -> StepLimits {
        let mut attention: Vec<AttentionSpec> = Vec::new();
        for spec in self.attentions() {
            if !attention.contains(spec) {
                attention.push(*spec);
            }
        }
        let experts = self.expert_limits();
        let widest = [
            self.hidden_size,
            self.layers.iter().map(|layer| layer.mixer.output_width()).max().unwrap_or(0),
            self.mixer_widths().head,
            self.query_ranks().max().unwrap_or(0),
            self.widest_intermediate(),
            experts.map_or(0, |experts| experts.intermediate),
        ];
        StepLimits {
            max_tokens,
            max_logits,
            widest: widest.into_iter().max().unwrap_or(0),
            block_size,
            attention,
            frequencies: self.ropes.iter().map(|table| table.frequencies.len()).sum(),
            experts,
        }
    }
}
