//! Early exit evaluated on an exit trace: mean depth, and agreement with full depth.

use serde::Serialize;
use traces::{ExitSignal, ExitTrace};

/// Number of thresholds on an exit curve.
const CURVE_POINTS: usize = 101;

/// Outcome of the tokens of an exit trace under one exit policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Exits {
    /// Outcome of each generation.
    pub generations: Vec<GenerationExits>,
    /// Number of passes of all tokens.
    pub passes: usize,
}

/// Outcome of one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerationExits {
    /// Number of generated tokens.
    pub tokens: usize,
    /// Number of tokens whose prediction at their exit differs from that of the last depth.
    pub differing: usize,
}

impl Exits {
    /// Exits at the first depth where the measure passes the threshold.
    pub fn confident(trace: &ExitTrace, measure: ExitSignal, threshold: f32) -> Self {
        let depth = |token| trace.confident_depth(token, measure, threshold);
        Self::at(trace, 0..trace.num_generations(), depth)
    }

    /// The exits of some generations, by token.
    fn at(trace: &ExitTrace, generations: impl Iterator<Item = usize>, depth: impl Fn(usize) -> usize) -> Self {
        let mut passes = 0;
        let generation = |index| {
            let tokens = trace.generation(index);
            let mut exits = GenerationExits { tokens: tokens.len(), differing: 0 };
            for token in tokens {
                let depth = depth(token);
                passes += depth + 1;
                exits.differing += usize::from(!trace.agrees(token, depth));
            }
            exits
        };
        let generations = generations.map(generation).collect();
        Self { generations, passes }
    }

    /// The exits of a recording under policies, of the generations that were served under policy number `policy`.
    ///
    /// # Panics
    /// If the trace was recorded at full depth.
    pub fn served(trace: &ExitTrace, policy: usize) -> Self {
        let served = trace.served.as_ref().expect("the trace was recorded under policies");
        let of_policy = (0..trace.num_generations()).filter(|&index| served.policies[index] as usize == policy);
        Self::at(trace, of_policy, |token| served.tokens[token].exit_depth as usize)
    }

    /// Number of tokens of all generations.
    pub fn tokens(&self) -> usize {
        self.generations.iter().map(|generation| generation.tokens).sum()
    }

    /// Number of tokens that differ from full depth, over all generations.
    pub fn differing(&self) -> usize {
        self.generations.iter().map(|generation| generation.differing).sum()
    }

    /// Passes per token, 1 to the number of loops.
    pub fn mean_depth(&self) -> f64 {
        self.passes as f64 / self.tokens() as f64
    }

    /// Share of tokens equal to that of full depth, 0 to 1.
    pub fn agreement(&self) -> f64 {
        1.0 - self.differing() as f64 / self.tokens() as f64
    }

    /// Share of tokens that differ from full depth, by generation, 0 to 1.
    pub fn losses(&self) -> Vec<f64> {
        self.generations.iter().map(|generation| generation.differing as f64 / generation.tokens as f64).collect()
    }
}

/// Outcome of one threshold of a measure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CurvePoint {
    /// The exit signal.
    pub measure: ExitSignal,
    /// Threshold of the signal.
    pub threshold: f32,
    /// Passes per token.
    pub mean_depth: f64,
    /// Share of tokens equal to that of full depth.
    pub agreement: f64,
}

/// Mean depth against agreement, from the strictest threshold to the laxest, at which every token exits at the first
/// depth that has the signal. The thresholds are quantiles of the measure's values. Empty for a model of one loop.
pub fn exit_curve(trace: &ExitTrace, measure: ExitSignal) -> Vec<CurvePoint> {
    let depths = measure.first_depth()..trace.num_loops() - 1;
    let rows = (0..trace.num_tokens()).flat_map(|token| depths.clone().map(move |depth| (token, depth)));
    let mut values: Vec<f32> = rows.map(|(token, depth)| trace.signals_at(token, depth).get(measure)).collect();
    values.sort_by(|a, b| measure.sureness(*b).total_cmp(&measure.sureness(*a)));
    let Some(last) = values.len().checked_sub(1) else { return Vec::new() };
    let mut thresholds: Vec<f32> = (0..CURVE_POINTS).map(|point| values[point * last / (CURVE_POINTS - 1)]).collect();
    thresholds.dedup();
    let point = |threshold| {
        let exits = Exits::confident(trace, measure, threshold);
        CurvePoint { measure, threshold, mean_depth: exits.mean_depth(), agreement: exits.agreement() }
    };
    thresholds.into_iter().map(point).collect()
}

/// The point of smallest mean depth among those with at least this agreement.
pub fn shallowest(curve: &[CurvePoint], agreement: f64) -> Option<&CurvePoint> {
    let enough = curve.iter().filter(|point| point.agreement >= agreement);
    enough.min_by(|a, b| a.mean_depth.total_cmp(&b.mean_depth))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use traces::{ExitTraceMeta, Signals};

    /// An exit trace without generations.
    pub(crate) fn empty(num_loops: u32) -> ExitTrace {
        ExitTrace::new(ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "test".to_owned(),
            fingerprint: "test".to_owned(),
            num_loops,
            source: "test".to_owned(),
            recording: None,
        })
    }

    /// A row with this top-1 probability.
    pub(crate) fn row(top1: f32, token: u32) -> (Signals, u32) {
        let signals = Signals { top1, margin: top1 / 2.0, entropy: 1.0 - top1, similarity: top1, ..Signals::default() };
        (signals, token)
    }

    /// Two loops, and generations of two tokens and one. The first loop is right where its confidence is at least 0.5.
    fn trace() -> ExitTrace {
        let mut trace = empty(2);
        trace.push_generation(&[row(0.9, 1), row(1.0, 1), row(0.4, 3), row(1.0, 2)]);
        trace.push_generation(&[row(0.6, 5), row(1.0, 5)]);
        trace
    }

    #[test]
    fn exits_count_passes_and_differing_tokens_by_generation() {
        let exits = Exits::confident(&trace(), ExitSignal::Top1, 0.3);
        assert_eq!(exits.passes, 3);
        assert_eq!(exits.losses(), [0.5, 0.0]);
        assert_eq!(exits.agreement(), 1.0 - 1.0 / 3.0);
        let exits = Exits::confident(&trace(), ExitSignal::Top1, 0.5);
        assert_eq!((exits.mean_depth(), exits.agreement()), (4.0 / 3.0, 1.0));
    }

    #[test]
    fn a_curve_goes_from_the_most_confident_value_to_exiting_at_once() {
        for (measure, ends) in [(ExitSignal::Top1, [0.9, 0.4]), (ExitSignal::Entropy, [1.0 - 0.9, 1.0 - 0.4])] {
            let curve = exit_curve(&trace(), measure);
            let thresholds: Vec<f32> = curve.iter().map(|point| point.threshold).collect();
            assert_eq!([thresholds[0], *thresholds.last().unwrap()], ends, "{measure}");
            assert_eq!(curve.last().unwrap().mean_depth, 1.0);
            assert!(curve.is_sorted_by(|a, b| a.mean_depth > b.mean_depth), "{measure}");
        }
        assert_eq!(shallowest(&exit_curve(&trace(), ExitSignal::Top1), 0.9).unwrap().threshold, 0.6);
    }

    #[test]
    fn similarity_has_no_value_before_the_second_depth() {
        assert!(exit_curve(&trace(), ExitSignal::Similarity).is_empty());
        let mut trace = empty(3);
        trace.push_generation(&[row(0.0, 1), row(0.7, 1), row(1.0, 1)]);
        let curve = exit_curve(&trace, ExitSignal::Similarity);
        assert_eq!(curve.iter().map(|point| (point.threshold, point.mean_depth)).collect::<Vec<_>>(), [(0.7, 2.0)]);
    }
}
