//! What lets a layer's tokens see those before them: attention, and what some families have in its place.

use candle_core::{Error, Result};

use super::{LinearOf, NormOf};
use crate::kernels::{AttentionSpec, AttentionWeights, Backend, CausalConv, Epilogue, GatedDelta, HeadColumns, LatentSpec};

/// A mixer with its weights, but for the projection back to the residual stream.
pub enum Mixer<B: Backend> {
    Attention(Attention<B>),
    Latent(Latent<B>),
    ShortConv {
        /// `[3 · channels, hidden]`
        input: LinearOf<B>,
        conv: CausalConv<B::Vector>,
    },
    GatedDelta(Delta<B>),
}

pub struct Attention<B: Backend> {
    pub spec: AttentionSpec,
    pub weights: AttentionWeights<B::Vector>,
    /// `[(h + 2 kv)·d, hidden]`
    pub qkv: LinearOf<B>,
    /// `[h·d, hidden]`: the result is multiplied by the sigmoids of what it gives.
    pub gate: Option<LinearOf<B>>,
}

/// See [`LatentSpec`].
pub struct Latent<B: Backend> {
    pub spec: AttentionSpec,
    pub latent: LatentSpec,
    /// Down to what queries are made of, `[rank, hidden]`, and its norm.
    pub query_down: Option<(LinearOf<B>, NormOf<B>)>,
    /// `[h · (nope + rope), …]`
    pub query: LinearOf<B>,
    /// `[rank + rope, hidden]`
    pub key_down: LinearOf<B>,
    pub norm: B::Vector,
    /// Of each head `[rank, nope]`: what would make keys, multiplied into queries.
    pub keys: Vec<LinearOf<B>>,
    /// Of each head `[value, rank]`: what would make values, multiplied into results.
    pub values: Vec<LinearOf<B>>,
}

pub struct Delta<B: Backend> {
    /// `[queries, keys and values, hidden]`
    pub qkv: LinearOf<B>,
    pub conv: CausalConv<B::Vector>,
    /// `[values, hidden]`: gates of the result.
    pub z: LinearOf<B>,
    /// `[2 · value heads, hidden]`: what a token corrects and what it lets shrink.
    pub gates: LinearOf<B>,
    pub delta: GatedDelta<B::Vector>,
}

/// What a layer keeps of the tokens it has seen.
pub enum LayerCache<B: Backend> {
    /// Keys and values of each token.
    Keys(B::KvCache),
    /// Of each slot the state of a convolution, and that of a recurrence where there is one.
    States { conv: B::State, recurrence: Option<B::State> },
}

/// What mixers write between their operations.
pub struct MixerBuffers<T> {
    /// `[t, …]`: queries, keys and values.
    pub input: T,
    /// `[t, …]`: what attention gives.
    pub output: T,
    pub inner: T,
    pub few: T,
    /// One head's inputs and results.
    pub head: [T; 2],
}

impl<T> MixerBuffers<T> {
    pub fn all(self) -> [T; 6] {
        let [first, second] = self.head;
        [self.input, self.output, self.inner, self.few, first, second]
    }

    pub fn as_mut(&mut self) -> MixerBuffers<&mut T> {
        let [first, second] = &mut self.head;
        let Self { input, output, inner, few, .. } = self;
        MixerBuffers { input, output, inner, few, head: [first, second] }
    }
}

impl<B: Backend> Mixer<B> {
    /// What the step's tokens, `x [t, hidden]`, take from themselves and those before them. The buffer that holds it.
    pub fn run<'b>(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        cache: &mut LayerCache<B>,
        buffers: &'b mut MixerBuffers<B::Buffer>,
    ) -> Result<&'b B::Buffer> {
        match (self, cache) {
            (Self::Attention(attention), LayerCache::Keys(cache)) => attention.run(backend, x, cache, buffers),
            (Self::Latent(latent), LayerCache::Keys(cache)) => latent.run(backend, x, cache, buffers),
            (Self::ShortConv { input, conv }, LayerCache::States { conv: state, .. }) => {
                backend.linear(x, input, Epilogue::Store, &mut buffers.input)?;
                backend.copy_states(state)?;
                backend.causal_conv(&buffers.input, conv, state, &mut buffers.output)?;
                Ok(&buffers.output)
            }
            (Self::GatedDelta(delta), LayerCache::States { conv, recurrence: Some(recurrence) }) => {
                delta.run(backend, x, (conv, recurrence), buffers)
            }
            _ => Err(Error::Msg("a layer was given the cache of another kind".into())),
        }
    }

    /// The matrices, small ones left out.
    pub fn weights(&self) -> Vec<&B::Weight> {
        let linears: Vec<&LinearOf<B>> = match self {
            Self::Attention(Attention { qkv, gate, .. }) => std::iter::once(qkv).chain(gate).collect(),
            Self::Latent(Latent { query_down, query, key_down, keys, values, .. }) => {
                let down = query_down.as_ref().map(|(down, _)| down);
                [query, key_down].into_iter().chain(down).chain(keys).chain(values).collect()
            }
            Self::ShortConv { input, .. } => vec![input],
            Self::GatedDelta(Delta { qkv, z, .. }) => vec![qkv, z],
        };
        linears.into_iter().map(|linear| &linear.weight).collect()
    }
}

impl<B: Backend> Attention<B> {
    fn run<'b>(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        cache: &mut B::KvCache,
        buffers: &'b mut MixerBuffers<B::Buffer>,
    ) -> Result<&'b B::Buffer> {
        let MixerBuffers { input: qkv, output: attended, inner: gates, .. } = buffers;
        backend.linear(x, &self.qkv, Epilogue::Store, qkv)?;
        backend.rope_and_store(qkv, &self.spec, &self.weights, cache)?;
        backend.attend(qkv, &self.spec, &self.weights, cache, attended)?;
        if let Some(gate) = &self.gate {
            backend.linear(x, gate, Epilogue::Store, gates)?;
            backend.gate_rows(gates, attended)?;
        }
        Ok(attended)
    }
}

impl<B: Backend> Latent<B> {
    fn run<'b>(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        cache: &mut B::KvCache,
        buffers: &'b mut MixerBuffers<B::Buffer>,
    ) -> Result<&'b B::Buffer> {
        let MixerBuffers { input, output, inner, few, head } = buffers;
        let LatentSpec { nope_dim, rope_dim, .. } = self.latent;
        match &self.query_down {
            Some((down, norm)) => {
                backend.linear(x, down, Epilogue::Store, inner)?;
                backend.norm(inner, norm, input)?;
                backend.linear(input, &self.query, Epilogue::Store, output)?;
            }
            None => backend.linear(x, &self.query, Epilogue::Store, output)?,
        }
        backend.linear(x, &self.key_down, Epilogue::Store, few)?;
        let queries = HeadColumns { first: 0, stride: nope_dim + rope_dim };
        backend.linear_heads(output, queries, &self.keys, head, inner)?;
        backend.latent_rows(output, inner, few, &self.latent, &self.norm, input)?;
        let weights = AttentionWeights::default();
        backend.rope_and_store(input, &self.spec, &weights, cache)?;
        backend.attend(input, &self.spec, &weights, cache, output)?;
        let results = HeadColumns { first: rope_dim, stride: self.latent.head_dim() };
        backend.linear_heads(output, results, &self.values, head, input)?;
        Ok(input)
    }
}

impl<B: Backend> Delta<B> {
    fn run<'b>(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        (conv, recurrence): (&mut B::State, &mut B::State),
        buffers: &'b mut MixerBuffers<B::Buffer>,
    ) -> Result<&'b B::Buffer> {
        let MixerBuffers { input, output: qkv, inner: z, few: gates, .. } = buffers;
        backend.linear(x, &self.qkv, Epilogue::Store, input)?;
        backend.copy_states(conv)?;
        backend.causal_conv(input, &self.conv, conv, qkv)?;
        backend.linear(x, &self.z, Epilogue::Activate(crate::kernels::Activation::Silu), z)?;
        backend.linear(x, &self.gates, Epilogue::Store, gates)?;
        backend.copy_states(recurrence)?;
        backend.gated_delta(qkv, gates, z, &self.delta, recurrence, input)?;
        Ok(input)
    }
}
