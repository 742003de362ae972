//! How a chat template takes the contents of messages: as text, as lists of parts, or either way.
//!
//! Templates of text models write `message.content` into the prompt; those of multimodal models and some newer ones walk through a list of
//! parts. Which it is, is found out by rendering: macros, filters and branches by role hide it from a reader of the source.

use serde_json::{Map, Value, json};

use crate::api::prompt::template::ChatTemplate;
use crate::config::ContentFormat;

/// What a template takes, by the role of the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contents {
    system: Takes,
    user: Takes,
    assistant: Takes,
    tool: Takes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    /// Strings only: parts are joined by a newline.
    Text,
    Both,
    /// Parts only: a string becomes one part.
    Parts,
}

/// Texts that no template writes by itself.
const TEXTS: [&str; 2] = ["contentprobeone", "contentprobetwo"];
/// A key of a part that comes out only when a template writes the list itself, instead of its texts.
const KEY: &str = "contentprobekey";

impl Contents {
    /// What `template` takes, unless the settings say it. `special_tokens`: variables that it may count on.
    pub fn of(template: &ChatTemplate, special_tokens: &Map<String, Value>, format: ContentFormat) -> Self {
        let all = |takes| Self { system: takes, user: takes, assistant: takes, tool: takes };
        match format {
            ContentFormat::String => return all(Takes::Text),
            ContentFormat::OpenAi => return all(Takes::Parts),
            ContentFormat::Auto => {}
        }
        let user = probe(template, special_tokens, |content| json!([{"role": "user", "content": content}]));
        // The messages around the one in question are in a form that the template takes.
        let (greeting, nothing) = if user == Takes::Parts { (parts("Hi"), json!([])) } else { (json!("Hi"), json!("")) };
        let hi = json!({"role": "user", "content": greeting});
        let call = json!({"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}});
        let calling = json!({"role": "assistant", "content": nothing, "tool_calls": [call]});
        Self {
            system: probe(template, special_tokens, |content| json!([{"role": "system", "content": content}, hi])),
            user,
            assistant: probe(template, special_tokens, |content| json!([hi, {"role": "assistant", "content": content}, hi])),
            tool: probe(
                template,
                special_tokens,
                |content| json!([hi, calling, {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": content}]),
            ),
        }
    }

    /// Brings contents, each a string or a list of text parts, into the form that the template takes.
    pub fn shape(&self, messages: &mut [Value]) {
        for message in messages {
            let takes = match message.get("role").and_then(Value::as_str) {
                Some("system") => self.system,
                Some("assistant") => self.assistant,
                Some("tool") => self.tool,
                _ => self.user,
            };
            let Some(content) = message.get_mut("content") else { continue };
            match (takes, &*content) {
                (Takes::Text, Value::Array(_)) => *content = Value::String(text(content)),
                (Takes::Parts, Value::String(text)) if text.is_empty() => *content = json!([]),
                (Takes::Parts, Value::String(text)) => *content = parts(text),
                _ => {}
            }
        }
    }
}

/// The text of a content: its string, or the texts of its parts, joined by a newline.
pub fn text(content: &Value) -> String {
    match content {
        Value::Array(parts) => parts.iter().filter_map(|part| part.get("text")?.as_str()).collect::<Vec<_>>().join("\n"),
        content => content.as_str().unwrap_or_default().to_owned(),
    }
}

/// A text as the only part of a content.
fn parts(text: &str) -> Value {
    json!([{"type": "text", "text": text}])
}

/// Whether a template writes the text of a system message into the prompt.
pub fn shows_system(template: &ChatTemplate, contents: Contents, special_tokens: &Map<String, Value>) -> bool {
    let mut messages = [json!({"role": "system", "content": TEXTS[0]}), json!({"role": "user", "content": "Hi"})];
    contents.shape(&mut messages);
    rendered(template, special_tokens, json!(messages)).contains(TEXTS[0])
}

/// What a template makes of `messages`; nothing when it refuses them.
fn rendered(template: &ChatTemplate, special_tokens: &Map<String, Value>, messages: Value) -> String {
    let mut variables = special_tokens.clone();
    variables.extend([
        ("tools".to_owned(), Value::Null),
        ("documents".to_owned(), Value::Null),
        ("add_generation_prompt".to_owned(), json!(true)),
        ("messages".to_owned(), messages),
    ]);
    template.render(&variables).unwrap_or_default()
}

/// Renders the conversation that `around` makes of a content, as parts and as a string. What a template cannot render, it does not take.
fn probe(template: &ChatTemplate, special_tokens: &Map<String, Value>, around: impl Fn(Value) -> Value) -> Takes {
    let rendered = |content: Value| rendered(template, special_tokens, around(content));
    let of_parts = rendered(TEXTS.iter().map(|text| json!({"type": "text", "text": text, KEY: true})).collect());
    if of_parts.contains(KEY) || !TEXTS.iter().all(|text| of_parts.contains(text)) {
        return Takes::Text;
    }
    if rendered(json!(TEXTS[0])).contains(TEXTS[0]) { Takes::Both } else { Takes::Parts }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(template: &str) -> Contents {
        let tokens = Map::from_iter([("bos_token".to_owned(), json!("<s>"))]);
        Contents::of(&ChatTemplate::compile(template).unwrap(), &tokens, ContentFormat::Auto)
    }

    const WALK: &str = "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}";

    #[test]
    fn templates_that_write_contents_take_text() {
        for write in [
            "{{ message.content }}",
            "{{ bos_token + message['content'] + '\\n' }}",
            "{{ message.content | trim }}",
            "{{ message.content | tojson }}",
            "{% if message.content is string %}{{ message.content }}{% endif %}",
            "{{ message.content.split('</think>')[-1] }}",
        ] {
            let contents = of(&format!("{{% for message in messages %}}{write};{{% endfor %}}"));
            assert_eq!(
                (contents.system, contents.user, contents.assistant, contents.tool),
                (Takes::Text, Takes::Text, Takes::Text, Takes::Text)
            );
        }
        assert_eq!(of("{{ raise_exception('no') }}").user, Takes::Text);
    }

    #[test]
    fn whether_system_messages_are_shown_is_found_out() {
        let shows = |source: &str| {
            let template = ChatTemplate::compile(source).unwrap();
            shows_system(&template, Contents::of(&template, &Map::new(), ContentFormat::Auto), &Map::new())
        };
        assert!(shows("{% for message in messages %}{{ message.content }}{% endfor %}"));
        assert!(shows(&format!("{{% for message in messages %}}{WALK}{{% endfor %}}")));
        assert!(!shows("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"));
        assert!(!shows(
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
        ));
    }

    #[test]
    fn templates_that_walk_through_parts_take_them() {
        let contents = of(&format!("{{% for message in messages %}}{WALK}{{% endfor %}}"));
        assert_eq!(
            (contents.system, contents.user, contents.assistant, contents.tool),
            (Takes::Parts, Takes::Parts, Takes::Parts, Takes::Parts)
        );
        let either = format!("{{% if message.content is string %}}{{{{ message.content }}}}{{% else %}}{WALK}{{% endif %}}");
        assert_eq!(of(&format!("{{% for message in messages %}}{either}{{% endfor %}}")).user, Takes::Both);
        let by_macro = "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}{% for message in messages %}{{ show(message.content) }}{% endfor %}";
        assert_eq!(of(by_macro).user, Takes::Both);
        assert_eq!(of("{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}").user, Takes::Parts);
    }

    #[test]
    fn each_role_counts_for_itself() {
        let template = format!(
            "{{% for message in messages %}}{{% if message.role == 'user' %}}{WALK}{{% else %}}{{{{ message.content | trim }}}}{{% endif %}}{{% endfor %}}"
        );
        let contents = of(&template);
        assert_eq!(
            (contents.system, contents.user, contents.assistant, contents.tool),
            (Takes::Text, Takes::Parts, Takes::Text, Takes::Text)
        );
        let two = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let mut messages =
            [json!({"role": "system", "content": two}), json!({"role": "user", "content": two}), json!({"role": "user", "content": "c"})];
        contents.shape(&mut messages);
        assert_eq!(messages[0]["content"], "a\nb");
        assert_eq!((&messages[1]["content"], &messages[2]["content"]), (&two, &json!([{"type": "text", "text": "c"}])));
    }

    #[test]
    fn a_setting_decides_for_all() {
        let template = ChatTemplate::compile(&format!("{{% for message in messages %}}{WALK}{{% endfor %}}")).unwrap();
        assert_eq!(Contents::of(&template, &Map::new(), ContentFormat::String).user, Takes::Text);
        let plain = ChatTemplate::compile("{% for message in messages %}{{ message.content }}{% endfor %}").unwrap();
        assert_eq!(Contents::of(&plain, &Map::new(), ContentFormat::OpenAi).tool, Takes::Parts);
    }
}
