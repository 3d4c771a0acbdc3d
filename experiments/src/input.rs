//! A simulation before it runs: requests, what they run on, and how.

use std::path::Path;

use anyhow::Result;
use latency::LatencyModel;
use scheduler::Settings;
use simulator::{ExitModel, MachineGroup, Simulation};
use traces::{Request, Requests};

use crate::machines::Groups;
use crate::runs::Machines;
use crate::serving::Serving;
use crate::workload::Workload;

/// Everything that simulations of the same requests take, one for each combination of policies.
pub struct SimulationInput<R = Vec<Request>> {
    /// What is served.
    pub workload: Workload<R>,
    /// Of the device.
    pub latency: LatencyModel,
    /// Of the model.
    pub exits: ExitModel,
    /// For each combination of policies, those of each group of machines.
    pub settings: Vec<Vec<Settings>>,
    /// What runs them.
    pub machines: Machines,
    /// Their roles.
    pub groups: Groups,
}

impl<R: Requests> SimulationInput<R> {
    /// The simulations of `serving`, whose paths are relative to `base`.
    ///
    /// # Errors
    /// If the profile of a group of machines does not read, or the device's memory is too small.
    pub fn new(
        workload: Workload<R>,
        (latency, exits): (LatencyModel, ExitModel),
        serving: &Serving,
        machines: Machines,
        base: &Path,
    ) -> Result<Self> {
        let groups = Groups::read(&serving.machines, serving.transfer, base)?;
        // Looking for the longest request of many takes as long as making them.
        let is_needed = !serving.machines.is_empty() || serving.depends_on_longest(&latency.meta().into());
        let longest = if is_needed { workload.requests.longest() } else { 1 };
        let settings = groups.all_settings(serving, &latency, longest)?;
        Ok(Self { workload, latency, exits, settings, machines, groups })
    }

    /// The groups of machines for each combination of policies.
    pub fn groups(&self) -> Vec<Vec<MachineGroup<'_>>> {
        let of_combination =
            |settings: &Vec<Settings>| self.groups.machines(settings, self.machines.replicas, &self.latency);
        self.settings.iter().map(of_combination).collect()
    }

    /// A simulation for each combination of policies, on these [groups](Self::groups).
    ///
    /// # Errors
    /// If the settings are of another model, or the groups make no system.
    pub fn simulations<'m>(&'m self, groups: &'m [Vec<MachineGroup<'m>>]) -> Result<Vec<Simulation<'m>>> {
        let simulation = |groups: &'m Vec<MachineGroup<'m>>| {
            Ok(self.machines.simulation_of_groups(groups, self.groups.link(), &self.exits, &self.workload)?)
        };
        groups.iter().map(simulation).collect()
    }
}
