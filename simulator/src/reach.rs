//! How many tokens of each sequence got to each depth: what rows attend to under [`KvFill::Skip`].
//!
//! [`KvFill::Skip`]: scheduler::KvFill::Skip

use std::collections::HashMap;

use scheduler::{Segment, Slot};
use traces::Request;

/// The sequences that hold a slot or have lost it.
#[derive(Clone, Debug)]
pub(crate) struct Reach {
    num_loops: usize,
    /// By slot.
    sequences: Vec<Sequence>,
    /// By slot and depth, the generated tokens that got there.
    counts: Vec<u32>,
    /// Counts of requests that were preempted.
    displaced: HashMap<u32, Box<[u32]>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sequence {
    request: u32,
    prompt_tokens: u32,
    /// Tokens still to come.
    missing: u32,
}

impl Reach {
    pub fn new(num_loops: u8, max_batch: u32) -> Self {
        let (num_loops, slots) = (usize::from(num_loops), max_batch as usize);
        Self {
            num_loops,
            sequences: vec![Sequence::default(); slots],
            counts: vec![0; slots * num_loops],
            displaced: HashMap::new(),
        }
    }

    pub fn admit(&mut self, slot: Slot, request: &Request, generated: u32) {
        let &Request { id, prompt_tokens, output_tokens, .. } = request;
        self.sequences[slot as usize] = Sequence { request: id, prompt_tokens, missing: output_tokens - generated };
        let displaced = self.displaced.remove(&id);
        let counts = self.counts_of(slot);
        match displaced {
            Some(displaced) => counts.copy_from_slice(&displaced),
            None => counts.fill(0),
        }
    }

    pub fn release(&mut self, slot: Slot) {
        let Sequence { request, missing, .. } = self.sequences[slot as usize];
        if missing > 0 {
            let counts: Box<[u32]> = (*self.counts_of(slot)).into();
            self.displaced.insert(request, counts);
        }
    }

    /// The last row of a segment leaves: a generated token got to its depth, unless the row is a prompt's last.
    pub fn emit(&mut self, segment: &Segment) {
        let sequence = &mut self.sequences[segment.slot as usize];
        sequence.missing -= 1;
        if segment.start + segment.tokens > sequence.prompt_tokens {
            let depth = usize::from(segment.depth);
            self.counts_of(segment.slot)[..=depth].iter_mut().for_each(|count| *count += 1);
        }
    }

    /// Tokens that a segment attends to before its first: the prompt's, and generated ones that got to its depth. Of a
    /// context that is computed again it is not known where those lie; they are taken to be the first.
    pub fn history(&self, segment: &Segment) -> u32 {
        let Sequence { prompt_tokens, .. } = self.sequences[segment.slot as usize];
        let count = self.counts[segment.slot as usize * self.num_loops + usize::from(segment.depth)];
        segment.start.min(prompt_tokens + count)
    }

    fn counts_of(&mut self, slot: Slot) -> &mut [u32] {
        let first = slot as usize * self.num_loops;
        &mut self.counts[first..first + self.num_loops]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scheduler::RowKind;
    use traces::Nanos;

    const REQUEST: Request = Request { id: 7, arrival: Nanos::ZERO, prompt_tokens: 10, output_tokens: 5 };

    fn segment(start: u32, tokens: u32, depth: u8, kind: RowKind) -> Segment {
        Segment { slot: 1, start, tokens, depth, kind, predicts: true }
    }

    fn histories(reach: &Reach, start: u32) -> [u32; 3] {
        [0, 1, 2].map(|depth| reach.history(&segment(start, 1, depth, RowKind::Decode)))
    }

    #[test]
    fn rows_attend_to_the_prompt_and_to_tokens_that_got_to_their_depth() {
        let mut reach = Reach::new(3, 2);
        reach.admit(1, &REQUEST, 0);
        reach.emit(&segment(0, 10, 0, RowKind::Prompt));
        assert_eq!(histories(&reach, 10), [10, 10, 10], "a prompt runs every depth");
        reach.emit(&segment(10, 1, 0, RowKind::Decode));
        reach.emit(&segment(11, 1, 1, RowKind::Decode));
        assert_eq!(histories(&reach, 12), [12, 11, 10]);
    }

    #[test]
    fn a_preempted_request_is_remembered_until_it_is_back_and_a_finished_one_is_not() {
        let mut reach = Reach::new(3, 2);
        reach.admit(1, &REQUEST, 0);
        reach.emit(&segment(0, 10, 0, RowKind::Prompt));
        reach.emit(&segment(10, 1, 1, RowKind::Decode));
        reach.release(1);
        reach.admit(1, &Request { id: 8, ..REQUEST }, 0);
        assert_eq!(histories(&reach, 11), [10, 10, 10]);
        reach.admit(1, &REQUEST, 2);
        reach.emit(&segment(0, 12, 0, RowKind::Prompt));
        assert_eq!(histories(&reach, 12), [12, 11, 10], "the last row of its context left early as well");
        reach.emit(&segment(12, 1, 2, RowKind::Decode));
        reach.emit(&segment(13, 1, 2, RowKind::Decode));
        reach.release(1);
        assert!(reach.displaced.is_empty());
    }
}
