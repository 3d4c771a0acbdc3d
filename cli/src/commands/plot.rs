//! `depthwise plot`: the figures of a folder of results, drawn again; the loss curves of several runs, one over the other.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use traces::LatencyProfile;
use training::trainer::LOSS_FILE;

use crate::output::say;
use crate::progress::Terminal;
use experiments::experiment::Experiment;
use experiments::figures::{self, Caption};
use experiments::loss_figure;
use experiments::results::{CONFIG, ResultsFolder};
use experiments::sweep::figures::{CAPACITY_SUMMARY, SWEEP_SUMMARY, draw_capacity, draw_sweep};
use experiments::sweep::spec::SweepSpec;

/// Draw the figures of a folder of results again from its CSV files, or the loss curves of training runs
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder that `run`, `validate`, `sweep` or `capacity` wrote, or folders that `train` wrote
    #[arg(required = true, num_args = 1..)]
    results: Vec<PathBuf>,
    /// Folder for the figures [default: `figures` in the first folder]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let runs: Vec<&Path> = args.results.iter().map(PathBuf::as_path).collect();
    let first = runs[0];
    let are_trained = first.join(LOSS_FILE).exists();
    ensure!(
        are_trained || runs.len() == 1,
        "several folders are for training runs: {} has no {LOSS_FILE}",
        first.display()
    );
    let (mut folder, shown) = match &args.out {
        Some(out) => (ResultsFolder::create(out, "plot")?, out.clone()),
        None => (ResultsFolder::add(first)?, first.join("figures")),
    };
    let mut figures = folder.path()?;
    if args.out.is_none() {
        figures.push("figures");
    }
    match are_trained {
        true => loss_figure::draw(&runs, &figures)?,
        false => draw_results(first, &figures)?,
    }
    folder.finish()?;
    say!("Figures are in {}", shown.display());
    Ok(())
}

fn draw_results(results: &Path, figures: &Path) -> Result<()> {
    let config = results.join(CONFIG);
    if results.join(SWEEP_SUMMARY).exists() {
        draw_sweep(results, figures, &SweepSpec::load(&config)?.title, &mut Terminal::default())
    } else if results.join(CAPACITY_SUMMARY).exists() {
        draw_capacity(results, figures, &SweepSpec::load(&config)?, &mut Terminal::default())
    } else {
        let experiment = Experiment::load(&config)?;
        let device = LatencyProfile::read(results.join("profile"))?.meta.device;
        figures::draw(results, figures, &Caption { setting: experiment.title, device })
    }
}
