//! The simulator against the engine: the same requests under the same policies, metric by metric.

use scheduler::Batching;
use serde::{Deserialize, Serialize};
use simulator::Summary;

/// One metric of one combination: a line of `validation.csv`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// Batching policy.
    pub batching: Batching,
    /// Exit policy: none, oracle, confidence.
    pub exit: String,
    /// Name of the metric, as the column of `summary.csv`.
    pub metric: String,
    /// What the engine gave.
    pub measured: f64,
    /// What the simulator said.
    pub simulated: f64,
    /// Simulated less measured, in percent of measured.
    pub error_pct: f64,
}

type Metric = (&'static str, fn(&Summary) -> Option<f64>);

/// What is compared.
const METRICS: [Metric; 9] = [
    (THROUGHPUT, |summary| Some(summary.throughput_tok_s)),
    ("mean_depth", |summary| Some(summary.mean_depth)),
    ("token_agreement", |summary| summary.token_agreement),
    ("ttft_mean_ms", |summary| Some(summary.ttft_mean_ms)),
    ("ttft_p50_ms", |summary| Some(summary.ttft_p50_ms)),
    ("tpot_mean_ms", |summary| Some(summary.tpot_mean_ms)),
    ("tpot_p50_ms", |summary| Some(summary.tpot_p50_ms)),
    ("e2e_mean_ms", |summary| Some(summary.e2e_mean_ms)),
    ("e2e_p99_ms", |summary| Some(summary.e2e_p99_ms)),
];

/// The metric that the simulator is judged by first.
pub const THROUGHPUT: &str = "throughput_tok_s";

/// Compares runs of the same combinations, given in the same order.
pub fn compare<'a>(
    measured: impl IntoIterator<Item = &'a Summary>,
    simulated: impl IntoIterator<Item = &'a Summary>,
) -> Vec<Comparison> {
    let pairs = measured.into_iter().zip(simulated);
    pairs.flat_map(|(measured, simulated)| compare_pair(measured, simulated)).collect()
}

fn compare_pair(measured: &Summary, simulated: &Summary) -> impl Iterator<Item = Comparison> {
    debug_assert_eq!((measured.batching, &measured.exit_policy), (simulated.batching, &simulated.exit_policy));
    METRICS.into_iter().filter_map(|(metric, value)| {
        let (measured_value, simulated_value) = (value(measured)?, value(simulated)?);
        Some(Comparison {
            batching: measured.batching,
            exit: measured.exit.clone(),
            metric: metric.to_owned(),
            measured: measured_value,
            simulated: simulated_value,
            error_pct: 100.0 * (simulated_value / measured_value - 1.0),
        })
    })
}

/// Mean and largest absolute error of one metric, in percent.
pub fn errors(comparisons: &[Comparison], metric: &str) -> Option<(f64, f64)> {
    let errors: Vec<f64> =
        comparisons.iter().filter(|line| line.metric == metric).map(|line| line.error_pct.abs()).collect();
    let largest = errors.iter().copied().reduce(f64::max)?;
    Some((errors.iter().sum::<f64>() / errors.len() as f64, largest))
}
