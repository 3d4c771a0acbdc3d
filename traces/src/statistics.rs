//! What a request trace is like: counts, lengths, rates, burstiness, prefixes that are shared, sessions.

use std::collections::HashSet;

use crate::request::{Request, RequestTrace};
use crate::units::Nanos;

/// Statistics of a request trace.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceStatistics {
    /// Number of requests.
    pub requests: usize,
    /// Time from the first to the last arrival.
    pub span: Nanos,
    /// Requests per second between them; `None` if all arrive at once.
    pub rate_per_s: Option<f64>,
    /// Coefficient of variation of the times between arrivals: 1 of a Poisson process; `None` if all arrive at once.
    pub gap_cv: Option<f64>,
    /// Most arrivals in one of the windows of this length that follow each other from the first arrival on, per second.
    pub peaks: Vec<Peak>,
    /// Lengths of prompts.
    pub prompts: LengthStatistics,
    /// Lengths of outputs.
    pub outputs: LengthStatistics,
    /// Prefixes that prompts share, where the trace has hashes.
    pub prefixes: Option<PrefixStatistics>,
    /// Sessions, where the trace has them.
    pub sessions: Option<SessionStatistics>,
}

/// The busiest window of a trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// Length of the window.
    pub window: Nanos,
    /// Arrivals in it, per second.
    pub rate_per_s: f64,
}

/// Lengths of prompts or outputs, in tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct LengthStatistics {
    /// Of all requests together.
    pub total: u64,
    /// Mean.
    pub mean: f64,
    /// The shortest, the quantiles of [`Self::QUANTILES`], and the longest.
    pub quantiles: [u32; 7],
    /// Number of requests of 1 token, of 2 or 3, of 4 to 7, and so on; the last one is not 0.
    pub by_power: Vec<usize>,
}

impl LengthStatistics {
    /// Shares of requests that are at most as long as a quantile.
    pub const QUANTILES: [f64; 7] = [0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0];

    fn new(lengths: impl Iterator<Item = u32>) -> Self {
        let mut lengths: Vec<u32> = lengths.collect();
        lengths.sort_unstable();
        let total = lengths.iter().map(|&tokens| u64::from(tokens)).sum();
        let mut by_power = Vec::new();
        for &tokens in &lengths {
            let power = tokens.max(1).ilog2() as usize;
            by_power.resize(by_power.len().max(power + 1), 0);
            by_power[power] += 1;
        }
        let quantiles = Self::QUANTILES.map(|share| quantile(&lengths, share).unwrap_or(0));
        Self { total, mean: total as f64 / lengths.len() as f64, quantiles, by_power }
    }
}

/// What prompts have in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrefixStatistics {
    /// Tokens per block of hashes.
    pub block_tokens: u32,
    /// Number of whole blocks of all prompts.
    pub blocks: u64,
    /// Blocks that an earlier prompt had as well: what a cache without limits would find.
    pub repeated: u64,
    /// Share of all prompt tokens that is in them.
    pub token_share: f64,
}

/// How requests belong together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SessionStatistics {
    /// Number of sessions.
    pub sessions: usize,
    /// Requests that belong to one.
    pub requests: usize,
    /// Requests of the longest one.
    pub longest: usize,
    /// Requests that are sent so long after the answer before.
    pub following: usize,
    /// Requests whose arrival is not known.
    pub without_arrival: usize,
    /// Median and mean of the times from an answer to the next request.
    pub think: Option<(Nanos, Nanos)>,
}

/// The smallest value that a share of the sorted values does not exceed.
fn quantile<T: Copy>(sorted: &[T], share: f64) -> Option<T> {
    let place = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(place.max(1) - 1).copied()
}

impl RequestTrace {
    /// Statistics of the trace, which has at least one request.
    pub fn statistics(&self) -> TraceStatistics {
        let arrivals: Vec<Nanos> = self.requests.iter().map(|request| request.arrival).collect();
        let span = arrivals.last().zip(arrivals.first()).map_or(Nanos::ZERO, |(&last, &first)| last - first);
        TraceStatistics {
            requests: self.requests.len(),
            span,
            rate_per_s: self.rate_per_s(),
            gap_cv: gap_cv(&arrivals),
            peaks: [1, 60, 3600].into_iter().filter_map(|seconds| peak(&arrivals, span, seconds)).collect(),
            prompts: LengthStatistics::new(self.requests.iter().map(|request| request.prompt_tokens)),
            outputs: LengthStatistics::new(self.requests.iter().map(|request| request.output_tokens)),
            prefixes: self.prefix_statistics(),
            sessions: self.session_statistics(),
        }
    }

    /// Number of arrivals in each of `parts` equal parts of the time from the first to the last arrival.
    pub fn arrivals_by_part(&self, parts: usize) -> Vec<usize> {
        let mut counts = vec![0; parts];
        let (first, last) = (self.first_arrival(), self.requests.last().map_or(Nanos::ZERO, |last| last.arrival));
        let span = u128::from((last - first).0).max(1);
        for request in &self.requests {
            let part = u128::from((request.arrival - first).0) * parts as u128 / span;
            counts[(part as usize).min(parts - 1)] += 1;
        }
        counts
    }

    fn prefix_statistics(&self) -> Option<PrefixStatistics> {
        let hashes = self.prefix_hashes.as_ref()?;
        let (mut seen, mut blocks, mut repeated) = (HashSet::new(), 0, 0);
        for &Request { id, .. } in &self.requests {
            for &hash in hashes.of(id) {
                blocks += 1;
                repeated += u64::from(!seen.insert(hash));
            }
        }
        let tokens: u64 = self.requests.iter().map(|request| u64::from(request.prompt_tokens)).sum();
        let token_share = (repeated * u64::from(hashes.block_tokens)) as f64 / tokens as f64;
        Some(PrefixStatistics { block_tokens: hashes.block_tokens, blocks, repeated, token_share })
    }

    fn session_statistics(&self) -> Option<SessionStatistics> {
        let sessions = self.sessions.as_ref()?;
        let mut lengths = vec![0; sessions.count()];
        let mut thinks: Vec<Nanos> = Vec::new();
        for link in sessions.links() {
            if let Some(session) = link.session {
                lengths[session as usize] += 1;
            }
            thinks.extend(link.think);
        }
        thinks.sort_unstable();
        let sum: u128 = thinks.iter().map(|think| u128::from(think.0)).sum();
        let mean = Nanos((sum / thinks.len().max(1) as u128) as u64);
        Some(SessionStatistics {
            sessions: sessions.count(),
            requests: lengths.iter().sum(),
            longest: lengths.into_iter().max().unwrap_or(0),
            following: sessions.num_following(),
            without_arrival: sessions.links().iter().filter(|link| !link.is_timed).count(),
            think: quantile(&thinks, 0.5).map(|median| (median, mean)),
        })
    }
}

/// Coefficient of variation of the times between arrivals.
fn gap_cv(arrivals: &[Nanos]) -> Option<f64> {
    let gaps = || arrivals.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64());
    let count = gaps().count() as f64;
    let mean = gaps().sum::<f64>() / count;
    let variance = gaps().map(|gap| (gap - mean).powi(2)).sum::<f64>() / count;
    (mean > 0.0).then(|| variance.sqrt() / mean)
}

/// The busiest window of so many seconds; `None` if the trace does not fill two of them.
fn peak(arrivals: &[Nanos], span: Nanos, seconds: u64) -> Option<Peak> {
    let window = Nanos(seconds * 1_000_000_000);
    if span.0 < 2 * window.0 {
        return None;
    }
    let first = arrivals.first()?.0;
    let windows = arrivals.chunk_by(|a, b| (a.0 - first) / window.0 == (b.0 - first) / window.0);
    let most = windows.map(<[Nanos]>::len).max()?;
    Some(Peak { window, rate_per_s: most as f64 / seconds as f64 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::PrefixHashes;
    use crate::sessions::{Link, Sessions};

    fn trace(rows: &[(f64, u32, u32)]) -> RequestTrace {
        let request = |(id, &(seconds, prompt_tokens, output_tokens)): (u32, &(f64, u32, u32))| Request {
            id,
            arrival: Nanos::from_secs_f64(seconds),
            prompt_tokens,
            output_tokens,
        };
        RequestTrace::new("test", (0..).zip(rows).map(request).collect())
    }

    #[test]
    fn counts_lengths_and_rates_are_those_of_the_requests() {
        let found = trace(&[(0.0, 1, 8), (0.5, 2, 8), (0.75, 3, 8), (4.0, 4, 8)]).statistics();
        assert_eq!((found.requests, found.span, found.rate_per_s), (4, Nanos(4_000_000_000), Some(0.75)));
        assert_eq!((found.prompts.total, found.prompts.mean), (10, 2.5));
        assert_eq!(found.prompts.quantiles, [1, 1, 2, 3, 4, 4, 4]);
        assert_eq!(found.prompts.by_power, [1, 2, 1]);
        assert_eq!(found.outputs.by_power, [0, 0, 0, 4]);
        assert_eq!(found.peaks, [Peak { window: Nanos(1_000_000_000), rate_per_s: 3.0 }]);
        let gaps = [0.5, 0.25, 3.25_f64];
        let mean = 4.0 / 3.0;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / 3.0;
        assert!((found.gap_cv.unwrap() - variance.sqrt() / mean).abs() < 1e-12);
        assert!(found.prefixes.is_none() && found.sessions.is_none());
        let at_once = trace(&[(3.0, 1, 1), (3.0, 1, 1)]).statistics();
        assert_eq!((at_once.rate_per_s, at_once.gap_cv, at_once.peaks), (None, None, Vec::new()));
        assert_eq!(trace(&[(3.0, 7, 1)]).statistics().prompts.quantiles, [7; 7]);
    }

    #[test]
    fn arrivals_are_counted_by_equal_parts_of_time() {
        let found = trace(&[(10.0, 1, 1), (10.9, 1, 1), (11.0, 1, 1), (13.0, 1, 1), (14.0, 1, 1)]);
        assert_eq!(found.arrivals_by_part(4), [2, 1, 0, 2]);
        assert_eq!(trace(&[(1.0, 1, 1), (1.0, 1, 1)]).arrivals_by_part(3), [2, 0, 0]);
    }

    #[test]
    fn a_block_is_repeated_if_an_earlier_prompt_had_it() {
        let mut found = trace(&[(0.0, 10, 1), (1.0, 9, 1), (2.0, 5, 1)]);
        let mut hashes = PrefixHashes::new(4);
        hashes.push([1, 2]);
        hashes.push([1, 3]);
        hashes.push([1]);
        found.prefix_hashes = Some(hashes);
        let expected = PrefixStatistics { block_tokens: 4, blocks: 5, repeated: 2, token_share: 8.0 / 24.0 };
        assert_eq!(found.statistics().prefixes, Some(expected));
    }

    #[test]
    fn sessions_are_counted_with_their_think_times() {
        let mut found = trace(&[(0.0, 1, 1), (0.0, 1, 1), (1.0, 1, 1), (3.0, 1, 1)]);
        let link = |session, think: Option<u64>| Link {
            session: Some(session),
            think: think.map(Nanos),
            is_timed: think.is_none(),
        };
        found.sessions = Some(Sessions::new([link(0, None), Link::ALONE, link(0, Some(10)), link(0, Some(20))]));
        let expected = SessionStatistics {
            sessions: 1,
            requests: 3,
            longest: 3,
            following: 2,
            without_arrival: 2,
            think: Some((Nanos(10), Nanos(15))),
        };
        assert_eq!(found.statistics().sessions, Some(expected));
    }
}
