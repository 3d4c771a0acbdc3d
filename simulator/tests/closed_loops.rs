//! Closed loops: users and sessions that send requests when others have been answered.

mod common;

use std::cell::Cell;
use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use common::{PASS, constant_latency, drawn_exits, queued, settings, varied_latency};
use proptest::prelude::*;
use scheduler::{Batching, Observer, Settings};
use simulator::metrics::RequestRow;
use simulator::{CapacityError, CapacitySearch, ExitModel, Metrics, Objectives, Simulation, capacity};
use traces::{ClosedLoop, Link, Nanos, Request, Sessions, ThinkTime, Users};

fn users(number: u32, think: ThinkTime) -> ClosedLoop {
    let users = Users { number: NonZeroU32::new(number).unwrap(), think, seed: 5 };
    ClosedLoop { users: Some(users), sessions: None }
}

/// The link of a request that is sent this number of nanoseconds after the previous answer of its session.
fn link(session: u32, think: Option<u64>) -> Link {
    Link { session: Some(session), think: think.map(Nanos), is_timed: think.is_none() }
}

fn rows(metrics: &Metrics) -> Vec<RequestRow> {
    metrics.requests().copied().collect()
}

/// What each of the requests was like, and the metrics.
fn run(
    settings: Settings,
    exits: &ExitModel,
    closed_loop: &ClosedLoop,
    requests: impl IntoIterator<Item = Request>,
) -> (Vec<RequestRow>, Metrics) {
    let latency = constant_latency(settings.num_loops.into());
    let mut metrics = [Metrics::new(&settings).with_requests()];
    let simulation = Simulation::new(settings, &latency, exits).unwrap().in_closed_loop(closed_loop);
    simulation.run(requests, &mut metrics).unwrap();
    let [metrics] = metrics;
    (rows(&metrics), metrics)
}

#[test]
fn users_throughput_response_and_think_time_obey_the_interactive_response_time_law() {
    let exits = drawn_exits(&[0.5, 0.3, 0.2], 50, 12, 3);
    let latency = varied_latency(3);
    for (number, think, batching) in [
        (6, ThinkTime::Exponential(0.02), Batching::Depth),
        (40, ThinkTime::Exponential(0.02), Batching::Sequence),
        (16, ThinkTime::Fixed(0.005), Batching::Depth),
        (16, ThinkTime::NONE, Batching::Vanilla),
    ] {
        let settings = settings(batching, "confidence:0.5", 3, 8);
        let mut metrics = [Metrics::new(&settings).with_requests()];
        let closed_loop = users(number, think);
        let simulation = Simulation::new(settings, &latency, &exits).unwrap().in_closed_loop(&closed_loop);
        let count = 20_000;
        simulation.run(queued(count, 6, 12), &mut metrics).unwrap();
        let throughput = f64::from(count) / metrics[0].makespan().as_secs_f64();
        let response = metrics[0].end_to_end().mean_ms() * 1e-3;
        let mean_think = match think {
            ThinkTime::Fixed(seconds) | ThinkTime::Exponential(seconds) => seconds,
        };
        let found = throughput * (response + mean_think);
        assert!((found / f64::from(number) - 1.0).abs() < 0.015, "{number} users, {batching}: {found}");
    }
}

#[test]
fn one_user_is_served_and_thinks_in_turn() {
    let exits = drawn_exits(&[1.0], 1, 1, 1);
    let (rows, metrics) =
        run(settings(Batching::Depth, "none", 1, 4), &exits, &users(1, ThinkTime::Fixed(0.25)), queued(40, 1, 3));
    let (service, think) = (3.0 * PASS.as_secs_f64(), 0.25);
    assert_eq!(rows.len(), 40);
    for (number, row) in rows.iter().enumerate() {
        let begins = number as f64 * (service + think);
        assert!((row.arrival_s - begins).abs() < 1e-9, "{number}: {}", row.arrival_s);
        assert!((row.finished_s - begins - service).abs() < 1e-9);
    }
    assert!((metrics.makespan().as_secs_f64() - 40.0 * service - 39.0 * think).abs() < 1e-9);
}

#[test]
fn users_without_think_time_keep_so_many_requests_in_flight() {
    // A machine of two places, whose passes all take the same time: with four users two wait at any time.
    let exits = drawn_exits(&[1.0], 1, 1, 1);
    let (rows, metrics) =
        run(settings(Batching::Depth, "none", 1, 2), &exits, &users(4, ThinkTime::NONE), queued(60, 1, 5));
    let makespan = 60.0 / 2.0 * 5.0 * PASS.as_secs_f64();
    assert!((metrics.makespan().as_secs_f64() - makespan).abs() < 1e-9);
    // All but the first and the last few wait for two turns of five passes.
    assert!(rows[4..58].iter().all(|row| (row.e2e_ms - 10.0).abs() < 1e-9));
}

#[test]
fn an_agent_waits_for_its_tools_and_others_do_not_wait_for_it() {
    let exits = drawn_exits(&[1.0], 1, 1, 1);
    let ms = 1_000_000;
    let links =
        [link(0, None), Link::ALONE, link(0, Some(20 * ms)), link(0, Some(7 * ms)), link(1, None), link(1, None)];
    let closed_loop = ClosedLoop { users: None, sessions: Some(Arc::new(Sessions::new(links))) };
    // The third and the fourth are at their earliest; those of the second session have their own times.
    let arrivals = [1, 2, 21, 28, 30, 31];
    let request = |(id, &at): (u32, &u64)| Request { id, arrival: Nanos(at * ms), prompt_tokens: 1, output_tokens: 4 };
    let requests: Vec<Request> = (0..).zip(&arrivals).map(request).collect();
    let (rows, _) = run(settings(Batching::Depth, "none", 1, 8), &exits, &closed_loop, requests);
    let begins: Vec<f64> = rows.iter().map(|row| (1e3 * row.arrival_s).round()).collect();
    // The first is answered at 5, its tool ends at 25; the second request of the agent is answered at 29.
    assert_eq!(begins, [1.0, 2.0, 25.0, 36.0, 30.0, 31.0]);
    assert_eq!((1e3 * rows[2].finished_s).round(), 29.0);

    // With one user, sessions follow each other; the second request of the last session follows at once.
    let one = ClosedLoop { users: users(1, ThinkTime::Fixed(0.1)).users, ..closed_loop };
    let requests = (0..).zip(&arrivals).map(request);
    let (rows, _) = run(settings(Batching::Depth, "none", 1, 8), &exits, &one, requests);
    let begins: Vec<f64> = rows.iter().map(|row| (1e3 * row.arrival_s).round()).collect();
    // Agent: 0 to 4, 24 to 28, 35 to 39; alone: 139 to 143; session: 243 to 247, 347.
    assert_eq!(begins, [0.0, 139.0, 24.0, 35.0, 243.0, 347.0]);
}

#[test]
fn requests_are_made_when_a_user_is_free_to_send_them() {
    /// Counts finished requests.
    struct Finished<'a>(&'a Cell<u32>);
    impl Observer for Finished<'_> {
        fn finished(&mut self, _: Nanos, _: &Request, _: Nanos) {
            self.0.set(self.0.get() + 1);
        }
    }
    let (made, finished) = (Cell::new(0_u32), Cell::new(0_u32));
    let number = 7;
    let requests = queued(100_000, 1, 1).inspect(|_| {
        made.set(made.get() + 1);
        assert!(made.get() - finished.get() <= number, "one for each user");
    });
    let exits = drawn_exits(&[1.0], 1, 1, 1);
    let latency = constant_latency(1);
    let closed_loop = users(number, ThinkTime::Exponential(0.001));
    let simulation = Simulation::new(settings(Batching::Depth, "none", 1, 4), &latency, &exits).unwrap();
    simulation.in_closed_loop(&closed_loop).run(requests, &mut [Finished(&finished)]).unwrap();
    assert_eq!((made.get(), finished.get()), (100_000, 100_000));
}

#[test]
fn a_rate_is_not_searched_for_users() {
    let exits = drawn_exits(&[1.0], 1, 1, 1);
    let latency = constant_latency(1);
    let closed_loop = users(3, ThinkTime::NONE);
    let simulation = Simulation::new(settings(Batching::Depth, "none", 1, 4), &latency, &exits).unwrap();
    let objectives = Objectives { ttft_ms: Some(1.0), ..Objectives::default() };
    let search = CapacitySearch { objectives, share: 0.9, replicas: 1, tolerance: 0.1 };
    let requests: Vec<Request> = queued(5, 1, 1).collect();
    let found = capacity(&simulation.in_closed_loop(&closed_loop), &requests, &search, |_| {});
    assert_eq!(found, Err(CapacityError::Users));
}

/// Requests of up to 40 tokens in up to five sessions, some of which have think times.
fn any_sessions() -> impl Strategy<Value = (Vec<Request>, Sessions)> {
    let request =
        (0..3_000_000_u64, 1..20_u32, 1..20_u32, prop::option::of(0..5_u32), prop::option::of(0..9_000_000_u64));
    prop::collection::vec(request, 1..40).prop_map(|rows| {
        let (mut requests, mut links, mut arrival) = (Vec::new(), Vec::new(), Nanos::ZERO);
        for (id, (gap, prompt_tokens, output_tokens, session, think)) in (0..).zip(rows) {
            arrival += Nanos(gap);
            requests.push(Request { id, arrival, prompt_tokens, output_tokens });
            links.push(Link { session, think: think.map(Nanos), is_timed: true });
        }
        (requests, Sessions::new(links))
    })
}

fn any_settings() -> impl Strategy<Value = Settings> {
    (prop::sample::select(Batching::ALL.to_vec()), 1..6_u32, 10..24_u32, any::<bool>()).prop_map(
        |(batching, max_batch, num_blocks, async_scheduling)| Settings {
            token_budget: 24,
            prefill_chunk: 7,
            block_tokens: 4,
            num_blocks,
            async_scheduling,
            ..settings(batching, "none", 3, max_batch)
        },
    )
}

proptest! {
    #[test]
    fn no_request_is_lost_doubled_or_sent_before_the_answer_that_it_waits_for(
        settings in any_settings(),
        (requests, sessions) in any_sessions(),
        number in prop::option::of(1..6_u32),
        machines in 1..4_usize,
    ) {
        /// Counts how often each request was finished, and preemptions.
        #[derive(Default)]
        struct Ends(HashMap<u32, u32>);
        impl Observer for Ends {
            fn finished(&mut self, _: Nanos, request: &Request, _: Nanos) {
                *self.0.entry(request.id).or_default() += 1;
            }
        }
        let (latency, exits) = (varied_latency(3), drawn_exits(&[0.5, 0.3, 0.2], 50, 20, 3));
        let think = ThinkTime::Exponential(0.002);
        let users = number.map(|number| Users { number: NonZeroU32::new(number).unwrap(), think, seed: 2 });
        let closed_loop = ClosedLoop { users, sessions: Some(Arc::new(sessions.clone())) };
        let simulation = Simulation::new(settings, &latency, &exits).unwrap().in_closed_loop(&closed_loop);
        let new = || (Metrics::new(&settings).with_requests(), Ends::default());
        let mut observers: Vec<_> = (0..machines).map(|_| new()).collect();
        simulation.run(requests.iter().copied(), &mut observers).unwrap();
        let mut ends = HashMap::new();
        let metrics: Vec<Metrics> = observers.into_iter().map(|(metrics, Ends(of_one))| {
            of_one.into_iter().for_each(|(id, count)| *ends.entry(id).or_insert(0) += count);
            metrics
        }).collect();
        prop_assert_eq!(ends.len(), requests.len());
        prop_assert!(ends.values().all(|&count| count == 1));

        let rows = rows(&Metrics::merged(metrics).unwrap());
        prop_assert_eq!(rows.len(), requests.len());
        let mut last: HashMap<u32, &RequestRow> = HashMap::new();
        for (row, request) in rows.iter().zip(&requests) {
            prop_assert_eq!((row.prompt_tokens, row.output_tokens), (request.prompt_tokens, request.output_tokens));
            let link = sessions.of(request.id);
            let before = link.session.and_then(|session| last.insert(session, row));
            match (before, link.think, users) {
                (Some(before), Some(think), _) => {
                    let expected = before.finished_s + think.as_secs_f64();
                    prop_assert!((row.arrival_s - expected).abs() < 1e-9, "{} and {}", row.arrival_s, expected);
                }
                (Some(before), None, Some(_)) => prop_assert!(row.arrival_s >= before.finished_s),
                (_, None, None) => prop_assert!((row.arrival_s - request.arrival.as_secs_f64()).abs() < 1e-12),
                _ => {}
            }
        }
        if let Some(users) = users {
            for row in &rows {
                let at = |other: &&RequestRow| other.arrival_s <= row.arrival_s && row.arrival_s < other.finished_s;
                prop_assert!(rows.iter().filter(at).count() <= users.number.get() as usize);
            }
        }
    }
}
