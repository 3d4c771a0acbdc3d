//! Exit traces: for each generated token and depth, the exit signals and the token predicted there.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An exit signal: a value read from a row after a pass that tells how confident the model is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExitSignal {
    /// Probability of the most likely token, 0 to 1. Needs the exit head.
    Top1,
    /// Probability of the most likely token less that of the second, 0 to 1. Needs the exit head.
    Margin,
    /// Entropy of the next-token distribution in nats; low values are confident. Needs the exit head.
    Entropy,
    /// Cosine of the hidden states after this and the previous depth; undefined (0) at depth 0. Does not need the head.
    Similarity,
    /// Relative difference of the hidden states after this and the previous depth, `|h_d - h_(d-1)| / |h_d|`; low values
    /// are confident. Undefined at depth 0, where it has the value 1 of a difference to zero. Does not need the head.
    Difference,
    /// Divergence of the next-token distribution at the previous depth from that at this one, `KL(before, this)` in nats;
    /// low values are confident. At depth 0, the one before is uniform. Needs the exit head.
    Kl,
    /// A learned gate's probability that the token is that of the last depth, 0 to 1. Does not need the head.
    Gate,
}

/// What a signal is measured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignalUnit {
    /// A probability, a difference of two, or a cosine: 1 means certain.
    Share,
    /// Nats: 0 means certain.
    Nats,
    /// A difference relative to a length: 0 means certain.
    Ratio,
}

/// All that is known of a signal beside its values.
struct Traits {
    name: &'static str,
    needs_head: bool,
    first_depth: usize,
    unit: SignalUnit,
    /// The lowest and the highest value, and what to call those between them.
    range: (f32, f32, &'static str),
    /// Whether exit traces may lack it.
    is_optional: bool,
}

impl ExitSignal {
    /// Every signal, in the order of the columns of an exit trace. Those that a trace may lack are the last: models
    /// without gates have none, and earlier traces have neither differences nor divergences.
    pub const ALL: [Self; 7] =
        [Self::Top1, Self::Margin, Self::Entropy, Self::Similarity, Self::Difference, Self::Kl, Self::Gate];

    #[rustfmt::skip]
    const fn traits(self) -> Traits {
        use SignalUnit::{Nats, Ratio, Share};
        let (name, needs_head, first_depth, unit, range) = match self {
            Self::Top1 => ("top1", true, 0, Share, (0.0, 1.0, "a probability from 0 to 1")),
            Self::Margin => ("margin", true, 0, Share, (0.0, 1.0, "a difference of probabilities from 0 to 1")),
            Self::Entropy => ("entropy", true, 0, Nats, (0.0, f32::MAX, "nats, at least 0")),
            Self::Similarity => ("similarity", false, 1, Share, (-1.0, 1.0, "a cosine from -1 to 1")),
            Self::Difference => ("difference", false, 1, Ratio, (0.0, f32::MAX, "a relative difference, at least 0")),
            Self::Kl => ("kl", true, 0, Nats, (0.0, f32::MAX, "nats, at least 0")),
            Self::Gate => ("gate", false, 0, Share, (0.0, 1.0, "a probability from 0 to 1")),
        };
        let is_optional = matches!(self, Self::Difference | Self::Kl | Self::Gate);
        Traits { name, needs_head, first_depth, unit, range, is_optional }
    }

    /// The name in files and on the command line.
    pub const fn name(self) -> &'static str {
        self.traits().name
    }

    /// Whether reading the signal takes a product with the whole vocabulary.
    pub fn needs_head(self) -> bool {
        self.traits().needs_head
    }

    /// The first depth at which the signal is defined.
    pub fn first_depth(self) -> usize {
        self.traits().first_depth
    }

    /// What it is measured in.
    pub fn unit(self) -> SignalUnit {
        self.traits().unit
    }

    /// The lowest and the highest value, and what to call those between them.
    pub(crate) fn range(self) -> (f32, f32, &'static str) {
        self.traits().range
    }

    /// Whether exit traces may lack it.
    pub const fn is_optional(self) -> bool {
        self.traits().is_optional
    }

    /// The value with its sign adjusted: greater is more confident.
    pub fn sureness(self, value: f32) -> f32 {
        match self.unit() {
            SignalUnit::Nats | SignalUnit::Ratio => -value,
            SignalUnit::Share => value,
        }
    }

    /// A value with which rows exit at every threshold, or at none.
    pub fn certain(self, exits: bool) -> f32 {
        self.sureness(if exits { f32::INFINITY } else { f32::NEG_INFINITY })
    }

    /// The values at which rows exit under a threshold.
    pub fn bound(self, threshold: f32) -> SignalBound {
        SignalBound { sign: self.sureness(1.0), least: self.sureness(threshold) }
    }

    /// Whether a row with this value exits under this threshold.
    pub fn is_confident(self, value: f32, threshold: f32) -> bool {
        self.bound(threshold).is_reached(value)
    }
}

/// Values of an exit signal at which rows exit: `value * sign >= least`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SignalBound {
    sign: f32,
    /// NaN where no value is enough.
    least: f32,
}

impl SignalBound {
    /// No value is enough.
    pub const NEVER: Self = Self { sign: 1.0, least: f32::NAN };

    /// Values of `least` or more are enough.
    pub const fn at_least(least: f32) -> Self {
        Self { sign: 1.0, least }
    }

    /// Whether a row with this value exits.
    #[inline]
    pub fn is_reached(self, value: f32) -> bool {
        value * self.sign >= self.least
    }
}

impl fmt::Display for ExitSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ExitSignal {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|signal| signal.name() == name).ok_or_else(|| {
            format!("unknown exit signal `{name}`: expected one of {}", Self::ALL.map(Self::name).join(", "))
        })
    }
}

/// The exit signals of one row after one pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Signals {
    /// See [`ExitSignal::Top1`].
    pub top1: f32,
    /// See [`ExitSignal::Margin`].
    pub margin: f32,
    /// See [`ExitSignal::Entropy`].
    pub entropy: f32,
    /// See [`ExitSignal::Similarity`].
    pub similarity: f32,
    /// See [`ExitSignal::Difference`]; 0 in a trace that lacks it.
    pub difference: f32,
    /// See [`ExitSignal::Kl`]; 0 in a trace that lacks it.
    pub kl: f32,
    /// See [`ExitSignal::Gate`]; 0 if the model has no gates.
    pub gate: f32,
}

impl Signals {
    /// Signals that are sure of a prediction, or unsure: 1 and 0; entropy, difference and divergence 0 and 1. Any threshold
    /// of 0.5 is reached by the ones and not by the others.
    pub fn certain(exits: bool) -> Self {
        let sure = f32::from(u8::from(exits));
        let (top1, margin, similarity, gate) = (sure, sure, sure, sure);
        let (entropy, difference, kl) = (1.0 - sure, 1.0 - sure, 1.0 - sure);
        Self { top1, margin, entropy, similarity, difference, kl, gate }
    }

    /// The value of one signal.
    pub fn get(&self, signal: ExitSignal) -> f32 {
        match signal {
            ExitSignal::Top1 => self.top1,
            ExitSignal::Margin => self.margin,
            ExitSignal::Entropy => self.entropy,
            ExitSignal::Similarity => self.similarity,
            ExitSignal::Difference => self.difference,
            ExitSignal::Kl => self.kl,
            ExitSignal::Gate => self.gate,
        }
    }
}

/// Values in the order of [`ExitSignal::ALL`].
impl From<[f32; ExitSignal::ALL.len()]> for Signals {
    fn from([top1, margin, entropy, similarity, difference, kl, gate]: [f32; ExitSignal::ALL.len()]) -> Self {
        Self { top1, margin, entropy, similarity, difference, kl, gate }
    }
}

/// The exit signals of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalSet {
    /// By [`ExitSignal`] as a number.
    bits: u8,
}

impl SignalSet {
    /// Every signal.
    pub const ALL: Self = Self { bits: (1 << ExitSignal::ALL.len()) - 1 };

    /// The signals that every trace has.
    pub const ALWAYS: Self = {
        let (mut set, mut place) = (Self::ALL, 0);
        while place < ExitSignal::ALL.len() {
            if ExitSignal::ALL[place].is_optional() {
                set.bits &= !(1 << place);
            }
            place += 1;
        }
        set
    };

    /// The signals of a recorded model, with or without gates.
    pub const fn of_model(has_gates: bool) -> Self {
        let gate = 1 << ExitSignal::Gate as u8;
        Self { bits: if has_gates { Self::ALL.bits } else { Self::ALL.bits & !gate } }
    }

    /// The set with one signal more.
    pub fn with(self, signal: ExitSignal) -> Self {
        Self { bits: self.bits | 1 << signal as u8 }
    }

    /// Whether it has a signal.
    pub fn contains(self, signal: ExitSignal) -> bool {
        self.bits & (1 << signal as u8) != 0
    }

    /// Its signals, in the order of [`ExitSignal::ALL`].
    pub fn iter(self) -> impl Iterator<Item = ExitSignal> {
        ExitSignal::ALL.into_iter().filter(move |&signal| self.contains(signal))
    }
}

/// Origin of an exit trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitTraceMeta {
    /// Version of the file format: [`ExitTrace::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Name of the model, for readers.
    pub model: String,
    /// Fingerprint of the model's configuration and weights.
    pub fingerprint: String,
    /// Number of loops of the model; each token has this many rows.
    pub num_loops: u32,
    /// How the trace was made: the command, the prompts, the sampling.
    pub source: String,
    /// The exits of the recording; none if all its tokens ran every depth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recording: Option<Recording>,
}

/// Under which exit policies a trace was recorded. Its tokens exited as in service; each then ran on to the last depth
/// without leaving keys and values there. All depths' signals are therefore those over the history of that service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recording {
    /// The exit policies. Each generation was served under one of them, all equally likely.
    pub policies: Vec<String>,
    /// The KV fill.
    pub kv_fill: String,
    /// The last depth that tokens of prompts ran, if not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_depth: Option<u8>,
    /// Seed of the draw of policies, and of exits by chance.
    pub seed: u64,
}

/// What a recording under an exit policy did with a generated token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServedToken {
    /// The depth at which it exited. The prediction of this depth is the generated token.
    pub exit_depth: u32,
    /// The token of full depth after the same prefix, with exact keys and values.
    pub full_depth: u32,
}

/// What a recording under exit policies has beside signals and predictions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// By generation: index of its policy in [`Recording::policies`].
    pub policies: Vec<u32>,
    /// By token.
    pub tokens: Vec<ServedToken>,
}

/// Signals and predictions of whole generations at every depth. The generations ran every depth, or exited
/// [under a policy](Recording).
///
/// Token `t` of the trace is one generated token. Its row at depth `d` is entry `t * num_loops + d` of each column.
#[derive(Clone, Debug, PartialEq)]
pub struct ExitTrace {
    /// Origin of the trace.
    pub meta: ExitTraceMeta,
    /// The signals that were recorded.
    pub recorded: SignalSet,
    /// Generation `g` is tokens `starts[g]..starts[g + 1]`; the last entry is the number of tokens.
    pub starts: Vec<u32>,
    /// The signals, by token and depth.
    pub signals: Vec<Signals>,
    /// Predicted tokens, by token and depth. The prediction of the last depth is the generated token, unless tokens
    /// exited before.
    pub predictions: Vec<u32>,
    /// Exits of a recording [under policies](Recording); none of a recording at full depth.
    pub served: Option<Served>,
}

impl ExitTrace {
    /// Version of the files that this crate reads and writes.
    pub const SCHEMA_VERSION: u32 = 1;

    /// A trace without generations, of the signals that [every trace has](SignalSet::ALWAYS).
    pub fn new(meta: ExitTraceMeta) -> Self {
        let served = meta.recording.is_some().then(Served::default);
        Self {
            meta,
            recorded: SignalSet::ALWAYS,
            starts: vec![0],
            signals: Vec::new(),
            predictions: Vec::new(),
            served,
        }
    }

    /// Number of loops of the model.
    pub fn num_loops(&self) -> usize {
        self.meta.num_loops as usize
    }

    /// Number of generated tokens, over all generations.
    pub fn num_tokens(&self) -> usize {
        self.predictions.len() / self.num_loops()
    }

    /// Number of generations, each the output of one prompt.
    pub fn num_generations(&self) -> usize {
        self.starts.len() - 1
    }

    /// Indices of the tokens of one generation.
    pub fn generation(&self, index: usize) -> Range<usize> {
        self.starts[index] as usize..self.starts[index + 1] as usize
    }

    /// Appends a generation: `rows[t * num_loops + d]` is token `t` at depth `d`.
    ///
    /// # Panics
    /// If the rows are not a whole number of tokens.
    pub fn push_generation(&mut self, rows: &[(Signals, u32)]) {
        assert_eq!(rows.len() % self.num_loops(), 0, "rows of a generation come by whole tokens");
        self.signals.extend(rows.iter().map(|row| row.0));
        self.predictions.extend(rows.iter().map(|row| row.1));
        self.starts.push(self.num_tokens() as u32);
    }

    /// Appends a generation that was recorded under policy number `policy`; see [`Recording`].
    ///
    /// # Panics
    /// If the rows are not those of the tokens, or the trace is one of full depth.
    pub fn push_served(&mut self, rows: &[(Signals, u32)], tokens: &[ServedToken], policy: u32) {
        assert_eq!(rows.len(), tokens.len() * self.num_loops(), "every token has its rows");
        let served = self.served.as_mut().expect("the trace was recorded under policies");
        served.policies.push(policy);
        served.tokens.extend(tokens);
        self.push_generation(rows);
    }

    /// The signals of a token at a depth.
    pub fn signals_at(&self, token: usize, depth: usize) -> &Signals {
        &self.signals[token * self.num_loops() + depth]
    }

    /// The predictions of a token, by depth.
    fn predictions_of(&self, token: usize) -> &[u32] {
        &self.predictions[token * self.num_loops()..][..self.num_loops()]
    }

    /// Whether the token predicted at a depth equals that of full depth after the same prefix. In a recording at full
    /// depth, that is the token of the last depth; in one [under policies](Recording), exact keys and values may lead
    /// to another token than the last depth over what the KV fill left.
    pub fn agrees(&self, token: usize, depth: usize) -> bool {
        match &self.served {
            Some(served) => self.predictions_of(token)[depth] == served.tokens[token].full_depth,
            None => self.agrees_with_last(token, depth),
        }
    }

    /// Whether the token predicted at a depth equals that of the last depth over the same keys and values.
    pub fn agrees_with_last(&self, token: usize, depth: usize) -> bool {
        self.predictions_of(token)[depth] == self.predictions_of(token)[self.num_loops() - 1]
    }

    /// Whether the token predicted at a depth equals that of the depth before. At depth 0 there is none before.
    pub fn repeats(&self, token: usize, depth: usize) -> bool {
        let predictions = self.predictions_of(token);
        depth > 0 && predictions[depth] == predictions[depth - 1]
    }

    /// The earliest depth whose token equals that of the last depth over the same keys and values.
    pub fn oracle_depth(&self, token: usize) -> usize {
        (0..self.num_loops()).find(|&depth| self.agrees_with_last(token, depth)).unwrap_or(self.num_loops() - 1)
    }

    /// The exit depth of a token under a confidence policy: the first depth at which the signal passes the threshold,
    /// or the last depth.
    pub fn confident_depth(&self, token: usize, signal: ExitSignal, threshold: f32) -> usize {
        let last = self.num_loops() - 1;
        let is_confident = |&depth: &usize| signal.is_confident(self.signals_at(token, depth).get(signal), threshold);
        (0..last).find(is_confident).unwrap_or(last)
    }

    /// Share of tokens whose prediction at a depth equals that of full depth, 0 to 1.
    pub fn agreement_at(&self, depth: usize) -> f64 {
        let agreeing = (0..self.num_tokens()).filter(|&token| self.agrees(token, depth)).count();
        agreeing as f64 / self.num_tokens() as f64
    }

    /// Share of tokens by the depth at which the oracle lets them exit, each 0 to 1.
    pub fn oracle_shares(&self) -> Vec<f64> {
        let mut exiting = vec![0_usize; self.num_loops()];
        (0..self.num_tokens()).for_each(|token| exiting[self.oracle_depth(token)] += 1);
        exiting.into_iter().map(|tokens| tokens as f64 / self.num_tokens() as f64).collect()
    }

    /// Mean passes per token when each token exits at its oracle depth, 1 to `num_loops`.
    pub fn mean_oracle_passes(&self) -> f64 {
        let passes: usize = (0..self.num_tokens()).map(|token| self.oracle_depth(token) + 1).sum();
        passes as f64 / self.num_tokens() as f64
    }
}

/// Counts of tokens by depth, updated generation by generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DepthTally {
    tokens: u64,
    /// Tokens whose prediction equals that of the last depth.
    agreeing: Vec<u64>,
    /// Tokens whose first agreeing depth this is.
    exiting: Vec<u64>,
}

impl DepthTally {
    /// A tally without tokens.
    pub fn new(num_loops: usize) -> Self {
        Self { tokens: 0, agreeing: vec![0; num_loops], exiting: vec![0; num_loops] }
    }

    /// Counts a generation, in the format of [`ExitTrace::push_generation`].
    pub fn push_generation(&mut self, rows: &[(Signals, u32)]) {
        let num_loops = self.agreeing.len();
        for token in rows.chunks_exact(num_loops) {
            let agrees = |depth: &usize| token[*depth].1 == token[num_loops - 1].1;
            (0..num_loops).filter(agrees).for_each(|depth| self.agreeing[depth] += 1);
            (0..num_loops).find(agrees).into_iter().for_each(|depth| self.exiting[depth] += 1);
            self.tokens += 1;
        }
    }

    /// Number of generated tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// By depth: the share of tokens, 0 to 1, whose prediction equals that of the last depth, and the share for which
    /// this is the first such depth.
    pub fn shares(&self) -> impl Iterator<Item = (f64, f64)> {
        let share = |count: &u64| *count as f64 / self.tokens as f64;
        self.agreeing.iter().zip(&self.exiting).map(move |(agreeing, exiting)| (share(agreeing), share(exiting)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_tokens_are_exact_whatever_their_number() {
        let meta = ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "m".to_owned(),
            fingerprint: "f".to_owned(),
            num_loops: 2,
            source: "a test".to_owned(),
            recording: None,
        };
        // 1/9, 1/11, 1/18 and 1/20 added up as often exceed 1.
        for tokens in [1, 9, 11, 18, 20, 1000] {
            let mut trace = ExitTrace::new(meta.clone());
            trace.push_generation(&vec![(Signals::default(), 7); 2 * tokens]);
            assert_eq!(trace.oracle_shares(), [1.0, 0.0], "{tokens} tokens");
            trace.push_generation(&[(Signals::default(), 7), (Signals::default(), 8)].repeat(tokens));
            assert_eq!(trace.oracle_shares(), [0.5, 0.5], "{tokens} tokens");
        }
    }

    #[test]
    fn a_token_exits_at_the_first_depth_that_passes_the_threshold_or_at_the_last() {
        let meta = ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "m".to_owned(),
            fingerprint: "f".to_owned(),
            num_loops: 2,
            source: "a test".to_owned(),
            recording: None,
        };
        let mut trace = ExitTrace::new(meta);
        let at = |top1, entropy, similarity| (Signals { top1, entropy, similarity, ..Signals::default() }, 7);
        trace.push_generation(&[at(0.5, 1.0, 0.0), at(0.75, 0.5, 0.9)]);
        for (signal, threshold, depth) in [
            (ExitSignal::Top1, 0.5, 0),
            (ExitSignal::Top1, 0.6, 1),
            (ExitSignal::Top1, 0.8, 1),
            (ExitSignal::Entropy, 1.0, 0),
            (ExitSignal::Entropy, 0.9, 1),
            (ExitSignal::Similarity, 0.1, 1),
        ] {
            assert_eq!(trace.confident_depth(0, signal, threshold), depth, "{signal} {threshold}");
        }
    }

    #[test]
    fn a_tally_counts_by_depth_what_agrees_and_what_the_oracle_lets_exit() {
        let mut tally = DepthTally::new(3);
        let rows = |predictions: [u32; 3]| predictions.map(|prediction| (Signals::default(), prediction));
        for token in [[7, 7, 7], [1, 7, 7], [7, 1, 7], [1, 2, 3]] {
            tally.push_generation(&rows(token));
        }
        assert_eq!(tally.tokens(), 4);
        assert_eq!(tally.shares().collect::<Vec<_>>(), [(0.5, 0.5), (0.5, 0.25), (1.0, 0.25)]);
    }
}
