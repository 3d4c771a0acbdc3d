//! Capacity: the highest request rate that meets latency objectives.

use latency::Extrapolations;
use traces::{Nanos, Request};

use crate::metrics::{Metrics, Summary};
use crate::objectives::{Attainment, Objectives};
use crate::simulation::{Simulation, SimulationError};

/// How to search for the highest rate.
///
/// Requests keep the pattern of their trace, sped up or slowed down. The rate is doubled or halved until the objectives
/// are met at one rate and missed at twice that rate, and then bisected. An overload shows only if the trace lasts long
/// enough for the queue to exceed the objectives: the trace should be much longer than the latencies that they allow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CapacitySearch {
    /// Objectives of a request.
    pub objectives: Objectives,
    /// Share of requests that must meet them, above 0 and up to 1.
    pub share: f64,
    /// Number of identical machines behind the router; groups of machines have their own numbers.
    pub replicas: usize,
    /// Relative width of the final interval of rates; above 0.
    pub tolerance: f64,
}

/// The highest rate, and the run at that rate.
#[derive(Clone, Debug, PartialEq)]
pub struct Capacity {
    /// Requests per second on average over the trace; 0 if even requests that arrive one by one miss the objectives.
    pub rate_per_s: f64,
    /// The run at that rate, or at the lowest rate that was tried.
    pub summary: Summary,
    /// Uses of the profile beyond its measured grid in that run.
    pub extrapolations: Extrapolations,
}

/// Why the search found no highest rate.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CapacityError {
    /// A search parameter that is out of range.
    #[error("{name} of a capacity search is {found}, expected {expected}")]
    Search {
        /// Name of the parameter.
        name: &'static str,
        /// The given value.
        found: f64,
        /// The range that was expected.
        expected: &'static str,
    },
    /// Requests without a rate, because they all arrive at once.
    #[error("the requests all arrive at once: expected a trace with a rate that can be raised and lowered")]
    NoRate,
    /// Users who send requests when they have answers.
    #[error("users send requests when they have answers, at no rate that can be raised: expected requests that arrive")]
    Users,
    /// Objectives that are met at every rate tried.
    #[error(
        "the objectives are met even at {rate_per_s:.3e} requests per second: expected tighter objectives or a longer trace"
    )]
    AlwaysMet {
        /// The highest rate that was tried.
        rate_per_s: f64,
    },
    /// A run failed.
    #[error(transparent)]
    Simulation(#[from] SimulationError),
}

/// Maximum number of doublings or halvings of the trace's own rate.
const MOST_OCTAVES: u32 = 24;

/// Finds the highest rate at which enough requests meet the objectives, to within the tolerance. Calls `tried` with
/// every rate before it is simulated.
///
/// # Errors
/// If a parameter or the trace is unsuitable, every rate meets the objectives, or a run fails.
pub fn capacity(
    simulation: &Simulation<'_>,
    requests: &[Request],
    search: &CapacitySearch,
    mut tried: impl FnMut(f64),
) -> Result<Capacity, CapacityError> {
    search.check()?;
    if simulation.closed_loop().is_some_and(|closed_loop| closed_loop.users.is_some()) {
        return Err(CapacityError::Users);
    }
    let own_rate = rate_per_s(requests).ok_or(CapacityError::NoRate)?;
    let mut met_at = |factor: f64| {
        tried(factor * own_rate);
        let machines = simulation.settings_of_machines(search.replicas);
        let mut watched: Vec<_> = machines.map(|_| Attainment::new(search.objectives)).collect();
        simulation.run(at_factor(requests, factor), &mut watched)?;
        Ok::<bool, SimulationError>(Attainment::share(&watched) >= search.share)
    };
    let (mut met, mut missed) = (0.5, 1.0);
    while met_at(missed)? {
        met = missed;
        missed *= 2.0;
        if missed > f64::from(1 << MOST_OCTAVES) {
            return Err(CapacityError::AlwaysMet { rate_per_s: met * own_rate });
        }
    }
    while missed <= 1.0 && !met_at(met)? {
        missed = met;
        met /= 2.0;
        if met < 1.0 / f64::from(1 << MOST_OCTAVES) {
            let (summary, extrapolations) = run_at(simulation, requests, search, missed)?;
            return Ok(Capacity { rate_per_s: 0.0, summary, extrapolations });
        }
    }
    while missed - met > search.tolerance * met {
        let middle = f64::midpoint(met, missed);
        *(if met_at(middle)? { &mut met } else { &mut missed }) = middle;
    }
    let (summary, extrapolations) = run_at(simulation, requests, search, met)?;
    Ok(Capacity { rate_per_s: met * own_rate, summary, extrapolations })
}

impl CapacitySearch {
    /// Number of rates that a search tries if the answer lies within a factor of 2 of the trace's own rate.
    pub fn usual_tries(&self) -> u32 {
        2 + (-self.tolerance.log2()).ceil().clamp(0.0, 60.0) as u32
    }

    /// Checks the parameters of the search.
    ///
    /// # Errors
    /// If share or tolerance is out of range.
    pub fn check(&self) -> Result<(), CapacityError> {
        let error = |name, found, expected| Err(CapacityError::Search { name, found, expected });
        if !(self.share > 0.0 && self.share <= 1.0) {
            return error("share", self.share, "more than 0, at most 1");
        }
        if !(self.tolerance > 0.0 && self.tolerance.is_finite()) {
            return error("tolerance", self.tolerance, "more than 0");
        }
        Ok(())
    }
}

/// Runs at `factor` times the trace's own rate.
fn run_at(
    simulation: &Simulation<'_>,
    requests: &[Request],
    search: &CapacitySearch,
    factor: f64,
) -> Result<(Summary, Extrapolations), SimulationError> {
    let machines = simulation.settings_of_machines(search.replicas);
    let mut metrics: Vec<_> =
        machines.map(|settings| Metrics::new(settings).with_objectives(search.objectives)).collect();
    let outcome = simulation.run(at_factor(requests, factor), &mut metrics)?;
    Ok((simulation.summarize(metrics, &outcome)?.summary, outcome.extrapolations))
}

/// Mean arrivals per second between the first and the last; `None` if all arrive at once.
fn rate_per_s(requests: &[Request]) -> Option<f64> {
    let span = requests.last()?.arrival.since(requests[0].arrival).as_secs_f64();
    (span > 0.0).then(|| (requests.len() - 1) as f64 / span)
}

/// The requests, arriving `factor` times as fast.
fn at_factor(requests: &[Request], factor: f64) -> impl Iterator<Item = Request> {
    requests
        .iter()
        .map(move |request| Request { arrival: Nanos((request.arrival.0 as f64 / factor) as u64), ..*request })
}
