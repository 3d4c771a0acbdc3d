//! The keys of a checkpoint's configuration, each read as what it must be.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{CheckpointError, contents};

/// An object of a configuration file.
pub(super) struct Keys {
    path: PathBuf,
    /// Where in the file the object is: empty, or a key and a dot.
    prefix: String,
    values: Map<String, Value>,
}

/// What a key can hold.
pub(super) trait Kind: DeserializeOwned {
    /// Its name in errors.
    const NAME: &'static str;
}

impl Kind for usize {
    const NAME: &'static str = "a whole number";
}

impl Kind for f32 {
    const NAME: &'static str = "a number";
}

impl Kind for f64 {
    const NAME: &'static str = "a number";
}

impl Kind for bool {
    const NAME: &'static str = "true or false";
}

impl Kind for String {
    const NAME: &'static str = "a string";
}

impl Kind for Vec<String> {
    const NAME: &'static str = "a list of strings";
}

impl Keys {
    /// The keys of `values`, which were found in the file at `path`.
    pub fn new(path: &Path, values: Map<String, Value>) -> Self {
        Self { path: path.to_owned(), prefix: String::new(), values }
    }

    /// Reads a JSON file.
    ///
    /// # Errors
    /// If it is unreadable or not a JSON object.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        let text = contents::read(path).map_err(|source| CheckpointError::File { path: path.to_owned(), source })?;
        let values =
            serde_json::from_slice(&text).map_err(|source| CheckpointError::Json { path: path.to_owned(), source })?;
        Ok(Self::new(path, values))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all keys.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Whether a key is there, if only to be null.
    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// These keys with those of another object, which come first.
    pub fn updated(mut self, other: Self) -> Self {
        self.values.extend(other.values);
        self
    }

    /// A key's value as it is, if it is there and not null.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// A key's value, if it is there and not null.
    pub fn optional<T: Kind>(&self, key: &str) -> Result<Option<T>, CheckpointError> {
        let read = |value: &Value| T::deserialize(value).map_err(|_| self.refuse(key, T::NAME));
        self.value(key).map(read).transpose()
    }

    /// A key's value, which must be there.
    pub fn required<T: Kind>(&self, key: &str) -> Result<T, CheckpointError> {
        self.optional(key)?.ok_or_else(|| self.refuse(key, T::NAME))
    }

    /// The object at a key, if it is there and not null.
    pub fn object(&self, key: &str) -> Result<Option<Self>, CheckpointError> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(values)) => {
                let prefix = format!("{}{key}.", self.prefix);
                Ok(Some(Self { path: self.path.clone(), prefix, values: values.clone() }))
            }
            Some(_) => Err(self.refuse(key, "an object")),
        }
    }

    /// Warns about a key once, and says what is assumed.
    pub fn warn(&self, key: &str, assumed: &str) {
        log::warn!("{}: `{}{key}` is {}: {assumed}", self.path.display(), self.prefix, self.shown(key));
    }

    /// The error of a key that holds something else than expected.
    pub fn refuse(&self, key: &str, expected: &str) -> CheckpointError {
        let (found, expected) = (self.shown(key), expected.to_owned());
        CheckpointError::Value { path: self.path.clone(), key: format!("{}{key}", self.prefix), found, expected }
    }

    /// A key's value as it is shown to people.
    fn shown(&self, key: &str) -> String {
        /// Longer values are not shown.
        const SHOWN: usize = 80;
        let Some(value) = self.values.get(key) else { return "missing".to_owned() };
        let text = value.to_string();
        match value {
            _ if text.len() <= SHOWN => text,
            Value::Array(items) => format!("a list of {}", items.len()),
            Value::Object(_) => "an object".to_owned(),
            _ => format!("a text of {} bytes", text.len()),
        }
    }
}
