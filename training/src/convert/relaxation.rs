//! Low-rank adapters that move each loop of the shared block back towards its original layers.

use std::collections::{BTreeMap, HashMap};
use std::str::FromStr;

use candle_core::{Device, Tensor};
use engine::config::{Architecture, LoraRanks, ModelConfig, Norm, Place, Projection, ProjectionKind, Sharing};
use faer::{Mat, Scale};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::ConversionError;
use super::layers::SourceLayers;
use super::svd::{LowRank, truncated_svd};

/// Adapters per loop, `W' + B A`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Relaxation {
    /// Ranks of the adapters.
    pub ranks: Ranks,
    /// Initial values of the adapters.
    pub start: AdapterStart,
}

/// Ranks of adapters by kind of projection, limited by the projection's inputs and outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ranks {
    /// One rank for every kind.
    All(usize),
    /// Full rank: the smaller number of a projection's inputs and outputs.
    Full,
    /// A rank for each kind.
    ByKind(LoraRanks),
}

/// Initial values of adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterStart {
    /// Truncated singular value decomposition of the residual (arXiv 2410.20672, section 2.3): `B = U_r S_r` and `A =
    /// V_r^T` of `W_l - W'`.
    Svd,
    /// `B` is zero and `A` random (arXiv 2106.09685): the adapters start without effect.
    Zero,
}

/// How much of the original the adapters of a kind of projection restore, summed over layers. The energy of a matrix is
/// the sum of its squares.
#[derive(Clone, Debug, PartialEq)]
pub struct KindEnergy {
    /// Kind of projection.
    pub projection: Projection,
    /// Energy of the original matrices.
    pub original: f64,
    /// Energy of the residuals: the original matrices less the shared ones.
    pub residual: f64,
    /// Energy of the residuals in each of the adapters' directions, in descending order; one entry for each rank.
    pub directions: Vec<f64>,
}

impl KindEnergy {
    /// Share of the residuals' energy that adapters of a rank restore.
    pub fn kept(&self, rank: usize) -> f64 {
        match self.residual {
            0.0 => 1.0,
            residual => self.directions[..rank].iter().sum::<f64>() / residual,
        }
    }

    fn add(&mut self, other: &Self) {
        self.original += other.original;
        self.residual += other.residual;
        for (sum, energy) in self.directions.iter_mut().zip(&other.directions) {
            *sum += energy;
        }
    }
}

impl FromStr for Ranks {
    type Err = String;

    /// Parses `64`, `full`, or `q=8,k=4,...`, in which a kind that is not named has no adapters.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse::<usize>().map_err(|_| format!("rank `{text}`, expected a whole number"));
        match text {
            "full" => return Ok(Self::Full),
            _ if !text.contains('=') => return number(text).map(Self::All),
            _ => {}
        }
        let mut by_name = BTreeMap::new();
        for part in text.split(',') {
            let (name, rank) = part.split_once('=').ok_or_else(|| format!("`{part}`, expected KIND=RANK"))?;
            if !KIND_NAMES.contains(&name) {
                return Err(format!("projection `{name}`, expected one of {}", KIND_NAMES.join(", ")));
            }
            if by_name.insert(name, number(rank)?).is_some() {
                return Err(format!("projection `{name}` twice"));
            }
        }
        let [q, k, v, o, gate, up, down] = KIND_NAMES.map(|name| by_name.get(name).copied().unwrap_or(0));
        Ok(Self::ByKind(LoraRanks { q, k, v, o, gate, up, down }))
    }
}

const KIND_NAMES: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

impl Ranks {
    /// The ranks for a model.
    pub fn of_model(self, config: &ModelConfig) -> LoraRanks {
        let projections = config.projections();
        let rank = |kind| {
            let projection = projections.iter().find(|projection| projection.kind == kind);
            let most = projection.map(|projection| projection.inputs.min(projection.outputs));
            match (self, most) {
                (Self::All(rank), Some(most)) => rank.min(most),
                (Self::Full, Some(most)) => most,
                (Self::All(_) | Self::Full, None) => 0,
                (Self::ByKind(ranks), most) => ranks.of(kind).min(most.unwrap_or(usize::MAX)),
            }
        };
        use ProjectionKind::{Down, Gate, K, O, Q, Up, V};
        let (q, k, v, o) = (rank(Q), rank(K), rank(V), rank(O));
        LoraRanks { q, k, v, o, gate: rank(Gate), up: rank(Up), down: rank(Down) }
    }
}

/// All adapters of a model.
pub struct Adapters {
    pub tensors: HashMap<String, Tensor>,
    pub energies: Vec<KindEnergy>,
}

/// Inputs of the adapters.
pub struct Relaxing<'a> {
    /// The original layers.
    pub source: &'a SourceLayers<'a>,
    /// Configuration of the recursive model, with the ranks.
    pub config: &'a ModelConfig,
    /// Tensors of the recursive model without adapters.
    pub tensors: &'a HashMap<String, Tensor>,
    /// Initial values of adapters.
    pub start: AdapterStart,
    /// Seed of random draws.
    pub seed: u64,
}

/// Position of an adapter.
struct Site {
    depth: usize,
    layer: usize,
    projection: Projection,
    rank: usize,
}

impl Site {
    fn prefix(&self) -> String {
        ModelConfig::lora_prefix(self.depth, self.layer, &self.projection)
    }
}

/// An adapter, and how much of the original it restores.
struct Adapter {
    a: Tensor,
    b: Tensor,
    energy: KindEnergy,
}

impl Relaxing<'_> {
    /// Creates every adapter, on rayon's threads. Calls `progress` after each with the total number.
    pub fn adapters(&self, progress: impl Fn(usize) + Sync) -> Result<Adapters, ConversionError> {
        let sites = self.sites();
        let make = |(number, site): (usize, &Site)| {
            let rng = StdRng::seed_from_u64(self.seed.wrapping_add(number as u64));
            let adapter = self.adapter(site, rng)?;
            progress(sites.len());
            Ok::<_, ConversionError>(adapter)
        };
        let adapters: Vec<Adapter> = sites.par_iter().enumerate().map(make).collect::<Result<_, _>>()?;

        let mut tensors = HashMap::new();
        let mut energies: Vec<KindEnergy> = Vec::new();
        for (site, adapter) in sites.iter().zip(adapters) {
            let prefix = site.prefix();
            tensors.insert(format!("{prefix}.a"), adapter.a);
            tensors.insert(format!("{prefix}.b"), adapter.b);
            match energies.iter_mut().find(|energy| energy.projection == site.projection) {
                Some(energy) => energy.add(&adapter.energy),
                None => energies.push(adapter.energy),
            }
        }
        Ok(Adapters { tensors, energies })
    }

    fn sites(&self) -> Vec<Site> {
        let ranks = self.config.lora.as_ref().map(|lora| lora.ranks).unwrap_or_default();
        let mut sites = Vec::new();
        for place in self.config.places() {
            let Place::Block { depth, layer } = place else { continue };
            let site = |projection: Projection| Site { depth, layer, projection, rank: ranks.of(projection.kind) };
            sites.extend(self.config.projections().into_iter().map(site).filter(|site| site.rank > 0));
        }
        sites
    }

    fn adapter(&self, site: &Site, mut rng: StdRng) -> Result<Adapter, ConversionError> {
        let &Site { projection, rank, .. } = site;
        let residual = self.residual(site)?;
        let low_rank = match self.start {
            AdapterStart::Zero => inactive(&projection, rank, &mut rng),
            AdapterStart::Svd => {
                let low_rank = truncated_svd(residual.matrix.as_ref(), rank, &mut rng);
                let mut low_rank = low_rank.map_err(|_| ConversionError::NoConvergence { adapter: site.prefix() })?;
                for (mut column, scale) in low_rank.a.col_iter_mut().zip(&residual.input_scale) {
                    // An input that the shared norm sets to zero is lost, and no adapter reads it.
                    column *= Scale(if *scale == 0.0 { 0.0 } else { scale.recip() });
                }
                low_rank
            }
        };
        let energy = KindEnergy {
            projection,
            original: residual.original_energy,
            residual: residual.matrix.squared_norm_l2().into(),
            directions: low_rank.singular_values.iter().map(|value| f64::from(*value).powi(2)).collect(),
        };
        Ok(Adapter { a: tensor(&low_rank.a)?, b: tensor(&low_rank.b)?, energy })
    }

    /// The residual of the shared matrix at a site.
    fn residual(&self, site: &Site) -> Result<Residual, ConversionError> {
        let Projection { kind, name, outputs, inputs, .. } = site.projection;
        let place = Place::Block { depth: site.depth, layer: site.layer };
        let source_layer = self.config.layer_index(place);
        let original: Vec<f32> = self.source.matrix(source_layer, &site.projection)?.flatten_all()?.to_vec1()?;
        let shared = &self.tensors[&format!("{}.{name}.weight", self.config.matrices_prefix(place))];
        let shared: Vec<f32> = shared.flatten_all()?.to_vec1()?;
        let (mut original_scale, mut input_scale) = (vec![1.0; inputs], vec![1.0; inputs]);
        if let Some(norm) = shared_norm(self.config, kind) {
            original_scale = self.source.vector(source_layer, &norm)?.to_vec1()?;
            input_scale = self.tensors[&format!("{}.{norm}", self.config.vectors_prefix(place))].to_vec1()?;
        }
        let original =
            Mat::from_fn(outputs, inputs, |row, column| original[row * inputs + column] * original_scale[column]);
        let shared = Mat::from_fn(outputs, inputs, |row, column| shared[row * inputs + column] * input_scale[column]);
        let original_energy = original.squared_norm_l2().into();
        Ok(Residual { matrix: original - shared, original_energy, input_scale })
    }
}

/// Residual of a shared matrix: `W_l D_l - W' D'`, where `D` are the weights of the preceding norms if the loops share
/// them, and 1 otherwise. An adapter `B A`, which follows the shared norm, is `B A D'` here.
struct Residual {
    matrix: Mat<f32>,
    /// Energy of `W_l D_l`.
    original_energy: f64,
    /// The diagonal of `D'`.
    input_scale: Vec<f32>,
}

/// The weight of the norm before a projection, if all loops share it.
fn shared_norm(config: &ModelConfig, kind: ProjectionKind) -> Option<String> {
    use ProjectionKind::{Down, Gate, K, O, Q, Up, V};
    let norm = match kind {
        _ if config.sharing == Sharing::Matrices => return None,
        Q | K | V => "input_layernorm",
        Gate | Up if config.architecture.post_norms => "pre_feedforward_layernorm",
        Gate | Up => "post_attention_layernorm",
        O | Down => return None,
    };
    Some(format!("{norm}.weight"))
}

/// Shared norms and biases of a recursive model that adapters of no rank can replace: biases, and norms that are not
/// directly before a projection. Empty if each loop has its own.
pub fn beyond_adapters(config: &ModelConfig) -> Vec<&'static str> {
    let Architecture { norm, post_norms, qk_norm, qkv_bias, output_bias, mlp_bias, .. } = config.architecture;
    let kinds = [
        (post_norms, "norms after attention and MLP"),
        (qk_norm, "norms of queries and keys"),
        (norm == Norm::Layer, "biases of norms"),
        (qkv_bias || output_bias || mlp_bias, "biases of projections"),
    ];
    let shared = config.sharing == Sharing::Block;
    kinds.into_iter().filter(|(present, _)| shared && *present).map(|(_, name)| name).collect()
}

/// An adapter without effect before training.
fn inactive(projection: &Projection, rank: usize, rng: &mut StdRng) -> LowRank {
    let deviation = (projection.inputs as f32).sqrt().recip();
    let random = |_, _| deviation * Distribution::<f32>::sample(&StandardNormal, rng);
    LowRank {
        b: Mat::zeros(projection.outputs, rank),
        a: Mat::from_fn(rank, projection.inputs, random),
        singular_values: vec![0.0; rank],
    }
}

fn tensor(matrix: &Mat<f32>) -> candle_core::Result<Tensor> {
    let (rows, columns) = matrix.shape();
    let numbers = (0..rows).flat_map(|row| (0..columns).map(move |column| matrix[(row, column)]));
    Tensor::from_vec(numbers.collect(), (rows, columns), &Device::Cpu)
}
