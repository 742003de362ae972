//! Which bytes each token stands for in running text.

use crate::text::sentencepiece::{Kind, Model, SPACE};
use crate::text::tokenizer::added::Added;

/// The bytes of all tokens, one after another.
#[derive(Default)]
pub struct TokenBytes {
    bytes: Vec<u8>,
    /// Start and length by id; `None` where an id has no token.
    ranges: Vec<Option<(u32, u32)>>,
}

impl TokenBytes {
    pub fn of_sentencepiece(model: &Model<'_>, added: &Added) -> Self {
        let mut table = Self { bytes: Vec::with_capacity(model.pieces.len() * 6), ranges: Vec::with_capacity(model.pieces.len()) };
        for (id, piece) in (0u32..).zip(&model.pieces) {
            match piece.kind {
                Kind::Byte(byte) => table.set(id, &[byte]),
                Kind::Control | Kind::Unknown => table.set(id, piece.text.as_bytes()),
                Kind::Normal | Kind::UserDefined | Kind::Unused if piece.text.contains(SPACE) => {
                    table.set(id, piece.text.replace(SPACE, " ").as_bytes());
                }
                Kind::Normal | Kind::UserDefined | Kind::Unused => table.set(id, piece.text.as_bytes()),
            }
        }
        for (name, &id) in added.names().iter().zip(added.ids()) {
            table.set(id, name.as_bytes());
        }
        table
    }

    pub fn set(&mut self, id: u32, bytes: &[u8]) {
        let id = id as usize;
        if id >= self.ranges.len() {
            self.ranges.resize(id + 1, None);
        }
        self.ranges[id] = Some((self.bytes.len() as u32, bytes.len() as u32));
        self.bytes.extend_from_slice(bytes);
    }

    pub fn get(&self, id: u32) -> Option<&[u8]> {
        let (start, len) = (*self.ranges.get(id as usize)?)?;
        self.bytes.get(start as usize..(start + len) as usize)
    }

    /// One more than the greatest id with a token.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }
}
