//! The paged KV cache: keys and values of every depth and layer, in blocks that the scheduler hands out.

use candle_core::{DType, Device, Tensor};

use scheduler::KvFill;

use crate::config::ModelConfig;

/// Positions whose keys lie side by side; a block holds a whole number of tiles.
pub const TILE: usize = 16;
/// A value is padded with zeros to a whole number of chunks.
pub const CHUNK: usize = 32;

/// Why a cache cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Blocks must be whole tiles.
    #[error("a KV block of {0} tokens: expected a multiple of {TILE}, at least {TILE}")]
    BlockTokens(u32),
    /// There is no room for it.
    #[error("a KV cache of {blocks} blocks takes {bytes} bytes: {source}")]
    Allocate {
        /// Blocks asked for.
        blocks: u32,
        /// What they take.
        bytes: u64,
        /// What candle said.
        source: candle_core::Error,
    },
}

/// Which keys and values a layer keeps of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// One of each: layer so-and-so of the prelude.
    Once(usize),
    /// One of each at every depth: layer so-and-so of the block, those of the coda counted after it.
    AtEachDepth(usize),
}

/// Where in the cache what lies, counted in numbers of `f32`.
///
/// ```text
/// cache  [layer][block] pages         layers: those of the prelude, then at each depth those of the block and the coda
/// page   keys   [kv head][tile][dim, even][position in tile]    positions side by side: scores vectorize over them
///        values [kv head][position][dim, padded]
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Layers of the prelude.
    pub prelude_layers: usize,
    /// Depths that keep keys and values of their own: the model's `num_loops`, or 1, which all depths share.
    pub depths: usize,
    /// Layers at each depth: those of the block and of the coda.
    pub depth_layers: usize,
    /// Blocks.
    pub blocks: usize,
    /// Positions per block, a multiple of [`TILE`].
    pub block_tokens: usize,
    /// Key-value heads.
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

    /// Numbers from the value of one position to that of the next: a head's width, in whole [`CHUNK`]s.
    pub fn value_stride(&self) -> usize {
        self.head_dim.next_multiple_of(CHUNK)
    }

    /// Dimensions of a key, padded with zeros to an even number: scores sum even and odd ones apart.
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

    /// Where the pages of a layer start that rows at a depth use; those of its blocks follow each other.
    #[inline(always)]
    pub fn pages(&self, kept: Kept, depth: usize) -> usize {
        let layer = match kept {
            Kept::Once(layer) => layer,
            Kept::AtEachDepth(layer) => self.prelude_layers + depth.min(self.depths - 1) * self.depth_layers + layer,
        };
        layer * self.blocks * self.page_numbers()
    }

    /// Every layer that keeps keys and values, at each of its depths, as they follow each other in the cache.
    pub fn layers(&self) -> impl Iterator<Item = (Kept, usize)> {
        let of_depth = {
            let layers = self.depth_layers;
            move |depth| (0..layers).map(move |layer| (Kept::AtEachDepth(layer), depth))
        };
        (0..self.prelude_layers).map(|layer| (Kept::Once(layer), 0)).chain((0..self.depths).flat_map(of_depth))
    }

    /// Where in a page the tile `[key_dims, TILE]` of a head's keys that holds `offset` starts.
    #[inline(always)]
    pub fn key_tile(&self, kv_head: usize, offset: usize) -> usize {
        (kv_head * self.block_tokens + offset / TILE * TILE) * self.key_dims()
    }

    /// Where in a page a head's value at `offset` starts; those of later offsets follow.
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
    /// An empty cache of `num_blocks` blocks of `block_tokens` positions, each of every layer and of the depths that a
    /// KV fill keeps.
    ///
    /// # Errors
    /// If `block_tokens` is no multiple of [`TILE`] or the memory is not to be had.
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

    /// The memory itself, one flat tensor.
    pub fn pages(&self) -> &Tensor {
        &self.pages
    }

    /// Where in it what lies.
    pub fn layout(&self) -> PageLayout {
        self.layout
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> u64 {
        (self.layout.numbers() * size_of::<f32>()) as u64
    }

    /// Positions that fit, of all sequences together.
    pub fn capacity_tokens(&self) -> u64 {
        (self.layout.blocks * self.layout.block_tokens) as u64
    }
}

/// Refuses blocks that are not whole tiles.
pub(crate) fn check_block_tokens(block_tokens: u32) -> Result<(), CacheError> {
    match block_tokens > 0 && (block_tokens as usize).is_multiple_of(TILE) {
        true => Ok(()),
        false => Err(CacheError::BlockTokens(block_tokens)),
    }
}

/// Bytes of the keys and values of one token, over all layers and the depths that a KV fill keeps, as they lie in the
/// cache.
pub fn bytes_per_token(config: &ModelConfig, kv_fill: KvFill) -> u64 {
    (PageLayout::new(config, kv_fill, 1, TILE as u32).numbers() * size_of::<f32>() / TILE) as u64
}
