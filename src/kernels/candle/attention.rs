//! Attention over paged keys and values as matrix products over gathered blocks.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use super::KvCache;
use crate::{AttentionSpec, BatchRow};

/// What one attention pass makes at a time: bounds the memory that a long prompt or a large batch takes.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Numbers of scores.
    pub scores: usize,
    /// Numbers of cached keys.
    pub gathered: usize,
}

/// 128 MiB per intermediate tensor.
impl Default for Bounds {
    fn default() -> Self {
        Self { scores: 1 << 25, gathered: 1 << 26 }
    }
}

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
    fn new(rows: &[BatchRow], queries: Range<usize>, block_size: usize, spec: &AttentionSpec, device: &Device) -> Result<Self> {
        let len = queries.len();
        // The keys that each query sees.
        let seen = |row: &BatchRow| {
            let (before, context) = (row.context - row.len, row.context);
            queries.clone().map(move |i| spec.visible(before + i, context)).collect::<Vec<_>>()
        };
        let visible: Vec<Range<usize>> = rows.iter().flat_map(seen).collect();
        let context = visible.iter().map(|seen| seen.end).max().unwrap_or(0);
        let per_row = context.div_ceil(block_size);
        // Shorter rows are filled up with a block of their own: what it holds is hidden.
        let table = |row: &BatchRow| (0..per_row).map(|i| *row.blocks.get(i).unwrap_or(&row.blocks[0])).collect::<Vec<_>>();
        let blocks: Vec<u32> = rows.iter().flat_map(table).collect();
        let hidden = if visible.iter().all(|seen| *seen == (0..context)) {
            None
        } else {
            // f32 counts exactly up to 2^24. The mask itself is made on the device.
            let of = |end: fn(&Range<usize>) -> usize| {
                Tensor::from_vec(visible.iter().map(|seen| end(seen) as f32).collect(), (rows.len(), 1, len, 1), device)
            };
            let keys = Tensor::from_vec((0..context).map(|key| key as f32).collect(), (1, 1, 1, context), device)?;
            let after = keys.broadcast_ge(&of(|seen| seen.end)?)?;
            let has_window = visible.iter().any(|seen| seen.start > 0);
            Some(if has_window { (after + keys.broadcast_lt(&of(|seen| seen.start)?)?)? } else { after })
        };
        let start = rows.first().map_or(0, |row| row.start + queries.start);
        Ok(Self { start, rows: rows.len(), len, context, blocks: Tensor::from_vec(blocks, rows.len() * per_row, device)?, hidden })
    }

    /// `[rows · len, h·d]`; `sinks [h]`.
    pub fn attention(&self, q: &Tensor, spec: &AttentionSpec, sinks: Option<&Tensor>, cache: &KvCache) -> Result<Tensor> {
        let (_, block_size, kv, d) = cache.k.dims4()?;
        let (n, len, context, group) = (self.rows, self.len, self.context, spec.heads / kv);
        let gather = |cache: &Tensor| -> Result<Tensor> {
            let blocks = cache.index_select(&self.blocks, 0)?.to_dtype(q.dtype())?;
            let keys = blocks.reshape((n, blocks.dim(0)? / n * block_size, kv, d))?.narrow(1, 0, context)?;
            keys.transpose(1, 2)?.contiguous()?.reshape((n * kv, context, d))
        };
        let (k, v) = (gather(&cache.k)?, gather(&cache.v)?);
        // The heads that share keys go through one matmul.
        let q = q.narrow(0, self.start, n * len)?.reshape((n, len, kv, group, d))?.permute((0, 2, 3, 1, 4))?;
        let q = q.contiguous()?.reshape((n * kv, group * len, d))?;
        let scores = (q.matmul(&k.t()?)?.to_dtype(DType::F32)? * f64::from(spec.scale))?.reshape((n, kv * group, len, context))?;
        let scores = match spec.soft_cap {
            Some(cap) => ((scores / f64::from(cap))?.tanh()? * f64::from(cap))?,
            None => scores,
        };
        let scores = match &self.hidden {
            Some(hidden) => {
                let never = Tensor::full(f32::NEG_INFINITY, (1, 1, 1, 1), q.device())?;
                hidden.broadcast_as(scores.shape())?.where_cond(&never.broadcast_as(scores.shape())?, &scores)?
            }
            None => scores,
        };
        // A sink is one more key, whose value is zero.
        let weights = match sinks {
            Some(sinks) => {
                let sinks = sinks.to_dtype(DType::F32)?.reshape((1, kv * group, 1, 1))?.broadcast_as((n, kv * group, len, 1))?;
                candle_nn::ops::softmax_last_dim(&Tensor::cat(&[&scores, &sinks.contiguous()?], 3)?)?.narrow(3, 0, context)?.contiguous()?
            }
            None => candle_nn::ops::softmax_last_dim(&scores)?,
        };
        let weights = weights.to_dtype(v.dtype())?.reshape((n * kv, group * len, context))?;
        let out = weights.matmul(&v)?.reshape((n, kv, group, len, d))?.permute((0, 3, 1, 2, 4))?;
        out.contiguous()?.reshape((n * len, kv * group * d))
    }
}

/// Cuts a step into groups, in the order of its tokens.
pub fn groups(rows: &[BatchRow], block_size: usize, spec: &AttentionSpec, bounds: Bounds, device: &Device) -> Result<Vec<Group>> {
    let (mut groups, mut next) = (Vec::new(), 0);
    while let Some(row) = rows.get(next) {
        if row.len > 1 {
            let per = (bounds.scores / (spec.heads * row.context)).max(1);
            for from in (0..row.len).step_by(per) {
                groups.push(Group::new(&rows[next..next + 1], from..row.len.min(from + per), block_size, spec, device)?);
            }
            next += 1;
            continue;
        }
        let (mut end, mut longest) = (next, 0);
        while let Some(row) = rows.get(end).filter(|row| row.len == 1) {
            longest = longest.max(row.context);
            let keys = (end + 1 - next) * longest;
            if end > next && (keys * spec.heads > bounds.scores || keys * spec.kv_width() > bounds.gathered) {
                break;
            }
            end += 1;
        }
        groups.push(Group::new(&rows[next..end], 0..1, block_size, spec, device)?);
        next = end;
    }
    Ok(groups)
}
