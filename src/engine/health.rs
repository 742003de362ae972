//! Whether the engine can still compute. This is told once, here: `submit`, readiness, the queue worker and the figures all read it.

use tokio::sync::watch;

use crate::error::Failure;

/// The engine's end: tells of the fault that broke it.
#[derive(Debug)]
pub(crate) struct Reporter(watch::Sender<Option<Failure>>);

impl Default for Reporter {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Reporter {
    /// From here on only a restart helps.
    pub(crate) fn fail(&self, failure: Failure) {
        self.0.send_replace(Some(failure));
    }

    pub(crate) fn failure(&self) -> Option<Failure> {
        self.0.borrow().clone()
    }

    pub(crate) fn health(&self) -> Health {
        self.0.subscribe().into()
    }
}

/// Tells of the fault that broke the engine and that only a restart mends. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Health(watch::Receiver<Option<Failure>>);

impl From<watch::Receiver<Option<Failure>>> for Health {
    fn from(failures: watch::Receiver<Option<Failure>>) -> Self {
        Self(failures)
    }
}

/// Of an engine that never fails.
impl Default for Health {
    fn default() -> Self {
        Reporter::default().health()
    }
}

impl Health {
    /// The fault, if one is known now.
    pub fn failure(&self) -> Option<Failure> {
        self.0.borrow().clone()
    }

    /// Waits for such a fault: for ever, when the engine ends without one.
    pub async fn failed(&self) -> Failure {
        match self.0.clone().wait_for(Option::is_some).await.map(|failure| failure.clone()) {
            Ok(Some(failure)) => failure,
            _ => std::future::pending().await,
        }
    }
}
