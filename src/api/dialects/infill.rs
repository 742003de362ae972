//! llama.cpp's `/infill`: what is around a hole in, what fills it out, in that server's own form. A stream's last chunk says `"stop": true`,
//! and no `[DONE]` follows it.

use std::fmt::Write;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::api::delta::{ChoiceUpdate, Delta, EndReason, Usage, by_choice};
use crate::api::dialects::objects::logprobs::TokenNames;
use crate::api::dialects::{Dialect, Prepared};
use crate::api::failure;
use crate::api::fields::{Field, Fields, missing, wrong_type};
use crate::api::logprobs::{LogprobsForm, LogprobsRequest, TokenLogprobs, token_name};
use crate::api::options::Truncate;
use crate::api::prompt::fit::Fit;
use crate::api::prompt::infill::{self, Hole};
use crate::api::prompt::text::GivenPrompt;
use crate::api::request::GenerationRequest;
use crate::api::served::ServedModel;
use crate::error::Failure;
use crate::text::tokenizer::Tokenizer;

pub fn read(served: &ServedModel, _: &str, body: &Value) -> Result<Prepared, Failure> {
    let body = &renamed(body);
    let fields = Fields::new(body)?;
    served.check_model(&fields)?;
    let tokens = infill::tokens(served, "input_suffix")?;
    let required = |name: &str| missing(name, format!("'{name}' is missing. It is the text on one side of the hole, and may be empty."));
    let prefix = fields.string("input_prefix")?.ok_or_else(|| required("input_prefix"))?;
    let suffix = fields.string("input_suffix")?.ok_or_else(|| required("input_suffix"))?;
    let prefix = [prefix, fields.string("prompt")?.unwrap_or_default()].concat();
    let hole = Hole { suffix, extra: extra(&fields)? };
    let mut options = infill::ending(tokens, served.options(&fields, LogprobsForm::Infill)?);
    // Editors send whole files: what does not fit is cut.
    let context = served.limits.max_model_len;
    let answer = options.max_tokens.filter(|most| *most < context).unwrap_or(context / 4).max(1);
    options.truncate.get_or_insert(Truncate::Last(context - answer));
    let fit = Fit { served, options: &options, noun: "prompt" };
    let (prompt, truncated) = infill::prompt(tokens, &fit, GivenPrompt::Text(prefix), &hole)?;
    let request = GenerationRequest::new(vec![prompt], options, false, &served.limits)?;
    Ok(Prepared { dialect: Box::new(Infilling::new(served, &request, truncated)), request })
}

/// The body with llama.cpp's name of `logprobs` read as that.
fn renamed(body: &Value) -> Value {
    let mut body = body.clone();
    if let Value::Object(object) = &mut body
        && let Some(number) = object.shift_remove("n_probs").filter(|number| number.as_f64() != Some(0.0))
    {
        object.entry("logprobs").or_insert(number);
    }
    body
}

/// `input_extra`: name and text of each.
fn extra<'a>(fields: &Fields<'a>) -> Result<Vec<(&'a str, &'a str)>, Failure> {
    const UNNAMED: &str = "tmp";
    let Some(field) = fields.get("input_extra") else { return Ok(Vec::new()) };
    let list = field.value.as_array().ok_or_else(|| wrong_type(&field, "a list of objects with 'filename' and 'text'"))?;
    let read = |(place, entry): (usize, &'a Value)| {
        let text = |name: &str| match entry.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let field = Field { name: format!("{}[{place}].{name}", field.name), value };
                value.as_str().map(Some).ok_or_else(|| wrong_type(&field, "a string"))
            }
        };
        let name = format!("{}[{place}].text", field.name);
        let given =
            text("text")?.ok_or_else(|| missing(&name, format!("'{name}' is missing. It is the text of a file, or a part of it.")))?;
        Ok((text("filename")?.unwrap_or(UNNAMED), given))
    };
    list.iter().enumerate().map(read).collect()
}

struct Infilling {
    model: String,
    tokenizer: Arc<Tokenizer>,
    logprobs: LogprobsRequest,
    return_token_ids: bool,
    prompt: Arc<Vec<u32>>,
    truncated: bool,
    /// What has come of each choice.
    choices: Vec<Streamed>,
    frames: String,
}

#[derive(Clone, Copy, Default)]
struct Streamed {
    tokens: usize,
    has_new_line: bool,
}

impl Infilling {
    fn new(served: &ServedModel, request: &GenerationRequest, truncated: bool) -> Self {
        let options = &request.options;
        Self {
            model: served.name().to_owned(),
            tokenizer: served.tokenizer.clone(),
            logprobs: options.logprobs,
            return_token_ids: options.return_token_ids,
            prompt: request.prompts.first().map(|prompt| prompt.ids.clone()).unwrap_or_default(),
            truncated,
            choices: vec![Streamed::default(); options.n],
            frames: String::new(),
        }
    }

    /// What is new of a choice, which counts from here on.
    fn part(&mut self, update: &ChoiceUpdate) -> Map<String, Value> {
        let choice = &mut self.choices[update.choice];
        choice.tokens += update.token_ids.len();
        choice.has_new_line |= update.text.contains('\n');
        let tokens: &[u32] = if self.return_token_ids { &update.token_ids } else { &[] };
        let mut part = Map::from_iter([
            ("index".to_owned(), json!(update.choice)),
            ("content".to_owned(), json!(update.text)),
            ("tokens".to_owned(), json!(tokens)),
            ("tokens_predicted".to_owned(), json!(choice.tokens)),
            ("tokens_evaluated".to_owned(), json!(self.prompt.len())),
        ]);
        if let (Some(top), false) = (self.logprobs.output, update.logprobs.is_empty()) {
            part.insert("completion_probabilities".to_owned(), self.probabilities(&update.logprobs, top));
        }
        part
    }

    /// The same of a choice that has ended so. `stop` comes last: the end of a stream is told by it.
    fn ended(&mut self, update: &ChoiceUpdate, end: &EndReason, usage: Usage) -> Value {
        let mut part = self.part(update);
        let (stop_type, word) = match end {
            EndReason::Stop => ("eos", String::new()),
            EndReason::StopText(text) => ("word", text.clone()),
            EndReason::StopToken(id) => ("word", token_name(&self.tokenizer, *id)),
            EndReason::Length => ("limit", String::new()),
            EndReason::Abort => ("none", String::new()),
        };
        let has_new_line = self.choices[update.choice].has_new_line;
        part.insert("model".to_owned(), json!(self.model));
        if self.return_token_ids {
            part.insert("prompt_token_ids".to_owned(), json!(self.prompt));
        }
        if let Some(times) = usage.times {
            times.put(&mut part);
        }
        part.insert("has_new_line".to_owned(), json!(has_new_line));
        part.insert("truncated".to_owned(), json!(self.truncated));
        part.insert("stop_type".to_owned(), json!(stop_type));
        part.insert("stopping_word".to_owned(), json!(word));
        part.insert("stop".to_owned(), json!(true));
        Value::Object(part)
    }

    /// As chats write them, with the tokens' ids.
    fn probabilities(&self, tokens: &[TokenLogprobs], top: u32) -> Value {
        let names = TokenNames { tokenizer: &self.tokenizer, as_ids: self.logprobs.as_ids };
        let mut items = names.items(tokens, top);
        for (item, token) in items.iter_mut().zip(tokens) {
            item["id"] = json!(token.id);
            for (place, (id, _)) in token.logprobs.top.iter().take(top as usize).enumerate() {
                item["top_logprobs"][place]["id"] = json!(id);
            }
        }
        Value::Array(items)
    }

    fn frame(&mut self, value: &Value) {
        // Writing to a string does not fail.
        let _ = write!(self.frames, "data: {value}\n\n");
    }
}

impl Dialect for Infilling {
    /// One object; of several choices a list, as llama.cpp answers them.
    fn whole(&mut self, choices: Vec<ChoiceUpdate>, usage: Usage) -> Value {
        let mut answers: Vec<Value> =
            choices.iter().map(|choice| self.ended(choice, choice.end.as_ref().unwrap_or(&EndReason::Abort), usage)).collect();
        if answers.len() == 1 { answers.remove(0) } else { Value::Array(answers) }
    }

    fn open(&mut self, _: Usage) {}

    fn delta(&mut self, deltas: Vec<Delta>, usage: Usage) {
        for mut update in by_choice(deltas) {
            let end = update.end.take();
            let shows = update.has_content() || !update.logprobs.is_empty() || self.return_token_ids;
            if shows || end.is_none() {
                let mut part = self.part(&update);
                part.insert("stop".to_owned(), json!(false));
                if shows {
                    self.frame(&Value::Object(part));
                }
                update = ChoiceUpdate::of(update.choice);
            }
            if let Some(end) = end {
                let last = self.ended(&update, &end, usage);
                self.frame(&last);
            }
        }
    }

    fn end(&mut self, _: Usage) {}

    fn take(&mut self) -> Option<Value> {
        Some(std::mem::take(&mut self.frames)).filter(|frames| !frames.is_empty()).map(Value::String)
    }

    fn error(&self, failure: &Failure) -> Value {
        Value::String(failure::sse(failure))
    }
}
