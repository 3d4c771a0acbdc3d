//! Attention and the entries it stores, compared with the CPU operation.

use candle_core::{Device as CandleDevice, Tensor};
use engine::cache::{Kept, KvCache, TILE};
use engine::config::{ModelConfig, Sharing};
use engine::cuda::device::Stored;
use engine::cuda::kernels::{AttentionInputs, Fill, Geometry, Sight};
use engine::cuda::source::{Scalar, Specialization};
use engine::kernels::attention::{self, Heads, Row, attend, fill_deeper};
use engine::kernels::rotary;
use scheduler::KvFill;

use crate::bench::{Bench, Dice, Held, assert_close, numbers, rounded, tolerance};

const DEPTHS: usize = 3;
const DEPTH_LAYERS: usize = 2;
const PRELUDE_LAYERS: usize = 1;

/// Sizes of the heads of a model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub scalar: Scalar,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub block_tokens: usize,
}

/// Rows of one sequence in a pass: a decode row or a prompt chunk.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    pub history: usize,
    pub rows: usize,
    pub depth: usize,
}

/// A cache and a pass over it, on both sides.
pub struct Case {
    pub bench: Bench,
    shape: Shape,
    kept: Kept,
    cache: KvCache,
    /// The device's pages, in the storage type.
    pages: Vec<f32>,
    chunks: Vec<Chunk>,
    fills: Vec<std::ops::Range<usize>>,
    /// By chunk: positions of its history without an entry at its depth.
    skipped: Vec<Vec<u32>>,
    blocks: Vec<Vec<u32>>,
    window: usize,
    sights: Vec<attention::Sight>,
    qkv: Vec<f32>,
    rotary: Tensor,
}

fn config(shape: Shape, positions: usize) -> ModelConfig {
    ModelConfig {
        vocab_size: 16,
        hidden_size: 16,
        intermediate_size: 16,
        num_heads: shape.heads,
        num_kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        block_layers: DEPTH_LAYERS,
        num_loops: DEPTHS,
        sharing: Sharing::Block,
        prelude_layers: PRELUDE_LAYERS,
        coda_layers: 0,
        tie_embeddings: true,
        max_positions: positions,
        ..ModelConfig::default()
    }
}

/// Chunks of random length, history and depth, sorted by depth.
pub fn chunks(dice: &mut Dice, batch: usize, longest: usize) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = (0..batch)
        .map(|_| Chunk { history: dice.pick(&[0, 1, 2, 15, 16, 17, longest]).min(longest), rows: 1, depth: 0 })
        .collect();
    for chunk in &mut chunks {
        if dice.below(2) == 0 {
            chunk.history = dice.below(longest + 1);
        }
        if dice.below(4) == 0 {
            chunk.rows = 2 + dice.below(39);
        }
        chunk.depth = dice.below(DEPTHS);
    }
    chunks.sort_by_key(|chunk| chunk.depth);
    chunks
}

impl Case {
    /// `None` if there is no machine to test.
    pub fn new(shape: Shape, chunks: Vec<Chunk>, kept: Kept, dice: &mut Dice) -> Option<Self> {
        Self::with_fill(shape, chunks, kept, KvFill::Reuse, 0, dice)
    }

    /// Makes every row attend to its whole history, so that any error in it shows.
    #[cfg(not(feature = "cuda"))]
    pub fn without_windows(mut self) -> Self {
        self.sights.iter_mut().for_each(|sight| sight.window = None);
        self
    }

    /// Leaves out the entries of some positions of the histories.
    fn with_fill(
        shape: Shape,
        chunks: Vec<Chunk>,
        kept: Kept,
        fill: KvFill,
        skipped_percent: usize,
        dice: &mut Dice,
    ) -> Option<Self> {
        let Shape { scalar, heads, kv_heads, head_dim, block_tokens } = shape;
        let bench = Bench::new(Specialization::new(scalar, head_dim, heads / kv_heads, block_tokens).unwrap())?;
        let of_chunk = |chunk: &Chunk| (chunk.history + chunk.rows).div_ceil(block_tokens);
        let mut free: Vec<u32> = (0..chunks.iter().map(of_chunk).sum::<usize>() as u32 + 3).collect();
        let num_blocks = free.len();
        let blocks: Vec<Vec<u32>> = chunks
            .iter()
            .map(|chunk| (0..of_chunk(chunk)).map(|_| free.swap_remove(dice.below(free.len()))).collect())
            .collect();
        let positions = chunks.iter().map(|chunk| chunk.history + chunk.rows).max().unwrap_or(1);
        let (config, cpu) = (config(shape, positions), CandleDevice::Cpu);
        let cache = KvCache::new(&config, fill, num_blocks as u32, block_tokens as u32, &cpu).unwrap();
        let mut skips = |chunk: &Chunk| match kept {
            Kept::Once(_) => Vec::new(),
            Kept::AtEachDepth(_) => (0..chunk.history as u32).filter(|_| dice.below(100) < skipped_percent).collect(),
        };
        let skipped = chunks.iter().map(&mut skips).collect();
        let window = dice.pick(&[1, 7, 300]);
        let rotary_dims = dice.pick(&[head_dim, head_dim / 4 * 2]);
        let frequencies =
            |base: f32| (0..rotary_dims / 2).map(|i| base.powf(-(i as f32) / rotary_dims as f32)).collect();
        let sights = (0..DEPTHS)
            .map(|_| attention::Sight { window: dice.pick(&[None, Some(window)]), rotary: dice.below(2) })
            .collect();
        let rows: usize = chunks.iter().map(|chunk| chunk.rows).sum();
        let layers = PRELUDE_LAYERS + cache.layout().depths * DEPTH_LAYERS;
        let mut case = Self {
            qkv: bench.random(dice, rows * (heads + 2 * kv_heads) * head_dim),
            bench,
            shape,
            kept,
            cache,
            pages: vec![f32::NAN; layers * num_blocks * 2 * kv_heads * block_tokens * head_dim],
            fills: Vec::new(),
            skipped,
            blocks,
            window,
            sights,
            rotary: rotary::tables(&[frequencies(100.0), frequencies(3.0)], positions).unwrap(),
            chunks,
        };
        case.fill_histories(dice);
        Some(case)
    }

    /// Gives every sequence keys and values at the positions before its rows, at its depth, and sets the depths at
    /// which every row writes entries. A row that writes none reads the earlier entry.
    fn fill_histories(&mut self, dice: &mut Dice) {
        let mut cpu = numbers(self.cache.pages());
        for (index, chunk) in self.chunks.clone().iter().enumerate() {
            let (blocks, skipped) = (self.blocks[index].clone(), self.skipped[index].clone());
            let mut entries = 0..;
            for position in (0..chunk.history + chunk.rows).filter(|position| !skipped.contains(&(*position as u32))) {
                let at = entries.next().unwrap();
                if position >= chunk.history {
                    let choices = [chunk.depth..chunk.depth + 1, chunk.depth..DEPTHS, chunk.depth..chunk.depth];
                    self.fills.push(choices[if chunk.rows > 1 { 0 } else { dice.below(3) }].clone());
                    let none = self.fills.last().unwrap().is_empty() && matches!(self.kept, Kept::AtEachDepth(_));
                    if !none {
                        continue;
                    }
                }
                for head in 0..self.shape.kv_heads {
                    let entry = self.bench.random(dice, 2 * self.shape.head_dim);
                    self.put_entry(&mut cpu, chunk.depth, blocks[at / self.shape.block_tokens], at, head, &entry);
                }
            }
        }
        let pages = Tensor::new(cpu, &CandleDevice::Cpu).unwrap();
        self.cache.pages().slice_set(&pages, 0, 0).unwrap();
    }

    fn put_entry(&mut self, cpu: &mut [f32], depth: usize, block: u32, at: usize, head: usize, entry: &[f32]) {
        let (layout, offset) = (self.cache.layout(), at % self.shape.block_tokens);
        let page = layout.pages(self.kept, depth) + block as usize * layout.page_numbers();
        let (key, value) = entry.split_at(self.shape.head_dim);
        for (i, &x) in key.iter().enumerate() {
            cpu[page + layout.key_tile(head, offset) + i * TILE + offset % TILE] = x;
        }
        cpu[page + layout.value(head, offset)..][..value.len()].copy_from_slice(value);
        let [at_key, at_value] = self.places(depth, block, offset, head);
        self.pages[at_key..][..key.len()].copy_from_slice(key);
        self.pages[at_value..][..value.len()].copy_from_slice(value);
    }

    /// Indices of a key and a value on the device.
    fn places(&self, depth: usize, block: u32, offset: usize, head: usize) -> [usize; 2] {
        let Shape { kv_heads, head_dim, block_tokens, .. } = self.shape;
        let half = kv_heads * block_tokens * head_dim;
        let layer = match self.kept {
            Kept::Once(layer) => layer,
            Kept::AtEachDepth(layer) => {
                PRELUDE_LAYERS + depth.min(self.cache.layout().depths - 1) * DEPTH_LAYERS + layer
            }
        };
        let page = (layer * self.cache.layout().blocks + block as usize) * 2 * half;
        [0, half].map(|part| page + part + (head * block_tokens + offset) * head_dim)
    }

    fn rows(&self) -> Vec<Row<'_>> {
        let mut fills = self.fills.iter();
        let mut rows = Vec::new();
        for ((chunk, blocks), skipped) in self.chunks.iter().zip(&self.blocks).zip(&self.skipped) {
            rows.extend((chunk.history..chunk.history + chunk.rows).map(|position| Row {
                fills: fills.next().unwrap().clone(),
                skipped,
                ..Row::new(position, chunk.depth, blocks)
            }));
        }
        rows
    }

    pub fn geometry(&self) -> Geometry {
        let (_, positions, rotary_dims) = self.rotary.dims3().unwrap();
        let (first_layer, layer_stride) = match self.kept {
            Kept::Once(layer) => (layer, 0),
            Kept::AtEachDepth(layer) => (PRELUDE_LAYERS + layer, DEPTH_LAYERS),
        };
        Geometry {
            heads: self.shape.heads as i32,
            kv_heads: self.shape.kv_heads as i32,
            blocks: self.cache.layout().blocks as i32,
            first_layer: first_layer as i32,
            layer_stride: layer_stride as i32,
            depths: self.cache.layout().depths as i32,
            once: i32::from(matches!(self.kept, Kept::Once(_))),
            sights: DEPTHS as i32,
            positions: positions as i32,
            rotary_dims: rotary_dims as i32,
            scale: 0.3,
        }
    }

    /// Runs the kernels; returns attention and pages.
    pub fn on_device(&self) -> candle_core::Result<(Vec<f32>, Vec<f32>)> {
        let bench = &self.bench;
        let uploaded = bench.upload(&self.rows(), Some(self.window), self.cache.layout().depths);
        let rows = uploaded.views;
        let pages: Held<Stored> = bench.store(&self.pages);
        let (qkv, rotary) = (bench.store(&self.qkv), bench.put(&numbers(&self.rotary)));
        let sight = |sight: &attention::Sight| Sight {
            windowed: i32::from(sight.window.is_some()),
            rotary: sight.rotary as i32,
        };
        let sights = bench.put(&self.sights.iter().map(sight).collect::<Vec<_>>());
        let inputs = AttentionInputs {
            qkv: qkv.view,
            rotary: rotary.view,
            pages: pages.view,
            sights: sights.view,
            geometry: self.geometry(),
        };
        let kernels = bench.kernels();
        let partial = bench.empty::<f32>(kernels.partial_numbers(&rows, self.shape.heads));
        let out = bench.empty_stored(self.fills.len() * self.shape.heads * self.shape.head_dim);
        kernels.rotate_and_store(&inputs, &rows)?;
        kernels.attend(&inputs, &rows, partial.view, out.view)?;
        Ok((bench.stored(&out), bench.stored(&pages)))
    }

    /// Runs the CPU operation; returns attention.
    fn on_cpu(&self) -> Vec<f32> {
        let Shape { heads, kv_heads, head_dim, .. } = self.shape;
        let kinds = Heads { heads, kv_heads, head_dim, scale: 0.3, sights: self.sights.clone(), kept: self.kept };
        let qkv = crate::bench::matrix(&self.qkv, (heads + 2 * kv_heads) * head_dim);
        numbers(&attend(&qkv, &self.rotary, &self.cache, &kinds, &self.rows()).unwrap())
    }

    /// The CPU's pages in the device's layout; NaN where nothing was stored.
    fn cpu_pages(&self) -> Vec<f32> {
        let (cpu, layout, rows) = (numbers(self.cache.pages()), self.cache.layout(), self.rows());
        let mut pages = self.pages.clone();
        for (row, depth) in rows.iter().flat_map(|row| self.stored_depths(row).map(move |depth| (row, depth))) {
            let entry = row.position - row.skipped.len();
            let (block, offset) = (row.blocks[entry / layout.block_tokens], entry % layout.block_tokens);
            let page = layout.pages(self.kept, depth) + block as usize * layout.page_numbers();
            for head in 0..self.shape.kv_heads {
                let [key, value] = self.places(depth, block, offset, head);
                for i in 0..self.shape.head_dim {
                    let keys = page + layout.key_tile(head, offset);
                    pages[key + i] = rounded(self.shape.scalar, cpu[keys + i * TILE + offset % TILE]);
                    pages[value + i] = cpu[page + layout.value(head, offset) + i];
                }
            }
        }
        pages
    }

    fn stored_depths(&self, row: &Row<'_>) -> std::ops::Range<usize> {
        match self.kept {
            Kept::Once(_) => 0..1,
            Kept::AtEachDepth(_) => row.fills.clone(),
        }
    }

    pub fn check(&self) {
        let what = format!("{:?} {:?} {:?} {:?}", self.shape, self.kept, self.chunks, self.sights);
        let (found, pages) = self.on_device().unwrap_or_else(|error| panic!("{what}: {error}"));
        let expected = self.on_cpu();
        assert_close(&what, &found, &expected, tolerance(self.shape.scalar));
        let stored: Vec<(f32, f32)> =
            pages.into_iter().zip(self.cpu_pages()).filter(|(a, b)| !(a.is_nan() && b.is_nan())).collect();
        let (found, expected): (Vec<f32>, Vec<f32>) = stored.into_iter().unzip();
        assert_close(&format!("pages of {what}"), &found, &expected, tolerance(self.shape.scalar) / 2.0);
    }
}

/// Head sizes, groups of query heads, block sizes and storage types.
pub const SHAPES: [Shape; 12] = [
    Shape { scalar: Scalar::F32, heads: 9, kv_heads: 3, head_dim: 64, block_tokens: 16 },
    Shape { scalar: Scalar::F32, heads: 8, kv_heads: 1, head_dim: 128, block_tokens: 32 },
    Shape { scalar: Scalar::F32, heads: 2, kv_heads: 2, head_dim: 256, block_tokens: 16 },
    Shape { scalar: Scalar::F32, heads: 10, kv_heads: 2, head_dim: 20, block_tokens: 48 },
    Shape { scalar: Scalar::Bf16, heads: 4, kv_heads: 1, head_dim: 64, block_tokens: 16 },
    Shape { scalar: Scalar::Bf16, heads: 8, kv_heads: 2, head_dim: 128, block_tokens: 16 },
    Shape { scalar: Scalar::Bf16, heads: 8, kv_heads: 4, head_dim: 256, block_tokens: 16 },
    Shape { scalar: Scalar::F16, heads: 3, kv_heads: 3, head_dim: 80, block_tokens: 16 },
    Shape { scalar: Scalar::F16, heads: 6, kv_heads: 2, head_dim: 64, block_tokens: 16 },
    Shape { scalar: Scalar::F16, heads: 5, kv_heads: 1, head_dim: 24, block_tokens: 48 },
    Shape { scalar: Scalar::Bf16, heads: 8, kv_heads: 1, head_dim: 256, block_tokens: 32 },
    Shape { scalar: Scalar::Bf16, heads: 6, kv_heads: 2, head_dim: 32, block_tokens: 16 },
];

fn check_all(shape: Shape, seed: u64) {
    let mut dice = Dice::new(seed);
    for (batch, longest) in [(1, 0), (1, 700), (2, 300), (5, 520), (17, 60), (64, 20)] {
        let kept = dice.pick(&[Kept::Once(0), Kept::AtEachDepth(0), Kept::AtEachDepth(1)]);
        let chunks = chunks(&mut dice, batch, longest);
        let (fill, skipped) = dice.pick(&[(KvFill::Reuse, 0), (KvFill::First, 0), (KvFill::Skip, 50)]);
        let Some(case) = Case::with_fill(shape, chunks, kept, fill, skipped, &mut dice) else { return };
        case.check();
    }
}

#[test]
fn attention_in_f32_is_that_of_the_cpu() {
    (0..4).for_each(|index| check_all(SHAPES[index], index as u64));
}

#[test]
fn attention_in_bf16_is_that_of_the_cpu() {
    [4, 5, 6, 10, 11].into_iter().for_each(|index| check_all(SHAPES[index], index as u64));
}

#[test]
fn attention_in_f16_is_that_of_the_cpu() {
    (7..10).for_each(|index| check_all(SHAPES[index], index as u64));
}

#[test]
fn attention_of_257_rows_of_mixed_depths_is_that_of_the_cpu() {
    let mut dice = Dice::new(257);
    let mut rows = chunks(&mut dice, 257, 40);
    rows.iter_mut().for_each(|chunk| chunk.rows = 1);
    let Some(case) = Case::new(SHAPES[0], rows, Kept::AtEachDepth(1), &mut dice) else { return };
    case.check();
}

#[test]
fn a_row_attends_alike_in_any_company() {
    [SHAPES[0], SHAPES[8], SHAPES[11]].into_iter().for_each(check_in_any_company);
}

fn check_in_any_company(shape: Shape) {
    let mut dice = Dice::new(3);
    let rows: Vec<Chunk> = [0, 1, 255, 256, 257, 600].map(|history| Chunk { history, rows: 1, depth: 0 }).to_vec();
    let Some(mut case) = Case::new(shape, rows, Kept::AtEachDepth(0), &mut dice) else { return };
    case.fills.fill(0..1);
    let (together, _) = case.on_device().unwrap();
    let width = shape.heads * shape.head_dim;
    let qkv_width = width + 2 * shape.kv_heads * shape.head_dim;
    let (chunks, blocks, skipped, qkv) =
        (case.chunks.clone(), case.blocks.clone(), case.skipped.clone(), case.qkv.clone());
    for row in 0..chunks.len() {
        case.chunks = vec![chunks[row]];
        (case.blocks, case.skipped) = (vec![blocks[row].clone()], vec![skipped[row].clone()]);
        case.fills.truncate(1);
        case.qkv = qkv[row * qkv_width..][..qkv_width].to_vec();
        let (alone, _) = case.on_device().unwrap();
        assert_eq!(alone, together[row * width..][..width], "row {row}");
    }
}

#[test]
fn fills_copy_entries_to_every_deeper_depth() {
    for shape in [SHAPES[0], SHAPES[6], SHAPES[7]] {
        let mut dice = Dice::new(9);
        let chunks = [0, 1, 2].map(|depth| Chunk { history: 20, rows: 1, depth }).to_vec();
        let Some(mut case) = Case::new(shape, chunks, Kept::AtEachDepth(0), &mut dice) else { return };
        let fill =
            |(chunk, blocks): (&Chunk, &Vec<u32>)| attention::Fill { block: blocks[0], offset: 5, depth: chunk.depth };
        let fills: Vec<attention::Fill> = case.chunks.iter().zip(&case.blocks).map(fill).collect();
        // Layer 1 has no entries: its contents must be copied unchanged.
        case.pages.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = 0.0);
        let pages = case.bench.store(&case.pages);
        let uploaded: Vec<Fill> = fills
            .iter()
            .map(|fill| Fill { block: fill.block as i32, offset: fill.offset as i32, depth: fill.depth as i32 })
            .collect();
        let uploaded = case.bench.put(&uploaded);
        let kernels = case.bench.kernels();
        kernels.fill_deeper(uploaded.view, case.geometry(), DEPTH_LAYERS, pages.view).unwrap();
        let found = case.bench.stored(&pages);
        fill_deeper(&case.cache, &fills).unwrap();
        let (cpu, layout) = (numbers(case.cache.pages()), case.cache.layout());
        for fill in &fills {
            for depth in fill.depth..DEPTHS {
                for head in 0..shape.kv_heads {
                    let [key, value] = case.places(depth, fill.block, fill.offset, head);
                    let page = layout.pages(case.kept, depth) + fill.block as usize * layout.page_numbers();
                    for i in 0..shape.head_dim {
                        assert_eq!(found[key + i], cpu[page + layout.key_tile(head, 5) + i * TILE + 5]);
                        assert_eq!(found[value + i], cpu[page + layout.value(head, 5) + i]);
                    }
                }
            }
        }
        let copies: usize = fills.iter().map(|fill| DEPTHS - 1 - fill.depth).sum();
        let changed = found.iter().zip(&case.pages).filter(|(a, b)| a != b).count();
        assert_eq!(changed, copies * 2 * shape.kv_heads * shape.head_dim, "nothing else changes");
    }
}
