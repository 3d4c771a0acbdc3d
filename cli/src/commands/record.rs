//! `depthwise record`: how sure the model is at each depth.

use std::path::PathBuf;

use anyhow::Result;

use crate::arguments::{EngineArgs, RequestArgs};
use crate::measure::record;
use crate::report;

/// Record an exit trace: real prompts at full depth, with every exit signal at every depth
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    requests: RequestArgs,
    /// Folder to write the exit trace to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let requests = args.requests.load()?.requests;
    let exits = record(&args.engine.load()?, &requests)?;
    exits.write(&args.out)?;
    report::print_exits(&exits);
    println!("\n{} tokens of {} generations: {}", exits.num_tokens(), exits.num_generations(), args.out.display());
    Ok(())
}
