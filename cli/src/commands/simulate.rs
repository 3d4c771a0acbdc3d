//! `depthwise simulate`: a request trace through the simulator.

use std::path::PathBuf;

use anyhow::Result;

use crate::arguments::{ObjectiveArgs, SimulationArgs};
use crate::progress::Terminal;
use crate::report;
use experiments::results::ResultsFolder;
use experiments::runs::{RequestTimes, finish_results, run_simulations};

/// Simulate a request trace under every given combination of batching and exit policies
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    simulation: SimulationArgs,
    #[command(flatten)]
    objectives: ObjectiveArgs,
    /// Folder to write summary.csv and requests.csv to
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Args {
    /// See [`SimulationArgs::is_of_options`].
    pub fn is_of_options(&self) -> bool {
        self.simulation.is_of_options()
    }
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let mut folder = args.out.as_deref().map(|out| ResultsFolder::create(out, "simulate")).transpose()?;
    let input = args.simulation.load()?;
    let groups = input.groups();
    let (simulations, replicas) = (input.simulations(&groups)?, input.machines.replicas);
    let results = folder.as_mut().map(ResultsFolder::path).transpose()?;
    let runs = run_simulations(
        &simulations,
        replicas,
        args.objectives.objectives()?,
        &input.workload.requests,
        results.as_deref().map_or(RequestTimes::Dropped, RequestTimes::Written),
        &mut Terminal::default(),
    )?;
    if let Some(folder) = folder {
        finish_results(folder, "simulate", &args, &runs)?;
    }
    report::print_summaries(runs.iter().map(|run| &run.summary));
    report::print_groups(&runs);
    Ok(())
}
