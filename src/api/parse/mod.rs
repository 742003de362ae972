//! Parsers: the text of a sequence → typed deltas. A model's answer is one string in which thoughts and tool calls are marked in the
//! model's own way; a parser takes them apart as the text comes.
//!
//! `reasoning` and `tools/table` are the formats; [`answer::Parsing`] is what a request wants of them.

use crate::api::delta::DeltaKind;

pub mod answer;
mod harmony;
pub mod marks;
pub mod reasoning;
pub mod tools;

/// Whether a row of a table is called so, in any case and with hyphens or underscores.
fn is_called(asked: &str, name: &str, aliases: &[&str]) -> bool {
    let asked = asked.to_ascii_lowercase().replace('-', "_");
    asked == name || aliases.contains(&asked.as_str())
}

/// All names of such rows, for messages.
fn all_names(rows: impl Iterator<Item = (&'static str, &'static [&'static str])>) -> Vec<&'static str> {
    rows.flat_map(|(name, aliases)| std::iter::once(name).chain(aliases.iter().copied())).collect()
}

/// Whether a chat template holds all strings of one of the groups.
fn shows(template: &str, groups: &[&[&str]]) -> bool {
    groups.iter().any(|group| group.iter().all(|mark| template.contains(mark)))
}

/// Takes the text of one sequence apart. Its deltas are of the kinds `Text`, `Reasoning` and `ToolCall`.
pub trait Parser: Send {
    /// Adds what is certain after this piece of text; what may yet turn out to be a mark waits.
    fn push(&mut self, text: String, deltas: &mut Vec<DeltaKind>);

    /// The sequence has ended: adds what still waited.
    fn finish(&mut self, deltas: &mut Vec<DeltaKind>);

    /// The text so far ends in a thought.
    fn in_reasoning(&self) -> bool {
        false
    }
}

/// For models and routes whose text is the answer as it stands.
pub struct PlainText;

impl Parser for PlainText {
    fn push(&mut self, text: String, deltas: &mut Vec<DeltaKind>) {
        if !text.is_empty() {
            deltas.push(DeltaKind::Text(text));
        }
    }

    fn finish(&mut self, _: &mut Vec<DeltaKind>) {}
}
