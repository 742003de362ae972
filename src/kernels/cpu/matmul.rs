//! `out [m, n] = x [m, k] · w [n, k]ᵀ`, both row-major: every output is one dot product of two contiguous rows.
//!
//! Each dot product is summed by one vector accumulator in order of k, then across its lanes: the same order however many rows there
//! are, so a row's result does not depend on what else is in the step. Registers hold a tile of `MR × NR` accumulators.
//! With one row the kernel streams the weights (memory-bound); with many, a tile of weights is widened to f32 once and reused by all rows.

use rayon::prelude::*;

use super::simd::{Simd, Weight, dispatch};
use super::{Ptr, PtrMut};

/// Rows of weights one task works on: small enough to balance two cores, large enough that a task costs far more than waking a thread.
const TASK_ROWS: usize = 64;
/// Below so many multiply-adds the work is not worth a second thread.
const SERIAL_WORK: usize = 32 * 1024;
const CACHE_LINE: usize = 64;
/// From so many rows of x on, weights are widened once per tile.
const WIDEN_ROWS: usize = 6;

/// `w` is `[n, k]`; see the module.
pub fn matmul_f32(x: &[f32], w: &[f32], out: &mut [f32], k: usize) {
    drive(Shape::of(x, w.len(), out, k), &|shape, from, to| {
        let (x, w, out) = (Ptr(x.as_ptr()), Ptr(w.as_ptr()), shape.out);
        dispatch!(columns::<f32>(x: Ptr<f32>, w: Ptr<f32>, out: PtrMut<f32>, shape: Shape, from: usize, to: usize));
    });
}

/// The same with weights in bf16; identical numbers to widening them first.
pub fn matmul_bf16(x: &[f32], w: &[half::bf16], out: &mut [f32], k: usize) {
    drive(Shape::of(x, w.len(), out, k), &|shape, from, to| {
        let (x, w, out) = (Ptr(x.as_ptr()), Ptr(w.as_ptr()), shape.out);
        dispatch!(columns::<half::bf16>(x: Ptr<f32>, w: Ptr<half::bf16>, out: PtrMut<f32>, shape: Shape, from: usize, to: usize));
    });
}

/// `[m, k] · [n, k]ᵀ → [m, n]`, checked against the slices.
#[derive(Clone, Copy)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    out: PtrMut<f32>,
}

impl Shape {
    fn of(x: &[f32], weights: usize, out: &mut [f32], k: usize) -> Self {
        assert!(
            k > 0 && x.len().is_multiple_of(k) && weights.is_multiple_of(k),
            "matmul: x of {} and w of {weights} values in rows of {k}",
            x.len()
        );
        let (m, n) = (x.len() / k, weights / k);
        assert_eq!(out.len(), m * n, "matmul: output of [{m}, {n}]");
        Self { m, n, k, out: PtrMut(out.as_mut_ptr()) }
    }
}

/// Shares the columns of the output among the threads.
fn drive(shape: Shape, columns: &(dyn Fn(Shape, usize, usize) + Sync)) {
    let n = shape.n;
    if shape.m * n * shape.k <= SERIAL_WORK {
        return columns(shape, 0, n);
    }
    (0..n.div_ceil(TASK_ROWS)).into_par_iter().for_each(|task| columns(shape, task * TASK_ROWS, n.min((task + 1) * TASK_ROWS)));
}

/// Output columns `from..to`.
///
/// # Safety
/// Pointers are valid for their shapes, and no other thread writes these columns.
#[inline(always)]
unsafe fn columns<S: Simd, W: Weight>(x: Ptr<f32>, w: Ptr<W>, out: PtrMut<f32>, shape: Shape, from: usize, to: usize) {
    let Shape { m, k, .. } = shape;
    unsafe {
        let mut scratch: Vec<f32> = Vec::new();
        let mut column = from;
        while column < to {
            let width = S::NR.min(to - column);
            let tile = w.0.add(column * k);
            if m >= WIDEN_ROWS && size_of::<W>() != size_of::<f32>() {
                scratch.clear();
                scratch.extend((0..width * k).map(|i| (*tile.add(i)).widen()));
                rows::<S, f32>(x.0, scratch.as_ptr(), out.0.add(column), shape, width);
            } else {
                rows::<S, W>(x.0, tile, out.0.add(column), shape, width);
            }
            column += width;
        }
    }
}

/// All rows of x against `width` rows of w.
#[inline(always)]
unsafe fn rows<S: Simd, W: Weight>(x: *const f32, w: *const W, out: *mut f32, shape: Shape, width: usize) {
    let Shape { m, n, k, .. } = shape;
    unsafe {
        let mut row = 0;
        while row < m {
            let (x, out) = (x.add(row * k), out.add(row * n));
            match (width, m - row) {
                (8, 3..) => tile::<S, W, 3, 8>(x, w, out, n, k),
                (8, 2) => tile::<S, W, 2, 8>(x, w, out, n, k),
                (8, _) => tile::<S, W, 1, 8>(x, w, out, n, k),
                (4, 3..) => tile::<S, W, 3, 4>(x, w, out, n, k),
                (4, 2) => tile::<S, W, 2, 4>(x, w, out, n, k),
                (4, _) => tile::<S, W, 1, 4>(x, w, out, n, k),
                _ => {
                    for column in 0..width {
                        tile::<S, W, 1, 1>(x, w.add(column * k), out.add(column), n, k);
                    }
                }
            }
            row += if width == 8 || width == 4 { 3.min(m - row) } else { 1 };
        }
    }
}

/// `MR × NR` dot products at once.
#[inline(always)]
unsafe fn tile<S: Simd, W: Weight, const MR: usize, const NR: usize>(x: *const f32, w: *const W, out: *mut f32, n: usize, k: usize) {
    unsafe {
        let mut acc = [[S::zero(); NR]; MR];
        let whole = k - k % S::LANES;
        let line = CACHE_LINE / size_of::<W>();
        let mut i = 0;
        while i < whole {
            let mut xs = [S::zero(); MR];
            for r in 0..MR {
                xs[r] = S::load(x.add(r * k + i));
            }
            for c in 0..NR {
                // The hardware follows rows of a few kilobytes badly: ask for the next tile's while this one is computed.
                if MR == 1 && i % line == 0 {
                    S::prefetch(w.wrapping_add((NR + c) * k + i));
                }
                let ws = W::load::<S>(w.add(c * k + i));
                for r in 0..MR {
                    acc[r][c] = S::mul_add(xs[r], ws, acc[r][c]);
                }
            }
            i += S::LANES;
        }
        for (r, acc) in acc.iter().enumerate() {
            for (c, acc) in acc.iter().enumerate() {
                let mut sum = S::sum(*acc);
                for i in whole..k {
                    sum += *x.add(r * k + i) * (*w.add(c * k + i)).widen();
                }
                *out.add(r * n + c) = sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..n)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
            })
            .collect()
    }

    fn reference(x: &[f32], w: &[f32], m: usize, n: usize, k: usize) -> Vec<f64> {
        let dot = |r: usize, c: usize| (0..k).map(|i| f64::from(x[r * k + i]) * f64::from(w[c * k + i])).sum();
        (0..m * n).map(|i| dot(i / n, i % n)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn equals_the_plain_sum_and_each_row_is_independent(m in 1usize..14, n in 1usize..150, k in 1usize..90, seed in any::<u64>()) {
            let (x, w) = (values(m * k, seed), values(n * k, seed ^ 7));
            let w16: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
            let w: Vec<f32> = w16.iter().map(|v| v.to_f32()).collect();
            let expected = reference(&x, &w, m, n, k);
            let (mut out, mut out16) = (vec![0f32; m * n], vec![0f32; m * n]);
            matmul_f32(&x, &w, &mut out, k);
            matmul_bf16(&x, &w16, &mut out16, k);
            for (got, want) in out.iter().zip(&expected) {
                prop_assert!((f64::from(*got) - want).abs() < 1e-4, "{got} {want}");
            }
            prop_assert_eq!(&out, &out16);
            for row in 0..m {
                let mut alone = vec![0f32; n];
                matmul_bf16(&x[row * k..(row + 1) * k], &w16, &mut alone, k);
                prop_assert_eq!(&alone[..], &out[row * n..(row + 1) * n]);
            }
        }
    }
}
