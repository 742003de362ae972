//! The demo model from a folder, with its copy in another.

use std::fs;

use tempfile::TempDir;

use super::*;
use crate::checkpoint::demo;
use crate::config::DeviceChoice;
use crate::models::quality::logits_of;
use crate::models::runner::ModelRunner;

struct World {
    model: TempDir,
    copies: TempDir,
    settings: EngineSettings,
}

impl World {
    fn new(quantization: Quantization) -> Self {
        let (model, copies) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        for (name, source) in demo::files().iter() {
            let Source::Embedded(bytes) = source else { panic!("{name}") };
            fs::write(model.path().join(name), bytes).unwrap();
        }
        let settings = EngineSettings {
            device: DeviceChoice::Cpu,
            threads: Some(2),
            kv_cache_gb: Some(0.02),
            quantization,
            prepared_cache: PreparedCache::Folder(copies.path().into()),
            prepared_writing: PreparedWriting::Now,
            ..Default::default()
        };
        Self { model, copies, settings }
    }

    fn files(&self) -> ModelFiles {
        let entries = fs::read_dir(self.model.path()).unwrap().map(|entry| entry.unwrap());
        let files = entries.map(|entry| (entry.file_name().into_string().unwrap(), Source::Path(entry.path()))).collect();
        ModelFiles::new("some/demo", "a folder", files)
    }

    fn logits(&self) -> Vec<Vec<f32>> {
        let mut runner = ModelRunner::load(&self.files(), || Ok(usize::MAX), &self.settings).unwrap();
        logits_of(&mut runner, &[5, 77, 300, 12, 9]).unwrap()
    }

    fn copies(&self) -> Vec<PathBuf> {
        fs::read_dir(self.copies.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    fn copy(&self) -> PathBuf {
        let copies = self.copies();
        assert_eq!(copies.len(), 1, "{copies:?}");
        copies[0].clone()
    }
}

#[test]
fn the_second_start_computes_the_same_from_the_copy() {
    for quantization in [Quantization::AsStored, Quantization::Wint8, Quantization::Wint4] {
        let world = World::new(quantization);
        let first = world.logits();
        let copy = world.copy();
        let written = fs::metadata(&copy).unwrap().modified().unwrap();
        assert_eq!(world.logits(), first, "{quantization:?}");
        assert_eq!(fs::metadata(&copy).unwrap().modified().unwrap(), written, "not written twice");
    }
}

/// Not only is it opened: the weights are those of the copy.
#[test]
fn the_copys_weights_are_the_ones_used() {
    let world = World::new(Quantization::Wint8);
    let (first, copy) = (world.logits(), world.copy());
    let opened = Opened::read(&copy).unwrap().unwrap();
    let other = opened.matrices.iter().enumerate().map(|(index, (described, _, len))| {
        let mut map = memmap2::MmapMut::map_anon(*len).unwrap();
        map.copy_from_slice(&opened.get(index, described, *len).unwrap());
        if index == 1 {
            // The scale of a block of weights in the first layer.
            map[1] ^= 0x04;
        }
        (described.clone(), PackedBytes::Made(Arc::new(map)))
    });
    file::write(&copy, &other.collect::<Vec<_>>(), file::FAST).unwrap();
    assert_ne!(world.logits(), first);
}

#[test]
fn a_damaged_copy_is_made_again() {
    let world = World::new(Quantization::Wint8);
    let (first, copy) = (world.logits(), world.copy());
    let whole = fs::read(&copy).unwrap();
    let damages: [fn(&mut Vec<u8>); 6] = [
        |bytes| bytes[123_456] ^= 1,
        |bytes| bytes.truncate(bytes.len() / 2),
        |bytes| bytes.clear(),
        |bytes| {
            let at = bytes.len() - 30;
            bytes[at] ^= 1;
        },
        |bytes| {
            let at = bytes.len() - 20;
            bytes[at..at + 8].fill(0xff);
        },
        |bytes| *bytes.last_mut().unwrap() = b'2',
    ];
    for (number, damage) in damages.into_iter().enumerate() {
        let mut bytes = whole.clone();
        damage(&mut bytes);
        fs::write(&copy, &bytes).unwrap();
        assert_eq!(world.logits(), first, "damage {number}");
        assert_eq!(fs::read(&copy).unwrap(), whole, "damage {number}: written anew");
    }
}

#[test]
fn another_model_or_form_has_another_copy() {
    let mut world = World::new(Quantization::Wint8);
    world.logits();
    world.settings.quantization = Quantization::Wint4;
    world.logits();
    assert_eq!(world.copies().len(), 2);
    // The same shape with other weights: the last byte of the file is one of a weight.
    let path = world.model.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    world.logits();
    assert_eq!(world.copies().len(), 3);
}

#[test]
fn a_folder_that_cannot_be_written_and_off_change_nothing() {
    let mut world = World::new(Quantization::Wint8);
    let first = world.logits();
    let file = world.copies.path().join("file");
    fs::write(&file, "").unwrap();
    world.settings.prepared_cache = PreparedCache::Folder(file.join("below"));
    assert_eq!(world.logits(), first);
    world.settings.prepared_cache = PreparedCache::Off;
    assert_eq!(world.logits(), first);
    world.settings.prepared_cache = PreparedCache::Beside;
    let before = world.files().iter().count();
    assert_eq!(world.logits(), first);
    assert_eq!(world.files().iter().count(), before, "a small model gets none beside it");
}

/// Beside a model older copies of the same kind go when a new one comes, and what was left half written goes after a while.
#[test]
fn what_is_replaced_is_removed() {
    let world = World::new(Quantization::Wint8);
    let settings = EngineSettings { prepared_cache: PreparedCache::Beside, ..world.settings.clone() };
    let copy = PreparedCopy::open(&world.files(), &settings).unwrap();
    let path = copy.path.clone();
    let kind = path.file_name().unwrap().to_str().unwrap().rsplitn(3, '.').nth(2).unwrap().to_owned();
    let at = |name: String| world.model.path().join(name);
    let (older, other_kind) = (at(format!("{kind}.00ff.prepared")), at("model.wint4-some-16.00ff.prepared".to_owned()));
    let (left, new) = (at(format!("{kind}.00ff.prepared.1.tmp")), at(format!("{kind}.00ff.prepared.2.tmp")));
    [&older, &other_kind, &left, &new].into_iter().for_each(|path| fs::write(path, "x").unwrap());
    fs::File::open(&left).unwrap().set_modified(SystemTime::now() - 2 * STALE).unwrap();
    copy.remove_stale(world.model.path());
    assert!(!older.exists() && !left.exists() && other_kind.exists() && new.exists());
}
