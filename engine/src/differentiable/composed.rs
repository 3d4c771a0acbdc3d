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
    masked_softmax(scores, scale, &hidden(scores, window)?)
}

pub(super) fn causal_softmax_with_own(
    scores: &Tensor,
    own: &Tensor,
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor> {
    let own = own.unsqueeze(D::Minus1)?.broadcast_mul(&identity(scores)?)?;
    causal_softmax(&(scores + own)?, scale, window)
}

pub(super) fn causal_softmax_among(
    scores: &Tensor,
    present: &Tensor,
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor> {
    let (batch, seq) = present.dims2()?;
    let absent = present.eq(0u8)?.reshape((batch, 1, 1, seq))?;
    // Above 0 where another token is absent.
    let others = identity(scores)?.eq(0f32)?;
    let absent = absent.broadcast_mul(&others.reshape((1, 1, seq, seq))?)?;
    masked_softmax(scores, scale, &absent.broadcast_add(&hidden(scores, window)?)?)
}

pub(super) fn diagonal(x: &Tensor) -> Result<Tensor> {
    x.broadcast_mul(&identity(x)?)?.sum(D::Minus1)
}

/// The identity matrix of the last dimension.
fn identity(x: &Tensor) -> Result<Tensor> {
    Tensor::eye(x.dim(D::Minus1)?, DType::F32, x.device())
}

/// Above 0 `[seq, seq]` where a query does not attend to a key because of their positions.
fn hidden(scores: &Tensor, window: Option<usize>) -> Result<Tensor> {
    let seq = scores.dim(D::Minus1)?;
    let positions = Tensor::arange(0, seq as i64, scores.device())?;
    let ahead = positions.unsqueeze(0)?.broadcast_sub(&positions.unsqueeze(1)?)?;
    let hidden = ahead.gt(0i64)?;
    match window {
        None => Ok(hidden),
        Some(window) => hidden + ahead.le(-(window as i64))?,
    }
}

/// Softmax of `scale * scores` over the keys where `hidden`, of the scores' last dimensions, is 0.
fn masked_softmax(scores: &Tensor, scale: f32, hidden: &Tensor) -> Result<Tensor> {
    let never = Tensor::full(f32::NEG_INFINITY, hidden.shape(), scores.device())?;
    let mask = hidden.where_cond(&never, &never.zeros_like()?)?;
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
