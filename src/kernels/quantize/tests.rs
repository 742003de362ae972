use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use proptest::prelude::*;

use super::*;

/// Normal numbers of the given deviation, the same for the same seed; `tail` makes some of them large.
fn normal(len: usize, deviation: f32, tail: f32, seed: u64) -> Vec<f32> {
    let mut state = seed * 2 + 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let mut next = || {
        let sum: f32 = (0..12).map(|_| uniform()).sum();
        (sum - 6.0) * deviation * (1.0 + tail / (uniform() + 0.1))
    };
    (0..len).map(|_| next()).collect()
}

fn rmse(a: &[f32], b: &[f32]) -> f64 {
    (a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / a.len() as f64).sqrt()
}

fn candle(row: &[f32], form: GgmlDType) -> (Vec<u8>, Vec<f32>) {
    let quantized = QTensor::quantize(&Tensor::from_slice(row, row.len(), &Device::Cpu).unwrap(), form).unwrap();
    let bytes = quantized.data().unwrap().into_owned();
    (bytes, quantized.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap())
}

fn half_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn row8_from_ggml(bytes: &[u8]) -> Row8 {
    let mut row = Row8::default();
    for block in bytes.chunks_exact(34) {
        row.scales.push(half_at(block, 0));
        row.values.extend(block[2..].iter().map(|byte| *byte as i8));
    }
    row
}

fn row4_from_ggml(bytes: &[u8]) -> Row4 {
    let mut row = Row4::default();
    for block in bytes.chunks_exact(144) {
        row.d.push(half_at(block, 0));
        row.dmin.push(half_at(block, 2));
        let packed = &block[4..16];
        for j in 0..8 {
            let (scale, min) = if j < 4 {
                (packed[j] & 63, packed[j + 4] & 63)
            } else {
                ((packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4), (packed[j + 4] >> 4) | (packed[j] >> 6 << 4))
            };
            row.scales.push(scale);
            row.mins.push(min);
        }
        for pair in block[16..].chunks_exact(32) {
            row.values.extend(pair.iter().map(|byte| byte & 15));
            row.values.extend(pair.iter().map(|byte| byte >> 4));
        }
    }
    row
}

/// Our reading of the forms is ggml's: the same blocks give the same weights.
#[test]
fn the_forms_are_those_of_ggml() {
    let row = normal(1024, 0.02, 0.2, 1);
    let (bytes, weights) = candle(&row, GgmlDType::Q8_0);
    assert_eq!(row8_from_ggml(&bytes).dequantize(), weights);
    let mut written = vec![0; bytes.len()];
    row8_from_ggml(&bytes).write_ggml(&mut written);
    assert_eq!(written, bytes);
    let (bytes, weights) = candle(&row, GgmlDType::Q4K);
    assert_eq!(row4_from_ggml(&bytes).dequantize(), weights);
    let mut written = vec![0; bytes.len()];
    row4_from_ggml(&bytes).write_ggml(&mut written);
    assert_eq!(written, bytes);
}

/// At 8 bits no worse than candle's encoder, at 4 bits better by a clear margin.
#[test]
fn less_error_than_candle() {
    for (seed, deviation, tail) in [(1, 0.02, 0.0), (2, 0.02, 0.3), (3, 0.002, 0.1), (4, 1.0, 0.0), (5, 0.0002, 0.0)] {
        let row = normal(256 * 64, deviation, tail, seed);
        let (_, theirs) = candle(&row, GgmlDType::Q8_0);
        let (theirs, ours) = (rmse(&row, &theirs), rmse(&row, &row8(&row).unwrap().dequantize()));
        assert!(ours <= theirs * 1.0001, "8-bit, deviation {deviation}: {ours} against {theirs}");
        let (_, theirs) = candle(&row, GgmlDType::Q4K);
        let (theirs, ours) = (rmse(&row, &theirs), rmse(&row, &row4(&row).unwrap().dequantize()));
        println!("deviation {deviation}, tail {tail}: 4-bit error {ours:.3e}, candle's {theirs:.3e}, ratio {:.4}", ours / theirs);
        assert!(ours < theirs * 0.96, "4-bit, deviation {deviation}: {ours} against {theirs}");
    }
}

#[test]
fn constants_are_kept() {
    for constant in [0.0f32, 1.0, -1.0, 0.03125, -3.0] {
        let row = vec![constant; 512];
        for weight in row8(&row).unwrap().dequantize().into_iter().chain(row4(&row).unwrap().dequantize()) {
            assert!((weight - constant).abs() <= constant.abs() * 0.001, "{constant} became {weight}");
        }
    }
}

#[test]
fn what_is_no_number_is_refused_with_its_place() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
        let mut row = normal(1024, 0.02, 0.0, 1);
        row[700] = bad;
        assert_eq!(row8(&row), Err(Unquantizable { block: 672 }), "{bad}");
        assert_eq!(row4(&row), Err(Unquantizable { block: 512 }), "{bad}");
    }
}

#[test]
fn wide_vectors_change_nothing() {
    let row = normal(256, 0.02, 0.2, 7);
    let weights: &[f32; SUPER_BLOCK] = row.as_slice().try_into().unwrap();
    let mut plain = Block4 { values: [0; SUPER_BLOCK], scales: [0.0; GROUPS], mins: [0.0; GROUPS], d: f16::ZERO, dmin: f16::ZERO };
    Encode4 { weights, block: &mut plain }.run();
    let wide = row4(&row).unwrap();
    assert_eq!((plain.values.to_vec(), plain.d, plain.dmin), (wide.values, wide.d[0], wide.dmin[0]));
}

proptest! {
    /// Whatever the weights, numbers stay in their ranges, and the error within the coarsest step.
    #[test]
    fn numbers_stay_in_their_ranges(
        seed in 1u64..1 << 40,
        exponent in -12i32..6,
        shift in -2f32..2.0,
        tail in 0f32..3.0,
        zeros in 0usize..256,
    ) {
        let deviation = 2f32.powi(exponent);
        let mut row = normal(512, deviation, tail, seed);
        row.iter_mut().for_each(|weight| *weight += shift * deviation);
        row[256..256 + zeros].fill(0.0);
        let eight = row8(&row).unwrap();
        prop_assert!(eight.values.iter().all(|q| *q >= -127) && eight.values.len() == 512 && eight.scales.len() == 16);
        for (block, (weights, read)) in row.chunks(BLOCK).zip(eight.dequantize().chunks(BLOCK)).enumerate() {
            let step = eight.scales[block].to_f32();
            prop_assert!(weights.iter().zip(read).all(|(a, b)| (a - b).abs() <= step * 0.505), "block {block}: {weights:?} {read:?}");
        }
        let four = row4(&row).unwrap();
        prop_assert!(four.values.iter().all(|q| *q < 16) && four.scales.iter().chain(&four.mins).all(|s| *s < 64));
        prop_assert_eq!((four.values.len(), four.scales.len(), four.mins.len(), four.d.len(), four.dmin.len()), (512, 16, 16, 2, 2));
        for (weights, read) in row.chunks(SUPER_BLOCK).zip(four.dequantize().chunks(SUPER_BLOCK)) {
            let low = weights.iter().fold(0f32, |a, b| a.min(*b));
            let range = weights.iter().fold(0f32, |a, b| a.max(*b)) - low;
            prop_assert!(weights.iter().zip(read).all(|(a, b)| (a - b).abs() <= range * 0.15), "{weights:?} {read:?}");
        }
    }

    /// Buffers of another row's size and content do not matter.
    #[test]
    fn buffers_are_reused(seed in 1u64..1 << 40, first in 1usize..4, second in 1usize..4) {
        let (a, b) = (normal(256 * first, 0.02, 0.1, seed), normal(256 * second, 0.5, 0.1, seed + 1));
        let mut eight = row8(&a).unwrap();
        row8_into(&b, &mut eight.values, &mut eight.scales).unwrap();
        prop_assert_eq!(eight, row8(&b).unwrap());
        let mut four = row4(&a).unwrap();
        row4_into(&b, &mut four.values, &mut four.scales, &mut four.mins, &mut four.d, &mut four.dmin).unwrap();
        prop_assert_eq!(four, row4(&b).unwrap());
    }
}
