//! Request traces through the engine.

use std::collections::HashMap;

use anyhow::Result;
use engine::{Generation, Idle};
use scheduler::{PassRecorder, Settings};
use traces::{ExitTrace, PassLog, PassOrigin, unix_micros};

use crate::measure;
use crate::named_engine::{NamedEngine, pass_log_meta, record};
use crate::oracle::Oracle;
use crate::quality::{FullDepthTexts, Quality};
use crate::reporter::Reporter;
use crate::runs::{Run, warn_of_script};
use crate::speedup::warn_without_baselines;
use crate::workload::Workload;

/// Replays a workload under every one of `settings`: the runs, and all their passes. The exits of
/// `oracle:recorded` are read from `recorded`, an exit trace of these requests; without one, they are recorded first. Those of
/// the live oracle are found by looking ahead before the replays. Where exits are [scripted](NamedEngine::is_scripted), every
/// policy follows the script, nothing is recorded, and the text has no quality.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn replay(
    named: &NamedEngine,
    settings: &[Settings],
    workload: &Workload,
    recorded: Option<&ExitTrace>,
    idle: Idle,
    reporter: &mut dyn Reporter,
) -> Result<(Vec<Run>, PassLog)> {
    let requests = &workload.requests[..];
    let is_scripted = named.is_scripted();
    settings.iter().try_for_each(|settings| named.check_settings(settings))?;
    warn_without_baselines(settings, reporter);
    warn_of_script(named, requests, reporter);
    let full_depth = settings.iter().position(Settings::is_full_depth);
    let recording = match recorded {
        None if is_scripted => None,
        None if Oracle::needs_recording(settings) || full_depth.is_none() => Some(record(named, requests)?),
        _ => None,
    };
    let recorded = recorded.or(recording.as_ref());
    let oracle = Oracle::new(named, settings, requests, recorded)?;
    reporter.start(settings.len(), 0);
    let (mut runs, mut generated) = (Vec::new(), Vec::new());
    let mut passes = PassLog { meta: pass_log_meta(named), runs: Vec::new() };
    for &settings in settings {
        reporter.message(&format!("{}, {}", settings.batching, settings.exit));
        let mut recorder = PassRecorder::new(&settings, PassOrigin::Replay, unix_micros);
        let (run, generations) = measure::replay(&named.engine, settings, workload, &oracle, idle, &mut recorder)?;
        runs.push(run);
        generated.push(generations);
        passes.runs.push(recorder.into_run());
        reporter.advance(1);
    }
    if is_scripted {
        reporter.finish();
        return Ok((runs, passes));
    }
    reporter.message("comparing the served texts with full depth");
    let own = match (recorded, full_depth) {
        (None, Some(run)) => FullDepthTexts::of_run(&named.engine, &generated[run])?,
        (Some(recorded), _) => FullDepthTexts::of_recording(&named.engine, recorded, requests)?,
        (None, None) => unreachable!("recorded above"),
    };
    let graded = |(run, generations): (Run, &HashMap<u32, Generation>)| {
        Ok(run.with_quality(Quality::measure(named, generations, &own)?))
    };
    let runs = runs.into_iter().zip(&generated).map(graded).collect::<Result<_>>()?;
    reporter.finish();
    Ok((runs, passes))
}
