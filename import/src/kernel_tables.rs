//! Tables of single kernels: the Parquet files of PyPI's `aiconfigurator-core`.
//!
//! The folder is the package's `systems`. For a GPU it contains `<gpu>.yaml` (memory, bandwidth, peak rates) and
//! `data/<gpu>/{gemm,attention}/<framework>/<version>/*.parquet`: matrix products by rows, outputs and inputs, and
//! attention of prompts and of decode rows by batch, heads, head size and length. Times are in milliseconds.
//!
//! | component of the profile | from |
//! | --- | --- |
//! | block | the four linear layers of each of its layers; Huginn's product at the start of a loop |
//! | elementwise | norms, activation, rotary embedding, gate: roofline, no table holds them |
//! | all reduce | two sums over the devices for each layer, where several devices share the model |
//! | lora | two more products for each linear layer |
//! | decode attention | measured at batch and length |
//! | prefill attention | measured for whole prompts; a chunk after a history is the prompt of both less that of the history |
//! | depth mix | the low-rank weights of the other depths, read by one grouped kernel: roofline |
//! | embed | roofline, and one sum over devices; the layers before the first loop, without their attention |
//! | head | the product with the vocabulary: computed where that has more words than any product measured; logits of several devices are gathered; the layers after the last loop, without their attention |
//! | exit attention | decode attention of the layers before and after the loops |
//! | KV fill | of models made with loops: roofline |
//!
//! Rows of a prompt run the layers around the loops as well, and only the last of them exits. Their share is part of
//! prefill attention, which is charged in every loop: one `num_loops`-th of it in each.
//!
//! Times are linear between measured sizes. Beyond the largest size, products grow in proportion to inputs and outputs,
//! and other times continue with the last slope. Attention of a head shape without a table is a roofline. Points that
//! were not measured have `repeats` 0. Products are those of the model's number type: 8-bit or 4-bit floats for the layers
//! of a quantized model, 16-bit floats otherwise; attention is that of its keys and values. Where several devices share the
//! model, all sizes are those of one of them. If a version lacks a table, that of the version named in `reuse.yaml` is
//! read.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::RowAccessor;
use serde::Deserialize;
use traces::{Component, LatencyProfile, MemoryFigures, Point, ProfileMeta, catching_damage};

use crate::all_reduce::AllReduce;
use crate::curve::{Curve, line_at, share_at, without_outliers};
use crate::error::{ImportError, read_text};
use crate::lora::{self, DeviceRates};
use crate::memory::memory_figures;
use crate::model::{LinearType, ModelShape, Quantized};

/// The tables of one GPU and framework.
#[derive(Clone, Debug)]
pub struct KernelTables {
    source: String,
    gpu: String,
    system: System,
    /// File of the products.
    gemm_path: PathBuf,
    /// By number type.
    gemm: BTreeMap<&'static str, Products>,
    /// One prompt, by head shape: a curve over its length.
    prefill: BTreeMap<HeadShape, Curve>,
    /// By head shape and batch: a curve over history.
    decode: BTreeMap<HeadShape, BTreeMap<u32, Curve>>,
    /// Folder of the sums over devices, and the version.
    comm: (PathBuf, String),
}

/// Matrix products of one number type, by outputs and inputs: curves over rows.
#[derive(Clone, Debug, Default)]
struct Products(BTreeMap<(u32, u32), Curve>);

/// Number types in the tables: of models without quantization, and of the layers of quantized models.
/// Longest chunk whose attention takes the time of one decode row per token: kernels for speculative decoding, such as
/// FlashInfer's and FlashAttention's with several queries, are timed in the tables with one query only.
const DECODE_Q_LEN: u32 = 16;
const FULL: &str = "bfloat16";
const FP8: &str = "fp8";
const FP8_BLOCKS: &str = "fp8_block";
const NVFP4: &str = "nvfp4";

/// Query heads, KV heads, head size, and bytes per element of keys and values.
type HeadShape = (u32, u32, u32, u64);

#[derive(Clone, Debug, Deserialize)]
struct System {
    data_dir: String,
    gpu: Gpu,
    misc: Misc,
}

/// In bytes, seconds and operations.
#[derive(Clone, Debug, Deserialize)]
struct Gpu {
    mem_bw: f64,
    mem_bw_empirical_scaling_factor: f64,
    mem_empirical_constant_latency: f64,
    mem_capacity: u64,
    bfloat16_tc_flops: f64,
}

#[derive(Clone, Debug, Deserialize)]
struct Misc {
    other_mem: u64,
    /// Buffers of collective operations, by number of devices.
    #[serde(default)]
    nccl_mem: BTreeMap<u64, u64>,
}

impl KernelTables {
    /// Reads the tables of a GPU, framework and version, by the names of the package's folders.
    ///
    /// # Errors
    /// If a file is missing or cannot be read. The message about a missing folder lists the existing ones.
    pub fn read(systems: impl AsRef<Path>, gpu: &str, framework: &str, version: &str) -> Result<Self, ImportError> {
        let systems = systems.as_ref();
        let path = systems.join(format!("{gpu}.yaml"));
        if !path.exists() {
            let known = names_in(&systems.join("data"));
            return Err(ImportError::unusable(&path, "no such file", format!("one of {known}")));
        }
        let system: System =
            serde_yaml::from_str(&read_text(&path)?).map_err(|error| ImportError::malformed(&path, error))?;
        let mut source = format!("aiconfigurator-core tables {gpu}/{framework}/{version}");
        let mut table = |kind: &str, name: &str| -> Result<PathBuf, ImportError> {
            let versions = systems.join(&system.data_dir).join(kind).join(framework);
            let (path, reused) = find_table(&versions, version, name)?;
            if let Some(reused) = reused {
                source += &format!("; {name} of {reused}, as reuse.yaml says");
            }
            Ok(path)
        };
        let gemm_path = table("gemm", "gemm_perf")?;
        let prefill = read_prefill(&table("attention", "context_attention_perf")?)?;
        let decode = read_decode(&table("attention", "generation_attention_perf")?)?;
        let gemm = read_gemm(&gemm_path)?;
        let comm = (systems.join(&system.data_dir).join("comm").join(framework), version.to_owned());
        Ok(Self { source, gpu: gpu.to_owned(), gemm_path, gemm, prefill, decode, comm, system })
    }

    /// The same with products whose time is the median of those at neighbouring numbers of rows, which leaves out single
    /// measurements that were disturbed.
    pub fn smoothed(mut self) -> Self {
        for curve in self.gemm.values_mut().flat_map(|products| products.0.values_mut()) {
            *curve = without_outliers(curve);
        }
        self.source += "; products by the median of neighbouring rows";
        self
    }

    /// The latency profile of a model; `overhead_us` is the time of a pass beside its kernels.
    ///
    /// # Errors
    /// If the tables have no products of the model's number type, or no sums over the devices that share it.
    pub fn profile(&self, shape: &ModelShape, overhead_us: f64) -> Result<LatencyProfile, ImportError> {
        let (quantized, full) = (self.products(shape)?, self.products_of(FULL)?);
        let rows = quantized.rows();
        let layers = shape.block_layers() as f64;
        let [qkv, out, up, down] = shape.linears();
        let linears = |rows: u32| -> f64 { [qkv, out, up, down].iter().map(|&sizes| quantized.us(rows, sizes)).sum() };
        let rank = shape.lora_rank;
        let low_rank = |rows: u32| -> f64 {
            let pair = |&(inputs, outputs): &(u64, u64)| full.us(rows, (inputs, rank)) + full.us(rows, (rank, outputs));
            [qkv, out, up, down].iter().map(pair).sum()
        };
        let outside = shape.outside_block();
        let adapter = |rows: u32| shape.adapter().map_or(0.0, |sizes| full.us(rows, sizes));
        // A layer without its attention.
        let layer = |rows: u32| linears(rows) + self.elementwise_us(shape, rows);
        let sums = self.all_reduce(shape)?;
        let sum_us = |elements: f64| sums.as_ref().map_or(0.0, |sums| sums.us(elements));
        let head = |rows: u32| {
            full.us(rows, (shape.hidden, shape.vocab))
                // Logits are gathered, which moves half as much as summing them.
                + sum_us(f64::from(rows) * (shape.devices * shape.vocab) as f64 / 2.0)
                + outside.coda_layers as f64 * layer(rows)
                + self.norms_us(shape, rows, outside.exit_norms)
        };
        let mut points = Vec::new();
        let mut by_rows = |component, repeats, time_us: &dyn Fn(u32) -> f64| {
            points.extend(rows.iter().map(|&rows| point(component, rows, 0, time_us(rows), repeats)));
        };
        let block = [qkv, out, up, down].iter().all(|&sizes| quantized.holds(sizes))
            && shape.adapter().is_none_or(|sizes| full.holds(sizes));
        by_rows(Component::Block, u32::from(block), &|rows| layers * linears(rows) + adapter(rows));
        by_rows(Component::Elementwise, 0, &|rows| {
            layers * self.elementwise_us(shape, rows) + self.between_loops_us(shape, rows)
        });
        if sums.is_some() {
            let of_layer = |rows: u32| 2.0 * sum_us(f64::from(rows) * shape.hidden as f64);
            by_rows(Component::AllReduce, 1, &|rows| layers * of_layer(rows));
        }
        if rank > 0 {
            let held = |&(inputs, outputs): &(u64, u64)| full.holds((inputs, rank)) && full.holds((rank, outputs));
            let lora = [qkv, out, up, down].iter().all(held);
            by_rows(Component::Lora, u32::from(lora), &|rows| layers * low_rank(rows));
        }
        by_rows(Component::Embed, 0, &|rows| {
            2.0 * self.streamed_us(2 * u64::from(rows) * shape.hidden * shape.weight_bytes)
                + outside.prelude_layers as f64 * layer(rows)
                + sum_us(f64::from(rows) * shape.hidden as f64)
        });
        let head_is_measured = full.holds((shape.hidden, shape.vocab)) && outside.coda_layers == 0;
        by_rows(Component::Head, u32::from(head_is_measured), &head);
        points.extend(
            lora::points(shape, &self.rates(), &rows).into_iter().filter(|p| p.component == Component::DepthMix),
        );
        points.extend(self.attention(shape, &layer));
        if shape.outside.is_some() {
            let copied = |depths: u32| {
                let time_us = self.streamed_us(2 * u64::from(depths) * shape.kv_bytes_per_depth());
                point(Component::KvFill, depths, 0, time_us, 0)
            };
            points.extend([1, 1 << 16].map(copied));
        }
        let mut source = format!(
            "{}; overhead as given; repeats 0: roofline at the rates of {}.yaml, products beyond the tables in proportion",
            self.source, self.gpu
        );
        if let Some(window) = shape.window {
            source += &format!("; attention as if no layer had its window of {window} tokens");
        }
        Ok(LatencyProfile {
            meta: ProfileMeta {
                schema_version: LatencyProfile::SCHEMA_VERSION,
                model: shape.describe(),
                fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
                num_loops: shape.num_loops as u32,
                device: self.gpu.clone(),
                software: software(shape),
                source,
                overhead_us,
                weight_bytes: shape.total_weight_bytes(),
                kv_bytes_per_token: shape.kv_bytes_per_token(),
                memory: Some(MemoryFigures {
                    device_bytes: Some(self.system.gpu.mem_capacity),
                    other_bytes: self.system.misc.other_mem
                        + self.system.misc.nccl_mem.get(&shape.devices).copied().unwrap_or(0),
                    ..memory_figures(shape)
                }),
                kv_fill: None,
                decode_q_len: Some(DECODE_Q_LEN),
                heads_ahead_from: None,
            },
            points,
            mixed_attention: None,
        })
    }

    /// The products of the model's layers.
    fn products(&self, shape: &ModelShape) -> Result<&Products, ImportError> {
        match (shape.weight_bytes, shape.quantized) {
            (2, None) => self.products_of(FULL),
            (2, Some(Quantized::Fp8)) => self.products_of(FP8),
            (2, Some(Quantized::Fp8Blocks)) => self.products_of(FP8_BLOCKS),
            (2, Some(Quantized::Nvfp4)) => self.products_of(NVFP4),
            _ => self.products_of("float32"),
        }
    }

    /// Times of the sums over the devices that share the model; `None` on one device.
    fn all_reduce(&self, shape: &ModelShape) -> Result<Option<AllReduce>, ImportError> {
        if shape.devices == 1 {
            return Ok(None);
        }
        let (versions, version) = &self.comm;
        let (path, _) = find_table(versions, version, "custom_allreduce_perf")?;
        AllReduce::read(&path, shape.devices).map(Some)
    }

    fn products_of(&self, number_type: &str) -> Result<&Products, ImportError> {
        let missing = || {
            let known = self.gemm.keys().copied().collect::<Vec<_>>().join(", ");
            ImportError::unusable(&self.gemm_path, format!("no product in {number_type}"), format!("one of {known}"))
        };
        self.gemm.get(number_type).ok_or_else(missing)
    }

    fn rates(&self) -> DeviceRates {
        let gpu = &self.system.gpu;
        DeviceRates {
            bytes_per_us: gpu.mem_bw * gpu.mem_bw_empirical_scaling_factor / 1e6,
            flops_per_us: gpu.bfloat16_tc_flops / 1e6,
            kernel_us: gpu.mem_empirical_constant_latency * 1e6,
        }
    }

    /// Time of a kernel that only moves memory: a constant plus the time of the bytes.
    fn streamed_us(&self, bytes: u64) -> f64 {
        self.rates().kernel_us + bytes as f64 / self.rates().bytes_per_us
    }

    /// The norms with their residuals, the activation and the rotary embedding of one layer.
    fn elementwise_us(&self, shape: &ModelShape, rows: u32) -> f64 {
        let bytes = u64::from(rows) * shape.weight_bytes;
        let rotary = 2 * (shape.heads + shape.kv_heads) * shape.head_dim;
        shape.norms_per_layer as f64 * self.streamed_us(4 * bytes * shape.hidden)
            + self.streamed_us(3 * bytes * shape.intermediate)
            + self.streamed_us(bytes * rotary)
    }

    /// Norms of the hidden state alone, without a residual.
    fn norms_us(&self, shape: &ModelShape, rows: u32, norms: u64) -> f64 {
        norms as f64 * self.streamed_us(2 * u64::from(rows) * shape.hidden * shape.weight_bytes)
    }

    /// Norms and gate of a loop, and the joining of the hidden state and the prelude's output for its product.
    fn between_loops_us(&self, shape: &ModelShape, rows: u32) -> f64 {
        let outside = shape.outside_block();
        let hidden = u64::from(rows) * shape.hidden * shape.weight_bytes;
        let gate = if outside.gate { self.streamed_us(hidden) } else { 0.0 };
        let joined = if outside.adapter { self.streamed_us(4 * hidden) } else { 0.0 };
        self.norms_us(shape, rows, outside.loop_norms) + gate + joined
    }

    /// `layer_us` is the time of a layer without its attention, by rows.
    fn attention(&self, shape: &ModelShape, layer_us: &dyn Fn(u32) -> f64) -> Vec<Point> {
        let heads = (shape.heads as u32, shape.kv_heads as u32, shape.head_dim as u32, shape.kv_bytes);
        let (layers, outside_layers) = (shape.block_layers() as f64, shape.outside_layers() as f64);
        // Of a prompt chunk in one loop: attention of the block, and a share of all that it runs around the loops.
        let coda = shape.outside_block().coda_layers as f64;
        let chunk_us = |tokens: u32, attention_us: f64| {
            let around = outside_layers * attention_us + if coda > 0.0 { coda * layer_us(tokens) } else { 0.0 };
            layers * attention_us + around / shape.num_loops as f64
        };
        let mut points: Vec<Point> = match self.decode.get(&heads) {
            Some(batches) => {
                let batch = |(&rows, curve): (&u32, &Curve)| -> Vec<Point> {
                    let at = |(&history, &time)| point(Component::DecodeAttention, rows, history, time, 1);
                    curve.iter().map(at).collect()
                };
                batches.iter().flat_map(batch).collect()
            }
            None => self.roofline(|rows, history| {
                let time = self.attention_us(shape, rows, f64::from(history), 1);
                point(Component::DecodeAttention, rows, history, time, 0)
            }),
        };
        // The points above are of one layer.
        let of = |layers: f64, component, at: &Point| Point { component, time_us: layers * at.time_us, ..*at };
        let exits: Vec<Point> = match shape.outside_layers() {
            0 => Vec::new(),
            _ => points.iter().map(|at| of(outside_layers, Component::ExitAttention, at)).collect(),
        };
        points.iter_mut().for_each(|at| *at = of(layers, Component::DecodeAttention, at));
        points.extend(exits);
        points.extend(match self.prefill.get(&heads) {
            Some(prompts) => chunks(prompts)
                .map(|(tokens, history, time)| {
                    let measured = u32::from(history == 0 && coda == 0.0);
                    point(Component::PrefillAttention, tokens, history, chunk_us(tokens, time), measured)
                })
                .collect(),
            None => self.roofline(|tokens, history| {
                let time = self.attention_us(shape, 1, f64::from(history) + f64::from(tokens) / 2.0, tokens);
                point(Component::PrefillAttention, tokens, history, chunk_us(tokens, time), 0)
            }),
        });
        points
    }

    fn roofline(&self, at: impl Fn(u32, u32) -> Point) -> Vec<Point> {
        let rows = (0..=13).map(|power| 1 << power);
        rows.flat_map(|rows| {
            [0].into_iter().chain((4..=17).map(|power| 1 << power)).map(move |history| (rows, history))
        })
        .map(|(rows, history)| at(rows, history))
        .collect()
    }

    /// Attention of `tokens` tokens in each of `sequences`, which attend to `seen` keys each on average.
    fn attention_us(&self, shape: &ModelShape, sequences: u32, seen: f64, tokens: u32) -> f64 {
        let (sequences, tokens) = (f64::from(sequences), f64::from(tokens));
        let keys = sequences * (seen + tokens / 2.0) * (2 * shape.kv_heads * shape.head_dim) as f64;
        let queries = sequences * tokens * (2 * shape.heads * shape.head_dim) as f64;
        let flops = sequences * tokens * seen * (4 * shape.heads * shape.head_dim) as f64;
        let rates = self.rates();
        let bytes = keys * shape.kv_bytes as f64 + queries * shape.weight_bytes as f64;
        rates.kernel_us + rates.kernel_time_us(bytes, flops)
    }
}

impl Products {
    /// Measured numbers of rows.
    fn rows(&self) -> Vec<u32> {
        self.0.values().next().map(|curve| curve.keys().copied().collect()).unwrap_or_default()
    }

    /// Whether a product's sizes are within the measured ones: larger products are scaled, not measured.
    fn holds(&self, (inputs, outputs): (u64, u64)) -> bool {
        self.0.keys().any(|&(n, k)| inputs <= u64::from(k) && outputs <= u64::from(n))
    }

    /// Time of a product in microseconds, linear in each size between the measured ones.
    fn us(&self, rows: u32, (inputs, outputs): (u64, u64)) -> f64 {
        let mut by_outputs: BTreeMap<u32, Curve> = BTreeMap::new();
        for (&(outputs, inputs), curve) in &self.0 {
            by_outputs.entry(outputs).or_default().insert(inputs, line_at(curve, f64::from(rows)));
        }
        let over_outputs: Curve =
            by_outputs.iter().map(|(&outputs, curve)| (outputs, share_at(curve, inputs as f64))).collect();
        share_at(&over_outputs, outputs as f64)
    }
}

/// Path of a version's table, and the other version that it belongs to by `reuse.yaml`.
fn find_table(versions: &Path, version: &str, name: &str) -> Result<(PathBuf, Option<String>), ImportError> {
    let folder = versions.join(version);
    if !folder.is_dir() {
        let known = [versions, versions.parent().unwrap_or(versions)].into_iter().find(|folder| folder.is_dir());
        let expected = match known {
            Some(known) => format!("one of {}", names_in(known)),
            None => "a GPU with tables: this GPU has only rates".to_owned(),
        };
        return Err(ImportError::unusable(&folder, "no such folder", expected));
    }
    let path = folder.join(name).with_extension("parquet");
    let reuse = folder.join("reuse.yaml");
    if path.exists() || !reuse.exists() {
        return Ok((path, None));
    }
    let declared: ReuseFile =
        serde_yaml::from_str(&read_text(&reuse)?).map_err(|error| ImportError::malformed(&reuse, error))?;
    match declared.reuse.into_iter().find(|reuse| reuse.table == name) {
        Some(Reuse { from_version, .. }) => {
            Ok((versions.join(&from_version).join(name).with_extension("parquet"), Some(from_version)))
        }
        None => Ok((path, None)),
    }
}

/// Which tables of a version are those of another one.
#[derive(Deserialize)]
struct ReuseFile {
    reuse: Vec<Reuse>,
}

#[derive(Deserialize)]
struct Reuse {
    table: String,
    from_version: String,
}

/// Number types, for readers.
fn software(shape: &ModelShape) -> String {
    let mut software = "bfloat16".to_owned();
    if shape.quantized.is_some() {
        software += &format!(", layers in {}", LinearType(shape.quantized).name());
    }
    if shape.kv_bytes < shape.weight_bytes {
        software += ", keys and values in fp8";
    }
    software
}

fn point(component: Component, rows: u32, kv_tokens: u32, time_us: f64, repeats: u32) -> Point {
    Point { component, rows, kv_tokens, depths: 1, time_us, spread_us: 0.0, repeats }
}

/// Tokens, history and time of chunks: `f(tokens + history) - f(history)`, plus the start time. Differences have the
/// scatter of both prompts; no chunk is faster than it is after a shorter history.
fn chunks(prompts: &Curve) -> impl Iterator<Item = (u32, u32, f64)> {
    let start = prompts.values().copied().fold(f64::INFINITY, f64::min);
    let per_token: Curve = prompts.iter().map(|(&length, time)| (length, time / f64::from(length))).collect();
    let histories: Vec<u32> =
        [0].into_iter().chain(prompts.keys().copied().filter(|length| length.is_power_of_two())).collect();
    prompts.keys().flat_map(move |&tokens| {
        let mut longest = 0.0;
        let chunk = |&history: &u32| {
            let after = if history == 0 { start } else { prompt_us(prompts, &per_token, history) };
            let whole = prompt_us(prompts, &per_token, tokens + history);
            longest = (whole - after + start).max(longest);
            (tokens, history, longest)
        };
        histories.iter().map(chunk).collect::<Vec<_>>()
    })
}

/// Time of a whole prompt. Linear interpolation, of time or of time per token, overestimates a sum of a start, a term
/// per token and a term per pair of tokens: the smaller value is used. Beyond the last length, the time per token is
/// extrapolated.
fn prompt_us(prompts: &Curve, per_token: &Curve, length: u32) -> f64 {
    let length = f64::from(length);
    let by_token = length * line_at(per_token, length);
    match prompts.last_key_value() {
        Some((&last, _)) if length <= f64::from(last) => by_token.min(line_at(prompts, length)),
        _ => by_token,
    }
}

fn names_in(folder: &Path) -> String {
    let Ok(entries) = std::fs::read_dir(folder) else { return "none: there is no such folder".to_owned() };
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.ok()?.path();
        let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
        Some(name?.to_str()?.to_owned())
    };
    let mut names: Vec<String> = entries.filter_map(name).collect();
    names.sort();
    names.dedup();
    names.join(", ")
}

fn read_gemm(path: &Path) -> Result<BTreeMap<&'static str, Products>, ImportError> {
    let mut gemm: BTreeMap<&'static str, Products> = BTreeMap::new();
    read_parquet(path, &["gemm_dtype"], &["n", "k", "m"], |texts, sizes, time_us| {
        if let Some(number_type) = [FULL, FP8, FP8_BLOCKS, NVFP4].into_iter().find(|known| *known == texts[0]) {
            let products = &mut gemm.entry(number_type).or_default().0;
            keep_fastest(products.entry((sizes[0], sizes[1])).or_default(), sizes[2], time_us);
        }
        sizes.iter().all(|&size| size > 0)
    })?;
    match gemm.contains_key(FULL) {
        false => Err(ImportError::unusable(path, format!("no {FULL} row"), "products of 16-bit floats")),
        true => Ok(gemm),
    }
}

/// Whether heads, head size, sequences and tokens are all above 0.
fn is_attention(sizes: &[u32]) -> bool {
    matches!(sizes, &[heads, _, head_dim, batch, length, ..] if heads.min(head_dim).min(batch).min(length) > 0)
}

/// Maximum size in a row, so that sums of two cannot overflow.
const MOST: i64 = 1 << 30;

const HEADS: [&str; 3] = ["num_heads", "num_key_value_heads", "head_dim"];

fn read_prefill(path: &Path) -> Result<BTreeMap<HeadShape, Curve>, ImportError> {
    let mut prefill: BTreeMap<HeadShape, Curve> = BTreeMap::new();
    let sizes = [&HEADS[..], &["batch_size", "isl", "step", "window_size"]].concat();
    read_parquet(path, &["attn_dtype", "kv_cache_dtype"], &sizes, |texts, sizes, time_us| {
        if let (Some(kv_bytes), &[heads, kv_heads, head_dim, 1, length, 0, 0]) = (kv_bytes(texts), sizes) {
            keep_fastest(prefill.entry((heads, kv_heads, head_dim, kv_bytes)).or_default(), length, time_us);
        }
        is_attention(sizes)
    })?;
    Ok(prefill)
}

fn read_decode(path: &Path) -> Result<BTreeMap<HeadShape, BTreeMap<u32, Curve>>, ImportError> {
    let mut decode: BTreeMap<HeadShape, BTreeMap<u32, Curve>> = BTreeMap::new();
    let sizes = [&HEADS[..], &["batch_size", "isl", "step", "window_size"]].concat();
    read_parquet(path, &["attn_dtype", "kv_cache_dtype"], &sizes, |texts, sizes, time_us| {
        if let (Some(kv_bytes), &[heads, kv_heads, head_dim, batch, 1, history, 0]) = (kv_bytes(texts), sizes) {
            let batches = decode.entry((heads, kv_heads, head_dim, kv_bytes)).or_default();
            keep_fastest(batches.entry(batch).or_default(), history, time_us);
        }
        is_attention(sizes)
    })?;
    Ok(decode)
}

/// Bytes per element of keys and values of a row whose queries have 16 bits.
fn kv_bytes(types: &[&str]) -> Option<u64> {
    match types {
        ["bfloat16", "bfloat16"] => Some(2),
        ["bfloat16", "fp8"] => Some(1),
        _ => None,
    }
}

/// Where several kernels were measured, the framework uses the fastest.
pub(crate) fn keep_fastest(curve: &mut Curve, x: u32, time_us: f64) {
    let kept = curve.entry(x).or_insert(time_us);
    *kept = kept.min(time_us);
}

/// Calls `row` with the named texts and sizes of each row and its `latency` in microseconds; `row` returns whether the
/// sizes are valid. In a table without a column `window_size`, the window is 0: none.
pub(crate) fn read_parquet(
    path: &Path,
    texts: &[&str],
    sizes: &[&str],
    row: impl FnMut(&[&str], &[u32], f64) -> bool,
) -> Result<(), ImportError> {
    let damaged = |message: &str| ImportError::malformed(path, message);
    catching_damage(|| read_rows(path, texts, sizes, row), damaged)
}

fn read_rows(
    path: &Path,
    texts: &[&str],
    sizes: &[&str],
    mut row: impl FnMut(&[&str], &[u32], f64) -> bool,
) -> Result<(), ImportError> {
    traces::input::check_no_pointer(path)?;
    let file = File::open(path).map_err(|source| ImportError::Io { path: path.to_owned(), source })?;
    let reader = SerializedFileReader::new(file).map_err(|error| ImportError::malformed(path, error))?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let place = |name: &&str| match schema.columns().iter().position(|column| column.name() == *name) {
        None if *name != "window_size" => Err(ImportError::unusable(path, format!("no column {name}"), "it")),
        found => Ok(found),
    };
    let texts: Vec<Option<usize>> = texts.iter().map(place).collect::<Result<_, _>>()?;
    let sizes: Vec<Option<usize>> = sizes.iter().map(place).collect::<Result<_, _>>()?;
    let latency = place(&"latency")?.unwrap_or_default();
    for found in reader.get_row_iter(None).map_err(|error| ImportError::malformed(path, error))? {
        let found = found.map_err(|error| ImportError::malformed(path, error))?;
        let text = |place: &Option<usize>| match place {
            Some(place) => found.get_string(*place).map(String::as_str),
            None => Ok(""),
        };
        let size = |place: &Option<usize>| match place {
            Some(place) => found.get_long(*place),
            None => Ok(0),
        };
        let texts: Vec<&str> =
            texts.iter().map(text).collect::<Result<_, _>>().map_err(|error| ImportError::malformed(path, error))?;
        let sizes: Vec<i64> =
            sizes.iter().map(size).collect::<Result<_, _>>().map_err(|error| ImportError::malformed(path, error))?;
        let time_us = 1e3 * found.get_double(latency).map_err(|error| ImportError::malformed(path, error))?;
        let count = |&size: &i64| Some(size).filter(|size| *size <= MOST)?.try_into().ok();
        let counts: Option<Vec<u32>> = sizes.iter().map(count).collect();
        let is_time = time_us.is_finite() && time_us >= 0.0;
        if !counts.filter(|_| is_time).is_some_and(|counts| row(&texts, &counts, time_us)) {
            let expected = format!("sizes up to {MOST} and a time");
            return Err(ImportError::unusable(path, format!("{sizes:?}, {time_us} us"), expected));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;
    use crate::model::KvType;
    use crate::model::tests::{GEMMA, HUGINN, OURO, shape};

    /// Writes rows of texts, sizes and milliseconds.
    pub(crate) fn write(path: &Path, texts: &[&str], sizes: &[&str], rows: &[(Vec<&str>, Vec<i64>, f64)]) {
        let fields = texts.iter().map(|name| format!("REQUIRED BYTE_ARRAY {name} (UTF8);"));
        let fields = fields.chain(sizes.iter().map(|name| format!("REQUIRED INT64 {name};")));
        let schema = format!("message m {{ {} REQUIRED DOUBLE latency; }}", fields.collect::<String>());
        let schema = Arc::new(parse_message_type(&schema).unwrap());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for column in 0..texts.len() {
            let values: Vec<ByteArray> = rows.iter().map(|row| row.0[column].into()).collect();
            let mut writer = group.next_column().unwrap().unwrap();
            writer.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
            writer.close().unwrap();
        }
        for column in 0..sizes.len() {
            let values: Vec<i64> = rows.iter().map(|row| row.1[column]).collect();
            let mut writer = group.next_column().unwrap().unwrap();
            writer.typed::<Int64Type>().write_batch(&values, None, None).unwrap();
            writer.close().unwrap();
        }
        let values: Vec<f64> = rows.iter().map(|row| row.2).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<DoubleType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
    }

    /// Products take `m * n * k` femtoseconds plus a microsecond; attention of `heads` heads takes a nanosecond per
    /// key.
    fn systems(heads: i64) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let yaml = "data_dir: data/g\ngpu:\n  mem_bw: 1.0e+12\n  mem_bw_empirical_scaling_factor: 0.8\n  \
            mem_empirical_constant_latency: 3.0e-6\n  mem_capacity: 85899345920\n  bfloat16_tc_flops: 1.0e+14\nmisc:\n  other_mem: 1000\n";
        std::fs::write(folder.path().join("g.yaml"), yaml).unwrap();
        let data = folder.path().join("data/g");
        let grid = |sizes: &[i64]| -> Vec<(i64, i64, i64)> {
            let pairs = sizes.iter().flat_map(|&n| sizes.iter().map(move |&k| (n, k)));
            pairs.flat_map(|(n, k)| [1, 64].map(|m| (n, k, m))).collect()
        };
        let gemm: Vec<_> = grid(&[64, 2048, 16384, 65536])
            .into_iter()
            .map(|(n, k, m)| (vec!["bfloat16"], vec![n, k, m], 1e-3 + (m * n * k) as f64 * 1e-12))
            .collect();
        write(&data.join("gemm/vllm/1.0/gemm_perf.parquet"), &["gemm_dtype"], &["n", "k", "m"], &gemm);
        let kinds = ["attn_dtype", "kv_cache_dtype"];
        let sizes = ["num_heads", "num_key_value_heads", "head_dim", "batch_size", "isl", "step"];
        let row = |sizes: Vec<i64>, time: f64| (vec!["bfloat16", "bfloat16"], sizes, time);
        let context = [16, 1024, 4096].map(|isl| row(vec![heads, 1, 256, 1, isl, 0], 5e-3 + (isl * isl) as f64 * 1e-9));
        write(&data.join("attention/vllm/1.0/context_attention_perf.parquet"), &kinds, &sizes, &context);
        let decodes: Vec<_> = [1, 8]
            .into_iter()
            .flat_map(|batch| {
                [15, 4095].map(|step| row(vec![heads, 1, 256, batch, 1, step], (batch * step) as f64 * 1e-6))
            })
            .collect();
        write(&data.join("attention/vllm/1.0/generation_attention_perf.parquet"), &kinds, &sizes, &decodes);
        folder
    }

    fn profile(heads: i64, num_loops: u64, rank: u64) -> LatencyProfile {
        let systems = systems(heads);
        let tables = KernelTables::read(systems.path(), "g", "vllm", "1.0").unwrap();
        tables.profile(&shape(GEMMA, num_loops, rank).unwrap(), 5.0).unwrap()
    }

    fn at(profile: &LatencyProfile, component: Component, rows: u32, history: u32) -> &Point {
        profile.points_of(component).find(|point| (point.rows, point.kv_tokens) == (rows, history)).unwrap()
    }

    #[test]
    fn products_are_summed_over_layers_and_extended_beyond_the_tables() {
        let profile = profile(8, 3, 0);
        let weights = 2048.0 * (2560.0 + 2048.0 + 32768.0 + 16384.0);
        let block = at(&profile, Component::Block, 64, 0);
        assert!((block.time_us - 6.0 * (4.0 + 64.0 * weights * 1e-9)).abs() < 1e-6, "{block:?}");
        let head = at(&profile, Component::Head, 1, 0);
        assert!((head.time_us - 256_000.0 / 65_536.0 * (1.0 + 65_536.0 * 2048.0 * 1e-9)).abs() < 1e-9, "{head:?}");
        assert_eq!((block.repeats, head.repeats), (1, 0), "the head has more outputs than any measured product");
        assert_eq!(at(&profile, Component::Elementwise, 1, 0).repeats, 0);
        assert_eq!(profile.meta.overhead_us, 5.0);
    }

    #[test]
    fn measured_attention_is_taken_and_a_chunk_is_a_difference_of_prompts() {
        let profile = profile(8, 1, 0);
        assert_eq!(at(&profile, Component::DecodeAttention, 8, 4095).time_us, 18.0 * 8.0 * 4.095);
        let chunk = at(&profile, Component::PrefillAttention, 1024, 1024);
        let curve: Curve = [(16, 5.000256), (1024, 6.048576), (4096, 21.777216)].into();
        let expected = line_at(&curve, 2048.0) - line_at(&curve, 1024.0) + 5.000256;
        assert!((chunk.time_us - 18.0 * expected).abs() < 1e-6, "{chunk:?}");
        assert_eq!(chunk.repeats, 0, "no chunk after a history was measured");
    }

    #[test]
    fn chunks_of_prompts_that_grow_with_their_square_take_what_the_square_says() {
        let prompts: Curve = (4..15).map(|power| 1 << power).map(|x| (x, 2.0 + f64::from(x * x) * 1e-6)).collect();
        let chunks: Vec<_> = chunks(&prompts).collect();
        let of = |tokens: u32, history: u32| chunks.iter().find(|c| (c.0, c.1) == (tokens, history)).unwrap().2;
        for (tokens, history) in [(1024, 2048), (2048, 4096), (512, 4096)] {
            let (tokens_f, history_f) = (f64::from(tokens), f64::from(history));
            let expected = 2.0 + (tokens_f * tokens_f + 2.0 * tokens_f * history_f) * 1e-6;
            assert!((of(tokens, history) / expected - 1.0).abs() < 0.05, "{tokens} after {history}: {expected}");
        }
        let noisy: Curve = prompts.iter().map(|(&x, time)| (x, if x == 4096 { 1.4 * time } else { *time })).collect();
        let falls = super::chunks(&noisy).zip(super::chunks(&noisy).skip(1)).any(|(a, b)| a.0 == b.0 && b.2 < a.2);
        assert!(!falls, "no chunk is shorter after a longer history");
    }

    #[test]
    fn attention_that_was_not_measured_is_a_roofline_and_says_so() {
        let profile = profile(4, 1, 0);
        let decode = at(&profile, Component::DecodeAttention, 8, 4096);
        let bytes = 8.0 * (4096.5 * 2.0 * 256.0 + 2.0 * 8.0 * 256.0) * 2.0;
        assert!((decode.time_us - 18.0 * (3.0 + bytes / 0.8e6)).abs() < 1e-6, "{decode:?}");
        assert_eq!((decode.repeats, at(&profile, Component::PrefillAttention, 1024, 0).repeats), (0, 0));
    }

    #[test]
    fn low_rank_products_are_measured_and_mixing_depths_is_computed() {
        let profile = profile(8, 3, 64);
        assert!(at(&profile, Component::Lora, 1, 0).repeats == 1);
        assert!(profile.points_of(Component::DepthMix).all(|point| point.repeats == 0 && point.depths > 1));
        assert!(profile.points_of(Component::DepthMix).count() > 0);
    }

    /// Time of a product in the tables of [`systems`], in microseconds: a microsecond plus a femtosecond for each
    /// multiplication, proportional above 65,536 outputs.
    fn product_us(rows: f64, inputs: f64, outputs: f64) -> f64 {
        1.0 + rows * inputs * outputs * 1e-9
    }

    fn profile_of(config: &str, num_loops: Option<u64>) -> LatencyProfile {
        let systems = systems(8);
        let tables = KernelTables::read(systems.path(), "g", "vllm", "1.0").unwrap();
        tables.profile(&shape(config, num_loops, 0).unwrap(), 0.0).unwrap()
    }

    /// Microseconds of a kernel that moves this many bytes: 3, and a terabyte per second at 80%.
    fn streamed_us(bytes: f64) -> f64 {
        3.0 + bytes / 0.8e6
    }

    #[test]
    fn a_loop_of_ouro_is_every_layer_with_four_norms_then_a_norm_and_the_gate() {
        let profile = profile_of(OURO, None);
        let rows = 64.0;
        let products: f64 = [(2048.0, 6144.0), (2048.0, 2048.0), (2048.0, 11264.0), (5632.0, 2048.0)]
            .iter()
            .map(|&(inputs, outputs)| product_us(rows, inputs, outputs))
            .sum();
        let block = at(&profile, Component::Block, 64, 0);
        assert!((block.time_us - 24.0 * products).abs() < 1e-6, "{block:?}");
        let hidden = rows * 2048.0 * 2.0;
        let layer = 4.0 * streamed_us(4.0 * hidden)
            + streamed_us(3.0 * rows * 5632.0 * 2.0)
            + streamed_us(rows * 2.0 * 32.0 * 128.0 * 2.0);
        let elementwise = at(&profile, Component::Elementwise, 64, 0);
        let expected = 24.0 * layer + streamed_us(2.0 * hidden) + streamed_us(hidden);
        assert!((elementwise.time_us - expected).abs() < 1e-6, "{elementwise:?}");
        assert_eq!(profile.meta.num_loops, 4);
        assert_eq!(profile.points_of(Component::ExitAttention).count(), 0);
        // Keys and values of a row at one depth are read and written.
        let copied = at(&profile, Component::KvFill, 1, 0);
        assert!((copied.time_us - streamed_us(2.0 * 24.0 * 2.0 * 2048.0 * 2.0)).abs() < 1e-9, "{copied:?}");
    }

    #[test]
    fn layers_around_the_loops_are_charged_where_a_token_runs_them_once() {
        let huginn = profile_of(HUGINN, Some(16));
        let (rows, width, inner) = (64.0, 5280.0, 17920.0);
        let linears = product_us(rows, width, 3.0 * width)
            + product_us(rows, width, width)
            + product_us(rows, width, 2.0 * inner)
            + product_us(rows, inner, width);
        let hidden = rows * width * 2.0;
        let elementwise = 4.0 * streamed_us(4.0 * hidden)
            + streamed_us(3.0 * rows * inner * 2.0)
            + streamed_us(rows * 2.0 * 2.0 * width * 2.0);
        let time = |component| at(&huginn, component, 64, 0).time_us;
        let near = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-9, "{found} {expected}");
        near(time(Component::Block), 4.0 * linears + product_us(rows, 2.0 * width, width));
        near(time(Component::Elementwise), 4.0 * elementwise + streamed_us(4.0 * hidden));
        near(time(Component::Embed), 2.0 * streamed_us(2.0 * hidden) + 2.0 * (linears + elementwise));
        let vocabulary = product_us(rows, width, 65_536.0);
        near(time(Component::Head), vocabulary + 2.0 * (linears + elementwise) + 2.0 * streamed_us(2.0 * hidden));
        assert_eq!(at(&huginn, Component::Head, 64, 0).repeats, 0, "its coda is in part computed");
        // Attention in the tables is of another head shape, so it is a roofline: of 4 layers in the block, 4 around it.
        let decode = at(&huginn, Component::DecodeAttention, 8, 1024);
        near(decode.time_us, at(&huginn, Component::ExitAttention, 8, 1024).time_us);
    }

    #[test]
    fn a_prompt_runs_the_layers_around_the_loops_once_at_full_depth() {
        let of = |loops: u64| at(&profile_of(HUGINN, Some(loops)), Component::PrefillAttention, 64, 0).time_us;
        // In each loop: attention of 4 layers, and a share of that of 4 more and of two coda layers' products.
        let [one, two, four] = [1, 2, 4].map(of);
        let around = 2.0 * (one - two);
        assert!((four - (one - 0.75 * around)).abs() < 1e-6, "{one} {two} {four}");
        let head = at(&profile_of(HUGINN, Some(1)), Component::Head, 64, 0).time_us;
        let norms = 2.0 * streamed_us(2.0 * 64.0 * 5280.0 * 2.0);
        let coda = head - product_us(64.0, 5280.0, 65_536.0) - norms;
        let attention_of_block = one - around;
        assert!((around - (attention_of_block + coda)).abs() < 1e-6, "{around} {attention_of_block} {coda}");
    }

    /// Sums over two devices: a microsecond, and one for each million elements.
    fn write_sums(systems: &Path) {
        let path = systems.join("data/g/comm/vllm/1.0/custom_allreduce_perf.parquet");
        let sum = |elements: i64| (vec!["all_reduce"], vec![2, elements], 1e-3 + elements as f64 * 1e-9);
        write(&path, &["op_name"], &["num_gpus", "message_size"], &[sum(1), sum(1 << 28)]);
    }

    #[test]
    fn two_devices_have_half_of_each_layer_and_sum_it_twice() {
        let systems = systems(4);
        let tables = KernelTables::read(systems.path(), "g", "vllm", "1.0").unwrap();
        let whole = shape(GEMMA, 1, 0).unwrap();
        let half = whole.clone().shared_by(2).unwrap();
        let error = tables.profile(&half, 0.0).unwrap_err().to_string();
        assert!(error.contains("comm"), "{error}");
        write_sums(systems.path());
        let profile = tables.profile(&half, 0.0).unwrap();
        let rows = 64.0;
        let products: f64 = [(2048.0, 1536.0), (1024.0, 2048.0), (2048.0, 16384.0), (8192.0, 2048.0)]
            .iter()
            .map(|&(inputs, outputs)| product_us(rows, inputs, outputs))
            .sum();
        let near = |component, expected: f64| {
            let found = at(&profile, component, 64, 0);
            assert!((found.time_us / expected - 1.0).abs() < 1e-9, "{found:?}, expected {expected}");
            assert_eq!(found.repeats, u32::from(component != Component::Embed));
        };
        near(Component::Block, 18.0 * products);
        let sum_us = |width: f64| 1.0 + rows * width * 1e-6;
        near(Component::AllReduce, 18.0 * 2.0 * sum_us(2048.0));
        near(Component::Embed, 2.0 * streamed_us(2.0 * rows * 2048.0 * 2.0) + sum_us(2048.0));
        let head = at(&profile, Component::Head, 64, 0).time_us;
        let vocabulary = 128_000.0 / 65_536.0 * product_us(rows, 2048.0, 65_536.0);
        assert!((head - (vocabulary + sum_us(128_000.0))).abs() < 1e-6, "{head}");
        // The table has attention of four heads and one KV head, which both devices have.
        assert_eq!(at(&profile, Component::DecodeAttention, 8, 4095).repeats, 1);
        assert_eq!(half.kv_bytes_per_token(), whole.kv_bytes_per_token(), "the KV head is copied");
        // Norms and the projections of the KV head are on both.
        let copied = 2 * (18 * (2 * 2048 + 2048 * 2 * 256) + 2048);
        assert_eq!(half.total_weight_bytes(), (whole.total_weight_bytes() - copied) / 2 + copied);
        assert!(profile.meta.model.ends_with("on 2 devices"));
        let error = tables.profile(&shape(GEMMA, 1, 0).unwrap().shared_by(4).unwrap(), 0.0).unwrap_err().to_string();
        assert!(error.contains("no sum over 4 devices, expected one over 2"), "{error}");
    }

    #[test]
    fn keys_and_values_in_8_bits_take_their_own_attention_or_half_the_memory() {
        let systems = systems(8);
        let tables = KernelTables::read(systems.path(), "g", "vllm", "1.0").unwrap();
        let small = shape(GEMMA, 1, 0).unwrap().with_types(None, Some(KvType::Fp8));
        let profile = tables.profile(&small, 0.0).unwrap();
        assert_eq!(2 * profile.meta.kv_bytes_per_token, shape(GEMMA, 1, 0).unwrap().kv_bytes_per_token());
        let decode = at(&profile, Component::DecodeAttention, 8, 4096);
        let bytes = 8.0 * (4096.5 * 2.0 * 256.0 + 2.0 * 2.0 * 8.0 * 256.0);
        assert!((decode.time_us - 18.0 * (3.0 + bytes / 0.8e6)).abs() < 1e-6, "{decode:?}");
        assert_eq!(decode.repeats, 0, "the tables have 16-bit keys and values only");
        let path = systems.path().join("data/g/attention/vllm/1.0/generation_attention_perf.parquet");
        let sizes = ["num_heads", "num_key_value_heads", "head_dim", "batch_size", "isl", "step"];
        let row = |kv: &'static str, ms: f64| (vec!["bfloat16", kv], vec![8, 1, 256, 1, 1, 15], ms);
        write(&path, &["attn_dtype", "kv_cache_dtype"], &sizes, &[row("bfloat16", 2.0), row("fp8", 1.0)]);
        let tables = KernelTables::read(systems.path(), "g", "vllm", "1.0").unwrap();
        assert_eq!(at(&tables.profile(&small, 0.0).unwrap(), Component::DecodeAttention, 1, 15).time_us, 18e3);
    }

    #[test]
    fn what_is_missing_is_named_with_what_there_is() {
        let systems = systems(8);
        let error = |gpu, framework, version| {
            KernelTables::read(systems.path(), gpu, framework, version).unwrap_err().to_string()
        };
        assert!(error("h", "vllm", "1.0").contains("expected one of g"));
        assert!(error("g", "vllm", "2.0").contains("expected one of 1.0"));
        assert!(error("g", "trt", "1.0").contains("expected one of vllm"));
        let rates = std::fs::read_to_string(systems.path().join("g.yaml")).unwrap().replace("data/g", "data/rates");
        std::fs::write(systems.path().join("rates.yaml"), rates).unwrap();
        assert!(error("rates", "vllm", "1.0").contains("this GPU has only rates"));
        for kind in ["gemm", "attention"] {
            std::fs::create_dir(systems.path().join("data/g").join(kind).join("vllm/3.0")).unwrap();
        }
        assert!(error("g", "vllm", "3.0").contains("vllm/3.0/context_attention_perf.parquet"));
    }

    #[test]
    fn a_table_that_a_version_reuses_is_that_of_the_other_and_the_profile_says_so() {
        let systems = systems(8);
        for (kind, tables) in
            [("gemm", vec!["gemm_perf"]), ("attention", vec!["context_attention_perf", "generation_attention_perf"])]
        {
            let folder = systems.path().join("data/g").join(kind).join("vllm/2.0");
            std::fs::create_dir(&folder).unwrap();
            let reuse = tables.iter().map(|table| format!("- {{table: {table}, from_version: '1.0', reason: r}}\n"));
            let text = format!("schema_version: 1\nreuse:\n{}", reuse.collect::<String>());
            std::fs::write(folder.join("reuse.yaml"), text).unwrap();
        }
        let read = |version| KernelTables::read(systems.path(), "g", "vllm", version).unwrap();
        let gemma = shape(GEMMA, 1, 0).unwrap();
        let [own, reused] = ["1.0", "2.0"].map(|version| read(version).profile(&gemma, 0.0).unwrap());
        assert_eq!(own.points, reused.points);
        assert!(reused.meta.source.contains("gemm_perf of 1.0, as reuse.yaml says"), "{}", reused.meta.source);
    }

    #[test]
    fn damaged_tables_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gemm_perf.parquet");
        let rows: Vec<_> = (1..40).map(|m| (vec!["bfloat16"], vec![64, 64, m], 1.0)).collect();
        write(&path, &["gemm_dtype"], &["n", "k", "m"], &rows);
        assert!(read_gemm(&path).is_ok());
        let bytes = std::fs::read(&path).unwrap();
        let mut refused = 0;
        for place in 0..bytes.len() {
            for flipped in [0x01, 0x40, 0xff] {
                let mut damaged = bytes.clone();
                damaged[place] ^= flipped;
                std::fs::write(&path, &damaged).unwrap();
                refused += usize::from(read_gemm(&path).is_err());
            }
        }
        assert!(refused > bytes.len(), "{refused} of {} flips were noticed", 3 * bytes.len());
    }

    #[test]
    fn layers_are_timed_in_their_own_number_type_and_the_head_in_16_bits() {
        let systems = systems(8);
        let path = systems.path().join("data/g/gemm/vllm/1.0/gemm_perf.parquet");
        let rows: Vec<_> = [("bfloat16", 2.0), ("fp8", 1.0)]
            .into_iter()
            .flat_map(|(number_type, ms)| [1, 8].map(|m| (vec![number_type], vec![262_144, 65_536, m], ms)))
            .collect();
        write(&path, &["gemm_dtype"], &["n", "k", "m"], &rows);
        let tables = KernelTables::read(systems.path(), "g", "vllm", "1.0").unwrap();
        let quantized = GEMMA.replace("{\"model", "{\"quantization_config\": {\"quant_method\": \"fp8\"}, \"model");
        let fp8 = tables.profile(&shape(&quantized, 1, 0).unwrap(), 0.0).unwrap();
        assert_eq!(at(&fp8, Component::Block, 8, 0).time_us, 18.0 * 4.0 * 1e3);
        assert_eq!(at(&fp8, Component::Head, 8, 0).time_us, 2e3);
        let error = |config: &str| tables.profile(&shape(config, 1, 0).unwrap(), 0.0).unwrap_err().to_string();
        let blocks = quantized.replace("\"fp8\"", "\"fp8\", \"weight_block_size\": [128, 128]");
        assert!(error(&blocks).contains("found no product in fp8_block, expected one of bfloat16, fp8"));
        assert!(error(&GEMMA.replace("bfloat16", "float32")).contains("found no product in float32"));
    }
}
