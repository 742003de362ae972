//! Translation: foreign JSON ⇄ our requests. Pure: no sockets, and no files after the start.
//!
//! [`Service`] is what both doors drive, the job queue ([`Service::job`]) and HTTP ([`Service::call`]). A request takes one way, whatever
//! dialect it is written in:
//!
//! 1. [`routes`] tells the dialect by the path, [`job`] by the input of a job, and [`models`] which model is asked for.
//! 2. The dialect (`dialects/`) reads the body into one neutral `request::GenerationRequest`: `fields` checks types and ranges, `options`
//!    reads what all routes share, `prompt/` renders and tokenizes, `length` bounds the answer.
//!    `grammar/` compiles what the answer must be; `enforce/` holds thoughts to their budget, the answer behind them to its grammar, and
//!    calls to their tools.
//! 3. `run` submits its sequences; a `sequence_task` for each turns tokens into text, and a parser of `parse/` turns text into typed
//!    [`delta::Delta`]s.
//! 4. The dialect writes the deltas as its own objects.
//!
//! Calls that generate nothing are in `calls/`, those of models that embed texts or score them in `pooling/`; `openapi/` describes all routes.
//!
//! Neither the run nor the engine knows a dialect, and no dialect knows another.

pub mod batch;
pub mod body;
mod calls;
mod clock;
pub mod delta;
mod dialects;
mod enforce;
pub mod failure;
mod fields;
pub mod frames;
pub mod grammar;
mod job;
mod length;
mod logprobs;
pub mod model;
mod model_list;
mod models;
pub mod openapi;
mod options;
mod parse;
mod pooling;
mod prompt;
pub mod reclaim;
mod request;
mod response_store;
pub mod routes;
mod run;
mod running;
mod sequence_task;
mod served;
mod service;
pub mod tally;
#[cfg(test)]
mod tests;
mod times;
mod tools;

pub use model::ModelInfo;
pub use models::LoadedModel;
pub use served::check_settings;
pub use service::{Call, Pieces, Reply, Service};
