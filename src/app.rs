//! Assembly: find files → load → start engine → worker or server → drain → stop.

use std::process::ExitCode;

pub fn main() -> ExitCode {
    ExitCode::FAILURE
}
