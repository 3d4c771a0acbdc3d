//! Results of AIPerf: one JSON object per request, with its start in nanoseconds since 1970 and its lengths.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::drafts::{Draft, Drafts};
use super::json_lines::{JsonRow, Lines, Name, Whole};
use super::{LeftOut, Reading, TIME, TOKENS};
use crate::error::Result;
use crate::request::{Request, RequestTrace};
use crate::units::Nanos;

#[derive(Deserialize)]
struct Record {
    metadata: Metadata,
    metrics: Option<Metrics>,
    error: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Metadata {
    request_start_ns: u64,
    request_end_ns: Option<u64>,
    /// The conversation of a data set, which may be replayed more than once.
    conversation_id: Option<Name>,
    /// The replay of a conversation.
    x_correlation_id: Option<Name>,
    benchmark_phase: Option<String>,
    #[serde(default)]
    was_cancelled: bool,
}

#[derive(Deserialize)]
struct Metrics {
    input_sequence_length: Option<Tokens>,
    output_sequence_length: Option<Tokens>,
}

#[derive(Deserialize)]
struct Tokens {
    value: Whole,
}

const PROMPT: &str = "metrics.input_sequence_length.value";
const OUTPUT: &str = "metrics.output_sequence_length.value";
const START: &str = "metadata.request_start_ns";

/// A served request.
struct Served {
    line: u64,
    start: u64,
    end: Option<u64>,
    session: Option<String>,
    prompt_tokens: u32,
    output_tokens: u32,
}

pub(super) fn read(path: &Path, Reading { options, .. }: Reading<'_>) -> Result<RequestTrace> {
    let mut lines = Lines::open(path)?;
    let (mut served, mut left_out) = (Vec::new(), LeftOut::default());
    let (mut warm_up, mut failed) = (0, 0);
    while let Some((line, text)) = lines.next_line()? {
        let row = JsonRow { path, line };
        let record: Record = row.parse(text, PhantomData)?;
        if record.metadata.benchmark_phase.as_deref() == Some("warmup") {
            warm_up += 1;
            continue;
        }
        if record.error.is_some() || record.metadata.was_cancelled {
            failed += 1;
            continue;
        }
        let metrics = record.metrics.ok_or_else(|| row.json_error("the object", "missing field `metrics`"))?;
        let tokens = |key: &str, tokens: Option<Tokens>| match tokens {
            Some(tokens) => row.tokens(key, tokens.value.0),
            None => Err(row.value_error(key, "none", TOKENS)),
        };
        let prompt_tokens = tokens(PROMPT, metrics.input_sequence_length)?;
        let output_tokens = tokens(OUTPUT, metrics.output_sequence_length)?;
        match left_out.without_tokens(prompt_tokens, output_tokens, options.zero_tokens) {
            None => {}
            Some(None) => continue,
            Some(Some(place)) => return Err(row.value_error([PROMPT, OUTPUT][place], 0, TOKENS)),
        }
        let Metadata { request_start_ns: start, request_end_ns: end, .. } = record.metadata;
        let name = record.metadata.x_correlation_id.or(record.metadata.conversation_id);
        let session = name.map(|name| name.0);
        served.push(Served { line, start, end, session, prompt_tokens, output_tokens });
    }
    let first = served.iter().map(|served| served.start).min().unwrap_or(0);
    served.sort_by_key(|served| served.start);
    // Only conversations of several turns are sessions: every other request has an identity of its own.
    let mut turns: BTreeMap<&str, (u64, Option<u64>)> = BTreeMap::new();
    for name in served.iter().filter_map(|served| served.session.as_ref()) {
        turns.entry(name).or_default().0 += 1;
    }
    let mut drafts = Drafts::new(path, START);
    for one in &served {
        let time = Nanos(one.start - first);
        if time > Request::MAX_ARRIVAL {
            return Err(JsonRow { path, line: one.line }.value_error(START, one.start, TIME));
        }
        let known = one.session.as_ref().and_then(|name| Some((name, turns.get_mut(name.as_str())?)));
        let (mut session, mut think) = (None, None);
        if let Some((name, (_, last_end))) = known.filter(|(_, (count, _))| *count > 1) {
            session = Some(drafts.session(name));
            // The client sent the next turn so long after it had the answer to the one before.
            think = last_end.map(|end| Nanos(one.start.saturating_sub(end)));
            *last_end = one.end;
        }
        let &Served { line, prompt_tokens, output_tokens, .. } = one;
        drafts.push(Draft { line, time: Some(time), prompt_tokens, output_tokens, session, think });
    }
    let mut warnings: Vec<String> = left_out.warnings().collect();
    for (count, what) in [(warm_up, "of the warm-up"), (failed, "that failed or were cancelled")] {
        if count > 0 {
            warnings.push(format!("requests left out: {count} {what}"));
        }
    }
    drafts.into_trace(None, warnings)
}
