//! Every wait and limit of the job protocol in one place, so that tests can shorten them, and the one loop that retries.

use std::time::Duration;

use crate::api::body::BodyLimits;

/// Waits, deadlines and size limits towards the platform. The default is what the platform's own SDK does, or its documentation says.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Deadline of one take or stop poll. The server holds it open until there is something to say.
    pub poll_timeout: Duration,
    /// An empty answer that came sooner than this was not held by the server: the next poll waits until this time has passed.
    pub shortest_poll: Duration,
    /// Least time between two polls while the platform answers 400, as it does to a parked worker.
    pub parked: Duration,
    /// Pause after 429.
    pub rate_limited: Duration,
    /// Pauses while takes fail.
    pub take_backoff: Backoff,
    /// How long jobs are taken singly after the batch route was refused.
    pub batch_retry: Duration,
    /// Pause after a stop poll that failed, or that the server did not hold.
    pub stop_pause: Duration,
    /// Pause after the stop route was not found.
    pub stop_missing: Duration,
    /// A take that was pending when the shutdown began may bring a job for at least this long, when it is known how long the server holds polls.
    pub least_hold: Duration,
    /// The same when no poll has come back empty yet, so that nothing is known of how long the server holds them.
    pub unknown_hold: Duration,
    /// The most that the drain of a broken engine takes, results not counted.
    pub broken_drain: Duration,
    /// Deadline of one attempt to post a result.
    pub result_timeout: Duration,
    /// Pauses between attempts to post a result.
    pub result_backoff: Backoff,
    /// A result is given up when the pauses between attempts add up to this. Counted in pauses, not by the clock: a machine that was
    /// suspended in between has not used them up.
    pub result_window: Duration,
    /// Deadline of one attempt to post a piece of a stream.
    pub stream_timeout: Duration,
    /// Pauses between attempts to post a piece.
    pub stream_backoff: Backoff,
    /// Attempts for one piece, before it is skipped.
    pub stream_attempts: u32,
    /// Pause before the second retry of a ping; it doubles. The first retry is at once.
    pub ping_retry: Duration,
    /// The size limits of a job. A larger one is answered with an error.
    pub job_limits: BodyLimits,
    /// Largest body of a final result, in bytes.
    pub result_limit: usize,
    /// Largest body of one stream post, in bytes.
    pub chunk_limit: usize,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            poll_timeout: Duration::from_secs(90),
            shortest_poll: Duration::from_millis(250),
            parked: Duration::from_secs(1),
            rate_limited: Duration::from_secs(5),
            take_backoff: Backoff { first: Duration::from_millis(250), cap: Duration::from_secs(10) },
            batch_retry: Duration::from_secs(300),
            stop_pause: Duration::from_secs(1),
            stop_missing: Duration::from_secs(300),
            least_hold: Duration::from_secs(10),
            unknown_hold: Duration::from_secs(90),
            broken_drain: Duration::from_secs(30),
            result_timeout: Duration::from_secs(60),
            result_backoff: Backoff { first: Duration::from_millis(500), cap: Duration::from_secs(10) },
            result_window: Duration::from_secs(60),
            stream_timeout: Duration::from_secs(10),
            stream_backoff: Backoff { first: Duration::from_millis(200), cap: Duration::from_secs(1) },
            stream_attempts: 3,
            ping_retry: Duration::from_secs(2),
            job_limits: BodyLimits::default(),
            result_limit: 9_500_000,
            chunk_limit: 1_000_000,
        }
    }
}

/// Pauses that double from `first` up to `cap`.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    pub first: Duration,
    pub cap: Duration,
}

impl Backoff {
    /// The pause after failure number `failures` (from 1), before jitter.
    pub fn pause(self, failures: u32) -> Duration {
        self.first.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1))).min(self.cap)
    }
}

/// Calls `attempt` until it succeeds, or until `pause` gives no pause after a failure. `pause` gets the error and how many attempts have failed.
pub(crate) async fn retry<T, E, F: Future<Output = Result<T, E>>>(
    attempt: impl Fn() -> F,
    mut pause: impl FnMut(&E, u32) -> Option<Duration>,
) -> Result<T, E> {
    let mut failures = 0;
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        failures += 1;
        match pause(&error, failures) {
            Some(pause) => tokio::time::sleep(pause).await,
            None => return Err(error),
        }
    }
}

/// `pause` and up to a quarter more, so that workers which failed together do not come back together.
pub(crate) fn jittered(pause: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() as u32;
    pause + pause.mul_f64(f64::from(random) / f64::from(u32::MAX) / 4.0)
}

/// Sleeps for `total` in slices of at most a second, so that a clock which jumps (a suspended machine) costs one slice, not the deadline.
pub(crate) async fn sleep_awake(total: Duration) {
    let mut left = total;
    while !left.is_zero() {
        let slice = left.min(Duration::from_secs(1));
        tokio::time::sleep(slice).await;
        left -= slice;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_cap() {
        let backoff = Backoff { first: Duration::from_millis(250), cap: Duration::from_secs(10) };
        let pauses: Vec<u128> = [0, 1, 2, 3, 6, 7, 40, u32::MAX].iter().map(|&n| backoff.pause(n).as_millis()).collect();
        assert_eq!(pauses, [250, 250, 500, 1000, 8000, 10_000, 10_000, 10_000]);
    }

    #[test]
    fn jitter_adds_at_most_a_quarter() {
        for _ in 0..100 {
            let pause = jittered(Duration::from_secs(4));
            assert!((Duration::from_secs(4)..=Duration::from_secs(5)).contains(&pause), "{pause:?}");
        }
    }
}
