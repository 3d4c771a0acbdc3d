//! Operations of the reference model with hand-written gradients, one pass over memory each.
//!
//! candle composes these from elementwise steps that each write a tensor; its own fused versions
//! have no gradient. All take contiguous `f32` tensors on the CPU and run on the calling thread.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

/// `x / sqrt(mean(x^2) + eps) * weight` over the last dimension of `[rows, n]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    x.apply_op2(weight, RmsNorm { eps })
}

/// Softmax of `scale * scores`, `[.., seq, seq]`, over the keys that are not after the query.
///
/// # Errors
/// If the last two dimensions differ.
pub fn causal_softmax(scores: &Tensor, scale: f32) -> Result<Tensor> {
    scores.apply_op1(CausalSoftmax { scale })
}

/// `gate * sigmoid(gate) * up`, elementwise.
///
/// # Errors
/// If the shapes differ.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.apply_op2(up, SwiGlu)
}

/// Turns the pairs (`i`, `i + head_dim / 2`) of `[.., seq, head_dim]` by the angle of their
/// position, from a table of the cosine and sine at `[position][i]`.
///
/// # Errors
/// If the table has fewer positions than `x` or another width.
pub fn rotate(x: &Tensor, table: &Arc<[(f32, f32)]>) -> Result<Tensor> {
    let table = table.clone();
    x.apply_op1(Rotate { table, direction: 1.0 })
}

/// The numbers of a contiguous `f32` tensor.
///
/// # Errors
/// If it is neither.
pub fn numbers<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a tensor of layout {layout:?}, expected a contiguous one"),
    }
}

fn last_dim(layout: &Layout) -> usize {
    layout.dims().last().copied().unwrap_or(1)
}

/// `e^x` to about one unit in the last place for `x` in -87..88, clamped outside; written so that
/// the compiler can vectorize it (the polynomial is that of Cephes' `expf`).
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

/// Sum of `term(a, b)` over two slices of one length, in lanes so that it vectorizes.
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

/// Of `x`, `weight` and the gradient of the result: the gradient of `x` and, as one more row, that
/// of `weight`.
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

struct CausalSoftmax {
    scale: f32,
}

impl CustomOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let scores = numbers(scores, layout)?;
        let seq = last_dim(layout);
        if !layout.dims().ends_with(&[seq, seq]) {
            candle_core::bail!("causal-softmax: {:?}, expected [.., seq, seq]", layout.dims());
        }
        let mut weights = vec![0.0; scores.len()];
        let rows = scores.chunks_exact(seq).zip(weights.chunks_exact_mut(seq));
        for (row, (scores, weights)) in rows.enumerate() {
            let visible = row % seq + 1;
            let (scores, weights) = (&scores[..visible], &mut weights[..visible]);
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
        let op = CausalSoftmaxGradient { scale: self.scale };
        Ok(Some(weights.apply_op2_no_bwd(&grad.contiguous()?, &op)?))
    }
}

struct CausalSoftmaxGradient {
    scale: f32,
}

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
        for (row, of_scores) in of_scores.chunks_exact_mut(seq).enumerate() {
            let visible = row * seq..row * seq + row % seq + 1;
            let (weights, grad) = (&weights[visible.clone()], &grad[visible]);
            let mean = sum_over(weights, grad, |a, b| a * b);
            for ((of_score, weight), grad) in of_scores.iter_mut().zip(weights).zip(grad) {
                *of_score = self.scale * weight * (grad - mean);
            }
        }
        Ok((CpuStorage::F32(of_scores), layout.shape().clone()))
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
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
            candle_core::bail!("swiglu: gate {gate:?} but up {up:?}");
        }
        let (gate, up) = (numbers(gate, gate_layout)?, numbers(up, up_layout)?);
        let mut y = vec![0.0; gate.len()];
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate * sigmoid(*gate) * up;
        }
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let both = gate.apply_op3_no_bwd(up, &grad.contiguous()?, &SwiGluGradient)?;
        Ok((Some(both.get(0)?), Some(both.get(1)?)))
    }
}

/// Of `gate`, `up` and the gradient of the result: the gradients of `gate` and `up`, stacked.
struct SwiGluGradient;

impl CustomOp3 for SwiGluGradient {
    fn name(&self) -> &'static str {
        "swiglu-gradient"
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
        let n = gate.len();
        let mut out = vec![0.0; 2 * n];
        let (of_gate, of_up) = out.split_at_mut(n);
        for ((((of_gate, of_up), gate), up), grad) in of_gate.iter_mut().zip(of_up).zip(gate).zip(up).zip(grad) {
            let share = sigmoid(*gate);
            *of_gate = grad * up * share * (1.0 + gate * (1.0 - share));
            *of_up = grad * gate * share;
        }
        let dims = [&[2], gate_layout.dims()].concat();
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }
}

struct Rotate {
    table: Arc<[(f32, f32)]>,
    /// 1 turns forward, -1 back.
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
        let half = head_dim / 2;
        if self.table.len() < seq * half {
            candle_core::bail!("rotate: a table of {}, expected {seq} x {half}", self.table.len());
        }
        let mut y = vec![0.0; x.len()];
        for (row, (x, y)) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)).enumerate() {
            let turns = &self.table[row % seq * half..][..half];
            for (i, (cos, sin)) in turns.iter().enumerate() {
                let sin = sin * self.direction;
                y[i] = x[i] * cos - x[i + half] * sin;
                y[i + half] = x[i + half] * cos + x[i] * sin;
            }
        }
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Self { table: self.table.clone(), direction: -self.direction };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&back)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{D, Device, Var};
    use candle_nn::ops::softmax;

    fn random(dims: &[usize]) -> Var {
        Var::rand(-2f32, 2f32, dims, &Device::Cpu).unwrap()
    }

    fn assert_close(found: &Tensor, expected: &Tensor) {
        assert_eq!(found.dims(), expected.dims());
        let worst = (found - expected).unwrap().abs().unwrap();
        let worst = worst.flatten_all().unwrap().max(0).unwrap();
        assert!(worst.to_scalar::<f32>().unwrap() < 1e-5, "{found} is not {expected}");
    }

    /// Checks results and gradients, under a loss with different weights everywhere.
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
        let square = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
        let composed = x.broadcast_div(&(square + 0.1).unwrap().sqrt().unwrap());
        let composed = composed.unwrap().broadcast_mul(&weight).unwrap();
        assert_same(&rms_norm(&x, &weight, 0.1).unwrap(), &composed, &[&x, &weight]);
    }

    #[test]
    fn causal_softmax_and_its_gradient_equal_the_composed_ones() {
        let scores = random(&[2, 3, 21, 21]);
        let mask: Vec<f32> = (0..21 * 21).map(|i| if i % 21 > i / 21 { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (21, 21), &Device::Cpu).unwrap();
        let scaled = (scores.as_tensor() * 0.7).unwrap();
        let composed = softmax(&scaled.broadcast_add(&mask).unwrap(), D::Minus1).unwrap();
        assert_same(&causal_softmax(&scores, 0.7).unwrap(), &composed, &[&scores]);
    }

    #[test]
    fn swiglu_and_its_gradients_equal_the_composed_ones() {
        let (gate, up) = (random(&[5, 37]), random(&[5, 37]));
        let composed = (gate.silu().unwrap() * up.as_tensor()).unwrap();
        assert_same(&swiglu(&gate, &up).unwrap(), &composed, &[&gate, &up]);
    }

    #[test]
    fn rotation_and_its_gradient_equal_the_composed_ones() {
        let x = random(&[2, 3, 5, 8]);
        let angles: Vec<f32> = (0..5 * 4).map(|i| i as f32 * 0.3).collect();
        let table: Arc<[_]> = angles.iter().map(|a| (a.cos(), a.sin())).collect();
        let angles = Tensor::from_vec(angles, (5, 4), &Device::Cpu).unwrap();
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let composed = candle_nn::rotary_emb::rope_slow(&x, &cos, &sin).unwrap();
        assert_same(&rotate(&x, &table).unwrap(), &composed, &[&x]);
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
