//! The runs of a sweep, found sound before the first of them starts.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use latency::{Extrapolations, LatencyModel};
use scheduler::{Batching, ExitPolicy, Settings};
use serde::Serialize;
use simulator::{
    Capacity, CapacitySearch, Draw, ExitModel, Metrics, ModelMemory, Simulation, Summary, capacity, columns,
};
use traces::{Generate, Request, RequestSpec, RequestTrace};

use super::spec::{Point, SweepSpec, SweptSystem};
use crate::machines::{Groups, check_groups};
use crate::reporter::{Quiet, Reporter};
use crate::runs::{Machines, load_models};
use crate::serving::Serving;
use crate::workload::{Workload, load_requests};

/// The first columns of a line: what [`Summary`] does not say.
#[derive(Clone, Debug, Default, Serialize)]
pub struct OfPoint {
    point: usize,
    system: String,
    device: String,
    rate_per_s: Option<f64>,
    device_memory: Option<u64>,
    memory_utilization: Option<f64>,
    seed: u64,
}

/// What a capacity search found, before the run at that rate.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// Requests per second; 0 if even requests that come one by one miss the objectives.
    capacity_req_s: f64,
}

/// Everything that runs, read and checked.
pub struct Plan<'a> {
    spec: &'a SweepSpec,
    systems: Vec<System>,
    workloads: Workloads<'a>,
    /// Each with the settings of its groups of machines, or of all machines if they are the same.
    points: Vec<(Point, Vec<Settings>)>,
    /// Where runs left the measured grids.
    beyond: Mutex<Extrapolations>,
    /// Ends the runs.
    stop: Option<Arc<AtomicBool>>,
}

struct System {
    name: String,
    device: String,
    latency: LatencyModel,
    exits: ExitModel,
    groups: Groups,
}

impl<'a> Plan<'a> {
    /// Reads what the sweep needs, relative to `base`, and checks every point of it.
    ///
    /// # Errors
    /// If the specification contradicts itself, something does not read, or a point could not run.
    pub fn new(spec: &'a SweepSpec, base: &'a Path, reporter: &mut dyn Reporter) -> Result<Self> {
        spec.check()?;
        let systems: Vec<System> =
            spec.systems.iter().map(|system| System::read(spec, system, base)).collect::<Result<_>>()?;
        let workloads = Workloads::new(spec, base, reporter)?;
        let model = |system: usize| {
            let memory = ModelMemory::from(systems[system].latency.meta());
            (memory.num_loops as u8, memory.kv_fill)
        };
        spec.check_size(|system| model(system).0)?;
        let points = spec.points(model);
        let longest = workloads.longest(&points)?;
        let settings = |point: Point| {
            let system = &systems[point.system];
            let settings = settings(spec, &point, system, &longest[&point.seed])
                .with_context(|| format!("{}, {}, {}", system.name, point.batching, point.exit))?;
            Ok((point, settings))
        };
        let points = points.into_iter().map(settings).collect::<Result<_>>()?;
        let plan = Self { spec, systems, workloads, points, beyond: Mutex::default(), stop: reporter.stop() };
        plan.check_models()?;
        Ok(plan)
    }

    /// Whether models, requests and settings of each system belong together.
    fn check_models(&self) -> Result<()> {
        for system in 0..self.systems.len() {
            if let Some(index) = self.points.iter().position(|(point, _)| point.system == system) {
                let run = |simulation: &Simulation<'_>, _: &[Request]| {
                    let mut observers: Vec<()> = simulation.settings_of_machines(1).map(|_| ()).collect();
                    Ok(simulation.run([], &mut observers)?)
                };
                self.with_simulation(index, run).with_context(|| self.describe(index))?;
            }
        }
        Ok(())
    }

    /// How many points there are.
    pub fn len(&self) -> usize {
        self.points.len()
    }

    /// Name of a point, for people.
    pub fn describe(&self, index: usize) -> String {
        let (point, _) = &self.points[index];
        format!("{}, {}, {}", self.systems[point.system].name, point.batching, point.exit)
    }

    /// Columns of a line that say what a run is of: they are the same for every seed of a point.
    pub fn columns_of_run() -> Vec<String> {
        let settings = Settings::new(Batching::Sequence, ExitPolicy::None, 1);
        [columns(&OfPoint::default()), columns(&settings), Summary::OF_RUN.map(str::to_owned).to_vec()].concat()
    }

    /// Where the runs so far left what was measured.
    pub fn extrapolations(&self) -> Extrapolations {
        self.beyond.lock().expect("no thread panics with it").clone()
    }

    /// Simulates a point.
    ///
    /// # Errors
    /// If it cannot be simulated after all.
    pub fn simulate(&self, index: usize) -> Result<(OfPoint, Summary)> {
        self.with_simulation(index, |simulation, requests| {
            let of_machine = |settings| {
                let metrics = Metrics::new(settings);
                match self.spec.objectives {
                    Some(objectives) => metrics.with_objectives(objectives),
                    None => metrics,
                }
            };
            let mut machines: Vec<Metrics> =
                simulation.settings_of_machines(self.spec.replicas).map(of_machine).collect();
            let outcome = simulation.run(requests.iter().copied(), &mut machines)?;
            self.note(&outcome.extrapolations);
            Ok((self.of_point(index), self.priced(index, simulation.summarize(machines, &outcome)?.summary)))
        })
    }

    /// Searches for the highest rate at which a point meets objectives; `tried` is told of every rate.
    ///
    /// # Errors
    /// If the search makes no sense, or objectives are met at every rate.
    pub fn capacity(
        &self,
        index: usize,
        search: &CapacitySearch,
        tried: impl FnMut(f64),
    ) -> Result<(OfPoint, Found, Summary)> {
        self.with_simulation(index, |simulation, requests| {
            let Capacity { rate_per_s, summary, extrapolations } =
                capacity(simulation, requests, search, tried).with_context(|| self.describe(index))?;
            self.note(&extrapolations);
            Ok((self.of_point(index), Found { capacity_req_s: rate_per_s }, self.priced(index, summary)))
        })
    }

    fn with_simulation<T>(
        &self,
        index: usize,
        run: impl FnOnce(&Simulation<'_>, &[Request]) -> Result<T>,
    ) -> Result<T> {
        let (point, settings) = &self.points[index];
        let System { latency, exits, groups, .. } = &self.systems[point.system];
        let seed = point.seed.unwrap_or(self.spec.seed);
        let exits = exits.with_draw(Draw::Seeded(seed));
        let workload = self.workloads.at(point)?;
        let SweepSpec { replicas, routing, spread, .. } = *self.spec;
        let machines = Machines { replicas, routing, spread: spread.then_some(seed) };
        let of_groups = groups.machines(settings, replicas, latency);
        let simulation = machines.simulation_of_groups(&of_groups, groups.link(), &exits, &workload)?;
        let simulation = self.stop.as_deref().map_or(simulation, |stop| simulation.with_stop(stop));
        run(&simulation, &workload.requests)
    }

    fn priced(&self, index: usize, summary: Summary) -> Summary {
        let price = self.spec.systems[self.points[index].0.system].price_per_hour;
        match price {
            Some(price) => summary.priced(price),
            None => summary,
        }
    }

    fn note(&self, beyond: &Extrapolations) {
        self.beyond.lock().expect("no thread panics with it").merge(beyond);
    }

    fn of_point(&self, index: usize) -> OfPoint {
        let (point, _) = &self.points[index];
        let System { name, device, .. } = &self.systems[point.system];
        OfPoint {
            point: index,
            system: name.clone(),
            device: device.clone(),
            rate_per_s: point.rate_per_s,
            device_memory: point.device_memory.or(self.spec.serving.device_memory),
            memory_utilization: self.spec.serving.memory_utilization,
            seed: point.seed.unwrap_or(self.spec.seed),
        }
    }
}

impl System {
    fn read(spec: &SweepSpec, system: &SweptSystem, base: &Path) -> Result<Self> {
        let (latency, exits) = load_models(base, &system.profile, system.exits.as_deref(), 0, &spec.exits_of(system))
            .with_context(|| format!("systems: {:?}", system.name))?;
        let groups = Groups::read(spec.machines_of(system), spec.link_of(system), base)
            .with_context(|| format!("systems: {:?}", system.name))?;
        Ok(Self { name: system.name.clone(), device: latency.meta().device.clone(), latency, exits, groups })
    }
}

/// The requests of every point.
struct Workloads<'a> {
    spec: &'a SweepSpec,
    base: &'a Path,
    /// What a file holds; none where requests are made anew for each point.
    file: Option<Workload>,
}

impl<'a> Workloads<'a> {
    fn new(spec: &'a SweepSpec, base: &'a Path, reporter: &mut dyn Reporter) -> Result<Self> {
        let read = Workload::load(&spec.requests, base, &spec.serving, spec.seed, reporter)?;
        Ok(Self { spec, base, file: spec.requests.file.is_some().then_some(read) })
    }

    /// The longest request of each seed; on the way, every seed and every rate is found to give requests.
    fn longest(&self, points: &[Point]) -> Result<BTreeMap<Option<u64>, Request>> {
        let mut longest = BTreeMap::new();
        let mut rates: Vec<Option<f64>> = Vec::new();
        for point in points {
            if longest.contains_key(&point.seed) && rates.contains(&point.rate_per_s) {
                continue;
            }
            rates.push(point.rate_per_s);
            let workload = self.at(point)?;
            let of_seed = workload.requests.iter().max_by_key(|request| request.context_tokens());
            longest.insert(point.seed, *of_seed.context("requests: none are left")?);
        }
        Ok(longest)
    }

    fn at(&self, point: &Point) -> Result<Cow<'_, Workload>> {
        match (&self.file, point.rate_per_s) {
            (Some(read), None) => Ok(match point.seed {
                Some(seed) if read.closed_loop.is_some() => Cow::Owned(read.with_seed(seed)),
                _ => Cow::Borrowed(read),
            }),
            (Some(read), Some(rate_per_s)) => Ok(Cow::Owned(scaled(read, rate_per_s).context("grid")?)),
            (None, _) => {
                let (generated, seed) = (self.generated(point)?, point.seed.unwrap_or(self.spec.seed));
                let trace = load_requests(&generated, self.base, &mut Quiet)?;
                let closed_loop = generated.closed_loop(&trace, seed)?;
                Ok(Cow::Owned(Workload { requests: trace.requests, prefixes: None, closed_loop }))
            }
        }
    }

    /// The random process of a point.
    fn generated(&self, point: &Point) -> Result<RequestSpec> {
        let requests = &self.spec.requests;
        let generate = requests.generate.as_ref().context("requests: neither `file` nor `generate`")?;
        let arrivals = match point.rate_per_s {
            Some(rate) => {
                generate.arrivals.at_rate(rate).context("grid.rate_per_s of requests that arrive all at once")?
            }
            None => generate.arrivals,
        };
        let generate = Generate { arrivals, seed: point.seed.unwrap_or(generate.seed), ..generate.clone() };
        Ok(RequestSpec { generate: Some(generate), ..requests.clone() })
    }
}

/// The same requests at another mean rate.
fn scaled(workload: &Workload, rate_per_s: f64) -> Result<Workload> {
    ensure!(!workload.has_users(), "rate_per_s: users send requests when they have answers, at no rate");
    let trace = RequestTrace::new("", workload.requests.clone());
    Ok(Workload { requests: trace.scale_to_rate(rate_per_s)?.requests, ..workload.clone() })
}

/// The scheduler's settings of each group of machines at a point, under which the longest request can run.
fn settings(spec: &SweepSpec, point: &Point, system: &System, longest: &Request) -> Result<Vec<Settings>> {
    let System { latency, exits, groups, .. } = system;
    let serving = &spec.serving;
    let serving = Serving {
        max_batch: point.max_batch,
        token_budget: point.token_budget,
        prefill_chunk: point.prefill_chunk,
        exit_wait: point.exit_wait,
        device_memory: point.device_memory.or(serving.device_memory),
        ..serving.clone()
    };
    let combination = (point.batching, point.exit, point.kv_fill);
    let settings = groups.settings(&serving, combination, latency, longest.context_tokens())?;
    let of_groups = groups.machines(&settings, spec.replicas, latency);
    check_groups(&of_groups, longest)?;
    Simulation::of_groups(&of_groups, groups.link(), exits)?;
    Ok(settings)
}
