//! The platform side of the worker: takes jobs, returns results; knows nothing of tokens.
