//! What the parts of passes take: where the time of a run goes.

use traces::Component;

use crate::latency::LatencyModel;

/// Time of passes by part, in seconds; the parts add up to the time in which passes ran.
///
/// Times are those of the profile: medians, also where a run draws its passes from their spread.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TimeByPart {
    overhead_ns: f64,
    by_component: [f64; Component::ALL.len()],
}

impl TimeByPart {
    /// Adds a pass: what it costs beside its parts, and [`LatencyModel::parts_ns`].
    pub(crate) fn add_pass(&mut self, overhead_ns: f64, parts_ns: &[f64; LatencyModel::PARTS.len()]) {
        self.overhead_ns += overhead_ns;
        for (component, ns) in LatencyModel::PARTS.into_iter().zip(parts_ns) {
            self.add(component, *ns);
        }
    }

    /// Adds to one part.
    pub(crate) fn add(&mut self, component: Component, ns: f64) {
        self.by_component[component as usize] += ns;
    }

    /// Adds those of another machine.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.overhead_ns += other.overhead_ns;
        for (sum, ns) in self.by_component.iter_mut().zip(other.by_component) {
            *sum += ns;
        }
    }

    /// Time that no part holds.
    pub fn overhead_s(&self) -> f64 {
        self.overhead_ns * 1e-9
    }

    /// Time of one part. Attention that was measured for whole passes counts as that of prompts where there are any.
    pub fn of(&self, component: Component) -> f64 {
        self.by_component[component as usize] * 1e-9
    }
}
