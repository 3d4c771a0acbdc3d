//! A request generates, to the bit, what it generates alone with the same exits: whatever the batching, the other
//! requests, the chunks of its prompt, and however often it is preempted.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{configs, grouped, weights, with_everything};
use engine::config::ModelConfig;
use engine::executor::{EngineExecutor, Generation, Sampling};
use engine::kernels::linear::WeightType;
use engine::model::Model;
use engine::prompts::Prompts;
use proptest::prelude::*;
use scheduler::{Batching, ExitPolicy, KvFill, Observer, Server, Settings, VirtualClock, serve};
use traces::{Measure, Nanos, Request};

#[derive(Default)]
struct Preemptions(u32);

impl Observer for Preemptions {
    fn preempted(&mut self, _: Nanos, _: &Request) {
        self.0 += 1;
    }
}

struct Setup {
    model: Arc<Model>,
    prompts: Arc<Prompts>,
    sampling: Sampling,
}

impl Setup {
    fn new(config: &ModelConfig, weight_type: WeightType, seed: u64, temperature: f32) -> Self {
        let text = (0..200_u64).map(|i| (i * i * 31 + i * 7 + seed) as u32 % config.vocab_size as u32).collect();
        Self {
            model: Arc::new(Model::load(&weights(config, seed), weight_type).unwrap()),
            prompts: Arc::new(Prompts::Text(text)),
            sampling: Sampling { temperature, seed },
        }
    }

    fn executor(&self, settings: &Settings) -> EngineExecutor {
        let (blocks, block_tokens) = (settings.num_blocks, settings.block_tokens);
        EngineExecutor::new(self.model.clone(), self.prompts.clone(), self.sampling, blocks, block_tokens).unwrap()
    }

    /// Serves requests and returns what each generated, and how often one was preempted.
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

    /// Serves one request on a machine of its own that lets its tokens leave at given depths, with signals.
    fn run_alone(&self, request: Request, exits: Vec<u8>) -> Generation {
        let exits = Arc::new(HashMap::from([(request.id, exits)]));
        let settings = Settings {
            batching: Batching::Sequence,
            exit: ExitPolicy::Oracle { charged: false },
            kv_fill: KvFill::Reuse,
            num_loops: self.model.config().num_loops as u8,
            max_batch: 1,
            token_budget: 1000,
            prefill_chunk: 1000,
            block_tokens: 128,
            num_blocks: 1,
            prefix_caching: false,
            async_scheduling: false,
        };
        let executor = self.executor(&settings).recording().with_oracle(exits);
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
    let confidence = |measure, threshold| ExitPolicy::Confidence { measure, threshold };
    prop_oneof![
        Just(ExitPolicy::None),
        Just(ExitPolicy::Static(0)),
        (0.05_f32..0.9).prop_map(move |threshold| confidence(Measure::Top1, threshold)),
        (0.05_f32..0.5).prop_map(move |threshold| confidence(Measure::Margin, threshold)),
        (0.5_f32..3.5).prop_map(move |threshold| confidence(Measure::Entropy, threshold)),
        (0.5_f32..0.999).prop_map(move |threshold| confidence(Measure::Similarity, threshold)),
        (0.2_f32..0.8).prop_map(move |threshold| confidence(Measure::Gate, threshold)),
    ]
}

fn assert_all_as_alone(setup: &Setup, requests: &[Request], generations: &HashMap<u32, Generation>) {
    for request in requests {
        let found = &generations[&request.id];
        assert_eq!(found.tokens.len(), request.output_tokens as usize);
        let alone = setup.run_alone(*request, found.exit_depths.clone());
        assert_eq!(found, &alone, "request {}", request.id);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn batched_requests_generate_what_they_generate_alone(
        config in configs(), seed in 0_u64..1000, requests in requests(), exit in exits(),
        batching in prop::sample::select(Batching::ALL.to_vec()),
        max_batch in 1_u32..6, spare_budget in 0_u32..70, prefill_chunk in 1_u32..70, num_blocks in 5_u32..16,
        temperature in prop_oneof![Just(0.0_f32), Just(0.8)], weight_type in prop::sample::select(WeightType::ALL.to_vec()),
    ) {
        let reads_gates = matches!(exit, ExitPolicy::Confidence { measure: Measure::Gate, .. });
        let config = ModelConfig { gate: config.gate || reads_gates, ..config };
        let setup = Setup::new(&config, weight_type, seed, temperature);
        let settings = Settings {
            batching, exit, kv_fill: KvFill::Reuse, max_batch, prefill_chunk, num_blocks, prefix_caching: false, async_scheduling: false,
            num_loops: config.num_loops as u8,
            token_budget: max_batch + spare_budget,
            block_tokens: 16,
        };
        let (generations, _) = setup.run(settings, &requests, setup.executor(&settings).recording());
        assert_all_as_alone(&setup, &requests, &generations);
        // What is not recorded need not be computed, and changes no token.
        let (unrecorded, _) = setup.run(settings, &requests, setup.executor(&settings).leaving_by(exit));
        for (request, Generation { tokens, exit_depths, .. }) in &unrecorded {
            let recorded = &generations[request];
            assert_eq!((tokens, exit_depths), (&recorded.tokens, &recorded.exit_depths), "request {request}");
        }
    }
}

#[test]
fn preempted_requests_generate_what_they_generate_alone() {
    for (config, seed) in
        [grouped(), with_everything()].iter().flat_map(|config| (0..4).map(move |seed| (config, seed)))
    {
        let setup = Setup::new(config, WeightType::F32, seed, 1.5);
        let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 10 + id, output_tokens: 40 };
        let requests: Vec<Request> = (0..5).map(request).collect();
        let settings = Settings {
            batching: Batching::Depth,
            exit: ExitPolicy::Confidence { measure: Measure::Top1, threshold: 0.6 },
            kv_fill: KvFill::Reuse,
            num_loops: 3,
            max_batch: 5,
            token_budget: 30,
            prefill_chunk: 7,
            block_tokens: 16,
            num_blocks: 7,
            prefix_caching: false,
            async_scheduling: false,
        };
        let (generations, preemptions) = setup.run(settings, &requests, setup.executor(&settings).recording());
        assert!(preemptions > 3, "{preemptions}");
        let exits: Vec<u8> = generations.values().flat_map(|generation| generation.exit_depths.clone()).collect();
        assert!((0..3).all(|depth| exits.contains(&depth)), "tokens leave at every depth: {exits:?}");
        assert_all_as_alone(&setup, &requests, &generations);
    }
}
