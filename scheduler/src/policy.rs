//! Batching policies, exit policies and KV fills, and their names on the command line.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use traces::{ExitSignal, SignalBound};

use crate::custom::CustomPolicy;
use crate::mix::DepthMix;
use crate::pass::{RowKind, Segment};
use crate::speculation::{DraftExit, Speculation};

/// Which rows may share a pass, and when a finished one is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Batching {
    /// A batch is formed when the machine is idle and runs until its last sequence ends.
    Vanilla,
    /// A finished sequence is replaced before the next iteration; an iteration runs depth by depth.
    Sequence,
    /// A finished row is replaced before the next pass; a pass mixes depths.
    Depth,
}

impl Batching {
    /// Every batching policy.
    pub const ALL: [Self; 3] = [Self::Vanilla, Self::Sequence, Self::Depth];

    /// Whether all rows of an iteration go through the depths together.
    pub fn is_lockstep(self) -> bool {
        self != Self::Depth
    }

    /// The name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vanilla => "vanilla",
            Self::Sequence => "sequence",
            Self::Depth => "depth",
        }
    }
}

impl fmt::Display for Batching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Batching {
    type Err = PolicyError;
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        Self::ALL
            .into_iter()
            .find(|batching| batching.name() == text)
            .ok_or_else(|| PolicyError::Batching(text.to_owned()))
    }
}

/// When a row exits the loop before the last depth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExitPolicy {
    /// Never.
    None,
    /// Always after the pass at this depth (counted from 0).
    Static(u8),
    /// Always after the pass at one of two depths, drawn once for each request.
    Mix(DepthMix),
    /// At the earliest depth whose token equals that of the last depth. The oracle is not realisable: it bounds the
    /// other policies.
    Oracle {
        /// Whether each reading of the signal costs a run of the exit head, as for a confidence policy. In the paper it
        /// is free.
        charged: bool,
        /// Whether the depths are those of a recording at full depth, by index of the token. Otherwise they are those
        /// of the text that is served, with the keys and values that the KV fill leaves.
        recorded: bool,
    },
    /// At the earliest depth where the signal passes the threshold.
    Confidence {
        /// The exit signal.
        signal: ExitSignal,
        /// Threshold, in the signal's own unit.
        threshold: f32,
    },
    /// At the earliest depth where the signal passes a threshold that follows the load of the machine.
    LoadAdaptive(LoadThreshold),
    /// At the earliest depth by which the token has probably exited, where the gate is the probability that a token
    /// exits at its depth if it has not exited before (Ouro, arXiv 2510.25741): `1 - prod (1 - gate)` over the
    /// depths so far is at least `share`.
    Cumulative {
        /// Probability that the token has exited, 0 to 1.
        share: f32,
        /// Loops that every token runs, at least 1.
        min_loops: u8,
    },
    /// One depth after the earliest where the signal passes the threshold. The exits of a pass are known before it runs.
    Delayed {
        /// The exit signal.
        signal: ExitSignal,
        /// Threshold, in the signal's own unit.
        threshold: f32,
    },
    /// At the earliest depth whose entropy differs by at most `threshold` from that of the depth before (criterion
    /// `entropy-diff` of Huginn, arXiv 2502.05171).
    EntropyChange {
        /// Difference in nats, without its sign.
        threshold: f32,
    },
    /// At the earliest depth whose prediction is that of the `depths - 1` depths before as well (criterion
    /// `argmax-stability` of Huginn, arXiv 2502.05171, which counts the repetitions and so is one lower).
    Stable {
        /// Depths in a row with the same prediction, at least 2.
        depths: u8,
    },
    /// As early as a rule says, with a draft that full depth verifies later: the text is that of full depth.
    Speculate(Speculation),
    /// By a rule that is not built in.
    Custom(CustomPolicy),
}

/// A threshold between a calm and a busy one, by the number of requests that run or wait on the machine: quality gives way
/// before latency does.
///
/// The threshold is `calm` up to `low` requests and `busy` from `high` on, and linear between. It follows a rising load at
/// once. It follows a falling load only when the load is more than `band` requests below the one that set it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadThreshold {
    /// The exit signal.
    pub signal: ExitSignal,
    /// Threshold of a machine with few requests, in the signal's own unit.
    pub calm: f32,
    /// Threshold of a machine with many requests, at most as strict as `calm`.
    pub busy: f32,
    /// Requests up to which the threshold is `calm`.
    pub low: u32,
    /// Requests from which on the threshold is `busy`; above `low`.
    pub high: u32,
    /// Requests by which a falling load is followed late.
    pub band: u32,
}

impl LoadThreshold {
    /// The band where none is given: a quarter of the way from `low` to `high`.
    pub fn default_band(low: u32, high: u32) -> u32 {
        (high - low) / 4
    }

    /// The threshold, in the signal's own unit, when `load` requests run or wait.
    pub fn at(&self, load: u32) -> f32 {
        let range = (self.high - self.low) as f32;
        let share = (load.clamp(self.low, self.high) - self.low) as f32 / range;
        // Exactly one of the two at either end.
        self.calm * (1.0 - share) + self.busy * share
    }
}

impl fmt::Display for LoadThreshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { signal, calm, busy, low, high, band } = self;
        write!(f, "{signal}:{calm}..{busy}:{low}..{high}:{band}")
    }
}

/// What an executor must report of a row after a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignalRead {
    /// Nothing.
    None,
    /// 1 if the oracle lets the row exit here, else 0.
    Oracle,
    /// The value of an exit signal.
    Signal(ExitSignal),
    /// 1 if the head predicts at this depth what it predicted one depth earlier, else 0; 0 at depth 0.
    Repeats,
}

impl SignalRead {
    /// Whether reading it costs a product with the whole vocabulary. The oracle's answer is free.
    pub fn needs_head(self) -> bool {
        match self {
            Self::None | Self::Oracle => false,
            Self::Signal(signal) => signal.needs_head(),
            Self::Repeats => true,
        }
    }

    /// A value that decides by itself, whatever a policy makes of others: with it a row exits, or does not.
    pub fn certain(self, exits: bool) -> f32 {
        match self {
            Self::Signal(signal) => signal.certain(exits),
            Self::None | Self::Oracle | Self::Repeats => {
                if exits {
                    f32::INFINITY
                } else {
                    f32::NEG_INFINITY
                }
            }
        }
    }
}

/// What is read of rows that predict a token, by depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalReads {
    /// What an executor must report.
    pub signal: SignalRead,
    /// The signal is read below this depth. From it on, no exit depends on a signal.
    pub below: u8,
    /// Depths from where a signal is read to the exit that it decides: 0, or 1 for delayed exits.
    pub delay: u8,
    /// From this depth on, the exit head runs for every row that predicts, because the signal needs the head or the row
    /// is certain to exit. At lower depths the head runs after the exits are decided, for the exiting rows together, and in
    /// passes in which exits are decided, for certain ones as well.
    pub head_from: u8,
    /// The depth at which rows that exited with drafts are verified: the last one under a policy that
    /// [speculates](ExitPolicy::Speculate), otherwise none, [`NO_DRAFTS`](Self::NO_DRAFTS).
    pub verified_at: u8,
}

impl SignalReads {
    /// The depth at which drafts are verified where there are none.
    pub const NO_DRAFTS: u8 = u8::MAX;

    /// What is read in one pass of these segments. Where no signal is read, no exit depends on the outcome of the pass, so the
    /// head runs within it for the rows that exit for certain.
    #[inline]
    pub(crate) fn of_pass(self, segments: &[Segment]) -> Self {
        let decides_later =
            matches!(self.signal, SignalRead::Signal(_)) && self.head_from == u8::MAX && self.delay == 0;
        match decides_later && !segments.iter().any(|segment| self.read_signal(segment)) {
            true => Self { head_from: self.below, ..self },
            false => self,
        }
    }

    /// Whether reading the signal takes more than the head: a gate, or a comparison with the state one depth earlier.
    #[inline]
    pub(crate) fn read_apart(&self) -> bool {
        let SignalRead::Signal(signal) = self.signal else { return false };
        matches!(signal, ExitSignal::Gate | ExitSignal::Similarity | ExitSignal::Difference)
    }

    /// Whether an executor must report the exit signal of a segment's last row.
    #[inline]
    pub fn read_signal(&self, segment: &Segment) -> bool {
        segment.predicts && segment.depth < self.below && self.signal != SignalRead::None && self.may_exit(segment)
    }

    /// Whether the exit head runs for a segment's last row within the pass.
    #[inline]
    pub fn run_head(&self, segment: &Segment) -> bool {
        self.run_head_without_drafts(segment) && (self.may_exit(segment) || segment.depth == self.verified_at)
    }

    /// As [`run_head`](Self::run_head) where no policy speculates.
    #[inline]
    pub(crate) fn run_head_without_drafts(&self, segment: &Segment) -> bool {
        segment.predicts && segment.depth >= self.head_from
    }

    /// Whether early exits are drafts.
    #[inline]
    pub(crate) fn has_drafts(&self) -> bool {
        self.verified_at != Self::NO_DRAFTS
    }

    /// Whether the pass verifies the drafts that the rows of a segment left.
    #[inline]
    pub fn verifies(&self, segment: &Segment) -> bool {
        (segment.depth == self.verified_at) & (segment.kind == RowKind::Backfill)
    }

    /// Number of rows of a segment for which the exit head runs within the pass.
    #[inline]
    pub fn head_rows(&self, segment: &Segment) -> u32 {
        if self.verifies(segment) { segment.tokens } else { u32::from(self.run_head(segment)) }
    }

    /// Whether the last row of a segment may exit before the last depth.
    #[inline]
    fn may_exit(&self, segment: &Segment) -> bool {
        !self.has_drafts() || segment.kind == RowKind::Decode
    }
}

impl ExitPolicy {
    /// The signal that the policy reads.
    pub fn signal_read(self) -> SignalRead {
        match self {
            Self::None | Self::Static(_) | Self::Mix(_) => SignalRead::None,
            Self::Oracle { .. } => SignalRead::Oracle,
            Self::Confidence { signal, .. }
            | Self::Delayed { signal, .. }
            | Self::LoadAdaptive(LoadThreshold { signal, .. }) => SignalRead::Signal(signal),
            Self::Cumulative { .. } => SignalRead::Signal(ExitSignal::Gate),
            Self::EntropyChange { .. } => SignalRead::Signal(ExitSignal::Entropy),
            Self::Stable { .. } => SignalRead::Repeats,
            Self::Speculate(Speculation { draft, .. }) => match draft {
                DraftExit::Static(_) => SignalRead::None,
                DraftExit::Signal { signal, .. } => SignalRead::Signal(signal),
            },
            Self::Custom(policy) => policy.reads(),
        }
    }

    /// Whether the exits of a pass are known before it runs, so that the next pass can be planned meanwhile.
    pub fn is_known_ahead(self) -> bool {
        self.is_fixed_depth() || matches!(self, Self::Delayed { .. })
    }

    /// Whether exits depend on how many requests run and wait, and so on how fast passes are.
    pub fn depends_on_load(self) -> bool {
        match self {
            Self::LoadAdaptive(_) | Self::Custom(_) => true,
            Self::Speculate(Speculation { drafts, .. }) => drafts.calm != drafts.busy,
            _ => false,
        }
    }

    /// Whether early exits are drafts, which full depth verifies.
    pub fn speculates(self) -> bool {
        matches!(self, Self::Speculate(_))
    }

    /// The KV fill that a policy is served with where `kv_fill` is asked for. Under one that speculates, every token runs every
    /// depth in the end, so fills that keep the entries of every depth are all [backfill](KvFill::Backfill).
    pub fn served_fill(self, kv_fill: KvFill) -> KvFill {
        match kv_fill {
            KvFill::Reuse | KvFill::Skip if self.speculates() => KvFill::Backfill,
            _ => kv_fill,
        }
    }

    /// Whether all tokens of a request exit at one depth, which is known before it runs.
    pub fn is_fixed_depth(self) -> bool {
        matches!(self, Self::None | Self::Static(_) | Self::Mix(_))
    }

    /// Whether reading the signal takes a product with the whole vocabulary.
    pub fn read_needs_head(self) -> bool {
        self.signal_read().needs_head() || matches!(self, Self::Oracle { charged: true, .. })
    }

    /// The depths at which rows of a model with `num_loops` loops can exit. At the last depth, all do.
    pub fn exit_depths(self, num_loops: u8) -> RangeInclusive<u8> {
        let last = num_loops - 1;
        match self {
            Self::None => last..=last,
            Self::Static(depth) => depth.min(last)..=depth.min(last),
            Self::Mix(mix) => mix.shallowest().min(last)..=mix.deepest().min(last),
            Self::Oracle { .. } | Self::Confidence { .. } | Self::LoadAdaptive(_) | Self::Custom(_) => 0..=last,
            Self::Cumulative { min_loops, .. } => (min_loops - 1).min(last)..=last,
            Self::Stable { depths } => (depths - 1).min(last)..=last,
            Self::Delayed { .. } | Self::EntropyChange { .. } => 1.min(last)..=last,
            Self::Speculate(speculation) => speculation.shallowest().min(last)..=last,
        }
    }

    /// What is read of rows that predict, in a model with `num_loops` loops.
    pub fn signal_reads(self, num_loops: u8) -> SignalReads {
        let certain_from = *self.exit_depths(num_loops).end();
        let delay = u8::from(matches!(self, Self::Delayed { .. }));
        let below = certain_from.saturating_sub(delay);
        let head_from = match self.signal_read() {
            // Drafts are verified in most passes, so that the head is read in any case: once for all rows.
            _ if self.speculates() => *self.exit_depths(num_loops).start(),
            SignalRead::None => certain_from,
            _ if self.read_needs_head() && below == 0 => certain_from,
            // A delayed policy reads the signal one depth less, but rows exit there: the head runs once for all rows.
            _ if self.read_needs_head() => 0,
            // Reading the signal does not need the head. The head runs once, afterwards, also for rows certain to exit.
            _ => u8::MAX,
        };
        let verified_at = if self.speculates() { certain_from } else { SignalReads::NO_DRAFTS };
        SignalReads { signal: self.signal_read(), below, delay, head_from, verified_at }
    }

    /// The values at which rows exit: of the signal, or of what the policy makes of it. The bound of a load-adaptive policy is
    /// that of a machine without load.
    pub fn bound(self) -> SignalBound {
        match self {
            Self::None | Self::Static(_) | Self::Custom(_) => SignalBound::NEVER,
            Self::Mix(_) | Self::Oracle { .. } => SignalBound::at_least(1.0),
            Self::Confidence { signal, threshold } | Self::Delayed { signal, threshold } => signal.bound(threshold),
            Self::LoadAdaptive(by_load) => by_load.signal.bound(by_load.calm),
            Self::Cumulative { share, .. } => SignalBound::at_least(share),
            Self::EntropyChange { threshold } => ExitSignal::Entropy.bound(threshold),
            Self::Stable { depths } => SignalBound::at_least(f32::from(depths)),
            Self::Speculate(speculation) => speculation.bound(),
        }
    }

    /// The depth at which all tokens of a request exit, in a model with `num_loops` loops, whatever the model computes.
    /// `None` if it depends on that.
    pub fn known_depth(self, request: u32, num_loops: u8) -> Option<u8> {
        match self {
            Self::None => Some(num_loops - 1),
            Self::Static(depth) => Some(depth),
            Self::Mix(mix) => Some(mix.depth(request)),
            _ => None,
        }
    }

    /// The kind of policy, without its parameters: `none`, `static`, `mix`, `oracle`, `confidence`, `load-adaptive`,
    /// `cumulative`, `delayed`, `entropy-change`, `stable`, `speculate`, or the name of a custom one.
    pub fn kind(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Static(_) => "static",
            Self::Mix(_) => "mix",
            Self::Oracle { .. } => "oracle",
            Self::Confidence { .. } => "confidence",
            Self::LoadAdaptive(_) => "load-adaptive",
            Self::Cumulative { .. } => "cumulative",
            Self::Delayed { .. } => "delayed",
            Self::EntropyChange { .. } => "entropy-change",
            Self::Stable { .. } => "stable",
            Self::Speculate(_) => "speculate",
            Self::Custom(policy) => policy.name(),
        }
    }

    /// Whether an executor needs exit depths that were recorded at full depth.
    pub fn follows_recording(self) -> bool {
        matches!(self, Self::Oracle { recorded: true, .. })
    }

    /// The threshold of a policy that has one.
    pub fn threshold(self) -> Option<f32> {
        match self {
            Self::Confidence { threshold, .. }
            | Self::Delayed { threshold, .. }
            | Self::EntropyChange { threshold } => Some(threshold),
            Self::Stable { depths } => Some(depths.into()),
            Self::Cumulative { share, .. } => Some(share),
            Self::Speculate(Speculation { draft: DraftExit::Signal { threshold, .. }, .. }) => Some(threshold),
            _ => None,
        }
    }
}

impl fmt::Display for ExitPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Static(depth) => write!(f, "static:{depth}"),
            Self::Mix(mix) => mix.fmt(f),
            Self::Oracle { charged, recorded } => {
                let (recorded, charged) =
                    (if *recorded { ":recorded" } else { "" }, if *charged { ":charged" } else { "" });
                write!(f, "oracle{recorded}{charged}")
            }
            Self::Confidence { signal, threshold } => write!(f, "confidence:{signal}:{threshold}"),
            Self::LoadAdaptive(by_load) => write!(f, "load-adaptive:{by_load}"),
            Self::Cumulative { share, min_loops } => write!(f, "cumulative:gate:{share}:{min_loops}"),
            Self::Delayed { signal, threshold } => write!(f, "delayed:{signal}:{threshold}"),
            Self::EntropyChange { threshold } => write!(f, "entropy-change:{threshold}"),
            Self::Stable { depths } => write!(f, "stable:{depths}"),
            Self::Speculate(speculation) => write!(f, "speculate:{speculation}"),
            Self::Custom(policy) => f.write_str(policy.name()),
        }
    }
}

impl FromStr for ExitPolicy {
    type Err = PolicyError;

    /// Parses `none`, `static:DEPTH`, `mix:DEPTH:DEPTH:SHARE` or `mix:DEPTH:DEPTH:SHARE:SEED`, `oracle`, `oracle:charged`, `oracle:recorded`,
    /// `oracle:recorded:charged`, `confidence:THRESHOLD` (of the top-1 probability),
    /// `confidence:MEASURE:THRESHOLD` or its short form `MEASURE:THRESHOLD`, `delayed:MEASURE:THRESHOLD`,
    /// `cumulative:gate:SHARE` or `cumulative:gate:SHARE:LOOPS`, `entropy-change:THRESHOLD`, `stable:DEPTHS`, and `load-adaptive:MEASURE:CALM..BUSY:LOW..HIGH` or
    /// `load-adaptive:MEASURE:CALM..BUSY:LOW..HIGH:BAND`, and `speculate:MEASURE:THRESHOLD:DRAFTS` or `speculate:static:DEPTH:DRAFTS`,
    /// where `CALM..BUSY:LOW..HIGH` may stand for `DRAFTS`.
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        Self::built_in(text).or_else(|error| CustomPolicy::registered(text).map(Self::Custom).ok_or(error))
    }
}

impl ExitPolicy {
    /// Reads the name of a policy that is not custom.
    pub(crate) fn built_in(text: &str) -> Result<Self, PolicyError> {
        let unknown = || PolicyError::Exit(text.to_owned());
        let threshold = |number: &str| match number.parse::<f32>() {
            Ok(threshold) if threshold.is_finite() => Ok(threshold),
            _ => Err(PolicyError::Threshold(text.to_owned())),
        };
        let mix = |first: &str, second: &str, share: &str, seed: &str| {
            let share = share.parse().ok().filter(|share| (0.0..=1.0).contains(share));
            let share = share.ok_or_else(|| PolicyError::Share(text.to_owned()))?;
            let [first, second] = [first, second].map(|depth| depth.parse().map_err(|_| unknown()));
            let seed = seed.parse().map_err(|_| unknown())?;
            Ok(Self::Mix(DepthMix { depths: [first?, second?], share, seed }))
        };
        let parts: Vec<&str> = text.split(':').collect();
        match parts[..] {
            ["none"] => Ok(Self::None),
            ["static", depth] => depth.parse().map(Self::Static).map_err(|_| unknown()),
            ["mix", first, second, share] => mix(first, second, share, "0"),
            ["mix", first, second, share, seed] => mix(first, second, share, seed),
            ["oracle"] => Ok(Self::Oracle { charged: false, recorded: false }),
            ["oracle", "charged"] => Ok(Self::Oracle { charged: true, recorded: false }),
            ["oracle", "recorded"] => Ok(Self::Oracle { charged: false, recorded: true }),
            ["oracle", "recorded", "charged"] => Ok(Self::Oracle { charged: true, recorded: true }),
            ["confidence", number] => Ok(Self::Confidence { signal: ExitSignal::Top1, threshold: threshold(number)? }),
            ["confidence", signal, number] => Ok(Self::Confidence {
                signal: signal.parse().map_err(PolicyError::ExitSignal)?,
                threshold: threshold(number)?,
            }),
            ["delayed", signal, number] => Ok(Self::Delayed {
                signal: signal.parse().map_err(PolicyError::ExitSignal)?,
                threshold: threshold(number)?,
            }),
            ["cumulative", "gate", share] => Self::cumulative(text, threshold(share)?, "1"),
            ["cumulative", "gate", share, min_loops] => Self::cumulative(text, threshold(share)?, min_loops),
            ["entropy-change", number] => Ok(Self::EntropyChange { threshold: threshold(number)? }),
            ["stable", depths] => match depths.parse() {
                Ok(depths) if depths > 1 => Ok(Self::Stable { depths }),
                _ => Err(PolicyError::Stable(text.to_owned())),
            },
            ["load-adaptive", signal, thresholds, loads, ref band @ ..] if band.len() < 2 => {
                let signal: ExitSignal = signal.parse().map_err(PolicyError::ExitSignal)?;
                let (calm, busy) = thresholds.split_once("..").ok_or_else(unknown)?;
                let (calm, busy) = (threshold(calm)?, threshold(busy)?);
                if signal.sureness(calm) < signal.sureness(busy) {
                    return Err(PolicyError::StricterUnderLoad(text.to_owned()));
                }
                let no_load = || PolicyError::Load(text.to_owned());
                let requests = |number: &str| number.parse::<u32>().map_err(|_| no_load());
                let (low, high) = loads.split_once("..").ok_or_else(no_load)?;
                let (low, high) = (requests(low)?, requests(high)?);
                if low >= high {
                    return Err(no_load());
                }
                let band = band.first().map_or(Ok(LoadThreshold::default_band(low, high)), |band| requests(band))?;
                Ok(Self::LoadAdaptive(LoadThreshold { signal, calm, busy, low, high, band }))
            }
            ["speculate", ref rule @ ..] => Speculation::parse(text, rule).map(Self::Speculate),
            [signal, number] => {
                let signal = signal.parse().map_err(|_| unknown())?;
                Ok(Self::Confidence { signal, threshold: threshold(number)? })
            }
            _ => Err(unknown()),
        }
    }

    fn cumulative(text: &str, share: f32, min_loops: &str) -> Result<Self, PolicyError> {
        match min_loops.parse() {
            Ok(min_loops) if min_loops > 0 && (0.0..=1.0).contains(&share) => Ok(Self::Cumulative { share, min_loops }),
            _ => Err(PolicyError::Cumulative(text.to_owned())),
        }
    }
}

/// Keys and values that later tokens find at the depths that an exited token skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvFill {
    /// Copies of the entries at its exit depth, written when the token exits.
    #[default]
    Reuse,
    /// The entries of depth 0, which all depths share: no others are kept.
    First,
    /// None: rows at a deeper depth attend only to tokens that ran it.
    Skip,
    /// Exact ones: skipped depths run later as rows of low priority, before any row attends to them.
    Backfill,
    /// The entries of the last depth that the token ran: all depths share one slot, and each overwrites the one before
    /// (lookup strategy `latest-m4-compress-s4` of Huginn, whose block has four layers).
    Last,
    /// As [`Last`](Self::Last), with this many slots: depth `d` writes and reads slot `d` modulo their number, at least 2.
    /// Slots that an exited token has not written get copies of the entries of its exit depth. With as many slots as
    /// loops, this is [`Reuse`](Self::Reuse).
    Cycle(u8),
}

impl KvFill {
    /// The KV fills that keep what a row has written. [`Last`](Self::Last) and [`Cycle`](Self::Cycle) overwrite it.
    pub const KEEPING: [Self; 4] = [Self::Reuse, Self::First, Self::Skip, Self::Backfill];

    /// Number of depths whose keys and values are kept, in a model with `num_loops` loops. A token takes this many
    /// times the cache of one depth.
    pub fn cached_depths(self, num_loops: u8) -> u8 {
        match self {
            Self::First | Self::Last => 1,
            Self::Cycle(slots) => slots.min(num_loops),
            Self::Reuse | Self::Skip | Self::Backfill => num_loops,
        }
    }

    /// Whether rows overwrite what their positions wrote at lower depths, in a model with `num_loops` loops.
    ///
    /// What a row finds then depends on how far the positions before it have got. It is defined as follows, and
    /// independent of batching, since the scheduler starts a prompt as a whole, lets the next token wait until its prompt
    /// has run every depth, and reserves blocks for the whole sequence, so that nothing is preempted:
    ///
    /// - A row of a prompt attends to the positions of the prompt at its own depth.
    /// - The row of a generated token at depth `d` attends, at each position before it, to the entry of the deepest depth
    ///   that the position ran among those equal to `d` modulo the number of slots.
    pub fn overwrites(self, num_loops: u8) -> bool {
        matches!(self, Self::Last | Self::Cycle(_)) && self.cached_depths(num_loops) < num_loops
    }

    /// Number of depths, from 0, at which a token that exits at one of them leaves copies of its entries below, in a model
    /// with `num_loops` loops.
    pub fn copied_depths(self, num_loops: u8) -> u8 {
        match self {
            Self::Reuse | Self::Cycle(_) => self.cached_depths(num_loops),
            Self::First | Self::Skip | Self::Backfill | Self::Last => 0,
        }
    }
}

impl fmt::Display for KvFill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reuse => f.write_str("reuse"),
            Self::First => f.write_str("first"),
            Self::Skip => f.write_str("skip"),
            Self::Backfill => f.write_str("backfill"),
            Self::Last => f.write_str("last"),
            Self::Cycle(slots) => write!(f, "cycle:{slots}"),
        }
    }
}

impl FromStr for KvFill {
    type Err = PolicyError;

    /// Parses `reuse`, `first`, `skip`, `backfill`, `last`, and `cycle:SLOTS` with at least 2 slots.
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        match text {
            "reuse" => Ok(Self::Reuse),
            "first" => Ok(Self::First),
            "skip" => Ok(Self::Skip),
            "backfill" => Ok(Self::Backfill),
            "last" => Ok(Self::Last),
            _ => {
                let slots = text.strip_prefix("cycle:").and_then(|slots| slots.parse().ok());
                let slots = slots.filter(|&slots| slots > 1);
                slots.map(Self::Cycle).ok_or_else(|| PolicyError::KvFill(text.to_owned()))
            }
        }
    }
}

/// A policy's name that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Not a batching policy.
    #[error("unknown batching policy `{0}`: expected vanilla, sequence or depth")]
    Batching(String),
    /// Not a KV fill.
    #[error("unknown KV fill `{0}`: expected reuse, first, skip, backfill, last, or cycle:SLOTS with at least 2 slots")]
    KvFill(String),
    /// Not an exit policy.
    #[error(
        "unknown exit policy `{0}`: expected none, static:DEPTH, mix:DEPTH:DEPTH:SHARE, oracle, oracle:charged, oracle:recorded, \
         confidence:THRESHOLD, confidence:SIGNAL:THRESHOLD, SIGNAL:THRESHOLD, delayed:SIGNAL:THRESHOLD, \
         cumulative:gate:SHARE[:LOOPS], entropy-change:THRESHOLD, stable:DEPTHS, \
         load-adaptive:SIGNAL:CALM..BUSY:LOW..HIGH[:BAND], speculate:SIGNAL:THRESHOLD:DRAFTS, speculate:static:DEPTH:DRAFTS \
         or the name of a registered policy"
    )]
    Exit(String),
    /// Not a signal.
    #[error("{0}")]
    ExitSignal(String),
    /// Not a probability.
    #[error("the share of exit policy `{0}` is not a probability, expected 0 to 1")]
    Share(String),
    /// Not a finite number.
    #[error("the threshold of exit policy `{0}` is not a finite number")]
    Threshold(String),
    /// Not a share, or no loops.
    #[error("exit policy `{0}`: expected cumulative:gate:SHARE:LOOPS, a share from 0 to 1 and at least 1 loop")]
    Cumulative(String),
    /// Not a number of depths that could differ.
    #[error("exit policy `{0}`: expected stable:DEPTHS, at least 2")]
    Stable(String),
    /// Not a rule and a number of drafts.
    #[error(
        "exit policy `{0}`: expected speculate:SIGNAL:THRESHOLD:DRAFTS or speculate:static:DEPTH:DRAFTS with a finite \
         threshold, a depth from 0 and up to 255 drafts, or CALM..BUSY:LOW..HIGH in place of DRAFTS with whole numbers of \
         requests, LOW below HIGH"
    )]
    Speculation(String),
    /// Not two numbers of requests.
    #[error(
        "exit policy `{0}`: expected load-adaptive:SIGNAL:CALM..BUSY:LOW..HIGH:BAND with whole numbers of requests, LOW below HIGH"
    )]
    Load(String),
    /// A load-adaptive policy that exits less under load.
    #[error("exit policy `{0}`: the busy threshold is stricter than the calm one, expected CALM..BUSY")]
    StricterUnderLoad(String),
    /// The name of a custom exit policy could not be read back.
    #[error("a custom exit policy is named `{0}`: expected ASCII letters, digits and `-_.:`, at least one")]
    CustomName(String),
    /// The name of a custom exit policy is that of another.
    #[error("a custom exit policy is named `{0}`, which is another policy's name already")]
    TakenName(String),
}

macro_rules! serde_by_name {
    ($policy:ty) => {
        impl serde::Serialize for $policy {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $policy {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
serde_by_name!(Batching);
serde_by_name!(ExitPolicy);
serde_by_name!(KvFill);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_read_back_what_they_print() {
        let printed = [
            "none",
            "static:2",
            "mix:2:0:0.25",
            "mix:0:1:0.5:7",
            "oracle",
            "oracle:charged",
            "oracle:recorded",
            "oracle:recorded:charged",
            "confidence:margin:0.25",
            "delayed:entropy:0.5",
            "delayed:difference:0.03",
            "cumulative:gate:0.75:2",
            "entropy-change:0.001",
            "speculate:margin:0.05:4",
            "speculate:static:1:2",
            "speculate:gate:0.9:4..0:8..32",
            "stable:6",
            "load-adaptive:top1:1..0.5:4..20:3",
        ];
        for text in printed {
            assert_eq!(text.parse::<ExitPolicy>().unwrap().to_string(), text);
        }
        assert_eq!("cumulative:gate:0.5".parse::<ExitPolicy>().unwrap().to_string(), "cumulative:gate:0.5:1");
        let adaptive = "load-adaptive:entropy:.5..2:4..20".parse::<ExitPolicy>().unwrap();
        assert_eq!(adaptive.to_string(), "load-adaptive:entropy:0.5..2:4..20:4");
        assert_eq!("confidence:0.9".parse::<ExitPolicy>().unwrap().to_string(), "confidence:top1:0.9");
        assert_eq!("gate:0.9".parse::<ExitPolicy>().unwrap().to_string(), "confidence:gate:0.9");
        for batching in Batching::ALL {
            assert_eq!(batching.name().parse(), Ok(batching));
        }
        for fill in ["reuse", "first", "skip", "backfill", "last", "cycle:2", "cycle:255"] {
            assert_eq!(fill.parse::<KvFill>().unwrap().to_string(), fill);
        }
    }

    #[test]
    fn shared_slots_are_as_many_as_the_fill_has_or_the_model_has_loops() {
        let fill = |text: &str| text.parse::<KvFill>().unwrap();
        let of = |text: &str| {
            let fill = fill(text);
            (fill.cached_depths(4), fill.overwrites(4), fill.copied_depths(4))
        };
        assert_eq!((of("first"), of("last")), ((1, false, 0), (1, true, 0)));
        assert_eq!((of("cycle:2"), of("cycle:3")), ((2, true, 2), (3, true, 3)));
        assert_eq!((of("cycle:4"), of("cycle:9"), of("reuse")), ((4, false, 4), (4, false, 4), (4, false, 4)));
        assert!(!fill("last").overwrites(1), "one loop overwrites nothing");
    }

    #[test]
    fn unreadable_policies_say_what_was_expected() {
        let unreadable = [
            "",
            "oracel",
            "mix:0:1",
            "mix:0:1:1.5",
            "mix:0:1:NaN",
            "mix:0:-1:0.5",
            "mix:0:1:0.5:-1",
            "oracel:1",
            "confidence",
            "confidence:NaN",
            "gate:inf",
            "confidence:top2:0.9",
            "static:-1",
            "delayed:0.9",
            "delayed:top2:0.9",
            "cumulative:top1:0.9",
            "cumulative:gate:1.5",
            "cumulative:gate:0.5:0",
            "entropy-change:NaN",
            "entropy-change:entropy:0.5",
            "speculate:margin:0.05",
            "speculate:margin:inf:4",
            "speculate:static:-1:4",
            "speculate:static:1:4:8",
            "speculate:gate:0.9:4..0:8..8",
            "speculate:gate:0.9:256",
            "stable:1",
            "stable:256",
            "stable:1.5",
            "load-adaptive:top1:0.9:4..20",
            "load-adaptive:top1:0.9..0.5:20..4",
            "load-adaptive:top1:0.9..0.5:4..4",
            "load-adaptive:top1:0.9..0.5:4..20:-1",
            "load-adaptive:top1:0.9..0.5:4..20:1:1",
        ];
        for text in unreadable {
            let error = text.parse::<ExitPolicy>().unwrap_err().to_string();
            assert!(error.contains("expected") || error.contains("finite"), "{error}");
        }
        for stricter in ["load-adaptive:top1:0.5..0.9:4..20", "load-adaptive:entropy:2..0.5:4..20"] {
            let error = stricter.parse::<ExitPolicy>().unwrap_err().to_string();
            assert!(error.contains("stricter than the calm one"), "{error}");
        }
        assert!("depthwise".parse::<Batching>().unwrap_err().to_string().contains("vanilla, sequence or depth"));
        for unreadable in ["copy", "cycle", "cycle:1", "cycle:0", "cycle:256", "last:2"] {
            let error = unreadable.parse::<KvFill>().unwrap_err().to_string();
            assert!(error.contains("reuse, first, skip, backfill, last, or cycle:SLOTS"), "{error}");
        }
    }

    #[test]
    fn only_signals_over_the_vocabulary_need_the_head() {
        let needs_head = |text: &str| text.parse::<ExitPolicy>().unwrap().read_needs_head();
        let need = [
            "top1:0.9",
            "margin:0.9",
            "entropy:0.9",
            "oracle:charged",
            "oracle:recorded:charged",
            "load-adaptive:top1:1..0:0..1",
            "entropy-change:0.001",
            "stable:2",
        ];
        assert!(need.into_iter().all(needs_head));
        let need_not = [
            "none",
            "static:0",
            "oracle",
            "oracle:recorded",
            "similarity:0.9",
            "difference:0.03",
            "gate:0.9",
            "cumulative:gate:0.9",
        ];
        assert!(!need_not.into_iter().any(needs_head));
    }

    #[test]
    fn a_threshold_by_load_is_bounded_and_linear_between() {
        let Ok(ExitPolicy::LoadAdaptive(by_load)) = "load-adaptive:gate:0.9..0.3:10..20".parse() else {
            panic!("reads")
        };
        assert_eq!([0, 10, 20, u32::MAX].map(|load| by_load.at(load)), [0.9, 0.9, 0.3, 0.3]);
        assert!((by_load.at(15) - 0.6).abs() < 1e-6);
        assert_eq!(by_load.band, 2);
    }

    #[test]
    fn a_delayed_policy_reads_one_depth_less_and_exits_from_the_second_depth_on() {
        let delayed: ExitPolicy = "delayed:gate:0.9".parse().unwrap();
        assert_eq!(delayed.exit_depths(4), 1..=3);
        let SignalReads { below, delay, .. } = delayed.signal_reads(4);
        assert_eq!((below, delay), (2, 1));
        assert_eq!((delayed.exit_depths(1), delayed.signal_reads(1).below), (0..=0, 0), "one loop: nothing to decide");
    }

    #[test]
    fn signals_are_read_below_the_last_exit_depth_and_pay_for_the_head_where_they_need_it() {
        let reads = |text: &str| {
            let reads = text.parse::<ExitPolicy>().unwrap().signal_reads(4);
            (reads.below, reads.head_from)
        };
        assert_eq!((reads("none"), reads("static:1")), ((3, 3), (1, 1)));
        assert_eq!(reads("mix:0:2:0.5"), (2, 2));
        assert_eq!((reads("speculate:static:1:4"), reads("speculate:gate:0.5:4")), ((3, 1), (3, 0)));
        assert_eq!((reads("confidence:0.9"), reads("oracle:charged")), ((3, 0), (3, 0)));
        assert_eq!((reads("confidence:similarity:0.9"), reads("oracle")), ((3, u8::MAX), (3, u8::MAX)));
        assert_eq!(
            (reads("entropy-change:0.1"), reads("stable:3")),
            ((3, 0), (3, 0)),
            "both compare with earlier depths"
        );
    }

    #[test]
    fn the_head_runs_within_passes_in_which_no_gate_is_read() {
        let row = |depth| Segment {
            slot: 0,
            start: 5,
            tokens: 1,
            depth,
            kind: RowKind::Decode,
            predicts: true,
            generated: true,
        };
        let head_from = |text: &str, depths: &[u8]| {
            let rows: Vec<Segment> = depths.iter().map(|&depth| row(depth)).collect();
            text.parse::<ExitPolicy>().unwrap().signal_reads(4).of_pass(&rows).head_from
        };
        assert_eq!([&[3, 3][..], &[3, 0], &[1]].map(|depths| head_from("gate:0.9", depths)), [3, u8::MAX, u8::MAX]);
        let prompt = Segment { predicts: false, kind: RowKind::Prompt, ..row(0) };
        let reads = "similarity:0.9".parse::<ExitPolicy>().unwrap().signal_reads(4);
        assert_eq!(reads.of_pass(&[row(3), prompt]).head_from, 3, "nothing is read of a prompt");
        // A delayed exit may be decided by an earlier pass, and the oracle decides at every depth.
        assert_eq!(["delayed:gate:0.9", "oracle"].map(|text| head_from(text, &[3, 3])), [u8::MAX; 2]);
        assert_eq!(head_from("margin:0.1", &[3, 3]), 0);
    }

    #[test]
    fn what_compares_depths_exits_only_where_there_are_depths_to_compare() {
        let depths = |text: &str| text.parse::<ExitPolicy>().unwrap().exit_depths(4);
        assert_eq!((depths("entropy-change:0.1"), depths("stable:2"), depths("stable:4")), (1..=3, 1..=3, 3..=3));
    }

    #[test]
    fn low_entropy_and_high_probability_exit() {
        let exit = |text: &str| text.parse::<ExitPolicy>().unwrap();
        let exits = |text, signal| exit(text).bound().is_reached(signal);
        assert!(exits("confidence:0.9", 0.9) && !exits("confidence:0.9", 0.89));
        assert!(exits("confidence:entropy:0.5", 0.5) && !exits("confidence:entropy:0.5", 0.51));
        assert!(exits("difference:0.03", 0.03) && !exits("difference:0.03", 0.031));
        assert!(exits("oracle", 1.0) && !exits("oracle", 0.0));
        assert!(!exits("none", f32::MAX) && !exits("confidence:0.9", f32::NAN));
    }
}
