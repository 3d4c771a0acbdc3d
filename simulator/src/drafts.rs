//! Drafts of simulated sequences, under a policy that speculates: which ones full depth confirms.

use std::collections::VecDeque;

use scheduler::{Pass, Settings, Slot};

use crate::exits::{Cursor, ExitModel};

/// Drafts by slot, the oldest first.
///
/// The exit trace is one of full depth, which is also the history of every token up to the first contradicted draft. What
/// a token after that would have predicted is not in the trace. Its signals are those of the recorded token at its place,
/// until it is taken back.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drafts {
    by_slot: Vec<VecDeque<Draft>>,
}

/// A draft.
#[derive(Clone, Copy, Debug)]
struct Draft {
    /// The token of which it is a draft.
    token: Cursor,
    /// Depth at which it exited.
    depth: u8,
}

impl Drafts {
    /// No drafts; `None` if the policy does not speculate.
    pub fn new(settings: &Settings) -> Option<Self> {
        settings.exit.speculates().then(|| Self { by_slot: vec![VecDeque::new(); settings.max_batch as usize] })
    }

    /// A sequence takes or gives up a slot.
    pub fn clear(&mut self, slot: Slot) {
        self.by_slot[slot as usize].clear();
    }

    /// Sets the number of confirmed drafts of each segment that the pass [verifies](Pass::verifies), and moves the requests
    /// with contradicted drafts back behind the corrected token. Returns how many tokens are thereby certain.
    pub fn verify(&mut self, exits: &ExitModel, pass: &Pass<'_>, cursors: &mut [Cursor], signals: &mut [f32]) -> u64 {
        let mut certain = 0;
        for (segment, signal) in pass.segments.iter().zip(signals).filter(|(segment, _)| pass.verifies(segment)) {
            let drafts = &mut self.by_slot[segment.slot as usize];
            let mut accepted = 0;
            while accepted < segment.tokens {
                let draft = drafts.pop_front().expect("every row that is verified left a draft");
                if !exits.agrees(draft.token.at(draft.depth)) {
                    cursors[segment.slot as usize] = exits.next(&draft.token);
                    drafts.clear();
                    certain += 1;
                    break;
                }
                accepted += 1;
            }
            certain += u64::from(accepted);
            *signal = accepted as f32;
        }
        certain
    }

    /// Advances the requests whose rows exit to their next tokens. Returns how many of these tokens are certain.
    pub fn exit(&mut self, exits: &ExitModel, pass: &Pass<'_>, exiting: &[u32], cursors: &mut [Cursor]) -> u64 {
        let mut certain = 0;
        for &index in exiting {
            let segment = pass.exited(index as usize);
            let cursor = &mut cursors[segment.slot as usize];
            if segment.depth + 1 < exits.num_loops() {
                self.by_slot[segment.slot as usize].push_back(Draft { token: *cursor, depth: segment.depth });
            } else {
                certain += 1;
            }
            *cursor = exits.next(cursor);
        }
        certain
    }
}
