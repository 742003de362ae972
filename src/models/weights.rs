//! Checkpoints: safetensors in the Hugging Face or the Paddle layout, with fused or separate projections, under either prefix.
//!
//! Everything becomes `[out, in]`, row-major, q/k/v and gate/up fused. On the CPU bf16 stays bf16 (it widens without loss inside the
//! kernels) and everything else becomes f32; on a GPU everything becomes bf16.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};

use crate::error::Failure;
use crate::models::architecture::Architecture;
use crate::models::files::{ModelFiles, Source};

mod stored;

use stored::{Stored, StoredPart};
pub use stored::{StoredMatrix, Tiles};

/// Bytes of one file.
enum Bytes {
    Mapped(memmap2::Mmap),
    Embedded(&'static [u8]),
}

impl Bytes {
    fn open(source: &Source) -> Result<Self, Failure> {
        let path = match source {
            Source::Embedded(bytes) => return Ok(Bytes::Embedded(bytes)),
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
        }
    }
}

struct Entry {
    file: usize,
    stored: Stored,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// How linear weights lie in the file: decided once per checkpoint, since a square matrix does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orientation {
    /// `[out, in]`: Hugging Face.
    OutIn,
    /// `[in, out]`: Paddle.
    InOut,
}

/// An opened checkpoint.
pub struct Checkpoint {
    name: String,
    files: Vec<Bytes>,
    entries: BTreeMap<String, Entry>,
    /// `ernie.` or `model.`.
    prefix: String,
    pub orientation: Orientation,
    used: Mutex<BTreeSet<String>>,
}

/// A part of a fused matrix: its name and its output width.
type Part<'a> = (&'a str, usize);

impl Checkpoint {
    /// Maps the files, reads their headers, and finds out prefix and orientation.
    pub fn open(files: &ModelFiles, shape: &Architecture) -> Result<Self, Failure> {
        let mut checkpoint = Self {
            name: files.name.clone(),
            files: Vec::new(),
            entries: BTreeMap::new(),
            prefix: String::new(),
            orientation: Orientation::OutIn,
            used: Mutex::default(),
        };
        for file in shard_names(files)? {
            let source = files.get(&file).ok_or_else(|| {
                Failure::internal(format!("{} ({}): the index names {file}, which is not there", files.name, files.origin))
            })?;
            checkpoint.add_file(&file, Bytes::open(source)?)?;
        }
        checkpoint.prefix = ["model.", "ernie.", ""]
            .into_iter()
            .find(|prefix| checkpoint.entries.contains_key(&format!("{prefix}embed_tokens.weight")))
            .ok_or_else(|| {
                Failure::internal(format!(
                    "{}: no tensor embed_tokens.weight (tried the prefixes \"model.\", \"ernie.\" and none)",
                    files.name
                ))
            })?
            .to_string();
        checkpoint.orientation = checkpoint.find_orientation(shape);
        Ok(checkpoint)
    }

    fn add_file(&mut self, file: &str, bytes: Bytes) -> Result<(), Failure> {
        let broken = |problem: String| Failure::internal(format!("weights file {file} of {}: {problem}", self.name));
        let (header, metadata) = safetensors::SafeTensors::read_metadata(bytes.get()).map_err(|error| broken(error.to_string()))?;
        for (name, info) in metadata.tensors() {
            let stored = match info.dtype {
                safetensors::Dtype::F32 => Stored::F32,
                safetensors::Dtype::F16 => Stored::F16,
                safetensors::Dtype::BF16 | safetensors::Dtype::U16 => Stored::Bf16,
                other => {
                    return Err(broken(format!(
                        "tensor {name} has type {other:?}; F32, F16, BF16 (or U16 holding bf16 bits) are supported"
                    )));
                }
            };
            // The header's length field and the header come before the data.
            let (from, to) = (info.data_offsets.0 + header + 8, info.data_offsets.1 + header + 8);
            if to > bytes.get().len() || to - from != info.shape.iter().product::<usize>() * stored.width() {
                return Err(broken(format!("tensor {name}: the file is cut short or its header is wrong")));
            }
            self.entries.insert(name.clone(), Entry { file: self.files.len(), stored, shape: info.shape.clone(), range: from..to });
        }
        self.files.push(bytes);
        Ok(())
    }

    /// From the first matrix that is not square.
    fn find_orientation(&self, a: &Architecture) -> Orientation {
        let (h, q, kv, i) = (a.hidden_size, a.q_width(), a.kv_width(), a.intermediate_size);
        let shapes = [
            ("self_attn.k_proj", kv, h),
            ("self_attn.qkv_proj", q + 2 * kv, h),
            ("self_attn.q_proj", q, h),
            ("self_attn.o_proj", h, q),
            ("mlp.down_proj", h, i),
            ("mlp.up_gate_proj", 2 * i, h),
            ("mlp.gate_proj", i, h),
        ];
        for (name, out, input) in shapes {
            if let Some(entry) = self.entries.get(&format!("{}layers.0.{name}.weight", self.prefix)).filter(|_| out != input) {
                if entry.shape == [out, input] {
                    return Orientation::OutIn;
                }
                if entry.shape == [input, out] {
                    return Orientation::InOut;
                }
            }
        }
        Orientation::OutIn
    }

    /// A vector under the prefix, such as a norm's weight, in f32 on the CPU and bf16 on a GPU.
    pub fn vector(&self, name: &str, len: usize, device: &Device) -> Result<Tensor, Failure> {
        let full = format!("{}{name}", self.prefix);
        let entry = self.entry(&[&full], &[len])?;
        if entry.shape != [len] {
            return Err(self.wrong_shape(&full, entry, &format!("[{len}]")));
        }
        let mut values = vec![0f32; len];
        let bytes = &self.files[entry.file].get()[entry.range.clone()];
        StoredPart { name: full, bytes, stored: entry.stored, rows: 1, transposed: false }.copy(0, &mut values, len);
        let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
        Tensor::from_vec(values, len, device).and_then(|t| t.to_dtype(dtype)).map_err(device_failure)
    }

    /// The embedding, `[vocab, hidden]` in every layout.
    pub fn embedding(&self, a: &Architecture) -> Result<StoredMatrix<'_>, Failure> {
        let name = format!("{}embed_tokens.weight", self.prefix);
        self.stack(&[(&name, a.vocab_size)], a.hidden_size, Some(false))
    }

    /// The LM head when it is not the embedding. Paddle stores an untied one as `[hidden, vocab]`.
    pub fn head(&self, a: &Architecture) -> Result<StoredMatrix<'_>, Failure> {
        let name = if self.entries.contains_key("lm_head.weight") {
            "lm_head.weight".to_string()
        } else {
            format!("{}lm_head.weight", self.prefix)
        };
        let transposed = self.entries.get(&name).map(|entry| entry.shape == [a.hidden_size, a.vocab_size] && a.hidden_size != a.vocab_size);
        self.stack(&[(&name, a.vocab_size)], a.hidden_size, transposed)
    }

    /// A matrix `[Σ out, input]` from the separate `parts`, or from one stored tensor `fused` that holds them in this order.
    /// Names are without prefix and without `.weight`.
    pub fn matrix(&self, fused: Option<&str>, parts: &[Part<'_>], input: usize) -> Result<StoredMatrix<'_>, Failure> {
        let full = |name: &str| format!("{}{name}.weight", self.prefix);
        if let Some(fused) = fused.map(full).filter(|name| self.entries.contains_key(name)) {
            return self.stack(&[(&fused, parts.iter().map(|part| part.1).sum())], input, None);
        }
        let parts: Vec<(String, usize)> = parts.iter().map(|(name, out)| (full(name), *out)).collect();
        if let Some((missing, out)) = parts.iter().find(|(name, _)| !self.entries.contains_key(name)) {
            let fused: Vec<String> = fused.map(full).into_iter().collect();
            let names: Vec<&str> = std::iter::once(missing.as_str()).chain(fused.iter().map(String::as_str)).collect();
            return Err(self.missing(&names, &[*out, input]));
        }
        let parts: Vec<Part<'_>> = parts.iter().map(|(name, out)| (name.as_str(), *out)).collect();
        self.stack(&parts, input, None)
    }

    /// Biases `[Σ out]` belonging to [`Checkpoint::matrix`].
    pub fn bias(&self, fused: Option<&str>, parts: &[Part<'_>], device: &Device) -> Result<Tensor, Failure> {
        if let Some(fused) = fused.filter(|name| self.entries.contains_key(&format!("{}{name}.bias", self.prefix))) {
            return self.vector(&format!("{fused}.bias"), parts.iter().map(|part| part.1).sum(), device);
        }
        let parts = parts.iter().map(|(name, out)| self.vector(&format!("{name}.bias"), *out, device)).collect::<Result<Vec<_>, _>>()?;
        Tensor::cat(&parts, 0).map_err(device_failure)
    }

    fn stack(&self, parts: &[Part<'_>], width: usize, transposed: Option<bool>) -> Result<StoredMatrix<'_>, Failure> {
        let mut matrix = StoredMatrix { model: &self.name, width, parts: Vec::new() };
        for (name, rows) in parts {
            let (entry, transposed) = self.checked(name, *rows, width, transposed)?;
            let bytes = &self.files[entry.file].get()[entry.range.clone()];
            matrix.parts.push(StoredPart { name: (*name).to_string(), bytes, stored: entry.stored, rows: *rows, transposed });
        }
        Ok(matrix)
    }

    /// The entry of a matrix whose shape is right, and whether it must be transposed.
    fn checked(&self, name: &str, out: usize, input: usize, transposed: Option<bool>) -> Result<(&Entry, bool), Failure> {
        let entry = self.entry(&[name], &[out, input])?;
        let transposed = transposed.unwrap_or(self.orientation == Orientation::InOut);
        let expected = if transposed { [input, out] } else { [out, input] };
        if entry.shape != expected {
            return Err(self.wrong_shape(name, entry, &format!("{expected:?} ({:?})", self.orientation)));
        }
        Ok((entry, transposed))
    }

    fn entry(&self, names: &[&str], shape: &[usize]) -> Result<&Entry, Failure> {
        for name in names {
            if let Some(entry) = self.entries.get(*name) {
                if let Ok(mut used) = self.used.lock() {
                    used.insert((*name).to_string());
                }
                return Ok(entry);
            }
        }
        Err(self.missing(names, shape))
    }

    fn missing(&self, names: &[&str], shape: &[usize]) -> Failure {
        Failure::internal(format!("{}: tensor {} is missing (expected shape {shape:?})", self.name, names.join(" or ")))
    }

    fn wrong_shape(&self, name: &str, entry: &Entry, expected: &str) -> Failure {
        Failure::internal(format!("{}: tensor {name} has shape {:?}, expected {expected}", self.name, entry.shape))
    }

    /// Tensors of the file that nothing asked for, multi-token-prediction heads left out.
    pub fn unused(&self) -> Vec<String> {
        let used = self.used.lock().map(|used| used.clone()).unwrap_or_default();
        self.entries.keys().filter(|name| !used.contains(*name) && !name.contains("mtp_")).cloned().collect()
    }

    /// A line for the log: `model. prefix, [out, in]`.
    pub fn describe(&self) -> String {
        format!(
            "prefix \"{}\", {}",
            self.prefix,
            if self.orientation == Orientation::OutIn { "[out, in] (Hugging Face layout)" } else { "[in, out] (Paddle layout)" }
        )
    }
}

/// `model.safetensors`, or the shards that `model.safetensors.index.json` names.
fn shard_names(files: &ModelFiles) -> Result<Vec<String>, Failure> {
    if let Some(index) = files.read_json("model.safetensors.index.json")? {
        let map = index["weight_map"]
            .as_object()
            .ok_or_else(|| Failure::internal(format!("{}: model.safetensors.index.json has no weight_map", files.name)))?;
        let shards: BTreeSet<String> = map.values().filter_map(|file| file.as_str().map(str::to_string)).collect();
        return Ok(shards.into_iter().collect());
    }
    if files.get("model.safetensors").is_some() {
        return Ok(vec!["model.safetensors".into()]);
    }
    let found: Vec<&str> = files.iter().map(|(name, _)| name).collect();
    let hint = if found.iter().any(|name| name.ends_with(".pdparams") || name.ends_with(".bin")) {
        "; pickled weights (.pdparams, .bin) are not supported"
    } else {
        ""
    };
    Err(Failure::internal(format!("{} ({}) has no model.safetensors{hint}", files.name, files.origin)))
}

pub(crate) fn device_failure(error: candle_core::Error) -> Failure {
    Failure::internal(format!("device: {error}"))
}
