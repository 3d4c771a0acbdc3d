//! Requests and their rows are held while they are in flight, and no longer.

mod common;

use std::cell::Cell;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};

use common::{PASS, drawn_exits, poisson, profile, queued, settings, varied_latency};
use latency::LatencyModel;
use scheduler::Batching;
use simulator::metrics::RequestRow;
use simulator::{ExitModel, Link, MachineGroup, Metrics, RequestLog, Role, Routing, Simulation};
use traces::{ClosedLoop, Component, Request};

fn exits() -> ExitModel {
    drawn_exits(&[0.5, 0.3, 0.2], 50, 12, 3)
}

/// Runs with a log of rows, and without. Returns the rows of both, and the most requests that had been taken from their
/// source while their rows had not been passed on.
fn logged(
    simulation: &Simulation<'_>,
    machines: usize,
    requests: impl Iterator<Item = Request> + Clone,
) -> (Vec<RequestRow>, Vec<RequestRow>, usize) {
    let of = |metrics: &dyn Fn(Metrics) -> Metrics| -> Vec<Metrics> {
        simulation.settings_of_machines(machines).map(|settings| metrics(Metrics::new(settings))).collect()
    };
    let mut kept = of(&|metrics| metrics.with_requests());
    simulation.run(requests.clone(), &mut kept).unwrap();
    let kept = Metrics::merged(kept).unwrap().requests().copied().collect();

    let passed_on: Arc<Mutex<Vec<RequestRow>>> = Arc::default();
    let rows = Arc::clone(&passed_on);
    let log = RequestLog::new(move |row| {
        rows.lock().unwrap().extend(row);
        Ok(())
    });
    let mut metrics = of(&|metrics| metrics.with_request_log(log.clone()));
    let (taken, most) = (Cell::new(0), Cell::new(0));
    let requests = requests.inspect(|_| {
        taken.set(taken.get() + 1);
        most.set(most.get().max(taken.get() - passed_on.lock().unwrap().len()));
    });
    simulation.run(requests, &mut metrics).unwrap();
    log.finish().unwrap();
    assert_eq!(Metrics::merged(metrics).unwrap().requests().count(), 0, "no row is kept");
    (Arc::into_inner(passed_on).map_or_else(Vec::new, |rows| rows.into_inner().unwrap()), kept, most.get())
}

/// Everything that a row says, bit by bit.
fn bits(rows: &[RequestRow]) -> Vec<String> {
    rows.iter().map(|row| format!("{row:?}")).collect()
}

/// Ten times as many requests have the same rows as if they were kept, and no more of them at the same time.
fn assert_bounded(simulation: &Simulation<'_>, machines: usize, requests: impl Fn(u32) -> Vec<Request>, bound: usize) {
    for count in [2_000, 20_000] {
        let (rows, kept, most) = logged(simulation, machines, requests(count).into_iter());
        assert_eq!(rows.len(), count as usize);
        assert_eq!(bits(&rows), bits(&kept), "in the same order");
        assert!((1..=bound).contains(&most), "{most} of {count} requests were held");
    }
}

#[test]
fn rows_of_requests_are_passed_on_while_later_requests_are_still_to_come() {
    let (latency, exits) = (varied_latency(3), exits());
    let settings = settings(Batching::Depth, "confidence:0.5", 3, 8);
    let simulation = Simulation::new(settings, &latency, &exits).unwrap().with_routing(Routing::LeastLoaded);
    assert_bounded(&simulation, 3, |count| poisson(count, 400.0, 5, 12, 7).collect(), 300);
    let closed_loop = ClosedLoop::in_flight(NonZeroU32::new(16).unwrap());
    let simulation = simulation.in_closed_loop(&closed_loop);
    assert_bounded(&simulation, 2, |count| queued(count, 5, 12).collect(), 64);
}

#[test]
fn rows_of_requests_that_two_machines_served_come_together() {
    let points = [1, 1 << 20].map(|rows| (Component::Block, rows, 0, 1, PASS.as_micros_f64()));
    let mut profile = profile(3, &points);
    profile.meta.kv_bytes_per_token = 1000;
    let (latency, exits) = (LatencyModel::new(&profile).unwrap(), exits());
    let settings = settings(Batching::Sequence, "none", 3, 8);
    let groups = [
        MachineGroup { role: Role::Prompt, replicas: 2, settings, latency: &latency },
        MachineGroup { role: Role::Decode, replicas: 1, settings, latency: &latency },
    ];
    let link = Link { gigabytes_per_s: f64::INFINITY, latency_us: 5.0 };
    let closed_loop = ClosedLoop::in_flight(NonZeroU32::new(16).unwrap());
    let simulation = Simulation::of_groups(&groups, Some(link), &exits).unwrap().in_closed_loop(&closed_loop);
    assert_bounded(&simulation, 3, |count| queued(count, 5, 12).collect(), 64);
}

#[test]
fn a_log_that_cannot_write_says_so() {
    let (latency, exits) = (varied_latency(3), exits());
    let settings = settings(Batching::Depth, "none", 3, 8);
    let log = RequestLog::new(|_| Err(std::io::Error::other("no space left")));
    let mut metrics = [Metrics::new(&settings).with_request_log(log.clone())];
    let simulation = Simulation::new(settings, &latency, &exits).unwrap();
    simulation.run(queued(20, 5, 12).take_while(|_| !log.has_failed()), &mut metrics).unwrap();
    assert!(log.has_failed());
    assert_eq!(log.finish().unwrap_err().to_string(), "no space left");
}
