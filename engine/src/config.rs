//! The model configuration, `config.json`: the sizes of a recursive transformer.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The only `schema_version` this build reads and writes.
pub const SCHEMA_VERSION: u32 = 1;
/// The only `model_type` this build reads and writes.
pub const MODEL_TYPE: &str = "depthwise-recursive";

/// Sizes of a recursive transformer: `block_layers` Llama layers, run `num_loops` times with the
/// same weights, between an embedding and a head that every loop's output can be read through.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Version of this file format, [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Always [`MODEL_TYPE`].
    pub model_type: String,
    /// Number of tokens the embedding and the head know.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between the MLP's up and down projections.
    pub intermediate_size: usize,
    /// Number of query heads.
    pub num_heads: usize,
    /// Number of key-value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; even, because rotary embeddings turn pairs.
    pub head_dim: usize,
    /// Layers in the shared block.
    pub block_layers: usize,
    /// Times the block is run at full depth.
    pub num_loops: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Added to the mean square before its root is taken.
    pub rms_norm_eps: f32,
    /// Whether the head is the embedding transposed.
    pub tie_embeddings: bool,
    /// Longest sequence, in tokens, that the model may be asked to run.
    pub max_positions: usize,
    /// Low-rank differences between the loops, or none: then all loops are equal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
}

/// Low-rank adapters that let each loop's projections differ (arXiv 2410.20672, section 2.3):
/// a loop's projection is `W x + alpha / rank * B A x`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of every adapter.
    pub rank: usize,
    /// Numerator of the adapters' scale.
    pub alpha: f32,
}

impl LoraConfig {
    /// The factor on an adapter's output, `alpha / rank`.
    pub fn scale(&self) -> f64 {
        f64::from(self.alpha) / self.rank as f64
    }
}

/// Why a model configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: cannot read the model configuration: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not JSON, lacks a field, or has one of the wrong type or an unknown one.
    #[error("{}: not a model configuration: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
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
    /// Its value.
    pub found: String,
    /// What is allowed.
    pub expected: String,
}

impl ModelConfig {
    /// Reads and validates a `config.json`.
    ///
    /// # Errors
    /// If the file is unreadable, not such a configuration, or out of range.
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

    /// Checks that the sizes make a model.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<(), InvalidField> {
        let check = |holds: bool, field, found: &dyn ToString, expected: &dyn ToString| {
            let invalid = || InvalidField { field, found: found.to_string(), expected: expected.to_string() };
            if holds { Ok(()) } else { Err(invalid()) }
        };
        let version = self.schema_version;
        check(version == SCHEMA_VERSION, "schema_version", &version, &SCHEMA_VERSION)?;
        let model_type = &self.model_type;
        check(model_type == MODEL_TYPE, "model_type", model_type, &MODEL_TYPE)?;
        for (field, size) in self.sizes() {
            check(size >= 1, field, &size, &"at least 1")?;
        }
        let kv_heads = self.num_kv_heads;
        let divides = format!("a divisor of `num_heads` ({})", self.num_heads);
        check(self.num_heads.is_multiple_of(kv_heads), "num_kv_heads", &kv_heads, &divides)?;
        let head_dim = self.head_dim;
        check(head_dim.is_multiple_of(2), "head_dim", &head_dim, &"an even number")?;
        let positive = |value: f32| value.is_finite() && value > 0.0;
        let number = "a finite number above 0";
        check(positive(self.rope_theta), "rope_theta", &self.rope_theta, &number)?;
        check(positive(self.rms_norm_eps), "rms_norm_eps", &self.rms_norm_eps, &number)?;
        if let Some(lora) = &self.lora {
            check(lora.rank >= 1, "lora.rank", &lora.rank, &"at least 1")?;
            check(lora.alpha.is_finite(), "lora.alpha", &lora.alpha, &"a finite number")?;
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

    /// The projections of a layer: name within the layer, and weight shape `[out, in]`.
    pub fn projections(&self) -> [(&'static str, [usize; 2]); 7] {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        [
            ("self_attn.q_proj", [self.q_size(), hidden]),
            ("self_attn.k_proj", [self.kv_size(), hidden]),
            ("self_attn.v_proj", [self.kv_size(), hidden]),
            ("self_attn.o_proj", [hidden, self.q_size()]),
            ("mlp.gate_proj", [inner, hidden]),
            ("mlp.up_proj", [inner, hidden]),
            ("mlp.down_proj", [hidden, inner]),
        ]
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A model small enough for any test.
    pub(crate) fn tiny() -> ModelConfig {
        ModelConfig {
            schema_version: SCHEMA_VERSION,
            model_type: MODEL_TYPE.to_owned(),
            vocab_size: 11,
            hidden_size: 8,
            intermediate_size: 12,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 4,
            block_layers: 2,
            num_loops: 3,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_embeddings: true,
            max_positions: 16,
            lora: None,
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
        config.lora = Some(LoraConfig { rank: 2, alpha: 4.0 });
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
    fn zero_sizes_and_odd_heads_are_refused() {
        let mut config = tiny();
        config.num_loops = 0;
        assert_eq!(config.validate().unwrap_err().field, "num_loops");
        let mut config = tiny();
        config.head_dim = 3;
        assert_eq!(config.validate().unwrap_err().field, "head_dim");
    }
}
