//! Measured speed-ups, each beside the best baseline of at least the same quality.
//!
//! A baseline is what a user could do without an adaptive exit policy: full depth, one static depth for every token, or a
//! random choice between two static depths for each request, under any batching policy. Quality is the realised token agreement: that of the text that was served.

use scheduler::{Batching, ExitPolicy, Settings};
use simulator::Summary;

use crate::reporter::Reporter;

use crate::compare::median;

/// How fast a combination with an adaptive exit policy ran.
#[derive(Clone, Debug, PartialEq)]
pub struct Speedup {
    /// Place of the combination in each repeat.
    pub combination: usize,
    /// Over sequence-wise batching without exits; none where that was not measured.
    pub over_full_depth: Option<Ratio>,
    /// Over the fastest baseline whose token agreement is at least that of the combination; none where there is none.
    pub over_baseline: Option<Ratio>,
}

/// A ratio of throughputs that were measured side by side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// Place of the slower or equally good combination in each repeat.
    pub to: usize,
    /// Median over the repeats.
    pub median: f64,
    /// The least of a repeat.
    pub least: f64,
    /// The most of a repeat.
    pub most: f64,
}

/// Whether the exits of a run depend neither on tokens nor on signals.
pub fn is_baseline(summary: &Summary) -> bool {
    is_baseline_exit(&summary.exit)
}

/// The same by the kind of exit policy.
pub(crate) fn is_baseline_exit(kind: &str) -> bool {
    matches!(kind, "none" | "static" | "mix")
}

/// Warns if exit policies that depend on tokens are compared with full depth only: a static depth may be as good.
pub fn warn_without_baselines<'a>(settings: impl IntoIterator<Item = &'a Settings>, reporter: &mut dyn Reporter) {
    let exits: Vec<ExitPolicy> = settings.into_iter().map(|settings| settings.exit).collect();
    let is_fixed = |exit: &ExitPolicy| matches!(exit, ExitPolicy::Static(_) | ExitPolicy::Mix(_));
    let adaptive =
        exits.iter().find(|exit| !(is_fixed(exit) || matches!(exit, ExitPolicy::None | ExitPolicy::Oracle { .. })));
    if let Some(adaptive) = adaptive.filter(|_| !exits.iter().any(is_fixed)) {
        reporter.warning(&format!(
            "{adaptive} is compared with no static depth, which may be as good and as fast: add `baselines` to the exit policies"
        ));
    }
}

/// Whether a server could run the exit policy: the oracle needs predictions that only deeper loops give.
pub fn is_attainable(summary: &Summary) -> bool {
    is_attainable_exit(&summary.exit)
}

/// The same by the kind of exit policy.
pub(crate) fn is_attainable_exit(kind: &str) -> bool {
    kind != "oracle"
}

/// Throughput of one combination over that of another, repeat by repeat.
pub(crate) fn ratio(repeats: &[Vec<Summary>], of: usize, to: usize) -> Ratio {
    let throughput = |repeat: &[Summary], place: usize| repeat[place].throughput_tok_s;
    let ratios = || repeats.iter().map(|repeat| throughput(repeat, of) / throughput(repeat, to));
    let (least, most) = (ratios().fold(f64::INFINITY, f64::min), ratios().fold(0.0, f64::max));
    Ratio { to, median: median(ratios()), least, most }
}

/// The speed-ups of all combinations but baselines and oracles, by what was measured: for each repeat a summary of each
/// combination.
pub fn speedups(repeats: &[Vec<Summary>]) -> Vec<Speedup> {
    let Some(first) = repeats.first() else { return Vec::new() };
    let ratio = |of, to| ratio(repeats, of, to);
    let full_depth = first.iter().position(|summary| summary.batching == Batching::Sequence && summary.exit == "none");
    let of = |combination: usize| {
        let agreement = first[combination].token_agreement?;
        let as_good = |place: &usize| {
            is_baseline(&first[*place]) && first[*place].token_agreement.is_some_and(|other| other >= agreement)
        };
        // The baseline that leaves the smallest speed-up is the fastest.
        (0..first.len())
            .filter(as_good)
            .map(|place| ratio(combination, place))
            .min_by(|a, b| a.median.total_cmp(&b.median))
    };
    (0..first.len())
        .filter(|&place| !is_baseline(&first[place]) && is_attainable(&first[place]))
        .map(|combination| Speedup {
            combination,
            over_full_depth: full_depth.map(|place| ratio(combination, place)),
            over_baseline: of(combination),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use simulator::{Metrics, Source};

    use super::*;

    #[derive(Default)]
    struct Warnings(Vec<String>);

    impl Reporter for Warnings {
        fn warning(&mut self, text: &str) {
            self.0.push(text.to_owned());
        }
    }

    #[test]
    fn a_comparison_of_exits_without_a_static_depth_is_warned_about() {
        let warnings = |exits: &[&str]| {
            let settings = exits.iter().map(|exit| Settings::new(Batching::Depth, exit.parse().unwrap(), 4));
            let mut found = Warnings::default();
            warn_without_baselines(&settings.collect::<Vec<_>>(), &mut found);
            found.0
        };
        assert!(warnings(&["none", "margin:0.5", "oracle"])[0].contains("margin:0.5 is compared with no static depth"));
        assert!(warnings(&["none", "oracle"]).is_empty() && warnings(&["margin:0.5", "static:1"]).is_empty());
        assert!(warnings(&["margin:0.5", "mix:0:1:0.5"]).is_empty());
    }

    fn summary(batching: Batching, exit: &str, throughput_tok_s: f64, token_agreement: f64) -> Summary {
        let exit: ExitPolicy = exit.parse().unwrap();
        let summary = Metrics::new(&Settings::new(batching, exit, 4)).summary(Source::Measured, Some(token_agreement));
        Summary { throughput_tok_s, ..summary }
    }

    #[test]
    fn the_baseline_is_the_fastest_of_at_least_the_same_agreement() {
        let repeat = |factor: f64| {
            vec![
                summary(Batching::Sequence, "none", 100.0, 1.0),
                summary(Batching::Sequence, "static:0", 900.0, 0.85),
                summary(Batching::Sequence, "static:1", 180.0, 0.96),
                summary(Batching::Depth, "static:1", 200.0, 0.96),
                summary(Batching::Depth, "mix:0:1:0.5", 240.0, 0.92),
                summary(Batching::Depth, "oracle", 800.0, 0.95),
                summary(Batching::Depth, "confidence:margin:0.05", 240.0 * factor, 0.91),
                summary(Batching::Depth, "confidence:margin:0.5", 150.0, 0.97),
                summary(Batching::Depth, "delayed:margin:0.05", 190.0, 0.95),
            ]
        };
        let found = speedups(&[repeat(1.0), repeat(0.9), repeat(1.2)]);
        assert_eq!(found.iter().map(|speedup| speedup.combination).collect::<Vec<_>>(), [6, 7, 8]);
        let rounded = |ratio: Option<Ratio>| {
            ratio.map(|Ratio { to, median, least, most }| {
                (to, [median, least, most].map(|ratio| (100.0 * ratio).round() as u32))
            })
        };
        assert_eq!(rounded(found[0].over_full_depth), Some((0, [240, 216, 288])));
        assert_eq!(
            rounded(found[0].over_baseline),
            Some((4, [100, 90, 120])),
            "a mix is a baseline, the oracle is none"
        );
        assert_eq!(rounded(found[1].over_baseline), Some((0, [150; 3])), "two passes are not good enough");
        assert_eq!(
            rounded(found[2].over_baseline),
            Some((3, [95; 3])),
            "a delayed policy may be slower than static depth"
        );
        assert!(speedups(&[]).is_empty());
    }
}
