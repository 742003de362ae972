//! What operations take besides buffers and weights: plain data, the same on every device.

use std::ops::Range;
use std::sync::Arc;

use crate::StepStates;

/// What some models need of a backend beyond what all do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Of sequences, kept by slot, and the convolutions and recurrences over them.
    States,
    LatentAttention,
    /// Attention that is not causal.
    AttentionBothWays,
    ExpertGroups,
}

impl std::fmt::Display for Need {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::States => "layers that keep a state",
            Self::LatentAttention => "latent attention",
            Self::AttentionBothWays => "attention that is not causal",
            Self::ExpertGroups => "groups of experts",
        })
    }
}

/// How a token is sampled from one row of logits, where nothing else is wanted of them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RowSampling {
    /// Together with the index it fixes the random number.
    pub seed: u64,
    pub index: u64,
    /// 0: the greatest logit.
    pub inverse_temperature: f32,
    /// 0: off.
    pub min_p: f32,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub top_k: u32,
    /// Ids with numbers, of each kind once at most, applied in this order: ids that are suppressed (without a meaning of the number), what is added,
    /// what divides logits above 0 and multiplies the others, what is taken off.
    pub changes: [Vec<(u32, f32)>; 4],
}

impl RowSampling {
    /// The greatest logit as it is.
    pub fn is_plain_greedy(&self) -> bool {
        self.inverse_temperature == 0.0 && self.changes.iter().all(Vec::is_empty)
    }
}

/// One sequence's part of a step.
#[derive(Debug, Clone)]
pub struct BatchRow {
    /// Index of its first token in the step.
    pub start: usize,
    /// Its tokens in this step, at least 1.
    pub len: usize,
    /// Tokens in the cache, those of this step included.
    pub context: usize,
    /// The blocks that hold those tokens, in order.
    pub blocks: Arc<Vec<u32>>,
}

/// The tokens of a step, of all sequences one after another.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// `[t]`: rows of the embedding.
    pub tokens: &'a [u32],
    /// `[t]`: position of each token in its own sequence.
    pub positions: &'a [u32],
    /// `[t]`: slots of the KV cache, `block · block_size + offset`.
    pub slots: &'a [u32],
    /// `[t]`: which of several texts each token belongs to; empty where all belong to the first.
    pub types: &'a [u32],
    pub rows: &'a [BatchRow],
    /// Every table that some layer rotates by; [`Rope::table`] is an index into it.
    pub ropes: &'a [RopeTable],
    pub states: &'a StepStates,
}

/// The angles of one kind of rotary embedding: position · frequency.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    /// One for each pair of components that is rotated; a head's other components stay as they are.
    pub frequencies: Vec<f32>,
    /// Multiplies sines and cosines; 1 except for yarn and longrope.
    pub factor: f32,
}

/// Which components of a head form a pair, for `n` frequencies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Neighbours `(2i, 2i+1)`: ERNIE, GLM, GPT-J.
    Interleaved,
    /// Halves `(i, i + n)`: Llama, Qwen, GPT-NeoX.
    Half,
}

/// How a layer rotates queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rope {
    /// Index into [`Batch::ropes`].
    pub table: usize,
    pub pairing: Pairing,
}

/// The nonlinearity of a feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`
    Silu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`
    GeluTanh,
    /// `max(x, 0)²`
    Relu2,
    /// gpt-oss's: `g · sigmoid(1.702 · g)` with `g = min(x, 7)`; what it gates is `u + 1`, with `u` kept between -7 and 7.
    ClampedSwiglu,
    /// `x/2 · (1 + erf(x/√2))`
    Gelu,
    Tanh,
}

impl Activation {
    /// Beyond it [`Activation::ClampedSwiglu`] lets nothing grow.
    pub const SWIGLU_LIMIT: f32 = 7.0;
    /// What stands before the sigmoid's argument in it.
    pub const SWIGLU_ALPHA: f32 = 1.702;
}

/// Which row of a table a token gets beside its own embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableRow {
    /// That of its position, counted from this row on.
    Position(usize),
    /// That of its type.
    Type,
}

/// What becomes of the sums of a [`linear`](super::Backend::linear).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Epilogue {
    /// They are the output.
    Store,
    /// Times this factor they are added to the output: the residual connection.
    Add(f32),
    /// The output is their activation.
    Activate(Activation),
    /// The output is `activation(gate) · up`, for a weight loaded with [`Columns::Gated`], whose first half of rows are gates.
    Gated(Activation),
}

/// What the rows of a weight matrix are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Columns {
    Plain,
    /// The first half are gates, the second half what they gate; multiplied with [`Epilogue::Gated`] only.
    Gated,
}

/// How the weights of a matrix are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WeightFormat {
    /// 256 weights share two f16 units, 32 of them a scale and a minimum of 6 bits: ggml's Q4_K.
    Int4,
    /// 32 weights share one f16 scale: ggml's Q8_0.
    Int8,
    Bf16,
    F32,
}

impl WeightFormat {
    /// Weights that must not be cut apart: a row's length is a multiple of it.
    pub fn block(self) -> usize {
        match self {
            Self::Int4 => 256,
            Self::Int8 => 32,
            Self::Bf16 | Self::F32 => 1,
        }
    }

    /// For reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "8-bit (Q8_0 form)",
            Self::Int4 => "4-bit (Q4_K form)",
        }
    }
}

/// In what activations meet weights of bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ComputeDtype {
    /// f32, or two terms of bf16 where tiles of them are faster still.
    #[default]
    F32,
    /// Rounded to bf16 on processors that multiply bf16 faster. Elsewhere f32.
    Bf16,
}

/// A normalization of rows. `V`: a backend's vectors.
#[derive(Debug)]
pub struct Norm<V> {
    pub kind: NormKind,
    /// As wide as the rows.
    pub weight: V,
    pub bias: Option<V>,
    pub eps: f32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `x · (mean(x²) + eps)^-½ · weight`
    Rms,
    /// `(x − mean(x)) · (variance(x) + eps)^-½ · weight + bias`
    Layer,
}

/// `y = x · Wᵀ + b`. `W` and `V`: a backend's matrices and vectors.
#[derive(Debug)]
pub struct Linear<W, V> {
    /// `[out, in]`
    pub weight: W,
    /// `[out]`
    pub bias: Option<V>,
}

/// One kind of attention over paged keys and values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Of queries; a multiple of `kv_heads`.
    pub heads: usize,
    pub kv_heads: usize,
    /// Components of a head.
    pub head_dim: usize,
    /// Scores are multiplied by it.
    pub scale: f32,
    /// A token sees nothing after it. Without this the whole of a sequence must be in one step.
    pub causal: bool,
    /// A token sees itself and so many less one before it, and without `causal` as many after it.
    pub window: Option<usize>,
    /// Scores become `cap · tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// `None`: positions are told by the causal mask alone, or by what is added to the embeddings.
    pub rope: Option<Rope>,
    pub qk_norm: Option<QkNorm>,
    /// Values are normalized to a mean square of 1 with this epsilon.
    pub value_norm: Option<f32>,
    /// Queries grow with their position.
    pub query_growth: Option<QueryGrowth>,
}

impl AttentionSpec {
    /// The cached positions that a token at `position` of a sequence of `context` sees.
    pub fn visible(&self, position: usize, context: usize) -> Range<usize> {
        let end = match (self.causal, self.window) {
            (true, _) => position + 1,
            (false, None) => context,
            (false, Some(window)) => context.min(position.saturating_add(window)),
        };
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))..end
    }

    /// Width of a token's queries.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of a token's keys, or of its values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The shape of a layer's cache, of the device's own type.
    pub fn kv_shape(&self, blocks: usize, block_size: usize) -> KvShape {
        KvShape { blocks, block_size, kv_heads: self.kv_heads, head_dim: self.head_dim, dtype: None }
    }

    /// Width of queries, keys and values side by side.
    pub fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }
}

/// How queries and keys are normalized (RMS).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QkNorm {
    pub extent: NormExtent,
    /// After the rotation instead of before it.
    pub after_rope: bool,
    pub eps: f32,
}

/// Over how many components a norm of queries or keys goes; its weight is as wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormExtent {
    /// Each head on its own.
    Head,
    /// All heads of the token together.
    Token,
}

/// Queries at position p are multiplied by `1 + beta · ln(1 + ⌊p / length⌋)` (Llama 4's and Ministral's long contexts).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryGrowth {
    pub beta: f32,
    pub length: usize,
}

impl QueryGrowth {
    pub fn factor(&self, position: u32) -> f32 {
        1.0 + self.beta * ((1 + position as usize / self.length) as f32).ln()
    }
}

/// The vectors of one layer's attention. `V`: a backend's vectors.
#[derive(Debug)]
pub struct AttentionWeights<V> {
    /// For [`AttentionSpec::qk_norm`]: `[head_dim]`, or `[heads · head_dim]`.
    pub q_norm: Option<V>,
    /// `[head_dim]`, or `[kv_heads · head_dim]`.
    pub k_norm: Option<V>,
    /// `[heads]`: the score of a key that holds nothing.
    pub sinks: Option<V>,
}

/// No norms and no sinks.
impl<V> Default for AttentionWeights<V> {
    fn default() -> Self {
        Self { q_norm: None, k_norm: None, sinks: None }
    }
}

/// The shape of one layer's keys and values in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    pub blocks: usize,
    /// Tokens in a block.
    pub block_size: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// `None`: the type that the device computes attention with.
    pub dtype: Option<KvDtype>,
}

/// In what the cache holds keys and values. A backend refuses those that it cannot hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    F32,
    F16,
    Bf16,
    /// Components of a head in groups of up to 32, each with an f16 scale.
    Int8,
}

impl KvDtype {
    /// As settings spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::Int8 => "int8",
        }
    }
}

impl KvShape {
    /// The error of a backend that has no cache of this type.
    pub fn not_held(&self, by: &str) -> candle_core::Error {
        candle_core::Error::Msg(format!("{by} has no KV cache of {}", self.dtype.map_or("its own type", KvDtype::name)))
    }
}

/// How a router picks experts for a token and weighs them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoutingSpec {
    pub experts: usize,
    /// Experts a token goes to.
    pub top_k: usize,
    pub score: RouterScore,
    /// The weights of a token's experts are made to sum to 1: they are divided by the greater of their sum plus `epsilon` and `least`.
    pub normalize: Option<Normalize>,
    /// Weights are multiplied by it in the end.
    pub scale: f32,
    /// Only the experts of the best groups can be picked.
    pub groups: Option<ExpertGroups>,
}

/// Experts in groups of neighbours (DeepSeek).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// The number of experts is a multiple of it.
    pub count: usize,
    /// Groups whose experts can be picked.
    pub keep: usize,
    /// A group is as good as its so many best experts together.
    pub best: usize,
}

/// What becomes of a router's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterScore {
    /// Softmax over all experts, then the greatest are picked.
    Softmax,
    /// The greatest logits are picked, then softmax over those.
    TopKSoftmax,
    /// Sigmoid of each.
    Sigmoid,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalize {
    pub epsilon: f32,
    pub least: f32,
}

impl RoutingSpec {
    /// The experts of one token with their weights, from the router's logits `[experts]`; `bias [experts]` shifts the choice alone. Ties go to the
    /// lower index. `picked` is cleared first.
    pub fn route(&self, logits: &[f32], bias: Option<&[f32]>, picked: &mut Vec<(usize, f32)>) {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f32 = logits.iter().map(|logit| (logit - most).exp()).sum();
        let score = |expert: usize| match self.score {
            RouterScore::Softmax => (logits[expert] - most).exp() / total,
            RouterScore::TopKSoftmax => logits[expert],
            RouterScore::Sigmoid => 1.0 / (1.0 + (-logits[expert]).exp()),
        };
        let choice = |expert: usize| score(expert) + bias.map_or(0.0, |bias| bias[expert]);
        let is_open = |expert: usize| self.groups.is_none_or(|groups| self.is_kept(groups, expert * groups.count / self.experts, &choice));
        picked.clear();
        for expert in (0..self.experts).filter(|expert| is_open(*expert)) {
            let value = choice(expert);
            let at = picked.iter().position(|(_, other)| value > *other).unwrap_or(picked.len());
            if at < self.top_k {
                picked.truncate(self.top_k - 1);
                picked.insert(at, (expert, value));
            }
        }
        picked.iter_mut().for_each(|(expert, weight)| *weight = score(*expert));
        if self.score == RouterScore::TopKSoftmax {
            let most = picked.iter().fold(f32::NEG_INFINITY, |most, (_, logit)| most.max(*logit));
            picked.iter_mut().for_each(|(_, weight)| *weight = (*weight - most).exp());
            let total: f32 = picked.iter().map(|(_, weight)| weight).sum();
            picked.iter_mut().for_each(|(_, weight)| *weight /= total);
        }
        if let Some(Normalize { epsilon, least }) = self.normalize {
            let total = (picked.iter().map(|(_, weight)| weight).sum::<f32>() + epsilon).max(least);
            picked.iter_mut().for_each(|(_, weight)| *weight /= total);
        }
        picked.iter_mut().for_each(|(_, weight)| *weight *= self.scale);
    }
}

impl RoutingSpec {
    /// Whether fewer than so many groups as are kept are better than this one; ties go to the lower index.
    fn is_kept(&self, groups: ExpertGroups, group: usize, choice: &impl Fn(usize) -> f32) -> bool {
        let size = self.experts / groups.count;
        let worth = |group: usize| {
            let values = || (group * size..(group + 1) * size).map(choice);
            // The nth best of a few: those that fewer than `best` others are ahead of.
            let ahead =
                |at: usize, value: f32| values().enumerate().filter(|(other, v)| *v > value || (*v == value && *other < at)).count();
            values().enumerate().filter(|(at, value)| ahead(*at, *value) < groups.best).map(|(_, value)| value).sum::<f32>()
        };
        let own = worth(group);
        (0..groups.count).filter(|other| (*other < group && worth(*other) >= own) || worth(*other) > own).count() < groups.keep
    }
}

/// The routed experts of one layer. `W` and `V`: a backend's matrices and vectors.
#[derive(Debug)]
pub struct Experts<W, V> {
    pub routing: RoutingSpec,
    /// `[experts]`: shifts the choice of experts, not their weights.
    pub choice_bias: Option<V>,
    pub activation: Activation,
    pub experts: Vec<Expert<W, V>>,
}

/// One expert's feed-forward network.
#[derive(Debug)]
pub struct Expert<W, V> {
    /// `[2 · intermediate, hidden]` with [`Columns::Gated`].
    pub gate_up: Linear<W, V>,
    /// `[hidden, intermediate]`
    pub down: Linear<W, V>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(spec: RoutingSpec, logits: &[f32], bias: Option<&[f32]>) -> Vec<(usize, f32)> {
        let mut picked = Vec::new();
        spec.route(logits, bias, &mut picked);
        picked
    }

    #[test]
    fn routers_pick_and_weigh() {
        let spec = RoutingSpec { experts: 4, top_k: 2, score: RouterScore::Softmax, normalize: None, scale: 1.0, groups: None };
        let logits = [1.0, 3.0, 2.0, 3.0];
        let total: f32 = logits.iter().map(|logit: &f32| logit.exp()).sum();
        // Ties go to the lower index.
        assert_eq!(route(spec, &logits, None).iter().map(|(expert, _)| *expert).collect::<Vec<_>>(), [1, 3]);
        assert!((route(spec, &logits, None)[0].1 - 3f32.exp() / total).abs() < 1e-6);
        let normalized = RoutingSpec { normalize: Some(Normalize { epsilon: 0.0, least: 0.0 }), ..spec };
        assert!(route(normalized, &logits, None).iter().all(|(_, weight)| (weight - 0.5).abs() < 1e-6));
        let top = RoutingSpec { score: RouterScore::TopKSoftmax, scale: 2.0, ..spec };
        assert!(route(top, &logits, None).iter().all(|(_, weight)| (weight - 1.0).abs() < 1e-6));
        let sigmoid = RoutingSpec { score: RouterScore::Sigmoid, top_k: 1, ..spec };
        let grouped = RoutingSpec { groups: Some(ExpertGroups { count: 2, keep: 1, best: 2 }), ..spec };
        let experts = |logits: &[f32]| route(grouped, logits, None).iter().map(|(expert, _)| *expert).collect::<Vec<_>>();
        assert_eq!((experts(&[9.0, 0.0, 8.9, 8.8]), experts(&[3.0, 3.0, 3.0, 3.0])), (vec![2, 3], vec![0, 1]));
        // The bias moves the choice and not the weight.
        let picked = route(sigmoid, &logits, Some(&[9.0, 0.0, 0.0, 0.0]));
        assert_eq!(picked[0].0, 0);
        assert!((picked[0].1 - 1.0 / (1.0 + (-1f32).exp())).abs() < 1e-6);
    }
}
