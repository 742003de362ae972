//! Pure readers of values as typed.

use serde_json::Value;

/// Not given, as platforms write it: empty, blanks, or `None`.
pub fn unset(value: &str) -> bool {
    matches!(value.trim(), "" | "None")
}

/// `true`, `1`, `yes`, `on` and `false`, `0`, `no`, `off`, in any case.
pub fn boolean(value: &str) -> Option<bool> {
    match value.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Some(true),
        "false" | "0" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// A whole number; `k`, `m`, `g` are thousands, `K`, `M`, `G` powers of 1024, as vLLM reads them. A fraction needs a suffix (`1.5k`).
pub fn count(value: &str) -> Option<usize> {
    let value = value.trim();
    let factor = match value.chars().last()? {
        'k' => 1e3,
        'm' => 1e6,
        'g' => 1e9,
        'K' => 1024.0,
        'M' => 1024.0 * 1024.0,
        'G' => 1024.0 * 1024.0 * 1024.0,
        // `4096.0` comes from forms that know no integers.
        _ => return value.parse().ok().or_else(|| value.strip_suffix(".0")?.parse().ok()),
    };
    let digits = &value[..value.len() - 1];
    let plain = digits.chars().all(|c| c.is_ascii_digit() || c == '.');
    let number = digits.parse::<f64>().ok().filter(|_| plain)? * factor;
    (number.fract() == 0.0 && number <= u32::MAX as f64 * 1024.0).then_some(number as usize)
}

/// Several words: a JSON list of strings, or separated by commas or white space. Doubles go.
pub fn list(value: &str) -> Option<Vec<String>> {
    let value = value.trim();
    let words: Vec<String> = if value.starts_with('[') {
        serde_json::from_str(value).ok()?
    } else {
        value.split(|c: char| c == ',' || c.is_whitespace()).map(str::to_owned).collect()
    };
    let mut list: Vec<String> = Vec::new();
    for word in words.iter().map(|word| word.trim()).filter(|word| !word.is_empty()) {
        if !list.iter().any(|known| known == word) {
            list.push(word.to_owned());
        }
    }
    Some(list)
}

/// A JSON value as an environment variable would spell it; `None` for null.
pub fn spelled(value: Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text),
        other => Some(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn words() {
        assert_eq!(list("a, b c\n\"d\"").unwrap(), ["a", "b", "c", "\"d\""]);
        assert_eq!(list(r#"["my model", "b", "b"]"#).unwrap(), ["my model", "b"]);
        assert_eq!(list("[a, b]"), None);
        assert_eq!(list(" , ").unwrap(), Vec::<String>::new());
    }

    #[test]
    fn counts() {
        assert_eq!(count("4k"), Some(4000));
        assert_eq!(count("4K"), Some(4096));
        assert_eq!(count("1.5k"), Some(1500));
        assert_eq!(count("4096.0"), Some(4096));
        for wrong in ["", "k", "-1", "1.5", "1.0001k", "1e3", "4 k!", "infk", "99999999999999G", "é"] {
            assert_eq!(count(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(value in "\\PC*") {
            let _ = (unset(&value), boolean(&value), count(&value), list(&value));
        }

        #[test]
        fn counts_round_trip(number in 0usize..1 << 40) {
            prop_assert_eq!(count(&number.to_string()), Some(number));
        }

        #[test]
        fn suffixes_multiply(number in 0usize..100_000) {
            prop_assert_eq!(count(&format!("{number}k")), Some(number * 1000));
            prop_assert_eq!(count(&format!("{number}K")), Some(number * 1024));
        }

        #[test]
        fn booleans_in_any_case(index in 0usize..8, upper in any::<u8>()) {
            let word = ["true", "1", "yes", "on", "false", "0", "no", "off"][index];
            let word: String =
                word.chars().enumerate().map(|(i, c)| if upper >> (i % 8) & 1 == 1 { c.to_ascii_uppercase() } else { c }).collect();
            prop_assert_eq!(boolean(&word), Some(index < 4));
        }

        #[test]
        fn lists_are_the_same_in_each_spelling(words in prop::collection::vec("[a-z0-9/._-]{1,12}", 0..6)) {
            let json = serde_json::to_string(&words).unwrap();
            prop_assert_eq!(list(&json), list(&words.join(",")));
            prop_assert_eq!(list(&json), list(&words.join(" \n")));
        }
    }
}
