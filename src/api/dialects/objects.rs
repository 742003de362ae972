//! OpenAI's objects: `chat.completion` with its chunks, and `text_completion`. Field by field as its own servers write them, with vLLM's
//! additions (`stop_reason`, `token_ids`, `prompt_logprobs`, `reasoning_content`).

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::api::clock;
use crate::api::delta::{ChoiceUpdate, EndReason, ToolCall, Usage};
use crate::api::logprobs::{Echo, LogprobsRequest};
use crate::api::parse::tools::request::ToolChoice;
use crate::api::request::GenerationRequest;
use crate::api::served::ServedModel;
use crate::config::ReasoningField;
use crate::text::tokenizer::Tokenizer;

mod fastdeploy;
pub mod logprobs;

use fastdeploy::FastDeploy;
use logprobs::TokenNames;

/// Which objects a request is answered with.
#[derive(Debug, Clone, PartialEq)]
pub enum Surface {
    /// `chat.completion`, written by `role`.
    Chat { role: String },
    /// `text_completion`.
    Text,
}

impl Surface {
    pub fn chat(served: &ServedModel) -> Self {
        Self::Chat { role: served.response_role().to_owned() }
    }
}

/// Makes the objects of one answer.
pub struct Objects {
    pub surface: Surface,
    id: String,
    created: u64,
    model: String,
    /// Choices of each prompt.
    n: usize,
    prompts: Vec<(Arc<Vec<u32>>, Option<Echo>)>,
    return_token_ids: bool,
    /// FastDeploy's names and its clock, where the settings ask for them.
    fastdeploy: Option<FastDeploy>,
    prompt_tokens_details: bool,
    reasoning_field: ReasoningField,
    /// The request names the function that is called: then the call is no reason of its own to end.
    named_call: bool,
    logprobs: LogprobsRequest,
    tokenizer: Arc<Tokenizer>,
    streamed: Vec<Streamed>,
}

/// What of a choice has been streamed.
#[derive(Clone, Copy, Default)]
struct Streamed {
    /// Its first chunk.
    opened: bool,
    tool_call: bool,
}

impl Objects {
    pub fn new(served: &ServedModel, id: &str, surface: Surface, request: &GenerationRequest) -> Self {
        let prefix = match surface {
            Surface::Chat { .. } => "chatcmpl-",
            Surface::Text => "cmpl-",
        };
        let options = &request.options;
        Self {
            surface,
            id: if id.starts_with(prefix) { id.to_owned() } else { format!("{prefix}{id}") },
            created: clock::now(),
            model: served.name().to_owned(),
            n: options.n,
            prompts: request.prompts.iter().map(|prompt| (prompt.ids.clone(), prompt.echo.clone())).collect(),
            return_token_ids: options.return_token_ids,
            fastdeploy: served.settings.fastdeploy_compatible.then(FastDeploy::begin),
            prompt_tokens_details: !served.settings.hide_prompt_tokens_details,
            reasoning_field: served.settings.reasoning_field,
            named_call: request.parsing.tools.as_ref().is_some_and(|tools| matches!(tools.choice, ToolChoice::Named(_))),
            logprobs: options.logprobs,
            tokenizer: served.tokenizer.clone(),
            streamed: vec![Streamed::default(); request.prompts.len() * options.n],
        }
    }

    /// How many choices the answer has.
    pub fn choices(&self) -> usize {
        self.streamed.len()
    }

    fn head(&self, object: &str) -> Map<String, Value> {
        Map::from_iter([
            ("id".to_owned(), json!(self.id)),
            ("object".to_owned(), json!(object)),
            ("created".to_owned(), json!(self.created)),
            ("model".to_owned(), json!(self.model)),
            ("system_fingerprint".to_owned(), Value::Null),
        ])
    }

    /// The answer as one object.
    pub fn whole(&self, choices: &[ChoiceUpdate], usage: Usage) -> Map<String, Value> {
        let is_chat = self.surface != Surface::Text;
        let mut object = self.head(if is_chat { "chat.completion" } else { "text_completion" });
        object.insert("choices".to_owned(), choices.iter().map(|choice| self.whole_choice(choice)).collect());
        object.insert("usage".to_owned(), self.usage(usage));
        self.put_chat_prompt_ids(&mut object);
        put_times(&mut object, usage);
        if let (Some(scores), true) = (choices.first().and_then(|choice| self.prompt_logprobs(choice)), is_chat) {
            object.insert("prompt_logprobs".to_owned(), scores);
        }
        object
    }

    fn whole_choice(&self, update: &ChoiceUpdate) -> Value {
        let mut choice = match &self.surface {
            Surface::Chat { role } => {
                json!({"index": update.choice, "message": self.message(role, update), "logprobs": self.all_logprobs(update)})
            }
            Surface::Text => json!({"index": update.choice, "text": update.text, "logprobs": self.all_logprobs(update)}),
        };
        if let (Some(scores), Surface::Text) = (self.prompt_logprobs(update), &self.surface) {
            choice["prompt_logprobs"] = scores;
        }
        put_end(&mut choice, update.end.as_ref(), !update.tool_calls.is_empty() && !self.named_call);
        self.put_token_ids(&mut choice, update, true);
        if let Some(form) = &self.fastdeploy {
            form.put_whole(&mut choice, &self.tokens_of(update));
        }
        choice
    }

    /// One chunk of a stream, around `choices`.
    pub fn chunk(&self, choices: Vec<Value>, usage: Usage) -> Map<String, Value> {
        let mut chunk = self.head(match self.surface {
            Surface::Chat { .. } => "chat.completion.chunk",
            Surface::Text => "text_completion",
        });
        chunk.insert("choices".to_owned(), Value::Array(choices));
        put_times(&mut chunk, usage);
        chunk
    }

    /// Notes what is about to be streamed. Whether it is the choice's first.
    pub fn opens(&mut self, update: &ChoiceUpdate) -> bool {
        let streamed = &mut self.streamed[update.choice];
        streamed.tool_call |= !update.tool_calls.is_empty();
        !std::mem::replace(&mut streamed.opened, true)
    }

    /// Whether a chunk of this has anything in it, its end aside.
    pub fn shows(&self, update: &ChoiceUpdate) -> bool {
        update.has_content() || !update.logprobs.is_empty() || self.return_token_ids
    }

    /// A choice of a chunk, without what is known of its tokens. `role`: it opens a chat choice. `content`: a chat choice's text is written,
    /// be it empty.
    pub fn chunk_choice(&self, update: &ChoiceUpdate, role: bool, content: bool) -> Value {
        let index = update.choice;
        let mut choice = match &self.surface {
            Surface::Chat { role: name } => {
                json!({"index": index, "delta": self.delta(role.then_some(name), content, update), "logprobs": null})
            }
            Surface::Text => json!({"index": index, "text": update.text, "logprobs": null}),
        };
        put_end(&mut choice, update.end.as_ref(), self.streamed[index].tool_call && !self.named_call);
        choice
    }

    /// Adds what is known of the tokens to a choice of a chunk. `opens`: it is the choice's first.
    pub fn put_tokens(&self, choice: &mut Value, update: &ChoiceUpdate, opens: bool) {
        // Null when nothing is known anew.
        let nothing = update.logprobs.is_empty() && update.prompt_logprobs.is_none();
        choice["logprobs"] = if nothing { Value::Null } else { self.all_logprobs(update) };
        self.put_token_ids(choice, update, opens);
        if let Some(form) = &self.fastdeploy {
            form.put_chunk(choice, &self.tokens_of(update), opens);
        }
    }

    /// A choice's tokens, as FastDeploy's form needs them.
    fn tokens_of<'a>(&'a self, update: &'a ChoiceUpdate) -> fastdeploy::Tokens<'a> {
        let prompt = self.prompts.get(update.choice / self.n).map_or(&[][..], |(ids, _)| ids);
        fastdeploy::Tokens { tokenizer: &self.tokenizer, prompt, output: &update.token_ids, asked: self.return_token_ids }
    }

    /// With log probabilities token ids come with those, whose text may wait for more: one by one they belong together. Completions give
    /// the prompt's ids in the choice, in its first chunk.
    fn put_token_ids(&self, choice: &mut Value, update: &ChoiceUpdate, opens: bool) {
        if !self.return_token_ids {
            return;
        }
        choice["token_ids"] = match self.logprobs.output {
            Some(_) => update.logprobs.iter().map(|token| token.id).collect(),
            None => json!(update.token_ids),
        };
        if opens && self.surface == Surface::Text {
            choice["prompt_token_ids"] = json!(self.prompts.get(update.choice / self.n).map(|(ids, _)| ids));
        }
    }

    /// Chat completions give the prompt's ids beside the choices.
    pub fn put_chat_prompt_ids(&self, object: &mut Map<String, Value>) {
        if self.return_token_ids && self.surface != Surface::Text {
            object.insert("prompt_token_ids".to_owned(), json!(self.prompts.first().map(|(ids, _)| ids)));
        }
    }

    fn names(&self) -> TokenNames<'_> {
        TokenNames { tokenizer: &self.tokenizer, as_ids: self.logprobs.as_ids }
    }

    /// What is known of the tokens; of an echoed prompt's too, with its choice's first ones.
    fn all_logprobs(&self, update: &ChoiceUpdate) -> Value {
        let (Some(top), names) = (self.logprobs.output, self.names()) else { return Value::Null };
        if self.surface != Surface::Text {
            return names.chat(&update.logprobs, top);
        }
        let prompt = match (self.prompts.get(update.choice / self.n), &update.prompt_logprobs) {
            (Some((ids, Some(echo))), Some(scores)) => echo.reported(&self.tokenizer, ids, scores),
            _ => Vec::new(),
        };
        let prompt = prompt.iter().enumerate().map(|(i, token)| (token, i == 0));
        names.text(prompt.chain(update.logprobs.iter().map(|token| (token, false))), top)
    }

    /// `prompt_logprobs`, when asked for.
    fn prompt_logprobs(&self, update: &ChoiceUpdate) -> Option<Value> {
        let (top, scores) = (self.logprobs.prompt?, update.prompt_logprobs.as_ref()?);
        let (ids, _) = self.prompts.get(update.choice / self.n)?;
        Some(self.names().prompt(ids, scores, top))
    }

    pub fn usage(&self, usage: Usage) -> Value {
        let mut object = json!({
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        });
        if self.prompt_tokens_details {
            object["prompt_tokens_details"] = json!({ "cached_tokens": usage.cached_tokens });
        }
        if let Some(reasoning_tokens) = usage.reasoning_tokens {
            object["completion_tokens_details"] = json!({ "reasoning_tokens": reasoning_tokens });
        }
        object
    }

    /// The message of a whole chat choice. One that only calls tools, or never ended its thought, has no content.
    fn message(&self, role: &str, update: &ChoiceUpdate) -> Value {
        let content = (!update.text.is_empty() || (update.tool_calls.is_empty() && update.reasoning.is_empty())).then_some(&update.text);
        let mut message = json!({"role": role, "content": content, "refusal": null});
        for name in self.reasoning_names(update) {
            message[*name] = json!(update.reasoning);
        }
        if !update.tool_calls.is_empty() {
            message["tool_calls"] = update.tool_calls.iter().map(|call| tool_call(call, true)).collect();
        }
        message
    }

    /// The `delta` of a chat choice. `role`: it is the first one.
    fn delta(&self, role: Option<&String>, content: bool, update: &ChoiceUpdate) -> Map<String, Value> {
        let mut delta = Map::new();
        if let Some(role) = role {
            delta.insert("role".to_owned(), json!(role));
        }
        for name in self.reasoning_names(update) {
            delta.insert((*name).to_owned(), json!(update.reasoning));
        }
        if content {
            delta.insert("content".to_owned(), json!(update.text));
        }
        if !update.tool_calls.is_empty() {
            delta.insert("tool_calls".to_owned(), update.tool_calls.iter().map(|call| tool_call(call, false)).collect());
        }
        delta
    }

    /// The fields that thoughts are given in, where there are some.
    fn reasoning_names(&self, update: &ChoiceUpdate) -> &'static [&'static str] {
        match self.reasoning_field {
            _ if update.reasoning.is_empty() => &[],
            ReasoningField::Both => &["reasoning_content", "reasoning"],
            ReasoningField::ReasoningContent => &["reasoning_content"],
            ReasoningField::Reasoning => &["reasoning"],
        }
    }
}

fn put_times(object: &mut Map<String, Value>, usage: Usage) {
    if let Some(times) = usage.times {
        times.put(object);
    }
}

/// A tool call, or the new part of one: only parts are numbered, and only the first has an id and a name.
fn tool_call(call: &ToolCall, whole: bool) -> Value {
    let mut object = Map::new();
    if !whole {
        object.insert("index".to_owned(), json!(call.index));
    }
    let mut function = Map::new();
    if let Some((id, name)) = &call.start {
        object.insert("id".to_owned(), json!(id));
        object.insert("type".to_owned(), json!("function"));
        function.insert("name".to_owned(), json!(name));
    }
    function.insert("arguments".to_owned(), json!(call.arguments));
    object.insert("function".to_owned(), Value::Object(function));
    Value::Object(object)
}

/// `called`: the choice has called a tool.
fn put_end(choice: &mut Value, end: Option<&EndReason>, called: bool) {
    let Some(end) = end else {
        choice["finish_reason"] = Value::Null;
        return;
    };
    let (finish_reason, stop_reason) = match end {
        EndReason::Stop if called => ("tool_calls", Value::Null),
        EndReason::Stop => ("stop", Value::Null),
        EndReason::StopText(text) => ("stop", json!(text)),
        EndReason::StopToken(id) => ("stop", json!(id)),
        EndReason::Length => ("length", Value::Null),
        EndReason::Abort => ("abort", Value::Null),
    };
    choice["finish_reason"] = json!(finish_reason);
    choice["stop_reason"] = stop_reason;
}
