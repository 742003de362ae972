//! When the KV cache and the step buffers are prefaulted: after the start, between steps, in slices of some milliseconds.
//!
//! A slice and a step never run at the same time, so they cannot race. A request that arrives waits for one slice at most.

use std::time::{Duration, Instant};

use crate::models::Runner;

/// Bytes in a slice.
const SLICE: usize = 4 << 20;
/// How long after the start the first slice may run, so that a request which comes at once does not wait for one.
const DELAY: Duration = Duration::from_millis(200);

/// What the engine does between slices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activity {
    /// It is idle: slices may take a quarter of the time. (The machine's other threads need some too.)
    Idle,
    /// It runs steps: slices may take a 25th of the time.
    Running,
}

impl Activity {
    /// The pause after a slice is so many times as long as the slice.
    fn pause(self) -> u32 {
        match self {
            Self::Idle => 3,
            Self::Running => 24,
        }
    }
}

/// Decides when the next slice runs.
#[derive(Debug)]
pub struct Prefault {
    due: Option<Instant>,
}

impl Default for Prefault {
    fn default() -> Self {
        Self { due: Some(Instant::now() + DELAY) }
    }
}

impl Prefault {
    /// When the next slice is due; `None` when all memory is resident.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Runs a slice if one is due; true when it was the last.
    pub fn advance(&mut self, runner: &mut impl Runner, activity: Activity) -> bool {
        let begin = Instant::now();
        if self.due.is_none_or(|due| begin < due) {
            return false;
        }
        let more = runner.prefault(SLICE);
        let end = Instant::now();
        self.due = more.then(|| end + (end - begin) * activity.pause());
        !more
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::engine::{EngineOptions, Event, Request, SamplingParams, start};
    use crate::models::{Output, Plan, Shape, StepError};

    /// Needs several slices, each of which takes a while.
    struct Slow {
        shape: Shape,
        left: usize,
        taken: Arc<AtomicUsize>,
        lasts: Duration,
    }

    impl Drop for Slow {
        fn drop(&mut self) {
            self.taken.store(usize::MAX, Ordering::SeqCst);
        }
    }

    impl Runner for Slow {
        fn shape(&self) -> &Shape {
            &self.shape
        }

        fn step(&mut self, plan: &Plan) -> Result<Output, StepError> {
            std::thread::sleep(Duration::from_millis(1));
            Ok(Output { tokens: vec![1; plan.rows.iter().filter(|row| row.sampling.is_some()).count()], ..Default::default() })
        }

        fn prefault(&mut self, most: usize) -> bool {
            assert_eq!(most, SLICE);
            std::thread::sleep(self.lasts);
            self.taken.fetch_add(1, Ordering::SeqCst);
            self.left -= 1;
            self.left > 0
        }
    }

    fn slow(left: usize, lasts: u64) -> (Slow, Arc<AtomicUsize>) {
        let shape = Shape {
            max_model_len: 100_000,
            vocab_size: 100,
            block_size: 16,
            blocks: 10_000,
            kv_cache_dtype: "float32",
            state_slots: 0,
            max_num_seqs: 2,
            max_num_batched_tokens: 16,
            memory_bound: false,
            pooling: None,
            whole_prompts: false,
        };
        let taken = Arc::new(AtomicUsize::new(0));
        (Slow { shape, left, taken: taken.clone(), lasts: Duration::from_millis(lasts) }, taken)
    }

    fn request(max_tokens: usize) -> Request {
        let params = SamplingParams { max_tokens, ignore_eos: true, ..Default::default() };
        Request {
            id: "test".into(),
            prompt: Arc::new(vec![5; 8]),
            params,
            prompt_logprobs: None,
            deadline: None,
            pooling: None,
            constraint: None,
        }
    }

    #[test]
    fn pauses_follow_what_slices_take() {
        let (mut runner, taken) = slow(3, 10);
        let mut prefault = Prefault::default();
        prefault.advance(&mut runner, Activity::Idle);
        assert_eq!(taken.load(Ordering::SeqCst), 0, "not at once");
        for (number, activity, least) in [(1, Activity::Idle, 30), (2, Activity::Running, 240)] {
            prefault.due = Some(Instant::now());
            prefault.advance(&mut runner, activity);
            let pause = prefault.due().unwrap().saturating_duration_since(Instant::now());
            assert!(pause > Duration::from_millis(least - 5), "{activity:?}: {pause:?}");
            prefault.advance(&mut runner, activity);
            assert_eq!(taken.load(Ordering::SeqCst), number, "one, and the next is not due");
        }
        prefault.due = Some(Instant::now());
        prefault.advance(&mut runner, Activity::Idle);
        assert_eq!(prefault.due(), None);
        prefault.advance(&mut runner, Activity::Idle);
        assert_eq!(taken.load(Ordering::SeqCst), 3, "no more than there are");
    }

    #[tokio::test]
    async fn an_idle_engine_prefaults_all_and_says_so() {
        let (runner, taken) = slow(5, 1);
        let engine = start(move || Ok(runner), EngineOptions::default()).await.unwrap();
        assert!(!engine.stats().memory_resident, "readiness does not wait for it");
        while !engine.stats().memory_resident {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert_eq!(taken.load(Ordering::SeqCst), 5);
    }

    #[tokio::test]
    async fn a_busy_engine_prefaults_between_steps() {
        let (runner, taken) = slow(3, 1);
        let engine = start(move || Ok(runner), EngineOptions::default()).await.unwrap();
        let mut generation = engine.submit(request(100_000 - 8)).unwrap();
        let begin = Instant::now();
        while taken.load(Ordering::SeqCst) < 3 {
            assert!(matches!(generation.next().await, Event::Started { .. } | Event::Token(_)), "it runs all the time");
            assert!(begin.elapsed() < Duration::from_secs(60));
        }
        assert!(begin.elapsed() > Duration::from_millis(2 * 24), "with pauses");
    }

    #[tokio::test]
    async fn the_engine_ends_and_answers_between_slices() {
        let (runner, taken) = slow(1_000_000, 2);
        let engine = start(move || Ok(runner), EngineOptions::default()).await.unwrap();
        while taken.load(Ordering::SeqCst) < 3 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut generation = engine.submit(request(2)).unwrap();
        while !matches!(generation.next().await, Event::Finished(_)) {}
        assert!(!engine.stats().memory_resident);
        drop(generation);
        drop(engine);
        let begin = Instant::now();
        while taken.load(Ordering::SeqCst) != usize::MAX {
            assert!(begin.elapsed() < Duration::from_secs(5), "the thread goes on");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
