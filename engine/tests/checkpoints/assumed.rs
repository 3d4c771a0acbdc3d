//! What is assumed where a file does not say, or says something empty, and what is refused for being there twice. Each of
//! these was found to be untested by breaking the reader.

use std::path::Path;

use candle_core::quantized::gguf_file::Value as GgufValue;
use engine::config::ModelConfig;
use engine::{Checkpoint, Tokenizer};
use serde_json::json;

use super::folders::Model;
use super::gguf::{contents, part_path, small_llama, text, texts, uint, write_file, write_gguf, write_split};
use super::keys::{config_of, read};
use super::tokens::model_of;

fn gguf_config(path: &Path) -> Result<ModelConfig, String> {
    Checkpoint::read(path, 1).map(|read| read.weights.config().clone()).map_err(|error| error.to_string())
}

/// The configuration that is read from a GGUF file of a model, without some keys and with others.
fn config_with(model: &Model, without: &[&str], more: &[(&str, GgufValue)]) -> ModelConfig {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let (mut values, tensors) = contents(model, more, &[]);
    values.retain(|(key, _)| !without.contains(&key.as_str()));
    write_file(&path, &values, &tensors);
    gguf_config(&path).unwrap()
}

#[test]
fn a_gguf_llama_has_the_defaults_of_llama_cpp() {
    let model = small_llama();
    let found = config_with(&model, &["llama.rope.freq_base"], &[]);
    assert_eq!((found.architecture.rope_theta, found.num_kv_heads), (10_000.0, 1));
    let (factor, kind) = ("llama.rope.scaling.factor", "llama.rope.scaling.type");
    let scaled = |more: &[(&str, GgufValue)]| config_with(&model, &[], more).architecture.rope_scaling.is_some();
    assert!(scaled(&[(factor, GgufValue::F32(4.0)), (kind, text("linear"))]));
    assert!(!scaled(&[(factor, GgufValue::F32(4.0)), (kind, text("none"))]), "no scaling, whatever the factor");
    assert!(!scaled(&[(factor, GgufValue::F32(0.0))]), "a factor of zero scales nothing");
    let mut all_heads = model.config.clone();
    all_heads["num_key_value_heads"] = all_heads["num_attention_heads"].clone();
    let found = config_with(&Model::random(all_heads, 4), &["llama.attention.head_count_kv"], &[]);
    assert_eq!(found.num_kv_heads, 2, "as many as there are heads");
}

#[test]
fn the_largest_gemma_3_scales_attention_by_another_width() {
    let config = |layers: usize| {
        let config = json!({
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 19, "hidden_size": 16,
            "intermediate_size": 6, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "sliding_window": 4, "sliding_window_pattern": 6, "query_pre_attn_scalar": 8,
        });
        config_with(&Model::random(config, 2), &[], &[]).architecture.attention_scale
    };
    assert_eq!((config(61), config(62)), (None, Some(0.5)), "16 / 4 heads, not the head's width of 8");
}

#[test]
fn a_gguf_file_that_contradicts_itself_is_refused() {
    let (folder, model) = (tempfile::tempdir().unwrap(), small_llama());
    let path = folder.path().join("model.gguf");
    let (values, tensors) = contents(&model, &[], &[]);
    write_file(&path, &[&values[..], &values[1..2]].concat(), &tensors);
    assert!(gguf_config(&path).unwrap_err().contains(&format!("key `{}` is there twice", values[1].0)));
    let twice: Vec<_> = contents(&model, &[], &[]).1.into_iter().chain(contents(&model, &[], &[]).1).collect();
    write_file(&path, &values, &twice);
    assert!(gguf_config(&path).unwrap_err().contains("is there twice"));
    for (alignment, expected) in [(24, false), (4, false), (32, true)] {
        write_gguf(&model, &path, &[("general.alignment", uint(alignment))], &[]);
        let message = gguf_config(&path).err().unwrap_or_default();
        let refused = message.contains(&format!("`general.alignment` is {alignment}, expected a power of two from 8"));
        assert_eq!(refused, !expected, "{alignment}: {message}");
    }
    let first = write_split(&model, folder.path(), 3);
    let beyond = part_path(folder.path(), 3, 3);
    std::fs::copy(&first, &beyond).unwrap();
    let message = gguf_config(&beyond).unwrap_err();
    assert!(message.contains("its name must end in -00001-of-00003.gguf"), "part 4 of 3: {message}");
}

/// The tokenizer that is read from a GGUF file with these tokens and metadata values. Its model has one embedding row per
/// token.
fn tokenizer(tokens: &[&str], more: &[(&str, GgufValue)]) -> Result<Option<Tokenizer>, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let values = [&[("tokenizer.ggml.tokens", texts(tokens))], more].concat();
    write_gguf(&model_of(tokens.len()), &path, &values, &[]);
    Checkpoint::read(&path, 1).map(|read| read.tokenizer).map_err(|error| error.to_string())
}

fn numbers<T>(value: fn(T) -> GgufValue, values: impl IntoIterator<Item = T>) -> GgufValue {
    GgufValue::Array(values.into_iter().map(value).collect())
}

#[test]
fn a_gguf_tokenizer_is_read_as_llama_cpp_reads_it_where_it_says_little() {
    let byte_level = |tokens: &[&str], pre: &str, merges: &[&str]| {
        let values = [
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text(pre)),
            ("tokenizer.ggml.merges", texts(merges)),
        ];
        tokenizer(tokens, &values)
    };
    // Token 11 is the one that Llama 3 begins with.
    let tokens = ["a", "b", "c", "abc", "<4>", "<5>", "<6>", "<7>", "<8>", "<9>", "<10>", "<|begin|>"];
    assert!(byte_level(&tokens, "llama-bpe", &["a b"]).is_err(), "`ab` is no token");
    // Llama 3 takes a word that is a token as that token. Others join pairs, and there are no merges here.
    let encoded = |pre| byte_level(&tokens, pre, &[]).unwrap().unwrap().encode("abc").unwrap();
    assert_eq!((encoded("llama-bpe"), encoded("gpt-2")), (vec![3], vec![0, 1, 2]));
    // An empty name of a pre-tokenizer counts as missing.
    assert_eq!(byte_level(&tokens, "", &[]).unwrap().unwrap().encode("abc").unwrap(), [0, 1, 2]);
    // This vocabulary lacks token 11.
    let message = byte_level(&tokens[..4], "llama-bpe", &[]).map(drop).unwrap_err();
    assert!(message.contains("`tokenizer.ggml.bos_token_id`"), "{message}");
    // Two tokens with an empty text are different tokens.
    assert!(byte_level(&["a", "", ""], "gpt-2", &[]).is_ok());
    for none in ["none", "no_vocab"] {
        assert!(tokenizer(&["a"], &[("tokenizer.ggml.model", text(none))]).unwrap().is_none());
    }
}

#[test]
fn of_equal_scores_the_first_pair_is_joined_and_the_unknown_token_is_special() {
    let tokens = ["<unk>", "<s>", "a", "b", "c", "ab", "bc"];
    let values = [
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.token_type", numbers(GgufValue::I32, [2, 3, 1, 1, 1, 1, 1])),
        ("tokenizer.ggml.scores", numbers(GgufValue::F32, [0.0, 0.0, -1.0, -1.0, -1.0, -2.0, -2.0])),
        ("tokenizer.ggml.add_space_prefix", GgufValue::Bool(false)),
    ];
    let found = tokenizer(&tokens, &values).unwrap().unwrap();
    assert_eq!(found.encode("abc").unwrap(), [5, 4]);
    assert_eq!([0, 1, 2].map(|id| found.is_special(id)), [true, true, false]);
}

#[test]
fn a_gemma_folder_has_the_defaults_of_transformers() {
    let mut config = config_of("gemma");
    config["head_dim"] = json!(256);
    let mut model = Model::random(config, 1);
    model.config.as_object_mut().unwrap().remove("head_dim");
    let folder = tempfile::tempdir().unwrap();
    model.write(folder.path());
    assert_eq!(Checkpoint::read(folder.path(), 1).unwrap().weights.config().head_dim, 256);
    let keys = |keys| read("gemma3_text", &keys).0;
    assert_eq!(keys(json!({})).unwrap().architecture.attention_scale, Some(1.0 / 16.0), "256 to the power of -1/2");
    assert_eq!(keys(json!({"sliding_window_pattern": 2})).unwrap().architecture.sliding_window.unwrap().tokens, 4096);
    let message = keys(json!({"sliding_window_pattern": 0})).unwrap_err();
    assert!(message.contains("`sliding_window_pattern` is 0, expected at least 1"), "{message}");
}
