//! The serving model gives the reference's logits and gates at every position and depth, for any chunks of a prompt.

mod common;

use std::sync::Arc;

use candle_core::Tensor;
use common::devices::Device;
use common::emulator;
use common::{configs, configs_of_one_head_size, weights, with_everything};
use engine::backend::{Heads, ServedModel, Work};
use engine::cache::KvCache;
use engine::cuda::CudaModel;
use engine::cuda::source::Scalar;
use engine::kernels::attention::Row;
use engine::kernels::rows::Source;
use engine::kernels::signals::read;
use engine::model::{InFlight, Model, Rows};
use engine::reference::Reference;
use engine::{ModelConfig, WeightType, Weights};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use scheduler::KvFill;

/// A model's results for a sequence: logits by depth and token and, with gates, their scores.
#[derive(Debug, PartialEq)]
struct Answers {
    logits: Vec<Vec<Vec<f32>>>,
    gates: Vec<Vec<f32>>,
}

/// The serving model's results for a sequence that runs in chunks.
fn answers_in_chunks(model: &Model, tokens: &[u32], chunk: usize) -> Answers {
    let config = model.config();
    let cache = KvCache::new(config, KvFill::Reuse, 8, 16, &candle_core::Device::Cpu).unwrap();
    // Blocks out of order, as a scheduler may assign them.
    let blocks = [3, 0, 7, 1, 2, 6, 5, 4];
    let gated = if config.gate { config.num_loops - 1 } else { 0 };
    let mut answers = Answers { logits: vec![Vec::new(); config.num_loops], gates: vec![Vec::new(); gated] };
    for (index, part) in tokens.chunks(chunk).enumerate() {
        let mut sources: Vec<Source> = part.iter().map(|&token| Source::First(token)).collect();
        let mut in_flight = InFlight::new(config).unwrap();
        let rows = |depth| {
            let mut rows = Rows::default();
            let positions = index * chunk..index * chunk + part.len();
            positions.for_each(|position| rows.push(Row::new(position, depth, &blocks)));
            rows
        };
        for depth in 0..config.num_loops {
            let rows = rows(depth);
            let entering = model.embed(&in_flight, &sources, &rows, &cache).unwrap();
            let hidden = &entering.hidden;
            model.forward_block(hidden, &rows, &cache).unwrap();
            let exits = model.forward_coda(hidden, &rows, &cache).unwrap();
            answers.logits[depth].extend(model.logits(&exits, &rows, &cache).unwrap().to_vec2::<f32>().unwrap());
            if let Some(gates) = answers.gates.get_mut(depth) {
                gates.extend(model.gate_scores(hidden, &rows).unwrap().to_vec1::<f32>().unwrap());
            }
            in_flight = entering.into();
            sources = (0..part.len() as u32).map(Source::Second).collect();
        }
    }
    answers
}

/// The reference's results.
fn reference_answers(weights: &Weights, tokens: &[u32]) -> Answers {
    let reference = Reference::new(weights).unwrap();
    let tokens = Tensor::from_slice(tokens, (1, tokens.len()), &candle_core::Device::Cpu).unwrap();
    let sigmoid = |logits: Tensor| {
        let logits = logits.to_vec1::<f32>().unwrap();
        logits.into_iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect()
    };
    let states = reference.hidden_states(&tokens).unwrap();
    let gates = states
        .iter()
        .enumerate()
        .filter_map(|(depth, hidden)| reference.gate_logits(&reference.final_norm(hidden).unwrap(), depth).unwrap());
    let logits = reference.forward(&tokens).unwrap();
    Answers {
        logits: logits.iter().map(|logits| logits.to_vec2::<f32>().unwrap()).collect(),
        gates: gates.map(sigmoid).collect(),
    }
}

fn assert_equals_the_reference(config: &ModelConfig, seed: u64, length: usize, chunk: usize) {
    let weights = weights(config, seed);
    let tokens: Vec<u32> = (0..length).map(|i| (i * i * 31 + i * 7) as u32 % config.vocab_size as u32).collect();
    let found = answers_in_chunks(&Model::load(&weights, WeightType::F32).unwrap(), &tokens, chunk);
    let expected = reference_answers(&weights, &tokens);
    assert_eq!(found.gates.len(), expected.gates.len());
    // Of a head of few numbers, all may be close to zero: its norm then makes more of their rounding.
    let tolerance = if config.architecture.qk_norm && config.head_dim < 8 { 5e-4 } else { 1e-4 };
    for (found, expected) in found.gates.iter().flatten().zip(expected.gates.iter().flatten()) {
        assert!((found - expected).abs() <= tolerance, "gate {found} is not {expected}");
    }
    for (found, expected) in found.logits.iter().flatten().zip(expected.logits.iter().flatten()) {
        let scale = expected.iter().fold(0_f32, |scale, logit| scale.max(logit.abs()));
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() <= tolerance * scale, "{found} is not {expected} (of {scale})");
        }
    }
}

/// Checks a backend's results for a sequence that runs in chunks, by depth and position, against the reference.
fn assert_answers_of_passes_equal_the_reference(
    device: Device,
    model: Arc<dyn ServedModel>,
    expected: &Answers,
    tokens: &[u32],
    chunk: usize,
) {
    let config = model.config().clone();
    let mut backend = model.backend(KvFill::Reuse, 8, 16).unwrap();
    backend.reserve(chunk).unwrap();
    let blocks = [3, 0, 7, 1, 2, 6, 5, 4];
    for (index, part) in tokens.chunks(chunk).enumerate() {
        for depth in 0..config.num_loops {
            let (mut rows, places) = (Rows::default(), 0..part.len() as u32);
            let positions = index * chunk..index * chunk + part.len();
            positions.clone().for_each(|position| rows.push(Row::new(position, depth, &blocks)));
            let gated = config.gate && depth + 1 < config.num_loops;
            let found = backend.run(&Work {
                coda: 0..part.len(),
                sources: match depth {
                    0 => part.iter().map(|&token| Source::First(token)).collect(),
                    _ => places.clone().map(Source::Second).collect(),
                },
                places: places.map(Some).collect(),
                heads: Heads { rows: (0..part.len()).collect(), keys: vec![0; part.len()], temperature: 0.0 },
                gates: if gated { (0..part.len()).collect() } else { Vec::new() },
                rows,
                ..Work::default()
            });
            let found = found.unwrap();
            for (found, position) in found.verdicts.iter().zip(positions.clone()) {
                let logits = Tensor::new(&expected.logits[depth][position][..], &candle_core::Device::Cpu).unwrap();
                let expected = read(&logits.unsqueeze(0).unwrap(), 0.0, &[0]).unwrap()[0];
                let what = format!("position {position} at depth {depth}");
                device.assert_close(&what, found.top1, expected.top1);
                device.assert_close(&what, found.margin, expected.margin);
                device.assert_close(&what, found.entropy, expected.entropy);
                // Two equally likely tokens may come in either order.
                assert!(found.token == expected.token || expected.margin < 1e-3, "{what}");
            }
            for (&found, position) in found.gates.iter().zip(positions) {
                device.assert_close("a gate", found, expected.gates[depth][position]);
            }
        }
    }
}

#[test]
fn passes_by_cuda_kernels_equal_the_reference() {
    passes_equal_the_reference(Device::Cuda, 20);
}

#[test]
fn gates_with_a_hidden_layer_are_refused_on_a_gpu() {
    let Some(machine) = emulator::machine() else { return };
    let weights = weights(&ModelConfig { gate_hidden: 3, ..with_everything() }, 1);
    let refusal = CudaModel::load(machine, &weights, Scalar::F32).map(drop).unwrap_err().to_string();
    assert_eq!(refusal, "model configuration: `gate_hidden` is 3, expected 0 on a GPU, which runs linear gates only");
}

/// On random models.
fn passes_equal_the_reference(device: Device, cases: u32) {
    let strategy = (configs_of_one_head_size(), 0_u64..1000, 1_usize..40, 1_usize..40);
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::with_cases(cases), rng);
    let result = runner.run(&strategy, |(config, seed, length, chunk)| {
        let weights = weights(&config, seed);
        let Some(model) = device.serve(&weights) else { return Ok(()) };
        let tokens: Vec<u32> = (0..length).map(|i| (i * i * 31 + i * 7) as u32 % config.vocab_size as u32).collect();
        let expected = reference_answers(&weights, &tokens);
        assert_answers_of_passes_equal_the_reference(device, model, &expected, &tokens, chunk);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn logits_of_a_vocabulary_in_parts_equal_the_reference() {
    assert_equals_the_reference(&ModelConfig { vocab_size: 20_011, ..with_everything() }, 1, 6, 4);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn logits_and_gates_equal_the_reference(
        config in configs(), seed in 0_u64..1000, length in 1_usize..100, chunk in 1_usize..100,
    ) {
        assert_equals_the_reference(&config, seed, length, chunk);
    }

    #[test]
    fn chunking_changes_no_bit(config in configs(), seed in 0_u64..1000, length in 1_usize..100, chunk in 1_usize..100) {
        let model = Model::load(&weights(&config, seed), WeightType::F32).unwrap();
        let tokens: Vec<u32> = (0..length).map(|i| (i * i * 17 + i) as u32 % config.vocab_size as u32).collect();
        prop_assert_eq!(answers_in_chunks(&model, &tokens, chunk), answers_in_chunks(&model, &tokens, length));
    }
}
