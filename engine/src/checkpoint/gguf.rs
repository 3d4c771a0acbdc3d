//! GGUF files, those of llama.cpp: their configuration, and their tensors dequantized.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::{Device, Tensor};
use memmap2::Mmap;

use super::family::{GEMMA3_LOCAL_THETA, GEMMA3_PATTERN, embedding_scale, sliding_by_pattern};
use super::gguf_header::{Header, TensorInfo};
use super::gguf_tokenizer::tokenizer;
use super::keys::{Keys, Kind};
use super::names::{GGUF_GEMMA3, GGUF_LLAMA};
use super::{Checkpoint, CheckpointError, Result, contents, in_loops, layers_within, num_layers, rules, with_loops};
use crate::config::{Activation, Architecture, ModelConfig, RopeScaling, Sharing, SlidingWindow};
use crate::tensor_file::{TensorFile, read_weights};

/// What Llama 3.1's frequencies were divided by, in files that keep nothing else of its rope scaling.
const ROPE_FACTORS: &str = "rope_freqs.weight";

const ARCHITECTURE: &str = "general.architecture";

/// Reads a GGUF file, or all parts of a split one of which `path` is one.
pub(super) fn read(path: &Path, num_loops: Option<usize>) -> Result<Checkpoint> {
    let first = map(path)?;
    let header = header_of(path, &first)?;
    let paths = parts(path, &header)?;
    let maps = paths.iter().map(|path| map(path)).collect::<Result<Vec<_>>>()?;
    let headers = match maps.is_empty() {
        true => vec![header],
        false => paths.iter().zip(&maps).map(|(path, bytes)| header_of(path, bytes)).collect::<Result<_>>()?,
    };
    let origin = paths.first().map_or(path, |first| first);
    check_parts(&paths, &headers)?;
    let keys = Keys::new(origin, headers[0].values.clone());

    let mut file = Gguf { headers: &headers, origin: origin.display().to_string(), interleaved: None };
    let architecture = keys.required::<String>(ARCHITECTURE)?;
    let (naming, config) = match architecture.as_str() {
        rules::GGUF_LLAMA => {
            rules::check_gguf(&keys, rules::GGUF_LLAMA)?;
            (&GGUF_LLAMA, llama(&keys, rules::GGUF_LLAMA, &file)?)
        }
        rules::GGUF_NANBEIGE => {
            rules::check_gguf(&keys, rules::GGUF_NANBEIGE)?;
            (&GGUF_LLAMA, nanbeige(&keys, &file)?)
        }
        rules::GGUF_GEMMA3 => {
            rules::check_gguf(&keys, rules::GGUF_GEMMA3)?;
            (&GGUF_GEMMA3, gemma3(&keys, &file)?)
        }
        _ => return Err(keys.refuse(ARCHITECTURE, "one of llama, gemma3, nanbeige")),
    };
    if architecture != rules::GGUF_GEMMA3 {
        file.interleaved = Some((config.num_heads, config.num_kv_heads));
    }
    let config = match architecture == rules::GGUF_NANBEIGE {
        true => with_loops(config, num_loops, origin)?,
        false => in_loops(config, num_loops.unwrap_or(1), origin)?,
    };
    let weights = read_weights(&file, config.clone(), &naming.entries(&config), |name| naming.ignores(name, &config))?;
    let tokenizer = tokenizer(&headers[0], &keys)?;
    let tokenizer = tokenizer.map(|tokenizer| tokenizer.for_model(origin, config.vocab_size)).transpose()?;
    Ok(Checkpoint { weights, tokenizer })
}

fn map(path: &Path) -> Result<Mmap> {
    let in_file = |source| CheckpointError::File { path: path.to_owned(), source };
    let file = contents::open(path).map_err(in_file)?;
    // SAFETY: as with any mapped file, the caller's part is that no program cuts it while it is read.
    unsafe { Mmap::map(&file) }.map_err(in_file)
}

fn header_of<'a>(path: &Path, bytes: &'a [u8]) -> Result<Header<'a>> {
    Header::read(bytes).map_err(|message| refused(path, message))
}

fn refused(path: &Path, message: String) -> CheckpointError {
    CheckpointError::Gguf { path: path.to_owned(), message }
}

/// The paths of all parts of a split file, the first part first; none if the file is whole.
fn parts(path: &Path, header: &Header) -> Result<Vec<PathBuf>> {
    let number = |key: &str| header.values.get(key).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let (index, count) = (number("split.no"), number("split.count"));
    if count < 2 {
        return Ok(Vec::new());
    }
    let part = format!("part {} of {count}", index + 1);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let names = parts_by_name(&name).filter(|names| names.len() as u64 == count);
    let names = names.ok_or_else(|| {
        let like = format!("-{:05}-of-{count:05}.gguf", index + 1);
        refused(path, format!("{part}: its name must end in {like}, so that the other parts are found beside it"))
    })?;
    let paths: Vec<PathBuf> = names.iter().map(|name| path.with_file_name(name)).collect();
    match paths.iter().find(|path| !path.exists()) {
        None => Ok(paths),
        Some(missing) => Err(refused(path, format!("{part}: {} is missing", missing.display()))),
    }
}

/// The names of all parts of a split file, if this is the name of one: `model-00001-of-00003.gguf`.
pub(super) fn parts_by_name(name: &str) -> Option<Vec<String>> {
    const DIGITS: usize = 5;
    let number = |text: &str| text.parse().ok().filter(|_| text.len() == DIGITS && !text.starts_with('+'));
    let (start, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, index) = start.rsplit_once('-')?;
    let (index, count): (u32, u32) = (number(index)?, number(count)?);
    let named = |part| format!("{stem}-{part:05}-of-{count:05}.gguf");
    (1..=count).contains(&index).then(|| (1..=count).map(named).collect())
}

/// Checks that the parts of a split file are those of one.
fn check_parts(paths: &[PathBuf], headers: &[Header]) -> Result<()> {
    let number = |header: &Header, key: &str| header.values.get(key).and_then(serde_json::Value::as_u64);
    let mut known = BTreeSet::new();
    for (index, (path, header)) in paths.iter().zip(headers).enumerate() {
        let (part, count) = (number(header, "split.no"), number(header, "split.count"));
        if (part, count) != (Some(index as u64), Some(paths.len() as u64)) {
            let shown = |number: Option<u64>| number.map_or("missing".to_owned(), |number| number.to_string());
            let expected = format!("{index} and {}", paths.len());
            let message = format!("`split.no` and `split.count` are {} and {}", shown(part), shown(count));
            return Err(refused(path, format!("{message}, expected {expected}")));
        }
        if let Some(twice) = header.tensor_names().find(|name| !known.insert(*name)) {
            return Err(refused(path, format!("tensor `{twice}` is in another part too")));
        }
    }
    match headers.first().and_then(|header| number(header, "split.tensors.count")) {
        Some(expected) if !paths.is_empty() && expected != known.len() as u64 => {
            let found = known.len();
            Err(refused(&paths[0], format!("`split.tensors.count` is {expected}, but all parts hold {found}")))
        }
        _ => Ok(()),
    }
}

/// The tensors of a GGUF file, in one part or several.
struct Gguf<'a> {
    headers: &'a [Header<'a>],
    origin: String,
    /// Query heads and key-value heads, if the two halves of a head's rows, which are rotated together, lie interleaved.
    interleaved: Option<(usize, usize)>,
}

impl<'a> Gguf<'a> {
    /// A tensor and the part that holds it.
    fn find(&self, name: &str) -> Option<(&'a Header<'a>, &'a TensorInfo)> {
        self.headers.iter().find_map(|header| Some((header, header.tensor(name)?)))
    }
}

impl TensorFile for Gguf<'_> {
    fn origin(&self) -> &str {
        &self.origin
    }

    fn names(&self) -> Vec<&str> {
        self.headers.iter().flat_map(Header::tensor_names).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.find(name).map(|(_, info)| info.shape.clone())
    }

    fn read(&self, name: &str) -> candle_core::Result<Tensor> {
        let Some((header, info)) = self.find(name) else {
            candle_core::bail!("no such tensor");
        };
        let bytes = header.bytes(info).map_err(candle_core::Error::msg)?;
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

    /// A number that is the same for all layers: one, or a list of equal ones.
    fn uniform(&self, key: &str, file: &Gguf) -> Result<Option<usize>> {
        let key = self.key(key);
        let numbers = file.headers[0].numbers(&key).map_err(|message| refused(self.keys.path(), message))?;
        let Some(numbers) = numbers else { return self.keys.optional(&key) };
        match numbers.first() {
            Some(&first) if numbers.iter().all(|number| *number == first && first >= 0.0) => Ok(Some(first as usize)),
            _ => Err(self.keys.refuse(&key, "the same number for every layer")),
        }
    }

    fn required_uniform(&self, key: &str, file: &Gguf) -> Result<usize> {
        self.uniform(key, file)?.ok_or_else(|| self.refuse(key, usize::NAME))
    }

    /// What all architectures say in the same words.
    fn config(&self, file: &Gguf, architecture: Architecture) -> Result<ModelConfig> {
        let hidden_size: usize = self.required("embedding_length")?;
        let num_heads = self.required_uniform("attention.head_count", file)?;
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
            intermediate_size: self.required_uniform("feed_forward_length", file)?,
            num_heads,
            num_kv_heads: self.uniform("attention.head_count_kv", file)?.unwrap_or(num_heads),
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
        const TYPE: &str = "rope.scaling.type";
        let factor = self.optional("rope.scaling.factor")?.or(self.optional("rope.scale_linear")?);
        match self.optional::<String>(TYPE)?.as_deref() {
            Some("none") => Ok(None),
            // No factor, or one of zero, scales nothing.
            None | Some("linear") => {
                Ok(factor.filter(|factor| *factor != 0.0).map(|factor| RopeScaling::Linear { factor }))
            }
            Some(_) => Err(self.refuse(TYPE, "none or linear")),
        }
    }
}

fn llama(keys: &Keys, name: &'static str, file: &Gguf) -> Result<ModelConfig> {
    let keys = Architectural { keys, name };
    let rope_theta = keys.optional("rope.freq_base")?.unwrap_or(10_000.0);
    let mut config = keys.config(file, Architecture { rope_theta, ..Architecture::default() })?;
    if file.shape(ROPE_FACTORS).is_some() {
        config.architecture.rope_scaling = Some(llama3_scaling(&config, file)?);
    }
    Ok(config)
}

/// A Llama whose layers, counted once, run several times.
fn nanbeige(keys: &Keys, file: &Gguf) -> Result<ModelConfig> {
    let own = Architectural { keys, name: rules::GGUF_NANBEIGE };
    Ok(ModelConfig {
        num_loops: own.required("num_loops")?,
        sharing: Sharing::Block,
        norm_between_loops: !own.optional("skip_loop_final_norm")?.unwrap_or(false),
        ..llama(keys, rules::GGUF_NANBEIGE, file)?
    })
}

/// Rope scaling with Llama 3.1's parameters, of which the file keeps only the factors that follow from them.
fn llama3_scaling(config: &ModelConfig, file: &Gguf) -> Result<RopeScaling> {
    let refused = |message| refused(Path::new(&file.origin), message);
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
    let architecture = Architecture {
        post_norms: true,
        qk_norm: true,
        activation: Activation::GeluTanh,
        rope_theta: keys.optional("rope.freq_base")?.unwrap_or(10_000.0),
        ..Architecture::default()
    };
    let mut config = keys.config(file, architecture)?;
    let pattern = keys.optional("attention.sliding_window_pattern")?.unwrap_or(GEMMA3_PATTERN);
    if pattern == 0 {
        return Err(keys.refuse("attention.sliding_window_pattern", "at least 1"));
    }
    let layers = sliding_by_pattern(pattern, config.block_layers);
    // As in llama.cpp, without a window, or with one of no tokens, all layers see all tokens.
    let tokens = keys.optional("attention.sliding_window")?.filter(|tokens| *tokens > 0 && !layers.is_empty());
    let rope_theta = keys.optional("rope.freq_base_swa")?.unwrap_or(GEMMA3_LOCAL_THETA);
    config.architecture.sliding_window = tokens.map(|tokens| SlidingWindow { tokens, rope_theta, layers });
    config.architecture.embedding_scale = embedding_scale(config.hidden_size);
    // The largest of the family scales by another width; as llama.cpp, tell it by its layers.
    if config.block_layers == 62 {
        let width = config.hidden_size as f32 / config.num_heads as f32;
        config.architecture.attention_scale = Some(width.powf(-0.5));
    }
    Ok(config)
}
