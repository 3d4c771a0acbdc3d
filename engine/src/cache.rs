//! The paged KV cache: keys and values of every depth and layer, in blocks that the scheduler assigns.

use candle_core::{DType, Device, Tensor};

use scheduler::KvFill;

use crate::config::ModelConfig;

/// Number of adjacent positions whose keys are interleaved; a block has a whole number of tiles.
pub const TILE: usize = 16;
/// Values are padded with zeros to a whole number of chunks.
pub const CHUNK: usize = 32;

/// Why a cache cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A block size that is not a whole number of tiles.
    #[error("a KV block of {0} tokens: expected a multiple of {TILE}, at least {TILE}")]
    BlockTokens(u32),
    /// There is not enough memory.
    #[error("a KV cache of {blocks} blocks takes {bytes} bytes: {source}")]
    Allocate {
        /// Requested number of blocks.
        blocks: u32,
        /// Bytes of the blocks.
        bytes: u64,
        /// Error of candle.
        source: candle_core::Error,
    },
}

/// Keys and values that a layer keeps of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// One key and one value, in the layer of the prelude with this index.
    Once(usize),
    /// One key and one value at every depth, in the layer of the block with this index; layers of the coda follow.
    AtEachDepth(usize),
}

/// Layout of the cache, in `f32` numbers.
///
/// ```text
/// cache  [layer][block] pages         layers: those of the prelude, then at each depth those of the block and the coda
/// page   keys   [kv head][tile][dim, even][position in tile]    adjacent positions: scores vectorize over them
///        values [kv head][position][dim, padded]
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Number of layers of the prelude.
    pub prelude_layers: usize,
    /// Number of depths with their own keys and values: the model's `num_loops`, or fewer that the depths share in turn.
    pub depths: usize,
    /// Number of layers at each depth: those of the block and of the coda.
    pub depth_layers: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// Positions per block, a multiple of [`TILE`].
    pub block_tokens: usize,
    /// Number of key-value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl PageLayout {
    /// The layout of a model's cache under a KV fill.
    pub fn new(config: &ModelConfig, kv_fill: KvFill, num_blocks: u32, block_tokens: u32) -> Self {
        Self {
            prelude_layers: config.prelude_layers,
            depths: kv_fill.cached_depths(config.num_loops as u8).into(),
            depth_layers: config.block_layers + config.coda_layers,
            blocks: num_blocks as usize,
            block_tokens: block_tokens as usize,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
        }
    }

    /// Distance in numbers between the values of adjacent positions: a head's width, in whole [`CHUNK`]s.
    pub fn value_stride(&self) -> usize {
        self.head_dim.next_multiple_of(CHUNK)
    }

    /// Dimensions of a key, padded with zeros to an even number: scores are summed separately for even and odd ones.
    #[inline(always)]
    pub fn key_dims(&self) -> usize {
        self.head_dim.next_multiple_of(2)
    }

    /// Numbers of a page.
    #[inline(always)]
    pub fn page_numbers(&self) -> usize {
        self.kv_heads * self.block_tokens * (self.key_dims() + self.value_stride())
    }

    /// Numbers of the whole cache.
    pub fn numbers(&self) -> usize {
        (self.prelude_layers + self.depths * self.depth_layers) * self.blocks * self.page_numbers()
    }

    /// Start of a layer's pages for rows at a depth; the pages of its blocks are adjacent.
    #[inline(always)]
    pub fn pages(&self, kept: Kept, depth: usize) -> usize {
        let layer = match kept {
            Kept::Once(layer) => layer,
            Kept::AtEachDepth(layer) => self.prelude_layers + depth % self.depths * self.depth_layers + layer,
        };
        layer * self.blocks * self.page_numbers()
    }

    /// Every layer that keeps keys and values, at each of its depths, in the order of the cache.
    pub fn layers(&self) -> impl Iterator<Item = (Kept, usize)> {
        let of_depth = {
            let layers = self.depth_layers;
            move |depth| (0..layers).map(move |layer| (Kept::AtEachDepth(layer), depth))
        };
        (0..self.prelude_layers).map(|layer| (Kept::Once(layer), 0)).chain((0..self.depths).flat_map(of_depth))
    }

    /// Start within a page of the tile `[key_dims, TILE]` with a head's key at `offset`.
    #[inline(always)]
    pub fn key_tile(&self, kv_head: usize, offset: usize) -> usize {
        (kv_head * self.block_tokens + offset / TILE * TILE) * self.key_dims()
    }

    /// Start within a page of a head's value at `offset`; values of later offsets follow.
    #[inline(always)]
    pub fn value(&self, kv_head: usize, offset: usize) -> usize {
        self.kv_heads * self.block_tokens * self.key_dims()
            + (kv_head * self.block_tokens + offset) * self.value_stride()
    }
}

/// The keys and values of all sequences.
#[derive(Clone, Debug)]
pub struct KvCache {
    pages: Tensor,
    layout: PageLayout,
}

impl KvCache {
    /// An empty cache of `num_blocks` blocks of `block_tokens` positions, with every layer and the depths that a KV
    /// fill keeps.
    ///
    /// # Errors
    /// If `block_tokens` is not a multiple of [`TILE`], or memory cannot be allocated.
    pub fn new(
        config: &ModelConfig,
        kv_fill: KvFill,
        num_blocks: u32,
        block_tokens: u32,
        device: &Device,
    ) -> Result<Self, CacheError> {
        check_block_tokens(block_tokens)?;
        let layout = PageLayout::new(config, kv_fill, num_blocks, block_tokens);
        let pages = Tensor::zeros(layout.numbers(), DType::F32, device).map_err(|source| CacheError::Allocate {
            blocks: num_blocks,
            bytes: (layout.numbers() * size_of::<f32>()) as u64,
            source,
        })?;
        Ok(Self { pages, layout })
    }

    /// The memory of the cache, as one flat tensor.
    pub fn pages(&self) -> &Tensor {
        &self.pages
    }

    /// Layout of the memory.
    pub fn layout(&self) -> PageLayout {
        self.layout
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> u64 {
        (self.layout.numbers() * size_of::<f32>()) as u64
    }

    /// Number of positions that fit, over all sequences.
    pub fn capacity_tokens(&self) -> u64 {
        (self.layout.blocks * self.layout.block_tokens) as u64
    }
}

/// Rejects blocks that are not whole tiles.
pub(crate) fn check_block_tokens(block_tokens: u32) -> Result<(), CacheError> {
    match block_tokens > 0 && (block_tokens as usize).is_multiple_of(TILE) {
        true => Ok(()),
        false => Err(CacheError::BlockTokens(block_tokens)),
    }
}

/// Bytes of keys and values of one token in the cache, over all layers and the depths that a KV fill keeps.
pub fn bytes_per_token(config: &ModelConfig, kv_fill: KvFill) -> u64 {
    (PageLayout::new(config, kv_fill, 1, TILE as u32).numbers() * size_of::<f32>() / TILE) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depths_take_the_slots_of_the_cache_in_turn() {
        let config = ModelConfig { num_loops: 5, prelude_layers: 1, ..ModelConfig::default() };
        let slots = |kv_fill: KvFill| {
            let layout = PageLayout::new(&config, kv_fill, 3, 16);
            let first = layout.pages(Kept::AtEachDepth(0), 0);
            let slot = layout.depth_layers * layout.blocks * layout.page_numbers();
            (0..5).map(|depth| (layout.pages(Kept::AtEachDepth(0), depth) - first) / slot).collect::<Vec<_>>()
        };
        assert_eq!(slots(KvFill::Reuse), [0, 1, 2, 3, 4]);
        assert_eq!(slots(KvFill::Cycle(2)), [0, 1, 0, 1, 0]);
        assert_eq!(slots(KvFill::Cycle(3)), [0, 1, 2, 0, 1]);
        assert_eq!(slots(KvFill::Cycle(9)), slots(KvFill::Reuse));
        assert_eq!((slots(KvFill::Last), slots(KvFill::First)), (vec![0; 5], vec![0; 5]));
        let bytes = |kv_fill| bytes_per_token(&config, kv_fill);
        let depth = (bytes(KvFill::Reuse) - bytes(KvFill::Last)) / 4;
        assert_eq!(bytes(KvFill::Cycle(3)), bytes(KvFill::Last) + 2 * depth);
    }
}
