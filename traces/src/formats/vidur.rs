//! Vidur: CSV with times in seconds.

use std::path::Path;

use super::rows::{Origin, RowLayout, Rows, timed};
use super::{Reading, TIME, parse_time};
use crate::error::Result;
use crate::request::RequestTrace;
use crate::request_file::{ReadOptions, TimeUnit};
use crate::table::Owner;

static LAYOUT: RowLayout = RowLayout {
    columns: &["arrived_at", "num_prefill_tokens", "num_decode_tokens"],
    owner: Owner::Others,
    silent: &["request_id", "num_total_tokens", "pd_ratio"],
    origin: Origin::FirstOfDates,
    read: |row, options, before| {
        let arrival = row.get(0, TIME, |text| parse_time(text, TimeUnit::Seconds))?;
        timed(arrival.0.into(), row, options, before)
    },
};

pub(super) fn rows<'a>(path: &Path, options: &ReadOptions<'a>) -> Result<Option<Rows<'a>>> {
    Rows::open(path, &LAYOUT, options).map(Some)
}

pub(super) fn read(path: &Path, Reading { options, .. }: Reading<'_>) -> Result<RequestTrace> {
    Rows::open(path, &LAYOUT, options)?.into_trace()
}
