//! Throughput and speed-up of every policy, measured next to simulated.

use plotters::prelude::*;

use crate::axis::{Axis, number, three_digits};
use crate::bars::{Bar, Policies};
use crate::canvas::{self, Canvas, DrawResult};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::{self, Dash, Fill, MUTED};
use crate::{Error, Figure, Policy};

/// Throughput of one policy.
#[derive(Clone, Debug)]
pub struct PolicyThroughput {
    /// Batching and exit policy.
    pub policy: Policy,
    /// Measured throughput in tokens/s, if there was a run.
    pub measured: Option<f64>,
    /// Simulated throughput in tokens/s, if there was a simulation.
    pub simulated: Option<f64>,
}

/// Draws throughput and, below it, the speed-up over `baseline` of the same source.
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
    let policies = Policies::new(runs.iter().map(|run| &run.policy).collect(), Source::ALL.len());
    let width = policies.width();
    let chart = Chart { runs, policies, sources };
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

struct Chart<'d> {
    runs: &'d [PolicyThroughput],
    policies: Policies<'d>,
    /// Each source with its baseline's throughput.
    sources: Vec<(Source, f64)>,
}

impl Chart<'_> {
    fn draw(&self, area: &Canvas) -> DrawResult {
        let speeds = self.heights(|speed, _| speed);
        let speedups = self.heights(|speed, base| speed / base);
        let ys = [Axis::from_zero("throughput (tokens/s)", speeds), Axis::from_zero("speed-up (×)", speedups)];
        let panels = self.policies.panels(area, &ys)?;
        self.policies.draw(&panels[0], |run| self.bars(run, |speed, _| (speed, three_digits(speed))))?;
        draw_unity(&panels[1])?;
        self.policies.draw(&panels[1], |run| self.bars(run, |speed, base| (speed / base, number(speed / base, 2))))
    }

    /// Heights of the bars of all sources, with room for the number on top.
    fn heights(&self, height: fn(f64, f64) -> f64) -> Vec<f64> {
        let of = |&(source, base): &(Source, f64)| {
            let speeds = self.runs.iter().filter_map(move |run| source.of(run));
            speeds.map(move |speed| 1.06 * height(speed, base))
        };
        self.sources.iter().flat_map(of).collect()
    }

    fn bars(&self, run: usize, height: fn(f64, f64) -> (f64, String)) -> Vec<Bar> {
        let bar = |&(source, base): &(Source, f64)| {
            let (value, label) = height(source.of(&self.runs[run])?, base);
            Some(Bar { value, half_width: 0.0, fill: source.fill(), label })
        };
        self.sources.iter().filter_map(bar).collect()
    }
}

/// The line of speed-up 1, the baseline.
fn draw_unity(panel: &Panel) -> DrawResult {
    let [left, _, right, _] = panel.plot;
    let y = panel.at_y(1.0);
    style::stroke(&panel.canvas, &[(left, y), (right, y)], MUTED.stroke_width(3), Dash::Dashed)
}
