//! Why training could not go on.

use std::path::{Path, PathBuf};

/// Why training could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainingError {
    /// An option is out of range or contradicts another.
    #[error("option `{option}` is {found}, expected {expected}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// Its value.
        found: String,
        /// What is allowed.
        expected: String,
    },
    /// A run's description does not read.
    #[error("{}: {source}", path.display())]
    Description {
        /// The file.
        path: PathBuf,
        /// Which key, and what is wrong with it.
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
    /// A line of a text is no text.
    #[error("{}:{line}: found {found}, expected {expected}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What the line holds.
        found: String,
        /// What it should hold.
        expected: String,
    },
    /// The loss is no longer a number.
    #[error("step {step}: the loss is {loss}; lower the learning rate")]
    Diverged {
        /// Step at which it happened.
        step: usize,
        /// The loss.
        loss: f64,
    },
    /// The model gives no probabilities.
    #[error("the logits of tokens {from} to {to} of the text at depth {depth} are not finite")]
    NotFinite {
        /// First token of the window.
        from: usize,
        /// Behind its last.
        to: usize,
        /// The first depth that is not finite.
        depth: usize,
    },
    /// A line of JSON does not read as what its layout says.
    #[error("{}:{line}: {key}: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The key, `the object` for the line as a whole.
        key: String,
        /// What was found and what was expected.
        message: String,
    },
    /// A file has too few questions.
    #[error("{}: found {found} questions, expected at least {expected}", path.display())]
    TooFewQuestions {
        /// The file.
        path: PathBuf,
        /// Questions in the file.
        found: usize,
        /// Questions needed.
        expected: usize,
    },
    /// A choice alone is longer than the model's positions.
    #[error(
        "question {question}: a choice has {tokens} tokens, expected at most the model's {max_positions} positions"
    )]
    ChoiceTooLong {
        /// Counted from 0.
        question: usize,
        /// Tokens of the choice.
        tokens: usize,
        /// Positions of the model.
        max_positions: usize,
    },
    /// A checkpoint does not belong to this run.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is no text.
    #[error(transparent)]
    Input(#[from] traces::TraceError),
    /// A model could not be opened.
    #[error(transparent)]
    Model(#[from] engine::checkpoint::CheckpointError),
    /// The model folder was refused or could not be written.
    #[error(transparent)]
    Weights(#[from] engine::weights::WeightsError),
    /// The tokenizer was refused.
    #[error(transparent)]
    Tokenizer(#[from] engine::tokenizer::TokenizerError),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl TrainingError {
    /// What the system said of a file.
    pub(crate) fn in_file(path: &Path, source: impl Into<std::io::Error>) -> Self {
        Self::File { path: path.to_owned(), source: source.into() }
    }
}
