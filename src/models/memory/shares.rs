//! Several models in one process: the weights and step buffers of all are counted first, and their KV caches share what one model's would get.

use super::{Memory, kv_pool};
use crate::config::EngineSettings;

/// What one of several models needs, and what its KV cache could use, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Demand {
    /// Weights, and on a CPU the buffers of a step.
    pub fixed: usize,
    /// Of one block of its KV cache.
    pub block: usize,
    /// As large as the KV cache need be at most; `usize::MAX` where it takes all that it gets.
    pub useful: usize,
}

/// A model's part of a memory that it shares with others, in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// As it was before the first of them was loaded.
    pub memory: Memory,
    /// For its KV cache.
    pub kv: usize,
    /// What the other models take besides their KV caches.
    pub others_fixed: usize,
    /// The KV caches of the other models.
    pub others_kv: usize,
}

/// Divides the memory, for each model in the order given. Together the KV caches take no more than that of a single model would.
pub fn shares(demands: &[Demand], memory: Memory, settings: &EngineSettings) -> Vec<Share> {
    let fixed = demands.iter().fold(0usize, |sum, demand| sum.saturating_add(demand.fixed));
    let kv: Vec<usize> = match settings.num_blocks {
        Some(blocks) => demands.iter().map(|demand| demand.block.saturating_mul(blocks)).collect(),
        None => filled(kv_pool(memory, settings, fixed), &demands.iter().map(|demand| demand.useful).collect::<Vec<_>>()),
    };
    let all_kv = kv.iter().fold(0usize, |sum, kv| sum.saturating_add(*kv));
    let share = |(demand, kv): (&Demand, &usize)| Share { memory, kv: *kv, others_fixed: fixed - demand.fixed, others_kv: all_kv - kv };
    demands.iter().zip(&kv).map(share).collect()
}

/// Parts of `pool`: equal ones, but nobody gets more than wanted, and what is left then goes to the others.
fn filled(pool: usize, wanted: &[usize]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by_key(|place| wanted[*place]);
    let (mut parts, mut left) = (vec![0; wanted.len()], pool);
    for (done, place) in order.into_iter().enumerate() {
        parts[place] = wanted[place].min(left / (wanted.len() - done));
        left -= parts[place];
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: usize = 1 << 30;

    proptest! {
        #[test]
        fn parts_are_fair_and_never_more_than_there_is(pool in 0usize..1_000_000, wanted in prop::collection::vec(0usize..400_000, 1..6)) {
            let parts = filled(pool, &wanted);
            prop_assert!(parts.iter().sum::<usize>() <= pool && parts.iter().zip(&wanted).all(|(part, wanted)| part <= wanted));
            let most = parts.iter().copied().max().unwrap_or(0);
            for (part, wanted) in parts.iter().zip(&wanted) {
                // Whoever is not content has as much as anybody, but for what cannot be divided.
                prop_assert!(part == wanted || part + parts.len() >= most);
            }
            // Nothing is left over while somebody wants more.
            let content = parts == wanted;
            prop_assert!(content || pool - parts.iter().sum::<usize>() < parts.len());
        }
    }

    #[test]
    fn all_models_count_before_the_first_cache() {
        let memory = Memory { gpu: false, total: 16 * GIB, free: 9 * GIB };
        let demand = |fixed, useful| Demand { fixed, block: 1 << 20, useful };
        let demands = [demand(GIB, GIB / 16), demand(4 * GIB, usize::MAX)];
        // A quarter of the 4 GiB that are left, of which the small model needs a 16th.
        let auto = shares(&demands, memory, &EngineSettings::default());
        assert_eq!(auto[0], Share { memory, kv: GIB / 16, others_fixed: 4 * GIB, others_kv: GIB - GIB / 16 });
        assert_eq!(auto[1], Share { memory, kv: GIB - GIB / 16, others_fixed: GIB, others_kv: GIB / 16 });
        let given = shares(&[demand(GIB, usize::MAX); 3], memory, &EngineSettings { kv_cache_gb: Some(1.5), ..Default::default() });
        assert_eq!(given.iter().map(|share| share.kv).collect::<Vec<_>>(), [GIB / 2; 3]);
        let blocks = shares(&demands, memory, &EngineSettings { num_blocks: Some(7), ..Default::default() });
        assert_eq!((blocks[0].kv, blocks[1].others_kv), (7 << 20, 7 << 20), "a number of blocks is each model's own");
        let gpu = Memory { gpu: true, total: 16 * GIB, free: 15 * GIB };
        let half = EngineSettings { gpu_memory_utilization: Some(0.5), ..Default::default() };
        assert_eq!(shares(&demands, gpu, &half).iter().map(|share| share.kv).sum::<usize>(), 2 * GIB);
    }
}
