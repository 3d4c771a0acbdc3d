//! `depthwise validate`: the simulator against the engine.

use std::path::PathBuf;

use anyhow::Result;

use crate::arguments::{EngineArgs, LoadArgs, ModelArgs, ObjectiveArgs, RequestArgs, ServingArgs, at_most};
use crate::output::say;
use crate::progress::Terminal;
use crate::report::print_validation;
use experiments::experiment::{EngineSpec, Experiment, SCHEMA_VERSION, Sweeps, ValidationSpec};
use experiments::serving::{MOST_REPEATS, MOST_ROWS};

/// Predict from a profile, write the predictions, then serve the same requests with the engine, and compare
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    requests: RequestArgs,
    #[command(flatten)]
    serving: ServingArgs,
    #[command(flatten)]
    objectives: ObjectiveArgs,
    /// Exit trace that fits any model (`trace script-exits`, `trace draw-exits`): every policy reads its signals instead of
    /// the model's
    #[arg(long, value_name = "DIR")]
    exits: Option<PathBuf>,
    /// Number of replays of every combination, in the closed loop and at every rate
    #[arg(long, default_value_t = 3, value_parser = at_most::<MOST_REPEATS>)]
    repeats: u32,
    /// Rounds of the latency profile
    #[arg(long, default_value_t = EngineSpec::ROUNDS, value_parser = at_most::<MOST_REPEATS>)]
    rounds: u32,
    /// Requests in flight in the closed loop [default: --max-batch]
    #[arg(long, value_name = "REQUESTS", value_parser = at_most::<MOST_ROWS>)]
    in_flight: Option<u32>,
    /// Rates of arrival, separated by commas, each as a share of the capacity that a combination has in the closed loop
    #[arg(long, value_delimiter = ',', value_name = "SHARES", default_values_t = ValidationSpec::RATES)]
    rates: Vec<f64>,
    /// Compare in the closed loop only, at no rate of arrival
    #[arg(long, conflicts_with = "rates")]
    no_rates: bool,
    /// Folder of results
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let (mut requests, base) = args.requests.spec()?;
    requests.file = requests.file.map(|file| base.join(file));
    requests.tokenizer = requests.tokenizer.map(|file| base.join(file));
    let EngineArgs { model: ModelArgs { model, load }, prompts, temperature, seed } = args.engine;
    let LoadArgs { loops, weights, device } = load;
    let experiment = Experiment {
        schema_version: SCHEMA_VERSION,
        title: format!("{}, {}", model.display(), args.requests.requests.display()),
        seed,
        requests,
        serving: args.serving.serving(),
        engine: Some(EngineSpec {
            model,
            loops,
            weights,
            device,
            prompts,
            exits: args.exits,
            repeats: args.repeats,
            rounds: args.rounds,
            temperature,
            loads: Vec::new(),
        }),
        validation: Some(ValidationSpec {
            in_flight: args.in_flight,
            rates: if args.no_rates { Vec::new() } else { args.rates },
        }),
        systems: Vec::new(),
        objectives: args.objectives.objectives()?,
        sweeps: Sweeps::default(),
    };
    let report = experiments::validate(&experiment, "".as_ref(), &args.out, &mut Terminal::default())
        .map_err(|error| args.requests.name_option(error))?;
    print_validation(&report);
    say!("\nResults are in {}", args.out.display());
    Ok(())
}
