//! The beginning of a call: as soon as its name is known, the call is one.

use super::table::{Named, Tags};
use crate::api::parse::marks::{Found, find};

/// What is known of the text behind an opening mark.
#[derive(Debug, PartialEq)]
pub enum Head {
    /// More text decides.
    Wait,
    /// It is no call.
    Fail,
    Call(Call),
}

/// A call whose name is known.
#[derive(Debug, PartialEq)]
pub struct Call {
    pub name: String,
    /// As the model writes it.
    pub id: Option<String>,
    /// Bytes of the text up to what comes next.
    pub used: usize,
    pub then: Then,
}

/// What comes after the name.
#[derive(Debug, PartialEq)]
pub enum Then {
    /// The arguments as JSON. `in_object`: inside the object that holds the name, too.
    Json { in_object: bool },
    /// Nothing: the arguments are known.
    Ready { arguments: String, in_object: bool },
    /// Tags.
    Tags,
}

/// Longer ones are no names.
const LONGEST_NAME: usize = 256;

/// Whether a text could be the name of a function, or the beginning of one.
fn is_name(text: &str) -> bool {
    text.len() <= LONGEST_NAME && text.chars().all(|c| c.is_alphanumeric() || "_-.:/$".contains(c))
}

/// The name before `end`, then JSON.
pub fn named(form: &Named, text: &str, ended: bool) -> Head {
    let blank = text.len() - text.trim_start().len();
    let (mut start, rest) = (blank, &text[blank..]);
    if !form.prefix.is_empty() {
        if rest.starts_with(form.prefix) {
            start += form.prefix.len();
        } else if !ended && form.prefix.starts_with(rest) {
            return Head::Wait;
        }
    }
    let ends = [form.end, form.aside];
    let ends = ends.into_iter().filter(|end| !end.is_empty());
    let rest = &text[start..];
    let (written, used) = match find(rest, ends, ended) {
        Found::Mark { at, mark } if mark == form.end => (&rest[..at], start + at + mark.len()),
        Found::Mark { at, mark } => match rest[at + mark.len()..].find(form.end) {
            Some(aside) => (&rest[..at], start + at + mark.len() + aside + form.end.len()),
            None => return Head::Wait,
        },
        Found::Begins(at) if is_name(rest[..at].trim()) => return Head::Wait,
        Found::None if is_name(rest.trim()) && !ended => return Head::Wait,
        _ => return Head::Fail,
    };
    let written = written.trim();
    if written.is_empty() || !is_name(written) {
        return Head::Fail;
    }
    let plain = written.strip_prefix("functions.").filter(|_| form.numbered);
    let (name, id) = match plain.map(|name| name.rsplit_once(':').map_or(name, |(name, _)| name)) {
        Some(name) => (name.to_owned(), Some(written.to_owned())),
        None => (written.to_owned(), None),
    };
    Head::Call(Call { name, id, used, then: Then::Json { in_object: false } })
}

/// The name before the first tag. `keep`: marks that are not part of the name's end.
pub fn tagged(tags: &Tags, text: &str, ended: bool) -> Head {
    match find(text, tags.name_end.iter().copied(), ended) {
        Found::Mark { at, mark } => {
            let name = text[..at].trim().trim_matches('"');
            if name.is_empty() || !is_name(name) {
                // A line break before the name ends nothing.
                let blank = text.len() - text.trim_start().len();
                return if at < blank { shifted(tagged(tags, &text[blank..], ended), blank) } else { Head::Fail };
            }
            let belongs = !mark.starts_with('<');
            let used = at + if belongs { mark.len() } else { 0 };
            Head::Call(Call { name: name.to_owned(), id: None, used, then: Then::Tags })
        }
        Found::Begins(at) if is_name(text[..at].trim().trim_matches('"')) => Head::Wait,
        Found::None if !ended && is_name(text.trim().trim_matches('"')) => Head::Wait,
        _ => Head::Fail,
    }
}

fn shifted(head: Head, by: usize) -> Head {
    match head {
        Head::Call(call) => Head::Call(Call { used: call.used + by, ..call }),
        head => head,
    }
}
