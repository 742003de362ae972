//! From a spec and a checkpoint to a decoder on a device.

use std::collections::BTreeSet;
use std::ops::Range;

use super::{
    After, Before, BranchNorms, Buffers, Decoder, Dense, FeedForward, HeadLayer, Layer, LayerCache, LinearOf, MixerBuffers, NormOf,
};
use crate::checkpoint::StoredMatrix;
use crate::config::Quantization;
use crate::error::Failure;
use crate::kernels::sizing::{self, Sizing};
use crate::kernels::{
    Backend, Columns, Epilogue, Expert, Experts, Footprint, KvDtype, KvShape, Linear, Norm, StepLimits, TableRow, WeightFormat,
};
use crate::models::device::without_backtrace;
use crate::models::pooling;
use crate::models::shard::Shard;
use crate::models::spec::{DenseSpec, ExpertsSpec, FeedForward as FeedForwardSpec, LayerSpec, ModelSpec, Residual};
use crate::models::tensors::{Inputs, Part, Tensors};

mod mixers;

/// Where a matrix stands in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a layer.
    Layer,
    /// Embedding or LM head, one row for each id: their errors reach every logit, so they never go below 8 bits.
    Vocabulary,
    /// A small matrix whose errors would cost more than its bytes: they would send tokens to other experts, or reach every result.
    Router,
}

/// The format that a strategy means for a matrix whose rows have `width` weights; `None`: as stored. Rows that cannot be cut into blocks take the
/// next finer format.
pub fn format_of(quantization: Quantization, place: Place, width: usize) -> Option<WeightFormat> {
    let fits = |format: WeightFormat| width.is_multiple_of(format.block()).then_some(format);
    match (quantization, place) {
        (Quantization::AsStored | Quantization::Unquantized, _) | (_, Place::Router) => None,
        (Quantization::Wint4, Place::Layer) => fits(WeightFormat::Int4).or(fits(WeightFormat::Int8)),
        (Quantization::Wint4 | Quantization::Wint8, _) => fits(WeightFormat::Int8),
    }
}

/// Unless something else is asked for, weights that are stored in blocks of few bits are held at 8: as 32-bit numbers they would take several
/// times the file's size for the same answers.
fn held(quantization: Quantization, source: &StoredMatrix<'_>) -> Quantization {
    match quantization {
        Quantization::AsStored if source.is_quantized() => Quantization::Wint8,
        quantization => quantization,
    }
}

impl<B: Backend> Decoder<B> {
    /// Reads the weights of a rank's part of the model, and makes the buffers of steps up to `limits`. `spec` is the whole model's. What
    /// makes results of the residual stream is the first rank's alone.
    pub fn load(
        mut spec: ModelSpec,
        shard: Shard,
        tensors: &Tensors<'_>,
        backend: &B,
        quantization: Quantization,
        limits: &StepLimits,
    ) -> Result<Self, Failure> {
        spec.tied = tensors.tied;
        let part = spec.for_shard(shard)?;
        let loader = Loader { spec: &spec, shard, tensors, backend, quantization };
        let embedding = loader.linear(&tensors.embedding(&spec)?, Columns::Plain, Place::Vocabulary, None)?;
        let head = match spec.tied || !shard.leads() {
            true => None,
            false => Some(loader.linear(&tensors.head(&spec)?, Columns::Plain, Place::Vocabulary, None)?),
        };
        let layers = spec.layers.iter().enumerate().map(|(index, layer)| loader.layer(index, layer)).collect::<Result<Vec<_>, _>>()?;
        let names = &tensors.names;
        let embedding_norm = spec.embeddings.norm.then(|| loader.norm(names.embedding_norm)).transpose()?;
        let norm = spec.final_norm.then(|| loader.norm(names.final_norm)).transpose()?;
        let pooling = spec.pooling.as_ref().filter(|_| shard.leads());
        let pooling_head = pooling.into_iter().flat_map(|pooling| &pooling.head).map(|layer| loader.head_layer(layer));
        let (tables, pooling_head) = (loader.tables()?, pooling_head.collect::<Result<_, _>>()?);
        let buffer = |rows, width| backend.buffer(rows, width).map_err(failure);
        let buffers = Buffers::new(&part, limits, buffer, |rows, width| backend.logits_buffer(rows, width).map_err(failure))?;
        Ok(Self { spec: part, shard, embedding, tables, embedding_norm, layers, norm, head, pooling_head, buffers })
    }

    /// Makes what each layer keeps: blocks of keys and values, or slots of states.
    pub fn caches(
        &self,
        backend: &B,
        [blocks, block_size, slots]: [usize; 3],
        dtype: Option<KvDtype>,
    ) -> candle_core::Result<Vec<LayerCache<B>>> {
        let cache = |layer: &LayerSpec| {
            if let Some((conv, recurrence)) = layer.mixer.state_widths() {
                let recurrence = (recurrence > 0).then(|| backend.state(slots, recurrence)).transpose()?;
                return Ok(LayerCache::States { conv: backend.state(slots, conv)?, recurrence });
            }
            let Some(attention) = layer.mixer.attention() else { candle_core::bail!("a layer that keeps nothing") };
            backend.kv_cache(KvShape { dtype, ..attention.kv_shape(blocks, block_size) }).map(LayerCache::Keys)
        };
        self.spec.layers.iter().map(cache).collect()
    }

    /// The matrices of the layers, routers left out.
    fn layer_weights(&self) -> impl Iterator<Item = &B::Weight> {
        self.layers.iter().flat_map(|layer| {
            let mut all = layer.mixer.weights();
            all.push(&layer.output.weight);
            let (dense, experts) = match &layer.feed_forward {
                FeedForward::Dense(dense) => (Some(dense), &[][..]),
                FeedForward::Experts { experts, shared, .. } => (shared.as_ref(), experts.experts.as_slice()),
            };
            all.extend(dense.into_iter().flat_map(|dense| [&dense.up.weight, &dense.down.weight]));
            all.extend(experts.iter().flat_map(|expert| [&expert.gate_up.weight, &expert.down.weight]));
            all
        })
    }

    /// Embedding and LM head.
    fn vocabulary_weights(&self) -> impl Iterator<Item = &B::Weight> {
        std::iter::once(&self.embedding.weight).chain(self.head.as_ref().map(|head| &head.weight))
    }

    /// The memory behind the buffers.
    pub fn memory(&mut self) -> Vec<&mut [u8]> {
        self.buffers.as_mut().all().map(B::buffer_memory).into()
    }
}

impl<F: Footprint> Decoder<Sizing<F>> {
    /// The formats of the layers' matrices, and of embedding and head where those differ.
    pub fn formats(&self) -> String {
        fn names<'a>(weights: impl Iterator<Item = &'a sizing::Weight>) -> String {
            // Fewest bits first.
            let formats: BTreeSet<WeightFormat> = weights.map(|weight| weight.format).collect();
            formats.into_iter().map(WeightFormat::name).collect::<Vec<_>>().join(" and ")
        }
        let (inside, ends) = (names(self.layer_weights()), names(self.vocabulary_weights()));
        if inside == ends { inside } else { format!("{inside}; embedding and head {ends}") }
    }
}

/// Bytes of the buffers that a decoder makes; `None`: more than can be counted.
pub fn buffer_bytes<F: Footprint>(spec: &ModelSpec, limits: &StepLimits) -> Option<usize> {
    let (buffer, logits) = (|rows, width| Ok(F::buffer_bytes(rows, width)), |rows, width| Ok(F::logits_bytes(rows, width)));
    let sizes = Buffers::new(spec, limits, buffer, logits).ok()?;
    sizes.all().into_iter().try_fold(0usize, |sum, size| sum.checked_add(size?))
}

impl<T> Buffers<T> {
    /// What a pooling head makes is no logits: it is read on.
    fn new(
        spec: &ModelSpec,
        limits: &StepLimits,
        make: impl Fn(usize, usize) -> Result<T, Failure>,
        make_logits: impl Fn(usize, usize) -> Result<T, Failure>,
    ) -> Result<Self, Failure> {
        let (t, n, width) = (limits.max_tokens, limits.max_logits, spec.hidden_size);
        let is_used = |used: bool| if used { t } else { 0 };
        let widths = spec.mixer_widths();
        let used = |width: usize| make(is_used(width > 0), width);
        let has_end_norms = spec.layers.iter().any(|layer| matches!(layer.residual, Residual::Sandwich | Residual::Post));
        Ok(Self {
            x: make(t, width)?,
            normed: make(t.max(n), width)?,
            mixer: MixerBuffers {
                input: make(t, widths.input)?,
                output: make(t, widths.output)?,
                inner: used(widths.inner)?,
                few: used(widths.few)?,
                head: [used(widths.head)?, used(widths.head)?],
            },
            hidden: make(t, spec.widest_intermediate())?,
            branch: make(is_used(has_end_norms), width)?,
            router: make(is_used(limits.experts.is_some()), limits.experts.map_or(0, |experts| experts.experts))?,
            picked: make(n, if spec.pooling.is_some() { spec.widest_result() } else { width })?,
            logits: if spec.pooling.is_some() { make(n, spec.widest_result()) } else { make_logits(n, spec.widest_result()) }?,
        })
    }

    fn all(self) -> [T; 13] {
        let Self { x, normed, mixer, hidden, branch, router, picked, logits } = self;
        let [input, output, inner, few, head_in, head_out] = mixer.all();
        [x, normed, input, output, inner, few, head_in, head_out, hidden, branch, router, picked, logits]
    }

    fn as_mut(&mut self) -> Buffers<&mut T> {
        let Self { x, normed, mixer, hidden, branch, router, picked, logits } = self;
        Buffers { x, normed, mixer: mixer.as_mut(), hidden, branch, router, picked, logits }
    }
}

/// Says which rows take a finer format than was asked for.
pub fn finer_formats(quantization: Quantization, spec: &ModelSpec) -> Option<String> {
    let wanted = if quantization == Quantization::Wint4 { WeightFormat::Int4 } else { WeightFormat::Int8 };
    let inner = [spec.hidden_size, spec.widest_intermediate()].into_iter().chain(spec.expert_limits().map(|experts| experts.intermediate));
    let widths: BTreeSet<usize> =
        spec.layers.iter().map(|layer| layer.mixer.output_width()).chain(inner).filter(|width| *width > 0).collect();
    let odd = widths.into_iter().filter(|width| format_of(quantization, Place::Layer, *width) != Some(wanted));
    let odd: Vec<String> = odd.map(|width| width.to_string()).collect();
    (quantization.name().is_some() && !odd.is_empty()).then(|| {
        let (name, widths, block) = (quantization.name().unwrap_or_default(), odd.join(", "), wanted.block());
        format!("QUANTIZATION={name}: rows of {widths} weights cannot be cut into blocks of {block}, and are held in a finer form")
    })
}

/// What a backend said while it loaded. Its own words name tensor and cause.
fn failure(error: candle_core::Error) -> Failure {
    Failure::internal(without_backtrace(&error))
}

struct Loader<'a, 'c, B> {
    /// Of the whole model.
    spec: &'a ModelSpec,
    /// What of it is loaded.
    shard: Shard,
    tensors: &'a Tensors<'c>,
    backend: &'a B,
    quantization: Quantization,
}

/// A projection under its names in fused checkpoints, and under the names and rows of its parts.
struct Projection<'a> {
    fused: &'a [&'static str],
    parts: &'a [Part<'a>],
    inputs: Inputs,
    columns: Columns,
    bias: bool,
}

impl<B: Backend> Loader<'_, '_, B> {
    /// What is added to embeddings.
    fn tables(&self) -> Result<Vec<(TableRow, B::Weight)>, Failure> {
        let (spec, names) = (&self.spec.embeddings, &self.tensors.names);
        let positions = spec.positions.map(|positions| (TableRow::Position(positions.first), names.positions, positions.rows));
        let types = (spec.types > 0).then_some((TableRow::Type, names.types, spec.types));
        let load = |(row, name, rows): (TableRow, &str, usize)| {
            let table = self.tensors.table(name, rows, self.spec.hidden_size)?;
            Ok((row, self.linear(&table, Columns::Plain, Place::Router, None)?.weight))
        };
        positions.into_iter().chain(types).map(load).collect()
    }

    fn head_layer(&self, layer: &pooling::HeadLayer) -> Result<HeadLayer<B>, Failure> {
        let bias = layer.bias.then(|| self.tensors.head_vector(&format!("{}.bias", layer.name), layer.output)).transpose()?;
        let weight = self.tensors.head_matrix(&layer.name, layer.output, layer.input)?;
        let norm = |name: &String| -> Result<NormOf<B>, Failure> {
            let vector = |part: &str| {
                let values = self.tensors.head_vector(&format!("{name}.{part}"), layer.output)?;
                self.backend.vector(values).map_err(failure)
            };
            let bias = self.spec.norm.bias.then(|| vector("bias")).transpose()?;
            Ok(Norm { kind: self.spec.norm.kind, weight: vector("weight")?, bias, eps: self.spec.norm.eps })
        };
        Ok(HeadLayer {
            linear: self.linear(&weight, Columns::Plain, Place::Router, bias)?,
            epilogue: layer.activation.map_or(Epilogue::Store, Epilogue::Activate),
            norm: layer.norm.as_ref().map(norm).transpose()?,
        })
    }

    /// A name below the model's prefix, of one below a layer.
    fn in_layer(&self, index: usize, name: &str) -> String {
        format!("{}.{index}.{name}", self.tensors.names.layers)
    }

    fn layer(&self, index: usize, layer: &LayerSpec) -> Result<Layer<B>, Failure> {
        let names = &self.tensors.names;
        let mixer_shard = layer.mixer.shard(self.shard);
        let (mixer, output) = self.mixer(index, &layer.mixer, mixer_shard)?;
        let in_layer = |name: &str| self.in_layer(index, name);
        let norm = |name: &str| self.norm(&in_layer(name));
        let norms = |first: &str, last: &str| -> Result<BranchNorms<B>, Failure> {
            let before = match layer.residual {
                Residual::Sequential | Residual::Parallel | Residual::Sandwich => Before::Norm(norm(first)?),
                Residual::Post => Before::Nothing,
                // What is before it has been normalized.
                Residual::PostAdd => Before::Same,
            };
            let after = match layer.residual {
                Residual::Sequential | Residual::Parallel => After::Add,
                Residual::Sandwich | Residual::Post => After::NormAdd(norm(last)?),
                Residual::PostAdd => After::AddNorm(norm(last)?),
            };
            Ok(BranchNorms { before, after })
        };
        let feed_forward_norms = match layer.residual {
            Residual::Parallel => BranchNorms { before: Before::Same, after: After::Add },
            _ => norms(names.feed_forward_norm, names.feed_forward_end_norm)?,
        };
        let mixer_norms = match layer.bare_attention {
            true => BranchNorms { before: Before::Nothing, after: After::Add },
            false => norms(names.attention_norm, names.attention_end_norm)?,
        };
        Ok(Layer {
            mixer,
            mixer_shard,
            output,
            mixer_norms,
            feed_forward: self.feed_forward(index, layer)?,
            feed_forward_norms,
            residual_scale: layer.residual_scale,
            scalar: layer.scalar.then(|| self.number(&in_layer(names.scalar))).transpose()?,
        })
    }

    fn feed_forward(&self, index: usize, layer: &LayerSpec) -> Result<FeedForward<B>, Failure> {
        let names = &self.tensors.names;
        let experts = match &layer.feed_forward {
            FeedForwardSpec::Dense(dense) => {
                let names = (names.gate_up, [names.gate, names.up, names.down].map(str::to_owned));
                return self.dense(index, dense, names.0, names.1).map(FeedForward::Dense);
            }
            FeedForwardSpec::Experts(experts) => experts,
        };
        let router_name = self.in_layer(index, names.router);
        let router_parts = [Part::whole(&router_name, experts.routing.experts)];
        let router = self.tensors.matrix(&[], &router_parts, self.spec.hidden_size.into())?;
        let router_bias = experts.router_bias.then(|| self.tensors.bias(&[], &router_parts)).transpose()?;
        let shared =
            experts.shared.as_ref().map(|dense| self.dense(index, dense, &[], names.expert.map(|part| format!("{}.{part}", names.shared))));
        let gate_name = self.in_layer(index, names.shared_gate);
        let gate = experts.shared_gate.then(|| self.tensors.matrix(&[], &[Part::whole(&gate_name, 1)], self.spec.hidden_size.into()));
        let gate = gate.transpose()?.map(|gate| self.linear(&gate, Columns::Plain, Place::Router, None));
        Ok(FeedForward::Experts {
            router: self.linear(&router, Columns::Plain, Place::Router, router_bias)?,
            experts: self.experts(index, experts)?,
            shared: shared.transpose()?,
            shared_gate: gate.transpose()?,
        })
    }

    fn dense(&self, index: usize, dense: &DenseSpec, fused: &[&'static str], [gate, up, down]: [String; 3]) -> Result<Dense<B>, Failure> {
        let (hidden, inner, bias) = (self.spec.hidden_size, dense.intermediate, dense.bias);
        let own = self.shard.of(inner);
        let down = Projection {
            fused: &[],
            parts: &[Part::whole(&down, hidden)],
            inputs: Inputs { width: inner, columns: own.clone() },
            columns: Columns::Plain,
            bias: dense.down_bias && self.shard.leads(),
        };
        if let Some(name) = self.tensors.names.up_gate.filter(|_| dense.gated) {
            let up = self.tensors.gates_first(&self.in_layer(index, name), inner, own, hidden)?;
            let up = self.linear(&up, Columns::Gated, Place::Layer, None)?;
            return Ok(Dense { up, epilogue: Epilogue::Gated(dense.activation), down: self.projection(index, &down)? });
        }
        let parts = [&gate, &up].map(|name| Part::new(name, inner, own.clone()));
        let (fused, parts, columns, epilogue) = match dense.gated {
            true => (fused, &parts[..], Columns::Gated, Epilogue::Gated(dense.activation)),
            false => (&[][..], &parts[1..], Columns::Plain, Epilogue::Activate(dense.activation)),
        };
        Ok(Dense {
            up: self.projection(index, &Projection { fused, parts, inputs: hidden.into(), columns, bias })?,
            epilogue,
            down: self.projection(index, &down)?,
        })
    }

    fn experts(&self, index: usize, spec: &ExpertsSpec) -> Result<Experts<B::Weight, B::Vector>, Failure> {
        let names = &self.tensors.names;
        let stacked = names.stacked.map(|name| self.in_layer(index, name));
        let is_stacked = self.tensors.is_stacked(&stacked[0]);
        let expert = |number: usize| -> Result<Expert<B::Weight, B::Vector>, Failure> {
            if is_stacked {
                let (inner, hidden) = (spec.intermediate, self.spec.hidden_size);
                let (place, own, [gate_up, down]) = ((number, spec.routing.experts), self.shard.of(inner), &stacked);
                let up = self.tensors.stacked(gate_up, place, 2 * inner, hidden.into(), Some(own.clone()))?;
                let up_bias = spec.bias.then(|| self.tensors.stacked_bias(gate_up, place, 2 * inner, Some(own.clone()))).transpose()?;
                let inputs = Inputs { width: inner, columns: own };
                let back = self.tensors.stacked(down, place, hidden, inputs, None)?;
                let has_bias = spec.bias && self.shard.leads();
                let back_bias = has_bias.then(|| self.tensors.stacked_bias(down, place, hidden, None)).transpose()?;
                return Ok(Expert {
                    gate_up: self.linear(&up, Columns::Gated, Place::Layer, up_bias)?,
                    down: self.linear(&back, Columns::Plain, Place::Layer, back_bias)?,
                });
            }
            let parts = names.expert.map(|part| format!("{}.{number}.{part}", names.experts));
            let (intermediate, activation, bias) = (spec.intermediate, spec.activation, spec.bias);
            let dense = DenseSpec { intermediate, activation, gated: true, bias, down_bias: bias };
            let Dense { up, down, .. } = self.dense(index, &dense, &[], parts)?;
            Ok(Expert { gate_up: up, down })
        };
        let choice_bias = spec.choice_bias.then(|| self.vector(&self.in_layer(index, names.choice_bias), spec.routing.experts));
        Ok(Experts {
            routing: spec.routing,
            choice_bias: choice_bias.transpose()?,
            activation: spec.activation,
            experts: (0..spec.routing.experts).map(expert).collect::<Result<_, _>>()?,
        })
    }

    fn projection(&self, index: usize, projection: &Projection<'_>) -> Result<LinearOf<B>, Failure> {
        let full = |name: &str| self.in_layer(index, name);
        let fused: Vec<String> = projection.fused.iter().map(|name| full(name)).collect();
        let names: Vec<String> = projection.parts.iter().map(|part| full(part.name)).collect();
        let parts = names.iter().zip(projection.parts).map(|(name, part)| Part { name, ..part.clone() });
        let parts: Vec<Part<'_>> = parts.collect();
        let bias = projection.bias.then(|| self.tensors.bias(&fused, &parts)).transpose()?;
        self.linear(&self.tensors.matrix(&fused, &parts, projection.inputs.clone())?, projection.columns, Place::Layer, bias)
    }

    fn linear(&self, source: &StoredMatrix<'_>, columns: Columns, place: Place, bias: Option<Vec<f32>>) -> Result<LinearOf<B>, Failure> {
        let format = format_of(held(self.quantization, source), place, source.width);
        Ok(Linear {
            weight: self.backend.weight(source, format, columns).map_err(failure)?,
            bias: bias.map(|bias| self.backend.vector(bias).map_err(failure)).transpose()?,
        })
    }

    fn norm(&self, name: &str) -> Result<NormOf<B>, Failure> {
        let (spec, hidden) = (&self.spec.norm, self.spec.hidden_size);
        let bias = spec.bias.then(|| self.vector(&format!("{name}.bias"), hidden)).transpose()?;
        Ok(Norm { kind: spec.kind, weight: self.norm_weight(&format!("{name}.weight"), hidden)?, bias, eps: spec.eps })
    }

    fn norm_weight(&self, name: &str, len: usize) -> Result<B::Vector, Failure> {
        let mut values = self.tensors.vector(name, len)?;
        if self.spec.norm.plus_one {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        self.backend.vector(values).map_err(failure)
    }

    fn number(&self, name: &str) -> Result<f32, Failure> {
        self.tensors.vector(name, 1).map(|values| values.into_iter().sum())
    }

    fn vector(&self, name: &str, len: usize) -> Result<B::Vector, Failure> {
        self.part_of_vector(name, len, std::slice::from_ref(&(0..len)))
    }

    /// These of a vector's `len` numbers.
    fn part_of_vector(&self, name: &str, len: usize, parts: &[Range<usize>]) -> Result<B::Vector, Failure> {
        let all = self.tensors.vector(name, len)?;
        self.backend.vector(parts.iter().flat_map(|part| &all[part.clone()]).copied().collect()).map_err(failure)
    }
}

#[cfg(test)]
impl Decoder<crate::kernels::cpu::Cpu> {
    /// Bytes of all matrices, routers left out.
    pub fn weight_bytes(&self) -> usize {
        self.layer_weights().chain(self.vocabulary_weights()).map(crate::kernels::cpu::packed::Packed::bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_cannot_be_cut_take_a_finer_format() {
        use Quantization::{AsStored, Wint4, Wint8};
        for (quantization, place, width, format) in [
            (AsStored, Place::Layer, 256, None),
            (Wint8, Place::Layer, 32, Some(WeightFormat::Int8)),
            (Wint8, Place::Layer, 33, None),
            (Wint4, Place::Layer, 512, Some(WeightFormat::Int4)),
            (Wint4, Place::Layer, 288, Some(WeightFormat::Int8)),
            (Wint4, Place::Vocabulary, 256, Some(WeightFormat::Int8)),
            (Wint4, Place::Router, 256, None),
        ] {
            assert_eq!(format_of(quantization, place, width), format, "{quantization:?} {place:?} {width}");
        }
    }
}
