//! `depthwise plot`: the figures of a folder of results, drawn again; the loss curves of several runs, one over the other.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use traces::LatencyProfile;
use training::trainer::LOSS_FILE;

use crate::progress::Terminal;
use experiments::experiment::Experiment;
use experiments::figures::{self, Caption};
use experiments::loss_figure;
use experiments::results::CONFIG;
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
    let results: Vec<&Path> = args.results.iter().map(PathBuf::as_path).collect();
    let folder = match results[..] {
        [first, ..] if first.join(LOSS_FILE).exists() => {
            let folder = args.out.unwrap_or_else(|| first.join("figures"));
            loss_figure::draw(&results, &folder)?;
            folder
        }
        [results] if args.out.is_none() => {
            draw_results(results)?;
            results.join("figures")
        }
        _ => bail!("several folders and --out are for training runs: {} has no {LOSS_FILE}", results[0].display()),
    };
    println!("Figures are in {}", folder.display());
    Ok(())
}

fn draw_results(results: &Path) -> Result<()> {
    let config = results.join(CONFIG);
    if results.join(SWEEP_SUMMARY).exists() {
        draw_sweep(results, &SweepSpec::load(&config)?.title, &mut Terminal::default())
    } else if results.join(CAPACITY_SUMMARY).exists() {
        draw_capacity(results, &SweepSpec::load(&config)?, &mut Terminal::default())
    } else {
        draw_experiment(results, &Experiment::load(&config)?)
    }
}

fn draw_experiment(results: &Path, experiment: &Experiment) -> Result<()> {
    let device = LatencyProfile::read(results.join("profile"))?.meta.device;
    figures::draw(results, &Caption { setting: experiment.title.clone(), device })
}
