//! What a request's sequences give, whatever dialect it is written in: typed deltas, and what the deltas of one choice add up to.

use std::sync::Arc;

use crate::api::logprobs::TokenLogprobs;
use crate::api::times::Times;
use crate::models::Logprobs;

/// Something new of one choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// Which choice: `prompt index * choices of each prompt + number of the choice`.
    pub choice: usize,
    pub kind: DeltaKind,
}

#[derive(Debug, Clone, PartialEq)]
pub enum DeltaKind {
    /// A part of the answer.
    Text(String),
    /// A part of what the model thought before it answered.
    Reasoning(String),
    /// A part of a tool call. Calls are numbered from 0 in each choice.
    ToolCall { index: usize, part: ToolCallPart },
    /// Sampled tokens.
    Tokens {
        /// In the order of sampling, the one that ended the sequence included: they count in usage.
        ids: Vec<u32>,
        /// What is known of the tokens whose text is out, when asked for: a token whose text is held back comes later.
        logprobs: Vec<TokenLogprobs>,
    },
    /// How probable the prompt's tokens were, when asked for: once, with the choice's first token.
    PromptLogprobs(Arc<Vec<Logprobs>>),
    /// The choice's last delta.
    End(EndReason),
}

#[derive(Debug, Clone, PartialEq)]
pub enum ToolCallPart {
    Start {
        id: String,
        name: String,
    },
    /// A part of the arguments' JSON text.
    Arguments(String),
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub enum EndReason {
    /// The model ended its answer.
    Stop,
    /// One of the request's stop strings came.
    StopText(String),
    /// One of the request's stop token ids came.
    StopToken(u32),
    /// `max_tokens` or the context's end is reached.
    Length,
    /// Somebody has ended the request (`/v1/abort_requests`).
    Abort,
}

/// Tokens of a request up to now, all its choices together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// All prompts, each once.
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    /// Those of thoughts among them; none where thoughts are not told apart.
    pub reasoning_tokens: Option<usize>,
    /// Prompt tokens that were found in the prefix cache.
    pub cached_tokens: usize,
    /// When it all happened, where the request asks for that.
    pub times: Option<Times>,
}

/// The deltas of one choice put together: all that are ready of a stream, or all there are.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChoiceUpdate {
    pub choice: usize,
    pub text: String,
    pub reasoning: String,
    /// In the order of their first parts.
    pub tool_calls: Vec<ToolCall>,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<TokenLogprobs>,
    pub prompt_logprobs: Option<Arc<Vec<Logprobs>>>,
    pub end: Option<EndReason>,
    /// The order in which text, reasoning, calls and log probabilities came, for dialects that keep it.
    pub order: Vec<Span>,
}

/// So much of one kind of content came in a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Span {
    /// Bytes.
    Text(usize),
    /// Bytes.
    Reasoning(usize),
    /// A tool call begins.
    CallStart(usize),
    /// Bytes of a call's arguments.
    Arguments { index: usize, bytes: usize },
    /// Tokens.
    Logprobs(usize),
}

/// One part of a choice, in the order in which the parts came.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Part<'a> {
    Text(&'a str),
    Reasoning(&'a str),
    CallStart { index: usize, id: &'a str, name: &'a str },
    Arguments { index: usize, text: &'a str },
    Logprobs(&'a [TokenLogprobs]),
}

/// The parts of one tool call put together.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ToolCall {
    pub index: usize,
    /// Id and name of the function, when the call's start is among the parts.
    pub start: Option<(String, String)>,
    pub arguments: String,
}

impl ChoiceUpdate {
    pub fn of(choice: usize) -> Self {
        Self { choice, ..Self::default() }
    }

    /// Something of the answer itself is there: text, reasoning or a tool call.
    pub fn has_content(&self) -> bool {
        !self.text.is_empty() || !self.reasoning.is_empty() || !self.tool_calls.is_empty()
    }

    /// Text, reasoning, tool calls and log probabilities in the order in which they came.
    pub fn parts(&self) -> Vec<Part<'_>> {
        let (mut text, mut reasoning, mut logprobs) = (self.text.as_str(), self.reasoning.as_str(), self.logprobs.as_slice());
        let mut arguments: Vec<&str> = self.tool_calls.iter().map(|call| call.arguments.as_str()).collect();
        let call = |index: usize| self.tool_calls.iter().position(|call| call.index == index);
        let part = |span: &Span| {
            Some(match *span {
                Span::Text(bytes) => Part::Text(cut(&mut text, bytes)?),
                Span::Reasoning(bytes) => Part::Reasoning(cut(&mut reasoning, bytes)?),
                Span::CallStart(index) => {
                    let (id, name) = self.tool_calls[call(index)?].start.as_ref()?;
                    Part::CallStart { index, id, name }
                }
                Span::Arguments { index, bytes } => Part::Arguments { index, text: cut(&mut arguments[call(index)?], bytes)? },
                Span::Logprobs(tokens) => {
                    let (these, rest) = logprobs.split_at_checked(tokens)?;
                    logprobs = rest;
                    Part::Logprobs(these)
                }
            })
        };
        self.order.iter().filter_map(part).collect()
    }

    /// Notes what is about to be added.
    fn note(&mut self, kind: &DeltaKind) {
        let span = match kind {
            DeltaKind::Text(text) => Span::Text(text.len()),
            DeltaKind::Reasoning(text) => Span::Reasoning(text.len()),
            DeltaKind::ToolCall { index, part: ToolCallPart::Start { .. } } => Span::CallStart(*index),
            DeltaKind::ToolCall { index, part: ToolCallPart::Arguments(text) } => Span::Arguments { index: *index, bytes: text.len() },
            DeltaKind::Tokens { logprobs, .. } if !logprobs.is_empty() => Span::Logprobs(logprobs.len()),
            DeltaKind::Tokens { .. } | DeltaKind::PromptLogprobs(_) | DeltaKind::End(_) => return,
        };
        match (self.order.last_mut(), span) {
            (Some(Span::Text(bytes)), Span::Text(more)) | (Some(Span::Reasoning(bytes)), Span::Reasoning(more)) => *bytes += more,
            (Some(Span::Arguments { index, bytes }), Span::Arguments { index: same, bytes: more }) if *index == same => *bytes += more,
            _ => self.order.push(span),
        }
    }

    fn add(&mut self, kind: DeltaKind) {
        self.note(&kind);
        match kind {
            DeltaKind::Text(text) => append(&mut self.text, text),
            DeltaKind::Reasoning(text) => append(&mut self.reasoning, text),
            DeltaKind::ToolCall { index, part } => {
                let place = self.tool_calls.iter().position(|call| call.index == index).unwrap_or_else(|| {
                    self.tool_calls.push(ToolCall { index, ..ToolCall::default() });
                    self.tool_calls.len() - 1
                });
                match part {
                    ToolCallPart::Start { id, name } => self.tool_calls[place].start = Some((id, name)),
                    ToolCallPart::Arguments(text) => append(&mut self.tool_calls[place].arguments, text),
                }
            }
            DeltaKind::Tokens { ids, logprobs } => {
                self.token_ids.extend(ids);
                self.logprobs.extend(logprobs);
            }
            DeltaKind::PromptLogprobs(scores) => self.prompt_logprobs = Some(scores),
            DeltaKind::End(reason) => self.end = Some(reason),
        }
    }
}

/// Takes so many bytes off the front.
fn cut<'a>(text: &mut &'a str, bytes: usize) -> Option<&'a str> {
    let (front, rest) = text.split_at_checked(bytes)?;
    *text = rest;
    Some(front)
}

fn append(text: &mut String, more: String) {
    if text.is_empty() { *text = more } else { text.push_str(&more) }
}

/// Adds deltas to the updates of their choices. A choice without an update gets one, after the others.
pub fn add_to(updates: &mut Vec<ChoiceUpdate>, deltas: Vec<Delta>) {
    for Delta { choice, kind } in deltas {
        let place = updates.iter().position(|update| update.choice == choice).unwrap_or_else(|| {
            updates.push(ChoiceUpdate::of(choice));
            updates.len() - 1
        });
        updates[place].add(kind);
    }
}

/// One update per choice, in order of first appearance.
pub fn by_choice(deltas: Vec<Delta>) -> Vec<ChoiceUpdate> {
    let mut updates = Vec::new();
    add_to(&mut updates, deltas);
    updates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_keeps_order_and_endings() {
        let deltas = |choice, text: &str, ending: bool| {
            let tokens = DeltaKind::Tokens { ids: vec![1], logprobs: Vec::new() };
            let end = ending.then_some(DeltaKind::End(EndReason::Stop));
            [Some(DeltaKind::Text(text.to_owned())), Some(tokens), end].into_iter().flatten().map(move |kind| Delta { choice, kind })
        };
        let all = deltas(1, "a", false).chain(deltas(0, "x", false)).chain(deltas(1, "b", true)).chain(deltas(0, "y", false));
        let updates = by_choice(all.collect());
        assert_eq!(updates.len(), 2);
        assert_eq!((updates[0].choice, updates[0].text.as_str(), updates[0].token_ids.len(), updates[0].end.is_some()), (1, "ab", 2, true));
        assert_eq!((updates[1].choice, updates[1].text.as_str(), updates[1].end.is_some()), (0, "xy", false));
    }

    #[test]
    fn parts_keep_the_order_in_which_they_came() {
        let start = |index, id: &str| DeltaKind::ToolCall { index, part: ToolCallPart::Start { id: id.to_owned(), name: "f".to_owned() } };
        let arguments = |index, text: &str| DeltaKind::ToolCall { index, part: ToolCallPart::Arguments(text.to_owned()) };
        let text = |text: &str| DeltaKind::Text(text.to_owned());
        let kinds = [
            DeltaKind::Reasoning("é".to_owned()),
            DeltaKind::Reasoning("b".to_owned()),
            text("x"),
            text("y"),
            start(0, "c0"),
            arguments(0, "{"),
            arguments(0, "}"),
            start(1, "c1"),
            arguments(1, "[]"),
            text("z"),
        ];
        let updates = by_choice(kinds.into_iter().map(|kind| Delta { choice: 0, kind }).collect());
        assert_eq!(updates[0].text, "xyz");
        assert_eq!(
            updates[0].parts(),
            [
                Part::Reasoning("éb"),
                Part::Text("xy"),
                Part::CallStart { index: 0, id: "c0", name: "f" },
                Part::Arguments { index: 0, text: "{}" },
                Part::CallStart { index: 1, id: "c1", name: "f" },
                Part::Arguments { index: 1, text: "[]" },
                Part::Text("z"),
            ]
        );
    }
}
