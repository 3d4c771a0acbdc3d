//! A panel: a pair of axes and what is drawn between them.

use plotters::coord::ranged1d::Ranged;
use plotters::prelude::*;

use crate::axis::{Axis, TICK_SIZE};
use crate::canvas::{Canvas, DrawResult, text_width};
use crate::style::{self, Dash, Fill, GRID, INK, Look, MUTED};

const LABEL_SIZE: u32 = 32;
const BAR_LABEL_SIZE: u32 = 25;
const BAR_LABEL_OVERHANG: i32 = 8;
/// Half the width of the ends of a confidence interval.
const WHISKER_CAP: i32 = 7;
const MOST_MARKERS: usize = 24;
const RIGHT_MARGIN: i32 = 60;
const LEFT_MARGIN: i32 = 24;
const BOTTOM_MARGIN: i32 = 18;
const PANEL_GAP: i32 = 26;
/// Units below the axis for tick labels and the label.
const X_LABELS: i32 = 92;
const X_TICKS_ONLY: i32 = 20;
const TITLE_ROOM: i32 = 100;

/// A drawn pair of axes that maps values to units of its canvas.
pub(crate) struct Panel<'a> {
    pub(crate) canvas: Canvas<'a>,
    x: Axis,
    y: Axis,
    /// Left, top, right and bottom of the area between the axes.
    pub(crate) plot: [i32; 4],
}

impl<'a> Panel<'a> {
    /// A panel that fills its canvas.
    pub(crate) fn new(canvas: &Canvas<'a>, x: &Axis, y: &Axis) -> DrawResult<Self> {
        let room = Room { left: y_labels(canvas, y)?, below: X_LABELS, above: PANEL_GAP };
        Self::with_room(canvas, x, y, room)
    }

    /// A panel below a title and a note.
    pub(crate) fn titled(canvas: &Canvas<'a>, [title, note]: [&str; 2], x: &Axis, y: &Axis) -> DrawResult<Self> {
        let left = y_labels(canvas, y)?;
        let style = style::bold_text(LABEL_SIZE, INK);
        canvas.draw_text(title, &style, (LEFT_MARGIN + left, PANEL_GAP / 2))?;
        let below_title = PANEL_GAP / 2 + LABEL_SIZE as i32 + 4;
        let style = style::text(TICK_SIZE, MUTED);
        canvas.draw_text(note, &style, (LEFT_MARGIN + left, below_title))?;
        let room = Room { left, below: X_LABELS, above: TITLE_ROOM };
        Self::with_room(canvas, x, y, room)
    }

    /// Panels above each other with a common x axis, and `below` units for the labels below the last panel.
    pub(crate) fn stack(canvas: &Canvas<'a>, x: &Axis, ys: &[Axis], below: i32) -> DrawResult<Vec<Self>> {
        let mut left = 0;
        for y in ys {
            left = left.max(y_labels(canvas, y)?);
        }
        let (width, height) = canvas.dim_in_pixel();
        let x = x.clone().thinned(canvas, width as i32 - LEFT_MARGIN - left - RIGHT_MARGIN)?;
        let foot = below + BOTTOM_MARGIN;
        let each = (height as i32 - foot + X_TICKS_ONLY) / ys.len() as i32;
        let cuts = (1..ys.len() as i32).map(|i| i * each);
        let parts = canvas.split_by_breakpoints([0; 0], cuts.collect::<Vec<_>>());
        let place = |(index, (y, part)): (usize, (&Axis, &Canvas<'a>))| {
            let last = index + 1 == ys.len();
            let room = Room { left, below: if last { below } else { X_TICKS_ONLY - BOTTOM_MARGIN }, above: PANEL_GAP };
            let x = if last { x.clone() } else { x.unlabelled() };
            Self::with_room(part, &x, y, room)
        };
        ys.iter().zip(&parts).enumerate().map(place).collect()
    }

    /// Like [`Panel::stack`] with ordinary labels below the last panel.
    pub(crate) fn labelled_stack(canvas: &Canvas<'a>, x: &Axis, ys: &[Axis]) -> DrawResult<Vec<Self>> {
        Self::stack(canvas, x, ys, X_LABELS)
    }

    fn with_room(canvas: &Canvas<'a>, x: &Axis, y: &Axis, room: Room) -> DrawResult<Self> {
        let (width, _) = canvas.dim_in_pixel();
        let across = width as i32 - LEFT_MARGIN - room.left - RIGHT_MARGIN;
        let x = x.clone().thinned(canvas, across)?;
        let mut chart = ChartBuilder::on(canvas)
            .margin_top(room.above)
            .margin_right(RIGHT_MARGIN)
            .margin_left(LEFT_MARGIN)
            .margin_bottom(BOTTOM_MARGIN)
            .x_label_area_size(room.below)
            .y_label_area_size(room.left)
            .build_cartesian_2d(x.clone(), y.clone())?;
        let mut mesh = chart.configure_mesh();
        if !x.has_grid {
            mesh.disable_x_mesh();
        }
        if !y.has_grid {
            mesh.disable_y_mesh();
        }
        mesh.bold_line_style(GRID.stroke_width(2))
            .light_line_style(TRANSPARENT)
            .axis_style(INK.stroke_width(2))
            .label_style(style::text(TICK_SIZE, INK))
            .axis_desc_style(style::text(LABEL_SIZE, INK))
            .x_desc(&x.label)
            .y_desc(&y.label)
            .draw()?;
        let (across, down) = chart.plotting_area().get_pixel_range();
        let (left, top) = canvas.get_base_pixel();
        Ok(Self {
            canvas: canvas.clone(),
            x,
            y: y.clone(),
            plot: [across.start - left, down.start - top, across.end - left, down.end - top],
        })
    }

    pub(crate) fn at_x(&self, x: f64) -> i32 {
        let [left, _, right, _] = self.plot;
        self.x.map(&x, (left, right))
    }

    pub(crate) fn at_y(&self, y: f64) -> i32 {
        let [_, top, _, bottom] = self.plot;
        self.y.map(&y, (bottom, top))
    }

    pub(crate) fn at(&self, &(x, y): &(f64, f64)) -> (i32, i32) {
        (self.at_x(x), self.at_y(y))
    }

    pub(crate) fn place(&self, points: &[(f64, f64)]) -> Vec<(i32, i32)> {
        points.iter().map(|point| self.at(point)).collect()
    }

    pub(crate) fn line(&self, points: &[(f64, f64)], look: Look) -> DrawResult {
        style::line(&self.canvas, &self.place(points), look)
    }

    pub(crate) fn markers(&self, points: &[(f64, f64)], look: Look) -> DrawResult {
        let mut at = self.place(points).into_iter();
        at.try_for_each(|at| style::marker(&self.canvas, at, look))
    }

    /// A line through points sorted by x, with markers: one at each point unless there are many.
    pub(crate) fn marked_line(&self, points: &[(f64, f64)], look: Look) -> DrawResult {
        let mut points = points.to_vec();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        self.line(&points, look)?;
        let stride = points.len().div_ceil(MOST_MARKERS).max(1);
        let marked: Vec<_> = points.into_iter().step_by(stride).collect();
        self.markers(&marked, look)
    }

    /// A horizontal line across the panel at a value of y.
    pub(crate) fn level(&self, y: f64, colour: RGBColor, dash: Dash) -> DrawResult {
        let [left, _, right, _] = self.plot;
        let ends = [(left, self.at_y(y)), (right, self.at_y(y))];
        style::stroke(&self.canvas, &ends, colour.stroke_width(3), dash)
    }

    /// A vertical line across the panel at a value of x.
    pub(crate) fn upright(&self, x: f64, colour: RGBColor, dash: Dash) -> DrawResult {
        let [_, top, _, bottom] = self.plot;
        let ends = [(self.at_x(x), top), (self.at_x(x), bottom)];
        style::stroke(&self.canvas, &ends, colour.stroke_width(3), dash)
    }

    /// The confidence interval between two points, with caps; nothing if the points are equal. Ends outside the axes
    /// are cut off.
    pub(crate) fn whisker(&self, ends: [(f64, f64); 2], colour: RGBColor) -> DrawResult {
        let [left, top, right, bottom] = self.plot;
        let [from, to] = ends.map(|end| {
            let (x, y) = self.at(&end);
            (x.clamp(left, right), y.clamp(top, bottom))
        });
        if from == to {
            return Ok(());
        }
        let (across, up) = if from.0 == to.0 { (WHISKER_CAP, 0) } else { (0, WHISKER_CAP) };
        let cap = |(x, y): (i32, i32)| [(x - across, y - up), (x + across, y + up)];
        let mut strokes = [[from, to], cap(from), cap(to)].into_iter();
        strokes.try_for_each(|stroke| style::stroke(&self.canvas, &stroke, colour.stroke_width(2), Dash::Solid))
    }

    /// A bar from the axis up to `value`, with a label above `top` unless the label would overlap its neighbours'.
    pub(crate) fn bar(
        &self,
        (from, to): (f64, f64),
        (value, top): (f64, f64),
        (colour, fill): (RGBColor, Fill),
        label: &str,
    ) -> DrawResult {
        let corners = [self.at(&(from, value)), self.at(&(to, 0.0))];
        style::bar(&self.canvas, corners, colour, fill)?;
        let [(left, _), (right, _)] = corners;
        let style = style::text(BAR_LABEL_SIZE, INK).pos(style::ABOVE);
        let width = text_width(&self.canvas, label, &style)?;
        if width > right - left + BAR_LABEL_OVERHANG {
            return Ok(());
        }
        let (centre, foot) = ((left + right) / 2, self.at_y(top) - 6);
        let ground = [(centre - width / 2, foot - BAR_LABEL_SIZE as i32), (centre + width / 2, foot)];
        self.canvas.draw(&Rectangle::new(ground, WHITE.filled()))?;
        self.canvas.draw_text(label, &style, (centre, foot))
    }

    pub(crate) fn area<C: Color>(&self, corners: &[(f64, f64)], colour: C) -> DrawResult {
        let polygon = Polygon::new(self.place(corners), colour.filled());
        self.canvas.draw(&polygon)
    }
}

/// Units around the area between the axes.
struct Room {
    left: i32,
    below: i32,
    above: i32,
}

fn y_labels(canvas: &Canvas, y: &Axis) -> DrawResult<i32> {
    Ok(y.tick_width(canvas)? + LABEL_SIZE as i32 + 42)
}
