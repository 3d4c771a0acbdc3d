//! The clock on the wall, for serving loops that run on the engine.

use std::time::Instant;

use scheduler::Clock;
use traces::Nanos;

/// What a wall clock does when nothing happens before the next arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Sleeps: a replay takes as long as its trace.
    Sleep,
    /// Sets itself forward: a replay takes as long as its passes.
    Skip,
}

/// Time since it was made, and what was skipped since.
#[derive(Clone, Copy, Debug)]
pub struct WallClock {
    start: Instant,
    skipped: Nanos,
    idle: Idle,
}

impl WallClock {
    /// A clock at zero.
    pub fn start(idle: Idle) -> Self {
        Self { start: Instant::now(), skipped: Nanos::ZERO, idle }
    }
}

impl Clock for WallClock {
    fn now(&mut self) -> Nanos {
        Nanos::from(self.start.elapsed()) + self.skipped
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
