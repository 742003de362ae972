//! bf16 weights by an instruction that multiplies pairs of bf16: twice the products of a fused multiply-add, with activations rounded
//! to bf16. Products of bf16 are exact in f32, where sums are kept.

use half::bf16;

use super::{AHEAD, MatmulJob, Next, PANEL, Scratch, Weights};
use crate::cpu::pool::Pool;
use crate::cpu::simd::{self, Simd, dispatch};
use crate::cpu::{Ptr, PtrMut};

/// The nearest bf16, ties to even. What is not a number stays one.
#[inline(always)]
pub(super) fn nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
    if x.is_nan() { (bits >> 16) | 0x40 } else { rounded }
}

/// Writes the rows of each tile side by side: `[tile][k/2][rows]` pairs.
pub(super) fn arrange(pool: &mut Pool, x: &[f32], k: usize, scratch: &mut Scratch) {
    let (m, width) = (x.len() / k, k.next_multiple_of(2));
    scratch.reserve(m * width);
    let (source, target) = (Ptr(x.as_ptr()), PtrMut(scratch.aligned().cast::<u32>()));
    super::by_tiles(pool, m, k, &|row, rows| {
        let (x, out) = (Ptr(source.ptr().wrapping_add(row * k)), PtrMut(target.ptr().wrapping_add(row * width / 2)));
        dispatch!(tile::<>(x: Ptr<f32>, rows: usize, k: usize, out: PtrMut<u32>));
    });
}

#[inline(always)]
unsafe fn tile<S: Simd>(x: Ptr<f32>, rows: usize, k: usize, out: PtrMut<u32>) {
    // SAFETY: `rows` rows of x, and as many values of a tile, rounded up to pairs.
    unsafe {
        for r in 0..rows {
            let x = std::slice::from_raw_parts(x.0.add(r * k), k);
            for pair in 0..k.div_ceil(2) {
                let odd = x.get(2 * pair + 1).map_or(0, |x| nearest(*x));
                *out.0.add(pair * rows + r) = nearest(x[2 * pair]) | odd << 16;
            }
        }
    }
}

/// bf16 weights against rounded activations. Relies on what [`Weights::tile`] asks, with activations as [`arrange`] has written them.
pub(super) struct Pairs;

impl Weights for Pairs {
    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize>(job: &MatmulJob, panel: *const u8, row: usize, pass: usize, next: Next) -> [[S::V; 2]; MR] {
        unsafe {
            let mut acc = [[S::zero(); 2]; MR];
            let pairs = job.k.div_ceil(2);
            let x = job.x.0.cast::<u32>().add(row * pairs);
            let panel = panel.cast::<bf16>().add(pass * 4 * S::LANES);
            for pair in 0..pairs {
                let w = panel.add(pair * 2 * PANEL);
                S::prefetch(w.wrapping_add(AHEAD / 2));
                S::prefetch(w.wrapping_add(AHEAD / 2 + 32));
                next.fetch::<S>(pair * 4 * PANEL);
                for r in 0..MR {
                    let x = x.add(pair * MR + r);
                    acc[r][0] = S::dot_bf16(acc[r][0], w, x);
                    acc[r][1] = S::dot_bf16(acc[r][1], w.add(2 * S::LANES), x);
                }
            }
            acc
        }
    }
}

/// # Safety
/// As for [`panels`](super::panels); the processor has the features named here.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn panels(job: MatmulJob, from: usize, to: usize) {
    // SAFETY: as above.
    unsafe { super::panels::<simd::x86::Avx512Bf16, Pairs>(job, from, to) }
}
