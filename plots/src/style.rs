//! Colours, markers, dashes, hatches and fonts: equal in every figure, and distinct in greyscale.

use std::f64::consts::TAU;
use std::sync::LazyLock;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, RGBColor, ShapeStyle, TextStyle, register_font};

use crate::Policy;
use crate::canvas::{Canvas, DrawResult};

pub(crate) const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
pub(crate) const MUTED: RGBColor = RGBColor(0x59, 0x59, 0x59);
pub(crate) const GRID: RGBColor = RGBColor(0xe2, 0xe2, 0xe2);
pub(crate) const BAND: RGBColor = RGBColor(0xd9, 0xd9, 0xd9);

/// Red, green and blue of the colours of series, in their order: Okabe and Ito's palette without its yellow, which is too
/// pale on white.
pub const PALETTE: [[u8; 3]; 7] = [
    [0x00, 0x72, 0xb2],
    [0xd5, 0x5e, 0x00],
    [0x00, 0x9e, 0x73],
    [0xcc, 0x79, 0xa7],
    [0x33, 0x33, 0x33],
    [0xe6, 0x9f, 0x00],
    [0x56, 0xb4, 0xe9],
];

/// Anchors of text centred above or below its point.
pub(crate) const ABOVE: Pos = Pos { h_pos: HPos::Center, v_pos: VPos::Bottom };
pub(crate) const CENTRE: Pos = Pos { h_pos: HPos::Center, v_pos: VPos::Center };
pub(crate) const BELOW: Pos = Pos { h_pos: HPos::Center, v_pos: VPos::Top };

/// Anchor of text that starts beside its point.
pub(crate) const BESIDE: Pos = Pos { h_pos: HPos::Left, v_pos: VPos::Center };

const LINE_WIDTH: u32 = 4;
const MARKER_RADIUS: f64 = 10.0;
const RING_RADIUS: i32 = 18;
const HATCH_SPACING: i32 = 14;

/// Ordered classes that fit a legend.
const MOST_NAMES: usize = 12;

pub(crate) fn colour(index: usize) -> RGBColor {
    let [r, g, b] = PALETTE[index % PALETTE.len()];
    RGBColor(r, g, b)
}

/// Light to dark over `count` ordered classes, distinguished by lightness only.
pub(crate) fn ordered_colour(index: usize, count: usize) -> RGBColor {
    let share = (index as f32 + 0.5) / count as f32;
    let RGBColor(r, g, b) = ViridisRGB.get_color_normalized(1.0 - share, 0.0, 1.0);
    RGBColor(r, g, b)
}

/// Those of `count` ordered classes that a legend names: all of a few, else evenly spaced ones, between which colours are
/// interpolated.
pub(crate) fn named_classes(count: usize) -> impl Iterator<Item = usize> {
    (0..count).step_by(count.div_ceil(MOST_NAMES).max(1))
}

/// A marker's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marker {
    Circle,
    Square,
    Triangle,
    Diamond,
    Cross,
    Wedge,
    Plus,
    Star,
    Arrow,
}

impl Marker {
    const ALL: [Self; 9] = [
        Self::Circle,
        Self::Square,
        Self::Triangle,
        Self::Diamond,
        Self::Cross,
        Self::Wedge,
        Self::Plus,
        Self::Star,
        Self::Arrow,
    ];

    /// Corners around the origin, of about the area of a circle of radius 1.
    fn corners(self) -> Vec<(f64, f64)> {
        match self {
            Self::Circle => around(36, |_| 1.0),
            Self::Square => vec![(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            Self::Triangle => vec![(0.0, -1.3), (1.2, 0.9), (-1.2, 0.9)],
            Self::Diamond => vec![(0.0, -1.35), (1.2, 0.0), (0.0, 1.35), (-1.2, 0.0)],
            Self::Cross => plus().into_iter().map(|(x, y)| (0.71 * (x - y), 0.71 * (x + y))).collect(),
            Self::Wedge => vec![(0.0, 1.3), (1.2, -0.9), (-1.2, -0.9)],
            Self::Plus => plus(),
            Self::Star => around(10, |i| if i % 2 == 0 { 1.5 } else { 0.65 }),
            Self::Arrow => vec![(-1.3, 0.0), (0.9, -1.2), (0.9, 1.2)],
        }
    }
}

/// `count` corners around the origin, clockwise from the top, each at its own distance.
fn around(count: u32, distance: impl Fn(u32) -> f64) -> Vec<(f64, f64)> {
    let corner = |i: u32| {
        let (sin, cos) = (TAU * f64::from(i) / f64::from(count)).sin_cos();
        (distance(i) * sin, -distance(i) * cos)
    };
    (0..count).map(corner).collect()
}

fn plus() -> Vec<(f64, f64)> {
    let (thin, long) = (0.42, 1.35);
    let quarter = [(thin, -long), (thin, -thin), (long, -thin)];
    let turned = |turn: usize| {
        let rotate = move |(x, y): (f64, f64)| match turn {
            0 => (x, y),
            1 => (-y, x),
            2 => (-x, -y),
            _ => (y, -x),
        };
        quarter.into_iter().map(rotate)
    };
    (0..4).flat_map(turned).collect()
}

/// A line's dash pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dash {
    Solid,
    Dashed,
    Dotted,
}

impl Dash {
    const ALL: [Self; 3] = [Self::Solid, Self::Dashed, Self::Dotted];

    /// A code that is added to a stroke's width, for [`write_dashes`] to find. plotters cuts dashes at integer
    /// coordinates, which bends lines, and does not use SVG's own dashes.
    fn code(self) -> u32 {
        match self {
            Self::Solid => 0,
            Self::Dashed => 1000,
            Self::Dotted => 2000,
        }
    }

    fn pattern(self) -> &'static str {
        match self {
            Self::Solid => "none",
            Self::Dashed => "20 9",
            Self::Dotted => "5 6",
        }
    }
}

/// Replaces the codes of [`stroke`] in an SVG's stroke widths by SVG dashes.
pub(crate) fn write_dashes(mut svg: String) -> String {
    for dash in [Dash::Dashed, Dash::Dotted] {
        for width in 1..=LINE_WIDTH {
            let coded = format!("stroke-width=\"{}\"", width + dash.code());
            let plain = format!("stroke-width=\"{width}\" stroke-dasharray=\"{}\"", dash.pattern());
            svg = svg.replace(&coded, &plain);
        }
    }
    svg
}

/// Style of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    pub(crate) colour: RGBColor,
    pub(crate) marker: Marker,
    pub(crate) dash: Dash,
}

impl Look {
    /// Style of the `index`-th series of a figure without policies.
    pub(crate) fn series(index: usize) -> Self {
        Self::new(index, index, index)
    }

    /// Style of one of `count` ordered classes, such as depths: light to dark.
    pub(crate) fn ordered(index: usize, count: usize) -> Self {
        Self { colour: ordered_colour(index, count), ..Self::series(index) }
    }

    fn new(colour_index: usize, marker: usize, dash: usize) -> Self {
        Self {
            colour: colour(colour_index),
            marker: Marker::ALL[marker % Marker::ALL.len()],
            dash: Dash::ALL[dash % Dash::ALL.len()],
        }
    }

    /// Styles of policies: colour by exit policy, dash by batching policy, and a marker for each series.
    pub(crate) fn policies<'a>(policies: impl IntoIterator<Item = &'a Policy>) -> Vec<Self> {
        let (mut exits, mut batchings) = (Vec::new(), Vec::new());
        policies
            .into_iter()
            .enumerate()
            .map(|(index, policy)| {
                let exit = first_seen(&mut exits, &policy.exit);
                let batching = first_seen(&mut batchings, &policy.batching);
                Self::new(exit, index, batching)
            })
            .collect()
    }
}

/// Index of `item` in `seen`, to which a new item is appended.
pub(crate) fn first_seen<'a>(seen: &mut Vec<&'a str>, item: &'a str) -> usize {
    seen.iter().position(|&s| s == item).unwrap_or_else(|| {
        seen.push(item);
        seen.len() - 1
    })
}

/// How an area is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    Solid,
    Hatched,
    BackHatched,
    CrossHatched,
}

impl Fill {
    pub(crate) fn series(index: usize) -> Self {
        [Self::Solid, Self::Hatched, Self::BackHatched, Self::CrossHatched][index % 4]
    }
}

/// Text of `size` units.
pub(crate) fn text(size: u32, colour: RGBColor) -> TextStyle<'static> {
    text_of(FontStyle::Normal, size, colour)
}

/// Bold text of `size` units.
pub(crate) fn bold_text(size: u32, colour: RGBColor) -> TextStyle<'static> {
    text_of(FontStyle::Bold, size, colour)
}

fn text_of(style: FontStyle, size: u32, colour: RGBColor) -> TextStyle<'static> {
    TextStyle {
        color: colour.to_backend_color(),
        ..TextStyle::from(("sans-serif", f64::from(size), style).into_font())
    }
}

/// Registers the embedded font, with which text is measured. SVG files only name `sans-serif`.
pub(crate) fn register_fonts() -> bool {
    static REGISTERED: LazyLock<bool> = LazyLock::new(|| {
        let regular = register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular());
        let bold = register_font("sans-serif", FontStyle::Bold, dejavu::sans::bold());
        regular.is_ok() && bold.is_ok()
    });
    *REGISTERED
}

pub(crate) fn line(canvas: &Canvas, points: &[(i32, i32)], look: Look) -> DrawResult {
    stroke(canvas, points, look.colour.stroke_width(LINE_WIDTH), look.dash)
}

pub(crate) fn stroke(canvas: &Canvas, points: &[(i32, i32)], style: ShapeStyle, dash: Dash) -> DrawResult {
    let coded = ShapeStyle { stroke_width: style.stroke_width + dash.code(), ..style };
    canvas.draw(&PathElement::new(points.to_vec(), coded))
}

/// A marker with a white rim, so that it stays visible on lines and on other markers.
pub(crate) fn marker(canvas: &Canvas, at: (i32, i32), look: Look) -> DrawResult {
    let layer = |radius: f64, colour: RGBColor| {
        let corners = look.marker.corners().into_iter();
        let offset = |share: f64| (radius * share).round() as i32;
        let place = |(x, y): (f64, f64)| (at.0 + offset(x), at.1 + offset(y));
        canvas.draw(&Polygon::new(corners.map(place).collect::<Vec<_>>(), colour))
    };
    layer(MARKER_RADIUS + 3.0, WHITE)?;
    layer(MARKER_RADIUS, look.colour)
}

/// A ring around a marker, at a distance that keeps both visible.
pub(crate) fn ring(canvas: &Canvas, at: (i32, i32)) -> DrawResult {
    canvas.draw(&Circle::new(at, RING_RADIUS, INK.stroke_width(3)))
}

/// A bar between two corners, filled or hatched so that it is distinct in greyscale.
pub(crate) fn bar(canvas: &Canvas, corners: [(i32, i32); 2], colour: RGBColor, fill: Fill) -> DrawResult {
    let background = match fill {
        Fill::Solid => colour,
        _ => WHITE,
    };
    canvas.draw(&Rectangle::new(corners, background.filled()))?;
    if matches!(fill, Fill::Hatched | Fill::CrossHatched) {
        hatch(canvas, corners, colour, false)?;
    }
    if matches!(fill, Fill::BackHatched | Fill::CrossHatched) {
        hatch(canvas, corners, colour, true)?;
    }
    let [(x0, y0), (x1, y1)] = corners;
    let outline = vec![(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)];
    canvas.draw(&PathElement::new(outline, colour.stroke_width(3)))
}

/// Diagonal lines inside a rectangle, rising to the right unless `mirrored`.
fn hatch(canvas: &Canvas, [(x0, y0), (x1, y1)]: [(i32, i32); 2], colour: RGBColor, mirrored: bool) -> DrawResult {
    let (width, height) = (x1 - x0, y1 - y0);
    let mut foot = HATCH_SPACING / 2 - height;
    while foot < width {
        let (from, to) = (foot.max(0), (foot + height).min(width));
        let place = |x: i32| {
            let across = if mirrored { x1 - x } else { x0 + x };
            (across, y1 - (x - foot))
        };
        let style = colour.stroke_width(3);
        canvas.draw(&PathElement::new(vec![place(from), place(to)], style))?;
        foot += HATCH_SPACING;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{Missing, Page};

    fn policies() -> Vec<Policy> {
        let batchings = ["vanilla", "sequence-wise", "depth-wise"];
        let exits = ["none", "oracle", "confidence 0.9"];
        batchings.iter().flat_map(|b| exits.map(|e| Policy::new(*b, e))).collect()
    }

    #[test]
    fn a_legend_names_few_of_many_ordered_classes() {
        let named = |count| named_classes(count).collect::<Vec<_>>();
        assert_eq!((named(0).len(), named(1), named(12)), (0, vec![0], (0..12).collect()));
        assert_eq!(named(64), (0..64).step_by(6).collect::<Vec<_>>());
        assert!((1..=255).all(|count| named(count).len() <= 12));
    }

    #[test]
    fn policies_differ_without_their_colours() {
        let looks = Look::policies(&policies());
        for (index, a) in looks.iter().enumerate() {
            assert!(looks[..index].iter().all(|b| a.marker != b.marker), "{a:?}");
        }
    }

    #[test]
    fn exits_share_a_colour_and_batchings_a_dash() {
        let policies = policies();
        let looks = Look::policies(&policies);
        for (a, p) in looks.iter().zip(&policies) {
            for (b, q) in looks.iter().zip(&policies) {
                assert_eq!(a.colour == b.colour, p.exit == q.exit);
                assert_eq!(a.dash == b.dash, p.batching == q.batching);
            }
        }
    }

    #[test]
    fn depths_darken() {
        let lightness = |RGBColor(r, g, b)| 0.2126 * f64::from(r) + 0.7152 * f64::from(g) + 0.0722 * f64::from(b);
        let shades: Vec<f64> = (0..8).map(|depth| lightness(ordered_colour(depth, 8))).collect();
        assert!(shades.windows(2).all(|pair| pair[0] - pair[1] > 10.0), "{shades:?}");
    }

    #[test]
    fn hatching_stays_inside_its_bar() {
        for corners in [[(100, 200), (160, 500)], [(100, 200), (700, 230)], [(100, 200), (101, 201)]] {
            let mut svg = String::new();
            let canvas = Page::new(&mut svg, (1000, 1000), &Missing::default()).into_drawing_area();
            bar(&canvas, corners, WHITE, Fill::CrossHatched).expect("a bar");
            drop(canvas);
            let [(x0, y0), (x1, y1)] = corners;
            for points in svg.split("points=\"").skip(1) {
                let points = points.split('"').next().expect("a list of points");
                for point in points.split_whitespace() {
                    let (x, y) = point.split_once(',').expect("x,y");
                    let (x, y): (i32, i32) = (x.parse().expect("x"), y.parse().expect("y"));
                    assert!((x0..=x1).contains(&x) && (y0..=y1).contains(&y), "{x},{y} of {corners:?}");
                }
            }
        }
    }

    #[test]
    fn dashes_are_the_svg_s_own() {
        let mut svg = String::new();
        let canvas = Page::new(&mut svg, (100, 100), &Missing::default()).into_drawing_area();
        stroke(&canvas, &[(0, 0), (90, 90)], INK.stroke_width(3), Dash::Dashed).expect("a stroke");
        drop(canvas);
        let svg = write_dashes(svg);
        assert!(svg.contains("stroke-width=\"3\" stroke-dasharray=\"20 9\""), "{svg}");
    }
}
