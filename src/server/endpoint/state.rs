//! What one endpoint knows: jobs, their queue, the workers. Pure: no locks, no clocks, no I/O.
//!
//! NOTE the invariant that keeps every job from being lost or done twice: `waiting` holds exactly the jobs that are IN_QUEUE, each once;
//! a job leaves IN_PROGRESS once, and what is said about it by a worker that lost it changes nothing.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::EndpointOptions;
use super::job::{Offer, Order, Origin, QueuedJob, Status, unknown};
use super::workers::{Worker, Workers};
use crate::error::{Failure, Kind};

/// Bytes of ids up to which a ping names all the jobs of its worker.
const WHOLE_LIST: usize = 1024;

/// Everything about one endpoint.
pub struct State {
    options: Arc<EndpointOptions>,
    /// Bytes held by all endpoints together.
    held: Arc<AtomicUsize>,
    jobs: HashMap<String, QueuedJob>,
    waiting: VecDeque<String>,
    pub workers: Workers,
    completed: u64,
    failed: u64,
    retried: u64,
    /// Webhooks to call.
    pub notices: Vec<Notice>,
}

/// A webhook to call.
pub struct Notice {
    pub job: String,
    pub url: String,
    pub body: Vec<u8>,
}

/// What became of something a worker posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Accepted,
    /// About a job that is gone, ended, or someone else's by now.
    Ignored,
    TooLarge,
}

/// How a job stands, for someone who reads its stream.
pub struct Progress {
    pub chunks: Vec<Value>,
    pub status: Status,
    pub output: Option<Value>,
    pub error: Option<Value>,
    /// Changes when the job starts over.
    pub retries: u32,
}

impl State {
    pub fn new(options: Arc<EndpointOptions>, held: Arc<AtomicUsize>) -> Self {
        Self {
            options,
            held,
            jobs: HashMap::new(),
            waiting: VecDeque::new(),
            workers: Workers::default(),
            completed: 0,
            failed: 0,
            retried: 0,
            notices: Vec::new(),
        }
    }

    pub fn job(&self, id: &str) -> Result<&QueuedJob, Failure> {
        self.jobs.get(id).ok_or_else(|| unknown(id))
    }

    /// Nothing here that anyone could miss.
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty() && self.workers.is_empty()
    }

    /// Jobs waiting or running.
    pub fn load(&self) -> usize {
        self.jobs.values().filter(|job| !job.status.is_final()).count()
    }

    pub fn submit(&mut self, order: Order, now: Instant) -> Result<String, Failure> {
        let full = |what: String| Err(Failure::new(Kind::Overloaded, what).code("queue_full").retry_after(1));
        if self.waiting.len() >= self.options.max_queued {
            return full(format!("The queue is full: {} jobs wait already.", self.waiting.len()));
        }
        let need = order.bytes + QueuedJob::OVERHEAD;
        while self.held.load(Ordering::Relaxed) + need > self.options.max_bytes {
            if !self.forget_oldest_result() {
                return full(format!("The jobs held fill the endpoint's memory of {} bytes.", self.options.max_bytes));
            }
        }
        let uuid = uuid::Uuid::new_v4();
        let id = if order.origin == Origin::Run { format!("{uuid}-u1") } else { format!("sync-{uuid}-u1") };
        self.jobs.insert(id.clone(), QueuedJob::new(id.clone(), order, now, &self.held));
        self.waiting.push_back(id.clone());
        Ok(id)
    }

    fn forget_oldest_result(&mut self) -> bool {
        let oldest = self.jobs.values().filter(|job| job.status.is_final()).min_by_key(|job| job.finished).map(|job| job.id.clone());
        oldest.is_some_and(|id| self.jobs.remove(&id).is_some())
    }

    /// Gives up to `want` jobs to `worker`, oldest first.
    pub fn take(&mut self, worker: &str, want: usize, now: Instant) -> Vec<Offer> {
        let mut offers = Vec::new();
        while offers.len() < want
            && let Some(id) = self.waiting.pop_front()
        {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            job.status = Status::InProgress;
            job.started = Some(now);
            job.worker = Some(worker.to_owned());
            job.changed.notify_waiters();
            offers.push(job.offer());
            // It may have been told to stop this very job in an earlier life of it.
            self.workers.unstop(worker, &id);
        }
        if !offers.is_empty() {
            self.workers.took(worker);
        }
        offers
    }

    /// A worker's final result, or its progress when the body says `IN_PROGRESS`.
    pub fn done(&mut self, worker: &str, id: &str, mut body: Value, bytes: usize, now: Instant) -> Verdict {
        let Some(job) = self.jobs.get_mut(id).filter(|job| job.held_by(worker)) else { return Verdict::Ignored };
        if bytes > self.options.limit(job.order.origin) {
            return Verdict::TooLarge;
        }
        let output = body.get_mut("output").map(Value::take);
        if body["status"] == "IN_PROGRESS" {
            job.output = output;
            job.charge.add(bytes);
            job.changed.notify_waiters();
            return Verdict::Accepted;
        }
        job.charge.add(bytes);
        let error = body.get_mut("error").map(Value::take).filter(truthy);
        let status = if error.is_some() { Status::Failed } else { Status::Completed };
        if body["stopPod"] == true {
            tracing::warn!("worker {worker} asks to be restarted; this endpoint starts no workers, so that is up to whoever started it");
        }
        self.end(id, status, output, error, now);
        Verdict::Accepted
    }

    /// One chunk of a job's stream.
    pub fn chunk(&mut self, worker: &str, id: &str, mut body: Value, bytes: usize) -> Verdict {
        let Some(job) = self.jobs.get_mut(id).filter(|job| job.held_by(worker)) else { return Verdict::Ignored };
        if bytes > self.options.chunk_limit {
            return Verdict::TooLarge;
        }
        if let Some(output) = body.get_mut("output") {
            job.stream.push_back(output.take());
            job.charge.add(bytes);
            job.changed.notify_waiters();
        }
        Verdict::Accepted
    }

    /// Ends a job, once.
    fn end(&mut self, id: &str, status: Status, output: Option<Value>, error: Option<Value>, now: Instant) {
        let Some(job) = self.jobs.get_mut(id).filter(|job| !job.status.is_final()) else { return };
        match job.status {
            Status::InQueue => self.waiting.retain(|waiting| waiting != id),
            // The worker's own result needs no stop.
            _ if status == Status::Cancelled || status == Status::TimedOut => self.workers.stop(job.worker.as_deref(), id),
            _ => {}
        }
        job.status = status;
        job.finished = Some(now);
        job.output = output;
        job.error = error;
        job.changed.notify_waiters();
        match status {
            Status::Completed => self.completed += 1,
            Status::Failed | Status::TimedOut => self.failed += 1,
            _ => {}
        }
        if let Some(url) = &job.order.webhook {
            self.notices.push(Notice { job: id.to_owned(), url: url.clone(), body: job.notice(url) });
        }
        job.forget_input();
    }

    /// Cancels a job that has not ended; one that has stays as it is. Returns the status object.
    pub fn cancel(&mut self, id: &str, now: Instant) -> Result<Value, Failure> {
        self.job(id)?;
        self.end(id, Status::Cancelled, None, None, now);
        self.job(id).map(|job| Value::Object(job.summary()))
    }

    /// Puts a failed or timed-out job back into the queue.
    pub fn retry(&mut self, id: &str, now: Instant) -> Result<Value, Failure> {
        let job = self.jobs.get_mut(id).ok_or_else(|| unknown(id))?;
        if !matches!(job.status, Status::Failed | Status::TimedOut) {
            let text = format!("Only a FAILED or TIMED_OUT job can be retried; job `{id}` is {}.", job.status.name());
            return Err(Failure::new(Kind::BadRequest, text));
        }
        if job.order.input.is_empty() {
            let text = format!("The input of job `{id}` was too large to be kept for a retry. Submit it again.");
            return Err(Failure::new(Kind::BadRequest, text));
        }
        job.requeue(now);
        job.losses = 0;
        self.retried += 1;
        self.waiting.push_back(id.to_owned());
        Ok(json!({ "id": id, "status": Status::InQueue.name() }))
    }

    /// Cancels everything that waits. Running jobs are left alone.
    pub fn purge(&mut self, now: Instant) -> usize {
        let waiting: Vec<String> = self.waiting.iter().cloned().collect();
        for id in &waiting {
            self.end(id, Status::Cancelled, None, None, now);
        }
        waiting.len()
    }

    /// Sets how long after submission the job is deleted.
    pub fn set_ttl(&mut self, id: &str, ttl: Duration) {
        if let Some(job) = self.jobs.get_mut(id) {
            job.order.ttl = ttl;
        }
    }

    /// Reads and removes the chunks that came since the last read.
    pub fn drain(&mut self, id: &str) -> Result<Progress, Failure> {
        let job = self.jobs.get_mut(id).ok_or_else(|| unknown(id))?;
        let chunks: Vec<Value> = job.stream.drain(..).collect();
        let end = job.status.is_final();
        if !end && !chunks.is_empty() {
            job.charge.clear();
        }
        Ok(Progress {
            chunks,
            status: job.status,
            output: if end { job.output.clone() } else { None },
            error: if end { job.error.clone() } else { None },
            retries: job.retries,
        })
    }

    /// A heartbeat, with the ids of the jobs the worker holds. A worker with many of them may name some in each ping, in turn: what a long list
    /// leaves out is not lost.
    pub fn ping(&mut self, worker: &str, ids: &[&str], now: Instant) {
        let is_whole = ids.iter().map(|id| id.len() + 1).sum::<usize>() < WHOLE_LIST;
        let lists = self.workers.listed(worker, !ids.is_empty()) && is_whole;
        for id in ids {
            // A worker that was thought lost, or missed a stop, still works on what is no longer its own.
            let stale = self.jobs.get(*id).is_none_or(|job| match job.status {
                Status::Cancelled | Status::TimedOut => true,
                _ => job.worker.as_deref() != Some(worker) && job.past.iter().any(|past| past == worker),
            });
            if stale {
                self.workers.stop(Some(worker), id);
            }
        }
        let held = self.jobs.values_mut().filter(|job| job.status == Status::InProgress && job.worker.as_deref() == Some(worker));
        for job in held {
            if !lists || ids.contains(&job.id.as_str()) {
                job.unlisted = None;
            } else {
                job.unlisted.get_or_insert(now);
            }
        }
    }

    /// A worker asks for jobs and says that it holds none. It may not know yet of what it was given just now; what it was given before that
    /// is lost: its process ended, and this is another under the same name, or the answer to its poll never arrived.
    pub fn holds_nothing(&mut self, worker: &str, now: Instant) {
        let arrival = self.options.arrival;
        let held = self.jobs.values().filter(|job| job.status == Status::InProgress && job.worker.as_deref() == Some(worker));
        let mut lost: Vec<_> = held
            .filter(|job| job.started.is_some_and(|started| started + arrival <= now))
            .map(|job| (job.created, job.id.clone()))
            .collect();
        lost.sort_by(|left, right| right.cmp(left));
        for (_, id) in lost {
            self.lose(&id, now);
        }
    }

    /// What time brings: expiry, time-outs, results no longer kept, jobs of lost workers back into the queue.
    pub fn sweep(&mut self, now: Instant) {
        let mut expired = Vec::new();
        let mut late = Vec::new();
        let mut lost = Vec::new();
        for job in self.jobs.values() {
            let kept = self.options.retention(job.order.origin);
            if job.created + job.order.ttl <= now || job.finished.is_some_and(|finished| finished + kept <= now) {
                expired.push(job.id.clone());
            } else if job.status == Status::InProgress {
                if job.started.is_some_and(|started| started + job.order.execution_timeout.unwrap_or(self.options.execution_timeout) <= now)
                {
                    late.push(job.id.clone());
                } else if self.is_lost(job, now) {
                    lost.push((job.created, job.id.clone()));
                }
            }
        }
        for id in late {
            self.end(&id, Status::TimedOut, None, Some(json!("The job ran longer than its execution timeout.")), now);
        }
        for id in expired {
            self.remove(&id);
        }
        // Newest first, each to the head: the oldest ends up in front.
        lost.sort_by(|left, right| right.cmp(left));
        for (_, id) in lost {
            self.lose(&id, now);
        }
        let jobs = &self.jobs;
        let holds = |name: &str| jobs.values().any(|job| job.status == Status::InProgress && job.worker.as_deref() == Some(name));
        let lost_after = self.options.lost_after;
        self.workers.retain(|name, worker| !worker.silent(lost_after, now) || holds(name));
    }

    fn is_lost(&self, job: &QueuedJob, now: Instant) -> bool {
        let limit = self.options.lost_after;
        let unlisted = job.unlisted.is_some_and(|since| since + limit <= now);
        let gone = match job.worker.as_deref().and_then(|name| self.workers.get(name)) {
            Some(worker) if worker.has_heartbeat() => worker.silent(limit, now),
            // It only ever took: while it works on a job it says nothing, however healthy.
            Some(worker) => worker.silent(self.options.silent_after, now),
            None => true,
        };
        unlisted || gone
    }

    fn lose(&mut self, id: &str, now: Instant) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let worker = job.worker.clone().unwrap_or_default();
        job.losses += 1;
        if job.losses > self.options.max_losses {
            let text =
                format!("The job was given up: {} workers in a row were lost while they held it, the last one `{worker}`.", job.losses);
            return self.end(id, Status::Failed, None, Some(json!(text)), now);
        }
        tracing::warn!("worker {worker} has lost job {id}, which goes back to the head of the queue");
        job.requeue(now);
        self.retried += 1;
        self.waiting.push_front(id.to_owned());
    }

    /// Deletes a job in any state.
    fn remove(&mut self, id: &str) {
        let Some(job) = self.jobs.remove(id) else { return };
        match job.status {
            Status::InQueue => self.waiting.retain(|waiting| waiting != id),
            Status::InProgress => self.workers.stop(job.worker.as_deref(), id),
            _ => {}
        }
        job.changed.notify_waiters();
    }

    /// The answer of `/health`.
    pub fn health(&self, now: Instant) -> Value {
        let count = |status| self.jobs.values().filter(|job| job.status == status).count();
        let mut running = std::collections::HashSet::new();
        for job in self.jobs.values().filter(|job| job.status == Status::InProgress) {
            running.extend(job.worker.as_deref());
        }
        let alive: Vec<(&String, &Worker)> =
            self.workers.iter().filter(|(_, worker)| !worker.silent(self.options.lost_after, now) || !worker.has_heartbeat()).collect();
        let unhealthy = alive.iter().filter(|(_, worker)| worker.unhealthy.is_some()).count();
        let busy = alive.iter().filter(|(name, worker)| worker.unhealthy.is_none() && running.contains(name.as_str())).count();
        let starting =
            alive.iter().filter(|(name, worker)| worker.unhealthy.is_none() && !worker.polled && !running.contains(name.as_str()));
        let initializing = starting.count();
        let idle = alive.len() - unhealthy - busy - initializing;
        json!({
            "jobs": {
                "completed": self.completed,
                "failed": self.failed,
                "inProgress": count(Status::InProgress),
                "inQueue": count(Status::InQueue),
                "retried": self.retried,
            },
            "workers": {
                "idle": idle,
                "initializing": initializing,
                "ready": idle,
                "running": busy,
                "throttled": 0,
                "unhealthy": unhealthy,
            },
        })
    }

    /// The newest jobs, without their outputs.
    pub fn requests(&self, most: usize) -> Value {
        let mut jobs: Vec<&QueuedJob> = self.jobs.values().collect();
        jobs.sort_by_key(|job| std::cmp::Reverse(job.created));
        let list: Vec<Value> = jobs.into_iter().take(most).map(|job| Value::Object(job.summary())).collect();
        json!({ "requests": list })
    }
}

/// As Python sees it: the SDKs drop a falsy `error`.
fn truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::String(text) => !text.is_empty(),
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Submit,
        Take(u8, usize),
        Done(u8, u8),
        Chunk(u8, u8),
        Ping(u8),
        Cancel(u8),
        Retry(u8),
        Purge,
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Submit),
            3 => (0..3u8, 1..4usize).prop_map(|(worker, want)| Step::Take(worker, want)),
            3 => (0..3u8, any::<u8>()).prop_map(|(worker, job)| Step::Done(worker, job)),
            2 => (0..3u8, any::<u8>()).prop_map(|(worker, job)| Step::Chunk(worker, job)),
            2 => (0..3u8).prop_map(Step::Ping),
            1 => any::<u8>().prop_map(Step::Cancel),
            1 => any::<u8>().prop_map(Step::Retry),
            1 => Just(Step::Purge),
            2 => (0..100u64).prop_map(Step::Wait),
        ]
    }

    fn check(state: &State) {
        let waiting: HashSet<&String> = state.waiting.iter().collect();
        assert_eq!(waiting.len(), state.waiting.len(), "a job waits twice");
        let queued: HashSet<&String> = state.jobs.values().filter(|job| job.status == Status::InQueue).map(|job| &job.id).collect();
        assert_eq!(waiting, queued);
        for job in state.jobs.values() {
            assert!(job.status != Status::InQueue || job.started.is_none());
            assert_eq!(job.status.is_final(), job.finished.is_some());
        }
    }

    proptest! {
        /// Whatever happens in whatever order: nothing waits twice or gets lost, each run of a job ends once, memory is given back.
        #[test]
        fn no_job_is_lost_or_done_twice(steps in proptest::collection::vec(step(), 1..200)) {
            let second = Duration::from_secs(1);
            let options = EndpointOptions { lost_after: 60 * second, silent_after: 100 * second, ..EndpointOptions::default() };
            let held = Arc::new(AtomicUsize::new(0));
            let mut state = State::new(Arc::new(options), held.clone());
            let mut now = Instant::now();
            let mut ids: Vec<String> = Vec::new();
            let mut ends: HashMap<String, u64> = HashMap::new();
            let pick = |ids: &[String], n: u8| ids.get(n as usize % ids.len().max(1)).cloned().unwrap_or_default();
            for step in steps {
                match step {
                    Step::Submit => ids.push(state.submit(Order::new(Origin::Run, "1".into(), 10), now).unwrap()),
                    Step::Take(worker, want) => {
                        let name = format!("w{worker}");
                        state.workers.seen(&name, super::super::workers::Contact::Take, now).unwrap();
                        let before: Vec<String> = state.waiting.iter().take(want).cloned().collect();
                        let offers: Vec<String> = state.take(&name, want, now).into_iter().map(|job| job.id).collect();
                        prop_assert_eq!(before, offers);
                    }
                    Step::Done(worker, job) => {
                        let (name, id) = (format!("w{worker}"), pick(&ids, job));
                        let allowed = state.jobs.get(&id).is_some_and(|job| job.held_by(&name));
                        let verdict = state.done(&name, &id, json!({"output": "x"}), 5, now);
                        prop_assert_eq!(verdict == Verdict::Accepted, allowed);
                        if allowed {
                            *ends.entry(id.clone()).or_default() += 1;
                            prop_assert_eq!(state.done(&name, &id, json!({"output": "y"}), 5, now), Verdict::Ignored);
                            prop_assert_eq!(state.jobs[&id].output.clone(), Some(json!("x")));
                        }
                    }
                    Step::Chunk(worker, job) => {
                        state.chunk(&format!("w{worker}"), &pick(&ids, job), json!({"output": "c"}), 7);
                    }
                    Step::Ping(worker) => {
                        let name = format!("w{worker}");
                        state.workers.seen(&name, super::super::workers::Contact::Ping, now).unwrap();
                        let jobs: Vec<String> = state.jobs.values().filter(|job| job.held_by(&name)).map(|job| job.id.clone()).collect();
                        state.ping(&name, &jobs.iter().map(String::as_str).collect::<Vec<_>>(), now);
                    }
                    Step::Cancel(job) => {
                        let id = pick(&ids, job);
                        let there = state.jobs.contains_key(&id);
                        prop_assert_eq!(state.cancel(&id, now).is_ok(), there);
                        prop_assert!(!there || state.jobs[&id].status.is_final());
                    }
                    Step::Retry(job) => drop(state.retry(&pick(&ids, job), now)),
                    Step::Purge => {
                        state.purge(now);
                        prop_assert!(state.waiting.is_empty());
                    }
                    Step::Wait(seconds) => {
                        now += Duration::from_secs(seconds);
                        state.sweep(now);
                    }
                }
                check(&state);
            }
            prop_assert!(ends.values().all(|times| *times == 1), "completed jobs cannot be retried");
            prop_assert_eq!(ends.len() as u64, state.completed);
            state.sweep(now + Duration::from_secs(86_400));
            prop_assert!(state.jobs.is_empty() && state.waiting.is_empty());
            prop_assert_eq!(held.load(Ordering::Relaxed), 0);
        }
    }
}
