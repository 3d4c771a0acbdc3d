//! `depthwise calibrate`: an exit threshold that keeps a tolerance.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use plots::{CalibratedThreshold, CalibrationLine, CalibrationPoint, Figure, Origin};
use scheduler::ExitPolicy;
use serde::Serialize;
use simulator::write_csv;
use traces::{ExitSignal, ExitTrace};
use training::calibration::{Calibration, Outcome, RiskTest, Target, calibrate, fewest_trials, thresholds_of};

use crate::output::say;
use crate::report::print_table;
use experiments::results::{CONFIG, ResultsFolder};

/// Choose the exit threshold of least depth whose tokens differ from those of full depth at most as often as tolerated,
/// with a chosen confidence
///
/// Learn then Test (arXiv 2110.01052), as in CALM (arXiv 2207.07061): thresholds are tested from the strictest on until
/// one fails. On an exit trace that was recorded under thresholds (`record --under`), these are tested, each on the requests
/// that were served under it. docs/explanation/evaluation.md says what is guaranteed, and what is not.
#[derive(Debug, Serialize, clap::Args)]
pub struct Args {
    /// Exit trace to calibrate on, as `depthwise record` writes it
    #[arg(long, value_name = "DIR")]
    exits: PathBuf,
    /// Another exit trace of the same model, to check the threshold on
    #[arg(long, value_name = "DIR")]
    held_out: Option<PathBuf>,
    /// Exit signal: top1, margin, entropy, similarity, difference, kl, gate
    #[arg(long)]
    measure: ExitSignal,
    /// Share of generated tokens that may differ from the full-depth token after the same prefix
    #[arg(long, default_value_t = 0.05, value_name = "SHARE")]
    tolerance: f64,
    /// Probability, over the draw of the calibration requests, that the tolerance is met
    #[arg(long, default_value_t = 0.95, value_name = "SHARE")]
    confidence: f64,
    /// Statistical test: betting or hoeffding-bentkus (share of the tokens of a request, averaged over independent
    /// requests), or binomial (share of all tokens, assuming independent tokens)
    #[arg(long, default_value_t = RiskTest::Betting)]
    test: RiskTest,
    /// Folder to write calibration.csv, held_out.csv and the figure to
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    for (name, share) in [("--tolerance", args.tolerance), ("--confidence", args.confidence)] {
        ensure!(share > 0.0 && share < 1.0, "{name} {share}: expected a share between 0 and 1");
    }
    let trace = ExitTrace::read(&args.exits)?;
    ensure!(trace.num_loops() > 1, "{}: the model has one loop, no token can exit early", args.exits.display());
    let held_out = args.held_out.as_deref().map(|folder| read_held_out(folder, &trace)).transpose()?;
    for (folder, trace) in std::iter::once((&args.exits, &trace)).chain(args.held_out.iter().zip(&held_out)) {
        check_measure(args.measure, folder, trace)?;
    }
    let folder = args.out.as_deref().map(|out| ResultsFolder::create(out, "calibrate")).transpose()?;
    let thresholds = thresholds_of(&trace, args.measure);
    ensure!(
        !thresholds.is_empty(),
        "{}: no request was recorded under a threshold of {measure}, expected some, as in `record --under {measure}:0.1`",
        args.exits.display(),
        measure = args.measure
    );
    let target = Target { tolerance: args.tolerance, confidence: args.confidence, test: args.test };
    let report = Report {
        found: calibrate(&trace, args.measure, &thresholds, &target),
        held_out: held_out.map(|trace| {
            thresholds
                .iter()
                .filter_map(|&threshold| Outcome::new(&trace, args.measure, threshold, args.test))
                .collect()
        }),
        args: &args,
        trace: &trace,
    };
    if let Some(mut folder) = folder {
        let written = folder.path()?;
        report.write(&written)?;
        let drawn = report.draw(&written);
        folder.finish()?;
        report.print();
        drawn.context("the results are complete, the figure is not")?;
    } else {
        report.print();
    }
    match report.found.chosen() {
        Some(chosen) => {
            let exit = ExitPolicy::Confidence { signal: args.measure, threshold: chosen.outcome.threshold };
            say!("\n--exit {exit}");
            Ok(())
        }
        None => bail!("{}", report.why_none(fewest_trials(&target))),
    }
}

/// Checks that a trace has a signal.
fn check_measure(measure: ExitSignal, folder: &Path, trace: &ExitTrace) -> Result<()> {
    let (folder, is_there) = (folder.display(), trace.recorded.contains(measure));
    match measure {
        ExitSignal::Gate => ensure!(is_there, "{folder}: the model has no gates, expected some for --measure gate"),
        _ => ensure!(is_there, "{folder}: no column `{measure}`, expected one, as `record` writes it now"),
    }
    Ok(())
}

/// Reads another trace of the same model.
fn read_held_out(folder: &Path, calibration: &ExitTrace) -> Result<ExitTrace> {
    let trace = ExitTrace::read(folder)?;
    ensure!(
        trace.meta.fingerprint == calibration.meta.fingerprint && trace.num_loops() == calibration.num_loops(),
        "{}: found an exit trace of `{}` ({} loops, fingerprint {}), expected the model of the calibration trace: `{}` \
         ({} loops, fingerprint {})",
        folder.display(),
        trace.meta.model,
        trace.num_loops(),
        trace.meta.fingerprint,
        calibration.meta.model,
        calibration.num_loops(),
        calibration.meta.fingerprint,
    );
    let fill = |trace: &ExitTrace| trace.meta.recording.as_ref().map(|recording| recording.kv_fill.clone());
    let shown =
        |trace: &ExitTrace| fill(trace).map_or("at full depth".to_owned(), |fill| format!("under KV fill {fill}"));
    ensure!(
        fill(&trace) == fill(calibration),
        "{}: recorded {}, expected {}, as the calibration trace",
        folder.display(),
        shown(&trace),
        shown(calibration)
    );
    Ok(trace)
}

/// What was found, and of what.
struct Report<'a> {
    args: &'a Args,
    trace: &'a ExitTrace,
    found: Calibration,
    /// All thresholds on the held-out trace, in the order of the candidates.
    held_out: Option<Vec<Outcome>>,
}

impl Report<'_> {
    fn setting(&self) -> String {
        let Args { tolerance, confidence, test, .. } = self.args;
        let of = match test {
            RiskTest::Binomial => "of all tokens may differ",
            _ => "of a request's tokens may differ, on average over requests",
        };
        format!("{}% {of}; confidence {}%, {test} test", percent(*tolerance), percent(*confidence))
    }

    fn calibrated_on(&self) -> String {
        let trace = self.trace;
        let served = trace.meta.recording.as_ref();
        let served = served.map_or(String::new(), |recording| format!(", served under KV fill {}", recording.kv_fill));
        format!("{} tokens of {} requests to {}{served}", trace.num_tokens(), trace.num_generations(), trace.meta.model)
    }

    fn print(&self) {
        say!("{} on {}\n{}\n", self.args.measure, self.calibrated_on(), self.setting());
        let line = |name: &str, outcome: &Outcome, p_value: Option<f64>| {
            vec![
                name.to_owned(),
                outcome.threshold.to_string(),
                p_value.map_or("-".to_owned(), |p_value| format!("{p_value:.4}")),
                format!("{:.2}%", 100.0 * outcome.risk),
                format!("{:.2}%", 100.0 * outcome.agreement),
                format!("{:.3}", outcome.mean_depth),
            ]
        };
        let mut lines = Vec::new();
        for (name, candidate) in [("chosen", self.found.chosen()), ("refused", self.found.refused())] {
            lines.extend(candidate.map(|found| line(name, &found.outcome, Some(found.evidence.p_value))));
        }
        if let (Some(chosen), Some(held_out)) = (self.found.chosen(), &self.held_out) {
            let outcome = held_out.iter().find(|outcome| outcome.threshold == chosen.outcome.threshold);
            lines.extend(outcome.map(|outcome| line("chosen, on held-out", outcome, None)));
        }
        print_table(&["", "threshold", "p-value", "tokens that differ", "token agreement", "mean depth"], lines);
    }

    fn why_none(&self, fewest: usize) -> String {
        let strictest = self.found.candidates.first().map_or((0, 0), |candidate| candidate.trials);
        let (found, what) = match self.args.test {
            RiskTest::Binomial => (strictest.1, "tokens"),
            _ => (strictest.0, "requests"),
        };
        let none = format!("no threshold of {} was shown to keep the tolerance", self.args.measure);
        match found < fewest {
            true if self.trace.served.is_some() => {
                format!("{none}: {found} {what} under the strictest threshold, expected at least {fewest}")
            }
            true => format!("{none}: {found} {what}, expected at least {fewest}"),
            false => format!("{none}: not even the strictest"),
        }
    }

    fn write(&self, folder: &Path) -> Result<()> {
        std::fs::write(folder.join(CONFIG), serde_yaml::to_string(self.args)?)?;
        let lines = self.found.candidates.iter().map(|candidate| (candidate.outcome, candidate.evidence));
        write_csv(&folder.join("calibration.csv"), lines)?;
        if let Some(held_out) = &self.held_out {
            write_csv(&folder.join("held_out.csv"), held_out)?;
        }
        Ok(())
    }

    fn draw(&self, folder: &Path) -> Result<()> {
        let figure = Figure {
            folder: folder.to_owned(),
            name: "calibration".to_owned(),
            title: format!("Tokens that differ and mean depth by threshold of {}", self.args.measure),
            setting: self.setting(),
            device: self.calibrated_on(),
            origin: Origin::Measured,
        };
        Ok(plots::or_left_out(plots::calibration(&figure, &self.drawn()))?)
    }

    fn drawn(&self) -> CalibratedThreshold {
        let calibration: Vec<Outcome> = self.found.candidates.iter().map(|candidate| candidate.outcome).collect();
        let shown = changing(&calibration);
        let point = |&Outcome { threshold, risk, mean_depth, .. }: &Outcome| CalibrationPoint {
            threshold: decimal(threshold),
            risk,
            mean_depth,
        };
        let shown: Vec<f32> = calibration[shown].iter().map(|outcome| outcome.threshold).collect();
        let line = |name: &str, outcomes: &[Outcome]| CalibrationLine {
            name: name.to_owned(),
            points: outcomes.iter().filter(|outcome| shown.contains(&outcome.threshold)).map(point).collect(),
        };
        let held_out = self.held_out.iter().map(|outcomes| line("held-out", outcomes));
        CalibratedThreshold {
            signal: self.args.measure.to_string(),
            tolerance: self.args.tolerance,
            chosen: self.found.chosen().map(|chosen| decimal(chosen.outcome.threshold)),
            lines: std::iter::once(line("calibration", &calibration)).chain(held_out).collect(),
        }
    }
}

/// A threshold's decimal number, which its `f32` is nearest to.
fn decimal(threshold: f32) -> f64 {
    threshold.to_string().parse().unwrap_or(f64::from(threshold))
}

/// A share in percent, without the noise of binary fractions.
fn percent(share: f64) -> f64 {
    (share * 1e6).round() / 1e4
}

/// The thresholds between which the mean depth changes, with one more on either side.
fn changing(outcomes: &[Outcome]) -> std::ops::Range<usize> {
    let depth = |index: usize| outcomes[index].mean_depth;
    let last = outcomes.len() - 1;
    let from = (0..last).find(|&index| depth(index + 1) != depth(0)).unwrap_or(0);
    let to = (1..=last).rev().find(|&index| depth(index - 1) != depth(last)).unwrap_or(last);
    from..to + 1
}
