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

#[cfg(test)]
mod tests {
    use traces::{Component, LatencyProfile, Point, ProfileMeta};

    use super::*;

    #[test]
    fn passes_take_what_the_profile_says_of_them() {
        let point = |component, rows, time_us| Point {
            component,
            rows,
            kv_tokens: 0,
            depths: 1,
            time_us,
            spread_us: 0.0,
            repeats: 1,
        };
        let profile = LatencyProfile {
            meta: ProfileMeta {
                schema_version: LatencyProfile::SCHEMA_VERSION,
                model: "test".to_owned(),
                fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
                num_loops: 2,
                device: "test".to_owned(),
                software: "test".to_owned(),
                source: "test".to_owned(),
                overhead_us: 1.0,
                weight_bytes: 0,
                kv_bytes_per_token: 0,
                memory: None,
            },
            points: vec![point(Component::Block, 1, 10.0), point(Component::Head, 1, 5.0)],
            mixed_attention: None,
        };
        let load = SteadyLoad::new(2, 1, 1, 1, 16, 32);
        let times = SteadyTimes::new(load, &LatencyModel::new(&profile).unwrap(), 40).unwrap();
        // Of a prompt of 16 tokens, each runs at both depths; the last one's second pass needs the head.
        assert_eq!(times.of(&(0..31)), Nanos(31 * 11_000));
        assert_eq!(times.of(&(31..33)), Nanos(11_000 + 5_000 + 11_000));
        assert_eq!(times.of(&(7..7)), Nanos::ZERO);
    }
}
