//! The block pool: which blocks of the KV cache are free.

/// Free blocks of the KV cache. A block has one owner at a time.
#[derive(Debug)]
pub struct BlockPool {
    /// Taken from the end: the block freed last is used first, while its memory is warm.
    free: Vec<u32>,
    total: usize,
}

impl BlockPool {
    pub fn new(total: usize) -> Self {
        Self { free: (0..total as u32).rev().collect(), total }
    }

    pub fn total(&self) -> usize {
        self.total
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes `count` blocks, or none when there are not so many.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        let from = self.free.len().checked_sub(count)?;
        Some(self.free.split_off(from))
    }

    /// Gives blocks back.
    pub fn give(&mut self, blocks: impl IntoIterator<Item = u32>) {
        self.free.extend(blocks);
        debug_assert!(self.free.len() <= self.total, "a block was freed twice");
    }
}
