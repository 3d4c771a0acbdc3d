//! The tensors of a model, grouped by operation and depth, for any device.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Normal};

use crate::cache::Kept;
use crate::config::{self, INITIAL_STATES, InitialState, Injection, ModelConfig, Place, ProjectionKind, Sharing};
use crate::kernels::adapters::Adapter;
use crate::kernels::attention::{Heads, Sight};
use crate::kernels::rotary;
use crate::weights::{ADAPTER, Weights, WeightsError};

/// The tensors of a whole model.
pub(crate) struct ModelParameters<'w> {
    /// `[vocab, hidden]`
    pub embedding: &'w Tensor,
    pub prelude: Vec<LayerParameters<'w>>,
    pub loops: Loops<LayerParameters<'w>>,
    pub coda: Vec<LayerParameters<'w>>,
    /// `[1, numbers]`
    pub norm: Tensor,
    /// `[vocab, hidden]`
    pub head: &'w Tensor,
    /// Low-rank difference that each depth but the last adds to the head, `[rank, hidden]` and `[vocab, rank]`; empty
    /// without any.
    pub head_adapters: Vec<(&'w Tensor, &'w Tensor)>,
    pub gates: Option<GateParameters>,
    pub injection: Option<InjectionParameters<'w>>,
    /// [`rotary::tables`]
    pub rotary: Tensor,
}

impl<'w> ModelParameters<'w> {
    /// Groups the tensors of weights.
    pub fn new(weights: &'w Weights) -> Result<Self, WeightsError> {
        let config = weights.config();
        let mut rotaries = Vec::new();
        for frequencies in config.places().map(|place| config.rotary_frequencies(place)) {
            if !rotaries.contains(&frequencies) {
                rotaries.push(frequencies);
            }
        }
        let layer = |places: Vec<Place>, kept| Loader { weights, rotaries: &rotaries, places }.layer(kept);
        let coda_layer = |index| layer(vec![Place::Coda(index)], Kept::AtEachDepth(config.block_layers + index));
        let block = |depths: Range<usize>| {
            let places = |layer| depths.clone().map(|depth| Place::Block { depth, layer }).collect();
            let layers = (0..config.block_layers).map(|index| layer(places(index), Kept::AtEachDepth(index)));
            layers.collect::<Result<Vec<_>, WeightsError>>()
        };
        let norm = norm_tensors(config, "norm");
        let norm = norm.iter().map(|name| weights.get(name)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            embedding: weights.get("embed_tokens.weight")?,
            prelude: (0..config.prelude_layers)
                .map(|index| layer(vec![Place::Prelude(index)], Kept::Once(index)))
                .collect::<Result<_, _>>()?,
            loops: match config.sharing {
                Sharing::Block | Sharing::Matrices => Loops::Shared(block(0..config.num_loops)?),
                Sharing::Nothing => {
                    Loops::Own((0..config.num_loops).map(|depth| block(depth..depth + 1)).collect::<Result<_, _>>()?)
                }
            },
            coda: (0..config.coda_layers).map(coda_layer).collect::<Result<_, _>>()?,
            norm: Tensor::cat(&norm, 0).and_then(|vectors| vectors.unsqueeze(0)).map_err(in_tensor("norm"))?,
            head: weights.get(head_name(config))?,
            head_adapters: head_adapters(weights)?,
            gates: gates(weights)?,
            injection: InjectionParameters::new(weights)?,
            rotary: rotary::tables(&rotaries, config.max_positions).map_err(in_tensor("rotary tables"))?,
        })
    }
}

/// The tensors of the gates, one for each depth but the last.
#[derive(Debug)]
pub(crate) struct GateParameters {
    /// Weights and bias of the hidden layers, `[num_loops - 1, gate_hidden, hidden + 1]`, the bias last; `None` for
    /// linear gates.
    pub hidden: Option<Tensor>,
    /// Weights and bias of the score, `[num_loops - 1, inputs + 1]`, the bias last.
    pub score: Tensor,
}

/// The tensors of input injection.
pub(crate) struct InjectionParameters<'w> {
    /// `[hidden, 2 hidden]`
    pub adapter: &'w Tensor,
    /// States before the first loop, `[states, hidden]`, by position modulo their number.
    pub initial_states: Tensor,
}

impl<'w> InjectionParameters<'w> {
    fn new(weights: &'w Weights) -> Result<Option<Self>, WeightsError> {
        let Some(injection) = weights.config().injection else { return Ok(None) };
        let adapter = weights.get(ADAPTER)?;
        let initial_states = initial_states(weights.config(), injection).map_err(in_tensor("initial states"))?;
        Ok(Some(Self { adapter, initial_states }))
    }
}

/// States before the first loop, `[states, hidden]`, by position modulo their number.
pub(crate) fn initial_states(config: &ModelConfig, injection: Injection) -> candle_core::Result<Tensor> {
    /// Deviations beyond which numbers are left out.
    const MOST_DEVIATIONS: f32 = 3.0;
    let width = config.hidden_size;
    let InitialState::Normal { deviation, seed } = injection.initial_state else {
        return Tensor::zeros((1, width), DType::F32, &Device::Cpu);
    };
    let states = config.max_positions.min(INITIAL_STATES);
    let normal = Normal::new(0.0, deviation).map_err(candle_core::Error::wrap)?;
    let numbers = normal.sample_iter(StdRng::seed_from_u64(seed));
    let within = numbers.filter(|number: &f32| number.abs() <= MOST_DEVIATIONS * deviation);
    Tensor::from_iter(within.take(states * width), &Device::Cpu)?.reshape((states, width))
}

/// The layers that each loop runs.
#[derive(Debug)]
pub(crate) enum Loops<L> {
    /// Layers that all depths share.
    Shared(Vec<L>),
    /// Separate layers at each depth.
    Own(Vec<Vec<L>>),
}

impl<L> Loops<L> {
    /// Converts each layer.
    pub fn try_map<M, E>(self, mut layer: impl FnMut(L) -> Result<M, E>) -> Result<Loops<M>, E> {
        let mut layers = |of_loop: Vec<L>| of_loop.into_iter().map(&mut layer).collect::<Result<Vec<_>, E>>();
        Ok(match self {
            Self::Shared(of_loop) => Loops::Shared(layers(of_loop)?),
            Self::Own(loops) => Loops::Own(loops.into_iter().map(layers).collect::<Result<_, E>>()?),
        })
    }
}

/// The tensors of a layer. Norms are `[sets, numbers]`, with one set for all depths, or one for each. A set has the
/// weights, then the biases if the norm has any.
pub(crate) struct LayerParameters<'w> {
    pub input_norm: Tensor,
    pub qkv: Projections<'w>,
    /// In a set, the queries' norm comes before the keys'.
    pub head_norm: Option<Tensor>,
    pub o: Projections<'w>,
    pub attention_post_norm: Option<Tensor>,
    pub mlp_norm: Tensor,
    pub gate_up: Projections<'w>,
    pub down: Projections<'w>,
    pub mlp_post_norm: Option<Tensor>,
    pub heads: Heads,
}

/// Concatenated projections of one input.
pub(crate) struct Projections<'w> {
    /// Name in errors.
    pub name: String,
    /// `[outputs, inputs]` of each.
    pub weights: Vec<&'w Tensor>,
    /// `[sets, outputs of all]`.
    pub biases: Option<Tensor>,
    /// By depth; empty without adapters.
    pub adapters: Vec<Adapter<'w>>,
}

/// Loads the tensors of a layer, from its places: one for all depths, or one for each.
struct Loader<'w, 'r> {
    weights: &'w Weights,
    /// The frequencies of each rotary table.
    rotaries: &'r [Vec<f32>],
    places: Vec<Place>,
}

impl<'w> Loader<'w, '_> {
    fn config(&self) -> &'w ModelConfig {
        self.weights.config()
    }

    fn layer(&self, kept: Kept) -> Result<LayerParameters<'w>, WeightsError> {
        use ProjectionKind::{Down, Gate, K, O, Q, Up, V};
        let architecture = &self.config().architecture;
        let mlp_norm = if architecture.post_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let post_norm = |name| architecture.post_norms.then(|| self.norm(&[name])).transpose();
        let head_norm = || self.norm(&["self_attn.q_norm", "self_attn.k_norm"]);
        Ok(LayerParameters {
            input_norm: self.norm(&["input_layernorm"])?,
            qkv: self.projections(&[Q, K, V])?,
            head_norm: architecture.qk_norm.then(head_norm).transpose()?,
            o: self.projections(&[O])?,
            attention_post_norm: post_norm("post_attention_layernorm")?,
            mlp_norm: self.norm(&[mlp_norm])?,
            gate_up: self.projections(if architecture.gated_mlp { &[Gate, Up] } else { &[Up] })?,
            down: self.projections(&[Down])?,
            mlp_post_norm: post_norm("post_feedforward_layernorm")?,
            heads: self.heads(kept),
        })
    }

    fn heads(&self, kept: Kept) -> Heads {
        let &ModelConfig { num_heads, num_kv_heads, head_dim, ref architecture, .. } = self.config();
        let mut sights: Vec<Sight> = self.places.iter().map(|&place| self.sight(place)).collect();
        if sights.iter().all(|sight| *sight == sights[0]) {
            sights.truncate(1);
        }
        Heads {
            heads: num_heads,
            kv_heads: num_kv_heads,
            head_dim,
            scale: architecture.attention_scale(head_dim),
            sights,
            kept,
        }
    }

    /// Prefixes of the names of norms and biases: one for all places, or one for each.
    fn vector_prefixes(&self) -> Vec<String> {
        let mut prefixes: Vec<String> = self.places.iter().map(|&place| self.config().vectors_prefix(place)).collect();
        prefixes.dedup();
        prefixes
    }

    /// The named vectors concatenated, `[sets, numbers]`: one set for all depths, or one for each.
    fn vectors(&self, names: &[String]) -> Result<Tensor, WeightsError> {
        let set = |prefix: String| -> Result<Tensor, WeightsError> {
            let parts = names.iter().map(|name| self.weights.get(&format!("{prefix}.{name}")));
            let parts = parts.collect::<Result<Vec<_>, _>>()?;
            Tensor::cat(&parts, 0).map_err(in_tensor(&names[0]))
        };
        let sets = self.vector_prefixes().into_iter().map(set).collect::<Result<Vec<_>, _>>()?;
        Tensor::stack(&sets, 0).map_err(in_tensor(&names[0]))
    }

    /// The vectors of norms, concatenated.
    fn norm(&self, names: &[&str]) -> Result<Tensor, WeightsError> {
        let tensors: Vec<String> = names.iter().flat_map(|name| norm_tensors(self.config(), name)).collect();
        self.vectors(&tensors)
    }

    /// The projections of these kinds as one, in order.
    fn projections(&self, kinds: &[ProjectionKind]) -> Result<Projections<'w>, WeightsError> {
        let parts: Vec<config::Projection> = kinds.iter().map(|&kind| self.config().projection(kind)).collect();
        let matrices = self.config().matrices_prefix(self.places[0]);
        let weights = parts.iter().map(|part| self.weights.get(&format!("{matrices}.{}.weight", part.name)));
        let biased = parts.iter().filter(|part| part.bias);
        let biases: Vec<String> = biased.map(|part| format!("{}.bias", part.name)).collect();
        let adapters = self.places.iter().map(|&place| self.adapter(place, &parts));
        Ok(Projections {
            weights: weights.collect::<Result<_, _>>()?,
            biases: if biases.is_empty() { None } else { Some(self.vectors(&biases)?) },
            adapters: adapters.filter_map(Result::transpose).collect::<Result<_, _>>()?,
            name: matrices,
        })
    }

    /// Positions that rows attend to at a place.
    fn sight(&self, place: Place) -> Sight {
        let frequencies = self.config().rotary_frequencies(place);
        let rotary = self.rotaries.iter().position(|rotary| *rotary == frequencies);
        Sight { window: self.config().window(place), rotary: rotary.expect("there is a table for every layer") }
    }

    /// The low-rank difference of projections at a place; `None` without any.
    fn adapter(&self, place: Place, parts: &[config::Projection]) -> Result<Option<Adapter<'w>>, WeightsError> {
        let (Some(lora), Place::Block { depth, layer }) = (&self.config().lora, place) else { return Ok(None) };
        let part = |part: &config::Projection| {
            let prefix = ModelConfig::lora_prefix(depth, layer, part);
            let matrix = |side| self.weights.get(&format!("{prefix}.{side}"));
            let adapted = if lora.ranks.of(part.kind) > 0 { Some((matrix("a")?, matrix("b")?)) } else { None };
            Ok::<_, WeightsError>((part.outputs, adapted))
        };
        let parts = parts.iter().map(part).collect::<Result<Vec<_>, _>>()?;
        let is_adapted = parts.iter().any(|(_, adapted)| adapted.is_some());
        Ok(is_adapted.then_some(Adapter { parts, scale: lora.scale }))
    }
}

/// Name of the head's tensor.
pub(crate) fn head_name(config: &ModelConfig) -> &'static str {
    if config.tie_embeddings { "embed_tokens.weight" } else { "lm_head.weight" }
}

/// Names of the tensors of a norm, in the order of a set.
fn norm_tensors(config: &ModelConfig, name: &str) -> Vec<String> {
    let mut names = vec![format!("{name}.weight")];
    if config.architecture.norm == config::Norm::Layer {
        names.push(format!("{name}.bias"));
    }
    names
}

/// Adds the name of the tensor to an error.
pub(crate) fn in_tensor(name: &str) -> impl Fn(candle_core::Error) -> WeightsError {
    let name = name.to_owned();
    move |source| WeightsError::Tensor { name: name.clone(), source }
}

fn head_adapters(weights: &Weights) -> Result<Vec<(&Tensor, &Tensor)>, WeightsError> {
    let &ModelConfig { head_lora_rank, num_loops, .. } = weights.config();
    let depths = if head_lora_rank == 0 { 0..0 } else { 0..num_loops - 1 };
    let side = |depth, side| weights.get(&format!("head_lora.{depth}.{side}"));
    depths.map(|depth| Ok((side(depth, "a")?, side(depth, "b")?))).collect()
}

fn gates(weights: &Weights) -> Result<Option<GateParameters>, WeightsError> {
    let &ModelConfig { gate, shared_gate, gate_hidden, num_loops, .. } = weights.config();
    if !gate || num_loops == 1 {
        return Ok(None);
    }
    let by_depth = |part: &dyn Fn(usize) -> Result<Tensor, WeightsError>| {
        let parts = (0..num_loops - 1).map(part).collect::<Result<Vec<_>, _>>()?;
        Tensor::stack(&parts, 0).map_err(in_tensor("gate"))
    };
    let of = |depth, part| match shared_gate {
        true => weights.get(&format!("gate.{part}")),
        false => weights.get(&format!("gate.{depth}.{part}")),
    };
    let hidden = |depth| {
        let bias = of(depth, "hidden.bias")?.unsqueeze(1).map_err(in_tensor("gate"))?;
        Tensor::cat(&[of(depth, "hidden.weight")?, &bias], 1).map_err(in_tensor("gate"))
    };
    let score = |depth| Tensor::cat(&[of(depth, "weight")?, of(depth, "bias")?], 0).map_err(in_tensor("gate"));
    let hidden = if gate_hidden > 0 { Some(by_depth(&hidden)?) } else { None };
    Ok(Some(GateParameters { hidden, score: by_depth(&score)? }))
}
