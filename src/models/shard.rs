//! What of a model each of several ranks computes (tensor parallelism): heads, channels and inner columns are divided, what lies between the
//! layers every rank has whole.

use std::ops::Range;

use crate::error::Failure;
use crate::kernels::NormExtent;
use crate::models::spec::{AttentionLayer, DenseSpec, FeedForward, Mixer, ModelSpec};

/// One rank's place among those that compute a model together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Below `ranks`. The first leads: it samples, and adds what must be added once.
    pub rank: usize,
    pub ranks: usize,
}

impl Shard {
    /// All of a model.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    pub fn is_whole(self) -> bool {
        self.ranks == 1
    }

    pub fn leads(self) -> bool {
        self.rank == 0
    }

    /// This rank's part of `count` things, which the ranks can divide.
    pub fn of(self, count: usize) -> Range<usize> {
        let each = count / self.ranks;
        self.rank * each..(self.rank + 1) * each
    }

    /// The heads of keys and values that this rank's queries look at. Where there are fewer than ranks, neighbours have the same one.
    pub fn kv(self, heads: usize) -> Range<usize> {
        if heads.is_multiple_of(self.ranks) {
            return self.of(heads);
        }
        let head = self.rank * heads / self.ranks;
        head..head + 1
    }

    /// The same things in numbers: each is so many `width` wide.
    pub fn wide(things: Range<usize>, width: usize) -> Range<usize> {
        things.start * width..things.end * width
    }
}

impl Mixer {
    /// What of it a rank computes. A norm over all heads of a token needs all of them, so each rank computes that attention whole.
    pub fn shard(&self, shard: Shard) -> Shard {
        let is_whole = matches!(self, Self::Attention(layer) if layer.spec.qk_norm.is_some_and(|norm| norm.extent == NormExtent::Token));
        if is_whole { Shard::WHOLE } else { shard }
    }

    /// What must be a multiple of the number of ranks, or, of heads of keys and values, a part of it.
    fn indivisible(&self, ranks: usize) -> Option<String> {
        let divides = |count: usize| count.is_multiple_of(ranks);
        match self {
            _ if self.shard(Shard { rank: 0, ranks }).is_whole() => None,
            Self::Attention(AttentionLayer { spec, .. }) if !divides(spec.heads) => Some(format!("{} attention heads", spec.heads)),
            Self::Attention(AttentionLayer { spec, .. }) if !divides(spec.kv_heads) && !ranks.is_multiple_of(spec.kv_heads) => {
                Some(format!("{} heads of keys and values", spec.kv_heads))
            }
            Self::Latent(layer) if !divides(layer.latent.heads) => Some(format!("{} attention heads", layer.latent.heads)),
            Self::ShortConv(layer) if !divides(layer.conv.channels) => Some(format!("{} channels of a convolution", layer.conv.channels)),
            Self::GatedDelta(layer) if !divides(layer.delta.key_heads) => {
                Some(format!("{} key heads of linear attention", layer.delta.key_heads))
            }
            _ => None,
        }
    }

    fn for_shard(&self, shard: Shard) -> Self {
        let (shard, mut part) = (self.shard(shard), self.clone());
        match &mut part {
            Self::Attention(AttentionLayer { spec, .. }) => {
                (spec.heads, spec.kv_heads) = (spec.heads / shard.ranks, shard.kv(spec.kv_heads).len());
            }
            // The one cached head is common to all heads of queries.
            Self::Latent(layer) => {
                layer.latent.heads /= shard.ranks;
                layer.spec.heads /= shard.ranks;
            }
            Self::ShortConv(layer) => layer.conv.channels /= shard.ranks,
            Self::GatedDelta(layer) => {
                layer.delta.key_heads /= shard.ranks;
                layer.delta.value_heads /= shard.ranks;
                layer.conv.channels /= shard.ranks;
            }
        }
        part
    }
}

impl FeedForward {
    fn indivisible(&self, ranks: usize) -> Option<String> {
        let (experts, dense) = match self {
            Self::Dense(dense) => (None, Some(dense)),
            Self::Experts(experts) => (Some(experts.intermediate), experts.shared.as_ref()),
        };
        let widths = experts.into_iter().chain(dense.map(|dense| dense.intermediate));
        let odd = widths.into_iter().find(|width| !width.is_multiple_of(ranks));
        odd.map(|width| format!("{width} inner columns of a feed-forward network"))
    }

    fn for_shard(&self, shard: Shard) -> Self {
        let dense = |dense: &mut DenseSpec| dense.intermediate /= shard.ranks;
        let mut part = self.clone();
        match &mut part {
            Self::Dense(network) => dense(network),
            Self::Experts(experts) => {
                experts.intermediate /= shard.ranks;
                experts.shared.iter_mut().for_each(dense);
            }
        }
        part
    }
}

impl ModelSpec {
    /// Most ranks that are looked for when a number does not do.
    const MOST_RANKS: usize = 64;

    /// The model as one rank computes it.
    ///
    /// # Errors
    /// When something cannot be divided by that many ranks: with the numbers that would do.
    pub fn for_shard(&self, shard: Shard) -> Result<Self, Failure> {
        if let Some(odd) = self.indivisible(shard.ranks) {
            let fit: Vec<String> =
                (1..=Self::MOST_RANKS).filter(|ranks| self.indivisible(*ranks).is_none()).map(|ranks| ranks.to_string()).collect();
            let (model, ranks) = (&self.model_type, shard.ranks);
            return Err(Failure::internal(format!(
                "TENSOR_PARALLEL_SIZE={ranks}: {model} has {odd}, which {ranks} ranks cannot divide among them; use one of {}",
                fit.join(", ")
            )));
        }
        let mut part = self.clone();
        for layer in &mut part.layers {
            layer.mixer = layer.mixer.for_shard(shard);
            layer.feed_forward = layer.feed_forward.for_shard(shard);
        }
        Ok(part)
    }

    fn indivisible(&self, ranks: usize) -> Option<String> {
        self.layers.iter().find_map(|layer| layer.mixer.indivisible(ranks).or_else(|| layer.feed_forward.indivisible(ranks)))
    }

    /// Layers whose attention every one of several ranks computes whole; said at the start, since it saves them no memory.
    pub fn undivided_mixers(&self, ranks: usize) -> usize {
        self.layers.iter().filter(|layer| ranks > 1 && layer.mixer.shard(Shard { rank: 0, ranks }).is_whole()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::families::Model;
    use crate::models::golden_families::Golden;

    fn spec(family: &str) -> ModelSpec {
        Model::from_config(&Golden::read(family).config).unwrap().spec
    }

    #[test]
    fn parts_follow_each_other_and_few_heads_are_shared() {
        let ranks = |ranks| (0..ranks).map(move |rank| Shard { rank, ranks });
        assert_eq!(ranks(4).map(|shard| shard.of(8)).collect::<Vec<_>>(), [0..2, 2..4, 4..6, 6..8]);
        assert_eq!(ranks(2).map(|shard| shard.kv(4)).collect::<Vec<_>>(), [0..2, 2..4]);
        assert_eq!(ranks(4).map(|shard| shard.kv(2)).collect::<Vec<_>>(), [0..1, 0..1, 1..2, 1..2]);
        assert_eq!(Shard::WHOLE.kv(3), 0..3);
        assert_eq!(Shard::wide(2..4, 16), 32..64);
    }

    #[test]
    fn what_cannot_be_divided_is_refused_with_the_numbers_that_do() {
        let refused = |family: &str, ranks: usize| spec(family).for_shard(Shard { rank: 0, ranks }).unwrap_err().message;
        let qwen = refused("qwen3", 4);
        assert!(qwen.contains("6 attention heads, which 4 ranks cannot divide") && qwen.ends_with("use one of 1, 2, 6"), "{qwen}");
        assert!(refused("llama", 3).contains("4 attention heads"));
        assert!(refused("qwen3", 3).contains("2 heads of keys and values"));
        assert!(refused("qwen3_next", 6).contains("key heads of linear attention"));
        let wide = refused("llama_yarn", 64);
        assert!(wide.ends_with("use one of 1, 2, 4, 8"), "{wide}");
    }

    #[test]
    fn a_part_keeps_what_lies_between_the_layers() {
        let (whole, part) = (spec("gpt_oss"), spec("gpt_oss").for_shard(Shard { rank: 1, ranks: 2 }).unwrap());
        let limits = [&whole, &part].map(|spec| spec.expert_limits().unwrap());
        assert_eq!((limits[0].experts, limits[0].intermediate), (limits[1].experts, 2 * limits[1].intermediate));
        let heads = |spec: &ModelSpec| spec.layers[0].attention().map(|layer| (layer.spec.heads, layer.spec.kv_heads));
        assert_eq!((heads(&whole), heads(&part)), (Some((6, 2)), Some((3, 1))));
        assert_eq!((part.hidden_size, part.vocab_size), (whole.hidden_size, whole.vocab_size));
        assert_eq!((spec("olmo2").undivided_mixers(2), whole.undivided_mixers(2)), (spec("olmo2").layers.len(), 0));
    }
}
