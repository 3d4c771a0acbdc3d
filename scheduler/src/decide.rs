//! What decides which rows exit, where it is not the signal of the pass against a bound that stays.
//!
//! Each of these gives [`Scheduler::decide`](crate::Scheduler::decide) another bound for the pass, or other values in
//! place of the signals. State is kept by slot and begins anew with each token at depth 0, also with one that a
//! preemption has sent back there.

use traces::SignalBound;

use crate::custom::{CustomDecisions, Memory};
use crate::mix::MixedDepths;
use crate::pass::{Segment, Slot};
use crate::policy::{ExitPolicy, LoadThreshold};
use crate::scheduler::Settings;
use crate::speculation::Speculation;

/// What decides which rows exit.
#[derive(Clone, Debug)]
pub(crate) enum Decision {
    /// The signal of the pass against a bound that stays.
    Fixed,
    /// The signal of the pass against a bound that follows the load.
    ByLoad(LoadFollower),
    /// The gates of all depths of the token so far.
    Cumulative(CumulativeGate),
    /// The signal that was read one depth earlier.
    Delayed(DelayedSignal),
    /// How much the entropy differs from that of the depth before.
    EntropyChange(EntropyChange),
    /// For how many depths the prediction has stayed the same.
    Stable(StablePrediction),
    /// The depths drawn for the requests.
    Mixed(MixedDepths),
    /// The signal of the pass, or the depth, for rows that may exit with drafts.
    Drafted(Speculation),
    /// A policy that is not built in.
    Custom(Box<CustomDecisions>),
}

impl Decision {
    pub fn new(&Settings { exit, num_loops, max_batch, .. }: &Settings) -> Self {
        match exit {
            ExitPolicy::None | ExitPolicy::Static(_) | ExitPolicy::Oracle { .. } | ExitPolicy::Confidence { .. } => {
                Self::Fixed
            }
            ExitPolicy::Mix(mix) => Self::Mixed(MixedDepths::new(mix, max_batch)),
            ExitPolicy::LoadAdaptive(threshold) => Self::ByLoad(LoadFollower::new(threshold)),
            ExitPolicy::Cumulative { min_loops, .. } => Self::Cumulative(CumulativeGate::new(min_loops, max_batch)),
            ExitPolicy::Delayed { .. } => Self::Delayed(DelayedSignal::new(max_batch)),
            ExitPolicy::EntropyChange { .. } => Self::EntropyChange(EntropyChange::new(max_batch)),
            ExitPolicy::Stable { .. } => Self::Stable(StablePrediction::new(max_batch)),
            ExitPolicy::Speculate(speculation) => Self::Drafted(speculation),
            ExitPolicy::Custom(policy) => Self::Custom(Box::new(CustomDecisions::new(policy, num_loops, max_batch))),
        }
    }

    /// A request takes a slot, for the first time or again.
    pub fn admit(&mut self, slot: Slot, request: u32) {
        match self {
            Self::Custom(custom) => custom.admit(slot, request),
            Self::Mixed(mixed) => mixed.admit(slot, request),
            Self::Fixed
            | Self::ByLoad(_)
            | Self::Cumulative(_)
            | Self::Delayed(_)
            | Self::EntropyChange(_)
            | Self::Stable(_)
            | Self::Drafted(_) => {}
        }
    }

    /// A request loses its slot before its last token.
    pub fn preempt(&mut self, slot: Slot, request: u32) {
        self.remember(request, self.memory(slot));
    }

    /// What a custom policy remembers of the request in a slot.
    pub fn memory(&self, slot: Slot) -> Memory {
        match self {
            Self::Custom(custom) => custom.memory(slot),
            _ => Memory::default(),
        }
    }

    /// Gives a custom policy what it is to remember of a request when that is admitted.
    pub fn remember(&mut self, request: u32, memory: Memory) {
        if let Self::Custom(custom) = self {
            custom.remember(request, memory);
        }
    }

    /// A request that was preempted has ended.
    pub fn forget(&mut self, request: u32) {
        if let Self::Custom(custom) = self {
            custom.forget(request);
        }
    }
}

/// A bound that follows the load.
#[derive(Clone, Debug)]
pub(crate) struct LoadFollower {
    threshold: LoadThreshold,
    /// Requests that set the threshold.
    load: u32,
}

impl LoadFollower {
    fn new(threshold: LoadThreshold) -> Self {
        Self { threshold, load: 0 }
    }

    /// The bound of a pass when `requests` run or wait.
    pub fn bound(&mut self, requests: u32) -> SignalBound {
        self.load = self.load.clamp(requests, requests.saturating_add(self.threshold.band));
        self.threshold.signal.bound(self.threshold.at(self.load))
    }
}

/// The probability that a token has exited, from its gates so far.
#[derive(Clone, Debug)]
pub(crate) struct CumulativeGate {
    min_loops: u8,
    /// By slot: the probability that the token in the making has not exited.
    staying: Vec<f32>,
}

impl CumulativeGate {
    fn new(min_loops: u8, max_batch: u32) -> Self {
        Self { min_loops, staying: vec![1.0; max_batch as usize] }
    }

    /// The probability that the token of a segment's last row has exited, given the gate at its depth; lower than any
    /// where it must run another loop.
    ///
    /// A gate without bound decides by itself: so an executor says that it knows the outcome
    /// ([`ExitSignal::certain`](traces::ExitSignal::certain)).
    pub fn exited(&mut self, segment: &Segment, gate: f32) -> f32 {
        if !segment.predicts || gate.is_infinite() {
            return gate;
        }
        let staying = &mut self.staying[segment.slot as usize];
        if segment.depth == 0 {
            *staying = 1.0;
        }
        *staying *= 1.0 - gate.clamp(0.0, 1.0);
        if segment.depth + 1 < self.min_loops { f32::NEG_INFINITY } else { 1.0 - *staying }
    }
}

/// The last entropy of each token in the making.
#[derive(Clone, Debug)]
pub(crate) struct EntropyChange {
    /// By slot.
    before: Vec<f32>,
}

impl EntropyChange {
    fn new(max_batch: u32) -> Self {
        Self { before: vec![f32::NAN; max_batch as usize] }
    }

    /// The difference, without its sign, between the entropy at a segment's depth and that of its token one depth
    /// earlier; NaN at depth 0. An entropy without bound decides by itself, as a [gate](CumulativeGate::exited) does.
    pub fn of(&mut self, segment: &Segment, entropy: f32) -> f32 {
        if !segment.predicts || entropy.is_infinite() {
            return entropy;
        }
        let before = std::mem::replace(&mut self.before[segment.slot as usize], entropy);
        if segment.depth == 0 { f32::NAN } else { (entropy - before).abs() }
    }
}

/// For how many depths the prediction of each token in the making has stayed the same.
#[derive(Clone, Debug)]
pub(crate) struct StablePrediction {
    /// By slot.
    depths: Vec<u8>,
}

impl StablePrediction {
    fn new(max_batch: u32) -> Self {
        Self { depths: vec![0; max_batch as usize] }
    }

    /// Number of depths, up to that of a segment, at which its token has had the same prediction. What an executor
    /// reports of [repetitions](crate::SignalRead::Repeats) decides by itself if it has no bound, as a
    /// [gate](CumulativeGate::exited) does.
    pub fn depths(&mut self, segment: &Segment, repeats: f32) -> f32 {
        if !segment.predicts || repeats.is_infinite() {
            return repeats;
        }
        let depths = &mut self.depths[segment.slot as usize];
        *depths = if segment.depth > 0 && repeats > 0.0 { *depths + 1 } else { 1 };
        f32::from(*depths)
    }
}

/// The last signal of each token in the making.
#[derive(Clone, Debug)]
pub(crate) struct DelayedSignal {
    /// By slot.
    signals: Vec<f32>,
}

impl DelayedSignal {
    fn new(max_batch: u32) -> Self {
        Self { signals: vec![f32::NAN; max_batch as usize] }
    }

    /// What was read of a segment's token one depth earlier; NaN at depth 0.
    pub fn before(&self, segment: &Segment) -> f32 {
        if segment.depth == 0 { f32::NAN } else { self.signals[segment.slot as usize] }
    }

    /// Keeps what a pass has read.
    pub fn keep(&mut self, segments: &[Segment], signals: &[f32]) {
        for (segment, &signal) in segments.iter().zip(signals).filter(|(segment, _)| segment.predicts) {
            self.signals[segment.slot as usize] = signal;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pass::RowKind;
    use traces::ExitSignal;

    fn row(slot: Slot, depth: u8) -> Segment {
        Segment { slot, start: 5, tokens: 1, depth, kind: RowKind::Decode, predicts: true, generated: true }
    }

    #[test]
    fn a_load_that_falls_is_followed_late_and_one_that_rises_at_once() {
        let (signal, calm, busy) = (ExitSignal::Top1, 1.0, 0.0);
        let mut follower = LoadFollower::new(LoadThreshold { signal, calm, busy, low: 0, high: 100, band: 10 });
        let mut threshold = |load| {
            let bound = follower.bound(load);
            (0..=100).find(|&value| bound.is_reached(value as f32 / 100.0)).unwrap()
        };
        assert_eq!([0, 50, 45, 40, 39, 30, 35, 60].map(&mut threshold), [100, 50, 50, 50, 51, 60, 60, 40]);
        assert_eq!([1000, 105, 95, 89, 0].map(&mut threshold), [0, 0, 0, 1, 90], "bounded, whatever the load");
    }

    #[test]
    fn gates_accumulate_over_the_depths_of_a_token_and_of_no_other() {
        let mut cumulative = CumulativeGate::new(2, 3);
        let mut exited = |slot, depth, gate| cumulative.exited(&row(slot, depth), gate);
        assert_eq!(exited(1, 0, 0.5), f32::NEG_INFINITY, "one loop is too few");
        assert_eq!(exited(2, 0, 0.25), f32::NEG_INFINITY);
        assert_eq!((exited(1, 1, 0.5), exited(2, 1, 0.0)), (0.75, 0.25), "slots are apart");
        assert_eq!(exited(1, 2, 0.5), 0.875);
        exited(1, 0, 0.0);
        assert_eq!(exited(1, 1, 0.5), 0.5, "a token does not count for the next");
        assert_eq!(exited(1, 2, f32::INFINITY), f32::INFINITY, "what is certain needs no product");
    }

    #[test]
    fn an_entropy_is_compared_with_that_of_the_depth_before() {
        let mut change = EntropyChange::new(3);
        let mut of = |slot, depth, entropy| change.of(&row(slot, depth), entropy);
        assert!(of(1, 0, 2.0).is_nan() && of(2, 0, 5.0).is_nan(), "nothing to compare with");
        assert_eq!((of(1, 1, 1.5), of(2, 1, 5.25)), (0.5, 0.25), "slots are apart, and a rise is a difference");
        assert_eq!(of(1, 2, 1.5), 0.0);
        assert!(of(1, 0, 1.5).is_nan(), "a token does not count for the next");
        assert_eq!(of(1, 1, f32::NEG_INFINITY), f32::NEG_INFINITY, "what is certain needs no difference");
    }

    #[test]
    fn a_prediction_is_stable_for_the_depths_since_it_last_changed() {
        let mut stable = StablePrediction::new(3);
        let mut depths = |slot, depth, repeats| stable.depths(&row(slot, depth), repeats);
        assert_eq!((depths(1, 0, 0.0), depths(2, 0, 1.0)), (1.0, 1.0), "depth 0 repeats nothing");
        assert_eq!((depths(1, 1, 1.0), depths(2, 1, 0.0)), (2.0, 1.0), "slots are apart");
        assert_eq!((depths(1, 2, 1.0), depths(1, 3, 0.0), depths(1, 4, 1.0)), (3.0, 1.0, 2.0));
        assert_eq!(depths(1, 0, 0.0), 1.0, "a token does not count for the next");
        assert_eq!(depths(1, 1, f32::INFINITY), f32::INFINITY, "what is certain needs no count");
    }

    #[test]
    fn a_delayed_signal_is_that_of_the_depth_before() {
        let mut delayed = DelayedSignal::new(3);
        delayed.keep(&[row(1, 0), Segment { predicts: false, ..row(2, 0) }], &[0.5, 0.75]);
        assert_eq!(delayed.before(&row(1, 1)), 0.5);
        assert!(delayed.before(&row(1, 0)).is_nan(), "the next token has none yet");
        assert!(delayed.before(&row(2, 1)).is_nan(), "nothing is read of rows that predict nothing");
    }
}
