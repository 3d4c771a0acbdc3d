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

/// Time since the start, with skipped idle time added.
#[derive(Clone, Copy, Debug)]
pub struct WallClock {
    start: Instant,
    skipped: Nanos,
    paused: Duration,
    idle: Idle,
}

impl WallClock {
    /// A clock at zero.
    pub fn start(idle: Idle) -> Self {
        Self { start: Instant::now(), skipped: Nanos::ZERO, paused: Duration::ZERO, idle }
    }

    /// Stops the clock during `work`.
    pub fn pause<R>(&mut self, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        self.paused += start.elapsed();
        result
    }
}

impl Clock for WallClock {
    fn now(&mut self) -> Nanos {
        Nanos::from(self.start.elapsed() - self.paused) + self.skipped
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
    fn a_pause_takes_no_time() {
        let mut clock = WallClock::start(Idle::Sleep);
        let pause = Duration::from_millis(50);
        let begin = Instant::now();
        clock.pause(|| std::thread::sleep(pause));
        let (now, passed) = (clock.now(), Nanos::from(begin.elapsed()));
        assert!(now + Nanos::from(pause) <= passed, "{now:?} of {passed:?}");
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
