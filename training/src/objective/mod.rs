//! The training objective: next-token cross-entropy at one or all loops, distillation, and the loss of the gates.
//!
//! ```text
//! sum over loops i of c_i [ a CE_i + b T^2 KL(teacher || i) + d KL(last || i) ]  +  g sum over i < last of BCE_i
//! ```
//!
//! CE is next-token cross-entropy. The first KL is knowledge distillation from a full-size teacher at temperature T
//! (arXiv 1503.02531). The second KL is distillation from the last loop, which is detached so that it is not drawn
//! towards the earlier loops. The coefficients c_i are those of early-exit training (arXiv 2410.20672, sections 2.4 and
//! 3.7). BCE is the binary cross-entropy of a loop's gate, which predicts whether the token of its loop, or of the
//! next, is that of the last loop: the most likely one, or the one that is sampled with the same random numbers.
//!
//! Under a KV fill, loops run after tokens that exited. The distribution and the tokens of the last loop, as targets,
//! are then those of the last loop after exact keys and values. The last loop under the fill learns that distribution
//! too.

mod fill;
mod losses;
mod options;

use candle_core::{D, DType, Device, Result, Shape, Tensor};
use engine::reference::Reference;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_distr::Gumbel;

use fill::Served;
pub use fill::{ExitRule, FillOptions};
pub use losses::cross_entropy;
use losses::{binary_cross_entropy, divergence, softmax};
pub use options::{ExitCoefficients, GateOptions, GateTarget, ObjectiveOptions, TeacherOptions};

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
    /// Divergence of the earlier loops from the last, summed over them, if it is trained. Under a KV fill, that of all
    /// loops from the last with exact keys and values.
    pub self_distillation: Option<f64>,
    /// Binary cross-entropy of the gates, summed over them, if they are trained.
    pub gate: Option<f64>,
    /// Under a KV fill, share of the tokens after prompts whose most likely token at their exit is that of the last
    /// loop with exact keys and values; mean over windows.
    pub served_agreement: Option<f64>,
    /// Under a KV fill, mean passes of these tokens.
    pub mean_depth: Option<f64>,
}

/// Results of the loops of a batch, by depth.
#[derive(Default)]
struct Loops {
    /// `[windows * seq, hidden]`
    hidden: Vec<Tensor>,
    /// `[windows * seq, vocab]`, where they are needed.
    logits: Vec<Option<Tensor>>,
}

impl Loops {
    /// A run with exact keys and values, and logits of the depths that are `needed`.
    fn exact(model: &Reference, inputs: &Tensor, needed: impl Fn(usize) -> bool) -> Result<Self> {
        let (hidden, windows) = (model.hidden_states(inputs)?, inputs.dim(0)?);
        let logits = |(depth, hidden)| match needed(depth) {
            true => model.logits(&model.exit(hidden, windows)?, depth).map(Some),
            false => Ok(None),
        };
        let logits = hidden.iter().enumerate().map(logits).collect::<Result<_>>()?;
        Ok(Self { hidden, logits })
    }

    fn logits(&self, depth: usize) -> Result<&Tensor> {
        match self.logits.get(depth) {
            Some(Some(logits)) => Ok(logits),
            _ => candle_core::bail!("no logits at depth {depth}"),
        }
    }
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
        add(&mut self.served_agreement, other.served_agreement);
        add(&mut self.mean_depth, other.mean_depth);
    }
}

impl Objective {
    /// An objective, with its teacher if the options have one.
    pub fn new(options: ObjectiveOptions, teacher: Option<Reference>) -> Self {
        Self { options, teacher }
    }

    /// The objective of `model` on `inputs` `[windows, seq]` with the `targets` `[windows * seq]`: the scalar to
    /// differentiate, and its terms. Under a KV fill, the exits of a window depend on its seed.
    ///
    /// # Errors
    /// If the shapes do not match.
    pub fn of(&self, model: &Reference, inputs: &Tensor, targets: &Tensor, seeds: &[u64]) -> Result<(Tensor, Losses)> {
        let options = &self.options;
        let last = model.config().num_loops - 1;
        let coefficients = options.exits.of(last + 1);
        let needed = |depth| depth == last || coefficients[depth] > 0.0 || options.gate.is_some();
        let (loops, served) = match &options.kv_fill {
            None => (Loops::exact(model, inputs, needed)?, None),
            Some(fill) => Served::run(fill, model, inputs, seeds).map(|(loops, served)| (loops, Some(served)))?,
        };
        // What the loops should agree with.
        let full = match served {
            None => loops.logits(last)?.detach(),
            Some(_) => Loops::exact(model, inputs, |depth| depth == last)?.logits(last)?.detach(),
        };
        let teacher = self.teacher.as_ref().zip(options.teacher.as_ref());
        let teacher = teacher.map(|(model, options)| Target::of_teacher(model, options, inputs)).transpose()?;
        let of_full = (options.self_distillation > 0.0).then(|| Target::of_full(&full, options.self_distillation));
        let of_full = of_full.transpose()?;
        let sampler = options.gate.map(|gate| Sampler::new(gate.temperature, full.shape(), seeds)).transpose()?;

        let mut losses = Losses::default();
        let last_loss = cross_entropy(loops.logits(last)?, targets)?;
        losses.last = scalar(&last_loss)?;
        let mut total = (last_loss * options.cross_entropy)?;
        if let Some(teacher) = &teacher {
            let divergence = teacher.divergence(loops.logits(last)?)?;
            losses.teacher = Some(scalar(&divergence)? / teacher.weight);
            total = (total + divergence)?;
        }
        if let Some(of_full) = of_full.as_ref().filter(|_| served.is_some()) {
            total = (total + of_full.divergence_in(loops.logits(last)?, &mut losses.self_distillation)?)?;
        }
        total = (total * coefficients[last])?;

        for (depth, hidden) in loops.hidden[..last].iter().enumerate() {
            let coefficient = coefficients[depth];
            if coefficient > 0.0 {
                let student = loops.logits(depth)?;
                let mut loss = (cross_entropy(student, targets)? * options.cross_entropy)?;
                if let Some(teacher) = &teacher {
                    loss = (loss + teacher.divergence(student)?)?;
                }
                if let Some(of_full) = &of_full {
                    loss = (loss + of_full.divergence_in(student, &mut losses.self_distillation)?)?;
                }
                total = (total + (loss * coefficient)?)?;
            }
            if let Some((gate, sampler)) = options.gate.zip(sampler.as_ref()) {
                let judged = match gate.target {
                    GateTarget::Same => depth,
                    GateTarget::Next => depth + 1,
                };
                let agrees = sampler.tokens(loops.logits(judged)?)?.eq(&sampler.tokens(&full)?)?;
                let loss = gate_loss(model, gate, hidden, depth, &agrees)?;
                *losses.gate.get_or_insert(0.0) += scalar(&loss)?;
                total = (total + (loss * gate.weight)?)?;
            }
        }
        if let Some(served) = served {
            let tokens = |logits: &Tensor| logits.detach().argmax(D::Minus1)?.to_vec1::<u32>();
            let predicted = (0..=last).map(|depth| tokens(loops.logits(depth)?)).collect::<Result<Vec<_>>>()?;
            losses.served_agreement = Some(served.agreement(&predicted, &tokens(&full)?));
            losses.mean_depth = Some(served.mean_depth());
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

    /// The distribution of the last loop.
    fn of_full(logits: &Tensor, weight: f64) -> Result<Self> {
        Ok(Self { probabilities: softmax(logits)?, temperature: 1.0, weight })
    }

    /// The weighted divergence of `logits` `[rows, vocab]`, times the square of the temperature, so that its gradients
    /// do not shrink as the temperature rises.
    fn divergence(&self, logits: &Tensor) -> Result<Tensor> {
        let divergence = divergence(&(logits / self.temperature)?, &self.probabilities)?;
        divergence * (self.weight * self.temperature * self.temperature)
    }

    /// [`divergence`](Self::divergence), also added to a `sum` without its weight.
    fn divergence_in(&self, logits: &Tensor, sum: &mut Option<f64>) -> Result<Tensor> {
        let divergence = self.divergence(logits)?;
        *sum.get_or_insert(0.0) += scalar(&divergence)? / self.weight;
        Ok(divergence)
    }
}

/// Chooses the token of each row: the most likely one, or one that is drawn.
struct Sampler {
    temperature: f64,
    /// Standard Gumbel noise, `[rows, vocab]`; none at temperature 0.
    noise: Option<Tensor>,
}

impl Sampler {
    /// A sampler of rows of logits `[rows, vocab]`. What it draws for a window depends only on the window's seed.
    fn new(temperature: f64, shape: &Shape, seeds: &[u64]) -> Result<Self> {
        if temperature == 0.0 {
            return Ok(Self { temperature, noise: None });
        }
        let of_window = shape.elem_count() / seeds.len().max(1);
        let noise: Vec<f32> = seeds
            .iter()
            .flat_map(|seed| {
                // Other numbers than those of the window's exits.
                let rng = StdRng::seed_from_u64(!seed);
                rng.sample_iter(Gumbel::new(0.0, 1.0).expect("a positive scale")).take(of_window)
            })
            .collect();
        Ok(Self { temperature, noise: Some(Tensor::from_vec(noise, shape, &Device::Cpu)?) })
    }

    /// The tokens `[rows]` of `logits` `[rows, vocab]`. Rows of similar distributions get the same token as often as
    /// the engine's sampling gives them the same (the Gumbel-max trick with common random numbers).
    fn tokens(&self, logits: &Tensor) -> Result<Tensor> {
        let logits = logits.detach();
        let Some(noise) = &self.noise else { return logits.argmax(D::Minus1) };
        let noise = noise.to_device(logits.device())?;
        ((logits / self.temperature)? + noise)?.argmax(D::Minus1)
    }
}

/// Binary cross-entropy of the gate that reads `hidden` at `depth`. The label is whether the tokens that are compared
/// `agree`, `[rows]`.
fn gate_loss(model: &Reference, options: GateOptions, hidden: &Tensor, depth: usize, agree: &Tensor) -> Result<Tensor> {
    let agrees = agree.to_dtype(DType::F32)?;
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
    use candle_core::Var;
    use engine::Weights;
    use engine::config::{LoraConfig, LoraRanks, ModelConfig, Sharing, SlidingWindow};
    use rand_distr::{Distribution, Normal};
    use scheduler::KvFill;

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
    pub(super) fn relaxed() -> ModelConfig {
        ModelConfig {
            sharing: Sharing::Matrices,
            lora: Some(LoraConfig { ranks: LoraRanks::all(2), scale: 1.5 }),
            head_lora_rank: 2,
            gate: true,
            ..tiny()
        }
    }

    /// Variables for every tensor of a random model, changed so that loops differ and every term counts.
    pub(super) fn variables(config: &ModelConfig, seed: u64) -> HashMap<String, Var> {
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

    pub(super) fn model(config: &ModelConfig, variables: &HashMap<String, Var>) -> Reference {
        let tensors = variables.iter().map(|(name, v)| (name.clone(), v.as_tensor().clone()));
        Reference::new(&Weights::from_tensors(config.clone(), tensors.collect(), "test").unwrap()).unwrap()
    }

    /// Seeds of the windows of a batch.
    const SEEDS: [u64; 2] = [3, 8];

    pub(super) fn batch() -> (Tensor, Tensor) {
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
            gate: Some(GateOptions { weight: 0.5, ..GateOptions::default() }),
            kv_fill: None,
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
        let (total, losses) = objective.of(&model, &inputs, &targets, &SEEDS).unwrap();
        assert!((losses.objective - formula(&model, &fixed, &inputs, &targets)).abs() < 1e-4);
        let parts = [losses.last, losses.teacher.unwrap(), losses.self_distillation.unwrap(), losses.gate.unwrap()];
        assert!(parts.iter().all(|part| *part > 0.05), "a term hardly counts: {parts:?}");
        let all_tensors = assert_gradients(&total, &variables, || formula(&model, &fixed, &inputs, &targets));
        assert!(all_tensors, "a tensor has no gradient");
    }

    /// Checks the gradient of every variable against finite differences of `value`. Returns whether all have one: the
    /// value may not depend on those that do not.
    fn assert_gradients(total: &Tensor, variables: &HashMap<String, Var>, value: impl Fn() -> f64) -> bool {
        let gradients = total.backward().unwrap();
        for (name, variable) in variables {
            let start = variable.as_tensor().copy().unwrap();
            // Without a gradient, any direction.
            let gradient = gradients.get(variable).cloned();
            let slope = gradient.as_ref().map_or(0.0, norm);
            assert!(gradient.is_none() || slope > 0.0, "{name} has a gradient of zero");
            // The slope is steepest along the gradient, where the difference loses least to rounding.
            let direction = match &gradient {
                Some(gradient) => (gradient / slope).unwrap(),
                None => start.ones_like().unwrap(),
            };
            let along = |step: f64| {
                variable.set(&(&start + (&direction * step).unwrap()).unwrap()).unwrap();
                value()
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
        variables.values().all(|variable| gradients.get(variable).is_some())
    }

    /// Options under a KV fill, without terms that have detached values.
    fn filled(fill: KvFill, exits: ExitRule) -> ObjectiveOptions {
        ObjectiveOptions {
            exits: ExitCoefficients::Aggressive(0.3),
            kv_fill: Some(FillOptions { exits, prompt: 0.0, ..FillOptions::new(fill) }),
            ..ObjectiveOptions::default()
        }
    }

    #[test]
    fn gradients_under_a_kv_fill_equal_finite_differences() {
        let mut config = ModelConfig { coda_layers: 1, gate: false, ..relaxed() };
        config.architecture.sliding_window = Some(SlidingWindow { tokens: 3, rope_theta: 100.0, layers: vec![1, 6] });
        let variables = variables(&config, 5);
        let model = model(&config, &variables);
        let (inputs, targets) = batch();
        for fill in [KvFill::Reuse, KvFill::First, KvFill::Skip] {
            let objective = Objective::new(filled(fill, ExitRule::Uniform), None);
            let of = || objective.of(&model, &inputs, &targets, &SEEDS).unwrap();
            let all_tensors = assert_gradients(&of().0, &variables, || of().1.objective);
            // Keys and values of deeper loops are not computed where depth 0's are used.
            assert_eq!(all_tensors, fill != KvFill::First, "{fill}");
        }
    }

    #[test]
    fn tokens_that_do_not_exit_have_the_losses_of_exact_keys_and_values() {
        let (config, variables) = (relaxed(), variables(&relaxed(), 5));
        let model = model(&config, &variables);
        let (inputs, targets) = batch();
        let of = |kv_fill| {
            let options = ObjectiveOptions { teacher: None, kv_fill, ..options() };
            Objective::new(options, None).of(&model, &inputs, &targets, &SEEDS).unwrap().1
        };
        let exact = of(None);
        for (fill, exits) in [(KvFill::Reuse, "geometric:0"), (KvFill::Skip, "margin:2")] {
            let options = FillOptions { exits: exits.parse().unwrap(), ..FillOptions::new(fill) };
            let found = of(Some(options));
            let close = |found: f64, exact: f64| (found - exact).abs() < 1e-5;
            assert!(close(found.objective, exact.objective) && close(found.gate.unwrap(), exact.gate.unwrap()));
            assert_eq!((found.served_agreement, found.mean_depth), (Some(1.0), Some(3.0)));
        }
        let exits = FillOptions { exits: ExitRule::Geometric(1.0), ..FillOptions::new(KvFill::Reuse) };
        assert!((of(Some(exits)).objective - exact.objective).abs() > 1e-3, "exits change the losses");
    }

    #[test]
    fn agreement_under_a_kv_fill_compares_the_tokens_at_exits_with_those_of_exact_full_depth() {
        let (config, variables) = (relaxed(), variables(&relaxed(), 5));
        let model = model(&config, &variables);
        let (inputs, targets) = batch();
        let tokens = |logits: &Tensor| logits.argmax(D::Minus1).unwrap().to_vec1::<u32>().unwrap();
        let exact = model.forward(&inputs).unwrap();
        let (first, last) = (tokens(&exact[0]), tokens(&exact[2]));
        let agreeing = first.iter().zip(&last).filter(|(first, last)| first == last).count();
        assert!(agreeing > 0 && agreeing < 10, "{agreeing} of 10");
        // Every token exits at depth 0, where keys and values are exact.
        let objective = Objective::new(filled(KvFill::Reuse, ExitRule::Geometric(1.0)), None);
        let losses = objective.of(&model, &inputs, &targets, &SEEDS).unwrap().1;
        let close = |found: Option<f64>, expected: f64| (found.unwrap() - expected).abs() < 1e-9;
        assert!(close(losses.served_agreement, agreeing as f64 / 10.0) && close(losses.mean_depth, 1.0), "{losses:?}");
    }

    #[test]
    fn a_gate_at_a_temperature_learns_whether_sampled_tokens_agree() {
        let (config, variables) = (relaxed(), variables(&relaxed(), 5));
        let model = model(&config, &variables);
        let (inputs, targets) = batch();
        let logits = model.forward(&inputs).unwrap();
        let states = model.hidden_states(&inputs).unwrap();
        let found = |temperature| {
            let gate = Some(GateOptions { temperature, ..GateOptions::default() });
            let objective = Objective::new(ObjectiveOptions { gate, ..ObjectiveOptions::default() }, None);
            objective.of(&model, &inputs, &targets, &SEEDS).unwrap().1.gate.unwrap()
        };
        let expected = |temperature| -> f64 {
            let sampler = Sampler::new(temperature, logits[2].shape(), &SEEDS).unwrap();
            let tokens = |depth: usize| sampler.tokens(&logits[depth]).unwrap().to_vec1::<u32>().unwrap();
            let of_gate = |depth| {
                let scores = model.gate_logits(&model.final_norm(&states[depth]).unwrap(), depth).unwrap().unwrap();
                let scores = scores.to_vec1::<f32>().unwrap();
                let of_token = |((score, own), last): ((&f32, u32), u32)| {
                    (if own == last { -f64::from(*score) } else { f64::from(*score) }).exp().ln_1p()
                };
                scores.iter().zip(tokens(depth)).zip(tokens(2)).map(of_token).sum::<f64>() / scores.len() as f64
            };
            (0..2).map(of_gate).sum()
        };
        assert!((expected(0.0) - expected(3.0)).abs() > 1e-2, "sampled tokens agree elsewhere");
        for temperature in [0.0, 3.0] {
            assert!((found(temperature) - expected(temperature)).abs() < 1e-5, "at {temperature}");
        }
    }

    #[test]
    fn a_gate_with_the_target_next_learns_whether_the_next_loop_agrees_with_the_last() {
        let (config, variables) = (relaxed(), variables(&relaxed(), 5));
        let model = model(&config, &variables);
        let (inputs, targets) = batch();
        let tokens = |logits: &Tensor| logits.argmax(D::Minus1).unwrap().to_vec1::<u32>().unwrap();
        let predicted: Vec<Vec<u32>> = model.forward(&inputs).unwrap().iter().map(tokens).collect();
        let states = model.hidden_states(&inputs).unwrap();
        let expected = |judged: [usize; 2]| -> f64 {
            let of_gate = |(depth, judged): (usize, usize)| {
                let scores = model.gate_logits(&model.final_norm(&states[depth]).unwrap(), depth).unwrap().unwrap();
                let scores = scores.to_vec1::<f32>().unwrap();
                let of_token = |(token, score): (usize, &f32)| {
                    let agrees = predicted[judged][token] == predicted[2][token];
                    (if agrees { -f64::from(*score) } else { f64::from(*score) }).exp().ln_1p()
                };
                scores.iter().enumerate().map(of_token).sum::<f64>() / scores.len() as f64
            };
            judged.into_iter().enumerate().map(of_gate).sum()
        };
        let found = |target| {
            let gate = Some(GateOptions { target, ..GateOptions::default() });
            let objective = Objective::new(ObjectiveOptions { gate, ..ObjectiveOptions::default() }, None);
            objective.of(&model, &inputs, &targets, &SEEDS).unwrap().1.gate.unwrap()
        };
        let (same, next) = (expected([0, 1]), expected([1, 2]));
        assert!((same - next).abs() > 1e-2, "the targets differ: {same} and {next}");
        assert!((found(GateTarget::Same) - same).abs() < 1e-5 && (found(GateTarget::Next) - next).abs() < 1e-5);
    }

    #[test]
    fn sampled_tokens_are_those_of_the_distribution_and_differ_only_where_distributions_do() {
        let rows = 4000;
        let logits = |values: [f32; 3]| Tensor::new(&values, &Device::Cpu).unwrap().repeat((rows, 1)).unwrap();
        let p = logits([2.0, 1.0, 0.0]);
        let close = logits([2.1, 1.0, 0.0]);
        let far = logits([0.0, 1.0, 2.0]);
        let tokens = |temperature: f64, seeds: &[u64], logits: &Tensor| {
            let sampler = Sampler::new(temperature, p.shape(), seeds).unwrap();
            sampler.tokens(logits).unwrap().to_vec1::<u32>().unwrap()
        };
        let share = |of: &dyn Fn(usize) -> bool| (0..rows).filter(|row| of(*row)).count() as f64 / rows as f64;
        for temperature in [0.5, 1.0] {
            let drawn = tokens(temperature, &[1, 2], &p);
            let weights = [2.0, 1.0, 0.0].map(|logit: f64| (logit / temperature).exp());
            for (token, weight) in weights.iter().enumerate() {
                let expected = weight / weights.iter().sum::<f64>();
                let found = share(&|row| drawn[row] as usize == token);
                assert!((found - expected).abs() < 0.03, "token {token} at {temperature}: {found}, not {expected}");
            }
        }
        let drawn = tokens(1.0, &[1, 2], &p);
        let differ = |other: Vec<u32>| share(&|row| other[row] != drawn[row]);
        assert!(differ(tokens(1.0, &[1, 2], &p)) == 0.0, "equal distributions have equal tokens");
        let (of_close, of_far) = (differ(tokens(1.0, &[1, 2], &close)), differ(tokens(1.0, &[1, 2], &far)));
        assert!((0.005..0.05).contains(&of_close) && of_far > 0.5, "{of_close} and {of_far}");
        assert!(differ(tokens(1.0, &[1, 3], &p)) > 0.1, "another seed draws other tokens");
        assert_eq!(tokens(0.0, &[1, 2], &p), vec![0; rows]);
    }

    #[test]
    fn distillation_does_not_train_the_last_loop_and_gates_do_not_train_what_they_read() {
        let (config, variables) = (relaxed(), variables(&relaxed(), 5));
        let model = model(&config, &variables);
        let (inputs, targets) = batch();
        let gradients = |change: &dyn Fn(&mut ObjectiveOptions)| {
            let mut options = ObjectiveOptions { cross_entropy: 0.0, ..ObjectiveOptions::default() };
            change(&mut options);
            let (total, _) = Objective::new(options, None).of(&model, &inputs, &targets, &SEEDS).unwrap();
            let store = total.backward().unwrap();
            let of = |name: &str| store.get(&variables[name]).map_or(0.0, norm);
            let last_only = of("lora.2.layers.1.mlp.down_proj.b");
            (last_only, of("gate.0.weight"), of("norm.weight"), of("block.layers.0.mlp.up_proj.weight"))
        };
        let distilled = gradients(&|options| {
            (options.exits, options.self_distillation) = (ExitCoefficients::Weighted, 1.0);
        });
        assert!(distilled.0 == 0.0 && distilled.3 > 0.0, "{distilled:?}");
        let gated = gradients(&|options| options.gate = Some(GateOptions::default()));
        assert!(gated.1 > 0.0 && (gated.2, gated.3) == (0.0, 0.0), "{gated:?}");
        let through =
            gradients(&|options| options.gate = Some(GateOptions { through: true, ..GateOptions::default() }));
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
            objective.of(&model, &inputs, &targets, &SEEDS[first..first + windows]).unwrap().1
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
        let (_, losses) =
            Objective::new(ObjectiveOptions::default(), None).of(&model, &inputs, &targets, &SEEDS).unwrap();
        assert_eq!(losses.objective, losses.last);
        assert_eq!((losses.teacher, losses.self_distillation, losses.gate), (None, None, None));
    }
}
