//! Throughput against the quality of what was served: which combination is the fastest at a given quality.

use scheduler::Batching;
use simulator::Summary;

use crate::compare::median;
use crate::speedup::{Ratio, is_attainable, is_baseline, ratio};

/// How far below full depth a text counts as equally good: one point.
pub const TOLERANCE: f64 = 0.01;

/// A measure of the quality of a served text, where more is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QualityMeasure {
    /// Share of the served tokens that full depth gives after the same prefix.
    Agreement,
    /// Share of the graded requests whose text begins with the answer.
    Accuracy,
}

impl QualityMeasure {
    /// Every measure.
    pub const ALL: [Self; 2] = [Self::Agreement, Self::Accuracy];

    /// The quality of a run; `None` if it was not measured.
    pub fn of(self, summary: &Summary) -> Option<f64> {
        match self {
            Self::Agreement => summary.token_agreement,
            Self::Accuracy => summary.exact_match,
        }
    }

    /// Its name in a sentence.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agreement => "token agreement",
            Self::Accuracy => "exact-match accuracy",
        }
    }
}

/// The fastest combinations whose quality is that of full depth less one point.
#[derive(Clone, Debug, PartialEq)]
pub struct Headline {
    /// What quality is measured by.
    pub measure: QualityMeasure,
    /// The least quality that counts.
    pub least: f64,
    /// Place in each repeat of the fastest baseline.
    pub baseline: usize,
    /// Place of the fastest combination whose exits depend on the token, and how much faster it is than the baseline;
    /// `None` if there is none of that quality.
    pub adaptive: Option<(usize, Ratio)>,
}

impl Headline {
    /// The headline in a sentence, with the names of the runs of `repeat`.
    pub fn sentence(&self, repeat: &[Summary]) -> String {
        let Self { measure, least, baseline, adaptive } = self;
        let name = |place: usize| {
            let summary = &repeat[place];
            format!("{} ({:.3})", combination(summary), measure.of(summary).unwrap_or(f64::NAN))
        };
        let quality = format!("at the quality of full depth less 1 point ({} of at least {least:.3})", measure.name());
        let baseline = name(*baseline);
        match adaptive {
            Some((place, Ratio { median, least, most, .. })) => format!(
                "{quality}, {} is {median:.2} times the best baseline, which is {baseline} ({least:.2} to {most:.2} by \
                 repeat)",
                name(*place)
            ),
            None => format!("{quality}, the best baseline is {baseline}; no adaptive exit policy is as good"),
        }
    }
}

/// The headline of what was measured: for each repeat a summary of each combination. `None` if full depth or its quality
/// was not measured.
pub fn headline(repeats: &[Vec<Summary>], measure: QualityMeasure) -> Option<Headline> {
    let first = repeats.first()?;
    let full_depth = first.iter().filter(|summary| summary.exit == "none").find_map(|summary| measure.of(summary))?;
    let least = full_depth - TOLERANCE;
    let fastest = |is_member: fn(&Summary) -> bool| {
        let good = |place: &usize| {
            is_member(&first[*place]) && measure.of(&first[*place]).is_some_and(|quality| quality >= least)
        };
        let throughput = |place: usize| median(repeats.iter().map(|repeat| repeat[place].throughput_tok_s));
        (0..first.len()).filter(good).max_by(|&a, &b| throughput(a).total_cmp(&throughput(b)))
    };
    let baseline = fastest(is_baseline)?;
    let adaptive = fastest(|summary| !is_baseline(summary) && is_attainable(summary));
    let adaptive = adaptive.map(|place| (place, ratio(repeats, place, baseline)));
    Some(Headline { measure, least, baseline, adaptive })
}

/// Name of a combination in a sentence.
pub fn combination(Summary { batching, exit_policy, kv_fill, .. }: &Summary) -> String {
    let batching = match batching {
        Batching::Vanilla => "vanilla",
        Batching::Sequence => "sequence-wise",
        Batching::Depth => "depth-wise",
    };
    let fill = match exit_policy.as_str() {
        "none" => String::new(),
        _ => format!(" (KV fill {kv_fill})"),
    };
    format!("{batching} batching with {exit_policy}{fill}")
}

#[cfg(test)]
mod tests {
    use scheduler::{ExitPolicy, Settings};
    use simulator::{Metrics, Source};

    use super::*;

    fn summary(
        batching: Batching,
        exit: &str,
        throughput_tok_s: f64,
        agreement: f64,
        accuracy: Option<f64>,
    ) -> Summary {
        let exit: ExitPolicy = exit.parse().unwrap();
        let summary = Metrics::new(&Settings::new(batching, exit, 4)).summary(Source::Measured, Some(agreement));
        Summary { throughput_tok_s, exact_match: accuracy, ..summary }
    }

    fn repeat(factor: f64) -> Vec<Summary> {
        vec![
            summary(Batching::Sequence, "none", 100.0, 1.0, Some(0.95)),
            summary(Batching::Depth, "static:0", 900.0, 0.85, Some(0.80)),
            summary(Batching::Depth, "static:1", 200.0, 0.97, Some(0.945)),
            summary(Batching::Depth, "mix:2:3:0.5", 120.0, 0.995, Some(0.95)),
            summary(Batching::Depth, "oracle", 800.0, 1.0, Some(0.95)),
            summary(Batching::Depth, "margin:0.5", 180.0 * factor, 0.992, Some(0.945)),
            summary(Batching::Sequence, "margin:0.2", 300.0 * factor, 0.98, Some(0.90)),
        ]
    }

    #[test]
    fn the_fastest_policy_within_a_point_of_full_depth_stands_beside_the_fastest_baseline() {
        let repeats = [repeat(1.0), repeat(1.2), repeat(0.9)];
        let found = headline(&repeats, QualityMeasure::Agreement).unwrap();
        let (place, ratio) = found.adaptive.unwrap();
        assert_eq!((found.baseline, place, ratio.to), (3, 5, 3), "neither the oracle nor a worse text counts");
        let ratios = [ratio.median, ratio.least, ratio.most].map(|ratio| (100.0 * ratio).round() as u32);
        assert_eq!(ratios, [150, 135, 180]);
        let found = headline(&repeats, QualityMeasure::Accuracy).unwrap();
        assert_eq!((found.baseline, found.adaptive.unwrap().0), (2, 5), "two passes are good enough for the answers");
        assert!((found.least - 0.94).abs() < 1e-12);
    }

    #[test]
    fn where_no_policy_is_good_enough_there_is_only_the_baseline() {
        let mut only_bad = repeat(1.0);
        only_bad.remove(5);
        let found = headline(&[only_bad], QualityMeasure::Agreement).unwrap();
        assert_eq!((found.baseline, found.adaptive), (3, None));
        let ungraded: Vec<Summary> =
            repeat(1.0).into_iter().map(|summary| Summary { exact_match: None, ..summary }).collect();
        assert_eq!(headline(&[ungraded], QualityMeasure::Accuracy), None);
        assert_eq!(headline(&[repeat(1.0)[1..].to_vec()], QualityMeasure::Agreement), None, "without full depth");
    }
}
