//! One job from the command line or a file: its answer on stdout, piece by piece.

use std::process::ExitCode;

use futures::StreamExt;
use serde_json::Value;

use super::{model, say};
use crate::api::{Reply, failure};
use crate::config::Settings;
use crate::error::Failure;

/// Runs `{"id"?, "input"}`; exit 1 when the job fails.
pub async fn run(settings: Settings, job: &str) -> Result<ExitCode, Failure> {
    let job: Value = serde_json::from_str(job).map_err(|error| Failure::internal(format!("the test job is not JSON: {error}")))?;
    let input = job.get("input").filter(|input| !input.is_null()).cloned();
    let input = input.ok_or_else(|| Failure::internal("the test job has no \"input\"; it is written {\"input\": {…}}"))?;
    let id = job["id"].as_str().unwrap_or("local_test").to_string();
    let service = model::load(&settings).await?;
    match print_answer(service.job(input, &id).await).await {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(failed) => {
            say(&failure::job_error(&failed));
            Ok(ExitCode::FAILURE)
        }
    }
}

async fn print_answer(answer: Result<Reply, Failure>) -> Result<(), Failure> {
    match answer? {
        Reply::Whole(value) => say(&value.to_string()),
        Reply::Stream(mut pieces) => {
            while let Some(piece) = pieces.next().await {
                match piece? {
                    Value::String(frames) => say(frames.trim_end()),
                    value => say(&value.to_string()),
                }
            }
        }
    }
    Ok(())
}
