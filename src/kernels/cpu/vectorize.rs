//! Plain loops compiled for the vectors this processor has, so that the compiler's own vectorization reaches further than the portable
//! build's baseline.

/// Code to be compiled once for each kind of vectors. Its `run` must be `#[inline(always)]`, and so must what it calls.
pub trait Vectorize {
    type Output;
    fn run(self) -> Self::Output;
}

/// Runs `code` with AVX2 where there is AVX2. Nothing is reordered or fused by it: the result is the same to the bit.
pub fn vectorize<T: Vectorize>(code: T) -> T::Output {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { with_avx2(code) };
    }
    code.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<T: Vectorize>(code: T) -> T::Output {
    code.run()
}
