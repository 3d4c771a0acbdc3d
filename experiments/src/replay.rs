//! Request traces through the engine.

use std::sync::Arc;

use anyhow::Result;
use engine::{Idle, oracle_depths};
use scheduler::{PassRecorder, Settings, SignalRead};
use traces::{ExitTrace, PassLog, PassOrigin, Request, unix_micros};

use crate::measure::{self, NamedEngine};
use crate::reporter::Reporter;
use crate::runs::Run;

/// Replays the requests under every one of `settings`: the runs, and all their passes. The oracle's exits are read from `recorded`, an exit trace of
/// these requests; without one, they are recorded first where a policy asks for them.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn replay(
    named: &NamedEngine,
    settings: &[Settings],
    requests: &[Request],
    recorded: Option<&ExitTrace>,
    idle: Idle,
    reporter: &mut dyn Reporter,
) -> Result<(Vec<Run>, PassLog)> {
    settings.iter().try_for_each(|settings| named.check_settings(settings))?;
    let needs_oracle = settings.iter().any(|settings| settings.exit.signal_read() == SignalRead::Oracle);
    let oracle = Arc::new(match (needs_oracle, recorded) {
        (false, _) => Default::default(),
        (true, Some(recorded)) => oracle_depths(recorded, requests),
        (true, None) => oracle_depths(&measure::record(named, requests)?, requests),
    });
    reporter.start(settings.len(), 0);
    let mut runs = Vec::new();
    let mut passes = PassLog { meta: measure::pass_log_meta(named), runs: Vec::new() };
    for &settings in settings {
        reporter.message(&format!("{}, {}", settings.batching, settings.exit));
        let mut recorder = PassRecorder::new(&settings, PassOrigin::Replay, unix_micros);
        runs.push(measure::replay(&named.engine, settings, requests, &oracle, idle, None, &mut recorder)?);
        passes.runs.push(recorder.into_run());
        reporter.advance(1);
    }
    reporter.finish();
    Ok((runs, passes))
}
