//! Any quantity against any other, with the spread of repeated runs.

use plotters::prelude::*;

use crate::axis::{Axis, Scale};
use crate::canvas::{self, WIDTH};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::Look;
use crate::{Error, Figure};

/// One line of a sweep.
#[derive(Clone, Debug)]
pub struct SweepLine {
    /// The line's label.
    pub name: String,
    /// Points in any order.
    pub points: Vec<SweepPoint>,
}

/// A value and its spread.
#[derive(Clone, Copy, Debug)]
pub struct SweepPoint {
    /// The swept setting.
    pub x: f64,
    /// The value, such as a mean over seeds.
    pub y: f64,
    /// The spread's lower end; equal to `y` where there is none.
    pub low: f64,
    /// The spread's upper end.
    pub high: f64,
}

/// Draws lines with bands. The labels carry the units; a y axis over a large factor is logarithmic.
///
/// # Errors
/// No lines, a line without points, values that are not finite, an x of 0 or less on a log axis, or
/// a value outside its spread.
pub fn sweep(figure: &Figure, x_label: &str, x_scale: Scale, y_label: &str, lines: &[SweepLine]) -> Result<(), Error> {
    figure.require("lines", lines)?;
    let x_kind = match x_scale {
        Scale::Linear => Kind::Finite,
        Scale::Log => Kind::Positive,
    };
    for line in lines {
        let check = |what, kind, value: fn(&SweepPoint) -> f64| {
            let what = format!("{what} of `{}`", line.name);
            figure.check(&what, kind, line.points.iter().map(value))
        };
        check(x_label, x_kind, |p| p.x)?;
        check(y_label, Kind::Finite, |p| p.y)?;
        check("spread below the value", Kind::NonNegative, |p| p.y - p.low)?;
        check("spread above the value", Kind::NonNegative, |p| p.high - p.y)?;
    }
    let points = lines.iter().flat_map(|line| &line.points);
    let xs = points.clone().map(|p| p.x);
    let x = match x_scale {
        Scale::Linear => Axis::linear_or_steps(x_label, xs),
        Scale::Log => Axis::log(x_label, xs),
    };
    let y = Axis::auto(y_label, points.flat_map(|p| [p.low, p.high]));
    let entry = |(index, line): (usize, &SweepLine)| Entry::new(&line.name, Sample::MarkedLine(Look::series(index)));
    let legend: Vec<Entry> = lines.iter().enumerate().map(entry).collect();
    canvas::draw(figure, (WIDTH, 1000), &legend, |area| {
        let panel = Panel::new(area, &x, &y)?;
        for (index, line) in lines.iter().enumerate() {
            let band = Look::series(index).colour.mix(0.18);
            panel.area(&outline(&line.points), band)?;
            if let [only] = line.points[..] {
                // A band over one point has no width.
                panel.line(&[(only.x, only.low), (only.x, only.high)], Look::series(index))?;
            }
        }
        for (index, line) in lines.iter().enumerate() {
            let points: Vec<_> = line.points.iter().map(|p| (p.x, p.y)).collect();
            panel.marked_line(&points, Look::series(index))?;
        }
        Ok(())
    })
}

/// Outline of the spread: along the lower ends and back along the upper ends.
fn outline(points: &[SweepPoint]) -> Vec<(f64, f64)> {
    let mut points = points.to_vec();
    points.sort_by(|a, b| a.x.total_cmp(&b.x));
    let lower = points.iter().map(|p| (p.x, p.low));
    let upper = points.iter().rev().map(|p| (p.x, p.high));
    lower.chain(upper).collect()
}
