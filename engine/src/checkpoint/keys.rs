//! The keys of a checkpoint's configuration, each read as what it must be.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::CheckpointError;

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
        let text = std::fs::read(path).map_err(|source| CheckpointError::File { path: path.to_owned(), source })?;
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

    /// A key's value, if it is there and not null.
    pub fn optional<T: Kind>(&self, key: &str) -> Result<Option<T>, CheckpointError> {
        let value = self.values.get(key).filter(|value| !value.is_null());
        let read = |value: &Value| T::deserialize(value).map_err(|_| self.refuse(key, T::NAME));
        value.map(read).transpose()
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

    /// Refuses a key that asks for what this engine does not do.
    ///
    /// # Errors
    /// If the key is there, and neither null nor `harmless`.
    pub fn must_be_absent(&self, key: &str, harmless: &Value) -> Result<(), CheckpointError> {
        match self.values.get(key) {
            Some(value) if !value.is_null() && value != harmless => {
                let or_harmless = if harmless.is_null() { String::new() } else { format!(" or {harmless}") };
                Err(self.refuse(key, &format!("null{or_harmless}: this engine knows no other")))
            }
            _ => Ok(()),
        }
    }

    /// The error of a key that holds something else than expected.
    pub fn refuse(&self, key: &str, expected: &str) -> CheckpointError {
        /// Longer values are not shown.
        const SHOWN: usize = 80;
        let found = self.values.get(key).map_or("missing".to_owned(), |value| {
            let text = value.to_string();
            if text.len() <= SHOWN { text } else { format!("a value of {} bytes", text.len()) }
        });
        let key = format!("{}{key}", self.prefix);
        CheckpointError::Value { path: self.path.clone(), key, found, expected: expected.to_owned() }
    }
}
