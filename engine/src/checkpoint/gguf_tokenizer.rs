//! The tokenizer of a GGUF file, written as the `tokenizer.json` that its model has: byte-level BPE as in SmolLM2 and
//! Llama 3, or SentencePiece's BPE as in Llama 2 and Gemma. candle rebuilds only the former, and puts a space before
//! every text.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::gguf_header::Header;
use super::keys::Keys;
use super::pre_tokenizers::{DEFAULT, PRE_TOKENIZERS, PreTokenizer};
use super::{CheckpointError, Result};
use crate::tokenizer::{Tokenizer, TokenizerError};

const MODEL: &str = "tokenizer.ggml.model";
const SPLITTER: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const BEGIN: &str = "tokenizer.ggml.bos_token_id";
const UNKNOWN: &str = "tokenizer.ggml.unknown_token_id";
const ADD_BEGIN: &str = "tokenizer.ggml.add_bos_token";
/// How SentencePiece writes a space.
const SPACE: &str = "▁";

// Kinds of tokens, as `tokenizer.ggml.token_type` numbers them.
const NORMAL: f64 = 1.0;
const UNKNOWN_KIND: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// Tokens that end a text and are control tokens, whatever kind a file gives them.
const ENDS: [&str; 16] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
];

/// What a file says of its tokens.
struct Tokens<'a> {
    header: &'a Header<'a>,
    keys: &'a Keys,
    /// The tokens by id.
    texts: Vec<Cow<'a, str>>,
    /// Their kinds.
    kinds: Vec<f64>,
}

/// What follows from the kind of tokenizer where a file does not say.
struct Defaults {
    begin: usize,
    unknown: Option<usize>,
    add_begin: bool,
}

/// The tokenizer of a GGUF file, if it has one.
pub(super) fn tokenizer(header: &Header, keys: &Keys) -> Result<Option<Tokenizer>> {
    let model = match keys.optional::<String>(MODEL)? {
        Some(model) if model != "no_vocab" && model != "none" => model,
        _ => return Ok(None),
    };
    let tokens = Tokens::read(header, keys)?;
    let (mut json, defaults) = match model.as_str() {
        "gpt2" => {
            let words = pre_tokenizer(keys)?;
            let defaults = Defaults { begin: 11, unknown: None, add_begin: words.add_bos };
            (tokens.byte_level(words)?, defaults)
        }
        "llama" => {
            let defaults = Defaults { begin: 1, unknown: Some(0), add_begin: true };
            (tokens.sentence_piece(&defaults)?, defaults)
        }
        _ => return Err(keys.refuse(MODEL, "one of gpt2, llama")),
    };
    json["version"] = json!("1.0");
    json["added_tokens"] = tokens.added();
    if keys.optional(ADD_BEGIN)?.unwrap_or(defaults.add_begin) {
        let id = tokens.id_at(BEGIN, Some(defaults.begin))?;
        let id = id.ok_or_else(|| keys.refuse(BEGIN, &format!("the token that `{ADD_BEGIN}` asks for")))?;
        json["post_processor"] = begin_with(&tokens.texts[id], id);
    }
    let failed =
        |error: TokenizerError| TokenizerError::Load { path: keys.path().to_owned(), message: error.to_string() };
    Ok(Some(Tokenizer::from_bytes(json.to_string().as_bytes()).map_err(failed)?))
}

/// How texts are split, by the file's own word or else as llama.cpp assumes.
fn pre_tokenizer(keys: &Keys) -> Result<&'static PreTokenizer> {
    let name = keys.optional::<String>(SPLITTER)?.filter(|name| !name.is_empty());
    if name.is_none() {
        keys.warn(
            SPLITTER,
            "taken for `default`, as by llama.cpp; if texts were split in another way in training, their tokens are \
             wrong: convert the model anew, or set the key (`gguf_new_metadata.py --pre-tokenizer`)",
        );
    }
    let known = || PRE_TOKENIZERS.iter().flat_map(|known| known.names).copied().collect::<Vec<_>>().join(", ");
    let found = PreTokenizer::of(name.as_deref().unwrap_or(DEFAULT));
    found.ok_or_else(|| keys.refuse(SPLITTER, &format!("one of {}", known())))
}

impl<'a> Tokens<'a> {
    fn read(header: &'a Header<'a>, keys: &'a Keys) -> Result<Self> {
        let mut tokens = Self { header, keys, texts: Vec::new(), kinds: Vec::new() };
        let texts = tokens.damaged(header.strings(TOKENS))?.ok_or_else(|| keys.refuse(TOKENS, "an array"))?;
        let named = |(id, text): (usize, &'a str)| match text.is_empty() {
            true => Cow::Owned(format!("[EMPTY_{id}]")),
            false => Cow::Borrowed(text),
        };
        tokens.texts = texts.into_iter().enumerate().map(named).collect();
        let mut known = HashMap::new();
        for (id, text) in tokens.texts.iter().enumerate() {
            if let Some(other) = known.insert(text.as_ref(), id) {
                let expected = format!("different tokens, but {other} and {id} are both `{text}`");
                return Err(keys.refuse(TOKENS, &expected));
            }
        }
        tokens.kinds = tokens.numbers(TOKEN_TYPES)?.unwrap_or_else(|| vec![NORMAL; tokens.texts.len()]);
        for (text, kind) in tokens.texts.iter().zip(&mut tokens.kinds) {
            if ENDS.contains(&text.as_ref()) {
                *kind = CONTROL;
            }
        }
        Ok(tokens)
    }

    fn damaged<T>(&self, result: Result<T, String>) -> Result<T> {
        result.map_err(|message| CheckpointError::Gguf { path: self.keys.path().to_owned(), message })
    }

    /// An array of a number for each token, or more, if there is such a key.
    fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(mut numbers) = self.damaged(self.header.numbers(key))? else { return Ok(None) };
        if numbers.len() < self.texts.len() {
            return Err(self.keys.refuse(key, &format!("an array of {}", self.texts.len())));
        }
        numbers.truncate(self.texts.len());
        Ok(Some(numbers))
    }

    /// The id of a special token, at a key or else by default. As in llama.cpp, one beyond the vocabulary counts as
    /// missing.
    fn id_at(&self, key: &str, default: Option<usize>) -> Result<Option<usize>> {
        let known = |id: &usize| *id < self.texts.len();
        let (given, default) = (self.keys.optional::<usize>(key)?, default.filter(known));
        match given {
            Some(id) if known(&id) => Ok(Some(id)),
            _ => {
                let assumed = default.map_or("none".to_owned(), |id| format!("{id}, `{}`", self.texts[id]));
                self.keys.warn(key, &format!("expected a token below {}; assumed: {assumed}", self.texts.len()));
                Ok(default)
            }
        }
    }

    fn vocab(&self) -> Map<String, Value> {
        self.texts.iter().zip(0_u32..).map(|(text, id)| (text.clone().into_owned(), json!(id))).collect()
    }

    /// Tokens that are found in a text before it is split: SentencePiece's own after spaces are replaced, control
    /// tokens before.
    fn added(&self) -> Value {
        let added = |(id, text): (usize, &Cow<str>)| {
            let special = match self.kinds[id] {
                CONTROL | UNKNOWN_KIND => true,
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
    fn byte_level(&self, words: &PreTokenizer) -> Result<Value> {
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
        });
        let split = |expression: &&str| {
            json!({
                "type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false,
            })
        };
        let steps: Vec<Value> = words.expressions.iter().map(split).chain([byte_level.clone()]).collect();
        let merges = self.damaged(self.header.strings(MERGES))?.ok_or_else(|| self.keys.refuse(MERGES, "an array"))?;
        let merges: Option<Vec<_>> = merges.into_iter().map(|merge| merge.split_once(' ')).collect();
        let merges = merges.ok_or_else(|| self.keys.refuse(MERGES, "two tokens and a space between them each"))?;
        Ok(json!({
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "decoder": byte_level,
            "model": {
                "type": "BPE", "vocab": self.vocab(), "merges": merges, "ignore_merges": words.whole_pieces_first,
            },
        }))
    }

    /// SentencePiece's BPE: on characters with spaces among them, bytes where a character is unknown.
    fn sentence_piece(&self, defaults: &Defaults) -> Result<Value> {
        let space_first = self.keys.optional("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
        let mut normalizers = vec![replace(" ", SPACE)];
        let mut decoders = vec![replace(SPACE, " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        if space_first {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = self.id_at(UNKNOWN, defaults.unknown)?.map(|id| &self.texts[id]);
        Ok(json!({
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "vocab": self.vocab(), "merges": self.merges_by_score()?,
                "unk_token": unknown, "fuse_unk": true, "byte_fallback": true,
            },
        }))
    }

    /// SentencePiece joins the two neighbours whose union has the highest score: every way to cut a token in two is a
    /// merge, the best token's first.
    fn merges_by_score(&self) -> Result<Vec<(&str, &str)>> {
        let scores = self.numbers(SCORES)?.ok_or_else(|| self.keys.refuse(SCORES, "an array"))?;
        let by_id = self.texts.iter().zip(&self.kinds);
        let texts: Vec<Option<&str>> = by_id.map(|(text, kind)| (*kind == NORMAL).then_some(text.as_ref())).collect();
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
