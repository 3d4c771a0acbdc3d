//! Measured and simulated latencies of the same requests, side by side.

use std::fmt;

use serde::Serialize;

/// Arrival, first token and last token of a request, in seconds on one clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RequestTimes {
    /// Arrival.
    pub arrival_s: f64,
    /// When the engine received it: between two steps.
    pub queued_s: f64,
    /// First token.
    pub first_token_s: f64,
    /// Last token.
    pub last_token_s: f64,
    /// Number of generated tokens.
    pub output_tokens: u32,
}

/// Compared metrics, in milliseconds; the last is the makespan, in seconds. Latencies count from the arrival, except
/// the TTFT that counts from queueing, as in evaluations of vLLM's own records.
const METRICS: [&str; 17] = [
    "TTFT mean",
    "TTFT p50",
    "TTFT p90",
    "TTFT p95",
    "TTFT p99",
    "TTFT queued",
    "TPOT mean",
    "TPOT p50",
    "TPOT p90",
    "TPOT p95",
    "TPOT p99",
    "latency mean",
    "latency p50",
    "latency p90",
    "latency p95",
    "latency p99",
    "makespan s",
];

/// Measured and simulated latencies side by side.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Name, measured value and simulated value of each metric.
    pub rows: Vec<(&'static str, f64, f64)>,
}

/// A line of the comparison's file; times in milliseconds, the makespan in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ComparisonLine {
    metric: &'static str,
    measured: f64,
    simulated: f64,
}

impl Comparison {
    /// Compares two runs of the same requests.
    pub fn new(measured: &[RequestTimes], simulated: &[RequestTimes]) -> Self {
        let rows = METRICS.into_iter().zip(metrics(measured)).zip(metrics(simulated));
        Self { rows: rows.map(|((name, measured), simulated)| (name, measured, simulated)).collect() }
    }

    /// The lines of a CSV file.
    pub fn lines(&self) -> impl Iterator<Item = ComparisonLine> {
        self.rows.iter().map(|&(metric, measured, simulated)| ComparisonLine { metric, measured, simulated })
    }

    /// Relative error of a metric: simulated over measured value, less 1.
    pub fn error(&self, metric: &str) -> Option<f64> {
        let row = self.rows.iter().find(|row| row.0 == metric)?;
        Some(row.2 / row.1 - 1.0)
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<14}{:>14}{:>14}{:>10}", "metric", "measured", "simulated", "error")?;
        for &(name, measured, simulated) in &self.rows {
            let error = 100.0 * (simulated / measured - 1.0);
            write!(f, "\n{name:<14}{measured:>14.1}{simulated:>14.1}{error:>+9.2}%")?;
        }
        Ok(())
    }
}

fn metrics(requests: &[RequestTimes]) -> Vec<f64> {
    let of = |value: &dyn Fn(&RequestTimes) -> Option<f64>| {
        let mut values: Vec<f64> = requests.iter().filter_map(value).map(|seconds| 1e3 * seconds).collect();
        values.sort_by(f64::total_cmp);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        [mean, percentile(&values, 0.5), percentile(&values, 0.9), percentile(&values, 0.95), percentile(&values, 0.99)]
    };
    let ttft = of(&|request| Some(request.first_token_s - request.arrival_s));
    let queued = of(&|request| Some(request.first_token_s - request.queued_s));
    let tpot = of(&|request| {
        let gaps = request.output_tokens.checked_sub(1).filter(|&gaps| gaps > 0)?;
        Some((request.last_token_s - request.first_token_s) / f64::from(gaps))
    });
    let latency = of(&|request| Some(request.last_token_s - request.arrival_s));
    let first = requests.iter().map(|request| request.arrival_s).fold(f64::INFINITY, f64::min);
    let last = requests.iter().map(|request| request.last_token_s).fold(f64::NEG_INFINITY, f64::max);
    [&ttft[..], &queued[..1], &tpot, &latency, &[last - first]].concat()
}

/// Linear between the two nearest ranks; NaN without values.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = share * last as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two requests. They arrive at 7.5 and 8 s, are queued after 0.1 s and at once, and get their tokens.
    fn requests() -> [RequestTimes; 2] {
        let times = |arrival_s, queued_s, first_token_s, last_token_s, output_tokens| RequestTimes {
            arrival_s,
            queued_s,
            first_token_s,
            last_token_s,
            output_tokens,
        };
        [times(7.5, 7.6, 8.0, 8.4, 3), times(8.0, 8.0, 9.0, 9.0, 1)]
    }

    #[test]
    fn errors_are_relative_to_what_was_measured() {
        let measured = requests();
        let same = Comparison::new(&measured, &measured);
        assert!(METRICS.iter().all(|metric| same.error(metric) == Some(0.0)));
        let (_, ttft, _) = same.rows[0];
        assert!((ttft - 750.0).abs() < 1e-6);
        let slower = measured.map(|request| RequestTimes { last_token_s: request.last_token_s + 0.2, ..request });
        let comparison = Comparison::new(&measured, &slower);
        assert!((comparison.error("TPOT mean").unwrap() - 0.5).abs() < 1e-9, "{comparison}");
        assert!((comparison.error("makespan s").unwrap() - 0.2 / 1.5).abs() < 1e-9);
        assert_eq!(comparison.error("TTFT mean"), Some(0.0));
    }

    #[test]
    fn percentiles_lie_between_ranks() {
        assert_eq!(percentile(&[1.0, 2.0, 4.0], 0.5), 2.0);
        assert_eq!(percentile(&[1.0, 2.0, 4.0], 0.75), 3.0);
        assert!(percentile(&[], 0.5).is_nan());
    }
}
