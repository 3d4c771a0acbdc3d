//! The event loop: arrivals, pass ends and ends of transfers, of one or more machines on one clock.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use latency::{Extrapolations, LatencyModel, TimeByComponent};
use rayon::prelude::*;
use scheduler::{
    Answered, ClosedLoad, Handover, KvFill, Load, Observer, OpenLoad, ScheduleError, Server, Settings, SignalRead,
    Unordered,
};
use traces::{ClosedLoop, ExitSignal, Nanos, PrefixHashes, Request, is_same_model};

use crate::executor::ProfileExecutor;
use crate::exits::{ExitError, ExitModel, hash};
use crate::memory::ModelMemory;
use crate::metrics::{GroupSummary, Metrics, Source, Summary};
use crate::roles::{self, Link, MachineGroup, Role, RoleError};
use crate::routing::{Router, Routing};
use crate::transfers::{Arrival, Place, TransferTotals, Transfers};

/// Why a simulation stopped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimulationError {
    /// The flag of [`Simulation::with_stop`] was set.
    #[error("the simulation was stopped")]
    Stopped,
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
    /// Drafts, with an exit trace of tokens that exited for good.
    #[error(
        "exit policy {exit}: the exit trace was recorded under exit policies, expected one that was recorded at full depth"
    )]
    Speculation {
        /// The policy.
        exit: String,
    },
    /// No machines.
    #[error("no replicas: expected at least 1")]
    NoReplicas,
    /// Machines of several roles that make no system.
    #[error(transparent)]
    Roles(#[from] RoleError),
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
    /// Uses of the profile beyond its measured grid.
    pub extrapolations: Extrapolations,
    /// Time of passes by component, on all machines.
    pub time: TimeByComponent,
    /// Transfers of keys and values between machines.
    pub transfers: TransferTotals,
}

impl Outcome {
    /// Share of generated tokens that equal those of full depth, 0 to 1; NaN without tokens.
    pub fn token_agreement(&self) -> f64 {
        self.agreeing_tokens as f64 / self.tokens as f64
    }
}

/// A run of all machines of a system.
#[derive(Clone, Debug)]
pub struct SystemSummary {
    /// Metrics of all machines.
    pub metrics: Metrics,
    /// The system.
    pub summary: Summary,
    /// Each group of machines; none if all machines are identical.
    pub groups: Vec<GroupSummary>,
}

/// A serving system to simulate: identical machines, or groups of machines with roles, and the rule that routes requests to
/// them.
#[derive(Clone, Copy, Debug)]
pub struct Simulation<'m> {
    /// Settings and times of machines that generate: of all machines if they are identical.
    settings: Settings,
    latency: &'m LatencyModel,
    /// Empty if all machines are identical.
    groups: &'m [MachineGroup<'m>],
    link: Option<Link>,
    exits: &'m ExitModel,
    routing: Routing,
    spread: Option<u64>,
    prefixes: Option<&'m Arc<PrefixHashes>>,
    closed_loop: Option<&'m ClosedLoop>,
    stop: Option<&'m AtomicBool>,
}

impl<'m> Simulation<'m> {
    /// A system of machines that each run under `settings`, with round-robin routing.
    ///
    /// # Errors
    /// If the profile, the exit trace and the settings belong to different models, or if the exit policy reads gates
    /// and the trace has none.
    pub fn new(settings: Settings, latency: &'m LatencyModel, exits: &'m ExitModel) -> Result<Self, SimulationError> {
        Self::check(&settings, latency, exits)?;
        Ok(Self {
            settings,
            latency,
            groups: &[],
            link: None,
            exits,
            routing: Routing::RoundRobin,
            spread: None,
            prefixes: None,
            closed_loop: None,
            stop: None,
        })
    }

    /// A system of groups of machines with [roles](Role), and the link over which prompt machines send keys and values to
    /// decode machines. Routing chooses among machines that run prompts; decode machines are chosen by load.
    ///
    /// # Errors
    /// As [`new`](Self::new), for each group; and if the groups and the link make no system.
    pub fn of_groups(
        groups: &'m [MachineGroup<'m>],
        link: Option<Link>,
        exits: &'m ExitModel,
    ) -> Result<Self, SimulationError> {
        if groups.iter().all(|group| group.replicas == 0) {
            return Err(SimulationError::NoReplicas);
        }
        roles::check(groups, link)?;
        groups.iter().try_for_each(|group| Self::check(&group.settings, group.latency, exits))?;
        let generates = groups.iter().find(|group| group.role != Role::Prompt).ok_or(SimulationError::NoReplicas)?;
        Ok(Self { groups, link, ..Self::new(generates.settings, generates.latency, exits)? })
    }

    /// Checks that settings, profile and exit trace belong together.
    fn check(settings: &Settings, latency: &LatencyModel, exits: &ExitModel) -> Result<(), SimulationError> {
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
        if exits.kv_fill().is_some() && settings.exit.speculates() {
            return Err(SimulationError::Speculation { exit: settings.exit.to_string() });
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
        Ok(())
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

    /// Ends runs with [`SimulationError::Stopped`] when the flag is set.
    pub fn with_stop(self, stop: &'m AtomicBool) -> Self {
        Self { stop: Some(stop), ..self }
    }

    /// Which requests are sent when others have been answered; `None` if each is sent at its arrival.
    pub fn closed_loop(&self) -> Option<&'m ClosedLoop> {
        self.closed_loop
    }

    /// The settings of each machine; of groups, those of the first group that generates.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Number of machines and settings of each group, where `replicas` is the number of identical machines. Groups have
    /// their own numbers.
    pub fn settings_of_groups(&self, replicas: usize) -> impl Iterator<Item = (usize, &Settings)> {
        let identical = self.groups.is_empty().then_some((replicas, &self.settings));
        identical.into_iter().chain(self.groups.iter().map(|group| (group.replicas, &group.settings)))
    }

    /// The settings of each machine in order, where `replicas` is the number of identical machines.
    pub fn settings_of_machines(&self, replicas: usize) -> impl Iterator<Item = &Settings> {
        self.settings_of_groups(replicas).flat_map(|(number, settings)| std::iter::repeat_n(settings, number))
    }

    /// Where exits are taken from.
    pub fn exits(&self) -> &'m ExitModel {
        self.exits
    }

    /// Summarizes a run: the metrics of all machines, and what only the simulation knows.
    pub fn summary(&self, metrics: &Metrics, outcome: &Outcome) -> Summary {
        let memory = ModelMemory::from(self.latency.meta());
        Summary {
            weight_bytes: Some(memory.weight_bytes),
            kv_bytes_per_token: Some(memory.kv_bytes(self.settings.kv_fill)),
            computed_components: self.computed_components(),
            ..metrics.summary(Source::Simulated, Some(outcome.token_agreement()))
        }
    }

    /// Summarizes a run of several machines. Columns that describe one machine (settings, occupancy, rows, running
    /// sequences, KV blocks) are of those that generate.
    ///
    /// # Errors
    /// If there is no machine.
    pub fn summarize(&self, machines: Vec<Metrics>, outcome: &Outcome) -> Result<SystemSummary, SimulationError> {
        let merged = |machines: Vec<Metrics>| Metrics::merged(machines).ok_or(SimulationError::NoReplicas);
        if self.groups.len() <= 1 {
            let metrics = merged(machines)?;
            let summary = self.summary(&metrics, outcome);
            return Ok(SystemSummary { metrics, summary, groups: Vec::new() });
        }
        let mut machines = machines.into_iter();
        let mut of_groups = Vec::new();
        for group in self.groups {
            of_groups.push((group, merged(machines.by_ref().take(group.replicas).collect())?));
        }
        let of = |generates: bool| {
            let chosen = of_groups.iter().filter(move |(group, _)| (group.role != Role::Prompt) == generates);
            chosen.map(|(_, metrics)| metrics.clone())
        };
        let generating = merged(of(true).collect())?;
        let metrics = merged(of(true).chain(of(false)).collect())?;
        let Summary { occupancy, mean_rows, mean_running, kv_usage, .. } = self.summary(&generating, outcome);
        let TransferTotals { count, bytes, time, wait } = outcome.transfers;
        let summary = Summary {
            machines: roles::label(self.groups),
            occupancy,
            mean_rows,
            mean_running,
            kv_usage,
            transfers: Some(count),
            transfer_bytes: Some(bytes),
            transfer_mean_ms: Some(time.as_millis_f64() / count as f64),
            transfer_wait_mean_ms: Some(wait.as_millis_f64() / count as f64),
            ..self.summary(&metrics, outcome)
        };
        let makespan = metrics.makespan();
        let groups = of_groups.iter().map(|(group, metrics)| metrics.of_group(group.role, makespan)).collect();
        Ok(SystemSummary { metrics, summary, groups })
    }

    /// Names of components with computed times, of all machines.
    fn computed_components(&self) -> String {
        let latencies = std::iter::once(self.latency).chain(self.groups.iter().map(|group| group.latency));
        let mut names: Vec<&str> = Vec::new();
        for part in latencies.flat_map(LatencyModel::computed) {
            if !names.contains(&part.name()) {
                names.push(part.name());
            }
        }
        names.join(" ")
    }

    /// Serves the requests, in order of arrival, on one machine for each observer.
    ///
    /// Of simultaneous events, arrivals come first, then pass ends by machine, then ends of transfers, then requests that
    /// follow an answer at once, then pass starts. In a closed loop without sessions, a request is taken from the iterator when a user is
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
                replicas.submit(&mut router, request)?;
            }
            Ok::<_, SimulationError>(())
        };
        while let Some(now) = load.next_time().into_iter().chain(replicas.next_end()).min() {
            if self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
                return Err(SimulationError::Stopped);
            }
            submit(load, &mut replicas, now)?;
            replicas.finish_passes(now, |observer| ended(load, now, observer))?;
            replicas.finish_transfers(now);
            submit(load, &mut replicas, now)?;
            replicas.start_passes(now)?;
        }
        Ok(replicas.outcome())
    }

    /// Role, settings and times of each of this number of machines.
    fn machines(&self, number: usize) -> Result<Vec<MachineGroup<'m>>, SimulationError> {
        if self.groups.is_empty() {
            let Self { settings, latency, .. } = *self;
            return Ok(vec![MachineGroup { role: Role::Both, replicas: 1, settings, latency }; number]);
        }
        let of_groups = self.groups.iter().flat_map(|&group| std::iter::repeat_n(group, group.replicas));
        let machines: Vec<_> = of_groups.collect();
        match machines.len() {
            found if found == number => Ok(machines),
            found => Err(RoleError::Observers { observers: number, machines: found }.into()),
        }
    }

    /// An idle machine of this system.
    fn server(
        &self,
        machine: u64,
        &MachineGroup { role, settings, latency, .. }: &MachineGroup<'m>,
    ) -> Result<Server<ProfileExecutor<'m>>, ScheduleError> {
        let executor = ProfileExecutor::new(latency, self.exits, &settings);
        let executor = match self.spread {
            Some(seed) => executor.with_spread(hash(seed, machine)),
            None => executor,
        };
        let mut server = Server::new(settings, executor)?;
        if let Some(prefixes) = self.prefixes {
            server.share_prefixes(Arc::clone(prefixes))?;
        }
        if role == Role::Prompt {
            server.hand_over_after_prompts();
        }
        Ok(server)
    }
}

/// Runs all `simulations` over the same requests, in parallel. `observers` creates the observers of each simulation,
/// one for each machine. Results are in the order of the simulations and do not depend on the number of threads.
///
/// # Errors
/// The first error, in that order, of [`Simulation::run`].
pub fn run_all<O: Observer + Send>(
    simulations: &[Simulation<'_>],
    requests: &[Request],
    observers: impl Fn(&Simulation<'_>) -> Vec<O> + Sync,
) -> Result<Vec<(Vec<O>, Outcome)>, SimulationError> {
    let runs: Vec<_> = simulations
        .par_iter()
        .map(|simulation| {
            let mut observers = observers(simulation);
            let outcome = simulation.run(requests.iter().copied(), &mut observers)?;
            Ok((observers, outcome))
        })
        .collect();
    runs.into_iter().collect()
}

/// The machines, and when their passes and the transfers between them end.
struct Replicas<'a, 'm, O> {
    servers: Vec<Server<ProfileExecutor<'m>>>,
    observers: &'a mut [O],
    ends: BinaryHeap<Reverse<(Nanos, usize)>>,
    /// Whether a pass runs, by machine.
    busy: Vec<bool>,
    /// Machines that may start a pass, because one has just ended, or a request or transfer came while they were idle.
    startable: Vec<usize>,
    /// Whether a machine is among them.
    is_startable: Vec<bool>,
    /// Machines to which requests are routed.
    entries: Vec<usize>,
    /// Machines to which sequences are handed over.
    decoders: Vec<usize>,
    /// `None` where no machine hands sequences over.
    transfers: Option<Transfers>,
}

impl<'a, 'm, O: Observer> Replicas<'a, 'm, O> {
    fn new(simulation: &Simulation<'m>, observers: &'a mut [O]) -> Result<Self, SimulationError> {
        let number = observers.len();
        let machines = simulation.machines(number)?;
        let first = machines.first().ok_or(SimulationError::NoReplicas)?;
        let servers: Result<Vec<_>, _> =
            (0..).zip(&machines).map(|(index, machine)| simulation.server(index, machine)).collect();
        let having = |has: fn(Role) -> bool| (0..number).filter(|&index| has(machines[index].role)).collect::<Vec<_>>();
        Ok(Self {
            servers: servers?,
            observers,
            ends: BinaryHeap::new(),
            busy: vec![false; number],
            startable: Vec::new(),
            is_startable: vec![false; number],
            entries: having(|role| role != Role::Decode),
            decoders: having(|role| role == Role::Decode),
            transfers: simulation.link.map(|link| Transfers::new(link, first.kv_bytes(), number)),
        })
    }

    /// Number of requests that wait or run on a machine.
    fn load(&self, index: usize) -> u64 {
        let scheduler = self.servers[index].scheduler();
        u64::from(scheduler.num_waiting()) + u64::from(scheduler.num_running())
    }

    /// When the next pass or transfer ends.
    fn next_end(&self) -> Option<Nanos> {
        let pass = self.ends.peek().map(|Reverse((end, _))| *end);
        let transfer = self.transfers.as_ref().and_then(Transfers::next_end);
        pass.into_iter().chain(transfer).min()
    }

    /// Lets an idle machine start a pass.
    fn wake(&mut self, index: usize) {
        if !self.busy[index] && !self.is_startable[index] {
            self.is_startable[index] = true;
            self.startable.push(index);
        }
    }

    fn submit(&mut self, router: &mut Router, request: Request) -> Result<(), SimulationError> {
        let load = |entry: usize| self.load(self.entries[entry]);
        let cached = |entry: usize| self.servers[self.entries[entry]].scheduler().cached_tokens(&request);
        let chosen = router.route(&request, load, cached, self.entries.len());
        let index = self.entries[chosen];
        self.wake(index);
        Ok(self.servers[index].submit(request)?)
    }

    /// Ends the passes that are due, and hands the observer of each to `ended`. Sequences with complete prompts then go to
    /// decode machines.
    fn finish_passes(&mut self, now: Nanos, mut ended: impl FnMut(&mut O)) -> Result<(), SimulationError> {
        let mut handed_over = Vec::new();
        while let Some(&Reverse((end, index))) = self.ends.peek() {
            if end > now {
                break;
            }
            self.ends.pop();
            self.servers[index].finish_pass(now, &mut self.observers[index]);
            ended(&mut self.observers[index]);
            self.busy[index] = false;
            self.wake(index);
            if self.transfers.is_some() {
                let complete = self.servers[index].take_handed_over();
                handed_over.extend(complete.into_iter().map(|handover| (index, handover)));
            }
        }
        handed_over.into_iter().try_for_each(|(from, handover)| self.hand_over(from, &handover, now))
    }

    /// Queues a sequence on the decode machine with the least load.
    fn hand_over(&mut self, from: usize, handover: &Handover, now: Nanos) -> Result<(), SimulationError> {
        let least = self.decoders.iter().copied().min_by_key(|&index| self.load(index));
        let (Some(to), Some(transfers)) = (least, &mut self.transfers) else { return Ok(()) };
        let &Handover { request, slot, .. } = handover;
        self.observers[from].handed_over(now, &request);
        transfers.wait(request.id, Place { machine: from, slot }, now);
        let cursor = self.servers[from].executor_mut().hand_over(slot);
        self.servers[to].executor_mut().resume(cursor);
        self.servers[to].submit_handed_over(handover)?;
        self.wake(to);
        Ok(())
    }

    /// Ends the transfers that are due: the decode machine goes on, and the prompt machine has its blocks again.
    fn finish_transfers(&mut self, now: Nanos) {
        while let Some(Arrival { from, to }) = self.transfers.as_mut().and_then(|transfers| transfers.take_until(now)) {
            self.servers[to.machine].receive(to.slot, now, &mut self.observers[to.machine]);
            self.wake(to.machine);
            self.servers[from.machine].release_handed_over(from.slot);
            self.wake(from.machine);
        }
    }

    fn start_passes(&mut self, now: Nanos) -> Result<(), SimulationError> {
        for index in self.startable.drain(..) {
            self.is_startable[index] = false;
            if let Some(elapsed) = self.servers[index].start_pass(now, &mut self.observers[index])? {
                self.ends.push(Reverse((now + elapsed, index)));
                self.busy[index] = true;
            }
            if let Some(transfers) = &mut self.transfers {
                let reserved = self.servers[index].scheduler().reserved();
                reserved.for_each(|reservation| transfers.start(index, reservation, now));
            }
        }
        Ok(())
    }

    /// What only the executors of a run know, when it is over.
    fn outcome(self) -> Outcome {
        let mut outcome = Outcome {
            tokens: 0,
            agreeing_tokens: 0,
            extrapolations: Extrapolations::default(),
            time: TimeByComponent::default(),
            transfers: self.transfers.map(|transfers| transfers.totals()).unwrap_or_default(),
        };
        for server in self.servers {
            let executor = server.into_executor();
            outcome.tokens += executor.tokens();
            outcome.agreeing_tokens += executor.agreeing_tokens();
            outcome.extrapolations.merge(&executor.account().extrapolations);
            outcome.time.merge(&executor.account().time);
        }
        outcome
    }
}
