use proptest::prelude::*;
use serde_json::json;

use super::writer::{Tensor, Value as Written, write};
use super::*;
use crate::checkpoint::{Checkpoint, Slice, Tiles};

fn text(key: &str, text: &str) -> (String, Written) {
    (key.to_owned(), Written::Text(text.to_owned()))
}

fn number(key: &str, number: u32) -> (String, Written) {
    (key.to_owned(), Written::U32(number))
}

fn metadata() -> Vec<(String, Written)> {
    vec![
        text("general.architecture", "llama"),
        number("llama.block_count", 1),
        number("llama.context_length", 64),
        number("llama.embedding_length", 32),
        number("llama.feed_forward_length", 64),
        number("llama.attention.head_count", 2),
        ("llama.attention.layer_norm_rms_epsilon".to_owned(), Written::F32(1e-5)),
        text("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.tokens".to_owned(), Written::Texts(["<unk>", "<s>", "</s>", "a", "<|im_end|>"].map(str::to_owned).into())),
        ("tokenizer.ggml.scores".to_owned(), Written::Floats(vec![0.0; 5])),
        ("tokenizer.ggml.token_type".to_owned(), Written::Integers(vec![2, 3, 3, 1, 3])),
        number("tokenizer.ggml.bos_token_id", 1),
        number("tokenizer.ggml.eos_token_id", 2),
        text("tokenizer.chat_template", "{{ messages }}"),
        ("general.sampling.temp".to_owned(), Written::F32(0.5)),
        ("a.list".to_owned(), Written::Flags(vec![true, false])),
    ]
}

fn tensors() -> Vec<Tensor> {
    let f32s = |count: usize| (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect::<Vec<u8>>();
    vec![
        ("token_embd.weight".to_owned(), vec![5, 32], 0, f32s(160)),
        ("output_norm.weight".to_owned(), vec![32], 0, f32s(32)),
        ("blk.0.attn_q.weight".to_owned(), vec![32, 32], 8, vec![1; 34 * 32]),
        ("blk.0.ffn_up.weight".to_owned(), vec![2, 32], 16, Vec::new()),
    ]
}

/// A file without the tensor of a type that is not read.
fn file() -> Vec<u8> {
    write(&metadata(), &tensors()[..3])
}

fn files(bytes: Vec<u8>) -> Result<ModelFiles, Failure> {
    model_files("m", "test", vec![("m.gguf".to_owned(), Source::Made(bytes.into()))])
}

#[test]
fn what_is_written_is_read() {
    let bytes = file();
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.text("general.architecture").unwrap(), Some("llama"));
    assert_eq!(header.integer("llama.block_count").unwrap(), Some(1));
    let flags: Vec<Value<'_>> = header.array("a.list").unwrap().unwrap().iter().collect();
    assert_eq!(flags, [Value::Bool(true), Value::Bool(false)]);
    assert_eq!(header.tensor("token_embd.weight").unwrap().shape, [5, 32]);
    assert!(header.text("llama.block_count").unwrap_err().contains("\"llama.block_count\" must be a string"));
    let files = files(bytes).unwrap();
    let config = files.read_json("config.json").unwrap().unwrap();
    for (key, value) in
        [("model_type", json!("llama")), ("vocab_size", json!(5)), ("tie_word_embeddings", json!(true)), ("head_dim", json!(16))]
    {
        assert_eq!(config[key], value, "{key}");
    }
    let tokenizer = files.read_json("tokenizer_config.json").unwrap().unwrap();
    let expected = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}", "add_bos_token": true});
    assert_eq!(tokenizer, expected);
    assert_eq!(files.read_json("generation_config.json").unwrap().unwrap(), json!({"eos_token_id": [2, 4], "temperature": 0.5}));
}

#[test]
fn rows_and_parts_of_rows_of_quantized_tensors() {
    let block = |scale: f32, first: i8| {
        let numbers: Vec<u8> = (0..32).map(|i| (first + i) as u8).collect();
        [&half::f16::from_f32(scale).to_le_bytes()[..], &numbers].concat()
    };
    let bytes: Vec<u8> = (0..6).flat_map(|i| block(1.0 + i as f32, i as i8)).collect();
    let mut all = tensors();
    all[2] = ("blk.0.attn_q.weight".to_owned(), vec![3, 64], 8, bytes);
    let files = files(write(&metadata(), &all[..3])).unwrap();
    let checkpoint = Checkpoint::open(&files, None).unwrap();
    assert_eq!(checkpoint.gguf_types().as_deref(), Some("Q8_0, F32"));
    let value = |row: usize, column: usize| {
        let block = row * 2 + column / 32;
        (1.0 + block as f32) * (block + column % 32) as f32
    };
    let name = "model.layers.0.self_attn.q_proj.weight";
    for (rows, columns) in [(0..3, 0..64), (1..3, 32..64), (2..3, 5..40)] {
        let slice = Slice { rows: rows.clone(), columns: columns.clone(), ..Slice::whole(name, 3, 64, false) };
        let matrix = checkpoint.matrix(&[slice]).unwrap();
        assert!(matrix.is_quantized() && !matrix.is_bf16());
        let mut tiles = Tiles::<f32>::default();
        for (at, row) in rows.enumerate() {
            let want: Vec<f32> = columns.clone().map(|column| value(row, column)).collect();
            assert_eq!(matrix.row(at, &mut tiles), want);
        }
    }
    let turned = Checkpoint::matrix(&checkpoint, &[Slice::whole(name, 64, 3, true)]);
    assert!(turned.err().unwrap().message.contains("as quantized tensors have it"));
}

#[test]
fn experts_are_taken_apart() {
    let naming = |tensor: &super::header::Tensor<'_>| {
        let bytes = write(&[text("general.architecture", "llama"), number("llama.expert_count", 2)], &[]);
        Naming::of(&Header::parse(&bytes).unwrap()).unwrap().parts(tensor).unwrap()
    };
    let kind = TensorType::of(0).unwrap();
    let tensor = super::header::Tensor { name: "blk.3.ffn_up_exps.weight", kind, shape: vec![2, 4, 8], range: 100..100 + 256 };
    let names: Vec<_> = naming(&tensor).into_iter().map(|part| (part.name, part.shape, part.range)).collect();
    let name = |expert: usize, part: &str| format!("model.layers.3.block_sparse_moe.experts.{expert}.{part}.weight");
    assert_eq!(names, [(name(0, "w3"), vec![4, 8], 100..228), (name(1, "w3"), vec![4, 8], 228..356)]);
    let fused = super::header::Tensor { name: "blk.3.ffn_gate_up_exps.weight", ..tensor };
    let names: Vec<_> = naming(&fused).into_iter().map(|part| (part.name, part.shape, part.range)).collect();
    let want = [("w1", 0, 100), ("w1", 1, 228), ("w3", 0, 164), ("w3", 1, 292)];
    assert_eq!(names, want.map(|(part, expert, from)| (name(expert, part), vec![2, 8], from..from + 64)));
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let change = |key: &str, value: Option<Written>| {
        let mut metadata = metadata();
        metadata.retain(|(other, _)| other != key);
        metadata.extend(value.map(|value| (key.to_owned(), value)));
        files(write(&metadata, &tensors()[..3])).err().map(|failure| failure.message).unwrap_or_default()
    };
    for (key, value, words) in [
        (
            "general.architecture",
            Some(Written::Text("mamba".into())),
            "general.architecture \"mamba\" is not supported in GGUF files; this version serves llama",
        ),
        ("general.architecture", None, "it has no metadata \"general.architecture\""),
        ("general.architecture", Some(Written::U32(1)), "\"general.architecture\" must be a string"),
        ("llama.block_count", None, "\"llama.block_count\" is missing"),
        ("llama.block_count", Some(Written::U32(u32::MAX)), "\"llama.block_count\" is 4294967295, more than any model has"),
        ("llama.attention.key_length", Some(Written::U32(u32::MAX)), "\"llama.attention.key_length\" is 4294967295, more than"),
        ("llama.embedding_length", Some(Written::U32(64)), "is not the width of token_embd.weight ([5, 32])"),
        ("llama.attention.head_count", Some(Written::Integers(vec![2, 4])), "differs from layer to layer"),
        ("llama.attention.head_count", Some(Written::F32(f32::NAN)), "is NaN"),
        ("llama.rope.dimension_sections", Some(Written::Integers(vec![8, 12, 12, 0])), "positions of several dimensions"),
        ("tokenizer.ggml.bos_token_id", Some(Written::U32(9)), "\"tokenizer.ggml.bos_token_id\" is 9, and the vocabulary has 5 tokens"),
        ("general.alignment", Some(Written::U32(12)), "\"general.alignment\" must be a power of two"),
        ("split.count", Some(Written::U32(3)), "one of 3 files of a model, of which 1 are there"),
    ] {
        let message = change(key, value);
        assert!(message.contains(words) && message.contains("m.gguf of m"), "{key}: {message}");
    }
    // A tensor of a type that is not read is refused where it is asked for.
    let mut all = tensors();
    all[3] = ("blk.0.ffn_up.weight".to_owned(), vec![1, 256], 17, vec![0; 74]);
    let files = files(write(&metadata(), &all)).unwrap();
    let checkpoint = Checkpoint::open(&files, None).unwrap();
    let failure = checkpoint.matrix(&[Slice::whole("model.layers.0.mlp.up_proj.weight", 1, 256, false)]).err().unwrap();
    assert!(failure.message.contains("has type IQ2_XS; F32, F16"), "{failure}");
}

#[test]
fn lies_are_named() {
    let good = file();
    let at = |needle: &[u8]| good.windows(needle.len()).position(|window| window == needle).unwrap() + needle.len();
    let patch = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        Header::parse(&file).unwrap_err()
    };
    let huge = u64::MAX.to_le_bytes();
    // After a key: the type of its value. After a tensor's name: dimensions, sizes, type, offset.
    let (tokens, norm) = (at(b"tokenizer.ggml.tokens"), at(b"output_norm.weight"));
    for (place, bytes, words) in [
        (0, &b"GGML"[..], "not a GGUF file"),
        (4, &1u32.to_le_bytes(), "version 1 is not supported"),
        (4, &3u32.to_be_bytes(), "big-endian"),
        (8, &huge, "tensor 3 of 18446744073709551615"),
        (16, &huge, " of 18446744073709551615: "),
        (24, &huge, "the key of metadata entry 0"),
        (tokens, &99u32.to_le_bytes(), "metadata \"tokenizer.ggml.tokens\": type 99 of a value is not known"),
        (tokens + 4, &9u32.to_le_bytes(), "arrays of arrays"),
        (tokens + 8, &huge, "metadata \"tokenizer.ggml.tokens\": string"),
        (at(b"a.list") + 4, &12u32.to_le_bytes(), "the name of tensor 0 of 3"),
        (at(b"a.list") + 16, &[2], "metadata \"a.list\": 2 is neither true"),
        (norm, &5u32.to_le_bytes(), "tensor output_norm.weight: it has 5 dimensions"),
        (norm + 4, &huge, "tensor output_norm.weight: a tensor of shape"),
        (norm + 4, &(1u64 << 40).to_le_bytes(), "tensor output_norm.weight: its 4398046511104 bytes"),
        (norm + 4, &0u64.to_le_bytes(), "a dimension of 0"),
        (norm + 12, &5u32.to_le_bytes(), "type 5 of a tensor is not known"),
        (norm + 12, &12u32.to_le_bytes(), "cannot be cut into blocks of 256 (Q4_K)"),
        (norm + 16, &1u64.to_le_bytes(), "no multiple of the alignment (32)"),
        (norm + 16, &0u64.to_le_bytes(), "lie over each other"),
        (norm + 16, &(u64::MAX - 31).to_le_bytes(), "do not lie in the file"),
    ] {
        let message = patch(place, bytes);
        assert!(message.contains(words), "byte {place}: {message}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever is done to a file, reading it ends in a header or an error; and what a header says lies in the file.
    #[test]
    fn damage_never_panics(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8), cut in any::<prop::sample::Index>(), cuts in any::<bool>()) {
        let mut bytes = file();
        // Flips in the head alone: in the numbers they would show nothing.
        let head = bytes.len().min(1_200);
        for (at, value) in flips {
            let at = at.index(head);
            bytes[at] = value;
        }
        if cuts {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(header) = Header::parse(&bytes) {
            prop_assert!(header.tensors.iter().all(|tensor| tensor.range.end <= bytes.len()));
            prop_assert!(header.metadata.len() <= bytes.len() && header.tensors.len() <= bytes.len());
        }
        if let Ok(files) = files(bytes) {
            let _ = Checkpoint::open(&files, None);
            let _ = crate::text::tokenizer::Tokenizer::load(&files);
            let _ = crate::models::families::Model::from_files(&files);
        }
    }
}
