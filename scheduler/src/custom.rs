//! Exit policies that are written outside of this crate.
//!
//! ```
//! use scheduler::{CustomExit, CustomPolicy, ExitPolicy, ExitRow, Memory, SignalRead};
//! use traces::ExitSignal;
//!
//! /// Exits where the margin is above 0.3 at two depths in a row.
//! struct TwoMargins;
//!
//! impl CustomExit for TwoMargins {
//!     fn name(&self) -> &str {
//!         "two-margins:0.3"
//!     }
//!     fn reads(&self) -> SignalRead {
//!         SignalRead::Signal(ExitSignal::Margin)
//!     }
//!     fn exits(&self, row: &ExitRow<'_>, _: &mut Memory) -> bool {
//!         row.signals.len() > 1 && row.signals.iter().rev().take(2).all(|&margin| margin > 0.3)
//!     }
//! }
//!
//! let policy = CustomPolicy::new(&TwoMargins);
//! policy.register()?;
//! // From here on, `--exit two-margins:0.3` and `exit: [two-margins:0.3]` read.
//! assert_eq!("two-margins:0.3".parse(), Ok(ExitPolicy::Custom(policy)));
//! # Ok::<(), scheduler::policy::PolicyError>(())
//! ```

use std::collections::HashMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{PoisonError, RwLock};

use crate::pass::{Segment, Slot};
use crate::policy::{ExitPolicy, PolicyError, SignalRead};

/// An exit policy that is not built in.
///
/// The scheduler asks it for every row that predicts a token, except at the last depth, where all rows exit. It runs on
/// engine and simulator alike. Its answers may depend on its arguments only: then a simulation gives the same result
/// each time, on any number of threads.
pub trait CustomExit: Send + Sync {
    /// The name in files and on the command line, parameters included: ASCII letters, digits and `-_.:`.
    fn name(&self) -> &str;

    /// What it reads of a row. A signal that [needs the exit head](SignalRead::needs_head) is paid for at every depth. The
    /// oracle gives 1 from its exit depth on, and 0 above.
    fn reads(&self) -> SignalRead;

    /// Whether the row exits at its depth. `memory` belongs to the row's sequence.
    fn exits(&self, row: &ExitRow<'_>, memory: &mut Memory) -> bool;

    /// Which rows of a pass exit, each with the memory of its own sequence: one answer for each row. A policy whose calls
    /// are dear, because another language answers, decides about all at once here.
    fn exits_of_pass(&self, rows: &[ExitRow<'_>], memories: &mut [Memory]) -> Vec<bool> {
        rows.iter().zip(memories).map(|(row, memory)| self.exits(row, memory)).collect()
    }
}

/// What a custom exit policy may remember of a sequence from row to row: zeros before the first. A preemption keeps it;
/// the token that was in the making then starts again at depth 0.
pub type Memory = [f32; 4];

/// A row after a pass, whose token may exit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExitRow<'a> {
    /// What was read of the token at depths 0 to [`depth`](Self::depth); zeros for a policy that reads nothing.
    pub signals: &'a [f32],
    /// The depth that the row has just run, from 0.
    pub depth: u8,
    /// Loops of the model.
    pub num_loops: u8,
    /// Index of the predicted token in the output, from 0.
    pub token: u32,
    /// Position of the row in its sequence, from 0: the prompt, then the output.
    pub position: u32,
    /// Sequences that hold a slot.
    pub running: u32,
    /// Requests that wait for one.
    pub waiting: u32,
}

/// A custom exit policy as a value: equal to another of the same name.
#[derive(Clone, Copy)]
pub struct CustomPolicy(&'static dyn CustomExit);

/// Policies whose names can be read.
static REGISTERED: RwLock<Vec<CustomPolicy>> = RwLock::new(Vec::new());

impl CustomPolicy {
    /// The value of a policy. One with parameters that are known late is leaked: `Box::leak(Box::new(policy))`.
    pub fn new(policy: &'static dyn CustomExit) -> Self {
        Self(policy)
    }

    /// Lets the name be read, from the command line and from files, for the rest of the process.
    ///
    /// # Errors
    /// If the name is another policy's, or has other characters than names may have.
    pub fn register(self) -> Result<(), PolicyError> {
        let name = self.name();
        let may_have = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        if name.is_empty() || !name.bytes().all(may_have) {
            return Err(PolicyError::CustomName(name.to_owned()));
        }
        let mut registered = REGISTERED.write().unwrap_or_else(PoisonError::into_inner);
        if ExitPolicy::built_in(name).is_ok() || registered.contains(&self) {
            return Err(PolicyError::TakenName(name.to_owned()));
        }
        registered.push(self);
        Ok(())
    }

    /// The registered policy of this name.
    pub(crate) fn registered(name: &str) -> Option<Self> {
        let registered = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
        registered.iter().find(|policy| policy.name() == name).copied()
    }

    /// See [`CustomExit::name`].
    pub fn name(self) -> &'static str {
        self.0.name()
    }

    /// See [`CustomExit::reads`].
    pub fn reads(self) -> SignalRead {
        self.0.reads()
    }
}

impl PartialEq for CustomPolicy {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl fmt::Debug for CustomPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Asks a custom policy which rows exit, and keeps what it is told and remembers.
#[derive(Clone, Debug)]
pub(crate) struct CustomDecisions {
    policy: CustomPolicy,
    reads: SignalRead,
    num_loops: u8,
    /// By slot and depth, what was read of the token in the making.
    signals: Vec<f32>,
    /// By slot.
    memories: Vec<Memory>,
    /// By request that was preempted, or comes from another machine.
    remembered: HashMap<u32, Memory>,
}

impl CustomDecisions {
    pub fn new(policy: CustomPolicy, num_loops: u8, max_batch: u32) -> Self {
        let slots = max_batch as usize;
        Self {
            policy,
            reads: policy.reads(),
            num_loops,
            signals: vec![0.0; slots * usize::from(num_loops)],
            memories: vec![Memory::default(); slots],
            remembered: HashMap::new(),
        }
    }

    /// A request takes a slot, for the first time or again.
    pub fn admit(&mut self, slot: Slot, request: u32) {
        self.memories[slot as usize] = self.remembered.remove(&request).unwrap_or_default();
    }

    /// What the policy remembers of the request in a slot.
    pub fn memory(&self, slot: Slot) -> Memory {
        self.memories[slot as usize]
    }

    /// Keeps what the policy is to remember of a request when that is admitted.
    pub fn remember(&mut self, request: u32, memory: Memory) {
        self.remembered.insert(request, memory);
    }

    /// A request that was preempted has ended.
    pub fn forget(&mut self, request: u32) {
        self.remembered.remove(&request);
    }

    /// Sets the indices, in order, of the segments whose last row exits, given what was read of each. All rows exit from
    /// depth `certain_from` on; `token` gives the index in the output of the token that a slot predicts.
    pub fn decide(
        &mut self,
        (segments, read): (&[Segment], &[f32]),
        certain_from: u8,
        token: impl Fn(Slot) -> u32,
        load: MachineLoad,
        exiting: &mut Vec<u32>,
    ) {
        exiting.clear();
        let mut asked: Vec<(u32, &Segment)> = Vec::new();
        for (index, (segment, &read)) in (0..).zip(segments.iter().zip(read)).filter(|(_, (row, _))| row.predicts) {
            if segment.depth >= certain_from {
                exiting.push(index);
                continue;
            }
            self.keep(segment, read);
            match self.reads {
                // A signal without bound decides by itself: so an executor says that it knows the outcome
                // ([`ExitSignal::certain`](traces::ExitSignal::certain)).
                SignalRead::Signal(_) | SignalRead::Repeats if read.is_infinite() => {
                    exiting.extend((read == self.reads.certain(true)).then_some(index));
                }
                _ => asked.push((index, segment)),
            }
        }
        let row = |&(_, segment): &(u32, &Segment)| ExitRow {
            signals: &self.signals[self.range(segment)],
            depth: segment.depth,
            num_loops: self.num_loops,
            token: token(segment.slot),
            position: segment.start + segment.tokens - 1,
            running: load.running,
            waiting: load.waiting,
        };
        let rows: Vec<ExitRow<'_>> = asked.iter().map(row).collect();
        let mut memories: Vec<Memory> = asked.iter().map(|(_, segment)| self.memory(segment.slot)).collect();
        let answers = self.policy.0.exits_of_pass(&rows, &mut memories);
        assert_eq!(answers.len(), rows.len(), "{:?} answers for every row", self.policy);
        for ((index, segment), (memory, exits)) in asked.into_iter().zip(memories.into_iter().zip(answers)) {
            self.memories[segment.slot as usize] = memory;
            exiting.extend(exits.then_some(index));
        }
        exiting.sort_unstable();
    }

    /// Where the signals of a segment's token are, up to its depth.
    fn range(&self, segment: &Segment) -> RangeInclusive<usize> {
        let first = segment.slot as usize * usize::from(self.num_loops);
        first..=first + usize::from(segment.depth)
    }

    /// Keeps what was read of a segment's token at its depth.
    fn keep(&mut self, segment: &Segment, read: f32) {
        let range = self.range(segment);
        let [before @ .., last] = &mut self.signals[range] else { unreachable!("a depth has its signal") };
        *last = match self.reads {
            SignalRead::None => 0.0,
            // An executor may know the oracle depth only, or only whether the prediction of this very depth is right.
            SignalRead::Oracle => before.last().map_or(read, |&before| read.max(before)),
            SignalRead::Signal(_) | SignalRead::Repeats => read,
        };
    }
}

/// How busy the machine is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MachineLoad {
    /// Sequences that hold a slot.
    pub running: u32,
    /// Requests that wait for one.
    pub waiting: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pass::RowKind;
    use traces::ExitSignal;

    /// Exits at the second depth in a row with a margin above 0.3.
    struct TwoMargins(&'static str);

    impl CustomExit for TwoMargins {
        fn name(&self) -> &str {
            self.0
        }

        fn reads(&self) -> SignalRead {
            SignalRead::Signal(ExitSignal::Margin)
        }

        fn exits(&self, row: &ExitRow<'_>, _: &mut Memory) -> bool {
            row.signals.len() > 1 && row.signals.iter().rev().take(2).all(|&margin| margin > 0.3)
        }
    }

    #[test]
    fn a_registered_policy_reads_back_by_its_name_and_shares_it_with_no_other() {
        let policy = CustomPolicy::new(&TwoMargins("two:0.3"));
        assert!("two:0.3".parse::<ExitPolicy>().unwrap_err().to_string().contains("a registered policy"));
        policy.register().unwrap();
        assert_eq!("two:0.3".parse::<ExitPolicy>().unwrap(), ExitPolicy::Custom(policy));
        assert_eq!(ExitPolicy::Custom(policy).to_string(), "two:0.3");
        let refused =
            |name| CustomPolicy::new(Box::leak(Box::new(TwoMargins(name)))).register().unwrap_err().to_string();
        for taken in ["two:0.3", "oracle", "margin:0.5"] {
            assert!(refused(taken).contains("another policy's name"), "{taken}");
        }
        for unreadable in ["", "two margins", "two,three"] {
            assert!(refused(unreadable).contains("expected ASCII letters"), "{unreadable}");
        }
    }

    #[test]
    fn a_row_comes_with_the_signals_of_its_token_so_far() {
        let mut decisions = CustomDecisions::new(CustomPolicy::new(&TwoMargins("two")), 4, 3);
        let mut exits = |slot, depth, margin| {
            let kind = RowKind::Decode;
            let segment = Segment { slot, start: 5, tokens: 1, depth, kind, predicts: true, generated: true };
            let mut exiting = Vec::new();
            decisions.decide((&[segment], &[margin]), 3, |_| 2, MachineLoad { running: 3, waiting: 0 }, &mut exiting);
            exiting == [0]
        };
        assert!(!exits(1, 0, 0.9) && !exits(2, 0, 0.1));
        assert!(exits(1, 1, 0.4) && !exits(2, 1, 0.4), "slots are apart");
        assert!(!exits(1, 0, 0.9), "a token does not count for the next");
        assert!(exits(0, 0, f32::INFINITY) && !exits(0, 1, f32::NEG_INFINITY), "what is certain needs no policy");
    }

    /// Exits by the memory of the sequence alone, in one answer for the pass.
    struct Whole;

    impl CustomExit for Whole {
        fn name(&self) -> &str {
            "whole"
        }

        fn reads(&self) -> SignalRead {
            SignalRead::Signal(ExitSignal::Margin)
        }

        fn exits(&self, _: &ExitRow<'_>, _: &mut Memory) -> bool {
            unreachable!("it is asked for all rows of a pass at once")
        }

        fn exits_of_pass(&self, rows: &[ExitRow<'_>], memories: &mut [Memory]) -> Vec<bool> {
            memories.iter_mut().for_each(|memory| memory[0] += 1.0);
            rows.iter().zip(memories).map(|(row, memory)| row.signals[0] > 0.5 && memory[0] > 1.0).collect()
        }
    }

    #[test]
    fn a_policy_may_decide_about_all_rows_of_a_pass_at_once() {
        let mut decisions = CustomDecisions::new(CustomPolicy::new(&Whole), 4, 5);
        let row = |slot, depth, predicts| {
            let kind = RowKind::Decode;
            Segment { slot, start: 5, tokens: 1, depth, kind, predicts, generated: true }
        };
        let segments = [row(0, 3, true), row(1, 0, true), row(2, 0, false), row(3, 0, true), row(4, 0, true)];
        let read = [0.0, 0.9, 0.9, 0.1, f32::INFINITY];
        let mut pass = |exiting: &mut Vec<u32>| {
            decisions.decide((&segments, &read), 3, |_| 0, MachineLoad { running: 5, waiting: 0 }, exiting);
        };
        let mut exiting = Vec::new();
        pass(&mut exiting);
        assert_eq!(exiting, [0, 4], "the last depth and what is certain need no policy");
        pass(&mut exiting);
        assert_eq!(exiting, [0, 1, 4]);
    }
}
