//! One function per kernel, which checks sizes, computes the grid and launches.

use std::ffi::c_void;

use candle_core::{Result, bail};

use super::device::{Device, Out, Plain, Product, Stored, THREADS, View};
use super::pass::{Group, OnDevice, Row};
use super::source::Specialization;
use crate::config::{Activation, Norm};

/// Ranks per block of `lora_shrink`, as in `lora.cu`.
const RANKS_OF_BLOCK: usize = 4;
/// Logits per slice, as in `signals.cu`.
const SLICE: usize = 16 * THREADS;
/// Bytes of the result of one slice of a row of logits, as in `signals.cu`.
const SWEEP_BYTES: usize = 32;

/// Pointers to a kernel's arguments.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { &[$(std::ptr::from_ref(&$argument).cast()),*] };
}

/// Rejects memory that is too small for a kernel's accesses.
macro_rules! require {
    ($what:literal, $view:expr, $expected:expr) => {
        let (len, expected) = ($view.len, $expected);
        if len < expected {
            bail!("{}: {len} numbers where the kernel takes {expected}", $what);
        }
    };
}

/// Geometry of the attention of one layer, as in `attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Query heads.
    pub heads: i32,
    /// Key-value heads.
    pub kv_heads: i32,
    /// KV blocks of the cache.
    pub blocks: i32,
    /// The layer's pages at depth 0.
    pub first_layer: i32,
    /// Layers between one depth and the next.
    pub layer_stride: i32,
    /// Number of depths with their own pages, which deeper ones share in turn.
    pub depths: i32,
    /// 1 for a layer of the prelude, where every row writes one entry; 0 for others.
    pub once: i32,
    /// Number of sights: one for all depths, or one for each.
    pub sights: i32,
    /// Number of positions in the rotary tables.
    pub positions: i32,
    /// Number of leading dimensions that are rotated.
    pub rotary_dims: i32,
    /// Factor of attention scores.
    pub scale: f32,
}

/// Positions that a row attends to.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Sight {
    /// 1 if only the latest positions count, 0 if all do.
    pub windowed: i32,
    /// Index of the rotary table for queries and keys.
    pub rotary: i32,
}

/// An entry of the cache that deeper depths share.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    /// The block.
    pub block: i32,
    /// The position within it.
    pub offset: i32,
    /// The depth whose key and value are copied to every deeper one.
    pub depth: i32,
}

/// Formula of a norm, as in `norm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Formula {
    width: i32,
    sets: i32,
    centred: i32,
    eps: f32,
}

impl Formula {
    /// Norm of `width` numbers with `sets` sets of vectors: one for all depths, or one for each.
    pub fn new(kind: Norm, width: usize, sets: usize, eps: f32) -> Self {
        Self { width: width as i32, sets: sets as i32, centred: i32::from(kind == Norm::Layer), eps }
    }

    fn numbers(&self) -> usize {
        (self.width * if self.centred == 1 { 2 } else { 1 }) as usize
    }
}

/// One of several adapted projections of one input.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Index of the first rank that it reads.
    pub first_rank: i32,
    /// Number of ranks that it reads.
    pub ranks: i32,
    /// Index of its first output.
    pub first_output: i32,
    /// Number of its outputs.
    pub outputs: i32,
    /// Start of its matrix `[depths, ranks, outputs]` in the ups.
    pub at: i64,
}

/// Results of a row of logits, as in `signals.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Probability of the most likely token; NaN if a logit is not finite.
    pub top1: f32,
    /// `top1` less the probability of the second most likely token.
    pub margin: f32,
    /// Entropy of the distribution in nats.
    pub entropy: f32,
    /// Logarithm of the sum of the exponentials of the logits.
    pub log_sum_exp: f32,
    /// The sampled token.
    pub token: i32,
}

// SAFETY: `repr(C)` with only 4-byte numbers.
unsafe impl Plain for Sight {}
// SAFETY: as above.
unsafe impl Plain for Fill {}
// SAFETY: four numbers of 4 bytes before one of 8: no padding.
unsafe impl Plain for Part {}
// SAFETY: as for `Sight`.
unsafe impl Plain for Verdict {}

/// Bytes of scratch memory for [`Kernels::read_logits`].
pub fn sweep_bytes(rows: usize, vocab: usize) -> usize {
    rows * vocab.div_ceil(SLICE) * SWEEP_BYTES
}

/// The kernels of a model on a device.
pub struct Kernels<'d, D: Device> {
    /// The device,
    pub device: &'d D,
    /// the compiled kernels,
    pub module: &'d D::Module,
    /// and what they were compiled for.
    pub specialization: Specialization,
}

/// Memory that attention accesses, besides the rows.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInputs {
    /// `[rows, (heads + 2 kv_heads) * head_dim]`
    pub qkv: View<Stored>,
    /// [`rotary::tables`](crate::kernels::rotary::tables)
    pub rotary: View<f32>,
    /// The cache: `[layers, blocks]` pages, each `[keys or values, kv_heads, block_tokens, head_dim]`.
    pub pages: View<Stored>,
    /// Positions that rows attend to: one sight for all depths, or one for each.
    pub sights: View<Sight>,
    /// Geometry of the layer.
    pub geometry: Geometry,
}

/// LoRA by depth of projections of one input.
#[derive(Clone, Copy, Debug)]
pub struct LoraInputs {
    /// `[depths, ranks, inputs]`
    pub downs: View<Stored>,
    /// For each part `[depths, ranks, outputs]`, with the scale applied.
    pub ups: View<Stored>,
    /// The parts.
    pub parts: View<Part>,
    /// Outputs of the widest part.
    pub widest: usize,
    /// Number of depths with an adapter.
    pub depths: usize,
    /// Number of ranks of all parts.
    pub ranks: usize,
    /// Width of the input.
    pub inputs: usize,
    /// Width of the output.
    pub outputs: usize,
}

/// A weight `[outputs, inputs]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Numbers of the weight, row-major.
    pub numbers: View<Stored>,
    /// Number of rows.
    pub outputs: usize,
    /// Number of columns.
    pub inputs: usize,
}

/// Destination of a product.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Replaces stored numbers.
    Stored(View<Stored>),
    /// Replaces `f32` numbers.
    F32(View<f32>),
    /// Adds to `f32` numbers.
    AddedTo(View<f32>),
}

impl<D: Device> Kernels<'_, D> {
    /// The product of `rows` rows `x` with a weight.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn product(&self, x: View<Stored>, rows: usize, weight: Matrix, target: Target) -> Result<()> {
        let Matrix { numbers, outputs, inputs } = weight;
        let (y, len, out) = match target {
            Target::Stored(y) => (y.address, y.len, Out::Stored),
            Target::F32(y) => (y.address, y.len, Out::F32),
            Target::AddedTo(y) => (y.address, y.len, Out::AddedToF32),
        };
        require!("a product's input", x, rows * inputs);
        require!("a product's weight", numbers, outputs * inputs);
        require!("a product's output", View::<u8>::new(y, len), rows * outputs);
        let scalar = self.specialization.scalar;
        let (x, weight) = (x.address, numbers.address);
        // SAFETY: the sizes are checked.
        unsafe { self.device.product(&Product { scalar, rows, inputs, outputs, x, weight, y, out }) }
    }

    /// # Safety
    /// As for [`Device::launch`].
    unsafe fn launch(&self, kernel: &'static str, grid: [usize; 3], arguments: &[*const c_void]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.device.launch(self.module, kernel, grid, arguments) }
    }

    fn check_attention(&self, inputs: &AttentionInputs, rows: &OnDevice) -> Result<()> {
        let (g, head_dim) = (&inputs.geometry, self.specialization.head_dim);
        require!("qkv", inputs.qkv, rows.rows.len * (g.heads + 2 * g.kv_heads) as usize * head_dim);
        require!("sights", inputs.sights, g.sights as usize);
        require!("rotary tables", inputs.rotary, (g.positions * g.rotary_dims) as usize);
        Ok(())
    }

    /// Stores the rows' rotated keys and their values in the cache.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn store_kv(&self, inputs: &AttentionInputs, rows: &OnDevice) -> Result<()> {
        self.check_attention(inputs, rows)?;
        let AttentionInputs { qkv, rotary, pages, sights, geometry } = *inputs;
        let arguments = arguments![
            qkv.address,
            rotary.address,
            rows.rows.address,
            rows.block_table.address,
            sights.address,
            geometry,
            pages.address,
        ];
        // SAFETY: the kernel's arguments; sizes are checked, and the rows' blocks reach their positions.
        unsafe { self.launch("store_kv", [rows.rows.len, geometry.kv_heads as usize, 1], arguments) }
    }

    /// Numbers of scratch memory for [`attend`](Self::attend).
    pub fn partial_numbers(&self, rows: &OnDevice, heads: usize) -> usize {
        rows.items.len * heads * (2 + self.specialization.head_dim)
    }

    /// Attention of the rows' rotated queries over the cache: `out` `[rows, heads * head_dim]`.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn attend(
        &self,
        inputs: &AttentionInputs,
        rows: &OnDevice,
        partial: View<f32>,
        out: View<Stored>,
    ) -> Result<()> {
        self.attend_splits(inputs, rows, partial, out)?;
        self.attend_join(inputs, rows, partial, out)?;
        self.attend_tiles(inputs, rows, out)
    }

    fn check_decode(
        &self,
        inputs: &AttentionInputs,
        rows: &OnDevice,
        partial: View<f32>,
        out: View<Stored>,
    ) -> Result<()> {
        self.check_attention(inputs, rows)?;
        let heads = inputs.geometry.heads as usize;
        require!("attention's output", out, rows.rows.len * heads * self.specialization.head_dim);
        require!("attention's scratch", partial, self.partial_numbers(rows, heads));
        Ok(())
    }

    /// First step of [`attend`](Self::attend): each split of the decode rows' histories separately.
    ///
    /// # Errors
    /// As for [`attend`](Self::attend).
    pub fn attend_splits(
        &self,
        inputs: &AttentionInputs,
        rows: &OnDevice,
        partial: View<f32>,
        out: View<Stored>,
    ) -> Result<()> {
        self.check_decode(inputs, rows, partial, out)?;
        let AttentionInputs { qkv, rotary, pages, sights, geometry } = *inputs;
        let groups = geometry.heads as usize / self.specialization.group;
        let arguments = arguments![
            qkv.address,
            rotary.address,
            pages.address,
            rows.rows.address,
            rows.items.address,
            rows.block_table.address,
            sights.address,
            geometry,
            partial.address,
            out.address,
        ];
        // SAFETY: the kernel's arguments; sizes are checked, and the rows' blocks reach their positions.
        unsafe { self.launch("attend_splits", [rows.items.len, groups, 1], arguments) }
    }

    /// Second step of [`attend`](Self::attend): joins the splits.
    ///
    /// # Errors
    /// As for [`attend`](Self::attend).
    pub fn attend_join(
        &self,
        inputs: &AttentionInputs,
        rows: &OnDevice,
        partial: View<f32>,
        out: View<Stored>,
    ) -> Result<()> {
        self.check_decode(inputs, rows, partial, out)?;
        let AttentionInputs { sights, geometry, .. } = *inputs;
        let arguments =
            arguments![partial.address, rows.rows.address, rows.items.address, sights.address, geometry, out.address];
        // SAFETY: the kernel's arguments, with checked sizes.
        unsafe { self.launch("attend_join", [rows.items.len, geometry.heads as usize, 1], arguments) }
    }

    /// Third step of [`attend`](Self::attend): rows of prompt chunks.
    ///
    /// # Errors
    /// As for [`attend`](Self::attend).
    pub fn attend_tiles(&self, inputs: &AttentionInputs, rows: &OnDevice, out: View<Stored>) -> Result<()> {
        self.check_attention(inputs, rows)?;
        let AttentionInputs { qkv, rotary, pages, sights, geometry } = *inputs;
        let heads = geometry.heads as usize;
        require!("attention's output", out, rows.rows.len * heads * self.specialization.head_dim);
        let arguments = arguments![
            qkv.address,
            rotary.address,
            pages.address,
            rows.rows.address,
            rows.tiles.address,
            rows.block_table.address,
            sights.address,
            geometry,
            out.address,
        ];
        // SAFETY: the kernel's arguments; sizes are checked, and the rows' blocks reach their positions.
        unsafe { self.launch("attend_tiles", [rows.tiles.len, heads, 1], arguments) }
    }

    /// Copies keys and values of exited tokens to the depths they skipped, in `layers` layers from that of `geometry`
    /// on.
    ///
    /// # Errors
    /// If the device fails.
    pub fn fill_deeper(&self, fills: View<Fill>, geometry: Geometry, layers: usize, pages: View<Stored>) -> Result<()> {
        let arguments = arguments![fills.address, geometry, pages.address];
        // SAFETY: the kernel's arguments; fills lie in the cache.
        unsafe { self.launch("fill_deeper", [fills.len, layers, 1], arguments) }
    }

    /// Norms rows of the residual stream `x`: those in `picks`, or all. `out` has shape `[picks, width]`.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn norm_rows(
        &self,
        x: View<f32>,
        picks: Option<View<i32>>,
        rows: View<Row>,
        vectors: View<f32>,
        formula: Formula,
        out: View<Stored>,
    ) -> Result<()> {
        let (picks, count) = picks.map_or((0, rows.len), |picks| (picks.address, picks.len));
        require!("a norm's input", x, rows.len * formula.width as usize);
        require!("a norm's output", out, count * formula.width as usize);
        require!("a norm's vectors", vectors, formula.sets as usize * formula.numbers());
        let arguments = arguments![x.address, picks, rows.address, vectors.address, formula, out.address];
        // SAFETY: the kernel's arguments, with checked sizes.
        unsafe { self.launch("norm_rows", [count, 1, 1], arguments) }
    }

    /// Adds the normed rows of `x` `[rows, width]` to those of `residual`.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn add_normed(
        &self,
        x: View<Stored>,
        rows: View<Row>,
        vectors: View<f32>,
        formula: Formula,
        residual: View<f32>,
    ) -> Result<()> {
        require!("a norm's input", x, rows.len * formula.width as usize);
        require!("the residual stream", residual, rows.len * formula.width as usize);
        require!("a norm's vectors", vectors, formula.sets as usize * formula.numbers());
        let arguments = arguments![x.address, rows.address, vectors.address, formula, residual.address];
        // SAFETY: the kernel's arguments, with checked sizes.
        unsafe { self.launch("add_normed", [rows.len, 1, 1], arguments) }
    }

    /// Norms the rows of `x` `[rows, width]` at `first_depth` and below in place.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn norm_in_place(
        &self,
        x: View<f32>,
        rows: View<Row>,
        vectors: View<f32>,
        formula: Formula,
        first_depth: usize,
    ) -> Result<()> {
        require!("rows to norm", x, rows.len * formula.width as usize);
        require!("a norm's vectors", vectors, formula.sets as usize * formula.numbers());
        let first_depth = first_depth as i32;
        let arguments = arguments![x.address, rows.address, vectors.address, formula, first_depth];
        // SAFETY: the kernel's arguments, with checked sizes.
        unsafe { self.launch("norm_in_place", [rows.len, 1, 1], arguments) }
    }

    /// Norms each head of queries and keys of `qkv` in place. A set of `vectors` has those for queries, then those for
    /// keys.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn norm_heads(
        &self,
        qkv: View<Stored>,
        rows: View<Row>,
        vectors: View<f32>,
        formula: Formula,
        heads: usize,
        kv_heads: usize,
    ) -> Result<()> {
        require!("qkv", qkv, rows.len * (heads + 2 * kv_heads) * formula.width as usize);
        require!("a norm's vectors", vectors, formula.sets as usize * 2 * formula.numbers());
        let (heads, kv_heads) = (heads as i32, kv_heads as i32);
        let arguments = arguments![qkv.address, rows.address, vectors.address, formula, heads, kv_heads];
        // SAFETY: the kernel's arguments, with checked sizes.
        unsafe { self.launch("norm_heads", [rows.len, 1, 1], arguments) }
    }

    /// The residual stream `out` `[sources, width]` of rows that enter the block. Source `s >= 0` is token `s` of the
    /// embedding `[_, width]`, times `factor`; source `s < 0` is row `-1 - s` of those in flight `[_, width]`.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn enter_rows(
        &self,
        embedding: View<Stored>,
        in_flight: View<f32>,
        sources: View<i32>,
        width: usize,
        factor: f32,
        out: View<f32>,
    ) -> Result<()> {
        require!("the residual stream", out, sources.len * width);
        let width = width as i32;
        let arguments = arguments![embedding.address, in_flight.address, sources.address, width, factor, out.address];
        // SAFETY: the kernel's arguments; all source rows exist.
        unsafe { self.launch("enter_rows", [sources.len, 1, 1], arguments) }
    }

    /// Copies row `i` of `rows` to row `places[i]` of `target`, both `[_, width]`. Rows without a place (-1) are not
    /// copied.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn keep_rows(&self, rows: View<f32>, places: View<i32>, width: usize, target: View<f32>) -> Result<()> {
        require!("rows to keep", rows, places.len * width);
        let width = width as i32;
        let arguments = arguments![rows.address, places.address, width, target.address];
        // SAFETY: the kernel's arguments; all places exist.
        unsafe { self.launch("keep_rows", [places.len, 1, 1], arguments) }
    }

    /// Inputs of the adapter, `out` `[rows, 2 width]`: the state of each row, in flight or, for tokens, the initial state
    /// `[states, width]` of its position; then its residual stream after the prelude, `injected` `[rows, width]`.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn inject_rows(
        &self,
        (in_flight, sources): (View<f32>, View<i32>),
        rows: View<Row>,
        initial: View<f32>,
        injected: View<f32>,
        width: usize,
        out: View<Stored>,
    ) -> Result<()> {
        require!("rows of the pass", rows, sources.len);
        require!("an initial state", initial, width);
        require!("the residual streams after the prelude", injected, sources.len * width);
        require!("the adapter's input", out, sources.len * 2 * width);
        let (states, width) = ((initial.len / width) as i32, width as i32);
        let arguments = arguments![
            in_flight.address,
            sources.address,
            rows.address,
            initial.address,
            states,
            injected.address,
            width,
            out.address
        ];
        // SAFETY: the kernel's arguments; all rows in flight exist.
        unsafe { self.launch("inject_rows", [sources.len, 1, 1], arguments) }
    }

    /// Adds a bias to each row of `x` `[rows, width]`; `biases` has shape `[sets, width]`.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn add_bias(
        &self,
        x: View<Stored>,
        rows: View<Row>,
        biases: View<f32>,
        sets: usize,
        width: usize,
    ) -> Result<()> {
        require!("rows to add a bias to", x, rows.len * width);
        self.launch_add_bias("add_bias_to_rows", x.address, rows, biases, sets, width)
    }

    /// Adds a bias to each row of the residual stream, as [`add_bias`](Self::add_bias).
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn add_bias_to_residual(
        &self,
        x: View<f32>,
        rows: View<Row>,
        biases: View<f32>,
        sets: usize,
        width: usize,
    ) -> Result<()> {
        require!("rows to add a bias to", x, rows.len * width);
        self.launch_add_bias("add_bias_to_residual", x.address, rows, biases, sets, width)
    }

    fn launch_add_bias(
        &self,
        kernel: &'static str,
        x: u64,
        rows: View<Row>,
        biases: View<f32>,
        sets: usize,
        width: usize,
    ) -> Result<()> {
        require!("biases", biases, sets * width);
        let (sets, width) = (sets as i32, width as i32);
        let arguments = arguments![x, rows.address, biases.address, sets, width];
        // SAFETY: the kernel's arguments, with checked sizes.
        unsafe { self.launch(kernel, [rows.len, 1, 1], arguments) }
    }

    /// Activation of the MLP: `activation(gate) * up` of `x` `[rows, 2 inner]`, gates first, or without gates
    /// `activation(x)` of `[rows, inner]`.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn activate(
        &self,
        x: View<Stored>,
        rows: usize,
        inner: usize,
        gated: bool,
        activation: Activation,
        out: View<Stored>,
    ) -> Result<()> {
        require!("the activation's input", x, rows * inner * if gated { 2 } else { 1 });
        require!("the activation's output", out, rows * inner);
        let parts = inner.div_ceil(THREADS * self.specialization.scalar.pack());
        let activation = match activation {
            Activation::Silu => 0_i32,
            Activation::Gelu => 1,
            Activation::GeluTanh => 2,
        };
        let (inner, gated) = (inner as i32, i32::from(gated));
        let arguments = arguments![x.address, inner, gated, activation, out.address];
        // SAFETY: the kernel's arguments, with checked sizes.
        unsafe { self.launch("activate", [rows, parts, 1], arguments) }
    }

    /// Compares row `froms[i]` of `before` and row `tos[i]` of `after`, both `[_, width]`: two numbers each, as
    /// [`compare`](crate::kernels::rows::compare).
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn compare(
        &self,
        (before, froms): (View<f32>, View<i32>),
        (after, tos): (View<f32>, View<i32>),
        width: usize,
        out: View<f32>,
    ) -> Result<()> {
        require!("rows to compare with", froms, tos.len);
        require!("comparisons", out, 2 * tos.len);
        let width = width as i32;
        let arguments = arguments![before.address, after.address, froms.address, tos.address, width, out.address];
        // SAFETY: the kernel's arguments; the rows exist.
        unsafe { self.launch("compare", [tos.len, 1, 1], arguments) }
    }

    /// Divergences of distributions: of row `froms[i]` of logits `before`, or if that is negative of the uniform one, from
    /// row `tos[i]` of `after`, both `[_, vocab]`. `out` has shape `[pairs]`.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn diverge(
        &self,
        (before, froms): (View<f32>, View<i32>),
        (after, tos): (View<f32>, View<i32>),
        vocab: usize,
        out: View<f32>,
    ) -> Result<()> {
        require!("rows to diverge from", froms, tos.len);
        require!("divergences", out, tos.len);
        let vocab = vocab as i32;
        let arguments = arguments![before.address, after.address, froms.address, tos.address, vocab, out.address];
        // SAFETY: the kernel's arguments; the rows exist.
        unsafe { self.launch("diverge", [tos.len, 1, 1], arguments) }
    }

    /// Scores of the learned gates of normed rows `x` `[picks, width]`; row `i` is row `picks[i]` of the pass. `probes`
    /// has shape `[depths, width + 1]`, biases last.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn gates(
        &self,
        x: View<Stored>,
        picks: View<i32>,
        rows: View<Row>,
        probes: View<f32>,
        width: usize,
        out: View<f32>,
    ) -> Result<()> {
        require!("rows for the gate", x, picks.len * width);
        require!("gate scores", out, picks.len);
        let width = width as i32;
        let arguments = arguments![x.address, picks.address, rows.address, probes.address, width, out.address];
        // SAFETY: the kernel's arguments; the rows are at depths with a probe.
        unsafe { self.launch("gates", [picks.len, 1, 1], arguments) }
    }

    /// First product of LoRA: `shrunk` `[rows, ranks]` from `x` `[rows, inputs]`.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn lora_shrink(
        &self,
        lora: &LoraInputs,
        x: View<Stored>,
        rows: usize,
        groups: View<Group>,
        shrunk: View<f32>,
    ) -> Result<()> {
        require!("LoRA's input", x, rows * lora.inputs);
        require!("LoRA's scratch", shrunk, rows * lora.ranks);
        require!("LoRA's downs", lora.downs, lora.depths * lora.ranks * lora.inputs);
        let grid = [groups.len, lora.ranks.div_ceil(RANKS_OF_BLOCK), 1];
        let (depths, ranks, inputs) = (lora.depths as i32, lora.ranks as i32, lora.inputs as i32);
        let arguments =
            arguments![x.address, lora.downs.address, groups.address, depths, ranks, inputs, shrunk.address];
        // SAFETY: the kernel's arguments, with checked sizes.
        unsafe { self.launch("lora_shrink", grid, arguments) }
    }

    /// Second product of LoRA, added to `y` `[rows, outputs]`.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn lora_expand(
        &self,
        lora: &LoraInputs,
        shrunk: View<f32>,
        rows: usize,
        groups: View<Group>,
        y: View<Stored>,
    ) -> Result<()> {
        require!("LoRA's output", y, rows * lora.outputs);
        self.launch_expand("lora_expand", lora, shrunk, rows, groups, y.address)
    }

    /// Second product of LoRA, added to `f32` numbers: the residual stream, or logits.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn lora_expand_f32(
        &self,
        lora: &LoraInputs,
        shrunk: View<f32>,
        rows: usize,
        groups: View<Group>,
        y: View<f32>,
    ) -> Result<()> {
        require!("LoRA's output", y, rows * lora.outputs);
        self.launch_expand("lora_expand_f32", lora, shrunk, rows, groups, y.address)
    }

    fn launch_expand(
        &self,
        kernel: &'static str,
        lora: &LoraInputs,
        shrunk: View<f32>,
        rows: usize,
        groups: View<Group>,
        y: u64,
    ) -> Result<()> {
        require!("LoRA's scratch", shrunk, rows * lora.ranks);
        let grid = [groups.len, lora.parts.len, lora.widest.div_ceil(THREADS)];
        let (depths, ranks, outputs) = (lora.depths as i32, lora.ranks as i32, lora.outputs as i32);
        let arguments = arguments![
            shrunk.address,
            lora.ups.address,
            groups.address,
            lora.parts.address,
            depths,
            ranks,
            outputs,
            y,
        ];
        // SAFETY: the kernel's arguments; the parts are within ups and output.
        unsafe { self.launch(kernel, grid, arguments) }
    }

    /// Reads rows of logits `[keys, vocab]` and samples a token from each, as
    /// [`signals::read`](crate::kernels::signals::read). `scratch` is in bytes.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn read_logits(
        &self,
        logits: View<f32>,
        keys: View<u64>,
        vocab: usize,
        temperature: f32,
        scratch: View<u8>,
        out: View<Verdict>,
    ) -> Result<()> {
        require!("logits", logits, keys.len * vocab);
        require!("verdicts", out, keys.len);
        require!("the sweep's scratch", scratch, sweep_bytes(keys.len, vocab));
        let slices = vocab.div_ceil(SLICE);
        let vocab = vocab as i32;
        let sweep = arguments![logits.address, keys.address, vocab, temperature, scratch.address];
        // SAFETY: the kernel's arguments, with checked sizes.
        unsafe { self.launch("sweep_logits", [keys.len, slices, 1], sweep)? };
        let slices = slices as i32;
        let judge = arguments![scratch.address, slices, out.address];
        // SAFETY: as above.
        unsafe { self.launch("judge_rows", [keys.len, 1, 1], judge) }
    }
}
