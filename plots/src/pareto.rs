//! Trade-offs between two quantities, and the Pareto-efficient points.

use crate::axis::Axis;
use crate::canvas::{self, Canvas, DrawResult, WIDTH, text_width};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::{self, BAND, Dash, Fill, Look, MUTED};
use crate::throughput::policy_legend;
use crate::{Error, Figure, Policy};
use plotters::prelude::*;

/// A quantity that is traded for another, or the request rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// Requests that arrive per second: a setting, which does not rank points.
    Rate,
    /// Generated tokens per second.
    Throughput,
    /// Share of generated tokens equal to those of full depth, 0 to 1.
    Agreement,
    /// Share of requests whose text begins with the right answer, 0 to 1.
    Accuracy,
    /// A latency in milliseconds, such as `p99 time to first token`.
    Latency(&'static str),
}

/// A value and half the width of its confidence interval; 0 if there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The value, such as a mean over seeds.
    pub value: f64,
    /// Half the width of the confidence interval.
    pub half_width: f64,
}

/// A run, or the mean of several, that differs from the others on its line in one setting.
#[derive(Clone, Debug)]
pub struct TradePoint {
    /// On the x axis.
    pub x: Estimate,
    /// On the y axis.
    pub y: Estimate,
    /// The setting, as a short label beside the point; may be empty.
    pub label: String,
}

/// The points of one policy, in the order in which a line connects them.
#[derive(Clone, Debug)]
pub struct TradeLine {
    /// Policy of the line.
    pub policy: Policy,
    /// Whether the policy is realisable. A policy that only bounds the others, such as an oracle, is drawn but not
    /// ranked.
    pub attainable: bool,
    /// The points.
    pub points: Vec<TradePoint>,
}

/// One panel: two quantities and the points of each policy.
#[derive(Clone, Debug)]
pub struct TradeOff {
    /// Along x.
    pub x: Quantity,
    /// Along y.
    pub y: Quantity,
    /// The policies, in the same order in all panels of a figure.
    pub lines: Vec<TradeLine>,
}

const HEIGHT: u32 = 1000;
/// Width of the line through Pareto-efficient points, which lies below all others.
const FRONTIER_WIDTH: u32 = 14;
const LABEL_SIZE: u32 = 23;
/// Room of a marker with its ring, or of an interval's end, to each side.
const MARKER_ROOM: i32 = 20;
const WHISKER_ROOM: i32 = 8;
/// Distance between the boxes that approximate a line.
const LINE_STEP: i32 = 6;
/// Top of an axis of percentages: a marker at 100 % stays whole.
const HIGHEST_SHARE: f64 = 101.0;

/// Draws panels side by side. A panel has lines of points with their confidence intervals, rings around
/// Pareto-efficient points (where both quantities are results), and the points' labels where there is room.
///
/// # Errors
/// No panels, no lines, a line without points, or a value out of its quantity's range.
pub fn pareto(figure: &Figure, panels: &[TradeOff]) -> Result<(), Error> {
    draw(figure, panels, false)
}

/// Draws panels as [`pareto`] does, with a line through the Pareto-efficient points: the frontier.
///
/// # Errors
/// As [`pareto`].
pub fn frontier(figure: &Figure, panels: &[TradeOff]) -> Result<(), Error> {
    draw(figure, panels, true)
}

fn draw(figure: &Figure, panels: &[TradeOff], joined: bool) -> Result<(), Error> {
    figure.require("panels", panels)?;
    for TradeOff { x, y, lines } in panels {
        figure.require("policies", lines)?;
        for line in lines {
            x.check(figure, &line.policy, line.points.iter().map(|point| point.x))?;
            y.check(figure, &line.policy, line.points.iter().map(|point| point.y))?;
        }
    }
    let mut legend = policy_legend(panels[0].lines.iter().map(|line| &line.policy), Sample::MarkedLine);
    if panels.iter().any(|panel| panel.efficient().next().is_some()) {
        legend.push(Entry::new("Pareto-efficient", Sample::Ring));
        if joined {
            legend.push(Entry::new("frontier", Sample::Fill(BAND, Fill::Solid)));
        }
    }
    canvas::draw(figure, (WIDTH, HEIGHT), &legend, |area| {
        let parts = area.split_evenly((1, panels.len()));
        panels.iter().zip(&parts).try_for_each(|(panel, part)| panel.draw(part, joined))
    })
}

impl Quantity {
    fn label(self) -> String {
        match self {
            Self::Rate => "request rate (requests/s)".to_owned(),
            Self::Throughput => "throughput (tokens/s)".to_owned(),
            Self::Agreement => "token agreement (%)".to_owned(),
            Self::Accuracy => "exact-match accuracy (%)".to_owned(),
            Self::Latency(name) => format!("{name} (ms)"),
        }
    }

    /// Shares are drawn in percent.
    fn scale(self) -> f64 {
        match self {
            Self::Agreement | Self::Accuracy => 100.0,
            Self::Rate | Self::Throughput | Self::Latency(_) => 1.0,
        }
    }

    fn is_better(self, value: f64, other: f64) -> bool {
        match self {
            Self::Rate => false,
            Self::Throughput | Self::Agreement | Self::Accuracy => value > other,
            Self::Latency(_) => value < other,
        }
    }

    fn check(
        self,
        figure: &Figure,
        policy: &Policy,
        estimates: impl Iterator<Item = Estimate> + Clone,
    ) -> Result<(), Error> {
        let kind = match self {
            Self::Rate | Self::Throughput => Kind::NonNegative,
            Self::Agreement | Self::Accuracy => Kind::Share,
            Self::Latency(_) => Kind::Positive,
        };
        let what = format!("{} of `{}`", self.label(), policy.label());
        figure.check(&what, kind, estimates.clone().map(|estimate| estimate.value))?;
        let what = format!("confidence interval of {what}");
        figure.check(&what, Kind::NonNegative, estimates.map(|estimate| estimate.half_width))
    }

    /// An axis with room for every interval. On a log scale, an interval that reaches below 0 is cut.
    fn axis(self, estimates: impl Iterator<Item = Estimate> + Clone) -> Axis {
        let ends =
            estimates.clone().flat_map(|Estimate { value, half_width }| [value - half_width, value + half_width]);
        let ends = ends.map(|end| end * self.scale());
        match self {
            Self::Rate | Self::Throughput => Axis::linear(&self.label(), ends),
            Self::Agreement | Self::Accuracy => Axis::linear(&self.label(), ends).at_most(HIGHEST_SHARE),
            Self::Latency(_) => {
                let low = estimates.map(|estimate| estimate.value).fold(f64::INFINITY, f64::min);
                Axis::auto(&self.label(), ends.map(|end| end.max(0.5 * low)).collect::<Vec<_>>())
            }
        }
    }
}

impl TradeOff {
    fn points(&self) -> impl Iterator<Item = &TradePoint> + Clone {
        self.lines.iter().flat_map(|line| &line.points)
    }

    fn draw(&self, area: &Canvas, joined: bool) -> DrawResult {
        let x = self.x.axis(self.points().map(|point| point.x));
        let y = self.y.axis(self.points().map(|point| point.y));
        let panel = Panel::new(area, &x, &y)?;
        let at = |line: &TradeLine| line.points.iter().map(|point| self.at(point)).collect::<Vec<_>>();
        let looks = Look::policies(self.lines.iter().map(|line| &line.policy));
        if joined {
            let frontier = panel.place(&self.frontier());
            style::stroke(&panel.canvas, &frontier, BAND.stroke_width(FRONTIER_WIDTH), Dash::Solid)?;
        }
        for (line, &look) in self.lines.iter().zip(&looks) {
            panel.line(&at(line), look)?;
            for point in &line.points {
                panel.whisker(self.across(point), look.colour)?;
                panel.whisker(self.up(point), look.colour)?;
            }
        }
        for point in self.efficient() {
            style::ring(&panel.canvas, panel.at(&self.at(point)))?;
        }
        for (line, &look) in self.lines.iter().zip(&looks) {
            panel.markers(&at(line), look)?;
        }
        self.draw_labels(&panel)
    }

    /// Draws each label beside its point, in the first free place around it, if there is one.
    fn draw_labels(&self, panel: &Panel) -> DrawResult {
        let style = style::text(LABEL_SIZE, MUTED).pos(style::BESIDE);
        let mut taken = self.drawn(panel);
        for point in self.points() {
            let (width, height) = (text_width(&panel.canvas, &point.label, &style)?, LABEL_SIZE as i32);
            let room = |&(x, y): &(i32, i32)| [x, y - height / 2, x + width, y + height / 2];
            let (x, y) = panel.at(&self.at(point));
            let free = places_around((x, y), (width, height)).find(|place| {
                let room = room(place);
                contains(panel.plot, room) && !taken.iter().any(|&other| overlap(room, other))
            });
            if let Some(place) = free {
                taken.push(room(&place));
                panel.canvas.draw_text(&point.label, &style, place)?;
            }
        }
        Ok(())
    }

    /// Boxes around everything that is drawn: markers with their rings, intervals, and lines in small steps.
    fn drawn(&self, panel: &Panel) -> Vec<[i32; 4]> {
        let around = |(x, y): (i32, i32), room| [x - room, y - room, x + room, y + room];
        let mut boxes = Vec::new();
        for line in &self.lines {
            let places: Vec<(i32, i32)> = line.points.iter().map(|point| panel.at(&self.at(point))).collect();
            boxes.extend(places.iter().map(|&place| around(place, MARKER_ROOM)));
            boxes.extend(places.windows(2).flat_map(|ends| steps(ends[0], ends[1])).map(|step| around(step, 2)));
            for point in &line.points {
                let [(left, y), (right, _)] = self.across(point).map(|end| panel.at(&end));
                let [(x, bottom), (_, top)] = self.up(point).map(|end| panel.at(&end));
                boxes.extend([[left, y - WHISKER_ROOM, right, y + WHISKER_ROOM]]);
                boxes.extend([[x - WHISKER_ROOM, top, x + WHISKER_ROOM, bottom]]);
            }
        }
        boxes
    }

    fn at(&self, point: &TradePoint) -> (f64, f64) {
        (self.x.scale() * point.x.value, self.y.scale() * point.y.value)
    }

    /// Ends of the interval along x.
    fn across(&self, point: &TradePoint) -> [(f64, f64); 2] {
        let ((x, y), half) = (self.at(point), self.x.scale() * point.x.half_width);
        [(x - half, y), (x + half, y)]
    }

    /// Ends of the interval along y.
    fn up(&self, point: &TradePoint) -> [(f64, f64); 2] {
        let ((x, y), half) = (self.at(point), self.y.scale() * point.y.half_width);
        [(x, y - half), (x, y + half)]
    }

    /// Places of the Pareto-efficient points, along x.
    fn frontier(&self) -> Vec<(f64, f64)> {
        let mut places: Vec<(f64, f64)> = self.efficient().map(|point| self.at(point)).collect();
        places.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        places
    }

    /// Realisable points that are Pareto-efficient: no other point is at least as good in both quantities and better in
    /// one.
    fn efficient(&self) -> impl Iterator<Item = &TradePoint> {
        let beats = |other: &TradePoint, point: &TradePoint| {
            let worse =
                self.x.is_better(point.x.value, other.x.value) || self.y.is_better(point.y.value, other.y.value);
            let better =
                self.x.is_better(other.x.value, point.x.value) || self.y.is_better(other.y.value, point.y.value);
            better && !worse
        };
        let is_ranked = |line: &&TradeLine| line.attainable && self.x != Quantity::Rate;
        let attainable = self.lines.iter().filter(is_ranked).flat_map(|line| &line.points);
        attainable.clone().filter(move |point| !attainable.clone().any(|other| beats(other, point)))
    }
}

/// Places for a label beside a marker, the best first: left end, vertical centre.
fn places_around((x, y): (i32, i32), (width, height): (i32, i32)) -> impl Iterator<Item = (i32, i32)> {
    let (right, left, middle) = (x + MARKER_ROOM + 4, x - MARKER_ROOM - 4 - width, x - width / 2);
    let (above, below) = (y - MARKER_ROOM - height / 2, y + MARKER_ROOM + height / 2);
    let near = [(right, y), (right, above), (right, below), (left, y), (left, below), (left, above)];
    near.into_iter().chain([(middle, above), (middle, below)])
}

/// Points between two positions, in small steps.
fn steps(from: (i32, i32), to: (i32, i32)) -> impl Iterator<Item = (i32, i32)> {
    let (across, down) = (to.0 - from.0, to.1 - from.1);
    let count = (across.abs().max(down.abs()) / LINE_STEP).max(1);
    (0..=count).map(move |step| (from.0 + across * step / count, from.1 + down * step / count))
}

fn contains(outer: [i32; 4], inner: [i32; 4]) -> bool {
    outer[0] <= inner[0] && outer[1] <= inner[1] && inner[2] <= outer[2] && inner[3] <= outer[3]
}

fn overlap(a: [i32; 4], b: [i32; 4]) -> bool {
    a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(attainable: bool, points: &[(f64, f64)]) -> TradeLine {
        let exactly = |value| Estimate { value, half_width: 0.0 };
        let point = |&(x, y): &(f64, f64)| TradePoint { x: exactly(x), y: exactly(y), label: String::new() };
        let points = points.iter().map(point).collect();
        TradeLine { policy: Policy::new("depth-wise", "margin"), attainable, points }
    }

    fn efficient(y: Quantity, lines: Vec<TradeLine>) -> Vec<(f64, f64)> {
        let panel = TradeOff { x: Quantity::Throughput, y, lines };
        panel.efficient().map(|point| (point.x.value, point.y.value)).collect()
    }

    const POINTS: [(f64, f64); 7] =
        [(1.0, 9.0), (2.0, 9.0), (4.0, 5.0), (3.0, 4.0), (4.0, 2.0), (5.0, 1.0), (2.0, 9.0)];

    #[test]
    fn points_that_none_beats_in_both_are_efficient() {
        let lines = || vec![line(true, &POINTS[..3]), line(true, &POINTS[3..])];
        assert_eq!(efficient(Quantity::Agreement, lines()), [(2.0, 9.0), (4.0, 5.0), (5.0, 1.0), (2.0, 9.0)]);
        assert_eq!(efficient(Quantity::Latency("TTFT"), lines()), [(5.0, 1.0)]);
    }

    #[test]
    fn the_frontier_goes_along_x() {
        let panel = TradeOff {
            x: Quantity::Agreement,
            y: Quantity::Throughput,
            lines: vec![line(true, &[(0.9, 5.0), (0.5, 9.0), (0.4, 8.0), (1.0, 1.0)])],
        };
        assert_eq!(panel.frontier(), [(50.0, 9.0), (90.0, 5.0), (100.0, 1.0)]);
    }

    #[test]
    fn points_at_rates_that_were_asked_for_are_not_ranked() {
        let panel = TradeOff { x: Quantity::Rate, y: Quantity::Latency("TTFT"), lines: vec![line(true, &POINTS)] };
        assert_eq!(panel.efficient().count(), 0);
    }

    #[test]
    fn a_policy_that_is_not_realisable_beats_no_other() {
        let lines = vec![line(true, &POINTS), line(false, &[(9.0, 9.0)])];
        assert_eq!(efficient(Quantity::Agreement, lines).len(), 4);
    }
}
