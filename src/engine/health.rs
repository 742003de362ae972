//! Whether the engine can still compute. This is told once, here: `submit`, readiness, the queue worker and the figures all read it.

use futures::StreamExt;
use futures::stream::FuturesUnordered;
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

/// Tells of the fault that broke the engine, or one of several, and that only a restart mends. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Health(Vec<watch::Receiver<Option<Failure>>>);

impl From<watch::Receiver<Option<Failure>>> for Health {
    fn from(failures: watch::Receiver<Option<Failure>>) -> Self {
        Self(vec![failures])
    }
}

/// Of several engines, none of which may fail.
impl FromIterator<Health> for Health {
    fn from_iter<I: IntoIterator<Item = Health>>(engines: I) -> Self {
        Self(engines.into_iter().flat_map(|health| health.0).collect())
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
        self.0.iter().find_map(|engine| engine.borrow().clone())
    }

    /// Waits for such a fault: for ever, when the engine ends without one.
    pub async fn failed(&self) -> Failure {
        let failed = |mut engine: watch::Receiver<Option<Failure>>| async move {
            match engine.wait_for(Option::is_some).await.map(|failure| failure.clone()) {
                Ok(Some(failure)) => failure,
                _ => std::future::pending().await,
            }
        };
        let mut first: FuturesUnordered<_> = self.0.iter().cloned().map(failed).collect();
        match first.next().await {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_of_several_engines_is_enough() {
        let engines = [Reporter::default(), Reporter::default()];
        let health: Health = engines.iter().map(Reporter::health).collect();
        assert_eq!(health.failure(), None);
        engines[1].fail(Failure::internal("the second"));
        assert_eq!(health.failure().unwrap().message, "the second");
        assert_eq!(health.failed().await.message, "the second");
        assert_eq!(engines[0].failure(), None);
    }
}
