//! Every form against the plain sum over its own numbers, and to the bit against each row alone.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::Activation;
use crate::cpu::packed::Row;

fn numbers(n: usize, seed: u64) -> Vec<f32> {
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

/// A matrix of any numbers that the form can hold.
fn random(n: usize, k: usize, format: WeightFormat, columns: Columns, seed: u64) -> Packed {
    let fill = |row: usize, (): &mut (), out: &mut Row| {
        let numbers = numbers(k, seed ^ (row as u64 + 1));
        let pick = |i: usize, below: f32| ((numbers[i] + 0.5) * below) as u8;
        out.f32 = numbers.clone();
        out.bf16 = numbers.iter().map(|x| bf16::from_f32(*x)).collect();
        out.int8 = numbers.iter().map(|x| (x * 254.0) as i8).collect();
        out.scales8 = (0..k / BLOCK).map(|i| f16::from_f32(numbers[i] / 100.0)).collect();
        out.int4 = (0..k).map(|i| pick(i, 16.0)).collect();
        out.scales4 = (0..k / BLOCK).map(|i| pick(i, 64.0)).collect();
        out.mins4 = (0..k / BLOCK).map(|i| pick(i + 1, 64.0)).collect();
        out.d = (0..k / SUPER).map(|i| f16::from_f32(numbers[i] / 300.0)).collect();
        out.dmin = (0..k / SUPER).map(|i| f16::from_f32(numbers[i + 1] / 30.0)).collect();
    };
    Packed::new(n, k, format, columns, &fill).unwrap()
}

/// What activations become for weights of few bits.
fn rounded(x: &[f32]) -> Vec<f64> {
    let block = |x: &[f32]| {
        let greatest = x.iter().fold(0f32, |most, x| most.max(x.abs()));
        let inverse = if greatest > 0.0 { 127.0 / greatest } else { 0.0 };
        x.iter().map(|x| f64::from((x * inverse).round_ties_even()) * f64::from(greatest / 127.0)).collect::<Vec<_>>()
    };
    x.chunks(BLOCK).flat_map(block).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn equals_the_plain_sum_and_each_row_is_independent(
        m in 1usize..40, n in 1usize..120, width in 1usize..90, form in 0usize..5, threads in 1usize..4, seed in any::<u64>(),
    ) {
        let dtype = if form == 4 { ComputeDtype::Bf16 } else { ComputeDtype::F32 };
        let forms = [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Int8, WeightFormat::Int4, WeightFormat::Bf16];
        let (form, k) = (forms[form], [width, width, (width % 9 + 1) * BLOCK, (width % 3 + 1) * SUPER, width][form]);
        let w = random(n, k, form, Columns::Plain, seed);
        let x = numbers(m * k, seed ^ 99);
        let bias = numbers(n, seed ^ 5);
        let (mut pool, mut scratch) = (Pool::new(threads).unwrap(), Scratch::with_capacity(0, dtype));
        let mut out = vec![1f32; m * n];
        matmul(&mut pool, &x, &w, Some(&bias), Epilogue::Add(1.0), &mut scratch, &mut out);
        let mut row = vec![0f32; k];
        for column in 0..n {
            w.row(column, &mut row);
            for r in 0..m {
                let x = &x[r * k..(r + 1) * k];
                let x: Vec<f64> = match form {
                    WeightFormat::Int8 | WeightFormat::Int4 => rounded(x),
                    WeightFormat::Bf16 if dtype == ComputeDtype::Bf16 && has_bf16() => x.iter().map(|x| bf16::from_f32(*x).to_f64()).collect(),
                    _ => x.iter().map(|x| f64::from(*x)).collect(),
                };
                let sum: f64 = x.iter().zip(&row).map(|(x, w)| x * f64::from(*w)).sum();
                let want = 1.0 + f64::from(bias[column]) + sum;
                let got = f64::from(out[r * n + column]);
                prop_assert!((got - want).abs() < 1e-4 * (1.0 + want.abs()), "{form:?} [{m}, {n}, {k}] at {r}, {column}: {got} {want}");
            }
        }
        for r in 0..m {
            let mut alone = vec![1f32; n];
            matmul(&mut pool, &x[r * k..(r + 1) * k], &w, Some(&bias), Epilogue::Add(1.0), &mut scratch, &mut alone);
            prop_assert_eq!(&alone[..], &out[r * n..(r + 1) * n]);
        }
    }

    #[test]
    fn gates(m in 1usize..30, half in 1usize..70, form in 0usize..5, seed in any::<u64>()) {
        let dtype = if form == 4 { ComputeDtype::Bf16 } else { ComputeDtype::F32 };
        let (form, k) = [(WeightFormat::F32, 33), (WeightFormat::Bf16, 70), (WeightFormat::Int8, BLOCK), (WeightFormat::Int4, SUPER), (WeightFormat::Bf16, 70)][form];
        let (gated, plain) = (random(2 * half, k, form, Columns::Gated, seed), random(2 * half, k, form, Columns::Plain, seed));
        let x = numbers(m * k, seed ^ 3);
        let bias = numbers(2 * half, seed ^ 6);
        let (mut pool, mut scratch) = (Pool::new(2).unwrap(), Scratch::with_capacity(0, dtype));
        let (mut out, mut both) = (vec![0f32; m * half], vec![0f32; m * 2 * half]);
        matmul(&mut pool, &x, &gated, Some(&bias), Epilogue::Gated(Activation::Silu), &mut scratch, &mut out);
        matmul(&mut pool, &x, &plain, Some(&bias), Epilogue::Store, &mut scratch, &mut both);
        for (out, both) in out.chunks_exact(half).zip(both.chunks_exact(2 * half)) {
            for i in 0..half {
                let want = both[i] / (1.0 + (-both[i]).exp()) * both[half + i];
                prop_assert!((out[i] - want).abs() < 1e-5 * (1.0 + want.abs()), "{} {want}", out[i]);
            }
        }
    }
}

/// Every remainder: rows of the last tile, what k leaves of a step, columns of the last panel, and numbers that bf16 cannot hold.
#[test]
fn rows_and_steps_left_over() {
    for (m, k, n) in
        [(1, 1, 1), (15, 31, 31), (16, 32, 32), (17, 33, 33), (31, 63, 65), (32, 64, 64), (33, 66, 40), (49, 97, 96), (100, 160, 300)]
    {
        for dtype in [ComputeDtype::F32, ComputeDtype::Bf16] {
            let (w, x) = (random(n, k, WeightFormat::Bf16, Columns::Plain, 7), numbers(m * k, 8));
            let (mut pool, mut scratch) = (Pool::new(2).unwrap(), Scratch::with_capacity(0, dtype));
            let mut out = vec![0f32; m * n];
            matmul(&mut pool, &x, &w, None, Epilogue::Store, &mut scratch, &mut out);
            let rounds = dtype == ComputeDtype::Bf16 && has_bf16();
            let mut row = vec![0f32; k];
            for column in 0..n {
                w.row(column, &mut row);
                for r in 0..m {
                    let term = |i: usize| {
                        let x = x[r * k + i];
                        f64::from(if rounds { bf16::from_f32(x).to_f32() } else { x }) * f64::from(row[i])
                    };
                    let (got, want): (f64, f64) = (out[r * n + column].into(), (0..k).map(term).sum());
                    // Two terms of bf16 leave 2^-18 of an activation; f32 leaves 2^-24 of a sum.
                    let size: f64 = (0..k).map(|i| term(i).abs()).sum();
                    assert!((got - want).abs() <= size * 2f64.powi(-17), "{dtype:?} [{m}, {n}, {k}] at {r}, {column}: {got} {want}");
                }
            }
            let mut alone = vec![0f32; n];
            for r in 0..m {
                matmul(&mut pool, &x[r * k..(r + 1) * k], &w, None, Epilogue::Store, &mut scratch, &mut alone);
                assert_eq!(alone, out[r * n..(r + 1) * n], "{dtype:?} [{m}, {n}, {k}] row {r}");
            }
        }
    }
}
