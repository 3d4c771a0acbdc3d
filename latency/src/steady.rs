//! Factors that fit a profile to passes under steady load.
//!
//! The times of single shapes do not quite add up to those of the passes of a run, because caches and the processor's
//! clock depend on earlier passes. The difference varies with the number of rows. One factor for each number of rows
//! therefore scales all times to passes of one depth under steady load, after passes of no more rows. `after_more` gets
//! the remaining time of passes after larger ones, `depth_mix` that of passes with several depths, `kv_fill` that of passes
//! whose exits copy keys and values, `exit_decision` that of passes whose exits are decided after them.

use std::collections::BTreeSet;

use traces::{Component, LatencyProfile, Nanos, PassWork};

use crate::model::{LatencyError, LatencyModel};

/// Number of passes from which a factor at some number of rows is trusted.
const CREDIBLE: f64 = 40.0;
/// Number of passes at all numbers of rows from which extra time is trusted.
const FEWEST: f64 = 10.0;
/// Steps in which the factors converge: a pass also has components with fewer rows than itself, which other factors
/// scale.
const STEPS: usize = 10;

/// A pass, and the time that an executor took for it.
pub type TimedPass<'p> = (&'p PassWork, Nanos);

/// Factors that turn a profile into that of a machine under steady load.
#[derive(Clone, Debug, PartialEq)]
pub struct SteadyFactors {
    /// Factors of all times, at the numbers of rows at which the profile has points of the block.
    by_rows: ByRows,
    /// Extra time after larger passes, in microseconds, at the numbers of rows at which the profile has points of
    /// `after_more`.
    after_us: ByRows,
    /// Extra time of mixed depths, in microseconds, at the numbers of rows at which the profile has points of
    /// `depth_mix`.
    mixing_us: ByRows,
    /// Extra time of copies of keys and values to skipped depths, in microseconds, at the numbers of copies at which the profile
    /// has points of `kv_fill`.
    filling_us: ByRows,
    /// Extra time of exits that are decided after the pass, in microseconds, at the numbers of exiting rows at which the
    /// profile has points of `exit_decision`.
    deciding_us: ByRows,
}

impl SteadyFactors {
    /// Fits the factors to passes under steady load. Numbers of rows with few passes take the values of their
    /// neighbours.
    ///
    /// # Errors
    /// If the profile cannot be interpolated.
    pub fn new(profile: &LatencyProfile, passes: &[TimedPass<'_>]) -> Result<Self, LatencyError> {
        let by_rows = ByRows::at_rows_of(profile, Component::Block, 1.0);
        let added = |component| ByRows::at_rows_of(profile, component, 0.0);
        let mut factors = Self {
            by_rows,
            after_us: added(Component::AfterMore),
            mixing_us: added(Component::DepthMix),
            filling_us: added(Component::KvFill),
            deciding_us: added(Component::ExitDecision),
        };
        // The profile may have no component for what is special about a pass; then the factors take it in.
        let decided = |work: &PassWork| !factors.deciding_us.0.is_empty() && work.decided_rows > 0;
        let (decided, known): (Vec<_>, Vec<_>) = passes.iter().partition(|(work, _)| decided(work));
        let fills = |work: &PassWork| !factors.filling_us.0.is_empty() && work.filled_depths > 0;
        let filling: Vec<_> = passes.iter().copied().filter(|(work, _)| fills(work)).collect();
        let known = known.into_iter().filter(|(work, _)| !fills(work));
        let (mixed, alone): (Vec<_>, Vec<_>) = known.partition(|(work, _)| work.depths > 1);
        let is_after_more = |work: &PassWork| !factors.after_us.0.is_empty() && work.before.rows > work.rows;
        let (mut after, alone): (Vec<_>, Vec<_>) = alone.into_iter().partition(|(work, _)| is_after_more(work));
        // Most passes with few rows after many are those in which rows exit.
        after.extend(decided.iter().filter(|(work, _)| work.depths == 1 && is_after_more(work)));
        for _ in 0..STEPS {
            let seen = factors.by_rows.seen(&factors.model(profile)?, &alone, rows);
            factors.by_rows.step(&seen, |factor, seen| factor * seen.ratio());
        }
        for _ in 0..STEPS {
            factors.add(profile, |factors| &mut factors.after_us, &after, rows)?;
            factors.add(profile, |factors| &mut factors.mixing_us, &mixed, rows)?;
            factors.add(profile, |factors| &mut factors.filling_us, &filling, |work| work.filled_depths)?;
            factors.add(profile, |factors| &mut factors.deciding_us, &decided, |work| work.decided_rows)?;
        }
        let of_all = Seen::all(&factors.by_rows.seen(&factors.model(profile)?, passes, rows)).ratio();
        let Self { by_rows, after_us, mixing_us, filling_us, deciding_us } = &mut factors;
        for (_, value) in
            [by_rows, after_us, mixing_us, filling_us, deciding_us].into_iter().flat_map(|values| &mut values.0)
        {
            *value *= of_all;
        }
        Ok(factors)
    }

    /// Improves an extra time by least squares: a pass says as much about it as its own time depends on it.
    fn add(
        &mut self,
        profile: &LatencyProfile,
        added: fn(&mut Self) -> &mut ByRows,
        passes: &[TimedPass<'_>],
        rows: fn(&PassWork) -> u32,
    ) -> Result<(), LatencyError> {
        if passes.is_empty() {
            return Ok(());
        }
        let mut more = self.clone();
        added(&mut more).0.iter_mut().for_each(|(_, us)| *us += 1.0);
        let (model, more) = (self.model(profile)?, more.model(profile)?);
        let added = added(self);
        let mut missing = vec![Missing::default(); added.0.len()];
        for (work, took) in passes {
            let modelled = model.pass_ns(work);
            let ns_of_us = more.pass_ns(work) - modelled;
            for (place, share) in added.around(rows(work)) {
                missing[place].weight += share * (ns_of_us / 1e3).powi(2);
                missing[place].us += share * (ns_of_us / 1e3) * (took.0 as f64 - modelled) / 1e3;
            }
        }
        added.step_if_credible(&missing);
        Ok(())
    }

    /// The profile with these factors applied to its times and spreads.
    pub fn apply(&self, profile: &LatencyProfile) -> LatencyProfile {
        let mut scaled = profile.clone();
        for point in &mut scaled.points {
            let factor = self.by_rows.at(point.rows);
            point.time_us *= factor;
            point.spread_us *= factor;
            let added = match point.component {
                Component::AfterMore => &self.after_us,
                Component::DepthMix => &self.mixing_us,
                Component::KvFill => &self.filling_us,
                Component::ExitDecision => &self.deciding_us,
                _ => continue,
            };
            let time_us = point.time_us + added.at(point.rows);
            point.time_us = if point.component.can_take(time_us) { time_us } else { 0.0 };
        }
        scaled
    }

    /// The smallest and the largest factor.
    pub fn range(&self) -> (f64, f64) {
        self.by_rows.range()
    }

    /// The smallest and the largest extra time after larger passes, in microseconds; `None` where it was not measured.
    pub fn after_range_us(&self) -> Option<(f64, f64)> {
        self.after_us.range_if_any()
    }

    /// The smallest and the largest extra time of mixed depths, in microseconds; `None` where it was not measured.
    pub fn mixing_range_us(&self) -> Option<(f64, f64)> {
        self.mixing_us.range_if_any()
    }

    /// The smallest and the largest extra time of copies of keys and values, in microseconds; `None` where it was not
    /// measured.
    pub fn filling_range_us(&self) -> Option<(f64, f64)> {
        self.filling_us.range_if_any()
    }

    /// The smallest and the largest extra time of exits that are decided after the pass, in microseconds; `None` where
    /// it was not measured.
    pub fn deciding_range_us(&self) -> Option<(f64, f64)> {
        self.deciding_us.range_if_any()
    }

    fn model(&self, profile: &LatencyProfile) -> Result<LatencyModel, LatencyError> {
        LatencyModel::new(&self.apply(profile))
    }
}

fn rows(work: &PassWork) -> u32 {
    work.rows
}

/// Values at some numbers of rows: linear between them, constant beyond the ends.
#[derive(Clone, Debug, PartialEq)]
struct ByRows(Vec<(u32, f64)>);

impl ByRows {
    /// One value at every number of rows at which a profile has points of a component.
    fn at_rows_of(profile: &LatencyProfile, component: Component, value: f64) -> Self {
        let rows: BTreeSet<u32> = profile.points_of(component).map(|point| point.rows).collect();
        Self(rows.into_iter().map(|rows| (rows, value)).collect())
    }

    fn at(&self, rows: u32) -> f64 {
        self.around(rows).map(|(place, share)| share * self.0[place].1).iter().sum()
    }

    /// Indices of the neighbouring numbers of rows, with their weights.
    fn around(&self, rows: u32) -> [(usize, f64); 2] {
        let high = self.0.partition_point(|&(at, _)| at < rows).min(self.0.len() - 1);
        let (low, at) = (high.saturating_sub(1), |place: usize| f64::from(self.0[place].0));
        let share = match at(high) - at(low) {
            0.0 => 1.0,
            between => ((f64::from(rows) - at(low)) / between).clamp(0.0, 1.0),
        };
        [(low, 1.0 - share), (high, share)]
    }

    /// The smallest and the largest value; `None` without any.
    fn range_if_any(&self) -> Option<(f64, f64)> {
        (!self.0.is_empty()).then(|| self.range())
    }

    fn range(&self) -> (f64, f64) {
        let values = || self.0.iter().map(|&(_, value)| value);
        (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max))
    }

    /// Adds what was missing. Numbers of rows with few passes take the values of their neighbours; few passes of all say
    /// nothing.
    fn step_if_credible(&mut self, missing: &[Missing]) {
        let mean = |missing: &Missing| missing.us / missing.weight;
        let pairs = self.0.iter().zip(missing).filter(|(_, missing)| missing.weight >= CREDIBLE);
        let credible = Self(pairs.map(|(&(rows, value), missing)| (rows, value + mean(missing))).collect());
        let all = missing.iter().fold(Missing::default(), |sum, missing| Missing {
            weight: sum.weight + missing.weight,
            us: sum.us + missing.us,
        });
        match credible.0.is_empty() {
            false => self.0.iter_mut().for_each(|(rows, value)| *value = credible.at(*rows)),
            true if all.weight >= FEWEST => self.0.iter_mut().for_each(|(_, value)| *value += mean(&all)),
            true => {}
        }
    }

    /// Measured and modelled times of passes, by the rows that count here.
    fn seen(&self, model: &LatencyModel, passes: &[TimedPass<'_>], rows: fn(&PassWork) -> u32) -> Vec<Seen> {
        let mut seen = vec![Seen::default(); self.0.len()];
        for (work, took) in passes {
            let said = model.pass_ns(work);
            for (place, share) in self.around(rows(work)) {
                let seen = &mut seen[place];
                seen.passes += share;
                seen.took += share * took.0 as f64;
                seen.said += share * said;
            }
        }
        seen
    }

    /// Improves the values by what was seen. Numbers of rows with few passes take the values of their neighbours.
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

/// Count, measured time and modelled time of passes, in nanoseconds.
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

    /// Measured time over modelled time; 1 without passes.
    fn ratio(&self) -> f64 {
        if self.said > 0.0 { self.took / self.said } else { 1.0 }
    }
}

/// Time that passes took beyond the model, of each weighted by what an extra time adds to it.
#[derive(Clone, Copy, Debug, Default)]
struct Missing {
    weight: f64,
    us: f64,
}
