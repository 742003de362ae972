//! Marks as tokens: a mark may be a special token, text, or both in a row.

use crate::api::grammar::{lark_string, tokens_within};
use crate::error::Failure;
use crate::text::tokenizer::{Special, Tokenizer};

/// A part of a mark.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    Special(u32),
    Text(&'a str),
}

/// The special tokens in a text, and the text between them.
pub fn pieces<'a>(tokenizer: &Tokenizer, text: &'a str) -> Vec<Piece<'a>> {
    let special_at = |at: usize| {
        let here = tokenizer.special_tokens().iter().filter(|name| !name.is_empty() && text[at..].starts_with(name.as_str()));
        let name = here.max_by_key(|name| name.len())?;
        Some((tokenizer.token_id(name)?, name.len()))
    };
    let (mut pieces, mut from, mut at) = (Vec::new(), 0, 0);
    while let Some(character) = text[at..].chars().next() {
        let Some((id, len)) = special_at(at) else {
            at += character.len_utf8();
            continue;
        };
        if from < at {
            pieces.push(Piece::Text(&text[from..at]));
        }
        pieces.push(Piece::Special(id));
        at += len;
        from = at;
    }
    if from < at {
        pieces.push(Piece::Text(&text[from..at]));
    }
    pieces
}

/// The tokens of a mark, as they stand inside an answer.
pub fn ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Failure> {
    let mut ids = Vec::new();
    for piece in pieces(tokenizer, text) {
        match piece {
            Piece::Special(id) => ids.push(id),
            Piece::Text(text) => match tokens_within(tokenizer, text) {
                Some(tokens) => ids.extend(tokens),
                None => ids.extend(tokenizer.encode(text, Special::Text)?),
            },
        }
    }
    Ok(ids)
}

/// A mark in Lark; empty for an empty one.
pub fn lark(tokenizer: &Tokenizer, text: &str) -> String {
    let part = |piece: Piece<'_>| match piece {
        Piece::Special(id) => format!("<[{id}]>"),
        Piece::Text(text) => lark_string(text),
    };
    pieces(tokenizer, text).into_iter().map(part).collect::<Vec<_>>().join(" ")
}
