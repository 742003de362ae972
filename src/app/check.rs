//! `check`: what was resolved, and whether it would work, without loading the weights.

use std::process::ExitCode;

use super::model::plan;
use super::say;
use crate::api;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::files::{ModelFiles, Source};
use crate::checkpoint::hub;
use crate::config::{self, Settings};
use crate::error::Failure;
use crate::models::families::Model;
use crate::models::memory::Share;
use crate::models::prepared;
use crate::models::runner::{Beside, Planned};
use crate::models::spec::ModelSpec;
use crate::models::tensors::Tensors;
use crate::text::tokenizer::Tokenizer;

/// Prints everything it finds out; exit 1 when something would stop a start.
pub async fn run(settings: &Settings) -> Result<ExitCode, Failure> {
    say(config::report(settings).trim_end());
    let mut code = ExitCode::SUCCESS;
    for failure in [api::check_settings(&settings.api), models(settings).await].into_iter().filter_map(Result::err) {
        say(&format!("problem: {failure}"));
        code = ExitCode::FAILURE;
    }
    Ok(code)
}

async fn models(settings: &Settings) -> Result<(), Failure> {
    let mut all = Vec::new();
    let mut missing = false;
    for name in settings.models() {
        match hub::find_local(name, &settings.hub)? {
            Some(files) => all.push(files),
            None => {
                say(&format!("model: {name} is not on this machine"));
                if settings.hub.offline {
                    // The same words a start would end with.
                    return hub::fetch(name, &settings.hub).await.map(|_| ());
                }
                say("it would be downloaded at start; `worker-candle pull` does it now");
                missing = true;
            }
        }
    }
    if settings.more_models.is_empty() {
        return all.iter().try_for_each(|files| model(files, settings, None));
    }
    if missing {
        say("memory: it is planned when all models are here");
        return Ok(());
    }
    let beside = plan(settings, &all).await?;
    let of_each =
        |(files, beside): (&ModelFiles, Beside)| model(files, settings, Some(beside.share)).map_err(|failure| failure.of(&files.name));
    all.iter().zip(beside).try_for_each(of_each)
}

/// `share`: where the model is one of several.
fn model(files: &ModelFiles, settings: &Settings, share: Option<Share>) -> Result<(), Failure> {
    say(&format!("model: {} from {}", files.name, files.origin));
    list_files(files);
    let model = Model::from_files(files)?.for_task(files, &settings.engine)?;
    let checkpoint = Checkpoint::open(files, model.spec.quantized.as_deref())?;
    let tensors = Tensors::find(&checkpoint, &model)?;
    let parameters = ModelSpec { tied: tensors.tied, ..model.spec.clone() }.parameters();
    say(&format!("architecture: {} with {} layers, {parameters} parameters", model.spec.model_type, model.spec.layers.len()));
    model.spec.pooling.iter().for_each(|pooling| say(&format!("task: {}", pooling.describe())));
    say(&format!("checkpoint: {}", tensors.describe()));
    let tokenizer = Tokenizer::load(files)?;
    say(&format!("tokenizer: {} ids", tokenizer.vocab_size()));
    let plan = Planned::new(&model, &tensors, tokenizer.vocab_size(), &settings.engine, share)?;
    say(&format!("device: {}", plan.device));
    say(&format!("weights held as: {}", plan.weights));
    say(&prepared::describe(files, &settings.engine));
    plan.lines().iter().for_each(|line| say(line));
    tensors.warnings.iter().chain(plan.warnings()).for_each(|warning| say(&format!("warning: {warning}")));
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
