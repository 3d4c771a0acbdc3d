//! `depthwise sweep`: every combination of what a YAML file lists, simulated.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use experiments::SweepSpec;
use experiments::sweep::figures::SWEEP_SUMMARY;
use experiments::sweep::{Earlier, SWEEP, ShardReport, SweepReport, merge, sweep_shard};
use simulator::Shard;

use crate::interrupt;
use crate::output::say;
use crate::progress::Terminal;

/// Simulate every combination of the policies, thresholds, batch limits, memory sizes, rates, seeds and systems that a
/// YAML file lists
///
/// Finished results are kept: after an interruption, the same command continues where it stopped. Several machines can
/// divide the combinations into shards, each in a folder of its own, which are merged to the bytes of one run.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Sweep, a YAML file
    config: PathBuf,
    /// Folder of results [default: results/ and the name of the sweep file; of a shard, such as results/NAME-shards/3-of-8]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Simulate only shard K of N: every N-th combination, from the K-th on, such as 3/8
    #[arg(long, value_name = "K/N")]
    shard: Option<Shard>,
    /// Merge the folders of all shards, instead of simulating
    #[arg(long, value_name = "DIR", num_args = 1.., conflicts_with = "shard")]
    merge: Option<Vec<PathBuf>>,
    /// Remove the results of an earlier sweep in the folder
    #[arg(long)]
    restart: bool,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let spec = SweepSpec::load(&args.config)?;
    let base = args.config.parent().unwrap_or(Path::new(""));
    let name = args.config.file_stem().context("the sweep has no file name")?;
    let default = match args.shard {
        Some(shard) => PathBuf::from(format!("{}-shards/{}-of-{}", name.display(), shard.number(), shard.count())),
        None => PathBuf::from(name),
    };
    let target = args.out.unwrap_or_else(|| Path::new("results").join(default));
    let earlier = if args.restart { Earlier::Remove } else { Earlier::Continue };
    let (shown, config) = (target.display(), || args.config.display().to_string());
    let mut terminal = Terminal::default();
    if args.merge.is_none() {
        interrupt::say(format!("what has finished is kept in {shown}; the same command goes on with the rest"));
    }
    if let Some(shard) = args.shard {
        let report = sweep_shard(&spec, base, shard, &target, earlier, &mut terminal).with_context(config)?;
        let ShardReport { simulations, earlier } = report;
        let lines = target.join(SWEEP);
        say!("{simulations} simulations of shard {shard}, of which {earlier} were there already: {}", lines.display());
        return Ok(());
    }
    let report = match &args.merge {
        Some(shards) => merge(&spec, base, shards, &target, earlier, &mut terminal),
        None => experiments::sweep(&spec, base, &target, earlier, &mut terminal),
    };
    let SweepReport { simulations, earlier, summary } = report.with_context(config)?;
    let (settings, seeds) = (summary.lines.len(), spec.num_seeds());
    say!("{simulations} simulations, of which {earlier} were there already: {}", target.join(SWEEP).display());
    say!("{settings} means over {seeds} seeds: {}", target.join(SWEEP_SUMMARY).display());
    say!("Figures are in {}", target.join("figures").display());
    Ok(())
}
