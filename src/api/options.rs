//! The generation parameters that every route reads in the same way, and their defaults.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::api::fields::refuse::{refuse_unsupported, unsupported};
use crate::api::fields::{self, Field, Fields, invalid, wrong_type};
use crate::api::grammar::{self, CompiledGrammar, Grammar};
use crate::api::length;
use crate::api::logprobs::{LogprobsForm, LogprobsRequest};
use crate::config::ApiSettings;
use crate::engine::{Limits, SamplingParams};
use crate::error::{Failure, Kind};
use crate::models::LogprobsSpec;

/// Sampling defaults: `generation_config.json`, unless switched off, with the overrides of the settings laid over it.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingDefaults {
    temperature: f64,
    top_p: f64,
    top_k: i64,
    min_p: f64,
    presence_penalty: f64,
    frequency_penalty: f64,
    repetition_penalty: f64,
    /// Most that a request may ask for.
    max_temperature: Option<f64>,
}

impl SamplingDefaults {
    /// Values of the model that make no sense are left out; those of `OVERRIDE_GENERATION_CONFIG` stop the start.
    pub fn new(generation_config: &Value, settings: &ApiSettings) -> Result<Self, Failure> {
        let mut defaults = Self {
            temperature: fields::default_of("temperature"),
            top_p: fields::default_of("top_p"),
            top_k: fields::default_integer("top_k"),
            min_p: fields::default_of("min_p"),
            presence_penalty: fields::default_of("presence_penalty"),
            frequency_penalty: fields::default_of("frequency_penalty"),
            repetition_penalty: fields::default_of("repetition_penalty"),
            max_temperature: settings.fastdeploy_compatible.then_some(f64::MAX),
        };
        if let (false, Value::Object(config)) = (settings.ignore_generation_config, generation_config) {
            for (name, value) in config {
                // A model's file is no reason to stop: the neutral value stays.
                let single = Value::Object(Map::from_iter([(name.clone(), value.clone())]));
                if let Err(failure) = defaults.lay_over(&single) {
                    tracing::warn!("generation_config.json: {failure}; the default stays");
                }
            }
        }
        if let Some(config) = &settings.override_generation_config {
            defaults
                .lay_over(&Value::Object(config.clone()))
                .map_err(|failure| Failure::internal(format!("OVERRIDE_GENERATION_CONFIG: {}", failure.message)))?;
        }
        Ok(defaults)
    }

    fn lay_over(&mut self, config: &Value) -> Result<(), Failure> {
        let fields = Fields::new(config)?;
        *self = self.with(&fields)?;
        Ok(())
    }

    /// These, with whatever the request says itself.
    fn with(&self, fields: &Fields<'_>) -> Result<Self, Failure> {
        let top_k = fields.integer_from("top_k", i64::MIN)?;
        if let (Some(top_k), Some(field)) = (top_k.filter(|top_k| *top_k < -1), fields.get("top_k")) {
            return Err(invalid(&field, format!("{top_k} is out of Range. Either set top_k to -1 or >=1. - '{}'", field.name)));
        }
        let repetition_penalty = fields.number_from("repetition_penalty", 0.0)?;
        if let (Some(_), Some(field)) = (repetition_penalty.filter(|penalty| *penalty < 1e-3), fields.get("repetition_penalty")) {
            return Err(invalid(&field, format!("{} is less than the minimum of 0.001 - '{}'", field.value, field.name)));
        }
        Ok(Self {
            temperature: self.temperature(fields)?,
            top_p: fields.number("top_p")?.unwrap_or(self.top_p),
            top_k: top_k.unwrap_or(self.top_k),
            min_p: fields.number("min_p")?.unwrap_or(self.min_p),
            presence_penalty: fields.number("presence_penalty")?.unwrap_or(self.presence_penalty),
            frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(self.frequency_penalty),
            repetition_penalty: repetition_penalty.unwrap_or(self.repetition_penalty),
            max_temperature: self.max_temperature,
        })
    }

    fn temperature(&self, fields: &Fields<'_>) -> Result<f64, Failure> {
        let given = match self.max_temperature {
            Some(max) => fields.number_within("temperature", 0.0, max)?,
            None => fields.number("temperature")?,
        };
        Ok(given.unwrap_or(self.temperature))
    }
}

/// How a prompt that is too long is cut, when the request asks for it: its end stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truncate {
    ToContext,
    Last(usize),
}

/// The parameters of one request.
#[derive(Debug, Clone)]
pub struct GenerationOptions {
    /// Choices for each prompt.
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub continuous_usage: bool,
    /// The request's or the default; the context's rest bounds it for each prompt. 0: only the prompt is wanted, scored.
    pub max_tokens: Option<usize>,
    pub stops: Vec<String>,
    pub include_stop: bool,
    pub skip_special_tokens: bool,
    pub truncate: Option<Truncate>,
    pub return_token_ids: bool,
    /// The answer tells its times.
    pub collect_metrics: bool,
    pub add_special_tokens: Option<bool>,
    /// Sequences drawn for each prompt, of which the most probable `n` are given (`best_of`). At least `n`.
    pub candidates: usize,
    pub logprobs: LogprobsRequest,
    /// What the prompt is scored with.
    pub prompt_logprobs: Option<LogprobsSpec>,
    /// The answer begins with the prompt.
    pub echo: bool,
    /// The request's: every prompt begins with it, and further choices count up from it. Without one each sequence gets its own.
    pub seed: Option<u64>,
    /// What the answer has begun with: tokens after the prompt.
    pub completion_token_ids: Vec<u32>,
    /// Tokens of one choice in one chunk of a stream, at least.
    pub stream_group: usize,
    /// The first choice's; `max_tokens` and `seed` are not set yet.
    pub sampling: SamplingParams,
    /// What each answer must be.
    pub grammar: Option<Arc<CompiledGrammar>>,
}

/// What [`GenerationOptions::read`] needs of the service.
pub struct Context<'a> {
    pub settings: &'a ApiSettings,
    pub defaults: &'a SamplingDefaults,
    pub limits: &'a Limits,
    /// The model has tokens for filling in the middle.
    pub infills: bool,
    pub eos_token_ids: &'a Arc<Vec<u32>>,
    /// Token ids of plain text.
    pub encode: &'a dyn Fn(&str) -> Result<Vec<u32>, Failure>,
    pub compile: &'a dyn Fn(&Grammar) -> Result<Arc<CompiledGrammar>, Failure>,
}

impl GenerationOptions {
    /// Reads and checks all of them.
    pub fn read(fields: &Fields<'_>, form: LogprobsForm, context: &Context<'_>) -> Result<Self, Failure> {
        let n = fields.count_or_default("n")?;
        let max_n = context.settings.max_n;
        if let (true, Some(field)) = (n > max_n, fields.get("n")) {
            return Err(invalid(&field, format!("{n} is greater than the maximum of {max_n} (MAX_N) - '{}'", field.name)));
        }
        let infills = context.infills && matches!(form, LogprobsForm::Text | LogprobsForm::NativeText);
        refuse_unsupported(fields, form.is_chat(), infills)?;
        let stream = fields.flag("stream")?;
        let candidates = candidates(fields, n, max_n, stream)?;
        let logprobs = LogprobsRequest::read(fields, form, stream, context.settings)?;
        let echo = fields.flag("echo")?;
        let (max_tokens, min_tokens) = length::read(fields, form, echo, context.settings)?;
        let (include_usage, continuous_usage) = stream_options(fields)?;
        // Candidates are compared by log probabilities.
        let report = logprobs.output.or((candidates > n).then_some(0));
        let sampling = SamplingParams { min_tokens, choices: n, ..sampling(fields, report, context)? };
        Ok(Self {
            n,
            stream,
            include_usage: include_usage || context.settings.force_include_usage,
            continuous_usage,
            max_tokens,
            stops: fields.stop(context.settings.max_stop_strings)?,
            include_stop: fields.flag("include_stop_str_in_output")?,
            skip_special_tokens: fields.flag("skip_special_tokens")?,
            truncate: truncate(fields)?,
            return_token_ids: fields.flag("return_token_ids")?,
            collect_metrics: fields.flag("collect_metrics")?,
            add_special_tokens: fields.bool("add_special_tokens")?,
            candidates,
            logprobs,
            prompt_logprobs: logprobs.of_prompt(echo && !form.is_chat(), context.settings),
            echo,
            seed: fields.seed()?,
            completion_token_ids: fields.token_ids("completion_token_ids", context.limits.vocab_size)?.unwrap_or_default(),
            stream_group: fields.count_or_default("max_streaming_response_tokens")?,
            sampling,
            grammar: compiled(fields, context)?,
        })
    }
}

impl GenerationOptions {
    /// Whether all sequences of so many prompts can be taken at once. `listed`: the prompts may be a list.
    pub fn check_number(&self, prompts: usize, listed: bool, limits: &Limits) -> Result<(), Failure> {
        let each = if self.sampling.is_greedy() { 1 } else { self.candidates };
        let (asked, most) = (prompts.saturating_mul(each), limits.max_num_seqs.saturating_add(limits.max_waiting));
        if asked <= most {
            return Ok(());
        }
        let choices = if self.candidates > self.n { "best_of" } else { "n" };
        let (param, cause) = match (listed && prompts > 1, each > 1) {
            (true, true) => (if prompts >= each { "prompt" } else { choices }, format!("{prompts} prompts times {each} by '{choices}'")),
            (true, false) => ("prompt", format!("one for each of {prompts} prompts")),
            (false, _) => (choices, format!("{each} by '{choices}'")),
        };
        let message = format!(
            "This request asks for {asked} sequences ({cause}), and this server takes at most {most} at a time: MAX_NUM_SEQS={} that run and \
             MAX_WAITING={} that wait. Send fewer in one request, or raise MAX_WAITING.",
            limits.max_num_seqs, limits.max_waiting
        );
        Err(Failure::bad_request(param, message).code("invalid_value"))
    }
}

/// The grammar that the request asks for. A failure names the field.
fn compiled(fields: &Fields<'_>, context: &Context<'_>) -> Result<Option<Arc<CompiledGrammar>>, Failure> {
    let Some(requested) = grammar::request::read(fields)? else { return Ok(None) };
    let name = |failure: Failure| {
        if failure.kind != Kind::BadRequest {
            return failure;
        }
        let message = format!("'{}' cannot be used: {}", requested.param, failure.message);
        Failure { message, ..failure }.param(&*requested.param)
    };
    (context.compile)(&requested.grammar).map(Some).map_err(name)
}

/// What decides which tokens come. `report`: how many alternatives to report with each. The seed and the lengths are not set here.
fn sampling(fields: &Fields<'_>, report: Option<u32>, context: &Context<'_>) -> Result<SamplingParams, Failure> {
    let vocab_size = context.limits.vocab_size;
    let stop_token_ids = fields.token_ids("stop_token_ids", vocab_size)?.unwrap_or_default();
    let drawn = context.defaults.with(fields)?;
    refuse_penalty_window(fields, drawn.repetition_penalty)?;
    // A nucleus of nothing is its most likely token.
    let greedy = drawn.top_p < 1e-5 || fields.bool("do_sample")? == Some(false);
    Ok(SamplingParams {
        temperature: if greedy { 0.0 } else { drawn.temperature as f32 },
        top_p: if greedy { 1.0 } else { drawn.top_p as f32 },
        top_k: u32::try_from(drawn.top_k.max(0)).unwrap_or(u32::MAX),
        min_p: drawn.min_p as f32,
        presence_penalty: drawn.presence_penalty as f32,
        frequency_penalty: drawn.frequency_penalty as f32,
        repetition_penalty: drawn.repetition_penalty as f32,
        logit_bias: Arc::new(fields.logit_bias(vocab_size)?),
        bad_words: Arc::new(fields.bad_words(vocab_size, context.encode)?),
        logprobs: report.map(|top| LogprobsSpec { top, mode: context.settings.logprobs_mode }),
        eos_token_ids: context.eos_token_ids.clone(),
        stop_token_ids: Arc::new(stop_token_ids),
        ignore_eos: fields.flag("ignore_eos")?,
        ..SamplingParams::default()
    })
}

/// llama.cpp's `repeat_last_n`: here a repetition penalty counts all tokens, which is that server's -1.
fn refuse_penalty_window(fields: &Fields<'_>, penalty: f64) -> Result<(), Failure> {
    match fields.get("repeat_last_n").filter(|field| penalty != 1.0 && field.value.as_f64() != Some(-1.0)) {
        Some(field) => Err(unsupported(&field.name)),
        None => Ok(()),
    }
}

/// `include_usage` and `continuous_usage_stats`. Without `stream` they mean nothing and are let pass: LangChain sends them loosely.
fn stream_options(fields: &Fields<'_>) -> Result<(bool, bool), Failure> {
    let Some(field) = fields.get("stream_options") else { return Ok((false, false)) };
    if !field.value.is_object() {
        return Err(wrong_type(&field, "an object"));
    }
    let flag = |name: &str| match field.value.get(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(value) => Err(wrong_type(&Field { name: format!("{}.{name}", field.name), value }, "true or false")),
    };
    Ok((flag("include_usage")?, flag("continuous_usage_stats")?))
}

/// `best_of`: at least `n`, and no stream of what may yet be discarded.
fn candidates(fields: &Fields<'_>, n: usize, most: usize, stream: bool) -> Result<usize, Failure> {
    let (Some(best_of), Some(field)) = (fields.count("best_of")?, fields.get("best_of")) else { return Ok(n) };
    // OpenAI's 0 is no wish at all.
    let best_of = if best_of == 0 { n } else { best_of };
    if best_of < n {
        return Err(invalid(&field, format!("best_of must be greater than or equal to n, got n={n} and best_of={best_of}.")));
    }
    if best_of > most {
        return Err(invalid(&field, format!("{best_of} is greater than the maximum of {most} - '{}'", field.name)));
    }
    if best_of > n && stream {
        return Err(invalid(
            &field,
            format!("'{}' greater than 'n' cannot be streamed: which choices are the best is known at the end.", field.name),
        ));
    }
    Ok(best_of)
}

fn truncate(fields: &Fields<'_>) -> Result<Option<Truncate>, Failure> {
    let tokens = fields.integer("truncate_prompt_tokens")?;
    let flag = fields.flag("truncate_sequence")?;
    match (tokens, fields.get("truncate_prompt_tokens")) {
        (Some(0), Some(field)) => Err(invalid(&field, format!("0 is less than the minimum of 1 (or -1, the context) - '{}'", field.name))),
        (Some(-1), _) => Ok(Some(Truncate::ToContext)),
        (Some(tokens), _) => Ok(Some(Truncate::Last(usize::try_from(tokens).unwrap_or(usize::MAX)))),
        (None, _) => Ok(flag.then_some(Truncate::ToContext)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: Value) -> Result<GenerationOptions, Failure> {
        let settings = ApiSettings { max_n: 4, ..ApiSettings::default() };
        let defaults = SamplingDefaults::new(&json!({"temperature": 0.8, "top_p": 0.7, "top_k": 50}), &settings).unwrap();
        let limits = Limits { max_model_len: 64, vocab_size: 10, max_num_seqs: 4, max_waiting: 4, memory_bound: None, pooling: None };
        // One token a letter.
        let encode = |text: &str| Ok(text.bytes().map(|byte| u32::from(byte % 10)).collect());
        let eos_token_ids = Arc::new(vec![2]);
        let context = Context {
            settings: &settings,
            defaults: &defaults,
            limits: &limits,
            infills: false,
            eos_token_ids: &eos_token_ids,
            encode: &encode,
            compile: &|_| Err(Failure::internal("no grammars here")),
        };
        GenerationOptions::read(&Fields::new(&body).unwrap(), LogprobsForm::NativeText, &context)
    }

    #[test]
    fn defaults_come_from_the_model_and_null_is_default() {
        let options = read(json!({"temperature": null})).unwrap();
        assert_eq!((options.sampling.temperature, options.sampling.top_p, options.sampling.top_k), (0.8, 0.7, 50));
        assert_eq!((options.seed, options.n, options.stream, options.max_tokens), (None, 1, false, None));
        assert!(options.skip_special_tokens);
        let options = read(json!({"temperature": 0, "top_p": 1, "top_k": -1, "seed": 7})).unwrap();
        assert_eq!((options.sampling.temperature, options.sampling.top_p, options.sampling.top_k, options.seed), (0.0, 1.0, 0, Some(7)));
    }

    #[test]
    fn the_two_switches_of_the_generation_config() {
        let config = json!({"temperature": 0.8, "top_p": 7, "max_new_tokens": 5});
        let mut settings = ApiSettings::default();
        assert_eq!(SamplingDefaults::new(&config, &settings).unwrap().temperature, 0.8);
        assert_eq!(SamplingDefaults::new(&config, &settings).unwrap().top_p, 1.0, "a value that makes no sense is left out");
        settings.ignore_generation_config = true;
        assert_eq!(SamplingDefaults::new(&config, &settings).unwrap().temperature, 1.0);
        settings.override_generation_config = json!({"temperature": 0.1}).as_object().cloned();
        assert_eq!(SamplingDefaults::new(&config, &settings).unwrap().temperature, 0.1);
        settings.override_generation_config = json!({"temperature": "hot"}).as_object().cloned();
        assert!(SamplingDefaults::new(&config, &settings).unwrap_err().message.starts_with("OVERRIDE_GENERATION_CONFIG: 'temperature'"));
    }

    #[test]
    fn the_newest_name_of_max_tokens_wins_and_all_are_checked() {
        assert_eq!(read(json!({"max_tokens": 5, "max_completion_tokens": 6, "max_new_tokens": 7})).unwrap().max_tokens, Some(6));
        assert_eq!(read(json!({"max_tokens": 5, "max_new_tokens": 7})).unwrap().max_tokens, Some(5));
        assert_eq!(read(json!({"sampling_params": {"max_new_tokens": 7}})).unwrap().max_tokens, Some(7));
        assert_eq!(read(json!({"max_tokens": 0, "max_completion_tokens": 6})).unwrap_err().param.as_deref(), Some("max_tokens"));
    }

    #[test]
    fn a_nucleus_of_nothing_is_greedy_and_so_is_no_sampling() {
        for body in [json!({"top_p": 0}), json!({"do_sample": false, "temperature": 0.7})] {
            let sampling = read(body).unwrap().sampling;
            assert_eq!((sampling.temperature, sampling.top_p), (0.0, 1.0));
        }
        assert_eq!(read(json!({"do_sample": true})).unwrap().sampling.temperature, 0.8);
        assert_eq!(read(json!({"do_sample": "no"})).unwrap_err().param.as_deref(), Some("do_sample"));
    }

    #[test]
    fn names_of_other_servers() {
        let options = read(json!({"n_predict": 6, "min_new_tokens": 3, "repeat_penalty": 1.5, "suppress_tokens": [4]})).unwrap();
        assert_eq!((options.max_tokens, options.sampling.min_tokens, options.sampling.repetition_penalty), (Some(6), 3, 1.5));
        assert_eq!(*options.sampling.bad_words, [[4]]);
        assert_eq!(read(json!({"n_predict": 6, "max_tokens": 5})).unwrap().max_tokens, Some(5));
        assert_eq!(read(json!({"n_predict": -1})).unwrap().max_tokens, Some(usize::MAX), "no limit");
        for (body, param) in [
            (json!({"n_predict": 0}), "n_predict"),
            (json!({"n_predict": -2}), "n_predict"),
            (json!({"min_new_tokens": 5, "max_tokens": 4}), "min_new_tokens"),
            (json!({"repeat_penalty": 0}), "repeat_penalty"),
            (json!({"repeat_penalty": 1.1, "repeat_last_n": 64}), "repeat_last_n"),
            (json!({"num_beams": 2}), "num_beams"),
        ] {
            assert_eq!(read(body.clone()).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
        for body in [json!({"repeat_penalty": 1.1, "repeat_last_n": -1}), json!({"repeat_penalty": 1.0, "repeat_last_n": 64})] {
            assert!(read(body).is_ok());
        }
    }

    #[test]
    fn one_past_each_range_is_refused_by_name() {
        let cases = [
            json!({"temperature": 2.1}),
            json!({"temperature": -0.1}),
            json!({"top_p": 1.1}),
            json!({"top_p": -1}),
            json!({"top_k": -2}),
            json!({"min_p": 1.5}),
            json!({"presence_penalty": 2.5}),
            json!({"frequency_penalty": -2.5}),
            json!({"repetition_penalty": 0}),
            json!({"n": 0}),
            json!({"n": 5}),
            json!({"max_tokens": 0}),
            json!({"max_tokens": -1}),
            json!({"min_tokens": -1}),
            json!({"stop_token_ids": [10]}),
            json!({"stop_token_ids": [-1]}),
            json!({"logit_bias": {"10": 1}}),
            json!({"truncate_prompt_tokens": 0}),
            json!({"truncate_prompt_tokens": -2}),
            json!({"min_tokens": 5, "max_tokens": 4}),
        ];
        for body in cases {
            let failure = read(body.clone()).unwrap_err();
            assert_eq!(failure.code, Some("invalid_value"), "{body}");
            let field = body.as_object().unwrap().keys().next().unwrap().clone();
            assert!(failure.param.as_deref().unwrap().starts_with(&field), "{body}: {failure:?}");
        }
        for body in [
            json!({"top_k": 0}),
            json!({"top_k": 1}),
            json!({"temperature": 2}),
            json!({"n": 4}),
            json!({"min_tokens": 4, "max_tokens": 4}),
        ] {
            assert!(read(body).is_ok());
        }
    }

    #[test]
    fn too_many_sequences_name_their_cause_and_the_settings() {
        let limits = Limits { max_model_len: 64, vocab_size: 10, max_num_seqs: 4, max_waiting: 4, memory_bound: None, pooling: None };
        let refused = |body: Value, prompts: usize, listed: bool| {
            let failure = read(body).unwrap().check_number(prompts, listed, &limits).unwrap_err();
            assert!(failure.message.contains("MAX_NUM_SEQS=4") && failure.message.contains("MAX_WAITING=4"), "{failure}");
            (failure.param.unwrap(), failure.message)
        };
        for (n, prompts) in [(1, 8), (2, 4), (4, 2)] {
            assert!(read(json!({"n": n})).unwrap().check_number(prompts, true, &limits).is_ok());
        }
        let (param, message) = refused(json!({}), 9, true);
        assert!(param == "prompt" && message.contains("9 sequences (one for each of 9 prompts)"), "{message}");
        let (param, message) = refused(json!({"n": 2}), 5, true);
        assert!(param == "prompt" && message.contains("10 sequences (5 prompts times 2 by 'n')"), "{message}");
        assert_eq!(refused(json!({"n": 4}), 3, true).0, "n");
        assert_eq!(refused(json!({"n": 1, "best_of": 4}), 3, true).0, "best_of");
        // Greedy choices are one sequence.
        assert!(read(json!({"n": 4, "temperature": 0})).unwrap().check_number(8, true, &limits).is_ok());
        let small = Limits { max_num_seqs: 1, max_waiting: 1, ..limits.clone() };
        let failure = read(json!({"n": 4})).unwrap().check_number(1, false, &small).unwrap_err();
        assert!(failure.param.as_deref() == Some("n") && failure.message.contains("4 sequences (4 by 'n')"), "{failure}");
    }

    #[test]
    fn stream_options_are_read_and_typed() {
        assert!(read(json!({"stream_options": {"include_usage": true}})).unwrap().include_usage);
        assert_eq!(
            read(json!({"stream_options": {"include_usage": "yes"}})).unwrap_err().param.as_deref(),
            Some("stream_options.include_usage")
        );
        assert!(read(json!({"stream_options": 5})).is_err());
    }
}
