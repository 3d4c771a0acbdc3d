//! Losses built from candle's operations.

use candle_core::{D, Result, Tensor};
use candle_nn::ops::{log_softmax, softmax_last_dim};

pub(super) fn softmax(logits: &Tensor) -> Result<Tensor> {
    softmax_last_dim(&logits.detach())
}

pub(super) fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    candle_nn::loss::cross_entropy(logits, targets)
}

pub(super) fn divergence(logits: &Tensor, teacher: &Tensor) -> Result<Tensor> {
    // Where the teacher's probability is 0 the term is 0, so its logarithm must not be infinite.
    let of_teacher = teacher.maximum(f64::from(f32::MIN_POSITIVE))?.log()?;
    let terms = (teacher * (of_teacher - log_softmax(logits, D::Minus1)?)?)?;
    terms.sum(D::Minus1)?.mean_all()
}
