//! Files for other programs contain what was read, and what a recursive model computes.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use engine::config::{Activation, Architecture, InitialState, Injection, LoraConfig, LoraRanks, ModelConfig, Sharing};
use engine::reference::Reference;
use engine::weights::{Stored, Weights};
use engine::{Checkpoint, CheckpointError, Tokenizer, write_hugging_face};
use proptest::prelude::*;

use super::equality::{assert_close, candle_logits, engine_logits, tokens};
use super::folders::{Model, gemma1, gemma3, gpt_neox, llama};
use super::plain;

fn noisy(config: ModelConfig) -> Weights {
    let mut tensors = HashMap::new();
    for (name, tensor) in Weights::random(config.clone(), 7).unwrap().tensors() {
        let noise = (0..tensor.elem_count()).map(|i| ((i * 37 + name.len() * 11) as f32).sin() * 0.2);
        let noise = Tensor::from_iter(noise, &Device::Cpu).unwrap().reshape(tensor.shape()).unwrap();
        tensors.insert(name.clone(), (tensor + noise).unwrap());
    }
    Weights::from_tensors(config, tensors, "test").unwrap()
}

fn recursive(architecture: Architecture) -> ModelConfig {
    ModelConfig {
        vocab_size: 23,
        hidden_size: 16,
        intermediate_size: 20,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 4,
        block_layers: 2,
        num_loops: 3,
        sharing: Sharing::Matrices,
        prelude_layers: 1,
        coda_layers: 1,
        max_positions: 32,
        architecture,
        lora: Some(LoraConfig { ranks: LoraRanks { gate: 0, ..LoraRanks::all(3) }, scale: 0.7 }),
        head_lora_rank: 2,
        gate: true,
        ..ModelConfig::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn what_is_read_and_written_is_the_same_model(
        config in prop_oneof![llama(false), gemma1(), gemma3(true), gemma3(false), gpt_neox()], seed in 0_u64..1000,
    ) {
        let model = Model::random(config, seed);
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        model.write(first.path());
        let read = Checkpoint::read(first.path(), 1).unwrap().weights;
        write_hugging_face(&read, None, second.path(), Stored::F32).unwrap();
        let written = candle_core::safetensors::load(second.path().join("model.safetensors"), &Device::Cpu).unwrap();
        prop_assert_eq!(written.len(), model.tensors.len());
        for (name, tensor) in &model.tensors {
            assert_close(&written[name], tensor);
        }
        let again = Checkpoint::read(second.path(), 1).unwrap().weights;
        prop_assert_eq!(again.config(), read.config());
        // Programs that know the family find the keys of the old configuration in the new one.
        let config = serde_json::from_slice(&std::fs::read(second.path().join("config.json")).unwrap()).unwrap();
        let tokens = tokens(&model.config, 9);
        assert_close(&plain::logits(&Model { config, tensors: written }, &tokens), &plain::logits(&model, &tokens));
    }
}

#[test]
fn an_unrolled_model_has_the_last_loops_logits() {
    let gemma3 = Architecture {
        post_norms: true,
        qk_norm: true,
        activation: Activation::GeluTanh,
        embedding_scale: 4.0,
        qkv_bias: true,
        output_bias: true,
        ..Architecture::default()
    };
    for architecture in [Architecture::default(), gemma3] {
        let weights = noisy(recursive(architecture));
        let tokens = [3_u32, 14, 15, 9, 2, 6, 5];
        let input = Tensor::new(&[tokens], &Device::Cpu).unwrap();
        let last = |weights: &Weights| Reference::new(weights).unwrap().forward(&input).unwrap().pop().unwrap();
        let expected = last(&weights);
        let unrolled = weights.unrolled().unwrap();
        assert_eq!(unrolled.config().num_layers(), 8);
        assert_close(&last(&unrolled), &expected);

        let folder = tempfile::tempdir().unwrap();
        write_hugging_face(&weights, None, folder.path(), Stored::F32).unwrap();
        assert_close(&engine_logits(folder.path(), 4, &tokens), &expected);
    }
}

#[test]
fn candle_transformers_reads_a_written_recursive_model_and_finds_the_last_loops_logits() {
    let weights = noisy(recursive(Architecture::default()));
    let tokens = [3_u32, 14, 15, 9, 2, 6, 5];
    let input = Tensor::new(&[tokens], &Device::Cpu).unwrap();
    let expected = Reference::new(&weights).unwrap().forward(&input).unwrap().pop().unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_hugging_face(&weights, None, folder.path(), Stored::F32).unwrap();
    let written = Model {
        config: serde_json::from_slice(&std::fs::read(folder.path().join("config.json")).unwrap()).unwrap(),
        tensors: candle_core::safetensors::load(folder.path().join("model.safetensors"), &Device::Cpu).unwrap(),
    };
    assert_close(&candle_logits(&written, &tokens), &expected);
}

#[test]
fn a_model_of_no_family_is_refused_and_nothing_is_written() {
    let mixed = Architecture { post_norms: true, ..Architecture::default() };
    let folder = tempfile::tempdir().unwrap();
    let written = write_hugging_face(&noisy(recursive(mixed)), None, &folder.path().join("out"), Stored::F32);
    let message = written.unwrap_err().to_string();
    assert!(message.contains("no Hugging Face architecture") && message.contains("\"post_norms\":true"), "{message}");
    assert!(!folder.path().join("out").exists());
    let injected = Injection { initial_state: InitialState::Zeros };
    let injected = ModelConfig { injection: Some(injected), ..recursive(Architecture::default()) };
    let written = write_hugging_face(&noisy(injected), None, &folder.path().join("out"), Stored::F32);
    let message = written.unwrap_err().to_string();
    assert!(message.contains("`injection` is given, expected none: no ordinary transformer has it"), "{message}");
    assert!(!folder.path().join("out").exists());
}

#[test]
fn the_tokenizer_goes_with_the_model() {
    let text = "In the beginning God created the heaven and the earth.";
    let tokenizer = Tokenizer::train(text, 260).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let weights = noisy(ModelConfig { vocab_size: 260, ..recursive(Architecture::default()) });
    write_hugging_face(&weights, Some(&tokenizer), folder.path(), Stored::F16).unwrap();
    let read = Checkpoint::read(folder.path(), 1).unwrap();
    assert_eq!(read.tokenizer.unwrap().encode(text).unwrap(), tokenizer.encode(text).unwrap());
}

/// transformers and candle-transformers read a Gemma's activation from the same key, but transformers takes the exact
/// function's name for its approximation.
#[test]
fn a_gemmas_activation_is_written_where_other_programs_read_it() {
    let write = |activation| {
        let architecture = Architecture { activation, embedding_scale: 4.0, norm_eps: 1e-6, ..Architecture::default() };
        let folder = tempfile::tempdir().unwrap();
        write_hugging_face(&noisy(recursive(architecture)), None, folder.path(), Stored::F32)?;
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.path().join("config.json")).unwrap()).unwrap();
        assert_eq!((&config["model_type"], config.get("hidden_activation")), (&"gemma".into(), None));
        Ok::<_, CheckpointError>(config["hidden_act"].as_str().unwrap().to_owned())
    };
    assert_eq!(write(Activation::Silu).unwrap(), "silu");
    assert_eq!(write(Activation::GeluTanh).unwrap(), "gelu_pytorch_tanh");
    let message = write(Activation::Gelu).unwrap_err().to_string();
    assert!(message.contains("\"activation\":\"gelu\""), "{message}");
}
