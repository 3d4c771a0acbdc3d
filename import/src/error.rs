//! What can be wrong with files of others.

use std::path::{Path, PathBuf};

use traces::TraceError;

/// A file that cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A file that cannot be read, or a value in a table.
    #[error(transparent)]
    Table(#[from] TraceError),
    /// A file that cannot be opened.
    #[error("cannot read {path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that is not what its name says.
    #[error("{path}: {message}")]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What the parser says, with its line.
        message: String,
    },
    /// A file without something that the import needs.
    #[error("{path}: found {found}, expected {expected}")]
    Unusable {
        /// Which.
        path: PathBuf,
        /// As found.
        found: String,
        /// What would do.
        expected: String,
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
