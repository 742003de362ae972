//! The stop channel: a long poll that names jobs which the platform has cancelled.

use std::sync::Arc;

use super::client::{Client, Stops};
use super::in_flight::InFlight;
use super::retry::jittered;

/// Listens until it is dropped. A job named here is dropped with everything it had under way, and nothing is posted for it.
pub(crate) async fn listen(client: Arc<Client>, in_flight: Arc<InFlight>) {
    let Some(url) = client.urls.stop() else { return };
    let policy = &client.policy;
    let mut working = true;
    loop {
        let began = tokio::time::Instant::now();
        let (pause, state) = match client.stops(&url).await {
            Stops::Ids(ids) => {
                ids.iter().for_each(|id| stop(&in_flight, id));
                // A server that holds the poll is asked again at once, so that a cancellation arrives without delay.
                (policy.stop_pause.saturating_sub(began.elapsed()), Ok(()))
            }
            Stops::NotFound => (policy.stop_missing, Err("the platform has no such route".to_owned())),
            Stops::RateLimited => (policy.rate_limited, Err("too many requests".to_owned())),
            Stops::Failed(error) => (policy.stop_pause, Err(error)),
        };
        match state {
            Ok(()) => working = true,
            Err(error) if working => {
                working = false;
                tracing::info!("cancellations cannot be read for now, running jobs go on: {error}");
            }
            Err(_) => {}
        }
        tokio::time::sleep(jittered(pause)).await;
    }
}

fn stop(in_flight: &InFlight, id: &str) {
    if in_flight.stop(id) {
        tracing::info!(request_id = %id, "Stopping job.");
    } else {
        tracing::debug!(request_id = %id, "a job to stop is not held here");
    }
}
