//! Where the time of a token goes, part by part.

use plotters::prelude::*;

use crate::axis::{Axis, number, three_digits};
use crate::canvas::{self, Canvas, DrawResult, WIDTH, wrap};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::{self, Fill, INK, ordered_colour};
use crate::{Error, Figure};

/// What a generated token takes in one run.
#[derive(Clone, Debug)]
pub struct TokenTime {
    /// What was run.
    pub label: String,
    /// Time of each part, us; the parts of all runs come in the same order.
    pub parts_us: Vec<f64>,
}

const BAR_WIDTH: f64 = 0.62;
const UNITS_PER_BAR: u32 = 190;
const LABEL_SIZE: u32 = 25;
const LABEL_LINE: i32 = 29;
const TOTAL_SIZE: u32 = 25;

/// Draws a bar for each run, of its parts on top of each other, with its total and how many times as fast as the first
/// run it is.
///
/// # Errors
/// No runs, runs with other parts, or times that are negative.
pub fn token_times(figure: &Figure, parts: &[&str], runs: &[TokenTime]) -> Result<(), Error> {
    figure.require("runs", runs)?;
    for run in runs {
        let what = format!("time of `{}` (us)", run.label);
        figure.require_length(&what, &run.parts_us, parts.len())?;
        figure.check(&what, Kind::NonNegative, run.parts_us.iter().copied())?;
    }
    let fill = |index| Sample::Fill(ordered_colour(index, parts.len()), Fill::series(index));
    let legend: Vec<Entry> = parts.iter().enumerate().map(|(index, part)| Entry::new(*part, fill(index))).collect();
    let width = WIDTH.max(260 + runs.len() as u32 * UNITS_PER_BAR);
    canvas::draw(figure, (width, 1000), &legend, |area| draw_bars(area, runs))
}

fn draw_bars(area: &Canvas, runs: &[TokenTime]) -> DrawResult {
    let total = |run: &TokenTime| run.parts_us.iter().sum::<f64>();
    let style = style::text(LABEL_SIZE, INK);
    let labels: Vec<Vec<String>> =
        runs.iter().map(|run| wrap(area, &run.label, &style, UNITS_PER_BAR as i32 - 12)).collect::<DrawResult<_>>()?;
    let most_lines = labels.iter().map(Vec::len).max().unwrap_or(0) as i32;
    let x = Axis::with_linear_ticks("", 0.0, runs.len() as f64).without_ticks();
    let y = Axis::from_zero("time of a generated token (us)", runs.iter().map(|run| 1.1 * total(run)));
    let panels = Panel::stack(area, &x, &[y], 14 + most_lines * LABEL_LINE)?;
    let panel = &panels[0];
    for (place, (run, lines)) in runs.iter().zip(&labels).enumerate() {
        let centre = place as f64 + 0.5;
        let (from, to) = (centre - BAR_WIDTH / 2.0, centre + BAR_WIDTH / 2.0);
        let mut foot = 0.0;
        for (index, part) in run.parts_us.iter().enumerate() {
            let corners = [panel.at(&(from, foot + part)), panel.at(&(to, foot))];
            style::bar(&panel.canvas, corners, ordered_colour(index, run.parts_us.len()), Fill::series(index))?;
            foot += part;
        }
        let [_, _, _, bottom] = panel.plot;
        for (row, line) in lines.iter().enumerate() {
            let at = (panel.at_x(centre), bottom + 12 + row as i32 * LABEL_LINE);
            panel.canvas.draw_text(line, &style.pos(style::BELOW), at)?;
        }
        let faster = format!("{} ({}×)", three_digits(foot), number(total(&runs[0]) / foot, 2));
        let above = style::bold_text(TOTAL_SIZE, INK).pos(style::ABOVE);
        panel.canvas.draw_text(&faster, &above, (panel.at_x(centre), panel.at_y(foot) - 8))?;
    }
    Ok(())
}
