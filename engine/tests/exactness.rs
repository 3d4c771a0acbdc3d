//! A request generates the tokens that it generates by itself on the CPU with the same exits. This is independent of
//! the device, the batching, other requests, the chunks of its prompt and preemptions, for every weight type and KV
//! fill. On the CPU, results are identical to the bit.

mod common;

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use common::devices::Device;
use common::{configs, configs_of_one_head_size, grouped, weights, with_everything};
use engine::cache::KvCache;
use engine::kernels::attention::Row;
use engine::kernels::rows::Source;
use engine::kernels::signals::{Verdict, divergence, read};
use engine::model::{InFlight, Model, Rows};
use engine::reference::Reference;
use engine::{
    Asked, Decoding, Engine, EngineError, EngineExecutor, Generation, ModelConfig, Prompts, Sampling, ServedModel,
    WeightType, Weights,
};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use scheduler::{
    Batching, Clock, Executor, ExitPolicy, KvFill, Observer, Pass, PassRecord, PrefixUse, Segment, Server, Settings,
    SignalRead, Slot, Verified, VirtualClock, serve,
};
use traces::hash::mix;
use traces::{ExitSignal, Nanos, PrefixHashes, Request, Signals};

#[derive(Default)]
struct Preemptions(u32);

impl Observer for Preemptions {
    fn preempted(&mut self, _: Nanos, _: &Request) {
        self.0 += 1;
    }
}

struct Setup {
    device: Device,
    /// The model under test.
    model: Arc<dyn ServedModel>,
    /// The model on the CPU, where requests run by themselves.
    on_cpu: Arc<Model>,
    prompts: Arc<Prompts>,
    sampling: Sampling,
    /// How deep prompts run.
    prefill_depth: Option<u8>,
}

impl Setup {
    fn new(config: &ModelConfig, weight_type: WeightType, seed: u64, temperature: f32) -> Self {
        let text = (0..200_u64).map(|i| (i * i * 31 + i * 7 + seed) as u32 % config.vocab_size as u32).collect();
        let model = Arc::new(Model::load(&weights(config, seed), weight_type).unwrap());
        Self {
            device: Device::Cpu,
            model: model.clone(),
            on_cpu: model,
            prompts: Arc::new(Prompts::Text(text)),
            sampling: Sampling { temperature, seed },
            prefill_depth: None,
        }
    }

    /// `None` if there is no such device.
    fn on(device: Device, config: &ModelConfig, seed: u64, temperature: f32) -> Option<Self> {
        let on_cpu = Self::new(config, WeightType::F32, seed, temperature);
        match device {
            Device::Cpu => Some(on_cpu),
            _ => Some(Self { device, model: device.serve(&weights(config, seed))?, ..on_cpu }),
        }
    }

    fn executor(&self, settings: &Settings) -> EngineExecutor {
        self.executor_of(self.model.clone(), settings)
    }

    fn executor_of(&self, model: Arc<dyn ServedModel>, settings: &Settings) -> EngineExecutor {
        let &Settings { kv_fill, num_blocks, block_tokens, .. } = settings;
        let (prompts, sampling) = (self.prompts.clone(), self.sampling);
        let executor = EngineExecutor::new(model, prompts, sampling, kv_fill, num_blocks, block_tokens).unwrap();
        let executor = executor.with_prompts_of(settings);
        if settings.exit_wait > 0 { executor.with_exits_that_wait().unwrap() } else { executor }
    }

    /// Serves requests; returns what each generated, and the number of preemptions.
    fn run(
        &self,
        settings: Settings,
        requests: &[Request],
        executor: EngineExecutor,
    ) -> (HashMap<u32, Generation>, u32) {
        let mut server = Server::new(settings, executor).unwrap();
        let mut preemptions = Preemptions::default();
        serve(&mut server, requests.iter().copied(), &mut VirtualClock::default(), &mut preemptions).unwrap();
        (server.into_executor().into_generations(), preemptions.0)
    }

    /// Serves one request by itself on the CPU, with given exit depths and with signals.
    fn run_alone(&self, request: Request, kv_fill: KvFill, exits: Vec<u8>) -> Generation {
        self.run_alone_on(self.on_cpu.clone(), request, kv_fill, exits)
    }

    fn run_alone_on(
        &self,
        model: Arc<dyn ServedModel>,
        request: Request,
        kv_fill: KvFill,
        exits: Vec<u8>,
    ) -> Generation {
        let exits = Arc::new(HashMap::from([(request.id, exits)]));
        let settings = Settings {
            kv_fill,
            prefill_depth: self.prefill_depth,
            max_batch: 1,
            token_budget: 1000,
            prefill_chunk: 1000,
            block_tokens: 128,
            num_blocks: 1,
            ..Settings::new(
                Batching::Sequence,
                ExitPolicy::Oracle { charged: false, recorded: true },
                self.model.config().num_loops as u8,
            )
        };
        let executor = self.executor_of(model, &settings).recording().with_oracle(exits);
        self.run(settings, &[request], executor).0.remove(&request.id).unwrap()
    }
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    prop::collection::vec((0_u64..3_000_000, 1_u32..60, 1_u32..20), 1..8).prop_map(|drawn| {
        let mut arrivals: Vec<u64> = drawn.iter().map(|&(arrival, ..)| arrival).collect();
        arrivals.sort_unstable();
        let request = |((id, arrival), &(_, prompt_tokens, output_tokens))| Request {
            id,
            arrival: Nanos(arrival),
            prompt_tokens,
            output_tokens,
        };
        (0..).zip(arrivals).zip(&drawn).map(request).collect()
    })
}

fn exits() -> impl Strategy<Value = ExitPolicy> {
    let confidence = |signal, threshold| ExitPolicy::Confidence { signal, threshold };
    prop_oneof![
        Just(ExitPolicy::None),
        Just(ExitPolicy::Static(0)),
        (0.05_f32..0.9).prop_map(move |threshold| confidence(ExitSignal::Top1, threshold)),
        (0.05_f32..0.5).prop_map(move |threshold| confidence(ExitSignal::Margin, threshold)),
        (0.5_f32..3.5).prop_map(move |threshold| confidence(ExitSignal::Entropy, threshold)),
        (0.5_f32..0.999).prop_map(move |threshold| confidence(ExitSignal::Similarity, threshold)),
        (0.2_f32..0.8).prop_map(move |threshold| confidence(ExitSignal::Gate, threshold)),
        (0.05_f32..0.9).prop_map(|threshold| ExitPolicy::Delayed { signal: ExitSignal::Top1, threshold }),
        (0.2_f32..0.8).prop_map(|threshold| ExitPolicy::Delayed { signal: ExitSignal::Gate, threshold }),
        (0.2_f32..0.9).prop_map(|share| ExitPolicy::Cumulative { share, min_loops: 1 }),
        (0.05_f32..1.0).prop_map(move |threshold| confidence(ExitSignal::Difference, threshold)),
        (0.05_f32..1.0).prop_map(|threshold| ExitPolicy::Delayed { signal: ExitSignal::Difference, threshold }),
        (0.01_f32..3.0).prop_map(move |threshold| confidence(ExitSignal::Kl, threshold)),
        (0.01_f32..3.0).prop_map(|threshold| ExitPolicy::Delayed { signal: ExitSignal::Kl, threshold }),
        (0.001_f32..0.5).prop_map(|threshold| ExitPolicy::EntropyChange { threshold }),
        Just(ExitPolicy::Stable { depths: 2 }),
    ]
}

/// The policy, in a model that has the loops for it.
fn that_fits(exit: ExitPolicy, config: &ModelConfig) -> ExitPolicy {
    match exit {
        ExitPolicy::Stable { depths } if usize::from(depths) > config.num_loops => ExitPolicy::None,
        exit => exit,
    }
}

fn assert_all_as_alone(setup: &Setup, kv_fill: KvFill, requests: &[Request], generations: &HashMap<u32, Generation>) {
    for request in requests {
        let found = &generations[&request.id];
        assert_eq!(found.tokens.len(), request.output_tokens as usize);
        let alone = setup.run_alone(*request, kv_fill, found.exit_depths.clone());
        assert_same(setup.device, &format!("request {}", request.id), found, &alone);
    }
}

/// Checks that two generations have equal tokens and predictions, and equal signals up to the device's tolerance.
fn assert_same(device: Device, what: &str, found: &Generation, expected: &Generation) {
    if device == Device::Cpu {
        // Which signal was read depends on the exit policy; the recorded ones are compared.
        let without_read = |generation: &Generation| Generation { exit_signals: Vec::new(), ..generation.clone() };
        assert_eq!(without_read(found), without_read(expected), "{what}");
    }
    assert_eq!(found.tokens, expected.tokens, "{what} on {device:?}");
    assert_eq!(found.recorded.len(), expected.recorded.len(), "{what} on {device:?}");
    for (entry, ((found, token), (expected, as_expected))) in found.recorded.iter().zip(&expected.recorded).enumerate()
    {
        assert_eq!(token, as_expected, "{what} on {device:?}: prediction {entry}");
        for signal in ExitSignal::ALL {
            let what = format!("{what}: {signal:?} {entry}");
            device.assert_close(&what, found.get(signal), expected.get(signal));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn batched_requests_generate_what_they_generate_alone(
        config in configs(), seed in 0_u64..1000, requests in requests(), exit in exits(),
        batching in prop::sample::select(Batching::ALL.to_vec()), kv_fill in prop::sample::select(KvFill::KEEPING.to_vec()),
        max_batch in 1_u32..6, spare_budget in 0_u32..70, prefill_chunk in 1_u32..70, num_blocks in 5_u32..16,
        temperature in prop_oneof![Just(0.0_f32), Just(0.8)], weight_type in prop::sample::select(WeightType::ON_CPU.to_vec()),
        ahead in any::<bool>(), exit_wait in 0_u32..4,
    ) {
        let exit = that_fits(exit, &config);
        let reads_gates = exit.signal_read() == SignalRead::Signal(ExitSignal::Gate);
        let config = ModelConfig { gate: config.gate || reads_gates, ..config };
        let setup = Setup::new(&config, weight_type, seed, temperature);
        let settings = Settings {
            kv_fill, max_batch, prefill_chunk, num_blocks,
            token_budget: max_batch + spare_budget,
            async_scheduling: ahead && exit.is_known_ahead(),
            exit_wait: if ahead && exit.is_known_ahead() { 0 } else { exit_wait },
            exit_batch: if ahead && exit.is_known_ahead() || exit_wait == 0 { 0 } else { prefill_chunk % 4 },
            ..Settings::new(batching, exit, config.num_loops as u8)
        };
        assert_batched_as_alone(&setup, settings, &requests);
    }
}

/// Exit signals of the reference model, by token of the output and depth, for a request that was served with these
/// tokens and exit depths.
fn signals_of_the_reference(
    weights: &Weights,
    kv_fill: KvFill,
    prefill_depth: Option<u8>,
    served: &Generation,
) -> Vec<Vec<Signals>> {
    let Generation { prompt, tokens, exit_depths, .. } = served;
    let reference = Reference::new(weights).unwrap();
    let context = [&prompt[..], &tokens[..tokens.len() - 1]].concat();
    let prompt_depth = prefill_depth.map_or(usize::MAX, usize::from);
    // The first output token is the prediction of the prompt's last, which runs as deep as that needs.
    let exits_at = |position: usize| match (position + 1).checked_sub(prompt.len()) {
        None => prompt_depth,
        Some(0) => prompt_depth.max(exit_depths[0].into()),
        Some(token) => exit_depths[token].into(),
    };
    let inputs = Tensor::from_slice(&context, (1, context.len()), &candle_core::Device::Cpu).unwrap();
    let mut run = reference.start(&inputs, kv_fill).unwrap();
    let mut signals = vec![Vec::new(); tokens.len()];
    let mut before: Option<Vec<Vec<f32>>> = None;
    let mut depth = 0;
    while let Some(states) = run.next_loop().unwrap() {
        let logits = reference.logits(&states.exited, depth).unwrap();
        let verdicts = read(&logits, 0.0, &vec![0; context.len()]).unwrap();
        let of_tokens = logits.to_vec2::<f32>().unwrap();
        let gates = reference.gate_logits(&reference.final_norm(&states.hidden).unwrap(), depth).unwrap();
        let gates = gates.map(|gates| gates.to_vec1::<f32>().unwrap());
        for (index, signals) in signals.iter_mut().enumerate() {
            let position = prompt.len() - 1 + index;
            // After the last loop, an engine with gates reports certainty.
            let certain = f32::from(u8::from(reference.config().gate));
            let gate = gates.as_ref().map_or(certain, |gates| (1.0 + (-gates[position]).exp()).recip());
            let kl = divergence(before.as_ref().map(|before| &before[position][..]), &of_tokens[position]);
            signals.push(Signals { kl, gate, ..verdicts[position].signals() });
        }
        before = Some(of_tokens);
        let exits: Vec<bool> = (0..context.len()).map(|position| exits_at(position) <= depth).collect();
        run.exit(&exits).unwrap();
        depth += 1;
    }
    signals
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn the_reference_with_exits_under_a_kv_fill_has_the_signals_that_are_served(
        config in configs(), seed in 0_u64..1000, prompt_tokens in 1_u32..40, output_tokens in 2_u32..25,
        kv_fill in prop::sample::select(KvFill::KEEPING.to_vec()), prefill_depth in 0_u8..4,
    ) {
        let ends_early = kv_fill == KvFill::Reuse && usize::from(prefill_depth) < config.num_loops;
        let prefill_depth = ends_early.then_some(prefill_depth);
        let exits = (0..u64::from(output_tokens)).map(|token| (mix(token << 20 ^ seed) % config.num_loops as u64) as u8);
        let setup = Setup { prefill_depth, ..Setup::new(&config, WeightType::F32, seed, 1.0) };
        let request = Request { id: 0, arrival: Nanos::ZERO, prompt_tokens, output_tokens };
        let served = setup.run_alone(request, kv_fill, exits.collect());
        let expected = signals_of_the_reference(&weights(&config, seed), kv_fill, prefill_depth, &served);
        for (index, (expected, exit)) in expected.iter().zip(&served.exit_depths).enumerate() {
            for (depth, expected) in expected[..=usize::from(*exit)].iter().enumerate() {
                let (found, _) = served.recorded[index * config.num_loops + depth];
                use ExitSignal::{Entropy, Gate, Kl, Margin, Top1};
                for signal in [Top1, Margin, Entropy, Kl, Gate] {
                    let (found, expected) = (found.get(signal), expected.get(signal));
                    prop_assert!(
                        (found - expected).abs() < 2e-3 * (1.0 + expected.abs()),
                        "{kv_fill}, prompts up to {prefill_depth:?}: {signal} of token {index} at depth {depth} is {found}, \
                         the reference's {expected}"
                    );
                }
            }
        }
    }
}

/// What prefix caching found, and how often requests lost their slots.
#[derive(Default)]
struct Found {
    /// Tokens that requests found when they came.
    shared: u32,
    /// Tokens that requests found again after a preemption.
    again: u32,
    preempted: HashSet<u32>,
}

impl Observer for Found {
    fn looked_up(&mut self, _: Nanos, request: &Request, found: PrefixUse) {
        assert!(found.found < found.looked_up, "the last token runs in any case");
        let of_kind = if self.preempted.contains(&request.id) { &mut self.again } else { &mut self.shared };
        *of_kind += found.found;
    }

    fn preempted(&mut self, _: Nanos, request: &Request) {
        self.preempted.insert(request.id);
    }
}

impl Setup {
    /// The same with prompts that begin alike: those of every second request have the first `shared` tokens in common.
    fn with_families(self, requests: &[Request], shared: u32) -> Self {
        let vocab = self.model.config().vocab_size as u64;
        let token = |request: u32, position: u32| {
            let owner = if position < shared { u64::from(request % 2) } else { 2 + u64::from(request) };
            (mix(owner << 32 | u64::from(position)) % vocab) as u32
        };
        let prompt =
            |request: &Request| (0..request.prompt_tokens).map(|position| token(request.id, position)).collect();
        let given = requests.iter().map(|request| (request.id, prompt(request))).collect();
        Self { prompts: Arc::new(Prompts::Given(given)), ..self }
    }

    fn prefix_hashes(&self, requests: &[Request], block_tokens: u32) -> PrefixHashes {
        let (model, prompts) = (self.model.clone(), self.prompts.clone());
        Engine { prompts, ..Engine::new(model) }.prefix_hashes(requests, block_tokens).unwrap()
    }

    /// Serves requests with prefix caching, some of which end early: `ended` has numbers of passes and the request that ends
    /// after as many.
    fn run_caching(
        &self,
        settings: Settings,
        requests: &[Request],
        executor: EngineExecutor,
        ended: &[(u32, u32)],
    ) -> (HashMap<u32, Generation>, Found) {
        let mut server = Server::new(settings, executor).unwrap();
        let hashes = self.prefix_hashes(requests, settings.block_tokens);
        let (mut clock, mut found) = (VirtualClock::default(), Found::default());
        let (mut waiting, mut passes) = (requests.iter().peekable(), 0);
        loop {
            while let Some(request) = waiting.next_if(|request| request.arrival <= clock.now()) {
                server.share_prefix(request.id, hashes.of(request.id).to_vec());
                server.submit(*request).unwrap();
            }
            for (_, request) in ended.iter().filter(|(after, _)| *after == passes) {
                server.end(*request);
            }
            match server.start_pass(clock.now(), &mut found).unwrap() {
                Some(elapsed) => {
                    let end = clock.advance(elapsed);
                    server.finish_pass(end, &mut found);
                }
                None => match waiting.peek() {
                    Some(next) => clock.wait_until(next.arrival),
                    None => return (server.into_executor().into_generations(), found),
                },
            }
            passes += 1;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn with_prefix_caching_requests_generate_what_they_generate_alone(
        config in configs(), seed in 0_u64..1000, requests in requests(), exit in exits(), shared in 16_u32..50,
        batching in prop::sample::select(Batching::ALL.to_vec()), kv_fill in prop::sample::select(KvFill::KEEPING.to_vec()),
        max_batch in 1_u32..6, spare_budget in 0_u32..70, prefill_chunk in 1_u32..70, num_blocks in 5_u32..16,
        temperature in prop_oneof![Just(0.0_f32), Just(0.8)], ahead in any::<bool>(), exit_wait in 0_u32..4,
        ended in prop::collection::vec((0_u32..60, 0_u32..8), 0..3),
    ) {
        let exit = that_fits(exit, &config);
        let reads_gates = exit.signal_read() == SignalRead::Signal(ExitSignal::Gate);
        let config = ModelConfig { gate: config.gate || reads_gates, ..config };
        let setup = Setup::new(&config, WeightType::F32, seed, temperature).with_families(&requests, shared);
        let settings = Settings {
            kv_fill, max_batch, prefill_chunk, num_blocks,
            token_budget: max_batch + spare_budget,
            async_scheduling: ahead && exit.is_known_ahead(),
            exit_wait: if ahead && exit.is_known_ahead() { 0 } else { exit_wait },
            prefix_caching: true,
            ..Settings::new(batching, exit, config.num_loops as u8)
        };
        let executor = setup.executor(&settings).recording();
        let (mut generations, _) = setup.run_caching(settings, &requests, executor, &ended);
        let (cut, whole): (Vec<Request>, _) =
            requests.iter().partition(|request| ended.iter().any(|(_, ended)| *ended == request.id));
        assert_all_as_alone(&setup, kv_fill, &whole, &generations);
        for request in cut {
            let Generation { tokens, exit_depths, .. } = generations.remove(&request.id).unwrap_or_default();
            if !tokens.is_empty() {
                let until_end = Request { output_tokens: tokens.len() as u32, ..request };
                prop_assert_eq!(tokens, setup.run_alone(until_end, kv_fill, exit_depths).tokens);
            }
        }
    }
}

#[test]
fn prefix_caching_finds_prompts_and_what_preempted_requests_computed_and_changes_no_bit() {
    prefix_caching_on(Device::Cpu);
}

#[test]
fn prefix_caching_by_cuda_kernels_changes_no_token() {
    prefix_caching_on(Device::Cuda);
}

fn prefix_caching_on(device: Device) {
    let config = ModelConfig { gate: true, ..with_everything() };
    let policies = ["none", "static:1", "mix:0:2:0.5", "gate:0.5", "delayed:gate:0.5", "speculate:static:0:3"];
    // Emulation is slow.
    let (every, count, max_batch, output_tokens) = if device == Device::Cpu { (1, 6, 3, 20) } else { (13, 3, 2, 4) };
    let (mut preempted, mut again) = (0, 0);
    let cases = Batching::ALL.into_iter().flat_map(|batching| KvFill::KEEPING.map(|kv_fill| (batching, kv_fill)));
    let cases = cases.flat_map(|case| policies.map(|exit| (case, exit.parse::<ExitPolicy>().unwrap())));
    let takes_drafts = |kv_fill| matches!(kv_fill, KvFill::Backfill | KvFill::First);
    let cases = cases.filter(|((_, kv_fill), exit)| !exit.speculates() || takes_drafts(*kv_fill));
    for (place, ((batching, kv_fill), exit)) in cases.enumerate().step_by(every) {
        let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 36 + id, output_tokens };
        let requests: Vec<Request> = (0..count).map(request).collect();
        let Some(setup) = Setup::on(device, &config, 3, 0.8) else { return };
        let setup = setup.with_families(&requests, 33);
        // On the CPU each request takes four blocks.
        let settings = Settings {
            kv_fill,
            max_batch,
            token_budget: 50,
            num_blocks: 7,
            async_scheduling: exit.is_known_ahead() && place % 2 == 0,
            ..Settings::new(batching, exit, 3)
        };
        let what = format!("{batching}, {kv_fill}, {exit}");
        let (without, _) = setup.run(settings, &requests, setup.executor(&settings).exiting_by(exit));
        let settings = Settings { prefix_caching: true, ..settings };
        let executor = setup.executor(&settings).exiting_by(exit);
        let (with, found) = setup.run_caching(settings, &requests, executor, &[]);
        assert!(found.shared > 0, "{what}: no prompt was found");
        preempted += found.preempted.len();
        again += found.again;
        for request in &requests {
            let of = |generations: &HashMap<u32, Generation>| {
                let Generation { tokens, exit_depths, .. } = &generations[&request.id];
                // A preemption takes drafts back, so which tokens are drafts depends on when it comes.
                (tokens.clone(), (!exit.speculates()).then(|| exit_depths.clone()))
            };
            assert_eq!(of(&with), of(&without), "{what}: request {}", request.id);
        }
    }
    assert!(again > 0 || preempted == 0, "preempted requests find what they had");
    assert!(preempted > 0 || device != Device::Cpu, "nothing is preempted");
}

#[test]
fn looking_ahead_behind_a_cached_prefix_finds_the_same_at_every_depth() {
    let config = ModelConfig { gate: true, ..with_everything() };
    let requests: Vec<Request> =
        (0..6).map(|id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 36 + id, output_tokens: 9 }).collect();
    let setup = Setup::new(&config, WeightType::F32, 3, 0.8).with_families(&requests, 33);
    for (batching, kv_fill) in
        Batching::ALL.into_iter().flat_map(|batching| KvFill::KEEPING.map(|fill| (batching, fill)))
    {
        let settings = Settings {
            kv_fill,
            max_batch: 3,
            token_budget: 100,
            prefill_depth: (kv_fill != KvFill::First).then_some(2),
            num_blocks: 12,
            ..Settings::new(batching, "gate:0.5".parse().unwrap(), 3)
        };
        let (without, _) = setup.run(settings, &requests, setup.executor(&settings).looking_ahead());
        let settings = Settings { prefix_caching: true, ..settings };
        let executor = setup.executor(&settings).looking_ahead();
        let (with, found) = setup.run_caching(settings, &requests, executor, &[]);
        assert!(found.shared > 0);
        assert_eq!(with, without, "{batching}, {kv_fill}");
    }
}

/// Checks that each request generates under these settings what it generates by itself, recorded or not: signals that
/// are not recorded need not be computed, and change no token.
fn assert_batched_as_alone(setup: &Setup, settings: Settings, requests: &[Request]) {
    let (generations, _) = setup.run(settings, requests, setup.executor(&settings).recording());
    assert_all_as_alone(setup, settings.kv_fill, requests, &generations);
    let (unrecorded, _) = setup.run(settings, requests, setup.executor(&settings).exiting_by(settings.exit));
    for (request, Generation { tokens, exit_depths, .. }) in &unrecorded {
        let recorded = &generations[request];
        assert_eq!((tokens, exit_depths), (&recorded.tokens, &recorded.exit_depths), "request {request}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn looking_ahead_finds_what_a_token_would_predict_if_it_ran_on_and_changes_nothing(
        config in configs(), seed in 0_u64..1000, exit in exits(), num_blocks in 4_u32..16, prefill_chunk in 1_u32..30,
        batching in prop::sample::select(Batching::ALL.to_vec()), kv_fill in prop::sample::select(KvFill::KEEPING.to_vec()),
        temperature in prop_oneof![Just(0.0_f32), Just(0.8)],
    ) {
        let exit = that_fits(exit, &config);
        let reads_gates = exit.signal_read() == SignalRead::Signal(ExitSignal::Gate);
        let config = ModelConfig { gate: config.gate || reads_gates, ..config };
        let setup = Setup::new(&config, WeightType::F32, seed, temperature);
        let settings = Settings {
            kv_fill, prefill_chunk, num_blocks,
            max_batch: 3,
            token_budget: 23,
            ..Settings::new(batching, exit, config.num_loops as u8)
        };
        assert_ahead_as_run_on(&setup, settings, 9);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn prompts_that_run_some_depths_give_the_same_text_in_a_batch_and_looking_ahead(
        config in configs(), seed in 0_u64..1000, exit in exits(), num_blocks in 4_u32..16, prefill_chunk in 1_u32..30,
        batching in prop::sample::select(Batching::ALL.to_vec()), prefill_depth in 0_u8..4, exit_wait in 0_u32..3,
    ) {
        let exit = that_fits(exit, &config);
        let config = ModelConfig { gate: true, ..config };
        let prefill_depth = Some(prefill_depth.min(config.num_loops as u8 - 1));
        let setup = Setup { prefill_depth, ..Setup::new(&config, WeightType::F32, seed, 0.8) };
        let settings = Settings {
            prefill_depth, prefill_chunk, num_blocks,
            max_batch: 3,
            token_budget: 23,
            ..Settings::new(batching, exit, config.num_loops as u8)
        };
        assert_ahead_as_run_on(&setup, settings, 9);
        let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 3 + 9 * id, output_tokens: 6 };
        let requests: Vec<Request> = (0..3).map(request).collect();
        assert_batched_as_alone(&setup, Settings { exit_wait, ..settings }, &requests);
    }
}

/// KV fills under which deeper depths overwrite entries, in a model with three loops.
const OVERWRITING: [KvFill; 2] = [KvFill::Last, KvFill::Cycle(2)];

#[test]
fn overwritten_entries_give_the_same_text_under_any_batching() {
    overwritten_entries_on(Device::Cpu);
}

#[test]
fn overwritten_entries_by_cuda_kernels_give_the_same_text_under_any_batching() {
    overwritten_entries_on(Device::Cuda);
}

fn overwritten_entries_on(device: Device) {
    let policies = ["static:1", "mix:0:2:0.5", "difference:0.6", "delayed:similarity:0.8"];
    for (kv_fill, config) in
        OVERWRITING.into_iter().flat_map(|fill| models(device).into_iter().map(move |of| (fill, of)))
    {
        let Some(setup) = Setup::on(device, &config, 11, 0.0) else { return };
        let request =
            |id| Request { id, arrival: Nanos(u64::from(id) * 300), prompt_tokens: 2 + 7 * id, output_tokens: 9 };
        let requests: Vec<Request> = (0..4).map(request).collect();
        let generate = |settings: Settings| {
            let executor = setup.executor(&settings).exiting_by(settings.exit);
            let (generations, preemptions) = setup.run(settings, &requests, executor);
            assert_eq!(preemptions, 0);
            requests.iter().map(|request| generations[&request.id].tokens.clone()).collect::<Vec<_>>()
        };
        for exit in policies {
            let exit: ExitPolicy = exit.parse().unwrap();
            // Few blocks and a short budget, so that prompts and sequences wait for each other.
            let settings = |batching| Settings {
                kv_fill,
                max_batch: 3,
                token_budget: 25,
                prefill_chunk: 23,
                num_blocks: 5,
                ..Settings::new(batching, exit, config.num_loops as u8)
            };
            let [vanilla, sequence, depth] = Batching::ALL.map(|batching| generate(settings(batching)));
            assert_eq!(vanilla, sequence, "{kv_fill}, {exit}");
            assert_eq!(sequence, depth, "{kv_fill}, {exit}");
            assert_batched_as_alone(&setup, settings(Batching::Depth), &requests);
        }
        let settings = Settings {
            kv_fill,
            max_batch: 3,
            num_blocks: 9,
            ..Settings::new(Batching::Depth, "top1:0.3".parse().unwrap(), config.num_loops as u8)
        };
        assert_ahead_as_run_on(&setup, settings, 5);
    }
}

#[test]
fn looking_ahead_survives_preemption() {
    for (batching, kv_fill) in
        Batching::ALL.into_iter().flat_map(|batching| KvFill::KEEPING.map(|fill| (batching, fill)))
    {
        let setup = Setup::new(&with_everything(), WeightType::F32, 7, 1.5);
        let exit = ExitPolicy::Confidence { signal: ExitSignal::Top1, threshold: 0.6 };
        let settings = Settings {
            kv_fill,
            max_batch: 3,
            token_budget: 23,
            prefill_chunk: 7,
            num_blocks: 4,
            ..Settings::new(batching, exit, 3)
        };
        let preemptions = assert_ahead_as_run_on(&setup, settings, 20);
        assert!(preemptions > 0, "{batching}, {kv_fill}");
    }
}

#[test]
fn looking_ahead_by_cuda_kernels_finds_what_a_token_would_predict_if_it_ran_on() {
    for kv_fill in KvFill::KEEPING {
        let Some(setup) = Setup::on(Device::Cuda, &with_everything(), 7, 0.8) else { return };
        let exit = ExitPolicy::Confidence { signal: ExitSignal::Top1, threshold: 0.6 };
        let settings = Settings {
            kv_fill,
            max_batch: 3,
            token_budget: 23,
            prefill_chunk: 7,
            num_blocks: 12,
            ..Settings::new(Batching::Depth, exit, 3)
        };
        assert_ahead_as_run_on(&setup, settings, 4);
    }
}

/// Checks that an executor that looks ahead serves the same tokens, and that all depths of each token are those of a
/// token that runs them all after the same exits. Returns the number of preemptions.
fn assert_ahead_as_run_on(setup: &Setup, settings: Settings, output_tokens: u32) -> u32 {
    let num_loops = usize::from(settings.num_loops);
    let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 3 + 9 * id, output_tokens };
    let requests: Vec<Request> = (0..3).map(request).collect();
    // As in recordings: what is looked ahead of reads every depth of prompts.
    let runs_all = (settings.kv_fill != KvFill::First).then_some(settings.num_loops - 1);
    let settings = Settings { prefill_depth: settings.prefill_depth.or(runs_all), ..settings };
    let (plain, _) = setup.run(settings, &requests, setup.executor(&settings).exiting_by(settings.exit));
    let (ahead, preemptions) = setup.run(settings, &requests, setup.executor(&settings).looking_ahead());
    for request in requests {
        let (plain, ahead) = (&plain[&request.id], &ahead[&request.id]);
        let what = format!("request {} under {} and {}", request.id, settings.exit, settings.kv_fill);
        assert_eq!((&plain.tokens, &plain.exit_depths), (&ahead.tokens, &ahead.exit_depths), "{what}");
        assert_eq!(ahead.recorded.len(), num_loops * output_tokens as usize, "{what}");
        for token in 0..output_tokens as usize {
            let exits = [&ahead.exit_depths[..token], &[settings.num_loops - 1]].concat();
            let up_to = Request { output_tokens: token as u32 + 1, ..request };
            let ran_on = setup.run_alone(up_to, settings.kv_fill, exits);
            let rows =
                |generation: &Generation| generation.recorded[token * num_loops..(token + 1) * num_loops].to_vec();
            let of_token = |generation| Generation { recorded: rows(generation), ..Generation::default() };
            assert_same(setup.device, &format!("{what}, token {token}"), &of_token(ahead), &of_token(&ran_on));
        }
    }
    preemptions
}

/// Batched requests on a device, in fewer and smaller mixes: emulation is slow.
fn batched_requests_on(device: Device, cases: u32) {
    let strategy = (configs_of_one_head_size(), 0_u64..1000, exits(), prop::sample::select(KvFill::KEEPING.to_vec()));
    let mut runner =
        TestRunner::new_with_rng(ProptestConfig::with_cases(cases), TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let case = Cell::new(0);
    let result = runner.run(&strategy, |(config, seed, exit, kv_fill)| {
        let exit = that_fits(exit, &config);
        case.set(case.get() + 1);
        let Some(setup) = Setup::on(device, &ModelConfig { gate: true, ..config.clone() }, seed, 0.8) else {
            return Ok(());
        };
        let request = |id| Request {
            id,
            arrival: Nanos(u64::from(id) * 300_000),
            prompt_tokens: 3 + 9 * id,
            output_tokens: 7 + id,
        };
        let requests: Vec<Request> = (0..3).map(request).collect();
        let settings = Settings {
            kv_fill,
            max_batch: 3,
            token_budget: 17,
            prefill_chunk: 13,
            num_blocks: 12,
            async_scheduling: exit.is_known_ahead(),
            exit_wait: if exit.is_known_ahead() { 0 } else { case.get() as u32 % 3 },
            ..Settings::new(Batching::ALL[case.get() % Batching::ALL.len()], exit, config.num_loops as u8)
        };
        assert_batched_as_alone(&setup, settings, &requests);
        Ok(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn batched_requests_by_cuda_kernels_generate_what_they_generate_alone() {
    batched_requests_on(Device::Cuda, 12);
}

/// The engine's executor, except that each pass is planned after the one before.
struct OneAfterTheOther(EngineExecutor);

impl Executor for OneAfterTheOther {
    type Error = EngineError;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), EngineError> {
        self.0.admit(slot, request, generated)
    }

    fn release(&mut self, slot: Slot) {
        self.0.release(slot);
    }

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, EngineError> {
        self.0.run(pass, signals)
    }

    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, EngineError> {
        self.0.emit(pass, exiting)
    }
}

/// The rows of all passes, and which of them exit.
#[derive(Default)]
struct Passes {
    passes: Vec<(Vec<Segment>, Vec<u32>)>,
    preemptions: u32,
}

impl Observer for Passes {
    fn preempted(&mut self, _: Nanos, _: &Request) {
        self.preemptions += 1;
    }

    fn pass(&mut self, record: &PassRecord<'_>) {
        self.passes.push((record.pass.segments.to_vec(), record.exiting.to_vec()));
    }
}

/// Passes of a run, the generations of its executor.
fn run_with_passes<E: Executor<Error = EngineError>>(
    settings: Settings,
    requests: &[Request],
    executor: E,
) -> (Passes, E) {
    let mut server = Server::new(settings, executor).unwrap();
    let mut passes = Passes::default();
    serve(&mut server, requests.iter().copied(), &mut VirtualClock::default(), &mut passes).unwrap();
    (passes, server.into_executor())
}

/// Runs requests that are all there at the start with each pass planned while the one before runs, and planned after it.
/// Checks that both run the same passes and generate the same. Returns the passes.
fn assert_planned_ahead_as_after(setup: &Setup, settings: Settings, requests: &[Request]) -> Passes {
    assert!(settings.async_scheduling && EngineExecutor::RUNS_BESIDE);
    let executor = |recording: bool| match recording {
        true => setup.executor(&settings).recording(),
        false => setup.executor(&settings).exiting_by(settings.exit),
    };
    let [passes, _] = [true, false].map(|recording| {
        let (ahead, by_ahead) = run_with_passes(settings, requests, executor(recording));
        let (after, by_after) = run_with_passes(settings, requests, OneAfterTheOther(executor(recording)));
        assert_eq!(ahead.passes, after.passes);
        let (by_ahead, by_after) = (by_ahead.into_generations(), by_after.0.into_generations());
        for request in requests {
            let what = format!("request {}, recording: {recording}", request.id);
            assert_eq!(by_ahead[&request.id].exit_depths, by_after[&request.id].exit_depths, "{what}");
            assert_same(setup.device, &what, &by_ahead[&request.id], &by_after[&request.id]);
        }
        ahead
    });
    passes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn delayed_exits_planned_ahead_are_those_planned_after_each_pass(
        seed in 0_u64..1000, requests in requests(),
        (signal, threshold) in prop_oneof![
            (Just(ExitSignal::Top1), 0.05_f32..0.9), (Just(ExitSignal::Gate), 0.2_f32..0.8), (Just(ExitSignal::Similarity), 0.5_f32..1.0),
        ],
        batching in prop::sample::select(Batching::ALL.to_vec()), kv_fill in prop::sample::select(KvFill::KEEPING.to_vec()),
        max_batch in 1_u32..6, spare_budget in 0_u32..70, prefill_chunk in 1_u32..70, num_blocks in 5_u32..16,
    ) {
        let config = ModelConfig { num_loops: 4, ..with_everything() };
        let setup = Setup::new(&config, WeightType::F32, seed, 0.8);
        let requests = Request::at_once(&requests);
        let settings = Settings {
            kv_fill, max_batch, prefill_chunk, num_blocks,
            token_budget: max_batch + spare_budget,
            async_scheduling: true,
            ..Settings::new(batching, ExitPolicy::Delayed { signal, threshold }, 4)
        };
        assert_planned_ahead_as_after(&setup, settings, &requests);
    }
}

/// Delayed exits in a tight cache: requests are preempted, and tokens exit at several depths, never at the first.
fn delayed_and_preempted_on(device: Device) {
    let config = ModelConfig { num_loops: 4, ..with_everything() };
    // Emulation is slow: a signal that needs no head has the exits' head run within the pass.
    let signals: &[ExitSignal] =
        if device == Device::Cpu { &[ExitSignal::Top1, ExitSignal::Gate] } else { &[ExitSignal::Gate] };
    for &signal in signals {
        let Some(setup) = Setup::on(device, &config, 5, 1.5) else { return };
        let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 10 + id, output_tokens: 40 };
        let requests: Vec<Request> = (0..5).map(request).collect();
        let settings = Settings {
            max_batch: 5,
            token_budget: 30,
            prefill_chunk: 7,
            num_blocks: 7,
            async_scheduling: true,
            ..Settings::new(Batching::Depth, ExitPolicy::Delayed { signal, threshold: 0.5 }, 4)
        };
        let Passes { passes, preemptions } = assert_planned_ahead_as_after(&setup, settings, &requests);
        assert!(preemptions > 3, "{signal}: {preemptions}");
        let depth = |segments: &[Segment], index: &u32| segments[*index as usize].depth;
        let depths: HashSet<u8> =
            passes.iter().flat_map(|(segments, exiting)| exiting.iter().map(|index| depth(segments, index))).collect();
        assert!(depths.len() > 1 && !depths.contains(&0), "{signal}: {depths:?}");
    }
}

#[test]
fn delayed_exits_of_preempted_requests_are_those_planned_after_each_pass() {
    delayed_and_preempted_on(Device::Cpu);
}

#[test]
fn delayed_exits_by_cuda_kernels_are_those_planned_after_each_pass() {
    delayed_and_preempted_on(Device::Cuda);
}

#[test]
fn preempted_requests_generate_what_they_generate_alone() {
    preempted_requests_on(Device::Cpu, 2, KvFill::KEEPING.map(|fill| (fill, None)));
}

#[test]
fn preempted_requests_by_cuda_kernels_generate_what_they_generate_alone() {
    preempted_requests_on(Device::Cuda, 1, KvFill::KEEPING.map(|fill| (fill, None)));
}

#[test]
fn preempted_requests_whose_prompts_run_some_depths_generate_what_they_generate_alone() {
    preempted_requests_on(Device::Cpu, 2, [0, 1, 2].map(|depth| (KvFill::Reuse, Some(depth))));
}

#[test]
fn preempted_requests_whose_prompts_run_some_depths_by_cuda_kernels_generate_what_they_generate_alone() {
    preempted_requests_on(Device::Cuda, 1, [(KvFill::Reuse, Some(1))]);
}

/// Models to test on a device; where passes are slow, only the one with every feature.
fn models(device: Device) -> Vec<ModelConfig> {
    match device {
        Device::Cuda => vec![with_everything()],
        _ => vec![grouped(), with_everything()],
    }
}

/// `served` are KV fills, each with the last depth of prompts.
fn preempted_requests_on<const N: usize>(device: Device, seeds: u64, served: [(KvFill, Option<u8>); N]) {
    for (config, (kv_fill, prefill_depth)) in
        models(device).iter().flat_map(|config| served.map(|served| (config, served)))
    {
        for seed in 0..seeds {
            let Some(setup) = Setup::on(device, config, seed, 1.5) else { return };
            let setup = Setup { prefill_depth, ..setup };
            let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 10 + id, output_tokens: 40 };
            let requests: Vec<Request> = (0..5).map(request).collect();
            let settings = Settings {
                kv_fill,
                prefill_depth,
                max_batch: 5,
                token_budget: 30,
                prefill_chunk: 7,
                num_blocks: 7,
                ..Settings::new(Batching::Depth, ExitPolicy::Confidence { signal: ExitSignal::Top1, threshold: 0.6 }, 3)
            };
            let (generations, preemptions) = setup.run(settings, &requests, setup.executor(&settings).recording());
            assert!(preemptions > 3, "{kv_fill}: {preemptions}");
            let exits: Vec<u8> = generations.values().flat_map(|generation| generation.exit_depths.clone()).collect();
            assert!((0..3).all(|depth| exits.contains(&depth)), "{kv_fill}: tokens exit at every depth: {exits:?}");
            assert_all_as_alone(&setup, kv_fill, &requests, &generations);
        }
    }
}

#[test]
fn exits_that_wait_behind_a_coda_generate_what_they_generate_alone() {
    exits_that_wait_on(Device::Cpu);
}

#[test]
fn exits_that_wait_behind_a_coda_of_cuda_kernels_generate_what_they_generate_alone() {
    exits_that_wait_on(Device::Cuda);
}

fn exits_that_wait_on(device: Device) {
    let plain = ModelConfig { coda_layers: 1, gate: true, ..grouped() };
    for (seed, config) in (0..).zip([with_everything(), plain]) {
        let Some(setup) = Setup::on(device, &config, seed, 0.8) else { return };
        let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 5 + id, output_tokens: 12 };
        let requests: Vec<Request> = (0..6).map(request).collect();
        for (batching, exit_batch) in [(Batching::Depth, 0), (Batching::Depth, 3), (Batching::Sequence, 0)] {
            let settings = Settings {
                max_batch: 5,
                token_budget: 30,
                prefill_chunk: 7,
                num_blocks: 40,
                exit_wait: 3,
                exit_batch,
                ..Settings::new(batching, "gate:0.5".parse().unwrap(), 3)
            };
            assert_batched_as_alone(&setup, settings, &requests);
            let mut late = Late::default();
            let executor = setup.executor(&settings).exiting_by(settings.exit);
            let mut server = Server::new(settings, executor).unwrap();
            serve(&mut server, requests.iter().copied(), &mut VirtualClock::default(), &mut late).unwrap();
            assert!(late.0.len() > 1, "{batching}: rows wait at several depths: {:?}", late.0);
        }
    }
}

/// The depths of rows whose head ran after a later pass.
#[derive(Default)]
struct Late(HashSet<u8>);

impl Observer for Late {
    fn pass(&mut self, record: &PassRecord<'_>) {
        self.0.extend(record.pass.late.iter().map(|segment| segment.depth));
    }
}

/// The blocks of each slot, for sequences that share none.
#[derive(Default)]
struct Blocks(HashMap<u32, Vec<u32>>);

impl Observer for Blocks {
    fn pass(&mut self, record: &PassRecord<'_>) {
        for segment in record.pass.segments {
            self.0.insert(segment.slot, record.pass.blocks(segment.slot).to_vec());
        }
    }
}

/// Serves requests whose tokens exit at any depth, except for the last token, which runs every depth, so that all
/// earlier ones are complete.
fn run_with_exits(setup: &Setup, kv_fill: KvFill, batching: Batching) -> Vec<(Vec<u32>, Vec<f32>)> {
    run_with_cache(setup, kv_fill, batching, ExitPolicy::Oracle { charged: false, recorded: true })
}

/// Serves requests; returns for each the tokens of which keys and values are kept, and those.
fn run_with_cache(
    setup: &Setup,
    kv_fill: KvFill,
    batching: Batching,
    exit_policy: ExitPolicy,
) -> Vec<(Vec<u32>, Vec<f32>)> {
    let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 5 + 7 * id, output_tokens: 30 };
    let requests: Vec<Request> = (0..4).map(request).collect();
    let exit =
        |request: u32, token: u64| if token == 29 { 2 } else { (mix(token << 8 | u64::from(request)) % 3) as u8 };
    let exits = requests.iter().map(|request| (request.id, (0..30).map(|token| exit(request.id, token)).collect()));
    let settings = Settings {
        kv_fill,
        max_batch: 4,
        token_budget: 9,
        prefill_chunk: 4,
        num_blocks: 20,
        ..Settings::new(batching, exit_policy, 3)
    };
    let executor = setup.executor(&settings).with_oracle(Arc::new(exits.collect())).exiting_by(exit_policy);
    let mut server = Server::new(settings, executor).unwrap();
    let mut blocks = Blocks::default();
    serve(&mut server, requests.iter().copied(), &mut VirtualClock::default(), &mut blocks).unwrap();
    let executor = server.executor();
    let of_request = |request: &Request| {
        let Generation { prompt, tokens, .. } = &executor.generations()[&request.id];
        let context = [&prompt[..], &tokens[..tokens.len() - 1]].concat();
        let entries = executor.cached(&blocks.0[&request.id], context.len()).unwrap();
        (context, entries)
    };
    requests.iter().map(of_request).collect()
}

#[test]
fn backfill_writes_the_very_cache_of_full_depth() {
    backfill_on(Device::Cpu);
}

#[test]
fn backfill_by_cuda_kernels_writes_the_cache_of_full_depth() {
    backfill_on(Device::Cuda);
}

fn backfill_on(device: Device) {
    for (config, batching) in models(device).iter().flat_map(|config| Batching::ALL.map(|batching| (config, batching)))
    {
        let Some(setup) = Setup::on(device, config, 3, 1.0) else { return };
        for (context, found) in run_with_exits(&setup, KvFill::Backfill, batching) {
            assert_cache_of_full_depth(&setup, batching, context, &found);
        }
        let reused = run_with_exits(&setup, KvFill::Reuse, batching);
        let backfilled = run_with_exits(&setup, KvFill::Backfill, batching);
        assert!(reused[0].1 != backfilled[0].1, "early exits change the context under other fills");
    }
}

/// Checks that keys and values are those of tokens that run every depth.
fn assert_cache_of_full_depth(setup: &Setup, batching: Batching, context: Vec<u32>, found: &[f32]) {
    // As the prompt of a request, these tokens run every depth.
    let tokens = context.len() as u32;
    let prompts = Arc::new(Prompts::Given(HashMap::from([(0, context)])));
    let setup = Setup { model: setup.model.clone(), on_cpu: setup.on_cpu.clone(), prompts, ..*setup };
    let settings = Settings {
        kv_fill: KvFill::Backfill,
        max_batch: 1,
        token_budget: 1000,
        prefill_chunk: 1000,
        block_tokens: 128,
        num_blocks: 1,
        ..Settings::new(Batching::Sequence, ExitPolicy::None, 3)
    };
    let request = Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: tokens, output_tokens: 1 };
    let mut server = Server::new(settings, setup.executor(&settings)).unwrap();
    serve(&mut server, [request], &mut VirtualClock::default(), &mut ()).unwrap();
    let expected = server.executor().cached(&[0], tokens as usize).unwrap();
    assert_eq!(found.len(), expected.len());
    let what = format!("{batching}: keys and values of {tokens} tokens");
    found.iter().zip(expected).for_each(|(&found, expected)| setup.device.assert_close(&what, found, expected));
}

/// Policies whose early exits are drafts, in a model with at least two loops.
const SPECULATING: [&str; 8] = [
    "speculate:static:0:1",
    "speculate:static:0:5",
    "speculate:static:1:2",
    "speculate:margin:0.1:3",
    "speculate:top1:0.2:1",
    "speculate:gate:0.4:4",
    "speculate:similarity:0.7:3",
    "speculate:kl:0.5:4..1:1..4",
];

/// Counts what full depth says of drafts.
#[derive(Default)]
struct Drafts(Verified);

impl Observer for Drafts {
    fn verified(&mut self, _: Nanos, _: &Request, verified: Verified) {
        self.0.accepted += verified.accepted;
        self.0.rejected += verified.rejected;
    }
}

/// Checks that requests get the text of full depth, however their tokens are chosen. Returns what became of the drafts.
fn assert_text_of_full_depth(
    setup: &Setup,
    settings: Settings,
    requests: &[Request],
    decodings: &[Decoding],
) -> Verified {
    let run = |settings: Settings| {
        let mut executor = setup.executor(&settings).exiting_by(settings.exit);
        for (request, decoding) in requests.iter().zip(decodings) {
            let prompt = setup.prompts.get(request).unwrap();
            executor.ask(request.id, Asked { prompt, decoding: decoding.clone() });
        }
        let mut server = Server::new(settings, executor).unwrap();
        let mut drafts = Drafts::default();
        serve(&mut server, requests.iter().copied(), &mut VirtualClock::default(), &mut drafts).unwrap();
        (server.into_executor().into_generations(), drafts.0)
    };
    let (found, drafts) = run(settings);
    let (expected, _) = run(Settings { exit: ExitPolicy::None, ..settings });
    for request in requests {
        let (found, expected) = (&found[&request.id], &expected[&request.id]);
        let what = format!("request {} under {}, {}", request.id, settings.exit, settings.kv_fill);
        assert_eq!(found.tokens, expected.tokens, "{what} on {:?}", setup.device);
        assert_eq!(found.exit_depths.len(), found.tokens.len(), "{what}");
        if setup.device == Device::Cpu {
            assert_eq!(found.chosen, expected.chosen, "{what}");
        }
    }
    drafts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn drafts_leave_the_text_of_full_depth(
        config in configs(), seed in 0_u64..1000, requests in requests(),
        exit in prop::sample::select(SPECULATING.to_vec()), kv_fill in prop::sample::select(vec![KvFill::Backfill, KvFill::First]),
        batching in prop::sample::select(Batching::ALL.to_vec()), weight_type in prop::sample::select(WeightType::ON_CPU.to_vec()),
        max_batch in 1_u32..6, spare_budget in 0_u32..70, prefill_chunk in 1_u32..70, num_blocks in 5_u32..16,
        temperature in prop_oneof![Just(0.0_f32), Just(0.8)], own in any::<bool>(), exit_wait in 0_u32..4,
    ) {
        let config = ModelConfig { gate: true, num_loops: config.num_loops.max(2), ..config };
        let setup = Setup::new(&config, weight_type, seed, temperature);
        let settings = Settings {
            kv_fill, max_batch, prefill_chunk, num_blocks,
            token_budget: max_batch + spare_budget,
            // Tokens cannot be chosen from logits where exits wait.
            exit_wait: if own { 0 } else { exit_wait },
            ..Settings::new(batching, exit.parse().unwrap(), config.num_loops as u8)
        };
        let own_rules = [
            Decoding { temperature: 1.2, seed: 3, alternatives: Some(2), ..Decoding::default() },
            Decoding { temperature: 0.7, top_p: 0.9, seed: 4, ..Decoding::default() },
            Decoding { min_tokens: 6, withheld: [1, 2, 3].into(), ..Decoding::default() },
        ];
        let decodings: Vec<Decoding> = own_rules.into_iter().cycle().take(if own { requests.len() } else { 0 }).collect();
        assert_text_of_full_depth(&setup, settings, &requests, &decodings);
    }
}

#[test]
fn verified_drafts_leave_the_very_cache_of_full_depth() {
    speculation_on(Device::Cpu);
}

#[test]
fn drafts_verified_by_cuda_kernels_leave_text_and_cache_of_full_depth() {
    speculation_on(Device::Cuda);
}

fn speculation_on(device: Device) {
    let policies = ["speculate:static:0:3", "speculate:margin:0.05:4"];
    for (config, (batching, exit)) in models(device)
        .iter()
        .flat_map(|config| Batching::ALL.into_iter().zip(policies.into_iter().cycle()).map(move |by| (config, by)))
    {
        let Some(setup) = Setup::on(device, config, 3, 1.0) else { return };
        let exit: ExitPolicy = exit.parse().unwrap();
        for (context, found) in run_with_cache(&setup, KvFill::Backfill, batching, exit) {
            assert_cache_of_full_depth(&setup, batching, context, &found);
        }
        let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 5 + 3 * id, output_tokens: 14 };
        let requests: Vec<Request> = (0..4).map(request).collect();
        // Few blocks, so that sequences with drafts are preempted.
        let settings = Settings {
            kv_fill: KvFill::Backfill,
            max_batch: 3,
            token_budget: 25,
            num_blocks: 4,
            ..Settings::new(batching, exit, 3)
        };
        let Verified { accepted, rejected, .. } = assert_text_of_full_depth(&setup, settings, &requests, &[]);
        assert!(accepted > 0 && rejected > 0, "{exit}: {accepted} drafts are right, {rejected} are wrong");
    }
}

/// The expected recording of a request with given exit depths: token by token on a separate machine, with the keys and
/// values that the KV fill is defined to keep.
fn recorded_by_hand(
    model: &Model,
    sampling: Sampling,
    kv_fill: KvFill,
    generation: &Generation,
) -> Vec<(u32, Vec<Verdict>)> {
    let config = model.config();
    let cache = KvCache::new(config, kv_fill, 1, 128, &candle_core::Device::Cpu).unwrap();
    let Generation { prompt, tokens, exit_depths, .. } = generation;
    let mut skipped = vec![Vec::<u32>::new(); config.num_loops];
    let mut recorded = Vec::new();
    for (index, &left) in exit_depths.iter().enumerate() {
        let positions = if index == 0 { 0..prompt.len() } else { prompt.len() + index - 1..prompt.len() + index };
        let inputs = if index == 0 { &prompt[..] } else { &tokens[index - 1..index] };
        let mut sources: Vec<Source> = inputs.iter().map(|&token| Source::First(token)).collect();
        let mut in_flight = InFlight::new(config).unwrap();
        let (left, is_prompt) = (usize::from(left), index == 0);
        let rows = |depth: usize, fills: Range<usize>| {
            let mut rows = Rows::default();
            for position in positions.clone() {
                let of_fill = if kv_fill == KvFill::Skip { &skipped[depth][..] } else { &[] };
                rows.push(Row { fills: fills.clone(), skipped: of_fill, ..Row::new(position, depth, &[0]) });
            }
            rows
        };
        let mut verdicts = Vec::new();
        let first_only = |depth: usize| kv_fill == KvFill::First && depth > 0;
        let deepest = if is_prompt || kv_fill == KvFill::Backfill { config.num_loops - 1 } else { left };
        for depth in 0..=deepest {
            let fills = match kv_fill {
                _ if first_only(depth) => depth..depth,
                KvFill::Reuse if depth == left && !is_prompt => depth..config.num_loops,
                KvFill::Cycle(slots) if depth == left && !is_prompt => depth..usize::from(slots).max(depth + 1),
                _ => depth..depth + 1,
            };
            let rows = rows(depth, fills);
            let entering = model.embed(&in_flight, &sources, &rows, &cache).unwrap();
            model.forward_block(&entering.hidden, &rows, &cache).unwrap();
            let exits = model.forward_coda(&entering.hidden, &rows, &cache).unwrap();
            let last = rows.len() - 1;
            let (exit, row) = (exits.narrow(0, last, 1).unwrap(), rows.part(last..last + 1));
            if depth <= left {
                let keys = [sampling.key(0, index)];
                verdicts.extend(model.verdicts(&exit, &row, &cache, sampling.temperature, &keys).unwrap());
            }
            in_flight = entering.into();
            sources = (0..inputs.len() as u32).map(Source::Second).collect();
        }
        if !is_prompt {
            skipped[left + 1..].iter_mut().for_each(|skipped| skipped.push(positions.start as u32));
        }
        recorded.push((verdicts[left].token, verdicts));
    }
    recorded
}

#[test]
fn each_kv_fill_keeps_the_entries_that_it_is_defined_to_keep() {
    each_kv_fill_on(Device::Cpu);
}

#[test]
fn each_kv_fill_by_cuda_kernels_keeps_the_entries_that_it_is_defined_to_keep() {
    each_kv_fill_on(Device::Cuda);
}

fn each_kv_fill_on(device: Device) {
    let exits: Vec<u8> = (0..25).map(|token| (mix(token) % 3) as u8).collect();
    let fills = KvFill::KEEPING.into_iter().chain(OVERWRITING);
    let cases: Vec<_> = fills.flat_map(|fill| models(device).into_iter().map(move |config| (config, fill))).collect();
    for (config, kv_fill) in &cases {
        let kv_fill = *kv_fill;
        let Some(setup) = Setup::on(device, config, 4, 1.0) else { return };
        let request = Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: 20, output_tokens: 25 };
        let found = setup.run_alone_on(setup.model.clone(), request, kv_fill, exits.clone());
        let expected = recorded_by_hand(&setup.on_cpu, setup.sampling, kv_fill, &found);
        for (index, (token, verdicts)) in expected.into_iter().enumerate() {
            assert_eq!(found.tokens[index], token, "{kv_fill}: token {index}");
            for (depth, verdict) in verdicts.iter().enumerate() {
                let (signals, token) = found.recorded[index * config.num_loops + depth];
                let what = format!("{kv_fill}: {index} at {depth}");
                assert_eq!(token, verdict.token, "{what}");
                for signal in [ExitSignal::Top1, ExitSignal::Margin, ExitSignal::Entropy] {
                    device.assert_close(&what, signals.get(signal), verdict.signals().get(signal));
                }
            }
        }
    }
}
