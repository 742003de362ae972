//! Which device a model runs on: opening it, its name and memory, and what its errors say about it.

use candle_core::Device;

use crate::config::{DeviceChoice, EngineSettings, KvCacheDtype};
use crate::error::Failure;
use crate::kernels::cpu;
use crate::models::memory::{self, Memory};
use crate::models::{Fault, StepError};

/// A failed operation of the device, in the error's own words. Where RUST_BACKTRACE is set candle writes a backtrace into the text of its
/// errors: that is for the log alone, since a failure's message is shown to callers.
pub fn device_failure(error: candle_core::Error) -> Failure {
    let (message, whole) = (without_backtrace(&error), error.to_string());
    if message != whole {
        tracing::error!("device: {whole}");
    }
    Failure::internal(format!("device: {message}"))
}

pub(super) fn without_backtrace(error: &candle_core::Error) -> String {
    use candle_core::Error;
    match error {
        Error::WithBacktrace { inner, .. } => without_backtrace(inner),
        Error::Context { inner, context } => format!("{context}: {}", without_backtrace(inner)),
        Error::WithPath { inner, path } => format!("{}: {}", path.display(), without_backtrace(inner)),
        Error::WrappedContext { wrapped, context } => format!("{context}: {wrapped}"),
        other => other.to_string(),
    }
}

/// A step's error with its class.
pub fn step_error(error: candle_core::Error) -> StepError {
    StepError::new(fault(&error), device_failure(error))
}

/// What an error of candle says about the device.
fn fault(error: &candle_core::Error) -> Fault {
    use candle_core::Error;
    match error {
        Error::WithBacktrace { inner, .. } | Error::WithPath { inner, .. } | Error::Context { inner, .. } => fault(inner),
        Error::Cuda(_) | Error::Wrapped(_) | Error::WrappedContext { .. } => cuda_fault(&error.to_string()),
        _ => Fault::Unknown,
    }
}

/// The class of an error by the codes that CUDA's driver and libraries write into it. Memory that ran out leaves the device sound; after
/// the others (an illegal address, a failed assertion, a lost device) every further call fails, too.
fn cuda_fault(words: &str) -> Fault {
    let has = |codes: &[&str]| codes.iter().any(|code| words.contains(code));
    if has(&["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "CURAND_STATUS_ALLOCATION_FAILED"]) {
        Fault::Memory
    } else if has(&["CUDA_ERROR_", "CUBLAS_STATUS_", "CURAND_STATUS_"]) {
        Fault::Device
    } else {
        Fault::Unknown
    }
}

/// Opens the device of these settings.
pub fn device_of(settings: &EngineSettings) -> Result<Device, Failure> {
    let device = match settings.device {
        DeviceChoice::Auto => automatic(cuda::open(0), settings.gpu_required),
        choice => open_device(choice),
    }?;
    if settings.kv_cache_dtype == KvCacheDtype::Int8 && !device.is_cpu() {
        return Err(Failure::internal(
            "KV_CACHE_DTYPE=int8: on a GPU keys and values are held in float16, bfloat16 or float32; set one of those, or auto",
        ));
    }
    Ok(device)
}

/// Refuses `what`, which would be held in a quantized form, on a GPU that has no kernels for it.
pub fn check_quantized(device: &Device, what: &str) -> Result<(), Failure> {
    let Some(card) = cuda::capability(device) else { return Ok(()) };
    quantized_kernels(option_env!("CUDA_COMPUTE_CAP"), card).map_err(|problem| Failure::internal(format!("{what}: {problem}")))
}

/// Major and minor version of a GPU's architecture.
#[cfg(feature = "cuda")]
pub fn capability(device: &Device) -> Option<(u32, u32)> {
    cuda::capability(device)
}

/// What `DEVICE=auto` comes to, given what opening the first GPU came to.
fn automatic(opened: Result<Device, String>, gpu_required: bool) -> Result<Device, Failure> {
    match opened {
        Ok(device) => Ok(device),
        Err(error) if gpu_required => Err(Failure::internal(format!(
            "DEVICE=auto: no GPU can be used: {error}. A queue worker of a CUDA build does not fall back to the CPU; set DEVICE=cpu if that is meant"
        ))),
        Err(error) => {
            if cfg!(feature = "cuda") {
                tracing::warn!("no CUDA device can be used, the model runs on the CPU: {error}");
            }
            Ok(Device::Cpu)
        }
    }
}

/// Whether candle's kernels for quantized weights run on a card of compute capability `card`. Unlike its other kernels they are machine code
/// for one architecture, `built` (as `CUDA_COMPUTE_CAP` gives it to the build; without it, the build asked the card of its machine). Such code
/// runs on the same major version from its minor version on; from 9.0 on it is built with that architecture's own instructions, and runs
/// there alone.
fn quantized_kernels(built: Option<&str>, card: (u32, u32)) -> Result<(), String> {
    let number = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<String>().parse::<u32>().ok();
    let Some(built) = built.and_then(number).map(|number| (number / 10, number % 10)) else { return Ok(()) };
    let runs = if built.0 >= 9 { card == built } else { card.0 == built.0 && card.1 >= built.1 };
    if runs {
        return Ok(());
    }
    Err(format!(
        "the kernels for quantized weights in this build are for compute capability {}.{}, and this GPU has {}.{}; leave QUANTIZATION unset, or \
         build the image with CUDA_COMPUTE_CAP={}{}",
        built.0, built.1, card.0, card.1, card.0, card.1
    ))
}

/// Opens the device that was asked for.
pub fn open_device(choice: DeviceChoice) -> Result<Device, Failure> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => automatic(cuda::open(0), false),
        DeviceChoice::Cuda(index) => cuda::open(index).map_err(|error| Failure::internal(format!("DEVICE=cuda:{index}: {error}"))),
    }
}

pub fn describe(device: &Device, settings: &EngineSettings) -> String {
    if !device.is_cpu() {
        return cuda::describe(device);
    }
    let rounded = if settings.bf16_activations && cpu::matmul::has_bf16() { ", bf16 activations" } else { "" };
    format!("cpu ({:?}{rounded})", cpu::level())
}

pub fn device_memory(device: &Device) -> Memory {
    if device.is_cpu() { memory::host_memory() } else { cuda::memory() }
}

/// GPUs that this process sees.
pub fn device_count() -> usize {
    cuda::count()
}

/// The memory of that of these GPUs which has least free. `device` is the one that this thread goes on with.
pub fn least_memory(device: &Device, gpus: impl Iterator<Item = DeviceChoice>) -> Result<Memory, Failure> {
    let mut least: Option<Memory> = None;
    for choice in gpus {
        let other = open_device(choice)?;
        let memory = device_memory(&other);
        least = Some(least.filter(|least| least.free <= memory.free).unwrap_or(memory));
    }
    cuda::bind(device).map_err(|error| Failure::internal(format!("the GPU is lost: {error}")))?;
    Ok(least.unwrap_or_else(|| device_memory(device)))
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    use candle_core::Device;

    use crate::models::memory::{Memory, host_memory};

    pub fn open(_index: usize) -> Result<Device, String> {
        Err("this binary was built without CUDA; use the CUDA image, or build with --features cuda".into())
    }

    pub fn describe(device: &Device) -> String {
        format!("{device:?}")
    }

    /// Major and minor version of a GPU's architecture.
    pub fn capability(_device: &Device) -> Option<(u32, u32)> {
        None
    }

    pub fn memory() -> Memory {
        host_memory()
    }

    pub fn count() -> usize {
        0
    }

    pub fn bind(_device: &Device) -> Result<(), String> {
        Ok(())
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::Device;
    use candle_core::cuda_backend::CudaDevice;
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, result, sys};

    use crate::models::memory::Memory;

    /// A stream of our own, with cudarc's cross-stream bookkeeping off before anything is allocated: one thread does all device work.
    pub fn open(index: usize) -> Result<Device, String> {
        let device = Device::new_cuda_with_stream(index).map_err(|error| error.to_string())?;
        if let Device::Cuda(cuda) = &device {
            // SAFETY: every tensor is made, used and dropped on the engine's thread, on this one stream.
            #[allow(unsafe_code)]
            unsafe {
                cuda.disable_event_tracking()
            };
            keep_freed_memory(cuda).map_err(|error| format!("the memory pool cannot be set up: {error}"))?;
        }
        Ok(device)
    }

    /// Every operation allocates its result: freed memory stays in the pool instead of going back to the system at each synchronisation.
    fn keep_freed_memory(device: &CudaDevice) -> Result<(), DriverError> {
        let stream = device.cuda_stream();
        if !stream.context().has_async_alloc() {
            return Ok(());
        }
        let mut threshold = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the pool is the device's own, and the attribute's value is a u64, read before the call returns.
        #[allow(unsafe_code)]
        unsafe {
            let pool = result::device::get_mem_pool(stream.context().cu_device())?;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())
        }
    }

    pub fn describe(device: &Device) -> String {
        let name = match device {
            Device::Cuda(cuda) => cuda.cuda_stream().context().name().unwrap_or_else(|_| "unknown".into()),
            _ => String::new(),
        };
        format!("cuda ({name})")
    }

    /// Major and minor version of a GPU's architecture.
    pub fn capability(device: &Device) -> Option<(u32, u32)> {
        let Device::Cuda(cuda) = device else { return None };
        let (major, minor) = cuda.cuda_stream().context().compute_capability().ok()?;
        Some((u32::try_from(major).ok()?, u32::try_from(minor).ok()?))
    }

    pub fn memory() -> Memory {
        let (free, total) = result::mem_get_info().unwrap_or((0, 0));
        Memory { gpu: true, total, free }
    }

    pub fn count() -> usize {
        CudaContext::device_count().map_or(0, |count| usize::try_from(count).unwrap_or(0))
    }

    /// Makes the device this thread's again, after another one was.
    pub fn bind(device: &Device) -> Result<(), String> {
        match device {
            Device::Cuda(cuda) => cuda.cuda_stream().context().bind_to_thread().map_err(|error| error.to_string()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_backtrace_reaches_the_caller() {
        let traced = |error: candle_core::Error| candle_core::Error::WithBacktrace {
            inner: Box::new(error),
            backtrace: Box::new(std::backtrace::Backtrace::force_capture()),
        };
        let error = traced(traced(candle_core::Error::Msg("out of memory".into())).context("allocating the cache"));
        assert!(error.to_string().contains("device.rs"), "{error}");
        assert_eq!(device_failure(error).message, "device: allocating the cache: out of memory");
    }

    #[test]
    fn automatic_falls_back_to_the_cpu_unless_a_gpu_is_required() {
        let none = || Err("DriverError(CUDA_ERROR_NO_DEVICE)".to_owned());
        assert!(automatic(none(), false).unwrap().is_cpu());
        let refused = automatic(none(), true).unwrap_err().message;
        assert!(refused.contains("CUDA_ERROR_NO_DEVICE") && refused.contains("DEVICE=cpu"), "{refused}");
        assert!(automatic(Ok(Device::Cpu), true).is_ok(), "what could be opened is taken");
    }

    #[test]
    fn quantized_kernels_run_where_they_were_built_for() {
        let fine = [("80", (8, 0)), ("80", (8, 6)), ("80", (8, 9)), ("8.9", (8, 9)), ("90", (9, 0)), ("90a", (9, 0)), ("120", (12, 0))];
        for (built, card) in fine {
            assert_eq!(quantized_kernels(Some(built), card), Ok(()), "{built} on {card:?}");
        }
        for (built, card) in [("80", (9, 0)), ("80", (7, 5)), ("89", (8, 6)), ("90", (10, 0)), ("100", (10, 3)), ("120", (12, 1))] {
            let problem = quantized_kernels(Some(built), card).unwrap_err();
            assert!(problem.contains(&format!("CUDA_COMPUTE_CAP={}{}", card.0, card.1)), "{problem}");
        }
        assert_eq!(quantized_kernels(None, (9, 0)), Ok(()), "the build asked its own card");
    }

    #[test]
    fn faults_are_told_apart_by_their_codes() {
        let cuda = |words: &'static str| candle_core::Error::Cuda(words.into());
        let illegal = r#"DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")"#;
        for (error, class) in [
            (cuda(illegal), Fault::Device),
            (cuda("CublasError(CUBLAS_STATUS_EXECUTION_FAILED)"), Fault::Device),
            (cuda(illegal).context("in layer 3"), Fault::Device),
            (cuda(r#"DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")"#), Fault::Memory),
            (cuda("CublasError(CUBLAS_STATUS_ALLOC_FAILED)"), Fault::Memory),
            (cuda("unsupported dtype F64 for matmul"), Fault::Unknown),
            (candle_core::Error::Msg("shapes do not match".into()), Fault::Unknown),
        ] {
            assert_eq!(step_error(error).fault, class, "{class:?}");
        }
    }
}
