//! Products in every form of weights, by both kernels, against the CPU's rows of the same matrix multiplied in f64.

use super::{Cuda, Dice, in_every_order, memory};
use crate::cuda::backend::{Choices, Dtype};
use crate::cuda::emulator::{Emulator, Memory};
use crate::cuda::functions::{Ending, F32, Product, Rows};
use crate::testing::{TestMatrix, plain_attention, read, write};
use crate::twin_tests::{assert_close, cpu};
use crate::*;

/// What the matrix holds in this format, as the CPU reads it.
fn rows_of(matrix: &TestMatrix, format: WeightFormat) -> Vec<Vec<f32>> {
    let twin = cpu(1, matrix.width, &[plain_attention(1, 1, 2)], 16, 1);
    let packed = matrix.load(&twin, Some(format), Columns::Plain);
    let row = |i| {
        let mut row = vec![0.0; matrix.width];
        packed.row(i, &mut row);
        row
    };
    (0..matrix.rows).map(row).collect()
}

fn dot(weights: &[f32], x: &[f32]) -> f64 {
    weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
}

const FORMATS: [WeightFormat; 4] = [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Int8, WeightFormat::Int4];

fn product(emulator: &'static Emulator, dice: &mut Dice, dtype: Dtype, on_tensor_cores: bool) {
    let format = if on_tensor_cores { dice.one_of(&FORMATS[1..]) } else { dice.one_of(&FORMATS) };
    let k = match format {
        WeightFormat::Int4 => 256 * dice.between(1, 2),
        WeightFormat::Int8 => 32 * dice.between(1, 9),
        _ if on_tensor_cores => 8 * dice.between(1, 30),
        _ => dice.one_of(&[1, 7, 8, 40, 100, 264]),
    };
    let (m, n) = (if on_tensor_cores { dice.between(1, 140) } else { dice.between(1, 19) }, dice.between(1, 140));
    let (x, bias) = (dice.numbers(m * k), dice.numbers(n));
    let matrix = TestMatrix::new(dice.numbers(n * k), k);
    let mut ours = Cuda::new(emulator, dtype);
    ours.choices =
        Choices { gemv_rows: if on_tensor_cores { 0 } else { usize::MAX }, large_tiles: Some(dice.flip()), ..Choices::default() };
    let weight = matrix.load(&ours, Some(format), Columns::Plain);
    assert_eq!(weight.bytes(), Cuda::weight_bytes(n, k, false, Some(format), Columns::Plain).1);
    let (input, bias_memory) = (memory(emulator, dtype, &x, c"x"), Memory::of(emulator, &bias, c"bias"));
    let out = Memory::new(emulator, m * n * 4, c"out");
    let product = Product {
        x: input.ptr(),
        w: weight.matrix(),
        of_experts: std::ptr::null(),
        biases: std::ptr::null(),
        bias: if dice.flip() { bias_memory.ptr() } else { std::ptr::null() },
        rows: Rows::dense(m, k, n),
        epilogue: Ending { ending: 0, activation: 0, factor: 1.0 },
        out: out.ptr_mut(),
        experts: 0,
    };
    ours.product(&product, weight.form(), F32).unwrap();
    let held = rows_of(&matrix, format);
    // Tensor cores take weights of 8 and 4 bits rounded to bf16: half a unit of 2^-8 each, in random directions.
    let rounded = on_tensor_cores && matches!(format, WeightFormat::Int8 | WeightFormat::Int4);
    let tolerance = if rounded { 2e-3 * (k as f64).sqrt() } else { 2e-5 * (k as f64).sqrt() };
    for (i, got) in out.read::<f32>(m * n).into_iter().enumerate() {
        let wanted = dot(&held[i % n], &x[i / n * k..][..k]) + if product.bias.is_null() { 0.0 } else { f64::from(bias[i % n]) };
        assert!((f64::from(got) - wanted).abs() <= tolerance, "[{m}, {k}] · [{n}, {k}] {format:?}, value {i}: {got} {wanted}");
    }
}

#[test]
fn of_few_rows() {
    in_every_order(0..12, |emulator, dice| {
        let dtype = dice.one_of(&[Dtype::F32, Dtype::Bf16]);
        product(emulator, dice, dtype, false);
    });
}

#[test]
fn of_many_rows_on_tensor_cores() {
    in_every_order(0..8, |emulator, dice| product(emulator, dice, Dtype::Bf16, true));
}

/// Every epilogue at the end of both kernels, the output in bf16.
#[test]
fn with_every_ending() {
    in_every_order(0..6, |emulator, dice| {
        let (m, n, k) = (dice.between(1, 20), 2 * dice.between(1, 40), 8 * dice.between(1, 8));
        let (x, before, bias) = (dice.numbers(m * k), dice.numbers(m * n), dice.numbers(n));
        let matrix = TestMatrix::new(dice.numbers(n * k).into_iter().map(|x| x * 0.25).collect(), k);
        let activation = dice.one_of(&[Activation::Silu, Activation::GeluTanh, Activation::Relu2, Activation::Gelu, Activation::Tanh]);
        for epilogue in [Epilogue::Store, Epilogue::Add(0.5), Epilogue::Activate(activation), Epilogue::Gated(activation)] {
            let columns = if matches!(epilogue, Epilogue::Gated(_)) { Columns::Gated } else { Columns::Plain };
            let mut twin = cpu(m.max(64), k.max(n), &[plain_attention(1, 1, 2)], 16, 1);
            let linear = matrix.linear(&twin, columns, Some(&bias));
            let (input, mut wanted) = (write(&mut twin, &x, k), write(&mut twin, &before, n));
            twin.linear(&input, &linear, epilogue, &mut wanted).unwrap();
            let wanted = read(&mut twin, &mut wanted);
            for gemv_rows in [0, usize::MAX] {
                let mut ours = Cuda::new(emulator, Dtype::Bf16);
                ours.choices = Choices { gemv_rows, large_tiles: Some(dice.flip()), ..Choices::default() };
                let linear = matrix.linear(&ours, columns, Some(&bias));
                let (input, mut out) = (write(&mut ours, &x, k), write(&mut ours, &before, n));
                ours.linear(&input, &linear, epilogue, &mut out).unwrap();
                assert_close(&read(&mut ours, &mut out), &wanted, 0.006, &format!("{epilogue:?}"));
            }
        }
    });
}

/// Experts of 8 and 4 bits, by both kernels, in bf16.
#[test]
fn of_experts() {
    in_every_order(0..4, |emulator, dice| {
        let (t, count, top_k) = (dice.between(1, 24), dice.between(2, 5), 2);
        let format = dice.one_of(&[WeightFormat::Bf16, WeightFormat::Int8, WeightFormat::Int4]);
        let (hidden, inner) = if format == WeightFormat::Int4 { (256, 256) } else { (64, 32) };
        let (x, logits) = (dice.numbers(t * hidden), dice.numbers(t * count));
        let matrices: Vec<_> = (0..count)
            .map(|_| {
                let mut matrix =
                    |rows: usize, width: usize| TestMatrix::new(dice.numbers(rows * width).into_iter().map(|x| x * 0.1).collect(), width);
                (matrix(2 * inner, hidden), matrix(hidden, inner))
            })
            .collect();
        let routing = RoutingSpec { experts: count, top_k, score: RouterScore::Softmax, normalize: None, scale: 1.0, groups: None };
        fn all<B: Backend>(backend: &B, matrices: &[(TestMatrix, TestMatrix)], format: WeightFormat) -> Vec<Expert<B::Weight, B::Vector>> {
            let linear = |matrix: &TestMatrix, columns| Linear { weight: matrix.load(backend, Some(format), columns), bias: None };
            matrices
                .iter()
                .map(|(gate_up, down)| Expert { gate_up: linear(gate_up, Columns::Gated), down: linear(down, Columns::Plain) })
                .collect()
        }
        // The twin multiplies the same weights in f32.
        let held: Vec<_> = matrices
            .iter()
            .map(|(gate_up, down)| {
                let of = |matrix: &TestMatrix| TestMatrix::new(rows_of(matrix, format).concat(), matrix.width);
                (of(gate_up), of(down))
            })
            .collect();
        let limits = StepLimits {
            experts: Some(ExpertLimits { hidden, intermediate: inner, experts: count, top_k }),
            ..crate::twin_tests::limits_of(t, 512)
        };
        let mut twin = crate::cpu::Cpu::new(&limits, 1, ComputeDtype::F32).unwrap();
        let experts = Experts { routing, choice_bias: None, activation: Activation::Silu, experts: all(&twin, &held, WeightFormat::F32) };
        let (input, router) = (write(&mut twin, &x, hidden), write(&mut twin, &logits, count));
        let mut wanted = twin.buffer(t, hidden).unwrap();
        twin.experts(&input, &router, &experts, Epilogue::Store, &mut wanted).unwrap();
        let wanted = read(&mut twin, &mut wanted);
        for gemv_rows in [0, usize::MAX] {
            let mut ours = Cuda::new(emulator, Dtype::Bf16);
            ours.choices = Choices { gemv_rows, large_tiles: Some(dice.flip()), ..Choices::default() };
            let experts = Experts { routing, choice_bias: None, activation: Activation::Silu, experts: all(&ours, &matrices, format) };
            let (input, router) = (write(&mut ours, &x, hidden), write(&mut ours, &logits, count));
            let mut out = ours.buffer(t, hidden).unwrap();
            ours.experts(&input, &router, &experts, Epilogue::Store, &mut out).unwrap();
            assert_close(&read(&mut ours, &mut out), &wanted, 0.02, "experts");
        }
    });
}
