//! Recording exit traces.

use std::path::Path;

use anyhow::Result;
use traces::{DepthTally, ExitTable, ExitTraceWriter, Request};

use crate::measure::{NamedEngine, recording_source};
use crate::reporter::Reporter;

/// Serves the requests at full depth, writes every exit signal at every depth to an exit trace in `folder`, and returns
/// where tokens could exit.
///
/// # Errors
/// If the engine cannot serve the requests, or the trace cannot be written.
pub fn record(
    named: &NamedEngine,
    requests: &[Request],
    folder: &Path,
    table: ExitTable,
    reporter: &mut dyn Reporter,
) -> Result<DepthTally> {
    let engine = &named.engine;
    let meta = engine.exit_trace_meta(&named.name, &recording_source(engine, requests));
    let mut tally = DepthTally::new(meta.num_loops as usize);
    let mut writer = ExitTraceWriter::create(folder, meta, engine.model.config().gate, table)?;
    reporter.start(requests.len(), 0);
    let write = |rows: &[_]| {
        reporter.advance(1);
        tally.push_generation(rows);
        writer.push_generation(rows)
    };
    engine.record_each(requests, write, &mut ())?;
    reporter.finish();
    writer.finish()?;
    Ok(tally)
}
