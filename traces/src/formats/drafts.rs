//! Requests as a file lists them, in sessions, before their arrivals are settled.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::{TIME, name_of};
use crate::error::{Result, TraceError};
use crate::request::{PrefixHashes, Request, RequestTrace};
use crate::sessions::{Link, Sessions};
use crate::units::Nanos;

/// A request of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draft {
    /// Line, for errors; 0 where a file has no lines.
    pub line: u64,
    /// Its arrival, if the file has one.
    pub time: Option<Nanos>,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
    /// Number of its session, from [`Drafts::session`].
    pub session: Option<u32>,
    /// Time from the answer before it in its session.
    pub think: Option<Nanos>,
}

/// The requests of a file in its order.
pub(super) struct Drafts {
    path: PathBuf,
    /// Column or key of the times, for errors.
    time_key: &'static str,
    drafts: Vec<Draft>,
    names: HashMap<String, u32>,
    /// Requests that were left out since the last one of their session.
    carried: HashMap<u32, Carried>,
    /// Sessions that have requests.
    begun: HashSet<u32>,
}

/// What requests that were left out mean for the next one of their session.
#[derive(Clone, Copy, Debug, Default)]
struct Carried {
    /// Arrival of the last of them, if the file has it.
    time: Option<Nanos>,
    /// Their think times.
    think: Nanos,
}

impl Drafts {
    pub fn new(path: &Path, time_key: &'static str) -> Self {
        let (path, names, carried) = (path.to_owned(), HashMap::new(), HashMap::new());
        Self { path, time_key, drafts: Vec::new(), names, carried, begun: HashSet::new() }
    }

    /// Whether a session of this name has been seen.
    pub fn knows(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// The number of the session of a name.
    pub fn session(&mut self, name: &str) -> u32 {
        if let Some(&number) = self.names.get(name) {
            return number;
        }
        let next = self.names.len() as u32;
        self.names.insert(name.to_owned(), next);
        next
    }

    /// Lets another name mean the same session.
    pub fn same_session(&mut self, name: String, session: u32) {
        self.names.insert(name, session);
    }

    pub fn push(&mut self, mut draft: Draft) {
        if let Some(session) = draft.session {
            let Carried { time, think } = self.carried.remove(&session).unwrap_or_default();
            let is_first = self.begun.insert(session);
            let sum = |a: Nanos, b: Nanos| (a + b).min(Request::MAX_ARRIVAL);
            if is_first && draft.time.is_none() {
                draft.time = time.map(|time| sum(time, draft.think.unwrap_or_default()));
            } else if think > Nanos::ZERO {
                draft.think = Some(sum(draft.think.unwrap_or_default(), think));
            }
        }
        self.drafts.push(draft);
    }

    /// Leaves a request out: the next one of its session waits for its think time as well, or begins in its place.
    pub fn leave_out(&mut self, session: Option<u32>, time: Option<Nanos>, think: Option<Nanos>) {
        let Some(session) = session else { return };
        let carried = self.carried.entry(session).or_default();
        carried.time = time.or(carried.time);
        carried.think = (carried.think + think.unwrap_or_default()).min(Request::MAX_ARRIVAL);
    }

    /// The trace. Requests without a time of their own get the earliest possible.
    ///
    /// # Errors
    /// If a request of a session arrives before the one that it waits for, or some sessions have a beginning and others
    /// none.
    pub fn into_trace(self, prefix_hashes: Option<PrefixHashes>, warnings: Vec<String>) -> Result<RequestTrace> {
        let Self { path, time_key, drafts, .. } = self;
        let wrong = |line, found: String, expected: &str| TraceError::Value {
            path: path.clone(),
            line,
            column: time_key.to_owned(),
            found,
            expected: expected.to_owned(),
        };
        let mut latest: HashMap<u32, Nanos> = HashMap::new();
        let (mut requests, mut links) = (Vec::with_capacity(drafts.len()), Vec::new());
        let mut starts = [None; 2];
        for draft in &drafts {
            let Draft { line, time, prompt_tokens, output_tokens, session, think } = *draft;
            let before = session.and_then(|session| latest.get(&session).copied());
            let arrival = match (time, before) {
                (Some(time), Some(before)) if think.is_some() && time < before => {
                    let found = format!("`{} s`", time.as_secs_f64());
                    return Err(wrong(line, found, "a time after that of the request before it in its session"));
                }
                (Some(time), _) => time,
                (None, Some(before)) => before + think.unwrap_or_default(),
                (None, None) => Nanos::ZERO,
            };
            if arrival > Request::MAX_ARRIVAL {
                return Err(wrong(line, format!("`{} s`", arrival.as_secs_f64()), TIME));
            }
            if before.is_none() {
                starts[usize::from(time.is_some())].get_or_insert(line);
            }
            if let Some(session) = session {
                latest.insert(session, arrival);
            }
            // Without a time, a request can only wait for the one before it.
            let think = think.or((time.is_none() && before.is_some()).then_some(Nanos::ZERO));
            requests.push(Request { id: 0, arrival, prompt_tokens, output_tokens });
            links.push(Link { session, think, is_timed: time.is_some() });
        }
        if let [Some(line), Some(_)] = starts {
            return Err(wrong(line, "none".to_owned(), "one at the beginning of every session, or of none"));
        }
        let has_sessions = links.iter().any(|link| *link != Link::ALONE);
        let mut trace = RequestTrace { prefix_hashes, warnings, ..RequestTrace::new(name_of(&path), requests) };
        trace.sessions = has_sessions.then(|| Sessions::new(links));
        Ok(trace.settled())
    }
}
