//! BurstGPT: CSV with times in seconds.

use std::path::Path;

use super::drafts::{Draft, Drafts};
use super::{LeftOut, Reading, TIME, lengths, parse_time, table_warnings};
use crate::error::Result;
use crate::request::RequestTrace;
use crate::request_file::TimeUnit;
use crate::table::{Owner, Table};

const SILENT: [&str; 5] = ["Elapsed time", "Model", "Total tokens", "Log Type", "Status"];

pub(super) fn read(path: &Path, Reading { options, .. }: Reading<'_>) -> Result<RequestTrace> {
    let unit = options.time_unit.unwrap_or(TimeUnit::Seconds);
    let mut table = Table::open(path, &["Timestamp", "Request tokens", "Response tokens"], Owner::Others)?;
    let session_id = table.find("Session ID")?;
    let (mut drafts, mut left_out) = (Drafts::new(path, "Timestamp"), LeftOut::default());
    while let Some(row) = table.next_row()? {
        let time = row.get(0, TIME, |text| parse_time(text, unit))?;
        let Some((prompt_tokens, output_tokens)) = lengths(&row, [1, 2], options, &mut left_out)? else { continue };
        let name = session_id.map(|column| row.text(column)).transpose()?.filter(|name| !name.is_empty());
        let session = name.map(|name| drafts.session(name));
        drafts.push(Draft { line: 0, time: Some(time), prompt_tokens, output_tokens, session, think: None });
    }
    drafts.into_trace(None, table_warnings(&table, left_out, &SILENT))
}
