//! Evaluation of exit signals: reliability, trade-off curves, and calibrated thresholds.

use plotters::coord::ranged1d::Ranged;
use plotters::prelude::*;

use crate::axis::Axis;
use crate::canvas::{self, WIDTH};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::{self, Dash, INK, Look, MUTED};
use crate::throughput::HIGHEST_SHARE;
use crate::{Error, Figure};

/// Agreement with the last loop against the signal's confidence, by depth.
#[derive(Clone, Debug)]
pub struct Reliability {
    /// Name of the signal, the title of the panel.
    pub signal: String,
    /// A line below the title, such as the calibration error.
    pub note: String,
    /// `(depth, points)`; a point is confidence and agreement, each 0 to 1.
    pub curves: Vec<(usize, Vec<(f64, f64)>)>,
}

const AGREEMENT: &str = "token agreement (%)";

/// Draws a reliability diagram per signal, with a line per depth and the diagonal of a perfectly calibrated signal.
///
/// # Errors
/// No signals, a signal without curves, a curve without points, or values that are not shares.
pub fn reliability(figure: &Figure, signals: &[Reliability]) -> Result<(), Error> {
    figure.require("signals", signals)?;
    for Reliability { signal, curves, .. } in signals {
        figure.require(&format!("curves of `{signal}`"), curves)?;
        for (depth, points) in curves {
            let what = |value: &str| format!("{value} of `{signal}` at depth {depth}");
            figure.check(&what("confidence"), Kind::Share, points.iter().map(|point| point.0))?;
            figure.check(&what("agreement"), Kind::Share, points.iter().map(|point| point.1))?;
        }
    }
    let depths = signals.iter().flat_map(|signal| &signal.curves).map(|curve| curve.0 + 1).max().unwrap_or(1);
    let entry = |depth| Entry::new(format!("depth {depth}"), Sample::MarkedLine(Look::ordered(depth, depths)));
    let mut legend: Vec<Entry> = style::named_classes(depths).map(entry).collect();
    legend.push(Entry::new("as often right as sure", Sample::Stroke(MUTED, Dash::Dashed)));
    let agreements = signals.iter().flat_map(|signal| &signal.curves).flat_map(|curve| &curve.1);
    let y = Axis::linear(AGREEMENT, agreements.map(|point| 100.0 * point.1)).at_most(HIGHEST_SHARE);
    let columns = signals.len().min(2);
    let rows = signals.len().div_ceil(columns);
    canvas::draw(figure, (WIDTH, 800 * rows as u32), &legend, |area| {
        for (signal, part) in signals.iter().zip(&area.split_evenly((rows, columns))) {
            let confidences = signal.curves.iter().flat_map(|curve| &curve.1).map(|point| 100.0 * point.0);
            let x = Axis::linear("confidence (%)", confidences).at_most(HIGHEST_SHARE);
            let panel = Panel::titled(part, [&signal.signal, &signal.note], &x, &y)?;
            let (from, to) = (x.range().start.max(y.range().start), x.range().end.min(y.range().end));
            style::stroke(part, &panel.place(&[(from, from), (to, to)]), MUTED.stroke_width(3), Dash::Dashed)?;
            for (depth, points) in &signal.curves {
                panel.marked_line(&percent(points), Look::ordered(*depth, depths))?;
            }
        }
        Ok(())
    })
}

/// Both coordinates as percentages.
fn percent(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    points.iter().map(|&(x, y)| (100.0 * x, 100.0 * y)).collect()
}

/// Mean depth against agreement over the thresholds of one exit signal.
#[derive(Clone, Debug)]
pub struct ExitCurve {
    /// Name of the signal.
    pub signal: String,
    /// `(passes per token, agreement from 0 to 1)`, in any order.
    pub points: Vec<(f64, f64)>,
}

/// Draws the trade-off curves of exit signals, with two references: static exits, whose agreements by depth are
/// `fixed`, and an oracle that needs `oracle` passes per token.
///
/// # Errors
/// No curves, a curve without points, a mean depth that is not positive, or an agreement that is not a share.
pub fn exit_curves(figure: &Figure, curves: &[ExitCurve], fixed: &[f64], oracle: f64) -> Result<(), Error> {
    figure.require("exit curves", curves)?;
    for ExitCurve { signal, points } in curves {
        figure.check(&format!("mean depth of `{signal}`"), Kind::Positive, points.iter().map(|point| point.0))?;
        figure.check(&format!("agreement of `{signal}`"), Kind::Share, points.iter().map(|point| point.1))?;
    }
    figure.check("agreement at a fixed depth", Kind::Share, fixed.iter().copied())?;
    figure.check("mean depth of the oracle", Kind::Positive, [oracle])?;
    let in_percent = |points: &[(f64, f64)]| points.iter().map(|&(x, y)| (x, 100.0 * y)).collect::<Vec<_>>();
    let fixed: Vec<(f64, f64)> = fixed.iter().enumerate().map(|(depth, &y)| (depth as f64 + 1.0, 100.0 * y)).collect();
    let drawn: Vec<_> = curves.iter().map(|curve| in_percent(&curve.points)).collect();
    let best = (oracle, 100.0);
    let all = || drawn.iter().flatten().chain(&fixed).chain([&best]);
    let x = Axis::linear("mean depth (passes per token)", all().map(|point| point.0));
    let y = Axis::linear(AGREEMENT, all().map(|point| point.1)).at_most(HIGHEST_SHARE);
    let at_fixed = Look { colour: MUTED, dash: Dash::Dotted, ..Look::series(curves.len()) };
    let at_oracle = Look { colour: INK, marker: style::Marker::Star, dash: Dash::Solid };
    let entry =
        |(index, curve): (usize, &ExitCurve)| Entry::new(&curve.signal, Sample::MarkedLine(Look::series(index)));
    let mut legend: Vec<Entry> = curves.iter().enumerate().map(entry).collect();
    legend.push(Entry::new("always at one depth", Sample::MarkedLine(at_fixed)));
    legend.push(Entry::new("oracle", Sample::Marker(at_oracle)));
    canvas::draw(figure, (WIDTH, 1000), &legend, |area| {
        let panel = Panel::new(area, &x, &y)?;
        panel.marked_line(&fixed, at_fixed)?;
        for (index, points) in drawn.iter().enumerate() {
            panel.marked_line(points, Look::series(index))?;
        }
        panel.markers(&[best], at_oracle)
    })
}

/// A calibrated threshold, and all tested ones.
#[derive(Clone, Debug)]
pub struct CalibratedThreshold {
    /// Name of the exit signal, the label of the axis.
    pub signal: String,
    /// Maximum risk, 0 to 1.
    pub tolerance: f64,
    /// The chosen threshold, if there is one.
    pub chosen: Option<f64>,
    /// A line for each exit trace, the calibration trace first.
    pub lines: Vec<CalibrationLine>,
}

/// Risk and mean depth over thresholds on one exit trace.
#[derive(Clone, Debug)]
pub struct CalibrationLine {
    /// Name of the trace.
    pub name: String,
    /// Points in any order.
    pub points: Vec<CalibrationPoint>,
}

/// Outcome of one threshold.
#[derive(Clone, Copy, Debug)]
pub struct CalibrationPoint {
    /// The threshold, in the signal's own unit.
    pub threshold: f64,
    /// Share of tokens that differ, 0 to 1.
    pub risk: f64,
    /// Passes per token.
    pub mean_depth: f64,
}

/// Draws risk and, below it, mean depth against the threshold, with the tolerance and the chosen threshold.
///
/// # Errors
/// No lines, a line without points, a threshold that is not finite, a risk or tolerance that is not a share, or a mean
/// depth that is not positive.
pub fn calibration(figure: &Figure, found: &CalibratedThreshold) -> Result<(), Error> {
    let CalibratedThreshold { signal, tolerance, chosen, lines } = found;
    figure.require("exit traces", lines)?;
    for CalibrationLine { name, points } in lines {
        figure.check(&format!("threshold of `{name}`"), Kind::Finite, points.iter().map(|point| point.threshold))?;
        figure.check(&format!("risk of `{name}`"), Kind::Share, points.iter().map(|point| point.risk))?;
        figure.check(
            &format!("mean depth of `{name}`"),
            Kind::Positive,
            points.iter().map(|point| point.mean_depth),
        )?;
    }
    figure.check("tolerance", Kind::Share, [*tolerance])?;
    if let Some(chosen) = chosen {
        figure.check("threshold chosen", Kind::Finite, [*chosen])?;
    }
    let points = || lines.iter().flat_map(|line| &line.points);
    let x = Axis::linear(&format!("threshold of {signal}"), points().map(|point| point.threshold));
    let ys = [
        Axis::from_zero("tokens that differ (%)", points().map(|point| 100.0 * point.risk).chain([100.0 * tolerance])),
        Axis::linear("mean depth (passes per token)", points().map(|point| point.mean_depth)),
    ];
    let entry =
        |(index, line): (usize, &CalibrationLine)| Entry::new(&line.name, Sample::MarkedLine(Look::series(index)));
    let mut legend: Vec<Entry> = lines.iter().enumerate().map(entry).collect();
    legend.push(Entry::new(format!("tolerance {} %", 100.0 * tolerance), Sample::Stroke(MUTED, Dash::Dashed)));
    legend.extend(chosen.map(|chosen| Entry::new(format!("chosen: {chosen}"), Sample::Stroke(INK, Dash::Dotted))));
    let values: [fn(&CalibrationPoint) -> f64; 2] = [|point| 100.0 * point.risk, |point| point.mean_depth];
    canvas::draw(figure, (WIDTH, 1240), &legend, |area| {
        let panels = Panel::labelled_stack(area, &x, &ys)?;
        panels[0].level(100.0 * tolerance, MUTED, Dash::Dashed)?;
        for (panel, value) in panels.iter().zip(values) {
            if let Some(chosen) = chosen {
                panel.upright(*chosen, INK, Dash::Dotted)?;
            }
            for (index, line) in lines.iter().enumerate() {
                let points: Vec<_> = line.points.iter().map(|point| (point.threshold, value(point))).collect();
                panel.marked_line(&points, Look::series(index))?;
            }
        }
        Ok(())
    })
}
