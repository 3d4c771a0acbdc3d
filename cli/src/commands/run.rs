//! `depthwise run`: an experiment from beginning to end.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use experiments::experiment::Experiment;
use experiments::run::{LoadReport, Report};

use crate::output::say;
use crate::progress::Terminal;
use crate::report;

/// Run an experiment: measure, replay, simulate, compare and draw figures
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Experiment, a YAML file
    config: PathBuf,
    /// Folder of results [default: results/ and the name of the experiment file]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let experiment = Experiment::load(&args.config)?;
    let base = args.config.parent().unwrap_or(Path::new(""));
    let name = args.config.file_stem().context("the experiment has no file name")?;
    let target = args.out.unwrap_or_else(|| Path::new("results").join(name));
    let report = experiments::run(&experiment, base, &target, &mut Terminal::default());
    match report.with_context(|| args.config.display().to_string())? {
        Report::Measured(loads) => loads.iter().for_each(print_load),
        Report::Validated(report) => report::print_validation(&report),
        Report::Systems(lines) => {
            report::print_systems(&lines);
            report::print_memory(lines.iter().map(|(_, summary)| summary));
        }
    }
    say!("\nResults are in {}", target.display());
    Ok(())
}

/// Prints what was measured and simulated at one load.
fn print_load(load: &LoadReport) {
    if let Some(share) = load.load {
        say!("\nat {:.0}% of the capacity:", 100.0 * share);
    }
    report::print_summaries(&load.runs);
    report::print_speedup(&load.repeats);
    report::print_headline(&load.repeats);
    report::print_table_of_errors(&load.validation);
}
