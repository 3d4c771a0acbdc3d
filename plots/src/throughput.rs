//! Throughput against batch size and exit threshold.

use crate::axis::Axis;
use crate::canvas::{self, WIDTH};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::Look;
use crate::{Error, Figure, Policy, PolicyLine};

const THROUGHPUT: &str = "throughput (tokens/s)";
const AGREEMENT: &str = "token agreement (%)";

/// Throughput and agreement of a policy over exit thresholds.
#[derive(Clone, Debug)]
pub struct ThresholdLine {
    /// Batching and exit policy.
    pub policy: Policy,
    /// Points in any order.
    pub points: Vec<ThresholdPoint>,
}

/// Results of one threshold.
#[derive(Clone, Copy, Debug)]
pub struct ThresholdPoint {
    /// Threshold, in the measure's own unit.
    pub threshold: f64,
    /// Generated tokens/s.
    pub throughput: f64,
    /// Share of generated tokens equal to those of full depth, 0 to 1.
    pub agreement: f64,
}

/// Draws throughput (tokens/s) against batch size (sequences), a line per policy.
///
/// # Errors
/// No lines, a line without points, a batch size that is not positive, a negative throughput.
pub fn throughput_by_batch(figure: &Figure, lines: &[PolicyLine]) -> Result<(), Error> {
    figure.require("policies", lines)?;
    for line in lines {
        let label = line.policy.label();
        let batches = line.points.iter().map(|p| p.0);
        figure.check(&format!("batch size of `{label}`"), Kind::Positive, batches)?;
        let throughputs = line.points.iter().map(|p| p.1);
        figure.check(&format!("throughput of `{label}`"), Kind::NonNegative, throughputs)?;
    }
    let points = || lines.iter().flat_map(|line| &line.points);
    let x = Axis::log_at_values("batch size (sequences)", points().map(|p| p.0));
    let y = Axis::from_zero(THROUGHPUT, points().map(|p| p.1));
    let looks = Look::policies(lines.iter().map(|line| &line.policy));
    let legend = policy_legend(lines.iter().map(|line| &line.policy), Sample::MarkedLine);
    canvas::draw(figure, (WIDTH, 1000), &legend, |area| {
        let panel = Panel::new(area, &x, &y)?;
        let mut lines = lines.iter().zip(&looks);
        lines.try_for_each(|(line, look)| panel.marked_line(&line.points, *look))
    })
}

/// Draws throughput and, below it, token agreement against the exit threshold.
///
/// # Errors
/// No lines, a line without points, a threshold that is not finite, a negative throughput, or an
/// agreement that is not a share.
pub fn thresholds(figure: &Figure, lines: &[ThresholdLine]) -> Result<(), Error> {
    figure.require("policies", lines)?;
    for line in lines {
        let label = line.policy.label();
        let check = |what, kind, value: fn(&ThresholdPoint) -> f64| {
            figure.check(&format!("{what} of `{label}`"), kind, line.points.iter().map(value))
        };
        check("threshold", Kind::Finite, |p| p.threshold)?;
        check("throughput", Kind::NonNegative, |p| p.throughput)?;
        check("agreement", Kind::Share, |p| p.agreement)?;
    }
    let points = || lines.iter().flat_map(|line| &line.points);
    let x = Axis::linear("exit threshold", points().map(|p| p.threshold));
    let ys = [
        Axis::from_zero(THROUGHPUT, points().map(|p| p.throughput)),
        Axis::linear(AGREEMENT, points().map(|p| 100.0 * p.agreement)).at_most(HIGHEST_SHARE),
    ];
    let looks = Look::policies(lines.iter().map(|line| &line.policy));
    let legend = policy_legend(lines.iter().map(|line| &line.policy), Sample::MarkedLine);
    let values: [fn(&ThresholdPoint) -> f64; 2] = [|p| p.throughput, |p| 100.0 * p.agreement];
    canvas::draw(figure, (WIDTH, 1240), &legend, |area| {
        let panels = Panel::labelled_stack(area, &x, &ys)?;
        for (panel, value) in panels.iter().zip(values) {
            for (line, look) in lines.iter().zip(&looks) {
                let points = line.points.iter().map(|p| (p.threshold, value(p)));
                panel.marked_line(&points.collect::<Vec<_>>(), *look)?;
            }
        }
        Ok(())
    })
}

/// Top of an axis of percentages: a marker at 100 % stays whole.
pub(crate) const HIGHEST_SHARE: f64 = 101.0;

pub(crate) fn policy_legend<'a>(
    policies: impl Iterator<Item = &'a Policy> + Clone,
    sample: fn(Look) -> Sample,
) -> Vec<Entry> {
    let looks = Look::policies(policies.clone());
    policies.zip(looks).map(|(policy, look)| Entry::new(policy.label(), sample(look))).collect()
}
