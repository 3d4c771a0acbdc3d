//! Pass logs: every pass of measured runs, with its work and its time.
//!
//! Latency models are fitted to pass logs and evaluated on them, without the machine that was measured. The file is
//! Parquet, with one row for each pass; `docs/reference/files.md` lists its columns.
//!
//! ```
//! use traces::{LoggedPass, Nanos, PassLog, PassLogMeta, PassOrigin, PassRun, PassWork};
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("passes.parquet");
//! let work = PassWork { rows: 3, decode_rows: 3, decode_history: 96, depths: 2, ..PassWork::default() };
//! let pass = LoggedPass { start: Nanos(0), elapsed: Nanos(41_500), wall_us: 1_764_400_000_000_000, work, ..LoggedPass::default() };
//! let run = PassRun {
//!     origin: PassOrigin::Replay,
//!     batching: "depth".into(), exit: "none".into(), kv_fill: "reuse".into(), load: None, repeat: 0,
//!     passes: vec![pass],
//! };
//! let log = PassLog { meta: PassLogMeta::new("kjv", "5f0c", 4, "a CPU"), runs: vec![run] };
//! log.write(&path)?;
//! assert_eq!(PassLog::read(&path)?, log);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use parquet::basic::{Compression, ZstdLevel};
use parquet::column::reader::get_typed_column_reader;
use parquet::data_type::{ByteArray, ByteArrayType, DataType, DoubleType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use serde::{Deserialize, Serialize};

use crate::error::{Result, TraceError};
use crate::exit_parquet::{catching, catching_damage, unread, unwritten, write_column};
use crate::pass_work::{ChunkWork, PassWork};
use crate::table::{PartialFile, check_version};
use crate::units::Nanos;

/// Key of [`PassLogMeta`] among the metadata of the file.
const META: &str = "depthwise.pass_log";
/// Rows of a group: the number that is held in memory as columns.
const GROUP: usize = 1 << 15;

/// Measured passes, by run.
#[derive(Clone, Debug, PartialEq)]
pub struct PassLog {
    /// What was measured.
    pub meta: PassLogMeta,
    /// The runs.
    pub runs: Vec<PassRun>,
}

/// The model and device of a pass log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassLogMeta {
    /// [`PassLog::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Name of the model.
    pub model: String,
    /// Fingerprint of the model, as in the latency profile.
    pub fingerprint: String,
    /// Number of loops of the model.
    pub num_loops: u32,
    /// The measured device.
    pub device: String,
}

/// Passes of one run under one configuration, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PassRun {
    /// Why the passes ran.
    pub origin: PassOrigin,
    /// Batching policy, as on the command line.
    pub batching: String,
    /// Exit policy, as on the command line.
    pub exit: String,
    /// KV fill, as on the command line.
    pub kv_fill: String,
    /// Arrival rate as a share of the capacity; `None` where requests arrived at the times of their trace.
    pub load: Option<f64>,
    /// Number of the repeat, from 0.
    pub repeat: u32,
    /// The passes, in order.
    pub passes: Vec<LoggedPass>,
}

/// Why passes ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PassOrigin {
    /// A replay of requests.
    #[default]
    Replay,
    /// The profiler's steady load.
    Steady,
    /// The profiler's grid of shapes.
    Grid,
}

impl PassOrigin {
    const ALL: [Self; 3] = [Self::Replay, Self::Steady, Self::Grid];

    fn name(self) -> &'static str {
        match self {
            Self::Replay => "replay",
            Self::Steady => "steady",
            Self::Grid => "grid",
        }
    }
}

impl fmt::Display for PassOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PassOrigin {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|origin| origin.name() == name);
        found.ok_or_else(|| format!("`{name}`, expected replay, steady or grid"))
    }
}

/// A pass that ran.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoggedPass {
    /// Start of the pass, on the clock of its run.
    pub start: Nanos,
    /// Duration of the pass on the executor.
    pub elapsed: Nanos,
    /// Wall-clock time at the end, in microseconds since 1970 (UTC); 0 where no clock was read.
    pub wall_us: u64,
    /// The features that the time depends on.
    pub work: PassWork,
    /// The rows, by depth.
    pub rows_by_depth: Vec<DepthRows>,
    /// How a GPU ran it; `None` for passes that no GPU ran.
    pub device: Option<DevicePass>,
}

/// How a GPU ran a pass. The work of a pass is divided into sections of rows that run through the same layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DevicePass {
    /// Time until the host had submitted all work.
    pub submitted: Nanos,
    /// Time on the device, from the first kernel to the last.
    pub device: Nanos,
    /// Sections that ran as a CUDA graph.
    pub graphs: u32,
    /// Sections whose kernels were launched one by one.
    pub eager: u32,
    /// Graphs that were captured meanwhile.
    pub captured: u32,
    /// Graphs that were dropped meanwhile.
    pub dropped: u32,
}

/// Rows of a pass at one depth, by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DepthRows {
    /// Decode rows.
    pub decode: u32,
    /// Tokens of prompts, and of contexts that are computed again.
    pub prompt: u32,
    /// Rows of backfill: skipped depths that run later.
    pub backfill: u32,
}

impl PassLogMeta {
    /// Metadata of a log with the current schema version.
    pub fn new(model: &str, fingerprint: &str, num_loops: u32, device: &str) -> Self {
        let [model, fingerprint, device] = [model, fingerprint, device].map(str::to_owned);
        Self { schema_version: PassLog::SCHEMA_VERSION, model, fingerprint, num_loops, device }
    }
}

impl PassLog {
    /// The version of the files that this crate reads and writes.
    pub const SCHEMA_VERSION: u32 = 1;

    /// Writes the file, completely or not at all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let failed = || unwritten(path);
        let meta = serde_json::to_string(&self.meta).expect("a description of texts and numbers is JSON");
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_key_value_metadata(Some(vec![KeyValue::new(META.to_owned(), meta)]))
            .build();
        let schema = parse_message_type(&schema()).expect("the schema is well formed");
        let file = PartialFile::create(path)?;
        let mut writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties)).map_err(failed())?;
        for rows in self.rows().chunks(GROUP) {
            let mut group = writer.next_row_group().map_err(failed())?;
            COLUMNS.iter().try_for_each(|(_, column)| column.write(&mut group, rows)).map_err(failed())?;
            group.close().map_err(failed())?;
        }
        writer.into_inner().map_err(failed())?.finish()
    }

    /// Every pass, with its run and its index there.
    fn rows(&self) -> Vec<Row<'_>> {
        let rows =
            self.runs.iter().flat_map(|run| run.passes.iter().zip(0..).map(move |(pass, index)| (run, index, pass)));
        rows.collect()
    }

    /// Reads a file.
    ///
    /// # Errors
    /// If the file cannot be read, has another version, or contains an invalid value.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(TraceError::io("read", path))?;
        let reader = catching(|| SerializedFileReader::new(file)).map_err(unread(path))?;
        let metadata = reader.metadata().file_metadata();
        let entry = metadata.key_value_metadata().into_iter().flatten().find(|entry| entry.key == META);
        let meta = entry.and_then(|entry| serde_json::from_str::<PassLogMeta>(entry.value.as_deref()?).ok());
        let Some(meta) = meta else {
            return Err(TraceError::file(path, format!("no metadata `{META}`"), "a pass log"));
        };
        check_version(path, meta.schema_version, Self::SCHEMA_VERSION)?;
        let schema = metadata.schema_descr();
        let found: Vec<String> = (0..schema.num_columns()).map(|place| schema.column(place).path().string()).collect();
        let is_there = |name: &str| !ADDED.contains(&name) || found.iter().any(|path| path == name);
        let columns = || COLUMNS.iter().filter(|(name, _)| is_there(name));
        if !found.iter().eq(&columns().map(|(name, column)| column.path(name)).collect::<Vec<_>>()) {
            let list = |names: Vec<String>| format!("columns `{}`", names.join(","));
            let expected = COLUMNS.iter().map(|(name, column)| column.path(name)).collect();
            return Err(TraceError::file(path, list(found), list(expected)));
        }
        let mut log = Self { meta, runs: Vec::new() };
        for group in 0..reader.num_row_groups() {
            let group = reader.get_row_group(group).map_err(unread(path))?;
            let rows = group.metadata().num_rows();
            let rows = usize::try_from(rows).ok().filter(|&rows| rows <= GROUP).ok_or_else(|| {
                TraceError::file(path, format!("a group of {rows} rows"), format!("groups of at most {GROUP} rows"))
            })?;
            let mut passes = vec![(Labels::default(), 0, LoggedPass::default()); rows];
            for (place, (name, column)) in columns().enumerate() {
                let read = catching_damage(
                    || column.read(&*group, place, &mut passes),
                    |damage| ReadError::Parquet(ParquetError::General(damage.to_owned())),
                );
                read.map_err(|error| match error {
                    ReadError::Parquet(error) => unread(path)(error),
                    ReadError::Value(found) => {
                        TraceError::file(path, format!("column `{name}`: {found}"), "the values of a pass log")
                    }
                })?;
            }
            log.extend(passes, is_there(DECIDED));
        }
        Ok(log)
    }

    /// Every column of the file, by name, with a value for each pass.
    pub fn columns(&self) -> impl Iterator<Item = (&'static str, ColumnValues)> {
        let rows = self.rows();
        COLUMNS.iter().map(move |(name, column)| {
            let values = match column {
                Column::Text(of, _) => ColumnValues::Text(rows.iter().map(of).collect()),
                Column::Number(of, _) => ColumnValues::Number(rows.iter().map(of).collect()),
                Column::Real(of, _) => ColumnValues::Real(rows.iter().map(of).collect()),
                Column::List(of, _) => ColumnValues::List(rows.iter().map(of).collect()),
            };
            (*name, values)
        })
    }

    /// A log of the columns that [`Self::columns`] gives. Those that files of earlier versions lack may be missing.
    ///
    /// # Errors
    /// What was found, if a column is missing, of another kind or length, or has an invalid value.
    pub fn from_columns(meta: PassLogMeta, mut columns: HashMap<String, ColumnValues>) -> Result<Self, String> {
        let mut passes: Vec<Read> = Vec::new();
        let knows_decided = columns.contains_key(DECIDED);
        for (place, (name, column)) in COLUMNS.iter().enumerate() {
            let Some(values) = columns.remove(*name) else {
                if ADDED.contains(name) {
                    continue;
                }
                return Err(format!("column `{name}`: found none"));
            };
            if place == 0 {
                passes.resize(values.len(), (Labels::default(), 0, LoggedPass::default()));
            }
            column.set(values, &mut passes).map_err(|found| format!("column `{name}`: {found}"))?;
        }
        let mut log = Self { meta, runs: Vec::new() };
        log.extend(passes, knows_decided);
        Ok(log)
    }

    /// Appends passes, with a default for `decided_rows` if their file does not know them.
    fn extend(&mut self, passes: Vec<Read>, knows_decided: bool) {
        for (labels, index, mut pass) in passes {
            if !knows_decided {
                pass.work.decided_rows = pass.work.exit_head_rows;
            }
            self.push(labels, index, pass);
        }
    }

    /// Appends a pass to the last run, or to a new run if its labels differ.
    fn push(&mut self, labels: Labels, index: u64, pass: LoggedPass) {
        match self.runs.last_mut() {
            Some(run) if index > 0 && run.labels() == labels => run.passes.push(pass),
            _ => {
                let Labels { origin, batching, exit, kv_fill, load, repeat } = labels;
                self.runs.push(PassRun { origin, batching, exit, kv_fill, load, repeat, passes: vec![pass] });
            }
        }
    }
}

impl PassRun {
    fn labels(&self) -> Labels {
        let Self { origin, load, repeat, .. } = *self;
        let [batching, exit, kv_fill] = [&self.batching, &self.exit, &self.kv_fill].map(String::clone);
        Labels { origin, batching, exit, kv_fill, load, repeat }
    }
}

/// The values of a column of a pass log.
#[derive(Clone, Debug, PartialEq)]
pub enum ColumnValues {
    /// Texts.
    Text(Vec<String>),
    /// Whole numbers.
    Number(Vec<u64>),
    /// Numbers, where there is one.
    Real(Vec<Option<f64>>),
    /// Lists of whole numbers.
    List(Vec<Vec<u32>>),
}

impl ColumnValues {
    /// How many values there are.
    fn len(&self) -> usize {
        match self {
            Self::Text(values) => values.len(),
            Self::Number(values) => values.len(),
            Self::Real(values) => values.len(),
            Self::List(values) => values.len(),
        }
    }
}

/// A row of the file: its run, its index in the run, and the pass.
type Row<'a> = (&'a PassRun, u64, &'a LoggedPass);

/// The columns that identify a row's run.
#[derive(Clone, Debug, Default, PartialEq)]
struct Labels {
    origin: PassOrigin,
    batching: String,
    exit: String,
    kv_fill: String,
    load: Option<f64>,
    repeat: u32,
}

/// A row while it is read.
type Read = (Labels, u64, LoggedPass);

/// How a column gets its value from a row, and sets it in a row that is being read.
enum Column {
    /// UTF-8.
    Text(fn(&Row<'_>) -> String, fn(&mut Read, String) -> Result<(), String>),
    /// A 64-bit integer of at least 0.
    Number(fn(&Row<'_>) -> u64, fn(&mut Read, u64) -> Result<(), String>),
    /// A 64-bit floating-point number, or null.
    Real(fn(&Row<'_>) -> Option<f64>, fn(&mut Read, Option<f64>)),
    /// A list of 32-bit integers of at least 0.
    List(fn(&Row<'_>) -> Vec<u32>, fn(&mut Read, Vec<u32>) -> Result<(), String>),
}

/// Column of rows whose exits are decided after the pass. Files without it took all rows of `exit_head_rows` for such.
const DECIDED: &str = "decided_rows";
/// Columns that files of earlier versions lack.
const ADDED: [&str; 8] =
    ["signal_rows", DECIDED, "submitted_ns", "device_ns", "graphs", "eager", "captured", "dropped"];

/// Every column, in the order of the file.
const COLUMNS: [(&str, Column); 35] = [
    (
        "origin",
        Column::Text(
            |row| row.0.origin.name().to_owned(),
            |read, text| {
                read.0.origin = text.parse()?;
                Ok(())
            },
        ),
    ),
    (
        "batching",
        Column::Text(
            |row| row.0.batching.clone(),
            |read, text| {
                read.0.batching = text;
                Ok(())
            },
        ),
    ),
    (
        "exit",
        Column::Text(
            |row| row.0.exit.clone(),
            |read, text| {
                read.0.exit = text;
                Ok(())
            },
        ),
    ),
    (
        "kv_fill",
        Column::Text(
            |row| row.0.kv_fill.clone(),
            |read, text| {
                read.0.kv_fill = text;
                Ok(())
            },
        ),
    ),
    ("load", Column::Real(|row| row.0.load, |read, load| read.0.load = load)),
    (
        "repeat",
        Column::Number(
            |row| row.0.repeat.into(),
            |read, value| {
                read.0.repeat = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        "pass",
        Column::Number(
            |row| row.1,
            |read, value| {
                read.1 = value;
                Ok(())
            },
        ),
    ),
    (
        "start_ns",
        Column::Number(
            |row| row.2.start.0,
            |read, value| {
                read.2.start = Nanos(value);
                Ok(())
            },
        ),
    ),
    (
        "time_ns",
        Column::Number(
            |row| row.2.elapsed.0,
            |read, value| {
                read.2.elapsed = Nanos(value);
                Ok(())
            },
        ),
    ),
    (
        "wall_us",
        Column::Number(
            |row| row.2.wall_us,
            |read, value| {
                read.2.wall_us = value;
                Ok(())
            },
        ),
    ),
    (
        "rows",
        Column::Number(
            |row| row.2.work.rows.into(),
            |read, value| {
                read.2.work.rows = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        "decode_rows",
        Column::Number(
            |row| row.2.work.decode_rows.into(),
            |read, value| {
                read.2.work.decode_rows = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        "decode_history",
        Column::Number(
            |row| row.2.work.decode_history,
            |read, value| {
                read.2.work.decode_history = value;
                Ok(())
            },
        ),
    ),
    (
        "squared_decode_history",
        Column::Real(
            |row| Some(row.2.work.squared_decode_history),
            |read, sum| read.2.work.squared_decode_history = sum.unwrap_or_default(),
        ),
    ),
    (
        "longest_decode_history",
        Column::Number(
            |row| row.2.work.longest_decode_history.into(),
            |read, value| {
                read.2.work.longest_decode_history = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        "chunk_tokens",
        Column::List(
            |row| row.2.work.chunks.iter().map(|chunk| chunk.tokens).collect(),
            |read, tokens| {
                read.2.work.chunks = tokens.into_iter().map(|tokens| ChunkWork { tokens, history: 0 }).collect();
                Ok(())
            },
        ),
    ),
    (
        "chunk_history",
        Column::List(
            |row| row.2.work.chunks.iter().map(|chunk| chunk.history).collect(),
            |read, histories| {
                let chunks = &mut read.2.work.chunks;
                if histories.len() != chunks.len() {
                    return Err(format!("{} histories of {} chunks", histories.len(), chunks.len()));
                }
                chunks.iter_mut().zip(histories).for_each(|(chunk, history)| chunk.history = history);
                Ok(())
            },
        ),
    ),
    (
        "depths",
        Column::Number(
            |row| row.2.work.depths.into(),
            |read, value| {
                read.2.work.depths = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        "embed_rows",
        Column::Number(
            |row| row.2.work.embed_rows.into(),
            |read, value| {
                read.2.work.embed_rows = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        "head_rows",
        Column::Number(
            |row| row.2.work.head_rows.into(),
            |read, value| {
                read.2.work.head_rows = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        "exit_head_rows",
        Column::Number(
            |row| row.2.work.exit_head_rows.into(),
            |read, value| {
                read.2.work.exit_head_rows = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        "signal_rows",
        Column::Number(
            |row| row.2.work.signal_rows.into(),
            |read, value| {
                read.2.work.signal_rows = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        DECIDED,
        Column::Number(
            |row| row.2.work.decided_rows.into(),
            |read, value| {
                read.2.work.decided_rows = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        "filled_depths",
        Column::Number(
            |row| row.2.work.filled_depths.into(),
            |read, value| {
                read.2.work.filled_depths = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        "before_rows",
        Column::Number(
            |row| row.2.work.before.rows.into(),
            |read, value| {
                read.2.work.before.rows = small(value)?;
                Ok(())
            },
        ),
    ),
    (
        "before_head",
        Column::Number(
            |row| row.2.work.before.head.into(),
            |read, value| {
                read.2.work.before.head = value > 0;
                Ok(())
            },
        ),
    ),
    (
        "decode_rows_by_depth",
        Column::List(
            |row| by_depth(row, |rows| rows.decode),
            |read, rows| {
                at_depths(read, rows, |at, rows| at.decode = rows);
                Ok(())
            },
        ),
    ),
    (
        "prompt_rows_by_depth",
        Column::List(
            |row| by_depth(row, |rows| rows.prompt),
            |read, rows| {
                at_depths(read, rows, |at, rows| at.prompt = rows);
                Ok(())
            },
        ),
    ),
    (
        "backfill_rows_by_depth",
        Column::List(
            |row| by_depth(row, |rows| rows.backfill),
            |read, rows| {
                at_depths(read, rows, |at, rows| at.backfill = rows);
                Ok(())
            },
        ),
    ),
    (
        "submitted_ns",
        Column::Number(
            |row| of_device(row, |pass| pass.submitted.0),
            |read, value| set_time_of_device(read, value, |pass| &mut pass.submitted),
        ),
    ),
    (
        "device_ns",
        Column::Number(
            |row| of_device(row, |pass| pass.device.0),
            |read, value| set_time_of_device(read, value, |pass| &mut pass.device),
        ),
    ),
    (
        "graphs",
        Column::Number(
            |row| of_device(row, |pass| pass.graphs.into()),
            |read, value| set_count_of_device(read, value, |pass| &mut pass.graphs),
        ),
    ),
    (
        "eager",
        Column::Number(
            |row| of_device(row, |pass| pass.eager.into()),
            |read, value| set_count_of_device(read, value, |pass| &mut pass.eager),
        ),
    ),
    (
        "captured",
        Column::Number(
            |row| of_device(row, |pass| pass.captured.into()),
            |read, value| set_count_of_device(read, value, |pass| &mut pass.captured),
        ),
    ),
    (
        "dropped",
        Column::Number(
            |row| of_device(row, |pass| pass.dropped.into()),
            |read, value| set_count_of_device(read, value, |pass| &mut pass.dropped),
        ),
    ),
];

fn of_device(row: &Row<'_>, number: fn(&DevicePass) -> u64) -> u64 {
    row.2.device.as_ref().map_or(0, number)
}

/// Sets a time of how a device ran the pass, unless it is 0: passes that no device ran have only zeros.
fn set_time_of_device(read: &mut Read, ns: u64, time: fn(&mut DevicePass) -> &mut Nanos) -> Result<(), String> {
    if ns > 0 {
        *time(read.2.device.get_or_insert_default()) = Nanos(ns);
    }
    Ok(())
}

/// As [`set_time_of_device`], a count.
fn set_count_of_device(read: &mut Read, value: u64, count: fn(&mut DevicePass) -> &mut u32) -> Result<(), String> {
    if value > 0 {
        *count(read.2.device.get_or_insert_default()) = small(value)?;
    }
    Ok(())
}

fn by_depth(row: &Row<'_>, of: fn(&DepthRows) -> u32) -> Vec<u32> {
    row.2.rows_by_depth.iter().map(of).collect()
}

fn at_depths(read: &mut Read, rows: Vec<u32>, set: fn(&mut DepthRows, u32)) {
    let by_depth = &mut read.2.rows_by_depth;
    by_depth.resize(by_depth.len().max(rows.len()), DepthRows::default());
    by_depth.iter_mut().zip(rows).for_each(|(at, rows)| set(at, rows));
}

/// Converts a number to its type in memory.
fn small(value: impl TryInto<u32> + Copy + fmt::Display) -> Result<u32, String> {
    value.try_into().map_err(|_| format!("{value}, expected a number from 0 to {}", u32::MAX))
}

/// The schema of a file, in Parquet's own notation.
fn schema() -> String {
    let column = |(name, column): &(&str, Column)| match column {
        Column::Text(..) => format!("required binary {name} (UTF8);"),
        Column::Number(..) => format!("required int64 {name};"),
        Column::Real(..) => format!("optional double {name};"),
        Column::List(..) => {
            format!("required group {name} (LIST) {{ repeated group list {{ required int32 element; }} }}")
        }
    };
    format!("message pass_log {{ {} }}", COLUMNS.iter().map(column).collect::<Vec<_>>().join(" "))
}

impl Column {
    /// Path of a column of this kind in the schema.
    fn path(&self, name: &str) -> String {
        match self {
            Self::List(..) => format!("{name}.list.element"),
            _ => name.to_owned(),
        }
    }

    /// Gives values to the rows that are being read.
    fn set(&self, values: ColumnValues, rows: &mut [Read]) -> Result<(), String> {
        if values.len() != rows.len() {
            return Err(format!("{} values, expected {}", values.len(), rows.len()));
        }
        let rows = rows.iter_mut();
        match (self, values) {
            (Self::Text(_, set), ColumnValues::Text(values)) => {
                rows.zip(values).try_for_each(|(row, value)| set(row, value))
            }
            (Self::Number(_, set), ColumnValues::Number(values)) => {
                rows.zip(values).try_for_each(|(row, value)| set(row, value))
            }
            (Self::Real(_, set), ColumnValues::Real(values)) => {
                rows.zip(values).for_each(|(row, value)| set(row, value));
                Ok(())
            }
            (Self::List(_, set), ColumnValues::List(values)) => {
                rows.zip(values).try_for_each(|(row, value)| set(row, value))
            }
            (Self::Text(..), _) => Err("expected texts".to_owned()),
            (Self::Number(..), _) => Err("expected whole numbers".to_owned()),
            (Self::Real(..), _) => Err("expected numbers".to_owned()),
            (Self::List(..), _) => Err("expected lists of whole numbers".to_owned()),
        }
    }

    /// Writes the values of some rows as the next column of a group.
    fn write(
        &self,
        group: &mut SerializedRowGroupWriter<'_, PartialFile>,
        rows: &[Row<'_>],
    ) -> Result<(), ParquetError> {
        match self {
            Self::Text(of, _) => {
                let texts = rows.iter().map(|row| of(row).as_str().into()).collect();
                write_column::<ByteArrayType>(group, texts, None, None)
            }
            Self::Number(of, _) => {
                let numbers = rows.iter().map(|row| of(row) as i64).collect();
                write_column::<Int64Type>(group, numbers, None, None)
            }
            Self::Real(of, _) => {
                let values: Vec<Option<f64>> = rows.iter().map(of).collect();
                let defined: Vec<i16> = values.iter().map(|value| i16::from(value.is_some())).collect();
                write_column::<DoubleType>(group, values.into_iter().flatten().collect(), Some(&defined), None)
            }
            Self::List(of, _) => {
                let (mut values, mut defined, mut repeated) = (Vec::new(), Vec::new(), Vec::new());
                for list in rows.iter().map(of) {
                    // An empty list has one entry in the levels, which marks it as empty.
                    for place in 0..list.len().max(1) {
                        defined.push(i16::from(!list.is_empty()));
                        repeated.push(i16::from(place > 0));
                    }
                    values.extend(list.into_iter().map(|value| value as i32));
                }
                write_column::<Int32Type>(group, values, Some(&defined), Some(&repeated))
            }
        }
    }

    /// Reads a column of a group into its rows.
    fn read(&self, group: &dyn RowGroupReader, place: usize, rows: &mut [Read]) -> Result<(), ReadError> {
        match self {
            Self::Text(_, set) => {
                let texts = read_column::<ByteArrayType>(group, place, rows.len())?.values;
                let text = |value: ByteArray| {
                    let text = std::str::from_utf8(value.data()).map(str::to_owned);
                    text.map_err(|_| "bytes that are not UTF-8".to_owned())
                };
                give(rows, texts, |row, value| set(row, text(value)?))
            }
            Self::Number(_, set) => {
                let numbers = read_column::<Int64Type>(group, place, rows.len())?.values;
                let number = |value| u64::try_from(value).map_err(|_| format!("{value}, expected at least 0"));
                give(rows, numbers, |row, value| set(row, number(value)?))
            }
            Self::Real(_, set) => {
                let ReadColumn { values, defined, .. } = read_column::<DoubleType>(group, place, rows.len())?;
                let mut values = values.into_iter();
                let values = defined.into_iter().map(|level| if level > 0 { values.next() } else { None });
                give(rows, values.collect(), |row, value| {
                    set(row, value);
                    Ok(())
                })
            }
            Self::List(_, set) => {
                let ReadColumn { values, defined, repeated } = read_column::<Int32Type>(group, place, rows.len())?;
                let (mut lists, mut values) = (Vec::<Vec<i32>>::new(), values.into_iter());
                for (defined, repeated) in defined.into_iter().zip(repeated) {
                    if repeated == 0 {
                        lists.push(Vec::new());
                    }
                    if let (true, Some(list)) = (defined > 0, lists.last_mut()) {
                        list.extend(values.next());
                    }
                }
                give(rows, lists, |row, list| set(row, list.into_iter().map(small).collect::<Result<_, _>>()?))
            }
        }
    }
}

/// Why a column cannot be read.
enum ReadError {
    /// An error of the parquet crate.
    Parquet(ParquetError),
    /// An invalid value.
    Value(String),
}

impl From<ParquetError> for ReadError {
    fn from(error: ParquetError) -> Self {
        Self::Parquet(error)
    }
}

/// Sets the value of each row.
fn give<T>(
    rows: &mut [Read],
    values: Vec<T>,
    set: impl Fn(&mut Read, T) -> Result<(), String>,
) -> Result<(), ReadError> {
    if values.len() != rows.len() {
        return Err(ReadError::Value(format!("{} values of {} rows", values.len(), rows.len())));
    }
    rows.iter_mut().zip(values).try_for_each(|(row, value)| set(row, value)).map_err(ReadError::Value)
}

/// The non-null values of a column and the levels of all: Parquet's encoding of nulls and lists.
struct ReadColumn<T> {
    values: Vec<T>,
    defined: Vec<i16>,
    repeated: Vec<i16>,
}

fn read_column<T: DataType>(
    group: &dyn RowGroupReader,
    place: usize,
    rows: usize,
) -> Result<ReadColumn<T::T>, ParquetError> {
    let mut reader = get_typed_column_reader::<T>(group.get_column_reader(place)?);
    let mut read = ReadColumn { values: Vec::new(), defined: Vec::new(), repeated: Vec::new() };
    let (mut left, mut count) = (rows, usize::MAX);
    while left > 0 && count > 0 {
        (count, ..) = reader.read_records(left, Some(&mut read.defined), Some(&mut read.repeated), &mut read.values)?;
        left -= count;
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pass_work::PassBefore;

    fn log() -> PassLog {
        let pass = |rows: u32| LoggedPass {
            start: Nanos(u64::from(rows) * 1_000),
            elapsed: Nanos(40_000 + u64::from(rows)),
            wall_us: 1_764_400_000_000_000 + u64::from(rows),
            work: PassWork {
                rows,
                decode_rows: rows / 2,
                decode_history: 1 << 40,
                squared_decode_history: 1.5e19,
                longest_decode_history: u32::MAX,
                chunks: (0..rows % 3).map(|chunk| ChunkWork { tokens: chunk + 1, history: 100 * chunk }).collect(),
                depths: 3,
                embed_rows: 1,
                head_rows: 2,
                exit_head_rows: 4,
                signal_rows: 2,
                decided_rows: 3,
                filled_depths: 5,
                before: PassBefore { rows: rows + 7, head: rows.is_multiple_of(2) },
            },
            rows_by_depth: vec![DepthRows { decode: rows / 2, prompt: 1, backfill: 0 }, DepthRows::default()],
            device: rows.is_multiple_of(2).then_some(DevicePass {
                submitted: Nanos(7),
                device: Nanos(u64::from(rows)),
                graphs: 2,
                eager: 0,
                captured: 1,
                dropped: 3,
            }),
        };
        let run = |origin, load, repeat| PassRun {
            origin,
            batching: "depth".to_owned(),
            exit: "confidence:margin:0.05".to_owned(),
            kv_fill: "skip".to_owned(),
            load,
            repeat,
            passes: (1..6).map(pass).collect(),
        };
        let runs = vec![
            run(PassOrigin::Replay, Some(0.7), 0),
            run(PassOrigin::Replay, Some(0.7), 1),
            run(PassOrigin::Steady, None, 0),
            run(PassOrigin::Grid, None, 0),
        ];
        PassLog { meta: PassLogMeta::new("kjv", "5f0c", 2, "a CPU"), runs }
    }

    #[test]
    fn a_pass_log_reads_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passes.parquet");
        let log = log();
        log.write(&path).unwrap();
        assert_eq!(PassLog::read(&path).unwrap(), log);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let empty = PassLog { runs: Vec::new(), ..log };
        empty.write(&path).unwrap();
        assert_eq!(PassLog::read(&path).unwrap(), empty);
    }

    #[test]
    fn the_columns_of_a_log_make_the_log_again_and_others_are_named() {
        let log = log();
        let columns = || log.columns().map(|(name, values)| (name.to_owned(), values)).collect::<HashMap<_, _>>();
        assert_eq!(PassLog::from_columns(log.meta.clone(), columns()).unwrap(), log);
        let mut older = columns();
        ADDED.iter().for_each(|name| assert!(older.remove(*name).is_some(), "{name}"));
        let older = PassLog::from_columns(log.meta.clone(), older).unwrap();
        let passes = older.runs.iter().flat_map(|run| &run.passes);
        assert!(passes.clone().all(|pass| pass.device.is_none() && pass.work.decided_rows == pass.work.exit_head_rows));
        let error = |name: &str, values: Option<ColumnValues>| {
            let mut columns = columns();
            columns.remove(name);
            columns.extend(values.map(|values| (name.to_owned(), values)));
            PassLog::from_columns(log.meta.clone(), columns).unwrap_err()
        };
        let rows = columns()["rows"].len();
        assert_eq!(error("rows", None), "column `rows`: found none");
        assert_eq!(
            error("rows", Some(ColumnValues::Number(vec![1]))),
            format!("column `rows`: 1 values, expected {rows}")
        );
        let reals = ColumnValues::Real(vec![Some(1.0); rows]);
        assert_eq!(error("rows", Some(reals)), "column `rows`: expected whole numbers");
        let large = ColumnValues::Number(vec![1 << 40; rows]);
        assert!(error("rows", Some(large)).starts_with("column `rows`: 1099511627776, expected a number from 0"));
    }

    #[test]
    fn damaged_pass_logs_and_those_of_others_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passes.parquet");
        log().write(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for end in (0..whole.len()).step_by(97) {
            std::fs::write(&path, &whole[..end]).unwrap();
            assert!(PassLog::read(&path).is_err(), "cut at {end}");
        }
        for place in (0..whole.len()).step_by(13) {
            let mut damaged = whole.clone();
            damaged[place] ^= 0x55;
            std::fs::write(&path, &damaged).unwrap();
            // Some bits do not matter, but none may end the process.
            let _ = PassLog::read(&path);
        }
        let newer = PassLog { meta: PassLogMeta { schema_version: 2, ..log().meta }, runs: Vec::new() };
        newer.write(&path).unwrap();
        let error = PassLog::read(&path).unwrap_err().to_string();
        assert!(error.contains("passes.parquet") && error.contains("schema_version"), "{error}");
    }
}
