//! Exit trace folders: `exits.yaml`, and the rows as `exits.parquet` or `exits.csv`.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Result, TraceError};
use crate::exit_parquet::{ParquetRows, ParquetWriter};
use crate::exit_trace::{ExitSignal, ExitTrace, ExitTraceMeta, ServedToken, SignalSet, Signals};
use crate::profile::check_num_loops;
use crate::table::{Owner, PartialFile, Row, Table, check_version, read_yaml, write_yaml};

/// How the rows of an exit trace are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExitTable {
    /// Parquet: a third of the size of CSV, and faster to read.
    #[default]
    Parquet,
    /// CSV, for people.
    Csv,
}

impl ExitTable {
    /// Name of the file.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Parquet => "exits.parquet",
            Self::Csv => "exits.csv",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Parquet => Self::Csv,
            Self::Csv => Self::Parquet,
        }
    }
}

impl fmt::Display for ExitTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.file_name())
    }
}

const YAML: &str = "exits.yaml";

/// Names of the integer columns, which are the first ones. Those from [`EXIT_DEPTH`] on are in recordings under exit
/// policies.
const INTEGERS: [&str; 7] = ["generation", "token", "depth", "prediction", "exit_depth", "full_depth", "policy"];
const GENERATION: usize = 0;
const TOKEN: usize = 1;
const DEPTH: usize = 2;
const PREDICTION: usize = 3;
const EXIT_DEPTH: usize = 4;
const FULL_DEPTH: usize = 5;
const POLICY: usize = 6;

/// The columns of a table: integers, then the signals in the order of [`ExitSignal::ALL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Columns {
    /// Number of integer columns: more in a recording under exit policies.
    pub integers: usize,
    /// The signals.
    pub signals: SignalSet,
}

impl Columns {
    pub fn new(meta: &ExitTraceMeta, signals: SignalSet) -> Self {
        Self { integers: if meta.recording.is_some() { INTEGERS.len() } else { EXIT_DEPTH }, signals }
    }

    /// Their names.
    pub fn names(self) -> Vec<&'static str> {
        INTEGERS[..self.integers].iter().copied().chain(self.signals.iter().map(ExitSignal::name)).collect()
    }

    /// The signal of a column.
    fn signal(self, column: usize) -> Option<ExitSignal> {
        self.signals.iter().nth(column.checked_sub(self.integers)?)
    }

    /// The column of a signal, one of the table's.
    fn place(self, signal: ExitSignal) -> usize {
        self.integers + self.signals.iter().take_while(|&other| other != signal).count()
    }
}

/// Tolerance for probabilities and cosines that rounding moves out of their range.
const SLACK: f32 = 1e-3;

/// One generated token at one depth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ExitRow {
    pub generation: u32,
    pub token: u32,
    pub depth: u32,
    pub prediction: u32,
    /// Exit of the token; 0 in a recording at full depth.
    pub exit_depth: u32,
    pub full_depth: u32,
    pub policy: u32,
    pub signals: Signals,
}

impl ExitRow {
    pub fn new(integers: [u32; INTEGERS.len()], signals: Signals) -> Self {
        let [generation, token, depth, prediction, exit_depth, full_depth, policy] = integers;
        Self { generation, token, depth, prediction, exit_depth, full_depth, policy, signals }
    }

    /// The values of the integer columns.
    pub fn integers(&self) -> [u32; INTEGERS.len()] {
        let &Self { generation, token, depth, prediction, exit_depth, full_depth, policy, .. } = self;
        [generation, token, depth, prediction, exit_depth, full_depth, policy]
    }
}

/// A column with an invalid value, and what was expected.
pub(crate) struct Fault {
    pub column: usize,
    pub expected: String,
}

impl ExitTrace {
    /// Reads a folder with `exits.yaml` and one of `exits.parquet` and `exits.csv`, or the parts of a trace that grows:
    /// `exits-000000.parquet` and so on.
    ///
    /// # Errors
    /// If a file cannot be read, has another version, has no rows, lacks a depth of a token, lists rows out of order,
    /// or has a signal that is not finite or out of its range.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let yaml = folder.join(YAML);
        let meta: ExitTraceMeta = read_yaml(&yaml)?;
        check_meta(&yaml, &meta)?;
        let (parquet, csv) = (folder.join(ExitTable::Parquet.file_name()), folder.join(ExitTable::Csv.file_name()));
        let parts: Vec<PathBuf> = (0..).map(|part| part_path(folder, part)).take_while(|path| path.exists()).collect();
        match (parquet.exists(), csv.exists(), parts.is_empty()) {
            (true, true, _) => Err(TraceError::file(folder, "exits.parquet beside exits.csv", "one of the two")),
            (true, _, false) | (_, true, false) => {
                Err(TraceError::file(folder, "parts of an exit trace beside a whole one", "one of the two"))
            }
            (false, true, true) => read_csv(&csv, meta),
            (true, false, true) => read_parquet(&[parquet], meta),
            (false, false, false) => read_parquet(&parts, meta),
            (false, false, true) => {
                Err(TraceError::file(folder, "neither exits.parquet nor exits.csv", "one of the two"))
            }
        }
    }

    /// Writes `exits.yaml` and the rows into a folder, each file completely or not at all; creates the folder.
    ///
    /// # Errors
    /// If a file cannot be written, or [`Self::read`] would reject the trace.
    pub fn write(&self, folder: impl AsRef<Path>, table: ExitTable) -> Result<()> {
        let mut writer = ExitTraceWriter::create(folder, self.meta.clone(), self.recorded, table)?;
        for generation in 0..self.num_generations() {
            let tokens = self.generation(generation);
            let rows = tokens.start * self.num_loops()..tokens.end * self.num_loops();
            let rows = self.signals[rows.clone()].iter().copied().zip(self.predictions[rows].iter().copied());
            let rows: Vec<_> = rows.collect();
            match &self.served {
                Some(served) => writer.push_served(&rows, &served.tokens[tokens], served.policies[generation])?,
                None => writer.push_generation(&rows)?,
            }
        }
        writer.finish()
    }
}

fn check_meta(path: &Path, meta: &ExitTraceMeta) -> Result<()> {
    check_version(path, meta.schema_version, ExitTrace::SCHEMA_VERSION)?;
    match &meta.recording {
        Some(recording) if recording.policies.is_empty() => {
            Err(TraceError::file(path, "recording.policies without a policy", "at least one"))
        }
        _ => check_num_loops(path, meta.num_loops),
    }
}

fn read_csv(path: &Path, meta: ExitTraceMeta) -> Result<ExitTrace> {
    let always = Columns::new(&meta, SignalSet::ALWAYS).names().len();
    let mut table = Table::open_optional(path, &Columns::new(&meta, SignalSet::ALL).names(), always, Owner::Us)?;
    let has = |signal: &ExitSignal| table.has_column(signal.name());
    let signals = ExitSignal::ALL.into_iter().filter(has).fold(SignalSet::ALWAYS, SignalSet::with);
    let columns = Columns::new(&meta, signals);
    let mut collector = Collector::new(meta, columns);
    while let Some(row) = table.next_row()? {
        let values = read_csv_row(&row, columns)?;
        collector.push(&values).map_err(|fault| row.error(fault.column, fault.expected))?;
    }
    collector.finish(path)
}

fn read_csv_row(row: &Row<'_>, columns: Columns) -> Result<ExitRow> {
    let mut integers = [0; INTEGERS.len()];
    for (column, value) in integers.iter_mut().enumerate().take(columns.integers) {
        let expected = if [PREDICTION, FULL_DEPTH].contains(&column) { "a token id" } else { "a whole number" };
        *value = row.number(column, expected, |_: &u32| true)?;
    }
    let mut signals = [0.0; ExitSignal::ALL.len()];
    for (column, signal) in (columns.integers..).zip(columns.signals.iter()) {
        signals[signal as usize] = row.number(column, signal.range().2, |_: &f32| true)?;
    }
    Ok(ExitRow::new(integers, signals.into()))
}

/// Reads the parts of a table, of which there is at least one.
fn read_parquet(paths: &[PathBuf], meta: ExitTraceMeta) -> Result<ExitTrace> {
    let first = ParquetRows::open(&paths[0], &meta)?;
    let columns = first.columns();
    let mut collector = Collector::new(meta, columns);
    first.for_each(|row| collector.push(row))?;
    for path in &paths[1..] {
        let rows = ParquetRows::open(path, &collector.trace.meta)?;
        if rows.columns() != columns {
            let list = |columns: Columns| format!("columns `{}`", columns.names().join(","));
            return Err(TraceError::file(
                path,
                list(rows.columns()),
                format!("{}, as in the first part", list(columns)),
            ));
        }
        rows.for_each(|row| collector.push(row))?;
    }
    collector.finish(&paths[paths.len() - 1])
}

/// Path of a part of a trace that grows.
fn part_path(folder: &Path, part: u32) -> PathBuf {
    folder.join(format!("exits-{part:06}.parquet"))
}

/// Collects the rows of a table one by one and checks that none is missing, out of place or out of range.
struct Collector {
    trace: ExitTrace,
    columns: Columns,
    /// Position of the last row.
    generation: u32,
    token: u32,
    /// Rows of the current token so far.
    depths: u32,
}

impl Collector {
    fn new(meta: ExitTraceMeta, columns: Columns) -> Self {
        let trace = ExitTrace { recorded: columns.signals, ..ExitTrace::new(meta) };
        Self { trace, columns, generation: 0, token: 0, depths: 0 }
    }

    fn push(&mut self, row: &ExitRow) -> Result<(), Fault> {
        let ends_generation = self.advance(row)?;
        check_signals(&row.signals, self.columns)?;
        if ends_generation {
            self.end_generation().map_err(|expected| Fault { column: TOKEN, expected })?;
        }
        self.push_served(row)?;
        self.trace.predictions.push(row.prediction);
        self.trace.signals.push(row.signals);
        Ok(())
    }

    /// Keeps the exit of a row's token, which every row of the token repeats.
    fn push_served(&mut self, row: &ExitRow) -> Result<(), Fault> {
        let (Some(served), Some(recording)) = (&mut self.trace.served, &self.trace.meta.recording) else {
            return Ok(());
        };
        let &ExitRow { exit_depth, full_depth, policy, .. } = row;
        let bounds = [
            (EXIT_DEPTH, exit_depth, self.trace.meta.num_loops, "a depth"),
            (POLICY, policy, recording.policies.len() as u32, "the index of a policy in exits.yaml"),
        ];
        if let Some((column, _, bound, what)) = bounds.into_iter().find(|(_, value, bound, _)| value >= bound) {
            return Err(Fault { column, expected: format!("{what}, below {bound}") });
        }
        let token = ServedToken { exit_depth, full_depth };
        let (starts_token, starts_generation) = (row.depth == 0, row.depth == 0 && row.token == 0);
        if starts_token {
            served.tokens.push(token);
        }
        if starts_generation {
            served.policies.push(policy);
        }
        let (first, of_generation) =
            (served.tokens[served.tokens.len() - 1], served.policies[served.policies.len() - 1]);
        let same = [
            (EXIT_DEPTH, exit_depth, first.exit_depth, "token"),
            (FULL_DEPTH, full_depth, first.full_depth, "token"),
            (POLICY, policy, of_generation, "generation"),
        ];
        match same.into_iter().find(|(_, value, expected, _)| value != expected) {
            Some((column, _, value, of)) => {
                Err(Fault { column, expected: format!("{value}, as in the {of}'s first row") })
            }
            None => Ok(()),
        }
    }

    /// Advances to a row, which must be the next one, and returns whether it starts another generation.
    fn advance(&mut self, row: &ExitRow) -> Result<bool, Fault> {
        let next_token = self.depths == self.trace.meta.num_loops;
        let next_generation = next_token && row.generation != self.generation;
        let expected = match (next_generation, next_token) {
            (true, _) => (self.generation.wrapping_add(1), 0, 0),
            (false, true) => (self.generation, self.token.wrapping_add(1), 0),
            (false, false) => (self.generation, self.token, self.depths),
        };
        let column = match (row.generation == expected.0, row.token == expected.1, row.depth == expected.2) {
            (false, _, _) => GENERATION,
            (true, false, _) => TOKEN,
            (true, true, false) => DEPTH,
            (true, true, true) => {
                (self.generation, self.token, self.depths) = (row.generation, row.token, row.depth + 1);
                return Ok(next_generation);
            }
        };
        let (generation, token, depth) = expected;
        let expected = format!("the row of generation {generation}, token {token}, depth {depth}");
        Err(Fault { column, expected })
    }

    fn end_generation(&mut self) -> Result<(), String> {
        let end = u32::try_from(self.trace.num_tokens());
        self.trace.starts.push(end.map_err(|_| "at most 4294967295 tokens".to_owned())?);
        Ok(())
    }

    fn finish(mut self, path: &Path) -> Result<ExitTrace> {
        let num_loops = self.trace.meta.num_loops;
        if self.depths != num_loops {
            let found = match self.depths {
                0 => "no rows".to_owned(),
                depths => format!("{depths} rows of the last token"),
            };
            return Err(TraceError::file(path, found, format!("{num_loops} rows for each token")));
        }
        self.end_generation().map_err(|expected| TraceError::file(path, "more tokens", expected))?;
        Ok(self.trace)
    }
}

fn check_signals(signals: &Signals, columns: Columns) -> Result<(), Fault> {
    for signal in columns.signals.iter() {
        let (low, high, expected) = signal.range();
        if !(low - SLACK..=high + SLACK).contains(&signals.get(signal)) {
            return Err(Fault { column: columns.place(signal), expected: expected.to_owned() });
        }
    }
    Ok(())
}

/// Writes an exit trace generation by generation, with at most one group of rows in memory. A writer that is dropped
/// before [`finish`](Self::finish) does not change the folder.
pub struct ExitTraceWriter {
    meta: ExitTraceMeta,
    columns: Columns,
    folder: PathBuf,
    path: PathBuf,
    /// The file of an earlier trace that this one replaces.
    earlier: Option<PathBuf>,
    rows: Sink,
    first_generation: u32,
    generations: u32,
}

enum Sink {
    Parquet(Box<ParquetWriter>),
    Csv(Box<csv::Writer<PartialFile>>),
}

impl ExitTraceWriter {
    /// Starts the files of a folder, which is created, with the columns of these signals. The files of an earlier trace
    /// remain until [`finish`](Self::finish).
    ///
    /// # Errors
    /// If a file cannot be written, or [`ExitTrace::read`] would reject `meta`.
    pub fn create(folder: impl AsRef<Path>, meta: ExitTraceMeta, signals: SignalSet, table: ExitTable) -> Result<Self> {
        let folder = folder.as_ref().to_owned();
        check_meta(&folder.join(YAML), &meta)?;
        std::fs::create_dir_all(&folder).map_err(TraceError::io("create", &folder))?;
        let path = folder.join(table.file_name());
        let file = PartialFile::create(&path)?;
        let columns = Columns::new(&meta, signals);
        let rows = match table {
            ExitTable::Parquet => Sink::Parquet(Box::new(ParquetWriter::new(path, file, columns)?)),
            ExitTable::Csv => {
                let mut writer = Box::new(csv::WriterBuilder::new().has_headers(false).from_writer(file));
                writer.write_record(columns.names()).map_err(from_csv(&path))?;
                Sink::Csv(writer)
            }
        };
        let path = folder.join(table.file_name());
        let earlier = Some(folder.join(table.other().file_name()));
        Ok(Self { meta, columns, folder, path, earlier, rows, first_generation: 0, generations: 0 })
    }

    /// Starts a part of a trace that grows, which will replace an earlier version of that part. Parts are counted from 0,
    /// and follow each other without a gap; `first_generation` is the number of generations before this one.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_part(
        folder: impl AsRef<Path>,
        meta: ExitTraceMeta,
        signals: SignalSet,
        part: u32,
        first_generation: u32,
    ) -> Result<Self> {
        let folder = folder.as_ref().to_owned();
        check_meta(&folder.join(YAML), &meta)?;
        std::fs::create_dir_all(&folder).map_err(TraceError::io("create", &folder))?;
        let (path, columns) = (part_path(&folder, part), Columns::new(&meta, signals));
        let file = PartialFile::create(&path)?;
        let rows = Sink::Parquet(Box::new(ParquetWriter::new(path.clone(), file, columns)?));
        Ok(Self { meta, columns, folder, path, earlier: None, rows, first_generation, generations: 0 })
    }

    /// Writes a generation: `rows[t * num_loops + d]` is token `t` at depth `d`.
    ///
    /// # Errors
    /// If the generation cannot be written, has no rows or not those of whole tokens, or has a signal out of its range.
    ///
    /// # Panics
    /// If the trace is one under exit policies.
    pub fn push_generation(&mut self, rows: &[(Signals, u32)]) -> Result<()> {
        assert!(self.meta.recording.is_none(), "generations under exit policies have exits");
        self.push(rows, &[], 0)
    }

    /// Writes a generation that was recorded under policy number `policy`; see [`ExitTrace::push_served`].
    ///
    /// # Errors
    /// As for [`push_generation`](Self::push_generation), or if a token exits at a depth that the model does not have.
    ///
    /// # Panics
    /// If the trace is one at full depth, or a token has no rows.
    pub fn push_served(&mut self, rows: &[(Signals, u32)], tokens: &[ServedToken], policy: u32) -> Result<()> {
        let policies = self.meta.recording.as_ref().map_or(0, |recording| recording.policies.len());
        assert!((policy as usize) < policies, "policy {policy} of {policies}");
        assert_eq!(rows.len(), tokens.len() * self.meta.num_loops as usize, "every token has its rows");
        self.push(rows, tokens, policy)
    }

    fn push(&mut self, rows: &[(Signals, u32)], tokens: &[ServedToken], policy: u32) -> Result<()> {
        let (num_loops, columns) = (self.meta.num_loops, self.columns);
        let path = self.path.clone();
        if rows.is_empty() || !rows.len().is_multiple_of(num_loops as usize) {
            let found = format!("{} rows of generation {}", rows.len(), self.generations);
            return Err(TraceError::file(&path, found, format!("{num_loops} rows for each token")));
        }
        for (index, &(signals, prediction)) in (0u32..).zip(rows) {
            let generation = self.first_generation + self.generations;
            let (token, depth) = (index / num_loops, index % num_loops);
            let place = || format!("generation {generation}, token {token}, depth {depth}");
            check_signals(&signals, columns).map_err(|Fault { column, expected }| {
                let signal = columns.signal(column).expect("the column of a signal");
                TraceError::file(&path, format!("{signal} {} at {}", signals.get(signal), place()), expected)
            })?;
            let (exit_depth, full_depth) =
                tokens.get(token as usize).map_or((0, 0), |token| (token.exit_depth, token.full_depth));
            if exit_depth >= num_loops {
                let found = format!("exit_depth {exit_depth} at {}", place());
                return Err(TraceError::file(&path, found, format!("a depth, below {num_loops}")));
            }
            let integers = [generation, token, depth, prediction, exit_depth, full_depth, policy];
            self.write_row(&path, &ExitRow::new(integers, signals))?;
        }
        self.generations += 1;
        Ok(())
    }

    fn write_row(&mut self, path: &Path, row: &ExitRow) -> Result<()> {
        let Columns { integers, signals } = self.columns;
        match &mut self.rows {
            Sink::Parquet(writer) => writer.push(row),
            Sink::Csv(writer) => {
                let values: Vec<f32> = signals.iter().map(|signal| row.signals.get(signal)).collect();
                writer.serialize((&row.integers()[..integers], values)).map_err(from_csv(path))
            }
        }
    }

    /// Renames the files to their final paths, replacing those of an earlier trace.
    ///
    /// # Errors
    /// If renaming fails, or there is no generation.
    pub fn finish(self) -> Result<()> {
        let path = self.path;
        if self.generations == 0 {
            return Err(TraceError::file(&path, "no generation", "at least one"));
        }
        match self.rows {
            Sink::Parquet(writer) => writer.finish()?,
            Sink::Csv(writer) => {
                writer.into_inner().map_err(|error| TraceError::io("write", &path)(error.into_error()))?.finish()?;
            }
        }
        if let Some(earlier) = self.earlier.filter(|earlier| earlier.exists()) {
            std::fs::remove_file(&earlier).map_err(TraceError::io("remove", &earlier))?;
        }
        write_yaml(&self.folder.join(YAML), &self.meta)
    }
}

fn from_csv(path: &Path) -> impl FnOnce(csv::Error) -> TraceError {
    move |error| TraceError::io("write", path)(error.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::exit_trace::Recording;

    #[test]
    fn parts_of_a_trace_that_grows_read_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let rows =
            |tokens: u32| -> Vec<_> { (0..2 * tokens).map(|row| (Signals::certain(row % 2 == 1), row)).collect() };
        let mut whole = ExitTrace::new(meta(2));
        for (part, generations) in [vec![3, 1], vec![2], vec![1, 1, 4]].into_iter().enumerate() {
            // The last version of a part counts.
            for version in [&generations[..1], &generations] {
                let first = whole.num_generations() as u32;
                let mut writer =
                    ExitTraceWriter::create_part(folder.path(), meta(2), SignalSet::ALWAYS, part as u32, first)
                        .unwrap();
                version.iter().for_each(|&tokens| writer.push_generation(&rows(tokens)).unwrap());
                writer.finish().unwrap();
            }
            generations.iter().for_each(|&tokens| whole.push_generation(&rows(tokens)));
            let read = ExitTrace::read(folder.path()).unwrap();
            assert_eq!((&read.starts, &read.predictions), (&whole.starts, &whole.predictions));
        }
        std::fs::remove_file(part_path(folder.path(), 0)).unwrap();
        std::fs::rename(part_path(folder.path(), 1), part_path(folder.path(), 0)).unwrap();
        let message = ExitTrace::read(folder.path()).unwrap_err().to_string();
        assert!(message.contains("generation"), "{message}");
        whole.write(folder.path(), ExitTable::Csv).unwrap();
        assert!(ExitTrace::read(folder.path()).unwrap_err().to_string().contains("beside a whole one"));
    }

    fn meta(num_loops: u32) -> ExitTraceMeta {
        let text = |text: &str| text.to_owned();
        let schema_version = ExitTrace::SCHEMA_VERSION;
        ExitTraceMeta {
            schema_version,
            model: text("m"),
            fingerprint: text("f"),
            num_loops,
            source: text("a: test"),
            recording: None,
        }
    }

    /// Two loops; generations of two tokens and one.
    const CSV: &str = "generation,token,depth,prediction,top1,margin,entropy,similarity\n\
        0,0,0,7,0.5,0.25,1,0\n0,0,1,7,0.75,0.5,0.5,0.9\n\
        0,1,0,8,0.5,0.25,1,0\n0,1,1,9,0.75,0.5,0.5,0.9\n\
        1,0,0,1,0.5,0.25,1,0\n1,0,1,1,0.75,0.5,0.5,0.9\n";

    fn read(csv: &str, meta: &ExitTraceMeta) -> Result<ExitTrace> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("exits.csv"), csv).unwrap();
        write_yaml(&folder.path().join(YAML), meta).unwrap();
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
        assert_eq!(without.recorded, SignalSet::ALWAYS);
        assert!(without.signals.iter().all(|signals| signals.gate == 0.0));
        let csv =
            CSV.replace("similarity\n", "similarity,gate\n").replace(",0\n", ",0,0.25\n").replace("0.9\n", "0.9,1\n");
        let with = read(&csv, &meta(2)).unwrap();
        assert_eq!(with.recorded, SignalSet::ALWAYS.with(ExitSignal::Gate));
        assert_eq!((without.recorded.iter().count(), with.recorded.iter().count()), (4, 5));
        assert_eq!((with.signals_at(2, 0).gate, with.signals_at(2, 1).get(ExitSignal::Gate)), (0.25, 1.0));
        let error = read(&csv.replace(",0.25\n", ",1.25\n"), &meta(2)).unwrap_err().to_string();
        assert!(error.contains("exits.csv:2: gate: found `1.25`, expected a probability from 0 to 1"), "{error}");
        let error = read(&csv.replace("similarity,gate", "gate,similarity"), &meta(2)).unwrap_err().to_string();
        assert!(error.contains("exits.csv:1: found columns"), "{error}");
    }

    #[test]
    fn a_difference_of_states_is_a_column_with_or_without_gates() {
        let csv = CSV
            .replace("similarity\n", "similarity,difference\n")
            .replace(",0\n", ",0,1\n")
            .replace("0.9\n", "0.9,0.03125\n");
        let found = read(&csv, &meta(2)).unwrap();
        let with_difference = SignalSet::ALWAYS.with(ExitSignal::Difference);
        assert_eq!(found.recorded, with_difference);
        assert_eq!((found.signals_at(2, 0).difference, found.signals_at(2, 1).difference), (1.0, 0.03125));
        assert_eq!(found.confident_depth(2, ExitSignal::Difference, 0.03125), 1, "low values are confident");
        let gated =
            csv.replace("difference\n", "difference,gate\n").replace("1\n", "1,0.25\n").replace("125\n", "125,1\n");
        let gated = read(&gated, &meta(2)).unwrap();
        assert_eq!(gated.recorded, with_difference.with(ExitSignal::Gate));
        assert_eq!((gated.signals_at(2, 1).difference, gated.signals_at(2, 1).gate), (0.03125, 1.0));
        for trace in [found, gated] {
            for table in [ExitTable::Csv, ExitTable::Parquet] {
                let folder = tempfile::tempdir().unwrap();
                trace.write(folder.path(), table).unwrap();
                assert_eq!(ExitTrace::read(folder.path()).unwrap(), trace, "{table}");
            }
        }
        let error = read(&csv.replace(",1\n", ",-1\n"), &meta(2)).unwrap_err().to_string();
        assert!(error.contains("difference: found `-1`, expected a relative difference, at least 0"), "{error}");
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
    fn a_trace_that_would_not_read_is_not_written() {
        for table in [ExitTable::Parquet, ExitTable::Csv] {
            let folder = tempfile::tempdir().unwrap();
            let mut trace = ExitTrace::new(meta(1));
            let error = |trace: &ExitTrace| trace.write(folder.path(), table).unwrap_err().to_string();
            assert!(error(&trace).contains("found no generation"), "{}", error(&trace));
            trace.push_generation(&[(Signals { top1: f32::NAN, ..Default::default() }, 3)]);
            assert!(error(&trace).contains("found top1 NaN at generation 0, token 0, depth 0"), "{}", error(&trace));
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_writer_that_is_dropped_leaves_the_folder_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let trace = read(CSV, &meta(2)).unwrap();
        trace.write(folder.path(), ExitTable::Csv).unwrap();
        let mut writer =
            ExitTraceWriter::create(folder.path(), meta(2), SignalSet::ALWAYS, ExitTable::Parquet).unwrap();
        writer.push_generation(&[(trace.signals[0], 1), (trace.signals[1], 1)]).unwrap();
        let uneven = writer.push_generation(&[(trace.signals[0], 1)]).unwrap_err().to_string();
        assert!(uneven.contains("found 1 rows of generation 1, expected 2 rows for each token"), "{uneven}");
        drop(writer);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        assert_eq!(ExitTrace::read(folder.path()).unwrap(), trace);
    }

    #[test]
    fn a_folder_has_one_table_and_a_new_one_replaces_it() {
        let folder = tempfile::tempdir().unwrap();
        let trace = read(CSV, &meta(2)).unwrap();
        for table in [ExitTable::Csv, ExitTable::Parquet, ExitTable::Csv] {
            trace.write(folder.path(), table).unwrap();
            assert_eq!(ExitTrace::read(folder.path()).unwrap(), trace);
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        }
        std::fs::write(folder.path().join("exits.parquet"), "").unwrap();
        let both = ExitTrace::read(folder.path()).unwrap_err().to_string();
        assert!(both.contains("found exits.parquet beside exits.csv, expected one of the two"), "{both}");
        for table in ["exits.csv", "exits.parquet"] {
            std::fs::remove_file(folder.path().join(table)).unwrap();
        }
        let none = ExitTrace::read(folder.path()).unwrap_err().to_string();
        assert!(none.contains("found neither exits.parquet nor exits.csv"), "{none}");
    }

    /// A trace of `tokens` tokens of one loop, with distinct predictions.
    fn long_trace(tokens: u32) -> ExitTrace {
        let mut trace = ExitTrace::new(meta(1));
        for generation in 0..tokens.div_ceil(100) {
            let rows = |token| (Signals { top1: 0.5, ..Signals::default() }, token);
            trace.push_generation(
                &(generation * 100..(generation * 100 + 100).min(tokens)).map(rows).collect::<Vec<_>>(),
            );
        }
        trace
    }

    #[test]
    fn parquet_holds_more_than_a_group_of_rows() {
        let folder = tempfile::tempdir().unwrap();
        for tokens in [1 << 16, (1 << 17) + 12_345] {
            let trace = long_trace(tokens);
            trace.write(folder.path(), ExitTable::Parquet).unwrap();
            assert!(ExitTrace::read(folder.path()).unwrap() == trace, "{tokens} tokens");
        }
    }

    /// The error for Parquet rows that the writer would not write.
    fn parquet_error(rows: &[ExitRow]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("exits.parquet");
        let columns = Columns::new(&meta(2), SignalSet::ALWAYS);
        let mut writer = ParquetWriter::new(path.clone(), PartialFile::create(&path).unwrap(), columns).unwrap();
        rows.iter().for_each(|row| writer.push(row).unwrap());
        writer.finish().unwrap();
        write_yaml(&folder.path().join(YAML), &meta(2)).unwrap();
        ExitTrace::read(folder.path()).unwrap_err().to_string()
    }

    #[test]
    fn parquet_rows_that_are_not_in_order_or_out_of_range_are_named() {
        let row = |generation, token, depth, top1| {
            ExitRow::new([generation, token, depth, 7, 0, 0, 0], Signals { top1, ..Signals::default() })
        };
        for (rows, message) in [
            (vec![], "exits.parquet: found no rows, expected 2 rows for each token"),
            (vec![row(0, 0, 0, 0.5)], "found 1 rows of the last token"),
            (
                vec![row(0, 0, 0, 0.5), row(0, 0, 0, 0.5)],
                "exits.parquet:2: depth: found `0`, expected the row of generation 0, token 0, depth 1",
            ),
            (
                vec![row(0, 0, 0, 0.5), row(0, 0, 1, f32::NAN)],
                "exits.parquet:2: top1: found `NaN`, expected a probability from 0 to 1",
            ),
        ] {
            let error = parquet_error(&rows);
            assert!(error.contains(message), "expected `{message}` in `{error}`");
        }
    }

    #[test]
    fn parquet_that_is_none_or_of_something_else_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("exits.parquet");
        write_yaml(&folder.path().join(YAML), &meta(1)).unwrap();
        let error = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            ExitTrace::read(folder.path()).unwrap_err().to_string()
        };
        let message = error(b"generation,token\n");
        assert!(message.contains("exits.parquet: found") && message.contains("expected a Parquet file"), "{message}");
        let other = tempfile::tempdir().unwrap();
        long_trace(3).write(other.path(), ExitTable::Parquet).unwrap();
        let whole = std::fs::read(other.path().join("exits.parquet")).unwrap();
        let message = error(&whole[..whole.len() - 9]);
        assert!(message.contains("exits.parquet: found"), "{message}");
        let at = whole.windows(6).position(|part| part == b"margin").unwrap();
        let renamed: Vec<u8> = whole.iter().enumerate().map(|(i, &byte)| if i == at { b'M' } else { byte }).collect();
        let message = error(&renamed);
        assert!(
            message.contains("prediction,top1,Margin,entropy,similarity`, expected columns `generation,"),
            "{message}"
        );
    }

    /// The same trace as [`CSV`], recorded under policies.
    fn served_csv() -> String {
        let exits = ["exit_depth,full_depth,policy", "0,7,1", "0,7,1", "1,8,1", "1,8,1", "0,1,0", "0,1,0"];
        let line = |(line, exits): (&str, &str)| {
            let fields: Vec<&str> = line.splitn(5, ',').collect();
            format!("{},{exits},{}\n", fields[..4].join(","), fields[4])
        };
        CSV.lines().zip(exits).map(line).collect()
    }

    fn served_meta() -> ExitTraceMeta {
        let policies = vec!["static:0".to_owned(), "confidence:top1:0.5".to_owned()];
        ExitTraceMeta {
            recording: Some(Recording { policies, kv_fill: "skip".to_owned(), prefill_depth: None, seed: 4 }),
            ..meta(2)
        }
    }

    #[test]
    fn recordings_under_policies_have_exits_and_what_full_depth_gives() {
        let trace = read(&served_csv(), &served_meta()).unwrap();
        let served = trace.served.as_ref().unwrap();
        assert_eq!(served.policies, [1, 0]);
        assert_eq!(served.tokens[1], ServedToken { exit_depth: 1, full_depth: 8 });
        // The last depth says 9 over what the fill left; full depth says 8, as depth 0 does.
        assert_eq!((trace.agrees(1, 0), trace.agrees(1, 1), trace.agrees_with_last(1, 0)), (true, false, false));
        assert_eq!(trace.oracle_depth(1), 1);
        for table in [ExitTable::Csv, ExitTable::Parquet] {
            let folder = tempfile::tempdir().unwrap();
            trace.write(folder.path(), table).unwrap();
            assert_eq!(ExitTrace::read(folder.path()).unwrap(), trace);
        }
        let csv = tempfile::tempdir().unwrap();
        trace.write(csv.path(), ExitTable::Csv).unwrap();
        let written = std::fs::read_to_string(csv.path().join("exits.csv")).unwrap();
        assert_eq!(written.replace("1.0,0.0\n", "1,0\n"), served_csv());
    }

    #[test]
    fn damaged_exits_of_recordings_under_policies_are_named() {
        let csv = served_csv();
        for (csv, message) in [
            (csv.replacen(",0,7,1,", ",2,7,1,", 1), "exits.csv:2: exit_depth: found `2`, expected a depth, below 2"),
            (
                csv.replacen(",0,7,1,", ",1,7,1,", 1),
                "exits.csv:3: exit_depth: found `0`, expected 1, as in the token's",
            ),
            (
                csv.replacen(",1,8,1,", ",1,7,1,", 1),
                "exits.csv:5: full_depth: found `8`, expected 7, as in the token's",
            ),
            (
                csv.replacen(",1,8,1,", ",1,8,0,", 1),
                "exits.csv:4: policy: found `0`, expected 1, as in the generation's",
            ),
            (csv.replace(",1,0,0.5,", ",1,2,0.5,"), "exits.csv:6: policy: found `2`, expected the index of a policy"),
            (CSV.to_owned(), "exits.csv:1: found columns"),
        ] {
            let error = read(&csv, &served_meta()).unwrap_err().to_string();
            assert!(error.contains(message), "expected `{message}` in `{error}`");
        }
        let error = read(&csv, &meta(2)).unwrap_err().to_string();
        assert!(error.contains("exits.csv:1: found columns"), "{error}");
        let mut none = served_meta();
        none.recording.as_mut().unwrap().policies.clear();
        assert!(read(&csv, &none).unwrap_err().to_string().contains("recording.policies without a policy"));
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_to_the_bit(
            num_loops in 1..4_u32, optional in any::<[bool; 3]>(), parquet: bool,
            lengths in prop::collection::vec(1..5_usize, 1..5),
            rows in prop::collection::vec(([0.0..=1.0_f32, 0.0..=1.0_f32, 0.0..=20.0_f32, -1.0..=1.0_f32, 0.0..=9.0_f32, 0.0..=9.0_f32, 0.0..=1.0_f32], any::<u32>()), 48),
        ) {
            let optional = [ExitSignal::Difference, ExitSignal::Kl, ExitSignal::Gate].into_iter().zip(optional);
            let recorded = optional.filter(|(_, is_in)| *is_in).fold(SignalSet::ALWAYS, |set, (signal, _)| set.with(signal));
            let mut trace = ExitTrace { recorded, ..ExitTrace::new(meta(num_loops)) };
            let row = |(values, prediction): &([f32; 7], u32)| {
                let of = |signal| if recorded.contains(signal) { values[signal as usize] } else { 0.0 };
                (Signals::from(ExitSignal::ALL.map(of)), *prediction)
            };
            for (start, length) in lengths.into_iter().enumerate() {
                let rows = rows.iter().skip(start).take(length * num_loops as usize);
                trace.push_generation(&rows.map(row).collect::<Vec<_>>());
            }
            let table = if parquet { ExitTable::Parquet } else { ExitTable::Csv };
            let folder = tempfile::tempdir().unwrap();
            trace.write(folder.path().join("new/folder"), table).unwrap();
            prop_assert_eq!(ExitTrace::read(folder.path().join("new/folder")).unwrap(), trace);
        }
    }
}
