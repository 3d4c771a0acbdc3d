//! `depthwise timeline`: a simulated run to look at.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use simulator::{Timeline, write_timeline};
use traces::Nanos;

use crate::arguments::SimulationArgs;

/// Write a simulated run as a Chrome trace (passes, rows by depth, admissions, exits, preemptions), for Perfetto
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    simulation: SimulationArgs,
    /// JSON file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Part of the run to keep, in seconds after the first arrival
    #[arg(long, value_names = ["FROM", "TO"], num_args = 2, default_values_t = [0.0, 10.0])]
    keep_s: Vec<f64>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let input = args.simulation.load()?;
    let count = input.settings.len();
    ensure!(count == 1, "{count} combinations of --batching and --exit: a timeline is of one");
    let first = input.workload.requests.first().map_or(Nanos::ZERO, |request| request.arrival);
    let after = |seconds| Nanos(first.0.saturating_add(Nanos::from_secs_f64(seconds).0));
    let window = after(args.keep_s[0])..after(args.keep_s[1]);
    let mut watched: Vec<Timeline> =
        (0..input.machines.replicas as u32).map(|machine| Timeline::new(machine, window.clone())).collect();
    input.simulations()?[0].run(input.workload.requests.iter().copied(), &mut watched)?;
    let partial = args.out.with_extension("partial");
    let write = || -> std::io::Result<()> {
        write_timeline(BufWriter::new(File::create(&partial)?), &watched)?;
        std::fs::rename(&partial, &args.out)
    };
    write().with_context(|| format!("cannot write {}", args.out.display()))?;
    println!("{}: open it in Perfetto or chrome://tracing", args.out.display());
    Ok(())
}
