//! Messages → one prompt, through the chat template.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::api::enforce::calls::CallGrammars;
use crate::api::enforce::{Rules, Vocabulary, Wishes};
use crate::api::fields::{Fields, missing, token_ids};
use crate::api::logprobs::Echo;
use crate::api::options::GenerationOptions;
use crate::api::parse::answer::{Parsing, Reasoning};
use crate::api::parse::reasoning::Start;
use crate::api::parse::tools::request::{ToolChoice, ToolRequest};
use crate::api::prompt::contents::{self, Contents};
use crate::api::prompt::fit::Fit;
use crate::api::prompt::guard::{Guard, Marks};
use crate::api::prompt::template::ChatTemplate;
use crate::api::prompt::thinking::{self, Thoughts};
use crate::api::prompt::{messages, text};
use crate::api::request::{GenerationRequest, Prompt};
use crate::api::served::ServedModel;
use crate::api::tools;
use crate::error::Failure;
use crate::text::tokenizer::Special;

/// What requests with messages call their prompt.
const NOUN: &str = "messages";

/// The request of `messages`, or of `prompt_token_ids` in their place.
pub fn request(served: &ServedModel, fields: &Fields<'_>, options: GenerationOptions) -> Result<GenerationRequest, Failure> {
    let fit = Fit { served, options: &options, noun: NOUN };
    let mut echo = None;
    let mut parsing = parsing(served, fields)?;
    let ids = match (fields.token_ids("prompt_token_ids", served.limits.vocab_size)?, fields.get("messages")) {
        (Some(ids), _) => given_ids(served, &mut parsing, ids),
        (None, Some(field)) if field.value[0].is_number() => given_ids(served, &mut parsing, token_ids(&field, served.limits.vocab_size)?),
        (None, Some(field)) if fields.flag("disable_chat_template")? => {
            let first = messages::read(&field, served.settings.max_messages)?.swap_remove(0);
            let given = contents::text(&first["content"]);
            text::encode(served, fit.text(&given)?, &options)?
        }
        (None, Some(field)) => {
            fit.given_text(field.value, fields.get("chat_template").is_some())?;
            let messages = messages::read(&field, served.settings.max_messages)?;
            echo = options.echo.then(|| last_text(&messages, served.response_role())).flatten();
            let rendered = render_for(served, fields, messages, &mut parsing)?;
            rendered.encode(served, options.add_special_tokens, |text| fit.text(text))?
        }
        (None, None) => return Err(missing("messages", "'messages' is missing. It is a list of at least one message.")),
    };
    let prompts = vec![Prompt::new(fit.ids(ids)?, echo.map(Echo::of_text))];
    let rules = rules(served, fields, &parsing, &options)?;
    Ok(GenerationRequest { parsing, rules, ..GenerationRequest::new(prompts, options, false, &served.limits)? })
}

/// What the answers are held to.
fn rules(served: &ServedModel, fields: &Fields<'_>, parsing: &Parsing, options: &GenerationOptions) -> Result<Option<Arc<Rules>>, Failure> {
    let budget = thinking::budget(fields)?;
    if let (Some((field, _)), None) = (&budget, served.reasoning_format) {
        let message = format!(
            "'{field}' bounds thoughts, and this model's chat template shows no format of thoughts that this server knows. Remove it, or start \
             the server with REASONING_PARSER."
        );
        return Err(Failure::bad_request(field, message).code("unsupported_parameter"));
    }
    let grammar = options.grammar.clone();
    let calls = parsing.tools.as_ref().map(|tools| CallGrammars::new(&served.grammars, &served.tokenizer, tools, grammar.is_some()));
    let wishes = Wishes {
        thought_tokens: budget.map(|(_, tokens)| tokens),
        answer_tokens: fields.count("response_max_tokens")?,
        grammar,
        calls: calls.transpose()?.flatten(),
    };
    let vocabulary = Vocabulary { tokenizer: &served.tokenizer, ends: &served.eos_token_ids, size: served.limits.vocab_size };
    Rules::new(&vocabulary, parsing, wishes)
}

/// What is to be told apart in the answers: as the model can, and as the request wants it. Where they begin is not known yet.
fn parsing(served: &ServedModel, fields: &Fields<'_>) -> Result<Parsing, Failure> {
    let thoughts = thinking::thoughts(fields)?;
    let tools = tools::read(served, fields)?;
    let (apart, shown) = (thoughts != Thoughts::InContent, thoughts == Thoughts::Apart);
    let reasoning = served.reasoning_format.map(|format| Reasoning { format, start: Start::default(), apart, shown });
    let mut marks = served.reasoning_format.filter(|_| apart).map_or_else(Vec::new, |format| format.marks());
    marks.extend(tools.as_ref().and_then(|tools| tools.format).map_or_else(Vec::new, |format| format.marks()));
    Ok(Parsing { reasoning, tools: tools.map(Arc::new), marks: Arc::new(served.marks(&marks)) })
}

/// A prompt that is given as token ids.
fn given_ids(served: &ServedModel, parsing: &mut Parsing, ids: Vec<u32>) -> Vec<u32> {
    parsing.begin(&end_of(served, &ids));
    ids
}

/// The last words of a prompt that is given as token ids.
fn end_of(served: &ServedModel, ids: &[u32]) -> String {
    const TOKENS: usize = 32;
    let last = &ids[ids.len().saturating_sub(TOKENS)..];
    let bytes: Vec<u8> = last.iter().flat_map(|id| served.tokenizer.token_bytes(*id).unwrap_or_default()).copied().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The text of the last message when it is by the one who answers: what a continued message begins with.
fn last_text(messages: &[Value], role: &str) -> Option<String> {
    let last = messages.last().filter(|last| last.get("role").and_then(Value::as_str) == Some(role))?;
    last.get("content").map(contents::text)
}

/// Renders and tokenizes messages whose answers are not parsed.
pub fn encode(served: &ServedModel, fields: &Fields<'_>, messages: Vec<Value>, options: &GenerationOptions) -> Result<Vec<u32>, Failure> {
    let fit = Fit { served, options, noun: NOUN };
    let rendered = render_for(served, fields, messages, &mut Parsing::default())?;
    rendered.encode(served, options.add_special_tokens, |text| fit.text(text))
}

/// A prompt as the template wrote it, with the marks inside that keep users from writing control tokens.
pub struct Rendered {
    text: String,
    marks: Marks,
}

impl Rendered {
    pub fn text(&self) -> String {
        self.text.replace(self.marks.break_mark, "")
    }

    /// Token ids. `add`: the request's `add_special_tokens`. `fit` gives the end of the text that is to be tokenized.
    pub fn encode(
        &self,
        served: &ServedModel,
        add: Option<bool>,
        fit: impl FnOnce(&str) -> Result<&str, Failure>,
    ) -> Result<Vec<u32>, Failure> {
        let mut ids = match served.settings.allow_special_tokens {
            true => served.tokenizer.encode(fit(&self.text)?, Special::Control)?,
            false => served.guard.encode(&served.tokenizer, &self.text, self.marks.break_mark, fit)?,
        };
        // Templates write the beginning-of-sequence token themselves: only when asked, and never twice.
        if add == Some(true) && served.bos_token_id.is_some() && ids.first() != served.bos_token_id.as_ref() {
            ids.splice(0..0, served.bos_token_id);
        }
        Ok(ids)
    }
}

/// Renders messages through the chat template, as a request with these fields would.
pub fn render(served: &ServedModel, fields: &Fields<'_>, messages: Vec<Value>) -> Result<Rendered, Failure> {
    render_for(served, fields, messages, &mut parsing(served, fields)?)
}

/// Renders, and notes where the answer begins.
fn render_for(served: &ServedModel, fields: &Fields<'_>, mut messages: Vec<Value>, parsing: &mut Parsing) -> Result<Rendered, Failure> {
    let of_request = request_template(served, fields)?;
    let (template, contents) = match &of_request {
        Some(template) => template,
        None => served.chat_template()?,
    };
    contents.shape(&mut messages);
    let mut variables = Variables::read(served, fields, messages, parsing.tools.as_deref())?;
    let marks = Guard::marks(&[&variables.messages, &variables.user])?;
    if !served.settings.allow_special_tokens {
        // What ends a turn is never markup, whatever a template looks for.
        let ends_a_turn = |name: &str| {
            let id = served.tokenizer.token_id(name);
            id.is_some_and(|id| served.eos_token_ids.contains(&id)) || served.model.special_tokens.values().any(|token| token == name)
        };
        let is_markup = |name: &str| template.looks_for(name) && !ends_a_turn(name);
        served.guard.break_in_messages(&mut variables.messages, marks.break_mark, &is_markup);
        served.guard.break_in(&mut variables.user, marks.break_mark);
    }
    let continued = if variables.continue_final_message { Some(variables.open_final_message(marks)) } else { None };
    let mut rendered = template.render(&variables.into_map(served))?;
    if let Some(text) = continued {
        cut_after(&mut rendered, &text, marks)?;
        parsing.go_on(&text);
    } else {
        parsing.begin(&rendered);
    }
    Ok(Rendered { text: rendered, marks })
}

/// Marks the end of a text, which is given back without the mark.
fn mark(text: &mut String, marks: Marks) -> String {
    let whole = text.clone();
    text.push(marks.place_mark);
    text.push(' ');
    whole
}

/// Cuts off what follows the final message, as transformers does: with the spaces at the message's end where the template trims messages.
fn cut_after(rendered: &mut String, text: &str, marks: Marks) -> Result<(), Failure> {
    let end = rendered.rfind(marks.place_mark).filter(|_| rendered.contains(text.trim()));
    let Some(end) = end else {
        let message = "The model's chat template leaves out the final message, or a part of it, so it cannot be continued.";
        return Err(Failure::bad_request("continue_final_message", message).code("invalid_value"));
    };
    let keeps_spaces = rendered[end + marks.place_mark.len_utf8()..].starts_with(' ');
    rendered.truncate(end);
    if !keeps_spaces {
        rendered.truncate(rendered.trim_end().len());
    }
    Ok(())
}

/// The request's own template, for those who may bring one.
fn request_template(served: &ServedModel, fields: &Fields<'_>) -> Result<Option<(ChatTemplate, Contents)>, Failure> {
    let Some(source) = fields.string("chat_template")? else { return Ok(None) };
    if !served.settings.trust_request_chat_template {
        let message = "Chat templates of requests are not accepted here. Remove 'chat_template', or start the server with TRUST_REQUEST_CHAT_TEMPLATE=true.";
        return Err(Failure::bad_request("chat_template", message).code("unsupported_parameter"));
    }
    let broken = |error| Failure::bad_request("chat_template", format!("'chat_template' is not a valid template: {error}"));
    let template = ChatTemplate::compile(source).map_err(broken)?;
    let contents = Contents::of(&template, &served.model.special_tokens, served.settings.content_format);
    Ok(Some((template, contents)))
}

/// What a template is rendered with.
struct Variables {
    messages: Value,
    /// `tools`, `documents` and `chat_template_kwargs`: from the user as well.
    user: Value,
    add_generation_prompt: bool,
    continue_final_message: bool,
}

impl Variables {
    fn read(served: &ServedModel, fields: &Fields<'_>, messages: Vec<Value>, tools: Option<&ToolRequest>) -> Result<Self, Failure> {
        let continue_final_message = fields.flag("continue_final_message")?;
        let add_generation_prompt = fields.bool("add_generation_prompt")?;
        if continue_final_message && add_generation_prompt == Some(true) {
            let message = "'continue_final_message' and 'add_generation_prompt' exclude each other: set one of them to false.";
            return Err(Failure::bad_request("continue_final_message", message).code("invalid_value"));
        }
        let mut user = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
        if user.contains_key("messages") {
            let message = "'chat_template_kwargs' must not hold 'messages'.";
            return Err(Failure::bad_request("chat_template_kwargs.messages", message).code("invalid_value"));
        }
        if let Some(documents) = fields.get("documents") {
            user.entry("documents").or_insert_with(|| documents.value.clone());
        }
        show_tools(tools, &mut user, served.settings.exclude_unused_tools);
        thinking::switches(fields, &mut user)?;
        Ok(Self {
            messages: Value::Array(messages),
            user: Value::Object(user),
            add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
        })
    }

    /// Marks the end of the last message's text, which is given back: what the template writes after it is cut off. The space after the mark
    /// tells whether the template trims.
    fn open_final_message(&mut self, marks: Marks) -> String {
        let last = self.messages.as_array_mut().and_then(|messages| messages.last_mut());
        let parts = match last.and_then(|message| message.get_mut("content")) {
            Some(Value::String(text)) => return mark(text, marks),
            Some(Value::Array(parts)) => parts,
            _ => return String::new(),
        };
        if !parts.last().is_some_and(|part| part.get("text").is_some_and(Value::is_string)) {
            parts.push(json!({"type": "text", "text": ""}));
        }
        match parts.last_mut().and_then(|part| part.get_mut("text")) {
            Some(Value::String(text)) => mark(text, marks),
            _ => String::new(),
        }
    }

    fn into_map(self, served: &ServedModel) -> Map<String, Value> {
        let mut map = served.model.special_tokens.clone();
        map.insert("tools".to_owned(), Value::Null);
        map.insert("documents".to_owned(), Value::Null);
        map.insert("add_generation_prompt".to_owned(), json!(self.add_generation_prompt));
        if let Value::Object(user) = self.user {
            map.extend(user);
        }
        map.insert("messages".to_owned(), self.messages);
        map
    }
}

/// Hands the tools to the template. `exclude`: not those that must not be called. `chat_template_kwargs` wins.
fn show_tools(tools: Option<&ToolRequest>, user: &mut Map<String, Value>, exclude: bool) {
    let callable = tools.is_some_and(|tools| tools.choice != ToolChoice::None);
    if let Some(tools) = tools {
        user.entry("tools").or_insert_with(|| tools.tools.iter().map(|tool| tool.definition.clone()).collect());
    }
    if exclude && !callable {
        user.shift_remove("tools");
    }
}
