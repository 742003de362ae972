//! Writes GGUF files for tests.

use super::formats::TensorType;

/// A value of the metadata.
#[derive(Debug, Clone)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Integers(Vec<i32>),
    Flags(Vec<bool>),
    Bytes(Vec<u8>),
}

/// A tensor: its name, its shape with the slowest dimension first, its type's number and its bytes.
pub type Tensor = (String, Vec<usize>, u32, Vec<u8>);

fn text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn array<T>(kind: u32, values: &[T], out: &mut Vec<u8>, write: impl Fn(&T, &mut Vec<u8>)) {
    out.extend(9u32.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend((values.len() as u64).to_le_bytes());
    values.iter().for_each(|value| write(value, out));
}

fn value(value: &Value, out: &mut Vec<u8>) {
    let mut plain = |kind: u32, bytes: &[u8]| {
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::U32(number) => plain(4, &number.to_le_bytes()),
        Value::F32(number) => plain(6, &number.to_le_bytes()),
        Value::Bool(flag) => plain(7, &[u8::from(*flag)]),
        Value::Text(string) => {
            plain(8, &[]);
            text(string, out);
        }
        Value::Texts(texts) => array(8, texts, out, |string, out| text(string, out)),
        Value::Floats(numbers) => array(6, numbers, out, |number, out| out.extend(number.to_le_bytes())),
        Value::Integers(numbers) => array(5, numbers, out, |number, out| out.extend(number.to_le_bytes())),
        Value::Bytes(bytes) => array(0, bytes, out, |byte, out| out.push(*byte)),
        Value::Flags(flags) => array(7, flags, out, |flag, out| out.push(u8::from(*flag))),
    }
}

/// The bytes of a file.
pub fn write(metadata: &[(String, Value)], tensors: &[Tensor]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, of_key) in metadata {
        text(key, &mut out);
        value(of_key, &mut out);
    }
    let mut offset = 0;
    for (name, shape, kind, bytes) in tensors {
        let (kind, numbers) = (TensorType::of(*kind).unwrap(), shape.iter().product::<usize>());
        assert_eq!(numbers / kind.block() * kind.bytes(), bytes.len(), "{name}");
        text(name, &mut out);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| out.extend((*size as u64).to_le_bytes()));
        out.extend(tensors.iter().find(|tensor| tensor.0 == *name).unwrap().2.to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += bytes.len().next_multiple_of(32);
    }
    for (.., bytes) in tensors {
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(bytes);
    }
    out
}
