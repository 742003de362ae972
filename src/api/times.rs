//! When a request came and what became of it: FastDeploy's `metrics`, which `collect_metrics` asks for.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

/// The moments of one request, all its choices together. What has not happened yet is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// The request came.
    pub arrived: Instant,
    /// Its prompts were tokens, and the engine had them.
    pub submitted: Instant,
    /// The first of its sequences left the engine's queue.
    pub started: Option<Instant>,
    pub first_token: Option<Instant>,
    pub last_token: Option<Instant>,
}

impl Times {
    /// A token has come.
    pub fn token(&mut self) {
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
    }

    /// Into an answer or a chunk of one. Moments are seconds since 1970, and the others are seconds; FastDeploy's keys, without those that only
    /// servers in two parts have.
    pub fn put(&self, object: &mut Map<String, Value>) {
        let (here, now) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()));
        let moment = |at: Instant| now - here.saturating_duration_since(at).as_secs_f64();
        let between = |from: Option<Instant>, to: Option<Instant>| Some(to?.saturating_duration_since(from?).as_secs_f64());
        let (arrived, submitted) = (Some(self.arrived), Some(self.submitted));
        let metrics = json!({
            "arrival_time": moment(self.arrived),
            "request_start_time": moment(self.arrived),
            "preprocess_start_time": moment(self.arrived),
            "preprocess_end_time": moment(self.submitted),
            "inference_start_time": self.started.map(moment),
            "engine_recv_first_token_time": self.first_token.map(moment),
            "engine_recv_latest_token_time": self.last_token.map(moment),
            "preprocess_cost_time": between(arrived, submitted),
            "time_in_queue": between(submitted, self.started),
            "first_token_time": between(self.started, self.first_token),
            "model_forward_time": between(self.started, self.last_token),
            "model_execute_time": between(arrived, self.last_token),
        });
        object.insert("metrics".to_owned(), metrics);
    }
}
