//! The reference model: dense, without depth-wise batching, and differentiable. Training differentiates it, and tests
//! compare the serving model with it.
//!
//! It is a Recursive Transformer (arXiv 2410.20672, equation 1) of the Llama, Gemma or GPT-NeoX kind. A block of
//! layers, each with attention and an MLP after norms, runs `num_loops` times on the residual stream. Unshared layers
//! run before the first loop (the prelude) and after any loop (the coda). Every loop's output can exit through the
//! coda, the final norm and the head.

use std::collections::HashMap;

use candle_core::{D, Device, Tensor};
use scheduler::KvFill;

use crate::config::{self, Activation, Injection, ModelConfig, Place, ProjectionKind};
use crate::differentiable::{self, Turns};
use crate::parameters::{in_tensor, initial_states};
use crate::weights::{ADAPTER, Weights, WeightsError};

type Result<T, E = candle_core::Error> = std::result::Result<T, E>;

/// Loads weights into layers.
struct Loader<'a> {
    weights: &'a Weights,
    /// A shared matrix is transposed once, so that its gradients are summed before they are transposed back.
    transposed: HashMap<String, Tensor>,
    /// The frequencies of each rotary embedding; a model with sliding windows has two.
    rotaries: Vec<Vec<f32>>,
}

impl<'a> Loader<'a> {
    fn new(weights: &'a Weights) -> Self {
        Self { weights, transposed: HashMap::new(), rotaries: Vec::new() }
    }

    fn get(&self, name: &str) -> Result<Tensor, WeightsError> {
        self.weights.get(name).cloned()
    }

    fn transposed(&mut self, name: &str) -> Result<Tensor, WeightsError> {
        if let Some(tensor) = self.transposed.get(name) {
            return Ok(tensor.clone());
        }
        let tensor = self.weights.get(name)?.t();
        let tensor = tensor.map_err(|source| WeightsError::Tensor { name: name.to_owned(), source })?;
        self.transposed.insert(name.to_owned(), tensor.clone());
        Ok(tensor)
    }

    /// Index of a layer's rotary embedding.
    fn rotary(&mut self, place: Place) -> usize {
        let frequencies = self.weights.config().rotary_frequencies(place);
        let known = self.rotaries.iter().position(|known| *known == frequencies);
        known.unwrap_or_else(|| {
            self.rotaries.push(frequencies);
            self.rotaries.len() - 1
        })
    }

    /// A projection of a layer.
    fn linear(&mut self, place: Place, kind: ProjectionKind) -> Result<Linear, WeightsError> {
        let config = self.weights.config();
        let projection = config.projection(kind);
        let name = projection.name;
        let bias = projection.bias.then(|| self.get(&format!("{}.{name}.bias", config.vectors_prefix(place))));
        let lora = config.lora.as_ref().filter(|lora| lora.ranks.of(kind) > 0);
        let adapter = match (place, lora) {
            (Place::Block { depth, layer }, Some(lora)) => {
                let low_rank = LowRank::load(self, &ModelConfig::lora_prefix(depth, layer, &projection))?;
                Some((low_rank, f64::from(lora.scale)))
            }
            _ => None,
        };
        let weight = self.transposed(&format!("{}.{name}.weight", config.matrices_prefix(place)))?;
        Ok(Linear { weight, bias: bias.transpose()?, adapter })
    }

    /// A norm of a layer.
    fn norm(&self, place: Place, name: &str) -> Result<Norm, WeightsError> {
        Norm::load(self, &format!("{}.{name}", self.weights.config().vectors_prefix(place)))
    }
}

/// `B A x`.
struct LowRank {
    /// `[in, rank]`
    a: Tensor,
    /// `[rank, out]`
    b: Tensor,
}

impl LowRank {
    fn load(loader: &mut Loader, prefix: &str) -> Result<Self, WeightsError> {
        let a = loader.transposed(&format!("{prefix}.a"))?;
        Ok(Self { a, b: loader.transposed(&format!("{prefix}.b"))? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.matmul(&self.a)?.matmul(&self.b)
    }
}

/// A projection `W x + b + scale B A x`; bias and low-rank difference are optional.
struct Linear {
    /// `[in, out]`
    weight: Tensor,
    bias: Option<Tensor>,
    adapter: Option<(LowRank, f64)>,
}

impl Linear {
    /// `[rows, in]` to `[rows, out]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = x.matmul(&self.weight)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        match &self.adapter {
            None => Ok(y),
            Some((low_rank, scale)) => y + (low_rank.forward(x)? * *scale)?,
        }
    }
}

/// A norm over the last of two dimensions.
enum Norm {
    /// `x / rms(x) * weight` (arXiv 1910.07467).
    Rms { weight: Tensor, eps: f32 },
    /// `(x - mean(x)) / deviation(x) * weight + bias` (arXiv 1607.06450).
    Layer { weight: Tensor, bias: Tensor, eps: f32 },
}

impl Norm {
    fn load(loader: &Loader, name: &str) -> Result<Self, WeightsError> {
        let architecture = &loader.weights.config().architecture;
        let (weight, eps) = (loader.get(&format!("{name}.weight"))?, architecture.norm_eps);
        Ok(match architecture.norm {
            config::Norm::Rms => Self::Rms { weight, eps },
            config::Norm::Layer => Self::Layer { weight, bias: loader.get(&format!("{name}.bias"))?, eps },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Rms { weight, eps } => differentiable::rms_norm(x, weight, *eps),
            Self::Layer { weight, bias, eps } => differentiable::layer_norm(x, weight, bias, *eps),
        }
    }
}

/// Causal attention in which `num_heads / num_kv_heads` query heads share a key-value head
/// (arXiv 2305.13245).
struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    scale: f32,
    window: Option<usize>,
    /// Index of the rotary embedding.
    rotary: usize,
}

impl Attention {
    fn load(loader: &mut Loader, place: Place) -> Result<Self, WeightsError> {
        let config = loader.weights.config();
        let norm = |name| config.architecture.qk_norm.then(|| loader.norm(place, name)).transpose();
        let (q_norm, k_norm) = (norm("self_attn.q_norm")?, norm("self_attn.k_norm")?);
        Ok(Self {
            q_proj: loader.linear(place, ProjectionKind::Q)?,
            k_proj: loader.linear(place, ProjectionKind::K)?,
            v_proj: loader.linear(place, ProjectionKind::V)?,
            o_proj: loader.linear(place, ProjectionKind::O)?,
            q_norm,
            k_norm,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            scale: config.architecture.attention_scale(config.head_dim),
            window: config.window(place),
            rotary: loader.rotary(place),
        })
    }

    /// `[batch * seq, hidden]` to the same shape. `exits` are given if tokens may have exited.
    fn forward(&self, x: &Tensor, batch: usize, rotaries: &[Turns], exits: Option<LayerExits>) -> Result<Tensor> {
        let seq = x.dim(0)? / batch;
        let by_head = |x: Tensor, heads, norm: &Option<Norm>| {
            let x = match norm {
                None => x,
                Some(norm) => norm.forward(&x.reshape((batch * seq * heads, self.head_dim))?)?,
            };
            let x = x.reshape((batch, seq, heads, self.head_dim))?;
            x.transpose(1, 2)?.contiguous()
        };
        let turns = &rotaries[self.rotary];
        let q = by_head(self.q_proj.forward(x)?, self.num_heads, &self.q_norm)?;
        let q = differentiable::rotate(&q, turns)?;
        let own = || -> Result<Entries> {
            let k = by_head(self.k_proj.forward(x)?, self.num_kv_heads, &self.k_norm)?;
            let k = differentiable::rotate(&k, turns)?;
            Ok(Entries { k, v: by_head(self.v_proj.forward(x)?, self.num_kv_heads, &None)? })
        };
        let mixed = match exits {
            None => self.attend(&q, &own()?, Others::Same)?,
            Some(LayerExits { exits, kept }) => match (exits.kv_fill, kept.take(), &exits.reached) {
                (KvFill::First, Some(first), _) => {
                    let mixed = self.attend(&q, &first, Others::Same)?;
                    *kept = Some(first);
                    mixed
                }
                (KvFill::Reuse, Some(shallower), Some(reached)) => {
                    let own = own()?;
                    let found = own.where_reached(reached, &shallower)?;
                    let mixed = self.attend(&q, &own, Others::Find(&found))?;
                    *kept = Some(found);
                    mixed
                }
                (KvFill::Skip, _, Some(reached)) => self.attend(&q, &own()?, Others::Among(reached))?,
                _ => {
                    let own = own()?;
                    let mixed = self.attend(&q, &own, Others::Same)?;
                    *kept = Some(own);
                    mixed
                }
            },
        };
        let mixed = mixed.reshape((batch, self.num_heads, seq, self.head_dim))?;
        let mixed = mixed.transpose(1, 2)?.contiguous()?;
        let rows = mixed.reshape((batch * seq, self.num_heads * self.head_dim))?;
        self.o_proj.forward(&rows)
    }

    /// From queries `[batch, num_heads, seq, head_dim]` and the rows' own entries to `[batch, num_kv_heads, num_heads /
    /// num_kv_heads * seq, head_dim]`.
    fn attend(&self, q: &Tensor, own: &Entries, others: Others) -> Result<Tensor> {
        let (batch, _, seq, _) = q.dims4()?;
        // The query heads of a key-value head are adjacent, so their rows stack over it.
        let group = self.num_heads / self.num_kv_heads;
        let stacked = (batch, self.num_kv_heads, group * seq);
        let rows = q.reshape((batch, self.num_kv_heads, group * seq, self.head_dim))?;
        let Entries { k, v } = if let Others::Find(found) = others { found } else { own };
        let scores = rows.matmul(&k.t()?)?.reshape((batch, self.num_heads, seq, seq))?;
        let weights = match others {
            Others::Same => differentiable::causal_softmax(&scores, self.scale, self.window)?,
            Others::Among(reached) => differentiable::causal_softmax_among(&scores, reached, self.scale, self.window)?,
            Others::Find(_) => {
                let more = (&own.k - k)?.unsqueeze(2)?;
                let grouped = q.reshape((batch, self.num_kv_heads, group, seq, self.head_dim))?;
                let more = grouped.broadcast_mul(&more)?.sum(D::Minus1)?.reshape((batch, self.num_heads, seq))?;
                differentiable::causal_softmax_with_own(&scores, &more, self.scale, self.window)?
            }
        };
        let mixed = weights.reshape((stacked.0, stacked.1, stacked.2, seq))?.matmul(v)?;
        if !matches!(others, Others::Find(_)) {
            return Ok(mixed);
        }
        let more = (&own.v - v)?.unsqueeze(2)?;
        let own_weights = differentiable::diagonal(&weights)?;
        let own_weights = own_weights.reshape((batch, self.num_kv_heads, group, seq, 1))?;
        mixed + own_weights.broadcast_mul(&more)?.reshape((stacked.0, stacked.1, stacked.2, self.head_dim))?
    }
}

/// Keys and values of a layer, each `[batch, num_kv_heads, seq, head_dim]`.
struct Entries {
    k: Tensor,
    v: Tensor,
}

impl Entries {
    /// These entries for the tokens that reached the depth, `[batch, seq]`, and those of a shallower depth for others.
    fn where_reached(&self, reached: &Tensor, shallower: &Self) -> Result<Self> {
        let (batch, seq) = reached.dims2()?;
        let reached = reached.reshape((batch, 1, seq, 1))?.broadcast_as(self.k.shape())?;
        let pick = |own: &Tensor, other: &Tensor| reached.where_cond(own, other);
        Ok(Self { k: pick(&self.k, &shallower.k)?, v: pick(&self.v, &shallower.v)? })
    }
}

/// What a row finds of other tokens.
enum Others<'a> {
    /// Their entries, as they find them themselves.
    Same,
    /// Other entries.
    Find(&'a Entries),
    /// Their entries, if they reached the depth, `[batch, seq]`.
    Among(&'a Tensor),
}

/// The tokens that exited before a depth.
struct Exits {
    kv_fill: KvFill,
    /// Which tokens reached the depth, `u8` `[batch, seq]`; `None` if all did.
    reached: Option<Tensor>,
}

/// [`Exits`] for one layer.
struct LayerExits<'a> {
    exits: &'a Exits,
    /// What later depths find of the tokens that exit before them.
    kept: &'a mut Option<Entries>,
}

/// `down(activation(gate(x)) * up(x))` (arXiv 2002.05202), or `down(activation(up(x)))` without a gate.
struct Mlp {
    gate_proj: Option<Linear>,
    up_proj: Linear,
    down_proj: Linear,
    activation: Activation,
}

impl Mlp {
    fn load(loader: &mut Loader, place: Place) -> Result<Self, WeightsError> {
        let architecture = &loader.weights.config().architecture;
        let gate_proj = architecture.gated_mlp.then(|| loader.linear(place, ProjectionKind::Gate));
        Ok(Self {
            gate_proj: gate_proj.transpose()?,
            up_proj: loader.linear(place, ProjectionKind::Up)?,
            down_proj: loader.linear(place, ProjectionKind::Down)?,
            activation: architecture.activation,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let up = self.up_proj.forward(x)?;
        let inner = match (&self.gate_proj, self.activation) {
            (Some(gate_proj), activation) => differentiable::gated(&gate_proj.forward(x)?, &up, activation)?,
            (None, Activation::Silu) => up.silu()?,
            (None, Activation::Gelu) => up.gelu_erf()?,
            (None, Activation::GeluTanh) => up.gelu()?,
        };
        self.down_proj.forward(&inner)
    }
}

/// Attention or MLP after a norm, whose output is added to the residual stream. Another norm may follow, before the
/// addition (Gemma 3) or after it (Huginn).
struct Branch<T> {
    norm: Norm,
    inner: T,
    post_norm: Option<Norm>,
    norm_after_addition: bool,
}

impl<T> Branch<T> {
    /// `residual` with the branch of `x` added to it.
    fn add_to(
        &self,
        residual: &Tensor,
        x: &Tensor,
        inner: impl FnOnce(&T, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let y = inner(&self.inner, &self.norm.forward(x)?)?;
        match &self.post_norm {
            None => residual + y,
            Some(norm) if self.norm_after_addition => norm.forward(&(residual + y)?),
            Some(norm) => residual + norm.forward(&y)?,
        }
    }
}

/// A layer: attention and MLP, one after the other or, in GPT-NeoX, in parallel.
struct Layer {
    attention: Branch<Attention>,
    mlp: Branch<Mlp>,
    parallel: bool,
}

impl Layer {
    fn load(loader: &mut Loader, place: Place) -> Result<Self, WeightsError> {
        let architecture = &loader.weights.config().architecture;
        // Gemma 3's names: with post norms, the norm before the MLP is not the one after the attention.
        let (attention_post, mlp_norm, mlp_post) = match architecture.post_norms {
            false => (None, "post_attention_layernorm", None),
            true => {
                let post = |name| loader.norm(place, name);
                let mlp_post = post("post_feedforward_layernorm")?;
                (Some(post("post_attention_layernorm")?), "pre_feedforward_layernorm", Some(mlp_post))
            }
        };
        let (norm, inner) = (loader.norm(place, "input_layernorm")?, Attention::load(loader, place)?);
        let norm_after_addition = architecture.norm_after_addition;
        let attention = Branch { norm, inner, post_norm: attention_post, norm_after_addition };
        let (norm, inner) = (loader.norm(place, mlp_norm)?, Mlp::load(loader, place)?);
        let mlp = Branch { norm, inner, post_norm: mlp_post, norm_after_addition };
        Ok(Self { attention, mlp, parallel: architecture.parallel_residual })
    }

    fn forward(&self, x: &Tensor, batch: usize, rotaries: &[Turns], exits: Option<LayerExits>) -> Result<Tensor> {
        let after = self.attention.add_to(x, x, |attention, x| attention.forward(x, batch, rotaries, exits))?;
        let mlp_input = if self.parallel { x } else { &after };
        self.mlp.add_to(&after, mlp_input, Mlp::forward)
    }
}

/// A loop's learned gate on the normed hidden state: a linear probe, after a hidden layer if there is one.
struct Gate {
    /// `[hidden, gate_hidden]`, and the bias.
    hidden: Option<(Tensor, Tensor)>,
    /// `[inputs, 1]`
    weight: Tensor,
    bias: Tensor,
}

impl Gate {
    fn load(loader: &mut Loader, depth: usize) -> Result<Self, WeightsError> {
        let hidden = match loader.weights.config().gate_hidden {
            0 => None,
            _ => Some((
                loader.transposed(&format!("gate.{depth}.hidden.weight"))?,
                loader.get(&format!("gate.{depth}.hidden.bias"))?,
            )),
        };
        let prefix = match loader.weights.config().shared_gate {
            true => "gate".to_owned(),
            false => format!("gate.{depth}"),
        };
        let name = format!("{prefix}.weight");
        let weight = loader.get(&name)?.unsqueeze(1);
        let weight = weight.map_err(|source| WeightsError::Tensor { name, source })?;
        Ok(Self { hidden, weight, bias: loader.get(&format!("{prefix}.bias"))? })
    }

    /// Logits `[rows]` of rows `[rows, hidden]`.
    fn forward(&self, normed: &Tensor) -> Result<Tensor> {
        let inner = match &self.hidden {
            None => normed.clone(),
            Some((weight, bias)) => normed.matmul(weight)?.broadcast_add(bias)?.silu()?,
        };
        inner.matmul(&self.weight)?.squeeze(1)?.broadcast_add(&self.bias)
    }
}

/// Input injection.
struct Adapter {
    /// `[2 hidden, hidden]`
    weight: Tensor,
    /// `[states, hidden]`
    initial_states: Tensor,
}

impl Adapter {
    fn load(loader: &mut Loader, injection: Injection) -> Result<Self, WeightsError> {
        let states = initial_states(loader.weights.config(), injection);
        let weight = loader.transposed(ADAPTER)?;
        let states = states.and_then(|states| states.to_device(weight.device()));
        Ok(Self { weight, initial_states: states.map_err(in_tensor("initial states"))? })
    }

    /// The states of `batch` sequences of `seq` tokens before the first loop, `[batch * seq, hidden]`.
    fn initial(&self, batch: usize, seq: usize) -> Result<Tensor> {
        let states = self.initial_states.dim(0)?;
        let by_position = (0..batch * seq).map(|row| (row % seq % states) as u32);
        self.initial_states.index_select(&Tensor::from_iter(by_position, self.weight.device())?, 0)
    }

    /// What the block reads for states and residual streams after the prelude, all `[rows, hidden]`.
    fn forward(&self, states: &Tensor, entered: &Tensor) -> Result<Tensor> {
        Tensor::cat(&[states, entered], 1)?.matmul(&self.weight)
    }
}

/// The whole model.
pub struct Reference {
    embed_tokens: Tensor,
    prelude: Vec<Layer>,
    /// The block's layers at each depth.
    loops: Vec<Vec<Layer>>,
    coda: Vec<Layer>,
    norm: Norm,
    adapter: Option<Adapter>,
    /// `[hidden, vocab]`
    head: Tensor,
    /// Low-rank difference that each loop but the last adds to the head; empty without any.
    head_adapters: Vec<LowRank>,
    /// Gate of each loop but the last; empty without gates.
    gates: Vec<Gate>,
    rotaries: Vec<Vec<f32>>,
    config: ModelConfig,
}

impl Reference {
    /// Builds the model on `weights`, whose tensors it shares: later changes of candle variables among them take
    /// effect, and gradients reach those variables.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn new(weights: &Weights) -> Result<Self, WeightsError> {
        let config = weights.config().clone();
        let mut loader = Loader::new(weights);
        let head = if config.tie_embeddings { "embed_tokens.weight" } else { "lm_head.weight" };
        let mut layers = |count, place: &dyn Fn(usize) -> Place| {
            (0..count).map(|layer| Layer::load(&mut loader, place(layer))).collect::<Result<Vec<_>, _>>()
        };
        let prelude = layers(config.prelude_layers, &Place::Prelude)?;
        let block = |depth| layers(config.block_layers, &|layer| Place::Block { depth, layer });
        let loops = (0..config.num_loops).map(block).collect::<Result<_, _>>()?;
        let coda = layers(config.coda_layers, &Place::Coda)?;
        let earlier = 0..config.num_loops - 1;
        let head_adapters = match config.head_lora_rank {
            0 => Vec::new(),
            _ => earlier
                .clone()
                .map(|depth| LowRank::load(&mut loader, &format!("head_lora.{depth}")))
                .collect::<Result<_, _>>()?,
        };
        let gates = match config.gate {
            false => Vec::new(),
            true => earlier.map(|depth| Gate::load(&mut loader, depth)).collect::<Result<_, _>>()?,
        };
        let adapter = config.injection.map(|injection| Adapter::load(&mut loader, injection)).transpose()?;
        Ok(Self {
            embed_tokens: loader.get("embed_tokens.weight")?,
            adapter,
            prelude,
            loops,
            coda,
            norm: Norm::load(&loader, "norm")?,
            head: loader.transposed(head)?,
            head_adapters,
            gates,
            rotaries: loader.rotaries,
            config,
        })
    }

    /// The residual stream after every loop, each `[batch * seq, hidden]`, for `tokens` `[batch, seq]` of type `u32`.
    ///
    /// # Errors
    /// If `tokens` has another shape or type, is longer than `max_positions`, or is out of the vocabulary.
    pub fn hidden_states(&self, tokens: &Tensor) -> Result<Vec<Tensor>> {
        let mut states = Vec::with_capacity(self.config.num_loops);
        if self.config.shares_kv() {
            let mut run = self.start(tokens, KvFill::First)?;
            while let Some(LoopStates { hidden, .. }) = run.next_loop()? {
                states.push(hidden);
            }
            return Ok(states);
        }
        let (batch, seq) = tokens.dims2()?;
        let rotaries = self.rotaries(seq);
        let entered = self.enter(tokens, &rotaries)?;
        for block in &self.loops {
            let input = self.loop_input(states.last(), &entered, batch)?;
            states.push(run(input, block, batch, &rotaries)?);
        }
        Ok(states)
    }

    /// What a loop reads, `[batch * seq, hidden]`: `before` is the output of the loop before, `None` for the first, and
    /// `entered` the residual stream after the prelude.
    fn loop_input(&self, before: Option<&Tensor>, entered: &Tensor, batch: usize) -> Result<Tensor> {
        match (&self.adapter, before) {
            (Some(adapter), None) => adapter.forward(&adapter.initial(batch, entered.dim(0)? / batch)?, entered),
            (Some(adapter), Some(before)) => adapter.forward(before, entered),
            (None, None) => Ok(entered.clone()),
            (None, Some(before)) if self.config.norm_between_loops => self.norm.forward(before),
            (None, Some(before)) => Ok(before.clone()),
        }
    }

    /// Begins to run `tokens` `[batch, seq]` of type `u32` loop by loop, as when tokens exit and a KV fill decides what
    /// other tokens find of them.
    ///
    /// # Errors
    /// As for [`Reference::hidden_states`]; or if the depths share slots under the fill, so that what a token finds depends
    /// on which loops have run.
    pub fn start(&self, tokens: &Tensor, kv_fill: KvFill) -> Result<RunWithExits<'_>> {
        if matches!(kv_fill, KvFill::Last | KvFill::Cycle(_)) {
            candle_core::bail!("a run of whole sequences under kv_fill {kv_fill}: expected one that keeps every depth");
        }
        let (batch, seq) = tokens.dims2()?;
        let rotaries = self.rotaries(seq);
        let kept = |layers: usize| (0..layers).map(|_| None).collect();
        Ok(RunWithExits {
            model: self,
            shape: (batch, seq),
            entered: self.enter(tokens, &rotaries)?,
            hidden: None,
            rotaries,
            depth: 0,
            has_exited: vec![false; batch * seq],
            exits: Exits { kv_fill, reached: None },
            block: kept(self.config.block_layers),
            coda: kept(self.coda.len()),
        })
    }

    /// The residual stream after the prelude.
    fn enter(&self, tokens: &Tensor, rotaries: &[Turns]) -> Result<Tensor> {
        let (batch, seq) = tokens.dims2()?;
        let max_positions = self.config.max_positions;
        if seq > max_positions {
            candle_core::bail!("{seq} tokens in a sequence, expected at most {max_positions}");
        }
        let embedded = self.embed_tokens.index_select(&tokens.flatten_all()?, 0)?;
        let scale = f64::from(self.config.architecture.embedding_scale);
        run((embedded * scale)?, &self.prelude, batch, rotaries)
    }

    /// Inputs of the head, `[batch * seq, hidden]`, for `batch` sequences that exit after any loop with the residual
    /// stream `hidden` `[batch * seq, hidden]`: after coda and final norm.
    ///
    /// # Errors
    /// If `hidden` has another shape.
    pub fn exit(&self, hidden: &Tensor, batch: usize) -> Result<Tensor> {
        let rotaries = self.rotaries(hidden.dim(0)? / batch);
        self.norm.forward(&run(self.coda_input(hidden)?, &self.coda, batch, &rotaries)?)
    }

    /// What the coda reads of the output of a loop.
    fn coda_input(&self, hidden: &Tensor) -> Result<Tensor> {
        if self.config.norm_before_coda { self.norm.forward(hidden) } else { Ok(hidden.clone()) }
    }

    /// Logits `[rows, vocab]` of rows `[rows, hidden]` from [`Reference::exit`], which exit after the loop at `depth`.
    ///
    /// # Errors
    /// If `exited` has another shape.
    pub fn logits(&self, exited: &Tensor, depth: usize) -> Result<Tensor> {
        let logits = exited.matmul(&self.head)?;
        match self.head_adapters.get(depth) {
            None => Ok(logits),
            Some(adapter) => logits + adapter.forward(exited)?,
        }
    }

    /// Inputs of the gates: the residual streams `[rows, hidden]` after any loop and the final norm, without the coda.
    ///
    /// # Errors
    /// If `hidden` has another shape.
    pub fn final_norm(&self, hidden: &Tensor) -> Result<Tensor> {
        self.norm.forward(hidden)
    }

    /// Logits `[rows]` of the learned gate for rows `[rows, hidden]` from [`Reference::final_norm`], after the loop at
    /// `depth`. Their sigmoid is the probability that an exit here gives the last loop's token. The gate does not read
    /// the coda's output, which makes it cheap. `None` after the last loop, or without gates.
    ///
    /// # Errors
    /// If `normed` has another shape.
    pub fn gate_logits(&self, normed: &Tensor, depth: usize) -> Result<Option<Tensor>> {
        self.gates.get(depth).map(|gate| gate.forward(normed)).transpose()
    }

    /// Logits after every loop, each `[batch * seq, vocab]`.
    ///
    /// # Errors
    /// As for [`Reference::hidden_states`].
    pub fn forward(&self, tokens: &Tensor) -> Result<Vec<Tensor>> {
        let batch = tokens.dim(0)?;
        let states = self.hidden_states(tokens)?;
        let logits = |(depth, hidden)| self.logits(&self.exit(hidden, batch)?, depth);
        states.iter().enumerate().map(logits).collect()
    }

    /// Device of the model, on which its inputs must be.
    pub fn device(&self) -> &Device {
        self.embed_tokens.device()
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn rotaries(&self, positions: usize) -> Vec<Turns> {
        self.rotaries.iter().map(|frequencies| Turns::new(frequencies, positions)).collect()
    }
}

/// Runs `x` `[batch * seq, hidden]` through layers.
fn run(x: Tensor, layers: &[Layer], batch: usize, rotaries: &[Turns]) -> Result<Tensor> {
    layers.iter().try_fold(x, |x, layer| layer.forward(&x, batch, rotaries, None))
}

/// A run of whole sequences loop by loop, from [`Reference::start`].
///
/// Every row runs every loop, with its own keys and values at every depth. Of the tokens that exited at a shallower
/// depth, other rows find what the [`KvFill`] leaves there, as the engine serves them: under [`Reuse`](KvFill::Reuse)
/// copies of the keys and values of the exit depth, under [`Skip`](KvFill::Skip) none. Under [`First`](KvFill::First)
/// all rows, the token's own included, find those of depth 0. Under [`Backfill`](KvFill::Backfill) exits change
/// nothing. Gradients flow through copies.
pub struct RunWithExits<'m> {
    model: &'m Reference,
    /// Number of sequences, and their length.
    shape: (usize, usize),
    rotaries: Vec<Turns>,
    /// The residual stream after the prelude.
    entered: Tensor,
    /// The output of the last loop.
    hidden: Option<Tensor>,
    /// Depth of the next loop.
    depth: usize,
    /// By token.
    has_exited: Vec<bool>,
    exits: Exits,
    /// By layer.
    block: Vec<Option<Entries>>,
    coda: Vec<Option<Entries>>,
}

/// Results of a loop, each `[batch * seq, hidden]`.
pub struct LoopStates {
    /// The residual stream, as from [`Reference::hidden_states`].
    pub hidden: Tensor,
    /// Inputs of the head, as from [`Reference::exit`].
    pub exited: Tensor,
}

impl RunWithExits<'_> {
    /// Runs the next loop, then the coda and the final norm; `None` after the last loop.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn next_loop(&mut self) -> Result<Option<LoopStates>> {
        let Some(block) = self.model.loops.get(self.depth) else { return Ok(None) };
        self.depth += 1;
        let (exits, batch, rotaries) = (&self.exits, self.shape.0, &self.rotaries);
        let run = |x: &Tensor, layers: &[Layer], kept: &mut [Option<Entries>]| {
            let mut layers = layers.iter().zip(kept);
            layers.try_fold(x.clone(), |x, (layer, kept)| {
                layer.forward(&x, batch, rotaries, Some(LayerExits { exits, kept }))
            })
        };
        let input = self.model.loop_input(self.hidden.as_ref(), &self.entered, batch)?;
        let hidden = run(&input, block, &mut self.block)?;
        let coda_input = self.model.coda_input(&hidden)?;
        let exited = self.model.norm.forward(&run(&coda_input, &self.model.coda, &mut self.coda)?)?;
        self.hidden = Some(hidden.clone());
        Ok(Some(LoopStates { hidden, exited }))
    }

    /// Lets tokens exit at the depth that has just run: those whose entry of `exits`, by sequence and position, is
    /// true. Tokens that have exited before stay so.
    ///
    /// # Errors
    /// If the number of entries is not that of the tokens.
    pub fn exit(&mut self, exits: &[bool]) -> Result<()> {
        if exits.len() != self.has_exited.len() {
            candle_core::bail!("exits of {} tokens, expected {}", exits.len(), self.has_exited.len());
        }
        self.has_exited.iter_mut().zip(exits).for_each(|(has_exited, exits)| *has_exited |= exits);
        if self.has_exited.contains(&true) {
            let reached = self.has_exited.iter().map(|has_exited| u8::from(!has_exited)).collect();
            self.exits.reached = Some(Tensor::from_vec(reached, self.shape, self.model.device())?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::tiny;
    use crate::config::{Architecture, LoraConfig, LoraRanks, RopeScaling, Sharing, SlidingWindow};
    use candle_core::{DType, Var};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    fn logits(weights: &Weights, tokens: &[[u32; 6]]) -> Vec<Vec<f32>> {
        let shape = (tokens.len(), 6);
        let tokens = Tensor::from_slice(tokens.as_flattened(), shape, &Device::Cpu).unwrap();
        let logits = Reference::new(weights).unwrap().forward(&tokens).unwrap();
        let flat = |logits: &Tensor| logits.flatten_all().unwrap().to_vec1().unwrap();
        logits.iter().map(flat).collect()
    }

    fn assert_close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
        }
    }

    #[test]
    fn a_token_sees_only_itself_and_what_is_before_it() {
        let weights = Weights::random(tiny(), 3).unwrap();
        let before = logits(&weights, &[[1, 2, 3, 4, 5, 6]]);
        let after = logits(&weights, &[[1, 2, 3, 4, 9, 6]]);
        for (before, after) in before.iter().zip(&after) {
            let (same, changed) = (4 * 11, 4 * 11..5 * 11);
            assert_close(&before[..same], &after[..same]);
            assert!(before[changed.clone()] != after[changed]);
        }
    }

    #[test]
    fn sequences_of_a_batch_do_not_mix() {
        let weights = Weights::random(tiny(), 3).unwrap();
        let (a, b) = ([1, 2, 3, 4, 5, 6], [9, 8, 7, 1, 0, 10]);
        let both = logits(&weights, &[a, b]);
        let (first, second) = (logits(&weights, &[a]), logits(&weights, &[b]));
        for depth in 0..3 {
            assert_close(&both[depth], &[&first[depth][..], &second[depth]].concat());
        }
    }

    #[test]
    fn looping_equals_a_deeper_block_with_repeated_layers() {
        let looped = Weights::random(tiny(), 3).unwrap();
        let mut unrolled = tiny();
        (unrolled.block_layers, unrolled.num_loops) = (6, 1);
        let names = crate::weights::expected_tensors(&unrolled).into_keys();
        let copy = |name: String| {
            let mut source = name.clone();
            for layer in (2..6).rev() {
                let own = format!("layers.{layer}.");
                source = source.replace(&own, &format!("layers.{}.", layer % 2));
            }
            let tensor = looped.get(&source).unwrap().clone();
            (name, tensor)
        };
        let unrolled = Weights::from_tensors(unrolled, names.map(copy).collect(), "test").unwrap();
        let tokens = [[1, 2, 3, 4, 5, 6]];
        assert_close(&logits(&unrolled, &tokens)[0], &logits(&looped, &tokens)[2]);
    }

    #[test]
    fn a_lora_of_zero_b_changes_nothing_and_a_loops_own_b_changes_that_loop_on() {
        let mut config = tiny();
        config.lora = Some(LoraConfig { ranks: LoraRanks::all(2), scale: 2.0 });
        let adapted = Weights::random(config.clone(), 3).unwrap();
        let mut tensors: std::collections::HashMap<_, _> = adapted.tensors().clone().into_iter().collect();
        let shared = tensors.clone().into_iter().filter(|(name, _)| !name.starts_with("lora"));
        let plain = Weights::from_tensors(tiny(), shared.collect(), "test").unwrap();
        let tokens = [[1, 2, 3, 4, 5, 6]];
        let expected = logits(&plain, &tokens);
        assert_close(&logits(&adapted, &tokens)[2], &expected[2]);

        let b = Tensor::ones((8, 2), DType::F32, &Device::Cpu).unwrap();
        tensors.insert("lora.1.layers.0.mlp.down_proj.b".to_owned(), b);
        let adapted = Weights::from_tensors(config, tensors, "test").unwrap();
        let found = logits(&adapted, &tokens);
        assert_close(&found[0], &expected[0]);
        assert!(found[1] != expected[1]);
    }

    /// A model with all features of Llama and Gemma 3 at once, and everything that loops can differ in.
    fn gemma_like() -> ModelConfig {
        ModelConfig {
            sharing: Sharing::Matrices,
            prelude_layers: 1,
            coda_layers: 1,
            tie_embeddings: false,
            architecture: Architecture {
                // Norms of small numbers are so curved that differences do not approximate the slope.
                norm_eps: 0.1,
                post_norms: true,
                qk_norm: true,
                activation: Activation::GeluTanh,
                qkv_bias: true,
                rope_scaling: Some(RopeScaling::Linear { factor: 2.0 }),
                // One layer each of the prelude, the block and the coda.
                sliding_window: Some(SlidingWindow { tokens: 3, rope_theta: 100.0, layers: vec![0, 3, 7] }),
                attention_scale: Some(0.4),
                embedding_scale: 2.5,
                ..Architecture::default()
            },
            lora: Some(LoraConfig { ranks: LoraRanks { q: 1, v: 2, down: 3, ..LoraRanks::default() }, scale: 1.5 }),
            head_lora_rank: 2,
            gate: true,
            gate_hidden: 3,
            ..tiny()
        }
    }

    /// A model like Pythia, with its layers split into loops.
    fn neox_like() -> ModelConfig {
        ModelConfig {
            sharing: Sharing::Nothing,
            architecture: Architecture {
                norm: config::Norm::Layer,
                norm_eps: 0.1,
                activation: Activation::Gelu,
                gated_mlp: false,
                parallel_residual: true,
                qkv_bias: true,
                output_bias: true,
                mlp_bias: true,
                rotary_dims: Some(2),
                ..Architecture::default()
            },
            ..tiny()
        }
    }

    /// Weights that are random everywhere, biases and norms included, as variables.
    fn variables(config: ModelConfig) -> (Weights, HashMap<String, Var>) {
        let mut rng = StdRng::seed_from_u64(5);
        let mut variables = HashMap::new();
        for (name, tensor) in Weights::random(config.clone(), 5).unwrap().tensors() {
            let noise =
                Tensor::from_iter((0..tensor.elem_count()).map(|_| rng.random_range(-0.4f32..0.4)), &Device::Cpu);
            let noisy = (tensor + noise.unwrap().reshape(tensor.shape()).unwrap()).unwrap();
            variables.insert(name.clone(), Var::from_tensor(&noisy).unwrap());
        }
        let tensors = variables.iter().map(|(name, variable)| (name.clone(), variable.as_tensor().clone()));
        (Weights::from_tensors(config, tensors.collect(), "test").unwrap(), variables)
    }

    /// A number that depends on every logit and every gate.
    fn summary(model: &Reference) -> Tensor {
        let tokens = Tensor::new(&[[1u32, 2, 3, 4, 5, 6], [9, 8, 7, 1, 0, 10]], &Device::Cpu).unwrap();
        let states = model.hidden_states(&tokens).unwrap();
        let mut outputs = model.forward(&tokens).unwrap();
        let gate = |(depth, hidden)| model.gate_logits(&model.final_norm(hidden).unwrap(), depth).unwrap();
        outputs.extend(states.iter().enumerate().filter_map(gate));
        let weigh = |(output, y): (usize, &Tensor)| {
            let weight = |i| ((i * 31 + output * 7) as f32).sin();
            let weights = Tensor::from_iter((0..y.elem_count()).map(weight), &Device::Cpu).unwrap();
            (y.flatten_all().unwrap() * weights).unwrap().sum_all().unwrap()
        };
        Tensor::stack(&outputs.iter().enumerate().map(weigh).collect::<Vec<_>>(), 0).unwrap().sum_all().unwrap()
    }

    #[test]
    fn gradients_of_every_tensor_equal_finite_differences() {
        let scalar = |x: &Tensor| f64::from(x.to_scalar::<f32>().unwrap());
        let size = |x: &Tensor| scalar(&x.sqr().unwrap().sum_all().unwrap()).sqrt();
        let plain_mlp = |activation| {
            let mut config = neox_like();
            config.architecture.activation = activation;
            config
        };
        let [silu, tanh] = [Activation::Silu, Activation::GeluTanh].map(plain_mlp);
        for config in [tiny(), gemma_like(), neox_like(), silu, tanh] {
            let (weights, variables) = variables(config);
            let model = Reference::new(&weights).unwrap();
            let gradients = summary(&model).backward().unwrap();
            for (name, variable) in &variables {
                let gradient = gradients.get(variable).unwrap_or_else(|| panic!("{name} has no gradient"));
                // The slope is steepest along the gradient, where the difference loses least to rounding.
                let slope = size(gradient);
                let direction = (gradient / slope).unwrap();
                let start = variable.as_tensor().copy().unwrap();
                let along = |step: f64| {
                    variable.set(&(&start + (&direction * step).unwrap()).unwrap()).unwrap();
                    scalar(&summary(&model))
                };
                // Small where the slope, and with it the curvature, is large.
                let step = 0.01 / (1.0 + slope);
                let difference = (along(step) - along(-step)) / (2.0 * step);
                variable.set(&start).unwrap();
                assert!(
                    (slope - difference).abs() < 1e-2 * (slope + 1.0),
                    "{name}: gradient {slope}, difference {difference}"
                );
            }
        }
    }

    /// The weights with their tensors renamed.
    fn renamed(weights: &Weights, config: ModelConfig, source: impl Fn(&str) -> String) -> Weights {
        let names = crate::weights::expected_tensors(&config).into_keys();
        let tensors = names.map(|name| (name.clone(), weights.get(&source(&name)).unwrap().clone())).collect();
        Weights::from_tensors(config, tensors, "test").unwrap()
    }

    #[test]
    fn loops_of_equal_vectors_equal_loops_that_share_them() {
        let mut shared = gemma_like();
        shared.sharing = Sharing::Block;
        let (shared, _) = variables(shared);
        let with_sharing = |sharing| ModelConfig { sharing, lora: None, ..shared.config().clone() };
        let in_block = |name: &str| match name.strip_prefix("loops.") {
            Some(place) => format!("block{}", &place[place.find('.').unwrap()..]),
            None => name.to_owned(),
        };
        let tokens = [[1, 2, 3, 4, 5, 6]];
        let expected = logits(&renamed(&shared, with_sharing(Sharing::Block), in_block), &tokens);
        for sharing in [Sharing::Matrices, Sharing::Nothing] {
            assert_eq!(logits(&renamed(&shared, with_sharing(sharing), in_block), &tokens), expected);
        }
    }

    #[test]
    fn prelude_block_and_coda_are_the_layers_of_an_ordinary_transformer_in_order() {
        let mut looped = neox_like();
        looped.sharing = Sharing::Block;
        (looped.block_layers, looped.num_loops, looped.prelude_layers, looped.coda_layers) = (2, 1, 1, 1);
        let (looped, _) = variables(looped);
        let ordinary = ModelConfig { block_layers: 4, num_loops: 1, ..neox_like() };
        let source = |name: &str| {
            let mut name = name.to_owned();
            let places = ["prelude.layers.0", "block.layers.0", "block.layers.1", "coda.layers.0"];
            for (layer, place) in places.iter().enumerate() {
                name = name.replace(&format!("loops.0.layers.{layer}."), &format!("{place}."));
            }
            name
        };
        let ordinary = renamed(&looped, ordinary, source);
        let tokens = [[1, 2, 3, 4, 5, 6]];
        assert_eq!(logits(&ordinary, &tokens), logits(&looped, &tokens));
    }

    #[test]
    fn a_window_hides_what_is_before_it() {
        let mut config = tiny();
        (config.block_layers, config.num_loops) = (1, 1);
        config.architecture.sliding_window = Some(SlidingWindow { tokens: 2, rope_theta: 1e4, layers: vec![0] });
        let weights = Weights::random(config, 3).unwrap();
        let before = &logits(&weights, &[[1, 2, 3, 4, 5, 6]])[0];
        let after = &logits(&weights, &[[1, 2, 9, 4, 5, 6]])[0];
        let changed = |row: usize| before[row * 11..][..11] != after[row * 11..][..11];
        assert_eq!([0, 1, 2, 3, 4, 5].map(changed), [false, false, true, true, false, false]);
    }

    #[test]
    fn the_last_loop_has_neither_a_head_of_its_own_nor_a_gate() {
        let (weights, variables) = variables(gemma_like());
        let model = Reference::new(&weights).unwrap();
        let hidden = Tensor::ones((1, 8), DType::F32, &Device::Cpu).unwrap();
        let head = variables["lm_head.weight"].t().unwrap();
        let plain = hidden.matmul(&head).unwrap().to_vec2::<f32>().unwrap();
        let found = |depth| model.logits(&hidden, depth).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(found(2), plain);
        assert!(found(0) != plain && found(1) != plain && found(0) != found(1));
        let gated = |depth| model.gate_logits(&hidden, depth).unwrap().is_some();
        assert_eq!([0, 1, 2].map(gated), [true, true, false]);
    }

    #[test]
    fn too_long_a_sequence_is_refused() {
        let model = Reference::new(&Weights::random(tiny(), 3).unwrap()).unwrap();
        let tokens = Tensor::zeros((1, 17), DType::U32, &Device::Cpu).unwrap();
        let message = model.forward(&tokens).unwrap_err().to_string();
        assert!(message.contains("17 tokens in a sequence, expected at most 16"), "{message}");
    }
}
