//! The error of this crate: file, position, what was found and what was expected.

use std::io;
use std::path::{Path, PathBuf};

/// Why a trace, a profile or a request configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// An operation of the operating system failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The operation, such as `read`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file as a whole is invalid: empty, incomplete or of no known format.
    #[error("{}: found {found}, expected {expected}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the file contains.
        found: String,
        /// What it should contain.
        expected: String,
    },
    /// A line is invalid: wrong columns, cut off, not JSON.
    #[error("{}:{line}: found {found}, expected {expected}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// What the line contains.
        found: String,
        /// What it should contain.
        expected: String,
    },
    /// A value in a table is missing, of another type or out of range.
    #[error("{}:{line}: {column}: found {found}, expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// The column, or the key in a line of JSON.
        column: String,
        /// The text in the file.
        found: String,
        /// The values that are valid.
        expected: String,
    },
    /// A line of JSON does not match its format.
    #[error("{}:{line}: {key}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// The key, `the object` for the line as a whole.
        key: String,
        /// The problem: what was found and what was expected.
        message: String,
    },
    /// A YAML file is invalid; the message names key, line and column.
    #[error("{}: {}", path.display(), shortened(source))]
    Yaml {
        /// The file.
        path: PathBuf,
        /// The problem: what was found and what was expected.
        source: serde_yaml::Error,
    },
    /// A key of a YAML file is out of range.
    #[error("{}: {key}: found {found}, expected {expected}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// The value in the file.
        found: String,
        /// The values that are valid.
        expected: String,
    },
    /// A `requests` configuration has an invalid value.
    #[error("requests: {key}: found {found}, expected {expected}")]
    Spec {
        /// The key.
        key: &'static str,
        /// The value in the configuration.
        found: String,
        /// The values that are valid.
        expected: String,
    },
    /// A latency profile and an exit trace belong to different models.
    #[error(
        "the latency profile is of `{profile_model}` ({profile_loops} loops, fingerprint {profile_fingerprint}), \
         expected the model of the exit trace: `{exits_model}` ({exits_loops} loops, fingerprint {exits_fingerprint})"
    )]
    OtherModel {
        /// Model of the profile.
        profile_model: String,
        /// Loops of the profile's model.
        profile_loops: u32,
        /// Fingerprint in the profile.
        profile_fingerprint: String,
        /// Model of the exit trace.
        exits_model: String,
        /// Loops of the exit trace's model.
        exits_loops: u32,
        /// Fingerprint in the exit trace.
        exits_fingerprint: String,
    },
}

/// Shorthand for results of this crate.
pub type Result<T, E = TraceError> = std::result::Result<T, E>;

impl TraceError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn file(path: &Path, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), found: found.into(), expected: expected.into() }
    }

    pub(crate) fn spec(key: &'static str, found: impl ToString, expected: impl Into<String>) -> Self {
        Self::Spec { key, found: found.to_string(), expected: expected.into() }
    }
}

/// Quotes text of a file for a message: in backticks, and cut to a length that fits a terminal.
pub(crate) fn quote(text: &[u8]) -> String {
    const SHOWN: usize = 80;
    let text = String::from_utf8_lossy(text);
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("`{}...`", text[..end].escape_debug()),
        None => format!("`{}`", text.escape_debug()),
    }
}

/// The message of an error, without the middle of a long one: some quote the whole file.
fn shortened(error: &serde_yaml::Error) -> String {
    const SHOWN: usize = 200;
    let message = error.to_string();
    let letters = message.chars().count();
    if letters <= 2 * SHOWN {
        return message;
    }
    let end: String = message.chars().skip(letters - SHOWN).collect();
    format!("{} ... {end}", message.chars().take(SHOWN).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_quotes_a_whole_file_is_shortened() {
        let text = "in the beginning ".repeat(10_000);
        let source = serde_yaml::from_str::<u32>(&text).unwrap_err();
        let message = TraceError::Yaml { path: "a.yaml".into(), source }.to_string();
        assert!(message.len() < 500, "{}", message.len());
        assert!(message.starts_with("a.yaml: invalid type: string \"in the"), "{message}");
        assert!(message.contains(" ... ") && message.ends_with("expected u32"), "{message}");
        let source = serde_yaml::from_str::<u32>("in the beginning").unwrap_err();
        assert!(!TraceError::Yaml { path: "a.yaml".into(), source }.to_string().contains("..."));
    }
}
