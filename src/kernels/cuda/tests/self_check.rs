//! What a device is asked at the start: every kernel that is at fault is named, and nothing runs on a device that is lost.

use std::ffi::{CStr, c_int, c_void};

use candle_core::{Error, Result};

use super::{Dtype, Emulator, Memory, in_every_order};
use crate::cuda::backend::Cuda;
use crate::cuda::device::{Device, Input, Place, RowWriter};
use crate::cuda::emulator::FATAL;
use crate::cuda::functions::Functions;
use crate::testing::{TestMatrix, read, write};
use crate::*;

/// The emulator with other functions, of which one that fails loses the device.
struct Faulty {
    emulator: &'static Emulator,
    functions: Functions,
}

impl Device for Faulty {
    type Memory = Memory;
    type Inputs = Vec<Memory>;

    fn functions(&self) -> &Functions {
        &self.functions
    }
    fn stream(&self) -> *mut c_void {
        self.emulator.stream()
    }
    fn multiprocessors(&self) -> usize {
        self.emulator.multiprocessors()
    }
    fn check(&self, code: c_int) -> Result<()> {
        if code == 700 { Err(Error::Msg(FATAL.into())) } else { Emulator::check(self.emulator, code) }
    }
    fn is_fatal(error: &Error) -> bool {
        <&Emulator>::is_fatal(error)
    }
    fn allocate(&self, bytes: usize, name: &'static CStr) -> Result<Memory> {
        self.emulator.allocate(bytes, name)
    }
    fn resize(&self, memory: &mut Memory, bytes: usize, name: &'static CStr) -> Result<()> {
        self.emulator.resize(memory, bytes, name)
    }
    fn zero(&self, memory: &Memory) -> Result<()> {
        self.emulator.zero(memory)
    }
    fn write(&self, memory: &Memory, bytes: &[u8]) -> Result<()> {
        self.emulator.write(memory, bytes)
    }
    fn read(&self, memory: &Memory, to: &mut [u8]) -> Result<()> {
        self.emulator.read(memory, to)
    }
    fn fill(&self, memories: [(&Memory, usize); 3], rows: usize, write: RowWriter<'_>) -> Result<()> {
        self.emulator.fill(memories, rows, write)
    }
    fn stage(&self, inputs: &mut Vec<Memory>, values: &[Input<'_>]) -> Result<Vec<Place>> {
        self.emulator.stage(inputs, values)
    }
}

fn faulty(emulator: &'static Emulator, name: &str, goes_well: bool) -> Cuda<Faulty> {
    Cuda::new(Faulty { emulator, functions: emulator.functions.without(name, goes_well) }, Dtype::Bf16)
}

#[test]
fn kernels_that_are_right_pass() {
    in_every_order(0..1, |emulator, _| {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            assert_eq!(super::Cuda::new(emulator, dtype).self_check(), []);
        }
    });
}

#[test]
fn a_kernel_that_answers_wrongly_is_named() {
    let Some(emulator) = Emulator::here() else { return };
    for name in Functions::NAMES {
        let found = faulty(emulator, name, true).self_check();
        assert!(found.iter().any(|found| found.kernels.split(", ").any(|kernel| kernel == *name)), "{name}: {found:?}");
    }
}

/// The check ends there, since nothing else could be computed.
#[test]
fn nothing_is_launched_on_a_device_that_is_lost() {
    let Some(emulator) = Emulator::here() else { return };
    let mut lost = faulty(emulator, "norm", false);
    let found = lost.self_check();
    assert_eq!(found.last().map(|found| found.kernels), Some("norm"), "{found:?}");
    assert!(found.len() == 1 && found[0].said.contains(FATAL), "{found:?}");

    let mut lost = faulty(emulator, "gate_rows", false);
    let (gates, mut x) = (write(&mut lost, &[0.5; 2], 1), write(&mut lost, &[1.0; 4], 2));
    let mut out = lost.buffer(2, 2).unwrap();
    assert!(lost.gate_rows(&gates, &mut x).unwrap_err().to_string().contains(FATAL));
    let said = |result: Result<()>| result.unwrap_err().to_string();
    assert!(said(lost.copy(&x, &mut out)).contains("nothing is launched any more"));
    assert!(said(lost.each_row(&mut x, &|_, _| panic!("nothing is read, either"))).contains("nothing is launched any more"));
    let matrix = TestMatrix::new(vec![1.0; 4], 2).linear(&lost, Columns::Plain, None);
    assert!(said(lost.linear(&x, &matrix, Epilogue::Store, &mut out)).contains("nothing is launched any more"));

    // What was refused without harm is no reason to stop.
    let mut well = super::Cuda::new(emulator, Dtype::Bf16);
    let mut x = write(&mut well, &[1.0; 4], 2);
    assert!(well.pick(&x, &[9], &mut out).is_err());
    assert_eq!(read(&mut well, &mut x), [1.0; 4]);
}
