//! A sweep: every combination of what a YAML file lists, simulated, and summed up over seeds.
//!
//! ```text
//! YAML ──► spec ──► plan: points, settings, models ──► runs on all cores ──► sweep.csv ──► means, figures
//!                            └──► folder: what the results are of
//! ```

pub mod axis;
pub mod figures;
pub(crate) mod folder;
pub(crate) mod plan;
pub mod spec;

use std::path::Path;

use anyhow::{Context, Result};
use simulator::{Points, Table};

use crate::reporter::{Reporter, Shared};
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
    let mut folder = folder::open(target, spec, &Inputs::new(spec, base, "sweep")?, earlier)?;
    let points = Points::open(&folder.grow(SWEEP)?, plan.len())?;
    let earlier = points.done();
    if earlier < plan.len() {
        folder.mark()?;
    }
    reporter.start(plan.len(), earlier);
    let shared = Shared::new(reporter);
    let table = points.complete(|index| plan.simulate(index), || shared.lock().advance(1))?;
    reporter.finish();
    let summary = table.over_seeds(spec.num_seeds(), &Plan::columns_of_run());
    let results = folder.path()?;
    summary.write(&results.join(SWEEP_SUMMARY))?;
    warn_of_extrapolations(&plan.extrapolations(), reporter);
    let drawn = draw_sweep(&results, &results.join("figures"), &spec.title, reporter);
    folder.finish()?;
    drawn.context("the results are complete, the figures are not")?;
    Ok(SweepReport { simulations: plan.len(), earlier, summary })
}
