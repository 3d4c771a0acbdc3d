//! A tokenized text, and the windows of it that training and evaluation read.
//!
//! Documents are packed: their tokens form one stream, with the tokenizer's separator token between them if it has one.
//! Windows are cut from the stream without regard to document boundaries. Within a window, attention crosses from one
//! document into the next, as in the training of GPT-2, GPT-NeoX and Llama.

mod cache;
mod documents;

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use engine::Tokenizer;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::error::TrainingError;
use cache::{CachedTokens, Encoding};

/// Texts for training and evaluation. A path is a file or a folder; a folder stands for the `.txt` and `.jsonl` files
/// in it and its subfolders, by name. A `.jsonl` file has one document per line; any other file is one document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataOptions {
    /// Files and folders to train on.
    pub text: Vec<PathBuf>,
    /// Files and folders to evaluate on, never trained on.
    pub held_out: Vec<PathBuf>,
    /// Maximum number of held-out tokens; all tokens by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out_tokens: Option<usize>,
    /// JSON key of a document's text.
    pub field: String,
    /// Token to put after each document, such as `<|endoftext|>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_of_document: Option<String>,
    /// Folder of the token cache.
    pub cache: PathBuf,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            text: Vec::new(),
            held_out: Vec::new(),
            held_out_tokens: None,
            field: "text".to_owned(),
            end_of_document: None,
            cache: PathBuf::from("results/tokens"),
        }
    }
}

impl DataOptions {
    /// The training text and the held-out text, tokenized or from the cache. Each must be longer than `seq` tokens.
    /// Calls `report` with every file before it is tokenized.
    ///
    /// # Errors
    /// If a file cannot be read or is not text, the tokenizer lacks the separator token, a text is too short, or the
    /// cache is damaged or cannot be written.
    pub fn load(
        &self,
        tokenizer: &Tokenizer,
        seq: usize,
        report: &mut dyn FnMut(&Path),
    ) -> Result<(Corpus, Corpus), TrainingError> {
        let unknown = |token: &String| TrainingError::Option {
            option: "end_of_document",
            found: format!("`{token}`"),
            expected: "a token of the tokenizer".to_owned(),
        };
        let end = self.end_of_document.as_ref();
        let end_of_document = end.map(|token| tokenizer.id_of(token).ok_or_else(|| unknown(token))).transpose()?;
        let encoding = Encoding { field: &self.field, tokenizer, end_of_document };
        let mut load = |paths: &[PathBuf], role| {
            let cached = CachedTokens::open(&self.cache, &documents::files(paths)?, &encoding, report)?;
            Corpus { bytes: cached.bytes(), tokens: Tokens::Cached(cached) }.longer_than(seq, role)
        };
        let (text, held_out) = (load(&self.text, "training")?, load(&self.held_out, "held-out")?);
        let held_out = match self.held_out_tokens {
            Some(tokens) => held_out.start(tokens, tokenizer)?.longer_than(seq, "held-out")?,
            None => held_out,
        };
        Ok((text, held_out))
    }

    /// The training text.
    ///
    /// # Errors
    /// If a file cannot be read or is not text.
    pub fn read_text(&self) -> Result<String, TrainingError> {
        let mut text = String::new();
        for path in documents::files(&self.text)? {
            documents::read(&path, &self.field, |document| {
                text += document;
                Ok(())
            })?;
        }
        Ok(text)
    }
}

/// A text as token ids.
#[derive(Debug)]
pub struct Corpus {
    tokens: Tokens,
    bytes: usize,
}

#[derive(Debug)]
enum Tokens {
    Held(Vec<u32>),
    Cached(CachedTokens),
}

impl Corpus {
    /// Tokenizes a text, which must be longer than `seq` tokens. `role` names the text in the error.
    ///
    /// # Errors
    /// If the text is too short or the tokenizer rejects it.
    pub fn new(text: &str, tokenizer: &Tokenizer, seq: usize, role: &'static str) -> Result<Self, TrainingError> {
        let tokens = Tokens::Held(cache::encode(text, tokenizer)?);
        Self { tokens, bytes: text.len() }.longer_than(seq, role)
    }

    fn longer_than(self, seq: usize, role: &'static str) -> Result<Self, TrainingError> {
        let found = self.tokens().len();
        if found <= seq {
            return Err(TrainingError::TextTooShort { role, found, expected: seq });
        }
        Ok(self)
    }

    /// The first `tokens` tokens, or all if there are fewer.
    ///
    /// # Errors
    /// If the tokenizer does not know a token.
    pub fn start(&self, tokens: usize, tokenizer: &Tokenizer) -> Result<Self, TrainingError> {
        let tokens = self.tokens().iter().copied().take(tokens).collect::<Vec<_>>();
        let bytes = tokenizer.decode(&tokens)?.len();
        Ok(Self { tokens: Tokens::Held(tokens), bytes })
    }

    /// Token ids of the text.
    pub fn tokens(&self) -> &[u32] {
        match &self.tokens {
            Tokens::Held(tokens) => tokens,
            Tokens::Cached(cached) => cached.tokens(),
        }
    }

    /// Length of the text before tokenization, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// `batch` windows of `seq + 1` tokens from uniformly random positions, which depend only on `seed` and `step`.
    pub fn batch(&self, batch: usize, seq: usize, seed: u64, step: usize) -> Vec<&[u32]> {
        // Multiplying by an odd number separates the random streams of neighbouring seeds and steps.
        let stream = (seed ^ 0x5851_F42D_4C95_7F2D).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut rng = StdRng::seed_from_u64(stream.wrapping_add(step as u64));
        let tokens = self.tokens();
        let last_start = tokens.len() - seq - 1;
        (0..batch)
            .map(|_| {
                let start = rng.random_range(0..=last_start);
                &tokens[start..=start + seq]
            })
            .collect()
    }
}

/// Splits windows of `seq + 1` tokens into the model's inputs `[windows, seq]` and the following tokens `[windows *
/// seq]`, on the model's device.
///
/// # Errors
/// If the windows differ in length.
pub fn inputs_and_targets(windows: &[impl AsRef<[u32]>], device: &Device) -> candle_core::Result<(Tensor, Tensor)> {
    let windows: Vec<&[u32]> = windows.iter().map(AsRef::as_ref).collect();
    let seq = windows.first().map_or(0, |window| window.len() - 1);
    let inputs: Vec<u32> = windows.iter().flat_map(|w| &w[..w.len() - 1]).copied().collect();
    let targets: Vec<u32> = windows.iter().flat_map(|w| &w[1..]).copied().collect();
    let targets = Tensor::new(targets, device)?;
    Ok((Tensor::from_vec(inputs, (windows.len(), seq), device)?, targets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_depend_on_seed_and_step_and_stay_within_the_text() {
        let tokenizer = Tokenizer::train("abc", 256).unwrap();
        let corpus = Corpus::new("abcdefghij", &tokenizer, 8, "training").unwrap();
        assert_eq!(corpus.batch(3, 8, 1, 5), corpus.batch(3, 8, 1, 5));
        assert_ne!(corpus.batch(9, 4, 1, 5), corpus.batch(9, 4, 1, 6));
        assert_ne!(corpus.batch(9, 4, 1, 5), corpus.batch(9, 4, 2, 5));
        let starts: Vec<u32> = corpus.batch(64, 8, 1, 0).iter().map(|w| w[0]).collect();
        for start in &corpus.tokens()[..2] {
            assert!(starts.contains(start));
        }
    }

    #[test]
    fn targets_are_the_tokens_after_the_inputs() {
        let (inputs, targets) = inputs_and_targets(&[&[1, 2, 3], &[4, 5, 6]], &Device::Cpu).unwrap();
        assert_eq!(inputs.to_vec2::<u32>().unwrap(), [[1, 2], [4, 5]]);
        assert_eq!(targets.to_vec1::<u32>().unwrap(), [2, 3, 5, 6]);
    }

    #[test]
    fn a_text_shorter_than_a_window_is_refused() {
        let tokenizer = Tokenizer::train("abc", 256).unwrap();
        let error = Corpus::new("abc", &tokenizer, 3, "held-out").unwrap_err();
        let message = error.to_string();
        assert!(message.contains("the held-out text has 3 tokens"), "{message}");
    }

    #[test]
    fn the_start_of_a_text_counts_its_own_bytes() {
        let tokenizer = Tokenizer::train("abc", 256).unwrap();
        let corpus = Corpus::new("abcdefghij", &tokenizer, 8, "held-out").unwrap();
        let start = corpus.start(4, &tokenizer).unwrap();
        assert_eq!((start.tokens(), start.bytes()), (&corpus.tokens()[..4], 4));
    }

    #[test]
    fn files_are_packed_with_the_end_of_document_between_them() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a.txt"), folder.path().join("b.txt"));
        std::fs::write(&a, "abc").unwrap();
        std::fs::write(&b, "de").unwrap();
        let tokenizer = Tokenizer::train("abc", 256).unwrap();
        let id = |text: &str| tokenizer.id_of(text).unwrap();
        let mut options = DataOptions {
            text: vec![a, b.clone()],
            held_out: vec![b],
            held_out_tokens: Some(2),
            end_of_document: Some("!".to_owned()),
            cache: folder.path().join("cache"),
            ..DataOptions::default()
        };
        let (text, held_out) = options.load(&tokenizer, 1, &mut |_| {}).unwrap();
        assert_eq!(text.tokens(), ["a", "b", "c", "!", "d", "e", "!"].map(id));
        assert_eq!((held_out.tokens(), held_out.bytes()), (&["d", "e"].map(id)[..], 2));
        options.end_of_document = Some("<|end|>".to_owned());
        let message = options.load(&tokenizer, 1, &mut |_| {}).unwrap_err().to_string();
        assert!(message.contains("`end_of_document` is `<|end|>`, expected a token of the tokenizer"), "{message}");
    }
}
