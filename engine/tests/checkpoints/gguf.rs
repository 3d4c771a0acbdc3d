//! GGUF files, written by candle from models with known logits.

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Value as GgufValue, write};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use engine::Checkpoint;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::equality::{assert_close, engine_logits, tokens};
use super::folders::{Model, gemma3, head_dim, llama, size};
use super::plain;
use super::stored;
use super::tokens::model_of;
use super::warnings::with_warnings;

pub fn uint(value: usize) -> GgufValue {
    GgufValue::U32(value as u32)
}

pub fn text(value: &str) -> GgufValue {
    GgufValue::String(value.to_owned())
}

pub fn texts(values: &[&str]) -> GgufValue {
    GgufValue::Array(values.iter().map(|value| text(value)).collect())
}

/// Name of a tensor in files of llama.cpp's converter.
fn gguf_name(name: &str, gemma3: bool) -> String {
    let mut name = name.replace("model.layers.", "blk.").replace("model.norm", "output_norm");
    let norms = match gemma3 {
        true => [("post_attention_layernorm", "post_attention_norm"), ("pre_feedforward_layernorm", "ffn_norm")],
        false => [("post_attention_layernorm", "ffn_norm"), ("", "")],
    };
    for (theirs, ours) in norms.into_iter().chain([
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ]) {
        if !theirs.is_empty() {
            name = name.replace(theirs, ours);
        }
    }
    name
}

/// Row `2 i` of a head is its row `i`, row `2 i + 1` is row `i + width / 2`.
fn interleaved(tensor: &Tensor, width: usize) -> Tensor {
    let rows = (0..tensor.dim(0).unwrap()).map(|row| {
        let (head, place) = (row / width, row % width);
        (head * width + place / 2 + place % 2 * (width / 2)) as u32
    });
    tensor.index_select(&Tensor::from_iter(rows, &Device::Cpu).unwrap(), 0).unwrap()
}

/// Writes a model as llama.cpp's converter does.
pub fn write_gguf(model: &Model, path: &Path, extra: &[(&str, GgufValue)], more: &[(&str, Tensor)]) {
    let (values, tensors) = contents(model, extra, more);
    write_file(path, &values, &tensors);
}

pub fn write_file(path: &Path, values: &[(String, GgufValue)], tensors: &[(String, QTensor)]) {
    let values: Vec<(&str, &GgufValue)> = values.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    write(&mut std::fs::File::create(path).unwrap(), &values, &tensors).unwrap();
}

/// Contents of such a file.
pub type Contents = (Vec<(String, GgufValue)>, Vec<(String, QTensor)>);

pub fn contents(model: &Model, extra: &[(&str, GgufValue)], more: &[(&str, Tensor)]) -> Contents {
    let config = &model.config;
    let gemma3 = config["model_type"] == "gemma3_text";
    let (name, width) = match config["model_type"].as_str() {
        Some("gemma3_text") => ("gemma3", head_dim(config)),
        Some("nanbeige") => ("nanbeige", head_dim(config)),
        _ => ("llama", head_dim(config)),
    };
    let mut values = vec![("general.architecture".to_owned(), text(name))];
    let mut add = |key: &str, value| values.push((format!("{name}.{key}"), value));
    add("block_count", uint(size(config, "num_hidden_layers")));
    add("context_length", uint(size(config, "max_position_embeddings")));
    add("embedding_length", uint(size(config, "hidden_size")));
    add("feed_forward_length", uint(size(config, "intermediate_size")));
    add("attention.head_count", uint(size(config, "num_attention_heads")));
    add("attention.head_count_kv", uint(size(config, "num_key_value_heads")));
    add("attention.key_length", uint(width));
    add("attention.value_length", uint(width));
    let number = |key: &str| GgufValue::F32(config[key].as_f64().unwrap() as f32);
    add("attention.layer_norm_rms_epsilon", number("rms_norm_eps"));
    add("rope.freq_base", number("rope_theta"));
    if gemma3 {
        add("attention.sliding_window", uint(size(config, "sliding_window")));
        add("attention.sliding_window_pattern", uint(size(config, "sliding_window_pattern")));
    }
    values.extend(extra.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));

    let convert = |(name, tensor): (&String, &Tensor)| {
        let tensor = match () {
            () if gemma3 && name.contains("norm.weight") => (tensor + 1.0).unwrap(),
            () if !gemma3 && (name.contains("q_proj") || name.contains("k_proj")) => interleaved(tensor, width),
            () => tensor.clone(),
        };
        (gguf_name(name, gemma3), tensor)
    };
    let more = more.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone()));
    let quantize = |(name, tensor): (String, Tensor)| (name, QTensor::quantize(&tensor, GgmlDType::F32).unwrap());
    let mut tensors: Vec<_> = model.tensors.iter().map(convert).chain(more).map(quantize).collect();
    tensors.sort_by(|(first, _), (second, _)| first.cmp(second));
    (values, tensors)
}

/// Writes a model as `parts` files, as llama.cpp splits them, and returns the path of the first.
pub fn write_split(model: &Model, folder: &Path, parts: usize) -> PathBuf {
    let (values, mut tensors) = contents(model, &[], &[]);
    let (each, count) = (tensors.len().div_ceil(parts), tensors.len());
    for part in 0..parts {
        let rest = tensors.split_off(each.min(tensors.len()));
        let split = [
            ("split.no".to_owned(), GgufValue::U16(part as u16)),
            ("split.count".to_owned(), GgufValue::U16(parts as u16)),
            ("split.tensors.count".to_owned(), GgufValue::I32(count as i32)),
        ];
        let values = if part == 0 { [&values[..], &split[..]].concat() } else { split.to_vec() };
        write_file(&part_path(folder, part, parts), &values, &tensors);
        tensors = rest;
    }
    part_path(folder, 0, parts)
}

pub fn part_path(folder: &Path, part: usize, parts: usize) -> PathBuf {
    folder.join(format!("model-of-x-{:05}-of-{parts:05}.gguf", part + 1))
}

#[test]
fn all_parts_of_a_split_file_are_read_whichever_is_given() {
    let model = small_llama();
    let folder = tempfile::tempdir().unwrap();
    write_split(&model, folder.path(), 3);
    let tokens = tokens(&model.config, 20);
    for part in 0..3 {
        let found = engine_logits(&part_path(folder.path(), part, 3), 1, &tokens);
        assert_close(&found, &plain::logits(&model, &tokens));
    }
}

#[test]
fn parts_of_a_split_file_that_are_missing_or_of_another_one_are_named() {
    let model = small_llama();
    let folder = tempfile::tempdir().unwrap();
    let first = write_split(&model, folder.path(), 3);
    let refusal = |path: &Path| Checkpoint::read(path, 1).map(drop).unwrap_err().to_string();
    let third = part_path(folder.path(), 2, 3);
    let bytes = std::fs::read(&third).unwrap();

    std::fs::remove_file(&third).unwrap();
    let message = refusal(&first);
    assert!(message.contains("part 1 of 3: ") && message.contains("-00003-of-00003.gguf is missing"), "{message}");

    std::fs::copy(part_path(folder.path(), 1, 3), &third).unwrap();
    let message = refusal(&first);
    let expected =
        "-00003-of-00003.gguf: not a supported GGUF file: `split.no` and `split.count` are 1 and 3, expected";
    assert!(message.contains(expected), "{message}");

    let renamed = folder.path().join("first.gguf");
    std::fs::copy(&first, &renamed).unwrap();
    let message = refusal(&renamed);
    assert!(message.contains("part 1 of 3: its name must end in -00001-of-00003.gguf"), "{message}");

    // The last part has no tensor.
    std::fs::write(&third, &bytes).unwrap();
    let (_, tensors) = contents(&model, &[], &[]);
    let split =
        |no| [("split.no".to_owned(), GgufValue::U16(no)), ("split.count".to_owned(), GgufValue::U16(3))].to_vec();
    write_file(&third, &split(2), &[]);
    let message = refusal(&first);
    assert!(message.contains("`split.tensors.count` is "), "{message}");
    write_file(&third, &split(2), &tensors[..1]);
    let message = refusal(&first);
    assert!(message.contains(&format!("tensor `{}` is in another part too", tensors[0].0)), "{message}");
}

#[test]
fn metadata_that_changes_the_result_is_refused_unless_its_value_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let read = |key: &str, value: &GgufValue| {
        write_gguf(&small_llama(), &path, &[(key, value.clone())], &[]);
        let (read, warnings) = with_warnings(|| Checkpoint::read(&path, 1).map(drop));
        (read.map_err(|error| error.to_string()), warnings)
    };
    let (float, whole) = (GgufValue::F32, GgufValue::U32);
    for (key, changes, harmless) in [
        ("llama.attention.scale", float(0.5), float(8_f32.powf(-0.5))),
        ("llama.logit_scale", float(8.0), float(1.0)),
        ("llama.residual_scale", float(0.22), float(0.0)),
        ("llama.embedding_scale", float(12.0), float(1.0)),
        ("llama.attention.sliding_window", whole(63), whole(64)),
        ("llama.expert_count", whole(8), whole(0)),
        ("llama.expert_used_count", whole(2), whole(0)),
        ("llama.final_logit_softcapping", float(30.0), float(0.0)),
        ("llama.attn_logit_softcapping", float(50.0), float(0.0)),
        ("llama.attention.causal", GgufValue::Bool(false), GgufValue::Bool(true)),
        ("llama.rope.scaling.attn_factor", float(1.2), float(1.0)),
        ("llama.rope.dimension_count", whole(4), whole(8)),
        ("general.type", text("adapter"), text("model")),
    ] {
        let message = read(key, &changes).0.err().unwrap_or_else(|| panic!("{key}"));
        assert!(message.contains(&format!("model.gguf: `{key}` is ")), "{message}");
        assert_eq!(read(key, &harmless), (Ok(()), Vec::new()), "{key}");
    }
    let (read_well, warnings) = read("llama.mup_width", &whole(3));
    assert!(read_well.is_ok() && warnings.len() == 1, "{warnings:?}");
    assert!(warnings[0].contains("`llama.mup_width` is 3: not known to this engine"), "{warnings:?}");
    for harmless in ["general.name", "general.quantization_version", "quantize.imatrix.file", "tokenizer.chat_template"]
    {
        assert_eq!(read(harmless, &text("x")), (Ok(()), Vec::new()), "{harmless}");
    }
}

#[test]
fn sizes_that_are_listed_by_layer_are_read_if_they_are_equal() {
    let model = small_llama();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let (mut values, tensors) = contents(&model, &[], &[]);
    let list = |numbers: [u32; 2]| GgufValue::Array(numbers.map(GgufValue::U32).to_vec());
    let mut set = |key: &str, value: GgufValue| {
        values.iter_mut().find(|(known, _)| known == key).unwrap().1 = value;
        write_file(&path, &values, &tensors);
        Checkpoint::read(&path, 1).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(set("llama.attention.head_count_kv", list([1, 1])), Ok(()));
    assert_eq!(set("llama.feed_forward_length", list([10, 10])), Ok(()));
    let message = set("llama.attention.head_count", list([2, 1])).unwrap_err();
    assert!(message.contains("`llama.attention.head_count` is \"an array of 2\", expected the same"), "{message}");
}

#[test]
fn a_gemma_3_has_the_defaults_that_llama_cpp_has() {
    let config = json!({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 19, "hidden_size": 16,
        "intermediate_size": 6, "num_hidden_layers": 7, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "sliding_window": 4, "sliding_window_pattern": 6, "query_pre_attn_scalar": 8,
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let (values, tensors) = contents(&Model::random(config, 2), &[], &[]);
    let architecture = |without: &[&str], window: Option<u32>| {
        let mut values: Vec<_> =
            values.iter().filter(|(key, _)| !without.iter().any(|end| key.ends_with(end))).cloned().collect();
        values.extend(window.map(|tokens| ("gemma3.attention.sliding_window".to_owned(), GgufValue::U32(tokens))));
        write_file(&path, &values, &tensors);
        Checkpoint::read(&path, 1).unwrap().weights.config().architecture.clone()
    };
    let found = architecture(&["rope.freq_base", "sliding_window_pattern"], None);
    let window = found.sliding_window.unwrap();
    assert_eq!((found.rope_theta, window.rope_theta, window.tokens), (10_000.0, 10_000.0, 4));
    assert_eq!(window.layers, [0, 1, 2, 3, 4, 6]);
    assert_eq!(architecture(&["sliding_window"], None).sliding_window, None);
    assert_eq!(architecture(&["sliding_window"], Some(0)).sliding_window, None);
}

/// Changes a configuration to one that a GGUF file can contain.
fn for_gguf(mut config: Value) -> Value {
    config["rope_scaling"] = Value::Null;
    config["hidden_act"] = json!("silu");
    if config["model_type"] == "gemma3_text" {
        config["rms_norm_eps"] = json!(1e-6);
    }
    config
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_gguf_file_gives_the_logits_of_the_model_it_was_made_of(
        config in prop_oneof![llama(false), gemma3(true)].prop_map(for_gguf), seed in 0_u64..1000,
    ) {
        let model = Model::random(config, seed);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        write_gguf(&model, &path, &[], &[]);
        let tokens = tokens(&model.config, 14);
        assert_close(&engine_logits(&path, 1, &tokens), &plain::logits(&model, &tokens));
    }
}

pub fn small_llama() -> Model {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 17, "hidden_size": 16,
        "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": false,
    });
    Model::random(config, 4)
}

#[test]
fn a_nanbeige_file_is_the_model_of_its_folder() {
    for name in ["nanbeige", "nanbeige_skip_norm"] {
        let model = stored::model(name);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let loops = ("nanbeige.num_loops", uint(size(&model.config, "num_loops")));
        let skips = model.config["skip_loop_final_norm"].as_bool().unwrap();
        let skips = ("nanbeige.skip_loop_final_norm", GgufValue::Bool(skips));
        write_gguf(&model, &path, &[loops.clone(), skips], &[]);
        let (of_file, of_folder) = (
            Checkpoint::read(&path, None).unwrap().weights,
            Checkpoint::read(&stored::folder(name), None).unwrap().weights,
        );
        assert_eq!(of_file.config(), of_folder.config());
        assert_eq!(of_file.fingerprint().unwrap(), of_folder.fingerprint().unwrap());
        assert_eq!(Checkpoint::read(&path, Some(5)).unwrap().weights.config().num_loops, 5);

        let refusal = |extra: &[(&str, GgufValue)]| {
            write_gguf(&model, &path, extra, &[]);
            Checkpoint::read(&path, None).err().expect("it is refused").to_string()
        };
        let missing = refusal(&[]);
        assert!(missing.contains("model.gguf: `nanbeige.num_loops` is missing, expected a whole number"), "{missing}");
        let unrolled = refusal(&[loops, ("nanbeige.loop_count", uint(2))]);
        assert!(unrolled.contains("model.gguf: `nanbeige.loop_count` is 2, expected missing"), "{unrolled}");
    }
}

#[test]
fn llama_3_scaling_is_found_in_its_factors_and_no_other_is() {
    let mut model = small_llama();
    model.config["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    // 5e5^-(i / 4): in 8192 tokens, the first rotates 1304 times, the second 49, the third 1.84, the last 0.07.
    let third = 1.0 / ((1.0 - 0.8438_f64 / 3.0) / 32.0 + 0.8438 / 3.0);
    let turns = 8192.0 / (2.0 * std::f64::consts::PI * 5e5_f64.powf(0.5));
    assert!((turns - 1.8438).abs() < 1e-4);
    let factors = |last: f32| Tensor::new(&[1.0_f32, 1.0, third as f32, last], &Device::Cpu).unwrap();
    write_gguf(&model, &path, &[], &[("rope_freqs.weight", factors(32.0))]);
    let tokens = tokens(&model.config, 20);
    assert_close(&engine_logits(&path, 1, &tokens), &plain::logits(&model, &tokens));

    write_gguf(&model, &path, &[], &[("rope_freqs.weight", factors(30.0))]);
    let message = Checkpoint::read(&path, 1).map(drop).unwrap_err().to_string();
    assert!(message.contains("`rope_freqs.weight` holds other factors"), "{message}");
}

#[test]
fn a_rope_factor_without_a_type_is_one_of_linear_scaling() {
    let mut model = small_llama();
    model.config["rope_scaling"] = json!({"rope_type": "linear", "factor": 4.0});
    let tokens = tokens(&model.config, 20);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        write_gguf(&model, &path, &[(key, GgufValue::F32(4.0))], &[]);
        assert_close(&engine_logits(&path, 1, &tokens), &plain::logits(&model, &tokens));
    }
    write_gguf(&model, &path, &[("llama.rope.scaling.type", text("yarn"))], &[]);
    let message = Checkpoint::read(&path, 1).map(drop).unwrap_err().to_string();
    assert!(message.contains("`llama.rope.scaling.type` is \"yarn\", expected none or linear"), "{message}");
}

/// Texts that are hard for tokenizers.
const TEXTS: [&str; 4] = ["a ab  abc", "12 ab\n", "", "naïve ☃ b"];

fn tokenizer_of(extra: &[(&str, GgufValue)]) -> engine::Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    write_gguf(&model_of(270), &path, extra, &[]);
    Checkpoint::read(&path, 1).unwrap().tokenizer.unwrap()
}

#[test]
fn sentence_piece_joins_the_best_pair_and_falls_back_on_bytes() {
    let bytes: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
    let pieces = [("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("▁", 1, -5.0), ("a", 1, -6.0), ("b", 1, -7.0), ("c", 1, -8.0)];
    // "ab" is better than "▁a", so the word " ab" is "▁" + "ab" and " a" is one token.
    let joined = [("▁a", 1, -2.0), ("ab", 1, -1.0), ("▁▁", 4, -1000.0)];
    let all: Vec<_> = pieces.iter().chain(&joined).map(|(text, kind, score)| (*text, *kind, *score)).collect();
    let all: Vec<_> = all.into_iter().chain(bytes.iter().map(|text| (text.as_str(), 6, 0.0))).collect();
    let tokenizer = |space_first| {
        tokenizer_of(&[
            ("tokenizer.ggml.model", text("llama")),
            ("tokenizer.ggml.tokens", texts(&all.iter().map(|(text, _, _)| *text).collect::<Vec<_>>())),
            ("tokenizer.ggml.token_type", GgufValue::Array(all.iter().map(|(_, k, _)| GgufValue::I32(*k)).collect())),
            ("tokenizer.ggml.scores", GgufValue::Array(all.iter().map(|(_, _, s)| GgufValue::F32(*s)).collect())),
            ("tokenizer.ggml.unknown_token_id", uint(0)),
            ("tokenizer.ggml.bos_token_id", uint(1)),
            ("tokenizer.ggml.add_space_prefix", GgufValue::Bool(space_first)),
        ])
    };
    let gemma = tokenizer(false);
    assert_eq!(gemma.encode("a ab  c").unwrap(), [3, 2, 7, 8, 5]);
    assert_eq!(gemma.encode_prompt("a").unwrap(), [1, 3]);
    assert_eq!(gemma.encode("é").unwrap(), [9 + 0xC3, 9 + 0xA9]);
    let llama = tokenizer(true);
    assert_eq!(llama.encode("a ab").unwrap(), [6, 2, 7]);
    for tokenizer in [gemma, llama] {
        for text in TEXTS {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
        }
    }
}

#[test]
fn byte_level_tokens_are_split_as_the_file_says() {
    let alphabet = byte_alphabet();
    let mut all: Vec<&str> = alphabet.iter().map(String::as_str).collect();
    all.extend(["12", "ab", "Ġab", "<|end|>"]);
    let kinds: Vec<_> = (0..all.len()).map(|id| GgufValue::I32(if id == 259 { 3 } else { 1 })).collect();
    let tokenizer = |splitter| {
        tokenizer_of(&[
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text(splitter)),
            ("tokenizer.ggml.tokens", texts(&all)),
            ("tokenizer.ggml.token_type", GgufValue::Array(kinds.clone())),
            ("tokenizer.ggml.merges", texts(&["1 2", "a b", "Ġ ab"])),
        ])
    };
    let words = tokenizer("gpt-2");
    assert_eq!(words.encode("12 ab<|end|>").unwrap(), [256, 258, 259]);
    let digits = tokenizer("smollm");
    assert_eq!(digits.encode("12 ab").unwrap().len(), 3);
    assert_eq!(tokenizer("llama-bpe").encode("12 ab").unwrap(), [256, 258]);
    for text in TEXTS {
        for tokenizer in [&words, &digits] {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
        }
    }
}

/// GPT-2's printable characters for the 256 bytes: printable bytes represent themselves.
fn byte_alphabet() -> Vec<String> {
    let prints = |byte: u32| (33..127).contains(&byte) || (161..173).contains(&byte) || (174..256).contains(&byte);
    let mut others = 256..;
    let of_byte = |byte| if prints(byte) { byte } else { others.next().unwrap() };
    (0..256).map(of_byte).map(|point| char::from_u32(point).unwrap().to_string()).collect()
}
