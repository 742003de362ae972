use std::collections::BTreeMap;

use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Golden {
    id: u32,
    blocks: String,
    numbers: String,
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

fn goldens() -> BTreeMap<String, Golden> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("handler-tests/fixtures/gguf/blocks.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// What the `gguf` package reads in the same bytes, at even and at odd addresses.
#[test]
fn blocks_are_the_references_numbers() {
    let goldens = goldens();
    for (name, golden) in &goldens {
        let kind = TensorType::of(golden.id).unwrap();
        assert_eq!(kind.name(), name);
        let blocks = base64(&golden.blocks);
        let want: Vec<f32> = base64(&golden.numbers).as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        assert_eq!(want.len(), blocks.len() / kind.bytes() * kind.block(), "{name}");
        for shift in 0..2 {
            let shifted = [&[7u8; 2][..shift], &blocks].concat();
            let mut got = Vec::new();
            kind.blocks().unwrap().decode(&shifted[shift..], &mut got);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!((got - want).abs() <= 1e-6 * want.abs(), "{name}, number {i}: {got}, expected {want}");
            }
            assert_eq!(got.len(), want.len(), "{name}");
        }
    }
    let read: Vec<&str> = TYPES.iter().filter_map(|(id, ..)| TensorType::of(*id)?.blocks()).map(|blocks| blocks.kind.name()).collect();
    assert_eq!(read.len(), goldens.len(), "{read:?}");
    let readable = super::super::READABLE;
    assert!(read.iter().all(|name| readable.contains(name)), "{readable}");
}
