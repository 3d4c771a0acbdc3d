//! The page of a figure: an SVG whose text the embedded font can draw, so that SVG and PNG show the same text.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::rc::Rc;
use std::sync::LazyLock;

use ab_glyph::{Font, FontRef};
use plotters::prelude::*;
use plotters_backend::{BackendColor, BackendCoord, BackendStyle, BackendTextStyle, DrawingErrorKind};

type Drawn<T = ()> = Result<T, DrawingErrorKind<io::Error>>;

/// Characters that the font lacks, of all text drawn so far.
pub(crate) type Missing = Rc<RefCell<BTreeSet<char>>>;

/// An SVG that is being drawn.
pub(crate) struct Page<'a> {
    svg: SVGBackend<'a>,
    missing: Missing,
}

impl<'a> Page<'a> {
    /// Starts an SVG of a size in units, which is written into `text` when the page is dropped.
    pub(crate) fn new(text: &'a mut String, size: (u32, u32), missing: &Missing) -> Self {
        Self { svg: SVGBackend::with_string(text, size), missing: missing.clone() }
    }
}

/// Text with a code such as `U+4E2D` in place of each character that the font lacks or that is not visible.
pub(crate) fn drawable(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_drawable) {
        return Cow::Borrowed(text);
    }
    let mut drawn = String::new();
    let mut after_code = false;
    for letter in text.chars() {
        let is_code = !is_drawable(letter) && !letter.is_whitespace();
        if (is_code || after_code) && !letter.is_whitespace() && !drawn.is_empty() && !drawn.ends_with(' ') {
            drawn.push(' ');
        }
        match letter {
            _ if is_code => drawn += &format!("U+{:04X}", u32::from(letter)),
            _ if letter.is_whitespace() => drawn.push(' '),
            _ => drawn.push(letter),
        }
        after_code = is_code;
    }
    Cow::Owned(drawn)
}

fn is_drawable(letter: char) -> bool {
    static FONTS: LazyLock<[FontRef<'static>; 2]> = LazyLock::new(|| {
        [dejavu::sans::regular(), dejavu::sans::bold()].map(|font| FontRef::try_from_slice(font).expect("a font"))
    });
    letter.is_ascii_graphic()
        || letter == ' '
        || !letter.is_control() && FONTS.iter().all(|font| font.glyph_id(letter).0 != 0)
}

impl DrawingBackend for Page<'_> {
    type ErrorType = io::Error;

    fn get_size(&self) -> (u32, u32) {
        self.svg.get_size()
    }

    fn ensure_prepared(&mut self) -> Drawn {
        self.svg.ensure_prepared()
    }

    fn present(&mut self) -> Drawn {
        self.svg.present()
    }

    fn draw_pixel(&mut self, point: BackendCoord, colour: BackendColor) -> Drawn {
        self.svg.draw_pixel(point, colour)
    }

    fn draw_line<S: BackendStyle>(&mut self, from: BackendCoord, to: BackendCoord, style: &S) -> Drawn {
        self.svg.draw_line(from, to, style)
    }

    fn draw_rect<S: BackendStyle>(&mut self, from: BackendCoord, to: BackendCoord, style: &S, fill: bool) -> Drawn {
        self.svg.draw_rect(from, to, style, fill)
    }

    fn draw_path<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(&mut self, path: I, style: &S) -> Drawn {
        self.svg.draw_path(path, style)
    }

    fn draw_circle<S: BackendStyle>(&mut self, centre: BackendCoord, radius: u32, style: &S, fill: bool) -> Drawn {
        self.svg.draw_circle(centre, radius, style, fill)
    }

    fn fill_polygon<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(&mut self, corners: I, style: &S) -> Drawn {
        self.svg.fill_polygon(corners, style)
    }

    fn draw_text<S: BackendTextStyle>(&mut self, text: &str, style: &S, at: BackendCoord) -> Drawn {
        self.missing
            .borrow_mut()
            .extend(text.chars().filter(|&letter| !is_drawable(letter) && !letter.is_whitespace()));
        self.svg.draw_text(&drawable(text), style, at)
    }

    fn estimate_text_size<S: BackendTextStyle>(&self, text: &str, style: &S) -> Drawn<(u32, u32)> {
        self.svg.estimate_text_size(&drawable(text), style)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_the_font_lacks_become_codes() {
        assert_eq!(drawable("p99 ≤ 5 · naïve, λ"), "p99 ≤ 5 · naïve, λ");
        assert_eq!(drawable("模型 A中b"), "U+6A21 U+578B A U+4E2D b");
        assert_eq!(drawable("한글"), "U+D55C U+AE00");
        assert_eq!(drawable("a\tb\u{1b}[0m"), "a b U+001B [0m");
    }
}
