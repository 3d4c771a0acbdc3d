//! What a profile says of a machine that never runs out of work.

use std::ops::Range;

use scheduler::{ServeError, SteadyLoad, SteadyServer};
use traces::Nanos;

use crate::executor::ProfileExecutor;
use crate::exits::{ExitError, ExitModel};
use crate::latency::LatencyModel;

/// When each pass of a steady load ends, by a profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SteadyTimes(Vec<Nanos>);

impl SteadyTimes {
    /// The first passes of a load.
    ///
    /// # Errors
    /// If the load cannot be served.
    pub fn new(load: SteadyLoad, latency: &LatencyModel, passes: usize) -> Result<Self, ServeError<ExitError>> {
        let exits = ExitModel::full_depth(u32::from(latency.num_loops()), latency.fingerprint());
        let exits = exits.map_err(ServeError::Executor)?;
        let mut server = SteadyServer::new(load, ProfileExecutor::new(latency, &exits, load.settings()))?;
        let mut ends = vec![Nanos::ZERO];
        for pass in 0..passes {
            let elapsed = server.pass()?;
            ends.push(ends[pass] + elapsed);
        }
        Ok(Self(ends))
    }

    /// What the passes of these numbers take.
    ///
    /// # Panics
    /// If they are not among the first passes.
    pub fn of(&self, passes: &Range<usize>) -> Nanos {
        self.0[passes.end].since(self.0[passes.start])
    }
}
