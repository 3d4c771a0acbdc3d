//! Measuring: replays of requests on the engine.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result};
use engine::{Engine, Generation, Idle, SlicedReplay, WallClock};
use scheduler::{Observer, PassRecorder, Settings};
use simulator::{Metrics, Objectives, Source, Summary};
use traces::{PassOrigin, PassRun, Request, unix_micros};

use crate::named_engine::NamedEngine;
use crate::oracle::Oracle;
use crate::quality::{FullDepthTexts, Quality};
use crate::reporter::Reporter;
use crate::runs::Run;
use crate::workload::Workload;

/// Replays that the capacity is the median of.
const CAPACITY_REPLAYS: usize = 3;
/// The longest slice of a replay that alternates with another. Caches are cold after a change of replays, which makes the
/// first 18 ms of a slice up to 14% longer.
const LONGEST_SLICE: Duration = Duration::from_millis(200);
/// Slices of the shorter of two replays that alternate, at least.
const SLICES: f64 = 20.0;

/// Requests that arrive at one rate.
pub struct Load {
    /// The rate as a share of the capacity; `None` if they arrive as the trace says.
    pub share: Option<f64>,
    /// The requests.
    pub workload: Workload,
}

/// What was measured of requests that arrive at one rate.
pub struct MeasuredLoad {
    /// For each of the settings asked for: of its repeats, the run of median throughput, or goodput with objectives.
    pub runs: Vec<Run>,
    /// By repeat, a summary for each of the settings.
    pub repeats: Vec<Vec<Summary>>,
    /// By repeat, the passes under each of the settings.
    pub passes: Vec<Vec<PassRun>>,
}

/// Replays the requests of every load under every one of `settings`, all of them in turn in each repeat. Requests that
/// meet `objectives` are counted. Without full depth's own texts, no quality is measured.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn in_turn(
    named: &NamedEngine,
    settings: &[Settings],
    loads: &[Load],
    repeats: u32,
    (oracle, own): (&Oracle, Option<&FullDepthTexts>),
    objectives: Option<Objectives>,
    reporter: &mut dyn Reporter,
) -> Result<Vec<MeasuredLoad>> {
    reporter.start(repeats as usize * settings.len() * loads.len(), 0);
    type Repeats<T> = Vec<Vec<T>>;
    let mut measured: Vec<(Repeats<Run>, Repeats<PassRun>)> = loads.iter().map(|_| Default::default()).collect();
    for repeat in 0..repeats {
        for (load, (runs, passes)) in loads.iter().zip(&mut measured) {
            let (mut runs_of_repeat, mut passes_of_repeat) = (Vec::new(), Vec::new());
            for (place, settings) in settings.iter().enumerate() {
                let Settings { batching, exit, kv_fill, .. } = settings;
                reporter.message(&format!("replaying: {batching}, {exit}, {kv_fill}, {} of {repeats}", repeat + 1));
                let metrics = metrics_of(settings, objectives);
                let mut recorder = PassRecorder::new(settings, PassOrigin::Replay, unix_micros);
                let (run, generations) =
                    replay_into(metrics, &named.engine, &load.workload, oracle, Idle::Skip, &mut recorder)?;
                // Tokens and exits do not change from repeat to repeat, unless they depend on the load.
                let first = runs.first().filter(|_| !exit.depends_on_load());
                let quality = match first.and_then(|runs: &Vec<Run>| runs[place].quality.clone()) {
                    Some(quality) => Some(quality),
                    None => own.map(|own| Quality::measure(named, &generations, own)).transpose()?,
                };
                runs_of_repeat.push(match quality {
                    Some(quality) => run.with_quality(quality),
                    None => run,
                });
                passes_of_repeat.push(PassRun { load: load.share, repeat, ..recorder.into_run() });
                reporter.advance(1);
            }
            runs.push(runs_of_repeat);
            passes.push(passes_of_repeat);
        }
    }
    reporter.finish();
    Ok(measured.into_iter().map(|(runs, passes)| MeasuredLoad::new(runs, passes)).collect())
}

impl MeasuredLoad {
    fn new(runs: Vec<Vec<Run>>, passes: Vec<Vec<PassRun>>) -> Self {
        let repeats = runs.iter().map(|runs| runs.iter().map(|run| run.summary.clone()).collect()).collect();
        Self { repeats, runs: median_runs(runs), passes }
    }
}

/// Requests per second that the engine serves when all of them arrive at once: the median of some replays.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn capacity(engine: &Engine, settings: Settings, requests: &[Request], oracle: &Oracle) -> Result<f64> {
    let at_once = Workload::open(Request::at_once(requests), None);
    let run = || replay(engine, settings, &at_once, oracle, Idle::Skip, &mut ());
    let runs = (0..CAPACITY_REPLAYS).map(|_| Ok(run()?.0)).collect::<Result<Vec<Run>>>()?;
    Ok(requests.len() as f64 / median_run(runs).summary.makespan_s)
}

/// A run in a closed loop, and its passes.
pub struct Looped {
    /// The run.
    pub run: Run,
    /// Its passes.
    pub passes: PassRun,
}

/// Replays a workload in a closed loop under both settings, in alternating slices, so that both meet the same moments
/// of the machine. The replay that is behind, by the share of its requests that have ended, gets the next slice: both
/// end at about the same time. `shortest_s` is what the shorter replay takes at least, about, in seconds.
///
/// # Errors
/// If the engine cannot serve the requests, or the workload is no closed loop.
pub fn alternating(
    named: &NamedEngine,
    settings: [Settings; 2],
    workload: &Workload,
    oracle: &Oracle,
    shortest_s: f64,
) -> Result<[Looped; 2]> {
    let slice = LONGEST_SLICE.min(Duration::from_secs_f64(shortest_s / SLICES));
    let closed_loop = workload.closed_loop.as_ref().context("slices of a workload that is no closed loop")?;
    let begin = |settings: Settings| {
        let depths = oracle.depths(&settings);
        let replay = named.engine.sliced_replay(settings, &workload.requests, closed_loop, depths)?;
        let recorder = PassRecorder::new(&settings, PassOrigin::Replay, unix_micros);
        Ok::<_, anyhow::Error>((replay, (metrics_of(&settings, None), recorder)))
    };
    let [first, second] = settings;
    let mut replays = [begin(first)?, begin(second)?];
    let mut goes_on = [true; 2];
    let mut next = 0;
    while goes_on[next] {
        let (replay, observers) = &mut replays[next];
        goes_on[next] = replay.run_for(slice, observers)?;
        next = behind(&replays.each_ref().map(|(replay, _)| replay.progress()), goes_on, next);
    }
    let end = |(_, (metrics, recorder)): (SlicedReplay, (Metrics, PassRecorder))| Looped {
        run: measured_run(&named.engine, metrics),
        passes: recorder.into_run(),
    };
    Ok(replays.map(end))
}

/// The replay to go on with after a slice of the replay `last`: the one that is behind, or else the other one.
fn behind(progress: &[f64; 2], goes_on: [bool; 2], last: usize) -> usize {
    let other = 1 - last;
    match goes_on {
        [true, true] if progress[last] < progress[other] => last,
        [true, true] => other,
        [true, false] => 0,
        [false, true] => 1,
        [false, false] => last,
    }
}

/// Serves a workload once; idle time is skipped.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn once(
    named: &NamedEngine,
    settings: &Settings,
    workload: &Workload,
    oracle: &Oracle,
    objectives: Option<Objectives>,
) -> Result<Summary> {
    let metrics = metrics_of(settings, objectives);
    Ok(replay_into(metrics, &named.engine, workload, oracle, Idle::Skip, &mut ())?.0.summary)
}

/// Serves the requests once: the run, whose quality is not measured, and what was generated.
///
/// # Errors
/// If the engine cannot serve the requests.
pub fn replay(
    engine: &Engine,
    settings: Settings,
    workload: &Workload,
    oracle: &Oracle,
    idle: Idle,
    observer: &mut (impl Observer + Send),
) -> Result<(Run, HashMap<u32, Generation>)> {
    replay_into(metrics_of(&settings, None), engine, workload, oracle, idle, observer)
}

/// Serves a workload once, into metrics of a run that has not started.
fn replay_into(
    metrics: Metrics,
    engine: &Engine,
    workload: &Workload,
    oracle: &Oracle,
    idle: Idle,
    observer: &mut (impl Observer + Send),
) -> Result<(Run, HashMap<u32, Generation>)> {
    let settings = *metrics.settings();
    let mut observers = (metrics, observer);
    let clock = &mut WallClock::start(idle);
    let Workload { requests, closed_loop, .. } = workload;
    let depths = oracle.depths(&settings);
    let generations = engine.replay_by(settings, requests, closed_loop.as_ref(), depths, clock, &mut observers)?;
    Ok((measured_run(engine, observers.0), generations))
}

/// Metrics of a run that has not started, which keep every request.
pub(crate) fn metrics_of(settings: &Settings, objectives: Option<Objectives>) -> Metrics {
    let metrics = Metrics::new(settings).with_requests();
    match objectives {
        Some(objectives) => metrics.with_objectives(objectives),
        None => metrics,
    }
}

fn measured_run(engine: &Engine, metrics: Metrics) -> Run {
    let summary = Summary {
        weight_bytes: Some(engine.model.weight_bytes()),
        kv_bytes_per_token: Some(engine.model.kv_bytes_per_token(metrics.settings().kv_fill)),
        ..metrics.summary(Source::Measured, None)
    };
    Run { summary, metrics, time: None, quality: None, groups: Vec::new() }
}

/// For each of the settings, the median run of repeats, which are given by repeat.
pub(crate) fn median_runs(repeats: Vec<Vec<Run>>) -> Vec<Run> {
    let mut by_settings: Vec<Vec<Run>> = Vec::new();
    for runs in repeats {
        by_settings.resize_with(runs.len(), Vec::new);
        by_settings.iter_mut().zip(runs).for_each(|(repeats, run)| repeats.push(run));
    }
    by_settings.into_iter().map(median_run).collect()
}

/// The run of median goodput, or without objectives of median throughput; of an even number, the lower of the middle two.
fn median_run(mut runs: Vec<Run>) -> Run {
    let merit = |run: &Run| (run.summary.goodput_req_s.unwrap_or_default(), run.summary.throughput_tok_s);
    runs.sort_by(|a, b| {
        let ((goodput, throughput), (other_goodput, other_throughput)) = (merit(a), merit(b));
        goodput.total_cmp(&other_goodput).then(throughput.total_cmp(&other_throughput))
    });
    let middle = (runs.len() - 1) / 2;
    runs.swap_remove(middle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_replay_that_is_behind_goes_on_and_equals_take_turns() {
        assert_eq!(behind(&[0.2, 0.4], [true, true], 0), 0);
        assert_eq!(behind(&[0.2, 0.4], [true, true], 1), 0);
        assert_eq!([0, 1].map(|last| behind(&[0.3, 0.3], [true, true], last)), [1, 0]);
        assert_eq!(behind(&[1.0, 0.9], [false, true], 0), 1);
        assert_eq!(behind(&[0.9, 1.0], [true, false], 1), 0);
    }
}
