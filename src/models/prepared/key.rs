//! What a prepared copy was made of, as a short text: another model, another version of this program, another processor give another one.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use crate::checkpoint::files::ModelFiles;

/// Raised when packed bytes change their meaning within a version of the program.
const LAYOUT: &str = "1";
/// Read whole from the beginning of each file: names, shapes and offsets of its tensors.
const HEAD: usize = 1 << 20;
/// So many places of each file are looked at, of this many bytes. To read all of it would take as long as to convert it.
const SAMPLES: u64 = 32;
const SAMPLE: usize = 4096;

/// The key of these weights with whatever else decides how they are packed. `None` when a file cannot be read, which loading will say better.
pub fn of(files: &ModelFiles, weights: &[PathBuf], besides: &[&str]) -> Option<String> {
    let mut hash = Sha256::new();
    let mut add = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    [LAYOUT, env!("CARGO_PKG_VERSION")].iter().chain(besides).for_each(|text| add(text.as_bytes()));
    add(&files.read("config.json").ok()?.unwrap_or_default());
    for path in weights {
        sample(path, &mut add).ok()?;
    }
    let digest = hash.finalize();
    Some(digest[..12].iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Size, time of the last change, head, and pages spread over the file.
fn sample(path: &PathBuf, add: &mut impl FnMut(&[u8])) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let data = file.metadata()?;
    let changed = data.modified()?.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    add(&data.len().to_le_bytes());
    add(&changed.to_le_bytes());
    let mut bytes = Vec::with_capacity(HEAD);
    file.by_ref().take(HEAD as u64).read_to_end(&mut bytes)?;
    add(&bytes);
    for place in 1..=SAMPLES {
        file.seek(SeekFrom::Start((data.len() * place / SAMPLES).saturating_sub(SAMPLE as u64)))?;
        bytes.clear();
        file.by_ref().take(SAMPLE as u64).read_to_end(&mut bytes)?;
        add(&bytes);
    }
    Ok(())
}
