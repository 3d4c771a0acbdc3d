//! Runs of the simulator, and what is written of any run.

use std::path::Path;

use anyhow::Result;
use scheduler::Settings;
use serde::Serialize;
use simulator::{ExitModel, LatencyModel, Metrics, Simulation, Source, Summary, run_all, write_csv};
use traces::Request;

/// One run under one batching and one exit policy.
pub struct Run {
    /// What it came to.
    pub summary: Summary,
    /// What it was made of.
    pub metrics: Metrics,
}

/// Simulates every one of `settings` over the same requests, on all cores; warns of times that had to be
/// extrapolated.
///
/// # Errors
/// If profile, exit trace and settings do not belong together, or a request cannot be served.
pub fn simulate_all(
    settings: &[Settings],
    latency: &LatencyModel,
    exits: &ExitModel,
    requests: &[Request],
) -> Result<Vec<Run>> {
    let simulations =
        settings.iter().map(|&settings| Simulation::new(settings, latency, exits)).collect::<Result<Vec<_>, _>>()?;
    let outcomes = run_all(&simulations, requests, |settings| Metrics::new(settings).with_requests())?;
    let mut beyond = simulator::Extrapolations::default();
    let runs = outcomes
        .into_iter()
        .map(|(metrics, outcome)| {
            beyond.merge(&outcome.extrapolations);
            Run { summary: metrics.summary(Source::Simulated, Some(outcome.token_agreement())), metrics }
        })
        .collect();
    if !beyond.is_empty() {
        eprintln!("warning: some times are beyond what was measured:\n{beyond}");
    }
    Ok(runs)
}

/// Which run a line is of: the first columns of files that hold several runs.
#[derive(Clone, Serialize)]
struct OfRun {
    source: Source,
    batching: &'static str,
    exit_policy: String,
}

impl OfRun {
    fn new(summary: &Summary) -> Self {
        Self { source: summary.source, batching: summary.batching.name(), exit_policy: summary.exit_policy.clone() }
    }
}

/// Writes `requests.csv`: every request of every run.
///
/// # Errors
/// If the file cannot be written.
pub fn write_requests<'a>(folder: &Path, runs: impl IntoIterator<Item = &'a Run>) -> Result<()> {
    let lines = runs.into_iter().flat_map(|run| {
        let of_run = OfRun::new(&run.summary);
        run.metrics.requests().map(move |&request| (of_run.clone(), request))
    });
    Ok(write_csv(&folder.join("requests.csv"), lines)?)
}

/// Writes `depth_rows.csv`: rows by depth over time, of every run.
///
/// # Errors
/// If the file cannot be written.
pub fn write_depth_rows<'a>(folder: &Path, runs: impl IntoIterator<Item = &'a Run>) -> Result<()> {
    let lines = runs.into_iter().flat_map(|run| {
        let of_run = OfRun::new(&run.summary);
        run.metrics.depth_rows().records().map(move |record| (of_run.clone(), record))
    });
    Ok(write_csv(&folder.join("depth_rows.csv"), lines)?)
}
