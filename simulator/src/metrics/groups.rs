//! The machines of one role: a line of `machines.csv`.

use scheduler::Batching;
use serde::{Deserialize, Serialize};
use traces::Nanos;

use super::Metrics;
use crate::roles::Role;

/// How a group of identical machines was used: a line of `machines.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupSummary {
    /// What the machines do.
    pub role: Role,
    /// Number of machines.
    pub replicas: u32,
    /// Their batching policy.
    pub group_batching: Batching,
    /// Maximum number of sequences that run at once on each machine.
    pub max_batch: u32,
    /// Maximum rows of a pass (depth-wise batching) or of an iteration (lockstep batching).
    pub token_budget: u32,
    /// Maximum prompt tokens that start in a pass or an iteration.
    pub prefill_chunk: u32,
    /// KV blocks of each machine.
    pub kv_blocks: u32,
    /// Share of the makespan in which a pass ran.
    pub busy: f64,
    /// Number of passes.
    pub passes: u64,
    /// Rows per pass, prompts and backfill included, weighted by the time of the pass.
    pub mean_rows: f64,
    /// Sequences with a slot, weighted by the time of the pass; on prompt machines with those that wait for their transfer.
    pub mean_running: f64,
    /// Requests that waited for a slot, weighted by the time of the pass; on decode machines those whose transfer has not
    /// been admitted, and preempted ones.
    pub mean_waiting: f64,
    /// Share of KV blocks in use, weighted by the time of the pass.
    pub kv_usage: f64,
    /// Largest share of KV blocks in use in a pass, on any machine.
    pub kv_usage_peak: f64,
    /// Number of preemptions.
    pub preemptions: u64,
}

impl Metrics {
    /// Summarizes these machines, in a run of this makespan.
    pub(crate) fn of_group(&self, role: Role, makespan: Nanos) -> GroupSummary {
        let (totals, settings) = (&self.totals, &self.settings);
        let (busy, blocks) = (totals.busy as f64, f64::from(settings.num_blocks));
        GroupSummary {
            role,
            replicas: self.machines,
            group_batching: settings.batching,
            max_batch: settings.max_batch,
            token_budget: settings.token_budget,
            prefill_chunk: settings.prefill_chunk,
            kv_blocks: settings.num_blocks,
            busy: busy / makespan.0 as f64 / f64::from(self.machines),
            passes: totals.passes,
            mean_rows: totals.row_time as f64 / busy,
            mean_running: totals.running_time as f64 / busy,
            mean_waiting: totals.waiting_time as f64 / busy,
            kv_usage: totals.block_time as f64 / busy / blocks,
            kv_usage_peak: f64::from(totals.peak_blocks) / blocks,
            preemptions: totals.preemptions,
        }
    }
}
