//! Attention of whole passes, measured for prompt chunks and decode rows together, and for uneven histories.
//!
//! Where one kernel call serves prompt chunks and decode rows, they share the device, so the time of the call is not a
//! sum of two. The profile then has `mixed_attention.csv` in place of the attention components of `latency.csv`, and
//! optionally `skew.csv`.

use std::path::Path;

use serde::Serialize;

use crate::error::{Result, TraceError};
use crate::table::{Owner, Row, Table, write_rows};

/// Time of attention for prompt tokens and decode rows of one history, over all layers of the block.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MixedPoint {
    /// Prompt tokens; 0 for decode rows only.
    pub prefill_tokens: u32,
    /// Context of the prompt tokens, in the unit of [`MixedAttention::prefill_axis`].
    pub prefill_context: f64,
    /// Decode rows; 0 for prompt tokens only.
    pub decode_rows: u32,
    /// History of each decode row, in tokens.
    pub decode_history: u32,
    /// Time in microseconds.
    pub time_us: f64,
}

/// The unit in which the context of the prompt tokens of a pass is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PrefillAxis {
    /// The history before the one chunk of a pass, in tokens.
    #[default]
    History,
    /// Mean number of keys that a prompt token attends to, over the tokens of all chunks: the history before its chunk
    /// plus half the chunk. A point with fewer keys than half its tokens was measured with several chunks.
    Keys,
}

/// How far uneven histories of decode rows move the time of attention from that at their mean history (0) to that at
/// the longest (1).
///
/// A cell applies to passes up to its bounds and above those of the next smaller cell. Bounds are compared in the order
/// of the fields. A bound without limit is infinite, or the largest number of its type.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SkewCell {
    /// Upper bound of prompt tokens.
    pub prefill_tokens: u32,
    /// Upper bound of the time at the longest history over that at the mean history, less 1.
    pub lever: f64,
    /// Upper bound of decode rows.
    pub decode_rows: u32,
    /// Upper bound of the share of rows with the longer of two histories.
    pub long_share: f64,
    /// Upper bound of the longest history, in tokens.
    pub longest_history: u32,
    /// Upper bound of the mean history before the prompt chunks, in tokens.
    pub prefill_history: u32,
    /// Position between the two times; slightly negative where measurements scatter.
    pub alpha: f64,
}

/// Measured attention times of whole passes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MixedAttention {
    /// Unit of [`MixedPoint::prefill_context`].
    pub prefill_axis: PrefillAxis,
    /// The measured points.
    pub points: Vec<MixedPoint>,
    /// Correction for uneven histories; no correction without cells.
    pub skew: Vec<SkewCell>,
}

const POINTS: &str = "mixed_attention.csv";
const SKEW: &str = "skew.csv";
const SKEW_COLUMNS: &[&str] =
    &["prefill_tokens", "lever", "decode_rows", "long_share", "longest_history", "prefill_history", "alpha"];

impl PrefillAxis {
    /// The columns of `mixed_attention.csv`.
    fn columns(self) -> &'static [&'static str] {
        match self {
            Self::History => &["prefill_tokens", "prefill_history", "decode_rows", "decode_history", "time_us"],
            Self::Keys => &["prefill_tokens", "prefill_keys", "decode_rows", "decode_history", "time_us"],
        }
    }
}

impl MixedAttention {
    /// Reads the two files of a profile's folder; `None` without `mixed_attention.csv`.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(POINTS);
        if !path.exists() {
            return Ok(None);
        }
        let (prefill_axis, mut table) = match Table::open(&path, PrefillAxis::Keys.columns(), Owner::Us) {
            Ok(table) => (PrefillAxis::Keys, table),
            Err(_) => (PrefillAxis::History, Table::open(&path, PrefillAxis::History.columns(), Owner::Us)?),
        };
        let mut points = Vec::new();
        while let Some(row) = table.next_row()? {
            points.push(read_point(&row)?);
        }
        let prompts = points.iter().filter(|point| point.prefill_tokens > 0).count();
        if prompts == 0 || prompts == points.len() {
            return Err(TraceError::file(&path, "one kind of pass only", "rows with and rows without prefill_tokens"));
        }
        let skew = if folder.join(SKEW).exists() { read_skew(&folder.join(SKEW))? } else { Vec::new() };
        Ok(Some(Self { prefill_axis, points, skew }))
    }

    /// Writes the files that [`Self::read`] reads, and removes those of an earlier profile that this one lacks.
    pub(crate) fn write(mixed: Option<&Self>, folder: &Path) -> Result<()> {
        match mixed {
            Some(mixed) => write_rows(&folder.join(POINTS), mixed.prefill_axis.columns(), &mixed.points)?,
            None => remove(&folder.join(POINTS))?,
        }
        match mixed.filter(|mixed| !mixed.skew.is_empty()) {
            Some(mixed) => write_rows(&folder.join(SKEW), SKEW_COLUMNS, &mixed.skew),
            None => remove(&folder.join(SKEW)),
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(TraceError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

fn read_point(row: &Row<'_>) -> Result<MixedPoint> {
    let count = |column| row.number(column, "a whole number", |_: &u32| true);
    let finite = |column, expected| row.number(column, expected, |value: &f64| value.is_finite() && *value >= 0.0);
    Ok(MixedPoint {
        prefill_tokens: count(0)?,
        prefill_context: finite(1, "tokens, at least 0")?,
        decode_rows: count(2)?,
        decode_history: count(3)?,
        time_us: finite(4, "microseconds, at least 0")?,
    })
}

fn read_skew(path: &Path) -> Result<Vec<SkewCell>> {
    let mut table = Table::open(path, SKEW_COLUMNS, Owner::Us)?;
    let mut cells = Vec::new();
    while let Some(row) = table.next_row()? {
        let count = |column| row.number(column, "a whole number", |_: &u32| true);
        cells.push(SkewCell {
            prefill_tokens: count(0)?,
            lever: row.number(1, "a number of at least 0", |lever: &f64| *lever >= 0.0)?,
            decode_rows: count(2)?,
            long_share: row.number(3, "a share, 0 to 1", |share: &f64| (0.0..=1.0).contains(share))?,
            longest_history: count(4)?,
            prefill_history: count(5)?,
            alpha: row.number(6, "a finite number", |alpha: &f64| alpha.is_finite())?,
        });
    }
    Ok(cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "prefill_tokens,prefill_history,decode_rows,decode_history,time_us\n\
        0,0.0,1,16,9.5\n16,0.0,0,0,11.0\n";

    fn cell() -> SkewCell {
        SkewCell {
            prefill_tokens: 0,
            lever: f64::INFINITY,
            decode_rows: 32,
            long_share: 0.05,
            longest_history: 1024,
            prefill_history: u32::MAX,
            alpha: -0.01,
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(MixedAttention::read(folder.path()).unwrap(), None);
        for text in [TWO.to_owned(), TWO.replace("prefill_history", "prefill_keys")] {
            std::fs::write(folder.path().join(POINTS), &text).unwrap();
            let mut mixed = MixedAttention::read(folder.path()).unwrap().unwrap();
            assert_eq!(mixed.prefill_axis == PrefillAxis::Keys, text.contains("keys"));
            assert_eq!(mixed.points[0].time_us, 9.5);
            mixed.skew = vec![cell()];
            MixedAttention::write(Some(&mixed), folder.path()).unwrap();
            assert_eq!(std::fs::read_to_string(folder.path().join(POINTS)).unwrap(), text);
            assert_eq!(MixedAttention::read(folder.path()).unwrap().unwrap(), mixed);
        }
    }

    #[test]
    fn nothing_stays_of_a_profile_that_was_there_before() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(POINTS), TWO).unwrap();
        let uncorrected = MixedAttention::read(folder.path()).unwrap().unwrap();
        let corrected = MixedAttention { skew: vec![cell()], ..uncorrected.clone() };
        MixedAttention::write(Some(&corrected), folder.path()).unwrap();
        MixedAttention::write(Some(&uncorrected), folder.path()).unwrap();
        assert_eq!(MixedAttention::read(folder.path()).unwrap(), Some(uncorrected));
        MixedAttention::write(None, folder.path()).unwrap();
        assert_eq!(MixedAttention::read(folder.path()).unwrap(), None);
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
        assert!(read(TWO.replace("16,0.0,0,0,11.0\n", "")).contains("one kind of pass only"));
        assert!(read(TWO.replace("decode_rows", "rows")).contains("expected columns `prefill_tokens,prefill_history,"));
        std::fs::write(folder.path().join(POINTS), TWO).unwrap();
        let mut mixed = MixedAttention::read(folder.path()).unwrap().unwrap();
        mixed.skew = vec![SkewCell { long_share: 2.0, ..cell() }];
        MixedAttention::write(Some(&mixed), folder.path()).unwrap();
        let error = MixedAttention::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("skew.csv:2: long_share: found `2.0`, expected a share"), "{error}");
    }
}
