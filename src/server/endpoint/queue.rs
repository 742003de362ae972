//! One endpoint with its lock, and the waits: long polls of workers, `runsync`, streams.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::Value;
use tokio::sync::{Notify, watch};

use super::EndpointOptions;
use super::job::{Offer, Order, Status};
use super::state::{Notice, Progress, State};
use super::webhook::Webhooks;
use super::workers::Contact;
use crate::error::{Failure, Kind};

pub struct Queue {
    pub options: Arc<EndpointOptions>,
    state: Mutex<State>,
    /// Told when jobs wait or stops are due.
    work: Notify,
    webhooks: Arc<Webhooks>,
    closed: watch::Receiver<bool>,
    /// What the gateway knows of the models served here.
    pub models: super::models::Known,
}

impl Queue {
    pub fn new(options: Arc<EndpointOptions>, held: Arc<AtomicUsize>, webhooks: Arc<Webhooks>, closed: watch::Receiver<bool>) -> Self {
        let state = Mutex::new(State::new(options.clone(), held));
        Self { options, state, work: Notify::new(), webhooks, closed, models: Default::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks without changing anything.
    pub fn look<T>(&self, f: impl FnOnce(&State) -> T) -> T {
        f(&self.lock())
    }

    /// Changes something, then tells whoever waits for it.
    pub fn change<T>(&self, f: impl FnOnce(&mut State, Instant) -> T) -> T {
        let (result, notices) = {
            let mut state = self.lock();
            let result = f(&mut state, Instant::now());
            (result, std::mem::take(&mut state.notices))
        };
        for Notice { job, url, body } in notices {
            self.webhooks.send(job, url, body);
        }
        self.work.notify_waiters();
        result
    }

    pub fn submit(&self, order: Order) -> Result<String, Failure> {
        if *self.closed.borrow() {
            return Err(Failure::new(Kind::Draining, "The endpoint is shutting down and takes no new jobs."));
        }
        self.change(|state, now| state.submit(order, now))
    }

    /// Waits until the job has ended or the time is over; then says how it stands.
    pub async fn wait_end(&self, id: &str, until: Instant) -> Result<(Status, Value), Failure> {
        loop {
            let changed = self.look(|state| state.job(id).map(|job| job.changed.clone()))?;
            let told = changed.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            let (status, report) = self.look(|state| state.job(id).map(|job| (job.status, job.report())))?;
            if status.is_final() || tokio::time::timeout_at(until.into(), told).await.is_err() {
                return Ok((status, Value::Object(report)));
            }
        }
    }

    /// Waits until there is something new in the job's stream, it has ended, it has started over since `attempt`, or the time is over.
    pub async fn wait_chunks(&self, id: &str, until: Instant, attempt: Option<u32>) -> Result<Progress, Failure> {
        loop {
            let changed = self.look(|state| state.job(id).map(|job| job.changed.clone()))?;
            let told = changed.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            let progress = self.change_quietly(|state| state.drain(id))?;
            let over = attempt.is_some_and(|attempt| attempt != progress.retries);
            let news = !progress.chunks.is_empty() || progress.status.is_final() || over;
            if news || tokio::time::timeout_at(until.into(), told).await.is_err() {
                return Ok(progress);
            }
        }
    }

    fn change_quietly<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.lock())
    }

    /// The long poll of a worker that wants jobs. Empty when none came in the time a poll is held.
    ///
    /// Cancel-safe: jobs leave the queue in the same poll of this future that returns them. A worker that hangs up while it waits
    /// drops the future, and no job with it.
    ///
    /// `holds_nothing`: the worker says that it has no job.
    pub async fn take(&self, worker: &str, want: usize, holds_nothing: bool) -> Result<Vec<Offer>, Failure> {
        self.change(|state, now| {
            state.workers.seen(worker, Contact::Take, now)?;
            if holds_nothing {
                state.holds_nothing(worker, now);
            }
            Ok::<(), Failure>(())
        })?;
        Ok(self.poll(worker, |state, now| state.take(worker, want, now)).await)
    }

    /// The long poll of a worker's stop channel.
    pub async fn stops(&self, worker: &str) -> Result<Vec<String>, Failure> {
        self.change_quietly(|state| state.workers.seen(worker, Contact::Stop, Instant::now()))?;
        Ok(self.poll(worker, |state, _| state.workers.take_stops(worker)).await)
    }

    async fn poll<T>(&self, worker: &str, mut get: impl FnMut(&mut State, Instant) -> Vec<T>) -> Vec<T> {
        let until = Instant::now() + self.options.hold;
        let _open = OpenPoll::new(self, worker);
        let mut closed = self.closed.clone();
        loop {
            let told = self.work.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            let found = self.change_quietly(|state| get(state, Instant::now()));
            if !found.is_empty() || *closed.borrow_and_update() {
                return found;
            }
            tokio::select! {
                result = tokio::time::timeout_at(until.into(), told) => {
                    if result.is_err() {
                        return found;
                    }
                }
                _ = closed.changed() => {}
            }
        }
    }
}

/// A worker is alive while it has a poll open, and was so until it closed.
struct OpenPoll<'a> {
    queue: &'a Queue,
    worker: &'a str,
}

impl<'a> OpenPoll<'a> {
    fn new(queue: &'a Queue, worker: &'a str) -> Self {
        queue.change_quietly(|state| state.workers.poll(worker, true, Instant::now()));
        Self { queue, worker }
    }
}

impl Drop for OpenPoll<'_> {
    fn drop(&mut self) {
        self.queue.change_quietly(|state| state.workers.poll(self.worker, false, Instant::now()));
    }
}

/// Cancels a job when its reader goes away before the end.
pub struct CancelOnDrop {
    queue: Arc<Queue>,
    id: String,
    armed: bool,
}

impl CancelOnDrop {
    pub fn new(queue: Arc<Queue>, id: String) -> Self {
        Self { queue, id, armed: true }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The job has ended by itself.
    pub fn disarm(&mut self) {
        self.armed = false;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if self.armed {
            let _ = self.queue.change(|state, now| state.cancel(&self.id, now));
        }
    }
}
