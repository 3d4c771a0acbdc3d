//! Systems side by side: profiles and exit traces at hand, each simulated under its policies.

use std::path::Path;

use anyhow::{Context, Result};
use latency::TimeByComponent;
use serde::Serialize;
use simulator::{Simulation, Summary, write_csv};

use crate::experiment::{Experiment, System};
use crate::figures::Caption;
use crate::machines::Groups;
use crate::parts::{draw_time_by_part, write_time_by_part};
use crate::reporter::Reporter;
use crate::runs::{Machines, RequestTimes, Run, load_models, run_simulations};
use crate::serving::{Serving, longest};
use crate::workload::Workload;

/// What a line of `summary.csv` is of, where there are several systems.
#[derive(Clone, Debug, Serialize)]
pub struct OfSystem {
    /// Name of the system.
    pub system: String,
    /// Throughput that was published of it.
    pub published_tok_s: Option<f64>,
    /// Simulated less published, in percent of published.
    pub error_pct: Option<f64>,
    /// Throughput over that of what the system is compared with.
    pub speedup: f64,
}

/// A system under one of its policies, at one batch limit.
pub struct SystemRun<'a> {
    /// Which.
    pub system: &'a System,
    /// Place of the batch limit among those that all systems are run at.
    pub size: usize,
    /// What it came to.
    pub summary: Summary,
    /// Where its time went.
    pub time: TimeByComponent,
    /// Throughput over that of what the system is compared with; NaN until all have run.
    pub speedup: f64,
}

/// A line of `summary.csv`.
pub type SystemLine = (OfSystem, Summary);

/// Simulates each system under its policies, at each batch limit of the sweep if there is one; compares them with each
/// other and with what was published of them, and writes where the time goes. The second result is whether the figures
/// were drawn, after all else was written.
///
/// # Errors
/// If something does not read, cannot be served or cannot be written.
pub fn simulate_systems(
    experiment: &Experiment,
    base: &Path,
    workload: &Workload,
    results: &Path,
    reporter: &mut dyn Reporter,
) -> Result<(Vec<SystemLine>, Result<()>)> {
    let mut runs = Vec::new();
    let mut devices: Vec<String> = Vec::new();
    for system in &experiment.systems {
        let device = simulate_system(experiment, system, base, workload, &mut runs, reporter)
            .with_context(|| format!("system `{}`", system.name))?;
        if !devices.contains(&device) {
            devices.push(device);
        }
    }
    compare(experiment, &mut runs)?;
    let lines: Vec<SystemLine> = runs.iter().map(|run| (OfSystem::new(run), run.summary.clone())).collect();
    write_csv(&results.join("summary.csv"), &lines)?;
    write_time_by_part(results, &runs)?;
    let caption = Caption { setting: experiment.title.clone(), device: devices.join(", ") };
    Ok((lines, draw_time_by_part(results, &caption, &runs)))
}

/// Runs one system, and returns the device that its profile was measured on.
fn simulate_system<'a>(
    experiment: &Experiment,
    system: &'a System,
    base: &Path,
    workload: &Workload,
    runs: &mut Vec<SystemRun<'a>>,
    reporter: &mut dyn Reporter,
) -> Result<String> {
    let (latency, exits) = load_models(base, &system.profile, Some(&system.exits), experiment.seed, &[])?;
    let serving = system.serving(&experiment.serving);
    let mut sizes: Vec<Serving> = experiment.sweeps.max_batch.iter().map(|&batch| serving.with_batch(batch)).collect();
    if sizes.is_empty() {
        sizes.push(serving);
    }
    for (size, serving) in sizes.iter().enumerate() {
        let groups = Groups::read(&serving.machines, serving.transfer, base)?;
        let settings = groups.all_settings(serving, &latency, longest(&workload.requests))?;
        let run = |run: Run| SystemRun {
            system,
            size,
            summary: run.summary,
            time: run.time.unwrap_or_default(),
            speedup: f64::NAN,
        };
        let of_groups: Vec<_> = settings.iter().map(|settings| groups.machines(settings, 1, &latency)).collect();
        let simulation = |of_groups| Machines::ONE.simulation_of_groups(of_groups, groups.link(), &exits, workload);
        let simulations: Vec<Simulation<'_>> =
            of_groups.iter().map(|groups| simulation(groups)).collect::<Result<_, _>>()?;
        let (objectives, requests) = (experiment.objectives, &workload.requests);
        let simulated = run_simulations(&simulations, 1, objectives, requests, RequestTimes::Kept, reporter)?;
        runs.extend(simulated.into_iter().map(run));
    }
    Ok(latency.meta().device.clone())
}

/// Fills in how many times as fast each run is as the first of what its system is compared with, at the same limit.
fn compare(experiment: &Experiment, runs: &mut [SystemRun<'_>]) -> Result<()> {
    for index in 0..runs.len() {
        let baseline = &experiment.baseline_of(runs[index].system)?.name;
        let size = runs[index].size;
        let first = runs.iter().find(|run| run.system.name == *baseline && run.size == size);
        let first = first.context("every system has run")?.summary.throughput_tok_s;
        runs[index].speedup = runs[index].summary.throughput_tok_s / first;
    }
    Ok(())
}

impl OfSystem {
    fn new(run: &SystemRun<'_>) -> Self {
        let error_pct = |published: f64| 100.0 * (run.summary.throughput_tok_s / published - 1.0);
        Self {
            system: run.system.name.clone(),
            published_tok_s: run.system.published_tok_s,
            error_pct: run.system.published_tok_s.map(error_pct),
            speedup: run.speedup,
        }
    }
}
