//! Where requests come from: at their own arrivals, or when others have been answered.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use traces::{ClosedLoop, Nanos, Request};

use crate::observe::Observer;
use crate::scheduler::Terms;

/// A request that arrives before the one ahead of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("request {request} arrives before the one ahead of it in the trace: expected arrivals in order")]
pub struct Unordered {
    /// Id of the request.
    pub request: u32,
}

/// Requests on their way to the machines.
pub trait Load {
    /// When the next request is sent, as far as is known.
    fn next_time(&self) -> Option<Nanos>;

    /// The next request that is sent at `now` or before.
    ///
    /// # Errors
    /// If arrivals are out of order.
    fn take_until(&mut self, now: Nanos) -> Result<Option<Request>, Unordered>;

    /// The last token of a request was delivered at `now`. Not told of requests that were cancelled.
    fn answered(&mut self, now: Nanos, request: u32);

    /// What a request asks for beside its lengths. Asked once, when the request is sent.
    fn terms(&mut self, _request: u32) -> Terms {
        Terms::default()
    }

    /// The next request that was sent and must end before its last token; see [`Server::end`](crate::Server::end).
    fn take_cancelled(&mut self) -> Option<u32> {
        None
    }
}

/// Requests that are each sent at their own arrival, in this order.
#[derive(Clone, Debug)]
pub struct OpenLoad<I> {
    requests: I,
    next: Option<Request>,
}

impl<I: Iterator<Item = Request>> OpenLoad<I> {
    /// Requests in order of arrival.
    pub fn new(requests: impl IntoIterator<IntoIter = I>) -> Self {
        let mut requests = requests.into_iter();
        let next = requests.next();
        Self { requests, next }
    }
}

impl<I: Iterator<Item = Request>> Load for OpenLoad<I> {
    fn next_time(&self) -> Option<Nanos> {
        self.next.map(|request| request.arrival)
    }

    fn take_until(&mut self, now: Nanos) -> Result<Option<Request>, Unordered> {
        let Some(request) = self.next.filter(|request| request.arrival <= now) else { return Ok(None) };
        self.next = self.requests.next();
        match self.next {
            Some(next) if next.arrival < request.arrival => Err(Unordered { request: next.id }),
            _ => Ok(Some(request)),
        }
    }

    fn answered(&mut self, _: Nanos, _: u32) {}
}

/// Requests that are sent when others have been answered. Of those that are sent at the same time, the one with the
/// lowest id comes first.
///
/// Without sessions, requests are taken from their source when a user is free: memory does not grow with their number.
#[derive(Clone, Debug)]
pub struct ClosedLoad<I> {
    closed_loop: ClosedLoop,
    source: Source<I>,
    /// Requests whose time is known: when, id, prompt and output tokens.
    due: BinaryHeap<Reverse<(Nanos, u32, u32, u32)>>,
}

/// What has not been sent.
#[derive(Clone, Debug)]
enum Source<I> {
    /// One request after the other.
    Requests(I),
    /// Sessions.
    Sessions {
        /// All requests, by id.
        requests: Vec<Request>,
        /// The next request of the session of each.
        followers: Vec<Option<u32>>,
        /// Where to look for the next session that a user takes.
        next: usize,
    },
}

impl<I: Iterator<Item = Request>> ClosedLoad<I> {
    /// The requests of a closed loop. Their ids are their places in the trace whose sessions it has.
    pub fn new(closed_loop: ClosedLoop, requests: impl IntoIterator<IntoIter = I>) -> Self {
        let requests = requests.into_iter();
        let source = match &closed_loop.sessions {
            None => Source::Requests(requests),
            Some(sessions) => {
                Source::Sessions { requests: requests.collect(), followers: sessions.followers(), next: 0 }
            }
        };
        let mut load = Self { closed_loop, source, due: BinaryHeap::new() };
        match load.closed_loop.users {
            Some(users) => {
                // Of fewer requests than users, some users have nothing to do.
                let _ = (0..users.number.get()).try_for_each(|_| load.begin(Nanos::ZERO));
            }
            None => load.begin_all(),
        }
        load
    }

    /// Sends every request that waits for no other one at its arrival.
    fn begin_all(&mut self) {
        let Self { closed_loop, source, due } = self;
        let mut send = |request: Request| {
            let Request { id, arrival, prompt_tokens, output_tokens } = request;
            due.push(Reverse((arrival, id, prompt_tokens, output_tokens)));
        };
        match source {
            Source::Requests(requests) => requests.for_each(send),
            Source::Sessions { requests, .. } => {
                let waits = |request: &&Request| closed_loop.think(request.id, true).is_some();
                requests.iter().filter(|request| !waits(request)).for_each(|&request| send(request));
            }
        }
    }

    /// Lets a user begin with the next request or session at `time`; `None` if there is none.
    fn begin(&mut self, time: Nanos) -> Option<()> {
        let request = match &mut self.source {
            Source::Requests(requests) => requests.next()?,
            Source::Sessions { requests, followers, next } => {
                let sessions = self.closed_loop.sessions.as_ref()?;
                let is_first = |request: &Request| sessions.is_first(request.id);
                let found = requests.get(*next..)?.iter().position(is_first)? + *next;
                debug_assert_eq!(followers.len(), sessions.links().len());
                *next = found + 1;
                requests[found]
            }
        };
        let wait = match &self.closed_loop.users {
            Some(users) if time > Nanos::ZERO => users.think.before(request.id, users.seed),
            _ => Nanos::ZERO,
        };
        self.send(request, time + wait);
        Some(())
    }

    fn send(&mut self, request: Request, time: Nanos) {
        self.due.push(Reverse((time, request.id, request.prompt_tokens, request.output_tokens)));
    }
}

impl<I: Iterator<Item = Request>> Load for ClosedLoad<I> {
    fn next_time(&self) -> Option<Nanos> {
        self.due.peek().map(|Reverse((time, ..))| *time)
    }

    fn take_until(&mut self, now: Nanos) -> Result<Option<Request>, Unordered> {
        if self.next_time().is_none_or(|time| time > now) {
            return Ok(None);
        }
        let request = self.due.pop().map(|Reverse((arrival, id, prompt_tokens, output_tokens))| Request {
            id,
            arrival,
            prompt_tokens,
            output_tokens,
        });
        Ok(request)
    }

    /// The next request of the session follows, or the user turns to something else.
    fn answered(&mut self, now: Nanos, id: u32) {
        if let Source::Sessions { requests, followers, .. } = &self.source {
            let next = followers.get(id as usize).copied().flatten();
            if let Some(&next) = next.and_then(|next| requests.get(next as usize)) {
                // Without users, a request without a think time was sent at its own arrival.
                if let Some(think) = self.closed_loop.think(next.id, false) {
                    self.send(next, now + think);
                }
                return;
            }
        }
        if self.closed_loop.users.is_some() {
            self.begin(now);
        }
    }
}

/// Collects the requests that were answered in a pass.
#[derive(Clone, Debug, Default)]
pub struct Answered(pub Vec<u32>);

impl Observer for Answered {
    fn finished(&mut self, _now: Nanos, request: &Request, _first_token: Nanos) {
        self.0.push(request.id);
    }
}
