//! Depths of the rows of passes over time, and of the tokens of an exit trace.

use crate::axis::{Axis, extent, three_digits};
use crate::canvas::{self, Canvas, DrawResult, WIDTH};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::{self, Fill, named_classes, ordered_colour};
use crate::{Error, Figure};

/// One pass and its rows, or several consecutive passes and their mean.
#[derive(Clone, Debug)]
pub struct PassRows {
    /// Start of the pass, in seconds.
    pub start_s: f64,
    /// End of the pass, in seconds.
    pub end_s: f64,
    /// Rows at each depth, from depth 0: integers for a single pass, means for several.
    pub rows: Vec<f64>,
}

/// Exit depths of the tokens of one exit trace.
#[derive(Clone, Debug)]
pub struct ExitDepths {
    /// Name of the trace.
    pub name: String,
    /// Share of tokens that exit at each depth under the oracle, 0 to 1.
    pub exiting: Vec<f64>,
    /// Share of tokens whose prediction at each depth equals that of the last depth, 0 to 1.
    pub agreement: Vec<f64>,
}

const TIME_BINS: usize = 320;

/// Draws the rows of the running pass at each depth over time, averaged over short intervals.
///
/// # Errors
/// No passes, times that are not finite or not in order, or passes without rows.
pub fn rows_by_depth(figure: &Figure, passes: &[PassRows]) -> Result<(), Error> {
    figure.require("passes", passes)?;
    figure.check("pass start (s)", Kind::Finite, passes.iter().map(|p| p.start_s))?;
    figure.check("pass end (s)", Kind::Finite, passes.iter().map(|p| p.end_s))?;
    figure.check("rows", Kind::NonNegative, passes.iter().flat_map(|p| p.rows.iter().copied()))?;
    let durations = passes.iter().map(|p| p.end_s - p.start_s);
    figure.check("pass duration (s)", Kind::Positive, durations)?;
    let depths = passes.iter().map(|p| p.rows.len()).max().unwrap_or(0);
    figure.require("depths", &vec![(); depths])?;
    let binned = Binned::new(passes, depths);
    let totals = binned.rows.iter().map(|bin| bin.iter().sum());
    let x = Axis::with_linear_ticks("time (s)", binned.start, binned.end);
    let span = three_digits(binned.width() * 1e3);
    let y = Axis::from_zero(&format!("rows in the pass (mean over {span} ms)"), totals);
    let entry = |depth| {
        let sample = Sample::Fill(ordered_colour(depth, depths), Fill::Solid);
        Entry::new(format!("depth {depth}"), sample)
    };
    let legend: Vec<Entry> = named_classes(depths).map(entry).collect();
    canvas::draw(figure, (WIDTH, 900), &legend, |area| {
        let panel = Panel::new(area, &x, &y)?;
        (0..depths).try_for_each(|depth| binned.draw_layer(&panel, depth, depths))
    })
}

/// Rows by depth, averaged over equal intervals; an idle machine counts as no rows.
struct Binned {
    start: f64,
    end: f64,
    rows: Vec<Vec<f64>>,
}

impl Binned {
    fn new(passes: &[PassRows], depths: usize) -> Self {
        let (start, _) = extent(passes.iter().map(|p| p.start_s));
        let (_, end) = extent(passes.iter().map(|p| p.end_s));
        let rows = vec![vec![0.0; depths]; TIME_BINS];
        let mut binned = Self { start, end, rows };
        passes.iter().for_each(|pass| binned.add(pass));
        binned
    }

    fn width(&self) -> f64 {
        (self.end - self.start) / self.rows.len() as f64
    }

    fn edge(&self, bin: usize) -> f64 {
        self.start + bin as f64 * self.width()
    }

    fn add(&mut self, pass: &PassRows) {
        let bin_of = |time: f64| ((time - self.start) / self.width()) as usize;
        let last = bin_of(pass.end_s).min(self.rows.len() - 1);
        for bin in bin_of(pass.start_s).min(last)..=last {
            let overlap = pass.end_s.min(self.edge(bin + 1)) - pass.start_s.max(self.edge(bin));
            let weight = overlap.max(0.0) / self.width();
            for (sum, &rows) in self.rows[bin].iter_mut().zip(&pass.rows) {
                *sum += weight * rows;
            }
        }
    }

    /// The area between the rows shallower than `depth` and those up to it, over time.
    fn draw_layer(&self, panel: &Panel, depth: usize, depths: usize) -> DrawResult {
        let below = self.outline(depth);
        let above = self.outline(depth + 1);
        let corners: Vec<_> = below.into_iter().chain(above.into_iter().rev()).collect();
        panel.area(&corners, ordered_colour(depth, depths))
    }

    /// Upper outline of the rows shallower than `depth`.
    fn outline(&self, depth: usize) -> Vec<(f64, f64)> {
        let corners = |bin: usize| {
            let rows = self.rows[bin][..depth].iter().sum();
            [(self.edge(bin), rows), (self.edge(bin + 1), rows)]
        };
        (0..self.rows.len()).flat_map(corners).collect()
    }
}

/// Draws, by depth, the share of tokens that exit under the oracle, and the agreement of all tokens.
///
/// # Errors
/// No traces, traces with different numbers of depths, or values that are not shares.
pub fn exit_depths(figure: &Figure, traces: &[ExitDepths]) -> Result<(), Error> {
    figure.require("exit traces", traces)?;
    for trace in traces {
        let (name, depths) = (&trace.name, trace.exiting.len());
        let exiting = trace.exiting.iter().copied();
        figure.check(&format!("share exiting of `{name}`"), Kind::Share, exiting)?;
        let what = format!("agreement of `{name}`");
        figure.require_length(&what, &trace.agreement, depths)?;
        figure.check(&what, Kind::Share, trace.agreement.iter().copied())?;
    }
    let deepest = traces.iter().map(|t| t.exiting.len()).max().unwrap_or(1) - 1;
    let x = Axis::steps("depth", 0, deepest);
    let legend: Vec<Entry> = traces.iter().enumerate().map(trace_entry).collect();
    canvas::draw(figure, (WIDTH, 900), &legend, |area| {
        let (left, right) = area.split_horizontally(WIDTH / 2);
        let exiting = "tokens exiting under the oracle (%)";
        draw_shares(&left, exiting, &x, traces, |trace| &trace.exiting)?;
        let agreeing = "tokens equal to the last depth's (%)";
        draw_shares(&right, agreeing, &x, traces, |trace| &trace.agreement)
    })
}

fn trace_entry((index, trace): (usize, &ExitDepths)) -> Entry {
    let sample = Sample::Fill(style::colour(index), Fill::series(index));
    Entry::new(&trace.name, sample)
}

/// Bars of one share by depth, with the traces side by side.
fn draw_shares(
    area: &Canvas,
    label: &str,
    x: &Axis,
    traces: &[ExitDepths],
    shares: fn(&ExitDepths) -> &[f64],
) -> DrawResult {
    let y = Axis::from_zero(label, traces.iter().flat_map(shares).map(|s| 104.0 * s));
    let panel = Panel::new(area, x, &y)?;
    let width = 0.8 / traces.len() as f64;
    for (index, trace) in traces.iter().enumerate() {
        for (depth, share) in shares(trace).iter().enumerate() {
            let from = depth as f64 - 0.4 + width * index as f64;
            let across = (from + 0.02 * width, from + 0.98 * width);
            let look = (style::colour(index), Fill::series(index));
            let value = 100.0 * share;
            panel.bar(across, (value, value), look, &three_digits(value))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averaging_over_time_keeps_every_row_and_its_duration() {
        let pass = |start_s, end_s, rows: &[f64]| PassRows { start_s, end_s, rows: rows.to_vec() };
        let passes = [pass(1.0, 1.37, &[4.0, 2.0]), pass(1.37, 1.371, &[9.0]), pass(3.0, 5.0, &[1.0, 7.0])];
        let binned = Binned::new(&passes, 2);
        for depth in 0..2 {
            let binned_sum: f64 = binned.rows.iter().map(|bin| bin[depth] * binned.width()).sum();
            let row_seconds = |p: &PassRows| p.rows.get(depth).map_or(0.0, |&r| r * (p.end_s - p.start_s));
            let sum: f64 = passes.iter().map(row_seconds).sum();
            assert!((binned_sum - sum).abs() < 1e-9, "{binned_sum} against {sum}");
        }
    }
}
