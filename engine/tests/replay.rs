//! Replays, recordings and agreement on a small random model.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use common::{grouped, weights, with_everything};
use engine::kernels::signals::log_probability;
use engine::reference::Reference;
use engine::{
    Engine, ExitScript, Exiting, FullDepth, Generation, Idle, Model, ModelConfig, Prompts, RecordedGeneration,
    RecordedPolicy, Sampling, WeightType, Weights, oracle_depths,
};
use scheduler::{Batching, ExitPolicy, KvFill, Settings};
use traces::{ExitTrace, ExitTraceMeta, Nanos, Request, SignalSet};

fn engine(config: &ModelConfig, temperature: f32) -> Engine {
    Engine {
        model: Arc::new(Model::load(&weights(config, 5), WeightType::F32).unwrap()),
        prompts: Arc::new(Prompts::Text((0..300).map(|i| i * i * 7 % 40).collect())),
        sampling: Sampling { temperature, seed: 1 },
        script: None,
    }
}

fn requests() -> Vec<Request> {
    (0..6)
        .map(|id| Request { id: id * 3, arrival: Nanos::ZERO, prompt_tokens: 5 + 9 * id, output_tokens: 4 + id })
        .collect()
}

fn settings(exit: ExitPolicy) -> Settings {
    Settings {
        max_batch: 4,
        token_budget: 40,
        prefill_chunk: 16,
        num_blocks: 40,
        ..Settings::new(Batching::Depth, exit, 3)
    }
}

#[test]
fn full_depth_agrees_with_itself_and_early_exit_less() {
    for (config, temperature) in [(grouped(), 0.0), (grouped(), 1.0), (with_everything(), 0.0)] {
        let engine = engine(&config, temperature);
        let full = engine.replay(settings(ExitPolicy::None), &requests(), None, Idle::Skip, &mut ()).unwrap();
        assert_eq!(engine.agreement(&full).unwrap(), 1.0);
        let early = engine.replay(settings(ExitPolicy::Static(0)), &requests(), None, Idle::Skip, &mut ()).unwrap();
        let agreement = engine.agreement(&early).unwrap();
        assert!(agreement < 0.9, "{agreement}");
        assert!(early.values().all(|generation| generation.exit_depths.iter().all(|&depth| depth == 0)));
    }
}

#[test]
fn a_recording_holds_what_a_replay_at_full_depth_generates() {
    let engine = engine(&grouped(), 1.0);
    let trace = engine.record(&requests(), "test", "a test", &mut ()).unwrap();
    let full = engine.replay(settings(ExitPolicy::None), &requests(), None, Idle::Skip, &mut ()).unwrap();
    assert_eq!((trace.num_generations(), trace.meta.fingerprint.as_str()), (6, engine.model.fingerprint()));
    for (index, request) in requests().iter().enumerate() {
        let last = |token| trace.predictions[token * 3 + 2];
        let recorded: Vec<u32> = trace.generation(index).map(last).collect();
        assert_eq!(recorded, full[&request.id].tokens);
    }
    for token in 0..trace.num_tokens() {
        for depth in 0..3 {
            let signals = trace.signals_at(token, depth);
            assert!(signals.top1 > 0.0 && signals.top1 <= 1.0 && signals.margin <= signals.top1);
            assert!(signals.entropy >= 0.0 && signals.entropy <= 40_f32.ln() + 1e-5);
            assert_eq!(signals.similarity == 0.0, depth == 0);
            assert_eq!(signals.difference == 1.0, depth == 0);
            assert!(signals.difference > 0.0 && signals.difference < 10.0);
        }
    }
}

#[test]
fn gates_are_recorded_and_let_tokens_exit() {
    let engine = engine(&with_everything(), 1.0);
    let trace = engine.record(&requests(), "test", "a test", &mut ()).unwrap();
    assert_eq!(trace.recorded, SignalSet::ALL);
    let by_gate = settings("gate:0.5".parse().unwrap());
    let replayed = engine.replay(by_gate, &requests(), None, Idle::Skip, &mut ()).unwrap();
    let mut exits = Vec::new();
    for (index, request) in requests().iter().enumerate() {
        // Only the first token of a request has the same context as in the recording.
        let gates = [0, 1, 2].map(|depth| trace.signals_at(trace.generation(index).start, depth).gate);
        assert!(gates[2] == 1.0 && gates[..2].iter().all(|gate| (0.0..1.0).contains(gate)), "{gates:?}");
        let exit = gates.iter().position(|&gate| gate >= 0.5).unwrap();
        assert_eq!(usize::from(replayed[&request.id].exit_depths[0]), exit);
        exits.push(exit);
    }
    assert!(exits.contains(&0) && exits.iter().any(|&exit| exit > 0), "{exits:?}");
}

#[test]
fn policies_that_compare_depths_exit_where_the_recorded_depths_say() {
    let engine = engine(&with_everything(), 1.0);
    let trace = engine.record(&requests(), "test", "a test", &mut ()).unwrap();
    let starts: Vec<usize> = (0..trace.num_generations()).map(|index| trace.generation(index).start).collect();
    let signals = |token, depth| *trace.signals_at(token, depth);
    let change = |token| (signals(token, 1).entropy - signals(token, 0).entropy).abs();
    let difference = |token| signals(token, 1).difference;
    // Thresholds that about half of the first tokens reach at depth 1.
    let median = |value: &dyn Fn(usize) -> f32| {
        let mut values: Vec<f32> = starts.iter().map(|&token| value(token)).collect();
        values.sort_by(f32::total_cmp);
        values[values.len() / 2]
    };
    let (by_difference, by_entropy) = (median(&difference), median(&change));
    let reaches_difference = |token| usize::from(difference(token) > by_difference) + 1;
    let cases: [(String, &dyn Fn(usize) -> usize); 4] = [
        (format!("difference:{by_difference}"), &reaches_difference),
        (format!("delayed:difference:{by_difference}"), &|_| 2),
        (format!("entropy-change:{by_entropy}"), &|token| usize::from(change(token) > by_entropy) + 1),
        ("stable:2".to_owned(), &|token| usize::from(!trace.repeats(token, 1)) + 1),
    ];
    for (exit, expected) in cases {
        let settings = settings(exit.parse().unwrap());
        let replayed = engine.replay(settings, &requests(), None, Idle::Skip, &mut ()).unwrap();
        // Only the first token of a request has the same context as in the recording.
        let found: Vec<usize> = requests().iter().map(|request| replayed[&request.id].exit_depths[0].into()).collect();
        assert_eq!(found, starts.iter().map(|&token| expected(token)).collect::<Vec<_>>(), "{exit}");
    }
}

#[test]
fn the_oracle_exits_at_the_recorded_depths() {
    let engine = engine(&grouped(), 1.0);
    let trace = engine.record(&requests(), "test", "a test", &mut ()).unwrap();
    let depths = Arc::new(oracle_depths(&trace, &requests()));
    let oracle = ExitPolicy::Oracle { charged: false, recorded: true };
    let replayed = engine.replay(settings(oracle), &requests(), Some(depths.clone()), Idle::Skip, &mut ()).unwrap();
    for request in requests() {
        assert_eq!(replayed[&request.id].exit_depths, depths[&request.id]);
    }
    let message = engine.replay(settings(oracle), &requests(), None, Idle::Skip, &mut ()).unwrap_err().to_string();
    assert!(message.contains("no exit depth for token 0"), "{message}");
}

#[test]
fn a_served_text_has_the_likelihood_that_the_reference_model_gives_it() {
    for config in [grouped(), with_everything()] {
        let (engine, reference) = (engine(&config, 0.7), Reference::new(&weights(&config, 5)).unwrap());
        let early = engine.replay(settings(ExitPolicy::Static(0)), &requests(), None, Idle::Skip, &mut ()).unwrap();
        for (request, generation) in &early {
            let text = [&generation.prompt[..], &generation.tokens].concat();
            let inputs = Tensor::new(&text[..text.len() - 1], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            let logits = reference.forward(&inputs).unwrap().pop().unwrap();
            let logits = logits.to_vec2::<f32>().unwrap();
            let of_tokens = logits[generation.prompt.len() - 1..].iter().zip(&generation.tokens);
            let expected: Vec<f64> =
                of_tokens.map(|(logits, &token)| log_probability(logits, token as usize)).collect();
            let found = engine.full_depth(*request, generation).unwrap().log_likelihoods;
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-3, "request {request}: {found}, expected {expected}");
            }
        }
    }
}

#[test]
fn a_model_that_knows_nothing_gives_every_token_the_same_likelihood() {
    let config = grouped();
    let zeros = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.zeros_like().unwrap());
    let tensors = weights(&config, 5).tensors().iter().map(zeros).collect();
    let weights = Weights::from_tensors(config.clone(), tensors, "test").unwrap();
    let model = Arc::new(Model::load(&weights, WeightType::F32).unwrap());
    let engine = Engine { model, ..engine(&config, 0.0) };
    // The first token of the vocabulary is the most likely of equals.
    let served = Generation { prompt: vec![3; 50], tokens: vec![0, 7, 0], ..Generation::default() };
    let FullDepth { tokens, log_likelihoods } = engine.full_depth(0, &served).unwrap();
    assert_eq!(tokens, [0, 0, 0]);
    let expected = -(config.vocab_size as f64).ln();
    assert!(log_likelihoods.iter().all(|nats| (nats - expected).abs() < 1e-6), "{log_likelihoods:?}");
}

#[test]
fn a_mix_serves_each_request_as_its_static_depth_does() {
    let engine = engine(&grouped(), 1.0);
    let run = |exit| engine.replay(settings(exit), &requests(), None, Idle::Skip, &mut ()).unwrap();
    let ExitPolicy::Mix(mix) = "mix:0:2:0.5".parse().unwrap() else { panic!("a mix") };
    let (mixed, shallow, deep) = (run(ExitPolicy::Mix(mix)), run(ExitPolicy::Static(0)), run(ExitPolicy::Static(2)));
    let drawn: Vec<u8> = requests().iter().map(|request| mix.depth(request.id)).collect();
    assert!(drawn.contains(&0) && drawn.contains(&2), "{drawn:?}");
    for (request, depth) in requests().iter().zip(drawn) {
        let expected = if depth == 0 { &shallow } else { &deep };
        assert_eq!(mixed[&request.id], expected[&request.id]);
    }
}

#[test]
fn the_live_oracle_exits_where_the_text_that_it_serves_has_its_last_token_under_every_batching() {
    let engine = engine(&grouped(), 1.0);
    let oracle = ExitPolicy::Oracle { charged: false, recorded: false };
    let of_recording = oracle_depths(&engine.record(&requests(), "test", "a test", &mut ()).unwrap(), &requests());
    for kv_fill in KvFill::KEEPING {
        let settings = |batching| Settings { kv_fill, batching, ..settings(oracle) };
        let depths = engine.oracle_exits(&settings(Batching::Depth), &requests()).unwrap();
        assert_eq!(depths == of_recording, kv_fill == KvFill::Backfill, "{kv_fill}: exits change what follows");
        for batching in Batching::ALL {
            let served = engine.replay(settings(batching), &requests(), None, Idle::Skip, &mut ()).unwrap();
            for (request, generation) in &served {
                assert_eq!(generation.exit_depths, depths[request], "{batching}, {kv_fill}, request {request}");
            }
            // Exact keys and values have the last word where nothing else is in the cache.
            let agreement = engine.agreement(&served).unwrap();
            assert_eq!(agreement == 1.0, kv_fill == KvFill::Backfill, "{batching}, {kv_fill}: {agreement}");
        }
    }
}

#[test]
fn a_recording_under_policies_holds_what_each_of_them_serves() {
    let engine = engine(&grouped(), 1.0);
    let requests: Vec<Request> = (0..12).map(|id| Request { output_tokens: 8, ..requests()[id % 6] }).collect();
    let requests: Vec<Request> = (0..).zip(requests).map(|(id, request)| Request { id, ..request }).collect();
    for kv_fill in KvFill::KEEPING.into_iter().chain([KvFill::Last, KvFill::Cycle(2)]) {
        let policies: Vec<ExitPolicy> = ["static:0", "top1:0.3"].map(|text| text.parse().unwrap()).to_vec();
        let recorded = policies.iter().map(|&policy| RecordedPolicy::Policy(policy)).collect();
        let exiting = Exiting { policies: recorded, kv_fill, prefill_depth: None, seed: 1 };
        let mut generations = Vec::new();
        let keep = |recorded: &RecordedGeneration| {
            generations.push(recorded.clone());
            Ok(())
        };
        engine.record_each_exiting(&requests, &exiting, keep, &mut ()).unwrap();
        assert_eq!(generations.len(), requests.len());
        let mut under = [0; 2];
        for (request, found) in requests.iter().zip(generations) {
            let policy = exiting.policy_of(request.id);
            assert_eq!(found.policy as usize, policy);
            under[policy] += 1;
            // Chunks of prompts, except where a prompt starts as a whole.
            let prefill_chunk = if kv_fill.overwrites(3) { request.prompt_tokens } else { 16 };
            let settings = Settings { kv_fill, prefill_chunk, token_budget: 80, ..settings(policies[policy]) };
            let served =
                engine.replay(settings, &[*request], None, Idle::Skip, &mut ()).unwrap().remove(&request.id).unwrap();
            let full_depth = engine.full_depth(request.id, &served).unwrap().tokens;
            for (token, exit) in found.tokens.iter().enumerate() {
                let what = format!("{kv_fill}: token {token} of request {}", request.id);
                assert_eq!(exit.exit_depth, u32::from(served.exit_depths[token]), "{what}");
                assert_eq!(found.rows[3 * token + exit.exit_depth as usize].1, served.tokens[token], "{what}");
                assert_eq!(exit.full_depth, full_depth[token], "{what}");
            }
        }
        assert!(under.iter().all(|&requests| requests > 2), "both policies are drawn: {under:?}");
    }
}

#[test]
fn a_recording_takes_long_prompts_where_they_start_as_a_whole() {
    let engine = engine(&ModelConfig { max_positions: 400, ..grouped() }, 0.0);
    let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 290, output_tokens: 2 };
    let policies = vec![RecordedPolicy::Policy(ExitPolicy::Static(0))];
    let exiting = Exiting { policies, kv_fill: KvFill::Last, prefill_depth: None, seed: 1 };
    let mut recorded = 0;
    let count = |_: &RecordedGeneration| {
        recorded += 1;
        Ok(())
    };
    engine.record_each_exiting(&[0, 1, 2].map(request), &exiting, count, &mut ()).unwrap();
    assert_eq!(recorded, 3);
}

#[test]
fn random_exits_come_as_often_as_their_probability_says() {
    let engine = engine(&grouped(), 0.0);
    let requests: Vec<Request> =
        (0..40).map(|id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 5, output_tokens: 50 }).collect();
    let exiting =
        Exiting { policies: vec!["random:0.25".parse().unwrap()], kv_fill: KvFill::Skip, prefill_depth: None, seed: 3 };
    let mut exits = [0_u32; 3];
    let count = |recorded: &RecordedGeneration| {
        recorded.tokens.iter().for_each(|token| exits[token.exit_depth as usize] += 1);
        Ok(())
    };
    engine.record_each_exiting(&requests, &exiting, count, &mut ()).unwrap();
    // Of 2,000 tokens: a quarter, a quarter of the rest, and what remains; within four standard deviations.
    for (found, expected) in exits.into_iter().zip([500.0_f64, 375.0, 1125.0]) {
        let deviation = (expected * (1.0 - expected / 2000.0)).sqrt();
        assert!((f64::from(found) - expected).abs() < 4.0 * deviation, "{exits:?}");
    }
    for (text, expected) in
        [("random:1.5", "a probability P from 0 to 1"), ("random:x", "random:P"), ("no", "unknown exit policy")]
    {
        assert!(text.parse::<RecordedPolicy>().unwrap_err().contains(expected), "{text}");
    }
    let following = Exiting { policies: vec!["oracle:recorded".parse().unwrap()], ..exiting };
    let error = engine.record_each_exiting(&requests, &following, |_| Ok(()), &mut ()).unwrap_err().to_string();
    assert!(error.contains("oracle:recorded follows a recording"), "{error}");
}

#[test]
fn exits_that_do_not_fit_the_model_or_the_requests_are_refused() {
    let meta = |num_loops| ExitTraceMeta {
        schema_version: ExitTrace::SCHEMA_VERSION,
        model: "another one".to_owned(),
        fingerprint: "any".to_owned(),
        num_loops,
        source: "a test".to_owned(),
        recording: None,
    };
    let refuse = |trace: ExitTrace, exit: &str| {
        // Two tokens for each request, which ask for four and more.
        let tokens = requests().iter().map(|request| (request.id, vec![0, 1])).collect();
        let script = Some(Arc::new(ExitScript::new(Arc::new(trace), tokens)));
        let engine = Engine { script, ..engine(&with_everything(), 0.0) };
        let settings = settings(exit.parse().unwrap());
        engine.replay(settings, &requests(), None, Idle::Skip, &mut ()).unwrap_err().to_string()
    };
    let depths = [vec![0, 1]];
    let always = ExitTrace { recorded: SignalSet::ALWAYS, ..ExitTrace::from_depths(meta(3), &depths) };
    let cases = [
        (refuse(ExitTrace::from_depths(meta(4), &depths), "none"), "tokens follow is of 4 loops, expected 3"),
        (
            refuse(ExitTrace::from_depths(meta(3), &depths), "speculate:margin:0.5:2"),
            "speculate:margin:0.5:2: full depth",
        ),
        (refuse(always, "kl:0.5"), "exit policy confidence:kl:0.5: the exit trace that tokens follow lacks the signal"),
        (refuse(ExitTrace::from_depths(meta(3), &depths), "margin:0.5"), "the exit script has no token 2 of request"),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn what_cannot_run_is_refused_before_the_run() {
    let engine = engine(&grouped(), 0.0);
    let refuse = |settings: Settings, prompt_tokens| {
        let request = Request { id: 7, arrival: Nanos::ZERO, prompt_tokens, output_tokens: 9 };
        engine.replay(settings, &[requests()[0], request], None, Idle::Skip, &mut ()).unwrap_err().to_string()
    };
    let none = settings(ExitPolicy::None);
    let cases = [
        (refuse(Settings { num_blocks: 2, ..none }, 50), "holds 32"),
        (refuse(none, 122), "request 7 needs 130 positions, the model has 128"),
        (refuse(Settings { num_loops: 4, ..none }, 5), "4 loops, expected 3"),
        (refuse(Settings { block_tokens: 10, ..none }, 5), "a KV block of 10 tokens"),
        (refuse(settings("gate:0.5".parse().unwrap()), 5), "confidence:gate:0.5: the model has no gates"),
    ];
    for (message, expected) in cases {
        assert!(message.contains(expected), "{message}");
    }
    let unasked = Engine { prompts: Arc::new(Prompts::Given(HashMap::new())), ..engine.clone() };
    let message = unasked.replay(none, &requests(), None, Idle::Skip, &mut ()).unwrap_err().to_string();
    assert!(message.contains("request 0 asks for a prompt of 5 tokens, 0 were given"), "{message}");
}
