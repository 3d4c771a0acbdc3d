//! `depthwise timeline`: a simulated run to look at.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use experiments::results::write_file;
use simulator::{TIMELINE_BEGINNING, Timeline, write_timeline};
use traces::{Nanos, Requests};

use crate::arguments::SimulationArgs;
use crate::output::say;

/// The end of the latest window: thirty years.
const MOST_SECONDS: f64 = 1e9;

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

impl Args {
    /// See [`SimulationArgs::is_of_options`].
    pub fn is_of_options(&self) -> bool {
        self.simulation.is_of_options()
    }
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let input = args.simulation.load()?;
    let count = input.settings.len();
    ensure!(count == 1, "{count} combinations of --batching and --exit: a timeline is of one");
    let (from, to) = (args.keep_s[0], args.keep_s[1]);
    ensure!(
        (0.0..to).contains(&from) && to <= MOST_SECONDS,
        "--keep-s {from} {to}: expected FROM and TO with 0 <= FROM < TO <= {MOST_SECONDS}"
    );
    // Users begin at time 0, whatever the arrivals of the trace.
    let workload = &input.workload;
    let first = if workload.has_users() { Nanos::ZERO } else { workload.requests.first_arrival() };
    let window = first + Nanos::from_secs_f64(from)..first + Nanos::from_secs_f64(to);
    let groups = input.groups();
    let simulation = input.simulations(&groups)?[0];
    let machines = (0..).zip(simulation.settings_of_machines(input.machines.replicas));
    let mut watched: Vec<Timeline> = machines.map(|(machine, _)| Timeline::new(machine, window.clone())).collect();
    workload.requests.read(|requests| simulation.run(requests, &mut watched))??;
    write_file(&args.out, TIMELINE_BEGINNING, |out| write_timeline(out, &watched))?;
    say!("{}: open it in Perfetto or chrome://tracing", args.out.display());
    Ok(())
}
