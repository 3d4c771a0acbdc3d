//! `depthwise replay`: a request trace through the engine.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, ensure};
use engine::clock::Idle;
use engine::replay::oracle_depths;
use scheduler::{Look, Settings};
use traces::{ExitTrace, Request};

use crate::arguments::{EngineArgs, RequestArgs, ServingArgs};
use crate::measure::{NamedEngine, record, replay};
use crate::progress::progress;
use crate::report;
use crate::results::ResultsFolder;
use crate::runs::write_results;

/// Replay a request trace on the engine, under every batching and exit policy asked for
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    requests: RequestArgs,
    #[command(flatten)]
    serving: ServingArgs,
    /// Exit trace of the same requests, for the oracle [default: it is recorded first]
    #[arg(long, value_name = "DIR")]
    exits: Option<PathBuf>,
    /// Wait for arrivals as long as the trace says, instead of skipping idle time
    #[arg(long)]
    real_time: bool,
    /// Folder to write summary.csv and requests.csv to
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let folder = args.out.as_deref().map(ResultsFolder::create).transpose()?;
    let serving = args.serving.serving();
    serving.check_for_engine()?;
    let requests = args.requests.load()?.requests;
    let named = args.engine.load()?;
    let settings = serving.all_settings(&named.memory(), &requests)?;
    settings.iter().try_for_each(|settings| named.engine.check_settings(settings))?;
    let needs_oracle = settings.iter().any(|settings| settings.exit.look() == Look::Oracle);
    let oracle = Arc::new(match needs_oracle {
        true => oracle_depths(&exits(&args, &named, &requests)?, &requests),
        false => Default::default(),
    });
    let idle = if args.real_time { Idle::Sleep } else { Idle::Skip };
    let bar = progress(settings.len());
    let runs = settings
        .iter()
        .map(|&settings: &Settings| {
            bar.set_message(format!("{}, {}", settings.batching, settings.exit));
            let run = replay(&named.engine, settings, &requests, &oracle, idle, None);
            bar.inc(1);
            run
        })
        .collect::<Result<Vec<_>>>()?;
    bar.finish_and_clear();
    report::print_summaries(runs.iter().map(|run| &run.summary));
    match folder {
        Some(folder) => write_results(folder, "replay", &args, &runs),
        None => Ok(()),
    }
}

/// The exit trace given, if it is of this model and these requests; else a new one.
fn exits(args: &Args, named: &NamedEngine, requests: &[Request]) -> Result<ExitTrace> {
    let Some(folder) = &args.exits else { return record(named, requests) };
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
