//! Webhooks: the finished job, posted where its client asked for.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use reqwest::header::CONTENT_TYPE;
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
        // Straight to where the client said, as all traffic of the endpoint and its workers goes: a proxy is for the model's files.
        let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).redirect(reqwest::redirect::Policy::none()).build();
        Arc::new(Self { client: client.unwrap_or_default(), pause, permits: Semaphore::new(AT_ONCE) })
    }

    /// Posts in the background: once, and twice more when the answer is not a success.
    pub fn send(self: &Arc<Self>, job: String, url: String, body: Vec<u8>) {
        let this = self.clone();
        let body = Bytes::from(body);
        let name = shown(&url);
        tokio::spawn(async move {
            for attempt in 0..=RETRIES {
                if attempt > 0 {
                    tokio::time::sleep(this.pause).await;
                }
                let _permit = this.permits.acquire().await;
                match this.client.post(&url).header(CONTENT_TYPE, "application/json").body(body.clone()).send().await {
                    Ok(response) if response.status().is_success() => return,
                    Ok(response) => tracing::warn!("the webhook {name} answered {}", response.status()),
                    Err(error) => tracing::warn!("the webhook {name} could not be reached: {}", error.without_url()),
                }
            }
            tracing::warn!("the webhook {name} is given up for job {job}");
        });
    }
}

/// A webhook's address as the log has it: who it is, and nothing that could be a secret of its owner.
fn shown(url: &str) -> String {
    let Ok(mut url) = reqwest::Url::parse(url) else { return "(not an address)".to_owned() };
    let (_, _) = (url.set_username(""), url.set_password(None));
    url.set_query(None);
    url.set_fragment(None);
    url.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_has_no_secrets_of_a_webhook() {
        assert_eq!(shown("https://me:secret@example.com:8443/hook/1?token=secret#secret"), "https://example.com:8443/hook/1");
        assert_eq!(shown("http://example.com"), "http://example.com/");
        assert_eq!(shown("http://me:secret@[bad"), "(not an address)");
    }
}
