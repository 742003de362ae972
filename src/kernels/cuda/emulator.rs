//! Builds the kernels with the host's C++ compiler, for tests: once, objects side by side, kept beside the test program until a source
//! changes. `CUDA_KERNELS` names another folder of sources; `CXX` another compiler.

#![allow(clippy::panic)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use candle_core::{Error, Result};

use super::device::{Allocation, Device, Input, Place, RowWriter};
use super::functions::Functions;

const SOURCES: [&str; 14] = [
    "emulate/memory",
    "emulate/faults",
    "rows",
    "embed",
    "gemv",
    "matmul",
    "rope",
    "attend",
    "attend_tiles",
    "experts",
    "conv",
    "delta",
    "latent",
    "sample",
];
/// Traps on what C++ leaves undefined need no library. Without fortified functions: their check of longjmp takes a switch of fibers for an error.
const FLAGS: [&str; 12] = [
    "-std=c++17",
    "-O1",
    "-U_FORTIFY_SOURCE",
    "-fPIC",
    "-x",
    "c++",
    "-c",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-fsanitize=bounds,alignment,shift,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
    "-pthread",
];

/// The kernels on this machine's processor.
pub struct Emulator {
    pub functions: Functions,
    memory: unsafe extern "C" fn(usize, *const c_char) -> *mut c_void,
    address: unsafe extern "C" fn(*mut c_void) -> *mut u8,
    free: unsafe extern "C" fn(*mut c_void),
    order: unsafe extern "C" fn(c_int),
    error: unsafe extern "C" fn() -> *const c_char,
    pub fault: unsafe extern "C" fn(c_int, *mut c_void) -> c_int,
    pub unwritten: unsafe extern "C" fn(c_int, *mut c_void) -> c_int,
    pub collectives: unsafe extern "C" fn(*mut c_void) -> c_int,
    pub bf16: unsafe extern "C" fn(f32) -> u32,
    pub half: unsafe extern "C" fn(f32) -> u32,
    pub from_half: unsafe extern "C" fn(u32) -> f32,
}

/// How the threads of a block take turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Forwards,
    Backwards,
    Shuffled,
}

pub const ORDERS: [Order; 3] = [Order::Forwards, Order::Backwards, Order::Shuffled];

impl Emulator {
    /// Built and loaded at the first call. `None`, and a line that says why, where there is no compiler or the system is another.
    pub fn here() -> Option<&'static Self> {
        static HERE: OnceLock<Option<Emulator>> = OnceLock::new();
        HERE.get_or_init(|| {
            let compiler = compiler().map_err(|why| eprintln!("skipped: CUDA kernels on the CPU ({why})")).ok()?;
            let folder = std::env::var("CUDA_KERNELS").map_or_else(|_| Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda"), PathBuf::from);
            let library = build(&compiler, &folder).unwrap_or_else(|error| panic!("{error}"));
            Some(Self::load(&library).unwrap_or_else(|error| panic!("{}: {error}", library.display())))
        })
        .as_ref()
    }

    // The types of the fields say what is made of a symbol.
    #[allow(clippy::missing_transmute_annotations)]
    fn load(path: &Path) -> Result<Self> {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(Error::wrap)?;
        // SAFETY: a library of our own sources, whose functions have these signatures.
        unsafe {
            let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            if library.is_null() {
                return Err(Error::Msg(CStr::from_ptr(libc::dlerror()).to_string_lossy().into_owned()));
            }
            let symbol = |name: &str| {
                let c_name = CString::new(name).map_err(Error::wrap)?;
                let address = libc::dlsym(library, c_name.as_ptr());
                if address.is_null() { Err(Error::Msg(format!("there is no {name}"))) } else { Ok(address) }
            };
            Ok(Self {
                functions: Functions::load(symbol)?,
                memory: std::mem::transmute::<*mut c_void, _>(symbol("emulated_memory")?),
                address: std::mem::transmute::<*mut c_void, _>(symbol("emulated_address")?),
                free: std::mem::transmute::<*mut c_void, _>(symbol("emulated_free")?),
                order: std::mem::transmute::<*mut c_void, _>(symbol("emulated_order")?),
                error: std::mem::transmute::<*mut c_void, _>(symbol("emulated_error")?),
                fault: std::mem::transmute::<*mut c_void, _>(symbol("emulated_fault")?),
                unwritten: std::mem::transmute::<*mut c_void, _>(symbol("emulated_unwritten")?),
                collectives: std::mem::transmute::<*mut c_void, _>(symbol("emulated_collectives")?),
                bf16: std::mem::transmute::<*mut c_void, _>(symbol("emulated_bf16")?),
                half: std::mem::transmute::<*mut c_void, _>(symbol("emulated_half")?),
                from_half: std::mem::transmute::<*mut c_void, _>(symbol("emulated_from_half")?),
            })
        }
    }

    /// For the launches of this thread.
    pub fn set_order(&self, order: Order) {
        // SAFETY: sets a variable of this thread.
        unsafe { (self.order)(order as c_int) }
    }

    /// What a function has returned.
    pub fn check(&self, code: c_int) -> Result<()> {
        match code {
            0 => Ok(()),
            -1 => Err(Error::Msg("there is no kernel for this".into())),
            // SAFETY: a text of this thread's last launch.
            _ => Err(Error::Msg(unsafe { CStr::from_ptr((self.error)()) }.to_string_lossy().into_owned())),
        }
    }
}

/// A device's memory: guarded, and NaN until it is written.
#[derive(Debug)]
pub struct Memory {
    free: unsafe extern "C" fn(*mut c_void),
    pages: *mut c_void,
    address: *mut u8,
    bytes: usize,
}

impl Memory {
    pub fn new(emulator: &Emulator, bytes: usize, name: &CStr) -> Self {
        // SAFETY: makes pages, which this value frees.
        unsafe {
            let pages = (emulator.memory)(bytes, name.as_ptr());
            Self { free: emulator.free, pages, address: (emulator.address)(pages), bytes }
        }
    }

    pub fn of<T: Copy>(emulator: &Emulator, values: &[T], name: &CStr) -> Self {
        let memory = Self::new(emulator, size_of_val(values), name);
        // SAFETY: as many bytes as were just made.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast(), memory.address, memory.bytes) };
        memory
    }

    pub fn ptr(&self) -> *const c_void {
        self.address.cast()
    }

    pub fn ptr_mut(&self) -> *mut c_void {
        self.address.cast()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first `count` numbers.
    pub fn read<T: Copy + Default>(&self, count: usize) -> Vec<T> {
        assert!(count * size_of::<T>() <= self.bytes);
        let mut values = vec![T::default(); count];
        // SAFETY: inside both, as was just asserted; any bits are a number.
        unsafe { std::ptr::copy_nonoverlapping(self.address, values.as_mut_ptr().cast(), count * size_of::<T>()) };
        values
    }
}

// SAFETY: an address of memory that nobody moves; launches alone read and write it.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Allocation for Memory {
    fn address(&self) -> *mut c_void {
        self.address.cast()
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Inputs lie in memories of their own, so that what is beyond each is guarded.
impl Device for &'static Emulator {
    type Memory = Memory;
    type Inputs = Vec<Memory>;

    fn functions(&self) -> &Functions {
        &self.functions
    }

    fn stream(&self) -> *mut c_void {
        std::ptr::null_mut()
    }

    fn multiprocessors(&self) -> usize {
        1
    }

    fn check(&self, code: c_int) -> Result<()> {
        Emulator::check(self, code)
    }

    fn is_fatal(error: &Error) -> bool {
        error.to_string().contains(FATAL)
    }

    fn allocate(&self, bytes: usize, name: &'static CStr) -> Result<Memory> {
        Ok(Memory::new(self, bytes, name))
    }

    fn resize(&self, memory: &mut Memory, bytes: usize, name: &'static CStr) -> Result<()> {
        *memory = Memory::new(self, bytes, name);
        Ok(())
    }

    fn zero(&self, memory: &Memory) -> Result<()> {
        self.write(memory, &vec![0; memory.bytes])
    }

    fn write(&self, memory: &Memory, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= memory.bytes);
        // SAFETY: inside the memory, as was just asserted.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.address, bytes.len()) };
        Ok(())
    }

    fn read(&self, memory: &Memory, to: &mut [u8]) -> Result<()> {
        to.copy_from_slice(&memory.read::<u8>(to.len()));
        Ok(())
    }

    /// In parts of a few rows, as a GPU with little room on the host would.
    fn fill(&self, memories: [(&Memory, usize); 3], rows: usize, write: RowWriter<'_>) -> Result<()> {
        for first in (0..rows).step_by(PART_ROWS) {
            let range = first..rows.min(first + PART_ROWS);
            let part = |(memory, row_bytes): (&Memory, usize)| {
                assert!(range.end * row_bytes <= memory.bytes);
                // SAFETY: inside the memory, as was just asserted; the three memories are different ones.
                unsafe { std::slice::from_raw_parts_mut(memory.address.add(range.start * row_bytes), range.len() * row_bytes) }
            };
            write(range.clone(), memories.map(part))?;
        }
        Ok(())
    }

    fn stage(&self, inputs: &mut Vec<Memory>, values: &[Input<'_>]) -> Result<Vec<Place>> {
        *inputs = values.iter().map(|input| Memory::of(self, input.values, input.name)).collect();
        Ok(inputs.iter().map(|memory| Place(memory.ptr())).collect())
    }
}

/// Rows that [`Device::fill`] asks for at a time.
const PART_ROWS: usize = 48;

/// What an error says in tests that stand for a lost device.
pub const FATAL: &str = "the device is lost";

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and freed once.
        unsafe { (self.free)(self.pages) }
    }
}

fn compiler() -> std::result::Result<String, String> {
    if !cfg!(all(target_os = "linux", target_env = "gnu")) {
        return Err("the emulator is for Linux with glibc".into());
    }
    let asked = std::env::var("CXX").ok();
    let names: Vec<&str> = asked.as_deref().map_or_else(|| vec!["c++", "g++", "clang++"], |name| vec![name]);
    let found = names.iter().find(|name| Command::new(name).arg("--version").output().is_ok_and(|out| out.status.success()));
    found
        .map(|name| (*name).to_owned())
        .ok_or_else(|| format!("no C++ compiler: {}; on Debian and Ubuntu: apt-get install g++", names.join(", ")))
}

/// The library of the sources in `folder`.
fn build(compiler: &str, folder: &Path) -> std::io::Result<PathBuf> {
    // Beside the program; of other sources beside those, which go with them.
    let program = std::env::current_exe()?;
    let out = if std::env::var_os("CUDA_KERNELS").is_some() { Some(folder) } else { program.parent().and_then(Path::parent) };
    let out = out.unwrap_or(Path::new(".")).join("cuda-emulated");
    std::fs::create_dir_all(&out)?;
    let mut headers = DefaultHasher::new();
    (compiler, FLAGS).hash(&mut headers);
    for header in [
        "device.h",
        "tensor.h",
        "common.h",
        "weights.h",
        "product.h",
        "attention.h",
        "attend_wide.h",
        "states.h",
        "emulate/cuda.h",
        "emulate/block.h",
        "emulate/types.h",
    ] {
        std::fs::read(folder.join(header))?.hash(&mut headers);
    }
    let object = |name: &str| -> std::io::Result<PathBuf> {
        let source = folder.join(format!("{name}.cu"));
        let mut hasher = headers.clone();
        std::fs::read(&source)?.hash(&mut hasher);
        let target = out.join(format!("{}-{:016x}.o", name.replace('/', "-"), hasher.finish()));
        make(&target, |target| Command::new(compiler).args(FLAGS).arg(&source).arg("-o").arg(target).output())?;
        Ok(target)
    };
    let objects = std::thread::scope(|scope| {
        let builds: Vec<_> = SOURCES.iter().map(|name| scope.spawn(|| object(name))).collect();
        builds
            .into_iter()
            .map(|build| build.join().unwrap_or_else(|_| Err(std::io::Error::other("a build ended early"))))
            .collect::<std::io::Result<Vec<_>>>()
    })?;
    let mut hasher = DefaultHasher::new();
    objects.hash(&mut hasher);
    let library = out.join(format!("kernels-{:016x}.so", hasher.finish()));
    make(&library, |target| Command::new(compiler).args(["-shared", "-pthread", "-o"]).arg(target).args(&objects).output())?;
    Ok(library)
}

/// Makes a file under another name first: test programs may run side by side.
fn make(target: &Path, run: impl Fn(&Path) -> std::io::Result<std::process::Output>) -> std::io::Result<()> {
    if target.exists() {
        return Ok(());
    }
    let part = target.with_extension(format!("{}.part", std::process::id()));
    let output = run(&part)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).chars().take(3000).collect::<String>();
        return Err(std::io::Error::other(format!("{} was not built: {said}", target.display())));
    }
    std::fs::rename(part, target)
}
