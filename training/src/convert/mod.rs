//! Conversion of a pretrained transformer to a recursive one, as in Relaxed Recursive Transformers (arXiv 2410.20672,
//! sections 2.2 to 2.4). The layers are tied over the loops of a shared block, and low-rank adapters make the loops
//! differ.
//!
//! ```text
//! layers of the source ─► initialization ─► shared block
//!          │                                    │
//!          └──────────── residuals ◄────────────┘
//!                            │
//!                       relaxation ─► adapters of each loop
//! ```

mod initialization;
mod layers;
mod relaxation;
mod svd;

use engine::config::{LoraConfig, ModelConfig, Sharing};
use engine::weights::{Weights, WeightsError};
use serde::Serialize;

pub use initialization::{Initialization, Vectors};
pub use relaxation::{AdapterStart, KindEnergy, Ranks, Relaxation, beyond_adapters};

use layers::SourceLayers;
use relaxation::Relaxing;

/// Options of a conversion.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Conversion {
    /// Number of loops; it divides the layers between prelude and coda.
    pub num_loops: usize,
    /// Layers before the first loop that are kept unchanged. One of them and one coda layer give Middle-Cycle of arXiv
    /// 2507.10524.
    pub prelude_layers: usize,
    /// Layers after the last loop that are kept unchanged.
    pub coda_layers: usize,
    /// Source of the block's matrices.
    pub initialization: Initialization,
    /// Source of its norms and biases.
    pub vectors: Vectors,
    /// Adapters of each loop; `None` for a block that is identical in every loop.
    pub relaxation: Option<Relaxation>,
    /// Seed of all random draws: blocks, adapters and the test matrices of randomized decompositions.
    pub seed: u64,
}

/// A converted model, and how much of the original its adapters restore.
#[derive(Debug)]
pub struct Converted {
    /// The recursive model.
    pub weights: Weights,
    /// What the adapters restore, by kind of projection.
    pub energies: Vec<KindEnergy>,
}

/// Why a model cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConversionError {
    /// The source is not an ordinary transformer.
    #[error("the model to convert has `{field}` {found}, expected {expected}")]
    Source {
        /// Field of the source's configuration.
        field: &'static str,
        /// Value of the field.
        found: String,
        /// The values that are valid.
        expected: &'static str,
    },
    /// Prelude and coda contain every layer.
    #[error("a prelude of {prelude} and a coda of {coda} leave none of {layers} layers to share")]
    NothingToShare {
        /// Layers before the shared ones.
        prelude: usize,
        /// Layers after the shared ones.
        coda: usize,
        /// Number of layers of the source.
        layers: usize,
    },
    /// The number of layers is not a multiple of the loops.
    #[error("{layers} layers to share do not divide into {loops} loops, expected one of {}", divisors(*layers))]
    Loops {
        /// Number of layers to share.
        layers: usize,
        /// Requested number of loops.
        loops: usize,
    },
    /// A residual could not be decomposed.
    #[error("{adapter}: the singular value decomposition does not converge")]
    NoConvergence {
        /// Name of the adapter.
        adapter: String,
    },
    /// The source or the result is invalid.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Converts `source`, an ordinary transformer, to a recursive one. Matrices are decomposed in parallel on rayon's
/// threads, each of which holds one residual at a time. Calls `progress` after each matrix with the total number.
///
/// # Errors
/// If the source is already recursive, its layers do not divide, or the resulting configuration is invalid.
pub fn convert(
    source: &Weights,
    conversion: &Conversion,
    progress: impl Fn(usize) + Sync,
) -> Result<Converted, ConversionError> {
    let config = target_config(source.config(), conversion)?;
    config.validate().map_err(WeightsError::from)?;
    let layers = SourceLayers::new(source);
    let mut tensors = layers.outside();
    tensors.extend(initialization::layers(&layers, &config, conversion)?);
    let mut energies = Vec::new();
    if let Some(relaxation) = &conversion.relaxation {
        let (start, seed) = (relaxation.start, conversion.seed);
        let relaxing = Relaxing { source: &layers, config: &config, tensors: &tensors, start, seed };
        let adapters = relaxing.adapters(progress)?;
        tensors.extend(adapters.tensors);
        energies = adapters.energies;
    }
    let weights = Weights::from_tensors(config, tensors, "converted model")?;
    Ok(Converted { weights, energies })
}

/// Configuration of the recursive model.
fn target_config(source: &ModelConfig, conversion: &Conversion) -> Result<ModelConfig, ConversionError> {
    check_ordinary(source)?;
    let &Conversion { num_loops: loops, prelude_layers: prelude, coda_layers: coda, .. } = conversion;
    let layers = source.num_layers();
    let shared = layers.saturating_sub(prelude).saturating_sub(coda);
    if shared == 0 {
        return Err(ConversionError::NothingToShare { prelude, coda, layers });
    }
    if loops == 0 || !shared.is_multiple_of(loops) {
        return Err(ConversionError::Loops { layers: shared, loops });
    }
    let mut config = ModelConfig {
        block_layers: shared / loops,
        num_loops: loops,
        prelude_layers: prelude,
        coda_layers: coda,
        sharing: match conversion.vectors {
            Vectors::Own => Sharing::Matrices,
            Vectors::Average | Vectors::First | Vectors::Reset => Sharing::Block,
        },
        ..source.clone()
    };
    config.lora = conversion
        .relaxation
        .as_ref()
        .map(|relaxation| LoraConfig { ranks: relaxation.ranks.of_model(&config), scale: 1.0 });
    Ok(config)
}

/// Checks that a transformer has no recursive features, except loops that share nothing.
fn check_ordinary(config: &ModelConfig) -> Result<(), ConversionError> {
    let refuse = |field, found, expected| Err(ConversionError::Source { field, found, expected });
    if config.num_loops > 1 && config.sharing != Sharing::Nothing {
        return refuse("num_loops", config.num_loops.to_string(), "1, or loops that share nothing");
    }
    if config.lora.is_some() {
        return refuse("lora", "given".to_owned(), "none");
    }
    if config.head_lora_rank > 0 {
        return refuse("head_lora_rank", config.head_lora_rank.to_string(), "0");
    }
    if config.gate {
        return refuse("gate", "true".to_owned(), "false");
    }
    Ok(())
}

fn divisors(number: usize) -> String {
    let divisors = (1..=number).filter(|divisor| number.is_multiple_of(*divisor));
    divisors.map(|divisor| divisor.to_string()).collect::<Vec<_>>().join(", ")
}
