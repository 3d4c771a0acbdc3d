//! AdamW with gradient clipping, and learning-rate schedules.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::error::TrainingError;
use crate::trainer::options::{check, check_weight};

/// Options of the optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWOptions {
    /// Learning rate at its peak, after warm-up.
    pub peak_learning_rate: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: usize,
    /// Schedule of the learning rate after warm-up.
    pub schedule: Schedule,
    /// Weight decay: share of a matrix that is subtracted per step and unit of learning rate. Norms and biases are
    /// exempt.
    pub weight_decay: f64,
    /// Maximum norm of all gradients together; larger gradients are scaled down to it.
    pub clip_norm: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self {
            peak_learning_rate: 2e-3,
            warmup_steps: 100,
            schedule: Schedule::Cosine,
            weight_decay: 0.1,
            clip_norm: 1.0,
        }
    }
}

/// Schedule of the learning rate after warm-up: `cosine` or `trapezoid:COOLDOWN_STEPS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Schedule {
    /// Half a cosine from the peak down, over all remaining steps.
    Cosine,
    /// The peak, then a linear cooldown over the last steps (arXiv 2405.18392).
    Trapezoid {
        /// Steps of the cooldown.
        cooldown_steps: usize,
    },
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cosine => f.write_str("cosine"),
            Self::Trapezoid { cooldown_steps } => write!(f, "trapezoid:{cooldown_steps}"),
        }
    }
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cosine" => Some(Self::Cosine),
            Some(("trapezoid", steps)) => steps.parse().ok().map(|cooldown_steps| Self::Trapezoid { cooldown_steps }),
            _ => None,
        }
        .ok_or_else(|| format!("unknown schedule `{text}`: expected cosine or trapezoid:COOLDOWN_STEPS"))
    }
}

impl From<Schedule> for String {
    fn from(schedule: Schedule) -> Self {
        schedule.to_string()
    }
}

impl TryFrom<String> for Schedule {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.98;
const EPSILON: f64 = 1e-8;
/// Final learning rate as a share of the peak.
const FINAL_SHARE: f64 = 0.02;

impl AdamWOptions {
    /// The learning rate at a step of a run of `steps`: linear warm-up, then the schedule.
    pub fn learning_rate(&self, step: usize, steps: usize) -> f64 {
        if step < self.warmup_steps {
            return self.peak_learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let above_final = match self.schedule {
            Schedule::Cosine => {
                let span = (steps - self.warmup_steps).max(1) as f64;
                let done = (step - self.warmup_steps) as f64 / span;
                (1.0 + (std::f64::consts::PI * done).cos()) / 2.0
            }
            Schedule::Trapezoid { cooldown_steps } => {
                let left = steps.saturating_sub(step) as f64;
                (left / cooldown_steps.max(1) as f64).min(1.0)
            }
        };
        self.peak_learning_rate * (FINAL_SHARE + (1.0 - FINAL_SHARE) * above_final)
    }

    /// Checks the numbers for a run of `steps`.
    ///
    /// # Errors
    /// The first option that is out of range.
    pub fn check(&self, steps: usize) -> Result<(), TrainingError> {
        let cooldown = match self.schedule {
            Schedule::Cosine => 0,
            Schedule::Trapezoid { cooldown_steps } => cooldown_steps,
        };
        let course = self.warmup_steps.saturating_add(cooldown);
        let expected = format!("with the cool-down at most the {steps} steps");
        check(course <= steps, "optimizer.warmup_steps", &course, &expected)?;
        for (option, found) in
            [("optimizer.peak_learning_rate", self.peak_learning_rate), ("optimizer.clip_norm", self.clip_norm)]
        {
            check(found.is_finite() && found > 0.0, option, &found, &"a finite number above 0")?;
        }
        check_weight("optimizer.weight_decay", self.weight_decay)
    }
}

/// A trained tensor with the running means of its gradient and the gradient's square.
pub struct Parameter {
    /// The tensor.
    pub value: Var,
    /// Running mean of the gradient, flat.
    pub mean: Tensor,
    /// Running mean of the squared gradient, flat.
    pub square: Tensor,
}

/// All trained tensors by name.
pub type Parameters = BTreeMap<String, Parameter>;

impl Parameter {
    /// A parameter before its first step.
    ///
    /// # Errors
    /// If the tensor cannot be copied.
    pub fn new(value: &Tensor) -> candle_core::Result<Self> {
        let zeros = Tensor::zeros(value.elem_count(), DType::F32, value.device())?;
        Ok(Self { value: Var::from_tensor(value)?, mean: zeros.clone(), square: zeros })
    }

    /// One step of AdamW (arXiv 1711.05101, algorithm 2) along `gradient * factor`; `step` counts from 0.
    fn update(&mut self, gradient: &Tensor, factor: f32, step: usize, rate: Rate) -> candle_core::Result<()> {
        let correction = |beta: f64| 1.0 - beta.powi(step as i32 + 1);
        let root = correction(BETA2).sqrt();
        let change = Change {
            factor,
            scale: (rate.learning * root / correction(BETA1)) as f32,
            epsilon: (EPSILON * root) as f32,
            keep: (1.0 - rate.learning * rate.decay) as f32,
        };
        match self.value.device().is_cpu() {
            true => self.apply(gradient, change),
            false => self.apply_composed(gradient, change),
        }
    }

    fn apply(&mut self, gradient: &Tensor, Change { factor, scale, epsilon, keep }: Change) -> candle_core::Result<()> {
        let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let (mut value, gradient) = (numbers(&self.value)?, numbers(gradient)?);
        let (mut mean, mut square) = (numbers(&self.mean)?, numbers(&self.square)?);
        let (beta1, beta2) = (BETA1 as f32, BETA2 as f32);
        for (((value, mean), square), gradient) in value.iter_mut().zip(&mut mean).zip(&mut square).zip(gradient) {
            let gradient = gradient * factor;
            *mean += (1.0 - beta1) * (gradient - *mean);
            *square += (1.0 - beta2) * (gradient * gradient - *square);
            *value = *value * keep - scale * *mean / (square.sqrt() + epsilon);
        }
        let count = value.len();
        self.mean = Tensor::from_vec(mean, count, &Device::Cpu)?;
        self.square = Tensor::from_vec(square, count, &Device::Cpu)?;
        self.value.set(&Tensor::from_vec(value, self.value.shape().clone(), &Device::Cpu)?)
    }

    /// The step built from candle's operations, for devices other than the CPU.
    fn apply_composed(
        &mut self,
        gradient: &Tensor,
        Change { factor, scale, epsilon, keep }: Change,
    ) -> candle_core::Result<()> {
        let [factor, scale, epsilon, keep] = [factor, scale, epsilon, keep].map(f64::from);
        let gradient = (gradient.flatten_all()? * factor)?;
        self.mean = ((&self.mean * BETA1)? + (&gradient * (1.0 - BETA1))?)?;
        self.square = ((&self.square * BETA2)? + (gradient.sqr()? * (1.0 - BETA2))?)?;
        let change = ((&self.mean * scale)? / (self.square.sqrt()? + epsilon)?)?;
        let value = ((self.value.flatten_all()? * keep)? - change)?;
        self.value.set(&value.reshape(self.value.shape())?)
    }
}

/// What a step of AdamW does to every number of a parameter.
#[derive(Clone, Copy)]
struct Change {
    /// Factor of the gradient.
    factor: f32,
    /// Factor of the gradient's mean over the root of its square, both corrected for their start.
    scale: f32,
    epsilon: f32,
    /// Factor of the weight after weight decay.
    keep: f32,
}

#[derive(Clone, Copy)]
struct Rate {
    learning: f64,
    decay: f64,
}

/// Moves `parameters` one step against `gradients`, which have the same keys, after clipping. Parameters without a
/// gradient, on which the objective does not depend, do not change. Returns the norm of the gradients before clipping.
///
/// # Errors
/// If a gradient has another shape.
pub fn step(
    parameters: &mut Parameters,
    gradients: &BTreeMap<String, Tensor>,
    options: &AdamWOptions,
    step: usize,
    steps: usize,
) -> candle_core::Result<f64> {
    let mut squares = 0.0;
    for gradient in gradients.values() {
        squares += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let norm = squares.sqrt();
    let factor = (options.clip_norm / norm).min(1.0) as f32;
    let learning = options.learning_rate(step, steps);
    for (name, parameter) in parameters {
        let Some(gradient) = gradients.get(name) else { continue };
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

    const OPTIONS: AdamWOptions = AdamWOptions {
        peak_learning_rate: 0.1,
        warmup_steps: 10,
        schedule: Schedule::Cosine,
        weight_decay: 0.5,
        clip_norm: 1.0,
    };

    #[test]
    fn the_learning_rate_rises_to_its_peak_and_falls_to_its_final_share() {
        assert!((OPTIONS.learning_rate(0, 110) - 0.01).abs() < 1e-12);
        assert!((OPTIONS.learning_rate(10, 110) - 0.1).abs() < 1e-12);
        assert!((OPTIONS.learning_rate(60, 110) - 0.1 * (1.0 + FINAL_SHARE) / 2.0).abs() < 1e-12);
        assert!((OPTIONS.learning_rate(110, 110) - 0.1 * FINAL_SHARE).abs() < 1e-12);
    }

    #[test]
    fn a_trapezoid_stays_at_its_peak_until_the_cool_down() {
        let options = AdamWOptions { schedule: Schedule::Trapezoid { cooldown_steps: 20 }, ..OPTIONS };
        for (step, share) in [(4, 0.5), (10, 1.0), (80, 1.0), (90, (1.0 + FINAL_SHARE) / 2.0), (100, FINAL_SHARE)] {
            let found = options.learning_rate(step, 100);
            assert!((found - 0.1 * share).abs() < 1e-12, "step {step}: {found}");
        }
    }

    #[test]
    fn schedules_read_as_they_are_written() {
        for schedule in [Schedule::Cosine, Schedule::Trapezoid { cooldown_steps: 30 }] {
            assert_eq!(schedule.to_string().parse(), Ok(schedule));
        }
        let message = "trapezoid".parse::<Schedule>().unwrap_err();
        assert!(message.contains("`trapezoid`: expected cosine or trapezoid:COOLDOWN_STEPS"), "{message}");
    }

    #[test]
    fn a_parameter_without_a_gradient_stays_and_does_not_decay() {
        let matrix = Tensor::new(&[[2f32, -4.0]], &Device::Cpu).unwrap();
        let mut parameters = Parameters::from([("matrix".into(), Parameter::new(&matrix).unwrap())]);
        step(&mut parameters, &BTreeMap::new(), &OPTIONS, 0, 100).unwrap();
        assert_eq!(parameters["matrix"].value.to_vec2::<f32>().unwrap(), [[2.0, -4.0]]);
    }

    /// A first step moves every number by the learning rate against its gradient's sign, whatever the gradient's size.
    /// Matrices first shrink by their weight decay.
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
        // The gradient is clipped to norm 1 before the running mean is updated.
        assert!(close(parameters["norm"].mean.to_vec1().unwrap()[0], -0.1));
    }

    #[test]
    fn steps_and_running_means_equal_the_composed_ones() {
        let tensor = |seed: usize| {
            let numbers = (0..6).map(|i| ((i * 31 + seed * 7) as f32).sin());
            Tensor::from_iter(numbers, &Device::Cpu).unwrap().reshape((2, 3)).unwrap()
        };
        let [mut fused, mut composed] = [0; 2].map(|_| Parameter::new(&tensor(0)).unwrap());
        for step in 1..4 {
            let change = Change { factor: 0.7, scale: 0.02, epsilon: 1e-3, keep: 0.9 };
            fused.apply(&tensor(step), change).unwrap();
            composed.apply_composed(&tensor(step), change).unwrap();
            for (fused, composed) in [
                (fused.value.as_tensor(), composed.value.as_tensor()),
                (&fused.mean, &composed.mean),
                (&fused.square, &composed.square),
            ] {
                let worst = (fused - composed).unwrap().abs().unwrap().max_all().unwrap();
                assert!(worst.to_scalar::<f32>().unwrap() < 1e-6, "{fused} is not {composed}");
            }
        }
    }
}
