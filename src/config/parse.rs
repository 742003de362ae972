//! Pure readers of values as typed.

use std::path::Path;

use serde_json::Value;

use super::{DeviceChoice, KvCacheDtype, PreparedCache, Quantization, Speculative};

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
    Some(each_once(words.iter().map(String::as_str)))
}

/// Models: a JSON list of strings, or separated by commas; what is there as a file or folder is one model, whatever its name.
pub fn models(value: &str) -> Option<Vec<String>> {
    let value = value.trim();
    if Path::new(value).exists() {
        return Some(vec![value.to_owned()]);
    }
    let words: Vec<String> =
        if value.starts_with('[') { serde_json::from_str(value).ok()? } else { value.split(',').map(str::to_owned).collect() };
    Some(each_once(words.iter().map(String::as_str)))
}

/// Words without white space around them, empty ones and doubles left out.
fn each_once<'a>(words: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut list: Vec<String> = Vec::new();
    for word in words.map(str::trim).filter(|word| !word.is_empty()) {
        if !list.iter().any(|known| known == word) {
            list.push(word.to_owned());
        }
    }
    list
}

/// FastDeploy's other strategies, and what they need that is not here.
const STRATEGIES: &[(&str, &str)] = &[
    ("wint2", "2-bit weights of a checkpoint made for it"),
    ("block_wise_fp8", "8-bit floats"),
    ("tensor_wise_fp8", "8-bit floats"),
    ("wfp8afp8", "8-bit floats, activations too"),
    ("w4afp8", "activations as 8-bit floats"),
    ("wfp4afp8", "activations as 8-bit floats"),
    ("w4a8", "activation scales of a checkpoint made for it"),
    ("w8a8", "activation scales of a checkpoint made for it"),
    ("mix_quant", "a strategy for each kind of layer"),
    ("mxfp4", "4-bit floats"),
    ("nvfp4", "4-bit floats"),
    ("compressed_tensors", "a checkpoint made for it"),
];

/// Where weights are kept prepared: `auto`, `off`, or a folder.
pub fn prepared_cache(value: &str) -> PreparedCache {
    match value.trim() {
        "auto" | "" => PreparedCache::Beside,
        word if ["off", "false", "none", "0"].contains(&word.to_ascii_lowercase().as_str()) => PreparedCache::Off,
        folder => PreparedCache::Folder(folder.into()),
    }
}

/// A strategy by FastDeploy's name, plain or as `{"quantization": …}`, in any case; what is wrong with it otherwise.
pub fn quantization(value: &str) -> Result<Quantization, String> {
    let object = value.trim_start().starts_with('{').then(|| serde_json::from_str::<Value>(value));
    let name = match object {
        None => value.trim().to_owned(),
        Some(Ok(Value::Object(object))) => match object.iter().find(|(key, value)| *key != "quantization" || !value.is_string()) {
            // Kinds of layers by themselves are mix_quant, with or without the name.
            Some((key, _)) if key.ends_with("_quant_type") => return Err(format!("mix_quant ({key}) is not supported here")),
            Some((key, _)) => return Err(format!("{key:?} in it is not supported here")),
            None => object.get("quantization").and_then(Value::as_str).unwrap_or_default().trim().to_owned(),
        },
        Some(_) => return Err("it begins like a JSON object and is not one".to_owned()),
    };
    match name.to_ascii_lowercase().as_str() {
        "bf16" | "bfloat16" | "none" | "" => Ok(Quantization::AsStored),
        "unquantized" => Ok(Quantization::Unquantized),
        "wint8" => Ok(Quantization::Wint8),
        "wint4" => Ok(Quantization::Wint4),
        lower => Err(match STRATEGIES.iter().find(|(known, _)| *known == lower) {
            Some((known, needs)) => format!("FastDeploy's {known} ({needs}) is not supported here"),
            None => format!("{name:?} is not supported here"),
        }),
    }
}

/// A type of the KV cache by vLLM's name or torch's, in any case; what is wrong with it otherwise.
pub fn kv_cache_dtype(value: &str) -> Result<KvCacheDtype, String> {
    let lower = value.trim().to_ascii_lowercase();
    match lower.as_str() {
        "auto" => Ok(KvCacheDtype::Auto),
        "float32" | "float" | "fp32" => Ok(KvCacheDtype::Float32),
        "float16" | "half" | "fp16" => Ok(KvCacheDtype::Float16),
        "bfloat16" | "bf16" => Ok(KvCacheDtype::Bfloat16),
        // vLLM's int8 has a scale for each token and head; ours has finer ones.
        "int8" | "int8_per_token_head" => Ok(KvCacheDtype::Int8),
        _ if lower.starts_with("fp8") => Err(format!("{value:?} (8-bit floats) is not held here; use int8, which takes as little")),
        _ => Err(format!("{value:?} is not possible; use one of auto, float32, float16, bfloat16, int8")),
    }
}

/// FastDeploy's and vLLM's form of `SPECULATIVE_CONFIG`; `None` for `{}`. Only prompt lookup is there, and no key is let pass unread.
pub fn speculative(value: &str) -> Result<Option<Speculative>, String> {
    let object = object(value)?;
    let given: Vec<_> = object.iter().filter(|(_, value)| !value.is_null()).collect();
    if given.is_empty() {
        return Ok(None);
    }
    let ngram = |value: &Value| matches!(value.as_str(), Some("ngram" | "[ngram]"));
    let mut method = false;
    let (mut tokens, mut most, mut least, mut max_rows) = (None, None, None, None);
    for (key, value) in given {
        let number = |range: std::ops::RangeInclusive<u64>| match value.as_u64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number as usize)),
            None => Err(format!("{key} {value} is not possible; use a whole number from {} to {}", range.start(), range.end())),
        };
        match key.as_str() {
            "method" if ngram(value) => method = true,
            "method" => return Err(format!("method {value} is not supported here; the only one is \"ngram\" (prompt lookup)")),
            // vLLM's older way to name the method.
            "model" if ngram(value) => method = true,
            "model" if value.as_str() == Some("") => {}
            "model" => return Err(format!("draft model {value} is not supported here; the only method is \"ngram\" (prompt lookup)")),
            "num_speculative_tokens" => tokens = number(1..=16)?,
            "prompt_lookup_max" | "max_ngram_size" => most = number(1..=32)?,
            "prompt_lookup_min" | "min_ngram_size" => least = number(1..=32)?,
            "disable_by_batch_size" => max_rows = number(1..=256)?,
            _ => return Err(format!("{key:?} in it is not known here")),
        }
    }
    if !method {
        return Err("has no method; write {\"method\":\"ngram\",\"num_speculative_tokens\":5}".to_owned());
    }
    let default = Speculative::default();
    let lookup_max = most.unwrap_or(default.lookup_max.max(least.unwrap_or(0)));
    let lookup_min = least.unwrap_or(default.lookup_min.min(lookup_max));
    if lookup_min > lookup_max {
        return Err(format!("prompt_lookup_min {lookup_min} is more than prompt_lookup_max {lookup_max}"));
    }
    let (tokens, max_rows) = (tokens.unwrap_or(default.tokens), max_rows.unwrap_or(default.max_rows));
    Ok(Some(Speculative { tokens, lookup_max, lookup_min, max_rows }))
}

/// A JSON object; what is wrong with it otherwise.
pub fn object(value: &str) -> Result<serde_json::Map<String, Value>, String> {
    serde_json::from_str(value).map_err(|error| format!("is not a JSON object: {error}"))
}

pub fn seed(value: &str) -> Result<u64, String> {
    value.parse().map_err(|_| format!("{value:?} is not a seed; use a whole number from 0 to {}", u64::MAX))
}

/// `auto`, `cpu`, `cuda` (also `gpu`) and `cuda:N`, in any case.
pub fn device(value: &str) -> Result<DeviceChoice, String> {
    let value = value.to_ascii_lowercase();
    match value.as_str() {
        "auto" => Ok(DeviceChoice::Auto),
        "cpu" => Ok(DeviceChoice::Cpu),
        "cuda" | "gpu" => Ok(DeviceChoice::Cuda(0)),
        other => match other.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
            Some(index) => Ok(DeviceChoice::Cuda(index)),
            None => Err(format!("{other:?} is not a device; use auto, cpu, cuda or cuda:N")),
        },
    }
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
    fn models_are_separated_by_commas_alone() {
        assert_eq!(models("demo").unwrap(), ["demo"]);
        assert_eq!(models(" a/b:Q4_K_M, /my models/x ,a/b:Q4_K_M,").unwrap(), ["a/b:Q4_K_M", "/my models/x"]);
        assert_eq!(models(r#"["a,b", "c"]"#).unwrap(), ["a,b", "c"]);
        assert_eq!((models("[a"), models(",").unwrap()), (None, Vec::new()));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("one, with a comma");
        std::fs::create_dir(&path).unwrap();
        assert_eq!(models(path.to_str().unwrap()).unwrap(), [path.to_str().unwrap()]);
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

    #[test]
    fn speculations() {
        let is = |tokens, lookup_max, lookup_min, max_rows| Ok(Some(Speculative { tokens, lookup_max, lookup_min, max_rows }));
        for (value, meaning) in [
            ("{}", Ok(None)),
            (r#"{"method": "ngram"}"#, is(5, 5, 2, 8)),
            (r#"{"method": "ngram", "num_speculative_tokens": 3, "model": null}"#, is(3, 5, 2, 8)),
            (r#"{"model": "[ngram]", "num_speculative_tokens": 4, "prompt_lookup_max": 1}"#, is(4, 1, 1, 8)),
            (r#"{"method": "ngram", "prompt_lookup_min": 7, "disable_by_batch_size": 2}"#, is(5, 7, 7, 2)),
            (r#"{"method": "ngram", "max_ngram_size": 4, "min_ngram_size": 3, "model": ""}"#, is(5, 4, 3, 8)),
        ] {
            assert_eq!(speculative(value), meaning, "{value}");
        }
        for (value, word) in [
            ("ngram", "JSON"),
            (r#"{"method": "mtp"}"#, "\"mtp\""),
            (r#"{"method": "ngram", "model": "small"}"#, "\"small\""),
            (r#"{"num_speculative_tokens": 3}"#, "no method"),
            (r#"{"method": "ngram", "num_speculative_tokens": 0}"#, "num_speculative_tokens 0"),
            (r#"{"method": "ngram", "num_speculative_tokens": "3"}"#, "num_speculative_tokens"),
            (r#"{"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3}"#, "prompt_lookup_min 3"),
            (r#"{"method": "ngram", "draft_tensor_parallel_size": 1}"#, "draft_tensor_parallel_size"),
        ] {
            let wrong = speculative(value).expect_err(value);
            assert!(wrong.contains(word), "{value}: {wrong}");
        }
    }

    #[test]
    fn quantizations() {
        for (value, meaning) in [
            ("BF16", Quantization::AsStored),
            ("bfloat16", Quantization::AsStored),
            ("none", Quantization::AsStored),
            ("wint8", Quantization::Wint8),
            (" WINT8 ", Quantization::Wint8),
            ("WInt4", Quantization::Wint4),
            (r#"{"quantization": "wint4"}"#, Quantization::Wint4),
            ("{}", Quantization::AsStored),
        ] {
            assert_eq!(quantization(value), Ok(meaning), "{value}");
        }
        for (value, word) in [
            ("wint2", "wint2 ("),
            ("W4A8", "w4a8 ("),
            ("awq", "\"awq\""),
            ("int8", "\"int8\""),
            (r#"{"quantization": "w4afp8"}"#, "w4afp8 ("),
            (r#"{"dense_quant_type": "wint8", "moe_quant_type": "wint4"}"#, "mix_quant"),
            (r#"{"quantization": "wint8", "is_checkpoint_bf16": true}"#, "is_checkpoint_bf16"),
            (r#"{"quantization": 8}"#, "quantization"),
            ("{wint8}", "JSON"),
        ] {
            let problem = quantization(value).expect_err(value);
            assert!(problem.contains(word), "{value}: {problem}");
        }
        for (name, _) in STRATEGIES {
            assert!(quantization(name).expect_err(name).contains(&format!("FastDeploy's {name} ")));
        }
    }

    #[test]
    fn types_of_the_kv_cache() {
        for (value, meaning) in [
            ("auto", KvCacheDtype::Auto),
            ("Float32", KvCacheDtype::Float32),
            ("half", KvCacheDtype::Float16),
            ("BF16", KvCacheDtype::Bfloat16),
            ("int8", KvCacheDtype::Int8),
            ("int8_per_token_head", KvCacheDtype::Int8),
        ] {
            assert_eq!(kv_cache_dtype(value), Ok(meaning), "{value}");
        }
        for value in ["fp8", "FP8_E4M3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla"] {
            assert!(kv_cache_dtype(value).expect_err(value).contains("use int8"), "{value}");
        }
        for value in ["", "int4", "nvfp4", "float64"] {
            assert!(kv_cache_dtype(value).expect_err(value).contains("float16, bfloat16, int8"), "{value}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(value in "\\PC*") {
            let _ = (kv_cache_dtype(&value), unset(&value), boolean(&value), count(&value), list(&value), quantization(&value));
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
