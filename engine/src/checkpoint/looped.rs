//! Families that were trained as looped models: their `config.json`, both ways. The layers that it counts are those of one
//! loop, and the loops share them.

use serde_json::{Value, json};

use super::family::{beside, decimal, embedding_scale, llama, llama_json};
use super::keys::Keys;
use super::{Result, num_layers};
use crate::config::{Activation, Architecture, InitialState, Injection, ModelConfig, Sharing};

/// Loops of an Ouro that does not say how many it has.
const OURO_LOOPS: usize = 4;
/// Epsilon and rotary base of a Huginn that does not say its own.
const RAVEN_EPS: f32 = 1e-6;
const RAVEN_THETA: f32 = 50_000.0;
/// Loops of a Huginn that does not say how many it is usually run with.
const RAVEN_LOOPS: usize = 32;

/// A Llama whose layers run several times.
fn looped(keys: &Keys, loops_key: &str, usual: usize) -> Result<ModelConfig> {
    let num_loops = keys.optional(loops_key)?.unwrap_or(usual);
    Ok(ModelConfig { num_loops, sharing: Sharing::Block, ..llama(keys)? })
}

/// Ouro (arXiv 2510.25741): a norm after attention and MLP, the final norm between loops, and one gate.
pub(super) fn ouro(keys: &Keys) -> Result<ModelConfig> {
    let mut config = looped(keys, "total_ut_steps", OURO_LOOPS)?;
    (config.norm_between_loops, config.gate, config.shared_gate) = (true, true, true);
    config.architecture.post_norms = true;
    if keys.optional("early_exit_threshold")?.is_some_and(|threshold: f64| threshold < 1.0) {
        keys.warn("early_exit_threshold", "not used: exits are by the exit policy, such as cumulative:0.95");
    }
    Ok(config)
}

pub(super) fn ouro_json(config: &ModelConfig) -> Value {
    let own = json!({"total_ut_steps": config.num_loops, "attention_bias": false});
    beside(llama_json(config), own)
}

/// Nanbeige 4.2: a Llama with the final norm between loops.
pub(super) fn nanbeige(keys: &Keys) -> Result<ModelConfig> {
    let mut config = looped(keys, "num_loops", 1)?;
    config.norm_between_loops = !keys.optional("skip_loop_final_norm")?.unwrap_or(false);
    Ok(config)
}

pub(super) fn nanbeige_json(config: &ModelConfig) -> Value {
    let own = json!({"num_loops": config.num_loops, "skip_loop_final_norm": !config.norm_between_loops});
    beside(llama_json(config), own)
}

/// Huginn (arXiv 2502.05171): prelude, block and coda, input injection, and norms of the sums with the residual.
pub(super) fn raven(keys: &Keys) -> Result<ModelConfig> {
    let hidden_size: usize = keys.required("n_embd")?;
    // The published file has the second name.
    let heads_key = if keys.value("n_heads").is_some() { "n_heads" } else { "num_attention_heads" };
    let num_heads: usize = keys.required(heads_key)?;
    let bias = keys.optional("qk_bias")?.unwrap_or(true);
    let architecture = Architecture {
        norm_eps: keys.optional("norm_eps")?.unwrap_or(RAVEN_EPS),
        post_norms: true,
        norm_after_addition: true,
        activation: Activation::Silu,
        qkv_bias: bias,
        rope_theta: keys.optional("rope_base")?.unwrap_or(RAVEN_THETA),
        embedding_scale: embedding_scale(hidden_size),
        ..Architecture::default()
    };
    let prelude = "n_layers_in_prelude";
    let has_prelude = keys.value(prelude) != Some(&json!(0));
    Ok(ModelConfig {
        vocab_size: keys.required("vocab_size")?,
        hidden_size,
        intermediate_size: keys.required("intermediate_size")?,
        num_heads,
        num_kv_heads: num_heads,
        head_dim: hidden_size.checked_div(num_heads).unwrap_or(0),
        prelude_layers: if has_prelude { num_layers(keys, prelude)? } else { 0 },
        block_layers: num_layers(keys, "n_layers_in_recurrent_block")?,
        coda_layers: num_layers(keys, "n_layers_in_coda")?,
        num_loops: keys.optional("mean_recurrence")?.unwrap_or(RAVEN_LOOPS),
        sharing: Sharing::Block,
        norm_before_coda: true,
        injection: Some(Injection { initial_state: raven_state(keys, hidden_size)? }),
        tie_embeddings: keys.optional("tie_embeddings")?.unwrap_or(true),
        max_positions: keys.required("block_size")?,
        architecture,
        ..ModelConfig::default()
    })
}

/// The state before the first loop, which the reference draws anew for every run. Its deviation is that of the initial
/// weights, times the factor of the embeddings.
fn raven_state(keys: &Keys, hidden_size: usize) -> Result<InitialState> {
    if keys.value("state_init") == Some(&json!("zero")) {
        return Ok(InitialState::Zeros);
    }
    let values = keys.object("init_values")?;
    let said: Option<f64> = values.map_or(Ok(None), |values| values.optional("std"))?;
    let deviation = said.unwrap_or_else(|| initial_deviation(hidden_size)) * (hidden_size as f64).sqrt();
    Ok(match deviation > 0.0 {
        true => InitialState::Normal { deviation: deviation as f32, seed: 0 },
        false => InitialState::Zeros,
    })
}

/// Deviation of the initial weights of a Huginn (arXiv 2312.16903).
fn initial_deviation(hidden_size: usize) -> f64 {
    (2.0 / (5.0 * hidden_size as f64)).sqrt()
}

pub(super) fn raven_json(config: &ModelConfig) -> Value {
    let architecture = &config.architecture;
    let deviation = match config.injection.map(|injection| injection.initial_state) {
        Some(InitialState::Normal { deviation, .. }) => f64::from(deviation) / (config.hidden_size as f64).sqrt(),
        Some(InitialState::Zeros) | None => 0.0,
    };
    json!({
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "n_layers": config.prelude_layers + config.block_layers + config.coda_layers,
        "n_layers_in_prelude": config.prelude_layers,
        "n_layers_in_recurrent_block": config.block_layers,
        "n_layers_in_coda": config.coda_layers,
        "mean_recurrence": config.num_loops,
        "block_size": config.max_positions,
        "tie_embeddings": config.tie_embeddings,
        "norm_eps": decimal(architecture.norm_eps),
        "qk_bias": architecture.qkv_bias,
        "rope_base": decimal(architecture.rope_theta),
        "init_values": {"std": deviation},
        "block_class_name": "SandwichBlock",
        "norm_class_name": "RMSNorm_llama",
        "mlp_class_name": "GatedMLP",
        "nonlin_name": "SiLU",
        "injection_type": "linear",
        "bias": false,
    })
}
