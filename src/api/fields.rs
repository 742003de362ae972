//! Checked reading of a request's JSON fields: types, ranges, and errors that name the field as the caller wrote it.
//!
//! `null` is the same as absent. Unknown fields are accepted. Known ones that would change the output and are not supported are
//! refused by name ([`refuse_unsupported`]), never ignored.

use serde_json::{Map, Value};

use crate::error::Failure;

/// Layers of fields, the first of which wins: a request's top level, then `sampling_params`, then `metadata`.
pub struct Fields<'a> {
    layers: Vec<Layer<'a>>,
}

struct Layer<'a> {
    /// How the caller addressed it: empty, or `sampling_params.`.
    prefix: &'static str,
    object: &'a Map<String, Value>,
    /// OpenAI's own `metadata` holds strings only: they are labels, not parameters.
    skip_strings: bool,
}

/// A field that is there, with its full name.
pub struct Field<'a> {
    pub name: String,
    pub value: &'a Value,
}

impl<'a> Fields<'a> {
    /// The body of a request.
    pub fn new(body: &'a Value) -> Result<Self, Failure> {
        let Value::Object(object) = body else {
            return Err(Failure::bad_request("body", format!("The request body must be a JSON object, but it is {}.", kind(body))));
        };
        let mut fields = Self { layers: vec![Layer { prefix: "", object, skip_strings: false }] };
        fields.add_layer("sampling_params", "sampling_params.", false)?;
        // FastDeploy merges `metadata` (and on completions `suffix`, when it is an object) below the explicit fields.
        fields.add_layer("metadata", "metadata.", true)?;
        if matches!(object.get("suffix"), Some(Value::Object(_))) {
            fields.add_layer("suffix", "suffix.", true)?;
        }
        Ok(fields)
    }

    fn add_layer(&mut self, name: &str, prefix: &'static str, skip_strings: bool) -> Result<(), Failure> {
        let Some(field) = self.get(name) else { return Ok(()) };
        let Value::Object(object) = field.value else { return Err(wrong_type(&field, "an object")) };
        self.layers.push(Layer { prefix, object, skip_strings });
        Ok(())
    }

    /// The first layer's value that is not null, under this name or another one that means the same.
    pub fn get(&self, name: &str) -> Option<Field<'a>> {
        let others = ALIASES.iter().filter(|(_, of)| *of == name).map(|(alias, _)| *alias);
        let names = std::iter::once(name).chain(others);
        self.layers.iter().find_map(|layer| {
            names.clone().find_map(|name| {
                let value = layer.object.get(name)?;
                let skipped = value.is_null() || (layer.skip_strings && value.is_string());
                (!skipped).then(|| Field { name: format!("{}{name}", layer.prefix), value })
            })
        })
    }

    pub fn bool(&self, name: &str) -> Result<Option<bool>, Failure> {
        self.get(name).map(|field| field.value.as_bool().ok_or_else(|| wrong_type(&field, "true or false"))).transpose()
    }

    pub fn string(&self, name: &str) -> Result<Option<&'a str>, Failure> {
        self.get(name).map(|field| field.value.as_str().ok_or_else(|| wrong_type(&field, "a string"))).transpose()
    }

    pub fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, Failure> {
        self.get(name).map(|field| field.value.as_object().ok_or_else(|| wrong_type(&field, "an object"))).transpose()
    }

    /// A finite number in `[min, max]`.
    pub fn number(&self, name: &str, min: f64, max: f64) -> Result<Option<f64>, Failure> {
        let Some(field) = self.get(name) else { return Ok(None) };
        let number = field.value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| wrong_type(&field, "a number"))?;
        if number < min {
            return Err(below(&field, min));
        }
        if number > max {
            return Err(above(&field, max));
        }
        Ok(Some(number))
    }

    /// A whole number of at least `min`; one too large for 64 bits counts as the largest. `16.0` is a whole number too.
    pub fn integer(&self, name: &str, min: i64) -> Result<Option<i64>, Failure> {
        let Some(field) = self.get(name) else { return Ok(None) };
        let number = whole(field.value).ok_or_else(|| wrong_type(&field, "an integer"))?;
        if number < min {
            return Err(below(&field, min as f64));
        }
        Ok(Some(number))
    }

    /// The same as a count.
    pub fn count(&self, name: &str, min: u32) -> Result<Option<usize>, Failure> {
        let number = self.integer(name, i64::from(min))?;
        Ok(number.map(|number| usize::try_from(number).unwrap_or(usize::MAX)))
    }

    /// Any 64-bit integer, signed or not.
    pub fn seed(&self) -> Result<Option<u64>, Failure> {
        let Some(field) = self.get("seed") else { return Ok(None) };
        if let Some(seed) = field.value.as_u64() {
            return Ok(Some(seed));
        }
        match field.value {
            Value::Number(number) if number.as_i64().is_some() => Ok(number.as_i64().map(i64::cast_unsigned)),
            // 2^53: up to here a float stands for one whole number.
            Value::Number(number) if number.as_f64().is_some_and(|n| n.fract() == 0.0 && n.abs() <= 9_007_199_254_740_992.0) => {
                Ok(whole(field.value).map(i64::cast_unsigned))
            }
            Value::Number(number) => Err(invalid(&field, format!("{number} is not a 64-bit integer - '{}'", field.name))),
            _ => Err(wrong_type(&field, "an integer")),
        }
    }

    /// Token ids, each below `vocab_size`.
    pub fn token_ids(&self, name: &str, vocab_size: usize) -> Result<Option<Vec<u32>>, Failure> {
        self.get(name).map(|field| token_ids(&field, vocab_size)).transpose()
    }

    /// `stop` and its other names: one string or several, up to 16 in all.
    pub fn stop(&self) -> Result<Vec<String>, Failure> {
        const MOST: usize = 16;
        const LONGEST: usize = 16 * 1024;
        let mut stops: Vec<String> = Vec::new();
        for field in ["stop", "stop_sequences", "stop_strings"].into_iter().filter_map(|name| self.get(name)) {
            let given = match field.value {
                Value::Array(list) => list.iter().map(Value::as_str).collect::<Option<Vec<_>>>(),
                value => value.as_str().map(|stop| vec![stop]),
            };
            let given = given.ok_or_else(|| {
                let message = format!("{} is not valid under any of the given schemas - '{}'", field.value, field.name);
                Failure::bad_request(&field.name, message)
            })?;
            stops.extend(given.into_iter().map(str::to_owned));
            if stops.len() > MOST {
                return Err(invalid(&field, format!("'{}' holds {} strings, more than the maximum of {MOST}.", field.name, stops.len())));
            }
            if let Some(long) = stops.iter().find(|stop| stop.len() > LONGEST) {
                let message = format!("'{}' holds a string of {} bytes, more than the maximum of {LONGEST}.", field.name, long.len());
                return Err(invalid(&field, message));
            }
            if stops.iter().any(String::is_empty) {
                return Err(invalid(&field, format!("'{}' holds an empty string, which would end every answer at once.", field.name)));
            }
        }
        Ok(stops)
    }

    /// `bad_words`, and `bad_words_token_ids` or `suppress_tokens`, as token sequences: each word as it is cut at the start of a text and
    /// after a space.
    pub fn bad_words(&self, vocab_size: usize, encode: impl Fn(&str) -> Result<Vec<u32>, Failure>) -> Result<Vec<Vec<u32>>, Failure> {
        const MOST: usize = 128;
        const LONGEST: usize = 1024;
        let mut sequences = Vec::new();
        for name in ["bad_words_token_ids", "suppress_tokens"] {
            sequences.extend(self.token_ids(name, vocab_size)?.unwrap_or_default().into_iter().map(|id| vec![id]));
        }
        if let Some(field) = self.get("bad_words") {
            let list = field.value.as_array().ok_or_else(|| wrong_type(&field, "a list of strings"))?;
            if list.len() > MOST {
                return Err(invalid(&field, format!("'{}' holds {} words, more than the maximum of {MOST}.", field.name, list.len())));
            }
            for (position, value) in list.iter().enumerate() {
                let entry = Field { name: format!("{}[{position}]", field.name), value };
                let word = value.as_str().ok_or_else(|| wrong_type(&entry, "a string"))?.trim_start();
                if word.len() > LONGEST {
                    let message = format!("'{}' has {} bytes, more than the maximum of {LONGEST}.", entry.name, word.len());
                    return Err(invalid(&entry, message));
                }
                if word.is_empty() {
                    return Err(invalid(&entry, format!("'{}' is empty, so there is no word to keep out.", entry.name)));
                }
                sequences.push(encode(word)?);
                sequences.push(encode(&format!(" {word}"))?);
            }
        }
        sequences.retain(|sequence| !sequence.is_empty());
        sequences.sort_unstable();
        sequences.dedup();
        Ok(sequences)
    }

    /// `logit_bias`: token ids, as strings, to biases in [-100, 100].
    pub fn logit_bias(&self, vocab_size: usize) -> Result<Vec<(u32, f32)>, Failure> {
        let Some(field) = self.get("logit_bias") else { return Ok(Vec::new()) };
        let object = field.value.as_object().ok_or_else(|| wrong_type(&field, "an object of token ids to numbers"))?;
        let mut biases = Vec::with_capacity(object.len());
        for (key, value) in object {
            let entry = Field { name: format!("{}.{key}", field.name), value };
            let id = key.trim().parse::<u32>().ok().filter(|id| (*id as usize) < vocab_size);
            let id = id.ok_or_else(|| {
                invalid(
                    &entry,
                    format!(
                        "'{key}' is not a token id of this model, which has the ids 0 to {} - '{}'",
                        vocab_size.saturating_sub(1),
                        field.name
                    ),
                )
            })?;
            let bias = value.as_f64().ok_or_else(|| wrong_type(&entry, "a number"))?;
            if bias < -100.0 {
                return Err(below(&entry, -100.0));
            }
            if bias > 100.0 {
                return Err(above(&entry, 100.0));
            }
            biases.push((id, bias as f32));
        }
        Ok(biases)
    }
}

/// A list of token ids, each below `vocab_size`.
pub fn token_ids(field: &Field<'_>, vocab_size: usize) -> Result<Vec<u32>, Failure> {
    let list = field.value.as_array().ok_or_else(|| wrong_type(field, "a list of token ids"))?;
    let mut ids = Vec::with_capacity(list.len());
    for (position, value) in list.iter().enumerate() {
        let entry = Field { name: format!("{}[{position}]", field.name), value };
        let id = whole(value).ok_or_else(|| wrong_type(&entry, "a token id"))?;
        match u32::try_from(id).ok().filter(|id| (*id as usize) < vocab_size) {
            Some(id) => ids.push(id),
            None => {
                let message = format!(
                    "{id} is not a token id of this model, which has the ids 0 to {} - '{}'",
                    vocab_size.saturating_sub(1),
                    entry.name
                );
                return Err(invalid(&entry, message));
            }
        }
    }
    Ok(ids)
}

/// A JSON number without a fraction; beyond 64 bits the nearest end.
fn whole(value: &Value) -> Option<i64> {
    let Value::Number(number) = value else { return None };
    if let Some(number) = number.as_i64() {
        return Some(number);
    }
    // NOTE: `as` saturates.
    number.as_f64().filter(|number| number.is_finite() && number.fract() == 0.0).map(|number| number as i64)
}

/// What a JSON value is, for messages.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

pub fn wrong_type(field: &Field<'_>, expected: &str) -> Failure {
    let found = match field.value {
        Value::Number(number) => format!("the number {number}"),
        other => kind(other).to_owned(),
    };
    Failure::bad_request(&field.name, format!("'{}' must be {expected}, but it is {found}.", field.name))
}

pub fn missing(name: &str, message: impl Into<String>) -> Failure {
    Failure::bad_request(name, message).code("missing_required_parameter")
}

pub fn invalid(field: &Field<'_>, message: impl Into<String>) -> Failure {
    Failure::bad_request(&field.name, message).code("invalid_value")
}

fn below(field: &Field<'_>, min: f64) -> Failure {
    invalid(field, format!("{} is less than the minimum of {min} - '{}'", field.value, field.name))
}

fn above(field: &Field<'_>, max: f64) -> Failure {
    invalid(field, format!("{} is greater than the maximum of {max} - '{}'", field.value, field.name))
}

/// Other servers' names of fields, and the name that is used here.
const ALIASES: &[(&str, &str)] = &[("repeat_penalty", "repetition_penalty"), ("min_new_tokens", "min_tokens")];

/// Which values of an unsupported field change nothing and may pass.
#[derive(Clone, Copy)]
enum Neutral {
    /// None but null.
    Nothing,
    /// Empty list, object or string, and `false`.
    Empty,
    Number(f64),
    /// One of these words, or empty.
    Words(&'static [&'static str]),
    /// `{"type": "text"}`.
    TextFormat,
    /// `true`.
    Yes,
    /// Empty, or a wish not to think ([`is_thinking_off`]), which the template is told.
    NoThinking,
}

/// Fields that other servers honour and that would change the answer. Everything else that is unknown is accepted.
const UNSUPPORTED: &[(&str, Neutral)] = &[
    // Tools.
    ("tools", Neutral::Empty),
    ("tool_choice", Neutral::Words(&["none", "auto"])),
    ("functions", Neutral::Empty),
    ("function_call", Neutral::Words(&["none", "auto"])),
    // Structured output, under all its names.
    ("response_format", Neutral::TextFormat),
    ("structured_outputs", Neutral::Empty),
    ("structural_tag", Neutral::Empty),
    // An empty schema still asks for JSON.
    ("guided_json", Neutral::Words(&[""])),
    ("guided_json_object", Neutral::Empty),
    ("guided_regex", Neutral::Empty),
    ("guided_choice", Neutral::Empty),
    ("guided_grammar", Neutral::Empty),
    ("guided_decoding", Neutral::Empty),
    ("grammar", Neutral::Empty),
    ("json_schema", Neutral::Words(&[""])),
    ("regex", Neutral::Empty),
    ("ebnf", Neutral::Empty),
    // Probabilities.
    ("logprob_token_ids", Neutral::Empty),
    ("temp_scaled_logprobs", Neutral::Empty),
    ("top_p_normalized_logprobs", Neutral::Empty),
    ("include_draft_logprobs", Neutral::Empty),
    ("include_logprobs_decode_token", Neutral::Yes),
    ("return_logprob", Neutral::Empty),
    ("n_probs", Neutral::Number(0.0)),
    ("return_hidden_states", Neutral::Empty),
    // Other ways to draw.
    ("use_beam_search", Neutral::Empty),
    ("num_beams", Neutral::Number(1.0)),
    ("length_penalty", Neutral::Number(1.0)),
    ("early_stopping", Neutral::Empty),
    ("allowed_token_ids", Neutral::Empty),
    ("logits_processors", Neutral::Empty),
    ("logits_processors_args", Neutral::Empty),
    ("no_repeat_ngram_size", Neutral::Number(0.0)),
    ("typical_p", Neutral::Number(1.0)),
    ("tfs_z", Neutral::Number(1.0)),
    ("top_n_sigma", Neutral::Number(-1.0)),
    ("dynatemp_range", Neutral::Number(0.0)),
    ("mirostat", Neutral::Number(0.0)),
    ("dry_multiplier", Neutral::Number(0.0)),
    ("xtc_probability", Neutral::Number(0.0)),
    // Other ways to end.
    ("stop_regex", Neutral::Empty),
    ("repetition_detection", Neutral::Empty),
    // The order of requests.
    ("priority", Neutral::Number(0.0)),
    // Thinking apart from the answer, and its budgets.
    ("include_reasoning", Neutral::Yes),
    ("separate_reasoning", Neutral::Empty),
    ("reasoning_format", Neutral::Words(&["none", "auto"])),
    ("thinking", Neutral::NoThinking),
    ("reasoning", Neutral::NoThinking),
    ("thinking_budget", Neutral::Number(-1.0)),
    ("reasoning_budget", Neutral::Number(-1.0)),
    ("reasoning_max_tokens", Neutral::Nothing),
    ("response_max_tokens", Neutral::Nothing),
    ("thinking_token_budget", Neutral::Nothing),
    ("thinking_budget_tokens", Neutral::Nothing),
    // The prompt and its return.
    ("suffix", Neutral::Empty),
    ("prompt_embeds", Neutral::Empty),
    ("completion_token_ids", Neutral::Empty),
    ("disable_chat_template", Neutral::Empty),
    ("return_prompt_text", Neutral::Empty),
    ("truncation_side", Neutral::Words(&["left"])),
    // Other media.
    ("modalities", Neutral::Words(&["text"])),
    ("audio", Neutral::Empty),
    ("image_data", Neutral::Empty),
    ("video_data", Neutral::Empty),
    ("audio_data", Neutral::Empty),
];

/// Refuses each known field that would change the output and is not supported.
pub fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), Failure> {
    // Then they are only text for the chat template.
    let tools_are_text = fields.get("tool_choice").is_some_and(|field| field.value == "none");
    for (name, neutral) in UNSUPPORTED {
        let Some(field) = fields.get(name) else { continue };
        if (*name == "suffix" && field.value.is_object()) || (*name == "tools" && tools_are_text) {
            continue;
        }
        if !passes(field.value, *neutral) {
            return Err(unsupported(&field.name));
        }
    }
    let of_template = fields.object("chat_template_kwargs")?.and_then(|object| object.get("tools"));
    match of_template.is_some_and(|tools| !tools_are_text && !passes(tools, Neutral::Empty)) {
        true => Err(unsupported("chat_template_kwargs.tools")),
        false => Ok(()),
    }
}

/// The refusal of a field that would change the output.
pub fn unsupported(name: &str) -> Failure {
    let message = format!("'{name}' is not supported by this server. Remove it, or leave it at its default.");
    Failure::bad_request(name, message).code("unsupported_parameter")
}

fn passes(value: &Value, neutral: Neutral) -> bool {
    let empty = match value {
        Value::Bool(flag) => !flag,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        Value::Null => true,
        Value::Number(_) => false,
    };
    match neutral {
        Neutral::Nothing => false,
        Neutral::Empty => empty,
        Neutral::Number(number) => value.as_f64() == Some(number),
        Neutral::Words(words) => match value {
            Value::String(word) => words.contains(&word.as_str()),
            Value::Array(list) => list.iter().all(|word| word.as_str().is_some_and(|word| words.contains(&word))),
            _ => false,
        },
        Neutral::TextFormat => value.get("type").and_then(Value::as_str) == Some("text"),
        Neutral::Yes => value == &Value::Bool(true),
        Neutral::NoThinking => empty || is_thinking_off(value),
    }
}

/// `thinking` and `reasoning` in the forms that switch it off: `false`, `{"type": "disabled"}`, `{"enabled": false}`, `{"effort": "none"}`.
pub fn is_thinking_off(value: &Value) -> bool {
    match value {
        Value::Bool(flag) => !flag,
        Value::Object(object) => {
            let mut given = object.iter().filter(|(_, value)| !value.is_null()).peekable();
            let off = |name: &str, value: &Value| match name {
                "type" => value == "disabled",
                "enabled" => value == &Value::Bool(false),
                "effort" => value == "none",
                _ => false,
            };
            given.peek().is_some() && given.all(|(name, value)| off(name, value))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(result: Result<impl std::fmt::Debug, Failure>) -> (String, String) {
        let failure = result.unwrap_err();
        (failure.param.clone().unwrap(), failure.message)
    }

    #[test]
    fn ranges_at_their_ends_and_one_past() {
        for (value, fine) in
            [(json!(0), true), (json!(-0.0), true), (json!(2), true), (json!(2.0001), false), (json!(-0.1), false), (json!(1e300), false)]
        {
            let body = json!({"temperature": value});
            assert_eq!(Fields::new(&body).unwrap().number("temperature", 0.0, 2.0).is_ok(), fine, "{body}");
        }
        let body = json!({"temperature": 2.5, "max_tokens": 0});
        let fields = Fields::new(&body).unwrap();
        assert_eq!(message(fields.number("temperature", 0.0, 2.0)).1, "2.5 is greater than the maximum of 2 - 'temperature'");
        assert_eq!(message(fields.count("max_tokens", 1)).1, "0 is less than the minimum of 1 - 'max_tokens'");
    }

    #[test]
    fn types_are_not_guessed() {
        let body = json!({"temperature": "0.5", "max_tokens": 1.5, "stream": "yes", "n": true, "stop": 5, "seed": "x"});
        let fields = Fields::new(&body).unwrap();
        assert_eq!(message(fields.number("temperature", 0.0, 2.0)).1, "'temperature' must be a number, but it is a string.");
        assert_eq!(message(fields.count("max_tokens", 1)).1, "'max_tokens' must be an integer, but it is the number 1.5.");
        assert!(fields.bool("stream").is_err());
        assert!(fields.count("n", 1).is_err());
        assert!(fields.stop().is_err());
        assert!(fields.seed().is_err());
    }

    #[test]
    fn null_is_absent_and_whole_floats_and_huge_numbers_are_integers() {
        let body = json!({"temperature": null, "max_tokens": 16.0, "min_tokens": 1e30});
        let fields = Fields::new(&body).unwrap();
        assert_eq!(fields.number("temperature", 0.0, 2.0).unwrap(), None);
        assert_eq!(fields.count("max_tokens", 1).unwrap(), Some(16));
        assert_eq!(fields.count("min_tokens", 0).unwrap(), Some(i64::MAX as usize));
    }

    #[test]
    fn seeds_are_any_64_bit_integer() {
        for (value, seed) in
            [(json!(0), 0), (json!(-1), u64::MAX), (json!(u64::MAX), u64::MAX), (json!(i64::MIN), 1 << 63), (json!(5.0), 5)]
        {
            let body = json!({"seed": value});
            assert_eq!(Fields::new(&body).unwrap().seed().unwrap(), Some(seed));
        }
        for value in [json!(1.5), json!(1e30), json!("1")] {
            let body = json!({"seed": value});
            assert!(Fields::new(&body).unwrap().seed().is_err());
        }
    }

    #[test]
    fn layers_top_level_then_sampling_params_then_metadata() {
        let body = json!({
            "temperature": 1, "top_p": null,
            "sampling_params": {"temperature": 2, "top_p": 0.5, "top_k": -7},
            "metadata": {"top_p": 0.1, "min_tokens": 3, "seed": "a label"},
        });
        let fields = Fields::new(&body).unwrap();
        assert_eq!(fields.number("temperature", 0.0, 2.0).unwrap(), Some(1.0));
        assert_eq!(fields.number("top_p", 0.0, 1.0).unwrap(), Some(0.5));
        assert_eq!(fields.count("min_tokens", 0).unwrap(), Some(3));
        assert_eq!(fields.seed().unwrap(), None, "strings in metadata are the user's own labels");
        assert_eq!(message(fields.integer("top_k", -1)).0, "sampling_params.top_k");
    }

    #[test]
    fn other_names_of_a_field_work_in_every_layer() {
        let body = json!({"repeat_penalty": 1.2, "sampling_params": {"min_new_tokens": 3, "repetition_penalty": 1.5}});
        let fields = Fields::new(&body).unwrap();
        assert_eq!(fields.number("repetition_penalty", 0.0, 2.0).unwrap(), Some(1.2), "the layer counts before the spelling");
        assert_eq!(fields.count("min_tokens", 0).unwrap(), Some(3));
        assert_eq!(message(fields.number("repetition_penalty", 0.0, 1.0)).0, "repeat_penalty", "as the caller wrote it");
        let body = json!({"min_tokens": null, "min_new_tokens": 3});
        assert_eq!(Fields::new(&body).unwrap().count("min_tokens", 0).unwrap(), Some(3));
        let body = json!({"stop": [], "stop_sequences": ["a", "b"], "stop_strings": "c"});
        assert_eq!(Fields::new(&body).unwrap().stop().unwrap(), ["a", "b", "c"]);
        let body = json!({"stop": vec!["x"; 16], "stop_sequences": ["a"]});
        assert_eq!(message(Fields::new(&body).unwrap().stop()).0, "stop_sequences");
        let body = json!({"suppress_tokens": [4], "bad_words_token_ids": [3]});
        assert_eq!(Fields::new(&body).unwrap().bad_words(5, |_| Ok(Vec::new())).unwrap(), [[3], [4]]);
        let body = json!({"suppress_tokens": [5]});
        assert_eq!(message(Fields::new(&body).unwrap().bad_words(5, |_| Ok(Vec::new()))).0, "suppress_tokens[0]");
    }

    #[test]
    fn stops_and_biases() {
        let body = json!({"stop": ["a", ""], "logit_bias": {"5": 100, "9": -101}});
        let fields = Fields::new(&body).unwrap();
        assert!(message(fields.stop()).1.contains("empty string"));
        assert_eq!(message(fields.logit_bias(10)).0, "logit_bias.9");
        assert_eq!(message(fields.logit_bias(5)).0, "logit_bias.5", "unknown id");
        let body = json!({"stop": vec!["x"; 17]});
        assert!(Fields::new(&body).unwrap().stop().is_err());
        let body = json!({"stop": "x", "logit_bias": {"5": -100}});
        let fields = Fields::new(&body).unwrap();
        assert_eq!(fields.stop().unwrap(), ["x"]);
        assert_eq!(fields.logit_bias(6).unwrap(), [(5, -100.0)]);
        let body = json!({"stop": ["x".repeat(16 * 1024 + 1)], "bad_words": ["x".repeat(1025)]});
        let fields = Fields::new(&body).unwrap();
        assert!(message(fields.stop()).1.contains("a string of 16385 bytes"));
        assert_eq!(message(fields.bad_words(5, |_| Ok(vec![1]))).0, "bad_words[0]");
    }

    #[test]
    fn unsupported_fields_are_refused_by_name_and_neutral_values_pass() {
        let refused = [
            json!({"tools": [{"type": "function"}]}),
            json!({"tool_choice": "required"}),
            json!({"response_format": {"type": "json_object"}}),
            json!({"guided_regex": "a+"}),
            json!({"grammar": "root ::= 'a'"}),
            json!({"json_schema": "{}"}),
            json!({"logprob_token_ids": [3]}),
            json!({"temp_scaled_logprobs": true}),
            json!({"include_logprobs_decode_token": false}),
            json!({"suffix": "x"}),
            json!({"use_beam_search": true}),
            json!({"priority": 1}),
            json!({"priority": -5}),
            json!({"priority": "high"}),
            json!({"modalities": ["text", "audio"]}),
            json!({"sampling_params": {"allowed_token_ids": [1]}}),
            json!({"metadata": {"reasoning_max_tokens": 5}}),
            json!({"num_beams": 4}),
            json!({"repetition_detection": {"max_pattern_size": 4}}),
            json!({"thinking_budget": 100}),
            json!({"include_reasoning": false}),
            json!({"separate_reasoning": true}),
            json!({"thinking": {"type": "enabled", "budget_tokens": 1024}}),
            json!({"thinking": {"type": "disabled", "display": "omitted"}}),
            json!({"reasoning": {"effort": "high"}}),
            json!({"reasoning": true}),
            json!({"tools": [{"type": "function"}], "tool_choice": "auto"}),
        ];
        for body in refused {
            let fields = Fields::new(&body).unwrap();
            let failure = refuse_unsupported(&fields).unwrap_err();
            assert_eq!(failure.code, Some("unsupported_parameter"), "{body}");
            assert!(body.to_string().contains(failure.param.unwrap().rsplit('.').next().unwrap()));
        }
        let neutral = json!({
            "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "include_logprobs_decode_token": true, "suffix": null, "use_beam_search": false, "modalities": ["text"], "guided_json": null, "length_penalty": 1.0, "priority": 0,
            "parallel_tool_calls": true, "user": "me", "something_new": {"a": 1}, "store": true, "verbosity": "low",
            "num_beams": 1, "repetition_detection": {}, "thinking_budget": -1, "include_reasoning": true, "separate_reasoning": false,
            "thinking": {"type": "disabled"}, "reasoning": {"effort": "none", "summary": null},
        });
        assert!(refuse_unsupported(&Fields::new(&neutral).unwrap()).is_ok());
    }

    #[test]
    fn tools_pass_when_they_are_only_text_for_the_template() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        for (body, param) in [
            (json!({"tools": tools, "tool_choice": "none"}), None),
            (json!({"tools": tools, "tool_choice": null}), Some("tools")),
            (json!({"chat_template_kwargs": {"tools": tools}, "tool_choice": "none"}), None),
            (json!({"chat_template_kwargs": {"tools": []}}), None),
            (json!({"chat_template_kwargs": {"tools": tools}}), Some("chat_template_kwargs.tools")),
        ] {
            let refused = refuse_unsupported(&Fields::new(&body).unwrap()).err();
            assert_eq!(refused.and_then(|failure| failure.param).as_deref(), param, "{body}");
        }
    }
}
