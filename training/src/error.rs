//! Errors of training.

use std::path::{Path, PathBuf};

/// Why training cannot start or continue.
#[derive(Debug, thiserror::Error)]
pub enum TrainingError {
    /// An option is out of range or contradicts another.
    #[error("option `{option}` is {found}, expected {expected}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// Its value.
        found: String,
        /// The values that are valid.
        expected: String,
    },
    /// The options of a run are invalid.
    #[error("{}: {source}", path.display())]
    Description {
        /// The file.
        path: PathBuf,
        /// The key, and the problem.
        source: serde_yaml::Error,
    },
    /// A text has too few tokens for one window.
    #[error("the {role} text has {found} tokens, expected more than the sequence length of {expected}")]
    TextTooShort {
        /// Training or held-out.
        role: &'static str,
        /// Tokens in the text.
        found: usize,
        /// Sequence length.
        expected: usize,
    },
    /// A line of a text is invalid.
    #[error("{}:{line}: found {found}, expected {expected}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What the line contains.
        found: String,
        /// What it should contain.
        expected: String,
    },
    /// The loss is no longer finite.
    #[error("step {step}: the loss is {loss}; lower the learning rate")]
    Diverged {
        /// Step at which that happened.
        step: usize,
        /// The loss.
        loss: f64,
    },
    /// The model's logits are not finite.
    #[error("the logits of tokens {from} to {to} of the text at depth {depth} are not finite")]
    NotFinite {
        /// First token of the window.
        from: usize,
        /// End of the window (exclusive).
        to: usize,
        /// The first depth with such logits.
        depth: usize,
    },
    /// A line of JSON does not match its layout.
    #[error("{}:{line}: {key}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// The key, `the object` for the line as a whole.
        key: String,
        /// The problem: what was found and what was expected.
        message: String,
    },
    /// A file has too few questions.
    #[error("{}: found {found} questions, expected at least {expected}", path.display())]
    TooFewQuestions {
        /// The file.
        path: PathBuf,
        /// Number of questions in the file.
        found: usize,
        /// Number of questions needed.
        expected: usize,
    },
    /// A choice by itself is longer than the model's positions.
    #[error(
        "question {question}: a choice has {tokens} tokens, expected at most the model's {max_positions} positions"
    )]
    ChoiceTooLong {
        /// Index of the question, from 0.
        question: usize,
        /// Number of tokens of the choice.
        tokens: usize,
        /// Number of positions of the model.
        max_positions: usize,
    },
    /// A checkpoint does not belong to this run.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file is not text.
    #[error(transparent)]
    Input(#[from] traces::TraceError),
    /// A model cannot be opened.
    #[error(transparent)]
    Model(#[from] engine::CheckpointError),
    /// The model folder is invalid or cannot be written.
    #[error(transparent)]
    Weights(#[from] engine::WeightsError),
    /// The tokenizer is invalid.
    #[error(transparent)]
    Tokenizer(#[from] engine::TokenizerError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl TrainingError {
    /// The system's error about a file.
    pub(crate) fn in_file(path: &Path, source: impl Into<std::io::Error>) -> Self {
        Self::File { path: path.to_owned(), source: source.into() }
    }
}
