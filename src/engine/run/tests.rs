use super::*;
use crate::checkpoint::demo;
use crate::config::{DeviceChoice, EngineSettings, TensorParallel};
use crate::engine::{Generation, Request, SamplingParams};
use crate::models::runner::{Break, ModelRunner};
use crate::models::{Fault, Plan, Shape, StepError};
use std::time::Duration;

/// Says the length of the context, modulo 50; panics or fails on request, in each way a step can.
struct Scripted {
    shape: Shape,
    gate: Option<std::sync::mpsc::Receiver<()>>,
}

const PANIC: u32 = 90;
const FAIL: u32 = 91;
const NO_MEMORY: u32 = 93;
const NO_DEVICE: u32 = 94;
/// Gives nothing to sample once the context ends with it.
const BROKEN: u32 = 92;

impl Runner for Scripted {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn step(&mut self, plan: &Plan) -> Result<Output, StepError> {
        if let Some(gate) = &self.gate {
            let _ = gate.recv();
        }
        assert!(!plan.tokens.contains(&PANIC), "told to");
        for (token, fault) in [(FAIL, Fault::Request), (NO_MEMORY, Fault::Memory), (NO_DEVICE, Fault::Device)] {
            if plan.tokens.contains(&token) {
                return Err(StepError::new(fault, Failure::internal("told to fail")));
            }
        }
        let samples = || plan.rows.iter().filter(|row| row.sampling.is_some());
        Ok(Output {
            tokens: samples().map(|row| row.context as u32 % 50).collect(),
            failed: (0..).zip(samples()).filter(|(_, row)| plan.tokens[row.start + row.len - 1] == BROKEN).map(|(at, _)| at).collect(),
            ..Default::default()
        })
    }
}

fn shape() -> Shape {
    Shape {
        max_model_len: 64,
        vocab_size: 100,
        block_size: 4,
        blocks: 32,
        kv_cache_dtype: "float32",
        state_slots: 0,
        max_num_seqs: 2,
        max_num_batched_tokens: 16,
        memory_bound: true,
        pooling: None,
        whole_prompts: false,
    }
}

async fn engine(gate: Option<std::sync::mpsc::Receiver<()>>, max_waiting: usize) -> Handle {
    start(move || Ok(Scripted { shape: shape(), gate }), EngineOptions { max_waiting, ..Default::default() }).await.unwrap()
}

fn request(prompt: &[u32], max_tokens: usize) -> Request {
    let params = SamplingParams { max_tokens, ..Default::default() };
    Request {
        id: "test".into(),
        prompt: Arc::new(prompt.to_vec()),
        params,
        prompt_logprobs: None,
        deadline: None,
        pooling: None,
        constraint: None,
    }
}

async fn collect(mut generation: Generation) -> (Vec<u32>, Result<Finish, Failure>) {
    let mut tokens = Vec::new();
    loop {
        match generation.next().await {
            Event::Started { .. } => {}
            Event::Token(token) => tokens.push(token.id),
            Event::Prompt(_) | Event::Pooled(_) => {}
            Event::Finished(finish) => return (tokens, Ok(finish)),
            Event::Failed(failure) => return (tokens, Err(failure)),
        }
    }
}

/// One of two ranks ends while the other waits for its part of a sum: the request is told, and the engine computes no more.
#[tokio::test]
async fn a_rank_that_fails_fails_the_engine() {
    let load = || {
        let settings = EngineSettings {
            device: DeviceChoice::Cpu,
            threads: Some(2),
            kv_cache_gb: Some(0.02),
            tensor_parallel: TensorParallel::Ranks(2),
            ..Default::default()
        };
        let runner = ModelRunner::load(&demo::files(), || Ok(usize::MAX), &settings)?;
        runner.break_rank(1, Break::Panic);
        Ok(runner)
    };
    let engine = start(load, EngineOptions::default()).await.unwrap();
    let (tokens, end) = collect(engine.submit(request(&[300, 301], 5)).unwrap()).await;
    assert!(tokens.is_empty() && end.unwrap_err().message.contains("rank 1 has panicked"));
    assert!(engine.failed().await.message.contains("must be restarted"));
    assert!(engine.submit(request(&[300], 1)).is_err());
}

#[tokio::test]
async fn sequences_run_and_leave_nothing_behind() {
    let engine = engine(None, 100).await;
    let all: Vec<_> = (1..20).map(|n| engine.submit(request(&vec![1; n], 5)).unwrap()).collect();
    for (n, generation) in (1u32..20).zip(all) {
        assert_eq!(collect(generation).await, ((n..n + 5).collect(), Ok(Finish::Length)));
    }
    assert!(engine.idle(Duration::from_secs(5)).await);
    assert_eq!((engine.stats().blocks_free, engine.stats().output_tokens), (32, 95));
}

#[tokio::test]
async fn dropping_the_receiver_frees_the_row_within_one_step() {
    let (steps, gate) = std::sync::mpsc::channel();
    let engine = engine(Some(gate), 100).await;
    let mut generation = engine.submit(request(&[1; 10], 50)).unwrap();
    steps.send(()).unwrap();
    assert!(matches!(generation.next().await, Event::Started { cached_tokens: 0 }));
    assert!(matches!(generation.next().await, Event::Token(_)));
    assert_eq!(engine.submit(request(&[2], 1)).map(|_| ()), Ok(()));
    drop(generation);
    // The step that may be in flight, and no more.
    steps.send(()).unwrap();
    steps.send(()).unwrap();
    assert!(engine.idle(Duration::from_secs(5)).await);
    assert_eq!(engine.stats().blocks_free, 32);
}

#[tokio::test]
async fn a_full_queue_refuses_with_a_retry_hint() {
    let (steps, gate) = std::sync::mpsc::channel();
    let engine = engine(Some(gate), 3).await;
    let mut held = Vec::new();
    let refused = loop {
        match engine.submit(request(&[1], 1)) {
            Ok(generation) => held.push(generation),
            Err(failure) => break failure,
        }
        assert!(held.len() < 10);
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    assert_eq!((refused.kind, refused.code, refused.retry_after), (Kind::Overloaded, Some("engine_overloaded"), Some(1)));
    drop(steps);
    for generation in held {
        assert_eq!(collect(generation).await.1, Ok(Finish::Length));
    }
}

#[tokio::test]
async fn what_cannot_run_is_refused() {
    let engine = engine(None, 3).await;
    assert_eq!(engine.submit(request(&[], 1)).unwrap_err().kind, Kind::BadRequest);
    let refused = engine.submit(request(&[1; 64], 1)).unwrap_err();
    assert_eq!(refused.code, Some("context_length_exceeded"));
    assert!(refused.message.contains("64 tokens") && refused.message.contains("128 tokens (32 blocks of 4)"), "{refused}");
    assert_eq!(collect(engine.submit(request(&[1; 63], 9)).unwrap()).await, (vec![13], Ok(Finish::Length)));
}

#[tokio::test]
async fn a_failed_step_fails_its_requests_only() {
    let engine = engine(None, 10).await;
    let (_, result) = collect(engine.submit(request(&[FAIL], 3)).unwrap()).await;
    assert_eq!(result.unwrap_err().message, "told to fail");
    assert_eq!(collect(engine.submit(request(&[1], 2)).unwrap()).await, (vec![1, 2], Ok(Finish::Length)));
}

#[tokio::test]
async fn requests_that_fail_their_steps_do_not_break_the_engine() {
    let engine = engine(None, 10).await;
    for _ in 0..2 * FAILING_STEPS {
        assert_eq!(collect(engine.submit(request(&[FAIL], 3)).unwrap()).await.1.unwrap_err().message, "told to fail");
    }
    assert!(engine.stats().healthy && engine.failure().is_none());
}

#[tokio::test]
async fn a_failed_device_fails_what_runs_what_waits_and_what_comes() {
    let (steps, gate) = std::sync::mpsc::channel();
    let engine = engine(Some(gate), 10).await;
    let mut all = vec![engine.submit(request(&[NO_DEVICE], 9)).unwrap()];
    all.extend((0..4).map(|_| engine.submit(request(&[1; 16], 9)).unwrap()));
    drop(steps);
    for generation in all {
        let failure = collect(generation).await.1.unwrap_err();
        assert!(failure.message.contains("told to fail") && failure.message.contains("restarted"), "{failure}");
        assert!(engine.failure().is_some(), "who sees the failure sees the state");
    }
    assert!(engine.idle(Duration::from_secs(5)).await);
    assert!(!engine.stats().healthy);
    assert_eq!(engine.stats().steps, 1, "nothing runs on a device that has failed");
    assert!(engine.failed().await.message.contains("told to fail"));
    assert!(engine.submit(request(&[1], 2)).unwrap_err().message.contains("told to fail"));
}

#[tokio::test]
async fn steps_that_fail_in_a_row_break_the_engine() {
    let engine = engine(None, 10).await;
    let fails = || async { collect(engine.submit(request(&[NO_MEMORY], 3)).unwrap()).await.1.unwrap_err().message };
    for _ in 0..2 {
        for _ in 1..FAILING_STEPS {
            assert_eq!(fails().await, "told to fail");
        }
        assert_eq!(collect(engine.submit(request(&[1], 2)).unwrap()).await.1, Ok(Finish::Length), "a good step, and the count begins anew");
    }
    for _ in 1..FAILING_STEPS {
        assert_eq!(fails().await, "told to fail");
    }
    assert!(engine.stats().healthy);
    let last = fails().await;
    assert!(last.contains("3 steps in a row") && last.contains("told to fail"), "{last}");
    assert!(!engine.stats().healthy);
}

#[tokio::test]
async fn a_panic_fails_requests_and_health() {
    let engine = engine(None, 10).await;
    let (_, result) = collect(engine.submit(request(&[PANIC], 3)).unwrap()).await;
    assert_eq!(result.unwrap_err().kind, Kind::Internal);
    assert!(engine.idle(Duration::from_secs(5)).await);
    assert!(!engine.stats().healthy);
    engine.failed().await;
    assert_eq!(engine.submit(request(&[1], 2)).unwrap_err().kind, Kind::Internal);
}

#[tokio::test]
async fn a_panic_fails_what_waits_too() {
    let (steps, gate) = std::sync::mpsc::channel();
    let engine = engine(Some(gate), 10).await;
    // Two rows: one panics, one runs beside it, two wait. The last two may still be on their way.
    let first = engine.submit(request(&[PANIC], 9)).unwrap();
    let others: Vec<_> = (0..4).map(|_| engine.submit(request(&[1; 16], 9)).unwrap()).collect();
    drop(steps);
    let failure = collect(first).await.1.unwrap_err();
    assert!(failure.message.contains("while computing"), "{failure}");
    for generation in others {
        assert_eq!(collect(generation).await.1.unwrap_err().kind, Kind::Internal);
    }
    assert!(engine.idle(Duration::from_secs(5)).await);
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.blocks_free, stats.healthy), (0, 0, 32, false));
    assert_eq!(stats.steps, 1, "nothing runs on a device whose state is unknown");
}

#[tokio::test]
async fn a_row_without_finite_logits_fails_its_request_only() {
    let (steps, gate) = std::sync::mpsc::channel();
    let engine = engine(Some(gate), 10).await;
    let sound = engine.submit(request(&[1], 3)).unwrap();
    let broken = engine.submit(request(&[1, 2, BROKEN], 3)).unwrap();
    let mut suppressed = request(&[1, BROKEN], 3);
    suppressed.params.bad_words = Arc::new(vec![vec![3]]);
    let suppressed = engine.submit(suppressed).unwrap();
    drop(steps);
    let (tokens, result) = collect(broken).await;
    let failure = result.unwrap_err();
    assert_eq!(
        (tokens.len(), failure.kind, failure.message.as_str()),
        (0, Kind::Internal, "the model gave no finite logits for this request")
    );
    assert!(collect(suppressed).await.1.unwrap_err().message.contains("bad_words"));
    assert_eq!(collect(sound).await, (vec![1, 2, 3], Ok(Finish::Length)));
    assert!(engine.idle(Duration::from_secs(5)).await);
    assert!(engine.stats().healthy && engine.stats().blocks_free == 32);
    assert_eq!(collect(engine.submit(request(&[1], 2)).unwrap()).await.1, Ok(Finish::Length));
}

#[tokio::test]
async fn an_answer_that_its_text_has_ended_is_no_cancelled_one() {
    let (steps, gate) = std::sync::mpsc::channel();
    let engine = engine(Some(gate), 10).await;
    for (text, stopped, cancelled) in [(true, 1, 0), (false, 1, 1)] {
        let mut generation = engine.submit(request(&[1], 50)).unwrap();
        steps.send(()).unwrap();
        while !matches!(generation.next().await, Event::Token(_)) {}
        if text {
            generation.complete()
        } else {
            drop(generation)
        }
        // A step may be on its way.
        let _ = steps.send(());
        assert!(engine.idle(Duration::from_secs(5)).await);
        let exposition = engine.stats().exposition("", "m");
        let line = |name: &str, value: i32| {
            assert!(exposition.lines().any(|line| line == format!("{name} {value}")), "{name} {value}: {exposition}")
        };
        line("request_success_total{model_name=\"m\",finished_reason=\"stop\"}", stopped);
        line("request_success_total{model_name=\"m\",finished_reason=\"abort\"}", cancelled);
        for histogram in
            ["e2e_request_latency_seconds", "request_prompt_tokens", "request_generation_tokens", "request_inference_time_seconds"]
        {
            line(&format!("{histogram}_count{{model_name=\"m\"}}"), 1);
        }
    }
}

/// Its shape is asked for at each submission; the last time it panics, outside of any step.
struct Cursed {
    scripted: Scripted,
    asked: std::cell::Cell<usize>,
}

impl Runner for Cursed {
    fn shape(&self) -> &Shape {
        self.asked.set(self.asked.get() + 1);
        assert!(self.scripted.shape.max_model_len > 0 && self.asked.get() <= 3, "told to");
        &self.scripted.shape
    }

    fn step(&mut self, plan: &Plan) -> Result<Output, StepError> {
        self.scripted.step(plan)
    }
}

#[tokio::test]
async fn a_panic_outside_of_a_step_fails_requests_and_health() {
    let load = || Ok(Cursed { scripted: Scripted { shape: shape(), gate: None }, asked: 0.into() });
    let engine = start(load, EngineOptions::default()).await.unwrap();
    assert_eq!(collect(engine.submit(request(&[1], 2)).unwrap()).await.1, Ok(Finish::Length));
    assert_eq!(collect(engine.submit(request(&[1], 2)).unwrap()).await.1.unwrap_err().kind, Kind::Internal);
    engine.failed().await;
    assert!(!engine.stats().healthy);
    assert_eq!(engine.submit(request(&[1], 2)).unwrap_err().kind, Kind::Internal);
}

#[tokio::test]
async fn a_deadline_fails_the_request() {
    let (steps, gate) = std::sync::mpsc::channel();
    let engine = engine(Some(gate), 10).await;
    let mut late = request(&[1], 9);
    late.deadline = Some(Instant::now());
    let generation = engine.submit(late).unwrap();
    drop(steps);
    assert_eq!(collect(generation).await.1.unwrap_err().kind, Kind::Timeout);
}

#[tokio::test]
async fn a_model_that_cannot_load_is_an_error() {
    let failed = start(|| Err::<Scripted, _>(Failure::internal("no weights")), EngineOptions::default()).await.err().unwrap();
    assert_eq!(failed.message, "no weights");
    let failed = start(|| -> Result<Scripted, Failure> { panic!("boom") }, EngineOptions::default()).await.err().unwrap();
    assert!(failed.message.contains("boom"));
}
