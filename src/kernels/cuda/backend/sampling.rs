//! From logits to tokens: what changes logits, the greatest of them, the draw. The ids of a step are read back at once.

use std::ffi::c_int;

use candle_core::{Error, Result};

use super::{Buffer, Cuda, Dtype, Use};
use crate::RowSampling;
use crate::cuda::device::{Allocation, Device, Input, bytes_of, read_numbers};
use crate::cuda::functions::{Changes, Logits, NULL, Sampling};

/// 32-bit numbers of a structure.
const SAMPLING_WORDS: usize = size_of::<Sampling>() / size_of::<u32>();

/// What changes the logits of rows, as the kernel reads it: pairs of an id and a number, and where those of each row and kind begin.
#[derive(Default)]
struct Lists {
    changes: Vec<u32>,
    begin: Vec<u32>,
    samplings: Vec<u32>,
}

impl Lists {
    fn of(rows: &[RowSampling]) -> Self {
        let mut lists = Self::default();
        for row in rows {
            for kind in &row.changes {
                lists.begin.push((lists.changes.len() / 2) as u32);
                lists.changes.extend(kind.iter().flat_map(|(id, value)| [*id, value.to_bits()]));
            }
            lists.begin.push((lists.changes.len() / 2) as u32);
            let (seed, index) = (row.seed, row.index);
            let (low, high) = (|number: u64| number as u32, |number: u64| (number >> 32) as u32);
            let words: [u32; SAMPLING_WORDS] = [
                low(seed),
                high(seed),
                low(index),
                high(index),
                row.inverse_temperature.to_bits(),
                row.min_p.to_bits(),
                row.top_p.to_bits(),
                row.top_k,
            ];
            lists.samplings.extend(words);
        }
        lists
    }
}

impl<D: Device> Cuda<D> {
    /// A token of each row of logits, or none where none can be sampled.
    pub(super) fn sampled(
        &mut self,
        logits: &mut Buffer<D::Memory>,
        width: usize,
        unassigned: &[u32],
        rows: &[RowSampling],
    ) -> Result<Vec<Option<u32>>> {
        self.check_device()?;
        let stride = logits.width;
        let outside = unassigned.iter().chain(rows.iter().flat_map(|row| row.changes.iter().flatten().map(|(id, _)| id)));
        if logits.dtype != Dtype::F32 || rows.len() != logits.rows || width > stride || width == 0 {
            return Err(Error::Msg(format!("{} rows are sampled from logits [{}, {stride}] of {width} ids", rows.len(), logits.rows)));
        }
        if let Some(id) = outside.max().filter(|id| **id as usize >= stride) {
            return Err(Error::Msg(format!("token id {id} is outside the {stride} logits")));
        }
        let (values, count) = (logits.memory.address(), rows.len() as c_int);
        let out = self.scratch(Use::Tokens, rows.len() * size_of::<c_int>())?;
        if unassigned.is_empty() && rows.iter().all(RowSampling::is_plain_greedy) {
            // SAFETY: as many rows as the buffer holds.
            self.launch(|functions, stream| unsafe {
                (functions.argmax)(stream, values, stride as c_int, width as c_int, NULL, 0, out, count)
            })?;
        } else {
            let masked: Vec<u32> = unassigned.iter().copied().chain(width as u32..stride as u32).collect();
            let unassigned = self.table(0, bytes_of(&masked), c"ids without a token")?.0;
            let failed = self.scratch(Use::Failed, rows.len() * size_of::<c_int>())?;
            let lists = Lists::of(rows);
            let input = |name, values| Input { name, values, most: 0 };
            let inputs =
                [input(c"samplings", &lists.samplings), input(c"where changes begin", &lists.begin), input(c"changes", &lists.changes)];
            let staged = self.device.stage(&mut self.scratch.samplings, &inputs);
            let [samplings, begin, all] = self.noted(staged)?[..] else { return Err(Error::Msg("not every list has its place".into())) };
            let changes = Changes {
                all: all.0,
                begin: begin.0,
                allowed: NULL,
                has_allowed: NULL,
                unassigned,
                unassigned_count: masked.len() as c_int,
            };
            let of = Logits { values, vocab: stride as c_int };
            // SAFETY: lists for as many rows as the buffer holds, of ids that were checked.
            self.launch(|functions, stream| unsafe { (functions.adjust)(stream, of, &changes, failed, count) })?;
            // SAFETY: as above.
            self.launch(|functions, stream| unsafe { (functions.sample)(stream, of, samplings.0, failed, out, count) })?;
        }
        let read = self.scratch.memory(Use::Tokens).map(|memory| read_numbers::<D, c_int>(&self.device, memory, rows.len()));
        let tokens = self.noted(read.unwrap_or_else(|| Ok(Vec::new())))?;
        Ok(tokens.into_iter().map(|token| u32::try_from(token).ok()).collect())
    }
}
