//! Webhooks: the finished job, posted where its client asked for.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::Semaphore;

/// Posts under way at once; more wait.
const AT_ONCE: usize = 64;
const RETRIES: usize = 2;
const TIMEOUT: Duration = Duration::from_secs(10);

pub struct Webhooks {
    client: reqwest::Client,
    /// Between two tries.
    pause: Duration,
    permits: Semaphore,
}

impl Webhooks {
    pub fn new(pause: Duration) -> Arc<Self> {
        let client = reqwest::Client::builder().timeout(TIMEOUT).redirect(reqwest::redirect::Policy::none()).build();
        Arc::new(Self { client: client.unwrap_or_default(), pause, permits: Semaphore::new(AT_ONCE) })
    }

    /// Posts in the background: once, and twice more when the answer is not a success.
    pub fn send(self: &Arc<Self>, url: String, body: Value) {
        let this = self.clone();
        tokio::spawn(async move {
            for attempt in 0..=RETRIES {
                if attempt > 0 {
                    tokio::time::sleep(this.pause).await;
                }
                let _permit = this.permits.acquire().await;
                match this.client.post(&url).json(&body).send().await {
                    Ok(response) if response.status().is_success() => return,
                    Ok(response) => tracing::warn!("the webhook {url} answered {}", response.status()),
                    Err(error) => tracing::warn!("the webhook {url} could not be reached: {error}"),
                }
            }
            tracing::warn!("the webhook {url} is given up for job {}", body["id"]);
        });
    }
}
