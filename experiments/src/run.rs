//! An experiment from beginning to end: measure, replay, simulate, compare, draw.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use engine::Sampling;
use latency::LatencyModel;
use scheduler::{Batching, ExitPolicy, Settings};
use simulator::{Draw, ExitModel, ModelMemory, Objectives, Summary, write_csv};
use traces::{ExitTable, Request};

use crate::exit_choice::ExitChoice;
use crate::experiment::{EngineSpec, Experiment};
use crate::figures::{self, Caption, SWEEP_MAX_BATCH, SWEEP_THRESHOLD};
use crate::measure::{Measured, MeasuredLoad, NamedEngine, limits, measure};
use crate::reporter::Reporter;
use crate::results::{CONFIG, PASS_LOG, ResultsFolder};
use crate::runs::{Machines, Run, run_simulations, simulate_all, write_depth_rows, write_quality, write_requests};
use crate::serving::Serving;
use crate::speedup::warn_without_baselines;
use crate::systems::{OfSystem, simulate_systems};
use crate::validation::{Comparison, MeanError, TOKEN_AGREEMENT, compare, mean_errors};
use crate::workload::{Workload, load_open_loop};

/// What an experiment came to.
#[derive(Clone, Debug)]
pub enum Report {
    /// Of what was measured on this machine, load by load.
    Measured(Vec<LoadReport>),
    /// Of systems that were simulated, a line for each run.
    Systems(Vec<(OfSystem, Summary)>),
}

/// What was measured and simulated of requests that arrive at one rate.
#[derive(Clone, Debug)]
pub struct LoadReport {
    /// Share of the capacity at which they arrive; none if they arrive as the trace says.
    pub load: Option<f64>,
    /// Every measured run, then every simulated one.
    pub runs: Vec<Summary>,
    /// By repeat, what was measured of each combination.
    pub repeats: Vec<Vec<Summary>>,
    /// How far simulations are off, by the exits recorded at full depth.
    pub errors: Errors,
    /// How far they are off by the exits that the replays took; none where no policy reads a signal.
    pub errors_of_exits_taken: Option<Errors>,
}

/// How far simulations are off.
#[derive(Clone, Debug)]
pub struct Errors {
    /// By combination and metric.
    pub comparisons: Vec<Comparison>,
    /// By metric.
    pub means: Vec<MeanError>,
}

/// Does an experiment whose paths are relative to `base`, and leaves its results at `target`.
///
/// # Errors
/// If something it needs does not read, cannot be served or cannot be written; nothing is then left. If a figure cannot be
/// drawn; the results are then in their place without it.
pub fn run(experiment: &Experiment, base: &Path, target: &Path, reporter: &mut dyn Reporter) -> Result<Report> {
    experiment.check()?;
    let mut folder = ResultsFolder::create(target, "run")?;
    let (report, drawn) = match &experiment.engine {
        Some(spec) => {
            let (loads, drawn) = measure_and_simulate(experiment, spec, base, &mut folder, reporter)?;
            (Report::Measured(loads), drawn)
        }
        None => {
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

/// Replays requests on the engine and in the simulator, and compares: as [`run`] does it, of an experiment that measures.
///
/// # Errors
/// As for [`run`], and if the experiment has no engine.
pub fn validate(
    experiment: &Experiment,
    base: &Path,
    target: &Path,
    reporter: &mut dyn Reporter,
) -> Result<Vec<LoadReport>> {
    experiment.check()?;
    let spec = experiment.engine.as_ref().context("expected `engine`, to measure on this machine")?;
    let mut folder = ResultsFolder::create(target, "validate")?;
    let (loads, drawn) = measure_and_simulate(experiment, spec, base, &mut folder, reporter)?;
    finish(folder, experiment, drawn)?;
    Ok(loads)
}

/// Measures the engine, simulates the same and more from what was measured, and compares; the second value says whether
/// the figures were drawn.
fn measure_and_simulate(
    experiment: &Experiment,
    spec: &EngineSpec,
    base: &Path,
    folder: &mut ResultsFolder,
    reporter: &mut dyn Reporter,
) -> Result<(Vec<LoadReport>, Result<()>)> {
    let mut trace = load_open_loop(&experiment.requests, base, reporter)?;
    let sampling = Sampling { temperature: spec.temperature, seed: experiment.seed };
    let (model, prompts) = (spec.model_from(base), base.join(&spec.prompts));
    let engine = NamedEngine::load(&model, spec.loops, spec.weights, spec.device, &prompts, sampling)?;
    engine.engine.prompts.set_lengths(&mut trace.requests);
    let settings = experiment.serving.all_settings(&engine.memory(), &trace.requests)?;
    warn_without_baselines(&settings, reporter);
    let variants = Variants::new(experiment, &engine.memory(), &trace.requests)?;
    let limits = limits(settings.iter().chain(variants.all()), &trace.requests);
    let measured = measure(&engine, &settings, &trace, spec, experiment.objectives, limits, reporter)?;
    let results = &folder.path()?;
    measured.profile.write(results.join("profile"))?;
    measured.exits.write(results.join("exits"), ExitTable::Parquet)?;
    measured.passes.write(results.join(PASS_LOG))?;

    let exits = ExitModel::new(&measured.exits, Draw::Recorded)?;
    simulate_variants(&variants, &measured, &exits, trace.requests, results, reporter)?;
    let caption = Caption { setting: experiment.title.clone(), device: measured.profile.meta.device.clone() };
    let (mut reports, mut captions) = (Vec::new(), Vec::new());
    for load in &measured.loads {
        let (folder, caption) = match load.load {
            None => (results.to_owned(), caption.clone()),
            Some(share) => {
                let folder = results.join(format!("load-{share}"));
                std::fs::create_dir(&folder)?;
                let setting = format!("{}, {:.0}% load", caption.setting, 100.0 * share);
                (folder, Caption { setting, ..caption.clone() })
            }
        };
        reports.push(simulate_load(experiment.objectives, &settings, &measured, &exits, load, &folder, reporter)?);
        captions.push((folder, caption));
    }
    let draw = |(folder, caption): &(PathBuf, Caption)| figures::draw(folder, &folder.join("figures"), caption);
    let drawn = captions.iter().try_for_each(draw);
    Ok((reports, drawn))
}

/// Simulates what was measured at one load, and writes both into a folder.
fn simulate_load(
    objectives: Option<Objectives>,
    settings: &[Settings],
    measured: &Measured,
    exits: &ExitModel,
    load: &MeasuredLoad,
    folder: &Path,
    reporter: &mut dyn Reporter,
) -> Result<LoadReport> {
    let workload = Workload::open(load.requests.clone(), None);
    let latency = LatencyModel::new(&measured.profile)?;
    let simulated = simulate_all(settings, &latency, exits, &workload, objectives, reporter)?;
    let runs = || load.runs.iter().chain(&simulated);
    write_csv(&folder.join("summary.csv"), summaries(runs()))?;
    write_requests(folder, runs())?;
    write_depth_rows(folder, runs())?;
    write_quality(folder, runs())?;

    write_csv(&folder.join("passes.csv"), &load.passes)?;
    let recorded = vec![exits; settings.len()];
    let simulated = simulate_repeats(settings, measured, &recorded, load, &workload, reporter)?;
    let errors = write_errors(compare(&load.repeats, &simulated), folder, "")?;
    let mut report = LoadReport {
        load: load.load,
        runs: summaries(runs()).cloned().collect(),
        repeats: load.repeats.clone(),
        errors,
        errors_of_exits_taken: None,
    };
    if load.exits.iter().all(Option::is_none) {
        return Ok(report);
    }
    let scripted = |depths: &Vec<Vec<u8>>| {
        ExitModel::from_depths(depths, exits.num_loops().into(), exits.fingerprint(), Draw::Recorded)
    };
    let taken = load.exits.iter().map(|depths| depths.as_ref().map(scripted).transpose());
    let taken = taken.collect::<Result<Vec<_>, _>>()?;
    let taken: Vec<&ExitModel> = taken.iter().map(|taken| taken.as_ref().unwrap_or(exits)).collect();
    let simulated = simulate_repeats(settings, measured, &taken, load, &workload, reporter)?;
    let mut comparisons = compare(&load.repeats, &simulated);
    // Exit depths hold no tokens.
    comparisons.retain(|line| line.metric != TOKEN_AGREEMENT);
    report.errors_of_exits_taken = Some(write_errors(comparisons, folder, "_of_exits_taken")?);
    Ok(report)
}

/// Writes how far simulations of one load are off.
fn write_errors(comparisons: Vec<Comparison>, folder: &Path, suffix: &str) -> Result<Errors> {
    let means = mean_errors(&comparisons);
    write_csv(&folder.join(format!("validation{suffix}.csv")), &comparisons)?;
    write_csv(&folder.join(format!("repeats{suffix}.csv")), comparisons.iter().flat_map(Comparison::repeats))?;
    write_csv(&folder.join(format!("errors{suffix}.csv")), &means)?;
    Ok(Errors { comparisons, means })
}

/// Simulates every replay at the pace that the machine had during it; `exits` are those of each of the settings.
fn simulate_repeats(
    settings: &[Settings],
    measured: &Measured,
    exits: &[&ExitModel],
    load: &MeasuredLoad,
    workload: &Workload,
    reporter: &mut dyn Reporter,
) -> Result<Vec<Vec<Summary>>> {
    let model = LatencyModel::new(&measured.profile)?;
    let mut simulations = Vec::new();
    for paces in &load.paces {
        for ((&settings, exits), pace) in settings.iter().zip(exits).zip(paces) {
            simulations.push(Machines::ONE.simulation(settings, &model, exits, workload)?.at_pace(pace));
        }
    }
    let runs = run_simulations(&simulations, 1, None, &workload.requests, reporter)?;
    Ok(runs.chunks(settings.len()).map(|runs| summaries(runs).cloned().collect()).collect())
}

/// Simulates what the experiment varies.
fn simulate_variants(
    variants: &Variants,
    measured: &Measured,
    exits: &ExitModel,
    requests: Vec<Request>,
    results: &Path,
    reporter: &mut dyn Reporter,
) -> Result<()> {
    let (latency, workload) = (LatencyModel::new(&measured.profile)?, Workload::open(requests, None));
    for (file, settings) in [(SWEEP_THRESHOLD, &variants.thresholds), (SWEEP_MAX_BATCH, &variants.max_batch)] {
        if !settings.is_empty() {
            let runs = simulate_all(settings, &latency, exits, &workload, None, reporter)?;
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
