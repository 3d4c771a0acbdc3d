//! A profile of a machine in service: one whose passes take what those of a steady load took.
//!
//! Shapes that are measured one by one do not quite add up to the passes of a run, by other shares for few rows than for
//! many: caches and the processor's clock are as the passes before leave them. So times are scaled by rows, to what the
//! passes of a load that never ends took.

use std::collections::BTreeSet;

use scheduler::{ServeError, SteadyLoad, SteadyServer};
use traces::{Component, LatencyProfile, Nanos};

use crate::executor::ProfileExecutor;
use crate::exits::{ExitError, ExitModel};
use crate::latency::{LatencyError, LatencyModel};
use crate::passes::{PassLog, PassWork};

/// Passes that a factor for some rows must be seen in.
const CREDIBLE: f64 = 100.0;
/// Steps in which the factors settle: what is scaled by the rows of a pass has parts of other numbers of rows.
const STEPS: usize = 10;

/// What the first passes of a load are.
///
/// # Errors
/// If the load cannot be served.
pub fn steady_passes(
    load: SteadyLoad,
    latency: &LatencyModel,
    count: usize,
) -> Result<Vec<PassWork>, ServeError<ExitError>> {
    let exits = ExitModel::full_depth(u32::from(latency.num_loops()), latency.fingerprint());
    let exits = exits.map_err(ServeError::Executor)?;
    let mut server = SteadyServer::new(load, ProfileExecutor::new(latency, &exits, load.settings()))?;
    let mut log = PassLog::new(load.settings());
    for _ in 0..count {
        server.pass(&mut log)?;
    }
    Ok(log.into_works())
}

/// Factors of a profile's times by rows, linear between the numbers of rows that it has of the block.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceFactors(Vec<(u32, f64)>);

impl ServiceFactors {
    /// The factors by which passes took longer in service than a profile says, each pass given with what an executor took
    /// for it. Numbers of rows that few passes have take the factors of those next to them.
    ///
    /// # Errors
    /// If the profile contradicts itself.
    pub fn new(profile: &LatencyProfile, passes: &[(&PassWork, Nanos)]) -> Result<Self, LatencyError> {
        let rows: BTreeSet<u32> = profile.points_of(Component::Block).map(|point| point.rows).collect();
        let mut factors = Self(rows.into_iter().map(|rows| (rows, 1.0)).collect());
        for _ in 0..STEPS {
            let seen = factors.seen(profile, passes)?;
            let of_all = Seen::all(&seen).ratio();
            let credible: Vec<(u32, f64)> = factors
                .0
                .iter()
                .zip(&seen)
                .filter(|(_, seen)| seen.passes >= CREDIBLE)
                .map(|((rows, factor), seen)| (*rows, factor * seen.ratio()))
                .collect();
            let credible = Self(if credible.is_empty() { vec![(1, factors.0[0].1 * of_all)] } else { credible });
            factors.0.iter_mut().for_each(|(rows, factor)| *factor = credible.at(*rows));
        }
        let of_all = Seen::all(&factors.seen(profile, passes)?).ratio();
        factors.0.iter_mut().for_each(|(_, factor)| *factor *= of_all);
        Ok(factors)
    }

    /// The profile with these factors: its times, and how they spread.
    pub fn apply(&self, profile: &LatencyProfile) -> LatencyProfile {
        let mut scaled = profile.clone();
        for point in &mut scaled.points {
            let factor = self.at(point.rows);
            point.time_us *= factor;
            point.spread_us *= factor;
        }
        scaled
    }

    /// The smallest and the largest.
    pub fn range(&self) -> (f64, f64) {
        let factors = || self.0.iter().map(|&(_, factor)| factor);
        (factors().fold(f64::INFINITY, f64::min), factors().fold(0.0, f64::max))
    }

    fn at(&self, rows: u32) -> f64 {
        let ((low, below), (high, above)) = self.around(rows);
        below * self.0[low].1 + above * self.0[high].1
    }

    /// The places of the numbers of rows next to one, with the shares that they have in it.
    fn around(&self, rows: u32) -> ((usize, f64), (usize, f64)) {
        let high = self.0.partition_point(|&(at, _)| at < rows).min(self.0.len() - 1);
        let (low, at) = (high.saturating_sub(1), |place: usize| f64::from(self.0[place].0));
        let share = match at(high) - at(low) {
            0.0 => 1.0,
            between => ((f64::from(rows) - at(low)) / between).clamp(0.0, 1.0),
        };
        ((low, 1.0 - share), (high, share))
    }

    /// By number of rows, what passes took and what the profile with these factors says of them.
    fn seen(&self, profile: &LatencyProfile, passes: &[(&PassWork, Nanos)]) -> Result<Vec<Seen>, LatencyError> {
        let model = LatencyModel::new(&self.apply(profile))?;
        let mut seen = vec![Seen::default(); self.0.len()];
        for (work, took) in passes {
            let said = model.pass_ns(work);
            let (below, above) = self.around(work.shape.rows);
            for (place, share) in [below, above] {
                let seen = &mut seen[place];
                seen.passes += share;
                seen.took += share * took.0 as f64;
                seen.said += share * said;
            }
        }
        Ok(seen)
    }
}

/// Passes, what they took and what was said of them, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    passes: f64,
    took: f64,
    said: f64,
}

impl Seen {
    fn all(parts: &[Self]) -> Self {
        parts.iter().fold(Self::default(), |sum, part| Self {
            passes: sum.passes + part.passes,
            took: sum.took + part.took,
            said: sum.said + part.said,
        })
    }

    /// How many times as long passes took as was said; 1 of none.
    fn ratio(&self) -> f64 {
        if self.said > 0.0 { self.took / self.said } else { 1.0 }
    }
}
