//! The work of a pass: everything that its time depends on, as features.

/// Everything that the time of a pass depends on.
///
/// The scheduler derives it from the rows of a pass, for every executor alike; a latency model turns it into a time; a
/// [pass log](crate::pass_log) keeps it beside the time that was measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PassWork {
    /// All rows.
    pub rows: u32,
    /// Rows whose attention runs row by row: decode rows, and single rows of backfill.
    pub decode_rows: u32,
    /// Sum of the histories of the decode rows: tokens that each attends to before itself, at its own depth.
    pub decode_history: u64,
    /// Sum of the squares of these histories.
    pub squared_decode_history: f64,
    /// The longest of these histories.
    pub longest_decode_history: u32,
    /// Rows whose attention runs together: chunks of prompts, and of backfill.
    pub chunks: Vec<ChunkWork>,
    /// Distinct depths among the rows.
    pub depths: u32,
    /// Rows at depth 0, which are embedded.
    pub embed_rows: u32,
    /// Rows for which the exit head runs within the pass.
    pub head_rows: u32,
    /// Rows for which the exit head runs once it is decided that they exit.
    pub exit_head_rows: u32,
    /// Depths to which exiting rows copy their keys and values, over all rows.
    pub filled_depths: u32,
    /// The pass before, on the same machine.
    pub before: PassBefore,
}

/// A chunk of a pass: consecutive tokens of one sequence at one depth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkWork {
    /// Its tokens, each a row.
    pub tokens: u32,
    /// Tokens before it that it attends to, at its own depth.
    pub history: u32,
}

/// What the time of a pass depends on in the pass before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassBefore {
    /// Its rows; 0 for the first pass of a machine.
    pub rows: u32,
    /// Whether it ran the exit head.
    pub head: bool,
}

impl PassWork {
    /// Whether the exit head ran in the pass before or within this one, so that its weights may still be in a cache when
    /// it runs for rows that exit.
    #[inline]
    pub fn head_is_warm(&self) -> bool {
        self.before.head || self.head_rows > 0
    }

    /// What the next pass finds of this one.
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
