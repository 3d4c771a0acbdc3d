//! A pass: the rows that share one run of the block.

use traces::PassWork;

use crate::blocks::{BlockId, BlockTables};
use crate::policy::SignalReads;

/// A place among the running sequences, from 0 to `max_batch - 1`; reused when its sequence ends.
pub type Slot = u32;

/// What rows run for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowKind {
    /// The next token of a sequence.
    Decode,
    /// A prompt, or a context that is computed again after a preemption.
    Prompt,
    /// Keys and values that tokens which left early did not leave behind; see
    /// [`KvFill::Backfill`](crate::KvFill::Backfill). Their tokens are known, so nothing is read of them.
    Backfill,
}

/// Consecutive tokens of one sequence at one depth: a decode row, a chunk of a prompt, or a chunk of backfill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The sequence's slot.
    pub slot: Slot,
    /// Position of the first token in the sequence, and so the history before it.
    pub start: u32,
    /// Tokens, each a row; 1 for a decode row.
    pub tokens: u32,
    /// The depth they run at in this pass, from 0.
    pub depth: u8,
    /// What they run for.
    pub kind: RowKind,
    /// Whether the pass yields the next token's distribution: true for decode rows and for the chunk
    /// that ends a prompt, until that token has exited.
    pub predicts: bool,
    /// Whether the token of the last row was generated, rather than given with the prompt. Prompts run every depth; a
    /// generated token skips the depths below its exit, in a context that is computed again as well.
    pub generated: bool,
}

impl Segment {
    /// The depths of a model with `num_loops` loops that the last row skips if it exits at this one.
    #[inline]
    pub fn skipped_depths(&self, num_loops: u8) -> u32 {
        if self.generated { u32::from(num_loops - 1 - self.depth) } else { 0 }
    }
}

/// What an executor gets to run.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// The segments, in no particular order of depth.
    pub segments: &'a [Segment],
    /// What to report of rows that predict.
    pub reads: SignalReads,
    /// Where the keys and values of each slot lie.
    pub tables: &'a BlockTables,
    /// What its time depends on. What exits take is known once they are decided, in [`Executor::emit`](crate::Executor::emit).
    pub work: &'a PassWork,
}

impl<'a> Pass<'a> {
    /// The blocks of a sequence, in order of position; each holds the same positions of every depth.
    pub fn blocks(&self, slot: Slot) -> &'a [BlockId] {
        self.tables.blocks(slot)
    }

    /// Whether the executor must report the exit signal of a segment's last row.
    #[inline]
    pub fn reads_signal(&self, segment: &Segment) -> bool {
        self.reads.read_signal(segment)
    }

    /// Whether the exit head runs for a segment's last row within the pass, whether that exits or not.
    #[inline]
    pub fn runs_head(&self, segment: &Segment) -> bool {
        self.reads.run_head(segment)
    }

    /// Rows of all segments.
    pub fn num_rows(&self) -> u32 {
        self.segments.iter().map(|segment| segment.tokens).sum()
    }
}
