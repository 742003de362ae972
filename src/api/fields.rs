//! Checked reading of a request's JSON fields: types, ranges, and errors that name the field as the caller wrote it. Which fields there
//! are, and what each may hold, is in [`table`].
//!
//! `null` is the same as absent. Unknown fields are accepted. Known ones that would change the output and are not supported are
//! refused by name (`refuse`), never ignored.

use serde_json::{Map, Value};

use crate::api::fields::table::{FieldSpec, ValueSpec};
use crate::error::Failure;

pub mod dialect_tables;
pub mod refuse;
pub mod rows;
pub mod table;

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
        let names = std::iter::once(name).chain(spec(name).map_or(&[][..], |spec| spec.aliases).iter().copied());
        self.layers.iter().find_map(|layer| {
            names.clone().find_map(|name| {
                let value = layer.object.get(name)?;
                let skipped = value.is_null() || (layer.skip_strings && value.is_string());
                (!skipped).then(|| Field { name: format!("{}{name}", layer.prefix), value })
            })
        })
    }

    /// A switch that is the table's default where it is absent.
    pub fn flag(&self, name: &str) -> Result<bool, Failure> {
        let default = matches!(spec(name).map(|spec| spec.value), Some(ValueSpec::Bool(Some(true))));
        Ok(self.bool(name)?.unwrap_or(default))
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

    /// A finite number within the table's bounds.
    pub fn number(&self, name: &str) -> Result<Option<f64>, Failure> {
        let ValueSpec::Number { min, .. } = value_spec(name)? else { return Err(misread(name)) };
        self.number_from(name, min)
    }

    /// The same with another lower bound than the table's.
    pub fn number_from(&self, name: &str, min: f64) -> Result<Option<f64>, Failure> {
        let ValueSpec::Number { max, .. } = value_spec(name)? else { return Err(misread(name)) };
        self.number_within(name, min, max)
    }

    /// The same with both bounds other than the table's.
    pub fn number_within(&self, name: &str, min: f64, max: f64) -> Result<Option<f64>, Failure> {
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

    /// A whole number of at least the table's minimum; one too large for 64 bits counts as the largest. `16.0` is a whole number too.
    pub fn integer(&self, name: &str) -> Result<Option<i64>, Failure> {
        let ValueSpec::Integer { min, .. } = value_spec(name)? else { return Err(misread(name)) };
        self.integer_from(name, min)
    }

    /// The same with another lower bound than the table's.
    pub fn integer_from(&self, name: &str, min: i64) -> Result<Option<i64>, Failure> {
        let Some(field) = self.get(name) else { return Ok(None) };
        let number = whole(field.value).ok_or_else(|| wrong_type(&field, "an integer"))?;
        if number < min {
            return Err(below(&field, min as f64));
        }
        Ok(Some(number))
    }

    /// [`Fields::integer`] as a count.
    pub fn count(&self, name: &str) -> Result<Option<usize>, Failure> {
        Ok(self.integer(name)?.map(as_count))
    }

    /// The same, with the table's default where it is absent.
    pub fn count_or_default(&self, name: &str) -> Result<usize, Failure> {
        Ok(self.count(name)?.unwrap_or_else(|| as_count(default_integer(name))))
    }

    /// [`Fields::integer_from`] as a count.
    pub fn count_from(&self, name: &str, min: u32) -> Result<Option<usize>, Failure> {
        Ok(self.integer_from(name, i64::from(min))?.map(as_count))
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

    /// `stop` and its other names: one string or several, up to `most` in all.
    pub fn stop(&self, most: usize) -> Result<Vec<String>, Failure> {
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
            if stops.len() > most {
                let message =
                    format!("'{}' holds {} strings, more than the maximum of {most} (MAX_STOP_STRINGS).", field.name, stops.len());
                return Err(invalid(&field, message));
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

/// The row of a field that is read; there is none only by a mistake of ours.
fn spec(name: &str) -> Option<&'static FieldSpec> {
    let spec = table::find(name);
    debug_assert!(spec.is_some(), "the table of fields lacks '{name}'");
    spec
}

/// The table's default of a number.
pub fn default_of(name: &str) -> f64 {
    match spec(name).map(|spec| spec.value) {
        Some(ValueSpec::Number { default, .. }) => default,
        _ => 0.0,
    }
}

/// The table's default of a whole number.
pub fn default_integer(name: &str) -> i64 {
    match spec(name).map(|spec| spec.value) {
        Some(ValueSpec::Integer { default: Some(default), .. }) => default,
        _ => 0,
    }
}

/// What a number may be.
fn value_spec(name: &str) -> Result<ValueSpec, Failure> {
    spec(name).map(|spec| spec.value).ok_or_else(|| misread(name))
}

fn misread(name: &str) -> Failure {
    debug_assert!(false, "the table of fields has another type for '{name}'");
    Failure::internal(format!("'{name}' could not be read."))
}

fn as_count(number: i64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
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
pub fn whole(value: &Value) -> Option<i64> {
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

pub fn below(field: &Field<'_>, min: f64) -> Failure {
    invalid(field, format!("{} is less than the minimum of {min} - '{}'", field.value, field.name))
}

fn above(field: &Field<'_>, max: f64) -> Failure {
    invalid(field, format!("{} is greater than the maximum of {max} - '{}'", field.value, field.name))
}

#[cfg(test)]
mod tests;
