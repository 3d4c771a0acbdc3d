//! Text to token ids and back, a thin wrapper of the `tokenizers` crate: byte-level byte-pair encodings trained here, and
//! those of other models.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{Encoding, Token};
use traces::catch_panic;

use crate::checkpoint::contents;
use crate::weights::write_then_rename;

/// Turns text into token ids and back without loss.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    library: tokenizers::Tokenizer,
    model: Option<Model>,
}

/// The model that reads the tokens.
#[derive(Clone, Debug)]
struct Model {
    name: String,
    /// Rows of its embedding.
    rows: usize,
}

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
    /// A text has a token that the model's embedding lacks.
    #[error(
        "{model}: token `{token}` ({id}) of the tokenizer is beyond the embedding, which has {rows} rows: add rows to \
         the embedding (`resize_token_embeddings` of transformers), or remove the token from tokenizer.json"
    )]
    BeyondEmbedding {
        /// The model.
        model: String,
        /// The token's text.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the model's embedding.
        rows: usize,
    },
    /// The post-processor puts tokens around nothing.
    #[error("tokenizer: its post-processor drops the text")]
    NoText,
    /// The library refused.
    #[error("tokenizer: {0}")]
    Library(tokenizers::Error),
    /// The library panicked, as it does at some files whose parts do not fit together.
    #[error("tokenizer: the library cannot work with its tokenizer.json, whose parts do not fit together: {0}")]
    Panicked(String),
}

/// The parts of a `tokenizer.json` at whose syntax errors the library panics.
#[derive(Deserialize)]
struct Parts {
    #[serde(default, rename = "normalizer")]
    _normalizer: Value,
    #[serde(default, rename = "pre_tokenizer")]
    _pre_tokenizer: Value,
    #[serde(default, rename = "post_processor")]
    _post_processor: Value,
    #[serde(default, rename = "decoder")]
    _decoder: Value,
    model: Option<ModelKind>,
    #[serde(default)]
    added_tokens: Value,
}

/// The kind of a tokenizer's model; files of the first versions do not name it.
#[derive(Deserialize)]
struct ModelKind {
    #[serde(rename = "type")]
    name: Option<String>,
}

impl Parts {
    const MODELS: [&str; 4] = ["BPE", "WordPiece", "WordLevel", "Unigram"];

    /// Why the library would refuse the model, in words.
    fn problem(&self) -> Option<String> {
        let Some(ModelKind { name }) = &self.model else {
            return Some("found no `model`, expected a tokenizer.json of the library `tokenizers`".to_owned());
        };
        let other = name.as_ref().filter(|name| !Self::MODELS.contains(&name.as_str()))?;
        Some(format!("model.type: found `{other}`, expected one of {}", Self::MODELS.join(", ")))
    }

    /// Ids and texts of the tokens that the file adds to the model's.
    fn added(&self) -> impl Iterator<Item = (u64, &str)> {
        let tokens = self.added_tokens.as_array().into_iter().flatten();
        tokens.filter_map(|token| Some((token.get("id")?.as_u64()?, token.get("content")?.as_str()?)))
    }
}

/// Calls the library. Its panics become errors.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
    catch_panic(call).map_err(TokenizerError::Panicked)?.map_err(TokenizerError::Library)
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
        Ok(Self { library: tokenizer, model: None })
    }

    /// Loads a `tokenizer.json`. Truncation and padding, which trainers save with it, are reset, as in transformers. So is
    /// the dropout of merges, with a warning: with it, a text has other tokens each time.
    ///
    /// # Errors
    /// If the file is unreadable or no tokenizer.
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        let failed = |message| TokenizerError::Load { path: path.to_owned(), message };
        let bytes = contents::read(path).map_err(|error| failed(error.to_string()))?;
        let parts: Parts = serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))?;
        if let Some(problem) = parts.problem() {
            return Err(failed(problem));
        }
        let mut tokenizer = Self::of_library(&bytes).map_err(|error| failed(error.to_string()))?;
        if let Some(dropout) = tokenizer.reset_dropout() {
            log::warn!(
                "{}: model.dropout is {dropout}: not applied, so that a text has the same tokens",
                path.display()
            );
        }
        let ids = parts.added().filter_map(|(id, token)| Some((id, token, tokenizer.id_of(token)?)));
        if let Some((id, token, given)) = ids.into_iter().find(|(id, _, given)| u64::from(*given) != *id) {
            log::warn!(
                "{}: added_tokens: `{token}` has the id {id}, but gets {given}, as in transformers: ids before it are \
                 missing, or the model's vocabulary has the token",
                path.display()
            );
        }
        Ok(tokenizer)
    }

    /// The tokenizer that the text of a `tokenizer.json` describes.
    pub(crate) fn from_bytes(json: &[u8]) -> Result<Self, TokenizerError> {
        serde_json::from_slice::<Parts>(json).map_err(|error| TokenizerError::Library(error.into()))?;
        Self::of_library(json)
    }

    /// What the library makes of a text that has [`Parts`].
    fn of_library(json: &[u8]) -> Result<Self, TokenizerError> {
        let mut library = guarded(|| tokenizers::Tokenizer::from_bytes(json))?;
        library.with_truncation(None).map_err(TokenizerError::Library)?.with_padding(None);
        Ok(Self { library, model: None })
    }

    /// Sets the share of merges that are left out at random to zero, and returns what it was if it was more.
    fn reset_dropout(&mut self) -> Option<f32> {
        let ModelWrapper::BPE(model) = self.library.get_model() else { return None };
        let dropout = model.dropout.filter(|dropout| *dropout > 0.0)?;
        let mut model = model.clone();
        model.dropout = None;
        self.library.with_model(model);
        Some(dropout)
    }

    /// This tokenizer for a model whose embedding has `rows` rows: texts with tokens beyond them are refused.
    ///
    /// # Errors
    /// If a token that begins every sequence is beyond the embedding.
    pub(crate) fn for_model(mut self, name: &Path, rows: usize) -> Result<Self, TokenizerError> {
        self.model = Some(Model { name: name.display().to_string(), rows });
        self.begin()?;
        let vocabulary = self.library.get_vocab(true);
        let beyond = vocabulary.into_iter().filter(|(_, id)| *id as usize >= rows);
        if let Some((token, id)) = beyond.min_by_key(|(_, id)| *id) {
            log::warn!(
                "{}: tokens of the tokenizer from `{token}` ({id}) on are beyond the embedding, which has {rows} \
                 rows; a text with one of them is refused",
                name.display()
            );
        }
        Ok(self)
    }

    /// Writes a `tokenizer.json`, completely or not at all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), TokenizerError> {
        let json = self.to_json()?;
        let failed = |error: std::io::Error| TokenizerError::Save { path: path.to_owned(), message: error.to_string() };
        write_then_rename(path, |part| std::fs::write(part, &json)).map_err(failed)
    }

    /// Token ids of a text.
    ///
    /// # Errors
    /// If the library refuses the text, or the model's embedding lacks one of its tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = guarded(|| self.library.encode_fast(text, false))?;
        self.known(encoding.get_ids().to_vec())
    }

    /// Token ids of a text that begins a sequence: as [`Tokenizer::encode`], after [`Tokenizer::begin`]. Tokens that
    /// the tokenizer's template puts after a text, such as `</s>`, are left out: the text goes on.
    ///
    /// # Errors
    /// As for [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        Ok([self.begin()?, self.encode(text)?].concat())
    }

    /// The tokens that the tokenizer's template puts before a text, such as Gemma's `<bos>`; often none, or one.
    ///
    /// # Errors
    /// If the template drops the text, or the model's embedding lacks one of the tokens.
    pub fn begin(&self) -> Result<Vec<u32>, TokenizerError> {
        // No vocabulary has this id.
        const TEXT: u32 = u32::MAX;
        let text = Encoding::from_tokens(vec![Token::new(TEXT, "a".to_owned(), (0, 1))], 0);
        let around = guarded(|| self.library.post_process(text, None, true))?;
        let mut ids = around.get_ids().to_vec();
        ids.truncate(ids.iter().position(|id| *id == TEXT).ok_or(TokenizerError::NoText)?);
        self.known(ids)
    }

    /// The ids, if the model's embedding has a row for each.
    fn known(&self, ids: Vec<u32>) -> Result<Vec<u32>, TokenizerError> {
        let Some(Model { name, rows }) = &self.model else { return Ok(ids) };
        match ids.iter().find(|id| **id as usize >= *rows) {
            None => Ok(ids),
            Some(&id) => {
                let token = self.library.id_to_token(id).unwrap_or_default();
                Err(TokenizerError::BeyondEmbedding { model: name.clone(), token, id, rows: *rows })
            }
        }
    }

    /// Whether a token is no text but a sign of the tokenizer's own, such as `<|endoftext|>` or `<|im_end|>`.
    pub fn is_special(&self, id: u32) -> bool {
        let token = self.library.id_to_token(id).unwrap_or_default();
        self.library.get_added_vocabulary().is_special_token(&token)
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
        guarded(|| self.library.decode(ids, false))
    }

    /// Begins a text whose tokens come one after the other.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream(self.library.decode_stream(false))
    }

    /// Id of a token by its own text, such as `<|endoftext|>`, if it is known.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.library.token_to_id(token)
    }

    /// The text of its `tokenizer.json`.
    ///
    /// # Errors
    /// If the library refuses.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        self.library.to_string(false).map_err(TokenizerError::Library)
    }

    /// Number of tokens known.
    pub fn vocab_size(&self) -> usize {
        self.library.get_vocab_size(true)
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
        guarded(|| self.0.step(id))
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
