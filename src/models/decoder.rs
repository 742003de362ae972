//! One decoder for every family and every device: [`Decoder::forward`] is the whole of a forward pass.

use std::ops::Range;

use candle_core::Result;

use crate::kernels::{Backend, Epilogue, Experts, Linear, Norm, TableRow};
use crate::models::pooling::Pooling;
use crate::models::shard::Shard;
use crate::models::spec::ModelSpec;

mod load;
mod mixer;

#[cfg(test)]
pub use load::{Place, format_of};
pub use load::{buffer_bytes, finer_formats};
pub use mixer::LayerCache;
use mixer::{Mixer, MixerBuffers};

/// A backend's matrix product with its bias.
type LinearOf<B> = Linear<<B as Backend>::Weight, <B as Backend>::Vector>;
type NormOf<B> = Norm<<B as Backend>::Vector>;

/// A model with its weights and the buffers of a step, on one device; or a rank's part of it.
pub struct Decoder<B: Backend> {
    /// Of this part.
    pub spec: ModelSpec,
    shard: Shard,
    /// `[vocab, hidden]`
    embedding: LinearOf<B>,
    /// What is added to embeddings: rows of each table `[rows, hidden]`.
    tables: Vec<(TableRow, B::Weight)>,
    embedding_norm: Option<NormOf<B>>,
    layers: Vec<Layer<B>>,
    norm: Option<NormOf<B>>,
    /// `[vocab, hidden]`; `None`: the embedding, or another rank's.
    head: Option<LinearOf<B>>,
    /// Behind the pooling.
    pooling_head: Vec<HeadLayer<B>>,
    buffers: Buffers<B::Buffer>,
}

struct Layer<B: Backend> {
    mixer: Mixer<B>,
    /// What of the mixer this is.
    mixer_shard: Shard,
    /// `[hidden, output width]`; of attention `[hidden, h·d]`.
    output: LinearOf<B>,
    mixer_norms: BranchNorms<B>,
    feed_forward: FeedForward<B>,
    feed_forward_norms: BranchNorms<B>,
    /// What a branch adds to the residual stream is multiplied by it.
    residual_scale: f32,
    /// What the residual stream is multiplied by behind the layer.
    scalar: Option<f32>,
}

/// A layer behind the pooling.
struct HeadLayer<B: Backend> {
    linear: LinearOf<B>,
    epilogue: Epilogue,
    norm: Option<NormOf<B>>,
}

/// The norms of one branch beside the residual stream.
struct BranchNorms<B: Backend> {
    before: Before<B>,
    after: After<B>,
}

/// What becomes of what a branch gives.
enum After<B: Backend> {
    /// It is added to the residual stream.
    Add,
    /// It is normalized, and then added.
    NormAdd(NormOf<B>),
    /// It is added, and the sum is normalized.
    AddNorm(NormOf<B>),
}

/// What a branch reads.
enum Before<B: Backend> {
    Norm(NormOf<B>),
    /// The residual stream as it is.
    Nothing,
    /// What `normed` holds already: the same as the branch beside it, or the residual stream that has just been normalized.
    Same,
}

enum FeedForward<B: Backend> {
    Dense(Dense<B>),
    Experts {
        /// `[experts, hidden]`
        router: LinearOf<B>,
        experts: Experts<B::Weight, B::Vector>,
        /// Every token goes through it besides.
        shared: Option<Dense<B>>,
        /// `[1, hidden]`: gates the shared network.
        shared_gate: Option<LinearOf<B>>,
    },
}

struct Dense<B: Backend> {
    /// `[2 · intermediate, hidden]`, gates first, or `[intermediate, hidden]` without gates.
    up: LinearOf<B>,
    /// What it ends in.
    epilogue: Epilogue,
    /// `[hidden, intermediate]`
    down: LinearOf<B>,
}

/// What a step writes between its operations, made once.
struct Buffers<T> {
    /// `[t, hidden]`: the residual stream.
    x: T,
    /// `[t, hidden]`
    normed: T,
    mixer: MixerBuffers<T>,
    /// `[t, intermediate]`
    hidden: T,
    /// `[t, hidden]`: what a branch gave, where it is normalized.
    branch: T,
    /// `[t, experts]`
    router: T,
    /// `[n, hidden]`: rows of `x` whose logits are wanted, or what sequences were pooled to.
    picked: T,
    /// `[n, vocab]`, or as wide as the widest layer behind the pooling.
    logits: T,
}

impl<B: Backend> Decoder<B> {
    /// Runs the tokens that the backend was begun with, writing their keys, values and states. Leaves the residual stream before the final norm.
    ///
    /// Of several ranks each computes a part of every branch, and all get the sum. Only the first adds to the residual stream; the others
    /// put their parts where it was, so that the sum over the ranks is the stream with all parts added.
    pub fn forward(&mut self, backend: &mut B, caches: &mut [LayerCache<B>]) -> Result<()> {
        let Buffers { x, normed, mixer, hidden, branch, router, .. } = &mut self.buffers;
        backend.embed(&self.embedding.weight, self.spec.embedding_scale, x)?;
        for (row, table) in &self.tables {
            backend.embed_add(table, *row, x)?;
        }
        if let Some(norm) = &self.embedding_norm {
            normalize(backend, norm, x, normed)?;
        }
        for (layer, cache) in self.layers.iter().zip(caches) {
            let (scale, of_mixer, of_network) = (layer.residual_scale, layer.mixer_shard, self.shard);

            layer.mixer_norms.before(backend, x, normed)?;
            let mixed = layer.mixer.run(backend, normed, cache, mixer)?;
            match &layer.mixer_norms.after {
                After::Add => {
                    backend.linear(mixed, &layer.output, adds(of_mixer, scale), x)?;
                    sum(backend, of_mixer, scale, x)?;
                }
                After::NormAdd(norm) => {
                    backend.linear(mixed, &layer.output, Epilogue::Store, branch)?;
                    sum(backend, of_mixer, 1.0, branch)?;
                    backend.norm_add(branch, norm, scale, x)?;
                }
                After::AddNorm(norm) => {
                    backend.linear(mixed, &layer.output, adds(of_mixer, scale), x)?;
                    sum(backend, of_mixer, scale, x)?;
                    normalize(backend, norm, x, normed)?;
                }
            }

            layer.feed_forward_norms.before(backend, x, normed)?;
            match &layer.feed_forward_norms.after {
                After::Add => {
                    layer.feed_forward.run(backend, normed, router, hidden, adds(of_network, scale), x)?;
                    sum(backend, of_network, scale, x)?;
                }
                After::NormAdd(norm) => {
                    layer.feed_forward.run(backend, normed, router, hidden, Epilogue::Store, branch)?;
                    sum(backend, of_network, 1.0, branch)?;
                    backend.norm_add(branch, norm, scale, x)?;
                }
                After::AddNorm(norm) => {
                    layer.feed_forward.run(backend, normed, router, hidden, adds(of_network, scale), x)?;
                    sum(backend, of_network, scale, x)?;
                    normalize(backend, norm, x, normed)?;
                }
            }
            if let Some(scalar) = layer.scalar {
                backend.scale(x, scalar)?;
            }
        }
        Ok(())
    }

    /// Logits of the step's tokens `positions`, in [`Decoder::logits`]. The residual stream stays, so this may be called again.
    pub fn head(&mut self, backend: &mut B, positions: &[usize]) -> Result<()> {
        let Buffers { x, normed, picked, logits, .. } = &mut self.buffers;
        backend.pick(x, positions, picked)?;
        match &self.norm {
            Some(norm) => backend.norm(picked, norm, normed)?,
            None => backend.copy(picked, normed)?,
        }
        backend.linear(normed, self.head.as_ref().unwrap_or(&self.embedding), Epilogue::Store, logits)?;
        if self.spec.logit_scale != 1.0 || self.spec.logit_cap.is_some() {
            backend.scale_and_cap(logits, self.spec.logit_scale, self.spec.logit_cap)?;
        }
        Ok(())
    }

    /// What the sequences become whose tokens are the rows `spans` of the step, in [`Decoder::pooled`]. To be called once in a step.
    pub fn pool(&mut self, backend: &mut B, pooling: Pooling, spans: &[Range<usize>]) -> Result<()> {
        let Buffers { x, normed, picked, logits, .. } = &mut self.buffers;
        if let Some(norm) = &self.norm {
            normalize(backend, norm, x, normed)?;
        }
        match pooling {
            Pooling::Mean => backend.mean(x, spans, picked)?,
            Pooling::Cls => backend.pick(x, &spans.iter().map(|span| span.start).collect::<Vec<_>>(), picked)?,
            Pooling::Last => backend.pick(x, &spans.iter().map(|span| span.end - 1).collect::<Vec<_>>(), picked)?,
        }
        for layer in &self.pooling_head {
            backend.linear(picked, &layer.linear, layer.epilogue, logits)?;
            match &layer.norm {
                Some(norm) => backend.norm(logits, norm, picked)?,
                None => backend.copy(logits, picked)?,
            }
        }
        Ok(())
    }

    /// What [`Decoder::pool`] made, `[spans, width]`.
    pub fn pooled(&mut self) -> &mut B::Buffer {
        &mut self.buffers.picked
    }

    /// What [`Decoder::head`] made, `[positions, vocab]`.
    pub fn logits(&mut self) -> &mut B::Buffer {
        &mut self.buffers.logits
    }
}

/// How a branch, times `scale`, meets the residual stream on this rank.
fn adds(shard: Shard, scale: f32) -> Epilogue {
    if shard.leads() { Epilogue::Add(scale) } else { Epilogue::Store }
}

/// Makes `x`, to which [`adds`] has led, the sum over all ranks.
fn sum<B: Backend>(backend: &mut B, shard: Shard, scale: f32, x: &mut B::Buffer) -> Result<()> {
    if shard.is_whole() {
        return Ok(());
    }
    if scale != 1.0 && !shard.leads() {
        backend.scale(x, scale)?;
    }
    backend.all_reduce(x)
}

/// `x = norm(x)`. Leaves the same in `normed`, for a branch that reads the residual stream as it is.
fn normalize<B: Backend>(backend: &mut B, norm: &NormOf<B>, x: &mut B::Buffer, normed: &mut B::Buffer) -> Result<()> {
    backend.norm(x, norm, normed)?;
    backend.copy(normed, x)
}

impl<B: Backend> BranchNorms<B> {
    /// Makes `normed` what the branch reads.
    fn before(&self, backend: &mut B, x: &B::Buffer, normed: &mut B::Buffer) -> Result<()> {
        match &self.before {
            Before::Norm(norm) => backend.norm(x, norm, normed),
            Before::Nothing => backend.copy(x, normed),
            Before::Same => Ok(()),
        }
    }
}

impl<B: Backend> FeedForward<B> {
    fn run(
        &self,
        backend: &mut B,
        input: &B::Buffer,
        router_logits: &mut B::Buffer,
        hidden: &mut B::Buffer,
        epilogue: Epilogue,
        out: &mut B::Buffer,
    ) -> Result<()> {
        match self {
            Self::Dense(dense) => {
                dense.up(backend, input, hidden)?;
                dense.down(backend, hidden, epilogue, out)
            }
            Self::Experts { router, experts, shared, shared_gate } => {
                backend.linear(input, router, Epilogue::Store, router_logits)?;
                backend.experts(input, router_logits, experts, epilogue, out)?;
                let Some(shared) = shared else { return Ok(()) };
                shared.up(backend, input, hidden)?;
                if let Some(gate) = shared_gate {
                    // The router's logits are used up, and their buffer has room for one number a row.
                    backend.linear(input, gate, Epilogue::Store, router_logits)?;
                    backend.gate_rows(router_logits, hidden)?;
                }
                shared.down(backend, hidden, if epilogue == Epilogue::Store { Epilogue::Add(1.0) } else { epilogue }, out)
            }
        }
    }
}

impl<B: Backend> Dense<B> {
    fn up(&self, backend: &mut B, input: &B::Buffer, hidden: &mut B::Buffer) -> Result<()> {
        backend.linear(input, &self.up, self.epilogue, hidden)
    }

    fn down(&self, backend: &mut B, hidden: &B::Buffer, epilogue: Epilogue, out: &mut B::Buffer) -> Result<()> {
        backend.linear(hidden, &self.down, epilogue, out)
    }
}
