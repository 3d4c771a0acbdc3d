//! Models whose results were computed by their families' reference code and stored: `scripts/looped_references.py` writes
//! those of looped models, `scripts/transformers_cases.py` those of Llama's relatives.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use engine::config::{InitialState, Injection};
use engine::model::Model;
use engine::reference::Reference;
use engine::weights::{Stored, Weights};
use engine::{Checkpoint, EngineExecutor, Generation, Prompts, Sampling, WeightType, write_hugging_face};
use scheduler::{Batching, ExitPolicy, KvFill, Server, Settings, VirtualClock, serve};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use traces::{Nanos, Request};

use super::folders::Model as Folder;
use super::warnings::with_warnings;

const LOOPED: [&str; 6] = ["ouro", "ouro_grouped_query", "raven", "raven_no_qk_bias", "nanbeige", "nanbeige_skip_norm"];
const ORDINARY: [&str; 6] = ["mistral", "mistral_full", "qwen2", "qwen3", "smollm3", "smollm3_listed"];
/// Error of a number relative to the largest of its kind, in single precision.
const TOLERANCE: f64 = 1e-4;

/// What the reference code found.
#[derive(Deserialize)]
struct Expected {
    /// Sequences.
    tokens: Vec<Vec<u32>>,
    /// By loop, sequence, position and token.
    logits: Vec<Vec<Vec<Vec<f64>>>>,
    /// By loop, sequence and position.
    #[serde(default)]
    gates: Vec<Vec<Vec<f64>>>,
    /// By share, then by sequence and position: the depth at which Ouro exits.
    #[serde(default)]
    exits: BTreeMap<String, Vec<Vec<u8>>>,
    #[serde(default)]
    prompt: Vec<u32>,
    /// What follows the prompt at full depth and temperature 0.
    #[serde(default)]
    greedy: Vec<u32>,
}

pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checkpoints/stored").join(name)
}

/// A stored model as it is in its folder.
pub fn model(name: &str) -> Folder {
    let config = serde_json::from_slice(&std::fs::read(folder(name).join("config.json")).unwrap()).unwrap();
    let tensors = candle_core::safetensors::load(folder(name).join("model.safetensors"), &Device::Cpu).unwrap();
    Folder { config, tensors }
}

fn case(name: &str) -> (Weights, Expected) {
    let expected = std::fs::read_to_string(folder(name).join("expected.json")).unwrap();
    let (weights, warnings) = with_warnings(|| Checkpoint::read(&folder(name), None).unwrap().weights);
    assert!(warnings.is_empty(), "{name}: {warnings:?}");
    (from_zeros(weights), serde_json::from_str(&expected).unwrap())
}

/// The model with an initial state of zeros, as in the stored cases: the reference's random states cannot be repeated.
fn from_zeros(weights: Weights) -> Weights {
    let mut config = weights.config().clone();
    config.injection = config.injection.map(|_| Injection { initial_state: InitialState::Zeros });
    Weights::from_tensors(config, weights.tensors().clone().into_iter().collect(), "stored").unwrap()
}

fn assert_near(name: &str, found: &Tensor, expected: impl IntoIterator<Item = f64>) {
    let found = found.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let expected: Vec<f64> = expected.into_iter().collect();
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0.0, |scale: f64, x| scale.max(x.abs()));
    for (found, expected) in found.iter().zip(&expected) {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= TOLERANCE * scale, "{name}: {found} is not {expected}, of {scale}");
    }
}

/// What requests with these prompts generate.
fn generated(
    weights: &Weights,
    batching: Batching,
    exit: ExitPolicy,
    prompts: &[Vec<u32>],
    output_tokens: u32,
) -> Vec<Generation> {
    let model = Arc::new(Model::load(weights, WeightType::F32).unwrap());
    let num_loops = weights.config().num_loops as u8;
    let settings = Settings {
        kv_fill: KvFill::Backfill,
        max_batch: 8,
        token_budget: 12,
        prefill_chunk: 3,
        block_tokens: 16,
        num_blocks: 64,
        ..Settings::new(batching, exit, num_loops)
    };
    let given: HashMap<u32, Vec<u32>> = (0..).zip(prompts.iter().cloned()).collect();
    let executor =
        EngineExecutor::new(model, Arc::new(Prompts::Given(given)), Sampling::default(), settings.kv_fill, 64, 16)
            .unwrap()
            .exiting_by(exit);
    let request = |(id, prompt): (u32, &Vec<u32>)| Request {
        id,
        arrival: Nanos::ZERO,
        prompt_tokens: prompt.len() as u32,
        output_tokens,
    };
    let requests: Vec<Request> = (0..).zip(prompts).map(request).collect();
    let mut server = Server::new(settings, executor).unwrap();
    serve(&mut server, requests, &mut VirtualClock::default(), &mut ()).unwrap();
    let mut generations = server.into_executor().into_generations();
    (0..prompts.len() as u32).map(|id| generations.remove(&id).unwrap()).collect()
}

#[test]
fn the_logits_of_every_loop_and_the_gates_are_those_of_the_reference_code() {
    for name in LOOPED.into_iter().chain(ORDINARY) {
        let (weights, expected) = case(name);
        let reference = Reference::new(&weights).unwrap();
        for (index, sequence) in expected.tokens.iter().enumerate() {
            let tokens = Tensor::new(&sequence[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            let states = reference.hidden_states(&tokens).unwrap();
            assert_eq!((states.len(), expected.logits.len()), (weights.config().num_loops, states.len()), "{name}");
            for (depth, state) in states.iter().enumerate() {
                let logits = reference.logits(&reference.exit(state, 1).unwrap(), depth).unwrap();
                assert_near(name, &logits, expected.logits[depth][index].concat());
                let gate = reference.gate_logits(&reference.final_norm(state).unwrap(), depth).unwrap();
                if let Some(gate) = gate {
                    let gates = expected.gates[depth][index].iter().map(|gate| (gate / (1.0 - gate)).ln());
                    assert_near(name, &gate, gates);
                }
            }
        }
    }
}

#[test]
fn greedy_texts_are_those_of_the_reference_code_under_every_batching() {
    for name in LOOPED {
        let (weights, expected) = case(name);
        let prompts = [expected.prompt.clone(), expected.tokens[0].clone(), expected.prompt];
        for batching in [Batching::Sequence, Batching::Depth] {
            let texts = generated(&weights, batching, ExitPolicy::None, &prompts, expected.greedy.len() as u32);
            assert_eq!(texts[0].tokens, expected.greedy, "{name}, {batching}");
            assert_eq!(texts[2].tokens, expected.greedy, "{name}, {batching}");
        }
    }
}

#[test]
fn ouro_exits_where_its_reference_code_does_and_predicts_what_that_predicts() {
    for name in LOOPED.into_iter().filter(|name| name.starts_with("ouro")) {
        let (weights, expected) = case(name);
        assert_eq!(expected.exits.len(), 3);
        for (share, exits) in &expected.exits {
            let exit: ExitPolicy = format!("cumulative:gate:{share}:1").parse().unwrap();
            for (index, (sequence, exits)) in expected.tokens.iter().zip(exits).enumerate() {
                let prompts: Vec<Vec<u32>> = (1..=sequence.len()).map(|length| sequence[..length].to_vec()).collect();
                for batching in [Batching::Sequence, Batching::Depth] {
                    for (position, text) in generated(&weights, batching, exit, &prompts, 1).iter().enumerate() {
                        assert_eq!(text.exit_depths, [exits[position]], "{name}, {share}, {position}");
                        let logits = &expected.logits[usize::from(exits[position])][index][position];
                        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
                        assert_eq!(text.tokens, [best as u32], "{name}, {share}, {position}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_looped_model_is_written_as_its_family_stores_it() {
    // Without a norm between its loops, a Nanbeige unrolls into a Llama.
    let unrolls = "nanbeige_skip_norm";
    for name in LOOPED.into_iter().chain(ORDINARY) {
        let read = Checkpoint::read(&folder(name), None).unwrap().weights;
        let written = tempfile::tempdir().unwrap();
        write_hugging_face(&read, None, written.path(), Stored::F32).unwrap();
        if name == unrolls {
            let again = Checkpoint::read(written.path(), None).unwrap().weights;
            assert_eq!(again.fingerprint().unwrap(), read.unrolled().unwrap().fingerprint().unwrap());
            continue;
        }
        let again = Checkpoint::read(written.path(), None).unwrap().weights;
        assert_eq!(again.config(), read.config(), "{name}");
        assert_eq!(again.fingerprint().unwrap(), read.fingerprint().unwrap(), "{name}");
        let file =
            |folder: &Path| candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
        let (original, written) = (file(&folder(name)), file(written.path()));
        for (tensor, numbers) in &written {
            let flat =
                |tensor: &Tensor| (tensor.dims().to_vec(), tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            assert!(flat(numbers) == flat(&original[tensor]), "{name}: {tensor}");
        }
    }
}

#[test]
fn a_looped_model_runs_as_many_loops_as_it_is_asked_for() {
    for name in LOOPED {
        let loops =
            |num_loops| Checkpoint::read(&folder(name), num_loops).map(|checkpoint| from_zeros(checkpoint.weights));
        let tokens = Tensor::new(&[[1_u32, 2, 3, 4]], &Device::Cpu).unwrap();
        let logits = |weights: &Weights| -> Vec<Vec<Vec<f32>>> {
            let logits = Reference::new(weights).unwrap().forward(&tokens).unwrap();
            logits.iter().map(|logits| logits.to_vec2().unwrap()).collect()
        };
        let deep = logits(&loops(Some(9)).unwrap());
        assert_eq!(deep.len(), 9, "{name}");
        assert_eq!(logits(&loops(Some(1)).unwrap()), deep[..1], "{name}: earlier loops do not depend on later ones");
        assert_eq!(logits(&loops(None).unwrap()), deep[..loops(None).unwrap().config().num_loops], "{name}");
        for wrong in [0, 65] {
            let message = loops(Some(wrong)).unwrap_err().to_string();
            assert!(message.contains(&format!("config.json: {wrong} loops, expected 1 to 64")), "{message}");
        }
    }
}

/// A stored model with other keys.
fn changed(name: &str, keys: &Value) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(folder(name).join("model.safetensors"), copy.path().join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(folder(name).join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    std::fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
    copy
}

/// The error of a stored model with other keys.
fn refusal(name: &str, keys: &Value) -> Option<String> {
    Checkpoint::read(changed(name, keys).path(), None).err().map(|error| error.to_string())
}

#[test]
fn an_option_that_is_not_computed_is_refused_by_its_key() {
    let cases: [(&str, &str, Value); 33] = [
        ("ouro", "early_exit_step", json!(1)),
        ("ouro", "attention_bias", json!(true)),
        ("ouro", "use_sliding_window", json!(true)),
        ("ouro", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("ouro", "rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})),
        ("ouro", "hidden_act", json!("relu")),
        ("nanbeige", "enable_double_loop_split", json!(true)),
        ("nanbeige", "loop_share_kv", json!(true)),
        ("nanbeige", "enable_hyper_connection", json!(true)),
        ("nanbeige", "enable_mhc", json!(true)),
        ("nanbeige", "enable_depth_attention", json!(true)),
        ("nanbeige", "qk_layernorm", json!(true)),
        ("nanbeige", "emb_neighbor_num", json!(2)),
        ("nanbeige", "insert_ngram_layer_idx", json!([1])),
        ("nanbeige", "ngram_insert_all_layers", json!(true)),
        ("nanbeige", "loop_loss_weights", json!([0.5, 0.5, 0.5])),
        ("nanbeige", "rope_scaling", json!({"type": "dynamic", "factor": 2.0})),
        ("raven", "injection_type", json!("add")),
        ("raven", "block_class_name", json!("TransformerPreNormBlock")),
        ("raven", "norm_class_name", json!("LayerNorm")),
        ("raven", "mlp_class_name", json!("BaseMLP")),
        ("raven", "nonlin_name", json!("GELU")),
        ("raven", "state_init", json!("embed")),
        ("raven", "n_layers_in_coda", json!(0)),
        ("raven", "test_time_noise", json!(0.1)),
        ("raven", "num_key_value_heads", json!(1)),
        ("raven", "padded_vocab_size", json!(64)),
        ("raven", "bias", json!(true)),
        ("raven", "head_dim", json!(16)),
        ("raven", "tie_word_embeddings", json!(false)),
        ("qwen2", "use_sliding_window", json!(true)),
        ("mistral", "attention_bias", json!(true)),
        ("smollm3", "no_rope_layers", json!([1, 0])),
    ];
    for (name, key, value) in cases {
        let message = refusal(name, &json!({key: value})).unwrap_or_else(|| panic!("{name} with `{key}` {value}"));
        assert!(message.contains("config.json: `") && message.contains(key), "{message}");
    }
    assert_eq!(refusal("nanbeige", &json!({"loop_loss_weights": [0.5]})), None, "a weight for each loop but the last");
    assert_eq!(refusal("raven", &json!({"n_heads": null, "num_attention_heads": 2})), None, "as it is published");
}

#[test]
fn a_damaged_looped_model_is_refused_by_file_and_tensor() {
    for (name, tensor) in [
        ("ouro", "model.early_exit_gate.weight"),
        ("ouro", "model.layers.1.input_layernorm_2.weight"),
        ("nanbeige", "model.layers.0.self_attn.o_proj.weight"),
        ("raven", "transformer.adapter.weight"),
        ("raven", "transformer.core_block.1.attn.qk_bias"),
        ("raven", "transformer.coda.0.attn.Wqkv.weight"),
    ] {
        let mut tensors = candle_core::safetensors::load(folder(name).join("model.safetensors"), &Device::Cpu).unwrap();
        let copy = tempfile::tempdir().unwrap();
        std::fs::copy(folder(name).join("config.json"), copy.path().join("config.json")).unwrap();
        let numbers = tensors.remove(tensor).unwrap_or_else(|| panic!("{name} has no {tensor}"));
        let message = |tensors: &HashMap<String, Tensor>| {
            candle_core::safetensors::save(tensors, copy.path().join("model.safetensors")).unwrap();
            Checkpoint::read(copy.path(), None).err().expect("it is damaged").to_string()
        };
        let missing = message(&tensors);
        assert!(missing.contains(&format!("model.safetensors: tensor `{tensor}` is missing")), "{missing}");
        tensors.insert(tensor.to_owned(), numbers.flatten_all().unwrap().narrow(0, 1, 3).unwrap());
        let shape = message(&tensors);
        assert!(shape.contains(&format!("model.safetensors: tensor `{tensor}` has shape [3], expected ")), "{shape}");
    }
}

#[test]
fn random_initial_states_depend_on_the_position_and_the_seed_only() {
    let weights = Checkpoint::read(&folder("raven"), None).unwrap().weights;
    let Some(Injection { initial_state: InitialState::Normal { deviation, seed: 0 } }) = weights.config().injection
    else {
        panic!("{:?}", weights.config().injection)
    };
    assert!((deviation - 0.4_f32.sqrt()).abs() < 1e-6, "{deviation}");
    let config = |keys: Value| Checkpoint::read(changed("raven", &keys).path(), None).unwrap().weights.config().clone();
    let zeros = Some(Injection { initial_state: InitialState::Zeros });
    assert_eq!(config(json!({"state_init": "zero"})).injection, zeros);
    assert_eq!(config(json!({"init_values": {"std": 0.0}})).injection, zeros);
    assert_eq!(config(json!({"init_values": null})).injection, weights.config().injection);
    let logits = |weights: &Weights, tokens: &[u32]| -> Vec<Vec<f32>> {
        let tokens = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        Reference::new(weights).unwrap().forward(&tokens).unwrap()[0].to_vec2().unwrap()
    };
    let tokens = [3, 1, 4, 1, 5];
    let all = logits(&weights, &tokens);
    assert_eq!(logits(&weights, &tokens[..3]), all[..3]);
    let mut other = weights.config().clone();
    other.injection = Some(Injection { initial_state: InitialState::Normal { deviation, seed: 1 } });
    let other = Weights::from_tensors(other, weights.tensors().clone().into_iter().collect(), "test").unwrap();
    assert_ne!(logits(&other, &tokens), all);
    assert_ne!(logits(&from_zeros(weights), &tokens), all);
}
