//! `depthwise capacity`: the highest request rate that meets latency objectives.

use anyhow::{Context, Result};
use scheduler::Settings;
use simulator::{Capacity, CapacityError, CapacitySearch, Extrapolations, capacities};

use crate::arguments::{ObjectiveArgs, SimulationArgs};
use crate::report::print_table;
use crate::runs::warn_of_extrapolations;

/// Find the highest request rate that meets latency objectives, for every batching and exit policy asked for
///
/// The requests come in the rhythm of their trace, faster or slower. A dash says that no rate meets the objectives.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    simulation: SimulationArgs,
    #[command(flatten)]
    objectives: ObjectiveArgs,
    /// Share of requests that must meet all of them
    #[arg(long, default_value_t = 0.9)]
    share: f64,
    /// Width of the answer, relative to it
    #[arg(long, default_value_t = 0.01)]
    tolerance: f64,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let objectives = args.objectives.objectives()?.context("no objective: give --ttft-ms, --tpot-ms or --e2e-ms")?;
    let input = args.simulation.load()?;
    let (share, tolerance) = (args.share, args.tolerance);
    let search = CapacitySearch { objectives, share, replicas: input.machines.replicas, tolerance };
    let found = answers(capacities(&input.simulations()?, &input.workload.requests, &search))?;
    let mut beyond = Extrapolations::default();
    found.iter().flatten().for_each(|found| beyond.merge(&found.extrapolations));
    warn_of_extrapolations(&beyond);
    let header = ["batching", "exit", "batch", "requests/s", "tok/s", "mean depth", "TTFT p90 ms", "TPOT p90 ms"];
    print_table(&header, input.settings.iter().zip(&found).map(line).collect());
    Ok(())
}

/// What was found; none where no rate meets the objectives, which is an answer too.
fn answers(found: Vec<Result<Capacity, CapacityError>>) -> Result<Vec<Option<Capacity>>, CapacityError> {
    let answer = |found| match found {
        Ok(found) => Ok(Some(found)),
        Err(CapacityError::NeverMet { .. }) => Ok(None),
        Err(error) => Err(error),
    };
    found.into_iter().map(answer).collect()
}

fn line((settings, found): (&Settings, &Option<Capacity>)) -> Vec<String> {
    let mut line = vec![settings.batching.to_string(), settings.exit.to_string(), settings.max_batch.to_string()];
    line.extend(match found {
        Some(Capacity { rate_per_s, summary, .. }) => [
            format!("{rate_per_s:.4}"),
            format!("{:.1}", summary.throughput_tok_s),
            format!("{:.3}", summary.mean_depth),
            format!("{:.1}", summary.ttft_p90_ms),
            format!("{:.2}", summary.tpot_p90_ms),
        ],
        None => ["-"; 5].map(String::from),
    });
    line
}
