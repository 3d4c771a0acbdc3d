//! Probes: the machine's speed under a steady load, at one moment of a profile.

use scheduler::Settings;
use traces::{LoggedPass, Nanos, PassOrigin, PassRun};

/// The machine's speed at one moment: some passes of the profiler's steady load.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Way in which the load was served: an index into [`Profiler::loads`](super::Profiler::loads).
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
