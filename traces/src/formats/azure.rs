//! Azure LLM inference traces: CSV with dates.

use std::path::Path;

use jiff::{Timestamp, civil, tz::TimeZone};

use super::{LeftOut, Reading, TIME, lengths, name_of, table_warnings};
use crate::error::{Result, TraceError};
use crate::request::{Request, RequestTrace};
use crate::table::{Owner, Table};
use crate::units::Nanos;

pub(super) fn read(path: &Path, Reading { options, .. }: Reading<'_>) -> Result<RequestTrace> {
    let mut table = Table::open(path, &["TIMESTAMP", "ContextTokens", "GeneratedTokens"], Owner::Others)?;
    let mut times: Vec<i128> = Vec::new();
    let (mut requests, mut left_out) = (Vec::new(), LeftOut::default());
    while let Some(row) = table.next_row()? {
        let time = row.get(0, "a date and time such as `2023-11-16 18:17:03.9799600`", parse_date)?;
        let Some((prompt_tokens, output_tokens)) = lengths(&row, [1, 2], options, &mut left_out)? else { continue };
        times.push(time);
        requests.push(Request { id: 0, arrival: Nanos::ZERO, prompt_tokens, output_tokens });
    }
    let first = times.iter().copied().min().unwrap_or(0);
    let last = times.iter().copied().max().unwrap_or(0);
    if last - first > i128::from(Request::MAX_ARRIVAL.0) {
        return Err(TraceError::file(path, "arrivals more than a century apart", TIME));
    }
    for (request, time) in requests.iter_mut().zip(&times) {
        request.arrival = Nanos((time - first) as u64);
    }
    let warnings = table_warnings(&table, left_out, &[]);
    Ok(RequestTrace { warnings, ..RequestTrace::from_unsorted(name_of(path), requests, None) })
}

/// Nanoseconds since 1970; a time without an offset from UTC is taken as UTC.
fn parse_date(text: &str) -> Option<i128> {
    let utc = |date: civil::DateTime| date.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp());
    let timestamp = text.parse::<Timestamp>().ok().or_else(|| text.parse().ok().and_then(utc))?;
    Some(timestamp.as_nanosecond())
}
