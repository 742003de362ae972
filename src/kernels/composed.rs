//! The kernels as compositions of candle's own operations: what CUDA runs in this version, and the oracle of the CPU kernels.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{BatchRow, Inputs, Matrix, Rope, mixed};

/// Keys and values of one layer.
#[derive(Debug, Clone)]
pub struct KvCache {
    /// `[blocks, block_size, kv, d]`
    pub k: Tensor,
    /// `[blocks, block_size, kv, d]`
    pub v: Tensor,
}

/// Where the tokens of a step belong: the device's half of a plan.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `[t]`, u32 on the device: rows of the embedding.
    pub tokens: Tensor,
    /// `[t]`, u32 on the device: KV slots.
    pub slots: Tensor,
    /// `[t, d/2]`, f32 on the device.
    pub cos: Tensor,
    pub sin: Tensor,
    /// Not to be changed after the first layer has run: see `groups`.
    pub rows: Vec<BatchRow>,
    pub block_size: usize,
    /// How [`paged_attention`] takes the rows, made at its first call in a step; empty at the start.
    pub groups: std::sync::OnceLock<Vec<Group>>,
}

impl Batch {
    pub fn new(inputs: &Inputs<'_>, block_size: usize, device: &Device) -> Result<Self> {
        let t = inputs.tokens.len();
        let angles = inputs.positions.iter().flat_map(|position| inputs.frequencies.iter().map(move |f| *position as f32 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        let half = inputs.frequencies.len();
        Ok(Self {
            tokens: Tensor::from_slice(inputs.tokens, t, device)?,
            slots: Tensor::from_slice(inputs.slots, t, device)?,
            cos: Tensor::from_vec(cos, (t, half), device)?,
            sin: Tensor::from_vec(sin, (t, half), device)?,
            rows: inputs.rows.to_vec(),
            block_size,
            groups: std::sync::OnceLock::new(),
        })
    }
}

/// The values of a step as tensors; see [`super::Activations`].
#[derive(Debug)]
pub struct Activations {
    pub device: Device,
    pub block_size: usize,
    pub batch: Option<Batch>,
    x: Option<Tensor>,
    normed: Option<Tensor>,
    qkv: Option<Tensor>,
    attended: Option<Tensor>,
    gated: Option<Tensor>,
    logits: Option<Tensor>,
}

fn made<'a, T>(value: &'a Option<T>, name: &str) -> Result<&'a T> {
    value.as_ref().ok_or_else(|| candle_core::Error::Msg(format!("{name} is read before it is made")))
}

impl Activations {
    pub fn new(device: &Device, block_size: usize) -> Self {
        let device = device.clone();
        Self { device, block_size, batch: None, x: None, normed: None, qkv: None, attended: None, gated: None, logits: None }
    }

    pub fn begin(&mut self, inputs: &Inputs<'_>) -> Result<()> {
        self.batch = Some(Batch::new(inputs, self.block_size, &self.device)?);
        Ok(())
    }

    pub fn embed(&mut self, table: &Matrix) -> Result<()> {
        let tokens = &made(&self.batch, "batch")?.tokens;
        self.x = Some(match table {
            Matrix::Tensor(table) => embed(table, tokens)?,
            // candle gives f32; the residual stream is bf16 on a GPU.
            Matrix::Blocks(table) => table.embedding(tokens)?.to_dtype(if self.device.is_cpu() { DType::F32 } else { DType::BF16 })?,
            Matrix::Packed(_) => return Err(mixed()),
        });
        Ok(())
    }

    pub fn norm(&mut self, w: &Tensor, eps: f32) -> Result<()> {
        self.normed = Some(rms_norm(made(&self.x, "x")?, w, eps)?);
        Ok(())
    }

    pub fn project(&mut self, w: &Matrix, bias: Option<&Tensor>) -> Result<()> {
        self.qkv = Some(multiply(made(&self.normed, "normed")?, w, bias)?);
        Ok(())
    }

    /// Leaves the rotated queries in place of qkv.
    pub fn rope_and_store(&mut self, heads: usize, rope: Rope, cache: &KvCache) -> Result<()> {
        self.qkv = Some(rope_and_store(made(&self.qkv, "qkv")?, heads, rope, made(&self.batch, "batch")?, cache)?);
        Ok(())
    }

    pub fn attend(&mut self, cache: &KvCache) -> Result<()> {
        self.attended = Some(paged_attention(made(&self.qkv, "qkv")?, made(&self.batch, "batch")?, cache)?);
        Ok(())
    }

    pub fn add_attended(&mut self, w: &Matrix, bias: Option<&Tensor>) -> Result<()> {
        self.x = Some(made(&self.x, "x")?.add(&multiply(made(&self.attended, "attended")?, w, bias)?)?);
        Ok(())
    }

    pub fn gate(&mut self, w: &Matrix, bias: Option<&Tensor>) -> Result<()> {
        self.gated = Some(silu_mul(&multiply(made(&self.normed, "normed")?, w, bias)?)?);
        Ok(())
    }

    pub fn add_gated(&mut self, w: &Matrix, bias: Option<&Tensor>) -> Result<()> {
        self.x = Some(made(&self.x, "x")?.add(&multiply(made(&self.gated, "gated")?, w, bias)?)?);
        Ok(())
    }

    pub fn head(&mut self, positions: &[usize], norm: &Tensor, eps: f32, w: &Matrix) -> Result<()> {
        let x = made(&self.x, "x")?;
        // NOTE: as many positions as tokens need not be all of them in order: draws come before scores.
        let all = positions.iter().copied().eq(0..x.dim(0)?);
        let picked = if all {
            x.clone()
        } else {
            let positions: Vec<u32> = positions.iter().map(|position| *position as u32).collect();
            x.index_select(&Tensor::from_slice(&positions, positions.len(), &self.device)?, 0)?
        };
        self.logits = Some(multiply(&rms_norm(&picked, norm, eps)?, w, None)?.to_dtype(DType::F32)?);
        Ok(())
    }

    /// What [`Activations::head`] made, `[positions, vocab]` in f32 on the device.
    pub fn logits(&self) -> Result<&Tensor> {
        made(&self.logits, "logits")
    }

    /// A value of this step, for tests: `x`, `normed`, `qkv`, `attended` or `gated`.
    pub fn value(&self, name: &str) -> Result<&Tensor> {
        let value = match name {
            "x" => &self.x,
            "normed" => &self.normed,
            "qkv" => &self.qkv,
            "attended" => &self.attended,
            _ => &self.gated,
        };
        made(value, name)
    }

    /// Sets the residual stream, for tests.
    pub fn set_x(&mut self, x: Tensor) {
        self.x = Some(x);
    }
}

pub fn embed(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    table.index_select(ids, 0)
}

/// Rows of activations that candle multiplies with quantized weights in their own type; more it takes in f32 alone.
const NARROW_ROWS: usize = 8;

/// [`linear`] for a matrix in any form.
pub fn multiply(x: &Tensor, w: &Matrix, bias: Option<&Tensor>) -> Result<Tensor> {
    let blocks = match w {
        Matrix::Tensor(w) => return linear(x, w, bias),
        Matrix::Blocks(blocks) => blocks,
        Matrix::Packed(_) => return Err(mixed()),
    };
    let x = x.contiguous()?;
    let wide = if x.dim(0)? > NARROW_ROWS { x.to_dtype(DType::F32)? } else { x.clone() };
    let out = wide.apply_op1_no_bwd(blocks)?.to_dtype(x.dtype())?;
    match bias {
        Some(bias) => out.broadcast_add(bias),
        None => Ok(out),
    }
}

pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let out = x.matmul(&w.t()?)?;
    match bias {
        Some(bias) => out.broadcast_add(bias),
        None => Ok(out),
    }
}

pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f32) -> Result<Tensor> {
    candle_nn::ops::rms_norm(&x.contiguous()?, w, eps)
}

pub fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    let n = gate_up.dim(D::Minus1)? / 2;
    candle_nn::ops::silu(&gate_up.narrow(D::Minus1, 0, n)?.contiguous()?)?.mul(&gate_up.narrow(D::Minus1, n, n)?.contiguous()?)
}

pub fn rope_and_store(qkv: &Tensor, heads: usize, rope: Rope, batch: &Batch, cache: &KvCache) -> Result<Tensor> {
    let (t, _) = qkv.dims2()?;
    let (blocks, block_size, kv, d) = cache.k.dims4()?;
    let rotate = |from: usize, heads: usize| -> Result<Tensor> {
        // [t, heads·d] → [1, heads, t, d], the layout of candle's rope.
        let x = qkv.narrow(1, from, heads * d)?.reshape((1, t, heads, d))?.transpose(1, 2)?.contiguous()?;
        let wide = x.to_dtype(DType::F32)?; // angles at deep positions need every bit: rotate in f32
        let rotated = match rope {
            Rope::Interleaved => candle_nn::rotary_emb::rope_i(&wide, &batch.cos, &batch.sin)?,
            Rope::Half => candle_nn::rotary_emb::rope(&wide, &batch.cos, &batch.sin)?,
        };
        rotated.to_dtype(x.dtype())?.transpose(1, 2)?.reshape((t, heads * d))?.contiguous()
    };
    let q = rotate(0, heads)?;
    let k = rotate(heads * d, kv)?;
    let v = qkv.narrow(1, (heads + kv) * d, kv * d)?.contiguous()?;
    let index = batch.slots.unsqueeze(1)?.broadcast_as((t, kv * d))?.contiguous()?;
    for (cache, new) in [(&cache.k, k), (&cache.v, v)] {
        cache.reshape((blocks * block_size, kv * d))?.scatter_set(&index, &new.to_dtype(cache.dtype())?, 0)?;
    }
    Ok(q)
}

/// The greatest value's column in each row of `logits [n, vocab]`, the lowest one on ties, which logits that were bf16 have often; candle's own argmax
/// takes any of them on CUDA. `columns [1, vocab]`: 0, 1, 2 … in f32, which holds them exactly up to 2^24.
pub fn argmax(logits: &Tensor, columns: &Tensor) -> Result<Vec<u32>> {
    let lower = logits.broadcast_lt(&logits.max_keepdim(1)?)?;
    let beyond = Tensor::full(f32::INFINITY, (1, 1), logits.device())?;
    let first = lower.where_cond(&beyond.broadcast_as(lower.shape())?, &columns.broadcast_as(lower.shape())?)?.min(1)?;
    first.to_dtype(DType::U32)?.to_vec1()
}

/// What one attention pass makes at a time: bounds the memory that a long prompt or a large batch takes.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    pub scores: usize,
    /// Numbers of cached keys.
    pub gathered: usize,
}

/// 128 MiB per intermediate tensor.
const BOUNDS: Bounds = Bounds { scores: 1 << 25, gathered: 1 << 26 };

/// Tokens of a step that go through attention together: decoding rows side by side, padded to the longest, or some queries of one prompt.
#[derive(Debug, Clone)]
pub struct Group {
    /// First token in the step.
    start: usize,
    /// Sequences, and queries of each.
    rows: usize,
    len: usize,
    /// Keys gathered for each sequence.
    context: usize,
    /// `[rows · blocks]`, u32 on the device.
    blocks: Tensor,
    /// `[rows, 1, len, context]`, u8 on the device: 1 where a query may not look. `None` where every query sees every key.
    hidden: Option<Tensor>,
}

impl Group {
    /// `rows` have one length each; of their queries those in `queries` belong to the group.
    fn new(rows: &[BatchRow], queries: std::ops::Range<usize>, block_size: usize, device: &Device) -> Result<Self> {
        let len = queries.len();
        // How many keys each query sees: all up to its own.
        let seen = |row: &BatchRow| {
            let before = row.context - row.len;
            queries.clone().map(move |i| before + i + 1).collect::<Vec<_>>()
        };
        let visible: Vec<usize> = rows.iter().flat_map(seen).collect();
        let context = visible.iter().copied().max().unwrap_or(0);
        let per_row = context.div_ceil(block_size);
        // Shorter rows are filled up with a block of their own: what it holds is hidden.
        let table = |row: &BatchRow| (0..per_row).map(|i| *row.blocks.get(i).unwrap_or(&row.blocks[0])).collect::<Vec<_>>();
        let blocks: Vec<u32> = rows.iter().flat_map(table).collect();
        let hidden = if visible.iter().all(|seen| *seen == context) {
            None
        } else {
            // f32 counts exactly up to 2^24. The mask itself is made on the device.
            let visible: Vec<f32> = visible.iter().map(|seen| *seen as f32).collect();
            let keys: Vec<f32> = (0..context).map(|key| key as f32).collect();
            let keys = Tensor::from_vec(keys, (1, 1, 1, context), device)?;
            Some(keys.broadcast_ge(&Tensor::from_vec(visible, (rows.len(), 1, len, 1), device)?)?)
        };
        let start = rows.first().map_or(0, |row| row.start + queries.start);
        Ok(Self { start, rows: rows.len(), len, context, blocks: Tensor::from_vec(blocks, rows.len() * per_row, device)?, hidden })
    }

    /// `[rows · len, h·d]`
    fn attention(&self, q: &Tensor, cache: &KvCache) -> Result<Tensor> {
        let (_, block_size, kv, d) = cache.k.dims4()?;
        let (n, len, context, group) = (self.rows, self.len, self.context, q.dim(1)? / d / kv);
        let gather = |cache: &Tensor| -> Result<Tensor> {
            let blocks = cache.index_select(&self.blocks, 0)?;
            let keys = blocks.reshape((n, blocks.dim(0)? / n * block_size, kv, d))?.narrow(1, 0, context)?;
            keys.transpose(1, 2)?.contiguous()?.reshape((n * kv, context, d))
        };
        let (k, v) = (gather(&cache.k)?, gather(&cache.v)?);
        // The heads that share keys go through one matmul.
        let q = q.narrow(0, self.start, n * len)?.reshape((n, len, kv, group, d))?.permute((0, 2, 3, 1, 4))?;
        let q = q.contiguous()?.reshape((n * kv, group * len, d))?;
        let scores = (q.matmul(&k.t()?)?.to_dtype(DType::F32)? / (d as f64).sqrt())?.reshape((n, kv * group, len, context))?;
        let scores = match &self.hidden {
            Some(hidden) => {
                let never = Tensor::full(f32::NEG_INFINITY, (1, 1, 1, 1), q.device())?;
                hidden.broadcast_as(scores.shape())?.where_cond(&never.broadcast_as(scores.shape())?, &scores)?
            }
            None => scores,
        };
        let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(v.dtype())?.reshape((n * kv, group * len, context))?;
        let out = weights.matmul(&v)?.reshape((n, kv, group, len, d))?.permute((0, 3, 1, 2, 4))?;
        out.contiguous()?.reshape((n * len, kv * group * d))
    }
}

/// Cuts a step into groups, in the order of its tokens. `heads`: of queries; `width`: cached numbers of keys per token.
pub(super) fn groups(batch: &Batch, heads: usize, width: usize, bounds: Bounds, device: &Device) -> Result<Vec<Group>> {
    let (mut groups, mut next) = (Vec::new(), 0);
    while let Some(row) = batch.rows.get(next) {
        if row.len > 1 {
            let per = (bounds.scores / (heads * row.context)).max(1);
            for from in (0..row.len).step_by(per) {
                groups.push(Group::new(&batch.rows[next..next + 1], from..row.len.min(from + per), batch.block_size, device)?);
            }
            next += 1;
            continue;
        }
        let (mut end, mut longest) = (next, 0);
        while let Some(row) = batch.rows.get(end).filter(|row| row.len == 1) {
            longest = longest.max(row.context);
            let keys = (end + 1 - next) * longest;
            if end > next && (keys * heads > bounds.scores || keys * width > bounds.gathered) {
                break;
            }
            end += 1;
        }
        groups.push(Group::new(&batch.rows[next..end], 0..1, batch.block_size, device)?);
        next = end;
    }
    Ok(groups)
}

pub fn paged_attention(q: &Tensor, batch: &Batch, cache: &KvCache) -> Result<Tensor> {
    let (_, _, kv, d) = cache.k.dims4()?;
    // Once per step: all layers look at the same places.
    let groups = match batch.groups.get() {
        Some(groups) => groups,
        None => {
            let made = groups(batch, q.dim(1)? / d, kv * d, BOUNDS, q.device())?;
            batch.groups.get_or_init(|| made)
        }
    };
    let mut out = groups.iter().map(|group| group.attention(q, cache)).collect::<Result<Vec<_>>>()?;
    if out.len() == 1 { Ok(out.remove(0)) } else { Tensor::cat(&out, 0) }
}
