//! The routes of the direct server as readers of `/openapi.json`, `/docs` and docs/api.md see them, one row each. A test asks
//! [`crate::api::routes`] for every path.

use crate::api::failure::ErrorForm;

/// A method of a path.
pub struct Operation {
    pub method: &'static str,
    /// With parameters in braces.
    pub path: &'static str,
    /// Other paths of the same.
    pub also: &'static [&'static str],
    /// The heading it stands under.
    pub tag: &'static str,
    /// What it does, in Markdown.
    pub summary: &'static str,
    pub body: Body,
    pub answer: AnswerShape,
    /// How its failures are written.
    pub errors: ErrorForm,
    /// Needs no key.
    pub is_open: bool,
    /// Bodies of requests, each with the status of its answer.
    pub examples: &'static [Example],
}

/// What a request is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Body {
    Nothing,
    Chat,
    Completion,
    Response,
    Message,
    /// Rows of the table of fields by their names, the first so many of which are required.
    Fields(usize, &'static [&'static str]),
}

/// What a good answer is.
#[derive(Clone, Copy)]
pub enum AnswerShape {
    /// A schema by its name.
    Json(&'static str),
    /// The same; with `stream` events whose data are the second.
    Streamed(&'static str, &'static str),
    Text(&'static str),
    /// None: the model cannot do it.
    Never,
}

pub struct Example {
    pub name: &'static str,
    pub status: u16,
    /// JSON.
    pub body: &'static str,
}

const fn example(name: &'static str, status: u16, body: &'static str) -> Example {
    Example { name, status, body }
}

const fn get(path: &'static str, tag: &'static str, answer: AnswerShape, summary: &'static str) -> Operation {
    let (also, errors): (&[&str], _) = (&[], ErrorForm::OpenAi);
    Operation { method: "GET", path, also, tag, summary, body: Body::Nothing, answer, errors, is_open: false, examples: &[] }
}

const fn post(path: &'static str, tag: &'static str, body: Body, answer: AnswerShape, summary: &'static str) -> Operation {
    Operation { method: "POST", body, ..get(path, tag, answer, summary) }
}

impl Operation {
    const fn also(self, also: &'static [&'static str]) -> Self {
        Self { also, ..self }
    }

    const fn open(self) -> Self {
        Self { is_open: true, ..self }
    }

    const fn errors(self, errors: ErrorForm) -> Self {
        Self { errors, ..self }
    }

    const fn examples(self, examples: &'static [Example]) -> Self {
        Self { examples, ..self }
    }
}

const OPENAI: &str = "OpenAI";
const RESPONSES: &str = "Responses";
const ANTHROPIC: &str = "Anthropic";
const TOKENS: &str = "Tokens and templates";
const OTHERS: &str = "Other servers' routes";
const SERVER: &str = "Server";

/// Fields of calls that render a chat and generate nothing.
const RENDERED: &[&str] = &[
    "messages",
    "model",
    "tools",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "enable_thinking",
    "reasoning_effort",
    "add_special_tokens",
];

use AnswerShape::{Json, Never, Streamed, Text};
use Body::{Chat, Completion, Fields, Message, Response};

const ASK: &str = r#"{"model": "default", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16, "temperature": 0}"#;

/// All of them, in the order of the page.
#[rustfmt::skip]
pub const OPERATIONS: &[Operation] = &[
    post("/v1/chat/completions", OPENAI, Chat, Streamed("ChatCompletion", "ChatCompletionChunk"), "Answers a chat.")
        .also(&["/chat/completions", "/"])
        .examples(&[
            example("chat", 200, ASK),
            example("stream", 200, r#"{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8, "stream": true, "stream_options": {"include_usage": true}}"#),
            example("json_schema", 200, r#"{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32, "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false}}}}"#),
            example("out_of_range", 400, r#"{"messages": [{"role": "user", "content": "Hello"}], "top_p": 2}"#),
            example("unknown_model", 404, r#"{"model": "no-such-model", "messages": [{"role": "user", "content": "Hello"}]}"#),
        ]),
    post("/v1/completions", OPENAI, Completion, Streamed("Completion", "Completion"), "Continues a text, without a template.")
        .also(&["/completions"])
        .examples(&[
            example("text", 200, r#"{"model": "default", "prompt": "Once upon a time", "max_tokens": 16}"#),
            example("several", 200, r#"{"prompt": ["One", "Two"], "max_tokens": 4, "n": 2, "seed": 7, "logprobs": 2}"#),
            example("no_prompt", 400, r#"{"max_tokens": 16}"#),
        ]),
    get("/v1/models", OPENAI, Json("ModelList"), "The names under which clients may ask for the model.").also(&["/models"]),
    get("/v1/models/{model}", OPENAI, Json("Model"), "One of them."),
    post("/v1/embeddings", OPENAI, Fields(1, &["model", "input"]), Never, "Refused: the models served here generate text.")
        .also(&["/embeddings"])
        .examples(&[example("refused", 400, r#"{"model": "default", "input": "Hello"}"#)]),
    post("/v1/responses", RESPONSES, Response, Streamed("Response", "ResponseEvent"), "Answers in OpenAI's newer form, [kept for a while](#responses).")
        .also(&["/responses"])
        .errors(ErrorForm::Responses)
        .examples(&[
            example("text", 200, r#"{"model": "default", "input": "What is the capital of France?", "max_output_tokens": 16}"#),
            example("stream", 200, r#"{"input": [{"role": "user", "content": "What is the capital of France?"}], "max_output_tokens": 8, "stream": true}"#),
            example("background", 400, r#"{"input": "Hello", "background": true}"#),
        ]),
    get("/v1/responses/{id}", RESPONSES, Json("Response"), "A response that is kept.").errors(ErrorForm::Responses),
    Operation { method: "DELETE", ..get("/v1/responses/{id}", RESPONSES, Json("Deleted"), "Forgets it.").errors(ErrorForm::Responses) },
    Operation { method: "POST", ..get("/v1/responses/{id}/cancel", RESPONSES, Never, "Refused: only responses in the background can be cancelled, and there are none.").errors(ErrorForm::Responses) },
    get("/v1/responses/{id}/input_items", RESPONSES, Json("ItemList"), "What it was an answer to: `limit`, `order`, `after`.").errors(ErrorForm::Responses),
    post("/v1/messages", ANTHROPIC, Message, Streamed("Message", "MessageEvent"), "[Anthropic's Messages](#anthropics-messages).")
        .errors(ErrorForm::Anthropic)
        .examples(&[
            example("message", 200, r#"{"model": "default", "max_tokens": 16, "messages": [{"role": "user", "content": "What is the capital of France?"}]}"#),
            example("no_limit", 400, r#"{"messages": [{"role": "user", "content": "Hello"}]}"#),
        ]),
    post("/v1/messages/count_tokens", ANTHROPIC, Message, Json("TokenCount"), "Tokens of the prompt that such a request comes to.")
        .errors(ErrorForm::Anthropic)
        .examples(&[example("count", 200, r#"{"model": "default", "messages": [{"role": "user", "content": "Hello"}]}"#)]),
    post("/tokenize", TOKENS, Fields(0, &["prompt", "messages", "content", "model", "tools", "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "add_special_tokens", "return_token_strs", "add_special", "parse_special", "with_pieces"]), Json("Tokens"), "Token ids, in vLLM's form or llama.cpp's.")
        .also(&["/v1/tokenize"])
        .examples(&[
            example("prompt", 200, r#"{"prompt": "Hello there", "return_token_strs": true}"#),
            example("messages", 200, r#"{"messages": [{"role": "user", "content": "Hello"}]}"#),
            example("content", 200, r#"{"content": "Hello there", "with_pieces": true}"#),
            example("nothing", 400, r#"{}"#),
        ]),
    post("/detokenize", TOKENS, Fields(1, &["tokens", "model"]), Json("Text"), "The text of token ids.")
        .also(&["/v1/detokenize"])
        .examples(&[example("ids", 200, r#"{"tokens": [300, 301]}"#)]),
    post("/apply-template", TOKENS, Fields(1, RENDERED), Json("Prompt"), "What the chat template makes of messages.")
        .also(&["/v1/apply-template"])
        .examples(&[example("chat", 200, r#"{"messages": [{"role": "user", "content": "Hello"}]}"#)]),
    post("/v1/chat/completions/render", TOKENS, Fields(1, RENDERED), Json("Rendered"), "The same, with its token ids.")
        .examples(&[example("chat", 200, r#"{"messages": [{"role": "user", "content": "Hello"}]}"#)]),
    post("/api/v1/token_check", OTHERS, Fields(1, &["prompts"]), Json("TokenCheck"), "FastChat's: whether prompts and their answers fit the context.")
        .examples(&[example("fits", 200, r#"{"prompts": [{"model": "default", "prompt": "Hello", "max_tokens": 16}]}"#)]),
    post("/api/v1/chat/completions", OTHERS, Chat, Streamed("ChatCompletion", "ChatCompletionChunk"), "FastChat's chat, with its defaults.")
        .examples(&[example("chat", 200, ASK)]),
    post("/v1/engines/{model}/chat/completions", OTHERS, Chat, Streamed("ChatCompletion", "ChatCompletionChunk"), "A chat; the path names the model.")
        .examples(&[example("chat", 200, r#"{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}"#)]),
    post("/v1/engines/{model}/completions", OTHERS, Completion, Streamed("Completion", "Completion"), "A completion; the path names the model.")
        .examples(&[example("text", 200, r#"{"prompt": "Hello", "max_tokens": 8}"#)]),
    post("/v1/engines/{model}/embeddings", OTHERS, Fields(0, &["input"]), Never, "Refused, as `/v1/embeddings`.")
        .examples(&[example("refused", 400, r#"{"input": "Hello"}"#)]),
    post("/infill", OTHERS, Fields(2, &["input_prefix", "input_suffix", "input_extra", "prompt", "model", "n_predict", "max_tokens", "temperature", "top_k", "top_p", "stop", "seed", "n", "n_probs", "stream", "return_token_ids"]), Streamed("Infilled", "Infilled"), "llama.cpp's: [fills in the middle](#filling-in-the-middle), with all fields of completions.")
        .also(&["/v1/infill"])
        .examples(&[example("no_tokens", 400, r#"{"input_prefix": "def add(a, b):\n    return ", "input_suffix": "\n", "n_predict": 16}"#)]),
    post("/v1/abort_requests", OTHERS, Fields(0, &["req_ids", "abort_all"]), Json("Aborted"), "FastDeploy's: ends running requests.")
        .also(&["/abort_requests"])
        .examples(&[example("ids", 200, r#"{"req_ids": ["chatcmpl-123"]}"#)]),
    get("/ping", SERVER, Json("Health"), "Readiness, for RunPod's load balancer: 204 while loading, then 200; 503 draining or failed.").open(),
    get("/health", SERVER, Json("Health"), "Readiness, for container platforms.").open(),
    get("/metrics", SERVER, Text("Prometheus' text format."), "[Figures](#metrics).").open(),
    get("/load", SERVER, Json("Load"), "Sequences that run or wait.").also(&["/v1/load"]).open(),
    get("/version", SERVER, Json("Version"), "The program's version.").also(&["/v1/version"]),
    get("/openapi.json", SERVER, Json("Document"), "This API as an OpenAPI 3.1 document.").also(&["/v1/openapi.json"]).open(),
    get("/docs", SERVER, Text("A page in HTML."), "The same, for browsers.").open(),
];
