//! The paper's headline table, simulated: all requests queued, a full batch, oracle exits at no cost.

use std::path::{Path, PathBuf};

use latency::LatencyModel;
use scheduler::{Batching, Settings};
use serde::Deserialize;
use simulator::{Draw, ExitModel, Metrics, Simulation, Source};
use traces::{Arrivals, ExitTrace, Generate, LatencyProfile, Length, Request, check_same_model};

#[derive(Debug, Deserialize)]
struct Expected {
    loops: u8,
    lora_rank: u32,
    batching: Batching,
    exit: String,
    max_batch: u32,
    tok_s: f64,
}

/// Equal lengths and prompts of one token: the paper's throughput counts decoding only.
fn requests() -> impl Iterator<Item = Request> {
    let generate = Generate {
        count: 1677,
        seed: 0,
        arrivals: Arrivals::AllAtOnce,
        prompt_tokens: Some(Length::Fixed(1)),
        output_tokens: Some(Length::Fixed(256)),
        lengths_from: None,
    };
    generate.requests(Path::new("")).unwrap()
}

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/paper")
}

fn simulated_tok_s(row: &Expected) -> f64 {
    let (profile, exits) = match (row.loops, row.lora_rank) {
        (1, _) => ("gemma-vanilla".to_owned(), "vanilla"),
        (loops, 0) => (format!("gemma-{loops}-loops-rank-0"), "recursive"),
        (loops, rank) => (format!("gemma-{loops}-loops-rank-{rank}"), "relaxed"),
    };
    let profile = LatencyProfile::read(configs().join("profiles").join(profile)).unwrap();
    let exits = ExitTrace::read(configs().join("exits").join(exits)).unwrap();
    check_same_model(&profile, &exits).unwrap();
    let settings = Settings {
        max_batch: row.max_batch,
        token_budget: row.max_batch,
        prefill_chunk: row.max_batch,
        num_blocks: row.max_batch * 256 / 16,
        ..Settings::new(row.batching, row.exit.parse().unwrap(), row.loops)
    };
    let (latency, exits) = (LatencyModel::new(&profile).unwrap(), ExitModel::new(&exits, Draw::Seeded(1)).unwrap());
    let mut metrics = Metrics::new(&settings);
    let simulation = Simulation::new(settings, &latency, &exits).unwrap();
    let outcome = simulation.run(requests(), std::slice::from_mut(&mut metrics)).unwrap();
    assert!(outcome.extrapolations.is_empty(), "{row:?} was extrapolated");
    let summary = metrics.summary(Source::Simulated, Some(outcome.token_agreement()));
    assert_eq!(summary.token_agreement, Some(1.0));
    println!("{row:?}: simulated {:.1}, mean depth {:.4}", summary.throughput_tok_s, summary.mean_depth);
    summary.throughput_tok_s
}

#[test]
fn published_throughputs_come_out_within_two_percent() {
    let mut table = csv::Reader::from_path(configs().join("expected.csv")).unwrap();
    let rows: Vec<Expected> = table.deserialize().collect::<Result<_, _>>().unwrap();
    assert_eq!(rows.len(), 7);
    // Not the vanilla row: vanilla batching depends on output lengths that the paper does not publish.
    for row in rows.iter().filter(|row| row.batching != Batching::Vanilla) {
        let error = simulated_tok_s(row) / row.tok_s - 1.0;
        assert!(error.abs() < 0.02, "{row:?}: off by {:.1}%", error * 100.0);
    }
}

#[test]
fn vanilla_batching_of_equal_lengths_is_sequence_wise() {
    let row = |batching| Expected { loops: 1, lora_rank: 0, batching, exit: "none".into(), max_batch: 43, tok_s: 0.0 };
    assert_eq!(simulated_tok_s(&row(Batching::Vanilla)), simulated_tok_s(&row(Batching::Sequence)));
}
