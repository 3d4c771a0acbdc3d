//! Kernel tables by kind of layer, as written by LLMServingSim's profiler.
//!
//! A folder contains `dense.csv` (layers by tokens of the pass), `per_sequence.csv` (exit head and sampler by
//! sequences), `attention.csv` (prompt tokens, their context, decode rows, their history) and optionally `skew_fit.csv`
//! ([uneven histories](crate::skew)). All tables are of one layer, in microseconds of kernel time. Columns are found by
//! name.
//!
//! A step of the engine runs the kernels as follows:
//!
//! | component of the profile | tables |
//! | --- | --- |
//! | block | for each of its layers: `layernorm` as often as the model has norms that no other row names (two, in Gemma 2 and 3 four), and every other dense layer once |
//! | mixed attention | for each layer of the block: `attention` |
//! | embed | `embedding` and `final_layernorm`, once for each token that runs |
//! | head | `lm_head` and `sampler`, once for each sequence that predicts |
//!
//! Layers may be measured at different numbers of tokens: each is interpolated linearly between its own points.
//!
//! Attention tables have two forms. In the older form, `kv_prefill` is the history before the one prompt chunk of a
//! pass. In the newer form, `prefill_key` is the mean number of keys that a prompt token attends to, and some rows have
//! several chunks ([`PrefillAxis`]). Rows with several query tokens in a decode row (`decode_q_len`, speculative
//! decoding) are left out. Tables of other kernels (experts, linear or sparse attention) are rejected.
//!
//! Tables of one device of several (`tp2`) were measured without the sums over them. Their times come from another table
//! ([`AllReduce`]): two for each layer, one for the embedding, and the gathering of logits with the head. The sampler runs
//! over the whole vocabulary, so that its times are those of one device (`tp1`), where they are at hand.
//!
//! The tables contain only kernel times, so a step's overhead is 0: with asynchronous scheduling and CUDA graphs, the
//! device runs one kernel after the other. The gaps between kernels are not in the tables.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use traces::table::{Owner, Table, read_header};
use traces::{
    Component, LatencyProfile, MixedAttention, MixedPoint, Point, PrefillAxis, ProfileMeta, SkewCell, TraceError,
};

use crate::all_reduce::AllReduce;
use crate::curve::{Curve, line_at};
use crate::error::{ImportError, read_text};
use crate::lora::{self, DeviceRates};
use crate::memory::memory_figures;
use crate::model::{KvType, LinearType, ModelShape, Quantized};
use crate::skew::read_skew;

/// The tables of one device and model.
#[derive(Clone, Debug)]
pub struct LayerTables {
    folder: PathBuf,
    meta: Meta,
    dense: BTreeMap<String, Curve>,
    per_sequence: BTreeMap<String, Curve>,
    prefill_axis: PrefillAxis,
    attention: Vec<MixedPoint>,
    skew: Vec<SkewCell>,
    /// Of tables of one device of several.
    all_reduce: Option<AllReduce>,
}

/// What `meta.yaml` contains about the measurement, if it exists.
#[derive(Clone, Debug, Default, Deserialize)]
struct Meta {
    gpu: Option<String>,
    vllm_version: Option<String>,
    /// Number types of weights and of keys and values, such as `bf16` or `fp8-kvfp8`.
    variant: Option<String>,
}

const NORM: &str = "layernorm";
const EMBED: [&str; 2] = ["embedding", "final_layernorm"];
const SAMPLER: &str = "sampler";
const HEAD: [&str; 2] = ["lm_head", SAMPLER];
const LINEARS: [&str; 4] = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"];
/// Norms of queries and keys, which are not counted among a layer's norms.
const QUERY_NORMS: [&str; 3] = ["qk_norm", "q_norm", "k_norm"];

impl LayerTables {
    /// Reads a folder of tables, or the `tp1` folder in it.
    ///
    /// # Errors
    /// If a table cannot be read, a required table is missing, or the tables are of one device among several or of a
    /// model that is not a dense transformer.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self, ImportError> {
        Self::read_shared(folder, 1, None)
    }

    /// As [`read`](Self::read), of one of `devices` that share each layer, from the folder `tpN`; and the times of the
    /// sums over them.
    ///
    /// # Errors
    /// As there, and if the tables are of another number of devices.
    pub fn read_shared(
        folder: impl AsRef<Path>,
        devices: u64,
        all_reduce: Option<AllReduce>,
    ) -> Result<Self, ImportError> {
        let folder = tables_of(folder.as_ref(), devices)?;
        for (table, of) in [("moe.csv", "experts"), ("linear_attention.csv", "linear attention")] {
            if folder.join(table).exists() {
                return Err(ImportError::unusable(
                    &folder,
                    format!("{table}, {of}"),
                    "the tables of a dense transformer",
                ));
            }
        }
        let meta = match meta_file(&folder) {
            Some(path) => {
                serde_yaml::from_str(&read_text(&path)?).map_err(|error| ImportError::malformed(&path, error))?
            }
            None => Meta::default(),
        };
        let dense = read_layers(&folder.join("dense.csv"), "tokens")?;
        let mut per_sequence = read_layers(&folder.join("per_sequence.csv"), "sequences")?;
        let whole = folder.with_file_name("tp1").join("per_sequence.csv");
        if devices > 1 && whole.exists() {
            let of_whole = read_layers(&whole, "sequences")?;
            per_sequence.extend(of_whole.into_iter().filter(|(layer, _)| layer == SAMPLER));
        }
        for (table, layers, needed) in [
            ("dense.csv", &dense, [&LINEARS[..], &EMBED[..1]].concat()),
            ("per_sequence.csv", &per_sequence, vec![HEAD[0]]),
        ] {
            if let Some(missing) = needed.into_iter().find(|&layer| !layers.contains_key(layer)) {
                let found: Vec<&str> = layers.keys().map(String::as_str).collect();
                let found = format!("no layer {missing} among {}", found.join(", "));
                return Err(ImportError::unusable(&folder.join(table), found, "its times"));
            }
        }
        let (prefill_axis, attention) = read_attention(&folder.join("attention.csv"))?;
        let skew = read_skew(&folder)?;
        Ok(Self { folder, meta, dense, per_sequence, prefill_axis, attention, skew, all_reduce })
    }

    /// The number types that were measured, where `meta.yaml` says them; else those that are asked for.
    ///
    /// # Errors
    /// If others are asked for than were measured.
    pub fn types(
        &self,
        linear: Option<LinearType>,
        kv: Option<KvType>,
    ) -> Result<(Option<LinearType>, Option<KvType>), ImportError> {
        let Some(variant) = &self.meta.variant else { return Ok((linear, kv)) };
        let (weights, kv_type) = variant.split_once("-kv").unwrap_or((variant, ""));
        // A model whose own layers are quantized has a variant of its number type.
        let measured = (weights.starts_with("fp8")).then_some(LinearType(Some(Quantized::Fp8)));
        let measured_kv = if kv_type == "fp8" { KvType::Fp8 } else { KvType::Bf16 };
        let found = format!("tables of variant {variant}");
        let wrong = |expected: &str| {
            Err(ImportError::unusable(&self.folder, found.clone(), format!("{expected}, as asked for")))
        };
        match (linear, kv) {
            (_, Some(kv)) if kv != measured_kv => wrong(&format!("keys and values in {}", kv.name())),
            (Some(linear), _) if linear.0.is_some() != measured.is_some() => {
                wrong(&format!("layers in {}", linear.name()))
            }
            _ => Ok((linear.or(measured), Some(measured_kv))),
        }
    }

    /// The measured device, if recorded.
    pub fn device(&self) -> Option<&str> {
        self.meta.gpu.as_deref()
    }

    /// The latency profile of a model whose single layer was measured.
    pub fn profile(&self, shape: &ModelShape, device: &str) -> LatencyProfile {
        let layers = shape.block_layers() as f64;
        let counts = self.layer_counts(shape);
        let of_block = |name: &str| layers * counts.get(name).copied().unwrap_or(0.0);
        let once = |names: &'static [&'static str]| move |name: &str| if names.contains(&name) { 1.0 } else { 0.0 };
        let mut points = sum(Component::Block, &self.dense, of_block);
        let rows: Vec<u32> = points.iter().map(|point| point.rows).collect();
        points.extend(lora::points(shape, &self.rates(shape), &rows));
        points.extend(sum(Component::Embed, &self.dense, once(&EMBED)));
        points.extend(sum(Component::Head, &self.per_sequence, once(&HEAD)));
        if let Some(all_reduce) = &self.all_reduce {
            add_sums(&mut points, all_reduce, shape);
        }
        let block = |point: &MixedPoint| MixedPoint { time_us: layers * point.time_us, ..*point };
        LatencyProfile {
            meta: ProfileMeta {
                schema_version: LatencyProfile::SCHEMA_VERSION,
                model: shape.describe(),
                fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
                num_loops: shape.num_loops as u32,
                device: device.to_owned(),
                software: self
                    .meta
                    .vllm_version
                    .as_ref()
                    .map_or("not said".to_owned(), |version| format!("vLLM {version}")),
                source: self.source(shape, &counts),
                overhead_us: 0.0,
                weight_bytes: shape.total_weight_bytes(),
                kv_bytes_per_token: shape.num_loops * shape.kv_bytes_per_depth(),
                memory: Some(memory_figures(shape)),
                kv_fill: None,
                decode_q_len: None,
                heads_ahead_from: None,
            },
            points,
            mixed_attention: Some(MixedAttention {
                prefill_axis: self.prefill_axis,
                points: self.attention.iter().map(block).collect(),
                skew: self.skew.clone(),
            }),
        }
    }

    /// How often a layer of the block runs each dense layer.
    fn layer_counts(&self, shape: &ModelShape) -> BTreeMap<&str, f64> {
        let of_layer = self.dense.keys().map(String::as_str).filter(|name| !EMBED.contains(name));
        let named_norms =
            of_layer.clone().filter(|name| name.contains("norm") && *name != NORM && !QUERY_NORMS.contains(name));
        let norms = shape.norms_per_layer.saturating_sub(named_norms.count() as u64).max(1) as f64;
        of_layer.map(|name| (name, if name == NORM { norms } else { 1.0 })).collect()
    }

    fn source(&self, shape: &ModelShape, counts: &BTreeMap<&str, f64>) -> String {
        let layer: Vec<String> = counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
        let mut source = format!(
            "kernel tables {}; a layer is {} and attention; overhead 0: the tables hold kernel times alone",
            self.folder.display(),
            layer.join(", "),
        );
        if shape.devices > 1 {
            source += match self.all_reduce {
                Some(_) => "; sums over devices of another table",
                None => "; no time of sums over devices",
            };
        }
        if self.skew.is_empty() {
            source += "; no correction for uneven histories";
            if self.folder.join("skew_fit.csv").exists() {
                source += " (meta.yaml says that skew_fit.csv is not of this measurement)";
            }
        }
        if let Some(window) = shape.window {
            source += &format!("; attention as if no layer had its window of {window} tokens");
        }
        if shape.lora_rank > 0 {
            source += "; LoRA by roofline at the tables' best rates";
        }
        source
    }

    /// Highest rates at which the measured kernels moved weights and computed, and the shortest kernel time.
    fn rates(&self, shape: &ModelShape) -> DeviceRates {
        let weights = |(inputs, outputs): (u64, u64)| (inputs * outputs) as f64;
        let linears = LINEARS.iter().zip(shape.linears()).map(|(name, sizes)| (&self.dense[*name], weights(sizes)));
        let measured: Vec<(u32, f64, f64)> = linears
            .flat_map(|(curve, weights)| curve.iter().map(move |(&rows, &time)| (rows, time, weights)))
            .collect();
        let best = |rate: &dyn Fn(&(u32, f64, f64)) -> f64| measured.iter().map(rate).fold(0.0, f64::max);
        let shortest = self.dense.values().flat_map(BTreeMap::values).copied().fold(f64::INFINITY, f64::min);
        DeviceRates {
            bytes_per_us: best(&|&(_, time, weights)| shape.linear_bytes(weights as u64) as f64 / time),
            flops_per_us: best(&|&(rows, time, weights)| 2.0 * f64::from(rows) * weights / time),
            kernel_us: shortest,
        }
    }
}

/// Adds the sums over devices: to each layer, the embedding and the head.
fn add_sums(points: &mut Vec<Point>, all_reduce: &AllReduce, shape: &ModelShape) {
    let sum_us = |rows: u32, width: f64| all_reduce.us(f64::from(rows) * width);
    let (hidden, logits) = (shape.hidden as f64, (shape.devices * shape.vocab) as f64);
    let layers = shape.block_layers() as f64;
    let of_block = |point: &Point| Point {
        component: Component::AllReduce,
        time_us: layers * 2.0 * sum_us(point.rows, hidden),
        ..*point
    };
    let sums: Vec<Point> = points.iter().filter(|point| point.component == Component::Block).map(of_block).collect();
    for point in points.iter_mut() {
        match point.component {
            Component::Embed => point.time_us += sum_us(point.rows, hidden),
            // Logits are gathered, which moves half as much as summing them.
            Component::Head => point.time_us += sum_us(point.rows, logits / 2.0),
            _ => {}
        }
    }
    points.extend(sums);
}

/// The folder, or the one in it that is named after the number of devices.
fn tables_of(folder: &Path, devices: u64) -> Result<PathBuf, ImportError> {
    let own = folder.join(format!("tp{devices}"));
    if own.is_dir() {
        return Ok(own);
    }
    let degree = |path: &Path| path.file_name()?.to_str()?.strip_prefix("tp")?.parse::<u64>().ok();
    let entries = std::fs::read_dir(folder).map_err(|source| ImportError::Io { path: folder.to_owned(), source })?;
    let within = entries.filter_map(|entry| degree(&entry.ok()?.path())).min();
    let expected = match devices {
        1 => "tp1, the tables of one device; `--tensor-parallel` says how many share a layer".to_owned(),
        devices => format!("tp{devices}, the tables of one device of {devices}"),
    };
    match degree(folder).filter(|&degree| degree != devices).or(within) {
        None => Ok(folder.to_owned()),
        Some(degree) => Err(ImportError::unusable(folder, format!("tp{degree}, one device of {degree}"), expected)),
    }
}

/// `meta.yaml` next to the tables or in a folder above, if it exists.
pub(crate) fn meta_file(folder: &Path) -> Option<PathBuf> {
    [Some(folder), folder.parent()]
        .into_iter()
        .flatten()
        .map(|folder| folder.join("meta.yaml"))
        .find(|path| path.exists())
}

/// The weighted sum of layers, at every number of rows up to the largest at which all of them were measured.
fn sum(component: Component, layers: &BTreeMap<String, Curve>, weight: impl Fn(&str) -> f64) -> Vec<Point> {
    let weighted: Vec<(f64, &Curve)> =
        layers.iter().map(|(name, curve)| (weight(name), curve)).filter(|(weight, _)| *weight > 0.0).collect();
    let end = weighted.iter().filter_map(|(_, curve)| curve.last_key_value()).map(|last| *last.0).min().unwrap_or(0);
    let rows: BTreeSet<u32> =
        weighted.iter().flat_map(|(_, curve)| curve.keys().copied()).filter(|&rows| rows <= end).collect();
    let point = |rows: u32| {
        let time_us = weighted.iter().map(|(weight, curve)| weight * line_at(curve, rows.into())).sum();
        Point { component, rows, kv_tokens: 0, depths: 1, time_us, spread_us: 0.0, repeats: 1 }
    };
    rows.into_iter().map(point).collect()
}

fn read_layers(path: &Path, rows: &'static str) -> Result<BTreeMap<String, Curve>, ImportError> {
    let mut table = Table::open(path, &["layer", rows, "time_us"], Owner::Others)?;
    let mut layers: BTreeMap<String, Curve> = BTreeMap::new();
    while let Some(row) = table.next_row()? {
        let layer = row.get(0, "the name of a layer", |name| Some(name.to_owned()))?;
        let rows = row.number(1, "a whole number, at least 1", |&rows: &u32| rows >= 1)?;
        let time_us = row.number(2, "microseconds, at least 0", is_time)?;
        if layers.entry(layer).or_default().insert(rows, time_us).is_some() {
            return Err(row.error(1, "each number once for a layer").into());
        }
    }
    Ok(layers)
}

fn read_attention(path: &Path) -> Result<(PrefillAxis, Vec<MixedPoint>), ImportError> {
    let header = read_header(path)?;
    let has = |name: &str| header.iter().any(|found| found == name);
    let (axis, context) = match has("prefill_key") {
        true => (PrefillAxis::Keys, "prefill_key"),
        false => (PrefillAxis::History, "kv_prefill"),
    };
    let optional = ["layer", "decode_q_len"].into_iter().filter(|name| has(name));
    let columns: Vec<&str> =
        ["prefill_chunk", context, "n_decode", "kv_decode", "time_us"].into_iter().chain(optional).collect();
    let place = |name: &str| columns.iter().position(|column| *column == name);
    let (layer, query_length) = (place("layer"), place("decode_q_len"));
    let mut table = Table::open(path, &columns, Owner::Others)?;
    let mut points = Vec::new();
    while let Some(row) = table.next_row()? {
        let count = |column| row.number(column, "a whole number", |_: &u32| true);
        if let Some(column) = layer {
            let only = "`attention`, the only kernel of a dense transformer";
            row.get(column, only, |name| (name == "attention").then_some(()))?;
        }
        if query_length.map(count).transpose()?.is_some_and(|length| length != 1) {
            continue;
        }
        points.push(MixedPoint {
            prefill_tokens: count(0)?,
            prefill_context: row.number(1, "tokens, at least 0", is_time)?,
            decode_rows: count(2)?,
            decode_history: count(3)?,
            time_us: row.number(4, "microseconds, at least 0", is_time)?,
        });
    }
    let prompts = points.iter().filter(|point| point.prefill_tokens > 0).count();
    if prompts == 0 || prompts == points.len() {
        let found = format!("{prompts} rows with prompt tokens among {}", points.len());
        return Err(TraceError::File { path: path.to_owned(), found, expected: "rows with and without".into() }.into());
    }
    Ok((axis, points))
}

fn is_time(time: &f64) -> bool {
    time.is_finite() && *time >= 0.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel_tables::tests::write;
    use crate::model::tests::{GEMMA, LLAMA, QWEN, shape};

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let dense = [
            "layernorm,2",
            "qkv_proj,10",
            "qk_norm,1",
            "rotary_emb,1",
            "o_proj,5",
            "gate_up_proj,40",
            "act_fn,3",
            "down_proj,20",
            "embedding,4",
            "final_layernorm,2",
        ]
        .map(|row| row.split_once(',').unwrap())
        .map(|(layer, time)| format!("{layer},1,{time}\n{layer},8,{time}5\n"));
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
        write("dense.csv", format!("layer,tokens,time_us\n{}", dense.concat()));
        write("per_sequence.csv", "layer,sequences,time_us\nlm_head,1,100\nsampler,1,7\nlm_head,4,110\n".to_owned());
        write(
            "attention.csv",
            "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,9\n16,0,0,0,11\n".to_owned(),
        );
        folder
    }

    #[test]
    fn a_step_runs_each_layer_as_often_as_the_model_has_it() {
        let folder = folder();
        let tables = LayerTables::read(folder.path()).unwrap();
        let profile = tables.profile(&shape(LLAMA, 2, 0).unwrap(), "d");
        let at = |component, rows| profile.points_of(component).find(|p| p.rows == rows).map(|p| p.time_us);
        assert_eq!(at(Component::Block, 1), Some(16.0 * (2.0 * 2.0 + 10.0 + 1.0 + 1.0 + 5.0 + 40.0 + 3.0 + 20.0)));
        assert_eq!(at(Component::Embed, 1), Some(6.0));
        assert_eq!(at(Component::Head, 1), Some(107.0));
        assert_eq!(at(Component::Head, 4), None, "the sampler was not measured there");
        assert_eq!(profile.mixed_attention.unwrap().points[0].time_us, 16.0 * 9.0);
        assert_eq!(profile.meta.kv_bytes_per_token, 131_072);
    }

    #[test]
    fn layers_measured_at_other_numbers_of_tokens_are_interpolated() {
        let folder = folder();
        let path = folder.path().join("dense.csv");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text + "qkv_proj,3,20\nqkv_proj,100,99\n").unwrap();
        let profile = LayerTables::read(folder.path()).unwrap().profile(&shape(LLAMA, 1, 0).unwrap(), "d");
        let rows: Vec<u32> = profile.points_of(Component::Block).map(|point| point.rows).collect();
        assert_eq!(rows, [1, 3, 8], "up to where the others end");
        let at = |rows| profile.points_of(Component::Block).find(|p| p.rows == rows).unwrap().time_us;
        // The other layers take 74 us at 1 row and 780 us at 8.
        let others = 74.0 + (780.0 - 74.0) * 2.0 / 7.0;
        assert!((at(3) - 32.0 * (20.0 + others)).abs() < 1e-9, "{}", at(3));
    }

    #[test]
    fn norms_with_names_of_their_own_count_once_and_the_others_make_up_the_model() {
        let folder = folder();
        let path = folder.path().join("dense.csv");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text + "pre_feedforward_layernorm,1,1000\n").unwrap();
        let tables = LayerTables::read(folder.path()).unwrap();
        let counts = |config: &str| tables.layer_counts(&shape(config, 1, 0).unwrap())[NORM];
        assert_eq!((counts(LLAMA), counts(&GEMMA.replace("gemma", "gemma2"))), (1.0, 3.0));
    }

    #[test]
    fn attention_reads_in_its_older_and_newer_form() {
        let folder = folder();
        let read = |text: &str| {
            std::fs::write(folder.path().join("attention.csv"), text).unwrap();
            LayerTables::read(folder.path()).map(|tables| (tables.prefill_axis, tables.attention))
        };
        let (axis, points) =
            read("kv_decode,n_decode,time_us,kv_prefill,prefill_chunk\n16,1,9,0,0\n0,0,11,32,16\n").unwrap();
        assert_eq!((axis, points[1].prefill_tokens, points[1].prefill_context), (PrefillAxis::History, 16, 32.0));
        let newer = "layer,prefill_chunk,prefill_key,n_decode,kv_decode,decode_q_len,time_us\n\
            attention,0,0.0,1,16,1,9\nattention,0,0.0,1,16,4,12\nattention,16,8.5,0,0,1,11\n";
        let (axis, points) = read(newer).unwrap();
        assert_eq!((axis, points.len(), points[1].prefill_context), (PrefillAxis::Keys, 2, 8.5));
        let error = read(&newer.replace("attention,16", "indexer,16")).unwrap_err().to_string();
        assert!(error.contains("attention.csv:4: layer: found `indexer`"), "{error}");
        let error = read("prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,9\n").unwrap_err().to_string();
        assert!(error.contains("found 0 rows with prompt tokens among 1"), "{error}");
    }

    #[test]
    fn a_profile_says_what_it_was_made_of() {
        let model = QWEN.replace("null", "4096").replace("false", "true");
        let folder = folder();
        std::fs::write(folder.path().join("meta.yaml"), "gpu: GPU 1\nvllm_version: 0.28.0\n").unwrap();
        let tables = LayerTables::read(folder.path()).unwrap();
        let meta = tables.profile(&shape(&model, 1, 0).unwrap(), tables.device().unwrap()).meta;
        assert_eq!((meta.device.as_str(), meta.software.as_str()), ("GPU 1", "vLLM 0.28.0"));
        for part in ["1 gate_up_proj", "2 layernorm", "no correction for uneven", "no layer had its window of 4096"] {
            assert!(meta.source.contains(part), "expected `{part}` in `{}`", meta.source);
        }
        assert!(!meta.source.contains("embedding"));
    }

    #[test]
    fn only_the_tables_of_one_device_are_read() {
        let folder = folder();
        let moved = |name: &str| {
            let outer = tempfile::tempdir().unwrap();
            let inner = outer.path().join(name);
            std::fs::create_dir(&inner).unwrap();
            for file in ["dense.csv", "per_sequence.csv", "attention.csv"] {
                std::fs::copy(folder.path().join(file), inner.join(file)).unwrap();
            }
            (LayerTables::read(outer.path()), LayerTables::read(&inner))
        };
        let (outer, inner) = moved("tp1");
        assert!(outer.is_ok() && inner.is_ok());
        let (outer, inner) = moved("tp2");
        assert!(outer.unwrap_err().to_string().contains("found tp2, one device of 2, expected tp1"));
        assert!(inner.unwrap_err().to_string().contains("found tp2"));
    }

    #[test]
    fn tables_of_one_of_two_devices_get_sums_and_the_sampler_of_the_whole() {
        let folder = folder();
        for device in ["tp1", "tp2"] {
            std::fs::create_dir(folder.path().join(device)).unwrap();
            for file in ["dense.csv", "per_sequence.csv", "attention.csv"] {
                std::fs::copy(folder.path().join(file), folder.path().join(device).join(file)).unwrap();
            }
        }
        let whole = "layer,sequences,time_us\nlm_head,1,200\nsampler,1,9\n";
        std::fs::write(folder.path().join("tp1/per_sequence.csv"), whole).unwrap();
        let path = folder.path().join("sums.parquet");
        let sum = |elements: i64| (vec!["all_reduce"], vec![2, elements], 5e-3 + elements as f64 * 1e-9);
        write(&path, &["op_name"], &["num_gpus", "message_size"], &[sum(1), sum(1 << 28)]);
        let sums = AllReduce::read(&path, 2).unwrap();
        let tables = LayerTables::read_shared(folder.path(), 2, Some(sums)).unwrap();
        let profile = tables.profile(&shape(LLAMA, 1, 0).unwrap().shared_by(2).unwrap(), "d");
        let at = |component| profile.points_of(component).find(|p| p.rows == 1).unwrap().time_us;
        let near = |component, expected: f64| assert!((at(component) - expected).abs() < 1e-6, "{}", at(component));
        let sum_us = |width: f64| 5.0 + width * 1e-6;
        near(Component::AllReduce, 32.0 * 2.0 * sum_us(4096.0));
        near(Component::Embed, 6.0 + sum_us(4096.0));
        near(Component::Head, 100.0 + 9.0 + sum_us(128_256.0 / 2.0));
        assert!(profile.meta.source.contains("sums over devices of another table"));
        let error = LayerTables::read_shared(folder.path(), 4, None).unwrap_err().to_string();
        assert!(error.contains("expected tp4, the tables of one device of 4"), "{error}");
    }

    #[test]
    fn number_types_other_than_those_measured_are_refused() {
        let folder = folder();
        let types = |variant: &str, linear: Option<&str>, kv: Option<&str>| {
            std::fs::write(folder.path().join("meta.yaml"), format!("variant: {variant}\n")).unwrap();
            let tables = LayerTables::read(folder.path()).unwrap();
            tables.types(linear.map(|name| name.parse().unwrap()), kv.map(|name| name.parse().unwrap()))
        };
        let fp8 = Some(LinearType(Some(Quantized::Fp8)));
        assert_eq!(types("bf16", None, None).unwrap(), (None, Some(KvType::Bf16)));
        assert_eq!(types("fp8-kvfp8", None, Some("fp8")).unwrap(), (fp8, Some(KvType::Fp8)));
        let error = types("bf16", None, Some("fp8")).unwrap_err().to_string();
        assert!(
            error.ends_with("found tables of variant bf16, expected keys and values in fp8, as asked for"),
            "{error}"
        );
        let error = types("bf16-kvfp8", Some("fp8"), None).unwrap_err().to_string();
        assert!(error.ends_with("expected layers in fp8, as asked for"), "{error}");
    }

    #[test]
    fn unusable_tables_say_what_is_missing() {
        let folder = folder();
        let edit = |name: &str, from: &str, to: &str| {
            let path = folder.path().join(name);
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, text.replace(from, to)).unwrap();
            let error = LayerTables::read(folder.path()).unwrap_err().to_string();
            std::fs::write(&path, text).unwrap();
            error
        };
        assert!(edit("dense.csv", "o_proj", "other").contains("no layer o_proj among act_fn, down_proj"));
        assert!(edit("dense.csv", "tokens", "rows").contains("expected columns `layer,tokens,time_us`"));
        let error = edit("attention.csv", "16,0,0,0,11", "16,0,0,0,x");
        assert!(error.contains("attention.csv:3: time_us: found `x`"), "{error}");
        std::fs::write(folder.path().join("moe.csv"), "").unwrap();
        assert!(LayerTables::read(folder.path()).unwrap_err().to_string().contains("dense transformer"));
    }

    #[test]
    fn low_rank_weights_cost_by_the_tables_own_rates() {
        let folder = folder();
        let tables = LayerTables::read(folder.path()).unwrap();
        let profile = tables.profile(&shape(LLAMA, 2, 64).unwrap(), "d");
        let lora: Vec<&Point> = profile.points_of(Component::Lora).collect();
        assert_eq!(lora.len(), 2);
        assert!(lora.iter().all(|point| point.repeats == 0 && point.time_us >= 16.0 * 8.0));
        assert!(profile.points_of(Component::DepthMix).all(|point| point.depths == 2));
    }
}
