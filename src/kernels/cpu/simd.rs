//! The widest vectors this processor has, chosen once at run time, so that one portable binary is fast everywhere.
//!
//! A kernel is written once, generic over [`Simd`], with `#[inline(always)]` bodies; `dispatch!` calls it inside a function that has
//! the right target features, which is where the intrinsics are inlined.

use half::{bf16, f16};

#[cfg(target_arch = "aarch64")]
pub mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
pub mod x86;

pub use portable::Portable;

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
    unsafe fn load_bf16(p: *const bf16) -> Self::V;
    unsafe fn load_f16(p: *const f16) -> Self::V;
    unsafe fn load_i8(p: *const i8) -> Self::V;
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
    /// Adds to every lane the two products of its pair of bf16 in `w` with the pair `x`.
    #[cfg(any(target_arch = "x86_64", test))]
    #[inline(always)]
    unsafe fn dot_bf16(acc: Self::V, w: *const bf16, x: *const u32) -> Self::V {
        // SAFETY: as the trait says; `x` is valid for one pair.
        unsafe {
            let ((even, odd), x) = (Self::load_bf16_pairs(w), *x);
            let acc = Self::mul_add(Self::splat(f32::from_bits(x << 16)), even, acc);
            Self::mul_add(Self::splat(f32::from_bits(x & 0xffff_0000)), odd, acc)
        }
    }
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
    /// With the dot product of pairs of bf16, where it is the faster one.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// With tiles of bf16.
    #[cfg(target_arch = "x86_64")]
    Amx,
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// With the byte dot product.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

/// The best level, found once. `WORKER_CANDLE_SIMD=portable|avx2|avx2vnni|avx512|avx512vnni|avx512bf16|amx`, or
/// `portable|neon|neondot`, lowers it, for tests; a level that this processor lacks becomes the next lower one that it has.
pub fn level() -> Level {
    static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *LEVEL.get_or_init(|| detect(&std::env::var("WORKER_CANDLE_SIMD").unwrap_or_default()))
}

fn detect(asked: &str) -> Level {
    let levels = levels();
    let from = levels.iter().position(|level| level.name == asked).unwrap_or(0);
    let usable = |known: &&KnownLevel| known.is_here && (known.is_fast || known.name == asked);
    levels[from..].iter().find(usable).map_or(Level::Portable, |known| known.level)
}

/// A level of this kind of processor.
#[derive(Debug, Clone, Copy)]
pub struct KnownLevel {
    /// In `WORKER_CANDLE_SIMD`.
    pub name: &'static str,
    /// This processor has it.
    pub is_here: bool,
    /// Where it is there, it is faster than the next lower one, and is taken without being asked for.
    pub is_fast: bool,
    pub level: Level,
}

/// Every level of this kind of processor, best first.
#[cfg(target_arch = "x86_64")]
pub fn levels() -> [KnownLevel; 7] {
    let known = |name, is_here, level| KnownLevel { name, is_here, is_fast: true, level };
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
    let bf16 = avx512 && is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512bf16");
    [
        known("amx", bf16 && super::matmul::amx::available(), Level::Amx),
        // Measured: twice the products of fused multiply-adds on Zen 4, half of them on Sapphire Rapids.
        KnownLevel { is_fast: is_amd(), ..known("avx512bf16", bf16, Level::Avx512Bf16) },
        known("avx512vnni", avx512 && is_x86_feature_detected!("avx512vnni"), Level::Avx512Vnni),
        known("avx512", avx512, Level::Avx512),
        known("avx2vnni", avx2 && is_x86_feature_detected!("avxvnni"), Level::Avx2Vnni),
        known("avx2", avx2, Level::Avx2),
        known("portable", true, Level::Portable),
    ]
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
}

/// Every level of this kind of processor, best first.
#[cfg(target_arch = "aarch64")]
pub fn levels() -> [KnownLevel; 3] {
    let known = |name, is_here, level| KnownLevel { name, is_here, is_fast: true, level };
    [
        known("neondot", std::arch::is_aarch64_feature_detected!("dotprod"), Level::NeonDot),
        known("neon", true, Level::Neon),
        known("portable", true, Level::Portable),
    ]
}

/// Every level of this kind of processor, best first.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub fn levels() -> [KnownLevel; 1] {
    [KnownLevel { name: "portable", is_here: true, is_fast: true, level: Level::Portable }]
}

/// Lanes of the level in use.
pub fn lanes() -> usize {
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vnni | Level::Avx512Bf16 | Level::Amx => 16,
        _ => 8,
    }
}

/// [`Simd::MR`] of the level in use.
pub fn most_rows() -> usize {
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vnni | Level::Avx512Bf16 | Level::Amx => x86::Avx512::MR,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::Avx2Vnni => x86::Avx2::MR,
        #[cfg(target_arch = "aarch64")]
        Level::Neon | Level::NeonDot => neon::Neon::MR,
        Level::Portable => Portable::MR,
    }
}

/// `dispatch!(kernel::<T>(arg: Type, …))`: runs the generic kernel `kernel::<S, T>` with the best vectors.
///
/// Defines, at the call site, one wrapper per level that carries the target features; types must therefore be concrete. A wrapper and the kernel in
/// it rely on two things: the processor has those features, which `level` has found out, and the arguments are what the kernel asks for.
macro_rules! dispatch {
    ($kernel:ident :: <$($generic:ty),*> ( $($arg:ident : $type:ty),* $(,)? )) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
        unsafe fn avx512vnni($($arg: $type),*) {
            unsafe { $kernel::<$crate::cpu::simd::x86::Avx512Vnni, $($generic),*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
        unsafe fn avx512($($arg: $type),*) {
            unsafe { $kernel::<$crate::cpu::simd::x86::Avx512, $($generic),*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
        unsafe fn avx2vnni($($arg: $type),*) {
            unsafe { $kernel::<$crate::cpu::simd::x86::Avx2Vnni, $($generic),*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2($($arg: $type),*) {
            unsafe { $kernel::<$crate::cpu::simd::x86::Avx2, $($generic),*>($($arg),*) }
        }
        #[cfg(target_arch = "aarch64")]
        #[target_feature(enable = "neon,dotprod")]
        unsafe fn neondot($($arg: $type),*) {
            unsafe { $kernel::<$crate::cpu::simd::neon::NeonDot, $($generic),*>($($arg),*) }
        }
        // SAFETY: `level` has seen the features on this processor.
        unsafe {
            match $crate::cpu::simd::level() {
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Level::Avx512Vnni | $crate::cpu::simd::Level::Avx512Bf16 | $crate::cpu::simd::Level::Amx => avx512vnni($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Level::Avx512 => avx512($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Level::Avx2Vnni => avx2vnni($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::cpu::simd::Level::Avx2 => avx2($($arg),*),
                #[cfg(target_arch = "aarch64")]
                $crate::cpu::simd::Level::NeonDot => neondot($($arg),*),
                // Every processor of this kind has it: no features beyond those of the build.
                #[cfg(target_arch = "aarch64")]
                $crate::cpu::simd::Level::Neon => $kernel::<$crate::cpu::simd::neon::Neon, $($generic),*>($($arg),*),
                $crate::cpu::simd::Level::Portable => $kernel::<$crate::cpu::simd::Portable, $($generic),*>($($arg),*),
            }
        }
    }};
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests;
