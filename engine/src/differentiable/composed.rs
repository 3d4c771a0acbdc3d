//! The operations composed from candle's own, which have kernels and gradients on every device: for tensors that are
//! not on the CPU.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::ops::softmax;
use candle_nn::rotary_emb::rope_slow;

use super::Turns;
use crate::config::Activation;

pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(square + f64::from(eps))?.sqrt()?)?.broadcast_mul(weight)
}

pub(super) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?.broadcast_mul(weight)?.broadcast_add(bias)
}

pub(super) fn causal_softmax(scores: &Tensor, scale: f32, window: Option<usize>) -> Result<Tensor> {
    let seq = scores.dim(D::Minus1)?;
    let positions = Tensor::arange(0, seq as i64, scores.device())?;
    let ahead = positions.unsqueeze(0)?.broadcast_sub(&positions.unsqueeze(1)?)?;
    let mut hidden = ahead.gt(0i64)?;
    if let Some(window) = window {
        hidden = (hidden + ahead.le(-(window as i64))?)?;
    }
    let never = Tensor::full(f32::NEG_INFINITY, (seq, seq), scores.device())?;
    let mask = hidden.where_cond(&never, &Tensor::zeros((seq, seq), DType::F32, scores.device())?)?;
    softmax(&(scores * f64::from(scale))?.broadcast_add(&mask)?, D::Minus1)
}

pub(super) fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let activated = match activation {
        Activation::Silu => gate.silu()?,
        Activation::Gelu => gate.gelu_erf()?,
        Activation::GeluTanh => gate.gelu()?,
    };
    activated * up
}

pub(super) fn rotate(x: &Tensor, turns: &Turns) -> Result<Tensor> {
    let (seq, head_dim) = (x.dim(D::Minus2)?, x.dim(D::Minus1)?);
    let (turned, pairs) = (2 * turns.pairs, turns.pairs);
    let (cos, sin): (Vec<f32>, Vec<f32>) = turns.table[..seq * pairs].iter().copied().unzip();
    let [cos, sin] = [cos, sin].map(|numbers| Tensor::from_vec(numbers, (seq, pairs), x.device()));
    let first = rope_slow(&x.narrow(D::Minus1, 0, turned)?.contiguous()?, &cos?, &sin?)?;
    match head_dim - turned {
        0 => Ok(first),
        rest => Tensor::cat(&[first, x.narrow(D::Minus1, turned, rest)?], D::Minus1),
    }
}
