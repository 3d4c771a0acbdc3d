//! Drafts of a policy that [speculates](crate::ExitPolicy::Speculate): how they are kept, confirmed and taken back.
//!
//! ```text
//! position        4    5    6    7
//! depth 0         d    d    d    v      rows 4 to 6 exited with drafts of tokens 5 to 7; row 7 verifies
//! depth 1         b    b    b    v      it takes their skipped depths with it, as under backfill
//! depth 2, last   =    !    x    x      full depth confirms token 5 and contradicts token 6:
//!                                       token 6 is what row 5 predicts here, rows 6 and 7 are taken back
//! ```

use traces::Nanos;

use super::{Held, Scheduler, Sequence};
use crate::observe::{Observer, Verified};
use crate::pass::{RowKind, Slot, exited};
use crate::policy::ExitPolicy;
use crate::speculation::DraftLimit;

/// What a held token is; see [`Held`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exited {
    /// The next token of its sequence, to be delivered.
    Token,
    /// A draft of the next token.
    Draft,
    /// A draft that full depth has confirmed, to be delivered. It is the oldest of its sequence.
    Confirmed,
    /// What full depth predicts in place of a draft that it contradicts, to be delivered. It is the oldest of its sequence.
    Corrected,
}

/// What full depth says of the drafts that a segment of the pass left.
#[derive(Clone, Copy, Debug)]
struct Verdict {
    slot: Slot,
    /// Drafts up to the first that is contradicted.
    accepted: u32,
    /// Positions up to the row that predicts the token in place of the contradicted draft; `None` without one.
    kept: Option<u32>,
}

/// State of a scheduler whose policy speculates.
#[derive(Clone, Debug)]
pub(super) struct Drafts {
    limit: DraftLimit,
    /// Most drafts of a sequence at the load of the current plan.
    most: u32,
    /// Whether every row that starts in the iteration verifies, since the iteration runs every depth in any case.
    all_verify: bool,
    /// Of the current pass.
    verdicts: Vec<Verdict>,
}

impl Drafts {
    /// `None` if the policy does not speculate.
    pub fn new(exit: ExitPolicy) -> Option<Self> {
        match exit {
            ExitPolicy::Speculate(speculation) => {
                Some(Self { limit: speculation.drafts, most: 0, all_verify: false, verdicts: Vec::new() })
            }
            _ => None,
        }
    }
}

impl Sequence {
    /// Whether the next row must run every depth: the sequence has as many drafts as it may have, or the row predicts the last
    /// token.
    fn must_verify(&self, most_drafts: u32) -> bool {
        self.drafted >= most_drafts || self.generated + self.drafted + 1 == self.request.output_tokens
    }
}

impl Scheduler {
    /// Decides how many drafts sequences may have now, and whether all rows that start verify. In lockstep batching they do if the
    /// row of one sequence must, or a prompt runs: the passes at all depths are then needed, and a row that exits early saves
    /// none.
    pub(super) fn plan_drafts(&mut self, ready: &[Slot]) {
        let load = self.num_running() + self.num_waiting();
        let Some(drafts) = &mut self.drafts else { return };
        drafts.most = drafts.limit.at(load);
        if self.settings.batching.is_lockstep() {
            let fits = |next: &Sequence| self.tables.blocks_for(next.context) <= self.tables.num_free();
            let admits = !self.free_slots.is_empty() && self.waiting.front().is_some_and(fits);
            let must_verify = |&slot: &Slot| self.sequences[slot as usize].must_verify(drafts.most);
            drafts.all_verify = admits || !self.prefilling.is_empty() || ready.iter().any(must_verify);
        }
    }

    /// The kind of the next row of a sequence.
    pub(super) fn kind_of_next_row(&self, slot: Slot) -> RowKind {
        match &self.drafts {
            Some(drafts) if drafts.all_verify || self.sequences[slot as usize].must_verify(drafts.most) => {
                RowKind::Verify
            }
            _ => RowKind::Decode,
        }
    }

    /// Reads which drafts the pass has confirmed. No row of a sequence with a contradicted draft exits.
    pub(super) fn read_verdicts(&mut self, signals: &[f32]) {
        let Some(drafts) = &mut self.drafts else { return };
        drafts.verdicts.clear();
        let reads = self.reads;
        for (segment, &signal) in self.segments.iter().zip(signals).filter(|(segment, _)| reads.verifies(segment)) {
            let accepted = (signal as u32).min(segment.tokens);
            let kept = (accepted < segment.tokens).then_some(segment.start + accepted + 1);
            drafts.verdicts.push(Verdict { slot: segment.slot, accepted, kept });
        }
        let Self { segments, exiting, exit_wait, .. } = self;
        for verdict in drafts.verdicts.iter().filter(|verdict| verdict.kept.is_some()) {
            exit_wait.withdraw(verdict.slot);
            exiting.retain(|&index| exited(segments, exit_wait.late(), index as usize).slot != verdict.slot);
        }
    }

    /// Delivers confirmed drafts and what replaces contradicted ones, and takes back what follows these, except the rows of
    /// the pass; [`drop_contradicted`](Self::drop_contradicted) does that.
    pub(super) fn settle_drafts(&mut self, now: Nanos, observer: &mut impl Observer) {
        let Some(drafts) = &mut self.drafts else { return };
        let deepest = self.settings.num_loops - 1;
        let verdicts = std::mem::take(&mut drafts.verdicts);
        for &Verdict { slot, accepted, kept } in &verdicts {
            let mut verified = Verified { accepted, ..Verified::default() };
            if let (Some(kept), Some(backlog)) = (kept, &mut self.backlog) {
                // Before a delivery makes complete blocks available to other requests.
                verified.wasted_rows = backlog.take_back(slot, kept);
            }
            for _ in 0..accepted {
                self.exit(Held { slot, depth: deepest, exited: Exited::Confirmed }, now, observer);
            }
            if let Some(kept) = kept {
                (verified.rejected, verified.dropped) = (1, self.take_back_drafts(slot, kept));
                self.exit(Held { slot, depth: deepest, exited: Exited::Corrected }, now, observer);
            }
            observer.verified(now, &self.sequences[slot as usize].request, verified);
        }
        if let Some(drafts) = &mut self.drafts {
            drafts.verdicts = verdicts;
        }
    }

    /// Takes back all drafts of a sequence that are not confirmed, the first of which full depth contradicts, and its rows
    /// behind the first `kept` positions. Returns how many drafts follow the first.
    fn take_back_drafts(&mut self, slot: Slot, kept: u32) -> u32 {
        let held = |exited: Exited| self.held.iter().filter(|held| held.slot == slot && held.exited == exited).count();
        let (new, confirmed) = (held(Exited::Draft) as u32, held(Exited::Confirmed) as u32);
        let sequence = &mut self.sequences[slot as usize];
        let dropped = sequence.drafted + new - confirmed - 1;
        sequence.drafted = confirmed;
        self.held.retain(|held| held.slot != slot || held.exited != Exited::Draft);
        self.stalled.retain(|segment| segment.slot != slot);
        self.ready.retain(|&other| other != slot);
        self.tables.shrink(slot, kept);
        dropped
    }

    /// Drops the rows of the pass that follow contradicted drafts.
    pub(super) fn drop_contradicted(&mut self) {
        let Some(drafts) = &self.drafts else { return };
        for verdict in drafts.verdicts.iter().filter(|verdict| verdict.kept.is_some()) {
            self.segments.retain(|segment| segment.slot != verdict.slot);
        }
    }

    /// Keeps a draft, on which the next row of its sequence goes on.
    pub(super) fn keep_draft(&mut self, slot: Slot) {
        self.sequences[slot as usize].drafted += 1;
        self.ready.push(slot);
    }
}
