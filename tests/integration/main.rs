//! The crate from outside, in one program: each further one would cost a minute of linking.

// A test may stop where it stands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod allocations;
mod async_openai;
mod dependency_rule;
mod docs;
#[cfg(target_os = "linux")]
mod memory;
mod worker_and_endpoint;

/// Runs one ignored test in a process of its own: what it measures is the whole process.
#[track_caller]
fn alone(test: &str) {
    let done = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
}
