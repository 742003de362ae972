//! Several engines on the same processors compute one step at a time each, in turn, with all threads: side by side they would wait for each
//! other's threads in the middle of every kernel.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A lock that is given in the order in which it is asked for, so that nobody who asks again and again keeps others from it.
#[derive(Debug, Default)]
pub struct Turns {
    queue: Mutex<Queue>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// The number that the next one to ask gets.
    next: u64,
    /// Whose turn it is.
    now: u64,
}

/// A turn, until it is dropped.
#[derive(Debug)]
pub struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for those that have asked before.
    pub fn take(&self) -> Turn<'_> {
        let mut queue = self.lock();
        let own = queue.next;
        queue.next += 1;
        while queue.now != own {
            queue = self.moved.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        Turn(self)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.lock().now += 1;
        self.0.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    impl Turns {
        fn held_or_asked(&self) -> u64 {
            let queue = self.lock();
            queue.next - queue.now
        }
    }

    #[test]
    fn one_at_a_time_and_each_in_turn() {
        let (turns, inside, log) = (Turns::default(), AtomicUsize::new(0), Mutex::new(Vec::new()));
        let held = turns.take();
        std::thread::scope(|scope| {
            for who in 0..3 {
                let (turns, inside, log) = (&turns, &inside, &log);
                scope.spawn(move || {
                    for _ in 0..200 {
                        let turn = turns.take();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "alone");
                        log.lock().unwrap().push(who);
                        // Until the others have asked, or have nothing more to ask for.
                        while turns.held_or_asked() < 3 && log.lock().unwrap().len() < 590 {
                            std::thread::yield_now();
                        }
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(turn);
                    }
                });
            }
            while turns.held_or_asked() < 4 {
                std::thread::yield_now();
            }
            drop(held);
        });
        let log = log.into_inner().unwrap();
        assert_eq!(log.len(), 600);
        assert!(log[..580].windows(3).all(|three| three[0] != three[1] && three[1] != three[2] && three[0] != three[2]), "{log:?}");
    }

    #[test]
    fn a_panic_passes_the_turn_on() {
        let turns = Turns::default();
        let panicked = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let _turn = turns.take();
                    panic!("told to");
                })
                .join()
        });
        assert!(panicked.is_err());
        drop(turns.take());
    }
}
