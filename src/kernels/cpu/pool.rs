//! The threads of one device: they take the tasks of one kernel after another, with the caller among them.
//!
//! A decode step is a hundred kernels of some microseconds each, so handing them over must cost less than one: helpers watch a
//! counter for a moment after each kernel and sleep only then, tasks are taken from a shared counter, and nothing is allocated. A helper that
//! comes late, or is not scheduled at all, holds nothing up: the caller takes its tasks and waits only for helpers that are in.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};

/// Rounds a helper watches for the next kernel before it sleeps: some tens of microseconds, a step's serial parts.
const WATCH: u32 = 20_000;
/// Set in `gate` while a kernel's tasks may be taken; the lower bits count the helpers that are in.
const OPEN: u32 = 1 << 31;

/// See the module. Dropping it ends the threads.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    threads: Vec<Thread>,
}

struct Shared {
    /// The kernel at hand. Written by the caller while the gate is closed and nobody is in.
    job: std::cell::UnsafeCell<ParallelJob>,
    /// Counts kernels, so that a helper joins each once.
    round: AtomicU32,
    gate: AtomicU32,
    next: AtomicUsize,
    sleeping: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

#[derive(Clone, Copy)]
struct ParallelJob {
    /// Called with a task and the number of the thread.
    run: *const (dyn Fn(usize, usize) + Sync),
    tasks: usize,
}

// SAFETY: `job` is read only between entering and leaving the gate, and written only while nobody is in.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

fn nothing(_task: usize, _thread: usize) {}

impl Pool {
    /// `threads` in all, the caller's included.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            job: std::cell::UnsafeCell::new(ParallelJob { run: &nothing, tasks: 0 }),
            round: AtomicU32::new(0),
            gate: AtomicU32::new(0),
            next: AtomicUsize::new(0),
            sleeping: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let helper = |index: usize| {
            let shared = shared.clone();
            std::thread::Builder::new().name(format!("compute-{index}")).spawn(move || shared.help(index))
        };
        let helpers = (1..threads.max(1)).map(helper).collect::<Result<Vec<_>, _>>()?;
        let threads = helpers.iter().map(|helper| helper.thread().clone()).collect();
        Ok(Self { shared, helpers, threads })
    }

    /// How many threads compute, the caller included.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `task(index, thread)` for every index below `tasks`, on all threads; `thread` is below [`Pool::threads`] and names the
    /// one that runs it. Returns when all have run.
    ///
    /// # Panics
    /// When a task panicked, after all others have ended.
    pub fn run(&mut self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        if self.helpers.is_empty() || tasks < 2 {
            return (0..tasks).for_each(|index| task(index, 0));
        }
        let shared = &*self.shared;
        // SAFETY: the gate is closed and nobody is in, so nobody reads the job; the reference outlives the round, since this
        // function waits for all that are in, and closes the gate before.
        unsafe {
            let run: *const (dyn Fn(usize, usize) + Sync + '_) = task;
            *shared.job.get() = ParallelJob {
                run: std::mem::transmute::<*const (dyn Fn(usize, usize) + Sync + '_), *const (dyn Fn(usize, usize) + Sync)>(run),
                tasks,
            };
        }
        shared.next.store(0, Ordering::Relaxed);
        shared.gate.store(OPEN, Ordering::Release);
        shared.round.fetch_add(1, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            self.threads.iter().for_each(Thread::unpark);
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.take_tasks(0)));
        shared.gate.fetch_and(!OPEN, Ordering::AcqRel);
        while shared.gate.load(Ordering::Acquire) != 0 {
            std::hint::spin_loop();
        }
        if let Err(panic) = own {
            std::panic::resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a computing thread panicked");
    }
}

impl Shared {
    fn take_tasks(&self, thread: usize) {
        // SAFETY: between entering and leaving the gate the job is not written, and what it refers to is alive.
        let (run, tasks) = unsafe { ((*self.job.get()).run, (*self.job.get()).tasks) };
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                return;
            }
            // SAFETY: as above.
            unsafe { (*run)(index, thread) };
        }
    }

    fn help(&self, thread: usize) {
        let mut seen = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let round = self.wait(seen);
            if self.enter() {
                if catch_unwind(AssertUnwindSafe(|| self.take_tasks(thread))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
                self.gate.fetch_sub(1, Ordering::Release);
            }
            seen = round;
        }
    }

    /// Watches for a round after `seen`, then sleeps until there is one.
    fn wait(&self, seen: u32) -> u32 {
        for _ in 0..WATCH {
            let round = self.round.load(Ordering::Acquire);
            if round != seen || self.stop.load(Ordering::Relaxed) {
                return round;
            }
            std::hint::spin_loop();
        }
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        let mut round = self.round.load(Ordering::SeqCst);
        while round == seen && !self.stop.load(Ordering::SeqCst) {
            std::thread::park();
            round = self.round.load(Ordering::SeqCst);
        }
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
        round
    }

    fn enter(&self) -> bool {
        self.gate.fetch_update(Ordering::Acquire, Ordering::Relaxed, |gate| (gate & OPEN != 0).then_some(gate + 1)).is_ok()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.threads.iter().for_each(Thread::unpark);
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_every_round() {
        let mut pool = Pool::new(4).unwrap();
        for round in 0..3_000usize {
            let tasks = round % 37;
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, &|index, thread| {
                assert!(thread < 4);
                counts[index].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "round {round}");
            if round % 500 == 0 {
                // Let the helpers fall asleep.
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3).unwrap();
        for _ in 0..50 {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(64, &|index, _| assert!(index != 33, "told to"))));
            assert!(result.is_err());
            let sum = AtomicUsize::new(0);
            pool.run(10, &|index, _| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 45);
        }
    }
}
