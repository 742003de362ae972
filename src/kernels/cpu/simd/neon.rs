//! NEON, with and without the byte dot product (`sdot`, of ARMv8.2's dotprod extension).
//!
//! A vector is two registers, so eight lanes as with AVX2: panels, and the order of every sum, are the same.
//!
//! Every unsafe block here relies on what [`Simd`] asks of its callers: the processor has the type's features, and a pointer is valid for a whole
//! vector. The loads and stores need no alignment beyond that of a number.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Simd, bf16, f16};

#[derive(Clone, Copy)]
pub struct Neon;
#[derive(Clone, Copy)]
pub struct NeonDot;

/// `f` on both registers.
macro_rules! both {
    ($f:ident($($x:ident),+)) => {
        ($f($($x.0),+), $f($($x.1),+))
    };
}

macro_rules! neon {
    ($level:ident, $dot:ident) => {
        impl Simd for $level {
            const LANES: usize = 8;
            const MR: usize = 6;
            const BIASED: bool = false;
            type V = (float32x4_t, float32x4_t);
            type I = (int32x4_t, int32x4_t);

            #[inline(always)]
            unsafe fn zero() -> Self::V {
                unsafe { (vdupq_n_f32(0.0), vdupq_n_f32(0.0)) }
            }
            #[inline(always)]
            unsafe fn splat(x: f32) -> Self::V {
                unsafe { (vdupq_n_f32(x), vdupq_n_f32(x)) }
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> Self::V {
                unsafe { (vld1q_f32(p), vld1q_f32(p.add(4))) }
            }
            #[inline(always)]
            unsafe fn load_bf16_pairs(p: *const bf16) -> (Self::V, Self::V) {
                unsafe {
                    let pairs = (vld1q_u32(p.cast()), vld1q_u32(p.cast::<u32>().add(4)));
                    (both!(first(pairs)), both!(second(pairs)))
                }
            }
            #[inline(always)]
            unsafe fn load_bf16(p: *const bf16) -> Self::V {
                unsafe {
                    let x = vld1q_u16(p.cast());
                    let wide = (vshll_n_u16(vget_low_u16(x), 16), vshll_high_n_u16(x, 16));
                    both!(vreinterpretq_f32_u32(wide))
                }
            }
            #[inline(always)]
            unsafe fn load_i8(p: *const i8) -> Self::V {
                unsafe {
                    let x = vmovl_s8(vld1_s8(p));
                    (vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_high_s16(x)))
                }
            }
            #[inline(always)]
            unsafe fn load_f16(p: *const f16) -> Self::V {
                unsafe {
                    let x = vld1q_u16(p.cast());
                    (widen(vget_low_u16(x)), widen(vget_high_u16(x)))
                }
            }
            #[inline(always)]
            unsafe fn load_u8(p: *const u8) -> Self::V {
                unsafe {
                    let x = vmovl_u8(vld1_u8(p));
                    (vcvtq_f32_u32(vmovl_u16(vget_low_u16(x))), vcvtq_f32_u32(vmovl_high_u16(x)))
                }
            }
            #[inline(always)]
            unsafe fn store(p: *mut f32, v: Self::V) {
                unsafe {
                    vst1q_f32(p, v.0);
                    vst1q_f32(p.add(4), v.1);
                }
            }
            #[inline(always)]
            unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                unsafe { both!(vfmaq_f32(c, a, b)) }
            }
            #[inline(always)]
            unsafe fn sum(v: Self::V) -> f32 {
                unsafe {
                    let x = vaddq_f32(v.0, v.1);
                    let x = vadd_f32(vget_low_f32(x), vget_high_f32(x));
                    vget_lane_f32(x, 0) + vget_lane_f32(x, 1)
                }
            }
            #[inline(always)]
            unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
                unsafe { both!(vmulq_f32(a, b)) }
            }
            #[inline(always)]
            unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
                unsafe { both!(vaddq_f32(a, b)) }
            }
            #[inline(always)]
            unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
                unsafe { both!(greater(a, b)) }
            }
            #[inline(always)]
            unsafe fn greatest(v: Self::V) -> f32 {
                unsafe { vmaxnmvq_f32(vmaxnmq_f32(v.0, v.1)) }
            }
            #[inline(always)]
            unsafe fn splat_i32(x: i32) -> Self::I {
                unsafe { (vdupq_n_s32(x), vdupq_n_s32(x)) }
            }
            #[inline(always)]
            unsafe fn load_bytes(p: *const u8) -> Self::I {
                unsafe { (vreinterpretq_s32_u8(vld1q_u8(p)), vreinterpretq_s32_u8(vld1q_u8(p.add(16)))) }
            }
            #[inline(always)]
            unsafe fn to_f32(x: Self::I) -> Self::V {
                unsafe { both!(vcvtq_f32_s32(x)) }
            }
            #[inline(always)]
            unsafe fn nibbles(x: Self::I) -> (Self::I, Self::I) {
                unsafe { (both!(low_nibbles(x)), both!(high_nibbles(x))) }
            }
            #[inline(always)]
            unsafe fn dot_nibbles(acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
                unsafe { both!($dot(acc, w, x)) }
            }
            #[inline(always)]
            unsafe fn dot_biased(acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
                unsafe {
                    // Both factors are signed here, so the bias goes off at once; in a tile that is done once for all rows.
                    let w = both!(unbias(w));
                    both!($dot(acc, w, x))
                }
            }
            // `nomem`, since nothing is read: else sums would go to memory before each of these.
            #[inline(always)]
            fn prefetch<T>(p: *const T) {
                // SAFETY: any address will do.
                unsafe { asm!("prfm pldl1keep, [{}]", in(reg) p, options(nomem, nostack, preserves_flags)) }
            }
            #[inline(always)]
            fn prefetch_far<T>(p: *const T) {
                // SAFETY: any address will do.
                unsafe { asm!("prfm pldl2keep, [{}]", in(reg) p, options(nomem, nostack, preserves_flags)) }
            }
        }
    };
}
neon!(Neon, dot_in_pairs);
neon!(NeonDot, dot);

#[inline(always)]
unsafe fn first(pairs: uint32x4_t) -> float32x4_t {
    unsafe { vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)) }
}

#[inline(always)]
unsafe fn second(pairs: uint32x4_t) -> float32x4_t {
    unsafe { vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000))) }
}

/// Four f16, whose own intrinsic is newer than the oldest compiler that this builds with.
#[inline(always)]
unsafe fn widen(x: uint16x4_t) -> float32x4_t {
    let wide;
    unsafe { asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) x, options(pure, nomem, nostack)) };
    wide
}

/// `b` where either is not a number, as on the other levels; the instruction for a maximum would say that it is none.
#[inline(always)]
unsafe fn greater(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
}

#[inline(always)]
unsafe fn low_nibbles(x: int32x4_t) -> int32x4_t {
    unsafe { vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(x), vdupq_n_u8(0x0f))) }
}

#[inline(always)]
unsafe fn high_nibbles(x: int32x4_t) -> int32x4_t {
    unsafe { vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4)) }
}

/// `w + 128` → `w`, signed.
#[inline(always)]
unsafe fn unbias(w: int32x4_t) -> int32x4_t {
    unsafe { vreinterpretq_s32_u8(veorq_u8(vreinterpretq_u8_s32(w), vdupq_n_u8(0x80))) }
}

/// Sums of two products fit 16 bits: 2 · 128 · 127.
#[inline(always)]
unsafe fn dot_in_pairs(acc: int32x4_t, w: int32x4_t, x: int32x4_t) -> int32x4_t {
    unsafe {
        let (w, x) = (vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
        let (low, high) = (vmull_s8(vget_low_s8(w), vget_low_s8(x)), vmull_high_s8(w, x));
        vpadalq_s16(acc, vpaddq_s16(low, high))
    }
}

/// The instruction itself, since its intrinsic is not stable.
#[inline(always)]
unsafe fn dot(mut acc: int32x4_t, w: int32x4_t, x: int32x4_t) -> int32x4_t {
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) w, in(vreg) x, options(pure, nomem, nostack, preserves_flags))
    };
    acc
}
