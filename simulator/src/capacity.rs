//! The highest request rate that meets latency objectives.

use latency::Extrapolations;
use traces::{Nanos, Request};

use crate::metrics::{Metrics, Summary};
use crate::objectives::{Attainment, Objectives};
use crate::simulation::{Simulation, SimulationError};

/// How to search for the highest rate.
///
/// The requests come in the rhythm of their trace, faster or slower; the rate is doubled or halved until the
/// objectives are met at one rate and missed at twice that, and then bisected. A rate that overloads the machine is
/// found out only if the trace lasts long enough for its queue to outgrow the objectives: the wait they tolerate
/// should be little beside the length of the trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CapacitySearch {
    /// What a request must meet.
    pub objectives: Objectives,
    /// Share of requests that must, above 0 and up to 1.
    pub share: f64,
    /// Machines behind the router.
    pub replicas: usize,
    /// Width of the rates between which the answer lies, relative to it; above 0.
    pub tolerance: f64,
}

/// The highest rate, and how requests fared at it.
#[derive(Clone, Debug, PartialEq)]
pub struct Capacity {
    /// Requests per second on average over the trace; 0 if even requests that come one by one miss the objectives.
    pub rate_per_s: f64,
    /// The run at that rate, or at the lowest that was tried.
    pub summary: Summary,
    /// Where that run left the profile's measured grid.
    pub extrapolations: Extrapolations,
}

/// Why there is no highest rate.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CapacityError {
    /// A search that cannot be made.
    #[error("{name} of a capacity search is {found}, expected {expected}")]
    Search {
        /// Which value.
        name: &'static str,
        /// As given.
        found: f64,
        /// What it must be.
        expected: &'static str,
    },
    /// Requests without a rate.
    #[error("the requests all arrive at once: expected a trace with a rate that can be raised and lowered")]
    NoRate,
    /// Nothing ever overloads.
    #[error("the objectives are met even at {rate_per_s:.3e} requests per second: they are loose for so short a trace")]
    AlwaysMet {
        /// The highest rate tried.
        rate_per_s: f64,
    },
    /// A run failed.
    #[error(transparent)]
    Simulation(#[from] SimulationError),
}

/// Most doublings or halvings of the trace's own rate.
const MOST_OCTAVES: u32 = 24;

/// Finds the highest rate at which enough of the requests meet the objectives, to within the tolerance. `tried` is told
/// of every rate before it is simulated.
///
/// # Errors
/// If the search or the trace makes no sense, every rate meets the objectives, or a run fails.
pub fn capacity(
    simulation: &Simulation<'_>,
    requests: &[Request],
    search: &CapacitySearch,
    mut tried: impl FnMut(f64),
) -> Result<Capacity, CapacityError> {
    search.check()?;
    let own_rate = rate_per_s(requests).ok_or(CapacityError::NoRate)?;
    let mut met_at = |factor: f64| {
        tried(factor * own_rate);
        let mut watched = vec![Attainment::new(search.objectives); search.replicas];
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
    /// Rates that a search tries if the answer lies within an octave of the trace's own rate.
    pub fn usual_tries(&self) -> u32 {
        2 + (-self.tolerance.log2()).ceil().clamp(0.0, 60.0) as u32
    }

    /// Whether the search can be made.
    ///
    /// # Errors
    /// If share or tolerance make no sense.
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

/// The run at `factor` times the trace's own rate.
fn run_at(
    simulation: &Simulation<'_>,
    requests: &[Request],
    search: &CapacitySearch,
    factor: f64,
) -> Result<(Summary, Extrapolations), SimulationError> {
    let mut metrics = vec![Metrics::new(simulation.settings()).with_objectives(search.objectives); search.replicas];
    let outcome = simulation.run(at_factor(requests, factor), &mut metrics)?;
    let merged = Metrics::merged(metrics).ok_or(SimulationError::NoReplicas)?;
    Ok((simulation.summary(&merged, &outcome), outcome.extrapolations))
}

/// Gaps between the first and the last arrival, per second; none if they arrive together.
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
