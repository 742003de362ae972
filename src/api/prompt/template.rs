//! The model's own chat template, rendered as Hugging Face's libraries render it: Jinja with Python's methods, `trim_blocks` and
//! `lstrip_blocks`, `raise_exception`, `strftime_now` and a plain `tojson`.

use std::io;

use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::Formatter;
use serde_json::{Map, Value};

use crate::api::clock;
use crate::error::Failure;

mod python;
mod source;

/// The template of ERNIE-4.5 text models, for repositories that bring none.
pub const ERNIE: &str = r"
{%- if add_generation_prompt is not defined -%}{%- set add_generation_prompt = true -%}{%- endif -%}
{{- cls_token | default('<|begin_of_sentence|>') -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- 'User: ' + message.content + '\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'Assistant: ' + message.content -}}{{- sep_token | default('<|end_of_sentence|>') -}}
    {%- elif message.role == 'system' -%}
        {{- message.content + '\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}
";

/// The text of a `CHAT_TEMPLATE` setting, which is a template or the path of a file that holds one. For the start only: it reads the file.
pub fn of_setting(value: &str) -> Result<String, Failure> {
    if ["{{", "{%", "{#", "\n"].iter().any(|mark| value.contains(mark)) {
        return Ok(value.to_owned());
    }
    std::fs::read_to_string(value).map_err(|error| {
        Failure::internal(format!("CHAT_TEMPLATE: {value} is neither a Jinja template nor a file that can be read ({error})"))
    })
}

/// One compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Strings that the template looks for in messages.
    searched: Vec<String>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles `source`. The error is the template engine's own text, with the line.
    pub fn compile(source: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        let syntax = minijinja::syntax::SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| error.to_string())?);
        python::install(&mut environment);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| clock::strftime(clock::now(), format));
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, source::prepared(source)).map_err(|error| error.to_string())?;
        Ok(Self { environment, searched: source::searched(source) })
    }

    /// Whether the template looks for `text` in messages, as `'</think>' in message.content` does.
    pub fn looks_for(&self, text: &str) -> bool {
        self.searched.iter().any(|searched| searched == text)
    }

    /// Renders with `variables` (messages, tools, special tokens …). What the template itself refuses is the caller's mistake: 400 with the
    /// template's own words.
    pub fn render(&self, variables: &Map<String, Value>) -> Result<String, Failure> {
        let rendered = self.environment.get_template(NAME).and_then(|template| template.render(Serde(variables)));
        rendered.map_err(|error| {
            let reason = match (error.kind(), error.detail()) {
                (ErrorKind::InvalidOperation, Some(detail)) if is_raised(&error) => detail.to_owned(),
                _ => error.to_string(),
            };
            Failure::bad_request("messages", format!("The model's chat template cannot render these messages: {reason}"))
                .code("invalid_value")
        })
    }
}

/// Marks the errors of `raise_exception` among those of the template engine.
#[derive(Debug)]
struct Raised;

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("raised by the template")
    }
}

impl std::error::Error for Raised {}

fn is_raised(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<Raised>())
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message).with_source(Raised))
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(value: &Jinja, positional: Option<Jinja>, options: Kwargs) -> Result<Jinja, Error> {
    let mut ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let mut indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    if let Some(positional) = positional {
        match bool::try_from(positional.clone()) {
            Ok(flag) => ensure_ascii = Some(flag),
            Err(_) => indent = Some(usize::try_from(positional)?),
        }
    }
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "an undefined value has no JSON"));
    }
    let failed = |error: serde_json::Error| Error::new(ErrorKind::InvalidOperation, "cannot write this value as JSON").with_source(error);
    let mut json = serde_json::to_value(value).map_err(failed)?;
    if sort_keys == Some(true) {
        json.sort_all_objects();
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        _ if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        _ => (", ".to_owned(), ": ".to_owned()),
    };
    let mut bytes = Vec::new();
    let formatter = Python { item, key, indent, ensure_ascii: ensure_ascii == Some(true), level: 0, filled: false };
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter)).map_err(failed)?;
    Ok(Jinja::from(String::from_utf8_lossy(&bytes).into_owned()))
}

/// JSON as Python's `json.dumps` lays it out.
struct Python {
    item: String,
    key: String,
    indent: Option<usize>,
    ensure_ascii: bool,
    level: usize,
    /// The innermost list or object has an element.
    filled: bool,
}

impl Python {
    fn line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            Some(indent) => write!(writer, "\n{:width$}", "", width = indent * self.level),
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &str) -> io::Result<()> {
        self.level += 1;
        self.filled = false;
        writer.write_all(bracket.as_bytes())
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &str) -> io::Result<()> {
        self.level -= 1;
        if self.filled {
            self.line(writer)?;
        }
        self.filled = true;
        writer.write_all(bracket.as_bytes())
    }

    fn element<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line(writer)
    }
}

impl Formatter for Python {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, "[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, "]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.element(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, "{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, "}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.element(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(python::float_text(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if !self.ensure_ascii || fragment.is_ascii() {
            return writer.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            if c.is_ascii() {
                write!(writer, "{c}")?;
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(template: &str, variables: Value) -> Result<String, Failure> {
        let Value::Object(variables) = variables else { panic!("an object") };
        ChatTemplate::compile(template).unwrap().render(&variables)
    }

    /// Where a template renders otherwise than in Jinja2, and why that stays.
    const DIFFERENT: &[&str] = &[
        // An error there, and nothing or its text here.
        "{{ missing|int }}",
        "{{ missing|float }}",
        "{{ none|list }}",
        "{{ ','.join([1]) }}",
        "{{ messages|sum(attribute='n') }}",
        "{% for x in none %}x{% endfor %}",
        // The text of objects that templates do not write.
        "{{ {'a': 1}.items() }}",
        "{{ {'a': 1}.keys() }}",
        "{{ range(3) }}",
        "{{ 'x' ~ small }}",
        // What minijinja's own objects say of themselves.
        "{{ (range(2)) is sequence }}",
        "{{ (namespace(a=1)) is iterable }}",
        "{{ (namespace(a=1)) is sequence }}",
        "{{ (namespace(a=1)) is mapping }}",
        "{% macro f(a, b='x') %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, b=2) }}{{ f is callable }}",
        "{{ messages[0]|attr('role') is defined }}",
        // Not there: an error that names it.
        "{{ '%r' % 'x' }}",
        "{{ 'a\\tb'.expandtabs(4) }}",
        "{{ 'Ab'.istitle() }}",
        "{{ 'ab'.isidentifier() }}",
        "{{ 'ab'.isprintable() }}",
        "{{ 'abc'.encode() }}",
        "{{ 'aXbX'.translate({}) }}",
        "{{ 'a\\nb'|indent('> ') }}",
        "{{ 'a b c'|wordcount }}",
        "{{ 'a b'|urlencode }}",
        "{{ '<b>x</b>'|striptags }}",
        "{{ 'hello world'|truncate(8) }}",
        "{{ 'hello'|center(9) }}",
        "{{ lipsum is defined }}",
    ];

    /// What Jinja2 renders, recorded by scripts/reference_templates.py.
    #[test]
    fn templates_render_as_in_jinja2() {
        let file: Value = serde_json::from_str(include_str!("template/reference.json")).unwrap();
        let rows = file["rows"].as_array().unwrap();
        assert!(rows.len() > 700);
        for row in rows {
            let (template, expected) = (row[0].as_str().unwrap(), row[1].as_str());
            let rendered = ChatTemplate::compile(template).ok().and_then(|it| it.render(file["variables"].as_object().unwrap()).ok());
            assert_eq!(rendered.as_deref() != expected, DIFFERENT.contains(&template), "{template:?}: {rendered:?}, expected {expected:?}");
        }
        for template in DIFFERENT {
            assert!(rows.iter().any(|row| row[0] == *template), "{template:?} is in the file no more");
        }
    }

    #[test]
    fn ernie_renders_its_golden_text() {
        let messages = json!([
            {"role": "system", "content": "You are terse."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Bye"},
        ]);
        let golden = "<|begin_of_sentence|>You are terse.\nUser: Hi\nAssistant: Hello.<|end_of_sentence|>User: Bye\n";
        assert_eq!(render(ERNIE, json!({"messages": messages})).unwrap(), format!("{golden}Assistant: "));
        assert_eq!(render(ERNIE, json!({"messages": messages, "add_generation_prompt": true})).unwrap(), format!("{golden}Assistant: "));
        assert_eq!(render(ERNIE, json!({"messages": messages, "add_generation_prompt": false})).unwrap(), golden);
    }

    #[test]
    fn ernie_leaves_out_other_roles_and_takes_the_models_own_tokens() {
        let messages = json!([{"role": "tool", "content": "5"}, {"role": "user", "content": "a\n b "}]);
        assert_eq!(render(ERNIE, json!({"messages": messages, "cls_token": "<s>"})).unwrap(), "<s>User: a\n b \nAssistant: ");
    }

    #[test]
    fn blocks_are_trimmed_as_hugging_face_does() {
        let template = "{% for m in messages %}\n    {% if m %}\n{{ m }}\n    {% endif %}\n{% endfor %}\nend\n";
        assert_eq!(render(template, json!({"messages": ["a", "b"]})).unwrap(), "a\nb\nend");
    }

    #[test]
    fn python_methods_and_loop_controls() {
        let template = "{%- for k, v in x.items() -%}{%- if v == 2 -%}{%- continue -%}{%- endif -%}{{ k.upper() }}{{ v }}{%- endfor -%}{{ ' a '.strip().split('b')[0] }}{{ none }}{{ true }}";
        assert_eq!(render(template, json!({"x": {"a": 1, "b": 2, "c": 3}})).unwrap(), "A1C3aNoneTrue");
    }

    #[test]
    fn to_json_is_pythons() {
        let value = json!({"b": [1, 2.0, "<é>'"], "a": {}, "c": []});
        assert_eq!(render("{{ x|tojson }}", json!({"x": value})).unwrap(), r#"{"b": [1, 2.0, "<é>'"], "a": {}, "c": []}"#);
        assert_eq!(
            render("{{ x|tojson(indent=2) }}", json!({"x": value})).unwrap(),
            "{\n  \"b\": [\n    1,\n    2.0,\n    \"<é>'\"\n  ],\n  \"a\": {},\n  \"c\": []\n}"
        );
        assert_eq!(
            render("{{ x|tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}", json!({"x": value})).unwrap(),
            r#"{"a":{},"b":[1,2.0,"<\u00e9>'"],"c":[]}"#
        );
    }

    #[test]
    fn generation_tags_are_for_training_only() {
        let template = "{% for m in messages %}{%- generation -%} {{ m }} {%- endgeneration -%}\n{% endfor %}";
        assert_eq!(render(template, json!({"messages": ["a", "b"]})).unwrap(), "ab");
    }

    #[test]
    fn what_the_template_refuses_is_a_400_with_its_words() {
        let failure = render("{{ raise_exception('Roles must alternate') }}", json!({})).unwrap_err();
        assert_eq!(failure.status(), 400);
        assert_eq!(failure.message, "The model's chat template cannot render these messages: Roles must alternate");
        let failure = render("{{ messages[0].content + 1 }}", json!({"messages": [{"content": "a"}]})).unwrap_err();
        assert_eq!(failure.status(), 400);
        assert!(failure.message.contains("chat_template:1"), "{failure}");
    }

    #[test]
    fn a_broken_template_does_not_compile() {
        assert!(ChatTemplate::compile("{% if %}").is_err());
    }

    #[test]
    fn the_date_is_there() {
        let text = render("{{ strftime_now('%Y') }}", json!({})).unwrap();
        assert!(text.parse::<u32>().unwrap() >= 2024);
    }
}
