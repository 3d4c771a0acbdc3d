//! A latency profile of a model on this machine.

use anyhow::{Result, ensure};
use engine::{Grid, Limits, Profiler};
use latency::LatencyModel;
use scheduler::{Lengths, Settings};
use traces::{LatencyProfile, PassLog, PassRun, Request};

use crate::named_engine::{NamedEngine, pass_log_meta};
use crate::reporter::Reporter;

/// Slowdown by other work above which measurements are not to be trusted.
const BUSY: f64 = 1.1;
/// Difference between two halves of a profile above which it is not to be trusted.
const UNSTEADY: f64 = 0.05;

/// Measures what the components of a pass take up to `limits`, every shape anew in each of `rounds`: the profile, and the
/// passes that it was made from.
///
/// # Errors
/// If there is no round, or the engine cannot run the passes.
pub fn profile(
    named: &NamedEngine,
    limits: Limits,
    rounds: usize,
    reporter: &mut dyn Reporter,
) -> Result<(LatencyProfile, PassLog)> {
    named.check_memory(u64::from(limits.decodes) * u64::from(limits.history))?;
    // Half of the longest sequence is prompt, and an eighth of it to three is generated.
    let longest = limits.history;
    let lengths = Lengths { prompt: longest / 2, output: longest / 4, longest };
    let profiled = Profiled::measure(named, limits, lengths, rounds, reporter)?;
    let passes = PassLog { meta: pass_log_meta(named), runs: profiled.passes().collect() };
    Ok((profiled.profile(&format!("depthwise profile, {rounds} rounds"))?, passes))
}

/// A complete profile, round by round.
pub(crate) struct Profiled<'e> {
    profiler: Profiler,
    named: &'e NamedEngine,
    rounds: usize,
}

impl<'e> Profiled<'e> {
    /// Rounds from which a profile is more than a quick look.
    const FEWEST_OF_MANY_CYCLES: usize = 3;
    /// Cycles of probes in a round then. How two ways to serve the load compare scatters by 15% to 20% from one cycle to the next
    /// on a shared host.
    const MANY_CYCLES: usize = 12;

    /// Measures a profile, and warns where it is not to be trusted. `lengths` are those of the steady load's sequences.
    ///
    /// # Errors
    /// If there is no round, or the engine cannot run the passes.
    pub fn measure(
        named: &'e NamedEngine,
        limits: Limits,
        lengths: Lengths,
        rounds: usize,
        reporter: &mut dyn Reporter,
    ) -> Result<Self> {
        ensure!(rounds > 0, "0 rounds: expected at least 1");
        let mut profiler = Profiler::new(&named.engine, Grid::up_to(limits), lengths)?;
        if rounds >= Self::FEWEST_OF_MANY_CYCLES {
            profiler = profiler.with_cycles(Self::MANY_CYCLES);
        }
        let mut profiled = Self { profiler, named, rounds };
        profiled.measure_rounds("profile", reporter)?;
        warn_of_noise(&profiled.profiler, reporter);
        Ok(profiled)
    }

    fn measure_rounds(&mut self, what: &str, reporter: &mut dyn Reporter) -> Result<()> {
        let rounds = self.rounds;
        for round in 1..=rounds {
            let mut measured = 0;
            self.profiler.round(|done, of| {
                if measured == 0 {
                    reporter.start(of * rounds, of * (round - 1));
                    reporter.message(&format!("{what}, round {round} of {rounds}"));
                }
                reporter.advance(done - measured);
                measured = done;
            })?;
        }
        reporter.finish();
        Ok(())
    }

    /// The profile.
    ///
    /// # Errors
    /// If it cannot be interpolated.
    pub fn profile(&self, source: &str) -> Result<LatencyProfile> {
        Ok(self.profiler.profile(0..self.rounds, &self.named.name, source)?)
    }

    /// Latency models of the profile without each of its rounds in turn; none of a single round.
    ///
    /// # Errors
    /// If one cannot be interpolated.
    pub fn without_a_round(&self) -> Result<Vec<LatencyModel>> {
        let left_out = if self.rounds > 1 { 0..self.rounds } else { 0..0 };
        let model = |left_out| {
            let rounds = (0..self.rounds).filter(|&round| round != left_out);
            let profile = self.profiler.profile(rounds, &self.named.name, "without a round")?;
            Ok(LatencyModel::new(&profile)?)
        };
        left_out.map(model).collect()
    }

    /// Measures the same number of rounds again: the model of another profile, of a later moment.
    ///
    /// # Errors
    /// If the engine cannot run the passes.
    pub fn repeat(&mut self, reporter: &mut dyn Reporter) -> Result<LatencyModel> {
        self.measure_rounds("repeat of the profile", reporter)?;
        let profile = self.profiler.profile(self.rounds..2 * self.rounds, &self.named.name, "a repeat")?;
        Ok(LatencyModel::new(&profile)?)
    }

    /// Every pass that was measured.
    pub fn passes(&self) -> impl Iterator<Item = PassRun> {
        self.profiler.pass_runs()
    }
}

/// Says so where other work on the machine has spoiled a profile.
fn warn_of_noise(profiler: &Profiler, reporter: &mut dyn Reporter) {
    let slowdown = profiler.measured().slowdown();
    if slowdown > BUSY {
        reporter.warning(&format!(
            "other work on this machine made passes {slowdown:.2} times as long: measure again at rest"
        ));
    }
    if let Some(share) = profiler.disagreement().filter(|&share| share > UNSTEADY) {
        reporter.warning(&format!(
            "two halves of the profile differ by {:.1}%, more than {:.0}%: measure again at rest, or with more rounds",
            100.0 * share,
            100.0 * UNSTEADY
        ));
    }
}

/// What runs under these settings ask of a machine at most.
pub(crate) fn limits<'a>(settings: impl Iterator<Item = &'a Settings> + Clone, requests: &[Request]) -> Limits {
    let longest = requests.iter().map(Request::context_tokens).max().unwrap_or(1);
    let longest_prompt = requests.iter().map(|request| request.prompt_tokens).max().unwrap_or(1);
    let most = |count: fn(&Settings) -> u32| settings.clone().map(count).max().unwrap_or(1);
    let decodes = most(|settings| settings.max_batch);
    let chunk = most(|settings| settings.prefill_chunk).min(longest_prompt);
    Limits { rows: most(|settings| settings.token_budget), decodes, history: longest, chunk }
}

/// How long requests are on average, and the longest of them.
pub(crate) fn lengths(requests: &[Request]) -> Lengths {
    let mean = |tokens: fn(&Request) -> u32| {
        let sum: u64 = requests.iter().map(|request| u64::from(tokens(request))).sum();
        (sum as f64 / requests.len().max(1) as f64).round() as u32
    };
    let longest = requests.iter().map(Request::context_tokens).max().unwrap_or(1);
    Lengths { prompt: mean(|request| request.prompt_tokens), output: mean(|request| request.output_tokens), longest }
}
