//! `depthwise replay`: a request trace through the engine.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use engine::Idle;
use traces::{ExitTrace, LatencyProfile, Request, TraceError};

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
    /// Exit trace of the model and the same requests, for oracle:recorded [default: record one first]; or one that fits any
    /// model (`trace script-exits`, `trace draw-exits`): every policy then reads its signals instead of the model's
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
    let read = |folder| Ok::<_, TraceError>((folder, ExitTrace::read(folder)?));
    let (mut named, recorded) = match args.exits.as_deref().map(read).transpose()? {
        Some((folder, exits)) if exits.meta.fingerprint == LatencyProfile::ANY_MODEL => {
            (args.engine.load_following(exits).with_context(|| folder.display().to_string())?, None)
        }
        recorded => (args.engine.load()?, recorded),
    };
    named.fit(&mut workload.requests, workload.prefixes.take());
    let settings = serving.all_settings(&named.memory(), &workload.requests)?;
    if let Some((folder, exits)) = &recorded {
        check_recorded(folder, exits, &named, &workload.requests)?;
    }
    let exits = recorded.as_ref().map(|(_, exits)| exits);
    let idle = if args.real_time { Idle::Sleep } else { Idle::Skip };
    let (runs, passes) = experiments::replay(&named, &settings, &workload, exits, idle, &mut Terminal::default())?;
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

/// Checks that an exit trace is of this model and these requests.
fn check_recorded(folder: &Path, exits: &ExitTrace, named: &NamedEngine, requests: &[Request]) -> Result<()> {
    let (recorded, model) = (&exits.meta.fingerprint, named.engine.model.fingerprint());
    ensure!(
        recorded == model,
        "{}: recorded of model {recorded}, expected {model}, or `{}` (`depthwise trace script-exits` makes a recording fit \
         any model)",
        folder.display(),
        LatencyProfile::ANY_MODEL
    );
    ensure!(
        exits.num_generations() == requests.len(),
        "{}: {} generations, expected one for each of {} requests",
        folder.display(),
        exits.num_generations(),
        requests.len()
    );
    Ok(())
}
