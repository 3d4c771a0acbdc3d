//! The shape of a dense decoder-only model, as its Hugging Face `config.json` gives it.

use std::path::Path;

use serde::Deserialize;

use crate::error::{ImportError, read_text};

/// Sizes of a Llama- or Gemma-style model, and how it is made recursive.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// The kind of architecture, as `model_type` says it.
    pub kind: String,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Width of the MLP.
    pub intermediate: u64,
    /// Layers that a token passes at full depth, all loops together.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Words of the vocabulary.
    pub vocab: u64,
    /// Whether embedding and exit head are the same weights.
    pub tied: bool,
    /// Bytes of a weight.
    pub weight_bytes: u64,
    /// Times the block runs; its layers are `layers / num_loops`.
    pub num_loops: u64,
    /// Rank of each loop's own low-rank weights on every linear layer; 0 for none.
    pub lora_rank: u64,
}

#[derive(Deserialize)]
struct Config {
    model_type: String,
    hidden_size: u64,
    intermediate_size: u64,
    num_hidden_layers: u64,
    num_attention_heads: u64,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    vocab_size: u64,
    tie_word_embeddings: Option<bool>,
    #[serde(alias = "dtype")]
    torch_dtype: Option<String>,
    #[serde(alias = "num_local_experts", alias = "num_experts", alias = "n_routed_experts")]
    experts: Option<u64>,
}

impl ModelShape {
    /// Reads `config.json` of a vanilla model and makes it run its layers as `num_loops` loops of one block.
    ///
    /// # Errors
    /// If the file does not read, is of a model with experts, or its layers do not make `num_loops` equal blocks.
    pub fn read(path: impl AsRef<Path>, num_loops: u64, lora_rank: u64) -> Result<Self, ImportError> {
        let path = path.as_ref();
        let config: Config =
            serde_json::from_str(&read_text(path)?).map_err(|error| ImportError::malformed(path, error))?;
        if config.experts.is_some_and(|experts| experts > 0) {
            return Err(ImportError::unusable(path, "a model with experts", "a dense model"));
        }
        if num_loops == 0 || num_loops > 64 || !config.num_hidden_layers.is_multiple_of(num_loops) {
            let found = format!("{} layers", config.num_hidden_layers);
            return Err(ImportError::unusable(path, found, format!("layers that make {num_loops} equal loops")));
        }
        let sizes = [
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_hidden_layers", config.num_hidden_layers),
            ("num_attention_heads", config.num_attention_heads),
            ("num_key_value_heads", config.num_key_value_heads.unwrap_or(1)),
            ("head_dim", config.head_dim.unwrap_or(1)),
            ("vocab_size", config.vocab_size),
        ];
        if let Some((key, size)) = sizes.into_iter().find(|(_, size)| !(1..1 << 32).contains(size)) {
            return Err(ImportError::unusable(path, format!("{key} {size}"), "a size of at least 1"));
        }
        let weight_bytes = match config.torch_dtype.as_deref() {
            None | Some("bfloat16" | "float16") => 2,
            Some("float32") => 4,
            Some(other) => {
                return Err(ImportError::unusable(
                    path,
                    format!("torch_dtype {other}"),
                    "bfloat16, float16 or float32",
                ));
            }
        };
        Ok(Self {
            tied: config.tie_word_embeddings.unwrap_or(config.model_type.starts_with("gemma")),
            kind: config.model_type,
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads.unwrap_or(config.num_attention_heads),
            head_dim: config.head_dim.unwrap_or(config.hidden_size / config.num_attention_heads).max(1),
            vocab: config.vocab_size,
            weight_bytes,
            num_loops,
            lora_rank,
        })
    }

    /// Layers of the block.
    pub fn block_layers(&self) -> u64 {
        self.layers / self.num_loops
    }

    /// Norms of a layer: two, and two more around the outputs in Gemma 2 and 3.
    pub fn norms_per_layer(&self) -> u64 {
        if self.kind.starts_with("gemma2") || self.kind.starts_with("gemma3") { 4 } else { 2 }
    }

    /// The linear layers of a layer as they are run, (inputs, outputs) of each: queries, keys and values in one;
    /// attention output; gate and up projection in one; down projection.
    pub fn linears(&self) -> [(u64, u64); 4] {
        let attention = self.heads * self.head_dim;
        [
            (self.hidden, attention + 2 * self.kv_heads * self.head_dim),
            (attention, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        ]
    }

    /// Bytes of the low-rank weights of one loop.
    pub fn lora_bytes_per_loop(&self) -> u64 {
        let widths: u64 = self.linears().into_iter().map(|(inputs, outputs)| inputs + outputs).sum();
        self.block_layers() * widths * self.lora_rank * self.weight_bytes
    }

    /// Bytes of all weights: the block once, low-rank weights for each loop.
    pub fn total_weight_bytes(&self) -> u64 {
        let linears: u64 = self.linears().into_iter().map(|(inputs, outputs)| inputs * outputs).sum();
        let layer = linears + self.norms_per_layer() * self.hidden;
        let embeddings = self.vocab * self.hidden * if self.tied { 1 } else { 2 };
        let shared = embeddings + self.hidden + self.block_layers() * layer;
        shared * self.weight_bytes + self.num_loops * self.lora_bytes_per_loop()
    }

    /// Bytes of keys and values of one token at one depth.
    pub fn kv_bytes_per_depth(&self) -> u64 {
        self.block_layers() * 2 * self.kv_heads * self.head_dim * self.weight_bytes
    }

    /// Name for people: the kind and what was made of it.
    pub fn describe(&self) -> String {
        match self.num_loops {
            1 => format!("{}, {} layers", self.kind, self.layers),
            loops => {
                format!("{}, {loops} loops of {} layers, LoRA rank {}", self.kind, self.block_layers(), self.lora_rank)
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const LLAMA: &str = r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;
    pub(crate) const GEMMA: &str = r#"{"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
        "vocab_size": 256000, "torch_dtype": "bfloat16"}"#;

    pub(crate) fn shape(config: &str, num_loops: u64, lora_rank: u64) -> Result<ModelShape, ImportError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, config).unwrap();
        ModelShape::read(path, num_loops, lora_rank)
    }

    #[test]
    fn parameters_are_those_of_the_published_models() {
        let llama = shape(LLAMA, 1, 0).unwrap();
        assert_eq!(llama.total_weight_bytes() / 2, 8_030_261_248);
        assert_eq!(llama.kv_bytes_per_depth(), 131_072);
        assert_eq!(shape(GEMMA, 1, 0).unwrap().total_weight_bytes() / 2, 2_506_172_416);
    }

    #[test]
    fn a_block_is_stored_once_and_low_rank_weights_for_each_loop() {
        let [vanilla, recursive, relaxed] = [(1, 0), (3, 0), (3, 64)].map(|(l, r)| shape(GEMMA, l, r).unwrap());
        let embedding = 256_000 * 2048 * 2;
        let layers = |model: &ModelShape| model.total_weight_bytes() - embedding - 2 * 2048;
        assert_eq!(layers(&vanilla), 3 * layers(&recursive));
        assert_eq!(vanilla.kv_bytes_per_depth(), 3 * recursive.kv_bytes_per_depth());
        let added = relaxed.total_weight_bytes() - recursive.total_weight_bytes();
        assert_eq!(added, 3 * 6 * 64 * 2 * (2048 + 2560 + 2048 + 2048 + 2048 + 32768 + 16384 + 2048));
    }

    #[test]
    fn other_models_are_refused() {
        let error = |config: &str, loops| shape(config, loops, 0).unwrap_err().to_string();
        assert!(error(LLAMA, 3).contains("found 32 layers, expected layers that make 3 equal loops"));
        let experts = LLAMA.replace("{\"model", "{\"num_experts\": 8, \"model");
        assert!(error(&experts, 1).contains("a model with experts"));
        assert!(error(&LLAMA.replace("4096", "0"), 1).contains("hidden_size 0"));
        assert!(error("{}", 1).contains("missing field `model_type`"));
    }
}
