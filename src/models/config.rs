//! Reading config.json: a value of the wrong type is an error that names key and value, and never a default; the model would load and
//! give wrong answers.

use serde_json::Value;

/// A config.json, or an object inside one.
#[derive(Debug, Clone, Copy)]
pub struct Config<'a>(pub &'a Value);

impl<'a> Config<'a> {
    pub fn has(self, key: &str) -> bool {
        !self.0[key].is_null()
    }

    /// The key is not there at all: a null may mean something else.
    pub fn is_absent(self, key: &str) -> bool {
        self.0.get(key).is_none()
    }

    /// A number above zero; `None` where the key is absent or null.
    pub fn number(self, key: &str) -> Result<Option<f64>, String> {
        match &self.0[key] {
            Value::Null => Ok(None),
            value => match value.as_f64().filter(|number| *number > 0.0) {
                Some(number) => Ok(Some(number)),
                None => Err(format!("\"{key}\" must be a positive number, found {value}")),
            },
        }
    }

    pub fn flag(self, key: &str) -> Result<Option<bool>, String> {
        match &self.0[key] {
            Value::Null => Ok(None),
            Value::Bool(flag) => Ok(Some(*flag)),
            value => Err(format!("\"{key}\" must be true or false, found {value}")),
        }
    }

    pub fn text(self, key: &str) -> Result<Option<&'a str>, String> {
        match &self.0[key] {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text)),
            value => Err(format!("\"{key}\" must be a string, found {value}")),
        }
    }

    /// An object that may be absent: empty then.
    pub fn object(self, key: &str) -> Result<Config<'a>, String> {
        match &self.0[key] {
            value @ (Value::Null | Value::Object(_)) => Ok(Config(value)),
            value => Err(format!("\"{key}\" must be an object, found {value}")),
        }
    }

    /// A list of strings; `None` where the key is absent or null.
    pub fn texts(self, key: &str) -> Result<Option<Vec<&'a str>>, String> {
        let wrong = || format!("\"{key}\" must be a list of strings, found {}", self.0[key]);
        match &self.0[key] {
            Value::Null => Ok(None),
            Value::Array(list) => list.iter().map(|value| value.as_str().ok_or_else(wrong)).collect::<Result<_, _>>().map(Some),
            _ => Err(wrong()),
        }
    }

    /// A list of numbers, none below zero; empty where the key is absent or null.
    pub fn numbers(self, key: &str) -> Result<Vec<f64>, String> {
        let wrong = || format!("\"{key}\" must be a list of numbers, found {}", self.0[key]);
        match &self.0[key] {
            Value::Null => Ok(Vec::new()),
            Value::Array(list) => list.iter().map(|value| value.as_f64().filter(|number| *number >= 0.0).ok_or_else(wrong)).collect(),
            _ => Err(wrong()),
        }
    }

    /// A list of whole numbers; empty where the key is absent or null.
    pub fn integers(self, key: &str) -> Result<Vec<u64>, String> {
        let wrong = || format!("\"{key}\" must be a list of integers, found {}", self.0[key]);
        match &self.0[key] {
            Value::Null => Ok(Vec::new()),
            Value::Array(list) => list.iter().map(|value| value.as_u64().ok_or_else(wrong)).collect(),
            _ => Err(wrong()),
        }
    }

    /// A whole number above zero, or the default where the key is absent or null.
    pub fn size(self, key: &str, default: Option<u64>) -> Result<usize, String> {
        match self.0[key].as_u64().filter(|n| *n > 0).or(if self.has(key) { None } else { default }) {
            Some(n) => Ok(n as usize),
            None if self.has(key) => Err(format!("\"{key}\" must be a positive integer, found {}", self.0[key])),
            None => Err(format!("\"{key}\" is missing")),
        }
    }

    /// A whole number, zero included; `None` where the key is absent or null.
    pub fn count(self, key: &str) -> Result<Option<usize>, String> {
        match &self.0[key] {
            Value::Null => Ok(None),
            value => value.as_u64().map(|n| Some(n as usize)).ok_or_else(|| format!("\"{key}\" must be an integer, found {value}")),
        }
    }

    pub fn is_empty(self) -> bool {
        self.0.as_object().is_none_or(serde_json::Map::is_empty)
    }

    /// What says how the positions of a type of layer are rotated: `rope_scaling`, which older versions wrote, wins over `rope_parameters` as in
    /// transformers 5. Either may hold one such object for each type of layer.
    pub fn rope_parameters(self, layer_type: &str) -> Result<Config<'a>, String> {
        let scaling = self.object("rope_scaling")?;
        let parameters = if scaling.is_empty() { self.object("rope_parameters")? } else { scaling };
        let Some(map) = parameters.0.as_object().filter(|map| !map.is_empty() && map.values().any(Value::is_object)) else {
            return Ok(parameters);
        };
        match map.get(layer_type).or(map.values().next().filter(|_| map.len() == 1)) {
            Some(parameters) => Ok(Config(parameters)),
            None => {
                let types = map.keys().cloned().collect::<Vec<_>>().join(", ");
                Err(format!("\"rope_parameters\" has entries for layers of the types {types}, and none for {layer_type}"))
            }
        }
    }
}
