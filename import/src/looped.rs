//! Models that were made with loops: Ouro, Nanbeige and Huginn, from the keys of their `config.json`.
//!
//! | | `ouro` | `nanbeige` | `huginn_raven` |
//! | --- | --- | --- | --- |
//! | loops | `total_ut_steps` | `num_loops` | `mean_recurrence` |
//! | block | all layers | all layers | `n_layers_in_recurrent_block` layers |
//! | before the first loop | | | `n_layers_in_prelude` layers |
//! | in each loop, beside the layers | final norm, gate | final norm, unless `skip_loop_final_norm` | product of state and prelude's output, from two widths to one |
//! | of a token that exits | head | head | norm, `n_layers_in_coda` layers, norm, head |
//! | norms of a layer | 4 | 2 | 4 |
//!
//! Sources: `modeling_ouro.py` of ByteDance's release and arXiv 2510.25741; `model.py` of PyPI's `nanbeige-mlx`;
//! `recpre/raven_modeling_minimal.py` of seal-rg/recurrent-pretraining and arXiv 2502.05171.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::ImportError;

/// What a token runs besides the layers of the block. All zero in a vanilla model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutsideBlock {
    /// Layers before the first loop.
    pub prelude_layers: u64,
    /// Layers of a token that exits, before the head.
    pub coda_layers: u64,
    /// Whether each loop begins with a product of the hidden state and the prelude's output, from two widths to one.
    pub adapter: bool,
    /// Norms of each loop beside those of its layers.
    pub loop_norms: u64,
    /// Norms of a token that exits.
    pub exit_norms: u64,
    /// Whether each loop ends with a gate: a product of the hidden state with one vector.
    pub gate: bool,
    /// Biases of a layer, in elements.
    pub layer_biases: u64,
}

/// Loops of a model that was made with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loops {
    /// Number of loops, unless another is asked for.
    pub count: u64,
    /// Norms of a layer.
    pub norms_per_layer: u64,
    /// What is not in the block.
    pub outside: OutsideBlock,
}

/// Architectures that were made with loops.
const OURO: &str = "ouro";
const NANBEIGE: &str = "nanbeige";
const HUGINN: &str = "huginn_raven";

/// Optional parts of Nanbeige that change what a loop computes.
const NANBEIGE_OPTIONS: [&str; 12] = [
    "emb_neighbor_num",
    "enable_depth_attention",
    "enable_double_loop_split",
    "enable_hyper_connection",
    "enable_mhc",
    "insert_ngram_layer_idx",
    "loop_middle_layers",
    "loop_share_kv",
    "ngram_embedding_hidden_size",
    "ngram_insert_all_layers",
    "ngram_vocab_size_ratio",
    "qk_layernorm",
];

/// Keys of Huginn in the spelling of other models, with this one's first.
const HUGINN_KEYS: [(&str, &str); 5] = [
    ("n_embd", "hidden_size"),
    ("n_heads", "num_attention_heads"),
    ("n_layers_in_recurrent_block", "num_hidden_layers"),
    ("padded_vocab_size", "vocab_size"),
    ("tie_embeddings", "tie_word_embeddings"),
];

/// Parts of Huginn's code, by name, whose operations are known.
const HUGINN_PARTS: [(&str, &str); 4] = [
    ("injection_type", "linear"),
    ("block_class_name", "SandwichBlock"),
    ("mlp_class_name", "GatedMLP"),
    ("norm_class_name", "RMSNorm_llama"),
];

/// Keys of Huginn beside those in [`HUGINN_KEYS`].
#[derive(Deserialize)]
struct Huginn {
    mean_recurrence: u64,
    n_embd: u64,
    n_layers: Option<u64>,
    n_layers_in_prelude: u64,
    n_layers_in_recurrent_block: u64,
    n_layers_in_coda: u64,
    qk_bias: Option<bool>,
}

/// The loops of a model that was made with them, or `None`. Respells the keys as other models do.
///
/// # Errors
/// If a key is missing or has no valid value, or asks for something that the loops of this module lack.
pub(crate) fn read_loops(path: &Path, keys: &mut Map<String, Value>) -> Result<Option<Loops>, ImportError> {
    let unusable = |key: &str, value: &Value, expected: &str| {
        Err(ImportError::unusable(path, format!("{key} {value}"), expected.to_owned()))
    };
    let kind = keys.get("model_type").and_then(Value::as_str).unwrap_or_default().to_owned();
    match kind.as_str() {
        OURO => {
            let outside = OutsideBlock { loop_norms: 1, gate: true, ..OutsideBlock::default() };
            Ok(Some(Loops { count: count(path, keys, "total_ut_steps")?, norms_per_layer: 4, outside }))
        }
        NANBEIGE => {
            let is_on = |value: &Value| match value {
                Value::Null | Value::Bool(false) => false,
                Value::Array(items) => !items.is_empty(),
                other => other.as_u64() != Some(0),
            };
            let refused = |key: &str| NANBEIGE_OPTIONS.contains(&key);
            if let Some((key, value)) = keys.iter().find(|(key, value)| refused(key) && is_on(value)) {
                return unusable(key, value, "a model without it");
            }
            let skips = keys.get("skip_loop_final_norm").is_some_and(is_on);
            let outside =
                OutsideBlock { loop_norms: u64::from(!skips), exit_norms: u64::from(skips), ..OutsideBlock::default() };
            Ok(Some(Loops { count: count(path, keys, "num_loops")?, norms_per_layer: 2, outside }))
        }
        HUGINN => {
            if let Some((key, value, expected)) = HUGINN_PARTS.into_iter().find_map(|(key, expected)| {
                keys.get(key).filter(|value| value.as_str() != Some(expected)).map(|value| (key, value, expected))
            }) {
                return unusable(key, value, expected);
            }
            let huginn = Huginn::deserialize(Value::Object(keys.clone()))
                .map_err(|error| ImportError::malformed(path, error))?;
            let around = huginn.n_layers_in_prelude.saturating_add(huginn.n_layers_in_coda);
            let layers = around.saturating_add(huginn.n_layers_in_recurrent_block);
            if huginn.n_layers.is_some_and(|all| all != layers) || layers > 1 << 12 {
                let found = format!("n_layers_in_prelude, _in_recurrent_block and _in_coda of {layers} layers in all");
                let all = huginn.n_layers.unwrap_or(1 << 12);
                return Err(ImportError::unusable(path, found, format!("the {all} of n_layers, at most 4096")));
            }
            for (own, other) in HUGINN_KEYS {
                if let Some(value) = keys.get(own).cloned() {
                    keys.insert(other.to_owned(), value);
                }
            }
            let outside = OutsideBlock {
                prelude_layers: huginn.n_layers_in_prelude,
                coda_layers: huginn.n_layers_in_coda,
                adapter: true,
                exit_norms: 2,
                layer_biases: if huginn.qk_bias.unwrap_or(true) { huginn.n_embd.saturating_mul(2) } else { 0 },
                ..OutsideBlock::default()
            };
            Ok(Some(Loops { count: huginn.mean_recurrence, norms_per_layer: 4, outside }))
        }
        _ => Ok(None),
    }
}

fn count(path: &Path, keys: &Map<String, Value>, key: &str) -> Result<u64, ImportError> {
    match keys.get(key).and_then(Value::as_u64) {
        Some(count) => Ok(count),
        None => {
            let found = keys.get(key).map_or(format!("no {key}"), |value| format!("{key} {value}"));
            Err(ImportError::unusable(path, found, "the number of loops"))
        }
    }
}
