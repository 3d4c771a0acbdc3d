//! Requests and answers of the HTTP interface, in OpenAI's form.

pub(crate) mod answers;
pub(crate) mod error;
pub(crate) mod fields;
pub(crate) mod wishes;
