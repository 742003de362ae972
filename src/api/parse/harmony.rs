//! gpt-oss's output: messages with a header, `<|channel|>analysis<|message|>…<|end|>`. Thoughts are of one channel, calls go to a
//! recipient, and the rest is the answer.

use std::sync::Arc;

use crate::api::delta::{DeltaKind, ToolCallPart};
use crate::api::parse::Parser;
use crate::api::parse::marks::{Found, find};
use crate::api::parse::reasoning::push_reasoning;
use crate::api::parse::tools::json::{Next, Scanner};
use crate::api::parse::tools::request::{ToolRequest, call_id};
use crate::api::parse::tools::table::{CallIds, HARMONY_MARKS};

/// What names the recipient of a message.
const RECIPIENT: &str = "to=";

pub struct Harmony {
    /// Calls are wanted.
    tools: Option<Arc<ToolRequest>>,
    /// Thoughts are kept apart: whether they are told at all.
    reasoning: Option<bool>,
    buffer: String,
    /// Something has come: only the first message may begin within its header.
    opened: bool,
    state: State,
    calls: usize,
    /// The call at hand has arguments.
    argued: bool,
    /// Follows them while they are JSON, in which no mark is one.
    scanner: Option<Scanner>,
}

#[derive(Debug, Clone, PartialEq)]
enum State {
    /// In a message's header, as far as it has come.
    Header(String),
    Answer,
    Reasoning,
    Call,
}

impl Harmony {
    pub fn new(tools: Option<Arc<ToolRequest>>, reasoning: Option<bool>) -> Self {
        Self { tools, reasoning, buffer: String::new(), opened: false, state: State::Answer, calls: 0, argued: false, scanner: None }
    }

    /// The prompt ends with `<|start|>assistant`: what a call's header has behind that, the recipient, comes without a mark.
    fn open(&mut self, ended: bool) -> bool {
        let text = self.buffer.trim_start();
        if text.starts_with(RECIPIENT) {
            self.state = State::Header(String::new());
        } else if RECIPIENT.starts_with(text) && !ended {
            return false;
        }
        self.opened = true;
        true
    }

    fn step(&mut self, ended: bool, deltas: &mut Vec<DeltaKind>) -> bool {
        if !self.opened && !self.open(ended) {
            return false;
        }
        self.arguments(deltas);
        if self.scanner.is_some() {
            return false;
        }
        let (at, mark) = match find(&self.buffer, HARMONY_MARKS.into_iter(), ended) {
            Found::Mark { at, mark } => (at, Some(mark)),
            Found::Begins(at) => (at, None),
            Found::None => (self.buffer.len(), None),
        };
        let rest = self.buffer.split_off(at);
        let text = std::mem::replace(&mut self.buffer, rest);
        self.tell(text, deltas);
        let Some(mark) = mark else { return false };
        self.buffer.drain(..mark.len());
        match mark {
            "<|message|>" => {
                if let State::Header(header) = &self.state {
                    self.state = self.message(&header.clone(), deltas);
                }
            }
            "<|start|>" | "<|channel|>" | "<|constrain|>" => match &mut self.state {
                State::Header(header) => header.push_str(mark),
                _ => self.leave(State::Header(mark.to_owned()), deltas),
            },
            _ => self.leave(State::Answer, deltas),
        }
        true
    }

    /// Takes what is there of arguments that are JSON, up to their end.
    fn arguments(&mut self, deltas: &mut Vec<DeltaKind>) {
        let Some(scanner) = &mut self.scanner else { return };
        let (mut text, mut used, mut over) = (String::new(), 0, false);
        for c in self.buffer.chars() {
            let begins = scanner.open.is_empty();
            if begins && !c.is_whitespace() && !matches!(c, '{' | '[') {
                over = true;
                break;
            }
            used += c.len_utf8();
            if begins && c.is_whitespace() {
                continue;
            }
            match scanner.step(c, &mut text) {
                Next::Inside => {}
                Next::Last => over = true,
                Next::Broken => {
                    used -= c.len_utf8();
                    over = true;
                }
            }
            if over {
                break;
            }
        }
        self.buffer.drain(..used);
        if over {
            self.scanner = None;
        }
        self.tell(text, deltas);
    }

    /// The message ends.
    fn leave(&mut self, state: State, deltas: &mut Vec<DeltaKind>) {
        if self.state == State::Call && !self.argued {
            self.tell("{}".to_owned(), deltas);
        }
        self.state = state;
    }

    /// What follows a header.
    fn message(&mut self, header: &str, deltas: &mut Vec<DeltaKind>) -> State {
        let channel = header.split("<|channel|>").nth(1).unwrap_or_default();
        let recipient = header.split(RECIPIENT).nth(1).map(|rest| rest.split([' ', '\n', '<']).next().unwrap_or_default());
        if let (Some(name), true) = (recipient.filter(|name| !name.is_empty()), self.tools.is_some()) {
            self.calls += 1;
            self.argued = false;
            self.scanner = Some(Scanner::default());
            let name = name.strip_prefix("functions.").unwrap_or(name).to_owned();
            self.push_call(ToolCallPart::Start { id: call_id(CallIds::OpenAi), name }, deltas);
            return State::Call;
        }
        match channel.trim_start().starts_with("analysis") && self.reasoning.is_some() {
            true => State::Reasoning,
            false => State::Answer,
        }
    }

    fn push_call(&self, part: ToolCallPart, deltas: &mut Vec<DeltaKind>) {
        let index = self.calls - 1;
        if index == 0 || self.tools.as_ref().is_some_and(|tools| tools.parallel) {
            deltas.push(DeltaKind::ToolCall { index, part });
        }
    }

    fn tell(&mut self, text: String, deltas: &mut Vec<DeltaKind>) {
        if text.is_empty() {
            return;
        }
        match &mut self.state {
            State::Header(header) => header.push_str(&text),
            State::Reasoning if self.reasoning == Some(true) => push_reasoning(text, deltas),
            State::Reasoning => {}
            State::Call => {
                self.argued = true;
                self.push_call(ToolCallPart::Arguments(text), deltas);
            }
            State::Answer => match deltas.last_mut() {
                Some(DeltaKind::Text(last)) => last.push_str(&text),
                _ => deltas.push(DeltaKind::Text(text)),
            },
        }
    }
}

impl Parser for Harmony {
    fn push(&mut self, text: String, deltas: &mut Vec<DeltaKind>) {
        self.buffer.push_str(&text);
        while self.step(false, deltas) {}
    }

    fn finish(&mut self, deltas: &mut Vec<DeltaKind>) {
        while self.step(true, deltas) {}
        self.leave(State::Answer, deltas);
    }

    fn in_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }
}
