//! GGUF files, those of llama.cpp: their configuration, and their tensors dequantized.

use std::path::Path;

use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::{Device, Tensor};
use memmap2::Mmap;
use serde_json::json;

use super::family::{GEMMA3_LOCAL_THETA, GEMMA3_PATTERN, embedding_scale, sliding_by_pattern};
use super::gguf_header::Header;
use super::gguf_tokenizer::tokenizer;
use super::keys::{Keys, Kind};
use super::names::{GGUF_GEMMA3, GGUF_LLAMA};
use super::{Checkpoint, CheckpointError, Result, in_loops, layers_within, num_layers};
use crate::config::{Activation, Architecture, ModelConfig, RopeScaling, Sharing, SlidingWindow};
use crate::tensor_file::{TensorFile, read_weights};

/// What Llama 3.1's frequencies were divided by, in files that keep nothing else of its rope scaling.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Reads a GGUF file.
pub(super) fn read(path: &Path, num_loops: usize) -> Result<Checkpoint> {
    let refused = |message| CheckpointError::Gguf { path: path.to_owned(), message };
    let in_file = |source| CheckpointError::File { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(in_file)?;
    // SAFETY: as with any mapped file, the caller's part is that nobody cuts it while it is read.
    let bytes = unsafe { Mmap::map(&file) }.map_err(in_file)?;
    let header = Header::read(&bytes).map_err(refused)?;
    let keys = Keys::new(path, header.values.clone());

    let mut file = Gguf { header: &header, origin: path.display().to_string(), interleaved: None };
    let (naming, config) = match keys.required::<String>("general.architecture")?.as_str() {
        "llama" => {
            let config = llama(&keys, &file)?;
            file.interleaved = Some((config.num_heads, config.num_kv_heads));
            (&GGUF_LLAMA, config)
        }
        "gemma3" => (&GGUF_GEMMA3, gemma3(&keys, &file)?),
        _ => return Err(keys.refuse("general.architecture", "one of llama, gemma3")),
    };
    let config = in_loops(config, num_loops, path)?;
    let weights = read_weights(&file, config.clone(), &naming.entries(&config), |name| naming.ignores(name, &config))?;
    Ok(Checkpoint { weights, tokenizer: tokenizer(&header, &keys)? })
}

/// The tensors of a GGUF file.
struct Gguf<'a> {
    header: &'a Header<'a>,
    origin: String,
    /// Query heads and key-value heads, if the two halves of a head's rows, which are rotated together, lie interleaved.
    interleaved: Option<(usize, usize)>,
}

impl TensorFile for Gguf<'_> {
    fn origin(&self) -> &str {
        &self.origin
    }

    fn names(&self) -> Vec<&str> {
        self.header.tensor_names().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.header.tensor(name).map(|info| info.shape.clone())
    }

    fn read(&self, name: &str) -> candle_core::Result<Tensor> {
        let Some(info) = self.header.tensor(name) else {
            candle_core::bail!("no such tensor");
        };
        let bytes = self.header.bytes(info).map_err(candle_core::Error::msg)?;
        let tensor = qtensor_from_ggml(info.dtype, bytes, info.shape.clone(), &Device::Cpu)?;
        let tensor = tensor.dequantize(&Device::Cpu)?;
        match self.interleaved {
            Some((heads, _)) if name.contains(".attn_q.") => by_halves(&tensor, heads),
            Some((_, heads)) if name.contains(".attn_k.") => by_halves(&tensor, heads),
            _ => Ok(tensor),
        }
    }
}

/// Puts the first rows of all pairs of a head before the second ones, as Hugging Face has them.
fn by_halves(tensor: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let shape = tensor.dims().to_vec();
    let mut pairs = shape.clone();
    pairs.splice(0..1, [heads, shape[0] / heads / 2, 2]);
    tensor.reshape(pairs)?.transpose(1, 2)?.contiguous()?.reshape(shape)
}

/// Keys of an architecture: `llama.block_count` and so on.
struct Architectural<'a> {
    keys: &'a Keys,
    name: &'static str,
}

impl Architectural<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    fn optional<T: Kind>(&self, key: &str) -> Result<Option<T>> {
        self.keys.optional(&self.key(key))
    }

    fn required<T: Kind>(&self, key: &str) -> Result<T> {
        self.keys.required(&self.key(key))
    }

    fn refuse(&self, key: &str, expected: &str) -> CheckpointError {
        self.keys.refuse(&self.key(key), expected)
    }

    fn must_be_absent(&self, key: &str, harmless: serde_json::Value) -> Result<()> {
        self.keys.must_be_absent(&self.key(key), &harmless)
    }

    /// What all architectures say in the same words.
    fn config(&self, file: &Gguf, architecture: Architecture) -> Result<ModelConfig> {
        self.must_be_absent("expert_count", json!(0))?;
        let hidden_size: usize = self.required("embedding_length")?;
        let num_heads = self.required("attention.head_count")?;
        let head_dim = self.optional("attention.key_length")?;
        let head_dim = head_dim.unwrap_or(hidden_size.checked_div(num_heads).unwrap_or(0));
        for key in ["attention.value_length", "rope.dimension_count"] {
            if self.optional(key)?.is_some_and(|width: usize| width != head_dim) {
                return Err(self.refuse(key, &format!("{head_dim}, the width of a head")));
            }
        }
        let has = |name: &str| file.shape(name).is_some();
        let embedding = file.shape("token_embd.weight").unwrap_or_default();
        let block_count = self.key("block_count");
        let block_layers = num_layers(self.keys, &block_count)?;
        layers_within(file, block_layers, self.keys, &block_count)?;
        Ok(ModelConfig {
            vocab_size: embedding.first().copied().unwrap_or(0),
            hidden_size,
            intermediate_size: self.required("feed_forward_length")?,
            num_heads,
            num_kv_heads: self.optional("attention.head_count_kv")?.unwrap_or(num_heads),
            head_dim,
            block_layers,
            num_loops: 1,
            sharing: Sharing::Nothing,
            tie_embeddings: !has("output.weight"),
            max_positions: self.required("context_length")?,
            architecture: Architecture {
                norm_eps: self.required("attention.layer_norm_rms_epsilon")?,
                qkv_bias: has("blk.0.attn_q.bias"),
                output_bias: has("blk.0.attn_output.bias"),
                mlp_bias: has("blk.0.ffn_up.bias"),
                rope_scaling: self.rope_scaling()?,
                ..architecture
            },
            ..ModelConfig::default()
        })
    }

    /// As llama.cpp: where no type is given, a factor is one of linear scaling; older files call it `scale_linear`.
    fn rope_scaling(&self) -> Result<Option<RopeScaling>> {
        const FACTOR: &str = "rope.scaling.factor";
        let kind = self.optional::<String>("rope.scaling.type")?;
        match kind.as_deref() {
            Some("none") => Ok(None),
            Some("linear") => Ok(Some(RopeScaling::Linear { factor: self.required(FACTOR)? })),
            Some(_) => Err(self.refuse("rope.scaling.type", "none or linear")),
            None => {
                let factor = self.optional(FACTOR)?.or(self.optional("rope.scale_linear")?);
                Ok(factor.map(|factor| RopeScaling::Linear { factor }))
            }
        }
    }
}

fn llama(keys: &Keys, file: &Gguf) -> Result<ModelConfig> {
    let keys = Architectural { keys, name: "llama" };
    let rope_theta = keys.optional("rope.freq_base")?.unwrap_or(10_000.0);
    let mut config = keys.config(file, Architecture { rope_theta, ..Architecture::default() })?;
    if file.shape(ROPE_FACTORS).is_some() {
        config.architecture.rope_scaling = Some(llama3_scaling(&config, file)?);
    }
    Ok(config)
}

/// Rope scaling with Llama 3.1's parameters, of which the file keeps only the factors that follow from them.
fn llama3_scaling(config: &ModelConfig, file: &Gguf) -> Result<RopeScaling> {
    let refused = |message| CheckpointError::Gguf { path: file.origin.clone().into(), message };
    let factors = file.read(ROPE_FACTORS).and_then(|factors| factors.flatten_all()?.to_vec1::<f32>());
    let factors = factors.map_err(|error| refused(format!("tensor `{ROPE_FACTORS}`: {error}")))?;
    let scaling = RopeScaling::Llama3 {
        factor: factors.iter().copied().fold(1.0, f32::max),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_positions: 8192,
    };
    let expected = config.architecture.frequency_factors(config.head_dim, scaling);
    let close = |(found, expected): (&f32, f32)| (found / expected - 1.0).abs() < 1e-4;
    match factors.len() == expected.len() && factors.iter().zip(expected).all(close) {
        true => Ok(scaling),
        false => Err(refused(format!("tensor `{ROPE_FACTORS}` holds other factors than Llama 3.1's"))),
    }
}

fn gemma3(keys: &Keys, file: &Gguf) -> Result<ModelConfig> {
    let keys = Architectural { keys, name: "gemma3" };
    keys.must_be_absent("attn_logit_softcapping", json!(0.0))?;
    keys.must_be_absent("final_logit_softcapping", json!(0.0))?;
    let architecture = Architecture {
        post_norms: true,
        qk_norm: true,
        activation: Activation::GeluTanh,
        rope_theta: keys.optional("rope.freq_base")?.unwrap_or(1e6),
        ..Architecture::default()
    };
    let mut config = keys.config(file, architecture)?;
    let pattern = keys.optional("attention.sliding_window_pattern")?.unwrap_or(GEMMA3_PATTERN);
    if pattern == 0 {
        return Err(keys.refuse("attention.sliding_window_pattern", "at least 1"));
    }
    let layers = sliding_by_pattern(pattern, config.block_layers);
    let window = SlidingWindow {
        tokens: keys.required("attention.sliding_window")?,
        rope_theta: keys.optional("rope.freq_base_swa")?.unwrap_or(GEMMA3_LOCAL_THETA),
        layers,
    };
    config.architecture.sliding_window = (!window.layers.is_empty()).then_some(window);
    config.architecture.embedding_scale = embedding_scale(config.hidden_size);
    // The largest of the family scales by another width; as llama.cpp, tell it by its layers.
    if config.block_layers == 62 {
        let width = config.hidden_size as f32 / config.num_heads as f32;
        config.architecture.attention_scale = Some(width.powf(-0.5));
    }
    Ok(config)
}
