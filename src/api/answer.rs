//! Answers: what a run of sequences looks like in the caller's dialect, whole or streamed.
//!
//! A stream keeps to the rules that popular clients break without: a role chunk for every choice before any content; `id`, `created` and
//! `model` the same in every chunk; one finish chunk per choice; the usage chunk last, then `[DONE]`.

use std::fmt::Write;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::api::generate::{Ending, Piece, Run, StopReason, best, merged};
use crate::api::logprobs::{Asked, Echo, Names};
use crate::api::openai::{Prepared, Surface};
use crate::api::{Pieces, Service, clock, failure};
use crate::config::NativeFormat;
use crate::error::Failure;
use crate::text::tokenizer::Tokenizer;

/// The form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Whole objects; streams of server-sent events.
    OpenAi,
    /// A native job: whole objects; streams of chunk objects, usage in the last.
    Native,
    /// A native job in the older form: `{"choices":[{"tokens":[…]}],"usage":{"input","output"}}`.
    Tokens,
}

impl Dialect {
    pub fn native(format: NativeFormat) -> Self {
        match format {
            NativeFormat::OpenAi => Dialect::Native,
            NativeFormat::Tokens => Dialect::Tokens,
        }
    }
}

/// Writes one answer.
pub struct Writer {
    dialect: Dialect,
    surface: Surface,
    id: String,
    created: u64,
    model: String,
    n: usize,
    prompts: Vec<Arc<Vec<u32>>>,
    include_usage: bool,
    continuous_usage: bool,
    return_token_ids: bool,
    prompt_tokens_details: bool,
    candidates: usize,
    echoes: Arc<Vec<Echo>>,
    logprobs: Asked,
    tokenizer: Arc<Tokenizer>,
    /// Choices whose first chunk is out.
    opened: Vec<bool>,
}

impl Writer {
    pub fn new(service: &Service, id: &str, dialect: Dialect, request: Prepared) -> Self {
        let prefix = match request.surface {
            Surface::Chat { .. } => "chatcmpl-",
            Surface::Text => "cmpl-",
        };
        let choices = request.prompts.len() * request.options.n;
        Self {
            dialect,
            surface: request.surface,
            id: if id.starts_with(prefix) { id.to_owned() } else { format!("{prefix}{id}") },
            created: clock::now(),
            model: service.name().to_owned(),
            n: request.options.n,
            prompts: request.prompts,
            include_usage: request.options.include_usage,
            continuous_usage: request.options.include_usage && request.options.continuous_usage,
            return_token_ids: request.options.return_token_ids,
            prompt_tokens_details: !service.settings.hide_prompt_tokens_details,
            candidates: request.options.candidates,
            echoes: request.echoes,
            logprobs: request.options.logprobs,
            tokenizer: service.tokenizer.clone(),
            opened: vec![false; choices],
        }
    }

    /// Waits for the end and gives one object.
    pub async fn whole(self, mut run: Run) -> Result<Value, Failure> {
        let pieces = run.collect(self.prompts.len() * self.candidates).await?;
        let pieces = best(pieces, self.n, self.candidates);
        if self.dialect == Dialect::Tokens {
            return Ok(self.tokens(&pieces, &run));
        }
        let mut object = self.head(match self.surface {
            Surface::Chat { .. } => "chat.completion",
            Surface::Text => "text_completion",
        });
        object.insert("choices".to_owned(), pieces.iter().map(|piece| self.whole_choice(piece)).collect());
        object.insert("usage".to_owned(), self.usage(&run));
        if let (true, Surface::Chat { .. }) = (self.return_token_ids, &self.surface) {
            object.insert("prompt_token_ids".to_owned(), json!(self.prompts.first()));
        }
        if let (Some(scores), Surface::Chat { .. }) = (pieces.first().and_then(|piece| self.prompt_logprobs(piece)), &self.surface) {
            object.insert("prompt_logprobs".to_owned(), scores);
        }
        if let (Dialect::Native, Surface::Text) = (self.dialect, &self.surface) {
            object.insert("text".to_owned(), json!(pieces.first().map(|piece| &piece.text)));
        }
        Ok(Value::Object(object))
    }

    /// Gives pieces as they are pulled. Dropping the stream drops the run.
    pub fn stream(self, run: Run) -> Pieces {
        let state = Streaming { writer: self, run, started: false, failed: None };
        Box::pin(futures::stream::unfold(state, |mut state| async move { state.next().await.map(|item| (item, state)) }))
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

    fn whole_choice(&self, piece: &Piece) -> Value {
        let mut choice = match &self.surface {
            Surface::Chat { role } => {
                json!({"index": piece.index, "message": {"role": role, "content": piece.text, "refusal": null}, "logprobs": self.logprobs(piece)})
            }
            Surface::Text => json!({"index": piece.index, "text": piece.text, "logprobs": self.logprobs(piece)}),
        };
        if let (Some(scores), Surface::Text) = (self.prompt_logprobs(piece), &self.surface) {
            choice["prompt_logprobs"] = scores;
        }
        put_ending(&mut choice, piece.ending.as_ref());
        if self.return_token_ids {
            choice["token_ids"] = json!(self.token_ids(piece));
            self.put_prompt_ids(&mut choice, piece.index);
        }
        choice
    }

    fn names(&self) -> Names<'_> {
        Names { tokenizer: &self.tokenizer, as_ids: self.logprobs.as_ids }
    }

    /// What is known of the tokens of this piece; of an echoed prompt's too, in its choice's first piece.
    fn logprobs(&self, piece: &Piece) -> Value {
        let (Some(top), names) = (self.logprobs.output, self.names()) else { return Value::Null };
        if self.surface != Surface::Text {
            return names.chat(&piece.logprobs, top);
        }
        let place = piece.index / self.n;
        let prompt = match (self.echoes.get(place), self.prompts.get(place), &piece.prompt) {
            (Some(echo), Some(ids), Some(scores)) => echo.reported(&self.tokenizer, ids, scores),
            _ => Vec::new(),
        };
        let prompt = prompt.iter().enumerate().map(|(i, token)| (token, i == 0));
        names.text(prompt.chain(piece.logprobs.iter().map(|token| (token, false))), top)
    }

    /// Those of a chunk: null when nothing is known anew.
    fn new_logprobs(&self, piece: &Piece) -> Value {
        if piece.logprobs.is_empty() && piece.prompt.is_none() { Value::Null } else { self.logprobs(piece) }
    }

    /// `prompt_logprobs`, when asked for.
    fn prompt_logprobs(&self, piece: &Piece) -> Option<Value> {
        let (top, scores) = (self.logprobs.prompt?, piece.prompt.as_ref()?);
        Some(self.names().prompt(self.prompts.get(piece.index / self.n)?, scores, top))
    }

    /// The sampled tokens. With log probabilities they come with those, whose text may wait for more: one by one they belong together.
    fn token_ids(&self, piece: &Piece) -> Vec<u32> {
        match self.logprobs.output {
            Some(_) => piece.logprobs.iter().map(|token| token.id).collect(),
            None => piece.tokens.clone(),
        }
    }

    /// Completions give the prompt's ids in the choice, chat completions beside the choices.
    fn put_prompt_ids(&self, choice: &mut Value, index: usize) {
        if self.surface == Surface::Text {
            choice["prompt_token_ids"] = json!(self.prompts.get(index / self.n));
        }
    }

    /// One chunk object around `choices`.
    fn chunk(&self, choices: Vec<Value>) -> Map<String, Value> {
        let mut chunk = self.head(match self.surface {
            Surface::Chat { .. } => "chat.completion.chunk",
            Surface::Text => "text_completion",
        });
        chunk.insert("choices".to_owned(), Value::Array(choices));
        chunk
    }

    /// A choice of a chunk: `text` (with the role, when it opens a chat choice), the ending when there is one.
    fn chunk_choice(&self, index: usize, text: Option<&str>, opens: bool, ending: Option<&Ending>) -> Value {
        let mut choice = match &self.surface {
            Surface::Chat { role } => {
                let mut delta = Map::new();
                if opens {
                    delta.insert("role".to_owned(), json!(role));
                }
                if let Some(text) = text {
                    delta.insert("content".to_owned(), json!(text));
                }
                json!({"index": index, "delta": delta, "logprobs": null})
            }
            Surface::Text => json!({"index": index, "text": text.unwrap_or_default(), "logprobs": null}),
        };
        put_ending(&mut choice, ending);
        choice
    }

    /// Server-sent events of what is ready; empty when that shows nothing yet.
    fn frames(&mut self, pieces: Vec<Piece>, run: &Run, first: bool) -> String {
        let mut frames = String::new();
        if let (true, Surface::Chat { .. }) = (first, &self.surface) {
            for index in 0..self.opened.len() {
                let mut chunk = self.chunk(vec![self.chunk_choice(index, Some(""), true, None)]);
                if index == 0 && self.return_token_ids {
                    chunk.insert("prompt_token_ids".to_owned(), json!(self.prompts.first()));
                }
                self.frame(&mut frames, chunk, run);
            }
        }
        for piece in merged(pieces) {
            let opens = !std::mem::replace(&mut self.opened[piece.index], true);
            if !piece.text.is_empty() || !piece.logprobs.is_empty() || self.return_token_ids {
                let mut choice = self.chunk_choice(piece.index, Some(&piece.text), false, None);
                choice["logprobs"] = self.new_logprobs(&piece);
                if self.return_token_ids {
                    choice["token_ids"] = json!(self.token_ids(&piece));
                    if opens {
                        self.put_prompt_ids(&mut choice, piece.index);
                    }
                }
                self.frame(&mut frames, self.chunk(vec![choice]), run);
            }
            if piece.ending.is_some() {
                let choice = self.chunk_choice(piece.index, None, false, piece.ending.as_ref());
                self.frame(&mut frames, self.chunk(vec![choice]), run);
            }
        }
        if run.is_done() {
            if self.include_usage {
                let mut chunk = self.chunk(Vec::new());
                chunk.insert("usage".to_owned(), self.usage(run));
                write_frame(&mut frames, &Value::Object(chunk));
            }
            frames.push_str("data: [DONE]\n\n");
        }
        frames
    }

    fn frame(&self, frames: &mut String, mut chunk: Map<String, Value>, run: &Run) {
        if self.include_usage {
            chunk.insert("usage".to_owned(), if self.continuous_usage { self.usage(run) } else { Value::Null });
        }
        write_frame(frames, &Value::Object(chunk));
    }

    /// One chunk object of all that is ready; `None` when that shows nothing yet. The first one opens every choice, the last one
    /// carries the usage.
    fn object(&mut self, pieces: Vec<Piece>, run: &Run, first: bool) -> Option<Value> {
        let mut pieces = merged(pieces);
        if first {
            for index in (0..self.opened.len()).filter(|_| self.opened.len() > 1) {
                if !pieces.iter().any(|piece| piece.index == index) {
                    pieces.push(Piece { index, ..Piece::default() });
                }
            }
            pieces.sort_by_key(|piece| piece.index);
        }
        let mut choices = Vec::new();
        for piece in pieces {
            let opens = !std::mem::replace(&mut self.opened[piece.index], true);
            let shows = !piece.text.is_empty() || !piece.logprobs.is_empty() || piece.ending.is_some() || opens || self.return_token_ids;
            if shows {
                let text = (opens || !piece.text.is_empty()).then_some(piece.text.as_str());
                let mut choice = self.chunk_choice(piece.index, text, opens, piece.ending.as_ref());
                choice["logprobs"] = self.new_logprobs(&piece);
                if self.return_token_ids {
                    choice["token_ids"] = json!(self.token_ids(&piece));
                    if opens {
                        self.put_prompt_ids(&mut choice, piece.index);
                    }
                }
                choices.push(choice);
            }
        }
        if choices.is_empty() {
            return None;
        }
        let mut chunk = self.chunk(choices);
        if let (true, true, Surface::Chat { .. }) = (first, self.return_token_ids, &self.surface) {
            chunk.insert("prompt_token_ids".to_owned(), json!(self.prompts.first()));
        }
        if run.is_done() {
            chunk.insert("usage".to_owned(), self.usage(run));
        }
        Some(Value::Object(chunk))
    }

    fn usage(&self, run: &Run) -> Value {
        let mut usage = json!({
            "prompt_tokens": run.prompt_tokens,
            "completion_tokens": run.completion_tokens,
            "total_tokens": run.prompt_tokens + run.completion_tokens,
        });
        if self.prompt_tokens_details {
            usage["prompt_tokens_details"] = json!({ "cached_tokens": run.cached_tokens() });
        }
        usage
    }

    /// The older form: each choice's new texts, and the counts so far.
    fn tokens(&self, pieces: &[Piece], run: &Run) -> Value {
        let texts = |index: usize| -> Vec<&str> {
            pieces.iter().filter(|piece| piece.index == index && !piece.text.is_empty()).map(|piece| piece.text.as_str()).collect()
        };
        let choices: Vec<Value> = (0..self.opened.len()).map(|index| json!({"tokens": texts(index)})).collect();
        json!({"choices": choices, "usage": {"input": run.prompt_tokens, "output": run.completion_tokens}})
    }
}

fn write_frame(frames: &mut String, value: &Value) {
    // Writing to a string does not fail.
    let _ = write!(frames, "data: {value}\n\n");
}

fn put_ending(choice: &mut Value, ending: Option<&Ending>) {
    choice["finish_reason"] = json!(ending.map(|ending| ending.reason));
    if let Some(ending) = ending {
        choice["stop_reason"] = match &ending.stop {
            StopReason::None => Value::Null,
            StopReason::Text(text) => json!(text),
            StopReason::Token(id) => json!(id),
        };
    }
}

/// A stream on its way.
struct Streaming {
    writer: Writer,
    run: Run,
    /// Something is out.
    started: bool,
    /// Ends the stream after the piece that says so.
    failed: Option<Failure>,
}

impl Streaming {
    /// A failure before the first piece is the only item, so that its status can still be told; later ones follow a piece of their own.
    async fn next(&mut self) -> Option<Result<Value, Failure>> {
        if let Some(failure) = self.failed.take() {
            return Some(Err(failure));
        }
        loop {
            let pieces = match self.run.next().await? {
                Ok(pieces) => pieces,
                Err(failure) if self.started => {
                    let last = match self.writer.dialect {
                        Dialect::OpenAi => Value::String(failure::sse(&failure)),
                        Dialect::Native | Dialect::Tokens => failure::chunk(&failure),
                    };
                    self.failed = Some(failure);
                    return Some(Ok(last));
                }
                Err(failure) => return Some(Err(failure)),
            };
            let first = !std::mem::replace(&mut self.started, true);
            let item = match self.writer.dialect {
                Dialect::OpenAi => {
                    Some(self.writer.frames(pieces, &self.run, first)).filter(|frames| !frames.is_empty()).map(Value::String)
                }
                Dialect::Native => self.writer.object(pieces, &self.run, first),
                Dialect::Tokens => {
                    let shows = self.run.is_done() || pieces.iter().any(|piece| !piece.text.is_empty());
                    shows.then(|| self.writer.tokens(&pieces, &self.run))
                }
            };
            if let Some(item) = item {
                return Some(Ok(item));
            }
        }
    }
}
