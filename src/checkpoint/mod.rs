//! Where weights come from: files → tensors by name, as they are stored. Knows no model and no device.
//!
//! A [`Checkpoint`] gives encoded rows of a tensor, or of a range of its rows and columns: what shards, formats and parts for several
//! devices need is the same call.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::error::Failure;

pub mod demo;
pub mod files;
pub mod gguf;
pub mod hub;
mod packed;
mod stored;

use files::{ModelFiles, Source};
pub use stored::{Number, StoredMatrix, Tiles};
use stored::{Stored, StoredPart};

/// Bytes of one file.
enum Bytes {
    Mapped(memmap2::Mmap),
    Embedded(&'static [u8]),
    Made(Arc<[u8]>),
}

impl Bytes {
    fn open(source: &Source) -> Result<Self, Failure> {
        let path = match source {
            Source::Embedded(bytes) => return Ok(Bytes::Embedded(bytes)),
            Source::Made(bytes) => return Ok(Bytes::Made(bytes.clone())),
            Source::Path(path) => path,
        };
        let failed = |error: std::io::Error| Failure::internal(format!("weights file {}: {error}", path.display()));
        let file = std::fs::File::open(path).map_err(failed)?;
        // SAFETY: weight files are not changed while they are in use; a writer that truncated one would kill us with SIGBUS, as with every mapped file.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(failed)?;
        Ok(Bytes::Mapped(map))
    }

    fn get(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Embedded(bytes) => bytes,
            Bytes::Made(bytes) => bytes,
        }
    }
}

struct Entry {
    file: usize,
    stored: StoredType,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
    /// It stands for several tensors, which together are this matrix.
    packed: Option<Box<packed::Packed>>,
}

/// A tensor's type, with the name that the file gives it; `None`: it is not one that weights are read from.
#[derive(Clone)]
struct StoredType {
    name: Cow<'static, str>,
    stored: Option<Stored>,
}

/// An opened checkpoint.
pub struct Checkpoint {
    name: String,
    files: Vec<Bytes>,
    file_names: Vec<String>,
    entries: BTreeMap<String, Entry>,
    /// What tensors are called in GGUF files, if these are some.
    gguf: Option<gguf::Naming>,
    /// The configuration says that the weights are quantized, and by which method.
    quantized: Option<String>,
    /// The matrices that lie in several tensors each, if there are some.
    packed: Option<packed::Found>,
    used: Mutex<BTreeSet<String>>,
}

/// A tensor that is a matrix, or some of its rows and columns.
#[derive(Debug, Clone)]
pub struct Slice {
    /// Its whole name.
    pub name: String,
    /// Rows of the whole tensor.
    pub outputs: usize,
    /// Columns of the whole tensor.
    pub inputs: usize,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    /// Of those rows every one, or every second.
    pub step: usize,
    /// Stored as `[inputs, outputs]`.
    pub transposed: bool,
    /// One of several such matrices in a tensor, by its number, and how many there are. Where they are not transposed they are rows of one.
    pub stack: Option<(usize, usize)>,
}

impl Slice {
    /// All of a tensor.
    pub fn whole(name: impl Into<String>, outputs: usize, inputs: usize, transposed: bool) -> Self {
        let (rows, columns) = (0..outputs, 0..inputs);
        Self { name: name.into(), outputs, inputs, rows, columns, step: 1, transposed, stack: None }
    }

    fn stored_shape(&self) -> [usize; 2] {
        if self.transposed { [self.inputs, self.outputs] } else { [self.outputs, self.inputs] }
    }
}

impl Checkpoint {
    /// Maps the files and reads their headers. `quantized`: the method that the configuration names, for messages.
    pub fn open(files: &ModelFiles, quantized: Option<&str>) -> Result<Self, Failure> {
        let mut checkpoint = Self {
            name: files.name.clone(),
            files: Vec::new(),
            file_names: Vec::new(),
            entries: BTreeMap::new(),
            gguf: None,
            quantized: quantized.map(str::to_owned),
            packed: None,
            used: Mutex::default(),
        };
        for file in files.weight_files()? {
            let source = files.get(&file).ok_or_else(|| Failure::internal(format!("{} ({}) lacks {file}", files.name, files.origin)))?;
            let bytes = Bytes::open(source)?;
            match files::is_gguf(&file) {
                true => checkpoint.add_gguf(&file, bytes)?,
                false => checkpoint.add_file(&file, bytes)?,
            }
            checkpoint.file_names.push(file);
        }
        if quantized.is_some()
            && let Some(config) = files.model_config()?
        {
            let Self { name, files, file_names, entries, packed, .. } = &mut checkpoint;
            *packed = packed::gather(entries, files, file_names, name, &config)?;
        }
        Ok(checkpoint)
    }

    fn add_file(&mut self, file: &str, bytes: Bytes) -> Result<(), Failure> {
        let broken = |problem: String| Failure::internal(format!("weights file {file} of {}: {problem}", self.name));
        let (header, metadata) = safetensors::SafeTensors::read_metadata(bytes.get()).map_err(|error| broken(error.to_string()))?;
        for (name, info) in metadata.tensors() {
            // The header's length field and the header come before the data.
            let (from, to) = (info.data_offsets.0 + header + 8, info.data_offsets.1 + header + 8);
            // That shape and type make these bytes was checked when the header was read. Types that cannot be read are refused where such
            // a tensor is asked for: others (positions, masks, statistics) may lie beside the weights.
            if to > bytes.get().len() {
                return Err(broken(format!("tensor {name}: the file is cut short or its header is wrong")));
            }
            let stored = StoredType { name: format!("{:?}", info.dtype).into(), stored: Stored::of(info.dtype) };
            let entry = Entry { file: self.files.len(), stored, shape: info.shape.clone(), range: from..to, packed: None };
            self.entries.insert(name.clone(), entry);
        }
        self.files.push(bytes);
        Ok(())
    }

    fn add_gguf(&mut self, file: &str, bytes: Bytes) -> Result<(), Failure> {
        let broken = |problem: String| Failure::internal(format!("GGUF file {file} of {}: {problem}", self.name));
        let header = gguf::Header::parse(bytes.get()).map_err(broken)?;
        let naming = match &self.gguf {
            Some(naming) => *naming,
            // Of a set of files the first one alone says what kind of model it is.
            None => *self.gguf.insert(gguf::Naming::of(&header).map_err(broken)?),
        };
        let mut entries = Vec::new();
        for tensor in &header.tensors {
            let stored = StoredType { name: tensor.kind.name().into(), stored: Stored::of_gguf(tensor.kind) };
            for part in naming.parts(tensor).map_err(broken)? {
                let (file, stored) = (self.files.len(), stored.clone());
                entries.push((part.name, Entry { file, stored, shape: part.shape, range: part.range, packed: None }));
            }
        }
        for (name, entry) in entries {
            if let Some(other) = self.entries.insert(name.clone(), entry) {
                let place = if other.file == self.files.len() { "twice in it" } else { "in another file too" };
                return Err(broken(format!("tensor {name} is {place}")));
            }
        }
        self.files.push(bytes);
        Ok(())
    }

    /// Some matrices are stored at few bits.
    pub fn is_quantized(&self) -> bool {
        self.entries.values().any(|entry| matches!(entry.stored.stored, Some(Stored::Blocks(_) | Stored::Packed)))
    }

    /// The types of a GGUF file's matrices, by how many numbers they hold; `None`: it is no such file.
    pub fn gguf_types(&self) -> Option<String> {
        self.gguf?;
        let mut types: BTreeMap<&str, usize> = BTreeMap::new();
        for entry in self.entries.values().filter(|entry| entry.shape.len() > 1) {
            *types.entry(&entry.stored.name).or_default() += entry.shape.iter().product::<usize>();
        }
        let mut types: Vec<_> = types.into_iter().collect();
        types.sort_by_key(|(_, numbers)| std::cmp::Reverse(*numbers));
        Some(types.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(", "))
    }

    /// The method and the forms of matrices that are quantized, in Safetensors, for messages; `None`: there are none.
    pub fn packed_forms(&self) -> Option<String> {
        let found = self.packed.as_ref()?;
        let forms: Vec<String> = found.forms.iter().map(|(form, count)| format!("{count} matrices of {form}")).collect();
        Some(format!("quantized by {}: {}", found.method, forms.join(", ")))
    }

    /// A tensor that is quantized, in Safetensors. Such a matrix is `[out, in]`, whatever the model's layout.
    pub fn is_packed(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.packed.is_some())
    }

    /// The model's name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// A tensor's dimensions as they are stored.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// The matrix of these parts one below the other, all of one width.
    pub fn matrix(&self, parts: &[Slice]) -> Result<StoredMatrix<'_>, Failure> {
        let width = parts.first().map_or(0, |part| part.columns.len());
        let parts = parts.iter().map(|slice| self.part(slice, width)).collect::<Result<Vec<_>, _>>()?;
        Ok(StoredMatrix { model: &self.name, width, parts })
    }

    fn part(&self, slice: &Slice, width: usize) -> Result<StoredPart<'_>, Failure> {
        if let Some(stack) = slice.stack.filter(|_| slice.transposed) {
            return self.part_of_stack(slice, stack);
        }
        let expected = slice.stored_shape();
        let (entry, stored) = self.entry(&slice.name, &expected)?;
        // Several matrices in one tensor lie one below the other.
        let is_stack = entry.shape.len() > 2 && !slice.transposed;
        let rows = entry.shape.split_last().map_or(0, |(_, rows)| rows.iter().product());
        let shape = if is_stack { [rows, entry.shape.last().copied().unwrap_or(0)] } else { expected };
        if shape != expected || (!is_stack && entry.shape != expected) {
            let layout = if slice.transposed { "[in, out]" } else { "[out, in]" };
            return Err(self.wrong_shape(&slice.name, entry, &format!("{expected:?} ({layout})")));
        }
        if slice.transposed && matches!(stored, Stored::Blocks(_) | Stored::Packed) {
            return Err(self.wrong_shape(
                &slice.name,
                entry,
                &format!("{:?} ([out, in], as quantized tensors have it)", [slice.outputs, slice.inputs]),
            ));
        }
        if slice.rows.end > slice.outputs || slice.columns.end > slice.inputs || slice.columns.len() != width {
            return Err(Failure::internal(format!("{}: {slice:?} does not lie inside its tensor", self.name)));
        }
        Ok(self.stored_part(slice, entry, stored, self.bytes(entry)))
    }

    /// One of a tensor's matrices `[inputs, outputs]`.
    fn part_of_stack(&self, slice: &Slice, (number, count): (usize, usize)) -> Result<StoredPart<'_>, Failure> {
        let expected = [count, slice.inputs, slice.outputs];
        let (entry, stored) = self.entry(&slice.name, &expected)?;
        if entry.shape != expected || matches!(stored, Stored::Blocks(_) | Stored::Packed) {
            return Err(self.wrong_shape(&slice.name, entry, &format!("{expected:?} ([experts, in, out])")));
        }
        let bytes = self.bytes(entry);
        let size = bytes.len() / count.max(1);
        let one = bytes.get(number * size..(number + 1) * size).unwrap_or_default();
        Ok(self.stored_part(slice, entry, stored, one))
    }

    fn stored_part<'s>(&'s self, slice: &Slice, entry: &'s Entry, stored: Stored, bytes: &'s [u8]) -> StoredPart<'s> {
        StoredPart {
            name: slice.name.clone(),
            bytes,
            stored,
            packed: entry.packed.as_ref().map(|packed| packed::View::new(packed, &self.files)),
            shape: (slice.outputs, slice.inputs),
            rows: slice.rows.clone(),
            step: slice.step.max(1),
            first_column: slice.columns.start,
            transposed: slice.transposed,
        }
    }

    /// A vector in f32; dimensions of 1 around it do not count.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, Failure> {
        let (entry, stored) = self.entry(name, &[len])?;
        if entry.shape.iter().copied().filter(|size| *size != 1).ne((len != 1).then_some(len)) {
            return Err(self.wrong_shape(name, entry, &format!("[{len}]")));
        }
        let mut values = vec![0f32; len];
        let part = StoredPart {
            name: name.to_owned(),
            bytes: self.bytes(entry),
            stored,
            packed: None,
            shape: (1, len),
            rows: 0..1,
            step: 1,
            first_column: 0,
            transposed: false,
        };
        part.copy(0, &mut values, len);
        Ok(values)
    }

    /// A tensor that is used from now on, and its type.
    fn entry(&self, name: &str, shape: &[usize]) -> Result<(&Entry, Stored), Failure> {
        let entry = self.entries.get(name).ok_or_else(|| self.missing(&[name], shape))?;
        let stored = entry.stored.stored.ok_or_else(|| {
            let (model, dtype, hint) = (&self.name, &entry.stored.name, self.quantization_hint());
            let readable = if self.gguf.is_some() { gguf::READABLE } else { "F32, F16, BF16 (or U16 holding bf16 bits)" };
            Failure::internal(format!("{model}: tensor {name} has type {dtype}; {readable} can be read{hint}"))
        })?;
        if let Ok(mut used) = self.used.lock() {
            used.insert(name.to_string());
        }
        Ok((entry, stored))
    }

    fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file].get()[entry.range.clone()]
    }

    /// The error of a tensor that is under none of these names.
    pub fn missing(&self, names: &[&str], shape: &[usize]) -> Failure {
        let (model, names, hint) = (&self.name, names.join(" or "), self.quantization_hint());
        Failure::internal(format!("{model}: tensor {names} is missing (expected shape {shape:?}){hint}"))
    }

    /// The likely reason, when a tensor is not there or not a plain one.
    fn quantization_hint(&self) -> String {
        match &self.quantized {
            Some(method) => format!(
                ". Its config.json names quantization_config ({method}), and it is not packed as {} are: use the model's unquantized weights",
                packed::READABLE
            ),
            None => String::new(),
        }
    }

    fn wrong_shape(&self, name: &str, entry: &Entry, expected: &str) -> Failure {
        Failure::internal(format!("{}: tensor {name} has shape {:?}, expected {expected}", self.name, entry.shape))
    }

    /// Tensors of the files that nothing asked for.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.lock().map(|used| used.clone()).unwrap_or_default();
        self.entries.keys().filter(|name| !used.contains(*name)).cloned().collect()
    }
}
