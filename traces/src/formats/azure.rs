//! Azure LLM inference traces: CSV with dates.

use std::path::Path;

use jiff::{Timestamp, civil, tz::TimeZone};

use super::Reading;
use super::rows::{Origin, RowLayout, Rows, timed};
use crate::error::Result;
use crate::request::RequestTrace;
use crate::request_file::ReadOptions;
use crate::table::Owner;

static LAYOUT: RowLayout = RowLayout {
    columns: &["TIMESTAMP", "ContextTokens", "GeneratedTokens"],
    owner: Owner::Others,
    silent: &[],
    origin: Origin::First,
    read: |row, options, before| {
        let time = row.get(0, "a date and time such as `2023-11-16 18:17:03.9799600`", parse_date)?;
        timed(time, row, options, before)
    },
};

pub(super) fn rows<'a>(path: &Path, options: &ReadOptions<'a>) -> Result<Option<Rows<'a>>> {
    Rows::open(path, &LAYOUT, options).map(Some)
}

pub(super) fn read(path: &Path, Reading { options, .. }: Reading<'_>) -> Result<RequestTrace> {
    Rows::open(path, &LAYOUT, options)?.into_trace()
}

/// Nanoseconds since 1970; a time without an offset from UTC is taken as UTC.
fn parse_date(text: &str) -> Option<i128> {
    let utc = |date: civil::DateTime| date.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp());
    let timestamp = text.parse::<Timestamp>().ok().or_else(|| text.parse().ok().and_then(utc))?;
    Some(timestamp.as_nanosecond())
}
