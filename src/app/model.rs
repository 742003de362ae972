//! From models' names to a service that answers.

use std::sync::Arc;
use std::time::Instant;

use crate::api::{LoadedModel, ModelInfo, Service};
use crate::checkpoint::files::ModelFiles;
use crate::checkpoint::hub;
use crate::config::Settings;
use crate::engine::{self, Handle};
use crate::error::Failure;
use crate::models::Vocabulary;
use crate::models::runner::{About, Beside, ModelRunner};
use crate::text::tokenizer::Tokenizer;

/// Finds the models, loads them one after the other, starts their engines.
pub async fn load(settings: &Settings) -> Result<Arc<Service>, Failure> {
    let begin = Instant::now();
    let several = !settings.more_models.is_empty();
    let named = |name: &str, failure: Failure| if several { failure.of(name) } else { failure };
    let mut files = Vec::new();
    for name in settings.models() {
        files.push(hub::fetch(name, &settings.hub).await.map_err(|failure| named(name, failure))?);
    }
    let found = begin.elapsed();
    let beside = if several { plan(settings, &files).await?.into_iter().map(Some).collect() } else { vec![None] };
    let mut models = Vec::with_capacity(files.len());
    for (files, beside) in files.iter().zip(beside) {
        models.push(load_one(settings, files, beside).await.map_err(|failure| named(&files.name, failure))?);
    }
    let service = Service::of_models(settings.api.clone(), models)?;
    tracing::info!("ready in {} ms (finding the files {} ms)", begin.elapsed().as_millis(), found.as_millis());
    Ok(Arc::new(service))
}

/// How several models share the memory and the processors.
pub async fn plan(settings: &Settings, files: &[ModelFiles]) -> Result<Vec<Beside>, Failure> {
    let (files, engine) = (files.to_vec(), settings.engine.clone());
    let planned = tokio::task::spawn_blocking(move || Beside::plan(&files, &engine)).await;
    planned.map_err(|error| Failure::internal(format!("planning the memory: {error}")))?
}

/// Loads tokenizer and weights side by side.
async fn load_one(settings: &Settings, files: &ModelFiles, beside: Option<Beside>) -> Result<LoadedModel, Failure> {
    let tokenizer_files = files.clone();
    let (loaded, engine_waits) = std::sync::mpsc::sync_channel(1);
    let tokenizer = tokio::task::spawn_blocking(move || {
        let tokenizer = Tokenizer::load(&tokenizer_files).map(Arc::new);
        // Nobody waits when the weights have failed already.
        let _ = loaded.send(tokenizer.as_ref().map(|tokenizer| tokenizer.vocabulary().clone()).map_err(Clone::clone));
        tokenizer
    });
    let vocabulary = move || engine_waits.recv().unwrap_or_else(|_| Err(Failure::internal("the tokenizer's thread ended")));
    let (engine, about) = start_engine(settings, files, beside, vocabulary).await?;
    let tokenizer = tokenizer.await.map_err(|error| Failure::internal(format!("loading the tokenizer: {error}")))??;
    let quantization = settings.engine.quantization.name();
    let info = ModelInfo { quantization, weights: about.weights.clone(), ..ModelInfo::from_files(files)? };
    tracing::info!("model {} from {}", files.name, files.origin);
    tracing::info!("device {}, {} threads, weights {}, {} parameters", about.device, about.threads, about.weights, about.parameters);
    engine.limits().pooling.iter().for_each(|pooling| tracing::info!("task: {}", pooling.describe()));
    about.memory.iter().for_each(|line| tracing::info!("{line}"));
    Ok(LoadedModel { engine, tokenizer, info })
}

/// Starts the engine alone.
pub async fn start_engine(
    settings: &Settings,
    files: &ModelFiles,
    beside: Option<Beside>,
    vocabulary: impl FnOnce() -> Result<Vocabulary, Failure> + Send + 'static,
) -> Result<(Handle, About), Failure> {
    let (send, receive) = tokio::sync::oneshot::channel();
    let name = beside.as_ref().map(|_| files.name.clone());
    let (files, engine_settings) = (files.clone(), settings.engine.clone());
    let load = move || {
        let runner = ModelRunner::load_beside(&files, vocabulary, &engine_settings, beside)?;
        let _ = send.send(runner.about.clone());
        Ok(runner)
    };
    let defaults = engine::EngineOptions::default();
    let options = engine::EngineOptions {
        max_waiting: settings.engine.max_waiting,
        prefix_caching: settings.engine.prefix_caching.unwrap_or(defaults.prefix_caching),
        proposer: settings.engine.speculative.map(|given| engine::NgramProposer {
            draft_len: given.tokens,
            max: given.lookup_max,
            min: given.lookup_min,
            max_rows: given.max_rows,
        }),
        log_stats: !settings.engine.disable_log_stats,
        name,
    };
    let engine = engine::start(load, options).await?;
    let about = receive.await.map_err(|_| Failure::internal("the engine ended while starting"))?;
    Ok((engine, about))
}
