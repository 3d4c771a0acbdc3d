//! A closed loop: a fixed number of requests in flight, where the next request arrives when another one ends.
//!
//! A slow moment of the machine delays the arrivals too. It stretches a run but does not make a queue grow, so two runs
//! that share such moments can be compared by their ratio.

use traces::Request;

use crate::executor::Executor;
use crate::observe::Observer;
use crate::serve::{Clock, ServeError, Server};

/// A machine that serves requests in a closed loop, one pass at a time.
pub struct ClosedLoop<E, C> {
    server: Server<E>,
    clock: C,
    requests: std::vec::IntoIter<Request>,
    in_flight: u32,
    total: usize,
}

impl<E: Executor, C: Clock> ClosedLoop<E, C> {
    /// A closed loop on an idle machine. Requests are taken in their order; their own arrivals do not count.
    pub fn new(server: Server<E>, clock: C, requests: &[Request], in_flight: u32) -> Self {
        let total = requests.len();
        Self { server, clock, requests: Vec::from(requests).into_iter(), in_flight, total }
    }

    /// Submits requests up to the number in flight and runs one pass. Returns whether there was anything to run.
    ///
    /// # Errors
    /// If a request can never run to its end, or the executor fails.
    pub fn step(&mut self, observer: &mut impl Observer) -> Result<bool, ServeError<E::Error>> {
        let now = self.clock.now();
        while self.unfinished() < self.in_flight {
            let Some(request) = self.requests.next() else { break };
            self.server.submit(Request { arrival: now, ..request })?;
        }
        let Some(elapsed) = self.server.start_pass(now, observer).map_err(ServeError::Executor)? else {
            return Ok(false);
        };
        self.server.finish_pass(self.clock.advance(elapsed), observer);
        Ok(true)
    }

    /// Number of requests that were submitted and have not ended.
    fn unfinished(&self) -> u32 {
        let scheduler = self.server.scheduler();
        scheduler.num_running() + scheduler.num_waiting()
    }

    /// Share of the requests that have ended, 0 to 1; 1 without requests.
    pub fn progress(&self) -> f64 {
        let left = self.requests.len() + self.unfinished() as usize;
        if self.total == 0 { 1.0 } else { (self.total - left) as f64 / self.total as f64 }
    }

    /// The clock of the loop.
    pub fn clock_mut(&mut self) -> &mut C {
        &mut self.clock
    }

    /// The executor, when the run is over.
    pub fn into_executor(self) -> E {
        self.server.into_executor()
    }

    /// The server, when the run is over.
    pub fn into_server(self) -> Server<E> {
        self.server
    }
}
