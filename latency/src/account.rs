//! Time of a run by component, and uses beyond the measured grid.

use traces::Component;

use crate::extrapolation::Extrapolations;

/// What a latency model has been asked for during a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PassAccount {
    /// Time by component.
    pub time: TimeByComponent,
    /// Uses beyond the measured grid.
    pub extrapolations: Extrapolations,
}

impl PassAccount {
    /// Adds the account of another machine.
    pub fn merge(&mut self, other: &Self) {
        self.time.merge(&other.time);
        self.extrapolations.merge(&other.extrapolations);
    }
}

/// Time of passes by component. The components and the overhead add up to the time in which passes ran.
///
/// Times are those of the profile, also where a run draws its pass times from the measured spread.
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

    /// Adds the times of another machine.
    pub fn merge(&mut self, other: &Self) {
        self.overhead_ns += other.overhead_ns;
        for (sum, ns) in self.by_component.iter_mut().zip(other.by_component) {
            *sum += ns;
        }
    }

    /// Overhead of the serving loop, in seconds, which belongs to no component.
    pub fn overhead_s(&self) -> f64 {
        self.overhead_ns * 1e-9
    }

    /// Time of one component in seconds. Attention that was measured for whole passes counts as prompt attention in
    /// passes with prompts.
    pub fn of(&self, component: Component) -> f64 {
        self.by_component[component as usize] * 1e-9
    }
}
