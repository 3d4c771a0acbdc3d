//! Sequences that change machines: one machine runs the prompt, another one generates the rest.
//!
//! ```text
//! prompt machine    waiting ─► prefilling ─► first token exits, prompt has run ─► handed over ──────► released
//!                                                                                   │ (keys, values)   ▲
//! decode machine    waiting ─► blocks reserved ─────────────────────────────────────▼─► received ─► ready
//! ```
//!
//! The scheduler moves nothing. It says which sequences are ready to go, keeps their blocks until it is told that they
//! have gone, reserves blocks for those that come, and goes on with them once it is told that they are there. Which
//! machines there are, and how long a transfer takes, is for its caller to decide.

use traces::{Nanos, Request};

use super::{ScheduleError, Scheduler, Sequence, Terms};
use crate::custom::Memory;
use crate::observe::{Observer, Token};
use crate::pass::Slot;

/// A sequence whose prompt is complete, for another machine to go on with.
#[derive(Clone, Copy, Debug)]
pub struct Handover {
    /// The request. Its first token has exited and is not delivered yet.
    pub request: Request,
    /// The slot that holds its keys and values until [`Server::release_handed_over`](crate::Server::release_handed_over).
    pub slot: Slot,
    /// Depth at which its first token exited.
    pub depth: u8,
    /// What a custom exit policy remembers of it.
    memory: Memory,
}

/// Slot and blocks that are reserved for a sequence of another machine, until [`Scheduler::receive`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Id of the request.
    pub request: u32,
    /// The slot.
    pub slot: Slot,
    /// Tokens whose keys and values must be transferred: those of the prompt that the prefix cache does not have.
    pub tokens: u32,
}

/// Sequences on their way to other machines or from them.
#[derive(Clone, Debug, Default)]
pub(super) struct Handovers {
    /// Whether sequences are handed over when their prompts are complete.
    pub hands_over: bool,
    /// Sequences whose first token has exited while rows of their prompts may be in flight.
    leaving: Vec<Handover>,
    /// Sequences that may go, since they were last taken.
    complete: Vec<Handover>,
    /// Slots reserved in the last plan.
    reserved: Vec<Slot>,
    /// Slots whose sequences were received since the last plan; asynchronous scheduling sees them only after the next.
    received: Vec<Slot>,
}

impl Scheduler {
    /// From now on, ends every sequence of more than one output token at its first token and hands it over: see
    /// [`take_handed_over`](Self::take_handed_over). Its cache then needs to hold prompts only.
    pub fn hand_over_after_prompts(&mut self) {
        self.handovers.hands_over = true;
    }

    /// The sequences whose prompts have been completed since the last call. Each keeps its slot and its blocks, and is not
    /// preempted, until [`Server::release_handed_over`](crate::Server::release_handed_over). Its first token is not
    /// delivered: that is for the machine that [receives](Self::receive) it.
    pub fn take_handed_over(&mut self) -> Vec<Handover> {
        std::mem::take(&mut self.handovers.complete)
    }

    /// Releases slot and blocks of a sequence that was handed over. The executor must be told, unless scheduling is
    /// asynchronous: the slot is then among the [`released`](Self::released) of the next plan.
    pub(crate) fn release_handed_over(&mut self, slot: Slot) {
        match self.settings.async_scheduling {
            true => self.finished.push(slot),
            false => {
                self.release(slot);
                self.released.retain(|&other| other != slot);
            }
        }
    }

    /// Appends a sequence of another machine to the queue. It is admitted in its turn, as a request is, when a slot and
    /// the blocks of its whole prompt are free, and then [reserves](Self::reserved) them.
    ///
    /// # Errors
    /// If the request can never run to its end here.
    pub fn submit_handed_over(&mut self, handover: &Handover) -> Result<(), ScheduleError> {
        let Handover { request, depth, memory, .. } = *handover;
        self.settings.check_positions(&request)?;
        self.decision.remember(request.id, memory);
        let sequence = Sequence::new(request, Terms::default(), self.settings.prompt_depth(request.id));
        let sequence = Sequence { generated: 1, arriving: Some(depth), ..sequence };
        self.enter(sequence);
        Ok(())
    }

    /// What the last plan reserved for sequences of other machines.
    pub fn reserved(&self) -> impl Iterator<Item = Reservation> {
        self.handovers.reserved.iter().map(|&slot| {
            let Sequence { request, started, .. } = self.sequences[slot as usize];
            Reservation { request: request.id, slot, tokens: request.prompt_tokens - started }
        })
    }

    /// The keys and values of the sequence that a slot is reserved for are there: its first token is delivered, and its
    /// next one may start. Until then the sequence is not preempted.
    pub fn receive(&mut self, slot: Slot, now: Nanos, observer: &mut impl Observer) {
        let sequence = &mut self.sequences[slot as usize];
        let Some(depth) = sequence.arriving.take() else {
            debug_assert!(false, "a slot receives what it is reserved for, once");
            return;
        };
        let Sequence { request, context, .. } = *sequence;
        sequence.started = context;
        sequence.filled = context;
        sequence.first_token = now;
        sequence.last_token = now;
        observer.token(now, &request, Token { index: 0, depth, previous: None });
        self.publish(slot, context);
        self.handovers.received.push(slot);
        if !self.settings.async_scheduling {
            self.see_received();
        }
    }

    /// Whether the first request in the queue comes with its keys and values, and needs no rows to be admitted.
    pub(super) fn next_arrives(&self) -> bool {
        self.waiting.front().is_some_and(|sequence| sequence.arriving.is_some())
    }

    /// Notes the slot of an admitted sequence of another machine.
    pub(super) fn reserve(&mut self, slot: Slot) {
        self.sequences[slot as usize].pinned = true;
        self.handovers.reserved.push(slot);
    }

    pub(super) fn forget_reserved(&mut self) {
        self.handovers.reserved.clear();
    }

    /// Sees the sequences that were received since the last plan.
    pub(super) fn see_received(&mut self) {
        for slot in self.handovers.received.drain(..) {
            self.sequences[slot as usize].pinned = false;
            self.ready.push(slot);
        }
    }

    /// Whether a sequence goes to another machine after its first token.
    pub(super) fn leaves(&self, request: &Request) -> bool {
        self.handovers.hands_over && request.output_tokens > 1
    }

    /// What this machine serves of a request.
    pub(super) fn share_of(&self, request: &Request) -> Request {
        match self.leaves(request) {
            true => Request { output_tokens: 1, ..*request },
            false => *request,
        }
    }

    /// Keeps a sequence whose first token has exited until its prompt is complete.
    pub(super) fn hold_for_handover(&mut self, slot: Slot, depth: u8) {
        let sequence = &mut self.sequences[slot as usize];
        sequence.generated = 1;
        sequence.pinned = true;
        let request = sequence.request;
        self.handovers.leaving.push(Handover { request, slot, depth, memory: self.decision.memory(slot) });
    }

    /// Hands over sequences without rows in flight: prompts run depths below the exit of their first token.
    pub(super) fn complete_handovers(&mut self) {
        let Self { handovers, segments, stalled, .. } = self;
        let in_flight = |slot: Slot| segments.iter().chain(&*stalled).any(|segment| segment.slot == slot);
        handovers.complete.extend(handovers.leaving.extract_if(.., |handover| !in_flight(handover.slot)));
    }
}
