//! `depthwise validate`: the simulator against the engine.

use std::path::PathBuf;

use anyhow::Result;

use crate::arguments::{EngineArgs, ModelArgs, RequestArgs, ServingArgs, at_most};
use crate::commands::run::print_load;
use crate::output::say;
use crate::progress::Terminal;
use experiments::experiment::{EngineSpec, Experiment, SCHEMA_VERSION, Sweeps};
use experiments::serving::MOST_REPEATS;

/// Serve requests with the engine in alternation with profiling, simulate the same, and compare
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    requests: RequestArgs,
    #[command(flatten)]
    serving: ServingArgs,
    /// Number of replays of every combination
    #[arg(long, default_value_t = 3, value_parser = at_most::<MOST_REPEATS>)]
    repeats: u32,
    /// Shares of the capacity to scale arrivals to, separated by commas; each is replayed separately. The capacity is
    /// the rate at which the first batching policy with the first exit policy serves the requests when all arrive at
    /// the same time
    #[arg(long, value_delimiter = ',', value_name = "SHARES")]
    loads: Vec<f64>,
    /// Folder of results
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let (mut requests, base) = args.requests.spec()?;
    requests.file = requests.file.map(|file| base.join(file));
    requests.tokenizer = requests.tokenizer.map(|file| base.join(file));
    let EngineArgs { model: ModelArgs { model, loops, weights, device }, prompts, temperature, seed } = args.engine;
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
            repeats: args.repeats,
            temperature,
            loads: args.loads,
        }),
        systems: Vec::new(),
        objectives: None,
        sweeps: Sweeps::default(),
    };
    let loads = experiments::validate(&experiment, "".as_ref(), &args.out, &mut Terminal::default())?;
    loads.iter().for_each(print_load);
    say!("\nResults are in {}", args.out.display());
    Ok(())
}
