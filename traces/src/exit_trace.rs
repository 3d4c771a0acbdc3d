//! Exit traces: for each generated token and depth, the exit signals and the token predicted there.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Result, TraceError};
use crate::profile::check_num_loops;
use crate::table::{Owner, Row, Table, read_yaml, write_rows, write_yaml};

/// What is read off a row after a pass to tell how sure the model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Measure {
    /// Probability of the most likely token, 0 to 1. Needs the exit head.
    Top1,
    /// Probability of the most likely token less that of the second, 0 to 1. Needs the exit head.
    Margin,
    /// Entropy of the next-token distribution in nats; low means sure. Needs the exit head.
    Entropy,
    /// Cosine of the hidden states after this and the previous depth; undefined (0) at depth 0. No head needed.
    Similarity,
    /// A learned gate's probability that the token is that of the last depth, 0 to 1. No head needed.
    Gate,
}

impl Measure {
    /// Every measure, in the order of the columns of an exit trace.
    pub const ALL: [Self; 5] = [Self::Top1, Self::Margin, Self::Entropy, Self::Similarity, Self::Gate];

    /// The name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Top1 => "top1",
            Self::Margin => "margin",
            Self::Entropy => "entropy",
            Self::Similarity => "similarity",
            Self::Gate => "gate",
        }
    }

    /// Whether reading it costs a product with the whole vocabulary.
    pub fn needs_head(self) -> bool {
        !matches!(self, Self::Similarity | Self::Gate)
    }

    /// The first depth that has a value.
    pub fn first_depth(self) -> usize {
        usize::from(self == Self::Similarity)
    }

    /// The value, turned round where low means sure: the greater, the surer.
    pub fn sureness(self, value: f32) -> f32 {
        match self {
            Self::Entropy => -value,
            _ => value,
        }
    }

    /// Whether a row with this value is sure enough to leave.
    pub fn is_confident(self, value: f32, threshold: f32) -> bool {
        self.sureness(value) >= self.sureness(threshold)
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Measure {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|measure| measure.name() == name)
            .ok_or_else(|| format!("unknown exit measure `{name}`: expected top1, margin, entropy, similarity or gate"))
    }
}

/// The exit signals of one row after one pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Signals {
    /// See [`Measure::Top1`].
    pub top1: f32,
    /// See [`Measure::Margin`].
    pub margin: f32,
    /// See [`Measure::Entropy`].
    pub entropy: f32,
    /// See [`Measure::Similarity`].
    pub similarity: f32,
    /// See [`Measure::Gate`]; 0 if the model has no gates.
    pub gate: f32,
}

impl Signals {
    /// The value of one measure.
    pub fn get(&self, measure: Measure) -> f32 {
        match measure {
            Measure::Top1 => self.top1,
            Measure::Margin => self.margin,
            Measure::Entropy => self.entropy,
            Measure::Similarity => self.similarity,
            Measure::Gate => self.gate,
        }
    }
}

/// Where an exit trace comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitTraceMeta {
    /// Version of the file format: [`ExitTrace::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Name of the model, for people.
    pub model: String,
    /// Fingerprint of the model's configuration and weights, for machines.
    pub fingerprint: String,
    /// Loops of the model; each token has this many rows.
    pub num_loops: u32,
    /// How it was made: the command, the prompts, the sampling.
    pub source: String,
}

/// Signals and predictions of whole generations that ran every depth.
///
/// Token `t` of the trace is one generated token; its row at depth `d` is entry
/// `t * num_loops + d` of each column.
#[derive(Clone, Debug, PartialEq)]
pub struct ExitTrace {
    /// Where it comes from.
    pub meta: ExitTraceMeta,
    /// Whether the model has gates.
    pub has_gates: bool,
    /// Generation `g` is tokens `starts[g]..starts[g + 1]`; the last entry is the number of tokens.
    pub starts: Vec<u32>,
    /// The signals, by token and depth.
    pub signals: Vec<Signals>,
    /// The token predicted, by token and depth; that of the last depth was the one generated.
    pub predictions: Vec<u32>,
}

impl ExitTrace {
    /// Version of the files that this crate reads and writes.
    pub const SCHEMA_VERSION: u32 = 1;

    /// A trace without generations, of a model without gates.
    pub fn new(meta: ExitTraceMeta) -> Self {
        Self { meta, has_gates: false, starts: vec![0], signals: Vec::new(), predictions: Vec::new() }
    }

    /// Loops of the model.
    pub fn num_loops(&self) -> usize {
        self.meta.num_loops as usize
    }

    /// Generated tokens, of all generations together.
    pub fn num_tokens(&self) -> usize {
        self.predictions.len() / self.num_loops()
    }

    /// Generations, each the output of one prompt.
    pub fn num_generations(&self) -> usize {
        self.starts.len() - 1
    }

    /// The tokens of one generation.
    pub fn generation(&self, index: usize) -> Range<usize> {
        self.starts[index] as usize..self.starts[index + 1] as usize
    }

    /// Appends a generation: `rows[t * num_loops + d]` is token `t` at depth `d`.
    ///
    /// # Panics
    /// If the rows are not a whole number of tokens.
    pub fn push_generation(&mut self, rows: &[(Signals, u32)]) {
        assert_eq!(rows.len() % self.num_loops(), 0, "rows of a generation come by whole tokens");
        self.signals.extend(rows.iter().map(|row| row.0));
        self.predictions.extend(rows.iter().map(|row| row.1));
        self.starts.push(self.num_tokens() as u32);
    }

    /// The measures that were recorded.
    pub fn measures(&self) -> impl Iterator<Item = Measure> + use<> {
        let has_gates = self.has_gates;
        Measure::ALL.into_iter().filter(move |&measure| measure != Measure::Gate || has_gates)
    }

    /// The signals of a token at a depth.
    pub fn signals_at(&self, token: usize, depth: usize) -> &Signals {
        &self.signals[token * self.num_loops() + depth]
    }

    /// Whether the token predicted at a depth equals that of the last depth.
    pub fn agrees(&self, token: usize, depth: usize) -> bool {
        let rows = &self.predictions[token * self.num_loops()..][..self.num_loops()];
        rows[depth] == rows[self.num_loops() - 1]
    }

    /// The earliest depth whose token equals that of the last depth.
    pub fn oracle_depth(&self, token: usize) -> usize {
        (0..self.num_loops()).find(|&depth| self.agrees(token, depth)).unwrap_or(self.num_loops() - 1)
    }

    /// The depth at which a token leaves when it is confident once the measure passes the threshold.
    pub fn confident_depth(&self, token: usize, measure: Measure, threshold: f32) -> usize {
        let last = self.num_loops() - 1;
        let is_confident = |&depth: &usize| measure.is_confident(self.signals_at(token, depth).get(measure), threshold);
        (0..last).find(is_confident).unwrap_or(last)
    }

    /// Share of tokens whose prediction at a depth equals that of the last, 0 to 1.
    pub fn agreement_at(&self, depth: usize) -> f64 {
        let agreeing = (0..self.num_tokens()).filter(|&token| self.agrees(token, depth)).count();
        agreeing as f64 / self.num_tokens() as f64
    }

    /// Passes per token when each token leaves at its oracle depth, 1 to `num_loops`.
    pub fn mean_oracle_passes(&self) -> f64 {
        let passes: usize = (0..self.num_tokens()).map(|token| self.oracle_depth(token) + 1).sum();
        passes as f64 / self.num_tokens() as f64
    }
}

const COLUMNS: &[&str] =
    &["generation", "token", "depth", "prediction", "top1", "margin", "entropy", "similarity", "gate"];
const GENERATION: usize = 0;
const TOKEN: usize = 1;
const DEPTH: usize = 2;
const PREDICTION: usize = 3;
const TOP1: usize = 4;
const MARGIN: usize = 5;
const ENTROPY: usize = 6;
const SIMILARITY: usize = 7;
/// Missing where the model has no gates.
const GATE: usize = 8;

/// How far rounding may carry a probability or a cosine out of its range.
const SLACK: f32 = 1e-3;

/// Range of each measure, in the order of [`Measure::ALL`].
const RANGES: [(f32, f32); Measure::ALL.len()] = [
    (-SLACK, 1.0 + SLACK),
    (-SLACK, 1.0 + SLACK),
    (-SLACK, f32::MAX),
    (-1.0 - SLACK, 1.0 + SLACK),
    (-SLACK, 1.0 + SLACK),
];

impl ExitTrace {
    /// Reads a folder with `exits.yaml` and `exits.csv`.
    ///
    /// # Errors
    /// If a file does not read, is of another version, has no row, lacks a depth of a token, lists
    /// rows out of order, or has a signal that is not finite or out of its range.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let yaml = folder.as_ref().join("exits.yaml");
        let meta: ExitTraceMeta = read_yaml(&yaml)?;
        check_version(&yaml, meta.schema_version, Self::SCHEMA_VERSION)?;
        check_num_loops(&yaml, meta.num_loops)?;
        let path = folder.as_ref().join("exits.csv");
        let mut table = Table::open_optional(&path, COLUMNS, GATE, Owner::Us)?;
        let mut trace = Self { has_gates: table.has(GATE), ..Self::new(meta) };
        let mut place = Place::default();
        while let Some(row) = table.next_row()? {
            if place.advance(&row, trace.meta.num_loops)? {
                trace.end_generation(&path)?;
            }
            trace.predictions.push(row.number(PREDICTION, "a token id", |_: &u32| true)?);
            trace.signals.push(read_signals(&row, trace.has_gates)?);
        }
        if place.depth != trace.meta.num_loops {
            let found = match trace.predictions.len() {
                0 => "no rows".to_owned(),
                _ => format!("{} rows of the last token", place.depth),
            };
            return Err(TraceError::file(&path, found, format!("{} rows for each token", trace.meta.num_loops)));
        }
        trace.end_generation(&path)?;
        Ok(trace)
    }

    fn end_generation(&mut self, path: &Path) -> Result<()> {
        let end = u32::try_from(self.num_tokens());
        self.starts.push(end.map_err(|_| TraceError::file(path, "more tokens", "at most 4294967295"))?);
        Ok(())
    }

    /// Writes `exits.csv` and `exits.yaml` into a folder, each whole or not at all; creates the folder.
    ///
    /// # Errors
    /// If a file cannot be written, or the trace is one that [`Self::read`] would refuse.
    pub fn write(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let path = folder.join("exits.csv");
        self.check(&path)?;
        std::fs::create_dir_all(folder).map_err(TraceError::io("create", folder))?;
        let rows = (0..self.num_generations()).flat_map(|generation| {
            let tokens = self.generation(generation);
            tokens.clone().flat_map(move |token| {
                (0..self.num_loops()).map(move |depth| {
                    let Signals { top1, margin, entropy, similarity, ref gate } = *self.signals_at(token, depth);
                    let prediction = self.predictions[token * self.num_loops() + depth];
                    let gate = if self.has_gates { std::slice::from_ref(gate) } else { &[] };
                    (generation, token - tokens.start, depth, prediction, top1, margin, entropy, similarity, gate)
                })
            })
        });
        write_rows(&path, if self.has_gates { COLUMNS } else { &COLUMNS[..GATE] }, rows)?;
        write_yaml(&folder.join("exits.yaml"), &self.meta)
    }

    /// What [`Self::read`] refuses.
    fn check(&self, path: &Path) -> Result<()> {
        check_version(path, self.meta.schema_version, Self::SCHEMA_VERSION)?;
        check_num_loops(path, self.meta.num_loops)?;
        let whole = self.starts.first() == Some(&0)
            && self.starts.len() > 1
            && self.starts.is_sorted_by(|start, end| start < end)
            && self.starts.last().is_some_and(|&end| end as usize * self.num_loops() == self.predictions.len())
            && self.signals.len() == self.predictions.len();
        if !whole {
            return Err(TraceError::file(path, "a trace with missing rows", "generations of at least one token"));
        }
        for (row, signals) in self.signals.iter().enumerate() {
            for (measure, (low, high)) in Measure::ALL.into_iter().zip(RANGES) {
                let value = signals.get(measure);
                if !(low..=high).contains(&value) {
                    let found = format!("{measure} {value} in row {row}");
                    return Err(TraceError::file(path, found, "finite signals in their range"));
                }
            }
        }
        Ok(())
    }
}

/// Where the last row read stands; `depth` counts the rows of the token so far.
#[derive(Default)]
struct Place {
    generation: u32,
    token: u32,
    depth: u32,
}

impl Place {
    /// Moves on to a row, which must be the next one, and says whether it begins another generation.
    fn advance(&mut self, row: &Row<'_>, num_loops: u32) -> Result<bool> {
        let index = |column| row.number(column, "a whole number", |_: &u32| true);
        let (generation, token, depth) = (index(GENERATION)?, index(TOKEN)?, index(DEPTH)?);
        let next_token = self.depth == num_loops;
        let next_generation = next_token && generation != self.generation;
        let expected = match (next_generation, next_token) {
            (true, _) => (self.generation.wrapping_add(1), 0, 0),
            (false, true) => (self.generation, self.token.wrapping_add(1), 0),
            (false, false) => (self.generation, self.token, self.depth),
        };
        if (generation, token, depth) != expected {
            let column = match (generation == expected.0, token == expected.1) {
                (false, _) => GENERATION,
                (true, false) => TOKEN,
                (true, true) => DEPTH,
            };
            let (generation, token, depth) = expected;
            let expected = format!("the row of generation {generation}, token {token}, depth {depth}");
            return Err(row.error(column, expected));
        }
        *self = Self { generation, token, depth: depth + 1 };
        Ok(next_generation)
    }
}

fn read_signals(row: &Row<'_>, has_gates: bool) -> Result<Signals> {
    let signal = |column: usize, expected| {
        let (low, high) = RANGES[column - TOP1];
        row.number(column, expected, |value: &f32| (low..=high).contains(value))
    };
    Ok(Signals {
        top1: signal(TOP1, "a probability from 0 to 1")?,
        margin: signal(MARGIN, "a difference of probabilities from 0 to 1")?,
        entropy: signal(ENTROPY, "nats, at least 0")?,
        similarity: signal(SIMILARITY, "a cosine from -1 to 1")?,
        gate: if has_gates { signal(GATE, "a probability from 0 to 1")? } else { 0.0 },
    })
}

pub(crate) fn check_version(path: &Path, found: u32, expected: u32) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => Err(TraceError::Key {
            path: path.to_owned(),
            key: "schema_version",
            found: found.to_string(),
            expected: format!("{expected}, the version of this program"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn meta(num_loops: u32) -> ExitTraceMeta {
        let text = |text: &str| text.to_owned();
        let schema_version = ExitTrace::SCHEMA_VERSION;
        ExitTraceMeta { schema_version, model: text("m"), fingerprint: text("f"), num_loops, source: text("a: test") }
    }

    /// Two loops; generations of two tokens and one.
    const CSV: &str = "generation,token,depth,prediction,top1,margin,entropy,similarity\n\
        0,0,0,7,0.5,0.25,1,0\n0,0,1,7,0.75,0.5,0.5,0.9\n\
        0,1,0,8,0.5,0.25,1,0\n0,1,1,9,0.75,0.5,0.5,0.9\n\
        1,0,0,1,0.5,0.25,1,0\n1,0,1,1,0.75,0.5,0.5,0.9\n";

    fn read(csv: &str, meta: &ExitTraceMeta) -> Result<ExitTrace> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("exits.csv"), csv).unwrap();
        write_yaml(&folder.path().join("exits.yaml"), meta).unwrap();
        ExitTrace::read(folder.path())
    }

    #[test]
    fn a_folder_reads_by_generation_token_and_depth() {
        let trace = read(CSV, &meta(2)).unwrap();
        assert_eq!((trace.num_generations(), trace.num_tokens()), (2, 3));
        assert_eq!(trace.generation(1), 2..3);
        assert_eq!(trace.signals_at(2, 1).similarity, 0.9);
        assert_eq!((0..3).map(|token| trace.oracle_depth(token)).collect::<Vec<_>>(), [0, 1, 0]);
    }

    #[test]
    fn gates_are_a_column_where_the_model_has_them() {
        let without = read(CSV, &meta(2)).unwrap();
        assert!(!without.has_gates && without.signals.iter().all(|signals| signals.gate == 0.0));
        let csv =
            CSV.replace("similarity\n", "similarity,gate\n").replace(",0\n", ",0,0.25\n").replace("0.9\n", "0.9,1\n");
        let with = read(&csv, &meta(2)).unwrap();
        assert!(with.has_gates);
        assert_eq!((without.measures().count(), with.measures().count()), (4, 5));
        assert_eq!((with.signals_at(2, 0).gate, with.signals_at(2, 1).get(Measure::Gate)), (0.25, 1.0));
        let error = read(&csv.replace(",0.25\n", ",1.25\n"), &meta(2)).unwrap_err().to_string();
        assert!(error.contains("exits.csv:2: gate: found `1.25`, expected a probability from 0 to 1"), "{error}");
        let error = read(&csv.replace("similarity,gate", "gate,similarity"), &meta(2)).unwrap_err().to_string();
        assert!(error.contains("exits.csv:1: found columns"), "{error}");
    }

    #[test]
    fn damaged_files_name_line_column_and_what_was_expected() {
        let header = &CSV[..CSV.find('\n').unwrap() + 1];
        for (csv, message) in [
            (String::new(), "exits.csv: found an empty file"),
            (header.to_owned(), "found no rows, expected 2 rows for each token"),
            (CSV.trim_end().to_owned(), "a last line that is cut off"),
            (CSV.replace("1,0,1,1,0.75,0.5,0.5,0.9\n", ""), "found 1 rows of the last token, expected 2 rows"),
            (
                CSV.replace("0,1,1,9,0.75,0.5,0.5,0.9\n", ""),
                "exits.csv:5: generation: found `1`, expected the row of generation 0, token 1, depth 1",
            ),
            (CSV.replace("top1,", ""), "exits.csv:1: found columns `generation,token,depth,prediction,margin,"),
            (
                CSV.replace("0,0,1,7,0.75", "0,0,1,7,NaN"),
                "exits.csv:3: top1: found `NaN`, expected a probability from 0 to 1",
            ),
            (CSV.replace("0,0,1,7,0.75", "0,0,1,7,1.5"), "exits.csv:3: top1: found `1.5`"),
            (CSV.replace("0,0,1,7,0.75", "0,0,1,-7,0.75"), "exits.csv:3: prediction: found `-7`, expected a token id"),
            (
                CSV.replace("0,0,1,7", "0,0,2,7"),
                "exits.csv:3: depth: found `2`, expected the row of generation 0, token 0, depth 1",
            ),
            (
                CSV.replace("0,1,0,8", "0,2,0,8"),
                "exits.csv:4: token: found `2`, expected the row of generation 0, token 1, depth 0",
            ),
            (
                CSV.replace("1,0,0,1", "2,0,0,1"),
                "exits.csv:6: generation: found `2`, expected the row of generation 1, token 0, depth 0",
            ),
            (
                CSV.replace("0.5,0.9\n0,1,0", "0.5,1.9\n0,1,0"),
                "exits.csv:3: similarity: found `1.9`, expected a cosine",
            ),
            (CSV.replace("0.25,1,0\n0,0", "0.25,inf,0\n0,0"), "exits.csv:2: entropy: found `inf`, expected nats"),
            (CSV.replace("0,1,0,8,", "0,1,0,8,1,"), "exits.csv:4: found 9 columns, expected 8, as in the header"),
        ] {
            let error = read(&csv, &meta(2)).unwrap_err().to_string();
            assert!(error.contains(message), "expected `{message}` in `{error}`");
        }
        let other = ExitTraceMeta { schema_version: 9, ..meta(2) };
        assert!(read(CSV, &other).unwrap_err().to_string().contains("exits.yaml: schema_version: found 9, expected 1"));
        assert!(read(CSV, &meta(0)).unwrap_err().to_string().contains("num_loops: found 0"));
        assert!(read(CSV, &meta(3)).unwrap_err().to_string().contains("exits.csv:4: token: found `1`"));
    }

    #[test]
    fn a_token_leaves_at_the_first_depth_that_passes_the_threshold_or_at_the_last() {
        let trace = read(CSV, &meta(2)).unwrap();
        for (measure, threshold, depth) in [
            (Measure::Top1, 0.5, 0),
            (Measure::Top1, 0.6, 1),
            (Measure::Top1, 0.8, 1),
            (Measure::Entropy, 1.0, 0),
            (Measure::Entropy, 0.9, 1),
            (Measure::Similarity, 0.1, 1),
        ] {
            assert_eq!(trace.confident_depth(0, measure, threshold), depth, "{measure} {threshold}");
        }
    }

    #[test]
    fn a_trace_that_would_not_read_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut trace = ExitTrace::new(meta(1));
        assert!(trace.write(folder.path()).unwrap_err().to_string().contains("missing rows"));
        trace.push_generation(&[(Signals { top1: f32::NAN, ..Default::default() }, 3)]);
        assert!(trace.write(folder.path()).unwrap_err().to_string().contains("top1 NaN in row 0"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_to_the_bit(
            num_loops in 1..4_u32, has_gates: bool,
            lengths in prop::collection::vec(1..5_usize, 1..5),
            rows in prop::collection::vec(
                ((0.0..=1.0_f32, 0.0..=1.0_f32, 0.0..20.0_f32, -1.0..=1.0_f32, 0.0..=1.0_f32), any::<u32>()),
                48,
            ),
        ) {
            let mut trace = ExitTrace { has_gates, ..ExitTrace::new(meta(num_loops)) };
            let row = |&((top1, margin, entropy, similarity, gate), prediction): &((f32, f32, f32, f32, f32), u32)| {
                let gate = if has_gates { gate } else { 0.0 };
                (Signals { top1, margin, entropy, similarity, gate }, prediction)
            };
            for (start, length) in lengths.into_iter().enumerate() {
                let rows = rows.iter().skip(start).take(length * num_loops as usize);
                trace.push_generation(&rows.map(row).collect::<Vec<_>>());
            }
            let folder = tempfile::tempdir().unwrap();
            trace.write(folder.path().join("new/folder")).unwrap();
            prop_assert_eq!(ExitTrace::read(folder.path().join("new/folder")).unwrap(), trace);
        }
    }
}
