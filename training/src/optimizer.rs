//! AdamW with gradient clipping, and the learning rate's course over a run.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, Var};
use serde::{Deserialize, Serialize};

/// Options of the optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamWOptions {
    /// Learning rate at its peak, after warm-up.
    pub peak_learning_rate: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: usize,
    /// Share of a matrix that is taken off per step and unit of learning rate. Norms are exempt.
    pub weight_decay: f64,
    /// Norm of all gradients together above which they are scaled down to it.
    pub clip_norm: f64,
}

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.98;
const EPSILON: f64 = 1e-8;
/// The cosine ends at this share of the peak.
const FINAL_SHARE: f64 = 0.02;

impl AdamWOptions {
    /// The learning rate of a step of a run of `steps`: a linear rise, then half a cosine.
    pub fn learning_rate(&self, step: usize, steps: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak_learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let span = (steps - self.warmup_steps).max(1) as f64;
        let done = (step - self.warmup_steps) as f64 / span;
        let cosine = (1.0 + (std::f64::consts::PI * done).cos()) / 2.0;
        self.peak_learning_rate * (FINAL_SHARE + (1.0 - FINAL_SHARE) * cosine)
    }
}

/// A trained tensor with the running means of its gradient and the gradient's square.
pub struct Parameter {
    /// The tensor itself.
    pub value: Var,
    /// Running mean of the gradient, flat.
    pub mean: Vec<f32>,
    /// Running mean of the squared gradient, flat.
    pub square: Vec<f32>,
}

/// All trained tensors by name.
pub type Parameters = BTreeMap<String, Parameter>;

impl Parameter {
    /// A parameter that has not been stepped.
    ///
    /// # Errors
    /// If the tensor cannot be copied.
    pub fn new(value: &Tensor) -> Result<Self> {
        let zeros = vec![0.0; value.elem_count()];
        Ok(Self { value: Var::from_tensor(value)?, mean: zeros.clone(), square: zeros })
    }

    /// One step of AdamW (arXiv 1711.05101, algorithm 2) along `gradient * factor`; `step` counts
    /// from 0.
    fn update(&mut self, gradient: &Tensor, factor: f32, step: usize, rate: Rate) -> Result<()> {
        let mut value: Vec<f32> = self.value.flatten_all()?.to_vec1()?;
        let gradient: Vec<f32> = gradient.flatten_all()?.to_vec1()?;
        let correction = |beta: f64| 1.0 - beta.powi(step as i32 + 1);
        let root = correction(BETA2).sqrt();
        let scale = (rate.learning * root / correction(BETA1)) as f32;
        let epsilon = (EPSILON * root) as f32;
        let keep = (1.0 - rate.learning * rate.decay) as f32;
        let (beta1, beta2) = (BETA1 as f32, BETA2 as f32);
        for (((value, mean), square), gradient) in
            value.iter_mut().zip(&mut self.mean).zip(&mut self.square).zip(gradient)
        {
            let gradient = gradient * factor;
            *mean += (1.0 - beta1) * (gradient - *mean);
            *square += (1.0 - beta2) * (gradient * gradient - *square);
            *value = *value * keep - scale * *mean / (square.sqrt() + epsilon);
        }
        let shape = self.value.shape().clone();
        self.value.set(&Tensor::from_vec(value, shape, self.value.device())?)
    }
}

#[derive(Clone, Copy)]
struct Rate {
    learning: f64,
    decay: f64,
}

/// Moves all `parameters` one step against `gradients`, which are keyed alike, after clipping.
/// Returns the norm of the gradients before clipping.
///
/// # Errors
/// If a gradient is missing or of another shape.
pub fn step(
    parameters: &mut Parameters,
    gradients: &BTreeMap<String, Tensor>,
    options: &AdamWOptions,
    step: usize,
    steps: usize,
) -> Result<f64> {
    let mut squares = 0.0;
    for gradient in gradients.values() {
        squares += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let norm = squares.sqrt();
    let factor = (options.clip_norm / norm).min(1.0) as f32;
    let learning = options.learning_rate(step, steps);
    for (name, parameter) in parameters {
        let Some(gradient) = gradients.get(name) else {
            candle_core::bail!("no gradient for `{name}`");
        };
        let decay = match parameter.value.rank() {
            1 => 0.0,
            _ => options.weight_decay,
        };
        parameter.update(gradient, factor, step, Rate { learning, decay })?;
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    const OPTIONS: AdamWOptions =
        AdamWOptions { peak_learning_rate: 0.1, warmup_steps: 10, weight_decay: 0.5, clip_norm: 1.0 };

    #[test]
    fn the_learning_rate_rises_to_its_peak_and_falls_to_its_final_share() {
        assert!((OPTIONS.learning_rate(0, 110) - 0.01).abs() < 1e-12);
        assert!((OPTIONS.learning_rate(10, 110) - 0.1).abs() < 1e-12);
        assert!((OPTIONS.learning_rate(60, 110) - 0.1 * (1.0 + FINAL_SHARE) / 2.0).abs() < 1e-12);
        assert!((OPTIONS.learning_rate(110, 110) - 0.1 * FINAL_SHARE).abs() < 1e-12);
    }

    /// A first step moves every number by the learning rate against its gradient's sign, whatever
    /// the gradient's size; matrices first shrink by their decay.
    #[test]
    fn a_first_step_moves_by_the_learning_rate_and_decays_matrices_only() {
        let tensor = |numbers: &[f32]| Tensor::new(numbers, &Device::Cpu).unwrap();
        let matrix = tensor(&[2.0, -4.0]).reshape((1, 2)).unwrap();
        let mut parameters = Parameters::new();
        parameters.insert("matrix".into(), Parameter::new(&matrix).unwrap());
        parameters.insert("norm".into(), Parameter::new(&tensor(&[1.0])).unwrap());
        let gradients = BTreeMap::from([
            ("matrix".into(), tensor(&[0.3, -0.01]).reshape((1, 2)).unwrap()),
            ("norm".into(), tensor(&[-40.0])),
        ]);
        let norm = step(&mut parameters, &gradients, &OPTIONS, 0, 100).unwrap();
        assert!((norm - 40.001).abs() < 1e-3);
        let value = |name: &str| {
            let flat = parameters[name].value.flatten_all().unwrap();
            flat.to_vec1::<f32>().unwrap()
        };
        let close = |found: f32, expected: f32| (found - expected).abs() < 1e-5;
        assert!(close(value("matrix")[0], 2.0 * 0.995 - 0.01));
        assert!(close(value("matrix")[1], -4.0 * 0.995 + 0.01));
        assert!(close(value("norm")[0], 1.01));
        // Clipped to norm 1 before the running mean saw it.
        assert!(close(parameters["norm"].mean[0], -0.1));
    }
}
