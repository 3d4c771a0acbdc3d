//! The families of Hugging Face models: their `config.json`, both ways.

use serde_json::{Map, Value, json};

use super::keys::{Keys, Kind};
use super::looped;
use super::names::{self, Naming};
use super::{Result, num_layers, rules};
use crate::config::{Activation, Architecture, ModelConfig, Norm, RopeScaling, Sharing, SlidingWindow};

/// Every how many layers Gemma 3 sees all tokens, where its configuration does not say.
pub(super) const GEMMA3_PATTERN: usize = 6;
/// Rotary base of Gemma 3's sliding layers, where its configuration does not say.
pub(super) const GEMMA3_LOCAL_THETA: f32 = 10_000.0;
const FULL_ATTENTION: &str = "full_attention";
const SLIDING_ATTENTION: &str = "sliding_attention";

/// A family of Hugging Face models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    SmolLm3,
    Gemma,
    Gemma3,
    GptNeoX,
    Ouro,
    Nanbeige,
    Raven,
}

impl Family {
    pub const ALL: [Self; 11] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::SmolLm3,
        Self::Gemma,
        Self::Gemma3,
        Self::GptNeoX,
        Self::Ouro,
        Self::Nanbeige,
        Self::Raven,
    ];

    /// The family of a `config.json`, by its architecture or else its model type, which must agree: transformers goes
    /// by the model type, others by the architecture.
    pub fn of(keys: &Keys) -> Result<Self> {
        let architectures: Vec<String> = keys.optional("architectures")?.unwrap_or_default();
        let model_type: Option<String> = keys.optional("model_type")?;
        let (key, name, known): (_, _, fn(Self) -> &'static str) = match (architectures.into_iter().next(), &model_type)
        {
            (Some(name), _) => ("architectures", name, Self::architecture),
            (None, Some(name)) => ("model_type", name.clone(), Self::model_type),
            (None, None) => return Err(keys.refuse("model_type", "a string")),
        };
        let expected = || format!("one of {}", Self::ALL.map(known).join(", "));
        let family = Self::ALL.into_iter().find(|family| known(*family) == name);
        let family = family.ok_or_else(|| keys.refuse(key, &expected()))?;
        match model_type {
            Some(found) if found != family.model_type() => {
                let expected = format!("{:?}, which goes with {}", family.model_type(), family.architecture());
                Err(keys.refuse("model_type", &expected))
            }
            _ => Ok(family),
        }
    }

    fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::SmolLm3 => "SmolLM3ForCausalLM",
            Self::Gemma => "GemmaForCausalLM",
            Self::Gemma3 => "Gemma3ForCausalLM",
            Self::GptNeoX => "GPTNeoXForCausalLM",
            Self::Ouro => "OuroForCausalLM",
            Self::Nanbeige => "NanbeigeForCausalLM",
            Self::Raven => "RavenForCausalLM",
        }
    }

    /// The family's name in `config.json`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::SmolLm3 => "smollm3",
            Self::Gemma => "gemma",
            Self::Gemma3 => "gemma3_text",
            Self::GptNeoX => "gpt_neox",
            Self::Ouro => "ouro",
            Self::Nanbeige => "nanbeige",
            Self::Raven => "huginn_raven",
        }
    }

    /// What the family calls its tensors.
    pub fn naming(self) -> &'static Naming {
        match self {
            Self::Llama | Self::Mistral | Self::Qwen2 | Self::Qwen3 | Self::SmolLm3 | Self::Nanbeige => &names::LLAMA,
            Self::Ouro => &names::OURO,
            Self::Raven => &names::RAVEN,
            Self::Gemma | Self::Gemma3 => &names::GEMMA,
            Self::GptNeoX => &names::GPT_NEOX,
        }
    }

    /// Whether the family's models have loops of their own.
    pub fn is_looped(self) -> bool {
        matches!(self, Self::Ouro | Self::Nanbeige | Self::Raven)
    }

    /// The key that counts the layers, or most of them.
    pub fn layers_key(self) -> &'static str {
        if self == Self::Raven { "n_layers_in_recurrent_block" } else { "num_hidden_layers" }
    }

    /// Reads a `config.json` of the family: the loops of a looped model, or all layers in one block that runs once.
    pub fn config(self, keys: &Keys) -> Result<ModelConfig> {
        rules::check(keys, self.model_type())?;
        match self {
            Self::Llama => llama(keys),
            Self::Mistral => mistral(keys),
            Self::Qwen2 => qwen2(keys),
            Self::Qwen3 => qwen3(keys),
            Self::SmolLm3 => smollm3(keys),
            Self::Gemma => gemma(keys),
            Self::Gemma3 => gemma3(keys),
            Self::GptNeoX => gpt_neox(keys),
            Self::Ouro => looped::ouro(keys),
            Self::Nanbeige => looped::nanbeige(keys),
            Self::Raven => looped::raven(keys),
        }
    }

    /// The `config.json` of a model, as far as the family can say what it does. Of a model with loops, only families with
    /// loops can.
    pub fn to_json(self, config: &ModelConfig) -> Map<String, Value> {
        let architecture = &config.architecture;
        let own = match self {
            Self::Llama => llama_json(config),
            Self::Mistral => mistral_json(config),
            Self::Qwen2 => beside(llama_json(config), json!({"attention_bias": null, "mlp_bias": false})),
            Self::Qwen3 => beside(llama_json(config), json!({"mlp_bias": false})),
            Self::SmolLm3 => smollm3_json(config),
            Self::Ouro => looped::ouro_json(config),
            Self::Nanbeige => looped::nanbeige_json(config),
            Self::Raven => return self.object([looped::raven_json(config)]),
            Self::Gemma => Value::Object(gemma_like_json(config, "hidden_act")),
            Self::Gemma3 => gemma3_json(config),
            Self::GptNeoX => gpt_neox_json(config),
        };
        let common = json!({
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": if self.is_looped() { config.block_layers } else { config.num_layers() },
            "num_attention_heads": config.num_heads,
            "max_position_embeddings": config.max_positions,
            "tie_word_embeddings": config.tie_embeddings,
            "attention_bias": architecture.qkv_bias,
            "rope_scaling": architecture.rope_scaling.map(scaling_json),
            "bos_token_id": null,
            "eos_token_id": null,
            "pad_token_id": null,
        });
        self.object([common, own])
    }

    /// The keys of several objects, and those that name the family.
    fn object<const N: usize>(self, objects: [Value; N]) -> Map<String, Value> {
        let named = json!({"architectures": [self.architecture()], "model_type": self.model_type()});
        let objects = objects.into_iter().chain([named]).filter_map(|object| match object {
            Value::Object(object) => Some(object),
            _ => None,
        });
        objects.flatten().collect()
    }
}

/// What all families say in the same words. `tie` is what the family takes for granted.
pub(super) fn common(keys: &Keys, tie: bool, architecture: Architecture) -> Result<ModelConfig> {
    let num_heads = keys.required("num_attention_heads")?;
    let hidden_size: usize = keys.required("hidden_size")?;
    Ok(ModelConfig {
        vocab_size: keys.required("vocab_size")?,
        hidden_size,
        intermediate_size: keys.required("intermediate_size")?,
        num_heads,
        num_kv_heads: num_heads,
        head_dim: hidden_size.checked_div(num_heads).unwrap_or(0),
        block_layers: num_layers(keys, "num_hidden_layers")?,
        num_loops: 1,
        sharing: Sharing::Nothing,
        tie_embeddings: keys.optional("tie_word_embeddings")?.unwrap_or(tie),
        max_positions: keys.required("max_position_embeddings")?,
        architecture,
        ..ModelConfig::default()
    })
}

/// A Llama, and what differs from one in its relatives.
pub(super) fn llama(keys: &Keys) -> Result<ModelConfig> {
    let (rope_theta, rope_scaling) = rope(keys, 10_000.0)?;
    let attention_bias = keys.optional("attention_bias")?.unwrap_or(false);
    let architecture = Architecture {
        norm_eps: keys.optional("rms_norm_eps")?.unwrap_or(1e-6),
        activation: activation(keys, "hidden_act")?.unwrap_or(Activation::Silu),
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: keys.optional("mlp_bias")?.unwrap_or(false),
        rope_theta,
        rope_scaling,
        ..Architecture::default()
    };
    let config = common(keys, false, architecture)?;
    Ok(ModelConfig {
        num_kv_heads: keys.optional("num_key_value_heads")?.unwrap_or(config.num_heads),
        head_dim: keys.optional("head_dim")?.unwrap_or(config.head_dim),
        ..config
    })
}

/// Mistral: all layers see the latest tokens only, if there is a window.
fn mistral(keys: &Keys) -> Result<ModelConfig> {
    let mut config = llama(keys)?;
    config.num_kv_heads = keys.optional("num_key_value_heads")?.unwrap_or(8);
    let tokens = match keys.has("sliding_window") {
        true => keys.optional("sliding_window")?,
        false => Some(4096),
    };
    if let Some(tokens) = tokens.filter(|tokens| *tokens < config.max_positions) {
        if config.architecture.rope_scaling.is_some() {
            return Err(
                keys.refuse("rope_scaling", "null beside `sliding_window`: this engine scales no sliding layers")
            );
        }
        let (rope_theta, layers) = (config.architecture.rope_theta, (0..config.block_layers).collect());
        config.architecture.sliding_window = Some(SlidingWindow { tokens, rope_theta, layers });
    }
    Ok(config)
}

fn mistral_json(config: &ModelConfig) -> Value {
    let window = config.architecture.sliding_window.as_ref().map(|window| window.tokens);
    beside(llama_json(config), json!({"sliding_window": window, "attention_bias": false}))
}

/// Qwen2: a Llama with biases on queries, keys and values.
fn qwen2(keys: &Keys) -> Result<ModelConfig> {
    let mut config = llama(keys)?;
    config.num_kv_heads = keys.optional("num_key_value_heads")?.unwrap_or(32);
    (config.architecture.qkv_bias, config.architecture.output_bias) = (true, false);
    Ok(config)
}

/// Qwen3: a Llama with norms of the heads of queries and keys.
fn qwen3(keys: &Keys) -> Result<ModelConfig> {
    let mut config = llama(keys)?;
    config.num_kv_heads = keys.optional("num_key_value_heads")?.unwrap_or(32);
    config.head_dim = keys.optional("head_dim")?.unwrap_or(128);
    config.architecture.qk_norm = true;
    Ok(config)
}

/// SmolLM3: a Llama in which every fourth layer has no rotary embedding.
fn smollm3(keys: &Keys) -> Result<ModelConfig> {
    const LAYERS: &str = "no_rope_layers";
    let mut config = llama(keys)?;
    config.num_kv_heads = keys.optional("num_key_value_heads")?.unwrap_or(4);
    config.tie_embeddings = keys.optional("tie_word_embeddings")?.unwrap_or(true);
    (config.architecture.rope_theta, config.architecture.rope_scaling) = rope(keys, 2_000_000.0)?;
    let layers = config.block_layers;
    let rotated: Vec<bool> = match keys.value(LAYERS) {
        // The key counts the layers that do rotate.
        Some(list) => {
            let flag = |layer: &Value| layer.as_u64().or(layer.as_bool().map(u64::from)).filter(|flag| *flag <= 1);
            let flags = list.as_array().filter(|list| list.len() == layers);
            let flags = flags.and_then(|list| list.iter().map(|layer| flag(layer).map(|flag| flag == 1)).collect());
            flags.ok_or_else(|| keys.refuse(LAYERS, &format!("{layers} of 0 and 1")))?
        }
        None => {
            let interval = keys.optional("no_rope_layer_interval")?.unwrap_or(4);
            (1..=layers).map(|layer| interval == 0 || !layer.is_multiple_of(interval)).collect()
        }
    };
    config.architecture.unrotated_layers = (0..layers).filter(|layer| !rotated[*layer]).collect();
    Ok(config)
}

fn smollm3_json(config: &ModelConfig) -> Value {
    let unrotated = &config.architecture.unrotated_layers;
    let rotated: Vec<u8> = (0..config.num_layers()).map(|layer| u8::from(!unrotated.contains(&layer))).collect();
    beside(llama_json(config), json!({"no_rope_layers": rotated}))
}

/// An object with the keys of another, which come first.
pub(super) fn beside(object: Value, other: Value) -> Value {
    match (object, other) {
        (Value::Object(mut object), Value::Object(other)) => {
            object.extend(other);
            Value::Object(object)
        }
        (object, _) => object,
    }
}

pub(super) fn llama_json(config: &ModelConfig) -> Value {
    let Architecture { norm_eps, activation, mlp_bias, rope_theta, .. } = config.architecture;
    json!({
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation_name(activation),
        "rms_norm_eps": decimal(norm_eps),
        "mlp_bias": mlp_bias,
        "rope_theta": decimal(rope_theta),
    })
}

/// What Gemma and Gemma 3 have in common.
fn gemma_like(keys: &Keys, architecture: Architecture) -> Result<ModelConfig> {
    let attention_bias = keys.optional("attention_bias")?.unwrap_or(false);
    let architecture = Architecture {
        norm_eps: keys.optional("rms_norm_eps")?.unwrap_or(1e-6),
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        ..architecture
    };
    let mut config = common(keys, true, architecture)?;
    config.num_kv_heads = keys.required("num_key_value_heads")?;
    config.head_dim = keys.optional("head_dim")?.unwrap_or(256);
    config.architecture.embedding_scale = embedding_scale(config.hidden_size);
    Ok(config)
}

/// `activation_key` is where readers of the family look for the activation.
fn gemma_like_json(config: &ModelConfig, activation_key: &str) -> Map<String, Value> {
    let Architecture { norm_eps, activation, rope_theta, .. } = config.architecture;
    let keys = [
        ("num_key_value_heads", json!(config.num_kv_heads)),
        ("head_dim", json!(config.head_dim)),
        (activation_key, json!(activation_name(activation))),
        ("rms_norm_eps", decimal(norm_eps)),
        ("rope_theta", decimal(rope_theta)),
    ];
    keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

fn gemma(keys: &Keys) -> Result<ModelConfig> {
    let (rope_theta, rope_scaling) = rope(keys, 10_000.0)?;
    let activation_used = match activation(keys, "hidden_act")? {
        // The first Gemmas were published with `hidden_act` "gelu" but trained with its approximation, which is what
        // transformers takes it for.
        Some(Activation::Gelu) | None => Activation::GeluTanh,
        Some(given) => given,
    };
    // transformers 4 used it, transformers 5 does not.
    if activation(keys, "hidden_activation")?.is_some_and(|given| given != activation_used) {
        let expected = format!("{}, as `hidden_act` says", activation_name(activation_used));
        return Err(keys.refuse("hidden_activation", &expected));
    }
    let architecture =
        Architecture { activation: activation_used, rope_theta, rope_scaling, ..Architecture::default() };
    gemma_like(keys, architecture)
}

fn gemma3(keys: &Keys) -> Result<ModelConfig> {
    let (rope_theta, rope_scaling, local_theta) = gemma3_rope(keys)?;
    let architecture = Architecture {
        post_norms: true,
        qk_norm: true,
        activation: activation(keys, "hidden_activation")?.unwrap_or(Activation::GeluTanh),
        rope_theta,
        rope_scaling,
        ..Architecture::default()
    };
    let mut config = gemma_like(keys, architecture)?;
    let layers = sliding_layers(keys, config.block_layers)?;
    config.architecture.attention_scale = Some(match keys.optional::<f64>("query_pre_attn_scalar")? {
        Some(scalar) => scalar.powf(-0.5) as f32,
        None => 256_f32.powf(-0.5),
    });
    config.architecture.sliding_window = match layers.is_empty() {
        true => None,
        false if keys.has("sliding_window") => {
            Some(SlidingWindow { tokens: keys.required("sliding_window")?, rope_theta: local_theta, layers })
        }
        false => Some(SlidingWindow { tokens: 4096, rope_theta: local_theta, layers }),
    };
    Ok(config)
}

/// Rotary base and scaling of the layers that see all tokens, and the base of the others. `rope_scaling` completes what
/// `rope_parameters` say of the former.
fn gemma3_rope(keys: &Keys) -> Result<(f32, Option<RopeScaling>, f32)> {
    let by_layer_type = keys.object("rope_parameters")?;
    if let Some(parameters) = &by_layer_type
        && let Some(key) = parameters.names().find(|key| ![FULL_ATTENTION, SLIDING_ATTENTION].contains(key))
    {
        return Err(parameters.refuse(key, &format!("only {FULL_ATTENTION} and {SLIDING_ATTENTION} here")));
    }
    let parameters = |layer_type| by_layer_type.as_ref().map_or(Ok(None), |keys| keys.object(layer_type));
    let scaled = keys.object("rope_scaling")?;
    if let Some(scaled) = &scaled
        && scaled.value("type").is_some()
        && scaled.value("rope_type").is_none()
    {
        return Err(scaled.refuse("rope_type", "a string: transformers passes over `type` in this family"));
    }
    let full = match (parameters(FULL_ATTENTION)?, scaled) {
        (Some(full), Some(scaled)) => Some(full.updated(scaled)),
        (full, scaled) => full.or(scaled),
    };
    let rope_scaling = full.as_ref().map_or(Ok(None), |full| scaling(full, keys))?;
    let sliding = parameters(SLIDING_ATTENTION)?;
    if let Some(sliding) = &sliding
        && scaling(sliding, keys)?.is_some()
    {
        return Err(sliding.refuse("rope_type", "\"default\": this engine scales no sliding layers"));
    }
    let theta = within(full.as_ref(), "rope_theta", keys, "rope_theta")?;
    let local_theta = within(sliding.as_ref(), "rope_theta", keys, "rope_local_base_freq")?;
    Ok((theta.unwrap_or(1e6), rope_scaling, local_theta.unwrap_or(GEMMA3_LOCAL_THETA)))
}

/// The layers of a Gemma 3 that see only the latest tokens: as listed, or all but every sixth.
fn sliding_layers(keys: &Keys, num_layers: usize) -> Result<Vec<usize>> {
    const PATTERN: &str = "sliding_window_pattern";
    let pattern = keys.optional(PATTERN)?.unwrap_or(GEMMA3_PATTERN);
    if pattern == 0 {
        return Err(keys.refuse(PATTERN, "at least 1"));
    }
    let by_pattern = sliding_by_pattern(pattern, num_layers);
    let Some(types) = keys.optional::<Vec<String>>("layer_types")? else {
        // transformers writes the key with a dash before it too, but reads only the other one.
        match keys.optional::<usize>("_sliding_window_pattern")? {
            Some(other) if other != pattern => {
                return Err(keys.refuse("_sliding_window_pattern", &format!("{pattern}, or `layer_types`")));
            }
            _ => return Ok(by_pattern),
        }
    };
    let known = types.iter().all(|layer| [FULL_ATTENTION, SLIDING_ATTENTION].contains(&layer.as_str()));
    if types.len() != num_layers || !known {
        let expected = format!("{num_layers} of {FULL_ATTENTION} and {SLIDING_ATTENTION}");
        return Err(keys.refuse("layer_types", &expected));
    }
    let layers: Vec<usize> = (0..num_layers).filter(|layer| types[*layer] == SLIDING_ATTENTION).collect();
    if keys.value(PATTERN).is_some() && layers != by_pattern {
        keys.warn(PATTERN, "not used, for `layer_types` is there");
    }
    Ok(layers)
}

/// The layers that see only the latest tokens, where every `pattern`-th sees all.
pub(super) fn sliding_by_pattern(pattern: usize, num_layers: usize) -> Vec<usize> {
    (0..num_layers).filter(|layer| !(layer + 1).is_multiple_of(pattern)).collect()
}

fn gemma3_json(config: &ModelConfig) -> Value {
    let (architecture, num_layers) = (&config.architecture, config.num_layers());
    let window = architecture.sliding_window.as_ref();
    let sliding = window.map_or(&[][..], |window| &window.layers);
    let layer_type = |layer| if sliding.contains(&layer) { SLIDING_ATTENTION } else { FULL_ATTENTION };
    // Readers older than `layer_types` know only a pattern, of which a missing last full layer is part too.
    let pattern = (1..=num_layers + 1).find(|pattern| sliding_by_pattern(*pattern, num_layers) == sliding);
    let scale = f64::from(architecture.attention_scale(config.head_dim));
    let mut keys = gemma_like_json(config, "hidden_activation");
    let own = [
        ("query_pre_attn_scalar", whole_if_exact(scale.powi(-2), |scalar| scalar.powf(-0.5) as f32)),
        ("layer_types", json!((0..num_layers).map(layer_type).collect::<Vec<_>>())),
        ("sliding_window_pattern", json!(pattern)),
        ("sliding_window", json!(window.map_or(config.max_positions, |window| window.tokens))),
        ("rope_local_base_freq", decimal(window.map_or(GEMMA3_LOCAL_THETA, |window| window.rope_theta))),
        ("attn_logit_softcapping", Value::Null),
        ("final_logit_softcapping", Value::Null),
    ];
    keys.extend(own.into_iter().map(|(key, value)| (key.to_owned(), value)));
    Value::Object(keys)
}

fn gpt_neox(keys: &Keys) -> Result<ModelConfig> {
    let parameters = rope_object(keys)?;
    let number = |key, beside| within::<f64>(parameters.as_ref(), key, keys, beside);
    let rope_theta = number("rope_theta", "rotary_emb_base")?.unwrap_or(10_000.0) as f32;
    let rope_scaling = parameters.as_ref().map_or(Ok(None), |parameters| scaling(parameters, keys))?;
    let rotated = number("partial_rotary_factor", "rotary_pct")?.unwrap_or(0.25);
    let attention_bias = keys.optional("attention_bias")?.unwrap_or(true);
    let architecture = Architecture {
        norm: Norm::Layer,
        norm_eps: keys.optional("layer_norm_eps")?.unwrap_or(1e-5),
        activation: activation(keys, "hidden_act")?.unwrap_or(Activation::Gelu),
        gated_mlp: false,
        parallel_residual: keys.optional("use_parallel_residual")?.unwrap_or(true),
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: true,
        rope_theta,
        rope_scaling,
        ..Architecture::default()
    };
    let mut config = common(keys, false, architecture)?;
    config.architecture.rotary_dims = Some((config.head_dim as f64 * rotated) as usize);
    Ok(config)
}

fn gpt_neox_json(config: &ModelConfig) -> Value {
    let architecture = &config.architecture;
    let (rotated, head_dim) = (architecture.rotary_dims(config.head_dim), config.head_dim as f64);
    // Readers multiply by the head's width and round down.
    let share = rotated as f64 / head_dim;
    let share = if (share * head_dim) as usize == rotated { share } else { share.next_up() };
    json!({
        "hidden_act": activation_name(architecture.activation),
        "layer_norm_eps": decimal(architecture.norm_eps),
        "use_parallel_residual": architecture.parallel_residual,
        "rotary_pct": share,
        "rotary_emb_base": decimal(architecture.rope_theta),
    })
}

/// Rotary base and scaling of a family whose heads rotate whole. A base within the object comes before one beside it, and
/// both before the one that is `usual` in the family.
pub(super) fn rope(keys: &Keys, usual: f32) -> Result<(f32, Option<RopeScaling>)> {
    const PARTIAL: &str = "partial_rotary_factor";
    let beside = keys.optional("rope_theta")?;
    let Some(parameters) = rope_object(keys)? else {
        return Ok((beside.unwrap_or(usual), None));
    };
    if parameters.optional(PARTIAL)?.is_some_and(|share: f64| share != 1.0) {
        return Err(parameters.refuse(PARTIAL, "null or 1: this engine computes nothing else"));
    }
    let theta = within(Some(&parameters), "rope_theta", keys, "rope_theta")?.unwrap_or(usual);
    Ok((theta, scaling(&parameters, keys)?))
}

/// A number of rotary embeddings: in the object of their parameters, or else beside it.
fn within<T: Kind + PartialEq>(object: Option<&Keys>, key: &str, keys: &Keys, beside: &str) -> Result<Option<T>> {
    let inner: Option<T> = object.map_or(Ok(None), |object| object.optional(key))?;
    let outer: Option<T> = keys.optional(beside)?;
    if inner.is_some() && outer.is_some() && inner != outer {
        keys.warn(beside, "not used, for the rotary parameters have another, as in transformers 5");
    }
    Ok(inner.or(outer))
}

/// What is said of rotary embeddings: `rope_scaling`, the older name, or else `rope_parameters`, as transformers 5 has
/// it. An empty object says nothing.
fn rope_object(keys: &Keys) -> Result<Option<Keys>> {
    let said = |key| keys.object(key).map(|object| object.filter(|object| object.names().next().is_some()));
    let (older, newer) = (said("rope_scaling")?, said("rope_parameters")?);
    if older.is_some() && newer.is_some() && keys.value("rope_scaling") != keys.value("rope_parameters") {
        keys.warn("rope_parameters", "not used, for `rope_scaling` is there, as in transformers 5");
    }
    if let Some(object) = older.as_ref().or(newer.as_ref())
        && let Some(key) = [FULL_ATTENTION, SLIDING_ATTENTION].into_iter().find(|key| object.value(key).is_some())
    {
        return Err(object.refuse(key, "one object for all layers, as their types do not differ in this family"));
    }
    Ok(older.or(newer))
}

/// The scaling that an object says, in a configuration `whole`.
fn scaling(keys: &Keys, whole: &Keys) -> Result<Option<RopeScaling>> {
    let (newer, older) = (keys.optional::<String>("rope_type")?, keys.optional::<String>("type")?);
    if newer.is_some() && older.is_some() && newer != older {
        keys.warn("type", "not used, for `rope_type` is there, as in transformers 5");
    }
    let (key, kind) = if newer.is_some() { ("rope_type", newer) } else { ("type", older) };
    let (scaling, used): (_, &[&str]) = match kind.as_deref() {
        None if keys.value("factor").is_some() => return Err(keys.refuse("factor", "null where `rope_type` is")),
        None | Some("default") => (None, &[]),
        Some("linear") => (Some(RopeScaling::Linear { factor: keys.required("factor")? }), &["factor"]),
        Some("llama3") => {
            let original = "original_max_position_embeddings";
            let original_positions = match keys.optional(original)? {
                Some(positions) => positions,
                None => whole.required("max_position_embeddings")?,
            };
            let scaling = RopeScaling::Llama3 {
                factor: keys.required("factor")?,
                low_freq_factor: keys.required("low_freq_factor")?,
                high_freq_factor: keys.required("high_freq_factor")?,
                original_positions,
            };
            (Some(scaling), &["factor", "low_freq_factor", "high_freq_factor", original])
        }
        Some(_) => return Err(keys.refuse(key, "one of default, linear, llama3")),
    };
    let always = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
    for key in keys.names().filter(|key| keys.value(key).is_some() && !always.contains(key) && !used.contains(key)) {
        keys.warn(key, "not used by this type of rope scaling");
    }
    Ok(scaling)
}

fn scaling_json(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": decimal(factor)}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => json!({
            "rope_type": "llama3",
            "factor": decimal(factor),
            "low_freq_factor": decimal(low_freq_factor),
            "high_freq_factor": decimal(high_freq_factor),
            "original_max_position_embeddings": original_positions,
        }),
    }
}

pub(super) fn activation(keys: &Keys, key: &str) -> Result<Option<Activation>> {
    let name: Option<String> = keys.optional(key)?;
    let known = |name: String| match name.as_str() {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Activation::GeluTanh),
        _ => Err(keys.refuse(key, "one of silu, gelu, gelu_pytorch_tanh, gelu_new, gelu_fast")),
    };
    name.map(known).transpose()
}

pub(super) fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    }
}

/// Gemma's factor on embeddings.
pub(super) fn embedding_scale(hidden_size: usize) -> f32 {
    (hidden_size as f32).sqrt()
}

/// A number as its shortest decimal, rather than that of the `f64` it widens to.
pub(super) fn decimal(number: f32) -> Value {
    json!(number.to_string().parse::<f64>().unwrap_or(f64::from(number)))
}

/// A number, rounded to a whole one if that reads as the same.
fn whole_if_exact(number: f64, read: impl Fn(f64) -> f32) -> Value {
    let whole = number.round();
    if read(whole) == read(number) { json!(whole as u64) } else { json!(number) }
}
