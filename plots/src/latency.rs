//! Distributions of TTFT and TPOT over requests.

use crate::axis::Axis;
use crate::canvas::{self, Canvas, DrawResult, WIDTH};
use crate::figure::Kind;
use crate::legend::Sample;
use crate::panel::Panel;
use crate::style::Look;
use crate::throughput::policy_legend;
use crate::{Error, Figure, Policy};

/// Latencies of the requests that one policy served.
#[derive(Clone, Debug)]
pub struct PolicyLatencies {
    /// Batching and exit policy.
    pub policy: Policy,
    /// Time to first token of each request, ms, in any order.
    pub ttft_ms: Vec<f64>,
    /// Time per output token after the first, ms, of each request that has more than one.
    pub tpot_ms: Vec<f64>,
}

/// Maximum number of points of a distribution's curve.
const MOST_POINTS: usize = 500;
const MARKERS: usize = 6;

/// Draws the cumulative distributions of TTFT and TPOT on log axes, a line per policy.
///
/// # Errors
/// No policies, a policy without latencies, or a latency that is not positive.
pub fn latency_cdfs(figure: &Figure, runs: &[PolicyLatencies]) -> Result<(), Error> {
    figure.require("policies", runs)?;
    for run in runs {
        let label = run.policy.label();
        let ttft = run.ttft_ms.iter().copied();
        figure.check(&format!("TTFT of `{label}`"), Kind::Positive, ttft)?;
        let tpot = run.tpot_ms.iter().copied();
        figure.check(&format!("TPOT of `{label}`"), Kind::Positive, tpot)?;
    }
    let legend = policy_legend(runs.iter().map(|run| &run.policy), Sample::MarkedLine);
    canvas::draw(figure, (WIDTH, 900), &legend, |area| {
        let (left, right) = area.split_horizontally(WIDTH / 2);
        draw_cdfs(&left, "time to first token (ms)", runs, |run| &run.ttft_ms)?;
        draw_cdfs(&right, "time per output token (ms)", runs, |run| &run.tpot_ms)
    })
}

fn draw_cdfs(
    area: &Canvas,
    label: &str,
    runs: &[PolicyLatencies],
    latencies: fn(&PolicyLatencies) -> &[f64],
) -> DrawResult {
    let x = Axis::log(label, runs.iter().flat_map(latencies).copied());
    let y = Axis::with_linear_ticks("share of requests (%)", 0.0, 103.0);
    let panel = Panel::new(area, &x, &y)?;
    let looks = Look::policies(runs.iter().map(|run| &run.policy));
    for (index, (run, look)) in runs.iter().zip(looks).enumerate() {
        let mut sorted = latencies(run).to_vec();
        sorted.sort_by(f64::total_cmp);
        panel.line(&cdf(&sorted), look)?;
        let offset = (index as f64 + 0.5) / runs.len() as f64;
        panel.markers(&marker_points(&sorted, offset), look)?;
    }
    Ok(())
}

/// Empirical distribution function in percent, through at most `MOST_POINTS` of the sorted values.
fn cdf(sorted: &[f64]) -> Vec<(f64, f64)> {
    let steps = sorted.len().min(MOST_POINTS);
    let mut below = 0.0;
    let mut corners = Vec::with_capacity(2 * steps);
    for step in 1..=steps {
        let rank = step * sorted.len() / steps;
        let value = sorted[rank - 1];
        let share = 100.0 * rank as f64 / sorted.len() as f64;
        corners.extend([(value, below), (value, share)]);
        below = share;
    }
    corners
}

/// Points of the curve for markers, at heights that `offset` (0 to 1) separates by line.
fn marker_points(sorted: &[f64], offset: f64) -> Vec<(f64, f64)> {
    (0..MARKERS)
        .map(|i| (i as f64 + offset) / MARKERS as f64)
        .map(|share| {
            let rank = (share * sorted.len() as f64) as usize;
            (sorted[rank.min(sorted.len() - 1)], 100.0 * share)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_climbs_at_each_request_to_100_percent() {
        assert_eq!(cdf(&[2.0, 7.0]), [(2.0, 0.0), (2.0, 50.0), (7.0, 50.0), (7.0, 100.0)]);
    }

    #[test]
    fn many_requests_are_thinned_to_their_quantiles() {
        let sorted: Vec<f64> = (1..=100_000).map(f64::from).collect();
        let corners = cdf(&sorted);
        assert_eq!(corners.len(), 2 * MOST_POINTS);
        assert!(corners.contains(&(50_000.0, 50.0)));
        assert_eq!(corners.last(), Some(&(100_000.0, 100.0)));
    }

    #[test]
    fn markers_stand_on_the_distribution() {
        let sorted = [1.0, 2.0, 3.0, 4.0];
        for (value, percent) in marker_points(&sorted, 0.5) {
            let below = sorted.iter().filter(|v| **v < value).count() as f64 * 25.0;
            assert!((below..=below + 25.0).contains(&percent), "{percent} % at {value}");
        }
    }
}
