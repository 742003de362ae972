//! Deltas → blocks and their events.
//!
//! A whole answer takes the same way as a stream, without its events: so both give the same blocks.

use serde_json::{Value, json};

use crate::api::delta::{ChoiceUpdate, Delta, EndReason, Part, Usage, by_choice};
use crate::api::dialects::Dialect;
use crate::api::failure::{self, ErrorForm};
use crate::api::frames;
use crate::api::served::ServedModel;
use crate::error::Failure;

pub struct Writer {
    id: String,
    model: String,
    /// Usage tells what came from the prefix cache.
    cache_details: bool,
    /// Blocks that are complete.
    content: Vec<Value>,
    open: Option<Open>,
    called: bool,
    end: Option<EndReason>,
    /// A stream is written, and not a whole answer.
    streams: bool,
    /// Frames that are ready.
    frames: String,
}

/// The block that is being written.
struct Open {
    kind: Kind,
    /// Of a text, a thought, or a call's input.
    text: String,
    /// How much of it no event has told yet.
    untold: usize,
}

enum Kind {
    Text,
    Thinking,
    ToolUse { index: usize, id: String, name: String },
}

impl Writer {
    pub fn new(served: &ServedModel, id: &str) -> Self {
        Self {
            id: if id.starts_with("msg_") { id.to_owned() } else { format!("msg_{id}") },
            model: served.name().to_owned(),
            cache_details: !served.settings.hide_prompt_tokens_details,
            content: Vec::new(),
            open: None,
            called: false,
            end: None,
            streams: false,
            frames: String::new(),
        }
    }

    fn event(&mut self, data: &Value) {
        if self.streams {
            self.frames.push_str(&frames::event(data["type"].as_str().unwrap_or_default(), data));
        }
    }

    fn add(&mut self, update: &ChoiceUpdate) {
        for part in update.parts() {
            match part {
                Part::Text(text) => self.text(|kind| matches!(kind, Kind::Text), Kind::Text, text),
                Part::Reasoning(text) => self.text(|kind| matches!(kind, Kind::Thinking), Kind::Thinking, text),
                Part::CallStart { index, id, name } => {
                    self.called = true;
                    self.begin(Kind::ToolUse { index, id: id.to_owned(), name: name.to_owned() });
                }
                Part::Arguments { index, text } => {
                    let is_it = |kind: &Kind| matches!(kind, Kind::ToolUse { index: open, .. } if *open == index);
                    // Calls come one after another: arguments of another one than the open one have nowhere to go.
                    if let Some(open) = self.open.as_mut().filter(|open| is_it(&open.kind)) {
                        open.text.push_str(text);
                    }
                }
                Part::Logprobs(_) => {}
            }
        }
        self.tell();
        if update.end.is_some() {
            self.end.clone_from(&update.end);
        }
    }

    /// Adds to the open block if it is of the kind, else to a new one.
    fn text(&mut self, is_it: impl Fn(&Kind) -> bool, kind: Kind, text: &str) {
        if text.is_empty() {
            return;
        }
        if !self.open.as_ref().is_some_and(|open| is_it(&open.kind)) {
            self.begin(kind);
        }
        if let Some(open) = &mut self.open {
            open.text.push_str(text);
        }
    }

    fn begin(&mut self, kind: Kind) {
        self.close();
        let open = Open { kind, text: String::new(), untold: 0 };
        self.event(&json!({"type": "content_block_start", "index": self.content.len(), "content_block": open.block()}));
        self.open = Some(open);
    }

    /// An event for what has come to the open block since the last one.
    fn tell(&mut self) {
        let Some(open) = self.open.as_mut().filter(|open| open.untold < open.text.len()) else { return };
        let text = &open.text[open.untold..];
        let delta = match open.kind {
            Kind::Text => json!({"type": "text_delta", "text": text}),
            Kind::Thinking => json!({"type": "thinking_delta", "thinking": text}),
            Kind::ToolUse { .. } => json!({"type": "input_json_delta", "partial_json": text}),
        };
        open.untold = open.text.len();
        self.event(&json!({"type": "content_block_delta", "index": self.content.len(), "delta": delta}));
    }

    fn close(&mut self) {
        self.tell();
        let Some(open) = self.open.take() else { return };
        let index = self.content.len();
        if let Kind::Thinking = open.kind {
            let delta = json!({"type": "signature_delta", "signature": ""});
            self.event(&json!({"type": "content_block_delta", "index": index, "delta": delta}));
        }
        self.event(&json!({"type": "content_block_stop", "index": index}));
        self.content.push(open.block());
    }

    /// Completes the answer, which has at least one block.
    fn finish(&mut self) {
        if self.open.is_none() && self.content.is_empty() {
            self.begin(Kind::Text);
        }
        self.close();
    }

    /// `stop_reason` and `stop_sequence`.
    fn stop(&self) -> (Value, Value) {
        match &self.end {
            None => (Value::Null, Value::Null),
            // Anthropic has no word for an answer that the client had ended from elsewhere: it is cut off, too.
            Some(EndReason::Length | EndReason::Abort) => (json!("max_tokens"), Value::Null),
            Some(EndReason::StopText(text)) => (json!("stop_sequence"), json!(text)),
            Some(EndReason::Stop | EndReason::StopToken(_)) if self.called => (json!("tool_use"), Value::Null),
            Some(EndReason::Stop | EndReason::StopToken(_)) => (json!("end_turn"), Value::Null),
        }
    }

    /// Tokens that came from the cache are not among `input_tokens`.
    fn usage(&self, usage: Usage) -> Value {
        let cached = if self.cache_details { usage.cached_tokens } else { 0 };
        json!({
            "input_tokens": usage.prompt_tokens.saturating_sub(cached),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage.completion_tokens,
        })
    }

    fn message(&self, usage: Usage) -> Value {
        let (stop_reason, stop_sequence) = self.stop();
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": self.content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": self.usage(usage),
        })
    }
}

impl Open {
    /// The block as it is now.
    fn block(&self) -> Value {
        match &self.kind {
            Kind::Text => json!({"type": "text", "text": self.text}),
            // Nothing is signed here, and any signature is taken back.
            Kind::Thinking => json!({"type": "thinking", "thinking": self.text, "signature": ""}),
            Kind::ToolUse { id, name, .. } => {
                // What a limit has cut off, or the model has written badly, is no object: `max_tokens` or the stream tells.
                let input = serde_json::from_str::<Value>(&self.text).ok().filter(Value::is_object).unwrap_or_else(|| json!({}));
                json!({"type": "tool_use", "id": id, "name": name, "input": input})
            }
        }
    }
}

impl Dialect for Writer {
    fn whole(&mut self, choices: Vec<ChoiceUpdate>, usage: Usage) -> Value {
        choices.iter().for_each(|choice| self.add(choice));
        self.finish();
        self.message(usage)
    }

    fn open(&mut self, usage: Usage) {
        self.streams = true;
        let usage = Usage { completion_tokens: 0, ..usage };
        self.event(&json!({"type": "message_start", "message": self.message(usage)}));
        self.event(&json!({"type": "ping"}));
    }

    fn delta(&mut self, deltas: Vec<Delta>, _: Usage) {
        by_choice(deltas).iter().for_each(|update| self.add(update));
    }

    fn end(&mut self, usage: Usage) {
        self.finish();
        let (stop_reason, stop_sequence) = self.stop();
        let delta = json!({"stop_reason": stop_reason, "stop_sequence": stop_sequence});
        self.event(&json!({"type": "message_delta", "delta": delta, "usage": self.usage(usage)}));
        self.event(&json!({"type": "message_stop"}));
    }

    fn take(&mut self) -> Option<Value> {
        Some(std::mem::take(&mut self.frames)).filter(|frames| !frames.is_empty()).map(Value::String)
    }

    fn error(&self, failure: &Failure) -> Value {
        Value::String(ErrorForm::Anthropic.sse(failure.status(), &failure::body(failure), 0))
    }
}
