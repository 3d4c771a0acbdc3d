//! Damaged files of every kind are read or rejected without a panic, at once, and with memory of at most a small
//! multiple of the file's size. `PROPTEST_CASES` sets the number of cases.

use std::path::Path;

use candle_core::quantized::gguf_file::Value as GgufValue;
use engine::{Checkpoint, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::damaged::{Damage, LARGEST, damage, damages, gemma, gemma3, llama, numbers};
use super::folders::Model;
use super::gguf::{write_gguf, write_split};

fn gpt_neox() -> Value {
    json!({
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 19, "hidden_size": 8,
        "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
        "rotary_pct": 0.5, "rotary_emb_base": 10_000, "tie_word_embeddings": false,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    })
}

fn families() -> impl Strategy<Value = Value> {
    let scaled = |mut config: Value| {
        config["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
        });
        config
    };
    prop_oneof![Just(llama()), Just(scaled(llama())), Just(gemma()), Just(gemma3()), Just(gpt_neox())]
}

/// Calls a function that may fail, but must neither panic nor allocate much at once for a file of `length` bytes.
///
/// It has a thread of its own: the `tokenizers` library keeps a cache by thread, with an entry for each tokenizer that ever
/// encoded a text in it, so that after ten thousands of files an entry more takes megabytes.
fn survives(length: usize, run: impl FnOnce() + Send) {
    let measured = || {
        LARGEST.set(0);
        run();
        LARGEST.get()
    };
    let run = std::thread::scope(|scope| scope.spawn(measured).join());
    let largest = run.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    assert!(largest <= 64 * length + (1 << 20), "{largest} bytes at once for a file of {length}");
}

/// Replaces a file by a damaged one while a function runs.
fn while_damaged(path: &Path, changes: &[Damage], run: impl FnOnce(usize)) {
    let pristine = std::fs::read(path).unwrap();
    let mut bytes = pristine.clone();
    for change in changes {
        if !bytes.is_empty() {
            damage(&mut bytes, change);
        }
    }
    std::fs::write(path, &bytes).unwrap();
    run(pristine.len());
    std::fs::write(path, pristine).unwrap();
}

fn several() -> impl Strategy<Value = Vec<Vec<Damage>>> {
    prop::collection::vec(prop::collection::vec(damages(), 1..4), 20)
}

/// Replaces the number at index `place` of a JSON text.
fn other_number(mut json: Value, place: usize, number: &Value) -> Value {
    let mut places = Vec::new();
    numbers(&json, "", &mut places);
    if !places.is_empty() {
        *json.pointer_mut(&places[place % places.len()]).unwrap() = number.clone();
    }
    json
}

fn absurd() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!(0)),
        Just(json!(-1)),
        Just(json!(1)),
        Just(json!(4096)),
        Just(json!(1_u64 << 31)),
        Just(json!(u64::MAX)),
        Just(json!(1e300)),
        Just(json!(-0.5)),
        Just(json!("1")),
        Just(Value::Null),
        Just(json!([])),
        any::<u32>().prop_map(|number| json!(number)),
    ]
}

/// Tokenizers of every kind of normalizer, pre-tokenizer, model, post-processor and decoder.
fn tokenizers() -> Vec<Value> {
    let bytes: Value =
        serde_json::from_str(&Tokenizer::train("the cat sat on the mat", 262).unwrap().to_json().unwrap()).unwrap();
    let special = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": true, "rstrip": false, "normalized": false,
            "special": true,
        })
    };
    let template = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    });
    let mut padded = bytes.clone();
    padded["truncation"] = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 1});
    padded["padding"] = json!({
        "strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    });
    padded["added_tokens"] = json!([special(262, "<s>"), special(263, "</s>")]);
    padded["post_processor"] = json!({
        "type": "RobertaProcessing", "sep": ["</s>", 263], "cls": ["<s>", 262], "trim_offsets": true,
        "add_prefix_space": false,
    });
    let of = |model: Value, normalizer: Value, pre_tokenizer: Value, post_processor: Value, decoder: Value| {
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>")], "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": post_processor, "decoder": decoder, "model": model,
        })
    };
    let pieces = json!({
        "<unk>": 0, "<s>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "▁ab": 6, "<0x0A>": 7, "##a": 8, "the": 9, "##b": 10,
    });
    let bpe = json!({
        "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": pieces,
        "merges": [["a", "b"], ["▁", "ab"]],
    });
    let word_piece = json!({
        "type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": pieces,
    });
    let word_level = json!({"type": "WordLevel", "vocab": pieces, "unk_token": "<unk>"});
    let unigram = json!({
        "type": "Unigram", "unk_id": 0, "byte_fallback": false,
        "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["▁", -2.0], ["a", -1.0], ["b", -1.5], ["ab", -1.2]],
    });
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
    let normalizers = json!({
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace, {"type": "NFKC"},
            {"type": "Strip", "strip_left": true, "strip_right": true}],
    });
    let decoders = json!({
        "type": "Sequence",
        "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    });
    let bert = json!({
        "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
        "lowercase": true,
    });
    let bert_around = json!({"type": "BertProcessing", "sep": ["<unk>", 0], "cls": ["<s>", 1]});
    let word_pieces = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let steps = json!({
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": false},
            {"type": "Punctuation", "behavior": "Contiguous"}, {"type": "Digits", "individual_digits": true},
            {"type": "WhitespaceSplit"}, {"type": "FixedLength", "length": 3},
        ],
    });
    let words = json!({"type": "BertPreTokenizer"});
    vec![
        bytes,
        padded,
        of(bpe.clone(), normalizers.clone(), Value::Null, template.clone(), decoders.clone()),
        of(bpe, Value::Null, steps, template.clone(), decoders),
        of(word_piece, bert, words, bert_around, word_pieces),
        of(word_level, json!({"type": "Lowercase"}), json!({"type": "Whitespace"}), template.clone(), Value::Null),
        of(unigram, normalizers, metaspace.clone(), template, metaspace),
    ]
}

/// Loads a tokenizer and, if that succeeds, uses it.
fn use_tokenizer(path: &Path) {
    if let Ok(tokenizer) = Tokenizer::load(path) {
        for text in ["the cat ab", "", " naïve ☃ 12345 <s>\n\u{0}"] {
            if let Ok(ids) = tokenizer.encode_prompt(text) {
                let _ = tokenizer.decode(&ids);
                let mut stream = tokenizer.stream();
                ids.into_iter().for_each(|id| drop(stream.push(id)));
            }
        }
        let _ = (0..20).filter(|id| tokenizer.is_special(*id)).count();
        drop(tokenizer.begin());
    }
}

#[test]
fn the_tokenizers_that_are_damaged_are_good_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    for json in tokenizers() {
        std::fs::write(&path, json.to_string()).unwrap();
        let tokenizer = Tokenizer::load(&path).unwrap_or_else(|error| panic!("{error}: {json}"));
        assert!(!tokenizer.encode("ab").unwrap().is_empty(), "{json}");
    }
}

/// Writes a GGUF file with a tokenizer, and a model with that number of tokens.
fn gguf_with_tokenizer(path: &Path, of_bytes: bool) {
    let text = |value: &str| GgufValue::String(value.to_owned());
    let list = |values: &[&str]| GgufValue::Array(values.iter().map(|value| text(value)).collect());
    let mut values = vec![
        ("tokenizer.ggml.tokens", list(&["<unk>", "<s>", "</s>", "a", "b", "ab", "Ġ", "▁", "▁a", "<0x0A>"])),
        ("tokenizer.ggml.token_type", GgufValue::Array([2, 3, 3, 1, 1, 1, 1, 1, 1, 6].map(GgufValue::I32).to_vec())),
        ("tokenizer.ggml.bos_token_id", GgufValue::U32(1)),
        ("tokenizer.ggml.unknown_token_id", GgufValue::U32(0)),
    ];
    match of_bytes {
        true => values.extend([
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text("llama-bpe")),
            ("tokenizer.ggml.merges", list(&["a b"])),
        ]),
        false => values.extend([
            ("tokenizer.ggml.model", text("llama")),
            ("tokenizer.ggml.scores", GgufValue::Array((0..10).map(|id| GgufValue::F32(-(id as f32))).collect())),
        ]),
    }
    write_gguf(&Model::random(llama(), 1), path, &values, &[]);
}

fn use_checkpoint(path: &Path) {
    if let Ok(checkpoint) = Checkpoint::read(path, 1)
        && let Some(tokenizer) = checkpoint.tokenizer
    {
        drop(tokenizer.encode_prompt(" ab\n☃"));
    }
}

// `PROPTEST_CASES` raises the number; it is small, so that a run takes seconds.
fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases.unwrap_or(40)) }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn damaged_folders_of_every_family_are_survived(changes in several(), config in families()) {
        let folder = tempfile::tempdir().unwrap();
        Model::random(config, 1).write(folder.path());
        for name in ["config.json", "model.safetensors"] {
            for changes in &changes {
                while_damaged(&folder.path().join(name), changes, |length| {
                    survives(length, || use_checkpoint(folder.path()));
                });
            }
        }
    }

    #[test]
    fn absurd_values_in_configurations_of_every_family_are_survived(
        config in families(), values in prop::collection::vec((any::<usize>(), absurd()), 20),
    ) {
        let folder = tempfile::tempdir().unwrap();
        Model::random(config.clone(), 1).write(folder.path());
        for (place, value) in values {
            let config = other_number(config.clone(), place, &value).to_string();
            std::fs::write(folder.path().join("config.json"), &config).unwrap();
            // Names are made for one layer per tensor of the file before a missing tensor is noticed.
            survives(config.len() + (1 << 13), || use_checkpoint(folder.path()));
        }
    }

    #[test]
    fn damaged_gguf_files_are_survived(changes in several(), kind in 0..4) {
        let folder = tempfile::tempdir().unwrap();
        let mut path = folder.path().join("model.gguf");
        match kind {
            0 | 1 => gguf_with_tokenizer(&path, kind == 0),
            2 => write_gguf(&Model::random(gemma3(), 1), &path, &[], &[]),
            _ => path = write_split(&Model::random(llama(), 1), folder.path(), 2),
        }
        for changes in &changes {
            while_damaged(&path, changes, |length| survives(length, || use_checkpoint(&path)));
        }
    }

    #[test]
    fn damaged_tokenizers_are_survived(
        changes in several(), values in prop::collection::vec((any::<usize>(), absurd()), 20), kind in 0_usize..7,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let json = tokenizers().swap_remove(kind);
        for (place, value) in values {
            let json = other_number(json.clone(), place, &value).to_string();
            std::fs::write(&path, &json).unwrap();
            survives(json.len(), || use_tokenizer(&path));
        }
        std::fs::write(&path, json.to_string()).unwrap();
        for changes in &changes {
            while_damaged(&path, changes, |length| survives(length, || use_tokenizer(&path)));
        }
    }
}
