//! Rows at each depth over time, in bounded memory.

use scheduler::{PassRecord, Segment};
use serde::{Deserialize, Serialize};

/// Rows of one pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassRows {
    /// Decode rows.
    pub decode: u32,
    /// Rows of prompt chunks.
    pub prefill: u32,
    /// Rows of backfill.
    pub backfill: u32,
    /// Bit `d` is set if a row runs at depth `d`.
    pub depths: u64,
}

impl PassRows {
    /// Rows of all kinds.
    pub fn total(self) -> u32 {
        self.decode + self.prefill + self.backfill
    }
}

/// Kinds of rows, in the order of [`RowKind`](scheduler::RowKind): decode, prompt, backfill, and those that verify drafts,
/// which are decode rows as well.
const KINDS: usize = 4;

/// Mean rows at each depth, in slices of time. The width of the slices doubles whenever the run has more than
/// [`SLICES`](Self::SLICES) of them.
#[derive(Clone, Debug)]
pub struct DepthRows {
    num_loops: usize,
    width_ns: u64,
    /// Rows times nanoseconds, by slice, depth and kind.
    row_time: Vec<[u64; KINDS]>,
    /// Scratch: rows of the current pass, by depth and kind.
    pass: Vec<[u64; KINDS]>,
    /// Scratch for every second row, so that counting a row does not wait for the previous one.
    others: Vec<[u64; KINDS]>,
}

/// One line of `depth_rows.csv`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct DepthRowsRecord {
    /// Start of the slice of time, in seconds.
    pub start_s: f64,
    /// Width of the slice, in seconds.
    pub width_s: f64,
    /// The depth, from 0.
    pub depth: u32,
    /// Decode rows at that depth: mean over the slice, idle time included.
    pub decode_rows: f64,
    /// Prompt rows at that depth: mean over the slice, idle time included.
    pub prefill_rows: f64,
    /// Rows of backfill at that depth: mean over the slice, idle time included.
    pub backfill_rows: f64,
}

impl DepthRows {
    /// Maximum number of slices.
    pub const SLICES: usize = 512;
    const FIRST_WIDTH_NS: u64 = 1 << 16;

    /// Counts for a model with `num_loops` loops.
    pub fn new(num_loops: u8) -> Self {
        let num_loops = usize::from(num_loops);
        let none = vec![[0; KINDS]; num_loops];
        Self { num_loops, width_ns: Self::FIRST_WIDTH_NS, row_time: Vec::new(), pass: none.clone(), others: none }
    }

    /// Counts the rows of a pass.
    pub(super) fn record(&mut self, record: &PassRecord<'_>) -> PassRows {
        let mut rows = PassRows::default();
        self.pass.fill([0; KINDS]);
        self.others.fill([0; KINDS]);
        let mut count = |counts: &mut [[u64; KINDS]], segment: &Segment| {
            counts[usize::from(segment.depth)][segment.kind as usize] += u64::from(segment.tokens);
            rows.depths |= 1 << segment.depth;
        };
        let mut pairs = record.pass.segments.chunks_exact(2);
        for pair in &mut pairs {
            count(&mut self.pass, &pair[0]);
            count(&mut self.others, &pair[1]);
        }
        pairs.remainder().iter().for_each(|segment| count(&mut self.pass, segment));
        self.pass.iter_mut().zip(&self.others).for_each(|(sum, others)| add(sum, others));
        for [decode, prefill, backfill, verify] in &mut self.pass {
            *decode += std::mem::take(verify);
            rows.decode += *decode as u32;
            rows.prefill += *prefill as u32;
            rows.backfill += *backfill as u32;
        }
        let start = record.start.0;
        self.add_pass(start, start + record.elapsed.0);
        rows
    }

    fn add_pass(&mut self, mut start: u64, end: u64) {
        while end > self.width_ns * Self::SLICES as u64 {
            self.double_width();
        }
        while start < end {
            let slice = (start / self.width_ns) as usize;
            let until = end.min((slice as u64 + 1) * self.width_ns);
            let first = slice * self.num_loops;
            if self.row_time.len() < first + self.num_loops {
                self.row_time.resize(first + self.num_loops, [0; KINDS]);
            }
            for (sum, rows) in self.row_time[first..].iter_mut().zip(&self.pass) {
                for (sum, rows) in sum.iter_mut().zip(rows) {
                    *sum += rows * (until - start);
                }
            }
            start = until;
        }
    }

    fn double_width(&mut self) {
        self.width_ns *= 2;
        let slices = self.row_time.len() / self.num_loops;
        for index in 0..self.row_time.len() {
            let (slice, depth) = (index / self.num_loops, index % self.num_loops);
            let sum = std::mem::take(&mut self.row_time[index]);
            let into = &mut self.row_time[slice / 2 * self.num_loops + depth];
            add(into, &sum);
        }
        self.row_time.truncate(slices.div_ceil(2) * self.num_loops);
    }

    /// Adds the rows of another machine on the same clock.
    pub(super) fn merge(&mut self, mut other: Self) {
        while self.width_ns < other.width_ns {
            self.double_width();
        }
        while other.width_ns < self.width_ns {
            other.double_width();
        }
        if self.row_time.len() < other.row_time.len() {
            self.row_time.resize(other.row_time.len(), [0; KINDS]);
        }
        for (sum, other) in self.row_time.iter_mut().zip(&other.row_time) {
            add(sum, other);
        }
    }

    /// The lines of `depth_rows.csv`: by slice, then by depth.
    pub fn records(&self) -> impl Iterator<Item = DepthRowsRecord> {
        self.row_time.iter().enumerate().map(|(index, &[decode, prefill, backfill, _])| DepthRowsRecord {
            start_s: ((index / self.num_loops) as u64 * self.width_ns) as f64 / 1e9,
            width_s: self.width_ns as f64 / 1e9,
            depth: (index % self.num_loops) as u32,
            decode_rows: decode as f64 / self.width_ns as f64,
            prefill_rows: prefill as f64 / self.width_ns as f64,
            backfill_rows: backfill as f64 / self.width_ns as f64,
        })
    }
}

fn add(sum: &mut [u64; KINDS], other: &[u64; KINDS]) {
    sum.iter_mut().zip(other).for_each(|(sum, other)| *sum += other);
}

#[cfg(test)]
mod tests {
    use super::*;
    use scheduler::blocks::BlockTables;
    use scheduler::{ExitPolicy, Pass, RowKind, Segment};
    use traces::{Nanos, PassWork};

    use RowKind::{Backfill, Decode, Prompt};

    fn record(rows: &mut DepthRows, start: u64, elapsed: u64, depths: &[(u8, u32, RowKind)]) -> PassRows {
        let segments: Vec<Segment> = depths
            .iter()
            .map(|&(depth, tokens, kind)| Segment {
                slot: 0,
                start: 0,
                tokens,
                depth,
                kind,
                predicts: false,
                generated: false,
            })
            .collect();
        let (tables, work) = (BlockTables::new(1, 1, 1), PassWork::default());
        let pass = Pass::new(&segments, ExitPolicy::None.signal_reads(2), &tables, &work);
        rows.record(&PassRecord {
            start: Nanos(start),
            elapsed: Nanos(elapsed),
            pass,
            exiting: &[],
            running: 1,
            waiting: 0,
            device: None,
        })
    }

    #[test]
    fn row_time_is_kept_however_long_the_run() {
        let mut rows = DepthRows::new(2);
        let pass_rows = [(0, 3, Decode), (1, 5, Prompt), (1, 1, Decode), (1, 2, Backfill)];
        for pass in 0..10_000u64 {
            let counted = record(&mut rows, pass * 1_000_000, 700_000, &pass_rows);
            assert_eq!(counted, PassRows { decode: 4, prefill: 5, backfill: 2, depths: 0b11 });
        }
        let expected = [[3.0 * 7.0, 0.0, 0.0], [7.0, 5.0 * 7.0, 2.0 * 7.0]];
        let mut found = [[0.0; 3]; 2];
        for record in rows.records() {
            found[record.depth as usize][0] += record.decode_rows * record.width_s;
            found[record.depth as usize][1] += record.prefill_rows * record.width_s;
            found[record.depth as usize][2] += record.backfill_rows * record.width_s;
        }
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found - expected).abs() < 1e-9, "{found} for {expected}");
        }
        assert!(rows.records().count() <= 2 * DepthRows::SLICES);
    }

    #[test]
    fn a_pass_counts_in_every_slice_it_touches() {
        let mut rows = DepthRows::new(1);
        record(&mut rows, DepthRows::FIRST_WIDTH_NS / 2, DepthRows::FIRST_WIDTH_NS, &[(0, 4, Decode)]);
        let decode: Vec<f64> = rows.records().map(|record| record.decode_rows).collect();
        assert_eq!(decode, [2.0, 2.0]);
    }

    #[test]
    fn two_machines_add_up() {
        let (mut short, mut long) = (DepthRows::new(1), DepthRows::new(1));
        record(&mut short, 0, 1000, &[(0, 2, Decode)]);
        record(&mut long, 0, 1_000_000_000, &[(0, 1, Decode)]);
        short.merge(long);
        let total: f64 = short.records().map(|record| record.decode_rows * record.width_s).sum();
        assert!((total - (2e-6 + 1.0)).abs() < 1e-9, "{total}");
    }
}
