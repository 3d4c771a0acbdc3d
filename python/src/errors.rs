//! Errors of the libraries as exceptions of Python, and exceptions of callbacks as errors.

use std::fmt;

use pyo3::PyErr;
use pyo3::exceptions::PyOSError;
use traces::TraceError;

pyo3::create_exception!(
    depthwise,
    DepthwiseError,
    pyo3::exceptions::PyValueError,
    "What depthwise refuses, or cannot do."
);
pyo3::create_exception!(
    depthwise,
    DepthwiseWarning,
    pyo3::exceptions::PyUserWarning,
    "What makes results less trustworthy than they look."
);

/// An exception of Python that passes through the libraries as an error.
#[derive(Debug)]
pub struct Raised(pub PyErr);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Raised {}

/// The exception of an error: one that came from Python, an `OSError` where a file could not be read or written, else a
/// `DepthwiseError` with the same message as the command line's.
pub fn raise(error: anyhow::Error) -> PyErr {
    let error = match error.downcast::<Raised>() {
        Ok(Raised(raised)) => return raised,
        Err(error) => error,
    };
    let message = format!("{error:#}");
    match error.downcast_ref() {
        Some(TraceError::Io { .. }) => PyOSError::new_err(message),
        _ => DepthwiseError::new_err(message),
    }
}
