//! Tables whose rows are requests by themselves: read one by one, or as a whole.

use std::path::{Path, PathBuf};

use super::{LeftOut, TIME, lengths, name_of, table_warnings};
use crate::error::{Result, TraceError};
use crate::request::{Request, RequestTrace, YEAR_2000};
use crate::request_file::ReadOptions;
use crate::table::{Owner, Row, Table};
use crate::units::Nanos;

/// A row that is a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimedRow {
    /// Nanoseconds since the time that the file counts from.
    pub time: i128,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
}

/// Which time of a file is time 0 of its trace.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    /// That of the first request.
    First,
    /// That of the first request if times are dates, else 0.
    FirstOfDates,
    /// 0.
    Zero,
}

/// Rows that have been read.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RowsBefore {
    pub left_out: LeftOut,
    /// How many of them are requests.
    pub count: u32,
    /// Time of the last one that is a request.
    pub time: i128,
}

/// Reads a row; `None` if it is left out.
pub(super) type ReadRow = fn(&Row<'_>, &ReadOptions<'_>, &mut RowsBefore) -> Result<Option<TimedRow>>;

/// How a table holds requests.
pub(super) struct RowLayout {
    pub columns: &'static [&'static str],
    pub owner: Owner,
    /// Columns that change nothing of what is replayed.
    pub silent: &'static [&'static str],
    pub origin: Origin,
    pub read: ReadRow,
}

/// The rows of a file.
pub(crate) struct Rows<'a> {
    path: PathBuf,
    layout: &'static RowLayout,
    table: Table,
    options: ReadOptions<'a>,
    before: RowsBefore,
}

impl<'a> Rows<'a> {
    pub(super) fn open(path: &Path, layout: &'static RowLayout, options: &ReadOptions<'a>) -> Result<Self> {
        let table = Table::open(path, layout.columns, layout.owner)?;
        Ok(Self { path: path.to_owned(), layout, table, options: *options, before: RowsBefore::default() })
    }

    /// The next request; `None` after the last.
    pub fn next_request(&mut self) -> Result<Option<TimedRow>> {
        while let Some(row) = self.table.next_row()? {
            if let Some(request) = (self.layout.read)(&row, &self.options, &mut self.before)? {
                self.before.count = self.before.count.checked_add(1).ok_or_else(|| row.error(0, "fewer requests"))?;
                self.before.time = request.time;
                return Ok(Some(request));
            }
        }
        Ok(None)
    }

    /// Time 0 of the trace, of the first and the last time in the file.
    pub fn origin(&self, first: i128, last: i128) -> Result<i128> {
        let origin = match self.layout.origin {
            Origin::First => first,
            Origin::FirstOfDates if first >= i128::from(YEAR_2000.0) => first,
            Origin::FirstOfDates | Origin::Zero => 0,
        };
        match last - origin > i128::from(Request::MAX_ARRIVAL.0) {
            true => Err(TraceError::file(&self.path, "arrivals more than a century apart", TIME)),
            false => Ok(origin),
        }
    }

    /// What is to be said of the rows so far.
    pub fn warnings(&self) -> Vec<String> {
        table_warnings(&self.table, self.before.left_out, self.layout.silent)
    }

    /// All requests, by arrival.
    pub fn into_trace(mut self) -> Result<RequestTrace> {
        let mut rows = Vec::new();
        while let Some(row) = self.next_request()? {
            rows.push(row);
        }
        let times = rows.iter().map(|row| row.time);
        let origin = self.origin(times.clone().min().unwrap_or(0), times.max().unwrap_or(0))?;
        let requests = rows.iter().map(|row| row.counted_from(origin)).collect();
        let trace = RequestTrace { warnings: self.warnings(), ..RequestTrace::new(name_of(&self.path), requests) };
        Ok(trace.sorted())
    }
}

impl TimedRow {
    /// The request, without an id, where `origin` is time 0.
    pub fn counted_from(self, origin: i128) -> Request {
        let Self { time, prompt_tokens, output_tokens } = self;
        Request { id: 0, arrival: Nanos((time - origin) as u64), prompt_tokens, output_tokens }
    }
}

/// A request at a time of a file of others, whose columns 1 and 2 are its prompt and output tokens; `None` if it has none.
pub(super) fn timed(
    time: i128,
    row: &Row<'_>,
    options: &ReadOptions<'_>,
    before: &mut RowsBefore,
) -> Result<Option<TimedRow>> {
    let lengths = lengths(row, [1, 2], options, &mut before.left_out)?;
    Ok(lengths.map(|(prompt_tokens, output_tokens)| TimedRow { time, prompt_tokens, output_tokens }))
}
