//! A job's own input, answered with OpenAI's objects: whole, or as chunk objects, the last of which carries the usage.

use serde_json::{Map, Value, json};

use crate::api::delta::{ChoiceUpdate, Delta, Usage, by_choice};
use crate::api::dialects::objects::{Objects, Surface};
use crate::api::dialects::{Dialect, Prepared, job_request};
use crate::api::failure;
use crate::api::served::ServedModel;
use crate::error::Failure;

pub fn read(served: &ServedModel, id: &str, body: &Value) -> Result<Prepared, Failure> {
    let (request, surface) = job_request::read(served, body)?;
    let objects = Objects::new(served, id, surface, &request);
    Ok(Prepared { dialect: Box::new(Native { objects, opening: false, chunk: None }), request })
}

struct Native {
    objects: Objects,
    /// The next chunk is the first.
    opening: bool,
    /// What is ready of the stream.
    chunk: Option<Map<String, Value>>,
}

impl Native {
    /// The first chunk opens every choice, in order.
    fn with_all_choices(&self, mut updates: Vec<ChoiceUpdate>) -> Vec<ChoiceUpdate> {
        let count = self.objects.choices();
        for choice in (0..count).filter(|_| count > 1) {
            if !updates.iter().any(|update| update.choice == choice) {
                updates.push(ChoiceUpdate::of(choice));
            }
        }
        updates.sort_by_key(|update| update.choice);
        updates
    }
}

impl Dialect for Native {
    fn whole(&mut self, choices: Vec<ChoiceUpdate>, usage: Usage) -> Value {
        let mut object = self.objects.whole(&choices, usage);
        if self.objects.surface == Surface::Text {
            object.insert("text".to_owned(), json!(choices.first().map(|choice| &choice.text)));
        }
        Value::Object(object)
    }

    fn open(&mut self, _: Usage) {
        self.opening = true;
    }

    fn delta(&mut self, deltas: Vec<Delta>, usage: Usage) {
        let first = std::mem::take(&mut self.opening);
        let mut updates = by_choice(deltas);
        if first {
            updates = self.with_all_choices(updates);
        }
        let mut choices = Vec::new();
        for update in updates {
            let opens = self.objects.opens(&update);
            if opens || update.end.is_some() || self.objects.shows(&update) {
                let mut choice = self.objects.chunk_choice(&update, opens, opens || !update.text.is_empty());
                self.objects.put_tokens(&mut choice, &update, opens);
                choices.push(choice);
            }
        }
        if choices.is_empty() {
            return;
        }
        let mut chunk = self.objects.chunk(choices, usage);
        if first {
            self.objects.put_chat_prompt_ids(&mut chunk);
        }
        self.chunk = Some(chunk);
    }

    fn end(&mut self, usage: Usage) {
        if let Some(chunk) = &mut self.chunk {
            chunk.insert("usage".to_owned(), self.objects.usage(usage));
        }
    }

    fn take(&mut self) -> Option<Value> {
        self.chunk.take().map(Value::Object)
    }

    fn error(&self, failure: &Failure) -> Value {
        failure::chunk(failure)
    }
}
