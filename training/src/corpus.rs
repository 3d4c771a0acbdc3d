//! A tokenized text, and the windows of it that training and evaluation look at.

use candle_core::{Device, Tensor};
use engine::tokenizer::Tokenizer;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::error::TrainingError;

/// A text as token ids.
#[derive(Clone, Debug)]
pub struct Corpus {
    tokens: Vec<u32>,
    bytes: usize,
}

impl Corpus {
    /// Tokenizes a text, which must be longer than `seq` tokens; `role` names it in the error.
    ///
    /// # Errors
    /// If the text is too short or the tokenizer refuses it.
    pub fn new(text: &str, tokenizer: &Tokenizer, seq: usize, role: &'static str) -> Result<Self, TrainingError> {
        let mut tokens = Vec::new();
        for line in text.split_inclusive('\n') {
            tokens.extend(tokenizer.encode(line)?);
        }
        if tokens.len() <= seq {
            return Err(TrainingError::TextTooShort { role, found: tokens.len(), expected: seq });
        }
        Ok(Self { tokens, bytes: text.len() })
    }

    /// The text's token ids.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The text's length before tokenization.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// `batch` windows of `seq + 1` tokens from uniformly random places, the same for the same
    /// `seed` and `step`.
    pub fn batch(&self, batch: usize, seq: usize, seed: u64, step: usize) -> Vec<&[u32]> {
        // Multiplying by an odd number keeps the streams of neighbouring seeds and steps apart.
        let stream = (seed ^ 0x5851_F42D_4C95_7F2D).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut rng = StdRng::seed_from_u64(stream.wrapping_add(step as u64));
        let last_start = self.tokens.len() - seq - 1;
        (0..batch)
            .map(|_| {
                let start = rng.random_range(0..=last_start);
                &self.tokens[start..=start + seq]
            })
            .collect()
    }
}

/// Windows of `seq + 1` tokens as the model's inputs `[windows, seq]` and the tokens that follow
/// them `[windows * seq]`.
///
/// # Errors
/// If the windows differ in length.
pub fn inputs_and_targets(windows: &[&[u32]]) -> candle_core::Result<(Tensor, Tensor)> {
    let seq = windows.first().map_or(0, |window| window.len() - 1);
    let inputs: Vec<u32> = windows.iter().flat_map(|w| &w[..w.len() - 1]).copied().collect();
    let targets: Vec<u32> = windows.iter().flat_map(|w| &w[1..]).copied().collect();
    let targets = Tensor::new(targets, &Device::Cpu)?;
    Ok((Tensor::from_vec(inputs, (windows.len(), seq), &Device::Cpu)?, targets))
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
        let (inputs, targets) = inputs_and_targets(&[&[1, 2, 3], &[4, 5, 6]]).unwrap();
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
}
