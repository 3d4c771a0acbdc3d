//! `depthwise sweep`: every combination of what a YAML file lists, simulated.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use experiments::SweepSpec;
use experiments::sweep::figures::SWEEP_SUMMARY;
use experiments::sweep::{Earlier, SWEEP, SweepReport};

use crate::interrupt;
use crate::output::say;
use crate::progress::Terminal;

/// Simulate every combination of the policies, thresholds, batch limits, memory sizes, rates, seeds and systems that a
/// YAML file lists
///
/// Finished results are kept: after an interruption, the same command continues where it stopped.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Sweep, a YAML file
    config: PathBuf,
    /// Folder of results [default: results/ and the name of the sweep file]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Remove the results of an earlier sweep in the folder
    #[arg(long)]
    restart: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let spec = SweepSpec::load(&args.config)?;
    let base = args.config.parent().unwrap_or(Path::new(""));
    let name = args.config.file_stem().context("the sweep has no file name")?;
    let target = args.out.unwrap_or_else(|| Path::new("results").join(name));
    let earlier = if args.restart { Earlier::Remove } else { Earlier::Continue };
    let shown = target.display();
    interrupt::say(format!("what has finished is kept in {shown}; the same command goes on with the rest"));
    let report = experiments::sweep(&spec, base, &target, earlier, &mut Terminal::default());
    let SweepReport { simulations, earlier, summary } = report.with_context(|| args.config.display().to_string())?;
    let (settings, seeds) = (summary.lines.len(), spec.num_seeds());
    say!("{simulations} simulations, of which {earlier} were there already: {}", target.join(SWEEP).display());
    say!("{settings} means over {seeds} seeds: {}", target.join(SWEEP_SUMMARY).display());
    say!("Figures are in {}", target.join("figures").display());
    Ok(())
}
