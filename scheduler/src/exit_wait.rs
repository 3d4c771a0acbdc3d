//! Rows that have exited and wait for the exit head ([`Settings::exit_wait`]).
//!
//! ```text
//! exits after pass p ──waits in its slot──► head runs after pass p + 1 .. p + exit_wait, for all that wait ──► token
//! ```

use crate::pass::{RowKind, Segment, Slot};
use crate::policy::SignalReads;
use crate::scheduler::Settings;

/// A decode row that has exited and waits for the head.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    row: Segment,
    /// Index of its segment in the pass that it exited from, until that pass is over.
    index: Option<u32>,
    /// Passes since.
    passes: u32,
}

/// The rows that wait.
#[derive(Clone, Debug)]
pub(crate) struct ExitWait {
    most_passes: u32,
    /// Waiting rows for which the head runs.
    batch: usize,
    deepest: u8,
    waiting: Vec<Waiting>,
    /// Rows that the head serves after this pass.
    late: Vec<Segment>,
}

impl ExitWait {
    pub fn new(settings: &Settings) -> Self {
        let &Settings { exit_wait, exit_batch, num_loops, .. } = settings;
        Self {
            most_passes: exit_wait,
            batch: if exit_batch > 0 { exit_batch as usize } else { usize::MAX },
            deepest: num_loops - 1,
            waiting: Vec::new(),
            late: Vec::new(),
        }
    }

    /// Whether any row waits.
    pub fn any(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The rows of earlier passes that the head serves after this one.
    pub fn late(&self) -> &[Segment] {
        &self.late
    }

    /// The pass of the late rows is over.
    pub fn forget_late(&mut self) {
        self.late.clear();
    }

    /// A request loses its slot.
    pub fn withdraw(&mut self, slot: Slot) {
        self.waiting.retain(|waiting| waiting.row.slot != slot);
    }

    /// Decides whether the head runs after this pass. If so, the rows that wait become [`late`](Self::late), and their
    /// indices follow those of the exits of the pass. If not, the exits of the pass wait as well.
    ///
    /// The head runs if a row has waited for the most passes, if enough rows wait, if it runs for a row that does not wait, or
    /// if no row goes on: the next pass may be far away.
    /// `ends` says of a segment of a prompt that it runs its last depth.
    pub fn decide(
        &mut self,
        segments: &[Segment],
        exiting: &mut Vec<u32>,
        any_stalled: bool,
        reads: SignalReads,
        ends: impl Fn(&Segment) -> bool,
    ) {
        self.waiting.iter_mut().for_each(|waiting| waiting.passes += 1);
        let of_pass = exiting.iter().map(|&index| &segments[index as usize]);
        let runs_head = self.waiting.iter().any(|waiting| waiting.passes >= self.most_passes)
            || self.waiting.len() + exiting.len() >= self.batch
            || of_pass.clone().any(|segment| segment.kind == RowKind::Prompt || reads.run_head(segment))
            || !(any_stalled || self.any_goes_on(segments, exiting, ends));
        if runs_head {
            let first = segments.len() as u32;
            self.late.extend(self.waiting.drain(..).map(|waiting| waiting.row));
            exiting.extend(first..first + self.late.len() as u32);
        } else {
            let waiting = |index: u32| Waiting { row: segments[index as usize], index: Some(index), passes: 0 };
            self.waiting.extend(exiting.drain(..).map(waiting));
        }
    }

    /// Whether a row runs its next depth after this pass. `exiting` is in ascending order.
    fn any_goes_on(&self, segments: &[Segment], exiting: &[u32], ends: impl Fn(&Segment) -> bool) -> bool {
        let mut exits = exiting.iter().peekable();
        (0..).zip(segments).any(|(index, segment)| {
            let predicts = segment.predicts && exits.next_if_eq(&&index).is_none();
            let is_prompt = segment.kind == RowKind::Prompt && !ends(segment);
            segment.depth < self.deepest && (predicts || is_prompt)
        })
    }

    /// The pass is over: rows that began to wait after it run no further depth.
    pub fn stop(&mut self, segments: &mut [Segment]) {
        for index in self.waiting.iter_mut().filter_map(|waiting| waiting.index.take()) {
            segments[index as usize].predicts = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Batching, ExitPolicy};

    fn row(slot: Slot, depth: u8) -> Segment {
        Segment { slot, start: 5, tokens: 1, depth, kind: RowKind::Decode, predicts: true, generated: true }
    }

    fn exit_wait(most: u32) -> (ExitWait, SignalReads) {
        let settings = Settings { exit_wait: most, ..Settings::new(Batching::Depth, "gate:0.5".parse().unwrap(), 3) };
        (ExitWait::new(&settings), settings.signal_reads())
    }

    /// The slots of the rows that the head serves after a pass of these rows, of which some exit.
    fn served(exits: &mut (ExitWait, SignalReads), segments: &mut [Segment], mut exiting: Vec<u32>) -> Vec<Slot> {
        let (exits, reads) = exits;
        exits.forget_late();
        exits.decide(segments, &mut exiting, false, *reads, |_| false);
        let of = |&index: &u32| crate::pass::exited(segments, exits.late(), index as usize).slot;
        let slots = exiting.iter().map(of).collect();
        exits.stop(segments);
        slots
    }

    #[test]
    fn rows_wait_for_the_head_at_most_that_many_passes() {
        let mut exits = exit_wait(2);
        let mut pass = [row(1, 0), row(2, 1)];
        assert!(served(&mut exits, &mut pass, vec![1]).is_empty());
        assert!(pass[0].predicts && !pass[1].predicts, "a row that waits runs no further depth");
        assert!(served(&mut exits, &mut [row(1, 1), row(3, 0)], vec![]).is_empty());
        assert_eq!(served(&mut exits, &mut [row(1, 2), row(3, 1), row(4, 0)], vec![0, 1]), [1, 3, 2]);
        assert!(!exits.0.any());
        assert!(served(&mut exits, &mut [row(1, 0), row(5, 0)], vec![0]).is_empty(), "the count begins anew");
    }

    #[test]
    fn the_head_runs_for_a_whole_batch_before_the_wait_is_over() {
        let mut exits = exit_wait(9);
        exits.0.batch = 3;
        let go_on = [row(8, 0), row(9, 0)];
        assert!(served(&mut exits, &mut [&go_on[..], &[row(1, 0), row(2, 0)]].concat(), vec![2, 3]).is_empty());
        assert_eq!(served(&mut exits, &mut [&go_on[..], &[row(3, 0)]].concat(), vec![2]), [3, 1, 2]);
        assert!(served(&mut exits, &mut [&go_on[..], &[row(1, 0)]].concat(), vec![2]).is_empty());
        let all = [&go_on[..], &[row(2, 0), row(3, 0), row(4, 0)]].concat();
        assert_eq!(served(&mut exits, &mut all.clone(), vec![2, 3, 4]), [2, 3, 4, 1]);
        assert_eq!(served(&mut exits, &mut all.clone(), vec![2, 3, 4]), [2, 3, 4], "a batch that exits at once");
    }

    #[test]
    fn rows_that_wait_go_with_those_that_do_not() {
        let mut exits = exit_wait(9);
        assert!(served(&mut exits, &mut [row(1, 0), row(2, 0)], vec![0]).is_empty());
        let prompt = Segment { kind: RowKind::Prompt, tokens: 7, ..row(3, 0) };
        assert_eq!(served(&mut exits, &mut [row(2, 1), prompt], vec![1]), [3, 1]);
    }

    #[test]
    fn the_head_runs_when_no_row_goes_on() {
        let mut exits = exit_wait(9);
        assert!(served(&mut exits, &mut [row(1, 0), row(2, 1)], vec![0]).is_empty());
        assert_eq!(served(&mut exits, &mut [row(2, 2)], vec![0]), [2, 1]);
        assert_eq!(served(&mut exits, &mut [row(1, 0)], vec![0]), [1]);
    }

    #[test]
    fn signals_that_need_the_head_leave_nothing_to_wait_for() {
        let exit: ExitPolicy = "margin:0.5".parse().unwrap();
        let settings = Settings { exit_wait: 9, ..Settings::new(Batching::Depth, exit, 3) };
        let mut exits = (ExitWait::new(&settings), settings.signal_reads());
        assert_eq!(served(&mut exits, &mut [row(1, 0), row(2, 0)], vec![1]), [2]);
        let fixed = Settings { exit: ExitPolicy::Static(1), ..settings };
        assert_eq!(fixed.signal_reads().head_from, u8::MAX, "a certain exit waits as well");
        assert_eq!(Settings { exit_wait: 0, ..fixed }.signal_reads().head_from, 1);
    }

    #[test]
    fn a_preempted_request_waits_no_longer() {
        let mut exits = exit_wait(1);
        assert!(served(&mut exits, &mut [row(1, 0), row(2, 0), row(3, 0)], vec![0, 1]).is_empty());
        exits.0.withdraw(1);
        assert_eq!(served(&mut exits, &mut [row(3, 1)], vec![]), [2]);
    }
}
