//! Every field of a request that this server knows, one row each: what [`super::Fields`] reads, what is refused, `docs/fields.md`, and the
//! schemas of `/openapi.json`.
//! Unknown fields are accepted.

use std::collections::HashMap;
use std::sync::LazyLock;

/// One field.
#[derive(Clone, Copy)]
pub struct FieldSpec {
    pub name: &'static str,
    /// Other servers' names that mean the same. In one layer of a request the first name wins.
    pub aliases: &'static [&'static str],
    pub value: ValueSpec,
    pub taken_by: TakenBy,
    /// The only values that pass, of a field whose other values would change the answer in a way that is not supported.
    pub neutral: Option<Neutral>,
    /// What it does, in Markdown; for a field that is not supported, what it belongs to.
    pub doc: &'static str,
}

/// What a field may hold, and what holds without it. `null` is the same as absent everywhere.
#[derive(Clone, Copy)]
pub enum ValueSpec {
    /// With its default, where that is one value.
    Bool(Option<bool>),
    Text,
    Object,
    /// A whole number of at least `min`.
    Integer {
        min: i64,
        default: Option<i64>,
    },
    /// A number in `[min, max]`. Of the sampling fields `generation_config.json` may bring another default.
    Number {
        min: f64,
        max: f64,
        default: f64,
    },
    /// Token ids below the vocabulary size.
    TokenIds,
    /// Something with a reader of its own; what it is, in words.
    Other(&'static str),
    /// Not read: only [`FieldSpec::neutral`] says what passes.
    Unsupported,
}

/// Which dialects take a field. A job's own input takes what the route with the same kind of prompt takes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum TakenBy {
    All,
    /// Requests with `messages`.
    Chat,
    /// Requests with prompts.
    Completions,
    /// A job's own input alone.
    Jobs,
    /// `/v1/responses` alone, which translates it.
    Responses,
    /// `/v1/messages` alone, which translates it.
    Messages,
    /// `/infill` alone.
    Infill,
    /// `/v1/embeddings`, `/v1/rerank` and `/v1/score` alone.
    Pooling,
    /// Calls that generate nothing: `/tokenize`, `/detokenize`, `/api/v1/token_check`, `/v1/abort_requests`.
    Calls,
}

/// Which values of a field change nothing and may pass.
#[derive(Clone, Copy)]
pub enum Neutral {
    /// None but null.
    Nothing,
    /// Empty list, object or string, and `false`.
    Empty,
    Number(f64),
    /// One of these words, or empty.
    Words(&'static [&'static str]),
    /// `true`.
    Yes,
    /// Empty, or a wish not to think ([`super::refuse::is_thinking_off`]), which the template is told.
    NoThinking,
}

pub(super) const fn row(name: &'static str, value: ValueSpec, taken_by: TakenBy, doc: &'static str) -> FieldSpec {
    FieldSpec { name, aliases: &[], value, taken_by, neutral: None, doc }
}

pub(super) const fn unsupported(name: &'static str, neutral: Neutral, group: &'static str) -> FieldSpec {
    row(name, Unsupported, All, group).neutral(neutral)
}

impl FieldSpec {
    pub(super) const fn aliases(self, aliases: &'static [&'static str]) -> Self {
        Self { aliases, ..self }
    }

    pub(super) const fn neutral(self, neutral: Neutral) -> Self {
        Self { neutral: Some(neutral), ..self }
    }
}

/// The row of a field.
pub fn find(name: &str) -> Option<&'static FieldSpec> {
    static BY_NAME: LazyLock<HashMap<&str, &FieldSpec>> = LazyLock::new(|| FIELDS.iter().map(|field| (field.name, field)).collect());
    BY_NAME.get(name).copied()
}

use TakenBy::{All, Calls, Chat, Completions, Infill, Jobs};
use ValueSpec::{Bool, Integer, Number, Object, Other, Text, TokenIds, Unsupported};

const PROBABILITIES: &str = "probabilities";
const SAMPLING: &str = "other ways to sample";
const ENDING: &str = "other ways to end";
const ORDER: &str = "the order of requests";
const PROMPT: &str = "the prompt and its return";
const MEDIA: &str = "other media";

/// All of them. Fields that are not supported are refused in this order.
#[rustfmt::skip]
pub const FIELDS: &[FieldSpec] = &[
    // What is asked, and where further fields lie.
    row("model", Text, All, "One of the served names, the repository id, its last segment, or `default`. Of several models the first is meant where it is absent. Others are 404 unless `ANY_MODEL_NAME` is set."),
    row("messages", Other("a list of messages, or a string for one user message; or token ids"), Chat, "What the chat template is rendered with, at most `MAX_MESSAGES`; token ids are the prompt. In a job's own input it wins over every prompt."),
    row("prompt", Other("a string, a list of strings, token ids, or lists of token ids"), Completions, "Continued as it is, without a template."),
    row("prompt_token_ids", TokenIds, All, "The prompt as token ids, in place of `messages` or `prompt`."),
    row("completion_token_ids", TokenIds, All, "What the answer has begun with: the prompt goes on with these tokens. For one prompt only."),
    row("text", Other("as `prompt`"), Jobs, "Another name of `prompt`."),
    row("input", Other("as `prompt`; an object is the job's input itself"), Jobs, "Another name of `prompt`."),
    row("input_ids", TokenIds, Jobs, "Another name of `prompt_token_ids`."),
    row("sampling_params", Object, All, "Any field of this table may stand in it. What stands at the top level wins."),
    row("metadata", Object, All, "The same below `sampling_params`. Strings in it are labels and are not read."),
    // The template.
    row("apply_chat_template", Bool(Some(false)), Jobs, "Each prompt is rendered as one user message."),
    row("disable_chat_template", Bool(Some(false)), Chat, "The text of the first message is the prompt, as on `/v1/completions`."),
    row("chat_template", Text, Chat, "A template of the request's own, where `TRUST_REQUEST_CHAT_TEMPLATE` allows it."),
    row("chat_template_kwargs", Object, Chat, "Further variables for the template. They win over fields that set the same."),
    row("add_generation_prompt", Bool(None), Chat, "The template opens the answer. Without it: unless the final message is continued."),
    row("continue_final_message", Bool(Some(false)), Chat, "The answer goes on where the last message ends."),
    row("documents", Other("a list"), Chat, "For templates that read documents."),
    row("enable_thinking", Bool(None), Chat, "Told the template, as `thinking` too."),
    row("reasoning_effort", Other("`none`, `minimal`, `low`, `medium`, `high`, `xhigh` or `max`"), Chat, "Told the template; `none` switches thinking off."),
    row("add_special_tokens", Bool(None), All, "Whether the tokenizer adds what it wants around a text. Without it: around prompts, and not around what a template wrote."),
    // Tools and thoughts: docs/tools-and-reasoning.md.
    row("tools", Other("a list of functions"), Chat, "What the model may call, at most 128 or `MAX_TOOLS`. An empty list is none.").neutral(Neutral::Empty),
    row("tool_choice", Other("`none`, `auto`, `required`, a function, or `allowed_tools`"), Chat, "Whether it calls one. Without it: `auto`.").neutral(Neutral::Words(&["none", "auto"])),
    row("parallel_tool_calls", Bool(Some(true)), Chat, "`false`: only the first call is given."),
    row("functions", Other("a list of functions"), Chat, "The older form of `tools`.").neutral(Neutral::Empty),
    row("function_call", Other("`none`, `auto`, or a function"), Chat, "The older form of `tool_choice`.").neutral(Neutral::Words(&["none", "auto"])),
    row("thinking", Other("true, false, or an object with `type` or `enabled`"), Chat, "Told the template as `enable_thinking` and `thinking`. `budget_tokens` in it is a budget of thinking.").neutral(Neutral::NoThinking),
    row("reasoning", Other("true, false, or an object with `effort`, `enabled` or `exclude`"), Chat, "The same; `exclude` leaves thoughts out of the answer. `max_tokens` in it is a budget of thinking.").neutral(Neutral::NoThinking),
    row("include_reasoning", Bool(Some(true)), Chat, "`false` leaves thoughts out of the answer.").neutral(Neutral::Yes),
    row("separate_reasoning", Bool(Some(true)), Chat, "`false` leaves thoughts in the content, with their marks.").neutral(Neutral::Empty),
    row("thinking_token_budget", Integer { min: -1, default: None }, Chat, "Most tokens of thoughts: then they are closed, and the answer begins. 0 closes them at once, -1 is no bound. 400 where the model has no format of thoughts.").aliases(&["reasoning_max_tokens", "thinking_budget", "thinking_budget_tokens", "reasoning_budget"]).neutral(Neutral::Number(-1.0)),
    row("reasoning_format", Other("`auto`, `deepseek`, `parsed`, `none`, `raw` or `hidden`"), Chat, "`none` and `raw` leave thoughts in the content, `hidden` leaves them out.").neutral(Neutral::Words(&["none", "auto"])),
    // How much.
    row("n", Integer { min: 1, default: Some(1) }, All, "Choices for each prompt, at most 128 or `MAX_N`."),
    row("best_of", Integer { min: 0, default: None }, All, "Sequences for each prompt, of which the most probable `n` are given. Not for streams. 0 and absent are `n`."),
    row("max_completion_tokens", Integer { min: 1, default: None }, All, "Most tokens of an answer. Without it: `DEFAULT_MAX_TOKENS`, else 16 on `/v1/completions` and the rest of the context elsewhere. 0 with `echo`: the prompt alone is scored."),
    row("max_tokens", Integer { min: 1, default: None }, All, "The older name of `max_completion_tokens`, which wins."),
    row("max_new_tokens", Integer { min: 1, default: None }, All, "Another name, after those two."),
    row("n_predict", Integer { min: 1, default: None }, All, "Another name, after those three. -1 is no limit."),
    row("min_tokens", Integer { min: 0, default: Some(0) }, All, "No end before so many tokens.").aliases(&["min_new_tokens"]),
    row("response_max_tokens", Integer { min: 1, default: None }, All, "Most tokens of the answer behind its thoughts; in completions most tokens of all."),
    row("truncate_prompt_tokens", Integer { min: -1, default: None }, All, "A longer prompt is cut to its last tokens, so many; -1: as many as leave room for the answer. 0 is refused."),
    row("truncate_sequence", Bool(Some(false)), All, "The same as -1 there."),
    // Sampling.
    row("temperature", Number { min: 0.0, max: 2.0, default: 1.0 }, All, "0 is greedy. With `FASTDEPLOY_COMPATIBLE` there is no upper bound."),
    row("top_p", Number { min: 0.0, max: 1.0, default: 1.0 }, All, "0 is greedy."),
    row("top_k", Integer { min: -1, default: Some(0) }, All, "0 and -1 are off."),
    row("min_p", Number { min: 0.0, max: 1.0, default: 0.0 }, All, "Tokens less probable than this part of the most probable one are left out."),
    row("presence_penalty", Number { min: -2.0, max: 2.0, default: 0.0 }, All, "For tokens that the answer holds already."),
    row("frequency_penalty", Number { min: -2.0, max: 2.0, default: 0.0 }, All, "The same, for each time."),
    row("repetition_penalty", Number { min: 0.001, max: 1000.0, default: 1.0 }, All, "A factor for tokens that the prompt or the answer holds.").aliases(&["repeat_penalty"]),
    row("repeat_last_n", Other("-1"), All, "The window of `repeat_penalty`: all tokens, the only one there is. Without a penalty any value passes."),
    row("do_sample", Bool(None), All, "`false` is greedy."),
    row("seed", Other("a 64-bit integer"), All, "The same seed gives the same answer. Without it: random for every choice of every prompt, or as `SEED` fixes them."),
    row("logit_bias", Other("an object of token ids to numbers in [-100, 100]"), All, "Added to the logits."),
    row("bad_words", Other("a list of up to 128 strings"), All, "Words that the answer must not hold."),
    row("bad_words_token_ids", TokenIds, All, "Tokens that it must not hold."),
    row("suppress_tokens", TokenIds, All, "The same."),
    // The end.
    row("stop", Other("a string or a list of strings"), All, "The answer ends before any of them. At most 16 with the next two, or `MAX_STOP_STRINGS`."),
    row("stop_sequences", Other("a string or a list of strings"), All, "Further ones."),
    row("stop_strings", Other("a string or a list of strings"), All, "Further ones."),
    row("stop_token_ids", TokenIds, All, "Further tokens that end it."),
    row("include_stop_str_in_output", Bool(Some(false)), All, "What ended it is part of it."),
    row("ignore_eos", Bool(Some(false)), All, "The end of sequence is an ordinary token."),
    // What the answer must be: one of them.
    row("response_format", Other("`{\"type\": …}`: `text`, `json_object`, `json_schema`, `structural_tag`; `json` and `regex` with `value`"), All, "OpenAI's way to say it; see [structured output](structured-output.md)."),
    row("structured_outputs", Other("an object with one of `json`, `regex`, `choice`, `grammar`, `json_object`, `structural_tag`"), All, "vLLM's. Beside it `whitespace_pattern`, `disable_any_whitespace`, `disable_additional_properties`."),
    row("guided_decoding", Other("as `structured_outputs`"), All, "vLLM's older name of the same object."),
    row("structural_tag", Other("an object, or a string that holds one"), All, "Free text in which triggers open parts that meet a schema."),
    row("guided_json", Other("a JSON schema: an object, or a string that holds one"), All, "JSON that meets the schema."),
    row("guided_json_object", Bool(Some(false)), All, "Any JSON object."),
    row("guided_regex", Text, All, "A text that the whole expression matches."),
    row("guided_choice", Other("a list of strings"), All, "One of them."),
    row("guided_grammar", Other("a string"), All, "A text of this grammar: GBNF (EBNF) where it holds `::=`, else Lark."),
    row("guided_whitespace_pattern", Text, All, "The white space between the parts of JSON, as a regular expression."),
    row("guided_decoding_backend", Other("a backend's name in vLLM, with its options after a colon"), All, "There is one backend here, which every name means; the options count."),
    row("grammar", Other("a string, or `{\"type\", \"value\"}`"), All, "llama.cpp's: as `guided_grammar`. mistral.rs's: the types `regex`, `json_schema`, `lark` and `llguidance`."),
    row("json_schema", Other("as `guided_json`"), All, "The same in SGLang and llama.cpp."),
    row("regex", Text, All, "As `guided_regex`, in SGLang."),
    row("ebnf", Text, All, "A text of this grammar in GBNF (EBNF), in SGLang."),
    // What comes back.
    row("stream", Bool(Some(false)), All, "The answer comes in chunks."),
    row("stream_options", Object, All, "`include_usage`: a last chunk with the usage. `continuous_usage_stats`: usage in every chunk."),
    row("max_streaming_response_tokens", Integer { min: 1, default: Some(1) }, All, "Tokens of one choice in one chunk, at least."),
    row("request_id", Text, All, "The request's id: 1 to 128 printable ASCII characters. Answers carry it, and `/v1/abort_requests` knows it.").aliases(&["req_id"]),
    row("echo", Bool(Some(false)), All, "The answer begins with the prompt, in chats with the message that it continues."),
    row("logprobs", Other("true or false in chats, a number in completions, either in a job's own input"), All, "How probable the answer's tokens were; in completions with so many alternatives."),
    row("top_logprobs", Other("a number of at least 0"), Chat, "Alternatives at each token, at most 20 or `MAX_LOGPROBS`."),
    row("prompt_logprobs", Other("a number of at least 0"), All, "How probable the prompt's tokens were. Not for streams."),
    row("return_tokens_as_token_ids", Bool(None), All, "Tokens are named `token_id:N`. Without it: as `RETURN_TOKENS_AS_TOKEN_IDS` says."),
    row("collect_metrics", Bool(Some(false)), All, "`metrics` in the answer or in each chunk: when the request came, was begun and had its tokens, in FastDeploy's names."),
    row("return_token_ids", Bool(Some(false)), All, "`token_ids` and `prompt_token_ids` in the answer."),
    row("skip_special_tokens", Bool(Some(true)), All, "Control tokens are no part of the text."),
    // llama.cpp's /infill.
    row("input_prefix", Text, Infill, "What stands before the hole; `prompt` goes on with it."),
    row("input_suffix", Text, Infill, "What follows it."),
    row("input_extra", Other("a list of objects with `filename` and `text`"), Infill, "Other files, or parts of them."),
    row("n_probs", Integer { min: 0, default: Some(0) }, Infill, "As `logprobs` in completions.").neutral(Neutral::Number(0.0)),
    // Calls that generate nothing.
    row("content", Text, Calls, "llama.cpp's form: the text whose tokens are wanted."),
    row("add_special", Bool(Some(false)), Calls, "With `content`: what `add_special_tokens` is elsewhere."),
    row("parse_special", Bool(None), Calls, "Names of special tokens are control tokens. Without it: with `content`, and with `prompt` only as `ALLOW_SPECIAL_TOKENS` says."),
    row("with_pieces", Bool(Some(false)), Calls, "With `content`: what each token stands for, too."),
    row("return_token_strs", Bool(Some(false)), Calls, "`token_strs`: what each token stands for."),
    row("req_ids", Other("a list of request ids"), Calls, "What `/v1/abort_requests` ends: ids of requests or of their answers.").aliases(&["request_ids"]),
    row("abort_all", Bool(Some(false)), Calls, "It ends every request that runs here."),
    row("tokens", Other("a list of token ids"), Calls, "What `/detokenize` makes a text of."),
    row("prompts", Other("a list of objects with `model`, `prompt` and `max_tokens`"), Calls, "What `/api/v1/token_check` checks."),
    // Not supported, from here on, but for neutral values.
    unsupported("logprob_token_ids", Neutral::Empty, PROBABILITIES),
    unsupported("temp_scaled_logprobs", Neutral::Empty, PROBABILITIES),
    unsupported("top_p_normalized_logprobs", Neutral::Empty, PROBABILITIES),
    unsupported("include_draft_logprobs", Neutral::Empty, PROBABILITIES),
    unsupported("include_logprobs_decode_token", Neutral::Yes, PROBABILITIES),
    unsupported("return_logprob", Neutral::Empty, PROBABILITIES),
    unsupported("return_hidden_states", Neutral::Empty, PROBABILITIES),
    unsupported("use_beam_search", Neutral::Empty, SAMPLING),
    unsupported("num_beams", Neutral::Number(1.0), SAMPLING),
    unsupported("length_penalty", Neutral::Number(1.0), SAMPLING),
    unsupported("early_stopping", Neutral::Empty, SAMPLING),
    unsupported("allowed_token_ids", Neutral::Empty, SAMPLING),
    unsupported("logits_processors", Neutral::Empty, SAMPLING),
    unsupported("logits_processors_args", Neutral::Empty, SAMPLING),
    unsupported("no_repeat_ngram_size", Neutral::Number(0.0), SAMPLING),
    unsupported("typical_p", Neutral::Number(1.0), SAMPLING),
    unsupported("tfs_z", Neutral::Number(1.0), SAMPLING),
    unsupported("top_n_sigma", Neutral::Number(-1.0), SAMPLING),
    unsupported("dynatemp_range", Neutral::Number(0.0), SAMPLING),
    unsupported("mirostat", Neutral::Number(0.0), SAMPLING),
    unsupported("dry_multiplier", Neutral::Number(0.0), SAMPLING),
    unsupported("xtc_probability", Neutral::Number(0.0), SAMPLING),
    unsupported("stop_regex", Neutral::Empty, ENDING),
    unsupported("repetition_detection", Neutral::Empty, ENDING),
    unsupported("priority", Neutral::Number(0.0), ORDER),
    row("suffix", Other("a string, or an object"), All, "A string, in completions of models with tokens for [filling in the middle](api.md#filling-in-the-middle): what follows the answer; elsewhere it is refused. An object: the same as `metadata`, below it.").neutral(Neutral::Empty),
    unsupported("prompt_embeds", Neutral::Empty, PROMPT),
    unsupported("return_prompt_text", Neutral::Empty, PROMPT),
    unsupported("truncation_side", Neutral::Words(&["left"]), PROMPT),
    unsupported("modalities", Neutral::Words(&["text"]), MEDIA),
    unsupported("audio", Neutral::Empty, MEDIA),
    unsupported("image_data", Neutral::Empty, MEDIA),
    unsupported("video_data", Neutral::Empty, MEDIA),
    unsupported("audio_data", Neutral::Empty, MEDIA),
];

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;
    use crate::api::fields::dialect_tables::{MESSAGES, POOLING, RESPONSES};

    #[test]
    fn names_are_told_apart() {
        let mut names: Vec<&str> = FIELDS.iter().flat_map(|field| field.aliases.iter().copied().chain([field.name])).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    fn value(field: &FieldSpec) -> (String, String) {
        let default = |value: Option<String>| value.unwrap_or_else(|| "–".to_owned());
        match field.value {
            Bool(value) => ("true or false".to_owned(), default(value.map(|value| value.to_string()))),
            Integer { min, default: value } => (format!("an integer ≥ {min}"), default(value.map(|value| value.to_string()))),
            Number { min, max, default } => (format!("a number from {min} to {max}"), default.to_string()),
            Text => ("a string".to_owned(), default(None)),
            Object => ("an object".to_owned(), default(None)),
            TokenIds => ("a list of token ids".to_owned(), default(None)),
            Other(words) => (words.to_owned(), default(None)),
            Unsupported => unreachable!("{} has no value", field.name),
        }
    }

    fn passes(neutral: Neutral) -> String {
        match neutral {
            Neutral::Nothing => "`null`".to_owned(),
            Neutral::Empty => "empty, `false`".to_owned(),
            Neutral::Number(number) => format!("`{number}`"),
            Neutral::Words(words) if words == [""] => "an empty string".to_owned(),
            Neutral::Words(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
            Neutral::Yes => "`true`".to_owned(),
            Neutral::NoThinking => "empty, `{\"type\": \"disabled\"}`, `{\"enabled\": false}`, `{\"effort\": \"none\"}`".to_owned(),
        }
    }

    fn reference() -> String {
        let mut text = "# Fields of requests\n\nMade from the table in `src/api/fields/table.rs`; do not edit. `null` is the same as \
                        absent, and unknown fields are accepted.\n\n| Field | Value | Default | Where | What |\n|---|---|---|---|---|\n"
            .to_owned();
        for field in FIELDS.iter().filter(|field| !matches!(field.value, Unsupported)) {
            let (value, default) = value(field);
            let place = match field.taken_by {
                All => "everywhere",
                Chat => "chats",
                Completions => "completions",
                Jobs => "a job's own input",
                Infill => "`/infill`",
                TakenBy::Responses | TakenBy::Messages | TakenBy::Pooling => unreachable!("{} is in a table of its own", field.name),
                Calls => "calls that generate nothing",
            };
            let aliases: String = field.aliases.iter().map(|alias| format!(", `{alias}`")).collect();
            writeln!(text, "| `{}`{aliases} | {value} | {default} | {place} | {} |", field.name, field.doc).unwrap();
        }
        text += "\n## Refused\n\nThese would change the answer in a way that is not supported: any other value than those that pass is \
                 a 400 with the code `unsupported_parameter`.\n\n| Field | What passes | Belongs to |\n|---|---|---|\n";
        for field in FIELDS {
            if let Some(neutral) = field.neutral {
                let group = match (field.value, field.taken_by) {
                    (Unsupported, _) => field.doc,
                    (_, Chat) => "chats; see above",
                    _ => "see above",
                };
                writeln!(text, "| `{}` | {} | {group} |", field.name, passes(neutral)).unwrap();
            }
        }
        let others = "Fields of this route's own. All others are those of chats, under the same names.";
        for (route, table) in [("/v1/responses", RESPONSES), ("/v1/messages", MESSAGES)] {
            text += &of_route(&format!("`{route}`"), others, table);
        }
        text += &of_route("`/v1/embeddings`, `/v1/rerank`, `/v1/score`", "These routes take no others.", POOLING);
        text
    }

    fn of_route(route: &str, others: &str, table: &[FieldSpec]) -> String {
        let mut text = format!("\n## {route}\n\n{others}\n\n| Field | Value | What |\n|---|---|---|\n");
        for field in table {
            let (words, doc) = match (field.neutral, field.value) {
                (Some(neutral), Unsupported) => (passes(neutral), format!("Refused otherwise: {}.", field.doc)),
                (Some(neutral), _) => (passes(neutral), format!("Refused otherwise. {}", field.doc)),
                (None, _) => (value(field).0, field.doc.to_owned()),
            };
            writeln!(text, "| `{}` | {words} | {doc} |", field.name).unwrap();
        }
        text
    }

    /// `UPDATE_DOCS=1` writes the page anew.
    #[test]
    fn the_reference_page_is_true() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/fields.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, reference()).unwrap();
        }
        let page = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(page == reference(), "docs/fields.md is not what the table says: run this test with UPDATE_DOCS=1");
    }
}
