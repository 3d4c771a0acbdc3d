//! One scheduler, two executors: what the simulator says a run will do is what the engine's run does.
//!
//! With all requests queued at once no decision depends on how long passes take. So the passes of a simulated run
//! are those of the measured run, row by row, although one executor runs a model and the other looks things up.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use engine::{
    Checkpoint, Engine, ExitDepths, ExitScript, Exiting, Idle, Model, Prompts, RecordedGeneration, RecordedPolicy,
    Sampling, Tokenizer, WeightType, Weights, oracle_depths,
};
use itertools::iproduct;
use latency::LatencyModel;
use scheduler::{
    Batching, Clock, CustomExit, CustomPolicy, ExitPolicy, ExitRow, KvFill, Memory, Observer, PassRecord, PrefixUse,
    RowKind, Settings, SignalRead, Token, Verified,
};
use simulator::{Draw, ExitModel, Outcome, Simulation};
use traces::hash::{mix, uniform};
use traces::{
    ClosedLoop, Component, ExitSignal, ExitTrace, ExitTraceMeta, LatencyProfile, Link, LoopShares, Nanos, PrefixHashes,
    Request, Sessions, SignalSet, ThinkTime, Users,
};

/// Every row of every pass (slot, first position, tokens, depth), and every token (request, index, depth).
#[derive(Debug, Default, PartialEq)]
struct Log {
    passes: Vec<Vec<(u32, u32, u32, u8)>>,
    tokens: Vec<(u32, u32, u8)>,
    preemptions: usize,
    /// Rows.
    backfill: u32,
    /// Depths that exits copied their keys and values to.
    copied_depths: u32,
    /// Tokens that each request found in the prefix cache, in order of admission.
    found: Vec<(u32, u32)>,
}

impl Observer for Log {
    fn looked_up(&mut self, _: Nanos, request: &Request, found: PrefixUse) {
        self.found.push((request.id, found.found));
    }

    fn pass(&mut self, record: &PassRecord<'_>) {
        let rows = record.pass.segments.iter().map(|row| (row.slot, row.start, row.tokens, row.depth));
        self.passes.push(rows.collect());
        let backfill = record.pass.segments.iter().filter(|row| row.kind == RowKind::Backfill);
        self.backfill += backfill.map(|row| row.tokens).sum::<u32>();
        self.copied_depths += record.pass.work.filled_depths;
    }

    fn token(&mut self, _: Nanos, request: &Request, token: Token) {
        self.tokens.push((request.id, token.index, token.depth));
    }

    fn preempted(&mut self, _: Nanos, _: &Request) {
        self.preemptions += 1;
    }
}

/// The model that comes with the repository.
fn embedded_model() -> Engine {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv");
    let text = std::fs::read_to_string(folder.join("prompts.txt")).unwrap();
    let tokens = Tokenizer::load(&folder.join("tokenizer.json")).unwrap().encode(&text).unwrap();
    Engine {
        model: Arc::new(Model::load(&Weights::load(&folder).unwrap(), WeightType::F32).unwrap()),
        prompts: Arc::new(Prompts::Text(tokens)),
        sampling: Sampling::default(),
        script: None,
    }
}

/// A small model of a looped family that others trained.
fn looped_model(name: &str) -> Engine {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/checkpoints/stored").join(name);
    let weights = Checkpoint::read(&folder, None).unwrap().weights;
    let vocab = weights.config().vocab_size as u32;
    Engine {
        model: Arc::new(Model::load(&weights, WeightType::F32).unwrap()),
        prompts: Arc::new(Prompts::Text((0..100).map(|index| index * index % vocab).collect())),
        sampling: Sampling::default(),
        script: None,
    }
}

/// The oracle, except that a request's first five tokens exit at depth 1 or deeper.
struct LateAtFirst;

impl CustomExit for LateAtFirst {
    fn name(&self) -> &str {
        "late-at-first"
    }

    fn reads(&self) -> SignalRead {
        SignalRead::Oracle
    }

    fn exits(&self, row: &ExitRow<'_>, memory: &mut Memory) -> bool {
        let exits = row.signals.last() == Some(&1.0) && (row.depth > 0 || memory[0] >= 5.0);
        memory[0] += f32::from(u8::from(exits));
        exits
    }
}

/// A profile with made-up times: schedules of queued requests do not depend on them.
fn any_profile(num_loops: u8) -> LatencyProfile {
    // A copy to one depth takes a microsecond.
    let components = "block,1,0,1,5.0,0.0,1\nblock,64,0,1,80.0,0.0,1\nembed,1,0,1,1.0,0.0,1\nhead,1,0,1,2.0,0.0,1\n\
                      kv_fill,1,0,1,1.0,0.0,1\nkv_fill,64,0,1,64.0,0.0,1\n";
    profile_of(num_loops, components)
}

/// A profile under which every pass takes a microsecond.
fn constant_profile(num_loops: u8) -> LatencyProfile {
    profile_of(num_loops, "block,1,0,1,0.0,0.0,1\nembed,1,0,1,0.0,0.0,1\nhead,1,0,1,0.0,0.0,1\n")
}

/// A profile of these components and of a microsecond beside them in every pass.
fn profile_of(num_loops: u8, components: &str) -> LatencyProfile {
    let folder = tempfile::tempdir().unwrap();
    let meta = format!(
        "schema_version: {}\nmodel: kjv\nfingerprint: any\nnum_loops: {num_loops}\ndevice: none\nsoftware: none\n\
         source: made up\noverhead_us: 1.0\nweight_bytes: 0\nkv_bytes_per_token: 0\n",
        LatencyProfile::SCHEMA_VERSION
    );
    std::fs::write(folder.path().join("profile.yaml"), meta).unwrap();
    let table = format!("component,rows,kv_tokens,depths,time_us,spread_us,repeats\n{components}");
    std::fs::write(folder.path().join("latency.csv"), table).unwrap();
    LatencyProfile::read(folder.path()).unwrap()
}

/// Requests that all wait at time 0.
fn queued(count: u32, output_tokens: impl Fn(u32) -> u32) -> Vec<Request> {
    let request =
        |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 3 + id * 5 % 31, output_tokens: output_tokens(id) };
    (0..count).map(request).collect()
}

/// Settings under which a batch is full and prompts run in chunks.
fn settings(batching: Batching, exit: ExitPolicy, num_blocks: u32, num_loops: u8) -> Settings {
    Settings {
        max_batch: 6,
        token_budget: 24,
        prefill_chunk: 10,
        num_blocks,
        ..Settings::new(batching, exit, num_loops)
    }
}

/// Requests with their exits at full depth, for the engine and for the simulator.
struct Recorded {
    engine: Engine,
    requests: Vec<Request>,
    oracle: Arc<ExitDepths>,
    latency: LatencyModel,
    model: ExitModel,
}

impl Recorded {
    fn new() -> Self {
        Self::of(embedded_model(), queued(24, |id| 1 + id * 7 % 23))
    }

    fn of(engine: Engine, requests: Vec<Request>) -> Self {
        let exits = engine.record(&requests, "kjv", "test", &mut ()).unwrap();
        Self {
            oracle: Arc::new(oracle_depths(&exits, &requests)),
            latency: LatencyModel::new(&any_profile(engine.num_loops())).unwrap(),
            model: ExitModel::new(&exits, Draw::Recorded).unwrap(),
            engine,
            requests,
        }
    }
}

/// Simulates the requests; returns what ran and what came of it.
fn simulate(settings: Settings, latency: &LatencyModel, exits: &ExitModel, requests: &[Request]) -> (Log, Outcome) {
    let mut logs = [Log::default()];
    let simulation = Simulation::new(settings, latency, exits).unwrap();
    let outcome = simulation.run(requests.iter().copied(), &mut logs).unwrap();
    let [log] = logs;
    (log, outcome)
}

#[test]
fn the_simulator_schedules_the_very_passes_that_the_engine_runs() {
    let Recorded { engine, requests, oracle, latency, model } = Recorded::new();
    let num_loops = engine.num_loops();

    let custom = ExitPolicy::Custom(CustomPolicy::new(&LateAtFirst));
    let mix: ExitPolicy = "mix:0:2:0.5".parse().unwrap();
    let policies =
        [ExitPolicy::None, ExitPolicy::Static(1), mix, ExitPolicy::Oracle { charged: false, recorded: true }, custom];
    for (batching, kv_fill, exit, num_blocks, (ahead, exit_wait)) in
        iproduct!(Batching::ALL, KvFill::KEEPING, policies, [1000, 8], [(false, 0), (true, 0), (false, 2)])
    {
        if ahead && !exit.is_known_ahead() {
            continue;
        }
        let of_case = settings(batching, exit, num_blocks, num_loops);
        let settings = Settings { kv_fill, async_scheduling: ahead, exit_wait, ..of_case };
        let mut measured = Log::default();
        engine.replay(settings, &requests, Some(oracle.clone()), Idle::Skip, &mut measured).unwrap();
        let (simulated, outcome) = simulate(settings, &latency, &model, &requests);
        assert_eq!(measured, simulated, "{batching}, {kv_fill}, {exit}, {num_blocks} blocks");
        assert_eq!(measured.preemptions > 0, num_blocks == 8, "{batching}, {kv_fill}, {exit}, {num_blocks} blocks");
        if let (KvFill::Reuse, ExitPolicy::Oracle { .. }) = (kv_fill, exit) {
            // Every token but a request's first is predicted by a generated one, whose exit copies: after a preemption, too.
            let exits = oracle.values().flat_map(|depths| &depths[1..]);
            let copied = exits.map(|depth| u32::from(num_loops - 1 - depth)).sum::<u32>();
            assert_eq!(measured.copied_depths, copied, "{batching}, {num_blocks} blocks");
            let copying_us = 1e6 * outcome.time.of(Component::KvFill);
            assert!((copying_us - f64::from(copied)).abs() < 1e-6, "{batching}, {num_blocks} blocks: {copying_us} us");
        }
        if exit.known_depth(0, num_loops).is_some() {
            assert_eq!(measured.copied_depths, 0, "no row reads deeper: {kv_fill}, {exit}");
        }
        let backfills = kv_fill == KvFill::Backfill && exit.known_depth(0, num_loops).is_none();
        assert_eq!(measured.backfill > 0, backfills, "{batching}, {kv_fill}, {exit}, {num_blocks} blocks");
    }
}

/// Generations of 9 tokens for any model with 4 loops, in which tokens exit at drawn depths.
fn drawn_exits() -> ExitTrace {
    let depths = LoopShares::new(&[4.0, 3.0, 2.0, 1.0]).unwrap().draw(5, 9, 3);
    ExitTrace::from_depths(any_model(4), &depths)
}

/// Generations of 9 tokens for any model with 4 loops, with signals and predictions that have nothing to do with each other.
fn drawn_signals() -> ExitTrace {
    let mut trace = ExitTrace { recorded: SignalSet::ALL, ..ExitTrace::new(any_model(4)) };
    let value = |row: u64, column: usize| uniform(mix(row << 8 | column as u64)) as f32;
    for generation in 0..5 {
        let row = |row: u64| {
            let values: [f32; ExitSignal::ALL.len()] = std::array::from_fn(|column| value(row, column));
            (values.into(), (3.0 * value(row, 9)) as u32)
        };
        trace.push_generation(&(36 * generation..36 * (generation + 1)).map(row).collect::<Vec<_>>());
    }
    trace
}

fn any_model(num_loops: u32) -> ExitTraceMeta {
    ExitTraceMeta {
        schema_version: ExitTrace::SCHEMA_VERSION,
        model: "another one".to_owned(),
        fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
        num_loops,
        source: "drawn".to_owned(),
        recording: None,
    }
}

/// An engine whose tokens follow the exits of a trace, and the exits of simulations that draw the same.
fn scripted(engine: &Engine, trace: ExitTrace, requests: &[Request]) -> (Engine, ExitModel) {
    let model = ExitModel::new(&trace, Draw::Seeded(7)).unwrap();
    let tokens = requests.iter().map(|request| (request.id, model.tokens_of(request).unwrap())).collect();
    let script = Some(Arc::new(ExitScript::new(Arc::new(trace), tokens)));
    (Engine { script, ..engine.clone() }, model)
}

#[test]
fn exits_of_any_model_are_followed_in_the_very_passes_that_are_simulated() {
    let Recorded { engine, requests, latency, .. } = Recorded::of(embedded_model(), queued(12, |id| 1 + id * 7 % 17));
    let num_loops = engine.num_loops();
    let scripts = [drawn_exits(), drawn_signals()].map(|trace| scripted(&engine, trace, &requests));
    let names = [
        "none",
        "static:1",
        "mix:0:2:0.5",
        "oracle",
        "oracle:recorded:charged",
        "margin:0.5",
        "entropy:0.5",
        "similarity:0.5",
        "difference:0.5",
        "kl:0.5",
        "gate:0.5",
        "cumulative:gate:0.7:2",
        "delayed:top1:0.5",
        "entropy-change:0.3",
        "stable:2",
        "load-adaptive:margin:0.9..0.1:4..20",
    ];
    let custom = ExitPolicy::Custom(CustomPolicy::new(&LateAtFirst));
    let policies: Vec<ExitPolicy> = names.iter().map(|name| name.parse().unwrap()).chain([custom]).collect();
    let fills: Vec<KvFill> = KvFill::KEEPING.into_iter().chain([KvFill::Last, KvFill::Cycle(3)]).collect();
    for (place, (batching, &exit)) in iproduct!(Batching::ALL, &policies).enumerate() {
        // The fills in turn, another one for each batching of a policy; both scripts, and few blocks and plenty.
        let kv_fill = fills[(place + place / policies.len()) % fills.len()];
        let script = place % 2;
        let num_blocks = [1000, 12][place / 2 % 2];
        let (engine, model) = &scripts[script];
        let case = format!("{batching}, {kv_fill}, {exit}, script {script}, {num_blocks} blocks");
        // A budget in which each prompt fits, where depths share slots.
        let (token_budget, prefill_chunk) = if kv_fill.overwrites(num_loops) { (48, 40) } else { (24, 10) };
        let of_case = settings(batching, exit, num_blocks, num_loops);
        let settings = Settings { kv_fill, token_budget, prefill_chunk, ..of_case };
        let mut measured = Log::default();
        let served = engine.replay(settings, &requests, None, Idle::Skip, &mut measured).unwrap();
        let (simulated, _) = simulate(settings, &latency, model, &requests);
        assert_eq!(measured, simulated, "{case}");
        let trace = engine.script.as_ref().unwrap().trace();
        for request in requests.iter().filter(|_| matches!(exit, ExitPolicy::Oracle { .. })) {
            let tokens = model.tokens_of(request).unwrap();
            let depths: Vec<u8> = tokens.iter().map(|&token| trace.oracle_depth(token) as u8).collect();
            assert_eq!(served[&request.id].exit_depths, depths, "{case}, request {}", request.id);
        }
    }
}

#[test]
fn what_is_served_under_exits_of_any_model_is_the_text_of_the_model_that_runs() {
    let Recorded { engine, requests, .. } = Recorded::of(embedded_model(), queued(8, |id| 1 + id * 7 % 17));
    let num_loops = engine.num_loops();
    let at_full_depth = settings(Batching::Depth, ExitPolicy::None, 1000, num_loops);
    let own = engine.replay(at_full_depth, &requests, None, Idle::Skip, &mut ()).unwrap();
    let (engine, _) = scripted(&engine, drawn_exits(), &requests);
    let text = |batching, exit: &str, kv_fill| {
        let of_case = settings(batching, exit.parse().unwrap(), 1000, num_loops);
        engine.replay(Settings { kv_fill, ..of_case }, &requests, None, Idle::Skip, &mut ()).unwrap()
    };
    let tokens = |text: HashMap<u32, engine::Generation>| -> HashMap<u32, Vec<u32>> {
        text.into_iter().map(|(request, generation)| (request, generation.tokens)).collect()
    };
    assert_eq!(tokens(text(Batching::Depth, "none", KvFill::Reuse)), tokens(own.clone()));
    for kv_fill in KvFill::KEEPING {
        let served = tokens(text(Batching::Sequence, "oracle", kv_fill));
        assert_ne!(served, tokens(own.clone()), "{kv_fill}");
        for (batching, exit) in iproduct!([Batching::Vanilla, Batching::Depth], ["oracle", "margin:0.5", "gate:0.5"]) {
            assert_eq!(tokens(text(batching, exit, kv_fill)), served, "{batching}, {exit}, {kv_fill}");
        }
    }
}

#[test]
fn drafts_are_verified_and_taken_back_in_the_very_passes_that_are_simulated() {
    let Recorded { engine, requests, latency, model, .. } = Recorded::new();
    let num_loops = engine.num_loops();
    let full_depth = settings(Batching::Sequence, ExitPolicy::None, 1000, num_loops);
    let full_depth = engine.replay(full_depth, &requests, None, Idle::Skip, &mut ()).unwrap();
    // With one draft, or with drafts at a fixed depth, no signal of a row behind a wrong draft is read.
    let policies = ["speculate:static:0:3", "speculate:static:1:1", "speculate:static:2:200", "speculate:margin:0.1:1"];
    let mut all_rejected = 0;
    for (batching, exit, num_blocks, exit_wait) in iproduct!(Batching::ALL, policies, [1000, 8], [0, 3]) {
        let of_case = settings(batching, exit.parse().unwrap(), num_blocks, num_loops);
        let settings = Settings { kv_fill: KvFill::Backfill, exit_wait, ..of_case };
        let (mut measured, mut verified) = (Log::default(), Drafts::default());
        let served = engine.replay(settings, &requests, None, Idle::Skip, &mut (&mut measured, &mut verified)).unwrap();
        let case = format!("{batching}, {exit}, {num_blocks} blocks, wait {exit_wait}");
        let mut simulated = [(Log::default(), Drafts::default())];
        let simulation = Simulation::new(settings, &latency, &model).unwrap();
        let outcome = simulation.run(requests.iter().copied(), &mut simulated).unwrap();
        let [simulated] = simulated;
        assert_eq!((measured, verified), simulated, "{case}");
        assert_eq!(
            (outcome.tokens, outcome.agreeing_tokens),
            (simulated.0.tokens.len() as u64, outcome.tokens),
            "{case}"
        );
        assert_eq!(simulated.0.preemptions > 0, num_blocks == 8, "{case}");
        for (request, text) in &full_depth {
            assert_eq!(served[request].tokens, text.tokens, "{case}, request {request}");
        }
        let Verified { accepted, rejected, .. } = simulated.1.0;
        assert!(accepted > 4, "{case}: {accepted} accepted, {rejected} rejected");
        all_rejected += rejected;
    }
    assert!(all_rejected > 100, "{all_rejected} rejected");
}

#[test]
fn behind_wrong_drafts_the_simulator_reads_signals_of_right_ones() {
    let Recorded { engine, requests, latency, model, .. } = Recorded::new();
    let exit = "speculate:margin:0.1:4".parse().unwrap();
    for batching in Batching::ALL {
        let of_case = settings(batching, exit, 1000, engine.num_loops());
        let settings = Settings { kv_fill: KvFill::Backfill, ..of_case };
        let mut measured = (Log::default(), Drafts::default());
        engine.replay(settings, &requests, None, Idle::Skip, &mut measured).unwrap();
        let mut simulated = [(Log::default(), Drafts::default())];
        let simulation = Simulation::new(settings, &latency, &model).unwrap();
        simulation.run(requests.iter().copied(), &mut simulated).unwrap();
        let [simulated] = simulated;
        let [measured, simulated] = [measured, simulated].map(|(log, drafts)| (log.passes.len() as f64, drafts.0));
        assert!((simulated.0 / measured.0 - 1.0).abs() < 0.05, "{batching}: {simulated:?}, measured {measured:?}");
        assert!(simulated.1.dropped > 0 || batching.is_lockstep(), "{batching}");
    }
}

/// Sums of what full depth says of drafts.
#[derive(Debug, Default, PartialEq)]
struct Drafts(Verified);

impl Observer for Drafts {
    fn verified(&mut self, _: Nanos, _: &Request, verified: Verified) {
        self.0.accepted += verified.accepted;
        self.0.rejected += verified.rejected;
        self.0.dropped += verified.dropped;
        self.0.wasted_rows += verified.wasted_rows;
    }
}

#[test]
fn with_prefix_caching_the_passes_are_the_same_too() {
    // Prompts of two families that begin alike, of up to three blocks.
    let mut alike = PrefixHashes::new(16);
    (0..16).for_each(|id| alike.push([id % 2, id % 2, 2 + u64::from(id % 3 == 0) * id]));
    let embedded = embedded_model();
    let prompts = Arc::new(Prompts::clone(&embedded.prompts).with_prefixes(Arc::new(alike)));
    let longer = |request: Request| Request { prompt_tokens: 20 + request.prompt_tokens, ..request };
    let requests: Vec<Request> = queued(16, |id| 1 + id * 7 % 23).into_iter().map(longer).collect();
    let Recorded { engine, requests, oracle, latency, model } = Recorded::of(Engine { prompts, ..embedded }, requests);
    let prefixes = Arc::new(engine.prefix_hashes(&requests, 16).unwrap());
    let num_loops = engine.num_loops();
    let mix: ExitPolicy = "mix:0:2:0.5".parse().unwrap();
    let policies = [ExitPolicy::None, mix, ExitPolicy::Oracle { charged: false, recorded: true }];
    for (batching, kv_fill, exit, num_blocks, ahead) in
        iproduct!(Batching::ALL, KvFill::KEEPING, policies, [60, 10], [false, true])
    {
        if ahead && !exit.is_known_ahead() {
            continue;
        }
        let of_case = settings(batching, exit, num_blocks, num_loops);
        let settings = Settings { kv_fill, async_scheduling: ahead, prefix_caching: true, ..of_case };
        let case = format!("{batching}, {kv_fill}, {exit}, {num_blocks} blocks, ahead: {ahead}");
        let mut measured = Log::default();
        engine.replay(settings, &requests, Some(oracle.clone()), Idle::Skip, &mut measured).unwrap();
        let mut logs = [Log::default()];
        let simulation = Simulation::new(settings, &latency, &model).unwrap().with_prefixes(&prefixes);
        simulation.run(requests.iter().copied(), &mut logs).unwrap();
        assert_eq!(measured, logs[0], "{case}");
        assert!(measured.found.iter().any(|(_, found)| *found > 0), "{case}");
        assert_eq!(measured.preemptions > 0, num_blocks == 10, "{case}");
    }
}

#[test]
fn prompts_of_some_depths_run_the_passes_that_are_simulated() {
    let Recorded { engine, requests, oracle, latency, model } = Recorded::new();
    let num_loops = engine.num_loops();
    let policies = [ExitPolicy::None, ExitPolicy::Static(1), ExitPolicy::Oracle { charged: false, recorded: true }];
    for (batching, exit, num_blocks, depth) in iproduct!(Batching::ALL, policies, [1000, 8], 0..num_loops) {
        let of_case = settings(batching, exit, num_blocks, num_loops);
        let settings = Settings { prefill_depth: Some(depth), exit_wait: u32::from(depth % 2), ..of_case };
        let mut measured = Log::default();
        engine.replay(settings, &requests, Some(oracle.clone()), Idle::Skip, &mut measured).unwrap();
        let (simulated, _) = simulate(settings, &latency, &model, &requests);
        assert_eq!(measured, simulated, "{batching}, {exit}, prompts up to {depth}, {num_blocks} blocks");
        assert_eq!(measured.preemptions > 0, num_blocks == 8);
    }
}

#[test]
fn looped_models_of_others_run_the_passes_that_are_simulated() {
    for name in ["ouro", "raven", "nanbeige_skip_norm"] {
        let short = |request: Request| Request { prompt_tokens: 1 + request.prompt_tokens % 14, ..request };
        let requests = queued(18, |id| 1 + id * 7 % 15).into_iter().map(short).collect();
        let Recorded { engine, requests, oracle, latency, model } = Recorded::of(looped_model(name), requests);
        let num_loops = engine.num_loops();
        let gate: ExitPolicy = if name == "ouro" { "cumulative:gate:0.6:1" } else { "static:1" }.parse().unwrap();
        let policies = [ExitPolicy::None, gate, ExitPolicy::Oracle { charged: false, recorded: true }];
        let fills = [KvFill::Reuse, KvFill::Skip, KvFill::Backfill];
        let mut preempted = [0, 0];
        for (batching, kv_fill, exit, num_blocks, exit_wait) in
            iproduct!(Batching::ALL, fills, policies, [1000, 4], [0, 2])
        {
            let settings = Settings { kv_fill, exit_wait, ..settings(batching, exit, num_blocks, num_loops) };
            let mut measured = Log::default();
            let served = engine.replay(settings, &requests, Some(oracle.clone()), Idle::Skip, &mut measured).unwrap();
            let case = format!("{name}, {batching}, {kv_fill}, {exit}, {num_blocks} blocks, wait {exit_wait}");
            preempted[usize::from(num_blocks == 4)] += measured.preemptions;
            if matches!(exit.signal_read(), SignalRead::Signal(_)) {
                // The exits depend on the text that is served, which is the same under every batching.
                let alone = Settings { max_batch: 1, ..self::settings(Batching::Sequence, exit, 1000, num_loops) };
                let alone = engine.replay(Settings { kv_fill, ..alone }, &requests, None, Idle::Skip, &mut ()).unwrap();
                assert_eq!(served, alone, "{case}");
                let mut depths: Vec<u8> = served.values().flat_map(|text| text.exit_depths.clone()).collect();
                depths.sort_unstable();
                assert!(depths[0] < depths[depths.len() - 1], "{case}: all exit at {}", depths[0]);
                continue;
            }
            let (simulated, _) = simulate(settings, &latency, &model, &requests);
            assert_eq!(measured, simulated, "{case}");
        }
        assert!(preempted[0] == 0 && preempted[1] > 0, "{name}: {preempted:?}");
    }
}

#[test]
fn where_depths_share_slots_the_passes_are_the_same_too_and_nothing_is_preempted() {
    let Recorded { engine, requests, oracle, latency, model } = Recorded::new();
    let policies = [ExitPolicy::None, ExitPolicy::Static(1), ExitPolicy::Oracle { charged: false, recorded: true }];
    for (batching, kv_fill, exit, (ahead, exit_wait)) in
        iproduct!(Batching::ALL, [KvFill::Last, KvFill::Cycle(3)], policies, [(false, 0), (true, 0), (false, 2)])
    {
        if ahead && !exit.is_known_ahead() {
            continue;
        }
        // Few blocks, so that requests wait for them, and a budget in which each prompt fits.
        let of_case = settings(batching, exit, 12, engine.num_loops());
        let settings =
            Settings { kv_fill, async_scheduling: ahead, exit_wait, token_budget: 48, prefill_chunk: 40, ..of_case };
        let mut measured = Log::default();
        engine.replay(settings, &requests, Some(oracle.clone()), Idle::Skip, &mut measured).unwrap();
        let (simulated, _) = simulate(settings, &latency, &model, &requests);
        assert_eq!(measured, simulated, "{batching}, {kv_fill}, {exit}, {ahead}, {exit_wait}");
        assert_eq!(measured.preemptions, 0, "{batching}, {kv_fill}, {exit}");
    }
}

#[test]
fn in_a_closed_loop_that_runs_in_slices_the_passes_are_the_same_too() {
    let Recorded { engine, requests, oracle, latency, model } = Recorded::new();
    let num_loops = engine.num_loops();
    let exit = ExitPolicy::Oracle { charged: false, recorded: true };
    for (batching, in_flight, num_blocks) in iproduct!(Batching::ALL, [2, 6, 9], [1000, 8]) {
        let settings = settings(batching, exit, num_blocks, num_loops);
        let (mut measured, mut simulated) = (Running::default(), Running::default());
        let closed_loop = ClosedLoop::in_flight(NonZeroU32::new(in_flight).unwrap());
        let mut replay = engine.sliced_replay(settings, &requests, &closed_loop, Some(oracle.clone())).unwrap();
        let mut progress = vec![replay.progress()];
        // A pass in each slice.
        while replay.run_for(Duration::ZERO, &mut measured).unwrap() {
            progress.push(replay.progress());
        }
        assert!(progress.is_sorted() && progress[0] == 0.0 && replay.progress() == 1.0, "{progress:?}");
        let whole = engine.replay(settings, &requests, Some(oracle.clone()), Idle::Skip, &mut ()).unwrap();
        assert_eq!(replay.into_generations(), whole);
        let simulation = Simulation::new(settings, &latency, &model).unwrap().in_closed_loop(&closed_loop);
        let outcome = simulation.run(requests.iter().copied(), std::slice::from_mut(&mut simulated)).unwrap();
        assert_eq!(outcome.tokens, requests.iter().map(|request| u64::from(request.output_tokens)).sum::<u64>());
        assert_eq!(measured, simulated, "{batching}, {in_flight} in flight, {num_blocks} blocks");
        assert_eq!(measured.most, in_flight, "{batching}, {num_blocks} blocks");
    }
}

/// A clock on which every pass takes a microsecond, as in [`constant_profile`].
struct Microseconds(Nanos);

impl Clock for Microseconds {
    fn now(&mut self) -> Nanos {
        self.0
    }

    fn advance(&mut self, _: Nanos) -> Nanos {
        self.0 += Nanos(1000);
        self.0
    }

    fn wait_until(&mut self, time: Nanos) {
        self.0 = self.0.max(time);
    }
}

#[test]
fn users_and_sessions_run_the_same_passes() {
    let Recorded { engine, requests, model, .. } = Recorded::new();
    let latency = LatencyModel::new(&constant_profile(engine.num_loops())).unwrap();
    // Sessions of three requests, in which the second is sent a while after the first answer, and the third after the
    // second.
    let link = |id: usize| Link {
        session: Some(id as u32 / 3),
        think: (!id.is_multiple_of(3)).then_some(Nanos(700 * id as u64)),
        is_timed: id.is_multiple_of(3),
    };
    let sessions = Some(Arc::new(Sessions::new((0..requests.len()).map(link))));
    let users = |number, think| Some(Users { number: NonZeroU32::new(number).unwrap(), think, seed: 3 });
    let loops = [
        ClosedLoop { users: None, sessions: sessions.clone() },
        ClosedLoop { users: users(2, ThinkTime::Exponential(7e-6)), sessions },
        ClosedLoop { users: users(3, ThinkTime::Exponential(2e-5)), sessions: None },
        ClosedLoop { users: users(40, ThinkTime::Fixed(1e-6)), sessions: None },
    ];
    let mut texts = None;
    for (batching, ahead, closed_loop) in iproduct!(Batching::ALL, [false, true], &loops) {
        let of_case = settings(batching, ExitPolicy::None, 12, engine.num_loops());
        let settings = Settings { async_scheduling: ahead, ..of_case };
        let (mut measured, mut simulated) = (Sent::default(), Sent::default());
        let clock = &mut Microseconds(Nanos::ZERO);
        let served = engine.replay_by(settings, &requests, Some(closed_loop), None, clock, &mut measured).unwrap();
        let simulation = Simulation::new(settings, &latency, &model).unwrap().in_closed_loop(closed_loop);
        simulation.run(requests.iter().copied(), std::slice::from_mut(&mut simulated)).unwrap();
        assert_eq!(measured.finished, simulated.finished, "{batching}, {closed_loop:?}, {ahead}");
        assert_eq!(measured.log, simulated.log, "{batching}, {closed_loop:?}, {ahead}");
        assert_eq!(measured.finished.len(), requests.len());
        if closed_loop.sessions.is_some() {
            let times: HashMap<u32, (Nanos, Nanos)> =
                measured.finished.iter().map(|&(end, id, sent)| (id, (sent, end))).collect();
            for id in (0..requests.len() as u32).filter(|id| id % 3 > 0) {
                assert_eq!(times[&id].0, times[&(id - 1)].1 + Nanos(700 * u64::from(id)), "{batching}, request {id}");
            }
        }
        assert_eq!(served, *texts.get_or_insert_with(|| served.clone()), "{batching}, {closed_loop:?}");
    }
}

/// A log, and when each request ended, by id, and when it was sent.
#[derive(Debug, Default, PartialEq)]
struct Sent {
    log: Log,
    finished: Vec<(Nanos, u32, Nanos)>,
}

impl Observer for Sent {
    fn pass(&mut self, record: &PassRecord<'_>) {
        self.log.pass(record);
    }

    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        self.log.token(now, request, token);
    }

    fn preempted(&mut self, now: Nanos, request: &Request) {
        self.log.preempted(now, request);
    }

    fn finished(&mut self, now: Nanos, request: &Request, _: Nanos) {
        self.finished.push((now, request.id, request.arrival));
    }
}

/// A log, and the most requests that ran or waited during a pass.
#[derive(Debug, Default, PartialEq)]
struct Running {
    log: Log,
    most: u32,
}

impl Observer for Running {
    fn pass(&mut self, record: &PassRecord<'_>) {
        self.most = self.most.max(record.running + record.waiting);
        self.log.pass(record);
    }

    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        self.log.token(now, request, token);
    }

    fn preempted(&mut self, now: Nanos, request: &Request) {
        self.log.preempted(now, request);
    }
}

/// The exit depths of a run's tokens, by request.
fn exit_depths(log: &Log, requests: usize) -> Vec<Vec<u8>> {
    let mut depths = vec![Vec::new(); requests];
    let mut tokens = log.tokens.clone();
    tokens.sort_unstable();
    tokens.iter().for_each(|&(request, _, depth)| depths[request as usize].push(depth));
    depths
}

#[test]
fn the_simulator_runs_the_passes_of_exits_by_signals_where_it_is_told_the_exits() {
    let engine = embedded_model();
    let num_loops = engine.model.config().num_loops as u8;
    let requests = queued(12, |id| 1 + id * 7 % 23);
    let latency = LatencyModel::new(&any_profile(num_loops)).unwrap();
    let policies = [
        "gate:0.9",
        "load-adaptive:margin:0.5..0.01:2..9",
        "cumulative:gate:0.97:2",
        "delayed:gate:0.85",
        "delayed:margin:0.1",
        "difference:0.3",
        "kl:0.02",
        "entropy-change:0.25",
        "stable:2",
    ];
    for (batching, exit, num_blocks, ahead) in iproduct!(Batching::ALL, policies, [1000, 8], [false, true]) {
        let exit: ExitPolicy = exit.parse().unwrap();
        if ahead && !exit.is_known_ahead() {
            continue;
        }
        let settings = Settings { async_scheduling: ahead, ..settings(batching, exit, num_blocks, num_loops) };
        let mut measured = Log::default();
        engine.replay(settings, &requests, None, Idle::Skip, &mut measured).unwrap();
        let depths = exit_depths(&measured, requests.len());
        let model =
            ExitModel::from_depths(&depths, num_loops.into(), engine.model.fingerprint(), Draw::Recorded).unwrap();
        let (simulated, _) = simulate(settings, &latency, &model, &requests);
        assert_eq!(measured, simulated, "{batching}, {exit}, {num_blocks} blocks, ahead: {ahead}");
        let distinct = depths.concat().into_iter().collect::<HashSet<u8>>().len();
        assert!(distinct > 1, "{batching}, {exit}: all tokens exit at one depth");
    }
}

#[test]
fn exits_by_the_signals_of_prompts_are_those_that_the_simulator_decides() {
    let engine = embedded_model();
    let num_loops = engine.model.config().num_loops as u8;
    // A prompt runs every depth, so the signals of the first token are those recorded, however other tokens exit.
    let requests = queued(40, |_| 1);
    let exits = engine.record(&requests, "kjv", "test", &mut ()).unwrap();
    let latency = LatencyModel::new(&any_profile(num_loops)).unwrap();
    let model = ExitModel::new(&exits, Draw::Recorded).unwrap();
    let run = |batching, exit: &str, ahead| {
        let exit: ExitPolicy = exit.parse().unwrap();
        let async_scheduling = ahead && exit.is_known_ahead();
        let settings = Settings { async_scheduling, ..settings(batching, exit, 1000, num_loops) };
        let mut measured = Log::default();
        engine.replay(settings, &requests, None, Idle::Skip, &mut measured).unwrap();
        let (simulated, _) = simulate(settings, &latency, &model, &requests);
        assert_eq!(measured, simulated, "{batching}, {exit}, ahead: {ahead}");
        exit_depths(&measured, requests.len())
    };
    for (batching, ahead) in iproduct!(Batching::ALL, [false, true]) {
        let [adaptive, calm, busy] = ["load-adaptive:margin:0.6..0.02:2..36:3", "margin:0.6", "margin:0.02"]
            .map(|exit| run(batching, exit, ahead));
        assert!(adaptive != calm && adaptive != busy, "{batching}: the threshold stays at one end");
        let others = ["cumulative:gate:0.97:2", "delayed:gate:0.85", "delayed:margin:0.3", "delayed:difference:0.3"];
        for exit in others.into_iter().chain(["difference:0.3", "kl:0.02", "entropy-change:0.25", "stable:2"]) {
            let distinct = run(batching, exit, ahead).concat().into_iter().collect::<HashSet<u8>>().len();
            assert!(distinct > 1, "{batching}, {exit}: all tokens exit at one depth");
        }
    }
}

#[test]
fn under_a_recorded_threshold_the_simulator_has_the_exits_and_the_agreement_of_service() {
    let engine = embedded_model();
    let num_loops = engine.model.config().num_loops as u8;
    let requests = queued(12, |id| 9 + id * 7 % 23);
    let latency = LatencyModel::new(&any_profile(num_loops)).unwrap();
    let exit: ExitPolicy = "margin:0.05".parse().unwrap();
    for kv_fill in KvFill::KEEPING {
        let exiting = Exiting { policies: vec![RecordedPolicy::Policy(exit)], kv_fill, prefill_depth: None, seed: 1 };
        let meta = ExitTraceMeta { recording: Some(exiting.meta()), ..engine.exit_trace_meta("kjv", "test") };
        let mut exits = ExitTrace::new(meta);
        let push = |recorded: &RecordedGeneration| {
            exits.push_served(&recorded.rows, &recorded.tokens, recorded.policy);
            Ok(())
        };
        engine.record_each_exiting(&requests, &exiting, push, &mut ()).unwrap();
        let model = ExitModel::new(&exits, Draw::Recorded).unwrap();
        for (batching, num_blocks) in iproduct!(Batching::ALL, [1000, 6]) {
            let settings = Settings { kv_fill, ..settings(batching, exit, num_blocks, num_loops) };
            let what = format!("{batching}, {kv_fill}, {num_blocks} blocks");
            let mut measured = Log::default();
            let served = engine.replay(settings, &requests, None, Idle::Skip, &mut measured).unwrap();
            let (simulated, outcome) = simulate(settings, &latency, &model, &requests);
            assert_eq!(measured, simulated, "{what}");
            assert_eq!(measured.preemptions > 0, num_blocks == 6, "{what}");
            assert!((outcome.token_agreement() - engine.agreement(&served).unwrap()).abs() < 1e-12, "{what}");
        }
        let other = KvFill::KEEPING.into_iter().find(|&fill| fill != kv_fill).unwrap();
        let settings = Settings { kv_fill: other, ..Settings::new(Batching::Depth, exit, num_loops) };
        let error = Simulation::new(settings, &latency, &model).unwrap_err().to_string();
        assert!(error.contains(&format!("recorded under KV fill {kv_fill}, the settings have {other}")), "{error}");
    }
}
