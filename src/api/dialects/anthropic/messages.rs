//! Anthropic's messages → messages of a chat.

use serde_json::{Map, Value, json};

use crate::api::fields::rows::{Rows, elements, member, object, string};
use crate::api::fields::{Field, missing, wrong_type};
use crate::error::Failure;

/// The first line of Claude Code's system prompt. It changes with every request, and nothing behind it could be found in the prefix cache.
const BILLING: &str = "x-anthropic-billing-header";

/// Messages of a chat.
#[derive(Default)]
pub struct Conversation {
    pub messages: Vec<Value>,
    /// For each message, the name of what it was made of.
    pub origins: Vec<String>,
    /// The tools called so far: id and name.
    calls: Vec<(String, String)>,
}

/// `system` and `messages`.
pub fn read(rows: &Rows<'_>) -> Result<Conversation, Failure> {
    let mut conversation = Conversation::default();
    if let Some(system) = rows.get("system") {
        let mut texts = texts(&system)?;
        if let Some(first) = texts.first_mut().filter(|first| first.starts_with(BILLING)) {
            *first = first.split_once('\n').map_or(String::new(), |(_, rest)| rest.to_owned());
        }
        texts.retain(|text| !text.is_empty());
        if !texts.is_empty() {
            conversation.push("system", json!({"role": "system", "content": parts(texts)}));
        }
    }
    let Some(field) = rows.get("messages") else {
        return Err(missing("messages", "'messages' is missing. It is a list of at least one message."));
    };
    let messages = elements(&field, "a list of messages")?;
    if messages.is_empty() {
        return Err(missing("messages", "'messages' must hold at least one message."));
    }
    for message in messages {
        conversation.add(&message)?;
    }
    Ok(conversation)
}

impl Conversation {
    fn push(&mut self, origin: &str, message: Value) {
        self.messages.push(message);
        self.origins.push(origin.to_owned());
    }

    fn add(&mut self, message: &Field<'_>) -> Result<(), Failure> {
        let fields = object(message, "a message object with 'role' and 'content'")?;
        let role = required(message, fields, "role")?;
        let Some(content) = member(Some(&message.name), fields, "content") else {
            let name = format!("{}.content", message.name);
            return Err(missing(&name, format!("'{name}' is missing. It is a string or a list of blocks.")));
        };
        match role {
            "user" => self.by_user(message, &content),
            "assistant" => self.by_assistant(message, &content),
            "system" => {
                self.push(&message.name, json!({"role": "system", "content": parts(texts(&content)?)}));
                Ok(())
            }
            other => {
                let name = format!("{}.role", message.name);
                let text = format!("'{name}' is '{other}'. It must be user or assistant; a system prompt stands in 'system'.");
                Err(Failure::bad_request(name, text).code("invalid_value"))
            }
        }
    }

    /// Results of tools stand before what else the user says.
    fn by_user(&mut self, message: &Field<'_>, content: &Field<'_>) -> Result<(), Failure> {
        let (mut said, mut results) = (Vec::new(), false);
        for block in blocks(content)? {
            match block.kind {
                "tool_result" => {
                    results = true;
                    self.result(&block)?;
                }
                _ => block.texts(&mut said)?,
            }
        }
        if !said.is_empty() || !results {
            self.push(&message.name, json!({"role": "user", "content": parts(said)}));
        }
        Ok(())
    }

    fn result(&mut self, block: &Block<'_>) -> Result<(), Failure> {
        let id = required(&block.field, block.fields, "tool_use_id")?;
        let mut texts = match member(Some(&block.field.name), block.fields, "content") {
            Some(content) => texts(&content)?,
            None => Vec::new(),
        };
        let failed = member(Some(&block.field.name), block.fields, "is_error");
        let failed = failed.map_or(Ok(false), |field| field.value.as_bool().ok_or_else(|| wrong_type(&field, "true or false")))?;
        // A chat has no other place for it.
        if failed && !texts.first().is_some_and(|text| text.starts_with("Error")) {
            texts.insert(0, "Error:".to_owned());
        }
        let mut message = json!({"role": "tool", "tool_call_id": id, "content": parts(texts)});
        if let Some((_, name)) = self.calls.iter().rfind(|(known, _)| known == id) {
            message["name"] = json!(name);
        }
        self.push(&block.field.name, message);
        Ok(())
    }

    fn by_assistant(&mut self, message: &Field<'_>, content: &Field<'_>) -> Result<(), Failure> {
        let (mut said, mut thought, mut calls) = (Vec::new(), Vec::new(), Vec::new());
        for block in blocks(content)? {
            match block.kind {
                "thinking" => thought.push(required(&block.field, block.fields, "thinking")?),
                // Nobody but who wrote it can read it.
                "redacted_thinking" => {}
                "tool_use" => {
                    let (id, name) = (required(&block.field, block.fields, "id")?, required(&block.field, block.fields, "name")?);
                    let input = member(Some(&block.field.name), block.fields, "input");
                    let input = input.map(|input| object(&input, "an object").cloned()).transpose()?.unwrap_or_default();
                    self.calls.push((id.to_owned(), name.to_owned()));
                    let arguments = Value::Object(input).to_string();
                    calls.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}));
                }
                _ => block.texts(&mut said)?,
            }
        }
        said.retain(|text| !text.is_empty());
        let said: Vec<Value> = said.into_iter().map(|text| json!({"type": "text", "text": text})).collect();
        let mut answer = json!({"role": "assistant", "content": said});
        if !thought.is_empty() {
            answer["reasoning_content"] = json!(thought.join("\n"));
        }
        if !calls.is_empty() {
            answer["tool_calls"] = Value::Array(calls);
        }
        self.push(&message.name, answer);
        Ok(())
    }
}

/// One block of a content.
struct Block<'a> {
    field: Field<'a>,
    fields: &'a Map<String, Value>,
    kind: &'a str,
}

/// The blocks of a content; a string is one of text.
fn blocks<'a>(content: &Field<'a>) -> Result<Vec<Block<'a>>, Failure> {
    // What a string has in place of fields.
    static NONE: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
    if content.value.is_string() {
        let field = Field { name: content.name.clone(), value: content.value };
        return Ok(vec![Block { field, fields: &NONE, kind: "text" }]);
    }
    let read = |field: Field<'a>| {
        let fields = object(&field, "a block, such as {\"type\": \"text\", \"text\": \"…\"}")?;
        let kind = required(&field, fields, "type")?;
        Ok(Block { field, fields, kind })
    };
    elements(content, "a string or a list of blocks")?.into_iter().map(read).collect()
}

impl Block<'_> {
    /// Adds the texts of a block that is nothing but text.
    fn texts(&self, all: &mut Vec<String>) -> Result<(), Failure> {
        match self.kind {
            "text" => all.push(match self.field.value.as_str() {
                Some(text) => text.to_owned(),
                None => required(&self.field, self.fields, "text")?.to_owned(),
            }),
            "document" => self.document(all)?,
            other => {
                let what = format!("a block of type '{other}', which this model does not take here: it reads text only");
                return Err(unsupported(&self.field.name, &what));
            }
        }
        Ok(())
    }

    /// The text of a document, after its title and context.
    fn document(&self, all: &mut Vec<String>) -> Result<(), Failure> {
        let name = &self.field.name;
        let citations = member(Some(name), self.fields, "citations");
        if let Some(citations) = citations.filter(|citations| citations.value["enabled"] == true) {
            return Err(unsupported(&citations.name, "a wish for citations, which this server does not give"));
        }
        for about in ["title", "context"] {
            all.extend(member(Some(name), self.fields, about).map(|field| string(&field).map(str::to_owned)).transpose()?);
        }
        let Some(source) = member(Some(name), self.fields, "source") else {
            let name = format!("{name}.source");
            return Err(missing(&name, format!("'{name}' is missing. It is an object with 'type'.")));
        };
        let fields = object(&source, "an object with 'type'")?;
        match required(&source, fields, "type")? {
            "text" => all.push(required(&source, fields, "data")?.to_owned()),
            "content" => {
                if let Some(content) = member(Some(&source.name), fields, "content") {
                    all.extend(texts(&content)?);
                }
            }
            other => {
                return Err(unsupported(&source.name, &format!("of type '{other}', and only the text of a document can be read here")));
            }
        }
        Ok(())
    }
}

/// The texts of a content that is nothing but text.
fn texts(content: &Field<'_>) -> Result<Vec<String>, Failure> {
    let mut texts = Vec::new();
    for block in blocks(content)? {
        block.texts(&mut texts)?;
    }
    Ok(texts)
}

/// Texts as the content of a message: one by itself, or several as parts.
fn parts(mut texts: Vec<String>) -> Value {
    match texts.len() {
        0 => json!(""),
        1 => json!(texts.swap_remove(0)),
        _ => texts.into_iter().map(|text| json!({"type": "text", "text": text})).collect(),
    }
}

/// A string that must be there.
pub fn required<'a>(parent: &Field<'_>, fields: &'a Map<String, Value>, name: &str) -> Result<&'a str, Failure> {
    match member(Some(&parent.name), fields, name) {
        Some(field) => string(&field),
        None => {
            let name = format!("{}.{name}", parent.name);
            Err(missing(&name, format!("'{name}' is missing. It is a string.")))
        }
    }
}

fn unsupported(name: &str, what: &str) -> Failure {
    Failure::bad_request(name, format!("'{name}' is {what}.")).code("unsupported_value")
}
