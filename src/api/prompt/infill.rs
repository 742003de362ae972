//! Filling in the middle: what stands before a hole and what follows it, laid out as prompts that code models were trained on.

use std::sync::Arc;

use crate::api::fields::{Field, Fields};
use crate::api::logprobs::Echo;
use crate::api::options::GenerationOptions;
use crate::api::prompt::fit::Fit;
use crate::api::prompt::infill_tokens::InfillTokens;
use crate::api::prompt::text::{self, GivenPrompt};
use crate::api::request::{GenerationRequest, Prompt};
use crate::api::served::ServedModel;
use crate::error::Failure;
use crate::text::tokenizer::Tokenizer;

/// What is around a hole but the text before it.
#[derive(Default)]
pub struct Hole<'a> {
    pub suffix: &'a str,
    /// Other files, or parts of them, that may help: name and text.
    pub extra: Vec<(&'a str, &'a str)>,
}

/// The same as token ids.
struct Parts {
    extra: Vec<u32>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

impl Parts {
    /// Cuts them to `most` tokens: of the other files the beginning goes first, then that of the prefix and the end of the suffix, of which
    /// a quarter of the room is kept. Whether anything was cut.
    fn cut(&mut self, most: usize) -> bool {
        let whole = self.extra.len() + self.prefix.len() + self.suffix.len();
        let extra = self.extra.len().min(most.saturating_sub(self.prefix.len() + self.suffix.len()));
        self.extra.drain(..self.extra.len() - extra);
        let suffix = self.suffix.len().min((most / 4).max(most.saturating_sub(self.prefix.len())));
        self.suffix.truncate(suffix);
        let prefix = self.prefix.len().min(most - suffix);
        self.prefix.drain(..self.prefix.len() - prefix);
        extra + prefix + suffix < whole
    }
}

/// These options with the ends of a filling.
pub fn ending(tokens: &InfillTokens, mut options: GenerationOptions) -> GenerationOptions {
    let mut ends = [options.sampling.eos_token_ids.as_slice(), &tokens.ends].concat();
    ends.sort_unstable();
    ends.dedup();
    options.sampling.eos_token_ids = Arc::new(ends);
    options
}

/// The prompt: the parts with their marks, in the model's order.
fn join(tokens: &InfillTokens, before: &[u32], parts: &Parts) -> Vec<u32> {
    let (prefix, suffix) = ((tokens.prefix, &parts.prefix), (tokens.suffix, &parts.suffix));
    let order = if tokens.suffix_first { [suffix, prefix] } else { [prefix, suffix] };
    let mut ids = [before, &parts.extra].concat();
    for (mark, part) in order {
        ids.push(mark);
        ids.extend(part);
    }
    ids.extend(tokens.middle);
    ids
}

/// `suffix` as a text, where the request has one. As an object it is FastDeploy's, and no suffix.
pub fn suffix<'a>(fields: &Fields<'a>) -> Option<(Field<'a>, &'a str)> {
    let field = fields.get("suffix")?;
    let text = field.value.as_str().filter(|text| !text.is_empty())?;
    Some((field, text))
}

/// The request of completions of these prompts that lead to `suffix`.
pub fn request(
    served: &ServedModel,
    given: Vec<GivenPrompt>,
    suffix: &str,
    options: GenerationOptions,
) -> Result<GenerationRequest, Failure> {
    if options.echo && options.logprobs.output.is_some() {
        let message = "'echo' with 'suffix' repeats the prompt alone, whose tokens are not all of those that 'logprobs' would tell of. Leave one of them out.";
        return Err(Failure::bad_request("echo", message).code("unsupported_value"));
    }
    let tokens = tokens(served, "suffix")?;
    let hole = Hole { suffix, ..Hole::default() };
    text::request(served, given, ending(tokens, options), |given, fit| Ok(prompt(tokens, fit, given, &hole)?.0))
}

/// The model's tokens, or a 400 that names the field which needs them.
pub fn tokens<'a>(served: &'a ServedModel, param: &str) -> Result<&'a InfillTokens, Failure> {
    served.infill.as_ref().ok_or_else(|| {
        let message = format!("The model `{}` has no tokens for filling in the middle, which '{param}' needs.", served.name());
        Failure::bad_request(param, message).code("unsupported_parameter")
    })
}

/// One prompt, which fits the context. Where the request lets prompts be cut, its parts are. Whether they were.
pub fn prompt(tokens: &InfillTokens, fit: &Fit<'_>, prefix: GivenPrompt, hole: &Hole<'_>) -> Result<(Prompt, bool), Failure> {
    let served = fit.served;
    let special = text::special(served);
    let before = if fit.options.add_special_tokens.unwrap_or(true) { text::added_before(served) } else { &[] };
    let mut cut = false;
    let (echo, prefix) = match prefix {
        GivenPrompt::Text(whole) => {
            let read = fit.text(&whole)?;
            cut |= read.len() < whole.len();
            let ids = served.tokenizer.encode(read, special)?;
            (fit.options.echo.then(|| Echo::of_text(whole)), ids)
        }
        GivenPrompt::Tokens(ids) => {
            let echo = fit.options.echo.then(|| Echo::of_prompt(&served.tokenizer, None, &ids, fit.options.skip_special_tokens));
            (echo, ids)
        }
    };
    let suffix = fit.beginning(hole.suffix)?;
    cut |= suffix.len() < hole.suffix.len();
    let mut parts = Parts { extra: Vec::new(), prefix, suffix: without_space(&served.tokenizer, suffix, fit)? };
    cut |= extra(tokens, fit, hole, &mut parts.extra)?;
    if let Some(keep) = fit.keep() {
        let others = tokens.marks() + before.len() + fit.options.completion_token_ids.len();
        cut |= parts.cut(keep.saturating_sub(others));
    }
    let ids = fit.ids(join(tokens, before, &parts))?;
    Ok((Prompt::new(ids, echo), cut))
}

/// The ids of a text that goes on behind a hole: some tokenizers begin every text with a space, which is none of it.
fn without_space(tokenizer: &Tokenizer, text: &str, fit: &Fit<'_>) -> Result<Vec<u32>, Failure> {
    /// A text that no merge of tokens reaches beyond.
    const MARK: &str = "\n";
    let special = text::special(fit.served);
    if text.is_empty() || !tokenizer.begins_with_space()? {
        return tokenizer.encode(text, special);
    }
    let mark = tokenizer.encode(MARK, special)?;
    let mut ids = tokenizer.encode(&format!("{MARK}{text}"), special)?;
    if ids.starts_with(&mark) {
        ids.drain(..mark.len());
        return Ok(ids);
    }
    tokenizer.encode(text, special)
}

/// Other files as llama.cpp lays them out: a repository of no name, each file behind its name, and the name of the file with the hole. Where
/// there are no marks of files, a line before each. Whether some were left out, for want of room.
fn extra(tokens: &InfillTokens, fit: &Fit<'_>, hole: &Hole<'_>, ids: &mut Vec<u32>) -> Result<bool, Failure> {
    const SNIPPET: &str = "\n\n--- snippet ---\n\n";
    if hole.extra.is_empty() {
        return Ok(false);
    }
    let special = text::special(fit.served);
    let encode = |text: &str| fit.served.tokenizer.encode(text, special);
    let head = |name: &str| match tokens.file {
        Some(mark) => Ok([vec![mark], encode(&format!("{name}\n"))?].concat()),
        None => encode(SNIPPET),
    };
    // From the last to the first: those that cannot fit need not be read.
    let mut files = Vec::new();
    if tokens.file.is_some() {
        files.push(head("filename")?);
    }
    let (mut read, mut cut) = (0, false);
    for (name, text) in hole.extra.iter().rev() {
        cut = fit.keep().is_some_and(|keep| read >= keep);
        if cut {
            break;
        }
        let file = [head(name)?, encode(fit.text(text)?)?].concat();
        read += file.len();
        files.push(file);
    }
    if let (Some(mark), false) = (tokens.repository, cut) {
        ids.push(mark);
        ids.extend(encode("myproject\n")?);
    }
    files.iter().rev().for_each(|file| ids.extend(file));
    Ok(cut)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(suffix_first: bool, middle: Option<u32>) -> InfillTokens {
        InfillTokens { prefix: 1, suffix: 2, middle, suffix_first, repository: None, file: None, ends: vec![9] }
    }

    #[test]
    fn parts_come_in_the_order_of_the_layout() {
        let parts = Parts { extra: vec![50], prefix: vec![10, 11], suffix: vec![20] };
        assert_eq!(join(&tokens(false, Some(3)), &[7], &parts), [7, 50, 1, 10, 11, 2, 20, 3]);
        assert_eq!(join(&tokens(true, Some(3)), &[], &parts), [50, 2, 20, 1, 10, 11, 3]);
        assert_eq!(join(&tokens(true, None), &[], &parts), [50, 2, 20, 1, 10, 11]);
    }

    proptest! {
        #[test]
        fn what_is_kept_is_nearest_to_the_hole(extra in 0..40_u32, prefix in 0..40_u32, suffix in 0..40_u32, most in 0..100_usize) {
            let all = |count: u32| (0..count).collect::<Vec<_>>();
            let mut parts = Parts { extra: all(extra), prefix: all(prefix), suffix: all(suffix) };
            let was_cut = parts.cut(most);
            let kept = parts.extra.len() + parts.prefix.len() + parts.suffix.len();
            let whole = (extra + prefix + suffix) as usize;
            prop_assert_eq!((kept, was_cut), (whole.min(most), whole > most));
            prop_assert!(all(extra).ends_with(&parts.extra) && all(prefix).ends_with(&parts.prefix) && all(suffix).starts_with(&parts.suffix));
            // Other files go first.
            prop_assert!(parts.extra.is_empty() || parts.prefix.len() + parts.suffix.len() == (prefix + suffix) as usize);
        }
    }
}
