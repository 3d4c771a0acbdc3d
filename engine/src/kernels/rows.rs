//! Operations on each row by itself: gathering and scattering, norm, activation.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, InplaceOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::simd::{LANES, Lanes, exp, multiversion};
use super::{slice, slice_mut};

/// Numbers below which a second thread costs more than it saves.
const PARALLEL_NUMBERS: usize = 1 << 14;

/// Where a row comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A row of the first tensor.
    First(u32),
    /// A row of the second.
    Second(u32),
}

/// The rows `[sources, width]` that `sources` picks from two tensors `[_, width]`.
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

/// Copies row `i` of `rows` `[len, width]` to row `places[i]` of `target` `[_, width]`; rows without a place are left.
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

/// `x / rms(x) * weight` (arXiv 1910.07467).
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// A norm with weight `[width]`; `eps` is added to the mean square.
    pub fn new(weight: Tensor, eps: f32) -> Self {
        Self { weight, eps }
    }

    /// `[rows, width]` to the same.
    ///
    /// # Errors
    /// If `x` is of another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op2_no_bwd(&self.weight, self)
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (slice(x, x_l)?, slice(w, w_l)?);
        if x_l.shape().dims2()?.1 != weight.len() {
            bail!("the norm is {} wide, its input is {:?}", weight.len(), x_l.shape());
        }
        let mut normed = vec![0.0; x.len()];
        let rows = PARALLEL_NUMBERS.div_ceil(weight.len());
        each_chunk(x, &mut normed, rows * weight.len(), rows * weight.len(), |x, normed| {
            norm_rows(x, weight, self.eps, normed);
        });
        Ok((CpuStorage::F32(normed), x_l.shape().clone()))
    }
}

multiversion! {
    fn norm_rows(x: &[f32], weight: &[f32], eps: f32, normed: &mut [f32]) {
        let width = weight.len();
        for (x, normed) in x.chunks_exact(width).zip(normed.chunks_exact_mut(width)) {
            let scale = (dot(x, x) / width as f32 + eps).sqrt().recip();
            for ((normed, x), weight) in normed.iter_mut().zip(x).zip(weight) {
                *normed = x * scale * weight;
            }
        }
    }

    fn swiglu_rows(gate_up: &[f32], inner: usize, out: &mut [f32]) {
        for (gate_up, out) in gate_up.chunks_exact(2 * inner).zip(out.chunks_exact_mut(inner)) {
            let (gate, up) = gate_up.split_at(inner);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        }
    }

    /// The cosine of two rows, 0 if one is zero.
    fn cosine(a: &[f32], b: &[f32]) -> f32 {
        let norms = (dot(a, a) * dot(b, b)).sqrt();
        if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
    }
}

/// The sum of products, in a fixed order.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    let product = |a, b| Lanes::load(a).zip(Lanes::load(b), |a, b| a * b);
    a.zip(b).fold(Lanes::ZERO, |sum, (a, b)| sum.zip(product(a, b), |sum, ab| sum + ab)).reduce(|a, b| a + b) + rest
}

/// `silu(gate) * up` (arXiv 2002.05202) of `[rows, 2 * inner]`, gates first: `[rows, inner]`.
///
/// # Errors
/// If the width is odd.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    gate_up.apply_op1_no_bwd(&SwiGlu)
}

struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        let inner = width / 2;
        if width != 2 * inner {
            bail!("gates and ups are {width} together, expected an even number");
        }
        let mut out = vec![0.0; rows * inner];
        let chunk = PARALLEL_NUMBERS.div_ceil(4 * width);
        each_chunk(slice(gate_up, layout)?, &mut out, chunk * width, chunk * inner, |gate_up, out| {
            swiglu_rows(gate_up, inner, out);
        });
        Ok((CpuStorage::F32(out), (rows, inner).into()))
    }
}

/// Calls `kernel` on pieces of `x` and `out`, on several threads if there are several pieces.
fn each_chunk(x: &[f32], out: &mut [f32], x_len: usize, out_len: usize, kernel: impl Fn(&[f32], &mut [f32]) + Sync) {
    if x.len() <= x_len {
        kernel(x, out);
    } else {
        x.par_chunks(x_len).zip(out.par_chunks_mut(out_len)).for_each(|(x, out)| kernel(x, out));
    }
}

/// The cosine of row `i` of `a` and row `i` of `b`, both `[rows, width]`: `[rows]`; 0 where a row is zero.
///
/// # Errors
/// If the shapes differ.
pub fn cosines(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.apply_op2_no_bwd(b, &Cosines)
}

struct Cosines;

impl CustomOp2 for Cosines {
    fn name(&self) -> &'static str {
        "cosines"
    }

    fn cpu_fwd(&self, a: &CpuStorage, a_l: &Layout, b: &CpuStorage, b_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = a_l.shape().dims2()?;
        if a_l.shape() != b_l.shape() {
            bail!("cosines of {:?} and {:?}: other shapes", a_l.shape(), b_l.shape());
        }
        let pairs = slice(a, a_l)?.chunks_exact(width).zip(slice(b, b_l)?.chunks_exact(width));
        Ok((CpuStorage::F32(pairs.map(|(a, b)| cosine(a, b)).collect()), rows.into()))
    }
}
