//! The highest request rate that meets latency objectives, for every policy of a sweep.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use simulator::{CapacitySearch, Points, Shard, Table};

use crate::reporter::{Reporter, Shared};
use crate::runs::warn_of_extrapolations;
use crate::sweep::Earlier;
use crate::sweep::figures::{CAPACITY_SUMMARY, draw_capacity};
use crate::sweep::folder::{self, Inputs};
use crate::sweep::plan::Plan;
use crate::sweep::spec::{CapacitySpec, SweepSpec};

/// A line for each policy and seed.
pub const CAPACITIES: &str = "capacity.csv";

/// Searches on all cores for the highest rate of every policy on every system, and returns the means over seeds. Lines,
/// means and a figure go to `target`, if there is one, where the same search goes on after an interruption.
///
/// # Errors
/// If there is no objective, something does not read, cannot be served or cannot be written.
pub fn capacity(
    spec: &SweepSpec,
    base: &Path,
    target: Option<&Path>,
    earlier: Earlier,
    reporter: &mut dyn Reporter,
) -> Result<Table> {
    let objectives = spec.objectives.context("no objective: give --ttft-ms, --tpot-ms or --e2e-ms")?;
    ensure!(spec.grid.rate_per_s.is_none(), "grid.rate_per_s: the rate is what is searched for");
    let CapacitySpec { share, tolerance } = spec.capacity;
    let search = CapacitySearch { objectives, share, replicas: spec.replicas, tolerance };
    search.check()?;
    let plan = Plan::new(spec, base, reporter)?;
    let open = |target| folder::open(target, spec, &Inputs::new(spec, base, "capacity")?, earlier);
    let mut folder = target.map(open).transpose()?;
    let points = match &mut folder {
        Some(folder) => {
            let points = Points::open(&folder.grow(CAPACITIES)?, plan.len(), Shard::WHOLE)?;
            if points.done() < plan.len() {
                folder.mark()?;
            }
            points
        }
        None => Points::in_memory(plan.len()),
    };
    let table = search_all(&plan, &search, points, reporter)?;
    warn_of_extrapolations(&plan.extrapolations(), reporter);
    let summary = table.over_seeds(spec.num_seeds(), &Plan::columns_of_run());
    if let Some(mut folder) = folder {
        let results = folder.path()?;
        summary.write(&results.join(CAPACITY_SUMMARY))?;
        let drawn = draw_capacity(&results, &results.join("figures"), spec, reporter);
        folder.finish()?;
        drawn.context("the results are complete, the figures are not")?;
    }
    Ok(summary)
}

/// Searches on all cores; a step is a rate that is tried.
fn search_all(plan: &Plan<'_>, search: &CapacitySearch, points: Points, reporter: &mut dyn Reporter) -> Result<Table> {
    let tries = search.usual_tries() as usize;
    reporter.start(plan.len() * tries, points.done() * tries);
    let shared = Shared::new(reporter);
    let search_one = |index| {
        let mut tried = 0;
        let line = plan.capacity(index, search, |rate_per_s| {
            let mut reporter = shared.lock();
            reporter.message(&format!("{}: {rate_per_s:.3} requests/s", plan.describe(index)));
            reporter.advance(usize::from(tried < tries));
            tried += 1;
        });
        shared.lock().advance(tries.saturating_sub(tried));
        line
    };
    let table = points.complete(search_one, || ())?;
    reporter.finish();
    Ok(table)
}
