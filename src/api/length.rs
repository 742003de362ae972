//! How long an answer may be: the one place that decides it, before a request is submitted.

use crate::api::fields::{Fields, invalid};
use crate::api::logprobs::LogprobsForm;
use crate::config::{ApiSettings, defaults};
use crate::engine::Limits;
use crate::error::Failure;

/// Most and fewest tokens of an answer, as the request asks or by default; no most = the rest of the context.
pub fn read(fields: &Fields<'_>, form: LogprobsForm, echo: bool, settings: &ApiSettings) -> Result<(Option<usize>, usize), Failure> {
    // A prompt may be scored alone, but then it must be given back; editors have theirs computed ahead.
    let asked = asked(fields, if (echo && !form.is_chat()) || form == LogprobsForm::Infill { 0 } else { 1 })?;
    let min_tokens = fields.count_or_default("min_tokens")?;
    if let (Some(max_tokens), Some(field)) = (asked.filter(|max| min_tokens > *max), fields.get("min_tokens")) {
        let message = format!("{min_tokens} is greater than the maximum of {max_tokens}, which is max_tokens - '{}'", field.name);
        return Err(invalid(&field, message));
    }
    // Everywhere but on `/v1/completions` an answer may fill the rest of the context.
    let default = settings.default_max_tokens.or((form == LogprobsForm::Text).then_some(defaults::COMPLETION_MAX_TOKENS));
    // In chats it is the answer behind the thoughts that is bounded so, while it is written.
    let response = fields.count("response_max_tokens")?.filter(|_| !form.is_chat());
    Ok((asked.or(default).into_iter().chain(response).min(), min_tokens))
}

/// What the request asks for. `max_completion_tokens` wins over the older `max_tokens`, and that over the names of other servers; all are
/// checked. `least`: the smallest value that makes sense.
fn asked(fields: &Fields<'_>, least: u32) -> Result<Option<usize>, Failure> {
    let newest = fields.count_from("max_completion_tokens", least)?;
    let older = fields.count_from("max_tokens", least)?;
    let other = fields.count_from("max_new_tokens", least)?;
    // llama.cpp's, where -1 is no limit.
    let unlimited = fields.get("n_predict").is_some_and(|field| field.value.as_f64() == Some(-1.0));
    let predicted = if unlimited { Some(usize::MAX) } else { fields.count_from("n_predict", least)? };
    Ok(newest.or(older).or(other).or(predicted))
}

/// Most tokens of an answer to a prompt of so many tokens, at least 1. Fails when `min_tokens` is more than that.
pub fn of_prompt(max_tokens: Option<usize>, min_tokens: usize, prompt: usize, limits: &Limits) -> Result<usize, Failure> {
    let room = limits.max_model_len.saturating_sub(prompt);
    let most = max_tokens.unwrap_or(room).min(room);
    if min_tokens <= most {
        return Ok(most.max(1));
    }
    let message = if most < room {
        format!("{min_tokens} is greater than the maximum of {most}, which is max_tokens when the request does not say - 'min_tokens'")
    } else {
        format!(
            "{min_tokens} is greater than the maximum of {room}, which is what the prompt's {prompt} tokens leave of the context of {} - \
             'min_tokens'.{}",
            limits.max_model_len,
            limits.memory_hint()
        )
    };
    Err(Failure::bad_request("min_tokens", message).code("invalid_value"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn min_tokens_must_have_room() {
        let limits = Limits { max_model_len: 64, vocab_size: 10, max_num_seqs: 4, max_waiting: 4, memory_bound: None };
        assert_eq!(of_prompt(None, 4, 60, &limits).unwrap(), 4);
        assert_eq!(of_prompt(Some(60), 0, 60, &limits).unwrap(), 4, "max_tokens is an upper bound, and no promise");
        assert_eq!(of_prompt(Some(0), 0, 60, &limits).unwrap(), 1, "the engine always samples");
        for max_tokens in [None, Some(60)] {
            let failure = of_prompt(max_tokens, 5, 60, &limits).unwrap_err();
            assert_eq!((failure.param.as_deref(), failure.code), (Some("min_tokens"), Some("invalid_value")));
            assert!(
                failure.message.starts_with("5 is greater than the maximum of 4, which is what the prompt's 60 tokens leave"),
                "{failure}"
            );
        }
        let failure = of_prompt(Some(16), 20, 10, &limits).unwrap_err();
        assert!(failure.message.starts_with("20 is greater than the maximum of 16, which is max_tokens"), "{failure}");
    }
}
