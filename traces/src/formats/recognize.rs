//! Which format a file is of: by its columns, or by the keys of its first JSON object.

use std::cell::RefCell;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::json_lines::Lines;
use super::{LAYOUTS, Layout, Shape};
use crate::error::{Result, TraceError, quote};
use crate::input::open_file;

/// The layout of a file.
///
/// # Errors
/// If the file cannot be read or is of no known format.
pub(crate) fn detect(path: &Path) -> Result<&'static Layout> {
    let mut lines = Lines::open(path)?;
    let expected = || {
        let known: Vec<String> = LAYOUTS.iter().map(Layout::describe).collect();
        format!("the fields of a request trace: {}", known.join(", "))
    };
    let Some((line, first)) = lines.next_line()? else {
        return Err(TraceError::file(path, "an empty file", expected()));
    };
    let wrong = |expected| TraceError::Line { path: path.to_owned(), line, found: quote(first), expected };
    let of = |shapes: &[Shape], names: &[String]| {
        LAYOUTS.iter().find(|layout| shapes.contains(&layout.shape) && layout.matches(names))
    };
    match first.first() {
        Some(b'{') => {
            // A line is read in full: the fields of one format may be among those of another one.
            let keys = first_keys(path, |keys| of(&[Shape::Object], keys).is_some())?;
            of(&[Shape::Lines, Shape::Object], &keys).ok_or_else(|| wrong(expected()))
        }
        Some(b'[') => {
            let keys = first_keys(path, |_| false)?;
            if let Some(list) = of(&[Shape::List], &keys) {
                return Ok(list);
            }
            Err(wrong(match of(&[Shape::Lines], &keys) {
                Some(_) => "an object in each line, not one list: run `jq -c '.[]'`".to_owned(),
                None => expected(),
            }))
        }
        _ => {
            let header = String::from_utf8_lossy(first);
            let columns = |separator: char| -> Vec<String> {
                header.split(separator).map(|column| column.trim().trim_matches('"').to_owned()).collect()
            };
            if let Some(table) = of(&[Shape::Table], &columns(',')) {
                return Ok(table);
            }
            let is_separated = |by: &char| of(&[Shape::Table], &columns(*by)).is_some();
            Err(wrong(match [';', '\t', '|'].iter().any(is_separated) {
                true => "columns separated by commas".to_owned(),
                false => expected(),
            }))
        }
    }
}

/// The keys of the first object of a file, or of the first one in its list, until one of them satisfies `are_enough` or
/// the object is damaged.
fn first_keys(path: &Path, are_enough: impl Fn(&[String]) -> bool) -> Result<Vec<String>> {
    let mut text = BufReader::new(open_file(path)?);
    let mark = "\u{feff}".as_bytes();
    if text.fill_buf().map_err(TraceError::io("read", path))?.starts_with(mark) {
        text.consume(mark.len());
    }
    let keys = RefCell::new(Vec::new());
    let mut json = serde_json::Deserializer::from_reader(text);
    // The end of the search is an error too, and one of the file will be found again by its reader.
    let _ = FirstKeys { keys: &keys, are_enough: &are_enough }.deserialize(&mut json);
    Ok(keys.into_inner())
}

/// Collects keys, and fails as soon as they are enough.
struct FirstKeys<'a, F> {
    keys: &'a RefCell<Vec<String>>,
    are_enough: &'a F,
}

impl<'de, F: Fn(&[String]) -> bool> DeserializeSeed<'de> for FirstKeys<'_, F> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, F: Fn(&[String]) -> bool> Visitor<'de> for FirstKeys<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            self.keys.borrow_mut().push(key);
            if (self.are_enough)(&self.keys.borrow()) {
                return Ok(());
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Self { keys, are_enough } = self;
        list.next_element_seed(FirstKeys { keys, are_enough }).map(drop)
    }
}
