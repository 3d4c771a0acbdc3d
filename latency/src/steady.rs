//! Factors that scale a profile to passes under steady load.
//!
//! Shapes that are measured one by one do not quite add up to the passes of a run: caches and the processor's clock depend
//! on the passes before. The difference varies with the number of rows. So times are scaled by rows, to what passes of one
//! depth took under a load that never ends, and `depth_mix` gets what passes of several depths took on top.

use std::collections::BTreeSet;

use traces::{Component, LatencyProfile, Nanos, PassWork};

use crate::model::{LatencyError, LatencyModel};

/// Passes that a factor for some rows must be seen in.
const CREDIBLE: f64 = 100.0;
/// Steps in which the factors settle: what is scaled by the rows of a pass has parts of other numbers of rows.
const STEPS: usize = 10;

/// A pass, and what an executor took for it.
pub type TimedPass<'p> = (&'p PassWork, Nanos);

/// Factors that make a profile that of a machine under steady load.
#[derive(Clone, Debug, PartialEq)]
pub struct SteadyFactors {
    /// Factors of all times, at the numbers of rows that the profile has of the block.
    by_rows: ByRows,
    /// What mixing depths takes beyond, in microseconds, at the numbers of rows that the profile has of it.
    mixing_us: ByRows,
}

impl SteadyFactors {
    /// From passes under steady load. Numbers of rows that few passes have take what those next to them do.
    ///
    /// # Errors
    /// If the profile contradicts itself.
    pub fn new(profile: &LatencyProfile, passes: &[TimedPass<'_>]) -> Result<Self, LatencyError> {
        let by_rows = ByRows::at_rows_of(profile, Component::Block, 1.0);
        let mut factors = Self { by_rows, mixing_us: ByRows::at_rows_of(profile, Component::DepthMix, 0.0) };
        let (mixed, alone): (Vec<_>, Vec<_>) = passes.iter().partition(|(work, _)| work.depths > 1);
        for _ in 0..STEPS {
            let seen = factors.by_rows.seen(&factors.model(profile)?, &alone);
            factors.by_rows.step(&seen, |factor, seen| factor * seen.ratio());
        }
        let mixing_steps = if factors.mixing_us.0.is_empty() { 0 } else { STEPS };
        for _ in 0..mixing_steps {
            let seen = factors.mixing_us.seen(&factors.model(profile)?, &mixed);
            factors.mixing_us.step(&seen, |added, seen| added + seen.missing_us());
        }
        let of_all = Seen::all(&factors.by_rows.seen(&factors.model(profile)?, passes)).ratio();
        for (_, value) in factors.by_rows.0.iter_mut().chain(&mut factors.mixing_us.0) {
            *value *= of_all;
        }
        Ok(factors)
    }

    /// The profile with these factors: its times, and how they spread.
    pub fn apply(&self, profile: &LatencyProfile) -> LatencyProfile {
        let mut scaled = profile.clone();
        for point in &mut scaled.points {
            let factor = self.by_rows.at(point.rows);
            point.time_us *= factor;
            point.spread_us *= factor;
            if point.component == Component::DepthMix {
                point.time_us = (point.time_us + self.mixing_us.at(point.rows)).max(0.0);
            }
        }
        scaled
    }

    /// The smallest and the largest factor.
    pub fn range(&self) -> (f64, f64) {
        self.by_rows.range()
    }

    /// The least and the most that mixing depths takes beyond, in microseconds; none where it was not measured.
    pub fn mixing_range_us(&self) -> Option<(f64, f64)> {
        (!self.mixing_us.0.is_empty()).then(|| self.mixing_us.range())
    }

    fn model(&self, profile: &LatencyProfile) -> Result<LatencyModel, LatencyError> {
        LatencyModel::new(&self.apply(profile))
    }
}

/// Values at some numbers of rows, linear between them, and those of the ends beyond.
#[derive(Clone, Debug, PartialEq)]
struct ByRows(Vec<(u32, f64)>);

impl ByRows {
    /// The same value at every number of rows that a profile has of a component.
    fn at_rows_of(profile: &LatencyProfile, component: Component, value: f64) -> Self {
        let rows: BTreeSet<u32> = profile.points_of(component).map(|point| point.rows).collect();
        Self(rows.into_iter().map(|rows| (rows, value)).collect())
    }

    fn at(&self, rows: u32) -> f64 {
        self.around(rows).map(|(place, share)| share * self.0[place].1).iter().sum()
    }

    /// The places of the numbers of rows next to one, with the shares that they have in it.
    fn around(&self, rows: u32) -> [(usize, f64); 2] {
        let high = self.0.partition_point(|&(at, _)| at < rows).min(self.0.len() - 1);
        let (low, at) = (high.saturating_sub(1), |place: usize| f64::from(self.0[place].0));
        let share = match at(high) - at(low) {
            0.0 => 1.0,
            between => ((f64::from(rows) - at(low)) / between).clamp(0.0, 1.0),
        };
        [(low, 1.0 - share), (high, share)]
    }

    fn range(&self) -> (f64, f64) {
        let values = || self.0.iter().map(|&(_, value)| value);
        (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max))
    }

    /// By number of rows, what passes took and what a profile says of them.
    fn seen(&self, model: &LatencyModel, passes: &[TimedPass<'_>]) -> Vec<Seen> {
        let mut seen = vec![Seen::default(); self.0.len()];
        for (work, took) in passes {
            let said = model.pass_ns(work);
            for (place, share) in self.around(work.rows) {
                let seen = &mut seen[place];
                seen.passes += share;
                seen.took += share * took.0 as f64;
                seen.said += share * said;
            }
        }
        seen
    }

    /// Makes values better by what was seen; numbers of rows that few passes have take what those next to them do.
    fn step(&mut self, seen: &[Seen], better: impl Fn(f64, &Seen) -> f64) {
        let Some(&first) = self.0.first() else { return };
        let pairs = self.0.iter().zip(seen).filter(|(_, seen)| seen.passes >= CREDIBLE);
        let credible: Vec<(u32, f64)> = pairs.map(|(&(rows, value), seen)| (rows, better(value, seen))).collect();
        let credible = Self(match credible.is_empty() {
            true => vec![(first.0, better(first.1, &Seen::all(seen)))],
            false => credible,
        });
        self.0.iter_mut().for_each(|(rows, value)| *value = credible.at(*rows));
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

    /// What a pass took beyond what was said, in microseconds; 0 of none.
    fn missing_us(&self) -> f64 {
        if self.passes > 0.0 { (self.took - self.said) / self.passes / 1e3 } else { 0.0 }
    }
}
