//! How many tokens of each sequence ran each depth: the tokens that rows attend to under [`KvFill::Skip`].
//!
//! [`KvFill::Skip`]: crate::KvFill::Skip

use std::collections::HashMap;

use crate::pass::{Segment, Slot};

/// Token counts of all sequences that hold a slot or were preempted.
#[derive(Clone, Debug)]
pub(crate) struct Reach {
    num_loops: usize,
    /// By slot.
    prompt_tokens: Vec<u32>,
    /// By slot and depth: how many generated tokens ran it.
    counts: Vec<u32>,
    /// Counts of requests that were preempted.
    preempted: HashMap<u32, Box<[u32]>>,
}

impl Reach {
    pub fn new(num_loops: u8, max_batch: u32) -> Self {
        let (num_loops, slots) = (usize::from(num_loops), max_batch as usize);
        let preempted = HashMap::new();
        Self { num_loops, prompt_tokens: vec![0; slots], counts: vec![0; slots * num_loops], preempted }
    }

    /// A request takes a slot, for the first time or again.
    pub fn admit(&mut self, slot: Slot, request: u32, prompt_tokens: u32) {
        self.prompt_tokens[slot as usize] = prompt_tokens;
        let before = self.preempted.remove(&request);
        let counts = self.counts_of(slot);
        match before {
            Some(before) => counts.copy_from_slice(&before),
            None => counts.fill(0),
        }
    }

    /// A request loses its slot before its last token.
    pub fn preempt(&mut self, slot: Slot, request: u32) {
        let counts: Box<[u32]> = (*self.counts_of(slot)).into();
        self.preempted.insert(request, counts);
    }

    /// A request that was preempted has ended.
    pub fn forget(&mut self, request: u32) {
        self.preempted.remove(&request);
    }

    /// The last row of a segment exits: a generated token ran the depths up to its own, a prompt's last token runs all.
    pub fn exit(&mut self, segment: &Segment) {
        if segment.generated {
            let depth = usize::from(segment.depth);
            self.counts_of(segment.slot)[..=depth].iter_mut().for_each(|count| *count += 1);
        }
    }

    /// Number of tokens that a segment attends to before its own: those of the prompt, and the generated ones that ran
    /// its depth. In a context that is computed again, the positions of the latter are unknown; they count as the first
    /// ones.
    pub fn history(&self, segment: &Segment) -> u32 {
        let count = self.counts[segment.slot as usize * self.num_loops + usize::from(segment.depth)];
        segment.start.min(self.prompt_tokens[segment.slot as usize] + count)
    }

    fn counts_of(&mut self, slot: Slot) -> &mut [u32] {
        let first = slot as usize * self.num_loops;
        &mut self.counts[first..first + self.num_loops]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pass::RowKind;

    const PROMPT: u32 = 10;

    fn segment(start: u32, tokens: u32, depth: u8, kind: RowKind) -> Segment {
        Segment { slot: 1, start, tokens, depth, kind, predicts: true, generated: start + tokens > PROMPT }
    }

    fn histories(reach: &Reach, start: u32) -> [u32; 3] {
        [0, 1, 2].map(|depth| reach.history(&segment(start, 1, depth, RowKind::Decode)))
    }

    #[test]
    fn rows_attend_to_the_prompt_and_to_tokens_that_ran_their_depth() {
        let mut reach = Reach::new(3, 2);
        reach.admit(1, 7, PROMPT);
        reach.exit(&segment(0, 10, 0, RowKind::Prompt));
        assert_eq!(histories(&reach, 10), [10, 10, 10], "a prompt runs every depth");
        reach.exit(&segment(10, 1, 0, RowKind::Decode));
        reach.exit(&segment(11, 1, 1, RowKind::Decode));
        assert_eq!(histories(&reach, 12), [12, 11, 10]);
    }

    #[test]
    fn a_preempted_request_is_remembered_until_it_is_admitted_again() {
        let mut reach = Reach::new(3, 2);
        reach.admit(1, 7, PROMPT);
        reach.exit(&segment(0, 10, 0, RowKind::Prompt));
        reach.exit(&segment(10, 1, 1, RowKind::Decode));
        reach.preempt(1, 7);
        reach.admit(1, 8, PROMPT);
        assert_eq!(histories(&reach, 11), [10, 10, 10]);
        reach.admit(1, 7, PROMPT);
        assert!(reach.preempted.is_empty());
        reach.exit(&segment(0, 12, 0, RowKind::Prompt));
        assert_eq!(histories(&reach, 12), [12, 11, 10], "the last row of its context exited early as well");
    }
}
