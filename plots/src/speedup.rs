//! Throughput and speed-up of every policy, measured beside simulated.

use plotters::prelude::*;

use crate::axis::{Axis, number, three_digits};
use crate::canvas::{self, Canvas, DrawResult, WIDTH, wrap};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::{self, Dash, Fill, INK, Look, MUTED, first_seen};
use crate::{Error, Figure, Policy};

/// Throughput of one policy.
#[derive(Clone, Debug)]
pub struct PolicyThroughput {
    /// Batching and exit policy.
    pub policy: Policy,
    /// Measured tokens/s, where there was a run.
    pub measured: Option<f64>,
    /// Simulated tokens/s, where there was a simulation.
    pub simulated: Option<f64>,
}

/// In policies: a bar, the space between its neighbours, the space between batching policies.
const BAR_WIDTH: f64 = 0.4;
const BAR_GAP: f64 = 0.04;
const GROUP_GAP: f64 = 0.5;
const UNITS_PER_POLICY: u32 = 190;
const EXIT_SIZE: u32 = 27;
const EXIT_LINE: i32 = 32;
const BATCHING_SIZE: u32 = 30;
const BATCHING_LINE: i32 = 62;

/// Draws throughput, and below it throughput over that of `baseline` from the same source.
///
/// # Errors
/// No policies, a throughput that is not positive, or a source without a baseline.
pub fn speedup(figure: &Figure, runs: &[PolicyThroughput], baseline: &Policy) -> Result<(), Error> {
    figure.require("policies", runs)?;
    for run in runs {
        let values = run.measured.into_iter().chain(run.simulated);
        let what = format!("throughput of `{}`", run.policy.label());
        figure.check(&what, Kind::Positive, values)?;
    }
    let mut sources = Vec::new();
    for source in Source::ALL {
        if runs.iter().any(|run| source.of(run).is_some()) {
            sources.push((source, baseline_of(figure, runs, baseline, source)?));
        }
    }
    let mut legend: Vec<Entry> =
        sources.iter().map(|(source, _)| Entry::new(source.name(), Sample::Fill(MUTED, source.fill()))).collect();
    legend.push(Entry::new(format!("1 × = {}", baseline.label()), Sample::Stroke(MUTED, Dash::Dashed)));
    let chart = Chart { runs, places: places(runs), sources };
    let width = WIDTH.max(300 + (chart.end() * f64::from(UNITS_PER_POLICY)) as u32);
    canvas::draw(figure, (width, 1240), &legend, |area| chart.draw(area))
}

#[derive(Clone, Copy, PartialEq)]
enum Source {
    Measured,
    Simulated,
}

impl Source {
    const ALL: [Self; 2] = [Self::Measured, Self::Simulated];

    fn of(self, run: &PolicyThroughput) -> Option<f64> {
        match self {
            Self::Measured => run.measured,
            Self::Simulated => run.simulated,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Measured => "measured",
            Self::Simulated => "simulated",
        }
    }

    fn fill(self) -> Fill {
        match self {
            Self::Measured => Fill::Solid,
            Self::Simulated => Fill::Hatched,
        }
    }
}

fn baseline_of(figure: &Figure, runs: &[PolicyThroughput], baseline: &Policy, source: Source) -> Result<f64, Error> {
    let run = runs.iter().find(|run| run.policy == *baseline);
    run.and_then(|run| source.of(run)).ok_or_else(|| Error::Baseline {
        figure: figure.name.clone(),
        baseline: baseline.label(),
        origin: source.name(),
    })
}

/// Where a policy's bars stand, in policies from the left.
struct Place {
    run: usize,
    group: usize,
    centre: f64,
}

/// A place per policy, those of one batching policy beside each other.
fn places(runs: &[PolicyThroughput]) -> Vec<Place> {
    let mut batchings = Vec::new();
    let groups: Vec<usize> = runs.iter().map(|run| first_seen(&mut batchings, &run.policy.batching)).collect();
    let mut order: Vec<usize> = (0..runs.len()).collect();
    order.sort_by_key(|&run| groups[run]);
    let place = |(index, run): (usize, usize)| Place {
        run,
        group: groups[run],
        centre: index as f64 + 0.5 + groups[run] as f64 * GROUP_GAP,
    };
    order.into_iter().enumerate().map(place).collect()
}

struct Chart<'d> {
    runs: &'d [PolicyThroughput],
    places: Vec<Place>,
    /// Each source with its baseline's throughput.
    sources: Vec<(Source, f64)>,
}

impl Chart<'_> {
    fn end(&self) -> f64 {
        self.places.last().map_or(1.0, |place| place.centre + 0.5)
    }

    fn draw(&self, area: &Canvas) -> DrawResult {
        let exits = self.exit_lines(area)?;
        let most_lines = exits.iter().map(Vec::len).max().unwrap_or(0) as i32;
        let x = Axis::with_linear_ticks("", -0.25, self.end() + 0.25).without_ticks();
        let speeds = self.heights(|speed, _| speed);
        let speedups = self.heights(|speed, base| speed / base);
        let ys = [Axis::from_zero("throughput (tokens/s)", speeds), Axis::from_zero("speed-up (×)", speedups)];
        let panels = Panel::stack(area, &x, &ys, most_lines * EXIT_LINE + BATCHING_LINE)?;
        self.draw_bars(&panels[0], |speed, _| (speed, three_digits(speed)))?;
        draw_unity(&panels[1])?;
        self.draw_bars(&panels[1], |speed, base| (speed / base, number(speed / base, 2)))?;
        self.label_exits(&panels[1], &exits)?;
        self.label_batchings(&panels[1], most_lines)
    }

    /// What the bars of all sources reach, with room for the number on top.
    fn heights(&self, height: fn(f64, f64) -> f64) -> Vec<f64> {
        let of = |&(source, base): &(Source, f64)| {
            let speeds = self.runs.iter().filter_map(move |run| source.of(run));
            speeds.map(move |speed| 1.06 * height(speed, base))
        };
        self.sources.iter().flat_map(of).collect()
    }

    fn draw_bars(&self, panel: &Panel, height: impl Fn(f64, f64) -> (f64, String)) -> DrawResult {
        let looks = Look::policies(self.runs.iter().map(|run| &run.policy));
        for place in &self.places {
            let of_run = |&(source, base): &(Source, f64)| Some((source, base, source.of(&self.runs[place.run])?));
            let bars: Vec<_> = self.sources.iter().filter_map(of_run).collect();
            let mut from = place.centre - BAR_WIDTH * bars.len() as f64 / 2.0;
            for (source, base, speed) in bars {
                let (value, label) = height(speed, base);
                let across = (from + BAR_GAP / 2.0, from + BAR_WIDTH - BAR_GAP / 2.0);
                panel.bar(across, value, (looks[place.run].colour, source.fill()), &label)?;
                from += BAR_WIDTH;
            }
        }
        Ok(())
    }

    /// The exit policies' labels, each broken into lines as wide as a place.
    fn exit_lines(&self, area: &Canvas) -> DrawResult<Vec<Vec<String>>> {
        let style = style::text(EXIT_SIZE, INK);
        let exit = |place: &Place| &self.runs[place.run].policy.exit;
        self.places.iter().map(|place| wrap(area, exit(place), &style, UNITS_PER_POLICY as i32 - 10)).collect()
    }

    fn label_exits(&self, panel: &Panel, exits: &[Vec<String>]) -> DrawResult {
        let [_, _, _, bottom] = panel.plot;
        let style = style::text(EXIT_SIZE, INK).pos(style::BELOW);
        for (place, lines) in self.places.iter().zip(exits) {
            for (row, line) in lines.iter().enumerate() {
                let y = bottom + 12 + row as i32 * EXIT_LINE;
                panel.canvas.draw_text(line, &style, (panel.at_x(place.centre), y))?;
            }
        }
        Ok(())
    }

    fn label_batchings(&self, panel: &Panel, exit_lines: i32) -> DrawResult {
        let [_, _, _, bottom] = panel.plot;
        let style = style::bold_text(BATCHING_SIZE, INK).pos(style::BELOW);
        for group in self.places.chunk_by(|a, b| a.group == b.group) {
            let centre = (group[0].centre + group[group.len() - 1].centre) / 2.0;
            let at = (panel.at_x(centre), bottom + 22 + exit_lines * EXIT_LINE);
            panel.canvas.draw_text(&self.runs[group[0].run].policy.batching, &style, at)?;
        }
        Ok(())
    }
}

/// The line that a bar must pass to be faster than the baseline.
fn draw_unity(panel: &Panel) -> DrawResult {
    let [left, _, right, _] = panel.plot;
    let y = panel.at_y(1.0);
    style::stroke(&panel.canvas, &[(left, y), (right, y)], MUTED.stroke_width(3), Dash::Dashed)
}
