//! `depthwise capacity`: the highest request rate that meets latency objectives.

use anyhow::{Result, ensure};
use simulator::{CapacitySearch, Objectives, Routing, Simulation, capacity};

use crate::arguments::SimulationArgs;
use crate::report::print_table;

/// Find the highest request rate that meets latency objectives, for every batching and exit policy asked for
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    simulation: SimulationArgs,
    /// Longest time to the first token
    #[arg(long, value_name = "MS")]
    ttft_ms: Option<f64>,
    /// Longest time per token after the first
    #[arg(long, value_name = "MS")]
    tpot_ms: Option<f64>,
    /// Longest time to the last token
    #[arg(long, value_name = "MS")]
    e2e_ms: Option<f64>,
    /// Share of requests that must meet all of them
    #[arg(long, default_value_t = 0.9)]
    share: f64,
    /// Width of the answer, relative to it
    #[arg(long, default_value_t = 0.01)]
    tolerance: f64,
    /// Machines behind the router
    #[arg(long, default_value_t = 1, value_name = "N")]
    replicas: usize,
    /// How requests are spread: round-robin, random[:SEED], least-loaded, two-choices[:SEED]
    #[arg(long, default_value = "round-robin", value_name = "RULE")]
    routing: Routing,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let Args { ttft_ms, tpot_ms, e2e_ms, share, tolerance, replicas, .. } = args;
    let objectives = Objectives { ttft_ms, tpot_ms, e2e_ms };
    ensure!(objectives != Objectives::default(), "no objective: give --ttft-ms, --tpot-ms or --e2e-ms");
    let input = args.simulation.load()?;
    let search = CapacitySearch { objectives, share, replicas, tolerance };
    let header = ["batching", "exit", "batch", "requests/s", "tok/s", "mean depth", "TTFT p90 ms", "TPOT p90 ms"];
    let mut rows = Vec::new();
    for &settings in &input.settings {
        let simulation = Simulation::new(settings, &input.latency, &input.exits)?.with_routing(args.routing);
        let found = capacity(&simulation, &input.requests, &search)?;
        let summary = &found.summary;
        rows.push(vec![
            settings.batching.to_string(),
            settings.exit.to_string(),
            settings.max_batch.to_string(),
            format!("{:.4}", found.rate_per_s),
            format!("{:.1}", summary.throughput_tok_s),
            format!("{:.3}", summary.mean_depth),
            format!("{:.1}", summary.ttft_p90_ms),
            format!("{:.2}", summary.tpot_p90_ms),
        ]);
    }
    print_table(&header, rows);
    Ok(())
}
