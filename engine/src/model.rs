//! The model for serving: the recursive transformer of [`crate::reference`], over rows of different sequences,
//! positions and depths, with keys and values in a paged cache.

use std::ops::Range;

use candle_core::{DType, Device, Tensor, bail};

use crate::cache::KvCache;
use crate::config::{Activation, ModelConfig};
use crate::kernels::DepthRanges;
use crate::kernels::activation::activate;
use crate::kernels::adapters::Adapters;
use crate::kernels::attention::{Heads, Row, attend, keep};
use crate::kernels::linear::{Linear, WeightType};
use crate::kernels::norm::{HeadNorm, Norm};
use crate::kernels::rows::{Source, add_bias, gather, probe_rows, scale, scatter, silu_rows};
use crate::kernels::signals::{Reader, Verdict};
use crate::parameters::{
    GateParameters, InjectionParameters, LayerParameters, Loops, ModelParameters, Projections, head_name, in_tensor,
};
use crate::weights::{ADAPTER, Weights, WeightsError};

/// Tokens per part of the vocabulary, so that the head's logits of a batch fit in the caches.
const HEAD_PART: usize = 1 << 13;

/// The rows of a pass, sorted by depth, and the range of each depth.
#[derive(Clone, Debug, Default)]
pub struct Rows<'a> {
    /// Rows, sorted by depth.
    rows: Vec<Row<'a>>,
    /// Each depth that occurs, with its range of rows.
    depths: Vec<(usize, Range<usize>)>,
}

impl<'a> Rows<'a> {
    /// Appends a row.
    ///
    /// # Panics
    /// If the previous row is deeper: rows are sorted by depth.
    pub fn push(&mut self, row: Row<'a>) {
        let (index, depth) = (self.rows.len(), row.depth);
        match self.depths.last_mut() {
            Some((last, rows)) if *last == depth => rows.end = index + 1,
            last => {
                assert!(last.is_none_or(|(last, _)| *last < depth), "rows of a pass come by depth");
                self.depths.push((depth, index..index + 1));
            }
        }
        self.rows.push(row);
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Range of the rows at `depths`.
    pub fn range(&self, depths: Range<usize>) -> Range<usize> {
        let first = |depth| self.rows.partition_point(|row| row.depth < depth);
        first(depths.start)..first(depths.end)
    }

    /// A range of the rows.
    pub fn part(&self, range: Range<usize>) -> Self {
        self.pick(range)
    }

    /// The rows at these indices, which are sorted by depth.
    pub fn pick(&self, places: impl IntoIterator<Item = usize>) -> Self {
        let mut picked = Self::default();
        places.into_iter().for_each(|place| picked.push(self.rows[place].clone()));
        picked
    }

    /// All rows.
    pub fn rows(&self) -> &[Row<'a>] {
        &self.rows
    }
}

/// A norm of the residual stream.
fn new_norm(config: &ModelConfig, vectors: Tensor) -> Norm {
    Norm::new(vectors, config.architecture.norm, config.architecture.norm_eps, config.hidden_size)
}

/// Concatenated projections of one input, with biases and a low-rank difference by depth if the model has them.
#[derive(Debug)]
struct Projection {
    weight: Linear,
    /// `[sets, outputs]`, one set for all depths, or one for each.
    biases: Option<Tensor>,
    adapters: Option<Adapters>,
}

impl Projection {
    fn new(parameters: Projections<'_>, weight_type: WeightType) -> Result<Self, WeightsError> {
        let Projections { name, weights, biases, adapters } = parameters;
        Ok(Self {
            weight: Linear::stacked(&weights, weight_type).map_err(in_tensor(&name))?,
            biases,
            adapters: Adapters::new(&adapters).map_err(in_tensor("lora"))?,
        })
    }

    fn forward(&self, x: &Tensor, depths: &DepthRanges) -> candle_core::Result<Tensor> {
        let y = self.weight.forward(x)?;
        self.add_differences(&y, x, depths)?;
        Ok(y)
    }

    /// Adds the projection of `x` to `y`. If there is a norm, either the projection or the sum is normed.
    fn add_to(&self, y: &Tensor, x: &Tensor, norm: Option<&PostNorm>, depths: &DepthRanges) -> candle_core::Result<()> {
        if let Some(PostNorm { norm, after_addition: false }) = norm {
            return norm.add_to(y, &self.forward(x, depths)?, depths);
        }
        self.weight.add_to(y, x)?;
        self.add_differences(y, x, depths)?;
        norm.map_or(Ok(()), |sum| sum.norm.apply(y, depths))
    }

    fn add_differences(&self, y: &Tensor, x: &Tensor, depths: &DepthRanges) -> candle_core::Result<()> {
        if let Some(biases) = &self.biases {
            add_bias(y, biases, depths)?;
        }
        match &self.adapters {
            Some(adapters) => adapters.add_to(y, x, depths),
            None => Ok(()),
        }
    }
}

/// The norm that follows attention or MLP.
#[derive(Debug)]
struct PostNorm {
    norm: Norm,
    /// Whether it norms the sum with the residual, or what is added.
    after_addition: bool,
}

/// Grouped-query attention with rotary embedding.
#[derive(Debug)]
struct Attention {
    qkv_proj: Projection,
    head_norm: Option<HeadNorm>,
    o_proj: Projection,
    post_norm: Option<PostNorm>,
    heads: Heads,
}

impl Attention {
    fn queries_keys_values(&self, x: &Tensor, depths: &DepthRanges) -> candle_core::Result<Tensor> {
        let qkv = self.qkv_proj.forward(x, depths)?;
        if let Some(norm) = &self.head_norm {
            norm.apply(&qkv, depths)?;
        }
        Ok(qkv)
    }

    /// Adds the attention of `x` to `residual`.
    fn add_to(
        &self,
        residual: &Tensor,
        x: &Tensor,
        rotary: &Tensor,
        cache: &KvCache,
        rows: &Rows<'_>,
    ) -> candle_core::Result<()> {
        let qkv = self.queries_keys_values(x, &rows.depths)?;
        let mixed = attend(&qkv, rotary, cache, &self.heads, &rows.rows)?;
        self.o_proj.add_to(residual, &mixed, self.post_norm.as_ref(), &rows.depths)
    }
}

/// `down(activation(gate(x)) * up(x))` (arXiv 2002.05202), or without a gate `down(activation(up(x)))`.
#[derive(Debug)]
struct Mlp {
    gate_up_proj: Projection,
    activation: Activation,
    gated: bool,
    down_proj: Projection,
    post_norm: Option<PostNorm>,
}

impl Mlp {
    /// Adds the MLP of `x` to `residual`.
    fn add_to(&self, residual: &Tensor, x: &Tensor, depths: &DepthRanges) -> candle_core::Result<()> {
        let inner = activate(&self.gate_up_proj.forward(x, depths)?, self.activation, self.gated)?;
        self.down_proj.add_to(residual, &inner, self.post_norm.as_ref(), depths)
    }
}

/// A layer: attention and MLP, each after a norm and added to the residual stream.
#[derive(Debug)]
struct Layer {
    input_norm: Norm,
    attention: Attention,
    mlp_norm: Norm,
    mlp: Mlp,
    parallel: bool,
}

impl Layer {
    fn new(
        config: &ModelConfig,
        parameters: LayerParameters<'_>,
        weight_type: WeightType,
    ) -> Result<Self, WeightsError> {
        let architecture = &config.architecture;
        let norm = |vectors| new_norm(config, vectors);
        let head_norm = |vectors| {
            let &ModelConfig { num_heads, num_kv_heads, head_dim, .. } = config;
            HeadNorm::new(vectors, architecture.norm, architecture.norm_eps, head_dim, num_heads, num_kv_heads)
        };
        let projection = |parameters| Projection::new(parameters, weight_type);
        let after_addition = architecture.norm_after_addition;
        let post_norm = |vectors| PostNorm { norm: norm(vectors), after_addition };
        Ok(Self {
            input_norm: norm(parameters.input_norm),
            attention: Attention {
                qkv_proj: projection(parameters.qkv)?,
                head_norm: parameters.head_norm.map(head_norm),
                o_proj: projection(parameters.o)?,
                post_norm: parameters.attention_post_norm.map(post_norm),
                heads: parameters.heads,
            },
            mlp_norm: norm(parameters.mlp_norm),
            mlp: Mlp {
                gate_up_proj: projection(parameters.gate_up)?,
                activation: architecture.activation,
                gated: architecture.gated_mlp,
                down_proj: projection(parameters.down)?,
                post_norm: parameters.mlp_post_norm.map(post_norm),
            },
            parallel: architecture.parallel_residual,
        })
    }

    /// Runs the rows of the residual stream through the layer, in place.
    fn forward(&self, hidden: &Tensor, rotary: &Tensor, cache: &KvCache, rows: &Rows<'_>) -> candle_core::Result<()> {
        let normed = self.input_norm.forward(hidden, &rows.depths)?;
        if self.parallel {
            let mlp_normed = self.mlp_norm.forward(hidden, &rows.depths)?;
            self.attention.add_to(hidden, &normed, rotary, cache, rows)?;
            self.mlp.add_to(hidden, &mlp_normed, &rows.depths)
        } else {
            self.attention.add_to(hidden, &normed, rotary, cache, rows)?;
            self.mlp.add_to(hidden, &self.mlp_norm.forward(hidden, &rows.depths)?, &rows.depths)
        }
    }

    /// Stores the keys and values as [`forward`](Self::forward), and nothing more.
    fn keep(&self, hidden: &Tensor, rotary: &Tensor, cache: &KvCache, rows: &Rows<'_>) -> candle_core::Result<()> {
        let normed = self.input_norm.forward(hidden, &rows.depths)?;
        let qkv = self.attention.queries_keys_values(&normed, &rows.depths)?;
        keep(&qkv, rotary, cache, &self.attention.heads, &rows.rows)
    }
}

/// Input injection.
#[derive(Debug)]
struct Adapter {
    /// From `[rows, 2 hidden]` to `[rows, hidden]`.
    weight: Linear,
    /// `[states, hidden]`
    initial_states: Tensor,
}

impl Adapter {
    fn new(parameters: InjectionParameters<'_>, weight_type: WeightType) -> Result<Self, WeightsError> {
        let weight = Linear::new(parameters.adapter, weight_type).map_err(in_tensor(ADAPTER))?;
        Ok(Self { weight, initial_states: parameters.initial_states })
    }
}

/// Rows that enter a loop.
#[derive(Debug)]
pub struct Entering {
    /// What the block reads, `[rows, hidden]`.
    pub hidden: Tensor,
    /// With input injection: the residual streams after the prelude, `[rows, hidden]`, which later loops read again.
    pub injected: Option<Tensor>,
}

/// States of rows between two loops.
#[derive(Clone, Debug)]
pub struct InFlight {
    /// Outputs of the loop before, `[capacity, hidden]`.
    pub states: Tensor,
    /// [`Entering::injected`] of the rows.
    pub injected: Option<Tensor>,
    /// Results of [`Model::forward_coda`] for the rows, where they are kept.
    pub exits: Option<Tensor>,
}

impl InFlight {
    /// Room for one row.
    ///
    /// # Errors
    /// If memory cannot be allocated.
    pub fn new(config: &ModelConfig) -> candle_core::Result<Self> {
        let states = Tensor::zeros((1, config.hidden_size), DType::F32, &Device::Cpu)?;
        let injected = config.injection.map(|_| states.copy()).transpose()?;
        Ok(Self { states, injected, exits: None })
    }

    /// Makes room for `rows` rows. Existing rows keep their contents.
    ///
    /// # Errors
    /// If memory cannot be allocated.
    pub fn reserve(&mut self, rows: usize) -> candle_core::Result<()> {
        let (capacity, width) = self.states.dims2()?;
        if rows <= capacity {
            return Ok(());
        }
        let zeros = Tensor::zeros((rows - capacity, width), DType::F32, &Device::Cpu)?;
        for tensor in std::iter::once(&mut self.states).chain(&mut self.injected).chain(&mut self.exits) {
            *tensor = Tensor::cat(&[&*tensor, &zeros], 0)?;
        }
        Ok(())
    }

    /// Copies rows to their places; rows without a place are not copied.
    ///
    /// # Errors
    /// If a place does not exist.
    pub fn keep(&self, entering: &Entering, places: &[Option<u32>]) -> candle_core::Result<()> {
        scatter(&self.states, &entering.hidden, places)?;
        match (&self.injected, &entering.injected) {
            (Some(kept), Some(injected)) => scatter(kept, injected, places),
            _ => Ok(()),
        }
    }

    /// Copies results of [`Model::forward_coda`] to their places, if they are kept.
    ///
    /// # Errors
    /// If a place does not exist.
    pub fn keep_exits(&self, exits: &Tensor, places: &[Option<u32>]) -> candle_core::Result<()> {
        self.exits.as_ref().map_or(Ok(()), |kept| scatter(kept, exits, places))
    }
}

impl From<Entering> for InFlight {
    /// The rows after the block, each in the place of its index.
    fn from(Entering { hidden, injected }: Entering) -> Self {
        Self { states: hidden, injected, exits: None }
    }
}

/// The whole model.
#[derive(Debug)]
pub struct Model {
    /// `[vocab, hidden]`
    embed_tokens: Tensor,
    prelude: Vec<Layer>,
    loops: Loops<Layer>,
    coda: Vec<Layer>,
    norm: Norm,
    adapter: Option<Adapter>,
    /// By parts of the vocabulary, so that not all logits are in memory at once.
    lm_head: Vec<Linear>,
    /// Low-rank difference that each depth but the last adds to the head; empty without any.
    head_adapters: Vec<HeadAdapter>,
    gates: Option<GateParameters>,
    /// [`rotary::tables`]
    rotary: Tensor,
    config: ModelConfig,
    weight_type: WeightType,
    fingerprint: String,
    weight_bytes: u64,
}

impl Model {
    /// Builds the model from weights. Projections and head are packed in a number type; embedding, norms, biases,
    /// adapters and gates stay `f32`.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn load(weights: &Weights, weight_type: WeightType) -> Result<Self, WeightsError> {
        let config = weights.config().clone();
        let parameters = ModelParameters::new(weights)?;
        let layer = |of_layer| Layer::new(&config, of_layer, weight_type);
        let head_part =
            |part: &Tensor, weight_type| head_parts(part, weight_type).map_err(in_tensor(head_name(&config)));
        let head_adapter = |(down, up): (&Tensor, &Tensor)| {
            let down = Linear::new(down, WeightType::F32).map_err(in_tensor("head_lora"))?;
            Ok(HeadAdapter { down, ups: head_part(up, WeightType::F32)? })
        };
        Ok(Self {
            embed_tokens: parameters.embedding.clone(),
            prelude: parameters.prelude.into_iter().map(layer).collect::<Result<_, _>>()?,
            loops: parameters.loops.try_map(layer)?,
            coda: parameters.coda.into_iter().map(layer).collect::<Result<_, _>>()?,
            norm: new_norm(&config, parameters.norm),
            adapter: parameters.injection.map(|injection| Adapter::new(injection, weight_type)).transpose()?,
            lm_head: head_part(parameters.head, weight_type)?,
            head_adapters: parameters
                .head_adapters
                .into_iter()
                .map(head_adapter)
                .collect::<Result<_, WeightsError>>()?,
            gates: parameters.gates,
            rotary: parameters.rotary,
            weight_type,
            fingerprint: fingerprint(weights, weight_type)?,
            weight_bytes: weight_bytes(weights, weight_type),
            config,
        })
    }

    /// Number type of projections and head.
    pub fn weight_type(&self) -> WeightType {
        self.weight_type
    }

    /// Rows that enter a loop: rows in flight (`Second`), and tokens at depth 0 (`First`), which are embedded and run the
    /// prelude. Row `i` comes from source `i`.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, a row in flight does not exist, or a position is beyond `max_positions` or
    /// its blocks.
    pub fn embed(
        &self,
        in_flight: &InFlight,
        sources: &[Source],
        rows: &Rows<'_>,
        cache: &KvCache,
    ) -> candle_core::Result<Entering> {
        let entered = |in_flight: &Tensor| {
            let hidden = gather(&self.embed_tokens, in_flight, sources)?;
            self.run_prelude(&hidden, rows, cache)?;
            Ok::<_, candle_core::Error>(hidden)
        };
        let (Some(adapter), Some(injected)) = (&self.adapter, &in_flight.injected) else {
            let hidden = entered(&in_flight.states)?;
            let later = rows.range(1..self.config.num_loops);
            if self.config.norm_between_loops && !later.is_empty() {
                let normed = hidden.narrow(0, later.start, later.len())?;
                self.norm.apply(&normed, &rows.part(later).depths)?;
            }
            return Ok(Entering { hidden, injected: None });
        };
        let injected = entered(injected)?;
        let initial = adapter.initial_states.dim(0)?;
        let states: Vec<Source> = sources
            .iter()
            .zip(rows.rows())
            .map(|(&source, row)| match source {
                Source::First(_) => Source::First((row.position % initial) as u32),
                in_flight => in_flight,
            })
            .collect();
        let states = gather(&adapter.initial_states, &in_flight.states, &states)?;
        let hidden = adapter.weight.forward(&Tensor::cat(&[&states, &injected], 1)?)?;
        Ok(Entering { hidden, injected: Some(injected) })
    }

    /// Scales the embeddings of the rows at depth 0, the first of `hidden`, and runs them through the prelude.
    fn run_prelude(&self, hidden: &Tensor, rows: &Rows<'_>, cache: &KvCache) -> candle_core::Result<()> {
        let embedded = rows.range(0..1);
        let factor = self.config.architecture.embedding_scale;
        if embedded.is_empty() || (factor == 1.0 && self.prelude.is_empty()) {
            return Ok(());
        }
        let (entering, rows) = (hidden.narrow(0, 0, embedded.len())?, rows.part(embedded));
        scale(&entering, factor)?;
        self.prelude.iter().try_for_each(|layer| layer.forward(&entering, &self.rotary, cache, &rows))
    }

    /// Runs `hidden` `[rows, hidden]` once through the block, in place, each row at its own depth.
    ///
    /// # Errors
    /// If a row's position is beyond `max_positions` or its blocks.
    pub fn forward_block(&self, hidden: &Tensor, rows: &Rows<'_>, cache: &KvCache) -> candle_core::Result<()> {
        let run = |layers: &[Layer], hidden: &Tensor, rows: &Rows<'_>| {
            layers.iter().try_for_each(|layer| layer.forward(hidden, &self.rotary, cache, rows))
        };
        match &self.loops {
            Loops::Shared(layers) => run(layers, hidden, rows),
            Loops::Own(loops) => rows.depths.iter().try_for_each(|(depth, range)| {
                run(&loops[*depth], &hidden.narrow(0, range.start, range.len())?, &rows.part(range.clone()))
            }),
        }
    }

    /// Runs rows after the block, `hidden` `[rows, hidden]`, through the coda as far as later rows need it: to the last
    /// layer's keys and values. The result has the same shape and is the input of [`logits`](Self::logits). Without a
    /// coda it is `hidden`.
    ///
    /// Rows attend to keys and values of their own depth, as in the block. The logits of a row at a depth therefore do
    /// not depend on the exit depths of earlier rows.
    ///
    /// # Errors
    /// As for [`forward_block`](Self::forward_block).
    pub fn forward_coda(&self, hidden: &Tensor, rows: &Rows<'_>, cache: &KvCache) -> candle_core::Result<Tensor> {
        let Some((last, before)) = self.coda.split_last() else { return Ok(hidden.clone()) };
        let hidden = hidden.copy()?;
        if self.config.norm_before_coda {
            self.norm.apply(&hidden, &rows.depths)?;
        }
        before.iter().try_for_each(|layer| layer.forward(&hidden, &self.rotary, cache, rows))?;
        last.keep(&hidden, &self.rotary, cache, rows)?;
        Ok(hidden)
    }

    /// The exit head's logits `[rows, vocab]` of some rows after [`forward_coda`](Self::forward_coda), `hidden` `[rows,
    /// hidden]`.
    ///
    /// # Errors
    /// If `hidden` has another shape.
    pub fn logits(&self, hidden: &Tensor, rows: &Rows<'_>, cache: &KvCache) -> candle_core::Result<Tensor> {
        let mut parts = Vec::new();
        self.each_logits(hidden, rows, cache, |logits| {
            parts.push(logits);
            Ok(())
        })?;
        Tensor::cat(&parts, 1)
    }

    /// Exit signals and sampled tokens of such rows, as [`Reader`], with a random key for each row; the logits are not
    /// kept.
    ///
    /// # Errors
    /// As for [`logits`](Self::logits).
    pub fn verdicts(
        &self,
        hidden: &Tensor,
        rows: &Rows<'_>,
        cache: &KvCache,
        temperature: f32,
        keys: &[u64],
    ) -> candle_core::Result<Vec<Verdict>> {
        let mut reader = Reader::new(temperature, keys);
        self.each_logits(hidden, rows, cache, |logits| reader.read(&logits))?;
        Ok(reader.verdicts())
    }

    /// The same with the logits, `[rows, vocab]`.
    ///
    /// # Errors
    /// As for [`logits`](Self::logits).
    pub fn verdicts_with_logits(
        &self,
        hidden: &Tensor,
        rows: &Rows<'_>,
        cache: &KvCache,
        temperature: f32,
        keys: &[u64],
    ) -> candle_core::Result<(Vec<Verdict>, Tensor)> {
        let (mut reader, mut parts) = (Reader::new(temperature, keys), Vec::new());
        self.each_logits(hidden, rows, cache, |logits| {
            reader.read(&logits)?;
            parts.push(logits);
            Ok(())
        })?;
        Ok((reader.verdicts(), Tensor::cat(&parts, 1)?))
    }

    /// Passes on the logits of each part of the vocabulary.
    fn each_logits(
        &self,
        hidden: &Tensor,
        rows: &Rows<'_>,
        cache: &KvCache,
        mut each: impl FnMut(Tensor) -> candle_core::Result<()>,
    ) -> candle_core::Result<()> {
        let finished = match self.coda.last() {
            None => hidden.clone(),
            Some(last) => {
                let hidden = hidden.copy()?;
                last.forward(&hidden, &self.rotary, cache, rows)?;
                hidden
            }
        };
        let normed = self.norm.forward(&finished, &rows.depths)?;
        let mut lowered = Vec::new();
        for (depth, range) in &rows.depths {
            if let Some(HeadAdapter { down, ups }) = self.head_adapters.get(*depth) {
                lowered.push((down.forward(&normed.narrow(0, range.start, range.len())?)?, ups, range));
            }
        }
        for (part, weight) in self.lm_head.iter().enumerate() {
            let logits = weight.forward(&normed)?;
            for (lowered, ups, range) in &lowered {
                ups[part].add_to(&logits.narrow(0, range.start, range.len())?, lowered)?;
            }
            each(logits)?;
        }
        Ok(())
    }

    /// Gate scores `[rows]`, 0 to 1, of rows after the block, `hidden` `[rows, hidden]`, at depths above the last.
    ///
    /// # Errors
    /// If the model has no gates, `hidden` has another shape, or a row is at the last depth.
    pub fn gate_scores(&self, hidden: &Tensor, rows: &Rows<'_>) -> candle_core::Result<Tensor> {
        let Some(gates) = &self.gates else { bail!("the model has no gates") };
        let normed = self.norm.forward(hidden, &rows.depths)?;
        match &gates.hidden {
            None => probe_rows(&normed, &gates.score, &rows.depths),
            Some(layers) => probe_rows(&silu_rows(&normed, layers, &rows.depths)?, &gates.score, &rows.depths),
        }
    }

    /// Configuration of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Fingerprint of configuration and weights.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }
}

/// Fingerprint of the weights and their rounding.
fn fingerprint(weights: &Weights, weight_type: WeightType) -> Result<String, WeightsError> {
    let exact = weights.fingerprint()?;
    Ok(match weight_type {
        WeightType::F32 => exact,
        rounded => format!("{exact}-{rounded}"),
    })
}

/// Bytes of all weights, with projections and head rounded; tied tables count once, as the head.
fn weight_bytes(weights: &Weights, weight_type: WeightType) -> u64 {
    let config = weights.config();
    let rounded = |name: &str| name == head_name(config) || name == ADAPTER || name.ends_with("_proj.weight");
    let bits = |name: &str| if rounded(name) { weight_type.bits() } else { WeightType::F32.bits() };
    let bytes = weights.tensors().iter().map(|(name, tensor)| tensor.elem_count() as f64 * bits(name) / 8.0);
    bytes.sum::<f64>() as u64
}

/// Packs a head `[vocab, inputs]` part by part.
fn head_parts(weight: &Tensor, weight_type: WeightType) -> candle_core::Result<Vec<Linear>> {
    let (vocab, inputs) = weight.dims2()?;
    let part = |start| {
        let outputs = HEAD_PART.min(vocab - start);
        let numbers = weight.narrow(0, start, outputs)?.flatten_all()?.to_vec1::<f32>()?;
        Linear::new(&Tensor::from_vec(numbers, (outputs, inputs), weight.device())?, weight_type)
    };
    (0..vocab).step_by(HEAD_PART).map(part).collect()
}

/// A low-rank matrix that is added to the head.
#[derive(Debug)]
struct HeadAdapter {
    down: Linear,
    /// By parts of the vocabulary.
    ups: Vec<Linear>,
}
