//! An experiment from beginning to end: measure, replay, simulate, compare, draw.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use latency::LatencyModel;
use scheduler::{Batching, ExitPolicy, Settings};
use simulator::{ExitModel, ModelMemory, Summary, write_csv};
use traces::{ExitTable, PassLog, Request, RequestTrace};

use crate::compare::{Comparison, Kind, Predictions, VALUES};
use crate::exit_choice::ExitChoice;
use crate::experiment::{EngineSpec, Experiment};
use crate::figures::{self, Caption, SWEEP_MAX_BATCH, SWEEP_THRESHOLD};
use crate::measure::{Load, MeasuredLoad, capacity, in_turn};
use crate::named_engine::{NamedEngine, pass_log_meta};
use crate::passes::{compare_passes, write_graphs};
use crate::predict::{Models, PREDICTIONS, Predictor, predictions};
use crate::profile::{Profiled, lengths, limits};
use crate::quality::FullDepthTexts;
use crate::recording::Recording;
use crate::reporter::Reporter;
use crate::results::{CONFIG, PASS_LOG, ResultsFolder};
use crate::runs::{
    Run, simulate_all, warn_of_extrapolations, warn_of_script, write_depth_rows, write_quality, write_requests,
};
use crate::serving::Serving;
use crate::speedup::warn_without_baselines;
use crate::systems::{OfSystem, simulate_systems};
use crate::validate::{Table, Validation, validate_into, write_tables};
use crate::workload::{Workload, load_requests};

/// What an experiment came to.
#[derive(Clone, Debug)]
pub enum Report {
    /// Of what was measured on this machine, load by load.
    Measured(Vec<LoadReport>),
    /// Of a validation.
    Validated(Validation),
    /// Of systems that were simulated, a line for each run.
    Systems(Vec<(OfSystem, Summary)>),
}

/// What was measured and simulated of requests that arrive at one rate.
#[derive(Clone, Debug)]
pub struct LoadReport {
    /// Share of the capacity at which they arrive; none if they arrive as the trace says.
    pub load: Option<f64>,
    /// Every measured run, then every predicted one.
    pub runs: Vec<Summary>,
    /// By repeat, what was measured of each combination.
    pub repeats: Vec<Vec<Summary>>,
    /// How far the predictions are off.
    pub validation: Table,
}

/// Does an experiment whose paths are relative to `base`, and leaves its results at `target`.
///
/// # Errors
/// If something it needs does not read, cannot be served or cannot be written; nothing is then left. If a figure cannot be
/// drawn; the results are then in their place without it.
pub fn run(experiment: &Experiment, base: &Path, target: &Path, reporter: &mut dyn Reporter) -> Result<Report> {
    experiment.check()?;
    let mut folder = ResultsFolder::create(target, "run")?;
    let (report, drawn) = match (&experiment.engine, &experiment.validation) {
        (Some(spec), Some(validation)) => {
            let (report, drawn) = validate_into(experiment, spec, validation, base, &mut folder, reporter)?;
            (Report::Validated(report), drawn)
        }
        (Some(spec), None) => {
            let (loads, drawn) = measure_and_simulate(experiment, spec, base, &mut folder, reporter)?;
            (Report::Measured(loads), drawn)
        }
        (None, _) => {
            let workload = Workload::load(&experiment.requests, base, &experiment.serving, experiment.seed, reporter)?;
            let (lines, drawn) = simulate_systems(experiment, base, &workload, &folder.path()?, reporter)?;
            (Report::Systems(lines), drawn)
        }
    };
    finish(folder, experiment, drawn)?;
    Ok(report)
}

/// Puts the results in their place, with the experiment that they are of, whether or not their figures were drawn.
fn finish(mut folder: ResultsFolder, experiment: &Experiment, drawn: Result<()>) -> Result<()> {
    std::fs::write(folder.path()?.join(CONFIG), serde_yaml::to_string(experiment)?)?;
    let without_figures = format!("{}: the results are complete, the figures are not", folder.target().display());
    folder.finish()?;
    drawn.context(without_figures)
}

/// Tests the simulator against the engine: as [`run`] does it, of an experiment with a validation.
///
/// # Errors
/// As for [`run`], and if the experiment has no engine or no validation.
pub fn validate(
    experiment: &Experiment,
    base: &Path,
    target: &Path,
    reporter: &mut dyn Reporter,
) -> Result<Validation> {
    experiment.check()?;
    let spec = experiment.engine.as_ref().context("expected `engine`, to measure on this machine")?;
    let validation = experiment.validation.as_ref().context("expected `validation`")?;
    let mut folder = ResultsFolder::create(target, "validate")?;
    let (report, drawn) = validate_into(experiment, spec, validation, base, &mut folder, reporter)?;
    finish(folder, experiment, drawn)?;
    Ok(report)
}

/// Predicts from a profile and a recording, then measures the same, and compares; the second value says whether the
/// figures were drawn.
fn measure_and_simulate(
    experiment: &Experiment,
    spec: &EngineSpec,
    base: &Path,
    folder: &mut ResultsFolder,
    reporter: &mut dyn Reporter,
) -> Result<(Vec<LoadReport>, Result<()>)> {
    let mut trace = load_requests(&experiment.requests, base, reporter)?;
    let mut engine = NamedEngine::of_spec(spec, base, experiment.seed)?;
    engine.fit(&mut trace.requests, trace.prefix_hashes.take().map(Arc::new));
    let settings = experiment.serving.all_settings(&engine.memory(), &trace.requests)?;
    settings.iter().try_for_each(|settings| engine.check_settings(settings))?;
    warn_without_baselines(&settings, reporter);
    warn_of_script(&engine, &trace.requests, reporter);
    let variants = Variants::new(experiment, &engine.memory(), &trace.requests)?;
    reporter.message("recording exits");
    let recording = Recording::new(&engine, &settings, &trace.requests)?;
    let limits = limits(settings.iter().chain(variants.all()), &trace.requests);
    let profiled = Profiled::measure(&engine, limits, lengths(&trace.requests), spec.rounds as usize, reporter)?;
    let results = folder.path()?;
    let profile = profiled.profile(&format!("{} rounds before the replays", spec.rounds))?;
    profile.write(results.join("profile"))?;
    recording.trace.write(results.join("exits"), ExitTable::Parquet)?;

    let loads = loads(&engine, experiment, spec, settings[0], &trace, &recording, reporter)?;
    let models =
        Predictions { first: LatencyModel::new(&profile)?, without_a_round: profiled.without_a_round()?, repeat: None };
    let predictor = Predictor { settings: &settings, recording: &recording, objectives: experiment.objectives };
    let mut predicted = Vec::new();
    for load in &loads {
        let (runs, beyond) = predictor.runs(&models.first, &load.workload)?;
        warn_of_extrapolations(&beyond, reporter);
        predicted.push(runs);
    }
    let of_load = |(load, runs): (&Load, &Vec<Run>)| {
        let lines = runs.iter().flat_map(|run| predictions(&run.summary, load.share, &VALUES, None));
        lines.collect::<Vec<_>>()
    };
    let seal = folder.seal(PREDICTIONS, loads.iter().zip(&predicted).flat_map(of_load))?;
    reporter.note(&format!("predictions before the replays that are compared: {seal}"));
    let prefixes = loads[0].workload.prefixes.clone();
    let at_once = Workload::open(trace.requests.clone(), prefixes);
    simulate_variants(&variants, &models.first, recording.full_depth(), &at_once, &results, reporter)?;

    let own = match engine.is_scripted() {
        true => None,
        false => Some(FullDepthTexts::of_recording(&engine.engine, &recording.trace, &trace.requests)?),
    };
    let graded = (&recording.oracle, own.as_ref());
    let measured = in_turn(&engine, &settings, &loads, spec.repeats, graded, experiment.objectives, reporter)?;
    let runs =
        measured.iter().flat_map(|load| load.passes.iter().flatten().cloned()).chain(profiled.passes()).collect();
    PassLog { meta: pass_log_meta(&engine), runs }.write(results.join(PASS_LOG))?;

    let caption = Caption { setting: experiment.title.clone(), device: profile.meta.device.clone() };
    let (mut reports, mut captions) = (Vec::new(), Vec::new());
    for ((load, measured), predicted) in loads.iter().zip(measured).zip(predicted) {
        let (folder, caption) = match load.share {
            None => (results.clone(), caption.clone()),
            Some(share) => {
                let folder = results.join(format!("load-{share}"));
                std::fs::create_dir(&folder)?;
                let setting = format!("{}, {:.0}% load", caption.setting, 100.0 * share);
                (folder, Caption { setting, ..caption.clone() })
            }
        };
        reports.push(compare_load(&predictor, &models, load, measured, &predicted, &folder)?);
        captions.push((folder, caption));
    }
    let draw = |(folder, caption): &(PathBuf, Caption)| figures::draw(folder, &folder.join("figures"), caption);
    let drawn = captions.iter().try_for_each(draw);
    Ok((reports, drawn))
}

/// The requests, as the trace says, or at shares of the capacity that the first combination has when all arrive at once.
fn loads(
    engine: &NamedEngine,
    experiment: &Experiment,
    spec: &EngineSpec,
    first: Settings,
    trace: &RequestTrace,
    recording: &Recording,
    reporter: &mut dyn Reporter,
) -> Result<Vec<Load>> {
    let prefixes = engine.prefixes(&experiment.serving, &trace.requests)?;
    let workload = Workload { prefixes, ..Workload::of_trace(trace, &experiment.requests, experiment.seed)? };
    if spec.loads.is_empty() {
        return Ok(vec![Load { share: None, workload }]);
    }
    ensure!(!workload.has_users(), "engine.loads: users send requests when they have answers, at no rate");
    let capacity = capacity(&engine.engine, first, &trace.requests, &recording.oracle)?;
    reporter.note(&format!("capacity: {capacity:.3} requests/s under {} batching", first.batching));
    let scaled = |&share: &f64| {
        let requests = trace.clone().scale_to_rate(share * capacity)?.requests;
        Ok::<_, anyhow::Error>(Load { share: Some(share), workload: Workload { requests, ..workload.clone() } })
    };
    spec.loads.iter().map(scaled).collect()
}

/// Compares what was predicted and measured at one load, and writes both into a folder.
fn compare_load(
    predictor: &Predictor<'_>,
    models: &Models,
    load: &Load,
    measured: MeasuredLoad,
    predicted: &[Run],
    folder: &Path,
) -> Result<LoadReport> {
    let MeasuredLoad { runs, repeats, passes } = measured;
    let all = || runs.iter().chain(predicted);
    write_csv(&folder.join("summary.csv"), summaries(all()))?;
    write_requests(folder, all())?;
    write_depth_rows(folder, all())?;
    write_quality(folder, all())?;
    let classes = predictor.settings.iter().enumerate().flat_map(|(place, settings)| {
        compare_passes(settings, passes.iter().map(|repeat| &repeat[place]), &models.first)
    });
    write_csv(&folder.join("passes.csv"), classes)?;
    write_graphs(folder, passes.iter().flatten())?;

    let predicted = models.try_map(|model| {
        let (runs, _) = predictor.runs(model, &load.workload)?;
        Ok::<_, anyhow::Error>(summaries(&runs).cloned().collect::<Vec<_>>())
    })?;
    let places = (0..predictor.settings.len()).flat_map(|place| VALUES.map(|metric| (place, metric)));
    let lines = places.filter_map(|(place, (metric, value))| {
        let measured = repeats.iter().map(|repeat| value(&repeat[place]));
        Comparison::new(&repeats[0][place], None, metric, &predicted.map(|runs| value(&runs[place])), measured)
    });
    let validation = Table::new(Kind::Validation, lines.collect());
    write_tables(folder, std::slice::from_ref(&validation))?;
    Ok(LoadReport { load: load.share, runs: summaries(all()).cloned().collect(), repeats, validation })
}

/// Simulates what the experiment varies.
fn simulate_variants(
    variants: &Variants,
    latency: &LatencyModel,
    exits: &ExitModel,
    workload: &Workload,
    results: &Path,
    reporter: &mut dyn Reporter,
) -> Result<()> {
    for (file, settings) in [(SWEEP_THRESHOLD, &variants.thresholds), (SWEEP_MAX_BATCH, &variants.max_batch)] {
        if !settings.is_empty() {
            let runs = simulate_all(settings, latency, exits, workload, None, reporter)?;
            write_csv(&results.join(file), summaries(&runs))?;
        }
    }
    Ok(())
}

fn summaries<'a>(runs: impl IntoIterator<Item = &'a Run>) -> impl Iterator<Item = &'a Summary> {
    runs.into_iter().map(|run| &run.summary)
}

/// What the experiment varies in the simulator.
struct Variants {
    thresholds: Vec<Settings>,
    max_batch: Vec<Settings>,
}

impl Variants {
    fn new(Experiment { serving, sweeps, .. }: &Experiment, model: &ModelMemory, requests: &[Request]) -> Result<Self> {
        let at = |measure| move |&threshold: &f32| ExitPolicy::Confidence { signal: measure, threshold };
        let exit = sweeps.thresholds.iter().flat_map(|(&measure, thresholds)| thresholds.iter().map(at(measure)));
        let thresholds = Serving {
            batching: vec![Batching::Depth],
            exit: exit.map(ExitChoice::Policy).collect(),
            ..serving.clone()
        };
        let settings = |serving: Serving| serving.all_settings(model, requests);
        let by_batch = sweeps.max_batch.iter().map(|&max_batch| settings(serving.with_batch(max_batch)));
        let by_batch: Vec<Vec<Settings>> = by_batch.collect::<Result<_>>()?;
        Ok(Self { thresholds: settings(thresholds)?, max_batch: by_batch.concat() })
    }

    fn all(&self) -> impl Iterator<Item = &Settings> + Clone {
        self.thresholds.iter().chain(&self.max_batch)
    }
}
