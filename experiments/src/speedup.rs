//! Measured speed-ups, each beside the best baseline of at least the same quality.
//!
//! A baseline is what a user could do without an adaptive exit policy: full depth, or one static depth for every token,
//! under any batching policy. Quality is the realised token agreement: that of the text that was served.

use scheduler::Batching;
use simulator::Summary;

use crate::validation::median;

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

/// The speed-ups of all combinations but baselines and oracles, by what was measured: for each repeat a summary of each
/// combination.
pub fn speedups(repeats: &[Vec<Summary>]) -> Vec<Speedup> {
    let Some(first) = repeats.first() else { return Vec::new() };
    let ratio = |of: usize, to: usize| {
        let throughput = |repeat: &[Summary], place: usize| repeat[place].throughput_tok_s;
        let ratios = || repeats.iter().map(|repeat| throughput(repeat, of) / throughput(repeat, to));
        let (least, most) = (ratios().fold(f64::INFINITY, f64::min), ratios().fold(0.0, f64::max));
        Ratio { to, median: median(ratios()), least, most }
    };
    let full_depth = first.iter().position(|summary| summary.batching == Batching::Sequence && summary.exit == "none");
    let is_baseline = |summary: &Summary| matches!(summary.exit.as_str(), "none" | "static");
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
        .filter(|&place| !is_baseline(&first[place]) && first[place].exit != "oracle")
        .map(|combination| Speedup {
            combination,
            over_full_depth: full_depth.map(|place| ratio(combination, place)),
            over_baseline: of(combination),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use scheduler::{ExitPolicy, Settings};
    use simulator::{Metrics, Source};

    use super::*;

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
                summary(Batching::Depth, "oracle", 800.0, 0.95),
                summary(Batching::Depth, "confidence:margin:0.05", 240.0 * factor, 0.91),
                summary(Batching::Depth, "confidence:margin:0.5", 150.0, 0.97),
                summary(Batching::Depth, "delayed:margin:0.05", 190.0, 0.95),
            ]
        };
        let found = speedups(&[repeat(1.0), repeat(0.9), repeat(1.2)]);
        assert_eq!(found.iter().map(|speedup| speedup.combination).collect::<Vec<_>>(), [5, 6, 7]);
        let rounded = |ratio: Option<Ratio>| {
            ratio.map(|Ratio { to, median, least, most }| {
                (to, [median, least, most].map(|ratio| (100.0 * ratio).round() as u32))
            })
        };
        assert_eq!(rounded(found[0].over_full_depth), Some((0, [240, 216, 288])));
        assert_eq!(rounded(found[0].over_baseline), Some((3, [120, 108, 144])), "the oracle is no baseline");
        assert_eq!(rounded(found[1].over_baseline), Some((0, [150; 3])), "two passes are not good enough");
        assert_eq!(
            rounded(found[2].over_baseline),
            Some((3, [95; 3])),
            "a delayed policy may be slower than static depth"
        );
        assert!(speedups(&[]).is_empty());
    }
}
