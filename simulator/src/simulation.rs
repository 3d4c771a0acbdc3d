//! The event loop: arrivals and pass ends of one or more machines on one clock.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use latency::{Extrapolations, LatencyModel, TimeByComponent};
use rayon::prelude::*;
use scheduler::{
    Answered, ClosedLoad, KvFill, Load, Observer, OpenLoad, PrefixUse, ScheduleError, Server, Settings, SignalRead,
    Unordered,
};
use traces::{ClosedLoop, ExitSignal, Nanos, PrefixHashes, Request, is_same_model};

use crate::executor::ProfileExecutor;
use crate::exits::{ExitError, ExitModel, hash};
use crate::memory::ModelMemory;
use crate::metrics::{Metrics, Source, Summary};
use crate::routing::{Router, Routing};

/// Why a simulation stopped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimulationError {
    /// The profile and the exit trace belong to different models.
    #[error("the latency profile is of model {profile}, the exit trace of model {exits}: expected the same")]
    OtherModel {
        /// Fingerprint in the profile.
        profile: String,
        /// Fingerprint in the exit trace.
        exits: String,
    },
    /// The settings, the profile and the exit trace disagree about the number of loops.
    #[error(
        "num_loops is {settings} in the settings, {profile} in the latency profile, {exits} in the exit trace: expected the same"
    )]
    Loops {
        /// Loops in the settings.
        settings: u8,
        /// Loops in the profile.
        profile: u8,
        /// Loops in the exit trace.
        exits: u8,
    },
    /// An exit policy that reads a signal which was not recorded.
    #[error(
        "exit policy {exit}: the exit trace has no column `{signal}`, expected one {}",
        if *signal == ExitSignal::Gate { "of a model with gates" } else { "that is recorded anew" }
    )]
    NoSignal {
        /// The policy.
        exit: String,
        /// What it reads.
        signal: ExitSignal,
    },
    /// An exit trace whose prompts ran other depths.
    #[error(
        "the exit trace was recorded with prompts that run {recorded}, the settings have {settings}: expected the same"
    )]
    PrefillDepth {
        /// Of the trace.
        recorded: String,
        /// Of the settings.
        settings: String,
    },
    /// An exit trace that was recorded under another KV fill.
    #[error("the exit trace was recorded under KV fill {recorded}, the settings have {settings}: expected the same")]
    KvFill {
        /// Fill of the recording.
        recorded: KvFill,
        /// Fill in the settings.
        settings: KvFill,
    },
    /// No machines.
    #[error("no replicas: expected at least 1")]
    NoReplicas,
    /// Requests that are not in order of arrival.
    #[error(transparent)]
    Unordered(#[from] Unordered),
    /// Settings or a request that cannot be served.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// A request that the exit trace does not contain.
    #[error(transparent)]
    Exits(#[from] ExitError),
}

/// Results of a simulation that its observers cannot see.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Number of generated tokens.
    pub tokens: u64,
    /// Number of generated tokens that equal those of full depth.
    pub agreeing_tokens: u64,
    /// What prefix caching found, on all machines.
    pub prefix_use: PrefixUse,
    /// Uses of the profile beyond its measured grid.
    pub extrapolations: Extrapolations,
    /// Time of passes by component, on all machines.
    pub time: TimeByComponent,
}

impl Outcome {
    /// Share of generated tokens that equal those of full depth, 0 to 1; NaN without tokens.
    pub fn token_agreement(&self) -> f64 {
        self.agreeing_tokens as f64 / self.tokens as f64
    }
}

/// A serving system to simulate: identical machines, and the rule that routes requests to them.
#[derive(Clone, Copy, Debug)]
pub struct Simulation<'m> {
    settings: Settings,
    latency: &'m LatencyModel,
    exits: &'m ExitModel,
    routing: Routing,
    spread: Option<u64>,
    prefixes: Option<&'m Arc<PrefixHashes>>,
    closed_loop: Option<&'m ClosedLoop>,
}

impl<'m> Simulation<'m> {
    /// A system of machines that each run under `settings`, with round-robin routing.
    ///
    /// # Errors
    /// If the profile, the exit trace and the settings belong to different models, or if the exit policy reads gates
    /// and the trace has none.
    pub fn new(settings: Settings, latency: &'m LatencyModel, exits: &'m ExitModel) -> Result<Self, SimulationError> {
        let (profile, recorded) = (latency.meta().fingerprint.as_str(), exits.fingerprint());
        if !is_same_model(profile, recorded) {
            return Err(SimulationError::OtherModel { profile: profile.to_owned(), exits: recorded.to_owned() });
        }
        if settings.num_loops != latency.num_loops() || settings.num_loops != exits.num_loops() {
            return Err(SimulationError::Loops {
                settings: settings.num_loops,
                profile: latency.num_loops(),
                exits: exits.num_loops(),
            });
        }
        if let Some(recorded) = exits.kv_fill().filter(|&recorded| recorded != settings.kv_fill) {
            return Err(SimulationError::KvFill { recorded, settings: settings.kv_fill });
        }
        let shallow = |given: Option<u8>| given.filter(|depth| depth + 1 < settings.num_loops);
        let (recorded, simulated) = (shallow(exits.prefill_depth()), shallow(settings.prefill_depth));
        if exits.kv_fill().is_some() && recorded != simulated {
            let name =
                |depth: Option<u8>| depth.map_or("every depth".to_owned(), |depth| format!("up to depth {depth}"));
            return Err(SimulationError::PrefillDepth { recorded: name(recorded), settings: name(simulated) });
        }
        if let SignalRead::Signal(signal) = settings.exit.signal_read()
            && !exits.has(signal)
        {
            return Err(SimulationError::NoSignal { exit: settings.exit.to_string(), signal });
        }
        Ok(Self {
            settings,
            latency,
            exits,
            routing: Routing::RoundRobin,
            spread: None,
            prefixes: None,
            closed_loop: None,
        })
    }

    /// Sets the routing rule.
    pub fn with_routing(self, routing: Routing) -> Self {
        Self { routing, ..self }
    }

    /// Draws times from their measured spread, with this seed, instead of using the medians.
    pub fn with_spread(self, seed: u64) -> Self {
        Self { spread: Some(seed), ..self }
    }

    /// Sets the prefix hashes, for settings with prefix caching.
    pub fn with_prefixes(self, prefixes: &'m Arc<PrefixHashes>) -> Self {
        Self { prefixes: Some(prefixes), ..self }
    }

    /// Sends requests when others have been answered. The ids of requests are their places among those of the trace whose
    /// sessions the loop has; latencies count from when a request is sent.
    pub fn in_closed_loop(self, closed_loop: &'m ClosedLoop) -> Self {
        Self { closed_loop: Some(closed_loop), ..self }
    }

    /// Which requests are sent when others have been answered; `None` if each is sent at its arrival.
    pub fn closed_loop(&self) -> Option<&'m ClosedLoop> {
        self.closed_loop
    }

    /// The settings of each machine.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Where exits are taken from.
    pub fn exits(&self) -> &'m ExitModel {
        self.exits
    }

    /// Summarizes a run: the metrics of all machines, and what only the simulation knows.
    pub fn summary(&self, metrics: &Metrics, outcome: &Outcome) -> Summary {
        let memory = ModelMemory::from(self.latency.meta());
        let PrefixUse { looked_up, found } = outcome.prefix_use;
        Summary {
            weight_bytes: Some(memory.weight_bytes),
            kv_bytes_per_token: Some(memory.kv_bytes(self.settings.kv_fill)),
            prefix_hit_rate: self.settings.prefix_caching.then(|| found as f64 / looked_up as f64),
            computed_components: self.latency.computed().iter().map(|part| part.name()).collect::<Vec<_>>().join(" "),
            ..metrics.summary(Source::Simulated, Some(outcome.token_agreement()))
        }
    }

    /// Serves the requests, in order of arrival, on one machine for each observer.
    ///
    /// Of simultaneous events, arrivals come first, then pass ends by machine, then requests that follow an answer at
    /// once, then pass starts. In a closed loop without sessions, a request is taken from the iterator when a user is
    /// free to send it.
    ///
    /// # Errors
    /// At the first request that can never run to its end, is out of order, or is missing from a recorded exit trace.
    pub fn run<O: Observer>(
        &self,
        requests: impl IntoIterator<Item = Request>,
        observers: &mut [O],
    ) -> Result<Outcome, SimulationError> {
        let Some(closed_loop) = self.closed_loop else {
            return self.run_load(&mut OpenLoad::new(requests), observers, |_, _, _| {});
        };
        let mut load = ClosedLoad::new(closed_loop.clone(), requests);
        let mut observers: Vec<(&mut O, Answered)> =
            observers.iter_mut().map(|observer| (observer, Answered::default())).collect();
        self.run_load(&mut load, &mut observers, |load, now, (_, answered)| {
            answered.0.drain(..).for_each(|request| load.answered(now, request));
        })
    }

    /// Serves a load; `ended` is told of the observer of every machine whose pass has ended.
    fn run_load<L: Load, O: Observer>(
        &self,
        load: &mut L,
        observers: &mut [O],
        mut ended: impl FnMut(&mut L, Nanos, &mut O),
    ) -> Result<Outcome, SimulationError> {
        let mut replicas = Replicas::new(self, observers)?;
        let mut router = Router::new(self.routing);
        let mut submit = |load: &mut L, replicas: &mut Replicas<'_, 'm, O>, now| {
            while let Some(request) = load.take_until(now)? {
                replicas.submit(router.route(&request, |index| replicas.load(index), replicas.len()), request)?;
            }
            Ok::<_, SimulationError>(())
        };
        while let Some(now) = load.next_time().into_iter().chain(replicas.next_end()).min() {
            submit(load, &mut replicas, now)?;
            replicas.finish_passes(now, |observer| ended(load, now, observer));
            submit(load, &mut replicas, now)?;
            replicas.start_passes(now)?;
        }
        Ok(outcome(replicas.servers))
    }

    /// An idle machine of this system.
    fn server(&self, machine: u64) -> Result<Server<ProfileExecutor<'m>>, ScheduleError> {
        let executor = ProfileExecutor::new(self.latency, self.exits, &self.settings);
        let executor = match self.spread {
            Some(seed) => executor.with_spread(hash(seed, machine)),
            None => executor,
        };
        let mut server = Server::new(self.settings, executor)?;
        if let Some(prefixes) = self.prefixes {
            server.share_prefixes(Arc::clone(prefixes))?;
        }
        Ok(server)
    }
}

/// What only the executors of a run know, when it is over.
fn outcome(servers: Vec<Server<ProfileExecutor<'_>>>) -> Outcome {
    let mut outcome = Outcome {
        tokens: 0,
        agreeing_tokens: 0,
        prefix_use: PrefixUse::default(),
        extrapolations: Extrapolations::default(),
        time: TimeByComponent::default(),
    };
    for server in servers {
        let PrefixUse { looked_up, found } = server.scheduler().prefix_use();
        outcome.prefix_use.looked_up += looked_up;
        outcome.prefix_use.found += found;
        let executor = server.into_executor();
        outcome.tokens += executor.tokens();
        outcome.agreeing_tokens += executor.agreeing_tokens();
        outcome.extrapolations.merge(&executor.account().extrapolations);
        outcome.time.merge(&executor.account().time);
    }
    outcome
}

/// Runs all `simulations` over the same requests, in parallel. `observers` creates the observers of each simulation,
/// one for each machine. Results are in the order of the simulations and do not depend on the number of threads.
///
/// # Errors
/// The first error, in that order, of [`Simulation::run`].
pub fn run_all<O: Observer + Send>(
    simulations: &[Simulation<'_>],
    requests: &[Request],
    observers: impl Fn(&Settings) -> Vec<O> + Sync,
) -> Result<Vec<(Vec<O>, Outcome)>, SimulationError> {
    let runs: Vec<_> = simulations
        .par_iter()
        .map(|simulation| {
            let mut observers = observers(simulation.settings());
            let outcome = simulation.run(requests.iter().copied(), &mut observers)?;
            Ok((observers, outcome))
        })
        .collect();
    runs.into_iter().collect()
}

/// The machines, and when their passes end.
struct Replicas<'a, 'm, O> {
    servers: Vec<Server<ProfileExecutor<'m>>>,
    observers: &'a mut [O],
    ends: BinaryHeap<Reverse<(Nanos, usize)>>,
    /// Whether a pass runs, by machine.
    busy: Vec<bool>,
    /// Machines that may start a pass, because one has just ended or a request arrived while they were idle.
    startable: Vec<usize>,
}

impl<'a, 'm, O: Observer> Replicas<'a, 'm, O> {
    fn new(simulation: &Simulation<'m>, observers: &'a mut [O]) -> Result<Self, SimulationError> {
        if observers.is_empty() {
            return Err(SimulationError::NoReplicas);
        }
        let servers: Result<Vec<_>, _> =
            (0..observers.len() as u64).map(|machine| simulation.server(machine)).collect();
        let busy = vec![false; observers.len()];
        Ok(Self { servers: servers?, observers, ends: BinaryHeap::new(), busy, startable: Vec::new() })
    }

    fn len(&self) -> usize {
        self.servers.len()
    }

    /// Number of requests that wait or run on a machine.
    fn load(&self, index: usize) -> u64 {
        let scheduler = self.servers[index].scheduler();
        u64::from(scheduler.num_waiting()) + u64::from(scheduler.num_running())
    }

    fn next_end(&self) -> Option<Nanos> {
        self.ends.peek().map(|Reverse((end, _))| *end)
    }

    fn submit(&mut self, index: usize, request: Request) -> Result<(), SimulationError> {
        if !self.busy[index] && self.load(index) == 0 && !self.startable.contains(&index) {
            self.startable.push(index);
        }
        Ok(self.servers[index].submit(request)?)
    }

    /// Ends the passes that are due, and hands the observer of each to `ended`.
    fn finish_passes(&mut self, now: Nanos, mut ended: impl FnMut(&mut O)) {
        while let Some(&Reverse((end, index))) = self.ends.peek() {
            if end > now {
                break;
            }
            self.ends.pop();
            self.servers[index].finish_pass(now, &mut self.observers[index]);
            ended(&mut self.observers[index]);
            self.busy[index] = false;
            self.startable.push(index);
        }
    }

    fn start_passes(&mut self, now: Nanos) -> Result<(), SimulationError> {
        for index in self.startable.drain(..) {
            if let Some(elapsed) = self.servers[index].start_pass(now, &mut self.observers[index])? {
                self.ends.push(Reverse((now + elapsed, index)));
                self.busy[index] = true;
            }
        }
        Ok(())
    }
}
