//! The widest vectors this processor has, chosen once at run time, so that one portable binary is fast everywhere.
//!
//! A kernel is written once, generic over [`Simd`], with `#[inline(always)]` bodies; `dispatch!` calls it inside a function that has
//! the right target features, which is where the intrinsics are inlined.

use half::{bf16, f16};

/// Vectors of f32.
///
/// # Safety
/// Every function: the processor has the features of the implementing type, and pointers are valid for `LANES` values.
pub trait Simd: Copy {
    const LANES: usize;
    /// Most rows of activations whose sums a matrix kernel keeps in registers, two vectors each.
    const MR: usize;
    /// Whether [`Simd::dot_biased`] multiplies the stored byte itself, so that 128 · Σx is to be taken off.
    const BIASED: bool;
    type V: Copy;
    /// As many i32, or four times as many bytes.
    type I: Copy;

    unsafe fn zero() -> Self::V;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    /// `LANES` pairs of bf16: the first of each, the second of each.
    unsafe fn load_bf16_pairs(p: *const bf16) -> (Self::V, Self::V);
    unsafe fn load_f16(p: *const f16) -> Self::V;
    unsafe fn load_u8(p: *const u8) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a · b + c`
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sum of all lanes, always in the same order.
    unsafe fn sum(v: Self::V) -> f32;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The greatest lane.
    unsafe fn greatest(v: Self::V) -> f32;

    unsafe fn splat_i32(x: i32) -> Self::I;
    /// `4 · LANES` bytes.
    unsafe fn load_bytes(p: *const u8) -> Self::I;
    unsafe fn to_f32(x: Self::I) -> Self::V;
    /// The low, and the high half of every byte.
    unsafe fn nibbles(x: Self::I) -> (Self::I, Self::I);
    /// Adds to every i32 the four products of its bytes: `w` from 0 to 15, `x` signed and above -128.
    unsafe fn dot_nibbles(acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// The same for weights stored as `w + 128`; see [`Simd::BIASED`].
    unsafe fn dot_biased(acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// Asks for a cache line that will be read soon; any address will do.
    #[inline(always)]
    fn prefetch<T>(_p: *const T) {}
    /// The same, into the second cache.
    #[inline(always)]
    fn prefetch_far<T>(_p: *const T) {}
}

/// What this processor offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// With the byte dot product in 256 bits.
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

/// The best level, found once. `WORKER_CANDLE_SIMD=portable|avx2|avx2vnni|avx512` lowers it, for tests.
pub fn level() -> Level {
    static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *LEVEL.get_or_init(|| detect(&std::env::var("WORKER_CANDLE_SIMD").unwrap_or_default()))
}

#[cfg(target_arch = "x86_64")]
fn detect(asked: &str) -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
    let levels = [
        ("avx512vnni", avx512 && is_x86_feature_detected!("avx512vnni"), Level::Avx512Vnni),
        ("avx512", avx512, Level::Avx512),
        ("avx2vnni", avx2 && is_x86_feature_detected!("avxvnni"), Level::Avx2Vnni),
        ("avx2", avx2, Level::Avx2),
        ("portable", true, Level::Portable),
    ];
    let from = levels.iter().position(|(name, ..)| *name == asked).unwrap_or(0);
    levels[from..].iter().find(|(_, there, _)| *there).map_or(Level::Portable, |(.., level)| *level)
}

#[cfg(not(target_arch = "x86_64"))]
fn detect(_asked: &str) -> Level {
    Level::Portable
}

/// Lanes of the level in use.
pub fn lanes() -> usize {
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vnni => 16,
        _ => 8,
    }
}

/// Eight lanes the compiler vectorises itself (NEON, SSE2).
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

#[cfg(target_arch = "x86_64")]
pub mod x86 {
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
        ($level:ident, $biased:literal, $dot_nibbles:expr, $dot_biased:expr) => {
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
            }
        };
    }
    avx512!(Avx512, false, nibbles512, biased512);
    avx512!(Avx512Vnni, true, _mm512_dpbusd_epi32, _mm512_dpbusd_epi32);

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
}

/// [`Simd::MR`] of the level in use.
pub fn most_rows() -> usize {
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vnni => x86::Avx512::MR,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx2Vnni => x86::Avx2::MR,
        Level::Portable => Portable::MR,
    }
}

/// `dispatch!(kernel::<T>(arg: Type, …))`: runs the generic kernel `kernel::<S, T>` with the best vectors.
///
/// Defines, at the call site, one wrapper per level that carries the target features; types must therefore be concrete.
macro_rules! dispatch {
    ($kernel:ident :: <$($generic:ty),*> ( $($arg:ident : $type:ty),* $(,)? )) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
        unsafe fn avx512vnni($($arg: $type),*) {
            unsafe { $kernel::<$crate::kernels::cpu::simd::x86::Avx512Vnni, $($generic),*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
        unsafe fn avx512($($arg: $type),*) {
            unsafe { $kernel::<$crate::kernels::cpu::simd::x86::Avx512, $($generic),*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        unsafe fn avx2vnni($($arg: $type),*) {
            unsafe { $kernel::<$crate::kernels::cpu::simd::x86::Avx2Vnni, $($generic),*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($arg: $type),*) {
            unsafe { $kernel::<$crate::kernels::cpu::simd::x86::Avx2, $($generic),*>($($arg),*) }
        }
        // SAFETY: `level` has seen the features on this processor.
        unsafe {
            match $crate::kernels::cpu::simd::level() {
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::simd::Level::Avx512Vnni => avx512vnni($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::simd::Level::Avx512 => avx512($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::simd::Level::Avx2Vnni => avx2vnni($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::simd::Level::Avx2 => avx2($($arg),*),
                $crate::kernels::cpu::simd::Level::Portable => $kernel::<$crate::kernels::cpu::simd::Portable, $($generic),*>($($arg),*),
            }
        }
    }};
}
pub(crate) use dispatch;
