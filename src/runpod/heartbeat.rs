//! Tells the platform that this worker lives, from a thread of its own: a worker that does not ping is killed, however busy.

use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;

use super::client::{describe, http_client};
use super::in_flight::InFlight;
use super::retry::retry;
use super::urls::{self, encode, with_query};
use crate::config::RunpodSettings;

const PING_RETRIES: u32 = 3;
/// Most bytes of job ids in one ping, as they stand in its address: long ones are refused on the way.
const IDS_BYTES: usize = 2048;

/// A running heartbeat. Dropping it ends the thread.
pub(crate) struct Heartbeat {
    _alive: oneshot::Sender<()>,
}

struct Pinger {
    http: reqwest::Client,
    url: String,
    version: String,
    in_flight: Arc<InFlight>,
    /// The last id of the ping before, where there were more than fit.
    told: Option<String>,
    interval: Duration,
    retry: Duration,
}

/// Starts the thread; the first ping goes at once. `Ok(None)`: the platform asked for no pings, or gave no key or worker id to send.
pub(crate) fn start(settings: &RunpodSettings, in_flight: Arc<InFlight>, retry: Duration) -> Result<Option<Heartbeat>, String> {
    let (Some(worker_id), Some(_)) = (&settings.worker_id, &settings.api_key) else {
        tracing::debug!("no heartbeat: RUNPOD_POD_ID or RUNPOD_AI_API_KEY is not set");
        return Ok(None);
    };
    let Some(url) = urls::ping(settings, worker_id)? else {
        tracing::debug!("no heartbeat: RUNPOD_WEBHOOK_PING is not set");
        return Ok(None);
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot set up the heartbeat's runtime: {error}"))?;
    let interval = settings.ping_interval;
    let pinger = Pinger { http: http_client(settings)?, url, version: version(settings), in_flight, told: None, interval, retry };
    let (alive, ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("heartbeat".into())
        .spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = ended => {}
                    () = pinger.run() => {}
                }
            });
        })
        .map_err(|error| format!("cannot start the heartbeat's thread: {error}"))?;
    Ok(Some(Heartbeat { _alive: alive }))
}

impl Pinger {
    async fn run(mut self) {
        let mut ticks = tokio::time::interval(self.interval);
        // After a pause (a suspended machine) one ping is enough.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut working = true;
        loop {
            ticks.tick().await;
            match self.ping().await {
                Ok(()) if !working => {
                    working = true;
                    tracing::info!("heartbeats arrive again");
                }
                Err(error) if working => {
                    working = false;
                    tracing::warn!("heartbeats do not arrive, and go on: {error}");
                }
                Ok(()) | Err(_) => {}
            }
        }
    }

    /// One ping with its retries.
    async fn ping(&mut self) -> Result<(), String> {
        let ids = some_of(self.in_flight.ids(), self.told.as_deref(), IDS_BYTES);
        self.told = ids.last().cloned();
        let ids = ids.join(",");
        let parameters = [("job_id", ids.as_str()), ("runpod_version", self.version.as_str())];
        let url = with_query(&self.url, if ids.is_empty() { &parameters[1..] } else { &parameters });
        // The error, and whether another attempt may help.
        let attempt = || async {
            match self.http.get(&url).timeout(self.interval * 2).send().await {
                Ok(response) if response.status().is_success() => Ok(()),
                Ok(response) => Err((worth_retrying(response.status()), format!("HTTP {}", response.status()))),
                Err(error) => Err((true, describe(error))),
            }
        };
        let pause = |(again, _): &(bool, String), failures: u32| match failures {
            1 => again.then_some(Duration::ZERO),
            _ => (*again && failures <= PING_RETRIES).then(|| self.retry * 2_u32.pow(failures - 2)),
        };
        retry(attempt, pause).await.map_err(|(_, error)| error)
    }
}

/// As many ids as fit `limit` bytes, at least one; of more, those that come after `told`, round and round, so that several pings name all.
fn some_of(mut ids: Vec<String>, told: Option<&str>, limit: usize) -> Vec<String> {
    // A comma takes three bytes as well.
    let size = |id: &String| encode(id).len() + 3;
    if ids.iter().map(size).sum::<usize>() <= limit {
        return ids;
    }
    let next = ids.partition_point(|id| told.is_some_and(|told| id.as_str() <= told));
    ids.rotate_left(next);
    let mut left = limit;
    let fit = ids.iter().take_while(|id| {
        let size = size(id);
        let fits = size <= left;
        left = left.saturating_sub(size);
        fits
    });
    let fit = fit.count().max(1);
    ids.truncate(fit);
    ids
}

fn worth_retrying(status: StatusCode) -> bool {
    matches!(status.as_u16(), 429 | 500 | 502 | 503 | 504)
}

fn version(settings: &RunpodSettings) -> String {
    settings.reported_version.clone().unwrap_or_else(|| env!("CARGO_PKG_VERSION").to_owned())
}

/// Tells the platform that this worker cannot serve: one attempt, two seconds at most. To be followed by an exit with an error.
/// `check` names what failed in a word (`model`), `reason` says it to a person.
pub async fn report_unhealthy(settings: &RunpodSettings, check: &str, reason: &str) {
    let (Some(worker_id), Some(_)) = (&settings.worker_id, &settings.api_key) else { return };
    let (url, http) = match (urls::ping(settings, worker_id), http_client(settings)) {
        (Ok(Some(url)), Ok(http)) => (url, http),
        (Ok(None), _) => return,
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!("the platform could not be told that this worker is unhealthy: {error}");
            return;
        }
    };
    let reason: String = reason.chars().take(256).collect();
    let version = version(settings);
    let parameters = [("status", "unhealthy"), ("check", check), ("reason", reason.as_str()), ("runpod_version", version.as_str())];
    let sent = http.get(with_query(&url, &parameters)).timeout(Duration::from_secs(2)).send().await;
    match sent.and_then(reqwest::Response::error_for_status) {
        Ok(_) => tracing::info!("the platform was told that this worker is unhealthy"),
        Err(error) => tracing::warn!("the platform could not be told that this worker is unhealthy: {}", describe(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ids_are_told_in_turn() {
        let ids: Vec<String> = (0..512).map(|n| format!("{n:08x}-5e0e-4b3a-9d3e-0123456789ab-u1")).collect();
        assert_eq!(some_of(ids[..40].to_vec(), Some("zz"), IDS_BYTES), ids[..40], "what fits is told every time");
        let (mut told, mut seen) = (None, std::collections::BTreeSet::new());
        for _ in 0..512_usize.div_ceil(48) {
            let some = some_of(ids.clone(), told.as_deref(), IDS_BYTES);
            assert!(encode(&some.join(",")).len() <= IDS_BYTES);
            assert!(!some.is_empty());
            told = some.last().cloned();
            seen.extend(some);
        }
        assert_eq!(seen.len(), ids.len());
    }

    #[test]
    fn an_id_that_is_too_long_is_told_alone() {
        let ids = vec!["a".repeat(3000), "b".to_owned()];
        assert_eq!(some_of(ids.clone(), None, IDS_BYTES), ids[..1]);
        assert_eq!(some_of(ids.clone(), Some(&ids[0]), IDS_BYTES), ids[1..]);
    }
}
