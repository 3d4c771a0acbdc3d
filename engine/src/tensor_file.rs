//! Tensors in files under foreign names. The headers are checked against the expected tensors first, then tensors are
//! read one at a time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::safetensors::{Load, MmapedSafetensors};
use candle_core::{DType, Device, Tensor};

use crate::checkpoint::contents;
use crate::config::ModelConfig;
use crate::weights::{Weights, WeightsError, expected_tensors};

/// A file whose tensors can be listed before they are read.
pub(crate) trait TensorFile {
    /// Name of the file, for errors.
    fn origin(&self) -> &str;
    /// The names of all tensors.
    fn names(&self) -> Vec<&str>;
    /// Shape of a tensor; `None` if there is no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// A tensor as `f32`.
    ///
    /// # Errors
    /// If its numbers have no float type, or are damaged.
    fn read(&self, name: &str) -> candle_core::Result<Tensor>;
}

/// Memory-mapped Safetensors files: only tensors that are read take memory.
pub(crate) struct Safetensors {
    origin: String,
    shapes: BTreeMap<String, Vec<usize>>,
    files: MmapedSafetensors,
}

impl Safetensors {
    /// Opens `paths`, which errors name `origin`.
    ///
    /// # Errors
    /// If a file cannot be read, or its header is damaged or does not match its length.
    pub fn open(paths: &[PathBuf], origin: &Path) -> Result<Self, WeightsError> {
        for path in paths {
            let failed = |error: std::io::Error| WeightsError::Read { path: path.clone(), source: error.into() };
            contents::open(path).map_err(failed)?;
        }
        // SAFETY: as with any mapped file, the caller must ensure that the files are not truncated while they are read.
        let files = unsafe { MmapedSafetensors::multi(paths) }
            .map_err(|source| WeightsError::Read { path: origin.to_owned(), source })?;
        let shapes = files.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec())).collect();
        Ok(Self { origin: origin.display().to_string(), shapes, files })
    }

    /// Whether two tensors exist and are equal, byte by byte.
    pub fn are_equal(&self, first: &str, second: &str) -> bool {
        match (self.files.get(first), self.files.get(second)) {
            (Ok(first), Ok(second)) => {
                first.dtype() == second.dtype() && first.shape() == second.shape() && first.data() == second.data()
            }
            _ => false,
        }
    }
}

impl TensorFile for Safetensors {
    fn origin(&self) -> &str {
        &self.origin
    }

    fn names(&self) -> Vec<&str> {
        self.shapes.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.get(name).cloned()
    }

    fn read(&self, name: &str) -> candle_core::Result<Tensor> {
        let tensor = self.files.get(name)?.load(&Device::Cpu)?;
        if !tensor.dtype().is_float() {
            candle_core::bail!("numbers of type {:?}, expected a float type", tensor.dtype());
        }
        tensor.to_dtype(DType::F32)
    }
}

/// A tensor of a file and the tensors of [`Weights`] that it contains.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    /// Its name in the file.
    pub theirs: String,
    /// Names in [`Weights`]: one, or those of query, key and value.
    pub ours: Vec<String>,
    /// Layout in the file.
    pub layout: Layout,
}

/// Layout of tensors of [`Weights`] in a tensor of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Unchanged.
    Same,
    /// Less one: Gemma multiplies by `1 + weight`.
    LessOne,
    /// A vector as a matrix of one row: Ouro's gate.
    OneRow,
    /// The rows of one after those of the other: Huginn's gate and up projections.
    Stacked,
    /// Query, key and value, the rows of one after those of the other, with the rotated pairs of a head adjacent: Huginn.
    AdjacentQkv {
        /// Numbers of heads of queries and of keys.
        heads: [usize; 2],
    },
    /// Biases `[2, 1, heads, head_dim]` of queries and keys, with the rotated pairs adjacent, and none of values: Huginn.
    AdjacentQkBias {
        /// Number of heads, for queries and keys alike.
        heads: usize,
    },
    /// Query, key and value in one tensor, with the rows of a head together: GPT-NeoX.
    HeadwiseQkv {
        /// Number of heads.
        heads: usize,
    },
}

impl Entry {
    /// The shape of the tensor in the file.
    fn shape(&self, expected: &BTreeMap<String, Vec<usize>>) -> Vec<usize> {
        let mut shape = expected[&self.ours[0]].clone();
        match self.layout {
            Layout::OneRow => return vec![1, shape[0]],
            Layout::AdjacentQkBias { heads } => return vec![2, 1, heads, shape[0] / heads],
            _ => {}
        }
        shape[0] = self.ours.iter().map(|name| expected[name][0]).sum();
        shape
    }

    /// The tensors of [`Weights`], of these shapes, in a tensor of the file.
    fn split(&self, theirs: Tensor, shapes: &BTreeMap<String, Vec<usize>>) -> candle_core::Result<Vec<Tensor>> {
        let stacked = || {
            let mut start = 0;
            let part = |name: &String| {
                let rows = shapes[name][0];
                start += rows;
                theirs.narrow(0, start - rows, rows)?.contiguous()
            };
            self.ours.iter().map(part).collect::<candle_core::Result<Vec<Tensor>>>()
        };
        match self.layout {
            Layout::Same => Ok(vec![theirs]),
            Layout::LessOne => Ok(vec![(theirs + 1.0)?]),
            Layout::OneRow => Ok(vec![theirs.squeeze(0)?]),
            Layout::Stacked => stacked(),
            Layout::AdjacentQkv { heads } => {
                let mut parts = stacked()?;
                for (part, heads) in parts.iter_mut().zip(heads) {
                    *part = halves_of_pairs(part, heads)?;
                }
                Ok(parts)
            }
            Layout::AdjacentQkBias { heads } => {
                let both = theirs.flatten_all()?.chunk(2, 0)?;
                let halves = both.iter().map(|bias| halves_of_pairs(bias, heads));
                let mut biases = halves.collect::<candle_core::Result<Vec<Tensor>>>()?;
                biases.push(biases[1].zeros_like()?);
                Ok(biases)
            }
            Layout::HeadwiseQkv { heads } => {
                let mut dims = theirs.dims().to_vec();
                let rows = dims[0] / self.ours.len();
                dims.splice(0..1, [heads, self.ours.len(), rows / heads]);
                let by_head = theirs.reshape(dims)?;
                let part = |index| by_head.narrow(1, index, 1)?.flatten(0, 2)?.contiguous();
                (0..self.ours.len()).map(part).collect()
            }
        }
    }

    /// The tensor of the file for tensors of [`Weights`].
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn join(&self, ours: &[&Tensor]) -> candle_core::Result<Tensor> {
        match self.layout {
            Layout::Same => Ok(ours[0].clone()),
            Layout::LessOne => ours[0] - 1.0,
            Layout::OneRow => ours[0].unsqueeze(0),
            Layout::Stacked => Tensor::cat(ours, 0),
            Layout::AdjacentQkv { heads } => {
                let [queries, keys] = [0, 1].map(|part| pairs_of_halves(ours[part], heads[part]));
                Tensor::cat(&[&queries?, &keys?, ours[2]], 0)
            }
            Layout::AdjacentQkBias { heads } => {
                if ours[2].sqr()?.sum_all()?.to_scalar::<f32>()? > 0.0 {
                    candle_core::bail!("a bias of values, for which this family has no place");
                }
                let [queries, keys] = [0, 1].map(|part| pairs_of_halves(ours[part], heads));
                Tensor::stack(&[queries?, keys?], 0)?.reshape((2, 1, heads, ours[0].elem_count() / heads))
            }
            Layout::HeadwiseQkv { heads } => {
                let by_head = |tensor: &&Tensor| {
                    let mut dims = tensor.dims().to_vec();
                    dims.splice(0..1, [heads, 1, dims[0] / heads]);
                    tensor.reshape(dims)
                };
                let parts = ours.iter().map(by_head).collect::<candle_core::Result<Vec<_>>>()?;
                Tensor::cat(&parts, 1)?.flatten(0, 2)
            }
        }
    }
}

/// The rows of projected heads with the two dimensions that rotate together half a head apart, as our kernels rotate
/// them, from rows in which they are adjacent. The products of queries and keys are the same.
fn halves_of_pairs(rows: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let width = rows.dim(0)? / heads;
    swapped(rows, &[heads, width / 2, 2])
}

/// The inverse of [`halves_of_pairs`].
fn pairs_of_halves(rows: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let width = rows.dim(0)? / heads;
    swapped(rows, &[heads, 2, width / 2])
}

/// Rows of index `[a, b, c]`, in the order of index `[a, c, b]`.
fn swapped(rows: &Tensor, index: &[usize; 3]) -> candle_core::Result<Tensor> {
    let mut dims = rows.dims().to_vec();
    dims.splice(0..1, *index);
    rows.reshape(dims)?.transpose(1, 2)?.contiguous()?.reshape(rows.dims())
}

/// Reads the weights of `config` from a file that contains them as given by `entries`. Tensors for which `ignored`
/// returns true need not be among the entries.
///
/// # Errors
/// If a tensor is missing, unexpected, of the wrong shape, damaged or not finite. Shapes are checked before any tensor
/// is read, so that a file of a few bytes cannot demand more memory than it has tensors.
pub(crate) fn read_weights(
    file: &dyn TensorFile,
    config: ModelConfig,
    entries: &[Entry],
    ignored: impl Fn(&str) -> bool,
) -> Result<Weights, WeightsError> {
    check_shapes(file, &config, entries, ignored)?;
    let (mut tensors, shapes) = (HashMap::new(), expected_tensors(&config));
    for entry in entries {
        let parts = file.read(&entry.theirs).and_then(|theirs| entry.split(theirs, &shapes));
        let name = || format!("{}` of `{}", entry.theirs, file.origin());
        let parts = parts.map_err(|source| WeightsError::Tensor { name: name(), source })?;
        tensors.extend(entry.ours.iter().cloned().zip(parts));
    }
    Weights::from_tensors(config, tensors, file.origin())
}

fn check_shapes(
    file: &dyn TensorFile,
    config: &ModelConfig,
    entries: &[Entry],
    ignored: impl Fn(&str) -> bool,
) -> Result<(), WeightsError> {
    let origin = || file.origin().to_owned();
    let known: HashSet<&str> = entries.iter().map(|entry| entry.theirs.as_str()).collect();
    if let Some(name) = file.names().into_iter().find(|name| !known.contains(name) && !ignored(name)) {
        let found = file.shape(name).unwrap_or_default();
        return Err(WeightsError::Unexpected { origin: origin(), name: name.to_owned(), found });
    }
    let shapes = expected_tensors(config);
    for entry in entries {
        let (name, expected) = (entry.theirs.clone(), entry.shape(&shapes));
        match file.shape(&name) {
            None => return Err(WeightsError::Missing { origin: origin(), name, expected }),
            Some(found) if found != expected => {
                return Err(WeightsError::Shape { origin: origin(), name, found, expected });
            }
            Some(_) => {}
        }
    }
    Ok(())
}
