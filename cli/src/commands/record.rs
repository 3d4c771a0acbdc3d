//! `depthwise record`: how sure the model is at each depth.

use std::path::PathBuf;

use anyhow::Result;
use traces::ExitTable;

use crate::arguments::{EngineArgs, RequestArgs};
use crate::output::say;
use crate::progress::Terminal;
use crate::report;
use experiments::results::ResultsFolder;

/// Record an exit trace: run prompts at full depth and write every exit signal at every depth
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    requests: RequestArgs,
    /// Folder to write the exit trace to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Write exits.csv instead of exits.parquet: three times the size, but readable by people
    #[arg(long)]
    csv: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let mut folder = ResultsFolder::create(&args.out, "record")?;
    let mut requests = args.requests.load()?.requests;
    let named = args.engine.load()?;
    named.engine.prompts.set_lengths(&mut requests);
    let table = if args.csv { ExitTable::Csv } else { ExitTable::Parquet };
    let tally = experiments::record(&named, &requests, &folder.path()?, table, &mut Terminal::default())?;
    folder.finish()?;
    report::print_exits(&tally);
    say!("\n{} tokens of {} generations: {}", tally.tokens(), requests.len(), args.out.display());
    Ok(())
}
