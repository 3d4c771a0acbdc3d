//! Runs of the simulator, and what is written of any run.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use latency::{Extrapolations, LatencyModel, TimeByComponent};
use rayon::prelude::*;
use scheduler::{ExitPolicy, KvFill, Settings};
use serde::Serialize;
use simulator::{
    Draw, ExitModel, GroupSummary, Link, MachineGroup, Metrics, Objectives, Outcome, RequestLog, Routing, Simulation,
    SimulationError, Source, Summary, SystemSummary, write_csv,
};
use traces::{ExitTrace, LatencyProfile, Request, Requests, check_same_model};

use crate::exit_choice::ExitChoice;
use crate::named_engine::NamedEngine;
use crate::profiles::read_profile;
use crate::quality::{self, Quality};
use crate::reporter::Reporter;
use crate::results::{CONFIG, ResultsFolder};
use crate::serving::check_machines;
use crate::workload::Workload;

/// The most requests of all machines and runs together whose times are kept until they are written: 88 bytes each, 4.4 GB
/// in all.
const MOST_REQUESTS_KEPT: u128 = 50_000_000;

/// A line for each request of each run.
const REQUESTS: &str = "requests.csv";

/// One run under one batching and one exit policy.
pub struct Run {
    /// What it came to.
    pub summary: Summary,
    /// What it was made of.
    pub metrics: Metrics,
    /// Where its time went, of a simulation.
    pub time: Option<TimeByComponent>,
    /// How good the served text is, of a run whose text was compared with full depth.
    pub quality: Option<Quality>,
    /// How each group of machines was used, of a simulation of machines with roles.
    pub groups: Vec<GroupSummary>,
}

impl Run {
    /// The run with the quality of the text that it served.
    pub fn with_quality(self, quality: Quality) -> Self {
        Self { summary: quality.add_to(self.summary), quality: Some(quality), ..self }
    }
}

/// Reads what a simulation looks times and exits up in; see [`models`]. The profile is that of a folder or one that ships;
/// paths are relative to `base`.
///
/// # Errors
/// If there is no such profile, a folder does not read, or as there.
pub fn load_models(
    base: &Path,
    profile: &Path,
    exits: Option<&Path>,
    seed: u64,
    policies: &[ExitChoice],
) -> Result<(LatencyModel, ExitModel)> {
    let profile = read_profile(base, profile)?;
    let exits = exits.map(|exits| ExitTrace::read(base.join(exits))).transpose()?;
    models(&profile, exits.as_ref(), seed, policies)
}

/// What a simulation looks times and exits up in; exits are drawn with `seed`. Without an exit trace every token runs every
/// depth, and the policies must ask for nothing else.
///
/// # Errors
/// If the two are of different models, or a policy lets rows exit and there is no exit trace.
pub fn models(
    profile: &LatencyProfile,
    exits: Option<&ExitTrace>,
    seed: u64,
    policies: &[ExitChoice],
) -> Result<(LatencyModel, ExitModel)> {
    let latency = LatencyModel::new(profile)?;
    let Some(exits) = exits else {
        if let Some(policy) = policies.iter().find(|policy| **policy != ExitChoice::Policy(ExitPolicy::None)) {
            bail!("exit policy {policy} without an exit trace: expected one (exits), or exit policy none alone");
        }
        return Ok((latency, ExitModel::full_depth(profile.meta.num_loops, &profile.meta.fingerprint)?));
    };
    check_same_model(profile, exits)?;
    Ok((latency, ExitModel::new(exits, Draw::Seeded(seed))?))
}

/// The machines of a simulated system.
#[derive(Clone, Copy, Debug)]
pub struct Machines {
    /// How many.
    pub replicas: usize,
    /// How requests are spread over them.
    pub routing: Routing,
    /// Seed to draw times from their spread with; none for medians.
    pub spread: Option<u64>,
}

impl Machines {
    /// One machine whose times are the medians.
    pub const ONE: Self = Self { replicas: 1, routing: Routing::RoundRobin, spread: None };

    /// A simulation of the workload under `settings`.
    ///
    /// # Errors
    /// If profile, exit trace and settings do not belong together.
    pub fn simulation<'m>(
        &self,
        settings: Settings,
        latency: &'m LatencyModel,
        exits: &'m ExitModel,
        workload: &'m Workload,
    ) -> Result<Simulation<'m>, SimulationError> {
        Ok(self.serve(Simulation::new(settings, latency, exits)?, workload))
    }

    /// A simulation of the workload on groups of machines, whatever the number of replicas.
    ///
    /// # Errors
    /// If profiles, exit trace and settings do not belong together, or the groups make no system.
    pub fn simulation_of_groups<'m, R>(
        &self,
        groups: &'m [MachineGroup<'m>],
        link: Option<Link>,
        exits: &'m ExitModel,
        workload: &'m Workload<R>,
    ) -> Result<Simulation<'m>, SimulationError> {
        Ok(self.serve(Simulation::of_groups(groups, link, exits)?, workload))
    }

    /// Lets machines serve a workload.
    fn serve<'m, R>(&self, simulation: Simulation<'m>, workload: &'m Workload<R>) -> Simulation<'m> {
        let simulation = simulation.with_routing(self.routing);
        let simulation = match &workload.prefixes {
            Some(prefixes) => simulation.with_prefixes(prefixes),
            None => simulation,
        };
        let simulation = match &workload.closed_loop {
            Some(closed_loop) => simulation.in_closed_loop(closed_loop),
            None => simulation,
        };
        match self.spread {
            Some(seed) => simulation.with_spread(seed),
            None => simulation,
        }
    }

    /// A simulation for every one of `settings`.
    ///
    /// # Errors
    /// As [`Self::simulation`].
    pub fn simulations<'m>(
        &self,
        settings: &[Settings],
        latency: &'m LatencyModel,
        exits: &'m ExitModel,
        workload: &'m Workload,
    ) -> Result<Vec<Simulation<'m>>, SimulationError> {
        settings.iter().map(|&settings| self.simulation(settings, latency, exits, workload)).collect()
    }
}

/// Simulates every one of `settings` over the same requests on one machine, on all cores; warns of times that had to
/// be extrapolated.
///
/// # Errors
/// If profile, exit trace and settings do not belong together, or a request cannot be served.
pub fn simulate_all(
    settings: &[Settings],
    latency: &LatencyModel,
    exits: &ExitModel,
    workload: &Workload,
    objectives: Option<Objectives>,
    reporter: &mut dyn Reporter,
) -> Result<Vec<Run>> {
    let simulations = Machines::ONE.simulations(settings, latency, exits, workload)?;
    run_simulations(&simulations, 1, objectives, &workload.requests, RequestTimes::Kept, reporter)
}

/// What becomes of the times of each request of a simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestTimes<'a> {
    /// They are kept: 80 bytes.
    Kept,
    /// Nothing.
    Dropped,
    /// They are written to `requests.csv` in this folder, in order of id, as soon as all earlier requests have ended.
    Written(&'a Path),
}

/// Runs simulations over the same requests, on all cores; warns of times that had to be extrapolated.
///
/// # Errors
/// If a request cannot be served, there is no machine, or a file cannot be read or written.
pub fn run_simulations(
    simulations: &[Simulation<'_>],
    replicas: usize,
    objectives: Option<Objectives>,
    requests: &impl Requests,
    times: RequestTimes<'_>,
    reporter: &mut dyn Reporter,
) -> Result<Vec<Run>> {
    for simulation in simulations {
        check_machines(simulation.settings_of_groups(replicas))?;
    }
    let number = |simulation: &Simulation<'_>| simulation.settings_of_groups(replicas).map(|(number, _)| number).sum();
    let machines: usize = simulations.first().map_or(replicas, number);
    let kept = requests.count() as u128 * machines as u128 * simulations.len() as u128;
    ensure!(
        times != RequestTimes::Kept || kept <= MOST_REQUESTS_KEPT,
        "{} requests x {machines} replicas x {} combinations of policies are {kept}: expected at most \
         {MOST_REQUESTS_KEPT}, since the times of every request are kept (`depthwise sweep` keeps means only)",
        requests.count(),
        simulations.len()
    );
    // All draw the same generations, so that one of them finds which are too short.
    let longer = AtomicUsize::new(0);
    let outcomes: Vec<Result<_>> = simulations
        .par_iter()
        .enumerate()
        .map(|(place, simulation)| {
            let log = match times {
                RequestTimes::Written(folder) => Some(request_log(&requests_file(folder, place), place, simulation)?),
                RequestTimes::Kept | RequestTimes::Dropped => None,
            };
            let of_machine = |settings| {
                let metrics = Metrics::new(settings);
                let metrics = match (&log, times) {
                    (Some(log), _) => metrics.with_request_log(log.clone()),
                    (None, RequestTimes::Kept) => metrics.with_requests(),
                    (None, _) => metrics,
                };
                objectives.map_or(metrics.clone(), |objectives| metrics.with_objectives(objectives))
            };
            let mut metrics: Vec<Metrics> = simulation.settings_of_machines(replicas).map(of_machine).collect();
            let outcome = requests.read(|requests| {
                let is_written = |_: &_| log.as_ref().is_none_or(|log| !log.has_failed());
                let requests = requests.take_while(is_written).inspect(|request| {
                    if place == 0 && simulation.exits().is_longer_than_recorded(request) {
                        longer.fetch_add(1, Ordering::Relaxed);
                    }
                });
                simulation.run(requests, &mut metrics)
            });
            log.map_or(Ok(()), RequestLog::finish).context(CANNOT_WRITE)?;
            Ok((metrics, outcome??))
        })
        .collect();
    let outcomes: Vec<(Vec<Metrics>, Outcome)> = outcomes.into_iter().collect::<Result<_>>()?;
    if let RequestTimes::Written(folder) = times {
        join_requests(folder, simulations.len()).context(CANNOT_WRITE)?;
    }
    let mut beyond = Extrapolations::default();
    let run = |(simulation, (metrics, outcome)): (&Simulation<'_>, (Vec<Metrics>, Outcome))| {
        beyond.merge(&outcome.extrapolations);
        let SystemSummary { metrics, summary, groups } = simulation.summarize(metrics, &outcome)?;
        Ok(Run { summary, metrics, time: Some(outcome.time), quality: None, groups })
    };
    let runs = simulations.iter().zip(outcomes).map(run).collect();
    warn_of_extrapolations(&beyond, reporter);
    if let Some(simulation) = simulations.first() {
        warn_of_short_recordings(simulation.exits(), longer.into_inner(), requests.count(), reporter);
    }
    runs
}

const CANNOT_WRITE: &str = "cannot write requests.csv";

/// Where the requests of the simulation at a place are written: those of the first where all will be.
fn requests_file(folder: &Path, place: usize) -> PathBuf {
    match place {
        0 => folder.join(REQUESTS),
        place => folder.join(format!("requests-{place}.csv")),
    }
}

/// Rows of requests that are written together.
const WRITTEN_AT_ONCE: usize = 1024;

/// A log that writes the requests of a simulation; the first has the header.
fn request_log(path: &Path, place: usize, simulation: &Simulation<'_>) -> Result<RequestLog> {
    let file = File::create(path).context(CANNOT_WRITE)?;
    let mut writer = csv::WriterBuilder::new().has_headers(place == 0).from_writer(file);
    let of_run = OfRun::of_simulation(simulation.settings());
    // Many at once, so that the simulation keeps the caches between them.
    let mut waiting = Vec::with_capacity(WRITTEN_AT_ONCE);
    Ok(RequestLog::new(move |row| {
        waiting.extend(row.copied());
        if waiting.len() < WRITTEN_AT_ONCE && row.is_some() {
            return Ok(());
        }
        waiting.drain(..).try_for_each(|row| writer.serialize((&of_run, row)))?;
        if row.is_none() { writer.flush() } else { Ok(()) }
    }))
}

/// Puts the requests of all simulations into one file, in order.
fn join_requests(folder: &Path, count: usize) -> io::Result<()> {
    let mut all = OpenOptions::new().append(true).open(requests_file(folder, 0))?;
    for place in 1..count {
        let path = requests_file(folder, place);
        io::copy(&mut File::open(&path)?, &mut all)?;
        std::fs::remove_file(&path)?;
    }
    Ok(())
}

/// Says how many requests are longer than the recorded generation that they take.
fn warn_of_short_recordings(exits: &ExitModel, longer: usize, requests: usize, reporter: &mut dyn Reporter) {
    if longer > 0 {
        let goes_on = match exits.kv_fill() {
            Some(_) => "at the same position",
            None => "from its beginning",
        };
        reporter.warning(&format!(
            "{longer} of {requests} requests are longer than the recorded generation that they take exits from: they go \
             on in another one, {goes_on}"
        ));
    }
}

/// Says how many requests are longer than the generation whose exits they begin with, where exits are
/// [scripted](NamedEngine::is_scripted).
pub(crate) fn warn_of_script(named: &NamedEngine, requests: &[Request], reporter: &mut dyn Reporter) {
    let longer = named.longer_than_followed(requests);
    if longer > 0 {
        reporter.warning(&format!(
            "{longer} of {} requests are longer than the generation that they take exits from: they go on in another \
             one, from its beginning",
            requests.len()
        ));
    }
}

/// Says where runs went beyond what was measured, if they did.
pub fn warn_of_extrapolations(beyond: &Extrapolations, reporter: &mut dyn Reporter) {
    if !beyond.is_empty() {
        reporter.warning(&format!("some times are beyond what was measured:\n{beyond}"));
    }
}

/// Finishes a folder of results with the command that made it, `summary.csv` and `requests.csv`.
///
/// # Errors
/// If something cannot be written.
pub fn write_results(mut folder: ResultsFolder, command: &str, args: &impl Debug, runs: &[Run]) -> Result<()> {
    write_requests(&folder.path()?, runs)?;
    finish_results(folder, command, args, runs)
}

/// Finishes a folder of results that has `requests.csv` with all else that [`write_results`] writes.
///
/// # Errors
/// If something cannot be written.
pub fn finish_results(mut folder: ResultsFolder, command: &str, args: &impl Debug, runs: &[Run]) -> Result<()> {
    let results = folder.path()?;
    std::fs::write(results.join(CONFIG), format!("command: {command}\narguments: |\n  {args:?}\n"))?;
    write_csv(&results.join("summary.csv"), runs.iter().map(|run| &run.summary))?;
    write_quality(&results, runs)?;
    write_groups(&results, runs)?;
    folder.finish()
}

/// Which run a line is of: the first columns of files that hold several runs.
#[derive(Clone, Serialize)]
struct OfRun {
    source: Source,
    batching: &'static str,
    exit_policy: String,
    kv_fill: KvFill,
}

impl OfRun {
    fn of_simulation(settings: &Settings) -> Self {
        Self {
            source: Source::Simulated,
            batching: settings.batching.name(),
            exit_policy: settings.exit.to_string(),
            kv_fill: settings.kv_fill,
        }
    }

    fn new(summary: &Summary) -> Self {
        Self {
            source: summary.source,
            batching: summary.batching.name(),
            exit_policy: summary.exit_policy.clone(),
            kv_fill: summary.kv_fill,
        }
    }
}

/// The lines of `requests.csv`: every request of every run.
pub fn request_lines<'a>(runs: impl IntoIterator<Item = &'a Run>) -> impl Iterator<Item = impl Serialize> {
    runs.into_iter().flat_map(|run| {
        let of_run = OfRun::new(&run.summary);
        run.metrics.requests().map(move |&request| (of_run.clone(), request))
    })
}

/// Writes `requests.csv`.
///
/// # Errors
/// If the file cannot be written.
pub fn write_requests<'a>(folder: &Path, runs: impl IntoIterator<Item = &'a Run>) -> Result<()> {
    Ok(write_csv(&folder.join(REQUESTS), request_lines(runs))?)
}

/// Writes `quality.csv`, if the text of a run was compared with full depth.
///
/// # Errors
/// If the file cannot be written.
pub fn write_quality<'a>(folder: &Path, runs: impl IntoIterator<Item = &'a Run>) -> Result<()> {
    let of_run = |run: &'a Run| run.quality.iter().flat_map(|quality| quality::lines(&run.summary, quality));
    let lines: Vec<_> = runs.into_iter().flat_map(of_run).collect();
    if lines.is_empty() { Ok(()) } else { Ok(write_csv(&folder.join("quality.csv"), lines)?) }
}

/// Writes `machines.csv`, if a run was of machines with roles.
///
/// # Errors
/// If the file cannot be written.
pub fn write_groups<'a>(folder: &Path, runs: impl IntoIterator<Item = &'a Run>) -> Result<()> {
    let of_run = |run: &'a Run| run.groups.iter().map(|group| (OfRun::new(&run.summary), group));
    let lines: Vec<_> = runs.into_iter().flat_map(of_run).collect();
    if lines.is_empty() { Ok(()) } else { Ok(write_csv(&folder.join("machines.csv"), lines)?) }
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
