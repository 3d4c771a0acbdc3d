//! `depthwise record`: how sure the model is at each depth.

use std::path::PathBuf;

use anyhow::Result;
use traces::{DepthTally, ExitTable, ExitTraceWriter};

use crate::arguments::{EngineArgs, RequestArgs};
use crate::measure::recording_source;
use crate::progress::progress;
use crate::report;
use crate::results::ResultsFolder;

/// Record an exit trace: real prompts at full depth, with every exit signal at every depth
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    requests: RequestArgs,
    /// Folder to write the exit trace to: exits.yaml and exits.parquet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Write the rows as exits.csv instead: three times the size, but readable by people
    #[arg(long)]
    csv: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let folder = ResultsFolder::create(&args.out)?;
    let requests = args.requests.load()?.requests;
    let named = args.engine.load()?;
    let engine = &named.engine;
    let meta = engine.exit_trace_meta(&named.name, &recording_source(engine, &requests));
    let mut tally = DepthTally::new(meta.num_loops as usize);
    let table = if args.csv { ExitTable::Csv } else { ExitTable::Parquet };
    let mut writer = ExitTraceWriter::create(folder.path(), meta, engine.model.config().gate, table)?;
    let bar = progress(requests.len());
    let write = |rows: &[_]| {
        bar.inc(1);
        tally.push_generation(rows);
        writer.push_generation(rows)
    };
    engine.record_each(&requests, write, &mut ())?;
    bar.finish_and_clear();
    writer.finish()?;
    folder.finish()?;
    report::print_exits(&tally);
    println!("\n{} tokens of {} generations: {}", tally.tokens(), requests.len(), args.out.display());
    Ok(())
}
