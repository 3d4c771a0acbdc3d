//! Machines with roles: prompts run on one machine, the rest of each request on another.

mod common;

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU32;
use std::sync::Arc;

use common::{Event, Log, PASS, constant_latency, drawn_exits, exit_trace, poisson, profile, queued, settings};
use latency::LatencyModel;
use proptest::prelude::*;
use scheduler::{Batching, KvFill, Observer, PassRecord, RowKind, Settings, Token};
use simulator::{
    Draw, ExitModel, GroupSummary, Link, MachineGroup, Metrics, Outcome, Role, RoleError, Routing, Simulation,
    SimulationError, Summary, SystemSummary, run_all,
};
use traces::{ClosedLoop, Component, Link as SessionLink, Nanos, PrefixHashes, Request, Sessions, ThinkTime, Users};

const KV_BYTES: u64 = 1000;

/// Every pass takes [`PASS`]; the keys and values of a token take [`KV_BYTES`].
fn latency(num_loops: u32) -> LatencyModel {
    let points = [1, 1 << 20].map(|rows| (Component::Block, rows, 0, 1, PASS.as_micros_f64()));
    let mut profile = profile(num_loops, &points);
    profile.meta.kv_bytes_per_token = KV_BYTES;
    LatencyModel::new(&profile).unwrap()
}

fn group(role: Role, replicas: usize, settings: Settings, latency: &LatencyModel) -> MachineGroup<'_> {
    MachineGroup { role, replicas, settings, latency }
}

const FREE: Link = Link { gigabytes_per_s: f64::INFINITY, latency_us: 0.0 };

fn metrics(simulation: &Simulation<'_>) -> Vec<Metrics> {
    simulation.settings_of_machines(1).map(|settings| Metrics::new(settings).with_requests()).collect()
}

fn summarize(simulation: &Simulation<'_>, requests: impl IntoIterator<Item = Request>) -> (SystemSummary, Outcome) {
    let mut machines = metrics(simulation);
    let outcome = simulation.run(requests, &mut machines).unwrap();
    (simulation.summarize(machines, &outcome).unwrap(), outcome)
}

fn logs(simulation: &Simulation<'_>, requests: impl IntoIterator<Item = Request>) -> Vec<Log> {
    let mut logs = vec![Log::default(); simulation.settings_of_machines(1).count()];
    simulation.run(requests, &mut logs).unwrap();
    logs
}

/// Tokens of all machines: when, of which request, and which.
fn tokens(logs: &[Log]) -> Vec<(Nanos, u32, Token)> {
    let of = |&(now, request, event): &(Nanos, u32, Event)| match event {
        Event::Token(token) => Some((now, request, token)),
        _ => None,
    };
    let mut tokens: Vec<_> = logs.iter().flat_map(|log| log.0.iter().filter_map(of)).collect();
    tokens.sort_by_key(|&(now, request, token)| (request, token.index, now));
    tokens
}

#[test]
fn the_time_of_the_transfer_adds_to_every_token_of_a_request_exactly() {
    let (latency, exits) = (latency(3), drawn_exits(&[0.2, 0.3, 0.5], 20, 12, 3));
    let prompt_tokens = 70;
    let link = Link { gigabytes_per_s: 0.02, latency_us: 7.5 };
    let sending = f64::from(prompt_tokens) * KV_BYTES as f64 / 0.02;
    let transfer = Nanos(sending as u64 + 7_500);
    for (batching, exit) in [(Batching::Sequence, "confidence:0.5"), (Batching::Depth, "none")] {
        let settings = settings(batching, exit, 3, 4);
        let alone = Simulation::new(settings, &latency, &exits).unwrap();
        let groups = [Role::Prompt, Role::Decode].map(|role| group(role, 1, settings, &latency));
        let apart = Simulation::of_groups(&groups, Some(link), &exits).unwrap();
        let request = || queued(1, prompt_tokens, 12);
        let later: Vec<_> = tokens(&logs(&alone, request()))
            .into_iter()
            .map(|(now, request, token)| {
                let previous = token.previous.map(|previous| previous + transfer);
                (now + transfer, request, Token { previous, ..token })
            })
            .collect();
        assert_eq!(tokens(&logs(&apart, request())), later);
        let (summary, outcome) = summarize(&apart, request());
        assert_eq!((outcome.transfers.count, outcome.transfers.time), (1, transfer));
        assert_eq!(outcome.transfers.bytes, u64::from(prompt_tokens) * KV_BYTES);
        assert_eq!(
            summary.summary.ttft_mean_ms,
            tokens(&logs(&alone, request()))[0].0.as_millis_f64() + transfer.as_millis_f64()
        );
    }
}

#[test]
fn with_a_free_link_requests_one_by_one_are_served_as_on_one_machine() {
    let (latency, exits) = (latency(3), drawn_exits(&[0.2, 0.3, 0.5], 20, 12, 3));
    let one_user = ClosedLoop::in_flight(NonZeroU32::new(1).unwrap());
    for (batching, exit) in [(Batching::Sequence, "confidence:0.5"), (Batching::Depth, "none")] {
        for kv_fill in KvFill::KEEPING {
            let settings = Settings { kv_fill, prefill_chunk: 8, ..settings(batching, exit, 3, 4) };
            let alone = Simulation::new(settings, &latency, &exits).unwrap().in_closed_loop(&one_user);
            let groups = [Role::Prompt, Role::Decode].map(|role| group(role, 1, settings, &latency));
            let apart = Simulation::of_groups(&groups, Some(FREE), &exits).unwrap().in_closed_loop(&one_user);
            let requests = || queued(30, 21, 9);
            assert_eq!(tokens(&logs(&apart, requests())), tokens(&logs(&alone, requests())), "{batching} {kv_fill}");
        }
    }
}

#[test]
fn a_tandem_of_machines_has_the_throughput_of_its_slowest_stage() {
    let (latency, exits) = (latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let (count, prompt_tokens) = (400, 10);
    let run = |decode_batch: u32, output_tokens: u32, gigabytes_per_s: f64| {
        // One prompt in each pass.
        let prompt = Settings { prefill_chunk: prompt_tokens, ..settings(Batching::Sequence, "none", 1, 16) };
        let decode = settings(Batching::Depth, "none", 1, decode_batch);
        let groups = [group(Role::Prompt, 1, prompt, &latency), group(Role::Decode, 1, decode, &latency)];
        let link = Link { gigabytes_per_s, latency_us: 0.0 };
        let simulation = Simulation::of_groups(&groups, Some(link), &exits).unwrap();
        let (SystemSummary { summary, groups, .. }, _) =
            summarize(&simulation, queued(count, prompt_tokens, output_tokens));
        (summary.makespan_s / f64::from(count) / PASS.as_secs_f64(), groups)
    };
    let assert_close =
        |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 0.04, "{found}, expected {expected}");
    // A prompt takes one pass, and eight others decode meanwhile.
    let (passes_each, groups) = run(64, 9, f64::INFINITY);
    assert_close(passes_each, 1.0);
    assert!(groups[0].busy > 0.95 && groups[1].mean_waiting < 1.0, "{groups:?}");
    // A place of the decode machine is taken for 40 passes, and for the one in which its transfer starts.
    let (passes_each, groups) = run(4, 41, f64::INFINITY);
    assert_close(passes_each, 41.0 / 4.0);
    assert!(groups[1].busy > 0.99 && groups[0].busy < 0.15, "{groups:?}");
    // The link takes three passes.
    let bytes = f64::from(prompt_tokens) * KV_BYTES as f64;
    let (passes_each, _) = run(64, 9, bytes / (3.0 * PASS.0 as f64));
    assert_close(passes_each, 3.0);
}

#[test]
fn a_machine_receives_one_transfer_at_a_time_and_the_latency_overlaps() {
    let (latency, exits) = (latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let settings = settings(Batching::Sequence, "none", 1, 8);
    let groups = [group(Role::Prompt, 2, settings, &latency), group(Role::Decode, 1, settings, &latency)];
    let link = Link { gigabytes_per_s: 0.01, latency_us: 400.0 };
    let simulation = Simulation::of_groups(&groups, Some(link), &exits).unwrap();
    // Both prompt machines end their prompts at the same time: 10 tokens take a millisecond.
    let logs = logs(&simulation, queued(2, 10, 2));
    let first = |request| tokens(&logs).iter().find(|token| token.1 == request).unwrap().0;
    assert_eq!(first(0), PASS + Nanos(1_400_000));
    assert_eq!(first(1), PASS + Nanos(2_400_000));
}

#[test]
fn a_request_of_one_token_ends_where_its_prompt_runs() {
    let (latency, exits) = (latency(2), drawn_exits(&[0.5, 0.5], 5, 5, 1));
    let settings = settings(Batching::Depth, "confidence:0.5", 2, 4);
    let groups = [Role::Prompt, Role::Decode].map(|role| group(role, 1, settings, &latency));
    let simulation = Simulation::of_groups(&groups, Some(FREE), &exits).unwrap();
    let (summary, outcome) = summarize(&simulation, queued(10, 5, 1));
    assert_eq!((summary.summary.requests, outcome.transfers.count), (10, 0));
    assert_eq!(summary.groups[1].passes, 0);
}

#[test]
fn a_full_decode_machine_holds_prompts_back_and_no_cache_overflows() {
    let (latency, exits) = (latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let small = Settings { num_blocks: 6, ..settings(Batching::Sequence, "none", 1, 8) };
    let groups = [Role::Prompt, Role::Decode].map(|role| group(role, 1, small, &latency));
    let simulation = Simulation::of_groups(&groups, Some(FREE), &exits).unwrap();
    // Two prompts of 40 tokens fill either cache, and a decode machine that holds both has to preempt one of them.
    let (SystemSummary { summary, groups, metrics }, outcome) = summarize(&simulation, queued(12, 40, 30));
    assert_eq!(metrics.requests().count(), 12);
    assert!(groups.iter().all(|group| group.kv_usage_peak == 1.0), "{groups:?}");
    assert!(groups[1].preemptions > 0 && groups[0].preemptions == 0, "{groups:?}");
    assert!(outcome.transfers.wait > Nanos(20 * PASS.0));
    assert_eq!(outcome.transfers.count, 12);
    assert!(summary.machines == "1 prompt sequence + 1 decode sequence", "{}", summary.machines);
    // What was preempted runs again on the decode machine: its queue is in order of admission, so no request is starved.
    let rows: Vec<_> = metrics.requests().collect();
    assert!(rows.windows(2).all(|pair| pair[0].first_token_s <= pair[1].first_token_s));
}

#[test]
fn what_the_decode_machine_has_cached_is_not_transferred() {
    let (latency, exits) = (latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let settings = Settings { prefix_caching: true, ..settings(Batching::Depth, "none", 1, 4) };
    let groups = [Role::Prompt, Role::Decode].map(|role| group(role, 1, settings, &latency));
    let mut prefixes = PrefixHashes::new(settings.block_tokens);
    (0..20).for_each(|last| prefixes.push([1, 2, 3, 100 + last]));
    let prefixes = Arc::new(prefixes);
    let simulation = Simulation::of_groups(&groups, Some(FREE), &exits).unwrap();
    let prompt_tokens = 4 * 16 + 1;
    let bytes = |simulation: Simulation<'_>| {
        let (summary, outcome) = summarize(&simulation, poisson(20, 10.0, prompt_tokens, 3, 3));
        (outcome.transfers.bytes / KV_BYTES, summary.summary.prefix_hit_rate)
    };
    assert_eq!(bytes(simulation), (20 * 65, Some(0.0)));
    // The first prompt is transferred as a whole, the others without the three blocks that they share; prompt machines
    // find those as well.
    let hits = f64::from(19 * 48) / f64::from(20 * 65);
    assert_eq!(bytes(simulation.with_prefixes(&prefixes)), (20 * 65 - 19 * 48, Some(hits)));
}

#[test]
fn routing_by_prefix_sends_prompts_to_the_machine_that_has_their_beginning() {
    let (latency, exits) = (latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let settings = Settings { prefix_caching: true, ..settings(Batching::Sequence, "none", 1, 4) };
    let groups = [group(Role::Prompt, 3, settings, &latency), group(Role::Decode, 1, settings, &latency)];
    let mut prefixes = PrefixHashes::new(settings.block_tokens);
    // Four conversations in turn, which have three blocks in common among themselves.
    (0..40).for_each(|request| prefixes.push([1, 2, 3].map(|block| 10 * (request % 4) + block)));
    let prefixes = Arc::new(prefixes);
    let simulation = Simulation::of_groups(&groups, Some(FREE), &exits).unwrap().with_prefixes(&prefixes);
    let prompt_tokens = 3 * 16 + 1;
    let run = |routing| {
        let simulation = simulation.with_routing(routing);
        let logs = logs(&simulation, poisson(40, 10.0, prompt_tokens, 3, 3));
        let machines = (0..40).map(|id| logs.iter().position(|log| log.0.iter().any(|event| event.1 == id)).unwrap());
        let (summary, _) = summarize(&simulation, poisson(40, 10.0, prompt_tokens, 3, 3));
        (machines.collect::<Vec<usize>>(), summary.summary.prefix_hit_rate.unwrap())
    };
    let (machines, hits) = run(Routing::Prefix(8));
    assert!((4..40).all(|id| machines[id] == machines[id - 4]), "{machines:?}");
    assert_eq!(hits, f64::from(36 * 48) / f64::from(40 * prompt_tokens));
    assert!(run(Routing::RoundRobin).1 < hits);
}

#[test]
fn a_session_goes_on_when_the_decode_machine_has_answered() {
    let (latency, exits) = (latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let settings = settings(Batching::Depth, "none", 1, 8);
    let groups = [Role::Prompt, Role::Decode].map(|role| group(role, 1, settings, &latency));
    let ms = 1_000_000;
    let link =
        |think: Option<u64>| SessionLink { session: Some(0), think: think.map(Nanos), is_timed: think.is_none() };
    let sessions = Sessions::new([link(None), link(Some(20 * ms))]);
    let closed_loop = ClosedLoop { users: None, sessions: Some(Arc::new(sessions)) };
    let simulation = Simulation::of_groups(&groups, Some(Link { gigabytes_per_s: 0.001, latency_us: 0.0 }), &exits);
    let (summary, _) = summarize(&simulation.unwrap().in_closed_loop(&closed_loop), queued(2, 1, 4));
    let rows: Vec<_> = summary.metrics.requests().collect();
    // A pass for the prompt, a millisecond for the transfer, three passes for the other tokens.
    assert_eq!((1e3 * rows[0].finished_s).round(), 5.0);
    assert_eq!((1e3 * rows[1].arrival_s).round(), 25.0);
    assert_eq!(rows[0].admitted_s, 0.0, "a request is admitted where its prompt runs");
}

/// Checks blocks in every pass, and counts prompt rows.
#[derive(Clone, Debug, Default)]
struct Watch {
    log: Log,
    prompt_rows: u64,
    num_blocks: u32,
    max_batch: u32,
}

impl Watch {
    fn new(settings: &Settings) -> Self {
        Self { num_blocks: settings.num_blocks, max_batch: settings.max_batch, ..Self::default() }
    }
}

impl Observer for Watch {
    fn admitted(&mut self, now: Nanos, request: &Request) {
        self.log.admitted(now, request);
    }
    fn preempted(&mut self, now: Nanos, request: &Request) {
        self.log.preempted(now, request);
    }
    fn pass(&mut self, record: &PassRecord<'_>) {
        let tables = record.pass.tables;
        let held: HashSet<u32> = (0..self.max_batch).flat_map(|slot| tables.blocks(slot).iter().copied()).collect();
        assert_eq!(held.len() as u32 + tables.num_free(), self.num_blocks, "a block has leaked, or is there twice");
        let prompts = record.pass.segments.iter().filter(|segment| segment.kind == RowKind::Prompt);
        self.prompt_rows += prompts.map(|segment| u64::from(segment.tokens)).sum::<u64>();
    }
    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        self.log.token(now, request, token);
    }
    fn finished(&mut self, now: Nanos, request: &Request, first_token: Nanos) {
        self.log.finished(now, request, first_token);
    }
}

const LOOPS: u8 = 3;

/// Settings of a machine with a role; the exit policy and the fill are those of the system.
fn any_machine(role: Role) -> impl Strategy<Value = (Role, usize, Settings)> {
    let batching = prop::sample::select(vec![Batching::Sequence, Batching::Depth]);
    (batching, 1usize..4, (1u32..6, 1u32..20, 10u32..24), any::<bool>(), any::<bool>()).prop_map(
        move |(batching, replicas, (max_batch, prefill_chunk, num_blocks), prefix_caching, async_scheduling)| {
            let settings = Settings {
                prefill_chunk,
                token_budget: 24,
                block_tokens: 4,
                num_blocks,
                prefix_caching,
                async_scheduling,
                ..settings(batching, "none", LOOPS, max_batch)
            };
            (role, replicas, settings)
        },
    )
}

/// Groups of a system: prompt and decode machines, and perhaps machines of both roles.
fn any_groups() -> impl Strategy<Value = Vec<(Role, usize, Settings)>> {
    let exit = prop::sample::select(vec![
        "none",
        "static:1",
        "oracle",
        "confidence:0.5",
        "delayed:top1:0.5",
        "difference:0.5",
    ]);
    let fill = prop::sample::select(KvFill::KEEPING.to_vec());
    let groups = (any_machine(Role::Prompt), any_machine(Role::Decode), prop::option::of(any_machine(Role::Both)));
    (exit, fill, groups).prop_map(|(exit, kv_fill, (prompt, decode, both))| {
        let exit: scheduler::ExitPolicy = exit.parse().unwrap();
        let groups = [Some(prompt), both, Some(decode)].into_iter().flatten();
        let settled = |(role, replicas, settings): (Role, usize, Settings)| {
            let async_scheduling = settings.async_scheduling && exit.is_known_ahead();
            (role, replicas, Settings { exit, kv_fill, async_scheduling, ..settings })
        };
        groups.map(settled).collect()
    })
}

/// Requests of up to 40 tokens, which fit in 10 blocks of 4, each with its exits and whether it follows the one before.
fn any_requests() -> impl Strategy<Value = Vec<(Request, Vec<u8>, bool)>> {
    let request = (0u64..3_000_000, 1u32..20, prop::collection::vec(0..LOOPS, 1..20), any::<bool>());
    prop::collection::vec(request, 1..30).prop_map(|requests| {
        let mut now = Nanos::ZERO;
        let place = |(id, (gap, prompt_tokens, exits, follows)): (u32, (u64, u32, Vec<u8>, bool))| {
            now += Nanos(gap);
            let output_tokens = exits.len() as u32;
            (Request { id, arrival: now, prompt_tokens, output_tokens }, exits, follows && id > 0)
        };
        (0u32..).zip(requests).map(place).collect()
    })
}

fn any_link() -> impl Strategy<Value = Link> {
    (prop::sample::select(vec![1e-5, 1e-3, 1.0, f64::INFINITY]), prop::sample::select(vec![0.0, 3.0, 5_000.0]))
        .prop_map(|(gigabytes_per_s, latency_us)| Link { gigabytes_per_s, latency_us })
}

/// How requests are sent: at their arrivals, in sessions, or by users.
fn any_loop() -> impl Strategy<Value = (bool, Option<Users>)> {
    let users = (1u32..5, prop::sample::select(vec![ThinkTime::NONE, ThinkTime::Exponential(0.01)]))
        .prop_map(|(number, think)| Users { number: NonZeroU32::new(number).unwrap(), think, seed: 5 });
    (any::<bool>(), prop::option::of(users))
}

/// Sessions of consecutive requests, each of which follows the one before or begins a new session.
fn sessions(requests: &[(Request, Vec<u8>, bool)]) -> Sessions {
    let mut session = 0;
    let links: Vec<SessionLink> = requests
        .iter()
        .map(|&(_, _, follows)| {
            session += u32::from(!follows);
            let think = follows.then_some(Nanos(50_000));
            SessionLink { session: Some(session), think, is_timed: think.is_none() }
        })
        .collect();
    Sessions::new(links)
}

proptest! {
    #[test]
    fn no_request_is_lost_doubled_or_reordered_and_every_cache_is_bounded(
        machines in any_groups(), requests in any_requests(), link in any_link(), (in_sessions, users) in any_loop(), routing in 0usize..4,
    ) {
        let latency = latency(LOOPS.into());
        let generations: Vec<Vec<u8>> = requests.iter().map(|(_, exits, _)| exits.clone()).collect();
        let exits = ExitModel::new(&exit_trace(LOOPS, &generations), Draw::Recorded).unwrap();
        let groups: Vec<_> = machines.iter().map(|&(role, replicas, settings)| group(role, replicas, settings, &latency)).collect();
        let routing = [Routing::RoundRobin, Routing::LeastLoaded, Routing::Random(1), Routing::Prefix(2)][routing];
        let sessions = in_sessions.then(|| Arc::new(sessions(&requests)));
        let closed_loop = ClosedLoop { users, sessions };
        let simulation = Simulation::of_groups(&groups, Some(link), &exits).unwrap().with_routing(routing);
        let simulation = match users.is_some() || in_sessions {
            true => simulation.in_closed_loop(&closed_loop),
            false => simulation,
        };
        let sent: Vec<Request> = requests.iter().map(|(request, ..)| *request).collect();
        let mut watches: Vec<Watch> = simulation.settings_of_machines(1).map(Watch::new).collect();
        let outcome = simulation.run(sent.iter().copied(), &mut watches).unwrap();

        let logs: Vec<Log> = watches.iter().map(|watch| watch.log.clone()).collect();
        let mut delivered: HashMap<u32, Vec<(Nanos, Token)>> = HashMap::new();
        for (now, request, token) in tokens(&logs) {
            delivered.entry(request).or_default().push((now, token));
        }
        let events = || logs.iter().flat_map(|log| &log.0);
        let finished: HashMap<u32, Nanos> =
            events().filter(|event| event.2 == Event::Finished).map(|event| (event.1, event.0)).collect();
        prop_assert_eq!(events().filter(|event| event.2 == Event::Finished).count(), requests.len(), "each ends once");
        let deepest = *simulation.settings().exit.exit_depths(LOOPS).end();
        for (request, exits, _) in &requests {
            let tokens = &delivered[&request.id];
            prop_assert_eq!(tokens.len(), exits.len(), "every token once");
            prop_assert!(tokens.iter().zip(0..).all(|((_, token), index)| token.index == index));
            prop_assert!(tokens.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[1].1.previous == Some(pair[0].0)));
            prop_assert!(tokens.iter().all(|(_, token)| token.depth <= deepest));
            prop_assert_eq!(finished[&request.id], tokens[tokens.len() - 1].0);
        }
        if in_sessions {
            for pair in requests.windows(2).filter(|pair| pair[1].2) {
                prop_assert!(finished[&pair[0].0.id] < delivered[&pair[1].0.id][0].0, "an answer comes before what follows");
            }
        }
        // Every request with more than one token was transferred once, unless a machine of both roles has served it.
        let by_role = |role| machines.iter().flat_map(|&(of, replicas, _)| std::iter::repeat_n(of, replicas)).zip(&logs).filter(move |(of, _)| *of == role).map(|(_, log)| log);
        let prompted: HashSet<u32> = by_role(Role::Prompt).flat_map(|log| &log.0).map(|event| event.1).collect();
        let apart = sent.iter().filter(|request| prompted.contains(&request.id) && request.output_tokens > 1);
        prop_assert_eq!(outcome.transfers.count, apart.count() as u64);
        prop_assert!(by_role(Role::Decode).flat_map(|log| &log.0).all(|event| prompted.contains(&event.1)));
        prop_assert_eq!(outcome.tokens, sent.iter().map(|request| u64::from(request.output_tokens)).sum::<u64>());
    }

    #[test]
    fn tokens_exit_at_the_depths_at_which_they_exit_on_one_machine(machines in any_groups(), requests in any_requests(), link in any_link()) {
        let latency = latency(LOOPS.into());
        let generations: Vec<Vec<u8>> = requests.iter().map(|(_, exits, _)| exits.clone()).collect();
        let exits = ExitModel::new(&exit_trace(LOOPS, &generations), Draw::Recorded).unwrap();
        let groups: Vec<_> = machines.iter().map(|&(role, replicas, settings)| group(role, replicas, settings, &latency)).collect();
        let sent: Vec<Request> = requests.iter().map(|(request, ..)| *request).collect();
        let depths = |simulation: Simulation<'_>| -> Vec<(u32, u32, u8)> {
            tokens(&logs(&simulation, sent.iter().copied())).iter().map(|(_, request, token)| (*request, token.index, token.depth)).collect()
        };
        let apart = Simulation::of_groups(&groups, Some(link), &exits).unwrap();
        let alone = Simulation::new(*apart.settings(), &latency, &exits).unwrap();
        prop_assert_eq!(depths(apart), depths(alone));
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let exits = drawn_exits(&[0.5, 0.3, 0.2], 50, 40, 3);
    let mut profile = common::profile(3, &[(Component::Block, 1, 0, 1, 100.0), (Component::Block, 64, 0, 1, 300.0)]);
    profile.meta.kv_bytes_per_token = KV_BYTES;
    profile.points.iter_mut().for_each(|point| point.spread_us = 10.0);
    let latency = LatencyModel::new(&profile).unwrap();
    let machine = |batching| Settings { num_blocks: 24, ..settings(batching, "confidence:0.5", 3, 12) };
    let groups = [
        group(Role::Prompt, 2, machine(Batching::Sequence), &latency),
        group(Role::Decode, 3, machine(Batching::Depth), &latency),
    ];
    let simulations: Vec<Simulation<'_>> = (0..6)
        .map(|seed| {
            let link = Link { gigabytes_per_s: 0.1, latency_us: f64::from(seed as u8) };
            Simulation::of_groups(&groups, Some(link), &exits)
                .unwrap()
                .with_routing(Routing::TwoChoices(seed))
                .with_spread(seed)
        })
        .collect();
    let requests: Vec<Request> = poisson(300, 5_000.0, 30, 20, 9).collect();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            run_all(&simulations, &requests, |simulation| {
                vec![Log::default(); simulation.settings_of_machines(1).count()]
            })
            .unwrap()
        })
    };
    let runs = run(1);
    assert!(runs == run(3));
    assert!(runs.iter().any(|(logs, _)| logs.iter().any(|log| log.0.iter().any(|event| event.2 == Event::Preempted))));
}

#[test]
fn machines_that_make_no_system_are_refused() {
    let latency_1 = latency(1);
    let (no_bytes, exits) = (constant_latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let fit = settings(Batching::Sequence, "none", 1, 4);
    let error =
        |groups: &[MachineGroup<'_>], link| Simulation::of_groups(groups, link, &exits).unwrap_err().to_string();
    let of = |role| group(role, 1, fit, &latency_1);
    let (prompt, decode) = (of(Role::Prompt), of(Role::Decode));
    for (groups, link, expected) in [
        (vec![], Some(FREE), "no replicas: expected at least 1"),
        (vec![prompt], Some(FREE), "prompt machines, but no decode machines: expected at least one"),
        (vec![of(Role::Both), decode], Some(FREE), "decode machines, but no prompt machines: expected at least one"),
        (vec![prompt, decode], None, "without a link for keys and values"),
        (vec![prompt, MachineGroup { replicas: 0, ..decode }], Some(FREE), "a group of decode machines has 0 replicas"),
        (
            vec![prompt, decode],
            Some(Link { gigabytes_per_s: 0.0, latency_us: 0.0 }),
            "transfer: gigabytes_per_s is 0, expected more than 0",
        ),
        (vec![prompt, decode], Some(Link { latency_us: -1.0, ..FREE }), "latency_us is -1, expected 0 or more"),
        (vec![prompt, decode], Some(Link { gigabytes_per_s: f64::NAN, ..FREE }), "gigabytes_per_s is NaN"),
        (
            vec![prompt, group(Role::Decode, 1, settings(Batching::Vanilla, "none", 1, 4), &latency_1)],
            Some(FREE),
            "vanilla batching on decode machines",
        ),
        (
            vec![prompt, group(Role::Decode, 1, settings(Batching::Sequence, "static:0", 1, 4), &latency_1)],
            Some(FREE),
            "the exit policy is static:0 on decode machines and none on prompt machines: expected the same",
        ),
        (
            vec![prompt, group(Role::Decode, 1, fit, &no_bytes)],
            Some(FREE),
            "kv_bytes_per_token is 0 on decode machines and 1000 on prompt machines",
        ),
        (
            [Role::Prompt, Role::Decode].map(|role| group(role, 1, fit, &no_bytes)).to_vec(),
            Some(FREE),
            "0 bytes for the keys and values of a token",
        ),
    ] {
        let found = error(&groups, link);
        assert!(found.contains(expected), "{found}");
    }
    let groups = [prompt, decode];
    let simulation = Simulation::of_groups(&groups, Some(FREE), &exits).unwrap();
    assert_eq!(
        simulation.run(queued(1, 1, 2), &mut [()]).unwrap_err(),
        SimulationError::Roles(RoleError::Observers { observers: 1, machines: 2 })
    );
    // A prompt machine needs room for prompts only, a decode machine for all of a request.
    let small = Settings { num_blocks: 1, ..fit };
    let groups = [group(Role::Prompt, 1, small, &latency_1), decode];
    let simulation = Simulation::of_groups(&groups, Some(FREE), &exits).unwrap();
    assert!(simulation.run(queued(1, 16, 20), &mut [(), ()]).is_ok());
    let error = simulation.run(queued(1, 17, 1), &mut [(), ()]).unwrap_err().to_string();
    assert!(error.contains("request 0 needs the keys and values of 17 tokens, but the cache holds 16"), "{error}");
    let groups = [prompt, group(Role::Decode, 1, small, &latency_1)];
    let simulation = Simulation::of_groups(&groups, Some(FREE), &exits).unwrap();
    let error = simulation.run(queued(1, 10, 8), &mut [(), ()]).unwrap_err().to_string();
    assert!(error.contains("17 tokens, but the cache holds 16"), "{error}");
}

#[test]
fn machines_of_one_role_are_what_they_are_without_groups() {
    let (latency, exits) = (latency(3), drawn_exits(&[0.5, 0.3, 0.2], 50, 40, 3));
    let settings = Settings { num_blocks: 40, ..settings(Batching::Depth, "confidence:0.5", 3, 12) };
    let groups = [group(Role::Both, 3, settings, &latency)];
    let requests = || poisson(200, 500.0, 30, 20, 9);
    let grouped = Simulation::of_groups(&groups, None, &exits).unwrap();
    let plain = Simulation::new(settings, &latency, &exits).unwrap();
    let mut logs = [(); 3].map(|()| Log::default());
    let outcome = plain.run(requests(), &mut logs).unwrap();
    let mut others = [(); 3].map(|()| Log::default());
    assert_eq!(grouped.run(requests(), &mut others).unwrap(), outcome);
    assert_eq!(others, logs);
}

#[test]
fn the_summary_is_of_the_system_and_lines_of_groups_are_of_their_machines() {
    let (latency, exits) = (latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let decode = settings(Batching::Depth, "none", 1, 8);
    let groups = [
        group(Role::Prompt, 1, settings(Batching::Sequence, "none", 1, 4), &latency),
        group(Role::Decode, 2, decode, &latency),
    ];
    let simulation = Simulation::of_groups(&groups, Some(FREE), &exits).unwrap();
    let (SystemSummary { summary, groups, .. }, outcome) = summarize(&simulation, poisson(100, 100.0, 5, 10, 1));
    let Summary { batching, max_batch, replicas, requests, output_tokens, .. } = summary;
    assert_eq!((batching, max_batch, replicas, requests, output_tokens), (Batching::Depth, 8, 3, 100, 1000));
    assert_eq!((summary.transfers, summary.transfer_mean_ms), (Some(100), Some(0.0)));
    assert_eq!(summary.transfer_bytes, Some(outcome.transfers.bytes));
    let [prompt, decoding] = &groups[..] else { panic!("{groups:?}") };
    assert_eq!((prompt.role, prompt.replicas, decoding.role, decoding.replicas), (Role::Prompt, 1, Role::Decode, 2));
    assert_eq!(prompt.passes + decoding.passes, summary.passes);
    let busy = |group: &GroupSummary| group.busy * f64::from(group.replicas);
    assert!((busy(prompt) + busy(decoding) - 3.0 * summary.busy).abs() < 1e-9);
    assert_eq!((summary.mean_running, summary.kv_usage), (decoding.mean_running, decoding.kv_usage));
    assert!(prompt.mean_rows > 4.9 && decoding.mean_rows < 3.0, "{groups:?}");
}
