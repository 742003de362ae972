//! The emulator itself: kernels with a fault each must be reported, and what is right must not be.

use super::in_every_order;
use crate::cuda::emulator::Memory;
use half::{bf16, f16};

/// What the emulator says of each kernel of `faults.cu`; a sanitizer's trap may be first to see it.
const FAULTS: [&str; 13] = [
    "barrier divergence",
    "barrier divergence",
    "warp divergence",
    "lacks",
    "out of bounds",
    "outside its bounds",
    "outside its bounds",
    "misaligned",
    "out of bounds",
    "outside its bounds",
    "out of bounds",
    "ldmatrix_x4",
    "stack",
];

#[test]
fn every_fault_is_reported() {
    in_every_order(0..1, |emulator, _| {
        for (which, wanted) in FAULTS.iter().enumerate() {
            let memory = Memory::of(emulator, &[0i32; 37], c"numbers");
            // SAFETY: 37 numbers; the faults are the point.
            let code = unsafe { (emulator.fault)(which as i32, memory.ptr_mut()) };
            let said = emulator.check(code).err().map_or_else(|| "nothing".into(), |error| error.to_string());
            assert!(said.contains(wanted) || said.contains("trap (signal"), "fault {which}, {wanted}: {said}");
        }
        for which in 0..2 {
            let memory = Memory::of(emulator, &[1f32; 128], c"numbers");
            // SAFETY: 128 numbers.
            emulator.check(unsafe { (emulator.unwritten)(which, memory.ptr_mut()) }).unwrap();
            assert!(memory.read::<f32>(1)[0].is_nan(), "memory that nobody has written is NaN");
        }
    });
}

#[test]
fn collectives_give_what_they_should() {
    in_every_order(0..1, |emulator, _| {
        let bad = Memory::of(emulator, &[0i32], c"lanes that saw another result");
        // SAFETY: one number.
        emulator.check(unsafe { (emulator.collectives)(bad.ptr_mut()) }).unwrap();
        assert_eq!(bad.read::<i32>(1), [0]);
    });
}

#[test]
fn conversions_round_to_the_nearest_even() {
    in_every_order(0..1, |emulator, dice| {
        // SAFETY: plain functions of numbers.
        let narrow = |x: f32| unsafe { (emulator.bf16)(x) as u16 };
        // SAFETY: as above.
        let to_half = |x: f32| unsafe { (emulator.half)(x) as u16 };
        // SAFETY: as above.
        let from_half = |bits: u16| unsafe { (emulator.from_half)(u32::from(bits)) };
        for i in 0..20_000u32 {
            let x = f32::from_bits((dice.0 as u32).wrapping_mul(i * 2 + 1).wrapping_add(i << 16));
            if x.is_finite() {
                assert_eq!((narrow(x), to_half(x)), (bf16::from_f32(x).to_bits(), f16::from_f32(x).to_bits()), "{x}");
            }
        }
        for bits in (0..0x7C00).chain(0x8000..0xFC00) {
            assert_eq!(from_half(bits).to_bits(), f16::from_bits(bits).to_f32().to_bits());
        }
    });
}

/// As the test runner does: several OS threads launch at the same time, some of them faults.
#[test]
fn os_threads_do_not_disturb_each_other() {
    in_every_order(0..1, |emulator, _| {
        std::thread::scope(|scope| {
            for thread in 0..6 {
                scope.spawn(move || {
                    for _ in 0..30 {
                        let memory = Memory::of(emulator, &[0i32; 37], c"numbers");
                        // SAFETY: 37 numbers.
                        let code = unsafe {
                            if thread % 2 == 0 { (emulator.collectives)(memory.ptr_mut()) } else { (emulator.fault)(10, memory.ptr_mut()) }
                        };
                        assert_eq!(code != 0, thread % 2 == 1);
                    }
                });
            }
        });
    });
}
