//! The requests of a simulation, which of their prompts begin alike, and which wait for the answers to others.

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use engine::Tokenizer;
use traces::{ClosedLoop, CountTokens, PrefixHashes, Request, RequestSource, RequestSpec, RequestTrace, TraceError};

use crate::reporter::Reporter;
use crate::serving::Serving;

/// What is served: requests that are held, or a [`RequestSource`].
#[derive(Clone, Debug)]
pub struct Workload<R = Vec<Request>> {
    /// In the order of their arrival.
    pub requests: R,
    /// Hashes of their prompts, for simulations and load clients; none without prefix caching or where nothing is known.
    pub prefixes: Option<Arc<PrefixHashes>>,
    /// Which requests are sent when others have been answered; none if each is sent at its arrival.
    pub closed_loop: Option<ClosedLoop>,
}

impl Workload {
    /// The requests of a trace, without their prefixes. Think times are drawn with `seed`.
    ///
    /// # Errors
    /// If keys of `spec` contradict each other, or the trace does not say when its sessions begin.
    pub fn of_trace(trace: &RequestTrace, spec: &RequestSpec, seed: u64) -> Result<Self> {
        let closed_loop = spec.closed_loop(trace, seed)?;
        Ok(Self { requests: trace.requests.clone(), prefixes: None, closed_loop })
    }

    /// The requests with this number of them in flight: the next one is sent when another one has been answered.
    pub fn in_flight(requests: Vec<Request>, number: NonZeroU32) -> Self {
        Self { requests, prefixes: None, closed_loop: Some(ClosedLoop::in_flight(number)) }
    }

    /// Requests that are each sent at their own arrival.
    pub fn open(requests: Vec<Request>, prefixes: Option<Arc<PrefixHashes>>) -> Self {
        Self { requests, prefixes, closed_loop: None }
    }

    /// The same with other random think times.
    pub fn with_seed(&self, seed: u64) -> Self {
        let mut other = self.clone();
        if let Some(users) = other.closed_loop.as_mut().and_then(|closed_loop| closed_loop.users.as_mut()) {
            users.seed = seed;
        }
        other
    }

    /// Reads or makes requests, hashed for the blocks of `serving` if it caches prefixes. Think times are drawn with
    /// `seed`.
    ///
    /// # Errors
    /// As [`load_requests`].
    pub fn load(
        spec: &RequestSpec,
        base: &Path,
        serving: &Serving,
        seed: u64,
        reporter: &mut dyn Reporter,
    ) -> Result<Self> {
        let spec = hashed_for(serving, spec);
        let trace = load_requests(&spec, base, reporter)?;
        Self::of(trace, &spec, serving, seed, reporter)
    }
}

impl Workload<RequestSource> {
    /// As [`Workload::load`], without holding many requests.
    ///
    /// # Errors
    /// As there.
    pub fn stream(
        spec: &RequestSpec,
        base: &Path,
        serving: &Serving,
        seed: u64,
        reporter: &mut dyn Reporter,
    ) -> Result<Self> {
        let spec = hashed_for(serving, spec);
        let trace = spec.open_with(base, &open_tokenizer)?;
        warn_of(&trace, reporter);
        Self::of(trace, &spec, serving, seed, reporter)
    }
}

impl<R> Workload<R> {
    fn of(
        trace: RequestTrace<R>,
        spec: &RequestSpec,
        serving: &Serving,
        seed: u64,
        reporter: &mut dyn Reporter,
    ) -> Result<Self> {
        let closed_loop = spec.closed_loop(&trace, seed)?;
        let RequestTrace { name, requests, prefix_hashes, .. } = trace;
        if serving.prefix_caching && prefix_hashes.is_none() {
            reporter.warning(&format!(
                "{name} says nothing of what prompts have in common: with prefix_caching, only preempted requests find \
                 keys and values again"
            ));
        }
        let prefixes = prefix_hashes.filter(|_| serving.prefix_caching).map(Arc::new);
        Ok(Self { requests, prefixes, closed_loop })
    }

    /// Whether requests are sent by users, at no rate of their own.
    pub fn has_users(&self) -> bool {
        self.closed_loop.as_ref().is_some_and(|closed_loop| closed_loop.users.is_some())
    }
}

/// The specification with hashes of the blocks that `serving` caches.
fn hashed_for(serving: &Serving, spec: &RequestSpec) -> RequestSpec {
    let of_file = (serving.prefix_caching && spec.file.is_some()).then_some(serving.block_tokens);
    RequestSpec { prefix_block_tokens: spec.prefix_block_tokens.or(of_file), ..spec.clone() }
}

/// Reads or makes requests, and says what of their file is not among them.
///
/// # Errors
/// If the file does not read or the specification contradicts itself.
pub fn load_requests(spec: &RequestSpec, base: &Path, reporter: &mut dyn Reporter) -> Result<RequestTrace> {
    let trace = spec.load_with(base, &open_tokenizer)?;
    warn_of(&trace, reporter);
    Ok(trace)
}

/// Says what of the file of a trace is not in it.
fn warn_of<R>(trace: &RequestTrace<R>, reporter: &mut dyn Reporter) {
    for warning in &trace.warnings {
        reporter.warning(&format!("{}: {warning}", trace.name));
    }
}

/// Reads or makes requests that are each sent at their own arrival, for validations.
///
/// # Errors
/// As [`load_requests`], and if there are users, or a request has no arrival of its own.
pub fn load_open_loop(spec: &RequestSpec, base: &Path, reporter: &mut dyn Reporter) -> Result<RequestTrace> {
    if spec.users.is_some() {
        let expected = "validation.in_flight (--in-flight), the requests in flight in its closed loop".to_owned();
        return Err(TraceError::Spec { key: "users", found: "it in a validation".to_owned(), expected }.into());
    }
    let trace = load_requests(spec, base, reporter)?;
    let Some(sessions) = trace.sessions.as_ref().filter(|sessions| sessions.num_following() > 0) else {
        return Ok(trace);
    };
    ensure!(
        sessions.is_timed(),
        "{}: {} requests have no arrival time but follow the answer to another one: expected arrivals, for a validation",
        trace.name,
        sessions.num_following()
    );
    reporter.warning(&format!(
        "{}: sessions are not followed in a validation: each request is sent at its own arrival",
        trace.name
    ));
    Ok(trace)
}

/// Opens a tokenizer for traces of texts.
fn open_tokenizer(path: &Path) -> Result<Box<dyn CountTokens>, String> {
    match Tokenizer::load(path) {
        Ok(tokenizer) => Ok(Box::new(TextTokens(tokenizer))),
        Err(error) => Err(error.to_string()),
    }
}

/// A tokenizer that counts.
#[derive(Debug)]
struct TextTokens(Tokenizer);

impl CountTokens for TextTokens {
    fn count(&self, text: &str) -> Result<usize, String> {
        self.0.encode(text).map(|ids| ids.len()).map_err(|error| error.to_string())
    }
}
