//! The wall clock, for serving loops that run on the engine.

use std::time::{Duration, Instant};

use scheduler::Clock;
use traces::Nanos;

/// What a wall clock does until the next arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Sleeps: a replay takes as long as its trace.
    Sleep,
    /// Advances at once: a replay takes as long as its passes.
    Skip,
}

/// Time since the start, without the time in which the clock stood still, and with skipped idle time added.
#[derive(Clone, Copy, Debug)]
pub struct WallClock {
    start: Instant,
    skipped: Nanos,
    stood: Duration,
    /// When the clock was stopped; `None` while it runs.
    stopped: Option<Instant>,
    idle: Idle,
}

impl WallClock {
    /// A clock at zero that runs.
    pub fn start(idle: Idle) -> Self {
        Self { start: Instant::now(), skipped: Nanos::ZERO, stood: Duration::ZERO, stopped: None, idle }
    }

    /// Stops the clock. Does nothing while it stands still.
    pub fn stop(&mut self) {
        self.stopped.get_or_insert_with(Instant::now);
    }

    /// Lets the clock go on. Does nothing while it runs.
    pub fn resume(&mut self) {
        self.stood += self.stopped.take().map_or(Duration::ZERO, |stopped| stopped.elapsed());
    }
}

impl Clock for WallClock {
    fn begin(&mut self) {
        *self = Self::start(self.idle);
    }

    fn now(&mut self) -> Nanos {
        let until = self.stopped.unwrap_or_else(Instant::now);
        Nanos::from(until - self.start - self.stood) + self.skipped
    }

    fn advance(&mut self, _: Nanos) -> Nanos {
        self.now()
    }

    fn wait_until(&mut self, time: Nanos) {
        let wait = time.since(self.now());
        match self.idle {
            Idle::Sleep => std::thread::sleep(wait.into()),
            Idle::Skip => self.skipped += wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_stands_still_from_stop_to_resume() {
        let begin = Instant::now();
        let mut clock = WallClock::start(Idle::Sleep);
        let pause = Duration::from_millis(20);
        clock.stop();
        let stopped = clock.now();
        std::thread::sleep(pause);
        clock.stop();
        assert_eq!(clock.now(), stopped, "a second stop changes nothing");
        clock.resume();
        clock.resume();
        let (now, passed) = (clock.now(), Nanos::from(begin.elapsed()));
        assert!(stopped <= now && now + Nanos::from(pause) <= passed, "{now:?} of {passed:?}");
    }

    #[test]
    fn waiting_reaches_the_time_and_never_goes_back() {
        for idle in [Idle::Sleep, Idle::Skip] {
            let mut clock = WallClock::start(idle);
            clock.wait_until(Nanos(2_000_000));
            let reached = clock.now();
            assert!(reached >= Nanos(2_000_000), "{idle:?}: {reached:?}");
            clock.wait_until(Nanos(1_000_000));
            assert!(clock.now() >= reached);
        }
    }
}
