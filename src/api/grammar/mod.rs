//! Structured output: what an answer must be, as a grammar that the engine samples under.
//!
//! [`request`] reads the fields of every spelling into one [`Grammar`]; [`Grammars::compile`] makes it a [`CompiledGrammar`], from which each
//! sequence gets a [`Constraint`] of its own. Parsing and masks are llguidance's; [`vocabulary`] tells it which bytes each token stands for.
//!
//! A grammar of ours, for a tool call say, goes the same way: `grammars.compile(&Grammar::json_schema(schema))`, or
//! `Grammar::Lark(text)`, in which `<|name|>` is a special token by name and `<[123]>` any token by its id.

use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Matcher, ParserFactory};
use serde_json::Value;

use crate::api::grammar::cache::{Compiling, MOST_COMPILING, overloaded};
use crate::api::grammar::matcher::GrammarConstraint;
use crate::error::{Failure, Kind};
use crate::text::tokenizer::Tokenizer;

mod cache;
mod compiled;
mod expansion;
mod gbnf;
mod lark;
mod matcher;
pub mod request;
pub mod schema;
mod source;
mod structural_tag;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use compiled::CompiledGrammar;
pub use lark::lark_string;
pub use source::{Grammar, JsonOptions, guided_schema};
pub use vocabulary::tokens_within;

/// A grammar that takes longer to compile is refused. It goes on all the same: whoever asks for it again finds it ready, or is refused at once.
const COMPILE_LIMIT: Duration = Duration::from_secs(1);
/// The stack of a compiling thread: schemas and expressions nest.
const COMPILE_STACK: usize = 16 << 20;

/// Compiles grammars for one model, and keeps what became of the last ones.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    vocab_size: usize,
    eos_token_ids: Arc<Vec<u32>>,
    /// Made with the first grammar: most workers see none.
    factory: OnceLock<Result<Arc<ParserFactory>, String>>,
    cache: Mutex<cache::Cache>,
    places: Arc<Places>,
}

impl Grammars {
    /// `vocab_size`: the ids that the engine may sample are below it.
    pub fn new(tokenizer: Arc<Tokenizer>, vocab_size: usize, eos_token_ids: Arc<Vec<u32>>) -> Self {
        Self { tokenizer, vocab_size, eos_token_ids, factory: OnceLock::new(), cache: Mutex::default(), places: Arc::default() }
    }

    /// Takes a second at most. Not to be called on a thread that serves sockets. The failure names no field.
    pub fn compile(&self, grammar: &Grammar) -> Result<Arc<CompiledGrammar>, Failure> {
        grammar.check_size().map_err(refused)?;
        let key = grammar.key();
        let (compiling, is_new) = self.cache.lock().unwrap_or_else(PoisonError::into_inner).get_or_put(&key);
        if is_new && let Err(failure) = self.start(grammar, &compiling) {
            // Another time it may be possible.
            self.cache.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            compiling.end(Err(failure));
        }
        compiling.wait(COMPILE_LIMIT).unwrap_or_else(|| {
            let limit = COMPILE_LIMIT.as_secs_f64();
            Err(refused(format!(
                "it takes longer than {limit} s to compile: make it smaller, above all large bounds (maxItems, maxLength, {{m,n}})"
            )))
        })
    }

    /// Compiles on a thread of its own. Fails when no thread is to be had.
    fn start(&self, grammar: &Grammar, compiling: &Arc<Compiling>) -> Result<(), Failure> {
        let source = match grammar.to_llguidance() {
            Ok(source) => source,
            Err(message) => {
                compiling.end(Err(refused(message)));
                return Ok(());
            }
        };
        let factory = self.factory()?;
        let place = self.places.take().ok_or_else(overloaded)?;
        compiling.begin();
        let compiling = compiling.clone();
        let body = move || {
            let result = compile(&factory, source);
            drop(place);
            compiling.end(result.map(|start| Arc::new(CompiledGrammar::new(start))).map_err(refused));
        };
        let thread = std::thread::Builder::new().name("grammar".to_owned()).stack_size(COMPILE_STACK).spawn(body);
        thread.map(|_| ()).map_err(|error| Failure::internal(format!("cannot start a thread for a grammar: {error}")))
    }

    fn factory(&self) -> Result<Arc<ParserFactory>, Failure> {
        let made = self.factory.get_or_init(|| {
            let begin = std::time::Instant::now();
            let made = self.build_factory();
            tracing::debug!("vocabulary for grammars built in {} ms", begin.elapsed().as_millis());
            made
        });
        made.clone().map_err(|error| Failure::internal(format!("no grammar can be used with this model's tokenizer: {error}")))
    }

    fn build_factory(&self) -> Result<Arc<ParserFactory>, String> {
        let environment = vocabulary::environment(&self.tokenizer, self.vocab_size, &self.eos_token_ids);
        let slices = llguidance::earley::SlicedBiasComputer::json_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices).map_err(|error| error.to_string())?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.verbose_errors = false;
        // A state takes one to two kilobytes, and each sequence has its own: JSON schemas of daily use need hundreds.
        limits.max_lexer_states = 20_000;
        limits.max_grammar_size = 100_000;
        Ok(Arc::new(factory))
    }
}

/// The grammar is the caller's mistake.
fn refused(message: String) -> Failure {
    Failure::new(Kind::BadRequest, message).code("invalid_value")
}

/// Places for compiling.
#[derive(Default)]
struct Places {
    taken: Mutex<usize>,
    freed: Condvar,
}

/// One of them.
struct Place(Arc<Places>);

impl Places {
    /// Waits for a place, but not longer than the limit.
    fn take(self: &Arc<Self>) -> Option<Place> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.freed.wait_timeout_while(taken, COMPILE_LIMIT, |taken| *taken >= MOST_COMPILING);
        let (mut taken, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return None;
        }
        *taken += 1;
        Some(Place(self.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}

fn compile(factory: &ParserFactory, source: TopLevelGrammar) -> Result<GrammarConstraint, String> {
    let parser = factory.create_parser(source).map_err(|error| matcher::message(&format!("{error:#}")))?;
    let mut constraint = GrammarConstraint::new(Matcher::new(Ok(parser)));
    // What fails at the first token is better refused now. It also warms the part that all sequences share.
    constraint.check_start().map_err(|failure| failure.message)?;
    Ok(constraint)
}

impl Grammar {
    /// The JSON values that meet `schema`.
    pub fn json_schema(schema: Value) -> Self {
        Self::JsonSchema(schema, JsonOptions::default())
    }
}
