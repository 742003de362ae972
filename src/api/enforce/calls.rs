//! Grammars of tool calls: the row of a format, and the tools of a request, in Lark.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::api::enforce::lark::Lark;
use crate::api::enforce::literal::{self, Notation};
use crate::api::enforce::marks;
use crate::api::enforce::tagged::Tagged;
use crate::api::grammar::schema::prepared;
use crate::api::grammar::{CompiledGrammar, Grammar, Grammars, JsonOptions, guided_schema, lark_string};
use crate::api::parse::tools::request::{Tool, ToolChoice, ToolRequest};
use crate::api::parse::tools::table::{Body, HARMONY_HEAD, Keys, Named, Tags, ToolFormat, Written};
use crate::error::{Failure, Kind};
use crate::text::tokenizer::Tokenizer;

/// So long it may take to find out which of the tools' schemas cannot be used.
const SEARCH_LIMIT: Duration = Duration::from_secs(2);
/// The rule of white space between the parts of a call.
const WHITE_SPACE: &str = "ws: WS?\nWS: /[ \\n]{1,2}/\n";
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
    /// Messages are told apart by their headers, and calls are messages.
    pub harmony: bool,
    /// What ends such a message.
    pub closing: Arc<Vec<u32>>,
}

struct Trigger {
    mark: String,
    /// It opens a call at the beginning of an answer alone, and white space in it means nothing.
    bare: bool,
    /// One of these must stand behind the mark, of which it is no part. Empty: anything may.
    next: Vec<String>,
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
        let Some(format) = request.format else { return Ok(None) };
        let demanded = match &request.choice {
            ToolChoice::None => return Ok(None),
            ToolChoice::Auto => false,
            ToolChoice::Required | ToolChoice::Named(_) => true,
        };
        let tools = request.tools.iter().filter(|tool| match &request.choice {
            ToolChoice::Named(name) => tool.name == *name,
            _ => true,
        });
        let mut writer = Writer { tokenizer, format, tools: Vec::new(), many: request.parallel || !demanded };
        for tool in tools {
            writer.add(tool, demanded)?;
        }
        if writer.tools.is_empty() {
            return Ok(None);
        }
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
        let found = |trigger: &'_ Trigger| text.find(&trigger.mark).map(|at| (at, at + trigger.mark.len()));
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
            let Some(Some(after)) = without_blanks(&text[start..], &trigger.mark) else {
                perhaps |= without_blanks(&text[start..], &trigger.mark).is_some();
                continue;
            };
            let next: Vec<_> = trigger.next.iter().filter_map(|next| without_blanks(&text[start + after..], next)).collect();
            if trigger.next.is_empty() || next.iter().any(Option::is_some) {
                return Opened::Call { grammar: &trigger.rest, after: start + after };
            }
            perhaps |= !next.is_empty();
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

/// What the arguments of a tool must be.
fn schema(tool: &Tool) -> Result<Value, String> {
    let Value::Object(object) = &tool.parameters else { return Ok(any_object()) };
    let mut object = object.clone();
    match object.get("type") {
        None | Some(Value::Null) => {
            object.insert("type".to_owned(), json!("object"));
        }
        Some(Value::String(kind)) if kind == "object" => {}
        Some(_) => return Err("it is no schema of an object".to_owned()),
    }
    Ok(prepared(&Value::Object(object)))
}

fn any_object() -> Value {
    json!({"type": "object"})
}

struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    format: &'static ToolFormat,
    /// With what their arguments must be.
    tools: Vec<(&'a Tool, Value)>,
    /// There may be more than one call.
    many: bool,
}

impl<'a> Writer<'a> {
    fn add(&mut self, tool: &'a Tool, demanded: bool) -> Result<(), Failure> {
        let literal = matches!(self.layout(), Layout::Literal(_));
        if literal && !tool.name.starts_with(|c: char| c.is_alphabetic() || c == '_') {
            if tool.strict || demanded {
                let param = format!("{}.name", tool.place);
                let message = format!("'{param}' is {:?}: in this model's format of calls names begin with a letter.", tool.name);
                return Err(Failure::bad_request(param, message).code("invalid_value"));
            }
            return Ok(());
        }
        let written = schema(tool).and_then(|schema| self.arguments(&mut Lark::new(self.tokenizer), &schema).map(|_| schema));
        let schema = match written {
            Ok(schema) => schema,
            Err(error) if tool.strict => return Err(refused(tool, &error)),
            Err(error) => {
                tracing::info!("the arguments of the tool {:?} may be any object, because its schema cannot be used: {error}", tool.name);
                any_object()
            }
        };
        self.tools.push((tool, schema));
        Ok(())
    }

    fn compile(&self, grammars: &Grammars, demanded: bool, with_whole: bool) -> Result<CallGrammars, Failure> {
        let rules = self.rules(&self.tools)?;
        let compile = |start: String| grammars.compile(&Grammar::Calls(format!("start: {start}\n{rules}")));
        let whole = if with_whole { Some(compile(self.whole())?) } else { None };
        let mut triggers = Vec::new();
        for (mark, bare, next, rest) in if demanded { Vec::new() } else { self.rests() } {
            triggers.push(Trigger { mark, bare, next, rest: compile(rest)? });
        }
        let harmony = matches!(self.format.body, Body::Harmony);
        let closing = self.format.call.close.first().filter(|_| harmony).copied().unwrap_or_default();
        let closing = Arc::new(marks::ids(self.tokenizer, closing)?);
        Ok(CallGrammars { demanded, whole, triggers, separators: self.format.separators, harmony, closing })
    }

    /// Finds the schemas that no grammar can be made of. Those of strict tools are refused, and of the others any object is taken.
    fn leave_out_schemas(&mut self, grammars: &Grammars, failure: Failure) -> Result<(), Failure> {
        if failure.param.is_some() {
            return Err(failure);
        }
        let begin = Instant::now();
        let mut unusable = Vec::new();
        for (at, (tool, schema)) in self.tools.iter().enumerate() {
            let alone = match self.layout() {
                Layout::Tagged(_) | Layout::Literal(_) => {
                    let mut lark = Lark::new(self.tokenizer);
                    let arguments = self.arguments(&mut lark, schema).map_err(|error| refused(tool, &error))?;
                    Grammar::Calls(format!("start: {arguments}\n{WHITE_SPACE}{}", lark.text()))
                }
                _ => Grammar::JsonSchema(schema.clone(), JsonOptions::default()),
            };
            let error = match grammars.compile(&alone) {
                Ok(_) => continue,
                Err(failure) if failure.kind != Kind::BadRequest => return Err(failure),
                Err(_) if begin.elapsed() > SEARCH_LIMIT => "the schemas take too long to compile".to_owned(),
                Err(failure) => failure.message,
            };
            if tool.strict {
                return Err(refused(tool, &error));
            }
            tracing::info!("the arguments of the tool {:?} may be any object, because its schema cannot be used: {error}", tool.name);
            unusable.push(at);
        }
        if unusable.is_empty() {
            // Each is right, and all of them are too much.
            if let Some((tool, _)) = self.tools.iter().find(|(tool, _)| tool.strict) {
                return Err(refused(tool, &failure.message));
            }
            tracing::info!(
                "the arguments of all tools may be any object, because their schemas cannot be used together: {}",
                failure.message
            );
            unusable = (0..self.tools.len()).collect();
        }
        for at in unusable {
            self.tools[at].1 = any_object();
        }
        Ok(())
    }

    /// All rules but the first.
    fn rules(&self, tools: &[(&Tool, Value)]) -> Result<String, Failure> {
        let mut lark = Lark::new(self.tokenizer);
        let (before, after) = self.body();
        let names: Vec<String> = (0..tools.len()).map(|at| format!("tool_{at}")).collect();
        lark.named("tool", &names.join(" | "));
        lark.named("call", &format!("{before} tool"));
        for (at, ((tool, schema), name)) in tools.iter().zip(names).enumerate() {
            let arguments = self.arguments(&mut lark, schema).map_err(|error| refused(tool, &error))?;
            lark.named(&format!("arguments_{at}"), &arguments);
            lark.named(&name, &format!("{} arguments_{at} {after}", self.name(tool)));
        }
        Ok(format!("{WHITE_SPACE}{}", lark.text()))
    }

    /// The arguments of a call.
    fn arguments(&self, lark: &mut Lark<'_>, schema: &Value) -> Result<String, String> {
        match self.layout() {
            Layout::Tagged(tags) => Tagged { tags, close: self.format.call.close, root: schema }.arguments(lark),
            Layout::Literal(notation) => literal::arguments(lark, notation, schema),
            _ => Ok(format!("%json {}", guided_schema(schema, &JsonOptions::default())?)),
        }
    }

    /// How names and arguments stand in a call.
    fn layout(&self) -> Layout {
        match &self.format.body {
            Body::Json(keys) => Layout::Object(keys),
            Body::Named(named) if named.or_objects && self.tokenizer.token_id(named.end).is_none() => Layout::Object(&OBJECTS),
            Body::Named(named) => Layout::Named(named),
            Body::Tagged(tags) => Layout::Tagged(tags),
            Body::Python => Layout::Literal(literal::PYTHON),
            Body::Gemma { quote } => Layout::Literal(literal::gemma(quote)),
            Body::Harmony => Layout::Harmony,
        }
    }

    fn is_list(&self) -> bool {
        self.format.written == Written::List || (matches!(self.layout(), Layout::Object(_)) && matches!(self.format.body, Body::Named(_)))
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
            Layout::Tagged(_) => (String::new(), "ws".to_owned()),
            Layout::Literal(Notation { quote: None, .. }) => (String::new(), "ws \")\"".to_owned()),
            Layout::Literal(_) => ("\"call:\"".to_owned(), "\"}\"".to_owned()),
            Layout::Harmony => (String::new(), String::new()),
        }
    }

    /// The name of a tool, with what stands between it and its arguments.
    fn name(&self, tool: &Tool) -> String {
        let name = lark_string(&tool.name);
        match self.layout() {
            Layout::Object(keys) => {
                let name = lark_string(&Value::from(tool.name.as_str()).to_string());
                format!("{name} ws \",\" ws {} ws \":\" ws", key(keys.arguments))
            }
            Layout::Named(named) => {
                let number = if named.numbered { "\":\" /[0-9]{1,3}/" } else { "" };
                let fence = if named.fence.is_empty() { String::new() } else { lark_string(&format!("{}\n", named.fence)) };
                format!("{name} {number} {} {fence}", self.mark(named.end))
            }
            Layout::Tagged(tags) => {
                let end = self.mark(tags.name_end.first().copied().unwrap_or_default());
                if tags.name_end.len() > 1 { format!("{name} ({end})?") } else { format!("{name} {end}") }
            }
            Layout::Literal(Notation { quote: None, .. }) => format!("{name} \"(\" ws"),
            Layout::Literal(_) => format!("{name} \"{{\""),
            Layout::Harmony => {
                let [channel, constrain, message] = HARMONY_HEAD.map(|mark| self.mark(mark));
                format!("{name} ({channel})? (\" \"? {constrain} \"json\" | \" json\")? \" \"? {message}")
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
        let close = match self.layout() {
            // The mark may be what ends the answer, which is no part of a grammar.
            Layout::Harmony => String::new(),
            _ => self.mark(self.format.call.close.get(place).copied().unwrap_or_default()),
        };
        let is_python = matches!(self.layout(), Layout::Literal(Notation { quote: None, .. }));
        let blank = if matches!(self.layout(), Layout::Object(_)) || is_python { "ws" } else { "" };
        let close = if close.is_empty() { close } else { format!("{blank} {close}") };
        let others = self.others();
        match self.format.written {
            _ if self.is_list() => format!("{blank} \"[\" ws call {others} ws \"]\" {close}"),
            Written::Lines if self.many => format!("{blank} call (ws call)* {close}"),
            _ => format!("{blank} call {close}"),
        }
    }

    /// The other calls of a list.
    fn others(&self) -> &'static str {
        if self.many { "(ws \",\" ws call)*" } else { "" }
    }

    fn whole(&self) -> String {
        let format = self.format;
        let place = self.usual();
        let rest = self.rest(place);
        let one = match (format.written, format.call.open.get(place)) {
            (Written::Bare, _) | (_, None) => "call".to_owned(),
            (_, Some(open)) => format!("{} {rest}", self.mark(open)),
        };
        if format.written == Written::BareList {
            return format!("\"[\" ws call {} ws \"]\"", self.others());
        }
        let separator = format.separators.iter().find(|separator| !separator.is_empty());
        let in_one = self.is_list() || matches!(format.written, Written::Lines) || matches!(format.body, Body::Harmony);
        let others = match (self.many && !in_one, format.written, separator) {
            (false, ..) => String::new(),
            (true, Written::Bare, None) => String::new(),
            (true, Written::Bare, Some(separator)) => format!("(ws {} ws {one})*", lark_string(separator)),
            (true, ..) => format!("(ws {one})*"),
        };
        let calls = format!("{one} {others}");
        let blank = if matches!(self.layout(), Layout::Tagged(_)) { "ws" } else { "" };
        let section = |(at, open): (usize, &&str)| {
            let close = format.section.close.get(at).copied().unwrap_or_default();
            format!("{} {blank} {calls} {blank} {}", self.mark(open), self.mark(close))
        };
        let mut forms: Vec<String> = format.section.open.iter().enumerate().map(section).collect();
        // The mark of the call alone may have ended the thoughts.
        if forms.is_empty() || format.ends_reasoning {
            forms.push(calls);
        }
        forms.join(" | ")
    }

    /// Where calls begin in free text, what must stand there, and the first rule of what follows.
    fn rests(&self) -> Vec<(String, bool, Vec<String>, String)> {
        let marked =
            self.format.call.open.iter().enumerate().map(|(place, mark)| ((*mark).to_owned(), false, Vec::new(), self.rest(place)));
        let mut all: Vec<_> = marked.collect();
        let others = self.others();
        match (self.format.written, self.layout()) {
            (Written::Bare, Layout::Object(_)) => all.push(("{\"name\":".to_owned(), true, Vec::new(), "ws tool".to_owned())),
            // A name alone is a call where its arguments follow it.
            (Written::Bare, Layout::Named(named)) => {
                let end = self.mark(named.end);
                let of_tool = |(at, (tool, _)): (usize, &(&Tool, Value))| {
                    (tool.name.clone(), true, vec!["{".to_owned()], format!("{end} arguments_{at}"))
                };
                all.extend(self.tools.iter().enumerate().map(of_tool));
            }
            // Behind a prompt that ends with `<|start|>assistant`.
            (_, Layout::Harmony) => all.push(("to=functions.".to_owned(), true, Vec::new(), self.rest(0))),
            (Written::BareList, Layout::Literal(_)) => {
                let names = self.tools.iter().map(|(tool, _)| format!("{}(", tool.name)).collect();
                all.push(("[".to_owned(), true, names, format!("ws call {others} ws \"]\"")));
            }
            (Written::BareList, _) => all.push(("[{\"name\":".to_owned(), true, Vec::new(), format!("ws tool {others} ws \"]\""))),
            _ => {}
        }
        all
    }
}

enum Layout {
    Object(&'static Keys),
    Named(&'static Named),
    Tagged(&'static Tags),
    Literal(Notation),
    Harmony,
}

fn key(names: &[&str]) -> String {
    lark_string(&Value::from(names.first().copied().unwrap_or_default()).to_string())
}

fn refused(tool: &Tool, error: &str) -> Failure {
    let param = format!("{}.parameters", tool.place);
    let message = format!("'{param}' cannot be kept to, as 'strict' asks: {error}. Change the schema, or leave out 'strict'.");
    Failure::bad_request(param, message).code("invalid_value")
}
