//! The paper's headline throughputs follow from the profiles and exit traces in `configs/paper`.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use traces::{Component, ExitTrace, LatencyProfile, check_same_model};

#[derive(Debug, Deserialize)]
struct Expected {
    loops: u32,
    lora_rank: u32,
    batching: String,
    exit: String,
    max_batch: u32,
    tok_s: f64,
}

impl Expected {
    fn profile(&self) -> LatencyProfile {
        let name = match self.loops {
            1 => "gemma-vanilla".to_owned(),
            loops => format!("gemma-{loops}-loops-rank-{}", self.lora_rank),
        };
        LatencyProfile::read(configs().join("profiles").join(name)).unwrap()
    }

    fn exits(&self) -> ExitTrace {
        let name = match (self.loops, self.lora_rank) {
            (1, _) => "vanilla",
            (_, 0) => "recursive",
            _ => "relaxed",
        };
        ExitTrace::read(configs().join("exits").join(name)).unwrap()
    }
}

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/paper")
}

fn expected() -> Vec<Expected> {
    let mut reader = csv::Reader::from_path(configs().join("expected.csv")).unwrap();
    reader.deserialize().collect::<Result<_, _>>().unwrap()
}

/// Time of a component at the full batch, in microseconds.
fn time_us(profile: &LatencyProfile, component: Component, rows: u32) -> f64 {
    profile.points_of(component).find(|point| point.rows == rows).expect("a point at the full batch").time_us
}

#[test]
fn every_full_batch_gives_the_published_throughput_within_two_percent() {
    let rows = expected();
    assert_eq!(rows.len(), 7);
    // Vanilla batching is left out: its throughput depends on output lengths that the paper does not publish.
    for row in rows.iter().filter(|row| row.batching != "vanilla") {
        let (profile, exits) = (row.profile(), row.exits());
        check_same_model(&profile, &exits).unwrap();
        assert_eq!(row.exit == "oracle", row.loops > 1);
        let block = time_us(&profile, Component::Block, row.max_batch);
        let embed = time_us(&profile, Component::Embed, row.max_batch);
        let token_us = (embed + exits.mean_oracle_passes() * block) / f64::from(row.max_batch);
        let error = 1e6 / token_us / row.tok_s - 1.0;
        assert!(error.abs() < 0.02, "{row:?}: off by {:.1}%", error * 100.0);
    }
}

#[test]
fn every_generation_has_the_same_share_of_early_exits() {
    for (name, deep, period) in [("vanilla", 0, 16), ("recursive", 3, 16), ("relaxed", 4, 13)] {
        let trace = ExitTrace::read(configs().join("exits").join(name)).unwrap();
        assert_eq!(trace.num_generations(), period);
        for generation in 0..period {
            let tokens = trace.generation(generation);
            assert_eq!(tokens.len(), 4 * period);
            assert_eq!(tokens.filter(|&token| trace.oracle_depth(token) == 1).count(), 4 * deep, "{name} {generation}");
        }
    }
}

#[test]
fn profiles_hold_the_times_of_the_table() {
    #[derive(Deserialize)]
    struct Times {
        loops: u32,
        lora_rank: u32,
        max_batch: u32,
        embed_ms_b1: f64,
        embed_ms_bmax: f64,
        block_ms_b1: f64,
        block_ms_bmax: f64,
    }
    let table =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/paper/time_per_token_a100_16gb_budget.csv");
    if !table.exists() {
        println!("skipped: {} is not there", table.display());
        return;
    }
    let times: Vec<Times> = csv::Reader::from_path(table).unwrap().deserialize().collect::<Result<_, _>>().unwrap();
    for row in expected() {
        let times = times.iter().find(|times| (times.loops, times.lora_rank) == (row.loops, row.lora_rank)).unwrap();
        assert_eq!(times.max_batch, row.max_batch);
        let (profile, batch) = (row.profile(), f64::from(times.max_batch));
        let check = |component, rows, ms: f64| {
            assert!((time_us(&profile, component, rows) - ms * 1e3).abs() < 1e-6, "{component} of {row:?}");
        };
        check(Component::Block, 1, times.block_ms_b1);
        check(Component::Block, times.max_batch, times.block_ms_bmax * batch);
        check(Component::Embed, 1, times.embed_ms_b1);
        check(Component::Embed, times.max_batch, times.embed_ms_bmax * batch);
    }
}
