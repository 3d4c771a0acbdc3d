//! Products of rows with a weight.

use candle_core::{CpuStorage, CustomOp2, Device, InplaceOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::simd::{LANES, Lanes, multiversion};
use super::{Shared, slice, slice_mut};

/// Outputs that one panel of a packed weight holds.
const PANEL: usize = 2 * LANES;
/// Rows that one tile of the product holds: its sums then fit the registers.
const TILE_ROWS: usize = 8;
/// Multiplications below which a second thread costs more than it saves.
const PARALLEL_WORK: usize = 1 << 18;

/// A weight, packed once so that products with it read memory in order.
///
/// The packed form is `[panels, inputs, 32]`: panel `p` holds outputs `32 p ..`, input by input, zero beyond the last.
#[derive(Clone, Debug)]
pub struct Linear {
    packed: Tensor,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    /// Packs a weight `[outputs, inputs]`.
    ///
    /// # Errors
    /// If it is not a matrix of `f32`.
    pub fn new(weight: &Tensor) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        let numbers = weight.flatten_all()?.to_vec1::<f32>()?;
        let panels = outputs.div_ceil(PANEL);
        let mut packed = vec![0.0; panels * inputs * PANEL];
        for output in 0..outputs {
            let panel = &mut packed[output / PANEL * inputs * PANEL..][..inputs * PANEL];
            for input in 0..inputs {
                panel[input * PANEL + output % PANEL] = numbers[output * inputs + input];
            }
        }
        let packed = Tensor::from_vec(packed, (panels, inputs, PANEL), &Device::Cpu)?;
        Ok(Self { packed: packed.to_device(weight.device())?, inputs, outputs })
    }

    /// Packs weights `[outputs, inputs]` of equal inputs as one: the outputs of the first come first.
    ///
    /// # Errors
    /// If inputs differ.
    pub fn stacked(weights: &[&Tensor]) -> Result<Self> {
        Self::new(&Tensor::cat(weights, 0)?)
    }

    /// `[rows, inputs]` to `[rows, outputs]`.
    ///
    /// # Errors
    /// If `x` is of another shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op2_no_bwd(&self.packed, &Product { inputs: self.inputs, outputs: self.outputs })
    }

    /// Adds the product of `x` `[rows, inputs]` to `y` `[rows, outputs]`.
    ///
    /// # Errors
    /// If a shape is another.
    pub fn add_to(&self, y: &Tensor, x: &Tensor) -> Result<()> {
        y.inplace_op3(x, &self.packed, &AddProduct { inputs: self.inputs, outputs: self.outputs })
    }
}

struct Product {
    inputs: usize,
    outputs: usize,
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = rows_of(x_l, self.inputs)?;
        let mut y = vec![0.0; rows * self.outputs];
        let out = Shared::new(&mut y);
        multiply(slice(x, x_l)?, slice(w, w_l)?, self.inputs, out, self.outputs);
        Ok((CpuStorage::F32(y), (rows, self.outputs).into()))
    }
}

struct AddProduct {
    inputs: usize,
    outputs: usize,
}

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
        if rows_of(x_l, self.inputs)? != rows_of(y_l, self.outputs)? {
            bail!("{:?} cannot be added to {:?}: other rows", x_l.shape(), y_l.shape());
        }
        let out = Shared::new(slice_mut(y, y_l)?);
        multiply(slice(x, x_l)?, slice(w, w_l)?, self.inputs, out, self.outputs);
        Ok(())
    }
}

/// Rows of a matrix that must be `width` wide.
fn rows_of(layout: &Layout, width: usize) -> Result<usize> {
    match layout.dims() {
        &[rows, found] if found == width => Ok(rows),
        found => bail!("a kernel got a tensor of shape {found:?}, expected [rows, {width}]"),
    }
}

/// Adds the product of `x` with a packed weight to `y`, panels shared out among threads.
fn multiply(x: &[f32], packed: &[f32], inputs: usize, y: Shared<'_>, outputs: usize) {
    let panel = |(index, panel): (usize, &[f32])| panel_product(x, panel, inputs, y, index * PANEL, outputs);
    if x.len() * outputs < PARALLEL_WORK {
        packed.chunks_exact(inputs * PANEL).enumerate().for_each(panel);
    } else {
        packed.par_chunks_exact(inputs * PANEL).enumerate().for_each(panel);
    }
}

multiversion! {
    /// Adds the product of all rows of `x` with one panel to the outputs of `y` from `first` on.
    fn panel_product(x: &[f32], panel: &[f32], inputs: usize, y: Shared<'_>, first: usize, outputs: usize) {
        let width = PANEL.min(outputs - first);
        for (tile, x) in x.chunks(TILE_ROWS * inputs).enumerate() {
            let place = Place { y, start: tile * TILE_ROWS * outputs + first, stride: outputs, width };
            match x.len() / inputs {
                1 => tile_product::<1>(x, panel, inputs, place),
                2 => tile_product::<2>(x, panel, inputs, place),
                3 => tile_product::<3>(x, panel, inputs, place),
                4 => tile_product::<4>(x, panel, inputs, place),
                5 => tile_product::<5>(x, panel, inputs, place),
                6 => tile_product::<6>(x, panel, inputs, place),
                7 => tile_product::<7>(x, panel, inputs, place),
                _ => tile_product::<TILE_ROWS>(x, panel, inputs, place),
            }
        }
    }
}

/// Where a tile's outputs go: `width` numbers of each row from `start` on.
#[derive(Clone, Copy)]
struct Place<'a> {
    y: Shared<'a>,
    start: usize,
    stride: usize,
    width: usize,
}

/// The product of `ROWS` rows with one panel. Each output is one chain of fused multiply-adds in the order of the
/// inputs, whatever `ROWS` is.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "sums that iterators walk over leave their registers")]
fn tile_product<const ROWS: usize>(x: &[f32], panel: &[f32], inputs: usize, place: Place<'_>) {
    let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &x[row * inputs..][..inputs]);
    let mut sums = [[Lanes::ZERO; 2]; ROWS];
    for (input, weights) in panel.chunks_exact(PANEL).enumerate() {
        let (left, right) = (Lanes::load(weights), Lanes::load(&weights[LANES..]));
        for row in 0..ROWS {
            let a = rows[row][input];
            sums[row][0] = sums[row][0].add_scaled(a, left);
            sums[row][1] = sums[row][1].add_scaled(a, right);
        }
    }
    for row in 0..ROWS {
        // Through a copy: sums that were indexed at run time would not stay in registers above.
        let mut products = [0.0; PANEL];
        products[..LANES].copy_from_slice(&sums[row][0].0);
        products[LANES..].copy_from_slice(&sums[row][1].0);
        // SAFETY: a thread writes the columns of its own panels only, and one tile after the other.
        let y = unsafe { place.y.get(place.start + row * place.stride, place.width) };
        for (y, product) in y.iter_mut().zip(&products) {
            *y += product;
        }
    }
}
