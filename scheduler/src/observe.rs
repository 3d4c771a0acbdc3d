//! Observers of a run.

use traces::{DevicePass, Nanos, Request};

use crate::pass::Pass;

/// One generated token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// Index of the token in the request's output, from 0.
    pub index: u32,
    /// Depth at which the token exited, from 0. The last one if full depth has verified the token.
    pub depth: u8,
    /// When the request's previous token was delivered; `None` for the first token.
    pub previous: Option<Nanos>,
}

/// Drafts of a sequence of which full depth has decided; see [`ExitPolicy::Speculate`](crate::ExitPolicy::Speculate).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Drafts that full depth confirmed.
    pub accepted: u32,
    /// Drafts that full depth contradicted: 0 or 1.
    pub rejected: u32,
    /// Drafts after a contradicted one, of which full depth had not decided yet.
    pub dropped: u32,
    /// Rows that had run for tokens after the contradicted draft, that draft included; one for each token and depth.
    pub wasted_rows: u32,
}

/// How much of a context was found in the prefix cache when its request got a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixUse {
    /// Tokens of the context: the prompt and, after a preemption, the tokens generated before.
    pub looked_up: u32,
    /// Tokens of those that were found and need not be computed.
    pub found: u32,
}

/// One pass as it ran.
#[derive(Clone, Copy, Debug)]
pub struct PassRecord<'a> {
    /// When the pass started.
    pub start: Nanos,
    /// Duration of the pass, exit head included.
    pub elapsed: Nanos,
    /// The rows of the pass.
    pub pass: Pass<'a>,
    /// Indices of the segments whose last rows exited in the pass, in ascending order.
    pub exiting: &'a [u32],
    /// Sequences that hold a slot.
    pub running: u32,
    /// Requests that wait for a slot.
    pub waiting: u32,
    /// How a GPU ran it; `None` for passes that no GPU ran.
    pub device: Option<DevicePass>,
}

/// Observes a run. Every method has an empty default.
pub trait Observer {
    /// With prefix caching, what was found of the context of a request that is about to be
    /// [admitted](Self::admitted).
    fn looked_up(&mut self, _now: Nanos, _request: &Request, _found: PrefixUse) {}
    /// A request got a slot: for the first time, again after preemption, or on the machine that it was handed over to.
    fn admitted(&mut self, _now: Nanos, _request: &Request) {}
    /// A request lost its slot and its keys and values; it is now first in the queue.
    fn preempted(&mut self, _now: Nanos, _request: &Request) {}
    /// A pass ended.
    fn pass(&mut self, _record: &PassRecord<'_>) {}
    /// Full depth decided about drafts of a request. In lockstep batching, the tokens are delivered when the iteration ends.
    fn verified(&mut self, _now: Nanos, _request: &Request, _verified: Verified) {}
    /// A token was delivered.
    fn token(&mut self, _now: Nanos, _request: &Request, _token: Token) {}
    /// A request's last token was delivered; `first_token` is when its first token was.
    fn finished(&mut self, _now: Nanos, _request: &Request, _first_token: Nanos) {}
    /// A request goes on on another machine, whose observer is told of the rest.
    fn handed_over(&mut self, _now: Nanos, _request: &Request) {}
}

/// Ignores all events.
impl Observer for () {}

/// Forwards all events, so that an observer can be borrowed.
impl<O: Observer> Observer for &mut O {
    fn looked_up(&mut self, now: Nanos, request: &Request, found: PrefixUse) {
        O::looked_up(self, now, request, found);
    }
    fn admitted(&mut self, now: Nanos, request: &Request) {
        O::admitted(self, now, request);
    }
    fn preempted(&mut self, now: Nanos, request: &Request) {
        O::preempted(self, now, request);
    }
    fn pass(&mut self, record: &PassRecord<'_>) {
        O::pass(self, record);
    }
    fn verified(&mut self, now: Nanos, request: &Request, verified: Verified) {
        O::verified(self, now, request, verified);
    }
    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        O::token(self, now, request, token);
    }
    fn finished(&mut self, now: Nanos, request: &Request, first_token: Nanos) {
        O::finished(self, now, request, first_token);
    }
    fn handed_over(&mut self, now: Nanos, request: &Request) {
        O::handed_over(self, now, request);
    }
}

/// Forwards all events to both observers.
impl<A: Observer, B: Observer> Observer for (A, B) {
    fn looked_up(&mut self, now: Nanos, request: &Request, found: PrefixUse) {
        self.0.looked_up(now, request, found);
        self.1.looked_up(now, request, found);
    }
    fn admitted(&mut self, now: Nanos, request: &Request) {
        self.0.admitted(now, request);
        self.1.admitted(now, request);
    }
    fn preempted(&mut self, now: Nanos, request: &Request) {
        self.0.preempted(now, request);
        self.1.preempted(now, request);
    }
    fn pass(&mut self, record: &PassRecord<'_>) {
        self.0.pass(record);
        self.1.pass(record);
    }
    fn verified(&mut self, now: Nanos, request: &Request, verified: Verified) {
        self.0.verified(now, request, verified);
        self.1.verified(now, request, verified);
    }
    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        self.0.token(now, request, token);
        self.1.token(now, request, token);
    }
    fn finished(&mut self, now: Nanos, request: &Request, first_token: Nanos) {
        self.0.finished(now, request, first_token);
        self.1.finished(now, request, first_token);
    }
    fn handed_over(&mut self, now: Nanos, request: &Request) {
        self.0.handed_over(now, request);
        self.1.handed_over(now, request);
    }
}
