//! Accounting of KV blocks: who holds which, and how many are free.

use crate::pass::Slot;

/// A block of the KV cache: the same `block_tokens` positions of one sequence, at every depth and layer.
pub type BlockId = u32;

/// The free blocks, and the blocks that each slot holds in order of position.
#[derive(Clone, Debug)]
pub struct BlockTables {
    block_tokens: u32,
    num_blocks: u32,
    free: Vec<BlockId>,
    held: Vec<Vec<BlockId>>,
}

impl BlockTables {
    /// `num_blocks` free blocks of `block_tokens` positions each, for `num_slots` sequences.
    pub fn new(num_blocks: u32, block_tokens: u32, num_slots: u32) -> Self {
        Self {
            block_tokens,
            num_blocks,
            free: (0..num_blocks).rev().collect(),
            held: vec![Vec::new(); num_slots as usize],
        }
    }

    /// Positions per block.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// All blocks, held or free.
    pub fn num_blocks(&self) -> u32 {
        self.num_blocks
    }

    /// Blocks that nobody holds.
    pub fn num_free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks that `tokens` positions need.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// The blocks of a slot, in order of position.
    pub fn blocks(&self, slot: Slot) -> &[BlockId] {
        &self.held[slot as usize]
    }

    /// Makes the slot's blocks reach `tokens` positions; takes all that is missing, or nothing and says `false`.
    #[must_use]
    pub fn grow(&mut self, slot: Slot, tokens: u32) -> bool {
        let held = &mut self.held[slot as usize];
        if tokens as usize <= held.len() * self.block_tokens as usize {
            return true;
        }
        let missing = tokens.div_ceil(self.block_tokens) as usize - held.len();
        if missing > self.free.len() {
            return false;
        }
        held.extend(self.free.drain(self.free.len() - missing..).rev());
        true
    }

    /// Frees all blocks of a slot.
    pub fn release(&mut self, slot: Slot) {
        self.free.extend(self.held[slot as usize].drain(..).rev());
    }
}
