//! Losses of a batch. On the CPU, gradients are hand-written where candle takes several passes over the logits; other
//! devices use candle's operations.

mod composed;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use engine::differentiable::{exp, max_of, numbers, sum_over};

/// Mean of `-log p(label)` over `scores` `[rows]`, whose sigmoid is the probability of label 1. The exponent contains
/// `-|score|`, so that no score overflows.
///
/// # Errors
/// If the shapes differ.
pub fn binary_cross_entropy(scores: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let softplus = (scores.relu()? + (scores.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    (softplus - (scores * labels)?)?.mean_all()
}

/// Probabilities of `logits` `[rows, vocab]`, without gradient.
///
/// # Errors
/// If the shape has another rank.
pub fn softmax(logits: &Tensor) -> Result<Tensor> {
    match logits.device().is_cpu() {
        true => logits.detach().apply_op1_no_bwd(&Softmax),
        false => composed::softmax(logits),
    }
}

/// Mean of `-log p(target)` over the rows of `logits` `[rows, vocab]`.
///
/// # Errors
/// If the shapes do not match or a target is not in the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    match logits.device().is_cpu() {
        true => logits.apply_op2(targets, CrossEntropy)?.mean_all(),
        false => composed::cross_entropy(logits, targets),
    }
}

/// Mean of `KL(teacher || softmax(logits))` over rows. `teacher` contains probabilities and gets no gradient.
///
/// # Errors
/// If the shapes differ.
pub fn divergence(logits: &Tensor, teacher: &Tensor) -> Result<Tensor> {
    match logits.device().is_cpu() {
        true => logits.apply_op2(teacher, Divergence)?.mean_all(),
        false => composed::divergence(logits, teacher),
    }
}

/// Writes `exp(row - log_sum_exp)` and returns `log_sum_exp`.
fn softmax_row(row: &[f32], probabilities: &mut [f32]) -> f32 {
    let max = max_of(row);
    for (probability, logit) in probabilities.iter_mut().zip(row) {
        *probability = exp(logit - max);
    }
    let sum = sum_over(probabilities, probabilities, |a, _| a);
    probabilities.iter_mut().for_each(|p| *p /= sum);
    max + sum.ln()
}

fn rows_and_vocab(layout: &Layout) -> Result<(usize, usize)> {
    layout.shape().dims2()
}

struct Softmax;

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, vocab) = rows_and_vocab(layout)?;
        let logits = numbers(logits, layout)?;
        let mut probabilities = vec![0.0; logits.len()];
        let rows = logits.chunks_exact(vocab);
        for (row, probabilities) in rows.zip(probabilities.chunks_exact_mut(vocab)) {
            softmax_row(row, probabilities);
        }
        Ok((CpuStorage::F32(probabilities), layout.shape().clone()))
    }
}

struct CrossEntropy;

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, vocab) = rows_and_vocab(layout)?;
        let (logits, targets) = (numbers(logits, layout)?, ids(targets, targets_layout, rows, vocab)?);
        let mut probabilities = vec![0.0; vocab];
        let losses: Vec<f32> = logits
            .chunks_exact(vocab)
            .zip(targets)
            .map(|(row, target)| softmax_row(row, &mut probabilities) - row[*target as usize])
            .collect();
        Ok((CpuStorage::F32(losses), Shape::from(rows)))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        _losses: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let of_loss = logits.apply_op2_no_bwd(targets, &CrossEntropyGradient)?;
        Ok((Some(scale_rows(&of_loss, grad)?), None))
    }
}

/// `softmax(logits) - one_hot(target)`.
struct CrossEntropyGradient;

impl CustomOp2 for CrossEntropyGradient {
    fn name(&self) -> &'static str {
        "cross-entropy-gradient"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, vocab) = rows_and_vocab(layout)?;
        let (logits, targets) = (numbers(logits, layout)?, ids(targets, targets_layout, rows, vocab)?);
        let mut gradient = vec![0.0; logits.len()];
        for ((row, target), gradient) in logits.chunks_exact(vocab).zip(targets).zip(gradient.chunks_exact_mut(vocab)) {
            softmax_row(row, gradient);
            gradient[*target as usize] -= 1.0;
        }
        Ok((CpuStorage::F32(gradient), layout.shape().clone()))
    }
}

fn ids<'a>(targets: &'a CpuStorage, layout: &Layout, rows: usize, vocab: usize) -> Result<&'a [u32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("targets of layout {layout:?}, expected contiguous ones");
    };
    let targets = &targets.as_slice::<u32>()?[start..end];
    if targets.len() != rows {
        candle_core::bail!("{} targets for {rows} rows of logits", targets.len());
    }
    match targets.iter().find(|target| **target as usize >= vocab) {
        Some(target) => candle_core::bail!("target {target}, expected below {vocab}"),
        None => Ok(targets),
    }
}

/// Multiplies each row of `x` `[rows, n]` by its number in `factors` `[rows]`.
fn scale_rows(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    x.broadcast_mul(&factors.unsqueeze(1)?)
}

struct Divergence;

impl CustomOp2 for Divergence {
    fn name(&self) -> &'static str {
        "divergence"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        layout: &Layout,
        teacher: &CpuStorage,
        teacher_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, vocab) = rows_and_vocab(layout)?;
        if rows_and_vocab(teacher_layout)? != (rows, vocab) {
            let teacher = teacher_layout.dims();
            candle_core::bail!("logits {:?} but teacher {teacher:?}", layout.dims());
        }
        let (logits, teacher) = (numbers(logits, layout)?, numbers(teacher, teacher_layout)?);
        let mut probabilities = vec![0.0; vocab];
        let divergences: Vec<f32> = logits
            .chunks_exact(vocab)
            .zip(teacher.chunks_exact(vocab))
            .map(|(row, teacher)| {
                let log_sum = softmax_row(row, &mut probabilities);
                let term = |p: f32, logit: f32| match p > 0.0 {
                    true => p * (p.ln() - (logit - log_sum)),
                    false => 0.0,
                };
                sum_over(teacher, row, term)
            })
            .collect();
        Ok((CpuStorage::F32(divergences), Shape::from(rows)))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        teacher: &Tensor,
        _divergences: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let of_divergence = (logits.detach().apply_op1_no_bwd(&Softmax)? - teacher)?;
        Ok((Some(scale_rows(&of_divergence, grad)?), None))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::normal;
    use super::*;
    use candle_core::{DType, Device, Var};
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn number(x: &Tensor) -> f32 {
        x.to_scalar().unwrap()
    }

    fn assert_close(found: &Tensor, expected: &Tensor) {
        let worst = (found - expected).unwrap().abs().unwrap().max_all().unwrap();
        assert!(number(&worst) < 1e-5, "{found} is not {expected}");
    }

    /// Checks a loss and its gradient.
    fn assert_same(found: &Tensor, expected: &Tensor, logits: &Var) {
        assert_close(found, expected);
        let gradient = |loss: &Tensor| loss.backward().unwrap().get(logits).unwrap().clone();
        assert_close(&gradient(found), &gradient(expected));
    }

    #[test]
    fn cross_entropy_and_its_gradient_equal_the_composed_ones() {
        let logits = Var::from_tensor(&normal((7, 29), 3.0, &mut StdRng::seed_from_u64(1))).unwrap();
        let targets = Tensor::new(&[0u32, 28, 5, 5, 9, 1, 2], &Device::Cpu).unwrap();
        let composed = composed::cross_entropy(&logits, &targets).unwrap();
        assert_same(&cross_entropy(&logits, &targets).unwrap(), &composed, &logits);
    }

    #[test]
    fn divergence_and_its_gradient_equal_the_composed_ones_where_the_teacher_is_sure_too() {
        let logits = Var::from_tensor(&normal((7, 29), 3.0, &mut StdRng::seed_from_u64(1))).unwrap();
        let scores = normal((6, 29), 3.0, &mut StdRng::seed_from_u64(2));
        let sure = Tensor::from_iter((0..29).map(|token| f32::from(u8::from(token == 3))), &Device::Cpu).unwrap();
        let teacher = Tensor::cat(&[softmax(&scores).unwrap(), sure.reshape((1, 29)).unwrap()], 0).unwrap();
        assert_close(&softmax(&scores).unwrap(), &composed::softmax(&scores).unwrap());
        let composed = composed::divergence(&logits, &teacher).unwrap();
        assert_same(&divergence(&logits, &teacher).unwrap(), &composed, &logits);
    }

    #[test]
    fn binary_cross_entropy_neither_overflows_nor_loses_small_probabilities() {
        let pairs = [(0f32, 1f32), (2.0, 0.0), (-3.0, 1.0), (200.0, 1.0), (-200.0, 1.0)];
        let scores = Var::new(&pairs.map(|(score, _)| score), &Device::Cpu).unwrap();
        let labels = Tensor::new(&pairs.map(|(_, label)| label), &Device::Cpu).unwrap();
        let loss = binary_cross_entropy(&scores, &labels).unwrap();
        let softplus = |x: f32| x.exp().ln_1p();
        let expected = [softplus(0.0), softplus(2.0), softplus(3.0), 0.0, 200.0].iter().sum::<f32>() / 5.0;
        assert!((number(&loss) - expected).abs() < 1e-4, "{loss}");
        let gradient = loss.backward().unwrap().get(&scores).unwrap().to_vec1::<f32>().unwrap();
        for (gradient, (score, label)) in gradient.iter().zip(pairs) {
            let expected = (1.0 / (1.0 + (-score).exp()) - label) / 5.0;
            assert!((gradient - expected).abs() < 1e-5, "{score}: {gradient}, expected {expected}");
        }
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_refused() {
        let logits = Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap();
        let targets = Tensor::new(&[4u32], &Device::Cpu).unwrap();
        let message = cross_entropy(&logits, &targets).unwrap_err().to_string();
        assert!(message.contains("target 4, expected below 4"), "{message}");
    }
}
