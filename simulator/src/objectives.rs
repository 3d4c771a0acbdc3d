//! Latency objectives, and whether requests meet them.

use scheduler::Observer;
use serde::{Deserialize, Serialize};
use traces::{Nanos, Request};

use crate::metrics::RequestLatencies;

/// Upper bounds on the latencies of a request. A request within all of them counts for the goodput.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Objectives {
    /// Largest time to first token, in milliseconds.
    pub ttft_ms: Option<f64>,
    /// Largest time per token after the first, in milliseconds. A request with a single token meets any bound.
    pub tpot_ms: Option<f64>,
    /// Largest time to the last token, in milliseconds.
    pub e2e_ms: Option<f64>,
}

impl Objectives {
    /// Checks that the bounds can be met.
    ///
    /// # Errors
    /// If a bound is negative or not a finite number, or there is none.
    pub fn check(&self) -> Result<(), ObjectiveError> {
        let bounds = [("ttft_ms", self.ttft_ms), ("tpot_ms", self.tpot_ms), ("e2e_ms", self.e2e_ms)];
        let given = || bounds.into_iter().filter_map(|(name, bound)| Some((name, bound?)));
        match given().find(|(_, bound)| !(bound.is_finite() && *bound >= 0.0)) {
            Some((name, bound)) => Err(ObjectiveError::Bound { name, bound }),
            None if given().next().is_none() => Err(ObjectiveError::Nothing),
            None => Ok(()),
        }
    }

    /// Whether a finished request is within every bound.
    pub(crate) fn are_met(&self, latencies: &RequestLatencies) -> bool {
        let within = |bound: Option<f64>, time: Nanos| bound.is_none_or(|bound| time.as_millis_f64() <= bound);
        within(self.ttft_ms, latencies.ttft)
            && within(self.tpot_ms, latencies.tpot.unwrap_or_default())
            && within(self.e2e_ms, latencies.end_to_end)
    }
}

/// Objectives that mean nothing.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum ObjectiveError {
    /// A bound that no latency can be compared with.
    #[error("{name} is {bound}: expected 0 or more milliseconds")]
    Bound {
        /// The key.
        name: &'static str,
        /// Its value.
        bound: f64,
    },
    /// No bound.
    #[error("no objective: expected ttft_ms, tpot_ms or e2e_ms")]
    Nothing,
}

/// An observer that only counts the requests that meet objectives.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attainment {
    objectives: Objectives,
    met: u64,
    finished: u64,
}

impl Attainment {
    pub(crate) fn new(objectives: Objectives) -> Self {
        Self { objectives, met: 0, finished: 0 }
    }

    /// Share of requests on all machines that met the objectives, 0 to 1.
    pub(crate) fn share(machines: &[Self]) -> f64 {
        let met: u64 = machines.iter().map(|machine| machine.met).sum();
        let finished: u64 = machines.iter().map(|machine| machine.finished).sum();
        met as f64 / finished as f64
    }
}

impl Observer for Attainment {
    fn finished(&mut self, now: Nanos, request: &Request, first_token: Nanos) {
        self.finished += 1;
        self.met += u64::from(self.objectives.are_met(&RequestLatencies::new(now, request, first_token)));
    }
}
