//! `depthwise run`: an experiment from beginning to end.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use engine::executor::Sampling;
use scheduler::{Batching, ExitPolicy, Settings};
use simulator::{Draw, ExitModel, LatencyModel, ModelMemory, Summary, write_csv};
use traces::{ExitTable, Request};

use crate::experiment::{EngineSpec, Experiment};
use crate::figures::{self, Caption, SWEEP_MAX_BATCH, SWEEP_THRESHOLD};
use crate::measure::{Measured, MeasuredLoad, NamedEngine, limits, measure};
use crate::report;
use crate::results::{CONFIG, ResultsFolder};
use crate::runs::{Machines, Run, run_simulations, simulate_all, write_depth_rows, write_requests};
use crate::serving::Serving;
use crate::systems::simulate_systems;
use crate::validation::{Comparison, TOKEN_AGREEMENT, compare, mean_errors};
use crate::workload::{Workload, load_requests};

/// Do a whole experiment: measure, replay, simulate, compare, draw
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The experiment, a YAML file
    config: PathBuf,
    /// Folder of results [default: results/ and the experiment's file name]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let experiment = Experiment::load(&args.config)?;
    let base = args.config.parent().unwrap_or(Path::new(""));
    let name = args.config.file_stem().context("the experiment has no file name")?;
    let target = args.out.unwrap_or_else(|| Path::new("results").join(name));
    run_experiment(&experiment, base, &target).with_context(|| args.config.display().to_string())
}

/// Does an experiment whose paths are relative to `base`, and leaves its results at `target`.
///
/// # Errors
/// If something it needs does not read, cannot be served or cannot be written; nothing is then left.
pub fn run_experiment(experiment: &Experiment, base: &Path, target: &Path) -> Result<()> {
    experiment.check()?;
    let folder = ResultsFolder::create(target)?;
    std::fs::write(folder.path().join(CONFIG), serde_yaml::to_string(experiment)?)?;
    match &experiment.engine {
        Some(spec) => measure_and_simulate(experiment, spec, base, folder.path())?,
        None => {
            let workload = Workload::load(&experiment.requests, base, &experiment.serving)?;
            simulate_systems(experiment, base, &workload, folder.path())?;
        }
    }
    folder.finish()?;
    println!("\nResults are in {}", target.display());
    Ok(())
}

/// Measures the engine, simulates the same and more from what was measured, and compares.
fn measure_and_simulate(experiment: &Experiment, spec: &EngineSpec, base: &Path, results: &Path) -> Result<()> {
    let trace = load_requests(&experiment.requests, base)?;
    let sampling = Sampling { temperature: spec.temperature, seed: experiment.seed };
    let (model, prompts) = (spec.model_from(base), base.join(&spec.prompts));
    let engine = NamedEngine::load(&model, spec.loops, spec.weights, spec.device, &prompts, sampling)?;
    let settings = experiment.serving.all_settings(&engine.memory(), &trace.requests)?;
    let variants = Variants::new(experiment, &engine.memory(), &trace.requests)?;
    let limits = limits(settings.iter().chain(variants.all()), &trace.requests);
    let measured = measure(&engine, &settings, &trace, &spec.loads, spec.repeats, limits)?;
    measured.profile.write(results.join("profile"))?;
    measured.exits.write(results.join("exits"), ExitTable::Parquet)?;

    let exits = ExitModel::new(&measured.exits, Draw::Recorded)?;
    simulate_variants(&variants, &measured, &exits, trace.requests, results)?;
    let caption = Caption { setting: experiment.title.clone(), device: measured.profile.meta.device.clone() };
    for load in &measured.loads {
        let Some(share) = load.load else {
            simulate_load(&settings, &measured, &exits, load, &caption, results)?;
            continue;
        };
        println!("\nat {:.0}% of the capacity:", 100.0 * share);
        let setting = format!("{}, {:.0}% load", caption.setting, 100.0 * share);
        let folder = results.join(format!("load-{share}"));
        std::fs::create_dir(&folder)?;
        simulate_load(&settings, &measured, &exits, load, &Caption { setting, ..caption.clone() }, &folder)?;
    }
    Ok(())
}

/// Simulates what was measured at one load, and writes, draws and prints both into a folder.
fn simulate_load(
    settings: &[Settings],
    measured: &Measured,
    exits: &ExitModel,
    load: &MeasuredLoad,
    caption: &Caption,
    folder: &Path,
) -> Result<()> {
    let workload = Workload { requests: load.requests.clone(), prefixes: None };
    let simulated = simulate_all(settings, &LatencyModel::new(&measured.profile)?, exits, &workload)?;
    let runs = || load.runs.iter().chain(&simulated);
    write_csv(&folder.join("summary.csv"), summaries(runs()))?;
    write_requests(folder, runs())?;
    write_depth_rows(folder, runs())?;
    figures::draw(folder, caption)?;
    report::print_summaries(summaries(runs()));
    report::print_speedup(&load.repeats);

    write_csv(&folder.join("passes.csv"), &load.passes)?;
    let recorded = vec![exits; settings.len()];
    let comparisons = compare(&load.repeats, &simulate_repeats(settings, measured, &recorded, load, &workload)?);
    println!("\nsimulated less measured, in percent of measured, with 95% confidence intervals:");
    write_errors(&comparisons, folder, "")?;
    if load.exits.iter().all(Option::is_none) {
        return Ok(());
    }
    let taken =
        load.exits.iter().map(|exits| exits.as_ref().map(|exits| ExitModel::new(exits, Draw::Recorded)).transpose());
    let taken = taken.collect::<Result<Vec<_>, _>>()?;
    let taken: Vec<&ExitModel> = taken.iter().map(|taken| taken.as_ref().unwrap_or(exits)).collect();
    let mut comparisons = compare(&load.repeats, &simulate_repeats(settings, measured, &taken, load, &workload)?);
    // These exits hold no tokens.
    comparisons.retain(|line| line.metric != TOKEN_AGREEMENT);
    println!("\nthe same, given the exits that the replays took instead of those recorded at full depth:");
    write_errors(&comparisons, folder, "_of_exits_taken")
}

/// Writes and prints how far simulations of one load are off.
fn write_errors(comparisons: &[Comparison], folder: &Path, suffix: &str) -> Result<()> {
    let errors = mean_errors(comparisons);
    write_csv(&folder.join(format!("validation{suffix}.csv")), comparisons)?;
    write_csv(&folder.join(format!("repeats{suffix}.csv")), comparisons.iter().flat_map(Comparison::repeats))?;
    write_csv(&folder.join(format!("errors{suffix}.csv")), &errors)?;
    report::print_errors(comparisons, &errors);
    Ok(())
}

/// Simulates every replay at the pace that the machine had during it; `exits` are those of each of the settings.
fn simulate_repeats(
    settings: &[Settings],
    measured: &Measured,
    exits: &[&ExitModel],
    load: &MeasuredLoad,
    workload: &Workload,
) -> Result<Vec<Vec<Summary>>> {
    let model = LatencyModel::new(&measured.profile)?;
    let mut simulations = Vec::new();
    for paces in &load.paces {
        for ((&settings, exits), pace) in settings.iter().zip(exits).zip(paces) {
            simulations.push(Machines::ONE.simulation(settings, &model, exits, workload)?.at_pace(pace));
        }
    }
    let runs = run_simulations(&simulations, 1, None, &workload.requests)?;
    Ok(runs.chunks(settings.len()).map(|runs| summaries(runs).cloned().collect()).collect())
}

/// Simulates what the experiment varies.
fn simulate_variants(
    variants: &Variants,
    measured: &Measured,
    exits: &ExitModel,
    requests: Vec<Request>,
    results: &Path,
) -> Result<()> {
    let (latency, workload) = (LatencyModel::new(&measured.profile)?, Workload { requests, prefixes: None });
    for (file, settings) in [(SWEEP_THRESHOLD, &variants.thresholds), (SWEEP_MAX_BATCH, &variants.max_batch)] {
        if !settings.is_empty() {
            let runs = simulate_all(settings, &latency, exits, &workload)?;
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
        let at = |measure| move |&threshold: &f32| ExitPolicy::Confidence { measure, threshold };
        let exit = sweeps.thresholds.iter().flat_map(|(&measure, thresholds)| thresholds.iter().map(at(measure)));
        let thresholds = Serving { batching: vec![Batching::Depth], exit: exit.collect(), ..serving.clone() };
        let settings = |serving: Serving| serving.all_settings(model, requests);
        let by_batch = sweeps.max_batch.iter().map(|&max_batch| settings(serving.with_batch(max_batch)));
        let by_batch: Vec<Vec<Settings>> = by_batch.collect::<Result<_>>()?;
        Ok(Self { thresholds: settings(thresholds)?, max_batch: by_batch.concat() })
    }

    fn all(&self) -> impl Iterator<Item = &Settings> + Clone {
        self.thresholds.iter().chain(&self.max_batch)
    }
}
