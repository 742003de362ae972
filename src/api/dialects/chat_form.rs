//! Requests of other dialects as chat requests: one body in the form of `/v1/chat/completions`, read by the same code as those. What that
//! code finds fault with is told by the names that the caller wrote.

use serde_json::{Map, Value};

use crate::api::fields::Fields;
use crate::api::logprobs::LogprobsForm;
use crate::api::prompt::chat;
use crate::api::request::GenerationRequest;
use crate::api::served::ServedModel;
use crate::error::Failure;

/// Reads the body of a chat request.
pub fn request(served: &ServedModel, body: &Value) -> Result<GenerationRequest, Failure> {
    let fields = Fields::new(body)?;
    served.check_model(&fields)?;
    let options = served.options(&fields, LogprobsForm::Chat)?;
    chat::request(served, &fields, options)
}

/// A chat request in the making.
#[derive(Default)]
pub struct ChatForm {
    body: Map<String, Value>,
    /// What fields of the chat are called by the caller.
    names: Vec<(String, String)>,
}

impl ChatForm {
    /// `fields`: those that the caller gives as a chat would.
    pub fn new(fields: Map<String, Value>) -> Self {
        Self { body: fields, names: Vec::new() }
    }

    /// Sets a field of the chat, which the caller calls `written`.
    pub fn set(&mut self, name: &str, value: Value, written: &str) {
        self.body.insert(name.to_owned(), value);
        self.call(name, written);
    }

    /// Says what a place in the chat (`messages[1].content`) is called by the caller.
    pub fn call(&mut self, place: impl Into<String>, written: impl Into<String>) {
        self.names.push((place.into(), written.into()));
    }

    pub fn request(self, served: &ServedModel) -> Result<GenerationRequest, Failure> {
        request(served, &Value::Object(self.body)).map_err(|failure| as_written(failure, &self.names))
    }
}

/// A failure with the caller's names in place of those of the chat. Of several names the longest that fits counts.
fn as_written(mut failure: Failure, names: &[(String, String)]) -> Failure {
    let Some(param) = &failure.param else { return failure };
    let rest = |place: &str| param.strip_prefix(place).filter(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
    let found = names.iter().filter_map(|(place, written)| Some((place, written, rest(place)?))).max_by_key(|(place, ..)| place.len());
    if let Some((_, written, rest)) = found {
        let written = format!("{written}{rest}");
        failure.message = failure.message.replace(&format!("'{param}"), &format!("'{written}"));
        failure.param = Some(written);
    }
    failure
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_name_what_the_caller_wrote() {
        let names = [
            ("messages", "input"),
            ("messages[1]", "input[4]"),
            ("tools[0].function", "tools[0]"),
            ("tools[0].function.parameters", "tools[0].input_schema"),
        ];
        let names = names.map(|(place, written)| (place.to_owned(), written.to_owned()));
        for (param, expected) in [
            ("messages", "input"),
            ("messages[1].content[0]", "input[4].content[0]"),
            ("messages[11].content", "input[11].content"),
            ("tools[0].function.name", "tools[0].name"),
            ("tools[0].function.parameters.type", "tools[0].input_schema.type"),
            ("temperature", "temperature"),
        ] {
            let failure = as_written(Failure::bad_request(param, format!("'{param}' is wrong.")), &names);
            assert_eq!(failure.param.as_deref(), Some(expected));
            assert_eq!(failure.message, format!("'{expected}' is wrong."));
        }
    }
}
