//! Shape of a dense decoder-only model, vanilla or looped, from its Hugging Face `config.json`.

use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;

use crate::error::{ImportError, read_text};
use crate::looped::{OutsideBlock, read_loops};

/// Sizes of a Llama- or Gemma-style model and its loops.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    /// Architecture, as in `model_type`.
    pub kind: String,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Width of the MLP.
    pub intermediate: u64,
    /// Layers of the block that a token runs at full depth, over all loops.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Size of the vocabulary.
    pub vocab: u64,
    /// Whether embedding and exit head share their weights.
    pub tied: bool,
    /// Window of sliding-window layers in tokens, if there are such layers.
    pub window: Option<u64>,
    /// Bytes per element of activations, keys, values, and weights outside the linear layers.
    pub weight_bytes: u64,
    /// Quantization of the block's linear layers, if any.
    pub quantized: Option<Quantized>,
    /// Bytes per element of keys and values.
    pub kv_bytes: u64,
    /// Devices that share each layer (tensor parallelism). Heads, the width of the MLP and the vocabulary are those of one.
    pub devices: u64,
    /// Number of loops; the block has `layers / num_loops` layers.
    pub num_loops: u64,
    /// Rank of each loop's low-rank weights on every linear layer; 0 for none.
    pub lora_rank: u64,
    /// Norms of a layer.
    pub norms_per_layer: u64,
    /// What a token runs besides the block's layers, if the model was made with loops.
    pub outside: Option<OutsideBlock>,
}

/// Linear layers in 8-bit or 4-bit floats; head, embedding and low-rank weights are not quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantized {
    /// 8 bits, with a scale for each weight or each of its outputs.
    Fp8,
    /// 8 bits, with a scale for each block of a weight.
    Fp8Blocks,
    /// 4 bits, with an 8-bit scale for each 16 elements.
    Nvfp4,
}

/// Number type of linear layers, as on the command line: `bf16`, `fp8`, `fp8-block` or `nvfp4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearType(pub Option<Quantized>);

impl LinearType {
    const ALL: [(&str, Option<Quantized>); 4] = [
        ("bf16", None),
        ("fp8", Some(Quantized::Fp8)),
        ("fp8-block", Some(Quantized::Fp8Blocks)),
        ("nvfp4", Some(Quantized::Nvfp4)),
    ];

    /// The name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, kind)| *kind == self.0).map_or("", |(name, _)| name)
    }
}

impl FromStr for LinearType {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, kind)| Self(*kind)).ok_or_else(|| format!("`{name}`: expected bf16, fp8, fp8-block or nvfp4"))
    }
}

/// Number type of keys and values, as on the command line: `bf16` or `fp8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvType {
    /// 16 bits.
    Bf16,
    /// 8 bits.
    Fp8,
}

impl KvType {
    /// The name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
        }
    }

    /// Bytes of an element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }
}

impl FromStr for KvType {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let found = [Self::Bf16, Self::Fp8].into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| format!("`{name}`: expected bf16 or fp8"))
    }
}

/// The keys that describe a model's shape. Models with an image encoder have them in `text_config`.
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
    dtype: Option<String>,
    torch_dtype: Option<String>,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    quantization_config: Option<Quantization>,
}

/// Quantization of a checkpoint's linear layers.
#[derive(Deserialize)]
struct Quantization {
    quant_method: String,
    quant_algo: Option<String>,
    weight_block_size: Option<[u64; 2]>,
}

impl Quantization {
    fn kind(&self, path: &Path) -> Result<Quantized, ImportError> {
        match (self.quant_method.as_str(), self.quant_algo.as_deref()) {
            ("fp8", _) if self.weight_block_size.is_some() => Ok(Quantized::Fp8Blocks),
            ("fp8" | "fbgemm_fp8", _) | ("modelopt", Some("FP8")) => Ok(Quantized::Fp8),
            ("modelopt", Some("NVFP4")) => Ok(Quantized::Nvfp4),
            (method, algorithm) => {
                let found = format!("quantization_config of {method} {}", algorithm.unwrap_or_default());
                Err(ImportError::unusable(path, found.trim_end(), "none, or one to 8-bit or 4-bit floats (fp8, NVFP4)"))
            }
        }
    }
}

/// Keys of models that are not dense transformers with keys and values per head, and their meaning.
const OTHER_MODELS: [(&str, &str); 7] = [
    ("num_local_experts", "experts"),
    ("num_experts", "experts"),
    ("n_routed_experts", "experts"),
    ("kv_lora_rank", "latent attention"),
    ("linear_num_key_heads", "linear attention"),
    ("mamba_d_state", "a state space"),
    ("state_size", "a state space"),
];

/// Architectures whose MLP has no gate: one up projection in place of two.
const WITHOUT_GATE: [&str; 9] = ["gpt2", "gptj", "gpt_neox", "gpt_bigcode", "opt", "bloom", "falcon", "mpt", "phi"];

/// Maximum rank of low-rank weights.
const MOST_RANK: u64 = 1 << 16;

impl ModelShape {
    /// Reads `config.json`. The layers of a vanilla model are divided into `num_loops` loops of one block, by default 1.
    /// A model that was made with loops runs all its layers in each, `num_loops` times, by default as often as the file
    /// says.
    ///
    /// # Errors
    /// If the file cannot be read, the model is not a dense transformer with a gated MLP, its layers do not form
    /// `num_loops` equal blocks, or it would run more than 64 loops.
    pub fn read(
        path: impl AsRef<Path>,
        num_loops: impl Into<Option<u64>>,
        lora_rank: u64,
    ) -> Result<Self, ImportError> {
        let path = path.as_ref();
        let malformed = |error| ImportError::malformed(path, error);
        let keys: serde_json::Value = serde_json::from_str(&read_text(path)?).map_err(malformed)?;
        let mut keys = keys.get("text_config").filter(|text| text.is_object()).unwrap_or(&keys).clone();
        let looped = keys.as_object_mut().map(|keys| read_loops(path, keys)).transpose()?.flatten();
        let num_loops = num_loops.into().or(looped.map(|loops| loops.count)).unwrap_or(1);
        let some = |key: &str| keys.get(key).and_then(serde_json::Value::as_u64).is_some_and(|number| number > 0);
        if let Some((_, kind)) = OTHER_MODELS.into_iter().find(|(key, _)| some(key)) {
            return Err(ImportError::unusable(path, format!("a model with {kind}"), "a dense transformer"));
        }
        let config = Config::deserialize(&keys).map_err(malformed)?;
        if WITHOUT_GATE.contains(&config.model_type.as_str()) {
            let found = format!("model_type {}, whose MLP has no gate", config.model_type);
            return Err(ImportError::unusable(path, found, "a model with a gated MLP, as Llama, Qwen or Gemma"));
        }
        config.check_sizes(path)?;
        let layers = match looped {
            Some(_) if (1..=64).contains(&num_loops) => config.num_hidden_layers * num_loops,
            Some(_) => return Err(ImportError::unusable(path, format!("{num_loops} loops"), "1 to 64 loops")),
            None if num_loops > 0 && num_loops <= 64 && config.num_hidden_layers.is_multiple_of(num_loops) => {
                config.num_hidden_layers
            }
            None => {
                let found = format!("{} layers", config.num_hidden_layers);
                return Err(ImportError::unusable(path, found, format!("layers that make {num_loops} equal loops")));
            }
        };
        if lora_rank > MOST_RANK {
            return Err(ImportError::unusable(
                path,
                format!("a LoRA rank of {lora_rank}"),
                format!("0 to {MOST_RANK}"),
            ));
        }
        let quantized = config.quantization_config.as_ref().map(|quantization| quantization.kind(path)).transpose()?;
        let dtype = config.dtype.or(config.torch_dtype);
        let (weight_bytes, quantized) = match dtype.as_deref() {
            None | Some("bfloat16" | "float16") => (2, quantized),
            Some("float32") => (4, quantized),
            Some(small) if small.starts_with("float8") => (2, quantized.or(Some(Quantized::Fp8))),
            Some(other) => {
                let expected = "bfloat16, float16, float32 or float8";
                return Err(ImportError::unusable(path, format!("dtype {other}"), expected));
            }
        };
        Ok(Self {
            tied: config.tie_word_embeddings.unwrap_or(config.model_type.starts_with("gemma")),
            norms_per_layer: looped.map_or(vanilla_norms(&config.model_type), |loops| loops.norms_per_layer),
            outside: looped.map(|loops| loops.outside),
            kind: config.model_type,
            hidden: config.hidden_size,
            intermediate: config.intermediate_size,
            layers,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads.unwrap_or(config.num_attention_heads),
            head_dim: config.head_dim.unwrap_or(config.hidden_size / config.num_attention_heads).max(1),
            vocab: config.vocab_size,
            window: config.sliding_window.filter(|_| config.use_sliding_window.unwrap_or(true)),
            weight_bytes,
            quantized,
            kv_bytes: weight_bytes,
            devices: 1,
            num_loops,
            lora_rank,
        })
    }

    /// The same with linear layers, or keys and values, of another number type.
    pub fn with_types(self, linear: Option<LinearType>, kv: Option<KvType>) -> Self {
        let quantized = linear.map_or(self.quantized, |LinearType(quantized)| quantized);
        Self { quantized, kv_bytes: kv.map_or(self.kv_bytes, KvType::bytes), ..self }
    }

    /// What one of `devices` has of the model, which share each layer as in Megatron-LM: heads, the MLP and the vocabulary
    /// are divided, and KV heads are copied where there are fewer than devices.
    ///
    /// # Errors
    /// If the sizes cannot be divided equally, or the model has what no engine divides: loops of its own or low-rank
    /// weights.
    pub fn shared_by(self, devices: u64) -> Result<Self, ImportError> {
        if devices == 1 {
            return Ok(self);
        }
        let wrong = |found: String| ImportError::Parallel { devices, found };
        if self.outside.is_some() || self.lora_rank > 0 {
            return Err(wrong("a model with loops of its own or with low-rank weights".to_owned()));
        }
        let parts = [("query heads", self.heads), ("MLP width", self.intermediate)];
        if let Some((part, size)) = parts.into_iter().find(|(_, size)| devices == 0 || !size.is_multiple_of(devices)) {
            return Err(wrong(format!("{part} {size}")));
        }
        if !self.kv_heads.is_multiple_of(devices) && !devices.is_multiple_of(self.kv_heads) {
            return Err(wrong(format!("KV heads {}", self.kv_heads)));
        }
        Ok(Self {
            heads: self.heads / devices,
            kv_heads: (self.kv_heads / devices).max(1),
            intermediate: self.intermediate / devices,
            vocab: self.vocab.div_ceil(devices),
            devices,
            ..self
        })
    }

    /// Number of layers of the block.
    pub fn block_layers(&self) -> u64 {
        self.layers / self.num_loops
    }

    /// What a token runs besides the block's layers: nothing in a vanilla model.
    pub fn outside_block(&self) -> OutsideBlock {
        self.outside.unwrap_or_default()
    }

    /// Layers before the first loop and after the last.
    pub fn outside_layers(&self) -> u64 {
        let outside = self.outside_block();
        outside.prelude_layers + outside.coda_layers
    }

    /// The product that begins each loop, (inputs, outputs), if there is one.
    pub fn adapter(&self) -> Option<(u64, u64)> {
        self.outside_block().adapter.then_some((2 * self.hidden, self.hidden))
    }

    /// The linear layers of a layer as they run, (inputs, outputs) of each: queries, keys and values together;
    /// attention output; gate and up projection together; down projection.
    pub fn linears(&self) -> [(u64, u64); 4] {
        let attention = self.heads * self.head_dim;
        [
            (self.hidden, attention + 2 * self.kv_heads * self.head_dim),
            (attention, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        ]
    }

    /// Bytes of this number of weights of the block's linear layers, with the scales of small blocks.
    pub fn linear_bytes(&self, weights: u64) -> u64 {
        match self.quantized {
            None => weights * self.weight_bytes,
            Some(Quantized::Fp8 | Quantized::Fp8Blocks) => weights,
            Some(Quantized::Nvfp4) => weights / 2 + weights / 16,
        }
    }

    /// Bytes of the low-rank weights of one loop.
    pub fn lora_bytes_per_loop(&self) -> u64 {
        let widths: u64 = self.linears().into_iter().map(|(inputs, outputs)| inputs + outputs).sum();
        self.block_layers() * widths * self.lora_rank * self.weight_bytes
    }

    /// Bytes of all weights: the block and what is around it once, low-rank weights for each loop.
    pub fn total_weight_bytes(&self) -> u64 {
        let size = |(inputs, outputs): (u64, u64)| inputs * outputs;
        let outside = self.outside_block();
        let linears: u64 = self.linears().into_iter().map(size).sum();
        let vectors = self.norms_per_layer * self.hidden + outside.layer_biases;
        let layer = self.linear_bytes(linears) + vectors * self.weight_bytes;
        let embeddings = self.vocab * self.hidden * if self.tied { 1 } else { 2 };
        let gate = if outside.gate { self.hidden + 1 } else { 0 };
        let rest = embeddings + self.hidden + self.adapter().map_or(0, size) + gate;
        rest * self.weight_bytes
            + (self.block_layers() + self.outside_layers()) * layer
            + self.num_loops * self.lora_bytes_per_loop()
    }

    /// Bytes of keys and values of one token in one layer.
    fn kv_bytes_per_layer(&self) -> u64 {
        2 * self.kv_heads * self.head_dim * self.kv_bytes
    }

    /// Bytes of keys and values of one token at one depth.
    pub fn kv_bytes_per_depth(&self) -> u64 {
        self.block_layers() * self.kv_bytes_per_layer()
    }

    /// Bytes of keys and values of one token, at all depths and in the layers around the loops.
    pub fn kv_bytes_per_token(&self) -> u64 {
        self.num_loops * self.kv_bytes_per_depth() + self.outside_layers() * self.kv_bytes_per_layer()
    }

    /// Name for readers: the architecture, its conversion, and how many devices share it.
    pub fn describe(&self) -> String {
        match self.devices {
            1 => self.describe_whole(),
            devices => format!("{}, on {devices} devices", self.describe_whole()),
        }
    }

    fn describe_whole(&self) -> String {
        if let Some(outside) = &self.outside {
            let around = match (outside.prelude_layers, outside.coda_layers) {
                (0, 0) => String::new(),
                (prelude, coda) => format!(", {prelude} before and {coda} after them"),
            };
            let rank = if self.lora_rank > 0 { format!(", LoRA rank {}", self.lora_rank) } else { String::new() };
            return format!("{}, {} loops of {} layers{around}{rank}", self.kind, self.num_loops, self.block_layers());
        }
        match self.num_loops {
            1 => format!("{}, {} layers", self.kind, self.layers),
            loops => {
                format!("{}, {loops} loops of {} layers, LoRA rank {}", self.kind, self.block_layers(), self.lora_rank)
            }
        }
    }
}

/// Norms of a layer of a vanilla model: two, and two more after the outputs in Gemma 2 and 3.
fn vanilla_norms(kind: &str) -> u64 {
    if kind.starts_with("gemma2") || kind.starts_with("gemma3") { 4 } else { 2 }
}

impl Config {
    /// Checks that products of the sizes, such as the bytes of all weights, cannot overflow.
    fn check_sizes(&self, path: &Path) -> Result<(), ImportError> {
        let sizes = [
            ("hidden_size", self.hidden_size, 1 << 20),
            ("intermediate_size", self.intermediate_size, 1 << 24),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 12),
            ("num_attention_heads", self.num_attention_heads, 1 << 12),
            ("num_key_value_heads", self.num_key_value_heads.unwrap_or(1), 1 << 12),
            ("head_dim", self.head_dim.unwrap_or(1), 1 << 12),
            ("vocab_size", self.vocab_size, 1 << 28),
        ];
        match sizes.into_iter().find(|&(_, size, most)| !(1..=most).contains(&size)) {
            Some((key, size, most)) => {
                Err(ImportError::unusable(path, format!("{key} {size}"), format!("a size from 1 to {most}")))
            }
            None => Ok(()),
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

    #[test]
    fn what_devices_cannot_share_equally_is_named() {
        let error =
            |config: &str, rank, devices| shape(config, 1, rank).unwrap().shared_by(devices).unwrap_err().to_string();
        assert_eq!(error(LLAMA, 0, 3), "query heads 32: expected what 3 devices can share equally");
        assert!(error(&LLAMA.replace("14336", "14338"), 0, 4).starts_with("MLP width 14338"));
        assert!(error(&LLAMA.replace("_heads\": 8", "_heads\": 6"), 0, 4).starts_with("KV heads 6"));
        assert!(error(LLAMA, 8, 2).contains("low-rank weights"));
        let eight = shape(LLAMA, 1, 0).unwrap().shared_by(8).unwrap();
        assert_eq!((eight.heads, eight.kv_heads, eight.intermediate, eight.vocab), (4, 1, 1792, 16_032));
    }

    #[test]
    fn number_types_have_names_and_sizes() {
        for (name, bytes) in [("bf16", 32), ("fp8", 16), ("fp8-block", 16), ("nvfp4", 9)] {
            let linear: LinearType = name.parse().unwrap();
            assert_eq!(linear.name(), name);
            assert_eq!(shape(LLAMA, 1, 0).unwrap().with_types(Some(linear), None).linear_bytes(16), bytes);
        }
        assert!("int4".parse::<LinearType>().unwrap_err().contains("expected bf16, fp8, fp8-block or nvfp4"));
        assert!("fp4".parse::<KvType>().unwrap_err().contains("expected bf16 or fp8"));
    }

    pub(crate) fn shape(
        config: &str,
        num_loops: impl Into<Option<u64>>,
        lora_rank: u64,
    ) -> Result<ModelShape, ImportError> {
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

    pub(crate) const QWEN: &str = r#"{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "sliding_window": null,
        "use_sliding_window": false, "rope_scaling": null}"#;

    #[test]
    fn keys_are_read_as_every_family_writes_them() {
        let qwen = shape(QWEN, 1, 0).unwrap();
        assert_eq!((qwen.head_dim, qwen.kv_bytes_per_depth(), qwen.window), (128, 28 * 2 * 8 * 128 * 2, None));
        let windows = QWEN.replace("\"sliding_window\": null", "\"sliding_window\": 4096");
        assert_eq!(shape(&windows, 1, 0).unwrap().window, None, "use_sliding_window is false");
        assert_eq!(shape(&windows.replace("false", "true"), 1, 0).unwrap().window, Some(4096));
        let newer = QWEN.replace("torch_dtype", "dtype").replace("bfloat16", "float32");
        assert_eq!(shape(&newer, 1, 0).unwrap().weight_bytes, 4);
        let gemma3 =
            format!("{{\"model_type\": \"gemma3\", \"text_config\": {}}}", GEMMA.replace("gemma", "gemma3_text"));
        let gemma3 = shape(&gemma3, 1, 0).unwrap();
        assert_eq!((gemma3.kind.as_str(), gemma3.norms_per_layer), ("gemma3_text", 4));
        let without = LLAMA.replace("\"num_key_value_heads\": 8, ", "");
        assert_eq!(shape(&without, 1, 0).unwrap().kv_heads, 32);
    }

    pub(crate) const OURO: &str = r#"{"model_type": "ouro", "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128,
        "vocab_size": 49152, "tie_word_embeddings": false, "total_ut_steps": 4, "torch_dtype": "bfloat16"}"#;
    pub(crate) const NANBEIGE: &str = r#"{"model_type": "nanbeige", "hidden_size": 3072, "intermediate_size": 10752,
        "num_hidden_layers": 22, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 166144, "tie_word_embeddings": false, "num_loops": 2, "skip_loop_final_norm": false,
        "enable_mhc": false, "torch_dtype": "bfloat16"}"#;
    pub(crate) const HUGINN: &str = r#"{"model_type": "huginn_raven", "n_embd": 5280, "n_heads": 55, "n_layers": 8,
        "n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 2, "mean_recurrence": 32,
        "intermediate_size": 17920, "vocab_size": 65500, "padded_vocab_size": 65536, "tie_embeddings": true,
        "injection_type": "linear", "qk_bias": true, "torch_dtype": "bfloat16"}"#;

    #[test]
    fn looped_models_run_all_their_layers_in_every_loop() {
        let ouro = shape(OURO, None, 0).unwrap();
        assert_eq!((ouro.num_loops, ouro.layers, ouro.block_layers(), ouro.norms_per_layer), (4, 96, 24, 4));
        // Two embeddings of 49,152 words; 24 layers of 4 x 2048 x 2048 + 3 x 2048 x 5632 and 4 norms; final norm; gate.
        let layer = 16_777_216 + 34_603_008 + 8192;
        assert_eq!(ouro.total_weight_bytes() / 2, 201_326_592 + 24 * layer + 2048 + 2049);
        assert_eq!(ouro.kv_bytes_per_token(), 4 * 24 * 2 * 16 * 128 * 2);
        assert_eq!(ouro.describe(), "ouro, 4 loops of 24 layers");
        let twice = shape(&OURO.replace("_layers\": 24", "_layers\": 48"), None, 0).unwrap();
        assert_eq!(twice.total_weight_bytes() / 2, 201_326_592 + 48 * layer + 2048 + 2049);
        assert_eq!(shape(OURO, 8, 0).unwrap().kv_bytes_per_token(), 2 * ouro.kv_bytes_per_token());

        let nanbeige = shape(NANBEIGE, None, 0).unwrap();
        // The heads are 48 x 128 = 6144 wide together, twice the hidden state.
        let layer = 3072 * (6144 + 2 * 1024) + 6144 * 3072 + 3 * 3072 * 10_752 + 2 * 3072;
        assert_eq!(nanbeige.total_weight_bytes() / 2, 2 * 166_144 * 3072 + 22 * layer + 3072);
        assert_eq!(nanbeige.kv_bytes_per_token(), 2 * 22 * 2 * 8 * 128 * 2);
        let norms = |config: &str| shape(config, None, 0).unwrap().outside_block();
        assert_eq!((norms(NANBEIGE).loop_norms, norms(NANBEIGE).exit_norms), (1, 0));
        let skips = NANBEIGE.replace("final_norm\": false", "final_norm\": true");
        assert_eq!((norms(&skips).loop_norms, norms(&skips).exit_norms), (0, 1));
    }

    #[test]
    fn huginn_has_layers_before_and_after_its_loops_and_a_product_in_each() {
        let huginn = shape(HUGINN, None, 0).unwrap();
        assert_eq!((huginn.num_loops, huginn.layers, huginn.outside_layers()), (32, 128, 4));
        assert_eq!((huginn.vocab, huginn.tied, huginn.head_dim), (65_536, true, 96));
        // Eight layers of 4 x 5280 x 5280 + 3 x 5280 x 17920, 4 norms and the biases of queries and keys.
        let layer = 111_513_600 + 283_852_800 + 4 * 5280 + 2 * 5280;
        let adapter = 2 * 5280 * 5280;
        assert_eq!(huginn.total_weight_bytes() / 2, 65_536 * 5280 + 8 * layer + adapter + 5280);
        let kv_layer = 2 * 5280 * 2;
        assert_eq!(huginn.kv_bytes_per_depth(), 4 * kv_layer);
        assert_eq!(huginn.kv_bytes_per_token(), (32 * 4 + 4) * kv_layer);
        let fewer = shape(HUGINN, 16, 0).unwrap();
        assert_eq!(fewer.kv_bytes_per_token(), (16 * 4 + 4) * kv_layer);
        assert_eq!(fewer.total_weight_bytes(), huginn.total_weight_bytes());
        assert_eq!(fewer.describe(), "huginn_raven, 16 loops of 4 layers, 2 before and 2 after them");
        assert_eq!(shape(HUGINN, 64, 0).unwrap().num_loops, 64);
    }

    #[test]
    fn configurations_as_the_reference_code_writes_them_are_read() {
        let stored = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/checkpoints/stored");
        for (name, loops, layers) in [
            ("ouro", 4, 8),
            ("nanbeige", 2, 4),
            ("nanbeige_skip_norm", 3, 6),
            ("raven", 4, 12),
            ("raven_no_qk_bias", 5, 10),
        ] {
            let read = ModelShape::read(format!("{stored}/{name}/config.json"), None, 0).unwrap();
            assert_eq!((read.num_loops, read.layers), (loops, layers), "{name}");
        }
        let published = shape(&HUGINN.replace("n_heads", "num_attention_heads"), None, 0).unwrap();
        assert_eq!(published, shape(HUGINN, None, 0).unwrap(), "as Huginn is published");
    }

    #[test]
    fn what_loops_do_not_have_is_refused_by_its_key() {
        let error = |config: &str, loops: Option<u64>| shape(config, loops, 0).unwrap_err().to_string();
        assert!(error(HUGINN, Some(65)).contains("found 65 loops, expected 1 to 64 loops"));
        assert!(error(&OURO.replace("ut_steps\": 4", "ut_steps\": 0"), None).contains("found 0 loops"));
        assert!(error(&OURO.replace("total_ut_steps", "loops"), None).contains("no total_ut_steps"));
        let mhc = error(&NANBEIGE.replace("mhc\": false", "mhc\": true"), None);
        assert!(mhc.contains("found enable_mhc true, expected a model without it"), "{mhc}");
        assert!(error(&HUGINN.replace("\"linear\"", "\"add\""), None).contains("injection_type \"add\""));
        assert!(error(&HUGINN.replace("n_layers\": 8", "n_layers\": 9"), None).contains("the 9 of n_layers"));
        assert!(error(&HUGINN.replace("n_layers_in_coda", "coda"), None).contains("n_layers_in_coda"));
    }

    #[test]
    fn other_models_are_refused() {
        let error = |config: &str, loops| shape(config, loops, 0).unwrap_err().to_string();
        assert!(error(LLAMA, 3).contains("found 32 layers, expected layers that make 3 equal loops"));
        let experts = LLAMA.replace("{\"model", "{\"num_experts\": 8, \"model");
        assert!(error(&experts, 1).contains("a model with experts"));
        assert!(error(&LLAMA.replace("4096", "0"), 1).contains("hidden_size 0"));
        assert!(error("{}", 1).contains("missing field `model_type`"));
        assert!(error(&LLAMA.replace("llama", "gpt_neox"), 1).contains("whose MLP has no gate"));
        assert!(error(&LLAMA.replace("{\"model", "{\"kv_lora_rank\": 512, \"model"), 1).contains("latent attention"));
        assert!(error(&LLAMA.replace("bfloat16", "int4"), 1).contains("found dtype int4"));
        let awq = LLAMA.replace("{\"model", "{\"quantization_config\": {\"quant_method\": \"awq\"}, \"model");
        assert!(
            error(&awq, 1).contains("found quantization_config of awq, expected none, or one to 8-bit or 4-bit floats")
        );
    }

    #[test]
    fn sizes_whose_products_leave_the_range_are_refused_by_key() {
        for (key, size) in [
            ("hidden_size\": 4096", "hidden_size\": 4294967295"),
            ("intermediate_size\": 14336", "intermediate_size\": 4294967295"),
            ("num_hidden_layers\": 32", "num_hidden_layers\": 4294967295"),
            ("num_attention_heads\": 32", "num_attention_heads\": 4294967295"),
            ("num_key_value_heads\": 8", "num_key_value_heads\": 4294967295"),
            ("vocab_size\": 128256", "vocab_size\": 4294967295"),
        ] {
            let error = shape(&LLAMA.replace(key, size), 1, 0).unwrap_err().to_string();
            assert!(error.contains(&size.replace("\":", "")) && error.contains("a size from 1 to"), "{error}");
        }
        assert!(shape(LLAMA, 1, 1 << 40).unwrap_err().to_string().contains("a LoRA rank of 1099511627776"));
        let greatest = LLAMA
            .replace("hidden_size\": 4096", "hidden_size\": 1048576")
            .replace("14336", "16777216")
            .replace("layers\": 32", "layers\": 4096")
            .replace("attention_heads\": 32", "attention_heads\": 4096")
            .replace("value_heads\": 8", "value_heads\": 4096, \"head_dim\": 4096")
            .replace("128256", "268435456")
            .replace("bfloat16", "float32");
        let greatest = shape(&greatest, 64, 1 << 16).unwrap();
        let linears: u128 = greatest.linears().into_iter().map(|(a, b)| u128::from(a) * u128::from(b)).sum();
        let layer = linears * 4 + 2 * (1 << 20) * 4;
        let lora = 64 * u128::from(greatest.lora_bytes_per_loop());
        let expected = (2 * (1 << 28) * (1 << 20) + (1 << 20)) * 4 + 64 * layer + lora;
        assert_eq!(u128::from(greatest.total_weight_bytes()), expected);
    }

    #[test]
    fn quantized_layers_take_a_byte_a_weight_and_nothing_else_does() {
        let read = |quantization: &str| {
            let key = format!("{{\"quantization_config\": {{{quantization}}}, \"model");
            shape(&LLAMA.replace("{\"model", &key), 1, 0).unwrap()
        };
        let fp8 = read("\"quant_method\": \"modelopt\", \"quant_algo\": \"FP8\"");
        let blocks = read("\"quant_method\": \"fp8\", \"weight_block_size\": [128, 128]");
        assert_eq!((fp8.quantized, blocks.quantized), (Some(Quantized::Fp8), Some(Quantized::Fp8Blocks)));
        let linears = 32 * (4096 * 6144 + 4096 * 4096 + 4096 * 28_672 + 14_336 * 4096);
        let full = shape(LLAMA, 1, 0).unwrap();
        assert_eq!(full.total_weight_bytes() - fp8.total_weight_bytes(), linears);
        assert_eq!(full.kv_bytes_per_depth(), fp8.kv_bytes_per_depth());
    }
}
