//! Small random models, as Hugging Face folders.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

pub type Tensors = HashMap<String, Tensor>;

/// A model as its family's `config.json` and tensors.
#[derive(Clone, Debug)]
pub struct Model {
    pub config: Value,
    pub tensors: Tensors,
}

impl Model {
    /// Random tensors for a configuration, large enough that every component of a layer affects the logits.
    pub fn random(config: Value, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut tensors = Tensors::new();
        for (name, shape) in shapes(&config) {
            let inputs = if shape.len() == 2 && !name.contains("embed") { shape[1] } else { 1 };
            let deviation = if shape.len() == 1 { 0.3 } else { (inputs as f32).powf(-0.5) };
            let centre = if name.contains("norm.weight") && !gemma(&config) { 1.0 } else { 0.0 };
            let count = shape.iter().product::<usize>();
            let numbers = (0..count).map(|_| centre + deviation * rng.random_range(-1.7_f32..1.7));
            let tensor = Tensor::from_iter(numbers, &Device::Cpu).unwrap().reshape(shape).unwrap();
            tensors.insert(name, tensor);
        }
        Self { config, tensors }
    }

    pub fn write(&self, folder: &Path) {
        std::fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        candle_core::safetensors::save(&self.tensors, folder.join("model.safetensors")).unwrap();
    }
}

pub fn size(config: &Value, key: &str) -> usize {
    config[key].as_u64().unwrap_or_else(|| panic!("{key} in {config}")) as usize
}

pub fn gemma(config: &Value) -> bool {
    config["model_type"].as_str().unwrap().starts_with("gemma")
}

pub fn head_dim(config: &Value) -> usize {
    config["head_dim"]
        .as_u64()
        .map_or(size(config, "hidden_size") / size(config, "num_attention_heads"), |d| d as usize)
}

fn shapes(config: &Value) -> Vec<(String, Vec<usize>)> {
    match config["model_type"].as_str().unwrap() {
        "gpt_neox" => gpt_neox_shapes(config),
        _ => llama_shapes(config),
    }
}

fn llama_shapes(config: &Value) -> Vec<(String, Vec<usize>)> {
    let of = |key| size(config, key);
    let (hidden, inner, width) = (of("hidden_size"), of("intermediate_size"), head_dim(config));
    let (q, kv) = (of("num_attention_heads") * width, of("num_key_value_heads") * width);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![of("vocab_size"), hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if config["tie_word_embeddings"] == false {
        shapes.push(("lm_head.weight".to_owned(), vec![of("vocab_size"), hidden]));
    }
    for layer in 0..of("num_hidden_layers") {
        let mut add = |name: &str, shape: Vec<usize>| shapes.push((format!("model.layers.{layer}.{name}"), shape));
        for (name, outputs, inputs, bias) in [
            ("self_attn.q_proj", q, hidden, "attention_bias"),
            ("self_attn.k_proj", kv, hidden, "attention_bias"),
            ("self_attn.v_proj", kv, hidden, "attention_bias"),
            ("self_attn.o_proj", hidden, q, "attention_bias"),
            ("mlp.gate_proj", inner, hidden, "mlp_bias"),
            ("mlp.up_proj", inner, hidden, "mlp_bias"),
            ("mlp.down_proj", hidden, inner, "mlp_bias"),
        ] {
            add(&format!("{name}.weight"), vec![outputs, inputs]);
            if config[bias] == true {
                add(&format!("{name}.bias"), vec![outputs]);
            }
        }
        add("input_layernorm.weight", vec![hidden]);
        add("post_attention_layernorm.weight", vec![hidden]);
        if config["model_type"] == "gemma3_text" {
            add("pre_feedforward_layernorm.weight", vec![hidden]);
            add("post_feedforward_layernorm.weight", vec![hidden]);
            add("self_attn.q_norm.weight", vec![width]);
            add("self_attn.k_norm.weight", vec![width]);
        }
    }
    shapes
}

fn gpt_neox_shapes(config: &Value) -> Vec<(String, Vec<usize>)> {
    let of = |key| size(config, key);
    let (hidden, inner) = (of("hidden_size"), of("intermediate_size"));
    let mut shapes = vec![
        ("gpt_neox.embed_in.weight".to_owned(), vec![of("vocab_size"), hidden]),
        ("gpt_neox.final_layer_norm.weight".to_owned(), vec![hidden]),
        ("gpt_neox.final_layer_norm.bias".to_owned(), vec![hidden]),
    ];
    if config["tie_word_embeddings"] == false {
        shapes.push(("embed_out.weight".to_owned(), vec![of("vocab_size"), hidden]));
    }
    for layer in 0..of("num_hidden_layers") {
        let mut add = |name: &str, shape: Vec<usize>| shapes.push((format!("gpt_neox.layers.{layer}.{name}"), shape));
        for (name, outputs, inputs, bias) in [
            ("attention.query_key_value", 3 * hidden, hidden, config["attention_bias"] != false),
            ("attention.dense", hidden, hidden, config["attention_bias"] != false),
            ("mlp.dense_h_to_4h", inner, hidden, true),
            ("mlp.dense_4h_to_h", hidden, inner, true),
        ] {
            add(&format!("{name}.weight"), vec![outputs, inputs]);
            if bias {
                add(&format!("{name}.bias"), vec![outputs]);
            }
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(&format!("{norm}.weight"), vec![hidden]);
            add(&format!("{norm}.bias"), vec![hidden]);
        }
    }
    shapes
}

/// Query heads and key-value heads: multi-head, grouped-query, multi-query.
fn heads() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![Just((1, 1)), Just((3, 3)), Just((4, 2)), Just((6, 2)), Just((5, 1))]
}

fn sizes(config: &mut Value, (heads, kv_heads): (usize, usize), (vocab, layers, inner): (usize, usize, usize)) {
    config["vocab_size"] = json!(vocab);
    config["num_hidden_layers"] = json!(layers);
    config["intermediate_size"] = json!(inner);
    config["num_attention_heads"] = json!(heads);
    config["num_key_value_heads"] = json!(kv_heads);
    config["max_position_embeddings"] = json!(64);
}

fn some_sizes() -> impl Strategy<Value = (usize, usize, usize)> {
    (11_usize..60, 1_usize..5, 3_usize..40)
}

fn rope_scalings() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!({"rope_type": "default"})),
        (1.0_f32..9.0).prop_map(|factor| json!({"type": "linear", "factor": factor})),
        (2.0_f32..9.0).prop_map(|factor| json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        })),
    ]
}

/// Configurations of `LlamaForCausalLM`; if `plain`, candle-transformers can read them too.
pub fn llama(plain: bool) -> impl Strategy<Value = Value> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let widths = prop_oneof![Just(2_usize), Just(4), Just(6), Just(10)];
    (heads(), some_sizes(), widths, rope_scalings(), 10.0_f32..1e6, flags).prop_map(
        move |(heads, numbers, width, mut scaling, theta, (tied, attention_bias, mlp_bias, other))| {
            if plain && scaling["type"] == "linear" || scaling["rope_type"] == "default" {
                scaling = Value::Null;
            }
            let mut config = json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": heads.0 * width,
                "rms_norm_eps": 1e-5, "rope_theta": theta, "rope_scaling": scaling, "tie_word_embeddings": tied,
            });
            sizes(&mut config, heads, numbers);
            if !plain {
                config["attention_bias"] = json!(attention_bias);
                config["mlp_bias"] = json!(mlp_bias);
                config["hidden_act"] = json!(if mlp_bias { "gelu" } else { "silu" });
                if other {
                    config["head_dim"] = json!(width + 2);
                }
            }
            config
        },
    )
}

pub fn gemma1() -> impl Strategy<Value = Value> {
    let widths = (prop_oneof![Just(2_usize), Just(8), Just(14)], 3_usize..30);
    (heads(), some_sizes(), widths, any::<bool>(), 10.0_f32..1e5).prop_map(
        |(heads, numbers, (head_dim, hidden), attention_bias, theta)| {
            let mut config = json!({
                "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_size": hidden,
                "head_dim": head_dim, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": theta,
                "attention_bias": attention_bias,
            });
            sizes(&mut config, heads, numbers);
            config
        },
    )
}

/// Configurations of `Gemma3ForCausalLM`; if `plain`, candle-transformers can read them too.
pub fn gemma3(plain: bool) -> impl Strategy<Value = Value> {
    let widths = (prop_oneof![Just(2_usize), Just(8), Just(14)], 3_usize..30);
    let windows = (1_usize..12, 1_usize..4);
    (heads(), some_sizes(), widths, windows, any::<bool>(), 1.0_f32..9.0).prop_map(
        move |(heads, numbers, (head_dim, hidden), (window, pattern), attention_bias, other)| {
            let mut config = json!({
                "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": hidden,
                "head_dim": head_dim, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
                "rope_theta": 1e6, "rope_local_base_freq": 1e4, "attention_bias": attention_bias,
                "sliding_window": window, "sliding_window_pattern": pattern, "query_pre_attn_scalar": head_dim,
                "attn_logit_softcapping": null, "final_logit_softcapping": null,
            });
            sizes(&mut config, heads, numbers);
            if !plain {
                config["query_pre_attn_scalar"] = json!(other);
                config["rope_scaling"] = json!({"rope_type": "linear", "factor": other});
                let sliding = |layer| if (layer + pattern) % 2 == 0 { "sliding_attention" } else { "full_attention" };
                config["layer_types"] = (0..numbers.1).map(sliding).collect();
            }
            config
        },
    )
}

pub fn gpt_neox() -> impl Strategy<Value = Value> {
    let widths = (1_usize..5, prop_oneof![Just(2_usize), Just(4), Just(8), Just(12)]);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (some_sizes(), widths, flags, prop_oneof![Just(0.5), Just(1.0), Just(0.25)]).prop_map(
        |(numbers, (heads, head_dim), (tied, parallel, bias), share)| {
            // An even number of dimensions is rotated, and at least one pair.
            let rotated = (head_dim as f64 * share) as usize;
            let share = if rotated >= 2 && rotated.is_multiple_of(2) { share } else { 1.0 };
            let mut config = json!({
                "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": heads * head_dim,
                "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": share, "rotary_emb_base": 10_000,
                "use_parallel_residual": parallel, "attention_bias": bias, "tie_word_embeddings": tied,
            });
            sizes(&mut config, (heads, heads), numbers);
            config
        },
    )
}
