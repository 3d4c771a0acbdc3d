//! Attention over rows of different sequences, positions and depths in one pass, on paged keys and values.
//!
//! A pass first stores the keys and values of all its rows, then attends. A row therefore finds the entries of earlier
//! rows of the pass at its depth, and a prompt chunk is causal. The softmax is computed online (arXiv 1805.02867) over
//! strides of a sequence's entries, so its order of summation depends only on the entries that the row attends to.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp3, InplaceOp1, InplaceOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use scheduler::blocks::BlockId;

use super::rotary::rotate;
use super::simd::{LANES, Lanes, exp, greater, multiversion};
use super::{Shared, slice, slice_mut};
use crate::cache::{CHUNK, Kept, KvCache, PageLayout, TILE};

const _: () = assert!(TILE == LANES && CHUNK == 2 * LANES, "keys and values come by whole vector registers");

/// Query heads that attend together, so that their sums fit in registers.
const GROUP: usize = 4;
/// Maximum width of a head.
const MAX_HEAD_DIM: usize = 256;
/// Maximum width of a narrow head, which clears and keeps fewer numbers.
const NARROW_HEAD_DIM: usize = 64;
/// Entries after which the online softmax rescales.
const STRIDE: usize = 4 * TILE;
/// Keys read, over all rows and heads, below which a second thread does not pay.
const PARALLEL_KEYS: usize = 1 << 9;
/// Entries copied to deeper depths below which a second thread does not pay.
const PARALLEL_ENTRIES: usize = 1 << 5;

/// A row, as attention needs it.
///
/// The entries of a sequence at a depth are stored without gaps: positions without an entry are left out, so that
/// attention reads only what it uses.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    /// Position of the row in its sequence.
    pub position: usize,
    /// Depth at which the row runs.
    pub depth: usize,
    /// Depths at which the row writes its key and value.
    pub fills: Range<usize>,
    /// Positions of the sequence without an entry at this depth, in order.
    pub skipped: &'a [u32],
    /// Blocks of the sequence, in order of position.
    pub blocks: &'a [BlockId],
}

impl<'a> Row<'a> {
    /// A row that writes an entry at its own depth, like all rows before it.
    pub fn new(position: usize, depth: usize, blocks: &'a [BlockId]) -> Self {
        Self { position, depth, fills: depth..depth + 1, skipped: &[], blocks }
    }

    /// Number of entries before a position, in the row's sequence and at its depth.
    #[inline(always)]
    pub(crate) fn entries_before(&self, position: usize) -> usize {
        position - self.skipped.partition_point(|&skipped| (skipped as usize) < position)
    }
}

/// Parameters of the attention of one layer.
#[derive(Clone, Debug)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Number of key-value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor of attention scores.
    pub scale: f32,
    /// Sights of rows: one for all depths, or one for each.
    pub sights: Vec<Sight>,
    /// Keys and values that the layer keeps.
    pub kept: Kept,
}

/// Positions of its sequence that a row attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// Number of latest positions, its own included; `None` for all.
    pub window: Option<usize>,
    /// Index of the [`rotary table`](super::rotary::tables) for queries and keys.
    pub rotary: usize,
}

impl Heads {
    /// Width of a row of concatenated queries, keys and values.
    fn qkv_size(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    fn sight(&self, depth: usize) -> Sight {
        self.sights[if self.sights.len() == 1 { 0 } else { depth }]
    }

    /// The entries that a row attends to.
    fn seen(&self, row: &Row<'_>) -> Range<usize> {
        let end = row.position + 1;
        let start = self.sight(row.depth).window.map_or(0, |window| end.saturating_sub(window));
        row.entries_before(start)..row.entries_before(end)
    }
}

/// Attention of `rows` in one layer: from `qkv` `[rows, (heads + 2 kv_heads) * head_dim]` to `[rows, heads *
/// head_dim]`. Stores the rows' keys and values in `cache` first. `rotary` is
/// [`rotary::tables`](super::rotary::tables).
///
/// # Errors
/// If a shape differs, or a row's blocks do not reach its position.
pub fn attend(qkv: &Tensor, rotary: &Tensor, cache: &KvCache, heads: &Heads, rows: &[Row<'_>]) -> Result<Tensor> {
    keep(qkv, rotary, cache, heads, rows)?;
    qkv.apply_op3_no_bwd(rotary, cache.pages(), &Attend(Place { layout: cache.layout(), heads, rows }))
}

/// First step of [`attend`]: stores the rows' keys and values.
///
/// # Errors
/// As for [`attend`].
pub fn keep(qkv: &Tensor, rotary: &Tensor, cache: &KvCache, heads: &Heads, rows: &[Row<'_>]) -> Result<()> {
    cache.pages().inplace_op3(qkv, rotary, &Store(Place { layout: cache.layout(), heads, rows }))
}

/// Parameters of both steps of attention.
#[derive(Clone, Copy)]
struct Place<'a> {
    layout: PageLayout,
    heads: &'a Heads,
    rows: &'a [Row<'a>],
}

impl Place<'_> {
    fn check(&self, qkv: &Layout, rotary: &Layout) -> Result<()> {
        let expected = [self.rows.len(), self.heads.qkv_size()];
        if qkv.dims() != expected {
            bail!("attention got {:?}, expected {expected:?}", qkv.shape());
        }
        if self.heads.head_dim > MAX_HEAD_DIM {
            bail!("a head is {} wide, the kernel can do at most {MAX_HEAD_DIM}", self.heads.head_dim);
        }
        let positions = rotary.shape().dims3()?.1;
        for row in self.rows {
            let reach = positions.min(row.blocks.len() * self.layout.block_tokens);
            if row.position >= reach {
                bail!("a row is at position {}, its sequence has room for {reach}", row.position);
            }
        }
        Ok(())
    }

    /// A row's cosines and sines.
    #[inline(always)]
    fn turn<'t>(&self, rotary: &'t [f32], shape: (usize, usize, usize), row: &Row<'_>) -> &'t [f32] {
        let (_, positions, dims) = shape;
        let table = self.heads.sight(row.depth).rotary;
        &rotary[(table * positions + row.position) * dims..][..dims]
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
        let Place { layout, heads, rows } = self.0;
        let (pages, qkv, rotary) = (slice_mut(pages, p_l)?, slice(qkv, q_l)?, slice(rotary, r_l)?);
        let tables = r_l.shape().dims3()?;
        let mut key = vec![0.0; heads.head_dim];
        for (row, qkv) in rows.iter().zip(qkv.chunks_exact(heads.qkv_size())) {
            let turn = self.0.turn(rotary, tables, row);
            let fills = match heads.kept {
                Kept::Once(_) => 0..1,
                Kept::AtEachDepth(_) => row.fills.clone(),
            };
            let (keys, values) = qkv[heads.heads * heads.head_dim..].split_at(heads.kv_heads * heads.head_dim);
            let entry = row.entries_before(row.position);
            let block = row.blocks[entry / layout.block_tokens] as usize;
            let offset = entry % layout.block_tokens;
            for kv_head in 0..heads.kv_heads {
                let of_head = kv_head * heads.head_dim..(kv_head + 1) * heads.head_dim;
                rotate(&keys[of_head.clone()], turn, 1.0, &mut key);
                for depth in fills.clone() {
                    let page = layout.pages(heads.kept, depth) + block * layout.page_numbers();
                    let page = &mut pages[page..][..layout.page_numbers()];
                    put(page, layout, kv_head, offset, &key, &values[of_head.clone()]);
                }
            }
        }
        Ok(())
    }
}

/// Writes one head's key and value into a page.
#[inline(always)]
fn put(page: &mut [f32], layout: PageLayout, kv_head: usize, offset: usize, key: &[f32], value: &[f32]) {
    let tile = &mut page[layout.key_tile(kv_head, offset)..][..key.len() * TILE];
    for (place, key) in tile[offset % TILE..].iter_mut().step_by(TILE).zip(key) {
        *place = *key;
    }
    page[layout.value(kv_head, offset)..][..value.len()].copy_from_slice(value);
}

/// Attention of rotated queries over the stored entries.
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
        let tables = r_l.shape().dims3()?;
        let width = heads.heads * heads.head_dim;
        let mut out = vec![0.0; rows.len() * width];
        let shared = Shared::new(&mut out);
        let attend_row_head = |item: usize| {
            let (index, kv_head) = (item / heads.kv_heads, item % heads.kv_heads);
            let row = &rows[index];
            let turn = self.0.turn(rotary, tables, row);
            let queries = &qkv[index * heads.qkv_size()..][..width];
            let share = width / heads.kv_heads;
            let queries = &queries[kv_head * share..][..share];
            // SAFETY: the outputs of one row's heads are written by one thread only.
            let out = unsafe { shared.get(index * width + kv_head * share, share) };
            for (queries, out) in queries.chunks(GROUP * heads.head_dim).zip(out.chunks_mut(GROUP * heads.head_dim)) {
                attend_group(self.0, row, kv_head, queries, turn, pages, out);
            }
        };
        let items = rows.len() * heads.kv_heads;
        let keys: usize = rows.iter().map(|row| heads.seen(row).len()).sum();
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
        let layout = place.layout;
        let history = History { layout, start: layout.pages(place.heads.kept, row.depth), row, kv_head, pages };
        let query = Query { heads: queries, turn, scale: place.heads.scale, seen: place.heads.seen(row) };
        match layout.head_dim {
            ..=NARROW_HEAD_DIM => attend_any::<NARROW_HEAD_DIM>(history, query, out),
            _ => attend_any::<MAX_HEAD_DIM>(history, query, out),
        }
    }
}

/// The queries of a group of heads of one row.
struct Query<'a> {
    /// `[heads, head_dim]`, not yet rotated.
    heads: &'a [f32],
    /// Cosines and sines of the row.
    turn: &'a [f32],
    /// Factor of attention scores.
    scale: f32,
    /// The entries that the row attends to.
    seen: Range<usize>,
}

#[inline(always)]
fn attend_any<const DIM: usize>(from: History<'_>, query: Query<'_>, out: &mut [f32]) {
    match query.heads.len() / from.layout.head_dim {
        1 => attend_heads::<1, DIM>(from, query, out),
        2 => attend_heads::<2, DIM>(from, query, out),
        3 => attend_heads::<3, DIM>(from, query, out),
        _ => attend_heads::<GROUP, DIM>(from, query, out),
    }
}

/// Keys and values of one head for a row.
#[derive(Clone, Copy)]
struct History<'a> {
    layout: PageLayout,
    /// Start of the pages of the row's layer and depth.
    start: usize,
    row: &'a Row<'a>,
    kv_head: usize,
    pages: &'a [f32],
}

impl<'a> History<'a> {
    /// The tile that starts at an entry: keys `[key_dims, TILE]` and values `[TILE, value_stride]`.
    #[inline(always)]
    fn tile(&self, entry: usize) -> (&'a [f32], &'a [f32]) {
        let History { layout, start, row, kv_head, pages } = *self;
        let block = row.blocks[entry / layout.block_tokens] as usize;
        let offset = entry % layout.block_tokens;
        let page = &pages[start + block * layout.page_numbers()..][..layout.page_numbers()];
        let keys = &page[layout.key_tile(kv_head, offset)..][..layout.key_dims() * TILE];
        (keys, &page[layout.value(kv_head, offset)..][..layout.value_stride() * TILE])
    }
}

/// State of the online softmax of `HEADS` query heads.
struct Seen<const HEADS: usize, const DIM: usize> {
    greatest: [f32; HEADS],
    sums: [f32; HEADS],
    mixed: [[f32; DIM]; HEADS],
}

#[inline(always)]
fn attend_heads<const HEADS: usize, const DIM: usize>(from: History<'_>, query: Query<'_>, out: &mut [f32]) {
    let dim = from.layout.head_dim;
    let mut rotated = [[0.0; DIM]; HEADS];
    for (query_head, rotated) in query.heads.chunks_exact(dim).zip(&mut rotated) {
        rotate(query_head, query.turn, query.scale, &mut rotated[..dim]);
    }
    let mut seen = Seen { greatest: [f32::NEG_INFINITY; HEADS], sums: [0.0; HEADS], mixed: [[0.0; DIM]; HEADS] };
    let Range { start: first, end } = query.seen;
    for start in (first / STRIDE * STRIDE..end).step_by(STRIDE) {
        see_stride(from, start, first.saturating_sub(start)..STRIDE.min(end - start), &rotated, &mut seen);
    }
    for (head, out) in out.chunks_exact_mut(dim).enumerate() {
        let scale = seen.sums[head].recip();
        for (out, mixed) in out.iter_mut().zip(&seen.mixed[head]) {
            *out = mixed * scale;
        }
    }
}

/// Processes the entries of the stride at `start` that the row attends to.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "sums that iterators walk over leave their registers")]
fn see_stride<const HEADS: usize, const DIM: usize>(
    from: History<'_>,
    start: usize,
    visible: Range<usize>,
    rotated: &[[f32; DIM]; HEADS],
    seen: &mut Seen<HEADS, DIM>,
) {
    let Range { start: hidden, end: count } = visible;
    let (first_tile, tiles) = (hidden / TILE, count.div_ceil(TILE));
    let mut weights = [[Lanes([f32::NEG_INFINITY; LANES]); STRIDE / TILE]; HEADS];
    let mut values: [&[f32]; STRIDE / TILE] = [&[]; STRIDE / TILE];
    for tile in first_tile..tiles {
        let keys;
        (keys, values[tile]) = from.tile(start + tile * TILE);
        let scores = scores(rotated, keys);
        for head in 0..HEADS {
            weights[head][tile] = scores[head].first(count - tile * TILE, f32::NEG_INFINITY);
        }
    }
    if hidden > 0 {
        weights.iter_mut().for_each(|weights| hide(weights, hidden));
    }
    let mut rescale = [0.0; HEADS];
    for head in 0..HEADS {
        let [first, rest @ ..] = &weights[head];
        let top = rest.iter().fold(*first, |top, next| top.zip(*next, greater)).reduce(greater);
        let top = greater(top, seen.greatest[head]);
        rescale[head] = exp(seen.greatest[head] - top);
        seen.greatest[head] = top;
        let mut sum = Lanes::ZERO;
        for weights in &mut weights[head][..tiles] {
            *weights = weights.map(|score| exp(score - top));
            sum = sum.zip(*weights, |sum, weight| sum + weight);
        }
        seen.sums[head] = seen.sums[head].mul_add(rescale[head], sum.reduce(|a, b| a + b));
    }
    for first in (0..from.layout.head_dim).step_by(CHUNK) {
        let mut sums: [[Lanes; 2]; HEADS] = std::array::from_fn(|head| {
            [0, LANES].map(|half| Lanes::load(&seen.mixed[head][first + half..]).map(|mixed| mixed * rescale[head]))
        });
        for tile in first_tile..tiles {
            let values = values[tile].chunks_exact(from.layout.value_stride());
            for (offset, value) in values.enumerate().take(count - tile * TILE) {
                let value = [Lanes::load(&value[first..]), Lanes::load(&value[first + LANES..])];
                for head in 0..HEADS {
                    let weight = weights[head][tile].0[offset];
                    sums[head][0] = sums[head][0].add_scaled(weight, value[0]);
                    sums[head][1] = sums[head][1].add_scaled(weight, value[1]);
                }
            }
        }
        for head in 0..HEADS {
            seen.mixed[head][first..first + LANES].copy_from_slice(&sums[head][0].0);
            seen.mixed[head][first + LANES..first + CHUNK].copy_from_slice(&sums[head][1].0);
        }
    }
}

/// Masks the first scores of a stride, which are before a window.
#[cold]
fn hide(scores: &mut [Lanes], count: usize) {
    for (tile, scores) in scores.iter_mut().enumerate() {
        *scores = scores.after(count.saturating_sub(tile * TILE), f32::NEG_INFINITY);
    }
}

/// Scores of rotated queries for a tile of keys `[key_dims, TILE]`. Even and odd dimensions are summed separately, so
/// that their latencies overlap.
#[inline(always)]
fn scores<const HEADS: usize, const DIM: usize>(rotated: &[[f32; DIM]; HEADS], keys: &[f32]) -> [Lanes; HEADS] {
    let mut partial = [[Lanes::ZERO; 2]; HEADS];
    for (pair, keys) in keys.chunks_exact(2 * TILE).enumerate() {
        let (even, odd) = (Lanes::load(keys), Lanes::load(&keys[TILE..]));
        for head in 0..HEADS {
            partial[head][0] = partial[head][0].add_scaled(rotated[head][2 * pair], even);
            partial[head][1] = partial[head][1].add_scaled(rotated[head][2 * pair + 1], odd);
        }
    }
    partial.map(|[even, odd]| even.zip(odd, |even, odd| even + odd))
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

/// Copies keys and values of exited tokens to the depths they skipped, in every layer of block and coda.
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
        let pages = Shared::new(slice_mut(pages, p_l)?);
        let entries = self.layout.depth_layers * self.layout.depths * self.fills.len();
        match entries < PARALLEL_ENTRIES {
            true => (0..self.layout.depth_layers).for_each(|layer| self.fill_layer(layer, pages)),
            false => (0..self.layout.depth_layers).into_par_iter().for_each(|layer| self.fill_layer(layer, pages)),
        }
        Ok(())
    }
}

impl FillDeeper<'_> {
    fn fill_layer(&self, layer: usize, pages: Shared<'_>) {
        let layout = self.layout;
        for fill in self.fills {
            let page = |depth| {
                let start = layout.pages(Kept::AtEachDepth(layer), depth) + fill.block as usize * layout.page_numbers();
                // SAFETY: every layer has its own pages at each depth, and one thread fills those of a layer.
                unsafe { pages.get(start, layout.page_numbers()) }
            };
            let from = page(fill.depth);
            (fill.depth + 1..layout.depths).for_each(|depth| copy_entry(from, page(depth), layout, fill.offset));
        }
    }
}

/// Copies the key and value of one position of every head from page to page.
fn copy_entry(from: &[f32], to: &mut [f32], layout: PageLayout, offset: usize) {
    for kv_head in 0..layout.kv_heads {
        let key = layout.key_tile(kv_head, offset) + offset % TILE;
        for i in (key..).step_by(TILE).take(layout.head_dim) {
            to[i] = from[i];
        }
        let value = layout.value(kv_head, offset);
        to[value..value + layout.head_dim].copy_from_slice(&from[value..value + layout.head_dim]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use scheduler::KvFill;

    use crate::config::ModelConfig;

    /// The softmax over the positions that a row attends to, one after the other: `[heads * head_dim]`.
    fn plain_attention(heads: &Heads, qkv: &[Vec<f32>], position: usize, seen: &[usize]) -> Vec<f64> {
        let dim = heads.head_dim;
        let part = |row: usize, part: usize| qkv[row][part * dim..][..dim].iter().map(|&x| f64::from(x));
        let mut out = Vec::new();
        for head in 0..heads.heads {
            let kv_head = head / (heads.heads / heads.kv_heads);
            let score = |&row: &usize| {
                let dot: f64 = part(position, head).zip(part(row, heads.heads + kv_head)).map(|(q, k)| q * k).sum();
                (dot * f64::from(heads.scale)).exp()
            };
            let weights: Vec<f64> = seen.iter().map(score).collect();
            let mut mixed = vec![0.0; dim];
            for (&row, weight) in seen.iter().zip(&weights) {
                let values = part(row, heads.heads + heads.kv_heads + kv_head);
                mixed
                    .iter_mut()
                    .zip(values)
                    .for_each(|(mixed, value)| *mixed += weight / weights.iter().sum::<f64>() * value);
            }
            out.extend(mixed);
        }
        out
    }

    #[test]
    fn rows_attend_to_what_they_see_and_pass_over_what_was_skipped() {
        const POSITIONS: usize = 200;
        let mut rng = StdRng::seed_from_u64(1);
        for (head_dim, window) in [(64, None), (6, Some(70)), (5, None), (70, Some(1000))] {
            let config =
                ModelConfig { head_dim, num_heads: 6, num_kv_heads: 2, num_loops: 2, ..ModelConfig::default() };
            let sights = vec![Sight { window, rotary: 0 }];
            let kept = Kept::AtEachDepth(0);
            let heads = Heads { heads: 6, kv_heads: 2, head_dim, scale: 0.3, sights, kept };
            let cache = KvCache::new(&config, KvFill::Skip, 13, 16, &Device::Cpu).unwrap();
            let blocks: Vec<BlockId> = (0..13).rev().collect();
            // A rotation by zero.
            let rotary = [vec![1.0_f32; head_dim / 2], vec![0.0; head_dim / 2]].concat().repeat(POSITIONS);
            let rotary = Tensor::from_vec(rotary, (1, POSITIONS, head_dim / 2 * 2), &Device::Cpu).unwrap();
            let skipped: Vec<u32> =
                (30..POSITIONS as u32).filter(|position| position % 7 < 3 && position % 50 != 9).collect();
            let reached: Vec<usize> =
                (0..POSITIONS).filter(|&position| !skipped.contains(&(position as u32))).collect();
            let numbers = |_| (0..heads.qkv_size()).map(|_| rng.random_range(-1.0..1.0)).collect();
            let qkv: Vec<Vec<f32>> = (0..POSITIONS).map(numbers).collect();
            // Two passes, the second of which reads what the first wrote.
            for part in [&reached[..90], &reached[90..]] {
                let row = |&position: &usize| Row { skipped: &skipped, ..Row::new(position, 1, &blocks) };
                let rows: Vec<Row<'_>> = part.iter().map(row).collect();
                let of_part: Vec<f32> = part.iter().flat_map(|&position| qkv[position].clone()).collect();
                let of_part = Tensor::from_vec(of_part, (part.len(), heads.qkv_size()), &Device::Cpu).unwrap();
                let found = attend(&of_part, &rotary, &cache, &heads, &rows).unwrap().to_vec2::<f32>().unwrap();
                for (&position, found) in part.iter().zip(found) {
                    let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
                    let seen: Vec<usize> =
                        reached.iter().copied().filter(|seen| (first..=position).contains(seen)).collect();
                    for (found, expected) in found.iter().zip(plain_attention(&heads, &qkv, position, &seen)) {
                        assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} is not {expected} at {position}");
                    }
                }
            }
        }
    }
}
