//! AVX2 and AVX-512, each with and without the byte dot product of VNNI.
//!
//! Every unsafe block here relies on what [`Simd`] asks of its callers: the processor has the type's features, and a pointer is valid for a whole
//! vector. The loads and stores are those that need no alignment, and a prefetch may name any address.

use std::arch::x86_64::*;

use super::{Simd, bf16, f16};

/// 256-bit vectors with fused multiply-add.
#[derive(Clone, Copy)]
pub struct Avx2;
#[derive(Clone, Copy)]
pub struct Avx2Vnni;
/// 512-bit vectors.
#[derive(Clone, Copy)]
pub struct Avx512;
#[derive(Clone, Copy)]
pub struct Avx512Vnni;
#[derive(Clone, Copy)]
pub struct Avx512Bf16;

macro_rules! avx2 {
    ($level:ident, $biased:literal, $dot_nibbles:expr, $dot_biased:expr) => {
        impl Simd for $level {
            const LANES: usize = 8;
            const MR: usize = 6;
            const BIASED: bool = $biased;
            type V = __m256;
            type I = __m256i;

            #[inline(always)]
            unsafe fn zero() -> __m256 {
                unsafe { _mm256_setzero_ps() }
            }
            #[inline(always)]
            unsafe fn splat(x: f32) -> __m256 {
                unsafe { _mm256_set1_ps(x) }
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> __m256 {
                unsafe { _mm256_loadu_ps(p) }
            }
            #[inline(always)]
            unsafe fn load_bf16_pairs(p: *const bf16) -> (__m256, __m256) {
                unsafe {
                    let pairs = _mm256_loadu_si256(p.cast());
                    let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000u32 as i32));
                    (_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), _mm256_castsi256_ps(odd))
                }
            }
            #[inline(always)]
            unsafe fn load_bf16(p: *const bf16) -> __m256 {
                unsafe { _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())), 16)) }
            }
            #[inline(always)]
            unsafe fn load_i8(p: *const i8) -> __m256 {
                unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
            }
            #[inline(always)]
            unsafe fn load_f16(p: *const f16) -> __m256 {
                unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
            }
            #[inline(always)]
            unsafe fn load_u8(p: *const u8) -> __m256 {
                unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))) }
            }
            #[inline(always)]
            unsafe fn store(p: *mut f32, v: __m256) {
                unsafe { _mm256_storeu_ps(p, v) }
            }
            #[inline(always)]
            unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
                unsafe { _mm256_fmadd_ps(a, b, c) }
            }
            #[inline(always)]
            unsafe fn sum(v: __m256) -> f32 {
                unsafe {
                    let x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
                    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
                    _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)))
                }
            }
            #[inline(always)]
            unsafe fn mul(a: __m256, b: __m256) -> __m256 {
                unsafe { _mm256_mul_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn add(a: __m256, b: __m256) -> __m256 {
                unsafe { _mm256_add_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn max(a: __m256, b: __m256) -> __m256 {
                unsafe { _mm256_max_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn greatest(v: __m256) -> f32 {
                unsafe {
                    let x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
                    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
                    _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)))
                }
            }
            #[inline(always)]
            unsafe fn splat_i32(x: i32) -> __m256i {
                unsafe { _mm256_set1_epi32(x) }
            }
            #[inline(always)]
            unsafe fn load_bytes(p: *const u8) -> __m256i {
                unsafe { _mm256_loadu_si256(p.cast()) }
            }
            #[inline(always)]
            unsafe fn to_f32(x: __m256i) -> __m256 {
                unsafe { _mm256_cvtepi32_ps(x) }
            }
            #[inline(always)]
            unsafe fn nibbles(x: __m256i) -> (__m256i, __m256i) {
                unsafe {
                    let low = _mm256_set1_epi8(0x0f);
                    (_mm256_and_si256(x, low), _mm256_and_si256(_mm256_srli_epi16(x, 4), low))
                }
            }
            #[inline(always)]
            unsafe fn dot_nibbles(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
                unsafe { $dot_nibbles(acc, w, x) }
            }
            #[inline(always)]
            unsafe fn dot_biased(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
                unsafe { $dot_biased(acc, w, x) }
            }
            #[inline(always)]
            fn prefetch<T>(p: *const T) {
                unsafe { _mm_prefetch(p.cast(), _MM_HINT_T0) }
            }
            #[inline(always)]
            fn prefetch_far<T>(p: *const T) {
                unsafe { _mm_prefetch(p.cast(), _MM_HINT_T1) }
            }
        }
    };
}
avx2!(Avx2, false, nibbles256, biased256);
avx2!(Avx2Vnni, true, _mm256_dpbusd_avx_epi32, _mm256_dpbusd_avx_epi32);

/// Sums of two products fit 16 bits: 2 · 15 · 127.
#[inline(always)]
unsafe fn nibbles256(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
    unsafe { _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1))) }
}

/// |w| · (x with the sign of w): 2 · 128 · 127 fits 16 bits, where the stored bytes up to 255 would not.
#[inline(always)]
unsafe fn biased256(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
    unsafe {
        let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

macro_rules! avx512 {
    ($level:ident, $biased:literal, $dot_nibbles:expr, $dot_biased:expr, { $($more:tt)* }) => {
        impl Simd for $level {
            const LANES: usize = 16;
            const MR: usize = 12;
            const BIASED: bool = $biased;
            type V = __m512;
            type I = __m512i;

            #[inline(always)]
            unsafe fn zero() -> __m512 {
                unsafe { _mm512_setzero_ps() }
            }
            #[inline(always)]
            unsafe fn splat(x: f32) -> __m512 {
                unsafe { _mm512_set1_ps(x) }
            }
            #[inline(always)]
            unsafe fn load(p: *const f32) -> __m512 {
                unsafe { _mm512_loadu_ps(p) }
            }
            #[inline(always)]
            unsafe fn load_bf16_pairs(p: *const bf16) -> (__m512, __m512) {
                unsafe {
                    let pairs = _mm512_loadu_si512(p.cast());
                    let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000u32 as i32));
                    (_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_castsi512_ps(odd))
                }
            }
            #[inline(always)]
            unsafe fn load_bf16(p: *const bf16) -> __m512 {
                unsafe { _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())), 16)) }
            }
            #[inline(always)]
            unsafe fn load_i8(p: *const i8) -> __m512 {
                unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
            }
            #[inline(always)]
            unsafe fn load_f16(p: *const f16) -> __m512 {
                unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
            }
            #[inline(always)]
            unsafe fn load_u8(p: *const u8) -> __m512 {
                unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) }
            }
            #[inline(always)]
            unsafe fn store(p: *mut f32, v: __m512) {
                unsafe { _mm512_storeu_ps(p, v) }
            }
            #[inline(always)]
            unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
                unsafe { _mm512_fmadd_ps(a, b, c) }
            }
            #[inline(always)]
            unsafe fn sum(v: __m512) -> f32 {
                unsafe { _mm512_reduce_add_ps(v) }
            }
            #[inline(always)]
            unsafe fn mul(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_mul_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn add(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_add_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn max(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_max_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn greatest(v: __m512) -> f32 {
                unsafe { _mm512_reduce_max_ps(v) }
            }
            #[inline(always)]
            unsafe fn splat_i32(x: i32) -> __m512i {
                unsafe { _mm512_set1_epi32(x) }
            }
            #[inline(always)]
            unsafe fn load_bytes(p: *const u8) -> __m512i {
                unsafe { _mm512_loadu_si512(p.cast()) }
            }
            #[inline(always)]
            unsafe fn to_f32(x: __m512i) -> __m512 {
                unsafe { _mm512_cvtepi32_ps(x) }
            }
            #[inline(always)]
            unsafe fn nibbles(x: __m512i) -> (__m512i, __m512i) {
                unsafe {
                    let low = _mm512_set1_epi8(0x0f);
                    (_mm512_and_si512(x, low), _mm512_and_si512(_mm512_srli_epi16(x, 4), low))
                }
            }
            #[inline(always)]
            unsafe fn dot_nibbles(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
                unsafe { $dot_nibbles(acc, w, x) }
            }
            #[inline(always)]
            unsafe fn dot_biased(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
                unsafe { $dot_biased(acc, w, x) }
            }
            #[inline(always)]
            fn prefetch<T>(p: *const T) {
                unsafe { _mm_prefetch(p.cast(), _MM_HINT_T0) }
            }
            #[inline(always)]
            fn prefetch_far<T>(p: *const T) {
                unsafe { _mm_prefetch(p.cast(), _MM_HINT_T1) }
            }
            $($more)*
        }
    };
}
avx512!(Avx512, false, nibbles512, biased512, {});
avx512!(Avx512Vnni, true, _mm512_dpbusd_epi32, _mm512_dpbusd_epi32, {});
avx512!(Avx512Bf16, true, _mm512_dpbusd_epi32, _mm512_dpbusd_epi32, {
    #[inline(always)]
    unsafe fn dot_bf16(acc: __m512, w: *const bf16, x: *const u32) -> __m512 {
        unsafe {
            let (w, x) = (_mm512_loadu_si512(w.cast()), _mm512_set1_epi32(*x as i32));
            // The two types are the same bits.
            _mm512_dpbf16_ps(acc, std::mem::transmute::<__m512i, __m512bh>(x), std::mem::transmute::<__m512i, __m512bh>(w))
        }
    }
});

#[inline(always)]
unsafe fn nibbles512(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
    unsafe { _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1))) }
}

#[inline(always)]
unsafe fn biased512(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
    unsafe {
        let w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
        let signed = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
        let pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed);
        _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
    }
}
