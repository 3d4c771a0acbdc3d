//! Invariants of every simulation.

mod common;

use std::sync::Arc;

use common::{Log, constant_latency, drawn_exits, exit_trace, poisson, queued, settings, varied_latency};
use latency::LatencyModel;
use proptest::prelude::*;
use scheduler::{Batching, ExitPolicy, KvFill, Server, Settings, Unordered, VirtualClock, serve};
use simulator::{Draw, ExitModel, Metrics, ProfileExecutor, Routing, Simulation, SimulationError, Source, run_all};
use traces::{Nanos, PrefixHashes, Request, SignalSet, Signals};

const LOOPS: u8 = 3;

fn any_settings() -> impl Strategy<Value = Settings> {
    let exit = prop::sample::select(vec![
        "none",
        "static:1",
        "oracle",
        "oracle:charged",
        "confidence:0.5",
        "load-adaptive:top1:0.5..0.2:2..9",
        "delayed:top1:0.5",
        "difference:0.5",
        "delayed:difference:0.5",
    ]);
    let fill = prop::sample::select(KvFill::KEEPING.to_vec());
    let sizes = (1u32..6, 1u32..20, 10u32..40);
    (prop::sample::select(Batching::ALL.to_vec()), exit, fill, sizes, any::<bool>(), any::<bool>()).prop_map(
        |(batching, exit, kv_fill, (max_batch, prefill_chunk, num_blocks), prefix_caching, async_scheduling)| {
            Settings {
                kv_fill,
                prefill_chunk,
                token_budget: 24,
                block_tokens: 4,
                num_blocks,
                prefix_caching,
                async_scheduling: async_scheduling && exit.parse::<ExitPolicy>().unwrap().is_known_ahead(),
                ..settings(batching, exit, LOOPS, max_batch)
            }
        },
    )
}

/// Requests of up to 40 tokens, which fit in 10 blocks of 4, each with its generation.
fn any_requests() -> impl Strategy<Value = Vec<(Request, Vec<u8>)>> {
    let request = (0u64..3_000_000, 1u32..20, prop::collection::vec(0..LOOPS, 1..20));
    prop::collection::vec(request, 1..30).prop_map(|requests| {
        let mut now = Nanos::ZERO;
        let ids = 0u32..;
        let place = |(id, (gap, prompt_tokens, exits)): (u32, (u64, u32, Vec<u8>))| {
            now += Nanos(gap);
            (Request { id, arrival: now, prompt_tokens, output_tokens: exits.len() as u32 }, exits)
        };
        ids.zip(requests).map(place).collect()
    })
}

fn recorded(requests: &[(Request, Vec<u8>)]) -> ExitModel {
    let generations: Vec<Vec<u8>> = requests.iter().map(|(_, exits)| exits.clone()).collect();
    ExitModel::new(&exit_trace(LOOPS, &generations), Draw::Recorded).unwrap()
}

/// Under a policy that compares a token's depths, the depth at which it exits, from its entropies, differences of states
/// and predictions by depth.
fn compared_depth(exit: &str, rows: &[(Signals, u32)]) -> usize {
    let last = rows.len() - 1;
    let change = |depth: usize| (rows[depth].0.entropy - rows[depth - 1].0.entropy).abs();
    let is_stable = |depth: usize, depths: usize| {
        depth + 1 >= depths && rows[depth + 1 - depths..=depth].iter().all(|row| row.1 == rows[depth].1)
    };
    let first = |exits: &dyn Fn(usize) -> bool| (0..last).find(|&depth| exits(depth)).unwrap_or(last);
    match exit {
        "entropy-change:0.25" => first(&|depth| depth > 0 && change(depth) <= 0.25),
        "stable:2" => first(&|depth| is_stable(depth, 2)),
        "stable:3" => first(&|depth| is_stable(depth, 3)),
        "difference:0.25" => first(&|depth| rows[depth].0.difference <= 0.25),
        "delayed:difference:0.25" => first(&|depth| depth > 0 && rows[depth - 1].0.difference <= 0.25),
        _ => unreachable!("{exit}"),
    }
}

/// Tokens of five loops with few values, so that neighbours are often alike.
fn compared_tokens() -> impl Strategy<Value = Vec<(Signals, u32)>> {
    let row = (0..4_u8, 0..3_u32, 0..4_u8).prop_map(|(entropy, prediction, difference)| {
        let [entropy, difference] = [entropy, difference].map(|quarters| f32::from(quarters) / 4.0 + 0.125);
        (Signals { entropy, difference, ..Signals::default() }, prediction)
    });
    prop::collection::vec(prop::collection::vec(row, 5), 1..20).prop_map(|tokens| {
        let mut rows = tokens.concat();
        rows.iter_mut().step_by(5).for_each(|row| row.0.difference = 1.0);
        rows
    })
}

proptest! {
    #[test]
    fn policies_that_compare_depths_exit_where_the_recorded_depths_say(
        requests in prop::collection::vec(compared_tokens(), 1..10),
        exit in prop::sample::select(vec![
            "entropy-change:0.25", "stable:2", "stable:3", "difference:0.25", "delayed:difference:0.25",
        ]),
        batching in prop::sample::select(Batching::ALL.to_vec()),
    ) {
        let mut trace = exit_trace(5, &[]);
        requests.iter().for_each(|rows| trace.push_generation(rows));
        let (latency, exits) = (varied_latency(5), ExitModel::new(&trace, Draw::Recorded).unwrap());
        // Few blocks, so that sequences are preempted in the middle of a token.
        let settings = Settings { block_tokens: 4, num_blocks: 12, ..settings(batching, exit, 5, 4) };
        let arrivals = (0..).zip(&requests).map(|(id, rows)| {
            let output_tokens = rows.len() as u32 / 5;
            Request { id, arrival: Nanos::ZERO, prompt_tokens: 3 * (id + 1), output_tokens }
        });
        let mut metrics = [Metrics::new(&settings).with_requests()];
        Simulation::new(settings, &latency, &exits).unwrap().run(arrivals, &mut metrics).unwrap();
        for (row, rows) in metrics[0].requests().zip(&requests) {
            let passes = rows.chunks(5).map(|token| compared_depth(exit, token) as u64 + 1);
            prop_assert_eq!(row.passes, passes.sum::<u64>(), "{}, request {}", exit, row.id);
        }
    }

    #[test]
    fn depth_and_agreement_are_those_of_the_exit_trace(settings in any_settings(), requests in any_requests()) {
        let (latency, exits) = (varied_latency(LOOPS.into()), recorded(&requests));
        let mut metrics = [Metrics::new(&settings).with_requests()];
        let simulation = Simulation::new(settings, &latency, &exits).unwrap();
        let outcome = simulation.run(requests.iter().map(|(request, _)| *request), &mut metrics).unwrap();
        let exit_of = |sure: u8| match settings.exit.kind() {
            "none" => LOOPS - 1,
            "static" => 1,
            "delayed" => (sure + 1).min(LOOPS - 1),
            _ => sure,
        };
        let tokens = || requests.iter().flat_map(|(_, exits)| exits.iter().copied());
        let passes: u64 = tokens().map(|sure| u64::from(exit_of(sure)) + 1).sum();
        let agreeing = tokens().filter(|&sure| exit_of(sure) >= sure).count() as u64;
        let summary = metrics[0].summary(Source::Simulated, Some(outcome.token_agreement()));
        prop_assert_eq!(outcome.tokens, tokens().count() as u64);
        prop_assert_eq!(summary.output_tokens, outcome.tokens);
        prop_assert_eq!(outcome.agreeing_tokens, agreeing);
        prop_assert_eq!(summary.mean_depth, passes as f64 / outcome.tokens as f64);
        prop_assert_eq!(summary.requests, requests.len() as u64);
        for (row, (request, exits)) in metrics[0].requests().zip(&requests) {
            prop_assert_eq!(row.id, request.id);
            prop_assert_eq!(row.passes, exits.iter().map(|&sure| u64::from(exit_of(sure)) + 1).sum::<u64>());
            prop_assert!(row.arrival_s <= row.admitted_s && row.admitted_s < row.first_token_s);
            prop_assert!(row.first_token_s <= row.finished_s);
        }
    }

    #[test]
    fn one_machine_is_the_serving_loop_on_a_virtual_clock(settings in any_settings(), requests in any_requests()) {
        let (latency, exits) = (varied_latency(LOOPS.into()), recorded(&requests));
        let requests = requests.iter().map(|(request, _)| *request);
        let mut simulated = [Log::default()];
        Simulation::new(settings, &latency, &exits).unwrap().run(requests.clone(), &mut simulated).unwrap();
        let mut served = Log::default();
        let mut server = Server::new(settings, ProfileExecutor::new(&latency, &exits, &settings)).unwrap();
        serve(&mut server, requests, &mut VirtualClock::default(), &mut served).unwrap();
        prop_assert_eq!(&simulated[0], &served);
    }

    #[test]
    fn machines_in_turn_do_not_feel_each_other(settings in any_settings(), requests in any_requests()) {
        let (latency, exits) = (varied_latency(LOOPS.into()), recorded(&requests));
        let simulation = Simulation::new(settings, &latency, &exits).unwrap();
        let requests: Vec<Request> = requests.iter().map(|(request, _)| *request).collect();
        let mut together = vec![Log::default(); 3];
        simulation.run(requests.iter().copied(), &mut together).unwrap();
        for (turn, together) in together.iter().enumerate() {
            let mut alone = [Log::default()];
            simulation.run(requests.iter().copied().skip(turn).step_by(3), &mut alone).unwrap();
            prop_assert_eq!(together, &alone[0]);
        }
    }

    #[test]
    fn every_routing_serves_every_request_once(
        settings in any_settings(),
        requests in any_requests(),
        routing in prop::sample::select(vec!["round-robin", "random:3", "least-loaded", "two-choices:3", "prefix:2"]),
        machines in 1usize..5,
    ) {
        let (latency, exits) = (varied_latency(LOOPS.into()), recorded(&requests));
        let simulation =
            Simulation::new(settings, &latency, &exits).unwrap().with_routing(routing.parse().unwrap());
        let mut metrics = vec![Metrics::new(&settings).with_requests().with_passes(); machines];
        let outcome = simulation.run(requests.iter().map(|(request, _)| *request), &mut metrics).unwrap();
        let merged = Metrics::merged(metrics).unwrap();
        let ids: Vec<u32> = merged.requests().map(|row| row.id).collect();
        prop_assert_eq!(ids, (0..requests.len() as u32).collect::<Vec<_>>());
        let summary = merged.summary(Source::Simulated, None);
        prop_assert_eq!(summary.output_tokens, outcome.tokens);
        prop_assert_eq!(summary.replicas as usize, machines);
        prop_assert_eq!(summary.passes as usize, merged.passes().len());
        let rows: u64 = merged.passes().iter().map(|pass| u64::from(pass.decode_rows + pass.prefill_rows + pass.backfill_rows)).sum();
        prop_assert_eq!(rows, merged.row_visits());
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let exits = drawn_exits(&[0.6, 0.3, 0.1], 40, 30, 9);
    let latency = varied_latency(3);
    let requests: Vec<Request> = poisson(500, 300.0, 30, 20, 11).collect();
    let simulations: Vec<Simulation<'_>> = Batching::ALL
        .into_iter()
        .flat_map(|batching| ["none", "oracle", "confidence:0.5"].map(|exit| settings(batching, exit, 3, 8)))
        .map(|settings| Simulation::new(settings, &latency, &exits).unwrap())
        .collect();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let runs = pool.install(|| {
            run_all(&simulations, &requests, |simulation| {
                vec![Metrics::new(simulation.settings()).with_requests().with_passes(); 2]
            })
        });
        format!("{:?}", runs.unwrap())
    };
    let once = run(1);
    assert_eq!(once, run(1));
    assert_eq!(once, run(2));
}

#[test]
fn seeds_change_the_draw_and_order_does_not() {
    let trace = exit_trace(3, &(0..50).map(|index| vec![index % 3; 5]).collect::<Vec<_>>());
    let latency = constant_latency(3);
    let passes = |seed, batching| {
        let exits = ExitModel::new(&trace, Draw::Seeded(seed)).unwrap();
        let settings = settings(batching, "oracle", 3, 4);
        let mut metrics = [Metrics::new(&settings).with_requests()];
        Simulation::new(settings, &latency, &exits).unwrap().run(queued(60, 2, 12), &mut metrics).unwrap();
        metrics[0].requests().map(|row| row.passes).collect::<Vec<_>>()
    };
    assert_eq!(passes(1, Batching::Depth), passes(1, Batching::Vanilla));
    assert_ne!(passes(1, Batching::Depth), passes(2, Batching::Depth));
}

#[test]
fn a_prompt_that_begins_like_one_before_it_is_not_computed_again() {
    let (latency, exits) = (varied_latency(3), drawn_exits(&[1.0, 0.0, 0.0], 1, 1, 1));
    let settings = Settings { prefix_caching: true, ..settings(Batching::Sequence, "none", 3, 4) };
    let mut prefixes = PrefixHashes::new(settings.block_tokens);
    for last in 0..20 {
        prefixes.push([1, 2, 3, 100 + last]);
    }
    let prefixes = Arc::new(prefixes);
    let simulation = Simulation::new(settings, &latency, &exits).unwrap();
    let prefill_rows_and_hits = |simulation: Simulation<'_>| {
        let mut metrics = [Metrics::new(&settings).with_passes()];
        let outcome = simulation.run(poisson(20, 10.0, 4 * 16 + 1, 1, 3), &mut metrics).unwrap();
        let rows = metrics[0].passes().iter().map(|pass| pass.prefill_rows).sum::<u32>();
        (rows, simulation.summary(&metrics[0], &outcome).prefix_hit_rate)
    };
    assert_eq!(prefill_rows_and_hits(simulation), (3 * 20 * 65, Some(0.0)));
    let hits = f64::from(19 * 48) / f64::from(20 * 65);
    assert_eq!(prefill_rows_and_hits(simulation.with_prefixes(&prefixes)), (3 * (20 * 65 - 19 * 48), Some(hits)));
}

#[test]
fn passes_spread_as_they_were_measured() {
    let mut profile = common::profile(1, &[(traces::Component::Block, 1, 0, 1, 1000.0)]);
    profile.points[0].spread_us = 100.0;
    let latency = LatencyModel::new(&profile).unwrap();
    let exits = drawn_exits(&[1.0], 1, 1, 1);
    let settings = settings(Batching::Depth, "none", 1, 1);
    let simulation = Simulation::new(settings, &latency, &exits).unwrap();
    let gaps = |simulation: Simulation<'_>| {
        let mut metrics = [Metrics::new(&settings)];
        simulation.run(queued(1, 1, 50_000), &mut metrics).unwrap();
        metrics[0].itl().quantiles_ms([0.25, 0.5, 0.75])
    };
    assert_eq!(gaps(simulation), [1.0, 1.0, 1.0]);
    let [low, median, high] = gaps(simulation.with_spread(5));
    assert!((median - 1.0).abs() < 0.005 && ((high - low) / 2.0 - 0.1).abs() < 0.005, "{low} {median} {high}");
    assert_eq!(gaps(simulation.with_spread(5)), [low, median, high]);
    assert_ne!(gaps(simulation.with_spread(6)), [low, median, high]);
}

#[test]
fn load_aware_routing_waits_less() {
    let exits = drawn_exits(&[1.0], 1, 1, 1);
    let latency = constant_latency(1);
    let settings = settings(Batching::Depth, "none", 1, 1);
    let wait = |routing| {
        let simulation = Simulation::new(settings, &latency, &exits).unwrap().with_routing(routing);
        let mut metrics = vec![Metrics::new(&settings); 8];
        simulation.run(poisson(50_000, 8.0 * 900.0, 1, 1, 3), &mut metrics).unwrap();
        let merged = Metrics::merged(metrics).unwrap();
        merged.end_to_end().mean_ms() - 1.0
    };
    let (random, two, least) = (wait(Routing::Random(1)), wait(Routing::TwoChoices(1)), wait(Routing::LeastLoaded));
    assert!(least < two && two < random / 2.0, "random {random}, two choices {two}, least loaded {least}");
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let latency = constant_latency(3);
    let exits = drawn_exits(&[0.5, 0.3, 0.2], 2, 5, 1);
    let fit = settings(Batching::Depth, "none", 3, 4);
    let other_loops = drawn_exits(&[0.5, 0.5], 2, 5, 1);
    let error = Simulation::new(fit, &latency, &other_loops).unwrap_err();
    assert_eq!(error, SimulationError::Loops { settings: 3, profile: 3, exits: 2 });

    let mut early = exit_trace(3, &[vec![0]]);
    early.recorded = SignalSet::ALWAYS;
    let without_gates = ExitModel::new(&early, Draw::Recorded).unwrap();
    let by_gate = settings(Batching::Depth, "gate:0.5", 3, 4);
    assert!(Simulation::new(by_gate, &latency, &exits).is_ok());
    let error = Simulation::new(by_gate, &latency, &without_gates).unwrap_err().to_string();
    assert!(error.contains("exit policy confidence:gate:0.5: the exit trace has no column `gate`"), "{error}");
    let by_difference = settings(Batching::Depth, "delayed:difference:0.03", 3, 4);
    assert!(Simulation::new(by_difference, &latency, &exits).is_ok());
    let error = Simulation::new(by_difference, &latency, &without_gates).unwrap_err().to_string();
    assert!(error.contains("no column `difference`, expected one that is recorded anew"), "{error}");
    for known in ["stable:2", "entropy-change:0.1"] {
        assert!(Simulation::new(settings(Batching::Depth, known, 3, 4), &latency, &without_gates).is_ok(), "{known}");
    }

    let mut profile = common::profile(3, &[(traces::Component::Block, 1, 0, 1, 1.0)]);
    profile.meta.fingerprint = "another".into();
    let another = LatencyModel::new(&profile).unwrap();
    let error = Simulation::new(fit, &another, &exits).unwrap_err().to_string();
    assert!(error.contains("another") && error.contains("test"), "{error}");

    let simulation = Simulation::new(fit, &latency, &exits).unwrap();
    assert_eq!(simulation.run(queued(1, 1, 1), &mut [] as &mut [()]), Err(SimulationError::NoReplicas));
    let backwards = [5, 3].map(|at| Request { id: at as u32, arrival: Nanos(at), prompt_tokens: 1, output_tokens: 1 });
    assert_eq!(simulation.run(backwards, &mut [()]), Err(SimulationError::Unordered(Unordered { request: 3 })));
    let endless = Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: 1 << 21, output_tokens: 1 };
    assert!(matches!(simulation.run([endless], &mut [()]), Err(SimulationError::Schedule(_))));

    let recorded = ExitModel::new(&exit_trace(3, &[vec![0, 1]]), Draw::Recorded).unwrap();
    let simulation = Simulation::new(fit, &latency, &recorded).unwrap();
    for (requests, expected) in [(queued(1, 1, 3), "asks for 3 tokens, but 2"), (queued(2, 1, 2), "request 1 has no")] {
        let error = simulation.run(requests, &mut [()]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
