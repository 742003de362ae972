//! Text → content and tool calls, as the text comes.
//!
//! A call's name is told whole, then its arguments as JSON text that only grows. What looks like a call and is none stays content, with its
//! marks. Nothing depends on how the text was cut into pieces.

use std::sync::Arc;

use crate::api::delta::{DeltaKind, ToolCallPart};
use crate::api::parse::marks::{Begins, Found, begins, find};
use crate::api::parse::tools::head::{Call, Head, Then};
use crate::api::parse::tools::json::{Next, Read, Scanner};
use crate::api::parse::tools::request::{ToolRequest, call_id};
use crate::api::parse::tools::table::{Bare, Body, CallIds, ToolFormat};
use crate::api::parse::tools::values::Types;

mod head;
pub mod json;
mod literal;
pub mod request;
pub mod table;
#[cfg(test)]
mod tests;
pub mod values;

/// Takes the tool calls out of one answer.
pub struct ToolParser {
    format: &'static ToolFormat,
    request: Arc<ToolRequest>,
    /// Text that no step has taken yet.
    buffer: String,
    state: State,
    /// Calls so far.
    calls: usize,
    /// Content is out.
    said: bool,
    /// White space and marks of the section: content, unless a call follows.
    glue: String,
    current: Current,
}

/// The call at hand.
#[derive(Default)]
struct Current {
    name: String,
    /// Its arguments so far.
    arguments: String,
    /// Follows them, when they are JSON.
    scanner: Scanner,
}

#[derive(Debug)]
enum State {
    /// Nothing but white space has come.
    Start,
    /// Content.
    Outside,
    /// Behind an opening mark. `raw`: it and what was taken since, which is content if no call comes of it.
    Head { raw: String, list: bool, bare: bool },
    /// Before and in JSON arguments. `object`: they are inside the object that holds the name.
    Arguments { object: bool, list: bool },
    /// Behind the arguments, in that object.
    Rest { list: bool },
    /// Behind a call.
    Between { list: bool },
    /// Arguments that are no JSON: they are passed on up to the closing mark.
    Broken,
    /// Between tags. `filled`: there was an argument.
    Tags { filled: bool },
    /// In the value of an argument. `begun`: its first line break is behind.
    Value { types: Types, begun: bool },
}

impl ToolParser {
    pub fn new(format: &'static ToolFormat, request: Arc<ToolRequest>) -> Self {
        let state = if format.bare.is_empty() { State::Outside } else { State::Start };
        Self { format, request, buffer: String::new(), state, calls: 0, said: false, glue: String::new(), current: Current::default() }
    }

    pub fn push(&mut self, text: &str, out: &mut Vec<DeltaKind>) {
        self.buffer.push_str(text);
        while self.step(false, out) {}
    }

    /// No more text comes: what still waits is told.
    pub fn finish(&mut self, out: &mut Vec<DeltaKind>) {
        while self.step(true, out) {}
        let glue = std::mem::take(&mut self.glue);
        if !glue.is_empty() && (self.calls == 0 || !glue.trim().is_empty()) {
            push_text(glue, out);
        }
    }

    /// Takes something from the buffer; false when there is nothing to be taken before more text comes.
    fn step(&mut self, ended: bool, out: &mut Vec<DeltaKind>) -> bool {
        match &self.state {
            State::Start => self.start(ended),
            State::Outside => self.outside(ended, out),
            State::Head { .. } => self.head(ended, out),
            State::Arguments { object, list } => {
                let (object, list) = (*object, *list);
                self.arguments(object, list, ended, out)
            }
            State::Rest { list } => {
                let list = *list;
                self.rest(list, ended)
            }
            State::Between { list } => {
                let list = *list;
                self.between(list, ended)
            }
            State::Broken => self.broken(ended, out),
            State::Tags { filled } => {
                let filled = *filled;
                self.tags(filled, ended, out)
            }
            State::Value { .. } => self.value(ended, out),
        }
    }

    fn take(&mut self, bytes: usize) -> String {
        let rest = self.buffer.split_off(bytes);
        std::mem::replace(&mut self.buffer, rest)
    }

    fn take_blank(&mut self) -> String {
        let blank = self.buffer.len() - self.buffer.trim_start().len();
        self.take(blank)
    }

    /// Content, but for white space at its end, which waits.
    fn say(&mut self, text: &str, out: &mut Vec<DeltaKind>) {
        let end = text.trim_end().len();
        if end > 0 {
            let all = std::mem::take(&mut self.glue) + &text[..end];
            let all = if self.calls > 0 && !self.said { all.trim_start().to_owned() } else { all };
            self.said = true;
            push_text(all, out);
        }
        self.glue.push_str(&text[end..]);
    }

    fn start(&mut self, ended: bool) -> bool {
        let blank = self.take_blank();
        self.glue.push_str(&blank);
        let Some(first) = self.buffer.chars().next() else { return false };
        let opens = |bare: &Bare| match bare {
            Bare::Object => first == '{',
            Bare::List => first == '[',
            Bare::Name => self.request.tools.iter().any(|tool| {
                let line = format!("{}\n", tool.name);
                self.buffer.starts_with(&line) || (!ended && line.starts_with(&self.buffer))
            }),
        };
        self.state = match self.format.bare.iter().any(opens) {
            true => State::Head { raw: String::new(), list: false, bare: true },
            false => State::Outside,
        };
        true
    }

    fn outside(&mut self, ended: bool, out: &mut Vec<DeltaKind>) -> bool {
        let format = self.format;
        let opening = format.call.open.iter().chain(format.section.open);
        // Before a call closing marks close nothing.
        let closing = format.call.close.iter().chain(format.section.close).filter(|_| self.calls > 0);
        match find(&self.buffer, opening.chain(closing).copied(), ended) {
            _ if self.buffer.is_empty() => false,
            Found::Mark { at, mark } => {
                let before = self.take(at);
                self.say(&before, out);
                self.take(mark.len());
                if format.call.open.contains(&mark) {
                    self.state = State::Head { raw: mark.to_owned(), list: false, bare: false };
                } else if format.section.open.contains(&mark) {
                    self.glue.push_str(mark);
                }
                true
            }
            Found::Begins(at) => {
                let before = self.take(at);
                self.say(&before, out);
                false
            }
            Found::None => {
                let text = std::mem::take(&mut self.buffer);
                self.say(&text, out);
                false
            }
        }
    }

    fn head(&mut self, ended: bool, out: &mut Vec<DeltaKind>) -> bool {
        let State::Head { raw, mut list, bare } = std::mem::replace(&mut self.state, State::Outside) else { return false };
        let mut raw = raw;
        let takes_list = !list && !matches!(self.format.body, Body::Tagged(_) | Body::Gemma { .. } | Body::Harmony);
        let blank = self.buffer.len() - self.buffer.trim_start().len();
        if takes_list && self.buffer[blank..].starts_with('[') && !self.format.bare.contains(&Bare::Name) {
            raw += &self.take(blank + 1);
            list = true;
        }
        match self.read_head(bare, ended) {
            Head::Call(call) => {
                self.take(call.used);
                self.begin(call, list, out);
                true
            }
            Head::Wait if !ended => {
                self.state = State::Head { raw, list, bare };
                false
            }
            Head::Wait | Head::Fail => {
                self.say(&raw, out);
                true
            }
        }
    }

    fn read_head(&self, bare: bool, ended: bool) -> Head {
        const KEYS: table::Keys = table::Keys { name: &["name"], arguments: &["arguments", "parameters"] };
        let text = self.buffer.as_str();
        let Some(first) = text.trim_start().chars().next() else { return Head::Wait };
        let is_object = first == '{' && !bare;
        let is_known = |call: &Call| self.request.tools.iter().any(|tool| tool.name == call.name);
        match &self.format.body {
            Body::Json(keys) => json::head(keys, text, bare),
            Body::Named(_) | Body::Tagged(_) if is_object => json::head(&KEYS, text, false),
            Body::Named(named) => match head::named(named, text, ended) {
                Head::Call(call) if bare && !is_known(&call) => Head::Fail,
                head => head,
            },
            Body::Tagged(tags) => head::tagged(tags, text, ended),
            Body::Python => match literal::python_call(text) {
                Head::Call(call) if bare && !is_known(&call) => Head::Fail,
                head => head,
            },
            Body::Gemma { quote } => literal::gemma_call(text, quote),
            Body::Harmony => Head::Fail,
        }
    }

    /// Tells the call, and goes on to its arguments.
    fn begin(&mut self, call: Call, list: bool, out: &mut Vec<DeltaKind>) {
        self.glue.clear();
        self.calls += 1;
        let id = match (self.format.ids, call.id) {
            (CallIds::Written, Some(id)) => id,
            (ids, _) => call_id(ids),
        };
        self.current = Current { name: call.name.clone(), ..Current::default() };
        self.tell(ToolCallPart::Start { id, name: call.name }, out);
        self.state = match call.then {
            Then::Json { in_object } => State::Arguments { object: in_object, list },
            Then::Tags => State::Tags { filled: false },
            Then::Ready { arguments, in_object } => {
                self.argue(arguments, out);
                if in_object { State::Rest { list } } else { State::Between { list } }
            }
        };
    }

    /// A part of the current call, unless the request wants one call only.
    fn tell(&self, part: ToolCallPart, out: &mut Vec<DeltaKind>) {
        let index = self.calls - 1;
        if index == 0 || self.request.parallel {
            out.push(DeltaKind::ToolCall { index, part });
        }
    }

    fn argue(&mut self, text: String, out: &mut Vec<DeltaKind>) {
        if !text.is_empty() {
            self.current.arguments.push_str(&text);
            self.tell(ToolCallPart::Arguments(text), out);
        }
    }

    fn arguments(&mut self, object: bool, list: bool, ended: bool, out: &mut Vec<DeltaKind>) -> bool {
        let behind = || if object { State::Rest { list } } else { State::Between { list } };
        if self.current.scanner.open.is_empty() {
            self.take_blank();
            if let Body::Named(named) = &self.format.body
                && !named.fence.is_empty()
            {
                match begins(&self.buffer, std::iter::once(named.fence), ended) {
                    Begins::With(fence) => return !self.take(fence.len()).is_empty(),
                    Begins::Perhaps => return false,
                    Begins::No => {}
                }
            }
            let whole = match self.buffer.chars().next() {
                None if ended => {
                    self.complete(out);
                    self.state = State::Outside;
                    return true;
                }
                None => return false,
                Some('{' | '[') => None,
                Some('"' | 'n' | 't' | 'f' | '-' | '0'..='9') => Some(json::value(&self.buffer)),
                Some(_) => Some(Read::Fail),
            };
            match whole {
                None => {}
                Some(Read::Done((), used)) => {
                    let arguments = json::arguments(&self.take(used));
                    self.argue(arguments, out);
                    self.state = behind();
                    return true;
                }
                Some(Read::Wait) if !ended => return false,
                Some(_) => {
                    self.state = State::Broken;
                    return true;
                }
            }
        }
        match self.scan(out) {
            Next::Last => self.state = behind(),
            Next::Broken => self.state = State::Broken,
            Next::Inside if ended => {
                self.complete(out);
                self.state = State::Outside;
            }
            Next::Inside => return false,
        }
        true
    }

    /// Takes what is there of the arguments' text, up to their end.
    fn scan(&mut self, out: &mut Vec<DeltaKind>) -> Next {
        let (mut text, mut used) = (String::new(), 0);
        let mut next = Next::Inside;
        for c in self.buffer.chars() {
            next = self.current.scanner.step(c, &mut text);
            if next == Next::Broken {
                break;
            }
            used += c.len_utf8();
            if next == Next::Last {
                break;
            }
        }
        self.take(used);
        self.argue(text, out);
        next
    }

    /// Adds the brackets that are missing at the end of arguments, if that makes them JSON.
    fn complete(&mut self, out: &mut Vec<DeltaKind>) {
        if self.current.arguments.trim().is_empty() {
            self.argue("{}".to_owned(), out);
            return;
        }
        let missing: String = self.current.scanner.open.iter().rev().collect();
        let whole = format!("{}{missing}", self.current.arguments);
        if serde_json::from_str::<serde_json::Value>(&whole).is_ok() {
            self.argue(missing, out);
        }
    }

    fn rest(&mut self, list: bool, ended: bool) -> bool {
        self.take_blank();
        match self.buffer.chars().next() {
            None => return false,
            Some('}') => {
                self.take(1);
                self.state = State::Between { list };
            }
            Some(',') => match json::member(&self.buffer) {
                Read::Done((), used) => {
                    self.take(used);
                }
                Read::Wait if !ended => return false,
                Read::Wait => self.buffer.clear(),
                Read::Fail => self.state = State::Between { list },
            },
            Some(_) => self.state = State::Between { list },
        }
        true
    }

    fn between(&mut self, list: bool, ended: bool) -> bool {
        let format = self.format;
        let blank = self.take_blank();
        self.glue.push_str(&blank);
        let Some(first) = self.buffer.chars().next() else { return false };
        if list && first == ',' {
            self.state = State::Head { raw: self.take(1), list: true, bare: false };
            return true;
        }
        if list && first == ']' {
            self.take(1);
            self.state = State::Between { list: false };
            return true;
        }
        // A bracket too many is a slip of small models.
        if first == '}' && !format.call.close.is_empty() {
            self.take(1);
            return true;
        }
        let fence = Some(format.fence).into_iter().filter(|fence| !fence.is_empty());
        match begins(&self.buffer, fence.chain(format.call.close.iter().copied()), ended) {
            Begins::With(mark) => {
                self.take(mark.len());
                if mark != format.fence {
                    self.state = State::Outside;
                }
                return true;
            }
            Begins::Perhaps => return false,
            Begins::No => {}
        }
        let opens = match format.body {
            Body::Python => first.is_alphabetic() || first == '_',
            _ => first == '{',
        };
        self.state = match format.separators.iter().find(|separator| self.buffer.starts_with(**separator)) {
            Some(separator) if !separator.is_empty() || opens => State::Head { raw: self.take(separator.len()), list: false, bare: false },
            _ => State::Outside,
        };
        true
    }

    fn broken(&mut self, ended: bool, out: &mut Vec<DeltaKind>) -> bool {
        let format = self.format;
        let closing = format.call.close.iter().chain(format.section.close);
        let marks = closing.chain(format.call.open).copied();
        match find(&self.buffer, marks, ended) {
            Found::Mark { at, mark } => {
                let before = self.take(at);
                self.argue(before, out);
                self.complete(out);
                if format.call.close.contains(&mark) {
                    self.take(mark.len());
                }
                self.state = State::Outside;
                true
            }
            Found::Begins(at) => {
                let before = self.take(at);
                self.argue(before, out);
                false
            }
            Found::None => {
                let text = std::mem::take(&mut self.buffer);
                self.argue(text, out);
                if ended {
                    self.complete(out);
                    self.state = State::Outside;
                }
                false
            }
        }
    }

    fn tags(&mut self, filled: bool, ended: bool, out: &mut Vec<DeltaKind>) -> bool {
        let (format, Body::Tagged(tags)) = (self.format, &self.format.body) else { return false };
        self.take_blank();
        if self.buffer.is_empty() && !ended {
            return false;
        }
        let ends = format.call.close.iter().chain(format.section.close).copied();
        let is_key = match begins(&self.buffer, ends.chain(std::iter::once(tags.key.0)), ended) {
            Begins::Perhaps => return false,
            Begins::With(mark) if format.call.close.contains(&mark) => {
                self.take(mark.len());
                false
            }
            Begins::With(mark) => mark == tags.key.0,
            Begins::No => false,
        };
        let key = if is_key { self.key(tags, ended) } else { None };
        match key {
            Some((key, text)) => {
                let parameters = self.request.parameters(&self.current.name);
                let types = text.map_or_else(|| Types::of(parameters, &key), |text| if text { Types::text() } else { Types::json() });
                let opening = if types.is_text() { "\"" } else { "" };
                let key = serde_json::Value::String(key);
                self.argue(format!("{}{key}: {opening}", if filled { ", " } else { "{" }), out);
                self.state = State::Value { types, begun: false };
                return true;
            }
            None if is_key && !ended => return false,
            // A key that is cut off.
            None if is_key => self.buffer.clear(),
            None => {}
        }
        self.argue(if filled { "}" } else { "{}" }.to_owned(), out);
        self.state = State::Outside;
        true
    }

    /// Takes a key with everything up to its value. True and false tell whether its attributes make the value a text.
    fn key(&mut self, tags: &table::Tags, ended: bool) -> Option<(String, Option<bool>)> {
        let rest = self.buffer.strip_prefix(tags.key.0)?;
        let end = rest.find(tags.key.1)?;
        let key = rest[..end].trim().to_owned();
        let mut at = tags.key.0.len() + end + tags.key.1.len();
        let mut text = None;
        if tags.attributes {
            let attributes = &self.buffer[at..];
            let end = attributes.find('>')?;
            text = match &attributes[..end] {
                attributes if attributes.contains("string=\"true\"") => Some(true),
                attributes if attributes.contains("string=\"false\"") => Some(false),
                _ => None,
            };
            at += end + 1;
        }
        if !tags.value_open.is_empty() {
            let rest = &self.buffer[at..];
            at += rest.len() - rest.trim_start().len();
            match begins(&self.buffer[at..], std::iter::once(tags.value_open), ended) {
                Begins::With(mark) => at += mark.len(),
                Begins::Perhaps => return None,
                Begins::No => {}
            }
        }
        self.take(at);
        Some((key, text))
    }

    fn value(&mut self, ended: bool, out: &mut Vec<DeltaKind>) -> bool {
        let (format, Body::Tagged(tags)) = (self.format, &self.format.body) else { return false };
        let State::Value { types, mut begun } = std::mem::replace(&mut self.state, State::Tags { filled: true }) else { return false };
        let something = !self.buffer.is_empty();
        if !begun && tags.lines && self.buffer.starts_with('\n') {
            self.take(1);
        }
        begun |= something;
        let closing = std::iter::once(tags.value_close).chain(format.call.close.iter().copied());
        let Some(from) = self.inside_json(&types, ended) else {
            self.state = State::Value { types, begun };
            return false;
        };
        let (at, mark) = match find(&self.buffer[from..], closing, ended) {
            Found::Mark { at, mark } => (from + at, Some(mark)),
            Found::Begins(at) => (from + at, None),
            Found::None => (self.buffer.len(), None),
        };
        let is_over = mark.is_some() || ended;
        let last_break = usize::from(tags.lines && self.buffer[..at].ends_with('\n'));
        if is_over || types.is_text() {
            let written = self.take(at - last_break);
            self.take(if is_over { last_break } else { 0 });
            let json = if types.is_text() { values::escaped(&written) } else { types.convert(&written) };
            self.argue(json, out);
        }
        if !is_over {
            self.state = State::Value { types, begun };
            return false;
        }
        if types.is_text() {
            self.argue("\"".to_owned(), out);
        }
        if mark == Some(tags.value_close) {
            self.take(tags.value_close.len());
        }
        true
    }

    /// The bytes at the beginning of a value in which no mark is one, because they are a list or an object; `None` when more text decides.
    fn inside_json(&self, types: &Types, ended: bool) -> Option<usize> {
        let text = self.buffer.trim_start();
        if !types.is_json() || !text.starts_with(['{', '[']) {
            return Some(0);
        }
        match json::value(text) {
            Read::Done((), used) => Some(self.buffer.len() - text.len() + used),
            Read::Wait if !ended => None,
            Read::Wait | Read::Fail => Some(0),
        }
    }
}

/// Content, as one delta with what is there already.
fn push_text(text: String, out: &mut Vec<DeltaKind>) {
    match out.last_mut() {
        Some(DeltaKind::Text(last)) => last.push_str(&text),
        _ => out.push(DeltaKind::Text(text)),
    }
}
