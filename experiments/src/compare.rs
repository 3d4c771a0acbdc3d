//! Comparing: what was predicted beside what was measured, with errors and their confidence intervals.
//!
//! An error is 100 (predicted / measured - 1) percent, of each repeat. Intervals cover two sources of chance: repeats of
//! the measurement, by Student's t over the repeats, and rounds of the profile, by the jackknife (the prediction is made
//! again without each round in turn). The two half-widths are joined as independent ones.

use scheduler::{Batching, KvFill};
use serde::{Serialize, Serializer};
use simulator::{Interval, Summary};

/// Name of a metric, as the column of `summary.csv`, and its value in a summary.
pub type Metric = (&'static str, fn(&Summary) -> Option<f64>);

/// Generated tokens per second.
pub const THROUGHPUT: &str = "throughput_tok_s";
/// Mean time to the first token.
pub const TTFT: &str = "ttft_mean_ms";
/// Mean time per token after the first.
pub const TPOT: &str = "tpot_mean_ms";
/// Mean end-to-end latency.
pub const E2E: &str = "e2e_mean_ms";
/// The 99th percentile of end-to-end latency.
pub const E2E_P99: &str = "e2e_p99_ms";
/// Requests per second that met the objectives.
pub const GOODPUT: &str = "goodput_req_s";

/// What is compared as a ratio to the baseline.
pub const RATIOS: [Metric; 4] = [
    (THROUGHPUT, |summary| Some(summary.throughput_tok_s)),
    (TPOT, |summary| Some(summary.tpot_mean_ms)),
    (E2E, |summary| Some(summary.e2e_mean_ms)),
    (E2E_P99, |summary| Some(summary.e2e_p99_ms)),
];
/// What is compared as it is.
pub const VALUES: [Metric; 6] = [
    (THROUGHPUT, |summary| Some(summary.throughput_tok_s)),
    ("mean_depth", |summary| Some(summary.mean_depth)),
    (TTFT, |summary| Some(summary.ttft_mean_ms)),
    (TPOT, |summary| Some(summary.tpot_mean_ms)),
    (E2E, |summary| Some(summary.e2e_mean_ms)),
    (E2E_P99, |summary| Some(summary.e2e_p99_ms)),
];
/// What is compared where arrivals decide the throughput.
pub const BELOW_CAPACITY: [Metric; 6] = [
    (TTFT, |summary| Some(summary.ttft_mean_ms)),
    ("ttft_p99_ms", |summary| Some(summary.ttft_p99_ms)),
    (TPOT, |summary| Some(summary.tpot_mean_ms)),
    ("tpot_p99_ms", |summary| Some(summary.tpot_p99_ms)),
    (E2E_P99, |summary| Some(summary.e2e_p99_ms)),
    (GOODPUT, |summary| summary.goodput_req_s),
];

/// A kind of comparison, each with a table of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Replays in turn, as the requests arrive.
    Validation,
    /// Ratios to sequence-wise batching without exits, in a closed loop.
    Speedups,
    /// Values in a closed loop.
    Absolute,
    /// Values at rates of arrival.
    AtRates,
}

impl Kind {
    /// Name of the table, without `.csv`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Validation => "validation",
            Self::Speedups => "speedups",
            Self::Absolute => "absolute",
            Self::AtRates => "at_rates",
        }
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// One metric of one combination: a line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Batching policy.
    pub batching: Batching,
    /// Exit policy.
    pub exit_policy: String,
    /// KV fill.
    pub kv_fill: KvFill,
    /// Arrival rate as a share of the combination's own measured capacity; `None` where arrivals are not scaled to one.
    pub load: Option<f64>,
    /// Name of the metric, as the column of `summary.csv`.
    pub metric: &'static str,
    /// What the simulator said before.
    pub predicted: f64,
    /// What the engine gave: the mean of the repeats.
    pub measured: f64,
    /// Predicted less measured, in percent of measured: the mean of the repeats.
    pub error_pct: f64,
    /// Lower end of its 95% confidence interval; `None` of a single repeat.
    pub error_low_pct: Option<f64>,
    /// Upper end of the interval.
    pub error_high_pct: Option<f64>,
    /// Mean over the repeats of the absolute error, in percent.
    pub abs_error_pct: f64,
    /// Lower end of its 95% confidence interval, at least 0; `None` of a single repeat.
    pub abs_error_low_pct: Option<f64>,
    /// Upper end of the interval.
    pub abs_error_high_pct: Option<f64>,
    /// How far a prediction from a repeat of the profile is from this one, in percent; `None` without a repeat.
    pub profile_repeat_pct: Option<f64>,
    /// What the line was made from.
    #[serde(skip)]
    case: Case,
}

/// Predicted and measured values of one metric of one combination.
#[derive(Clone, Debug, Default)]
struct Case {
    predicted: f64,
    /// Predictions without each round of the profile in turn.
    without_a_round: Vec<f64>,
    /// By repeat.
    measured: Vec<f64>,
    /// Whether it counts in means: not if the prediction is no more than that equals are equal.
    counts: bool,
}

/// Predictions of a metric: from the profile, from the profile without each round in turn, and from a repeat of the
/// profile.
pub struct Predictions<T> {
    /// From the profile.
    pub first: T,
    /// From the profile without each of its rounds in turn.
    pub without_a_round: Vec<T>,
    /// From a repeat of the profile, if one was made.
    pub repeat: Option<T>,
}

impl<T> Predictions<T> {
    /// The same predictions by something that is in each of them.
    pub fn map<'p, U>(&'p self, value: impl Fn(&'p T) -> U) -> Predictions<U> {
        Predictions {
            first: value(&self.first),
            without_a_round: self.without_a_round.iter().map(&value).collect(),
            repeat: self.repeat.as_ref().map(&value),
        }
    }

    /// As [`map`](Self::map), by a function that can fail.
    ///
    /// # Errors
    /// Its first error.
    pub fn try_map<U, E>(&self, value: impl Fn(&T) -> Result<U, E>) -> Result<Predictions<U>, E> {
        Ok(Predictions {
            first: value(&self.first)?,
            without_a_round: self.without_a_round.iter().map(&value).collect::<Result<_, _>>()?,
            repeat: self.repeat.as_ref().map(&value).transpose()?,
        })
    }
}

impl Comparison {
    /// Compares a metric of the combination that `of` is a run of; `None` where a run has no such value.
    pub fn new(
        of: &Summary,
        load: Option<f64>,
        metric: &'static str,
        predicted: &Predictions<Option<f64>>,
        measured: impl IntoIterator<Item = Option<f64>>,
    ) -> Option<Self> {
        let known = |value: Option<f64>| value.filter(|value| value.is_finite());
        let measured = measured.into_iter().map(|value| known(value).filter(|&value| value > 0.0));
        let without_a_round = predicted.without_a_round.iter().copied().map(known);
        let case = Case {
            predicted: known(predicted.first)?,
            without_a_round: without_a_round.collect::<Option<_>>()?,
            measured: measured.collect::<Option<_>>()?,
            counts: true,
        };
        let (errors, abs_errors) = (case.errors(case.predicted), case.abs_errors(case.predicted));
        let error = Estimate::new(&errors, mean(&errors), case.again(|case, predicted| mean(&case.errors(predicted))));
        let abs_error = Estimate::new(
            &abs_errors,
            mean(&abs_errors),
            case.again(|case, predicted| mean(&case.abs_errors(predicted))),
        );
        Some(Self {
            batching: of.batching,
            exit_policy: of.exit_policy.clone(),
            kv_fill: of.kv_fill,
            load,
            metric,
            predicted: case.predicted,
            measured: mean(&case.measured),
            error_pct: error.value,
            error_low_pct: error.half_width.map(|half| error.value - half),
            error_high_pct: error.half_width.map(|half| error.value + half),
            abs_error_pct: abs_error.value,
            abs_error_low_pct: abs_error.low_of_positive(),
            abs_error_high_pct: abs_error.half_width.map(|half| abs_error.value + half),
            profile_repeat_pct: predicted.repeat.flatten().map(|repeat| 100.0 * (repeat / case.predicted - 1.0)),
            case,
        })
    }

    /// The line of a combination that is compared with itself: it shows the noise, and does not count in means.
    pub fn of_equals(mut self) -> Self {
        self.case.counts = false;
        self
    }

    /// Each repeat.
    pub fn repeats(&self, kind: Kind) -> impl Iterator<Item = Repeat<'_>> {
        let errors = self.case.errors(self.case.predicted);
        self.case.measured.iter().zip(errors).zip(1..).map(move |((&measured, error_pct), repeat)| Repeat {
            table: kind,
            batching: self.batching,
            exit_policy: &self.exit_policy,
            kv_fill: self.kv_fill,
            load: self.load,
            metric: self.metric,
            repeat,
            predicted: self.predicted,
            measured,
            error_pct,
        })
    }
}

/// One repeat of one comparison: a line of `repeats.csv`.
#[derive(Clone, Debug, Serialize)]
pub struct Repeat<'a> {
    /// The table that the comparison is in.
    pub table: Kind,
    /// Batching policy.
    pub batching: Batching,
    /// Exit policy.
    pub exit_policy: &'a str,
    /// KV fill.
    pub kv_fill: KvFill,
    /// Arrival rate as a share of the capacity.
    pub load: Option<f64>,
    /// Name of the metric.
    pub metric: &'a str,
    /// Number of the repeat, from 1.
    pub repeat: usize,
    /// What the simulator said before.
    pub predicted: f64,
    /// What the engine gave.
    pub measured: f64,
    /// Predicted less measured, in percent of measured.
    pub error_pct: f64,
}

/// The mean error of one metric over all combinations: a line of `errors.csv`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MeanError {
    /// The table that the comparisons are in.
    pub table: Kind,
    /// Arrival rate as a share of the capacity.
    pub load: Option<f64>,
    /// Name of the metric.
    pub metric: &'static str,
    /// Number of combinations.
    pub combinations: usize,
    /// Mean over combinations and repeats of the absolute error, in percent.
    pub mean_abs_error_pct: f64,
    /// Lower end of its 95% confidence interval, at least 0; `None` of a single repeat.
    pub mean_abs_error_low_pct: Option<f64>,
    /// Upper end of the interval.
    pub mean_abs_error_high_pct: Option<f64>,
    /// The largest absolute error of a combination, in percent.
    pub largest_abs_error_pct: f64,
}

/// The mean errors of a table, by load and metric.
pub fn mean_errors(kind: Kind, comparisons: &[Comparison]) -> Vec<MeanError> {
    let mut groups: Vec<(Option<f64>, &'static str)> = Vec::new();
    for line in comparisons.iter().filter(|line| line.case.counts) {
        if !groups.contains(&(line.load, line.metric)) {
            groups.push((line.load, line.metric));
        }
    }
    let is_of = |line: &&Comparison, (load, metric)| line.case.counts && (line.load, line.metric) == (load, metric);
    let error = |(load, metric)| {
        let lines: Vec<&Comparison> = comparisons.iter().filter(|line| is_of(line, (load, metric))).collect();
        mean_error(kind, load, metric, &lines)
    };
    groups.into_iter().map(error).collect()
}

fn mean_error(kind: Kind, load: Option<f64>, metric: &'static str, lines: &[&Comparison]) -> MeanError {
    let cases: Vec<&Case> = lines.iter().map(|line| &line.case).collect();
    let mean_of =
        |values: &dyn Fn(&Case) -> f64| cases.iter().map(|case| values(case)).sum::<f64>() / cases.len() as f64;
    let repeats = cases.iter().map(|case| case.measured.len()).min().unwrap_or(0);
    let by_repeat: Vec<f64> =
        (0..repeats).map(|repeat| mean_of(&|case| case.abs_errors(case.predicted)[repeat])).collect();
    let rounds = cases.iter().map(|case| case.without_a_round.len()).min().unwrap_or(0);
    let again = (0..rounds).map(|round| mean_of(&|case| mean(&case.abs_errors(case.without_a_round[round]))));
    let estimate = Estimate::new(&by_repeat, mean(&by_repeat), again.collect());
    MeanError {
        table: kind,
        load,
        metric,
        combinations: cases.len(),
        mean_abs_error_pct: estimate.value,
        mean_abs_error_low_pct: estimate.low_of_positive(),
        mean_abs_error_high_pct: estimate.half_width.map(|half| estimate.value + half),
        largest_abs_error_pct: lines.iter().map(|line| line.abs_error_pct).fold(0.0, f64::max),
    }
}

impl Case {
    /// Errors of a prediction, by repeat, in percent.
    fn errors(&self, predicted: f64) -> Vec<f64> {
        self.measured.iter().map(|measured| 100.0 * (predicted / measured - 1.0)).collect()
    }

    fn abs_errors(&self, predicted: f64) -> Vec<f64> {
        self.errors(predicted).into_iter().map(f64::abs).collect()
    }

    /// A statistic of the predictions without each round in turn.
    fn again(&self, statistic: impl Fn(&Self, f64) -> f64) -> Vec<f64> {
        self.without_a_round.iter().map(|&predicted| statistic(self, predicted)).collect()
    }
}

/// A value with the half-width of its 95% confidence interval; `None` of a single repeat.
struct Estimate {
    value: f64,
    half_width: Option<f64>,
}

impl Estimate {
    /// A mean over repeats, which is also a statistic `value` of the profile; `without_a_round` are its values without
    /// each round in turn.
    fn new(repeats: &[f64], value: f64, without_a_round: Vec<f64>) -> Self {
        let rounds = without_a_round.len() as f64;
        // Pseudo-values of the jackknife: as if the statistic were a mean over the rounds.
        let pseudo: Vec<f64> =
            without_a_round.iter().map(|without| rounds * value - (rounds - 1.0) * without).collect();
        let of_rounds = Interval::of(&pseudo).half_width.unwrap_or(0.0);
        Self { value, half_width: Interval::of(repeats).half_width.map(|half| half.hypot(of_rounds)) }
    }

    /// Lower end of the interval of a value that cannot be negative.
    fn low_of_positive(&self) -> Option<f64> {
        self.half_width.map(|half| (self.value - half).max(0.0))
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The middle value; of an even number, the mean of the middle two.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_unstable_by(f64::total_cmp);
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    use scheduler::{ExitPolicy, Settings};
    use simulator::{Metrics, Source};

    use super::*;

    /// A line of a metric that was measured at 100, with errors of each repeat in percent.
    fn line(metric: &'static str, errors_pct: &[f64], without_a_round: &[f64]) -> Comparison {
        let run = Metrics::new(&Settings::new(Batching::Depth, ExitPolicy::None, 4)).summary(Source::Measured, None);
        let predicted = Predictions {
            first: Some(100.0),
            without_a_round: without_a_round.iter().map(|&value| Some(value)).collect(),
            repeat: Some(Some(97.0)),
        };
        let measured = errors_pct.iter().map(|error| Some(100.0 / (1.0 + error / 100.0)));
        Comparison::new(&run, None, metric, &predicted, measured).unwrap()
    }

    fn assert_near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
    }

    #[test]
    fn errors_are_means_over_repeats_with_intervals_of_student_s_t() {
        let error = line(TTFT, &[-4.0, 2.0], &[]);
        assert_near(error.error_pct, -1.0);
        assert_near(error.abs_error_pct, 3.0);
        // Two values: 12.706 times half their distance.
        assert_near(error.error_high_pct.unwrap(), -1.0 + 12.706_205 * 3.0);
        assert_near(error.abs_error_high_pct.unwrap(), 3.0 + 12.706_205);
        assert_eq!(error.abs_error_low_pct, Some(0.0), "an absolute error has no negative bound");
        assert_near(error.profile_repeat_pct.unwrap(), -3.0);
        assert_eq!(line(TTFT, &[2.0], &[99.0, 101.0]).error_low_pct, None, "one repeat has no interval");
    }

    #[test]
    fn rounds_of_the_profile_widen_an_interval_as_the_jackknife_says() {
        let (steady, varied) = (line(TTFT, &[5.0, 5.0], &[100.0; 2]), line(TTFT, &[5.0, 5.0], &[98.0, 102.0]));
        assert_near(steady.error_high_pct.unwrap(), 5.0);
        // A mean of two rounds is 98 and 102 without one of them: errors of 2.9 and 7.1, whose half distance is 2.1.
        assert_near(varied.error_high_pct.unwrap(), 5.0 + 12.706_205 * 2.1);
        let joined = line(TTFT, &[3.0, 7.0], &[98.0, 102.0]);
        let of_rounds = 12.706_205
            * (joined.case.errors(102.0)[0] - joined.case.errors(98.0)[0] + joined.case.errors(102.0)[1]
                - joined.case.errors(98.0)[1])
            / 4.0;
        assert_near(joined.error_high_pct.unwrap(), 5.0 + (12.706_205 * 2.0_f64).hypot(of_rounds));
    }

    #[test]
    fn a_mean_error_is_over_combinations_and_repeats_without_equals() {
        let lines = [
            line(TTFT, &[-5.0, 1.0], &[]),
            line(TTFT, &[4.0, 4.0], &[]),
            line(TTFT, &[90.0, 90.0], &[]).of_equals(),
            line(TPOT, &[9.0, 9.0], &[]),
        ];
        let errors = mean_errors(Kind::Speedups, &lines);
        assert_eq!(
            errors.iter().map(|error| (error.metric, error.combinations)).collect::<Vec<_>>(),
            [(TTFT, 2), (TPOT, 1)]
        );
        assert_near(errors[0].mean_abs_error_pct, 3.5);
        assert_near(errors[0].largest_abs_error_pct, 4.0);
        // By repeat: 4.5 and 2.5.
        assert_near(errors[0].mean_abs_error_high_pct.unwrap(), 3.5 + 12.706_205);
        assert_eq!(errors[0].mean_abs_error_low_pct, Some(0.0));
    }

    #[test]
    fn every_repeat_can_be_read() {
        let line = line(TTFT, &[-5.0, 1.0], &[]);
        let repeats: Vec<_> = line.repeats(Kind::Absolute).map(|line| (line.repeat, line.error_pct.round())).collect();
        assert_eq!(repeats, [(1, -5.0), (2, 1.0)]);
    }

    #[test]
    fn what_has_no_value_is_not_compared() {
        let run = Metrics::new(&Settings::new(Batching::Depth, ExitPolicy::None, 4)).summary(Source::Measured, None);
        let predicted = |first| Predictions { first, without_a_round: Vec::new(), repeat: None };
        for (first, measured) in
            [(None, Some(1.0)), (Some(1.0), None), (Some(f64::NAN), Some(1.0)), (Some(1.0), Some(0.0))]
        {
            assert!(Comparison::new(&run, None, TTFT, &predicted(first), [measured]).is_none());
        }
    }
}
