//! Products of rows with weights in blocks of 8- or 4-bit integers: the numbers of GGUF's Q8_0 and Q4_K, in the order
//! of this crate.
//!
//! Rows are rounded to 8 bits too, block by block. Blocks are multiplied in integers, which is exact, so results are
//! equal on every CPU and for every number of rows. Only the sum over blocks rounds, in the order of the blocks.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result, Tensor};
use half::f16;
use rayon::prelude::*;

use super::Shared;
use super::simd::{LANES, Lanes, greater};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod vnni;

/// Inputs per block, which share a scale.
const BLOCK: usize = 32;
/// Outputs per panel: one register of 32-bit sums.
const PANEL: usize = LANES;
/// Inputs that one instruction multiplies and adds, for each output of a panel.
const GROUP: usize = 4;
/// Blocks per Q4_K super-block.
const SUPER: usize = 8;
/// Rows and panels per tile of the product: its sums fit in registers, and a loaded number of a row is used for several
/// panels.
const TILE_ROWS: usize = 4;
const TILE_PANELS: usize = 3;
/// Rows per tile of AVX2 with nibbles, where a row takes one register.
const TILE_ROWS_OF_NIBBLES: usize = 8;
/// Multiplications below which a second thread does not pay.
const PARALLEL_WORK: usize = 1 << 19;
/// Rounded numbers below which a second thread does not pay.
const PARALLEL_ROUNDING: usize = 1 << 12;

/// Integer format of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// GGUF's Q8_0: per block, `scale * q` with `q` in -127..=127 and a 16-bit scale.
    Q8,
    /// GGUF's Q4_K: per block, `scale * q - minimum` with `q` in 0..16; scales and minima are 6-bit multiples of two
    /// 16-bit numbers per super-block.
    Q4K,
}

impl Format {
    /// Bits per number, scales included, in a weight of whole super-blocks.
    pub fn bits(self) -> f64 {
        let inputs = BLOCK * SUPER;
        (PanelLayout::new(self, inputs).bytes() * 8) as f64 / (inputs * PANEL) as f64
    }
}

/// Layout of a panel, in bytes.
///
/// ```text
/// panel    quants [block][group][output][input in group], then scales
/// Q8       a quant is a byte, q + 128; scales [block][output], f16
/// Q4K      a quant is a nibble; two groups share 64 bytes, the second in the high nibbles;
///          multiples [block][scale, minimum][output], u8; units [super-block][scale, minimum][output], f16
/// ```
#[derive(Clone, Copy, Debug)]
struct PanelLayout {
    format: Format,
    blocks: usize,
}

impl PanelLayout {
    fn new(format: Format, inputs: usize) -> Self {
        Self { format, blocks: inputs.div_ceil(BLOCK) }
    }

    fn block_bytes(self) -> usize {
        match self.format {
            Format::Q8 => BLOCK * PANEL,
            Format::Q4K => BLOCK * PANEL / 2,
        }
    }

    fn scales(self, block: usize) -> usize {
        self.blocks * self.block_bytes() + block * 2 * PANEL
    }

    fn units(self, block: usize) -> usize {
        self.scales(self.blocks) + block / SUPER * 4 * PANEL
    }

    fn bytes(self) -> usize {
        match self.format {
            Format::Q8 => self.scales(self.blocks),
            Format::Q4K => self.units(self.blocks.next_multiple_of(SUPER)),
        }
    }
}

/// Rounds a weight `[outputs, inputs]` as GGUF does, and packs it: `[panels, bytes]` of `u8`.
///
/// # Errors
/// If the weight is not an `f32` matrix.
pub fn pack(weight: &Tensor, format: Format) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let (dtype, multiple) = match format {
        Format::Q8 => (GgmlDType::Q8_0, BLOCK),
        Format::Q4K => (GgmlDType::Q4K, BLOCK * SUPER),
    };
    let padded = weight.pad_with_zeros(1, 0, inputs.next_multiple_of(multiple) - inputs)?;
    let quantized = QTensor::quantize(&padded, dtype)?;
    let data = quantized.data()?;
    let layout = PanelLayout::new(format, inputs);
    let row_bytes = data.len() / outputs;
    let panels = outputs.div_ceil(PANEL);
    let mut packed = vec![0; panels * layout.bytes()];
    packed.par_chunks_exact_mut(layout.bytes()).enumerate().for_each(|(index, panel)| {
        let rows = data[index * PANEL * row_bytes..].chunks_exact(row_bytes);
        for (output, row) in rows.take(PANEL).enumerate() {
            match format {
                Format::Q8 => pack_q8(layout, row, output, panel),
                Format::Q4K => pack_q4k(layout, row, output, panel),
            }
        }
    });
    Tensor::from_vec(packed, (panels, layout.bytes()), &Device::Cpu)?.to_device(weight.device())
}

/// Packs one row of `block_q8_0`: a scale and 32 signed bytes.
fn pack_q8(layout: PanelLayout, row: &[u8], output: usize, panel: &mut [u8]) {
    for (block, bytes) in row.chunks_exact(2 + BLOCK).enumerate() {
        panel[layout.scales(block) + 2 * output..][..2].copy_from_slice(&bytes[..2]);
        for (input, quant) in bytes[2..].iter().enumerate() {
            let place = block * layout.block_bytes() + (input / GROUP * PANEL + output) * GROUP + input % GROUP;
            panel[place] = quant ^ 0x80;
        }
    }
}

/// Packs one row of `block_q4_K`: two units, eight 6-bit multiples of each, and 256 nibbles, those of two blocks
/// interleaved.
fn pack_q4k(layout: PanelLayout, row: &[u8], output: usize, panel: &mut [u8]) {
    for (super_block, bytes) in row.chunks_exact(4 + 12 + BLOCK * SUPER / 2).enumerate() {
        let (units, rest) = bytes.split_at(4);
        let (multiples, nibbles) = rest.split_at(12);
        let unit = layout.units(super_block * SUPER) + 2 * output;
        panel[unit..unit + 2].copy_from_slice(&units[..2]);
        panel[unit + 2 * PANEL..][..2].copy_from_slice(&units[2..]);
        for part in 0..SUPER.min(layout.blocks - super_block * SUPER) {
            let block = super_block * SUPER + part;
            let (scale, minimum) = q4k_multiples(part, multiples);
            panel[layout.scales(block) + output] = scale;
            panel[layout.scales(block) + PANEL + output] = minimum;
            for input in 0..BLOCK {
                let quant = nibbles[part / 2 * BLOCK + input] >> (4 * (part % 2)) & 15;
                let (group, place) = (input / GROUP, output * GROUP + input % GROUP);
                panel[block * layout.block_bytes() + group / 2 * PANEL * GROUP + place] |= quant << (4 * (group % 2));
            }
        }
    }
}

/// The two 6-bit multiples of a super-block's `part`. Those of the first four parts are contiguous; the others are
/// split into 4 and 2 bits.
fn q4k_multiples(part: usize, packed: &[u8]) -> (u8, u8) {
    match part.checked_sub(4) {
        None => (packed[part] & 63, packed[part + 4] & 63),
        Some(high) => {
            let low = packed[part + 4];
            (low & 15 | packed[high] >> 6 << 4, low >> 4 | packed[high + 4] >> 6 << 4)
        }
    }
}

/// Rows rounded to 8 bits, each block by its largest number.
struct Rounded {
    blocks: usize,
    /// `[row][block][input in block]`
    quants: Vec<i8>,
    /// `[row][block]`
    blocks_of_rows: Vec<Block>,
}

/// Properties of a row's block, apart from its quants.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    /// Scale of the quants.
    scale: f32,
    /// Sum of the rounded numbers.
    sum: f32,
    /// Initial value of sums of products with weights that have 128 added: -128 times the sum of the quants.
    start: i32,
}

impl Rounded {
    fn new(x: &[f32], inputs: usize) -> Self {
        let (rows, blocks) = (x.len() / inputs, inputs.div_ceil(BLOCK));
        let (mut quants, mut of_rows) = (vec![0; rows * blocks * BLOCK], vec![Block::default(); rows * blocks]);
        let round = |((row, quants), blocks): ((&[f32], &mut [i8]), &mut [Block])| round_row(row, quants, blocks);
        if x.len() < PARALLEL_ROUNDING {
            let places = quants.chunks_exact_mut(blocks * BLOCK);
            x.chunks_exact(inputs).zip(places).zip(of_rows.chunks_exact_mut(blocks)).for_each(round);
        } else {
            let places = quants.par_chunks_exact_mut(blocks * BLOCK);
            x.par_chunks_exact(inputs).zip(places).zip(of_rows.par_chunks_exact_mut(blocks)).for_each(round);
        }
        Self { blocks, quants, blocks_of_rows: of_rows }
    }

    fn rows(&self) -> usize {
        self.blocks_of_rows.len() / self.blocks
    }
}

super::simd::multiversion! {
    /// Rounds the blocks of one row.
    fn round_row(row: &[f32], quants: &mut [i8], blocks: &mut [Block]) {
        for ((numbers, quants), block) in row.chunks(BLOCK).zip(quants.chunks_exact_mut(BLOCK)).zip(blocks) {
            let mut padded = [0.0; BLOCK];
            padded[..numbers.len()].copy_from_slice(numbers);
            let halves = [Lanes::load(&padded), Lanes::load(&padded[LANES..])].map(|half| half.map(f32::abs));
            let finite = padded.iter().fold(true, |finite, x| finite & x.is_finite());
            let largest = halves[0].zip(halves[1], greater).reduce(greater);
            let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            let mut sum = 0;
            for (quant, number) in quants.iter_mut().zip(&padded) {
                // Adding 1.5 * 2^23 rounds to an integer, ties to even, which is then in the lowest bits.
                *quant = (number * inverse + 12_582_912.0).to_bits() as i8;
                sum += i32::from(*quant);
            }
            // A row that is not finite must not give a finite result.
            let scale = if finite { largest / 127.0 } else { f32::NAN };
            *block = Block { scale, sum: sum as f32 * scale, start: -128 * sum };
        }
    }
}

/// Adds the product of `x` with a packed weight to `y`; panels are distributed over threads.
pub(super) fn multiply(x: &[f32], packed: &[u8], format: Format, inputs: usize, y: Shared<'_>, outputs: usize) {
    let layout = PanelLayout::new(format, inputs);
    let (rows, instructions) = (Rounded::new(x, inputs), Instructions::best());
    let tile = |(index, panels): (usize, &[u8])| {
        let tile = Tile { instructions, layout, panels, rows: &rows };
        tile.add_all(y, index * TILE_PANELS * PANEL, outputs);
    };
    if x.len() * outputs < PARALLEL_WORK {
        packed.chunks(TILE_PANELS * layout.bytes()).enumerate().for_each(tile);
    } else {
        packed.par_chunks(TILE_PANELS * layout.bytes()).enumerate().for_each(tile);
    }
}

/// Instruction sets for products. All give bit-identical results.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Instructions {
    Any,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Instructions {
    /// Instruction sets of the CPU, the best last.
    fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let vectors = [
            (
                Self::Avx2,
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
            ),
            (
                Self::Vnni,
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni"),
            ),
        ];
        #[cfg(not(target_arch = "x86_64"))]
        let vectors = [];
        std::iter::once((Self::Any, true))
            .chain(vectors)
            .filter(|(_, here)| *here)
            .map(|(instructions, _)| instructions)
    }

    fn best() -> Self {
        Self::available().last().unwrap_or(Self::Any)
    }
}

/// Up to [`TILE_PANELS`] panels and the rows that they are multiplied with.
struct Tile<'a> {
    instructions: Instructions,
    layout: PanelLayout,
    panels: &'a [u8],
    rows: &'a Rounded,
}

impl<'a> Tile<'a> {
    fn panel(&self, panel: usize) -> &'a [u8] {
        &self.panels[panel * self.layout.bytes()..][..self.layout.bytes()]
    }

    /// A block of `ROWS` rows from `row` on: the start of each row's integers, and its other properties.
    ///
    /// # Safety
    /// The rows and the block must exist.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn block_of_rows<const ROWS: usize>(
        &self,
        row: usize,
        block: usize,
    ) -> ([*const i8; ROWS], [&'a Block; ROWS]) {
        let place = |index: usize| (row + index) * self.rows.blocks + block;
        // SAFETY: as the caller ensures.
        unsafe {
            (
                std::array::from_fn(|index| self.rows.quants.as_ptr().add(place(index) * BLOCK)),
                std::array::from_fn(|index| self.rows.blocks_of_rows.get_unchecked(place(index))),
            )
        }
    }

    /// Adds the product of all rows with the panels to the outputs of `y` from `first` on.
    fn add_all(&self, y: Shared<'_>, first: usize, outputs: usize) {
        let (rows, most) = (self.rows.rows(), self.most_rows());
        let mut row = 0;
        while row < rows {
            row += match rows - row {
                left if left >= TILE_ROWS_OF_NIBBLES && most == TILE_ROWS_OF_NIBBLES => {
                    self.add::<TILE_ROWS_OF_NIBBLES>(row, y, first, outputs)
                }
                1 => self.add::<1>(row, y, first, outputs),
                2 => self.add::<2>(row, y, first, outputs),
                3 => self.add::<3>(row, y, first, outputs),
                _ => self.add::<TILE_ROWS>(row, y, first, outputs),
            };
        }
    }

    /// Maximum number of rows whose sums fit in registers.
    fn most_rows(&self) -> usize {
        match (self.instructions, self.layout.format) {
            #[cfg(target_arch = "x86_64")]
            (Instructions::Avx2, Format::Q4K) => TILE_ROWS_OF_NIBBLES,
            _ => TILE_ROWS,
        }
    }

    /// Adds the product of `ROWS` rows from `row` on, as [`add_all`](Self::add_all); returns `ROWS`.
    fn add<const ROWS: usize>(&self, row: usize, y: Shared<'_>, first: usize, outputs: usize) -> usize {
        let panels = self.panels.len() / self.layout.bytes();
        if panels == TILE_PANELS {
            add_products(self.products::<ROWS, TILE_PANELS>(row, 0), row, y, first, outputs);
        } else {
            for panel in 0..panels {
                add_products(self.products::<ROWS, 1>(row, panel), row, y, first + panel * PANEL, outputs);
            }
        }
        ROWS
    }

    /// The products of `ROWS` rows from `row` on with `PANELS` panels from `panel` on.
    fn products<const ROWS: usize, const PANELS: usize>(&self, row: usize, panel: usize) -> Products<ROWS, PANELS> {
        assert!((panel + PANELS) * self.layout.bytes() <= self.panels.len() && self.layout.blocks == self.rows.blocks);
        assert!((row + ROWS) * self.rows.blocks <= self.rows.blocks_of_rows.len());
        match self.instructions {
            Instructions::Any => self.plain_products(row, panel),
            // SAFETY: the CPU has the instructions, and by the assertions all reads are within the slices.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => unsafe {
                match self.layout.format {
                    Format::Q8 => avx2::products::<ROWS, PANELS, false>(self, row, panel),
                    Format::Q4K => avx2::products::<ROWS, PANELS, true>(self, row, panel),
                }
            },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Instructions::Vnni => unsafe {
                match self.layout.format {
                    Format::Q8 => vnni::products::<ROWS, PANELS, false>(self, row, panel),
                    Format::Q4K => vnni::products::<ROWS, PANELS, true>(self, row, panel),
                }
            },
        }
    }

    /// [`Tile::products`] on any CPU.
    fn plain_products<const ROWS: usize, const PANELS: usize>(
        &self,
        row: usize,
        panel: usize,
    ) -> Products<ROWS, PANELS> {
        let mut sums = [[[0.0; PANEL]; PANELS]; ROWS];
        for block in 0..self.layout.blocks {
            for place in 0..PANELS * PANEL {
                let (of_tile, output) = (place / PANEL, place % PANEL);
                let quants = self.quants(panel + of_tile, block, output);
                let (scale, minimum) = self.scale(panel + of_tile, block, output);
                for (index, sums) in sums.iter_mut().enumerate() {
                    let place = (row + index) * self.rows.blocks + block;
                    let x = &self.rows.quants[place * BLOCK..][..BLOCK];
                    let dot: i32 = quants.iter().zip(x).map(|(w, x)| w * i32::from(*x)).sum();
                    let Block { scale: x_scale, sum: x_sum, .. } = self.rows.blocks_of_rows[place];
                    let sum = &mut sums[of_tile][output];
                    *sum = (dot as f32).mul_add(scale * x_scale, *sum);
                    if self.layout.format == Format::Q4K {
                        *sum = (-minimum).mul_add(x_sum, *sum);
                    }
                }
            }
        }
        sums
    }

    /// The integers of an output's block.
    fn quants(&self, panel: usize, block: usize, output: usize) -> [i32; BLOCK] {
        let bytes = &self.panel(panel)[block * self.layout.block_bytes()..][..self.layout.block_bytes()];
        std::array::from_fn(|input| {
            let (group, place) = (input / GROUP, output * GROUP + input % GROUP);
            match self.layout.format {
                Format::Q8 => i32::from(bytes[group * PANEL * GROUP + place]) - 128,
                Format::Q4K => i32::from(bytes[group / 2 * PANEL * GROUP + place] >> (4 * (group % 2)) & 15),
            }
        })
    }

    /// Scale and minimum of an output's block.
    fn scale(&self, panel: usize, block: usize, output: usize) -> (f32, f32) {
        let panel = self.panel(panel);
        let half = |place: usize| f16::from_le_bytes([panel[place], panel[place + 1]]).to_f32();
        let scales = self.layout.scales(block);
        match self.layout.format {
            Format::Q8 => (half(scales + 2 * output), 0.0),
            Format::Q4K => {
                let units = self.layout.units(block) + 2 * output;
                let multiple = |place: usize| f32::from(panel[place]);
                let scale = half(units) * multiple(scales + output);
                (scale, half(units + 2 * PANEL) * multiple(scales + PANEL + output))
            }
        }
    }
}

/// Products of rows with panels, by row.
type Products<const ROWS: usize, const PANELS: usize> = [[[f32; PANEL]; PANELS]; ROWS];

/// Adds products to the rows of `y` from `row` on, at outputs from `first` on.
fn add_products<const ROWS: usize, const PANELS: usize>(
    products: Products<ROWS, PANELS>,
    row: usize,
    y: Shared<'_>,
    first: usize,
    outputs: usize,
) {
    let width = (PANELS * PANEL).min(outputs - first);
    for (index, products) in products.iter().enumerate() {
        // SAFETY: a thread writes only the columns of its own panels, one tile after the other.
        let y = unsafe { y.get((row + index) * outputs + first, width) };
        y.iter_mut().zip(products.as_flattened()).for_each(|(y, product)| *y += product);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    fn random(rows: usize, columns: usize, seed: u64) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(seed);
        (0..rows * columns).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    fn matrix(numbers: &[f32], columns: usize) -> Tensor {
        Tensor::from_slice(numbers, (numbers.len() / columns, columns), &Device::Cpu).unwrap()
    }

    fn product(x: &[f32], weight: &Tensor, format: Format) -> Vec<f32> {
        let (outputs, inputs) = weight.dims2().unwrap();
        let packed = pack(weight, format).unwrap().flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let mut y = vec![0.0; x.len() / inputs * outputs];
        multiply(x, &packed, format, inputs, Shared::new(&mut y), outputs);
        y
    }

    /// The weight as GGUF rounds it.
    fn rounded(weight: &Tensor, format: Format) -> Vec<Vec<f32>> {
        let inputs = weight.dims()[1];
        let (dtype, multiple) = match format {
            Format::Q8 => (GgmlDType::Q8_0, 32),
            Format::Q4K => (GgmlDType::Q4K, 256),
        };
        let padded = weight.pad_with_zeros(1, 0, inputs.next_multiple_of(multiple) - inputs).unwrap();
        let quantized = QTensor::quantize(&padded, dtype).unwrap().dequantize(&Device::Cpu).unwrap();
        assert_eq!(quantized.dtype(), DType::F32);
        quantized.narrow(1, 0, inputs).unwrap().to_vec2().unwrap()
    }

    const SHAPES: [(usize, usize, usize); 6] =
        [(1, 32, 16), (3, 576, 192), (9, 40, 17), (8, 256, 33), (20, 300, 5), (2, 1536, 576)];

    #[test]
    fn the_product_is_that_of_ggufs_numbers_but_for_the_rounding_of_the_rows() {
        for format in [Format::Q8, Format::Q4K] {
            for (rows, inputs, outputs) in SHAPES {
                let (x, w) = (random(rows, inputs, 1), random(outputs, inputs, 2));
                let weight = matrix(&w, inputs);
                let y = product(&x, &weight, format);
                let weight = rounded(&weight, format);
                for (x, y) in x.chunks(inputs).zip(y.chunks(outputs)) {
                    for (weight, y) in weight.iter().zip(y) {
                        let exact: f32 = x.iter().zip(weight).map(|(x, w)| x * w).sum();
                        // Rounding an input in -1..1 to 8 bits moves it by up to 1/254.
                        let bound: f32 = weight.iter().map(|w| w.abs() / 254.0).sum::<f32>() + 1e-4;
                        assert!((y - exact).abs() < bound, "{format:?} {inputs}x{outputs}: {y}, expected {exact}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_that_are_whole_numbers_of_a_scale_multiply_exactly() {
        // Blocks whose largest number is 127, which rounding does not change.
        let x: Vec<f32> = (0..64).map(|i| if i % 32 == 0 { 127.0 } else { (i % 7) as f32 - 3.0 }).collect();
        for format in [Format::Q8, Format::Q4K] {
            let weight = matrix(&random(19, 64, 3), 64);
            let expected: Vec<f64> = rounded(&weight, format)
                .iter()
                .map(|w| w.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum())
                .collect();
            for (y, expected) in product(&x, &weight, format).iter().zip(expected) {
                assert!((f64::from(*y) - expected).abs() < 1e-3, "{format:?}: {y}, expected {expected}");
            }
        }
    }

    #[test]
    fn all_instructions_agree_to_the_bit() {
        for format in [Format::Q8, Format::Q4K] {
            for (rows, inputs, outputs) in SHAPES {
                // Numbers at the ends of their range too, where the sums of their products are largest.
                let extreme = |numbers: &[f32]| -> Vec<f32> { numbers.iter().map(|x| x.signum()).collect() };
                let (x, w) = (random(rows, inputs, 4), random(outputs, inputs, 5));
                agree(&x, &w, format, inputs);
                agree(&extreme(&x), &w, format, inputs);
                agree(&vec![-1.0; rows * inputs], &extreme(&w), format, inputs);
                agree(&vec![1.0; rows * inputs], &vec![1.0; outputs * inputs], format, inputs);
            }
        }
    }

    fn agree(x: &[f32], w: &[f32], format: Format, inputs: usize) {
        let packed = pack(&matrix(w, inputs), format).unwrap().to_vec2::<u8>().unwrap();
        let layout = PanelLayout::new(format, inputs);
        let rows = Rounded::new(x, inputs);
        for panels in packed.concat().chunks(TILE_PANELS * layout.bytes()) {
            for instructions in Instructions::available() {
                let tile = Tile { instructions, layout, panels, rows: &rows };
                assert_eq!(tile.products::<1, 1>(0, 0), tile.plain_products(0, 0), "{instructions:?}");
                if panels.len() == TILE_PANELS * layout.bytes() {
                    assert_eq!(tile.products::<1, TILE_PANELS>(0, 0), tile.plain_products(0, 0), "{instructions:?}");
                    if rows.rows() >= TILE_ROWS {
                        let products = tile.products::<TILE_ROWS, TILE_PANELS>(0, 0);
                        assert_eq!(products, tile.plain_products(0, 0), "{instructions:?}");
                    }
                    if rows.rows() >= TILE_ROWS_OF_NIBBLES {
                        let products = tile.products::<TILE_ROWS_OF_NIBBLES, TILE_PANELS>(0, 0);
                        assert_eq!(products, tile.plain_products(0, 0), "{instructions:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_gives_the_same_bits_whatever_rows_it_is_with() {
        for format in [Format::Q8, Format::Q4K] {
            let (x, w) = (random(21, 576, 6), random(40, 576, 7));
            let weight = matrix(&w, 576);
            let all = product(&x, &weight, format);
            for (x, y) in x.chunks(576).zip(all.chunks(40)) {
                assert_eq!(product(x, &weight, format), y);
            }
        }
    }

    #[test]
    fn a_row_that_is_not_finite_does_not_come_out_finite() {
        let weight = matrix(&random(16, 64, 8), 64);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = random(1, 64, 9);
            x[40] = bad;
            assert!(product(&x, &weight, Format::Q8).iter().all(|y| y.is_nan()));
        }
    }
}
