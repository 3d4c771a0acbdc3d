//! `depthwise record`: how sure the model is at each depth.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use engine::{Exiting, RecordedPolicy};
use scheduler::KvFill;
use traces::{ExitTable, RequestTrace};

use crate::arguments::{EngineArgs, RequestArgs};
use crate::output::say;
use crate::progress::Terminal;
use crate::report;
use experiments::record::Recorded;
use experiments::results::ResultsFolder;

/// Record an exit trace: run prompts at full depth, or under exit policies, and write every exit signal at every depth
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    requests: RequestArgs,
    /// Exit policies to record under, separated by commas: those of `replay --exit`, and random:P, which exits at each
    /// depth with probability P. Each request is served under one of them, drawn at random. Tokens run on to the last
    /// depth after their exit, but leave no keys and values there [default: every token runs every depth]
    #[arg(long, value_delimiter = ',', value_name = "POLICIES")]
    under: Option<Vec<RecordedPolicy>>,
    /// What later tokens find at the depths that an exited token did not run, under --under: reuse, first, skip, backfill,
    /// last, cycle:SLOTS
    /// [default: that which the model is made for]
    #[arg(long, value_name = "FILL", requires = "under")]
    kv_fill: Option<KvFill>,
    /// Last depth, from 0, that tokens of prompts run, under --under [default: every depth]
    #[arg(long, value_name = "DEPTH", requires = "under")]
    prefill_depth: Option<u8>,
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
    let RequestTrace { mut requests, prefix_hashes, .. } = args.requests.load()?;
    let mut named = args.engine.load()?;
    named.fit(&mut requests, prefix_hashes.map(Arc::new));
    let table = if args.csv { ExitTable::Csv } else { ExitTable::Parquet };
    let kv_fill = args.kv_fill.unwrap_or(named.memory().kv_fill);
    let (prefill_depth, seed) = (args.prefill_depth, named.engine.sampling.seed);
    let exiting = args.under.map(|policies| Exiting { policies, kv_fill, prefill_depth, seed });
    let Recorded { depths: tally, policies } =
        experiments::record(&named, &requests, exiting.as_ref(), &folder.path()?, table, &mut Terminal::default())?;
    folder.finish()?;
    report::print_exits(&tally);
    if !policies.is_empty() {
        say!("");
        report::print_served(&policies);
    }
    say!("\n{} tokens of {} generations: {}", tally.tokens(), requests.len(), args.out.display());
    Ok(())
}
