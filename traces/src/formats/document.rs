//! Files that are one JSON document.

use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::de::DeserializeSeed;

use super::json_lines::JsonRow;
use crate::error::{Result, TraceError};
use crate::input::{json_message, open_file};

/// The document, read by `seed` while it streams.
///
/// # Errors
/// If the file cannot be read, or is not what the seed expects; the error names line and key.
pub(super) fn read<S: for<'de> DeserializeSeed<'de, Value = T>, T>(path: &Path, seed: S) -> Result<T> {
    let mut text = BufReader::new(open_file(path)?);
    let mark = "\u{feff}".as_bytes();
    if text.fill_buf().map_err(TraceError::io("read", path))?.starts_with(mark) {
        text.consume(mark.len());
    }
    let mut json = serde_json::Deserializer::from_reader(text);
    let mut track = serde_path_to_error::Track::new();
    let found = seed.deserialize(serde_path_to_error::Deserializer::new(&mut json, &mut track));
    let wrong = |key: String, error: serde_json::Error| {
        if error.is_io() {
            return TraceError::io("read", path)(error.into());
        }
        let key = if matches!(key.as_str(), "." | "?") { "the object" } else { &key };
        let message = match error.is_eof() {
            true => "the document is cut off".to_owned(),
            false => json_message(&error),
        };
        JsonRow { path, line: error.line() as u64 }.json_error(key, &message)
    };
    let found = found.map_err(|error| wrong(track.path().to_string(), error))?;
    let is_alone = json.end();
    is_alone.map_err(|error| match error.is_io() {
        true => wrong(String::new(), error),
        false => {
            let line = error.line() as u64;
            JsonRow { path, line }.json_error("the object", "expected nothing after it: write one document per file")
        }
    })?;
    Ok(found)
}
