//! One of several constraints, as long as nothing has decided which; and a fixed row of tokens as one of them.

use crate::engine::{Constraint, Next, TokenMask};
use crate::error::Failure;

/// What any of its parts allows. A part that does not allow what came is out.
#[derive(Clone)]
pub struct Either {
    parts: Vec<Part>,
    /// Tokens so far.
    len: usize,
}

#[derive(Clone)]
struct Part {
    constraint: Box<dyn Constraint>,
    /// It took so many tokens, and did not allow the next one.
    out_at: Option<usize>,
}

impl Either {
    pub fn new(constraints: Vec<Box<dyn Constraint>>) -> Self {
        Self { parts: constraints.into_iter().map(|constraint| Part { constraint, out_at: None }).collect(), len: 0 }
    }

    fn open(&mut self) -> impl Iterator<Item = &mut Part> {
        self.parts.iter_mut().filter(|part| part.out_at.is_none())
    }
}

/// The tokens that a constraint allows next; `None` = all.
fn allowed(constraint: &mut dyn Constraint) -> Result<Option<TokenMask>, Failure> {
    Ok(match constraint.next()? {
        Next::Anything => None,
        Next::Masked => Some(constraint.mask()?),
        Next::Forced(ids) => Some(TokenMask::only(ids.get(..1).unwrap_or_default())),
        Next::End | Next::Full => Some(TokenMask::only(&[])),
    })
}

impl Constraint for Either {
    fn next(&mut self) -> Result<Next, Failure> {
        let (mut last, mut count) = (Next::End, 0);
        for part in self.open() {
            match part.constraint.next()? {
                Next::End | Next::Full => {}
                next => (last, count) = (next, count + 1),
            }
        }
        Ok(if count > 1 { Next::Masked } else { last })
    }

    fn mask(&mut self) -> Result<TokenMask, Failure> {
        let mut all = TokenMask::only(&[]);
        for part in self.open() {
            match allowed(&mut *part.constraint)? {
                Some(mask) => all.add(&mask),
                None => return Err(Failure::internal("a part of what an answer may be allows anything")),
            }
        }
        Ok(all)
    }

    fn accept(&mut self, token: u32) -> Result<(), Failure> {
        let len = self.len;
        let several = self.open().count() > 1;
        let mut taken = false;
        for part in self.open() {
            // A part that is alone says itself what is wrong with a token.
            if !several || allowed(&mut *part.constraint)?.is_none_or(|mask| mask.allows(token)) {
                part.constraint.accept(token)?;
                taken = true;
            } else {
                part.out_at = Some(len);
            }
        }
        self.len += 1;
        if taken { Ok(()) } else { Err(Failure::internal("an answer has a token that nothing allows")) }
    }

    fn rollback(&mut self, count: usize) -> Result<(), Failure> {
        let len = self.len - count;
        for part in &mut self.parts {
            let taken = part.out_at.unwrap_or(self.len);
            if taken >= len {
                part.constraint.rollback(taken - len)?;
                part.out_at = None;
            }
        }
        self.len = len;
        Ok(())
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// These tokens, then what another one says, or the end.
#[derive(Clone)]
pub struct Row {
    ids: Vec<u32>,
    at: usize,
    then: Option<Box<dyn Constraint>>,
}

impl Row {
    pub fn new(ids: Vec<u32>) -> Self {
        Self { ids, at: 0, then: None }
    }

    pub fn before(ids: Vec<u32>, then: Box<dyn Constraint>) -> Self {
        Self { ids, at: 0, then: Some(then) }
    }

    /// What comes behind the tokens, if they are over.
    fn behind(&mut self) -> Option<&mut Box<dyn Constraint>> {
        self.then.as_mut().filter(|_| self.at >= self.ids.len())
    }
}

impl Constraint for Row {
    fn next(&mut self) -> Result<Next, Failure> {
        if let Some(then) = self.behind() {
            return then.next();
        }
        Ok(match &self.ids[self.at.min(self.ids.len())..] {
            [] => Next::End,
            rest => Next::Forced(rest.to_vec()),
        })
    }

    fn mask(&mut self) -> Result<TokenMask, Failure> {
        if let Some(then) = self.behind() {
            return then.mask();
        }
        Ok(TokenMask::only(self.ids.get(self.at..=self.at).unwrap_or_default()))
    }

    fn accept(&mut self, token: u32) -> Result<(), Failure> {
        if let Some(then) = self.behind() {
            then.accept(token)?;
        } else if self.ids.get(self.at) != Some(&token) {
            return Err(Failure::internal(format!("token {token} came in place of {:?}", self.ids.get(self.at))));
        }
        self.at += 1;
        Ok(())
    }

    fn rollback(&mut self, count: usize) -> Result<(), Failure> {
        let behind = self.at.saturating_sub(self.ids.len()).min(count);
        self.at -= count;
        match &mut self.then {
            Some(then) if behind > 0 => then.rollback(behind),
            _ => Ok(()),
        }
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}
