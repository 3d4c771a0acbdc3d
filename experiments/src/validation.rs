//! The simulator against the engine: the same requests under the same policies, metric by metric, repeat by repeat.

use scheduler::{Batching, KvFill};
use serde::{Deserialize, Serialize};
use simulator::Summary;

use crate::bootstrap;

/// One metric of one combination: a line of `validation.csv`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// Batching policy.
    pub batching: Batching,
    /// Kind of exit policy: none, static, mix, oracle, confidence.
    pub exit: String,
    /// The whole exit policy; empty in files of earlier versions.
    #[serde(default)]
    pub exit_policy: String,
    /// The KV fill.
    #[serde(default)]
    pub kv_fill: KvFill,
    /// Name of the metric, as the column of `summary.csv`.
    pub metric: String,
    /// What the engine gave: the median of the repeats.
    pub measured: f64,
    /// What the simulator said, likewise.
    pub simulated: f64,
    /// Simulated less measured, in percent of measured: the median of the repeats.
    pub error_pct: f64,
    /// Where its 95% confidence interval begins; none of a single repeat.
    pub error_low_pct: Option<f64>,
    /// Where it ends.
    pub error_high_pct: Option<f64>,
    /// By repeat, what the engine gave and what the simulator said.
    #[serde(skip)]
    repeats: Vec<(f64, f64)>,
}

/// One repeat of one combination: a line of `repeats.csv`.
#[derive(Clone, Debug, Serialize)]
pub struct Repeat<'a> {
    /// Batching policy.
    pub batching: Batching,
    /// Kind of exit policy: none, static, mix, oracle, confidence.
    pub exit: &'a str,
    /// The whole exit policy.
    pub exit_policy: &'a str,
    /// The KV fill.
    pub kv_fill: KvFill,
    /// Name of the metric, as the column of `summary.csv`.
    pub metric: &'a str,
    /// Which repeat, from 1 on.
    pub repeat: usize,
    /// What the engine gave.
    pub measured: f64,
    /// What the simulator said.
    pub simulated: f64,
}

type Metric = (&'static str, fn(&Summary) -> Option<f64>);

/// What is compared.
const METRICS: [Metric; 9] = [
    (THROUGHPUT, |summary| Some(summary.throughput_tok_s)),
    ("mean_depth", |summary| Some(summary.mean_depth)),
    (TOKEN_AGREEMENT, |summary| summary.token_agreement),
    (TTFT, |summary| Some(summary.ttft_mean_ms)),
    ("ttft_p50_ms", |summary| Some(summary.ttft_p50_ms)),
    (TPOT, |summary| Some(summary.tpot_mean_ms)),
    ("tpot_p50_ms", |summary| Some(summary.tpot_p50_ms)),
    ("e2e_mean_ms", |summary| Some(summary.e2e_mean_ms)),
    (E2E_P99, |summary| Some(summary.e2e_p99_ms)),
];

/// The metric that the simulator is judged by first.
pub const THROUGHPUT: &str = "throughput_tok_s";
/// Share of the tokens that are those of full depth.
pub const TOKEN_AGREEMENT: &str = "token_agreement";
/// Mean time to the first token.
pub const TTFT: &str = "ttft_mean_ms";
/// Mean time per token after the first.
pub const TPOT: &str = "tpot_mean_ms";
/// The 99th percentile of end-to-end latency.
pub const E2E_P99: &str = "e2e_p99_ms";

/// The middle value; of an even number, the mean of the middle two.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_unstable_by(f64::total_cmp);
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

impl Comparison {
    fn new(run: &Summary, metric: &str, repeats: Vec<(f64, f64)>) -> Self {
        let mut comparison = Self {
            batching: run.batching,
            exit: run.exit.clone(),
            exit_policy: run.exit_policy.clone(),
            kv_fill: run.kv_fill,
            metric: metric.to_owned(),
            measured: median(repeats.iter().map(|repeat| repeat.0)),
            simulated: median(repeats.iter().map(|repeat| repeat.1)),
            error_pct: 0.0,
            error_low_pct: None,
            error_high_pct: None,
            repeats,
        };
        let all: Vec<usize> = (0..comparison.repeats.len()).collect();
        comparison.error_pct = comparison.error_of(&all);
        let interval = bootstrap::interval(all.len(), |sample| comparison.error_of(sample));
        (comparison.error_low_pct, comparison.error_high_pct) = interval.unzip();
        comparison
    }

    /// The median error of some repeats, in percent.
    fn error_of(&self, repeats: &[usize]) -> f64 {
        let error = |&repeat: &usize| {
            let (measured, simulated) = self.repeats[repeat];
            100.0 * (simulated / measured - 1.0)
        };
        median(repeats.iter().map(error))
    }

    /// Each repeat.
    pub fn repeats(&self) -> impl Iterator<Item = Repeat<'_>> {
        self.repeats.iter().enumerate().map(|(index, &(measured, simulated))| Repeat {
            batching: self.batching,
            exit: &self.exit,
            exit_policy: &self.exit_policy,
            kv_fill: self.kv_fill,
            metric: &self.metric,
            repeat: index + 1,
            measured,
            simulated,
        })
    }
}

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
    let of = |summary: &Summary| value(summary).filter(|value| value.is_finite());
    let pairs = measured.iter().zip(simulated);
    let repeats = pairs.map(|(measured, simulated)| Some((of(&measured[place])?, of(&simulated[place])?)));
    let run = &measured[0][place];
    debug_assert_eq!(
        (run.batching, &run.exit_policy),
        (simulated[0][place].batching, &simulated[0][place].exit_policy)
    );
    Some(Comparison::new(run, metric, repeats.collect::<Option<_>>()?))
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
    /// Where its 95% confidence interval begins; none of a single repeat.
    pub mean_abs_error_low_pct: Option<f64>,
    /// Where it ends.
    pub mean_abs_error_high_pct: Option<f64>,
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
    let repeats = lines.first()?.repeats.len();
    let mean = |of: &dyn Fn(&Comparison) -> f64| lines.iter().map(|line| of(line)).sum::<f64>() / lines.len() as f64;
    // Signed as the combination's own median, so that the noise of single repeats does not add to the error.
    let of_sample = |sample: &[usize]| mean(&|line| line.error_of(sample) * line.error_pct.signum());
    let interval = bootstrap::interval(repeats, of_sample);
    let (mean_abs_error_low_pct, mean_abs_error_high_pct) = interval.unzip();
    Some(MeanError {
        metric,
        combinations: lines.len(),
        mean_abs_error_pct: mean(&|line| line.error_pct.abs()),
        mean_abs_error_low_pct,
        mean_abs_error_high_pct,
        largest_abs_error_pct: lines.iter().map(|line| line.error_pct.abs()).fold(0.0, f64::max),
    })
}

#[cfg(test)]
mod tests {
    use scheduler::{ExitPolicy, Settings};
    use simulator::{Metrics, Source};

    use super::*;

    fn line(metric: &str, errors_pct: &[f64]) -> Comparison {
        let repeats = errors_pct.iter().map(|error| (100.0, 100.0 + error)).collect();
        let run = Metrics::new(&Settings::new(Batching::Depth, ExitPolicy::None, 4)).summary(Source::Measured, None);
        Comparison::new(&run, metric, repeats)
    }

    fn assert_near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
    }

    #[test]
    fn an_error_is_that_of_the_middle_repeat_whatever_the_others_met_with() {
        let error = line(TTFT, &[2.0, 400.0, 3.0, 1.0, -90.0]);
        assert_near(error.error_pct, 2.0);
        assert_near(error.simulated, 102.0);
        let (low, high) = (error.error_low_pct.unwrap(), error.error_high_pct.unwrap());
        assert!(low < 2.0 && 2.0 < high, "{low} to {high}");
        assert_eq!(line(TTFT, &[2.0]).error_low_pct, None);
    }

    #[test]
    fn an_interval_holds_what_nineteen_of_twenty_samples_give() {
        // The median of two draws from two repeats is either of them, a quarter of the time each, or their mean.
        let error = line(TTFT, &[-5.0, 1.0]);
        assert_near(error.error_pct, -2.0);
        assert_near(error.error_low_pct.unwrap(), -5.0);
        assert_near(error.error_high_pct.unwrap(), 1.0);
        let steady = line(TTFT, &[4.0; 9]);
        assert_near(steady.error_low_pct.unwrap(), 4.0);
    }

    #[test]
    fn the_mean_error_is_that_of_the_combinations_however_their_repeats_scatter() {
        let lines = [line(TTFT, &[-5.0, 1.0]), line(TTFT, &[4.0, 4.0]), line(TPOT, &[9.0, 9.0])];
        let error = mean_error(&lines, TTFT).unwrap();
        assert_eq!(error.combinations, 2);
        assert_near(error.mean_abs_error_pct, 3.0);
        assert_near(error.largest_abs_error_pct, 4.0);
        // (5 + 4) / 2 and (-1 + 4) / 2.
        assert_near(error.mean_abs_error_low_pct.unwrap(), 1.5);
        assert_near(error.mean_abs_error_high_pct.unwrap(), 4.5);
        assert_eq!(mean_error(&lines, THROUGHPUT), None);
        assert_eq!(mean_errors(&lines).len(), 2);
    }

    #[test]
    fn every_repeat_can_be_read() {
        let lines = [line(TTFT, &[-5.0, 1.0])];
        let repeats: Vec<_> = lines[0].repeats().map(|line| (line.repeat, line.measured, line.simulated)).collect();
        assert_eq!(repeats, [(1, 100.0, 95.0), (2, 100.0, 101.0)]);
    }
}
