//! JSON as models write it, read as it comes.

use serde_json::Value;

use super::head::{Call, Head, Then};
use super::table::Keys;

/// What a beginning of a text holds.
#[derive(Debug, PartialEq)]
pub enum Read<T> {
    /// So many bytes of it.
    Done(T, usize),
    /// More text decides.
    Wait,
    Fail,
}

/// Follows an object or a list to its end.
#[derive(Debug, Default)]
pub struct Scanner {
    /// The brackets that are still to come, the outermost first.
    pub open: Vec<char>,
    string: bool,
    escaped: bool,
}

/// What a character is to a value.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Inside,
    Last,
    /// It cannot stand here.
    Broken,
}

impl Scanner {
    /// Takes the next character, and adds it to `text`. Line breaks and other control characters in strings, which JSON forbids there and
    /// models write all the same, are escaped.
    pub fn step(&mut self, c: char, text: &mut String) -> Next {
        if self.string {
            match c {
                _ if std::mem::take(&mut self.escaped) => {}
                '\\' => self.escaped = true,
                '"' => self.string = false,
                _ => {}
            }
            push_in_string(c, text);
            return Next::Inside;
        }
        match c {
            '"' => self.string = true,
            '{' => self.open.push('}'),
            '[' => self.open.push(']'),
            '}' | ']' if self.open.last() == Some(&c) => {
                self.open.pop();
            }
            ',' | ':' | '+' | '-' | '.' => {}
            c if c.is_ascii_alphanumeric() || c.is_ascii_whitespace() => {}
            _ => return Next::Broken,
        }
        text.push(c);
        if self.open.is_empty() { Next::Last } else { Next::Inside }
    }
}

fn push_in_string(c: char, text: &mut String) {
    match c {
        '\n' => text.push_str("\\n"),
        '\r' => text.push_str("\\r"),
        '\t' => text.push_str("\\t"),
        c if c < ' ' => text.push_str(&format!("\\u{:04x}", u32::from(c))),
        c => text.push(c),
    }
}

/// Where the value at the beginning of `text` ends.
pub fn value(text: &str) -> Read<()> {
    match text.chars().next() {
        None => Read::Wait,
        Some('{' | '[' | '"') => {
            let (mut scanner, mut sink) = (Scanner::default(), String::new());
            for (at, c) in text.char_indices() {
                match scanner.step(c, &mut sink) {
                    // A string alone opens no bracket: it ends with its second quote.
                    Next::Last if scanner.string => {}
                    Next::Last => return Read::Done((), at + c.len_utf8()),
                    Next::Inside if !scanner.string && scanner.open.is_empty() => return Read::Done((), at + c.len_utf8()),
                    Next::Inside => {}
                    Next::Broken => return Read::Fail,
                }
            }
            Read::Wait
        }
        Some(_) => match text.find(|c: char| matches!(c, ',' | '}' | ']' | '<') || c.is_ascii_whitespace()) {
            Some(0) => Read::Fail,
            Some(end) => Read::Done((), end),
            None => Read::Wait,
        },
    }
}

/// The string at the beginning of `text`.
pub fn string(text: &str) -> Read<String> {
    match text.chars().next() {
        None => return Read::Wait,
        Some('"') => {}
        Some(_) => return Read::Fail,
    }
    match value(text) {
        Read::Done((), used) => match serde_json::from_str(&sound(&text[..used])) {
            Ok(string) => Read::Done(string, used),
            Err(_) => Read::Fail,
        },
        Read::Wait => Read::Wait,
        Read::Fail => Read::Fail,
    }
}

/// The value with its strings' control characters escaped.
fn sound(text: &str) -> String {
    let (mut scanner, mut sound) = (Scanner::default(), String::new());
    text.chars().for_each(|c| {
        scanner.step(c, &mut sound);
    });
    sound
}

/// Arguments that are there as a whole, as JSON text: an object in a string is taken out of it, and nothing is an empty object.
pub fn arguments(value: &str) -> String {
    match value.trim() {
        "" | "null" | "None" => "{}".to_owned(),
        text if text.starts_with('"') => match serde_json::from_str::<Value>(&sound(text)) {
            Ok(Value::String(inner)) if serde_json::from_str::<Value>(&inner).is_ok_and(|inner| inner.is_object()) => inner,
            Ok(Value::String(inner)) if inner.trim().is_empty() => "{}".to_owned(),
            _ => sound(text),
        },
        text if text.starts_with(['{', '[']) => sound(text),
        text => text.to_owned(),
    }
}

/// Reads an object up to its arguments. `bare`: no mark says that it is a call, so it must look like one.
pub fn head(keys: &Keys, text: &str, bare: bool) -> Head {
    match object(keys, text, bare) {
        Ok(call) => Head::Call(call),
        Err(head) => head,
    }
}

/// The part of `text` after its white space; what is not there yet is waited for.
fn after_blank(text: &str, at: usize) -> Result<(usize, char), Head> {
    let rest = &text[at..];
    let at = at + (rest.len() - rest.trim_start().len());
    text[at..].chars().next().map(|c| (at, c)).ok_or(Head::Wait)
}

fn expect<T>(read: Read<T>) -> Result<(T, usize), Head> {
    match read {
        Read::Done(value, used) => Ok((value, used)),
        Read::Wait => Err(Head::Wait),
        Read::Fail => Err(Head::Fail),
    }
}

fn object(keys: &Keys, text: &str, bare: bool) -> Result<Call, Head> {
    let (at, '{') = after_blank(text, 0)? else { return Err(Head::Fail) };
    let (mut at, mut name, mut arguments_text): (usize, Option<String>, Option<String>) = (at + 1, None, None);
    let mut first = true;
    loop {
        let (start, c) = after_blank(text, at)?;
        let (key, used) = match c {
            '"' => expect(string(&text[start..]))?,
            '}' => break at = start + 1,
            ',' if !first => {
                at = start + 1;
                continue;
            }
            _ => return Err(Head::Fail),
        };
        let is_name = keys.name.contains(&key.as_str());
        let is_arguments = keys.arguments.contains(&key.as_str());
        if bare && first && !is_name && !is_arguments && key != "type" && key != "id" {
            return Err(Head::Fail);
        }
        first = false;
        let (colon, ':') = after_blank(text, start + used)? else { return Err(Head::Fail) };
        if let (true, Some(name)) = (is_arguments, &name) {
            return Ok(Call { name: name.clone(), id: None, used: colon + 1, then: Then::Json { in_object: true } });
        }
        let (start, _) = after_blank(text, colon + 1)?;
        if is_name && name.is_none() {
            let (given, used) = expect(string(&text[start..]))?;
            at = start + used;
            if let Some(arguments) = arguments_text {
                return Ok(Call { name: given, id: None, used: at, then: Then::Ready { arguments, in_object: true } });
            }
            name = Some(given);
            continue;
        }
        let ((), used) = expect(value(&text[start..]))?;
        if is_arguments {
            arguments_text = Some(arguments(&text[start..start + used]));
        }
        at = start + used;
    }
    match name.filter(|_| !bare) {
        Some(name) => Ok(Call { name, id: None, used: at, then: Then::Ready { arguments: "{}".to_owned(), in_object: false } }),
        None => Err(Head::Fail),
    }
}

/// `, "key": value` in an object, after its arguments.
pub fn member(text: &str) -> Read<()> {
    let read = || -> Result<usize, Head> {
        let (start, _) = after_blank(text, 1)?;
        let (_, used) = expect(string(&text[start..]))?;
        let (colon, ':') = after_blank(text, start + used)? else { return Err(Head::Fail) };
        let (start, _) = after_blank(text, colon + 1)?;
        let ((), used) = expect(value(&text[start..]))?;
        Ok(start + used)
    };
    match read() {
        Ok(used) => Read::Done((), used),
        Err(Head::Wait) => Read::Wait,
        Err(_) => Read::Fail,
    }
}

/// JSON with a space after commas and colons, as Python writes it.
pub fn spaced(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("[{}]", list.iter().map(spaced).collect::<Vec<_>>().join(", ")),
        Value::Object(object) => {
            let members = object.iter().map(|(key, value)| format!("{}: {}", Value::String(key.clone()), spaced(value)));
            format!("{{{}}}", members.collect::<Vec<_>>().join(", "))
        }
        scalar => scalar.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_end_where_they_end() {
        for (text, end) in [("{\"a\": \"}\"} x", 10), ("\"a\\\"b\" x", 6), ("12, 3", 2), ("[1, [2]]]", 8), ("true}", 4)] {
            assert_eq!(value(text), Read::Done((), end), "{text}");
        }
        assert_eq!(value("{\"a\""), Read::Wait);
        assert_eq!(value("{'a'"), Read::Fail);
    }

    #[test]
    fn arguments_are_an_object_however_they_are_written() {
        for (written, read) in
            [("null", "{}"), ("\"{\\\"a\\\": 1}\"", "{\"a\": 1}"), ("{\"a\": \"b\nc\"}", "{\"a\": \"b\\nc\"}"), ("\"\"", "{}")]
        {
            assert_eq!(arguments(written), read);
        }
    }
}
