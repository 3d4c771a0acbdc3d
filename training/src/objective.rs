//! The early-exit objective: every loop learns the text, and the earlier loops also learn to say
//! what the last one says.
//!
//! ```text
//! loss = CE(last) + sum over earlier loops d of [ a CE(d) + b KL(p_last || p_d) ]
//! ```
//!
//! with `p_last` detached, so that the last loop is not drawn towards the earlier ones. The
//! weighted cross-entropy over exits is that of arXiv 2410.20672, section 2.4.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor};
use engine::differentiable::{exp, max_of, numbers, sum_over};
use serde::{Deserialize, Serialize};

/// Weights of the earlier loops' terms; the last loop's cross-entropy weighs 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectiveWeights {
    /// Of an earlier loop's cross-entropy.
    pub intermediate: f64,
    /// Of an earlier loop's divergence from the last loop.
    pub distillation: f64,
}

/// The objective and its parts, scalars averaged over tokens, in nats.
pub struct Objective {
    /// What training lowers.
    pub total: Tensor,
    /// Cross-entropy of the last loop.
    pub last: Tensor,
    /// Divergence of the earlier loops from the last, summed over them; 0 with a single loop.
    pub divergence: Tensor,
}

/// The objective of `logits`, one `[rows, vocab]` per loop, for the `targets` `[rows]`.
///
/// # Errors
/// If there is no loop or the shapes do not fit.
pub fn objective(logits: &[Tensor], targets: &Tensor, weights: ObjectiveWeights) -> Result<Objective> {
    let Some((last, earlier)) = logits.split_last() else {
        candle_core::bail!("the objective of no loop, expected at least one");
    };
    let last_loss = cross_entropy(last, targets)?;
    let teacher = last.detach().apply_op1_no_bwd(&Softmax)?;
    let mut total = last_loss.clone();
    let mut divergences = Tensor::zeros((), DType::F32, last.device())?;
    for student in earlier {
        let divergence = divergence(student, &teacher)?;
        total = (total + (cross_entropy(student, targets)? * weights.intermediate)?)?;
        total = (total + (&divergence * weights.distillation)?)?;
        divergences = (divergences + divergence)?;
    }
    Ok(Objective { total, last: last_loss, divergence: divergences.detach() })
}

/// Mean of `-log p(target)` over the rows of `logits` `[rows, vocab]`.
///
/// # Errors
/// If the shapes do not fit or a target is not in the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    logits.apply_op2(targets, CrossEntropy)?.mean_all()
}

/// Mean of `KL(teacher || softmax(logits))` over rows; `teacher` holds probabilities and gets no
/// gradient.
///
/// # Errors
/// If the shapes differ.
pub fn divergence(logits: &Tensor, teacher: &Tensor) -> Result<Tensor> {
    logits.apply_op2(teacher, Divergence)?.mean_all()
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

/// Rows of `x` `[rows, n]` times the numbers of `factors` `[rows]`.
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
    use std::collections::HashMap;

    use super::*;
    use candle_core::{Device, Var};
    use engine::config::ModelConfig;
    use engine::reference::Reference;
    use engine::weights::Weights;

    const WEIGHTS: ObjectiveWeights = ObjectiveWeights { intermediate: 0.3, distillation: 0.7 };

    fn tiny() -> ModelConfig {
        ModelConfig {
            vocab_size: 13,
            hidden_size: 8,
            intermediate_size: 12,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 4,
            block_layers: 2,
            num_loops: 3,
            tie_embeddings: true,
            max_positions: 8,
            ..ModelConfig::default()
        }
    }

    fn scalar(x: &Tensor) -> f32 {
        x.to_scalar().unwrap()
    }

    /// The objective as in its formula, with the teacher given.
    fn formula(logits: &[Tensor], targets: &Tensor, teacher: &Tensor) -> f32 {
        let mut total = scalar(&cross_entropy(&logits[2], targets).unwrap());
        for student in &logits[..2] {
            total += 0.3 * scalar(&cross_entropy(student, targets).unwrap());
            total += 0.7 * scalar(&divergence(student, teacher).unwrap());
        }
        total
    }

    #[test]
    fn gradients_equal_finite_differences_with_the_teacher_held_fixed() {
        let start = Weights::random(tiny(), 5).unwrap();
        // Larger embeddings make the loops differ, so that every term of the objective counts.
        let mut variables: HashMap<String, Var> = HashMap::new();
        for (name, tensor) in start.tensors() {
            let factor = if name == "embed_tokens.weight" { 20.0 } else { 1.0 };
            let variable = Var::from_tensor(&(tensor * factor).unwrap()).unwrap();
            variables.insert(name.clone(), variable);
        }
        let tensors = variables.iter().map(|(name, v)| (name.clone(), v.as_tensor().clone()));
        let weights = Weights::from_tensors(tiny(), tensors.collect(), "test").unwrap();
        let model = Reference::new(&weights).unwrap();
        let inputs = Tensor::new(&[[1u32, 2, 3, 4, 5], [9, 12, 0, 3, 3]], &Device::Cpu).unwrap();
        let targets = Tensor::new(&[2u32, 3, 4, 5, 6, 12, 0, 3, 3, 1], &Device::Cpu).unwrap();

        let logits = model.forward(&inputs).unwrap();
        let teacher = candle_nn::ops::softmax(&logits[2].detach(), 1).unwrap();
        let found = objective(&logits, &targets, WEIGHTS).unwrap();
        assert!((scalar(&found.total) - formula(&logits, &targets, &teacher)).abs() < 1e-5);
        assert!(scalar(&found.divergence) > 0.01, "the loops hardly differ");
        let gradients = found.total.backward().unwrap();

        for (name, variable) in &variables {
            let start = variable.as_tensor().copy().unwrap();
            let direction = start.randn_like(0.0, 1.0).unwrap();
            let gradient = gradients.get(variable).unwrap();
            let slope = scalar(&(gradient * &direction).unwrap().sum_all().unwrap());
            let along = |step: f64| {
                variable.set(&(&start + (&direction * step).unwrap()).unwrap()).unwrap();
                formula(&model.forward(&inputs).unwrap(), &targets, &teacher)
            };
            let (step, size) = (2e-3, scalar(&direction.sqr().unwrap().sum_all().unwrap()).sqrt());
            let step = step / f64::from(size) * 4.0;
            let difference = (along(step) - along(-step)) / (2.0 * step) as f32;
            variable.set(&start).unwrap();
            let scale = scalar(&gradient.sqr().unwrap().sum_all().unwrap()).sqrt() * size;
            assert!(
                (slope - difference).abs() < 5e-3 * scale,
                "{name}: gradient gives {slope}, finite difference {difference}"
            );
        }
    }

    #[test]
    fn distillation_leaves_the_last_loop_alone() {
        let logits = |seed: f32| {
            let numbers: Vec<f32> = (0..12).map(|i| (seed * i as f32).sin()).collect();
            Var::from_tensor(&Tensor::from_vec(numbers, (3, 4), &Device::Cpu).unwrap()).unwrap()
        };
        let (earlier, last) = (logits(1.3), logits(2.1));
        let targets = Tensor::new(&[0u32, 3, 1], &Device::Cpu).unwrap();
        let gradient_of_last = |distillation| {
            let weights = ObjectiveWeights { intermediate: 0.0, distillation };
            let loops = [earlier.as_tensor().clone(), last.as_tensor().clone()];
            let total = objective(&loops, &targets, weights).unwrap().total;
            let gradients = total.backward().unwrap();
            gradients.get(&last).unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(gradient_of_last(5.0), gradient_of_last(0.0));
    }

    #[test]
    fn cross_entropy_equals_candles() {
        let logits = Tensor::randn(0f32, 3.0, (7, 29), &Device::Cpu).unwrap();
        let targets = Tensor::new(&[0u32, 28, 5, 5, 9, 1, 2], &Device::Cpu).unwrap();
        let expected = candle_nn::loss::cross_entropy(&logits, &targets).unwrap();
        let found = cross_entropy(&logits, &targets).unwrap();
        assert!((scalar(&found) - scalar(&expected)).abs() < 1e-5);
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_refused() {
        let logits = Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap();
        let targets = Tensor::new(&[4u32], &Device::Cpu).unwrap();
        let message = cross_entropy(&logits, &targets).unwrap_err().to_string();
        assert!(message.contains("target 4, expected below 4"), "{message}");
    }
}
