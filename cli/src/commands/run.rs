//! `depthwise run`: an experiment from beginning to end.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use engine::executor::Sampling;
use scheduler::{Batching, ExitPolicy, Settings};
use serde::Serialize;
use simulator::{Draw, ExitModel, LatencyModel, ModelMemory, Summary, write_csv};
use traces::Request;

use crate::experiment::{EngineSpec, Experiment, System};
use crate::figures::{self, Caption, SWEEP_MAX_BATCH, SWEEP_THRESHOLD};
use crate::measure::{NamedEngine, limits, measure};
use crate::parts::{SystemTime, write_time_by_part};
use crate::report;
use crate::results::{CONFIG, ResultsFolder};
use crate::runs::{Run, load_models, simulate_all, write_depth_rows, write_requests};
use crate::serving::Serving;
use crate::validation::compare;
use crate::workload::Workload;

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
    let workload = Workload::load(&experiment.requests, base, &experiment.serving)?;
    match &experiment.engine {
        Some(spec) => measure_and_simulate(experiment, spec, base, &workload, folder.path())?,
        None => simulate_systems(experiment, base, &workload, folder.path())?,
    }
    folder.finish()?;
    println!("\nResults are in {}", target.display());
    Ok(())
}

/// Measures the engine, simulates the same and more from what was measured, and compares.
fn measure_and_simulate(
    experiment: &Experiment,
    spec: &EngineSpec,
    base: &Path,
    workload: &Workload,
    results: &Path,
) -> Result<()> {
    let requests = &workload.requests;
    let sampling = Sampling { temperature: spec.temperature, seed: experiment.seed };
    let (model, prompts) = (spec.model_from(base), base.join(&spec.prompts));
    let engine = NamedEngine::load(&model, spec.loops, spec.weights, &prompts, sampling)?;
    let settings = experiment.serving.all_settings(&engine.memory(), requests)?;
    let variants = Variants::new(experiment, &engine.memory(), requests)?;
    let limits = limits(settings.iter().chain(variants.all()), requests);
    let measured = measure(&engine, &settings, requests, spec.repeats, limits)?;
    measured.profile.write(results.join("profile"))?;
    measured.exits.write(results.join("exits"))?;

    let latency = LatencyModel::new(&measured.profile)?;
    let exits = ExitModel::new(&measured.exits, Draw::Recorded)?;
    let simulate = |settings: &[Settings]| simulate_all(settings, &latency, &exits, workload);
    let simulated = simulate(&settings)?;
    let comparisons = compare(summaries(&measured.runs), summaries(&simulated));
    write_csv(&results.join("validation.csv"), &comparisons)?;
    for (file, settings) in [(SWEEP_THRESHOLD, &variants.thresholds), (SWEEP_MAX_BATCH, &variants.max_batch)] {
        if !settings.is_empty() {
            write_csv(&results.join(file), summaries(&simulate(settings)?))?;
        }
    }

    let runs: Vec<Run> = measured.runs.into_iter().chain(simulated).collect();
    write_csv(&results.join("summary.csv"), summaries(&runs))?;
    write_requests(results, &runs)?;
    write_depth_rows(results, &runs)?;
    let caption = Caption { setting: experiment.title.clone(), device: measured.profile.meta.device };
    figures::draw(results, &caption)?;
    report::print_summaries(summaries(&runs));
    report::print_verdict(&runs, &comparisons);
    Ok(())
}

fn summaries(runs: &[Run]) -> impl Iterator<Item = &Summary> {
    runs.iter().map(|run| &run.summary)
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
        let of_size = |&max_batch: &u32| Serving {
            max_batch,
            token_budget: serving.token_budget.max(max_batch),
            ..serving.clone()
        };
        let settings = |serving: Serving| serving.all_settings(model, requests);
        let by_batch: Vec<Vec<Settings>> = sweeps.max_batch.iter().map(of_size).map(settings).collect::<Result<_>>()?;
        Ok(Self { thresholds: settings(thresholds)?, max_batch: by_batch.concat() })
    }

    fn all(&self) -> impl Iterator<Item = &Settings> + Clone {
        self.thresholds.iter().chain(&self.max_batch)
    }
}

/// What a line of `summary.csv` is of, where there are several systems.
#[derive(Clone, Serialize)]
struct OfSystem {
    system: String,
    published_tok_s: Option<f64>,
    /// Simulated less published, in percent of published.
    error_pct: Option<f64>,
}

impl OfSystem {
    fn new(system: &System, run: &Run) -> Self {
        let error_pct = |published: f64| 100.0 * (run.summary.throughput_tok_s / published - 1.0);
        Self {
            system: system.name.clone(),
            published_tok_s: system.published_tok_s,
            error_pct: system.published_tok_s.map(error_pct),
        }
    }
}

/// Simulates each system under its policies, at each batch limit of the sweep if there is one; compares with what was
/// published of it, and shows where the time goes.
fn simulate_systems(experiment: &Experiment, base: &Path, workload: &Workload, results: &Path) -> Result<()> {
    let mut lines = Vec::new();
    let mut times = Vec::new();
    let mut devices: Vec<String> = Vec::new();
    for system in &experiment.systems {
        let (latency, exits) = load_models(&base.join(&system.profile), &base.join(&system.exits), experiment.seed)?;
        if !devices.iter().any(|device| device == latency.device()) {
            devices.push(latency.device().to_owned());
        }
        let serving = system.serving(&experiment.serving);
        let of_size = |&max_batch: &u32| Serving {
            max_batch,
            token_budget: serving.token_budget.max(max_batch),
            ..serving.clone()
        };
        let mut sizes: Vec<Serving> = experiment.sweeps.max_batch.iter().map(of_size).collect();
        if sizes.is_empty() {
            sizes.push(serving.clone());
        }
        let settings = |serving: &Serving| serving.all_settings(latency.memory(), &workload.requests);
        let settings: Vec<Vec<Settings>> =
            sizes.iter().map(settings).collect::<Result<_>>().with_context(|| system.name.clone())?;
        for run in simulate_all(&settings.concat(), &latency, &exits, workload)? {
            times.extend(run.time);
            lines.push((OfSystem::new(system, &run), run.summary));
        }
    }
    write_csv(&results.join("summary.csv"), &lines)?;
    let runs: Vec<SystemTime<'_>> = lines
        .iter()
        .zip(&times)
        .map(|((of, summary), time)| SystemTime { system: &of.system, summary, time })
        .collect();
    let caption = Caption { setting: experiment.title.clone(), device: devices.join(", ") };
    write_time_by_part(results, &caption, &runs)?;
    print_systems(&lines);
    report::print_memory(lines.iter().map(|(_, summary)| summary));
    Ok(())
}

fn print_systems(lines: &[(OfSystem, Summary)]) {
    let header = ["system", "batching", "exit", "batch", "mean depth", "tok/s", "published", "error %"];
    let number = |number: Option<f64>| number.map_or("-".to_owned(), |number| format!("{number:.1}"));
    let cells = lines.iter().map(|(of, summary)| {
        vec![
            of.system.clone(),
            summary.batching.to_string(),
            summary.exit_policy.clone(),
            summary.max_batch.to_string(),
            format!("{:.3}", summary.mean_depth),
            number(Some(summary.throughput_tok_s)),
            number(of.published_tok_s),
            number(of.error_pct),
        ]
    });
    report::print_table(&header, cells.collect());
}
