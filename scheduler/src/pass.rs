//! A pass: the rows that run through the block together.

use traces::PassWork;

use crate::blocks::{BlockId, BlockTables};
use crate::policy::SignalReads;

/// Index of a running sequence, from 0 to `max_batch - 1`; reused when the sequence ends.
pub type Slot = u32;

/// Purpose of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowKind {
    /// The next token of a sequence.
    Decode,
    /// A token of a prompt, or of a context that is computed again after a preemption.
    Prompt,
    /// Keys and values that an exited token lacks at the depths it skipped; see
    /// [`KvFill::Backfill`](crate::KvFill::Backfill). The token after it is already known, so its output is not read, unless
    /// that token is a draft and this is the last depth.
    Backfill,
    /// The next token of a sequence under a policy that [speculates](crate::ExitPolicy::Speculate), where the row must run
    /// every depth: drafts before it are verified with it.
    Verify,
}

/// Consecutive tokens of one sequence at one depth: a decode row, a chunk of a prompt, or a chunk of backfill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The sequence's slot.
    pub slot: Slot,
    /// Position of the first token in the sequence, which is also the number of tokens before it.
    pub start: u32,
    /// Number of tokens, each of which is a row; 1 for a decode row.
    pub tokens: u32,
    /// The depth at which the rows run in this pass, from 0.
    pub depth: u8,
    /// Purpose of the rows.
    pub kind: RowKind,
    /// Whether the pass yields the next token's distribution: true for decode rows and for the chunk
    /// that ends a prompt, until that token has exited.
    pub predicts: bool,
    /// Whether the token of the last row was generated, rather than part of the prompt. A generated token skips the depths
    /// below its exit, also when its context is computed again; a token of a prompt skips those below
    /// its [prompt depth](crate::Settings::prompt_depth).
    pub generated: bool,
}

impl Segment {
    /// The last row alone.
    #[inline]
    pub fn last_row(self) -> Self {
        Self { start: self.start + self.tokens - 1, tokens: 1, ..self }
    }

    /// Number of the first `depths` depths that the last row skips if it exits at this depth. `prompts_end` says whether
    /// it also skips them as the last of a prompt.
    #[inline]
    pub(crate) fn skipped_depths(&self, depths: u8, prompts_end: bool) -> u32 {
        let skips = self.generated | prompts_end;
        if skips { u32::from(depths.saturating_sub(self.depth + 1)) } else { 0 }
    }
}

/// See [`Pass::exited`].
#[inline]
pub(crate) fn exited<'a>(segments: &'a [Segment], late: &'a [Segment], index: usize) -> &'a Segment {
    match segments.get(index) {
        Some(segment) => segment,
        None => &late[index - segments.len()],
    }
}

/// The rows that an executor runs together.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// The segments, in no particular order of depth.
    pub segments: &'a [Segment],
    /// Decode rows of earlier passes that have exited and have waited for the exit head, which runs for them after this
    /// pass; see [`Settings::exit_wait`](crate::Settings::exit_wait). Known once the exits are decided.
    pub late: &'a [Segment],
    /// What to report of rows that predict a token.
    pub reads: SignalReads,
    /// The KV blocks of each slot.
    pub tables: &'a BlockTables,
    /// The work that determines the time of the pass. Work of exits is added once they are decided; see
    /// [`Executor::emit`](crate::Executor::emit).
    pub work: &'a PassWork,
}

impl<'a> Pass<'a> {
    /// A pass whose exits are not decided yet.
    pub fn new(segments: &'a [Segment], reads: SignalReads, tables: &'a BlockTables, work: &'a PassWork) -> Self {
        Self { segments, late: &[], reads, tables, work }
    }

    /// The blocks of a sequence, in order of position. A block holds its positions at every depth.
    pub fn blocks(&self, slot: Slot) -> &'a [BlockId] {
        self.tables.blocks(slot)
    }

    /// Whether the executor must report the exit signal of a segment's last row.
    #[inline]
    pub fn reads_signal(&self, segment: &Segment) -> bool {
        self.reads.read_signal(segment)
    }

    /// Whether the rows of a segment have left drafts, and the pass says how many of them full depth confirms.
    #[inline]
    pub fn verifies(&self, segment: &Segment) -> bool {
        self.reads.verifies(segment)
    }

    /// Whether the exit head runs for a segment's last row within the pass, whether or not that row exits.
    #[inline]
    pub fn runs_head(&self, segment: &Segment) -> bool {
        self.reads.run_head(segment)
    }

    /// The segment of an entry of a list of exiting rows: one of this pass, or, by indices above those, one of
    /// [`late`](Self::late).
    #[inline]
    pub fn exited(&self, index: usize) -> &'a Segment {
        exited(self.segments, self.late, index)
    }

    /// Whether anything is left to do after the pass, of which the segments in `exiting` exit: tokens to sample, or keys and
    /// values to copy, also those of prompts that [end early](crate::Settings::prefill_depth).
    #[inline]
    pub fn emits(&self, exiting: &[u32]) -> bool {
        !exiting.is_empty() || self.work.filled_depths > 0
    }

    /// Number of rows of all segments.
    pub fn num_rows(&self) -> u32 {
        self.segments.iter().map(|segment| segment.tokens).sum()
    }
}
