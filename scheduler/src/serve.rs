//! The serving loop: takes requests, runs passes on an executor, and delivers tokens.

use std::sync::Arc;

use traces::{Nanos, PrefixHashes, Request};

use crate::ahead::Ahead;
use crate::executor::Executor;
use crate::load::{Answered, Load, OpenLoad, Unordered};
use crate::observe::{Observer, PassRecord};
use crate::pass::Slot;
use crate::scheduler::{Handover, ScheduleError, Scheduler, Settings, Terms};

/// Why a run stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError<E: std::error::Error + 'static> {
    /// Settings or a request that cannot be served.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// Requests that are not in order of arrival.
    #[error(transparent)]
    Unordered(#[from] Unordered),
    /// The executor failed.
    #[error("{0}")]
    Executor(#[source] E),
}

/// One machine: a scheduler and the executor that runs its passes.
pub struct Server<E> {
    scheduler: Scheduler,
    executor: E,
    signals: Vec<f32>,
    /// Start and duration of the running pass.
    pass: (Nanos, Nanos),
    /// State of asynchronous scheduling; `None` without it.
    ahead: Option<Ahead>,
}

impl<E: Executor> Server<E> {
    /// An idle machine.
    ///
    /// # Errors
    /// If the settings contradict each other.
    pub fn new(settings: Settings, executor: E) -> Result<Self, ScheduleError> {
        let scheduler = Scheduler::new(settings)?;
        let ahead = (settings.async_scheduling && E::RUNS_BESIDE).then(Ahead::default);
        Ok(Self { scheduler, executor, signals: Vec::new(), pass: (Nanos::ZERO, Nanos::ZERO), ahead })
    }

    /// Sets the prefix hashes; see [`Scheduler::share_prefixes`].
    ///
    /// # Errors
    /// If the hashes do not cover whole blocks.
    pub fn share_prefixes(&mut self, prefixes: Arc<PrefixHashes>) -> Result<(), ScheduleError> {
        self.scheduler.share_prefixes(prefixes)
    }

    /// Sets the prefix hashes of one request; see [`Scheduler::share_prefix`].
    pub fn share_prefix(&mut self, request: u32, hashes: Vec<u64>) {
        self.scheduler.share_prefix(request, hashes);
    }

    /// The scheduler.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// The executor.
    pub fn executor(&self) -> &E {
        &self.executor
    }

    /// The executor, to tell it of what the scheduler does not know.
    pub fn executor_mut(&mut self) -> &mut E {
        &mut self.executor
    }

    /// The executor, when the run is over.
    pub fn into_executor(self) -> E {
        self.executor
    }

    /// Appends a request to the queue.
    ///
    /// # Errors
    /// If the request can never run to its end.
    pub fn submit(&mut self, request: Request) -> Result<(), ScheduleError> {
        self.scheduler.submit(request)
    }

    /// From now on, ends sequences at their first token and hands them over to other machines; see
    /// [`Scheduler::hand_over_after_prompts`]. Not for executors that run
    /// [beside the host](Executor::RUNS_BESIDE) under asynchronous scheduling.
    pub fn hand_over_after_prompts(&mut self) {
        debug_assert!(self.ahead.is_none(), "handovers are known when their pass has ended");
        self.scheduler.hand_over_after_prompts();
    }

    /// Sequences whose prompts have been completed since the last call; see [`Scheduler::take_handed_over`].
    pub fn take_handed_over(&mut self) -> Vec<Handover> {
        self.scheduler.take_handed_over()
    }

    /// Releases slot and blocks of a sequence whose keys and values have been transferred.
    pub fn release_handed_over(&mut self, slot: Slot) {
        self.scheduler.release_handed_over(slot);
        if !self.scheduler.settings().async_scheduling {
            self.executor.release(slot);
        }
    }

    /// Appends a sequence of another machine to the queue; see [`Scheduler::submit_handed_over`].
    ///
    /// # Errors
    /// If the request can never run to its end here.
    pub fn submit_handed_over(&mut self, handover: &Handover) -> Result<(), ScheduleError> {
        self.scheduler.submit_handed_over(handover)
    }

    /// Goes on with a sequence whose keys and values are there; see [`Scheduler::receive`].
    pub fn receive(&mut self, slot: Slot, now: Nanos, observer: &mut impl Observer) {
        self.scheduler.receive(slot, now, observer);
    }

    /// Adds a request to the queue, behind those of its priority.
    ///
    /// # Errors
    /// If the request can never run to its end, or cannot have what it asks for.
    pub fn submit_under(&mut self, request: Request, terms: Terms) -> Result<(), ScheduleError> {
        self.scheduler.submit_under(request, terms)
    }

    /// Ends a request before its last token, between two passes: because its text is complete, or it was cancelled. Its
    /// rows in flight are discarded, and its slot and blocks are free at once. Only in lockstep batching with prefix
    /// caching, where other requests may read blocks that it is filling, it runs to the end of the iteration.
    ///
    /// Returns `false` if no such request waits or runs.
    pub fn end(&mut self, request: u32) -> bool {
        match &mut self.ahead {
            // The executor hears of it when the next pass starts.
            Some(ahead) => {
                ahead.end();
                self.scheduler.end(request)
            }
            None => {
                let _forwarded = self.scheduler.take_released();
                let ended = self.scheduler.end(request);
                self.forward_releases();
                ended
            }
        }
    }

    /// Composes the next pass and runs it. Returns its duration, or `None` if there is nothing to run.
    /// [`finish_pass`](Self::finish_pass) must follow when that time has passed.
    ///
    /// # Errors
    /// If the executor fails.
    pub fn start_pass(&mut self, now: Nanos, observer: &mut impl Observer) -> Result<Option<Nanos>, E::Error> {
        if let Some(ahead) = &mut self.ahead {
            return ahead.start_pass(&mut self.scheduler, &mut self.executor, now, observer);
        }
        let any = self.scheduler.plan(now, observer);
        self.forward_releases();
        for (slot, request, generated) in self.scheduler.admitted() {
            self.executor.admit(slot, request, generated)?;
        }
        if !any {
            return Ok(None);
        }
        let pass = self.scheduler.pass();
        self.signals.resize(pass.segments.len(), 0.0);
        let mut elapsed = self.executor.run(&pass, &mut self.signals)?;
        self.scheduler.decide(&self.signals);
        let (pass, exiting) = (self.scheduler.pass(), self.scheduler.exiting());
        if pass.emits(exiting) {
            elapsed += self.executor.emit(&pass, exiting)?;
        }
        self.pass = (now, elapsed);
        Ok(Some(elapsed))
    }

    /// Applies the outcome of the pass at its end.
    pub fn finish_pass(&mut self, now: Nanos, observer: &mut impl Observer) {
        if let Some(ahead) = &mut self.ahead {
            return ahead.finish_pass(now, observer);
        }
        let (start, elapsed) = self.pass;
        observer.pass(&PassRecord {
            start,
            elapsed,
            pass: self.scheduler.pass(),
            exiting: self.scheduler.exiting(),
            running: self.scheduler.num_running(),
            waiting: self.scheduler.num_waiting(),
            device: self.executor.device_pass(),
        });
        self.scheduler.complete(now, observer);
        self.forward_releases();
    }

    fn forward_releases(&mut self) {
        for &slot in self.scheduler.released() {
            self.executor.release(slot);
        }
    }
}

/// Source of time for a serving loop.
pub trait Clock {
    /// Everything is ready for the first request: the time before does not count, where it is measured.
    fn begin(&mut self) {}
    /// Time since the start of the run.
    fn now(&mut self) -> Nanos;
    /// Advances by the duration of a pass, `elapsed`. Returns the time at its end.
    fn advance(&mut self, elapsed: Nanos) -> Nanos;
    /// Waits until `time`, before which nothing happens.
    fn wait_until(&mut self, time: Nanos);
}

/// Borrows a clock.
impl<C: Clock> Clock for &mut C {
    fn begin(&mut self) {
        C::begin(self);
    }

    fn now(&mut self) -> Nanos {
        C::now(self)
    }

    fn advance(&mut self, elapsed: Nanos) -> Nanos {
        C::advance(self, elapsed)
    }

    fn wait_until(&mut self, time: Nanos) {
        C::wait_until(self, time);
    }
}

/// A clock that advances only by passes and waits.
#[derive(Clone, Copy, Debug, Default)]
pub struct VirtualClock(Nanos);

impl Clock for VirtualClock {
    fn now(&mut self) -> Nanos {
        self.0
    }

    fn advance(&mut self, elapsed: Nanos) -> Nanos {
        self.0 += elapsed;
        self.0
    }

    fn wait_until(&mut self, time: Nanos) {
        self.0 = self.0.max(time);
    }
}

/// Serves requests, in order of arrival, until every token is delivered.
///
/// # Errors
/// At the first request that can never run to its end or arrives before the one ahead of it, or when the executor fails.
pub fn serve<E: Executor>(
    server: &mut Server<E>,
    requests: impl IntoIterator<Item = Request>,
    clock: &mut impl Clock,
    observer: &mut impl Observer,
) -> Result<(), ServeError<E::Error>> {
    let (mut load, mut answered) = (OpenLoad::new(requests), Answered::default());
    while step(server, clock, &mut load, &mut answered, observer)? {
        answered.0.clear();
    }
    Ok(())
}

/// Runs one pass, or waits for the next request if there is nothing to run. Returns whether there was anything to run or
/// to wait for; `answered` gets the requests that ended. Requests that the load cancels end before the pass.
///
/// Requests that arrive at the end of a pass are ahead of those that follow an answer at once.
fn step<E: Executor>(
    server: &mut Server<E>,
    clock: &mut impl Clock,
    load: &mut impl Load,
    answered: &mut Answered,
    observer: &mut impl Observer,
) -> Result<bool, ServeError<E::Error>> {
    let now = clock.now();
    while let Some(request) = load.take_cancelled() {
        server.end(request);
    }
    submit_until(server, load, now)?;
    let Some(elapsed) = server.start_pass(now, observer).map_err(ServeError::Executor)? else {
        let next = load.next_time();
        next.into_iter().for_each(|time| clock.wait_until(time));
        return Ok(next.is_some());
    };
    let end = clock.advance(elapsed);
    server.finish_pass(end, &mut (observer, &mut *answered));
    submit_until(server, load, end)?;
    answered.0.iter().for_each(|&request| load.answered(end, request));
    Ok(true)
}

/// Submits what is sent at `now` or before.
fn submit_until<E: Executor>(
    server: &mut Server<E>,
    load: &mut impl Load,
    now: Nanos,
) -> Result<(), ServeError<E::Error>> {
    while let Some(request) = load.take_until(now)? {
        server.submit_under(request, load.terms(request.id))?;
    }
    Ok(())
}

/// A machine that serves a load on a clock, one pass at a time.
pub struct Serving<E, C, L> {
    server: Server<E>,
    clock: C,
    load: L,
    answered: Answered,
    ended: usize,
}

impl<E: Executor, C: Clock, L: Load> Serving<E, C, L> {
    /// An idle machine and its load.
    pub fn new(server: Server<E>, clock: C, load: L) -> Self {
        Self { server, clock, load, answered: Answered::default(), ended: 0 }
    }

    /// Runs one pass, or waits for the next request if there is nothing to run. Returns whether there was anything to run
    /// or to wait for.
    ///
    /// # Errors
    /// If a request can never run to its end or is out of order, or the executor fails.
    pub fn step(&mut self, observer: &mut impl Observer) -> Result<bool, ServeError<E::Error>> {
        self.answered.0.clear();
        let goes_on = step(&mut self.server, &mut self.clock, &mut self.load, &mut self.answered, observer)?;
        self.ended += self.answered.0.len();
        Ok(goes_on)
    }

    /// Number of requests that have ended.
    pub fn num_ended(&self) -> usize {
        self.ended
    }

    /// The clock.
    pub fn clock_mut(&mut self) -> &mut C {
        &mut self.clock
    }

    /// The load, to which requests may be added between two steps.
    pub fn load_mut(&mut self) -> &mut L {
        &mut self.load
    }

    /// The server.
    pub fn server(&self) -> &Server<E> {
        &self.server
    }

    /// The server, to tell its executor of requests between two steps.
    pub fn server_mut(&mut self) -> &mut Server<E> {
        &mut self.server
    }

    /// The server, when the run is over.
    pub fn into_server(self) -> Server<E> {
        self.server
    }
}
