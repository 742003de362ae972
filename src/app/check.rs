//! `check`: what was resolved, and whether it would work, without loading the weights.

use std::process::ExitCode;

use super::say;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::files::{ModelFiles, Source};
use crate::checkpoint::hub;
use crate::config::{self, Settings};
use crate::error::Failure;
use crate::models::families::Model;
use crate::models::runner::Planned;
use crate::models::spec::ModelSpec;
use crate::models::tensors::Tensors;
use crate::text::tokenizer::Tokenizer;

/// Prints everything it finds out; exit 1 when something would stop a start.
pub async fn run(settings: &Settings) -> Result<ExitCode, Failure> {
    say(config::report(settings).trim_end());
    match model(settings).await {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(failure) => {
            say(&format!("problem: {failure}"));
            Ok(ExitCode::FAILURE)
        }
    }
}

async fn model(settings: &Settings) -> Result<(), Failure> {
    let Some(files) = hub::find_local(&settings.model, &settings.hub)? else {
        say(&format!("model: {} is not on this machine", settings.model));
        if settings.hub.offline {
            // The same words a start would end with.
            return hub::fetch(&settings.model, &settings.hub).await.map(|_| ());
        }
        say("it would be downloaded at start; `worker-candle pull` does it now");
        return Ok(());
    };
    say(&format!("model: {} from {}", files.name, files.origin));
    list_files(&files);
    let model = Model::from_files(&files)?.for_task(&files, &settings.engine)?;
    let checkpoint = Checkpoint::open(&files, model.spec.quantized.as_deref())?;
    let tensors = Tensors::find(&checkpoint, &model)?;
    let parameters = ModelSpec { tied: tensors.tied, ..model.spec.clone() }.parameters();
    say(&format!("architecture: {} with {} layers, {parameters} parameters", model.spec.model_type, model.spec.layers.len()));
    model.spec.pooling.iter().for_each(|pooling| say(&format!("task: {}", pooling.describe())));
    say(&format!("checkpoint: {}", tensors.describe()));
    let tokenizer = Tokenizer::load(&files)?;
    say(&format!("tokenizer: {} ids", tokenizer.vocab_size()));
    let plan = Planned::new(&model, &tensors, tokenizer.vocab_size(), &settings.engine)?;
    say(&format!("device: {}", plan.device));
    say(&format!("weights held as: {}", plan.weights));
    plan.memory.lines().iter().for_each(|line| say(line));
    tensors.warnings.iter().chain(&plan.memory.warnings).for_each(|warning| say(&format!("warning: {warning}")));
    Ok(())
}

fn list_files(files: &ModelFiles) {
    for (name, source) in files.iter() {
        let size = match source {
            Source::Path(path) => std::fs::metadata(path).map_or(0, |metadata| metadata.len()),
            Source::Embedded(bytes) => bytes.len() as u64,
            Source::Made(bytes) => bytes.len() as u64,
        };
        say(&format!("  {name}: {size} bytes"));
    }
}
