//! Accounting of KV blocks: which slots hold each block, which blocks are free, and what free blocks still contain.

use std::collections::HashMap;

use crate::pass::Slot;

/// A block of the KV cache: the same `block_tokens` positions of one sequence, at every depth and layer.
pub type BlockId = u32;

/// Contents of a full block: the keys and values of its tokens, given all tokens before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Contents {
    /// Part of a prompt, identified by the hash of the prompt up to the end of the block. Any request may begin with
    /// it.
    Prompt {
        /// Hash of the prefix; see [`traces::PrefixHashes`].
        hash: u64,
        /// Index of the block under that hash, where a hash covers more tokens than a block has.
        part: u32,
    },
    /// Tokens of one request only: generated tokens, and prompts without hashes.
    Own {
        /// Id of the request.
        request: u32,
        /// Index among the blocks of the request.
        block: u32,
    },
}

/// The free blocks, and the blocks of each slot in order of position.
///
/// With prefix caching, several slots may hold one block, and a freed block keeps its contents until it is reused. The
/// block that has been free for longest is reused first.
#[derive(Clone, Debug)]
pub struct BlockTables {
    block_tokens: u32,
    free: FreeList,
    held: Vec<Vec<BlockId>>,
    /// By slot: how many positions its blocks hold.
    room: Vec<u32>,
    cache: Option<PrefixCache>,
}

#[derive(Clone, Debug)]
struct PrefixCache {
    /// By block: how many slots hold it.
    holders: Vec<u32>,
    contents: Vec<Option<Contents>>,
    by_contents: HashMap<Contents, BlockId>,
    /// By slot: how many of its blocks are published or were found.
    published: Vec<u32>,
}

impl BlockTables {
    /// `num_blocks` free blocks of `block_tokens` positions each, for `num_slots` sequences.
    pub fn new(num_blocks: u32, block_tokens: u32, num_slots: u32) -> Self {
        let (held, room) = (vec![Vec::new(); num_slots as usize], vec![0; num_slots as usize]);
        Self { block_tokens, free: FreeList::full(num_blocks), held, room, cache: None }
    }

    /// As [`new`](Self::new), with prefix caching.
    pub fn with_prefix_cache(num_blocks: u32, block_tokens: u32, num_slots: u32) -> Self {
        let cache = PrefixCache {
            holders: vec![0; num_blocks as usize],
            contents: vec![None; num_blocks as usize],
            by_contents: HashMap::new(),
            published: vec![0; num_slots as usize],
        };
        Self { cache: Some(cache), ..Self::new(num_blocks, block_tokens, num_slots) }
    }

    /// The blocks of each slot as they are now, for a pass: without what free blocks contain.
    pub(crate) fn without_contents(&self) -> Self {
        let Self { block_tokens, free, held, room, cache: _ } = self;
        Self { block_tokens: *block_tokens, free: free.clone(), held: held.clone(), room: room.clone(), cache: None }
    }

    /// Positions per block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// Number of blocks, held or free.
    pub fn num_blocks(&self) -> u32 {
        self.free.next.len() as u32 - 1
    }

    /// Number of free blocks.
    pub fn num_free(&self) -> u32 {
        self.free.len
    }

    /// Number of blocks that `tokens` positions need.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// The blocks of a slot, in order of position.
    pub fn blocks(&self, slot: Slot) -> &[BlockId] {
        &self.held[slot as usize]
    }

    /// Extends the slot's blocks to `tokens` positions. Takes every missing block and returns `true`, or takes none and
    /// returns `false`.
    #[must_use]
    #[inline]
    pub fn grow(&mut self, slot: Slot, tokens: u32) -> bool {
        tokens <= self.room[slot as usize] || self.take(slot, tokens)
    }

    fn take(&mut self, slot: Slot, tokens: u32) -> bool {
        let held = &mut self.held[slot as usize];
        let missing = tokens.div_ceil(self.block_tokens) - held.len() as u32;
        if missing > self.free.len {
            return false;
        }
        for _ in 0..missing {
            let block = self.free.take_oldest();
            if let Some(cache) = &mut self.cache {
                cache.forget(block);
                cache.holders[block as usize] = 1;
            }
            held.push(block);
        }
        self.room[slot as usize] += missing * self.block_tokens;
        true
    }

    /// Releases the blocks of a slot behind its first `tokens` positions, none of which other slots can find.
    pub fn shrink(&mut self, slot: Slot, tokens: u32) {
        let kept = self.blocks_for(tokens) as usize;
        let held = &mut self.held[slot as usize];
        for block in held.drain(kept.min(held.len())..).rev() {
            if self.cache.as_mut().is_none_or(|cache| cache.let_go(block)) {
                self.free.add(block);
            }
        }
        self.room[slot as usize] = held.len() as u32 * self.block_tokens;
        if let Some(cache) = &self.cache {
            debug_assert!(cache.published[slot as usize] as usize <= kept, "published blocks are complete");
        }
    }

    /// Releases all blocks of a slot, the last one first: a prefix is more useful to other requests than what follows
    /// it. A block becomes free when no other slot holds it.
    pub fn release(&mut self, slot: Slot) {
        self.room[slot as usize] = 0;
        for block in self.held[slot as usize].drain(..).rev() {
            let last = self.cache.as_mut().is_none_or(|cache| cache.let_go(block));
            if last {
                self.free.add(block);
            }
        }
        if let Some(cache) = &mut self.cache {
            cache.published[slot as usize] = 0;
        }
    }

    /// Finds the longest run of blocks with these contents; finds none without prefix caching.
    pub fn find(&self, contents: impl Iterator<Item = Contents>, found: &mut Vec<BlockId>) {
        found.clear();
        if let Some(cache) = &self.cache {
            found.extend(contents.map_while(|contents| cache.by_contents.get(&contents)));
        }
    }

    /// Whether `tokens` positions that begin with the blocks `found` fit in the cache now.
    pub fn fits(&self, tokens: u32, found: &[BlockId]) -> bool {
        let found_free = self
            .cache
            .as_ref()
            .map_or(0, |cache| found.iter().filter(|&&block| cache.holders[block as usize] == 0).count() as u32);
        self.blocks_for(tokens) - found.len() as u32 + found_free <= self.free.len
    }

    /// Gives an empty slot the blocks that [`find`](Self::find) found.
    pub fn adopt(&mut self, slot: Slot, found: &[BlockId]) {
        let Some(cache) = &mut self.cache else { return };
        for &block in found {
            if cache.holders[block as usize] == 0 {
                self.free.remove(block);
            }
            cache.holders[block as usize] += 1;
        }
        self.held[slot as usize].extend_from_slice(found);
        self.room[slot as usize] += found.len() as u32 * self.block_tokens;
        cache.published[slot as usize] = found.len() as u32;
    }

    /// Makes the full blocks within the slot's first `tokens` positions available to other requests. Where two blocks
    /// have equal contents, the first one is found.
    pub fn publish(&mut self, slot: Slot, tokens: u32, contents: impl Fn(u32) -> Contents) {
        let Some(cache) = &mut self.cache else { return };
        let whole = tokens / self.block_tokens;
        for place in cache.published[slot as usize]..whole {
            let block = self.held[slot as usize][place as usize];
            let contents = contents(place);
            cache.by_contents.entry(contents).or_insert_with(|| {
                cache.contents[block as usize] = Some(contents);
                block
            });
        }
        let published = &mut cache.published[slot as usize];
        *published = whole.max(*published);
    }
}

impl PrefixCache {
    fn forget(&mut self, block: BlockId) {
        if let Some(contents) = self.contents[block as usize].take() {
            self.by_contents.remove(&contents);
        }
    }

    /// Removes one holder of a block; returns whether it was the last.
    fn let_go(&mut self, block: BlockId) -> bool {
        let holders = &mut self.holders[block as usize];
        *holders -= 1;
        *holders == 0
    }
}

/// Free blocks in the order in which they became free, as a doubly linked ring through `num_blocks`, its anchor.
#[derive(Clone, Debug)]
struct FreeList {
    next: Vec<u32>,
    previous: Vec<u32>,
    len: u32,
}

impl FreeList {
    fn full(num_blocks: u32) -> Self {
        let anchor = num_blocks;
        let next = (1..=anchor).chain([0]).collect();
        let previous = std::iter::once(anchor).chain(0..anchor).collect();
        Self { next, previous, len: num_blocks }
    }

    fn anchor(&self) -> u32 {
        self.next.len() as u32 - 1
    }

    fn remove(&mut self, block: BlockId) {
        let (before, after) = (self.previous[block as usize], self.next[block as usize]);
        self.next[before as usize] = after;
        self.previous[after as usize] = before;
        self.len -= 1;
    }

    fn take_oldest(&mut self) -> BlockId {
        let block = self.next[self.anchor() as usize];
        self.remove(block);
        block
    }

    fn add(&mut self, block: BlockId) {
        let anchor = self.anchor();
        let newest = self.previous[anchor as usize];
        self.next[newest as usize] = block;
        self.previous[block as usize] = newest;
        self.next[block as usize] = anchor;
        self.previous[anchor as usize] = block;
        self.len += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(hash: u64) -> Contents {
        Contents::Prompt { hash, part: 0 }
    }

    fn found(tables: &BlockTables, hashes: &[u64]) -> Vec<BlockId> {
        let mut found = Vec::new();
        tables.find(hashes.iter().map(|&hash| prompt(hash)), &mut found);
        found
    }

    #[test]
    fn blocks_are_taken_all_or_none() {
        let mut tables = BlockTables::new(4, 16, 2);
        assert!(tables.grow(0, 33));
        assert_eq!((tables.blocks(0).len(), tables.num_free()), (3, 1));
        assert!(!tables.grow(1, 17) && tables.grow(1, 16));
        assert!(tables.grow(0, 48) && !tables.grow(0, 49));
        tables.release(0);
        assert_eq!((tables.num_free(), tables.num_blocks()), (3, 4));
    }

    #[test]
    fn a_freed_block_is_found_until_it_is_taken() {
        let mut tables = BlockTables::with_prefix_cache(3, 4, 2);
        assert!(tables.grow(0, 11));
        tables.publish(0, 11, |place| prompt(u64::from(place)));
        let blocks = tables.blocks(0).to_vec();
        assert_eq!(found(&tables, &[0, 1, 2]), blocks[..2], "a begun block is not published");
        tables.release(0);
        assert_eq!(found(&tables, &[0, 1]), blocks[..2]);
        assert!(tables.grow(1, 8), "the begun block is taken first, then the last of the prefix");
        assert_eq!(found(&tables, &[0, 1]), blocks[..1]);
        assert!(found(&tables, &[1]).is_empty(), "contents are found from the start only");
    }

    #[test]
    fn a_shared_block_is_free_when_its_last_holder_leaves() {
        let mut tables = BlockTables::with_prefix_cache(3, 4, 2);
        assert!(tables.grow(0, 8));
        tables.publish(0, 8, |place| prompt(u64::from(place)));
        let shared = found(&tables, &[0]);
        assert!(!tables.fits(12, &shared) && tables.fits(8, &shared));
        tables.adopt(1, &shared);
        assert!(tables.grow(1, 8));
        tables.release(0);
        assert_eq!(tables.num_free(), 1);
        assert_eq!(tables.blocks(1)[0], shared[0]);
        tables.release(1);
        assert_eq!(tables.num_free(), 3);
        let again = found(&tables, &[0]);
        assert!(!tables.fits(16, &again) && tables.fits(12, &again), "a found block that is free is no longer so");
    }
}
