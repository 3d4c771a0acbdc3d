//! Products of rows with a weight.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, DType, Device, InplaceOp3, Layout, Result, Shape, Tensor, bail};
use half::bf16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::quantized::{self, Format};
use super::simd::{LANES, Lanes, has_avx512, multiversion};
use super::{Shared, slice, slice_mut};

/// Outputs per panel of a packed weight.
pub(super) const PANEL: usize = 2 * LANES;
/// Rows per tile of a product, so that its sums fit in registers: for a whole panel those of AVX-512, for half a panel
/// the fewer and narrower ones of other CPUs.
const WIDE_ROWS: usize = 8;
const NARROW_ROWS: usize = 6;
/// Multiplications below which a second thread does not pay.
pub(super) const PARALLEL_WORK: usize = 1 << 18;

/// Number type of a weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightType {
    /// 32-bit floats, as trained.
    #[default]
    F32,
    /// IEEE half precision, on GPUs only; sums are in 32 bits.
    F16,
    /// Brain floats: the upper halves of 32-bit floats, rounded; products are in 32 bits.
    Bf16,
    /// GGUF's Q8_0: 8.5 bits per number; products are in integers.
    #[serde(rename = "q8_0")]
    Q8,
    /// GGUF's Q4_K: 4.6 bits per number as packed here; products are in integers.
    #[serde(rename = "q4k")]
    Q4K,
}

impl WeightType {
    /// All number types.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::Q8, Self::Q4K];
    /// Number types that the CPU supports.
    pub const ON_CPU: [Self; 4] = [Self::F32, Self::Bf16, Self::Q8, Self::Q4K];

    /// Bits per number, scales included.
    pub fn bits(self) -> f64 {
        match self {
            Self::F32 => 32.0,
            Self::F16 | Self::Bf16 => 16.0,
            Self::Q8 => Format::Q8.bits(),
            Self::Q4K => Format::Q4K.bits(),
        }
    }

    /// Name in files and arguments.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8_0",
            Self::Q4K => "q4k",
        }
    }
}

impl std::fmt::Display for WeightType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for WeightType {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let known = Self::ALL.into_iter().find(|weight_type| weight_type.name() == text);
        known.ok_or_else(|| format!("{text:?} is not a weight type, expected one of {}", names(&Self::ALL)))
    }
}

/// A list of the names, for messages.
pub fn names(types: &[WeightType]) -> String {
    types.iter().map(|weight_type| weight_type.name()).collect::<Vec<_>>().join(", ")
}

/// A weight, packed once so that products read memory in order.
///
/// Packed floats are `[panels, inputs, 32]`: panel `p` has the outputs from `32 p` on, input by input, with zeros
/// beyond the last. [`quantized::pack`] packs integers.
#[derive(Clone, Debug)]
pub struct Linear {
    packed: Tensor,
    shape: LinearShape,
}

/// Shape of a packed weight.
#[derive(Clone, Copy, Debug)]
struct LinearShape {
    weight_type: WeightType,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    /// Rounds a weight `[outputs, inputs]` of `f32` to a number type and packs it.
    ///
    /// # Errors
    /// If the weight is not an `f32` matrix, or the CPU does not support the type.
    pub fn new(weight: &Tensor, weight_type: WeightType) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        let floats = || {
            let mut packed = Vec::new();
            pack(&weight.flatten_all()?.to_vec1::<f32>()?, outputs, inputs, &mut packed);
            Tensor::new(packed, &Device::Cpu)
        };
        let packed = match weight_type {
            WeightType::F32 => floats()?,
            WeightType::F16 => {
                bail!("weights of f16 on the CPU, which multiplies with {}", names(&WeightType::ON_CPU))
            }
            WeightType::Bf16 => floats()?.to_dtype(DType::BF16)?,
            WeightType::Q8 => quantized::pack(weight, Format::Q8)?,
            WeightType::Q4K => quantized::pack(weight, Format::Q4K)?,
        };
        Ok(Self { packed, shape: LinearShape { weight_type, inputs, outputs } })
    }

    /// Packs weights `[outputs, inputs]` with equal inputs as one weight, with the outputs of the first one first.
    ///
    /// # Errors
    /// If inputs differ.
    pub fn stacked(weights: &[&Tensor], weight_type: WeightType) -> Result<Self> {
        Self::new(&Tensor::cat(weights, 0)?, weight_type)
    }

    /// The product of rows with the weight: `[rows, inputs]` to `[rows, outputs]`.
    ///
    /// # Errors
    /// If `x` has another shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op2_no_bwd(&self.packed, &Product(self.shape))
    }

    /// Adds the product of `x` `[rows, inputs]` to `y` `[rows, outputs]`.
    ///
    /// # Errors
    /// If a shape differs.
    pub fn add_to(&self, y: &Tensor, x: &Tensor) -> Result<()> {
        y.inplace_op3(x, &self.packed, &AddProduct(self.shape))
    }
}

/// Appends the packed form of a weight `[outputs, inputs]`.
pub(super) fn pack(weight: &[f32], outputs: usize, inputs: usize, packed: &mut Vec<f32>) {
    let start = packed.len();
    packed.resize(start + outputs.div_ceil(PANEL) * inputs * PANEL, 0.0);
    for output in 0..outputs {
        let panel = &mut packed[start + output / PANEL * inputs * PANEL..][..inputs * PANEL];
        for input in 0..inputs {
            panel[input * PANEL + output % PANEL] = weight[output * inputs + input];
        }
    }
}

struct Product(LinearShape);

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = rows_of(x_l, self.0.inputs)?;
        let mut y = vec![0.0; rows * self.0.outputs];
        add_product(slice(x, x_l)?, w, w_l, self.0, Shared::new(&mut y))?;
        Ok((CpuStorage::F32(y), (rows, self.0.outputs).into()))
    }
}

struct AddProduct(LinearShape);

impl InplaceOp3 for AddProduct {
    fn name(&self) -> &'static str {
        "add-product"
    }

    fn cpu_fwd(
        &self,
        y: &mut CpuStorage,
        y_l: &Layout,
        x: &CpuStorage,
        x_l: &Layout,
        w: &CpuStorage,
        w_l: &Layout,
    ) -> Result<()> {
        if rows_of(x_l, self.0.inputs)? != rows_of(y_l, self.0.outputs)? {
            bail!("{:?} cannot be added to {:?}: other rows", x_l.shape(), y_l.shape());
        }
        add_product(slice(x, x_l)?, w, w_l, self.0, Shared::new(slice_mut(y, y_l)?))
    }
}

/// Number of rows of a matrix that must have `width` columns.
pub(super) fn rows_of(layout: &Layout, width: usize) -> Result<usize> {
    match layout.dims() {
        &[rows, found] if found == width => Ok(rows),
        found => bail!("a kernel got a tensor of shape {found:?}, expected [rows, {width}]"),
    }
}

/// Adds the product of `x` with a packed weight to `y`.
fn add_product(x: &[f32], w: &CpuStorage, w_l: &Layout, shape: LinearShape, y: Shared<'_>) -> Result<()> {
    let Some((start, end)) = w_l.contiguous_offsets() else {
        bail!("a packed weight of layout {w_l:?}, expected a contiguous one");
    };
    let LinearShape { weight_type, inputs, outputs } = shape;
    match weight_type {
        WeightType::F16 => bail!("a packed weight of f16"),
        WeightType::F32 => multiply(x, &w.as_slice::<f32>()?[start..end], shape, y, panel_product),
        WeightType::Bf16 => multiply(x, &w.as_slice::<bf16>()?[start..end], shape, y, panel_product_bf16),
        WeightType::Q8 => quantized::multiply(x, &w.as_slice::<u8>()?[start..end], Format::Q8, inputs, y, outputs),
        WeightType::Q4K => quantized::multiply(x, &w.as_slice::<u8>()?[start..end], Format::Q4K, inputs, y, outputs),
    }
    Ok(())
}

/// Adds the product of all rows with one panel to its place.
type PanelProduct<W> = fn(&Columns<'_>, &[W], Place<'_>);

/// Adds the product of `x` with packed floats to `y`; panels are distributed over threads.
fn multiply<W: Sync>(x: &[f32], packed: &[W], shape: LinearShape, y: Shared<'_>, panel_product: PanelProduct<W>) {
    let LinearShape { inputs, outputs, .. } = shape;
    let columns = Columns { x, stride: inputs, range: 0..inputs };
    let panel =
        |(index, panel): (usize, &[W])| panel_product(&columns, panel, Place::panel(y, 0, index, outputs, 0..outputs));
    if columns.rows() * inputs * outputs < PARALLEL_WORK {
        packed.chunks_exact(inputs * PANEL).enumerate().for_each(panel);
    } else {
        packed.par_chunks_exact(inputs * PANEL).enumerate().for_each(panel);
    }
}

/// A range of columns of rows.
pub(super) struct Columns<'a> {
    pub x: &'a [f32],
    pub stride: usize,
    pub range: Range<usize>,
}

impl<'a> Columns<'a> {
    pub fn rows(&self) -> usize {
        self.x.len() / self.stride
    }

    #[inline(always)]
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.x[row * self.stride + self.range.start..][..self.range.len()]
    }
}

/// Adds the product with a panel of `f32` to its place.
pub(super) fn panel_product(x: &Columns<'_>, panel: &[f32], place: Place<'_>) {
    if has_avx512() { wide_tiles(x, panel, place) } else { narrow_tiles(x, panel, place) }
}

/// Adds the product with a panel of `bf16` to its place.
fn panel_product_bf16(x: &Columns<'_>, panel: &[bf16], place: Place<'_>) {
    if has_avx512() { wide_tiles_bf16(x, panel, place) } else { narrow_tiles_bf16(x, panel, place) }
}

multiversion! {
    fn wide_tiles(x: &Columns<'_>, panel: &[f32], place: Place<'_>) {
        tile_products::<WIDE_ROWS, 2, _>(x, panel, place);
    }

    fn wide_tiles_bf16(x: &Columns<'_>, panel: &[bf16], place: Place<'_>) {
        tile_products::<WIDE_ROWS, 2, _>(x, panel, place);
    }

    fn narrow_tiles(x: &Columns<'_>, panel: &[f32], place: Place<'_>) {
        tile_products::<NARROW_ROWS, 1, _>(x, panel, place);
    }

    fn narrow_tiles_bf16(x: &Columns<'_>, panel: &[bf16], place: Place<'_>) {
        tile_products::<NARROW_ROWS, 1, _>(x, panel, place);
    }
}

/// A float of a panel.
trait Weight: Copy {
    fn load(weights: &[Self]) -> Lanes;
}

impl Weight for f32 {
    #[inline(always)]
    fn load(weights: &[Self]) -> Lanes {
        Lanes::load(weights)
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn load(weights: &[Self]) -> Lanes {
        let mut lanes = Lanes::ZERO;
        for (lane, weight) in lanes.0.iter_mut().zip(&weights[..LANES]) {
            *lane = f32::from_bits(u32::from(weight.to_bits()) << 16);
        }
        lanes
    }
}

/// Products in tiles of up to `MOST` rows and `COLUMNS` times [`LANES`] outputs.
#[inline(always)]
fn tile_products<const MOST: usize, const COLUMNS: usize, W: Weight>(x: &Columns<'_>, panel: &[W], place: Place<'_>) {
    for column in (0..place.width).step_by(COLUMNS * LANES) {
        // Tiles of nearly equal sizes: a tile of few rows is bound by the latency of its sums.
        let tiles = x.rows().div_ceil(MOST);
        for tile in 0..tiles {
            let first = tile * x.rows() / tiles;
            match (tile + 1) * x.rows() / tiles - first {
                1 => tile_product::<1, COLUMNS, W>(x, first, panel, column, place),
                2 => tile_product::<2, COLUMNS, W>(x, first, panel, column, place),
                3 => tile_product::<3, COLUMNS, W>(x, first, panel, column, place),
                4 => tile_product::<4, COLUMNS, W>(x, first, panel, column, place),
                5 => tile_product::<5, COLUMNS, W>(x, first, panel, column, place),
                6 => tile_product::<6, COLUMNS, W>(x, first, panel, column, place),
                7 => tile_product::<7, COLUMNS, W>(x, first, panel, column, place),
                _ => tile_product::<WIDE_ROWS, COLUMNS, W>(x, first, panel, column, place),
            }
        }
    }
}

/// Destination of outputs: `width` numbers of each row, those of row 0 from `start` on.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub y: Shared<'a>,
    pub start: usize,
    pub stride: usize,
    pub width: usize,
}

impl<'a> Place<'a> {
    /// Destination of panel `index` of a matrix, in columns `outputs` of rows with `stride` numbers, from a row on.
    pub fn panel(y: Shared<'a>, first_row: usize, index: usize, stride: usize, outputs: Range<usize>) -> Self {
        let first = outputs.start + index * PANEL;
        Self { y, start: first_row * stride + first, stride, width: PANEL.min(outputs.end - first) }
    }
}

/// The product of `ROWS` rows from `first` on with `COLUMNS` times [`LANES`] outputs of a panel from `column` on. Each
/// output is one chain of fused multiply-adds in the order of the inputs, for any tile.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "sums that iterators walk over leave their registers")]
fn tile_product<const ROWS: usize, const COLUMNS: usize, W: Weight>(
    x: &Columns<'_>,
    first: usize,
    panel: &[W],
    column: usize,
    place: Place<'_>,
) {
    let inputs = panel.len() / PANEL;
    let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &x.row(first + row)[..inputs]);
    let mut sums = [[Lanes::ZERO; COLUMNS]; ROWS];
    for (input, weights) in panel.chunks_exact(PANEL).enumerate() {
        let weights: [Lanes; COLUMNS] = std::array::from_fn(|lanes| W::load(&weights[column + lanes * LANES..]));
        for row in 0..ROWS {
            // SAFETY: every row has one number for each chunk of the panel. Bounds checks would be half the
            // instructions.
            let a = unsafe { *rows[row].get_unchecked(input) };
            for lanes in 0..COLUMNS {
                sums[row][lanes] = sums[row][lanes].add_scaled(a, weights[lanes]);
            }
        }
    }
    let width = (COLUMNS * LANES).min(place.width - column);
    for row in 0..ROWS {
        // Copied: sums that are indexed at run time would not stay in registers above.
        let mut products = [[0.0; LANES]; COLUMNS];
        for lanes in 0..COLUMNS {
            products[lanes] = sums[row][lanes].0;
        }
        // SAFETY: a thread writes only the columns of its own panels, one tile after the other.
        let y = unsafe { place.y.get(place.start + (first + row) * place.stride + column, width) };
        for (y, product) in y.iter_mut().zip(products.as_flattened()) {
            *y += product;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_any_width_give_the_same_bits() {
        let numbers = |count: usize, seed: f32| -> Vec<f32> { (0..count).map(|i| (i as f32 * seed).sin()).collect() };
        for rows in 1..=17 {
            for (inputs, outputs) in [(1, 1), (40, 16), (33, 17), (64, 95)] {
                let x = numbers(rows * inputs, 0.7);
                let mut packed = Vec::new();
                pack(&numbers(outputs * inputs, 0.3), outputs, inputs, &mut packed);
                let bf16s: Vec<bf16> = packed.iter().copied().map(bf16::from_f32).collect();
                let shape = LinearShape { weight_type: WeightType::F32, inputs, outputs };
                let by = |tiles: PanelProduct<f32>| {
                    let mut y = vec![0.0; rows * outputs];
                    multiply(&x, &packed, shape, Shared::new(&mut y), tiles);
                    y
                };
                assert_eq!(by(wide_tiles), by(narrow_tiles), "{rows} rows, {inputs} to {outputs}");
                let by = |tiles: PanelProduct<bf16>| {
                    let mut y = vec![0.0; rows * outputs];
                    multiply(&x, &bf16s, shape, Shared::new(&mut y), tiles);
                    y
                };
                assert_eq!(by(wide_tiles_bf16), by(narrow_tiles_bf16), "{rows} rows, {inputs} to {outputs}");
            }
        }
    }
}
