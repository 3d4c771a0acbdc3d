//! Capacity of systems whose highest rate is known.

mod common;

use common::{PASS, constant_latency, drawn_exits, poisson, queued, settings, varied_latency};
use scheduler::Batching;
use simulator::{CapacityError, CapacitySearch, Objectives, Simulation, capacity};
use traces::{Nanos, Request};

/// A request every 10 ms. With one token and one loop, each request occupies the machine for one pass.
fn regular(count: u32) -> Vec<Request> {
    let request = |id| Request { id, arrival: Nanos(10_000_000 * u64::from(id)), prompt_tokens: 1, output_tokens: 1 };
    (0..count).map(request).collect()
}

fn search(e2e_ms: f64) -> CapacitySearch {
    let objectives = Objectives { e2e_ms: Some(e2e_ms), ..Objectives::default() };
    CapacitySearch { objectives, share: 0.9, replicas: 1, tolerance: 0.001 }
}

#[test]
fn regular_requests_are_served_up_to_the_rate_of_the_machines() {
    let (latency, exits) = (constant_latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let simulation = Simulation::new(settings(Batching::Depth, "none", 1, 1), &latency, &exits).unwrap();
    for replicas in [1, 3] {
        let search = CapacitySearch { replicas, ..search(1.001 * PASS.as_millis_f64()) };
        let mut tries = 0_u32;
        let found = capacity(&simulation, &regular(1000), &search, |_| tries += 1).unwrap();
        assert!(tries.abs_diff(search.usual_tries()) <= 5, "{tries} tries");
        let expected = replicas as f64 / PASS.as_secs_f64();
        assert!((found.rate_per_s / expected - 1.0).abs() < 0.002, "{} for {expected}", found.rate_per_s);
        assert!(found.summary.objectives_met.unwrap() >= 0.9);
        let goodput = found.summary.goodput_req_s.unwrap();
        assert!((goodput / expected - 1.0).abs() < 0.01, "{goodput} for {expected}");
    }
}

#[test]
fn a_trace_above_capacity_is_slowed_down_to_it() {
    let (latency, exits) = (constant_latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let simulation = Simulation::new(settings(Batching::Depth, "none", 1, 1), &latency, &exits).unwrap();
    let fast: Vec<Request> = regular(1000)
        .into_iter()
        .map(|request| Request { arrival: Nanos(request.arrival.0 / 100), ..request })
        .collect();
    let found = capacity(&simulation, &fast, &search(1.001 * PASS.as_millis_f64()), |_| ()).unwrap();
    assert!((found.rate_per_s * PASS.as_secs_f64() - 1.0).abs() < 0.002, "{}", found.rate_per_s);
}

#[test]
fn early_exits_raise_capacity_most_under_depth_wise_batching() {
    let (latency, exits) = (varied_latency(3), drawn_exits(&[0.7, 0.2, 0.1], 100, 50, 3));
    let requests: Vec<Request> = poisson(1500, 20.0, 30, 50, 5).collect();
    let simulations = [(Batching::Sequence, "none"), (Batching::Sequence, "oracle"), (Batching::Depth, "oracle")]
        .map(|(batching, exit)| Simulation::new(settings(batching, exit, 3, 16), &latency, &exits).unwrap());
    let objectives = Objectives { ttft_ms: Some(50.0), tpot_ms: Some(2.0), e2e_ms: None };
    let search = CapacitySearch { objectives, share: 0.95, replicas: 1, tolerance: 0.01 };
    let [lockstep, lockstep_exits, depth_exits] =
        simulations.map(|simulation| capacity(&simulation, &requests, &search, |_| ()).unwrap().rate_per_s);
    assert!(lockstep < lockstep_exits && 1.5 * lockstep < depth_exits, "{lockstep} {lockstep_exits} {depth_exits}");
}

#[test]
fn objectives_that_single_requests_miss_give_no_capacity() {
    let (latency, exits) = (constant_latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let simulation = Simulation::new(settings(Batching::Depth, "none", 1, 1), &latency, &exits).unwrap();
    let found = capacity(&simulation, &regular(9), &search(0.5), |_| ()).unwrap();
    assert_eq!((found.rate_per_s, found.summary.objectives_met), (0.0, Some(0.0)));
}

#[test]
fn searches_without_an_answer_say_why() {
    let (latency, exits) = (constant_latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let simulation = Simulation::new(settings(Batching::Depth, "none", 1, 1), &latency, &exits).unwrap();
    let error = |requests: &[Request], search| capacity(&simulation, requests, &search, |_| ()).unwrap_err();
    assert!(matches!(error(&regular(9), search(100.0)), CapacityError::AlwaysMet { .. }));
    assert_eq!(error(&queued(5, 1, 1).collect::<Vec<_>>(), search(1.5)), CapacityError::NoRate);
    assert_eq!(error(&[], search(1.5)), CapacityError::NoRate);
    let bad = CapacitySearch { share: 1.5, ..search(1.5) };
    assert!(error(&regular(9), bad).to_string().contains("share of a capacity search is 1.5"));
    let bad = CapacitySearch { tolerance: f64::NAN, ..search(1.5) };
    assert!(error(&regular(9), bad).to_string().contains("tolerance"));
    let none = CapacitySearch { replicas: 0, ..search(1.5) };
    assert!(matches!(error(&regular(9), none), CapacityError::Simulation(_)));
}
