//! Probes: the machine's speed under a steady load, at one moment of a profile.

use latency::TimedPass;
use scheduler::Settings;
use traces::{LoggedPass, Nanos, PassOrigin, PassRun, PassWork};

/// Multiple of its usual time from which a pass was interrupted by other work on the machine.
const INTERRUPTED: f64 = 3.0;
/// Maximum number of passes of a probe that go into a pass log.
const LOGGED: usize = 256;

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

    /// Passes of the probe, evenly spread over it, as a run of a pass log; `settings` are those of the load, `repeat` is the
    /// number of the probe.
    pub fn into_run(mut self, settings: &Settings, repeat: u32) -> PassRun {
        let each = self.passes.len().div_ceil(LOGGED).max(1);
        self.passes = self.passes.drain(..).step_by(each).collect();
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

/// The passes of cycles of probes, with the times that they would have taken at the mean pace of the cycles. The pace of a cycle
/// is the median of its passes' times over `modelled` times, in nanoseconds. The middle half of the cycles counts. A pass counts as
/// at most [`INTERRUPTED`] times its usual time.
pub(super) fn at_one_pace<'c, 'p: 'c>(
    cycles: impl Iterator<Item = &'c [&'p Probe]>,
    modelled: impl Fn(&PassWork) -> f64,
) -> Vec<TimedPass<'p>> {
    /// Passes with their times over modelled ones.
    type Cycle<'p> = (f64, Vec<(&'p LoggedPass, f64)>);
    let with_pace = |cycle: &'c [&'p Probe]| -> Cycle<'p> {
        let passes = cycle.iter().flat_map(|&probe| &probe.passes);
        let passes: Vec<_> = passes.map(|pass| (pass, pass.elapsed.0 as f64 / modelled(&pass.work))).collect();
        let mut ratios: Vec<f64> = passes.iter().map(|&(_, ratio)| ratio).collect();
        ratios.sort_unstable_by(f64::total_cmp);
        (ratios[ratios.len() / 2], passes)
    };
    let mut cycles: Vec<Cycle<'p>> = cycles.map(with_pace).collect();
    cycles.sort_by(|a, b| a.0.total_cmp(&b.0));
    let quarter = cycles.len() / 4;
    let middle = &cycles[quarter..cycles.len() - quarter];
    let mean_pace = middle.iter().map(|cycle| cycle.0).sum::<f64>() / middle.len() as f64;
    let at_mean_pace = |(pace, passes): &Cycle<'p>| {
        let timed = |&(pass, ratio): &(&'p LoggedPass, f64)| {
            let uninterrupted = (INTERRUPTED * pace / ratio).min(1.0);
            let ns = pass.elapsed.0 as f64 * uninterrupted * mean_pace / pace;
            (&pass.work, Nanos(ns.round() as u64))
        };
        passes.iter().map(timed).collect::<Vec<_>>()
    };
    middle.iter().flat_map(at_mean_pace).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_half_of_the_cycles_counts_at_its_mean_pace() {
        let probe = |times: &[u64]| {
            let pass = |&ns: &u64| LoggedPass { elapsed: Nanos(ns), ..LoggedPass::default() };
            Probe { way: 0, passes: times.iter().map(pass).collect(), elapsed: Nanos(0) }
        };
        // Passes that should take 1,000 ns, on a machine of five speeds; one pass is interrupted.
        let probes = [[1000, 900], [2000, 2000], [1300, 1000], [1000, 99_000], [1100, 1100]].map(|times| probe(&times));
        let calm = probe(&[1000, 1000, 1100]);
        let cycles: Vec<Vec<&Probe>> = probes.iter().map(|probe| vec![probe, &calm]).collect();
        let paces: Vec<f64> = at_one_pace(cycles.iter().map(Vec::as_slice), |_| 1e3)
            .iter()
            .map(|(_, time)| time.0 as f64 / 1e3)
            .collect();
        // Medians are 1, 1.1, 1, 1 and 1.1 times 1,000 ns: the first and the last cycle do not count.
        let mean_pace = (1.0 + 1.0 + 1.1) / 3.0;
        let at_pace = |of: f64| paces.iter().filter(|&&pace| (pace - of * mean_pace).abs() < 1e-3).count();
        assert_eq!((at_pace(1.0), at_pace(1.3), at_pace(3.0)), (7, 1, 1), "{paces:?}");
        assert_eq!(paces.len(), 15);
    }
}
