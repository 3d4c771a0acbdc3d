//! The tokenizer of a GGUF file, written as the `tokenizer.json` that its model has: byte-level BPE as in SmolLM2 and
//! Llama 3, or SentencePiece's BPE as in Llama 2 and Gemma. candle rebuilds only the former, and puts a space before
//! every text.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::gguf_header::Header;
use super::keys::Keys;
use super::{CheckpointError, Result};
use crate::tokenizer::Tokenizer;

const MODEL: &str = "tokenizer.ggml.model";
const SPLITTER: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const BEGIN: &str = "tokenizer.ggml.bos_token_id";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
/// How SentencePiece writes a space.
const SPACE: &str = "▁";

// Kinds of tokens, as `tokenizer.ggml.token_type` numbers them.
const NORMAL: f64 = 1.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// What a file says of its tokens.
struct Tokens<'a> {
    header: &'a Header<'a>,
    keys: &'a Keys,
    /// The tokens by id.
    texts: Vec<&'a str>,
    /// Their kinds.
    kinds: Vec<f64>,
}

/// The tokenizer of a GGUF file, if it has one.
pub(super) fn tokenizer(header: &Header, keys: &Keys) -> Result<Option<Tokenizer>> {
    let Some(model) = keys.optional::<String>(MODEL)? else {
        return Ok(None);
    };
    let tokens = Tokens::read(header, keys)?;
    let mut json = match model.as_str() {
        "gpt2" => tokens.byte_level()?,
        "llama" => tokens.sentence_piece()?,
        _ => return Err(keys.refuse(MODEL, "one of gpt2, llama")),
    };
    json["version"] = json!("1.0");
    json["added_tokens"] = tokens.added();
    if keys.optional("tokenizer.ggml.add_bos_token")?.unwrap_or(model == "llama") {
        json["post_processor"] = begin_with(tokens.text_at(BEGIN)?, keys.required(BEGIN)?);
    }
    Ok(Some(Tokenizer::from_json(&json)?))
}

impl<'a> Tokens<'a> {
    fn read(header: &'a Header<'a>, keys: &'a Keys) -> Result<Self> {
        let mut tokens = Self { header, keys, texts: Vec::new(), kinds: Vec::new() };
        tokens.texts = tokens.damaged(header.strings(TOKENS))?.ok_or_else(|| keys.refuse(TOKENS, "an array"))?;
        tokens.kinds = tokens.numbers(TOKEN_TYPES)?;
        Ok(tokens)
    }

    fn damaged<T>(&self, result: Result<T, String>) -> Result<T> {
        result.map_err(|message| CheckpointError::Gguf { path: self.keys.path().to_owned(), message })
    }

    /// An array of a number for each token.
    fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        let numbers = self.damaged(self.header.numbers(key))?.unwrap_or_default();
        match numbers.len() == self.texts.len() {
            true => Ok(numbers),
            false => Err(self.keys.refuse(key, &format!("an array of {}", self.texts.len()))),
        }
    }

    /// The token whose id is at a key.
    fn text_at(&self, key: &str) -> Result<&'a str> {
        let id: usize = self.keys.required(key)?;
        self.texts.get(id).copied().ok_or_else(|| self.keys.refuse(key, &format!("below {}", self.texts.len())))
    }

    fn vocab(&self) -> Map<String, Value> {
        self.texts.iter().zip(0_u32..).map(|(text, id)| ((*text).to_owned(), json!(id))).collect()
    }

    /// Tokens that are found in a text before it is split: SentencePiece's own after spaces are replaced, control
    /// tokens before.
    fn added(&self) -> Value {
        let added = |(id, text): (usize, &&str)| {
            let special = match self.kinds[id] {
                CONTROL => true,
                USER_DEFINED => false,
                _ => return None,
            };
            Some(json!({
                "id": id, "content": text, "special": special, "normalized": !special,
                "single_word": false, "lstrip": false, "rstrip": false,
            }))
        };
        self.texts.iter().enumerate().filter_map(added).collect()
    }

    /// BPE on bytes, within words.
    fn byte_level(&self) -> Result<Value> {
        let byte_level = |use_regex| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let splitter: String = self.keys.optional(SPLITTER)?.unwrap_or("gpt-2".to_owned());
        let (words, whole_words_first) = match splitter.as_str() {
            "gpt-2" => (byte_level(true), false),
            "smollm" => (in_turn([json!({"type": "Digits", "individual_digits": true}), byte_level(true)]), false),
            "llama-bpe" | "llama3" => (in_turn([llama3_words(), byte_level(false)]), true),
            _ => return Err(self.keys.refuse(SPLITTER, "one of gpt-2, smollm, llama-bpe, llama3")),
        };
        let merges = self.damaged(self.header.strings(MERGES))?.ok_or_else(|| self.keys.refuse(MERGES, "an array"))?;
        let merges: Option<Vec<_>> = merges.into_iter().map(|merge| merge.split_once(' ')).collect();
        let merges = merges.ok_or_else(|| self.keys.refuse(MERGES, "two tokens and a space between them each"))?;
        Ok(json!({
            "pre_tokenizer": words,
            "decoder": byte_level(true),
            "model": {
                "type": "BPE", "vocab": self.vocab(), "merges": merges, "ignore_merges": whole_words_first,
            },
        }))
    }

    /// SentencePiece's BPE: on characters with spaces among them, bytes where a character is unknown.
    fn sentence_piece(&self) -> Result<Value> {
        let space_first = self.keys.optional("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let mut normalizers = vec![replace(" ", SPACE)];
        let mut decoders = vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        if space_first {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        Ok(json!({
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "vocab": self.vocab(), "merges": self.merges_by_score()?,
                "unk_token": self.text_at(UNKNOWN)?, "fuse_unk": true, "byte_fallback": true,
            },
        }))
    }

    /// SentencePiece joins the two neighbours whose union has the highest score: every way to cut a token in two is a
    /// merge, the best token's first.
    fn merges_by_score(&self) -> Result<Vec<(&'a str, &'a str)>> {
        let scores = self.numbers(SCORES)?;
        let normal = |(text, kind): (&&'a str, &f64)| (*kind == NORMAL).then_some(*text);
        let texts: Vec<Option<&str>> = self.texts.iter().zip(&self.kinds).map(normal).collect();
        let known: HashMap<&str, usize> =
            texts.iter().enumerate().filter_map(|(id, text)| Some(((*text)?, id))).collect();
        let mut merges = Vec::new();
        for (text, score) in texts.iter().zip(&scores).filter_map(|(text, score)| Some(((*text)?, score))) {
            for (cut, _) in text.char_indices().skip(1) {
                let (left, right) = text.split_at(cut);
                if let (Some(left_id), Some(right_id)) = (known.get(left), known.get(right)) {
                    merges.push((*score, *left_id, *right_id, left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        Ok(merges.into_iter().map(|(_, _, _, left, right)| (left, right)).collect())
    }
}

fn in_turn(pre_tokenizers: [Value; 2]) -> Value {
    json!({"type": "Sequence", "pretokenizers": pre_tokenizers})
}

/// How Llama 3 splits a text into words.
fn llama3_words() -> Value {
    let pattern = concat!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

/// Puts a token before every prompt.
fn begin_with(token: &str, id: usize) -> Value {
    let begin = json!({"SpecialToken": {"id": token, "type_id": 0}});
    let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    json!({
        "type": "TemplateProcessing",
        "single": [begin, text("A")],
        "pair": [begin, text("A"), text("B")],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    })
}
