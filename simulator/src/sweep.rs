//! Many runs in one CSV file. Each run is written as soon as it ends, and a run that is in the file is not repeated.
//!
//! ```text
//! points 0, 1, 2, ... ──not in the file?──► run, on all cores ──► append a line ──the last?──► sort the lines
//! ```
//!
//! A file that was cut off at any byte, or whose runs were stopped, ends up identical to an uninterrupted one; so do the
//! files of the shards of a sweep, when they are merged.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use csv::StringRecord;
use rayon::prelude::*;
use serde::Serialize;
use traces::TraceError;
use traces::table::write_whole;

use crate::shard::Shard;
use crate::statistics::Interval;

/// Name of the first column, which identifies the point of a line.
pub const POINT: &str = "point";

/// The points of a sweep and their results so far.
#[derive(Debug)]
pub struct Points {
    /// Of the whole sweep.
    count: usize,
    shard: Shard,
    header: Option<StringRecord>,
    lines: BTreeMap<usize, StringRecord>,
    /// `None` if results are kept in memory only.
    file: Option<(PathBuf, File)>,
}

/// The lines of all points, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// Names of the columns.
    pub header: StringRecord,
    /// The cells of each line, one for each column.
    pub lines: Vec<StringRecord>,
}

impl Points {
    /// A sweep of `count` points without results, kept in memory only.
    pub fn in_memory(count: usize) -> Self {
        Self { count, shard: Shard::WHOLE, header: None, lines: BTreeMap::new(), file: None }
    }

    /// A shard of a sweep of `count` points with the results in a file, which is created if it does not exist. A line that
    /// was cut off is removed.
    ///
    /// # Errors
    /// If the file cannot be read or written, a line does not belong to the shard, or a point is there twice.
    pub fn open(path: &Path, count: usize, shard: Shard) -> Result<Self, TraceError> {
        let io = |action| move |source| TraceError::Io { action, path: path.to_owned(), source };
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io("open"))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(io("read"))?;
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64).map_err(io("write"))?;
        let mut points = Self { shard, ..Self::in_memory(count) };
        points.read(path, &text[..whole])?;
        points.file = Some((path.to_owned(), file));
        Ok(points)
    }

    /// Adds the lines of a shard from the file that another process wrote. `first` is the line of the shard's first point,
    /// simulated again: a file that has another was not written by this program.
    ///
    /// # Errors
    /// If the file cannot be read, lacks a point, has one twice or one of another shard, or the line of the first point
    /// differs.
    pub fn add(&mut self, path: &Path, shard: Shard, first: &impl Serialize) -> Result<(), TraceError> {
        let text =
            std::fs::read(path).map_err(|source| TraceError::Io { action: "read", path: path.into(), source })?;
        let error =
            |found, expected: &str| TraceError::File { path: path.into(), found, expected: expected.to_owned() };
        let mut added = Self { shard, ..Self::in_memory(self.count) };
        added.read(path, &text)?;
        let count = shard.points(self.count).count();
        if added.done() < count {
            let found = format!("{} of the {count} points of shard {shard}", added.done());
            return Err(error(found, "all of them"));
        }
        let (header, record) = records(first);
        let first = added.lines.first_key_value();
        if added.header.as_ref() != Some(&header) || first.is_some_and(|(_, there)| *there != record) {
            let found = format!("another line of point {} than this program computes", shard.number() - 1);
            return Err(error(found, "a shard of the same program"));
        }
        self.header = added.header;
        self.lines.append(&mut added.lines);
        Ok(())
    }

    fn read(&mut self, path: &Path, text: &[u8]) -> Result<(), TraceError> {
        let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(text);
        let expected = match self.shard {
            Shard::WHOLE => format!("the line of a point below {}", self.count),
            shard => format!("the line of a point of shard {shard} below {}", self.count),
        };
        for record in reader.records() {
            let error =
                |line, found| TraceError::Line { path: path.to_owned(), line, found, expected: expected.clone() };
            let record =
                record.map_err(|wrong| error(wrong.position().map_or(0, csv::Position::line), wrong.to_string()))?;
            if self.header.is_none() {
                self.header = Some(record);
                continue;
            }
            let is_ours = |point: &usize| *point < self.count && self.shard.contains(*point);
            let point = record.get(0).and_then(|cell| cell.parse().ok()).filter(is_ours);
            let line = record.position().map_or(0, csv::Position::line);
            let point = point.ok_or_else(|| error(line, format!("`{}`", record.get(0).unwrap_or_default())))?;
            if self.lines.insert(point, record).is_some() {
                return Err(error(line, format!("point {point} a second time")));
            }
        }
        Ok(())
    }

    /// Number of points with a result.
    pub fn done(&self) -> usize {
        self.lines.len()
    }

    /// Runs the missing points of the shard on all cores, appends the line of each, and sorts the lines. Calls `finished`
    /// after each point. If none is missing, the first runs again, because only a line says which columns there are.
    ///
    /// A line is a structure, or a tuple of structures, whose first field is the point.
    ///
    /// # Errors
    /// The error of a run; or if the file cannot be written, or its columns differ from those of a line.
    pub fn complete<L, E>(
        self,
        run: impl Fn(usize) -> Result<L, E> + Sync,
        finished: impl Fn() + Sync,
    ) -> Result<Table, E>
    where
        L: Serialize,
        E: From<TraceError> + Send,
    {
        let missing: Vec<usize> =
            self.shard.points(self.count).filter(|point| !self.lines.contains_key(point)).collect();
        if let (true, Some((first, _))) = (missing.is_empty(), self.lines.first_key_value()) {
            // Only a line says which columns there are.
            self.check_header(&records(&run(*first)?).0)?;
        }
        let points = Mutex::new(self);
        missing.into_par_iter().try_for_each(|point| {
            let line = run(point)?;
            points.lock().expect("no thread panics with it").append(point, &line)?;
            finished();
            Ok::<(), E>(())
        })?;
        Ok(points.into_inner().expect("no thread panicked with it").in_order()?)
    }

    /// Refuses lines of the file that have other columns than those to come.
    fn check_header(&self, header: &StringRecord) -> Result<(), TraceError> {
        match (&self.file, &self.header) {
            (Some((path, _)), Some(there)) if there != header => Err(TraceError::Line {
                path: path.clone(),
                line: 1,
                found: "other columns".to_owned(),
                expected: format!("`{}`", header.iter().collect::<Vec<_>>().join(",")),
            }),
            _ => Ok(()),
        }
    }

    fn append(&mut self, point: usize, line: &impl Serialize) -> Result<(), TraceError> {
        let (header, record) = records(line);
        let text = match &self.header {
            None => [text_of(&header), text_of(&record)].concat(),
            Some(_) => text_of(&record),
        };
        self.check_header(&header)?;
        if let Some((path, file)) = &mut self.file {
            let path = path.clone();
            let whole = file.metadata().map(|there| there.len());
            if let Err(source) = file.write_all(&text) {
                // On a full disk a part of the line may be there; what cannot be cut off now is on the next opening.
                let _ = whole.and_then(|length| file.set_len(length));
                return Err(TraceError::Io { action: "write", path, source });
            }
        }
        self.header = Some(header);
        self.lines.insert(point, record);
        Ok(())
    }

    /// The lines so far in order, which the file then has too.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn in_order(self) -> Result<Table, TraceError> {
        let table = Table { header: self.header.unwrap_or_default(), lines: self.lines.into_values().collect() };
        if let Some((path, _)) = self.file {
            table.write(&path)?;
        }
        Ok(table)
    }
}

/// The header and the line of a serialized structure.
fn records(line: &impl Serialize) -> (StringRecord, StringRecord) {
    const PLAIN: &str = "lines are structures of numbers and text";
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.serialize(line).expect(PLAIN);
    let text = writer.into_inner().expect("memory takes everything");
    let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(&text[..]);
    let mut records = reader.records().map(|record| record.expect("what was written reads back"));
    (records.next().expect(PLAIN), records.next().expect(PLAIN))
}

/// The columns that a serialized structure has in a line: the names of its fields.
pub fn columns(line: &impl Serialize) -> Vec<String> {
    records(line).0.iter().map(str::to_owned).collect()
}

fn text_of(record: &StringRecord) -> Vec<u8> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(record).expect("memory takes everything");
    writer.into_inner().expect("memory takes everything")
}

impl Table {
    /// The cells of a column; `None` if there is no such column.
    pub fn column(&self, name: &str) -> Option<impl Iterator<Item = &str>> {
        let index = self.header.iter().position(|column| column == name)?;
        Some(self.lines.iter().map(move |line| &line[index]))
    }

    /// Writes the table as CSV, whole or not at all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), TraceError> {
        write_whole(path, |file| {
            let mut writer = csv::Writer::from_writer(file);
            writer.write_record(&self.header)?;
            for line in &self.lines {
                writer.write_record(line)?;
            }
            writer.flush()
        })
    }

    /// Merges every `repeats` consecutive lines, which differ in their seed only, into one.
    ///
    /// The columns in `settings` keep the cells of the first line. Every other column except `point` and `seed` is
    /// averaged and followed by half the width of its confidence interval, in a column that ends in `_ci95`. A cell
    /// that is empty in one of the lines stays empty. `seeds` is the number of lines.
    pub fn over_seeds(&self, repeats: usize, settings: &[impl AsRef<str>]) -> Self {
        let is_setting = |name: &str| settings.iter().any(|setting| setting.as_ref() == name);
        let columns: Vec<(usize, &str)> =
            self.header.iter().enumerate().filter(|(_, name)| ![POINT, "seed"].contains(name)).collect();
        let (settings, metrics): (Vec<_>, Vec<_>) = columns.into_iter().partition(|(_, name)| is_setting(name));
        let mut header: StringRecord = settings.iter().map(|(_, name)| *name).collect();
        header.push_field("seeds");
        for (_, name) in &metrics {
            header.push_field(name);
            header.push_field(&format!("{name}_ci95"));
        }
        let summed_up = |lines: &[StringRecord]| {
            let mut line: StringRecord = settings.iter().map(|&(index, _)| &lines[0][index]).collect();
            line.push_field(&lines.len().to_string());
            for &(index, _) in &metrics {
                let values: Option<Vec<f64>> = lines.iter().map(|line| line[index].parse().ok()).collect();
                let interval = values.map(|values| Interval::of(&values));
                let number = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
                line.push_field(&number(interval.map(|interval| interval.mean)));
                line.push_field(&number(interval.and_then(|interval| interval.half_width)));
            }
            line
        };
        Self { header, lines: self.lines.chunks(repeats).map(summed_up).collect() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Serialize)]
    struct Line {
        point: usize,
        name: &'static str,
        seed: u64,
        value: f64,
        share: Option<f64>,
    }

    fn line(point: usize) -> Line {
        let name = ["plain", "with, a comma"][point / 3 % 2];
        let seed = point as u64 % 3;
        Line { point, name, seed, value: (point as f64).sqrt() / 3.0, share: (point < 6).then_some(0.5) }
    }

    fn complete(path: &Path, runs: &AtomicUsize) -> Result<Table, TraceError> {
        let run = |point| {
            runs.fetch_add(1, Ordering::Relaxed);
            Ok(line(point))
        };
        Points::open(path, 12, Shard::WHOLE)?.complete(run, || ())
    }

    #[test]
    fn a_file_that_was_cut_off_anywhere_ends_up_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sweep.csv");
        let runs = AtomicUsize::new(0);
        let whole_table = complete(&path, &runs).unwrap();
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(runs.swap(0, Ordering::Relaxed), 12);
        for length in 0..=whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(complete(&path, &runs).unwrap(), whole_table);
            assert!(std::fs::read(&path).unwrap() == whole, "cut off after {length} bytes");
            let lines = whole[..length].iter().filter(|&&byte| byte == b'\n').count();
            // Of a whole file, one runs for its columns.
            let expected = (12 - lines.saturating_sub(1)).max(1);
            assert_eq!(runs.swap(0, Ordering::Relaxed), expected, "only what is missing runs");
        }
    }

    #[test]
    fn what_finished_before_an_error_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sweep.csv");
        let run = |point| match point {
            7 => Err(TraceError::Io { action: "run", path: "it".into(), source: std::io::Error::other("no") }),
            point => Ok(line(point)),
        };
        assert!(Points::open(&path, 12, Shard::WHOLE).unwrap().complete(run, || ()).is_err());
        let kept = Points::open(&path, 12, Shard::WHOLE).unwrap().done();
        let runs = AtomicUsize::new(0);
        let table = complete(&path, &runs).unwrap();
        assert_eq!(runs.into_inner(), 12 - kept);
        assert!(table.column("point").unwrap().map(|cell| cell.parse::<usize>().unwrap()).eq(0..12));
    }

    #[test]
    fn damaged_lines_and_other_columns_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sweep.csv");
        let error = |text: &str| {
            std::fs::write(&path, text).unwrap();
            complete(&path, &AtomicUsize::new(0)).unwrap_err().to_string()
        };
        let header = "point,name,seed,value,share\n";
        let first = error(&format!("{header}0,plain,0,1.0,\nx,plain,0,1.0,\n"));
        assert!(first.contains("sweep.csv:3: found `x`, expected the line of a point below 12"), "{first}");
        assert!(error(&format!("{header}0,plain,0\n")).contains("sweep.csv:2"));
        assert!(error(&format!("{header}12,plain,0,1.0,\n")).contains("sweep.csv:2: found `12`"));
        let renamed = header.replace("share", "sNaNhare");
        let whole: String = (0..12).map(|point| format!("{point},plain,0,1.0,\n")).collect();
        assert!(error(&format!("{renamed}{whole}")).contains("sweep.csv:1: found other columns"));
        assert!(error("point,name\n0,plain\n").contains("other columns, expected `point,name,seed,value,share`"));
    }

    #[test]
    fn shards_are_merged_to_the_lines_of_one_run_and_others_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let whole = Points::in_memory(12).complete(|point| Ok::<_, TraceError>(line(point)), || ()).unwrap();
        let shards: Vec<Shard> = "1/5".parse::<Shard>().unwrap().all().collect();
        let path = |shard: Shard| folder.path().join(format!("{}.csv", shard.number()));
        let mut merged = Points::in_memory(12);
        for &shard in shards.iter().rev() {
            let points = Points::open(&path(shard), 12, shard).unwrap();
            points.complete(|point| Ok::<_, TraceError>(line(point)), || ()).unwrap();
            merged.add(&path(shard), shard, &line(shard.number() - 1)).unwrap();
        }
        assert_eq!(merged.in_order().unwrap(), whole);

        let (second, text) = (path(shards[1]), std::fs::read_to_string(path(shards[1])).unwrap());
        let add = |text: &str, first: usize| {
            std::fs::write(&second, text).unwrap();
            Points::in_memory(12).add(&second, shards[1], &line(first)).unwrap_err().to_string()
        };
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        for (text, first, expected) in [
            (lines[..3].concat(), 1, "2.csv: found 2 of the 3 points of shard 2/5, expected all of them"),
            ([&text, lines[3]].concat(), 1, "2.csv:5: found point 11 a second time"),
            (text.replace("\n6,", "\n7,"), 1, "2.csv:3: found `7`, expected the line of a point of shard 2/5 below 12"),
            (text.clone(), 6, "2.csv: found another line of point 1 than this program computes"),
            (text.replace("share", "part"), 1, "2.csv: found another line of point 1 than this program computes"),
        ] {
            let error = add(&text, first);
            assert!(error.contains(expected), "expected `{expected}` in: {error}");
        }
    }

    #[test]
    fn lines_that_differ_in_their_seed_are_averaged() {
        let table = Points::in_memory(12).complete(|point| Ok::<_, TraceError>(line(point)), || ()).unwrap();
        let summary = table.over_seeds(3, &["name"]);
        assert!(summary.header.iter().eq(["name", "seeds", "value", "value_ci95", "share", "share_ci95"]));
        assert_eq!(summary.lines.len(), 4);
        let expected = Interval::of(&[3, 4, 5].map(|point| line(point).value));
        let number = |column: &str, row: usize| summary.column(column).unwrap().nth(row).unwrap().parse::<f64>().ok();
        assert_eq!((number("value", 1), number("value_ci95", 1)), (Some(expected.mean), expected.half_width));
        assert_eq!((number("share", 1), number("share_ci95", 1)), (Some(0.5), Some(0.0)));
        assert_eq!(number("share", 2), None, "a cell that is empty in a line is empty in the mean");
        assert_eq!(summary.column("name").unwrap().nth(1), Some("with, a comma"));
    }
}
