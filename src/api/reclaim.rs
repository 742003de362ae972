//! Memory given back to the system after large requests.
//!
//! The tree of a large request is a million small pieces. Freed, they stay with the allocator, which keeps them for the next one: without
//! this a worker that has once read a large request looks large for ever. Only glibc needs it, and only there it does anything.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A text of this length makes a tree worth the trouble.
const LARGE: usize = 256 * 1024;
/// When to look for what has been freed. A tree mostly goes in [`freed`], but a request may be refused or dropped before that. In milliseconds.
const PAUSES: [u64; 5] = [100, 300, 600, 2000, 5000];

static AGAIN: AtomicBool = AtomicBool::new(false);
static WATCHED: AtomicBool = AtomicBool::new(false);

/// To be called once, at the start. Lets every large piece of memory go back to the system when it is freed: by itself glibc keeps pieces of
/// up to 32 MiB once it has seen one freed. And small pieces are joined as they are freed: those it would set aside for quick reuse keep
/// the end of a thread's memory from being given back, then or later.
pub fn configure() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: calls without pointers. They set numbers of the allocator.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE as libc::c_int);
        libc::mallopt(libc::M_MXFAST, 0);
    }
}

/// A text of so many bytes is being parsed: what its tree takes is given back once it is freed.
pub fn after(bytes: usize) {
    if bytes < LARGE || !cfg!(all(target_os = "linux", target_env = "gnu")) {
        return;
    }
    AGAIN.store(true, Ordering::SeqCst);
    if !WATCHED.swap(true, Ordering::SeqCst) {
        let started = std::thread::Builder::new().name("memory".into()).spawn(watch);
        if started.is_err() {
            WATCHED.store(false, Ordering::SeqCst);
        }
    }
}

/// A tree has been freed, of whatever size.
pub fn freed() {
    if WATCHED.load(Ordering::SeqCst) {
        give_back();
    }
}

fn watch() {
    let mut step = 0;
    while let Some(pause) = PAUSES.get(step) {
        std::thread::sleep(Duration::from_millis(*pause));
        give_back();
        step = if AGAIN.swap(false, Ordering::SeqCst) { 0 } else { step + 1 };
    }
    WATCHED.store(false, Ordering::SeqCst);
    // One that came between the two would have nobody.
    if AGAIN.swap(false, Ordering::SeqCst) {
        after(LARGE);
    }
}

fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: a call without pointers. It returns free pages and touches no memory in use.
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
}
