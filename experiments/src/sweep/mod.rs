//! A sweep: every combination of what a YAML file lists, simulated, and summed up over seeds.
//!
//! ```text
//! YAML ──► spec ──► plan: points, settings, models ──► runs on all cores ──► sweep.csv ──► means, figures
//!                            └──► folder: what the results are of
//! ```
//!
//! Shards of the points, each in a folder of its own, may be simulated by different machines, and are merged to the bytes
//! of one run.

pub mod axis;
pub mod figures;
pub(crate) mod folder;
pub(crate) mod plan;
pub mod spec;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use simulator::{Points, Shard, Table};

use crate::reporter::{Reporter, Shared};
use crate::results::ResultsFolder;
use crate::runs::warn_of_extrapolations;
use figures::{SWEEP_SUMMARY, draw_sweep};
use folder::Inputs;
use plan::Plan;
use spec::SweepSpec;

/// A line for each point of the grid and each seed.
pub const SWEEP: &str = "sweep.csv";

/// What becomes of the results that an earlier run left in the folder.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Earlier {
    /// They are kept, and the rest is added: for the same inputs only.
    Continue,
    /// They are removed.
    Remove,
}

/// What a sweep came to.
#[derive(Clone, Debug)]
pub struct SweepReport {
    /// How many simulations there are.
    pub simulations: usize,
    /// Those of an earlier run among them.
    pub earlier: usize,
    /// Means over seeds.
    pub summary: Table,
}

/// What a shard of a sweep came to.
#[derive(Clone, Copy, Debug)]
pub struct ShardReport {
    /// How many simulations there are in the shard.
    pub simulations: usize,
    /// Those of an earlier run among them.
    pub earlier: usize,
}

/// What is done at each point, for [`Inputs`].
const TASK: &str = "sweep";

/// Simulates every point of a sweep on all cores. Lines, means and figures go to `target`, where the same sweep goes on
/// after an interruption.
///
/// # Errors
/// If something does not read, cannot be served or cannot be written, or `target` holds other results.
pub fn sweep(
    spec: &SweepSpec,
    base: &Path,
    target: &Path,
    earlier: Earlier,
    reporter: &mut dyn Reporter,
) -> Result<SweepReport> {
    let plan = Plan::new(spec, base, reporter)?;
    let mut folder = folder::open(target, spec, &Inputs::new(spec, base, TASK)?, earlier)?;
    let (table, earlier) = simulate(&plan, Shard::WHOLE, &mut folder, reporter)?;
    let summary = sum_up(spec, &table, folder, reporter)?;
    Ok(SweepReport { simulations: plan.len(), earlier, summary })
}

/// Simulates every point of a sweep on all cores, and writes nothing: the lines of all points, and the means over seeds.
///
/// # Errors
/// If something does not read or cannot be served.
pub fn sweep_in_memory(spec: &SweepSpec, base: &Path, reporter: &mut dyn Reporter) -> Result<(Table, Table)> {
    let plan = Plan::new(spec, base, reporter)?;
    let table = complete(&plan, Points::in_memory(plan.len()), plan.len(), reporter)?;
    let summary = means(spec, &table);
    Ok((table, summary))
}

/// Simulates a shard of the points of a sweep on all cores. The lines go to `target`, where the same shard goes on after an
/// interruption; [`merge`] makes results of all shards.
///
/// # Errors
/// As for [`sweep`], or if there are more shards than points.
pub fn sweep_shard(
    spec: &SweepSpec,
    base: &Path,
    shard: Shard,
    target: &Path,
    earlier: Earlier,
    reporter: &mut dyn Reporter,
) -> Result<ShardReport> {
    let plan = Plan::new(spec, base, reporter)?;
    let points = plan.len();
    ensure!(shard.count() <= points, "shard {shard}: found {points} points, expected at least one for each shard");
    let mut folder = folder::open(target, spec, &Inputs::new(spec, base, TASK)?.of_shard(shard), earlier)?;
    let (table, earlier) = simulate(&plan, shard, &mut folder, reporter)?;
    folder.finish()?;
    Ok(ShardReport { simulations: table.lines.len(), earlier })
}

/// Makes of the folders of all shards of a sweep what [`sweep`] would have written, to the byte. The first point of each
/// shard is simulated again, to find a shard that another program wrote.
///
/// # Errors
/// If a shard is missing, there twice, of another sweep or has not ended; or as for [`sweep`].
pub fn merge(
    spec: &SweepSpec,
    base: &Path,
    shards: &[PathBuf],
    target: &Path,
    earlier: Earlier,
    reporter: &mut dyn Reporter,
) -> Result<SweepReport> {
    let plan = Plan::new(spec, base, reporter)?;
    let inputs = Inputs::new(spec, base, TASK)?;
    let shards = all_shards(shards, &inputs)?;
    reporter.start(shards.len(), 0);
    let shared = Shared::new(reporter);
    let first_line = |(shard, _): (&Shard, &PathBuf)| {
        let line = plan.simulate(shard.number() - 1)?;
        shared.lock().advance(1);
        Ok(line)
    };
    let first_lines: Vec<_> = shards.par_iter().map(first_line).collect::<Result<_>>()?;
    reporter.finish();
    let mut points = Points::in_memory(plan.len());
    for ((&shard, folder), first) in shards.iter().zip(&first_lines) {
        points.add(&folder.join(SWEEP), shard, first)?;
    }
    let mut folder = folder::open(target, spec, &inputs, earlier)?;
    let table = points.in_order()?;
    table.write(&folder.path()?.join(SWEEP))?;
    let summary = sum_up(spec, &table, folder, reporter)?;
    Ok(SweepReport { simulations: plan.len(), earlier: plan.len(), summary })
}

/// Simulates what is missing of a shard, and returns its lines and the number of those that were there.
fn simulate(
    plan: &Plan<'_>,
    shard: Shard,
    folder: &mut ResultsFolder,
    reporter: &mut dyn Reporter,
) -> Result<(Table, usize)> {
    let points = Points::open(&folder.grow(SWEEP)?, plan.len(), shard)?;
    let (earlier, all) = (points.done(), shard.points(plan.len()).count());
    if earlier < all {
        folder.mark()?;
    }
    Ok((complete(plan, points, all, reporter)?, earlier))
}

/// Simulates those of `all` points that are missing.
fn complete(plan: &Plan<'_>, points: Points, all: usize, reporter: &mut dyn Reporter) -> Result<Table> {
    reporter.start(all, points.done());
    let shared = Shared::new(reporter);
    let table = points.complete(|index| plan.simulate(index), || shared.lock().advance(1))?;
    reporter.finish();
    warn_of_extrapolations(&plan.extrapolations(), reporter);
    Ok(table)
}

fn means(spec: &SweepSpec, table: &Table) -> Table {
    table.over_seeds(spec.num_seeds(), &Plan::columns_of_run())
}

/// Writes and draws the means over seeds, and ends the folder.
fn sum_up(spec: &SweepSpec, table: &Table, mut folder: ResultsFolder, reporter: &mut dyn Reporter) -> Result<Table> {
    let summary = means(spec, table);
    let results = folder.path()?;
    summary.write(&results.join(SWEEP_SUMMARY))?;
    let drawn = draw_sweep(&results, &results.join("figures"), &spec.title, reporter);
    folder.finish()?;
    drawn.context("the results are complete, the figures are not")?;
    Ok(summary)
}

/// The folders of all shards of a sweep, in the order of the shards.
fn all_shards(folders: &[PathBuf], inputs: &Inputs) -> Result<BTreeMap<Shard, PathBuf>> {
    let mut shards: BTreeMap<Shard, PathBuf> = BTreeMap::new();
    for folder in folders {
        let (shard, shown) = (folder::read_shard(folder, inputs)?, folder.display());
        if let Some((other, there)) = shards.first_key_value() {
            let is_alike = other.count() == shard.count();
            ensure!(
                is_alike,
                "{shown}: found shard {shard}, expected one of {} as in {}",
                other.count(),
                there.display()
            );
        }
        if let Some(there) = shards.insert(shard, folder.clone()) {
            bail!("shard {shard} is there twice: {} and {shown}", there.display());
        }
    }
    let (first, _) = shards.first_key_value().context("found no shard, expected the folders of all of them")?;
    let missing: Vec<String> =
        first.all().filter(|shard| !shards.contains_key(shard)).map(|shard| shard.to_string()).collect();
    ensure!(missing.is_empty(), "missing shards: {}", missing.join(", "));
    Ok(shards)
}
