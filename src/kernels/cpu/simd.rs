//! The widest vectors this processor has, chosen once at run time, so that one portable binary is fast everywhere.
//!
//! A kernel is written once, generic over [`Simd`], with `#[inline(always)]` bodies; `dispatch!` calls it inside a function that has
//! the right target features, which is where the intrinsics are inlined.

use half::bf16;

/// Vectors of f32.
///
/// # Safety
/// Every function: the processor has the features of the implementing type, and pointers are valid for `LANES` values.
pub trait Simd: Copy {
    const LANES: usize;
    /// Rows of the weight matrix that a matrix kernel keeps in registers at once.
    const NR: usize;
    type V: Copy;

    unsafe fn zero() -> Self::V;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn load_bf16(p: *const bf16) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a · b + c`
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sum of all lanes, always in the same order.
    unsafe fn sum(v: Self::V) -> f32;
    /// Asks for a cache line that will be read soon; any address will do.
    #[inline(always)]
    fn prefetch<T>(_p: *const T) {}
}

/// A type of stored weights that widens to f32 without loss.
pub trait Weight: Copy + Send + Sync + 'static {
    /// # Safety
    /// As [`Simd`].
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    fn widen(self) -> f32;
}

impl Weight for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::V {
        unsafe { S::load(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Weight for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const bf16) -> S::V {
        unsafe { S::load_bf16(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// What this processor offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// The best level, found once. `WORKER_CANDLE_SIMD=portable|avx2` lowers it, for tests.
pub fn level() -> Level {
    static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *LEVEL.get_or_init(detect)
}

fn detect() -> Level {
    let asked = std::env::var("WORKER_CANDLE_SIMD").unwrap_or_default();
    if asked == "portable" {
        return Level::Portable;
    }
    #[cfg(target_arch = "x86_64")]
    {
        if asked != "avx2" && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Level::Avx512;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// Eight lanes the compiler vectorises itself (NEON, SSE2).
#[derive(Clone, Copy)]
pub struct Portable;

impl Simd for Portable {
    const LANES: usize = 8;
    const NR: usize = 4;
    type V = [f32; 8];

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
    unsafe fn load_bf16(p: *const bf16) -> [f32; 8] {
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
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
}

#[cfg(target_arch = "x86_64")]
pub mod x86 {
    use std::arch::x86_64::*;

    use super::{Simd, bf16};

    /// 256-bit vectors with fused multiply-add.
    #[derive(Clone, Copy)]
    pub struct Avx2;

    impl Simd for Avx2 {
        const LANES: usize = 8;
        const NR: usize = 4;
        type V = __m256;

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
        unsafe fn load_bf16(p: *const bf16) -> __m256 {
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())), 16)) }
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
        fn prefetch<T>(p: *const T) {
            unsafe { _mm_prefetch(p.cast(), _MM_HINT_T0) }
        }
    }

    /// 512-bit vectors.
    #[derive(Clone, Copy)]
    pub struct Avx512;

    impl Simd for Avx512 {
        const LANES: usize = 16;
        const NR: usize = 8;
        type V = __m512;

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
        unsafe fn load_bf16(p: *const bf16) -> __m512 {
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())), 16)) }
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
        fn prefetch<T>(p: *const T) {
            unsafe { _mm_prefetch(p.cast(), _MM_HINT_T0) }
        }
    }
}

/// `dispatch!(kernel::<T>(arg: Type, …))`: runs the generic kernel `kernel::<S, T>` with the best vectors.
///
/// Defines, at the call site, one wrapper per level that carries the target features; types must therefore be concrete.
macro_rules! dispatch {
    ($kernel:ident :: <$($generic:ty),*> ( $($arg:ident : $type:ty),* $(,)? )) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx2,fma")]
        unsafe fn avx512($($arg: $type),*) {
            unsafe { $kernel::<$crate::kernels::cpu::simd::x86::Avx512, $($generic),*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2($($arg: $type),*) {
            unsafe { $kernel::<$crate::kernels::cpu::simd::x86::Avx2, $($generic),*>($($arg),*) }
        }
        // SAFETY: `level` has seen the features on this processor.
        unsafe {
            match $crate::kernels::cpu::simd::level() {
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::simd::Level::Avx512 => avx512($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::cpu::simd::Level::Avx2 => avx2($($arg),*),
                $crate::kernels::cpu::simd::Level::Portable => $kernel::<$crate::kernels::cpu::simd::Portable, $($generic),*>($($arg),*),
            }
        }
    }};
}
pub(crate) use dispatch;
