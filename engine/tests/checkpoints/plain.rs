//! The families by their Hugging Face definitions, composed from candle's operations: slow, and without code in common
//! with the engine.

use candle_core::{D, DType, Device, Tensor};
use serde_json::Value;

use super::folders::{Model, gemma, head_dim, size};

fn number(config: &Value, key: &str, default: f64) -> f64 {
    config[key].as_f64().unwrap_or(default)
}

/// Logits `[tokens, vocab]`.
pub fn logits(model: &Model, tokens: &[u32]) -> Tensor {
    match model.config["model_type"].as_str().unwrap() {
        "gpt_neox" => gpt_neox(model, tokens),
        _ => llama(model, tokens),
    }
}

fn tensor<'a>(model: &'a Model, name: &str) -> &'a Tensor {
    model.tensors.get(name).unwrap_or_else(|| panic!("{name}"))
}

fn embed(model: &Model, name: &str, tokens: &[u32]) -> Tensor {
    tensor(model, name).index_select(&Tensor::new(tokens, &Device::Cpu).unwrap(), 0).unwrap()
}

fn linear(model: &Model, name: &str, x: &Tensor) -> Tensor {
    let y = x.matmul(&tensor(model, &format!("{name}.weight")).t().unwrap()).unwrap();
    match model.tensors.get(&format!("{name}.bias")) {
        Some(bias) => y.broadcast_add(bias).unwrap(),
        None => y,
    }
}

fn rms_norm(model: &Model, name: &str, x: &Tensor) -> Tensor {
    let eps = number(&model.config, "rms_norm_eps", 1e-6);
    let mean = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
    let normed = x.broadcast_div(&(mean + eps).unwrap().sqrt().unwrap()).unwrap();
    let offset = if gemma(&model.config) { 1.0 } else { 0.0 };
    normed.broadcast_mul(&(tensor(model, &format!("{name}.weight")) + offset).unwrap()).unwrap()
}

fn layer_norm(model: &Model, name: &str, x: &Tensor) -> Tensor {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1).unwrap()).unwrap();
    let variance = centred.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
    let eps = number(&model.config, "layer_norm_eps", 1e-5);
    let normed = centred.broadcast_div(&(variance + eps).unwrap().sqrt().unwrap()).unwrap();
    let scaled = normed.broadcast_mul(tensor(model, &format!("{name}.weight"))).unwrap();
    scaled.broadcast_add(tensor(model, &format!("{name}.bias"))).unwrap()
}

fn activate(name: &str, x: &Tensor) -> Tensor {
    match name {
        "silu" => candle_nn::ops::silu(x).unwrap(),
        "gelu" => x.gelu_erf().unwrap(),
        "gelu_pytorch_tanh" => x.gelu().unwrap(),
        _ => panic!("{name}"),
    }
}

/// `x cos + rotate_half(x) sin` on the leading `2 * frequencies.len()` dimensions of `[heads, seq, head_dim]`.
fn rotate(x: &Tensor, frequencies: &[f64]) -> Tensor {
    let (_, seq, width) = x.dims3().unwrap();
    let rotated = 2 * frequencies.len();
    let angles = (0..seq).flat_map(|t| [frequencies, frequencies].concat().into_iter().map(move |f| f * t as f64));
    let angles = Tensor::from_iter(angles, &Device::Cpu).unwrap().reshape((seq, rotated)).unwrap();
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    let [cos, sin] = [cos, sin].map(|x| x.to_dtype(DType::F32).unwrap());
    let part = |from, count| x.narrow(2, from, count).unwrap();
    let half = rotated / 2;
    let turned = Tensor::cat(&[part(half, half).neg().unwrap(), part(0, half)], 2).unwrap();
    let head = part(0, rotated).broadcast_mul(&cos).unwrap() + turned.broadcast_mul(&sin).unwrap();
    match rotated == width {
        true => head.unwrap(),
        false => Tensor::cat(&[head.unwrap(), part(rotated, width - rotated)], 2).unwrap(),
    }
}

/// Scores over the latest `window` tokens, softmax, values: `[heads, seq, width]` each, back as `[seq, heads * width]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, window: usize) -> Tensor {
    let (heads, seq, width) = q.dims3().unwrap();
    let each = heads / k.dim(0).unwrap();
    let repeated = |x: &Tensor| {
        let copies: Vec<Tensor> = (0..heads).map(|head| x.narrow(0, head / each, 1).unwrap()).collect();
        Tensor::cat(&copies, 0).unwrap()
    };
    let hidden = |query: usize, key: usize| key > query || query - key >= window;
    let mask = (0..seq * seq).map(|i| if hidden(i / seq, i % seq) { f32::NEG_INFINITY } else { 0.0 });
    let mask = Tensor::from_iter(mask, &Device::Cpu).unwrap().reshape((seq, seq)).unwrap();
    let scores = (q.matmul(&repeated(k).t().unwrap()).unwrap() * scale).unwrap().broadcast_add(&mask).unwrap();
    let mixed = candle_nn::ops::softmax(&scores, D::Minus1).unwrap().matmul(&repeated(v)).unwrap();
    mixed.transpose(0, 1).unwrap().reshape((seq, heads * width)).unwrap()
}

fn frequencies(theta: f64, dims: usize) -> Vec<f64> {
    (0..dims).step_by(2).map(|i| theta.powf(-(i as f64) / dims as f64)).collect()
}

/// `modeling_rope_utils.py`
fn stretched(frequencies: Vec<f64>, scaling: &Value) -> Vec<f64> {
    let of = |key: &str| scaling[key].as_f64().unwrap();
    let stretch = |frequency: f64| match scaling["rope_type"].as_str().or(scaling["type"].as_str()) {
        None | Some("default") => frequency,
        Some("linear") => frequency / of("factor"),
        Some("llama3") => {
            let original = of("original_max_position_embeddings");
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            if wavelength > original / of("low_freq_factor") {
                frequency / of("factor")
            } else if wavelength < original / of("high_freq_factor") {
                frequency
            } else {
                let range = of("high_freq_factor") - of("low_freq_factor");
                let smooth = (original / wavelength - of("low_freq_factor")) / range;
                (1.0 - smooth) * frequency / of("factor") + smooth * frequency
            }
        }
        Some(other) => panic!("{other}"),
    };
    frequencies.into_iter().map(stretch).collect()
}

/// `modeling_llama.py`, `modeling_gemma.py`, `modeling_gemma3.py`
fn llama(model: &Model, tokens: &[u32]) -> Tensor {
    let config = &model.config;
    let (width, hidden) = (head_dim(config), size(config, "hidden_size"));
    let gemma3 = config["model_type"] == "gemma3_text";
    let act = config["hidden_activation"].as_str().or(config["hidden_act"].as_str()).unwrap_or("silu");
    let scalar = if gemma3 { number(config, "query_pre_attn_scalar", 256.0) } else { width as f64 };
    let mut x = embed(model, "model.embed_tokens.weight", tokens);
    if gemma(config) {
        x = (x * (hidden as f64).sqrt()).unwrap();
    }
    for layer in 0..size(config, "num_hidden_layers") {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let sliding = gemma3
            && match config["layer_types"].get(layer) {
                Some(kind) => kind == "sliding_attention",
                None => (layer + 1) % size(config, "sliding_window_pattern") != 0,
            };
        let (turns, window) = match sliding {
            true => (frequencies(number(config, "rope_local_base_freq", 1e4), width), size(config, "sliding_window")),
            false => {
                let theta = number(config, "rope_theta", 1e4);
                (stretched(frequencies(theta, width), &config["rope_scaling"]), usize::MAX)
            }
        };
        let normed = rms_norm(model, &name("input_layernorm"), &x);
        let by_head = |part: &str| {
            let y = linear(model, &name(&format!("self_attn.{part}_proj")), &normed);
            let heads = y.dim(1).unwrap() / width;
            let y = y.reshape((tokens.len(), heads, width)).unwrap().transpose(0, 1).unwrap().contiguous().unwrap();
            match gemma3 && part != "v" {
                true => rms_norm(model, &name(&format!("self_attn.{part}_norm")), &y),
                false => y,
            }
        };
        let (q, k, v) = (rotate(&by_head("q"), &turns), rotate(&by_head("k"), &turns), by_head("v"));
        let mut y = linear(model, &name("self_attn.o_proj"), &attend(&q, &k, &v, scalar.powf(-0.5), window));
        if gemma3 {
            y = rms_norm(model, &name("post_attention_layernorm"), &y);
        }
        x = (x + y).unwrap();
        let before_mlp = if gemma3 { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let normed = rms_norm(model, &name(before_mlp), &x);
        let gate = activate(act, &linear(model, &name("mlp.gate_proj"), &normed));
        let inner = (gate * linear(model, &name("mlp.up_proj"), &normed)).unwrap();
        let mut y = linear(model, &name("mlp.down_proj"), &inner);
        if gemma3 {
            y = rms_norm(model, &name("post_feedforward_layernorm"), &y);
        }
        x = (x + y).unwrap();
    }
    let tied = config["tie_word_embeddings"].as_bool().unwrap_or(gemma(config));
    linear(model, if tied { "model.embed_tokens" } else { "lm_head" }, &rms_norm(model, "model.norm", &x))
}

/// `modeling_gpt_neox.py`
fn gpt_neox(model: &Model, tokens: &[u32]) -> Tensor {
    let config = &model.config;
    let (heads, width) = (size(config, "num_attention_heads"), head_dim(config));
    let turned = (width as f64 * number(config, "rotary_pct", 0.25)) as usize;
    let turns = frequencies(number(config, "rotary_emb_base", 1e4), turned);
    let mut x = embed(model, "gpt_neox.embed_in.weight", tokens);
    for layer in 0..size(config, "num_hidden_layers") {
        let name = |part: &str| format!("gpt_neox.layers.{layer}.{part}");
        let normed = layer_norm(model, &name("input_layernorm"), &x);
        let qkv = linear(model, &name("attention.query_key_value"), &normed);
        let qkv = qkv.reshape((tokens.len(), heads, 3 * width)).unwrap().transpose(0, 1).unwrap();
        let part = |index| qkv.narrow(2, index * width, width).unwrap().contiguous().unwrap();
        let (q, k, v) = (rotate(&part(0), &turns), rotate(&part(1), &turns), part(2));
        let mixed = attend(&q, &k, &v, (width as f64).powf(-0.5), usize::MAX);
        let attended = linear(model, &name("attention.dense"), &mixed);
        let after = (&x + attended).unwrap();
        let parallel = config["use_parallel_residual"].as_bool().unwrap_or(true);
        let normed = layer_norm(model, &name("post_attention_layernorm"), if parallel { &x } else { &after });
        let inner = activate("gelu", &linear(model, &name("mlp.dense_h_to_4h"), &normed));
        x = (after + linear(model, &name("mlp.dense_4h_to_h"), &inner)).unwrap();
    }
    let tied = config["tie_word_embeddings"].as_bool().unwrap_or(false);
    let normed = layer_norm(model, "gpt_neox.final_layer_norm", &x);
    linear(model, if tied { "gpt_neox.embed_in" } else { "embed_out" }, &normed)
}
