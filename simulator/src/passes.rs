//! The passes of a run one by one, to be compared with what a profile says of each.

use scheduler::{KvFill, Observer, PassRecord, RowKind, Settings};
use traces::Nanos;

use crate::attention::is_chunk;
use crate::latency::{Extrapolations, LatencyModel, PassBefore, PassShape};

/// What the time of a pass depends on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PassWork {
    /// Its rows.
    pub shape: PassShape,
    /// Tokens and history of each prompt chunk, and of each chunk of backfill.
    pub chunks: Vec<(u32, u32)>,
    /// Rows for which the exit head ran once it was decided that they leave.
    pub head_rows_leaving: u32,
    /// Depths that keys and values were copied to for rows that skip them, counted over all rows.
    pub filled_depths: u32,
}

/// A pass that ran.
#[derive(Clone, Debug, PartialEq)]
pub struct LoggedPass {
    /// When it started.
    pub start: Nanos,
    /// How long the executor says that it took.
    pub elapsed: Nanos,
    /// What it took that long for.
    pub work: PassWork,
}

/// Watches one machine and keeps what the time of every pass depends on. Rows are taken to attend to every token before
/// them, which those of [`KvFill::Skip`] do not.
#[derive(Clone, Debug)]
pub struct PassLog {
    num_loops: u8,
    copies: bool,
    passes: Vec<LoggedPass>,
    before: PassBefore,
}

impl PassLog {
    /// Nothing was seen yet of a run under `settings`.
    pub fn new(settings: &Settings) -> Self {
        let copies = settings.kv_fill == KvFill::Reuse;
        Self { num_loops: settings.num_loops, copies, passes: Vec::new(), before: PassBefore::default() }
    }

    /// What the passes were, in their order.
    pub fn into_works(self) -> Vec<PassWork> {
        self.passes.into_iter().map(|pass| pass.work).collect()
    }

    /// The passes, in their order.
    pub fn passes(&self) -> &[LoggedPass] {
        &self.passes
    }
}

impl Observer for PassLog {
    fn pass(&mut self, record: &PassRecord<'_>) {
        let pass = &record.pass;
        let chunks = pass.segments.iter().filter(|segment| is_chunk(segment));
        let mut work = PassWork {
            shape: PassShape { before: self.before, ..PassShape::of(pass, |segment| segment.start) },
            chunks: chunks.map(|segment| (segment.tokens, segment.start)).collect(),
            ..PassWork::default()
        };
        for segment in record.leaving.iter().map(|&index| &pass.segments[index as usize]) {
            work.head_rows_leaving += u32::from(!pass.runs_head(segment));
            if self.copies && segment.kind == RowKind::Decode {
                work.filled_depths += u32::from(self.num_loops - 1 - segment.depth);
            }
        }
        let head = work.shape.head_rows + work.head_rows_leaving > 0;
        self.before = PassBefore { rows: work.shape.rows, head };
        self.passes.push(LoggedPass { start: record.start, elapsed: record.elapsed, work });
    }
}

impl LatencyModel {
    /// What an executor takes for a pass, in nanoseconds.
    pub fn pass_ns(&self, work: &PassWork) -> f64 {
        let beyond = &mut Extrapolations::default();
        let chunks = self.prefills_ns(work.chunks.iter().copied(), beyond);
        let parts = self.parts_ns(&work.shape, beyond).iter().sum::<f64>();
        let head = self.head_ns(work.head_rows_leaving, work.shape.has_head_at_hand(), beyond);
        parts + chunks + head + self.kv_fill_ns(work.filled_depths, beyond)
    }
}
