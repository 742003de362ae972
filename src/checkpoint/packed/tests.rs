//! Sets of tensors that reference implementations packed, against the numbers that they read in them
//! (`handler-tests/fixtures/quantized/matrices.json`), and sets that are broken.

use half::{bf16, f16};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::super::files::{ModelFiles, Source};
use super::super::{Checkpoint, Slice, Tiles};
use crate::error::Failure;

#[derive(Deserialize, Clone)]
struct Case {
    name: String,
    quantization_config: Json,
    dtype: String,
    weight: String,
    tensors: serde_json::Map<String, Json>,
    numbers: Json,
}

fn cases() -> Vec<Case> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("handler-tests/fixtures/quantized/matrices.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn case(name: &str) -> Case {
    cases().into_iter().find(|case| case.name == name).unwrap()
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".iter().position(|d| *d == c).unwrap() as u32;
    let group = |group: &[u8]| {
        let digits: Vec<u8> = group.iter().copied().filter(|c| *c != b'=').collect();
        let bits = digits.iter().fold(0, |bits, c| bits << 6 | digit(*c)) << (6 * (4 - digits.len()));
        bits.to_be_bytes()[1..digits.len()].to_vec()
    };
    text.as_bytes().chunks(4).flat_map(group).collect()
}

fn floats(tensor: &Json) -> Vec<f32> {
    let bytes = base64(tensor["data"].as_str().unwrap());
    let pairs = || bytes.as_chunks::<2>().0.iter();
    match tensor["dtype"].as_str().unwrap() {
        "F16" => pairs().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
        "BF16" => pairs().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
    }
}

impl Case {
    fn files(&self) -> ModelFiles {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, tensor) in &self.tensors {
            let from = data.len();
            data.extend(base64(tensor["data"].as_str().unwrap()));
            header.insert(name.clone(), json!({"dtype": tensor["dtype"], "shape": tensor["shape"], "data_offsets": [from, data.len()]}));
        }
        let header = serde_json::to_vec(&header).unwrap();
        let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
        let config = json!({"quantization_config": self.quantization_config, "dtype": self.dtype});
        let config = serde_json::to_vec(&config).unwrap();
        let files = [("config.json", config), ("model.safetensors", bytes)];
        ModelFiles::new("m", "test", files.map(|(name, bytes)| (name.to_owned(), Source::Made(bytes.into()))).into())
    }

    fn open(&self) -> Result<Checkpoint, Failure> {
        Checkpoint::open(&self.files(), Some("test"))
    }

    fn sizes(&self) -> (usize, usize) {
        let shape: Vec<usize> = serde_json::from_value(self.numbers["shape"].clone()).unwrap();
        let (width, rows) = shape.split_last().unwrap();
        (rows.iter().product(), *width)
    }

    fn change(mut self, end: &str, change: impl Fn(&mut Json)) -> Self {
        let name = self.tensors.keys().find(|name| name.ends_with(end)).unwrap().clone();
        change(&mut self.tensors[&name]);
        self
    }

    fn without(mut self, end: &str) -> Self {
        let name = self.tensors.keys().find(|name| name.ends_with(end)).unwrap().clone();
        self.tensors.shift_remove(&name);
        self
    }

    fn with_config(mut self, key: &str, value: Json) -> Self {
        self.quantization_config[key] = value;
        self
    }

    /// The error, which names the file, the tensor and what is wrong.
    #[track_caller]
    fn fails(&self, words: &[&str]) {
        let message = self.open().err().unwrap().message;
        for word in words {
            assert!(message.contains(word), "{}: {word:?} is not in {message}", self.name);
        }
    }
}

#[test]
fn every_form_is_read_as_its_reference_reads_it() {
    let cases = cases();
    assert!(cases.len() > 40, "{}", cases.len());
    for case in &cases {
        let (name, (rows, width)) = (&case.name, case.sizes());
        let want = floats(&case.numbers);
        let checkpoint = case.open().unwrap();
        assert!(checkpoint.is_packed(&case.weight) && checkpoint.is_quantized(), "{name}");
        assert!(checkpoint.entries.len() == 1, "{name}: {:?}", checkpoint.unused());
        let whole = Slice::whole(&case.weight, rows, width, false);
        let matrix = checkpoint.matrix(std::slice::from_ref(&whole)).unwrap();
        assert_eq!(matrix.is_bf16(), case.numbers["dtype"] == "BF16", "{name}");
        let mut tiles = Tiles::<f32>::default();
        for (row, want) in want.chunks_exact(width).enumerate() {
            assert_eq!(matrix.row(row, &mut tiles), want, "{name}, row {row}");
        }
        // A part of it: every second row, and the columns from an odd one on.
        let part = Slice { rows: 1..rows, step: 2, columns: 5..width - 2, ..whole };
        let part = checkpoint.matrix(&[part]).unwrap();
        let mut tiles = Tiles::<f32>::default();
        assert_eq!(part.rows(), rows / 2, "{name}");
        for row in 0..part.rows() {
            assert_eq!(part.row(row, &mut tiles), &want[(2 * row + 1) * width + 5..][..width - 7], "{name}, part, row {row}");
        }
    }
}

/// What is stored as whole numbers with scales in f16 is held so, without being rounded again.
#[test]
fn whole_numbers_are_held_at_8_bits_without_loss() {
    let mut held = Vec::new();
    for case in cases() {
        let ((rows, width), want) = (case.sizes(), floats(&case.numbers));
        let checkpoint = case.open().unwrap();
        let matrix = checkpoint.matrix(&[Slice::whole(&case.weight, rows, width, false)]).unwrap();
        let (mut values, mut scales, mut exact) = (Vec::new(), Vec::new(), 0);
        for row in 0..rows {
            if !matrix.row_int8(row, &mut values, &mut scales) {
                continue;
            }
            exact += 1;
            assert_eq!((values.len(), scales.len()), (width, width / 32), "{}", case.name);
            for (i, want) in want[row * width..][..width].iter().enumerate() {
                let got = f32::from(values[i]) * scales[i / 32].to_f32();
                // The reference's own numbers are rounded to its type.
                assert!((got - want).abs() <= want.abs() / 256.0, "{}, row {row}: {got}, {want}", case.name);
            }
        }
        if exact == rows {
            held.push(case.name);
        }
    }
    for name in [
        "gptq 4 bits",
        "gptq 4 bits with zeros",
        "gptq 2 bits",
        "awq groups",
        "awq one group",
        "mxfp4",
        "compressed mxfp4",
        "compressed int4 groups",
        "compressed int4 groups with zeros",
        "gptq one group, no list",
    ] {
        assert!(held.iter().any(|held| held == name), "{name}: {held:?}");
    }
    for name in ["fp8 tensor", "bitsandbytes nf4", "gptq 4 bits with zeros in order of activations, v2", "compressed int4 listed groups"] {
        assert!(!held.iter().any(|held| held == name), "{name}");
    }
}

#[test]
fn a_set_that_is_broken_names_file_tensor_and_field() {
    let file = "weights file model.safetensors of m: tensor m.layers.0.mlp.up_proj.";
    for (name, end) in [
        ("fp8 blocks", "weight_scale_inv"),
        ("gptq 4 bits", "scales"),
        ("gptq 4 bits", "qzeros"),
        ("awq groups", "scales"),
        ("compressed int4 groups", "weight_scale"),
        ("compressed int4 groups", "weight_shape"),
        ("compressed int8 by channel", "weight_scale"),
        ("bitsandbytes nf4 nested", "weight.absmax"),
        ("bitsandbytes nf4 nested", "weight.nested_quant_map"),
    ] {
        case(name).without(end).fails(&[file, "is packed by", &format!("up_proj.{end}"), "is missing"]);
    }
    case("mxfp4").without("_scales").fails(&["gate_up_proj_blocks", "gate_up_proj_scales is missing"]);
    let two = |tensor: &mut Json| {
        // As many numbers in other dimensions.
        let shape: Vec<usize> = serde_json::from_value(tensor["shape"].clone()).unwrap();
        tensor["shape"] = json!([shape.iter().product::<usize>() / 2, 2]);
    };
    for (name, end) in [
        ("fp8 blocks", "weight_scale_inv"),
        ("gptq 4 bits", "qzeros"),
        ("gptq 4 bits", "scales"),
        ("gptq 4 bits", "qweight"),
        ("awq groups", "qzeros"),
        ("compressed int4 groups with zeros", "weight_zero_point"),
        ("compressed int4 groups", "weight_packed"),
        ("bitsandbytes nf4", "weight.quant_map"),
    ] {
        case(name).change(end, two).fails(&["model.safetensors", end, "shape"]);
    }
    // Half of the codes.
    let half = |tensor: &mut Json| {
        let shape: Vec<usize> = serde_json::from_value(tensor["shape"].clone()).unwrap();
        let bytes = base64(tensor["data"].as_str().unwrap());
        let text = "AAAA".repeat(bytes.len() / 2 / 3) + ["", "AA==", "AAA="][bytes.len() / 2 % 3];
        tensor["shape"] = json!(shape.iter().enumerate().map(|(i, size)| if i == 0 { size / 2 } else { *size }).collect::<Vec<_>>());
        tensor["data"] = json!(text);
    };
    case("gptq 4 bits").change("qweight", half).fails(&["up_proj.qweight", "shape"]);
    case("awq groups").change("qweight", half).fails(&["up_proj.", "shape"]);
    case("compressed int4 groups").change("weight_packed", half).fails(&["up_proj.weight_", "shape"]);
    case("bitsandbytes nf4").change("up_proj.weight", half).fails(&["up_proj.weight:", "does not hold the codes"]);
    case("mxfp4").change("_scales", two).fails(&["gate_up_proj_scales", "shape"]);
    case("gptq 4 bits").change("scales", |tensor| tensor["dtype"] = json!("I16")).fails(&["up_proj.scales", "type is I16"]);
    case("gptq 4 bits in order of activations, v2".replace(" in", " with zeros in").as_str())
        .change("g_idx", |tensor| tensor["data"] = json!("CQAA".to_owned() + tensor["data"].as_str().unwrap().split_at(4).1))
        .fails(&["up_proj.g_idx", "group", "of 4"]);
    case("compressed int4 groups")
        .change("weight_shape", |tensor| tensor["data"] = json!("////////////////AAAAAA=="))
        .fails(&["up_proj.weight_shape"]);
    case("bitsandbytes nf4").change("nf4", |tensor| tensor["data"] = json!("A".repeat(103) + "=")).fails(&["bitsandbytes__nf4", "JSON"]);
    case("bitsandbytes nf4").without("nf4").fails(&["up_proj.weight.absmax", "quant_state.bitsandbytes__nf4"]);
}

#[test]
fn what_the_configuration_cannot_mean_is_named_by_its_field() {
    for (name, key, value, words) in [
        ("gptq 4 bits", "bits", json!(5), "2, 3, 4, 8 bits can be read"),
        ("gptq 4 bits", "bits", json!("four"), "is not a whole number"),
        ("gptq 4 bits", "bits", json!(null), "2, 3, 4, 8 bits can be read"),
        ("gptq 4 bits", "checkpoint_format", json!("marlin"), "gptq, gptq_v2 can be read"),
        ("gptq 4 bits", "group_size", json!(0), "is no size"),
        ("awq groups", "bits", json!(3), "4 bits can be read"),
        ("awq groups", "version", json!("gemv"), "gemm can be read"),
        ("fp8 blocks", "weight_block_size", json!([128]), "is not two sizes"),
        ("compressed int4 groups", "format", json!("marlin-24"), "pack-quantized"),
        ("compressed int4 groups", "config_groups", json!(null), "is no object"),
        ("compressed int4 groups", "sparsity_config", json!({"format": "sparse-24-bitmask"}), "is not supported"),
    ] {
        case(name).with_config(key, value).fails(&[&format!("config.json of m: quantization_config, \"{key}\": "), words]);
    }
    // Bits that the tensors do not have.
    case("gptq 4 bits").with_config("bits", json!(8)).fails(&["up_proj.qweight", "8 bits (\"bits\" of quantization_config)"]);
    let groups = json!({"a": {"weights": {"num_bits": 8, "type": "int"}}});
    case("compressed int4 groups").with_config("config_groups", groups.clone()).fails(&["up_proj.weight_packed", "\"num_bits\"", "[8]"]);
    case("compressed fp8 by channel").with_config("config_groups", groups).fails(&["up_proj.weight", "type float"]);
}

/// Codes of another method than the one that is named are not taken for weights.
#[test]
fn another_methods_tensors_are_not_read() {
    let checkpoint = case("gptq 4 bits").with_config("quant_method", json!("aqlm")).open().unwrap();
    let error = checkpoint.matrix(&[Slice::whole("m.layers.0.mlp.up_proj.weight", 32, 128, false)]).err().unwrap();
    assert!(error.message.contains("up_proj.weight is missing") && error.message.contains("fp8, compressed-tensors, gptq"), "{error}");
    let checkpoint = case("compressed int4 groups").with_config("quant_method", json!("fp8")).open().unwrap();
    assert!(!checkpoint.contains("m.layers.0.mlp.up_proj.weight"));
}
