//! `depthwise profile`: what the parts of a pass take on this machine.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use engine::cuda::floors::Load;
use engine::{Limits, Sampling};
use simulator::write_csv;
use traces::table::write_yaml;

use crate::arguments::{LoadArgs, ModelArgs, at_most};
use crate::output::say;
use crate::progress::Terminal;
use experiments::profiles::{ORIGIN, Origin};
use experiments::results::PASS_LOG;
use experiments::serving::{MOST_REPEATS, MOST_ROWS};
use experiments::{NamedEngine, ResultsFolder};

/// Measure a latency profile of a model on this machine
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder to write the profile to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Maximum number of sequences that run at the same time
    #[arg(long, default_value_t = 64, value_name = "SEQUENCES", value_parser = at_most::<MOST_ROWS>)]
    max_batch: u32,
    /// Maximum number of rows of a pass
    #[arg(long, default_value_t = 256, value_name = "ROWS", value_parser = at_most::<MOST_ROWS>)]
    token_budget: u32,
    /// Maximum length of a sequence
    #[arg(long, default_value_t = 512, value_name = "TOKENS", value_parser = at_most::<MOST_ROWS>)]
    max_tokens: u32,
    /// Maximum length of a prompt chunk
    #[arg(long, default_value_t = 256, value_name = "TOKENS", value_parser = at_most::<MOST_ROWS>)]
    prefill_chunk: u32,
    /// Number of rounds; each measures every shape, in another order
    #[arg(long, default_value_t = 3, value_parser = at_most::<MOST_REPEATS>)]
    rounds: u32,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    for (option, given) in [
        ("--max-batch", args.max_batch),
        ("--token-budget", args.token_budget),
        ("--max-tokens", args.max_tokens),
        ("--prefill-chunk", args.prefill_chunk),
        ("--rounds", args.rounds),
    ] {
        ensure!(given > 0, "{option} 0: expected at least 1");
    }
    let mut folder = ResultsFolder::create(&args.out, "profile")?;
    let ModelArgs { model, load: LoadArgs { loops, weights, device } } = &args.model;
    let named = NamedEngine::load_without_prompts(model, *loops, *weights, *device, Sampling::default())?;
    let Args { max_batch, token_budget, max_tokens, prefill_chunk, .. } = args;
    let limits = Limits { rows: token_budget, decodes: max_batch, history: max_tokens, chunk: prefill_chunk };
    let (profile, passes) = experiments::profile(&named, limits, args.rounds as usize, &mut Terminal::default())?;
    let written = folder.path()?;
    profile.write(&written)?;
    passes.write(written.join(PASS_LOG))?;
    let origin = Origin {
        date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
        device: profile.meta.device.clone(),
        model: model.display().to_string(),
        command: command(std::env::args()),
    };
    write_yaml(&written.join(ORIGIN), &origin)?;
    if let Some(report) = device.report(named.engine.model.config(), *weights, &loads(&named, limits))? {
        std::fs::write(written.join("device.yaml"), serde_yaml::to_string(&report)?)?;
        write_csv(&written.join("kernels.csv"), &report.times)?;
    }
    folder.finish()?;
    say!("{} points on {}: {}", profile.points.len(), profile.meta.device, args.out.display());
    Ok(())
}

/// The command as it was given, without the folder that it writes to.
fn command(arguments: impl IntoIterator<Item = String>) -> String {
    let mut words = vec!["depthwise".to_owned()];
    let mut left = arguments.into_iter().skip(1);
    while let Some(argument) = left.next() {
        match argument.as_str() {
            "--out" => drop(left.next()),
            _ if argument.starts_with("--out=") => {}
            _ => words.push(argument),
        }
    }
    words.join(" ")
}

/// The passes whose operations are timed one by one on a GPU: of one row and of the largest batch, at one depth and at all.
fn loads(named: &NamedEngine, Limits { decodes, history, chunk, .. }: Limits) -> Vec<Load> {
    let num_loops = named.engine.model.config().num_loops;
    let (history, chunk) = (history as usize, chunk as usize);
    let load = |rows: u32, depths| Load { rows: rows as usize, depths, history, chunk };
    let mut loads = vec![load(1, 1), load(decodes, 1), load(decodes, num_loops.min(decodes as usize))];
    loads.dedup();
    loads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_kept_without_the_folder_that_it_writes_to() {
        for given in
            ["/bin/depthwise profile --out here --model m --rounds 2", "d profile --model m --out=/x --rounds 2"]
        {
            let arguments = given.split(' ').map(str::to_owned);
            assert_eq!(command(arguments), "depthwise profile --model m --rounds 2");
        }
    }
}
