//! Probes: the machine's speed under a steady load, at any moment of a profile or a replay.

use std::time::Instant;

use latency::LatencyModel;
use scheduler::{Clock, Settings};
use traces::{LoggedPass, Nanos, PassOrigin, PassRun};

use super::Profiler;
use crate::clock::{Idle, WallClock};
use crate::replay::ReplayError;

/// The machine's speed at one moment: some passes of the profiler's steady load.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Way in which the load was served: an index into [`Profiler::loads`].
    pub way: usize,
    /// The passes, with their times on the executor.
    pub passes: Vec<LoggedPass>,
    /// Duration of all passes, the serving loop included.
    pub elapsed: Nanos,
}

impl Probe {
    /// Time of all passes on the executor.
    pub fn in_executor(&self) -> Nanos {
        self.passes.iter().map(|pass| pass.elapsed).sum()
    }

    /// Measured time of the passes over their modelled time.
    pub fn pace(&self, model: &LatencyModel) -> f64 {
        let predicted: f64 = self.passes.iter().map(|pass| model.pass_ns(&pass.work)).sum();
        self.in_executor().0 as f64 / predicted
    }

    /// The passes as a run of a pass log; `settings` are those of the load, `repeat` is the number of the probe.
    pub fn into_run(self, settings: &Settings, repeat: u32) -> PassRun {
        PassRun {
            origin: PassOrigin::Steady,
            batching: settings.batching.to_string(),
            exit: settings.exit.to_string(),
            kv_fill: settings.kv_fill.to_string(),
            load: None,
            repeat,
            passes: self.passes,
        }
    }
}

/// A wall clock that stops half of the time, while probes measure the machine's speed.
///
/// The run continues after a probe for as long as the probe took, so that each disturbs the other's caches equally.
pub struct ProbedClock<'p> {
    clock: WallClock,
    profiler: &'p mut Profiler,
    next: Instant,
    /// By the clock's time.
    probes: Vec<(Nanos, Probe)>,
    failure: Option<ReplayError>,
}

impl<'p> ProbedClock<'p> {
    /// A clock at zero.
    pub fn start(idle: Idle, profiler: &'p mut Profiler) -> Self {
        let clock = WallClock::start(idle);
        Self { clock, profiler, next: Instant::now(), probes: Vec::new(), failure: None }
    }

    /// The probes, with the clock's time of each.
    ///
    /// # Errors
    /// If the engine failed.
    pub fn into_probes(self) -> Result<Vec<(Nanos, Probe)>, ReplayError> {
        self.failure.map_or(Ok(self.probes), Err)
    }
}

impl Clock for ProbedClock<'_> {
    fn now(&mut self) -> Nanos {
        self.clock.now()
    }

    fn advance(&mut self, elapsed: Nanos) -> Nanos {
        let now = self.clock.advance(elapsed);
        let start = Instant::now();
        if start >= self.next && self.failure.is_none() {
            match self.clock.pause(|| self.profiler.probe()) {
                Ok(probe) => self.probes.push((now, probe)),
                Err(error) => self.failure = Some(error),
            }
            self.next = Instant::now() + start.elapsed();
        }
        now
    }

    fn wait_until(&mut self, time: Nanos) {
        self.clock.wait_until(time);
    }
}
