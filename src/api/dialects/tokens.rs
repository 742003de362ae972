//! A job's own input, answered in the older form: `{"choices":[{"tokens":[…]}],"usage":{"input","output"}}`, whole and streamed. Each
//! entry of `tokens` is a text: the whole answer, or what one step brought.

use serde_json::{Map, Value, json};

use crate::api::delta::{ChoiceUpdate, Delta, DeltaKind, Usage};
use crate::api::dialects::{Dialect, Prepared, job_request};
use crate::api::failure;
use crate::api::fields::Fields;
use crate::api::parse::answer::Parsing;
use crate::api::served::ServedModel;
use crate::error::Failure;

pub fn read(served: &ServedModel, _: &str, body: &Value) -> Result<Prepared, Failure> {
    let (mut request, _) = job_request::read(served, body)?;
    if let Some(field) = request.options.logprobs.field(&Fields::new(body)?) {
        let message = format!("'{}' has no place in answers of the form NATIVE_OUTPUT_FORMAT=tokens. Remove it.", field.name);
        return Err(Failure::bad_request(field.name, message).code("unsupported_parameter"));
    }
    // Its texts are what the model writes, thoughts and calls with their marks.
    request.parsing = Parsing::default();
    let choices = request.prompts.len() * request.options.n;
    Ok(Prepared { dialect: Box::new(Tokens { texts: vec![Vec::new(); choices], usage: None }), request })
}

struct Tokens {
    /// Texts that are ready, by choice.
    texts: Vec<Vec<String>>,
    /// The counts, when there is something to show.
    usage: Option<Usage>,
}

impl Tokens {
    fn add(&mut self, choice: usize, text: String) {
        if let (false, Some(texts)) = (text.is_empty(), self.texts.get_mut(choice)) {
            texts.push(text);
        }
    }
}

impl Dialect for Tokens {
    fn whole(&mut self, choices: Vec<ChoiceUpdate>, usage: Usage) -> Value {
        choices.into_iter().for_each(|choice| self.add(choice.choice, choice.text));
        self.end(usage);
        self.take().unwrap_or_default()
    }

    fn open(&mut self, _: Usage) {}

    fn delta(&mut self, deltas: Vec<Delta>, usage: Usage) {
        for delta in deltas {
            if let DeltaKind::Text(text) = delta.kind {
                self.usage = Some(usage);
                self.add(delta.choice, text);
            }
        }
    }

    fn end(&mut self, usage: Usage) {
        self.usage = Some(usage);
    }

    fn take(&mut self) -> Option<Value> {
        let usage = self.usage.take()?;
        let choices: Vec<Value> = self.texts.iter_mut().map(|texts| json!({"tokens": std::mem::take(texts)})).collect();
        let counts = json!({"input": usage.prompt_tokens, "output": usage.completion_tokens});
        let mut item = Map::from_iter([("choices".to_owned(), Value::Array(choices)), ("usage".to_owned(), counts)]);
        if let Some(times) = usage.times {
            times.put(&mut item);
        }
        Some(Value::Object(item))
    }

    fn error(&self, failure: &Failure) -> Value {
        failure::chunk(failure)
    }
}
