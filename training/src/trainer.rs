//! The training run: data-parallel steps, checkpoints, and going on from one.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use engine::config::ModelConfig;
use engine::reference::Reference;
use engine::tokenizer::Tokenizer;
use engine::weights::{Stored, TOKENIZER_FILE, Weights, write_then_rename};
use serde::{Deserialize, Serialize};

use crate::corpus::{Corpus, inputs_and_targets};
use crate::error::TrainingError;
use crate::evaluation::{Evaluation, evaluate};
use crate::objective::{ObjectiveWeights, objective};
use crate::optimizer::{self, AdamWOptions, Parameter, Parameters};

/// The run's options in its folder.
pub const OPTIONS_FILE: &str = "training.json";
/// Parameters and optimizer state of the latest checkpoint.
pub const STATE_FILE: &str = "training-state.safetensors";
/// The loss curve, one row per step.
pub const LOSS_FILE: &str = "loss.csv";

/// Sequences of one backward pass hold about this many tokens, so that its activations stay in a
/// core's cache; a larger batch sums several passes.
const TOKENS_PER_BACKWARD: usize = 256;
/// Of the held-out text, this much is looked at during the run.
const QUICK_HELD_OUT_LINES: usize = 150;

/// What a run does, beside the model's sizes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingOptions {
    /// Files of the training text, joined.
    pub text: Vec<PathBuf>,
    /// File of the held-out text.
    pub held_out: PathBuf,
    /// Steps of the whole run.
    pub steps: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Threads that share a step's sequences.
    pub workers: usize,
    /// Steps between checkpoints.
    pub checkpoint_steps: usize,
    /// Seed of the initial weights and of the batches.
    pub seed: u64,
    /// Weights of the earlier loops' losses.
    pub objective: ObjectiveWeights,
    /// The optimizer.
    pub optimizer: AdamWOptions,
}

/// A step of the loss curve. Losses are means over the batch's tokens, in nats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossRow {
    /// Step, from 0.
    pub step: usize,
    /// Tokens trained on up to and with this step.
    pub tokens: usize,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// The objective.
    pub objective: f64,
    /// Cross-entropy of the last loop.
    pub loss_nats_per_token: f64,
    /// Divergence of the earlier loops from the last, summed over them.
    pub divergence_nats_per_token: f64,
    /// Norm of the gradients before clipping.
    pub gradient_norm: f64,
    /// Bits per byte of the last loop on the start of the held-out text, at checkpoints.
    pub held_out_bits_per_byte: Option<f64>,
}

/// News of a running training.
pub enum Event<'a> {
    /// A step was taken.
    Step {
        /// What it gave.
        row: &'a LossRow,
        /// Speed since this process began the run.
        tokens_per_second: f64,
        /// Time left at that speed.
        remaining: Duration,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Steps taken.
        step: usize,
        /// Figures on the start of the held-out text.
        held_out: &'a Evaluation,
    },
}

/// A training run and all its state.
pub struct Trainer {
    options: TrainingOptions,
    folder: PathBuf,
    tokenizer: Tokenizer,
    corpus: Corpus,
    held_out: Corpus,
    quick_held_out: Corpus,
    parameters: Parameters,
    weights: Weights,
    model: Reference,
    curve: Vec<LossRow>,
}

impl Trainer {
    /// Starts a run from random weights, with a tokenizer trained on the text, in `folder`, which
    /// is created.
    ///
    /// # Errors
    /// If an option is out of range, a text is unreadable or too short, or the folder cannot be
    /// written.
    pub fn start(options: TrainingOptions, config: ModelConfig, folder: &Path) -> Result<Self, TrainingError> {
        let weights = Weights::random(config, options.seed)?;
        let mut parameters = Parameters::new();
        for (name, tensor) in weights.tensors() {
            parameters.insert(name.clone(), Parameter::new(tensor)?);
        }
        let text = read_texts(&options.text)?;
        let tokenizer = Tokenizer::train(&text, weights.config().vocab_size)?;
        std::fs::create_dir_all(folder).map_err(|e| in_file(folder, e))?;
        save_options(&options, folder)?;
        let config = weights.config().clone();
        Self::new(options, folder, config, tokenizer, parameters, Vec::new())
    }

    /// Goes on from the latest checkpoint in `folder`, to the planned end or to another number of
    /// `steps`; the learning rate then follows the course of a run of that length from here on.
    ///
    /// # Errors
    /// If the checkpoint is incomplete, if more than `steps` were taken, or as for
    /// [`Trainer::start`].
    pub fn resume(folder: &Path, steps: Option<usize>) -> Result<Self, TrainingError> {
        let path = folder.join(OPTIONS_FILE);
        let json = std::fs::read_to_string(&path).map_err(|e| in_file(&path, e))?;
        let mut options: TrainingOptions = serde_json::from_str(&json).map_err(|e| in_file(&path, e.into()))?;
        let tokenizer = Tokenizer::load(&folder.join(TOKENIZER_FILE))?;
        let config = Weights::load(folder)?.config().clone();
        let (parameters, taken) = load_state(&folder.join(STATE_FILE), &config)?;
        let curve = read_curve(&folder.join(LOSS_FILE), taken)?;
        options.steps = steps.unwrap_or(options.steps);
        if options.steps < taken {
            return Err(TrainingError::Option {
                option: "steps",
                found: options.steps.to_string(),
                expected: format!("at least the {taken} already taken"),
            });
        }
        save_options(&options, folder)?;
        Self::new(options, folder, config, tokenizer, parameters, curve)
    }

    fn new(
        options: TrainingOptions,
        folder: &Path,
        config: ModelConfig,
        tokenizer: Tokenizer,
        parameters: Parameters,
        curve: Vec<LossRow>,
    ) -> Result<Self, TrainingError> {
        check_options(&options, &config)?;
        let seq = options.seq;
        let corpus = Corpus::new(&read_texts(&options.text)?, &tokenizer, seq, "training")?;
        let held_out_text = read_texts(std::slice::from_ref(&options.held_out))?;
        let quick_lines = held_out_text.split_inclusive('\n').take(QUICK_HELD_OUT_LINES);
        let quick: String = quick_lines.collect();
        let variables = |(name, parameter): (&String, &Parameter)| (name.clone(), parameter.value.as_tensor().clone());
        let tensors: HashMap<String, Tensor> = parameters.iter().map(variables).collect();
        let weights = Weights::from_tensors(config, tensors, "training parameters")?;
        Ok(Self {
            model: Reference::new(&weights)?,
            held_out: Corpus::new(&held_out_text, &tokenizer, seq, "held-out")?,
            quick_held_out: Corpus::new(&quick, &tokenizer, seq, "held-out")?,
            folder: folder.to_owned(),
            options,
            tokenizer,
            corpus,
            parameters,
            weights,
            curve,
        })
    }

    /// Steps until the end of the run, or until `stop` is set; writes checkpoints on the way and
    /// at the end.
    ///
    /// # Errors
    /// If the loss is no longer finite or a checkpoint cannot be written.
    pub fn run(&mut self, stop: &AtomicBool, mut report: impl FnMut(Event)) -> Result<(), TrainingError> {
        let mut stepping = Duration::ZERO;
        let first = self.curve.len();
        for step in first..self.options.steps {
            let began = Instant::now();
            self.step(step)?;
            stepping += began.elapsed();
            let per_step = stepping / (step + 1 - first) as u32;
            let tokens = (self.options.batch * self.options.seq) as f64;
            report(Event::Step {
                row: &self.curve[step],
                tokens_per_second: tokens / per_step.as_secs_f64(),
                remaining: per_step * (self.options.steps - step - 1) as u32,
            });
            let stopped = stop.load(Ordering::Relaxed);
            let ended = step + 1 == self.options.steps;
            if stopped || ended || (step + 1) % self.options.checkpoint_steps == 0 {
                let held_out = evaluate(&self.model, &self.quick_held_out, self.options.seq)?;
                let last = held_out.loops.last().map(|figures| figures.bits_per_byte);
                self.curve[step].held_out_bits_per_byte = last;
                self.checkpoint()?;
                report(Event::Checkpoint { step: step + 1, held_out: &held_out });
            }
            if stopped {
                break;
            }
        }
        Ok(())
    }

    /// Whether all steps of the run were taken.
    pub fn is_finished(&self) -> bool {
        self.curve.len() == self.options.steps
    }

    /// Evaluates the model as saved in the run's folder on the whole held-out text.
    ///
    /// # Errors
    /// If the folder is unreadable.
    pub fn evaluate_saved(&self) -> Result<Evaluation, TrainingError> {
        let model = Reference::new(&Weights::load(&self.folder)?)?;
        evaluate(&model, &self.held_out, self.options.seq)
    }

    /// The loss curve so far.
    pub fn curve(&self) -> &[LossRow] {
        &self.curve
    }

    /// The weights being trained.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    fn step(&mut self, step: usize) -> Result<(), TrainingError> {
        let options = &self.options;
        let windows = self.corpus.batch(options.batch, options.seq, options.seed, step);
        let share = windows.len().div_ceil(options.workers);
        let parts = std::thread::scope(|scope| {
            let workers: Vec<_> =
                windows.chunks(share).map(|part| scope.spawn(|| self.gradients(part, options.batch))).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
                .collect::<candle_core::Result<Vec<_>>>()
        })?;
        let mut sum = Gradients::default();
        for part in parts {
            sum.add(part)?;
        }
        if !sum.objective.is_finite() {
            let loss = sum.objective;
            return Err(TrainingError::Diverged { step, loss });
        }
        let (optimizer, steps) = (&options.optimizer, options.steps);
        let gradient_norm = optimizer::step(&mut self.parameters, &sum.by_name, optimizer, step, steps)?;
        self.curve.push(LossRow {
            step,
            tokens: (step + 1) * options.batch * options.seq,
            learning_rate: optimizer.learning_rate(step, steps),
            objective: sum.objective,
            loss_nats_per_token: sum.last,
            divergence_nats_per_token: sum.divergence,
            gradient_norm,
            held_out_bits_per_byte: None,
        });
        Ok(())
    }

    /// A worker's share of a step: the gradients of its windows' part of the mean over `batch`.
    fn gradients(&self, windows: &[&[u32]], batch: usize) -> candle_core::Result<Gradients> {
        let at_once = (TOKENS_PER_BACKWARD / self.options.seq).max(1);
        let mut sum = Gradients::default();
        for windows in windows.chunks(at_once) {
            let (inputs, targets) = inputs_and_targets(windows)?;
            let logits = self.model.forward(&inputs)?;
            let objective = objective(&logits, &targets, self.options.objective)?;
            let share = windows.len() as f64 / batch as f64;
            let mut store = (&objective.total * share)?.backward()?;
            let mut by_name = BTreeMap::new();
            for (name, parameter) in &self.parameters {
                if let Some(gradient) = store.remove(&parameter.value) {
                    by_name.insert(name.clone(), gradient);
                }
            }
            let scalar = |x: &Tensor| Ok::<_, candle_core::Error>(f64::from(x.to_scalar::<f32>()?));
            sum.add(Gradients {
                by_name,
                objective: scalar(&objective.total)? * share,
                last: scalar(&objective.last)? * share,
                divergence: scalar(&objective.divergence)? * share,
            })?;
        }
        Ok(sum)
    }

    /// Writes everything; the state last, so that a state always finds its curve and model.
    fn checkpoint(&self) -> Result<(), TrainingError> {
        self.weights.save(&self.folder, Stored::F16)?;
        self.tokenizer.save(&self.folder.join(TOKENIZER_FILE))?;
        let path = self.folder.join(LOSS_FILE);
        write_then_rename(&path, |part| {
            let mut file = csv::Writer::from_path(part)?;
            for row in &self.curve {
                file.serialize(row)?;
            }
            file.flush()
        })
        .map_err(|e: std::io::Error| in_file(&path, e))?;
        save_state(&self.folder.join(STATE_FILE), &self.parameters, self.curve.len())
    }
}

/// Sums over windows of the gradients and of the objective's parts.
#[derive(Default)]
struct Gradients {
    by_name: BTreeMap<String, Tensor>,
    objective: f64,
    last: f64,
    divergence: f64,
}

impl Gradients {
    fn add(&mut self, other: Self) -> candle_core::Result<()> {
        for (name, gradient) in other.by_name {
            let sum = match self.by_name.remove(&name) {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            };
            self.by_name.insert(name, sum);
        }
        self.objective += other.objective;
        self.last += other.last;
        self.divergence += other.divergence;
        Ok(())
    }
}

fn check_options(options: &TrainingOptions, config: &ModelConfig) -> Result<(), TrainingError> {
    let refuse = |option, found: String, expected: &str| {
        Err(TrainingError::Option { option, found, expected: expected.to_owned() })
    };
    for (option, found) in [
        ("steps", options.steps),
        ("batch", options.batch),
        ("seq", options.seq),
        ("workers", options.workers),
        ("checkpoint_steps", options.checkpoint_steps),
    ] {
        if found == 0 {
            return refuse(option, "0".to_owned(), "at least 1");
        }
    }
    if options.seq > config.max_positions {
        let limit = format!("at most the model's max_positions of {}", config.max_positions);
        return refuse("seq", options.seq.to_string(), &limit);
    }
    if options.optimizer.warmup_steps > options.steps {
        let found = options.optimizer.warmup_steps.to_string();
        return refuse("warmup_steps", found, "at most steps");
    }
    let AdamWOptions { peak_learning_rate, weight_decay, clip_norm, .. } = options.optimizer;
    for (option, found) in [("peak_learning_rate", peak_learning_rate), ("clip_norm", clip_norm)] {
        if !(found.is_finite() && found > 0.0) {
            return refuse(option, found.to_string(), "a finite number above 0");
        }
    }
    let ObjectiveWeights { intermediate, distillation } = options.objective;
    for (option, found) in
        [("weight_decay", weight_decay), ("intermediate", intermediate), ("distillation", distillation)]
    {
        if !(found.is_finite() && found >= 0.0) {
            return refuse(option, found.to_string(), "a finite number of at least 0");
        }
    }
    Ok(())
}

fn in_file(path: &Path, source: std::io::Error) -> TrainingError {
    TrainingError::File { path: path.to_owned(), source }
}

fn save_options(options: &TrainingOptions, folder: &Path) -> Result<(), TrainingError> {
    let path = folder.join(OPTIONS_FILE);
    let json = serde_json::to_string_pretty(options).map_err(|e| in_file(&path, e.into()))?;
    std::fs::write(&path, json).map_err(|e| in_file(&path, e))
}

fn read_texts(paths: &[PathBuf]) -> Result<String, TrainingError> {
    let read = |path: &PathBuf| std::fs::read_to_string(path).map_err(|e| in_file(path, e));
    paths.iter().map(read).collect()
}

/// Rows of a loss curve before `step`.
fn read_curve(path: &Path, step: usize) -> Result<Vec<LossRow>, TrainingError> {
    let read = || -> csv::Result<Vec<LossRow>> { csv::Reader::from_path(path)?.deserialize().take(step).collect() };
    let curve = read().map_err(|e| in_file(path, e.into()))?;
    match curve.len() == step {
        true => Ok(curve),
        false => Err(TrainingError::Checkpoint {
            path: path.to_owned(),
            problem: format!("{} rows, expected at least {step}", curve.len()),
        }),
    }
}

fn save_state(path: &Path, parameters: &Parameters, step: usize) -> Result<(), TrainingError> {
    let mut tensors = HashMap::new();
    for (name, parameter) in parameters {
        let flat = |numbers: &Vec<f32>| Tensor::new(&numbers[..], &Device::Cpu);
        tensors.insert(format!("value.{name}"), parameter.value.as_tensor().clone());
        tensors.insert(format!("mean.{name}"), flat(&parameter.mean)?);
        tensors.insert(format!("square.{name}"), flat(&parameter.square)?);
    }
    tensors.insert("step".to_owned(), Tensor::new(step as u32, &Device::Cpu)?);
    write_then_rename(path, |part| candle_core::safetensors::save(&tensors, part))?;
    Ok(())
}

fn load_state(path: &Path, config: &ModelConfig) -> Result<(Parameters, usize), TrainingError> {
    let wrong = |problem: String| TrainingError::Checkpoint { path: path.to_owned(), problem };
    let tensors = candle_core::safetensors::load(path, &Device::Cpu)
        .map_err(|e| wrong(format!("cannot read the training state: {e}")))?;
    let get = |name: String, numbers: usize| match tensors.get(&name) {
        Some(tensor) if tensor.elem_count() == numbers => Ok(tensor),
        Some(tensor) => {
            let found = tensor.elem_count();
            Err(wrong(format!("`{name}` has {found} numbers, expected {numbers}")))
        }
        None => Err(wrong(format!("`{name}` is missing"))),
    };
    let mut parameters = Parameters::new();
    for (name, shape) in engine::weights::expected_tensors(config) {
        let numbers = shape.iter().product();
        let mut parameter = Parameter::new(get(format!("value.{name}"), numbers)?)?;
        parameter.mean = get(format!("mean.{name}"), numbers)?.to_vec1()?;
        parameter.square = get(format!("square.{name}"), numbers)?.to_vec1()?;
        parameters.insert(name, parameter);
    }
    let step: u32 = get("step".to_owned(), 1)?.to_scalar()?;
    Ok((parameters, step as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSE: &str = "And God said, Let there be light: and there was light.\n";

    fn config() -> ModelConfig {
        ModelConfig {
            vocab_size: 260,
            hidden_size: 16,
            intermediate_size: 24,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 8,
            block_layers: 1,
            num_loops: 2,
            tie_embeddings: true,
            max_positions: 16,
            ..ModelConfig::default()
        }
    }

    fn options(folder: &Path) -> TrainingOptions {
        let text = folder.join("text.txt");
        std::fs::write(&text, VERSE.repeat(20)).unwrap();
        TrainingOptions {
            text: vec![text.clone()],
            held_out: text,
            steps: 6,
            batch: 2,
            seq: 16,
            workers: 1,
            checkpoint_steps: 3,
            seed: 1,
            objective: ObjectiveWeights { intermediate: 0.1, distillation: 1.0 },
            optimizer: AdamWOptions { peak_learning_rate: 0.01, warmup_steps: 2, weight_decay: 0.1, clip_norm: 1.0 },
        }
    }

    fn never() -> AtomicBool {
        AtomicBool::new(false)
    }

    #[test]
    fn a_stopped_and_resumed_run_equals_an_uninterrupted_one() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, halves) = (folder.path().join("whole"), folder.path().join("halves"));
        let options = options(folder.path());
        let mut uninterrupted = Trainer::start(options.clone(), config(), &whole).unwrap();
        uninterrupted.run(&never(), |_| {}).unwrap();

        let stop = never();
        let mut first = Trainer::start(options, config(), &halves).unwrap();
        let stop_after_three = |event: Event| {
            if let Event::Step { row, .. } = event {
                stop.store(row.step == 2, Ordering::Relaxed);
            }
        };
        first.run(&stop, stop_after_three).unwrap();
        assert!(!first.is_finished());
        let mut second = Trainer::resume(&halves, None).unwrap();
        second.run(&never(), |_| {}).unwrap();

        assert!(second.is_finished());
        assert_eq!(second.curve(), uninterrupted.curve());
        assert_eq!(second.weights().fingerprint().unwrap(), uninterrupted.weights().fingerprint().unwrap());
        let curve = |folder: &Path| std::fs::read(folder.join(LOSS_FILE)).unwrap();
        assert_eq!(curve(&halves), curve(&whole));
    }

    #[test]
    fn a_finished_run_can_be_lengthened_but_not_shortened() {
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = Trainer::start(options(folder.path()), config(), folder.path()).unwrap();
        trainer.run(&never(), |_| {}).unwrap();
        let message = match Trainer::resume(folder.path(), Some(5)) {
            Ok(_) => panic!("shortened a run below the steps it took"),
            Err(error) => error.to_string(),
        };
        assert!(message.contains("`steps` is 5, expected at least the 6"), "{message}");
        let mut longer = Trainer::resume(folder.path(), Some(8)).unwrap();
        longer.run(&never(), |_| {}).unwrap();
        assert_eq!((longer.curve().len(), longer.is_finished()), (8, true));
        assert_eq!(longer.curve()[..6], *trainer.curve());
    }

    #[test]
    fn the_loss_falls_on_a_text_that_repeats() {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path());
        (options.steps, options.batch, options.workers) = (120, 4, 2);
        let mut trainer = Trainer::start(options, config(), folder.path()).unwrap();
        trainer.run(&never(), |_| {}).unwrap();
        let loss = |row: Option<&LossRow>| row.unwrap().loss_nats_per_token;
        let (first, last) = (loss(trainer.curve().first()), loss(trainer.curve().last()));
        assert!(last < first / 2.0, "from {first} to {last}");
        let saved = trainer.evaluate_saved().unwrap();
        assert!((saved.loops[1].loss_nats_per_token - last).abs() < 0.5);
    }

    #[test]
    fn two_workers_give_the_gradients_of_one() {
        let folder = tempfile::tempdir().unwrap();
        let curve = |workers| {
            let mut options = options(folder.path());
            (options.workers, options.steps) = (workers, 3);
            let mut trainer = Trainer::start(options, config(), folder.path()).unwrap();
            trainer.run(&never(), |_| {}).unwrap();
            trainer.curve().to_vec()
        };
        for (one, two) in curve(1).iter().zip(curve(2)) {
            assert!((one.objective - two.objective).abs() < 1e-4);
            assert!((one.gradient_norm - two.gradient_norm).abs() < 1e-4);
        }
    }

    #[test]
    fn a_broken_checkpoint_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = Trainer::start(options(folder.path()), config(), folder.path()).unwrap();
        trainer.run(&never(), |_| {}).unwrap();
        let refusal = || match Trainer::resume(folder.path(), None) {
            Ok(_) => panic!("resumed from a broken checkpoint"),
            Err(error) => error.to_string(),
        };
        let loss = folder.path().join(LOSS_FILE);
        let curve = std::fs::read_to_string(&loss).unwrap();
        let kept: Vec<&str> = curve.lines().take(4).collect();
        std::fs::write(&loss, kept.join("\n")).unwrap();
        let message = refusal();
        assert!(message.contains("loss.csv: 3 rows, expected at least 6"), "{message}");

        std::fs::write(folder.path().join(STATE_FILE), "no tensors").unwrap();
        let message = refusal();
        assert!(message.contains("training-state.safetensors: cannot read"), "{message}");
    }

    #[test]
    fn options_out_of_range_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = |change: fn(&mut TrainingOptions)| {
            let mut options = options(folder.path());
            change(&mut options);
            match Trainer::start(options, config(), folder.path()) {
                Ok(_) => panic!("started with an option out of range"),
                Err(error) => error.to_string(),
            }
        };
        let message = refusal(|options| options.seq = 17);
        assert!(message.contains("`seq` is 17, expected at most"), "{message}");
        let message = refusal(|options| options.batch = 0);
        assert!(message.contains("`batch` is 0"), "{message}");
        let message = refusal(|options| options.optimizer.clip_norm = f64::NAN);
        assert!(message.contains("`clip_norm` is NaN"), "{message}");
    }
}
