//! The greatest logit and the draw, against what the CPU's sampler has drawn (`sampled.txt`, recorded by `src/models/sample/recorded_tests.rs`).

use super::{Cuda, Dtype, in_every_order};
use crate::cuda::device::{Device, bytes_of};
use crate::cuda::emulator::{Emulator, Memory};
use crate::cuda::functions::{Changes, Logits, Sampling};
use crate::{Backend, RowSampling};

struct Row {
    vocab: usize,
    logits: Vec<f32>,
    changes: bool,
    sampling: Sampling,
    token: i32,
}

fn recorded() -> Vec<Row> {
    let lines = include_str!("sampled.txt").lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let numbers: Vec<f64> = line.split(' ').map(|number| number.parse().unwrap()).collect();
            let (vocab, range, mut state) = (numbers[0] as usize, numbers[2] as f32, numbers[1] as u64);
            let mut logit = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let x = ((state >> 40) as f32 / (1u32 << 24) as f32 * 2.0 - 1.0) * range;
                if numbers[3] == 1.0 { x.round() + 0.0 } else { x }
            };
            let (temperature, top_k) = (numbers[7] as f32, numbers[8] as i32);
            let sampling = Sampling {
                seed: numbers[5] as u64,
                index: numbers[6] as u64,
                inverse_temperature: if temperature < 1e-5 || top_k == 1 { 0.0 } else { 1.0 / temperature },
                min_p: numbers[10] as f32,
                top_p: numbers[9] as f32,
                top_k,
            };
            Row { vocab, logits: (0..vocab).map(|_| logit()).collect(), changes: numbers[4] == 1.0, sampling, token: numbers[11] as i32 }
        })
        .collect()
}

/// `(id, value)` of each kind, for a row with changes; see the recording.
fn changes(vocab: usize) -> [Vec<(i32, f32)>; 4] {
    let id = |n: usize| (n % vocab) as i32;
    let repetition = [0, 2, 9, 7].map(|id| (id, 1.25)).to_vec();
    let penalty = vec![(2, 0.5 * 2.0 + 0.25), (7, 0.5 + 0.25)];
    [vec![(3, 0.0), (5, 0.0)], vec![(id(1), 2.0), (id(4), -1.5)], repetition, penalty]
}

/// The tokens of rows of one vocabulary, after what changes their logits.
fn sample(emulator: &Emulator, rows: &[&Row], masks: Option<&[u32]>, unassigned: &[i32]) -> Vec<i32> {
    let vocab = rows[0].vocab;
    let logits = Memory::of(emulator, &rows.iter().flat_map(|row| row.logits.clone()).collect::<Vec<_>>(), c"logits");
    let (mut all, mut begin) = (Vec::<(i32, f32)>::new(), Vec::new());
    for row in rows {
        for kind in changes(vocab) {
            begin.push(all.len() as i32);
            all.extend(kind.into_iter().filter(|_| row.changes));
        }
        begin.push(all.len() as i32);
    }
    let (all, begin) = (Memory::of(emulator, &all, c"changes"), Memory::of(emulator, &begin, c"where changes begin"));
    let (bits, unassigned_ids) =
        (Memory::of(emulator, masks.unwrap_or(&[]), c"allowed tokens"), Memory::of(emulator, unassigned, c"unassigned"));
    // The first row alone has none.
    let has =
        Memory::of(emulator, &(0..rows.len()).map(|row| i32::from(row > 0 && masks.is_some())).collect::<Vec<_>>(), c"which have masks");
    let (failed, out) = (Memory::new(emulator, rows.len() * 4, c"failed"), Memory::new(emulator, rows.len() * 4, c"tokens"));
    let samplings = Memory::of(emulator, &rows.iter().map(|row| row.sampling).collect::<Vec<_>>(), c"samplings");
    let changes = Changes {
        all: all.ptr(),
        begin: begin.ptr(),
        allowed: bits.ptr(),
        has_allowed: has.ptr(),
        unassigned: unassigned_ids.ptr(),
        unassigned_count: unassigned.len() as i32,
    };
    let of = Logits { values: logits.ptr_mut(), vocab: vocab as i32 };
    let stream = std::ptr::null_mut();
    // SAFETY: pointers and sizes of memory that outlives the launches.
    unsafe {
        emulator.check((emulator.functions.adjust)(stream, of, &changes, failed.ptr_mut(), rows.len() as i32)).unwrap();
        emulator.check((emulator.functions.sample)(stream, of, samplings.ptr(), failed.ptr(), out.ptr_mut(), rows.len() as i32)).unwrap();
    }
    out.read(rows.len())
}

#[test]
fn the_draw_is_that_of_the_cpu() {
    let rows = recorded();
    assert!(rows.len() >= 100);
    in_every_order(0..1, |emulator, _| {
        let mut sizes: Vec<usize> = rows.iter().map(|row| row.vocab).collect();
        sizes.sort_unstable();
        sizes.dedup();
        for vocab in sizes {
            let of: Vec<&Row> = rows.iter().filter(|row| row.vocab == vocab).collect();
            let wanted: Vec<i32> = of.iter().map(|row| row.token).collect();
            assert_eq!(sample(emulator, &of, None, &[]), wanted, "of {vocab}");
        }
    });
}

/// As the product asks for it: logits wider than the vocabulary, ids without a token, rows that want different things.
#[test]
fn the_backend_draws_what_the_cpu_does() {
    let rows = recorded();
    in_every_order(0..1, |emulator, _| {
        for vocab in [33, 257, 1025] {
            let of: Vec<&Row> = rows.iter().filter(|row| row.vocab == vocab).collect();
            let mut backend = Cuda::new(emulator, Dtype::Bf16);
            let mut logits = backend.logits_buffer(of.len(), vocab + 3).unwrap();
            let values: Vec<f32> = of.iter().flat_map(|row| row.logits.iter().copied().chain([99.0; 3])).collect();
            backend.device.write(&logits.memory, bytes_of(&values)).unwrap();
            let sampling = |row: &&Row| {
                let kinds = changes(vocab).map(|kind| kind.into_iter().map(|(id, value)| (id as u32, value)).collect());
                let Sampling { seed, index, inverse_temperature, min_p, top_p, top_k } = row.sampling;
                let changes = if row.changes { kinds } else { Default::default() };
                RowSampling { seed, index, inverse_temperature, min_p, top_p, top_k: top_k as u32, changes }
            };
            let asked: Vec<RowSampling> = of.iter().map(sampling).collect();
            let wanted: Vec<Option<u32>> = of.iter().map(|row| Some(row.token as u32)).collect();
            assert!(!of.is_empty());
            assert_eq!(backend.sample(&mut logits, vocab, &[], &asked).unwrap(), Some(wanted), "of {vocab}");
            let outside = backend.sample(&mut logits, vocab, &[vocab as u32 + 3], &asked).unwrap_err().to_string();
            assert!(outside.contains("outside"), "{outside}");
        }
    });
}

/// Of greedy rows alone the greatest is looked for; an id without a token is not it.
#[test]
fn the_backend_takes_the_greatest_logit() {
    in_every_order(0..1, |emulator, _| {
        let mut backend = Cuda::new(emulator, Dtype::Bf16);
        let values = [[1.0, 7.0, 3.0, 7.0, 9.0], [f32::NAN, 1.0, 2.0, 0.0, 9.0]].concat();
        let greedy = vec![RowSampling { top_p: 1.0, ..Default::default() }; 2];
        for (unassigned, wanted) in [(&[][..], [Some(1), None]), (&[1], [Some(3), None])] {
            let mut logits = backend.logits_buffer(2, 5).unwrap();
            backend.device.write(&logits.memory, bytes_of(&values)).unwrap();
            assert_eq!(backend.sample(&mut logits, 4, unassigned, &greedy).unwrap(), Some(wanted.to_vec()));
        }
    });
}

fn row(logits: Vec<f32>, inverse_temperature: f32) -> Row {
    let sampling = Sampling { seed: 5, index: 0, inverse_temperature, min_p: 0.0, top_p: 1.0, top_k: 0 };
    Row { vocab: logits.len(), logits, changes: false, sampling, token: 0 }
}

#[test]
fn masks_and_ids_without_a_token_are_never_drawn() {
    in_every_order(0..6, |emulator, dice| {
        let vocab = dice.one_of(&[40usize, 65, 300]);
        let words = vocab.div_ceil(32);
        let rows: Vec<Row> =
            (0..3).map(|i| row((0..vocab).map(|_| dice.below(9) as f32).collect(), if i == 2 { 0.0 } else { 0.3 })).collect();
        let unassigned = [1, vocab as i32 - 1];
        let mut bits = vec![0u32; 3 * words];
        let allowed: Vec<Vec<usize>> = (0..3).map(|_| (0..3).map(|_| dice.between(2, vocab - 2)).collect()).collect();
        for (row, ids) in allowed.iter().enumerate() {
            ids.iter().for_each(|id| bits[row * words + id / 32] |= 1 << (id % 32));
        }
        let got = sample(emulator, &rows.iter().collect::<Vec<_>>(), Some(&bits), &unassigned);
        assert!(!unassigned.contains(&got[0]) && (0..vocab as i32).contains(&got[0]), "{got:?}");
        for row in 1..3 {
            assert!(allowed[row].contains(&(got[row] as usize)), "{got:?} {allowed:?}");
        }
        let best = allowed[2].iter().copied().max_by_key(|id| (rows[2].logits[*id] as i64, std::cmp::Reverse(*id))).unwrap();
        assert_eq!(got[2], best as i32);
    });
}

#[test]
fn rows_that_cannot_be_sampled_give_none() {
    in_every_order(0..1, |emulator, _| {
        let with = |at: usize, value: f32| row((0..40).map(|i| if i == at { value } else { 0.5 }).collect(), 1.0);
        let rows = [with(7, f32::NAN), with(0, f32::INFINITY), row(vec![f32::NEG_INFINITY; 40], 1.0), with(3, f32::NEG_INFINITY)];
        let got = sample(emulator, &rows.iter().collect::<Vec<_>>(), None, &[]);
        assert_eq!(got[..3], [-1, -1, -1]);
        assert!(got[3] >= 0 && got[3] != 3);
    });
}

#[test]
fn argmax_takes_the_lowest_of_equals() {
    in_every_order(0..6, |emulator, dice| {
        let (rows, width) = (dice.between(1, 4), dice.one_of(&[1, 31, 256, 700, 9000]));
        let stride = width + dice.below(3);
        let mut logits: Vec<f32> = (0..rows * stride).map(|_| dice.below(19) as f32 - 9.0).collect();
        // Beyond the width nothing counts.
        logits.chunks_exact_mut(stride).for_each(|row| row[width..].fill(99.0));
        let masked: Vec<i32> = if width > 1 { vec![dice.below(width) as i32] } else { vec![] };
        if rows > 1 {
            logits[stride + dice.below(width)] = f32::NAN;
        }
        let wanted: Vec<i32> = logits
            .chunks_exact(stride)
            .map(|row| {
                let mut best = -1;
                for (id, value) in row[..width].iter().enumerate().filter(|(id, _)| !masked.contains(&(*id as i32))) {
                    best = if best < 0 || *value > row[best as usize] { id as i32 } else { best };
                }
                if row[..width].iter().all(|value| value.is_finite()) { best } else { -1 }
            })
            .collect();
        let (values, ids) = (Memory::of(emulator, &logits, c"logits"), Memory::of(emulator, &masked, c"masked"));
        let out = Memory::new(emulator, rows * 4, c"ids");
        // SAFETY: pointers and sizes of memory that outlives the launch.
        emulator
            .check(unsafe {
                let (stride, width, count) = (stride as i32, width as i32, masked.len() as i32);
                (emulator.functions.argmax)(std::ptr::null_mut(), values.ptr(), stride, width, ids.ptr(), count, out.ptr_mut(), rows as i32)
            })
            .unwrap();
        assert_eq!(out.read::<i32>(rows), wanted);
    });
}
