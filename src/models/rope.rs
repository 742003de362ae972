//! Frequencies of rotary embeddings, with the ways of stretching them to longer contexts.

use std::f64::consts::PI;

use crate::kernels::RopeTable;
use crate::models::config::Config;

/// The table of `parameters` (an object such as `{"rope_type": "llama3", "factor": 8.0, …}`), for heads of which `width` components are rotated.
/// `theta` is the base.
///
/// # Errors
/// A kind that is not known, by key and value; a parameter that is missing.
pub fn table(parameters: Config<'_>, width: usize, theta: f64) -> Result<RopeTable, String> {
    let kind = kind(parameters)?;
    let plain: Vec<f64> = (0..width / 2).map(|i| 1.0 / theta.powf(2.0 * i as f64 / width as f64)).collect();
    let (frequencies, factor) = match kind {
        "default" => (plain, 1.0),
        "linear" => {
            let factor = needed(parameters, "factor")?;
            (plain.into_iter().map(|f| f / factor).collect(), 1.0)
        }
        "llama3" => (llama3(parameters, plain)?, 1.0),
        "yarn" => yarn(parameters, plain, width, theta)?,
        "proportional" => (proportional(parameters, width, theta)?, 1.0),
        // Within the context that the model was trained for; see `dynamic`.
        "dynamic" => (plain, 1.0),
        // Multimodal rotation: the positions of a text are the same in all of its sections.
        "mrope" => (plain, 1.0),
        "factors" => (divided(parameters, plain)?, 1.0),
        other => return Err(format!("\"rope_type\": rope scaling of type \"{other}\" is not supported")),
    };
    Ok(RopeTable { frequencies: frequencies.into_iter().map(|f| f as f32).collect(), factor: factor as f32 })
}

fn kind(parameters: Config<'_>) -> Result<&str, String> {
    match parameters.text("rope_type")? {
        Some(kind) => Ok(kind),
        None => Ok(parameters.text("type")?.unwrap_or("default")),
    }
}

/// The base grows with the length of the text (NTK by length).
pub fn is_dynamic(parameters: Config<'_>) -> Result<bool, String> {
    Ok(kind(parameters)? == "dynamic")
}

/// The table of `dynamic` for contexts beyond the original one, and the longest context that it is for. transformers makes a new table for every
/// length, to which keys in a cache cannot follow: as in vLLM there is one, that of the longest context.
pub fn dynamic(parameters: Config<'_>, width: usize, theta: f64, original: usize) -> Result<(RopeTable, usize), String> {
    let factor = needed(parameters, "factor")?;
    if factor < 1.0 || width < 4 {
        return Err(format!("\"factor\": {factor} is not possible for rope scaling of type \"dynamic\" of {width} components"));
    }
    let longest = (original as f64 * factor) as usize;
    let growth = factor * factor - (factor - 1.0);
    let base = theta * growth.powf(width as f64 / (width as f64 - 2.0));
    Ok((table(Config(&serde_json::Value::Null), width, base)?, longest))
}

/// LongRoPE, which has one table for contexts up to the original one and another beyond it. `su` is its older name.
pub fn is_long(parameters: Config<'_>) -> Result<bool, String> {
    Ok(matches!(kind(parameters)?, "longrope" | "su"))
}

/// A table of LongRoPE: each frequency is divided by its own entry of `factors`, a key of `parameters`. `contexts`: the original one, and the
/// longest.
pub fn long(
    parameters: Config<'_>,
    width: usize,
    theta: f64,
    contexts: (usize, usize),
    factors: &'static str,
) -> Result<RopeTable, String> {
    let list =
        parameters.0[factors].as_array().map(|list| list.iter().map(|factor| factor.as_f64().filter(|factor| *factor > 0.0)).collect());
    let divisors: Vec<f64> =
        list.flatten().ok_or_else(|| format!("\"{factors}\" must be a list of positive numbers, found {}", parameters.0[factors]))?;
    if divisors.len() != width / 2 {
        return Err(format!("\"{factors}\" has {} numbers for {} frequencies", divisors.len(), width / 2));
    }
    let frequency = |(i, divisor): (usize, &f64)| (1.0 / (divisor * theta.powf(2.0 * i as f64 / width as f64))) as f32;
    let (original, growth) = (contexts.0 as f64, contexts.1 as f64 / contexts.0 as f64);
    let sharper = if growth > 1.0 { (1.0 + growth.ln() / original.ln()).sqrt() } else { 1.0 };
    let factor = parameters.number("attention_factor")?.unwrap_or(sharper);
    Ok(RopeTable { frequencies: divisors.iter().enumerate().map(frequency).collect(), factor: factor as f32 })
}

fn needed(parameters: Config<'_>, key: &str) -> Result<f64, String> {
    parameters.number(key)?.ok_or_else(|| format!("\"{key}\" is missing from the rope parameters"))
}

/// Llama 3.1: long waves are stretched, short ones are not, and those between are blended.
fn llama3(parameters: Config<'_>, plain: Vec<f64>) -> Result<Vec<f64>, String> {
    let (factor, original) = (needed(parameters, "factor")?, needed(parameters, "original_max_position_embeddings")?);
    let (low, high) = (needed(parameters, "low_freq_factor")?, needed(parameters, "high_freq_factor")?);
    let stretched = |f: f64| {
        let wave = 2.0 * PI / f;
        if wave > original / low {
            return f / factor;
        }
        if wave < original / high {
            return f;
        }
        let smooth = (original / wave - low) / (high - low);
        (1.0 - smooth) * f / factor + smooth * f
    };
    Ok(plain.into_iter().map(stretched).collect())
}

/// YaRN: a ramp between stretched and plain frequencies, and sharper attention.
fn yarn(parameters: Config<'_>, plain: Vec<f64>, width: usize, theta: f64) -> Result<(Vec<f64>, f64), String> {
    let (factor, original) = (needed(parameters, "factor")?, needed(parameters, "original_max_position_embeddings")?);
    let (fast, slow) = (parameters.number("beta_fast")?.unwrap_or(32.0), parameters.number("beta_slow")?.unwrap_or(1.0));
    let width = width as f64;
    let place = |rotations: f64| width * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (place(fast), place(slow));
    if parameters.flag("truncate")?.unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(width - 1.0));
    if low == high {
        high += 0.001;
    }
    let blend = |(i, f): (usize, f64)| {
        let keep = 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        f / factor * (1.0 - keep) + f * keep
    };
    let sharper = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let attention = match (parameters.number("attention_factor")?, parameters.number("mscale")?, parameters.number("mscale_all_dim")?) {
        (Some(given), ..) => given,
        (None, Some(scale), Some(all)) => sharper(scale) / sharper(all),
        _ => sharper(1.0),
    };
    Ok((plain.into_iter().enumerate().map(blend).collect(), attention))
}

/// Gemma 4: the first pairs turn as in a full head, the others not at all.
fn proportional(parameters: Config<'_>, width: usize, theta: f64) -> Result<Vec<f64>, String> {
    let share = parameters.number("partial_rotary_factor")?.unwrap_or(1.0);
    let turning = (share * width as f64 / 2.0) as usize;
    let frequency = |i: usize| if i < turning { 1.0 / theta.powf(2.0 * i as f64 / width as f64) } else { 0.0 };
    Ok((0..width / 2).map(frequency).collect())
}

/// GGUF files of Llama 3: a divisor for each frequency, in which all stretching is already.
fn divided(parameters: Config<'_>, plain: Vec<f64>) -> Result<Vec<f64>, String> {
    let wrong = || format!("\"factors\" must be {} positive numbers", plain.len());
    let factors = parameters.0["factors"].as_array().filter(|factors| factors.len() == plain.len()).ok_or_else(wrong)?;
    let divide = |(f, factor): (&f64, &serde_json::Value)| Some(f / factor.as_f64().filter(|factor| *factor > 0.0)?);
    plain.iter().zip(factors).map(divide).collect::<Option<_>>().ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(parameters: serde_json::Value) -> Result<RopeTable, String> {
        table(Config(&parameters), 8, 10_000.0)
    }

    #[test]
    fn tables_by_numbers() {
        let plain = of(json!({})).unwrap();
        assert_eq!(plain.frequencies, [1.0, 0.1, 0.01, 0.001]);
        assert_eq!(of(json!({"type": "linear", "factor": 4.0})).unwrap().frequencies, [0.25, 0.025, 0.0025, 0.00025]);
        let llama = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
        let llama = of(llama).unwrap().frequencies;
        assert_eq!((llama[0], llama[2], llama[3]), (1.0, 0.00125, 0.000125));
        assert!(llama[1] > 0.0125 && llama[1] < 0.1, "{llama:?}");
        let yarn = of(json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})).unwrap();
        assert!((yarn.factor - 1.138_629_4).abs() < 1e-6, "{}", yarn.factor);
        let divided = of(json!({"rope_type": "factors", "factors": [1, 1, 2.0, 4.0]})).unwrap();
        assert_eq!(divided.frequencies, [1.0, 0.1, 0.005, 0.00025]);
        let part = of(json!({"rope_type": "proportional", "partial_rotary_factor": 0.5})).unwrap();
        assert_eq!(part.frequencies, [1.0, 0.1, 0.0, 0.0]);
    }

    /// transformers' own numbers for a text of 64 tokens and for one of 256.
    #[test]
    fn dynamic_tables_are_those_of_the_shortest_and_the_longest_text() {
        let parameters = json!({"rope_type": "dynamic", "factor": 4.0});
        assert_eq!(of(parameters.clone()).unwrap().frequencies, [1.0, 0.1, 0.01, 0.001]);
        let (long, longest) = dynamic(Config(&parameters), 8, 10_000.0, 64).unwrap();
        assert_eq!((longest, long.factor), (256, 1.0));
        for (got, want) in long.frequencies.iter().zip([1.0f32, 0.042_529_035, 0.001_808_718_9, 7.692_307_6e-5]) {
            assert!((got - want).abs() < 1e-6 * want, "{got} {want}");
        }
        assert!(dynamic(Config(&json!({"factor": 0.5})), 8, 1e4, 64).unwrap_err().contains("\"factor\": 0.5"));
    }

    #[test]
    fn what_is_not_known_is_named() {
        assert!(of(json!({"rope_type": "xpos"})).unwrap_err().contains("\"xpos\""));
        assert!(of(json!({"rope_type": "llama3", "factor": 8.0})).unwrap_err().contains("original_max_position_embeddings"));
        assert!(of(json!({"rope_type": "factors", "factors": [1, 0, 1, 1]})).unwrap_err().contains("4 positive numbers"));
        assert!(of(json!({"type": 5})).unwrap_err().contains("\"type\" must be a string"));
    }
}
