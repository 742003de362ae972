//! Writing Lark.

use serde_json::Value;

/// A literal of Lark.
pub fn lark_string(text: &str) -> String {
    // Lark takes JSON's strings but for this one character.
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}
