//! What a request says of tools, whatever dialect it is written in.

use serde_json::Value;

use super::table::{CallIds, ToolFormat};

/// The tools of a request and how they may be called.
#[derive(Debug, Clone)]
pub struct ToolRequest {
    pub tools: Vec<Tool>,
    pub choice: ToolChoice,
    /// An answer may hold several calls; otherwise only the first is told.
    pub parallel: bool,
    /// How the model writes calls. None: they are not looked for.
    pub format: Option<&'static ToolFormat>,
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    pub name: String,
    /// The JSON schema of its arguments; null where there is none.
    pub parameters: Value,
    /// Arguments are to keep to the schema.
    pub strict: bool,
    /// Where its function stands in the request.
    pub place: String,
    /// The whole object as the template gets it.
    pub definition: Value,
}

/// Whether a tool is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// The model decides.
    Auto,
    /// Text only.
    None,
    /// At least one of them.
    Required,
    /// This one.
    Named(String),
}

impl ToolRequest {
    /// The schema of a function's arguments; null for one that is not known.
    pub fn parameters(&self, name: &str) -> &Value {
        const UNKNOWN: &Value = &Value::Null;
        self.tools.iter().find(|tool| tool.name == name).map_or(UNKNOWN, |tool| &tool.parameters)
    }
}

/// A new id for a call.
pub fn call_id(ids: CallIds) -> String {
    match ids {
        CallIds::Nine => letters(9),
        CallIds::OpenAi | CallIds::Written => format!("call_{}", letters(24)),
    }
}

/// So many random letters and digits.
fn letters(count: usize) -> String {
    const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut random = [uuid::Uuid::new_v4().as_u128(), uuid::Uuid::new_v4().as_u128()];
    let letter = |place: usize| {
        // 16 letters of each: they take 96 of its 122 random bits.
        let random = &mut random[place / 16];
        let letter = LETTERS[(*random % 62) as usize];
        *random /= 62;
        char::from(letter)
    };
    (0..count).map(letter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_as_templates_want_them() {
        let (long, short) = (call_id(CallIds::OpenAi), call_id(CallIds::Nine));
        assert!(long.len() == 29 && long.starts_with("call_") && long[5..].chars().all(|c| c.is_ascii_alphanumeric()), "{long}");
        assert!(short.len() == 9 && short.chars().all(|c| c.is_ascii_alphanumeric()), "{short}");
        assert_ne!(long, call_id(CallIds::OpenAi));
    }
}
