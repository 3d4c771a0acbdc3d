//! A quantity by two settings, as a table of colours.

use plotters::prelude::*;

use crate::axis::{Axis, number};
use crate::canvas::{self, Canvas, DrawResult, WIDTH};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::{self, Fill, INK};
use crate::{Error, Figure};

/// A table of values above 0, of which 1 is neither good nor bad, such as speed-ups.
#[derive(Clone, Debug)]
pub struct HeatMap {
    /// Name and values of the setting that varies from left to right.
    pub columns: (String, Vec<String>),
    /// Name and values of the setting that varies from the top down.
    pub rows: (String, Vec<String>),
    /// The values by row, then by column; `None` is left blank.
    pub cells: Vec<Vec<Option<f64>>>,
    /// Cells of at least this value get a frame.
    pub pays: f64,
}

const ROW_UNITS: u32 = 104;
const CELL_TEXT: u32 = 29;
/// Width of the frame of a cell that pays.
const FRAME: u32 = 5;
/// Values at which the colour is deepest, below and above 1.
const DEEPEST: (f64, f64) = (0.7, 2.0);
/// Colours of the deepest cells below and above 1: vermilion and blue, which colour-blind readers tell apart.
const BELOW: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
const ABOVE: RGBColor = RGBColor(0x00, 0x72, 0xb2);

/// Draws the table: the number in each cell on a colour that deepens away from 1, and a frame where it pays.
///
/// # Errors
/// No rows or columns, a row of another length, or a value that is not positive.
pub fn heat_map(figure: &Figure, map: &HeatMap) -> Result<(), Error> {
    figure.require("columns", &map.columns.1)?;
    figure.require("rows", &map.rows.1)?;
    figure.require_length("rows", &map.cells, map.rows.1.len())?;
    for (name, row) in map.rows.1.iter().zip(&map.cells) {
        figure.require_length(&format!("cells of `{name}`"), row, map.columns.1.len())?;
    }
    figure.check("cells", Kind::Positive, map.cells.iter().flatten().flatten().copied())?;
    let legend = [
        Entry::new("below 1", Sample::Fill(shade(DEEPEST.0), Fill::Solid)),
        Entry::new("above 1", Sample::Fill(shade(DEEPEST.1), Fill::Solid)),
        Entry::new(format!("framed: at least {}", number(map.pays, 2)), Sample::Fill(INK, Fill::Solid)),
    ];
    let height = 200 + map.rows.1.len() as u32 * ROW_UNITS;
    canvas::draw(figure, (WIDTH, height), &legend, |area| draw_cells(area, map))
}

fn draw_cells(area: &Canvas, map: &HeatMap) -> DrawResult {
    let x = Axis::columns(&map.columns.0, map.columns.1.iter().map(String::as_str));
    let y = Axis::names(map.rows.1.iter().map(String::as_str)).labelled(&map.rows.0);
    let panel = Panel::new(area, &x, &y)?;
    for (row, cells) in map.cells.iter().enumerate() {
        for (column, value) in cells.iter().enumerate() {
            let Some(value) = *value else { continue };
            let (across, down) = (column as f64, Axis::name_at(row));
            let corners = [(across - 0.5, down + 0.5), (across + 0.5, down - 0.5)].map(|corner| panel.at(&corner));
            let inside = [(corners[0].0 + 2, corners[0].1 + 2), (corners[1].0 - 2, corners[1].1 - 2)];
            let colour = shade(value);
            panel.canvas.draw(&Rectangle::new(inside, colour.filled()))?;
            if value >= map.pays {
                panel.canvas.draw(&Rectangle::new(inside, INK.stroke_width(FRAME)))?;
            }
            let ink = if is_dark(colour) { WHITE } else { INK };
            let text = style::text(CELL_TEXT, ink).pos(style::CENTRE);
            panel.canvas.draw_text(&number(value, 2), &text, panel.at(&(across, down)))?;
        }
    }
    Ok(())
}

/// White at 1, deeper by the logarithm of the value.
fn shade(value: f64) -> RGBColor {
    let (deep, share) = match value < 1.0 {
        true => (BELOW, value.ln() / DEEPEST.0.ln()),
        false => (ABOVE, value.ln() / DEEPEST.1.ln()),
    };
    let share = share.clamp(0.0, 1.0);
    let mix = |of: u8| (255.0 + share * (f64::from(of) - 255.0)).round() as u8;
    RGBColor(mix(deep.0), mix(deep.1), mix(deep.2))
}

/// Whether white text reads better on a colour than dark text.
fn is_dark(RGBColor(red, green, blue): RGBColor) -> bool {
    0.299 * f64::from(red) + 0.587 * f64::from(green) + 0.114 * f64::from(blue) < 150.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_deepen_away_from_one_and_carry_readable_text() {
        assert_eq!(shade(1.0), WHITE);
        assert_eq!((shade(0.1), shade(9.0)), (BELOW, ABOVE));
        let brightness = |value| {
            let RGBColor(red, green, blue) = shade(value);
            u32::from(red) + u32::from(green) + u32::from(blue)
        };
        for pair in [1.0, 1.1, 1.3, 1.6, 2.0].windows(2) {
            assert!(brightness(pair[0]) > brightness(pair[1]), "{pair:?}");
            assert!(brightness(1.0 / pair[0]) > brightness(1.0 / pair[1]) || 1.0 / pair[0] < DEEPEST.0, "{pair:?}");
        }
        assert!(is_dark(shade(2.0)) && !is_dark(shade(1.1)));
    }
}
