//! Errors of imported files.

use std::path::{Path, PathBuf};

use traces::TraceError;

/// A file that cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A file that cannot be read, or an invalid value in a table.
    #[error(transparent)]
    Table(#[from] TraceError),
    /// A file that cannot be opened.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file that does not have the expected format.
    #[error("{path}: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Message of the parser, with the line.
        message: String,
    },
    /// A file that lacks something the import needs.
    #[error("{path}: found {found}, expected {expected}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// A model that cannot be shared by this number of devices.
    #[error("{found}: expected what {devices} devices can share equally")]
    Parallel {
        /// Number of devices.
        devices: u64,
        /// What was found.
        found: String,
    },
}

impl ImportError {
    pub(crate) fn malformed(path: &Path, error: impl std::fmt::Display) -> Self {
        Self::Malformed { path: path.to_owned(), message: error.to_string() }
    }

    pub(crate) fn unusable(path: &Path, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self::Unusable { path: path.to_owned(), found: found.into(), expected: expected.into() }
    }
}

pub(crate) fn read_text(path: &Path) -> Result<String, ImportError> {
    Ok(traces::input::read_text(path)?)
}
