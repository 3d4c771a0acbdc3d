//! The logits of a model equal those of candle-transformers and of the families' definitions.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models;
use engine::Checkpoint;
use engine::config::Activation;
use engine::reference::Reference;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::folders::{Model, gemma1, gemma3, gpt_neox, llama, size};
use super::plain;

pub fn tokens(config: &Value, length: usize) -> Vec<u32> {
    (0..length).map(|i| ((i * i * 31 + i * 7 + 3) % size(config, "vocab_size")) as u32).collect()
}

/// The engine's logits `[tokens, vocab]` for a model folder.
pub fn engine_logits(folder: &std::path::Path, num_loops: usize, tokens: &[u32]) -> Tensor {
    let weights = Checkpoint::read(folder, num_loops).unwrap().weights;
    let input = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    Reference::new(&weights).unwrap().forward(&input).unwrap().pop().unwrap()
}

pub fn assert_close(found: &Tensor, expected: &Tensor) {
    assert_eq!(found.dims(), expected.dims());
    let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (found, expected) = (flat(found), flat(expected));
    let scale = expected.iter().fold(1_f32, |scale, logit| scale.max(logit.abs()));
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() <= 1e-4 * scale, "{found} is not {expected}, of {scale}");
    }
}

fn folder_of(model: &Model) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    model.write(folder.path());
    folder
}

/// The logits after a token at a position.
type Next = Box<dyn FnMut(&Tensor, usize) -> candle_core::Result<Tensor>>;

/// The logits of candle-transformers, token by token.
pub fn candle_logits(model: &Model, tokens: &[u32]) -> Tensor {
    let vb = VarBuilder::from_tensors(model.tensors.clone(), DType::F32, &Device::Cpu);
    let json = model.config.clone();
    let mut next: Next = match json["model_type"].as_str() {
        Some("llama") => {
            let config: models::llama::LlamaConfig = serde_json::from_value(json).unwrap();
            let config = config.into_config(false);
            let mut cache = models::llama::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
            let model = models::llama::Llama::load(vb, &config).unwrap();
            Box::new(move |token, position| model.forward(token, position, &mut cache))
        }
        Some("gemma") => {
            let config: models::gemma::Config = serde_json::from_value(json).unwrap();
            let mut model = models::gemma::Model::new(false, &config, vb).unwrap();
            Box::new(move |token, position| model.forward(token, position))
        }
        Some("gemma3_text") => {
            let config: models::gemma3::Config = serde_json::from_value(json).unwrap();
            let mut model = models::gemma3::Model::new(false, &config, vb).unwrap();
            Box::new(move |token, position| model.forward(token, position))
        }
        other => panic!("{other:?}"),
    };
    let rows: Vec<Tensor> = tokens
        .iter()
        .enumerate()
        .map(|(position, token)| {
            let logits = next(&Tensor::new(&[[*token]], &Device::Cpu).unwrap(), position).unwrap();
            logits.reshape((1, ())).unwrap()
        })
        .collect();
    Tensor::cat(&rows, 0).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn llama_equals_candle_transformers(config in llama(true), seed in 0_u64..1000, length in 1_usize..30) {
        let model = Model::random(config, seed);
        let tokens = tokens(&model.config, length);
        assert_close(&engine_logits(folder_of(&model).path(), 1, &tokens), &candle_logits(&model, &tokens));
    }

    #[test]
    fn gemma_equals_candle_transformers(config in gemma1(), seed in 0_u64..1000, length in 1_usize..30) {
        let model = Model::random(config, seed);
        let tokens = tokens(&model.config, length);
        assert_close(&engine_logits(folder_of(&model).path(), 1, &tokens), &candle_logits(&model, &tokens));
    }

    #[test]
    fn gemma3_equals_candle_transformers(config in gemma3(true), seed in 0_u64..1000, length in 1_usize..30) {
        let model = Model::random(config, seed);
        let tokens = tokens(&model.config, length);
        assert_close(&engine_logits(folder_of(&model).path(), 1, &tokens), &candle_logits(&model, &tokens));
    }

    #[test]
    fn every_family_equals_its_definition(
        config in prop_oneof![llama(false), gemma1(), gemma3(false), gpt_neox()],
        seed in 0_u64..1000, length in 1_usize..30,
    ) {
        let model = Model::random(config, seed);
        let tokens = tokens(&model.config, length);
        let layers = size(&model.config, "num_hidden_layers");
        for num_loops in [1, layers] {
            let found = engine_logits(folder_of(&model).path(), num_loops, &tokens);
            assert_close(&found, &plain::logits(&model, &tokens));
        }
    }
}

/// A Gemma 3 in the newest format equals one in the oldest.
#[test]
fn rope_parameters_by_layer_type_mean_what_the_older_keys_mean() {
    let old = json!({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 19, "hidden_size": 12,
        "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 4, "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8, "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 5000.0, "rope_local_base_freq": 300.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    });
    let mut new = old.clone();
    for key in ["rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"] {
        new.as_object_mut().unwrap().remove(key);
    }
    new["layer_types"] = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    new["rope_parameters"] = json!({
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    });
    let (old, new) = (Model::random(old, 3), Model::random(new, 3));
    let read = |model: &Model| Checkpoint::read(folder_of(model).path(), 1).unwrap().weights.config().clone();
    assert_eq!(read(&new), read(&old));
    let tokens = tokens(&old.config, 12);
    assert_close(&engine_logits(folder_of(&new).path(), 1, &tokens), &plain::logits(&old, &tokens));
}

/// The first Gemmas were published with the exact function's name, but trained with its approximation.
#[test]
fn a_gemmas_hidden_act_gelu_is_the_approximation_and_its_hidden_activation_must_agree() {
    let read = |keys: Value| {
        let mut config = json!({
            "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "vocab_size": 19, "hidden_size": 12,
            "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 8, "max_position_embeddings": 64,
        });
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let read = Checkpoint::read(folder_of(&Model::random(config, 3)).path(), 1);
        read.map(|checkpoint| checkpoint.weights.config().architecture.activation).map_err(|error| error.to_string())
    };
    for (keys, expected) in [
        (json!({}), Activation::GeluTanh),
        (json!({"hidden_act": "gelu"}), Activation::GeluTanh),
        (json!({"hidden_act": "silu"}), Activation::Silu),
        (json!({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}), Activation::GeluTanh),
        (json!({"hidden_act": "silu", "hidden_activation": "silu"}), Activation::Silu),
    ] {
        assert_eq!(read(keys.clone()), Ok(expected), "{keys}");
    }
    for keys in [json!({"hidden_activation": "gelu"}), json!({"hidden_act": "silu", "hidden_activation": "gelu"})] {
        let message = read(keys).unwrap_err();
        assert!(message.contains("`hidden_activation` is \"gelu\", expected "), "{message}");
    }
}
