//! Fields of the routes that are translated into chats. A field that is in no such table is a chat's.

use super::table::Neutral;
use super::table::TakenBy::{Messages, Pooling, Responses};
use super::table::ValueSpec::{Bool, Integer, Object, Other, Text};
use super::table::{FieldSpec, row, unsupported};

const ANSWER: &str = "the answer of this route has no place for it";
const PROMPT: &str = "the prompt is `input`";
const CONVERSATION: &str = "the prompt is `messages`";
const HOSTED: &str = "what runs at the provider";

/// Fields of `/v1/responses`.
#[rustfmt::skip]
pub const RESPONSES: &[FieldSpec] = &[
    row("input", Other("a string, or a list of items"), Responses, "Messages, `function_call`, `function_call_output`, `reasoning`, `item_reference`. Consecutive items of the assistant are one message of the chat."),
    row("instructions", Text, Responses, "A system message before the rest. Those of an earlier response are not carried over."),
    row("previous_response_id", Text, Responses, "A stored response that this one continues: its input and output stand before `input`."),
    row("store", Bool(Some(true)), Responses, "Keep the response, where `RESPONSES_STORE` is on. The answer's `store` tells whether it is kept."),
    row("max_output_tokens", Other("an integer ≥ 1"), Responses, "Most tokens of the answer, reasoning included."),
    row("tools", Other("a list of function tools, flat"), Responses, "`{type: \"function\", name, description, parameters, strict}`. Tools that run at the provider are refused."),
    row("tool_choice", Other("`auto`, `none`, `required`, a function, or `allowed_tools`"), Responses, "Which tools may be called."),
    row("text", Object, Responses, "`format`: `text`, `json_object` or `json_schema`. `verbosity` is accepted and has no effect."),
    row("reasoning", Object, Responses, "`effort`: as `reasoning_effort` of chats. `max_tokens`: as `thinking_token_budget`. `summary` is accepted: the reasoning itself is in the answer."),
    row("include", Other("a list"), Responses, "`message.output_text.logprobs`. Others that OpenAI knows ask for nothing that is here."),
    row("top_logprobs", Other("a number of at least 0"), Responses, "Alternatives at each token; without `include` it asks for log probabilities too."),
    row("truncation", Other("`auto` or `disabled`"), Responses, "`auto`: a conversation that is too long loses its beginning."),
    row("metadata", Object, Responses, "At most 16 strings, given back."),
    row("background", Bool(Some(false)), Responses, "A response is made while its client waits.").neutral(Neutral::Empty),
    unsupported("conversation", Neutral::Empty, HOSTED),
    unsupported("prompt", Neutral::Empty, HOSTED),
    unsupported("messages", Neutral::Nothing, PROMPT),
    unsupported("prompt_token_ids", Neutral::Empty, PROMPT),
    unsupported("continue_final_message", Neutral::Empty, PROMPT),
    unsupported("n", Neutral::Number(1.0), ANSWER),
    unsupported("echo", Neutral::Empty, ANSWER),
    unsupported("logprobs", Neutral::Empty, ANSWER),
    unsupported("prompt_logprobs", Neutral::Empty, ANSWER),
    unsupported("return_token_ids", Neutral::Empty, ANSWER),
    unsupported("collect_metrics", Neutral::Empty, ANSWER),
];

/// Fields of `/v1/messages` and `/v1/messages/count_tokens`.
#[rustfmt::skip]
pub const MESSAGES: &[FieldSpec] = &[
    row("messages", Other("a list of messages"), Messages, "Roles `user` and `assistant`; blocks `text`, `tool_use`, `tool_result`, `thinking`, `redacted_thinking` (left out), `document` of text. An answer goes on where a last message of the assistant ends."),
    row("system", Other("a string, or text blocks"), Messages, "The system message. A billing line of Claude Code at its beginning is left out: it changes with every request."),
    row("max_tokens", Other("an integer ≥ 1"), Messages, "Most tokens of the answer. Required, but for counting."),
    row("tools", Other("a list of `{name, description, input_schema}`"), Messages, "Tools that run at the provider are refused."),
    row("tool_choice", Object, Messages, "`type`: `auto`, `any`, `tool` with `name`, `none`; `disable_parallel_tool_use`."),
    row("thinking", Object, Messages, "`type`: `enabled` with `budget_tokens`, `adaptive`, `disabled`. Without it: as the model does by itself."),
    row("output_config", Object, Messages, "`effort`: as `reasoning_effort` of chats. `format`: `json_schema` with `schema`."),
    row("output_format", Object, Messages, "The older place of `output_config.format`."),
    row("metadata", Object, Messages, "`user_id`: has no effect."),
    row("context_management", Object, Messages, "Accepted; nothing is edited."),
    row("cache_control", Object, Messages, "Accepted: what requests begin with alike is cached anyway."),
    row("service_tier", Text, Messages, "Accepted; there is one tier."),
    unsupported("mcp_servers", Neutral::Empty, HOSTED),
    unsupported("container", Neutral::Empty, HOSTED),
    unsupported("prompt_token_ids", Neutral::Empty, CONVERSATION),
    unsupported("prompt", Neutral::Empty, CONVERSATION),
    unsupported("n", Neutral::Number(1.0), ANSWER),
    unsupported("echo", Neutral::Empty, ANSWER),
    unsupported("logprobs", Neutral::Empty, ANSWER),
    unsupported("top_logprobs", Neutral::Number(0.0), ANSWER),
    unsupported("prompt_logprobs", Neutral::Empty, ANSWER),
    unsupported("return_token_ids", Neutral::Empty, ANSWER),
    unsupported("collect_metrics", Neutral::Empty, ANSWER),
];

const ORDER: &str = "requests are served in the order they come";
const FORM: &str = "vectors are 32-bit numbers, little-endian in base64";
const TEXTS: &str = "texts are taken as they are";

/// Fields of `/v1/embeddings`, `/v1/rerank` and `/v1/score`.
#[rustfmt::skip]
pub const POOLING: &[FieldSpec] = &[
    row("model", Text, Pooling, "As everywhere."),
    row("user", Text, Pooling, "Accepted."),
    row("input", Other("a string, a list of strings, token ids, or lists of token ids"), Pooling, "What is embedded, at most 2,048 texts. Token ids are the model's own."),
    row("encoding_format", Other("`float` or `base64`"), Pooling, "Of vectors: a list of numbers, or little-endian 32-bit numbers in base64."),
    row("dimensions", Integer { min: 1, default: None }, Pooling, "Vectors are cut to so many numbers, where the model was made for it (`is_matryoshka`)."),
    row("normalize", Bool(None), Pooling, "Vectors are made to have length 1. Without it: as the model's files say."),
    row("prompt_name", Text, Pooling, "One of the prompts in `config_sentence_transformers.json` stands before each text. Without it: the one that the file names as default."),
    row("query", Text, Pooling, "What documents are ranked for."),
    row("documents", Other("a list of strings, or of objects with a `text`"), Pooling, "What is ranked or scored, at most 2,048."),
    row("docs", Other("as `documents`"), Pooling, "Another name of `documents`."),
    row("top_n", Integer { min: 0, default: Some(0) }, Pooling, "So many of the best are given; 0: all."),
    row("return_documents", Bool(Some(true)), Pooling, "Results hold their documents."),
    row("return_docs", Bool(Some(true)), Pooling, "Another name of `return_documents`."),
    row("max_tokens_per_doc", Integer { min: 1, default: None }, Pooling, "A reranker reads so many tokens of a document at most."),
    row("text_1", Other("a string or a list of strings"), Pooling, "What is scored against `text_2`: one against all, or each against the other of its place. Other names: `queries`, `data_1`."),
    row("text_2", Other("a string or a list of strings"), Pooling, "Other names: `documents`, `data_2`."),
    row("queries", Other("as `text_1`"), Pooling, "Another name of `text_1`."),
    row("data_1", Other("as `text_1`"), Pooling, "Another name of `text_1`."),
    row("data_2", Other("as `text_2`"), Pooling, "Another name of `text_2`."),
    row("use_activation", Bool(None), Pooling, "Scores become their sigmoid, or of an embedding model: what `normalize` is. Without it: as the model's files say."),
    row("raw_scores", Bool(None), Pooling, "The opposite of `use_activation`."),
    row("add_special_tokens", Bool(Some(true)), Pooling, "The tokenizer adds what it wants around a text."),
    row("truncate_prompt_tokens", Integer { min: -1, default: None }, Pooling, "A longer text is cut to its first tokens, so many, those that the tokenizer adds among them; of a pair the longer text is cut. -1: as many as the model takes. Without it a text that is too long is a 400."),
    row("truncate", Other("true, false, `NONE` or `END`"), Pooling, "`true` or `END`: as `truncate_prompt_tokens: -1`."),
    unsupported("messages", Neutral::Empty, TEXTS),
    unsupported("input_type", Neutral::Empty, "`prompt_name` says which prompt stands before a text"),
    unsupported("mm_processor_kwargs", Neutral::Empty, TEXTS),
    unsupported("priority", Neutral::Number(0.0), ORDER),
    unsupported("embed_dtype", Neutral::Words(&["float32"]), FORM),
    unsupported("endianness", Neutral::Words(&["native", "little"]), FORM),
];
