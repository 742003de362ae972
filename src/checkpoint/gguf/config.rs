//! A GGUF file's metadata as the JSON files of a Hugging Face folder, so that everything behind reads one form.

use std::collections::HashSet;

use serde_json::{Map, Value as Json, json};

use super::architectures::{Architecture, KEYS};
use super::header::{Header, Value};

/// Control tokens that end an answer wherever they are in a vocabulary: many files name one end where the model has several.
const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Metadata that names one token, and that token's role in tokenizer_config.json.
const ROLES: &[(&str, &str)] = &[
    ("tokenizer.ggml.bos_token_id", "bos_token"),
    ("tokenizer.ggml.eos_token_id", "eos_token"),
    ("tokenizer.ggml.unknown_token_id", "unk_token"),
    ("tokenizer.ggml.padding_token_id", "pad_token"),
    // Filling in the middle: the older names first, which the newer ones overrule.
    ("tokenizer.ggml.prefix_token_id", "prefix_token"),
    ("tokenizer.ggml.suffix_token_id", "suffix_token"),
    ("tokenizer.ggml.middle_token_id", "middle_token"),
    ("tokenizer.ggml.fim_pre_token_id", "prefix_token"),
    ("tokenizer.ggml.fim_suf_token_id", "suffix_token"),
    ("tokenizer.ggml.fim_mid_token_id", "middle_token"),
    ("tokenizer.ggml.fim_rep_token_id", "fim_repository_token"),
    ("tokenizer.ggml.fim_sep_token_id", "fim_file_token"),
];

/// Sampling that the file recommends, and its names in generation_config.json.
const SAMPLING: &[(&str, &str)] = &[
    ("general.sampling.temp", "temperature"),
    ("general.sampling.top_k", "top_k"),
    ("general.sampling.top_p", "top_p"),
    ("general.sampling.min_p", "min_p"),
    ("general.sampling.penalty_repeat", "repetition_penalty"),
];

/// Pre-tokenizers whose texts begin with the beginning-of-sequence token, where the file does not say so.
const WITH_BOS: &[&str] = &["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "tekken"];

/// More layers, and more components of a head, than any model has: such a file is damaged, and not worth tables of that size.
const MOST_LAYERS: u64 = 4_096;
const WIDEST_HEAD: u64 = 65_536;

/// A token of the vocabulary that text is not made of.
const CONTROL: u64 = 3;

/// `config.json`. `file`: the whole file, of which the factors of rope frequencies are read.
pub fn model(header: &Header<'_>, file: &[u8]) -> Result<Json, String> {
    let architecture = Architecture::of(header)?;
    let name = architecture.name;
    let mut config = Map::new();
    config.insert("model_type".into(), json!(architecture.model_type));
    for (theirs, ours) in KEYS.iter().chain(architecture.keys) {
        if architecture.without_heads.is_some() && *theirs == "attention.head_count_kv" {
            continue;
        }
        if let Some(value) = scalar(header, &format!("{name}.{theirs}"))? {
            config.insert((*ours).to_owned(), value);
        }
    }
    config.extend(architecture.fixed.iter().map(|(key, value)| ((*key).to_owned(), json!(value))));
    // Heads that predict further tokens are counted as layers.
    let layers = needed(header, &format!("{name}.block_count"))?;
    let layers = layers.saturating_sub(header.integer(&format!("{name}.nextn_predict_layers"))?.unwrap_or(0));
    if layers > MOST_LAYERS {
        return Err(format!("metadata \"{name}.block_count\" is {layers}, more than any model has"));
    }
    config.insert("num_hidden_layers".into(), json!(layers));
    for key in ["attention.head_count", "feed_forward_length"] {
        needed(header, &format!("{name}.{key}"))?;
    }
    if let Some(other) = architecture.without_heads {
        layers_without_heads(header, name, other, &mut config)?;
    }
    match name {
        "deepseek2" => latent(header, name, &mut config)?,
        "bert" | "modern-bert" => encoder(header, name, &mut config)?,
        _ => {}
    }
    let embedding = header.tensor("token_embd.weight").ok_or("tensor token_embd.weight is missing")?;
    if embedding.shape.get(1).map(|width| *width as u64) != Some(needed(header, &format!("{name}.embedding_length"))?) {
        return Err(format!("metadata \"{name}.embedding_length\" is not the width of token_embd.weight ({:?})", embedding.shape));
    }
    config.insert("vocab_size".into(), json!(embedding.shape.first()));
    config.insert("tie_word_embeddings".into(), json!(header.tensor("output.weight").is_none()));
    biases(header, &mut config);
    shapes(header, layers, &mut config);
    windows(header, name, layers, &mut config)?;
    gemma(name, layers, &mut config);
    if let Some(scaling) = rope_scaling(header, name, file)? {
        config.insert("rope_scaling".into(), scaling);
    }
    config.insert("gguf".into(), json!({"interleaved": architecture.interleaved}));
    refuse_odd(header, name, &config)?;
    Ok(Json::Object(config))
}

fn needed(header: &Header<'_>, key: &str) -> Result<u64, String> {
    match scalar(header, key)? {
        Some(value) => value
            .as_u64()
            .filter(|number| *number > 0)
            .ok_or_else(|| format!("metadata \"{key}\" must be a positive integer, found {value}")),
        None => Err(format!("metadata \"{key}\" is missing")),
    }
}

/// A value; an array counts where all its values are the same.
fn scalar(header: &Header<'_>, key: &str) -> Result<Option<Json>, String> {
    let single = |value: Value<'_>| match value {
        Value::Unsigned(number) => Ok(json!(number)),
        Value::Signed(number) => Ok(json!(number)),
        Value::Float(number) if number.is_finite() => Ok(json!(number)),
        Value::Float(number) => Err(format!("metadata \"{key}\" is {number}")),
        Value::Bool(flag) => Ok(json!(flag)),
        Value::Text(text) => Ok(json!(text)),
        Value::Array(_) => Err(format!("metadata \"{key}\" is an array of arrays")),
    };
    match header.get(key) {
        None => Ok(None),
        Some(Value::Array(array)) => {
            let mut values = array.iter();
            let first = values.next().ok_or_else(|| format!("metadata \"{key}\" is an empty array"))?;
            if values.any(|value| value != first) {
                return Err(format!("metadata \"{key}\" differs from layer to layer, which is not supported"));
            }
            single(first).map(Some)
        }
        Some(value) => single(value).map(Some),
    }
}

/// Which projections have a bias: the metadata does not say, the tensors do.
fn biases(header: &Header<'_>, config: &mut Map<String, Json>) {
    let has = |names: &[&str]| names.iter().any(|name| header.tensor(name).is_some());
    let attention = has(&["blk.0.attn_q.bias", "blk.0.attn_qkv.bias"]);
    for (key, flag) in [
        ("attention_bias", attention),
        ("use_bias", attention),
        ("attention_out_bias", has(&["blk.0.attn_output.bias"])),
        ("mlp_bias", has(&["blk.0.ffn_up.bias", "blk.0.ffn_down.bias"])),
        ("use_qk_norm", has(&["blk.0.attn_q_norm.weight"])),
    ] {
        config.insert(key.to_owned(), json!(flag));
    }
}

/// What only the tensors tell: the width of a head where no key says it, and which layers have no experts.
fn shapes(header: &Header<'_>, layers: u64, config: &mut Map<String, Json>) {
    let rows = header.tensor("blk.0.attn_q.weight").and_then(|tensor| tensor.shape.first().copied());
    let heads = config.get("num_attention_heads").and_then(Json::as_u64);
    if let (None, Some(rows), Some(heads)) = (config.get("head_dim"), rows, heads) {
        config.insert("head_dim".into(), json!(rows as u64 / heads.max(1)));
    }
    let routers: HashSet<&str> = header.tensors.iter().filter_map(|tensor| tensor.name.strip_suffix(".ffn_gate_inp.weight")).collect();
    if !routers.is_empty() {
        // The header was read whole: it has at least one tensor for each layer, or the model is refused for the first that is missing.
        let layers = layers.min(header.tensors.len() as u64);
        let dense: Vec<u64> = (0..layers).filter(|layer| !routers.contains(format!("blk.{layer}").as_str())).collect();
        config.insert("mlp_only_layers".into(), json!(dense));
    }
}

/// Which layers have no key/value heads: those of another type.
fn layers_without_heads(header: &Header<'_>, name: &str, other: &str, config: &mut Map<String, Json>) -> Result<(), String> {
    let key = format!("{name}.attention.head_count_kv");
    let wrong = || format!("metadata \"{key}\" must hold a number for each layer");
    let heads: Option<Vec<u64>> = header.array(&key)?.ok_or_else(wrong)?.iter().map(Value::integer).collect();
    let heads = heads.ok_or_else(wrong)?;
    let some: Vec<u64> = heads.iter().copied().filter(|heads| *heads > 0).collect();
    if some.windows(2).any(|pair| pair[0] != pair[1]) {
        return Err(format!("metadata \"{key}\" differs between layers of attention, which is not supported"));
    }
    config.insert("num_key_value_heads".into(), json!(some.first()));
    let kind = |heads: &u64| if *heads > 0 { "full_attention" } else { other };
    config.insert("layer_types".into(), json!(heads.iter().map(kind).collect::<Vec<_>>()));
    config.insert("conv_bias".into(), json!(header.tensors.iter().any(|tensor| tensor.name.ends_with("shortconv.conv.bias"))));
    Ok(())
}

/// DeepSeek 2 and 3, which have one name: the older's experts are by softmax. Widths of keys and values are those of the one head that is
/// cached, and what heads have stands beside them.
fn latent(header: &Header<'_>, name: &str, config: &mut Map<String, Json>) -> Result<(), String> {
    config.remove("head_dim");
    let rope = needed(header, &format!("{name}.rope.dimension_count"))?;
    // Files from before keys and values were cached as one vector have the heads' own widths.
    let (keys, values) = (format!("{name}.attention.key_length_mla"), format!("{name}.attention.value_length_mla"));
    let (keys, values) = match header.get(&keys) {
        Some(_) => (keys, values),
        None => (format!("{name}.attention.key_length"), format!("{name}.attention.value_length")),
    };
    let nope = needed(header, &keys)?.checked_sub(rope).ok_or_else(|| format!("metadata \"{keys}\" is less than what is rotated"))?;
    config.insert("qk_nope_head_dim".into(), json!(nope));
    config.insert("v_head_dim".into(), json!(needed(header, &values)?));
    // Some converters leave the number out, and the tensors tell.
    let layers = needed(header, &format!("{name}.block_count"))?.min(MOST_LAYERS);
    let first = (0..layers).position(|layer| header.tensor(&format!("blk.{layer}.ffn_gate_inp.weight")).is_some());
    config.insert("first_k_dense_replace".into(), json!(first.map_or(layers, |first| first as u64)));
    const SIGMOID: u64 = 2;
    let shifts_choice = header.tensors.iter().any(|tensor| tensor.name.ends_with(".exp_probs_b.bias"));
    let is_newer = shifts_choice || header.integer(&format!("{name}.expert_gating_func"))? == Some(SIGMOID);
    let normalizes = header.flag(&format!("{name}.expert_weights_norm"))?.unwrap_or(false);
    config.insert("norm_topk_prob".into(), json!(normalizes));
    if !is_newer {
        config.insert("model_type".into(), json!("deepseek_v2"));
        let groups = header.integer(&format!("{name}.expert_group_count"))?.unwrap_or(1);
        config.insert("topk_method".into(), json!(if groups > 1 { "group_limited_greedy" } else { "greedy" }));
    }
    Ok(())
}

/// Types of tokens, and what scores: told by the tensors.
fn encoder(header: &Header<'_>, name: &str, config: &mut Map<String, Json>) -> Result<(), String> {
    let rows = |tensor: &str| header.tensor(tensor).and_then(|tensor| tensor.shape.first().copied());
    config.insert("type_vocab_size".into(), json!(rows("token_types.weight").unwrap_or(0)));
    config.insert("norm_bias".into(), json!(header.tensor("output_norm.bias").is_some()));
    let Some(labels) = rows("cls.output.weight") else { return Ok(()) };
    if header.tensor("cls.weight").is_none() {
        return Err("tensor cls.output.weight is there without cls.weight: the converter left out what stands before the score".to_owned());
    }
    if name == "bert" {
        config.insert("model_type".into(), json!("xlm-roberta"));
    }
    config.insert("num_labels".into(), json!(labels));
    config.insert("architectures".into(), json!(["ForSequenceClassification"]));
    let pooling = header.integer(&format!("{name}.classifier.pooling_type"))?;
    config.insert("classifier_pooling".into(), json!(if pooling == Some(1) { "mean" } else { "cls" }));
    config.insert("classifier_bias".into(), json!(header.tensor("cls.bias").is_some()));
    Ok(())
}

/// The files of Sentence Transformers: how rows are pooled, where the metadata says it. llama.cpp makes vectors of length 1.
pub fn modules(header: &Header<'_>) -> Result<Option<[(&'static str, Json); 2]>, String> {
    let name = Architecture::of(header)?.name;
    let key = format!("{name}.pooling_type");
    let mode = match header.integer(&key)? {
        Some(1) => "mean",
        Some(2) => "cls",
        Some(3) => "lasttoken",
        // None, or what scores.
        None | Some(0 | 4) => return Ok(None),
        Some(other) => return Err(format!("metadata \"{key}\" is {other}, which is not known")),
    };
    let module = |kind: &str, path: &str| json!({"type": format!("sentence_transformers.models.{kind}"), "path": path});
    let modules = json!([module("Transformer", ""), module("Pooling", "1_Pooling"), module("Normalize", "2_Normalize")]);
    Ok(Some([("modules.json", modules), ("1_Pooling/config.json", json!({"pooling_mode": mode}))]))
}

/// Which layers see a window only.
fn windows(header: &Header<'_>, name: &str, layers: u64, config: &mut Map<String, Json>) -> Result<(), String> {
    // Gemma 2 has windows whether its file says so or not.
    if !config.contains_key("sliding_window") && name != "gemma2" {
        config.insert("sliding_window".into(), json!(0));
    }
    let key = format!("{name}.attention.sliding_window_pattern");
    match header.get(&key) {
        None => {}
        Some(Value::Array(pattern)) => {
            let kind = |value| match value {
                Value::Bool(false) => Ok("full_attention"),
                Value::Bool(true) => Ok("sliding_attention"),
                _ => Err(format!("metadata \"{key}\" must hold booleans")),
            };
            let types = pattern.iter().take(layers as usize).map(kind).collect::<Result<Vec<_>, _>>()?;
            config.insert("layer_types".into(), json!(types));
        }
        Some(value) => {
            let nth = value.integer().ok_or_else(|| format!("metadata \"{key}\" must be a whole number or an array"))?;
            config.insert("sliding_window_pattern".into(), json!(nth));
        }
    }
    Ok(())
}

/// What llama.cpp knows of Gemma by heart: the scale of scores, and the base of layers with a window.
fn gemma(name: &str, layers: u64, config: &mut Map<String, Json>) {
    let number = |key: &str| config.get(key).and_then(Json::as_u64);
    let per_head = number("hidden_size").zip(number("num_attention_heads")).map(|(hidden, heads)| hidden / heads.max(1));
    let largest = matches!((name, layers), ("gemma2", 46) | ("gemma3", 62));
    let scale = if largest { per_head } else { number("head_dim").or(per_head) };
    if matches!(name, "gemma2" | "gemma3") {
        config.insert("query_pre_attn_scalar".into(), json!(scale));
    }
    if name == "gemma3" && !config.contains_key("rope_local_base_freq") {
        config.insert("rope_local_base_freq".into(), json!(10_000.0));
    }
}

fn rope_scaling(header: &Header<'_>, name: &str, file: &[u8]) -> Result<Option<Json>, String> {
    let get = |key: &str| scalar(header, &format!("{name}.rope.scaling.{key}"));
    let kind = header.text(&format!("{name}.rope.scaling.type"))?.filter(|kind| *kind != "none");
    // The oldest files had one number for it.
    let factor = match get("factor")? {
        Some(factor) => Some(factor),
        None => scalar(header, &format!("{name}.rope.scale_linear"))?,
    };
    if let Some(factors) = header.tensor("rope_freqs.weight") {
        if let Some(kind) = kind {
            return Err(format!("rope scaling of type \"{kind}\" beside a tensor rope_freqs.weight is not supported"));
        }
        let bytes =
            file.get(factors.range.clone()).filter(|_| factors.kind.name() == "F32").ok_or("tensor rope_freqs.weight must be F32")?;
        let factors: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        return Ok(Some(json!({"rope_type": "factors", "factors": factors})));
    }
    if header.tensor("rope_factors_long.weight").is_some() || kind == Some("longrope") {
        return Ok(Some(json!({"rope_type": "longrope"})));
    }
    let Some(kind) = kind.or(factor.is_some().then_some("linear")) else { return Ok(None) };
    let mut scaling = Map::from_iter([("rope_type".to_owned(), json!(kind))]);
    let length = header.integer(&format!("{name}.context_length"))?;
    let rows = [
        ("factor", factor),
        ("original_max_position_embeddings", get("original_context_length")?.or(length.map(|length| json!(length)))),
        ("attention_factor", get("yarn_attn_factor")?),
        ("beta_fast", get("yarn_beta_fast")?),
        ("beta_slow", get("yarn_beta_slow")?),
        ("llama_4_scaling_beta", scalar(header, &format!("{name}.attention.temperature_scale"))?),
    ];
    scaling.extend(rows.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))));
    if let Some(all) = get("yarn_log_multiplier")?.and_then(|all| all.as_f64()).filter(|all| *all > 0.0) {
        // The converter writes a tenth of it for DeepSeek, where both are the same.
        let (mscale, all) = if name == "deepseek2" { ((all * 10.0) as f32, (all * 10.0) as f32) } else { (1.0, all as f32) };
        scaling.insert("mscale".into(), json!(mscale));
        scaling.insert("mscale_all_dim".into(), json!(all));
    }
    if name == "gpt-oss" {
        scaling.insert("truncate".into(), json!(false));
    }
    Ok(Some(Json::Object(scaling)))
}

/// What would change the numbers and is not computed.
fn refuse_odd(header: &Header<'_>, name: &str, config: &Map<String, Json>) -> Result<(), String> {
    let value_length = scalar(header, &format!("{name}.attention.value_length"))?;
    if let (Some(keys), Some(values)) = (config.get("head_dim"), &value_length)
        && keys != values
        && !config.contains_key("kv_lora_rank")
    {
        return Err(format!("metadata \"{name}.attention.value_length\" is {values}, and keys have {keys}: both must be the same"));
    }
    if let Some(width) = config.get("head_dim").and_then(Json::as_u64).filter(|width| *width > WIDEST_HEAD) {
        return Err(format!("metadata \"{name}.attention.key_length\" is {width}, more than any model has"));
    }
    let sections = header.array(&format!("{name}.rope.dimension_sections"))?;
    if sections.is_some_and(|sections| sections.iter().any(|section| section.number() != Some(0.0))) {
        return Err(format!("metadata \"{name}.rope.dimension_sections\": positions of several dimensions are not supported"));
    }
    Ok(())
}

/// `tokenizer_config.json`.
pub fn tokenizer(header: &Header<'_>) -> Result<Json, String> {
    let mut config = Map::new();
    for (key, role) in ROLES {
        if let Some(id) = header.integer(key)? {
            config.insert((*role).to_owned(), json!(token(header, key, id)?));
        }
    }
    if let Some(template) = header.text("tokenizer.chat_template")? {
        config.insert("chat_template".into(), json!(template));
    }
    let sentencepiece = header.text("tokenizer.ggml.model")? == Some("llama");
    let begins = header.text("tokenizer.ggml.pre")?.is_some_and(|pre| WITH_BOS.contains(&pre));
    let add_bos = header.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(sentencepiece || begins);
    config.insert("add_bos_token".into(), json!(add_bos && config.contains_key("bos_token")));
    Ok(Json::Object(config))
}

/// The text of the token that a key names.
fn token<'a>(header: &Header<'a>, key: &str, id: u64) -> Result<&'a str, String> {
    let tokens = header.array("tokenizer.ggml.tokens")?.ok_or("metadata \"tokenizer.ggml.tokens\" is missing")?;
    let token = usize::try_from(id).ok().and_then(|id| tokens.iter().nth(id)).and_then(Value::text);
    token.ok_or_else(|| format!("metadata \"{key}\" is {id}, and the vocabulary has {} tokens", tokens.len))
}

/// `generation_config.json`: where answers end, and how the file would have tokens drawn.
pub fn generation(header: &Header<'_>) -> Result<Json, String> {
    let mut ends = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ends.extend(header.integer(key)?);
    }
    let (tokens, types) = (header.array("tokenizer.ggml.tokens")?, header.array("tokenizer.ggml.token_type")?);
    if let (Some(tokens), Some(types)) = (tokens, types) {
        let pairs = (0u64..).zip(tokens.iter().zip(types.iter()));
        let control = pairs.filter(|(_, (_, kind))| kind.integer() == Some(CONTROL));
        ends.extend(control.filter(|(_, (token, _))| token.text().is_some_and(|token| ENDS.contains(&token))).map(|(id, _)| id));
    }
    ends.sort_unstable();
    ends.dedup();
    let mut config = Map::new();
    if !ends.is_empty() {
        config.insert("eos_token_id".into(), json!(ends));
    }
    for (theirs, ours) in SAMPLING {
        if let Some(value) = scalar(header, theirs)? {
            config.insert((*ours).to_owned(), value);
        }
    }
    Ok(Json::Object(config))
}
