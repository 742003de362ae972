//! OpenAI's streams: server-sent events, each with one chunk object.
//!
//! They keep to the rules that popular clients break without: a role chunk for every choice before any content; `id`, `created` and `model`
//! the same in every chunk; one finish chunk per choice; the usage chunk last, then `[DONE]`.

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::api::delta::{ChoiceUpdate, Delta, Usage, by_choice};
use crate::api::dialects::Dialect;
use crate::api::dialects::objects::{Objects, Surface};
use crate::api::failure;
use crate::api::options::GenerationOptions;
use crate::error::Failure;

pub struct Sse {
    objects: Objects,
    include_usage: bool,
    /// Every chunk tells the usage so far.
    continuous_usage: bool,
    /// Frames that are ready.
    frames: String,
}

impl Sse {
    pub fn new(objects: Objects, options: &GenerationOptions) -> Self {
        Self { objects, include_usage: options.include_usage, continuous_usage: options.continuous_usage, frames: String::new() }
    }

    fn chunk(&mut self, choice: Value, usage: Usage) {
        let chunk = self.objects.chunk(vec![choice], usage);
        self.frame(chunk, usage);
    }

    fn frame(&mut self, mut chunk: Map<String, Value>, usage: Usage) {
        if self.include_usage {
            chunk.insert("usage".to_owned(), if self.continuous_usage { self.objects.usage(usage) } else { Value::Null });
        }
        self.write(&Value::Object(chunk));
    }

    fn write(&mut self, value: &Value) {
        // Writing to a string does not fail.
        let _ = write!(self.frames, "data: {value}\n\n");
    }
}

impl Dialect for Sse {
    fn whole(&mut self, choices: Vec<ChoiceUpdate>, usage: Usage) -> Value {
        Value::Object(self.objects.whole(&choices, usage))
    }

    fn open(&mut self, usage: Usage) {
        if self.objects.surface == Surface::Text {
            return;
        }
        for choice in 0..self.objects.choices() {
            let mut chunk = self.objects.chunk(vec![self.objects.chunk_choice(&ChoiceUpdate::of(choice), true, true)], usage);
            if choice == 0 {
                self.objects.put_chat_prompt_ids(&mut chunk);
            }
            self.frame(chunk, usage);
        }
    }

    fn delta(&mut self, deltas: Vec<Delta>, usage: Usage) {
        for mut update in by_choice(deltas) {
            let opens = self.objects.opens(&update);
            let end = update.end.take();
            if self.objects.shows(&update) {
                let mut choice = self.objects.chunk_choice(&update, false, !update.text.is_empty() || !update.has_content());
                self.objects.put_tokens(&mut choice, &update, opens);
                self.chunk(choice, usage);
            }
            if end.is_some() {
                let update = ChoiceUpdate { end, ..ChoiceUpdate::of(update.choice) };
                self.chunk(self.objects.chunk_choice(&update, false, false), usage);
            }
        }
    }

    fn end(&mut self, usage: Usage) {
        if self.include_usage {
            let mut chunk = self.objects.chunk(Vec::new(), usage);
            chunk.insert("usage".to_owned(), self.objects.usage(usage));
            self.write(&Value::Object(chunk));
        }
        self.frames.push_str("data: [DONE]\n\n");
    }

    fn take(&mut self) -> Option<Value> {
        Some(std::mem::take(&mut self.frames)).filter(|frames| !frames.is_empty()).map(Value::String)
    }

    fn error(&self, failure: &Failure) -> Value {
        Value::String(failure::sse(failure))
    }
}
