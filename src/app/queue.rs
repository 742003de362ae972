//! The queue worker: loads the model, then takes jobs until it is told to stop.

use std::process::ExitCode;
use std::sync::Arc;

use futures::FutureExt;

use super::model::{self, Loaded};
use super::signals::Shutdown;
use crate::config::{RunpodSettings, Settings};
use crate::error::Failure;
use crate::runpod::{self, Ended, Handler, Worker};

/// Jobs per row of the engine that a worker takes when MAX_CONCURRENCY says nothing: while one set runs, the next is at hand.
const JOBS_PER_ROW: usize = 2;

/// Queue mode.
pub async fn run(settings: Settings) -> Result<ExitCode, Failure> {
    tracing::info!("worker-candle {}: queue worker", env!("CARGO_PKG_VERSION"));
    let shutdown = Shutdown::listen()?;
    let loading = model::load(&settings);
    let loaded = tokio::select! {
        loaded = loading => loaded,
        () = shutdown.clone().asked() => return Ok(ExitCode::SUCCESS),
    };
    let loaded = match loaded {
        Ok(loaded) => loaded,
        Err(failure) => {
            // One line and one report, then out: a restart loop that says nothing would go on billing.
            tracing::error!("the model {} cannot be loaded: {failure}", settings.model);
            runpod::report_unhealthy(&settings.runpod, "model_load", &failure.message).await;
            return Ok(ExitCode::FAILURE);
        }
    };
    match worker(&settings.runpod, &loaded).run(shutdown.asked()).await.map_err(Failure::internal)? {
        Ended::Drained => Ok(ExitCode::SUCCESS),
        Ended::Unhealthy => Ok(ExitCode::FAILURE),
    }
}

/// A worker that answers jobs with this model.
pub fn worker(settings: &RunpodSettings, loaded: &Loaded) -> Worker {
    let concurrency = settings.max_concurrency.unwrap_or(JOBS_PER_ROW * loaded.engine.limits().max_num_seqs);
    let (service, engine) = (loaded.service.clone(), loaded.engine.clone());
    let handler: Handler = Arc::new(move |job| {
        let service = service.clone();
        async move { service.job(job.input, &job.id).await }.boxed()
    });
    Worker::new(settings, concurrency, handler).healthy(move || engine.stats().healthy)
}
