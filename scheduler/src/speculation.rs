//! Self-speculation: early exits are drafts, which full depth verifies later.
//!
//! A row that exits early leaves a draft of the next token. The depths that it skipped run later, as under
//! [`KvFill::Backfill`](crate::KvFill::Backfill). At the last of them, what full depth predicts is compared with the draft.
//! The first draft that full depth contradicts is replaced by what it predicts, and everything after it is taken back. The
//! text is therefore that of full depth.

use std::fmt;

use traces::{ExitSignal, SignalBound};

use crate::pass::{RowKind, Segment};
use crate::policy::PolicyError;

/// When rows exit with drafts, and how many drafts a sequence may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speculation {
    /// Where a row exits with a draft.
    pub draft: DraftExit,
    /// Most drafts of a sequence that wait to be verified. With that many, the next row runs every depth, and its drafts
    /// are verified with it.
    pub drafts: DraftLimit,
}

/// Where a row exits with a draft.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DraftExit {
    /// At this depth, from 0.
    Static(u8),
    /// At the earliest depth where the signal passes the threshold. A row whose signal never does runs every depth.
    Signal {
        /// The exit signal.
        signal: ExitSignal,
        /// Threshold, in the signal's own unit.
        threshold: f32,
    },
}

/// A number of drafts that may follow the load: the number of requests that run or wait on the machine.
///
/// It is `calm` up to `low` requests and `busy` from `high` on, and linear between, rounded to the nearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftLimit {
    /// Drafts on a machine with few requests.
    pub calm: u8,
    /// Drafts on a machine with many requests.
    pub busy: u8,
    /// Requests up to which `calm` drafts are allowed.
    pub low: u32,
    /// Requests from which on `busy` drafts are allowed; above `low`.
    pub high: u32,
}

impl DraftLimit {
    /// A limit that no load changes.
    pub fn constant(drafts: u8) -> Self {
        Self { calm: drafts, busy: drafts, low: 0, high: 1 }
    }

    /// The limit when `load` requests run or wait.
    pub fn at(&self, load: u32) -> u32 {
        let share = f64::from(load.clamp(self.low, self.high) - self.low) / f64::from(self.high - self.low);
        (f64::from(self.calm) * (1.0 - share) + f64::from(self.busy) * share).round() as u32
    }
}

impl Speculation {
    /// Reads what follows `speculate:` in the name of an exit policy.
    pub(crate) fn parse(text: &str, parts: &[&str]) -> Result<Self, PolicyError> {
        let unreadable = || PolicyError::Speculation(text.to_owned());
        let (draft, limits) = match parts {
            ["static", depth, limits @ ..] => (DraftExit::Static(depth.parse().map_err(|_| unreadable())?), limits),
            [signal, threshold, limits @ ..] => {
                let signal = signal.parse().map_err(PolicyError::ExitSignal)?;
                let threshold = threshold.parse().ok().filter(|threshold: &f32| threshold.is_finite());
                (DraftExit::Signal { signal, threshold: threshold.ok_or_else(unreadable)? }, limits)
            }
            _ => return Err(unreadable()),
        };
        let drafts = match limits {
            [drafts] => DraftLimit::constant(drafts.parse().map_err(|_| unreadable())?),
            [drafts, loads] => {
                let (calm, busy) = range(drafts).ok_or_else(unreadable)?;
                let (low, high) = range(loads).ok_or_else(unreadable)?;
                DraftLimit { calm, busy, low, high }
            }
            _ => return Err(unreadable()),
        };
        if drafts.low >= drafts.high {
            return Err(unreadable());
        }
        Ok(Self { draft, drafts })
    }

    /// The depths at which rows exit with drafts, up to the last one.
    pub(crate) fn shallowest(&self) -> u8 {
        match self.draft {
            DraftExit::Static(depth) => depth,
            DraftExit::Signal { .. } => 0,
        }
    }

    /// The values of [`draft_value`](Self::draft_value) at which a row exits with a draft.
    pub(crate) fn bound(&self) -> SignalBound {
        match self.draft {
            DraftExit::Static(_) => SignalBound::at_least(1.0),
            DraftExit::Signal { signal, threshold } => signal.bound(threshold),
        }
    }

    /// What decides whether the last row of a segment exits with a draft, given its signal. Only decode rows do: the row
    /// that predicts the first token, and [those that verify](RowKind::Verify), run every depth.
    pub(crate) fn draft_value(&self, segment: &Segment, signal: f32) -> f32 {
        match self.draft {
            _ if segment.kind != RowKind::Decode => f32::NAN,
            DraftExit::Static(depth) => f32::from(u8::from(segment.depth >= depth)),
            DraftExit::Signal { .. } => signal,
        }
    }
}

/// Two numbers with `..` between.
fn range<T: std::str::FromStr>(text: &str) -> Option<(T, T)> {
    let (first, second) = text.split_once("..")?;
    Some((first.parse().ok()?, second.parse().ok()?))
}

impl fmt::Display for Speculation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.draft {
            DraftExit::Static(depth) => write!(f, "static:{depth}")?,
            DraftExit::Signal { signal, threshold } => write!(f, "{signal}:{threshold}")?,
        }
        let DraftLimit { calm, busy, low, high } = self.drafts;
        match calm == busy {
            true => write!(f, ":{calm}"),
            false => write!(f, ":{calm}..{busy}:{low}..{high}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_by_load_is_bounded_and_rounded_between() {
        let limit = DraftLimit { calm: 4, busy: 0, low: 8, high: 32 };
        assert_eq!([0, 8, 14, 20, 29, 32, u32::MAX].map(|load| limit.at(load)), [4, 4, 3, 2, 1, 0, 0]);
        assert_eq!([0, 1, 1000].map(|load| DraftLimit::constant(3).at(load)), [3, 3, 3]);
    }
}
