//! Latency profiles: measured times of the components of a pass.
//!
//! The time of a pass is the sum of its components:
//!
//! ```text
//! overhead                                   once per pass
//! + block(rows)                              everything in the block that depends only on the number of rows
//! + elementwise(rows)                        norms, activations, rotary embedding, where not part of block
//! + all_reduce(rows)                         sums over the devices that share each layer
//! + lora(rows)                               the low-rank weights of each row's own loop
//! + decode_attention(rows, history)          decode rows, at their mean history
//! + prefill_attention(tokens, history)       the chunk with the most keys
//! + sum over other chunks of prefill_again(tokens, history)
//! + after_more(rows, rows before)            extra time after a pass with more rows
//! + depth_mix(rows, depths)                  extra time of several distinct depths in one pass
//! + embed(rows at depth 0)
//! + head(rows whose signal needs it or that exit)
//! + exit_attention(the same rows, history)   layers before and after the loops, at the mean history of decode rows
//! + kv_fill(depths that exiting rows skip)   under the KV fill `reuse`
//! ```
//!
//! Where attention was measured for whole passes, [`MixedAttention`] replaces the two attention components.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Result, TraceError};
use crate::exit_trace::ExitTrace;
use crate::mixed_attention::MixedAttention;
use crate::table::{Owner, Row, Table, check_version, read_yaml, write_rows, write_yaml};

/// A component of a pass that is measured separately.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Component {
    /// The shared block, by `rows`, without what depends on histories or depths.
    Block,
    /// Operations of the block without weights (norms, activations, rotary embedding), by `rows`, where they are not
    /// part of [`Component::Block`].
    Elementwise,
    /// Sums over the devices that share each layer (tensor parallelism), by `rows`.
    AllReduce,
    /// Extra time for the low-rank weights of each row's own loop in a pass at one depth, by `rows`.
    Lora,
    /// Extra time of a pass after one with more rows, whose data has evicted weights from caches; by `rows` and by
    /// `kv_tokens`, which here is the number of rows of the previous pass.
    AfterMore,
    /// Extra time for the histories of decode rows, by `rows` and `kv_tokens` (history of each row).
    DecodeAttention,
    /// Extra time for attention of one prompt chunk, by `rows` (its tokens) and `kv_tokens` (history before it).
    /// Negative where the chunk takes less time than the decode rows that [`Component::Block`] was measured with.
    PrefillAttention,
    /// Extra time for attention of a further chunk, in a pass with a chunk of at least as many keys. Where it is not
    /// measured, [`Component::PrefillAttention`] applies.
    PrefillAgain,
    /// Extra time of `depths` distinct depths in one pass over a pass at one depth, by `rows`. May be negative.
    DepthMix,
    /// Embedding lookup, by `rows`.
    Embed,
    /// The exit head over the vocabulary, by `rows`.
    Head,
    /// The exit head in a pass after one that also ran it, when its weights may still be in a cache, by `rows`. Where
    /// it is not measured, [`Component::Head`] applies.
    HeadAgain,
    /// Reading exit signals that do not need the head (gates, comparisons with the state one depth earlier) within a pass, by
    /// `rows`, the rows whose signal is read.
    ExitSignal,
    /// Extra time of exits that are decided after the pass: deciding, and starting the head anew; by `rows`, the rows that
    /// exit. Fitted to passes under steady load; may be negative.
    ExitDecision,
    /// Copies of keys and values to the depths that exiting rows skip. `rows` counts one for each row and skipped
    /// depth.
    KvFill,
    /// Attention in the layers before the first loop and after the last (prelude and coda), once for each token, by
    /// `rows` (those that run the exit head) and `kv_tokens` (history of each). The linear layers of the prelude are
    /// part of [`Component::Embed`], those of the coda part of [`Component::Head`].
    ExitAttention,
}

impl Component {
    /// Every component, in the order of files.
    pub const ALL: [Self; 16] = [
        Self::Block,
        Self::Elementwise,
        Self::AllReduce,
        Self::Lora,
        Self::AfterMore,
        Self::DecodeAttention,
        Self::PrefillAttention,
        Self::PrefillAgain,
        Self::DepthMix,
        Self::Embed,
        Self::Head,
        Self::HeadAgain,
        Self::ExitSignal,
        Self::ExitDecision,
        Self::KvFill,
        Self::ExitAttention,
    ];

    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Elementwise => "elementwise",
            Self::AllReduce => "all_reduce",
            Self::Lora => "lora",
            Self::AfterMore => "after_more",
            Self::DecodeAttention => "decode_attention",
            Self::PrefillAttention => "prefill_attention",
            Self::PrefillAgain => "prefill_again",
            Self::DepthMix => "depth_mix",
            Self::Embed => "embed",
            Self::Head => "head",
            Self::HeadAgain => "head_again",
            Self::ExitSignal => "exit_signal",
            Self::ExitDecision => "exit_decision",
            Self::KvFill => "kv_fill",
            Self::ExitAttention => "exit_attention",
        }
    }

    /// Whether the component depends on `kv_tokens`.
    pub fn has_history(self) -> bool {
        use Component::{AfterMore, DecodeAttention, ExitAttention, PrefillAgain, PrefillAttention};
        matches!(self, DecodeAttention | PrefillAttention | PrefillAgain | AfterMore | ExitAttention)
    }

    /// Whether the time may be negative: prompt chunks are measured against an equal number of decode rows, and what is
    /// special about passes under steady load may save time as well.
    fn may_save(self) -> bool {
        matches!(self, Self::PrefillAttention | Self::PrefillAgain | Self::DepthMix | Self::ExitDecision)
    }

    /// Whether the component can take this time, in microseconds.
    pub fn can_take(self, time_us: f64) -> bool {
        time_us.is_finite() && (self.may_save() || time_us >= 0.0)
    }

    /// The times that [`Component::can_take`] accepts, in words.
    pub fn times(self) -> &'static str {
        if self.may_save() { "microseconds, a finite number" } else { NOT_NEGATIVE }
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Component {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|component| component.name() == name)
            .ok_or_else(|| format!("unknown component `{name}`"))
    }
}

/// One measured point of a component.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The component that was measured.
    pub component: Component,
    /// Rows of the pass, or tokens of the chunk.
    pub rows: u32,
    /// History of each decode row, or before the chunk, in tokens. For [`Component::AfterMore`], rows of the previous
    /// pass. 0 for components without history.
    pub kv_tokens: u32,
    /// Distinct depths among the rows; 1 except for [`Component::DepthMix`].
    pub depths: u32,
    /// Median time in microseconds.
    pub time_us: f64,
    /// Half the distance between the quartiles, in microseconds.
    pub spread_us: f64,
    /// Number of repeats behind the median; 0 where the time was computed rather than measured.
    pub repeats: u32,
}

/// Origin of a profile, and memory of its model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileMeta {
    /// Version of the file format: [`LatencyProfile::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Name of the model, for readers.
    pub model: String,
    /// Fingerprint of the model's configuration and weights; `any` matches every exit trace.
    pub fingerprint: String,
    /// Number of loops of the model.
    pub num_loops: u32,
    /// The device: name, and cores or clock where known.
    pub device: String,
    /// Software and number type of the measurement.
    pub software: String,
    /// How the times were obtained: the command, or the tables they were computed from.
    pub source: String,
    /// Fixed time of a pass that belongs to no component, in microseconds.
    pub overhead_us: f64,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Bytes of keys and values of one token, over all depths.
    pub kv_bytes_per_token: u64,
    /// Other memory use, and the size of the memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryFigures>,
    /// The KV fill that the model is made for, if not `reuse`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_fill: Option<String>,
    /// The longest chunk of consecutive tokens whose attention takes the time of one decode row per token, as with kernels
    /// for speculative decoding; 1 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_q_len: Option<u32>,
    /// Minimum number of rows whose exit signal does not need the head from which the head runs for all of them within the
    /// pass: where starting it anew after the pass is a trip to a device. `None` if it never does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads_ahead_from: Option<u32>,
}

/// Memory use other than weights, keys and values, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryFigures {
    /// All memory of the device, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_bytes: Option<u64>,
    /// Memory other than weights, activations, keys and values: context, workspaces, communication.
    pub other_bytes: u64,
    /// Activations of each row of a pass.
    pub row_bytes: u64,
    /// Logits of each row that predicts a token.
    pub logits_bytes: u64,
}

/// Times of the components of a pass, on one device and for one model.
#[derive(Clone, Debug, PartialEq)]
pub struct LatencyProfile {
    /// Origin of the profile.
    pub meta: ProfileMeta,
    /// The measured points.
    pub points: Vec<Point>,
    /// Attention where it was measured for whole passes. The attention components then have no points.
    pub mixed_attention: Option<MixedAttention>,
}

impl LatencyProfile {
    /// Version of the files that this crate reads and writes.
    pub const SCHEMA_VERSION: u32 = 1;
    /// Fingerprint of a profile or an exit trace that belongs to no particular weights.
    pub const ANY_MODEL: &str = "any";

    /// Components with times that were computed rather than measured.
    pub fn computed_components(&self) -> impl Iterator<Item = Component> {
        let computed = |component: &Component| self.points_of(*component).any(|point| point.repeats == 0);
        Component::ALL.into_iter().filter(computed)
    }

    /// The points of one component.
    pub fn points_of(&self, component: Component) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(move |point| point.component == component)
    }
}

const COLUMNS: &[&str] = &["component", "rows", "kv_tokens", "depths", "time_us", "spread_us", "repeats"];
const COMPONENT: usize = 0;
const ROWS: usize = 1;
const KV_TOKENS: usize = 2;
const DEPTHS: usize = 3;
const TIME_US: usize = 4;
const SPREAD_US: usize = 5;
const REPEATS: usize = 6;

/// Valid values of most times and of every spread.
const NOT_NEGATIVE: &str = "microseconds, at least 0";

/// Components without which no pass can be timed. Other components take no time where they are absent.
const REQUIRED: [Component; 3] = [Component::Block, Component::Embed, Component::Head];

impl LatencyProfile {
    /// Reads a folder with `profile.yaml` and `latency.csv`.
    ///
    /// # Errors
    /// If a file cannot be read, has another version, lacks block, embed or head, contains a point twice, or contains a
    /// value that is not finite, is negative, or does not apply to its component.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let yaml = folder.as_ref().join("profile.yaml");
        let meta: ProfileMeta = read_yaml(&yaml)?;
        meta.check(&yaml)?;
        let path = folder.as_ref().join("latency.csv");
        let mut table = Table::open(&path, COLUMNS, Owner::Us)?;
        let mut points: Vec<Point> = Vec::new();
        let mut seen = HashSet::new();
        while let Some(row) = table.next_row()? {
            let point = read_point(&row)?;
            if let Some((column, expected)) = point.fault(meta.num_loops) {
                return Err(row.error(column, expected));
            }
            if !seen.insert(point.place()) {
                return Err(row.error(COMPONENT, "each component, rows, kv_tokens and depths only once"));
            }
            points.push(point);
        }
        check_components(&path, &points)?;
        let mixed_attention = MixedAttention::read(folder.as_ref())?;
        Ok(Self { meta, points, mixed_attention })
    }

    /// Writes `latency.csv` and `profile.yaml` into a folder, each completely or not at all; creates the folder.
    ///
    /// # Errors
    /// If a file cannot be written, or [`Self::read`] would reject the profile.
    pub fn write(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let path = folder.join("latency.csv");
        self.meta.check(&folder.join("profile.yaml"))?;
        check_components(&path, &self.points)?;
        let mut seen = HashSet::new();
        for point in &self.points {
            if let Some((column, expected)) = point.fault(self.meta.num_loops) {
                let expected = format!("{}: {expected}", COLUMNS[column]);
                return Err(TraceError::file(&path, format!("{point:?}"), expected));
            }
            if !seen.insert(point.place()) {
                return Err(TraceError::file(&path, format!("{point:?} twice"), "each point once"));
            }
        }
        std::fs::create_dir_all(folder).map_err(TraceError::io("create", folder))?;
        write_rows(&path, COLUMNS, &self.points)?;
        MixedAttention::write(self.mixed_attention.as_ref(), folder)?;
        write_yaml(&folder.join("profile.yaml"), &self.meta)
    }
}

fn read_point(row: &Row<'_>) -> Result<Point> {
    let components = Component::ALL.map(Component::name).join(", ");
    let count = |column| row.number(column, "a whole number", |_: &u32| true);
    let component: Component = row.get(COMPONENT, &components, |name| name.parse().ok())?;
    let time = |column, expected| row.number(column, expected, |_: &f64| true);
    Ok(Point {
        component,
        rows: count(ROWS)?,
        kv_tokens: count(KV_TOKENS)?,
        depths: count(DEPTHS)?,
        time_us: time(TIME_US, component.times())?,
        spread_us: time(SPREAD_US, NOT_NEGATIVE)?,
        repeats: count(REPEATS)?,
    })
}

impl Point {
    /// Position of the point in the grid.
    fn place(&self) -> (Component, u32, u32, u32) {
        (self.component, self.rows, self.kv_tokens, self.depths)
    }

    /// The first column with an invalid value, and the values that are valid.
    fn fault(&self, num_loops: u32) -> Option<(usize, &'static str)> {
        let checks = [
            (self.rows >= 1, ROWS, "at least 1"),
            (self.component.has_history() || self.kv_tokens == 0, KV_TOKENS, "0: this component has no history"),
            (self.depths >= 1, DEPTHS, "at least 1"),
            (self.depths <= num_loops, DEPTHS, "no more than num_loops in profile.yaml"),
            (self.component == Component::DepthMix || self.depths == 1, DEPTHS, "1: only depth_mix has more"),
            (self.component.can_take(self.time_us), TIME_US, self.component.times()),
            (self.spread_us.is_finite() && self.spread_us >= 0.0, SPREAD_US, NOT_NEGATIVE),
        ];
        checks.into_iter().find(|check| !check.0).map(|(_, column, expected)| (column, expected))
    }
}

impl ProfileMeta {
    fn check(&self, path: &Path) -> Result<()> {
        check_version(path, self.schema_version, LatencyProfile::SCHEMA_VERSION)?;
        check_num_loops(path, self.num_loops)?;
        if !(self.overhead_us.is_finite() && self.overhead_us >= 0.0) {
            let (key, found) = ("overhead_us", self.overhead_us.to_string());
            let expected = NOT_NEGATIVE.to_owned();
            return Err(TraceError::Key { path: path.to_owned(), key, found, expected });
        }
        match &self.kv_fill {
            Some(fill) if !KV_FILLS.contains(&&**fill) => Err(TraceError::Key {
                path: path.to_owned(),
                key: "kv_fill",
                found: fill.clone(),
                expected: format!("one of {}", KV_FILLS.join(", ")),
            }),
            _ => Ok(()),
        }
    }
}

/// Names of the KV fills that a model may be made for.
const KV_FILLS: [&str; 4] = ["reuse", "first", "skip", "backfill"];

fn check_components(path: &Path, points: &[Point]) -> Result<()> {
    match REQUIRED.into_iter().find(|&component| points.iter().all(|point| point.component != component)) {
        None => Ok(()),
        Some(missing) => Err(TraceError::file(path, format!("no row of {missing}"), "rows of block, embed and head")),
    }
}

/// Rejects more loops than any model has, for which readers would allocate memory.
pub(crate) fn check_num_loops(path: &Path, num_loops: u32) -> Result<()> {
    const MOST: u32 = 64;
    match (1..=MOST).contains(&num_loops) {
        true => Ok(()),
        false => Err(TraceError::Key {
            path: path.to_owned(),
            key: "num_loops",
            found: num_loops.to_string(),
            expected: format!("1 to {MOST}"),
        }),
    }
}

/// Whether two fingerprints are of the same model, or one of them is of [any](LatencyProfile::ANY_MODEL).
pub fn is_same_model(one: &str, other: &str) -> bool {
    one == other || [one, other].contains(&LatencyProfile::ANY_MODEL)
}

/// Checks that a profile and an exit trace belong to the same model, or that the profile belongs to no particular
/// weights.
///
/// # Errors
/// If loops or fingerprints differ.
pub fn check_same_model(profile: &LatencyProfile, exits: &ExitTrace) -> Result<()> {
    let (of, needed) = (&profile.meta, &exits.meta);
    if is_same_model(&of.fingerprint, &needed.fingerprint) && of.num_loops == needed.num_loops {
        return Ok(());
    }
    Err(TraceError::OtherModel {
        profile_model: of.model.clone(),
        profile_loops: of.num_loops,
        profile_fingerprint: of.fingerprint.clone(),
        exits_model: needed.model.clone(),
        exits_loops: needed.num_loops,
        exits_fingerprint: needed.fingerprint.clone(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::exit_trace::ExitTraceMeta;

    const YAML: &str = "schema_version: 1\nmodel: m\nfingerprint: f\nnum_loops: 3\ndevice: d\nsoftware: s\n\
        source: t\noverhead_us: 1.5\nweight_bytes: 10\nkv_bytes_per_token: 2\n";
    const CSV: &str = "component,rows,kv_tokens,depths,time_us,spread_us,repeats\n\
        block,1,0,1,10.5,0.1,5\nblock,8,0,1,20,0.2,5\ndecode_attention,8,64,1,3,0,5\n\
        depth_mix,8,0,3,1,0,5\nembed,1,0,1,0.5,0,5\nhead,1,0,1,2,0,5\n";

    fn read(yaml: &str, csv: &str) -> Result<LatencyProfile> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("profile.yaml"), yaml).unwrap();
        std::fs::write(folder.path().join("latency.csv"), csv).unwrap();
        LatencyProfile::read(folder.path())
    }

    #[test]
    fn a_folder_reads_into_points() {
        let profile = read(YAML, CSV).unwrap();
        assert_eq!(profile.meta.overhead_us, 1.5);
        assert_eq!(profile.points_of(Component::Block).map(|point| point.time_us).collect::<Vec<_>>(), [10.5, 20.0]);
    }

    #[test]
    fn only_what_is_compared_with_other_passes_may_save_time() {
        let chunk = |component: Component| format!("{CSV}{component},8,0,1,-1.5,0.5,5\n");
        for component in Component::ALL {
            let found = read(YAML, &chunk(component));
            use Component::{DepthMix, ExitDecision, PrefillAgain, PrefillAttention};
            let may = matches!(component, PrefillAttention | PrefillAgain | DepthMix | ExitDecision);
            assert_eq!(found.is_ok(), may, "{component}");
            let nan = read(YAML, &chunk(component).replace("-1.5", "NaN")).unwrap_err().to_string();
            assert!(nan.ends_with(if may { "expected microseconds, a finite number" } else { "at least 0" }), "{nan}");
            if let Ok(profile) = found {
                assert_eq!(profile.points_of(component).last().unwrap().time_us, -1.5);
            }
        }
    }

    #[test]
    fn damaged_files_say_where_and_what_was_expected() {
        for (from, to, message) in [
            (
                "block,8,0,1,20",
                "block,8,0,1,NaN",
                "latency.csv:3: time_us: found `NaN`, expected microseconds, at least 0",
            ),
            ("block,8,0,1,20", "block,8,0,1,-20", "latency.csv:3: time_us: found `-20`"),
            ("block,8,0,1,20", "block,8,0,1,", "latency.csv:3: time_us: found ``"),
            ("20,0.2,5", "20,inf,5", "latency.csv:3: spread_us: found `inf`"),
            ("block,8,0", "block,0,0", "latency.csv:3: rows: found `0`, expected at least 1"),
            ("block,8,0", "block,5000000000,0", "latency.csv:3: rows: found `5000000000`, expected a whole number"),
            ("block,8,0", "block,8,7", "latency.csv:3: kv_tokens: found `7`, expected 0"),
            ("block,8,0", "block,1,0", "latency.csv:3: component: found `block`, expected each component"),
            ("block,8,0,1", "block,8,0,2", "latency.csv:3: depths: found `2`, expected 1"),
            ("depth_mix,8,0,3", "depth_mix,8,0,4", "latency.csv:5: depths: found `4`, expected no more than num_loops"),
            (
                "block,8",
                "blok,8",
                "latency.csv:3: component: found `blok`, expected block, elementwise, all_reduce, lora, after_more,",
            ),
            ("head,1,0,1,2,0,5\n", "", "latency.csv: found no row of head, expected rows of block, embed and head"),
            ("component,rows", "component,row", "latency.csv:1: found columns `component,row,"),
        ] {
            let error = read(YAML, &CSV.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(message), "expected `{message}` in `{error}`");
        }
        for (from, to, message) in [
            ("schema_version: 1", "schema_version: 2", "profile.yaml: schema_version: found 2, expected 1"),
            ("overhead_us: 1.5", "overhead_us: -1", "overhead_us: found -1, expected microseconds"),
            ("overhead_us: 1.5", "overhead_us: .nan", "overhead_us: found NaN"),
            (
                "overhead_us: 1.5",
                "overhead_us: 1.5\nkv_fill: copy",
                "kv_fill: found copy, expected one of reuse, first",
            ),
            (
                "overhead_us: 1.5",
                "overhead_us: soon",
                "overhead_us: invalid type: string \"soon\", expected f64 at line 8",
            ),
            ("overhead_us: 1.5\n", "", "missing field `overhead_us`"),
            ("model: m", "modl: m", "unknown field `modl`"),
            ("num_loops: 3", "num_loops: 4000000000", "num_loops: found 4000000000, expected 1 to 64"),
        ] {
            let error = read(&YAML.replace(from, to), CSV).unwrap_err().to_string();
            assert!(error.contains(message), "expected `{message}` in `{error}`");
        }
    }

    #[test]
    fn a_profile_that_would_not_read_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut profile = read(YAML, CSV).unwrap();
        profile.points.push(profile.points[0]);
        assert!(profile.write(folder.path()).unwrap_err().to_string().contains("twice"));
        profile.points.pop();
        profile.points[0].time_us = f64::NAN;
        assert!(profile.write(folder.path()).unwrap_err().to_string().contains("time_us: microseconds"));
        profile.points.clear();
        assert!(profile.write(folder.path()).unwrap_err().to_string().contains("no row of block"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_the_same_model_or_any_matches_an_exit_trace() {
        let mut profile = read(YAML, CSV).unwrap();
        let text = |text: &str| text.to_owned();
        let meta = |fingerprint: &str, num_loops| ExitTraceMeta {
            schema_version: 1,
            model: text("e"),
            fingerprint: text(fingerprint),
            num_loops,
            source: text(""),
            recording: None,
        };
        assert!(check_same_model(&profile, &ExitTrace::new(meta("f", 3))).is_ok());
        let error = check_same_model(&profile, &ExitTrace::new(meta("g", 3))).unwrap_err().to_string();
        assert!(
            error.contains("of `m` (3 loops, fingerprint f), expected")
                && error.contains("`e` (3 loops, fingerprint g)"),
            "{error}"
        );
        assert!(check_same_model(&profile, &ExitTrace::new(meta("f", 2))).is_err());
        assert!(check_same_model(&profile, &ExitTrace::new(meta("any", 3))).is_ok());
        assert!(check_same_model(&profile, &ExitTrace::new(meta("any", 2))).is_err());
        profile.meta.fingerprint = text(LatencyProfile::ANY_MODEL);
        assert!(check_same_model(&profile, &ExitTrace::new(meta("g", 3))).is_ok());
        assert!(check_same_model(&profile, &ExitTrace::new(meta("g", 2))).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_to_the_bit(
            times in prop::collection::vec(0.0..1e9_f64, 6),
            overhead_us in 0.0..1e9_f64,
            (weight_bytes, kv_bytes_per_token) in any::<(u64, u64)>(),
            model in ".{0,12}",
        ) {
            let mut profile = read(YAML, CSV).unwrap();
            profile.points.iter_mut().zip(&times).for_each(|(point, &time_us)| point.time_us = time_us);
            profile.points[0].spread_us = f64::MIN_POSITIVE;
            profile.meta = ProfileMeta { overhead_us, weight_bytes, kv_bytes_per_token, model, ..profile.meta };
            let folder = tempfile::tempdir().unwrap();
            profile.write(folder.path()).unwrap();
            prop_assert_eq!(LatencyProfile::read(folder.path()).unwrap(), profile);
        }
    }
}
