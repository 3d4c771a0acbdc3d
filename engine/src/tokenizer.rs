//! Text to token ids and back, a thin wrapper of the `tokenizers` crate: byte-level byte-pair encodings trained here, and
//! those of other models.

use std::path::{Path, PathBuf};

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// Turns text into token ids and back without loss.
#[derive(Clone, Debug)]
pub struct Tokenizer(tokenizers::Tokenizer);

/// Why a tokenizer could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file is unreadable or no tokenizer.
    #[error("{}: cannot load the tokenizer: {message}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What the library said.
        message: String,
    },
    /// The file could not be written.
    #[error("{}: cannot write the tokenizer: {message}", path.display())]
    Save {
        /// The file.
        path: PathBuf,
        /// What the library or the system said.
        message: String,
    },
    /// Training cannot give the vocabulary asked for.
    #[error("tokenizer: trained to {found} tokens, expected {expected}: {reason}")]
    VocabSize {
        /// Tokens the text gave.
        found: usize,
        /// Tokens asked for.
        expected: usize,
        /// Why they differ.
        reason: &'static str,
    },
    /// An id is not in the vocabulary.
    #[error("tokenizer: token id {id} is unknown, expected below {vocab_size}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Number of tokens known.
        vocab_size: usize,
    },
    /// The library refused.
    #[error("tokenizer: {0}")]
    Library(tokenizers::Error),
}

impl Tokenizer {
    /// Learns `vocab_size` tokens from a text: the 256 bytes and the most useful merges.
    ///
    /// # Errors
    /// If `vocab_size` is below 256 or the text has too few different pairs for it.
    pub fn train(text: &str, vocab_size: usize) -> Result<Self, TokenizerError> {
        let refuse = |found, reason| TokenizerError::VocabSize { found, expected: vocab_size, reason };
        if vocab_size < 256 {
            return Err(refuse(256, "every byte is a token"));
        }
        let byte_level = ByteLevel::new(false, false, true);
        let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
        let mut trainer: TrainerWrapper = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build()
            .into();
        tokenizer.train(&mut trainer, text.split_inclusive('\n')).map_err(TokenizerError::Library)?;
        let found = tokenizer.get_vocab_size(true);
        if found != vocab_size {
            return Err(refuse(found, "the text has too few different pairs"));
        }
        Ok(Self(tokenizer))
    }

    /// Loads a `tokenizer.json`.
    ///
    /// # Errors
    /// If the file is unreadable or no tokenizer.
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        let loaded = tokenizers::Tokenizer::from_file(path);
        loaded.map(Self).map_err(|e| TokenizerError::Load { path: path.to_owned(), message: e.to_string() })
    }

    /// The tokenizer that a `tokenizer.json` describes.
    pub(crate) fn from_json(json: &serde_json::Value) -> Result<Self, TokenizerError> {
        tokenizers::Tokenizer::from_bytes(json.to_string()).map(Self).map_err(TokenizerError::Library)
    }

    /// Writes a `tokenizer.json`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), TokenizerError> {
        self.0.save(path, false).map_err(|e| TokenizerError::Save { path: path.to_owned(), message: e.to_string() })
    }

    /// Token ids of a text.
    ///
    /// # Errors
    /// If the library refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.0.encode_fast(text, false);
        Ok(encoding.map_err(TokenizerError::Library)?.get_ids().to_vec())
    }

    /// Token ids of a text that begins a sequence: as [`Tokenizer::encode`], with the tokens that the model was trained
    /// to find around it, such as Gemma's `<bos>`.
    ///
    /// # Errors
    /// If the library refuses the text.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.0.encode_fast(text, true);
        Ok(encoding.map_err(TokenizerError::Library)?.get_ids().to_vec())
    }

    /// The tokens that [`Tokenizer::encode_prompt`] puts before a text; often none, or one.
    ///
    /// # Errors
    /// If the library refuses.
    pub fn begin(&self) -> Result<Vec<u32>, TokenizerError> {
        const TEXT: &str = "a";
        let (text, mut prompt) = (self.encode(TEXT)?, self.encode_prompt(TEXT)?);
        let before = (0..prompt.len()).find(|&at| prompt[at..].starts_with(&text)).unwrap_or(0);
        prompt.truncate(before);
        Ok(prompt)
    }

    /// Whether a token is no text but a sign of the tokenizer's own, such as `<|endoftext|>` or `<|im_end|>`.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.get_added_vocabulary().is_special_token(&self.0.id_to_token(id).unwrap_or_default())
    }

    /// Text of token ids. Bytes that are no UTF-8, as when a character is cut, become U+FFFD.
    ///
    /// # Errors
    /// If an id is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let vocab_size = self.vocab_size();
        if let Some(&id) = ids.iter().find(|id| **id as usize >= vocab_size) {
            return Err(TokenizerError::UnknownToken { id, vocab_size });
        }
        self.0.decode(ids, false).map_err(TokenizerError::Library)
    }

    /// Begins a text whose tokens come one after the other.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream(self.0.decode_stream(false))
    }

    /// Id of a token by its own text, such as `<|endoftext|>`, if it is known.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    /// The text of its `tokenizer.json`.
    ///
    /// # Errors
    /// If the library refuses.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        self.0.to_string(false).map_err(TokenizerError::Library)
    }

    /// Number of tokens known.
    pub fn vocab_size(&self) -> usize {
        self.0.get_vocab_size(true)
    }
}

/// Text of tokens that come one after the other.
pub struct TextStream<'a>(Decoding<'a>);

type Decoding<'a> = tokenizers::DecodeStream<
    'a,
    tokenizers::models::ModelWrapper,
    tokenizers::normalizers::NormalizerWrapper,
    tokenizers::pre_tokenizers::PreTokenizerWrapper,
    tokenizers::processors::PostProcessorWrapper,
    tokenizers::decoders::DecoderWrapper,
>;

impl TextStream<'_> {
    /// What the text gains by a token: none while its last character lacks bytes.
    ///
    /// # Errors
    /// If the library refuses the token.
    pub fn push(&mut self, id: u32) -> Result<Option<String>, TokenizerError> {
        self.0.step(id).map_err(TokenizerError::Library)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "And the earth was without form, and void; and darkness was upon the face \
                        of the deep. And the Spirit of God moved upon the face of the waters.\n";

    #[test]
    fn any_text_comes_back_from_its_tokens() {
        let tokenizer = Tokenizer::train(TEXT, 280).unwrap();
        for text in [TEXT, "", "  two  spaces\n\n", "naïve ☃ 日本\u{0}"] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
        assert!(tokenizer.encode(TEXT).unwrap().len() < TEXT.len());
    }

    #[test]
    fn a_stream_gives_the_text_character_by_character_and_waits_for_those_of_several_tokens() {
        let tokenizer = Tokenizer::train(TEXT, 256).unwrap();
        let mut stream = tokenizer.stream();
        let parts: Vec<_> = tokenizer.encode("a ☃.").unwrap().iter().map(|&id| stream.push(id).unwrap()).collect();
        let parts: Vec<_> = parts.iter().map(Option::as_deref).collect();
        assert_eq!(parts, [Some("a"), Some(" "), None, None, Some("☃"), Some(".")]);
    }

    #[test]
    fn a_saved_tokenizer_loads_to_the_same_ids() {
        let tokenizer = Tokenizer::train(TEXT, 280).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        tokenizer.save(&path).unwrap();
        let loaded = Tokenizer::load(&path).unwrap();
        assert_eq!(loaded.encode(TEXT).unwrap(), tokenizer.encode(TEXT).unwrap());
    }

    #[test]
    fn impossible_vocabularies_and_unknown_tokens_are_refused() {
        let message = Tokenizer::train(TEXT, 100).unwrap_err().to_string();
        assert!(message.contains("expected 100"), "{message}");
        let message = Tokenizer::train("aa", 300).unwrap_err().to_string();
        assert!(message.contains("too few different pairs"), "{message}");
        let tokenizer = Tokenizer::train(TEXT, 260).unwrap();
        let message = tokenizer.decode(&[260]).unwrap_err().to_string();
        assert!(message.contains("token id 260 is unknown"), "{message}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let message = Tokenizer::load(Path::new("no/such.json")).unwrap_err().to_string();
        assert!(message.contains("no/such.json"), "{message}");
    }
}
