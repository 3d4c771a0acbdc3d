//! Norms of rows, and of the heads of queries and keys.

use candle_core::{CpuStorage, CustomOp2, InplaceOp2, InplaceOp3, Layout, Result, Shape, Tensor, bail};

use super::simd::{LANES, Lanes, dot, multiversion};
use super::{DepthRanges, by_set, each_chunk, each_chunk_mut, slice, slice_mut};
use crate::config::Norm as Kind;

/// Numbers below which a second thread does not pay.
const PARALLEL_NUMBERS: usize = 1 << 14;

/// A norm of rows, with one set of vectors for all depths, or one for each.
#[derive(Clone, Debug)]
pub struct Norm {
    /// `[sets, weights]`, or with layer norm `[sets, weights and biases]`.
    vectors: Tensor,
    formula: Formula,
}

/// Formula of a norm.
#[derive(Clone, Copy, Debug)]
struct Formula {
    kind: Kind,
    eps: f32,
    width: usize,
}

impl Formula {
    /// Numbers of one set of vectors.
    fn numbers(&self) -> usize {
        match self.kind {
            Kind::Rms => self.width,
            Kind::Layer => 2 * self.width,
        }
    }

    /// Checks the number of vectors and returns the number of sets.
    fn sets(&self, vectors: usize) -> Result<usize> {
        match vectors.is_multiple_of(self.numbers()) {
            true => Ok(vectors / self.numbers()),
            false => bail!("{vectors} weights for a norm of width {}", self.width),
        }
    }
}

impl Norm {
    /// A norm of rows of `width` numbers; `eps` is added to the mean square, or variance. `vectors` `[sets, _]` has one
    /// set for all depths, or one for each: `width` weights, and for layer norm `width` biases.
    pub fn new(vectors: Tensor, kind: Kind, eps: f32, width: usize) -> Self {
        Self { vectors, formula: Formula { kind, eps, width } }
    }

    /// The normed rows of `x`, `[rows, width]`.
    ///
    /// # Errors
    /// If `x` has another width.
    pub fn forward(&self, x: &Tensor, depths: &DepthRanges) -> Result<Tensor> {
        x.apply_op2_no_bwd(&self.vectors, &Normed { formula: self.formula, depths })
    }

    /// Norms the rows of `x`, `[rows, width]`, in place.
    ///
    /// # Errors
    /// If `x` has another width.
    pub fn apply(&self, x: &Tensor, depths: &DepthRanges) -> Result<()> {
        x.inplace_op2(&self.vectors, &Normed { formula: self.formula, depths })
    }

    /// Adds the normed rows of `x` to those of `y`, both `[rows, width]`.
    ///
    /// # Errors
    /// If a tensor has another shape.
    pub fn add_to(&self, y: &Tensor, x: &Tensor, depths: &DepthRanges) -> Result<()> {
        y.inplace_op3(x, &self.vectors, &Normed { formula: self.formula, depths })
    }
}

struct Normed<'a> {
    formula: Formula,
    depths: &'a DepthRanges,
}

impl Normed<'_> {
    fn run(&self, x: &[f32], vectors: &[f32], out: &mut [f32], add: bool) -> Result<()> {
        let width = self.formula.width;
        if !x.len().is_multiple_of(width) || x.len() != out.len() {
            bail!("the norm is {width} wide, its input holds {} numbers, its output {}", x.len(), out.len());
        }
        let chunk = PARALLEL_NUMBERS.div_ceil(width) * width;
        for (set, rows) in by_set(self.formula.sets(vectors.len())?, x.len() / width, self.depths) {
            let numbers = rows.start * width..rows.end * width;
            let vectors = &vectors[set * self.formula.numbers()..][..self.formula.numbers()];
            each_chunk(&x[numbers.clone()], &mut out[numbers], chunk, chunk, |x, out| {
                norm_rows(x, vectors, self.formula, out, add);
            });
        }
        Ok(())
    }
}

impl CustomOp2 for Normed<'_> {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, x_l)?;
        let mut normed = vec![0.0; x.len()];
        self.run(x, slice(w, w_l)?, &mut normed, false)?;
        Ok((CpuStorage::F32(normed), x_l.shape().clone()))
    }
}

impl InplaceOp2 for Normed<'_> {
    fn name(&self) -> &'static str {
        "norm-in-place"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<()> {
        let (x, vectors) = (slice_mut(x, x_l)?, slice(w, w_l)?);
        let (width, numbers) = (self.formula.width, self.formula.numbers());
        if !x.len().is_multiple_of(width) {
            bail!("the norm is {width} wide, its input holds {} numbers", x.len());
        }
        let chunk = PARALLEL_NUMBERS.div_ceil(width) * width;
        for (set, rows) in by_set(self.formula.sets(vectors.len())?, x.len() / width, self.depths) {
            let vectors = &vectors[set * numbers..][..numbers];
            let rows = &mut x[rows.start * width..rows.end * width];
            each_chunk_mut(rows, chunk, |rows| norm_in_place(rows, vectors, self.formula));
        }
        Ok(())
    }
}

impl InplaceOp3 for Normed<'_> {
    fn name(&self) -> &'static str {
        "add-norm"
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
        self.run(slice(x, x_l)?, slice(w, w_l)?, slice_mut(y, y_l)?, true)
    }
}

multiversion! {
    /// Norms rows, which replace those of `out` or are added to them.
    fn norm_rows(x: &[f32], vectors: &[f32], formula: Formula, out: &mut [f32], add: bool) {
        match add {
            false => norm_each(x, vectors, formula, out, |out, normed| *out = normed),
            true => norm_each(x, vectors, formula, out, |out, normed| *out += normed),
        }
    }

    /// Norms rows in place.
    fn norm_in_place(rows: &mut [f32], vectors: &[f32], formula: Formula) {
        let mut before = vec![0.0; formula.width];
        for row in rows.chunks_exact_mut(formula.width) {
            before.copy_from_slice(row);
            norm_each(&before, vectors, formula, row, |out, normed| *out = normed);
        }
    }
}

#[inline(always)]
fn norm_each(x: &[f32], vectors: &[f32], formula: Formula, out: &mut [f32], put: impl Fn(&mut f32, f32)) {
    let Formula { kind, eps, width } = formula;
    let (weight, bias) = vectors.split_at(width);
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        match kind {
            Kind::Rms => {
                let scale = (dot(x, x) / width as f32 + eps).sqrt().recip();
                for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                    put(out, x * scale * weight);
                }
            }
            Kind::Layer => {
                let (mean, variance) = moments(x);
                let scale = (variance + eps).sqrt().recip();
                for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                    put(out, (x - mean) * scale * weight + bias);
                }
            }
        }
    }
}

/// Mean and variance.
#[inline(always)]
fn moments(x: &[f32]) -> (f32, f32) {
    let mean = sum_of(x, |x| x) / x.len() as f32;
    (mean, sum_of(x, |x| (x - mean) * (x - mean)) / x.len() as f32)
}

/// The sum of a term for each number, in a fixed order.
#[inline(always)]
fn sum_of(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let chunks = x.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|&x| term(x)).sum();
    let add = |sum: Lanes, chunk| sum.zip(Lanes::load(chunk), |sum, x| sum + term(x));
    chunks.fold(Lanes::ZERO, add).reduce(|a, b| a + b) + rest
}

/// Norms of each head of queries and keys.
#[derive(Clone, Debug)]
pub struct HeadNorm {
    /// `[sets, _]`: the vectors for queries, then those for keys.
    vectors: Tensor,
    formula: Formula,
    query_heads: usize,
    key_heads: usize,
}

impl HeadNorm {
    /// Norms of heads of `head_dim`. `vectors` has sets as in [`Norm::new`], each with those for queries, then those
    /// for keys.
    pub fn new(vectors: Tensor, kind: Kind, eps: f32, head_dim: usize, query_heads: usize, key_heads: usize) -> Self {
        Self { vectors, formula: Formula { kind, eps, width: head_dim }, query_heads, key_heads }
    }

    /// Norms queries and keys of `qkv` `[rows, (query_heads + 2 key_heads) * head_dim]` in place.
    ///
    /// # Errors
    /// If `qkv` has another width.
    pub fn apply(&self, qkv: &Tensor, depths: &DepthRanges) -> Result<()> {
        qkv.inplace_op2(&self.vectors, &NormHeads { norm: self, depths })
    }
}

struct NormHeads<'a> {
    norm: &'a HeadNorm,
    depths: &'a DepthRanges,
}

impl InplaceOp2 for NormHeads<'_> {
    fn name(&self) -> &'static str {
        "norm-heads"
    }

    fn cpu_fwd(&self, qkv: &mut CpuStorage, q_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<()> {
        let &HeadNorm { formula, query_heads, key_heads, .. } = self.norm;
        let (queries, keys) = (query_heads * formula.width, key_heads * formula.width);
        let (rows, width) = q_l.shape().dims2()?;
        if width != queries + 2 * keys {
            bail!("queries, keys and values are {width} wide, expected {}", queries + 2 * keys);
        }
        let (qkv, vectors) = (slice_mut(qkv, q_l)?, slice(w, w_l)?);
        let set_numbers = 2 * formula.numbers();
        for (set, rows) in by_set(formula.sets(vectors.len())? / 2, rows, self.depths) {
            let (of_queries, of_keys) = vectors[set * set_numbers..][..set_numbers].split_at(formula.numbers());
            let qkv = &mut qkv[rows.start * width..rows.end * width];
            each_chunk_mut(qkv, PARALLEL_NUMBERS.div_ceil(width) * width, |qkv| {
                for row in qkv.chunks_exact_mut(width) {
                    let (row_queries, rest) = row.split_at_mut(queries);
                    norm_in_place(row_queries, of_queries, formula);
                    norm_in_place(&mut rest[..keys], of_keys, formula);
                }
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn tensor(rows: usize, width: usize, number: impl Fn(usize) -> f32) -> Tensor {
        Tensor::from_iter((0..rows * width).map(number), &Device::Cpu).unwrap().reshape((rows, width)).unwrap()
    }

    /// A row by the formula.
    fn expected(kind: Kind, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
        let mean = match kind {
            Kind::Rms => 0.0,
            Kind::Layer => x.iter().sum::<f32>() / x.len() as f32,
        };
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / x.len() as f32;
        let normed = x.iter().map(|x| (x - mean) / (variance + 0.1).sqrt());
        match kind {
            Kind::Rms => normed.zip(weight).map(|(x, weight)| x * weight).collect(),
            Kind::Layer => normed.zip(weight).zip(bias).map(|((x, weight), bias)| x * weight + bias).collect(),
        }
    }

    fn assert_close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
        }
    }

    #[test]
    fn each_depth_is_normed_by_its_own_vectors_and_can_be_added() {
        let width = 37;
        for (kind, numbers) in [(Kind::Rms, width), (Kind::Layer, 2 * width)] {
            let x = tensor(5, width, |i| (i * i % 23) as f32 - 9.0);
            let vectors = tensor(3, numbers, |i| (i % 7) as f32 - 2.5);
            let norm = Norm::new(vectors.clone(), kind, 0.1, width);
            let depths = [(0, 0..2), (2, 2..5)];
            let found = norm.forward(&x, &depths).unwrap().to_vec2::<f32>().unwrap();
            let sum = tensor(5, width, |i| i as f32);
            norm.add_to(&sum, &x, &depths).unwrap();
            let sum = sum.to_vec2::<f32>().unwrap();
            let (x, vectors) = (x.to_vec2::<f32>().unwrap(), vectors.to_vec2::<f32>().unwrap());
            for row in 0..5 {
                let (weight, bias) = vectors[if row < 2 { 0 } else { 2 }].split_at(width);
                let expected = expected(kind, &x[row], weight, bias);
                assert_close(&found[row], &expected);
                let added = expected.iter().enumerate().map(|(i, x)| (row * width + i) as f32 + x);
                assert_close(&sum[row], &added.collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn heads_of_queries_and_keys_are_normed_and_values_are_left() {
        let (dim, heads, kv_heads) = (6, 2, 1);
        let qkv = tensor(3, dim * 4, |i| (i * 5 % 11) as f32 - 4.0);
        let before = qkv.to_vec2::<f32>().unwrap();
        let vectors = tensor(1, 2 * dim, |i| 1.0 + i as f32);
        let weights = vectors.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        HeadNorm::new(vectors, Kind::Rms, 0.1, dim, heads, kv_heads).apply(&qkv, &[(1, 0..3)]).unwrap();
        for (row, before) in qkv.to_vec2::<f32>().unwrap().iter().zip(&before) {
            for head in 0..heads + kv_heads {
                let place = head * dim..(head + 1) * dim;
                let weight = if head < heads { &weights[..dim] } else { &weights[dim..] };
                assert_close(&row[place.clone()], &expected(Kind::Rms, &before[place], weight, &[]));
            }
            assert_eq!(row[3 * dim..], before[3 * dim..]);
        }
    }
}
