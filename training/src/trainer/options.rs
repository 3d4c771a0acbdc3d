//! Options of a training run, from its YAML file.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use candle_core::Device;
use engine::reference::Reference;
use engine::weights::{Weights, write_then_rename};
use engine::{Checkpoint, DeviceName, ModelConfig, Tokenizer};
use serde::{Deserialize, Serialize};
use serde_yaml::{Mapping, Value};

use crate::corpus::DataOptions;
use crate::error::TrainingError;
use crate::objective::ObjectiveOptions;
use crate::optimizer::AdamWOptions;

/// The only `schema_version` this build reads and writes.
pub const SCHEMA_VERSION: u32 = 1;

/// A complete training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingOptions {
    /// Version of the file format, [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The model to train.
    pub model: ModelOptions,
    /// The texts.
    pub data: DataOptions,
    /// The components of the model that are trained.
    pub train: Vec<Part>,
    /// The training objective.
    pub objective: ObjectiveOptions,
    /// The optimizer.
    pub optimizer: AdamWOptions,
    /// Number of steps of the whole run.
    pub steps: usize,
    /// Sequences per step. Gradients are accumulated over a few sequences at a time, so any number fits in memory.
    pub batch: usize,
    /// Tokens per sequence.
    pub seq: usize,
    /// Training device. On a GPU, training runs on candle, and results differ from the CPU's by rounding.
    pub device: DeviceName,
    /// Number of threads that share a step's sequences on the CPU.
    pub workers: usize,
    /// Steps between evaluations on the start of the held-out text.
    pub evaluation_steps: usize,
    /// Steps between checkpoints.
    pub checkpoint_steps: usize,
    /// Whether the model is saved as 16-bit floats. The state of a checkpoint is always exact.
    pub half_precision: bool,
    /// Seed of new weights and of the batches.
    pub seed: u64,
}

impl Default for TrainingOptions {
    fn default() -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            model: ModelOptions::default(),
            data: DataOptions::default(),
            train: vec![Part::All],
            objective: ObjectiveOptions::default(),
            optimizer: AdamWOptions::default(),
            steps: 4000,
            batch: 4,
            seq: 256,
            device: DeviceName::Cpu,
            workers: 2,
            evaluation_steps: 200,
            checkpoint_steps: 200,
            half_precision: false,
            seed: 0,
        }
    }
}

/// The model to train: an existing one, or a new one with the sizes of [`ModelConfig::default`]. Fields of its
/// `config.json` may be changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelOptions {
    /// The model to continue from, in any form that [`Checkpoint::open`] accepts: a folder, a GGUF file or a name on
    /// the hub. By default, a new model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// Tokenizer of a new model, a `tokenizer.json`; by default, trained on the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// Changed fields of `config.json`. Tensors that only the changed configuration requires start as in a new model:
    /// gates, adapters of the head, and adapters of zero difference can be added. Sizes cannot be changed, except for
    /// `gate_hidden`: gates of another kind start anew.
    #[serde(flatten)]
    pub config: Mapping,
}

/// A component of the model that may be trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// Everything.
    All,
    /// The adapters that make each loop's projections differ.
    Lora,
    /// The weights that the loops share.
    Shared,
    /// The adapters that make each earlier loop's head differ.
    HeadLora,
    /// The learned gates.
    Gate,
}

impl Part {
    /// Every component, with its name and the prefix of its tensors' names.
    const ALL: [(Self, &str, &str); 5] = [
        (Self::All, "all", ""),
        (Self::Lora, "lora", "lora."),
        (Self::Shared, "shared", "block."),
        (Self::HeadLora, "head-lora", "head_lora."),
        (Self::Gate, "gate", "gate."),
    ];

    /// Whether a tensor of this name belongs to the component.
    pub fn holds(self, name: &str) -> bool {
        Self::ALL.iter().any(|(part, _, prefix)| *part == self && name.starts_with(prefix))
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.iter().find(|(part, ..)| part == self).map_or("", |(_, name, _)| name);
        f.write_str(name)
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, name, _)| *name == text).map(|(part, ..)| *part);
        let names = Self::ALL.map(|(_, name, _)| name).join(", ");
        found.ok_or_else(|| format!("unknown part `{text}`: expected one of {names}"))
    }
}

/// The most sequences of a step.
const MOST_SEQUENCES: usize = 1 << 16;
/// The most numbers of a fresh model's embedding and MLPs.
const MOST_NUMBERS: u64 = 1 << 32;
/// The most threads that share a step.
const MOST_WORKERS: usize = 1 << 10;

impl TrainingOptions {
    /// Reads the options of a run. Paths are relative to the folder of the file, except for the cache's.
    ///
    /// # Errors
    /// If the file cannot be read or is invalid, or a path in it does not exist.
    pub fn load(path: &Path) -> Result<Self, TrainingError> {
        let text = traces::input::read_text(path)?;
        let described = |source| TrainingError::Description { path: path.to_owned(), source };
        let mut options: Self = serde_yaml::from_str(&text).map_err(described)?;
        options.find_paths(path.parent().unwrap_or(Path::new("")))?;
        Ok(options)
    }

    /// Makes the paths of inputs absolute, relative to `base`. A model that does not exist may be on the hub: its name
    /// is not changed.
    ///
    /// # Errors
    /// If another file does not exist.
    pub fn find_paths(&mut self, base: &Path) -> Result<(), TrainingError> {
        let teacher = self.objective.teacher.as_mut().map(|teacher| &mut teacher.model);
        for model in self.model.from.iter_mut().chain(teacher) {
            *model = base.join(&model).canonicalize().unwrap_or(model.clone());
        }
        let data = self.data.text.iter_mut().chain(&mut self.data.held_out);
        for path in data.chain(&mut self.model.tokenizer) {
            let found = base.join(&path);
            *path = found.canonicalize().map_err(|e| TrainingError::in_file(&found, e))?;
        }
        Ok(())
    }

    /// Writes the options.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), TrainingError> {
        let yaml = serde_yaml::to_string(self)
            .map_err(|source| TrainingError::Description { path: path.to_owned(), source })?;
        write_then_rename(path, |part| std::fs::write(part, yaml)).map_err(|e| TrainingError::in_file(path, e))
    }

    /// Whether a tensor of this name is trained.
    pub fn trains(&self, name: &str) -> bool {
        self.train.iter().any(|part| part.holds(name))
    }

    /// Checks the numbers, by themselves and against the model.
    ///
    /// # Errors
    /// The first option that is out of range.
    pub fn check(&self, config: &ModelConfig) -> Result<(), TrainingError> {
        check(self.schema_version == SCHEMA_VERSION, "schema_version", &self.schema_version, &SCHEMA_VERSION)?;
        for (option, found) in [
            ("steps", self.steps),
            ("batch", self.batch),
            ("seq", self.seq),
            ("workers", self.workers),
            ("evaluation_steps", self.evaluation_steps),
            ("checkpoint_steps", self.checkpoint_steps),
        ] {
            check(found >= 1, option, &found, &"at least 1")?;
        }
        for (option, is_empty, expected) in [
            ("train", self.train.is_empty(), "at least one part of the model"),
            ("data.text", self.data.text.is_empty(), "at least one file or folder"),
            ("data.held_out", self.data.held_out.is_empty(), "at least one file or folder that is not trained on"),
        ] {
            check(!is_empty, option, &"empty", &expected)?;
        }
        for (option, found, most) in [("batch", self.batch, MOST_SEQUENCES), ("workers", self.workers, MOST_WORKERS)] {
            check(found <= most, option, &found, &format!("at most {most}"))?;
        }
        let limit = format!("at most the model's max_positions of {}", config.max_positions);
        check(self.seq <= config.max_positions, "seq", &self.seq, &limit)?;
        self.optimizer.check(self.steps)?;
        self.objective.check(config)
    }
}

impl ModelOptions {
    /// The initial weights, and the tokenizer of an existing model. `seed` is the seed of new weights.
    ///
    /// # Errors
    /// If the model cannot be opened, or the changed configuration is invalid, or drops or reshapes a tensor.
    pub fn start(&self, seed: u64) -> Result<(Weights, Option<Tokenizer>), TrainingError> {
        let Some(from) = &self.from else {
            return Ok((fresh(changed(&ModelConfig::default(), &self.config)?, seed)?, None));
        };
        let Checkpoint { weights: given, tokenizer } = Checkpoint::open(from, None)?;
        if self.config.is_empty() {
            return Ok((given, tokenizer));
        }
        let fresh = fresh(changed(given.config(), &self.config)?, seed)?;
        let same_gates = fresh.config().gate_hidden == given.config().gate_hidden;
        let given = given.tensors().iter().filter(|(name, _)| same_gates || !Part::Gate.holds(name));
        let tensors = fresh.tensors().iter().chain(given).map(|(name, tensor)| (name.clone(), tensor.clone()));
        let origin = format!("{}, changed", from.display());
        Ok((Weights::from_tensors(fresh.config().clone(), tensors.collect(), &origin)?, tokenizer))
    }

    /// The tokenizer: the configured one, or `of_model`, or for a new model one of `vocab_size` tokens trained on the
    /// text.
    ///
    /// # Errors
    /// If there is none, a file cannot be read, or the tokenizer has more tokens than the model.
    pub fn tokenizer(
        &self,
        of_model: Option<Tokenizer>,
        data: &DataOptions,
        vocab_size: usize,
    ) -> Result<Tokenizer, TrainingError> {
        let tokenizer = match (&self.tokenizer, of_model, &self.from) {
            (Some(path), ..) => Tokenizer::load(path)?,
            (None, Some(tokenizer), _) => tokenizer,
            (None, None, Some(from)) => {
                return Err(TrainingError::Option {
                    option: "model.from",
                    found: format!("{}, which has no tokenizer", from.display()),
                    expected: "a model with one, or `model.tokenizer`".to_owned(),
                });
            }
            (None, None, None) => Tokenizer::train(&data.read_text()?, vocab_size)?,
        };
        let found = format!("that of a model of {vocab_size} tokens");
        let expected = format!("one of at least the tokenizer's {}", tokenizer.vocab_size());
        check(tokenizer.vocab_size() <= vocab_size, "model.vocab_size", &found, &expected)?;
        Ok(tokenizer)
    }
}

/// Fresh weights of a model whose largest matrices are not absurd together.
fn fresh(config: ModelConfig, seed: u64) -> Result<Weights, TrainingError> {
    let product = |a: usize, b: usize| (a as u64).saturating_mul(b as u64);
    let of_layer = product(config.hidden_size, config.intermediate_size);
    let of_layers = of_layer.saturating_mul(config.num_layers() as u64);
    let numbers = product(config.vocab_size, config.hidden_size).saturating_add(of_layers);
    let found = format!("sizes that multiply to {numbers} numbers");
    check(numbers <= MOST_NUMBERS, "model", &found, &format!("at most {MOST_NUMBERS}"))?;
    Ok(Weights::random(config, seed)?)
}

/// A configuration with some fields changed.
fn changed(config: &ModelConfig, changes: &Mapping) -> Result<ModelConfig, TrainingError> {
    let refused = |e: serde_yaml::Error| TrainingError::Option {
        option: "model",
        found: serde_yaml::to_string(changes).unwrap_or_default().trim_end().replace('\n', ", "),
        expected: format!("`from`, `tokenizer` and fields of a config.json ({e})"),
    };
    let mut fields = serde_yaml::to_value(config).map_err(refused)?;
    if let Value::Mapping(fields) = &mut fields {
        fields.extend(changes.clone());
    }
    serde_yaml::from_value(fields).map_err(refused)
}

/// Loads a teacher to a device. Its tokens must be those of the model.
///
/// # Errors
/// If the teacher cannot be opened, or its tokenizer or vocabulary differs.
pub fn load_teacher(
    model: &Path,
    tokenizer: &Tokenizer,
    vocab_size: usize,
    device: &Device,
) -> Result<Reference, TrainingError> {
    let Checkpoint { weights, tokenizer: of_teacher } = Checkpoint::open(model, None)?;
    let same_size = weights.config().vocab_size == vocab_size;
    let of_teacher = of_teacher.as_ref().map(Tokenizer::to_json).transpose()?;
    let same_tokens = of_teacher == Some(tokenizer.to_json()?);
    let found = format!("{}, with a vocabulary of {}", model.display(), weights.config().vocab_size);
    let expected = format!("a model with the student's tokenizer and its vocabulary of {vocab_size}");
    check(same_size && same_tokens, "objective.teacher.model", &found, &expected)?;
    Ok(Reference::new(&weights.to_device(device)?)?)
}

/// Rejects an option unless `holds`.
pub(crate) fn check(
    holds: bool,
    option: &'static str,
    found: &dyn ToString,
    expected: &dyn ToString,
) -> Result<(), TrainingError> {
    let refused = || TrainingError::Option { option, found: found.to_string(), expected: expected.to_string() };
    if holds { Ok(()) } else { Err(refused()) }
}

/// Rejects a weight that is negative or not finite.
pub(crate) fn check_weight(option: &'static str, weight: f64) -> Result<(), TrainingError> {
    check(weight.is_finite() && weight >= 0.0, option, &weight, &"a finite number of at least 0")
}
