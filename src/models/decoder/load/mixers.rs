//! The weights of mixers.

use std::ops::Range;

use super::{Loader, Place, Projection, failure};
use crate::error::Failure;
use crate::kernels::{
    AttentionWeights, Backend, CausalConv, Columns, ConvSpec, DeltaSpec, GatedDelta, LatentSpec, Norm, NormExtent, NormKind,
};
use crate::models::decoder::mixer::{Attention, Delta, Latent, Mixer};
use crate::models::decoder::{LinearOf, NormOf};
use crate::models::spec::{AttentionLayer, DeltaLayer, LatentLayer, Mixer as MixerSpec, ShortConv};

/// A mixer, and the projection behind it.
type Mixed<B> = (Mixer<B>, LinearOf<B>);
/// Some rows of a tensor that has so many in all.
type Rows<'a> = (&'a str, usize, Range<usize>);

impl<B: Backend> Loader<'_, '_, B> {
    pub(super) fn mixer(&self, index: usize, mixer: &MixerSpec) -> Result<Mixed<B>, Failure> {
        match mixer {
            MixerSpec::Attention(attention) => self.attention(index, attention),
            MixerSpec::Latent(latent) => self.latent(index, latent),
            MixerSpec::ShortConv(short) => self.short_conv(index, short),
            MixerSpec::GatedDelta(delta) => self.gated_delta(index, delta),
        }
    }

    /// One plain projection `[out, input]`.
    fn plain(&self, index: usize, name: &str, out: usize, input: usize, bias: bool) -> Result<LinearOf<B>, Failure> {
        self.projection(index, &Projection { fused: &[], parts: &[(name, out)], input, columns: Columns::Plain, bias })
    }

    /// A matrix of rows of several tensors.
    fn rows(&self, index: usize, rows: &[Rows<'_>], place: Place) -> Result<LinearOf<B>, Failure> {
        let rows: Vec<_> = rows.iter().map(|(name, out, rows)| (self.in_layer(index, name), *out, rows.clone())).collect();
        self.linear(&self.tensors.rows(&rows, self.spec.hidden_size)?, Columns::Plain, place, None)
    }

    fn attention(&self, index: usize, layer: &AttentionLayer) -> Result<Mixed<B>, Failure> {
        let (names, hidden, spec) = (&self.tensors.names, self.spec.hidden_size, layer.spec);
        let (q, kv, d) = (spec.q_width(), spec.kv_width(), spec.head_dim);
        let output = self.plain(index, names.output, hidden, q, layer.output_bias)?;
        let weights = self.attention_weights(index, layer)?;
        if layer.output_gate {
            // Each head's query, then its gate.
            let part = |nth: usize| (0..spec.heads).map(move |head| (names.q, 2 * q, (2 * head + nth) * d..(2 * head + nth + 1) * d));
            let qkv: Vec<Rows<'_>> = part(0).chain([(names.k, kv, 0..kv), (names.v, kv, 0..kv)]).collect();
            let gate = self.rows(index, &part(1).collect::<Vec<_>>(), Place::Layer)?;
            return Ok((
                Mixer::Attention(Attention { spec, weights, qkv: self.rows(index, &qkv, Place::Layer)?, gate: Some(gate) }),
                output,
            ));
        }
        let values = if layer.values_are_keys { names.k } else { names.v };
        let parts = [(names.q, q), (names.k, kv), (values, kv)];
        let qkv = Projection { fused: &[names.qkv], parts: &parts, input: hidden, columns: Columns::Plain, bias: layer.qkv_bias };
        Ok((Mixer::Attention(Attention { spec, weights, qkv: self.projection(index, &qkv)?, gate: None }), output))
    }

    fn attention_weights(&self, index: usize, layer: &AttentionLayer) -> Result<AttentionWeights<B::Vector>, Failure> {
        let (names, spec) = (&self.tensors.names, &layer.spec);
        let head_norm = |name: &str, heads: usize| -> Result<Option<B::Vector>, Failure> {
            let Some(norm) = spec.qk_norm else { return Ok(None) };
            let len = if norm.extent == NormExtent::Head { spec.head_dim } else { heads * spec.head_dim };
            self.norm_weight(&format!("{}.weight", self.in_layer(index, name)), len).map(Some)
        };
        let sinks = layer.sinks.then(|| self.vector(&self.in_layer(index, names.sinks), spec.heads));
        Ok(AttentionWeights {
            q_norm: head_norm(names.q_norm, spec.heads)?,
            k_norm: head_norm(names.k_norm, spec.kv_heads)?,
            sinks: sinks.transpose()?,
        })
    }

    fn conv(&self, name: &str, spec: ConvSpec, bias: bool) -> Result<CausalConv<B::Vector>, Failure> {
        let weight = self.tensors.taps(&format!("{name}.weight"), spec.channels, spec.kernel)?;
        Ok(CausalConv {
            spec,
            weight: self.backend.vector(weight).map_err(failure)?,
            bias: bias.then(|| self.vector(&format!("{name}.bias"), spec.channels)).transpose()?,
        })
    }

    fn short_conv(&self, index: usize, layer: &ShortConv) -> Result<Mixed<B>, Failure> {
        let ([first, taps, last], hidden, spec) = (self.tensors.names.short_conv, self.spec.hidden_size, layer.conv);
        let input = self.plain(index, first, spec.input_width(), hidden, layer.bias)?;
        let conv = self.conv(&self.in_layer(index, taps), spec, layer.bias)?;
        Ok((Mixer::ShortConv { input, conv }, self.plain(index, last, hidden, spec.channels, layer.bias)?))
    }

    fn gated_delta(&self, index: usize, layer: &DeltaLayer) -> Result<Mixed<B>, Failure> {
        let (prefix, spec) = (self.tensors.names.linear_attention, layer.delta);
        let name = |part: &str| format!("{prefix}.{part}");
        let in_layer = |part: &str| self.in_layer(index, &name(part));
        let (keys, values, heads) = (spec.key_width(), spec.value_width(), spec.value_heads);
        let [qkv, z, gates] = if layer.by_head {
            let (one, two) = (name("in_proj_qkvz"), name("in_proj_ba"));
            by_key_head(spec, &one, &two).map(|(rows, place)| self.rows(index, &rows, place))
        } else {
            let [qkv, z, b, a] = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"].map(name);
            let whole = |name: &'_ str, out: usize| (name.to_owned(), out);
            let parts = [(vec![whole(&qkv, 2 * keys + values)], Place::Layer), (vec![whole(&z, values)], Place::Layer)];
            let gates = (vec![whole(&b, heads), whole(&a, heads)], Place::Router);
            let [qkv, z] = parts;
            [qkv, z, gates].map(|(parts, place)| {
                let rows: Vec<Rows<'_>> = parts.iter().map(|(name, out)| (name.as_str(), *out, 0..*out)).collect();
                self.rows(index, &rows, place)
            })
        };
        let decay = self.tensors.vector(&in_layer("A_log"), heads)?.into_iter().map(f32::exp).collect();
        let delta = GatedDelta {
            spec,
            decay: self.backend.vector(decay).map_err(failure)?,
            decay_bias: self.vector(&in_layer("dt_bias"), heads)?,
            norm: self.vector(&in_layer("norm.weight"), spec.value_dim)?,
        };
        let conv = self.conv(&in_layer("conv1d"), layer.conv, false)?;
        let output = self.plain(index, &name("out_proj"), self.spec.hidden_size, values, false)?;
        Ok((Mixer::GatedDelta(Delta { qkv: qkv?, conv, z: z?, gates: gates?, delta }), output))
    }

    fn latent(&self, index: usize, layer: &LatentLayer) -> Result<Mixed<B>, Failure> {
        let (hidden, spec) = (self.spec.hidden_size, layer.latent);
        let LatentSpec { heads, nope_dim, rope_dim, rank, eps } = spec;
        let vector = |name: &str, len: usize| self.vector(&self.in_layer(index, &format!("self_attn.{name}.weight")), len);
        let queries = heads * (nope_dim + rope_dim);
        let (query_down, query) = match layer.query_rank {
            None => (None, self.plain(index, "self_attn.q_proj", queries, hidden, false)?),
            Some(rank) => {
                let down = self.plain(index, "self_attn.q_a_proj", rank, hidden, layer.bias)?;
                let norm: NormOf<B> = Norm { kind: NormKind::Rms, weight: vector("q_a_layernorm", rank)?, bias: None, eps };
                (Some((down, norm)), self.plain(index, "self_attn.q_b_proj", queries, rank, false)?)
            }
        };
        // Each head's rows make its key, then its value.
        let name = self.in_layer(index, "self_attn.kv_b_proj");
        let (each, value) = (nope_dim + layer.value_dim, layer.value_dim);
        let plain = |source| self.linear(&source, Columns::Plain, Place::Layer, None);
        // llama.cpp's converter turns each head's keys, and stores them apart from the values.
        let part = |kind: &str, head: usize| self.in_layer(index, &format!("self_attn.{kind}_b_proj.{head}"));
        let apart = self.tensors.is_stored(&part("k", 0));
        let keys = (0..heads).map(|head| {
            if apart {
                return plain(self.tensors.rows(&[(part("k", head), rank, 0..rank)], nope_dim)?);
            }
            let columns = head * each..head * each + nope_dim;
            plain(self.tensors.transposed_rows(&name, heads * each, columns, rank)?)
        });
        let values = (0..heads).map(|head| {
            if apart {
                return plain(self.tensors.rows(&[(part("v", head), value, 0..value)], rank)?);
            }
            let rows = head * each + nope_dim..(head + 1) * each;
            plain(self.tensors.rows(&[(name.clone(), heads * each, rows)], rank)?)
        });
        let latent = Latent {
            spec: layer.spec,
            latent: spec,
            query_down,
            query,
            key_down: self.plain(index, "self_attn.kv_a_proj_with_mqa", spec.head_dim(), hidden, layer.bias)?,
            norm: vector("kv_a_layernorm", rank)?,
            keys: keys.collect::<Result<_, _>>()?,
            values: values.collect::<Result<_, _>>()?,
        };
        Ok((Mixer::Latent(latent), self.plain(index, "self_attn.o_proj", hidden, heads * value, layer.bias)?))
    }
}

/// The rows of queries, keys and values, of gates, and of corrections and decays, in tensors whose rows lie by key head.
fn by_key_head<'a>(spec: DeltaSpec, projections: &'a str, gates: &'a str) -> [(Vec<Rows<'a>>, Place); 3] {
    let DeltaSpec { key_heads, value_heads, key_dim, value_dim, .. } = spec;
    let group = value_heads / key_heads;
    let (each, all) = (2 * key_dim + 2 * group * value_dim, 2 * (spec.key_width() + spec.value_width()));
    // Of every key head the rows from `from` on.
    let part = |from: usize, len: usize| (0..key_heads).map(move |head| (projections, all, head * each + from..head * each + from + len));
    let values = group * value_dim;
    let qkv = part(0, key_dim).chain(part(key_dim, key_dim)).chain(part(2 * key_dim, values));
    let small =
        |from: usize| (0..key_heads).map(move |head| (gates, 2 * value_heads, (2 * head + from) * group..(2 * head + from + 1) * group));
    [
        (qkv.collect(), Place::Layer),
        (part(2 * key_dim + values, values).collect(), Place::Layer),
        (small(0).chain(small(1)).collect(), Place::Router),
    ]
}
