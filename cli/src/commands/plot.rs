//! `depthwise plot`: the figures of a folder of results, drawn again.

use std::path::PathBuf;

use anyhow::Result;
use traces::LatencyProfile;

use crate::experiment::Experiment;
use crate::figures::{self, Caption};
use crate::results::CONFIG;

/// Draw the figures of a folder of results again, from its CSV files
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder that `depthwise run` or `depthwise validate` wrote
    results: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let experiment = Experiment::load(&args.results.join(CONFIG))?;
    let device = LatencyProfile::read(args.results.join("profile"))?.meta.device;
    figures::draw(&args.results, &Caption { setting: experiment.title, device })?;
    println!("Figures are in {}", args.results.join("figures").display());
    Ok(())
}
