//! Models that are made for KV fill `first`: their loops share the keys and values of depth 0, so that exits change
//! nothing for later tokens, and prompts need not run deeper.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use common::{configs, weights, with_everything};
use engine::model::Model;
use engine::reference::Reference;
use engine::weights::Stored;
use engine::{
    Engine, Exiting, Generation, Idle, ModelConfig, Prompts, RecordedGeneration, RecordedPolicy, Sampling, WeightType,
    Weights, write_hugging_face,
};
use proptest::prelude::*;
use scheduler::{Batching, ExitPolicy, KvFill, Observer, PassRecord, Settings};
use traces::{Nanos, Request};

fn sharing(config: ModelConfig) -> ModelConfig {
    let mut config = ModelConfig { kv_fill: KvFill::First, coda_layers: 0, norm_before_coda: false, ..config };
    let layers = config.num_layers();
    if let Some(window) = &mut config.architecture.sliding_window {
        window.layers.retain(|layer| *layer < layers);
    }
    config.architecture.unrotated_layers.retain(|layer| *layer < layers);
    config
}

fn engine(weights: &Weights) -> Engine {
    let vocab = weights.config().vocab_size as u32;
    let text = (0..60_u32).map(|i| (i * i * 31 + i * 7) % vocab).collect();
    let model = Arc::new(Model::load(weights, WeightType::F32).unwrap());
    Engine { model, prompts: Arc::new(Prompts::Text(text)), sampling: Sampling::default(), script: None }
}

fn requests() -> Vec<Request> {
    let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 3 + 4 * id, output_tokens: 6 };
    (0..3).map(request).collect()
}

fn settings(engine: &Engine, batching: Batching, exit: ExitPolicy) -> Settings {
    let num_loops = engine.num_loops();
    Settings {
        max_batch: 2,
        token_budget: 8,
        prefill_chunk: 4,
        num_blocks: 4,
        kv_fill: KvFill::First,
        ..Settings::new(batching, exit, num_loops)
    }
}

/// The logits that the reference has for each generated token at a depth, when every token runs to full depth.
fn logits(model: &Reference, generation: &Generation, depth: usize) -> Vec<Vec<f32>> {
    let text = [&generation.prompt[..], &generation.tokens].concat();
    let inputs = Tensor::new(&text[..text.len() - 1], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = model.forward(&inputs).unwrap()[depth].to_vec2::<f32>().unwrap();
    logits[generation.prompt.len() - 1..].to_vec()
}

/// Whether `token` is the most likely one of a row of logits, within rounding.
fn is_largest(row: &[f32], token: u32) -> bool {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    largest - row[token as usize] < 2e-3
}

/// Rows by depth.
#[derive(Default)]
struct Rows(HashMap<u8, u32>);

impl Observer for Rows {
    fn pass(&mut self, record: &PassRecord<'_>) {
        for segment in record.pass.segments {
            *self.0.entry(segment.depth).or_default() += segment.tokens;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn exits_at_any_depth_predict_what_they_predict_after_full_depth(config in configs(), seed in 0_u64..100) {
        let weights = weights(&sharing(config), seed);
        let (engine, reference) = (engine(&weights), Reference::new(&weights).unwrap());
        let last = engine.num_loops() - 1;
        for (batching, depth) in [(Batching::Sequence, 0), (Batching::Depth, last / 2), (Batching::Depth, last)] {
            let settings = settings(&engine, batching, ExitPolicy::Static(depth));
            let served = engine.replay(settings, &requests(), None, Idle::Skip, &mut ()).unwrap();
            for (request, generation) in served {
                for (row, token) in logits(&reference, &generation, depth.into()).iter().zip(&generation.tokens) {
                    prop_assert!(is_largest(row, *token), "request {request}, {batching}, depth {depth}");
                }
                let full_depth = engine.full_depth(request, &generation).unwrap().tokens;
                for (row, token) in logits(&reference, &generation, last.into()).iter().zip(full_depth) {
                    prop_assert!(is_largest(row, token), "request {request} at full depth");
                }
            }
        }
    }
}

#[test]
fn prompts_run_depth_0_alone_but_for_the_rows_that_predict() {
    let weights = weights(&sharing(with_everything()), 1);
    let engine = engine(&weights);
    let last = engine.num_loops() - 1;
    let prompts: u32 = requests().iter().map(|request| request.prompt_tokens).sum();
    let tokens: u32 = requests().iter().map(|request| request.output_tokens).sum();
    for batching in [Batching::Sequence, Batching::Depth] {
        let mut rows = Rows::default();
        let settings = settings(&engine, batching, ExitPolicy::Static(last - 1));
        engine.replay(settings, &requests(), None, Idle::Skip, &mut rows).unwrap();
        // A request's last token is not run, its prompt's last row predicts.
        let expected = (0..last).map(|depth| (depth, if depth == 0 { prompts + tokens - 3 } else { tokens }));
        assert_eq!(rows.0, expected.collect::<HashMap<_, _>>(), "{batching}");
    }
}

#[test]
fn recordings_under_exits_have_the_signals_of_full_depth() {
    let weights = weights(&sharing(with_everything()), 1);
    let engine = engine(&weights);
    let policies = vec![RecordedPolicy::Policy(ExitPolicy::Static(0))];
    let exiting = Exiting { policies, kv_fill: KvFill::First, prefill_depth: None, seed: 1 };
    let reference = Reference::new(&weights).unwrap();
    let num_loops = usize::from(engine.num_loops());
    let mut recorded = Vec::new();
    let keep = |generation: &RecordedGeneration| {
        recorded.push(generation.clone());
        Ok(())
    };
    engine.record_each_exiting(&requests(), &exiting, keep, &mut ()).unwrap();
    for (request, RecordedGeneration { rows, .. }) in requests().iter().zip(&recorded) {
        let prompt = engine.prompts.get(request).unwrap();
        let by_depth = |depth| rows.iter().skip(depth).step_by(num_loops).map(|row| row.1).collect::<Vec<_>>();
        for depth in 0..num_loops {
            // Every token is that of depth 0, the others are what deeper depths predict after it.
            let text = Generation { prompt: prompt.clone(), tokens: by_depth(0), ..Generation::default() };
            for (row, token) in logits(&reference, &text, depth).iter().zip(by_depth(depth)) {
                assert!(is_largest(row, token), "request {} at depth {depth}", request.id);
            }
        }
    }
}

#[test]
fn other_fills_a_coda_and_export_are_refused() {
    let weights = weights(&sharing(with_everything()), 1);
    let engine = engine(&weights);
    let reuse = Settings { kv_fill: KvFill::Reuse, ..settings(&engine, Batching::Depth, ExitPolicy::None) };
    let refusal = engine.replay(reuse, &requests(), None, Idle::Skip, &mut ()).unwrap_err().to_string();
    assert!(refusal.contains("KV fill reuse") && refusal.contains("expected first"), "{refusal}");

    let config = ModelConfig { coda_layers: 1, ..sharing(with_everything()) };
    let refusal = config.validate().unwrap_err().to_string();
    assert!(refusal.contains("kv_fill") && refusal.contains("coda"), "{refusal}");

    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("exported");
    let refusal = write_hugging_face(&weights, None, &out, Stored::F32).unwrap_err().to_string();
    assert!(
        refusal.contains("kv_fill") && refusal.contains("keys and values of depth 0") && !out.exists(),
        "{refusal}"
    );
}
