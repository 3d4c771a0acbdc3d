//! Time of a token by component.

use crate::axis::{Axis, number, three_digits};
use crate::canvas::{self, Canvas, DrawResult};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::{self, Fill, INK, ordered_colour};
use crate::{Error, Figure};

/// Time of a generated token in one run.
#[derive(Clone, Debug)]
pub struct TokenTime {
    /// Name of the run.
    pub label: String,
    /// Time of each component in microseconds; all runs have the components in one order.
    pub parts_us: Vec<f64>,
    /// Speed-up over the baseline.
    pub speedup: f64,
}

impl TokenTime {
    fn total_us(&self) -> f64 {
        self.parts_us.iter().sum()
    }
}

/// Width of a bar, in runs.
const BAR_WIDTH: f64 = 0.72;
const UNITS_PER_BAR: u32 = 52;
const TOTAL_SIZE: u32 = 25;
/// Room to the right of the longest bar, as a share of its length.
const TOTAL_ROOM: f64 = 0.2;

/// Draws a bar for each run, with its components side by side, its total and its speed-up.
///
/// # Errors
/// No runs, runs with different components, negative times, or a speed-up that is not positive.
pub fn token_times(figure: &Figure, parts: &[&str], runs: &[TokenTime]) -> Result<(), Error> {
    figure.require("runs", runs)?;
    for run in runs {
        let what = format!("time of `{}` (us)", run.label);
        figure.require_length(&what, &run.parts_us, parts.len())?;
        figure.check(&what, Kind::NonNegative, run.parts_us.iter().copied())?;
        figure.check(&format!("speed-up of `{}`", run.label), Kind::Positive, [run.speedup])?;
    }
    let sample = |part| Sample::Fill(ordered_colour(part, parts.len()), fill(part));
    let legend: Vec<Entry> = parts.iter().enumerate().map(|(part, name)| Entry::new(*name, sample(part))).collect();
    let height = 180 + runs.len() as u32 * UNITS_PER_BAR;
    canvas::draw(figure, (canvas::WIDTH, height), &legend, |area| draw_bars(area, runs))
}

fn fill(part: usize) -> Fill {
    if part.is_multiple_of(2) { Fill::Solid } else { Fill::Hatched }
}

fn draw_bars(area: &Canvas, runs: &[TokenTime]) -> DrawResult {
    let ends = runs.iter().map(|run| (1.0 + TOTAL_ROOM) * run.total_us());
    let x = Axis::from_zero("time of a generated token (us)", ends);
    let y = Axis::names(runs.iter().map(|run| run.label.as_str()));
    let panel = Panel::new(area, &x, &y)?;
    let style = style::text(TOTAL_SIZE, INK).pos(style::BESIDE);
    for (place, run) in runs.iter().enumerate() {
        let middle = Axis::name_at(place);
        let mut from = 0.0;
        for (part, time) in run.parts_us.iter().enumerate() {
            let corners = [(from, middle + BAR_WIDTH / 2.0), (from + time, middle - BAR_WIDTH / 2.0)];
            let corners = corners.map(|corner| panel.at(&corner));
            if corners[0].0 < corners[1].0 {
                style::bar(&panel.canvas, corners, ordered_colour(part, run.parts_us.len()), fill(part))?;
            }
            from += time;
        }
        let total = format!("{} ({}×)", three_digits(from), number(run.speedup, 2));
        panel.canvas.draw_text(&total, &style, (panel.at_x(from) + 12, panel.at_y(middle)))?;
    }
    Ok(())
}
