//! The slots of states: what layers without keys keep of a sequence, in a size that does not grow with its length.
//!
//! A sequence that runs holds one slot. The others keep *snapshots* for the prefix cache: the state at the end of a cached block, which is what a
//! sequence must go on from that begins with that block and those before it. So a hit reaches only as far as there is a snapshot. Snapshots
//! are few, since each is as large as all keys of many tokens; the one used longest ago makes room when a slot is needed.

/// See the module.
#[derive(Debug, Default)]
pub struct StatePool {
    free: Vec<u32>,
    snapshots: Vec<Snapshot>,
    total: usize,
    /// Counts uses, so that the latest can be told.
    clock: u64,
}

/// The state after the last token of a cached block.
#[derive(Debug, Clone, Copy)]
struct Snapshot {
    block: u32,
    slot: u32,
    used: u64,
}

impl StatePool {
    pub fn new(total: usize) -> Self {
        Self { free: (0..total as u32).rev().collect(), snapshots: Vec::with_capacity(total), total, clock: 0 }
    }

    /// The model keeps no states.
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// Slots that can be taken now: those of snapshots are among them.
    pub fn available(&self) -> usize {
        self.free.len() + self.snapshots.len()
    }

    /// Takes a slot, in need that of the snapshot used longest ago.
    pub fn take(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let oldest = self.snapshots.iter().enumerate().min_by_key(|(_, snapshot)| snapshot.used);
            oldest.map(|(at, _)| at).map(|at| self.snapshots.swap_remove(at).slot)
        })
    }

    pub fn give_back(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// The slot of a block's snapshot, if it has one.
    pub fn snapshot(&self, block: u32) -> Option<u32> {
        self.snapshots.iter().find(|snapshot| snapshot.block == block).map(|snapshot| snapshot.slot)
    }

    /// The slot of a block's snapshot, which counts as used now.
    pub fn use_snapshot(&mut self, block: u32) -> Option<u32> {
        self.clock += 1;
        let snapshot = self.snapshots.iter_mut().find(|snapshot| snapshot.block == block)?;
        snapshot.used = self.clock;
        Some(snapshot.slot)
    }

    /// Makes a slot that was taken the snapshot of a block; gives it back when there is one already, which is the same.
    pub fn keep(&mut self, block: u32, slot: u32) {
        if self.use_snapshot(block).is_some() {
            self.give_back(slot);
        } else {
            self.snapshots.push(Snapshot { block, slot, used: self.clock });
        }
    }

    /// Gives the slot of a block's snapshot back.
    pub fn forget(&mut self, block: u32) {
        if let Some(at) = self.snapshots.iter().position(|snapshot| snapshot.block == block) {
            self.free.push(self.snapshots.swap_remove(at).slot);
        }
    }

    /// The blocks that have a snapshot.
    pub fn blocks(&self) -> impl Iterator<Item = u32> {
        self.snapshots.iter().map(|snapshot| snapshot.block)
    }

    /// Panics unless every slot is free, a snapshot's, or held once by one of `holders`.
    pub fn check_invariants(&self, holders: impl Iterator<Item = u32>) {
        let mut seen: Vec<u32> =
            holders.chain(self.free.iter().copied()).chain(self.snapshots.iter().map(|snapshot| snapshot.slot)).collect();
        seen.sort_unstable();
        assert!(seen.iter().copied().eq(0..self.total as u32), "slots of states leaked: {seen:?} of {}", self.total);
        let mut blocks: Vec<u32> = self.blocks().collect();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), self.snapshots.len(), "a block has two snapshots");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_snapshot_used_longest_ago_makes_room() {
        let mut pool = StatePool::new(3);
        let running = pool.take().unwrap();
        for block in [7, 8] {
            let slot = pool.take().unwrap();
            pool.keep(block, slot);
        }
        assert_eq!((pool.available(), pool.use_snapshot(7)), (2, Some(1)));
        assert_eq!(pool.take(), Some(2), "that of block 8");
        assert_eq!((pool.snapshot(8), pool.snapshot(7)), (None, Some(1)));
        pool.keep(7, 2);
        assert_eq!(pool.available(), 2, "the same state once is enough");
        pool.check_invariants([running].into_iter());
        pool.forget(7);
        assert_eq!((pool.take(), pool.take(), pool.take()), (Some(1), Some(2), None));
        assert!(StatePool::new(0).is_empty());
    }
}
