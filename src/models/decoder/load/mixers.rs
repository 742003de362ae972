//! The weights of mixers.

use std::ops::Range;

use super::{Loader, Place, Projection, failure};
use crate::error::Failure;
use crate::kernels::{
    AttentionSpec, AttentionWeights, Backend, CausalConv, Columns, ConvSpec, DeltaSpec, GatedDelta, LatentSpec, Norm, NormExtent, NormKind,
};
use crate::models::decoder::mixer::{Attention, Delta, Latent, Mixer};
use crate::models::decoder::{LinearOf, NormOf};
use crate::models::shard::Shard;
use crate::models::spec::{AttentionLayer, DeltaLayer, LatentLayer, Mixer as MixerSpec, ShortConv};
use crate::models::tensors::{Inputs, Part};

/// A mixer, and the projection behind it.
type Mixed<B> = (Mixer<B>, LinearOf<B>);
impl<B: Backend> Loader<'_, '_, B> {
    /// `shard`: what of it is loaded.
    pub(super) fn mixer(&self, index: usize, mixer: &MixerSpec, shard: Shard) -> Result<Mixed<B>, Failure> {
        match mixer {
            MixerSpec::Attention(attention) => self.attention(index, attention, shard),
            MixerSpec::Latent(latent) => self.latent(index, latent, shard),
            MixerSpec::ShortConv(short) => self.short_conv(index, short, shard),
            MixerSpec::GatedDelta(delta) => self.gated_delta(index, delta, shard),
        }
    }

    /// One plain projection `[out, inputs]`.
    fn plain(&self, index: usize, name: &str, out: usize, inputs: impl Into<Inputs>, bias: bool) -> Result<LinearOf<B>, Failure> {
        let (parts, inputs) = ([Part::whole(name, out)], inputs.into());
        self.projection(index, &Projection { fused: &[], parts: &parts, inputs, columns: Columns::Plain, bias })
    }

    /// A projection of rows of several tensors.
    fn rows(&self, index: usize, parts: &[Part<'_>], bias: bool) -> Result<LinearOf<B>, Failure> {
        let inputs = self.spec.hidden_size.into();
        self.projection(index, &Projection { fused: &[], parts, inputs, columns: Columns::Plain, bias })
    }

    fn attention(&self, index: usize, layer: &AttentionLayer, shard: Shard) -> Result<Mixed<B>, Failure> {
        let (names, hidden, whole) = (&self.tensors.names, self.spec.hidden_size, layer.spec);
        let (q, kv, d) = (whole.q_width(), whole.kv_width(), whole.head_dim);
        let (heads, kv_heads) = (shard.of(whole.heads), shard.kv(whole.kv_heads));
        let spec = AttentionSpec { heads: heads.len(), kv_heads: kv_heads.len(), ..whole };
        let (queries, keys) = (Shard::wide(heads.clone(), d), Shard::wide(kv_heads, d));
        let inputs = Inputs { width: q, columns: queries.clone() };
        let output = self.plain(index, names.output, hidden, inputs, layer.output_bias && shard.leads())?;
        let weights = self.attention_weights(index, layer, shard)?;
        if layer.output_gate {
            // Each head's query, then its gate.
            let part =
                |nth: usize| heads.clone().map(move |head| Part::new(names.q, 2 * q, (2 * head + nth) * d..(2 * head + nth + 1) * d));
            let qkv: Vec<Part<'_>> = part(0).chain([names.k, names.v].map(|name| Part::new(name, kv, keys.clone()))).collect();
            let gate = self.rows(index, &part(1).collect::<Vec<_>>(), false)?;
            return Ok((Mixer::Attention(Attention { spec, weights, qkv: self.rows(index, &qkv, false)?, gate: Some(gate) }), output));
        }
        let values = if layer.values_are_keys { names.k } else { names.v };
        let parts = [Part::new(names.q, q, queries), Part::new(names.k, kv, keys.clone()), Part::new(values, kv, keys)];
        let (fused, inputs, bias) = (&[names.qkv], hidden.into(), layer.qkv_bias);
        let qkv = Projection { fused, parts: &parts, inputs, columns: Columns::Plain, bias };
        Ok((Mixer::Attention(Attention { spec, weights, qkv: self.projection(index, &qkv)?, gate: None }), output))
    }

    fn attention_weights(&self, index: usize, layer: &AttentionLayer, shard: Shard) -> Result<AttentionWeights<B::Vector>, Failure> {
        let (names, spec) = (&self.tensors.names, &layer.spec);
        let head_norm = |name: &str, heads: usize| -> Result<Option<B::Vector>, Failure> {
            let Some(norm) = spec.qk_norm else { return Ok(None) };
            let len = if norm.extent == NormExtent::Head { spec.head_dim } else { heads * spec.head_dim };
            self.norm_weight(&format!("{}.weight", self.in_layer(index, name)), len).map(Some)
        };
        let sinks = layer.sinks.then(|| self.part_of_vector(&self.in_layer(index, names.sinks), spec.heads, &[shard.of(spec.heads)]));
        Ok(AttentionWeights {
            q_norm: head_norm(names.q_norm, spec.heads)?,
            k_norm: head_norm(names.k_norm, spec.kv_heads)?,
            sinks: sinks.transpose()?,
        })
    }

    /// A convolution of these of all `channels`.
    fn conv(
        &self,
        name: &str,
        spec: ConvSpec,
        all: usize,
        channels: &[Range<usize>],
        bias: bool,
    ) -> Result<CausalConv<B::Vector>, Failure> {
        let weight = self.tensors.taps(&format!("{name}.weight"), all, channels, spec.kernel)?;
        let bias = bias.then(|| self.part_of_vector(&format!("{name}.bias"), all, channels)).transpose()?;
        Ok(CausalConv { spec, weight: self.backend.vector(weight).map_err(failure)?, bias })
    }

    fn short_conv(&self, index: usize, layer: &ShortConv, shard: Shard) -> Result<Mixed<B>, Failure> {
        let ([first, taps, last], hidden, all) = (self.tensors.names.short_conv, self.spec.hidden_size, layer.conv.channels);
        let channels = shard.of(all);
        let spec = ConvSpec { channels: channels.len(), ..layer.conv };
        let kinds = layer.conv.input_width() / all;
        let part = |kind: usize| Part::new(first, kinds * all, kind * all + channels.start..kind * all + channels.end);
        let input = self.rows(index, &(0..kinds).map(part).collect::<Vec<_>>(), layer.bias)?;
        let conv = self.conv(&self.in_layer(index, taps), spec, all, std::slice::from_ref(&channels), layer.bias)?;
        let output = self.plain(index, last, hidden, Inputs { width: all, columns: channels }, layer.bias && shard.leads())?;
        Ok((Mixer::ShortConv { input, conv }, output))
    }

    fn gated_delta(&self, index: usize, layer: &DeltaLayer, shard: Shard) -> Result<Mixed<B>, Failure> {
        let (prefix, whole) = (self.tensors.names.linear_attention, layer.delta);
        let name = |part: &str| format!("{prefix}.{part}");
        let in_layer = |part: &str| self.in_layer(index, &name(part));
        let heads = shard.of(whole.key_heads);
        let of_values = Shard::wide(heads.clone(), whole.value_heads / whole.key_heads);
        let spec = DeltaSpec { key_heads: heads.len(), value_heads: of_values.len(), ..whole };
        // Queries, keys and values side by side, as the convolution has them.
        let (keys, values) = (Shard::wide(heads.clone(), whole.key_dim), Shard::wide(of_values.clone(), whole.value_dim));
        let (width, all) = (whole.key_width(), whole.qkv_width());
        let channels = [keys.clone(), width + keys.start..width + keys.end, 2 * width + values.start..2 * width + values.end];
        let [qkv, z, gates] = if layer.by_head {
            let (one, two) = (name("in_proj_qkvz"), name("in_proj_ba"));
            by_key_head(whole, heads, &one, &two).map(|(parts, place)| self.placed_rows(index, &parts, place))
        } else {
            let [qkv, z, b, a] = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"].map(name);
            let qkv: Vec<Part<'_>> = channels.iter().map(|rows| Part::new(&qkv, all, rows.clone())).collect();
            let z = vec![Part::new(&z, whole.value_width(), values.clone())];
            let gates = [&b, &a].map(|name| Part::new(name, whole.value_heads, of_values.clone())).to_vec();
            let all = [(qkv, Place::Layer), (z, Place::Layer), (gates, Place::Router)];
            all.map(|(parts, place)| self.placed_rows(index, &parts, place))
        };
        let decay = self.tensors.vector(&in_layer("A_log"), whole.value_heads)?[of_values.clone()].iter().copied().map(f32::exp).collect();
        let delta = GatedDelta {
            spec,
            decay: self.backend.vector(decay).map_err(failure)?,
            decay_bias: self.part_of_vector(&in_layer("dt_bias"), whole.value_heads, std::slice::from_ref(&of_values))?,
            norm: self.vector(&in_layer("norm.weight"), spec.value_dim)?,
        };
        let conv = self.conv(&in_layer("conv1d"), ConvSpec { channels: spec.qkv_width(), ..layer.conv }, all, &channels, false)?;
        let inputs = Inputs { width: whole.value_width(), columns: values };
        let output = self.plain(index, &name("out_proj"), self.spec.hidden_size, inputs, false)?;
        Ok((Mixer::GatedDelta(Delta { qkv: qkv?, conv, z: z?, gates: gates?, delta }), output))
    }

    /// Rows of several tensors, of a matrix that stands elsewhere than most in a layer.
    fn placed_rows(&self, index: usize, parts: &[Part<'_>], place: Place) -> Result<LinearOf<B>, Failure> {
        let names: Vec<String> = parts.iter().map(|part| self.in_layer(index, part.name)).collect();
        let parts: Vec<Part<'_>> = names.iter().zip(parts).map(|(name, part)| Part { name, ..part.clone() }).collect();
        self.linear(&self.tensors.matrix(&[], &parts, self.spec.hidden_size.into())?, Columns::Plain, place, None)
    }

    fn latent(&self, index: usize, layer: &LatentLayer, shard: Shard) -> Result<Mixed<B>, Failure> {
        let (hidden, whole) = (self.spec.hidden_size, layer.latent);
        let LatentSpec { heads, nope_dim, rope_dim, rank, eps } = whole;
        let own = shard.of(heads);
        let spec = LatentSpec { heads: own.len(), ..whole };
        let vector = |name: &str, len: usize| self.vector(&self.in_layer(index, &format!("self_attn.{name}.weight")), len);
        let queries = |name: &'static str, input: usize| {
            let width = nope_dim + rope_dim;
            let parts = [Part::new(name, heads * width, Shard::wide(own.clone(), width))];
            self.projection(index, &Projection { fused: &[], parts: &parts, inputs: input.into(), columns: Columns::Plain, bias: false })
        };
        let (query_down, query) = match layer.query_rank {
            None => (None, queries("self_attn.q_proj", hidden)?),
            Some(rank) => {
                let down = self.plain(index, "self_attn.q_a_proj", rank, hidden, layer.bias)?;
                let norm: NormOf<B> = Norm { kind: NormKind::Rms, weight: vector("q_a_layernorm", rank)?, bias: None, eps };
                (Some((down, norm)), queries("self_attn.q_b_proj", rank)?)
            }
        };
        // Each head's rows make its key, then its value.
        let name = self.in_layer(index, "self_attn.kv_b_proj");
        let (each, value) = (nope_dim + layer.value_dim, layer.value_dim);
        let plain = |source| self.linear(&source, Columns::Plain, Place::Layer, None);
        let keys = own.clone().map(|head| {
            let columns = head * each..head * each + nope_dim;
            plain(self.tensors.transposed_rows(&name, heads * each, columns, rank)?)
        });
        let values = own.clone().map(|head| {
            let part = Part::new(&name, heads * each, head * each + nope_dim..(head + 1) * each);
            plain(self.tensors.matrix(&[], &[part], rank.into())?)
        });
        let latent = Latent {
            spec: AttentionSpec { heads: own.len(), ..layer.spec },
            latent: spec,
            query_down,
            query,
            key_down: self.plain(index, "self_attn.kv_a_proj_with_mqa", spec.head_dim(), hidden, layer.bias)?,
            norm: vector("kv_a_layernorm", rank)?,
            keys: keys.collect::<Result<_, _>>()?,
            values: values.collect::<Result<_, _>>()?,
        };
        let inputs = Inputs { width: heads * value, columns: Shard::wide(own, value) };
        Ok((Mixer::Latent(latent), self.plain(index, "self_attn.o_proj", hidden, inputs, layer.bias && shard.leads())?))
    }
}

/// Of these key heads the rows of queries, keys and values, of gates, and of corrections and decays, in tensors whose rows lie by key head.
fn by_key_head<'a>(spec: DeltaSpec, heads: Range<usize>, projections: &'a str, gates: &'a str) -> [(Vec<Part<'a>>, Place); 3] {
    let DeltaSpec { key_heads, value_heads, key_dim, value_dim, .. } = spec;
    let group = value_heads / key_heads;
    let (each, all) = (2 * key_dim + 2 * group * value_dim, 2 * (spec.key_width() + spec.value_width()));
    // Of every key head the rows from `from` on.
    let part =
        |from: usize, len: usize| heads.clone().map(move |head| Part::new(projections, all, head * each + from..head * each + from + len));
    let values = group * value_dim;
    let qkv = part(0, key_dim).chain(part(key_dim, key_dim)).chain(part(2 * key_dim, values));
    let small = |from: usize| {
        let rows = move |head: usize| (2 * head + from) * group..(2 * head + from + 1) * group;
        heads.clone().map(move |head| Part::new(gates, 2 * value_heads, rows(head)))
    };
    [
        (qkv.collect(), Place::Layer),
        (part(2 * key_dim + values, values).collect(), Place::Layer),
        (small(0).chain(small(1)).collect(), Place::Router),
    ]
}
