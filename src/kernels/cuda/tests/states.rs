//! Operations with a state, and those of latent attention, by the bodies of [`crate::twin_tests`].

use super::{Cuda, Dice, in_every_order};
use crate::cpu::Cpu;
use crate::cuda::backend::{Choices, Dtype, State};
use crate::cuda::emulator::{Emulator, Memory};
use crate::testing::write;
use crate::twin_tests::{StateStep, TEXT, assert_close, convolved_on, delta_on, latent_on, limits_of, state_steps};
use crate::*;

/// Results and states after a text in one piece, in chunks with states kept in between, and with sequences that change their slots.
fn through_steps(
    dice: &mut Dice,
    tolerance: f32,
    mut twin: impl FnMut(&[StateStep]) -> (Vec<f32>, Vec<f32>),
    mut ours: impl FnMut(&[StateStep]) -> (Vec<f32>, Vec<f32>),
) {
    let cuts: Vec<usize> = (0..dice.below(5)).map(|_| dice.between(1, TEXT - 1)).collect();
    // Drafts behind a state that is still needed when the first of them is kept.
    let drafts = vec![StateStep::row(0, 20, &[]), StateStep::row(20, 4, &[(1, 5), (2, 6)])];
    for steps in state_steps(&cuts, (dice.below(TEXT), dice.below(TEXT))).into_iter().chain([drafts]) {
        let (wanted, states) = twin(&steps);
        let (got, kept) = ours(&steps);
        assert_close(&got, &wanted, tolerance, "results");
        assert_close(&kept, &states, tolerance, "behind every slot");
    }
}

#[test]
fn convolutions() {
    in_every_order(0..6, |emulator, dice| {
        let kind = if dice.flip() { ConvKind::Gated } else { ConvKind::Silu };
        let spec = ConvSpec { channels: dice.one_of(&[1, 12, 70, 160]), kernel: dice.between(2, 6), kind };
        let (bias, seed) = (dice.flip(), dice.0);
        let (dtype, tolerance) = dice.one_of(&[(Dtype::F32, 2e-5), (Dtype::Bf16, 0.02)]);
        through_steps(
            dice,
            tolerance,
            |steps| {
                convolved_on(&mut Cpu::new(&limits_of(TEXT, spec.input_width()), 1, ComputeDtype::F32).unwrap(), spec, bias, steps, seed)
            },
            |steps| convolved_on(&mut Cuda::new(emulator, dtype), spec, bias, steps, seed),
        );
    });
}

fn delta(emulator: &'static Emulator, dice: &mut Dice, spec: DeltaSpec, dtype: Dtype, tolerance: f32) {
    let seed = dice.0;
    through_steps(
        dice,
        tolerance,
        |steps| delta_on(&mut Cpu::new(&limits_of(TEXT, spec.qkv_width()), 1, ComputeDtype::F32).unwrap(), spec, steps, seed),
        |steps| delta_on(&mut Cuda::new(emulator, dtype), spec, steps, seed),
    );
}

/// Values of up to 32 columns are one block's; of more they are several blocks' where there are many tokens.
#[test]
fn delta_rules() {
    in_every_order(0..6, |emulator, dice| {
        let (key_heads, group) = (dice.between(1, 2), dice.between(1, 2));
        let (key_dim, value_dim) = (dice.one_of(&[1, 5, 16, 32, 33]), dice.one_of(&[1, 8, 20, 40]));
        let spec = DeltaSpec { key_heads, value_heads: key_heads * group, key_dim, value_dim, eps: 1e-5 };
        delta(emulator, dice, spec, Dtype::F32, 1e-3);
    });
    // As models have them.
    in_every_order(0..1, |emulator, dice| {
        for (key_dim, value_dim) in [(128, 40), (200, 12)] {
            delta(emulator, dice, DeltaSpec { key_heads: 1, value_heads: 2, key_dim, value_dim, eps: 1e-6 }, Dtype::F32, 1e-3);
        }
        // Norms of heads that are nearly 0 make much of what bf16 rounds away.
        delta(emulator, dice, DeltaSpec { key_heads: 1, value_heads: 2, key_dim: 40, value_dim: 40, eps: 0.1 }, Dtype::Bf16, 0.06);
    });
}

#[test]
fn latent_rows_and_products_of_heads() {
    in_every_order(0..6, |emulator, dice| {
        let (heads, t) = (dice.between(1, 4), dice.between(1, 20));
        let spec = if dice.flip() {
            LatentSpec { heads, nope_dim: dice.between(1, 20), rope_dim: 2 * dice.between(1, 5), rank: dice.between(1, 29), eps: 1e-6 }
        } else {
            // Whole vectors everywhere: by tensor cores, too.
            LatentSpec { heads, nope_dim: 8 * dice.between(1, 3), rope_dim: 8, rank: 8 * dice.between(1, 9), eps: 1e-6 }
        };
        let seed = dice.0;
        let theirs = latent_on(&mut Cpu::new(&limits_of(t, 512), 1, ComputeDtype::F32).unwrap(), spec, t, seed);
        for (dtype, gemv_rows, tolerance) in [(Dtype::F32, 8, 2e-5), (Dtype::Bf16, 0, 0.03), (Dtype::Bf16, usize::MAX, 0.03)] {
            let mut ours = Cuda::new(emulator, dtype);
            ours.choices = Choices { gemv_rows, ..Choices::default() };
            let ours = latent_on(&mut ours, spec, t, seed);
            assert_close(&ours[0], &theirs[0], tolerance, "absorbed");
            assert_close(&ours[1], &theirs[1], tolerance, "rows");
        }
    });
}

/// What does not belong together is refused before a launch.
#[test]
fn slots_outside_the_states_are_refused() {
    in_every_order(0..1, |emulator, _| {
        let mut ours = Cuda::new(emulator, Dtype::F32);
        let mut state = ours.state(2, 8).unwrap();
        let row = BatchRow { start: 0, len: 1, context: 1, blocks: std::sync::Arc::new(vec![0]) };
        let begin = |ours: &mut Cuda, state: &mut State<Memory>, states: &StepStates| {
            let batch =
                Batch { tokens: &[0], positions: &[0], slots: &[0], types: &[], rows: std::slice::from_ref(&row), ropes: &[], states };
            ours.begin(&batch).unwrap();
            ours.copy_states(state)
        };
        let of = |copies: &[(u32, u32)], slots: &[u32], save: u32| StepStates {
            copies: copies.to_vec(),
            slots: slots.to_vec(),
            saves: vec![StateSave { token: 0, slot: save }],
        };
        begin(&mut ours, &mut state, &of(&[(0, 1)], &[0], 1)).unwrap();
        for states in [of(&[(0, 2)], &[0], 0), of(&[], &[2], 0), of(&[], &[0], 2), StepStates::default()] {
            assert!(begin(&mut ours, &mut state, &states).is_err(), "{states:?}");
        }
        let x = write(&mut ours, &[1.0; 4], 4);
        begin(&mut ours, &mut state, &of(&[], &[0], 0)).unwrap();
        let mut out = ours.buffer(1, 4).unwrap();
        let spec = ConvSpec { channels: 4, kernel: 4, kind: ConvKind::Silu };
        let conv = CausalConv { spec, weight: ours.vector(vec![1.0; 16]).unwrap(), bias: None };
        assert!(ours.causal_conv(&x, &conv, &mut state, &mut out).is_err(), "states of another width");
    });
}
