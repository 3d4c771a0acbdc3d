//! Attention of whole passes: measured for prompt chunk and decode rows together, and for uneven histories.
//!
//! Where one kernel call serves prompt chunks and decode rows, its time is not the sum of two: the two share the
//! device. Such a profile has `mixed_attention.csv` in place of the attention components of `latency.csv`, and may
//! have `skew.csv`.

use std::path::Path;

use serde::Serialize;

use crate::error::{Result, TraceError};
use crate::table::{Owner, Table, write_rows};

/// Time of attention for one prompt chunk and decode rows of one history, over all layers of the block.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MixedPoint {
    /// Tokens of the chunk; 0 for decode rows alone.
    pub prefill_tokens: u32,
    /// History before the chunk, in tokens.
    pub prefill_history: u32,
    /// Decode rows; 0 for a chunk alone.
    pub decode_rows: u32,
    /// History of each decode row, in tokens.
    pub decode_history: u32,
    /// Time in microseconds.
    pub time_us: f64,
}

/// How far uneven histories of decode rows move the time of attention from that at their mean history (0) to that
/// at the longest (1), measured on batches with two lengths.
///
/// A cell holds for passes up to its bounds and above those of the next smaller cell.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SkewCell {
    /// Tokens of the prompt chunk, at most.
    pub prefill_tokens: u32,
    /// Decode rows, at most.
    pub decode_rows: u32,
    /// Share of the rows that have the longer history, at most: `(mean - shortest) / (longest - shortest)`.
    pub long_share: f64,
    /// The longest history in tokens, at most.
    pub longest_history: u32,
    /// History before the prompt chunk in tokens, at most.
    pub prefill_history: u32,
    /// The share of the way; slightly negative where measurements scatter.
    pub alpha: f64,
}

/// What the attention of a pass takes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MixedAttention {
    /// The measured points.
    pub points: Vec<MixedPoint>,
    /// The correction for uneven histories; none without cells.
    pub skew: Vec<SkewCell>,
}

const POINTS: &str = "mixed_attention.csv";
const SKEW: &str = "skew.csv";
const POINT_COLUMNS: &[&str] = &["prefill_tokens", "prefill_history", "decode_rows", "decode_history", "time_us"];
const SKEW_COLUMNS: &[&str] =
    &["prefill_tokens", "decode_rows", "long_share", "longest_history", "prefill_history", "alpha"];

impl MixedAttention {
    /// Reads the two files of a profile's folder; none if it has no `mixed_attention.csv`.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>> {
        if !folder.join(POINTS).exists() {
            return Ok(None);
        }
        let points = read_points(&folder.join(POINTS))?;
        let skew = if folder.join(SKEW).exists() { read_skew(&folder.join(SKEW))? } else { Vec::new() };
        Ok(Some(Self { points, skew }))
    }

    /// Writes what [`Self::read`] reads.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        write_rows(&folder.join(POINTS), POINT_COLUMNS, &self.points)?;
        match self.skew.is_empty() {
            true => Ok(()),
            false => write_rows(&folder.join(SKEW), SKEW_COLUMNS, &self.skew),
        }
    }
}

fn read_points(path: &Path) -> Result<Vec<MixedPoint>> {
    let mut table = Table::open(path, POINT_COLUMNS, Owner::Us)?;
    let mut points = Vec::new();
    while let Some(row) = table.next_row()? {
        let count = |column| row.number(column, "a whole number", |_: &u32| true);
        let time = |time: &f64| time.is_finite() && *time >= 0.0;
        points.push(MixedPoint {
            prefill_tokens: count(0)?,
            prefill_history: count(1)?,
            decode_rows: count(2)?,
            decode_history: count(3)?,
            time_us: row.number(4, "microseconds, at least 0", time)?,
        });
    }
    match points.iter().any(|point| point.prefill_tokens > 0) && points.iter().any(|point| point.prefill_tokens == 0) {
        true => Ok(points),
        false => Err(TraceError::file(path, "one kind of pass only", "rows with and rows without prefill_tokens")),
    }
}

fn read_skew(path: &Path) -> Result<Vec<SkewCell>> {
    let mut table = Table::open(path, SKEW_COLUMNS, Owner::Us)?;
    let mut cells = Vec::new();
    while let Some(row) = table.next_row()? {
        let count = |column| row.number(column, "a whole number", |_: &u32| true);
        cells.push(SkewCell {
            prefill_tokens: count(0)?,
            decode_rows: count(1)?,
            long_share: row.number(2, "a share, 0 to 1", |share: &f64| (0.0..=1.0).contains(share))?,
            longest_history: count(3)?,
            prefill_history: count(4)?,
            alpha: row.number(5, "a finite number", |alpha: &f64| alpha.is_finite())?,
        });
    }
    Ok(cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "prefill_tokens,prefill_history,decode_rows,decode_history,time_us\n\
        0,0,1,16,9.5\n16,0,0,0,11\n";

    #[test]
    fn what_is_written_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(MixedAttention::read(folder.path()).unwrap(), None);
        std::fs::write(folder.path().join(POINTS), TWO).unwrap();
        let mut mixed = MixedAttention::read(folder.path()).unwrap().unwrap();
        assert_eq!((mixed.points[0].time_us, mixed.skew.len()), (9.5, 0));
        mixed.skew.push(SkewCell {
            prefill_tokens: 0,
            decode_rows: 32,
            long_share: 0.05,
            longest_history: 1024,
            prefill_history: 0,
            alpha: -0.01,
        });
        mixed.write(folder.path()).unwrap();
        assert_eq!(MixedAttention::read(folder.path()).unwrap().unwrap(), mixed);
    }

    #[test]
    fn damaged_files_say_where() {
        let folder = tempfile::tempdir().unwrap();
        let read = |text: String| {
            std::fs::write(folder.path().join(POINTS), text).unwrap();
            MixedAttention::read(folder.path()).unwrap_err().to_string()
        };
        let error = read(TWO.replace("9.5", "-9.5"));
        assert!(error.contains("mixed_attention.csv:2: time_us: found `-9.5`"), "{error}");
        assert!(read(TWO.replace("16,0,0,0,11\n", "")).contains("one kind of pass only"));
        std::fs::write(folder.path().join(POINTS), TWO).unwrap();
        std::fs::write(folder.path().join(SKEW), format!("{}\n0,32,2,1024,0,0.1\n", SKEW_COLUMNS.join(","))).unwrap();
        let error = MixedAttention::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("skew.csv:2: long_share: found `2`, expected a share"), "{error}");
    }
}
