//! The rules of a grammar in Lark, each written once.

use std::collections::HashMap;
use std::fmt::Write;

use crate::api::enforce::marks::{self, Piece};
use crate::api::grammar::lark_string;
use crate::text::tokenizer::Tokenizer;

/// Any text.
const ANY: &str = "/(?s:.*)/";

/// Rules so far. What is written by this is named by numbers: rules `r0`, terminals `T0`.
pub struct Lark<'a> {
    tokenizer: &'a Tokenizer,
    text: String,
    /// The names of what is written.
    known: HashMap<String, String>,
    names: usize,
}

impl<'a> Lark<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, text: String::new(), known: HashMap::new(), names: 0 }
    }

    pub fn text(self) -> String {
        self.text
    }

    /// A rule with this name.
    pub fn named(&mut self, name: &str, body: &str) {
        let _ = writeln!(self.text, "{name}: {body}");
    }

    /// The name of a rule that is yet to be written.
    pub fn name(&mut self) -> String {
        self.names += 1;
        format!("r{}", self.names - 1)
    }

    pub fn rule(&mut self, body: &str) -> String {
        self.once("r", "", body)
    }

    /// A text that ends as soon as it can.
    fn lazy(&mut self, body: &str) -> String {
        self.once("r", "[lazy]", body)
    }

    /// A regular language: in it `&` is both, and `~` is not.
    pub fn terminal(&mut self, body: &str) -> String {
        self.once("T", "", body)
    }

    fn once(&mut self, letter: &str, attributes: &str, body: &str) -> String {
        let key = format!("{letter}{attributes}: {body}");
        if let Some(name) = self.known.get(&key) {
            return name.clone();
        }
        let name = format!("{letter}{}", self.names);
        self.names += 1;
        let _ = writeln!(self.text, "{name}{attributes}: {body}");
        self.known.insert(key, name.clone());
        name
    }

    pub fn mark(&self, text: &str) -> String {
        marks::lark(self.tokenizer, text)
    }

    /// The terminal of all texts of this one that hold none of these.
    fn without(&mut self, content: &str, texts: &[&str]) -> String {
        let any = self.terminal(ANY);
        let texts: Vec<String> = texts.iter().map(|text| lark_string(text)).collect();
        let held = self.terminal(&format!("{any} ({}) {any}", texts.join(" | ")));
        self.terminal(&format!("{content} & ~{held}"))
    }

    /// Text up to a mark, which is the first of these, and the mark. None of them stands in the text. `content`: the terminal of the texts;
    /// `None` = any.
    pub fn text_until(&mut self, content: Option<&str>, marks: &[&str]) -> String {
        let mark = marks.first().copied().unwrap_or_default();
        let any = self.terminal(ANY);
        let written = self.mark(mark);
        match (marks::pieces(self.tokenizer, mark).as_slice(), content) {
            ([Piece::Text(_)], _) => {
                let text = self.without(content.unwrap_or(&any), marks);
                self.lazy(&format!("{text} {written}"))
            }
            // The text may hold what the mark begins with, but then no special token comes.
            ([Piece::Text(first), ..], None) => {
                let rest = marks.iter().filter_map(|mark| mark.strip_prefix(first)).map(lark_string).collect::<Vec<_>>();
                let rest = self.terminal(&format!("({}) {any}", rest.join(" | ")));
                let text = self.terminal(&format!("{any} & ~{rest}"));
                let part = self.lazy(&format!("{text} {}", lark_string(first)));
                format!("{part}+ {}", self.mark(&mark[first.len()..]))
            }
            ([Piece::Text(first), ..], Some(content)) => {
                let text = self.without(content, &[&first[..first.chars().next().map_or(0, char::len_utf8)]]);
                format!("{text} {written}")
            }
            _ => {
                let text = self.without(content.unwrap_or(&any), marks);
                format!("{text} {written}")
            }
        }
    }
}
