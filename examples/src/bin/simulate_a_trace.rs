//! Simulate a trace of requests: `cargo run --release -p depthwise-examples --bin simulate_a_trace [REQUESTS]`
//!
//! The requests come from a CSV file, the times of a machine from a profile that is made here, and the exit depths of
//! tokens from numbers that are made here. Sequence-wise and depth-wise batching serve the same requests.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::slice;

use latency::LatencyModel;
use scheduler::{Batching, Settings};
use simulator::{Draw, ExitModel, Metrics, Simulation, Source};
use traces::{Component, LatencyProfile, Point, ProfileMeta, RequestTrace};

const NUM_LOOPS: u8 = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let shipped = || Path::new(env!("CARGO_MANIFEST_DIR")).join("requests.csv");
    let path = std::env::args().nth(1).map_or_else(shipped, PathBuf::from);
    let trace = RequestTrace::read(path)?;
    let latency = LatencyModel::new(&profile())?;
    let exits = ExitModel::from_depths(&exit_depths(), NUM_LOOPS.into(), LatencyProfile::ANY_MODEL, Draw::Seeded(1))?;

    println!("{} requests, {:.1} per second", trace.requests.len(), trace.rate_per_s().unwrap_or(f64::NAN));
    println!("batching   tokens/s   mean depth   TTFT p99 ms   TPOT mean ms");
    for batching in [Batching::Sequence, Batching::Depth] {
        let settings = Settings { max_batch: 16, ..Settings::new(batching, "oracle".parse()?, NUM_LOOPS) };
        let mut metrics = Metrics::new(&settings);
        let simulation = Simulation::new(settings, &latency, &exits)?;
        let outcome = simulation.run(trace.requests.iter().copied(), slice::from_mut(&mut metrics))?;
        let summary = metrics.summary(Source::Simulated, Some(outcome.token_agreement()));
        println!(
            "{:<8} {:>10.0} {:>12.2} {:>13.1} {:>14.2}",
            batching.name(),
            summary.throughput_tok_s,
            summary.mean_depth,
            summary.ttft_p99_ms,
            summary.tpot_mean_ms
        );
    }
    Ok(())
}

/// A machine like a GPU that decodes: a pass reads all weights of the block, and a row adds little. Attention takes no
/// time here, since it has no points.
fn profile() -> LatencyProfile {
    let point = |component, rows, time_us| Point {
        component,
        rows,
        kv_tokens: 0,
        depths: 1,
        time_us,
        spread_us: 0.0,
        repeats: 1,
    };
    let of_rows = |rows: u32| {
        let size = f64::from(rows);
        [
            point(Component::Block, rows, 400.0 + 0.5 * size),
            point(Component::Embed, rows, 2.0 + 0.01 * size),
            point(Component::Head, rows, 60.0 + 0.2 * size),
        ]
    };
    LatencyProfile {
        meta: ProfileMeta {
            schema_version: LatencyProfile::SCHEMA_VERSION,
            model: "made up".to_owned(),
            fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
            num_loops: NUM_LOOPS.into(),
            device: "made up".to_owned(),
            software: "none".to_owned(),
            source: "examples/src/bin/simulate_a_trace.rs".to_owned(),
            overhead_us: 10.0,
            weight_bytes: 0,
            kv_bytes_per_token: 0,
            memory: None,
            kv_fill: None,
            decode_q_len: None,
            heads_ahead_from: None,
        },
        points: [1, 16, 256, 2048].into_iter().flat_map(of_rows).collect(),
        mixed_attention: None,
    }
}

/// Exit depths of 50 generations of 400 tokens: six tokens in ten exit at depth 0, one in ten runs all four loops.
fn exit_depths() -> Vec<Vec<u8>> {
    const DEPTHS: [u8; 10] = [0, 2, 0, 0, 1, 0, 0, 3, 0, 1];
    (0..50)
        .map(|generation| (0..400).map(|token| DEPTHS[(7 * generation + 3 * token + token / 10) % 10]).collect())
        .collect()
}
