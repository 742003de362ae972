//! Fields of the routes that are translated into chats. A field that is in no such table is a chat's.

use super::table::Neutral;
use super::table::TakenBy::{Messages, Responses};
use super::table::ValueSpec::{Bool, Object, Other, Text};
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
];
