//! Causal convolutions of single channels. A token's output depends on the inputs of the tokens before it alone, whether those are in the same
//! step or in the state, so chunks and company change no bit.

use super::simd::{Simd, dispatch};
use super::{Buffer, Ptr, PtrMut, by_rows, elementwise};
use crate::cpu::pool::Pool;
use crate::{BatchRow, CausalConv, ConvKind, ConvSpec, StepStates};

/// One step of a convolution. The buffers have been checked.
pub(super) struct Job<'a> {
    pub conv: &'a CausalConv<Vec<f32>>,
    pub rows: &'a [BatchRow],
    pub states: &'a StepStates,
}

impl Job<'_> {
    /// `out = conv(x)`, and then the states that are kept.
    pub fn run(&self, pool: &mut Pool, x: &Buffer, state: &mut Buffer, out: &mut Buffer) {
        let ConvSpec { channels, .. } = self.conv.spec;
        let (target, before) = (PtrMut(out.values.as_mut_ptr()), Ptr(state.values.as_ptr()));
        let state_width = self.conv.spec.state_width();
        by_rows(pool, x.rows, x.width, &|token| {
            let index = self.rows.partition_point(|row| row.start <= token) - 1;
            let row = &self.rows[index];
            // SAFETY: the output's row is this task's alone; nobody writes states meanwhile, and the slot is one of them.
            let (out, before) = unsafe {
                let before = |slot| std::slice::from_raw_parts(before.ptr().add(slot * state_width), state_width);
                (
                    std::slice::from_raw_parts_mut(target.ptr().add(token * channels), channels),
                    self.states.start(index, row).map_or(&[][..], before),
                )
            };
            convolve(self.conv, x, (row.start, token), before, out);
        });
        let states = PtrMut(state.values.as_mut_ptr());
        by_rows(pool, self.rows.len(), state_width, &|index| {
            let row = &self.rows[index];
            for (slot, seen) in self.states.saves(index, row) {
                let from = self.states.start(index, row);
                // SAFETY: the slots that a row writes are its own, and so is the one it goes on from.
                let (old, new) = unsafe {
                    let at = |slot: usize| states.ptr().add(slot * state_width);
                    (from.map(|slot| Ptr(at(slot).cast_const())), std::slice::from_raw_parts_mut(at(slot), state_width))
                };
                keep(self.conv.spec, x, (row.start, seen), old, new);
            }
        });
    }
}

/// One token's output: `at` is the first token of its row and itself; `before` is the state, empty where there are zeros.
fn convolve(conv: &CausalConv<Vec<f32>>, x: &Buffer, at: (usize, usize), before: &[f32], out: &mut [f32]) {
    dispatch!(convolve_all::<>(conv: &CausalConv<Vec<f32>>, x: &Buffer, at: (usize, usize), before: &[f32], out: &mut [f32]));
}

#[inline(always)]
unsafe fn convolve_all<S: Simd>(conv: &CausalConv<Vec<f32>>, x: &Buffer, at: (usize, usize), before: &[f32], out: &mut [f32]) {
    let (first, token) = at;
    let ConvSpec { channels, kernel, kind } = conv.spec;
    match &conv.bias {
        Some(bias) => out.copy_from_slice(bias),
        None => out.fill(0.0),
    }
    for (tap, weight) in conv.weight.chunks_exact(channels).enumerate() {
        // The tap looks at the token so many places before this one.
        let back = kernel - 1 - tap;
        if token - first < back {
            let column = kernel - 1 + token - first - back;
            let Some(input) = before.get(column * channels..(column + 1) * channels) else { continue };
            out.iter_mut().zip(weight).zip(input).for_each(|((out, weight), input)| *out += weight * input);
            continue;
        }
        let input = &x.values[(token - back) * x.width..(token - back + 1) * x.width];
        match kind {
            ConvKind::Silu => out.iter_mut().zip(weight).zip(input).for_each(|((out, weight), input)| *out += weight * input),
            ConvKind::Gated => {
                let (b, x) = (&input[..channels], &input[2 * channels..]);
                out.iter_mut().zip(weight).zip(b.iter().zip(x)).for_each(|((out, weight), (b, x))| *out += weight * (b * x));
            }
        }
    }
    match kind {
        ConvKind::Silu => out.iter_mut().for_each(|out| *out /= 1.0 + elementwise::exp(-*out)),
        ConvKind::Gated => {
            let c = &x.values[token * x.width + channels..token * x.width + 2 * channels];
            out.iter_mut().zip(c).for_each(|(out, c)| *out *= c);
        }
    }
}

/// The state after `seen` tokens of a row whose first token is `first`. `old` is the state before the row, which may be `new` itself.
fn keep(spec: ConvSpec, x: &Buffer, (first, seen): (usize, usize), old: Option<Ptr<f32>>, new: &mut [f32]) {
    let ConvSpec { channels, kernel, kind } = spec;
    // Columns go from the oldest on, so one that is still needed is not overwritten.
    for (column, new) in new.chunks_exact_mut(channels).enumerate() {
        let from = column + seen;
        if let Some(in_row) = from.checked_sub(kernel - 1) {
            let input = &x.values[(first + in_row) * x.width..(first + in_row + 1) * x.width];
            match kind {
                ConvKind::Silu => new.copy_from_slice(input),
                ConvKind::Gated => {
                    let (b, x) = (&input[..channels], &input[2 * channels..]);
                    new.iter_mut().zip(b.iter().zip(x)).for_each(|(new, (b, x))| *new = b * x);
                }
            }
        } else if let Some(old) = old {
            // SAFETY: the column is inside the state; where both states are one, it lies behind the column that is written.
            unsafe { std::ptr::copy(old.ptr().add(from * channels), new.as_mut_ptr(), channels) };
        } else {
            new.fill(0.0);
        }
    }
}
