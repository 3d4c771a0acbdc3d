//! The serving loop: takes requests, runs passes on an executor, and delivers tokens.

use std::sync::Arc;

use traces::{Nanos, PrefixHashes, Request};

use crate::ahead::Ahead;
use crate::executor::Executor;
use crate::observe::{Observer, PassRecord};
use crate::scheduler::{ScheduleError, Scheduler, Settings};

/// Why a run stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError<E: std::error::Error + 'static> {
    /// Settings or a request that cannot be served.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
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

    /// The scheduler.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// The executor.
    pub fn executor(&self) -> &E {
        &self.executor
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
        if !self.scheduler.exiting().is_empty() {
            elapsed += self.executor.emit(&self.scheduler.pass(), self.scheduler.exiting())?;
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
    /// Time since the start of the run.
    fn now(&mut self) -> Nanos;
    /// Advances by the duration of a pass, `elapsed`. Returns the time at its end.
    fn advance(&mut self, elapsed: Nanos) -> Nanos;
    /// Waits until `time`, before which nothing happens.
    fn wait_until(&mut self, time: Nanos);
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
/// At the first request that can never run to its end, or when the executor fails.
pub fn serve<E: Executor>(
    server: &mut Server<E>,
    requests: impl IntoIterator<Item = Request>,
    clock: &mut impl Clock,
    observer: &mut impl Observer,
) -> Result<(), ServeError<E::Error>> {
    let mut arrivals = requests.into_iter().peekable();
    loop {
        let now = clock.now();
        while let Some(request) = arrivals.next_if(|request| request.arrival <= now) {
            server.submit(request)?;
        }
        match server.start_pass(now, observer).map_err(ServeError::Executor)? {
            Some(elapsed) => server.finish_pass(clock.advance(elapsed), observer),
            None => match arrivals.peek() {
                Some(next) => clock.wait_until(next.arrival),
                None => return Ok(()),
            },
        }
    }
}
