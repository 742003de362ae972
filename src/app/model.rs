//! From a model's name to a service that answers.

use std::sync::Arc;
use std::time::Instant;

use crate::api::{ModelInfo, Service};
use crate::checkpoint::files::ModelFiles;
use crate::checkpoint::hub;
use crate::config::Settings;
use crate::engine::{self, Handle};
use crate::error::Failure;
use crate::models::Vocabulary;
use crate::models::runner::{About, ModelRunner};
use crate::text::tokenizer::Tokenizer;

/// A model that is ready to answer.
pub struct Loaded {
    pub service: Arc<Service>,
    pub engine: Handle,
}

/// Finds the model, loads tokenizer and weights side by side, starts the engine.
pub async fn load(settings: &Settings) -> Result<Loaded, Failure> {
    let begin = Instant::now();
    let files = hub::fetch(&settings.model, &settings.hub).await?;
    let found = begin.elapsed();
    let tokenizer_files = files.clone();
    let (loaded, engine_waits) = std::sync::mpsc::sync_channel(1);
    let tokenizer = tokio::task::spawn_blocking(move || {
        let tokenizer = Tokenizer::load(&tokenizer_files).map(Arc::new);
        // Nobody waits when the weights have failed already.
        let _ = loaded.send(tokenizer.as_ref().map(|tokenizer| tokenizer.vocabulary().clone()).map_err(Clone::clone));
        tokenizer
    });
    let (engine, about) = start_engine(settings, &files, move || {
        engine_waits.recv().unwrap_or_else(|_| Err(Failure::internal("the tokenizer's thread ended")))
    })
    .await?;
    let tokenizer = tokenizer.await.map_err(|error| Failure::internal(format!("loading the tokenizer: {error}")))??;
    let quantization = settings.engine.quantization.name();
    let info = ModelInfo { quantization, weights: about.weights.clone(), ..ModelInfo::from_files(&files)? };
    let service = Arc::new(Service::new(settings.api.clone(), engine.clone(), tokenizer, info)?);
    tracing::info!("model {} from {}", files.name, files.origin);
    tracing::info!("device {}, {} threads, weights {}, {} parameters", about.device, about.threads, about.weights, about.parameters);
    engine.limits().pooling.iter().for_each(|pooling| tracing::info!("task: {}", pooling.describe()));
    about.memory.iter().for_each(|line| tracing::info!("{line}"));
    tracing::info!("ready in {} ms (finding the files {} ms)", begin.elapsed().as_millis(), found.as_millis());
    Ok(Loaded { service, engine })
}

/// Starts the engine alone.
pub async fn start_engine(
    settings: &Settings,
    files: &ModelFiles,
    vocabulary: impl FnOnce() -> Result<Vocabulary, Failure> + Send + 'static,
) -> Result<(Handle, About), Failure> {
    let (send, receive) = tokio::sync::oneshot::channel();
    let (files, engine_settings) = (files.clone(), settings.engine.clone());
    let load = move || {
        let runner = ModelRunner::load(&files, vocabulary, &engine_settings)?;
        let _ = send.send(runner.about.clone());
        Ok(runner)
    };
    let defaults = engine::EngineOptions::default();
    let options = engine::EngineOptions {
        max_waiting: settings.engine.max_waiting.unwrap_or(defaults.max_waiting),
        prefix_caching: settings.engine.prefix_caching.unwrap_or(defaults.prefix_caching),
        proposer: settings.engine.speculative.map(|given| engine::NgramProposer {
            draft_len: given.tokens,
            max: given.lookup_max,
            min: given.lookup_min,
            max_rows: given.max_rows,
        }),
        log_stats: !settings.engine.disable_log_stats,
    };
    let engine = engine::start(load, options).await?;
    let about = receive.await.map_err(|_| Failure::internal("the engine ended while starting"))?;
    Ok((engine, about))
}
