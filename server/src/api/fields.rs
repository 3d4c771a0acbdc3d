//! The keys of a request, taken one by one, so that an error names the key, what was found and what was expected.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;

/// Longest part of a value that an error shows, in bytes.
const SHOWN: usize = 80;

/// Keys that change nothing that the server does.
const IGNORED: [&str; 8] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "add_special_tokens",
];

/// The keys that have not been taken.
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// What stands before a key in an error.
    prefix: &'static str,
}

impl Fields {
    /// The keys of a JSON object.
    ///
    /// # Errors
    /// If the body is not one.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let text = std::str::from_utf8(body).map_err(|error| {
            ApiError::invalid(format!(
                "the body: found a byte that is no UTF-8 at {}, expected JSON",
                error.valid_up_to()
            ))
        })?;
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Self { map, prefix: "" }),
            Ok(other) => Err(ApiError::invalid(format!("the body: found {}, expected an object", shown(&other)))),
            Err(error) => Err(ApiError::invalid(format!("the body is no JSON: {error}"))),
        }
    }

    /// The keys of the object at a key; no keys if there is none.
    ///
    /// # Errors
    /// If the value is no object.
    pub fn take_object(&mut self, name: &'static str) -> Result<Self, ApiError> {
        let map: Option<Map<String, Value>> = self.take(name, "an object")?;
        Ok(Self { map: map.unwrap_or_default(), prefix: name })
    }

    /// The value of a key; `None` if it is missing or null.
    ///
    /// # Errors
    /// If it has another type than `expected` says.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        self.take_if(name, expected, |_| true)
    }

    /// As [`take`](Self::take), of a value that meets a condition.
    ///
    /// # Errors
    /// If it does not.
    pub fn take_if<T: DeserializeOwned>(
        &mut self,
        name: &str,
        expected: &str,
        is_valid: impl FnOnce(&T) -> bool,
    ) -> Result<Option<T>, ApiError> {
        match self.map.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match <T as Deserialize>::deserialize(&value) {
                Ok(read) if is_valid(&read) => Ok(Some(read)),
                _ => Err(ApiError::key(&self.path(name), shown(&value), expected)),
            },
        }
    }

    /// Takes a key that may only have the values at which it changes nothing.
    ///
    /// # Errors
    /// If it has another.
    pub fn take_neutral(&mut self, name: &str, neutral: &[Value]) -> Result<(), ApiError> {
        match self.map.remove(name) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if neutral.iter().any(|allowed| is_equal(allowed, &value)) => Ok(()),
            Some(value) => {
                let allowed: Vec<String> = neutral.iter().map(Value::to_string).collect();
                let expected = match allowed.is_empty() {
                    true => "no such key: this server does not support it".to_owned(),
                    false => format!("{}: this server does not support it otherwise", allowed.join(" or ")),
                };
                Err(ApiError::key(&self.path(name), shown(&value), expected))
            }
        }
    }

    /// Refuses keys that were not taken.
    ///
    /// # Errors
    /// If there is one that is not ignored.
    pub fn finish(self) -> Result<(), ApiError> {
        let unknown = self.map.keys().find(|key| !IGNORED.contains(&key.as_str()));
        match unknown {
            None => Ok(()),
            Some(key) => {
                Err(ApiError::key(&self.path(key), "a key that this server does not know", "only those it knows"))
            }
        }
    }

    fn path(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}

/// Whether two values are equal, numbers by their value.
fn is_equal(a: &Value, b: &Value) -> bool {
    a == b || a.as_f64().is_some_and(|number| Some(number) == b.as_f64())
}

/// A value as an error shows it: its beginning.
pub(crate) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message<T>(result: Result<T, ApiError>) -> String {
        let body = result.err().expect("an error").body();
        body["error"]["message"].as_str().unwrap().to_owned()
    }

    #[test]
    fn wrong_values_are_named_with_what_was_expected() {
        let mut fields =
            Fields::parse(br#"{"n": "two", "top_p": 1.5, "x": 1, "a": null, "b": {"c": []}, "d": 0.0}"#).unwrap();
        assert_eq!(message(fields.take::<u32>("n", "a whole number")), "n: found \"two\", expected a whole number");
        let refused = fields.take_if::<f64>("top_p", "0 to 1", |share| *share <= 1.0);
        assert_eq!(message(refused), "top_p: found 1.5, expected 0 to 1");
        assert_eq!(fields.take::<u32>("a", "a number").unwrap(), None);
        let mut inner = fields.take_object("b").unwrap();
        assert_eq!(message(inner.take::<String>("c", "a text")), "b.c: found [], expected a text");
        fields.take_neutral("d", &[0.into()]).unwrap();
        assert!(message(fields.finish()).starts_with("x: found a key that this server does not know"));
        let mut fields = Fields::parse(br#"{"d": 0.5, "e": {}, "user": "me"}"#).unwrap();
        assert!(message(fields.take_neutral("d", &[0.into()])).starts_with("d: found 0.5, expected 0"));
        assert!(message(fields.take_neutral("e", &[])).starts_with("e: found {}, expected no such key"));
        fields.finish().unwrap();
    }

    #[test]
    fn bodies_that_are_no_objects_are_refused() {
        assert!(message(Fields::parse(b"{\"a\": ")).starts_with("the body is no JSON: EOF"));
        assert_eq!(message(Fields::parse(b"[1]")), "the body: found [1], expected an object");
        assert!(message(Fields::parse(b"{\"a\": \"\xff\"}")).contains("no UTF-8 at 7"));
        let deep = "[".repeat(100_000);
        assert!(message(Fields::parse(deep.as_bytes())).contains("recursion limit"));
        let long = format!("[\"{}\"]", "é".repeat(500));
        assert!(message(Fields::parse(long.as_bytes())).len() < 300);
    }
}
