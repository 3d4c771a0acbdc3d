//! Low-rank differences of a projection, one for each depth, applied to rows of mixed depths in one operation.

use std::ops::Range;

use candle_core::{CpuStorage, Device, InplaceOp3, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::linear::{Columns, PANEL, PARALLEL_WORK, Place, pack, panel_product, rows_of};
use super::simd::{LANES, Lanes, has_avx512, multiversion};
use super::{DepthRanges, Shared, slice, slice_mut};

/// Rows and ranks per tile of the product with a narrow matrix, so that its sums fit in registers.
const TILE: usize = 4;

/// Low-rank adapters of concatenated projections, one for each depth: `up (down x)`. `down` `[rank, inputs]` has the
/// ranks of all projections; each projection has its own up, `[outputs, its ranks]`.
///
/// Packed adapters are stored depth by depth: each down and then its ups. If the ranks do not fill a panel, a down is
/// stored as `[rank, inputs]` and an up as `[tiles of 4 ranks][registers of outputs][ranks of the tile]`, padded with
/// zeros to whole registers. A few rows at a time then run from the first input to the last output. Larger adapters are
/// packed like the weight of a [`Linear`](super::linear::Linear), and panels are distributed over threads.
#[derive(Clone, Debug)]
pub struct Adapters {
    /// `[depths, numbers of one]`
    packed: Tensor,
    shape: AdapterShape,
}

/// Shape of packed adapters, equal at every depth.
#[derive(Clone, Debug)]
struct AdapterShape {
    inputs: usize,
    outputs: usize,
    rank: usize,
    /// For each adapted projection: the ranks that it reads and its outputs.
    ups: Vec<(Range<usize>, Range<usize>)>,
}

impl AdapterShape {
    /// Shape of adapters like those of one depth; `None` if nothing is adapted.
    fn of(adapter: &Adapter<'_>) -> Result<Option<Self>> {
        let (mut ups, mut inputs) = (Vec::new(), 0);
        let (mut rank, mut first_output) = (0, 0);
        for &(outputs, adapted) in &adapter.parts {
            if let Some((down, _)) = adapted {
                let (ranks, width) = down.dims2()?;
                ups.push((rank..rank + ranks, first_output..first_output + outputs));
                rank += ranks;
                inputs = width;
            }
            first_output += outputs;
        }
        Ok((rank > 0).then_some(Self { inputs, outputs: first_output, rank, ups }))
    }

    fn is_narrow(&self) -> bool {
        self.rank < PANEL
    }

    /// Numbers of a packed down.
    fn down_numbers(&self) -> usize {
        match self.is_narrow() {
            true => self.rank * self.inputs.next_multiple_of(LANES),
            false => self.rank.next_multiple_of(PANEL) * self.inputs,
        }
    }

    /// Numbers of a packed up.
    fn up_numbers(&self, (ranks, outputs): &(Range<usize>, Range<usize>)) -> usize {
        ranks.len() * outputs.len().next_multiple_of(if self.is_narrow() { LANES } else { PANEL })
    }

    /// Numbers of all matrices of one depth.
    fn numbers(&self) -> usize {
        self.down_numbers() + self.ups.iter().map(|up| self.up_numbers(up)).sum::<usize>()
    }

    /// Each up with its packed form, among those of a depth.
    fn ups<'a>(
        &'a self,
        mut packed: &'a [f32],
    ) -> impl Iterator<Item = (&'a Range<usize>, &'a Range<usize>, &'a [f32])> {
        self.ups.iter().map(move |up| {
            let (of_up, rest) = packed.split_at(self.up_numbers(up));
            packed = rest;
            (&up.0, &up.1, of_up)
        })
    }

    /// Appends the packed adapters of a depth.
    fn pack(&self, adapter: &Adapter<'_>, packed: &mut Vec<f32>) -> Result<()> {
        let adapted: Vec<_> = adapter.parts.iter().filter_map(|(_, adapted)| *adapted).collect();
        let mut downs = Vec::with_capacity(self.rank * self.inputs);
        for ((down, _), (ranks, _)) in adapted.iter().zip(&self.ups) {
            downs.extend(numbers_of(down, (ranks.len(), self.inputs))?);
        }
        match self.is_narrow() {
            true => pack_narrow_down(&downs, self.inputs, packed),
            false => pack(&downs, self.rank, self.inputs, packed),
        }
        for ((_, up), (ranks, outputs)) in adapted.iter().zip(&self.ups) {
            let mut up = numbers_of(up, (outputs.len(), ranks.len()))?;
            up.iter_mut().for_each(|number| *number *= adapter.scale);
            match self.is_narrow() {
                true => pack_narrow_up(&up, ranks.len(), packed),
                false => pack(&up, outputs.len(), ranks.len(), packed),
            }
        }
        Ok(())
    }
}

/// The low-rank matrices of concatenated projections at one depth.
#[derive(Clone, Debug)]
pub struct Adapter<'w> {
    /// For each projection, its outputs and, if it is adapted, its matrices `[rank, inputs]` and `[outputs, rank]`.
    pub parts: Vec<(usize, Option<(&'w Tensor, &'w Tensor)>)>,
    /// Factor of the adapters' output.
    pub scale: f32,
}

impl Adapters {
    /// Packs the adapters of each depth from depth 0 on, which have equal shapes; `None` if nothing is adapted.
    ///
    /// # Errors
    /// If a tensor is not an `f32` matrix, or its shape differs from the others.
    pub fn new(depths: &[Adapter<'_>]) -> Result<Option<Self>> {
        let Some(first) = depths.first() else { return Ok(None) };
        let Some(shape) = AdapterShape::of(first)? else { return Ok(None) };
        let mut packed = Vec::with_capacity(depths.len() * shape.numbers());
        for adapter in depths {
            shape.pack(adapter, &mut packed)?;
        }
        let packed = Tensor::from_vec(packed, (depths.len(), shape.numbers()), &Device::Cpu)?;
        Ok(Some(Self { packed, shape }))
    }

    /// Adds the adapters' output for the rows of `x` `[rows, inputs]` to those of `y` `[rows, outputs]`, at each depth
    /// with an adapter.
    ///
    /// # Errors
    /// If a tensor has another shape.
    pub fn add_to(&self, y: &Tensor, x: &Tensor, depths: &DepthRanges) -> Result<()> {
        y.inplace_op3(x, &self.packed, &AddAdapted { shape: &self.shape, depths })
    }
}

/// Appends the packed form of a narrow down with `inputs` inputs.
fn pack_narrow_down(down: &[f32], inputs: usize, packed: &mut Vec<f32>) {
    for row in down.chunks_exact(inputs) {
        packed.extend_from_slice(row);
        packed.resize(packed.len() + inputs.next_multiple_of(LANES) - inputs, 0.0);
    }
}

/// Appends the packed form of a narrow up with `ranks` ranks.
fn pack_narrow_up(up: &[f32], ranks: usize, packed: &mut Vec<f32>) {
    for first in (0..ranks).step_by(TILE) {
        for outputs in up.chunks(LANES * ranks) {
            for rank in first..ranks.min(first + TILE) {
                packed.extend(outputs.iter().skip(rank).step_by(ranks));
                packed.resize(packed.len().next_multiple_of(LANES), 0.0);
            }
        }
    }
}

/// The numbers of a matrix with a given shape.
fn numbers_of(matrix: &Tensor, shape: (usize, usize)) -> Result<Vec<f32>> {
    match matrix.dims2()? == shape {
        true => matrix.flatten_all()?.to_vec1::<f32>(),
        false => bail!("an adapter's matrix is {:?}, expected {shape:?}", matrix.shape()),
    }
}

struct AddAdapted<'a> {
    shape: &'a AdapterShape,
    depths: &'a DepthRanges,
}

impl InplaceOp3 for AddAdapted<'_> {
    fn name(&self) -> &'static str {
        "add-adapted"
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
        let shape = self.shape;
        let rows = rows_of(x_l, shape.inputs)?;
        if rows_of(y_l, shape.outputs)? != rows {
            bail!("what adapters make of {:?} cannot be added to {:?}", x_l.shape(), y_l.shape());
        }
        let (x, packed) = (slice(x, x_l)?, slice(w, w_l)?);
        let (adapted, y) = (self.adapted(packed), Shared::new(slice_mut(y, y_l)?));
        match shape.is_narrow() {
            true => adapt(shape, &adapted, x, y),
            false => {
                let mut lowered = vec![0.0; rows * shape.rank];
                lower(shape, &adapted, x, Shared::new(&mut lowered));
                raise(shape, &adapted, &lowered, y);
            }
        }
        Ok(())
    }
}

/// Rows of one depth and the packed adapter of that depth.
struct Adapted<'a> {
    rows: Range<usize>,
    down: &'a [f32],
    ups: &'a [f32],
}

impl AddAdapted<'_> {
    fn adapted<'a>(&self, packed: &'a [f32]) -> Vec<Adapted<'a>> {
        let (numbers, of_down) = (self.shape.numbers(), self.shape.down_numbers());
        let of_depth = |(depth, rows): &(usize, Range<usize>)| {
            let (down, ups) = packed.chunks_exact(numbers).nth(*depth)?.split_at(of_down);
            Some(Adapted { rows: rows.clone(), down, ups })
        };
        self.depths.iter().filter_map(of_depth).collect()
    }
}

/// Columns `range` of some rows of a matrix whose rows have `stride` numbers.
fn columns<'a>(x: &'a [f32], stride: usize, rows: &Range<usize>, range: Range<usize>) -> Columns<'a> {
    Columns { x: &x[rows.start * stride..rows.end * stride], stride, range }
}

/// Runs tasks, on several threads if there is enough work.
fn run<T: Send>(tasks: Vec<T>, work: usize, task: impl Fn(T) + Sync + Send) {
    match work < PARALLEL_WORK {
        true => tasks.into_iter().for_each(task),
        false => tasks.into_par_iter().for_each(task),
    }
}

/// Adds the products of the downs with rows `x` `[rows, inputs]` to `lowered` `[rows, rank]`.
fn lower(shape: &AdapterShape, adapted: &[Adapted<'_>], x: &[f32], lowered: Shared<'_>) {
    let &AdapterShape { inputs, rank, .. } = shape;
    let mut panels = Vec::new();
    for Adapted { rows, down, .. } in adapted {
        let of_down = down.chunks_exact(inputs * PANEL).enumerate();
        panels.extend(of_down.map(|(index, panel)| (rows, index, panel)));
    }
    run(panels, x.len() * rank, |(rows, index, panel)| {
        let place = Place::panel(lowered, rows.start, index, rank, 0..rank);
        panel_product(&columns(x, inputs, rows, 0..inputs), panel, place);
    });
}

/// Adds the products of the ups with `lowered` `[rows, rank]` to `y` `[rows, outputs]`.
fn raise(shape: &AdapterShape, adapted: &[Adapted<'_>], lowered: &[f32], y: Shared<'_>) {
    let mut panels = Vec::new();
    for Adapted { rows, ups, .. } in adapted {
        for (ranks, outputs, up) in shape.ups(ups) {
            let of_up = up.chunks_exact(ranks.len() * PANEL).enumerate();
            panels.extend(of_up.map(|(index, panel)| (rows, ranks, outputs, index, panel)));
        }
    }
    run(panels, lowered.len() * shape.outputs, |(rows, ranks, outputs, index, panel)| {
        let place = Place::panel(y, rows.start, index, shape.outputs, outputs.clone());
        panel_product(&columns(lowered, shape.rank, rows, ranks.clone()), panel, place);
    });
}

/// Adds the output of narrow adapters for rows `x` `[rows, inputs]` to rows `y` `[rows, outputs]`.
fn adapt(shape: &AdapterShape, adapted: &[Adapted<'_>], x: &[f32], y: Shared<'_>) {
    let &AdapterShape { inputs, outputs, rank, .. } = shape;
    let mut tiles = Vec::new();
    for adapted @ Adapted { rows, .. } in adapted {
        tiles.extend(rows.clone().step_by(TILE).map(|start| (start..rows.end.min(start + TILE), adapted)));
    }
    let work = x.len() / inputs * (rank * inputs + outputs * rank.max(TILE));
    run(tiles, work, |(rows, Adapted { down, ups, .. })| {
        let mut lowered = [0.0; TILE * PANEL];
        lower_tile(&columns(x, inputs, &rows, 0..inputs), down, rank, &mut lowered);
        for (row, lowered) in rows.zip(lowered.chunks_exact(rank)) {
            // SAFETY: a thread writes only the rows of its own tile.
            let y = unsafe { y.get(row * outputs, outputs) };
            for (ranks, outputs, up) in shape.ups(ups) {
                raise_row(&lowered[ranks.clone()], up, &mut y[outputs.clone()]);
            }
        }
    });
}

/// The product of up to [`TILE`] rows with a narrow down: `lowered` `[rows, rank]`.
fn lower_tile(x: &Columns<'_>, down: &[f32], rank: usize, lowered: &mut [f32]) {
    if has_avx512() { lower_wide(x, down, rank, lowered) } else { lower_narrow(x, down, rank, lowered) }
}

multiversion! {
    fn lower_wide(x: &Columns<'_>, down: &[f32], rank: usize, lowered: &mut [f32]) {
        lower_at_once::<{ TILE * TILE }>(x, down, rank, lowered);
    }

    fn lower_narrow(x: &Columns<'_>, down: &[f32], rank: usize, lowered: &mut [f32]) {
        lower_at_once::<TILE>(x, down, rank, lowered);
    }

    /// Adds the product of a row's ranks with a narrow up to its outputs, rank by rank.
    fn raise_row(lowered: &[f32], up: &[f32], y: &mut [f32]) {
        let width = up.len() / lowered.len();
        for (lowered, up) in lowered.chunks(TILE).zip(up.chunks(TILE * width)) {
            match lowered.len() {
                1 => raise_ranks::<1>(lowered, up, y),
                2 => raise_ranks::<2>(lowered, up, y),
                3 => raise_ranks::<3>(lowered, up, y),
                _ => raise_ranks::<TILE>(lowered, up, y),
            }
        }
    }
}

/// [`lower_tile`] with `SUMS` concurrent sums, which fit in registers.
#[inline(always)]
fn lower_at_once<const SUMS: usize>(x: &Columns<'_>, down: &[f32], rank: usize, lowered: &mut [f32]) {
    match x.rows() {
        1 => lower_rows::<1, SUMS>(x, down, rank, lowered),
        2 => lower_rows::<2, SUMS>(x, down, rank, lowered),
        3 => lower_rows::<3, SUMS>(x, down, rank, lowered),
        _ => lower_rows::<TILE, SUMS>(x, down, rank, lowered),
    }
}

#[inline(always)]
fn lower_rows<const ROWS: usize, const SUMS: usize>(x: &Columns<'_>, down: &[f32], rank: usize, lowered: &mut [f32]) {
    let rows: [&[f32]; ROWS] = std::array::from_fn(|row| x.row(row));
    let width = down.len() / rank;
    let at_once = (SUMS / ROWS).min(TILE);
    for first in (0..rank).step_by(at_once) {
        let (down, lowered) = (&down[first * width..], &mut lowered[first..]);
        match (rank - first).min(at_once) {
            1 => lower_ranks::<ROWS, 1>(&rows, down, width, rank, lowered),
            2 => lower_ranks::<ROWS, 2>(&rows, down, width, rank, lowered),
            3 => lower_ranks::<ROWS, 3>(&rows, down, width, rank, lowered),
            _ => lower_ranks::<ROWS, TILE>(&rows, down, width, rank, lowered),
        }
    }
}

/// Dot products of rows with the first `RANKS` rows of a down, which are `width` apart. Each is the sum of the lanes of
/// one register, accumulated in the order of the inputs, for any `ROWS` and `RANKS`.
#[inline(always)]
fn lower_ranks<const ROWS: usize, const RANKS: usize>(
    rows: &[&[f32]; ROWS],
    down: &[f32],
    width: usize,
    rank: usize,
    lowered: &mut [f32],
) {
    let ranks: [&[f32]; RANKS] = std::array::from_fn(|rank| &down[rank * width..][..width]);
    let whole = rows[0].len() / LANES * LANES;
    let mut sums = [[Lanes::ZERO; RANKS]; ROWS];
    for start in (0..width).step_by(LANES) {
        let mut x = [Lanes::ZERO; ROWS];
        for row in 0..ROWS {
            x[row] = match start < whole {
                true => Lanes::load(&rows[row][start..]),
                false => Lanes::load_some(&rows[row][start..]),
            };
        }
        for rank in 0..RANKS {
            let weights = Lanes::load(&ranks[rank][start..]);
            for row in 0..ROWS {
                sums[row][rank] = sums[row][rank].add_product(x[row], weights);
            }
        }
    }
    for row in 0..ROWS {
        for of_row in 0..RANKS {
            lowered[row * rank + of_row] = sums[row][of_row].reduce(|a, b| a + b);
        }
    }
}

#[inline(always)]
fn raise_ranks<const RANKS: usize>(lowered: &[f32], up: &[f32], y: &mut [f32]) {
    let (mut registers, mut ups) = (y.chunks_exact_mut(LANES), up.chunks_exact(RANKS * LANES));
    for (y, up) in registers.by_ref().zip(ups.by_ref()) {
        y.copy_from_slice(&raised::<RANKS>(Lanes::load(y), lowered, up).0);
    }
    let y = registers.into_remainder();
    if let (Some(up), false) = (ups.next(), y.is_empty()) {
        y.copy_from_slice(&raised::<RANKS>(Lanes::load_some(y), lowered, up).0[..y.len()]);
    }
}

/// A register of outputs with the contributions of ranks added.
#[inline(always)]
fn raised<const RANKS: usize>(mut y: Lanes, lowered: &[f32], up: &[f32]) -> Lanes {
    for rank in 0..RANKS {
        y = y.add_scaled(lowered[rank], Lanes::load(&up[rank * LANES..]));
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    const DEPTHS: usize = 3;

    /// Numbers of a matrix `[rows, width]`.
    type Matrix = Vec<Vec<f32>>;

    fn random(rng: &mut StdRng, rows: usize, width: usize) -> Matrix {
        (0..rows).map(|_| (0..width).map(|_| rng.random_range(-1.0..1.0)).collect()).collect()
    }

    fn tensor(matrix: &Matrix) -> Tensor {
        Tensor::new(matrix.clone(), &Device::Cpu).unwrap()
    }

    /// Products of the rows of two matrices.
    fn products(x: &[f64], matrix: &Matrix) -> Vec<f64> {
        let product = |row: &Vec<f32>| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
        matrix.iter().map(product).collect()
    }

    #[test]
    fn sums_at_once_do_not_change_their_bits() {
        let mut rng = StdRng::seed_from_u64(2);
        for (rows, rank, inputs) in [(1, 1, 16), (2, 7, 40), (3, 5, 33), (4, 8, 64), (4, 31, 100)] {
            let (x, down) =
                (random(&mut rng, rows, inputs).concat(), random(&mut rng, rank, inputs.next_multiple_of(LANES)));
            let columns = Columns { x: &x, stride: inputs, range: 0..inputs };
            let by = |lower: fn(&Columns<'_>, &[f32], usize, &mut [f32])| {
                let mut lowered = vec![f32::NAN; rows * rank];
                lower(&columns, &down.concat(), rank, &mut lowered);
                lowered
            };
            assert!(by(lower_wide).iter().all(|sum| sum.is_finite()));
            assert_eq!(by(lower_wide), by(lower_narrow), "{rows} rows, rank {rank}, {inputs} inputs");
        }
    }

    #[test]
    fn rows_get_the_adapters_of_their_depths() {
        let mut rng = StdRng::seed_from_u64(1);
        let shapes: [&[(usize, usize)]; 5] =
            [&[(1, 5)], &[(0, 40), (9, 70), (0, 3)], &[(2, 64), (3, 33)], &[(20, 31), (13, 64)], &[(70, 100)]];
        for (shape, inputs) in shapes.into_iter().flat_map(|shape| [1, 40, 64].map(|inputs| (shape, inputs))) {
            let parts = |rng: &mut StdRng| -> Vec<Option<(Matrix, Matrix)>> {
                let part =
                    |&(rank, outputs)| (rank > 0).then(|| (random(rng, rank, inputs), random(rng, outputs, rank)));
                shape.iter().map(part).collect()
            };
            let matrices: Vec<_> = (0..DEPTHS).map(|_| parts(&mut rng)).collect();
            let tensors = |part: &Option<(Matrix, Matrix)>| part.as_ref().map(|(down, up)| (tensor(down), tensor(up)));
            let tensors: Vec<Vec<_>> = matrices.iter().map(|parts| parts.iter().map(tensors).collect()).collect();
            let mut of_depths = Vec::new();
            for tensors in &tensors {
                let adapted = tensors.iter().map(|part| part.as_ref().map(|(down, up)| (down, up)));
                of_depths.push(Adapter { parts: shape.iter().map(|part| part.1).zip(adapted).collect(), scale: 0.5 });
            }
            let adapters = Adapters::new(&of_depths).unwrap().unwrap();

            // Depth 3 has no adapter.
            let depths = [(0, 0..7), (2, 7..8), (3, 8..13)];
            let outputs: usize = shape.iter().map(|part| part.1).sum();
            let (x, before) = (random(&mut rng, 13, inputs), random(&mut rng, 13, outputs));
            let y = tensor(&before);
            adapters.add_to(&y, &tensor(&x), &depths).unwrap();
            let y = y.to_vec2::<f32>().unwrap();
            for (depth, row) in depths.iter().flat_map(|(depth, rows)| rows.clone().map(move |row| (*depth, row))) {
                let x: Vec<f64> = x[row].iter().map(|&x| f64::from(x)).collect();
                let added = |(&(_, outputs), part): (&(usize, usize), &Option<(Matrix, Matrix)>)| match part {
                    Some((down, up)) => products(&products(&x, down), up),
                    None => vec![0.0; outputs],
                };
                let added: Vec<f64> = match matrices.get(depth) {
                    Some(parts) => shape.iter().zip(parts).flat_map(added).collect(),
                    None => vec![0.0; outputs],
                };
                for ((found, before), added) in y[row].iter().zip(&before[row]).zip(added) {
                    let expected = f64::from(*before) + 0.5 * added;
                    assert!(
                        (f64::from(*found) - expected).abs() < 1e-4,
                        "{found} is not {expected}: {shape:?} {inputs}"
                    );
                }
                // The result is identical, to the bit, without the other rows.
                let alone = tensor(&vec![before[row].clone()]);
                let x = tensor(&vec![x.iter().map(|&x| x as f32).collect()]);
                adapters.add_to(&alone, &x, &[(depth, 0..1)]).unwrap();
                assert_eq!(alone.to_vec2::<f32>().unwrap()[0], y[row], "{shape:?} {inputs}");
            }
        }
    }
}
