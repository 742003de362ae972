//! The block pool: who holds which block of the KV cache, and the prefix cache over it.
//!
//! A full block whose keys and values are computed may be *cached*: found again by its tokens and by the block before it. Cached blocks form
//! a tree under the empty prefix, so a hit compares the tokens of every block on the way: equal hashes alone never share a context.
//! A block that nobody holds stays cached until its memory is needed. The block released longest ago is evicted first, and of one sequence the
//! last block first. Whoever holds a block holds all blocks before it too, so no block is evicted before those that continue it.

use std::hash::{BuildHasher, RandomState};

use std::collections::HashMap;

use super::states::StatePool;

/// The parent of a sequence's first block.
const ROOT: u32 = u32::MAX;
/// The end of the list of idle blocks.
const NONE: u32 = u32::MAX;

/// The blocks of the KV cache, with a count of holders for each. See the module.
#[derive(Debug)]
pub struct BlockPool {
    block_size: usize,
    caching: bool,
    blocks: Vec<Block>,
    /// Tokens of the cached blocks, `[total * block_size]`.
    tokens: Vec<u32>,
    /// Cached blocks by parent and hash of their tokens.
    index: HashMap<Key, u32>,
    /// Blocks without content. They are taken from the end, so the block freed last is used first, while its memory is in the caches.
    free: Vec<u32>,
    /// Cached blocks that nobody holds. The first is evicted first.
    idle: List,
    /// Slots of states; the snapshots among them belong to cached blocks.
    pub states: StatePool,
    hasher: RandomState,
    /// Which bits of the hash are used: all of them, but in tests that want collisions.
    hash_mask: u64,
}

type Key = (u32, u64);

#[derive(Debug, Clone)]
struct Block {
    /// How many sequences hold it.
    holders: u32,
    /// Set while it is cached.
    key: Option<Key>,
    /// The neighbours in the list of idle blocks.
    before: u32,
    after: u32,
}

#[derive(Debug)]
struct List {
    first: u32,
    last: u32,
    len: usize,
}

impl BlockPool {
    /// `total` blocks of `block_size` tokens; without `caching` a block that is given back is forgotten.
    pub fn new(total: usize, block_size: usize, caching: bool) -> Self {
        // Everything gets its final size here, so the pool never allocates later.
        let cached = if caching { total } else { 0 };
        Self {
            block_size,
            caching,
            blocks: vec![Block { holders: 0, key: None, before: NONE, after: NONE }; total],
            tokens: vec![0; cached * block_size],
            index: HashMap::with_capacity(cached),
            free: (0..total as u32).rev().collect(),
            idle: List { first: NONE, last: NONE, len: 0 },
            states: StatePool::default(),
            hasher: RandomState::new(),
            hash_mask: u64::MAX,
        }
    }

    /// With so many slots for states.
    pub fn with_states(self, slots: usize) -> Self {
        Self { states: StatePool::new(slots), ..self }
    }

    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there is a prefix cache.
    pub fn caching(&self) -> bool {
        self.caching
    }

    /// Blocks that can be taken now: empty ones, and cached ones that nobody holds.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len
    }

    /// Cached blocks that nobody holds.
    pub fn idle(&self) -> usize {
        self.idle.len
    }

    /// Writes the cached blocks that `tokens` begins with into `path`. This holds none of them: call [`Self::share`] before anything else can
    /// evict them.
    pub fn lookup(&self, tokens: &[u32], path: &mut Vec<u32>) {
        path.clear();
        if !self.caching {
            return;
        }
        let mut parent = ROOT;
        for content in tokens.chunks_exact(self.block_size) {
            let Some(block) = self.index.get(&self.key(parent, content)).copied().filter(|block| self.content(*block) == content) else {
                break;
            };
            path.push(block);
            parent = block;
        }
    }

    /// How many blocks of `path` nobody holds. Sharing the path makes that many fewer available.
    pub fn idle_among(&self, path: &[u32]) -> usize {
        path.iter().filter(|block| self.blocks[**block as usize].holders == 0).count()
    }

    /// Adds a holder to each block of `path`.
    pub fn share(&mut self, path: &[u32]) {
        for &block in path {
            if self.blocks[block as usize].holders == 0 {
                self.unlink(block);
            }
            self.blocks[block as usize].holders += 1;
        }
    }

    /// Appends `count` blocks to `table`, each with one holder. False, with nothing taken, when fewer are available.
    pub fn take(&mut self, count: usize, table: &mut Vec<u32>) -> bool {
        if self.available() < count {
            return false;
        }
        for _ in 0..count {
            let block = match self.free.pop() {
                Some(block) => block,
                None => self.evict(),
            };
            self.blocks[block as usize].holders = 1;
            table.push(block);
        }
        true
    }

    /// Caches `block`, which holds the keys and values of `tokens` after those of `parent`. When an equal block is cached already, that one is
    /// held instead and `block` is released. Returns the block to use.
    pub fn cache(&mut self, parent: Option<u32>, block: u32, tokens: &[u32]) -> u32 {
        // A lookup would never reach a block whose parent is not cached.
        if !self.caching || parent.is_some_and(|parent| self.blocks[parent as usize].key.is_none()) {
            return block;
        }
        let key = self.key(parent.unwrap_or(ROOT), tokens);
        match self.index.get(&key).copied() {
            Some(equal) if self.content(equal) == tokens => {
                if equal != block {
                    self.share(&[equal]);
                    self.release(&[block]);
                }
                equal
            }
            // Other tokens with the same hash are cached already, and stay.
            Some(_) => block,
            None => {
                let from = block as usize * self.block_size;
                self.tokens[from..from + self.block_size].copy_from_slice(tokens);
                self.blocks[block as usize].key = Some(key);
                self.index.insert(key, block);
                block
            }
        }
    }

    /// Keeps a slot as the snapshot of a block, or gives it back when the block is not cached.
    pub fn keep_state(&mut self, block: u32, slot: u32) {
        if self.blocks[block as usize].key.is_some() {
            self.states.keep(block, slot);
        } else {
            self.states.give_back(slot);
        }
    }

    /// Takes a holder from each block of a sequence's table, or of the end of one.
    pub fn release(&mut self, table: &[u32]) {
        for &block in table.iter().rev() {
            let state = &mut self.blocks[block as usize];
            debug_assert!(state.holders > 0, "block {block} was given back twice");
            state.holders = state.holders.saturating_sub(1);
            if state.holders > 0 {
                continue;
            }
            if state.key.is_some() {
                self.append(block);
            } else {
                self.free.push(block);
            }
        }
    }

    fn key(&self, parent: u32, tokens: &[u32]) -> Key {
        (parent, self.hasher.hash_one(tokens) & self.hash_mask)
    }

    fn content(&self, block: u32) -> &[u32] {
        let from = block as usize * self.block_size;
        &self.tokens[from..from + self.block_size]
    }

    /// Forgets the idle block that was released longest ago. There must be an idle block.
    fn evict(&mut self) -> u32 {
        let block = self.idle.first;
        self.unlink(block);
        if let Some(key) = self.blocks[block as usize].key.take() {
            self.index.remove(&key);
        }
        self.states.forget(block);
        block
    }

    fn append(&mut self, block: u32) {
        let last = std::mem::replace(&mut self.idle.last, block);
        self.blocks[block as usize].before = last;
        self.blocks[block as usize].after = NONE;
        match last {
            NONE => self.idle.first = block,
            last => self.blocks[last as usize].after = block,
        }
        self.idle.len += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Block { before, after, .. } = self.blocks[block as usize];
        match before {
            NONE => self.idle.first = after,
            before => self.blocks[before as usize].after = after,
        }
        match after {
            NONE => self.idle.last = before,
            after => self.blocks[after as usize].before = before,
        }
        self.idle.len -= 1;
    }

    /// Panics unless free + cached + used = total, every block has as many holders as there are tables with it, and no cached block has
    /// lost the one before it.
    pub fn check_invariants<'a>(&self, tables: impl Iterator<Item = &'a [u32]>) {
        let mut holders = vec![0; self.blocks.len()];
        for block in tables.flatten() {
            holders[*block as usize] += 1;
        }
        let used = holders.iter().filter(|count| **count > 0).count();
        assert_eq!(self.free.len() + self.idle.len + used, self.total(), "blocks leaked");
        let mut idle = 0;
        for (block, state) in self.blocks.iter().enumerate() {
            assert_eq!(state.holders, holders[block], "holders of block {block}");
            idle += usize::from(state.holders == 0 && state.key.is_some());
            let Some(key) = state.key else { continue };
            assert_eq!(self.index.get(&key), Some(&(block as u32)), "block {block} cannot be found");
            if key.0 != ROOT {
                let parent = &self.blocks[key.0 as usize];
                assert!(parent.key.is_some() && parent.holders >= state.holders, "block {block} has lost the one before it");
            }
        }
        assert!(self.states.blocks().all(|block| self.blocks[block as usize].key.is_some()), "a snapshot of a block that is not cached");
        assert_eq!((idle, self.index.len()), (self.idle.len, self.blocks.iter().filter(|block| block.key.is_some()).count()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn taken(pool: &mut BlockPool, count: usize) -> Vec<u32> {
        let mut table = Vec::new();
        assert!(pool.take(count, &mut table));
        table
    }

    fn found(pool: &BlockPool, tokens: &[u32]) -> Vec<u32> {
        let mut path = Vec::new();
        pool.lookup(tokens, &mut path);
        path
    }

    /// Takes blocks for all of `tokens` and caches the full ones, as a sequence that computes everything itself.
    fn compute(pool: &mut BlockPool, tokens: &[u32]) -> Vec<u32> {
        let mut table = taken(pool, tokens.len().div_ceil(pool.block_size));
        for (at, content) in tokens.chunks_exact(pool.block_size).enumerate() {
            table[at] = pool.cache(at.checked_sub(1).map(|before| table[before]), table[at], content);
        }
        table
    }

    #[test]
    fn a_block_is_found_only_after_the_same_tokens() {
        let mut pool = BlockPool::new(8, 2, true);
        let table = compute(&mut pool, &[1, 2, 3, 4, 5]);
        assert_eq!(found(&pool, &[1, 2, 3, 4, 5, 6]), table[..2]);
        assert_eq!(found(&pool, &[1, 2, 9, 9]), table[..1]);
        assert_eq!(found(&pool, &[3, 4]), [0; 0], "the same tokens in another place");
        pool.release(&table);
        assert_eq!((pool.available(), pool.idle()), (8, 2));
        assert_eq!(found(&pool, &[1, 2, 3, 4]), table[..2], "cached still");
    }

    #[test]
    fn without_caching_nothing_is_found() {
        let mut pool = BlockPool::new(4, 2, false);
        let table = compute(&mut pool, &[1, 2, 3, 4]);
        assert_eq!(found(&pool, &[1, 2, 3, 4]), [0; 0]);
        pool.release(&table);
        assert_eq!((pool.available(), pool.idle()), (4, 0));
    }

    #[test]
    fn the_deepest_of_the_longest_unused_goes_first() {
        let mut pool = BlockPool::new(4, 1, true);
        let (old, new) = (compute(&mut pool, &[1, 2]), compute(&mut pool, &[3, 4]));
        pool.release(&old);
        pool.release(&new);
        let held = taken(&mut pool, 1);
        assert_eq!((held[0], found(&pool, &[1, 2]).len(), found(&pool, &[3, 4]).len()), (old[1], 1, 2));
        // A hit makes the rest of the old one the newest.
        let hit = found(&pool, &[1]);
        pool.share(&hit);
        pool.release(&hit);
        let more = taken(&mut pool, 2);
        assert_eq!((found(&pool, &[1]).len(), found(&pool, &[3]).len()), (1, 0));
        assert!(!pool.take(2, &mut Vec::new()));
        pool.check_invariants([&held[..], &more].into_iter());
    }

    #[test]
    fn equal_blocks_become_one() {
        let mut pool = BlockPool::new(8, 2, true);
        let (first, second) = (compute(&mut pool, &[1, 2, 3, 4]), compute(&mut pool, &[1, 2, 3, 4, 5, 6]));
        assert_eq!(first[..], second[..2]);
        assert_eq!(pool.available(), 5);
        pool.check_invariants([&first[..], &second].into_iter());
    }

    #[test]
    fn a_hash_collision_never_shares_content() {
        let mut pool = BlockPool::new(8, 2, true);
        pool.hash_mask = 0;
        let (first, second) = (compute(&mut pool, &[1, 2, 3, 4]), compute(&mut pool, &[5, 6, 3, 4]));
        assert_eq!(found(&pool, &[1, 2, 3, 4]), first);
        assert_eq!(found(&pool, &[5, 6, 3, 4]), [0; 0]);
        pool.check_invariants([&first[..], &second].into_iter());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// Sequences come and go; whatever is found has the content that was asked for, and nothing leaks.
        #[test]
        fn what_is_found_was_computed(
            blocks in 1usize..12, size in 1usize..4, bits in prop::sample::select(vec![0, 1, 3, u64::MAX]),
            actions in prop::collection::vec((prop::collection::vec(0u32..3, 0..14), any::<bool>(), any::<prop::sample::Index>()), 0..40),
        ) {
            let mut pool = BlockPool::new(blocks, size, true);
            pool.hash_mask = bits;
            // What was last written to each block, with everything before it.
            let mut written: Vec<Vec<u32>> = vec![Vec::new(); blocks];
            let mut held: Vec<Vec<u32>> = Vec::new();
            for (tokens, leaves, which) in actions {
                if leaves && !held.is_empty() {
                    let table = held.swap_remove(which.index(held.len()));
                    pool.release(&table);
                } else {
                    let mut table = found(&pool, &tokens);
                    for (at, block) in table.iter().enumerate() {
                        prop_assert_eq!(&written[*block as usize], &tokens[..(at + 1) * size]);
                    }
                    let hits = table.len();
                    let missing = tokens.len().div_ceil(size) - hits;
                    if pool.available() - pool.idle_among(&table) < missing {
                        continue;
                    }
                    pool.share(&table);
                    prop_assert!(pool.take(missing, &mut table));
                    for at in hits..tokens.len() / size {
                        written[table[at] as usize] = tokens[..(at + 1) * size].to_vec();
                        table[at] = pool.cache(at.checked_sub(1).map(|before| table[before]), table[at], &tokens[at * size..(at + 1) * size]);
                    }
                    held.push(table);
                }
                pool.check_invariants(held.iter().map(Vec::as_slice));
            }
            held.drain(..).for_each(|table| pool.release(&table));
            prop_assert_eq!(pool.available(), blocks);
        }
    }
}
