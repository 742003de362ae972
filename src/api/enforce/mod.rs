//! What the model may write, beyond what a request's grammar says: thoughts keep to their budget, a grammar holds for the answer behind the
//! thoughts alone, and tool calls are calls of the request's tools.
//!
//! [`Rules`] is what one request asks for; [`answer::AnswerConstraint`] follows one answer by them. [`calls`] writes the grammars of calls
//! from the rows of the formats.

use std::sync::Arc;

use crate::api::enforce::calls::CallGrammars;
use crate::api::grammar::CompiledGrammar;
use crate::api::parse::answer::{Parsing, Reasoning};
use crate::api::parse::reasoning::{HARMONY_END, HARMONY_FINAL, HARMONY_NEXT, ReasoningFormat, Start};
use crate::error::Failure;
use crate::text::tokenizer::Tokenizer;

mod answer;
#[cfg(test)]
mod call_tests;
pub mod calls;
mod either;
mod lark;
mod literal;
mod marks;
mod schemas;
mod tagged;
#[cfg(test)]
mod tests;

/// What the answers of one request are held to.
pub struct Rules {
    tokenizer: Arc<Tokenizer>,
    /// None: an answer has no thoughts, or they are over.
    thinking: Option<Thinking>,
    answer: AnswerRule,
    /// Most tokens behind the thoughts.
    limit: Option<usize>,
    /// These end a sequence.
    ends: Arc<Vec<u32>>,
    vocab_size: usize,
}

/// What an answer behind its thoughts must be.
enum AnswerRule {
    Anything,
    /// What one of these allows.
    Grammars(Vec<Form>),
    /// Anything, but for calls, which are as their grammars say from their marks on.
    Calls(CallGrammars),
}

/// What an answer may be as a whole.
struct Form {
    /// The header of its message, where messages have one.
    header: Vec<u32>,
    grammar: Arc<CompiledGrammar>,
}

/// Thoughts before the answer.
struct Thinking {
    format: &'static ReasoningFormat,
    /// The prompt has opened them; otherwise the first words of the answer tell.
    open: bool,
    /// Most tokens of them.
    budget: Option<usize>,
    /// Their closing marks.
    close: Vec<&'static str>,
    /// Opening marks of calls that end them, too.
    ends: Vec<&'static str>,
    /// An answer begins with a closing mark, even without thoughts.
    always_closes: bool,
    /// Marks that open and close them, as tokens.
    opens: Vec<Vec<u32>>,
    closes: Vec<Vec<u32>>,
    /// What ends thoughts before the model does.
    closing: Arc<Vec<u32>>,
    /// What stands between their end and an answer that a grammar begins.
    gap: Arc<Vec<u32>>,
}

impl std::fmt::Debug for Rules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rules")
    }
}

/// What a request asks for, in the words of its fields.
#[derive(Default)]
pub struct Wishes {
    /// Most tokens of thoughts, and of the answer behind them.
    pub thought_tokens: Option<usize>,
    pub answer_tokens: Option<usize>,
    /// What the answer must be.
    pub grammar: Option<Arc<CompiledGrammar>>,
    pub calls: Option<CallGrammars>,
}

/// What sequences end with, and how many ids there are.
pub struct Vocabulary<'a> {
    pub tokenizer: &'a Arc<Tokenizer>,
    pub ends: &'a Arc<Vec<u32>>,
    pub size: usize,
}

impl Rules {
    /// None when there is nothing to be held to but, at most, a grammar from the first token on.
    pub fn new(vocabulary: &Vocabulary<'_>, parsing: &Parsing, wishes: Wishes) -> Result<Option<Arc<Self>>, Failure> {
        let form = |grammar| Form { header: Vec::new(), grammar };
        let with_header = |grammar| Ok::<_, Failure>(Form { header: marks::ids(vocabulary.tokenizer, HARMONY_FINAL)?, grammar });
        // Then each form has a header of its own.
        let has_calls = wishes.calls.is_some();
        let headers = wishes.calls.as_ref().is_some_and(|calls| calls.harmony);
        let answer = match (wishes.calls, wishes.grammar) {
            // What a call is made of is no content.
            (Some(calls), _) if calls.demanded => AnswerRule::Grammars(calls.whole.into_iter().map(form).collect()),
            (Some(calls), Some(grammar)) => {
                let content = if headers { with_header(grammar)? } else { form(grammar) };
                AnswerRule::Grammars(calls.whole.into_iter().map(form).chain([content]).collect())
            }
            (Some(calls), None) => AnswerRule::Calls(calls),
            (None, Some(grammar)) => AnswerRule::Grammars(vec![form(grammar)]),
            (None, None) => AnswerRule::Anything,
        };
        let only_content = !has_calls && matches!(answer, AnswerRule::Grammars(_));
        let headers = headers && matches!(answer, AnswerRule::Grammars(_));
        let mut ends = parsing.ends_of_thoughts();
        // gpt-oss writes calls, and words before them, into a channel of their own.
        ends.extend(parsing.reasoning.filter(|reasoning| reasoning.format.harmony).map(|_| "<|channel|>commentary"));
        if only_content {
            ends.clear();
        }
        let reasoning = parsing.reasoning.filter(|reasoning| reasoning.start != Start::Content);
        let thinking = reasoning.map(|reasoning| Thinking::new(vocabulary.tokenizer, reasoning, ends, headers, wishes.thought_tokens));
        let rules = Self {
            tokenizer: vocabulary.tokenizer.clone(),
            thinking: thinking.transpose()?,
            answer,
            limit: wishes.answer_tokens,
            ends: vocabulary.ends.clone(),
            vocab_size: vocabulary.size,
        };
        let bounded = rules.limit.is_some() || rules.thinking.as_ref().is_some_and(|thinking| thinking.budget.is_some());
        let needed = match &rules.answer {
            AnswerRule::Anything => bounded,
            AnswerRule::Grammars(_) | AnswerRule::Calls(_) => true,
        };
        Ok(needed.then(|| Arc::new(rules)))
    }
}

impl Thinking {
    /// `headers`: what comes behind the thoughts is a message with a header that tells what it is.
    fn new(
        tokenizer: &Tokenizer,
        reasoning: Reasoning,
        ends: Vec<&'static str>,
        headers: bool,
        budget: Option<usize>,
    ) -> Result<Self, Failure> {
        let format = reasoning.format;
        let (close, force) = match headers && format.harmony {
            true => (vec![HARMONY_END], HARMONY_NEXT),
            false => (format.close.to_vec(), format.force),
        };
        let all = |marks: &[&str]| marks.iter().map(|mark| marks::ids(tokenizer, mark)).collect::<Result<Vec<_>, _>>();
        let gap = close.iter().find_map(|close| Some(force.split_once(close)?.1)).unwrap_or_default();
        Ok(Self {
            format,
            open: reasoning.start == Start::Reasoning,
            budget,
            ends,
            opens: all(format.open)?,
            closes: all(&close)?,
            always_closes: format.harmony && !headers,
            close,
            closing: Arc::new(marks::ids(tokenizer, force)?),
            gap: Arc::new(marks::ids(tokenizer, gap)?),
        })
    }
}
