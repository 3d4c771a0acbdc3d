//! Recording exit traces.

use std::path::Path;

use anyhow::Result;
use engine::{Exiting, RecordedGeneration};
use traces::{DepthTally, ExitTable, ExitTraceMeta, ExitTraceWriter, Request};

use crate::named_engine::{NamedEngine, recording_source};
use crate::reporter::Reporter;

/// What was recorded.
#[derive(Debug)]
pub struct Recorded {
    /// Where tokens could exit.
    pub depths: DepthTally,
    /// What was served under each exit policy; empty at full depth.
    pub policies: Vec<ServedTally>,
}

/// What a recording served under one exit policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServedTally {
    /// Its name.
    pub policy: String,
    /// Requests that were served under it.
    pub generations: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Passes that the tokens ran before they exited.
    pub passes: usize,
    /// Tokens that full depth also gives after the same prefix, with exact keys and values.
    pub agreeing: usize,
}

impl ServedTally {
    fn push(&mut self, recorded: &RecordedGeneration, num_loops: usize) {
        self.generations += 1;
        self.tokens += recorded.tokens.len();
        for (rows, token) in recorded.rows.chunks(num_loops).zip(&recorded.tokens) {
            self.passes += token.exit_depth as usize + 1;
            self.agreeing += usize::from(rows[token.exit_depth as usize].1 == token.full_depth);
        }
    }

    /// Passes per token.
    pub fn mean_depth(&self) -> f64 {
        self.passes as f64 / self.tokens as f64
    }

    /// Realised agreement, 0 to 1.
    pub fn agreement(&self) -> f64 {
        self.agreeing as f64 / self.tokens as f64
    }
}

/// Serves the requests at full depth, or under the exit policies given, and writes every exit signal at every depth to an
/// exit trace in `folder`.
///
/// # Errors
/// If the engine cannot serve the requests, or the trace cannot be written.
pub fn record(
    named: &NamedEngine,
    requests: &[Request],
    exiting: Option<&Exiting>,
    folder: &Path,
    table: ExitTable,
    reporter: &mut dyn Reporter,
) -> Result<Recorded> {
    let engine = &named.engine;
    let source = match exiting {
        None => recording_source(engine, requests),
        Some(_) => format!("{} requests, temperature {}", requests.len(), engine.sampling.temperature),
    };
    let meta = engine.exit_trace_meta(&named.name, &source);
    let meta = ExitTraceMeta { recording: exiting.map(Exiting::meta), ..meta };
    let num_loops = meta.num_loops as usize;
    let mut depths = DepthTally::new(num_loops);
    let named_policies = meta.recording.iter().flat_map(|recording| recording.policies.clone());
    let mut policies: Vec<ServedTally> =
        named_policies.map(|policy| ServedTally { policy, ..ServedTally::default() }).collect();
    let mut writer = ExitTraceWriter::create(folder, meta, engine.recorded_signals(), table)?;
    reporter.start(requests.len(), 0);
    match exiting {
        None => {
            let write = |rows: &[_]| {
                reporter.advance(1);
                depths.push_generation(rows);
                writer.push_generation(rows)
            };
            engine.record_each(requests, write, &mut ())?;
        }
        Some(exiting) => {
            let write = |recorded: &RecordedGeneration| {
                reporter.advance(1);
                depths.push_generation(&recorded.rows);
                policies[recorded.policy as usize].push(recorded, num_loops);
                writer.push_served(&recorded.rows, &recorded.tokens, recorded.policy)
            };
            engine.record_each_exiting(requests, exiting, write, &mut ())?;
        }
    }
    reporter.finish();
    writer.finish()?;
    policies.retain(|tally| tally.generations > 0);
    Ok(Recorded { depths, policies })
}
