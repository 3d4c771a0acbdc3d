//! Training of recursive language models with early exits.
