//! Initialization of the shared block: the layers of the source that its matrices, norms and biases come from.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use candle_core::Tensor;
use engine::config::{ModelConfig, Place, Projection};
use engine::weights::{Weights, WeightsError};
use serde::{Deserialize, Serialize};

use super::layers::{SourceLayers, vector_names};
use super::{Conversion, ConversionError};

/// Source of the matrices of the shared block (arXiv 2410.20672, section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Initialization {
    /// Layers spread evenly from the first to the last, both included; for a block of one layer, the first.
    Stepwise,
    /// The mean of the tied layers.
    Average,
    /// The first layers.
    Lower,
    /// New random numbers, as at the start of training.
    Random,
}

/// Source of norm weights and biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vectors {
    /// Not shared: each loop keeps those of its own layer.
    Own,
    /// Shared: the mean of the tied layers.
    Average,
    /// Shared: those of the layer that the matrices come from; the first tied layer if they come from none or several.
    First,
    /// Shared: norm weights of one, biases of zero.
    Reset,
}

impl Initialization {
    /// The default initialization. With adapters, the mean: of all shared matrices it minimizes the energy of the
    /// residuals. Without adapters, trained layers.
    pub fn default_for(relaxed: bool) -> Self {
        if relaxed { Self::Average } else { Self::Stepwise }
    }

    /// The default for norms and biases. With adapters, each loop has its own: they are small, and without them no rank
    /// restores a Gemma or a GPT-NeoX. Without adapters they follow the matrices, as in the authors' code for
    /// Mixture-of-Recursions (arXiv 2507.10524).
    pub fn default_vectors(self, relaxed: bool) -> Vectors {
        match self {
            _ if relaxed => Vectors::Own,
            Self::Average => Vectors::Average,
            Self::Stepwise | Self::Lower => Vectors::First,
            Self::Random => Vectors::Reset,
        }
    }

    /// Indices of the source's layers whose mean is layer `layer` of the block. `config` is the recursive model's.
    fn sources(self, layer: usize, config: &ModelConfig) -> Vec<usize> {
        match self {
            Self::Stepwise => vec![stepwise(layer, config)],
            Self::Average => tied(layer, config).collect(),
            Self::Lower => vec![config.prelude_layers + layer],
            Self::Random => Vec::new(),
        }
    }
}

/// `round(first + layer * (last - first) / (block_layers - 1))`, halves to even. This is NumPy's `linspace` and
/// Python's `round`, as in the authors' code for Mixture-of-Recursions.
fn stepwise(layer: usize, config: &ModelConfig) -> usize {
    let first = config.prelude_layers as f64;
    let tied_layers = config.num_loops * config.block_layers;
    let step = match config.block_layers {
        1 => 0.0,
        block_layers => (tied_layers - 1) as f64 / (block_layers - 1) as f64,
    };
    (layer as f64 * step + first).round_ties_even() as usize
}

/// Indices of the layers that layer `layer` of the block replaces, loop by loop.
fn tied(layer: usize, config: &ModelConfig) -> impl Iterator<Item = usize> {
    (0..config.num_loops).map(move |depth| config.layer_index(Place::Block { depth, layer }))
}

/// Every tensor of every layer of the recursive model of `config`, except the adapters.
pub fn layers(
    source: &SourceLayers,
    config: &ModelConfig,
    conversion: &Conversion,
) -> Result<HashMap<String, Tensor>, ConversionError> {
    let fresh = match conversion.initialization {
        Initialization::Random => Some(fresh_block(config, conversion.seed)?),
        Initialization::Stepwise | Initialization::Average | Initialization::Lower => None,
    };
    let tying = Tying { source, config, conversion, fresh };
    let mut tensors = HashMap::new();
    for place in config.places() {
        let (matrices, vectors) = (config.matrices_prefix(place), config.vectors_prefix(place));
        for projection in config.projections() {
            if let Entry::Vacant(entry) = tensors.entry(format!("{matrices}.{}.weight", projection.name)) {
                let matrix = tying.matrix(place, &projection, entry.key())?;
                entry.insert(matrix);
            }
        }
        for name in vector_names(config) {
            if let Entry::Vacant(entry) = tensors.entry(format!("{vectors}.{name}")) {
                entry.insert(tying.vector(place, &name)?);
            }
        }
    }
    Ok(tensors)
}

/// A block of random numbers.
fn fresh_block(config: &ModelConfig, seed: u64) -> Result<Weights, WeightsError> {
    // Only the block's matrices are used, so vocabulary and adapters are left out.
    let config = ModelConfig { vocab_size: 1, lora: None, ..config.clone() };
    Weights::random(config, seed)
}

/// How the source's layers are tied.
struct Tying<'a> {
    source: &'a SourceLayers<'a>,
    config: &'a ModelConfig,
    conversion: &'a Conversion,
    fresh: Option<Weights>,
}

impl Tying<'_> {
    /// The matrix of a projection, with the name `name` in the recursive model.
    fn matrix(&self, place: Place, projection: &Projection, name: &str) -> Result<Tensor, ConversionError> {
        let Place::Block { layer, .. } = place else {
            return Ok(self.source.matrix(self.config.layer_index(place), projection)?.clone());
        };
        if let Some(fresh) = &self.fresh {
            return Ok(fresh.get(name)?.clone());
        }
        let sources = self.conversion.initialization.sources(layer, self.config).into_iter();
        mean(sources.map(|source| self.source.matrix(source, projection)))
    }

    /// A norm's weight or bias, or a projection's bias.
    fn vector(&self, place: Place, name: &str) -> Result<Tensor, ConversionError> {
        let own = || Ok(self.source.vector(self.config.layer_index(place), name)?.clone());
        let Place::Block { layer, .. } = place else { return own() };
        match self.conversion.vectors {
            Vectors::Own => own(),
            Vectors::Average => mean(tied(layer, self.config).map(|source| self.source.vector(source, name))),
            Vectors::First => {
                let first = match self.conversion.initialization.sources(layer, self.config)[..] {
                    [source] => source,
                    _ => self.config.layer_index(Place::Block { depth: 0, layer }),
                };
                Ok(self.source.vector(first, name)?.clone())
            }
            Vectors::Reset if name.ends_with(".weight") => Ok(own()?.ones_like()?),
            Vectors::Reset => Ok(own()?.zeros_like()?),
        }
    }
}

fn mean<'a>(tensors: impl Iterator<Item = Result<&'a Tensor, WeightsError>>) -> Result<Tensor, ConversionError> {
    let tensors: Vec<&Tensor> = tensors.collect::<Result<_, _>>()?;
    Ok(Tensor::stack(&tensors, 0)?.mean(0)?)
}
