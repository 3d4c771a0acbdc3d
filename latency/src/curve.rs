//! Interpolation between measured points: piecewise linear in one variable, bilinear in two.

use std::collections::BTreeMap;

use traces::Component;

use crate::extrapolation::Extrapolations;

/// Rows up to which one-dimensional components are tabulated.
const MAX_TABULATED: u32 = 1 << 14;

/// Piecewise-linear time in nanoseconds over one variable; zero without points.
#[derive(Clone, Debug, Default)]
pub(crate) struct Curve {
    /// Sorted by position.
    knots: Vec<Knot>,
}

/// A measured point of a curve.
#[derive(Clone, Copy, Debug)]
struct Knot {
    x: f64,
    y: f64,
    /// Slope from the previous point; 0 at the first.
    slope: f64,
}

impl Curve {
    /// The curve through points that are sorted by position.
    pub(crate) fn new(points: impl IntoIterator<Item = (u32, f64)>) -> Self {
        let mut knots: Vec<Knot> = Vec::new();
        for (x, y) in points {
            let x = f64::from(x);
            let slope = knots.last().map_or(0.0, |before| (y - before.y) / (x - before.x));
            knots.push(Knot { x, y, slope });
        }
        Self { knots }
    }

    /// The measured points.
    pub(crate) fn points(&self) -> impl Iterator<Item = (u32, f64)> {
        self.knots.iter().map(|knot| (knot.x as u32, knot.y))
    }

    pub(crate) fn xs(&self) -> impl Iterator<Item = u32> {
        self.knots.iter().map(|knot| knot.x as u32)
    }

    /// The largest measured position; infinite without points, since nothing then counts as extrapolated.
    pub(crate) fn end(&self) -> f64 {
        self.knots.last().map_or(f64::INFINITY, |knot| knot.x)
    }

    pub(crate) fn at(&self, x: f64) -> f64 {
        match self.knots[..] {
            [] => 0.0,
            [first, ..] if x <= first.x => first.y,
            [only] => only.y,
            _ => {
                let above = self.knots.partition_point(|knot| knot.x < x).min(self.knots.len() - 1);
                let (low, high) = (self.knots[above - 1], self.knots[above]);
                // Beyond the last point the line does not fall, as in `line`.
                if x <= high.x { low.y + high.slope * (x - low.x) } else { high.y + high.slope.max(0.0) * (x - high.x) }
            }
        }
    }
}

/// The line through two points. Beyond the second point it does not fall, however noisy the points are.
pub(crate) fn line((x0, y0): (f64, f64), (x1, y1): (f64, f64), x: f64) -> f64 {
    let slope = (y1 - y0) / (x1 - x0);
    if x <= x1 { y0 + slope * (x - x0) } else { y1 + slope.max(0.0) * (x - x1) }
}

/// A tabulated curve over rows. Zero rows take no time.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    times: Vec<f64>,
    curve: Curve,
    end: u32,
}

impl Table {
    pub(crate) fn new(curve: Curve) -> Self {
        let end = curve.end().min(f64::from(u32::MAX)) as u32;
        let tabulated = if curve.knots.is_empty() { 0 } else { end.min(MAX_TABULATED) };
        let times = (0..=tabulated).map(|rows| if rows == 0 { 0.0 } else { curve.at(rows.into()) }).collect();
        Self { times, curve, end }
    }

    /// A curve in place of one that was not measured: every use counts as an extrapolation.
    pub(crate) fn unmeasured(curve: Curve) -> Self {
        Self { times: vec![0.0], curve, end: 0 }
    }

    pub(crate) fn at(&self, rows: u32, component: Component, beyond: &mut Extrapolations) -> f64 {
        match self.times.get(rows as usize) {
            Some(&time) => time,
            None => {
                if rows > self.end {
                    beyond.count(component, rows, 0);
                }
                self.curve.at(rows.into())
            }
        }
    }
}

/// Bilinear time in nanoseconds over rows and history. Each measured number of rows has its own range of histories.
#[derive(Clone, Debug)]
pub(crate) struct Surface {
    /// Measured numbers of rows, in ascending order, each with its curve over history.
    curves: Vec<(u32, Curve)>,
    /// By rows: index of the first curve with at least that many rows. A table, because every pass needs it.
    above: Vec<u32>,
}

impl Surface {
    pub(crate) fn new(curves: BTreeMap<u32, Curve>) -> Self {
        let curves: Vec<(u32, Curve)> = curves.into_iter().collect();
        let end = curves.last().map_or(0, |last| last.0.min(MAX_TABULATED));
        let above = (0..=end).map(|rows| curves.partition_point(|curve| curve.0 < rows) as u32).collect();
        Self { curves, above }
    }

    pub(crate) fn at(&self, rows: u32, history: f64, component: Component, beyond: &mut Extrapolations) -> f64 {
        let (Some(last), true) = (self.curves.last(), rows > 0) else { return 0.0 };
        let above = match self.above.get(rows as usize) {
            Some(&above) => above as usize,
            None => self.curves.partition_point(|curve| curve.0 < rows).min(self.curves.len() - 1),
        };
        let (high, upper) = &self.curves[above];
        if above == 0 || *high == rows {
            if history > upper.end() || rows > *high {
                beyond.count(component, rows, history as u32);
            }
            return upper.at(history);
        }
        let (low, lower) = &self.curves[above - 1];
        if rows > last.0 || history > upper.end().min(lower.end()) {
            beyond.count(component, rows, history as u32);
        }
        line((f64::from(*low), lower.at(history)), (f64::from(*high), upper.at(history)), f64::from(rows))
    }
}
