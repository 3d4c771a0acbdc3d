//! BurstGPT: CSV with times in seconds.

use std::path::Path;

use super::drafts::{Draft, Drafts};
use super::rows::{Origin, RowLayout, Rows, timed};
use super::{LeftOut, Reading, TIME, lengths, parse_time, table_warnings};
use crate::error::Result;
use crate::request::RequestTrace;
use crate::request_file::{ReadOptions, TimeUnit};
use crate::table::{Owner, Row, Table, read_header};
use crate::units::Nanos;

const SESSION: &str = "Session ID";

static LAYOUT: RowLayout = RowLayout {
    columns: &["Timestamp", "Request tokens", "Response tokens"],
    owner: Owner::Others,
    silent: &["Elapsed time", "Model", "Total tokens", "Log Type", "Status"],
    origin: Origin::FirstOfDates,
    read: |row, options, before| timed(read_time(row, options)?.0.into(), row, options, before),
};

/// The rows of a file without sessions.
pub(super) fn rows<'a>(path: &Path, options: &ReadOptions<'a>) -> Result<Option<Rows<'a>>> {
    let has_sessions = read_header(path)?.iter().any(|column| column == SESSION);
    if has_sessions { Ok(None) } else { Rows::open(path, &LAYOUT, options).map(Some) }
}

fn read_time(row: &Row<'_>, options: &ReadOptions<'_>) -> Result<Nanos> {
    let unit = options.time_unit.unwrap_or(TimeUnit::Seconds);
    row.get(0, TIME, |text| parse_time(text, unit))
}

pub(super) fn read(path: &Path, Reading { options, .. }: Reading<'_>) -> Result<RequestTrace> {
    if let Some(rows) = rows(path, options)? {
        return rows.into_trace();
    }
    let mut table = Table::open(path, LAYOUT.columns, LAYOUT.owner)?;
    let session_id = table.find(SESSION)?;
    let (mut drafts, mut left_out) = (Drafts::new(path, "Timestamp"), LeftOut::default());
    while let Some(row) = table.next_row()? {
        let time = read_time(&row, options)?;
        let Some((prompt_tokens, output_tokens)) = lengths(&row, [1, 2], options, &mut left_out)? else { continue };
        let name = session_id.map(|column| row.text(column)).transpose()?.filter(|name| !name.is_empty());
        let session = name.map(|name| drafts.session(name));
        drafts.push(Draft { line: 0, time: Some(time), prompt_tokens, output_tokens, session, think: None });
    }
    drafts.into_trace(None, table_warnings(&table, left_out, LAYOUT.silent))
}
