//! Tokenizers of checkpoints give the tokens of their formats' own programs.

use std::path::Path;

use candle_core::quantized::gguf_file::Value as GgufValue;
use engine::{Checkpoint, Tokenizer};
use serde_json::{Map, Value, json};

use super::folders::Model;
use super::gguf::write_gguf;
use super::warnings::with_warnings;

/// A model of one layer and `rows` tokens.
pub fn model_of(rows: usize) -> Model {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows, "hidden_size": 8,
        "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": true,
    });
    Model::random(config, 1)
}

/// A value of a GGUF file.
fn gguf_value(value: &Value) -> GgufValue {
    match value {
        Value::Bool(value) => GgufValue::Bool(*value),
        Value::String(value) => GgufValue::String(value.clone()),
        Value::Number(value) if value.is_f64() => GgufValue::F32(value.as_f64().unwrap() as f32),
        Value::Number(value) => GgufValue::U32(value.as_u64().unwrap() as u32),
        Value::Array(values) => GgufValue::Array(
            values
                .iter()
                .map(|value| match gguf_value(value) {
                    GgufValue::U32(number) => GgufValue::I32(number as i32),
                    other => other,
                })
                .collect(),
        ),
        other => panic!("{other}"),
    }
}

/// The tokenizer of a GGUF file with these values, and the warnings.
fn gguf_tokenizer(values: &Map<String, Value>) -> (Tokenizer, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let values: Vec<(String, GgufValue)> =
        values.iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), gguf_value(value))).collect();
    let values: Vec<(&str, GgufValue)> = values.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    write_gguf(&model_of(603), &path, &values, &[]);
    let (checkpoint, warnings) = with_warnings(|| Checkpoint::read(&path, 1).unwrap());
    (checkpoint.tokenizer.unwrap(), warnings)
}

/// The table that `scripts/llama_cpp_tokens.py` wrote.
fn table() -> Value {
    serde_json::from_str(include_str!("llama_cpp_tokens.json")).unwrap()
}

/// Values of a tokenizer's test case: those of its kind, with changes.
fn values_of(table: &Value, kind: &Value, case: &Value) -> Map<String, Value> {
    let mut values = table["kinds"][kind.as_str().unwrap()].as_object().unwrap().clone();
    values.extend(case["with"].as_object().unwrap().clone());
    for key in case["without"].as_array().unwrap() {
        values.remove(key.as_str().unwrap()).unwrap();
    }
    values
}

#[test]
fn gguf_tokenizers_give_the_tokens_that_llama_cpp_gives() {
    let table = table();
    let mut cases = 0;
    for row in table["rows"].as_array().unwrap() {
        for case in row["cases"].as_array().unwrap() {
            let values = values_of(&table, &row["kind"], case);
            let (tokenizer, _) = gguf_tokenizer(&values);
            let texts = table["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap());
            for (text, expected) in texts.zip(row["tokens"].as_array().unwrap()) {
                let mut expected: Vec<u32> = serde_json::from_value(expected.clone()).unwrap();
                if case["with"]["add_eos_token"] == true {
                    // The end token, which follows every text, is left out of prompts.
                    assert_eq!(expected.pop(), case["with"]["eos_token_id"].as_u64().map(|id| id as u32));
                }
                assert_eq!(tokenizer.encode_prompt(text).unwrap(), expected, "{case}: {text:?}");
            }
            cases += 1;
        }
    }
    assert!(cases > 80, "{cases}");
}

#[test]
fn what_a_gguf_tokenizer_does_not_say_is_warned_about_with_what_is_assumed() {
    let table = table();
    let warnings = |kind: &str, case: Value| gguf_tokenizer(&values_of(&table, &json!(kind), &case)).1;
    let whole = warnings("bytes", json!({"with": {"pre": "llama-bpe"}, "without": []}));
    assert_eq!(whole, [""; 0]);
    for (kind, case, expected) in [
        ("bytes", json!({"with": {}, "without": []}), "`tokenizer.ggml.pre` is missing: taken for `default`"),
        (
            "bytes",
            json!({"with": {"pre": "llama-bpe"}, "without": ["bos_token_id"]}),
            "`tokenizer.ggml.bos_token_id` is missing: expected a token below 603; assumed: 11, `,`",
        ),
        (
            "bytes",
            json!({"with": {"pre": "llama-bpe", "bos_token_id": 9999}, "without": []}),
            "`tokenizer.ggml.bos_token_id` is 9999: expected a token below 603; assumed: 11",
        ),
        (
            "pieces",
            json!({"with": {}, "without": ["unknown_token_id"]}),
            "`tokenizer.ggml.unknown_token_id` is missing: expected a token below 268; assumed: 0, `<unk>`",
        ),
    ] {
        let found = warnings(kind, case);
        assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
    }
}

#[test]
fn pre_tokenizers_that_are_not_known_and_tokens_that_are_there_twice_are_refused() {
    let table = table();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let refusal = |key: &str, value: Value| {
        let mut values = values_of(&table, &json!("bytes"), &json!({"with": {"pre": "gpt-2"}, "without": []}));
        values.insert(key.to_owned(), value);
        let values: Vec<_> =
            values.iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), gguf_value(value))).collect();
        let values: Vec<_> = values.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        write_gguf(&model_of(603), &path, &values, &[]);
        Checkpoint::read(&path, 1).map(drop).unwrap_err().to_string()
    };
    let message = refusal("pre", json!("kimi-k2"));
    assert!(message.contains("`tokenizer.ggml.pre` is \"kimi-k2\", expected one of default, llama3"), "{message}");
    let message = refusal("tokens", json!(["a", "b", "a"]));
    assert!(message.contains("different tokens, but 0 and 2 are both `a`"), "{message}");
    let message = refusal("merges", json!(["a b", "no such"]));
    assert!(
        message.contains("model.gguf: cannot load the tokenizer: ") && message.contains("out of vocabulary"),
        "{message}"
    );
    let message = refusal("token_type", json!([1, 1]));
    assert!(message.contains("expected an array of 603"), "{message}");
}

/// A tokenizer of the bytes and some tokens, as a `tokenizer.json`.
fn byte_tokenizer() -> Value {
    let mut json: Value =
        serde_json::from_str(&Tokenizer::train("the cat sat on the mat", 260).unwrap().to_json().unwrap()).unwrap();
    json["added_tokens"] = (260..264)
        .zip(["<s>", "</s>", "[CLS]", "[SEP]"])
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    json
}

fn load(folder: &Path, json: &Value) -> Tokenizer {
    let path = folder.join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    Tokenizer::load(&path).unwrap()
}

#[test]
fn truncation_and_padding_in_a_file_are_reset() {
    let folder = tempfile::tempdir().unwrap();
    let plain = load(folder.path(), &byte_tokenizer());
    let text = "the cat sat on the mat ".repeat(9);
    let mut json = byte_tokenizer();
    json["truncation"] = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    for strategy in [json!({"Fixed": 128}), json!("BatchLongest")] {
        json["padding"] = json!({
            "strategy": strategy, "direction": "Left", "pad_to_multiple_of": 64, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "!",
        });
        let tokenizer = load(folder.path(), &json);
        for text in [text.as_str(), "the"] {
            assert_eq!(tokenizer.encode(text).unwrap(), plain.encode(text).unwrap());
            assert_eq!(tokenizer.encode_prompt(text).unwrap(), plain.encode(text).unwrap());
        }
        assert_eq!(tokenizer.begin().unwrap(), [0; 0]);
        assert_eq!(tokenizer.to_json().unwrap(), plain.to_json().unwrap());
    }
}

#[test]
fn dropout_of_merges_is_reset_with_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let plain = load(folder.path(), &byte_tokenizer());
    let mut json = byte_tokenizer();
    json["model"]["dropout"] = json!(0.5);
    let (tokenizer, warnings) = with_warnings(|| load(folder.path(), &json));
    let text = "the cat sat on the mat ".repeat(9);
    assert_eq!(tokenizer.encode(&text).unwrap(), plain.encode(&text).unwrap());
    assert!(warnings.len() == 1 && warnings[0].contains("tokenizer.json: model.dropout is 0.5"), "{warnings:?}");
}

#[test]
fn added_tokens_that_get_other_ids_are_warned_about() {
    let folder = tempfile::tempdir().unwrap();
    let (_, warnings) = with_warnings(|| load(folder.path(), &byte_tokenizer()));
    assert_eq!(warnings, [""; 0]);
    let mut json = byte_tokenizer();
    let last = json["added_tokens"].as_array().unwrap().len() - 1;
    json["added_tokens"][last]["id"] = json!(900);
    let (_, warnings) = with_warnings(|| load(folder.path(), &json));
    assert!(warnings.len() == 1 && warnings[0].contains("has the id 900, but gets 263"), "{warnings:?}");
}

#[test]
fn what_is_no_tokenizer_of_the_library_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let mut other = byte_tokenizer();
    other["model"]["type"] = json!("SentencePiece");
    for (json, expected) in [
        (other, "tokenizer.json: cannot load the tokenizer: model.type: found `SentencePiece`, expected one of BPE,"),
        (json!({"a": 1}), "found no `model`, expected a tokenizer.json of the library `tokenizers`"),
    ] {
        std::fs::write(&path, json.to_string()).unwrap();
        let message = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn tokens_that_a_template_puts_after_a_text_are_left_out_and_those_before_it_kept() {
    let folder = tempfile::tempdir().unwrap();
    let plain = load(folder.path(), &byte_tokenizer());
    let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    let template = |single: Vec<Value>| {
        json!({
            "type": "TemplateProcessing", "single": single, "pair": [text("A"), special("</s>"), text("B")],
            "special_tokens": {
                "<s>": {"id": "<s>", "ids": [260], "tokens": ["<s>"]},
                "</s>": {"id": "</s>", "ids": [261, 263], "tokens": ["</s>", "[SEP]"]},
            },
        })
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let cases: [(Value, &[u32]); 9] = [
        (Value::Null, &[]),
        (byte_level.clone(), &[]),
        (template(vec![text("A"), special("</s>")]), &[]),
        (template(vec![special("<s>"), text("A")]), &[260]),
        (template(vec![special("<s>"), text("A"), special("</s>")]), &[260]),
        (template(vec![special("</s>"), special("<s>"), text("A"), special("<s>")]), &[261, 263, 260]),
        (json!({"type": "BertProcessing", "sep": ["[SEP]", 263], "cls": ["[CLS]", 262]}), &[262]),
        (
            json!({
                "type": "RobertaProcessing", "sep": ["</s>", 261], "cls": ["<s>", 260], "trim_offsets": true,
                "add_prefix_space": false,
            }),
            &[260],
        ),
        (
            json!({
                "type": "Sequence",
                "processors": [byte_level, template(vec![special("<s>"), text("A"), special("</s>")])],
            }),
            &[260],
        ),
    ];
    for (processor, begin) in cases {
        let mut json = byte_tokenizer();
        json["post_processor"] = processor.clone();
        let tokenizer = load(folder.path(), &json);
        assert_eq!(tokenizer.begin().unwrap(), begin, "{processor}");
        for text in ["the cat", "", "a", " <s> and </s>", "日本"] {
            let expected = [begin, &plain.encode(text).unwrap()].concat();
            assert_eq!(tokenizer.encode_prompt(text).unwrap(), expected, "{processor}");
            assert_eq!(tokenizer.encode(text).unwrap(), plain.encode(text).unwrap(), "{processor}");
        }
    }
    let mut json = byte_tokenizer();
    json["post_processor"] = template(vec![special("<s>")]);
    let message = load(folder.path(), &json).begin().unwrap_err().to_string();
    assert!(message.contains("drops the text"), "{message}");
}

#[test]
fn a_token_beyond_the_embedding_is_named_with_model_and_remedy_before_work_starts() {
    let folder = tempfile::tempdir().unwrap();
    let open = |rows: usize, json: &Value| {
        model_of(rows).write(folder.path());
        load(folder.path(), json);
        with_warnings(|| Checkpoint::open(folder.path(), None))
    };
    let (checkpoint, warnings) = open(264, &byte_tokenizer());
    assert_eq!(warnings, [""; 0]);
    assert_eq!(checkpoint.unwrap().tokenizer.unwrap().encode("<s>").unwrap(), [260]);

    let name = folder.path().display().to_string();
    let (checkpoint, warnings) = open(261, &byte_tokenizer());
    let expected = "tokens of the tokenizer from `</s>` (261) on are beyond the embedding, which has 261 rows";
    assert!(warnings.len() == 1 && warnings[0].starts_with(&name) && warnings[0].contains(expected), "{warnings:?}");
    let tokenizer = checkpoint.unwrap().tokenizer.unwrap();
    assert!(tokenizer.encode_prompt("the cat<s>").is_ok());
    let message = tokenizer.encode_prompt("the cat</s>").unwrap_err().to_string();
    let expected = "token `</s>` (261) of the tokenizer is beyond the embedding, which has 261 rows: add rows";
    assert!(message.starts_with(&name) && message.contains(expected), "{message}");

    // One that begins every text can never be read.
    let mut json = byte_tokenizer();
    json["post_processor"] = json!({"type": "BertProcessing", "sep": ["[SEP]", 263], "cls": ["[CLS]", 262]});
    let message = open(261, &json).0.map(drop).unwrap_err().to_string();
    assert!(message.contains("token `[CLS]` (262)") && message.contains("resize_token_embeddings"), "{message}");
}
