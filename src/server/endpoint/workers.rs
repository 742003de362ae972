//! The workers of one endpoint, as far as they have been heard of.

use std::collections::HashMap;
use std::collections::hash_map::Iter;
use std::time::{Duration, Instant};

use crate::error::{Failure, Kind};

/// More than these at one endpoint are refused: ids are free, memory is not.
const MOST: usize = 1000;
/// Stops kept for a worker that does not fetch them.
const MOST_STOPS: usize = 10_000;

#[derive(Debug)]
pub struct Worker {
    /// When it was last heard of, on any route.
    seen: Instant,
    /// Long polls it has open: while there is one, it is alive.
    polls: usize,
    /// It has pinged or polled its stop channel, so it is heard of while it works too.
    has_heartbeat: bool,
    /// It has asked for jobs.
    pub polled: bool,
    /// Its pings name the jobs it holds.
    lists: bool,
    /// Why it reported itself unhealthy.
    pub unhealthy: Option<String>,
    stops: Vec<String>,
}

impl Worker {
    pub fn silent(&self, limit: Duration, now: Instant) -> bool {
        self.polls == 0 && self.seen + limit <= now
    }

    pub fn has_heartbeat(&self) -> bool {
        self.has_heartbeat
    }
}

/// The route by which a worker was heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contact {
    Take,
    Stop,
    Ping,
    Post,
}

#[derive(Debug, Default)]
pub struct Workers {
    known: HashMap<String, Worker>,
}

impl Workers {
    /// Notes that a worker was heard of.
    pub fn seen(&mut self, name: &str, contact: Contact, now: Instant) -> Result<(), Failure> {
        if !self.known.contains_key(name) {
            if contact == Contact::Post {
                return Ok(());
            }
            if self.known.len() >= MOST {
                return Err(Failure::new(Kind::Overloaded, format!("This endpoint has {MOST} workers already.")).retry_after(5));
            }
        }
        let worker = self.known.entry(name.to_owned()).or_insert_with(|| Worker {
            seen: now,
            polls: 0,
            has_heartbeat: false,
            polled: false,
            lists: false,
            unhealthy: None,
            stops: Vec::new(),
        });
        worker.seen = now;
        match contact {
            Contact::Take => {
                worker.polled = true;
                worker.unhealthy = None;
            }
            Contact::Ping | Contact::Stop => worker.has_heartbeat = true,
            Contact::Post => {}
        }
        Ok(())
    }

    /// A long poll begins (`true`) or ends.
    pub fn poll(&mut self, name: &str, begins: bool, now: Instant) {
        if let Some(worker) = self.known.get_mut(name) {
            worker.polls = if begins { worker.polls + 1 } else { worker.polls.saturating_sub(1) };
            worker.seen = now;
        }
    }

    /// It was given a job.
    pub fn took(&mut self, name: &str) {
        if let Some(worker) = self.known.get_mut(name) {
            worker.unhealthy = None;
        }
    }

    /// Notes whether its ping named jobs; returns whether its pings do so at all.
    pub fn listed(&mut self, name: &str, named: bool) -> bool {
        match self.known.get_mut(name) {
            Some(worker) => {
                worker.lists |= named;
                worker.lists
            }
            None => false,
        }
    }

    pub fn unhealthy(&mut self, name: &str, reason: String) {
        if let Some(worker) = self.known.get_mut(name) {
            worker.unhealthy = Some(reason);
        }
    }

    /// Tells a worker to stop a job.
    pub fn stop(&mut self, name: Option<&str>, id: &str) {
        let Some(worker) = name.and_then(|name| self.known.get_mut(name)) else { return };
        if worker.stops.len() < MOST_STOPS && !worker.stops.iter().any(|stop| stop == id) {
            worker.stops.push(id.to_owned());
        }
    }

    pub fn unstop(&mut self, name: &str, id: &str) {
        if let Some(worker) = self.known.get_mut(name) {
            worker.stops.retain(|stop| stop != id);
        }
    }

    /// The jobs a worker is to stop; they are named once.
    pub fn take_stops(&mut self, name: &str) -> Vec<String> {
        self.known.get_mut(name).map(|worker| std::mem::take(&mut worker.stops)).unwrap_or_default()
    }

    pub fn get(&self, name: &str) -> Option<&Worker> {
        self.known.get(name)
    }

    pub fn iter(&self) -> Iter<'_, String, Worker> {
        self.known.iter()
    }

    /// Some worker has asked for jobs.
    pub fn any_polling(&self) -> bool {
        self.known.values().any(|worker| worker.polled)
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    pub fn retain(&mut self, mut keep: impl FnMut(&str, &Worker) -> bool) {
        self.known.retain(|name, worker| keep(name, worker));
    }
}
