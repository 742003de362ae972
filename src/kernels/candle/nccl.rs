//! Sums from GPU to GPU by NCCL, which is loaded at run time: a build needs no NCCL, and a start on one GPU none either.
//!
//! The tensor library's own binding would have to be linked: it and CUDA's driver are bound one way.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use candle_core::{CpuStorage, CudaDevice, CudaStorage, CustomOp1, DType, Error, Layout, Result, Shape};
use half::bf16;
use libloading::Library;

use crate::ranks::Member;

/// The names under which it is installed.
const FILES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// Of `ncclDataType_t` and `ncclRedOp_t`.
const FLOAT32: c_int = 7;
const BFLOAT16: c_int = 9;
const SUM: c_int = 0;

/// `ncclUniqueId`: what ranks find each other by.
#[repr(C)]
#[derive(Clone, Copy)]
struct Id([c_char; 128]);

type Handle = *mut c_void;

/// The functions that are used.
pub struct Nccl {
    get_unique_id: unsafe extern "C" fn(*mut Id) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Handle, c_int, Id, c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, *mut c_void) -> c_int,
    comm_abort: unsafe extern "C" fn(Handle) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    _library: Library,
}

impl Nccl {
    /// The library, loaded once; `None`: it is not installed.
    pub fn get() -> Option<&'static Self> {
        static NCCL: OnceLock<Option<Nccl>> = OnceLock::new();
        NCCL.get_or_init(Self::load).as_ref()
    }

    fn load() -> Option<Self> {
        // SAFETY: the names are NCCL's, whose initialisers do nothing but register themselves, and the types are those of its header,
        // which have stayed the same since bf16 came (2.10).
        unsafe {
            let library = FILES.iter().find_map(|file| Library::new(*file).ok())?;
            Some(Self {
                get_unique_id: *library.get(b"ncclGetUniqueId").ok()?,
                comm_init_rank: *library.get(b"ncclCommInitRank").ok()?,
                all_reduce: *library.get(b"ncclAllReduce").ok()?,
                comm_abort: *library.get(b"ncclCommAbort").ok()?,
                get_error_string: *library.get(b"ncclGetErrorString").ok()?,
                _library: library,
            })
        }
    }

    fn check(&self, what: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: NCCL gives a text that stays, for every code.
        let text = unsafe { CStr::from_ptr((self.get_error_string)(code)) };
        Err(Error::Msg(format!("NCCL: {what}: {}", text.to_string_lossy())))
    }
}

/// A communicator's handle, gone once it was aborted.
struct Open(Option<Handle>);

// SAFETY: NCCL lets any thread use a handle, one at a time; the lock around it sees to that.
unsafe impl Send for Open {}

/// One rank among those that NCCL connects.
pub struct Communicator {
    nccl: &'static Nccl,
    open: Arc<Mutex<Open>>,
    member: Member,
}

impl Communicator {
    pub fn connect(nccl: &'static Nccl, device: &CudaDevice, member: Member) -> Result<Self> {
        device.cuda_stream().context().bind_to_thread().map_err(Error::wrap)?;
        let mut id = Id([0; 128]);
        if member.rank() == 0 {
            // SAFETY: NCCL writes the id.
            nccl.check("no id", unsafe { (nccl.get_unique_id)(&raw mut id) })?;
        }
        let bytes = member.share(id.0.map(|byte| byte as u8).to_vec()).map_err(Error::Msg)?;
        id.0.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte as c_char);
        let mut handle = null_mut();
        // SAFETY: every rank calls it with the same id, as the meeting before it has shown.
        let code = unsafe { (nccl.comm_init_rank)(&raw mut handle, member.count() as c_int, id, member.rank() as c_int) };
        nccl.check("the ranks cannot be connected", code)?;
        let open = Arc::new(Mutex::new(Open(Some(handle))));
        // A sum that waits for a rank which has failed waits on the GPU, and only an abort ends it.
        let on_failure = open.clone();
        member.ranks().on_failure(Box::new(move || abort(nccl, &on_failure)));
        Ok(Self { nccl, open, member })
    }

    fn all_reduce(&self, from: u64, to: u64, count: usize, dtype: c_int, stream: &CudaStream) -> Result<()> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(handle) = open.0 else {
            return Err(Error::Msg(self.member.ranks().failure().unwrap_or_else(|| "the ranks are no longer connected".into())));
        };
        // SAFETY: both are memory of this device for `count` numbers of this type, used on this stream alone.
        let code = unsafe {
            (self.nccl.all_reduce)(from as *const c_void, to as *mut c_void, count, dtype, SUM, handle, stream.cu_stream().cast())
        };
        self.nccl.check("a sum", code)
    }
}

fn abort(nccl: &Nccl, open: &Mutex<Open>) {
    if let Some(handle) = open.lock().unwrap_or_else(PoisonError::into_inner).0.take() {
        // SAFETY: the handle was open, and is taken out: nobody uses it again.
        let _ = unsafe { (nccl.comm_abort)(handle) };
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        abort(self.nccl, &self.open);
    }
}

impl CustomOp1 for Communicator {
    fn name(&self) -> &'static str {
        "all-reduce"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Err(Error::Msg("NCCL sums on GPUs alone".into()))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let device = storage.device();
        let Some((from, to)) = layout.contiguous_offsets() else { return Err(Error::Msg("a sum of rows that do not lie together".into())) };
        let (count, stream) = (to - from, device.cuda_stream());
        macro_rules! sum {
            ($number:ty, $dtype:expr) => {{
                let source = storage.as_cuda_slice::<$number>()?.slice(from..to);
                // SAFETY: the sum fills all of it.
                let mut target = unsafe { device.alloc::<$number>(count) }?;
                {
                    let (source, _reads) = source.device_ptr(&stream);
                    let (target, _writes) = target.device_ptr_mut(&stream);
                    self.all_reduce(source, target, count, $dtype, &stream)?;
                }
                CudaStorage::wrap_cuda_slice(target, device.clone())
            }};
        }
        let sum = match storage.dtype() {
            DType::BF16 => sum!(bf16, BFLOAT16),
            DType::F32 => sum!(f32, FLOAT32),
            other => return Err(Error::Msg(format!("ranks sum no {other:?}"))),
        };
        Ok((sum, layout.shape().clone()))
    }
}
