//! Items of a conversation → messages of a chat.

use serde_json::{Map, Value, json};

use crate::api::fields::rows::{elements, member, object, string};
use crate::api::fields::{Field, missing, wrong_type};
use crate::error::Failure;

/// Messages of a chat, made of items one after another.
#[derive(Default)]
pub struct Conversation {
    pub messages: Vec<Value>,
    /// For each message, the name of the item that it began with.
    pub origins: Vec<String>,
    /// The functions called so far: id and name.
    calls: Vec<(String, String)>,
}

impl Conversation {
    /// Adds an item. Its failures name its place.
    pub fn add(&mut self, item: &Field<'_>) -> Result<(), Failure> {
        let fields = object(item, "an item, such as {\"role\": \"user\", \"content\": \"…\"}")?;
        let given = member(Some(&item.name), fields, "type").map(|field| string(&field)).transpose()?;
        match given {
            None | Some("message") => self.message(item, fields),
            Some("function_call") => self.call(item, fields),
            Some("function_call_output") => self.output(item, fields),
            Some("reasoning") => self.reasoning(item, fields),
            Some(other) => Err(unsupported(&item.name, &format!("an item of type '{other}', which this server does not take"))),
        }
    }

    fn push(&mut self, item: &Field<'_>, message: Value) {
        self.messages.push(message);
        self.origins.push(item.name.clone());
    }

    fn message(&mut self, item: &Field<'_>, fields: &Map<String, Value>) -> Result<(), Failure> {
        let role = required(item, fields, "role")?;
        let content = member(Some(&item.name), fields, "content");
        let content = content.ok_or_else(|| {
            let name = format!("{}.content", item.name);
            missing(&name, format!("'{name}' is missing. It is a string or a list of content parts."))
        })?;
        match role {
            "user" | "system" | "developer" => self.push(item, json!({"role": role, "content": texts(&content)?})),
            "assistant" => {
                let content = match texts(&content)? {
                    Value::Array(parts) => parts,
                    text => vec![json!({"type": "text", "text": text})],
                };
                self.by_assistant(item, "content", content);
            }
            other => {
                let name = format!("{}.role", item.name);
                let message = format!("'{name}' is '{other}'. It must be one of user, system, developer, assistant.");
                return Err(Failure::bad_request(name, message).code("invalid_value"));
            }
        }
        Ok(())
    }

    fn call(&mut self, item: &Field<'_>, fields: &Map<String, Value>) -> Result<(), Failure> {
        let (id, name) = (required(item, fields, "call_id")?, required(item, fields, "name")?);
        let arguments = member(Some(&item.name), fields, "arguments").map(|field| string(&field)).transpose()?.unwrap_or_default();
        self.calls.push((id.to_owned(), name.to_owned()));
        let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        self.by_assistant(item, "tool_calls", vec![call]);
        Ok(())
    }

    fn output(&mut self, item: &Field<'_>, fields: &Map<String, Value>) -> Result<(), Failure> {
        let id = required(item, fields, "call_id")?;
        let content = member(Some(&item.name), fields, "output").map_or(Ok(json!("")), |field| texts(&field))?;
        let mut message = json!({"role": "tool", "tool_call_id": id, "content": content});
        if let Some((_, name)) = self.calls.iter().rfind(|(known, _)| known == id) {
            message["name"] = json!(name);
        }
        self.push(item, message);
        Ok(())
    }

    /// What the model thought: the text itself, else its summary. Of an encrypted one nothing can be read.
    fn reasoning(&mut self, item: &Field<'_>, fields: &Map<String, Value>) -> Result<(), Failure> {
        let mut text = String::new();
        for name in ["content", "summary"] {
            let Some(list) = member(Some(&item.name), fields, name).filter(|_| text.is_empty()) else { continue };
            let mut texts = Vec::new();
            for part in elements(&list, "a list")? {
                texts.push(required(&part, object(&part, "an object with 'text'")?, "text")?);
            }
            text = texts.join("\n");
        }
        if text.is_empty() {
            return Ok(());
        }
        self.by_assistant(item, "content", Vec::new());
        if let Some(message) = self.messages.last_mut().and_then(Value::as_object_mut) {
            let thought = message.entry("reasoning_content").or_insert_with(|| json!(""));
            let before = thought.as_str().unwrap_or_default();
            *thought = if before.is_empty() { json!(text) } else { json!(format!("{before}\n{text}")) };
        }
        Ok(())
    }

    /// Adds to a list of the assistant's message, which goes on until another speaks.
    fn by_assistant(&mut self, item: &Field<'_>, list: &str, more: Vec<Value>) {
        if self.messages.last().is_none_or(|last| last["role"] != "assistant") {
            self.push(item, json!({"role": "assistant", "content": []}));
        }
        let message = self.messages.last_mut().and_then(Value::as_object_mut);
        if let Some(Value::Array(values)) = message.map(|message| message.entry(list).or_insert_with(|| json!([]))) {
            values.extend(more);
        }
    }
}

/// The text of a content: a string as it is, or its parts.
fn texts(field: &Field<'_>) -> Result<Value, Failure> {
    if field.value.is_string() {
        return Ok(field.value.clone());
    }
    let part = |part: Field<'_>| {
        let fields = object(&part, "a content part, such as {\"type\": \"input_text\", \"text\": \"…\"}")?;
        let text = match required(&part, fields, "type")? {
            "input_text" | "output_text" | "text" => required(&part, fields, "text")?,
            "refusal" => required(&part, fields, "refusal")?,
            other => {
                return Err(unsupported(
                    &part.name,
                    &format!("a part of type '{other}', which this model does not take: it reads text only"),
                ));
            }
        };
        Ok(json!({"type": "text", "text": text}))
    };
    let parts = field.value.as_array().ok_or_else(|| wrong_type(field, "a string or a list of content parts"))?;
    let names = (0..parts.len()).map(|j| format!("{}[{j}]", field.name));
    names.zip(parts).map(|(name, value)| part(Field { name, value })).collect()
}

/// A string that must be there.
pub fn required<'a>(item: &Field<'_>, fields: &'a Map<String, Value>, name: &str) -> Result<&'a str, Failure> {
    match member(Some(&item.name), fields, name) {
        Some(field) => string(&field),
        None => {
            let name = format!("{}.{name}", item.name);
            Err(missing(&name, format!("'{name}' is missing. It is a string.")))
        }
    }
}

pub fn unsupported(name: &str, what: &str) -> Failure {
    Failure::bad_request(name, format!("'{name}' is {what}.")).code("unsupported_value")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(items: Value) -> Result<Conversation, Failure> {
        let mut conversation = Conversation::default();
        let input = Field { name: "input".to_owned(), value: &items };
        for item in elements(&input, "a list")? {
            conversation.add(&item)?;
        }
        Ok(conversation)
    }

    #[test]
    fn items_of_the_assistant_are_one_message() {
        let conversation = read(json!([
            {"role": "user", "content": "Weather?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One moment.", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{\"city\":\"Paris\"}"},
            {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c2", "output": "12:00"},
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "Rain"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        ]))
        .unwrap();
        let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        assert_eq!(
            conversation.messages,
            [
                json!({"role": "user", "content": "Weather?"}),
                json!({
                    "role": "assistant",
                    "content": [{"type": "text", "text": "One moment."}],
                    "reasoning_content": "Look.",
                    "tool_calls": [call("c1", "weather", "{\"city\":\"Paris\"}"), call("c2", "time", "{}")],
                }),
                json!({"role": "tool", "tool_call_id": "c2", "content": "12:00", "name": "time"}),
                json!({"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Rain"}], "name": "weather"}),
                json!({"role": "assistant", "content": [{"type": "text", "text": "No."}]}),
                json!({"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}),
            ]
        );
        assert_eq!(conversation.origins, ["input[0]", "input[1]", "input[5]", "input[6]", "input[7]", "input[8]"]);
    }

    #[test]
    fn thoughts_that_cannot_be_read_are_left_out() {
        let conversation = read(json!([
            {"type": "reasoning", "summary": [], "encrypted_content": "x"},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""},
        ]))
        .unwrap();
        assert_eq!(conversation.messages.len(), 1);
        assert_eq!((&conversation.messages[0]["reasoning_content"], &conversation.messages[0]["content"]), (&json!("a\nb"), &json!([])));
    }

    #[test]
    fn each_mistake_names_its_place() {
        let cases = [
            (json!([5]), "input[0]", None),
            (json!([{"content": "x"}]), "input[0].role", Some("missing_required_parameter")),
            (json!([{"role": "tool", "content": "x"}]), "input[0].role", Some("invalid_value")),
            (json!([{"role": "user"}]), "input[0].content", Some("missing_required_parameter")),
            (json!([{"role": "user", "content": 5}]), "input[0].content", None),
            (
                json!([{"role": "user", "content": [{"type": "input_text"}]}]),
                "input[0].content[0].text",
                Some("missing_required_parameter"),
            ),
            (
                json!([{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "input_text", "text": "b"}, {"type": "input_image", "image_url": "x"}]}]),
                "input[1].content[1]",
                Some("unsupported_value"),
            ),
            (json!([{"type": "web_search_call", "id": "x"}]), "input[0]", Some("unsupported_value")),
            (json!([{"type": 5}]), "input[0].type", None),
            (json!([{"type": "function_call", "name": "f"}]), "input[0].call_id", Some("missing_required_parameter")),
            (json!([{"type": "function_call_output", "output": "x"}]), "input[0].call_id", Some("missing_required_parameter")),
            (
                json!([{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}]),
                "input[0].output[0]",
                Some("unsupported_value"),
            ),
            (json!([{"type": "reasoning", "content": [{}]}]), "input[0].content[0].text", Some("missing_required_parameter")),
        ];
        for (items, param, code) in cases {
            let failure = read(items.clone()).map(|_| ()).unwrap_err();
            assert_eq!((failure.param.as_deref(), failure.code, failure.status()), (Some(param), code, 400), "{items}: {failure}");
            assert!(failure.message.contains(&format!("'{param}'")), "{failure}");
        }
    }
}
