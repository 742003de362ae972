//! One decoder for every family and every device: [`Decoder::forward`] is the whole of a forward pass.

use candle_core::Result;

use crate::kernels::{Backend, Epilogue, Experts, Linear, Norm};
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

/// A model with its weights and the buffers of a step, on one device.
pub struct Decoder<B: Backend> {
    pub spec: ModelSpec,
    /// `[vocab, hidden]`
    embedding: LinearOf<B>,
    layers: Vec<Layer<B>>,
    norm: NormOf<B>,
    /// `[vocab, hidden]`; `None`: the embedding.
    head: Option<LinearOf<B>>,
    buffers: Buffers<B::Buffer>,
}

struct Layer<B: Backend> {
    mixer: Mixer<B>,
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

/// The norms of one branch beside the residual stream.
struct BranchNorms<B: Backend> {
    before: Before<B>,
    /// Of what the branch adds.
    after: Option<NormOf<B>>,
}

/// What a branch reads.
enum Before<B: Backend> {
    Norm(NormOf<B>),
    /// The residual stream as it is.
    Nothing,
    /// The same as the branch before it, beside which it runs.
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
    /// `[n, hidden]`: rows of `x` whose logits are wanted.
    picked: T,
    /// `[n, vocab]`
    logits: T,
}

impl<B: Backend> Decoder<B> {
    /// Runs the tokens that the backend was begun with, writing their keys, values and states. Leaves the residual stream before the final norm.
    pub fn forward(&mut self, backend: &mut B, caches: &mut [LayerCache<B>]) -> Result<()> {
        let Buffers { x, normed, mixer, hidden, branch, router, .. } = &mut self.buffers;
        backend.embed(&self.embedding.weight, self.spec.embedding_scale, x)?;
        for (layer, cache) in self.layers.iter().zip(caches) {
            let add = Epilogue::Add(layer.residual_scale);

            layer.mixer_norms.before(backend, x, normed)?;
            let mixed = layer.mixer.run(backend, normed, cache, mixer)?;
            match &layer.mixer_norms.after {
                None => backend.linear(mixed, &layer.output, add, x)?,
                Some(norm) => {
                    backend.linear(mixed, &layer.output, Epilogue::Store, branch)?;
                    backend.norm_add(branch, norm, layer.residual_scale, x)?;
                }
            }

            layer.feed_forward_norms.before(backend, x, normed)?;
            match &layer.feed_forward_norms.after {
                None => layer.feed_forward.run(backend, normed, router, hidden, add, x)?,
                Some(norm) => {
                    layer.feed_forward.run(backend, normed, router, hidden, Epilogue::Store, branch)?;
                    backend.norm_add(branch, norm, layer.residual_scale, x)?;
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
        backend.norm(picked, &self.norm, normed)?;
        backend.linear(normed, self.head.as_ref().unwrap_or(&self.embedding), Epilogue::Store, logits)?;
        if self.spec.logit_scale != 1.0 || self.spec.logit_cap.is_some() {
            backend.scale_and_cap(logits, self.spec.logit_scale, self.spec.logit_cap)?;
        }
        Ok(())
    }

    /// What [`Decoder::head`] made, `[positions, vocab]`.
    pub fn logits(&mut self) -> &mut B::Buffer {
        &mut self.buffers.logits
    }
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
