//! Operations on separate rows: gathering and scattering, scaling, biases, comparisons and probes.

use candle_core::{CpuStorage, CustomOp2, InplaceOp1, InplaceOp2, Layout, Result, Shape, Tensor, bail};

use super::simd::{dot, exp, multiversion, squared_distance};
use super::{DepthRanges, by_set, slice, slice_mut};

/// Source of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A row of the first tensor.
    First(u32),
    /// A row of the second.
    Second(u32),
}

/// Gathers rows `[sources, width]` from two tensors `[_, width]`.
///
/// # Errors
/// If a row does not exist.
pub fn gather(first: &Tensor, second: &Tensor, sources: &[Source]) -> Result<Tensor> {
    first.apply_op2_no_bwd(second, &Gather { sources })
}

struct Gather<'a> {
    sources: &'a [Source],
}

impl CustomOp2 for Gather<'_> {
    fn name(&self) -> &'static str {
        "gather"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (first, second) = (slice(s1, l1)?, slice(s2, l2)?);
        let width = l1.shape().dims2()?.1;
        let mut rows = Vec::with_capacity(self.sources.len() * width);
        for &source in self.sources {
            let (from, index) = match source {
                Source::First(index) => (first, index as usize),
                Source::Second(index) => (second, index as usize),
            };
            match from.get(index * width..(index + 1) * width) {
                Some(row) => rows.extend_from_slice(row),
                None => bail!("row {index} was asked for, there are {}", from.len() / width),
            }
        }
        Ok((CpuStorage::F32(rows), (self.sources.len(), width).into()))
    }
}

/// Copies row `i` of `rows` `[len, width]` to row `places[i]` of `target` `[_, width]`. Rows without a place are not
/// copied.
///
/// # Errors
/// If a place does not exist.
pub fn scatter(target: &Tensor, rows: &Tensor, places: &[Option<u32>]) -> Result<()> {
    target.inplace_op2(rows, &Scatter { places })
}

struct Scatter<'a> {
    places: &'a [Option<u32>],
}

impl InplaceOp2 for Scatter<'_> {
    fn name(&self) -> &'static str {
        "scatter"
    }

    fn cpu_fwd(&self, target: &mut CpuStorage, t_l: &Layout, rows: &CpuStorage, r_l: &Layout) -> Result<()> {
        let width = r_l.shape().dims2()?.1;
        let target = slice_mut(target, t_l)?;
        for (row, place) in slice(rows, r_l)?.chunks_exact(width).zip(self.places) {
            if let Some(place) = *place {
                target[place as usize * width..][..width].copy_from_slice(row);
            }
        }
        Ok(())
    }
}

/// Multiplies all numbers of `x` by `factor`.
///
/// # Errors
/// If `x` is not `f32`.
pub fn scale(x: &Tensor, factor: f32) -> Result<()> {
    x.inplace_op1(&Scale(factor))
}

struct Scale(f32);

impl InplaceOp1 for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        slice_mut(x, layout)?.iter_mut().for_each(|x| *x *= self.0);
        Ok(())
    }
}

/// Adds a bias to each row of `x` `[rows, width]`. `biases` `[sets, width]` has one for all depths, or one for each.
///
/// # Errors
/// If the widths differ.
pub fn add_bias(x: &Tensor, biases: &Tensor, depths: &DepthRanges) -> Result<()> {
    x.inplace_op2(biases, &AddBias { depths })
}

struct AddBias<'a> {
    depths: &'a DepthRanges,
}

impl InplaceOp2 for AddBias<'_> {
    fn name(&self) -> &'static str {
        "add-bias"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, x_l: &Layout, b: &CpuStorage, b_l: &Layout) -> Result<()> {
        let ((rows, width), (sets, bias_width)) = (x_l.shape().dims2()?, b_l.shape().dims2()?);
        if width != bias_width {
            bail!("a bias of {bias_width} numbers for rows of {width}");
        }
        let (x, biases) = (slice_mut(x, x_l)?, slice(b, b_l)?);
        for (set, rows) in by_set(sets, rows, self.depths) {
            let bias = &biases[set * width..][..width];
            for row in x[rows.start * width..rows.end * width].chunks_exact_mut(width) {
                row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
            }
        }
        Ok(())
    }
}

multiversion! {
    /// `sigmoid(weight . row + bias)`; the bias comes last.
    fn probe(row: &[f32], weights: &[f32]) -> f32 {
        let (weight, bias) = weights.split_at(row.len());
        1.0 / (1.0 + exp(-(dot(row, weight) + bias[0])))
    }

    /// `silu(weights row + bias)`, for weights `[out, row + 1]` with the bias last.
    fn silu_layer(row: &[f32], weights: &[f32], out: &mut [f32]) {
        for (out, weights) in out.iter_mut().zip(weights.chunks_exact(row.len() + 1)) {
            let (weight, bias) = weights.split_at(row.len());
            let x = dot(row, weight) + bias[0];
            *out = x / (1.0 + exp(-x));
        }
    }

    /// The cosine of two rows, 0 if one is zero, and the length of their difference relative to that of the second, 1 if
    /// that is zero.
    fn compared(before: &[f32], after: &[f32]) -> [f32; 2] {
        let length = dot(after, after);
        let norms = (dot(before, before) * length).sqrt();
        let similarity = if norms > 0.0 { dot(before, after) / norms } else { 0.0 };
        let difference = if length > 0.0 { (squared_distance(before, after) / length).sqrt() } else { 1.0 };
        [similarity, difference]
    }
}

/// How a row's state changes from one depth to the next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Cosine of the two states; 0 if one is zero.
    pub similarity: f32,
    /// Length of their difference, relative to that of the later state; 1 if that is zero.
    pub difference: f32,
}

impl Change {
    /// The change at depth 0, as from a state of zeros.
    pub const FROM_ZERO: Self = Self { similarity: 0.0, difference: 1.0 };

    /// Changes from the numbers that [`compare`] gives.
    pub fn of(numbers: &[f32]) -> Vec<Self> {
        numbers.chunks_exact(2).map(|pair| Self { similarity: pair[0], difference: pair[1] }).collect()
    }
}

/// Compares row `i` of `before` and row `i` of `after`, both `[rows, width]`: `[rows, 2]`, each row a [`Change`].
///
/// # Errors
/// If the shapes differ.
pub fn compare(before: &Tensor, after: &Tensor) -> Result<Tensor> {
    before.apply_op2_no_bwd(after, &Compare)
}

struct Compare;

impl CustomOp2 for Compare {
    fn name(&self) -> &'static str {
        "compare"
    }

    fn cpu_fwd(&self, a: &CpuStorage, a_l: &Layout, b: &CpuStorage, b_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = a_l.shape().dims2()?;
        if a_l.shape() != b_l.shape() {
            bail!("rows of {:?} and {:?} to compare: other shapes", a_l.shape(), b_l.shape());
        }
        let pairs = slice(a, a_l)?.chunks_exact(width).zip(slice(b, b_l)?.chunks_exact(width));
        Ok((CpuStorage::F32(pairs.flat_map(|(before, after)| compared(before, after)).collect()), (rows, 2).into()))
    }
}

/// A linear probe of each row of `x` `[rows, width]` with a sigmoid: `[rows]`. `probes` `[sets, width + 1]` has one for
/// all depths, or one for each, with its bias last.
///
/// # Errors
/// If the widths differ, or a depth has no probe.
pub fn probe_rows(x: &Tensor, probes: &Tensor, depths: &DepthRanges) -> Result<Tensor> {
    x.apply_op2_no_bwd(probes, &ProbeRows { depths })
}

struct ProbeRows<'a> {
    depths: &'a DepthRanges,
}

impl CustomOp2 for ProbeRows<'_> {
    fn name(&self) -> &'static str {
        "probe"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, p: &CpuStorage, p_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((rows, width), (sets, probe_width)) = (x_l.shape().dims2()?, p_l.shape().dims2()?);
        if probe_width != width + 1 {
            bail!("a probe of {probe_width} numbers for rows of {width}");
        }
        let (x, probes) = (slice(x, x_l)?, slice(p, p_l)?);
        let mut scores = Vec::with_capacity(rows);
        for (set, rows) in by_set(sets, rows, self.depths) {
            let Some(of_depth) = probes.get(set * probe_width..(set + 1) * probe_width) else {
                bail!("a row at depth {set}, there are {sets} probes");
            };
            let rows = x[rows.start * width..rows.end * width].chunks_exact(width);
            scores.extend(rows.map(|row| probe(row, of_depth)));
        }
        Ok((CpuStorage::F32(scores), rows.into()))
    }
}

/// A layer `silu(W x + b)` of each row of `x` `[rows, width]`: `[rows, inner]`. `layers` `[sets, inner, width + 1]` has
/// one for all depths, or one for each, with the bias last.
///
/// # Errors
/// If the widths differ, or a depth has no layer.
pub fn silu_rows(x: &Tensor, layers: &Tensor, depths: &DepthRanges) -> Result<Tensor> {
    x.apply_op2_no_bwd(layers, &SiluRows { depths })
}

struct SiluRows<'a> {
    depths: &'a DepthRanges,
}

impl CustomOp2 for SiluRows<'_> {
    fn name(&self) -> &'static str {
        "silu-layer"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, l: &CpuStorage, l_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((rows, width), (sets, inner, inputs)) = (x_l.shape().dims2()?, l_l.shape().dims3()?);
        if inputs != width + 1 {
            bail!("a layer of {inputs} numbers for rows of {width}");
        }
        let (x, layers) = (slice(x, x_l)?, slice(l, l_l)?);
        let mut out = vec![0.0; rows * inner];
        for (set, rows) in by_set(sets, rows, self.depths) {
            let Some(layer) = layers.get(set * inner * inputs..(set + 1) * inner * inputs) else {
                bail!("a row at depth {set}, there are {sets} layers");
            };
            let out = out[rows.start * inner..rows.end * inner].chunks_exact_mut(inner);
            for (row, out) in x[rows.start * width..rows.end * width].chunks_exact(width).zip(out) {
                silu_layer(row, layer, out);
            }
        }
        Ok((CpuStorage::F32(out), (rows, inner).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_change_is_the_cosine_and_the_difference_relative_to_the_later_state() {
        let rows = |numbers: &[f32]| Tensor::from_slice(numbers, (numbers.len() / 2, 2), &Device::Cpu).unwrap();
        let before = rows(&[3.0, 4.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]);
        let after = rows(&[6.0, 8.0, 1.0, 2.0, 0.0, 0.0, 0.0, 1.0]);
        let found = compare(&before, &after).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let change = |similarity, difference| Change { similarity, difference };
        let expected = [change(1.0, 0.5), Change::FROM_ZERO, change(0.0, 1.0), change(0.0, 2.0_f32.sqrt())];
        assert_eq!(Change::of(&found), expected);
        assert!(compare(&before, &rows(&[1.0, 2.0])).is_err());
    }

    #[test]
    fn a_small_difference_of_wide_states_keeps_its_digits() {
        // 1,000 numbers of 1, of which every tenth grows by 2^-10.
        let state =
            |step: f32| -> Vec<f32> { (0..1000).map(|at| if at % 10 == 0 { 1.0 + step } else { 1.0 }).collect() };
        let step = 2.0_f32.powi(-10);
        let [_, difference] = compared(&state(0.0), &state(step));
        let expected = (100.0 * f64::from(step).powi(2) / (900.0 + 100.0 * (1.0 + f64::from(step)).powi(2))).sqrt();
        assert!((f64::from(difference) / expected - 1.0).abs() < 1e-6, "{difference}, expected {expected}");
    }
}
