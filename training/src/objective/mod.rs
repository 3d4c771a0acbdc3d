//! The training objective: next-token cross-entropy at one or all loops, distillation, and the loss of the gates.
//!
//! ```text
//! sum over loops i of c_i [ a CE_i + b T^2 KL(teacher || i) + d KL(last || i) ]  +  g sum over i < last of BCE_i
//! ```
//!
//! CE is next-token cross-entropy. The first KL is knowledge distillation from a full-size teacher at temperature T
//! (arXiv 1503.02531). The second KL is distillation from the last loop, which is detached so that it is not drawn
//! towards the earlier loops. The coefficients c_i are those of early-exit training (arXiv 2410.20672, sections 2.4 and
//! 3.7). BCE is the binary cross-entropy of a loop's gate, which predicts whether the loop's most likely token is that
//! of the last loop.

mod losses;
mod options;

use candle_core::{D, DType, Result, Tensor};
use engine::reference::Reference;

pub use losses::cross_entropy;
use losses::{binary_cross_entropy, divergence, softmax};
pub use options::{ExitCoefficients, GateOptions, ObjectiveOptions, TeacherOptions};

/// The objective of a run.
pub struct Objective {
    options: ObjectiveOptions,
    teacher: Option<Reference>,
}

/// The objective of a batch and its terms: means over tokens, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Losses {
    /// The training objective.
    pub objective: f64,
    /// Cross-entropy of the last loop.
    pub last: f64,
    /// Divergence of the last loop from the teacher at the teacher's temperature, if there is a teacher.
    pub teacher: Option<f64>,
    /// Divergence of the earlier loops from the last, summed over them, if it is trained.
    pub self_distillation: Option<f64>,
    /// Binary cross-entropy of the gates, summed over them, if they are trained.
    pub gate: Option<f64>,
}

impl Losses {
    /// Adds the losses of other tokens, weighted by their `share` of all tokens.
    pub fn add(&mut self, other: &Self, share: f64) {
        let add = |sum: &mut Option<f64>, part: Option<f64>| {
            if let Some(part) = part {
                *sum = Some(sum.unwrap_or_default() + part * share);
            }
        };
        self.objective += other.objective * share;
        self.last += other.last * share;
        add(&mut self.teacher, other.teacher);
        add(&mut self.self_distillation, other.self_distillation);
        add(&mut self.gate, other.gate);
    }
}

impl Objective {
    /// An objective, with its teacher if the options have one.
    pub fn new(options: ObjectiveOptions, teacher: Option<Reference>) -> Self {
        Self { options, teacher }
    }

    /// The objective of `model` on `inputs` `[windows, seq]` with the `targets` `[windows * seq]`: the scalar to
    /// differentiate, and its terms.
    ///
    /// # Errors
    /// If the shapes do not match.
    pub fn of(&self, model: &Reference, inputs: &Tensor, targets: &Tensor) -> Result<(Tensor, Losses)> {
        let options = &self.options;
        let states = model.hidden_states(inputs)?;
        let windows = inputs.dim(0)?;
        let logits = |hidden: &Tensor, depth| model.logits(&model.exit(hidden, windows)?, depth);
        let Some((last_hidden, earlier)) = states.split_last() else {
            candle_core::bail!("the objective of no loop, expected at least one");
        };
        let last = logits(last_hidden, earlier.len())?;
        let teacher = self.teacher.as_ref().zip(options.teacher.as_ref());
        let teacher = teacher.map(|(model, options)| Target::of_teacher(model, options, inputs)).transpose()?;
        let coefficients = options.exits.of(states.len());

        let mut losses = Losses::default();
        let last_loss = cross_entropy(&last, targets)?;
        losses.last = scalar(&last_loss)?;
        let mut total = (last_loss * options.cross_entropy)?;
        if let Some(teacher) = &teacher {
            let divergence = teacher.divergence(&last)?;
            losses.teacher = Some(scalar(&divergence)? / teacher.weight);
            total = (total + divergence)?;
        }
        total = (total * coefficients[earlier.len()])?;

        let of_last = (options.self_distillation > 0.0).then(|| Target::of_last(&last, options.self_distillation));
        let of_last = of_last.transpose()?;
        for (depth, hidden) in earlier.iter().enumerate() {
            let coefficient = coefficients[depth];
            if coefficient > 0.0 {
                let student = logits(hidden, depth)?;
                let mut loss = (cross_entropy(&student, targets)? * options.cross_entropy)?;
                if let Some(teacher) = &teacher {
                    loss = (loss + teacher.divergence(&student)?)?;
                }
                if let Some(of_last) = &of_last {
                    let divergence = of_last.divergence(&student)?;
                    *losses.self_distillation.get_or_insert(0.0) += scalar(&divergence)? / of_last.weight;
                    loss = (loss + divergence)?;
                }
                total = (total + (loss * coefficient)?)?;
            }
            if let Some(gate) = options.gate {
                let exit = logits(&hidden.detach(), depth)?;
                let loss = gate_loss(model, gate, hidden, depth, &exit, &last)?;
                *losses.gate.get_or_insert(0.0) += scalar(&loss)?;
                total = (total + (loss * gate.weight)?)?;
            }
        }
        losses.objective = scalar(&total)?;
        Ok((total, losses))
    }
}

fn scalar(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}

/// A distribution to learn from.
struct Target {
    /// `[rows, vocab]`, without gradient.
    probabilities: Tensor,
    temperature: f64,
    weight: f64,
}

impl Target {
    fn of_teacher(model: &Reference, options: &TeacherOptions, inputs: &Tensor) -> Result<Self> {
        let states = model.hidden_states(inputs)?;
        let Some((hidden, earlier)) = states.split_last() else {
            candle_core::bail!("a teacher of no loop, expected at least one");
        };
        let logits = model.logits(&model.exit(hidden, inputs.dim(0)?)?, earlier.len())?;
        let probabilities = softmax(&(logits / options.temperature)?)?;
        Ok(Self { probabilities, temperature: options.temperature, weight: options.weight })
    }

    fn of_last(logits: &Tensor, weight: f64) -> Result<Self> {
        Ok(Self { probabilities: softmax(logits)?, temperature: 1.0, weight })
    }

    /// The weighted divergence of `logits` `[rows, vocab]`, times the square of the temperature, so that its gradients
    /// do not shrink as the temperature rises.
    fn divergence(&self, logits: &Tensor) -> Result<Tensor> {
        let divergence = divergence(&(logits / self.temperature)?, &self.probabilities)?;
        divergence * (self.weight * self.temperature * self.temperature)
    }
}

/// Binary cross-entropy of the gate that reads `hidden` at `depth`. The label is whether the most likely token of the
/// `exit` logits is that of the `last` logits.
fn gate_loss(
    model: &Reference,
    options: GateOptions,
    hidden: &Tensor,
    depth: usize,
    exit: &Tensor,
    last: &Tensor,
) -> Result<Tensor> {
    let token = |logits: &Tensor| logits.detach().argmax(D::Minus1);
    let agrees = token(exit)?.eq(&token(last)?)?.to_dtype(DType::F32)?;
    let normed = model.final_norm(hidden)?;
    let normed = if options.through { normed } else { normed.detach() };
    match model.gate_logits(&normed, depth)? {
        Some(scores) => binary_cross_entropy(&scores, &agrees),
        None => candle_core::bail!("no gate at depth {depth}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use candle_core::{Device, Shape, Var};
    use engine::Weights;
    use engine::config::{LoraConfig, LoraRanks, ModelConfig, Sharing};
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use rand_distr::{Distribution, Normal};

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
            max_positions: 8,
            ..ModelConfig::default()
        }
    }

    /// A model with every kind of component, all of whose tensors differ from their initial values.
    fn relaxed() -> ModelConfig {
        ModelConfig {
            sharing: Sharing::Matrices,
            lora: Some(LoraConfig { ranks: LoraRanks::all(2), scale: 1.5 }),
            head_lora_rank: 2,
            gate: true,
            ..tiny()
        }
    }

    /// Variables for every tensor of a random model, changed so that loops differ and every term counts.
    fn variables(config: &ModelConfig, seed: u64) -> HashMap<String, Var> {
        let start = Weights::random(config.clone(), seed).unwrap();
        let mut rng = StdRng::seed_from_u64(seed);
        let variable = |(name, tensor): (&String, &Tensor)| {
            let factor = if name == "embed_tokens.weight" { 20.0 } else { 1.0 };
            let moved = (tensor * factor).unwrap() + normal(tensor.shape(), 0.2, &mut rng);
            (name.clone(), Var::from_tensor(&moved.unwrap()).unwrap())
        };
        start.tensors().iter().map(variable).collect()
    }

    /// Normal values drawn from `rng`; candle on the CPU has no seed.
    pub(super) fn normal(shape: impl Into<Shape>, deviation: f32, rng: &mut StdRng) -> Tensor {
        let (shape, distribution) = (shape.into(), Normal::new(0.0, deviation).unwrap());
        let values: Vec<f32> = distribution.sample_iter(rng).take(shape.elem_count()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn model(config: &ModelConfig, variables: &HashMap<String, Var>) -> Reference {
        let tensors = variables.iter().map(|(name, v)| (name.clone(), v.as_tensor().clone()));
        Reference::new(&Weights::from_tensors(config.clone(), tensors.collect(), "test").unwrap()).unwrap()
    }

    fn batch() -> (Tensor, Tensor) {
        let inputs = Tensor::new(&[[1u32, 2, 3, 4, 5], [9, 12, 0, 3, 3]], &Device::Cpu).unwrap();
        let targets = Tensor::new(&[2u32, 3, 4, 5, 6, 12, 0, 3, 3, 1], &Device::Cpu).unwrap();
        (inputs, targets)
    }

    fn number(x: &Tensor) -> f64 {
        f64::from(x.to_scalar::<f32>().unwrap())
    }

    fn norm(x: &Tensor) -> f64 {
        number(&x.sqr().unwrap().sum_all().unwrap()).sqrt()
    }

    fn options() -> ObjectiveOptions {
        ObjectiveOptions {
            exits: ExitCoefficients::Aggressive(0.3),
            cross_entropy: 0.8,
            teacher: Some(TeacherOptions { model: "teacher".into(), weight: 0.6, temperature: 2.0 }),
            self_distillation: 0.7,
            gate: Some(GateOptions { weight: 0.5, through: false }),
        }
    }

    /// Softened probabilities at a temperature, and their logarithms, by candle.
    fn softened(logits: &Tensor, temperature: f64) -> (Tensor, Tensor) {
        let log = candle_nn::ops::log_softmax(&(logits / temperature).unwrap(), 1).unwrap();
        (log.exp().unwrap(), log)
    }

    fn kl(teacher: &Tensor, student: &Tensor, temperature: f64) -> f64 {
        let ((p, log_p), (_, log_q)) = (softened(teacher, temperature), softened(student, temperature));
        let rows = teacher.dim(0).unwrap() as f64;
        number(&(p * (log_p - log_q).unwrap()).unwrap().sum_all().unwrap()) / rows
    }

    /// Constants of the objective: the teacher's logits, the last loop's logits as a target, and whether each exit's
    /// token is that of the last loop.
    struct Fixed {
        teacher: Tensor,
        last: Tensor,
        agrees: Vec<Vec<bool>>,
        normed: Vec<Tensor>,
    }

    impl Fixed {
        fn of(model: &Reference, teacher: &Reference, inputs: &Tensor) -> Self {
            let logits = model.forward(inputs).unwrap();
            let tokens = |logits: &Tensor| logits.argmax(D::Minus1).unwrap().to_vec1::<u32>().unwrap();
            let last = tokens(&logits[2]);
            let agrees = |logits: &Tensor| tokens(logits).iter().zip(&last).map(|(own, last)| own == last).collect();
            let states = model.hidden_states(inputs).unwrap();
            Self {
                teacher: teacher.forward(inputs).unwrap().pop().unwrap(),
                last: logits[2].detach(),
                agrees: logits[..2].iter().map(agrees).collect(),
                normed: states[..2].iter().map(|hidden| model.final_norm(hidden).unwrap().detach()).collect(),
            }
        }
    }

    /// The objective by its formula, with detached values held fixed.
    fn formula(model: &Reference, fixed: &Fixed, inputs: &Tensor, targets: &Tensor) -> f64 {
        let logits = model.forward(inputs).unwrap();
        let ce = |logits| number(&candle_nn::loss::cross_entropy(logits, targets).unwrap());
        let mut total = 0.8 * ce(&logits[2]) + 0.6 * 4.0 * kl(&fixed.teacher, &logits[2], 2.0);
        for (depth, student) in logits[..2].iter().enumerate() {
            total += 0.3 * (0.8 * ce(student) + 0.6 * 4.0 * kl(&fixed.teacher, student, 2.0));
            total += 0.3 * 0.7 * kl(&fixed.last, student, 1.0);
            let scores = model.gate_logits(&fixed.normed[depth], depth).unwrap().unwrap().to_vec1::<f32>().unwrap();
            for (score, agrees) in scores.iter().zip(&fixed.agrees[depth]) {
                let probability = (1.0 + (-f64::from(*score)).exp()).recip();
                let of_label = if *agrees { probability } else { 1.0 - probability };
                total -= 0.5 * of_label.ln() / scores.len() as f64;
            }
        }
        total
    }

    #[test]
    fn every_tensors_gradient_equals_finite_differences_of_the_formula() {
        let (variables, config) = (variables(&relaxed(), 5), relaxed());
        let model = model(&config, &variables);
        let teacher = super::tests::model(&tiny(), &super::tests::variables(&tiny(), 6));
        let (inputs, targets) = batch();
        let fixed = Fixed::of(&model, &teacher, &inputs);
        let objective = Objective::new(options(), Some(teacher));
        let (total, losses) = objective.of(&model, &inputs, &targets).unwrap();
        assert!((losses.objective - formula(&model, &fixed, &inputs, &targets)).abs() < 1e-4);
        let parts = [losses.last, losses.teacher.unwrap(), losses.self_distillation.unwrap(), losses.gate.unwrap()];
        assert!(parts.iter().all(|part| *part > 0.05), "a term hardly counts: {parts:?}");
        let gradients = total.backward().unwrap();

        for (name, variable) in &variables {
            let start = variable.as_tensor().copy().unwrap();
            let gradient = gradients.get(variable).unwrap_or_else(|| panic!("{name} has no gradient"));
            // The slope is steepest along the gradient, where the difference loses least to rounding.
            let slope = norm(gradient);
            assert!(slope > 0.0, "{name} has a gradient of zero");
            let direction = (gradient / slope).unwrap();
            let along = |step: f64| {
                variable.set(&(&start + (&direction * step).unwrap()).unwrap()).unwrap();
                formula(&model, &fixed, &inputs, &targets)
            };
            let central = |step: f64| (along(step) - along(-step)) / (2.0 * step);
            // Small where the slope, and with it the curvature, is large. The difference is of fourth order. Of 60
            // seeds, the largest error was a quarter of this tolerance; a central difference exceeded it for some.
            let step = 0.005 / (1.0 + slope);
            let difference = (4.0 * central(step) - central(2.0 * step)) / 3.0;
            variable.set(&start).unwrap();
            assert!(
                (slope - difference).abs() < 5e-3 * slope + 2e-3,
                "{name}: gradient {slope}, finite difference {difference}"
            );
        }
    }

    #[test]
    fn distillation_does_not_train_the_last_loop_and_gates_do_not_train_what_they_read() {
        let (config, variables) = (relaxed(), variables(&relaxed(), 5));
        let model = model(&config, &variables);
        let (inputs, targets) = batch();
        let gradients = |change: &dyn Fn(&mut ObjectiveOptions)| {
            let mut options = ObjectiveOptions { cross_entropy: 0.0, ..ObjectiveOptions::default() };
            change(&mut options);
            let (total, _) = Objective::new(options, None).of(&model, &inputs, &targets).unwrap();
            let store = total.backward().unwrap();
            let of = |name: &str| store.get(&variables[name]).map_or(0.0, norm);
            let last_only = of("lora.2.layers.1.mlp.down_proj.b");
            (last_only, of("gate.0.weight"), of("norm.weight"), of("block.layers.0.mlp.up_proj.weight"))
        };
        let distilled = gradients(&|options| {
            (options.exits, options.self_distillation) = (ExitCoefficients::Weighted, 1.0);
        });
        assert!(distilled.0 == 0.0 && distilled.3 > 0.0, "{distilled:?}");
        let gated = gradients(&|options| options.gate = Some(GateOptions { weight: 1.0, through: false }));
        assert!(gated.1 > 0.0 && (gated.2, gated.3) == (0.0, 0.0), "{gated:?}");
        let through = gradients(&|options| options.gate = Some(GateOptions { weight: 1.0, through: true }));
        assert!(through.1 > 0.0 && through.2 > 0.0 && through.3 > 0.0, "{through:?}");
    }

    #[test]
    fn losses_of_parts_add_up_to_those_of_the_whole() {
        let (config, variables) = (relaxed(), variables(&relaxed(), 5));
        let model = model(&config, &variables);
        let (inputs, targets) = batch();
        let objective = Objective::new(ObjectiveOptions { teacher: None, ..options() }, None);
        let of = |first: usize, windows: usize| {
            let inputs = inputs.narrow(0, first, windows).unwrap();
            let targets = targets.narrow(0, 5 * first, 5 * windows).unwrap();
            objective.of(&model, &inputs, &targets).unwrap().1
        };
        let (whole, mut sum) = (of(0, 2), Losses::default());
        sum.add(&of(0, 1), 0.5);
        sum.add(&of(1, 1), 0.5);
        assert!((whole.objective - sum.objective).abs() < 1e-5 && (whole.last - sum.last).abs() < 1e-5);
        assert!((whole.gate.unwrap() - sum.gate.unwrap()).abs() < 1e-5);
        assert_eq!(sum.teacher, None);
    }

    #[test]
    fn a_model_of_one_loop_has_no_terms_but_its_own() {
        let config = ModelConfig { num_loops: 1, ..tiny() };
        let model = model(&config, &variables(&config, 5));
        let (inputs, targets) = batch();
        let (_, losses) = Objective::new(ObjectiveOptions::default(), None).of(&model, &inputs, &targets).unwrap();
        assert_eq!(losses.objective, losses.last);
        assert_eq!((losses.teacher, losses.self_distillation, losses.gate), (None, None, None));
    }
}
