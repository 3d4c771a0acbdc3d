//! `depthwise simulate`: a request trace through the simulator.

use std::path::PathBuf;

use anyhow::Result;
use simulator::{Draw, write_csv};
use traces::{ExitTrace, LatencyProfile, check_same_model};

use crate::arguments::{RequestArgs, ServingArgs};
use crate::report;
use crate::results::{CONFIG, ResultsFolder};
use crate::runs::{Run, simulate_all, write_requests};

/// Replay a request trace in the simulator, under every batching and exit policy asked for
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    requests: RequestArgs,
    /// Folder of a latency profile
    #[arg(long, value_name = "DIR")]
    profile: PathBuf,
    /// Folder of an exit trace
    #[arg(long, value_name = "DIR")]
    exits: PathBuf,
    #[command(flatten)]
    serving: ServingArgs,
    /// Seed of what is drawn at random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder to write summary.csv and requests.csv to
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let folder = args.out.as_deref().map(ResultsFolder::create).transpose()?;
    let requests = args.requests.load()?;
    let profile = LatencyProfile::read(&args.profile)?;
    let exits = ExitTrace::read(&args.exits)?;
    check_same_model(&profile, &exits)?;

    let serving = args.serving.serving();
    let settings = serving.all_settings(exits.meta.num_loops as u8, &requests.requests);
    let runs = simulate_all(&settings, &profile, &exits, Draw::Seeded(args.seed), &requests.requests)?;
    report::print_summaries(runs.iter().map(|run| &run.summary));
    match folder {
        Some(folder) => write(folder, &args, &runs),
        None => Ok(()),
    }
}

fn write(folder: ResultsFolder, args: &Args, runs: &[Run]) -> Result<()> {
    std::fs::write(folder.path().join(CONFIG), format!("command: simulate\narguments: |\n  {args:?}\n"))?;
    write_csv(&folder.path().join("summary.csv"), runs.iter().map(|run| &run.summary))?;
    write_requests(folder.path(), runs)?;
    folder.finish()
}
