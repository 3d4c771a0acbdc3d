//! One function per kernel, which checks sizes, computes the grid and launches.

use std::ffi::c_void;

use candle_core::{Result, bail};

use super::device::{Device, Out, Plain, Product, Stored, THREADS, View};
use super::pass::{Group, OnDevice, Row};
use super::source::{Scalar, Specialization};
use crate::config::{Activation, Norm};

/// Outputs per slice of adapted projections, as in `lora.cu`.
const OUTPUTS_OF_SLICE: usize = 64;
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

/// Adjacent outputs of a projection with their ranks, as in `lora.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    first_output: i32,
    outputs: i32,
    first_rank: i32,
    ranks: i32,
    at: i64,
    depth_stride: i64,
}

/// Sizes of adapters, as in `lora.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Ranks {
    depths: i32,
    ranks: i32,
    stride: i32,
    outputs: i32,
}

/// A projection among several of one input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Rank of its adapters; 0 without any.
    pub rank: usize,
    /// Number of its outputs.
    pub outputs: usize,
}

impl Part {
    /// Numbers from one output to the next in the ups: the rank, rounded up to whole 16-byte loads.
    pub fn padded_rank(&self, scalar: Scalar) -> usize {
        self.rank.next_multiple_of(scalar.pack())
    }

    /// The slices of projections of one input, and how many numbers their ups have at all depths.
    pub fn slices(parts: &[Self], depths: usize, scalar: Scalar) -> (Vec<Slice>, usize) {
        let (mut slices, mut first_output, mut first_rank, mut start) = (Vec::new(), 0, 0, 0);
        for part in parts {
            let (padded, &Self { rank, outputs }) = (part.padded_rank(scalar), part);
            slices.extend((0..outputs).step_by(OUTPUTS_OF_SLICE).map(|first| Slice {
                first_output: (first_output + first) as i32,
                outputs: (outputs - first).min(OUTPUTS_OF_SLICE) as i32,
                first_rank: first_rank as i32,
                ranks: rank as i32,
                at: (start + first * padded) as i64,
                depth_stride: (outputs * padded) as i64,
            }));
            first_output += outputs;
            first_rank += rank;
            start += depths * outputs * padded;
        }
        (slices, start)
    }
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
// SAFETY: four numbers of 4 bytes before two of 8: no padding.
unsafe impl Plain for Slice {}
// SAFETY: as for `Sight`.
unsafe impl Plain for Verdict {}

/// Bytes of scratch memory for [`Kernels::read_logits`].
pub fn sweep_bytes(rows: usize, vocab: usize) -> usize {
    rows * vocab.div_ceil(SLICE) * SWEEP_BYTES
}

/// An activation, as in `rows.cu`.
fn activation_number(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
    }
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

/// Second matrices of the LoRA by depth of projections of one input.
#[derive(Clone, Copy, Debug)]
pub struct LoraInputs {
    /// For each part `[depths, outputs, padded rank]`, with the scale applied and zeros beyond the rank.
    pub ups: View<Stored>,
    /// [`Part::slices`]
    pub slices: View<Slice>,
    /// Number of depths with an adapter.
    pub depths: usize,
    /// Number of ranks of all parts.
    pub ranks: usize,
    /// Number of outputs of all parts.
    pub outputs: usize,
    /// Numbers per row of the product that has the ranks of all depths.
    pub stride: usize,
}

impl LoraInputs {
    /// Numbers per row of the product of an input with a weight of `outputs` outputs and, below it, the downs
    /// `[depths, ranks, inputs]`: `[outputs, ranks of depth 0, ranks of depth 1, ..]`, rounded up to whole 16-byte loads.
    pub fn stride(outputs: usize, depths: usize, ranks: usize, scalar: Scalar) -> usize {
        (outputs + depths * ranks).next_multiple_of(scalar.pack())
    }

    fn sizes(&self) -> Ranks {
        let [depths, ranks, stride, outputs] =
            [self.depths, self.ranks, self.stride, self.outputs].map(|size| size as i32);
        Ranks { depths, ranks, stride, outputs }
    }
}

/// Biases that are added with adapters.
#[derive(Clone, Copy, Debug)]
pub struct Biases {
    /// `[sets, outputs]`
    pub numbers: View<f32>,
    /// Number of sets: one for all depths, or one for each.
    pub sets: usize,
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
        Ok(())
    }

    /// Rotates the rows' queries in `qkv` in place, and stores their rotated keys and their values in the cache.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn rotate_and_store(&self, inputs: &AttentionInputs, rows: &OnDevice) -> Result<()> {
        self.check_attention(inputs, rows)?;
        let AttentionInputs { qkv, rotary, pages, sights, geometry } = *inputs;
        require!("rotary tables", rotary, (geometry.positions * geometry.rotary_dims) as usize);
        let arguments = arguments![
            qkv.address,
            rotary.address,
            rows.rows.address,
            rows.block_table.address,
            sights.address,
            geometry,
            pages.address,
        ];
        let heads = (geometry.heads + geometry.kv_heads) as usize;
        // SAFETY: the kernel's arguments; sizes are checked, and the rows' blocks reach their positions.
        unsafe { self.launch("rotate_and_store", [rows.rows.len, heads, 1], arguments) }
    }

    /// Numbers of scratch memory for [`attend`](Self::attend).
    pub fn partial_numbers(&self, rows: &OnDevice, heads: usize) -> usize {
        rows.items.len * heads * (2 + self.specialization.head_dim)
    }

    /// Attention over the cache of the rows' queries, which [`rotate_and_store`](Self::rotate_and_store) has rotated:
    /// `out` `[rows, heads * head_dim]`.
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
        let AttentionInputs { qkv, pages, sights, geometry, .. } = *inputs;
        let groups = geometry.heads as usize / self.specialization.group;
        let arguments = arguments![
            qkv.address,
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

    /// Second step of [`attend`](Self::attend): joins the splits of rows that have several.
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
            arguments![partial.address, rows.joins.address, rows.rows.address, sights.address, geometry, out.address];
        // SAFETY: the kernel's arguments, with checked sizes.
        unsafe { self.launch("attend_join", [rows.joins.len, geometry.heads as usize, 1], arguments) }
    }

    /// Third step of [`attend`](Self::attend): rows of prompt chunks.
    ///
    /// # Errors
    /// As for [`attend`](Self::attend).
    pub fn attend_tiles(&self, inputs: &AttentionInputs, rows: &OnDevice, out: View<Stored>) -> Result<()> {
        self.check_attention(inputs, rows)?;
        let AttentionInputs { qkv, pages, sights, geometry, .. } = *inputs;
        let heads = geometry.heads as usize;
        require!("attention's output", out, rows.rows.len * heads * self.specialization.head_dim);
        let arguments = arguments![
            qkv.address,
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
        let (inner, gated, activation) = (inner as i32, i32::from(gated), activation_number(activation));
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

    /// Adds the second product of LoRA, and biases, to a product: `y` `[rows, outputs]` of `base` `[rows, stride]`, which
    /// has the outputs without adapters and then the ranks of each depth.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn lora_expand(
        &self,
        lora: &LoraInputs,
        base: View<Stored>,
        (rows, groups): (usize, View<Group>),
        biases: Option<Biases>,
        y: View<Stored>,
    ) -> Result<()> {
        require!("LoRA's input", base, rows * lora.stride);
        require!("LoRA's output", y, rows * lora.outputs);
        let (sizes, (biases, sets)) = (lora.sizes(), self.check_biases(lora, biases)?);
        let LoraInputs { ups, slices, .. } = lora;
        let arguments =
            arguments![base.address, ups.address, groups.address, slices.address, sizes, biases, sets, y.address];
        // SAFETY: the kernel's arguments; the slices are within ups and output.
        unsafe { self.launch("lora_expand", [groups.len, slices.len, 1], arguments) }
    }

    /// Adds the second product of LoRA to `f32` numbers `y` `[rows, outputs]`. They are the residual stream, to which
    /// `base` `[rows, stride]` and biases are also added; or they are logits, without a base, and `product`
    /// `[rows, stride]` has only the ranks of each depth.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn lora_add(
        &self,
        lora: &LoraInputs,
        product: View<f32>,
        has_base: bool,
        (rows, groups): (usize, View<Group>),
        biases: Option<Biases>,
        y: View<f32>,
    ) -> Result<()> {
        require!("LoRA's input", product, rows * lora.stride);
        require!("LoRA's output", y, rows * lora.outputs);
        let (sizes, (biases, sets)) = (lora.sizes(), self.check_biases(lora, biases)?);
        let LoraInputs { ups, slices, .. } = lora;
        let (base, shrunk) = match has_base {
            true => (product.address, product.address + (lora.outputs * size_of::<f32>()) as u64),
            false => (0, product.address),
        };
        let arguments =
            arguments![base, shrunk, ups.address, groups.address, slices.address, sizes, biases, sets, y.address];
        // SAFETY: the kernel's arguments; the slices are within ups and output.
        unsafe { self.launch("lora_add", [groups.len, slices.len, 1], arguments) }
    }

    /// The activations of a gated MLP with adapters: [`lora_expand`](Self::lora_expand), then
    /// [`activate`](Self::activate), in one kernel: `out` `[rows, outputs / 2]`.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn lora_activate(
        &self,
        lora: &LoraInputs,
        base: View<Stored>,
        (rows, groups): (usize, View<Group>),
        biases: Option<Biases>,
        activation: Activation,
        out: View<Stored>,
    ) -> Result<()> {
        require!("LoRA's input", base, rows * lora.stride);
        require!("the activation's output", out, rows * lora.outputs / 2);
        let (sizes, (biases, sets)) = (lora.sizes(), self.check_biases(lora, biases)?);
        let (LoraInputs { ups, slices, .. }, activation) = (lora, activation_number(activation));
        let arguments = arguments![
            base.address,
            ups.address,
            groups.address,
            slices.address,
            sizes,
            biases,
            sets,
            activation,
            out.address
        ];
        // SAFETY: the kernel's arguments; gates and ups have equal slices, within ups and output.
        unsafe { self.launch("lora_activate", [groups.len, slices.len / 2, 1], arguments) }
    }

    /// Address of biases, 0 for none, and their number of sets.
    fn check_biases(&self, lora: &LoraInputs, biases: Option<Biases>) -> Result<(u64, i32)> {
        let Some(Biases { numbers, sets }) = biases else { return Ok((0, 1)) };
        require!("biases", numbers, sets * lora.outputs);
        Ok((numbers.address, sets as i32))
    }

    /// Reads rows of logits `[keys, vocab]` and samples a token from each, as
    /// [`signals::read`](crate::kernels::signals::read). `temperature` is one number, `scratch` in bytes.
    ///
    /// # Errors
    /// If a size is wrong, or the device fails.
    pub fn read_logits(
        &self,
        logits: View<f32>,
        keys: View<u64>,
        vocab: usize,
        temperature: View<f32>,
        scratch: View<u8>,
        out: View<Verdict>,
    ) -> Result<()> {
        require!("logits", logits, keys.len * vocab);
        require!("verdicts", out, keys.len);
        require!("a temperature", temperature, 1);
        require!("the sweep's scratch", scratch, sweep_bytes(keys.len, vocab));
        let slices = vocab.div_ceil(SLICE);
        let vocab = vocab as i32;
        let sweep = arguments![logits.address, keys.address, vocab, temperature.address, scratch.address];
        // SAFETY: the kernel's arguments, with checked sizes.
        unsafe { self.launch("sweep_logits", [keys.len, slices, 1], sweep)? };
        let slices = slices as i32;
        let judge = arguments![scratch.address, slices, out.address];
        // SAFETY: as above.
        unsafe { self.launch("judge_rows", [keys.len, 1, 1], judge) }
    }
}
