//! What the host side of the kernels needs of a device. The emulator is one for tests, a GPU the other: the same host side runs on both.

use std::ffi::{CStr, c_int, c_void};
use std::fmt::Debug;
use std::ops::Range;

use candle_core::Result;

use super::functions::Functions;

/// A stretch of a device's memory, freed when it is dropped.
pub trait Allocation: Debug + Send + Sync {
    fn address(&self) -> *mut c_void;
    fn bytes(&self) -> usize;
}

/// One of a step's inputs.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    pub name: &'static CStr,
    pub values: &'a [u32],
    /// As many as the largest step so far had, or more: what room is made for.
    pub most: usize,
}

/// An address on a device, of memory that somebody keeps.
#[derive(Debug, Clone, Copy)]
pub struct Place(pub *const c_void);

// SAFETY: a number; what stands there is touched by launches alone.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

/// Writes rows `range` of matrices side by side into room for just those rows of each; see [`Device::fill`].
pub type RowWriter<'a> = &'a mut dyn FnMut(Range<usize>, [&mut [u8]; 3]) -> Result<()>;

pub trait Device: Send + Sync {
    type Memory: Allocation;
    /// Where inputs wait for their copy to the device, and where they lie there.
    type Inputs: Default + Send + Sync;

    fn functions(&self) -> &Functions;

    /// What every launch is given first.
    fn stream(&self) -> *mut c_void;

    /// Of a GPU; the more, the more parts work is cut into.
    fn multiprocessors(&self) -> usize;

    /// What a launch has returned.
    fn check(&self, code: c_int) -> Result<()>;

    /// After this error the device computes nothing more in this process.
    fn is_fatal(error: &candle_core::Error) -> bool;

    fn allocate(&self, bytes: usize, name: &'static CStr) -> Result<Self::Memory>;

    /// Makes `memory` at least so large; what it held may be lost. A GPU keeps it where it is large enough, so that nothing is allocated while
    /// steps run; the emulator allocates exactly these bytes, so that it sees what is read or written beyond them.
    fn resize(&self, memory: &mut Self::Memory, bytes: usize, name: &'static CStr) -> Result<()>;

    fn zero(&self, memory: &Self::Memory) -> Result<()>;

    /// Copies from the host; the bytes may change when this returns.
    fn write(&self, memory: &Self::Memory, bytes: &[u8]) -> Result<()>;

    /// Copies the first bytes to the host, behind everything launched so far.
    fn read(&self, memory: &Self::Memory, to: &mut [u8]) -> Result<()>;

    /// Fills memories with `rows` rows of so many bytes each, by as few copies as the room for them on the host allows.
    fn fill(&self, memories: [(&Self::Memory, usize); 3], rows: usize, write: RowWriter<'_>) -> Result<()>;

    /// Brings the inputs of a step to the device, by one copy where it is a GPU: where each of them lies until the next call.
    fn stage(&self, inputs: &mut Self::Inputs, values: &[Input<'_>]) -> Result<Vec<Place>>;
}

/// The bytes of plain numbers.
pub fn bytes_of<T: Copy>(values: &[T]) -> &[u8] {
    // SAFETY: numbers, or structures of numbers and addresses without gaps between them.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// New memory with these values.
pub fn memory_of<D: Device, T: Copy>(device: &D, values: &[T], name: &'static CStr) -> Result<D::Memory> {
    let memory = device.allocate(size_of_val(values), name)?;
    device.write(&memory, bytes_of(values))?;
    Ok(memory)
}

/// The first `count` numbers. Any bits must be a `T`.
pub fn read_numbers<D: Device, T: Copy + Default>(device: &D, memory: &D::Memory, count: usize) -> Result<Vec<T>> {
    let mut values = vec![T::default(); count];
    // SAFETY: the bytes of the values just made, which are numbers.
    let bytes = unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values.as_slice())) };
    device.read(memory, bytes)?;
    Ok(values)
}
