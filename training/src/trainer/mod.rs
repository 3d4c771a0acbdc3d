//! The training run: data-parallel steps, evaluations on held-out text, checkpoints, and resuming from them.

mod checkpoint;
pub mod options;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::Tensor;
use engine::Tokenizer;
use engine::reference::Reference;
use engine::weights::{CONFIG_FILE, TENSORS_FILE, TOKENIZER_FILE, Weights};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::corpus::{Corpus, inputs_and_targets};
use crate::error::TrainingError;
use crate::evaluation::{Evaluation, Windows, evaluate};
use crate::objective::{Losses, Objective};
use crate::optimizer::{self, Parameter, Parameters};
use options::{TrainingOptions, check, load_teacher};

/// File with the run's options, in its folder.
pub const OPTIONS_FILE: &str = "training.yaml";
/// File with the loss curve, one row per step.
pub const LOSS_FILE: &str = "loss.csv";

/// All files that a run keeps in its folder.
pub const RUN_FILES: [&str; 6] =
    [OPTIONS_FILE, CONFIG_FILE, TENSORS_FILE, TOKENIZER_FILE, LOSS_FILE, checkpoint::STATE_FILE];

/// Approximate number of tokens of one backward pass, so that its activations fit in a core's cache. A larger batch
/// sums several passes.
const TOKENS_PER_BACKWARD: usize = 256;
/// Approximate number of tokens of one backward pass on a GPU: enough to use it fully, while the logits of every loop
/// fit in its memory.
const TOKENS_PER_BACKWARD_ON_GPU: usize = 4096;
/// Number of held-out tokens that are evaluated during the run.
const QUICK_HELD_OUT_TOKENS: usize = 4096;

/// A step of the loss curve. Losses are means over the batch's tokens, in nats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossRow {
    /// Step, from 0.
    pub step: usize,
    /// Tokens trained on so far, this step included.
    pub tokens: usize,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// The objective.
    pub objective: f64,
    /// Cross-entropy of the last loop.
    pub loss_nats_per_token: f64,
    /// Divergence of the last loop from the teacher, if there is one.
    pub teacher_nats_per_token: Option<f64>,
    /// Divergence of the earlier loops from the last, summed over them, if it is trained.
    pub self_distillation_nats_per_token: Option<f64>,
    /// Binary cross-entropy of the gates, summed over them, if they are trained.
    pub gate_nats_per_token: Option<f64>,
    /// Share of tokens whose prediction at their exit is that of full depth, if they exit under a KV fill.
    pub served_agreement: Option<f64>,
    /// Mean passes of a token after the prompt, if tokens exit under a KV fill.
    pub mean_depth: Option<f64>,
    /// Norm of the gradients before clipping.
    pub gradient_norm: f64,
    /// Cross-entropy of the last loop on the start of the held-out text after this step, where it was evaluated.
    pub held_out_nats_per_token: Option<f64>,
}

/// Progress of a training run.
pub enum Event<'a> {
    /// A file is about to be tokenized.
    Tokenizing(&'a Path),
    /// A step was taken.
    Step {
        /// Losses of the step.
        row: &'a LossRow,
        /// Speed since this process started the run.
        tokens_per_second: f64,
        /// Remaining time at that speed.
        remaining: Duration,
    },
    /// The start of the held-out text was evaluated.
    HeldOut {
        /// Steps taken.
        step: usize,
        /// Results of the evaluation.
        evaluation: &'a Evaluation,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Steps taken.
        step: usize,
    },
}

/// A training run with its whole state.
pub struct Trainer {
    options: TrainingOptions,
    folder: PathBuf,
    tokenizer: Tokenizer,
    /// Tokens that every window begins with, such as Gemma's `<bos>`. In training they replace an equal number of
    /// tokens of the text.
    begin: Vec<u32>,
    corpus: Corpus,
    held_out: Corpus,
    quick_held_out: Corpus,
    objective: Objective,
    parameters: Parameters,
    weights: Weights,
    model: Reference,
    curve: Vec<LossRow>,
}

impl Trainer {
    /// Starts a run in `folder`, which [`run`](Self::run) makes and fills.
    ///
    /// # Errors
    /// If an option is out of range, a text or model cannot be read or is unsuitable, or the folder contains a run or a
    /// model already.
    pub fn start(
        options: TrainingOptions,
        folder: &Path,
        report: &mut dyn FnMut(Event),
    ) -> Result<Self, TrainingError> {
        if checkpoint::exists(folder) {
            let problem = "a run is here already; resume it or choose another folder".to_owned();
            return Err(TrainingError::Checkpoint { path: folder.to_owned(), problem });
        }
        if folder.join(CONFIG_FILE).exists() && !checkpoint::is_before_first(folder) {
            let problem = "a model is here already; choose another folder".to_owned();
            return Err(TrainingError::Checkpoint { path: folder.to_owned(), problem });
        }
        let (weights, tokenizer) = options.model.start(options.seed)?;
        options.check(weights.config())?;
        let tokenizer = options.model.tokenizer(tokenizer, &options.data, weights.config().vocab_size)?;
        Self::new(options, folder, weights, tokenizer, None, report)
    }

    /// Resumes from the latest checkpoint in `folder`, up to the planned end or another number of `steps`. From there
    /// on, the learning rate follows the schedule of a run of that length.
    ///
    /// # Errors
    /// If the checkpoint is incomplete, if more than `steps` steps were taken, or as for [`Trainer::start`].
    pub fn resume(folder: &Path, steps: Option<usize>, report: &mut dyn FnMut(Event)) -> Result<Self, TrainingError> {
        let path = folder.join(OPTIONS_FILE);
        let mut options = TrainingOptions::load(&path)?;
        let state = checkpoint::load(folder)?;
        options.steps = steps.unwrap_or(options.steps);
        let (taken, expected) = (state.curve.len(), format!("at least the {} already taken", state.curve.len()));
        check(options.steps >= taken, "steps", &options.steps, &expected)?;
        options.check(state.weights.config())?;
        let (weights, tokenizer, progress) = (state.weights, state.tokenizer, (state.means, state.curve));
        Self::new(options, folder, weights, tokenizer, Some(progress), report)
    }

    /// A run from `weights`, with the optimizer's means and the loss curve so far when it resumes.
    fn new(
        options: TrainingOptions,
        folder: &Path,
        weights: Weights,
        tokenizer: Tokenizer,
        progress: Option<(checkpoint::Means, Vec<LossRow>)>,
        report: &mut dyn FnMut(Event),
    ) -> Result<Self, TrainingError> {
        let device = options.device.candle()?;
        let weights = weights.to_device(&device)?;
        let (mut means, curve) = progress.unwrap_or_default();
        let (mut parameters, mut tensors) = (Parameters::new(), HashMap::new());
        for (name, tensor) in weights.tensors() {
            let mut tensor = tensor.clone();
            if options.trains(name) {
                let mut parameter = Parameter::new(&tensor)?;
                if let Some((mean, square)) = means.remove(name) {
                    (parameter.mean, parameter.square) = (mean.to_device(&device)?, square.to_device(&device)?);
                }
                tensor = parameter.value.as_tensor().clone();
                parameters.insert(name.clone(), parameter);
            }
            tensors.insert(name.clone(), tensor);
        }
        let weights = Weights::from_tensors(weights.config().clone(), tensors, "training parameters")?;
        let vocab_size = weights.config().vocab_size;
        let teacher = options.objective.teacher.as_ref();
        let teacher =
            teacher.map(|teacher| load_teacher(&teacher.model, &tokenizer, vocab_size, &device)).transpose()?;
        let mut tokenizing = |path: &Path| report(Event::Tokenizing(path));
        let (corpus, held_out) = options.data.load(&tokenizer, options.seq, &mut tokenizing)?;
        let begin = tokenizer.begin()?;
        let enough = format!("more than twice the {} that every sequence begins with", begin.len());
        check(2 * begin.len() < options.seq, "seq", &options.seq, &enough)?;
        Ok(Self {
            begin,
            objective: Objective::new(options.objective.clone(), teacher),
            model: Reference::new(&weights)?,
            quick_held_out: held_out.start(QUICK_HELD_OUT_TOKENS, &tokenizer)?,
            held_out,
            folder: folder.to_owned(),
            options,
            tokenizer,
            corpus,
            parameters,
            weights,
            curve,
        })
    }

    /// Trains until the end of the run, or until `stop` is set. Writes the options at the beginning, and checkpoints on
    /// the way and at the end.
    ///
    /// # Errors
    /// If the loss is no longer finite or the folder cannot be written.
    pub fn run(&mut self, stop: &AtomicBool, report: &mut dyn FnMut(Event)) -> Result<(), TrainingError> {
        std::fs::create_dir_all(&self.folder).map_err(|e| TrainingError::in_file(&self.folder, e))?;
        self.options.save(&self.folder.join(OPTIONS_FILE))?;
        checkpoint::ensure_model(self)?;
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
            let (taken, stopped) = (step + 1, stop.load(Ordering::Relaxed));
            let due = |every: usize| taken.is_multiple_of(every) || taken == self.options.steps;
            if due(self.options.evaluation_steps) {
                let evaluation = self.evaluate(&self.model, &self.quick_held_out)?;
                self.curve[step].held_out_nats_per_token = evaluation.loops.last().map(|last| last.loss_nats_per_token);
                report(Event::HeldOut { step: taken, evaluation: &evaluation });
            }
            if stopped || due(self.options.checkpoint_steps) {
                checkpoint::save(self)?;
                report(Event::Checkpoint { step: taken });
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

    /// Evaluates the saved model of the run's folder on the whole held-out text.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn evaluate_saved(&self) -> Result<Evaluation, TrainingError> {
        let model = Reference::new(&Weights::load(&self.folder)?.to_device(self.model.device())?)?;
        self.evaluate(&model, &self.held_out)
    }

    fn evaluate(&self, model: &Reference, text: &Corpus) -> Result<Evaluation, TrainingError> {
        evaluate(model, text, Windows { seq: self.options.seq, begin: &self.begin })
    }

    /// The loss curve so far.
    pub fn curve(&self) -> &[LossRow] {
        &self.curve
    }

    /// The weights being trained.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Number of trained parameters.
    pub fn num_trained(&self) -> usize {
        self.parameters.values().map(|parameter| parameter.mean.elem_count()).sum()
    }

    fn step(&mut self, step: usize) -> Result<(), TrainingError> {
        let options = &self.options;
        let windows = self.corpus.batch(options.batch, options.seq, options.seed, step);
        let begun = windows.iter().map(|window| [&self.begin, &window[self.begin.len()..]].concat());
        let windows: Vec<Vec<u32>> = begun.collect();
        // A GPU serves one thread at a time.
        let workers = if self.model.device().is_cpu() { options.workers } else { 1 };
        let share = windows.len().div_ceil(workers);
        let seeds = window_seeds(options.batch, options.seed, step);
        let parts = std::thread::scope(|scope| {
            let parts = windows.chunks(share).zip(seeds.chunks(share));
            let workers: Vec<_> =
                parts.map(|(part, seeds)| scope.spawn(|| self.gradients(part, seeds, options.batch))).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
                .collect::<candle_core::Result<Vec<_>>>()
        })?;
        let mut sum = Gradients::default();
        for part in parts {
            sum.add(part.by_name)?;
            sum.losses.add(&part.losses, 1.0);
        }
        let losses = sum.losses;
        if !losses.objective.is_finite() {
            return Err(TrainingError::Diverged { step, loss: losses.objective });
        }
        for part in &options.train {
            let depends = sum.by_name.keys().any(|name| part.holds(name));
            let expected = "parts of the model that the objective depends on";
            check(depends, "train", part, &expected)?;
        }
        let (optimizer, steps) = (&options.optimizer, options.steps);
        let gradient_norm = optimizer::step(&mut self.parameters, &sum.by_name, optimizer, step, steps)?;
        self.curve.push(LossRow {
            step,
            tokens: (step + 1) * options.batch * options.seq,
            learning_rate: optimizer.learning_rate(step, steps),
            objective: losses.objective,
            loss_nats_per_token: losses.last,
            teacher_nats_per_token: losses.teacher,
            self_distillation_nats_per_token: losses.self_distillation,
            gate_nats_per_token: losses.gate,
            served_agreement: losses.served_agreement,
            mean_depth: losses.mean_depth,
            gradient_norm,
            held_out_nats_per_token: None,
        });
        Ok(())
    }

    /// A worker's share of a step: the gradients of its windows' part of the mean over `batch`.
    fn gradients(&self, windows: &[Vec<u32>], seeds: &[u64], batch: usize) -> candle_core::Result<Gradients> {
        let tokens = if self.model.device().is_cpu() { TOKENS_PER_BACKWARD } else { TOKENS_PER_BACKWARD_ON_GPU };
        let at_once = (tokens / self.options.seq).max(1);
        let mut sum = Gradients::default();
        for (windows, seeds) in windows.chunks(at_once).zip(seeds.chunks(at_once)) {
            let (inputs, targets) = inputs_and_targets(windows, self.model.device())?;
            let (total, losses) = self.objective.of(&self.model, &inputs, &targets, seeds)?;
            let share = windows.len() as f64 / batch as f64;
            let mut store = (total * share)?.backward()?;
            let mut by_name = BTreeMap::new();
            for (name, parameter) in &self.parameters {
                if let Some(gradient) = store.remove(&parameter.value) {
                    by_name.insert(name.clone(), gradient);
                }
            }
            sum.add(by_name)?;
            sum.losses.add(&losses, share);
        }
        Ok(sum)
    }
}

/// A seed for each window of a step, for what is drawn besides its text.
fn window_seeds(batch: usize, seed: u64, step: usize) -> Vec<u64> {
    // Multiplying by an odd number separates the random streams of neighbouring seeds and steps.
    let stream = (seed ^ 0x2545_F491_4F6C_DD1D).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut rng = StdRng::seed_from_u64(stream.wrapping_add(step as u64));
    (0..batch).map(|_| rng.random()).collect()
}

/// Sums of gradients and losses over windows.
#[derive(Default)]
struct Gradients {
    by_name: BTreeMap<String, Tensor>,
    losses: Losses,
}

impl Gradients {
    fn add(&mut self, gradients: BTreeMap<String, Tensor>) -> candle_core::Result<()> {
        for (name, gradient) in gradients {
            let sum = match self.by_name.remove(&name) {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            };
            self.by_name.insert(name, sum);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::DataOptions;
    use crate::objective::{ExitCoefficients, FillOptions, GateOptions, ObjectiveOptions, TeacherOptions};
    use crate::optimizer::AdamWOptions;
    use engine::config::{LoraConfig, LoraRanks, ModelConfig};
    use engine::weights::Stored;
    use options::{ModelOptions, Part};
    use proptest::prelude::*;
    use scheduler::KvFill;
    use serde_json::json;

    const VERSE: &str = "And God said, Let there be light: and there was light.\n";

    fn sizes() -> serde_yaml::Mapping {
        serde_yaml::from_str(
            "{vocab_size: 260, hidden_size: 16, intermediate_size: 24, num_heads: 2, num_kv_heads: 1, head_dim: 8, \
             block_layers: 1, num_loops: 2, max_positions: 16}",
        )
        .unwrap()
    }

    fn options(folder: &Path) -> TrainingOptions {
        let text = folder.join("text.txt");
        std::fs::write(&text, VERSE.repeat(20)).unwrap();
        TrainingOptions {
            model: ModelOptions { config: sizes(), ..ModelOptions::default() },
            data: DataOptions {
                text: vec![text.clone()],
                held_out: vec![text],
                held_out_tokens: Some(200),
                cache: folder.join("tokens"),
                ..DataOptions::default()
            },
            objective: ObjectiveOptions {
                exits: ExitCoefficients::Aggressive(0.1),
                self_distillation: 10.0,
                ..ObjectiveOptions::default()
            },
            optimizer: AdamWOptions { peak_learning_rate: 0.01, warmup_steps: 2, ..AdamWOptions::default() },
            steps: 6,
            batch: 2,
            seq: 16,
            workers: 1,
            evaluation_steps: 4,
            checkpoint_steps: 3,
            seed: 1,
            ..TrainingOptions::default()
        }
    }

    fn never() -> AtomicBool {
        AtomicBool::new(false)
    }

    fn start(options: TrainingOptions, folder: &Path) -> Result<Trainer, TrainingError> {
        Trainer::start(options, folder, &mut |_| {})
    }

    fn resume(folder: &Path, steps: Option<usize>) -> Result<Trainer, TrainingError> {
        Trainer::resume(folder, steps, &mut |_| {})
    }

    /// A complete run.
    fn trained(options: TrainingOptions, folder: &Path) -> Trainer {
        let mut trainer = start(options, folder).unwrap();
        trainer.run(&never(), &mut |_| {}).unwrap();
        trainer
    }

    fn message(result: Result<Trainer, TrainingError>) -> String {
        match result {
            Ok(_) => panic!("a run that should have been refused"),
            Err(error) => error.to_string(),
        }
    }

    /// A run that uses every feature: a relaxed model with gates, taught by the model in `teacher`.
    fn everything(folder: &Path, teacher: &Path) -> TrainingOptions {
        let mut options = options(folder);
        let lora = LoraConfig { ranks: LoraRanks::all(2), scale: 1.0 };
        options.model.from = Some(teacher.to_owned());
        options.model.config = serde_yaml::Mapping::new();
        options.model.config.insert("lora".into(), serde_yaml::to_value(lora).unwrap());
        options.model.config.insert("gate".into(), true.into());
        options.objective.teacher = Some(TeacherOptions { model: teacher.to_owned(), weight: 1.0, temperature: 2.0 });
        options.objective.gate = Some(GateOptions { through: true, ..GateOptions::default() });
        options.objective.kv_fill = Some(FillOptions::new(KvFill::Reuse));
        options.half_precision = true;
        options
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_run_stopped_anywhere_and_resumed_equals_an_uninterrupted_one(
            stops in proptest::collection::btree_set(0usize..5, 1..3),
            parts in proptest::sample::select(vec![
                vec![Part::All], vec![Part::Lora, Part::Gate], vec![Part::Shared],
            ]),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| folder.path().join(name);
            trained(options(folder.path()), &path("teacher"));
            let mut options = everything(folder.path(), &path("teacher"));
            options.train = parts;
            let uninterrupted = trained(options.clone(), &path("whole"));

            let mut trainer = start(options, &path("pieces")).unwrap();
            for stop_after in stops {
                let stop = never();
                trainer.run(&stop, &mut |event| {
                    if let Event::Step { row, .. } = event {
                        stop.store(row.step == stop_after, Ordering::Relaxed);
                    }
                }).unwrap();
                prop_assert!(!trainer.is_finished());
                trainer = resume(&path("pieces"), None).unwrap();
            }
            trainer.run(&never(), &mut |_| {}).unwrap();

            prop_assert!(trainer.is_finished());
            prop_assert_eq!(trainer.curve(), uninterrupted.curve());
            let print = |trainer: &Trainer| trainer.weights().fingerprint().unwrap();
            prop_assert_eq!(print(&trainer), print(&uninterrupted));
            for file in [LOSS_FILE, OPTIONS_FILE, "model.safetensors"] {
                let content = |run: &str| std::fs::read(path(run).join(file)).unwrap();
                prop_assert_eq!(content("pieces"), content("whole"));
            }
        }
    }

    #[test]
    fn a_finished_run_can_be_lengthened_but_not_shortened() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let trainer = trained(options(folder.path()), &run);
        let refusal = message(resume(&run, Some(5)));
        assert!(refusal.contains("`steps` is 5, expected at least the 6"), "{refusal}");
        let mut longer = resume(&run, Some(8)).unwrap();
        longer.run(&never(), &mut |_| {}).unwrap();
        assert_eq!((longer.curve().len(), longer.is_finished()), (8, true));
        assert_eq!(longer.curve()[..6], *trainer.curve());
    }

    #[test]
    fn a_folder_with_a_run_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        trained(options(folder.path()), &run);
        let refusal = message(start(options(folder.path()), &run));
        assert!(refusal.contains("run: a run is here already; resume it"), "{refusal}");
        std::fs::remove_file(run.join("training-state.safetensors")).unwrap();
        let refusal = message(start(options(folder.path()), &run));
        assert!(refusal.contains("run: a model is here already"), "{refusal}");
    }

    #[test]
    fn a_run_that_was_cut_off_in_its_first_checkpoint_starts_again_or_resumes() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, run) = (folder.path().join("whole"), folder.path().join("run"));
        trained(options(folder.path()), &whole);
        let copy = |files: &[&str]| {
            let _ = std::fs::remove_dir_all(&run);
            std::fs::create_dir(&run).unwrap();
            for file in files {
                std::fs::copy(whole.join(file), run.join(file)).unwrap();
            }
        };
        let model = || std::fs::read(run.join(TENSORS_FILE)).unwrap();
        copy(&[OPTIONS_FILE, CONFIG_FILE, TOKENIZER_FILE, LOSS_FILE]);
        trained(options(folder.path()), &run);
        assert_eq!(model(), std::fs::read(whole.join(TENSORS_FILE)).unwrap());
        copy(&[OPTIONS_FILE, CONFIG_FILE, TOKENIZER_FILE, LOSS_FILE, checkpoint::STATE_FILE]);
        resume(&run, None).unwrap().run(&never(), &mut |_| {}).unwrap();
        assert_eq!(model(), std::fs::read(whole.join(TENSORS_FILE)).unwrap());
        copy(&[CONFIG_FILE]);
        let refusal = message(start(options(folder.path()), &run));
        assert!(refusal.contains("run: a model is here already"), "not of a run: {refusal}");
    }

    /// A tokenizer that begins every sequence with `!`, its token 0, which the text does not contain.
    fn beginning_tokenizer(path: &Path) {
        let plain = Tokenizer::train(VERSE, 260).unwrap().to_json().unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&plain).unwrap();
        let (begin, text) =
            (json!({"SpecialToken": {"id": "!", "type_id": 0}}), json!({"Sequence": {"id": "A", "type_id": 0}}));
        json["post_processor"] = json!({
            "type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text],
            "special_tokens": {"!": {"id": "!", "ids": [0], "tokens": ["!"]}},
        });
        std::fs::write(path, json.to_string()).unwrap();
    }

    #[test]
    fn windows_begin_as_the_tokenizer_begins_a_sequence() {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path());
        options.model.config.insert("tie_embeddings".into(), false.into());
        options.optimizer.weight_decay = 0.0;
        let row_moves = |options: TrainingOptions, name: &str| {
            let embedding = |weights: &Weights| weights.get("embed_tokens.weight").unwrap().to_vec2::<f32>().unwrap();
            let before = embedding(&options.model.start(options.seed).unwrap().0);
            let trainer = trained(options, &folder.path().join(name));
            (embedding(trainer.weights())[0] != before[0], trainer.evaluate_saved().unwrap().tokens)
        };
        assert_eq!(row_moves(options.clone(), "plain"), (false, 199));
        let tokenizer = folder.path().join("tokenizer.json");
        beginning_tokenizer(&tokenizer);
        options.model.tokenizer = Some(tokenizer);
        assert_eq!(row_moves(options.clone(), "begun"), (true, 200), "the first token is predicted too");
        options.seq = 2;
        let refusal = message(start(options, &folder.path().join("short")));
        assert!(refusal.contains("`seq` is 2, expected more than twice the 1"), "{refusal}");
    }

    #[test]
    fn the_loss_falls_on_a_text_that_repeats() {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path());
        (options.steps, options.batch, options.workers) = (120, 4, 2);
        let trainer = trained(options, &folder.path().join("run"));
        let loss = |row: Option<&LossRow>| row.unwrap().loss_nats_per_token;
        let (first, last) = (loss(trainer.curve().first()), loss(trainer.curve().last()));
        assert!(last < first / 2.0, "from {first} to {last}");
        let saved = trainer.evaluate_saved().unwrap();
        assert!((saved.loops[1].loss_nats_per_token - last).abs() < 0.5);
        let held_out = trainer.curve()[119].held_out_nats_per_token.unwrap();
        assert!((held_out - saved.loops[1].loss_nats_per_token).abs() < 1e-6);
    }

    #[test]
    fn two_workers_give_the_gradients_of_one() {
        let folder = tempfile::tempdir().unwrap();
        let curve = |workers: usize, kv_fill: Option<FillOptions>| {
            let mut options = options(folder.path());
            (options.workers, options.steps, options.objective.kv_fill) = (workers, 3, kv_fill);
            let name = format!("{workers}{}", kv_fill.is_some());
            trained(options, &folder.path().join(name)).curve().to_vec()
        };
        for kv_fill in [None, Some(FillOptions { prompt: 0.0, ..FillOptions::new(KvFill::Skip) })] {
            for (one, two) in curve(1, kv_fill).iter().zip(curve(2, kv_fill)) {
                assert!((one.objective - two.objective).abs() < 1e-4);
                assert!((one.gradient_norm - two.gradient_norm).abs() < 1e-4);
                let depth = |row: &LossRow| row.mean_depth.unwrap_or_default();
                assert!((depth(one) - depth(&two)).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn windows_draw_by_seed_and_step() {
        assert_eq!(window_seeds(4, 1, 5), window_seeds(4, 1, 5));
        let seeds: Vec<u64> = [(1, 5), (1, 6), (2, 5)].map(|(seed, step)| window_seeds(4, seed, step)).concat();
        let distinct: std::collections::HashSet<u64> = seeds.iter().copied().collect();
        assert_eq!(distinct.len(), 12);
    }

    #[test]
    fn only_the_chosen_parts_move() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        trained(options(folder.path()), &path("teacher"));
        for (part, moves) in [(Part::Lora, "lora."), (Part::Shared, "block."), (Part::Gate, "gate."), (Part::All, "")] {
            let mut options = everything(folder.path(), &path("teacher"));
            options.train = vec![part];
            let (before, _) = options.model.start(options.seed).unwrap();
            let after = trained(options, &path(&part.to_string()));
            for (name, tensor) in after.weights().tensors() {
                let change = (tensor - before.get(name).unwrap()).unwrap().abs().unwrap();
                let change = change.sum_all().unwrap().to_scalar::<f32>().unwrap();
                assert_eq!(change > 0.0, name.starts_with(moves), "training {part} changed {name} by {change}");
            }
        }
    }

    #[test]
    fn a_part_that_the_objective_does_not_depend_on_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path());
        options.train = vec![Part::Shared, Part::HeadLora];
        let mut trainer = start(options, &folder.path().join("run")).unwrap();
        let refusal = trainer.run(&never(), &mut |_| {}).unwrap_err().to_string();
        assert!(refusal.contains("`train` is head-lora, expected parts of the model that the objective"), "{refusal}");
    }

    #[test]
    fn a_teacher_with_other_tokens_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        trained(options(folder.path()), &path("teacher"));
        let mut other = options(folder.path());
        std::fs::write(&other.data.text[0], "the quick brown fox jumps over the lazy dog\n".repeat(20)).unwrap();
        other.objective.teacher = Some(TeacherOptions { model: path("teacher"), weight: 1.0, temperature: 1.0 });
        let refusal = message(start(other, &path("run")));
        assert!(refusal.contains("`objective.teacher.model` is "), "{refusal}");
        assert!(refusal.contains("expected a model with the student's tokenizer"), "{refusal}");
    }

    #[test]
    fn a_broken_checkpoint_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        trained(options(folder.path()), &run);
        let loss = run.join(LOSS_FILE);
        let curve = std::fs::read_to_string(&loss).unwrap();
        let kept: Vec<&str> = curve.lines().take(4).collect();
        std::fs::write(&loss, kept.join("\n")).unwrap();
        let refusal = message(resume(&run, None));
        assert!(refusal.contains("loss.csv: 3 rows, expected at least 6"), "{refusal}");

        std::fs::write(run.join("training-state.safetensors"), "no tensors").unwrap();
        let refusal = message(resume(&run, None));
        assert!(refusal.contains("training-state.safetensors: cannot read"), "{refusal}");
    }

    #[test]
    fn options_out_of_range_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = |change: fn(&mut TrainingOptions)| {
            let mut options = options(folder.path());
            change(&mut options);
            message(start(options, &folder.path().join("run")))
        };
        let expect = |change: fn(&mut TrainingOptions), expected: &str| {
            let found = refusal(change);
            assert!(found.contains(expected), "{found}");
        };
        expect(|options| options.seq = 17, "`seq` is 17, expected at most the model's max_positions of 16");
        expect(|options| options.batch = 0, "`batch` is 0, expected at least 1");
        expect(|options| options.data.text.clear(), "`data.text` is empty, expected at least one file or folder");
        expect(|options| options.optimizer.clip_norm = f64::NAN, "`optimizer.clip_norm` is NaN");
        expect(|options| options.optimizer.warmup_steps = 7, "`optimizer.warmup_steps` is 7");
        expect(|options| options.objective.exits = ExitCoefficients::Last, "`objective.self_distillation` is above 0");
        expect(
            |options| options.objective.gate = Some(GateOptions::default()),
            "`objective.gate` is given, expected none for a model without gates",
        );
        expect(
            |options| {
                options.model.config.insert("kv_fill".into(), "first".into());
                options.objective.kv_fill = Some(FillOptions::new(KvFill::Reuse));
            },
            "`objective.kv_fill` is given, expected none for a model whose loops share the keys and values",
        );
        expect(
            |options| options.objective.kv_fill = Some(FillOptions::new(KvFill::Backfill)),
            "`objective.kv_fill.fill` is backfill, expected reuse, first or skip",
        );
        expect(
            |options| {
                let exits = "gate:0.9".parse().unwrap();
                options.objective.kv_fill = Some(FillOptions { exits, ..FillOptions::new(KvFill::Reuse) });
            },
            "`objective.kv_fill.exits` is gate:0.9, expected another signal for a model without gates",
        );
        expect(
            |options| {
                options.objective.kv_fill = Some(FillOptions { prompt: 1.5, ..FillOptions::new(KvFill::Reuse) });
            },
            "`objective.kv_fill.prompt` is 1.5, expected a share from 0 to 1",
        );
        expect(
            |options| drop(options.model.config.insert("num_layers".into(), 3.into())),
            "unknown field `num_layers`",
        );
        assert!(!folder.path().join("run").exists());
    }

    #[test]
    fn a_model_folder_can_be_given_parts_but_not_other_sizes() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let given = trained(options(folder.path()), &path("model"));
        let mut options = ModelOptions { from: Some(path("model")), ..ModelOptions::default() };
        options.config.insert("gate".into(), true.into());
        let (weights, _) = options.start(9).unwrap();
        assert_eq!(weights.config(), &ModelConfig { gate: true, ..given.weights().config().clone() });
        let name = "block.layers.0.mlp.up_proj.weight";
        let numbers = |weights: &Weights| weights.get(name).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(numbers(&weights), numbers(given.weights()));
        options.config.insert("gate_hidden".into(), 5.into());
        let (weights, _) = options.start(9).unwrap();
        weights.save(&path("gated"), Stored::F32).unwrap();
        let loaded = Weights::load(&path("gated")).unwrap();
        assert_eq!(loaded.get("gate.0.hidden.weight").unwrap().dims(), [5, 16]);
        let from_gated = |gate_hidden: usize| {
            let mut options = ModelOptions { from: Some(path("gated")), ..ModelOptions::default() };
            options.config.insert("gate_hidden".into(), gate_hidden.into());
            options.start(9).unwrap().0
        };
        assert_eq!(from_gated(0).get("gate.0.weight").unwrap().dims(), [16], "gates of another kind start anew");
        let hidden = |weights: &Weights| weights.get("gate.0.hidden.weight").unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(hidden(&from_gated(5)), hidden(&loaded));
        options.config.insert("hidden_size".into(), 32.into());
        let refusal = options.start(9).map(drop).unwrap_err().to_string();
        assert!(refusal.contains("model, changed: tensor `block.layers.0.input_layernorm.weight`"), "{refusal}");
        assert!(refusal.contains("has shape [16], expected [32]"), "{refusal}");
    }
}
