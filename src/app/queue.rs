//! The queue worker: loads the model, then takes jobs until it is told to stop.

use std::process::ExitCode;
use std::sync::Arc;

use futures::FutureExt;

use super::model;
use super::signals::Shutdown;
use crate::api::Service;
use crate::config::{RunpodSettings, Settings, defaults};
use crate::error::Failure;
use crate::runpod::{self, Ended, Handler, RetryPolicy, Worker};

/// Queue mode.
pub async fn run(mut settings: Settings) -> Result<ExitCode, Failure> {
    // The next request of a conversation may reach another worker.
    settings.api.responses_store.get_or_insert(false);
    tracing::info!("worker-candle {}: queue worker", env!("CARGO_PKG_VERSION"));
    if let Err(problem) = runpod::check(&settings.runpod) {
        return Ok(refused(&settings.runpod, &problem).await);
    }
    let shutdown = Shutdown::listen()?;
    let loading = model::load(&settings);
    let loaded = tokio::select! {
        loaded = loading => loaded,
        () = shutdown.clone().asked() => return Ok(ExitCode::SUCCESS),
    };
    let service = match loaded {
        Ok(service) => service,
        Err(failure) => {
            // One line and one report, then out: a restart loop that says nothing would go on billing.
            let several = if settings.more_models.is_empty() { "" } else { "s" };
            let models = settings.models().collect::<Vec<_>>().join(", ");
            tracing::error!("the model{several} {models} cannot be loaded: {failure}");
            runpod::report_unhealthy(&settings.runpod, "model_load", &failure.message).await;
            return Ok(ExitCode::FAILURE);
        }
    };
    match worker(&settings.runpod, &service).run(shutdown.asked()).await.map_err(Failure::internal)? {
        Ended::Drained => Ok(ExitCode::SUCCESS),
        Ended::Unhealthy => Ok(ExitCode::FAILURE),
    }
}

/// Settings that do not hold: their owner sees one line in the endpoint's log and an unhealthy worker.
pub async fn refused(settings: &RunpodSettings, problems: &str) -> ExitCode {
    tracing::error!("the settings are refused: {problems}");
    runpod::report_unhealthy(settings, "settings", problems).await;
    ExitCode::FAILURE
}

/// Jobs taken at once: no more than the engine has places, for whoever takes a job keeps it from other workers.
fn concurrency(wanted: Option<usize>, rows: usize, waiting: usize) -> usize {
    let most = rows.saturating_add(waiting);
    if let Some(wanted) = wanted.filter(|wanted| *wanted > most) {
        tracing::warn!(
            "MAX_CONCURRENCY={wanted} is more jobs than the engine has places for: {most} are taken at once (MAX_NUM_SEQS={rows} that run, \
             MAX_WAITING={waiting} that wait)"
        );
    }
    wanted.unwrap_or(rows.saturating_add(rows.div_ceil(defaults::SEQS_PER_WAITING_JOB))).min(most)
}

/// A worker that answers jobs with these models.
pub fn worker(settings: &RunpodSettings, service: &Arc<Service>) -> Worker {
    let (rows, waiting) = service.places();
    let concurrency = concurrency(settings.max_concurrency, rows, waiting);
    let policy = RetryPolicy { job_limits: service.body_limits(), ..RetryPolicy::default() };
    let (service, health) = (service.clone(), service.health());
    let handler: Handler = Arc::new(move |job| {
        let service = service.clone();
        async move { service.job(job.input, &job.id).await }.boxed()
    });
    Worker::new(settings, concurrency, handler).retry_policy(policy).health(health)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_jobs_are_taken_than_there_are_places() {
        assert_eq!(concurrency(None, 1, 512), 2);
        assert_eq!(concurrency(None, 16, 512), 18);
        assert_eq!(concurrency(None, 256, 512), 288);
        assert_eq!(concurrency(Some(512), 16, 512), 512);
        assert_eq!(concurrency(Some(600), 16, 512), 528);
        assert_eq!(concurrency(None, 16, 1), 17);
    }
}
