//! The model configuration, `config.json`: sizes of a recursive transformer and operations of its layers.

use std::path::{Path, PathBuf};

use scheduler::KvFill;
use serde::{Deserialize, Serialize};

/// The only `schema_version` that this build reads and writes.
pub const SCHEMA_VERSION: u32 = 2;
/// The only `model_type` that this build reads and writes.
pub const MODEL_TYPE: &str = "depthwise-recursive";
/// Maximum size in a configuration: integers up to this one are exact in `f32`, and products of two cannot overflow.
pub const MAX_SIZE: usize = 1 << 24;
/// Maximum number of positions of a model, each of which has an entry in the rotary table.
pub const MAX_POSITIONS: usize = 1 << 20;
/// Maximum number of loops.
pub const MAX_LOOPS: usize = 64;
/// Maximum number of layers of a configuration. Models have a hundred; a damaged file may contain 10^15.
pub const MAX_LAYERS: usize = 1 << 12;

/// A decoder of `block_layers` layers that run `num_loops` times between an embedding and a head. Every loop's output
/// can exit through the head.
///
/// ```text
/// embedding -> prelude -> block at depth 0 -> block at depth 1 -> ... -> coda -> norm -> head
///                               |                   |
///                               +--> coda -> norm -> head: an exit
/// ```
///
/// In models that were trained as looped ones, more may happen between the loops: see
/// [`norm_between_loops`](Self::norm_between_loops) and [`injection`](Self::injection).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Version of this file format, [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Always [`MODEL_TYPE`].
    pub model_type: String,
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between the MLP's up and down projections.
    pub intermediate_size: usize,
    /// Number of query heads.
    pub num_heads: usize,
    /// Number of key-value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Layers in the block.
    pub block_layers: usize,
    /// Number of loops at full depth.
    pub num_loops: usize,
    /// Parameters that the loops share.
    #[serde(default)]
    pub sharing: Sharing,
    /// Number of unshared layers before the first loop.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub prelude_layers: usize,
    /// Number of unshared layers between a loop and the head.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub coda_layers: usize,
    /// Whether each loop after the first reads the output of the loop before through the final norm (Ouro, Nanbeige).
    #[serde(default, skip_serializing_if = "is_false")]
    pub norm_between_loops: bool,
    /// Whether the coda reads the output of a loop through the final norm, which also follows the coda (Huginn).
    #[serde(default, skip_serializing_if = "is_false")]
    pub norm_before_coda: bool,
    /// What each loop reads beside the output of the loop before (Huginn); without it, nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub injection: Option<Injection>,
    /// Whether the head is the embedding transposed.
    pub tie_embeddings: bool,
    /// Maximum length of a sequence in tokens.
    pub max_positions: usize,
    /// Operations of a layer.
    #[serde(default)]
    pub architecture: Architecture,
    /// Low-rank differences between the loops of a shared block; without them, the loops' matrices are equal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// Rank of the low-rank difference that each loop but the last adds to the head; 0 for none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub head_lora_rank: usize,
    /// Whether each loop but the last has a learned gate on the normed hidden state. Its sigmoid is the probability that
    /// the token agrees with that of the last loop.
    #[serde(default, skip_serializing_if = "is_false")]
    pub gate: bool,
    /// Whether all loops have the same gate (Ouro).
    #[serde(default, skip_serializing_if = "is_false")]
    pub shared_gate: bool,
    /// Width of the gates' hidden layer, `w . silu(W x + b) + c`; 0 for linear gates, `w . x + c`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gate_hidden: usize,
    /// The KV fill that the model is served with unless another is asked for. Under [`First`](KvFill::First) it is part
    /// of the model: at full depth, too, every loop attends to the keys and values of depth 0 (recursive KV sharing,
    /// arXiv 2507.10524).
    #[serde(default, skip_serializing_if = "is_default")]
    pub kv_fill: KvFill,
}

/// Input injection (arXiv 2502.05171): a loop's block reads `adapter [s, e]`, where `s` is the state, the output of the
/// loop before, and `e` is the residual stream after the prelude. The loops share the adapter, a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Injection {
    /// The state before the first loop.
    pub initial_state: InitialState,
}

/// The state before the first loop of a model with [`Injection`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum InitialState {
    /// Zeros.
    Zeros,
    /// Normal numbers without those beyond three deviations. They depend on the seed and on the token's position modulo
    /// [`INITIAL_STATES`], so that they are the same in every batch.
    Normal {
        /// Standard deviation, before numbers are left out.
        deviation: f32,
        /// Seed.
        seed: u64,
    },
}

/// Number of different initial states of a model whose initial states are random.
pub const INITIAL_STATES: usize = 4096;

/// Parameters that the loops of a model share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// Every loop runs one block: CYCLE of arXiv 2410.20672, where layer `l` is shared layer `l mod block_layers`.
    #[default]
    Block,
    /// As [`Block`](Self::Block), but each loop has its own norms and biases.
    Matrices,
    /// Nothing: an ordinary transformer of `num_loops * block_layers` layers.
    Nothing,
}

/// Low-rank adapters that make each loop's projections differ (arXiv 2410.20672, section 2.3): a loop's projection is
/// `W x + scale * B A x`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the adapters of each kind of projection.
    pub ranks: LoraRanks,
    /// Factor of an adapter's output.
    pub scale: f32,
}

/// Rank by kind of projection; 0 for no adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "a field per projection, each a rank")]
pub struct LoraRanks {
    pub q: usize,
    pub k: usize,
    pub v: usize,
    pub o: usize,
    #[serde(default)]
    pub gate: usize,
    pub up: usize,
    pub down: usize,
}

impl LoraRanks {
    /// One rank for every kind.
    pub fn all(rank: usize) -> Self {
        Self { q: rank, k: rank, v: rank, o: rank, gate: rank, up: rank, down: rank }
    }

    fn fields(&self) -> [(&'static str, usize); 7] {
        [
            ("lora.ranks.q", self.q),
            ("lora.ranks.k", self.k),
            ("lora.ranks.v", self.v),
            ("lora.ranks.o", self.o),
            ("lora.ranks.gate", self.gate),
            ("lora.ranks.up", self.up),
            ("lora.ranks.down", self.down),
        ]
    }

    /// The rank of one kind.
    pub fn of(&self, kind: ProjectionKind) -> usize {
        match kind {
            ProjectionKind::Q => self.q,
            ProjectionKind::K => self.k,
            ProjectionKind::V => self.v,
            ProjectionKind::O => self.o,
            ProjectionKind::Gate => self.gate,
            ProjectionKind::Up => self.up,
            ProjectionKind::Down => self.down,
        }
    }
}

/// Operations of a layer, in the Llama, Gemma and GPT-NeoX families. The default is Llama's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Architecture {
    /// Kind of the norms of the residual stream.
    pub norm: Norm,
    /// Epsilon that is added to the mean square, or variance, before the root.
    pub norm_eps: f32,
    /// Whether a norm also follows attention and MLP, before the residual is added (Gemma 3).
    pub post_norms: bool,
    /// Whether those norms norm the sum with the residual, which they replace: `x = norm(x + attention)` (Huginn).
    #[serde(skip_serializing_if = "is_false")]
    pub norm_after_addition: bool,
    /// Whether each head of queries and keys is normed before rotation (Gemma 3).
    pub qk_norm: bool,
    /// Activation function of the MLP.
    pub activation: Activation,
    /// Whether the MLP is `down(activation(gate(x)) * up(x))` rather than `down(activation(up(x)))`.
    pub gated_mlp: bool,
    /// Whether attention and MLP both read the layer's input and their outputs are added (GPT-NeoX).
    pub parallel_residual: bool,
    /// Whether query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub output_bias: bool,
    /// Whether the MLP's projections have biases.
    pub mlp_bias: bool,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Number of leading dimensions of a head that are rotated, even; by default, all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotary_dims: Option<usize>,
    /// Scaling of rotary frequencies for longer sequences.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Layers without rotary embedding (SmolLM3): indices as in [`ModelConfig::layer_index`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unrotated_layers: Vec<usize>,
    /// Layers with a sliding window (Gemma 3).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<SlidingWindow>,
    /// Factor of attention scores; by default, `1 / sqrt(head_dim)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_scale: Option<f32>,
    /// Factor of embeddings.
    pub embedding_scale: f32,
}

impl Default for Architecture {
    fn default() -> Self {
        Self {
            norm: Norm::Rms,
            norm_eps: 1e-5,
            post_norms: false,
            norm_after_addition: false,
            qk_norm: false,
            activation: Activation::Silu,
            gated_mlp: true,
            parallel_residual: false,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            rope_theta: 10_000.0,
            rotary_dims: None,
            rope_scaling: None,
            unrotated_layers: Vec::new(),
            sliding_window: None,
            attention_scale: None,
            embedding_scale: 1.0,
        }
    }
}

/// Kind of the norms of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// `x / rms(x) * weight` (arXiv 1910.07467).
    Rms,
    /// `(x - mean(x)) / deviation(x) * weight + bias` (arXiv 1607.06450).
    Layer,
}

/// Activation function of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// `x Phi(x)` (arXiv 1606.08415), exact.
    Gelu,
    /// `x Phi(x)`, approximated with a hyperbolic tangent.
    GeluTanh,
}

/// Scaling of rotary frequencies for longer sequences than those of training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum RopeScaling {
    /// All frequencies divided by `factor` (arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, with a smooth transition.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f32,
        /// Wavelengths above `original_positions / low_freq_factor` are low frequencies.
        low_freq_factor: f32,
        /// Wavelengths below `original_positions / high_freq_factor` are high frequencies.
        high_freq_factor: f32,
        /// Positions of the model before scaling.
        original_positions: usize,
    },
}

/// Layers with a sliding window, and their rotary base. Rope scaling does not apply to them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlidingWindow {
    /// Length of the window in tokens, the current token included.
    pub tokens: usize,
    /// Base of its rotary frequencies.
    pub rope_theta: f32,
    /// Indices of the layers, as in [`ModelConfig::layer_index`].
    pub layers: Vec<usize>,
}

/// Position of a layer on a token's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// A layer before the first loop.
    Prelude(usize),
    /// A layer of the block, at a depth.
    Block {
        /// Depth of the loop.
        depth: usize,
        /// Index of the layer in the block.
        layer: usize,
    },
    /// A layer between a loop and the head.
    Coda(usize),
}

/// Kinds of projections in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the field's own names")]
pub enum ProjectionKind {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

/// A projection of a layer, with shape `[outputs, inputs]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// Its kind.
    pub kind: ProjectionKind,
    /// Name within the layer, as in Hugging Face's Llama.
    pub name: &'static str,
    /// Outputs.
    pub outputs: usize,
    /// Inputs.
    pub inputs: usize,
    /// Whether the projection has a bias.
    pub bias: bool,
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

fn is_false(flag: &bool) -> bool {
    !flag
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Why a model configuration is invalid.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot read the model configuration: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is not JSON, lacks a field, or has an unknown field or one of a wrong type.
    #[error("{}: not a model configuration: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The problem, with line and column.
        source: serde_json::Error,
    },
    /// A value is out of range.
    #[error("{}: `{}` is {}, expected {}", path.display(), invalid.field, invalid.found, invalid.expected)]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The field and its value.
        invalid: InvalidField,
    },
}

/// A field of [`ModelConfig`] that is out of range.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("model configuration: `{field}` is {found}, expected {expected}")]
pub struct InvalidField {
    /// Name of the field in `config.json`.
    pub field: &'static str,
    /// Value of the field.
    pub found: String,
    /// The values that are valid.
    pub expected: String,
}

impl ModelConfig {
    /// Reads and validates a `config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, is not such a configuration, or has a value out of range.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config: Self =
            serde_json::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        config.validate().map_err(|invalid| ConfigError::Invalid { path: path.to_owned(), invalid })?;
        Ok(config)
    }

    /// The configuration as the text of a `config.json`.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a struct of numbers and strings is always JSON")
    }

    /// Checks that the sizes form a valid model.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<(), InvalidField> {
        let version = self.schema_version;
        check(version == SCHEMA_VERSION, "schema_version", &version, &SCHEMA_VERSION)?;
        let model_type = &self.model_type;
        check(model_type == MODEL_TYPE, "model_type", model_type, &MODEL_TYPE)?;
        for (field, size) in self.sizes() {
            check((1..=MAX_SIZE).contains(&size), field, &size, &format!("from 1 to {MAX_SIZE}"))?;
        }
        let positions = self.max_positions;
        check(positions <= MAX_POSITIONS, "max_positions", &positions, &format!("at most {MAX_POSITIONS}"))?;
        let q_size = self.q_size();
        check(q_size <= MAX_SIZE, "num_heads x head_dim", &q_size, &format!("at most {MAX_SIZE}"))?;
        let block = self.num_loops * self.block_layers;
        let num_layers = block.saturating_add(self.prelude_layers).saturating_add(self.coda_layers);
        check(num_layers <= MAX_LAYERS, "number of layers", &num_layers, &format!("at most {MAX_LAYERS}"))?;
        let most = format!("at most {MAX_LOOPS}");
        check(self.num_loops <= MAX_LOOPS, "num_loops", &self.num_loops, &most)?;
        let kv_heads = self.num_kv_heads;
        let divides = format!("a divisor of `num_heads` ({})", self.num_heads);
        check(self.num_heads.is_multiple_of(kv_heads), "num_kv_heads", &kv_heads, &divides)?;
        self.architecture.validate(self.head_dim, self.num_layers())?;
        let per_loop = self.sharing == Sharing::Nothing;
        check(self.lora.is_none() || !per_loop, "lora", &"given", &"none where loops share nothing")?;
        let head_rank = self.head_lora_rank;
        check(head_rank <= MAX_SIZE, "head_lora_rank", &head_rank, &format!("at most {MAX_SIZE}"))?;
        let gate_hidden = self.gate_hidden;
        check(gate_hidden <= MAX_SIZE, "gate_hidden", &gate_hidden, &format!("at most {MAX_SIZE}"))?;
        check(self.gate || gate_hidden == 0, "gate_hidden", &gate_hidden, &"0 for a model without gates")?;
        check(self.gate || !self.shared_gate, "shared_gate", &true, &"false for a model without gates")?;
        check(!self.shared_gate || gate_hidden == 0, "gate_hidden", &gate_hidden, &"0 for a gate of all loops")?;
        self.validate_loops()?;
        let has_coda = self.shares_kv() && self.coda_layers > 0;
        check(!has_coda, "kv_fill", &self.kv_fill, &"another than first for a model with a coda")?;
        if let Some(lora) = &self.lora {
            check(lora.scale.is_finite(), "lora.scale", &lora.scale, &"a finite number")?;
            for (field, rank) in lora.ranks.fields() {
                check(rank <= MAX_SIZE, field, &rank, &format!("at most {MAX_SIZE}"))?;
            }
            let gate = lora.ranks.gate;
            check(self.architecture.gated_mlp || gate == 0, "lora.ranks.gate", &gate, &"0 without a gated MLP")?;
        }
        Ok(())
    }

    /// Checks what happens between loops, and between a loop and the coda.
    fn validate_loops(&self) -> Result<(), InvalidField> {
        let before_coda = !self.norm_before_coda || self.coda_layers > 0;
        check(before_coda, "norm_before_coda", &true, &"false for a model without a coda")?;
        if let Some(Injection { initial_state }) = self.injection {
            let normed = self.norm_between_loops;
            check(!normed, "norm_between_loops", &normed, &"false for a model with input injection")?;
            if let InitialState::Normal { deviation, .. } = initial_state {
                let field = "injection.initial_state.deviation";
                let positive = deviation.is_finite() && deviation > 0.0;
                check(positive, field, &deviation, &"a finite number above 0; the kind zeros for 0")?;
            }
        }
        Ok(())
    }

    fn sizes(&self) -> [(&'static str, usize); 9] {
        [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("block_layers", self.block_layers),
            ("num_loops", self.num_loops),
            ("max_positions", self.max_positions),
        ]
    }

    /// Width of all query heads together.
    pub fn q_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of all key heads together, which is also that of all value heads.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Number of layers that a token runs at full depth.
    pub fn num_layers(&self) -> usize {
        self.prelude_layers + self.num_loops * self.block_layers + self.coda_layers
    }

    /// Whether all loops attend to the keys and values of depth 0.
    pub fn shares_kv(&self) -> bool {
        self.kv_fill == KvFill::First
    }

    /// The KV fill under which tokens that run every depth have exact keys and values.
    pub fn exact_fill(&self) -> KvFill {
        if self.shares_kv() { KvFill::First } else { KvFill::Reuse }
    }

    /// The layers that a token runs at full depth, in order.
    pub fn places(&self) -> impl Iterator<Item = Place> + use<> {
        let block_layers = self.block_layers;
        let depth = move |depth| (0..block_layers).map(move |layer| Place::Block { depth, layer });
        let prelude = (0..self.prelude_layers).map(Place::Prelude);
        prelude.chain((0..self.num_loops).flat_map(depth)).chain((0..self.coda_layers).map(Place::Coda))
    }

    /// Index of a layer among [`ModelConfig::places`].
    pub fn layer_index(&self, place: Place) -> usize {
        match place {
            Place::Prelude(layer) => layer,
            Place::Block { depth, layer } => self.prelude_layers + depth * self.block_layers + layer,
            Place::Coda(layer) => self.prelude_layers + self.num_loops * self.block_layers + layer,
        }
    }

    /// Number of latest tokens that a token attends to in a layer, itself included; `None` without a window.
    pub fn window(&self, place: Place) -> Option<usize> {
        let window = self.architecture.sliding_window.as_ref()?;
        window.layers.contains(&self.layer_index(place)).then_some(window.tokens)
    }

    /// Rotary frequencies of a layer in radians per position, one for each pair of rotated dimensions.
    pub fn rotary_frequencies(&self, place: Place) -> Vec<f32> {
        let Architecture { rope_theta, rope_scaling, sliding_window, .. } = &self.architecture;
        let (theta, scaling) = match sliding_window {
            Some(window) if self.window(place).is_some() => (window.rope_theta, None),
            _ => (*rope_theta, rope_scaling.as_ref()),
        };
        let frequencies = self.architecture.unscaled_frequencies(self.head_dim, theta);
        if self.architecture.unrotated_layers.contains(&self.layer_index(place)) {
            return frequencies.map(|_| 0.0).collect();
        }
        frequencies.map(|frequency| scaling.map_or(frequency, |scaling| scaling.stretch(frequency))).collect()
    }

    /// Prefix of the names of a layer's matrices.
    pub fn matrices_prefix(&self, place: Place) -> String {
        match place {
            Place::Prelude(layer) => format!("prelude.layers.{layer}"),
            Place::Coda(layer) => format!("coda.layers.{layer}"),
            Place::Block { depth, layer } => match self.sharing {
                Sharing::Block | Sharing::Matrices => format!("block.layers.{layer}"),
                Sharing::Nothing => format!("loops.{depth}.layers.{layer}"),
            },
        }
    }

    /// Prefix of the names of a layer's norms and biases.
    pub fn vectors_prefix(&self, place: Place) -> String {
        match (place, self.sharing) {
            (Place::Block { depth, layer }, Sharing::Matrices) => format!("loops.{depth}.layers.{layer}"),
            _ => self.matrices_prefix(place),
        }
    }

    /// Prefix of the names of a projection's adapter at a depth: `{prefix}.a` has shape `[rank, inputs]` and
    /// `{prefix}.b` shape `[outputs, rank]`.
    pub fn lora_prefix(depth: usize, layer: usize, projection: &Projection) -> String {
        format!("lora.{depth}.layers.{layer}.{}", projection.name)
    }

    /// A projection of a layer.
    pub fn projection(&self, kind: ProjectionKind) -> Projection {
        let Architecture { qkv_bias, output_bias, mlp_bias, .. } = self.architecture;
        let (hidden, inner, q, kv) = (self.hidden_size, self.intermediate_size, self.q_size(), self.kv_size());
        let (name, outputs, inputs, bias) = match kind {
            ProjectionKind::Q => ("self_attn.q_proj", q, hidden, qkv_bias),
            ProjectionKind::K => ("self_attn.k_proj", kv, hidden, qkv_bias),
            ProjectionKind::V => ("self_attn.v_proj", kv, hidden, qkv_bias),
            ProjectionKind::O => ("self_attn.o_proj", hidden, q, output_bias),
            ProjectionKind::Gate => ("mlp.gate_proj", inner, hidden, mlp_bias),
            ProjectionKind::Up => ("mlp.up_proj", inner, hidden, mlp_bias),
            ProjectionKind::Down => ("mlp.down_proj", hidden, inner, mlp_bias),
        };
        Projection { kind, name, outputs, inputs, bias }
    }

    /// The projections of a layer.
    pub fn projections(&self) -> Vec<Projection> {
        use ProjectionKind::{Down, Gate, K, O, Q, Up, V};
        let gate = self.architecture.gated_mlp.then_some(Gate);
        let kinds = [Q, K, V, O].into_iter().chain(gate).chain([Up, Down]);
        kinds.map(|kind| self.projection(kind)).collect()
    }

    /// The norms of a layer, by name and width.
    pub fn norms(&self) -> Vec<(&'static str, usize)> {
        let mut norms = vec![("input_layernorm", self.hidden_size), ("post_attention_layernorm", self.hidden_size)];
        if self.architecture.post_norms {
            // Gemma's names: the norm before the MLP is not called after the attention that precedes it.
            norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"]
                .into_iter()
                .chain(["post_feedforward_layernorm"])
                .map(|name| (name, self.hidden_size))
                .collect();
        }
        if self.architecture.qk_norm {
            norms.extend([("self_attn.q_norm", self.head_dim), ("self_attn.k_norm", self.head_dim)]);
        }
        norms
    }
}

impl Default for ModelConfig {
    /// A small recursive Llama: four loops of two layers.
    fn default() -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            model_type: MODEL_TYPE.to_owned(),
            vocab_size: 512,
            hidden_size: 192,
            intermediate_size: 512,
            num_heads: 6,
            num_kv_heads: 2,
            head_dim: 32,
            block_layers: 2,
            num_loops: 4,
            sharing: Sharing::Block,
            prelude_layers: 0,
            coda_layers: 0,
            norm_between_loops: false,
            norm_before_coda: false,
            injection: None,
            tie_embeddings: true,
            max_positions: 1024,
            architecture: Architecture::default(),
            lora: None,
            head_lora_rank: 0,
            gate: false,
            shared_gate: false,
            gate_hidden: 0,
            kv_fill: KvFill::default(),
        }
    }
}

impl Architecture {
    /// Number of leading dimensions of a head that are rotated.
    pub fn rotary_dims(&self, head_dim: usize) -> usize {
        self.rotary_dims.unwrap_or(head_dim)
    }

    /// Factor of attention scores.
    pub fn attention_scale(&self, head_dim: usize) -> f32 {
        self.attention_scale.unwrap_or_else(|| (head_dim as f32).sqrt().recip())
    }

    /// Rotary frequencies of a base, before scaling.
    fn unscaled_frequencies(&self, head_dim: usize, theta: f32) -> impl Iterator<Item = f32> + use<> {
        let dims = self.rotary_dims(head_dim);
        (0..dims).step_by(2).map(move |i| theta.powf(i as f32 / dims as f32).recip())
    }

    /// Factors by which a scaling divides the rotary frequencies.
    pub(crate) fn frequency_factors(&self, head_dim: usize, scaling: RopeScaling) -> Vec<f32> {
        let frequencies = self.unscaled_frequencies(head_dim, self.rope_theta);
        frequencies.map(|frequency| frequency / scaling.stretch(frequency)).collect()
    }

    fn validate(&self, head_dim: usize, num_layers: usize) -> Result<(), InvalidField> {
        let rotated = self.rotary_dims(head_dim);
        let (field, expected) = match self.rotary_dims {
            None => ("head_dim", "an even number".to_owned()),
            Some(_) => ("architecture.rotary_dims", format!("an even number from 2 to `head_dim` ({head_dim})")),
        };
        check(rotated.is_multiple_of(2) && (2..=head_dim).contains(&rotated), field, &rotated, &expected)?;
        let (after, expected) = (self.norm_after_addition, "false without `post_norms` or with `parallel_residual`");
        let possible = !after || self.post_norms && !self.parallel_residual;
        check(possible, "architecture.norm_after_addition", &after, &expected)?;
        let beyond = self.unrotated_layers.iter().find(|layer| **layer >= num_layers);
        let (found, expected) = (beyond.copied().unwrap_or(0), format!("below the number of layers, {num_layers}"));
        check(beyond.is_none(), "architecture.unrotated_layers", &found, &expected)?;
        let mut positive = vec![
            ("architecture.rope_theta", self.rope_theta),
            ("architecture.norm_eps", self.norm_eps),
            ("architecture.embedding_scale", self.embedding_scale),
            ("architecture.attention_scale", self.attention_scale(head_dim)),
        ];
        if let Some(scaling) = &self.rope_scaling {
            positive.extend(scaling.numbers());
            if let RopeScaling::Llama3 { low_freq_factor: low, high_freq_factor: high, .. } = scaling {
                let expected = format!("above `low_freq_factor` ({low})");
                check(high > low, "architecture.rope_scaling.high_freq_factor", high, &expected)?;
            }
        }
        if let Some(window) = &self.sliding_window {
            positive.push(("architecture.sliding_window.rope_theta", window.rope_theta));
            let tokens = window.tokens;
            check(tokens >= 1, "architecture.sliding_window.tokens", &tokens, &"at least 1")?;
            let beyond = window.layers.iter().find(|layer| **layer >= num_layers);
            let (found, expected) = (beyond.copied().unwrap_or(0), format!("below the number of layers, {num_layers}"));
            check(beyond.is_none(), "architecture.sliding_window.layers", &found, &expected)?;
        }
        for (field, value) in positive {
            check(value.is_finite() && value > 0.0, field, &value, &"a finite number above 0")?;
        }
        Ok(())
    }
}

impl RopeScaling {
    /// The scaled frequency for one that the model was trained with.
    fn stretch(&self, frequency: f32) -> f32 {
        match *self {
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let turns = original_positions as f32 * frequency / std::f32::consts::TAU;
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / factor)
            }
        }
    }

    fn numbers(&self) -> Vec<(&'static str, f32)> {
        match *self {
            Self::Linear { factor } => vec![("architecture.rope_scaling.factor", factor)],
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => vec![
                ("architecture.rope_scaling.factor", factor),
                ("architecture.rope_scaling.low_freq_factor", low_freq_factor),
                ("architecture.rope_scaling.high_freq_factor", high_freq_factor),
                ("architecture.rope_scaling.original_positions", original_positions as f32),
            ],
        }
    }
}

fn check(holds: bool, field: &'static str, found: &dyn ToString, expected: &dyn ToString) -> Result<(), InvalidField> {
    let invalid = || InvalidField { field, found: found.to_string(), expected: expected.to_string() };
    if holds { Ok(()) } else { Err(invalid()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A model small enough for any test.
    pub(crate) fn tiny() -> ModelConfig {
        ModelConfig {
            vocab_size: 11,
            hidden_size: 8,
            intermediate_size: 12,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 4,
            num_loops: 3,
            max_positions: 16,
            ..ModelConfig::default()
        }
    }

    fn load_text(text: &str) -> Result<ModelConfig, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        ModelConfig::load(&path)
    }

    #[test]
    fn json_round_trip_keeps_every_field() {
        let mut config = tiny();
        config.lora = Some(LoraConfig { ranks: LoraRanks::all(2), scale: 2.0 });
        assert_eq!(load_text(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn errors_name_the_file_the_field_and_what_was_expected() {
        let mut config = tiny();
        config.num_kv_heads = 3;
        let message = load_text(&config.to_json()).unwrap_err().to_string();
        assert!(message.contains("config.json"), "{message}");
        assert!(message.contains("`num_kv_heads` is 3, expected a divisor of `num_heads` (4)"), "{message}");
    }

    #[test]
    fn unknown_fields_and_other_versions_are_refused() {
        let unknown = tiny().to_json().replacen('{', "{\"num_layers\": 4,", 1);
        let message = load_text(&unknown).unwrap_err().to_string();
        assert!(message.contains("unknown field `num_layers`"), "{message}");

        let mut config = tiny();
        config.schema_version = 9;
        let invalid = config.validate().unwrap_err();
        assert_eq!((invalid.field, invalid.found.as_str()), ("schema_version", "9"));
    }

    #[test]
    fn absurd_sizes_are_refused_without_overflow() {
        let refused = |change: &dyn Fn(&mut ModelConfig)| {
            let mut config = tiny();
            change(&mut config);
            config.validate().unwrap_err().field
        };
        assert_eq!(refused(&|config| config.vocab_size = usize::MAX), "vocab_size");
        assert_eq!(refused(&|config| (config.num_heads, config.head_dim) = (1 << 20, 1 << 20)), "num_heads x head_dim");
        assert_eq!(refused(&|config| config.num_loops = MAX_SIZE), "number of layers");
        assert_eq!(refused(&|config| config.num_loops = MAX_LOOPS + 1), "num_loops");
        assert_eq!(refused(&|config| config.coda_layers = usize::MAX), "number of layers");
        assert_eq!(refused(&|config| config.max_positions = usize::MAX), "max_positions");
        assert_eq!(refused(&|config| config.head_lora_rank = usize::MAX), "head_lora_rank");
        assert_eq!(refused(&|config| (config.gate, config.gate_hidden) = (true, usize::MAX)), "gate_hidden");
        assert_eq!(refused(&|config| config.gate_hidden = 4), "gate_hidden");
        let lora = LoraConfig { ranks: LoraRanks { o: usize::MAX, ..LoraRanks::default() }, scale: 1.0 };
        assert_eq!(refused(&|config| config.lora = Some(lora.clone())), "lora.ranks.o");
    }

    #[test]
    fn windows_have_a_rotary_base_of_their_own_and_no_scaling() {
        let mut config = tiny();
        config.head_dim = 8;
        config.prelude_layers = 1;
        config.architecture.rotary_dims = Some(4);
        config.architecture.rope_theta = 100.0;
        config.architecture.rope_scaling = Some(RopeScaling::Linear { factor: 2.0 });
        config.architecture.sliding_window = Some(SlidingWindow { tokens: 5, rope_theta: 16.0, layers: vec![2, 4] });
        let (global, local) = (Place::Block { depth: 0, layer: 0 }, Place::Block { depth: 1, layer: 1 });
        assert_eq!((config.window(global), config.window(local)), (None, Some(5)));
        assert_eq!(config.rotary_frequencies(global), [0.5, 0.05]);
        assert_eq!(config.rotary_frequencies(local), [1.0, 0.25]);
    }

    #[test]
    fn llama3_scaling_keeps_high_frequencies_and_divides_low_ones() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_positions: 100 };
        let turning = |times: f32| times * std::f32::consts::TAU / 100.0;
        let close = |found: f32, expected: f32| (found / expected - 1.0).abs() < 1e-6;
        assert!(close(scaling.stretch(turning(5.0)), turning(5.0)));
        assert!(close(scaling.stretch(turning(0.5)), turning(0.5) / 8.0));
        assert!(close(scaling.stretch(turning(2.5)), turning(2.5) * (0.5 + 0.5 / 8.0)));
    }

    #[test]
    fn zero_sizes_and_odd_heads_are_refused() {
        let mut config = tiny();
        config.num_loops = 0;
        assert_eq!(config.validate().unwrap_err().field, "num_loops");
        let mut config = tiny();
        config.head_dim = 3;
        assert_eq!(config.validate().unwrap_err().field, "head_dim");
    }
}
