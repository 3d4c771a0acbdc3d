//! The simulator against the engine: the same requests under the same policies, metric by metric, repeat by repeat.

use scheduler::Batching;
use serde::{Deserialize, Serialize};
use simulator::{Interval, Summary};

/// One metric of one combination: a line of `validation.csv`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// Batching policy.
    pub batching: Batching,
    /// Exit policy: none, oracle, confidence.
    pub exit: String,
    /// Name of the metric, as the column of `summary.csv`.
    pub metric: String,
    /// What the engine gave: the mean over the repeats.
    pub measured: f64,
    /// What the simulator said, likewise.
    pub simulated: f64,
    /// Simulated less measured, in percent of measured: the mean over the repeats.
    pub error_pct: f64,
    /// Half the width of its 95% confidence interval by Student's t; none of a single repeat.
    pub error_ci95_pct: Option<f64>,
    /// The error of each repeat.
    #[serde(skip)]
    errors_pct: Vec<f64>,
}

type Metric = (&'static str, fn(&Summary) -> Option<f64>);

/// What is compared.
const METRICS: [Metric; 9] = [
    (THROUGHPUT, |summary| Some(summary.throughput_tok_s)),
    ("mean_depth", |summary| Some(summary.mean_depth)),
    ("token_agreement", |summary| summary.token_agreement),
    (TTFT, |summary| Some(summary.ttft_mean_ms)),
    ("ttft_p50_ms", |summary| Some(summary.ttft_p50_ms)),
    (TPOT, |summary| Some(summary.tpot_mean_ms)),
    ("tpot_p50_ms", |summary| Some(summary.tpot_p50_ms)),
    ("e2e_mean_ms", |summary| Some(summary.e2e_mean_ms)),
    (E2E_P99, |summary| Some(summary.e2e_p99_ms)),
];

/// The metric that the simulator is judged by first.
pub const THROUGHPUT: &str = "throughput_tok_s";
/// Mean time to the first token.
pub const TTFT: &str = "ttft_mean_ms";
/// Mean time per token after the first.
pub const TPOT: &str = "tpot_mean_ms";
/// The 99th percentile of end-to-end latency.
pub const E2E_P99: &str = "e2e_p99_ms";

/// Compares repeats of the same combinations, given in the same order, with simulations on what was profiled around
/// each repeat.
pub fn compare(measured: &[Vec<Summary>], simulated: &[Vec<Summary>]) -> Vec<Comparison> {
    let combinations = measured.first().map_or(0, Vec::len);
    let cases = (0..combinations).flat_map(|place| METRICS.into_iter().map(move |metric| (place, metric)));
    cases.filter_map(|(place, metric)| compare_case(measured, simulated, place, metric)).collect()
}

/// Compares one metric of one combination; none where a run has no value.
fn compare_case(
    measured: &[Vec<Summary>],
    simulated: &[Vec<Summary>],
    place: usize,
    (metric, value): Metric,
) -> Option<Comparison> {
    let of = |runs: &[Vec<Summary>]| -> Option<Vec<f64>> {
        runs.iter().map(|runs| value(&runs[place]).filter(|value| value.is_finite())).collect()
    };
    let (measured_values, simulated_values) = (of(measured)?, of(simulated)?);
    let error = |(measured, simulated): (&f64, &f64)| 100.0 * (simulated / measured - 1.0);
    let errors_pct: Vec<f64> = measured_values.iter().zip(&simulated_values).map(error).collect();
    let run = &measured[0][place];
    debug_assert_eq!(
        (run.batching, &run.exit_policy),
        (simulated[0][place].batching, &simulated[0][place].exit_policy)
    );
    let Interval { mean, half_width } = Interval::of(&errors_pct);
    Some(Comparison {
        batching: run.batching,
        exit: run.exit.clone(),
        metric: metric.to_owned(),
        measured: Interval::of(&measured_values).mean,
        simulated: Interval::of(&simulated_values).mean,
        error_pct: mean,
        error_ci95_pct: half_width,
        errors_pct,
    })
}

/// How far the simulator is off in one metric, over all combinations: a line of `errors.csv`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MeanError {
    /// Name of the metric.
    pub metric: &'static str,
    /// Combinations that it is the mean of.
    pub combinations: usize,
    /// Mean over the combinations of the absolute error, in percent.
    pub mean_abs_error_pct: f64,
    /// Half the width of its 95% confidence interval by Student's t over the repeats; none of a single repeat.
    pub mean_abs_error_ci95_pct: Option<f64>,
    /// The largest absolute error of a combination, in percent.
    pub largest_abs_error_pct: f64,
}

/// The mean errors of all metrics.
pub fn mean_errors(comparisons: &[Comparison]) -> Vec<MeanError> {
    METRICS.iter().filter_map(|&(metric, _)| mean_error(comparisons, metric)).collect()
}

/// The mean error of one metric; none where no combination has it.
pub fn mean_error(comparisons: &[Comparison], metric: &'static str) -> Option<MeanError> {
    let lines: Vec<&Comparison> = comparisons.iter().filter(|line| line.metric == metric).collect();
    let repeats = lines.first()?.errors_pct.len();
    // Signed as the combination's own mean, so that the noise of single repeats does not add to the error.
    let of_repeat = |repeat: usize| {
        let errors = lines.iter().map(|line| line.errors_pct[repeat] * line.error_pct.signum());
        errors.sum::<f64>() / lines.len() as f64
    };
    let Interval { mean, half_width } = Interval::of(&(0..repeats).map(of_repeat).collect::<Vec<_>>());
    Some(MeanError {
        metric,
        combinations: lines.len(),
        mean_abs_error_pct: mean,
        mean_abs_error_ci95_pct: half_width,
        largest_abs_error_pct: lines.iter().map(|line| line.error_pct.abs()).fold(0.0, f64::max),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(metric: &str, errors_pct: &[f64]) -> Comparison {
        let Interval { mean, half_width } = Interval::of(errors_pct);
        Comparison {
            batching: Batching::Depth,
            exit: "none".into(),
            metric: metric.into(),
            measured: 1.0,
            simulated: 1.0,
            error_pct: mean,
            error_ci95_pct: half_width,
            errors_pct: errors_pct.to_vec(),
        }
    }

    #[test]
    fn the_mean_error_is_that_of_the_combinations_however_their_repeats_scatter() {
        let lines = [line(TTFT, &[-5.0, 1.0]), line(TTFT, &[4.0, 4.0]), line(TPOT, &[9.0, 9.0])];
        let error = mean_error(&lines, TTFT).unwrap();
        assert_eq!((error.combinations, error.mean_abs_error_pct, error.largest_abs_error_pct), (2, 3.0, 4.0));
        // By repeat (5 + 4) / 2 and (-1 + 4) / 2: t of 1 degree of freedom is 12.706, the standard error 1.5.
        assert!((error.mean_abs_error_ci95_pct.unwrap() - 12.706_205 * 1.5).abs() < 1e-3);
        assert_eq!(mean_error(&lines, THROUGHPUT), None);
        assert_eq!(mean_errors(&lines).len(), 2);
    }
}
