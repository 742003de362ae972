//! Mixers that keep a state of fixed size instead of keys and values: plain data, the same on every device.
//!
//! A state lies in a slot, one for each sequence that runs, beside the blocks of the KV cache. A step says for each row from which slot it goes
//! on, and after which of its tokens the state is kept, and where: at the row's end for the next step, at the end of a block for the prefix
//! cache, and after each draft token, since nobody knows yet how many of them count.

use candle_core::{Error, Result};

use crate::BatchRow;

/// Where a step reads and writes states; empty for models without any.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct StepStates {
    /// Slots that are copied before anything is computed, `(from, to)`, in this order.
    pub copies: Vec<(u32, u32)>,
    /// `[rows]`: the slot that each row goes on from. A row that begins its sequence goes on from zeros instead.
    pub slots: Vec<u32>,
    /// What is kept, in order of tokens. Of all rows only the owner of a slot writes it.
    pub saves: Vec<StateSave>,
}

/// One state that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateSave {
    /// Index into the step's tokens: the last one that the state has seen.
    pub token: u32,
    pub slot: u32,
}

impl StepStates {
    /// Empty again; the memory stays.
    pub fn clear(&mut self) {
        self.copies.clear();
        self.slots.clear();
        self.saves.clear();
    }

    /// Takes over another step's, without a new allocation once there is room.
    pub fn assign(&mut self, other: &Self) {
        self.clear();
        self.copies.extend_from_slice(&other.copies);
        self.slots.extend_from_slice(&other.slots);
        self.saves.extend_from_slice(&other.saves);
    }

    /// The slot whose state row `index` goes on from; `None`: from zeros.
    pub fn start(&self, index: usize, row: &BatchRow) -> Option<usize> {
        (row.context > row.len).then(|| self.slots[index] as usize)
    }

    /// What is kept of a row, in order of tokens.
    pub fn kept(&self, row: &BatchRow) -> &[StateSave] {
        let at = |token: usize| self.saves.partition_point(|save| (save.token as usize) < token);
        &self.saves[at(row.start)..at(row.start + row.len)]
    }

    /// The slots that row `index` writes, each with the number of the row's tokens that its state has seen. The slot that the row goes on from
    /// comes last: the others may need what is in it.
    pub fn saves(&self, index: usize, row: &BatchRow) -> impl Iterator<Item = (usize, usize)> {
        let (own, kept, start) = (self.slots[index], self.kept(row), row.start);
        let others = kept.iter().filter(move |save| save.slot != own);
        let all = others.chain(kept.iter().filter(move |save| save.slot == own));
        all.map(move |save| (save.slot as usize, save.token as usize + 1 - start))
    }

    /// Fails unless there is a slot for each of `rows` rows, and every slot is one of `slots`.
    pub fn check(&self, rows: usize, slots: usize) -> Result<()> {
        if self.slots.len() != rows {
            return Err(Error::Msg(format!("{rows} rows, and slots of states for {}", self.slots.len())));
        }
        let copied = self.copies.iter().flat_map(|(from, to)| [from, to]);
        let all = copied.chain(&self.slots).chain(self.saves.iter().map(|save| &save.slot));
        match all.copied().find(|slot| *slot as usize >= slots) {
            Some(slot) => Err(Error::Msg(format!("state slot {slot} of {slots}"))),
            None => Ok(()),
        }
    }
}

/// A causal convolution of each channel by itself. Its state holds the inputs of the last `kernel − 1` tokens, `[kernel − 1, channels]`, oldest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvSpec {
    pub channels: usize,
    /// Tokens it looks at, its own included; at least 2.
    pub kernel: usize,
    pub kind: ConvKind,
}

/// What is convolved, and what becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConvKind {
    /// Rows are `b`, `c` and `x` side by side: `c · conv(b · x)` (LFM2).
    Gated,
    /// `silu(conv(x))`
    Silu,
}

impl ConvSpec {
    /// Width of the rows it reads.
    pub fn input_width(&self) -> usize {
        match self.kind {
            ConvKind::Gated => 3 * self.channels,
            ConvKind::Silu => self.channels,
        }
    }

    pub fn state_width(&self) -> usize {
        self.channels * (self.kernel - 1)
    }
}

/// A convolution with its weights. `V`: a backend's vectors.
#[derive(Debug)]
pub struct CausalConv<V> {
    pub spec: ConvSpec,
    /// `[kernel · channels]`: all channels of the oldest token first.
    pub weight: V,
    /// `[channels]`
    pub bias: Option<V>,
}

/// Linear attention by the gated delta rule ("Gated Delta Networks", 2024). Its state is for each value head a matrix `[key_dim, value_dim]`,
/// which every token shrinks, corrects where its key points, and reads by its query.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeltaSpec {
    /// Of queries and keys.
    pub key_heads: usize,
    /// A multiple of `key_heads`: so many neighbours share a query and a key.
    pub value_heads: usize,
    /// Components of a query or key; at most [`DeltaSpec::MOST_KEY_DIM`].
    pub key_dim: usize,
    pub value_dim: usize,
    /// Of the norm of each head's result.
    pub eps: f32,
}

impl DeltaSpec {
    /// A task holds that many rows of a state next to the processor.
    pub const MOST_KEY_DIM: usize = 256;

    /// Width of all values, and of the result.
    pub fn value_width(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Width of all queries, or of all keys.
    pub fn key_width(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Width of queries, keys and values side by side.
    pub fn qkv_width(&self) -> usize {
        2 * self.key_width() + self.value_width()
    }

    pub fn state_width(&self) -> usize {
        self.value_width() * self.key_dim
    }
}

/// A layer's delta rule with its weights. `V`: a backend's vectors.
#[derive(Debug)]
pub struct GatedDelta<V> {
    pub spec: DeltaSpec,
    /// `[value_heads]`: how fast the state shrinks, `exp(A_log)`.
    pub decay: V,
    /// `[value_heads]`: added to what a token says of that.
    pub decay_bias: V,
    /// `[value_dim]`
    pub norm: V,
}

/// Latent attention (DeepSeek 2): keys and values of all heads are made from one latent vector of each token, and one rotated key of a few
/// components is common to all heads. The matrices that would make keys and values are multiplied into queries and results instead, so
/// the cache holds one head: the rotated components first, then the latent vector, as key and as value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentSpec {
    pub heads: usize,
    /// Components of a query that meet the latent vector.
    pub nope_dim: usize,
    /// Components of a query and of the common key that are rotated.
    pub rope_dim: usize,
    /// Components of the latent vector.
    pub rank: usize,
    /// Of the norm of the latent vector.
    pub eps: f32,
}

impl LatentSpec {
    /// Components of the cached head.
    pub fn head_dim(&self) -> usize {
        self.rope_dim + self.rank
    }
}

/// Where the inputs of several heads lie in a row: head `h` begins at column `first + h · stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadColumns {
    pub first: usize,
    pub stride: usize,
}
