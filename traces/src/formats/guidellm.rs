//! Files of GuideLLM: the traces that it replays, and its reports.

use std::marker::PhantomData;
use std::path::Path;

use serde::Deserialize;

use super::json_lines::Whole;
use super::{LeftOut, Reading, TIME, TOKENS, document, lengths, name_of, parse_time, table_warnings, unknown_unit};
use crate::error::{Result, TraceError};
use crate::request::{Request, RequestTrace};
use crate::request_file::TimeUnit;
use crate::table::{Owner, Table};
use crate::units::Nanos;

/// A table of times and lengths.
pub(super) fn read_trace(path: &Path, Reading { options, is_timed }: Reading<'_>) -> Result<RequestTrace> {
    let unit = match options.time_unit {
        Some(unit) => unit,
        None if !is_timed => TimeUnit::Seconds,
        None => return Err(unknown_unit(path, "of the format guidellm_trace", "timestamp")),
    };
    let mut table = Table::open(path, &["timestamp", "input_length", "output_length"], Owner::Others)?;
    let (mut requests, mut left_out) = (Vec::new(), LeftOut::default());
    while let Some(row) = table.next_row()? {
        let arrival = row.get(0, TIME, |text| parse_time(text, unit))?;
        let Some((prompt_tokens, output_tokens)) = lengths(&row, [1, 2], options, &mut left_out)? else { continue };
        requests.push(Request { id: 0, arrival, prompt_tokens, output_tokens });
    }
    let warnings = table_warnings(&table, left_out, &[]);
    Ok(RequestTrace { warnings, ..RequestTrace::from_unsorted(name_of(path), requests, None) })
}

#[derive(Deserialize)]
struct Report {
    benchmarks: Vec<Benchmark>,
}

#[derive(Deserialize)]
struct Benchmark {
    requests: Requests,
}

/// The requests of a benchmark by how they ended.
#[derive(Deserialize)]
struct Requests {
    successful: Vec<Served>,
    #[serde(default)]
    incomplete: Option<Vec<serde::de::IgnoredAny>>,
    #[serde(default, alias = "errored")]
    error: Option<Vec<serde::de::IgnoredAny>>,
}

#[derive(Deserialize)]
struct Served {
    /// Seconds since 1970.
    #[serde(alias = "start_time")]
    request_start_time: f64,
    prompt_tokens: Whole,
    output_tokens: Whole,
}

/// The report of one benchmark.
pub(super) fn read_report(path: &Path, Reading { options, .. }: Reading<'_>) -> Result<RequestTrace> {
    let Report { mut benchmarks } = document::read(path, PhantomData)?;
    let Some(Benchmark { requests: found }) = benchmarks.pop().filter(|_| benchmarks.is_empty()) else {
        let found = format!("{} benchmarks", benchmarks.len() + usize::from(!benchmarks.is_empty()));
        let expected = "one: `jq '.benchmarks |= [.[0]]'` keeps the first";
        return Err(TraceError::file(path, found, expected));
    };
    let first = found.successful.iter().map(|served| served.request_start_time).fold(f64::INFINITY, f64::min);
    let (mut requests, mut left_out) = (Vec::new(), LeftOut::default());
    for (place, served) in found.successful.iter().enumerate() {
        let wrong = |key: &str, found: String, expected: &str| TraceError::Value {
            path: path.to_owned(),
            line: 1,
            column: format!("benchmarks[0].requests.successful[{place}].{key}"),
            found: format!("`{found}`"),
            expected: expected.to_owned(),
        };
        let tokens = |key: &str, Whole(tokens): Whole| {
            let in_range = u32::try_from(tokens).ok().filter(|&tokens| tokens <= Request::MAX_TOKENS);
            in_range.ok_or_else(|| wrong(key, tokens.to_string(), TOKENS))
        };
        const LENGTHS: [&str; 2] = ["prompt_tokens", "output_tokens"];
        let prompt_tokens = tokens(LENGTHS[0], served.prompt_tokens)?;
        let output_tokens = tokens(LENGTHS[1], served.output_tokens)?;
        let start = served.request_start_time;
        let arrival = Nanos::from_secs_f64(start - first);
        if !start.is_finite() || arrival > Request::MAX_ARRIVAL {
            return Err(wrong("request_start_time", start.to_string(), TIME));
        }
        match left_out.without_tokens(prompt_tokens, output_tokens, options.zero_tokens) {
            None => requests.push(Request { id: 0, arrival, prompt_tokens, output_tokens }),
            Some(None) => {}
            Some(Some(list)) => return Err(wrong(LENGTHS[list], "0".to_owned(), TOKENS)),
        }
    }
    let mut warnings: Vec<String> = left_out.warnings().collect();
    let count = |list: &Option<Vec<serde::de::IgnoredAny>>| list.as_ref().map_or(0, Vec::len);
    for (count, what) in [(count(&found.incomplete), "incomplete"), (count(&found.error), "that failed")] {
        if count > 0 {
            warnings.push(format!("requests left out: {count} {what}"));
        }
    }
    Ok(RequestTrace { warnings, ..RequestTrace::from_unsorted(name_of(path), requests, None).counted_from_first() })
}
