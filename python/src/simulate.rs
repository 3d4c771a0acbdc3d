//! Simulations and sweeps, with the results of the command line.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use experiments::input::SimulationInput;
use experiments::results::ResultsFolder;
use experiments::runs::{Machines, RequestTimes, models, request_lines, run_simulations, write_results};
use experiments::sweep::{Earlier, ShardReport, SweepReport, merge, sweep_in_memory, sweep_shard};
use experiments::{Run, Serving, SweepSpec, Workload};
use pyo3::prelude::*;
use serde::{Deserialize, Serialize};
use simulator::{Objectives, Routing, Shard};
use traces::RequestSpec;

use crate::callbacks::PythonLatency;
use crate::convert::from_python;
use crate::detached::{Ends, detached};
use crate::errors::raise;
use crate::files::{Exits, Profile, Requests};
use crate::table::{Table, of_csv, of_lines};

/// What a simulation is of, beside requests, profile and exit trace.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    serving: Serving,
    /// How requests are read or made, or sent if they are there.
    requests: RequestSpec,
    replicas: usize,
    routing: Routing,
    spread: bool,
    seed: u64,
    #[serde(default)]
    objectives: Option<Objectives>,
}

/// The runs of a simulation, one for each combination of policies.
#[pyclass(module = "depthwise", frozen)]
pub struct Runs {
    summary: Vec<u8>,
    requests: Option<Vec<u8>>,
}

impl Runs {
    fn new(runs: &[Run], times: RequestTimes) -> Result<Self> {
        let summary = csv_of(runs.iter().map(|run| &run.summary))?;
        let requests = (times == RequestTimes::Kept).then(|| csv_of(request_lines(runs))).transpose()?;
        Ok(Self { summary, requests })
    }
}

#[pymethods]
impl Runs {
    /// A row for each combination of policies, with the columns of `summary.csv` (see docs/reference/metrics.md).
    #[getter]
    fn summary(&self) -> PyResult<Table> {
        of_csv(&self.summary).map_err(raise)
    }

    /// A row for each request of each combination, with the columns of `requests.csv` (see docs/reference/results.md); `None`
    /// if they were not kept.
    #[getter]
    fn requests(&self) -> PyResult<Option<Table>> {
        self.requests.as_deref().map(of_csv).transpose().map_err(raise)
    }

    fn __repr__(&self) -> String {
        let runs = self.summary.iter().filter(|&&byte| byte == b'\n').count().saturating_sub(1);
        format!("<depthwise.Runs of {runs} combinations of policies>")
    }
}

fn csv_of(lines: impl IntoIterator<Item = impl Serialize>) -> Result<Vec<u8>> {
    let mut out = csv::Writer::from_writer(Vec::new());
    lines.into_iter().try_for_each(|line| out.serialize(line))?;
    Ok(out.into_inner()?)
}

/// Simulates requests under every combination of policies. See `depthwise.simulate`.
#[pyfunction]
#[pyo3(signature = (requests, profile, exits, options, latency, keep_requests, out, progress))]
#[allow(clippy::too_many_arguments, reason = "`depthwise.simulate` names them")]
pub fn simulate(
    py: Python<'_>,
    requests: Option<&Bound<'_, Requests>>,
    profile: &Bound<'_, Profile>,
    exits: Option<&Bound<'_, Exits>>,
    options: &Bound<'_, PyAny>,
    latency: Option<&Bound<'_, PyAny>>,
    keep_requests: bool,
    out: Option<PathBuf>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<Runs> {
    let said = format!("{options:?}");
    let Options { serving, requests: spec, replicas, routing, spread, seed, objectives } =
        from_python(options).map_err(raise)?;
    serving.check().context("serving").map_err(raise)?;
    let latency = latency.map(PythonLatency::new);
    let (requests, profile) = (requests.map(|requests| &requests.get().0), &profile.get().0);
    let exits = exits.map(|exits| &exits.get().0);
    let times = if keep_requests || out.is_some() { RequestTimes::Kept } else { RequestTimes::Dropped };
    detached(py, progress, Ends::ByFlag, move |reporter| {
        let folder = out.map(|out| ResultsFolder::create(&out, "simulate")).transpose()?;
        let workload = match requests {
            None => Workload::load(&spec, Path::new(""), &serving, seed, reporter)?,
            Some(trace) => {
                let prefixes = trace.prefix_hashes.clone().filter(|_| serving.prefix_caching).map(Arc::new);
                Workload { prefixes, ..Workload::of_trace(trace, &spec, seed)? }
            }
        };
        let (times_of, exits) = models(profile, exits, seed, &serving.exit)?;
        let times_of = match latency {
            Some(latency) => times_of.with_times(latency),
            None => times_of,
        };
        let machines = Machines { replicas, routing, spread: spread.then_some(seed) };
        let input = SimulationInput::new(workload, (times_of, exits), &serving, machines, Path::new(""))?;
        let groups = input.groups();
        let stop = reporter.stop().unwrap_or_default();
        let simulations: Vec<_> =
            input.simulations(&groups)?.into_iter().map(|simulation| simulation.with_stop(&stop)).collect();
        let runs = run_simulations(&simulations, replicas, objectives, &input.workload.requests, times, reporter)?;
        if let Some(folder) = folder {
            write_results(folder, "simulate", &format_args!("{said}"), &runs)?;
        }
        Runs::new(&runs, if keep_requests { RequestTimes::Kept } else { RequestTimes::Dropped })
    })
}

/// What a sweep came to.
#[pyclass(module = "depthwise", frozen)]
pub struct Sweep {
    points: Option<simulator::Table>,
    summary: simulator::Table,
    /// The folder of the results.
    #[pyo3(get)]
    folder: Option<PathBuf>,
}

#[pymethods]
impl Sweep {
    /// A row for each point and seed, with the columns of `sweep.csv`.
    #[getter]
    fn points(&self) -> PyResult<Table> {
        let points = || match (&self.points, &self.folder) {
            (Some(points), _) => of_lines(&points.header, &points.lines),
            (None, Some(folder)) => {
                let path = folder.join(experiments::sweep::SWEEP);
                of_csv(&std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?)
            }
            (None, None) => unreachable!("results are in memory or in a folder"),
        };
        points().map_err(raise)
    }

    /// A row for each point, with means over the seeds and half the widths of their 95% confidence intervals: the columns of
    /// `sweep-summary.csv`.
    #[getter]
    fn summary(&self) -> PyResult<Table> {
        of_lines(&self.summary.header, &self.summary.lines).map_err(raise)
    }

    fn __repr__(&self) -> String {
        format!("<depthwise.Sweep of {} settings>", self.summary.lines.len())
    }
}

/// Reads a sweep from a YAML file, with the folder that its paths are relative to, or from a dictionary with the same keys.
fn read_spec(spec: &Bound<'_, PyAny>) -> Result<(SweepSpec, PathBuf)> {
    match spec.extract::<PathBuf>() {
        Ok(path) => {
            let spec = SweepSpec::load(&path)?;
            Ok((spec, path.parent().unwrap_or(Path::new("")).to_owned()))
        }
        Err(_) => Ok((from_python(spec)?, PathBuf::new())),
    }
}

fn earlier(restart: bool) -> Earlier {
    if restart { Earlier::Remove } else { Earlier::Continue }
}

/// Simulates a sweep. See `depthwise.sweep`.
#[pyfunction]
pub fn sweep(
    py: Python<'_>,
    spec: &Bound<'_, PyAny>,
    out: Option<PathBuf>,
    restart: bool,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<Sweep> {
    let (spec, base) = read_spec(spec).map_err(raise)?;
    detached(py, progress, Ends::ByFlag, move |reporter| {
        let Some(folder) = out else {
            let (points, summary) = sweep_in_memory(&spec, &base, reporter)?;
            return Ok(Sweep { points: Some(points), summary, folder: None });
        };
        let SweepReport { summary, .. } = experiments::sweep(&spec, &base, &folder, earlier(restart), reporter)?;
        Ok(Sweep { points: None, summary, folder: Some(folder) })
    })
}

/// Simulates a shard of a sweep into a folder. See `depthwise.sweep_shard`.
#[pyfunction]
pub fn sweep_one_shard(
    py: Python<'_>,
    spec: &Bound<'_, PyAny>,
    shard: &str,
    out: PathBuf,
    restart: bool,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<usize> {
    let (spec, base) = read_spec(spec).map_err(raise)?;
    let shard: Shard = shard.parse().map_err(|error: String| raise(anyhow::Error::msg(error)))?;
    detached(py, progress, Ends::ByFlag, move |reporter| {
        let ShardReport { simulations, .. } = sweep_shard(&spec, &base, shard, &out, earlier(restart), reporter)?;
        Ok(simulations)
    })
}

/// Merges the folders of all shards of a sweep. See `depthwise.merge_shards`.
#[pyfunction]
pub fn merge_all_shards(
    py: Python<'_>,
    spec: &Bound<'_, PyAny>,
    shards: Vec<PathBuf>,
    out: PathBuf,
    restart: bool,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<Sweep> {
    let (spec, base) = read_spec(spec).map_err(raise)?;
    detached(py, progress, Ends::ByFlag, move |reporter| {
        let SweepReport { summary, .. } = merge(&spec, &base, &shards, &out, earlier(restart), reporter)?;
        Ok(Sweep { points: None, summary, folder: Some(out) })
    })
}
