//! The gated delta rule, token after token. A task has some columns of one head's state next to the processor and goes through all tokens of a
//! row with them, so the result depends neither on company nor on chunks.

use super::simd::{Simd, dispatch};
use super::{Buffer, Pool, Ptr, PtrMut, by_rows, elementwise};
use crate::{BatchRow, DeltaSpec, GatedDelta, StateSave, StepStates};

/// Columns of a state that a task has.
const COLUMNS: usize = 16;
/// Sums that are formed side by side: one would wait for itself.
const SUMS: usize = 4;

type Column = [f32; COLUMNS];

/// One step of a layer. The buffers have been checked.
pub(super) struct Job<'a> {
    pub delta: &'a GatedDelta<Vec<f32>>,
    pub rows: &'a [BatchRow],
    pub states: &'a StepStates,
}

impl Job<'_> {
    pub fn run(&self, pool: &mut Pool, qkv: &mut Buffer, gates: &mut Buffer, z: &Buffer, state: &mut Buffer, out: &mut Buffer) {
        let spec = self.delta.spec;
        let (values, gate_values) = (PtrMut(qkv.values.as_mut_ptr()), PtrMut(gates.values.as_mut_ptr()));
        by_rows(pool, qkv.rows, qkv.width, &|row| {
            // SAFETY: a row of each, of this task alone.
            let (qkv, gates) = unsafe {
                let row_of = |ptr: PtrMut<f32>, width: usize| std::slice::from_raw_parts_mut(ptr.ptr().add(row * width), width);
                (row_of(values, qkv.width), row_of(gate_values, gates.width))
            };
            prepare(self.delta, qkv, gates);
        });
        let chunks = spec.value_dim.div_ceil(COLUMNS);
        let per_row = spec.value_heads * chunks;
        let head = Head {
            spec,
            qkv: Ptr(qkv.values.as_ptr()),
            gates: Ptr(gates.values.as_ptr()),
            state: PtrMut(state.values.as_mut_ptr()),
            out: PtrMut(out.values.as_mut_ptr()),
        };
        pool.run(self.rows.len() * per_row, &|task, _| {
            let (index, head_index, first) = (task / per_row, task % per_row / chunks, task % chunks * COLUMNS);
            let row = &self.rows[index];
            head.run(row, self.states.start(index, row), self.states.kept(row), (head_index, first));
        });
        let target = PtrMut(out.values.as_mut_ptr());
        by_rows(pool, out.rows, out.width, &|row| {
            // SAFETY: a row of this task alone.
            let out = unsafe { std::slice::from_raw_parts_mut(target.ptr().add(row * out.width), out.width) };
            for head in out.chunks_exact_mut(spec.value_dim) {
                elementwise::rms_norm_in_place(head, Some(&self.delta.norm), spec.eps);
            }
            out.iter_mut().zip(&z.values[row * z.width..]).for_each(|(out, z)| *out *= z);
        });
    }
}

/// Queries and keys of one token become unit vectors, queries times the scale of scores; gates become what the state is corrected and shrunk by.
fn prepare(delta: &GatedDelta<Vec<f32>>, qkv: &mut [f32], gates: &mut [f32]) {
    let DeltaSpec { key_heads, value_heads, key_dim, .. } = delta.spec;
    let scale = 1.0 / (key_dim as f32).sqrt();
    for (index, head) in qkv.chunks_exact_mut(key_dim).take(2 * key_heads).enumerate() {
        let length = 1.0 / (head.iter().map(|x| x * x).sum::<f32>() + 1e-6).sqrt();
        let factor = if index < key_heads { length * scale } else { length };
        head.iter_mut().for_each(|x| *x *= factor);
    }
    let (corrections, decays) = gates.split_at_mut(value_heads);
    corrections.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp()));
    for ((x, decay), bias) in decays.iter_mut().zip(&delta.decay).zip(&delta.decay_bias) {
        let x_biased = *x + bias;
        // Softplus, which is the number itself where its exponential would be beyond counting.
        let soft = if x_biased > 20.0 { x_biased } else { x_biased.exp().ln_1p() };
        *x = (-decay * soft).exp();
    }
}

/// What all tasks share: projections `[t, …]`, gates, states `[slots, value_heads, key_dim, value_dim]`, results.
#[derive(Clone, Copy)]
struct Head {
    spec: DeltaSpec,
    qkv: Ptr<f32>,
    gates: Ptr<f32>,
    state: PtrMut<f32>,
    out: PtrMut<f32>,
}

impl Head {
    /// Columns from `place.1` on of head `place.0`, for all tokens of a row.
    fn run(self, row: &BatchRow, start: Option<usize>, kept: &[StateSave], place: (usize, usize)) {
        let head = self;
        dispatch!(run_columns::<>(head: Head, row: &BatchRow, start: Option<usize>, kept: &[StateSave], place: (usize, usize)));
    }

    /// Where the columns of a state's row lie.
    fn at(&self, slot: usize, (index, first): (usize, usize), row: usize) -> *mut f32 {
        let DeltaSpec { value_heads, key_dim, value_dim, .. } = self.spec;
        self.state.ptr().wrapping_add(((slot * value_heads + index) * key_dim + row) * value_dim + first)
    }
}

#[inline(always)]
unsafe fn run_columns<S: Simd>(head: Head, row: &BatchRow, start: Option<usize>, kept: &[StateSave], place: (usize, usize)) {
    let DeltaSpec { key_heads, value_heads, key_dim, value_dim, .. } = head.spec;
    let (width, key_width) = (head.spec.qkv_width(), head.spec.key_width());
    let (index, first) = place;
    let columns = COLUMNS.min(value_dim - first);
    let mut state = [[0f32; COLUMNS]; DeltaSpec::MOST_KEY_DIM];
    let state = &mut state[..key_dim];
    let key_head = index / (value_heads / key_heads) * key_dim;
    // SAFETY: rows of the step are inside the buffers, slots inside the states; the columns of this head are this task's alone.
    unsafe {
        if let Some(slot) = start {
            let copy =
                |(i, target): (usize, &mut Column)| std::ptr::copy_nonoverlapping(head.at(slot, place, i), target.as_mut_ptr(), columns);
            state.iter_mut().enumerate().for_each(copy);
        }
        let mut kept = kept.iter().peekable();
        for token in row.start..row.start + row.len {
            let x = std::slice::from_raw_parts(head.qkv.ptr().add(token * width), width);
            let gates = std::slice::from_raw_parts(head.gates.ptr().add(token * 2 * value_heads), 2 * value_heads);
            let (q, k) = (&x[key_head..key_head + key_dim], &x[key_width + key_head..key_width + key_head + key_dim]);
            let mut value = [0f32; COLUMNS];
            let from = 2 * key_width + index * value_dim + first;
            value[..columns].copy_from_slice(&x[from..from + columns]);
            let out = correct_and_read(state, q, k, value, (gates[index], gates[value_heads + index]));
            let target = head.out.ptr().add(token * value_heads * value_dim + index * value_dim + first);
            std::ptr::copy_nonoverlapping(out.as_ptr(), target, columns);
            while let Some(save) = kept.next_if(|save| save.token as usize == token) {
                let keep = |(i, row): (usize, &Column)| {
                    std::ptr::copy_nonoverlapping(row.as_ptr(), head.at(save.slot as usize, place, i), columns)
                };
                state.iter().enumerate().for_each(keep);
            }
        }
    }
}

/// One token: the state shrinks, is corrected towards `value` where `k` points, and is read by `q`. `gates`: how much of the correction is made,
/// and what is left of the state.
#[inline(always)]
fn correct_and_read(state: &mut [Column], q: &[f32], k: &[f32], value: Column, (correction, decay): (f32, f32)) -> Column {
    let mut sums = [[0f32; COLUMNS]; SUMS];
    for (rows, k) in state.chunks_mut(SUMS).zip(k.chunks(SUMS)) {
        for ((row, k), sum) in rows.iter_mut().zip(k).zip(&mut sums) {
            for c in 0..COLUMNS {
                row[c] *= decay;
                sum[c] += row[c] * k;
            }
        }
    }
    let mut change = total(sums);
    for c in 0..COLUMNS {
        change[c] = (value[c] - change[c]) * correction;
    }
    let mut sums = [[0f32; COLUMNS]; SUMS];
    for ((rows, k), q) in state.chunks_mut(SUMS).zip(k.chunks(SUMS)).zip(q.chunks(SUMS)) {
        for (((row, k), q), sum) in rows.iter_mut().zip(k).zip(q).zip(&mut sums) {
            for c in 0..COLUMNS {
                row[c] += k * change[c];
                sum[c] += row[c] * q;
            }
        }
    }
    total(sums)
}

#[inline(always)]
fn total(sums: [Column; SUMS]) -> Column {
    std::array::from_fn(|c| (sums[0][c] + sums[1][c]) + (sums[2][c] + sums[3][c]))
}
