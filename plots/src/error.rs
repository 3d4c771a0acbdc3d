//! Errors of figures: invalid data, or a file that cannot be written.

use std::path::PathBuf;

/// Why a figure was not drawn. If drawing fails, no file is written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A figure without data.
    #[error("figure `{figure}`: {what}: found no values, expected at least one")]
    Empty {
        /// Name of the figure.
        figure: String,
        /// The empty series or list.
        what: String,
    },
    /// A value that is out of range.
    #[error("figure `{figure}`: {what}, value {index}: found {value}, expected {expected}")]
    Value {
        /// Name of the figure.
        figure: String,
        /// The series and the quantity.
        what: String,
        /// Index of the value, from 0.
        index: usize,
        /// The value found.
        value: f64,
        /// The range that was expected.
        expected: &'static str,
    },
    /// Two lists with different lengths.
    #[error("figure `{figure}`: {what}: found {found} values, expected {expected}")]
    Length {
        /// Name of the figure.
        figure: String,
        /// The series and the quantity.
        what: String,
        /// Number of values found.
        found: usize,
        /// Number of values expected.
        expected: usize,
    },
    /// A speed-up without a baseline.
    #[error(
        "figure `{figure}`: no {origin} throughput of the baseline `{baseline}`, \
         expected one since other policies have one"
    )]
    Baseline {
        /// Name of the figure.
        figure: String,
        /// Label of the baseline.
        baseline: String,
        /// `measured` or `simulated`.
        origin: &'static str,
    },
    /// The drawing library failed.
    #[error("figure `{figure}`: cannot draw: {message}")]
    Draw {
        /// Name of the figure.
        figure: String,
        /// Message of the library.
        message: String,
    },
    /// A file could not be written.
    #[error("cannot write {path}: {source}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

/// A figure of values that cannot be drawn is left out, with a warning: it is no reason for a command to fail whose results
/// they are.
///
/// # Errors
/// If the figure could not be drawn or written for another reason.
pub fn or_left_out(drawn: Result<(), Error>) -> Result<(), Error> {
    match drawn {
        Err(error @ (Error::Empty { .. } | Error::Value { .. } | Error::Length { .. } | Error::Baseline { .. })) => {
            log::warn!("{error}: the figure is left out");
            Ok(())
        }
        drawn => drawn,
    }
}
