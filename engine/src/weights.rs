//! Tensors of a model: checked against its configuration, loaded from and saved to a model folder.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Storage, Tensor};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Normal};
use safetensors::tensor::{Metadata, TensorInfo, View};
use sha2::{Digest, Sha256};
use traces::unfinished::Registered;

use crate::config::{ConfigError, InvalidField, ModelConfig, Norm, Place, Projection};
use crate::differentiable::numbers;
use crate::tensor_file::{Entry, Layout, Safetensors, read_weights};

/// Name of the configuration file in a model folder.
pub const CONFIG_FILE: &str = "config.json";
/// Name of the tensor file in a model folder.
pub const TENSORS_FILE: &str = "model.safetensors";
/// Name of the tokenizer file in a model folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Name of the adapter of a model with input injection, `[hidden, 2 hidden]`: the columns of the state, then those of the
/// residual stream after the prelude.
pub const ADAPTER: &str = "adapter.weight";

/// A configuration with all its tensors, each `f32`, of the right shape and finite.
#[derive(Clone, Debug)]
pub struct Weights {
    config: ModelConfig,
    tensors: BTreeMap<String, Tensor>,
}

/// Number format of a saved tensor file. Loading gives `f32` in both cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Four bytes per number, exact.
    F32,
    /// Two bytes per number, rounded.
    F16,
}

impl Stored {
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
        }
    }
}

/// Why tensors are invalid, or a model folder cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The configuration file is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The given configuration is invalid.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// A file cannot be read or is not a safetensors file.
    #[error("{}: cannot read tensors: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Error of candle.
        source: candle_core::Error,
    },
    /// A file cannot be written.
    #[error("{}: cannot write: {message}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Error of the system or of candle.
        message: String,
    },
    /// A tensor of the configuration is missing.
    #[error("{origin}: tensor `{name}` is missing, expected shape {expected:?}")]
    Missing {
        /// The file, or another origin of the tensors.
        origin: String,
        /// Name of the tensor.
        name: String,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A tensor that the configuration does not have.
    #[error("{origin}: unexpected tensor `{name}` of shape {found:?}; config.json asks for no such tensor")]
    Unexpected {
        /// The file, or another origin of the tensors.
        origin: String,
        /// Name of the tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
    },
    /// A tensor whose shape differs from the configuration.
    #[error("{origin}: tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The file, or another origin of the tensors.
        origin: String,
        /// Name of the tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A tensor with an infinity or a NaN.
    #[error("{origin}: tensor `{name}` contains {value} at flat index {index}, expected finite numbers")]
    NotFinite {
        /// The file, or another origin of the tensors.
        origin: String,
        /// Name of the tensor.
        name: String,
        /// Row-major index in the tensor.
        index: usize,
        /// The number found.
        value: f32,
    },
    /// The device cannot be opened, or does not support the storage type.
    #[error(transparent)]
    Device(candle_core::Error),
    /// A tensor operation failed.
    #[error("tensor `{name}`: {source}")]
    Tensor {
        /// Name of the tensor.
        name: String,
        /// Error of candle.
        source: candle_core::Error,
    },
}

/// Name and shape of every tensor of `config`.
pub fn expected_tensors(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let hidden = config.hidden_size;
    let table = vec![config.vocab_size, hidden];
    let mut shapes = BTreeMap::from([("embed_tokens.weight".to_owned(), table.clone())]);
    expect_norm(config, "norm", hidden, &mut shapes);
    if !config.tie_embeddings {
        shapes.insert("lm_head.weight".to_owned(), table);
    }
    for place in config.places() {
        expect_layer(config, place, &mut shapes);
    }
    if config.injection.is_some() {
        shapes.insert(ADAPTER.to_owned(), vec![hidden, 2 * hidden]);
    }
    for depth in 0..config.num_loops - 1 {
        if config.head_lora_rank > 0 {
            shapes.insert(format!("head_lora.{depth}.a"), vec![config.head_lora_rank, hidden]);
            shapes.insert(format!("head_lora.{depth}.b"), vec![config.vocab_size, config.head_lora_rank]);
        }
        if config.shared_gate {
            shapes.insert("gate.weight".to_owned(), vec![hidden]);
            shapes.insert("gate.bias".to_owned(), vec![1]);
        } else if config.gate {
            let inputs = if config.gate_hidden > 0 { config.gate_hidden } else { hidden };
            if config.gate_hidden > 0 {
                shapes.insert(format!("gate.{depth}.hidden.weight"), vec![config.gate_hidden, hidden]);
                shapes.insert(format!("gate.{depth}.hidden.bias"), vec![config.gate_hidden]);
            }
            shapes.insert(format!("gate.{depth}.weight"), vec![inputs]);
            shapes.insert(format!("gate.{depth}.bias"), vec![1]);
        }
    }
    shapes
}

fn expect_layer(config: &ModelConfig, place: Place, shapes: &mut BTreeMap<String, Vec<usize>>) {
    let (matrices, vectors) = (config.matrices_prefix(place), config.vectors_prefix(place));
    for (norm, width) in config.norms() {
        expect_norm(config, &format!("{vectors}.{norm}"), width, shapes);
    }
    for projection in config.projections() {
        let Projection { kind, name, outputs, inputs, bias } = projection;
        shapes.insert(format!("{matrices}.{name}.weight"), vec![outputs, inputs]);
        if bias {
            shapes.insert(format!("{vectors}.{name}.bias"), vec![outputs]);
        }
        let rank = config.lora.as_ref().map_or(0, |lora| lora.ranks.of(kind));
        if let Place::Block { depth, layer } = place
            && rank > 0
        {
            let prefix = ModelConfig::lora_prefix(depth, layer, &projection);
            shapes.insert(format!("{prefix}.a"), vec![rank, inputs]);
            shapes.insert(format!("{prefix}.b"), vec![outputs, rank]);
        }
    }
}

fn expect_norm(config: &ModelConfig, name: &str, width: usize, shapes: &mut BTreeMap<String, Vec<usize>>) {
    shapes.insert(format!("{name}.weight"), vec![width]);
    if config.architecture.norm == Norm::Layer {
        shapes.insert(format!("{name}.bias"), vec![width]);
    }
}

impl Weights {
    /// Takes `tensors` of any float type as the weights of `config`. `origin` names their origin in errors. Tensors
    /// that are already `f32` are kept, so candle variables stay variables.
    ///
    /// # Errors
    /// If a tensor is missing, unexpected, of the wrong shape, or not finite.
    pub fn from_tensors(
        config: ModelConfig,
        tensors: HashMap<String, Tensor>,
        origin: &str,
    ) -> Result<Self, WeightsError> {
        config.validate()?;
        let expected = expected_tensors(&config);
        if let Some((name, tensor)) = tensors.iter().find(|(name, _)| !expected.contains_key(*name)) {
            return Err(WeightsError::Unexpected {
                origin: origin.to_owned(),
                name: name.clone(),
                found: tensor.dims().to_vec(),
            });
        }
        let mut checked = BTreeMap::new();
        for (name, shape) in expected {
            let tensor = tensors.get(&name).ok_or_else(|| WeightsError::Missing {
                origin: origin.to_owned(),
                name: name.clone(),
                expected: shape.clone(),
            })?;
            checked.insert(name.clone(), checked_tensor(origin, &name, tensor, shape)?);
        }
        Ok(Self { config, tensors: checked })
    }

    /// Loads `config.json` and `model.safetensors` of a model folder.
    ///
    /// # Errors
    /// If a file cannot be read, or as for [`Weights::from_tensors`].
    pub fn load(folder: &Path) -> Result<Self, WeightsError> {
        let config = ModelConfig::load(&folder.join(CONFIG_FILE))?;
        let path = folder.join(TENSORS_FILE);
        let file = Safetensors::open(std::slice::from_ref(&path), &path)?;
        let entry = |name: String| Entry { theirs: name.clone(), ours: vec![name], layout: Layout::Same };
        let entries: Vec<Entry> = expected_tensors(&config).into_keys().map(entry).collect();
        read_weights(&file, config, &entries, |_| false)
    }

    /// Writes `config.json` and `model.safetensors` into a model folder, which is created. Each file is written under a
    /// temporary name and renamed, so a reader never sees a partial file.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, folder: &Path, stored: Stored) -> Result<(), WeightsError> {
        let mut tensors = HashMap::new();
        for (name, tensor) in &self.tensors {
            let tensor = tensor.to_dtype(stored.dtype()).map_err(|e| in_tensor(name, e))?;
            tensors.insert(name.clone(), tensor);
        }
        let fail = |path: &Path, message: String| WeightsError::Write { path: path.to_owned(), message };
        std::fs::create_dir_all(folder).map_err(|e| fail(folder, e.to_string()))?;
        let path = folder.join(CONFIG_FILE);
        write_then_rename(&path, |part| std::fs::write(part, self.config.to_json()))
            .map_err(|e| fail(&path, e.to_string()))?;
        let path = folder.join(TENSORS_FILE);
        write_then_rename(&path, |part| write_safetensors(part, &tensors, None)).map_err(|e| fail(&path, e.to_string()))
    }

    /// Random initial weights from a seed. Norms are one; LoRA `b`, gates and biases are zero. Other numbers are
    /// normal: projections with deviation `1 / sqrt(inputs)`, those that write into the residual stream smaller by the
    /// root of the number of such projections.
    ///
    /// # Errors
    /// If `config` is out of range.
    pub fn random(config: ModelConfig, seed: u64) -> Result<Self, WeightsError> {
        config.validate()?;
        let mut rng = StdRng::seed_from_u64(seed);
        let mut tensors = HashMap::new();
        for (name, shape) in expected_tensors(&config) {
            let tensor = random_tensor(&config, &name, &shape, &mut rng).map_err(|e| in_tensor(&name, e))?;
            tensors.insert(name, tensor);
        }
        Self::from_tensors(config, tensors, "random weights")
    }

    /// The weights on another device; tensors that are already there are shared.
    ///
    /// # Errors
    /// If the device fails, or its memory is too small.
    pub fn to_device(&self, device: &Device) -> Result<Self, WeightsError> {
        let moved = |(name, tensor): (&String, &Tensor)| {
            Ok((name.clone(), tensor.to_device(device).map_err(|e| in_tensor(name, e))?))
        };
        let tensors = self.tensors.iter().map(moved).collect::<Result<_, WeightsError>>()?;
        Ok(Self { config: self.config.clone(), tensors })
    }

    /// Configuration of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// All tensors by name, in name order.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// If the configuration has no tensor of that name.
    pub fn get(&self, name: &str) -> Result<&Tensor, WeightsError> {
        self.tensors.get(name).ok_or_else(|| WeightsError::Missing {
            origin: "weights".to_owned(),
            name: name.to_owned(),
            expected: Vec::new(),
        })
    }

    /// Number of trainable parameters.
    pub fn num_parameters(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }

    /// Fingerprint, equal for two models only if all sizes and numbers are equal: the first 16 hexadecimal digits of
    /// the SHA-256 of the configuration and, in name order, of every tensor's name and `f32` numbers.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn fingerprint(&self) -> Result<String, WeightsError> {
        let mut hash = Sha256::new();
        hash.update(self.config.to_json());
        for (name, tensor) in &self.tensors {
            hash.update(name);
            with_numbers(tensor, |numbers| hash_numbers(&mut hash, numbers)).map_err(|e| in_tensor(name, e))?;
        }
        let digest = hash.finalize();
        Ok(digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect())
    }
}

fn in_tensor(name: &str, source: candle_core::Error) -> WeightsError {
    WeightsError::Tensor { name: name.to_owned(), source }
}

/// Calls `read` with the numbers of a tensor, row-major and without a copy.
fn with_numbers<T>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> T) -> candle_core::Result<T> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(read(numbers(storage, layout)?)),
        _ => candle_core::bail!("a tensor on the CPU is not in its memory"),
    }
}

/// Hashes the little-endian bytes of `numbers`, buffered so that the hash gets many at once.
fn hash_numbers(hash: &mut Sha256, numbers: &[f32]) {
    let mut bytes = [0; 1 << 14];
    for part in numbers.chunks(bytes.len() / size_of::<f32>()) {
        let bytes = &mut bytes[..size_of_val(part)];
        for (bytes, number) in bytes.chunks_exact_mut(size_of::<f32>()).zip(part) {
            bytes.copy_from_slice(&number.to_le_bytes());
        }
        hash.update(bytes);
    }
}

fn checked_tensor(origin: &str, name: &str, tensor: &Tensor, expected: Vec<usize>) -> Result<Tensor, WeightsError> {
    if tensor.dims() != expected {
        return Err(WeightsError::Shape {
            origin: origin.to_owned(),
            name: name.to_owned(),
            found: tensor.dims().to_vec(),
            expected,
        });
    }
    let tensor = tensor.to_dtype(DType::F32).map_err(|e| in_tensor(name, e))?;
    let first_odd = |numbers: &[f32]| {
        let index = numbers.iter().position(|number| !number.is_finite())?;
        Some((index, numbers[index]))
    };
    match with_numbers(&tensor, first_odd).map_err(|e| in_tensor(name, e))? {
        None => Ok(tensor),
        Some((index, value)) => {
            Err(WeightsError::NotFinite { origin: origin.to_owned(), name: name.to_owned(), index, value })
        }
    }
}

fn random_tensor(config: &ModelConfig, name: &str, shape: &[usize], rng: &mut StdRng) -> candle_core::Result<Tensor> {
    if shape.len() == 1 && name.ends_with(".weight") && !name.starts_with("gate.") {
        return Tensor::ones(shape, DType::F32, &Device::Cpu);
    }
    if shape.len() == 1 || name.ends_with(".b") {
        return Tensor::zeros(shape, DType::F32, &Device::Cpu);
    }
    let inputs = shape[1] as f32;
    let residual_writes = (2 * config.num_layers()) as f32;
    let deviation = if name == "embed_tokens.weight" || name == "lm_head.weight" {
        0.05
    } else if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") {
        (inputs * residual_writes).sqrt().recip()
    } else {
        inputs.sqrt().recip()
    };
    let normal = Normal::new(0.0, deviation).map_err(candle_core::Error::wrap)?;
    let count = shape.iter().product();
    let numbers: Vec<f32> = normal.sample_iter(rng).take(count).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu)
}

/// Writes tensors in the safetensors format, with the bytes that its own crate writes. That crate writes to a file of a
/// random name, which stays behind if the program is killed, and which other users cannot read.
///
/// # Errors
/// If the file cannot be written.
pub fn write_safetensors<S: Into<String> + Ord, V: View>(
    path: &Path,
    tensors: impl IntoIterator<Item = (S, V)>,
    metadata: Option<HashMap<String, String>>,
) -> std::io::Result<()> {
    let mut tensors: Vec<(S, V)> = tensors.into_iter().collect();
    tensors.sort_by(|(name, tensor), (other, other_tensor)| {
        other_tensor.dtype().cmp(&tensor.dtype()).then_with(|| name.cmp(other))
    });
    let (mut end, mut infos, mut views) = (0, Vec::new(), Vec::new());
    for (name, view) in tensors {
        let start = end;
        end += view.data_len();
        let info = TensorInfo { dtype: view.dtype(), shape: view.shape().to_vec(), data_offsets: (start, end) };
        infos.push((name.into(), info));
        views.push(view);
    }
    let header = Metadata::new(metadata, infos).map_err(std::io::Error::other)?;
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    let mut out = BufWriter::new(File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    views.iter().try_for_each(|view| out.write_all(&view.data()))?;
    out.flush()
}

/// Writes a file with `write` next to `path`, then renames it to `path`.
///
/// # Errors
/// The error of `write` or of renaming.
pub fn write_then_rename<E: From<std::io::Error>>(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let _registered = Registered::file(&part);
    let placed = write(&part).and_then(|()| Ok(std::fs::rename(&part, path)?));
    if placed.is_err() {
        // The error of the writing is the one to report.
        let _ = std::fs::remove_file(&part);
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::tiny;
    use crate::config::{LoraConfig, LoraRanks};

    fn tensors_of(weights: &Weights) -> HashMap<String, Tensor> {
        weights.tensors().clone().into_iter().collect()
    }

    #[test]
    fn a_saved_folder_loads_to_the_same_model() {
        let mut config = tiny();
        config.tie_embeddings = false;
        config.lora = Some(LoraConfig { ranks: LoraRanks::all(2), scale: 2.0 });
        let weights = Weights::random(config, 1).unwrap();
        let folder = tempfile::tempdir().unwrap();
        weights.save(folder.path(), Stored::F32).unwrap();
        let loaded = Weights::load(folder.path()).unwrap();
        assert_eq!(loaded.fingerprint().unwrap(), weights.fingerprint().unwrap());
        assert!(!folder.path().join("model.safetensors.part").exists());
    }

    #[test]
    fn tensors_are_written_with_the_bytes_of_the_safetensors_crate() {
        let weights = Weights::random(tiny(), 1).unwrap();
        let mut tensors: HashMap<String, Tensor> = weights.tensors().clone().into_iter().collect();
        let half = tensors.values().next().unwrap().to_dtype(DType::F16).unwrap();
        tensors.insert("half".to_owned(), half);
        tensors.insert("step".to_owned(), Tensor::new(7_u32, &Device::Cpu).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        for metadata in [None, Some(HashMap::from([("format".to_owned(), "pt".to_owned())]))] {
            write_safetensors(&path, &tensors, metadata.clone()).unwrap();
            let expected = safetensors::serialize(&tensors, metadata).unwrap();
            assert!(std::fs::read(&path).unwrap() == expected);
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn f16_files_load_as_rounded_f32() {
        let weights = Weights::random(tiny(), 1).unwrap();
        let folder = tempfile::tempdir().unwrap();
        weights.save(folder.path(), Stored::F16).unwrap();
        let loaded = Weights::load(folder.path()).unwrap();
        let name = "block.layers.1.mlp.up_proj.weight";
        let (exact, rounded) = (weights.get(name).unwrap(), loaded.get(name).unwrap());
        assert_eq!(rounded.dtype(), DType::F32);
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (exact, rounded) in flat(exact).into_iter().zip(flat(rounded)) {
            assert!((exact - rounded).abs() <= exact.abs() / 1024.0 + 1e-7);
        }
    }

    #[test]
    fn the_fingerprint_depends_on_every_number_and_size() {
        let weights = Weights::random(tiny(), 1).unwrap();
        let print = weights.fingerprint().unwrap();
        assert_eq!(print, Weights::random(tiny(), 1).unwrap().fingerprint().unwrap());
        assert_ne!(print, Weights::random(tiny(), 2).unwrap().fingerprint().unwrap());
        let mut deeper = tiny();
        deeper.num_loops += 1;
        let deeper = Weights::from_tensors(deeper, tensors_of(&weights), "test").unwrap();
        assert_ne!(print, deeper.fingerprint().unwrap());
    }

    #[test]
    fn errors_name_the_file_and_the_tensor() {
        let weights = Weights::random(tiny(), 1).unwrap();
        let refusal = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
            let mut tensors = tensors_of(&weights);
            change(&mut tensors);
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(CONFIG_FILE), tiny().to_json()).unwrap();
            candle_core::safetensors::save(&tensors, folder.path().join(TENSORS_FILE)).unwrap();
            Weights::load(folder.path()).unwrap_err().to_string()
        };
        let name = "block.layers.0.self_attn.k_proj.weight";
        let missing = refusal(&|tensors| drop(tensors.remove(name)));
        assert!(
            missing.contains(
                "model.safetensors: tensor `block.layers.0.self_attn.k_proj.weight` is missing, expected shape [8, 8]"
            ),
            "{missing}"
        );

        let shape = refusal(&|tensors| {
            let wrong = Tensor::zeros((3, 8), DType::F32, &Device::Cpu).unwrap();
            tensors.insert(name.to_owned(), wrong);
        });
        assert!(shape.contains("has shape [3, 8], expected [8, 8]"), "{shape}");

        let infinite = refusal(&|tensors| {
            let mut numbers = vec![1.0; 8];
            numbers[5] = f32::INFINITY;
            let norm = Tensor::new(numbers, &Device::Cpu).unwrap();
            tensors.insert("norm.weight".to_owned(), norm);
        });
        assert!(infinite.contains("`norm.weight` contains inf at flat index 5"), "{infinite}");

        let unexpected = refusal(&|tensors| {
            let copy = tensors["embed_tokens.weight"].clone();
            tensors.insert("lm_head.weight".to_owned(), copy);
        });
        assert!(unexpected.contains("unexpected tensor `lm_head.weight`"), "{unexpected}");
    }

    #[test]
    fn a_file_that_is_no_tensor_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(CONFIG_FILE), tiny().to_json()).unwrap();
        std::fs::write(folder.path().join(TENSORS_FILE), "not tensors").unwrap();
        let message = Weights::load(folder.path()).unwrap_err().to_string();
        assert!(message.contains("model.safetensors: cannot read tensors"), "{message}");
    }
}
