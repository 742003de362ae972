//! SIGTERM and SIGINT: the first asks to drain, the second ends at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::error::Failure;

/// Becomes true at the first signal. Any number of tasks may wait for it.
#[derive(Clone)]
pub struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// Starts listening; must run inside the runtime.
    pub fn listen() -> Result<Self, Failure> {
        let failed = |error: std::io::Error| Failure::internal(format!("cannot listen for signals: {error}"));
        let mut term = signal(SignalKind::terminate()).map_err(failed)?;
        let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
        let (sender, receiver) = watch::channel(false);
        tokio::spawn(async move {
            let name = tokio::select! { _ = term.recv() => "SIGTERM", _ = int.recv() => "SIGINT" };
            tracing::info!("{name}: draining; a second signal stops at once");
            sender.send_replace(true);
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            tracing::warn!("second signal: stopping without draining");
            std::process::exit(1);
        });
        Ok(Self(receiver))
    }

    /// Completes at the first signal.
    pub async fn asked(mut self) {
        // An error means that the listener is gone, which it never is while the runtime lives.
        if self.0.wait_for(|asked| *asked).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
