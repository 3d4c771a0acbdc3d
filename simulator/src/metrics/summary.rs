//! The summary of a run: one line of `summary.csv`.

use std::fmt;
use std::io;
use std::path::Path;

use scheduler::{Batching, KvFill};
use serde::{Deserialize, Serialize};

use super::{Distribution, DraftTotals, Metrics};

/// Whether the times of a run were measured or simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The engine or a server ran it.
    Measured,
    /// The simulator ran it.
    Simulated,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Measured => "measured",
            Self::Simulated => "simulated",
        })
    }
}

/// One run: a line of `summary.csv`. A latency that no request has (TPOT of single-token outputs) is NaN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Measured or simulated.
    pub source: Source,
    /// The batching policy.
    pub batching: Batching,
    /// The kind of exit policy: none, static, oracle, confidence.
    pub exit: String,
    /// The threshold of a confidence policy.
    pub threshold: Option<f32>,
    /// The exit policy in full, as on the command line.
    pub exit_policy: String,
    /// Keys and values that later tokens find at depths that an exited token skipped.
    pub kv_fill: KvFill,
    /// Maximum number of sequences that run at once on each machine.
    pub max_batch: u32,
    /// Maximum rows of a pass (depth-wise batching) or of an iteration (lockstep batching).
    pub token_budget: u32,
    /// Maximum prompt tokens that start in a pass or an iteration.
    pub prefill_chunk: u32,
    /// The last depth that tokens of prompts run, if it was given.
    pub prefill_depth: Option<u8>,
    /// Positions per KV block.
    pub block_tokens: u32,
    /// KV blocks of each machine.
    pub kv_blocks: u32,
    /// Whether freed blocks could be reused through the prefix cache.
    pub prefix_caching: bool,
    /// Whether passes were composed while the previous one ran.
    pub async_scheduling: bool,
    /// Most passes that a row which exits waited for the exit head.
    pub exit_wait: u32,
    /// Waiting rows for which the exit head ran before the wait was over; 0 for no such number.
    pub exit_batch: u32,
    /// Number of machines.
    pub replicas: u32,
    /// Number, role and batching of each group of machines, such as `1 prompt sequence + 2 decode depth`; empty if all
    /// machines are identical.
    #[serde(default)]
    pub machines: String,
    /// Bytes of all weights.
    pub weight_bytes: Option<u64>,
    /// Bytes of keys and values of one token.
    pub kv_bytes_per_token: Option<u64>,
    /// Tokens that fit in the KV cache of each machine.
    pub kv_tokens: u64,
    /// Number of requests of mean final length that fit in the KV cache of a machine.
    pub batch_fits: u32,
    /// Number of requests of the longest final length that fit in the KV cache of a machine.
    pub batch_fits_longest: u32,
    /// Number of finished requests.
    pub requests: u64,
    /// Number of generated tokens.
    pub output_tokens: u64,
    /// From the first arrival to the last token, in seconds.
    pub makespan_s: f64,
    /// Tokens generated per second of makespan.
    pub throughput_tok_s: f64,
    /// Passes per generated token, 1 to the number of loops.
    pub mean_depth: f64,
    /// Share of generated tokens that equal those of full depth, 0 to 1.
    pub token_agreement: Option<f64>,
    /// Share of generated tokens that full depth's own text has at the same position, 0 to 1; empty if it was not measured.
    pub equal_share: Option<f64>,
    /// Negative log-likelihood of the generated text under full depth, in nats per token; empty if it was not measured.
    pub nats_per_token: Option<f64>,
    /// The same of the text that full depth itself generates for these requests.
    pub nats_per_token_full_depth: Option<f64>,
    /// Share of the requests with an answer whose text begins with it, 0 to 1; empty if none has an answer.
    pub exact_match: Option<f64>,
    /// TTFT in milliseconds: mean.
    pub ttft_mean_ms: f64,
    /// TTFT: median.
    pub ttft_p50_ms: f64,
    /// TTFT: 90th percentile.
    pub ttft_p90_ms: f64,
    /// TTFT: 99th percentile.
    pub ttft_p99_ms: f64,
    /// TPOT in milliseconds: mean.
    pub tpot_mean_ms: f64,
    /// TPOT: median.
    pub tpot_p50_ms: f64,
    /// TPOT: 90th percentile.
    pub tpot_p90_ms: f64,
    /// TPOT: 99th percentile.
    pub tpot_p99_ms: f64,
    /// ITL in milliseconds: mean.
    pub itl_mean_ms: f64,
    /// ITL: median.
    pub itl_p50_ms: f64,
    /// ITL: 90th percentile.
    pub itl_p90_ms: f64,
    /// ITL: 99th percentile.
    pub itl_p99_ms: f64,
    /// End-to-end latency in milliseconds: mean.
    pub e2e_mean_ms: f64,
    /// End-to-end latency: median.
    pub e2e_p50_ms: f64,
    /// End-to-end latency: 90th percentile.
    pub e2e_p90_ms: f64,
    /// End-to-end latency: 99th percentile.
    pub e2e_p99_ms: f64,
    /// Decode rows per pass as a share of the batch limit, weighted by the time of the pass.
    pub occupancy: f64,
    /// Rows per pass, prompts and backfill included, weighted by the time of the pass.
    pub mean_rows: f64,
    /// Sequences with a slot, weighted by the time of the pass.
    pub mean_running: f64,
    /// Share of KV blocks in use, weighted by the time of the pass.
    pub kv_usage: f64,
    /// Share of the makespan in which a pass ran.
    pub busy: f64,
    /// Number of passes.
    pub passes: u64,
    /// Rows of backfill: depths that exited tokens run later.
    pub backfill_rows: u64,
    /// Drafts that full depth confirmed, as a share of those of which it decided; empty unless the exit policy speculates.
    #[serde(default)]
    pub draft_acceptance: Option<f64>,
    /// Tokens after the first of a request per token that full depth itself predicted: 1 without drafts, and at most 1 more
    /// than the drafts that a sequence may have. Empty unless the exit policy speculates.
    #[serde(default)]
    pub tokens_per_verification: Option<f64>,
    /// Rows that ran for drafts which were taken back; empty unless the exit policy speculates.
    #[serde(default)]
    pub wasted_rows: Option<u64>,
    /// Number of preemptions.
    pub preemptions: u64,
    /// Share of context tokens (of prompts, and of tokens that preempted requests had generated) that prefix caching
    /// found; empty without it.
    pub prefix_hit_rate: Option<f64>,
    /// Number of transfers of keys and values from prompt machines to decode machines; empty without such machines.
    #[serde(default)]
    pub transfers: Option<u64>,
    /// Bytes of keys and values that were transferred.
    #[serde(default)]
    pub transfer_bytes: Option<u64>,
    /// Mean time of a transfer in milliseconds, from its start to the arrival of the last byte.
    #[serde(default)]
    pub transfer_mean_ms: Option<f64>,
    /// Mean time in milliseconds from the end of a prompt to the start of its transfer: waiting for the next pass, a slot and
    /// blocks of the decode machine, and for the links.
    #[serde(default)]
    pub transfer_wait_mean_ms: Option<f64>,
    /// Components of the latency profile with times that were computed rather than measured, by a roofline for example;
    /// separated by spaces, empty for a measured run.
    pub computed_components: String,
    /// Share of requests that met the objectives, 0 to 1; empty without objectives.
    pub objectives_met: Option<f64>,
    /// Requests per second of makespan that met the objectives; empty without objectives.
    pub goodput_req_s: Option<f64>,
    /// Price of a million generated tokens on all machines, in the unit of the machines' price; empty without one.
    pub price_per_million_tokens: Option<f64>,
}

impl Summary {
    /// The same with the price of the machines: that of each, for an hour.
    pub fn priced(self, price_per_hour: f64) -> Self {
        let per_second = price_per_hour * f64::from(self.replicas) / 3600.0;
        Self { price_per_million_tokens: Some(1e6 * per_second / self.throughput_tok_s), ..self }
    }

    /// Columns that say what a run is of, beside those that are named after a field of [`Settings`](scheduler::Settings).
    pub const OF_RUN: [&str; 7] =
        ["source", "threshold", "exit_policy", "replicas", "machines", "weight_bytes", "kv_bytes_per_token"];
}

impl Metrics {
    /// Summarizes the run. Token agreement comes from the executor, since an observer cannot know it.
    pub fn summary(&self, source: Source, token_agreement: Option<f64>) -> Summary {
        let totals = &self.totals;
        let makespan_s = self.makespan().as_secs_f64();
        let busy = totals.busy as f64;
        let settings = &self.settings;
        let blocks = u64::from(settings.num_blocks);
        let DraftTotals { accepted, rejected, wasted_rows } = totals.drafts;
        let speculates = settings.exit.speculates();
        let later_tokens = totals.tokens.saturating_sub(totals.requests);
        let [ttft_mean_ms, ttft_p50_ms, ttft_p90_ms, ttft_p99_ms] = mean_and_tail(&self.ttft);
        let [tpot_mean_ms, tpot_p50_ms, tpot_p90_ms, tpot_p99_ms] = mean_and_tail(&self.tpot);
        let [itl_mean_ms, itl_p50_ms, itl_p90_ms, itl_p99_ms] = mean_and_tail(&self.itl);
        let [e2e_mean_ms, e2e_p50_ms, e2e_p90_ms, e2e_p99_ms] = mean_and_tail(&self.end_to_end);
        Summary {
            source,
            batching: settings.batching,
            exit: settings.exit.kind().to_owned(),
            threshold: settings.exit.threshold(),
            exit_policy: settings.exit.to_string(),
            kv_fill: settings.kv_fill,
            max_batch: settings.max_batch,
            token_budget: settings.token_budget,
            prefill_chunk: settings.prefill_chunk,
            prefill_depth: settings.prefill_depth,
            block_tokens: settings.block_tokens,
            kv_blocks: settings.num_blocks,
            prefix_caching: settings.prefix_caching,
            async_scheduling: settings.async_scheduling,
            exit_wait: settings.exit_wait,
            exit_batch: settings.exit_batch,
            replicas: self.machines,
            machines: String::new(),
            weight_bytes: None,
            kv_bytes_per_token: None,
            kv_tokens: u64::from(settings.num_blocks) * u64::from(settings.block_tokens),
            batch_fits: fits(blocks * totals.requests, totals.final_blocks),
            batch_fits_longest: fits(blocks, totals.longest_blocks.into()),
            requests: totals.requests,
            output_tokens: totals.tokens,
            makespan_s,
            throughput_tok_s: totals.tokens as f64 / makespan_s,
            mean_depth: totals.token_passes as f64 / totals.tokens as f64,
            token_agreement,
            equal_share: None,
            nats_per_token: None,
            nats_per_token_full_depth: None,
            exact_match: None,
            ttft_mean_ms,
            ttft_p50_ms,
            ttft_p90_ms,
            ttft_p99_ms,
            tpot_mean_ms,
            tpot_p50_ms,
            tpot_p90_ms,
            tpot_p99_ms,
            itl_mean_ms,
            itl_p50_ms,
            itl_p90_ms,
            itl_p99_ms,
            e2e_mean_ms,
            e2e_p50_ms,
            e2e_p90_ms,
            e2e_p99_ms,
            occupancy: totals.decode_row_time as f64 / busy / f64::from(settings.max_batch),
            mean_rows: totals.row_time as f64 / busy,
            mean_running: totals.running_time as f64 / busy,
            kv_usage: totals.block_time as f64 / busy / blocks as f64,
            busy: busy / 1e9 / makespan_s / f64::from(self.machines),
            passes: totals.passes,
            backfill_rows: totals.backfill_rows,
            draft_acceptance: speculates.then(|| accepted as f64 / (accepted + rejected) as f64),
            tokens_per_verification: speculates.then(|| later_tokens as f64 / (later_tokens - accepted) as f64),
            wasted_rows: speculates.then_some(wasted_rows),
            preemptions: totals.preemptions,
            prefix_hit_rate: (totals.looked_up > 0).then(|| totals.found as f64 / totals.looked_up as f64),
            transfers: None,
            transfer_bytes: None,
            transfer_mean_ms: None,
            transfer_wait_mean_ms: None,
            computed_components: String::new(),
            objectives_met: self.objectives.map(|_| totals.met as f64 / totals.requests as f64),
            goodput_req_s: self.objectives.map(|_| totals.met as f64 / makespan_s),
            price_per_million_tokens: None,
        }
    }
}

/// How many requests of `of_a_request` blocks fit in `blocks`; 0 if no request has finished.
fn fits(blocks: u64, of_a_request: u64) -> u32 {
    blocks.checked_div(of_a_request).unwrap_or_default().min(u32::MAX.into()) as u32
}

fn mean_and_tail(latencies: &Distribution) -> [f64; 4] {
    let [p50, p90, p99] = latencies.quantiles_ms([0.5, 0.9, 0.99]);
    [latencies.mean_ms(), p50, p90, p99]
}

/// Writes lines with a header to a CSV file: summaries, requests, passes or depth rows.
///
/// # Errors
/// If the file cannot be written; the message names it.
pub fn write_csv(path: &Path, lines: impl IntoIterator<Item = impl Serialize>) -> io::Result<()> {
    let named = |error: csv::Error| io::Error::other(format!("{}: {error}", path.display()));
    let mut writer = csv::Writer::from_path(path).map_err(named)?;
    for line in lines {
        writer.serialize(line).map_err(named)?;
    }
    writer.flush()
}
