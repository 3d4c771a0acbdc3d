//! `depthwise sweep`: every combination of what a YAML file lists, simulated.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use simulator::Points;

use crate::progress::progress;
use crate::runs::warn_of_extrapolations;
use crate::sweep::figures::{SWEEP_SUMMARY, draw_sweep};
use crate::sweep::folder::{self, Inputs};
use crate::sweep::plan::{Plan, SETTINGS};
use crate::sweep::spec::SweepSpec;

/// A line for each point of the grid and each seed.
pub const SWEEP: &str = "sweep.csv";

/// Simulate every combination of what a YAML file lists: policies, thresholds, batch limits, memory, rates, seeds, systems
///
/// Results are kept as they come: after an interruption, the same command goes on where it stopped.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The sweep, a YAML file
    config: PathBuf,
    /// Folder of results [default: results/ and the sweep's file name]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Remove what an earlier sweep left in the folder
    #[arg(long)]
    restart: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let spec = SweepSpec::load(&args.config)?;
    let base = args.config.parent().unwrap_or(Path::new(""));
    let name = args.config.file_stem().context("the sweep has no file name")?;
    let target = args.out.unwrap_or_else(|| Path::new("results").join(name));
    sweep(&spec, base, &target, args.restart).with_context(|| args.config.display().to_string())
}

fn sweep(spec: &SweepSpec, base: &Path, target: &Path, restart: bool) -> Result<()> {
    let plan = Plan::new(spec, base)?;
    folder::open(target, spec, &Inputs::new(spec, base, "sweep")?, restart)?;
    folder::say_on_interrupt(target)?;
    let points = Points::open(&target.join(SWEEP), plan.len())?;
    let bar = progress(plan.len()).with_position(points.done() as u64);
    bar.reset_eta();
    let earlier = points.done();
    let table = points.complete(|index| plan.simulate(index), || bar.inc(1))?;
    bar.finish_and_clear();
    let summary = table.over_seeds(spec.num_seeds(), &SETTINGS);
    summary.write(&target.join(SWEEP_SUMMARY))?;
    warn_of_extrapolations(&plan.extrapolations());
    draw_sweep(target, &spec.title)?;
    let (simulations, settings, seeds) = (plan.len(), summary.lines.len(), spec.num_seeds());
    println!("{simulations} simulations, of which {earlier} were there already: {}", target.join(SWEEP).display());
    println!("{settings} means over {seeds} seeds: {}", target.join(SWEEP_SUMMARY).display());
    println!("Figures are in {}", target.join("figures").display());
    Ok(())
}
