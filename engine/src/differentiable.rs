//! Operations of the reference model with hand-written gradients, each in one pass over memory.
//!
//! candle composes these operations from elementwise steps that each write a tensor, and its fused versions have no
//! gradient. All operations take contiguous `f32` tensors. On the CPU, they run on the calling thread; on other
//! devices, they are composed.

mod composed;

use std::ops::Range;
use std::sync::Arc;

use candle_core::cpu::erf::erf_f32;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use crate::config::Activation;

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension of `[rows, n]`.
///
/// # Errors
/// If the shapes do not match.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    match x.device().is_cpu() {
        true => x.apply_op2(weight, RmsNorm { eps }),
        false => composed::rms_norm(x, weight, eps),
    }
}

/// `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` over the last dimension of `[rows, n]`.
///
/// # Errors
/// If the shapes do not match.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    match x.device().is_cpu() {
        true => x.apply_op3(weight, bias, LayerNorm { eps }),
        false => composed::layer_norm(x, weight, bias, eps),
    }
}

/// Softmax of `scale * scores`, `[.., seq, seq]`, over the keys up to the query and, with a `window`, among the latest
/// `window` of them.
///
/// # Errors
/// If the last two dimensions differ.
pub fn causal_softmax(scores: &Tensor, scale: f32, window: Option<usize>) -> Result<Tensor> {
    match scores.device().is_cpu() {
        true => scores.apply_op1(CausalSoftmax::new(scale, window)),
        false => composed::causal_softmax(scores, scale, window),
    }
}

/// [`causal_softmax`] where each query's score of its own key is `own` `[.., seq]` higher: other queries may find
/// another key in its place.
///
/// # Errors
/// If the shapes do not match.
pub fn causal_softmax_with_own(scores: &Tensor, own: &Tensor, scale: f32, window: Option<usize>) -> Result<Tensor> {
    match scores.device().is_cpu() {
        true => scores.apply_op2(own, CausalSoftmaxWithOwn(CausalSoftmax::new(scale, window))),
        false => composed::causal_softmax_with_own(scores, own, scale, window),
    }
}

/// [`causal_softmax`] of `scores` `[batch, heads, seq, seq]` among the keys that are `present` `[batch, seq]`, not 0,
/// and the query's own.
///
/// # Errors
/// If the shapes do not match, or `present` is not of type `u8`.
pub fn causal_softmax_among(scores: &Tensor, present: &Tensor, scale: f32, window: Option<usize>) -> Result<Tensor> {
    match scores.device().is_cpu() {
        true => scores.apply_op2(present, CausalSoftmaxAmong(CausalSoftmax::new(scale, window))),
        false => composed::causal_softmax_among(scores, present, scale, window),
    }
}

/// The diagonals `[.., seq]` of `x` `[.., seq, seq]`.
///
/// # Errors
/// If the last two dimensions differ.
pub fn diagonal(x: &Tensor) -> Result<Tensor> {
    match x.device().is_cpu() {
        true => x.apply_op1(Diagonal),
        false => composed::diagonal(x),
    }
}

/// `activation(gate) * up`, elementwise.
///
/// # Errors
/// If the shapes differ.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    match gate.device().is_cpu() {
        true => gate.apply_op2(up, Gated(activation)),
        false => composed::gated(gate, up, activation),
    }
}

/// Rotates the pairs (`i`, `i + pairs`) of `[.., seq, head_dim]` by the angle of their position. Dimensions from `2 *
/// pairs` on do not change.
///
/// # Errors
/// If `turns` has fewer positions or more dimensions than `x`.
pub fn rotate(x: &Tensor, turns: &Turns) -> Result<Tensor> {
    match x.device().is_cpu() {
        true => x.apply_op1(Rotate { turns: turns.clone(), direction: 1.0 }),
        false => composed::rotate(x, turns),
    }
}

/// Rotations of a rotary position embedding (arXiv 2104.09864).
#[derive(Clone)]
pub struct Turns {
    /// Number of rotated pairs of dimensions.
    pairs: usize,
    /// Cosine and sine of the angle at `[position][pair]`.
    table: Arc<[(f32, f32)]>,
}

impl Turns {
    /// The rotations at positions from 0 to `positions`, of pairs with these frequencies in radians per position.
    pub fn new(frequencies: &[f32], positions: usize) -> Self {
        let turn = |position| {
            frequencies.iter().map(move |frequency| {
                let (sin, cos) = (position as f32 * frequency).sin_cos();
                (cos, sin)
            })
        };
        Self { pairs: frequencies.len(), table: (0..positions).flat_map(turn).collect() }
    }
}

/// The numbers of a contiguous `f32` tensor.
///
/// # Errors
/// If the tensor is not contiguous or not `f32`.
pub fn numbers<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a tensor of layout {layout:?}, expected a contiguous one"),
    }
}

fn last_dim(layout: &Layout) -> usize {
    layout.dims().last().copied().unwrap_or(1)
}

/// `e^x` to about one unit in the last place for `x` in -87..88, clamped outside. The code vectorizes; the polynomial
/// is that of Cephes' `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUNDER: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUNDER;
    let whole = shifted - ROUNDER;
    let rest = x - whole * 0.693_359_4 + whole * 2.121_944_4e-4;
    let mut tail = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        tail = tail * rest + coefficient;
    }
    let power = (shifted.to_bits() as i32 - ROUNDER.to_bits() as i32 + 127) << 23;
    (tail * rest * rest + rest + 1.0) * f32::from_bits(power as u32)
}

const LANES: usize = 16;

/// Sum of `term(a, b)` over two slices of equal length, in lanes so that it vectorizes.
#[inline(always)]
pub fn sum_over(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane]);
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| term(*a, *b)).sum();
    lanes.iter().sum::<f32>() + rest
}

/// The largest number of a slice, in lanes so that it vectorizes.
#[inline(always)]
pub fn max_of(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = larger(chunk[lane], lanes[lane]);
        }
    }
    let of_rest = rest.iter().copied().fold(f32::NEG_INFINITY, larger);
    lanes.into_iter().fold(of_rest, larger)
}

struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    fn inverse_rms(&self, x: &[f32]) -> f32 {
        (sum_over(x, x, |a, b| a * b) / x.len() as f32 + self.eps).sqrt().recip()
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (numbers(x, x_layout)?, numbers(weight, weight_layout)?);
        let n = last_dim(x_layout);
        if weight.len() != n {
            candle_core::bail!("rms-norm: {} weights for rows of {n}", weight.len());
        }
        let mut y = vec![0.0; x.len()];
        for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
            let inverse = self.inverse_rms(x);
            for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                *y = x * inverse * weight;
            }
        }
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (rows, n) = x.dims2()?;
        let eps = self.eps;
        let both = x.apply_op3_no_bwd(weight, &grad.contiguous()?, &RmsNormGradient(Self { eps }))?;
        let of_weight = both.narrow(0, rows, 1)?.reshape(n)?;
        Ok((Some(both.narrow(0, 0, rows)?), Some(of_weight)))
    }
}

/// From `x`, `weight` and the gradient of the result: the gradient of `x` and, as one more row, that of `weight`.
struct RmsNormGradient(RmsNorm);

impl CustomOp3 for RmsNormGradient {
    fn name(&self) -> &'static str {
        "rms-norm-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (numbers(x, x_layout)?, numbers(weight, weight_layout)?);
        let grad = numbers(grad, grad_layout)?;
        let n = last_dim(x_layout);
        let mut out = vec![0.0; x.len() + n];
        let (of_x, of_weight) = out.split_at_mut(x.len());
        let mut weighted = vec![0.0; n];
        for ((x, grad), of_x) in x.chunks_exact(n).zip(grad.chunks_exact(n)).zip(of_x.chunks_exact_mut(n)) {
            let inverse = self.0.inverse_rms(x);
            for i in 0..n {
                weighted[i] = grad[i] * weight[i];
                of_weight[i] += grad[i] * x[i] * inverse;
            }
            let along = sum_over(&weighted, x, |a, b| a * b) * inverse * inverse / n as f32;
            for i in 0..n {
                of_x[i] = inverse * (weighted[i] - x[i] * along);
            }
        }
        let rows = x.len() / n + 1;
        Ok((CpuStorage::F32(out), Shape::from((rows, n))))
    }
}

struct LayerNorm {
    eps: f32,
}

impl LayerNorm {
    /// Mean and inverse deviation.
    fn moments(&self, x: &[f32]) -> (f32, f32) {
        let n = x.len() as f32;
        let mean = sum_over(x, x, |a, _| a) / n;
        let variance = sum_over(x, x, |a, b| (a - mean) * (b - mean)) / n;
        (mean, (variance + self.eps).sqrt().recip())
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, bias) = (numbers(x, x_layout)?, numbers(weight, weight_layout)?, numbers(bias, bias_layout)?);
        let n = last_dim(x_layout);
        if (weight.len(), bias.len()) != (n, n) {
            candle_core::bail!("layer-norm: {} weights and {} biases for rows of {n}", weight.len(), bias.len());
        }
        let mut y = vec![0.0; x.len()];
        for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
            let (mean, inverse) = self.moments(x);
            for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                *y = (x - mean) * inverse * weight + bias;
            }
        }
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (rows, n) = x.dims2()?;
        let eps = self.eps;
        let all = x.apply_op3_no_bwd(weight, &grad.contiguous()?, &LayerNormGradient(Self { eps }))?;
        let row = |row| all.narrow(0, row, 1)?.reshape(n);
        Ok((Some(all.narrow(0, 0, rows)?), Some(row(rows)?), Some(row(rows + 1)?)))
    }
}

/// From `x`, `weight` and the gradient of the result: the gradient of `x` and, as two more rows, those of `weight` and
/// bias.
struct LayerNormGradient(LayerNorm);

impl CustomOp3 for LayerNormGradient {
    fn name(&self) -> &'static str {
        "layer-norm-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (numbers(x, x_layout)?, numbers(weight, weight_layout)?);
        let grad = numbers(grad, grad_layout)?;
        let n = last_dim(x_layout);
        let mut out = vec![0.0; x.len() + 2 * n];
        let (of_x, of_vectors) = out.split_at_mut(x.len());
        let (of_weight, of_bias) = of_vectors.split_at_mut(n);
        let (mut normed, mut weighted) = (vec![0.0; n], vec![0.0; n]);
        for ((x, grad), of_x) in x.chunks_exact(n).zip(grad.chunks_exact(n)).zip(of_x.chunks_exact_mut(n)) {
            let (mean, inverse) = self.0.moments(x);
            for i in 0..n {
                normed[i] = (x[i] - mean) * inverse;
                weighted[i] = grad[i] * weight[i];
                of_weight[i] += grad[i] * normed[i];
                of_bias[i] += grad[i];
            }
            let along = sum_over(&weighted, &normed, |a, b| a * b) / n as f32;
            let mean = sum_over(&weighted, &weighted, |a, _| a) / n as f32;
            for i in 0..n {
                of_x[i] = inverse * (weighted[i] - mean - normed[i] * along);
            }
        }
        let rows = x.len() / n + 2;
        Ok((CpuStorage::F32(out), Shape::from((rows, n))))
    }
}

#[derive(Clone, Copy)]
struct CausalSoftmax {
    scale: f32,
    window: usize,
}

impl CausalSoftmax {
    fn new(scale: f32, window: Option<usize>) -> Self {
        Self { scale, window: window.unwrap_or(usize::MAX) }
    }

    /// The keys that a query attends to.
    fn visible(&self, query: usize) -> Range<usize> {
        (query + 1).saturating_sub(self.window)..query + 1
    }

    /// Weights of a query's visible keys. `prepare` may change their scores, which are copied to the weights before.
    #[inline(always)]
    fn row(&self, scores: &[f32], weights: &mut [f32], prepare: impl FnOnce(&mut [f32])) {
        weights.copy_from_slice(scores);
        prepare(weights);
        let max = max_of(weights);
        for weight in &mut *weights {
            *weight = exp((*weight - max) * self.scale);
        }
        let inverse = sum_over(weights, weights, |a, _| a).recip();
        weights.iter_mut().for_each(|weight| *weight *= inverse);
    }
}

/// The last dimension of matrices `[.., seq, seq]`.
fn square(layout: &Layout, operation: &str) -> Result<usize> {
    let seq = last_dim(layout);
    match layout.dims().ends_with(&[seq, seq]) {
        true => Ok(seq),
        false => candle_core::bail!("{operation}: {:?}, expected [.., seq, seq]", layout.dims()),
    }
}

impl CustomOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (scores, seq) = (numbers(scores, layout)?, square(layout, "causal-softmax")?);
        let mut weights = vec![0.0; scores.len()];
        let rows = scores.chunks_exact(seq).zip(weights.chunks_exact_mut(seq));
        for (row, (scores, weights)) in rows.enumerate() {
            let visible = self.visible(row % seq);
            let (scores, weights) = (&scores[visible.clone()], &mut weights[visible]);
            let max = max_of(scores);
            for (weight, score) in weights.iter_mut().zip(scores) {
                *weight = exp((score - max) * self.scale);
            }
            let inverse = sum_over(weights, weights, |a, _| a).recip();
            weights.iter_mut().for_each(|weight| *weight *= inverse);
        }
        Ok((CpuStorage::F32(weights), layout.shape().clone()))
    }

    fn bwd(&self, _scores: &Tensor, weights: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(weights.apply_op2_no_bwd(&grad.contiguous()?, &CausalSoftmaxGradient(*self))?))
    }
}

struct CausalSoftmaxGradient(CausalSoftmax);

impl CustomOp2 for CausalSoftmaxGradient {
    fn name(&self) -> &'static str {
        "causal-softmax-gradient"
    }

    fn cpu_fwd(
        &self,
        weights: &CpuStorage,
        layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (weights, grad) = (numbers(weights, layout)?, numbers(grad, grad_layout)?);
        let seq = last_dim(layout);
        let mut of_scores = vec![0.0; weights.len()];
        let rows = weights.chunks_exact(seq).zip(grad.chunks_exact(seq)).zip(of_scores.chunks_exact_mut(seq));
        for (row, ((weights, grad), of_scores)) in rows.enumerate() {
            let visible = self.0.visible(row % seq);
            let (weights, grad) = (&weights[visible.clone()], &grad[visible.clone()]);
            let mean = sum_over(weights, grad, |a, b| a * b);
            for ((of_score, weight), grad) in of_scores[visible].iter_mut().zip(weights).zip(grad) {
                *of_score = self.0.scale * weight * (grad - mean);
            }
        }
        Ok((CpuStorage::F32(of_scores), layout.shape().clone()))
    }
}

/// [`CausalSoftmax`] whose diagonal scores are higher by a second argument.
struct CausalSoftmaxWithOwn(CausalSoftmax);

impl CustomOp2 for CausalSoftmaxWithOwn {
    fn name(&self) -> &'static str {
        "causal-softmax-with-own"
    }

    fn cpu_fwd(
        &self,
        scores: &CpuStorage,
        layout: &Layout,
        own: &CpuStorage,
        own_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (scores, seq) = (numbers(scores, layout)?, square(layout, self.name())?);
        let own = numbers(own, own_layout)?;
        if own.len() * seq != scores.len() {
            candle_core::bail!("{}: {:?} for {:?}", self.name(), own_layout.dims(), layout.dims());
        }
        let mut weights = vec![0.0; scores.len()];
        let rows = scores.chunks_exact(seq).zip(weights.chunks_exact_mut(seq)).zip(own);
        for (row, ((scores, weights), own)) in rows.enumerate() {
            let visible = self.0.visible(row % seq);
            let last = visible.len() - 1;
            self.0.row(&scores[visible.clone()], &mut weights[visible], |scores| scores[last] += own);
        }
        Ok((CpuStorage::F32(weights), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, weights: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let of_scores = weights.apply_op2_no_bwd(&grad.contiguous()?, &CausalSoftmaxGradient(self.0))?;
        let of_own = of_scores.apply_op1_no_bwd(&Diagonal)?;
        Ok((Some(of_scores), Some(of_own)))
    }
}

/// [`CausalSoftmax`] among the keys that a second argument does not exclude.
struct CausalSoftmaxAmong(CausalSoftmax);

impl CustomOp2 for CausalSoftmaxAmong {
    fn name(&self) -> &'static str {
        "causal-softmax-among"
    }

    fn cpu_fwd(
        &self,
        scores: &CpuStorage,
        layout: &Layout,
        present: &CpuStorage,
        present_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (scores, seq) = (numbers(scores, layout)?, square(layout, self.name())?);
        let (batch, keys) = present_layout.shape().dims2()?;
        let Some((start, end)) = present_layout.contiguous_offsets().filter(|_| keys == seq) else {
            candle_core::bail!("{}: {:?} for {:?}", self.name(), present_layout.dims(), layout.dims());
        };
        let present = &present.as_slice::<u8>()?[start..end];
        let mut weights = vec![0.0; scores.len()];
        let rows_of_batch = scores.len() / seq / batch;
        let rows = scores.chunks_exact(seq).zip(weights.chunks_exact_mut(seq));
        for (row, (scores, weights)) in rows.enumerate() {
            let visible = self.0.visible(row % seq);
            let before = &present[row / rows_of_batch * seq..][visible.start..visible.end - 1];
            self.0.row(&scores[visible.clone()], &mut weights[visible.clone()], |scores| {
                for (score, present) in scores.iter_mut().zip(before) {
                    *score = if *present == 0 { f32::NEG_INFINITY } else { *score };
                }
            });
            // The exponential of negative infinity is clamped to a small number.
            for (weight, present) in weights[visible].iter_mut().zip(before) {
                *weight = if *present == 0 { 0.0 } else { *weight };
            }
        }
        Ok((CpuStorage::F32(weights), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, weights: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        // The weight of an excluded key is 0, and so is its gradient.
        Ok((Some(weights.apply_op2_no_bwd(&grad.contiguous()?, &CausalSoftmaxGradient(self.0))?), None))
    }
}

struct Diagonal;

impl CustomOp1 for Diagonal {
    fn name(&self) -> &'static str {
        "diagonal"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, seq) = (numbers(x, layout)?, square(layout, self.name())?);
        let diagonal = x.chunks_exact(seq).enumerate().map(|(row, x)| x[row % seq]).collect();
        Ok((CpuStorage::F32(diagonal), Shape::from(&layout.dims()[..layout.dims().len() - 1])))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&OnDiagonal)?))
    }
}

/// From `[.., seq]` the matrices `[.., seq, seq]` with these diagonals and zeros.
struct OnDiagonal;

impl CustomOp1 for OnDiagonal {
    fn name(&self) -> &'static str {
        "on-diagonal"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, seq) = (numbers(x, layout)?, last_dim(layout));
        let mut matrices = vec![0.0; x.len() * seq];
        for (row, (matrix_row, x)) in matrices.chunks_exact_mut(seq).zip(x).enumerate() {
            matrix_row[row % seq] = *x;
        }
        Ok((CpuStorage::F32(matrices), Shape::from([layout.dims(), &[seq]].concat())))
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x sigmoid(x)` and its slope.
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let share = sigmoid(x);
    (x * share, share * (1.0 + x * (1.0 - share)))
}

/// `x Phi(x)`, with the normal distribution `Phi`, and its slope.
#[inline(always)]
fn gelu(x: f32) -> (f32, f32) {
    let below = 0.5 * (1.0 + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2));
    let density = 0.5 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2 * exp(-0.5 * x * x);
    (x * below, below + x * density)
}

/// `x (1 + tanh(u)) / 2` with `u = sqrt(2 / pi) (x + 0.044715 x^3)`, and its slope; `(1 + tanh(u)) / 2` is
/// `sigmoid(2 u)`.
#[inline(always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    const CUBIC: f32 = 0.044715;
    let twice = 2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
    let share = sigmoid(twice * (x + CUBIC * x * x * x));
    (x * share, share + x * share * (1.0 - share) * twice * (1.0 + 3.0 * CUBIC * x * x))
}

struct Gated(Activation);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if gate_layout.shape() != up_layout.shape() {
            let (gate, up) = (gate_layout.dims(), up_layout.dims());
            candle_core::bail!("gated: gate {gate:?} but up {up:?}");
        }
        let (gate, up) = (numbers(gate, gate_layout)?, numbers(up, up_layout)?);
        let y = match self.0 {
            Activation::Silu => gated_values(silu, gate, up),
            Activation::Gelu => gated_values(gelu, gate, up),
            Activation::GeluTanh => gated_values(gelu_tanh, gate, up),
        };
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let both = gate.apply_op3_no_bwd(up, &grad.contiguous()?, &GatedGradient(self.0))?;
        Ok((Some(both.get(0)?), Some(both.get(1)?)))
    }
}

fn gated_values(curve: impl Fn(f32) -> (f32, f32), gate: &[f32], up: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; gate.len()];
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        *y = curve(*gate).0 * up;
    }
    y
}

/// From `gate`, `up` and the gradient of the result: the gradients of `gate` and `up`, stacked.
struct GatedGradient(Activation);

impl CustomOp3 for GatedGradient {
    fn name(&self) -> &'static str {
        "gated-gradient"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (numbers(gate, gate_layout)?, numbers(up, up_layout)?);
        let grad = numbers(grad, grad_layout)?;
        let out = match self.0 {
            Activation::Silu => gated_gradients(silu, gate, up, grad),
            Activation::Gelu => gated_gradients(gelu, gate, up, grad),
            Activation::GeluTanh => gated_gradients(gelu_tanh, gate, up, grad),
        };
        let dims = [&[2], gate_layout.dims()].concat();
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }
}

fn gated_gradients(curve: impl Fn(f32) -> (f32, f32), gate: &[f32], up: &[f32], grad: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; 2 * gate.len()];
    let (of_gate, of_up) = out.split_at_mut(gate.len());
    for ((((of_gate, of_up), gate), up), grad) in of_gate.iter_mut().zip(of_up).zip(gate).zip(up).zip(grad) {
        let (value, slope) = curve(*gate);
        *of_gate = grad * up * slope;
        *of_up = grad * value;
    }
    out
}

struct Rotate {
    turns: Turns,
    /// 1 for the rotation, -1 for its inverse.
    direction: f32,
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = numbers(x, layout)?;
        let &[.., seq, head_dim] = layout.dims() else {
            candle_core::bail!("rotate: {:?}, expected [.., seq, head_dim]", layout.dims());
        };
        let Turns { pairs, ref table } = self.turns;
        if table.len() < seq * pairs || head_dim < 2 * pairs {
            candle_core::bail!("rotate: {} turns of {pairs} pairs for {seq} x {head_dim}", table.len());
        }
        let mut y = x.to_vec();
        for (row, (x, y)) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)).enumerate() {
            for (i, (cos, sin)) in table[row % seq * pairs..][..pairs].iter().enumerate() {
                let sin = sin * self.direction;
                y[i] = x[i] * cos - x[i + pairs] * sin;
                y[i + pairs] = x[i + pairs] * cos + x[i] * sin;
            }
        }
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Self { turns: self.turns.clone(), direction: -self.direction };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&back)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn random(dims: &[usize]) -> Var {
        Var::rand(-2f32, 2f32, dims, &Device::Cpu).unwrap()
    }

    fn assert_close(found: &Tensor, expected: &Tensor) {
        assert_eq!(found.dims(), expected.dims());
        let worst = (found - expected).unwrap().abs().unwrap();
        let worst = worst.flatten_all().unwrap().max(0).unwrap();
        assert!(worst.to_scalar::<f32>().unwrap() < 1e-5, "{found} is not {expected}");
    }

    /// Checks results and gradients, under a loss with a different weight for every number.
    fn assert_same(found: &Tensor, expected: &Tensor, inputs: &[&Var]) {
        assert_close(found, expected);
        let slope = random(found.dims());
        let gradients = |y: &Tensor| (y * slope.as_tensor()).unwrap().backward().unwrap();
        let (found, expected) = (gradients(found), gradients(expected));
        for input in inputs {
            assert_close(found.get(input).unwrap(), expected.get(input).unwrap());
        }
    }

    #[test]
    fn rms_norm_and_its_gradients_equal_the_composed_ones() {
        let (x, weight) = (random(&[5, 37]), random(&[37]));
        let composed = composed::rms_norm(&x, &weight, 0.1).unwrap();
        assert_same(&rms_norm(&x, &weight, 0.1).unwrap(), &composed, &[&x, &weight]);
    }

    #[test]
    fn layer_norm_and_its_gradients_equal_the_composed_ones() {
        let (x, weight, bias) = (random(&[5, 37]), random(&[37]), random(&[37]));
        let composed = composed::layer_norm(&x, &weight, &bias, 0.1).unwrap();
        assert_same(&layer_norm(&x, &weight, &bias, 0.1).unwrap(), &composed, &[&x, &weight, &bias]);
    }

    #[test]
    fn causal_softmax_and_its_gradient_equal_the_composed_ones() {
        for window in [None, Some(1), Some(5), Some(21)] {
            let scores = random(&[2, 3, 21, 21]);
            let composed = composed::causal_softmax(&scores, 0.7, window).unwrap();
            assert_same(&causal_softmax(&scores, 0.7, window).unwrap(), &composed, &[&scores]);
        }
    }

    #[test]
    fn causal_softmax_with_other_scores_of_the_own_key_and_its_gradients_equal_the_composed_ones() {
        for window in [None, Some(1), Some(5)] {
            let (scores, own) = (random(&[2, 3, 21, 21]), random(&[2, 3, 21]));
            let composed = composed::causal_softmax_with_own(&scores, &own, 0.7, window).unwrap();
            assert_same(&causal_softmax_with_own(&scores, &own, 0.7, window).unwrap(), &composed, &[&scores, &own]);
        }
    }

    #[test]
    fn causal_softmax_among_some_keys_and_its_gradient_equal_the_composed_ones() {
        let present: Vec<u8> = (0..42_u8).map(|key| u8::from(key % 3 == 0 || key > 30)).collect();
        let present = Tensor::from_vec(present, (2, 21), &Device::Cpu).unwrap();
        for window in [None, Some(1), Some(5)] {
            let scores = random(&[2, 3, 21, 21]);
            let found = causal_softmax_among(&scores, &present, 0.7, window).unwrap();
            let composed = composed::causal_softmax_among(&scores, &present, 0.7, window).unwrap();
            assert_same(&found, &composed, &[&scores]);
            let of_absent = found.get(0).unwrap().narrow(2, 1, 1).unwrap();
            let elsewhere = (of_absent.sum_all().unwrap()
                - diagonal(&found).unwrap().get(0).unwrap().narrow(1, 1, 1).unwrap().sum_all().unwrap())
            .unwrap();
            assert!(elsewhere.to_scalar::<f32>().unwrap().abs() < 1e-6, "only its own query attends to key 1");
        }
    }

    #[test]
    fn the_diagonal_and_its_gradient_equal_the_composed_ones() {
        let x = random(&[2, 3, 7, 7]);
        assert_same(&diagonal(&x).unwrap(), &composed::diagonal(&x).unwrap(), &[&x]);
    }

    #[test]
    fn gated_activations_and_their_gradients_equal_the_composed_ones() {
        let (gate, up) = (random(&[5, 37]), random(&[5, 37]));
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
            let composed = composed::gated(&gate, &up, activation).unwrap();
            assert_same(&gated(&gate, &up, activation).unwrap(), &composed, &[&gate, &up]);
        }
    }

    #[test]
    fn rotation_and_its_gradient_equal_the_composed_ones() {
        let frequencies = [0.3f32, 1.0, 0.1, 0.7];
        let turns = Turns::new(&frequencies, 7);
        // Some dimensions are rotated, or all.
        for head_dim in [11, 8] {
            let x = random(&[2, 3, 5, head_dim]);
            let composed = composed::rotate(&x, &turns).unwrap();
            assert_same(&rotate(&x, &turns).unwrap(), &composed, &[&x]);
        }
    }

    #[test]
    fn exp_is_accurate_and_clamped() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 3e-7, "e^{x}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), exp(-87.0));
    }
}
