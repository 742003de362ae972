//! The file of a prepared copy: matrices at page boundaries in the order in which they are loaded, then a table of them with checksums, then
//! the table's length and checksum and [`MAGIC`]. A file without its end was not finished.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::Mmap;
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::kernels::cpu::packed::{PackedBytes, PackedShape};

const MAGIC: &[u8; 8] = b"WCPREP01";
/// Length and checksum of the table, and the magic.
const END: usize = 8 + 4 + 8;
const PAGE: usize = 4096;
/// Bytes under one checksum, and written at a time.
const CHUNK: usize = 4 << 20;
/// What a file is called until it is whole.
pub const UNFINISHED: &str = ".tmp";

/// How much of the time a writer writes.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// It rests this many times as long as it has written.
    pub rest: u32,
}

/// For a writer that is waited for.
pub const FAST: Pace = Pace { rest: 0 };
/// For a writer beside requests that are being answered.
pub const GENTLE: Pace = Pace { rest: 3 };

/// A matrix as the table names it, by its first tensor and what it is.
pub fn describe(name: &str, shape: &PackedShape) -> String {
    let PackedShape { n, k, format, columns, run } = shape;
    format!("{name} [{n}, {k}] {format:?} {columns:?} {run}")
}

/// A copy that was found to be whole.
pub struct Opened {
    map: Arc<Mmap>,
    /// Each matrix as [`describe`] says it, with its first byte and its length.
    pub(super) matrices: Vec<(String, usize, usize)>,
}

impl Opened {
    /// Maps a copy and compares all checksums, which also brings it into memory. `None` when there is none.
    pub fn read(path: &Path) -> Result<Option<Self>, String> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        // SAFETY: copies are replaced as a whole and never changed; who cuts one short would end us with SIGBUS, as with every mapped file.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(|error| error.to_string())?;
        let (table, data) = table(&map).ok_or("it has no readable end")?;
        let matrices = matrices(&table, data.len()).ok_or("its table of matrices makes no sense")?;
        let sums: Vec<u32> = serde_json::from_value(table["sums"].clone()).map_err(|error| error.to_string())?;
        let chunks: Vec<&[u8]> = data.chunks(CHUNK).collect();
        if chunks.len() != sums.len() {
            return Err("its checksums are not as many as its parts".to_owned());
        }
        let damaged = chunks.par_iter().zip(&sums).position_any(|(chunk, sum)| crc32fast::hash(chunk) != *sum);
        match damaged {
            Some(part) => Err(format!("part {part} of {} is damaged", chunks.len())),
            None => Ok(Some(Self { matrices, map: Arc::new(map) })),
        }
    }

    /// The bytes of the matrix of this number, if it is that one.
    pub fn get(&self, index: usize, described: &str, bytes: usize) -> Option<PackedBytes> {
        let (found, start, len) = self.matrices.get(index)?;
        let is_it = found == described && *len == bytes;
        is_it.then(|| PackedBytes::Kept(Arc::clone(&self.map), *start..start + len))
    }
}

/// The table at the end of a copy, and what stands before it.
fn table(bytes: &[u8]) -> Option<(Value, &[u8])> {
    let (rest, end) = bytes.split_at_checked(bytes.len().checked_sub(END)?)?;
    let (len, end) = end.split_first_chunk::<8>()?;
    let (sum, magic) = end.split_first_chunk::<4>()?;
    let len = usize::try_from(u64::from_le_bytes(*len)).ok()?;
    let (data, text) = rest.split_at_checked(rest.len().checked_sub(len)?)?;
    let is_whole = magic == MAGIC && crc32fast::hash(text) == u32::from_le_bytes(*sum);
    is_whole.then(|| Some((serde_json::from_slice(text).ok()?, data)))?
}

/// The matrices of a table, all of them within `len` bytes.
fn matrices(table: &Value, len: usize) -> Option<Vec<(String, usize, usize)>> {
    let matrices: Vec<(String, usize, usize)> = serde_json::from_value(table["matrices"].clone()).ok()?;
    let is_inside = |(_, start, size): &(String, usize, usize)| start % PAGE == 0 && start.checked_add(*size).is_some_and(|end| end <= len);
    matrices.iter().all(is_inside).then_some(matrices)
}

/// Writes a copy under another name, and gives it its own when it is whole and on the disk.
pub fn write(path: &Path, all: &[(String, PackedBytes)], pace: Pace) -> io::Result<()> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".{}{UNFINISHED}", std::process::id()));
    let unfinished = Path::new(&unfinished);
    let written = write_to(unfinished, all, pace).and_then(|()| std::fs::rename(unfinished, path));
    if written.is_err() {
        let _ = std::fs::remove_file(unfinished);
    }
    written
}

fn write_to(path: &Path, all: &[(String, PackedBytes)], pace: Pace) -> io::Result<()> {
    let mut out = Chunks { file: File::create(path)?, buffer: Vec::with_capacity(CHUNK), sums: Vec::new(), written: 0, pace };
    let mut matrices = Vec::with_capacity(all.len());
    for (described, bytes) in all {
        matrices.push(json!([described, out.written, bytes.len()]));
        out.put(bytes)?;
        out.put(&vec![0; out.written.next_multiple_of(PAGE) - out.written])?;
    }
    out.end_chunk()?;
    let table = json!({ "matrices": matrices, "sums": out.sums }).to_string();
    let mut file = BufWriter::new(out.file);
    file.write_all(table.as_bytes())?;
    file.write_all(&(table.len() as u64).to_le_bytes())?;
    file.write_all(&crc32fast::hash(table.as_bytes()).to_le_bytes())?;
    file.write_all(MAGIC)?;
    file.into_inner()?.sync_all()
}

/// Writes in chunks, each with its checksum, and rests between them.
struct Chunks {
    file: File,
    buffer: Vec<u8>,
    sums: Vec<u32>,
    /// Bytes put so far.
    written: usize,
    pace: Pace,
}

impl Chunks {
    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == CHUNK {
                self.end_chunk()?;
            }
        }
        Ok(())
    }

    fn end_chunk(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let begin = Instant::now();
        self.sums.push(crc32fast::hash(&self.buffer));
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        // At most as long as a slow disk takes for a few chunks: the process must not seem to hang on it.
        std::thread::sleep((begin.elapsed() * self.pace.rest).min(Duration::from_millis(500)));
        Ok(())
    }
}
