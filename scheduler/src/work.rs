//! Derives the work of a pass, the input of a latency model, from its rows.

use traces::{ChunkWork, PassBefore, PassWork};

use crate::pass::{RowKind, Segment};
use crate::policy::{Batching, ExitPolicy, KvFill, SignalReads};
use crate::reach::Reach;
use crate::scheduler::Settings;

/// Whether attention processes the rows of a segment together, as for a prompt chunk, rather than as a decode row.
#[inline]
pub(crate) fn is_chunk(segment: &Segment) -> bool {
    (segment.kind == RowKind::Prompt) | (segment.tokens > 1)
}

/// Derives and keeps the work of the current pass.
#[derive(Clone, Debug)]
pub(crate) struct WorkMeter {
    /// Depths to which exiting rows copy their keys and values where they skip them; see [`KvFill::copied_depths`].
    copied_depths: u8,
    /// The depth from which the last row of a prompt goes on alone.
    prefill_depth: u8,
    /// Copies that prompts leave in this pass, whether or not rows exit.
    prompt_fills: u32,
    /// Whether the exit head starts anew for rows that exit: not where it is known which ones do before the pass runs. The
    /// oracle knows.
    starts_anew: bool,
    /// What rows attend to; `None` where that is every token before them.
    reach: Option<Reach>,
    work: PassWork,
}

impl WorkMeter {
    pub fn new(settings: &Settings) -> Self {
        let &Settings { kv_fill, num_loops, max_batch, prefill_depth, async_scheduling, exit_wait, exit, .. } =
            settings;
        let is_known = matches!(exit, ExitPolicy::Oracle { .. }) || async_scheduling && exit.is_known_ahead();
        Self {
            copied_depths: settings.copied_depths(),
            prefill_depth: prefill_depth.unwrap_or(num_loops),
            prompt_fills: 0,
            starts_anew: exit_wait > 0 || !is_known,
            reach: (kv_fill == KvFill::Skip).then(|| Reach::new(num_loops, max_batch)),
            work: PassWork::default(),
        }
    }

    pub fn work(&self) -> &PassWork {
        &self.work
    }

    /// What rows attend to; `None` where that is every token before them.
    pub fn reach_mut(&mut self) -> Option<&mut Reach> {
        self.reach.as_mut()
    }

    /// Replaces the previous pass by the one that is about to run.
    pub fn start(&mut self, segments: &[Segment], reads: SignalReads) {
        self.derive(segments, reads, self.work.as_before());
    }

    /// Replaces the pass that is about to run by one of other rows.
    pub fn restart(&mut self, segments: &[Segment], reads: SignalReads) {
        self.derive(segments, reads, self.work.before);
    }

    fn derive(&mut self, segments: &[Segment], reads: SignalReads, before: PassBefore) {
        let head_rows = |segment: &Segment| u32::from(reads.run_head_without_drafts(segment));
        let with_drafts = |segment: &Segment| reads.head_rows(segment);
        let all_before = |segment: &Segment| segment.start;
        let read_apart = reads.read_apart();
        let signal_rows = |segment: &Segment| u32::from(read_apart & reads.read_signal(segment));
        let work = &mut self.work;
        match (&self.reach, reads.has_drafts()) {
            (None, false) => derive_work(work, segments, before, head_rows, signal_rows, all_before),
            (None, true) => derive_work(work, segments, before, with_drafts, signal_rows, all_before),
            (Some(reach), _) => {
                derive_work(work, segments, before, with_drafts, signal_rows, |row| reach.history(row));
            }
        }
    }

    /// Adds the copies that prompts leave at the end of their last depth.
    pub fn fill_prompts(&mut self, copies: u32) {
        self.prompt_fills = copies;
    }

    /// Adds the work of the pass's exits: of the segments whose last rows exit.
    pub fn exit<'a>(&mut self, exited: impl Iterator<Item = &'a Segment> + Clone, reads: SignalReads) {
        let (mut head_rows, mut filled_depths) = (0, self.prompt_fills);
        for segment in exited.clone() {
            // A row that exits with a draft may exit, and others exit at the last depth.
            head_rows += u32::from(!reads.run_head_without_drafts(segment));
            filled_depths += segment.skipped_depths(self.copied_depths, segment.depth >= self.prefill_depth);
        }
        self.work.exit_head_rows = head_rows;
        self.work.decided_rows = if self.starts_anew { head_rows } else { 0 };
        self.work.filled_depths = filled_depths;
        if let Some(reach) = &mut self.reach {
            exited.for_each(|segment| reach.exit(segment));
        }
    }
}

/// The work of a pass that no scheduler composed, such as a profiler's, where every row attends to all tokens before it,
/// and exits copy their keys and values and are decided after the pass. `exiting` are the indices of the segments whose
/// last rows exit.
pub fn pass_work(
    segments: &[Segment],
    exiting: &[u32],
    reads: SignalReads,
    num_loops: u8,
    before: PassBefore,
) -> PassWork {
    let oracle = ExitPolicy::Oracle { charged: false, recorded: false };
    let mut meter = WorkMeter::new(&Settings::new(Batching::Depth, oracle, num_loops));
    meter.starts_anew = true;
    meter.derive(segments, reads, before);
    meter.exit(exiting.iter().map(|&index| &segments[index as usize]), reads);
    meter.work
}

/// Derives the work of a pass whose exits are not decided yet. `head_rows` returns the number of rows of a segment for which
/// the head runs within the pass, `signal_rows` that of rows whose signal takes more than the head, `history` the number of
/// tokens that a segment attends to before its own.
///
/// The function runs for every row, so only chunks take a branch.
#[inline]
fn derive_work(
    work: &mut PassWork,
    segments: &[Segment],
    before: PassBefore,
    head_rows: impl Fn(&Segment) -> u32,
    signal_rows: impl Fn(&Segment) -> u32,
    history: impl Fn(&Segment) -> u32,
) {
    let mut chunks = std::mem::take(&mut work.chunks);
    chunks.clear();
    let mut found = PassWork { before, ..PassWork::default() };
    let mut depths = 0u64;
    // In whole numbers, whose sum the next row does not wait for as long as for that of floating-point ones.
    let mut squared_history = 0u128;
    for segment in segments {
        let (tokens, decodes) = (segment.tokens, !is_chunk(segment));
        let history = if decodes { history(segment) } else { 0 };
        found.rows += tokens;
        found.decode_rows += u32::from(decodes);
        found.decode_history += u64::from(history);
        squared_history += u128::from(u64::from(history) * u64::from(history));
        found.longest_decode_history = found.longest_decode_history.max(history);
        found.embed_rows += if segment.depth == 0 { tokens } else { 0 };
        found.head_rows += head_rows(segment);
        found.signal_rows += signal_rows(segment);
        depths |= 1 << segment.depth;
    }
    found.squared_decode_history = squared_history as f64;
    found.depths = depths.count_ones();
    if found.decode_rows < found.rows {
        let of_pass = segments.iter().filter(|segment| is_chunk(segment));
        chunks.extend(of_pass.map(|chunk| ChunkWork { tokens: chunk.tokens, history: history(chunk) }));
    }
    found.chunks = chunks;
    *work = found;
}
