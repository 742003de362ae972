//! worker-candle: a RunPod serverless worker that serves open language models from one binary.
//!
//! # The life of one request
//!
//! 1. [`runpod::poll`] takes a job from the queue, or [`server::openai`] reads a body.
//! 2. A dialect of [`api`] reads it into one neutral request: validated, template rendered, tokenized by [`text`]. Bad input ends here, with
//!    its status. Each of its sequences is an [`engine::Request`].
//! 3. [`engine`] admits it when blocks of the KV cache allow, and names rows, slots and blocks in a [`models::Plan`].
//! 4. [`models`] computes one step for all rows with the [`kernels`] of its device, samples, and returns token ids.
//! 5. [`engine`] settles: events out, blocks freed.
//! 6. The request's own task turns ids into text: whole characters, and never a piece of a stop string. A parser turns the text into typed
//!    deltas.
//! 7. The dialect writes the deltas as its own objects; `runpod::outbox` or server-sent events carry them off.
//!
//! Dropping the receiving end cancels: the row and its blocks are free within one step.
//!
//! # One way only
//!
//! `main → app → {runpod, server} → api → {engine, text} → models → {checkpoint, kernels}`. A module uses only what stands to its right;
//! [`config`], [`error`] and [`telemetry`] may be used by all and use none. `runpod` and `server` never see each other: both drive the same
//! [`api::Service`], so what works on a laptop works in production. JSON never crosses to the right of `api`, tensors never to the left of
//! `models`. [`kernels`] is a crate of its own (`src/kernels`); for the others `tests/integration/dependency_rule.rs` fails on a breach.

pub mod api;
pub mod app;
pub mod checkpoint;
pub mod config;
pub mod engine;
pub mod error;
pub mod models;
pub mod runpod;
pub mod server;
pub mod telemetry;
pub mod text;

pub use worker_candle_kernels as kernels;
