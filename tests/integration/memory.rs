//! The memory of the plan is taken after the load, not during it, and then the process has it.

use super::alone;
use worker_candle::checkpoint::demo;
use worker_candle::config::{DeviceChoice, EngineSettings};
use worker_candle::models::Runner;
use worker_candle::models::runner::ModelRunner;

const MIB: usize = 1 << 20;

/// Resident MiB of this process.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? >> 10)
}

#[test]
fn the_pool_is_taken_in_slices_after_the_load() {
    alone("memory::measured_pool");
}

#[test]
#[ignore = "measures the whole process: the_pool_is_taken_in_slices_after_the_load runs it in one of its own"]
fn measured_pool() {
    const POOL: usize = 192;
    let settings = EngineSettings {
        device: DeviceChoice::Cpu,
        threads: Some(2),
        kv_cache_gb: Some(POOL as f64 / 1024.0),
        max_num_batched_tokens: Some(4096),
        ..Default::default()
    };
    let before = resident().unwrap();
    let mut runner = ModelRunner::load(&demo::files(), || Ok(usize::MAX), &settings).unwrap();
    let loaded = resident().unwrap();
    assert!(loaded < before + POOL / 3, "{before} MiB before the load, {loaded} after");
    let mut slices = 1;
    while runner.prefault(4 * MIB) {
        slices += 1;
    }
    let taken = resident().unwrap();
    assert!(taken >= loaded + POOL - 1 && taken < loaded + POOL + POOL / 2, "{loaded} MiB, then {taken}");
    // No slice is larger than it was asked to be.
    assert!(slices >= POOL / 4, "{slices} slices");
    // Nothing comes of asking once more.
    assert!(!runner.prefault(usize::MAX));
    let again = resident().unwrap();
    assert!(again <= taken + 1, "{taken} MiB, then {again}");
}
