//! Where the time of a run goes, and where it leaves the measured grid.

use traces::Component;

use crate::extrapolation::Extrapolations;

/// What a run has asked of a latency model so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PassAccount {
    /// Where its time went.
    pub time: TimeByComponent,
    /// Times beyond the measured grid.
    pub extrapolations: Extrapolations,
}

impl PassAccount {
    /// Adds those of another machine.
    pub fn merge(&mut self, other: &Self) {
        self.time.merge(&other.time);
        self.extrapolations.merge(&other.extrapolations);
    }
}

/// Time of passes by component; the components add up to the time in which passes ran.
///
/// Times are those of the profile, also where a run draws its passes from their spread.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TimeByComponent {
    overhead_ns: f64,
    by_component: [f64; Component::ALL.len()],
}

impl TimeByComponent {
    pub(crate) fn add_overhead(&mut self, ns: f64) {
        self.overhead_ns += ns;
    }

    pub(crate) fn add(&mut self, component: Component, ns: f64) {
        self.by_component[component as usize] += ns;
    }

    /// Adds those of another machine.
    pub fn merge(&mut self, other: &Self) {
        self.overhead_ns += other.overhead_ns;
        for (sum, ns) in self.by_component.iter_mut().zip(other.by_component) {
            *sum += ns;
        }
    }

    /// Seconds that no component has: the serving loop's own.
    pub fn overhead_s(&self) -> f64 {
        self.overhead_ns * 1e-9
    }

    /// Seconds of one component. Attention that was measured for whole passes counts as that of prompts where there are any.
    pub fn of(&self, component: Component) -> f64 {
        self.by_component[component as usize] * 1e-9
    }
}
