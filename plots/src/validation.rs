//! Predicted against measured values: the accuracy of the simulator.

use plotters::coord::ranged1d::Ranged;
use plotters::prelude::*;

use crate::axis::Axis;
use crate::canvas::{self, Canvas, DrawResult, WIDTH};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::{self, BAND, Dash, Fill, Look, MUTED, first_seen};
use crate::{Error, Figure};

/// One run's metric, measured and predicted.
#[derive(Clone, Debug)]
pub struct Prediction {
    /// Metric and unit, such as `throughput (tokens/s)`. Each metric has a panel.
    pub metric: String,
    /// Label of the marker, usually the batching policy.
    pub series: String,
    /// Measured value.
    pub measured: f64,
    /// Simulated value.
    pub predicted: f64,
}

const TOLERANCE: f64 = 0.1;
/// Units of a panel's width for labels and margins.
const BESIDE_PLOT: i32 = 230;

/// Draws predicted against measured values around the diagonal, with a band of 10 % on either side.
///
/// # Errors
/// No predictions, or a negative value.
pub fn predictions(figure: &Figure, points: &[Prediction]) -> Result<(), Error> {
    figure.require("predictions", points)?;
    figure.check("measured", Kind::NonNegative, points.iter().map(|p| p.measured))?;
    figure.check("predicted", Kind::NonNegative, points.iter().map(|p| p.predicted))?;
    let (mut metrics, mut series) = (Vec::new(), Vec::new());
    for point in points {
        first_seen(&mut metrics, &point.metric);
        first_seen(&mut series, &point.series);
    }
    let entry = |(i, name): (usize, &&str)| Entry::new(*name, Sample::Marker(Look::series(i)));
    let mut legend: Vec<Entry> = series.iter().enumerate().map(entry).collect();
    legend.push(Entry::new("equal", Sample::Stroke(MUTED, Dash::Solid)));
    legend.push(Entry::new("within ±10 %", Sample::Fill(BAND, Fill::Solid)));
    let columns = match metrics.len() {
        1 => 1,
        2 | 4 => 2,
        _ => 3,
    };
    let rows = metrics.len().div_ceil(columns);
    let side = [1100, 900, WIDTH / 3][columns - 1];
    let size = (side * columns as u32, side * rows as u32);
    canvas::draw(figure, size, &legend, |area| {
        let parts = area.split_evenly((rows, columns));
        for (metric, part) in metrics.iter().zip(&parts) {
            let of_metric = points.iter().filter(|p| p.metric == *metric);
            draw_metric(part, metric, &of_metric.collect::<Vec<_>>(), &series)?;
        }
        Ok(())
    })
}

fn draw_metric(area: &Canvas, metric: &str, points: &[&Prediction], series: &[&str]) -> DrawResult {
    let within = points.iter().filter(|p| p.is_within_tolerance()).count();
    let note = format!("{within} of {} within ±10 %", points.len());
    let values = points.iter().flat_map(|p| [p.measured, p.predicted]);
    let (width, _) = area.dim_in_pixel();
    let axis = Axis::auto("", values).thinned(area, width as i32 - BESIDE_PLOT)?;
    let (x, y) = (axis.labelled("measured"), axis.labelled("predicted"));
    let panel = Panel::titled(area, [metric, &note], &x, &y)?;
    draw_diagonal(&panel, (axis.range().start, axis.range().end))?;
    for point in points {
        let index = series.iter().position(|s| *s == point.series);
        let look = Look::series(index.unwrap_or(0));
        panel.markers(&[(point.measured, point.predicted)], look)?;
    }
    Ok(())
}

impl Prediction {
    fn is_within_tolerance(&self) -> bool {
        (self.predicted - self.measured).abs() <= TOLERANCE * self.measured
    }
}

/// The band between 0.9 and 1.1 times the measured value, cut to the panel, and the diagonal.
fn draw_diagonal(panel: &Panel, (low, high): (f64, f64)) -> DrawResult {
    let (under, over) = (1.0 - TOLERANCE, 1.0 + TOLERANCE);
    let band = [
        (low, low),
        (low, (over * low).max(low)),
        (high / over, high),
        (high, high),
        (high, under * high),
        ((low / under).max(low), low),
    ];
    panel.area(&band, BAND)?;
    let ends = [panel.at(&(low, low)), panel.at(&(high, high))];
    style::stroke(&panel.canvas, &ends, MUTED.stroke_width(3), Dash::Solid)
}
