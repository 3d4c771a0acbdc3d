//! Reliability of exit signals: whether tokens agree with the last loop as often as the signal predicts.

use serde::Serialize;
use traces::{ExitSignal, ExitTrace, SignalUnit};

/// Number of bins of a reliability curve, with equal numbers of tokens (arXiv 2012.08668, section 4.2).
const BINS: usize = 15;

/// One bin of the tokens at a depth, with similar signal values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ReliabilityBin {
    /// The exit signal.
    pub measure: ExitSignal,
    /// Depth at which the signal was read.
    pub depth: usize,
    /// Number of tokens in the bin.
    pub tokens: usize,
    /// Mean [`confidence`] of the tokens, 0 to 1.
    pub confidence: f64,
    /// Share of the tokens whose prediction equals that of the last loop, 0 to 1.
    pub agreement: f64,
}

/// Quality of a signal at a depth.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SignalQuality {
    /// The exit signal.
    pub measure: ExitSignal,
    /// Depth at which the signal was read.
    pub depth: usize,
    /// Share of tokens whose prediction equals that of the last loop, 0 to 1.
    pub agreement: f64,
    /// Expected calibration error (arXiv 1706.04599, equation 3): the difference between confidence and agreement in a
    /// bin, averaged over tokens.
    pub calibration_error: f64,
    /// Area under the ROC curve: the probability that an agreeing token has a more confident signal than a differing
    /// one. `None` if all tokens agree or none does.
    pub auroc: Option<f64>,
}

/// A value of a measure as the probability that the token is that of the last loop. An entropy `H` gives `exp(-H)`, the
/// probability of each of `exp(H)` equally likely tokens, a relative difference `d` gives `1 - d`. Values are limited to 0
/// to 1.
pub fn confidence(measure: ExitSignal, value: f32) -> f64 {
    match measure.unit() {
        SignalUnit::Nats => f64::from(-value).exp().min(1.0),
        SignalUnit::Share => f64::from(value).clamp(0.0, 1.0),
        SignalUnit::Ratio => (1.0 - f64::from(value)).clamp(0.0, 1.0),
    }
}

/// The reliability curve of a measure at a depth, from the least confident bin to the most confident.
pub fn reliability(trace: &ExitTrace, measure: ExitSignal, depth: usize) -> Vec<ReliabilityBin> {
    let rows = rows_by_sureness(trace, measure, depth);
    let bins = BINS.min(rows.len());
    let bin = |index: usize| {
        let rows = &rows[index * rows.len() / bins..(index + 1) * rows.len() / bins];
        let mean = |value: fn(&Row) -> f64| rows.iter().map(value).sum::<f64>() / rows.len() as f64;
        let (confidence, agreement) = (mean(|row| row.confidence), mean(|row| f64::from(u8::from(row.agrees))));
        ReliabilityBin { measure, depth, tokens: rows.len(), confidence, agreement }
    };
    (0..bins).map(bin).collect()
}

/// The quality of a measure at a depth.
pub fn signal_quality(trace: &ExitTrace, measure: ExitSignal, depth: usize) -> SignalQuality {
    let bins = reliability(trace, measure, depth);
    let distance = |bin: &ReliabilityBin| bin.tokens as f64 * (bin.confidence - bin.agreement).abs();
    SignalQuality {
        measure,
        depth,
        agreement: trace.agreement_at(depth),
        calibration_error: bins.iter().map(distance).sum::<f64>() / trace.num_tokens() as f64,
        auroc: auroc(&rows_by_sureness(trace, measure, depth)),
    }
}

/// A token at a depth.
struct Row {
    sureness: f32,
    confidence: f64,
    agrees: bool,
}

fn rows_by_sureness(trace: &ExitTrace, measure: ExitSignal, depth: usize) -> Vec<Row> {
    let row = |token| {
        let value = trace.signals_at(token, depth).get(measure);
        let agrees = trace.agrees(token, depth);
        Row { sureness: measure.sureness(value), confidence: confidence(measure, value), agrees }
    };
    let mut rows: Vec<Row> = (0..trace.num_tokens()).map(row).collect();
    rows.sort_by(|a, b| a.sureness.total_cmp(&b.sureness));
    rows
}

/// Area under the ROC curve, as the Mann-Whitney statistic of sorted rows: a tie counts half.
fn auroc(rows: &[Row]) -> Option<f64> {
    let (mut won, mut agreeing, mut differing) = (0.0, 0.0, 0.0);
    for tied in rows.chunk_by(|a, b| a.sureness == b.sureness) {
        let agree = tied.iter().filter(|row| row.agrees).count() as f64;
        let differ = tied.len() as f64 - agree;
        won += agree * (differing + differ / 2.0);
        agreeing += agree;
        differing += differ;
    }
    (agreeing > 0.0 && differing > 0.0).then(|| won / (agreeing * differing))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluation::exits::tests::{empty, row};

    /// Two loops, and a generation in which some tokens agree.
    fn trace(tokens: &[(f32, bool)]) -> ExitTrace {
        let mut trace = empty(2);
        let rows = |&(top1, agrees): &(f32, bool)| [row(top1, u32::from(!agrees)), row(1.0, 0)];
        trace.push_generation(&tokens.iter().flat_map(rows).collect::<Vec<_>>());
        trace
    }

    #[test]
    fn a_signal_that_is_right_as_often_as_it_is_sure_has_no_calibration_error() {
        let sure_by_half: Vec<_> = (0..60).map(|i| (0.5, i % 2 == 0)).collect();
        let quality = signal_quality(&trace(&sure_by_half), ExitSignal::Top1, 0);
        assert_eq!((quality.calibration_error, quality.auroc), (0.0, Some(0.5)));
        let overconfident: Vec<_> = (0..60).map(|i| (0.9, i % 2 == 0)).collect();
        let quality = signal_quality(&trace(&overconfident), ExitSignal::Top1, 0);
        assert!((quality.calibration_error - 0.4).abs() < 1e-6);
    }

    #[test]
    fn bins_have_equal_numbers_of_tokens_in_ascending_confidence() {
        let tokens: Vec<_> = (0..100).map(|i| (i as f32 / 100.0, i >= 40)).collect();
        for measure in [ExitSignal::Top1, ExitSignal::Margin, ExitSignal::Entropy] {
            let bins = reliability(&trace(&tokens), measure, 0);
            assert_eq!(bins.iter().map(|bin| bin.tokens).sum::<usize>(), 100);
            assert!(bins.iter().all(|bin| (6..=7).contains(&bin.tokens)));
            assert!(bins.is_sorted_by(|a, b| a.confidence < b.confidence && a.agreement <= b.agreement));
            assert_eq!((bins[0].agreement, bins[BINS - 1].agreement), (0.0, 1.0), "{measure}");
        }
    }

    #[test]
    fn auroc_is_the_share_of_pairs_ranked_right() {
        let auroc = |tokens: &[(f32, bool)], measure| signal_quality(&trace(tokens), measure, 0).auroc;
        let tokens = [(0.9, true), (0.7, false), (0.5, true), (0.5, false), (0.1, false)];
        // Of 2 x 3 pairs, 0.9 wins 3; 0.5 wins one, loses one and ties one.
        for measure in [ExitSignal::Top1, ExitSignal::Entropy] {
            assert_eq!(auroc(&tokens, measure), Some(4.5 / 6.0), "{measure}");
        }
        assert_eq!(auroc(&[(0.9, true), (0.7, true)], ExitSignal::Top1), None);
    }

    #[test]
    fn entropy_reads_as_the_probability_of_equally_likely_tokens() {
        assert!((confidence(ExitSignal::Entropy, 4.0_f32.ln()) - 0.25).abs() < 1e-6);
        assert_eq!(confidence(ExitSignal::Similarity, -0.2), 0.0);
        assert_eq!([0.25, 1.5].map(|value| confidence(ExitSignal::Difference, value)), [0.75, 0.0]);
    }
}
