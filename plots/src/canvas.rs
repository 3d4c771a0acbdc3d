//! One drawing, written as SVG and, rendered from that same SVG, as PNG.

use std::fs;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use plotters::coord::Shift;
use plotters::prelude::*;
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{self, fontdb};

use crate::legend::{self, Entry};
use crate::page::{Missing, Page, drawable};
use crate::style::{self, INK, MUTED};
use crate::{Error, Figure};

/// A part of the drawing. A unit is half a pixel of the SVG and a pixel of the PNG.
pub(crate) type Canvas<'a> = DrawingArea<Page<'a>, Shift>;
pub(crate) type DrawError = DrawingAreaErrorKind<std::io::Error>;
pub(crate) type DrawResult<T = ()> = Result<T, DrawError>;

/// Width of an ordinary figure, in units.
pub(crate) const WIDTH: u32 = 2000;

const UNITS_PER_PIXEL: u32 = 2;
const MARGIN: i32 = 30;
const TITLE_SIZE: u32 = 44;
const SUBTITLE_SIZE: u32 = 31;

/// Draws title, subtitle and legend, then `body` into `(width, height)` units below them, and writes both files.
pub(crate) fn draw(
    figure: &Figure,
    (width, height): (u32, u32),
    legend: &[Entry],
    body: impl Fn(&Canvas) -> DrawResult,
) -> Result<(), Error> {
    let failed = |message: String| Error::Draw { figure: figure.name.clone(), message };
    if !style::register_fonts() {
        return Err(failed("the embedded font cannot be read".into()));
    }
    let head = head_height(figure, width, legend).map_err(|e| failed(e.to_string()))?;
    let whole_pixels = |units: u32| units.next_multiple_of(UNITS_PER_PIXEL);
    let size = (whole_pixels(width), whole_pixels(head + height));
    let mut svg = String::new();
    let missing = Missing::default();
    {
        let root = Page::new(&mut svg, size, &missing).into_drawing_area();
        let page = || {
            root.fill(&WHITE)?;
            let (top, below) = root.split_vertically(head);
            draw_head(&top, figure, width, legend)?;
            body(&below)?;
            root.present()
        };
        page().map_err(|e: DrawError| failed(e.to_string()))?;
    }
    let svg = style::write_dashes(with_display_size(&svg, size));
    let png = render(&svg, size).map_err(failed)?;
    write(&figure.folder, &format!("{}.svg", figure.name), svg.as_bytes())?;
    write(&figure.folder, &format!("{}.png", figure.name), &png)?;
    warn_of(figure, &missing);
    Ok(())
}

/// Warns of the characters that a figure shows as codes.
fn warn_of(figure: &Figure, missing: &Missing) {
    let missing: Vec<String> = missing.borrow().iter().map(|letter| letter.escape_debug().to_string()).collect();
    if !missing.is_empty() {
        log::warn!(
            "figure `{}`: the embedded font lacks {}, drawn as codes such as U+4E2D",
            figure.name,
            missing.join(" ")
        );
    }
}

/// Lays out the head on a scratch drawing to find its height.
fn head_height(figure: &Figure, width: u32, legend: &[Entry]) -> DrawResult<u32> {
    let mut scratch = String::new();
    let root = Page::new(&mut scratch, (width, 1), &Missing::default()).into_drawing_area();
    draw_head(&root, figure, width, legend)
}

fn draw_head(canvas: &Canvas, figure: &Figure, width: u32, legend: &[Entry]) -> DrawResult<u32> {
    let room = width as i32 - 2 * MARGIN;
    let mut y = MARGIN - 6;
    let title = style::bold_text(TITLE_SIZE, INK);
    y = paragraph(canvas, &figure.title, &title, (MARGIN, y), room)? + 6;
    let subtitle = style::text(SUBTITLE_SIZE, MUTED);
    y = paragraph(canvas, &figure.subtitle(), &subtitle, (MARGIN, y), room)? + 10;
    if !legend.is_empty() {
        y = legend::draw(canvas, legend, (MARGIN, y), room)?;
    }
    Ok((y + 14) as u32)
}

/// Draws text wrapped to `room` units and returns the y coordinate below it.
fn paragraph(canvas: &Canvas, text: &str, style: &TextStyle, (x, mut y): (i32, i32), room: i32) -> DrawResult<i32> {
    for line in wrap(canvas, text, style, room)? {
        canvas.draw_text(&line, style, (x, y))?;
        y += (style.font.get_size() * 1.15) as i32;
    }
    Ok(y)
}

/// Breaks text at spaces into lines of at most `room` units, where its words allow.
pub(crate) fn wrap(canvas: &Canvas, text: &str, style: &TextStyle, room: i32) -> DrawResult<Vec<String>> {
    let mut lines: Vec<String> = Vec::new();
    for word in drawable(text).split_whitespace() {
        let longer = lines.last().map(|line| format!("{line} {word}"));
        match longer {
            Some(longer) if text_width(canvas, &longer, style)? <= room => {
                lines.pop();
                lines.push(longer);
            }
            _ => lines.push(word.to_string()),
        }
    }
    Ok(lines)
}

pub(crate) fn text_width(canvas: &Canvas, text: &str, style: &TextStyle) -> DrawResult<i32> {
    Ok(canvas.estimate_text_size(text, style)?.0 as i32)
}

/// Sets the display size at `UNITS_PER_PIXEL`: plotters has integer coordinates, and pixels are too coarse.
fn with_display_size(svg: &str, (width, height): (u32, u32)) -> String {
    let body = svg.split_once('>').map_or("", |(_, body)| body);
    format!(
        "<svg width=\"{}\" height=\"{}\" viewBox=\"0 0 {width} {height}\" \
         stroke-linejoin=\"round\" xmlns=\"http://www.w3.org/2000/svg\">{body}",
        width / UNITS_PER_PIXEL,
        height / UNITS_PER_PIXEL,
    )
}

/// Renders at one pixel per unit with the embedded font, independent of the machine's fonts.
fn render(svg: &str, (width, height): (u32, u32)) -> Result<Vec<u8>, String> {
    static FONTS: LazyLock<Arc<fontdb::Database>> = LazyLock::new(|| {
        let mut fonts = fontdb::Database::new();
        fonts.load_font_data(dejavu::sans::regular().to_vec());
        fonts.load_font_data(dejavu::sans::bold().to_vec());
        fonts.set_sans_serif_family("DejaVu Sans");
        Arc::new(fonts)
    });
    let options = usvg::Options { fontdb: FONTS.clone(), ..usvg::Options::default() };
    let tree = usvg::Tree::from_str(svg, &options).map_err(|e| e.to_string())?;
    let mut pixels = Pixmap::new(width, height).ok_or("no memory for the picture")?;
    let scale = UNITS_PER_PIXEL as f32;
    resvg::render(&tree, Transform::from_scale(scale, scale), &mut pixels.as_mut());
    pixels.encode_png().map_err(|e| e.to_string())
}

/// Writes a file completely or not at all: under a temporary name first, then renamed.
fn write(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let path = folder.join(name);
    let part = folder.join(format!(".{name}.part"));
    fs::create_dir_all(folder).and_then(|()| fs::write(&part, bytes)).and_then(|()| fs::rename(&part, &path)).map_err(
        |source| {
            // The error of the writing is the one to report.
            let _ = fs::remove_file(&part);
            Error::Write { path, source }
        },
    )
}
