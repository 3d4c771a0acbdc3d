//! Request traces: arrival, prompt length and output length of each request.

use std::hash::{DefaultHasher, Hasher};

use crate::error::{Result, TraceError};
use crate::hash::mix;
use crate::sessions::{Link, Sessions};
use crate::units::Nanos;

/// One request of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Index in the trace, from 0; identifies the request in every output.
    pub id: u32,
    /// Arrival, since the start of the trace.
    pub arrival: Nanos,
    /// Length of the prompt in tokens, at least 1.
    pub prompt_tokens: u32,
    /// Number of tokens to generate, at least 1; generation ends exactly there.
    pub output_tokens: u32,
}

impl Request {
    /// Longest prompt or output in files and generators, so that sums of two do not overflow.
    pub const MAX_TOKENS: u32 = 1 << 30;
    /// Latest arrival in files and generators: a century, so that sums of times do not overflow.
    pub const MAX_ARRIVAL: Nanos = Nanos(100 * 365 * 86_400 * 1_000_000_000);

    /// Number of tokens with keys and values when the last token exits: the last token itself is never an input.
    pub fn context_tokens(&self) -> u32 {
        self.prompt_tokens + self.output_tokens - 1
    }

    /// The same with at most these numbers of tokens; at least 1 remains.
    pub(crate) fn clipped(self, max_prompt_tokens: u32, max_output_tokens: u32) -> Self {
        let prompt_tokens = self.prompt_tokens.min(max_prompt_tokens).max(1);
        let output_tokens = self.output_tokens.min(max_output_tokens).max(1);
        Self { prompt_tokens, output_tokens, ..self }
    }

    /// The same requests, all of which arrive at time 0.
    pub fn at_once(requests: &[Self]) -> Vec<Self> {
        requests.iter().map(|&request| Self { arrival: Nanos::ZERO, ..request }).collect()
    }
}

/// Requests in order of arrival: held, or a [`RequestSource`](crate::RequestSource).
#[derive(Clone, Debug, PartialEq)]
pub struct RequestTrace<R = Vec<Request>> {
    /// Name for readers: the file's name without its extension, or `generated`.
    pub name: String,
    /// The requests by arrival; the `id` of each is its index here.
    pub requests: R,
    /// Which prompts have common prefixes, where the file contains that.
    pub prefix_hashes: Option<PrefixHashes>,
    /// Which requests belong together and wait for each other's answers, where the file contains that.
    pub sessions: Option<Sessions>,
    /// Omissions and assumptions of the reader: one sentence each.
    pub warnings: Vec<String>,
}

impl RequestTrace {
    /// A trace of requests in order of arrival, without prefix hashes and sessions.
    pub fn new(name: impl Into<String>, requests: Vec<Request>) -> Self {
        Self { name: name.into(), requests, prefix_hashes: None, sessions: None, warnings: Vec::new() }
    }

    /// A trace of requests in any order; see [`Self::sorted`]. Arrivals that are dates, as times since 1970, are shifted
    /// so that the first is 0.
    pub(crate) fn from_unsorted(name: String, requests: Vec<Request>, prefix_hashes: Option<PrefixHashes>) -> Self {
        Self { prefix_hashes, ..Self::new(name, requests) }.settled()
    }

    /// Sorts requests by arrival, and lets dates count from the first of them.
    pub(crate) fn settled(self) -> Self {
        let trace = self.sorted();
        let is_date = trace.first_arrival() >= YEAR_2000;
        if is_date { trace.counted_from_first() } else { trace }
    }

    /// Sorts requests by arrival (requests that arrive together keep their order) and numbers them.
    pub(crate) fn sorted(self) -> Self {
        let mut order: Vec<usize> = (0..self.requests.len()).collect();
        order.sort_by_key(|&index| self.requests[index].arrival);
        self.select(order)
    }

    /// Shifts arrivals so that the first is 0.
    pub(crate) fn counted_from_first(mut self) -> Self {
        let first = self.first_arrival();
        self.requests.iter_mut().for_each(|request| request.arrival = request.arrival - first);
        self
    }

    /// Arrival of the first request, from which the times of windows count.
    pub fn first_arrival(&self) -> Nanos {
        self.requests.first().map_or(Nanos::ZERO, |request| request.arrival)
    }

    /// The requests at these indices, in this order, renumbered.
    fn select(mut self, places: impl IntoIterator<Item = usize> + Clone) -> Self {
        let moved = places.clone().into_iter().map(|place| self.requests[place]);
        self.requests = (0..).zip(moved).map(|(id, request)| Request { id, ..request }).collect();
        self.prefix_hashes = self.prefix_hashes.map(|hashes| {
            let mut selected = PrefixHashes::new(hashes.block_tokens);
            places.clone().into_iter().for_each(|place| selected.push(hashes.of(place as u32).iter().copied()));
            selected
        });
        self.sessions = self.sessions.map(|sessions| sessions.select(places));
        self
    }

    /// Puts requests whose arrival is not known at the earliest time possible, and sorts all anew.
    fn at_earliest(mut self) -> Self {
        let Some(sessions) = self.sessions.as_ref().filter(|sessions| !sessions.is_timed()) else { return self };
        let mut latest = vec![Nanos::ZERO; sessions.count()];
        for (request, &Link { session, think, is_timed }) in self.requests.iter_mut().zip(sessions.links()) {
            let Some(session) = session else { continue };
            if let Some(think) = think.filter(|_| !is_timed) {
                request.arrival = (latest[session as usize] + think).min(Request::MAX_ARRIVAL);
            }
            latest[session as usize] = request.arrival;
        }
        self.sorted()
    }

    /// All requests of several traces by arrival, each counted from its own time 0. Hashes of different traces are
    /// different, and so are sessions.
    ///
    /// # Errors
    /// If some traces have prefix hashes and others have none, or blocks of another size.
    pub fn merge(name: impl Into<String>, traces: Vec<Self>) -> Result<Self> {
        let blocks: Vec<Option<u32>> =
            traces.iter().map(|trace| trace.prefix_hashes.as_ref().map(|hashes| hashes.block_tokens)).collect();
        if let Some(other) = blocks.iter().position(|tokens| *tokens != blocks[0]) {
            let describe = |place: usize| match blocks[place] {
                Some(tokens) => format!("{} with prefix hashes of blocks of {tokens} tokens", traces[place].name),
                None => format!("{} without prefix hashes", traces[place].name),
            };
            let found = format!("{} and {}", describe(0), describe(other));
            return Err(TraceError::spec("merge", found, "prefix hashes of one block size in all traces, or in none"));
        }
        let has_sessions = traces.iter().any(|trace| trace.sessions.is_some());
        let is_one = traces.len() == 1;
        let mut merged = Self::new(name, Vec::new());
        let mut hashes = blocks.first().copied().flatten().map(PrefixHashes::new);
        let (mut links, mut first_session) = (Vec::new(), 0);
        for (number, trace) in traces.into_iter().enumerate() {
            let own = |hash: u64| if is_one { hash } else { mix(hash ^ mix(number as u64)) };
            for request in &trace.requests {
                if let (Some(hashes), Some(found)) = (&mut hashes, &trace.prefix_hashes) {
                    hashes.push(found.of(request.id).iter().map(|&hash| own(hash)));
                }
                let link = trace.sessions.as_ref().map_or(Link::ALONE, |sessions| sessions.of(request.id));
                links.push(Link { session: link.session.map(|session| session + first_session), ..link });
            }
            first_session += trace.sessions.as_ref().map_or(0, Sessions::count) as u32;
            merged.requests.extend(trace.requests);
            merged.warnings.extend(trace.warnings.into_iter().map(|warning| format!("{}: {warning}", trace.name)));
        }
        merged.prefix_hashes = hashes;
        merged.sessions = has_sessions.then(|| Sessions::new(links));
        Ok(merged.sorted())
    }

    /// The first `count` requests.
    pub fn first(self, count: usize) -> Self {
        let count = count.min(self.requests.len());
        self.select(0..count)
    }

    /// The requests that arrive from `from` after the first arrival until just before `to` after it; `from` becomes
    /// time 0.
    pub fn window(self, from: Nanos, to: Nanos) -> Self {
        let first = self.first_arrival();
        let after = |time: Nanos| Nanos(time.0.saturating_add(first.0));
        let (from, to) = (after(from), after(to));
        let before = |time: Nanos| self.requests.partition_point(|request| request.arrival < time);
        let places = before(from)..before(to).max(before(from));
        let mut trace = self.select(places);
        trace.requests.iter_mut().for_each(|request| request.arrival = request.arrival - from);
        trace
    }

    /// Requests per second between the first and the last arrival; `None` if all arrive at once.
    pub fn rate_per_s(&self) -> Option<f64> {
        self.span().rate_per_s()
    }

    pub(crate) fn span(&self) -> Span {
        let last = self.requests.last().map_or(Nanos::ZERO, |request| request.arrival);
        Span { count: self.requests.len(), first: self.first_arrival(), last }
    }

    /// Makes requests arrive `factor` times as fast, in the same pattern. The first arrival does not change, and think
    /// times do not either.
    ///
    /// # Errors
    /// If the factor is not a positive number, or so small that arrivals exceed [`Request::MAX_ARRIVAL`].
    pub fn scale_rate(self, factor: f64) -> Result<Self> {
        let scale = Scale::by(factor, self.span())?;
        Ok(self.scaled(scale))
    }

    /// Makes requests arrive at a mean rate (see [`Self::rate_per_s`]), in the same pattern. The first arrival does not
    /// change.
    ///
    /// # Errors
    /// If the rate is not a positive number, or so small that arrivals exceed [`Request::MAX_ARRIVAL`], or if all
    /// requests arrive at once.
    pub fn scale_to_rate(self, rate_per_s: f64) -> Result<Self> {
        let scale = Scale::to(rate_per_s, self.span())?;
        Ok(self.scaled(scale))
    }

    pub(crate) fn scaled(mut self, scale: Scale) -> Self {
        self.requests.iter_mut().for_each(|request| request.arrival = scale.of(request.arrival));
        self.at_earliest()
    }

    /// Cuts prompts and outputs to at most these numbers of tokens; at least 1 remains.
    pub fn clip_lengths(mut self, max_prompt_tokens: u32, max_output_tokens: u32) -> Self {
        for request in &mut self.requests {
            *request = request.clipped(max_prompt_tokens, max_output_tokens);
        }
        self.prefix_hashes = self.prefix_hashes.map(|hashes| {
            let mut clipped = PrefixHashes::new(hashes.block_tokens);
            for request in &self.requests {
                let blocks = (request.prompt_tokens / hashes.block_tokens) as usize;
                clipped.push(hashes.of(request.id).iter().copied().take(blocks));
            }
            clipped
        });
        self
    }
}

/// Arrivals of requests: how many, the first and the last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub count: usize,
    pub first: Nanos,
    pub last: Nanos,
}

impl Span {
    fn rate_per_s(self) -> Option<f64> {
        let span = self.last - self.first;
        (span > Nanos::ZERO).then(|| (self.count - 1) as f64 / span.as_secs_f64())
    }
}

/// Arrivals at another rate, in the same pattern, which keeps the first of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scale {
    first: Nanos,
    factor: f64,
}

impl Scale {
    /// Arrivals this many times as fast; see [`RequestTrace::scale_rate`].
    pub fn by(factor: f64, span: Span) -> Result<Self> {
        let scale = if factor.is_finite() && factor > 0.0 { Self::within(factor, span) } else { None };
        let expected = "a positive factor that keeps arrivals within a century";
        scale.ok_or_else(|| TraceError::spec("rate_factor", factor, expected))
    }

    /// Arrivals at a mean rate; see [`RequestTrace::scale_to_rate`].
    pub fn to(rate_per_s: f64, span: Span) -> Result<Self> {
        let wrong = |expected: &str| TraceError::spec("rate_per_s", rate_per_s, expected);
        if !(rate_per_s.is_finite() && rate_per_s > 0.0) {
            return Err(wrong("a positive number of requests per second"));
        }
        let rate = span.rate_per_s().ok_or_else(|| wrong("a trace whose requests do not all arrive at once"))?;
        Self::within(rate_per_s / rate, span).ok_or_else(|| wrong("a rate that keeps arrivals within a century"))
    }

    /// `None` if the last arrival would exceed [`Request::MAX_ARRIVAL`].
    fn within(factor: f64, Span { first, last, .. }: Span) -> Option<Self> {
        let is_early = |since: f64| since <= (Request::MAX_ARRIVAL - first).0 as f64;
        is_early((last - first).0 as f64 / factor).then_some(Self { first, factor })
    }

    /// Where an arrival moves.
    pub fn of(self, arrival: Nanos) -> Nanos {
        Nanos(self.first.0 + ((arrival - self.first).0 as f64 / self.factor).round() as u64)
    }
}

/// Time from 1970 to 2000. A later arrival is a date rather than a time since the start of a trace.
pub(crate) const YEAR_2000: Nanos = Nanos(946_684_800 * 1_000_000_000);

/// For each prompt, a hash of each full block of its tokens together with all tokens before it.
///
/// Two prompts with equal hashes at block `k` share their first `(k + 1) * block_tokens` tokens. A partial last block
/// has no hash: caches share full blocks only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixHashes {
    /// Tokens per block.
    pub block_tokens: u32,
    /// Hashes of request `i` are `hashes[starts[i]..starts[i + 1]]`.
    starts: Vec<usize>,
    hashes: Vec<u64>,
}

impl PrefixHashes {
    /// Hashes without requests.
    pub fn new(block_tokens: u32) -> Self {
        Self { block_tokens, starts: vec![0], hashes: Vec::new() }
    }

    /// For each whole block of a prompt, a hash (SipHash) of all its tokens up to the end of the block.
    pub fn of_tokens<T: Copy + Into<u64>>(prompt: &[T], block_tokens: u32) -> Vec<u64> {
        let mut prefix = DefaultHasher::new();
        let hash = |block: &[T]| {
            block.iter().for_each(|&token| prefix.write_u64(token.into()));
            prefix.finish()
        };
        prompt.chunks_exact(block_tokens as usize).map(hash).collect()
    }

    /// Appends the hashes of the next request.
    pub fn push(&mut self, hashes: impl IntoIterator<Item = u64>) {
        self.hashes.extend(hashes);
        self.starts.push(self.hashes.len());
    }

    /// Number of requests.
    pub fn num_requests(&self) -> usize {
        self.starts.len() - 1
    }

    /// The hashes of a request, block by block; empty for a request that was not pushed.
    pub fn of(&self, request: u32) -> &[u64] {
        match self.starts.get(request as usize..) {
            Some(&[start, end, ..]) => &self.hashes[start..end],
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Arrivals in seconds; request `i` has `10 * (i + 1)` prompt tokens in blocks of 10, hashed `100 * i + block`.
    fn trace(arrivals: &[u64]) -> RequestTrace {
        let mut hashes = PrefixHashes::new(10);
        let mut requests = Vec::new();
        for (place, &seconds) in arrivals.iter().enumerate() {
            let arrival = Nanos(seconds * 1_000_000_000);
            requests.push(Request { id: 0, arrival, prompt_tokens: 10 * (place as u32 + 1), output_tokens: 5 });
            hashes.push((0..=place as u64).map(|block| 100 * place as u64 + block));
        }
        RequestTrace::from_unsorted("test".into(), requests, Some(hashes))
    }

    fn seconds(trace: &RequestTrace) -> Vec<f64> {
        trace.requests.iter().map(|request| request.arrival.as_secs_f64()).collect()
    }

    #[test]
    fn requests_are_ordered_by_arrival_and_ties_stay_in_order() {
        let trace = trace(&[3, 1, 3, 0]);
        assert_eq!(seconds(&trace), [0.0, 1.0, 3.0, 3.0]);
        assert_eq!(trace.requests.iter().map(|request| request.prompt_tokens).collect::<Vec<_>>(), [40, 20, 10, 30]);
        assert_eq!(trace.requests.iter().map(|request| request.id).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(trace.prefix_hashes.unwrap().of(3), [200, 201, 202]);
    }

    #[test]
    fn a_block_of_tokens_has_another_hash_after_other_tokens() {
        let hashes = |tokens: &[u32]| PrefixHashes::of_tokens(tokens, 2);
        assert_ne!(hashes(&[1, 2, 7, 7])[1], hashes(&[3, 4, 7, 7])[1]);
        assert_eq!(hashes(&[1, 2, 7, 7])[0], hashes(&[1, 2, 8])[0]);
        assert_eq!(hashes(&[1, 2, 8]).len(), 1, "a partial block has none");
    }

    #[test]
    fn a_window_keeps_what_arrives_in_it_and_starts_at_zero() {
        let trace = trace(&[0, 10, 20, 30]).window(Nanos::from_secs_f64(10.0), Nanos::from_secs_f64(30.0));
        assert_eq!(seconds(&trace), [0.0, 10.0]);
        assert_eq!(trace.requests[1].id, 1);
        assert_eq!(trace.prefix_hashes.as_ref().unwrap().of(0), [100, 101]);
        assert_eq!(trace.window(Nanos(5), Nanos(3)).requests, []);
    }

    #[test]
    fn a_window_counts_from_the_first_arrival() {
        let late = trace(&[3600, 3610, 3620]).window(Nanos::ZERO, Nanos::from_secs_f64(15.0));
        assert_eq!(seconds(&late), [0.0, 10.0]);
        assert_eq!(seconds(&trace(&[3600, 3610]).window(Nanos(1), Nanos::MAX)), [9.999_999_999]);
    }

    #[test]
    fn arrivals_that_are_dates_count_from_the_first() {
        assert_eq!(seconds(&trace(&[1_700_000_000, 1_700_000_003])), [0.0, 3.0]);
        assert_eq!(seconds(&trace(&[900_000_000, 900_000_003])), [9e8, 9e8 + 3.0]);
    }

    #[test]
    fn first_takes_no_more_than_there_are() {
        assert_eq!(trace(&[0, 1, 2]).first(2).requests.len(), 2);
        assert_eq!(trace(&[0, 1, 2]).first(9), trace(&[0, 1, 2]));
    }

    #[test]
    fn scaling_keeps_the_pattern() {
        assert_eq!(seconds(&trace(&[0, 1, 4]).scale_rate(2.0).unwrap()), [0.0, 0.5, 2.0]);
        let scaled = trace(&[2, 4, 10]).scale_to_rate(4.0).unwrap();
        assert_eq!(seconds(&scaled), [2.0, 2.125, 2.5], "from the first arrival on");
        assert!((scaled.rate_per_s().unwrap() - 4.0).abs() < 1e-9);
    }

    #[test]
    fn a_late_start_does_not_keep_a_trace_from_being_slowed_down() {
        let late = trace(&[900_000_000, 900_000_100]);
        assert_eq!(seconds(&late.scale_rate(0.25).unwrap()), [9e8, 9e8 + 400.0]);
    }

    #[test]
    fn a_rate_that_cannot_be_reached_is_an_error() {
        assert!(trace(&[5, 5]).scale_to_rate(1.0).is_err());
        let error = trace(&[0, 1]).scale_to_rate(1e-300).unwrap_err().to_string();
        assert!(error.starts_with("requests: rate_per_s: found 0.000"), "the key that was given: {error}");
        for factor in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-300] {
            assert!(trace(&[0, 1]).scale_rate(factor).is_err(), "{factor}");
            assert!(trace(&[0, 1]).scale_to_rate(factor).is_err(), "{factor}");
        }
    }

    #[test]
    fn clipped_prompts_keep_the_hashes_of_their_whole_blocks() {
        let trace = trace(&[0, 1, 2]).clip_lengths(25, 3);
        assert_eq!(trace.requests.iter().map(|request| request.prompt_tokens).collect::<Vec<_>>(), [10, 20, 25]);
        assert!(trace.requests.iter().all(|request| request.output_tokens == 3));
        assert_eq!(trace.prefix_hashes.unwrap().of(2), [200, 201]);
    }
}
