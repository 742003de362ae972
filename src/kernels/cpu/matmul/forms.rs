//! The inner loops: one tile of sums from weights of each form, at every level.
//!
//! Every unsafe block here relies on what [`Weights::tile`] asks of its caller: `panel` is a whole panel of the form, `MR` rows of activations from
//! `row` on are inside the job's (in the order and type that this form reads), and the processor has the features of `S`. A prefetch may
//! name any address.

use half::f16;

use super::{AHEAD, BLOCK, BLOCK8, MatmulJob, Next, PANEL, SUB4, SUPER, SUPER4, Weights};
use crate::cpu::simd::Simd;

pub(super) struct WeightsF32;
pub(super) struct WeightsBf16;
pub(super) struct Weights8;
pub(super) struct Weights4;

impl Weights for WeightsF32 {
    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize>(job: &MatmulJob, panel: *const u8, row: usize, pass: usize, next: Next) -> [[S::V; 2]; MR] {
        unsafe {
            let mut acc = [[S::zero(); 2]; MR];
            let (x, k) = (job.x.0.add(row * job.k), job.k);
            let panel = panel.cast::<f32>().add(pass * 2 * S::LANES);
            for i in 0..k {
                let w = panel.add(i * PANEL);
                S::prefetch(w.wrapping_add(AHEAD / 4));
                S::prefetch(w.wrapping_add(AHEAD / 4 + 16));
                next.fetch::<S>(i * 4 * PANEL);
                let (w0, w1) = (S::load(w), S::load(w.add(S::LANES)));
                for r in 0..MR {
                    let x = S::splat(*x.add(i * MR + r));
                    acc[r][0] = S::mul_add(x, w0, acc[r][0]);
                    acc[r][1] = S::mul_add(x, w1, acc[r][1]);
                }
            }
            acc
        }
    }
}

impl Weights for WeightsBf16 {
    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize>(job: &MatmulJob, panel: *const u8, row: usize, pass: usize, next: Next) -> [[S::V; 2]; MR] {
        unsafe {
            let mut acc = [[S::zero(); 2]; MR];
            let (x, k) = (job.x.0.add(row * job.k), job.k);
            let panel = panel.cast::<half::bf16>().add(pass * 4 * S::LANES);
            for pair in 0..k / 2 {
                let w = panel.add(pair * 2 * PANEL);
                S::prefetch(w.wrapping_add(AHEAD / 2));
                S::prefetch(w.wrapping_add(AHEAD / 2 + 32));
                next.fetch::<S>(pair * 4 * PANEL);
                let (even0, odd0) = S::load_bf16_pairs(w);
                let (even1, odd1) = S::load_bf16_pairs(w.add(2 * S::LANES));
                for r in 0..MR {
                    let even = S::splat(*x.add(2 * pair * MR + r));
                    acc[r][0] = S::mul_add(even, even0, acc[r][0]);
                    acc[r][1] = S::mul_add(even, even1, acc[r][1]);
                }
                for r in 0..MR {
                    let odd = S::splat(*x.add((2 * pair + 1) * MR + r));
                    acc[r][0] = S::mul_add(odd, odd0, acc[r][0]);
                    acc[r][1] = S::mul_add(odd, odd1, acc[r][1]);
                }
            }
            if k % 2 == 1 {
                let w = panel.add(k / 2 * 2 * PANEL);
                let ((w0, _), (w1, _)) = (S::load_bf16_pairs(w), S::load_bf16_pairs(w.add(2 * S::LANES)));
                for r in 0..MR {
                    let x = S::splat(*x.add((k - 1) * MR + r));
                    acc[r][0] = S::mul_add(x, w0, acc[r][0]);
                    acc[r][1] = S::mul_add(x, w1, acc[r][1]);
                }
            }
            acc
        }
    }
}

impl Weights for Weights8 {
    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize>(job: &MatmulJob, panel: *const u8, row: usize, pass: usize, next: Next) -> [[S::V; 2]; MR] {
        unsafe {
            let mut acc = [[S::zero(); 2]; MR];
            let (k, blocks) = (job.k, job.k / BLOCK);
            let x = job.values.0.add(row * k);
            for block in 0..blocks {
                let start = panel.add(block * BLOCK8);
                let bytes = start.add(2 * PANEL + pass * 8 * S::LANES);
                let mut sums = [[S::splat_i32(0); 2]; MR];
                if S::BIASED {
                    for r in 0..MR {
                        sums[r] = [S::splat_i32(*job.sums.0.add((row + r) * blocks + block)); 2];
                    }
                }
                for group in 0..BLOCK / 4 {
                    let w = bytes.add(group * 4 * PANEL);
                    S::prefetch(w.wrapping_add(AHEAD));
                    S::prefetch(w.wrapping_add(AHEAD + 64));
                    next.fetch::<S>(block * BLOCK8 + group * 4 * PANEL);
                    let (w0, w1) = (S::load_bytes(w), S::load_bytes(w.add(4 * S::LANES)));
                    for r in 0..MR {
                        let x = S::splat_i32(x.add(r * k + block * BLOCK + group * 4).cast::<i32>().read_unaligned());
                        sums[r][0] = S::dot_biased(sums[r][0], w0, x);
                        sums[r][1] = S::dot_biased(sums[r][1], w1, x);
                    }
                }
                let scales = start.cast::<f16>().add(pass * 2 * S::LANES);
                let (s0, s1) = (S::load_f16(scales), S::load_f16(scales.add(S::LANES)));
                for r in 0..MR {
                    let scale = S::splat(*job.scales.0.add((row + r) * blocks + block));
                    acc[r][0] = S::mul_add(S::to_f32(sums[r][0]), S::mul(s0, scale), acc[r][0]);
                    acc[r][1] = S::mul_add(S::to_f32(sums[r][1]), S::mul(s1, scale), acc[r][1]);
                }
            }
            acc
        }
    }
}

impl Weights for Weights4 {
    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize>(job: &MatmulJob, panel: *const u8, row: usize, pass: usize, next: Next) -> [[S::V; 2]; MR] {
        unsafe {
            let mut acc = [[S::zero(); 2]; MR];
            let (k, blocks) = (job.k, job.k / BLOCK);
            let x = job.values.0.add(row * k);
            for index in 0..k / SUPER {
                let start = panel.add(index * SUPER4);
                let units = start.cast::<f16>().add(pass * 2 * S::LANES);
                let d = [S::load_f16(units), S::load_f16(units.add(S::LANES))];
                let dmin = [S::load_f16(units.add(PANEL)), S::load_f16(units.add(PANEL + S::LANES))];
                for sub in 0..SUPER / BLOCK {
                    let bytes = start.add(4 * PANEL + sub * SUB4);
                    let block = index * (SUPER / BLOCK) + sub;
                    let nibbles = bytes.add(2 * PANEL + pass * 8 * S::LANES);
                    let mut sums = [[S::splat_i32(0); 2]; MR];
                    for group in 0..BLOCK / 8 {
                        let w = nibbles.add(group * 4 * PANEL);
                        S::prefetch(w.wrapping_add(AHEAD));
                        S::prefetch(w.wrapping_add(AHEAD + 64));
                        next.fetch::<S>(index * SUPER4 + sub * SUB4 + group * 4 * PANEL);
                        let (low0, high0) = S::nibbles(S::load_bytes(w));
                        let (low1, high1) = S::nibbles(S::load_bytes(w.add(4 * S::LANES)));
                        for r in 0..MR {
                            let x = x.add(r * k + block * BLOCK + group * 4);
                            let low = S::splat_i32(x.cast::<i32>().read_unaligned());
                            let high = S::splat_i32(x.add(BLOCK / 2).cast::<i32>().read_unaligned());
                            sums[r][0] = S::dot_nibbles(S::dot_nibbles(sums[r][0], low0, low), high0, high);
                            sums[r][1] = S::dot_nibbles(S::dot_nibbles(sums[r][1], low1, low), high1, high);
                        }
                    }
                    for v in 0..2 {
                        let at = pass * 2 * S::LANES + v * S::LANES;
                        let scale = S::mul(d[v], S::load_u8(bytes.add(at)));
                        let min = S::mul(dmin[v], S::load_u8(bytes.add(PANEL + at)));
                        for r in 0..MR {
                            let x_scale = *job.scales.0.add((row + r) * blocks + block);
                            let minus_x_sum = *job.sums.0.add((row + r) * blocks + block) as f32 * (1.0 / 128.0);
                            let value = S::mul_add(S::to_f32(sums[r][v]), scale, S::mul(min, S::splat(minus_x_sum)));
                            acc[r][v] = S::mul_add(value, S::splat(x_scale), acc[r][v]);
                        }
                    }
                }
            }
            acc
        }
    }
}
