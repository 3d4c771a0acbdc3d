//! The work of a pass: every feature that its time depends on.

/// Every feature that the time of a pass depends on.
///
/// The scheduler derives the work from the rows of a pass, for every executor. A latency model turns the work into a
/// time. A [pass log](crate::pass_log) stores the work with the measured time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PassWork {
    /// Number of rows.
    pub rows: u32,
    /// Rows whose attention runs row by row: decode rows, and single rows of backfill.
    pub decode_rows: u32,
    /// Sum of the histories of the decode rows: the tokens before each row that it attends to, at its own depth.
    pub decode_history: u64,
    /// Sum of the squared histories of the decode rows.
    pub squared_decode_history: f64,
    /// Longest history of the decode rows.
    pub longest_decode_history: u32,
    /// Rows whose attention runs together: chunks of prompts and of backfill.
    pub chunks: Vec<ChunkWork>,
    /// Number of distinct depths among the rows.
    pub depths: u32,
    /// Rows at depth 0, which are embedded.
    pub embed_rows: u32,
    /// Rows for which the exit head runs within the pass.
    pub head_rows: u32,
    /// Rows for which the exit head runs after the exits are decided.
    pub exit_head_rows: u32,
    /// Rows whose exit signal is read within the pass, where that takes more than the head: a gate, or a comparison with the
    /// state one depth earlier.
    pub signal_rows: u32,
    /// Of `exit_head_rows`, those whose exits are not known before the pass has run, so that the head starts anew for them.
    pub decided_rows: u32,
    /// Number of copies of keys and values to skipped depths, over all exiting rows.
    pub filled_depths: u32,
    /// The previous pass on the same machine.
    pub before: PassBefore,
}

/// A chunk of a pass: consecutive tokens of one sequence at one depth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkWork {
    /// Number of tokens, each of which is a row.
    pub tokens: u32,
    /// Number of earlier tokens that it attends to, at its own depth.
    pub history: u32,
}

/// Features of the previous pass that the time of a pass depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassBefore {
    /// Number of rows; 0 before the first pass of a machine.
    pub rows: u32,
    /// Whether the pass ran the exit head.
    pub head: bool,
}

impl PassWork {
    /// Whether the exit head ran in the previous pass or within this one, so that its weights may still be in a cache
    /// when it runs for exiting rows.
    #[inline]
    pub fn head_is_warm(&self) -> bool {
        self.before.head || self.head_rows > 0
    }

    /// The features of this pass that the next one depends on.
    #[inline]
    pub fn as_before(&self) -> PassBefore {
        PassBefore { rows: self.rows, head: self.head_rows + self.exit_head_rows > 0 }
    }

    /// Mean history of the decode rows, in tokens; 0 without any.
    #[inline]
    pub fn mean_decode_history(&self) -> f64 {
        if self.decode_rows == 0 { 0.0 } else { self.decode_history as f64 / f64::from(self.decode_rows) }
    }
}
