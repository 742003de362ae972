//! The crate from outside, in one program: each further one would cost a minute of linking.

// A test may stop where it stands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod allocations;
mod dependency_rule;
mod worker_and_endpoint;
