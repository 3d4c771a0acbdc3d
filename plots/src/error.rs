//! What can be wrong with a figure's data or with writing it.

use std::path::PathBuf;

/// Why a figure was not drawn. Nothing is written when drawing fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to draw.
    #[error("figure `{figure}`: {what}: found no values, expected at least one")]
    Empty {
        /// The figure's name.
        figure: String,
        /// The series or the list that is empty.
        what: String,
    },
    /// A value that cannot be drawn.
    #[error("figure `{figure}`: {what}, value {index}: found {value}, expected {expected}")]
    Value {
        /// The figure's name.
        figure: String,
        /// The series and the quantity.
        what: String,
        /// Which value of it, counted from 0.
        index: usize,
        /// The value found.
        value: f64,
        /// What would have been fine.
        expected: &'static str,
    },
    /// Two lists that must have the same length do not.
    #[error("figure `{figure}`: {what}: found {found} values, expected {expected}")]
    Length {
        /// The figure's name.
        figure: String,
        /// The series and the quantity.
        what: String,
        /// Values found.
        found: usize,
        /// Values expected.
        expected: usize,
    },
    /// A speed-up has nothing to be relative to.
    #[error(
        "figure `{figure}`: no {origin} throughput of the baseline `{baseline}`, \
         expected one since other policies have one"
    )]
    Baseline {
        /// The figure's name.
        figure: String,
        /// The baseline's label.
        baseline: String,
        /// `measured` or `simulated`.
        origin: &'static str,
    },
    /// The drawing library failed.
    #[error("figure `{figure}`: cannot draw: {message}")]
    Draw {
        /// The figure's name.
        figure: String,
        /// The library's message.
        message: String,
    },
    /// A file could not be written.
    #[error("cannot write {path}: {source}", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}
