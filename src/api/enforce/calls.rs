//! Grammars of tool calls: the row of a format, and the tools of a request, in Lark.

use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::api::enforce::marks;
use crate::api::grammar::{CompiledGrammar, Grammar, Grammars, JsonOptions, guided_schema, lark_string};
use crate::api::parse::tools::request::{Tool, ToolChoice, ToolRequest};
use crate::api::parse::tools::table::{Body, Keys, Named, ToolFormat, Written};
use crate::error::{Failure, Kind};
use crate::text::tokenizer::Tokenizer;

/// So long it may take to find out which of the tools' schemas cannot be used.
const SEARCH_LIMIT: Duration = Duration::from_secs(2);
/// Calls as objects, where a format has names before its arguments and the model lacks the marks for those.
const OBJECTS: Keys = Keys { name: &["name"], arguments: &["arguments"] };

/// The grammars of one request's calls.
pub struct CallGrammars {
    /// The answer is calls and nothing else.
    pub demanded: bool,
    /// All calls of an answer, where the answer, or a part of it, is nothing else.
    pub whole: Option<Arc<CompiledGrammar>>,
    /// Where a call begins in free text, and what follows.
    triggers: Vec<Trigger>,
    /// Between calls without marks.
    separators: &'static [&'static str],
}

struct Trigger {
    mark: &'static str,
    /// It opens a call at the beginning of an answer alone, and white space in it means nothing.
    bare: bool,
    rest: Arc<CompiledGrammar>,
}

/// What the text of an answer has come to.
pub enum Opened<'a> {
    /// A mark, which ends there.
    Call {
        grammar: &'a CompiledGrammar,
        after: usize,
    },
    /// The text may come to a mark without which no call begins: it is needed as it is.
    Perhaps,
    No,
}

impl CallGrammars {
    /// The grammars of what the request wants of calls; `None` where it wants none, or where the format has none.
    pub fn new(grammars: &Grammars, tokenizer: &Tokenizer, request: &ToolRequest, with_whole: bool) -> Result<Option<Self>, Failure> {
        let Some((format, written)) = request.format.and_then(|format| Some((format, format.written?))) else { return Ok(None) };
        let demanded = match &request.choice {
            ToolChoice::None => return Ok(None),
            ToolChoice::Auto => false,
            ToolChoice::Required | ToolChoice::Named(_) => true,
        };
        let tools = request.tools.iter().filter(|tool| match &request.choice {
            ToolChoice::Named(name) => tool.name == *name,
            _ => true,
        });
        let mut writer = Writer { tokenizer, format, written, tools: Vec::new(), many: request.parallel || !demanded };
        writer.tools = tools.map(|tool| (tool, schema(tool))).collect();
        match writer.compile(grammars, demanded, demanded || with_whole) {
            Err(failure) if failure.kind == Kind::BadRequest => {
                writer.leave_out_schemas(grammars, failure)?;
                writer.compile(grammars, demanded, demanded || with_whole).map(Some)
            }
            result => result.map(Some),
        }
    }

    /// What the end of an answer's text has come to. `begun`: something that is no call has been said.
    pub fn opened(&self, text: &str, begun: &mut bool) -> Opened<'_> {
        let found = |trigger: &'_ Trigger| text.find(trigger.mark).map(|at| (at, at + trigger.mark.len()));
        let marked = self.triggers.iter().filter(|trigger| !trigger.bare).filter_map(|trigger| Some((found(trigger)?, trigger)));
        // Of two at one place the longer one.
        if let Some(((_, after), trigger)) = marked.min_by_key(|((at, after), _)| (*at, usize::MAX - after)) {
            return Opened::Call { grammar: &trigger.rest, after };
        }
        if *begun {
            return Opened::No;
        }
        let is_separator = |c: char| c.is_whitespace() || self.separators.iter().any(|separator| separator.contains(c));
        let start = text.len() - text.trim_start_matches(is_separator).len();
        let mut perhaps = false;
        for trigger in self.triggers.iter().filter(|trigger| trigger.bare) {
            match without_blanks(&text[start..], trigger.mark) {
                Some(Some(after)) => return Opened::Call { grammar: &trigger.rest, after: start + after },
                Some(None) => perhaps = true,
                None => {}
            }
        }
        *begun = !perhaps;
        if perhaps { Opened::Perhaps } else { Opened::No }
    }

    pub fn longest_mark(&self) -> usize {
        self.triggers.iter().map(|trigger| trigger.mark.len()).max().unwrap_or_default()
    }
}

/// Where `mark` ends in a text that begins with it, but for white space; `Some(None)` when more text may make it begin so.
fn without_blanks(text: &str, mark: &str) -> Option<Option<usize>> {
    let mut rest = mark.chars();
    for (at, c) in text.char_indices().filter(|(_, c)| !c.is_whitespace()) {
        match rest.next() {
            None => return Some(Some(at)),
            Some(expected) if expected != c => return None,
            Some(_) if rest.as_str().is_empty() => return Some(Some(at + c.len_utf8())),
            Some(_) => {}
        }
    }
    Some(None)
}

/// What the arguments of a tool must be; `None` when its schema is of something else than an object.
fn schema(tool: &Tool) -> Option<Value> {
    let Value::Object(object) = &tool.parameters else { return Some(json!({"type": "object"})) };
    let mut object = object.clone();
    match object.get("type") {
        None | Some(Value::Null) => {
            object.insert("type".to_owned(), json!("object"));
        }
        Some(Value::String(kind)) if kind == "object" => {}
        Some(_) => return None,
    }
    guided_schema(&Value::Object(object), &JsonOptions::default()).ok()
}

struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    format: &'static ToolFormat,
    written: Written,
    /// With what their arguments must be; `None` = any object.
    tools: Vec<(&'a Tool, Option<Value>)>,
    /// There may be more than one call.
    many: bool,
}

impl Writer<'_> {
    fn compile(&self, grammars: &Grammars, demanded: bool, with_whole: bool) -> Result<CallGrammars, Failure> {
        if let Some((tool, _)) = self.tools.iter().find(|(tool, schema)| tool.strict && schema.is_none()) {
            return Err(refused(tool, "it is no schema of an object"));
        }
        let compile = |start: String| grammars.compile(&Grammar::Calls(self.lark(&start)));
        let whole = if with_whole { Some(compile(self.whole())?) } else { None };
        let mut triggers = Vec::new();
        for (mark, bare, rest) in if demanded { Vec::new() } else { self.rests() } {
            triggers.push(Trigger { mark, bare, rest: compile(rest)? });
        }
        Ok(CallGrammars { demanded, whole, triggers, separators: self.format.separators })
    }

    /// Finds the schemas that no grammar can be made of. Those of strict tools are refused, and of the others any object is taken.
    fn leave_out_schemas(&mut self, grammars: &Grammars, failure: Failure) -> Result<(), Failure> {
        if failure.param.is_some() {
            return Err(failure);
        }
        let begin = Instant::now();
        let mut found = false;
        for (tool, schema) in &mut self.tools {
            let Some(known) = schema else { continue };
            let error = match grammars.compile(&Grammar::JsonSchema(known.clone(), JsonOptions::default())) {
                Ok(_) => continue,
                Err(failure) if failure.kind != Kind::BadRequest => return Err(failure),
                Err(_) if begin.elapsed() > SEARCH_LIMIT => "the schemas take too long to compile".to_owned(),
                Err(failure) => failure.message,
            };
            if tool.strict {
                return Err(refused(tool, &error));
            }
            tracing::info!("the arguments of the tool {:?} may be any object, because its schema cannot be used: {error}", tool.name);
            (*schema, found) = (None, true);
        }
        if found {
            return Ok(());
        }
        // Each is right, and all of them are too much.
        if let Some((tool, _)) = self.tools.iter().find(|(tool, _)| tool.strict) {
            return Err(refused(tool, &failure.message));
        }
        tracing::info!("the arguments of all tools may be any object, because their schemas cannot be used together: {}", failure.message);
        self.tools.iter_mut().for_each(|(_, schema)| *schema = None);
        Ok(())
    }

    /// The grammar with this first rule.
    fn lark(&self, start: &str) -> String {
        let mut text = format!("start: {start}\nws: WS?\nWS: /[ \\n]{{1,2}}/\n");
        let tools: Vec<String> = (0..self.tools.len()).map(|at| format!("tool_{at}")).collect();
        let _ = writeln!(text, "tool: {}", tools.join(" | "));
        let (before, _) = self.body();
        let _ = writeln!(text, "call: {before} tool");
        for (at, (tool, schema)) in self.tools.iter().enumerate() {
            let _ = writeln!(text, "tool_{at}: {} args_{at} {}", self.name(tool), self.body().1);
            let any = || guided_schema(&json!({"type": "object"}), &JsonOptions::default()).unwrap_or_else(|_| json!({"type": "object"}));
            let _ = writeln!(text, "args_{at}: %json {}", schema.clone().unwrap_or_else(any));
        }
        text
    }

    /// How names and arguments stand in a call.
    fn layout(&self) -> Layout {
        match &self.format.body {
            Body::Json(keys) => Layout::Object(keys),
            Body::Named(named) if named.or_objects && self.tokenizer.token_id(named.end).is_none() => Layout::Object(&OBJECTS),
            Body::Named(named) => Layout::Named(named),
            _ => Layout::Object(&OBJECTS),
        }
    }

    fn is_list(&self) -> bool {
        self.written == Written::List || (matches!(self.layout(), Layout::Object(_)) && matches!(self.format.body, Body::Named(_)))
    }

    /// What stands before the name of a tool, and behind its arguments.
    fn body(&self) -> (String, String) {
        match self.layout() {
            Layout::Object(keys) => (format!("\"{{\" ws {} ws \":\" ws", key(keys.name)), "ws \"}\"".to_owned()),
            Layout::Named(named) => {
                let prefix = if named.numbered { "functions." } else { named.prefix };
                let fence = if self.format.fence.is_empty() { String::new() } else { lark_string(&format!("\n{}", self.format.fence)) };
                (self.mark(prefix), fence)
            }
        }
    }

    /// The name of a tool, with what stands between it and its arguments.
    fn name(&self, tool: &Tool) -> String {
        match self.layout() {
            Layout::Object(keys) => {
                let name = lark_string(&Value::from(tool.name.as_str()).to_string());
                format!("{name} ws \",\" ws {} ws \":\" ws", key(keys.arguments))
            }
            Layout::Named(named) => {
                let number = if named.numbered { "\":\" /[0-9]{1,3}/" } else { "" };
                let fence = if named.fence.is_empty() { String::new() } else { lark_string(&format!("{}\n", named.fence)) };
                format!("{} {number} {} {fence}", lark_string(&tool.name), self.mark(named.end))
            }
        }
    }

    fn mark(&self, text: &str) -> String {
        marks::lark(self.tokenizer, text)
    }

    /// The opening mark that this model writes, by its place.
    fn usual(&self) -> usize {
        self.format.call.open.iter().position(|mark| self.tokenizer.token_id(mark).is_some()).unwrap_or_default()
    }

    /// Everything behind the opening mark, up to the closing one.
    fn rest(&self, place: usize) -> String {
        let close = self.mark(self.format.call.close.get(place).copied().unwrap_or_default());
        let blank = if matches!(self.layout(), Layout::Object(_)) { "ws" } else { "" };
        let close = if close.is_empty() { close } else { format!("{blank} {close}") };
        let others = if self.many { "(ws \",\" ws call)*" } else { "" };
        match self.is_list() {
            true => format!("{blank} \"[\" ws call {others} ws \"]\" {close}"),
            false => format!("{blank} call {close}"),
        }
    }

    fn whole(&self) -> String {
        let format = self.format;
        let place = self.usual();
        let rest = self.rest(place);
        let one = match (self.written, format.call.open.get(place)) {
            (Written::Bare, _) | (_, None) => "call".to_owned(),
            (_, Some(open)) => format!("{} {rest}", self.mark(open)),
        };
        if self.written == Written::BareList {
            return format!("\"[\" ws call {} ws \"]\"", if self.many { "(ws \",\" ws call)*" } else { "" });
        }
        let separator = format.separators.iter().find(|separator| !separator.is_empty());
        let others = match (self.many && !self.is_list(), self.written, separator) {
            (false, ..) => String::new(),
            (true, Written::Bare, None) => String::new(),
            (true, Written::Bare, Some(separator)) => format!("(ws {} ws {one})*", lark_string(separator)),
            (true, ..) => format!("(ws {one})*"),
        };
        let around = |marks: &[&str]| self.mark(marks.first().copied().unwrap_or_default());
        format!("{} {one} {others} {}", around(format.section.open), around(format.section.close))
    }

    /// Where calls begin in free text, and the first rule of what follows.
    fn rests(&self) -> Vec<(&'static str, bool, String)> {
        let marked = self.format.call.open.iter().enumerate().map(|(place, mark)| (*mark, false, self.rest(place)));
        let mut all: Vec<_> = marked.collect();
        let others = if self.many { "(ws \",\" ws call)*" } else { "" };
        match (self.written, self.layout()) {
            (Written::Bare, Layout::Object(_)) => all.push(("{\"name\":", true, "ws tool".to_owned())),
            (Written::BareList, _) => all.push(("[{\"name\":", true, format!("ws tool {others} ws \"]\""))),
            _ => {}
        }
        all
    }
}

enum Layout {
    Object(&'static Keys),
    Named(&'static Named),
}

fn key(names: &[&str]) -> String {
    lark_string(&Value::from(names.first().copied().unwrap_or_default()).to_string())
}

fn refused(tool: &Tool, error: &str) -> Failure {
    let param = format!("{}.parameters", tool.place);
    let message = format!("'{param}' cannot be kept to, as 'strict' asks: {error}. Change the schema, or leave out 'strict'.");
    Failure::bad_request(param, message).code("invalid_value")
}
