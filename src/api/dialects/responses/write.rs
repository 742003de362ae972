//! Deltas → output items and their events.
//!
//! A whole answer takes the same way as a stream, without its events: so both give the same items.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::api::clock;
use crate::api::delta::{ChoiceUpdate, Delta, EndReason, Part, Usage, by_choice};
use crate::api::dialects::Dialect;
use crate::api::dialects::objects::logprobs::TokenNames;
use crate::api::failure::{self, ErrorForm};
use crate::api::frames;
use crate::api::request::GenerationRequest;
use crate::api::response_store::{ResponseStore, StoredResponse, new_id};
use crate::api::served::ServedModel;
use crate::error::Failure;
use crate::text::tokenizer::Tokenizer;

/// Where a response is kept, with the conversation that it answers.
type Kept = (Arc<ResponseStore>, Vec<Arc<Value>>);

pub struct Writer {
    /// The response, in progress until its end.
    response: Map<String, Value>,
    kept: Option<Kept>,
    tokenizer: Arc<Tokenizer>,
    /// Alternatives at each token, when log probabilities are wanted.
    top_logprobs: Option<u32>,
    as_ids: bool,
    /// Items that are complete.
    output: Vec<Value>,
    open: Option<Open>,
    end: Option<EndReason>,
    events: Events,
}

/// The item that is being written.
struct Open {
    id: String,
    kind: Kind,
    /// Of a message, a thought, or a call's arguments.
    text: String,
    logprobs: Vec<Value>,
    /// How much of both no event has told yet.
    untold: (usize, usize),
}

enum Kind {
    Message,
    Reasoning,
    Call { index: usize, id: String, name: String },
}

/// Events of a stream, numbered.
#[derive(Default)]
struct Events {
    /// Of a whole answer there are none.
    on: bool,
    count: usize,
    /// Frames that are ready.
    frames: String,
}

impl Events {
    fn add(&mut self, name: &str, more: Value) {
        if self.on {
            self.frames.push_str(&frame(name, self.count, more));
            self.count += 1;
        }
    }
}

/// One event with its number.
fn frame(name: &str, number: usize, more: Value) -> String {
    let mut data = json!({"type": name, "sequence_number": number});
    if let (Value::Object(data), Value::Object(more)) = (&mut data, more) {
        data.extend(more);
    }
    frames::event(name, &data)
}

impl Writer {
    /// `repeated`: fields of the request that the response repeats.
    pub fn new(served: &ServedModel, request: &GenerationRequest, repeated: Map<String, Value>, kept: Option<Kept>) -> Self {
        let options = &request.options;
        let number = |value: f32| json!(value.to_string().parse::<f64>().unwrap_or(f64::from(value)));
        let mut response = Map::from_iter([
            ("id".to_owned(), json!(new_id("resp"))),
            ("object".to_owned(), json!("response")),
            ("created_at".to_owned(), json!(clock::now())),
            ("status".to_owned(), json!("in_progress")),
            ("completed_at".to_owned(), Value::Null),
            ("error".to_owned(), Value::Null),
            ("incomplete_details".to_owned(), Value::Null),
            ("model".to_owned(), json!(served.name())),
            ("output".to_owned(), json!([])),
            ("background".to_owned(), json!(false)),
            ("service_tier".to_owned(), json!("default")),
            ("store".to_owned(), json!(kept.is_some())),
            ("temperature".to_owned(), number(options.sampling.temperature)),
            ("top_p".to_owned(), number(options.sampling.top_p)),
            ("usage".to_owned(), Value::Null),
        ]);
        response.extend(repeated);
        Self {
            response,
            kept,
            tokenizer: served.tokenizer.clone(),
            top_logprobs: options.logprobs.output,
            as_ids: options.logprobs.as_ids,
            output: Vec::new(),
            open: None,
            end: None,
            events: Events::default(),
        }
    }

    fn add(&mut self, update: &ChoiceUpdate) {
        for part in update.parts() {
            match part {
                Part::Text(text) => self.text(|kind| matches!(kind, Kind::Message), || Kind::Message, text),
                Part::Reasoning(text) => self.text(|kind| matches!(kind, Kind::Reasoning), || Kind::Reasoning, text),
                Part::CallStart { index, id, name } => {
                    self.begin(Kind::Call { index, id: id.to_owned(), name: name.to_owned() });
                }
                Part::Arguments { index, text } => self.arguments(index, text),
                Part::Logprobs(tokens) => {
                    let names = TokenNames { tokenizer: &self.tokenizer, as_ids: self.as_ids };
                    if let (Some(Open { kind: Kind::Message, logprobs, .. }), Some(top)) = (&mut self.open, self.top_logprobs) {
                        logprobs.extend(names.items(tokens, top));
                    }
                }
            }
        }
        self.tell();
        if update.end.is_some() {
            self.end.clone_from(&update.end);
        }
    }

    /// Adds to the open item if it is of the kind, else to a new one.
    fn text(&mut self, is_it: impl Fn(&Kind) -> bool, kind: impl Fn() -> Kind, text: &str) {
        if !self.open.as_ref().is_some_and(|open| is_it(&open.kind)) {
            if text.is_empty() {
                return;
            }
            self.begin(kind());
        }
        if let Some(open) = &mut self.open {
            open.text.push_str(text);
        }
    }

    /// Arguments of another call than the open one have nowhere to go: calls come one after another.
    fn arguments(&mut self, of: usize, text: &str) {
        if let Some(Open { kind: Kind::Call { index, .. }, text: arguments, .. }) = &mut self.open
            && *index == of
        {
            arguments.push_str(text);
        }
    }

    /// Closes the open item and begins one.
    fn begin(&mut self, kind: Kind) {
        self.close("completed");
        let prefix = match kind {
            Kind::Message => "msg",
            Kind::Reasoning => "rs",
            Kind::Call { .. } => "fc",
        };
        let open = Open { id: new_id(prefix), kind, text: String::new(), logprobs: Vec::new(), untold: (0, 0) };
        let output_index = self.output.len();
        self.events.add("response.output_item.added", json!({"output_index": output_index, "item": open.item("in_progress", false)}));
        if let Kind::Message = open.kind {
            let part = json!({"item_id": open.id, "output_index": output_index, "content_index": 0, "part": output_text("", &[])});
            self.events.add("response.content_part.added", part);
        }
        self.open = Some(open);
    }

    /// An event for what has come to the open item since the last one.
    fn tell(&mut self) {
        let output_index = self.output.len();
        let Some(open) = &mut self.open else { return };
        let (text, logprobs) = (&open.text[open.untold.0..], &open.logprobs[open.untold.1..]);
        if text.is_empty() && logprobs.is_empty() {
            return;
        }
        let mut event = json!({"item_id": open.id, "output_index": output_index});
        let name = match open.kind {
            Kind::Message => {
                event["content_index"] = json!(0);
                event["logprobs"] = json!(logprobs);
                "response.output_text.delta"
            }
            Kind::Reasoning => {
                event["content_index"] = json!(0);
                "response.reasoning_text.delta"
            }
            Kind::Call { .. } => "response.function_call_arguments.delta",
        };
        event["delta"] = json!(text);
        open.untold = (open.text.len(), open.logprobs.len());
        self.events.add(name, event);
    }

    /// Completes the open item.
    fn close(&mut self, status: &str) {
        self.tell();
        let output_index = self.output.len();
        let Some(open) = self.open.take() else { return };
        let place = json!({"item_id": open.id, "output_index": output_index});
        let with = |more: Value| {
            let mut event = place.clone();
            if let (Value::Object(event), Value::Object(more)) = (&mut event, more) {
                event.extend(more);
            }
            event
        };
        match &open.kind {
            Kind::Message => {
                let text = with(json!({"content_index": 0, "text": open.text, "logprobs": open.logprobs}));
                self.events.add("response.output_text.done", text);
                let part = with(json!({"content_index": 0, "part": output_text(&open.text, &open.logprobs)}));
                self.events.add("response.content_part.done", part);
            }
            Kind::Reasoning => self.events.add("response.reasoning_text.done", with(json!({"content_index": 0, "text": open.text}))),
            Kind::Call { name, .. } => {
                self.events.add("response.function_call_arguments.done", with(json!({"name": name, "arguments": open.text})));
            }
        }
        let item = open.item(status, true);
        self.events.add("response.output_item.done", json!({"output_index": output_index, "item": item}));
        self.output.push(item);
    }

    /// The model would have gone on.
    fn is_cut(&self) -> bool {
        matches!(self.end, Some(EndReason::Length | EndReason::Abort))
    }

    /// Completes the response, and keeps it where it is to be kept.
    fn finish(&mut self, usage: Usage) {
        let (cut, aborted) = (self.is_cut(), self.end == Some(EndReason::Abort));
        if self.open.is_none() && self.output.is_empty() {
            self.begin(Kind::Message);
        }
        self.close(if cut { "incomplete" } else { "completed" });
        let response = &mut self.response;
        response["status"] = json!(if cut { "incomplete" } else { "completed" });
        if cut {
            response["incomplete_details"] = json!({"reason": if aborted { "aborted" } else { "max_output_tokens" }});
        } else {
            response["completed_at"] = json!(clock::now());
        }
        response["output"] = Value::Array(std::mem::take(&mut self.output));
        response["usage"] = json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens.unwrap_or(0)},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        });
        if let (Some((store, input)), Some(id)) = (self.kept.take(), response["id"].as_str()) {
            store.put(id, StoredResponse { response: Value::Object(response.clone()), input });
        }
    }
}

impl Open {
    /// The item as it is now, or as it began.
    fn item(&self, status: &str, filled: bool) -> Value {
        let (id, text) = (&self.id, &self.text);
        match &self.kind {
            Kind::Message => {
                let content = if filled { vec![output_text(text, &self.logprobs)] } else { Vec::new() };
                json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
            }
            Kind::Reasoning => {
                let content = if filled { vec![json!({"type": "reasoning_text", "text": text})] } else { Vec::new() };
                json!({"id": id, "type": "reasoning", "status": status, "summary": [], "content": content})
            }
            Kind::Call { id: call_id, name, .. } => {
                json!({"id": id, "type": "function_call", "status": status, "call_id": call_id, "name": name, "arguments": text})
            }
        }
    }
}

fn output_text(text: &str, logprobs: &[Value]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

impl Dialect for Writer {
    fn whole(&mut self, choices: Vec<ChoiceUpdate>, usage: Usage) -> Value {
        choices.iter().for_each(|choice| self.add(choice));
        self.finish(usage);
        Value::Object(std::mem::take(&mut self.response))
    }

    fn open(&mut self, _: Usage) {
        self.events.on = true;
        for name in ["response.created", "response.in_progress"] {
            self.events.add(name, json!({"response": self.response}));
        }
    }

    fn delta(&mut self, deltas: Vec<Delta>, _: Usage) {
        by_choice(deltas).iter().for_each(|update| self.add(update));
    }

    fn end(&mut self, usage: Usage) {
        self.finish(usage);
        let name = if self.is_cut() { "response.incomplete" } else { "response.completed" };
        self.events.add(name, json!({"response": self.response}));
    }

    fn take(&mut self) -> Option<Value> {
        Some(std::mem::take(&mut self.events.frames)).filter(|frames| !frames.is_empty()).map(Value::String)
    }

    /// An `error` event, then the response as far as it came.
    fn error(&self, failure: &Failure) -> Value {
        let body = failure::body(failure);
        let mut response = self.response.clone();
        response["status"] = json!("failed");
        response["error"] = json!({"code": "server_error", "message": failure.message});
        let open = self.open.iter().map(|open| open.item("incomplete", true));
        response["output"] = self.output.iter().cloned().chain(open).collect();
        let mut frames = ErrorForm::Responses.sse(failure.status(), &body, self.events.count);
        frames.push_str(&frame("response.failed", self.events.count + 1, json!({"response": response})));
        Value::String(frames)
    }
}
