//! The tables of `docs/gpu-roofline.md`: what the sizing backend counts of a step, and the time that takes at a device's published rates.
//! `UPDATE_DOCS=1` writes them.

use std::fmt::Write;
use std::sync::Arc;

use super::Cuda;
use crate::sizing::{Operation, Sizing};
use crate::testing::plain_attention;
use crate::*;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/gpu-roofline.md");
const BEGIN: &str = "<!-- made by src/kernels/cuda/tests/roofline.rs -->\n";
const END: &str = "<!-- end -->\n";

/// Published rates: name, bytes and bf16 operations a second, without sparsity.
const DEVICES: [(&str, f64, f64); 6] = [
    ("A100 80 GB", 2.04e12, 312e12),
    ("L4", 0.30e12, 121e12),
    ("4090", 1.01e12, 165e12),
    ("H100", 3.35e12, 989e12),
    ("H200", 4.8e12, 989e12),
    ("B200", 8.0e12, 2250e12),
];

struct Model {
    name: &'static str,
    layers: usize,
    hidden: usize,
    intermediate: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
}

const ERNIE: Model = Model { name: "ernie-0.3b", layers: 18, hidden: 1024, intermediate: 3072, heads: 16, kv_heads: 2, vocab: 103_424 };
const LLAMA: Model = Model { name: "llama-8b", layers: 32, hidden: 4096, intermediate: 14336, heads: 32, kv_heads: 8, vocab: 128_256 };

/// A matrix that nobody reads.
struct Shape(usize, usize);

impl MatrixSource for Shape {
    type Reader = ();

    fn rows(&self) -> usize {
        self.0
    }
    fn width(&self) -> usize {
        self.1
    }
    fn is_bf16(&self) -> bool {
        true
    }
    fn describe(&self, _: usize) -> String {
        String::new()
    }
    fn row_f32<'r>(&'r self, _: usize, _: &'r mut ()) -> &'r [f32] {
        &[]
    }
    fn row_bf16<'r>(&'r self, _: usize, _: &'r mut ()) -> &'r [half::bf16] {
        &[]
    }
}

/// Operations of a step of `rows` sequences with `len` tokens each.
fn step(model: &Model, format: WeightFormat, rows: usize, len: usize, context: usize) -> Vec<Operation> {
    let mut device = Sizing::<Cuda>::default();
    let attention = plain_attention(model.heads, model.kv_heads, 128);
    let linear = |device: &Sizing<Cuda>, n: usize, k: usize, columns| Linear {
        weight: device.weight(&Shape(n, k), Some(format), columns).unwrap(),
        bias: None,
    };
    let (t, h) = (rows * len, model.hidden);
    let norm = Norm { kind: NormKind::Rms, weight: h, bias: None, eps: 1e-5 };
    let table = linear(&device, model.vocab, h, Columns::Plain);
    let (qkv, out) = (linear(&device, attention.qkv_width(), h, Columns::Plain), linear(&device, h, attention.q_width(), Columns::Plain));
    let gate_up = linear(&device, 2 * model.intermediate, h, Columns::Gated);
    let down = linear(&device, h, model.intermediate, Columns::Plain);
    let mut cache = device.kv_cache(attention.kv_shape(rows * context.div_ceil(32), 32)).unwrap();
    let batch: Vec<BatchRow> = (0..rows).map(|row| BatchRow { start: row * len, len, context, blocks: Arc::default() }).collect();
    let zeros = vec![0; t];
    device
        .begin(&Batch {
            tokens: &zeros,
            positions: &zeros,
            slots: &zeros,
            types: &[],
            rows: &batch,
            ropes: &[],
            states: &Default::default(),
        })
        .unwrap();
    let buffer = |device: &Sizing<Cuda>| device.buffer(t, h).unwrap();
    let (mut x, mut y, mut z, mut q) = (buffer(&device), buffer(&device), buffer(&device), buffer(&device));
    let weights = AttentionWeights::default();
    device.embed(&table.weight, 1.0, &mut x).unwrap();
    for _ in 0..model.layers {
        device.norm(&x, &norm, &mut y).unwrap();
        device.linear(&y, &qkv, Epilogue::Store, &mut q).unwrap();
        device.rope_and_store(&mut q, &attention, &weights, &mut cache).unwrap();
        device.attend(&q, &attention, &weights, &cache, &mut z).unwrap();
        device.linear(&z, &out, Epilogue::Add(1.0), &mut x).unwrap();
        device.norm(&x, &norm, &mut y).unwrap();
        device.linear(&y, &gate_up, Epilogue::Gated(Activation::Silu), &mut z).unwrap();
        device.linear(&z, &down, Epilogue::Add(1.0), &mut x).unwrap();
    }
    device.norm(&x, &norm, &mut y).unwrap();
    device.pick(&y, &(0..rows).collect::<Vec<_>>(), &mut z).unwrap();
    device.linear(&z, &table, Epilogue::Store, &mut q).unwrap();
    device.operations
}

fn table(text: &mut String, model: &Model, format: WeightFormat, (rows, len, context): (usize, usize, usize)) {
    let what = if len == 1 { format!("{rows} sequence(s), one token each, context {context}") } else { format!("a prompt of {len}") };
    writeln!(text, "\n### {}, {}, {what}\n", model.name, format.name()).unwrap();
    writeln!(
        text,
        "| operation | launches | MB read | G products | {} | run on a GPU |",
        DEVICES.map(|(name, ..)| format!("{name}, µs")).join(" | ")
    )
    .unwrap();
    writeln!(text, "|---|---|---|---|{}---|", "---|".repeat(DEVICES.len())).unwrap();
    let operations = step(model, format, rows, len, context);
    let (mut names, mut all) = (Vec::new(), [0.0; DEVICES.len()]);
    operations.iter().for_each(|operation| {
        if !names.contains(&operation.name) {
            names.push(operation.name)
        }
    });
    for name in names {
        let of: Vec<&Operation> = operations.iter().filter(|operation| operation.name == name).collect();
        let (bytes, products) =
            (of.iter().map(|one| one.bytes_read).sum::<usize>() as f64, of.iter().map(|one| one.products).sum::<usize>() as f64);
        let times = DEVICES.map(|(_, bandwidth, rate)| f64::max(bytes / bandwidth, 2.0 * products / rate) * 1e6);
        all.iter_mut().zip(times).for_each(|(all, time)| *all += time);
        let times = times.map(|time| format!("{time:.1}")).join(" | ");
        writeln!(text, "| {name} | {} | {:.1} | {:.2} | {times} | not run on a GPU |", of.len(), bytes / 1e6, products / 1e9).unwrap();
    }
    let rate = all.map(|time| format!("**{:.0}** ({:.0} tok/s)", time, (rows * len) as f64 / time * 1e6)).join(" | ");
    writeln!(text, "| all | {} | | | {rate} | not run on a GPU |", operations.len()).unwrap();
}

#[test]
fn the_tables_are_what_the_sizing_backend_counts() {
    let mut text = String::new();
    for (model, format, shape) in [
        (&ERNIE, WeightFormat::Bf16, (1, 1, 1024)),
        (&ERNIE, WeightFormat::Bf16, (256, 1, 256)),
        (&LLAMA, WeightFormat::Bf16, (1, 1, 1024)),
        (&LLAMA, WeightFormat::Int4, (1, 1, 1024)),
        (&LLAMA, WeightFormat::Bf16, (256, 1, 640)),
        (&LLAMA, WeightFormat::Bf16, (1, 8192, 8192)),
    ] {
        table(&mut text, model, format, shape);
    }
    let page = std::fs::read_to_string(FILE).unwrap();
    let (before, rest) = page.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let wanted = format!("{before}{BEGIN}{text}\n{END}{after}");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(FILE, &wanted).unwrap();
        return;
    }
    assert!(
        page == wanted,
        "docs/gpu-roofline.md is not what the sizing backend counts: UPDATE_DOCS=1 cargo test --workspace --lib -- roofline"
    );
}
