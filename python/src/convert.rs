//! Values of the libraries as values of Python, and back, by their form in files.

use anyhow::{Result, anyhow};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::errors::{Raised, raise};

/// A value as dictionaries, lists, texts and numbers.
pub fn to_python<'py>(py: Python<'py>, value: &impl Serialize) -> PyResult<Bound<'py, PyAny>> {
    let text = serde_json::to_string(value).map_err(|error| raise(error.into()))?;
    py.import("json")?.call_method1("loads", (text,))
}

/// A value of dictionaries, lists, texts and numbers, with the keys that files have. Paths may be `pathlib.Path`.
///
/// # Errors
/// If a key is missing, unknown or of another type: the message names it.
pub fn from_python<T: DeserializeOwned>(value: &Bound<'_, PyAny>) -> Result<T> {
    let json = value.py().import("json").map_err(Raised)?;
    let options = PyDict::new(value.py());
    options.set_item("default", value.py().get_type::<pyo3::types::PyString>()).map_err(Raised)?;
    let text: String =
        json.call_method("dumps", (value,), Some(&options)).and_then(|text| text.extract()).map_err(Raised)?;
    serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(&text)).map_err(|error| {
        let path = error.path().to_string();
        // Where it is in the JSON is of no use.
        let message = error.into_inner().to_string();
        let message = message.split(" at line ").next().unwrap_or_default().to_owned();
        if path == "." { anyhow!(message) } else { anyhow!("{path}: {message}") }
    })
}

/// As [`from_python`], with values for keys that are not given.
///
/// # Errors
/// As there.
pub fn from_keys<T: DeserializeOwned>(given: Option<&Bound<'_, PyDict>>, defaults: &Bound<'_, PyDict>) -> Result<T> {
    if let Some(given) = given {
        defaults.update(given.as_mapping()).map_err(Raised)?;
    }
    from_python(defaults)
}
