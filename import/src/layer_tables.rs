//! Tables of kernels measured by kind of layer, as LLMServingSim's profiler writes them.
//!
//! A folder holds `dense.csv` (layers by tokens of the pass), `per_sequence.csv` (exit head and sampler by sequences),
//! `attention.csv` (prompt chunk, its history, decode rows, their history) and perhaps `skew_fit.csv` (uneven
//! histories); all of one layer, in microseconds of kernel time.
//!
//! What one step of the engine runs of them:
//!
//! | part of the profile | tables |
//! | --- | --- |
//! | block | for each of its layers: the norms (two, in Gemma 2 and 3 four), and every other dense layer once |
//! | mixed attention | for each layer of the block: `attention` |
//! | embed | `embedding` and `final_layernorm`, once for each token that runs |
//! | head | `lm_head` and `sampler`, once for each sequence that predicts |
//!
//! The tables hold kernel times alone, so a step's overhead is 0: with asynchronous scheduling and CUDA graphs, the
//! device runs one kernel after the other. What the gaps between them cost is not in the tables.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use traces::table::{Owner, Table};
use traces::{Component, LatencyProfile, MixedAttention, MixedPoint, Point, ProfileMeta, SkewCell};

use crate::error::{ImportError, read_text};
use crate::lora::{self, DeviceRates};
use crate::memory::memory_figures;
use crate::model::ModelShape;

/// Times in microseconds by tokens or sequences.
type Curve = BTreeMap<u32, f64>;

/// The tables of one device and model.
#[derive(Clone, Debug)]
pub struct LayerTables {
    folder: PathBuf,
    dense: BTreeMap<String, Curve>,
    per_sequence: BTreeMap<String, Curve>,
    attention: Vec<MixedPoint>,
    skew: Vec<SkewCell>,
}

const NORM: &str = "layernorm";
const EMBED: [&str; 2] = ["embedding", "final_layernorm"];
const HEAD: [&str; 2] = ["lm_head", "sampler"];
const LINEARS: [&str; 4] = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"];

impl LayerTables {
    /// Reads a folder of tables, or the `tp1` within it.
    ///
    /// # Errors
    /// If a table does not read, or one without which no step can be timed is missing.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self, ImportError> {
        let folder = folder.as_ref();
        let inner = folder.join("tp1");
        let folder = if inner.is_dir() { inner } else { folder.to_owned() };
        if folder.join("moe.csv").exists() {
            return Err(ImportError::unusable(&folder, "moe.csv", "the tables of a dense model"));
        }
        let dense = read_layers(&folder.join("dense.csv"), &["layer", "tokens", "time_us"])?;
        let per_sequence = read_layers(&folder.join("per_sequence.csv"), &["layer", "sequences", "time_us"])?;
        for (table, layers, needed) in [
            ("dense.csv", &dense, [&LINEARS[..], &EMBED[..1], &[NORM]].concat()),
            ("per_sequence.csv", &per_sequence, vec![HEAD[0]]),
        ] {
            if let Some(missing) = needed.into_iter().find(|&layer| !layers.contains_key(layer)) {
                return Err(ImportError::unusable(&folder.join(table), format!("no layer {missing}"), "its times"));
            }
        }
        let attention = read_attention(&folder.join("attention.csv"))?;
        let skew = read_skew(&folder.join("skew_fit.csv"))?;
        Ok(Self { folder, dense, per_sequence, attention, skew })
    }

    /// The latency profile of a model whose single layer was measured.
    pub fn profile(&self, shape: &ModelShape, device: &str, software: &str) -> LatencyProfile {
        let layers = shape.block_layers() as f64;
        let per_layer = |name: &str| match name {
            NORM => shape.norms_per_layer() as f64,
            _ if EMBED.contains(&name) => 0.0,
            _ => 1.0,
        };
        let once = |names: &'static [&'static str]| move |name: &str| if names.contains(&name) { 1.0 } else { 0.0 };
        let mut points = sum(Component::Block, &self.dense, |name| layers * per_layer(name));
        let rows: Vec<u32> = points.iter().map(|point| point.rows).collect();
        points.extend(lora::points(shape, &self.rates(shape), &rows));
        points.extend(sum(Component::Embed, &self.dense, once(&EMBED)));
        points.extend(sum(Component::Head, &self.per_sequence, once(&HEAD)));
        let block = |point: &MixedPoint| MixedPoint { time_us: layers * point.time_us, ..*point };
        let points_of_attention = self.attention.iter().map(block).collect();
        LatencyProfile {
            meta: ProfileMeta {
                schema_version: LatencyProfile::SCHEMA_VERSION,
                model: shape.describe(),
                fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
                num_loops: shape.num_loops as u32,
                device: device.to_owned(),
                software: software.to_owned(),
                source: format!(
                    "kernel tables {}, summed over the layers of a step; overhead 0: the tables hold kernel times alone{}{}",
                    self.folder.display(),
                    if self.skew.is_empty() { "; no correction for uneven histories" } else { "" },
                    if shape.lora_rank > 0 { "; LoRA by roofline at the tables' best rates" } else { "" }
                ),
                overhead_us: 0.0,
                weight_bytes: shape.total_weight_bytes(),
                kv_bytes_per_token: shape.num_loops * shape.kv_bytes_per_depth(),
                memory: Some(memory_figures(shape)),
            },
            points,
            mixed_attention: Some(MixedAttention { points: points_of_attention, skew: self.skew.clone() }),
        }
    }

    /// The best rates at which the measured kernels moved weights and computed, and the shortest of them.
    fn rates(&self, shape: &ModelShape) -> DeviceRates {
        let weights = |(inputs, outputs): (u64, u64)| (inputs * outputs) as f64;
        let linears = LINEARS.iter().zip(shape.linears()).map(|(name, sizes)| (&self.dense[*name], weights(sizes)));
        let measured: Vec<(u32, f64, f64)> = linears
            .flat_map(|(curve, weights)| curve.iter().map(move |(&rows, &time)| (rows, time, weights)))
            .collect();
        let best = |rate: &dyn Fn(&(u32, f64, f64)) -> f64| measured.iter().map(rate).fold(0.0, f64::max);
        let shortest = self.dense.values().flat_map(BTreeMap::values).copied().fold(f64::INFINITY, f64::min);
        DeviceRates {
            bytes_per_us: best(&|&(_, time, weights)| weights * shape.weight_bytes as f64 / time),
            flops_per_us: best(&|&(rows, time, weights)| 2.0 * f64::from(rows) * weights / time),
            kernel_us: shortest,
        }
    }
}

/// The weighted sum of layers, at every number of rows where all that have weight were measured.
fn sum(component: Component, layers: &BTreeMap<String, Curve>, weight: impl Fn(&str) -> f64) -> Vec<Point> {
    let weighted: Vec<(f64, &Curve)> =
        layers.iter().map(|(name, curve)| (weight(name), curve)).filter(|(weight, _)| *weight > 0.0).collect();
    let Some((_, first)) = weighted.first() else { return Vec::new() };
    let time_us =
        |rows: &u32| weighted.iter().map(|(weight, curve)| Some(weight * curve.get(rows)?)).sum::<Option<f64>>();
    let point = |(&rows, _)| {
        let time_us = time_us(&rows)?;
        Some(Point { component, rows, kv_tokens: 0, depths: 1, time_us, spread_us: 0.0, repeats: 1 })
    };
    first.iter().filter_map(point).collect()
}

fn read_layers(path: &Path, columns: &'static [&'static str; 3]) -> Result<BTreeMap<String, Curve>, ImportError> {
    let mut table = Table::open(path, columns, Owner::Others)?;
    let mut layers: BTreeMap<String, Curve> = BTreeMap::new();
    while let Some(row) = table.next_row()? {
        let layer = row.get(0, "the name of a layer", |name| Some(name.to_owned()))?;
        let rows = row.number(1, "a whole number, at least 1", |&rows: &u32| rows >= 1)?;
        layers.entry(layer).or_default().insert(rows, row.number(2, "microseconds, at least 0", is_time)?);
    }
    Ok(layers)
}

fn read_attention(path: &Path) -> Result<Vec<MixedPoint>, ImportError> {
    const COLUMNS: &[&str] = &["prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"];
    let mut table = Table::open(path, COLUMNS, Owner::Others)?;
    let mut points = Vec::new();
    while let Some(row) = table.next_row()? {
        let count = |column| row.number(column, "a whole number", |_: &u32| true);
        points.push(MixedPoint {
            prefill_tokens: count(0)?,
            prefill_history: count(1)?,
            decode_rows: count(2)?,
            decode_history: count(3)?,
            time_us: row.number(4, "microseconds, at least 0", is_time)?,
        });
    }
    Ok(points)
}

fn is_time(time: &f64) -> bool {
    time.is_finite() && *time >= 0.0
}

/// Reads the cells, whose labels are the upper bounds of what they hold: `n<=32`, `sr<=15%`, `kvB<=4k`, `kp=0`; a cell
/// above the last bound (`sr>70%`) reaches as far as there is anything. Without the file, or in a file that names its
/// cells by other axes, there are none.
fn read_skew(path: &Path) -> Result<Vec<SkewCell>, ImportError> {
    const COLUMNS: &[&str] = &["pc", "n_label", "skew_rate_label", "kv_big_label", "kp_label", "alpha"];
    let header =
        if path.exists() { read_text(path)?.lines().next().unwrap_or_default().to_owned() } else { String::new() };
    if !COLUMNS.iter().all(|column| header.split(',').any(|found| found.trim() == *column)) {
        return Ok(Vec::new());
    }
    let mut table = Table::open(path, COLUMNS, Owner::Others)?;
    let mut cells = Vec::new();
    while let Some(row) = table.next_row()? {
        let bound = |column| row.get(column, "a label like `n<=32`", upper_bound);
        cells.push(SkewCell {
            prefill_tokens: row.number(0, "a whole number", |_: &u32| true)?,
            decode_rows: bound(1)?,
            long_share: f64::from(bound(2)?.min(100)) / 100.0,
            longest_history: bound(3)?,
            prefill_history: bound(4)?,
            alpha: row.number(5, "a finite number", |alpha: &f64| alpha.is_finite())?,
        });
    }
    Ok(cells)
}

/// The number that a label ends in, with `k` for 1,024 and without `%`; beyond any number for `>`.
fn upper_bound(label: &str) -> Option<u32> {
    if label.contains('>') {
        return Some(u32::MAX);
    }
    let number = label.rsplit('=').next()?.trim_end_matches('%');
    match number.strip_suffix('k') {
        Some(thousands) => thousands.parse::<u32>().ok()?.checked_mul(1024),
        None => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{LLAMA, shape};

    fn folder(skew: &str) -> tempfile::TempDir {
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
        if !skew.is_empty() {
            write(
                "skew_fit.csv",
                format!("pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha,n_samples\n{skew}\n"),
            );
        }
        folder
    }

    #[test]
    fn a_step_runs_each_layer_as_often_as_the_model_has_it() {
        let folder = folder("");
        let tables = LayerTables::read(folder.path()).unwrap();
        let profile = tables.profile(&shape(LLAMA, 2, 0).unwrap(), "d", "s");
        let at = |component, rows| profile.points_of(component).find(|p| p.rows == rows).map(|p| p.time_us);
        assert_eq!(at(Component::Block, 1), Some(16.0 * (2.0 * 2.0 + 10.0 + 1.0 + 1.0 + 5.0 + 40.0 + 3.0 + 20.0)));
        assert_eq!(at(Component::Embed, 1), Some(6.0));
        assert_eq!(at(Component::Head, 1), Some(107.0));
        assert_eq!(at(Component::Head, 4), None, "the sampler was not measured there");
        assert_eq!(profile.mixed_attention.unwrap().points[0].time_us, 16.0 * 9.0);
        assert_eq!(profile.meta.kv_bytes_per_token, 131_072);
    }

    #[test]
    fn labels_of_uneven_batches_are_upper_bounds() {
        let folder = folder("16,n<=64,sr<=15%,kvB<=4k,kp=0,0.1,2\n0,n<=8,sr>70%,kvB<=512,kp>8k,-0.02,2");
        let cells = LayerTables::read(folder.path()).unwrap().skew;
        let SkewCell { prefill_tokens, decode_rows, long_share, longest_history, prefill_history, alpha } = cells[0];
        assert_eq!((prefill_tokens, decode_rows, longest_history, prefill_history), (16, 64, 4096, 0));
        assert_eq!((long_share, alpha), (0.15, 0.1));
        assert_eq!((cells[1].long_share, cells[1].prefill_history), (1.0, u32::MAX));
    }

    #[test]
    fn without_a_correction_that_it_knows_the_profile_says_so() {
        let shape = shape(LLAMA, 1, 0).unwrap();
        let folder = folder("0,n<=8,sr>70%,kvB<=512,kp=0,0.1,2");
        let source = |folder: &Path| LayerTables::read(folder).unwrap().profile(&shape, "d", "s").meta.source;
        assert!(!source(folder.path()).contains("no correction"));
        std::fs::write(folder.path().join("skew_fit.csv"), "layer,n_label,lev_label,alpha\n").unwrap();
        assert!(source(folder.path()).contains("no correction for uneven histories"));
    }

    #[test]
    fn unusable_tables_say_what_is_missing() {
        let folder = folder("");
        let edit = |name: &str, from: &str, to: &str| {
            let path = folder.path().join(name);
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, text.replace(from, to)).unwrap();
            let error = LayerTables::read(folder.path()).unwrap_err().to_string();
            std::fs::write(&path, text).unwrap();
            error
        };
        assert!(edit("dense.csv", "o_proj", "other").contains("no layer o_proj"));
        assert!(edit("dense.csv", "tokens", "rows").contains("expected columns `layer,tokens,time_us`"));
        let error = edit("attention.csv", "16,0,0,0,11", "16,0,0,0,x");
        assert!(error.contains("attention.csv:3: time_us: found `x`"), "{error}");
        std::fs::write(folder.path().join("moe.csv"), "").unwrap();
        assert!(LayerTables::read(folder.path()).unwrap_err().to_string().contains("dense model"));
    }

    #[test]
    fn low_rank_weights_cost_by_the_tables_own_rates() {
        let folder = folder("");
        let tables = LayerTables::read(folder.path()).unwrap();
        let profile = tables.profile(&shape(LLAMA, 2, 64).unwrap(), "d", "s");
        let lora: Vec<&Point> = profile.points_of(Component::Lora).collect();
        assert_eq!(lora.len(), 2);
        assert!(lora.iter().all(|point| point.repeats == 0 && point.time_us >= 16.0 * 8.0));
        assert!(profile.points_of(Component::DepthMix).all(|point| point.depths == 2));
    }
}
