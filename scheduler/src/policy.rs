//! Batching policies, exit policies and KV fills, and their names on the command line.

use std::fmt;
use std::str::FromStr;

use traces::Measure;

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

/// When a row leaves the loop before the last depth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExitPolicy {
    /// Never.
    None,
    /// Always after the pass at this depth (counted from 0).
    Static(u8),
    /// At the earliest depth whose token equals that of the last depth. Nobody has this one: it bounds the others.
    Oracle {
        /// Whether each look is paid for with the exit head, as a confidence policy's is. The paper's is free.
        charged: bool,
    },
    /// At the earliest depth where the measure passes the threshold.
    Confidence {
        /// The exit signal.
        measure: Measure,
        /// Where it is sure enough; in the measure's own unit.
        threshold: f32,
    },
}

/// What an executor must report of a row after a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Nothing.
    Never,
    /// 1 if the oracle lets the row leave here, else 0.
    Oracle,
    /// The value of an exit signal.
    Measure(Measure),
}

/// What is read of rows that predict, by their depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Looks {
    /// What an executor must report.
    pub signal: Look,
    /// It must below this depth, where rows leave in any case.
    pub below: u8,
    /// From this depth on the exit head runs for every row that predicts: its look reads the vocabulary, or it is
    /// certain to leave. Elsewhere it runs for all rows that leave at once, when that is decided.
    pub head_from: u8,
}

/// Signals with which rows leave: those that are `least` or more when multiplied by `sign`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    sign: f32,
    /// Not a number where no signal is enough.
    least: f32,
}

impl Bound {
    /// Whether a row with this signal leaves.
    #[inline]
    pub fn is_reached(self, signal: f32) -> bool {
        signal * self.sign >= self.least
    }
}

impl ExitPolicy {
    /// What rows are looked at for.
    pub fn look(self) -> Look {
        match self {
            Self::None | Self::Static(_) => Look::Never,
            Self::Oracle { .. } => Look::Oracle,
            Self::Confidence { measure, .. } => Look::Measure(measure),
        }
    }

    /// Whether a look costs a product with the whole vocabulary.
    pub fn look_needs_head(self) -> bool {
        match self {
            Self::None | Self::Static(_) => false,
            Self::Oracle { charged } => charged,
            Self::Confidence { measure, .. } => measure.needs_head(),
        }
    }

    /// The deepest depth that a row of a model with `num_loops` loops can reach.
    pub fn last_depth(self, num_loops: u8) -> u8 {
        match self {
            Self::Static(depth) => depth.min(num_loops - 1),
            _ => num_loops - 1,
        }
    }

    /// What is read of rows that predict, of a model with `num_loops` loops.
    pub fn looks(self, num_loops: u8) -> Looks {
        let below = self.last_depth(num_loops);
        let head_from = match self.look() {
            Look::Never => below,
            _ if self.look_needs_head() => 0,
            // Looks leave the head alone: it runs once, after them, for those that are certain to leave as well.
            _ => u8::MAX,
        };
        Looks { signal: self.look(), below, head_from }
    }

    /// Which of the rows that were looked at leave.
    pub fn bound(self) -> Bound {
        match self {
            Self::None | Self::Static(_) => Bound { sign: 1.0, least: f32::NAN },
            Self::Oracle { .. } => Bound { sign: 1.0, least: 1.0 },
            Self::Confidence { measure, threshold } => {
                Bound { sign: measure.sureness(1.0), least: measure.sureness(threshold) }
            }
        }
    }

    /// The kind of policy, without its parameters: `none`, `static`, `oracle` or `confidence`.
    pub fn kind(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Static(_) => "static",
            Self::Oracle { .. } => "oracle",
            Self::Confidence { .. } => "confidence",
        }
    }

    /// The threshold of a confidence policy.
    pub fn threshold(self) -> Option<f32> {
        match self {
            Self::Confidence { threshold, .. } => Some(threshold),
            _ => None,
        }
    }
}

impl fmt::Display for ExitPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Static(depth) => write!(f, "static:{depth}"),
            Self::Oracle { charged: false } => f.write_str("oracle"),
            Self::Oracle { charged: true } => f.write_str("oracle:charged"),
            Self::Confidence { measure, threshold } => write!(f, "confidence:{measure}:{threshold}"),
        }
    }
}

impl FromStr for ExitPolicy {
    type Err = PolicyError;

    /// Reads `none`, `static:DEPTH`, `oracle`, `oracle:charged`, `confidence:THRESHOLD` (of the top-1
    /// probability), `confidence:MEASURE:THRESHOLD` or, the same for short, `MEASURE:THRESHOLD`.
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let unknown = || PolicyError::Exit(text.to_owned());
        let threshold = |number: &str| match number.parse::<f32>() {
            Ok(threshold) if threshold.is_finite() => Ok(threshold),
            _ => Err(PolicyError::Threshold(text.to_owned())),
        };
        let parts: Vec<&str> = text.split(':').collect();
        match parts[..] {
            ["none"] => Ok(Self::None),
            ["static", depth] => depth.parse().map(Self::Static).map_err(|_| unknown()),
            ["oracle"] => Ok(Self::Oracle { charged: false }),
            ["oracle", "charged"] => Ok(Self::Oracle { charged: true }),
            ["confidence", number] => Ok(Self::Confidence { measure: Measure::Top1, threshold: threshold(number)? }),
            ["confidence", measure, number] => Ok(Self::Confidence {
                measure: measure.parse().map_err(PolicyError::Measure)?,
                threshold: threshold(number)?,
            }),
            [measure, number] => {
                let measure = measure.parse().map_err(|_| unknown())?;
                Ok(Self::Confidence { measure, threshold: threshold(number)? })
            }
            _ => Err(unknown()),
        }
    }
}

/// What a later token finds at depths that an early-exited token never ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvFill {
    /// Copies of the entries of its exit depth, written when it leaves.
    #[default]
    Reuse,
    /// Those of depth 0, which all depths share: there are no others.
    First,
    /// Nothing: deeper rows attend only to the tokens that got there.
    Skip,
    /// Its own, exactly: the depths it skipped run later, as rows of low priority, and before anybody attends to them.
    Backfill,
}

impl KvFill {
    /// Every KV fill.
    pub const ALL: [Self; 4] = [Self::Reuse, Self::First, Self::Skip, Self::Backfill];

    /// Depths whose keys and values are kept, of a model with `num_loops` loops: what a token takes in the cache is so
    /// many times what it takes at one depth.
    pub fn cached_depths(self, num_loops: u8) -> u8 {
        match self {
            Self::First => 1,
            Self::Reuse | Self::Skip | Self::Backfill => num_loops,
        }
    }

    /// The name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reuse => "reuse",
            Self::First => "first",
            Self::Skip => "skip",
            Self::Backfill => "backfill",
        }
    }
}

impl fmt::Display for KvFill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvFill {
    type Err = PolicyError;
    fn from_str(text: &str) -> Result<Self, PolicyError> {
        Self::ALL.into_iter().find(|fill| fill.name() == text).ok_or_else(|| PolicyError::KvFill(text.to_owned()))
    }
}

/// A policy's name that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Not a batching policy.
    #[error("unknown batching policy `{0}`: expected vanilla, sequence or depth")]
    Batching(String),
    /// Not a KV fill.
    #[error("unknown KV fill `{0}`: expected reuse, first, skip or backfill")]
    KvFill(String),
    /// Not an exit policy.
    #[error(
        "unknown exit policy `{0}`: expected none, static:DEPTH, oracle, oracle:charged, \
         confidence:THRESHOLD, confidence:MEASURE:THRESHOLD or MEASURE:THRESHOLD"
    )]
    Exit(String),
    /// Not a measure.
    #[error("{0}")]
    Measure(String),
    /// Not a finite number.
    #[error("the threshold of exit policy `{0}` is not a finite number")]
    Threshold(String),
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
        for text in ["none", "static:2", "oracle", "oracle:charged", "confidence:margin:0.25"] {
            assert_eq!(text.parse::<ExitPolicy>().unwrap().to_string(), text);
        }
        assert_eq!("confidence:0.9".parse::<ExitPolicy>().unwrap().to_string(), "confidence:top1:0.9");
        assert_eq!("gate:0.9".parse::<ExitPolicy>().unwrap().to_string(), "confidence:gate:0.9");
        for batching in Batching::ALL {
            assert_eq!(batching.name().parse(), Ok(batching));
        }
        for fill in KvFill::ALL {
            assert_eq!(fill.name().parse(), Ok(fill));
        }
    }

    #[test]
    fn unreadable_policies_say_what_was_expected() {
        let unreadable =
            ["", "oracel", "oracel:1", "confidence", "confidence:NaN", "gate:inf", "confidence:top2:0.9", "static:-1"];
        for text in unreadable {
            let error = text.parse::<ExitPolicy>().unwrap_err().to_string();
            assert!(error.contains("expected") || error.contains("finite"), "{error}");
        }
        assert!("depthwise".parse::<Batching>().unwrap_err().to_string().contains("vanilla, sequence or depth"));
        assert!("copy".parse::<KvFill>().unwrap_err().to_string().contains("reuse, first, skip or backfill"));
    }

    #[test]
    fn only_what_reads_the_vocabulary_needs_the_head_to_look() {
        let needs_head = |text: &str| text.parse::<ExitPolicy>().unwrap().look_needs_head();
        assert!(["top1:0.9", "margin:0.9", "entropy:0.9", "oracle:charged"].into_iter().all(needs_head));
        assert!(!["none", "static:0", "oracle", "similarity:0.9", "gate:0.9"].into_iter().any(needs_head));
    }

    #[test]
    fn looks_end_where_rows_leave_in_any_case_and_pay_for_the_head_where_they_read_it() {
        let looks = |text: &str| {
            let looks = text.parse::<ExitPolicy>().unwrap().looks(4);
            (looks.below, looks.head_from)
        };
        assert_eq!((looks("none"), looks("static:1")), ((3, 3), (1, 1)));
        assert_eq!((looks("confidence:0.9"), looks("oracle:charged")), ((3, 0), (3, 0)));
        assert_eq!((looks("confidence:similarity:0.9"), looks("oracle")), ((3, u8::MAX), (3, u8::MAX)));
    }

    #[test]
    fn low_entropy_and_high_probability_leave() {
        let exit = |text: &str| text.parse::<ExitPolicy>().unwrap();
        let leaves = |text, signal| exit(text).bound().is_reached(signal);
        assert!(leaves("confidence:0.9", 0.9) && !leaves("confidence:0.9", 0.89));
        assert!(leaves("confidence:entropy:0.5", 0.5) && !leaves("confidence:entropy:0.5", 0.51));
        assert!(leaves("oracle", 1.0) && !leaves("oracle", 0.0));
        assert!(!leaves("none", f32::MAX) && !leaves("confidence:0.9", f32::NAN));
    }
}
