//! `depthwise capacity`: the highest request rate that meets latency objectives.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::error::ErrorKind;
use clap::{ArgMatches, Command, FromArgMatches};
use experiments::SweepSpec;
use experiments::sweep::Earlier;
use experiments::sweep::figures::CAPACITY;
use experiments::sweep::spec::CapacitySpec;
use simulator::Table;

use crate::arguments::{ObjectiveArgs, SimulationArgs};
use crate::interrupt;
use crate::output::say;
use crate::progress::Terminal;
use crate::report::print_table;

/// Find the highest request rate that meets latency objectives, for every given combination of batching and exit
/// policies
///
/// The simulation is described by options, as for `simulate`, or by the YAML file of a sweep. Arrivals keep the pattern
/// of the trace and are sped up or slowed down. A dash in the table means that no rate meets the objectives.
#[derive(Debug, clap::Args)]
pub struct Args {
    // Before `config`, which is gone from what was matched once it is read.
    #[command(flatten)]
    simulation: UnlessConfig,
    /// YAML file of a sweep, instead of the options that describe the simulation
    #[arg(conflicts_with_all = [
        "RequestArgs", "ServingArgs", "profile", "exits", "replicas", "machines", "routing", "spread", "seed",
    ])]
    config: Option<PathBuf>,
    #[command(flatten)]
    objectives: ObjectiveArgs,
    /// Share of requests that must meet all objectives [default: 0.9]
    #[arg(long)]
    share: Option<f64>,
    /// Relative width of the answer [default: 0.01]
    #[arg(long)]
    tolerance: Option<f64>,
    /// Folder to write capacity.csv, capacity-summary.csv and a figure to
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Remove the results of an earlier search in the folder
    #[arg(long, requires = "out")]
    restart: bool,
}

impl Args {
    /// Whether options describe the simulation, not a YAML file.
    pub fn is_of_options(&self) -> bool {
        self.simulation.0.as_ref().is_some_and(SimulationArgs::is_of_options)
    }
}

/// The options of a simulation where no file stands for them.
#[derive(Debug)]
struct UnlessConfig(Option<SimulationArgs>);

impl clap::Args for UnlessConfig {
    fn augment_args(command: Command) -> Command {
        // For an update, nothing is required.
        SimulationArgs::augment_args_for_update(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        SimulationArgs::augment_args_for_update(command)
    }
}

impl FromArgMatches for UnlessConfig {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        if matches.contains_id("config") {
            return Ok(Self(None));
        }
        let missing = "expected a sweep's YAML file, or --requests and --profile\n";
        let missing = |_| clap::Error::raw(ErrorKind::MissingRequiredArgument, missing);
        Ok(Self(Some(SimulationArgs::from_arg_matches(matches).map_err(missing)?)))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let (spec, base) = match (&args.config, &args.simulation.0) {
        (Some(config), _) => (SweepSpec::load(config)?, config.parent().unwrap_or(Path::new("")).to_owned()),
        (None, Some(simulation)) => (simulation.spec()?, PathBuf::new()),
        (None, None) => unreachable!("clap asks for the options where there is no file"),
    };
    for (option, given, most) in [("--share", args.share, 1.0), ("--tolerance", args.tolerance, f64::MAX)] {
        let given = given.unwrap_or(most);
        ensure!(
            given > 0.0 && given <= most,
            "{option} {given}: expected more than 0{}",
            if most == 1.0 { ", at most 1" } else { "" }
        );
    }
    let CapacitySpec { share, tolerance } = spec.capacity;
    let spec = SweepSpec {
        objectives: args.objectives.objectives()?.or(spec.objectives),
        capacity: CapacitySpec { share: args.share.unwrap_or(share), tolerance: args.tolerance.unwrap_or(tolerance) },
        ..spec
    };
    let earlier = if args.restart { Earlier::Remove } else { Earlier::Continue };
    if let Some(target) = &args.out {
        let shown = target.display();
        interrupt::say(format!("what has finished is kept in {shown}; the same command goes on with the rest"));
    }
    let summary = experiments::capacity(&spec, &base, args.out.as_deref(), earlier, &mut Terminal::default());
    let summary = match &args.config {
        Some(config) => summary.with_context(|| config.display().to_string())?,
        None => summary?,
    };
    print(&summary);
    if let Some(target) = &args.out {
        say!("\nResults are in {}", target.display());
    }
    Ok(())
}

fn print(summary: &Table) {
    let several = |column: &str| {
        summary.column(column).is_some_and(|mut cells| {
            let first = cells.next();
            cells.any(|cell| Some(cell) != first)
        })
    };
    let mut columns = vec![
        ("batching", "batching", None),
        ("exit", "exit_policy", None),
        ("batch", "max_batch", None),
        ("fit", "batch_fits", Some(0)),
        ("requests/s", CAPACITY, Some(4)),
        ("tok/s", "throughput_tok_s", Some(1)),
        ("mean depth", "mean_depth", Some(3)),
        ("TTFT p90 ms", "ttft_p90_ms", Some(1)),
        ("TPOT p90 ms", "tpot_p90_ms", Some(2)),
    ];
    if several("device_memory") {
        columns.insert(0, ("memory", "device_memory", None));
    }
    if several("system") {
        columns.insert(0, ("system", "system", None));
    }
    let header: Vec<&str> = columns.iter().map(|(title, ..)| *title).collect();
    let cell = |line: usize, &(_, column, decimals): &(&str, &str, Option<usize>)| {
        let text = |column| summary.column(column).and_then(|mut cells| cells.nth(line)).unwrap_or_default();
        match (decimals, text(column).parse::<f64>()) {
            (Some(_), _) if text(CAPACITY) == "0" => "-".to_owned(),
            (Some(decimals), Ok(number)) => format!("{number:.decimals$}"),
            _ => text(column).to_owned(),
        }
    };
    let lines = (0..summary.lines.len()).map(|line| columns.iter().map(|column| cell(line, column)).collect());
    print_table(&header, lines.collect());
}
