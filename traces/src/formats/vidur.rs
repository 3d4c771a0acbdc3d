//! Vidur: CSV with times in seconds.

use std::path::Path;

use super::{LeftOut, Reading, TIME, lengths, name_of, parse_time, table_warnings};
use crate::error::Result;
use crate::request::{Request, RequestTrace};
use crate::request_file::TimeUnit;
use crate::table::{Owner, Table};

const SILENT: [&str; 3] = ["request_id", "num_total_tokens", "pd_ratio"];

pub(super) fn read(path: &Path, Reading { options, .. }: Reading<'_>) -> Result<RequestTrace> {
    let mut table = Table::open(path, &["arrived_at", "num_prefill_tokens", "num_decode_tokens"], Owner::Others)?;
    let (mut requests, mut left_out) = (Vec::new(), LeftOut::default());
    while let Some(row) = table.next_row()? {
        let arrival = row.get(0, TIME, |text| parse_time(text, TimeUnit::Seconds))?;
        let Some((prompt_tokens, output_tokens)) = lengths(&row, [1, 2], options, &mut left_out)? else { continue };
        requests.push(Request { id: 0, arrival, prompt_tokens, output_tokens });
    }
    let warnings = table_warnings(&table, left_out, &SILENT);
    Ok(RequestTrace { warnings, ..RequestTrace::from_unsorted(name_of(path), requests, None) })
}
