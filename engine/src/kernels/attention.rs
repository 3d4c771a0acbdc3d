//! Attention over rows of different sequences, positions and depths in one pass, on keys and values in pages.
//!
//! A pass first stores the keys and values of all its rows, then attends: so a row finds what earlier rows of the
//! same pass left at its depth, and a prompt chunk is causal inside. The softmax is computed online (arXiv
//! 1805.02867) over tiles at absolute positions, so its order of summation depends on the row's position alone.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp3, InplaceOp1, InplaceOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use scheduler::blocks::BlockId;

use super::simd::{LANES, Lanes, add_scaled, exp, multiversion};
use super::{Shared, slice, slice_mut};
use crate::cache::{KvCache, PageLayout, TILE};

const _: () = assert!(TILE == LANES, "a tile's scores are one vector register");

/// Query heads that one call attends for: their state fits the stack.
const GROUP: usize = 8;
/// Keys read, over all rows and heads, below which a second thread costs more than it saves.
const PARALLEL_KEYS: usize = 1 << 9;

/// What attention needs to know of a row.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    /// Its position in its sequence.
    pub position: usize,
    /// The depth it runs at.
    pub depth: usize,
    /// The depths whose key and value it leaves: its own; its own and all deeper ones if it leaves the loop here;
    /// none if it left before.
    pub fills: Range<usize>,
    /// The blocks of its sequence, in order of position.
    pub blocks: &'a [BlockId],
}

/// The sizes of one layer's attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key-value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of a row of queries, keys and values side by side.
    fn qkv_size(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Attention of `rows` in one layer: `qkv` `[rows, (heads + 2 kv_heads) * head_dim]` to `[rows, heads * head_dim]`.
/// Stores the rows' keys and values in `cache` first. `rotary` `[positions, head_dim]` is [`rotary_table`].
///
/// # Errors
/// If a shape is another, or a row's blocks do not reach its position.
pub fn attend(
    qkv: &Tensor,
    rotary: &Tensor,
    cache: &KvCache,
    layer: usize,
    heads: Heads,
    rows: &[Row<'_>],
) -> Result<Tensor> {
    let place = Place { layout: cache.layout(), layer, heads, rows };
    cache.pages().inplace_op3(qkv, rotary, &Store(place))?;
    qkv.apply_op3_no_bwd(rotary, cache.pages(), &Attend(place))
}

/// Cosines and sines of rotary position embedding (arXiv 2104.09864), flat `[positions, head_dim]`: of each position
/// first the cosines, then the sines of its `head_dim / 2` angles. Dimension `i` is paired with `i + head_dim / 2`.
pub fn rotary_table(positions: usize, head_dim: usize, theta: f32) -> Vec<f32> {
    let half = head_dim / 2;
    let mut table = Vec::with_capacity(positions * head_dim);
    for position in 0..positions {
        let angle = |i: usize| position as f32 * theta.powf(-(i as f32) / half as f32);
        table.extend((0..half).map(|i| angle(i).cos()));
        table.extend((0..half).map(|i| angle(i).sin()));
    }
    table
}

/// Turns one head `[head_dim]` by a position's cosines and sines and scales it.
#[inline(always)]
fn rotate(head: &[f32], turn: &[f32], scale: f32, out: &mut [f32]) {
    let half = head.len() / 2;
    for i in 0..half {
        let (cos, sin) = (turn[i], turn[half + i]);
        out[i] = (head[i] * cos - head[half + i] * sin) * scale;
        out[half + i] = (head[half + i] * cos + head[i] * sin) * scale;
    }
}

/// What both halves of attention know.
#[derive(Clone, Copy)]
struct Place<'a> {
    layout: PageLayout,
    layer: usize,
    heads: Heads,
    rows: &'a [Row<'a>],
}

impl Place<'_> {
    fn check(&self, qkv: &Layout, rotary: &Layout) -> Result<()> {
        let expected = [self.rows.len(), self.heads.qkv_size()];
        if qkv.dims() != expected {
            bail!("attention got {:?}, expected {expected:?}", qkv.shape());
        }
        let positions = rotary.shape().dims2()?.0;
        for row in self.rows {
            let reach = positions.min(row.blocks.len() * self.layout.block_tokens);
            if row.position >= reach {
                bail!("a row is at position {}, its sequence has room for {reach}", row.position);
            }
        }
        Ok(())
    }
}

/// Stores rotated keys, and values.
struct Store<'a>(Place<'a>);

impl InplaceOp3 for Store<'_> {
    fn name(&self) -> &'static str {
        "store-kv"
    }

    fn cpu_fwd(
        &self,
        pages: &mut CpuStorage,
        p_l: &Layout,
        qkv: &CpuStorage,
        q_l: &Layout,
        rotary: &CpuStorage,
        r_l: &Layout,
    ) -> Result<()> {
        self.0.check(q_l, r_l)?;
        let Place { layout, layer, heads, rows } = self.0;
        let (pages, qkv, rotary) = (slice_mut(pages, p_l)?, slice(qkv, q_l)?, slice(rotary, r_l)?);
        let mut key = vec![0.0; heads.head_dim];
        for (row, qkv) in rows.iter().zip(qkv.chunks_exact(heads.qkv_size())) {
            let turn = &rotary[row.position * heads.head_dim..][..heads.head_dim];
            let (keys, values) = qkv[heads.heads * heads.head_dim..].split_at(heads.kv_heads * heads.head_dim);
            let block = row.blocks[row.position / layout.block_tokens] as usize;
            let offset = row.position % layout.block_tokens;
            for kv_head in 0..heads.kv_heads {
                let of_head = kv_head * heads.head_dim..(kv_head + 1) * heads.head_dim;
                rotate(&keys[of_head.clone()], turn, 1.0, &mut key);
                for depth in row.fills.clone() {
                    let page = &mut pages[layout.page(depth, layer, block)..][..layout.page_numbers()];
                    put(page, layout, kv_head, offset, &key, &values[of_head.clone()]);
                }
            }
        }
        Ok(())
    }
}

/// Puts one head's key and value into a page.
#[inline(always)]
fn put(page: &mut [f32], layout: PageLayout, kv_head: usize, offset: usize, key: &[f32], value: &[f32]) {
    let tile = &mut page[layout.key_tile(kv_head, offset)..][..key.len() * TILE];
    for (place, key) in tile[offset % TILE..].iter_mut().step_by(TILE).zip(key) {
        *place = *key;
    }
    page[layout.value(kv_head, offset)..][..value.len()].copy_from_slice(value);
}

/// Attends from rotated queries to what is stored.
struct Attend<'a>(Place<'a>);

impl CustomOp3 for Attend<'_> {
    fn name(&self) -> &'static str {
        "attend"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        q_l: &Layout,
        rotary: &CpuStorage,
        r_l: &Layout,
        pages: &CpuStorage,
        p_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.check(q_l, r_l)?;
        let Place { heads, rows, .. } = self.0;
        let (qkv, rotary, pages) = (slice(qkv, q_l)?, slice(rotary, r_l)?, slice(pages, p_l)?);
        let width = heads.heads * heads.head_dim;
        let mut out = vec![0.0; rows.len() * width];
        let shared = Shared::new(&mut out);
        let attend_row_head = |item: usize| {
            let (index, kv_head) = (item / heads.kv_heads, item % heads.kv_heads);
            let row = &rows[index];
            let turn = &rotary[row.position * heads.head_dim..][..heads.head_dim];
            let queries = &qkv[index * heads.qkv_size()..][..width];
            let share = width / heads.kv_heads;
            let queries = &queries[kv_head * share..][..share];
            // SAFETY: the outputs of one row's heads are nobody else's.
            let out = unsafe { shared.get(index * width + kv_head * share, share) };
            for (queries, out) in queries.chunks(GROUP * heads.head_dim).zip(out.chunks_mut(GROUP * heads.head_dim)) {
                attend_group(self.0, row, kv_head, queries, turn, pages, out);
            }
        };
        let items = rows.len() * heads.kv_heads;
        let keys: usize = rows.iter().map(|row| row.position + 1).sum();
        if keys * heads.heads < PARALLEL_KEYS {
            (0..items).for_each(attend_row_head);
        } else {
            (0..items).into_par_iter().for_each(attend_row_head);
        }
        Ok((CpuStorage::F32(out), (rows.len(), width).into()))
    }
}

multiversion! {
    /// Attention of up to [`GROUP`] query heads of one row that share a key-value head.
    fn attend_group(
        place: Place<'_>, row: &Row<'_>, kv_head: usize, queries: &[f32], turn: &[f32], pages: &[f32], out: &mut [f32],
    ) {
        let Place { layout, layer, .. } = place;
        let dim = layout.head_dim;
        let group = queries.len() / dim;
        let mut rotated = [0.0; 1024];
        let mut heap;
        let rotated = if queries.len() <= rotated.len() {
            &mut rotated[..queries.len()]
        } else {
            heap = vec![0.0; queries.len()];
            &mut heap[..]
        };
        for (query, rotated) in queries.chunks_exact(dim).zip(rotated.chunks_exact_mut(dim)) {
            rotate(query, turn, (dim as f32).sqrt().recip(), rotated);
        }
        let mut greatest = [f32::NEG_INFINITY; GROUP];
        let mut sums = [0.0; GROUP];
        for start in (0..=row.position).step_by(TILE) {
            let block = row.blocks[start / layout.block_tokens] as usize;
            let page = &pages[layout.page(row.depth, layer, block)..][..layout.page_numbers()];
            let offset = start % layout.block_tokens;
            let keys = &page[layout.key_tile(kv_head, offset)..][..dim * TILE];
            let count = TILE.min(row.position + 1 - start);
            let values = &page[layout.value(kv_head, offset)..][..count * dim];
            for head in 0..group {
                let mut weights = scores(&rotated[head * dim..][..dim], keys);
                weights[count..].fill(f32::NEG_INFINITY);
                let top = weights.iter().fold(greatest[head], |top, &score| top.max(score));
                let rescale = exp(greatest[head] - top);
                greatest[head] = top;
                for weight in &mut weights {
                    *weight = exp(*weight - top);
                }
                sums[head] = sums[head] * rescale + tree_sum(&weights);
                mix_values(&mut out[head * dim..][..dim], rescale, &weights[..count], values);
            }
        }
        for (out, sum) in out.chunks_exact_mut(dim).zip(sums) {
            let scale = sum.recip();
            out.iter_mut().for_each(|out| *out *= scale);
        }
    }
}

/// Scores of one rotated query against a tile of keys `[head_dim, TILE]`: four partial sums by dimension, so that
/// their latencies overlap.
#[inline(always)]
fn scores(query: &[f32], keys: &[f32]) -> Lanes {
    let mut partial = [[0.0; LANES]; 4];
    let (queries, tiles) = (query.chunks_exact(4), keys.chunks_exact(4 * TILE));
    for (i, query) in queries.remainder().iter().enumerate() {
        add_scaled(&mut partial[i], *query, &tiles.remainder()[i * TILE..]);
    }
    for (query, keys) in queries.zip(tiles) {
        for i in 0..4 {
            add_scaled(&mut partial[i], query[i], &keys[i * TILE..]);
        }
    }
    std::array::from_fn(|lane| (partial[0][lane] + partial[1][lane]) + (partial[2][lane] + partial[3][lane]))
}

/// `out * rescale + sum of weight * value`, in order of position.
#[inline(always)]
fn mix_values(out: &mut [f32], rescale: f32, weights: &[f32], values: &[f32]) {
    let dim = out.len();
    let whole = dim / LANES * LANES;
    for first in (0..whole).step_by(LANES) {
        let mut sum: Lanes = std::array::from_fn(|lane| out[first + lane] * rescale);
        for (weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
            add_scaled(&mut sum, *weight, &value[first..]);
        }
        out[first..first + LANES].copy_from_slice(&sum);
    }
    for (i, out) in out.iter_mut().enumerate().skip(whole) {
        *out *= rescale;
        for (weight, value) in weights.iter().zip(values.chunks_exact(dim)) {
            *out = weight.mul_add(value[i], *out);
        }
    }
}

/// The sum of a register, by halves.
#[inline(always)]
fn tree_sum(lanes: &Lanes) -> f32 {
    let mut lanes = *lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[half + i];
        }
        half /= 2;
    }
    lanes[0]
}

/// An entry of the cache that deeper depths share: KV fill by reuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The block.
    pub block: BlockId,
    /// The position within it.
    pub offset: usize,
    /// The depth whose key and value are copied to every deeper one.
    pub depth: usize,
}

/// Copies keys and values of exited tokens to the depths they never ran, in every layer.
///
/// # Errors
/// If a tensor is not on the CPU.
pub fn fill_deeper(cache: &KvCache, fills: &[Fill]) -> Result<()> {
    cache.pages().inplace_op1(&FillDeeper { layout: cache.layout(), fills })
}

struct FillDeeper<'a> {
    layout: PageLayout,
    fills: &'a [Fill],
}

impl InplaceOp1 for FillDeeper<'_> {
    fn name(&self) -> &'static str {
        "fill-deeper"
    }

    fn cpu_fwd(&self, pages: &mut CpuStorage, p_l: &Layout) -> Result<()> {
        let layout = self.layout;
        let pages = slice_mut(pages, p_l)?;
        for fill in self.fills {
            for layer in 0..layout.layers {
                let from = layout.page(fill.depth, layer, fill.block as usize);
                for depth in fill.depth + 1..layout.depths {
                    let to = layout.page(depth, layer, fill.block as usize);
                    copy_entry(pages, layout, from, to, fill.offset);
                }
            }
        }
        Ok(())
    }
}

/// Copies the key and value of one position of every head from page to page.
fn copy_entry(pages: &mut [f32], layout: PageLayout, from: usize, to: usize, offset: usize) {
    for kv_head in 0..layout.kv_heads {
        let key = layout.key_tile(kv_head, offset) + offset % TILE;
        for i in (key..).step_by(TILE).take(layout.head_dim) {
            pages[to + i] = pages[from + i];
        }
        let value = layout.value(kv_head, offset);
        pages.copy_within(from + value..from + value + layout.head_dim, to + value);
    }
}
