//! Keys of configurations are used, rejected or warned about, by their meaning in the programs that write them.

use engine::Checkpoint;
use engine::config::{ModelConfig, RopeScaling};
use serde_json::{Value, json};

use super::equality::{assert_close, engine_logits, tokens};
use super::folders::Model;
use super::plain;
use super::warnings::with_warnings;

/// A small model of a family.
pub fn config_of(model_type: &str) -> Value {
    let mut config = json!({
        "model_type": model_type, "vocab_size": 19, "hidden_size": 16, "intermediate_size": 6, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64,
    });
    match model_type {
        "gpt_neox" => config["tie_word_embeddings"] = json!(false),
        "llama" => {
            config["tie_word_embeddings"] = json!(false);
            config["num_key_value_heads"] = json!(2);
        }
        _ => {
            config["num_key_value_heads"] = json!(2);
            config["head_dim"] = json!(8);
        }
    }
    config
}

/// The configuration that is read from these keys, and the warnings.
pub fn read(model_type: &str, keys: &Value) -> (Result<ModelConfig, String>, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let mut model = Model::random(config_of(model_type), 1);
    model.config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    model.write(folder.path());
    with_warnings(|| match Checkpoint::read(folder.path(), 1) {
        Ok(checkpoint) => Ok(checkpoint.weights.config().clone()),
        Err(error) => Err(error.to_string()),
    })
}

#[test]
fn rotary_bases_and_scalings_are_those_of_transformers() {
    // Written by scripts/transformers_rope.py.
    let table: Value = serde_json::from_str(include_str!("transformers_rope.json")).unwrap();
    let rows = table["rows"].as_array().unwrap();
    assert!(rows.len() > 50);
    for row in rows {
        let found = read(row["model_type"].as_str().unwrap(), &row["keys"]).0;
        let architecture = found.unwrap_or_else(|error| panic!("{row}: {error}")).architecture;
        let (full, sliding) = match &row["rope_parameters"] {
            by_layer if by_layer["full_attention"].is_object() => {
                (&by_layer["full_attention"], Some(&by_layer["sliding_attention"]))
            }
            flat => (flat, None),
        };
        let number = |key: &str| full[key].as_f64().unwrap() as f32;
        let scaling = match full["rope_type"].as_str().unwrap() {
            "default" => None,
            "linear" => Some(RopeScaling::Linear { factor: number("factor") }),
            "llama3" => Some(RopeScaling::Llama3 {
                factor: number("factor"),
                low_freq_factor: number("low_freq_factor"),
                high_freq_factor: number("high_freq_factor"),
                original_positions: number("original_max_position_embeddings") as usize,
            }),
            other => panic!("{other}"),
        };
        assert_eq!((architecture.rope_theta, architecture.rope_scaling), (number("rope_theta"), scaling), "{row}");
        if let Some(sliding) = sliding {
            let found = architecture.sliding_window.as_ref().map(|window| f64::from(window.rope_theta));
            assert_eq!((found, &sliding["rope_type"]), (sliding["rope_theta"].as_f64(), &json!("default")), "{row}");
        }
        if row["model_type"] == "gpt_neox" {
            let rotated = 8.0 * full["partial_rotary_factor"].as_f64().unwrap();
            assert_eq!(architecture.rotary_dims, Some(rotated as usize), "{row}");
        }
    }
}

#[test]
fn a_rotary_base_within_the_scaling_changes_the_logits_as_one_beside_it() {
    let mut beside = config_of("llama");
    (beside["rope_theta"], beside["rms_norm_eps"]) = (json!(5e5), json!(1e-6));
    let mut within = beside.clone();
    within.as_object_mut().unwrap().remove("rope_theta");
    within["rope_scaling"] = json!({"rope_theta": 5e5, "rope_type": "default"});
    let (beside, within) = (Model::random(beside, 7), Model::random(within, 7));
    let folder = tempfile::tempdir().unwrap();
    within.write(folder.path());
    let tokens = tokens(&beside.config, 30);
    assert_close(&engine_logits(folder.path(), 1, &tokens), &plain::logits(&beside, &tokens));
}

#[test]
fn a_key_that_changes_the_result_is_refused_unless_its_value_does_not() {
    const ALL: [&str; 4] = ["llama", "gemma", "gemma3_text", "gpt_neox"];
    let cases: [(&[&str], &str, Value, Value); 36] = [
        (&ALL, "embedding_multiplier", json!(12.0), json!(1.0)),
        (&ALL, "residual_multiplier", json!(0.22), json!(1)),
        (&ALL, "logits_scaling", json!(8.0), json!(1.0)),
        (&ALL, "attention_multiplier", json!(0.0078125), Value::Null),
        (&ALL, "logit_scale", json!(0.0625), json!(1.0)),
        (&ALL, "attn_logit_softcapping", json!(50.0), Value::Null),
        (&ALL, "final_logit_softcapping", json!(30.0), Value::Null),
        (&ALL, "no_rope_layers", json!([1, 0]), json!([1, 1])),
        (&ALL, "no_rope_layer_interval", json!(4), json!(0)),
        (&ALL, "rope_interleaved", json!(true), json!(false)),
        (&ALL, "use_bidirectional_attention", json!(true), json!(false)),
        (&ALL, "qk_layernorm", json!(true), json!(false)),
        (&ALL, "use_qk_norm", json!(true), json!(false)),
        (&ALL, "position_embedding_type", json!("nope"), json!("rope")),
        (&ALL, "alibi", json!(true), json!(false)),
        (&ALL, "num_local_experts", json!(8), json!(0)),
        (&ALL, "quantization_config", json!({"bits": 4}), Value::Null),
        (&ALL, "quantization", json!({"group_size": 64, "bits": 4}), Value::Null),
        (&ALL, "clip_qkv", json!(8.0), Value::Null),
        (&ALL, "is_encoder_decoder", json!(true), json!(false)),
        (&ALL, "text_config", json!({"vocab_size": 3}), Value::Null),
        (&["llama", "gemma", "gpt_neox"], "attention_chunk_size", json!(8192), Value::Null),
        (&["llama", "gemma", "gpt_neox"], "sliding_window", json!(63), json!(64)),
        (&["llama", "gemma", "gpt_neox"], "use_sliding_window", json!(true), json!(false)),
        (
            &["llama", "gemma", "gpt_neox"],
            "layer_types",
            json!(["sliding_attention", "full_attention"]),
            json!(["full_attention", "full_attention"]),
        ),
        (&["llama", "gemma", "gpt_neox"], "query_pre_attn_scalar", json!(256), Value::Null),
        (&["llama", "gemma", "gpt_neox"], "sliding_window_pattern", json!(6), Value::Null),
        (&["llama", "gemma", "gemma3_text"], "partial_rotary_factor", json!(0.5), json!(1.0)),
        (&["llama", "gemma", "gemma3_text"], "parallel_attn", json!(true), json!(false)),
        (&["gemma", "gemma3_text"], "mlp_bias", json!(true), json!(false)),
        (&["gpt_neox"], "partial_rotary_factor", json!(0.5), json!(0.25)),
        (&["gpt_neox"], "rope_theta", json!(5e5), json!(10_000)),
        (&["gpt_neox"], "num_key_value_heads", json!(1), json!(2)),
        (&["gpt_neox"], "head_dim", json!(4), json!(8)),
        (&["gemma3_text"], "hidden_act", json!("silu"), json!("gelu_pytorch_tanh")),
        (&["gemma"], "hidden_activation", json!("gelu"), json!("gelu_pytorch_tanh")),
    ];
    for (families, key, changes, harmless) in cases {
        for family in families {
            let (refused, _) = read(family, &json!({key: changes}));
            let message = refused.err().unwrap_or_else(|| panic!("{family} with `{key}` {changes}"));
            assert!(message.contains(&format!("config.json: `{key}` is ")), "{message}");
            let (read, warnings) = read(family, &json!({key: harmless}));
            assert!(read.is_ok() && warnings.is_empty(), "{family} with `{key}` {harmless}: {read:?}, {warnings:?}");
        }
    }
    let unused = json!({"sliding_window": 8, "use_sliding_window": false, "max_window_layers": 2});
    assert!(read("llama", &unused).0.is_ok());
    let null = read("gemma3_text", &json!({"sliding_window": null})).0.unwrap_err();
    assert!(null.contains("`sliding_window` is null, expected a whole number"), "{null}");
    let other = json!({"rope_scaling": {"type": "linear", "factor": 8.0}});
    let message = read("gemma3_text", &other).0.unwrap_err();
    assert!(message.contains("`rope_scaling.rope_type` is missing") && message.contains("`type`"), "{message}");
    let pattern = read("gemma3_text", &json!({"_sliding_window_pattern": 2})).0.unwrap_err();
    assert!(pattern.contains("`_sliding_window_pattern` is 2, expected 6, or `layer_types`"), "{pattern}");
    for family in ["llama", "gemma", "gpt_neox"] {
        let nested = json!({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7e4}}});
        let message = read(family, &nested).0.unwrap_err();
        assert!(message.contains("`rope_parameters.full_attention` is "), "{message}");
    }
    let flat = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}});
    let message = read("gemma3_text", &flat).0.unwrap_err();
    assert!(message.contains("expected only full_attention and sliding_attention here"), "{message}");
}

#[test]
fn keys_that_are_not_known_or_not_used_are_warned_about_once_by_name() {
    for (family, keys, expected) in [
        ("llama", json!({"mup_width": 3}), "`mup_width` is 3: not known to this engine, and assumed to change nothing"),
        (
            "llama",
            json!({
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 7e4},
            }),
            "`rope_parameters` is {\"rope_theta\":70000.0,\"rope_type\":\"default\"}: not used, for `rope_scaling` is",
        ),
        (
            "llama",
            json!({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}),
            "`rope_theta` is 10000.0: not used, for the rotary parameters have another",
        ),
        (
            "gemma3_text",
            json!({
                "rope_local_base_freq": 300.0,
                "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0}},
            }),
            "`rope_local_base_freq` is 300.0: not used, for the rotary parameters have another",
        ),
        (
            "gemma",
            json!({"rope_scaling": {"rope_type": "default", "factor": 4.0}}),
            "`rope_scaling.factor` is 4.0: not used by this type of rope scaling",
        ),
        (
            "gpt_neox",
            json!({"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 4.0}}),
            "`rope_parameters.type` is \"yarn\": not used, for `rope_type` is there",
        ),
        (
            "gemma3_text",
            json!({"layer_types": ["full_attention", "full_attention"], "sliding_window_pattern": 2}),
            "`sliding_window_pattern` is 2: not used, for `layer_types` is there",
        ),
    ] {
        let (read, warnings) = read(family, &keys);
        assert!(read.is_ok() && warnings.len() == 1, "{warnings:?}");
        assert!(warnings[0].contains("config.json: ") && warnings[0].contains(expected), "{warnings:?}");
    }
}

#[test]
fn a_configuration_as_transformers_writes_it_is_read_without_a_word() {
    for (family, architecture) in [
        ("llama", "LlamaForCausalLM"),
        ("gemma", "GemmaForCausalLM"),
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("gpt_neox", "GPTNeoXForCausalLM"),
    ] {
        let keys = json!({
            "architectures": [architecture], "_name_or_path": "x", "transformers_version": "5.24.0", "dtype": "bfloat16",
            "torch_dtype": "bfloat16", "use_cache": true, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0,
            "initializer_range": 0.02, "attention_dropout": 0.0, "hidden_dropout": 0.0, "pretraining_tp": 1,
            "quantization_config": null, "sliding_window": 4096,
        });
        let (read, warnings) = read(family, &keys);
        assert!(read.is_ok() && warnings.is_empty(), "{family}: {read:?} {warnings:?}");
    }
}

#[test]
fn a_model_type_that_is_not_that_of_the_architecture_is_refused() {
    let message = |keys: Value| read("llama", &keys).0.unwrap_err();
    let mistral = message(json!({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}));
    let expected = "config.json: `model_type` is \"mistral\", expected \"llama\", which goes with LlamaForCausalLM";
    assert!(mistral.contains(expected), "{mistral}");
    let unknown = message(json!({"architectures": ["OlmoForCausalLM"]}));
    assert!(unknown.contains("`architectures` is [\"OlmoForCausalLM\"], expected one of LlamaFor"), "{unknown}");
    let none = message(json!({"model_type": null}));
    assert!(none.contains("`model_type` is null, expected a string"), "{none}");
}

#[test]
fn a_head_in_the_file_of_a_tied_model_is_used_if_it_is_not_the_embedding() {
    for (family, head) in [("llama", "lm_head.weight"), ("gemma", "lm_head.weight"), ("gpt_neox", "embed_out.weight")] {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config_of(family);
        config["tie_word_embeddings"] = json!(false);
        let untied = Model::random(config, 5);
        let mut tied = untied.clone();
        tied.config["tie_word_embeddings"] = json!(true);
        tied.write(folder.path());
        let (read, warnings) = with_warnings(|| Checkpoint::read(folder.path(), 1).unwrap().weights);
        assert!(!read.config().tie_embeddings);
        assert!(warnings.len() == 1 && warnings[0].contains(head), "{warnings:?}");
        assert!(warnings[0].contains("`tie_word_embeddings` is true: not used"), "{warnings:?}");
        let tokens = tokens(&untied.config, 9);
        if family == "llama" {
            let mut plain = untied.clone();
            plain.config["rms_norm_eps"] = json!(1e-6);
            plain.config["rope_theta"] = json!(1e4);
            assert_close(&engine_logits(folder.path(), 1, &tokens), &plain::logits(&plain, &tokens));
        }

        let embedding = if family == "gpt_neox" { "gpt_neox.embed_in.weight" } else { "model.embed_tokens.weight" };
        let equal = tied.tensors[embedding].clone();
        tied.tensors.insert(head.to_owned(), equal);
        tied.write(folder.path());
        let (read, warnings) = with_warnings(|| Checkpoint::read(folder.path(), 1).unwrap().weights);
        assert!(read.config().tie_embeddings && warnings.is_empty(), "{warnings:?}");
    }
}
