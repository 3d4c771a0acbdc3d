//! Legends: a strip of entries above the data.

use plotters::prelude::*;

use crate::canvas::{Canvas, DrawResult, text_width};
use crate::style::{self, Dash, Fill, INK, Look};

const TEXT_SIZE: u32 = 30;
const GAP: i32 = 14;
const SPACING: i32 = 44;
const ROW_HEIGHT: i32 = 42;

/// What a legend entry shows beside its label.
pub(crate) enum Sample {
    MarkedLine(Look),
    Marker(Look),
    Fill(RGBColor, Fill),
    Stroke(RGBColor, Dash),
    Ring,
}

impl Sample {
    /// Width of the sample in units: for lines, enough to show their dashes.
    fn width(&self) -> i32 {
        match self {
            Self::MarkedLine(_) | Self::Stroke(..) => 107,
            Self::Fill(..) => 60,
            Self::Marker(_) => 30,
            Self::Ring => 40,
        }
    }
}

/// A label and its sample.
pub(crate) struct Entry {
    label: String,
    sample: Sample,
}

impl Entry {
    pub(crate) fn new(label: impl Into<String>, sample: Sample) -> Self {
        Self { label: label.into(), sample }
    }
}

/// Draws entries in rows of at most `room` units and returns the y coordinate below them.
pub(crate) fn draw(canvas: &Canvas, entries: &[Entry], (left, top): (i32, i32), room: i32) -> DrawResult<i32> {
    let style = style::text(TEXT_SIZE, INK).pos(style::BESIDE);
    let mut widths = Vec::with_capacity(entries.len());
    for entry in entries {
        widths.push(entry.sample.width() + GAP + text_width(canvas, &entry.label, &style)?);
    }
    let columns = columns_that_fit(&widths, room);
    let column_width = widths.iter().max().unwrap_or(&0) + SPACING;
    let one_row = columns >= entries.len();
    let mut x = left;
    for (index, (entry, width)) in entries.iter().zip(&widths).enumerate() {
        let row = (index / columns) as i32;
        if !one_row {
            x = left + (index % columns) as i32 * column_width;
        }
        let middle = top + row * ROW_HEIGHT + ROW_HEIGHT / 2;
        draw_sample(canvas, &entry.sample, (x, middle))?;
        canvas.draw_text(&entry.label, &style, (x + entry.sample.width() + GAP, middle + 2))?;
        x += width + SPACING;
    }
    Ok(top + entries.len().div_ceil(columns) as i32 * ROW_HEIGHT)
}

/// All entries if they fit in one row, otherwise the largest number of equal columns that fit.
fn columns_that_fit(widths: &[i32], room: i32) -> usize {
    let total: i32 = widths.iter().map(|w| w + SPACING).sum();
    if total - SPACING <= room {
        return widths.len();
    }
    let widest = widths.iter().max().unwrap_or(&0) + SPACING;
    let columns = ((room + SPACING) / widest).max(1) as usize;
    // That number of rows, filled evenly.
    widths.len().div_ceil(widths.len().div_ceil(columns))
}

fn draw_sample(canvas: &Canvas, sample: &Sample, (x, y): (i32, i32)) -> DrawResult {
    let end = x + sample.width();
    let ends = [(x, y), (end, y)];
    let middle = ((x + end) / 2, y);
    match *sample {
        Sample::MarkedLine(look) => {
            style::line(canvas, &ends, look)?;
            style::marker(canvas, middle, look)
        }
        Sample::Marker(look) => style::marker(canvas, middle, look),
        Sample::Fill(colour, fill) => {
            let corners = [(x, y - 13), (end, y + 13)];
            style::bar(canvas, corners, colour, fill)
        }
        Sample::Ring => style::ring(canvas, middle),
        Sample::Stroke(colour, dash) => style::stroke(canvas, &ends, colour.stroke_width(3), dash),
    }
}
