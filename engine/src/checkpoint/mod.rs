//! Models from wherever they lie: folders of ours, and models as others publish them, which are Hugging Face folders and
//! GGUF files, local or from the Hugging Face hub. Ordinary transformers are read into [`Weights`] whose loops share
//! nothing, looped models with the loops that they have. All are written back as Hugging Face folders; a recursive model
//! that no family has is unrolled.
//!
//! ```text
//! a folder of ours ─────────────┐
//! config.json + *.safetensors ──┤                                       ┌── config.json + model.safetensors
//! *.gguf ───────────────────────┴─► Weights ─────────── (unrolled) ─────┘
//! ```
//!
//! | family | Hugging Face | GGUF |
//! | --- | --- | --- |
//! | Llama | `LlamaForCausalLM` | `llama` |
//! | Mistral | `MistralForCausalLM` | |
//! | Qwen 2, dense | `Qwen2ForCausalLM` | |
//! | Qwen 3, dense | `Qwen3ForCausalLM` | |
//! | SmolLM3 | `SmolLM3ForCausalLM` | |
//! | Gemma | `GemmaForCausalLM` | |
//! | Gemma 3, text | `Gemma3ForCausalLM` | `gemma3` |
//! | GPT-NeoX, Pythia | `GPTNeoXForCausalLM` | |
//! | Ouro, looped | `OuroForCausalLM` | |
//! | Nanbeige 4.2, looped | `NanbeigeForCausalLM` | `nanbeige` |
//! | Huginn, looped | `RavenForCausalLM` | |
//!
//! What a family has and [`ModelConfig`] cannot say is refused with the key that asks for it.

pub mod contents;
mod export;
mod family;
mod gguf;
mod gguf_header;
mod gguf_tokenizer;
mod hub;
mod keys;
mod looped;
mod names;
mod pre_tokenizers;
mod rules;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use keys::Keys;

use crate::config::{ConfigError, MAX_LAYERS, MAX_LOOPS, MODEL_TYPE, ModelConfig, Sharing};
use crate::tensor_file::{Safetensors, TensorFile, read_weights};
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::weights::{CONFIG_FILE, TENSORS_FILE, TOKENIZER_FILE, Weights, WeightsError};

pub use export::write_hugging_face;

/// The file that says in which file each tensor is, where there are several.
const INDEX_FILE: &str = "model.safetensors.index.json";

/// A model and its tokenizer.
pub struct Checkpoint {
    /// The weights; those of an ordinary transformer are of [`Sharing::Nothing`].
    pub weights: Weights,
    /// The tokenizer; none if the folder has no `tokenizer.json`.
    pub tokenizer: Option<Tokenizer>,
}

/// Why a checkpoint could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Work that needs a tokenizer, on a model without one.
    #[error("{}: the model has no tokenizer: {note}", path.display())]
    NoTokenizer {
        /// The model.
        path: PathBuf,
        /// What to do about it.
        note: &'static str,
    },
    /// A file could not be read.
    #[error("{}: cannot read: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not a JSON object.
    #[error("{}: not a JSON object: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// A key of the configuration is missing, or not what a supported model has there.
    #[error("{}: `{key}` is {found}, expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, with those of the objects around it.
        key: String,
        /// Its value.
        found: String,
        /// What is supported.
        expected: String,
    },
    /// The sizes make no model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tensors do not fit the configuration.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The tokenizer could not be read or written.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A GGUF file is damaged, or of a kind that is not supported.
    #[error("{}: not a supported GGUF file: {message}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The layers cannot be split into that many equal loops.
    #[error("{}: {layers} layers, expected a multiple of {num_loops} loops", path.display())]
    Loops {
        /// The file.
        path: PathBuf,
        /// Layers found.
        layers: usize,
        /// Loops asked for.
        num_loops: usize,
    },
    /// A looped model is asked for more loops than it can have, or for none.
    #[error("{}: {num_loops} loops, expected 1 to {MAX_LOOPS}", path.display())]
    LoopCount {
        /// The file.
        path: PathBuf,
        /// Loops asked for.
        num_loops: usize,
    },
    /// A recursive model is asked for other loops than its own.
    #[error("{}: a recursive model of {found} loops: only an ordinary transformer is split into other loops", path.display())]
    Recursive {
        /// The folder.
        path: PathBuf,
        /// Its loops.
        found: usize,
    },
    /// There is no file of that name, and it is no name of a model on the hub.
    #[error("{name}: no such file or folder{note}")]
    NotFound {
        /// The name.
        name: String,
        /// Why the hub was not asked, if the name could be one of its.
        note: String,
    },
    /// A folder or file is no model.
    #[error("{}: {message}", path.display())]
    NoModel {
        /// The folder or file.
        path: PathBuf,
        /// What it is instead.
        message: String,
    },
    /// There is neither a file of that name nor such a model on the hub.
    #[error("{name}: no such file or folder, and the Hugging Face hub does not have it either: {message}")]
    Hub {
        /// The name.
        name: String,
        /// What the hub's client said.
        message: String,
    },
    /// No Hugging Face architecture computes what the model does.
    #[error("no Hugging Face architecture computes what this model's layers do: {0}")]
    NoFamily(String),
    /// A file could not be written.
    #[error("{}: cannot write: {message}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        message: String,
    },
}

impl CheckpointError {
    /// That the model that was opened as `name` has no tokenizer, and what to do about it.
    pub fn no_tokenizer(name: &Path) -> Self {
        /// What other libraries write in place of a `tokenizer.json`.
        const OTHERS: [&str; 4] = ["tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model"];
        let note = match OTHERS.iter().any(|other| name.join(other).exists()) {
            true => "it has one of another format; save it as tokenizer.json, by `save_pretrained` of transformers",
            false if name.is_file() => {
                "expected the keys `tokenizer.ggml.model` and `tokenizer.ggml.tokens` in the file; take one that was \
                 converted with its tokenizer"
            }
            false => "expected a tokenizer.json beside its config.json",
        };
        Self::NoTokenizer { path: name.to_owned(), note }
    }
}

type Result<T, E = CheckpointError> = std::result::Result<T, E>;

impl Checkpoint {
    /// Opens a model: a folder of ours, a Hugging Face folder, a GGUF file or, where `name` is none of them, a model on
    /// the Hugging Face hub, `owner/model` or `owner/model/file.gguf`. The hub's files are kept in its usual cache
    /// (`HF_HOME`), which is asked first. The layers of an ordinary transformer become `num_loops` blocks in a row that
    /// share nothing; if none is given, one block, or those that a folder of ours says. A looped model of another program
    /// runs `num_loops` loops, or those that it says. `random:config.json` is a model of that configuration, which is one of
    /// ours, with [random weights](Weights::random) of seed 1 and without a tokenizer.
    ///
    /// # Errors
    /// If nothing is found under the name, a file is damaged, the model is of a family or has an option that is not
    /// supported, its tensors do not fit its configuration, or `num_loops` does not divide its layers or is given for a
    /// recursive model.
    pub fn open(name: &Path, num_loops: Option<usize>) -> Result<Self> {
        if let Some(config) = Self::random_config(name) {
            let weights = Weights::random(ModelConfig::load(config)?, 1)?;
            return Ok(Self { weights: ours_in_loops(weights, num_loops, config)?, tokenizer: None });
        }
        let path = match name.exists() {
            true => name.to_owned(),
            false => hub::fetch(name)?,
        };
        match is_ours(&path) {
            true => read_ours(&path, num_loops),
            false => Self::read(&path, num_loops),
        }
    }

    /// The configuration file of a model that is opened as `random:FILE`; none of another name.
    pub fn random_config(name: &Path) -> Option<&Path> {
        name.to_str()?.strip_prefix("random:").map(Path::new)
    }

    /// Weights and tokenizer of the model that was opened as `name`, for work that needs both.
    ///
    /// # Errors
    /// If it has no tokenizer.
    pub fn with_tokenizer(self, name: &Path) -> Result<(Weights, Tokenizer)> {
        match self.tokenizer {
            Some(tokenizer) => Ok((self.weights, tokenizer)),
            None => Err(CheckpointError::no_tokenizer(name)),
        }
    }

    /// Reads a model of another program, a Hugging Face folder or a GGUF file, with `num_loops` as for
    /// [`open`](Self::open).
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn read(path: &Path, num_loops: impl Into<Option<usize>>) -> Result<Self> {
        let num_loops = num_loops.into();
        if path.is_dir() {
            return read_folder(path, num_loops);
        }
        let part_of_a_folder = [".safetensors", ".json"].iter().any(|end| path.to_string_lossy().ends_with(end));
        if part_of_a_folder && path.exists() {
            let message = format!("a file of a model folder: give the folder, with its {CONFIG_FILE}");
            return Err(CheckpointError::NoModel { path: path.to_owned(), message });
        }
        gguf::read(path, num_loops)
    }
}

/// Whether a folder is one that [`Weights::save`] wrote, by the `model_type` of its configuration.
fn is_ours(folder: &Path) -> bool {
    let model_type = || Keys::read(&folder.join(CONFIG_FILE)).ok()?.optional::<String>("model_type").ok()?;
    folder.is_dir() && model_type().is_some_and(|found| found == MODEL_TYPE)
}

fn read_ours(folder: &Path, num_loops: Option<usize>) -> Result<Checkpoint> {
    let weights = ours_in_loops(Weights::load(folder)?, num_loops, folder)?;
    let tokenizer = tokenizer_of(folder, weights.config())?;
    Ok(Checkpoint { weights, tokenizer })
}

/// Weights of ours that are read from a path, in `num_loops` loops, or in those that they have.
fn ours_in_loops(weights: Weights, num_loops: Option<usize>, path: &Path) -> Result<Weights> {
    let config = weights.config();
    match num_loops {
        None => Ok(weights),
        Some(num_loops) if config.is_ordinary() => {
            Ok(weights.written_out(in_loops(config.unrolled(), num_loops, path)?)?)
        }
        Some(_) => Err(CheckpointError::Recursive { path: path.to_owned(), found: config.num_loops }),
    }
}

fn read_folder(folder: &Path, num_loops: Option<usize>) -> Result<Checkpoint> {
    is_model(folder)?;
    let keys = Keys::read(&folder.join(CONFIG_FILE))?;
    let family = family::Family::of(&keys)?;
    let config = family.config(&keys)?;
    let mut config = match family.is_looped() {
        true => with_loops(config, num_loops, keys.path())?,
        false => in_loops(config, num_loops.unwrap_or(1), keys.path())?,
    };
    let (files, origin) = tensor_files(folder)?;
    let file = Safetensors::open(&files, &origin)?;
    let stored = match config.sharing {
        Sharing::Nothing => config.num_layers(),
        Sharing::Block | Sharing::Matrices => config.prelude_layers + config.block_layers + config.coda_layers,
    };
    layers_within(&file, stored, &keys, family.layers_key())?;
    let [embedding, head] = family.naming().ends();
    let both = file.shape(&embedding).is_some() && file.shape(&head).is_some();
    if config.tie_embeddings && both && !file.are_equal(&embedding, &head) {
        let assumed =
            format!("not used, for {} holds a `{head}` that is not the embedding, which is used", file.origin());
        keys.warn("tie_word_embeddings", &assumed);
        config.tie_embeddings = false;
    }
    let weights = read_weights(&file, config.clone(), &family.naming().entries(&config), |name| {
        family.naming().ignores(name, &config)
    })?;
    let tokenizer = tokenizer_of(folder, weights.config())?;
    Ok(Checkpoint { weights, tokenizer })
}

/// Refuses folders of kinds that are often taken for models, with the remedy.
fn is_model(folder: &Path) -> Result<()> {
    if folder.join(CONFIG_FILE).exists() {
        return Ok(());
    }
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = files.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let ends_with = |end| names.iter().find(|name| name.ends_with(end));
    let instead = match (ends_with(".gguf"), ends_with("adapter_config.json"), ends_with("params.json")) {
        (Some(file), ..) => format!("; for its GGUF file, give {}", folder.join(file).display()),
        (_, Some(_), _) => "; an adapter of PEFT must be merged into its model first (`merge_and_unload`)".to_owned(),
        (.., Some(_)) => "; Meta's own layout must be converted to that of transformers first".to_owned(),
        _ => String::new(),
    };
    let message = format!("a folder without {CONFIG_FILE} is no model{instead}");
    Err(CheckpointError::NoModel { path: folder.to_owned(), message })
}

/// The tokenizer of a folder, if it has one, for a model of `config`.
fn tokenizer_of(folder: &Path, config: &ModelConfig) -> Result<Option<Tokenizer>> {
    let path = folder.join(TOKENIZER_FILE);
    if !path.exists() {
        return Ok(None);
    }
    Ok(Some(Tokenizer::load(&path)?.for_model(folder, config.vocab_size)?))
}

/// The safetensors files of a folder, and the file that names them.
fn tensor_files(folder: &Path) -> Result<(Vec<PathBuf>, PathBuf)> {
    /// What PyTorch's own files are called.
    const PYTORCH: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
    let (single, index) = (folder.join(TENSORS_FILE), folder.join(INDEX_FILE));
    if !single.exists() && !index.exists() && PYTORCH.iter().any(|name| folder.join(name).exists()) {
        let remedy = "save the model as safetensors, by `save_pretrained` of transformers";
        let message = format!("its tensors are in PyTorch's own format, not in {TENSORS_FILE}: {remedy}");
        return Err(CheckpointError::NoModel { path: folder.to_owned(), message });
    }
    if single.exists() || !index.exists() {
        return Ok((vec![single.clone()], single));
    }
    Ok((indexed_files(&index)?.iter().map(|name| folder.join(name)).collect(), index))
}

/// The names of the files that an index names, all of them beside it.
fn indexed_files(index: &Path) -> Result<BTreeSet<String>> {
    let keys = Keys::read(index)?;
    let files = keys.object("weight_map")?.ok_or_else(|| keys.refuse("weight_map", "an object"))?;
    let mut names = BTreeSet::new();
    for tensor in files.names() {
        let name: String = files.required(tensor)?;
        if Path::new(&name).file_name() != Some(name.as_ref()) {
            return Err(files.refuse(tensor, "the name of a file beside the index"));
        }
        names.insert(name);
    }
    Ok(names)
}

/// Splits the layers of an ordinary transformer, a single block, into `num_loops` equal blocks.
fn in_loops(mut config: ModelConfig, num_loops: usize, path: &Path) -> Result<ModelConfig> {
    let layers = config.block_layers;
    if num_loops == 0 || !layers.is_multiple_of(num_loops) {
        return Err(CheckpointError::Loops { path: path.to_owned(), layers, num_loops });
    }
    (config.num_loops, config.block_layers) = (num_loops, layers / num_loops);
    config.validate().map_err(|invalid| ConfigError::Invalid { path: path.to_owned(), invalid })?;
    Ok(config)
}

/// A looped model with `num_loops` loops, or as many as it says.
fn with_loops(mut config: ModelConfig, num_loops: Option<usize>, path: &Path) -> Result<ModelConfig> {
    config.num_loops = num_loops.unwrap_or(config.num_loops);
    if !(1..=MAX_LOOPS).contains(&config.num_loops) {
        return Err(CheckpointError::LoopCount { path: path.to_owned(), num_loops: config.num_loops });
    }
    config.validate().map_err(|invalid| ConfigError::Invalid { path: path.to_owned(), invalid })?;
    Ok(config)
}

/// Refuses more layers than there are tensors, before lists are made of them and a tensor is missed.
fn layers_within(file: &impl TensorFile, layers: usize, keys: &Keys, key: &str) -> Result<()> {
    let tensors = file.names().len();
    match layers <= tensors {
        true => Ok(()),
        false => Err(keys.refuse(key, &format!("no more layers than the {tensors} tensors of {}", file.origin()))),
    }
}

/// The number of layers at a key, bounded so that lists of layers can be made of it.
fn num_layers(keys: &Keys, key: &str) -> Result<usize> {
    let layers = keys.required(key)?;
    match (1..=MAX_LAYERS).contains(&layers) {
        true => Ok(layers),
        false => Err(keys.refuse(key, &format!("from 1 to {MAX_LAYERS} layers"))),
    }
}
