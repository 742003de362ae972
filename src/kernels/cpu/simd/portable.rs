//! For processors without vectors of ours.
//!
//! Only the loads and stores are unsafe in fact: they rely on pointers that are valid for eight numbers, as [`Simd`] asks, and need no alignment.

use super::{Simd, bf16, f16};

/// Eight lanes that the compiler makes what it can of.
#[derive(Clone, Copy)]
pub struct Portable;

impl Simd for Portable {
    const LANES: usize = 8;
    const MR: usize = 4;
    const BIASED: bool = false;
    type V = [f32; 8];
    type I = [i32; 8];

    #[inline(always)]
    unsafe fn zero() -> [f32; 8] {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 8] {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 8] {
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(p: *const bf16) -> ([f32; 8], [f32; 8]) {
        let pairs = unsafe { p.cast::<[u32; 8]>().read_unaligned() };
        (pairs.map(|pair| f32::from_bits(pair << 16)), pairs.map(|pair| f32::from_bits(pair & 0xffff_0000)))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> [f32; 8] {
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> [f32; 8] {
        unsafe { p.cast::<[i8; 8]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> [f32; 8] {
        unsafe { p.cast::<[f16; 8]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> [f32; 8] {
        unsafe { p.cast::<[u8; 8]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 8]) {
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| {
            // Without a fused instruction `mul_add` would be a library call per lane.
            if cfg!(target_arch = "aarch64") { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] }
        })
    }
    #[inline(always)]
    unsafe fn sum(v: [f32; 8]) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn max(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn greatest(v: [f32; 8]) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> [i32; 8] {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load_bytes(p: *const u8) -> [i32; 8] {
        unsafe { p.cast::<[i32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn to_f32(x: [i32; 8]) -> [f32; 8] {
        x.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn nibbles(x: [i32; 8]) -> ([i32; 8], [i32; 8]) {
        (x.map(|x| x & 0x0f0f_0f0f), x.map(|x| (x >> 4) & 0x0f0f_0f0f))
    }
    #[inline(always)]
    unsafe fn dot_nibbles(acc: [i32; 8], w: [i32; 8], x: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|i| acc[i] + (0..4).map(|b| ((w[i] >> (8 * b)) & 0xff) * ((x[i] << (24 - 8 * b)) >> 24)).sum::<i32>())
    }
    #[inline(always)]
    unsafe fn dot_biased(acc: [i32; 8], w: [i32; 8], x: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|i| acc[i] + (0..4).map(|b| (((w[i] >> (8 * b)) & 0xff) - 128) * ((x[i] << (24 - 8 * b)) >> 24)).sum::<i32>())
    }
}
