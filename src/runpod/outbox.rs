//! Posts one job's answer: its pieces in order, with never more than one post under way, and then its outcome.
//!
//! While a post is under way no piece is pulled, and all that is generated meanwhile comes as one piece. So a slow platform gets fewer and
//! larger posts, and never slows the engine.

use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use serde_json::Value;
use tokio::time::Instant;

use super::client::Client;
use super::job::{Outcome, piece_body};
use crate::api::{Pieces, Reply};
use crate::config::BatchGrowth;
use crate::error::{Failure, Kind};

/// A piece waits at most this long for a batch to fill.
const LONGEST_GATHERING: Duration = Duration::from_secs(1);

/// How pieces become posts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// Least time between two posts.
    pub interval: Duration,
    /// Gather more than what is ready. Pieces are opaque here, so this is what the sizes count: for strings, the frames (each pull at full
    /// speed gives about one token's frame); other values cannot be joined after they were pulled, so there the next pull waits for
    /// that many intervals, and the source gathers. Either way for a second at most.
    pub batch: Option<BatchGrowth>,
}

/// The poster of one job.
pub(crate) struct Outbox {
    pub client: Arc<Client>,
    pub job_id: String,
    pub rules: Rules,
}

impl Outbox {
    /// Posts the pieces of a stream as they come, and tells how the job ended. The final post is the caller's.
    pub async fn deliver(&self, answer: Reply) -> Outcome {
        match answer {
            Reply::Whole(value) => Outcome::Output(value),
            Reply::Stream(pieces) => self.deliver_stream(pieces).await,
        }
    }

    async fn deliver_stream(&self, pieces: Pieces) -> Outcome {
        let mut source = Source { pieces, next: None, failure: None, ended: false };
        let mut pace = Pace::new(self.rules);
        let mut posted = Posted { limit: self.client.policy.result_limit, ..Default::default() };
        loop {
            tokio::time::sleep_until(pace.next).await;
            let Some(piece) = source.gather(pace.wanted(), self.client.policy.chunk_limit).await else { break };
            pace.flush(piece.is_string());
            for part in split_piece(piece, self.client.policy.chunk_limit) {
                self.post(part, &mut posted).await;
            }
        }
        if posted.skipped > 0 {
            tracing::warn!("{} of {} posts of this stream did not arrive", posted.skipped, posted.posts);
        }
        match source.failure {
            Some(failure) => Outcome::Failed { failure, streamed: true },
            None => posted.outcome(),
        }
    }

    async fn post(&self, piece: Value, posted: &mut Posted) {
        let body = piece_body(&piece);
        posted.posts += 1;
        posted.bytes += body.len();
        // When the last one failed in all its attempts, more attempts would only add to the delay of what follows.
        let attempts = if posted.last_failed { 1 } else { self.client.policy.stream_attempts };
        posted.last_failed = !self.client.stream(&self.job_id, body, attempts).await;
        posted.skipped += usize::from(posted.last_failed);
        posted.keep(piece);
    }
}

/// What has been posted so far. The pieces are kept because they are returned as the job's result, unless they are too large for that.
#[derive(Default)]
struct Posted {
    pieces: Vec<Value>,
    posts: usize,
    skipped: usize,
    last_failed: bool,
    /// Bytes of all bodies. Each is a little longer than its part of the aggregate.
    bytes: usize,
    limit: usize,
}

impl Posted {
    fn keep(&mut self, piece: Value) {
        if self.too_large() {
            // These pieces will not be returned, so they need not be kept.
            self.pieces = Vec::new();
        } else {
            self.pieces.push(piece);
        }
    }

    /// The bodies' frames are not part of the aggregate: only their content and one comma each.
    fn aggregate_bytes(&self) -> usize {
        self.bytes.saturating_sub(self.posts * (r#"{"output":}"#.len() - 1))
    }

    fn too_large(&self) -> bool {
        self.aggregate_bytes() > self.limit
    }

    fn outcome(self) -> Outcome {
        if !self.too_large() {
            return Outcome::Pieces(self.pieces);
        }
        let message = format!(
            "The stream ended well, but its pieces together have {} bytes, and the platform takes results of at most {}. Read the stream, \
             or ask for less output.",
            self.aggregate_bytes(),
            self.limit
        );
        tracing::error!("{message}");
        Outcome::Failed { failure: Failure::new(Kind::Internal, message).code("result_too_large"), streamed: true }
    }
}

/// When the next post may go, and how much to gather for it.
struct Pace {
    rules: Rules,
    size: f64,
    next: Instant,
}

impl Pace {
    fn new(rules: Rules) -> Self {
        let size = rules.batch.map_or(1.0, |batch| if grows(batch) { batch.min as f64 } else { batch.max as f64 });
        Self { rules, size, next: Instant::now() }
    }

    /// Frames to gather.
    fn wanted(&self) -> usize {
        self.size as usize
    }

    /// A post begins.
    fn flush(&mut self, joinable: bool) {
        let interval = self.rules.interval;
        let pause = match self.rules.batch {
            Some(_) if !joinable => interval.mul_f64(self.size).min(LONGEST_GATHERING).max(interval),
            _ => interval,
        };
        self.next = Instant::now() + pause;
        if let Some(batch) = self.rules.batch.filter(|&batch| grows(batch)) {
            self.size = (self.size * batch.growth).min(batch.max as f64);
        }
    }
}

/// Else the size is always the largest, as the reference workers have it.
fn grows(batch: BatchGrowth) -> bool {
    batch.growth > 1.0 && batch.min >= 1 && batch.max > batch.min
}

/// The pieces, with the one that was pulled too many.
struct Source {
    pieces: Pieces,
    next: Option<Value>,
    failure: Option<Failure>,
    ended: bool,
}

impl Source {
    /// The next piece; `None` at the end, or after a failure, which is then in `failure`.
    async fn pull(&mut self) -> Option<Value> {
        if let Some(value) = self.next.take() {
            return Some(value);
        }
        if self.ended {
            return None;
        }
        match self.pieces.next().await {
            Some(Ok(value)) => return Some(value),
            Some(Err(failure)) => self.failure = Some(failure),
            None => {}
        }
        self.ended = true;
        None
    }

    /// Waits for a piece; joins to a string the strings that are ready behind it, and waits for more while it has less than
    /// `wanted` frames.
    async fn gather(&mut self, wanted: usize, limit: usize) -> Option<Value> {
        let mut text = match self.pull().await? {
            Value::String(text) => text,
            value => return Some(value),
        };
        let latest = Instant::now() + LONGEST_GATHERING;
        let mut frames = count_frames(&text);
        while text.len() < limit {
            let next = match frames < wanted {
                true => tokio::time::timeout_at(latest, self.pull()).await.ok().flatten(),
                false => self.pull().now_or_never().flatten(),
            };
            match next {
                Some(Value::String(more)) => {
                    frames += count_frames(&more);
                    text.push_str(&more);
                }
                other => {
                    self.next = other;
                    break;
                }
            }
        }
        Some(Value::String(text))
    }
}

/// At least one: a piece that is no server-sent event counts as well.
fn count_frames(text: &str) -> usize {
    text.matches("\n\n").count().max(1)
}

/// Parts that each fit one post. Only strings can be split: at the borders of server-sent events while these fit, else between characters
/// (the platform concatenates what it gets). Other values go as they are.
fn split_piece(piece: Value, limit: usize) -> Vec<Value> {
    match piece {
        Value::String(text) => split_text(text, limit.saturating_sub(r#"{"output":""}"#.len())).into_iter().map(Value::String).collect(),
        value => vec![value],
    }
}

fn split_text(text: String, limit: usize) -> Vec<String> {
    if text.len() <= limit && escaped_len(&text) <= limit {
        return vec![text];
    }
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut size = 0;
    let mut add = |atom: &str| {
        let atom_size = escaped_len(atom);
        if size + atom_size > limit && !part.is_empty() {
            parts.push(std::mem::take(&mut part));
            size = 0;
        }
        part.push_str(atom);
        size += atom_size;
    };
    for frame in text.split_inclusive("\n\n") {
        if escaped_len(frame) <= limit {
            add(frame);
        } else {
            frame.split_inclusive(|_: char| true).for_each(&mut add);
        }
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}

/// Bytes of `text` inside a JSON string.
fn escaped_len(text: &str) -> usize {
    let byte_len = |byte: u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..0x20 => 6,
        _ => 1,
    };
    text.bytes().map(byte_len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;
    use proptest::prelude::*;
    use serde_json::json;

    proptest! {
        #[test]
        fn escaped_length_is_serde_jsons(text in any::<String>()) {
            prop_assert_eq!(escaped_len(&text) + 2, serde_json::to_string(&text).unwrap().len());
        }

        #[test]
        fn parts_fit_and_concatenate(frames in prop::collection::vec("[a-zé\"\n]{0,40}\n\n", 0..20), limit in 20_usize..120) {
            let text = frames.concat();
            let parts = split_piece(Value::String(text.clone()), limit);
            let joined: String = parts.iter().filter_map(Value::as_str).collect();
            prop_assert_eq!(joined, text);
            for part in parts {
                prop_assert!(piece_body(&part).len() <= limit);
            }
        }
    }

    #[test]
    fn splits_at_frame_borders_when_frames_fit() {
        // Escaped, a newline has two bytes: the frames have 14, 11 and 11.
        let text = "data: aaaa\n\ndata: b\n\ndata: c\n\n".to_owned();
        assert_eq!(split_text(text.clone(), 24), ["data: aaaa\n\n", "data: b\n\ndata: c\n\n"]);
        assert_eq!(split_text(text.clone(), 25), ["data: aaaa\n\ndata: b\n\n", "data: c\n\n"]);
        assert_eq!(split_text(text.clone(), 36), [text]);
    }

    fn source(values: Vec<Result<Value, Failure>>) -> Source {
        Source { pieces: Box::pin(stream::iter(values)), next: None, failure: None, ended: false }
    }

    #[tokio::test]
    async fn gathers_ready_strings_and_keeps_other_values_apart() {
        let mut source = source(vec![
            Ok(json!("a")),
            Ok(json!("b")),
            Ok(json!({"x": 1})),
            Ok(json!({"x": 2})),
            Ok(json!("c")),
            Err(Failure::internal("f")),
        ]);
        let mut pieces = Vec::new();
        while let Some(piece) = source.gather(1, 1000).await {
            pieces.push(piece);
        }
        assert_eq!(pieces, [json!("ab"), json!({"x": 1}), json!({"x": 2}), json!("c")]);
        assert_eq!(source.failure, Some(Failure::internal("f")));
    }

    #[tokio::test]
    async fn gathering_ends_at_the_limit() {
        let mut source = source(vec![Ok(json!("aaaa")), Ok(json!("bbbb")), Ok(json!("cccc"))]);
        assert_eq!(source.gather(1, 6).await, Some(json!("aaaabbbb")));
        assert_eq!(source.gather(1, 6).await, Some(json!("cccc")));
        assert_eq!(source.gather(1, 6).await, None);
    }

    #[tokio::test]
    async fn waits_for_the_wanted_number_of_frames() {
        let frames = (0..10).map(|n| json!(format!("data: {n}\n\n")));
        // Never more than one ready: each pull waits a moment.
        let slow = stream::iter(frames).then(|frame| async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok(frame)
        });
        let mut source = Source { pieces: Box::pin(slow), next: None, failure: None, ended: false };
        let mut pace = Pace::new(Rules { interval: Duration::ZERO, batch: Some(BatchGrowth { min: 1, growth: 2.0, max: 5 }) });
        let mut sizes = Vec::new();
        while let Some(piece) = source.gather(pace.wanted(), 1000).await {
            sizes.push(count_frames(piece.as_str().unwrap()));
            pace.flush(true);
        }
        assert_eq!(sizes, [1, 2, 4, 3]);
    }

    #[test]
    fn sizes_grow_to_the_largest() {
        let sizes = |min, growth, max| {
            let mut pace = Pace::new(Rules { interval: Duration::from_millis(50), batch: Some(BatchGrowth { min, growth, max }) });
            let mut sizes = Vec::new();
            for _ in 0..6 {
                sizes.push(pace.wanted());
                pace.flush(true);
            }
            sizes
        };
        assert_eq!(sizes(1, 3.0, 50), [1, 3, 9, 27, 50, 50]);
        assert_eq!(sizes(1, 1.0, 50), [50; 6]);
        assert_eq!(sizes(60, 3.0, 50), [50; 6]);
    }
}
