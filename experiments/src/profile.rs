//! A latency profile of a model on this machine.

use anyhow::{Result, ensure};
use engine::{Grid, Limits, Profiler};
use scheduler::Lengths;
use traces::{LatencyProfile, PassLog};

use crate::measure::{NamedEngine, pass_log_meta, warn_of_noise};
use crate::reporter::Reporter;

/// Measures what the components of a pass take up to `limits`, every shape anew in each of `rounds`: the profile, and the
/// passes of the steady load that it was scaled by.
///
/// # Errors
/// If there is no round, or the engine cannot run the passes.
pub fn profile(
    named: &NamedEngine,
    limits: Limits,
    rounds: usize,
    reporter: &mut dyn Reporter,
) -> Result<(LatencyProfile, PassLog)> {
    ensure!(rounds > 0, "0 rounds: expected at least 1");
    named.check_memory(u64::from(limits.decodes) * u64::from(limits.history))?;
    // Half of the longest sequence is prompt, and an eighth of it to three is generated.
    let longest = limits.history;
    let lengths = Lengths { prompt: longest / 2, output: longest / 4, longest };
    let mut profiler = Profiler::new(&named.engine, Grid::up_to(limits), lengths)?;
    for round in 1..=rounds {
        let mut measured = 0;
        profiler.round(|done, of| {
            if measured == 0 {
                reporter.start(of * rounds, of * (round - 1));
                reporter.message(&format!("round {round} of {rounds}"));
            }
            reporter.advance(done - measured);
            measured = done;
        })?;
    }
    reporter.finish();
    warn_of_noise(&profiler, reporter);
    let source = format!("depthwise profile, {rounds} rounds");
    let passes = PassLog { meta: pass_log_meta(named), runs: profiler.steady_runs(std::iter::empty()).collect() };
    Ok((profiler.profile(&named.name, &source, std::iter::empty())?, passes))
}
