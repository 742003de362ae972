//! A GPU as the kernels' device: memory of candle's pool, on the stream that candle uses, too, and copies through pinned memory.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, Mutex};

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, DriverError, PinnedHostSlice, result, sys};
use candle_core::{Error, Result};

use super::device::{Allocation, Device, Input, Place, RowWriter};
use super::functions::Functions;

/// Bytes of rows on their way to the device at a time. There are two rooms of this size: one is filled while the other is copied.
const ROOM: usize = 16 << 20;
/// Numbers that an input begins at a multiple of.
const ALIGNED: usize = 64;

/// Launches that CUDA refused without harm to what is on the device: an invalid value or configuration, no such kernel for this card, too few
/// resources.
const REFUSED: [c_int; 5] = [1, 9, 98, 209, 701];
const OUT_OF_MEMORY: c_int = 2;

unsafe extern "C" {
    /// `error.cu`
    fn wc_error_name(code: c_int) -> *const c_char;
}

/// One GPU.
pub struct Gpu {
    stream: Arc<CudaStream>,
    functions: Functions,
    multiprocessors: usize,
    rooms: Mutex<Option<[Pinned; 2]>>,
}

impl Gpu {
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = stream.context().attribute(attribute).map_err(of_driver)?;
        Ok(Self { stream, functions: Functions::linked(), multiprocessors: multiprocessors.max(1) as usize, rooms: Mutex::new(None) })
    }

    fn pinned(&self, bytes: usize) -> Result<Pinned> {
        let context = self.stream.context();
        // SAFETY: bytes are written before they are read.
        let memory = unsafe { context.alloc_pinned::<u8>(bytes) }.map_err(of_driver)?;
        Ok(Pinned { memory, copied: context.new_event(None).map_err(of_driver)? })
    }
}

fn of_driver(error: DriverError) -> Error {
    Error::Cuda(Box::new(error))
}

/// Memory of the host that the device copies from by itself.
struct Pinned {
    memory: PinnedHostSlice<u8>,
    /// The copies from it that were asked for last.
    copied: CudaEvent,
}

impl Pinned {
    /// All of it, once nothing is copied from it any more.
    fn room(&mut self) -> Result<&mut [u8]> {
        self.copied.synchronize().map_err(of_driver)?;
        self.memory.as_mut_slice().map_err(of_driver)
    }

    /// Copies a part of it to an address on the device, which has room for that.
    fn copy(&mut self, part: std::ops::Range<usize>, to: usize, stream: &CudaStream) -> Result<()> {
        let from = self.memory.as_slice().map_err(of_driver)?.get(part).unwrap_or_default();
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the room on the device is the caller's promise; the bytes stay as they are until `copied` has come.
        unsafe { result::memcpy_htod_async(to as sys::CUdeviceptr, from, stream.cu_stream()) }.map_err(of_driver)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _done = self.copied.synchronize();
    }
}

/// Memory of a GPU; nothing where it has no bytes.
#[derive(Debug)]
pub struct GpuMemory {
    _slice: Option<CudaSlice<u8>>,
    address: usize,
    bytes: usize,
}

impl Allocation for GpuMemory {
    fn address(&self) -> *mut c_void {
        self.address as *mut c_void
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The inputs of a step, which have places of their own that stay where they are until one of them outgrows its place.
#[derive(Default)]
pub struct GpuInputs {
    /// Numbers that each has room for.
    capacities: Vec<usize>,
    rooms: Option<Rooms>,
}

struct Rooms {
    host: [Pinned; 2],
    /// Which of them is written next.
    next: usize,
    device: GpuMemory,
}

impl GpuInputs {
    /// Whether each has its place.
    fn fit(&mut self, values: &[Input<'_>]) -> bool {
        let fits = self.rooms.is_some()
            && self.capacities.len() == values.len()
            && self.capacities.iter().zip(values).all(|(capacity, input)| *capacity >= input.values.len());
        if !fits {
            let wanted = |(index, input): (usize, &Input<'_>)| {
                let before = self.capacities.get(index).copied().unwrap_or(0);
                let grown = if input.values.len() > input.most.max(before) { input.values.len().next_power_of_two() } else { 0 };
                input.most.max(before).max(grown).next_multiple_of(ALIGNED)
            };
            self.capacities = values.iter().enumerate().map(wanted).collect();
        }
        fits
    }
}

impl Device for Gpu {
    type Memory = GpuMemory;
    type Inputs = GpuInputs;

    fn functions(&self) -> &Functions {
        &self.functions
    }

    fn stream(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn check(&self, code: c_int) -> Result<()> {
        // SAFETY: a text that is part of the program.
        let name = || unsafe { CStr::from_ptr(wc_error_name(code)) }.to_string_lossy();
        match code {
            0 => Ok(()),
            -1 => Err(Error::Msg("there is no kernel for this".into())),
            OUT_OF_MEMORY => Err(Error::Cuda("CUDA_ERROR_OUT_OF_MEMORY".into())),
            code if REFUSED.contains(&code) => Err(Error::Msg(format!("a launch was refused: {}", name()))),
            code => Err(Error::Cuda(format!("CUDA_ERROR_{code}: {}", name()).into())),
        }
    }

    fn is_fatal(error: &Error) -> bool {
        let said = error.to_string();
        said.contains("CUDA_ERROR_") && !said.contains("CUDA_ERROR_OUT_OF_MEMORY")
    }

    fn allocate(&self, bytes: usize, _name: &'static CStr) -> Result<GpuMemory> {
        if bytes == 0 {
            return Ok(GpuMemory { _slice: None, address: 0, bytes });
        }
        // SAFETY: kernels write before they read, as the emulator sees.
        let slice = unsafe { self.stream.alloc::<u8>(bytes) }.map_err(of_driver)?;
        let address = slice.device_ptr(&self.stream).0 as usize;
        Ok(GpuMemory { _slice: Some(slice), address, bytes })
    }

    fn resize(&self, memory: &mut GpuMemory, bytes: usize, name: &'static CStr) -> Result<()> {
        if memory.bytes < bytes {
            *memory = self.allocate(bytes, name)?;
        }
        Ok(())
    }

    fn zero(&self, memory: &GpuMemory) -> Result<()> {
        if memory.bytes == 0 {
            return Ok(());
        }
        self.stream.context().bind_to_thread().map_err(of_driver)?;
        // SAFETY: all of the memory, and nothing else.
        unsafe { result::memset_d8_async(memory.address as sys::CUdeviceptr, 0, memory.bytes, self.stream.cu_stream()) }.map_err(of_driver)
    }

    fn write(&self, memory: &GpuMemory, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if bytes.len() > memory.bytes {
            return Err(Error::Msg(format!("{} bytes for a memory of {}", bytes.len(), memory.bytes)));
        }
        self.stream.context().bind_to_thread().map_err(of_driver)?;
        // SAFETY: inside the memory. The driver has read the bytes, which are not pinned, when this returns.
        unsafe { result::memcpy_htod_async(memory.address as sys::CUdeviceptr, bytes, self.stream.cu_stream()) }.map_err(of_driver)
    }

    fn read(&self, memory: &GpuMemory, to: &mut [u8]) -> Result<()> {
        if to.len() > memory.bytes {
            return Err(Error::Msg(format!("{} bytes of a memory of {}", to.len(), memory.bytes)));
        }
        self.stream.context().bind_to_thread().map_err(of_driver)?;
        if !to.is_empty() {
            // SAFETY: inside the memory.
            unsafe { result::memcpy_dtoh_async(to, memory.address as sys::CUdeviceptr, self.stream.cu_stream()) }.map_err(of_driver)?;
        }
        self.stream.synchronize().map_err(of_driver)
    }

    fn fill(&self, memories: [(&GpuMemory, usize); 3], rows: usize, write: RowWriter<'_>) -> Result<()> {
        if memories.iter().any(|(memory, size)| memory.bytes < rows * size) {
            return Err(Error::Msg(format!("{rows} rows have no room")));
        }
        let sizes = memories.map(|(_, size)| size);
        let row: usize = sizes.iter().sum();
        if row == 0 {
            return Ok(());
        }
        let Ok(mut rooms) = self.rooms.lock() else { return Err(Error::Msg("a thread that loaded weights ended early".into())) };
        let least = row.max(ROOM);
        if rooms.as_ref().is_none_or(|[room, _]| room.memory.len() < least) {
            *rooms = Some([self.pinned(least)?, self.pinned(least)?]);
        }
        let Some(rooms) = rooms.as_mut() else { return Ok(()) };
        self.stream.context().bind_to_thread().map_err(of_driver)?;
        let at_a_time = least / row;
        for (part, first) in (0..rows).step_by(at_a_time).enumerate() {
            let count = at_a_time.min(rows - first);
            let room = &mut rooms[part % 2];
            let (values, rest) = room.room()?.split_at_mut(count * sizes[0]);
            let (scales, rest) = rest.split_at_mut(count * sizes[1]);
            write(first..first + count, [values, scales, &mut rest[..count * sizes[2]]])?;
            let mut from = 0;
            for (memory, size) in memories {
                room.copy(from..from + count * size, memory.address + first * size, &self.stream)?;
                from += count * size;
            }
            room.copied.record(&self.stream).map_err(of_driver)?;
        }
        Ok(())
    }

    fn stage(&self, inputs: &mut GpuInputs, values: &[Input<'_>]) -> Result<Vec<Place>> {
        self.stream.context().bind_to_thread().map_err(of_driver)?;
        if !inputs.fit(values) {
            let bytes = inputs.capacities.iter().sum::<usize>().max(ALIGNED) * size_of::<u32>();
            inputs.rooms = None;
            let host = [self.pinned(bytes)?, self.pinned(bytes)?];
            inputs.rooms = Some(Rooms { host, next: 0, device: self.allocate(bytes, c"inputs")? });
        }
        let Some(Rooms { host, next, device }) = &mut inputs.rooms else { return Ok(Vec::new()) };
        let room = &mut host[*next];
        *next = 1 - *next;
        let bytes = room.room()?;
        let (mut at, mut used) = (0, 0);
        let mut places = Vec::with_capacity(values.len());
        for (input, capacity) in values.iter().zip(&inputs.capacities) {
            let from = super::device::bytes_of(input.values);
            bytes[at..at + from.len()].copy_from_slice(from);
            places.push(Place((device.address + at) as *const c_void));
            if !from.is_empty() {
                used = at + from.len();
            }
            at += capacity * size_of::<u32>();
        }
        room.copy(0..used, device.address, &self.stream)?;
        room.copied.record(&self.stream).map_err(of_driver)?;
        Ok(places)
    }
}
