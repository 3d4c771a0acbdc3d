//! Latency profiles: what the parts of a pass were measured to take.
//!
//! The time of a pass is the sum of its parts:
//!
//! ```text
//! overhead                                   once a pass
//! + block(rows)                              everything of the block that depends on the number of rows alone
//! + elementwise(rows)                        norms, activations, rotary embedding, where block leaves them out
//! + lora(rows)                               what the low-rank weights of each row's own loop add
//! + decode_attention(rows, history)          decode rows, at their mean history
//! + prefill_attention(tokens, history)       the chunk with the most keys
//! + sum over other chunks of prefill_again(tokens, history)
//! + depth_mix(rows, depths)                  what distinct depths in one pass add (LoRA, gathering)
//! + embed(rows at depth 0)
//! + head(rows that are looked at or leave)
//! + kv_fill(depths that the leaving rows skip)   under the KV fill `reuse`
//! ```
//!
//! Where attention was measured for whole passes, [`MixedAttention`] takes the place of the two attention parts.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Result, TraceError};
use crate::exit_trace::ExitTrace;
use crate::mixed_attention::MixedAttention;
use crate::table::{Owner, Row, Table, check_version, read_yaml, write_rows, write_yaml};

/// A part of a pass that is measured on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Component {
    /// The shared block, by `rows`: what depends on neither histories nor depths.
    Block,
    /// The parts of the block without weights (norms, activations, rotary embedding), by `rows`, where they are not
    /// part of [`Component::Block`].
    Elementwise,
    /// What the low-rank weights of each row's own loop add to a pass at one depth, by `rows`.
    Lora,
    /// What a pass takes beyond if the one before had more rows, whose data has pushed weights out of caches: by `rows` and
    /// `kv_tokens`, which is here how many rows the pass before had.
    AfterMore,
    /// What the histories of decode rows add, by `rows` and `kv_tokens` (history of each).
    DecodeAttention,
    /// What attention of one prompt chunk adds, by `rows` (its tokens) and `kv_tokens` (history before it). Below zero
    /// where the chunk takes less than the decode rows that [`Component::Block`] was measured with.
    PrefillAttention,
    /// The same of a further chunk in a pass, beside one of no fewer keys; where it is not measured, it is as
    /// [`Component::PrefillAttention`].
    PrefillAgain,
    /// What `depths` distinct depths in one pass add to a pass at one depth, by `rows`.
    DepthMix,
    /// Embedding lookup, by `rows`.
    Embed,
    /// The exit head over the vocabulary, by `rows`.
    Head,
    /// The same in a pass after one that ran it too, whose weights may still be at hand; where it is not measured, it is
    /// as [`Component::Head`].
    HeadAgain,
    /// Copying keys and values to the depths that rows which leave skip, by `rows`: one for each depth that one skips.
    KvFill,
}

impl Component {
    /// Every component, in the order in which files list them.
    pub const ALL: [Self; 12] = [
        Self::Block,
        Self::Elementwise,
        Self::Lora,
        Self::AfterMore,
        Self::DecodeAttention,
        Self::PrefillAttention,
        Self::PrefillAgain,
        Self::DepthMix,
        Self::Embed,
        Self::Head,
        Self::HeadAgain,
        Self::KvFill,
    ];

    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Elementwise => "elementwise",
            Self::Lora => "lora",
            Self::AfterMore => "after_more",
            Self::DecodeAttention => "decode_attention",
            Self::PrefillAttention => "prefill_attention",
            Self::PrefillAgain => "prefill_again",
            Self::DepthMix => "depth_mix",
            Self::Embed => "embed",
            Self::Head => "head",
            Self::HeadAgain => "head_again",
            Self::KvFill => "kv_fill",
        }
    }

    /// Whether a history (`kv_tokens`) plays a part, or what stands in its place.
    pub fn has_history(self) -> bool {
        matches!(self, Self::DecodeAttention | Self::PrefillAttention | Self::PrefillAgain | Self::AfterMore)
    }

    /// Whether it may take less than no time: prompt chunks are measured against as many decode rows.
    fn may_save(self) -> bool {
        matches!(self, Self::PrefillAttention | Self::PrefillAgain)
    }

    /// Whether a number of microseconds is one that it can take.
    pub fn can_take(self, time_us: f64) -> bool {
        time_us.is_finite() && (self.may_save() || time_us >= 0.0)
    }

    /// Which numbers [`Component::can_take`] accepts, in words.
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
    /// What was measured.
    pub component: Component,
    /// Rows of the pass (or tokens of the chunk).
    pub rows: u32,
    /// History of each decode row, or before the chunk, in tokens; rows of the pass before of [`Component::AfterMore`]; 0
    /// where it plays no part.
    pub kv_tokens: u32,
    /// Distinct depths among the rows; 1 except for [`Component::DepthMix`].
    pub depths: u32,
    /// Median time in microseconds.
    pub time_us: f64,
    /// Half the distance between the quartiles, in microseconds.
    pub spread_us: f64,
    /// Repeats behind the median; 0 where the time was computed rather than measured.
    pub repeats: u32,
}

/// Where a profile comes from and what the device holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileMeta {
    /// Version of the file format: [`LatencyProfile::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Name of the model, for people.
    pub model: String,
    /// Fingerprint of the model's configuration and weights; `any` matches every exit trace.
    pub fingerprint: String,
    /// Loops of the model.
    pub num_loops: u32,
    /// The device, with what is known of it: name, cores or clock.
    pub device: String,
    /// Software and number type that ran on it.
    pub software: String,
    /// How the numbers came about: the command, or the tables they were computed from.
    pub source: String,
    /// Fixed time of a pass that no other part holds, in microseconds.
    pub overhead_us: f64,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Bytes of keys and values of one token, over all depths.
    pub kv_bytes_per_token: u64,
    /// What else takes memory, and how much there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryFigures>,
}

/// Memory beside weights, keys and values, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryFigures {
    /// All of the device's memory, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_bytes: Option<u64>,
    /// What neither weights nor activations nor keys and values take: context, workspaces, communication.
    pub other_bytes: u64,
    /// Activations of each row of a pass.
    pub row_bytes: u64,
    /// Logits of each row that predicts.
    pub logits_bytes: u64,
}

/// What the parts of a pass take on one device, for one model.
#[derive(Clone, Debug, PartialEq)]
pub struct LatencyProfile {
    /// Where it comes from.
    pub meta: ProfileMeta,
    /// The measured points.
    pub points: Vec<Point>,
    /// Attention where it was measured for whole passes; the attention components then have no points.
    pub mixed_attention: Option<MixedAttention>,
}

impl LatencyProfile {
    /// Version of the files that this crate reads and writes.
    pub const SCHEMA_VERSION: u32 = 1;
    /// Fingerprint of a profile that stands for no particular weights.
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

/// What most times are, and every spread.
const NOT_NEGATIVE: &str = "microseconds, at least 0";

/// Components without which no pass can be timed; the others take no time where they are absent.
const REQUIRED: [Component; 3] = [Component::Block, Component::Embed, Component::Head];

impl LatencyProfile {
    /// Reads a folder with `profile.yaml` and `latency.csv`.
    ///
    /// # Errors
    /// If a file does not read, is of another version, lacks block, embed or head, measures a point
    /// twice, or has a value that is not finite, negative, or has no meaning for its component.
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

    /// Writes `latency.csv` and `profile.yaml` into a folder, each whole or not at all; creates the folder.
    ///
    /// # Errors
    /// If a file cannot be written, or the profile is one that [`Self::read`] would refuse.
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
    /// What tells points of a grid apart.
    fn place(&self) -> (Component, u32, u32, u32) {
        (self.component, self.rows, self.kv_tokens, self.depths)
    }

    /// The first column with a value that makes no sense, and what would.
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
        Ok(())
    }
}

fn check_components(path: &Path, points: &[Point]) -> Result<()> {
    match REQUIRED.into_iter().find(|&component| points.iter().all(|point| point.component != component)) {
        None => Ok(()),
        Some(missing) => Err(TraceError::file(path, format!("no row of {missing}"), "rows of block, embed and head")),
    }
}

/// More loops than any model has would make others allocate for them.
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

/// Whether a profile and an exit trace are of the same model, or the profile of no particular weights.
///
/// # Errors
/// If loops or fingerprints differ.
pub fn check_same_model(profile: &LatencyProfile, exits: &ExitTrace) -> Result<()> {
    let (of, needed) = (&profile.meta, &exits.meta);
    let same_weights = of.fingerprint == LatencyProfile::ANY_MODEL || of.fingerprint == needed.fingerprint;
    if same_weights && of.num_loops == needed.num_loops {
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
    fn only_prompt_chunks_may_take_less_than_what_they_are_compared_with() {
        let chunk = |component: Component| format!("{CSV}{component},8,0,1,-1.5,0.5,5\n");
        for component in Component::ALL {
            let found = read(YAML, &chunk(component));
            let may = matches!(component, Component::PrefillAttention | Component::PrefillAgain);
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
                "latency.csv:3: component: found `blok`, expected block, elementwise, lora, after_more, decode_attention,",
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
        };
        assert!(check_same_model(&profile, &ExitTrace::new(meta("f", 3))).is_ok());
        let error = check_same_model(&profile, &ExitTrace::new(meta("g", 3))).unwrap_err().to_string();
        assert!(
            error.contains("of `m` (3 loops, fingerprint f), expected")
                && error.contains("`e` (3 loops, fingerprint g)"),
            "{error}"
        );
        assert!(check_same_model(&profile, &ExitTrace::new(meta("f", 2))).is_err());
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
