//! `depthwise replay`: a request trace through the engine.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use engine::Idle;
use traces::{ExitTrace, Request};

use crate::arguments::{EngineArgs, RequestArgs, ServingArgs};
use crate::progress::Terminal;
use crate::report;
use experiments::NamedEngine;
use experiments::results::{PASS_LOG, ResultsFolder};
use experiments::runs::write_results;

/// Serve a request trace with the engine under every given combination of batching and exit policies
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    requests: RequestArgs,
    #[command(flatten)]
    serving: ServingArgs,
    /// Exit trace of the same requests, for oracle:recorded [default: record one first]
    #[arg(long, value_name = "DIR")]
    exits: Option<PathBuf>,
    /// Wait for arrivals in real time instead of skipping idle time
    #[arg(long)]
    real_time: bool,
    /// Folder to write summary.csv, requests.csv and passes.parquet to
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let folder = args.out.as_deref().map(|out| ResultsFolder::create(out, "replay")).transpose()?;
    let serving = args.serving.serving();
    serving.check_for_engine()?;
    let mut workload = args.requests.workload(args.engine.seed)?;
    let mut named = args.engine.load()?;
    named.fit(&mut workload.requests, workload.prefixes.take());
    let settings = serving.all_settings(&named.memory(), &workload.requests)?;
    let exits = args.exits.as_deref().map(|folder| exits(folder, &named, &workload.requests)).transpose()?;
    let idle = if args.real_time { Idle::Sleep } else { Idle::Skip };
    let (runs, passes) =
        experiments::replay(&named, &settings, &workload, exits.as_ref(), idle, &mut Terminal::default())?;
    if let Some(mut folder) = folder {
        passes.write(folder.path()?.join(PASS_LOG))?;
        write_results(folder, "replay", &args, &runs)?;
    }
    report::print_summaries(runs.iter().map(|run| &run.summary));
    let repeats = [runs.into_iter().map(|run| run.summary).collect()];
    report::print_speedup(&repeats);
    report::print_headline(&repeats);
    Ok(())
}

/// Reads the exit trace given, if it is of this model and these requests.
fn exits(folder: &Path, named: &NamedEngine, requests: &[Request]) -> Result<ExitTrace> {
    let exits = ExitTrace::read(folder)?;
    let (recorded, model) = (&exits.meta.fingerprint, named.engine.model.fingerprint());
    ensure!(recorded == model, "{}: recorded of model {recorded}, expected {model}", folder.display());
    ensure!(
        exits.num_generations() == requests.len(),
        "{}: {} generations, expected one for each of {} requests",
        folder.display(),
        exits.num_generations(),
        requests.len()
    );
    Ok(exits)
}
