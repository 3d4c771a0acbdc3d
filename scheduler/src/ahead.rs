//! Asynchronous scheduling: the next pass is composed while the device runs the current one.
//!
//! While a pass runs, three things are unknown: the time at its end, the requests that arrive until then, and the
//! tokens that it samples. The scheduler needs none of them. It must know which rows exit: under static depth, and under
//! delayed exits, which the signals of the pass before have decided. Policies that exit by the signals of the pass itself
//! are refused ([`Settings::async_scheduling`](crate::Settings::async_scheduling)). Until the time is known, the
//! scheduler's clock counts passes; observers receive the events, with their times, once the pass has ended.
//!
//! ```text
//! pass p-1 runs ──signals──► exits of pass p are decided ──► pass p runs ──signals──► ...
//!    (pass p is composed)                                     (pass p+1 is composed)
//! ```

use traces::{DevicePass, Nanos, PassWork, Request};

use crate::blocks::BlockTables;
use crate::executor::Executor;
use crate::observe::{Observer, PassRecord, PrefixUse, Token};
use crate::pass::{Pass, Segment};
use crate::policy::SignalReads;
use crate::scheduler::Scheduler;

/// An event whose time is not known yet.
#[derive(Clone, Copy, Debug)]
enum Event {
    LookedUp(Request, PrefixUse),
    Admitted(Request),
    Preempted(Request),
    Token(Request, Token),
    Finished(Request, Nanos),
}

/// Events that wait until their time is known. Times are numbers of passes: an event happens at the end of that pass.
#[derive(Debug, Default)]
struct Deferred(Vec<Event>);

impl Observer for Deferred {
    fn looked_up(&mut self, _: Nanos, request: &Request, found: PrefixUse) {
        self.0.push(Event::LookedUp(*request, found));
    }

    fn admitted(&mut self, _: Nanos, request: &Request) {
        self.0.push(Event::Admitted(*request));
    }

    fn preempted(&mut self, _: Nanos, request: &Request) {
        self.0.push(Event::Preempted(*request));
    }

    fn token(&mut self, _: Nanos, request: &Request, token: Token) {
        self.0.push(Event::Token(*request, token));
    }

    fn finished(&mut self, _: Nanos, request: &Request, first_token: Nanos) {
        self.0.push(Event::Finished(*request, first_token));
    }
}

impl Deferred {
    /// Reports the events to `observer` at time `now`; `ends[n]` is when pass `n` ended.
    fn tell(&mut self, now: Nanos, ends: &[Nanos], observer: &mut impl Observer) {
        let time = |pass: Nanos| ends[pass.0 as usize];
        for event in self.0.drain(..) {
            match event {
                Event::LookedUp(request, found) => observer.looked_up(now, &request, found),
                Event::Admitted(request) => observer.admitted(now, &request),
                Event::Preempted(request) => observer.preempted(now, &request),
                Event::Token(request, token) => {
                    observer.token(now, &request, Token { previous: token.previous.map(time), ..token });
                }
                Event::Finished(request, first_token) => observer.finished(now, &request, time(first_token)),
            }
        }
    }
}

/// A composed pass, detached from the scheduler, which goes on to plan the next one.
#[derive(Clone, Debug)]
struct Composed {
    segments: Vec<Segment>,
    reads: SignalReads,
    tables: BlockTables,
    work: PassWork,
}

impl Composed {
    fn of(scheduler: &Scheduler) -> Self {
        let Pass { segments, reads, tables, work, .. } = scheduler.pass();
        Self { segments: segments.to_vec(), reads, tables: tables.without_contents(), work: work.clone() }
    }

    fn pass(&self) -> Pass<'_> {
        Pass::new(&self.segments, self.reads, &self.tables, &self.work)
    }
}

/// The pass that the device runs.
struct Running {
    composed: Composed,
    exiting: Vec<u32>,
    start: Nanos,
    elapsed: Nanos,
    running: u32,
    waiting: u32,
    device: Option<DevicePass>,
}

/// Tells the executor which slots were released; returns whether any was.
fn release<E: Executor>(scheduler: &mut Scheduler, executor: &mut E) -> bool {
    let released = scheduler.take_released();
    released.iter().for_each(|&slot| executor.release(slot));
    !released.is_empty()
}

/// Tells the executor which slots were assigned.
fn admit<E: Executor>(scheduler: &Scheduler, executor: &mut E) -> Result<(), E::Error> {
    scheduler.admitted().try_for_each(|(slot, request, generated)| executor.admit(slot, request, generated))
}

/// The passes of one machine, each of which is planned while the previous one runs.
#[derive(Default)]
pub(crate) struct Ahead {
    /// The pass that is composed but not started yet.
    next: Option<Composed>,
    running: Option<Running>,
    deferred: Deferred,
    /// Whether a request has ended whose rows the composed pass has.
    any_ended: bool,
    /// End of each pass, by number.
    ends: Vec<Nanos>,
}

impl Ahead {
    /// See [`Server::start_pass`](crate::Server::start_pass).
    pub fn start_pass<E: Executor>(
        &mut self,
        scheduler: &mut Scheduler,
        executor: &mut E,
        now: Nanos,
        observer: &mut impl Observer,
    ) -> Result<Option<Nanos>, E::Error> {
        let label = Nanos(self.ends.len() as u64);
        release(scheduler, executor);
        let mut composed = self.next.take().map(|composed| {
            scheduler.see_what_came();
            if release(scheduler, executor) || self.any_ended { Composed::of(scheduler) } else { composed }
        });
        self.any_ended = false;
        if composed.as_ref().is_none_or(|composed| composed.segments.is_empty()) {
            if composed.is_some() {
                admit(scheduler, executor)?;
            }
            // Tokens that are delivered only now, since the last rows of their iteration were cancelled, came with the last pass.
            let last = Nanos(label.0.saturating_sub(1));
            let any = scheduler.plan(last, &mut self.deferred);
            release(scheduler, executor);
            self.deferred.tell(now, &self.ends, observer);
            composed = any.then(|| Composed::of(scheduler));
        }
        admit(scheduler, executor)?;
        let Some(mut composed) = composed else { return Ok(None) };
        let (running, waiting) = (scheduler.num_running(), scheduler.num_waiting());
        scheduler.decide_ahead();
        let exiting = scheduler.exiting().to_vec();
        composed.work.clone_from(scheduler.pass().work);
        let mut plan = || {
            scheduler.complete(label, &mut self.deferred);
            self.next = scheduler.plan_ahead(label, &mut self.deferred).then(|| Composed::of(scheduler));
        };
        let mut signals = vec![0.0; composed.segments.len()];
        let elapsed = executor.run_beside(&composed.pass(), &exiting, &mut signals, &mut plan)?;
        scheduler.keep_signals(&composed.segments, &signals);
        self.running =
            Some(Running { composed, exiting, start: now, elapsed, running, waiting, device: executor.device_pass() });
        Ok(Some(elapsed))
    }

    /// A request has ended, whose rows may be in the pass that is composed.
    pub fn end(&mut self) {
        self.any_ended = true;
    }

    /// See [`Server::finish_pass`](crate::Server::finish_pass).
    pub fn finish_pass(&mut self, now: Nanos, observer: &mut impl Observer) {
        let Some(ran) = self.running.take() else { return };
        let Running { composed, exiting, start, elapsed, running, waiting, device } = ran;
        observer.pass(&PassRecord {
            start,
            elapsed,
            pass: composed.pass(),
            exiting: &exiting,
            running,
            waiting,
            device,
        });
        self.ends.push(now);
        self.deferred.tell(now, &self.ends, observer);
    }
}
