//! Backfill: the depths that exited tokens skipped and that must run later ([`KvFill::Backfill`]).
//!
//! A row attends to complete entries of its own depth, so the tokens of a sequence run each depth in the order of their
//! positions. The completed work is therefore a staircase, described by one number for each depth:
//!
//! ```text
//! position   0 1 2 3 4 5 6 7
//! depth 0    # # # # # # # o     done up to 8; o is the token in flight, which goes on to depth 1
//! depth 1    # # # # # . . .     done up to 5: 5 and 6 exited at depth 0, and must run with o or before it
//! depth 2    # # # . .           done up to 3: 3 and 4 exited at depth 1
//! ```
//!
//! [`KvFill::Backfill`]: crate::KvFill::Backfill

use std::ops::Range;

use crate::pass::{RowKind, Segment, Slot};

/// Completed and outstanding depths of every slot.
#[derive(Clone, Debug)]
pub(crate) struct Backlog {
    num_loops: usize,
    /// By slot and depth: how many positions from 0 have run it.
    done: Vec<u32>,
    /// As `done`, with the rows of the current pass included.
    taken: Vec<u32>,
}

impl Backlog {
    pub fn new(num_loops: u8, max_batch: u32) -> Self {
        let num_loops = usize::from(num_loops);
        let done = vec![0; max_batch as usize * num_loops];
        Self { num_loops, taken: done.clone(), done }
    }

    /// A sequence takes a slot. Its first `context` positions run every depth as a prompt, ahead of its tokens.
    pub fn admit(&mut self, slot: Slot, context: u32) {
        let places = self.place(slot, 0)..self.place(slot + 1, 0);
        self.done[places.clone()].fill(context);
        self.taken[places].fill(context);
    }

    /// Positions below `position` that could run `depth` in the current pass and are not part of it yet.
    pub fn undone(&self, slot: Slot, depth: u8, position: u32) -> Range<u32> {
        let place = self.place(slot, depth);
        let start = self.taken[place];
        start..self.done[place - 1].min(position).max(start)
    }

    /// Takes up to `most` of the positions that [`undone`](Self::undone) returns; `None` if there are none.
    pub fn take(&mut self, slot: Slot, depth: u8, position: u32, most: u32) -> Option<Segment> {
        let Range { start, end } = self.undone(slot, depth, position);
        let tokens = most.min(end - start);
        let place = self.place(slot, depth);
        self.taken[place] = start + tokens;
        let kind = RowKind::Backfill;
        (tokens > 0).then_some(Segment { slot, start, tokens, depth, kind, predicts: false, generated: true })
    }

    /// Records that the rows of these segments have run.
    pub fn ran(&mut self, segments: &[Segment]) {
        for segment in segments.iter().filter(|segment| segment.kind != RowKind::Prompt) {
            let place = self.place(segment.slot, segment.depth);
            self.done[place] = segment.start + segment.tokens;
            self.taken[place] = self.done[place];
        }
    }

    /// Forgets what has run at positions from `kept` on. Returns how many rows that were, over all depths.
    pub fn take_back(&mut self, slot: Slot, kept: u32) -> u32 {
        let places = self.place(slot, 0)..self.place(slot + 1, 0);
        let mut forgotten = 0;
        for place in places {
            forgotten += self.done[place].saturating_sub(kept);
            self.done[place] = self.done[place].min(kept);
            self.taken[place] = self.done[place];
        }
        forgotten
    }

    /// Number of positions from 0 that have run every depth.
    pub fn complete(&self, slot: Slot) -> u32 {
        self.done[self.place(slot + 1, 0) - 1]
    }

    fn place(&self, slot: Slot, depth: u8) -> usize {
        slot as usize * self.num_loops + usize::from(depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(start: u32, depth: u8) -> Segment {
        Segment { slot: 1, start, tokens: 1, depth, kind: RowKind::Decode, predicts: true, generated: true }
    }

    #[test]
    fn a_row_finds_what_its_predecessors_left_undone_at_its_depth() {
        let mut backlog = Backlog::new(3, 2);
        backlog.admit(1, 4);
        for position in 4..7 {
            backlog.ran(&[decode(position, 0)]);
        }
        assert_eq!(backlog.undone(1, 1, 6), 4..6);
        assert!(backlog.undone(1, 2, 6).is_empty(), "depth 2 comes after depth 1");
        let first = backlog.take(1, 1, 6, 1).unwrap();
        assert_eq!((first.start, first.tokens, first.depth, first.predicts), (4, 1, 1, false));
        assert_eq!(backlog.undone(1, 1, 6), 5..6, "nothing is taken twice");
        assert!(backlog.undone(1, 2, 6).is_empty(), "nothing runs two depths in one pass");
        backlog.ran(&[first]);
        assert_eq!((backlog.undone(1, 2, 6), backlog.complete(1)), (4..5, 4));
        let deeper = backlog.take(1, 2, 6, 9).unwrap();
        backlog.ran(&[deeper]);
        assert_eq!(backlog.complete(1), 5);
        assert!(backlog.take(1, 2, 6, 9).is_none());
    }

    #[test]
    fn what_is_taken_back_must_run_again() {
        let mut backlog = Backlog::new(3, 2);
        backlog.admit(1, 4);
        (4..7).for_each(|position| backlog.ran(&[decode(position, 0)]));
        let chunk = backlog.take(1, 1, 6, 9).unwrap();
        backlog.ran(&[chunk]);
        assert_eq!(backlog.take_back(1, 5), 3, "positions 5 and 6 at depth 0, and 5 at depth 1");
        assert_eq!((backlog.complete(1), backlog.undone(1, 2, 9), backlog.undone(1, 1, 9)), (4, 4..5, 5..5));
        backlog.ran(&[decode(5, 0)]);
        assert_eq!(backlog.undone(1, 1, 9), 5..6);
    }

    #[test]
    fn a_new_sequence_has_nothing_undone() {
        let mut backlog = Backlog::new(2, 2);
        backlog.admit(1, 4);
        backlog.ran(&[decode(4, 0), decode(5, 0)]);
        backlog.admit(1, 9);
        assert!(backlog.undone(1, 1, 8).is_empty() && backlog.undone(1, 1, 20).is_empty());
        assert_eq!(backlog.complete(1), 9);
    }
}
