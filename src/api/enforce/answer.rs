//! One answer, followed token by token: thoughts, their end, and what comes behind them.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::api::enforce::calls::Opened;
use crate::api::enforce::either::{Either, Row};
use crate::api::enforce::{AnswerRule, Form, Rules, Thinking, marks};
use crate::api::parse::marks::{Begins, begins};
use crate::engine::{Constraint, Next, TokenMask};
use crate::error::Failure;

/// So many tokens can be taken back: more than a row ever has drafts.
const UNDONE_AT_MOST: usize = 1024;

/// Follows one answer by the rules of its request.
pub struct AnswerConstraint {
    rules: Arc<Rules>,
    stage: Stage,
    /// What decides now, where a grammar does.
    grammar: Option<Box<dyn Constraint>>,
    undo: VecDeque<Undo>,
}

/// Where the answer is.
#[derive(Debug, Clone)]
enum Stage {
    /// It may yet open a thought.
    Undecided { text: Vec<u8>, ids: Vec<u32> },
    /// In a thought. `tail`: its last bytes, which may begin a mark.
    Thinking { tail: Vec<u8>, tokens: usize },
    /// These tokens come, from that one on; then the answer.
    Fixed { ids: Arc<Vec<u32>>, at: usize },
    /// Behind the thoughts. `tail`: as much of the text as may begin a call.
    Answer { tail: Vec<u8>, tokens: usize, begun: bool },
    /// In a call.
    Call { tokens: usize },
}

impl Stage {
    fn is_answer(&self) -> bool {
        matches!(self, Self::Answer { .. })
    }
}

/// What takes one token back.
struct Undo {
    stage: Stage,
    grammar: Change,
}

/// What a token did to the grammar.
enum Change {
    None,
    Accepted,
    /// Another one is in its place. `accepted`: the old one had taken the token.
    Replaced {
        old: Option<Box<dyn Constraint>>,
        accepted: bool,
    },
}

impl Form {
    fn constraint(&self) -> Box<dyn Constraint> {
        match self.header.is_empty() {
            true => self.grammar.constraint(),
            false => Box::new(Row::before(self.header.clone(), self.grammar.constraint())),
        }
    }

    /// The same behind these tokens; `None` when it does not begin with them.
    fn constraint_after(&self, ids: &[u32]) -> Option<Box<dyn Constraint>> {
        let known = ids.len().min(self.header.len());
        match ids[..known] == self.header[..known] {
            false => None,
            true if known == self.header.len() => self.grammar.constraint_after(&ids[known..]),
            true => Some(Box::new(Row::before(self.header[known..].to_vec(), self.grammar.constraint()))),
        }
    }
}

impl Rules {
    /// What one sequence is sampled under.
    pub fn constraint(self: &Arc<Self>) -> Result<Box<dyn Constraint>, Failure> {
        Ok(Box::new(AnswerConstraint::new(self.clone())?))
    }
}

impl AnswerConstraint {
    pub fn new(rules: Arc<Rules>) -> Result<Self, Failure> {
        let mut new = Self { stage: Stage::Thinking { tail: Vec::new(), tokens: 0 }, grammar: None, undo: VecDeque::new(), rules };
        let rules = new.rules.clone();
        match &rules.thinking {
            None => {
                new.begin_answer(&[], 0)?;
            }
            Some(thinking) if thinking.budget == Some(0) && thinking.open => new.stage = fixed(&thinking.closing),
            Some(thinking) if thinking.open => {}
            Some(thinking) => {
                new.stage = Stage::Undecided { text: Vec::new(), ids: Vec::new() };
                new.grammar = new.first_words(thinking);
            }
        }
        Ok(new)
    }

    /// The grammar must have its say before the answer may end.
    fn is_demanded(&self) -> bool {
        matches!(self.rules.answer, AnswerRule::Grammars(_))
    }

    /// What the first tokens may be, where a grammar says what the answer is: the opening of a thought, or the answer.
    fn first_words(&self, thinking: &Thinking) -> Option<Box<dyn Constraint>> {
        let AnswerRule::Grammars(grammars) = &self.rules.answer else { return None };
        let row = |ids: &Vec<u32>| -> Box<dyn Constraint> { Box::new(Row::new(ids.clone())) };
        let mut parts: Vec<Box<dyn Constraint>> = Vec::new();
        if thinking.budget != Some(0) {
            parts.extend(thinking.opens.iter().map(row));
        }
        match thinking.always_closes {
            true => parts.extend(thinking.closes.iter().map(row)),
            false => parts.extend(grammars.iter().map(Form::constraint)),
        }
        Some(Box::new(Either::new(parts)))
    }

    fn step(&mut self, token: u32) -> Result<Change, Failure> {
        let rules = self.rules.clone();
        let bytes = rules.tokenizer.token_bytes(token).unwrap_or_default();
        match (&mut self.stage, &rules.thinking) {
            (Stage::Undecided { text, ids }, Some(thinking)) => {
                text.extend(bytes);
                ids.push(token);
                if self.grammar.is_some() { self.decide_by_ids(token, thinking) } else { self.decide_by_text(thinking) }
            }
            (Stage::Thinking { tail, tokens }, Some(thinking)) => {
                tail.extend(bytes);
                *tokens += 1;
                self.think(thinking)
            }
            (Stage::Fixed { ids, at }, _) => {
                if ids.get(*at) != Some(&token) {
                    return Err(Failure::internal(format!("token {token} came in place of {:?}", ids.get(*at))));
                }
                *at += 1;
                if *at < ids.len() { Ok(Change::None) } else { self.begin_answer(&[], 0) }
            }
            (Stage::Answer { tail, tokens, .. }, _) => {
                *tokens += 1;
                match (&mut self.grammar, &rules.answer) {
                    (Some(grammar), _) => grammar.accept(token).map(|()| Change::Accepted),
                    (None, AnswerRule::Calls(_)) => {
                        tail.extend(bytes);
                        self.look_for_calls()
                    }
                    (None, _) => Ok(Change::None),
                }
            }
            (Stage::Call { tokens }, _) => {
                *tokens += 1;
                let tokens = *tokens;
                let Some(grammar) = &mut self.grammar else { return Ok(Change::None) };
                grammar.accept(token)?;
                if grammar.next()? != Next::End {
                    return Ok(Change::Accepted);
                }
                self.stage = match &rules.answer {
                    // Whatever else came in its message would be read as arguments.
                    AnswerRule::Calls(calls) if calls.harmony => Stage::Fixed { ids: calls.closing.clone(), at: 0 },
                    _ => Stage::Answer { tail: Vec::new(), tokens, begun: false },
                };
                Ok(Change::Replaced { old: self.grammar.take(), accepted: true })
            }
            (Stage::Undecided { .. } | Stage::Thinking { .. }, None) => self.begin_answer(&[], 0),
        }
    }

    /// With a grammar the tokens tell what has begun: only those of a mark, or of an answer, were allowed.
    fn decide_by_ids(&mut self, token: u32, thinking: &Thinking) -> Result<Change, Failure> {
        let (Stage::Undecided { ids, .. }, Some(grammar)) = (&self.stage, &mut self.grammar) else { return Ok(Change::None) };
        grammar.accept(token)?;
        if thinking.opens.contains(ids) {
            let old = self.grammar.take();
            self.begin_thought(&[], thinking)?;
            return Ok(Change::Replaced { old, accepted: true });
        }
        if thinking.always_closes && thinking.closes.contains(ids) {
            let old = self.grammar.take();
            self.end_thought(&[], thinking)?;
            return Ok(Change::Replaced { old, accepted: true });
        }
        let may_open = thinking.opens.iter().any(|mark| mark.starts_with(ids));
        if !may_open && !thinking.always_closes {
            self.stage = Stage::Answer { tail: Vec::new(), tokens: ids.len(), begun: true };
        }
        Ok(Change::Accepted)
    }

    fn decide_by_text(&mut self, thinking: &Thinking) -> Result<Change, Failure> {
        let Stage::Undecided { text, ids } = &self.stage else { return Ok(Change::None) };
        let (format, tokens) = (thinking.format, ids.len());
        let written = String::from_utf8_lossy(text).into_owned();
        let said = written.trim_start();
        match begins(said, format.open.iter().chain(&thinking.close).copied(), false) {
            _ if said.is_empty() => Ok(Change::None),
            Begins::Perhaps => Ok(Change::None),
            Begins::With(mark) if thinking.close.contains(&mark) => self.end_thought(&said.as_bytes()[mark.len()..], thinking),
            Begins::With(mark) => self.begin_thought(&said.as_bytes()[mark.len()..], thinking),
            Begins::No => self.begin_answer(written.as_bytes(), tokens),
        }
    }

    /// `rest`: what has come behind the opening mark.
    fn begin_thought(&mut self, rest: &[u8], thinking: &Thinking) -> Result<Change, Failure> {
        self.stage = Stage::Thinking { tail: rest.to_vec(), tokens: 0 };
        self.think(thinking)
    }

    /// Looks for the end of the thought, and ends it where it is long enough.
    fn think(&mut self, thinking: &Thinking) -> Result<Change, Failure> {
        let Stage::Thinking { tail, tokens } = &mut self.stage else { return Ok(Change::None) };
        if let Some((_, after)) = first_mark(tail, thinking.close.iter().copied()) {
            let rest = tail.split_off(after);
            return self.end_thought(&rest, thinking);
        }
        if let Some((at, _)) = first_mark(tail, thinking.ends.iter().copied()) {
            let rest = tail.split_off(at);
            return self.begin_answer(&rest, 1);
        }
        if thinking.budget.is_some_and(|budget| *tokens >= budget) {
            self.stage = fixed(&thinking.closing);
            return Ok(Change::None);
        }
        cut(tail, thinking.close.iter().chain(&thinking.ends).map(|mark| mark.len()).max().unwrap_or_default());
        Ok(Change::None)
    }

    /// `rest`: what has come behind the closing mark.
    fn end_thought(&mut self, rest: &[u8], thinking: &Thinking) -> Result<Change, Failure> {
        if self.is_demanded() && rest.is_empty() && !thinking.gap.is_empty() {
            self.stage = fixed(&thinking.gap);
            return Ok(Change::None);
        }
        self.begin_answer(rest, usize::from(!rest.is_empty()))
    }

    /// `text`: what has come of the answer already, in so many tokens.
    fn begin_answer(&mut self, text: &[u8], tokens: usize) -> Result<Change, Failure> {
        self.stage = Stage::Answer { tail: text.to_vec(), tokens, begun: false };
        let rules = self.rules.clone();
        match &rules.answer {
            AnswerRule::Anything => Ok(Change::None),
            AnswerRule::Calls(_) => self.look_for_calls(),
            AnswerRule::Grammars(grammars) => {
                let said = String::from_utf8_lossy(text).trim_start().to_owned();
                let ids = marks::ids(&rules.tokenizer, &said)?;
                let mut parts: Vec<_> = grammars.iter().filter_map(|form| form.constraint_after(&ids)).collect();
                if parts.is_empty() {
                    parts.extend(grammars.iter().map(Form::constraint));
                }
                let one = if parts.len() == 1 { parts.pop() } else { None };
                let old = self.grammar.replace(one.unwrap_or_else(|| Box::new(Either::new(parts))));
                Ok(Change::Replaced { old, accepted: false })
            }
        }
    }

    /// Whether the text has come to a mark of a call.
    fn look_for_calls(&mut self) -> Result<Change, Failure> {
        let rules = self.rules.clone();
        let (AnswerRule::Calls(calls), Stage::Answer { tail, tokens, begun }) = (&rules.answer, &mut self.stage) else {
            return Ok(Change::None);
        };
        while let Some((grammar, after)) = match calls.opened(&String::from_utf8_lossy(tail), begun) {
            Opened::Call { grammar, after } => Some((grammar, after)),
            Opened::Perhaps => None,
            Opened::No => {
                cut(tail, calls.longest_mark());
                None
            }
        } {
            let rest = String::from_utf8_lossy(tail)[after..].to_owned();
            if let Some(constraint) = grammar.constraint_after(&marks::ids(&rules.tokenizer, &rest)?) {
                let tokens = *tokens;
                self.stage = Stage::Call { tokens };
                return Ok(Change::Replaced { old: self.grammar.replace(constraint), accepted: false });
            }
            // What one token brought along with the mark makes no call of it: it is text.
            (*tail, *begun) = (rest.into_bytes(), true);
        }
        Ok(Change::None)
    }

    fn tokens(&self) -> usize {
        match &self.stage {
            Stage::Answer { tokens, .. } | Stage::Call { tokens } => *tokens,
            _ => 0,
        }
    }
}

fn fixed(ids: &Arc<Vec<u32>>) -> Stage {
    Stage::Fixed { ids: ids.clone(), at: 0 }
}

/// Where the first of the marks begins, and what is behind it.
fn first_mark<'m>(text: &[u8], marks: impl Iterator<Item = &'m str> + Clone) -> Option<(usize, usize)> {
    let starts =
        |mark: &&'m str| text.windows(mark.len().max(1)).position(|bytes| bytes == mark.as_bytes()).map(|at| (at, at + mark.len()));
    marks.filter_map(|mark| starts(&mark)).min()
}

/// Keeps the last bytes that may begin a mark of at most `longest` bytes.
fn cut(tail: &mut Vec<u8>, longest: usize) {
    tail.drain(..tail.len().saturating_sub(longest.saturating_sub(1)));
}

impl Constraint for AnswerConstraint {
    fn next(&mut self) -> Result<Next, Failure> {
        if self.rules.limit.is_some_and(|limit| self.tokens() >= limit) {
            return match &mut self.grammar {
                Some(grammar) if self.stage.is_answer() => Ok(if grammar.next()? == Next::End { Next::End } else { Next::Full }),
                _ => Ok(Next::Full),
            };
        }
        match (&self.stage, &mut self.grammar) {
            (Stage::Fixed { ids, at }, _) => Ok(Next::Forced(ids.get(*at..).unwrap_or_default().to_vec())),
            (Stage::Thinking { .. }, _) => Ok(if self.is_demanded() { Next::Masked } else { Next::Anything }),
            (_, Some(grammar)) => grammar.next(),
            (_, None) => Ok(Next::Anything),
        }
    }

    fn mask(&mut self) -> Result<TokenMask, Failure> {
        match (&self.stage, &mut self.grammar) {
            (Stage::Thinking { .. }, _) => {
                // Without its answer the sequence must not end.
                let mut mask = TokenMask::from_words(vec![u32::MAX; self.rules.vocab_size.div_ceil(32)]);
                self.rules.ends.iter().for_each(|id| mask.forbid(*id));
                Ok(mask)
            }
            (Stage::Fixed { ids, at }, _) => Ok(TokenMask::only(ids.get(*at..=*at).unwrap_or_default())),
            (_, Some(grammar)) => grammar.mask(),
            (_, None) => Err(Failure::internal("no grammar says what may follow")),
        }
    }

    fn accept(&mut self, token: u32) -> Result<(), Failure> {
        let stage = self.stage.clone();
        let grammar = self.step(token)?;
        if self.undo.len() == UNDONE_AT_MOST {
            self.undo.pop_front();
        }
        self.undo.push_back(Undo { stage, grammar });
        Ok(())
    }

    fn rollback(&mut self, count: usize) -> Result<(), Failure> {
        for _ in 0..count {
            let undo = self.undo.pop_back().ok_or_else(|| Failure::internal("more tokens are taken back than are known"))?;
            self.stage = undo.stage;
            let accepted = match undo.grammar {
                Change::None => false,
                Change::Accepted => true,
                Change::Replaced { old, accepted } => {
                    self.grammar = old;
                    accepted
                }
            };
            if let (true, Some(grammar)) = (accepted, &mut self.grammar) {
                grammar.rollback(1)?;
            }
        }
        Ok(())
    }

    /// The copy cannot take back what came before.
    fn fork(&self) -> Box<dyn Constraint> {
        let (rules, stage, grammar) = (self.rules.clone(), self.stage.clone(), self.grammar.clone());
        Box::new(Self { rules, stage, grammar, undo: VecDeque::new() })
    }
}
