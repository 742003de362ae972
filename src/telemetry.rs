//! Logs in the platform's format.
